"""NNX objects in an `nnx.jit` step: lists, statistics, dropout, nnx.scan."""

from absl.testing import absltest
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax
from tests.clients import laws

INPUTS = jax.random.normal(jax.random.key(0), (16, 8))
TARGETS = jnp.tanh(INPUTS @ jax.random.normal(jax.random.key(1), (8, 4)))
STEPS = 6


class Lists(nnx.Module):
  """Layers in lists, in lists of lists and in a Sequential."""

  def __init__(self, rngs):
    linear = lambda rows, columns: nnx.Linear(rows, columns, rngs=rngs)
    self.towers = nnx.List([nnx.List([linear(8, 16)]),
                            nnx.List([linear(8, 16), linear(16, 16)])])
    self.norm = nnx.BatchNorm(16, rngs=rngs)
    self.dropout = nnx.Dropout(.1, rngs=rngs)
    self.head = nnx.Sequential(linear(16, 8), nnx.relu, linear(8, 4))

  def __call__(self, x):
    total = 0.
    for tower in self.towers:
      y = x
      for layer in tower:
        y = nnx.relu(layer(y))
      total += y
    return self.head(self.dropout(self.norm(total)))

  def features(self, x):
    return self.towers[0][0](x)


class Block(nnx.Module):

  def __init__(self, rngs):
    self.layer = nnx.Linear(16, 16, rngs=rngs)
    self.norm = nnx.BatchNorm(16, rngs=rngs)
    self.dropout = nnx.Dropout(.1, rngs=rngs)

  def __call__(self, x):
    return x + self.dropout(nnx.relu(self.norm(self.layer(x))))


class Stacks(nnx.Module):
  """Two stacks of different depth, made by nnx.vmap and run by nnx.scan."""

  def __init__(self, rngs):
    self.stem = nnx.Linear(8, 16, rngs=rngs)
    self.lower, self.upper = (
        nnx.vmap(Block, in_axes=0, out_axes=0)(rngs.split(depth))
        for depth in (2, 3))
    self.head = nnx.Linear(16, 4, rngs=rngs)

  def __call__(self, x):
    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(block, x):
      return block(x)

    return self.head(run(self.upper, run(self.lower, self.stem(x))))


def train(make, method, steps=STEPS, rate=.02):
  """The losses, the model, its optimizer, and how often a step was traced."""
  model = make(nnx.Rngs(0))
  tx = laws.prepare(optax.adam(rate), method)
  model, optimizer = laws.nnx_begin(model, tx, method)
  traces = []

  @nnx.jit
  def step(model, optimizer):
    traces.append(1)

    def loss_fn(model):
      outputs = laws.nnx_door(model, method, optimizer)(INPUTS)
      return laws.squared(outputs, TARGETS)

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss

  losses = [float(step(model, optimizer)) for _ in range(steps)]
  return losses, model, optimizer, len(traces)


class ListsTest(laws.LoopTest):

  title = 'NNX: lists, BatchNorm, Dropout in nnx.jit'
  recipe = """
  ```python
  tx = sparse_jax.sparsify(optax.adam(rate), method)
  model, optimizer = sparse_jax.nnx_start(model, tx, method)
  # In the loss, and in evaluation after model.eval():
  outputs = sparse_jax.nnx_getter(method, optimizer)(model)(x)
  ```

  Statistics and the state of dropout are the model's own, and its other methods
  (`.features(x)`) are called in the same way.
  """

  def train(self, method):
    losses, model, optimizer, programs = train(Lists, method)
    self.assertEqual(int(model.dropout.rngs.count[...]), STEPS)
    self.assertGreater(float(jnp.abs(model.norm.mean[...]).max()), 0.)
    return laws.nnx_run(losses, model, optimizer, method, INPUTS, programs,
                        STEPS)

  def test_evaluation_leaves_the_model_as_it_is(self):
    method = laws.METHODS['rigl']()
    _, model, optimizer, _ = train(Lists, method)
    model.eval()
    before = np.asarray(model.norm.mean[...])
    computed = sparse_jax.nnx_getter(method, optimizer)(model)
    self.assertEqual(computed(INPUTS).shape, TARGETS.shape)
    self.assertEqual(computed.features(INPUTS).shape, (16, 16))
    self.assertEqual(int(model.dropout.rngs.count[...]), STEPS)
    np.testing.assert_array_equal(model.norm.mean[...], before)

  def test_dropout_draws_anew_where_nothing_is_learnt(self):
    losses, *_ = train(Lists, laws.METHODS['rigl'](), steps=4, rate=0.)
    self.assertLen(set(losses), 4)

  def test_packed_is_masked(self):
    method = sparse_jax.rigl(.5, update_every=2, structure=laws.BLOCK)
    losses = [train(Lists, own, steps=4)[0]
              for own in (method, sparse_jax.packed(method))]
    np.testing.assert_allclose(*losses, rtol=1e-4)


class StacksTest(laws.LoopTest):

  title = 'NNX: two stacks by nnx.vmap, run by nnx.scan'
  recipe = """
  ```python
  method = sparse_jax.rigl(.9, batch_axes={'lower|upper': (0,)})
  ```

  The rest is as above.
  """

  sites = {'batch_axes': {'lower|upper': (0,)}}

  def train(self, method):
    losses, model, optimizer, programs = train(Stacks, method)
    np.testing.assert_array_equal(model.upper.dropout.rngs.count[...], STEPS)
    return laws.nnx_run(losses, model, optimizer, method, INPUTS, programs,
                        STEPS)


if __name__ == '__main__':
  absltest.main()
