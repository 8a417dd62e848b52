"""Products with packed blocks on TPUs, as Mosaic kernels.

The blocks stay in HBM and come to the chip through a ring of copies, sorted by
the output column that they add to, while a panel of the rows of x stays in
VMEM. Nothing of the size of x or of the dense weight is made beside them.
"""

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from sparse_jax.blocks import tpu_heads
from sparse_jax.blocks import tpu_sizes as sizes
from sparse_jax.blocks import visits
from sparse_jax.blocks.tiles import Heads

TAKES_HEADS = True


def product_fits(x: jax.Array, block: tuple[int, int], count: int,
                 width: int, transpose: bool = False) -> bool:
  """Whether `block_product` takes these shapes on this chip."""
  wide = block[0] if transpose else block[1]
  return (sizes.taken(x, block, count)
          and sizes.panel(x, block, wide, width) is not None)


def gradient_fits(x: jax.Array, cotangent: jax.Array, block: tuple[int, int],
                  count: int) -> bool:
  """Whether `block_gradient` takes these shapes on this chip."""
  return (sizes.taken(x, block, count)
          and sizes.chunk(x, cotangent, block, count) is not None)


def scores_fit(x: jax.Array, block: tuple[int, int]) -> bool:
  """Whether `growth_scores` takes these shapes."""
  return sizes.taken(x, block)


def block_product(x: jax.Array, blocks: jax.Array, takes: jax.Array,
                  gives: jax.Array, *, width: int, transpose: bool = False,
                  heads: Heads | None = None, interpret=False) -> jax.Array:
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
    heads: of x and of y.
    interpret: as in `pl.pallas_call`.

  Returns:
    [batch, width] of the dtype of x, summed in float32.

  Example:
    >>> x, blocks = jnp.ones((1, 256)), jnp.ones((1, 128, 128))
    >>> y = block_product(x, blocks, jnp.array([1]), jnp.array([0]),
    ...                   width=256, interpret=True)
    >>> y[0, 127], y[0, 128]
    (Array(128., dtype=float32), Array(0., dtype=float32))
  """
  call = functools.partial(_product, width=width, transpose=transpose,
                           heads=heads, interpret=interpret)
  multiply = jax.custom_batching.custom_vmap(call)

  @multiply.def_vmap
  def _(size, mapped, x, *tiles):
    if any(mapped[1:]):
      return _in_turn(call, mapped)(x, *tiles), True
    y = multiply(x.reshape(-1, x.shape[-1]), *tiles)
    return y.reshape(size, -1, width), True

  return multiply(x, blocks, takes, gives)


@functools.partial(jax.jit, static_argnames=(
    'width', 'transpose', 'heads', 'interpret'))
def _product(x, blocks, takes, gives, *, width, transpose, heads, interpret):
  side = blocks.shape[1:]
  tall, wide = reversed(side) if transpose else side
  count, columns = blocks.shape[0], width // wide
  edges, order, takes = visits.sort(takes, gives, x.shape[1] // tall, columns)
  rows, group = sizes.panel(x, side, wide, width)
  rows, heads = tpu_heads.fit(heads, x.shape[0], rows)
  panels, depth = pl.cdiv(x.shape[0], rows), sizes.depth(side,
                                                         x.dtype.itemsize)
  cores = 1 if panels % sizes.chip().cores else sizes.chip().cores
  panels //= cores
  place = lambda p, i, g, *_: (p * panels + i, g)
  kernel = functools.partial(
      _product_kernel, count=count, panels=panels, group=group, depth=depth,
      tall=tall, wide=wide, contract=1 if transpose else 0)
  y = pl.pallas_call(
      kernel,
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=3, grid=(cores, panels, columns // group),
          in_specs=[
              tpu_heads.spec((rows, x.shape[1]),
                             lambda *at: (place(*at)[0], 0), heads[0]),
              pl.BlockSpec(memory_space=pl.ANY)],
          out_specs=tpu_heads.spec((rows, group * wide), place, heads[1]),
          scratch_shapes=[pltpu.VMEM((depth, *side), blocks.dtype),
                          pltpu.VMEM((rows, wide), jnp.float32),
                          pltpu.SemaphoreType.DMA((depth,))]),
      out_shape=jax.eval_shape(
          lambda: tpu_heads.apart(jnp.zeros((x.shape[0], width), x.dtype),
                                  heads[1])),
      compiler_params=_params('parallel', 'arbitrary', 'arbitrary'),
      cost_estimate=pl.CostEstimate(
          flops=2 * x.shape[0] * blocks.size, transcendentals=0,
          bytes_accessed=(x.nbytes + panels * cores * blocks.nbytes
                          + x.shape[0] * width * x.dtype.itemsize)),
      interpret=interpret, name='packed_product')(
          edges, order, takes, tpu_heads.apart(x, heads[0]), blocks)
  return tpu_heads.joined(y)


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
      part = _dot(tpu_heads.take(x, takes[k], tall),
                  ring[lax.rem(step, depth)], (1, contract))
      total[...] = jnp.where(k == begin, 0., total[...]) + part

      @pl.when(step + depth < steps)
      def _():
        copy(step + depth).start()

    lax.fori_loop(begin, end, visit, None)

    @pl.when(begin < end)
    def _():
      tpu_heads.put(y, c, total[...].astype(y.dtype))

    @pl.when(begin == end)
    def _():
      tpu_heads.put(y, c, jnp.zeros(total.shape, y.dtype))

  lax.fori_loop(0, group, column, None)


def block_gradient(x: jax.Array, cotangent: jax.Array, rows: jax.Array,
                   columns: jax.Array, *, block: tuple[int, int],
                   heads: Heads | None = None, interpret=False) -> jax.Array:
  """x[:, rows[k]].T @ cotangent[:, columns[k]] for each block k.

  Sums of as many blocks as fit stay in VMEM while panels of x and of the
  cotangent pass by, each once.

  Args:
    x: float[batch, in], bfloat16 or float32.
    cotangent: [batch, out] of the same dtype.
    rows, columns: int32[n], in any order.
    block: (rows, columns) of a block.
    heads: of x and of the cotangent.
    interpret: as in `pl.pallas_call`.

  Returns:
    [n, rows, columns] of the dtype of x, summed in float32.

  Example:
    >>> x, cotangent = jnp.ones((3, 256)), jnp.ones((3, 128))
    >>> at = jnp.array([1]), jnp.array([0])
    >>> grad = block_gradient(x, cotangent, *at, block=(128, 128),
    ...                       interpret=True)
    >>> grad.shape, grad[0, 0, 0]
    ((1, 128, 128), Array(3., dtype=float32))
  """
  call = functools.partial(_gradient, block=block, heads=heads,
                           interpret=interpret)
  return jax.custom_batching.sequential_vmap(call)(x, cotangent, rows, columns)


@functools.partial(jax.jit, static_argnames=('block', 'heads', 'interpret'))
def _gradient(x, cotangent, rows, columns, *, block, heads, interpret):
  (tall, wide), count = block, rows.shape[0]
  order = jnp.argsort(rows).astype(jnp.int32)
  rows = jnp.clip(rows, 0, x.shape[1] // tall - 1)[order]
  columns = jnp.clip(columns, 0, cotangent.shape[1] // wide - 1)[order]
  height, chunk = sizes.chunk(x, cotangent, block, count)
  height, heads = tpu_heads.fit(heads, x.shape[0], height)
  chunks, panels = pl.cdiv(count, chunk), pl.cdiv(x.shape[0], height)
  kernel = functools.partial(
      _gradient_kernel, count=count, chunk=chunk, panels=panels,
      batch=x.shape[0])
  panel = lambda a, head: tpu_heads.spec((height, a.shape[1]),
                                         lambda c, i, *_: (i, 0), head)
  return pl.pallas_call(
      kernel,
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=3, grid=(chunks, panels),
          in_specs=list(map(panel, (x, cotangent), heads)),
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
          order, rows, columns, *map(tpu_heads.apart, (x, cotangent), heads))


def _gradient_kernel(order, rows, columns, x, cotangent, grad, turned, totals,
                     stage, left, *, count, chunk, panels, batch):
  _, tall, wide = totals.shape
  panel, begin = pl.program_id(1), pl.program_id(0) * chunk
  end = jnp.minimum(begin + chunk, count)
  height = tpu_heads.height(x)

  def inside(part):
    """Rows beyond the batch count nothing; what lies there is not known."""
    if batch % height == 0:
      return part
    row = lax.broadcasted_iota(jnp.int32, part.shape, 0) + panel * height
    return jnp.where(row < batch, part, jnp.zeros_like(part))

  def visit(k, _):
    @pl.when((k == begin) | (rows[k] != rows[jnp.maximum(k, 1) - 1]))
    def _():
      turned[...] = inside(tpu_heads.take(x, rows[k], tall)).T

    slope = inside(tpu_heads.take(cotangent, columns[k], wide))
    part = _dot(turned[...], slope, (1, 0))
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
                  heads: Heads | None = None, interpret=False) -> jax.Array:
  """Each tile of x.T @ cotangent, its magnitudes reduced to a number.

  Args:
    x: float[batch, in], bfloat16 or float32.
    cotangent: [batch, out] of the same dtype.
    block: (rows, columns) of a tile.
    reduce: 'sum' or 'max'.
    dtype: to which the gradient is rounded first.
    heads: of x and of the cotangent.
    interpret: as in `pl.pallas_call`.

  Returns:
    float32[row tiles, column tiles].

  Example:
    >>> x, cotangent = jnp.ones((3, 256)), -jnp.ones((3, 128))
    >>> growth_scores(x, cotangent, block=(128, 128), reduce='max',
    ...               dtype=jnp.float32, interpret=True)
    Array([[3.],
           [3.]], dtype=float32)
  """
  call = functools.partial(_scores, block=block, reduce=reduce, dtype=dtype,
                           heads=heads, interpret=interpret)
  return jax.custom_batching.sequential_vmap(call)(x, cotangent)


@functools.partial(jax.jit, static_argnames=(
    'block', 'reduce', 'dtype', 'heads', 'interpret'))
def _scores(x, cotangent, *, block, reduce, dtype, heads, interpret):
  batch, (tall, wide) = x.shape[0], block
  grid = x.shape[1] // tall, cotangent.shape[1] // wide
  size = sizes.span(x.shape[1], tall), sizes.span(cotangent.shape[1], wide)
  height, heads = tpu_heads.fit(heads, batch, sizes.rows_of(batch, 512))
  panels = pl.cdiv(batch, height)
  cells = x.shape[1] // size[0], cotangent.shape[1] // size[1]
  kernel = functools.partial(_scores_kernel, panels=panels, batch=batch,
                             block=block, reduce=reduce, dtype=dtype)
  scores = pl.pallas_call(
      kernel,
      grid=(*cells, panels),
      in_specs=[
          tpu_heads.spec((height, size[0]), lambda i, j, m: (m, i), heads[0]),
          tpu_heads.spec((height, size[1]), lambda i, j, m: (m, j), heads[1])],
      out_specs=pl.BlockSpec((8, 128), lambda i, j, m: (i, j)),
      out_shape=jax.ShapeDtypeStruct((cells[0] * 8, cells[1] * 128),
                                     jnp.float32),
      scratch_shapes=[pltpu.VMEM(size, jnp.float32)],
      compiler_params=_params('parallel', 'parallel', 'arbitrary'),
      cost_estimate=pl.CostEstimate(
          flops=2 * batch * x.shape[1] * cotangent.shape[1], transcendentals=0,
          bytes_accessed=cells[1] * x.nbytes + cells[0] * cotangent.nbytes),
      interpret=interpret, name='growth_scores')(
          *map(tpu_heads.apart, (x, cotangent), heads))
  scores = scores.reshape(cells[0], 8, cells[1], 128)
  return scores[:, :size[0] // tall, :, :size[1] // wide].reshape(grid)


def _scores_kernel(x, cotangent, scores, total, *, panels, batch, block,
                   reduce, dtype):
  (tall, wide), panel, height = block, pl.program_id(2), tpu_heads.height(x)

  def inside(ref, width):
    part = tpu_heads.take(ref, 0, width)
    if batch % height == 0:
      return part
    row = lax.broadcasted_iota(jnp.int32, part.shape, 0) + panel * height
    return jnp.where(row < batch, part, jnp.zeros_like(part))

  part = _dot(*map(inside, (x, cotangent), total.shape), (0, 0))
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


def _in_turn(call, mapped):
  """vmap as a loop: a kernel that copies by itself has no batched form."""
  axes = [0 if given else None for given in mapped]
  return jax.vmap(jax.custom_batching.sequential_vmap(call), axes)


def _params(*semantics):
  return pltpu.CompilerParams(dimension_semantics=semantics,
                              vmem_limit_bytes=sizes.chip().vmem)


def _dot(a, b, axes):
  return lax.dot_general(a, b, ((axes[:1], axes[1:]), ((), ())),
                         preferred_element_type=jnp.float32)
