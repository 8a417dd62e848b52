"""Tests of training on packed weights: it is the simulated run."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax
from sparse_jax import base
from sparse_jax import packed as packed_lib

BLOCK = (2, 3)
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

  @jax.jit
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
  return tiles[np.asarray(packed.ids)]


def packed_by_path(params):
  return {path: leaf for path, leaf in (
      (base.path_name(p), leaf) for p, leaf in jax.tree.leaves_with_path(
          params, is_leaf=packed_lib.is_packed)) if packed_lib.is_packed(leaf)}


class SameRunTest(parameterized.TestCase):

  @parameterized.named_parameters(
      ('static', 'static', {}), ('set', 'set', {}), ('rigl', 'rigl', {}),
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
    for ours, theirs in zip(packed_run(packed, tx, 6, dense_params()),
                            simulated_run(simulated, tx, 6, dense_params())):
      self.compare(ours, theirs)
      leaves = packed_by_path(ours[0])
      ids = {path: set(leaf.ids.tolist()) for path, leaf in leaves.items()}
      changes += before is not None and ids != before
      before = ids
    self.assertEqual(changes > 0, name != 'static')

  def compare(self, ours, theirs):
    params, slots, _ = ours
    dense, dense_slots, state = theirs
    leaves, dense = packed_by_path(params), base.leaves_by_path(dense)
    inner = base.leaves_by_path(state.forward_masks)
    outer = base.leaves_by_path(state.backward_masks)
    slots, dense_slots = (base.leaves_by_path(s) for s in (slots, dense_slots))
    for path, leaf in leaves.items():
      _, a, b = sparse_jax.packed_to_dense(leaf)
      np.testing.assert_array_equal(a, inner[path])
      np.testing.assert_array_equal(b, outer[path])
      # Products are summed in another order; six steps of it.
      np.testing.assert_allclose(leaf.blocks, tiles_at(leaf, dense[path]),
                                 rtol=1e-4, atol=1e-5)
      own = [name for name in slots if name.endswith(f'{path}/blocks')]
      self.assertNotEmpty(own)
      for name in own:
        want = dense_slots[name.removesuffix('/blocks')]
        np.testing.assert_allclose(slots[name], tiles_at(leaf, want),
                                   rtol=1e-4, atol=1e-5)
    for path in 'first/bias', 'second/bias':
      np.testing.assert_allclose(base.leaves_by_path(params)[path],
                                 dense[path], rtol=1e-4, atol=1e-5)


if __name__ == '__main__':
  absltest.main()
