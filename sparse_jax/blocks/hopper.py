"""Products with packed blocks on Hopper GPUs, by their own instructions.

Written in Mosaic GPU: a warpgroup copies tiles to shared memory (TMA), others
multiply them there (wgmma). Compiled and simulated, never run on a chip; so
nothing chooses these kernels but their name.
"""

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from sparse_jax.blocks import gpu
from sparse_jax.blocks import visits

TAKES_HEADS = False  # A GPU's memory has no tiles.
_DTYPES = (jnp.bfloat16, jnp.float16)
_SIDES = (64, 128)
_PART = 64  # What a warpgroup multiplies at a time: one row of a swizzle.
_ROWS = 256  # Of x, in a program of `block_product`.
_STAGES = 3  # Parts on their way; the fourth would not fit beside y.
_REGISTERS = 40  # Of a thread that only copies.

product_fits, gradient_fits, scores_fit = gpu.fits(_DTYPES, _SIDES)


@functools.partial(jax.jit, static_argnames=('width', 'transpose', 'interpret'))
def block_product(x: jax.Array, blocks: jax.Array, takes: jax.Array,
                  gives: jax.Array, *, width: int, transpose: bool = False,
                  interpret=None) -> jax.Array:
  """y[:, gives[k]] += x[:, takes[k]] @ blocks[k] over all blocks k.

  A program owns 256 rows of one column of tiles of y, half for each of two
  warpgroups. Programs that run together share their rows, so that x comes from
  HBM about once.

  Args:
    x: bfloat16 or float16 [batch, in], tiles side by side.
    blocks: the same dtype, [n, tall, wide], sides of 64 or 128.
    takes, gives: int32[n], tiles of x and of y, in any order.
    width: of y.
    transpose: whether to multiply by `blocks[k].T` instead.
    interpret: None, or InterpretGPUParams of Mosaic GPU: simulate.

  Returns:
    [batch, width] of the dtype of x, summed in float32.

  Example:
    >>> shape = jax.eval_shape(
    ...     functools.partial(block_product, width=256),
    ...     jnp.ones((8, 512), jnp.bfloat16),
    ...     jnp.ones((2, 128, 128), jnp.bfloat16), jnp.arange(2), jnp.arange(2))
    >>> shape.shape
    (8, 256)
  """
  height, (tall, wide) = x.shape[0], blocks.shape[1:]
  if transpose:
    tall, wide = wide, tall
  part = (wide, _PART) if transpose else (_PART, wide)
  columns, turns, x = width // wide, tall // _PART, gpu.whole(x, _ROWS)
  half = _ROWS // 2

  def kernel(edges, order, takes, x, blocks, y, result):
    group, panel, column = (lax.axis_index(name)
                            for name in ('group', 'panel', 'column'))
    begin = edges[column]
    own = pl.ds(group * half, half)

    def x_at(step):
      return panel, takes[begin + step // turns] * turns + step % turns

    def block_at(step):
      k, turn = order[begin + step // turns], step % turns
      return (k, turn) if transpose else (k * turns + turn, 0)

    def multiply(total, x, block):
      plgpu.wgmma(total, x.at[own],
                  block.transpose((1, 0)) if transpose else block)

    def write(total):
      result[group] = total.astype(result.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(result.at[group], y.at[
          pl.ds(panel * _ROWS + group * half, half),
          pl.ds(column * wide, wide)])

    _pipeline(multiply, write, (half, wide),
              (edges[column + 1] - begin) * turns, 2,
              [((_ROWS, _PART), x_at), (part, block_at)])(x, blocks)

  y = _call(kernel, 'packed_product', (x.shape[0], width), x.dtype,
            result=(2, half, wide), groups=2, interpret=interpret,
            grid={'panel': x.shape[0] // _ROWS, 'column': columns})(
                *visits.sort(takes, gives, x.shape[1] // tall, columns), x,
                blocks.reshape(-1, blocks.shape[2]))
  return y[:height]


@functools.partial(jax.jit, static_argnames=('block', 'interpret'))
def block_gradient(x: jax.Array, cotangent: jax.Array, rows: jax.Array,
                   columns: jax.Array, *, block: tuple[int, int],
                   interpret=None) -> jax.Array:
  """x[:, rows[k]].T @ cotangent[:, columns[k]] for each block k.

  A program owns a block, a warpgroup 64 rows of it.

  Args:
    x: bfloat16 or float16 [batch, in].
    cotangent: [batch, out] of the same dtype.
    rows, columns: int32[n], in any order.
    block: (rows, columns) of a block.
    interpret: as of `block_product`.

  Returns:
    [n, rows, columns] of the dtype of x, summed in float32.

  Example:
    >>> x, at = jnp.ones((8, 128), jnp.bfloat16), jnp.arange(1)
    >>> gradient = functools.partial(block_gradient, block=(64, 128))
    >>> jax.eval_shape(gradient, x, x, at, at).shape
    (1, 64, 128)
  """
  count = rows.size

  def kernel(rows, columns, x, cotangent, grad, result):
    group, k = lax.axis_index('group'), lax.axis_index('block')

    def write(total):
      result[group] = total.astype(result.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(result.at[group], grad.at[
          pl.ds(k * block[0] + group * _PART, _PART)])

    _outer(write, x, cotangent, rows[k], columns[k], block)

  grad = _call(kernel, 'packed_gradient', (count * block[0], block[1]),
               x.dtype, result=(block[0] // _PART, _PART, block[1]),
               groups=block[0] // _PART, interpret=interpret,
               grid={'block': count})(
                   rows.astype(jnp.int32), columns.astype(jnp.int32),
                   gpu.whole(x, _PART), gpu.whole(cotangent, _PART))
  return grad.reshape(count, *block)


@functools.partial(jax.jit, static_argnames=(
    'block', 'reduce', 'dtype', 'interpret'))
def growth_scores(x: jax.Array, cotangent: jax.Array, *,
                  block: tuple[int, int], reduce: str, dtype,
                  interpret=None) -> jax.Array:
  """Each tile of x.T @ cotangent, its magnitudes reduced to a number.

  The kernel reduces rows of tiles, XLA what is left of them.

  Args:
    x: bfloat16 or float16 [batch, in].
    cotangent: [batch, out] of the same dtype.
    block: (rows, columns) of a tile.
    reduce: 'sum' or 'max'.
    dtype: to which the gradient is rounded first.
    interpret: as of `block_product`.

  Returns:
    float32[row tiles, column tiles].

  Example:
    >>> x = jnp.ones((8, 128), jnp.bfloat16)
    >>> scores = functools.partial(growth_scores, block=(64, 128),
    ...                            reduce='max', dtype=jnp.bfloat16)
    >>> jax.eval_shape(scores, x, x).shape
    (2, 1)
  """
  fold = jnp.sum if reduce == 'sum' else jnp.max
  grid = x.shape[1] // block[0], cotangent.shape[1] // block[1]

  def kernel(x, cotangent, scores, result):
    group, row, column = (lax.axis_index(name)
                          for name in ('group', 'row', 'column'))

    def write(total):
      size = abs(total.astype(dtype).astype(jnp.float32))
      result[group] = fold(size, axis=1)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(result.at[group], scores.at[
          column, pl.ds(row * block[0] + group * _PART, _PART)])

    _outer(write, x, cotangent, row, column, block)

  scores = _call(kernel, 'growth_scores', (grid[1], x.shape[1]), jnp.float32,
                 result=(block[0] // _PART, _PART), groups=block[0] // _PART,
                 grid={'row': grid[0], 'column': grid[1]},
                 interpret=interpret)(
                     gpu.whole(x, _PART), gpu.whole(cotangent, _PART))
  return fold(scores.reshape(grid[1], grid[0], block[0]), axis=2).T


def _outer(write, x, cotangent, row, column, block):
  """Writes the tile of x.T @ cotangent at (row, column) of tiles."""
  own = pl.ds(lax.axis_index('group') * _PART, _PART)

  def multiply(total, x, cotangent):
    plgpu.wgmma(total, x.at[:, own].transpose((1, 0)), cotangent)

  _pipeline(multiply, write, (_PART, block[1]), x.shape[0] // _PART,
            block[0] // _PART,
            [((_PART, block[0]), lambda step: (step, row)),
             ((_PART, block[1]), lambda step: (step, column))])(x, cotangent)


def _pipeline(multiply, write, shape, steps, groups, operands):
  """Sums products of parts of two operands in each of the warpgroups.

  Args:
    multiply: starts to add the product of two parts to a warpgroup's sums.
    write: starts to copy these from shared memory.
    shape: of the sums of a warpgroup.
    steps: how many parts there are.
    groups: how many warpgroups multiply.
    operands: for each operand (shape of a part, its place at a step).
  """
  def context(run):
    def scope(total):
      run(total)
      write(total[...])
      plgpu.wait_smem_to_gmem(0)

    pl.run_scoped(scope, plgpu.ACC(shape, jnp.float32))

  def turn(_, a, b, total):
    multiply(total, a, b)
    plgpu.wgmma_wait(0)
    return total

  return plgpu.emit_pipeline_warp_specialized(
      turn, grid=(steps,), memory_registers=_REGISTERS, wg_axis='group',
      num_compute_wgs=groups, max_concurrent_steps=_STAGES,
      compute_context=context, in_specs=[
          plgpu.BlockSpec(part, place, transforms=_swizzled(),
                          memory_space=plgpu.SMEM)
          for part, place in operands])


def _call(kernel, name, shape, dtype, *, result, groups, grid, interpret):
  """The kernel as a function of arrays, with shared memory for its result."""
  stage = plgpu.SMEM(result, dtype,
                     transforms=_swizzled() if len(result) == 3 else ())
  return plgpu.kernel(
      kernel, out_type=jax.ShapeDtypeStruct(shape, dtype),
      scratch_types=[stage], grid=tuple(grid.values()),
      grid_names=tuple(grid), num_threads=groups + 1, thread_name='group',
      compiler_params=plgpu.CompilerParams(
          lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
      interpret=interpret, kernel_name=name)


def _swizzled():
  """How rows of 64 entries of 16 bits lie in shared memory for wgmma."""
  return plgpu.TilingTransform((8, _PART)), plgpu.SwizzleTransform(2 * _PART)
