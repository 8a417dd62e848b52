"""Choosing the k largest entries of one array: exactly k, without sorting."""

from collections.abc import Sequence
import functools
import math
import typing
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from sparse_jax import checks
from sparse_jax.masks import search

_LARGEST_SIZE = 2**31 - 1
# Up to this many competitors along one axis, or entries in all, each is
# compared with each other directly.
_FEW, _TINY = 16, 128


@typing.overload
def keep_count(size: int, sparsity: float) -> int: ...


@typing.overload
def keep_count(size: int | jax.Array,
               sparsity: float | jax.Array) -> int | jax.Array: ...


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
  return jnp.maximum(whole + up.astype(jnp.uint32), 1).astype(jnp.int32)


def _wide_product(x: jax.Array, y) -> tuple[jax.Array, jax.Array]:
  """The upper and lower 32 bits of x * y, by products of 16-bit halves."""
  mask = jnp.uint32(0xFFFF)
  x1, x0 = x >> 16, x & mask
  y1, y0 = jnp.uint32(y >> 16), jnp.uint32(y & 0xFFFF)
  outer, inner, lowest = x0 * y1, x1 * y0, x0 * y0
  middle = (lowest >> 16) + (outer & mask) + (inner & mask)
  high = x1 * y1 + (outer >> 16) + (inner >> 16) + (middle >> 16)
  return high, (middle << 16) | (lowest & mask)


def _as_ordered(scores: jax.Array) -> jax.Array:
  """What has fewer than 16 bits, and bools and short integers, as float32.

  Some 8-bit floats have no infinity, some no -0 but a NaN in its place.
  """
  kind = scores.dtype
  floating = jnp.issubdtype(kind, jnp.floating)
  if kind.itemsize < 2 or (kind.itemsize < 4 and not floating):
    return scores.astype(jnp.float32)
  if not floating and kind != jnp.int32:
    raise ValueError(f'`scores` (of dtype {kind}) must be floating, bool or '
                     'an integer of at most 32 signed bits.')
  return scores


def top_k_mask(scores: jax.Array, k: int | jax.Array, *,
               axes: tuple[int, ...] | None = None,
               among: jax.Array | None = None) -> jax.Array:
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
    among: bool[...], the shape of `scores`: what comes first, whatever the
      scores; the others rank below and equal. None means all.

  Returns:
    bool[...], the shape of `scores`.

  Raises:
    ValueError: if a concrete `k` is outside [0, size], `scores` too large, or
      an axis is out of range or given twice.

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
  axes = _checked_axes(axes, scores.ndim)
  size = math.prod(scores.shape[axis] for axis in axes)
  if size > _LARGEST_SIZE:
    raise ValueError(f'`scores` (of shape {scores.shape}) must have fewer than '
                     '2**31 competing entries.')
  k = _checked_k(k, size)
  if size == 0 or scores.size == 0:
    return jnp.zeros(scores.shape, bool)
  return _mask(_as_ordered(scores), k, tuple(sorted(axes)), among)


@functools.partial(jax.jit, static_argnums=2)
def _mask(scores: jax.Array, k: jax.Array, axes: tuple[int, ...],
          among: jax.Array | None) -> jax.Array:
  # Whatever stands for last place stays in here: `jax_debug_nans` looks at
  # the results of compiled functions.
  scores = lax.stop_gradient(scores)
  if among is not None:
    scores = _only(among, scores)
  if len(axes) == 1 and scores.shape[axes[0]] <= _FEW:
    return _rank_mask(search.keys_of(scores), k, axes[0])
  if scores.size <= _TINY and k.ndim == 0 and len(axes) == scores.ndim:
    keys = search.keys_of(scores).ravel()
    return _rank_mask(keys, k, 0).reshape(scores.shape)
  return _search_mask(scores, k, axes)


def _only(among: jax.Array, scores: jax.Array) -> jax.Array:
  """Scores with the lowest of all, which no other has, outside `among`."""
  if jnp.issubdtype(scores.dtype, jnp.integer):
    low = jnp.iinfo(scores.dtype).min
    return jnp.where(among, jnp.maximum(scores, low + 2), low)
  scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
  return jnp.where(among, scores, jnp.nan)


def _checked_axes(axes, ndim: int) -> tuple[int, ...]:
  """The axes as 0, ..., ndim - 1, each once."""
  own = tuple(axis % ndim for axis in axes if -ndim <= axis < ndim)
  if len(set(own)) < len(axes):
    raise ValueError(f'`axes` (={axes!r}) must be different axes of `scores`, '
                     f'which has {ndim}.')
  return own


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


def _search_mask(scores: jax.Array, k: jax.Array, axes) -> jax.Array:
  """Keys above the k-th largest, and of its equals the earliest.

  One loop does both searches, first for the key and then, where more equals
  reach it than are wanted, for the place of the last: so that it compiles
  once.
  """
  size = math.prod(scores.shape[axis] for axis in axes)
  lowest = search.lowest_key(scores.dtype)

  def ranked(scores, size, cut):
    """The keys; then those equal to the one found, the earlier the higher."""
    keys = search.keys_of(scores)
    place = _countdown(size.astype(keys.dtype), keys.shape, axes)
    equal = keys == search.key_at(cut.key, lowest)
    places = jnp.where(equal, place, 0) + lowest
    return keys, jnp.where(cut.by_place > 0, places, keys)

  def count(operands, cut, probes, ramp):
    return search.counts(ranked(*operands, cut)[1], probes, ramp, axes, lowest)

  cut = search.whole(search.zeros(scores, axes), _like(k, scores.ndim), size,
                     lowest)
  operands = scores, jnp.asarray(size, jnp.int32)
  cut = search.narrow(cut, operands, count,
                      functools.partial(_turn_to_places, size=size))
  keys, values = ranked(*operands, cut)
  above = (cut.by_place > 0) & (keys > search.key_at(cut.key, lowest))
  return above | (values >= search.key_at(cut.low, lowest))


def _turn_to_places(cut: search.Cut, size: int) -> search.Cut:
  """Starts the second search where the first ended among equals."""
  turns = (cut.reached != cut.k) & ~search.is_open(cut) & (cut.by_place == 0)
  none = jnp.zeros_like(cut.k)
  second = search.Cut(none, none + (size + 1), none + size, none,
                      cut.k - cut.passed, none + 1, cut.low, none, none)
  return search.Cut(*(jnp.where(turns, new, old)
                      for new, old in zip(second, cut)))


def _countdown(size: jax.Array, shape, axes) -> jax.Array:
  """`size` less the row-major index of each entry among its competitors."""
  place, stride = jnp.broadcast_to(size, shape), 1
  for axis in sorted(axes, reverse=True):
    place -= lax.broadcasted_iota(size.dtype, shape, axis) * stride
    stride *= shape[axis]
  return place


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
  with jax.numpy_dtype_promotion('standard'):  # Widening changes no order.
    kind = jnp.result_type(*map(_as_ordered, scores))
  scores = [lax.stop_gradient(each.astype(kind)) for each in scores]
  lowest = search.lowest_key(kind)
  cut = _joint_cut(scores, lowest, jnp.asarray(k))
  exact = cut.reached == cut.k  # Then all that reach `low` stay.
  first, last = (search.key_at(end, lowest) for end in (
      jnp.where(exact, cut.low, cut.high), cut.low))
  keys = [search.keys_of(each) for each in scores]
  above = [search.tally(each >= first, own) for each, own in zip(keys, axes)]
  equal = [search.tally((each == last) & ~exact, own)
           for each, own in zip(keys, axes)]
  room, given = cut.k.astype(jnp.int32) - sum(map(_whole, above)), []
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


def _joint_cut(scores: list[jax.Array], lowest: int,
               k: jax.Array) -> search.Cut:
  """An interval of scalars that holds the k-th largest key of all arrays."""
  def of_all(each):
    return tuple(range(each.ndim))

  def count(scores, cut, probes, ramp):
    del cut
    like = lambda ends, each: [_like(end, each.ndim) for end in ends]
    reached = [search.counts(search.keys_of(each), like(probes, each),
                             like(ramp, each), of_all(each), lowest)
               for each in scores]
    return [sum(own.reshape(()) for own in counts)
            for counts in zip(*reached)]

  none: Any = sum(search.zeros(each, of_all(each)).reshape(())
                  for each in scores)
  size = sum(each.size for each in scores)
  return search.narrow(search.whole(none, k, size, lowest), scores, count)
