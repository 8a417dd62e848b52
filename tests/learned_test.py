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
    with self.assertRaisesRegex(ValueError, r'start\(tx, method'):
      method.init({'w': jnp.ones((2, 3))})

  def test_twice_parametrized_is_an_error(self):
    method = sparse_jax.str_()
    with self.assertRaisesRegex(ValueError, 'thresholds'):
      method.parametrize(method.parametrize({'w': jnp.ones((2, 3))}))

  @parameterized.parameters((sparse_jax.str_(initial=-2.),),
                            (sparse_jax.dst(),), (sparse_jax.cs(),))
  def test_lists_and_tuples_are_as_good_as_mappings(self, method):
    weight = jnp.asarray(W6.reshape(3, 2))
    mapping = {'a': {'0': {'w': weight}, '1': {'w': weight}}, 'b': weight}
    lists = {'a': [{'w': weight, 'bias': jnp.ones(2)}, {'w': weight}],
             'b': weight}
    reads = []
    for model in (mapping, lists):
      params = method.parametrize(model)
      reads.append(method.read(params, method.init(params)))
    self.assertLen(jax.tree.leaves(params), 7)
    self.assertEqual(jax.tree.structure(reads[1]), jax.tree.structure(lists))
    for key in '01':
      np.testing.assert_array_equal(reads[1]['a'][int(key)]['w'],
                                    reads[0]['a'][key]['w'])

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


def _official_cs(x, y, weights, initial, rate, rounds, steps, coefficient,
                 rewind_to, rewind):
  """Weights and gates after each step of SGD with Nesterov momentum."""
  def sigmoid(v):
    return .5 * (1 + np.tanh(v / 2))

  def nesterov(value, grad, slot):
    slot = .9 * slot + grad
    return value - rate * (grad + .9 * slot), slot

  gates = np.full(weights.shape, initial)
  speed, gate_speed = np.zeros_like(weights), np.zeros_like(weights)
  scale, saved, history = 1 / sigmoid(initial), None, []
  for period in range(rounds + 1):
    ticket = period == rounds
    if ticket and rewind:
      weights, speed = saved.copy(), np.zeros_like(weights)
    for i in range(steps):
      if period == 0 and i == rewind_to:
        saved = weights.copy()
      heat = 200**(i / (steps - 1))
      soft = sigmoid(heat * gates)
      mask = scale * ((gates > 0) if ticket else soft)
      outer = 2 * x.T @ (x @ (weights * mask) - y) / y.size
      if not ticket:
        slope = scale * heat * soft * (1 - soft)
        gates, gate_speed = nesterov(
            gates, (outer * weights + coefficient) * slope, gate_speed)
      weights, speed = nesterov(weights, outer * mask, speed)
      history.append((weights, gates))
    if period < rounds - 1:
      gates = np.minimum(gates, initial)
      history[-1] = weights, gates
  if rewind:  # Ours goes back with the last update of the last round.
    last = rounds * steps - 1
    history[last] = saved, history[last][1]
  return history


class CsTest(parameterized.TestCase):

  S = [.02, -.02, .005, -.01, 0, .1]

  def test_specified_factors(self):
    """Shortly before the end of the round the temperature is 200."""
    method = sparse_jax.cs(round_steps=10**7, initial=0.)
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

  def test_a_round_ends_in_lower_gates_and_the_last_in_rewound_weights(self):
    method = sparse_jax.cs(round_steps=4, rounds=2, rewind_to=1)
    params = method.parametrize({'w': jnp.ones((1, 6)), 'bias': jnp.ones(6)})
    params['gates']['w'] = jnp.array([self.S])
    tx = sparse_jax.sparsify(optax.sgd(.1, momentum=.9), method,
                             penalty=False)
    grads = {'w': jnp.ones((1, 6)), 'bias': jnp.ones(6),
             'gates': {'w': jnp.zeros((1, 6))}}
    state, history = tx.init(params), []
    update = jax.jit(tx.update)
    for step in range(10):
      if step == 8:  # What moves gates of a ticket is no gradient.
        grads['gates']['w'] += 1.
      updates, state = update(grads, state, params)
      params = optax.apply_updates(params, updates)
      history.append(params)
    np.testing.assert_allclose(history[3]['gates']['w'],
                               [[0, -.02, 0, -.01, 0, 0]], atol=1e-7)
    np.testing.assert_array_equal(history[9]['gates']['w'],
                                  history[7]['gates']['w'])
    for name in ('w', 'bias'):
      # Between rounds momentum goes on.
      self.assertTrue(np.all(history[4][name] < history[3][name] - .3))
      np.testing.assert_allclose(history[7][name], history[0][name],
                                 rtol=1e-6)
      # The first step after it has no momentum yet.
      np.testing.assert_allclose(history[8][name], history[7][name] - .1,
                                 rtol=1e-6)

  @parameterized.product(rounds=(1, 2), rewind=(True, False),
                         initial=(0., -.3))
  def test_trains_as_the_official_code_does(self, rounds, rewind, initial):
    """A regression by hand: rounds, tickets, momentum, penalty."""
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(16, 5)), rng.normal(size=(16, 2))
    first, rate, steps = rng.normal(size=(5, 2)), .3, 5
    method = sparse_jax.cs(
        initial=initial, rounds=rounds, round_steps=steps, penalty_weight=.05,
        rewind=rewind, rewind_to=2 if rewind else None)
    params = method.parametrize({'w': jnp.asarray(first, jnp.float32)})
    tx = sparse_jax.sparsify(optax.sgd(rate, momentum=.9, nesterov=True),
                             method)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
      def loss(params):
        weights = method.read(params, state)['w']
        return jnp.mean((x.astype(np.float32) @ weights - y)**2)

      updates, state_ = tx.update(jax.grad(loss)(params), state, params)
      return optax.apply_updates(params, updates), state_

    want = _official_cs(x, y, first, initial, rate, rounds, steps, .05, 2,
                        rewind)
    for weights, gates in want:
      params, state = step(params, state)
      np.testing.assert_allclose(params['w'], weights, atol=2e-5)
      np.testing.assert_allclose(params['gates']['w'], gates, atol=2e-5)

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
      ('penalty_weight', -1.), ('rewind_to', 10_000), ('rewind', 1),
      ('initial', math.nan))
  def test_impossible_argument_is_named(self, argument, value):
    with self.assertRaisesRegex(ValueError, f'`{argument}`'):
      sparse_jax.cs(**{argument: value})


if __name__ == '__main__':
  absltest.main()
