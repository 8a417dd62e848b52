"""Tests of how a model's parameters are packed, and found in a tree."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

import sparse_jax
from sparse_jax.packed_methods import packed_params


def dense_params():
  random = np.random.RandomState(0)
  draw = lambda *shape: random.randn(*shape).astype(np.float32)
  return {'first': {'kernel': draw(8, 12), 'bias': draw(12)},
          'conv': {'kernel': draw(3, 3, 4, 6)}}


def cutting(sparsity, block=(2, 3), pad=False):
  return packed_params.make_cutting(sparsity, sparse_jax.uniform, block, 'sum',
                                    pad, None, None)


class PackTest(parameterized.TestCase):

  def test_random_blocks_in_the_number_of_the_common_rule(self):
    params = dense_params()
    packed, state = packed_params.pack_random(cutting(.7), params, 5)
    leaves = packed_params.packed_leaves(packed)
    self.assertEqual({path: leaf.blocks.shape[0] for path, leaf in
                      leaves.items()},
                     {'conv/kernel': sparse_jax.keep_count(36, .7),
                      'first/kernel': sparse_jax.keep_count(16, .7)})
    np.testing.assert_array_equal(packed['first']['bias'],
                                  params['first']['bias'])
    again, _ = packed_params.pack_random(cutting(.7), params, 5)
    other, _ = packed_params.pack_random(cutting(.7), params, 6)
    ids = lambda tree: tree['conv']['kernel'].ids.tolist()
    self.assertEqual(ids(packed), ids(again))
    self.assertNotEqual(ids(packed), ids(other))
    self.assertEqual(state.sparsities, {'conv/kernel': .7,
                                        'first/kernel': .7})

  @parameterized.parameters(False, True)
  def test_largest_blocks_are_read_and_all_are_on_the_host(self, random):
    params = dense_params()
    packed, state = packed_params.pack_largest(
        cutting(.75), cutting(.5), random, params, 5)
    kernel = packed['first']['kernel']
    worth = abs(params['first']['kernel']).reshape(4, 2, 4, 3).sum((1, 3))
    best = np.argsort(-worth.ravel())
    read = kernel.ids[kernel.forward]
    self.assertEqual(set(read.tolist()), set(best[:4].tolist()))
    self.assertEqual(set(kernel.ids.tolist()) == set(best[:8].tolist()),
                     not random)
    self.assertEqual(state.reservoir['first/kernel'].shape, (16, 2, 3))
    np.testing.assert_array_equal(
        state.reservoir['first/kernel'][np.asarray(kernel.ids)],
        kernel.blocks)

  def test_block_that_does_not_divide(self):
    with self.assertRaisesRegex(ValueError, 'conv/kernel.*`block`'):
      packed_params.pack_random(cutting(.5, (8, 4)), dense_params())
    packed, _ = packed_params.pack_random(cutting(.5, (8, 4), True),
                                          dense_params())
    self.assertEqual(packed['conv']['kernel'].grid, (9, 2))

  def test_packed_leaves_are_found_and_put_back(self):
    packed, _ = packed_params.pack_random(cutting(.5), dense_params())
    leaves = packed_params.packed_leaves(packed)
    twice = {path: leaf.replace(blocks=2 * leaf.blocks)
             for path, leaf in leaves.items()}
    both = packed_params.with_packed(packed, twice)
    np.testing.assert_array_equal(both['conv']['kernel'].blocks,
                                  2 * packed['conv']['kernel'].blocks)
    self.assertEqual(jax.tree.structure(both), jax.tree.structure(packed))

  def test_scores_are_split_from_gradients(self):
    packed, _ = packed_params.pack_random(cutting(.5), dense_params())
    kernel = packed['first']['kernel'].replace(growth=jnp.ones((4, 4)))
    grads, growth = packed_params.split_growth(
        {**packed, 'first': {'kernel': kernel}})
    self.assertEqual(list(growth), ['first/kernel'])
    self.assertIsNone(grads['first']['kernel'].growth)


if __name__ == '__main__':
  absltest.main()
