"""Recurrent networks: nn.RNN, and a cell under nn.scan over time."""

from absl.testing import absltest
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from tests.clients import laws

INPUTS = jax.random.normal(jax.random.key(0), (8, 5, 4))
TARGETS = jnp.tanh(jnp.cumsum(INPUTS, axis=1))
STEPS = 8


class Cells(nn.Module):
  """The four gates of OptimizedLSTMCell are one product."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(4)(nn.RNN(nn.OptimizedLSTMCell(8))(x))


class Scanned(nn.Module):
  """One cell for all times, a product for each gate."""

  @nn.compact
  def __call__(self, x):
    cell = nn.scan(nn.LSTMCell, variable_broadcast='params', in_axes=1,
                   out_axes=1, split_rngs={'params': False})(8)
    carry = cell.initialize_carry(jax.random.key(0), x[:, 0].shape)
    return nn.Dense(4)(cell(carry, x)[1])


class CellsTest(laws.LoopTest):

  title = 'Recurrent: nn.RNN of OptimizedLSTMCell'
  recipe = """
  ```python
  apply = sparse_jax.with_method(model.apply, method, opt_state)
  ```

  Each kernel has its own count. The cell joins its kernels and multiplies once:
  SWAT's activations have there the sparsity of one of them, and packed kernels
  are assembled for the product.
  """

  # The product of four gates goes by the name of one of them.
  reached = ('Dense_0/kernel', 'OptimizedLSTMCell_0/hf/kernel',
             'OptimizedLSTMCell_0/if/kernel')

  def train(self, method):
    return laws.train_linen(Cells(), method, optax.adam(.02), INPUTS, TARGETS,
                            STEPS)


class ScannedTest(laws.LoopTest):

  title = 'Recurrent: a cell under nn.scan over time'
  recipe = """
  ```python
  apply = sparse_jax.with_method(model.apply, method, opt_state)
  ```

  The cell's kernels are no stack: `batch_axes` is for layers, not for time.
  Packed kernels are multiplied by their blocks at each time.
  """

  def train(self, method):
    return laws.train_linen(Scanned(), method, optax.adam(.02), INPUTS,
                            TARGETS, STEPS)


if __name__ == '__main__':
  absltest.main()
