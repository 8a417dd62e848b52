"""Matrices in a TPU's memory head by head, where columns are heads'.

A chip keeps an array in tiles of 8 x 128. To split the columns of a matrix into
heads of attention moves all of it, unless the columns of each head lie
together; the kernels read and write them so. No number changes.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from sparse_jax.blocks.tiles import Heads

_SUBLANES = 16  # Rows of a tile of 16-bit entries.


class Head(NamedTuple):
  """A part of a matrix that lies by itself: rows of a sequence, columns."""

  length: int
  size: int


def fit(heads: Heads | None, batch: int, rows: int
        ) -> tuple[int, tuple[Head | None, Head | None]]:
  """How a product of panels can read and write heads.

  Args:
    heads: what is known of them; a tile holds whole ones.
    batch: rows of both matrices.
    rows: the most rows of a panel.

  Returns:
    The rows of a panel, which holds whole sequences or a part of one, and the
    Head of each matrix: None where it has none, or sequences do not fit.

  Example:
    >>> fit(Heads(768, 128, None), 1536, 1024)
    (768, (Head(length=768, size=128), None))
    >>> fit(Heads(100, 128, None), 1600, 1024), fit(Heads(32, 128, 128), 32, 8)
    ((1024, (None, None)), (8, (None, None)))
  """
  if heads is None or batch % heads.length or heads.length % _SUBLANES:
    return rows, (None, None)
  if heads.length <= rows:
    fewer = rows - rows % heads.length
  else:
    fewer = max((n for n in range(_SUBLANES, rows + 1, _SUBLANES)
                 if heads.length % n == 0), default=0)
  if 2 * fewer < rows:
    return rows, (None, None)
  first, second = (Head(heads.length, size) if size else None
                   for size in (heads.inputs, heads.outputs))
  return fewer, (first, second)


def apart(matrix: jax.Array, head: Head | None) -> jax.Array:
  """[batch, width] as [sequences, heads, length, size]; else as it is."""
  if head is None:
    return matrix
  return matrix.reshape(-1, head.length, matrix.shape[1] // head.size,
                        head.size).swapaxes(1, 2)


def joined(matrix: jax.Array) -> jax.Array:
  """What `apart` took apart.

  Example:
    >>> x = jnp.arange(1024).reshape(4, 256)
    >>> cut = apart(x, Head(2, 128))
    >>> cut.shape, bool((joined(cut) == x).all())
    ((2, 2, 2, 128), True)
  """
  if matrix.ndim == 2:
    return matrix
  count, heads, length, size = matrix.shape
  return matrix.swapaxes(1, 2).reshape(count * length, heads * size)


def spec(shape: tuple[int, int], place: Callable, head: Head | None
         ) -> pl.BlockSpec:
  """A part of a matrix for a grid step; `place` counts parts, (row, column)."""
  if head is None:
    return pl.BlockSpec(shape, place)
  rows, width = shape
  parts = max(head.length // rows, 1)  # Of a sequence.

  def placed(*at):
    row, column = place(*at)
    return row // parts, column, row % parts, 0

  return pl.BlockSpec((max(rows // head.length, 1), width // head.size,
                       min(rows, head.length), head.size), placed)


def height(ref) -> int:
  """In a kernel: rows of a panel."""
  return ref.shape[0] * (1 if len(ref.shape) == 2 else ref.shape[2])


def take(ref, index, size: int) -> jax.Array:
  """In a kernel: [rows, size], the columns of a tile."""
  if len(ref.shape) == 2:
    return ref[:, _strip(index, size)]
  count = size // ref.shape[3]
  parts = [ref[:, index * count + i].reshape(height(ref), -1)
           for i in range(count)]
  return parts[0] if count == 1 else jnp.concatenate(parts, axis=1)


def put(ref, index, tile: jax.Array) -> None:
  """In a kernel: writes the columns of a tile."""
  if len(ref.shape) == 2:
    ref[:, _strip(index, tile.shape[1])] = tile
    return
  sequences, _, length, size = ref.shape
  count = tile.shape[1] // size
  for i in range(count):
    ref[:, index * count + i] = tile[:, i * size:(i + 1) * size].reshape(
        sequences, length, size)


def _strip(index, size):
  return pl.ds(pl.multiple_of(index * size, size), size)
