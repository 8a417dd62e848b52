"""Random scores: those of JAX, without its temporaries."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np

from sparse_jax.masks import draws


class DrawsTest(parameterized.TestCase):

  @parameterized.parameters((), (1,), (130,), (3, 7), (2, 5, 4), (0, 3))
  def test_they_are_those_of_jax(self, *shape):
    key = jax.random.fold_in(jax.random.key(5), 7)
    got = draws.uniform(key, shape)
    want = jax.random.uniform(key, shape)
    self.assertEqual((got.shape, got.dtype), (want.shape, want.dtype))
    np.testing.assert_array_equal(got, want)

  @parameterized.parameters('rbg', 'threefry2x32')
  def test_other_generators_draw_as_they_do(self, impl):
    key = jax.random.key(3, impl=impl)
    with jax.threefry_partitionable(False):
      np.testing.assert_array_equal(draws.uniform(key, (9, 5)),
                                    jax.random.uniform(key, (9, 5)))

  def test_64_bit_mode(self):
    with jax.enable_x64(True):
      key = jax.random.key(3)
      np.testing.assert_array_equal(draws.uniform(key, (9, 5)),
                                    jax.random.uniform(key, (9, 5)))

  def test_nothing_is_kept(self):
    compiled = jax.jit(lambda key: draws.uniform(key, (300, 100))).lower(
        jax.random.key(0)).compile()
    self.assertLess(compiled.memory_analysis().temp_size_in_bytes, 1000)


if __name__ == '__main__':
  absltest.main()
