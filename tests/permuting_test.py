"""Orders of units in which few tiles hold most of the weights."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

import sparse_jax

BLOCK = sparse_jax.Block((4, 4))
UNITS = [{'a/kernel': -1, 'a/bias': 0, 'b/kernel': 0},
         {'b/kernel': 1, 'b/bias': 0, 'c': 0}]


def network(key):
  """Kernels 12-16-16-3, with biases in the hidden layers."""
  keys = jax.random.split(jax.random.key(key), 5)
  normal = lambda i, *shape: jax.random.normal(keys[i], shape)
  return {'a': {'kernel': normal(0, 12, 16), 'bias': normal(1, 16)},
          'b': {'kernel': normal(2, 16, 16), 'bias': normal(3, 16)},
          'c': normal(4, 16, 3)}


def apply(params, x):
  for name in 'ab':
    x = jax.nn.relu(x @ params[name]['kernel'] + params[name]['bias'][None])
  return x @ params['c']


def kept(scores, structure=BLOCK, sparsity=.75):
  """The share of the scores that the best tiles hold."""
  mask = sparse_jax.make_mask(scores, sparsity, structure=structure)
  return float(jnp.where(mask, scores, 0).sum() / scores.sum())


class PermutingTest(parameterized.TestCase):

  @parameterized.parameters(BLOCK, sparse_jax.Block((4, 2), balanced=True),
                            sparse_jax.Block((5, 3)))
  def test_the_function_stays_and_tiles_hold_no_less(self, structure):
    for key in range(3):
      params = network(key)
      better, orders = sparse_jax.permute_units(
          params, [{'a/kernel': 0}, *UNITS], sparsity=.75, structure=structure,
          is_sparse={'c': False})
      x = jax.random.normal(jax.random.key(9), (5, 12))
      np.testing.assert_allclose(apply(better, x[:, orders[0]]),
                                 apply(params, x), rtol=1e-4, atol=1e-4)
      held = [sum(kept(jnp.abs(net[name]['kernel']), structure)
                  for name in 'ab') for net in (params, better)]
      self.assertGreater(*held[::-1])
      for order, size in zip(orders, (12, 16, 16)):
        self.assertEqual(sorted(order), list(range(size)))

  def test_hidden_blocks_are_found(self):
    """Weights in tiles, shuffled: all of them are in as many tiles again."""
    rng = np.random.default_rng(0)
    tiles = np.kron(np.eye(4), np.ones((4, 4))) * rng.uniform(1, 2, (16, 16))
    order = rng.permutation(16)
    params = {'a': jnp.asarray(tiles[rng.permutation(16)][:, order]),
              'b': jnp.asarray(tiles[order][:, rng.permutation(16)])}
    self.assertLess(kept(params['a']), .6)
    better, _ = sparse_jax.permute_units(
        params, [{'a': 0}, {'a': 1, 'b': 0}, {'b': 1}], sparsity=.75,
        structure=BLOCK)
    self.assertGreater(kept(better['a']) + kept(better['b']), 1.6)

  def test_a_stack_of_layers_and_a_convolution(self):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {'conv': {'kernel': jax.random.normal(keys[0], (3, 3, 4, 8))},
              'mlp': {'in': jax.random.normal(keys[1], (2, 8, 12)),
                      'out': jax.random.normal(keys[2], (2, 12, 8))}}
    units = [{'conv/kernel': -1, 'mlp/in': 1, 'mlp/out': 2},
             {'mlp/in': -1, 'mlp/out': -2}]

    def apply(params, x):
      x = jax.lax.conv_general_dilated(x, params['conv']['kernel'], (1, 1),
                                       'SAME', dimension_numbers=(
                                           'NHWC', 'HWIO', 'NHWC'))
      for i in range(2):
        x += jax.nn.relu(x @ params['mlp']['in'][i]) @ params['mlp']['out'][i]
      return x

    better, orders = sparse_jax.permute_units(
        params, units, sparsity=.5, structure=BLOCK,
        batch_axes={'mlp': (0,)}, is_sparse={'mlp': True})
    x = jax.random.normal(keys[0], (1, 3, 3, 4))
    np.testing.assert_allclose(
        apply(better, x), apply(params, x)[..., orders[0]], rtol=1e-3,
        atol=1e-2)
    self.assertNotEqual(orders[1].tolist(), list(range(12)))

  def test_scores_decide(self):
    scores = network(1)
    permute = lambda **given: sparse_jax.permute_units(
        network(0), UNITS, sparsity=.75, structure=BLOCK, **given)[1]
    one, two = permute(), permute(scores=scores)
    self.assertFalse(all(map(np.array_equal, one, two)))
    for same, scaled in zip(one, permute(scores=jax.tree.map(
        lambda leaf: 4 * leaf, network(0)))):
      np.testing.assert_array_equal(same, scaled)

  @parameterized.parameters(
      (dict(units=[{'d': 0}]), 'none of'),
      (dict(units=[{'c': 2}]), 'axis 2'),
      (dict(units=[{'c': 0, 'a/kernel': 0}]), 'different sizes'),
      (dict(units=[{'c': 0}, {'c': -2}]), 'two sets'),
      (dict(units=[{}]), 'no mapping'),
      (dict(structure=sparse_jax.NM(2, 4)), 'Block'),
      (dict(structure=sparse_jax.Block((4, 4), reduce='max')), 'sum'),
      (dict(scores={'a': jnp.ones(3)}), 'scores'),
      (dict(sparsity=1.), 'sparsity'))
  def test_errors_name_the_argument(self, changes, message):
    given = dict(units=UNITS, sparsity=.5, structure=BLOCK) | changes
    with self.assertRaisesRegex(ValueError, message):
      sparse_jax.permute_units(network(0), **given)


if __name__ == '__main__':
  absltest.main()
