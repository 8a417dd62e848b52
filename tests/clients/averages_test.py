"""Averages evaluated in place of the parameters: EMA, schedule-free."""

from absl.testing import absltest
from absl.testing import parameterized
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax
from sparse_jax import blocks
from sparse_jax import trees
from tests.clients import laws

INPUTS = jax.random.normal(jax.random.key(0), (16, 8))
TARGETS = jnp.tanh(INPUTS @ jax.random.normal(jax.random.key(1), (8, 4)))
STEPS = 9


class Net(nn.Module):

  @nn.compact
  def __call__(self, x):
    return nn.Dense(4)(nn.relu(nn.Dense(16)(x)))


def train(method, optimizer, follow, steps=STEPS):
  """An ordinary loop that carries what `follow` makes of each step."""
  model = Net()
  tx = laws.prepare(optimizer, method)
  params, opt_state = laws.put(laws.begin(tx, method, model.init(
      jax.random.key(0), INPUTS)['params']))

  def step(params, opt_state, followed):
    def loss_fn(params):
      outputs = laws.door(model.apply, method, opt_state)(
          {'params': params}, INPUTS)
      return laws.squared(outputs, TARGETS)

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return params, opt_state, follow(followed, params, opt_state), loss

  step, followed, losses = jax.jit(step, **laws.options(method)), params, []
  for _ in range(steps):
    params, opt_state, followed, loss = step(params, opt_state, followed)
    losses.append(float(loss))
  return losses, params, opt_state, followed, step._cache_size()


def run_of(losses, params, opt_state, programs, average):
  return laws.Run(losses, params, opt_state, programs, STEPS,
                  lambda through, params: through(Net().apply)(
                      {'params': params}, INPUTS), average)


class EmaTest(laws.LoopTest):

  title = 'EMA: an average evaluated in place of the parameters'
  recipe = """
  ```python
  params = optax.apply_updates(params, updates)
  average = sparse_jax.average_params(average, params, opt_state, step_size=.01)
  # Evaluation:
  sparse_jax.with_method(model.apply, method, opt_state)({'params': average}, x)
  ```

  Masks are those of the parameters. An entry that has just grown starts from
  its parameter, so that no average mixes two weights (or two blocks).
  """

  def follow(self, method):
    if method is None or method.name == 'dense':
      return lambda average, params, _: optax.incremental_update(
          params, average, .25)
    return lambda average, params, opt_state: sparse_jax.average_params(
        average, params, opt_state, step_size=.25)

  def train(self, method):
    losses, params, opt_state, average, programs = train(
        method, optax.adam(.02), self.follow(method))
    run = run_of(losses, params, opt_state, programs, average)
    if method is not None:
      predict = sparse_jax.with_method(Net().apply, method, opt_state)
      first = sparse_jax.start(laws.prepare(optax.adam(.02), method), method,
                               Net().init(jax.random.key(0), INPUTS)['params'])
      final, early = (laws.squared(predict({'params': own}, INPUTS), TARGETS)
                      for own in (average, first[0]))
      self.assertLess(final, early)
    return run

  def test_without_masks_it_is_incremental_update(self):
    method = sparse_jax.dense()
    own = lambda average, params, opt_state: sparse_jax.average_params(
        average, params, opt_state, step_size=.25)
    followed = [train(method, optax.adam(.02), follow)[3]
                for follow in (own, self.follow(method))]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
                 *followed)

  def test_packed_average_is_that_of_the_masked_run(self):
    averages = []
    method = sparse_jax.rigl(.5, update_every=2, structure=laws.BLOCK)
    for own in (method, sparse_jax.packed(method)):
      # After a refresh, whose new blocks have had no step yet.
      _, _, opt_state, average, _ = train(own, optax.adam(.02),
                                          self.follow(own), steps=8)
      averages.append(sparse_jax.dense_weights(own, average, opt_state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
                 *averages)

  def test_an_entry_that_enters_starts_from_its_parameter(self):
    method = sparse_jax.rigl(.5, update_every=2)
    *_, params, opt_state, average, _ = train(
        method, optax.adam(.02), self.follow(method), steps=2)
    state = sparse_jax.get_state(opt_state)
    entered = 0
    for path in state.plan.by_path:
      own, mask, mean = (np.asarray(trees.leaves_by_path(tree)[path])
                         for tree in (params, state.forward_masks, average))
      new = mask & (own == 0)  # RigL grows them at 0.
      entered += new.sum()
      np.testing.assert_array_equal(mean[new], 0)
    self.assertGreater(entered, 0)

  def test_step_sizes_may_be_traced(self):
    method = sparse_jax.static(.5)
    params = {'kernel': jnp.arange(8.).reshape(2, 4)}
    own = lambda size: sparse_jax.average_params(
        params, jax.tree.map(jnp.square, params), state, step_size=size)
    state = method.init(params)
    jax.tree.map(np.testing.assert_allclose, jax.jit(own)(.3), own(.3))

  @parameterized.parameters(-.1, 1.5)
  def test_step_sizes_out_of_range_are_named(self, step_size):
    with self.assertRaisesRegex(ValueError, 'step_size'):
      sparse_jax.average_params({}, {}, None, step_size=step_size)


class ScheduleFreeTest(laws.LoopTest):

  title = 'Schedule-free: its own parameters are evaluated'
  recipe = """
  ```python
  tx = sparse_jax.sparsify(optax.contrib.schedule_free_adamw(rate), method)
  # Evaluation:
  average = optax.contrib.schedule_free_eval_params(opt_state, params)
  sparse_jax.with_method(model.apply, method, opt_state)({'params': average}, x)
  ```

  Of packed RigL it is the average of `blocks.without_growth(params)`: an
  optimizer knows nothing of growth scores.
  """

  def train(self, method):
    optimizer = optax.contrib.schedule_free_adamw(.05)
    losses, params, opt_state, _, programs = train(
        method, optimizer, lambda followed, params, opt_state: followed)
    evaluated = optax.contrib.schedule_free_eval_params(
        opt_state, blocks.without_growth(params))
    return run_of(losses, params, opt_state, programs, evaluated)


if __name__ == '__main__':
  absltest.main()
