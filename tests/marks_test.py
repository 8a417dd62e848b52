"""Tests of the masks of one leaf, and of their marks."""

import itertools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.masks import layouts
from sparse_jax.masks import marks as marks_lib
from sparse_jax.masks.structures import Block
from sparse_jax.masks.structures import Channel
from sparse_jax.masks.structures import Filter
from sparse_jax.masks.structures import NM
from sparse_jax.masks.structures import Unstructured


def place(index, axes, shape):
  """Row-major position along several axes taken as one."""
  flat = 0
  for axis in axes:
    flat = flat * shape[axis] + index[axis]
  return flat


def competition_and_group(index, shape, structure, rows, stacked):
  """The definition: who competes with this entry, and who shares its fate."""
  own = [i for i in range(len(shape)) if i not in stacked]
  columns = [i for i in own if i > max(rows)]
  leading = [i for i in own if i not in rows and i not in columns]
  layer = tuple(index[i] for i in stacked)
  lead = place(index, leading, shape)
  row, column = place(index, rows, shape), place(index, columns, shape)
  match structure:
    case Unstructured():
      return layer, tuple(index[i] for i in own)
    case Block((height, width)):
      return layer, (lead, row // height, column // width)
    case NM(axis=-2):
      return (*layer, lead, row // structure.m, column), (row,)
    case NM(axis=-1):
      return (*layer, lead, row, column // structure.m), (column,)
    case Channel():
      return layer, (row, column)
    case Filter():
      return layer, (column,)


def slow_mask(scores, sparsity, structure, rows, stacked=()):
  """Groups entries one by one, sorts the groups, keeps the best."""
  groups = {}
  for index in itertools.product(*map(range, scores.shape)):
    rivals, group = competition_and_group(index, scores.shape, structure, rows,
                                          stacked)
    groups.setdefault(rivals, {}).setdefault(group, []).append(index)
  use_max = isinstance(structure, Block) and structure.reduce == 'max'
  mask = np.zeros(scores.shape, bool)
  for rivals in groups.values():
    def worth(item):
      values = [scores[index] for index in item[1]]
      return -(max(values) if use_max else sum(values)), item[0]

    count = max(1, round((1 - sparsity) * len(rivals)))
    if isinstance(structure, NM):
      count = structure.n
    for _, members in sorted(rivals.items(), key=worth)[:count]:
      for index in members:
        mask[index] = True
  return mask


def integer_scores(seed, shape):
  """Few values, so that there are ties, and sums are exact."""
  return np.random.default_rng(seed).integers(-5, 6, shape).astype(np.float32)


KINDS = {
    'unstructured': (Unstructured(), .7),
    'block_sum': (Block((3, 2)), .6),
    'block_max': (Block((3, 2), reduce='max'), .6),
    'two_of_four': (NM(2, 4), .5),
    'one_of_three_outputs': (NM(1, 3, axis=-1), 2 / 3),
    'channel': (Channel(), .6),
    'filter': (Filter(), .6),
}
# Shape, stacked axes, rows, and kinds: all of them compile for seconds.
SHAPES = {
    'dense': ((7, 5), (), (0,), tuple(KINDS)),
    'conv': ((2, 2, 7, 4), (), (2,), tuple(KINDS)),
    'stacked_first': ((2, 7, 5), (0,), (1,), ('block_max', 'channel')),
    'stacked_middle': ((7, 2, 5), (1,), (0,), ('block_sum', 'two_of_four')),
    'stacked_last': ((7, 5, 2), (-1,), (0,), ('unstructured', 'filter')),
    'conv_stacked_twice': ((2, 2, 5, 2, 3), (0, 3), (2,),
                           ('block_sum', 'one_of_three_outputs', 'channel',
                            'filter')),
}


class MakeMaskTest(parameterized.TestCase):

  @parameterized.parameters(*SHAPES)
  def test_keeps_the_best_groups_of_each_layer(self, shape):
    sizes, stacked, rows, kinds = SHAPES[shape]
    scores = integer_scores(0, sizes)
    masks = jax.jit(lambda s: {  # One compilation for all.
        kind: marks_lib.make_mask(s, KINDS[kind][1], structure=KINDS[kind][0],
                                batch_axes=stacked)
        for kind in kinds})(scores)
    positive = tuple(axis % len(sizes) for axis in stacked)
    for kind in kinds:
      want = slow_mask(scores, KINDS[kind][1], KINDS[kind][0], rows, positive)
      np.testing.assert_array_equal(masks[kind], want, kind)

  @parameterized.named_parameters(
      ('dense', 'layer/kernel', (8, 6), (0,)),
      ('conv', 'layer/kernel', (2, 2, 8, 3), (2,)),
      ('query', 'attention/query/kernel', (8, 2, 3), (0,)),
      ('key', 'attention/key/kernel', (8, 2, 3), (0,)),
      ('value', 'attention/value/kernel', (8, 2, 3), (0,)),
      ('out', 'attention/out/kernel', (2, 4, 3), (0, 1)),
      ('not_attention', 'layer/kernel', (2, 8, 3), (1,)))
  def test_n_of_m_follow_the_axis_that_the_product_sums_over(
      self, path, shape, rows):
    scores = integer_scores(1, shape)
    kinds = {NM(2, 4): .5, Block((2, 2)): .5, Filter(): .4}

    def make(structure, scores):
      leaf = layouts.layout(shape, path=path, structure=structure)
      return leaf.spread(leaf.top(leaf.group(scores),
                                  leaf.keep_count(kinds[structure])))

    masks = jax.jit(lambda s: [make(kind, s) for kind in kinds])(scores)
    for mask, (structure, sparsity) in zip(masks, kinds.items()):
      np.testing.assert_array_equal(
          mask, slow_mask(scores, sparsity, structure, rows))

  @parameterized.named_parameters(
      ('query', (8, 2, 3), (0,)), ('out', (2, 4, 3), (0, 1)),
      ('apart', (4, 3, 2, 2), (0, 2)), ('negative', (3, 8, 2), (-2,)))
  def test_contracting_axes_may_be_given(self, shape, rows):
    scores = integer_scores(2, shape)
    mask = jax.jit(lambda s: marks_lib.make_mask(
        s, .5, structure=NM(2, 4), contracting=rows))(scores)
    positive = tuple(axis % len(shape) for axis in rows)
    np.testing.assert_array_equal(
        mask, slow_mask(scores, .5, NM(2, 4), positive))

  def test_two_of_four_of_the_specified_example(self):
    row = jnp.abs(jnp.array([[.5], [-.1], [.3], [-.8]]))
    mask = marks_lib.make_mask(row, .5, structure=NM(2, 4))
    np.testing.assert_array_equal(mask.ravel(), [1, 0, 0, 1])

  @parameterized.parameters(('sum', 0), ('max', 1))
  def test_best_tile_of_the_specified_example(self, reduce, best):
    scores = jnp.array([[.5, .5, .9, 0, .6, .6], [.5, .5, .1, 0, .1, .1]])
    mask = marks_lib.make_mask(scores, .7,
                             structure=Block((2, 2), reduce=reduce))
    want = np.repeat([np.arange(3) == best], 2, 0).repeat(2, 1)
    np.testing.assert_array_equal(mask, want)

  def test_a_last_group_cut_short_keeps_n_of_what_it_has(self):
    mask = marks_lib.make_mask(-jnp.ones((6, 1)), .25, structure=NM(3, 4))
    np.testing.assert_array_equal(mask.ravel(), [1, 1, 1, 0, 1, 1])

  def test_blocks_of_all_leading_indices_compete_together(self):
    scores = np.ones((2, 4, 4), np.float32)
    scores[1] = 2
    mask = marks_lib.make_mask(scores, .5, structure=Block((2, 2)))
    np.testing.assert_array_equal(mask, scores == 2)

  def test_channels_of_a_one_by_one_convolution_are_entries(self):
    scores = integer_scores(3, (1, 1, 6, 5))
    np.testing.assert_array_equal(
        marks_lib.make_mask(scores, .6, structure=Channel()),
        marks_lib.make_mask(scores, .6))

  def test_nan_is_kept_last(self):
    scores = jnp.array([[jnp.nan, 1., 2.], [jnp.nan, -jnp.inf, -5.]])
    mask = marks_lib.make_mask(scores, 1 / 3)
    np.testing.assert_array_equal(mask, [[0, 1, 1], [0, 1, 1]])

  @parameterized.parameters(.4, 0., .75)
  def test_another_sparsity_than_that_of_n_of_m_is_named(self, sparsity):
    with self.assertRaisesRegex(ValueError, rf'`sparsity` \(={sparsity}'):
      marks_lib.make_mask(jnp.ones((4, 4)), sparsity, structure=NM(2, 4))

  def test_traced_sparsity_equals_the_number(self):
    scores = integer_scores(4, (9, 7))
    jitted = jax.jit(lambda s: marks_lib.make_mask(scores, s,
                                                 structure=Block((2, 2))))
    for sparsity in (.25, .5, .875):  # Exact in float32.
      np.testing.assert_array_equal(
          jitted(jnp.float32(sparsity)),
          marks_lib.make_mask(scores, sparsity, structure=Block((2, 2))))

  @parameterized.parameters(((4,), {}), ((4, 4), {'contracting': (1,)}),
                            ((2, 4, 4), {'batch_axes': (1,),
                                         'contracting': (1,)}))
  def test_a_leaf_that_is_no_matrix_has_no_blocks(self, shape, kwargs):
    with self.assertRaisesRegex(ValueError, '`(structure|contracting)`'):
      marks_lib.make_mask(jnp.ones(shape), .5, structure=Block((2, 2)), **kwargs)


class MarkTest(parameterized.TestCase):

  def test_masks_are_read_back_from_the_levels(self):
    marks = marks_lib.mark(jnp.array([0, 1, 2], jnp.uint8))
    self.assertEqual(marks.dtype, jnp.uint8)
    np.testing.assert_array_equal(marks_lib.forward_mask(marks), [0, 0, 1])
    np.testing.assert_array_equal(marks_lib.backward_mask(marks), [0, 1, 1])

  def test_a_first_mask_has_nothing_new(self):
    marks = marks_lib.mark(jnp.array([0, 1, 2], jnp.uint8))
    np.testing.assert_array_equal(marks_lib.newly_active(marks), [0, 0, 0])
    np.testing.assert_array_equal(marks_lib.ever_active(marks), [0, 0, 1])

  def test_marks_remember_the_past(self):
    history = np.array(list(itertools.product((0, 1, 2), repeat=4)), np.uint8)
    marks = marks_lib.mark(jnp.array(history[:, 0]))
    for t in range(1, 4):
      marks = marks_lib.mark(jnp.array(history[:, t]), marks)
    active = history == 2
    np.testing.assert_array_equal(marks_lib.forward_mask(marks), active[:, 3])
    np.testing.assert_array_equal(marks_lib.backward_mask(marks),
                                  history[:, 3] > 0)
    np.testing.assert_array_equal(marks_lib.ever_active(marks), active.any(1))
    np.testing.assert_array_equal(marks_lib.newly_active(marks),
                                  active[:, 3] & ~active[:, 2])


if __name__ == '__main__':
  absltest.main()
