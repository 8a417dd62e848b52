"""Every optimizer of Optax under every method, and wrappers on both sides."""

import functools
import inspect
from typing import Any
from typing import NamedTuple
import warnings

from absl.testing import absltest
from absl.testing import parameterized
from flax.training import train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

import sparse_jax
from sparse_jax import trees
from sparse_jax.rules import slots
from tests import methods_test

# The rows of the law table that are methods, not variants of one.
# One of each mechanism: ITOP, SRigL and GraNet are RigL, MEST is SET; STE,
# SWAT and IHT are DNW; DST and CS learn like STR.
METHODS = {name: row for name, row in methods_test.METHODS.items()
           if name not in methods_test.VARIANTS and name not in (
               'itop', 'dsr', 'grasp', 'ste', 'sr_ste', 'swat', 'dst', 'cs',
               'srigl', 'granet', 'mest', 'iht')}
# With every optimizer; of the others two at a time, in turn.
ALWAYS = ('dense', 'static', 'set_', 'rigl', 'gmp', 'dnw', 'top_kast')
# One of each kind, for wrappers: fixed, moving with zeros, hidden weights.
KINDS = ('static', 'rigl', 'top_kast')
ZEROS = methods_test.ZEROS

# Everything exported that makes a transformation but is no optimizer: parts
# and wrappers (`scale_by_*` are parts by their name). The wrappers have a
# table of their own below.
PARTS = frozenset("""
    adaptive_grad_clip add_decayed_weights add_noise apply_every
    apply_if_finite centralize chain clip clip_by_block_rms
    clip_by_global_norm conditionally_mask conditionally_transform
    differentially_private_aggregate ema flatten freeze identity
    inject_hyperparams inject_stateful_hyperparams keep_params_nonnegative
    lookahead masked measure_with_ema mechanize multi_transform named_chain
    normalize normalize_by_update_norm partition reduce_on_plateau sam scale
    schedule_free selective_transform set_to_zero snapshot
    split_real_and_imaginary stateless stateless_with_tree_map trace
    with_extra_args_support zero_nans
    """.split())
# Arguments and the extra arguments of `update`, where the defaults and a
# learning rate of 0.05 do not do.
SPECIAL = {
    'adadelta': dict(learning_rate=.05),
    'dog': dict(learning_rate=1.),
    'polyak_sgd': dict(extras=('value',)),
    'lbfgs': dict(extras=('value', 'grad', 'value_fn')),
    'momo': dict(extras=('value',)),
    'momo_adam': dict(extras=('value',)),
    'sophia': dict(extras=('obj_fn',)),
    'noisy_sgd': dict(key=0),
    'rmsprop': dict(initial_scale=1.),
}
# What cannot work, why, and what it says.
EXCEPTIONS = {
    'dpsgd': ('takes the gradient of each example, with a batch axis that no '
              'mask has: chain differentially_private_aggregate before '
              'sparsify(sgd) instead',
              dict(l2_norm_clip=1., noise_multiplier=.1, seed=0),
              'to have a batch dimension'),
}


def exported():
  """{name: constructor} of what Optax exports and is no part or wrapper."""
  found = {}
  for module in (optax, optax.contrib):
    for name, fn in inspect.getmembers(module, inspect.isfunction):
      makes = 'GradientTransformation' in str(
          inspect.signature(fn).return_annotation)
      makes |= 'optax.contrib._dog' == fn.__module__  # Without annotations.
      if makes and not name.startswith(('scale_by_', '_')) and (
          name not in PARTS):
        found[name] = fn
  return found


def build(name):
  """The optimizer of that name, and which extra arguments it needs."""
  special = dict(SPECIAL.get(name, {}))
  extras = special.pop('extras', ())
  fn = exported()[name]
  if 'learning_rate' in inspect.signature(fn).parameters and (
      inspect.signature(fn).parameters['learning_rate'].default
      is inspect.Parameter.empty):
    special.setdefault('learning_rate', .05)
  with warnings.catch_warnings():  # Deprecated ones count until they go.
    warnings.simplefilter('ignore', DeprecationWarning)
    return fn(**special), extras


class Seen(NamedTuple):
  """One step in NumPy: parameters and masks, before and after."""

  before: dict[str, np.ndarray]
  after: dict[str, np.ndarray]
  state: Any
  old_state: Any


def fake_params():
  return methods_test.fake_params(conv=(1, 1, 4, 4), dense=(4, 6))['dense']


def extra_arguments(method, params, state, batch, value, grads, names):
  """The extra arguments that some optimizers ask for, of this loss."""
  def of_params(params):
    return methods_test.quadratic(method.read(params, state), batch)

  known = {'value': value, 'grad': grads, 'value_fn': of_params,
           'obj_fn': of_params, 'grad_fn': lambda p, _: jax.grad(of_params)(p)}
  return {name: known[name] for name in names}


def train(optimizer, extras=(), *, outer=lambda tx: tx, steps=5,
          names=tuple(METHODS)) -> tuple[dict[str, list[Seen]], int]:
  """Methods in one compiled function; the steps of each, compilations.

  `outer` wraps the sparsified optimizer; None for `optimizer` means that
  `outer` gets the method instead.
  """
  methods = {name: METHODS[name]() for name in names}
  if optimizer is None:
    txs = {name: outer(method) for name, method in methods.items()}
  else:
    txs = {name: outer(sparse_jax.sparsify(optimizer, method))
           for name, method in methods.items()}
  starts = {name: method.parametrize(fake_params())
            for name, method in methods.items()}

  def one(method, tx, params, state, batch):
    value, grads = jax.value_and_grad(lambda p: methods_test.quadratic(
        method.read(p, state), batch))(params)
    given = extra_arguments(method, params, state, batch, value, grads, extras)
    updates, state = tx.update(grads, state, params, **given)
    return optax.apply_updates(params, updates), state

  def step(states, batch):
    return {name: one(methods[name], txs[name], *states[name], batch)
            for name in methods}

  compiled = jax.jit(step, compiler_options=methods_test.QUICK)
  states = {name: (starts[name], tx.init(starts[name]))
            for name, tx in txs.items()}
  seen = {name: [] for name in methods}
  for t in range(1, steps + 1):
    new = compiled(states, methods_test.fake_batch(fake_params(), t))
    for name in methods:
      seen[name].append(Seen(
          trees.leaves_by_path(jax.tree.map(np.array, states[name][0])),
          trees.leaves_by_path(jax.tree.map(np.array, new[name][0])),
          sparse_jax.get_state(new[name][1]),
          sparse_jax.get_state(states[name][1])))
    states = new
  return seen, compiled._cache_size()


def changes_types(optimizer, extras) -> bool:
  """Whether the optimizer alone starts with other types than it goes on."""
  params, method = fake_params(), sparse_jax.dense()

  def update(params, state):
    own = method.init(params)
    given = extra_arguments(method, params, own, params, jnp.float32(1),
                            params, extras)
    return optax.with_extra_args_support(optimizer).update(
        params, state, params, **given)[1]

  state = optimizer.init(params)
  after = jax.eval_shape(update, params, state)
  weak = [[getattr(leaf, 'weak_type', False) for leaf in jax.tree.leaves(tree)]
          for tree in (state, after)]
  return weak[0] != weak[1]


def counts_of(name, step, size=24):
  """Entries of A and B in the one kernel after a step."""
  if name == 'dense':
    return {}
  if name == 'ac_dc' and step // 2 % 2 == 0:
    return {'kernel': (size, size)}
  if name == 'spartan':  # Pruned by step 3; all get a gradient up to 5.
    kept = sparse_jax.keep_count(size, .75 * min(step / 3, 1))
    return {'kernel': (kept, size if step < 5 else kept)}
  forward = sparse_jax.keep_count(size, .75)
  backward = {'dnw': 0., 'top_kast': .5, 'powerprop': .5}.get(name, .75)
  return {'kernel': (forward, sparse_jax.keep_count(size, backward))}


class LawCase(parameterized.TestCase):

  def check_laws(self, seen, compilations):
    """Counts, types, zeros and hidden values, method by method."""
    self.assertEqual(compilations, 1)
    for name, steps in seen.items():
      for t, step in enumerate(steps, 1):
        with self.subTest(method=name, step=t):
          self.check_step(name, step, t)

  def check_step(self, name, step, t):
    masks = [trees.leaves_by_path(tree) for tree in (
        step.state.forward_masks, step.state.backward_masks,
        step.old_state.backward_masks)]
    forward, backward, previous = masks
    if name not in methods_test.LEARNED:
      self.assertEqual({path: (int(forward[path].sum()), int(
          backward[path].sum())) for path in forward}, counts_of(name, t))
    for path, value in step.after.items():
      self.assertTrue(np.all(np.isfinite(value)), path)
    for path, mask in forward.items():
      if name in ZEROS:
        self.assertFalse(np.any(step.after[path][~mask]))
      else:
        still = ~np.asarray(previous[path])
        np.testing.assert_array_equal(
            methods_test.bits(step.after[path])[still],
            methods_test.bits(step.before[path])[still])


class OptimizerTest(LawCase):

  @parameterized.parameters(*sorted(set(exported()) - set(EXCEPTIONS)))
  def test_methods_keep_their_laws_under(self, name):
    """A name that a later Optax adds comes by itself, with its defaults."""
    optimizer, extras = build(name)
    # Its step divides by the size of the last gradient, which is nearly 0
    # where a reparametrized weight is small: it diverges by itself.
    others = [method for method in METHODS if method not in ALWAYS and (
        method, name) != ('powerprop', 'acprop')]
    turn = sorted(exported()).index(name)
    pair = {others[(turn + i) % len(others)] for i in (0, 1)}
    seen, compilations = train(optimizer, extras, names=[*ALWAYS, *pair])
    # L-BFGS begins with weakly typed scalars, and so compiles twice alone.
    self.check_laws(seen, compilations - changes_types(optimizer, extras))

  def test_table_names_only_what_exists(self):
    names = set(exported())
    self.assertEqual((set(SPECIAL) | set(EXCEPTIONS)) - names, set())
    self.assertGreater(len(names), 45)

  @parameterized.parameters(*((name,) for name in EXCEPTIONS))
  def test_exception_still_has_its_reason(self, name):
    unused_reason, arguments, message = EXCEPTIONS[name]
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', DeprecationWarning)
      optimizer = exported()[name](learning_rate=.1, **arguments)
    tx = sparse_jax.sparsify(optimizer, METHODS['static']())
    params = fake_params()
    with self.assertRaisesRegex(ValueError, message):
      tx.update(params, tx.init(params), params)

  def test_optimizer_moves_the_active_weights(self):
    """Else the laws above would hold of an optimizer that does nothing."""
    for name, steps in train(optax.adam(.05))[0].items():
      moved = steps[0].before['kernel'] != steps[0].after['kernel']
      self.assertTrue(moved.any(), name)


def clock():
  """Counts the updates of each weight since its slot was made anew.

  The slot begins at 64 and grows by one each step; the update is the slot
  that was found, times 2**-20.
  """
  def init(params):
    return {'slots': jax.tree.map(lambda p: jnp.full_like(p, 64.), params)}

  def update(updates, state, params=None):
    del updates, params
    found = state['slots']
    return (jax.tree.map(lambda s: s * 2.**-20, found),
            {'slots': jax.tree.map(lambda s: s + 1, found)})

  return optax.GradientTransformation(init, update)


class SlotTest(parameterized.TestCase):

  @parameterized.product(
      name=('set_', 'rigl', 'top_kast', 'top_kast_random'),
      outer=(lambda tx: tx, optax.flatten))
  def test_weights_that_enter_start_with_fresh_slots(self, name, outer):
    method = methods_test.METHODS[name](**(
        dict(drop_fraction=.5) if name in ('set_', 'rigl') else {}))
    tx = sparse_jax.sparsify(outer(clock()), method, penalty=False)
    params = fake_params()

    @functools.partial(jax.jit, compiler_options=methods_test.QUICK)
    def step(params, state, batch):
      # Gradients that move nothing, but tell RigL where to grow.
      updates, state = tx.update(batch, state, params)
      return optax.apply_updates(params, updates), state, updates

    rng, state, age = np.random.default_rng(4), tx.init(params), None
    entered = 0
    for t in range(1, 8):
      inside = np.asarray(state.sparse.backward_masks['kernel'])
      if age is None:
        age = np.where(inside, 64, 0)
      fresh = inside & (age == 0)
      entered += fresh.sum()
      age = np.where(inside, np.where(fresh, 64, age), 0)
      batch = jax.tree.map(lambda p: jnp.asarray(
          rng.normal(size=p.shape), p.dtype), params)
      # Swaps the order of magnitudes, so that Top-KAST's sets move too.
      params = jax.tree.map(lambda p: jnp.where(p == 0, p, jnp.sign(p) * (
          .1 + .1 * rng.random(p.shape).astype(p.dtype))), params)
      params, state, updates = step(params, state, batch)
      after = np.asarray(state.sparse.backward_masks['kernel'])
      stays = inside & (after if name in ZEROS else True)
      found = np.asarray(updates['kernel']) * 2.**20
      np.testing.assert_array_equal(found[stays], age[stays], str(t))
      age = np.where(inside, age + 1, 0)
    self.assertGreater(entered, 3)

  @parameterized.parameters(*(name for name in METHODS if name not in (
      'dense', 'powerprop', *methods_test.RESETS)))
  def test_slots_of_a_namesake_that_is_not_sparse_are_left_alone(self, name):
    """'head/kernel' also ends with the path of the sparse leaf 'kernel'."""
    kernel = fake_params()['kernel']
    params = {'kernel': kernel, 'head': {'kernel': kernel + 1}}
    method = METHODS[name](is_sparse=[('head', False)])
    params = method.parametrize(params)
    tx, inner = sparse_jax.sparsify(optax.adam(.1), method), optax.adam(.1)
    one, two = params['head'], params['head']
    state, slots = tx.init(params), inner.init(two)
    update = jax.jit(tx.update, compiler_options=methods_test.QUICK)
    for t in range(1, 4):
      grads = methods_test.fake_batch(params, t)
      updates, state = update(grads, state, dict(params, head=one))
      one = optax.apply_updates(one, updates['head'])
      updates, slots = inner.update(grads['head'], slots, two)
      two = optax.apply_updates(two, updates)
      # Adam's division differs in the last place between compilations.
      np.testing.assert_allclose(one['kernel'], two['kernel'], rtol=1e-5)

  def test_what_is_no_slot_is_what_entries_share(self):
    """Nothing else may be missed, of what a later Optax brings either."""
    params = {'a': {'kernel': jnp.ones((256, 128)), 'bias': jnp.ones(128)}}
    shared = {}
    for name in set(exported()) - set(EXCEPTIONS):
      state = jax.eval_shape(build(name)[0].init, params)
      found = slots.map_slots(lambda *_: None, params, state, state)
      large = {trees.path_name(path).split('/')[1]
               for path, leaf in jax.tree.leaves_with_path(found)
               if leaf.size > 10}
      if large:
        shared[name] = large
    self.assertEqual(shared, {
        'adafactor': {'v_row', 'v_col'}, 'sm3': {'mu'},
        'galore': {'base_optimizer_state'},
        'lbfgs': {'diff_params_memory', 'diff_updates_memory'}})

  def test_a_flat_state_is_bounded_like_the_tree_it_is_of(self):
    method, params = METHODS['rigl'](), fake_params()
    steps = []
    for optimizer in (optax.adam(.1), optax.flatten(optax.adam(.1))):
      tx, own = sparse_jax.sparsify(optimizer, method), params
      update, state = jax.jit(tx.update), tx.init(own)
      for t in range(1, 7):
        updates, state = update(methods_test.fake_batch(own, t), state, own)
        own = optax.apply_updates(own, updates)
      steps.append(own)
    jax.tree.map(lambda one, two: np.testing.assert_allclose(
        one, two, rtol=1e-5), *steps)  # Compiled apart.


INSIDE = {
    'chain_clip_by_global_norm': lambda: optax.chain(
        optax.clip_by_global_norm(.5), optax.adam(.05)),
    'chain_add_decayed_weights': lambda: optax.chain(
        optax.add_decayed_weights(.1), optax.sgd(.05, momentum=.9)),
    'named_chain': lambda: optax.named_chain(
        ('clip', optax.clip(.1)), ('trace', optax.trace(.9)),
        ('scale', optax.scale(-.05))),
    'inject_hyperparams': lambda: optax.inject_hyperparams(optax.adamw)(
        learning_rate=optax.linear_schedule(.1, .01, 5)),
    'masked': lambda: optax.chain(
        optax.sgd(.05), optax.masked(optax.add_decayed_weights(.1),
                                     {'kernel': True, 'bias': False})),
    'multi_transform': lambda: optax.multi_transform(
        {'adam': optax.adam(.05), 'sgd': optax.sgd(.05, momentum=.9)},
        {'kernel': 'adam', 'bias': 'sgd'}),
    'partition': lambda: optax.partition(
        {'adam': optax.adam(.05), 'none': optax.set_to_zero()},
        {'kernel': 'adam', 'bias': 'none'}),
    'multi_steps': lambda: optax.MultiSteps(
        optax.adam(.05), 2).gradient_transformation(),
    'apply_every': lambda: optax.chain(optax.sgd(.05), optax.apply_every(2)),
    'apply_if_finite': lambda: optax.apply_if_finite(optax.adam(.05), 3),
    'conditionally_mask': lambda: optax.conditionally_mask(
        optax.adam(.05), lambda step: step % 2 == 0),
    'flatten': lambda: optax.flatten(optax.adam(.05)),
    'ema': lambda: optax.chain(optax.adam(.05), optax.ema(.9)),
    'add_noise': lambda: optax.chain(optax.add_noise(.1, .5, 0),
                                     optax.sgd(.05)),
    'adaptive_grad_clip': lambda: optax.chain(optax.adaptive_grad_clip(.1),
                                              optax.sgd(.05)),
    'factored_rms': lambda: optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=2),
        optax.scale(-.05)),
    'mechanize': lambda: optax.contrib.mechanize(optax.adamw(.1)),
    'schedule_free': lambda: optax.contrib.schedule_free(
        optax.rmsprop(.05), .05, b1=.9),
    'sam': lambda: optax.contrib.sam(optax.sgd(.05), optax.chain(
        optax.contrib.normalize(), optax.sgd(.05)), sync_period=2),
    'sam_opaque': lambda: optax.contrib.sam(
        optax.sgd(.05), optax.sgd(.05), opaque_mode=True),
    'reduce_on_plateau': lambda: optax.chain(
        optax.adam(.05), optax.contrib.reduce_on_plateau(patience=1)),
    'snapshot': lambda: optax.chain(optax.snapshot(
        'norm', optax.tree.norm), optax.sgd(.05)),
}
INSIDE_EXTRAS = {'reduce_on_plateau': ('value',), 'sam_opaque': ('grad_fn',)}


def labels(params):
  return {name: 'sparse' if name == 'kernel' else 'plain' for name in params}


def is_kernel(params):
  return {name: name == 'kernel' for name in params}


OUTSIDE = {
    'chain': lambda tx: optax.chain(optax.clip_by_global_norm(1.), tx),
    'named_chain': lambda tx: optax.named_chain(
        ('decay', optax.add_decayed_weights(.1)), ('sparse', tx)),
    'apply_if_finite': lambda tx: optax.apply_if_finite(tx, 3),
    'with_extra_args_support': optax.with_extra_args_support,
    'masked': lambda tx: optax.masked(tx, is_kernel),
    'multi_transform': lambda tx: optax.multi_transform(
        {'sparse': tx, 'plain': optax.adam(.05)}, labels),
    'partition': lambda tx: optax.partition(
        {'sparse': tx, 'plain': optax.sgd(.05)}, labels),
    'selective_transform': lambda tx: optax.selective_transform(
        tx, freeze_mask={'kernel': False, 'bias': True}),
    'conditionally_mask': lambda tx: optax.conditionally_mask(
        tx, lambda step: step >= 0),
    'multi_steps': lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
}


class WrapperTest(LawCase):

  @parameterized.parameters(*INSIDE)
  def test_methods_keep_their_laws_around(self, name):
    extras = INSIDE_EXTRAS.get(name, ())
    self.check_laws(*train(INSIDE[name](), extras, names=KINDS))

  @parameterized.parameters(*(name for name in OUTSIDE
                              if name != 'multi_steps'))
  def test_methods_keep_their_laws_inside(self, name):
    self.check_laws(*train(optax.adam(.05), outer=OUTSIDE[name], names=KINDS))

  def test_methods_keep_their_laws_inside_inject_hyperparams(self):
    def outer(method):
      return optax.inject_hyperparams(
          lambda rate: sparse_jax.sparsify(optax.sgd(rate), method))(
              rate=optax.linear_schedule(.1, .01, 5))

    self.check_laws(*train(None, outer=outer, names=KINDS))

  def test_multi_steps_outside_counts_one_update_for_its_mini_steps(self):
    seen, compilations = train(optax.adam(.05), outer=OUTSIDE['multi_steps'],
                               steps=9, names=KINDS)
    self.assertEqual(compilations, 1)
    for name, steps in seen.items():
      self.assertEqual([int(s.state.step) for s in steps],
                       [t // 2 for t in range(1, 10)], name)
      # Between its updates it adds 0, which turns a stored -0.0 into +0.0.
      for step in steps[1:]:
        step.before.update({k: v + 0 for k, v in step.before.items()})
        step.after.update({k: v + 0 for k, v in step.after.items()})
        self.check_step(name, step, int(step.state.step))

  def test_apply_if_finite_outside_leaves_everything_where_it_was(self):
    method = METHODS['rigl']()
    tx = optax.apply_if_finite(sparse_jax.sparsify(optax.adam(.1), method), 3)
    params = fake_params()
    state = tx.init(params)
    grads = dict(params, kernel=params['kernel'].at[0, 0].set(jnp.nan))
    updates, new = jax.jit(tx.update)(grads, state, params)
    after = optax.apply_updates(params, updates)
    jax.tree.map(np.testing.assert_array_equal, after, params)
    jax.tree.map(np.testing.assert_array_equal,
                 (new.inner_state.sparse, new.inner_state.inner),
                 (state.inner_state.sparse, state.inner_state.inner))

  @parameterized.parameters('masked', 'multi_transform', 'partition')
  def test_penalty_read_outside_is_the_one_used_inside(self, wrapper):
    """The allocation is that of the leaves that `sparsify` was given."""
    kernel = {'kernel': fake_params()['kernel']}
    params = dict(kernel, head=jnp.ones((6, 20)))
    method = METHODS['top_kast'](penalty_weight=1., allocation=sparse_jax.erk)
    tx = sparse_jax.sparsify(optax.sgd(1.), method)
    state = OUTSIDE[wrapper](tx).init(params)
    want = method.penalty(kernel, tx.init(kernel))
    np.testing.assert_allclose(method.penalty(params, state), want, rtol=1e-6)

  def test_state_is_found_in_a_train_state(self):
    method, params = METHODS['static'](), fake_params()
    state = train_state.TrainState.create(
        apply_fn=None, params=params,
        tx=sparse_jax.sparsify(optax.adam(.1), method))
    mask = sparse_jax.get_state(state).forward_masks['kernel']
    self.assertEqual(int(mask.sum()), 6)
    np.testing.assert_array_equal(method.read(params, state)['kernel'],
                                  params['kernel'] * mask)

  def test_differentially_private_gradients_are_aggregated_before(self):
    """The way out for `dpsgd`, which `sparsify` cannot wrap."""
    tx = optax.chain(
        optax.contrib.differentially_private_aggregate(1., .1, 0),
        sparse_jax.sparsify(optax.sgd(.1), METHODS['rigl']()))
    params = fake_params()
    grads = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
    state = tx.init(params)
    for _ in range(3):
      updates, state = tx.update(grads, state, params)
      params = optax.apply_updates(params, updates)
    mask = sparse_jax.get_state(state).forward_masks['kernel']
    self.assertFalse(np.any(np.asarray(params['kernel'])[~mask]))


class LineSearchTest(absltest.TestCase):

  def test_the_gradient_that_it_is_given_may_hold_growth_scores(self):
    method = sparse_jax.packed(sparse_jax.rigl(
        .5, structure=sparse_jax.Block((2, 2)), update_every=2))
    tx = sparse_jax.sparsify(optax.lbfgs(), method)
    inputs = jnp.ones((3, 4))
    params, state = sparse_jax.start(tx, method, {'kernel': jnp.ones((4, 6))})

    def loss_fn(params, inputs):
      through = sparse_jax.with_method(lambda params, x: x @ params['kernel'],
                                       method, state)
      return jnp.mean(jnp.square(through(params, inputs) - 1))

    value, grads = jax.value_and_grad(loss_fn)(params, inputs)
    self.assertIsNotNone(grads['kernel'].growth)
    updates, _ = jax.jit(functools.partial(tx.update, value_fn=loss_fn))(
        grads, state, params, value=value, grad=grads, inputs=inputs)
    after = optax.apply_updates(params, updates)
    self.assertLess(loss_fn(after, inputs), value)


if __name__ == '__main__':
  absltest.main()
