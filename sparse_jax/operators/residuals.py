"""What a backward pass keeps: the kept entries alone, and masks as bits.

An array of which k entries are kept is stored as its k values and their
places: as one bit an entry or one integer a value, whichever is smaller.
Packing is elementwise work, a cumulative sum over words of 32 entries and one
gather; nothing is sorted.
"""

import math
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from sparse_jax.masks import placing

_WORD = 32


class Packed(NamedTuple):
  """The kept entries of an array, part by part in row-major order."""

  values: jax.Array  # [parts, k], or the whole array if that is smaller.
  places: jax.Array | None  # Words of bits, positions, or None for the whole.


def pack(x: jax.Array, mask: jax.Array, count: int, *,
         parts: int = 1) -> Packed:
  """Stores the marked entries of an array and drops all others.

  Law: unpack(pack(x, mask, n), like=x) is x where the mask is True and 0
  elsewhere, in the fewest bytes of three: bits, positions, the whole array.

  Args:
    x: [...], any numeric dtype.
    mask: bool[...], the shape of `x`.
    count: entries that there is room for in each part; of more marked ones
      the last, in row-major order, are lost.
    parts: how many equal parts of the leading axis are packed on their own.
      On several devices that divide them each packs its own: nothing moves.

  Returns:
    The packed array.

  Example:
    >>> x, mask = jnp.arange(64.), jnp.arange(64) % 16 == 3
    >>> packed = pack(x, mask, 4)
    >>> packed.values
    Array([[ 3., 19., 35., 51.]], dtype=float32)
    >>> unpack(packed, x).sum()
    Array(108., dtype=float32)
  """
  size = x.size // parts
  kind = _smallest(size, count, x.dtype.itemsize)
  if kind == 'whole':
    return Packed(jnp.where(mask, x, jnp.zeros((), x.dtype)), None)

  def pack_own(x, mask):
    own = x.size // size
    words = _words(split(mask, own))
    places = _each_part(lambda words: _positions(words, count, size), words)
    values = _each_part(
        lambda x, places: x.at[places].get(mode='fill', fill_value=0),
        split(x, own), places)
    return Packed(values, words if kind == 'bits' else places)

  rows = _rows(x, parts)
  if rows:
    return placing.by_rows(pack_own, rows, x, mask)
  return pack_own(x, mask)


def unpack(packed: Packed, like: jax.Array) -> jax.Array:
  """The array of the shape of `like`, with zeros where nothing was kept."""
  values, places = packed
  if places is None:
    return values
  parts, count = values.shape
  size = math.prod(like.shape) // parts

  def spread(values, places):
    return _zeros(size, values.dtype, places).at[places].set(
        values, mode='drop', unique_indices=True, indices_are_sorted=True)

  def unpack_own(values, places):
    if places.dtype == jnp.uint32:
      places = _each_part(lambda words: _positions(words, count, size), places)
    lead = like.shape[:1] and (like.shape[0] * values.shape[0] // parts,)
    return join(_each_part(spread, values, places), lead + like.shape[1:])

  rows = _rows(values, parts)
  if rows:
    return placing.by_rows(unpack_own, rows, values, places)
  return unpack_own(values, places)


def _rows(array, parts: int) -> tuple[str, ...]:
  """Axes of a mesh over which the parts are split; () where they are not."""
  if parts == 1:
    return ()
  rows = placing.row_axes(array)
  sizes = placing.shared_axes(placing.mesh_of(array))
  over = math.prod(sizes[name] for name in rows)
  return rows if over > 1 and parts % over == 0 else ()


def split(x: jax.Array, parts: int) -> jax.Array:
  """[parts, n / parts]: equal parts of the leading axis, each flat.

  In two steps, each of which keeps a sharded leading axis sharded.
  """
  if parts == 1:
    return x.reshape(1, -1)
  return x.reshape(parts, -1, *x.shape[1:]).reshape(parts, -1)


def join(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """The inverse of `split`."""
  parts = x.shape[0]
  if parts == 1:
    return x.reshape(shape)
  return x.reshape(parts, shape[0] // parts, *shape[1:]).reshape(shape)


def _smallest(size: int, count: int, itemsize: int) -> str:
  """The form of the fewest bytes."""
  sizes = {'whole': size * itemsize,
           'bits': count * itemsize + 4 * -(-size // _WORD),
           'positions': count * (itemsize + 4)}
  return min(sizes, key=lambda form: sizes[form])


def _each_part(fn, *arrays):
  """Maps over the leading axis; one part alone needs no batched gather."""
  if arrays[0].shape[0] == 1:
    return fn(*(array[0] for array in arrays))[None]
  return jax.vmap(fn)(*arrays)


def _words(mask: jax.Array) -> jax.Array:
  """uint32[parts, n / 32]: bool[parts, n] as bits, the first one lowest."""
  parts, size = mask.shape
  padded = jnp.pad(mask, ((0, 0), (0, -size % _WORD)))
  octets = jnp.packbits(padded, axis=-1, bitorder='little')
  return lax.bitcast_convert_type(octets.reshape(parts, -1, 4), jnp.uint32)


def _positions(words: jax.Array, count: int, size: int) -> jax.Array:
  """int32[count]: where the bits are set, in order; beyond `size` for none."""
  ends = jnp.cumsum(lax.population_count(words), dtype=jnp.int32)
  starts = jnp.pad(ends, (1, 0))
  # How many words end at or before each slot is the word that it lies in.
  turns = _zeros(count + 1, jnp.int32, ends).at[ends].add(1, mode='drop')
  word = jnp.cumsum(turns, dtype=jnp.int32)[:count]
  slot = jnp.arange(count, dtype=jnp.int32)
  bit = _select_bit(words.at[word].get(mode='clip'),
                    slot - starts.at[word].get(mode='clip'))
  return jnp.where(slot < ends[-1], word * _WORD + bit, size + slot)


def _zeros(size: int, dtype, places: jax.Array) -> jax.Array:
  """Zeros that XLA cannot make before it has made the places.

  Otherwise it makes those of all layers at the start. No place is below 0,
  but that it does not know.
  """
  return jnp.full(size, jnp.any(places[:1] < 0), dtype)


def _select_bit(word: jax.Array, rank: jax.Array) -> jax.Array:
  """The place of the bit of a rank, by halving the word."""
  place = jnp.zeros_like(rank)
  for width in (16, 8, 4, 2, 1):
    low = word & jnp.uint32((1 << width) - 1)
    below = lax.population_count(low).astype(jnp.int32)
    high = rank >= below
    rank = jnp.where(high, rank - below, rank)
    place = jnp.where(high, place + width, place)
    word = jnp.where(high, word >> width, low)
  return place


def mask_bits(mask: jax.Array) -> jax.Array:
  """uint8: eight entries of the last axis in a byte."""
  return jnp.packbits(jnp.atleast_1d(mask), axis=-1)


def bits_mask(bits: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """bool of a shape, from what `mask_bits` made of it."""
  last = shape[-1] if shape else 1
  mask = jnp.unpackbits(bits, axis=-1, count=last)
  return mask.reshape(shape).astype(bool)


@jax.custom_vjp
def gate(x: jax.Array, open_: jax.Array) -> jax.Array:
  """Lets an array, and its gradient, through where a mask is open.

  The backward pass keeps one bit an entry: neither the array nor a mask of
  bytes.

  Args:
    x: float[...].
    open_: bool[...], the shape of `x`.

  Returns:
    x where open, 0 elsewhere.

  Example:
    >>> x, mask = jnp.array([3., -2.]), jnp.array([False, True])
    >>> gate(x, mask)
    Array([ 0., -2.], dtype=float32)
    >>> jax.grad(lambda x: gate(x, mask).sum())(x)
    Array([0., 1.], dtype=float32)
  """
  return jnp.where(open_, x, jnp.zeros((), x.dtype))


def _gate_forward(x, open_):
  return jnp.where(open_, x, jnp.zeros((), x.dtype)), mask_bits(open_)


def _gate_backward(bits, cotangent):
  open_ = bits_mask(bits, cotangent.shape)
  return jnp.where(open_, cotangent, jnp.zeros((), cotangent.dtype)), None


gate.defvjp(_gate_forward, _gate_backward)


def relu(x: jax.Array) -> jax.Array:
  """max(x, 0), whose backward pass keeps one bit an entry.

  `jax.nn.relu` keeps a byte. Between products whose activations are packed,
  the difference is most of what is left.

  Law: value and gradient are those of `jax.nn.relu`.

  Args:
    x: float[...].

  Returns:
    The shape and dtype of `x`.

  Example:
    >>> jax.grad(lambda x: relu(x).sum())(jnp.array([-1., 0., 2.]))
    Array([0., 0., 1.], dtype=float32)
  """
  return gate(x, ~(x <= 0))  # Lets NaN through.
