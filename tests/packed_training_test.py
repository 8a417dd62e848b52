"""Tests of training on packed weights: it is the simulated run."""

import functools
import pathlib
import re
import shutil
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax
from sparse_jax import trees
from sparse_jax.blocks import packing as packed_lib
from sparse_jax.packed_methods import packed_rewiring
from sparse_jax.packed_methods import packed_training

BLOCK = (2, 3)
# Compiles in half the time.
QUICK = {'xla_backend_optimization_level': 0}
SIMULATED = {'static': sparse_jax.static, 'set': sparse_jax.set_,
             'rigl': sparse_jax.rigl, 'top_kast': sparse_jax.top_kast}
PACKED = {'static': sparse_jax.packed_static, 'set': sparse_jax.packed_set,
          'rigl': sparse_jax.packed_rigl,
          'top_kast': sparse_jax.packed_top_kast}
OPTIONS = {'static': {}, 'set': dict(update_every=2, drop_fraction=.5),
           'rigl': dict(update_every=2, drop_fraction=.5),
           'top_kast': dict(update_every=2, backward_sparsity=.4,
                            penalty_weight=.03)}


def dense_params(dtype=np.float32):
  random = np.random.RandomState(0)
  draw = lambda *shape: random.randn(*shape).astype(dtype) / 2
  return {'first': {'kernel': draw(8, 12), 'bias': draw(12)},
          'second': {'kernel': draw(12, 6), 'bias': draw(6)}}


def batch_of(step):
  random = np.random.RandomState(100 + step)
  return (random.randn(5, 8).astype(np.float32),
          random.randn(5, 6).astype(np.float32))


def loss_fn(multiply):
  def loss(params, x, y):
    first, second = params['first'], params['second']
    h = jnp.tanh(multiply(x, first['kernel']) + first['bias'][None])
    out = multiply(h, second['kernel']) + second['bias'][None]
    return jnp.mean((out - y)**2)

  return loss


def simulated_run(method, tx, steps, params):
  """Yields params, slots, masks after each update."""
  tx = sparse_jax.sparsify(tx, method, key=7)
  state = tx.init(params)
  loss = loss_fn(jnp.matmul)

  @functools.partial(jax.jit, compiler_options=QUICK)
  def step(params, state, x, y):
    grads = jax.grad(lambda p: loss(method.read(p, state), x, y))(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  for t in range(steps):
    params, state = step(params, state, *batch_of(t))
    yield params, state.inner, sparse_jax.get_state(state)


def product(x, kernel):
  if packed_lib.is_packed(kernel):
    return sparse_jax.packed_matmul(x, kernel)
  return x @ kernel


def packed_run(method, tx, steps, params):
  params, state = method.pack(params, 7)
  slots = tx.init(sparse_jax.partition_packed(params)[0])
  step = sparse_jax.packed_step(loss_fn(product), tx, method=method)
  for t in range(steps):
    params, slots, state, _ = step(params, slots, state, *batch_of(t))
    yield params, slots, state


def tiles_at(packed, dense):
  """The tiles of a dense array where the blocks of a packed one belong."""
  tiles = packed_lib.tile(np.asarray(dense), packed.block)
  return tiles[ids_of(packed)]


def ids_of(packed):
  """int[n] of all blocks, counted row by row."""
  return np.asarray(packed.rows) * packed.grid[1] + np.asarray(packed.columns)


def packed_by_path(params):
  return {path: leaf for path, leaf in (
      (trees.path_name(p), leaf) for p, leaf in jax.tree.leaves_with_path(
          params, is_leaf=packed_lib.is_packed)) if packed_lib.is_packed(leaf)}


class SameRunTest(parameterized.TestCase):

  @parameterized.named_parameters(
      ('static', 'static', {}), ('rigl', 'rigl', {}),
      ('top_kast', 'top_kast', {}),
      ('some', 'set', dict(update_begin=3, is_sparse=[('second', False)])),
      ('annealed_max', 'rigl', dict(update_end=5, reduce='max')),
      ('hanging_over', 'rigl', dict(block=(5, 4), pad=True,
                                    allocation=sparse_jax.erk)),
      ('random_backward', 'top_kast', dict(
          backward_selection='random', update_every=1,
          allocation=sparse_jax.erk)))
  def test_packed_run_is_the_simulated_run(self, name, options):
    """Weights on B, both masks, and every slot on B, after every step."""
    tx = optax.adamw(.05, weight_decay=.01)
    options = {**OPTIONS[name], **options}
    packed = PACKED[name](.7, **{'block': BLOCK, **options})
    block = sparse_jax.Block(options.pop('block', BLOCK),
                             options.pop('reduce', 'sum'))
    options.pop('pad', None)
    simulated = SIMULATED[name](.7, structure=block, **options)
    before, changes = None, 0
    for ours, theirs in zip(packed_run(packed, tx, 5, dense_params()),
                            simulated_run(simulated, tx, 5, dense_params())):
      self.compare(ours, theirs)
      leaves = packed_by_path(ours[0])
      ids = {path: set(ids_of(leaf)) for path, leaf in leaves.items()}
      changes += before is not None and ids != before
      before = ids
    self.assertEqual(changes > 0, name != 'static')

  def compare(self, ours, theirs):
    params, slots, _ = ours
    dense, dense_slots, state = theirs
    leaves, dense = packed_by_path(params), trees.leaves_by_path(dense)
    inner = trees.leaves_by_path(state.forward_masks)
    outer = trees.leaves_by_path(state.backward_masks)
    slots, dense_slots = (trees.leaves_by_path(s) for s in (slots, dense_slots))
    for path, leaf in leaves.items():
      ids, forward = ids_of(leaf), np.s_[:]
      if leaf.forward is not None:
        forward = np.asarray(leaf.forward)
      for mask, ids in (inner, ids[forward]), (outer, ids):
        want = packed_lib.tile(np.asarray(mask[path]), leaf.block).any((1, 2))
        np.testing.assert_array_equal(np.flatnonzero(want), np.sort(ids))
      # Products are summed in another order; five steps of it.
      np.testing.assert_allclose(leaf.blocks, tiles_at(leaf, dense[path]),
                                 rtol=1e-4, atol=1e-5)
      own = [name for name in slots if name.endswith(f'{path}/blocks')]
      self.assertNotEmpty(own)
      for name in own:
        want = dense_slots[name.removesuffix('/blocks')]
        np.testing.assert_allclose(slots[name], tiles_at(leaf, want),
                                   rtol=1e-4, atol=1e-5)
    for path in 'first/bias', 'second/bias':
      np.testing.assert_allclose(trees.leaves_by_path(params)[path],
                                 dense[path], rtol=1e-4, atol=1e-5)


class MemoryTest(parameterized.TestCase):
  """Nothing of the dense weight's size, in any program or between them."""

  SIZE = 96 * 120

  def setting(self, name):
    method = PACKED[name](.9, block=(12, 12), is_sparse=[('first', True)],
                          **OPTIONS[name] | (
        dict(backward_sparsity=.8) if name == 'top_kast' else {}))
    params = {'first': {'kernel': np.random.RandomState(1).randn(
        96, 120).astype(np.float32)}}
    loss = lambda params, x: jnp.mean(
        sparse_jax.packed_matmul(x, params['first']['kernel'])**2)
    return method, params, loss, jnp.ones((4, 96))

  @parameterized.parameters('rigl', 'top_kast')
  def test_of_a_step_with_growth_scores(self, name):
    method, params, loss, x = self.setting(name)
    tx = optax.adam(.1)
    params, state = method.pack(params)
    weights, indices = sparse_jax.partition_packed(params)
    slots = tx.init(weights)
    step = functools.partial(packed_training._update, loss, tx, method)
    compiled = jax.jit(step, static_argnums=3).lower(
        packed_lib.ask_growth(weights), indices, slots,
        tuple(state.sparsities.items()), x).compile()
    self.check(compiled.as_text())

  def check(self, text):
    found = re.findall(r'\b(?:f|bf|s|u|pred)\d*\[([\d,]*)\]', text)
    sizes = [np.prod([int(n) for n in shape.split(',') if n])
             for shape in found]
    self.assertNotEmpty(sizes)
    self.assertLess(max(sizes), self.SIZE)

  @parameterized.parameters(*PACKED)
  def test_of_what_lives_on_the_device(self, name):
    """Between steps and within a step's arguments: B, its slots, the rest."""
    method, params, loss, x = self.setting(name)
    before = {id(array) for array in jax.live_arrays()}
    params, state = method.pack(params)
    slots = optax.adam(.1).init(sparse_jax.partition_packed(params)[0])
    step = sparse_jax.packed_step(loss, optax.adam(.1), method=method)
    share = .2 if name == 'top_kast' else .1
    for _ in range(4):
      params, slots, state, _ = step(params, slots, state, x)
      alive = [array for array in jax.live_arrays() if id(array) not in before]
      total = sum(array.nbytes for array in alive)
      # Weights and two slots, the indices, and a few numbers.
      self.assertLess(total, 4 * (3 * share + .02) * self.SIZE)

  def test_nothing_compiles_after_the_first_refreshes(self):
    method, params, loss, x = self.setting('top_kast')
    params, state = method.pack(params)
    tx = optax.adam(.3)
    slots = tx.init(sparse_jax.partition_packed(params)[0])
    step = sparse_jax.packed_step(loss, tx, method=method)
    counts = []
    for _ in range(8):
      params, slots, state, _ = step(params, slots, state, x)
      counts.append((packed_rewiring._swap._cache_size(),
                     packed_rewiring._tile_worth._cache_size()))
    self.assertEqual(counts[3], counts[-1])


class CheckpointTest(parameterized.TestCase):

  def test_a_run_saved_and_restored_by_orbax_continues_bit_for_bit(self):
    """Params, slots, and the state with its reservoir, in mid-run."""
    import orbax.checkpoint as ocp
    method = sparse_jax.packed_top_kast(.7, block=BLOCK,
                                        **OPTIONS['top_kast'])
    tx = optax.adam(.05)
    params, state = method.pack(dense_params())
    run = (params, tx.init(sparse_jax.partition_packed(params)[0]), state)
    step = sparse_jax.packed_step(loss_fn(product), tx, method=method)
    directory = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, directory)
    path = pathlib.Path(directory) / 'run'
    for t in range(3):
      *run, _ = step(*run, *batch_of(t))
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(path, tuple(run))
      checkpointer.wait_until_finished()
      again = checkpointer.restore(path, jax.tree.map(
          lambda leaf: leaf, tuple(run)))
    for t in range(3, 5):
      *run, _ = step(*run, *batch_of(t))
      *again, _ = step(*again, *batch_of(t))
    jax.tree.map(np.testing.assert_array_equal, tuple(again), tuple(run))


class BadInputTest(parameterized.TestCase):

  @parameterized.named_parameters(
      ('sparsity', 'set', dict(sparsity=1.), 'sparsity'),
      ('block', 'set', dict(block=3), 'shape'),
      ('drop', 'rigl', dict(drop_fraction=2), 'drop_fraction'),
      ('every', 'rigl', dict(update_every=0), 'update_every'),
      ('reduce', 'static', dict(reduce='mean'), 'reduce'),
      ('pad', 'static', dict(pad=1), 'pad'),
      ('backward', 'top_kast', dict(backward_sparsity=.95),
       'backward_sparsity'),
      ('selection', 'top_kast', dict(backward_selection='best'),
       'backward_selection'),
      ('penalty', 'top_kast', dict(penalty_weight=-1), 'penalty_weight'))
  def test_of_constructors(self, name, options, message):
    options = {**OPTIONS[name], 'block': (2, 2), 'sparsity': .9, **options}
    with self.assertRaisesRegex(ValueError, f'`{message}`'):
      PACKED[name](**options)

  def test_of_a_refresh_without_scores(self):
    method = sparse_jax.packed_rigl(.5, block=(2, 2), update_every=1)
    params, state = method.pack({'kernel': np.ones((4, 4), np.float32)})
    with self.assertRaisesRegex(ValueError, '`growth`'):
      method.refresh(params, (), state, init=lambda w: ())

  def test_of_slots_or_a_state_of_other_weights(self):
    """Before anything is computed."""
    method = sparse_jax.packed_static(.5, block=(2, 2))
    more = sparse_jax.packed_static(.25, block=(2, 2))
    kernel, tx = {'kernel': np.ones((4, 4), np.float32)}, optax.adam(.1)
    params, state = method.pack(kernel)
    slots = tx.init(sparse_jax.partition_packed(params)[0])
    other, other_state = more.pack({'else': kernel})
    other_slots = tx.init(sparse_jax.partition_packed(more.pack(kernel)[0])[0])
    step = sparse_jax.packed_step(lambda p: 0., tx, method=method)
    for given, message in (
        ((params, tx.init(other), state), '`slots`'),
        ((params, other_slots, state), r'`slots`.*\(3, 2, 2\)'),
        ((params, slots, other_state), '`state`.*else/kernel')):
      with self.assertRaisesRegex(ValueError, message):
        step(*given)

  def test_of_a_method_for_masks(self):
    with self.assertRaisesRegex(ValueError, '`method`'):
      sparse_jax.packed_step(lambda p: 0., optax.sgd(.1),
                             method=sparse_jax.static(.5))


if __name__ == '__main__':
  absltest.main()
