"""Choosing the k largest entries of one array: exactly k, without sorting.

A float is turned into an unsigned integer of the same order. The k-th largest
integer is then found by narrowing an interval: each pass counts how many keys
reach a candidate. A pass reads the array once and leaves one number, so the
search costs a handful of reads, and on a sharded array each pass is a single
scalar all-reduce; the array itself is never gathered.
"""

from collections.abc import Sequence
import functools
import math
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from sparse_jax import checks

_LARGEST_SIZE = 2**31 - 1
# Up to this many competitors along one axis, or entries in all, each is
# compared with each other directly.
_FEW, _TINY = 16, 128


def keep_count(size: int | jax.Array,
               sparsity: float | jax.Array) -> int | jax.Array:
  """How many of `size` entries stay at a sparsity: max(1, round((1 - s) n)).

  Halves round to even. A Python sparsity gives a Python integer, exact for
  every size below 2**31; a traced one, or a traced size, gives an int32,
  worked out in integers, so that it does not lose counts above 2**24 as
  float32 arithmetic would.

  Args:
    size: the number of entries, at least 1; or an int32 array of such, where
      0 gives 0.
    sparsity: fraction that becomes zero, in [0, 1).

  Returns:
    The count, an int (or int32 if an argument is an array).

  Raises:
    ValueError: if `size` is below 1 or too large, or `sparsity` out of range.

  Example:
    >>> keep_count(10, 0.8), keep_count(4, 0.999), keep_count(5, 0.5)
    (2, 1, 2)
  """
  if isinstance(size, jax.Array):
    sparsity = jnp.asarray(sparsity, jnp.float32)
    return jnp.minimum(_traced_keep_count(size.astype(jnp.uint32), sparsity),
                       size)
  checks.check_count('size', size, least=1)
  if size > _LARGEST_SIZE:
    raise ValueError(f'`size` (={size}) must be below 2**31.')
  if isinstance(sparsity, jax.Array):
    return _traced_keep_count(size, sparsity)
  sparsity = checks.check_sparsity('sparsity', sparsity)
  return max(1, round((1 - sparsity) * size))


def _traced_keep_count(size, sparsity: jax.Array) -> jax.Array:
  """max(1, round(size * density)) with the density as a multiple of 2**-31."""
  scale = jnp.float32(2.0**31)
  sparse = (jnp.clip(sparsity.astype(jnp.float32), 0, 1) * scale)
  density = jnp.uint32(2**31) - sparse.astype(jnp.uint32)
  high, low = _wide_product(density, size)
  whole = (high << 1) | (low >> 31)
  rest, half = low & jnp.uint32(2**31 - 1), jnp.uint32(2**30)
  up = (rest > half) | ((rest == half) & (whole & 1 == 1))
  return jnp.maximum(whole + up, 1).astype(jnp.int32)


def _wide_product(x: jax.Array, y) -> tuple[jax.Array, jax.Array]:
  """The upper and lower 32 bits of x * y, by products of 16-bit halves."""
  mask = jnp.uint32(0xFFFF)
  x1, x0 = x >> 16, x & mask
  y1, y0 = jnp.uint32(y >> 16), jnp.uint32(y & 0xFFFF)
  outer, inner, lowest = x0 * y1, x1 * y0, x0 * y0
  middle = (lowest >> 16) + (outer & mask) + (inner & mask)
  high = x1 * y1 + (outer >> 16) + (inner >> 16) + (middle >> 16)
  return high, (middle << 16) | (lowest & mask)


def sortable_keys(scores: jax.Array) -> jax.Array:
  """Unsigned integers in the order of the scores; NaN is 0, below them all.

  Works on the bits alone: -0 equals +0, subnormals keep their order even
  where arithmetic would flush them to zero.

  Args:
    scores: any floating dtype or int32, any shape.

  Returns:
    uint32 (uint64 for 64-bit scores), same shape, below 2**width - 1.
  """
  if scores.dtype == jnp.int32:  # The two lowest integers share a key.
    above = lax.bitcast_convert_type(jnp.maximum(scores, -2**31 + 1),
                                     jnp.uint32)
    return above + jnp.uint32(2**31 - 1)
  width, half, infinity = _key_constants(scores.dtype)
  bits = lax.bitcast_convert_type(scores, jnp.dtype(f'uint{width}'))
  bits = bits.astype(jnp.uint64 if width == 64 else jnp.uint32)
  half, infinity = bits.dtype.type(half), bits.dtype.type(infinity)
  magnitude = bits & (half - bits.dtype.type(1))
  keys = jnp.where(bits >= half, half - magnitude, half + magnitude)
  return jnp.where(magnitude > infinity, bits.dtype.type(0), keys)


def _key_constants(dtype) -> tuple[int, int, int]:
  """Bits of a dtype, the weight of its sign bit, its largest magnitude."""
  if dtype == jnp.int32:
    return 32, 2**31, 2**31 - 2
  width = jnp.dtype(dtype).itemsize * 8
  infinity = np.asarray(jnp.inf, dtype).view(f'uint{width}')
  return width, 2**(width - 1), int(infinity)


def _as_ordered(scores: jax.Array) -> jax.Array:
  """Integers and bools in a form that `sortable_keys` reads in order."""
  if jnp.issubdtype(scores.dtype, jnp.floating):
    return scores
  if scores.dtype == jnp.bool_ or scores.dtype.itemsize < 4:
    return scores.astype(jnp.float32)
  if scores.dtype != jnp.int32:
    raise ValueError(f'`scores` (of dtype {scores.dtype}) must be floating, '
                     'bool or an integer of at most 32 signed bits.')
  return scores


def top_k_mask(scores: jax.Array, k: int | jax.Array, *,
               axes: tuple[int, ...] | None = None) -> jax.Array:
  """Marks the k largest entries of an array.

  Exactly k entries are True. Equal scores are settled by position: the
  earlier in row-major order wins. NaN ranks below every number. Nothing is
  sorted, and a sharded array is never gathered (its masks come out sharded
  alike; each pass of the search is one scalar all-reduce).

  Law: for k1 <= k2 the mask of k1 lies inside the mask of k2. It is why a
  forward set lies inside its backward set when both use one score.

  Args:
    scores: [...], the worth of each entry; only their order matters. Floating
      (float32, bfloat16, float16 are all exact), integer or bool; fewer than
      2**31 entries.
    k: how many to keep: an int, or a traced integer array that broadcasts
      against `scores` reduced over `axes` (kept as 1). A traced k outside
      [0, size] is clipped.
    axes: the axes over which entries compete; every other axis indexes
      independent competitions. None means all.

  Returns:
    bool[...], the shape of `scores`.

  Raises:
    ValueError: if a concrete `k` is outside [0, size] or `scores` too large.

  Example:
    >>> scores = jnp.array([[3., -5., 1.], [1., 0., 2.]])
    >>> top_k_mask(scores, 3).astype(int)
    Array([[1, 0, 1],
           [0, 0, 1]], dtype=int32)

  Reference:
    Jayakumar et al., Top-KAST, 2020, https://arxiv.org/abs/2106.03517, sets A
    and B. The paper ranks by magnitude; here the caller does that first.
  """
  scores = jnp.asarray(scores)
  if axes is None:
    axes = tuple(range(scores.ndim))
  axes = tuple(axis % scores.ndim for axis in axes)
  size = math.prod(scores.shape[axis] for axis in axes)
  if size > _LARGEST_SIZE:
    raise ValueError(f'`scores` (of shape {scores.shape}) must have fewer than '
                     '2**31 competing entries.')
  k = _checked_k(k, size)
  if size == 0 or scores.size == 0:
    return jnp.zeros(scores.shape, bool)
  return _mask(_as_ordered(scores), k, tuple(sorted(axes)))


@functools.partial(jax.jit, static_argnums=2)
def _mask(scores: jax.Array, k: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  keys = sortable_keys(scores)
  if len(axes) == 1 and scores.shape[axes[0]] <= _FEW:
    return _rank_mask(keys, k, axes[0])
  if keys.size <= _TINY and k.ndim == 0 and len(axes) == keys.ndim:
    return _rank_mask(keys.ravel(), k, 0).reshape(keys.shape)
  _, half, infinity = _key_constants(scores.dtype)
  return _search_mask(keys, k, axes, half + infinity + 1)


def _checked_k(k: int | jax.Array, size: int) -> jax.Array:
  if not isinstance(k, jax.core.Tracer):
    values = np.asarray(k)
    if not np.issubdtype(values.dtype, np.integer):
      raise ValueError(f'`k` (={k!r}) must be an integer.')
    if values.size and (values.min() < 0 or values.max() > size):
      raise ValueError(f'`k` (={k!r}) must be in [0, {size}], the number of '
                       'competing entries.')
  return jnp.clip(jnp.asarray(k, jnp.int32), 0, size)


def _rank_mask(keys: jax.Array, k: jax.Array, axis: int) -> jax.Array:
  """Few competitors: an entry stays if fewer than k others beat it."""
  size = keys.shape[axis]
  keys = jnp.moveaxis(keys, axis, -1)
  k = jnp.moveaxis(_like(k, keys.ndim), axis, -1)
  earlier = np.tri(size, size, -1, bool)
  earlier = earlier.reshape((1,) * (keys.ndim - 1) + (size, size))
  mine, rival = keys[..., :, None], keys[..., None, :]
  beaten = (rival > mine) | ((rival == mine) & earlier)
  mask = jnp.sum(beaten, axis=-1, dtype=jnp.int32) < k
  return jnp.moveaxis(mask, -1, axis)


def _like(k: jax.Array, ndim: int) -> jax.Array:
  return k if k.ndim == ndim else jnp.broadcast_to(k, (1,) * ndim)


def _search_mask(keys: jax.Array, k: jax.Array, axes, top: int) -> jax.Array:
  """Keys above the k-th largest, and of its equals the earliest.

  One loop does both searches, first for the key and then, where more equals
  reach it than are wanted, for the place of the last: so that it compiles
  once. `top` is a number above every key.
  """
  shape = tuple(1 if i in axes else n for i, n in enumerate(keys.shape))
  k = jnp.broadcast_to(_like(k, keys.ndim), shape).astype(keys.dtype)
  size = keys.dtype.type(math.prod(keys.shape[axis] for axis in axes))
  place = size - _flat_index(keys.shape, axes, keys.dtype)

  def settle(carry):
    ends, ranked = carry
    ends = lax.while_loop(lambda ends: jnp.any(_open(_Cut(*ends))),
                          lambda ends: _narrow(ranked, ends, axes), ends)
    cut = _turn_to_places(_Cut(*ends), size)
    equals = jnp.where(keys == cut.key, place, jnp.zeros((), keys.dtype))
    return jnp.stack(cut), jnp.where(cut.by_place > 0, equals, keys)

  top, none = jnp.full(shape, top, keys.dtype), jnp.zeros(shape, keys.dtype)
  # k = 0 wants an interval above every key.
  start = _Cut(jnp.where(k > 0, none, top), top, jnp.where(k > 0, size, none),
               none, k, none, none)
  ends, ranked = lax.while_loop(
      lambda carry: jnp.any(_open(_Cut(*carry[0]))), settle,
      (jnp.stack(start), keys))
  cut = _Cut(*ends)
  above = (cut.by_place > 0) & (keys > cut.key)
  return above | (ranked >= cut.low)


class _Cut(NamedTuple):
  """An interval that holds the k-th largest key, then the k-th place."""

  low: jax.Array  # `reached` are >= low, at least k.
  high: jax.Array  # `passed` are >= high, fewer than k.
  reached: jax.Array
  passed: jax.Array
  k: jax.Array
  by_place: jax.Array  # 1 once the key is found and places are searched.
  key: jax.Array  # The key found.


def _narrow(ranked: jax.Array, ends: jax.Array, axes) -> jax.Array:
  """One pass: counts what reaches some probes, and tightens the interval."""
  cut = _Cut(*ends)
  probes = _probes(cut)
  for probe, reached in zip(probes, _counts(ranked, probes, axes)):
    cut = _tighten(cut, probe, reached)
  return jnp.stack(cut)


def _open(cut: _Cut) -> jax.Array:
  return (cut.reached != cut.k) & (cut.high - cut.low > 1)


def _turn_to_places(cut: _Cut, size) -> _Cut:
  """Starts the second search where the first ended among equals."""
  turns = (cut.reached != cut.k) & ~_open(cut) & (cut.by_place == 0)
  none = jnp.zeros_like(cut.k)
  second = _Cut(none, none + (size + 1), none + size, none, cut.k - cut.passed,
                none + 1, cut.low)
  return _Cut(*(jnp.where(turns, new, old) for new, old in zip(second, cut)))


def _tighten(cut: _Cut, probe, reached) -> _Cut:
  """Moves the end of the interval that the probe improves, if any."""
  low = (reached >= cut.k) & (probe > cut.low)
  high = (reached < cut.k) & (probe < cut.high)
  return cut._replace(low=jnp.where(low, probe, cut.low),
                      high=jnp.where(high, probe, cut.high),
                      reached=jnp.where(low, reached, cut.reached),
                      passed=jnp.where(high, reached, cut.passed))


def _flat_index(shape, axes, dtype) -> jax.Array:
  """Row-major position of each entry among those it competes with."""
  index, stride = jnp.zeros(shape, dtype), 1
  for axis in sorted(axes, reverse=True):
    index += lax.broadcasted_iota(dtype, shape, axis) * dtype.type(stride)
    stride *= shape[axis]
  return index


def _probes(cut: _Cut) -> list[jax.Array]:
  """The quarters of the interval: at most 16 passes for 32 bits.

  Measured on CPU: interpolating halves the passes, but costs more in each
  pass and in compile time than it saves.
  """
  width = cut.high - cut.low
  step = (width >> 2) + (width & 3 > 0).astype(width.dtype)
  return [jnp.minimum(cut.low + step * width.dtype.type(i), cut.high - 1)
          for i in (1, 2, 3)]


def _counts(keys: jax.Array, probes: list[jax.Array], axes) -> list[jax.Array]:
  """How many keys reach each probe, in one pass over the keys.

  On one device a reduction of several operands reads the keys once; XLA's
  CPU compiler would turn a plain sum into several slower passes. On several
  devices a plain sum becomes one small all-reduce.
  """
  if jax.device_count() > 1:
    reach = keys[None] >= jnp.stack(probes)
    return list(jnp.sum(reach, axis=tuple(a + 1 for a in axes), keepdims=True,
                        dtype=keys.dtype))
  reach = tuple((keys >= probe).astype(keys.dtype) for probe in probes)
  zeros = (jnp.zeros((), keys.dtype),) * len(reach)
  totals = lax.reduce(reach, zeros, _add_all, axes)
  return [lax.expand_dims(total, axes) for total in totals]


def _add_all(xs, ys):
  return tuple(x + y for x, y in zip(xs, ys))


def joint_counts(scores: Sequence[jax.Array], k: int | jax.Array,
                 axes: Sequence[tuple[int, ...]]) -> list[jax.Array]:
  """How many entries of each array are among the k largest of them all.

  Law: `top_k_mask(scores[i], counts[i], axes=axes[i])` together mark exactly
  the k largest of all arrays; equal scores go to the earlier array, the
  earlier slice, the earlier entry.

  Args:
    scores: float[...] arrays, of any shapes; fewer than 2**31 entries in all.
    k: how many to keep of all entries, at least 0: an int or a traced int32[].
    axes: for each array the axes along which entries compete; a count is
      given for every index of its other axes.

  Returns:
    int32 arrays, each the shape of its scores with `axes` as 1.

  Example:
    >>> counts = joint_counts([jnp.array([3., 1.]), jnp.array([2., 5., 4.])],
    ...                       3, [(0,), (0,)])
    >>> [int(count[0]) for count in counts]
    [1, 2]
  """
  kind = jnp.result_type(*scores)
  keys = [sortable_keys(each.astype(kind)) for each in scores]
  k = jnp.asarray(k).astype(keys[0].dtype)
  key = _joint_key(keys, k, kind)
  above = [_tally(each > key, own) for each, own in zip(keys, axes)]
  equal = [_tally(each == key, own) for each, own in zip(keys, axes)]
  room, given = k.astype(jnp.int32) - sum(map(_whole, above)), []
  for more, same in zip(above, equal):
    flat = same.ravel()
    before = jnp.cumsum(flat, dtype=jnp.int32) - flat
    extra = jnp.clip(room - before, 0, flat).reshape(same.shape)
    given.append(more + extra)
    room -= _whole(flat)
  return given


def _whole(counts: jax.Array) -> jax.Array:
  """Their sum, int32[] in 64-bit mode too."""
  return jnp.sum(counts, dtype=jnp.int32)


def _tally(marked: jax.Array, axes) -> jax.Array:
  return jnp.sum(marked, axis=axes, keepdims=True, dtype=jnp.int32)


def _joint_key(keys: list[jax.Array], k: jax.Array, kind) -> jax.Array:
  """The k-th largest key of all arrays."""
  _, half, infinity = _key_constants(kind)
  word = keys[0].dtype.type
  size = word(sum(each.size for each in keys))
  none, top = jnp.zeros_like(k), jnp.full_like(k, half + infinity + 1)
  start = _Cut(jnp.where(k > 0, none, top), top, jnp.where(k > 0, size, none),
               none, k, none, none)

  def narrow(ends):
    cut = _Cut(*ends)
    probes = _probes(cut)
    reached = [0] * len(probes)
    for each in keys:
      shaped = [_like(probe, each.ndim) for probe in probes]
      own = _counts(each, shaped, tuple(range(each.ndim)))
      reached = [sum_ + n.reshape(()) for sum_, n in zip(reached, own)]
    for probe, count in zip(probes, reached):
      cut = _tighten(cut, probe, count)
    return jnp.stack(cut)

  def search(ends):
    cut = _Cut(*ends)
    return cut.high - cut.low > 1

  return _Cut(*lax.while_loop(search, narrow, jnp.stack(start))).low
