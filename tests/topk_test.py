"""Tests of the exact, sort-free choice of the k largest entries."""

import contextlib
import functools
import re
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import jax.numpy as jnp
import numpy as np

from sparse_jax.masks import search
from sparse_jax.masks import topk

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
# Where infinity, NaN and -0 lie differs between them.
EIGHTHS = (jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float8_e4m3fnuz,
           jnp.float8_e5m2fnuz, jnp.float8_e4m3b11fnuz)
GATHERS = r'= \S+ (all-gather|all-to-all|collective-permute)'


def setUpModule():
  # Large arrays: here running takes longer than compiling.
  jax.config.update('jax_disable_most_optimizations', False)


def tearDownModule():
  jax.config.update('jax_disable_most_optimizations', True)


def slow_top_k_mask(scores, k):
  """The definition: repeatedly take the first of the largest left."""
  values = np.asarray(scores).astype(np.float64)
  flat = values.ravel()
  left, mask = list(range(flat.size)), np.zeros(flat.size, bool)
  for _ in range(k):
    best = left[0]
    for i in left:
      if flat[i] > flat[best] or (np.isnan(flat[best])
                                  and not np.isnan(flat[i])):
        best = i
    mask[best] = True
    left.remove(best)
  return mask.reshape(values.shape)


def make_mesh(shape, names, axis_type=AxisType.Auto):
  return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(shape))


@functools.cache
def ties_and_their_mask():
  """Scores with many ties, and the 700 best of them by the slow loop."""
  plain = np.round(np.random.default_rng(5).normal(size=(64, 32)) * 4)
  return plain, slow_top_k_mask(plain, 700)


def awkward_scores(rng, size, kind):
  if kind == 'normal':
    return rng.normal(size=size)
  if kind == 'ties':
    return rng.integers(-2, 3, size)
  if kind == 'nan':
    return np.where(rng.random(size) < .3, np.nan, rng.integers(-2, 3, size))
  return rng.choice([0., -0., 6e-8, -6e-8, 1.2e-7, np.inf, -np.inf, np.nan],
                    size)


class KeepCountTest(parameterized.TestCase):

  @parameterized.parameters(
      (10, .8, 2), (10, .9, 1), (4, .999, 1), (1, .5, 1), (5, .5, 2),
      (7, .5, 4), (6, 0., 6), (2**31 - 1, .5, 2**30),
      (50_000_000, .9, 5_000_000))
  def test_count_is_rounded_half_to_even_and_at_least_one(self, n, s, want):
    self.assertEqual(topk.keep_count(n, s), want)

  @parameterized.product(size=(1, 3, 10, 1000, 2**24 + 3, 50_000_001,
                               2**31 - 1),
                         sparsity=(0., .1, .25, .5, .8, .9, .99, .9999))
  def test_traced_sparsity_gives_the_count_of_its_float32_value(
      self, size, sparsity):
    traced = jax.jit(lambda s: topk.keep_count(size, s))(
        jnp.float32(sparsity))
    value = float(np.float32(sparsity))
    self.assertEqual(int(traced), topk.keep_count(size, value))

  @parameterized.parameters(1., -.1, float('nan'), 'x', None)
  def test_impossible_sparsity_is_named(self, sparsity):
    with self.assertRaisesRegex(ValueError, r'`sparsity` \(='):
      topk.keep_count(10, sparsity)

  @parameterized.parameters(0, 2**31, 1.5)
  def test_impossible_size_is_named(self, size):
    with self.assertRaisesRegex(ValueError, r'`size` \(='):
      topk.keep_count(size, .5)


class TopKMaskTest(parameterized.TestCase):

  @parameterized.product(dtype=DTYPES,
                         kind=('normal', 'ties', 'nan', 'extremes'),
                         size=(1, 30, 150))
  def test_equals_the_slow_loop_for_every_k(self, dtype, kind, size):
    rng = np.random.default_rng([size, len(kind)])
    scores = awkward_scores(rng, size, kind).astype(dtype)
    compiled = jax.jit(topk.top_k_mask)
    for k in range(0, size + 1, 1 + size // 8):
      want = slow_top_k_mask(scores, k)
      np.testing.assert_array_equal(compiled(scores, k), want)
    np.testing.assert_array_equal(topk.top_k_mask(scores, size // 2),
                                  slow_top_k_mask(scores, size // 2))

  @parameterized.product(dtype=DTYPES, kind=('normal', 'ties', 'nan'))
  def test_one_device_of_many_gives_the_same(self, dtype, kind):
    """There keys are counted by one reduction of several operands."""
    scores = awkward_scores(np.random.default_rng(8), 150, kind).astype(dtype)
    with jax.set_mesh(make_mesh((1,), ('x',))):
      compiled = jax.jit(topk.top_k_mask)
      for k in (0, 1, 40, 149, 150):
        np.testing.assert_array_equal(compiled(scores, k),
                                      slow_top_k_mask(scores, k))

  @parameterized.parameters(*EIGHTHS)
  def test_short_floats_are_ranked_and_nan_is_last(self, dtype):
    scores = np.array([np.nan, 1, np.nan, 2, .5, -1, 0, -0., np.nan])
    scores = np.tile(scores, 20).astype(dtype)
    for k in (20, 70, 125, 165):
      np.testing.assert_array_equal(topk.top_k_mask(scores, k),
                                    slow_top_k_mask(scores, k))

  def test_subnormals_are_ordered(self):
    tiny = np.array([1e-45, 3e-45, 0., -1e-45, 1e-40, 2e-40], np.float32)
    ballast = np.full(20, -1, np.float32)
    mask = topk.top_k_mask(np.concatenate([tiny, ballast]), 3)
    np.testing.assert_array_equal(mask[:6], [0, 1, 0, 0, 1, 1])

  def test_signed_zeros_tie_and_the_earlier_wins(self):
    scores = jnp.array([-0., 0.] * 20)
    np.testing.assert_array_equal(topk.top_k_mask(scores, 3),
                                  np.arange(40) < 3)

  def test_smaller_k_is_subset_of_larger(self):
    scores = np.round(np.random.default_rng(0).normal(size=(30, 20)) * 3)
    masks = [np.asarray(topk.top_k_mask(scores, k))
             for k in range(0, 601, 60)]
    for inner, outer in zip(masks, masks[1:]):
      self.assertFalse(np.any(inner & ~outer))

  @parameterized.parameters(-5, 0, 3, 1000)
  def test_traced_k_is_clipped(self, k):
    scores = jnp.arange(100.)
    mask = jax.jit(topk.top_k_mask)(scores, k)
    self.assertEqual(int(mask.sum()), min(max(k, 0), 100))

  @parameterized.parameters(-1, 101, 2.5)
  def test_impossible_k_is_named(self, k):
    with self.assertRaisesRegex(ValueError, r'`k` \(='):
      topk.top_k_mask(jnp.arange(100.), k)

  def test_integers_and_bools_are_ranked(self):
    ints = jnp.array([5, -7, 2**31 - 1, 0, -2**31, 2**31 - 2] * 4)
    np.testing.assert_array_equal(topk.top_k_mask(ints, 8),
                                  np.tile([0, 0, 1, 0, 0, 1], 4))
    self.assertEqual(int(topk.top_k_mask(ints > 0, 13).sum()), 13)
    with self.assertRaisesRegex(ValueError, 'uint32'):
      topk.top_k_mask(ints.astype(jnp.uint32), 1)

  @parameterized.parameters((0,), (1,), (2,), (0, 2), (1, 2), (-1,))
  def test_entries_compete_only_along_axes(self, *axes):
    scores = np.random.default_rng(3).integers(0, 4, (3, 20, 5)) * 1.
    mask = np.asarray(topk.top_k_mask(scores, 2, axes=axes))
    others = [a for a in range(3) if a not in [b % 3 for b in axes]]
    for index in np.ndindex(*[scores.shape[a] for a in others]):
      pick = [slice(None)] * 3
      for axis, i in zip(others, index):
        pick[axis] = i
      np.testing.assert_array_equal(mask[tuple(pick)],
                                    slow_top_k_mask(scores[tuple(pick)], 2))

  def test_each_competition_may_have_its_own_k(self):
    scores = np.random.default_rng(1).normal(size=(4, 50))
    k = jnp.array([[0], [1], [25], [50]])
    mask = topk.top_k_mask(scores, k, axes=(1,))
    np.testing.assert_array_equal(mask.sum(1), [0, 1, 25, 50])

  @parameterized.parameters((3,), (-4,), (0, 0), (0, -3))
  def test_axes_that_are_none_or_twice_are_named(self, *axes):
    with self.assertRaisesRegex(ValueError, '`axes`'):
      topk.top_k_mask(jnp.ones((2, 3, 4)), 1, axes=axes)

  def test_vmap_equals_axes(self):
    scores = np.round(np.random.default_rng(2).normal(size=(4, 50)) * 2)
    np.testing.assert_array_equal(
        jax.vmap(lambda s: topk.top_k_mask(s, 7))(scores),
        topk.top_k_mask(scores, 7, axes=(1,)))

  def test_count_is_exact_at_twenty_million_entries_with_ties(self):
    """The count is no float32: above 2**24 those are even."""
    scores = np.random.default_rng(4).integers(0, 1000, 20_000_000)
    scores = scores.astype(np.float32)
    mask = np.asarray(jax.jit(topk.top_k_mask)(scores, 16_999_999))
    self.assertEqual(int(mask.sum()), 16_999_999)
    cut = scores[mask].min()
    self.assertTrue(mask[scores > cut].all())
    equal = mask[scores == cut]
    self.assertTrue(np.all(equal[:-1] >= equal[1:]), 'the earlier ties win')

  @parameterized.parameters('normal', 'ties', 'extremes')
  def test_passes_are_few(self, kind):
    scores = awkward_scores(np.random.default_rng(9), 1000, kind)
    passes = []

    def counts(*args):
      passes.append(0)
      return search_counts(*args)

    search_counts = search.counts
    with mock.patch.object(search, 'counts', counts), jax.disable_jit():
      topk.top_k_mask(scores.astype(np.float32), 300)
    self.assertLessEqual(len(passes), 8 if kind == 'normal' else 16 + 6)

  def test_gradients_pass_beside_the_mask(self):
    scores = jnp.asarray(np.random.default_rng(10).normal(size=200))
    mask = topk.top_k_mask(scores, 50)
    grad = jax.jit(jax.grad(lambda x: jnp.sum(
        jnp.where(topk.top_k_mask(x, 50), x, 0.))))(scores)
    np.testing.assert_array_equal(grad, mask)

  def test_strict_promotion_and_debug_flags_are_fine(self):
    scores = jnp.linspace(-1, 1, 200)
    axes = [(0,), (0,)]
    with jax.numpy_dtype_promotion('strict'), jax.debug_infs(True), (
        jax.debug_nans(True)):
      self.assertEqual(int(topk.top_k_mask(scores, 9).sum()), 9)
      self.assertEqual(int(topk.top_k_mask(scores[:20], 9).sum()), 9)
      self.assertEqual(int(topk.top_k_mask(
          scores, 9, among=scores < 0)[:100].sum()), 9)
      counts = topk.joint_counts([scores, scores.astype(jnp.bfloat16)], 9,
                                 axes)
      self.assertEqual(sum(int(count[0]) for count in counts), 9)
      self.assertEqual(int(topk.keep_count(200, jnp.float32(.9))), 20)

  @parameterized.product(
      dtype=(jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn, jnp.int32),
      size=(40, 300))
  def test_among_comes_first_whatever_the_scores(self, dtype, size):
    rng = np.random.default_rng(size)
    among = rng.random(size) < .5
    scores = rng.integers(-3, 4, size).astype(np.float32)
    if dtype == jnp.int32:
      scores[scores == -3] = -2**31
    else:
      scores[scores == -3], scores[scores == 3] = np.nan, -np.inf
    ranks = np.where(np.isnan(scores), -np.inf, scores)
    order = np.lexsort((np.arange(size), -ranks, ~among))
    for k in (0, 5, among.sum() - 1, among.sum(), among.sum() + 3):
      wanted = np.zeros(size, bool)
      wanted[order[:min(k, among.sum())]] = True
      mask = topk.top_k_mask(jnp.asarray(scores, dtype), k,
                             among=jnp.asarray(among))
      np.testing.assert_array_equal(mask & among, wanted)
      self.assertEqual(int(mask.sum()), k)

  @parameterized.parameters('equal', 'rounded', 'zeros')
  def test_ties_take_few_passes(self, kind):
    """Halving alone takes 16 to find the key, and more to find the place."""
    scores = np.abs(np.random.default_rng(3).normal(size=9000))
    scores = {'equal': np.full(9000, .1), 'rounded': .1 * np.round(9 * scores),
              'zeros': np.where(np.arange(9000) % 20, 0, scores)}[kind]
    passes, counts = [], search.counts

    def counted(*args):
      jax.debug.callback(lambda: passes.append(1))
      return counts(*args)

    with mock.patch.object(search, 'counts', counted):
      topk._search_mask(scores.astype(np.float32), jnp.int32(900), (0,))
    jax.effects_barrier()
    self.assertBetween(len(passes), 3, 14)

  @parameterized.parameters(np.uint32, np.uint64)
  def test_a_sum_of_equals_tells_what_they_are(self, kind):
    rng = np.random.default_rng(4)
    bits = 8 * kind(0).nbytes
    count = rng.integers(1, 2**24, size=500).astype(kind)
    each = rng.integers(0, 2**(bits - 24), size=500).astype(kind)
    with jax.enable_x64(bits == 64):
      got = search._quotient(jnp.asarray(count * each), jnp.asarray(count))
    np.testing.assert_array_equal(got, each)

  def test_compiles_to_no_sort(self):
    text = jax.jit(topk.top_k_mask).lower(
        jnp.zeros((300, 100)), 5).compile().as_text()
    self.assertEqual(re.findall(r'= \S+ (?:sort|topk|custom-call)\(', text), [])

  @parameterized.parameters(jnp.float32, jnp.bfloat16)
  def test_no_temporary_array_is_kept(self, dtype):
    scores = jax.ShapeDtypeStruct((300, 1000), dtype)
    with jax.set_mesh(make_mesh((1,), ('x',))):
      compiled = jax.jit(topk.top_k_mask).lower(scores, 5).compile()
    self.assertLess(compiled.memory_analysis().temp_size_in_bytes, 10_000)

  @parameterized.parameters(True, False)
  def test_inside_shard_map_each_device_chooses_its_own(self, check_vma):
    mesh, spec = make_mesh((8,), ('x',)), PartitionSpec('x')
    scores = np.round(np.random.default_rng(11).normal(size=(8, 200)) * 3)

    def choose(scores):
      scores = scores[0]
      counts = topk.joint_counts([scores, scores[:30]], 50, [(0,), (0,)])
      return topk.top_k_mask(scores, 50)[None], jnp.stack(counts).T

    mapped = jax.jit(jax.shard_map(choose, mesh=mesh, in_specs=spec,
                                   out_specs=spec, check_vma=check_vma))
    masks, counts = mapped(scores)
    np.testing.assert_array_equal(masks, topk.top_k_mask(scores, 50,
                                                         axes=(1,)))
    np.testing.assert_array_equal(counts.sum(1), 50)
    text = mapped.lower(scores).compile().as_text()
    self.assertEqual(re.findall(GATHERS + '|all-reduce', text), [])

  def test_a_pass_is_one_all_reduce(self):
    mesh = make_mesh((8,), ('x',))
    scores = jax.ShapeDtypeStruct(
        (64, 32), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec('x')))
    for context in (contextlib.nullcontext(), jax.set_mesh(mesh)):
      with context:
        text = jax.jit(lambda scores: topk.top_k_mask(scores, 700)).lower(
            scores).compile().as_text()
      self.assertLen(re.findall(r' all-reduce(?:-start)?\(', text), 1)

  @parameterized.product(axis_type=(AxisType.Auto, AxisType.Explicit),
                         spec=(('x', None), (None, 'x'), ('x', 'y'),
                               (('x', 'y'), None)))
  def test_sharded_array_is_never_gathered(self, axis_type, spec):
    mesh = make_mesh((4, 2), ('x', 'y'), axis_type)
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    plain, want = ties_and_their_mask()
    with jax.set_mesh(mesh):
      scores = jax.device_put(plain.astype(np.float32), sharding)
      compiled = jax.jit(topk.top_k_mask).lower(scores, 700).compile()
      mask = compiled(scores, 700)
    self.assertEqual(re.findall(GATHERS, compiled.as_text()), [])
    self.assertIn('all-reduce', compiled.as_text())
    self.assertTrue(mask.sharding.is_equivalent_to(sharding, 2))
    np.testing.assert_array_equal(mask, want)


if __name__ == '__main__':
  absltest.main()
