"""Tests of a weight read through one mask and differentiated by another."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from sparse_jax import backward


def problem(dtype=jnp.float32, lead=()):
  """A weight, masks A inside B, inputs and a cotangent."""
  keys = jax.random.split(jax.random.key(0), 5)
  weight = jax.random.normal(keys[0], (*lead, 6, 4)).astype(dtype)
  outer = jax.random.bernoulli(keys[1], .7, weight.shape)
  inner = outer & jax.random.bernoulli(keys[2], .5, weight.shape)
  x = jax.random.normal(keys[3], (*lead, 3, 6)).astype(dtype)
  dy = jax.random.normal(keys[4], (*lead, 3, 4)).astype(dtype)
  return weight, inner, outer, x, dy


def layer(weight, x):
  return jnp.tanh(x @ weight)


def sparse_layer(weight, inner, outer, x):
  return layer(backward.masked_weight(weight, inner, outer), x)


@jax.jit
def vjp(weight, inner, outer, x, dy):
  y, pull = jax.vjp(lambda w, x: sparse_layer(w, inner, outer, x), weight, x)
  return y, *pull(dy)


@jax.jit
def dense_vjp(weight, x, dy):
  y, pull = jax.vjp(layer, weight, x)
  return y, *pull(dy)


def expected(weight, inner, outer, x, dy):
  """TK-a: all of it at alpha = theta on A; dW besides is masked to B."""
  y, dw, dx = dense_vjp(jnp.where(inner, weight, 0), x, dy)
  return y, jnp.where(outer, dw, 0), dx


class MaskedWeightTest(parameterized.TestCase):

  @parameterized.parameters(jnp.float32, jnp.bfloat16, jnp.float16)
  def test_gradients_are_those_of_the_layer_at_alpha(self, dtype):
    args = problem(dtype)
    got, want = vjp(*args), expected(*args)
    for a, b in zip(got, want):
      self.assertEqual(a.dtype, dtype)
      # The two are compiled apart: fusions may round the last bit otherwise.
      tolerance = 4 * float(jnp.finfo(dtype).eps)
      np.testing.assert_allclose(np.asarray(a, np.float32),
                                 np.asarray(b, np.float32), atol=tolerance,
                                 rtol=tolerance)

  def test_gradient_is_zero_outside_b_and_not_zero_between_a_and_b(self):
    weight, inner, outer, x, dy = problem()
    grad = vjp(weight, inner, outer, x, dy)[1]
    self.assertTrue(np.all(grad[~outer] == 0))
    self.assertTrue(np.all(grad[outer & ~inner] != 0))

  def test_weights_outside_a_are_not_seen(self):
    """TK-e, and that NaN outside A does no harm."""
    weight, inner, outer, x, dy = problem()
    hidden = jnp.where(inner, weight, jnp.nan)
    for a, b in zip(vjp(hidden, inner, outer, x, dy),
                    vjp(weight, inner, outer, x, dy)):
      np.testing.assert_array_equal(a, b)

  def test_full_masks_are_the_identity(self):
    weight, _, _, x, dy = problem()
    full = jnp.ones(weight.shape, bool)
    for a, b in zip(vjp(weight, full, full, x, dy), dense_vjp(weight, x, dy)):
      np.testing.assert_array_equal(a, b)

  def test_masks_broadcast(self):
    weight, inner, _, x, dy = problem()
    row, full = inner[:1], jnp.ones((1, 1), bool)
    wide = jnp.broadcast_to(row, weight.shape)
    for a, b in zip(vjp(weight, row, full, x, dy),
                    vjp(weight, wide, jnp.ones(weight.shape, bool), x, dy)):
      np.testing.assert_array_equal(a, b)

  def test_vmap_equals_each_layer(self):
    args = problem(lead=(3,))
    stacked = jax.vmap(vjp)(*args)
    for i in range(3):
      for a, b in zip(stacked, vjp(*(arg[i] for arg in args))):
        np.testing.assert_allclose(a[i], b, rtol=1e-6)  # Batched products.

  def test_vmap_over_inputs_alone_sums_the_gradients(self):
    weight, inner, outer, x, dy = problem()
    loss = lambda w, x, dy: jnp.vdot(sparse_layer(w, inner, outer, x[None]),
                                     dy)
    grads = jax.vmap(jax.grad(loss), (None, 0, 0))(weight, x, dy)
    # Another order of summation.
    np.testing.assert_allclose(grads.sum(0),
                               vjp(weight, inner, outer, x, dy)[1], atol=1e-6)

  def test_scan_with_remat_equals_the_unrolled_layers(self):
    keys = jax.random.split(jax.random.key(1), 4)
    weights = jax.random.normal(keys[0], (3, 4, 4)) / 2
    outer = jax.random.bernoulli(keys[1], .7, weights.shape)
    inner = outer & jax.random.bernoulli(keys[2], .6, weights.shape)
    x = jax.random.normal(keys[3], (2, 4))
    block = jax.checkpoint(sparse_layer)

    def scanned(weights, x):
      body = lambda x, layer: (block(*layer, x), None)
      return lax.scan(body, x, (weights, inner, outer))[0].sum()

    def unrolled(weights, x):
      for w, a, b in zip(weights, inner, outer):
        x = sparse_layer(w, a, b, x)
      return x.sum()

    got = jax.jit(jax.value_and_grad(scanned, (0, 1)))(weights, x)
    want = jax.jit(jax.value_and_grad(unrolled, (0, 1)))(weights, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        got, want)  # Compiled apart.
    self.assertTrue(np.all(got[1][0][~outer] == 0))

  def test_finite_differences_where_forward_and_backward_agree(self):
    """On A the gradient is that of the function; A = B makes it so for all."""
    weight, inner, _, x, dy = problem()
    with jax.enable_x64(True):
      loss = jax.jit(lambda w: jnp.vdot(sparse_layer(
          w, inner, inner, x.astype(w.dtype)), dy))
      wide = weight.astype(jnp.float64)
      grad = jax.grad(loss)(wide)
      direction = jax.random.normal(jax.random.key(2), wide.shape, jnp.float64)
      slope = (loss(wide + 1e-6 * direction)
               - loss(wide - 1e-6 * direction)) / 2e-6
      # Central differences in float64: 1e-12 of curvature, 1e-10 of rounding.
      self.assertAlmostEqual(float(slope), float(jnp.vdot(grad, direction)),
                             delta=1e-7)

  def test_second_derivatives_by_two_reverse_passes(self):
    """A Hessian-vector product, as GraSP needs it."""
    weight, inner, _, x, dy = problem()
    loss = lambda w: jnp.vdot(sparse_layer(w, inner, inner, x), dy)
    plain = lambda w: jnp.vdot(layer(jnp.where(inner, w, 0), x), dy)
    hvp = lambda f: jax.grad(lambda w: jnp.vdot(jax.grad(f)(w), weight))
    np.testing.assert_allclose(jax.jit(hvp(loss))(weight),
                               jax.jit(hvp(plain))(weight), atol=1e-5)


if __name__ == '__main__':
  absltest.main()
