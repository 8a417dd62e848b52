"""Tests of groups: blocks, N of M, channels, filters."""

from absl.testing import absltest
from absl.testing import parameterized
import jax.numpy as jnp
import numpy as np

from sparse_jax.masks import structures

SPEC_BLOCKS = np.array([[.5, .5, .9, 0, .6, .6], [.5, .5, .1, 0, .1, .1]],
                       np.float32)


def slow_blocks(scores, rows, columns, reduce):
  """The definition: the sum or maximum of the entries each tile has."""
  height, width = scores.shape
  tiles = {}
  for i in range(height):
    for j in range(width):
      tiles.setdefault((i // rows, j // columns), []).append(scores[i, j])
  shape = (-(-height // rows), -(-width // columns))
  pooled = [sum(t) if reduce == 'sum' else max(t) for t in tiles.values()]
  return np.array([p for _, p in sorted(zip(tiles, pooled))]).reshape(shape)


class BlockTest(parameterized.TestCase):

  @parameterized.parameters(('sum', [[2., 1., 1.4]]), ('max', [[.5, .9, .6]]))
  def test_tiles_of_the_specified_example(self, reduce, want):
    block = structures.Block((2, 2), reduce=reduce)
    # Sums of a few float32 decimals.
    np.testing.assert_allclose(block.group(jnp.array(SPEC_BLOCKS), 0), want,
                               rtol=1e-6)

  @parameterized.product(reduce=('sum', 'max'), size=((7, 5), (8, 6), (1, 9)),
                         tile=((3, 2), (2, 4)))
  def test_every_tile_has_the_sum_or_maximum_of_its_entries(
      self, reduce, size, tile):
    # Negative scores show a maximum that is taken over padding.
    scores = np.random.default_rng(0).integers(-50, -1, size)
    block = structures.Block(tile, reduce=reduce)
    got = block.group(jnp.array(scores, jnp.float32), 0)
    np.testing.assert_array_equal(got, slow_blocks(scores, *tile, reduce))

  @parameterized.parameters((7, 3), (5, 3), (8, 3), (9, 3), (2, 3), (1, 1))
  def test_no_entry_is_lost_at_an_edge_that_tiles_do_not_divide(
      self, length, tile):
    """Length 7 with tiles of 3 is where padding by the remainder fails."""
    block = structures.Block((tile, 1))
    groups = block.group(jnp.ones((length, 2)), 0)
    self.assertEqual(float(groups.sum()), 2 * length)
    spread = block.spread(jnp.arange(groups.size).reshape(groups.shape),
                          (length, 2))
    want = [[2 * (i // tile), 2 * (i // tile) + 1] for i in range(length)]
    np.testing.assert_array_equal(spread, want)

  def test_sums_of_bfloat16_scores_are_not_rounded_to_bfloat16(self):
    scores = jnp.ones((1, 257), jnp.bfloat16)
    groups = structures.Block((1, 257)).group(scores, 0)
    np.testing.assert_array_equal(groups, [[257]])


class NMTest(parameterized.TestCase):

  @parameterized.parameters((2, 4, .5), (1, 4, .75), (2, 8, .75), (4, 4, 0.))
  def test_sparsity_is_the_share_dropped(self, n, m, want):
    self.assertEqual(structures.NM(n, m).sparsity, want)

  @parameterized.parameters(-2, -1)
  def test_spread_undoes_group(self, axis):
    scores = jnp.arange(7. * 5).reshape(7, 5)
    nm = structures.NM(2, 4, axis=axis)
    np.testing.assert_array_equal(nm.spread(nm.group(scores, 0), (7, 5)),
                                  scores)

  @parameterized.parameters((-2, (1,)), (-1, (2,)))
  def test_entries_compete_inside_their_group_only(self, axis, want):
    nm = structures.NM(2, 4, axis=axis)
    groups = nm.group(jnp.ones((8, 12)), 0)
    self.assertEqual(nm.competing(groups.ndim, 0), want)
    self.assertEqual(groups.shape[want[0]], 4)


class ChannelAndFilterTest(parameterized.TestCase):

  def test_a_channel_pair_has_the_sum_over_its_positions(self):
    scores = np.random.default_rng(1).integers(0, 9, (2, 3, 4, 5))
    groups = structures.Channel().group(jnp.array(scores, jnp.float32), 0)
    np.testing.assert_array_equal(groups.reshape(4, 5), scores.sum((0, 1)))

  def test_a_filter_has_the_sum_over_its_inputs(self):
    scores = np.random.default_rng(2).integers(0, 9, (2, 3, 4, 5))
    groups = structures.Filter().group(jnp.array(scores, jnp.float32), 0)
    np.testing.assert_array_equal(groups.ravel(), scores.sum((0, 1, 2)))

  def test_stacked_layers_are_not_summed(self):
    scores = np.random.default_rng(3).integers(0, 9, (2, 3, 4, 5))
    stacked = jnp.array(scores, jnp.float32)
    np.testing.assert_array_equal(
        structures.Channel().group(stacked, 1).reshape(2, 4, 5),
        scores.sum(1))
    np.testing.assert_array_equal(
        structures.Filter().group(stacked, 1).reshape(2, 5),
        scores.sum((1, 2)))

  @parameterized.parameters((structures.Channel(),), (structures.Filter(),))
  def test_all_entries_of_a_group_get_its_decision(self, structure):
    scores = jnp.array(np.random.default_rng(4).random((2, 3, 4, 5)))
    groups = structure.group(scores, 0)
    spread = structure.spread(groups > groups.mean(), scores.shape)
    self.assertEqual(spread.shape, scores.shape)
    np.testing.assert_array_equal(
        structure.group(spread, 0) > 0, groups > groups.mean())


if __name__ == '__main__':
  absltest.main()
