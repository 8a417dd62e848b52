"""Tests of packed arrays, masks of bits, and the memory that they save."""

import os
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from sparse_jax.cost import memory
from sparse_jax.operators import operands
from sparse_jax.operators import sparse_products as operators
from sparse_jax.operators import residuals

# As users' programs are compiled, whatever conftest does to be quick.
USUAL = {'xla_backend_optimization_level': 3,
         'xla_llvm_disable_expensive_passes': False}
if 'xla_cpu_use_fusion_emitters' in os.environ.get('XLA_FLAGS', ''):
  USUAL['xla_cpu_use_fusion_emitters'] = True


def problem(shape, density, seed=0):
  rng = np.random.default_rng(seed)
  return (rng.normal(size=shape).astype(np.float32),
          rng.uniform(size=shape) < density)


def first_of_each_part(mask, count, parts):
  """The first `count` marked entries of each part, in row-major order."""
  split = mask.reshape(parts, -1)
  return (split & (np.cumsum(split, 1) <= count)).reshape(mask.shape)


class PackTest(parameterized.TestCase):

  def round_trip(self, x, mask, count, parts):
    @jax.jit
    def run(x, mask):
      packed = residuals.pack(x, mask, count, parts=parts)
      return packed, residuals.unpack(packed, x)

    return run(x, mask)

  @parameterized.named_parameters(
      ('positions', (3, 200), .01, 12, 1, 'int32'),
      ('bits', (3, 200), .3, 200, 1, 'uint32'),
      ('whole', (3, 200), .5, 599, 1, None),
      ('bits_in_parts', (4, 5, 37), .2, 60, 4, 'uint32'),
      ('positions_in_parts', (6, 128), .01, 5, 3, 'int32'),
      ('none', (128,), 0., 3, 1, 'int32'),
      ('all_in_order', (128,), 1., 100, 1, 'uint32'))
  def test_unpacking_gives_the_marked_entries_back(self, shape, density, count,
                                                   parts, places):
    x, mask = problem(shape, density)
    packed, whole = self.round_trip(jnp.asarray(x), jnp.asarray(mask), count,
                                    parts)
    kept = first_of_each_part(mask, count, parts)
    if places is None:
      self.assertIsNone(packed.places)
    else:
      self.assertEqual(packed.places.dtype, places)
      self.assertEqual(packed.values.shape, (parts, count))
    np.testing.assert_array_equal(whole, np.where(kept, x, 0))

  def test_what_there_is_no_room_for_is_lost_from_the_end(self):
    x, mask = problem((10, 64), .5)
    _, got = self.round_trip(jnp.asarray(x), jnp.asarray(mask), 100, 1)
    kept = first_of_each_part(mask, 100, 1)
    self.assertGreater(mask.sum(), 100)
    np.testing.assert_array_equal(got, np.where(kept, x, 0))

  @parameterized.parameters(jnp.float32, jnp.bfloat16)
  def test_bytes_are_the_fewest_of_the_three_forms(self, dtype):
    item = jnp.dtype(dtype).itemsize
    x = jax.ShapeDtypeStruct((1600,), dtype)
    mask = jax.ShapeDtypeStruct((1600,), bool)
    for count in (1, 40, 60, 400, 1500, 1600):
      packed = jax.eval_shape(
          lambda x, mask: residuals.pack(x, mask, count), x, mask)
      got = sum(leaf.size * leaf.dtype.itemsize
                for leaf in jax.tree.leaves(packed))
      self.assertEqual(got, min(1600 * item, count * item + 200,
                                count * (item + 4)))

  def test_nan_and_infinity_are_kept(self):
    x = jnp.full(96, 3.).at[jnp.array([5, 70])].set(
        jnp.array([jnp.nan, -jnp.inf]))
    mask = jnp.zeros(96, bool).at[jnp.array([5, 33, 70])].set(True)
    _, got = self.round_trip(x, mask, 3, 1)
    np.testing.assert_array_equal(got, jnp.where(mask, x, 0))


class GateTest(parameterized.TestCase):

  @parameterized.parameters((), (1,), (7,), (3, 16), (2, 3, 9))
  def test_bits_give_the_mask_back(self, *shape):
    _, mask = problem(shape, .5)
    bits = residuals.mask_bits(jnp.asarray(mask))
    self.assertEqual(bits.dtype, jnp.uint8)
    self.assertEqual(bits.size, int(np.prod(shape[:-1]))
                     * -(-(shape[-1] if shape else 1) // 8))
    np.testing.assert_array_equal(residuals.bits_mask(bits, shape), mask)

  @parameterized.parameters(jnp.float32, jnp.bfloat16)
  def test_relu_is_that_of_jax(self, dtype):
    x = jnp.array([-jnp.inf, -1., -0., 0., 1e-30, 2., jnp.inf], dtype)
    dy = jnp.arange(1., 8., dtype=dtype)
    for a, b in zip(jax.vjp(residuals.relu, x), jax.vjp(jax.nn.relu, x)):
      a, b = (a, b) if hasattr(a, 'dtype') else (a(dy)[0], b(dy)[0])
      self.assertEqual(a.dtype, dtype)
      np.testing.assert_array_equal(np.asarray(a, np.float32),
                                    np.asarray(b, np.float32))

  def test_relu_lets_nan_through(self):
    self.assertTrue(jnp.isnan(residuals.relu(jnp.array(jnp.nan))))

  def test_the_backward_pass_of_relu_keeps_one_bit_an_entry(self):
    x = jnp.ones((4, 64))
    _, pull = jax.vjp(residuals.relu, x)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(pull))
    self.assertEqual(kept, 4 * 64 // 8)


class MemoryTest(absltest.TestCase):
  """XLA's own account, of the gradient of a network of twelve layers."""

  def temporary_bytes(self, dot, relu, scanned=False):
    def layer(x, w):
      return relu(dot(x, w, (((1,), (0,)), ((), ())))), None

    def unrolled(layer, x, weights):
      for w in weights:
        x, _ = layer(x, w)
      return x, None

    def loss(weights, x):
      apply = lax.scan if scanned else unrolled
      return jnp.sum(jnp.square(apply(layer, x, weights)[0]))

    weights = jax.ShapeDtypeStruct((12, 128, 128), jnp.float32)
    x = jax.ShapeDtypeStruct((512, 128), jnp.float32)
    # On several CPU devices XLA counts with two temporaries more, and the
    # passes are not ordered.
    with mock.patch.object(jax, 'device_count', lambda: 1):
      compiled = jax.jit(jax.grad(loss)).lower(weights, x).compile(USUAL)
    return compiled.memory_analysis().temp_size_in_bytes

  def ratio(self, scanned):
    sparse = operators.sparse_dot_general(
        operands.Operands(backward_activation=.9))
    dense = self.temporary_bytes(lax.dot_general, jax.nn.relu, scanned)
    return self.temporary_bytes(sparse, residuals.relu, scanned) / dense

  def test_a_scanned_network_at_ninety_percent_needs_three_fifths(self):
    self.assertLessEqual(self.ratio(scanned=True), .6)

  def test_an_unrolled_network_at_ninety_percent_needs_two_fifths(self):
    """Though nothing but `ordering` tells XLA when to pack and unpack."""
    self.assertLessEqual(self.ratio(scanned=False), .4)
    with mock.patch.object(operators.ordering, 'after', lambda x, first: x):
      self.assertGreater(self.ratio(scanned=False), .8)

  def test_a_network_with_batch_norm_saves_what_the_account_predicts(self):
    def costs(conv):
      class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
          for _ in range(6):
            x = nn.Conv(8, (3, 3), conv_general_dilated=conv)(x)
            x = nn.BatchNorm(use_running_average=False)(x)
            x = residuals.relu(x)  # Else one byte an entry is asked for.
          return x

      def loss(params, x):
        y, _ = Net().apply({'params': params}, x, mutable=['batch_stats'])
        return jnp.sum(jnp.square(y))

      x = jax.ShapeDtypeStruct((32, 16, 16, 8), jnp.float32)
      params = jax.eval_shape(Net().init, jax.random.key(0), x)['params']
      with mock.patch.object(jax, 'device_count', lambda: 1):
        compiled = jax.jit(jax.grad(loss)).lower(params, x).compile(USUAL)
        asked = memory.memory_cost(loss, params, x).saved_activations
      return np.array([asked, compiled.memory_analysis().temp_size_in_bytes])

    sparse = operators.sparse_conv_general_dilated(
        operands.Operands(backward_activation=.9))
    asked, allotted = costs(lax.conv_general_dilated) - costs(sparse)
    # No less; and more, since the top-k of an activation keeps no arrays.
    self.assertBetween(allotted / asked, .9, 1.3)

  def test_saved_bytes_of_a_product_are_those_of_the_packed_activation(self):
    """At 90% of 64 x 128: values and bits, and the weight, whole."""
    x, w = jnp.ones((64, 128)), jnp.ones((128, 8))
    for sparsity, bytes_ in ((.9, 4 * 819 + 64 * 128 // 8),
                             (0., 4 * 64 * 128)):
      dot = operators.sparse_dot_general(
          operands.Operands(backward_activation=sparsity))
      pull = jax.eval_shape(lambda x, w: jax.vjp(
          lambda x, w: dot(x, w, (((1,), (0,)), ((), ()))), x, w)[1], x, w)
      saved = sum(leaf.size * leaf.dtype.itemsize
                  for leaf in jax.tree.leaves(pull))
      self.assertEqual(saved - w.nbytes, bytes_ + 1)  # `due` is one byte.


if __name__ == '__main__':
  absltest.main()
