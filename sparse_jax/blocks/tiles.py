"""The products of tiles: in a loop, in a batch, in a kernel of the chip.

All compute the same. What a row of tiles meets in the input, a slice of a
matrix or the windows of a convolution, is no concern of the first two; the
kernels take slices alone.
"""

from collections.abc import Callable
import functools
import math
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from sparse_jax.blocks import gpu
from sparse_jax.blocks import packing
from sparse_jax.blocks import tpu
from sparse_jax.blocks.packing import PackedBlocks

IMPLEMENTATIONS = (None, 'loop', 'batched', 'tpu', 'gpu')
_KERNELS = {'tpu': ('tpu', tpu), 'gpu': ('cuda', gpu)}  # Platform, module.

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


class _Product(NamedTuple):
  """A product in all its ways, and its derivative.

  Attributes:
    loop, batched: functions of the plan and the operands.
    kernel: of a module of kernels, the plan and the operands, whose shapes it
      looks at: a function of the operands and `interpret`, or None if there
      is no kernel for them.
    derivative: of the plan, the operands and a cotangent: the cotangents to
      the operands.
  """

  loop: Callable
  batched: Callable
  kernel: Callable
  derivative: Callable


def multiply(plan: Plan, x: jax.Array, blocks: jax.Array, rows: jax.Array,
             columns: jax.Array) -> jax.Array:
  """[height, width]: the input times the tiles, each at its row and column.

  Like all of these, of the dtype of its operands and summed in float32 or
  wider.
  """
  return _run(_MULTIPLY, plan, x, blocks, rows, columns)


def both_gradients(plan: Plan, x: jax.Array, cotangent: jax.Array,
                   blocks: jax.Array, rows: jax.Array, columns: jax.Array
                   ) -> tuple[jax.Array, jax.Array]:
  """The gradients to the input and to the tiles, where they are the same."""
  return _run(_BOTH, plan, x, cotangent, blocks, rows, columns)


def input_gradient(plan: Plan, x: jax.Array, cotangent: jax.Array,
                   blocks: jax.Array, rows: jax.Array, columns: jax.Array
                   ) -> jax.Array:
  """The shape of x: the gradient to it, by the tiles."""
  return _run(_INPUT, plan, x, cotangent, blocks, rows, columns)


def weight_gradient(plan: Plan, x: jax.Array, cotangent: jax.Array,
                    rows: jax.Array, columns: jax.Array) -> jax.Array:
  """[tiles, tall, wide]: the gradient to the tiles."""
  return _run(_WEIGHT, plan, x, cotangent, rows, columns)


def growth_scores(plan: Plan, x: jax.Array, packed: PackedBlocks,
                  cotangent: jax.Array) -> jax.Array:
  """float32[grid]: each tile of the dense gradient, reduced to a number.

  The gradient is made and dropped a tile at a time. By a kernel, the scores
  have no derivative.
  """
  static = packed.grid, packed.block, packed.reduce, packed.dtype
  loop = functools.partial(_scores_loop, static)
  product = _Product(loop, loop, functools.partial(_scores_kernel, static),
                     lambda *_: (None, None))
  return _run(product, plan, x.astype(cotangent.dtype), cotangent)


def _run(product, plan, *args):
  """By the plan's implementation, or else by the platform."""
  if plan.implementation in ('loop', 'batched'):
    return getattr(product, plan.implementation)(plan, *args)
  if _kernels(product, plan, args):
    return _run_kernel(product, plan, *args)
  if plan.implementation is not None:
    where = ' outside jax.shard_map' if _split() else ''
    raise ValueError(f'`implementation` (={plan.implementation!r}) has no '
                     f'kernel{where} for blocks of {plan.inputs.size} x '
                     f'{plan.outputs.size} and x of {args[0].dtype} and shape '
                     f'{args[0].shape}.')
  return lax.platform_dependent(
      *args, cpu=functools.partial(product.loop, plan),
      default=functools.partial(product.batched, plan))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run_kernel(product, plan, *args):
  """As `_run`, where there is a kernel: those have no derivative."""
  kernels = _kernels(product, plan, args)
  if plan.implementation is not None:
    kernel, = kernels.values()
    return lax.platform_dependent(
        *args, cpu=functools.partial(kernel, interpret=True), default=kernel)
  return lax.platform_dependent(
      *args, **kernels, cpu=functools.partial(product.loop, plan),
      default=functools.partial(product.batched, plan))


_run_kernel.defvjp(
    lambda product, plan, *args: (_run_kernel(product, plan, *args), args),
    lambda product, plan, args, out: product.derivative(plan, args, out))


def _kernels(product, plan, args):
  """By platform, those that take these shapes and that the plan allows."""
  if not isinstance(plan.inputs, Columns) or _split():
    return {}
  found = {platform: product.kernel(module, plan, *args)
           for name, (platform, module) in _KERNELS.items()
           if plan.implementation in (None, name)}
  return {name: kernel for name, kernel in found.items() if kernel is not None}


def _split() -> bool:
  """Whether XLA splits arrays over a mesh here: kernels it does not split."""
  mesh = jax.sharding.get_abstract_mesh()
  return any(size > 1 and kind != jax.sharding.AxisType.Manual
             for size, kind in zip(mesh.axis_sizes, mesh.axis_types))


def _multiply_kernel(module, plan, x, blocks, *_):
  if not module.product_fits(x, blocks.shape[1:], len(blocks), plan.width):
    return None
  return functools.partial(module.block_product, width=plan.width)


def _input_kernel(module, plan, x, cotangent, blocks, *_):
  shape = dict(width=x.shape[1], transpose=True)
  if not module.product_fits(cotangent, blocks.shape[1:], len(blocks),
                             **shape):
    return None
  return lambda x, cotangent, blocks, rows, columns, **options: (
      module.block_product(cotangent, blocks, columns, rows, **shape,
                           **options))


def _weight_kernel(module, plan, x, cotangent, rows, columns):
  block = plan.inputs.size, plan.outputs.size
  if not module.gradient_fits(x, cotangent, block, rows.size):
    return None
  return functools.partial(module.block_gradient, block=block)


def _both_kernel(module, plan, x, cotangent, blocks, rows, columns):
  to_input = _input_kernel(module, plan, x, cotangent, blocks)
  to_weight = _weight_kernel(module, plan, x, cotangent, rows, columns)
  if to_input is None or to_weight is None:
    return None
  return lambda x, cotangent, blocks, *at, **options: (
      to_input(x, cotangent, blocks, *at, **options),
      to_weight(x, cotangent, *at, **options))


def _scores_kernel(static, module, plan, x, cotangent):
  _, block, reduce, dtype = static
  if not module.scores_fit(x, block):
    return None
  return functools.partial(module.growth_scores, block=block, reduce=reduce,
                           dtype=dtype)


def _scores_loop(static, plan, x, cotangent):
  (rows, columns), _, reduce, dtype = static

  def tile_score(row, column):
    grad = _dot(plan.inputs.take(x, row), plan.outputs.take(cotangent, column),
                (0, 0))
    return packing.tile_scores(grad.astype(dtype), reduce).astype(jnp.float32)

  row_scores = lambda row: lax.map(lambda column: tile_score(row, column),
                                   jnp.arange(columns))
  return lax.map(row_scores, jnp.arange(rows))


def _multiply_loop(plan, x, blocks, rows, columns):
  def step(y, tile):
    row, column, block = tile
    product = _dot(plan.inputs.take(x, row), block, (1, 0))
    return plan.outputs.add(y, product, column), None

  empty = jnp.zeros((plan.inputs.height(x.shape[0]), plan.width), _wide(x))
  return _scan(step, empty, (rows, columns, blocks)).astype(x.dtype)


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
  grads = _scan(step, empty, (jnp.arange(rows.size), rows, columns, blocks))
  return tuple(grad.astype(cotangent.dtype) for grad in grads)


def _input_loop(plan, x, cotangent, blocks, rows, columns):
  def step(grad_x, tile):
    row, column, block = tile
    product = _dot(plan.outputs.take(cotangent, column), block, (1, 1))
    return plan.inputs.add(grad_x, product, row), None

  return _scan(step, jnp.zeros(x.shape, _wide(cotangent)),
               (rows, columns, blocks)).astype(cotangent.dtype)


def _weight_loop(plan, x, cotangent, rows, columns):
  def step(grad, tile):
    k, row, column = tile
    own = _dot(plan.inputs.take(x, row), plan.outputs.take(cotangent, column),
               (0, 0))
    return lax.dynamic_update_index_in_dim(grad, own, k, 0), None

  grad = _scan(step, _empty_weight(plan, cotangent, rows),
               (jnp.arange(rows.size), rows, columns))
  return grad.astype(cotangent.dtype)


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
  return _add_all(plan.outputs, empty, parts, columns).astype(x.dtype)


def _both_batched(plan, x, cotangent, blocks, rows, columns):
  return (_input_batched(plan, x, cotangent, blocks, rows, columns),
          _weight_batched(plan, x, cotangent, rows, columns))


def _input_batched(plan, x, cotangent, blocks, rows, columns):
  slopes = jax.vmap(plan.outputs.take, (None, 0))(cotangent, columns)
  parts = jnp.einsum('nbo,nio->nbi', slopes, blocks,
                     preferred_element_type=_wide(cotangent))
  empty = jnp.zeros(x.shape, parts.dtype)
  return _add_all(plan.inputs, empty, parts, rows).astype(cotangent.dtype)


def _weight_batched(plan, x, cotangent, rows, columns):
  inputs = jax.vmap(plan.inputs.take, (None, 0))(x, rows)
  slopes = jax.vmap(plan.outputs.take, (None, 0))(cotangent, columns)
  grad = jnp.einsum('nbi,nbo->nio', inputs, slopes,
                    preferred_element_type=_wide(x))
  return grad.astype(cotangent.dtype)


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


def _multiply_derivative(plan, args, out):
  x, blocks, rows, columns = args
  return (*both_gradients(plan, x, out, blocks, rows, columns), None, None)


def _input_derivative(plan, args, out):
  _, cotangent, blocks, rows, columns = args
  return (None, multiply(plan, out, blocks, rows, columns),
          weight_gradient(plan, out, cotangent, rows, columns), None, None)


def _weight_derivative(plan, args, out):
  x, cotangent, rows, columns = args
  return (input_gradient(plan, x, cotangent, out, rows, columns),
          multiply(plan, x, out, rows, columns), None, None)


def _both_derivative(plan, args, outs):
  x, cotangent, blocks, *at = args
  to_x, to_grad = outs
  _, by_x, to_blocks, *_ = _input_derivative(
      plan, (x, cotangent, blocks, *at), to_x)
  own_x, by_grad, *_ = _weight_derivative(plan, (x, cotangent, *at), to_grad)
  return own_x, by_x + by_grad, to_blocks, None, None


_MULTIPLY = _Product(_multiply_loop, _multiply_batched, _multiply_kernel,
                     _multiply_derivative)
_BOTH = _Product(_both_loop, _both_batched, _both_kernel, _both_derivative)
_INPUT = _Product(_input_loop, _input_batched, _input_kernel,
                  _input_derivative)
_WEIGHT = _Product(_weight_loop, _weight_batched, _weight_kernel,
                   _weight_derivative)
