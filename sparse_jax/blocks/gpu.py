"""Products with packed blocks on GPUs, as Triton kernels.

A program owns one tile of the result, visits the blocks that add to it, and
writes it once. Nothing of the size of x or of the dense weight is made.
"""

from collections.abc import Callable
import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
import jax.numpy as jnp

from sparse_jax.blocks import visits

TAKES_HEADS = False  # A GPU's memory has no tiles.
_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
_SIDES = (32, 64, 128)
_ROWS = 64  # Rows of x in a program, or in one turn of its loop.
_TILE = 64  # Largest side of a program's part of a block's gradient.


def fits(dtypes, sides) -> tuple[Callable, Callable, Callable]:
  """Whether kernels that take any width have these dtypes and blocks.

  Returns:
    Functions of the shapes of `block_product`, `block_gradient` and
    `growth_scores`, as of a module of kernels.

  Example:
    >>> product_fits, _, scores_fit = fits((jnp.float32,), (32, 64))
    >>> x = jnp.ones((8, 128))
    >>> product_fits(x, (32, 64), 3, 256), scores_fit(x, (32, 128))
    (True, False)
  """
  def taken(x, block, count=1):
    return (x.dtype in dtypes and set(block) <= set(sides)
            and x.shape[0] > 0 and count > 0)

  def product(x, block, count, width, transpose=False):
    del width, transpose
    return taken(x, block, count)

  def gradient(x, cotangent, block, count):
    del cotangent
    return taken(x, block, count)

  return product, gradient, taken


product_fits, gradient_fits, scores_fit = fits(_DTYPES, _SIDES)


@functools.partial(jax.jit, static_argnames=('width', 'transpose', 'interpret'))
def block_product(x: jax.Array, blocks: jax.Array, takes: jax.Array,
                  gives: jax.Array, *, width: int, transpose: bool = False,
                  interpret=False) -> jax.Array:
  """y[:, gives[k]] += x[:, takes[k]] @ blocks[k] over all blocks k.

  Args:
    x: float[batch, in], tiles side by side.
    blocks: the same dtype, [n, tall, wide], sides of 32, 64 or 128.
    takes, gives: int32[n], tiles of x and of y, in any order.
    width: of y.
    transpose: whether to multiply by `blocks[k].T` instead.
    interpret: as in `pl.pallas_call`.

  Returns:
    [batch, width] of the dtype of x, summed in float32.

  Example:
    >>> x, blocks = jnp.ones((1, 64)), jnp.ones((1, 32, 32))
    >>> y = block_product(x, blocks, jnp.array([1]), jnp.array([0]), width=64,
    ...                   interpret=True)
    >>> y[0, 31], y[0, 32]
    (Array(32., dtype=float32), Array(0., dtype=float32))
  """
  tall, wide = blocks.shape[1:]
  if transpose:
    tall, wide = wide, tall
  columns, height = width // wide, x.shape[0]
  x = whole(x)
  edges, order, takes = visits.sort(takes, gives, x.shape[1] // tall, columns)
  y = pl.pallas_call(
      functools.partial(_product_kernel, tall=tall, transpose=transpose),
      grid=(columns, x.shape[0] // _ROWS),
      in_specs=[_all(edges), _all(order), _all(takes),
                pl.BlockSpec((_ROWS, x.shape[1]), lambda j, i: (i, 0)),
                _all(blocks)],
      out_specs=pl.BlockSpec((_ROWS, wide), lambda j, i: (i, j)),
      out_shape=jax.ShapeDtypeStruct((x.shape[0], width), x.dtype),
      compiler_params=_params(),
      cost_estimate=pl.CostEstimate(
          flops=2 * x.shape[0] * blocks.size, transcendentals=0,
          bytes_accessed=(x.nbytes + blocks.nbytes
                          + x.shape[0] * width * x.dtype.itemsize)),
      interpret=interpret, name='packed_product')(
          edges, order, takes, x, blocks)
  return y[:height]


def _product_kernel(edges, order, takes, x, blocks, y, *, tall, transpose):
  column = pl.program_id(0)

  def add(k, total):
    part = x[:, pl.ds(takes[k] * tall, tall)]
    block = blocks[order[k]]
    return total + _dot(part, block.T if transpose else block)

  y[...] = lax.fori_loop(edges[column], edges[column + 1], add,
                         jnp.zeros(y.shape, jnp.float32)).astype(y.dtype)


@functools.partial(jax.jit, static_argnames=('block', 'interpret'))
def block_gradient(x: jax.Array, cotangent: jax.Array, rows: jax.Array,
                   columns: jax.Array, *, block: tuple[int, int],
                   interpret=False) -> jax.Array:
  """x[:, rows[k]].T @ cotangent[:, columns[k]] for each block k.

  Args:
    x: float[batch, in].
    cotangent: [batch, out] of the same dtype.
    rows, columns: int32[n], in any order.
    block: (rows, columns) of a block.
    interpret: as in `pl.pallas_call`.

  Returns:
    [n, rows, columns] of the dtype of x, summed in float32.

  Example:
    >>> x, cotangent = jnp.ones((3, 64)), jnp.ones((3, 32))
    >>> at = jnp.array([1]), jnp.array([0])
    >>> grad = block_gradient(x, cotangent, *at, block=(32, 32),
    ...                       interpret=True)
    >>> grad.shape, grad[0, 0, 0]
    ((1, 32, 32), Array(3., dtype=float32))
  """
  count, part = rows.shape[0], tuple(min(side, _TILE) for side in block)
  cut = tuple(side // size for side, size in zip(block, part))
  x, cotangent = whole(x), whole(cotangent)
  return pl.pallas_call(
      functools.partial(_gradient_kernel, cut=cut),
      grid=(count, *cut),
      in_specs=[_all(rows), _all(columns), _all(x), _all(cotangent)],
      out_specs=pl.BlockSpec((1, *part), lambda k, i, j: (k, i, j)),
      out_shape=jax.ShapeDtypeStruct((count, *block), x.dtype),
      compiler_params=_params(),
      cost_estimate=pl.CostEstimate(
          flops=2 * x.shape[0] * count * block[0] * block[1],
          transcendentals=0, bytes_accessed=x.nbytes + cotangent.nbytes
          + count * block[0] * block[1] * x.dtype.itemsize),
      interpret=interpret, name='packed_gradient')(
          rows.astype(jnp.int32), columns.astype(jnp.int32), x, cotangent)


def _gradient_kernel(rows, columns, x, cotangent, grad, *, cut):
  k, i, j = (pl.program_id(axis) for axis in range(3))
  grad[0] = _outer(x, cotangent, rows[k] * cut[0] + i, columns[k] * cut[1] + j,
                   grad.shape[1:]).astype(grad.dtype)


@functools.partial(jax.jit, static_argnames=(
    'block', 'reduce', 'dtype', 'interpret'))
def growth_scores(x: jax.Array, cotangent: jax.Array, *,
                  block: tuple[int, int], reduce: str, dtype,
                  interpret=False) -> jax.Array:
  """Each tile of x.T @ cotangent, its magnitudes reduced to a number.

  Args:
    x: float[batch, in].
    cotangent: [batch, out] of the same dtype.
    block: (rows, columns) of a tile.
    reduce: 'sum' or 'max'.
    dtype: to which the gradient is rounded first.
    interpret: as in `pl.pallas_call`.

  Returns:
    float32[row tiles, column tiles].

  Example:
    >>> x, cotangent = jnp.ones((3, 64)), -jnp.ones((3, 32))
    >>> growth_scores(x, cotangent, block=(32, 32), reduce='max',
    ...               dtype=jnp.float32, interpret=True)
    Array([[3.],
           [3.]], dtype=float32)
  """
  grid = x.shape[1] // block[0], cotangent.shape[1] // block[1]
  x, cotangent = whole(x), whole(cotangent)
  return pl.pallas_call(
      functools.partial(_scores_kernel, block=block, reduce=reduce,
                        dtype=dtype),
      grid=grid,
      in_specs=[_all(x), _all(cotangent)],
      out_specs=pl.BlockSpec((1, 1), lambda i, j: (i, j)),
      out_shape=jax.ShapeDtypeStruct(grid, jnp.float32),
      compiler_params=_params(),
      cost_estimate=pl.CostEstimate(
          flops=2 * x.size * cotangent.shape[1], transcendentals=0,
          bytes_accessed=x.nbytes + cotangent.nbytes),
      interpret=interpret, name='growth_scores')(x, cotangent)


def _scores_kernel(x, cotangent, scores, *, block, reduce, dtype):
  grad = _outer(x, cotangent, pl.program_id(0), pl.program_id(1), block)
  size = abs(grad.astype(dtype).astype(jnp.float32))
  scores[0, 0] = jnp.sum(size) if reduce == 'sum' else jnp.max(size)


def _outer(x, cotangent, row, column, tile):
  """The tile of x.T @ cotangent at (row, column) of tiles, in float32."""
  across, down = (pl.ds(at * size, size)
                  for at, size in zip((row, column), tile))

  def add(i, total):
    at = pl.ds(i * _ROWS, _ROWS)
    return total + _dot(x[at, across].T, cotangent[at, down])

  return lax.fori_loop(0, x.shape[0] // _ROWS, add,
                       jnp.zeros(tile, jnp.float32))


def _dot(a, b):
  return jnp.dot(a, b, preferred_element_type=jnp.float32)


def whole(x: jax.Array, size: int = _ROWS) -> jax.Array:
  """Rows of 0 up to a multiple of what a program takes."""
  return jnp.pad(x, ((0, -x.shape[0] % size), (0, 0)))


def _all(array):
  return pl.BlockSpec(array.shape, lambda *at: (0,) * array.ndim)


def _params():
  return pltriton.CompilerParams(num_warps=4, num_stages=2)
