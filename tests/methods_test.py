"""The laws that every method obeys. A new method is a new row of METHODS."""

import functools
import inspect
import itertools
import typing
from typing import Any
from typing import NamedTuple

from absl.testing import absltest
from absl.testing import parameterized
from flax import core
from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax
from sparse_jax import trees

# Called without arguments, or with keywords in place of those given here.
METHODS = {
    'dense': sparse_jax.dense,
    'static': functools.partial(sparse_jax.static, sparsity=.75),
    'set_': functools.partial(sparse_jax.set_, sparsity=.75, update_every=2),
    'rigl': functools.partial(sparse_jax.rigl, sparsity=.75, update_every=2),
    'rigl_skip_step': functools.partial(
        sparse_jax.rigl, sparsity=.75, update_every=2, skip_step=True),
    'gmp': functools.partial(sparse_jax.gmp, sparsity=.75, update_every=2),
    'gmp_cubic': functools.partial(
        sparse_jax.gmp, sparsity=.75, update_every=2, update_end=5),
    'gmp_saliency': functools.partial(
        sparse_jax.gmp, sparsity=.75, update_every=2,
        score=sparse_jax.scores.saliency),
    'dnw': functools.partial(sparse_jax.dnw, sparsity=.75),
    'top_kast': functools.partial(
        sparse_jax.top_kast, sparsity=.75, backward_sparsity=.5,
        update_every=2),
    'top_kast_random': functools.partial(
        sparse_jax.top_kast, sparsity=.75, backward_sparsity=.5,
        backward_selection='random', update_every=2),
    'snip': functools.partial(sparse_jax.snip, sparsity=.75),
    'snip_global': functools.partial(sparse_jax.snip, sparsity=.75,
                                     scope='global'),
    'grasp': functools.partial(sparse_jax.grasp, sparsity=.75, scope='layer'),
    'set_original': functools.partial(
        sparse_jax.set_, sparsity=.75, update_every=2, drop_by='sign'),
    'itop': functools.partial(sparse_jax.itop, sparsity=.75, update_every=2,
                              allocation=sparse_jax.uniform),
    'snfs': functools.partial(sparse_jax.snfs, sparsity=.75, update_every=2),
    'dsr': functools.partial(sparse_jax.dsr, sparsity=.75, update_every=2,
                             threshold=.5, drop_fraction=.5),
    'gmp_global': functools.partial(sparse_jax.gmp, sparsity=.75,
                                    update_every=2, scope='global'),
    'ac_dc': functools.partial(sparse_jax.ac_dc, sparsity=.75, update_every=2,
                               scope='layer'),
    'ac_dc_global': functools.partial(sparse_jax.ac_dc, sparsity=.75,
                                      update_every=2),
    'ste': functools.partial(sparse_jax.ste, structure=sparse_jax.NM(1, 4)),
    'sr_ste': functools.partial(sparse_jax.sr_ste,
                                structure=sparse_jax.NM(1, 4)),
    'str_': functools.partial(sparse_jax.str_, initial=-3.),
    'dst': functools.partial(sparse_jax.dst, penalty_weight=.1),
    'cs': functools.partial(sparse_jax.cs, round_steps=5, rewind_to=4),
    'cs_rounds': functools.partial(sparse_jax.cs, round_steps=2, rounds=2),
    'swat': functools.partial(sparse_jax.swat, sparsity=.75),
    'swat_masked': functools.partial(sparse_jax.swat, sparsity=.75,
                                     masked_update=True),
    'swat_momentum': functools.partial(sparse_jax.swat, sparsity=.75,
                                       allocation='momentum'),
    'srigl': functools.partial(sparse_jax.srigl, sparsity=.75, gamma=.8,
                               update_every=2),
    'granet': functools.partial(sparse_jax.granet, sparsity=.75, prune_end=4,
                                update_every=2),
    'mest': functools.partial(sparse_jax.mest, sparsity=.75, update_every=2,
                              mutation=(.1, .05)),
    'mest_soft': functools.partial(
        sparse_jax.mest, sparsity=.75, update_every=2, mutation=(.1, .05),
        variant='ems'),
    'spartan': functools.partial(sparse_jax.spartan, sparsity=.75,
                                 prune_end=3, update_end=5, scope='layer'),
    'spartan_global': functools.partial(
        sparse_jax.spartan, sparsity=.75, prune_end=3, update_end=5),
    'iht': functools.partial(sparse_jax.iht, sparsity=.75),
    'iht_rising': functools.partial(sparse_jax.iht, sparsity=.75,
                                    prune_begin=1, prune_end=4),
    'powerprop': functools.partial(
        sparse_jax.powerprop, method=sparse_jax.top_kast(
            .75, backward_sparsity=.5, update_every=2)),
    'powerprop_rigl': functools.partial(
        sparse_jax.powerprop, method=sparse_jax.rigl(.75, update_every=2)),
}
SPARSE = tuple(name for name in METHODS if name != 'dense')
# Rows that try another argument of a method that has a row of its own.
VARIANTS = tuple(name for name, row in METHODS.items()
                 if getattr(row, 'func', row).__name__ != name)
# Stored weights are exactly 0 outside A; all others keep hidden values.
ZEROS = ('static', 'set_', 'rigl', 'rigl_skip_step', 'snip', 'snip_global',
         'grasp', 'set_original', 'itop', 'snfs', 'dsr', 'ac_dc',
         'ac_dc_global', 'powerprop_rigl', 'srigl', 'granet', 'mest',
         'mest_soft', 'iht', 'iht_rising')
# Masks that depend on the key: from the first on, and at each refresh.
RANDOM_START = ('static', 'set_', 'rigl', 'rigl_skip_step', 'top_kast_random',
                'set_original', 'itop', 'snfs', 'dsr', 'powerprop_rigl',
                'srigl', 'granet', 'mest', 'mest_soft')
RANDOM_REFRESH = ('set_', 'top_kast_random', 'set_original', 'dsr', 'mest',
                  'mest_soft')
# Learnt thresholds and gates: no sparsity is asked for.
LEARNED = ('str_', 'dst', 'cs', 'cs_rounds')
# What the forward pass sees is another function of the stored weight.
REPARAMETRIZED = (*LEARNED, 'powerprop', 'powerprop_rigl', 'spartan',
                  'spartan_global')
# One budget for all leaves, whose shares move or are not by allocation.
SHARED = ('snip_global', 'gmp_global', 'ac_dc_global', 'snfs', 'dsr',
          'swat_momentum')
# Their counts follow a law of their own: see the tests of each.
OWN_COUNTS = ('srigl', 'granet', 'mest_soft', 'spartan', 'spartan_global',
              'iht_rising')
# The gradient at which they rank is that of the weights before the update.
AT_INIT = ('snip', 'snip_global', 'grasp')
# Every optimizer slot starts anew now and then, dense leaves included.
RESETS = ('ac_dc', 'ac_dc_global', 'cs', 'cs_rounds')
# The gradient of the loss reaches all weights.
DENSE_GRADIENT = ('rigl', 'rigl_skip_step', 'gmp_saliency', 'itop', 'snfs',
                  'srigl', 'granet')
# A and B after a refresh are the largest |w| of the parameters returned.
BY_MAGNITUDE = ('gmp', 'gmp_cubic', 'dnw', 'top_kast')
# At sparsity 0 it is the inner optimizer; the keywords that the law needs.
DENSE_KEYWORDS = {
    'static': {}, 'set_': {}, 'rigl': {}, 'gmp': {}, 'gmp_cubic': {},
    'gmp_saliency': {}, 'dnw': {}, 'gmp_global': {}, 'snip': {},
    'snip_global': {}, 'grasp': {}, 'set_original': {}, 'itop': {},
    'snfs': {}, 'dsr': {}, 'ac_dc': dict(reset_slots=False), 'swat': {},
    'srigl': {}, 'granet': dict(initial_sparsity=0.), 'mest': {},
    'mest_soft': {}, 'spartan': {}, 'spartan_global': {}, 'iht': {},
    'top_kast': dict(backward_sparsity=0., penalty_weight=0.),
    'top_kast_random': dict(backward_sparsity=0., penalty_weight=0.),
}
# For every argument of every constructor two values that must differ in
# effect, and the other keywords under which they do.
ARGUMENTS = {
    'sparsity': (.75, .5, {}),
    'allocation': (sparse_jax.uniform, sparse_jax.erk, {}),
    'structure': (sparse_jax.Unstructured(), sparse_jax.Block((2, 2)), {}),
    'is_sparse': (None, (('conv', False),), {}),
    'batch_axes': ((), lambda path, leaf: (0,) if 'conv' in path else (), {}),
    'contracting': (None, (0,), dict(structure=sparse_jax.Block((2, 3)))),
    'update_every': (2, 3, {}),
    'update_begin': (0, 4, {}),
    'update_end': (None, 3, {}),
    'drop_fraction': (.3, .6, {}),
    'skip_step': (False, True, {}),
    'schedule': (None, sparse_jax.schedules.cubic_sparsity(.75, end=6), {}),
    'score': (sparse_jax.scores.magnitude, sparse_jax.scores.random, {}),
    'backward_sparsity': (.5, .25, {}),
    'penalty_weight': (1e-2, 1., {}),
    'backward_selection': ('magnitude', 'random', {}),
    'stop_exploration_at': (None, 3, {}),
    'scope': ('layer', 'global', {}),
    'drop_by': ('magnitude', 'sign', dict(drop_fraction=.5, update_every=1)),
    'growth': ('gradient', 'random', {}),
    'grow_init': ('zeros', 'random_normal', {}),
    'redistribution': ('momentum', 'nonzeros', {}),
    'hidden': ('frozen', 'moving', {}),
    'momentum': (.9, 0., {}),
    'threshold': (.5, .8, {}),
    'final_dense': (0, 4, dict(update_end=6)),
    'reset_slots': (True, False, {}),
    'decay': (2e-4, .5, {}),
    'initial': (-3., -1., {}),
    'least_kept': (.01, .9, {}),
    'temperature': (200., 10., {}),
    'rounds': (1, 2, {}),
    'round_steps': (5, 3, {}),
    'rewind': (True, False, {}),
    'rewind_to': (0, 1, {}),
    'method': (sparse_jax.dnw(.75), sparse_jax.dnw(.5), {}),
    'alpha': (2., 1.5, {}),
    'least_slope': (.01, .5, {}),
    'activation_sparsity': (None, .5, {}),
    'masked_update': (False, True, {}),
    'freeze_at': (None, 3, {}),
    'gamma': (.8, 0., {}),
    'never_ablate': ('head', 'kernel', {}),
    'prune_begin': (0, 3, dict(prune_end=5)),
    'prune_end': (3, 5, {}),
    'initial_sparsity': (.5, .25, {}),
    'variant': ('em', 'ems', {}),
    'mutation': ((.1, .05), (.2, .1), {}),
    'mutation_ends': (None, (3,), {}),
    'gradient_weight': (0., 2., {}),
    'beta': ((1., 20.), (1., 60.), {}),
    'costs': (None, core.FrozenDict({'conv': 4.}),
              dict(scope='global')),
}
# The same for one method, where those above do not show it.
OWN_ARGUMENTS = {
    # At a constant sparsity its mask would stay even where it may move.
    ('gmp', 'update_every'): (2, 3, dict(
        schedule=sparse_jax.schedules.cubic_sparsity(.75, end=6))),
    ('gmp', 'update_begin'): (0, 4, dict(
        schedule=sparse_jax.schedules.cubic_sparsity(.75, end=6))),
    ('gmp', 'update_end'): (None, 3, dict(
        schedule=sparse_jax.schedules.cubic_sparsity(.75, end=6))),
    ('granet', 'update_begin'): (0, 3, {}),
    ('spartan', 'update_end'): (5, 4, {}),
    ('iht', 'prune_end'): (None, 5, {}),
    ('srigl', 'contracting'): (None, (0,), {}),
    # So few inputs an output that uniform and ERK round alike.
    ('srigl', 'allocation'): (sparse_jax.uniform, core.FrozenDict(
        {'conv': .25, 'dense': .75}), {}),
    ('ste', 'structure'): (sparse_jax.NM(1, 4), sparse_jax.NM(2, 4), {}),
    ('sr_ste', 'structure'): (sparse_jax.NM(1, 4), sparse_jax.NM(2, 4), {}),
    ('ste', 'contracting'): (None, (0,), {}),
    ('sr_ste', 'contracting'): (None, (0,), {}),
    # Stacked inputs: the competitions are along another axis.
    ('ste', 'batch_axes'): ((), lambda path, leaf: (
        (2,) if 'conv' in path else ()), {}),
    ('sr_ste', 'batch_axes'): ((), lambda path, leaf: (
        (2,) if 'conv' in path else ()), {}),
    # One axis is left: a vector, which is never sparse.
    ('cs', 'batch_axes'): ((), lambda path, leaf: (
        (0,) if 'dense' in path else ()), {}),
    ('snip', 'batch_axes'): ((), lambda path, leaf: (
        (3,) if 'conv' in path else ()), {}),
    ('dsr', 'drop_fraction'): (.5, .1, {}),
    ('dst', 'penalty_weight'): (.1, 1., {}),
    ('cs', 'penalty_weight'): (1e-8, 1., {}),
    ('cs', 'initial'): (0., -1., {}),
    ('cs', 'rewind'): (True, False, dict(rewind_to=None)),
    ('cs', 'round_steps'): (5, 3, dict(rewind_to=1)),
    ('snfs', 'redistribution'): ('momentum', 'magnitude', dict(
        drop_fraction=.9)),
}
# Arguments, and those of one method, that need two leaves to show.
SHARING = {'allocation', 'is_sparse', 'scope', 'costs', 'redistribution',
           'never_ablate', 'gamma', ('cs', 'batch_axes'),
           ('dsr', 'drop_fraction')}
STRUCTURES = {
    'unstructured': sparse_jax.Unstructured(),
    'block': sparse_jax.Block((2, 4)),
    'n_of_m': sparse_jax.NM(1, 2),
    'channel': sparse_jax.Channel(),
    'filter': sparse_jax.Filter(),
}
# Compiles in half the time.
QUICK = {'xla_backend_optimization_level': 0}


class Moment(NamedTuple):
  """What a run was after one step, in NumPy, by path."""

  params: dict[str, np.ndarray]
  forward: dict[str, np.ndarray]
  backward: dict[str, np.ndarray]
  grads: dict[str, np.ndarray]
  loss: float


class Run(NamedTuple):
  moments: list[Moment]  # The first is the state of tx.init.
  compilations: int
  first_state: Any
  state: Any
  params: Any


def fake_params(dtype=jnp.float32, conv=(2, 2, 4, 6), dense=(8, 12)):
  """Two kernels, each with a few stored -0.0, and a bias."""
  rng = np.random.default_rng(0)
  kernels = [.1 * rng.normal(size=shape) for shape in (conv, dense)]
  for kernel in kernels:
    kernel.ravel()[[1, 7, 12]] = -0.
  return {'conv': {'kernel': jnp.asarray(kernels[0], dtype)},
          'dense': {'bias': jnp.zeros(dense[-1], dtype),
                    'kernel': jnp.asarray(kernels[1], dtype)}}


def fake_batch(params, step):
  """The target of one step: about 1, so that every weight has a gradient."""
  rng = np.random.default_rng([1, step])
  return jax.tree.map(
      lambda p: jnp.asarray(1 + .3 * rng.normal(size=p.shape), p.dtype),
      params)


def quadratic(weights, target):
  """Curvature 1 in each weight."""
  losses = jax.tree.map(lambda w, t: jnp.sum(jnp.square(w - t)) / 2, weights,
                        target)
  return sum(jax.tree.leaves(losses)).astype(jnp.float32)


def make_step(method, tx, loss=quadratic):
  def step(params, state, batch):
    def total(params):
      return loss(method.read(params, state), batch)

    value, grads = jax.value_and_grad(total)(params)
    updates, state = tx.update(grads, state, params, grad_fn=jax.grad(total))
    return optax.apply_updates(params, updates), state, (value, grads)

  return step


def moment(params, state, grads, loss) -> Moment:
  sparse = sparse_jax.get_state(state)
  parts = (params, sparse.forward_masks, sparse.backward_masks, grads)
  # Copies: the device's buffers are donated to the next step.
  return Moment(*({path: np.array(leaf)
                   for path, leaf in trees.leaves_by_path(tree).items()}
                  for tree in parts), float(loss))


def trainer(methods, *, optimizer=None, key=None, options=None):
  """Some methods in one compiled step that donates its input.

  `methods` is {label: method}. Returns a function of parameters, and of the
  number of steps, that gives {label: Run}; all start from these parameters.
  """
  trains = [_trainer(part, optimizer, key, options) for part in parts(methods)]

  def train(params, steps=6):
    return {label: run for part in trains
            for label, run in part(params, steps).items()}

  return train


def parts(methods, size=8):
  """The dict in parts: XLA compiles a few methods at once the fastest."""
  rows = iter(methods.items())
  return list(iter(lambda: dict(itertools.islice(rows, size)), {}))


def _trainer(methods, optimizer, key, options):
  optimizer = optimizer or optax.sgd(.1, momentum=.9)
  txs = {label: sparse_jax.sparsify(optimizer, method, key=key)
         for label, method in methods.items()}

  def step(states, batch):
    new = [make_step(method, tx)(*state, batch) for method, tx, state
           in zip(methods.values(), txs.values(), states)]
    return [each[:2] for each in new], [each[2] for each in new]

  compiled = jax.jit(step, donate_argnums=0, compiler_options=options)

  def train(params, steps=6):
    states = []
    for label, method in methods.items():
      own = jax.tree.map(jnp.array, method.parametrize(params))
      states.append((own, txs[label].init(own)))
    types = [jax.tree.map(jax.typeof, state) for state in states]
    moments = [[moment(*state, jax.tree.map(jnp.zeros_like, state[0]), np.nan)]
               for state in states]
    for t in range(1, steps + 1):
      states, seen = compiled(states, fake_batch(params, t))
      for past, state, (loss, grads) in zip(moments, states, seen):
        past.append(moment(*state, grads, loss))
    runs = [Run(past, compiled._cache_size(), first, state[1], state[0])
            for past, first, state in zip(moments, types, states)]
    return dict(zip(methods, runs))

  return train


def run_many(methods, params, *, steps=6, **settings) -> dict[str, Run]:
  """Trains by several methods at once; `settings` are those of `trainer`."""
  return trainer(methods, **settings)(params, steps)


def run(name, **keywords) -> Run:
  """Six steps of a row of METHODS by SGD with momentum."""
  defaults = inspect.signature(METHODS[name]).parameters
  return _run(name, tuple((key, value) for key, value in keywords.items()
                          if value != defaults[key].default))


@functools.cache
def _run(name, keywords):
  method = METHODS[name](**dict(keywords))
  return run_many({name: method}, fake_params(), options=QUICK)[name]


def slow_top(scores, k):
  """bool, same shape: the k largest; of equals the earlier; loops."""
  flat = np.asarray(scores).astype(np.float64).ravel()
  best = sorted(range(flat.size), key=lambda i: (-flat[i], i))[:k]
  mask = np.zeros(flat.size, bool)
  mask[best] = True
  return mask.reshape(np.shape(scores))


def bits(array):
  """The bit patterns, so that -0.0 and +0.0 differ."""
  array = np.asarray(array)
  return array.view(f'uint{8 * array.dtype.itemsize}')


def same_masks(first, second):
  return all(np.array_equal(first[path], second[path]) for path in first)


def expected_counts(name, allocation, step):
  """{path: (entries of A, entries of B)} by the definition."""
  shapes = {'conv/kernel': (2, 2, 4, 6), 'dense/kernel': (8, 12)}
  sparsity = .75
  if name in AT_INIT and step == 0 or (
      name == 'ac_dc' and step // 2 % 2 == 0):
    sparsity = 0.
  if name == 'gmp_cubic' and step < 5:  # Its refreshes are at 0, 2, 4, 5.
    sparsity *= 1 - (1 - (step - step % 2) / 5)**3
  shares = allocation(shapes, .75)
  forward = {path: sparse_jax.keep_count(
      int(np.prod(shape)), shares[path] * (sparsity / .75))
             for path, shape in shapes.items()}
  if name in ('dnw', 'ste', 'sr_ste', 'swat', 'iht'):
    return {path: (n, int(np.prod(shapes[path])))
            for path, n in forward.items()}
  if 'top_kast' not in name and name != 'powerprop':
    return {path: (n, n) for path, n in forward.items()}
  shares = allocation(shapes, .5)
  return {path: (n, max(n, sparse_jax.keep_count(int(np.prod(shapes[path])),
                                                 shares[path])))
          for path, n in forward.items()}


def counts_of(seen):
  """{path: (entries of A, entries of B)} of a moment."""
  return {path: (int(seen.forward[path].sum()),
                 int(seen.backward[path].sum())) for path in seen.forward}


class TableTest(absltest.TestCase):

  def test_every_public_method_has_a_row(self):
    public = {fn for _, fn in inspect.getmembers(sparse_jax,
                                                 inspect.isfunction)
              if typing.get_type_hints(fn).get('return')
              is sparse_jax.SparseMethod}
    rows = {getattr(row, 'func', row) for row in METHODS.values()}
    # It says what products do, and leaves masks and weights as they are.
    rows.add(sparse_jax.operators.add_operands)
    # Its masks fit one tree; fixed_test.py compares it with `static`.
    rows.add(sparse_jax.fixed)
    # The same method in another storage; storage_test.py compares them.
    rows.add(sparse_jax.packed)
    # Several of these in one model; clients_test.py.
    rows.add(sparse_jax.group)
    self.assertEqual(public - rows, set())

  def test_every_argument_is_varied(self):
    names = {name for row in METHODS.values()
             for name in inspect.signature(getattr(row, 'func',
                                                   row)).parameters}
    self.assertEqual(names - set(ARGUMENTS), set())


class LawTest(parameterized.TestCase):

  @parameterized.parameters(*METHODS)
  def test_learns_a_quadratic(self, name):
    moments = run(name).moments
    self.assertLess(moments[-1].loss, moments[1].loss)

  @parameterized.parameters('ste', 'sr_ste', 'powerprop', 'powerprop_rigl')
  def test_counts_are_exact_without_an_allocation(self, name):
    for step, seen in enumerate(run(name).moments):
      self.assertEqual(counts_of(seen), expected_counts(
          name, sparse_jax.uniform, step), step)

  @parameterized.parameters(*SHARED)
  def test_counts_of_all_leaves_together_are_exact(self, name):
    params, shares = fake_params(), set()
    params['dense']['kernel'] *= 3
    moments = run_many({name: METHODS[name]()}, params,
                       options=QUICK)[name].moments
    for step, seen in enumerate(moments):
      counts = counts_of(seen)
      dense = (name == 'snip_global' and step == 0) or (
          name == 'ac_dc_global' and step // 2 % 2 == 0)
      self.assertEqual(sum(count for count, _ in counts.values()),
                       192 if dense else 48)
      self.assertGreater(min(count for count, _ in counts.values()), 0)
      shares |= {24 if dense else counts['conv/kernel'][0]}
    self.assertNotEqual(shares, {24}, 'the budget never moved')

  @parameterized.product(
      name=[name for name in SPARSE if name not in SHARED + REPARAMETRIZED
            + OWN_COUNTS and name not in ('ste', 'sr_ste')],
      allocation=(sparse_jax.uniform, sparse_jax.erk))
  def test_counts_are_exact_after_every_step(self, name, allocation):
    moments = run(name, allocation=allocation).moments
    for step, seen in enumerate(moments):
      self.assertEqual(counts_of(seen),
                       expected_counts(name, allocation, step), step)

  @parameterized.parameters(*SPARSE)
  def test_forward_set_lies_inside_backward_set(self, name):
    for seen in run(name).moments:
      for path, forward in seen.forward.items():
        self.assertFalse(np.any(forward & ~seen.backward[path]))

  @parameterized.parameters(*METHODS)
  def test_second_step_compiles_nothing(self, name):
    self.assertEqual(run(name).compilations, 1)

  @parameterized.parameters(*METHODS)
  def test_state_and_parameters_keep_their_types(self, name):
    done = run(name)
    after = jax.tree.map(jax.typeof, (done.params, done.state))
    self.assertEqual(after, done.first_state)

  @parameterized.parameters(*METHODS)
  def test_eager_update_keeps_the_types_of_the_state(self, name):
    method = METHODS[name]()
    params = method.parametrize({'w': jnp.arange(24.).reshape(4, 6)})
    tx = sparse_jax.sparsify(optax.adam(.1), method)
    state = tx.init(params)
    updates, new = tx.update(params, state, params, grad_fn=itself)
    self.assertEqual(jax.tree.map(jax.typeof, new),
                     jax.tree.map(jax.typeof, state))
    self.assertEqual(jax.tree.map(jax.typeof, updates),
                     jax.tree.map(jax.typeof, params))

  @parameterized.parameters(*METHODS)
  def test_init_works_on_shapes_and_gives_what_it_promises(self, name):
    method = METHODS[name]()
    params = method.parametrize(fake_params())
    tx = sparse_jax.sparsify(optax.adam(.1), method)
    shapes = jax.eval_shape(tx.init, params)
    self.assertEqual(jax.tree.map(lambda x: (x.shape, x.dtype), shapes),
                     jax.tree.map(lambda x: (x.shape, x.dtype),
                                  tx.init(params)))

  @parameterized.parameters(*METHODS)
  def test_no_two_leaves_of_the_initial_state_share_a_buffer(self, name):
    method, key = METHODS[name](), jax.random.key(5)
    params = method.parametrize(fake_params())
    tx = sparse_jax.sparsify(optax.adam(.1), method, key=key)
    leaves = jax.tree.leaves((params, jax.random.key_data(key),
                              tx.init(params)))
    pointers = [leaf.unsafe_buffer_pointer() for leaf in leaves]
    self.assertLen(set(pointers), len(pointers))

  @parameterized.parameters(*METHODS)
  def test_masks_mirror_the_model(self, name):
    params, method = fake_params(), METHODS[name]()
    state = method.init(method.parametrize(params))
    masks = jax.tree.map(lambda _: None, params)
    if name != 'dense':
      for layer in ('conv', 'dense'):
        masks[layer]['kernel'] = params[layer]['kernel'].shape
    for tree in (state.forward_masks, state.backward_masks):
      self.assertEqual(jax.tree.map(lambda m: m.shape, tree), masks)
      self.assertEqual({m.dtype for m in jax.tree.leaves(tree)} - {
          np.dtype(bool)}, set())

  @parameterized.parameters(*METHODS)
  def test_read_gives_the_models_tree_with_zeros_outside_the_mask(self, name):
    params, method = fake_params(), METHODS[name]()
    own = method.parametrize(params)
    state = method.init(own)
    weights = method.read(own, state)
    self.assertEqual(jax.tree.map(jax.typeof, weights),
                     jax.tree.map(jax.typeof, params))
    masks = trees.leaves_by_path(state.forward_masks)
    before = trees.leaves_by_path(params)
    for path, weight in trees.leaves_by_path(weights).items():
      if name in REPARAMETRIZED:
        self.assertFalse(np.any(np.where(masks.get(path, True), 0, weight)))
        continue
      want = np.where(masks.get(path, True), before[path], np.float32(0))
      np.testing.assert_array_equal(bits(weight), bits(want))


def itself(params):
  """The gradient of half the sum of squares."""
  return jax.tree.map(jnp.asarray, params)


class DenseTest(parameterized.TestCase):

  @parameterized.named_parameters(
      ('plain_sgd', optax.sgd(.1)), ('sgd', optax.sgd(.1, momentum=.9)),
      ('adam', optax.adam(.1)), ('adamw', optax.adamw(.1)))
  def test_sparsity_zero_is_the_inner_optimizer_bit_for_bit(self, optimizer):
    """Signed zeros too: the gradients of dead units are often -0.0."""
    methods = {'dense': sparse_jax.dense()} | {
        name: METHODS[name](sparsity=0., **keywords)
        for name, keywords in DENSE_KEYWORDS.items()}
    for part in parts(methods):
      self.check_same(part, optimizer)

  def check_same(self, methods, optimizer):
    params = fake_params(conv=(2, 2, 1, 4), dense=(4, 6))
    txs = {'inner': optimizer} | {
        name: sparse_jax.sparsify(optimizer, method)
        for name, method in methods.items()}

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(state, grads):
      extra = {'grasp': dict(grad_fn=itself)}
      return {name: tx.update(grads, state[name][1], state[name][0],
                              **extra.get(name, {}))
              for name, tx in txs.items()}

    apply = jax.jit(optax.apply_updates)
    state = {name: (params, tx.init(params)) for name, tx in txs.items()}
    for t in range(1, 5):
      grads = jax.tree.map(lambda p: jnp.where(p == 0, -0., p - 1),
                           fake_batch(params, t))
      grads = jax.tree.map(lambda g: g.at[(0,) * g.ndim].set(-0.), grads)
      new = step(state, grads)
      state = {name: (apply(state[name][0], updates), slots)
               for name, (updates, slots) in new.items()}
      for name in methods:
        for tree, want in ((new[name][0], new['inner'][0]),
                           (state[name][0], state['inner'][0]),
                           (new[name][1].inner, new['inner'][1])):
          pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(want),
                      strict=True)
          different = [np.sum(bits(x) != bits(y)) for x, y in pairs]
          self.assertEqual(sum(different), 0, (name, t))

  def test_dense_reads_the_parameters_themselves(self):
    params, method = fake_params(), sparse_jax.dense()
    self.assertIs(method.read(params, method.init(params)), params)


class KeyTest(parameterized.TestCase):

  @parameterized.parameters(*SPARSE)
  def test_same_key_same_masks_and_other_key_other_masks(self, name):
    method = METHODS[name]()
    params = method.parametrize(fake_params())
    masks = [jax.tree.leaves(sparse_jax.sparsify(
        optax.sgd(.1), method, key=key).init(params).sparse.marks)
             for key in (None, 0, jax.random.key(0), 7, jax.random.key(7))]
    same = [same_masks(dict(enumerate(masks[0])), dict(enumerate(other)))
            for other in masks]
    other = name not in RANDOM_START
    self.assertEqual(same, [True, True, True, other, other])

  @parameterized.parameters('fold_in', 'split', 'the key', 'nnx')
  def test_masks_do_not_follow_weights_drawn_from_the_same_key(self, way):
    key = jax.random.key(0)
    weights = {'fold_in': lambda: jax.random.fold_in(key, 0),
               'split': lambda: jax.random.split(key, 3)[0],
               'the key': lambda: key, 'nnx': nnx.Rngs(0)}[way]()
    params = {'kernel': jax.random.normal(weights, (64, 64))}
    for given in (None, 0, key):
      mask = sparse_jax.static(.5).init(params, given).forward_masks['kernel']
      self.assertLess(abs(float(params['kernel'][mask].mean())), .1)

  @parameterized.parameters(*RANDOM_START)
  def test_leaves_of_one_shape_get_masks_of_their_own(self, name):
    params = {'a': jnp.ones((8, 12)), 'b': jnp.ones((8, 12))}
    masks = METHODS[name]().init(params).backward_masks
    self.assertFalse(np.array_equal(masks['a'], masks['b']))

  @parameterized.parameters(*SPARSE)
  def test_refresh_depends_on_key_and_step_only_where_random(self, name):
    method = METHODS[name]()
    params = method.parametrize({'w': jnp.asarray(
        np.random.default_rng(2).normal(size=(8, 12)), jnp.float32)})
    state = method.init(params)
    keys = [sparse_jax.sparsify(optax.sgd(.1), method, key=key).init(
        params).sparse.key for key in (0, 1)]
    states = [state._replace(key=key, step=jnp.int32(step))
              for key, step in ((keys[0], 1), (keys[0], 1), (keys[1], 1),
                                (keys[0], 3))]
    refresh = jax.jit(functools.partial(method.refresh, grad_fn=itself),
                      compiler_options=QUICK)
    if name in ('gmp_cubic', 'cs', 'cs_rounds', 'granet', 'spartan',
                'spartan_global', 'iht_rising') or 'ac_dc' in name:
      states = states[:3]  # What they do depends on the step.
    seen = [refresh(params, params, each)[1] for each in states]
    same = [np.array_equal(seen[0].marks['w'], each.marks['w'])
            for each in seen]
    other = name not in RANDOM_REFRESH
    self.assertEqual(same, [True, True, other, other][:len(same)])


class TimeTest(parameterized.TestCase):

  @parameterized.parameters(*BY_MAGNITUDE)
  def test_masks_are_the_largest_of_the_parameters_returned(self, name):
    moments = run(name).moments
    refreshes = range(7) if name == 'dnw' else (
        0, 2, 4, 5) if name == 'gmp_cubic' else (0, 2, 4, 6)
    for step, seen in enumerate(moments):
      if step not in refreshes:
        self.assertTrue(same_masks(seen.forward, moments[step - 1].forward))
        self.assertTrue(same_masks(seen.backward, moments[step - 1].backward))
        continue
      wanted = expected_counts(name, sparse_jax.uniform, step)
      for path, counts in wanted.items():
        scores = np.abs(seen.params[path].astype(np.float64))
        np.testing.assert_array_equal(seen.forward[path],
                                      slow_top(scores, counts[0]), str(step))
        np.testing.assert_array_equal(seen.backward[path],
                                      slow_top(scores, counts[1]), str(step))

  @parameterized.parameters('set_', 'rigl', 'rigl_skip_step', 'gmp_saliency',
                            'top_kast_random', 'set_original', 'itop', 'snfs',
                            'dsr', 'powerprop_rigl', 'ac_dc', 'srigl',
                            'granet', 'mest', 'mest_soft')
  def test_masks_change_at_multiples_of_update_every_only(self, name):
    moments = run(name).moments
    changed = [not same_masks(old.backward, new.backward)
               for old, new in zip(moments, moments[1:])]
    self.assertEqual(changed, [False, True] * 3)

  def test_masks_change_only_from_begin_to_end(self):
    names = ('set_', 'rigl', 'gmp_saliency', 'top_kast_random')
    methods = {name: METHODS[name](update_begin=3, update_end=5)
               for name in names}
    runs = run_many(methods, fake_params(), steps=8, options=QUICK)
    for name in names:
      moments = runs[name].moments
      changed = [step for step in range(1, 9)
                 if not same_masks(moments[step - 1].backward,
                                   moments[step].backward)]
      # GMP is dense until it begins, and always refreshes at the end.
      self.assertEqual(changed, [4, 5] if 'gmp' in name else [4], name)

  def test_boundaries_refresh_themselves(self):
    names = ('set_', 'rigl', 'top_kast_random')
    methods = {name: METHODS[name](update_begin=2, update_end=4)
               for name in names}
    # Annealed by the cosine, SET and RigL drop nothing at the end itself.
    for name, seen in run_many(methods, fake_params(),
                               options=QUICK).items():
      changed = [step for step in range(1, 7)
                 if not same_masks(seen.moments[step - 1].backward,
                                   seen.moments[step].backward)]
      self.assertEqual(changed, [2, 4] if 'top_kast' in name else [2], name)

  @parameterized.parameters(*METHODS)
  def test_step_counts_the_updates_done(self, name):
    self.assertEqual(int(sparse_jax.get_state(run(name).state).step), 6)

  def test_exploration_stops_at_the_step_given(self):
    method = METHODS['top_kast'](stop_exploration_at=3)
    moments = run_many({'m': method}, fake_params(), options=QUICK)['m'].moments
    equal = [same_masks(seen.forward, seen.backward) for seen in moments]
    self.assertEqual(equal, [False] * 3 + [True] * 4)


class WeightTest(parameterized.TestCase):

  @parameterized.parameters(*ZEROS)
  def test_weights_outside_the_mask_are_zero_after_every_update(self, name):
    for seen in run(name).moments[1:]:
      for path, mask in seen.forward.items():
        self.assertFalse(np.any(seen.params[path][~mask]), path)

  @parameterized.parameters(*(name for name in ZEROS if name not in (
      'powerprop_rigl', 'iht', 'iht_rising')))
  def test_weights_read_as_stored_are_those_read_through_the_mask(self, name):
    method, last = METHODS[name](), run(name)
    target = fake_batch(last.params, 1)
    for read in (lambda fn: fn(last.params, last.state),
                 lambda fn: jax.grad(lambda params: quadratic(
                     fn(params, last.state), target))(last.params)):
      masked, stored = map(read, (method.read, method.read_stored))
      jax.tree.map(lambda a, b: np.testing.assert_array_equal(*map(
          bits, (a, b))), masked, stored)

  @parameterized.parameters('set_', 'rigl', 'set_original', 'itop', 'snfs',
                            'dsr', 'ac_dc', 'powerprop_rigl', 'srigl',
                            'granet', 'mest', 'mest_soft')
  def test_weights_enter_at_zero(self, name):
    moments = run(name).moments
    entered = 0
    for old, new in zip(moments[1:], moments[2:]):
      for path in new.forward:
        entry = new.forward[path] & ~old.forward[path]
        entered += entry.sum()
        self.assertFalse(np.any(new.params[path][entry]))
    self.assertGreater(entered, 0)

  @parameterized.parameters(*(name for name in SPARSE if name not in ZEROS))
  def test_weights_outside_the_backward_set_are_bit_identical(self, name):
    moments = run(name).moments
    for old, new in zip(moments, moments[1:]):
      for path, mask in old.backward.items():
        np.testing.assert_array_equal(bits(new.params[path])[~mask],
                                      bits(old.params[path])[~mask])

  @parameterized.parameters(*SPARSE)
  def test_every_active_weight_moves(self, name):
    if name == 'cs_rounds':
      self.skipTest('closed gates let no gradient through')
    moments = run(name).moments
    # The ticket of cs begins after the round, at the weights of step 4.
    skipped = {'rigl_skip_step': (2, 4, 6), 'cs': (5,)}.get(name, ())
    for step, (old, new) in enumerate(zip(moments, moments[1:]), 1):
      for path, mask in old.forward.items():
        moved = (old.params[path] != new.params[path])[
            mask & new.forward[path]]
        # By skip_step the refresh replaces the optimizer's step.
        self.assertEqual(bool(moved.all()), step not in skipped, step)

  @parameterized.parameters(*METHODS)
  def test_leaves_that_are_never_sparse_train_as_without_a_method(self, name):
    if name == 'rigl_skip_step' or name in RESETS:
      self.skipTest('by definition it skips steps or resets slots of all')
    np.testing.assert_array_equal(run(name).moments[-1].params['dense/bias'],
                                  run('dense').moments[-1].params['dense/bias'])

  @parameterized.parameters(*(name for name in SPARSE
                              if name not in REPARAMETRIZED))
  def test_gradient_follows_the_backward_rule(self, name):
    everywhere = name in DENSE_GRADIENT
    moments = run(name).moments
    for step, (old, new) in enumerate(zip(moments, moments[1:]), 1):
      target = trees.leaves_by_path(fake_batch(fake_params(), step))
      for path, mask in old.forward.items():
        read = np.where(mask, old.params[path], 0)
        backward = np.ones_like(mask) if everywhere else old.backward[path]
        want = np.where(backward, read - np.asarray(target[path]), 0)
        np.testing.assert_array_equal(new.grads[path], want)

  def test_forward_derivatives_are_along_the_gradient(self):
    """jax.jvp, for Hessian-vector products and line searches."""
    target = fake_batch(fake_params(), 1)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def derivatives(starts):
      found = {}
      for name, (params, state) in starts.items():
        loss = lambda p: quadratic(METHODS[name]().read(p, state), target)
        along = jax.tree.map(jnp.cos, params)
        grads = jax.grad(loss)(params)
        found[name] = (jax.jvp(loss, (params,), (along,))[1], sum(
            jax.tree.leaves(jax.tree.map(jnp.vdot, grads, along))))
        jax.jvp(jax.grad(loss), (params,), (along,))
      return found

    starts = {name: (params, METHODS[name]().init(params)) for name, params in
              ((name, METHODS[name]().parametrize(fake_params()))
               for name in METHODS)}
    for name, (forward, reverse) in derivatives(starts).items():
      # Another order of summation.
      np.testing.assert_allclose(forward, reverse, rtol=1e-5, err_msg=name)

  @parameterized.parameters(*SPARSE)
  def test_refresh_is_what_the_update_does_to_parameters_and_masks(self, name):
    """The visible parts, put together by hand, give the run of `sparsify`."""
    if name == 'rigl_skip_step' or name in AT_INIT:
      self.skipTest('the refresh then looks at the weights before the update')
    method, inner = METHODS[name](), optax.sgd(.1)
    params = method.parametrize(fake_params(conv=(2, 2, 1, 4), dense=(4, 6)))
    tx = sparse_jax.sparsify(inner, method, penalty=False)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both(params, state, grads):
      updates, new = tx.update(grads, state, params)
      inside = trees.map_leaves(
          lambda path, g, mask: g if mask is None else jnp.where(mask, g, -0.),
          jax.tree.map(lambda g: -.1 * g, grads), state.sparse.backward_masks)
      by_hand = method.refresh(optax.apply_updates(params, inside), grads,
                               state)
      return (optax.apply_updates(params, updates), new.sparse), by_hand, new

    state = tx.init(params)
    for t in range(1, 4):
      ours, by_hand, state = both(params, state, fake_batch(params, t))
      # Rounds that end go back to first weights: p + (first - p).
      # So do thresholds of DST that are reset.
      rtol = 1e-6 if name in ('cs', 'cs_rounds', 'dst') else 0.
      jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol),
                   ours, by_hand)
      params = ours[0]


class ReferenceTest(parameterized.TestCase):

  def test_rigl_drops_and_grows_like_the_slow_loop(self):
    params = fake_params()
    method = METHODS['rigl'](drop_fraction=.5)
    runs = run_many({'m': method}, params, optimizer=optax.sgd(.1),
                    options=QUICK)
    moments = runs['m'].moments
    for step in (2, 4, 6):
      old, new = moments[step - 1], moments[step]
      for path, active in old.forward.items():
        grad = new.grads[path]
        stepped = old.params[path] - np.float32(.1) * grad
        worth = np.where(active, np.abs(stepped), -1)
        kept = slow_top(worth, sparse_jax.keep_count(int(active.sum()), .5))
        growth = np.where(kept, -1, np.abs(grad))
        grown = slow_top(growth, int(active.sum() - kept.sum()))
        np.testing.assert_array_equal(new.forward[path], kept | grown)
        # What was dropped and grown at once keeps its value.
        stays = active & new.forward[path]
        np.testing.assert_allclose(new.params[path],
                                   np.where(stays, stepped, 0),
                                   rtol=1e-6)  # One fused multiply-add.

  def test_set_keeps_the_largest_like_the_slow_loop(self):
    method = METHODS['set_'](drop_fraction=.5)
    runs = run_many({'m': method}, fake_params(), optimizer=optax.sgd(.1),
                    options=QUICK)
    moments = runs['m'].moments
    for step in (2, 4, 6):
      old, new = moments[step - 1], moments[step]
      for path, active in old.forward.items():
        stepped = old.params[path] - np.float32(.1) * new.grads[path]
        kept = slow_top(np.where(active, np.abs(stepped), -1),
                        sparse_jax.keep_count(int(active.sum()), .5))
        self.assertTrue(np.all(new.forward[path][kept]))

  def test_exploration_gradient_is_the_formula(self):
    params = fake_params()
    method = METHODS['top_kast'](penalty_weight=.3,
                                 allocation=sparse_jax.erk)
    state = method.init(params)
    grads = trees.leaves_by_path(jax.grad(method.penalty)(params, state))
    shares = sparse_jax.erk({'conv/kernel': (2, 2, 4, 6),
                             'dense/kernel': (8, 12)}, .75)
    forward = trees.leaves_by_path(state.forward_masks)
    backward = trees.leaves_by_path(state.backward_masks)
    for path, weight in trees.leaves_by_path(params).items():
      if path not in shares:
        self.assertFalse(np.any(grads[path]))
        continue
      factor = np.where(forward[path], 1, np.where(
          backward[path], 1 / (1 - shares[path]), 0))
      # Two float32 roundings.
      np.testing.assert_allclose(grads[path], .3 * weight * factor, rtol=3e-7)

  def test_penalty_inside_or_in_the_loss_is_the_same(self):
    params = fake_params(conv=(2, 2, 1, 4), dense=(4, 6))
    method = METHODS['top_kast'](penalty_weight=.1)
    inside = sparse_jax.sparsify(optax.sgd(.1), method)
    outside = sparse_jax.sparsify(optax.sgd(.1), method, penalty=False)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(params, state, batch):
      def total(params, weight):
        loss = quadratic(method.read(params, state), batch)
        return loss + weight * method.penalty(params, state)

      one, new = inside.update(jax.grad(total)(params, 0.), state, params)
      two, _ = outside.update(jax.grad(total)(params, 1.), state, params)
      return optax.apply_updates(params, one), new, one, two

    state = inside.init(params)
    for t in range(1, 4):
      params, state, one, two = step(params, state, fake_batch(params, t))
      jax.tree.map(functools.partial(
          np.testing.assert_allclose, rtol=1e-6, atol=1e-8), one, two)


class ArgumentTest(parameterized.TestCase):

  @parameterized.parameters(*(name for name in METHODS if name != 'dense'
                              and name not in VARIANTS))
  def test_no_argument_is_accepted_and_ignored(self, name):
    row, params = METHODS[name], fake_params(conv=(2, 2, 2, 4), dense=(4, 6))
    names = inspect.signature(getattr(row, 'func', row)).parameters
    both = [argument for argument in names
            if SHARING & {argument, (name, argument)}]
    others = [argument for argument in names if argument not in both]
    # One leaf compiles in half the time.
    for chosen, leaves in ((both, params), (others, {'conv': params['conv']})):
      self.check_effects(row, {argument: self.two_ways(name, argument)
                               for argument in chosen}, leaves)

  def check_effects(self, row, pairs, params):
    methods = {way: row(**dict(way)) for pair in pairs.values()
               for way in pair}
    runs = run_many(methods, params, options=QUICK)
    for argument, (one, two) in pairs.items():
      self.assertFalse(
          same_moments(runs[one].moments, runs[two].moments)
          and self.operators(methods[one], params) == self.operators(
              methods[two], params), argument)

  def operators(self, method, params):
    """What the method asks of products, besides what it reads."""
    if method.operators is None:
      return None
    return method.operators(params, method.init(params))

  def two_ways(self, name, argument):
    """The keywords of two runs; () for the row as it is."""
    row = METHODS[name]
    first, second, others = OWN_ARGUMENTS.get((name, argument),
                                              ARGUMENTS[argument])
    signature = inspect.signature(row).parameters[argument]
    if first is signature.default or first == signature.default:
      return tuple(others.items()), (*others.items(), (argument, second))
    return ((*others.items(), (argument, first)),
            (*others.items(), (argument, second)))

  @parameterized.named_parameters(
      ('sparsity_one', 'static', dict(sparsity=1.), 'sparsity'),
      ('sparsity_nan', 'gmp', dict(sparsity=float('nan')), 'sparsity'),
      ('fraction', 'set_', dict(drop_fraction=1.5), 'drop_fraction'),
      ('every', 'rigl', dict(update_every=0), 'update_every'),
      ('begin', 'rigl', dict(update_begin=-1), 'update_begin'),
      ('end_before_begin', 'rigl', dict(update_begin=5, update_end=4),
       'update_end'),
      ('drop_to_end_zero', 'set_', dict(update_end=0), 'update_end'),
      ('gmp_end_at_begin', 'gmp', dict(update_begin=4, update_end=4),
       'update_end'),
      ('backward_above', 'top_kast', dict(backward_sparsity=.8),
       'backward_sparsity'),
      ('penalty', 'top_kast', dict(penalty_weight=-1.), 'penalty_weight'),
      ('selection', 'top_kast', dict(backward_selection='best'),
       'backward_selection'),
      ('stop', 'top_kast', dict(stop_exploration_at=1.5),
       'stop_exploration_at'),
      ('structure', 'dnw', dict(structure='block'), 'structure'),
      ('allocation', 'dnw', dict(allocation='erk'), 'allocation'),
      ('n_of_m_fixes_sparsity', 'static',
       dict(structure=sparse_jax.NM(2, 4)), 'sparsity'),
      ('n_of_m_is_uniform', 'static',
       dict(sparsity=.5, structure=sparse_jax.NM(2, 4),
            allocation=sparse_jax.erk), 'allocation'),
      ('n_of_m_has_no_schedule', 'gmp',
       dict(sparsity=.5, structure=sparse_jax.NM(2, 4), update_end=9),
       'schedule'))
  def test_impossible_argument_is_named(self, name, keywords, argument):
    with self.assertRaisesRegex(ValueError, f'`{argument}`'):
      METHODS[name](**keywords)


def same_moments(one, two):
  """Whether two runs are equal in parameters, masks and gradients."""
  runs = [[moment._replace(loss=0.) for moment in moments]
          for moments in (one, two)]
  if jax.tree.structure(runs[0]) != jax.tree.structure(runs[1]):
    return False  # Other leaves are sparse.
  return all(map(np.array_equal, *map(jax.tree.leaves, runs)))


class LinenNet(nn.Module):

  @nn.compact
  def __call__(self, x):
    return nn.Dense(6, name='dense')(nn.Conv(4, (2, 2), name='conv')(x))


class NnxNet(nnx.Module):

  def __init__(self):
    rngs = nnx.Rngs(0)
    self.conv = nnx.Conv(3, 4, (2, 2), rngs=rngs)
    self.dense = nnx.Linear(4, 6, rngs=rngs)


def model_params(container, conv, dense):
  """The parameters of a network, the layers of these dtypes."""
  if container == 'nnx':
    shapes = nnx.eval_shape(lambda: nnx.state(NnxNet(), nnx.Param))
  else:
    shapes = jax.eval_shape(LinenNet().init, jax.random.key(0),
                            jnp.ones((1, 3, 3, 3)))['params']
  rng = np.random.default_rng(0)
  return jax.tree.map_with_path(
      lambda path, p: jnp.asarray(.1 * rng.normal(size=p.shape), (
          conv if 'conv' in jax.tree_util.keystr(path) else dense)), shapes)


def group_ids(structure, shape):
  """int of the shape: the group of each entry; for NM, the competition."""
  row, column = np.indices(shape)[-2:]
  lead = np.ravel_multi_index(np.indices(shape)[:-2], shape[:-2]) if (
      len(shape) > 2) else np.zeros(shape, int)
  if isinstance(structure, sparse_jax.Block):
    rows, columns = structure.shape
    parts = (lead, row // rows, column // columns)
  elif isinstance(structure, sparse_jax.NM):
    parts = (lead, row // structure.m, column)
  elif isinstance(structure, sparse_jax.Channel):
    parts = (row, column)
  elif isinstance(structure, sparse_jax.Filter):
    parts = (column,)
  else:
    parts = (lead, row, column)
  _, ids = np.unique(np.stack([np.ravel(part) for part in parts]), axis=1,
                     return_inverse=True)
  return ids.reshape(shape)


def keywords_of(name, structure):
  """The keywords under which a row has this structure at sparsity 1/2."""
  structure = STRUCTURES[structure]
  if name in LEARNED:
    return {}
  if name in ('ste', 'sr_ste'):
    return dict(structure=structure)
  if name == 'powerprop':
    return dict(method=sparse_jax.top_kast(
        .5, backward_sparsity=.25, update_every=2, structure=structure))
  if name == 'srigl':
    return dict(sparsity=.5)
  own = {'top_kast': dict(backward_sparsity=.25),
         'ac_dc': dict(update_every=4)}  # Sparse after the fourth step.
  return dict(structure=structure, sparsity=.5) | own.get(name, {})


def cannot_have(structure):
  """Methods that do not go with a structure, by definition."""
  if structure == 'n_of_m':
    return ('snfs', 'dsr', 'srigl', 'granet', 'spartan')
  if structure == 'unstructured':
    return ('ste', 'sr_ste')
  return ('ste', 'sr_ste', 'srigl', *LEARNED)


class FlatStep(NamedTuple):
  """A step of many methods as a program of plain lists of arrays."""

  lowered: jax.stages.Lowered
  leaves: list[jax.Array]  # Parameters and states before the first step.
  types: list[Any]  # Those of the leaves; the step gives the same.
  structure: Any


def lower_flat(methods, params) -> FlatStep:
  """Lists, so that the program does not name the containers of a framework."""
  txs = {name: sparse_jax.sparsify(optax.sgd(.1), method)
         for name, method in methods.items()}

  def init(params):
    own = {name: method.parametrize(params)
           for name, method in methods.items()}
    return {name: (own[name], tx.init(own[name])) for name, tx in txs.items()}

  state = init(params)
  leaves, structure = jax.tree.flatten(state)
  treedef = jax.tree.structure(params)

  def step(leaves, batch):
    state = jax.tree.unflatten(structure, leaves)
    new = {name: make_step(methods[name], txs[name])(
        *state[name], jax.tree.unflatten(treedef, batch))[:2] for name in txs}
    after, same = jax.tree.flatten(new)
    assert same == structure, (same, structure)
    return after

  lowered = jax.jit(step).lower(leaves, jax.tree.leaves(params))
  return FlatStep(lowered, leaves, [jax.typeof(leaf) for leaf in leaves],
                  structure)


class ModelTest(parameterized.TestCase):

  @parameterized.parameters(*STRUCTURES)
  def test_counts_and_dtypes_hold_in_both_frameworks(self, structure):
    """Every method, some at once. GMP's schedule does not go with N:M."""
    methods = {name: METHODS[name](**keywords_of(name, structure))
               for name in SPARSE if name not in VARIANTS
               and name not in cannot_have(structure)}
    # Each layer has another dtype, and the other one in the next structure.
    dtypes = [jnp.float32, jnp.bfloat16]
    if list(STRUCTURES).index(structure) % 2:
      dtypes.reverse()
    linen, nnx_ = (model_params(container, *dtypes)
                   for container in ('linen', 'nnx'))
    for part in parts(methods):
      self.check_both(part, STRUCTURES[structure], linen, nnx_)

  def check_both(self, methods, structure, params, nnx_params):
    linen, nnx_ = (lower_flat(methods, each) for each in (params, nnx_params))
    # One program, so one run shows what both frameworks do.
    self.assertEqual(linen.lowered.as_text(), nnx_.lowered.as_text())
    compiled, leaves = linen.lowered.compile(QUICK), linen.leaves
    for t in range(1, 5):
      leaves = compiled(leaves, jax.tree.leaves(fake_batch(params, t)))
    types = [jax.typeof(leaf) for leaf in leaves]
    for flat in (linen, nnx_):
      self.assertEqual(flat.types, types)
      state = jax.tree.unflatten(flat.structure, leaves)
      for name in methods:
        self.check(name, structure, *state[name])

  def check(self, name, structure, params, state):
    weights = trees.leaves_by_path(params)
    masks = trees.leaves_by_path(state.sparse.forward_masks)
    backward = trees.leaves_by_path(state.sparse.backward_masks)
    self.assertEqual(sorted(masks), ['conv/kernel', 'dense/kernel'])
    if name in LEARNED:
      return
    widest = {'dnw': 0., 'top_kast': .25, 'ste': 0., 'sr_ste': 0.,
              'swat': 0., 'iht': 0., 'powerprop': .25}
    for path, forward in masks.items():
      if name in ZEROS:
        self.assertFalse(np.any(np.asarray(weights[path])[~forward]))
      for mask, share in ((forward, .5),
                          (backward[path], widest.get(name, .5))):
        ids = group_ids(structure, mask.shape)
        sizes = np.bincount(ids.ravel())
        kept = np.bincount(ids.ravel(), weights=np.asarray(mask).ravel())
        if isinstance(structure, sparse_jax.NM):
          rivals = sparse_jax.keep_count(structure.m, share)
          np.testing.assert_array_equal(kept, np.minimum(rivals, sizes))
        else:
          np.testing.assert_array_equal(kept % sizes, 0)
          if name not in SHARED + OWN_COUNTS:
            self.assertEqual(np.count_nonzero(kept),
                             sparse_jax.keep_count(sizes.size, share), name)


class StateTest(parameterized.TestCase):

  def test_state_that_holds_none_or_two_is_an_error(self):
    params, method = fake_params(), METHODS['static']()
    with self.assertRaisesRegex(ValueError, 'no SparseState'):
      method.read(params, optax.adam(.1).init(params))
    state = method.init(params)
    with self.assertRaisesRegex(ValueError, '2 SparseStates'):
      method.read(params, (state, state))

  def test_update_without_parameters_is_an_error(self):
    params = fake_params()
    tx = sparse_jax.sparsify(optax.sgd(.1), METHODS['static']())
    with self.assertRaisesRegex(ValueError, '`params`'):
      tx.update(params, tx.init(params))


if __name__ == '__main__':
  absltest.main()
