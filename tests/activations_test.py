"""Tests of thresholds, penalties and forecasts that make activations sparse."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

import sparse_jax
from sparse_jax.operators import activations


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class FatReluTest(parameterized.TestCase):

  def test_what_reaches_the_threshold_passes_with_its_gradient(self):
    x = jnp.array([-1., .05, .2, .5, .1, 0., jnp.nan])
    y, pull = jax.vjp(lambda x: activations.fat_relu(x, .1), x)
    np.testing.assert_array_equal(y, np.array(
        [0, 0, .2, .5, .1, 0, np.nan], np.float32))
    np.testing.assert_array_equal(pull(jnp.arange(1., 8.))[0],
                                  [0, 0, 3, 4, 5, 0, 7])

  def test_no_gradient_reaches_the_threshold(self):
    grad = jax.grad(lambda t: jnp.sum(activations.fat_relu(jnp.ones(3), t)))
    self.assertEqual(grad(.5), 0)

  def test_each_channel_may_have_its_own(self):
    x = jnp.full((2, 2, 3), .5)
    y = activations.fat_relu(x, jnp.array([.4, .5, .6]))
    np.testing.assert_array_equal(y, np.broadcast_to([.5, .5, 0], x.shape))

  @parameterized.parameters(jnp.float32, jnp.bfloat16)
  def test_at_zero_it_is_relu(self, dtype):
    x = jnp.asarray(normal(40), dtype)
    for fn in (activations.fat_relu, lambda x, t: jax.nn.relu(x)):
      y, pull = jax.vjp(lambda x: fn(x, 0.), x)
      self.assertEqual(y.dtype, dtype)
      np.testing.assert_array_equal(y, jnp.maximum(x, 0))
      np.testing.assert_array_equal(pull(x)[0], jnp.maximum(x, 0))


class CalibrationTest(parameterized.TestCase):

  def test_each_layer_uses_up_its_part_of_the_drop(self):
    seen = []

    def metric(thresholds):
      seen.append(dict(thresholds))
      return 1 - thresholds['a'] ** 2 - 2 * thresholds['b']

    found = activations.calibrate_thresholds(metric, ['a', 'b'], drop=.02,
                                             precision=1e-4)
    self.assertAlmostEqual(found['a'], .1, delta=1e-4)
    self.assertAlmostEqual(found['b'], .005, delta=1e-3)
    self.assertGreaterEqual(metric(found), .98)
    self.assertTrue(all(t['b'] == 0 for t in seen[:10]))

  def test_a_layer_that_costs_nothing_gets_the_highest(self):
    found = activations.calibrate_thresholds(lambda t: 1., ['a'], drop=0.,
                                             high=3.)
    self.assertEqual(found, {'a': 3.})

  def test_a_layer_that_bears_nothing_stays_at_zero(self):
    found = activations.calibrate_thresholds(lambda t: -t['a'], ['a'], drop=0.)
    self.assertEqual(found, {'a': 0.})

  @parameterized.parameters(
      (dict(metric=3), r'`metric` \(=3\)'), (dict(drop=-1.), r'`drop`'),
      (dict(high=0.), r'`high` \(=0.0\)'),
      (dict(precision=0.), r'`precision` \(=0.0\)'))
  def test_a_bad_argument_is_named(self, arguments, message):
    arguments = dict(metric=lambda t: 1., layers=['a'], drop=.1) | arguments
    with self.assertRaisesRegex(ValueError, message):
      activations.calibrate_thresholds(**arguments)


class PenaltyTest(parameterized.TestCase):

  def test_hoyer_and_its_gradient_are_the_formula(self):
    x = np.abs(normal(5, 7))
    value, grad = jax.jit(jax.value_and_grad(activations.hoyer))(x)
    ones, twos = x.sum(), (x ** 2).sum()
    np.testing.assert_allclose(value, ones ** 2 / twos, rtol=1e-5)
    np.testing.assert_allclose(
        grad, 2 * ones / twos - 2 * ones ** 2 * x / twos ** 2, rtol=1e-4,
        atol=1e-5)

  def test_hoyer_is_between_one_and_the_number_of_entries(self):
    self.assertAlmostEqual(activations.hoyer(3 * jnp.eye(1, 8)), 1.)
    self.assertAlmostEqual(activations.hoyer(jnp.full(8, -.1)), 8., places=5)

  def test_hoyer_of_zeros_is_zero_with_no_gradient(self):
    value, grad = jax.value_and_grad(activations.hoyer)(jnp.zeros(3))
    self.assertEqual(value, 0)
    np.testing.assert_array_equal(grad, 0)

  def test_penalty_of_the_specification(self):
    """Two examples, coefficient .1: 0.04, and 0.05 where positive."""
    maps = {'relu': jnp.array([[.2, 0.], [.5, .1]])}
    value, grad = jax.value_and_grad(functools.partial(
        activations.activation_penalty, weight=.1, measure=activations.l1))(
            maps)
    self.assertAlmostEqual(float(value), .04, places=6)
    np.testing.assert_allclose(grad['relu'], [[.05, 0], [.05, .05]], rtol=1e-6)

  def test_each_layer_has_its_own_weight(self):
    maps = {'a': jnp.ones((2, 3)), 'b': {'c': jnp.ones((4, 5))}}
    value = activations.activation_penalty(maps, weight={'b/c': .5})
    self.assertAlmostEqual(float(value), .5 * 20 / 4, places=5)
    both = activations.activation_penalty(maps, weight={'a': 2., 'b/c': .5})
    self.assertAlmostEqual(float(both - value), 2 * 6 / 2, places=5)

  @parameterized.parameters(
      (dict(weight=-1.), r'`weight` \(=-1.0\)'),
      (dict(weight={'a': -1.}), r"`weight\['a'\]` \(=-1.0\)"),
      (dict(weight={'typo': 1.}), '`weight` .*typo'),
      (dict(weight=1., measure='l1'), "`measure` .*'l1'"))
  def test_a_bad_argument_is_named(self, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      activations.activation_penalty({'a': jnp.ones((2, 3))}, **arguments)


class MepropTest(parameterized.TestCase):

  def test_it_is_the_scope_of_the_output_gradient(self):
    """Each example its own two of five, or all examples the same two."""
    x, w, dy = normal(4, 3), normal(3, 5, seed=1), normal(4, 5, seed=2)
    rows = np.argsort(-np.abs(dy), 1)[:, :2]
    own = np.zeros_like(dy)
    np.put_along_axis(own, rows, np.take_along_axis(dy, rows, 1), 1)
    shared = np.argsort(-np.abs(dy).sum(0))[:2]
    same = np.where(np.isin(np.arange(5), shared), dy, 0)
    for unified, g in ((False, own), (True, same)):
      dot = activations.meprop(.6, unified=unified)
      _, pull = jax.vjp(lambda x, w: dot(x, w, (((1,), (0,)), ((), ()))),
                        jnp.asarray(x), jnp.asarray(w))
      dx, dw = pull(jnp.asarray(dy))
      np.testing.assert_allclose(dx, g @ w.T, rtol=1e-5, atol=1e-6)
      np.testing.assert_allclose(dw, x.T @ g, rtol=1e-5, atol=1e-6)

  def test_bad_arguments_are_named(self):
    with self.assertRaisesRegex(ValueError, r'`output_gradient` \(=1.0\)'):
      activations.meprop(1.)
    with self.assertRaisesRegex(ValueError, r'`unified` \(=1\)'):
      activations.meprop(.5, unified=1)


class DsgTest(parameterized.TestCase):

  def expected(self, outputs, sparsity):
    """Those that reach the first example's k-th largest."""
    k = max(1, round((1 - sparsity) * outputs[0].size))
    return outputs >= np.sort(outputs[0].ravel())[-k]

  def test_without_a_projection_it_knows_the_outputs(self):
    x, w = normal(6, 8), normal(8, 10, seed=1)
    mask = activations.dsg_mask(jnp.asarray(x), jnp.asarray(w),
                                projection=jnp.eye(8), sparsity=.7)
    np.testing.assert_array_equal(mask, self.expected(x @ w, .7))
    self.assertEqual(mask[0].sum(), 3)

  def test_of_a_convolution_it_forecasts_each_position(self):
    x, w = normal(2, 5, 5, 2), normal(3, 3, 2, 4, seed=1)
    conv = lambda x, w: lax.conv_general_dilated(
        x, w, (2, 2), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    mask = activations.dsg_mask(jnp.asarray(x), jnp.asarray(w), product=conv,
                                projection=jnp.eye(18), sparsity=.75)
    outputs = np.asarray(conv(x, w))
    self.assertEqual(mask.shape, outputs.shape)
    np.testing.assert_array_equal(mask, self.expected(outputs, .75))

  def test_the_forecast_sees_only_the_projections(self):
    x, w, r = normal(6, 8), normal(8, 10, seed=1), normal(4, 8, seed=2)
    mask = activations.dsg_mask(jnp.asarray(x), jnp.asarray(w),
                                projection=jnp.asarray(r), sparsity=.7)
    np.testing.assert_array_equal(
        mask, self.expected((x @ r.T) @ (r @ w), .7))

  def test_a_projection_keeps_inner_products_in_the_mean(self):
    """Of 4000 rows; the deviation of the mean is about |x||y| / 60."""
    r = np.asarray(activations.random_projection(jax.random.key(3), 12,
                                                 dims=4000))
    x, y = normal(12), normal(12, seed=1)
    self.assertAlmostEqual(float((r @ x) @ (r @ y)), float(x @ y),
                           delta=4 * np.linalg.norm(x) * np.linalg.norm(y) / 60)
    values, counts = np.unique(r, return_counts=True)
    np.testing.assert_allclose(values, np.array([-1, 0, 1]) * (3 / 4000) ** .5,
                               rtol=1e-6)
    np.testing.assert_allclose(counts / r.size, [1 / 6, 2 / 3, 1 / 6],
                               atol=.01)

  def test_the_double_mask_closes_forward_and_backward(self):
    """Normalisation fills the zeros; the mask empties them again."""
    x, w = jnp.asarray(normal(6, 8)), jnp.asarray(normal(8, 10, seed=1))
    mask = activations.dsg_mask(x, w, projection=jnp.eye(8),
                                sparsity=.7)

    def normalised(extra, mask):
      y = sparse_jax.operators.gate(sparse_jax.operators.relu(x @ w + extra), mask)
      return (y - y.mean(0, keepdims=True)) / (y.std(0, keepdims=True) + 1)

    def layer(extra, mask):
      return sparse_jax.operators.gate(normalised(extra, mask), mask)

    @jax.jit
    def run(mask):
      y, pull = jax.vjp(lambda extra: layer(extra, mask), jnp.zeros((6, 10)))
      return y, *pull(jnp.ones((6, 10)))

    for array in run(mask):
      np.testing.assert_array_equal(array[~mask], 0)
    filled = jax.jit(lambda mask: normalised(jnp.zeros((6, 10)), mask))(mask)
    self.assertGreater(int((filled != 0).sum()), int(mask.sum()))

  @parameterized.parameters(
      (dict(sparsity=1.), r'`sparsity` \(=1.0\)'),
      (dict(projection=jnp.eye(3)), r'`projection` \(of shape \(3, 3\)\)'))
  def test_a_bad_argument_is_named(self, arguments, message):
    arguments = dict(projection=jnp.eye(8), sparsity=.5) | arguments
    with self.assertRaisesRegex(ValueError, message):
      activations.dsg_mask(jnp.ones((2, 8)), jnp.ones((8, 4)),
                           **arguments)

  def test_bad_sizes_of_a_projection_are_named(self):
    for size, dims, name in ((0, 3, 'size'), (3, 0, 'dims')):
      with self.assertRaisesRegex(ValueError, rf'`{name}` \(=0\)'):
        activations.random_projection(jax.random.key(0), size, dims=dims)


if __name__ == '__main__':
  absltest.main()
