"""The products of tiles in three ways: in a loop, in a batch, in a kernel.

All three compute the same. What a row of tiles meets in the input, a slice of
a matrix or the windows of a convolution, is no concern of theirs.
"""

import functools
import math
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from sparse_jax.blocks import packing
from sparse_jax.blocks import kernels
from sparse_jax.blocks.packing import PackedBlocks

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


class Plan(NamedTuple):
  """What a product is, all of it static."""

  inputs: Columns | Windows  # How a row of tiles meets the input.
  outputs: Columns
  width: int  # Of the output, its last tile whole.
  implementation: str | None


def multiply(plan: Plan, x: jax.Array, blocks: jax.Array, rows: jax.Array,
             columns: jax.Array) -> jax.Array:
  """[height, width]: the input times the tiles, each at its row and column."""
  ways = _multiply_loop, _multiply_batched, _multiply_pallas
  return _choose(plan, *ways)(x, blocks, rows, columns)


def both_gradients(plan: Plan, x: jax.Array, cotangent: jax.Array,
                   blocks: jax.Array, rows: jax.Array, columns: jax.Array
                   ) -> tuple[jax.Array, jax.Array]:
  """The gradients to the input and to the tiles, where they are the same."""
  ways = _both_loop, _both_batched, _both_pallas
  return _choose(plan, *ways)(x, cotangent, blocks, rows, columns)


def input_gradient(plan: Plan, x: jax.Array, cotangent: jax.Array,
                   blocks: jax.Array, rows: jax.Array, columns: jax.Array
                   ) -> jax.Array:
  """The shape of x: the gradient to it, by the tiles."""
  ways = _input_loop, _input_batched, _input_pallas
  return _choose(plan, *ways)(x, cotangent, blocks, rows, columns)


def weight_gradient(plan: Plan, x: jax.Array, cotangent: jax.Array,
                    rows: jax.Array, columns: jax.Array) -> jax.Array:
  """[tiles, tall, wide]: the gradient to the tiles."""
  ways = _weight_loop, _weight_batched, _weight_pallas
  return _choose(plan, *ways)(x, cotangent, rows, columns)


def growth_scores(plan: Plan, x: jax.Array, packed: PackedBlocks,
                  cotangent: jax.Array) -> jax.Array:
  """float32[grid]: each tile of the dense gradient, reduced to a number.

  The gradient is made and dropped a tile at a time.
  """
  rows, columns = packed.grid

  def tile_score(row, column):
    grad = _dot(plan.inputs.take(x.astype(cotangent.dtype), row),
                plan.outputs.take(cotangent, column), (0, 0))
    grad = grad.astype(packed.dtype)
    return packing.tile_scores(grad, packed.reduce).astype(jnp.float32)

  row_scores = lambda row: lax.map(lambda column: tile_score(row, column),
                                   jnp.arange(columns))
  return lax.map(row_scores, jnp.arange(rows))


def _choose(plan, *ways):
  """One of three ways to compute the same, by name or by platform."""
  loop, batched, pallas = (functools.partial(way, plan) for way in ways)
  if plan.implementation is not None:
    return {'loop': loop, 'batched': batched,
            'pallas': pallas}[plan.implementation]
  return lambda *args: lax.platform_dependent(*args, cpu=loop,
                                              default=batched)


def _multiply_loop(plan, x, blocks, rows, columns):
  def step(y, tile):
    row, column, block = tile
    product = _dot(plan.inputs.take(x, row), block, (1, 0))
    return plan.outputs.add(y, product, column), None

  empty = jnp.zeros((plan.inputs.height(x.shape[0]), plan.width), _wide(x))
  return _scan(step, empty, (rows, columns, blocks))


def _both_loop(plan, x, cotangent, blocks, rows, columns):
  def step(grads, tile):
    (grad_x, grad), (k, row, column, block) = grads, tile
    slope = plan.outputs.take(cotangent, column)
    product = _dot(slope, block, (1, 1))
    own = _dot(plan.inputs.take(x, row), slope, (0, 0))
    return (plan.inputs.add(grad_x, product, row),
            lax.dynamic_update_index_in_dim(grad, own, k, 0)), None

  empty = (jnp.zeros(x.shape, _wide(cotangent)),
           _empty_weight(plan, cotangent, rows))
  return _scan(step, empty, (jnp.arange(rows.size), rows, columns, blocks))


def _input_loop(plan, x, cotangent, blocks, rows, columns):
  def step(grad_x, tile):
    row, column, block = tile
    product = _dot(plan.outputs.take(cotangent, column), block, (1, 1))
    return plan.inputs.add(grad_x, product, row), None

  return _scan(step, jnp.zeros(x.shape, _wide(cotangent)),
               (rows, columns, blocks))


def _weight_loop(plan, x, cotangent, rows, columns):
  def step(grad, tile):
    k, row, column = tile
    own = _dot(plan.inputs.take(x, row), plan.outputs.take(cotangent, column),
               (0, 0))
    return lax.dynamic_update_index_in_dim(grad, own, k, 0), None

  return _scan(step, _empty_weight(plan, cotangent, rows),
               (jnp.arange(rows.size), rows, columns))


def _empty_weight(plan, cotangent, rows):
  shape = (rows.size, plan.inputs.size, plan.outputs.size)
  return jnp.zeros(shape, _wide(cotangent))


def _scan(step, empty, tiles):
  return lax.scan(step, empty, tiles, unroll=_UNROLL)[0]


def _multiply_batched(plan, x, blocks, rows, columns):
  inputs = jax.vmap(plan.inputs.take, (None, 0))(x, rows)
  parts = jnp.einsum('nbi,nio->nbo', inputs, blocks,
                     preferred_element_type=_wide(x))
  empty = jnp.zeros((plan.inputs.height(x.shape[0]), plan.width),
                    parts.dtype)
  return _add_all(plan.outputs, empty, parts, columns)


def _both_batched(plan, x, cotangent, blocks, rows, columns):
  return (_input_batched(plan, x, cotangent, blocks, rows, columns),
          _weight_batched(plan, x, cotangent, rows, columns))


def _input_batched(plan, x, cotangent, blocks, rows, columns):
  slopes = jax.vmap(plan.outputs.take, (None, 0))(cotangent, columns)
  parts = jnp.einsum('nbo,nio->nbi', slopes, blocks,
                     preferred_element_type=_wide(cotangent))
  return _add_all(plan.inputs, jnp.zeros(x.shape, parts.dtype), parts, rows)


def _weight_batched(plan, x, cotangent, rows, columns):
  inputs = jax.vmap(plan.inputs.take, (None, 0))(x, rows)
  slopes = jax.vmap(plan.outputs.take, (None, 0))(cotangent, columns)
  return jnp.einsum('nbi,nbo->nio', inputs, slopes,
                    preferred_element_type=_wide(x))


def _multiply_pallas(plan, x, blocks, rows, columns):
  return kernels.block_product(x, blocks, rows, columns,
                                      width=plan.width)


def _input_pallas(plan, x, cotangent, blocks, rows, columns):
  del plan
  return kernels.block_product(cotangent, blocks.swapaxes(1, 2),
                                      columns, rows, width=x.shape[1])


def _weight_pallas(plan, x, cotangent, rows, columns):
  block = (plan.inputs.size, plan.outputs.size)
  return kernels.block_gradient(x, cotangent, rows, columns,
                                       block=block)


def _both_pallas(plan, x, cotangent, blocks, rows, columns):
  return (_input_pallas(plan, x, cotangent, blocks, rows, columns),
          _weight_pallas(plan, x, cotangent, rows, columns))


def _add_all(axis, empty, parts, index):
  """Adds every part at its index: the transpose of taking it."""
  take_all = lambda x: jax.vmap(axis.take, (None, 0))(x, index)
  return jax.linear_transpose(take_all, empty)(parts)[0]


def _dot(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
  contract = ((axes[:1], axes[1:]), ((), ()))
  return lax.dot_general(a, b, contract, preferred_element_type=_wide(a))


def _wide(x: jax.Array):
  """The dtype in which products of x are summed."""
  return jnp.promote_types(x.dtype, jnp.float32)
