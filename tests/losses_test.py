"""Tests of the exploration loss."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.rules import losses

W = {'a': np.array([[.5, -.1, .3], [-.8, .2, .05]], np.float32),
     'b': np.array([2., -3.], np.float32)}
A = {'a': np.array([[1, 0, 0], [1, 0, 0]], bool), 'b': None}
B = {'a': np.array([[1, 0, 1], [1, 1, 0]], bool), 'b': None}


def slow_loss(penalty_weight, density):
  """The definition, entry by entry."""
  total = 0.
  for index, value in np.ndenumerate(W['a']):
    if A['a'][index]:
      total += penalty_weight * float(value)**2 / 2
    elif B['a'][index]:
      total += penalty_weight * float(value)**2 / 2 / density
  return total


class ExplorationLossTest(parameterized.TestCase):

  @parameterized.parameters((1., .5), (1e-4, .1), (3., 1 / 3), (0., .5))
  def test_equals_the_sum_over_entries(self, weight, density):
    got = losses.exploration_loss(W, A, B, penalty_weight=weight,
                                  forward_density=density)
    self.assertEqual((got.dtype, got.shape), (jnp.float32, ()))
    np.testing.assert_allclose(got, slow_loss(weight, density), rtol=1e-6)

  def test_gradient_is_that_of_the_specified_example(self):
    """TK-c: the ratio between B outside A and A is 1/D, with D = 1/3."""
    grads = jax.grad(losses.exploration_loss)(
        W, A, B, penalty_weight=1., forward_density=1 / 3)
    want = np.array([[.5, 0, .9], [-.8, .6, 0]])
    np.testing.assert_allclose(grads['a'], want, rtol=1e-6)
    np.testing.assert_array_equal(grads['b'], [0, 0])

  def test_gradient_is_exactly_zero_outside_b(self):
    grads = jax.grad(losses.exploration_loss)(W, A, B)
    np.testing.assert_array_equal(np.asarray(grads['a'])[~B['a']], [0, 0])

  def test_density_is_measured_if_not_given(self):
    np.testing.assert_allclose(
        losses.exploration_loss(W, A, B, penalty_weight=1.),
        slow_loss(1., 1 / 3), rtol=1e-6)

  def test_each_leaf_may_have_its_own_density(self):
    double = {'x': W['a'], 'y': W['a']}
    masks = [{'x': m['a'], 'y': m['a']} for m in (A, B)]
    got = losses.exploration_loss(double, *masks, penalty_weight=1.,
                                  forward_density={'x': .5, 'y': .1})
    np.testing.assert_allclose(got, slow_loss(1., .5) + slow_loss(1., .1),
                               rtol=1e-6)

  def test_default_weight_is_that_of_the_paper(self):
    np.testing.assert_allclose(
        losses.exploration_loss(W, A, B, forward_density=.5),
        slow_loss(1e-4, .5), rtol=1e-6)

  def test_bfloat16_weights_are_summed_in_float32(self):
    weight = {'w': jnp.full((1, 1000), .5, jnp.bfloat16)}
    mask = {'w': jnp.ones((1, 1000), bool)}
    self.assertEqual(losses.exploration_loss(weight, mask, mask,
                                             penalty_weight=1.), 125.)
    grads = jax.grad(losses.exploration_loss)(weight, mask, mask)
    self.assertEqual(grads['w'].dtype, jnp.bfloat16)


if __name__ == '__main__':
  absltest.main()
