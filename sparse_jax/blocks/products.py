"""Products with packed weights: only kept blocks are touched, both ways."""

import functools

import jax
from jax import lax
import jax.numpy as jnp

from sparse_jax import checks
from sparse_jax.blocks import dispatch
from sparse_jax.blocks import packing
from sparse_jax.blocks import splitting
from sparse_jax.blocks.packing import PackedBlocks
from sparse_jax.blocks.tiles import Columns
from sparse_jax.blocks.tiles import Heads
from sparse_jax.blocks.tiles import Plan
from sparse_jax.blocks.tiles import Windows

_PLAIN = (None, 'loop', 'batched')
_LANES = 128  # Columns of a tile of a TPU's memory.


def matmul(x: jax.Array, packed: PackedBlocks, *,
           implementation: str | None = None,
           column_axes: tuple[str, ...] = (),
           heads: tuple[int | None, int | None] = (None, None),
           weights_first: bool = False) -> jax.Array:
  """x @ weight, where only the kept blocks of the weight exist.

  The forward pass and the gradient to `x` multiply by the blocks of A, the
  gradient to the weight is made for the blocks of B; nothing of the dense
  weight's size is read, written or allocated. Sums are kept in float32 where
  the operands are 16-bit.

  Laws: it is x @ unpack(packed), and so is its gradient to x; the gradient to
  `packed.blocks` is that of the dense weight, block by block, on B.

  On several devices each multiplies its rows of `x`, in a `jax.shard_map` that
  is made here: the mesh is that of the context or of the arrays. Blocks
  that are split (FSDP) are gathered; what is summed over devices is the
  gradient of the blocks alone, once. On automatic axes rows are split over all
  that divide them and are not `column_axes`, on explicit ones as their types
  say.

  Args:
    x: float[..., in].
    packed: PackedBlocks of a matrix [in, out]. If its leaf `growth` is there,
      the gradient of that leaf is the score of every block of the dense
      gradient, which is made and dropped in parts. A weight that is used
      several times gets the sum of the scores.
    implementation: 'loop' goes through the blocks, a few at a time, 'batched'
      multiplies all at once, which takes memory for the inputs of every
      block, 'tpu' and 'gpu' run kernels (interpreted on a CPU). None takes
      the loop on a CPU, as measured, the kernel of a TPU or an NVIDIA GPU for
      the blocks that it has (sides of 128 to 512, of 32 to 128), and
      'batched' elsewhere. 'hopper' runs kernels for H100 and its like (16-bit
      operands, sides of 64 and 128; a loop on a CPU), which are compiled and
      simulated, never run: nothing else chooses them. 'loop' and 'batched'
      leave it to XLA to split them over devices.
    column_axes: axes of an automatic mesh over which the columns of tiles are
      split, as the blocks are (tensor parallelism): those of `packed` must be
      `balanced`, else nothing is split so. On explicit axes the type of the
      blocks says it.
    heads: columns of a head of attention in `x` and in the output, where the
      code around splits them so (`jnp.reshape`). Kernels of TPUs read and write
      such an array head by head, as attention does, if a block holds whole
      heads of a multiple of 128; else it is copied. The output is the same.
    weights_first: whether the gradient to `x` waits for the blocks' gradient
      and the growth scores, if the output is wider than `x` and not in heads:
      its cotangent is free when the pass goes on. It takes less memory where
      that is what a step of an accelerator has most of (FSDP), and may take
      more time. The results are the same.

  Returns:
    float[..., out], of the operands' common dtype.

  Raises:
    ValueError: for shapes that do not fit, known indices out of range, an
      unknown `implementation`, or a `weights_first` that is no bool.

  Example:
    >>> packed = packing.pack(jnp.eye(4), block=(2, 2), sparsity=0.5)
    >>> matmul(jnp.arange(4.), packed)
    Array([0., 1., 2., 3.], dtype=float32)
  """
  _check_product(x, packed, implementation)
  checks.check_bool('weights_first', weights_first)
  (tall, wide), (rows, columns) = packed.block, packed.grid
  plan = Plan(Columns(tall), Columns(wide), columns * wide, implementation,
              columns=column_axes if packed.balanced else (),
              heads=_heads(x, packed.block, heads),
              weights_first=weights_first)

  def product(plan, x, packed):
    flat = x.reshape(-1, x.shape[-1])
    flat = jnp.pad(flat, ((0, 0), (0, rows * tall - flat.shape[1])))
    y = _product(plan, flat, packed)[:, :packed.shape[1]]
    return y.reshape(*x.shape[:-1], packed.shape[1])

  return splitting.in_types(product, plan, x, packed)


def conv(x: jax.Array, packed: PackedBlocks, *,
         strides: int | tuple[int, ...] = 1,
         padding: str | tuple[tuple[int, int], ...] = 'SAME',
         dilation: int | tuple[int, ...] = 1,
         implementation: str | None = None,
         column_axes: tuple[str, ...] = (),
         weights_first: bool = False) -> jax.Array:
  """The convolution by a packed kernel: only its kept blocks exist.

  A block is a tile of the input and output channels at one position of the
  kernel. Each is multiplied by the windows of `x` that it meets, so that the
  work and the memory are those of `matmul`; nothing is unfolded.

  Law: it is jax.lax.conv_general_dilated with unpack(packed), NHWC and HWIO,
  and so are its gradients, that of the kernel on B.

  Args:
    x: float[batch, spatial..., in].
    packed: PackedBlocks of a kernel [spatial..., in, out].
    strides, dilation: of the windows and of the kernel, one number or one
      for each spatial axis.
    padding: 'SAME', 'VALID' or (before, after) for each spatial axis.
    implementation: as in `matmul`, but None, 'loop' or 'batched'.
    column_axes: as in `matmul`.
    weights_first: as in `matmul`, if the kernel has one position.

  Returns:
    float[batch, spatial..., out].

  Raises:
    ValueError: for shapes or numbers that do not fit.

  Example:
    >>> kernel = jnp.ones((3, 3, 2, 2))
    >>> packed = packing.pack(kernel, block=(2, 2), sparsity=0.5)
    >>> conv(jnp.ones((1, 4, 4, 2)), packed).shape
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
    return matmul(_padded(x, _pads(x, (1,) * count, strides, padding)),
                  matrix, implementation=implementation,
                  column_axes=column_axes, weights_first=weights_first)
  reach = tuple((n - 1) * step + 1
                for n, step in zip(packed.shape, dilation))
  x = _padded(x, _pads(x, reach, strides, padding))
  outputs = tuple((n - far) // step + 1 for n, far, step in
                  zip(x.shape[1:-1], reach, strides))
  if min(outputs) < 1:
    raise ValueError(f'`x` (padded to {x.shape}) must not be smaller than the '
                     f'kernel\'s reach {reach}.')
  windows = Windows(
      packed.block[0], -(-packed.shape[-2] // packed.block[0]),
      packed.shape[:-2], strides, dilation, outputs)
  wide, columns = packed.block[1], packed.grid[1]
  plan = Plan(windows, Columns(wide), columns * wide, implementation,
              columns=column_axes if packed.balanced else ())
  return splitting.in_types(_convolve, plan, x, packed)


def transposed(packed: PackedBlocks) -> PackedBlocks:
  """The transpose of a packed matrix.

  Example:
    >>> packed = packing.pack(jnp.arange(4.).reshape(2, 2), block=(1, 1),
    ...                       sparsity=.75)
    >>> packing.unpack(transposed(packed))
    Array([[0., 0.],
           [0., 3.]], dtype=float32)
  """
  growth = None if packed.growth is None else packed.growth.swapaxes(-1, -2)
  return packed.replace(
      blocks=packed.blocks.swapaxes(-1, -2), rows=packed.columns,
      columns=packed.rows, growth=growth, shape=packed.shape[::-1],
      block=packed.block[::-1], balanced=False)


@jax.custom_vjp
def assemble(packed: PackedBlocks) -> jax.Array:
  """The dense weight of A, whose gradient reaches the blocks of B.

  For a use that is no product: the weight exists while it is used. Its
  gradient gives growth scores, too, where they are asked for.

  Args:
    packed: PackedBlocks with its places.

  Returns:
    The weight's own shape and dtype, 0 outside A.

  Example:
    >>> packed = packing.pack(jnp.eye(4), block=(2, 2), sparsity=0.5)
    >>> assemble(packed).sum()
    Array(4., dtype=float32)
  """
  return packing.unpack(packed)


def _assemble_forward(packed):
  return packing.unpack(packed), packed


def _assemble_backward(packed, cotangent):
  cut = packing.tile(cotangent, packed.block)
  growth = packed.growth
  if growth is not None:
    scores = packing.tile_scores(cut, packed.reduce).reshape(packed.grid)
    growth = scores.astype(jnp.float32)
  return (packed.replace(blocks=cut[packed.ids].astype(packed.dtype), rows=None,
                         columns=None, forward=None, growth=growth, due=None),)


assemble.defvjp(_assemble_forward, _assemble_backward)


def _convolve(plan, x, packed):
  windows = plan.inputs
  more = windows.tiles * windows.size - x.shape[-1]
  x = _padded(x, ((0, 0),) * (x.ndim - 2), more)
  y = _product(plan, x, packed)[:, :packed.shape[-1]]
  return y.reshape(x.shape[0], *windows.outputs, packed.shape[-1])


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


def _heads(x, block, sizes) -> Heads | None:
  """The heads that can lie apart in a TPU's memory, whole ones in a block."""
  sizes = [size if size and size % _LANES == side % size == 0 else None
           for size, side in zip(sizes, block)]
  return Heads(x.shape[-2], *sizes) if any(sizes) and x.ndim > 1 else None


def _padded(x, pads, channels: int = 0):
  return jnp.pad(x, ((0, 0), *(tuple(pair) for pair in pads), (0, channels)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(plan: Plan, x: jax.Array, packed: PackedBlocks) -> jax.Array:
  return _multiply(plan, x, packed)


def _product_forward(plan, x, packed):
  return _multiply(plan, x, packed), (x, packed)


def _product_backward(plan, saved, cotangent):
  x, packed = saved
  growth = None
  if packed.growth is not None:
    growth = _growth(plan, x, packed, cotangent)
    cotangent, growth = dispatch.after(plan, x, cotangent, growth)
  grad_x, grad_blocks = _gradients(plan, x, packed, cotangent)
  grad = packed.replace(blocks=grad_blocks, rows=None, columns=None,
                        forward=None, growth=growth, due=None)
  return grad_x, grad


def _growth(plan, x, packed, cotangent):
  """The growth scores where they are due, else zeros."""
  if packed.due is None:
    return dispatch.growth_scores(plan, x, packed, cotangent)

  # What enters a condition lies there. In heads it lies as attention has it;
  # flat it would be copied, refresh or not.
  def cut(matrix, size):
    return matrix if size is None else matrix.reshape(
        -1, heads.length, matrix.shape[1] // size, size)

  def scores(*cut):
    flat = (a.reshape(own.shape) for a, own in zip(cut, (x, cotangent)))
    return dispatch.growth_scores(plan, next(flat), packed, next(flat))

  heads = plan.heads or Heads(1, None, None)
  return lax.cond(packed.due, scores, lambda *_: jnp.zeros_like(packed.growth),
                  cut(x, heads.inputs), cut(cotangent, heads.outputs))


_product.defvjp(_product_forward, _product_backward)


def _multiply(plan, x, packed):
  kept = packed.read()
  dtype = jnp.result_type(x, kept.blocks)
  y = dispatch.multiply(
      plan, x.astype(dtype), kept.blocks.astype(dtype), kept.rows, kept.columns)
  return y.astype(dtype)


def _gradients(plan, x, packed, cotangent):
  """The gradients to x, by the tiles of A, and to the tiles of B."""
  dtype = cotangent.dtype
  if packed.forward is None:
    blocks = packed.blocks.astype(dtype)
    grad_x, grad = dispatch.both_gradients(
        plan, x.astype(dtype), cotangent, blocks, packed.rows, packed.columns)
  else:
    kept = packed.read()
    grad = dispatch.weight_gradient(
        plan, x.astype(dtype), cotangent, packed.rows, packed.columns)
    cotangent, grad = dispatch.after(plan, x, cotangent, grad)
    grad_x = dispatch.input_gradient(
        plan, x, cotangent, kept.blocks.astype(dtype), kept.rows, kept.columns)
  return grad_x.astype(x.dtype), grad.astype(packed.dtype)


def _per_axis(name: str, value, count: int) -> tuple[int, ...]:
  """An integer for each axis, of one for all or one each."""
  values = (value,) * count if isinstance(value, int) else tuple(value)
  if len(values) != count:
    raise ValueError(f'`{name}` (={value!r}) must be one number or {count}.')
  return tuple(checks.check_count(name, size, least=1) for size in values)


def _check_product(x, packed, implementation):
  if len(packed.shape) != 2 or x.shape[-1:] != packed.shape[:1]:
    raise ValueError(f'`x` (of shape {x.shape}) must end in the rows of '
                     f'`packed`, a matrix (of shape {packed.shape}).')
  _check_common(packed, implementation, dispatch.IMPLEMENTATIONS)


def _check_common(packed, implementation, known):
  if implementation not in known:
    raise ValueError(f'`implementation` (={implementation!r}) must be one of '
                     f'{known}.')
  packing.check_indices(packed)
