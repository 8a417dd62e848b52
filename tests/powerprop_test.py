"""Powerpropagation around other methods, and N:M by straight-through."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax

W6 = np.array([[.5, -.1, .3, -.8, .2, .05]], np.float32)
G0 = np.array([[.1, -.9, .2, .05, -.6, .4]], np.float32)


def train(method, params, steps, optimizer=optax.sgd(.1, momentum=.9)):
  """Weights read and parameters after each step on a quadratic."""
  target = jnp.asarray(np.random.default_rng(9).normal(
      size=params['w'].shape), jnp.float32)
  params = method.parametrize(params)
  tx = sparse_jax.sparsify(optimizer, method)

  @jax.jit
  def step(params, state):
    def loss(params):
      weights = method.read(params, state)
      return jnp.sum(jnp.square(weights['w'] - target)) / 2

    updates, state = tx.update(jax.grad(loss)(params), state, params)
    params = optax.apply_updates(params, updates)
    return params, state, method.read(params, state)

  state, history = tx.init(params), []
  for _ in range(steps):
    params, state, weights = step(params, state)
    history.append((np.array(params['w']), np.array(weights['w'])))
  return history


def start(seed=0, shape=(6, 8)):
  rng = np.random.default_rng(seed)
  return {'w': jnp.asarray(.3 * rng.normal(size=shape), jnp.float32)}


class PowerpropTest(parameterized.TestCase):

  def test_specified_example(self):
    method = sparse_jax.powerprop(sparse_jax.dnw(0.), 2., least_slope=0.)
    params = {'w': jnp.array(W6)}
    state = method.init(params)
    weights, vjp = jax.vjp(lambda p: method.read(p, state)['w'], params)
    np.testing.assert_allclose(weights, [[.25, -.01, .09, -.64, .04, .0025]],
                               rtol=1e-6)
    np.testing.assert_allclose(vjp(jnp.array(G0))[0]['w'], [
        [.1, -.18, .12, .08, -.24, .04]], rtol=1e-6)

  @parameterized.parameters(1.5, 2., 3.)
  def test_gradient_is_that_of_the_formula_where_it_is_steep(self, alpha):
    method = sparse_jax.powerprop(sparse_jax.dnw(0.), alpha)
    params = {'w': jnp.array(W6)}
    state = method.init(params)
    ours = jax.grad(lambda p: jnp.sum(
        method.read(p, state)['w'] * G0))(params)['w']
    formula = jax.grad(lambda w: jnp.sum(
        w * jnp.abs(w)**(alpha - 1) * G0))(params['w'])
    steep = alpha * np.abs(W6)**(alpha - 1) > .01
    np.testing.assert_allclose(ours[steep], formula[steep], rtol=1e-5)

  @parameterized.parameters(1., 1.5, 2.)
  def test_training_starts_from_the_same_function(self, alpha):
    method = sparse_jax.powerprop(sparse_jax.dnw(0.), alpha)
    theta = method.parametrize(start())
    np.testing.assert_allclose(method.read(theta, method.init(theta))['w'],
                               start()['w'], rtol=1e-5)

  @parameterized.named_parameters(
      ('static', sparse_jax.static(.5)),
      ('rigl', sparse_jax.rigl(.5, update_every=2)),
      ('top_kast', sparse_jax.top_kast(.75, backward_sparsity=.5,
                                       update_every=2)))
  def test_alpha_one_is_the_method_itself(self, method):
    ours = train(sparse_jax.powerprop(method, 1.), start(), 5)
    for (theta, read), (weights, want) in zip(ours, train(method, start(), 5)):
      np.testing.assert_allclose(theta, weights, rtol=1e-6)
      np.testing.assert_array_equal(read != 0, want != 0)

  @parameterized.parameters(1., 1.5, 2., 4.)
  def test_no_nan_at_zero(self, alpha):
    for least in (0., .01):
      method = sparse_jax.powerprop(sparse_jax.dnw(0.), alpha,
                                    least_slope=least)
      params = {'w': jnp.zeros((2, 3))}
      grads = jax.grad(lambda p: jnp.sum(method.read(p, method.init(p))['w']))(
          params)
      self.assertTrue(np.isfinite(grads['w']).all())

  @parameterized.parameters('set_', 'rigl')
  def test_what_grows_at_zero_can_move(self, name):
    """Of all that enters at 0, everything has moved a few steps later."""
    inner = getattr(sparse_jax, name)(.5, update_every=3, drop_fraction=.3)
    history = train(sparse_jax.powerprop(inner), start(), 5)
    entered = (history[2][0] == 0) & (history[4][0] != 0)
    self.assertGreater(entered.sum(), 0)

  def test_growth_ranks_by_the_gradient_of_the_weight(self):
    """RigL grows the same entries as without the power: those of large dL/dw.

    dL/dtheta is 0 for every one of them.
    """
    rng = np.random.default_rng(0)
    inner = sparse_jax.rigl(.5, update_every=1, drop_fraction=.5)
    method = sparse_jax.powerprop(inner)
    target = jnp.asarray(rng.normal(size=(6, 8)), jnp.float32)
    masks = []
    for own in (inner, method):
      params = own.parametrize(start())
      state = own.init(params)
      grads = jax.grad(lambda p: jnp.sum(own.read(p, state)['w'] * target))(
          params)
      masks.append(own.refresh(params, grads, state)[1].forward_masks['w'])
    np.testing.assert_array_equal(*masks)

  def test_only_sparse_leaves_are_reparametrized(self):
    method = sparse_jax.powerprop(sparse_jax.static(
        .5, is_sparse=[('head', False)]))
    params = {'stem': jnp.full((2, 4), 4.), 'head': jnp.full((2, 4), 4.),
              'bias': jnp.full(4, 4.)}
    theta = method.parametrize(params)
    self.assertEqual({k: float(v.ravel()[0]) for k, v in theta.items()},
                     {'stem': 2., 'head': 4., 'bias': 4.})

  def test_wraps_a_packed_method(self):
    block = sparse_jax.Block((2, 2))
    x = jnp.asarray(np.random.default_rng(3).normal(size=(5, 6)), jnp.float32)
    got = []
    for storage in (lambda method: method, sparse_jax.packed):
      method = sparse_jax.powerprop(storage(sparse_jax.top_kast(
          .5, backward_sparsity=.25, structure=block, update_every=2)))
      tx = sparse_jax.sparsify(optax.sgd(.1), method)
      params, state = sparse_jax.start(tx, method, start())

      @jax.jit
      def step(params, state):
        def loss(params):
          product = sparse_jax.with_method(
              lambda params, x: x @ params['w'], method, state)
          return jnp.square(product(params, x) - 1).sum()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

      for _ in range(4):
        params, state = step(params, state)
      got.append(sparse_jax.dense_weights(method, params, state)['w'])
    np.testing.assert_allclose(*got, rtol=1e-4, atol=1e-5)

  def test_wraps_a_method_that_learns(self):
    method = sparse_jax.powerprop(sparse_jax.str_(initial=-3.))
    (before, _), *_, (after, weights) = train(method, start(), 4)
    self.assertTrue(np.any(before != after))
    self.assertEqual(weights.shape, (6, 8))

  @parameterized.parameters(('alpha', .5), ('least_slope', -1.),
                            ('method', None))
  def test_impossible_argument_is_named(self, argument, value):
    keywords = dict(method=sparse_jax.dnw(.5), alpha=2.) | {argument: value}
    with self.assertRaisesRegex(ValueError, f'`{argument}`'):
      sparse_jax.powerprop(**keywords)


class SrSteTest(parameterized.TestCase):

  def test_specified_example(self):
    weights = {'kernel': jnp.array([[.5], [-.1], [.3], [-.8]])}
    method = sparse_jax.sr_ste(decay=2e-4)
    state = method.init(weights)
    np.testing.assert_array_equal(state.forward_masks['kernel'].ravel(),
                                  [1, 0, 0, 1])
    decay = jax.grad(method.penalty)(weights, state)['kernel']
    np.testing.assert_allclose(decay.ravel(), [0, -2e-5, 6e-5, 0], rtol=1e-6)

  def test_ste_is_it_without_decay(self):
    one = train(sparse_jax.ste(), start(shape=(8, 6)), 4)
    two = train(sparse_jax.sr_ste(decay=0.), start(shape=(8, 6)), 4)
    np.testing.assert_array_equal(one, two)

  def test_attention_kernels_compete_along_their_inputs(self):
    params = {'query': {'kernel': jnp.asarray(
        np.random.default_rng(0).normal(size=(8, 2, 3)), jnp.float32)}}
    mask = sparse_jax.ste().init(params).forward_masks['query']['kernel']
    np.testing.assert_array_equal(
        np.asarray(mask).reshape(2, 4, 2, 3).sum(axis=1), 2)

  def test_another_structure_is_an_error(self):
    with self.assertRaisesRegex(ValueError, '`structure`'):
      sparse_jax.sr_ste(structure=sparse_jax.Block((2, 2)))


if __name__ == '__main__':
  absltest.main()
