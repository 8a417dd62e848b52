"""Filter pruning removes filters and what follows them."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparse_jax.methods import filters

FOLLOWERS = {
    'params/conv_1/kernel': {
        'params/norm_1/scale': 0, 'params/norm_1/bias': 0,
        'batch_stats/norm_1/mean': 0, 'batch_stats/norm_1/var': 0,
        'params/conv_2/kernel': 2},
    'params/conv_2/kernel': {'params/conv_2/bias': 0,
                             'params/head/kernel': 0},
}


class Net(nn.Module):
  """Two convolutions, the first normalised, and a head on all positions."""

  widths: tuple[int, int] = (6, 8)

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Conv(self.widths[0], (3, 3), use_bias=False, name='conv_1')(x)
    x = nn.BatchNorm(not train, name='norm_1')(x)
    x = nn.Conv(self.widths[1], (3, 3), name='conv_2')(nn.relu(x))
    x = nn.relu(x).reshape(x.shape[0], -1)
    return nn.Dense(3, name='head')(x)


@functools.cache
def start():
  rng = np.random.default_rng(1)
  x = jnp.asarray(rng.normal(size=(2, 4, 4, 3)), jnp.float32)
  variables = jax.jit(Net().init)(jax.random.key(0), x)
  noise = lambda leaf: leaf + .3 * rng.normal(size=leaf.shape)
  return x, jax.tree.map(lambda leaf: jnp.asarray(
      np.abs(noise(np.asarray(leaf))), jnp.float32) if (
          leaf.ndim == 1) else leaf, variables)


class PruneFiltersTest(parameterized.TestCase):

  def test_smaller_net_computes_what_the_larger_does_without_them(self):
    x, variables = start()
    small, kept = filters.prune_filters(variables, {
        'params/conv_1/kernel': .5, 'params/conv_2/kernel': .25}, FOLLOWERS)
    gone = {path: np.setdiff1d(np.arange(n), kept[path]) for path, n in (
        ('params/conv_1/kernel', 6), ('params/conv_2/kernel', 8))}
    silent = jax.tree.map(jnp.array, variables)
    one, two = gone.values()
    for name in ('scale', 'bias'):
      leaf = silent['params']['norm_1'][name]
      silent['params']['norm_1'][name] = leaf.at[one].set(0)
    for name in ('kernel', 'bias'):
      leaf = silent['params']['conv_2'][name]
      silent['params']['conv_2'][name] = leaf.at[..., two].set(0)
    ours = jax.jit(Net((3, 6)).apply)(small, x)
    np.testing.assert_allclose(ours, jax.jit(Net().apply)(silent, x),
                               rtol=1e-4, atol=1e-5)

  def test_keeps_the_filters_of_largest_norm(self):
    _, variables = start()
    kernel = np.asarray(variables['params']['conv_1']['kernel'])
    norms = np.abs(kernel).sum(axis=(0, 1, 2))
    _, kept = filters.prune_filters(
        variables, {'params/conv_1/kernel': .5}, FOLLOWERS)
    np.testing.assert_array_equal(kept['params/conv_1/kernel'],
                                  np.sort(np.argsort(-norms)[:3]))

  def test_greedy_ranks_without_what_is_gone(self):
    """The second filter of b is large only through an input that goes."""
    net = {'a': jnp.array([[3., .1]]),
           'b': jnp.array([[1., .5], [0., 2.]])}
    for greedy, want in ((False, [1]), (True, [0])):
      _, kept = filters.prune_filters(
          net, {'a': .5, 'b': .5}, {'a': {'b': 0}}, greedy=greedy)
      self.assertEqual(kept['b'].tolist(), want)

  def test_smaller_net_trains(self):
    x, variables = start()
    small, _ = filters.prune_filters(variables, {
        'params/conv_1/kernel': .5}, FOLLOWERS)
    net, params = Net((3, 8)), small['params']
    tx = optax.sgd(.01)

    @jax.jit
    def step(params, state):
      def loss(params):
        return jnp.square(net.apply({**small, 'params': params}, x) - 1).sum()

      value, grads = jax.value_and_grad(loss)(params)
      updates, state = tx.update(grads, state)
      return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for _ in range(3):
      params, state, loss = step(params, state)
      losses.append(float(loss))
    self.assertLess(losses[-1], losses[0])

  @parameterized.parameters(
      ({'params/conv_3/kernel': .5}, {}, 'params/conv_3/kernel'),
      ({'params/conv_1/kernel': 1.}, {}, 'sparsities'),
      ({}, {'params/conv_1/kernel': {'params/head/bias': 0}}, 'head/bias'),
      ({}, {'params/conv_1/kernel': {'params/nothing': 0}}, 'nothing'),
      ({'params/conv_1/kernel': .5, 'params/conv_2/kernel': .5},
       {'params/conv_1/kernel': {'params/conv_1/kernel': -1}},
       'conv_1.*another kernel'),
      ({'params/conv_2/kernel': .5, 'params/head/kernel': .5},
       {'params/head/kernel': {'params/head/bias': 0},
        'params/conv_2/kernel': {'params/head/kernel': 0,
                                 'params/conv_2/kernel': 3}},
       'conv_2.*another kernel'))
  def test_what_does_not_fit_is_named(self, sparsities, followers, named):
    _, variables = start()
    with self.assertRaisesRegex(ValueError, named):
      filters.prune_filters(variables, sparsities, followers)


if __name__ == '__main__':
  absltest.main()
