"""Narrowing an interval of integer keys down to the k-th largest.

A float is turned into an integer of the same order. Each pass counts how many
keys reach a few candidates. A pass reads the scores once, keeps nothing, and
leaves a handful of numbers; where the scores are split over devices it is one
small all-reduce, and they are never gathered.
"""

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from sparse_jax.masks import placing


def lowest_key(dtype) -> int:
  """The key of NaN, a negative number n. The highest key is -2 - n."""
  if dtype == jnp.int32:
    return -2**31
  bits = f'int{8 * dtype.itemsize}'
  return -2 - int(np.asarray(jnp.inf, dtype).view(bits))


def keys_of(scores: jax.Array) -> jax.Array:
  """Integers in the order of the scores; NaN is below all.

  Works on the bits alone: -0 equals +0, subnormals keep their order even
  where arithmetic would flush them to zero. Signed: processors compare those
  faster. The distance of a key from the lowest is its position, unsigned.

  Args:
    scores: float[...] of 16, 32 or 64 bits, or int32[...].

  Returns:
    int32[...] (int64 for 64-bit scores).
  """
  lowest, width = lowest_key(scores.dtype), 8 * scores.dtype.itemsize
  if scores.dtype == jnp.int32:  # The two lowest share a key.
    return jnp.maximum(scores, lowest + 1) - 1
  bits = lax.bitcast_convert_type(scores, jnp.dtype(f'int{width}'))
  bits = bits.astype(jnp.int64 if width == 64 else jnp.int32)
  magnitude, sign = bits & (2**(width - 1) - 1), jnp.where(bits < 0, -1, 0)
  return jnp.where(magnitude > -2 - lowest, lowest, (magnitude ^ sign) - sign)


def key_at(position: jax.Array, lowest: int) -> jax.Array:
  """The key at a position."""
  width = 8 * position.dtype.itemsize
  key = lax.bitcast_convert_type(position, jnp.dtype(f'int{width}'))
  return key + lowest


# What a pass does beside counting: add up the keys that lie in the interval,
# then probe on both sides of the only key that can have this sum.
ADD, TRY = 1, 2


class Cut(NamedTuple):
  """An interval that holds the k-th largest key, then the k-th place.

  All are unsigned and of one shape, keys given by their positions.
  """

  low: jax.Array  # `reached` are >= low, at least k.
  high: jax.Array  # `passed` are >= high, fewer than k.
  reached: jax.Array
  passed: jax.Array
  k: jax.Array
  by_place: jax.Array  # 1 once the key is found and places are searched.
  key: jax.Array  # The key found.
  stage: jax.Array  # Of a search among ties: 0, ADD or TRY.
  hint: jax.Array  # The one key of the interval, if it has but one.


def zeros(scores: jax.Array, axes) -> jax.Array:
  """0 for each competition.

  Made from the scores, so that inside `shard_map` it varies over the mesh like
  what the loop makes of it; the compiler sees that it is 0.
  """
  keys = keys_of(scores)
  word = jnp.uint64 if keys.dtype.itemsize == 8 else jnp.uint32
  return jnp.sum(keys * 0, axis=axes, keepdims=True, dtype=word)


def whole(none: jax.Array, k: jax.Array, size: int, lowest: int) -> Cut:
  """The interval of all keys; k = 0 wants one above every key."""
  k, top = none + k.astype(none.dtype), none + none.dtype.type(-1 - 2 * lowest)
  return Cut(jnp.where(k > 0, none, top), top, jnp.where(k > 0, size, none),
             none, k, none, none, none, none)


def narrow(cut: Cut, operands, count, settle=lambda cut: cut) -> Cut:
  """Narrows an interval, pass by pass, until it is closed.

  Args:
    cut: where to start.
    operands: what is counted, a tree of arrays.
    count: from `operands`, the interval, a list of probes and a ramp, both
      given by positions, to how many reach each probe, and the sum of `counts`
      for the ramp.
    settle: what to do with the interval after a pass.

  Returns:
    An interval of which `reached` is k, or that holds one key.
  """
  def one_pass(ends):
    # XLA would do before the loop, and keep, what does not depend on the
    # interval: whole arrays of keys and places. So let all depend on it.
    held, ends = lax.optimization_barrier((operands, ends))
    old = cut = Cut(*ends)
    *probes, last = _probes(cut)
    adds = cut.stage == ADD
    ramp = (jnp.where(adds, cut.low, last - 1), jnp.where(adds, cut.high, last))
    *reached, total = count(held, cut, probes, ramp)
    for probe, number in zip(probes, reached):
      cut = _tighten(cut, probe, number)
    cut = _tighten(cut, jnp.where(adds, cut.low, last),
                   jnp.where(adds, cut.reached, total))
    return jnp.stack(settle(_next_stage(old, cut, total)))

  return Cut(*lax.while_loop(lambda ends: jnp.any(is_open(Cut(*ends))),
                             one_pass, jnp.stack(cut)))


def _next_stage(old: Cut, cut: Cut, total) -> Cut:
  """What the next pass does, after one from `old` to `cut`.

  Halving an interval finds a key that many scores share bit by bit. Where a
  pass leaves all scores of the interval in it, they may all be equal; then
  their sum says which key they are.
  """
  kind = cut.low.dtype
  width, inside = old.high - old.low, old.reached - old.passed
  each = _quotient(total - old.passed * width, inside)
  stuck = (cut.reached == old.reached) & (cut.passed == old.passed)
  adds = old.stage == ADD
  return cut._replace(
      stage=jnp.where(adds, kind.type(TRY), jnp.where(stuck, kind.type(ADD),
                                                      kind.type(0))),
      hint=jnp.where(adds, old.low + jnp.minimum(each, width - 1), cut.hint))


def _quotient(total: jax.Array, count: jax.Array) -> jax.Array:
  """The least number of which `count` add up to `total`, in modular words."""
  kind = count.dtype.type
  twos = 8 * count.dtype.itemsize - 1 - lax.clz(count & (~count + kind(1)))
  odd = count >> twos
  inverse = odd * kind(3) ^ kind(2)  # Of 5 bits; each turn has twice as many.
  for _ in range(4):
    inverse *= kind(2) - odd * inverse
  return ((total >> twos) * inverse) & (~kind(0) >> twos)


def is_open(cut: Cut) -> jax.Array:
  return (cut.reached != cut.k) & (cut.high - cut.low > 1)


def _tighten(cut: Cut, probe, reached) -> Cut:
  """Moves the end of the interval that the probe improves, if any."""
  low = (reached >= cut.k) & (probe > cut.low)
  high = (reached < cut.k) & (probe < cut.high)
  return cut._replace(low=jnp.where(low, probe, cut.low),
                      high=jnp.where(high, probe, cut.high),
                      reached=jnp.where(low, reached, cut.reached),
                      passed=jnp.where(high, reached, cut.passed))


def _probes(cut: Cut) -> list[jax.Array]:
  """The quarters of the interval, and two around the place to expect.

  The quarters need at most 16 passes for 32 bits, whatever the scores. Where
  keys lie evenly in the interval, as they nearly do once it is short, the
  k-th of them is where its rank says, and the others save a third of these.
  Where one key is all that the interval may have, they stand at both sides.
  """
  width, kind = cut.high - cut.low, cut.low.dtype
  step = (width >> 2) + (width & 3 > 0).astype(kind)
  inside = jnp.maximum(cut.reached - cut.passed, 1).astype(jnp.float32)
  share = (cut.reached - cut.k).astype(jnp.float32) / inside
  offsets = [step, step * 2, step * 3]
  for guess in (share - 2.**-6, share + 2.**-6):
    guess = jnp.clip(guess, 0., 1. - 2.**-20) * width.astype(jnp.float32)
    offsets.append(guess.astype(kind))
  *quarters, below, above = [jnp.minimum(cut.low + offset, cut.high - 1)
                             for offset in offsets]
  tries, least = cut.stage == TRY, cut.low + 1
  below = jnp.where(tries, jnp.clip(cut.hint, cut.low, cut.high), below)
  above = jnp.where(tries, jnp.clip(cut.hint + 1, cut.low, cut.high), above)
  return [*quarters, below, jnp.maximum(above, least)]


def counts(keys: jax.Array, probes: list[jax.Array], ramp, axes, lowest: int,
           ) -> list[jax.Array]:
  """How many keys reach each probe, in one pass over the keys.

  Args:
    keys: what is counted.
    probes: positions.
    ramp: two positions. The last result is the sum of how far each key is
      beyond the first, no further than the second: of two neighbours, how many
      keys reach the second.
    axes: along which keys are counted.
    lowest: the key at position 0.
  """
  word = jnp.uint64 if keys.dtype.itemsize == 8 else jnp.uint32

  def terms(keys, first, last, *probes):
    beyond = jnp.clip(keys, first, last) - first
    return [*(keys >= probe for probe in probes),
            lax.bitcast_convert_type(beyond, word)]

  ends = (key_at(position, lowest) for position in (*ramp, *probes))
  return _sums(terms, (keys, *ends), axes, word)


def tally(marked: jax.Array, axes) -> jax.Array:
  """int32: how many are True along axes, which stay as 1."""
  return _sums(lambda marked: [marked, ~marked], (marked,), axes, jnp.int32)[0]


def _sums(terms, operands, axes, word) -> list[jax.Array]:
  """The sums of `terms(*operands)`, bools or words, in one pass.

  XLA makes plain sums one pass and, over several devices, one small
  all-reduce. Its CPU compiler makes them several slow passes, each over an
  array of words that it writes for it, and one that writes nothing of a
  reduction of several operands, which over devices would be gathers.
  """
  def plain(*operands):
    return [jnp.sum(term, axis=axes, keepdims=True, dtype=word)
            for term in terms(*operands)]

  def at_once(*operands):
    words = tuple(term.astype(word) for term in terms(*operands))
    totals = lax.reduce(words, (word(0),) * len(words), _add_all, axes)
    # All are wanted: of one operand it is a plain sum again.
    totals = lax.optimization_barrier(totals)
    return [lax.expand_dims(total, axes) for total in totals]

  if _may_be_split(operands):
    return plain(*operands)
  return lax.platform_dependent(*operands, cpu=at_once, default=plain)


def _may_be_split(arrays) -> bool:
  """Whether XLA may split arrays over CPUs, as far as one can know here.

  Where `jit` was given `in_shardings` alone no type tells; then the devices of
  this process do, if they are CPUs. Of others both ways are right.
  """
  if placing.mesh_of(*arrays).empty:
    return jax.device_count() > 1
  return placing.is_shared(*arrays)


def _add_all(xs, ys):
  return tuple(x + y for x, y in zip(xs, ys))
