"""Tests of a weight read through one mask and differentiated by another."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from sparse_jax.masks import backward


def problem(dtype=jnp.float32, lead=()):
  """A weight, masks A inside B, inputs and a cotangent."""
  rng = np.random.default_rng(0)
  weight, x, dy = (
      jnp.asarray(rng.normal(size=(*lead, *shape)), dtype)
      for shape in ((6, 4), (3, 6), (3, 4)))
  inner, outer = random_masks(rng, weight.shape)
  return weight, inner, outer, x, dy


def random_masks(rng, shape):
  """A inside B, in NumPy."""
  outer = rng.random(shape) < .7
  return outer & (rng.random(shape) < .6), outer


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
  seen = np.where(inner, weight, np.zeros_like(weight))
  y, dw, dx = dense_vjp(seen, x, dy)
  return y, np.where(outer, dw, np.zeros_like(dw)), dx


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
    grad = np.asarray(vjp(weight, inner, outer, x, dy)[1])
    self.assertTrue(np.all(grad[~outer] == 0))
    self.assertTrue(np.all(grad[outer & ~inner] != 0))

  def test_weights_outside_a_are_not_seen(self):
    """TK-e, and that NaN outside A does no harm."""
    weight, inner, outer, x, dy = problem()
    hidden = np.where(inner, weight, np.float32(np.nan))
    for a, b in zip(vjp(hidden, inner, outer, x, dy),
                    vjp(weight, inner, outer, x, dy)):
      np.testing.assert_array_equal(a, b)

  def test_full_masks_are_the_identity(self):
    weight, _, _, x, dy = problem()
    full = np.ones(weight.shape, bool)
    for a, b in zip(vjp(weight, full, full, x, dy), dense_vjp(weight, x, dy)):
      np.testing.assert_array_equal(a, b)

  def test_masks_broadcast(self):
    weight, inner, _, x, dy = problem()
    row, full = inner[:1], np.ones((1, 1), bool)
    wide = np.broadcast_to(row, weight.shape)
    for a, b in zip(vjp(weight, row, full, x, dy),
                    vjp(weight, wide, np.ones(weight.shape, bool), x, dy)):
      np.testing.assert_array_equal(a, b)

  def test_vmap_equals_each_layer(self):
    args = problem(lead=(3,))
    stacked = [np.asarray(each) for each in jax.jit(jax.vmap(vjp))(*args)]
    for i in range(3):
      for a, b in zip(stacked, vjp(*(np.asarray(arg)[i] for arg in args))):
        np.testing.assert_allclose(a[i], b, rtol=1e-6)  # Batched products.

  def test_vmap_over_inputs_alone_sums_the_gradients(self):
    weight, inner, outer, x, dy = problem()
    loss = lambda w, x, dy: jnp.vdot(sparse_layer(w, inner, outer, x[None]),
                                     dy)
    grads = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))(weight, x, dy)
    # Another order of summation.
    np.testing.assert_allclose(np.sum(grads, 0),
                               vjp(weight, inner, outer, x, dy)[1], atol=1e-6)

  def test_scan_with_remat_equals_the_unrolled_layers(self):
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(3, 4, 4)).astype(np.float32) / 2
    inner, outer = random_masks(rng, weights.shape)
    x = rng.normal(size=(2, 4)).astype(np.float32)
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
    self.assertTrue(np.all(np.asarray(got[1][0])[~outer] == 0))

  def test_finite_differences_where_forward_and_backward_agree(self):
    """On A the gradient is that of the function; A = B makes it so for all."""
    weight, inner, _, x, dy = problem()
    with jax.enable_x64(True):
      loss = jax.jit(jax.value_and_grad(lambda w: jnp.vdot(sparse_layer(
          w, inner, inner, x.astype(w.dtype)), dy)))
      wide = np.asarray(weight, np.float64)
      grad = loss(wide)[1]
      direction = np.random.default_rng(2).normal(size=wide.shape)
      slope = (loss(wide + 1e-6 * direction)[0]
               - loss(wide - 1e-6 * direction)[0]) / 2e-6
      # Central differences in float64: 1e-12 of curvature, 1e-10 of rounding.
      self.assertAlmostEqual(float(slope), np.vdot(grad, direction),
                             delta=1e-7)

  def test_second_derivatives_by_two_reverse_passes(self):
    """A Hessian-vector product, as GraSP needs it."""
    weight, inner, _, x, dy = problem()
    loss = lambda w: jnp.vdot(sparse_layer(w, inner, inner, x), dy)
    plain = lambda w: jnp.vdot(layer(jnp.where(inner, w, 0), x), dy)
    hvp = lambda f: jax.grad(lambda w: jnp.vdot(jax.grad(f)(w), weight))
    np.testing.assert_allclose(jax.jit(hvp(loss))(weight),
                               jax.jit(hvp(plain))(weight), atol=1e-5)

  def test_forward_derivatives_follow_the_rule_of_the_gradient(self):
    weight, inner, outer, x, dy = problem()
    fn = lambda w: backward.masked_weight(w, inner, outer)
    ones = jnp.ones_like(weight)
    for got in (jax.jvp(fn, (weight,), (ones,)),
                (fn(weight), jax.linearize(fn, weight)[1](ones))):
      np.testing.assert_array_equal(got[0], np.where(inner, weight, 0))
      np.testing.assert_array_equal(got[1], outer)
    loss = lambda w: jnp.vdot(sparse_layer(w, inner, outer, x), dy)
    np.testing.assert_allclose(  # Another order of summation.
        jax.jvp(loss, (weight,), (ones,))[1], jax.grad(loss)(weight).sum(),
        rtol=1e-5)

  def test_second_derivatives_in_any_order(self):
    weight, inner, outer, x, dy = problem()
    loss = lambda w: jnp.vdot(sparse_layer(w, inner, outer, x), dy)
    along = jnp.cos(weight)
    reverse = jax.grad(lambda w: jnp.vdot(jax.grad(loss)(w), along))(weight)
    for product in (
        jax.jvp(jax.grad(loss), (weight,), (along,))[1],
        jax.grad(lambda w: jax.jvp(loss, (w,), (along,))[1])(weight),
        jnp.einsum('ijkl,kl', jax.hessian(loss)(weight), along)):
      np.testing.assert_allclose(product, reverse, atol=1e-5)

  def test_backward_pass_keeps_the_mask_as_it_is_given(self):
    """In a scan over layers one spread to the weight would stack up."""
    weight, _, _, _, _ = problem()
    full = jnp.ones((1, 1), bool)
    pull = jax.vjp(lambda w: backward.masked_weight(w, full, full), weight)[1]
    self.assertLess(max(leaf.size for leaf in jax.tree.leaves(pull)),
                    weight.size)


if __name__ == '__main__':
  absltest.main()
