"""STR, DST and CS: thresholds and gates among the parameters."""

import math

from absl.testing import absltest
from absl.testing import parameterized
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax

W0 = np.array([[.5, -.1, .3, -.8, 0, 0]], np.float32)
W6 = np.array([[.5, -.1, .3, -.8, .2, .05]], np.float32)
G0 = np.array([[.1, -.9, .2, .05, -.6, .4]], np.float32)


def backward(method, params, cotangent, state=None):
  """What is read, and the gradient of its product with the cotangent."""
  state = state or method.init(params)

  def loss(params):
    weights = method.read(params, state)['w']
    return jnp.sum(weights * cotangent), weights

  grads, weights = jax.jit(jax.grad(loss, has_aux=True))(params)
  return weights, grads


def column(values):
  """Six inputs of one output."""
  return jnp.asarray(values, jnp.float32).reshape(6, 1)


class StrTest(parameterized.TestCase):

  def test_specified_example(self):
    method = sparse_jax.str_(initial=-math.log(3))
    params = method.parametrize({'w': jnp.array(W0)})
    weights, grads = backward(method, params, G0)
    np.testing.assert_allclose(weights, [[.25, 0, .05, -.55, 0, 0]],
                               atol=1e-7)
    np.testing.assert_allclose(grads['w'], [[.1, 0, .2, .05, 0, 0]])
    np.testing.assert_allclose(grads['thresholds']['w'], [[-.046875]],
                               rtol=1e-6)

  def test_weight_decay_raises_the_threshold(self):
    """At -3200 its gradient is 0 in float32, so that only decay moves it."""
    method = sparse_jax.str_()
    params = method.parametrize({'w': jnp.array(W6)})
    optimizer = optax.chain(optax.add_decayed_weights(.1), optax.sgd(.5))
    tx = sparse_jax.sparsify(optimizer, method)
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params),
                                    tx.init(params), params)
    after = optax.apply_updates(params, updates)['thresholds']['w']
    np.testing.assert_allclose(after, [[-3200 * .95]], rtol=1e-6)

  def test_each_stacked_layer_has_a_threshold(self):
    method = sparse_jax.str_(initial=0., batch_axes=(0,))
    params = method.parametrize({'w': jnp.ones((3, 2, 4))})
    self.assertEqual(params['thresholds']['w'].shape, (3, 1, 1))

  def test_masks_follow_the_parameters_returned(self):
    method = sparse_jax.str_(initial=-math.log(3))
    params = method.parametrize({'w': jnp.array(W0)})
    tx = sparse_jax.sparsify(optax.sgd(1.), method)
    updates, state = jax.jit(tx.update)({'w': G0, 'thresholds': {
        'w': -jnp.ones((1, 1))}}, tx.init(params), params)
    params = optax.apply_updates(params, updates)
    threshold = 1 / (1 + math.exp(-float(params['thresholds']['w'][0, 0])))
    np.testing.assert_array_equal(
        sparse_jax.get_state(state).forward_masks['w'],
        np.abs(params['w']) > threshold)

  def test_weights_without_thresholds_are_an_error(self):
    method = sparse_jax.str_()
    with self.assertRaisesRegex(ValueError, 'parametrize'):
      method.init({'w': jnp.ones((2, 3))})

  def test_twice_parametrized_is_an_error(self):
    method = sparse_jax.str_()
    with self.assertRaisesRegex(ValueError, 'thresholds'):
      method.parametrize(method.parametrize({'w': jnp.ones((2, 3))}))

  def test_trains_an_nnx_module(self):
    method = sparse_jax.str_(initial=-2.)
    model = nnx.Linear(6, 3, rngs=nnx.Rngs(0))
    model, optimizer = sparse_jax.nnx_start(model, sparse_jax.sparsify(
        optax.sgd(.01), method), method)
    before = np.array(model.thresholds['kernel'][...])

    @nnx.jit
    def step(model, optimizer):
      def loss(model):
        sparse = sparse_jax.nnx_getter(method, optimizer)(model)
        return jnp.square(sparse(jnp.ones((4, 6)))).sum()

      value, grads = nnx.value_and_grad(loss)(model)
      optimizer.update(model, grads)
      return value

    first, second = step(model, optimizer), step(model, optimizer)
    self.assertLess(second, first)
    self.assertTrue(np.all(before != model.thresholds['kernel'][...]))
    masks = sparse_jax.get_state(optimizer).forward_masks
    self.assertEqual(jax.tree.leaves(masks)[0].shape, (6, 3))


class DstTest(parameterized.TestCase):

  def test_specified_example(self):
    method = sparse_jax.dst(penalty_weight=1.)
    params = method.parametrize({'w': column(W6)})
    params['thresholds']['w'] += .25
    weights, grads = backward(method, params, column(G0))
    np.testing.assert_allclose(weights, column([.5, 0, .3, -.8, 0, 0]))
    np.testing.assert_allclose(grads['w'], column(
        [.15, -.126, .308, .066, -.216, .024]), rtol=1e-5)
    np.testing.assert_allclose(grads['thresholds']['w'], [[-.076]], rtol=1e-5)
    decay = jax.jit(jax.grad(method.penalty))(params, method.init(params))
    np.testing.assert_allclose(decay['thresholds']['w'], [[-math.exp(-.25)]],
                               rtol=1e-6)

  def test_one_threshold_for_each_output(self):
    params = sparse_jax.dst().parametrize({
        'conv': {'kernel': jnp.ones((3, 3, 4, 5))},
        'dense': {'kernel': jnp.ones((4, 6))}})
    shapes = jax.tree.map(jnp.shape, params['thresholds'])
    self.assertEqual(shapes, {'conv': {'kernel': (1, 1, 1, 5)},
                              'dense': {'kernel': (1, 6)}})

  @parameterized.parameters((2, 0.), (3, .4))
  def test_a_layer_that_keeps_too_little_starts_over(self, kept, threshold):
    """Of 300 weights 3 are one in a hundred."""
    method = sparse_jax.dst(penalty_weight=0., least_kept=2 / 300)
    weights = np.full((300, 1), .1, np.float32)
    weights[:kept] = 1
    params = method.parametrize({'w': jnp.array(weights)})
    params['thresholds']['w'] += .4
    tx = sparse_jax.sparsify(optax.sgd(0.), method)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    after = optax.apply_updates(params, updates)['thresholds']['w']
    np.testing.assert_allclose(after, [[threshold]])


class CsTest(parameterized.TestCase):

  S = [.02, -.02, .005, -.01, 0, .1]

  def test_specified_factors(self):
    """Shortly before the end of the round the temperature is 200."""
    method = sparse_jax.cs(round_steps=10**7)
    params = method.parametrize({'w': jnp.ones((1, 6))})
    params['gates']['w'] = jnp.array([self.S])
    state = method.init(params)._replace(step=jnp.int32(10**7 - 1))
    np.testing.assert_allclose(
        method.read(params, state)['w'],
        [[1.964, .036, 1.462, .238, 1, 2]], atol=1e-3)

  def test_specified_ticket(self):
    method = sparse_jax.cs(round_steps=10)
    params = method.parametrize({'w': jnp.ones((1, 6))})
    params['gates']['w'] = jnp.array([self.S])
    state = method.init(params)._replace(step=jnp.int32(10))
    np.testing.assert_array_equal(method.read(params, state)['w'],
                                  [[2, 0, 2, 0, 0, 2]])

  def test_a_round_ends_in_lower_gates_and_rewound_weights(self):
    method = sparse_jax.cs(round_steps=4, rounds=2, rewind_to=1)
    params = method.parametrize({'w': jnp.ones((1, 6)), 'bias': jnp.ones(6)})
    params['gates']['w'] = jnp.array([self.S])
    tx = sparse_jax.sparsify(optax.sgd(.1, momentum=.9), method,
                             penalty=False)
    grads = {'w': jnp.ones((1, 6)), 'bias': jnp.ones(6),
             'gates': {'w': jnp.zeros((1, 6))}}
    state, history = tx.init(params), []
    update = jax.jit(tx.update)
    for _ in range(5):
      updates, state = update(grads, state, params)
      params = optax.apply_updates(params, updates)
      history.append(params)
    np.testing.assert_allclose(history[3]['gates']['w'],
                               [[0, -4, 0, -2, 0, 0]], atol=1e-6)
    for name in ('w', 'bias'):
      np.testing.assert_allclose(history[3][name], history[0][name])
      # The first step after it has no momentum yet.
      np.testing.assert_allclose(history[4][name], history[3][name] - .1,
                                 rtol=1e-6)

  def test_soft_gates_read_everything_and_hard_ones_the_mask(self):
    method = sparse_jax.cs(round_steps=2)
    params = method.parametrize({'w': jnp.ones((1, 6))})
    params['gates']['w'] = jnp.array([self.S])
    tx = sparse_jax.sparsify(optax.sgd(0.), method)
    state, densities = tx.init(params), []
    update = jax.jit(tx.update)
    for _ in range(2):
      _, state = update(params, state, params)
      densities.append(int(state.sparse.forward_masks['w'].sum()))
    self.assertEqual(densities, [6, 3])

  @parameterized.parameters(
      ('temperature', 0.), ('rounds', 0), ('round_steps', 0),
      ('penalty_weight', -1.), ('rewind_to', 5), ('initial', math.nan))
  def test_impossible_argument_is_named(self, argument, value):
    with self.assertRaisesRegex(ValueError, f'`{argument}`'):
      sparse_jax.cs(**{argument: value})


if __name__ == '__main__':
  absltest.main()
