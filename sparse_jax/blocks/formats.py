"""Packed weights from and to other forms: masks, and JAX's sparse matrices."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax import checks
from sparse_jax.blocks import packing
from sparse_jax.blocks.packing import check_block
from sparse_jax.blocks.packing import PackedBlocks
from sparse_jax.blocks.packing import spread
from sparse_jax.blocks.packing import tile_mask

if TYPE_CHECKING:
  from jax.experimental import sparse


def from_dense(weight: jax.Array | np.ndarray,
               forward_mask: jax.Array | np.ndarray,
               backward_mask: jax.Array | np.ndarray, *,
               block: tuple[int, int],
               pad: bool = False) -> PackedBlocks:
  """Packs a weight as the masks of a simulated run say.

  Law: to_dense gives back the weight on B and both masks.

  Args:
    weight: float[..., in, out].
    forward_mask, backward_mask: bool of the weight's shape, constant on each
      tile: A, and B that contains it.
    block, pad: as in `pack`.

  Returns:
    PackedBlocks of B, its tiles row by row.

  Raises:
    ValueError: for a mask that is not made of blocks, or A outside B.

  Example:
    >>> mask = jnp.array([[True, False]])
    >>> from_dense(jnp.ones((1, 2)), mask, mask, block=(1, 1)).columns
    Array([0], dtype=int32)
  """
  check_block(block, np.shape(weight), pad)
  inner = tile_mask(forward_mask, np.shape(weight), block, 'forward_mask')
  outer = tile_mask(backward_mask, np.shape(weight), block, 'backward_mask')
  if np.any(inner & ~outer):
    raise ValueError('`forward_mask` must lie inside `backward_mask`.')
  tiles = packing.tile(packing.on_host(weight), block)
  return packing.of_tiles(tiles, inner, outer, int(inner.sum()),
                          int(outer.sum()), shape=np.shape(weight),
                          block=block)


def to_dense(packed: PackedBlocks
             ) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The weight on B (0 elsewhere), and the masks of A and of B.

  Args:
    packed: PackedBlocks with its places: as `method.read` gives it, or `pack`.

  Returns:
    `(weight, forward_mask, backward_mask)`, of the weight's own shape: of its
    dtype, bool, bool.

  Example:
    >>> packed = packing.pack(jnp.array([[1., 3., 2.]]), block=(1, 1),
    ...                          sparsity=0.6, backward_sparsity=0.3)
    >>> weight, forward_mask, backward_mask = to_dense(packed)
    >>> weight, forward_mask
    (Array([[0., 3., 2.]], dtype=float32), Array([[False,  True, False]],
      dtype=bool))
  """
  filled = packed.replace(blocks=jnp.ones(packed.blocks.shape, bool))
  return (spread(packed.replace(forward=None)), spread(filled.read()),
          spread(filled.replace(forward=None)))


def to_bcoo(packed: PackedBlocks) -> 'sparse.BCOO':
  """The weight of A as a BCOO matrix, for inference.

  Args:
    packed: PackedBlocks of a matrix [in, out].

  Returns:
    jax.experimental.sparse.BCOO of [in, out]; every entry of a block is stored.

  Raises:
    ValueError: if the weight is no matrix, or its tiles hang over the edge.

  Example:
    >>> packed = packing.pack(jnp.eye(4), block=(2, 2), sparsity=0.5)
    >>> jnp.ones(4) @ to_bcoo(packed)
    Array([1., 1., 1., 1.], dtype=float32)
  """
  from jax.experimental import sparse  # Half of what importing us would cost.

  check_block(packed.block, packed.shape, False)
  if len(packed.shape) != 2:
    raise ValueError(f'`packed` (of shape {packed.shape}) must be a matrix.')
  kept, (tall, wide) = packed.read(), packed.block
  corners = jnp.asarray(kept.rows) * tall, jnp.asarray(kept.columns) * wide
  rows = corners[0][:, None, None] + jnp.arange(tall)[None, :, None]
  columns = corners[1][:, None, None] + jnp.arange(wide)[None, None]
  places = jnp.stack(jnp.broadcast_arrays(rows, columns), -1)
  matrix = sparse.BCOO((kept.blocks.ravel(), places.reshape(-1, 2)),
                       shape=packed.shape, unique_indices=True)
  return matrix.sort_indices()


def to_bcsr(packed: PackedBlocks, *, transpose: bool = False
            ) -> 'sparse.BCSR':
  """The weight of A as a BCSR matrix, for inference.

  JAX multiplies a BCSR matrix from the left only, so a layer's x @ weight is
  (to_bcsr(packed, transpose=True) @ x.T).T.

  Args:
    packed: PackedBlocks of a matrix.
    transpose: whether to make the transposed weight, [out, in].

  Returns:
    jax.experimental.sparse.BCSR; every entry of a block is stored.

  Raises:
    ValueError: as `to_bcoo`.

  Example:
    >>> packed = packing.pack(jnp.eye(4), block=(2, 2), sparsity=0.5)
    >>> to_bcsr(packed, transpose=True) @ jnp.ones(4)
    Array([1., 1., 1., 1.], dtype=float32)
  """
  from jax.experimental import sparse

  checks.check_bool('transpose', transpose)
  matrix = to_bcoo(packed)
  if transpose:
    matrix = matrix.T.sort_indices()
  return sparse.BCSR.from_bcoo(matrix)
