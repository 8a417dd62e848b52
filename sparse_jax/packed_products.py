"""Products with packed weights: only kept blocks are touched, both ways."""

import functools
import math
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from sparse_jax import base
from sparse_jax import packed as packed_lib
from sparse_jax import packed_kernels
from sparse_jax.packed import PackedBlocks

_PLAIN = (None, 'loop', 'batched')
_IMPLEMENTATIONS = (*_PLAIN, 'pallas')
# Blocks in one turn of the loop, as measured on two cores: XLA runs what does
# not depend on another block's result side by side.
_UNROLL = 4


class _Columns(NamedTuple):
  """Tiles side by side along the last axis of a matrix."""

  size: int

  def height(self, count: int) -> int:
    return count

  def take(self, x: jax.Array, index: jax.Array) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, index * self.size, self.size, 1)

  def add(self, x: jax.Array, part: jax.Array, index: jax.Array) -> jax.Array:
    total = self.take(x, index) + part
    return lax.dynamic_update_slice_in_dim(x, total, index * self.size, 1)


class _Windows(NamedTuple):
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


class _Plan(NamedTuple):
  """What a product is, all of it static."""

  inputs: _Columns | _Windows  # How a row of tiles meets the input.
  outputs: _Columns
  width: int  # Of the output, its last tile whole.
  implementation: str | None


def packed_matmul(x: jax.Array, packed: PackedBlocks, *,
                  implementation: str | None = None) -> jax.Array:
  """x @ weight, where only the kept blocks of the weight exist.

  The forward pass and the gradient to `x` multiply by the blocks of A, the
  gradient to the weight is made for the blocks of B; nothing of the dense
  weight's size is read, written or allocated. Sums are kept in float32 where
  the operands are 16-bit.

  Laws: it is x @ unpack(packed), and so is its gradient to x; the gradient to
  `packed.blocks` is that of the dense weight, block by block, on B.

  Args:
    x: float[..., in].
    packed: PackedBlocks of a matrix [in, out]. If its leaf `growth` is there,
      the gradient of that leaf is the score of every block of the dense
      gradient, which is made and dropped a block at a time. A weight that is
      used several times gets the sum of the scores.
    implementation: 'loop' goes through the blocks, a few at a time, 'batched'
      multiplies all at once, which takes memory for the inputs of every
      block, 'pallas' runs a kernel written for GPUs. None takes the loop on a
      CPU, as measured, and 'batched' elsewhere.

  Returns:
    float[..., out], of the operands' common dtype.

  Raises:
    ValueError: for shapes that do not fit, known indices out of range, or an
      unknown `implementation`.

  Example:
    >>> packed = packed_lib.pack(jnp.eye(4), block=(2, 2), sparsity=0.5)
    >>> packed_matmul(jnp.arange(4.), packed)
    Array([0., 1., 2., 3.], dtype=float32)
  """
  _check_product(x, packed, implementation)
  (tall, wide), (rows, columns) = packed.block, packed.grid
  plan = _Plan(_Columns(tall), _Columns(wide), columns * wide, implementation)
  flat = x.reshape(-1, x.shape[-1])
  flat = jnp.pad(flat, ((0, 0), (0, rows * tall - flat.shape[1])))
  y = _product(plan, flat, packed)[:, :packed.shape[1]]
  return y.reshape(*x.shape[:-1], packed.shape[1])


def packed_conv(x: jax.Array, packed: PackedBlocks, *,
                strides: int | tuple[int, ...] = 1,
                padding: str | tuple[tuple[int, int], ...] = 'SAME',
                dilation: int | tuple[int, ...] = 1,
                implementation: str | None = None) -> jax.Array:
  """The convolution by a packed kernel: only its kept blocks exist.

  A block is a tile of the input and output channels at one position of the
  kernel. Each is multiplied by the windows of `x` that it meets, so that the
  work and the memory are those of `packed_matmul`; nothing is unfolded.

  Law: it is jax.lax.conv_general_dilated with unpack(packed), NHWC and HWIO,
  and so are its gradients, that of the kernel on B.

  Args:
    x: float[batch, spatial..., in].
    packed: PackedBlocks of a kernel [spatial..., in, out].
    strides, dilation: of the windows and of the kernel, one number or one
      for each spatial axis.
    padding: 'SAME', 'VALID' or (before, after) for each spatial axis.
    implementation: as in `packed_matmul`, 'pallas' excepted.

  Returns:
    float[batch, spatial..., out].

  Raises:
    ValueError: for shapes or numbers that do not fit.

  Example:
    >>> kernel = jnp.ones((3, 3, 2, 2))
    >>> packed = packed_lib.pack(kernel, block=(2, 2), sparsity=0.5)
    >>> packed_conv(jnp.ones((1, 4, 4, 2)), packed).shape
    (1, 4, 4, 2)
  """
  count = len(packed.shape) - 2
  if x.ndim != count + 2 or x.shape[-1] != packed.shape[-2]:
    raise ValueError(f'`x` (of shape {x.shape}) must be [batch, spatial..., '
                     f'in] for `packed` (of shape {packed.shape}).')
  _check_common(packed, implementation, _PLAIN)
  strides = _per_axis('strides', strides, count)
  dilation = _per_axis('dilation', dilation, count)
  if set(packed.shape[:-2] + strides) <= {1}:
    matrix = packed.replace(shape=packed.shape[-2:])
    return packed_matmul(_padded(x, _pads(x, (1,) * count, strides, padding)),
                         matrix, implementation=implementation)
  reach = tuple((n - 1) * step + 1
                for n, step in zip(packed.shape, dilation))
  x = _padded(x, _pads(x, reach, strides, padding))
  outputs = tuple((n - far) // step + 1 for n, far, step in
                  zip(x.shape[1:-1], reach, strides))
  if min(outputs) < 1:
    raise ValueError(f'`x` (padded to {x.shape}) must not be smaller than the '
                     f'kernel\'s reach {reach}.')
  y = _convolve(x, packed, _Windows(
      packed.block[0], -(-packed.shape[-2] // packed.block[0]),
      packed.shape[:-2], strides, dilation, outputs), implementation)
  return y.reshape(x.shape[0], *outputs, packed.shape[-1])


def _convolve(x, packed, windows, implementation):
  wide, columns = packed.block[1], packed.grid[1]
  plan = _Plan(windows, _Columns(wide), columns * wide, implementation)
  more = windows.tiles * windows.size - x.shape[-1]
  x = _padded(x, ((0, 0),) * (x.ndim - 2), more)
  return _product(plan, x, packed)[:, :packed.shape[-1]]


def _pads(x, reach, strides, padding):
  if isinstance(padding, str):
    if padding not in ('SAME', 'VALID'):
      raise ValueError(f'`padding` (={padding!r}) must be \'SAME\', '
                       '\'VALID\' or pairs of integers.')
    return lax.padtype_to_pads(x.shape[1:-1], reach, strides, padding)
  if len(padding) != len(reach) or any(len(pair) != 2 for pair in padding):
    raise ValueError(f'`padding` (={padding!r}) must have a pair for each of '
                     f'{len(reach)} axes.')
  return padding


def _padded(x, pads, channels: int = 0):
  return jnp.pad(x, ((0, 0), *(tuple(pair) for pair in pads), (0, channels)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(plan: _Plan, x: jax.Array, packed: PackedBlocks) -> jax.Array:
  return _multiply(plan, x, packed)


def _product_forward(plan, x, packed):
  return _multiply(plan, x, packed), (x, packed)


def _product_backward(plan, saved, cotangent):
  x, packed = saved
  grad_x, grad_blocks = _gradients(plan, x, packed, cotangent)
  growth = None
  if packed.growth is not None:
    growth = _growth_scores(plan, x, packed, cotangent)
  grad = packed.replace(blocks=grad_blocks, rows=None, columns=None,
                        forward=None, growth=growth)
  return grad_x, grad


_product.defvjp(_product_forward, _product_backward)


def _multiply(plan, x, packed):
  kept = packed.read()
  dtype = jnp.result_type(x, kept.blocks)
  y = _choose(plan, *_MULTIPLY)(
      x.astype(dtype), kept.blocks.astype(dtype), kept.rows, kept.columns)
  return y.astype(dtype)


def _gradients(plan, x, packed, cotangent):
  """The gradients to x, by the tiles of A, and to the tiles of B."""
  dtype = cotangent.dtype
  if packed.forward is None:
    blocks = packed.blocks.astype(dtype)
    grad_x, grad = _choose(plan, *_BOTH)(
        x.astype(dtype), cotangent, blocks, packed.rows, packed.columns)
  else:
    kept = packed.read()
    grad_x = _choose(plan, *_INPUT)(
        x, cotangent, kept.blocks.astype(dtype), kept.rows, kept.columns)
    grad = _choose(plan, *_WEIGHT)(
        x.astype(dtype), cotangent, packed.rows, packed.columns)
  return grad_x.astype(x.dtype), grad.astype(packed.dtype)


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
  return packed_kernels.block_product(x, blocks, rows, columns,
                                      width=plan.width)


def _input_pallas(plan, x, cotangent, blocks, rows, columns):
  del plan
  return packed_kernels.block_product(cotangent, blocks.swapaxes(1, 2),
                                      columns, rows, width=x.shape[1])


def _weight_pallas(plan, x, cotangent, rows, columns):
  block = (plan.inputs.size, plan.outputs.size)
  return packed_kernels.block_gradient(x, cotangent, rows, columns,
                                       block=block)


def _both_pallas(plan, x, cotangent, blocks, rows, columns):
  return (_input_pallas(plan, x, cotangent, blocks, rows, columns),
          _weight_pallas(plan, x, cotangent, rows, columns))


_MULTIPLY = (_multiply_loop, _multiply_batched, _multiply_pallas)
_BOTH = (_both_loop, _both_batched, _both_pallas)
_INPUT = (_input_loop, _input_batched, _input_pallas)
_WEIGHT = (_weight_loop, _weight_batched, _weight_pallas)


def _add_all(axis, empty, parts, index):
  """Adds every part at its index: the transpose of taking it."""
  take_all = lambda x: jax.vmap(axis.take, (None, 0))(x, index)
  return jax.linear_transpose(take_all, empty)(parts)[0]


def _growth_scores(plan, x, packed, cotangent):
  """float32[grid]: each tile of the dense gradient, reduced to a number.

  The gradient is made and dropped a tile at a time.
  """
  rows, columns = packed.grid

  def tile_score(row, column):
    grad = _dot(plan.inputs.take(x.astype(cotangent.dtype), row),
                plan.outputs.take(cotangent, column), (0, 0))
    grad = grad.astype(packed.dtype)
    return packed_lib.tile_worth(grad, packed.reduce).astype(jnp.float32)

  row_scores = lambda row: lax.map(lambda column: tile_score(row, column),
                                   jnp.arange(columns))
  return lax.map(row_scores, jnp.arange(rows))


def _dot(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
  contract = ((axes[:1], axes[1:]), ((), ()))
  return lax.dot_general(a, b, contract, preferred_element_type=_wide(a))


def _wide(x: jax.Array):
  """The dtype in which products of x are summed."""
  return jnp.promote_types(x.dtype, jnp.float32)


def _per_axis(name: str, value, count: int) -> tuple[int, ...]:
  """An integer for each axis, of one for all or one each."""
  values = (value,) * count if isinstance(value, int) else tuple(value)
  if len(values) != count:
    raise ValueError(f'`{name}` (={value!r}) must be one number or {count}.')
  return tuple(base.check_count(name, size, least=1) for size in values)


def _check_product(x, packed, implementation):
  if len(packed.shape) != 2 or x.shape[-1:] != packed.shape[:1]:
    raise ValueError(f'`x` (of shape {x.shape}) must end in the rows of '
                     f'`packed`, a matrix (of shape {packed.shape}).')
  _check_common(packed, implementation, _IMPLEMENTATIONS)


def _check_common(packed, implementation, known):
  if implementation not in known:
    raise ValueError(f'`implementation` (={implementation!r}) must be one of '
                     f'{known}.')
  packed_lib.check_indices(packed)
