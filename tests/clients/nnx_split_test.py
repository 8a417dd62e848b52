"""NNX by `nnx.split` and `nnx.merge`, in a step of plain `jax.jit`."""

from absl.testing import absltest
from flax import nnx
import jax
import jax.numpy as jnp
import optax

from tests.clients import laws

INPUTS = jax.random.normal(jax.random.key(0), (16, 8))
TARGETS = jnp.tanh(INPUTS @ jax.random.normal(jax.random.key(1), (8, 4)))
STEPS = 6


class Net(nnx.Module):

  def __init__(self, rngs):
    self.stem = nnx.Linear(8, 16, rngs=rngs)
    self.norm = nnx.BatchNorm(16, rngs=rngs)
    self.dropout = nnx.Dropout(.1, rngs=rngs)
    self.head = nnx.Linear(16, 4, rngs=rngs)

  def __call__(self, x):
    return self.head(self.dropout(self.norm(nnx.relu(self.stem(x)))))


class ObjectsTest(laws.LoopTest):
  """The model and its optimizer are split together."""

  title = 'NNX: model and optimizer by nnx.split in jax.jit'
  recipe = """
  ```python
  model, optimizer = sparse_jax.nnx_start(model, tx, method)
  graph, state = nnx.split((model, optimizer))

  @jax.jit
  def step(state):
    model, optimizer = nnx.merge(graph, state)
    def loss_fn(model):
      return loss_of(sparse_jax.nnx_getter(method, optimizer)(model)(x))
    optimizer.update(model, nnx.grad(loss_fn)(model))
    return nnx.state((model, optimizer))
  ```
  """

  def train(self, method):
    model = Net(nnx.Rngs(0))
    tx = laws.prepare(optax.adam(.02), method)
    model, optimizer = laws.nnx_begin(model, tx, method)
    graph, state = nnx.split((model, optimizer))

    def step(state):
      model, optimizer = nnx.merge(graph, state)

      def loss_fn(model):
        outputs = laws.nnx_door(model, method, optimizer)(INPUTS)
        return laws.squared(outputs, TARGETS)

      loss, grads = nnx.value_and_grad(loss_fn)(model)
      optimizer.update(model, grads)
      return nnx.state((model, optimizer)), loss

    step = jax.jit(step, donate_argnums=0, **laws.options(method))
    state, losses = laws.put(state), []
    for _ in range(STEPS):
      state, loss = step(state)
      losses.append(float(loss))
    model, optimizer = nnx.merge(graph, state)
    return laws.nnx_run(losses, model, optimizer, method, INPUTS,
                        step._cache_size(), STEPS)


class ArraysTest(laws.LoopTest):
  """The parameters alone are split off, for Optax without nnx.Optimizer."""

  title = 'NNX: nnx.split of the parameters, plain Optax'
  recipe = """
  ```python
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  params, opt_state = sparse_jax.start(tx, method, params)

  def apply(params, rest, x):
    model = nnx.merge(graph, params, rest, copy=True)
    return model(x), nnx.state(model, nnx.Not(nnx.Param))

  outputs, rest = sparse_jax.with_method(apply, method, opt_state)(
      params, rest, x)
  ```
  """

  def train(self, method):
    graph, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
    tx = laws.prepare(optax.adam(.02), method)
    params, opt_state = laws.begin(tx, method, params)

    def apply(params, rest, inputs):
      model = nnx.merge(graph, params, rest, copy=True)
      outputs = model(inputs)
      return outputs, nnx.state(model, nnx.Not(nnx.Param))

    def step(params, rest, opt_state):
      def loss_fn(params):
        outputs, after = laws.door(apply, method, opt_state)(
            params, rest, INPUTS)
        return laws.squared(outputs, TARGETS), after

      (loss, rest_), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
      updates, opt_state = tx.update(grads, opt_state, params)
      return optax.apply_updates(params, updates), rest_, opt_state, loss

    step = jax.jit(step, **laws.options(method))
    params, rest, opt_state = laws.put((params, rest, opt_state))
    losses = []
    for _ in range(STEPS):
      params, rest, opt_state, loss = step(params, rest, opt_state)
      losses.append(float(loss))
    self.assertGreater(jnp.abs(rest['norm']['mean'][...]).max(), 0)

    def evaluate(through, params):
      def predict(params, rest, inputs):
        model = nnx.merge(graph, params, rest, copy=True)
        model.eval()
        return model(inputs)

      return through(predict)(params, rest, INPUTS)

    return laws.Run(losses, params, opt_state, step._cache_size(), STEPS,
                    evaluate)


if __name__ == '__main__':
  absltest.main()
