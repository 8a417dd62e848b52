"""Products with packed blocks on TPUs, as Mosaic kernels.

The blocks stay in HBM and come to the chip through a ring of copies, sorted by
the output column that they add to, while a panel of the rows of x stays in
VMEM. Nothing of the size of x or of the dense weight is made beside them.
"""

import functools
from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

_MIB = 2**20
_DTYPES = (jnp.bfloat16, jnp.float32)
_SIDES = (128, 256, 512)
_ROWS = (1024, 512, 256, 128)  # Of a panel, the best first.
_MOST_BLOCKS = 2**15  # Their ids lie in the scalar memory.
_RING, _RING_BYTES = 8, 2 * _MIB
_SPARE = 2 * _MIB  # Of VMEM, for what the compiler needs itself.


class Chip(NamedTuple):
  """What a kernel may take of a chip, and how many cores share its work."""

  vmem: int
  cores: int


# Half of the memory of a large chip: XLA keeps other arrays in the rest.
_CHIPS = {'TPU v4': Chip(16 * _MIB, 2), 'TPU v5 lite': Chip(64 * _MIB, 1),
          'TPU v5e': Chip(64 * _MIB, 1), 'TPU v5': Chip(48 * _MIB, 2),
          'TPU v5p': Chip(48 * _MIB, 2), 'TPU v6 lite': Chip(64 * _MIB, 1),
          'TPU v6e': Chip(64 * _MIB, 1), 'TPU7x': Chip(48 * _MIB, 1)}
_ANY_CHIP = Chip(16 * _MIB, 2)  # Fits all of them.


def chip() -> Chip:
  """That of the mesh in use, else of the first device, else what fits all.

  A program that is compiled for chips which are not there says which by
  `jax.set_mesh`.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is None:
    device = jax.devices()[0]
  return _CHIPS.get(device.device_kind, _ANY_CHIP)


def product_fits(x: jax.Array, block: tuple[int, int], count: int,
                 width: int, transpose: bool = False) -> bool:
  """Whether `block_product` takes these shapes."""
  wide = block[0] if transpose else block[1]
  return (_known(x, block, count)
          and _panel(x, block, wide, width, chip()) is not None)


def gradient_fits(x: jax.Array, cotangent: jax.Array, block: tuple[int, int],
                  count: int) -> bool:
  """Whether `block_gradient` takes these shapes."""
  return (_known(x, block, count)
          and _chunk(x, cotangent, block, count, chip()) is not None)


def scores_fit(x: jax.Array, block: tuple[int, int]) -> bool:
  """Whether `growth_scores` takes these shapes."""
  return _known(x, block)


def _known(x, block, count=1):
  return (x.dtype in _DTYPES and set(block) <= set(_SIDES) and x.shape[0] > 0
          and 0 < count <= _MOST_BLOCKS)


def block_product(x: jax.Array, blocks: jax.Array, takes: jax.Array,
                  gives: jax.Array, *, width: int, transpose: bool = False,
                  interpret=False) -> jax.Array:
  """y[:, gives[k]] += x[:, takes[k]] @ blocks[k] over all blocks k.

  A grid step owns a panel of rows and as many columns of y as fit, and visits
  the blocks of those columns one after the other. The next panel and the next
  blocks are on their way meanwhile; a tile of y is written once.

  Args:
    x: float[batch, in], tiles side by side: bfloat16 or float32.
    blocks: the same dtype, [n, tall, wide], sides of 128, 256 or 512.
    takes, gives: int32[n], tiles of x and of y, in any order.
    width: of y.
    transpose: whether to multiply by `blocks[k].T` instead.
    interpret: as in `pl.pallas_call`.

  Returns:
    [batch, width] of the dtype of x, summed in float32.
  """
  side = blocks.shape[1:]
  tall, wide = reversed(side) if transpose else side
  count, columns = blocks.shape[0], width // wide
  order = jnp.argsort(gives).astype(jnp.int32)
  gives = jnp.clip(gives, 0, columns - 1)[order]
  takes = jnp.clip(takes, 0, x.shape[1] // tall - 1)[order]
  edges = jnp.searchsorted(gives, jnp.arange(columns + 1)).astype(jnp.int32)
  rows, group = _panel(x, side, wide, width, chip())
  panels, depth = pl.cdiv(x.shape[0], rows), _depth(side, x.dtype.itemsize)
  cores = 1 if panels % chip().cores else chip().cores
  panels //= cores
  kernel = functools.partial(
      _product_kernel, count=count, panels=panels, group=group, depth=depth,
      tall=tall, wide=wide, contract=1 if transpose else 0)
  return pl.pallas_call(
      kernel,
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=3, grid=(cores, panels, columns // group),
          in_specs=[
              pl.BlockSpec((rows, x.shape[1]),
                           lambda p, i, g, *_: (p * panels + i, 0)),
              pl.BlockSpec(memory_space=pl.ANY)],
          out_specs=pl.BlockSpec((rows, group * wide),
                                 lambda p, i, g, *_: (p * panels + i, g)),
          scratch_shapes=[pltpu.VMEM((depth, *side), blocks.dtype),
                          pltpu.VMEM((rows, wide), jnp.float32),
                          pltpu.SemaphoreType.DMA((depth,))]),
      out_shape=jax.ShapeDtypeStruct((x.shape[0], width), x.dtype),
      compiler_params=_params('parallel', 'arbitrary', 'arbitrary'),
      cost_estimate=pl.CostEstimate(
          flops=2 * x.shape[0] * blocks.size, transcendentals=0,
          bytes_accessed=(x.nbytes + panels * cores * blocks.nbytes
                          + x.shape[0] * width * x.dtype.itemsize)),
      interpret=interpret, name='packed_product')(
          edges, order, takes, x, blocks)


def _product_kernel(edges, order, takes, x, blocks, y, ring, total, arrived, *,
                    count, panels, group, depth, tall, wide, contract):
  panel, first = pl.program_id(1), pl.program_id(2) * group
  steps = panels * count

  def copy(step):
    slot = lax.rem(step, depth)
    return pltpu.make_async_copy(blocks.at[order[lax.rem(step, count)]],
                                 ring.at[slot], arrived.at[slot])

  @pl.when((panel == 0) & (first == 0))
  def _():
    for step in range(min(depth, steps)):
      copy(step).start()

  def column(c, _):
    begin, end = edges[first + c], edges[first + c + 1]

    def visit(k, _):
      step = panel * count + k
      copy(step).wait()
      part = _dot(x[:, _strip(takes[k], tall)], ring[lax.rem(step, depth)],
                  (1, contract))
      total[...] = jnp.where(k == begin, 0., total[...]) + part

      @pl.when(step + depth < steps)
      def _():
        copy(step + depth).start()

    lax.fori_loop(begin, end, visit, None)

    @pl.when(begin < end)
    def _():
      y[:, _strip(c, wide)] = total[...].astype(y.dtype)

    @pl.when(begin == end)
    def _():
      y[:, _strip(c, wide)] = jnp.zeros(total.shape, y.dtype)

  lax.fori_loop(0, group, column, None)


def block_gradient(x: jax.Array, cotangent: jax.Array, rows: jax.Array,
                   columns: jax.Array, *, block: tuple[int, int],
                   interpret=False) -> jax.Array:
  """x[:, rows[k]].T @ cotangent[:, columns[k]] for each block k.

  Sums of as many blocks as fit stay in VMEM while panels of x and of the
  cotangent pass by, each once.

  Args:
    x: float[batch, in], bfloat16 or float32.
    cotangent: [batch, out] of the same dtype.
    rows, columns: int32[n], in any order.
    block: (rows, columns) of a block.
    interpret: as in `pl.pallas_call`.

  Returns:
    [n, rows, columns] of the dtype of x, summed in float32.
  """
  (tall, wide), count = block, rows.shape[0]
  order = jnp.argsort(rows).astype(jnp.int32)
  rows = jnp.clip(rows, 0, x.shape[1] // tall - 1)[order]
  columns = jnp.clip(columns, 0, cotangent.shape[1] // wide - 1)[order]
  height, chunk = _chunk(x, cotangent, block, count, chip())
  chunks, panels = pl.cdiv(count, chunk), pl.cdiv(x.shape[0], height)
  kernel = functools.partial(
      _gradient_kernel, count=count, chunk=chunk, panels=panels,
      batch=x.shape[0])
  panel = lambda a: pl.BlockSpec((height, a.shape[1]),
                                 lambda c, i, *_: (i, 0))
  return pl.pallas_call(
      kernel,
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=3, grid=(chunks, panels),
          in_specs=[panel(x), panel(cotangent)],
          out_specs=pl.BlockSpec(memory_space=pl.ANY),
          scratch_shapes=[pltpu.VMEM((tall, height), x.dtype),
                          pltpu.VMEM((chunk, *block), jnp.float32),
                          pltpu.VMEM((2, *block), x.dtype),
                          pltpu.SemaphoreType.DMA((2,))]),
      out_shape=jax.ShapeDtypeStruct((count, *block), x.dtype),
      compiler_params=_params('parallel', 'arbitrary'),
      cost_estimate=pl.CostEstimate(
          flops=2 * x.shape[0] * count * tall * wide, transcendentals=0,
          bytes_accessed=(chunks * (x.nbytes + cotangent.nbytes)
                          + count * tall * wide * x.dtype.itemsize)),
      interpret=interpret, name='packed_gradient')(
          order, rows, columns, x, cotangent)


def _gradient_kernel(order, rows, columns, x, cotangent, grad, turned, totals,
                     stage, left, *, count, chunk, panels, batch):
  _, tall, wide = totals.shape
  panel, begin = pl.program_id(1), pl.program_id(0) * chunk
  end = jnp.minimum(begin + chunk, count)
  height = x.shape[0]

  def inside(part):
    """Rows beyond the batch count nothing; what lies there is not known."""
    if batch % height == 0:
      return part
    row = lax.broadcasted_iota(jnp.int32, part.shape, 0) + panel * height
    return jnp.where(row < batch, part, jnp.zeros_like(part))

  def visit(k, _):
    @pl.when((k == begin) | (rows[k] != rows[jnp.maximum(k, 1) - 1]))
    def _():
      turned[...] = inside(x[:, _strip(rows[k], tall)]).T

    part = _dot(turned[...], inside(cotangent[:, _strip(columns[k], wide)]),
                (1, 0))
    totals[k - begin] = jnp.where(panel == 0, 0., totals[k - begin]) + part

  lax.fori_loop(begin, end, visit, None)

  def copy(k):
    slot = lax.rem(k, 2)
    return pltpu.make_async_copy(stage.at[slot], grad.at[order[k]],
                                 left.at[slot])

  def write(k, _):
    @pl.when(k >= begin + 2)
    def _():
      copy(k - 2).wait()
    stage[lax.rem(k, 2)] = totals[k - begin].astype(grad.dtype)
    copy(k).start()

  @pl.when(panel == panels - 1)
  def _():
    lax.fori_loop(begin, end, write, None)
    lax.fori_loop(jnp.maximum(end - 2, begin), end,
                  lambda k, _: copy(k).wait(), None)


def growth_scores(x: jax.Array, cotangent: jax.Array, *,
                  block: tuple[int, int], reduce: str, dtype,
                  interpret=False) -> jax.Array:
  """Each tile of x.T @ cotangent, its magnitudes reduced to a number.

  Args:
    x: float[batch, in], bfloat16 or float32.
    cotangent: [batch, out] of the same dtype.
    block: (rows, columns) of a tile.
    reduce: 'sum' or 'max'.
    dtype: to which the gradient is rounded first.
    interpret: as in `pl.pallas_call`.

  Returns:
    float32[row tiles, column tiles].
  """
  batch, (tall, wide) = x.shape[0], block
  grid = x.shape[1] // tall, cotangent.shape[1] // wide
  size = _span(x.shape[1], tall), _span(cotangent.shape[1], wide)
  height = _rows_of(batch, 512)
  panels = pl.cdiv(batch, height)
  cells = x.shape[1] // size[0], cotangent.shape[1] // size[1]
  kernel = functools.partial(_scores_kernel, panels=panels, batch=batch,
                             block=block, reduce=reduce, dtype=dtype)
  scores = pl.pallas_call(
      kernel,
      grid=(*cells, panels),
      in_specs=[pl.BlockSpec((height, size[0]), lambda i, j, m: (m, i)),
                pl.BlockSpec((height, size[1]), lambda i, j, m: (m, j))],
      out_specs=pl.BlockSpec((8, 128), lambda i, j, m: (i, j)),
      out_shape=jax.ShapeDtypeStruct((cells[0] * 8, cells[1] * 128),
                                     jnp.float32),
      scratch_shapes=[pltpu.VMEM(size, jnp.float32)],
      compiler_params=_params('parallel', 'parallel', 'arbitrary'),
      cost_estimate=pl.CostEstimate(
          flops=2 * batch * x.shape[1] * cotangent.shape[1], transcendentals=0,
          bytes_accessed=cells[1] * x.nbytes + cells[0] * cotangent.nbytes),
      interpret=interpret, name='growth_scores')(x, cotangent)
  scores = scores.reshape(cells[0], 8, cells[1], 128)
  return scores[:, :size[0] // tall, :, :size[1] // wide].reshape(grid)


def _scores_kernel(x, cotangent, scores, total, *, panels, batch, block,
                   reduce, dtype):
  (tall, wide), panel, height = block, pl.program_id(2), x.shape[0]

  def inside(part):
    if batch % height == 0:
      return part[...]
    row = lax.broadcasted_iota(jnp.int32, part.shape, 0) + panel * height
    return jnp.where(row < batch, part[...], jnp.zeros(part.shape, part.dtype))

  part = _dot(inside(x), inside(cotangent), (0, 0))
  total[...] = jnp.where(panel == 0, 0., total[...]) + part

  @pl.when(panel == panels - 1)
  def _():
    place = [lax.broadcasted_iota(jnp.int32, scores.shape, axis)
             for axis in (0, 1)]
    found = jnp.zeros(scores.shape, jnp.float32)
    fold = jnp.sum if reduce == 'sum' else jnp.max
    for i in range(total.shape[0] // tall):
      for j in range(total.shape[1] // wide):
        tile = total[i * tall:(i + 1) * tall, j * wide:(j + 1) * wide]
        worth = fold(abs(tile.astype(dtype).astype(jnp.float32)))
        found = jnp.where((place[0] == i) & (place[1] == j), worth, found)
    scores[...] = found


def _panel(x, block, wide, width, chip):
  """Rows of a panel and columns of tiles in a grid step; None: none fits."""
  size, area = x.dtype.itemsize, block[0] * block[1]
  left = chip.vmem - _SPARE - _depth(block, size) * area * size
  columns = width // wide
  for most in _ROWS:
    rows = _rows_of(x.shape[0], most)
    for group in range(columns, 0, -1):
      need = 2 * size * (x.shape[1] + group * wide) + 2 * 4 * wide
      if columns % group == 0 and rows * need <= left:
        return rows, group
  return None


def _chunk(x, cotangent, block, count, chip):
  """Rows of a panel and blocks of a chunk; None: none fits."""
  size, area = x.dtype.itemsize, block[0] * block[1]
  found = []
  for most in _ROWS:
    height = _rows_of(x.shape[0], most)
    left = (chip.vmem - _SPARE - 2 * area * size - 4 * area
            - height * size * (2 * (x.shape[1] + cotangent.shape[1])
                               + 2 * max(block)))
    chunk = left // (4 * area)
    if chunk > 0:
      chunks = max(-(-count // chunk), min(chip.cores, count))
      found.append((chunks, height))
  if not found:
    return None
  chunks, height = min(found, key=lambda pair: (pair[0], -pair[1]))
  return height, -(-count // chunks)


def _rows_of(batch, most):
  """Rows of a panel: at most so many, evenly, whole sublanes of 16 bits."""
  panels = -(-batch // most)
  return batch if panels == 1 else -(-batch // panels // 16) * 16


def _span(width, side):
  """Columns of a tile of the growth scores: some blocks, as 512 divides."""
  return next(size for size in (512, 256, 128) if width % size == 0
              and size >= side and size % side == 0)


def _depth(block, size):
  """Of the ring of blocks."""
  return max(2, min(_RING, _RING_BYTES // (block[0] * block[1] * size)))


def _params(*semantics):
  return pltpu.CompilerParams(dimension_semantics=semantics,
                              vmem_limit_bytes=chip().vmem)


def _strip(index, size):
  return pl.ds(pl.multiple_of(index * size, size), size)


def _dot(a, b, axes):
  return lax.dot_general(a, b, ((axes[:1], axes[1:]), ((), ())),
                         preferred_element_type=jnp.float32)
