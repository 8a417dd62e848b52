"""Tests of how blocks come and go: places, slots, the host's reservoir."""

import functools
import re

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax
from sparse_jax.packed_methods import packed_rewiring


def packed_kernel(sparsity=.5, **options):
  """A kernel [8, 12] in blocks of 2 x 3, in a tree."""
  weight = np.random.RandomState(0).randn(8, 12).astype(np.float32)
  return {'kernel': sparse_jax.pack(weight, block=(2, 3), sparsity=sparsity,
                                    **options)}


class RewireTest(parameterized.TestCase):

  @parameterized.parameters('random', 'gradient')
  def test_the_weakest_blocks_make_room_and_the_others_stay(self, by):
    """Of blocks that were dropped, random growth may take one back."""
    params, tx = packed_kernel(), optax.trace(.9)
    slots = jax.tree.map(lambda leaf: leaf + 7., tx.init(
        sparse_jax.partition_packed(params)[0]))
    old = params['kernel']
    weak = np.argsort(np.abs(old.blocks).sum((1, 2)))[:2]
    scores = jnp.arange(16.).at[old.ids].set(-1).reshape(4, 4)
    after, slots = jax.jit(functools.partial(
        packed_rewiring.rewire, fraction=.25, sparsities={'kernel': .5},
        init=tx.init))(params, slots, {'kernel': scores} if by == 'gradient'
                       else {}, jax.random.key(3))
    new, trace = after['kernel'], slots.trace['kernel'].blocks
    moved = np.asarray(new.ids != old.ids)
    self.assertContainsSubset(np.flatnonzero(moved), weak)
    self.assertTrue(moved.any())
    self.assertLen(set(new.ids.tolist()), 8)
    stay = ~moved[:, None, None]
    np.testing.assert_array_equal(new.blocks, old.blocks * stay)
    np.testing.assert_array_equal(trace, np.ones(trace.shape) * 7 * stay)
    if by == 'gradient':
      best = np.argsort(-scores.ravel())[:2]
      self.assertEqual(set(new.ids[moved].tolist()), set(best.tolist()))

  def test_slots_of_another_tree_or_shape(self):
    params = packed_kernel()
    weights = sparse_jax.partition_packed(params)[0]
    tx = optax.sgd(.1, momentum=.9)
    fewer = sparse_jax.partition_packed(packed_kernel(.75))[0]
    for other, message in (
        ({'other': jnp.ones(3)}, '`slots` must be a state'),
        (fewer, r'`slots` has .*kernel.*\(4, 2, 3\).*\(8, 2, 3\)')):
      with self.assertRaisesRegex(ValueError, message):
        packed_rewiring.reset_slots(tx.init(other), tx.init(weights), {})


class MemoryTest(parameterized.TestCase):
  """No array of the dense weight's size in what a refresh compiles."""

  SIZE = 96 * 120

  def setting(self):
    weight = np.random.RandomState(1).randn(96, 120).astype(np.float32)
    params = {'kernel': sparse_jax.pack(weight, block=(12, 12), sparsity=.9,
                                        backward_sparsity=.8)}
    weights = sparse_jax.partition_packed(params)[0]
    return params, weights, optax.adam(.1)

  @parameterized.parameters(False, True)
  def test_of_a_refresh_on_the_device(self, by_gradient):
    params, weights, tx = self.setting()
    growth = {'kernel': jnp.ones((8, 10))} if by_gradient else {}
    refresh = functools.partial(packed_rewiring.rewire, fraction=.3,
                                sparsities={'kernel': .8}, init=tx.init)
    self.check(jax.jit(refresh).lower(params, tx.init(weights), growth,
                                      jax.random.key(0)))

  def test_of_an_exchange_with_the_host(self):
    params, weights, tx = self.setting()
    blocks = params['kernel'].blocks
    self.check(packed_rewiring._swap.lower(blocks, np.zeros(2, np.int32),
                                           blocks[:2]))
    self.check(packed_rewiring._tile_worth.lower(blocks, 'sum'))
    self.check(packed_rewiring._jitted_reset(tx.init).lower(
        tx.init(weights), weights, {'kernel': jnp.ones(16, bool)}))

  def check(self, lowered):
    found = re.findall(r'\b(?:f|bf|s|u|pred)\d*\[([\d,]*)\]',
                       lowered.compile().as_text())
    sizes = [np.prod([int(n) for n in shape.split(',') if n])
             for shape in found]
    self.assertNotEmpty(sizes)
    self.assertLess(max(sizes), self.SIZE)


class ReservoirTest(parameterized.TestCase):

  def test_blocks_that_leave_come_back_as_they_were(self):
    """C is bit-identical however long it waits."""
    method = sparse_jax.packed_top_kast(.75, backward_sparsity=.5,
                                        block=(1, 1), update_every=1)
    params, state = method.pack({'kernel': np.arange(
        1., 9.).reshape(2, 4).astype(np.float32)})
    start = state.reservoir['kernel'].copy()
    kernel = params['kernel']
    self.assertEqual(sorted(kernel.ids.tolist()), [4, 5, 6, 7])
    # What is small leaves; what was not in B enters as it was.
    shrunk = {'kernel': kernel.replace(blocks=kernel.blocks / 128)}
    params, _, state = method.refresh(shrunk, (), state, init=lambda w: ())
    self.assertEqual(sorted(params['kernel'].ids.tolist()), [0, 1, 2, 3])
    np.testing.assert_array_equal(
        params['kernel'].blocks[np.argsort(params['kernel'].ids)], start[:4])
    np.testing.assert_array_equal(state.reservoir['kernel'][4:],
                                  start[4:] / 128)

  def test_half_precision_blocks_with_wide_slots(self):
    method = sparse_jax.packed_top_kast(.75, backward_sparsity=.5,
                                        block=(2, 2), update_every=1)
    params, state = method.pack(
        {'kernel': jnp.arange(32.).reshape(4, 8).astype(jnp.bfloat16)})
    tx = optax.adam(.1, mu_dtype=jnp.float32)
    loss = lambda p, x: jnp.sum(sparse_jax.packed_matmul(x, p['kernel'])**2)
    slots = tx.init(sparse_jax.partition_packed(params)[0])
    step = sparse_jax.packed_step(loss, tx, method=method)
    x = jnp.ones((1, 4), jnp.bfloat16)
    kinds = [leaf.dtype for leaf in jax.tree.leaves((params, slots))]
    for _ in range(2):
      params, slots, state, _ = step(params, slots, state, x)
    self.assertEqual(kinds,
                     [leaf.dtype for leaf in jax.tree.leaves((params, slots))])
    self.assertEqual(slots[0].mu['kernel'].blocks.dtype, jnp.float32)


if __name__ == '__main__':
  absltest.main()
