"""The products of tiles: in a loop, or in a batch.

Both compute the same. What a row of tiles meets in the input, a slice of a
matrix or the windows of a convolution, is no concern of theirs.
"""

import math
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from sparse_jax.blocks import packing

# Blocks in one turn of the loop, as measured on two cores: XLA runs what does
# not depend on another block's result side by side.
_UNROLL = 4


class Columns(NamedTuple):
  """Tiles side by side along the last axis of a matrix."""

  size: int

  def height(self, count: int) -> int:
    return count

  def take(self, x: jax.Array, index: jax.Array) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, index * self.size, self.size, 1)

  def add(self, x: jax.Array, part: jax.Array, index: jax.Array) -> jax.Array:
    total = self.take(x, index) + part
    return lax.dynamic_update_slice_in_dim(x, total, index * self.size, 1)


class Windows(NamedTuple):
  """Tiles of a kernel's input channels, at each of its positions.

  An index counts positions first and then the tiles of channels; the tile
  meets every window that the kernel sees through that position.
  """

  size: int  # Channels of a tile.
  tiles: int  # Of the input channels.
  kernel: tuple[int, ...]
  strides: tuple[int, ...]
  dilation: tuple[int, ...]
  outputs: tuple[int, ...]  # Windows along each axis.

  def height(self, count: int) -> int:
    return count * math.prod(self.outputs)

  def take(self, x: jax.Array, index: jax.Array) -> jax.Array:
    start, span = self._place(index, x.shape[0])
    seen = lax.dynamic_slice(x, start, span)
    steps = (1, *self.strides, 1)
    return lax.slice(seen, (0,) * x.ndim, span, steps).reshape(-1, self.size)

  def add(self, x: jax.Array, part: jax.Array, index: jax.Array) -> jax.Array:
    start, span = self._place(index, x.shape[0])
    part = part.reshape(x.shape[0], *self.outputs, self.size)
    apart = [(0, 0, 0), *((0, 0, n - 1) for n in self.strides), (0, 0, 0)]
    spread = lax.pad(part, jnp.zeros((), part.dtype), apart)
    total = lax.dynamic_slice(x, start, span) + spread
    return lax.dynamic_update_slice(x, total, start)

  def _place(self, index, count):
    position, tile = index // self.tiles, index % self.tiles
    starts = jnp.unravel_index(position, self.kernel)
    span = [(n - 1) * step + 1 for n, step in zip(self.outputs, self.strides)]
    start = [at * step for at, step in zip(starts, self.dilation)]
    return ([jnp.zeros_like(index), *start, tile * self.size],
            (count, *span, self.size))


class Heads(NamedTuple):
  """Of the two matrices of a product, whose columns may be heads'.

  A head has a multiple of 128 columns, and a tile holds whole ones.
  """

  length: int  # Rows of a sequence.
  inputs: int | None  # Columns of a head, if there are any.
  outputs: int | None

  def turned(self) -> 'Heads':
    return self._replace(inputs=self.outputs, outputs=self.inputs)


class Plan(NamedTuple):
  """What a product is, all of it static."""

  inputs: Columns | Windows  # How a row of tiles meets the input.
  outputs: Columns
  width: int  # Of the output, its last tile whole.
  implementation: str | None
  rows: tuple[str, ...] | None = None  # Axes of a mesh that split the input's
  columns: tuple[str, ...] = ()  # rows (None: what divides them), the tiles'.
  heads: Heads | None = None
  weights_first: bool = False  # What reads a wide cotangent; then grad x.


def scores_loop(static, plan, x, cotangent, total=lambda grad: grad):
  """float32[grid]: a number for each tile of the dense gradient.

  The gradient is made and dropped a row of tiles at a time. `total` sums a row
  over devices that have a part of the rows of `x` each.
  """
  count, block, reduce, dtype = static

  def row_scores(row):
    grad = total(correlate(plan.inputs.take(x, row), cotangent))
    cut = packing.tile(grad.astype(dtype), block)
    return packing.tile_scores(cut, reduce).astype(jnp.float32)

  return lax.map(row_scores, jnp.arange(count))


def multiply_loop(plan, x, blocks, rows, columns):
  def step(y, tile):
    row, column, block = tile
    product = multiply(plan.inputs.take(x, row), block)
    return plan.outputs.add(y, product, column), None

  empty = jnp.zeros((plan.inputs.height(x.shape[0]), plan.width), _wide(x))
  return _scan(step, empty, (rows, columns, blocks)).astype(x.dtype)


def both_loop(plan, x, cotangent, blocks, rows, columns):
  def step(grads, tile):
    (grad_x, grad), (k, row, column, block) = grads, tile
    slope = plan.outputs.take(cotangent, column)
    product = multiply(slope, block, turned=True)
    own = correlate(plan.inputs.take(x, row), slope)
    return (plan.inputs.add(grad_x, product, row),
            lax.dynamic_update_index_in_dim(grad, own, k, 0)), None

  empty = (jnp.zeros(x.shape, _wide(cotangent)),
           _empty_weight(plan, cotangent, rows))
  grads = _scan(step, empty,
                (jnp.arange(rows.size), rows, columns, _turned(blocks)))
  return tuple(grad.astype(cotangent.dtype) for grad in grads)


def input_loop(plan, x, cotangent, blocks, rows, columns):
  def step(grad_x, tile):
    row, column, block = tile
    product = multiply(plan.outputs.take(cotangent, column), block,
                       turned=True)
    return plan.inputs.add(grad_x, product, row), None

  return _scan(step, jnp.zeros(x.shape, _wide(cotangent)),
               (rows, columns, _turned(blocks))).astype(cotangent.dtype)


def weight_loop(plan, x, cotangent, rows, columns):
  def step(grad, tile):
    k, row, column = tile
    own = correlate(plan.inputs.take(x, row),
                    plan.outputs.take(cotangent, column))
    return lax.dynamic_update_index_in_dim(grad, own, k, 0), None

  grad = _scan(step, _empty_weight(plan, cotangent, rows),
               (jnp.arange(rows.size), rows, columns))
  return grad.astype(cotangent.dtype)


def _empty_weight(plan, cotangent, rows):
  shape = (rows.size, plan.inputs.size, plan.outputs.size)
  return jnp.zeros(shape, _wide(cotangent))


def _scan(step, empty, tiles):
  return lax.scan(step, empty, tiles, unroll=_UNROLL)[0]


def multiply_batched(plan, x, blocks, rows, columns):
  inputs = jax.vmap(plan.inputs.take, (None, 0))(x, rows)
  parts = jnp.einsum('nbi,nio->nbo', inputs, blocks,
                     preferred_element_type=_wide(x))
  empty = jnp.zeros((plan.inputs.height(x.shape[0]), plan.width),
                    parts.dtype)
  return _add_all(plan.outputs, empty, parts, columns).astype(x.dtype)


def both_batched(plan, x, cotangent, blocks, rows, columns):
  return (input_batched(plan, x, cotangent, blocks, rows, columns),
          weight_batched(plan, x, cotangent, rows, columns))


def input_batched(plan, x, cotangent, blocks, rows, columns):
  slopes = jax.vmap(plan.outputs.take, (None, 0))(cotangent, columns)
  parts = jnp.einsum('nbo,nio->nbi', slopes, blocks,
                     preferred_element_type=_wide(cotangent))
  empty = jnp.zeros(x.shape, parts.dtype)
  return _add_all(plan.inputs, empty, parts, rows).astype(cotangent.dtype)


def weight_batched(plan, x, cotangent, rows, columns):
  inputs = jax.vmap(plan.inputs.take, (None, 0))(x, rows)
  slopes = jax.vmap(plan.outputs.take, (None, 0))(cotangent, columns)
  grad = jnp.einsum('nbi,nbo->nio', inputs, slopes,
                    preferred_element_type=_wide(x))
  return grad.astype(cotangent.dtype)


def _add_all(axis, empty, parts, index):
  """Adds every part at its index: the transpose of taking it."""
  take_all = lambda x: jax.vmap(axis.take, (None, 0))(x, index)
  return jax.linear_transpose(take_all, empty)(parts)[0]


def _turned(blocks: jax.Array) -> jax.Array:
  """The transposes of blocks, as `multiply` takes them."""
  return blocks.swapaxes(1, 2) if _on_all_cores(blocks) else blocks


def multiply(a: jax.Array, b: jax.Array, turned: bool = False) -> jax.Array:
  """a @ b, or a @ b.T if b is one of those that `_turned` was given.

  XLA for CPUs leaves a dot of float32 to a library that does so small a one on
  one core. A convolution of one position becomes a dot after that was decided,
  and runs on all; so does what sums the first axis of `a` (`correlate`), while
  one that sums the last axis of `b` is slow. Blocks below 64 gain nothing.
  """
  if not _on_all_cores(b):
    return lax.dot_general(a, b, (((1,), (int(turned),)), ((), ())),
                           preferred_element_type=_wide(a))
  return lax.conv_general_dilated(
      a[:, None], b[None], window_strides=(1,), padding='VALID',
      dimension_numbers=('NWC', 'WIO', 'NWC'))[:, 0]


def _on_all_cores(blocks):
  return blocks.dtype == jnp.float32 and min(blocks.shape[-2:]) >= 64


def correlate(a: jax.Array, b: jax.Array) -> jax.Array:
  """a.T @ b."""
  return lax.dot_general(a, b, (((0,), (0,)), ((), ())),
                         preferred_element_type=_wide(a))


def _wide(x: jax.Array):
  """The dtype in which products of x are summed."""
  return jnp.promote_types(x.dtype, jnp.float32)
