"""Block-sparse weights of which only the kept blocks exist."""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax import checks
from sparse_jax import trees
from sparse_jax.masks import topk

_DATA = ['blocks', 'rows', 'columns', 'forward', 'growth', 'due']
_META = ['shape', 'block', 'reduce', 'balanced']


@functools.partial(jax.tree_util.register_dataclass, data_fields=_DATA,
                   meta_fields=_META)
@dataclasses.dataclass(frozen=True)
class PackedBlocks:
  """The kept blocks of a weight, and where each belongs.

  The weight is a matrix, or a stack of matrices [leading..., in, out] such as
  the kernel of a convolution. It is cut into tiles of one shape; the tiles of
  the backward set B are stored, those of the forward set A are among them.
  Among the parameters it has `blocks` (and `growth`) alone, which are floating;
  `method.read` adds where they belong.

  Layers that are stacked in one weight have each their own tiles: all arrays
  then have the same axes in front.

  Attributes:
    blocks: float[n, rows, columns], the tiles of B in any order. A tile that
      hangs over the edge of the weight is 0 there.
    rows: int32[n], the row of tiles of each, counted through all leading
      matrices; None among the parameters, as are the next ones.
    columns: int32[n], the column of tiles of each.
    forward: int32[m], which of `blocks` are in A; None if all are.
    growth: None, or float32[row tiles, column tiles] of zeros: then the
      "gradient" with respect to it is the score of each tile of the dense
      gradient, kept or not (see `matmul`).
    due: bool[], whether the growth scores are wanted; None if always.
    shape: the weight's own shape, stacked axes left out; static.
    block: (rows, columns) of a tile; static.
    reduce: 'sum' or 'max', how magnitudes make the score of a tile; static.
    balanced: whether each column of tiles has as many blocks as any other, and
      they are stored column by column, those of A among themselves too;
      static. Then columns may be split over devices.

  Example:
    >>> packed = pack(jnp.eye(4), block=(2, 2), sparsity=0.5)
    >>> packed.blocks.shape, packed.rows, packed.columns
    ((2, 2, 2), Array([0, 1], dtype=int32), Array([0, 1], dtype=int32))
  """

  blocks: jax.Array
  rows: jax.Array | None = None
  columns: jax.Array | None = None
  forward: jax.Array | None = None
  growth: jax.Array | None = None
  due: jax.Array | None = None
  shape: tuple[int, ...] = dataclasses.field(kw_only=True)
  block: tuple[int, int] = dataclasses.field(kw_only=True)
  reduce: str = dataclasses.field(default='sum', kw_only=True)
  balanced: bool = dataclasses.field(default=False, kw_only=True)

  @property
  def grid(self) -> tuple[int, int]:
    """How many rows (of all leading matrices) and columns of tiles."""
    return grid_of(self.shape, self.block)

  @property
  def ids(self) -> jax.Array:
    """int32[n], the tiles counted row by row."""
    rows: Any = self.rows
    return rows * self.grid[1] + self.columns

  @property
  def dtype(self) -> jnp.dtype:
    return self.blocks.dtype

  def replace(self, **changes: Any) -> 'PackedBlocks':
    """A copy with some of its fields changed."""
    return dataclasses.replace(self, **changes)

  def asking_growth(self) -> 'PackedBlocks':
    """The same with a place for the scores of the dense gradient."""
    return self.replace(growth=jnp.zeros(self.grid, jnp.float32))

  def read(self) -> 'PackedBlocks':
    """The tiles of A alone."""
    if self.forward is None:
      return self
    pick = lambda leaf: jnp.take(leaf, self.forward, axis=0, mode='clip')
    return self.replace(blocks=pick(self.blocks), rows=pick(self.rows),
                        columns=pick(self.columns), forward=None)


def is_packed(node: Any) -> bool:
  """Whether this is a PackedBlocks; for `is_leaf=` of the tree functions.

  Example:
    >>> is_packed(pack(jnp.eye(2), block=(1, 1), sparsity=.5))
    True
  """
  return isinstance(node, PackedBlocks)


def grid_of(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
  """Rows of tiles, of all leading matrices, and columns of tiles."""
  lead, (rows, columns) = math.prod(shape[:-2]), shape[-2:]
  return lead * -(-rows // block[0]), -(-columns // block[1])


def pack(weight: jax.Array | np.ndarray, *, block: tuple[int, int],
         sparsity: float | None = None,
         mask: jax.Array | np.ndarray | None = None,
         backward_sparsity: float | None = None, reduce: str = 'sum',
         pad: bool = False) -> PackedBlocks:
  """Keeps the blocks of a weight of largest score, and nothing else.

  The score of a tile is the sum (or maximum) of its magnitudes. A are the
  `keep_count` best at `sparsity`, or those of `mask`; B, which is stored,
  are A and the best others up to `backward_sparsity`.

  Unless traced, the weight is cut on the host: the device receives B alone.

  Law: unpack(pack(w, mask=m)) is w where m is True and 0 elsewhere.

  Args:
    weight: float[..., in, out].
    block: (rows, columns) of a tile.
    sparsity: fraction of tiles outside A, in [0, 1). Exactly one of this and
      `mask` is given.
    mask: bool of the weight's shape, constant on each tile and known when the
      function is traced.
    backward_sparsity: fraction of tiles outside B, not above that of A. None
      means that B is A.
    reduce: 'sum' or 'max'.
    pad: whether tiles may hang over the edge; if not, `block` must divide the
      weight.

  Returns:
    PackedBlocks, its tiles row by row.

  Raises:
    ValueError: naming the argument that does not fit.

  Example:
    >>> weight = jnp.arange(16.).reshape(4, 4)
    >>> pack(weight, block=(2, 2), sparsity=0.75).blocks
    Array([[[10., 11.],
            [14., 15.]]], dtype=float32)

  Reference:
    Jayakumar et al., Top-KAST, 2020, https://arxiv.org/abs/2106.03517,
    authors' response: the sum or maximum of a block, before the top-k.
  """
  check_block(block, np.shape(weight), pad)
  _check_pack(sparsity, mask, backward_sparsity, reduce)
  tiles = tile(on_host(weight), block)
  scores = tile_scores(tiles, reduce)
  if sparsity is not None:
    count = topk.keep_count(scores.size, sparsity)
    inner = best(scores, count)
  else:
    inner = tile_mask(mask, np.shape(weight), block)
    count = int(inner.sum())
  outer, outer_count = inner, count
  if backward_sparsity is not None:
    outer_count = topk.keep_count(scores.size, backward_sparsity)
    _check_outer(backward_sparsity, outer_count, count)
    outer = best(widened(inner, scores), outer_count)
  return of_tiles(tiles, inner, outer, count, outer_count,
                  shape=np.shape(weight), block=block, reduce=reduce)


def unpack(packed: PackedBlocks) -> jax.Array:
  """The dense weight: the blocks of A where they belong, 0 elsewhere.

  Example:
    >>> packed = pack(jnp.arange(4.).reshape(2, 2), block=(1, 1), sparsity=.5)
    >>> unpack(packed)
    Array([[0., 0.],
           [2., 3.]], dtype=float32)
  """
  return spread(packed.read())


def map_packed(fn: Callable[[PackedBlocks], Any], params: trees.PyTree
               ) -> trees.PyTree:
  """Maps the packed leaves of a tree; others stay."""
  return jax.tree.map(lambda leaf: fn(leaf) if is_packed(leaf) else leaf,
                      params, is_leaf=is_packed)


def tile(weight, block: tuple[int, int]):
  """[tiles, rows, columns] row by row; the edges padded by 0."""
  xp = np if isinstance(weight, np.ndarray) else jnp
  (tall, wide), shape = block, weight.shape
  edges = [(0, 0)] * (len(shape) - 2) + [(0, -shape[-2] % tall),
                                         (0, -shape[-1] % wide)]
  if any(after for _, after in edges):
    weight = xp.pad(weight, edges)
  rows, columns = grid_of(shape, block)
  cut = weight.reshape(rows, tall, columns, wide)
  return cut.swapaxes(1, 2).reshape(rows * columns, tall, wide)


def tile_scores(tiles, reduce: str):
  """float[...]: the sum (float32) or the maximum of each tile's magnitudes."""
  xp = np if isinstance(tiles, np.ndarray) else jnp
  if reduce == 'sum':
    return xp.sum(xp.abs(tiles).astype(xp.float32), (-2, -1))
  return xp.max(xp.abs(tiles), (-2, -1))


def best(scores, k: int):
  """bool[...]: the k largest, as `top_k_mask`; sorts what is on the host."""
  if not isinstance(scores, np.ndarray):
    return topk.top_k_mask(scores, k)
  keys = scores.astype(np.float32).ravel()
  keys = np.where(np.isnan(keys), -np.inf, keys)
  mask = np.zeros(scores.size, bool)
  mask[np.argsort(-keys, kind='stable')[:k]] = True
  return mask.reshape(scores.shape)


def widened(inner, scores):
  """Scores by which A comes first, then the others by their scores."""
  xp = np if isinstance(scores, np.ndarray) else jnp
  most = float(jnp.finfo(scores.dtype).max)
  return xp.where(inner, xp.inf, xp.minimum(scores, scores.dtype.type(most)))


def of_tiles(tiles, inner, outer, count: int, outer_count: int, *,
             shape: tuple[int, ...], block: tuple[int, int],
             reduce: str = 'sum') -> PackedBlocks:
  """PackedBlocks of the tiles of `outer`, of which `inner` are read."""
  host = isinstance(tiles, np.ndarray)
  find = (lambda mask, count: np.flatnonzero(mask)) if host else (
      lambda mask, count: jnp.flatnonzero(mask, size=count))
  kept, forward = find(outer, outer_count).astype(np.int32), None
  if count < outer_count:
    forward = jnp.asarray(find(inner[kept], count).astype(np.int32))
  columns = np.int32(grid_of(shape, block)[1])
  return PackedBlocks(jnp.asarray(tiles[kept]), jnp.asarray(kept // columns),
                      jnp.asarray(kept % columns), forward,
                      shape=tuple(shape), block=(block[0], block[1]),
                      reduce=reduce)


def check_block(block, shape: tuple[int, ...], pad: bool) -> None:
  """Raises ValueError unless tiles of `block` fit a weight of `shape`."""
  if not isinstance(block, tuple) or len(block) != 2:
    raise ValueError(f'`block` (={block!r}) must be (rows, columns).')
  for size in block:
    checks.check_count('block', size, least=1)
  checks.check_bool('pad', pad)
  if len(shape) < 2 or not math.prod(shape):
    raise ValueError(f'`weight` (of shape {tuple(shape)}) must be a matrix or '
                     'a stack of them, and not empty.')
  if not pad and (shape[-2] % block[0] or shape[-1] % block[1]):
    raise ValueError(f'`block` (={block}) must divide the last two axes of '
                     f'the shape {tuple(shape)}, or pass pad=True.')


def check_indices(packed: PackedBlocks) -> PackedBlocks:
  """Returns it if its shapes fit and its known indices are in range."""
  count = packed.blocks.shape[0]
  if packed.blocks.shape[1:] != packed.block:
    raise ValueError(f'`blocks` (of shape {packed.blocks.shape}) must be '
                     f'[n, {packed.block[0]}, {packed.block[1]}].')
  limits = {'rows': packed.grid[0], 'columns': packed.grid[1],
            'forward': count}
  for name, limit in limits.items():
    index = getattr(packed, name)
    if index is None and name == 'forward':
      continue
    if name != 'forward' and index.shape != (count,):
      raise ValueError(f'`{name}` (of shape {index.shape}) must have the '
                       f'shape ({count},), one for each block.')
    _check_range(name, index, limit)
  if packed.balanced:
    _check_balanced(packed)
  return packed


def _check_range(name, index, limit):
  if isinstance(index, jax.core.Tracer) or not index.size:
    return
  values = np.asarray(index)
  low, high = int(values.min()), int(values.max())
  if low < 0 or high >= limit:
    raise ValueError(f'`{name}` (from {low} to {high}) must be in '
                     f'[0, {limit}).')


def _check_balanced(packed):
  columns, count = packed.grid[1], packed.columns.size
  known = not isinstance(packed.columns, jax.core.Tracer)
  if count % columns or known and not np.array_equal(
      packed.columns, np.repeat(np.arange(columns), count // columns)):
    raise ValueError(f'`columns` (={packed.columns}) must go through all '
                     f'{columns} in order, each as often, where blocks are '
                     '`balanced`.')


def spread(packed: PackedBlocks) -> jax.Array:
  """Every stored tile at its place in an array of the weight's shape."""
  check_indices(packed)
  (rows, columns), (tall, wide) = packed.grid, packed.block
  empty = jnp.zeros((rows * columns, tall, wide), packed.dtype)
  tiles = empty.at[packed.ids].set(packed.blocks)
  flat = tiles.reshape(rows, columns, tall, wide).swapaxes(1, 2)
  lead, (height, width) = packed.shape[:-2], packed.shape[-2:]
  padded = flat.reshape(*lead, -1, columns * wide)
  return padded[..., :height, :width]


def on_host(weight):
  """As a NumPy array, unless it is traced."""
  traced = isinstance(weight, jax.core.Tracer)
  return weight if traced else np.asarray(weight)


def tile_mask(mask, shape, block, name: str = 'mask') -> np.ndarray:
  """bool[tiles] of a mask that is constant on each tile."""
  mask = np.asarray(mask)
  if mask.shape != tuple(shape) or mask.dtype != bool:
    raise ValueError(f'`{name}` (of {mask.dtype} and shape {mask.shape}) must '
                     f'be bool of shape {tuple(shape)}.')
  kept, whole = tile(mask, block), tile(np.ones(shape, bool), block)
  some, every = kept.any((1, 2)), (kept | ~whole).all((1, 2))
  if np.any(some & ~every):
    raise ValueError(f'`{name}` must keep or drop each block of {block} '
                     f'whole, but {int(np.sum(some & ~every))} are mixed.')
  if not some.any():
    raise ValueError(f'`{name}` must keep at least one block.')
  return some


def _check_pack(sparsity, mask, backward_sparsity, reduce):
  if (sparsity is None) == (mask is None):
    raise ValueError(f'`sparsity` (={sparsity!r}) or `mask` must be given, '
                     'and not both.')
  if sparsity is not None:
    checks.check_sparsity('sparsity', sparsity)
  if backward_sparsity is not None:
    checks.check_sparsity('backward_sparsity', backward_sparsity)
  if reduce not in ('sum', 'max'):
    raise ValueError(f'`reduce` (={reduce!r}) must be \'sum\' or \'max\'.')


def _check_outer(backward_sparsity, outer_count, count):
  if outer_count < count:
    raise ValueError(f'`backward_sparsity` (={backward_sparsity!r}) must not '
                     'be above the sparsity of the forward set, which the '
                     'backward set contains.')
