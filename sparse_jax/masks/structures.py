"""What is kept or dropped together: entries, blocks, N of M, channels, filters.

A structure works on the matrix view of a kernel: [stacked layers..., leading,
rows, columns], where rows are summed over by the product (the inputs of a
layer), columns are its outputs, and leading axes are the positions of a
convolution. It turns scores of entries into scores of groups, says which
groups compete with each other, and spreads the groups' decisions back. Any
hashable value with these three methods is a structure (`Structure`).
"""

import dataclasses
import math
from typing import Any
from typing import Protocol
from typing import runtime_checkable

import jax
import jax.numpy as jnp

from sparse_jax import checks


@runtime_checkable
class Structure(Protocol):
  """What is kept or dropped together; a user's own fits everywhere.

  Optional besides the three methods: `sparsity`, if the structure fixes it
  (NM); `group_size(view_shape)`, the entries of its largest group, if groups
  are not all equal; `check()`, which raises ValueError for a bad field;
  `pads = False`, if `group` adds no groups of NaN at an edge, as NM does.
  A view is a leaf as a matrix: the axes that stack layers, rows, columns.

  Example:
    >>> import sparse_jax
    >>> class Rows:  # All weights of an input are kept or dropped together.
    ...   def group(self, scores, stacked):
    ...     return scores.sum(-1)
    ...   def spread(self, groups, shape):
    ...     return jnp.broadcast_to(groups[..., None], shape)
    ...   def competing(self, ndim, stacked):
    ...     return (ndim - 1,)
    >>> scores = jnp.array([[2., 2.], [0., 3.]])
    >>> sparse_jax.make_mask(scores, .5, structure=Rows()).astype(int)
    Array([[1, 1],
           [0, 0]], dtype=int32)
  """

  def group(self, scores: jax.Array, stacked: int) -> jax.Array:
    """Scores of the view's entries as scores of groups."""

  def spread(self, groups: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Values of groups at every entry of a view of this shape."""

  def competing(self, ndim: int, stacked: int) -> tuple[int, ...]:
    """The axes of a groups' array of `ndim` axes along which they compete."""


@dataclasses.dataclass(frozen=True)
class Unstructured:
  """Every entry is on its own.

  Example:
    >>> import sparse_jax
    >>> sparse_jax.make_mask(jnp.array([[3., 1.], [4., 2.]]), .5).astype(int)
    Array([[1, 0],
           [1, 0]], dtype=int32)
  """

  pads = False

  def group(self, scores: jax.Array, stacked: int) -> jax.Array:
    del stacked
    return scores

  def spread(self, groups: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    del shape
    return groups

  def competing(self, ndim: int, stacked: int) -> tuple[int, ...]:
    return tuple(range(stacked, ndim))


@dataclasses.dataclass(frozen=True)
class Block:
  """Tiles of rows x columns are kept or dropped whole.

  Attributes:
    shape: (rows, columns) of a tile. Tiles at the edges may be cut short.
    reduce: 'sum' or 'max' of the scores in a tile is the tile's score.
    balanced: whether every column of tiles keeps the same number, so that
      none is empty and shards of columns have equal work.

  Raises:
    ValueError: naming a bad field, by what the structure is given to.

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
  balanced: bool = False

  pads = False

  def check(self) -> None:
    if not isinstance(self.shape, tuple) or len(self.shape) != 2:
      raise ValueError(f'`shape` (={self.shape!r}) of a Block must be '
                       '(rows, columns).')
    for size in self.shape:
      checks.check_count('shape', size, least=1)
    if self.reduce not in ('sum', 'max'):
      raise ValueError(f'`reduce` (={self.reduce!r}) must be \'sum\' or '
                       '\'max\'.')
    checks.check_bool('balanced', self.balanced)

  def group_size(self, view_shape: tuple[int, ...]) -> int:
    return math.prod(map(min, self.shape, view_shape[-2:]))

  def group(self, scores: jax.Array, stacked: int) -> jax.Array:
    del stacked
    # The maximum of a tile is that of a tile whose edge is repeated.
    fill = 0. if self.reduce == 'sum' else None
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
    return tuple(range(stacked, ndim - self.balanced))


@dataclasses.dataclass(frozen=True)
class NM:
  """Of every m consecutive entries along an axis, n are kept.

  Attributes:
    n: entries kept of each group.
    m: the size of a group. A last group cut short keeps n of what it has.
    axis: an axis of the matrix view; -2 are the rows, the axis that the
      product sums over and that sparse hardware needs.

  Raises:
    ValueError: naming a bad field, by what the structure is given to.

  Example:
    >>> import sparse_jax
    >>> scores = jnp.array([[4.], [1.], [3.], [2.]])
    >>> sparse_jax.make_mask(scores, .5, structure=NM(2, 4))[:, 0].astype(int)
    Array([1, 0, 1, 0], dtype=int32)

  Reference:
    Zhou et al., Learning N:M, 2021, https://arxiv.org/abs/2102.04010.
  """

  n: int
  m: int
  axis: int = -2

  @property
  def sparsity(self) -> float:
    return 1 - self.n / self.m

  def check(self) -> None:
    checks.check_count('n', self.n, least=1)
    checks.check_count('m', self.m, least=self.n)
    if self.axis not in (-1, -2):
      raise ValueError(f'`axis` (={self.axis!r}) of NM must be -2 (the '
                       'inputs) or -1 (the outputs).')

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


@dataclasses.dataclass(frozen=True)
class Channel:
  """One decision for each pair of input and output channel.

  The score of a pair is the sum over its spatial positions (L1, if the scores
  are magnitudes). On a dense layer or a 1 x 1 convolution it is unstructured.

  Example:
    >>> import sparse_jax
    >>> kernel = jnp.ones((3, 3, 2, 2)).at[:, :, 0, 0].set(2.)
    >>> mask = sparse_jax.make_mask(kernel, .75, structure=Channel())
    >>> mask.sum((0, 1)).tolist()
    [[9, 0], [0, 0]]

  Reference:
    Raihan and Aamodt, SWAT, 2020, https://arxiv.org/abs/2001.01969,
    structured SWAT.
  """

  pads = False

  def group(self, scores: jax.Array, stacked: int) -> jax.Array:
    leading = tuple(range(stacked, scores.ndim - 2))
    return jnp.sum(scores.astype(jnp.float32), leading, keepdims=True)

  def spread(self, groups: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.broadcast_to(groups, shape)

  def competing(self, ndim: int, stacked: int) -> tuple[int, ...]:
    return tuple(range(stacked, ndim))


@dataclasses.dataclass(frozen=True)
class Filter:
  """One decision for each output: a filter of a convolution, a column.

  Example:
    >>> import sparse_jax
    >>> scores = jnp.array([[1., 2.], [1., 2.]])
    >>> sparse_jax.make_mask(scores, .5, structure=Filter()).astype(int)
    Array([[0, 1],
           [0, 1]], dtype=int32)

  Reference:
    Li et al., Pruning filters, 2017, https://arxiv.org/abs/1608.08710.
  """

  pads = False

  def group(self, scores: jax.Array, stacked: int) -> jax.Array:
    inputs = tuple(range(stacked, scores.ndim - 1))
    return jnp.sum(scores.astype(jnp.float32), inputs, keepdims=True)

  def spread(self, groups: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.broadcast_to(groups, shape)

  def competing(self, ndim: int, stacked: int) -> tuple[int, ...]:
    return tuple(range(stacked, ndim))


@dataclasses.dataclass(frozen=True)
class FanIn:
  """Every output keeps the same number of its inputs, at any places.

  The rule of hardware that gathers: a matrix of [outputs, fan-in] values and
  their indices holds the weight.

  Example:
    >>> import sparse_jax
    >>> scores = jnp.array([[4., 1.], [3., 2.], [5., 0.], [6., 9.]])
    >>> sparse_jax.make_mask(scores, .5, structure=FanIn()).sum(0)
    Array([2, 2], dtype=int32)

  Reference:
    Lasby et al., SRigL, 2024, https://arxiv.org/abs/2305.02299.
  """

  pads = False

  def group(self, scores: jax.Array, stacked: int) -> jax.Array:
    del stacked
    return scores

  def spread(self, groups: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    del shape
    return groups

  def competing(self, ndim: int, stacked: int) -> tuple[int, ...]:
    return tuple(range(stacked, ndim - 1))


def check_structure(structure: Any) -> Structure:
  """Returns the structure, or raises ValueError naming its bad field."""
  if isinstance(structure, type) or not isinstance(structure, Structure):
    raise ValueError(f'`structure` (={structure!r}) must be Unstructured(), '
                     'Block(...), NM(...), Channel(), Filter(), FanIn() or '
                     'have the methods of sparse_jax.masks.Structure.')
  try:
    hash(structure)
  except TypeError:
    raise ValueError(f'`structure` (={structure!r}) must be hashable.'
                     ) from None
  getattr(structure, 'check', lambda: None)()
  return structure


def fixed_sparsity(structure: Structure) -> float | None:
  """The sparsity that a structure fixes, such as 1 - n/m; None if none."""
  return getattr(structure, 'sparsity', None)


def _split(scores: jax.Array, axis: int, size: int, fill: float | None
           ) -> jax.Array:
  """Splits an axis into (groups, size), padding its end to a multiple.

  With no `fill` the last entry is repeated.
  """
  axis %= scores.ndim
  pad = [(0, 0)] * scores.ndim
  pad[axis] = (0, -scores.shape[axis] % size)
  padded = (jnp.pad(scores, pad, mode='edge') if fill is None else
            jnp.pad(scores, pad, constant_values=fill))
  return padded.reshape(padded.shape[:axis] + (-1, size)
                        + padded.shape[axis + 1:])
