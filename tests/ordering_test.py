"""Tests of one array that waits for another."""

import contextlib

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.operators import ordering
from sparse_jax.jaxprs import products

VALUES = {'f': [-0., 0., 1., np.nan, np.inf, -np.inf, 1e-40],
          'i': [-(2 ** 31), -1, 0, 2 ** 31 - 1], 'u': [0, 1, 2 ** 32 - 1]}


def on(devices):
  """A context: none, or a mesh over which XLA may split."""
  if devices == 1:
    return contextlib.nullcontext()
  return jax.set_mesh(jax.make_mesh(
      (devices,), ('x',), axis_types=(jax.sharding.AxisType.Auto,)))


class AfterTest(parameterized.TestCase):

  @parameterized.product(dtype=(jnp.float32, jnp.bfloat16, jnp.int32,
                                jnp.uint32),
                         first=(0., jnp.nan, jnp.inf, -jnp.inf))
  def test_every_bit_stays(self, dtype, first):
    kind = 'f' if dtype == jnp.bfloat16 else np.dtype(dtype).kind
    x = jnp.array(VALUES[kind], dtype)
    with on(1):
      got = jax.jit(lambda x, first: ordering.after(x, first))(
          x, jnp.full((2, 3), first))
    self.assertEqual(np.asarray(got).tobytes(), np.asarray(x).tobytes())

  @parameterized.parameters((), (0,), (3, 0), (2, 3, 4))
  def test_any_shape_to_wait_for(self, *shape):
    with on(1):
      got = ordering.after(jnp.arange(3), jnp.ones(shape))
    np.testing.assert_array_equal(got, jnp.arange(3))

  def test_one_cpu_device_computes_what_is_waited_for(self):
    """In the compiled program, where no barrier is left."""
    def fn(x, y):
      return ordering.after(x, jnp.sin(y)) + 1

    shapes = jax.ShapeDtypeStruct((8,), jnp.float32), jax.ShapeDtypeStruct(
        (4,), jnp.float32)
    with on(1):
      compiled = jax.jit(fn).lower(*shapes).compile().as_text()
    self.assertIn('sine', compiled)
    self.assertNotIn('opt-barrier', compiled)

  def test_other_platforms_select_nothing(self):
    lowered = jax.jit(lambda x, y: ordering.after(x, y)).trace(
        jnp.ones(3), jnp.ones(4)).lower(lowering_platforms=('tpu',))
    self.assertNotIn('compare', lowered.as_text())

  def test_several_devices_have_the_barrier_alone(self):
    with on(8):
      jaxpr = jax.make_jaxpr(lambda x, y: ordering.after(x, y))(
          jnp.ones(3), jnp.ones(4))
    self.assertIn('optimization_barrier', str(jaxpr))
    self.assertNotIn('select', str(jaxpr))

  @parameterized.parameters(1, 8)
  def test_waiting_for_each_of_many_examples_maps_nothing(self, devices):
    """A weight stays one weight, so that its products stay one product."""
    def fn(w, x):
      return x @ ordering.after(w, x)

    w, x = jnp.ones((3, 2)), jnp.ones((5, 4, 3))
    with on(devices):
      found, = products.find_products(jax.vmap(fn, (None, 0)), w, x)
      got = jax.vmap(fn, (None, 0))(w, x)
    self.assertEqual(found.rhs.shape, (3, 2))
    np.testing.assert_array_equal(got, x @ w)

  @parameterized.parameters(1, 8)
  def test_a_weight_that_waits_is_a_view_of_its_parameter(self, devices):
    with on(devices):
      found, = products.find_products(
          lambda params, x: x @ ordering.after(params['w'], x),
          {'w': jnp.ones((3, 2))}, jnp.ones((4, 3)))
    self.assertEqual(found.path, 'w')

  @parameterized.parameters(1, 8)
  def test_gradients_pass(self, devices):
    with on(devices):
      def cube(x):
        return jnp.sum(ordering.after(x, x) ** 3)

      np.testing.assert_array_equal(jax.grad(cube)(jnp.arange(3.)),
                                    [0., 3., 12.])
      np.testing.assert_array_equal(jax.jacrev(jax.grad(cube))(jnp.arange(3.)),
                                    np.diag([0., 6., 12.]))


if __name__ == '__main__':
  absltest.main()
