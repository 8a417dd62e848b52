"""Flax's TrainState: batch statistics, dropout, accumulated gradients."""

import functools

from absl.testing import absltest
import flax.linen as nn
from flax.training import train_state
import jax
import jax.numpy as jnp
import optax

from tests.clients import laws

INPUTS = jax.random.normal(jax.random.key(0), (16, 8))
TARGETS = jnp.tanh(INPUTS @ jax.random.normal(jax.random.key(1), (8, 4)))


class Net(nn.Module):

  @nn.compact
  def __call__(self, x, train: bool):
    x = nn.relu(nn.Dense(16)(x))
    x = nn.BatchNorm(use_running_average=not train)(x)
    x = nn.Dropout(.1, deterministic=not train)(x)
    return nn.Dense(4)(x)


class TrainState(train_state.TrainState):
  batch_stats: dict


class TrainStateTest(laws.LoopTest):

  traced = 2  # Once to know its shape, by MultiSteps' condition.
  title = 'Flax TrainState: BatchNorm, dropout, MultiSteps'
  recipe = """
  `MultiSteps` goes outside of `sparsify`, clipping inside; collections that are
  no parameters pass through `with_method` as they are. `TrainState.create`
  calls `tx.init` itself, so it cannot stand here where `start` changes the
  parameters: packed methods, `powerprop`, and `str_`, `dst`, `cs`.

  ```python
  tx = optax.MultiSteps(sparse_jax.sparsify(
      optax.chain(optax.clip_by_global_norm(1.), optax.adam(rate)), method), 2)
  params, opt_state = sparse_jax.start(tx, method, variables['params'])
  state = TrainState(0, model.apply, params, tx, opt_state,
                     variables['batch_stats'])
  # In the loss, and in evaluation:
  apply = sparse_jax.with_method(state.apply_fn, method, state.opt_state)
  apply({'params': params, 'batch_stats': state.batch_stats}, x, True,
        mutable=['batch_stats'], rngs={'dropout': key})
  ```
  """

  def train(self, method, steps=8):
    model = Net()
    variables = model.init(jax.random.key(0), INPUTS, False)
    tx = optax.MultiSteps(laws.prepare(optax.chain(
        optax.clip_by_global_norm(1.), optax.adam(.02)), method), 2)
    params, opt_state = laws.begin(tx, method, variables['params'])
    state = laws.put(TrainState(jnp.int32(0), model.apply, params, tx,
                                opt_state, variables['batch_stats']))

    @functools.partial(jax.jit, donate_argnums=0, **laws.options(method))
    def step(state, key):
      apply = laws.door(state.apply_fn, method, state.opt_state)

      def loss_fn(params):
        outputs, changes = apply(
            {'params': params, 'batch_stats': state.batch_stats}, INPUTS, True,
            mutable=['batch_stats'], rngs={'dropout': key})
        return laws.squared(outputs, TARGETS), changes

      (loss, changes), grads = jax.value_and_grad(loss_fn, has_aux=True)(
          state.params)
      return state.apply_gradients(
          grads=grads, batch_stats=changes['batch_stats']), loss

    losses = []
    for index in range(steps):
      state, loss = step(state, laws.put(jax.random.key(index)))
      losses.append(float(loss))
    self.assertGreater(jnp.abs(state.batch_stats['BatchNorm_0']['mean']).max(),
                       0)

    def evaluate(through, params):
      return through(state.apply_fn)(
          {'params': params, 'batch_stats': state.batch_stats}, INPUTS, False)

    return laws.Run(losses, state.params, state.opt_state, step._cache_size(),
                    steps // 2, evaluate)


if __name__ == '__main__':
  absltest.main()
