"""Packed storage on eight devices makes the run of one, and moves little."""

import contextlib
import functools
import re

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax

P = jax.sharding.PartitionSpec
COLLECTIVE = r'= (\S+|\(.*?\)) (all-[a-z]+|reduce-scatter|coll[a-z-]+)\('
AXES = {'auto': jax.sharding.AxisType.Auto,
        'explicit': jax.sharding.AxisType.Explicit}
BLOCK = sparse_jax.Block((4, 4))
BALANCED = sparse_jax.Block((4, 4), balanced=True)
METHODS = {
    'rigl': sparse_jax.rigl(.5, structure=BLOCK, update_every=2),
    'top_kast': sparse_jax.top_kast(.75, backward_sparsity=.5,
                                    structure=BLOCK, update_every=2)}
COLUMNS = sparse_jax.rigl(.5, structure=BALANCED, update_every=2)
SIZES = {'a': (16, 32), 'b': (32, 16)}


def model(params, x):
  return jnp.tanh(x @ params['a']) @ params['b']


def problem():
  """The parameters and the batch."""
  keys = jax.random.split(jax.random.key(0), 3)
  return {name: jax.random.normal(key, SIZES[name])
          for name, key in zip(SIZES, keys[1:])}, jax.random.normal(
              keys[0], (16, 16))


def placed(mesh, kind):
  """Where leaves of the state lie: 'data', 'fsdp', 'columns'."""
  at = lambda *spec: jax.sharding.NamedSharding(mesh, P(*spec))
  axis = {'data': None, 'fsdp': 'data', 'columns': 'model'}[kind]

  def place(path, leaf):
    if getattr(path[-1], 'name', '') == 'reservoir':
      return at().with_memory_kind('pinned_host')
    dense = leaf.shape in SIZES.values()  # A weight, or a slot of one.
    if axis is None or leaf.ndim != 3 and not dense:
      return at()
    return at(None, axis) if dense and kind == 'columns' else at(axis)

  return lambda tree: jax.tree.map_with_path(place, tree)


def mesh_of(kind, axes='auto'):
  shape = {'data': 4, 'model': 2} if kind == 'columns' else {'data': 8}
  return jax.make_mesh(tuple(shape.values()), tuple(shape),
                       axis_types=(AXES[axes],) * len(shape))


def stepper(method, tx, **options):
  def step(state, x):
    params, opt_state = state

    def loss_fn(params):
      apply = sparse_jax.with_method(model, method, opt_state, **options)
      return jnp.mean(jnp.square(apply(params, x) - 1))

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss

  return step


def compiled_step(method, kind='one', axes='auto', context=False):
  """A jitted step, its state and batch where they belong."""
  params, x = problem()
  tx = sparse_jax.sparsify(optax.adam(.01), method)
  state = sparse_jax.start(tx, method, params)
  if kind == 'one':
    return jax.jit(stepper(method, tx)), state, x
  mesh = mesh_of(kind, axes)
  places = placed(mesh, kind)(state)
  whole, rows = (jax.sharding.NamedSharding(mesh, spec)
                 for spec in (P(), P('data')))
  own = {}
  if kind == 'columns' and axes == 'auto':
    own = dict(column_axes=('model',))
  step = jax.jit(stepper(method, tx, **own), out_shardings=(places, whole))
  return step, jax.device_put(state, places), jax.device_put(x, rows)


def train(method, *place):
  """Weights and loss after five steps, where blocks lie, programs compiled."""
  step, state, x = compiled_step(method, *place)
  with in_context(*place):
    for _ in range(5):
      state, loss = step(state, x)
  blocks = getattr(state[0]['a'], 'blocks', None)
  return (sparse_jax.dense_weights(method, *jax.device_get(state)),
          float(loss), blocks is not None and blocks.sharding,
          step._cache_size())


def in_context(kind='one', axes='auto', context=False):
  return jax.set_mesh(mesh_of(kind, axes)) if context else (
      contextlib.nullcontext())


def moved(method, *place):
  """What a step hands around: (collective, an array), sorted."""
  step, state, x = compiled_step(method, *place)
  with in_context(*place):
    text = step.lower(state, x).compile().as_text()
  return sorted((name, array) for arrays, name in re.findall(COLLECTIVE, text)
                for array in re.findall(r'\w+\[[\d,]*\]', arrays))


@functools.cache
def masked(method):
  return train(method)[:2]


class DevicesTest(parameterized.TestCase):

  def check(self, method, kind, axes, context):
    want, want_loss = masked(method)
    got, loss, place, compiled = train(sparse_jax.packed(method), kind, axes,
                                       context)
    self.assertAlmostEqual(loss, want_loss, delta=1e-4)
    for path, weight in want.items():
      np.testing.assert_allclose(got[path], weight, atol=1e-5)
    self.assertEqual(compiled, 1)
    self.assertEqual(place.spec, {'data': P(), 'fsdp': P('data'),
                                  'columns': P('model')}[kind])

  @parameterized.product(name=list(METHODS), kind=['data', 'fsdp'],
                         mesh=['bare', 'auto', 'explicit'])
  def test_run_is_the_masked_one(self, name, kind, mesh):
    """Without `set_mesh`, and with one of automatic and explicit axes."""
    self.check(METHODS[name], kind, 'auto' if mesh == 'bare' else mesh,
               mesh != 'bare')

  def test_what_start_gives_lies_on_the_mesh_of_the_parameters(self):
    """The step's count too, which belongs to no leaf."""
    mesh = mesh_of('data')
    method = sparse_jax.packed(METHODS['top_kast'])
    tx = sparse_jax.sparsify(optax.adam(.1), method)
    params, _ = problem()
    state = sparse_jax.start(tx, method, jax.device_put(
        params, jax.sharding.NamedSharding(mesh, P())))
    for leaf in jax.tree.leaves(state):
      self.assertLen(leaf.sharding.device_set, 8)

  @parameterized.parameters([('data', 'model')], [('model',)], [(None, 'data')])
  def test_start_packs_weights_that_lie_in_pieces(self, spec):
    """By their types; stacked layers too. Every device gets all blocks."""
    mesh = mesh_of('columns', 'explicit')
    params = problem()[0]
    params['stack'] = jnp.stack([params['b'], -2 * params['b']])
    sites = dict(structure=BLOCK, batch_axes={'stack': (0,)})
    for method in sparse_jax.rigl(.5, **sites), sparse_jax.top_kast(
        .75, backward_sparsity=.5, **sites):
      method = sparse_jax.packed(method)
      tx = sparse_jax.sparsify(optax.adam(.1), method)
      lie = lambda leaf: jax.sharding.NamedSharding(
          mesh, P(*[None] * (leaf.ndim - 2), *spec))
      with jax.set_mesh(mesh):
        got = sparse_jax.start(tx, method, jax.device_put(
            params, jax.tree.map(lie, params)))
      jax.tree.map(np.testing.assert_array_equal, got,
                   sparse_jax.start(tx, method, params))

  @parameterized.parameters('bare', 'auto', 'explicit')
  def test_columns_over_devices(self, mesh):
    self.check(COLUMNS, 'columns', 'auto' if mesh == 'bare' else mesh,
               mesh != 'bare')

  @parameterized.product(kind=['data', 'fsdp', 'columns'], axes=list(AXES))
  def test_collectives_are_those_of_dense_with_blocks_for_weights(
      self, kind, axes):
    structure, parts = (BALANCED, 2) if kind == 'columns' else (BLOCK, 1)
    static = sparse_jax.packed(sparse_jax.static(.5, structure=structure))
    shapes = [(rows, columns // parts) for rows, columns in SIZES.values()]
    weights = {f'f32[{a},{b}]' for shape in shapes
               for a, b in (shape, shape[::-1])}
    blocks = f'f32[{16 // parts},4,4]'
    # Of automatic axes XLA splits dense products otherwise.
    want = moved(sparse_jax.dense(), kind, 'explicit', True)
    self.assertNoCommonElements(weights, {blocks})
    self.assertLen([1 for _, array in want if array in weights],
                   4 if kind == 'fsdp' else 2)
    self.assertEqual(moved(static, kind, axes, True), sorted(
        (name, blocks if array in weights else array) for name, array in want))

  @parameterized.parameters('data', 'fsdp', 'columns')
  def test_a_refresh_sums_rows_of_tiles_and_gathers_places_alone(self, kind):
    structure = BALANCED if kind == 'columns' else BLOCK
    parts = 2 if kind == 'columns' else 1
    make = lambda method: moved(sparse_jax.packed(method), kind, 'explicit',
                                True)
    more = make(sparse_jax.rigl(.5, structure=structure, update_every=2))
    for each in make(sparse_jax.static(.5, structure=structure)):
      more.remove(each)
    strips = [('all-reduce', f'f32[4,{columns // parts}]')
              for _, columns in SIZES.values()]
    for each in strips:
      more.remove(each)
    for name, array in more:
      self.assertEqual(name, 'all-gather')
      self.assertLessEqual(np.prod([int(n) for n in re.findall(
          r'\d+', array)[1:]]), 128, array)  # At most x of one device, 4 x 32.


if __name__ == '__main__':
  absltest.main()
