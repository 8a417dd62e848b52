"""Pallas kernels for products with packed blocks: one output tile a program.

Written for GPUs (block sizes are powers of two, 16 or more); elsewhere Pallas
interprets them, which is slow and serves tests.
"""

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp

_BATCH_TILE = 64


def block_product(x: jax.Array, blocks: jax.Array, rows: jax.Array,
                  columns: jax.Array, *, width: int,
                  interpret: bool | None = None) -> jax.Array:
  """y[:, columns[k]] += x[:, rows[k]] @ blocks[k] over all blocks k.

  A program owns one tile of y and visits the blocks of its column alone, so
  that every sum stays on the chip and is written once.

  Args:
    x: float[batch, in], tiles of `blocks.shape[1]` side by side.
    blocks: float[n, rows, columns].
    rows, columns: int32[n], in any order.
    width: of y, a multiple of `blocks.shape[2]`.
    interpret: whether to interpret; None does where there is no GPU.

  Returns:
    float32[batch, width].

  Example:
    >>> x, blocks = jnp.ones((1, 4)), jnp.ones((1, 2, 2))
    >>> block_product(x, blocks, jnp.array([1]), jnp.array([0]), width=4)
    Array([[2., 2., 0., 0.]], dtype=float32)
  """
  (_, tall, wide), height = blocks.shape, x.shape[0]
  x = _whole_tiles(x)
  order = jnp.argsort(columns)
  edges = jnp.searchsorted(columns[order], jnp.arange(width // wide + 1))
  whole = lambda shape: pl.BlockSpec(shape, lambda *at: (0,) * len(shape))
  y = pl.pallas_call(
      functools.partial(_product_kernel, tall=tall),
      grid=(x.shape[0] // _BATCH_TILE, width // wide),
      in_specs=[whole(edges.shape), whole(order.shape), whole(rows.shape),
                pl.BlockSpec((_BATCH_TILE, x.shape[1]), lambda i, j: (i, 0)),
                whole(blocks.shape)],
      out_specs=pl.BlockSpec((_BATCH_TILE, wide), lambda i, j: (i, j)),
      out_shape=jax.ShapeDtypeStruct((x.shape[0], width), jnp.float32),
      interpret=_interpreted(interpret))(
          edges.astype(jnp.int32), order.astype(jnp.int32), rows, x, blocks)
  return y[:height]


def block_gradient(x: jax.Array, slope: jax.Array, rows: jax.Array,
                   columns: jax.Array, *, block: tuple[int, int],
                   interpret: bool | None = None) -> jax.Array:
  """x[:, rows[k]].T @ slope[:, columns[k]] for each block k.

  Args:
    x: float[batch, in].
    slope: float[batch, out].
    rows, columns: int32[n].
    block: (rows, columns) of a block.
    interpret: as in `block_product`.

  Returns:
    float32[n, rows, columns].

  Example:
    >>> x, slope = jnp.arange(4.)[None], jnp.ones((1, 2))
    >>> block_gradient(x, slope, jnp.array([1]), jnp.array([0]), block=(2, 2))
    Array([[[2., 2.],
            [3., 3.]]], dtype=float32)
  """
  (tall, wide), count = block, rows.shape[0]
  x, slope = _whole_tiles(x), _whole_tiles(slope)
  whole = lambda shape: pl.BlockSpec(shape, lambda k: (0,) * len(shape))
  return pl.pallas_call(
      functools.partial(_gradient_kernel, tall=tall, wide=wide),
      grid=(count,),
      in_specs=[whole(rows.shape), whole(columns.shape), whole(x.shape),
                whole(slope.shape)],
      out_specs=pl.BlockSpec((1, tall, wide), lambda k: (k, 0, 0)),
      out_shape=jax.ShapeDtypeStruct((count, tall, wide), jnp.float32),
      interpret=_interpreted(interpret))(rows, columns, x, slope)


def _product_kernel(edges, order, rows, x, blocks, y, *, tall):
  column = pl.program_id(1)

  def add(k, total):
    place = order[k]
    part = x[:, pl.ds(rows[place] * tall, tall)]
    return total + _dot(part, blocks[place], (1, 0))

  y[...] = lax.fori_loop(edges[column], edges[column + 1], add,
                         jnp.zeros(y.shape, jnp.float32))


def _gradient_kernel(rows, columns, x, slope, grad, *, tall, wide):
  k = pl.program_id(0)
  across, down = (pl.ds(rows[k] * tall, tall),
                  pl.ds(columns[k] * wide, wide))

  def add(i, total):
    at = pl.ds(i * _BATCH_TILE, _BATCH_TILE)
    return total + _dot(x[at, across], slope[at, down], (0, 0))

  grad[0] = lax.fori_loop(0, x.shape[0] // _BATCH_TILE, add,
                          jnp.zeros((tall, wide), jnp.float32))


def _dot(a, b, axes):
  return lax.dot_general(a, b, ((axes[:1], axes[1:]), ((), ())),
                         preferred_element_type=jnp.float32)


def _whole_tiles(x):
  return jnp.pad(x, ((0, -x.shape[0] % _BATCH_TILE), (0, 0)))


def _interpreted(interpret: bool | None) -> bool:
  return jax.default_backend() != 'gpu' if interpret is None else interpret
