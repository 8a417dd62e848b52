"""What is kept or dropped together: entries, blocks, N of M, channels, filters.

A structure works on the matrix view of a kernel: [stacked layers..., leading,
rows, columns], where rows are summed over by the product (the inputs of a
layer), columns are its outputs, and leading axes are the positions of a
convolution. It turns scores of entries into scores of groups, says which
groups compete with each other, and spreads the groups' decisions back.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparse_jax import checks


class Unstructured(NamedTuple):
  """Every entry is on its own."""

  def group(self, scores: jax.Array, stacked: int) -> jax.Array:
    del stacked
    return scores

  def spread(self, groups: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    del shape
    return groups

  def competing(self, ndim: int, stacked: int) -> tuple[int, ...]:
    return tuple(range(stacked, ndim))


class Block(NamedTuple):
  """Tiles of rows x columns are kept or dropped whole.

  Attributes:
    shape: (rows, columns) of a tile. Tiles at the edges may be cut short.
    reduce: 'sum' or 'max' of the scores in a tile is the tile's score.

  Example:
    >>> scores = jnp.array([[.5, .5, .9, 0, .6, .6], [.5, .5, .1, 0, .1, .1]])
    >>> Block((2, 2)).group(scores, 0).round(1)
    Array([[2. , 1. , 1.4]], dtype=float32)
    >>> Block((2, 2), reduce='max').group(scores, 0).astype(jnp.bfloat16)
    Array([[0.5, 0.898438, 0.601562]], dtype=bfloat16)

  Reference:
    Jayakumar et al., Top-KAST, 2020, authors' response: sum or maximum of the
    absolute values of a block. The padding at the edges is to the next
    multiple of the tile (JaxPruner pads by the remainder and loses entries).
  """

  shape: tuple[int, int]
  reduce: str = 'sum'

  def group(self, scores: jax.Array, stacked: int) -> jax.Array:
    del stacked
    fill = 0. if self.reduce == 'sum' else -jnp.inf
    tiles = _split(_split(scores, -2, self.shape[0], fill), -1, self.shape[1],
                   fill)
    over = (-3, -1)
    if self.reduce == 'sum':
      return jnp.sum(tiles.astype(jnp.float32), over)
    return jnp.max(tiles, over)

  def spread(self, groups: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    rows, columns = self.shape
    tall = jnp.repeat(groups, rows, -2)[..., :shape[-2], :]
    return jnp.repeat(tall, columns, -1)[..., :shape[-1]]

  def competing(self, ndim: int, stacked: int) -> tuple[int, ...]:
    return tuple(range(stacked, ndim))


class NM(NamedTuple):
  """Of every m consecutive entries along an axis, n are kept.

  Attributes:
    n: entries kept of each group.
    m: the size of a group. A last group cut short keeps n of what it has.
    axis: an axis of the matrix view; -2 are the rows, the axis that the
      product sums over and that sparse hardware needs.

  Reference:
    Zhou et al., Learning N:M, 2021, https://arxiv.org/abs/2102.04010.
  """

  n: int
  m: int
  axis: int = -2

  @property
  def sparsity(self) -> float:
    return 1 - self.n / self.m

  def group(self, scores: jax.Array, stacked: int) -> jax.Array:
    del stacked
    return _split(scores, self.axis, self.m, jnp.nan)

  def spread(self, groups: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    axis = self.axis % len(shape)
    whole = groups.shape[axis] * groups.shape[axis + 1]
    flat = groups.reshape(groups.shape[:axis] + (whole,)
                          + groups.shape[axis + 2:])
    return jax.lax.slice_in_dim(flat, 0, shape[axis], axis=axis)

  def competing(self, ndim: int, stacked: int) -> tuple[int, ...]:
    del stacked
    return (self.axis % (ndim - 1) + 1,)


class Channel(NamedTuple):
  """One decision for each pair of input and output channel.

  The score of a pair is the sum over its spatial positions (L1, if the scores
  are magnitudes). On a dense layer or a 1 x 1 convolution it is unstructured.

  Reference:
    Raihan and Aamodt, SWAT, 2020, https://arxiv.org/abs/2001.01969,
    structured SWAT.
  """

  def group(self, scores: jax.Array, stacked: int) -> jax.Array:
    leading = tuple(range(stacked, scores.ndim - 2))
    return jnp.sum(scores.astype(jnp.float32), leading, keepdims=True)

  def spread(self, groups: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.broadcast_to(groups, shape)

  def competing(self, ndim: int, stacked: int) -> tuple[int, ...]:
    return tuple(range(stacked, ndim))


class Filter(NamedTuple):
  """One decision for each output: a filter of a convolution, a column.

  Reference:
    Li et al., Pruning filters, 2017, https://arxiv.org/abs/1608.08710.
  """

  def group(self, scores: jax.Array, stacked: int) -> jax.Array:
    inputs = tuple(range(stacked, scores.ndim - 1))
    return jnp.sum(scores.astype(jnp.float32), inputs, keepdims=True)

  def spread(self, groups: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.broadcast_to(groups, shape)

  def competing(self, ndim: int, stacked: int) -> tuple[int, ...]:
    return tuple(range(stacked, ndim))


Structure = Unstructured | Block | NM | Channel | Filter


def check_structure(structure: Structure) -> Structure:
  """Returns the structure, or raises ValueError naming its bad field."""
  if not isinstance(structure, Structure):
    raise ValueError(f'`structure` (={structure!r}) must be Unstructured(), '
                     'Block(...), NM(...), Channel() or Filter().')
  if isinstance(structure, Block):
    if not isinstance(structure.shape, tuple) or len(structure.shape) != 2:
      raise ValueError(f'`shape` (={structure.shape!r}) of a Block must be '
                       '(rows, columns).')
    for size in structure.shape:
      checks.check_count('shape', size, least=1)
    if structure.reduce not in ('sum', 'max'):
      raise ValueError(f'`reduce` (={structure.reduce!r}) must be \'sum\' or '
                       '\'max\'.')
  if isinstance(structure, NM):
    checks.check_count('n', structure.n, least=1)
    checks.check_count('m', structure.m, least=structure.n)
    if structure.axis not in (-1, -2):
      raise ValueError(f'`axis` (={structure.axis!r}) of NM must be -2 (the '
                       'inputs) or -1 (the outputs).')
  return structure


def _split(scores: jax.Array, axis: int, size: int, fill: float) -> jax.Array:
  """Splits an axis into (groups, size), padding its end to a multiple."""
  axis %= scores.ndim
  pad = [(0, 0)] * scores.ndim
  pad[axis] = (0, -scores.shape[axis] % size)
  padded = jnp.pad(scores, pad, constant_values=fill)
  return padded.reshape(padded.shape[:axis] + (-1, size)
                        + padded.shape[axis + 1:])
