"""Tests of sparsity and drop fraction as functions of the step."""

import math

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.masks import schedules
from sparse_jax.masks import topk


class CubicSparsityTest(parameterized.TestCase):

  @parameterized.parameters((0, 0.), (25, .4625), (50, .7), (75, .7875),
                            (100, .8))
  def test_the_specified_values(self, step, want):
    schedule = schedules.cubic_sparsity(.8, end=100)
    self.assertAlmostEqual(float(schedule(step)), want, delta=1e-7)  # float32.

  def test_equals_the_formula_between_begin_and_end(self):
    schedule = jax.jit(schedules.cubic_sparsity(.9, begin=7, end=29,
                                                initial=.25))
    for step in range(7, 30):
      want = .9 + (.25 - .9) * (1 - (step - 7) / 22)**3
      self.assertAlmostEqual(float(schedule(step)), want, delta=2e-7)

  def test_is_initial_before_and_exactly_final_after(self):
    schedule = schedules.cubic_sparsity(.9, begin=7, end=29, initial=.25)
    for step in (0, 3, 7):
      self.assertAlmostEqual(float(schedule(step)), .25, delta=1e-7)
    for step in (29, 30, 10**6):
      self.assertEqual(schedule(step), jnp.float32(.9))

  def test_rises(self):
    steps = jnp.arange(120)
    values = np.asarray(schedules.cubic_sparsity(.8, begin=10, end=100)(steps))
    self.assertTrue(np.all(np.diff(values) >= 0))

  @parameterized.parameters((.7875, 1), (.5, 3), (0., 6))
  def test_six_weights_keep_the_rounded_count(self, sparsity, want):
    count = jax.jit(lambda s: topk.keep_count(6, s))(jnp.float32(sparsity))
    self.assertEqual(int(count), want)

  @parameterized.parameters((5, 5), (6, 5))
  def test_an_end_that_is_not_above_begin_is_named(self, begin, end):
    with self.assertRaisesRegex(ValueError, rf'`end` \(={end}\)'):
      schedules.cubic_sparsity(.5, begin=begin, end=end)


class CosineDropTest(parameterized.TestCase):

  @parameterized.parameters((0, .3), (25, .25607), (50, .15), (75, .04393),
                            (100, 0.), (1000, 0.))
  def test_the_specified_values(self, step, want):
    drop = schedules.cosine_drop(.3, end=100)
    self.assertAlmostEqual(float(drop(step)), want, delta=5e-6)  # As printed.

  def test_is_exactly_zero_from_the_end_on(self):
    drop = jax.jit(schedules.cosine_drop(1., end=7))
    for step in (7, 8, 10**6):
      self.assertEqual(float(drop(step)), 0.)

  def test_equals_the_formula(self):
    drop = jax.jit(schedules.cosine_drop(.7, end=13))
    for step in range(14):
      want = .35 * (1 + math.cos(math.pi * step / 13))
      self.assertAlmostEqual(float(drop(step)), want, delta=2e-7)  # float32.


class ConstantTest(parameterized.TestCase):

  @parameterized.parameters(0, 17)
  def test_is_the_value_at_every_step(self, step):
    value = schedules.constant(.4)(step)
    self.assertEqual((value.dtype, value.shape), (jnp.float32, ()))
    self.assertEqual(value, jnp.float32(.4))


if __name__ == '__main__':
  absltest.main()
