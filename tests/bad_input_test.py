"""Every argument out of range is a ValueError that names it and its value."""

import re

from absl.testing import absltest
from absl.testing import parameterized
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax
from sparse_jax.masks import scores as scoring
from sparse_jax.masks.structures import Block
from sparse_jax.masks.structures import NM

NAN = float('nan')
PARAMS = {'w': jnp.ones((4, 6))}
NOT_SPARSITIES = (NAN, 1., 1.5, -.1, float('inf'), 'x', '0.5', None, 1j,
                  (.5,), True)
NOT_FRACTIONS = (NAN, 1.5, -.1, float('inf'), 'x', None)
NOT_COUNTS = (NAN, -1, 1.5, 2., 'x', True)

# Constructors with good arguments of their own.
METHODS = {
    'static': lambda **kw: sparse_jax.static(**{'sparsity': .5} | kw),
    'set_': lambda **kw: sparse_jax.set_(**{'sparsity': .5} | kw),
    'rigl': lambda **kw: sparse_jax.rigl(**{'sparsity': .5} | kw),
    'gmp': lambda **kw: sparse_jax.gmp(**{'sparsity': .5} | kw),
    'dnw': lambda **kw: sparse_jax.dnw(**{'sparsity': .5} | kw),
    'top_kast': lambda **kw: sparse_jax.top_kast(
        **{'sparsity': .5, 'backward_sparsity': .25} | kw),
    'snip': lambda **kw: sparse_jax.snip(**{'sparsity': .5} | kw),
    'grasp': lambda **kw: sparse_jax.grasp(
        **{'sparsity': .5, 'scope': 'layer'} | kw),
    'swat': lambda **kw: sparse_jax.swat(**{'sparsity': .5} | kw),
    'snfs': lambda **kw: sparse_jax.snfs(**{'sparsity': .5} | kw),
    'dsr': lambda **kw: sparse_jax.dsr(**{'sparsity': .5} | kw),
    'srigl': lambda **kw: sparse_jax.srigl(**{'sparsity': .5} | kw),
    'iht': lambda **kw: sparse_jax.iht(**{'sparsity': .5} | kw),
    'mest': lambda **kw: sparse_jax.mest(**{'sparsity': .5} | kw),
    'granet': lambda **kw: sparse_jax.granet(
        **{'sparsity': .5, 'prune_end': 9, 'initial_sparsity': .25,
           'allocation': sparse_jax.uniform} | kw),
    'spartan': lambda **kw: sparse_jax.spartan(
        **{'sparsity': .5, 'update_end': 8, 'scope': 'layer'} | kw),
    'ac_dc': lambda **kw: sparse_jax.ac_dc(
        **{'sparsity': .5, 'scope': 'layer'} | kw),
}
WINDOWED = ('set_', 'rigl', 'gmp', 'top_kast', 'snfs', 'dsr', 'ac_dc', 'srigl',
            'mest', 'granet')
MOVING = ('set_', 'rigl', 'snfs', 'dsr', 'srigl', 'granet')
# The structure of SRigL is its own.
STRUCTURED = tuple(name for name in METHODS if name != 'srigl')
LEARNED = {'str_': sparse_jax.str_, 'dst': sparse_jax.dst, 'cs': sparse_jax.cs,
           'sr_ste': sparse_jax.sr_ste}


def cases(names, argument, values):
  return [(f'{argument}_of_{name}', name, argument, values) for name in names]


BAD = (
    cases(METHODS, 'sparsity', NOT_SPARSITIES)
    + cases(('top_kast',), 'backward_sparsity', (*NOT_SPARSITIES, .6))
    + cases(('top_kast',), 'penalty_weight', (NAN, -1., float('inf'), 'x',
                                              None))
    + cases(('top_kast',), 'backward_selection', ('typo', None, 3))
    + cases(('top_kast',), 'stop_exploration_at', NOT_COUNTS)
    + cases(MOVING, 'drop_fraction', NOT_FRACTIONS)
    + cases((*MOVING, 'snip', 'grasp'), 'skip_step', ('no', None, 2))
    + cases(('snip', 'grasp', 'gmp', 'ac_dc'), 'scope', ('both', None, 1))
    + cases(('set_',), 'drop_by', ('size', None))
    + cases(('set_', 'rigl'), 'grow_init', ('ones', None, 1))
    + cases(('snfs',), 'redistribution', ('all', None, 1))
    + cases(('gmp',), 'hidden', ('free', None, 1))
    + cases(('snfs',), 'momentum', NOT_SPARSITIES)
    + cases(('dsr',), 'threshold', (NAN, 0., -1., 'x', None))
    + cases(('ac_dc',), 'final_dense', (*NOT_COUNTS, 5))
    + cases(('ac_dc',), 'reset_slots', ('no', None, 2))
    + cases(WINDOWED, 'update_every', (*NOT_COUNTS, 0, None))
    + cases(WINDOWED, 'update_begin', (*NOT_COUNTS, None))
    + cases(WINDOWED, 'update_end', NOT_COUNTS)
    + cases(METHODS, 'allocation', (.5, None, 'erk'))
    + cases(STRUCTURED, 'structure', (None, (2, 2), NM, 'block'))
    + cases(METHODS, 'is_sparse', (5, 'kernel', [('(', True)], ['w']))
    + cases(METHODS, 'batch_axes', (1, 'x', (.5,), None))
    + cases(METHODS, 'contracting', (1, 'x', (.5,)))
    + cases(('gmp',), 'schedule', (.5, 'cubic'))
    + cases(('gmp',), 'score', (None, 'magnitude')))


def complaint(argument, value, call):
  """What is wrong with the error of a call, or None for nothing."""
  try:
    call()
  except ValueError as error:
    if f'`{argument}' in str(error) and repr(value) in str(error):
      return None
    return f'says: {error}'
  except Exception as error:  # The test is about the type.
    return f'is a {type(error).__name__}'
  return 'is accepted'


class MethodTest(parameterized.TestCase):

  @parameterized.named_parameters(*BAD)
  def test_a_bad_argument_is_named_with_its_value(self, name, argument,
                                                  values):
    problems = {repr(value): complaint(
        argument, value, lambda: METHODS[name](**{argument: value}))
                for value in values}
    self.assertEqual(problems, dict.fromkeys(problems))

  @parameterized.parameters(
      ('str_', 'initial', (NAN, 'x', None, True)),
      ('dst', 'penalty_weight', (NAN, -1., 'x', None)),
      ('dst', 'least_kept', NOT_FRACTIONS),
      ('cs', 'initial', (NAN, 'x', None)),
      ('cs', 'temperature', (NAN, 0., -1., 'x')),
      ('cs', 'penalty_weight', (NAN, -1., 'x')),
      ('cs', 'rounds', (*NOT_COUNTS, 0)),
      ('cs', 'round_steps', (*NOT_COUNTS, 0)),
      ('cs', 'rewind_to', (*NOT_COUNTS, 10_000)),
      ('cs', 'rewind', ('no', None, 2)),
      ('sr_ste', 'decay', (NAN, -1., 'x', None)),
      ('sr_ste', 'structure', (None, Block((2, 2)), 'nm')))
  def test_bad_setting_of_what_has_no_sparsity_is_named(self, name, argument,
                                                        values):
    problems = {repr(value): complaint(
        argument, value, lambda: LEARNED[name](**{argument: value}))
                for value in values}
    self.assertEqual(problems, dict.fromkeys(problems))

  @parameterized.parameters(*METHODS)
  def test_good_arguments_pass(self, name):
    METHODS[name]()
    METHODS[name](sparsity=np.float32(.5), batch_axes=lambda path, leaf: (),
                  is_sparse=[('w', True)], contracting=(-2,))

  @parameterized.parameters(*WINDOWED)
  def test_an_end_before_the_begin_is_named(self, name):
    with self.assertRaisesRegex(ValueError, r'`update_end` \(=3\)'):
      METHODS[name](update_begin=5, update_end=3)

  @parameterized.parameters(*MOVING, 'gmp')
  def test_an_end_that_leaves_no_room_is_named_as_it_was_given(self, name):
    """The schedules inside call it `end`; the caller does not."""
    with self.assertRaisesRegex(ValueError, r'`update_end` \(=0\)'):
      METHODS[name](update_end=0)

  @parameterized.parameters(*STRUCTURED)
  def test_n_of_m_fixes_the_sparsity(self, name):
    with self.assertRaisesRegex(ValueError, r'`sparsity` \(=0.25\)'):
      METHODS[name](sparsity=.25, structure=NM(2, 4), **(
          {'backward_sparsity': 0.} if name == 'top_kast' else {}))
    if name in ('snfs', 'dsr', 'granet', 'spartan'):  # No budget could move.
      with self.assertRaisesRegex(ValueError, '`structure` .*NM'):
        METHODS[name](structure=NM(2, 4))
    for allocation in (sparse_jax.erk, {'w': .5}):
      with self.assertRaisesRegex(ValueError, '`allocation` .*NM'):
        METHODS[name](structure=NM(2, 4), allocation=allocation)

  @parameterized.parameters(
      ({'w': 1.}, r"`allocation\['w'\]` \(=1.0\)"),
      ({'w': 'x'}, r"`allocation\['w'\]` \(='x'\)"),
      ({'typo': .5}, '`allocation`.*typo'))
  def test_a_bad_mapping_is_named_when_the_leaves_are_known(self, mapping,
                                                            message):
    method = sparse_jax.static(.5, allocation=mapping)
    with self.assertRaisesRegex(ValueError, message):
      method.init(PARAMS)

  @parameterized.parameters('batch_axes', 'contracting')
  def test_an_axis_that_no_leaf_has_is_named(self, argument):
    axes = (5,) if argument == 'contracting' else (lambda path, leaf: (5,))
    method = sparse_jax.static(.5, structure=Block((2, 2)), **{argument: axes})
    with self.assertRaisesRegex(ValueError, f'`{argument}`.*5'):
      method.init(PARAMS)

  def test_stacked_axes_that_no_leaf_has_are_not_ignored(self):
    method = sparse_jax.static(.5, batch_axes=(7,))
    with self.assertRaisesRegex(ValueError, '`batch_axes`.*7'):
      method.init(PARAMS)

  @parameterized.parameters('x', 1.5, True, (object(),))
  def test_a_bad_key_is_named(self, key):
    with self.assertRaisesRegex(ValueError, '`key` '):
      sparse_jax.static(.5).init(PARAMS, key)

  def test_many_keys_are_not_a_key(self):
    with self.assertRaisesRegex(ValueError, '`key` '):
      sparse_jax.static(.5).init(PARAMS, jax.random.split(jax.random.key(0)))

  def test_a_key_of_another_kind_works_or_is_named(self):
    key = jax.random.key(0, impl='rbg')
    try:
      state = sparse_jax.static(.5).init(PARAMS, key)
    except ValueError as error:
      self.assertIn('`key`', str(error))
    else:
      self.assertEqual(int(state.forward_masks['w'].sum()), 12)


class PartTest(parameterized.TestCase):

  @parameterized.parameters(
      (Block((0, 2)), 'shape', 0), (Block((2,)), 'shape', (2,)),
      (Block((2, -1)), 'shape', -1), (Block((2, 1.5)), 'shape', 1.5),
      (Block(2), 'shape', 2),
      (Block((2, 2), reduce='mean'), 'reduce', 'mean'),
      (Block((2, 2), reduce=None), 'reduce', None), (NM(0, 4), 'n', 0),
      (NM(-1, 4), 'n', -1), (NM(1.5, 4), 'n', 1.5), (NM(4, 2), 'm', 2),
      (NM(2, '4'), 'm', '4'), (NM(2, 4, axis=0), 'axis', 0),
      (NM(2, 4, axis='x'), 'axis', 'x'))
  def test_bad_fields_of_a_structure_are_named(self, structure, field, value):
    with self.assertRaisesRegex(
        ValueError, f'`{field}` .*{re.escape(repr(value))}'):
      sparse_jax.static(.5, structure=structure)
    with self.assertRaisesRegex(ValueError, f'`{field}` '):
      sparse_jax.make_mask(jnp.ones((4, 4)), .5, structure=structure)

  @parameterized.named_parameters(
      ('make_mask', 'sparsity', lambda s: sparse_jax.make_mask(
          PARAMS['w'], s)),
      ('keep_count', 'sparsity', lambda s: sparse_jax.keep_count(10, s)),
      ('uniform', 'sparsity', lambda s: sparse_jax.uniform({'w': (4, 6)}, s)),
      ('erk', 'sparsity', lambda s: sparse_jax.erk({'w': (4, 6)}, s)),
      ('erdos_renyi', 'sparsity', lambda s: sparse_jax.erdos_renyi(
          {'w': (4, 6)}, s)),
      ('cubic_final', 'final', lambda s: (
          sparse_jax.schedules.cubic_sparsity(s, end=5))),
      ('cubic_initial', 'initial', lambda s: (
          sparse_jax.schedules.cubic_sparsity(.5, end=5, initial=s))))
  def test_bad_sparsities_are_named_by_the_parts(self, argument, call):
    problems = {repr(s): complaint(argument, s, lambda: call(s))
                for s in NOT_SPARSITIES}
    self.assertEqual(problems, dict.fromkeys(problems))

  @parameterized.parameters(
      ('begin', -1), ('begin', 1.5), ('begin', 'x'), ('begin', None),
      ('end', 0), ('end', -1), ('end', 1.5), ('end', None))
  def test_bad_steps_of_schedules_are_named(self, argument, value):
    with self.assertRaisesRegex(
        ValueError, f'`{argument}` .*{re.escape(repr(value))}'):
      sparse_jax.schedules.cubic_sparsity(.5, **{'end': 5} | {argument: value})
    if argument == 'end':
      with self.assertRaisesRegex(ValueError, '`end` '):
        sparse_jax.schedules.cosine_drop(.5, end=value)

  @parameterized.parameters(*NOT_FRACTIONS)
  def test_bad_drop_fractions_are_named(self, value):
    with self.assertRaisesRegex(ValueError, '`fraction` '):
      sparse_jax.schedules.cosine_drop(value, end=5)

  @parameterized.parameters(
      ('penalty_weight', NAN), ('penalty_weight', -1.),
      ('penalty_weight', 'x'), ('penalty_weight', None),
      ('forward_density', NAN), ('forward_density', 0.),
      ('forward_density', -.5), ('forward_density', 1.5),
      ('forward_density', 'x'))
  def test_bad_arguments_of_the_penalty_are_named(self, argument, value):
    pattern = f'`{argument}` .*{re.escape(repr(value))}'
    masks = {'w': jnp.ones((4, 6), bool)}
    with self.assertRaisesRegex(ValueError, pattern):
      sparse_jax.exploration_loss(PARAMS, masks, masks, **{argument: value})
    with self.assertRaisesRegex(ValueError, pattern):
      sparse_jax.transforms.add_exploration_decay(**{argument: value})

  @parameterized.parameters((None,), (optax.sgd(.1),), ('top_kast',),
                            (sparse_jax.top_kast,))
  def test_something_that_is_no_method_is_named(self, method):
    with self.assertRaisesRegex(ValueError, '`method` '):
      sparse_jax.sparsify(optax.sgd(.1), method)

  def test_updates_without_params_are_named(self):
    tx = sparse_jax.sparsify(optax.sgd(.1), sparse_jax.static(.5))
    with self.assertRaisesRegex(ValueError, '`params` '):
      tx.update(PARAMS, tx.init(PARAMS))
    for part, masks in (
        (sparse_jax.transforms.keep_params_sparse(), ('forward_masks',)),
        (sparse_jax.transforms.add_exploration_decay(),
         ('forward_masks', 'backward_masks'))):
      with self.assertRaisesRegex(ValueError, '`params` '):
        part.update(PARAMS, part.init(PARAMS),
                    **{name: PARAMS for name in masks})

  @parameterized.named_parameters(
      ('none', None, "no leaf 'a/bias'"),
      ('list', [jnp.ones((4, 6)), jnp.ones(6)],
       "(a list) has no leaf 'a/bias'"),
      ('leaf_is_none', {'a': {'bias': None}}, "no leaf 'a/bias'"),
      ('leaf_is_missing', {'a': {'bias': jnp.ones(6)}}, "no leaf 'a/kernel'"),
      ('leaf_is_one_more', {'b': jnp.ones(2)}, "has ['b']"),
      ('shape', {'a': {'bias': jnp.ones(6), 'kernel': jnp.ones((4, 1))}},
       "shape (4, 1) at 'a/kernel', where the parameter is of shape (4, 6)"),
      ('examples', {'a': {'bias': jnp.ones((2, 6)),
                          'kernel': jnp.ones((2, 4, 6))}},
       "shape (2, 6) at 'a/bias', where the parameter is of shape (6,)"),
      ('integers', {'a': {'bias': jnp.ones(6, int),
                          'kernel': jnp.ones((4, 6))}}, "int32 at 'a/bias'"),
      ('no_gradient', {'a': {'bias': np.zeros(6, jax.dtypes.float0),
                             'kernel': jnp.ones((4, 6))}}, "at 'a/bias'"),
      ('complex', {'a': {'bias': jnp.ones(6), 'kernel': jnp.ones((4, 6)) * 1j}},
       "complex64 at 'a/kernel', where the parameter is of float32"))
  def test_gradients_of_other_parameters_are_named(self, grads, message):
    params = {'a': {'kernel': jnp.ones((4, 6)), 'bias': jnp.ones(6)}}
    if isinstance(grads, dict) and 'b' in grads:
      grads = params | grads
    for name in ('static', 'rigl', 'top_kast'):
      tx = sparse_jax.sparsify(optax.adam(.1), METHODS[name]())
      with self.assertRaisesRegex(ValueError, '`grads` .*' + re.escape(
          message)):
        jax.eval_shape(tx.update, grads, tx.init(params), params)

  def test_gradients_in_other_containers_are_named(self):
    tx = sparse_jax.sparsify(optax.adam(.1), METHODS['static']())
    with self.assertRaisesRegex(ValueError, '`grads` .a FrozenDict.*a dict'):
      tx.update(flax.core.freeze(PARAMS), tx.init(PARAMS), PARAMS)

  def test_gradients_of_another_precision_pass(self):
    tx = sparse_jax.sparsify(optax.adam(.1), METHODS['rigl']())
    half = {'w': PARAMS['w'].astype(jnp.bfloat16)}
    for params, grads in ((PARAMS, half), (half, PARAMS)):
      jax.eval_shape(tx.update, grads, tx.init(params), params)

  @parameterized.product(method=[
      sparse_jax.rigl(.5, update_every=1),
      sparse_jax.top_kast(.5, backward_sparsity=.5),
      sparse_jax.packed(sparse_jax.rigl(.5, structure=Block((2, 2))))])
  def test_gradients_of_single_examples_are_named(self, method):
    tx = sparse_jax.sparsify(optax.adam(.1), method)
    params, state = sparse_jax.start(tx, method, PARAMS)
    grads = jax.tree.map(lambda leaf: jnp.ones((8, *leaf.shape)), params)
    with self.assertRaisesRegex(
        ValueError, '`grads` has an array of shape .8, .* before sparsify'):
      jax.jit(tx.update)(grads, state, params)

  @parameterized.parameters('yes', None, 2)
  def test_a_penalty_that_is_no_bool_is_named(self, value):
    with self.assertRaisesRegex(ValueError, '`penalty` '):
      sparse_jax.sparsify(optax.sgd(.1), sparse_jax.static(.5), penalty=value)

  def test_what_is_no_optimizer_or_no_method_is_named(self):
    with self.assertRaisesRegex(ValueError, '`optimizer` .=None'):
      sparse_jax.sparsify(None, sparse_jax.static(.5))
    with self.assertRaisesRegex(ValueError, '`method` .=None'):
      sparse_jax.describe(None, PARAMS)

  @parameterized.parameters((7,), (-3,))
  def test_axes_out_of_range_are_named(self, axis):
    for argument in ('batch_axes', 'contracting'):
      with self.assertRaisesRegex(ValueError, f'`{argument}`.*{axis}'):
        sparse_jax.make_mask(PARAMS['w'], .5, structure=Block((2, 2)),
                             **{argument: (axis,)})

  @parameterized.parameters('batch_axes', 'contracting')
  def test_axes_given_twice_are_named(self, argument):
    ndim = PARAMS['w'].ndim
    with self.assertRaisesRegex(ValueError, f'`{argument}`.*twice'):
      sparse_jax.make_mask(PARAMS['w'], .5, **{argument: (0, -ndim)})

  def test_no_contracting_axis_is_named(self):
    with self.assertRaisesRegex(ValueError, '`contracting`'):
      sparse_jax.make_mask(PARAMS['w'], .5, structure=Block((2, 2)),
                           contracting=())

  def test_scores_are_usable_as_they_are(self):
    weight = jnp.array([-2., 3.])
    np.testing.assert_array_equal(scoring.magnitude(weight), [2., 3.])
    np.testing.assert_array_equal(
        scoring.gradient_magnitude(weight, -weight), [2., 3.])
    np.testing.assert_array_equal(scoring.saliency(weight, weight), [4., 9.])


if __name__ == '__main__':
  absltest.main()
