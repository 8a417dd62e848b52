"""Flax layers whose kernels are packed blocks, in linen and NNX.

A kernel is dense until it is packed: `init` makes what the dense layer makes,
a packed method (or `pack`) cuts it, and the same layer then multiplies by the
blocks. Blocks are parameters, indices lie beside them in a collection, or a
Variable, of their own, so that a refresh changes no shape and no type.
"""

from collections.abc import Callable
import math
from typing import Any

from flax import linen as nn
from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp

from sparse_jax import trees
from sparse_jax.blocks import packing as packed_lib
from sparse_jax.blocks import products as packed_products
from sparse_jax.masks import topk
from sparse_jax.blocks.packing import PackedBlocks

Size = int | tuple[int, ...]
_KERNEL_INIT = jax.nn.initializers.lecun_normal()
_BIAS_INIT = jax.nn.initializers.zeros


class PackedDense(nn.Module):
  """A linen layer x @ kernel + bias with a kernel that may be packed.

  With `block` and `sparsity` it is packed from the start, by blocks drawn at
  random; without, it is dense until its parameters are. Blocks are in the
  collection 'params', indices in 'packed'; a PackedBlocks with its indices in
  'params' serves too.

  Law: it is nn.DenseGeneral with the unpacked kernel.

  Attributes:
    features: int or tuple, the output axes, such as (heads, head_dim).
    axis: int or tuple, the last axes of the input, which are summed over.
    block: (rows, columns) of a block; of the kernel as a matrix.
    sparsity: fraction of blocks that do not exist; None starts dense.
    pad: whether blocks may hang over the kernel's edges.
    use_bias: whether a bias is added.
    dtype: of the computation; None promotes.
    param_dtype, kernel_init, bias_init: of the parameters.

  Example:
    >>> layer = PackedDense(8, block=(2, 4), sparsity=0.75)
    >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 4)))
    >>> variables['params']['kernel'].blocks.shape
    (1, 2, 4)
    >>> layer.apply(variables, jnp.ones((3, 4))).shape
    (3, 8)
  """

  features: Size
  axis: Size = -1
  block: tuple[int, int] | None = None
  sparsity: float | None = None
  pad: bool = False
  use_bias: bool = True
  dtype: Any = None
  param_dtype: Any = jnp.float32
  kernel_init: Callable[..., jax.Array] = _KERNEL_INIT
  bias_init: Callable[..., jax.Array] = _BIAS_INIT

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    features, count = _tuple(self.features), _last_axes(self.axis, x.ndim)
    inputs = x.shape[x.ndim - count:]
    kernel = _linen_kernel(self, inputs + features, count)
    bias = None
    if self.use_bias:
      bias = self.param('bias', self.bias_init, features, self.param_dtype)
    return _dense(x, kernel, bias, features, count, self.dtype)


class PackedConv(nn.Module):
  """A linen convolution with a kernel that may be packed.

  Law: it is nn.Conv with the unpacked kernel.

  Attributes:
    features: int, the output channels.
    kernel_size: int or tuple, the spatial shape of the kernel; an int is one
      axis.
    strides, kernel_dilation, padding: as in `packed_conv`.
    block, sparsity, pad, use_bias, dtype, param_dtype, kernel_init,
      bias_init: as in `PackedDense`; a block is over channels.

  Example:
    >>> layer = PackedConv(4, (3, 3), block=(2, 2), sparsity=0.5)
    >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 5, 5, 2)))
    >>> variables['params']['kernel'].blocks.shape
    (9, 2, 2)
  """

  features: int
  kernel_size: Size
  strides: Size = 1
  padding: Any = 'SAME'
  kernel_dilation: Size = 1
  block: tuple[int, int] | None = None
  sparsity: float | None = None
  pad: bool = False
  use_bias: bool = True
  dtype: Any = None
  param_dtype: Any = jnp.float32
  kernel_init: Callable[..., jax.Array] = _KERNEL_INIT
  bias_init: Callable[..., jax.Array] = _BIAS_INIT

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (*_tuple(self.kernel_size), x.shape[-1], self.features)
    kernel, bias = _linen_kernel(self, shape, None), None
    if self.use_bias:
      bias = self.param('bias', self.bias_init, (self.features,),
                        self.param_dtype)
    return _conv(x, kernel, bias, self.strides, self.padding,
                 self.kernel_dilation, self.dtype)


class PackedIndices(nnx.Variable):
  """Where the blocks of an NNX layer's kernel belong; no parameter."""


class NnxPackedDense(nnx.Module):
  """`PackedDense` as an NNX module.

  Args:
    in_features, out_features: int or tuple, the axes of the input that are
      summed over, its last, and those of the output.
    block, sparsity, pad, use_bias, dtype, param_dtype, kernel_init, bias_init:
      as in `PackedDense`.
    rngs: flax.nnx.Rngs.

  Example:
    >>> layer = NnxPackedDense(4, 8, block=(2, 4), sparsity=0.75,
    ...                        rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((3, 4))).shape
    (3, 8)
  """

  def __init__(self, in_features: Size, out_features: Size, *,
               block: tuple[int, int] | None = None,
               sparsity: float | None = None, pad: bool = False,
               use_bias: bool = True, dtype: Any = None,
               param_dtype: Any = jnp.float32, kernel_init=_KERNEL_INIT,
               bias_init=_BIAS_INIT, rngs: nnx.Rngs):
    self.count = len(_tuple(in_features))
    self.features, self.dtype = _tuple(out_features), dtype
    kernel = _new_kernel(rngs.params(), kernel_init,
                         _tuple(in_features) + self.features, self.count,
                         param_dtype, block, sparsity, pad)
    _hold(self, kernel)
    self.bias = nnx.data(nnx.Param(bias_init(
        rngs.params(), self.features, param_dtype)) if use_bias else None)

  def __call__(self, x: jax.Array) -> jax.Array:
    return _dense(x, _held(self), _value(self.bias), self.features, self.count,
                  self.dtype)


class NnxPackedConv(nnx.Module):
  """`PackedConv` as an NNX module.

  Args:
    in_features, out_features: int, the channels.
    kernel_size, strides, padding, kernel_dilation: as in `PackedConv`.
    block, sparsity, pad, use_bias, dtype, param_dtype, kernel_init, bias_init:
      as in `PackedDense`.
    rngs: flax.nnx.Rngs.

  Example:
    >>> layer = NnxPackedConv(2, 4, (3, 3), block=(2, 2), sparsity=0.5,
    ...                       rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 5, 5, 2))).shape
    (1, 5, 5, 4)
  """

  def __init__(self, in_features: int, out_features: int, kernel_size: Size, *,
               strides: Size = 1, padding: Any = 'SAME',
               kernel_dilation: Size = 1,
               block: tuple[int, int] | None = None,
               sparsity: float | None = None, pad: bool = False,
               use_bias: bool = True, dtype: Any = None,
               param_dtype: Any = jnp.float32, kernel_init=_KERNEL_INIT,
               bias_init=_BIAS_INIT, rngs: nnx.Rngs):
    self.strides, self.padding = strides, padding
    self.kernel_dilation, self.dtype = kernel_dilation, dtype
    shape = (*_tuple(kernel_size), in_features, out_features)
    _hold(self, _new_kernel(rngs.params(), kernel_init, shape, None,
                            param_dtype, block, sparsity, pad))
    self.bias = nnx.data(nnx.Param(bias_init(
        rngs.params(), (out_features,), param_dtype)) if use_bias else None)

  def __call__(self, x: jax.Array) -> jax.Array:
    return _conv(x, _held(self), _value(self.bias), self.strides, self.padding,
                 self.kernel_dilation, self.dtype)


def nnx_packed(model: nnx.Module, params: trees.PyTree) -> nnx.Module:
  """A copy of an NNX model that computes with other parameters, packed ones.

  Args:
    model: made of `NnxPackedDense`, `NnxPackedConv` and anything else.
    params: tree like nnx.to_pure_dict(nnx.state(model, nnx.Param)), in which
      the kernels of packed layers may be PackedBlocks.

  Returns:
    The copy; the caller's model is untouched.

  Raises:
    ValueError: for a packed leaf that is no kernel of a packed layer.

  Example:
    >>> layer = NnxPackedDense(4, 8, rngs=nnx.Rngs(0))
    >>> params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    >>> kernel = packed_lib.pack(params['kernel'], block=(2, 4), sparsity=0.5)
    >>> nnx_packed(layer, {**params, 'kernel': kernel})(jnp.ones((1, 4))).shape
    (1, 8)
  """
  copy = nnx.clone(model)
  for path, leaf in jax.tree.leaves_with_path(
      params, is_leaf=packed_lib.is_packed):
    owner = copy
    for key in path[:-1]:
      owner = _child(owner, key.key)
    name = path[-1].key
    if packed_lib.is_packed(leaf):
      if not isinstance(owner, (NnxPackedDense, NnxPackedConv)):
        raise ValueError(f'`params` has a packed leaf '
                         f'{trees.path_name(path)!r}, which is no kernel of a '
                         'packed layer.')
      _hold(owner, leaf)
    else:
      getattr(owner, name).set_value(leaf)
  return copy


def packed_interceptor(next_fn, args, kwargs, context):
  """Lets linen models that nobody edited compute with packed kernels.

  For flax.linen.intercept_methods: the calls of Dense, DenseGeneral, Conv and
  of the attention made of them multiply by blocks where the parameter
  'kernel' is a PackedBlocks, its indices included.

  Raises:
    ValueError: for an option that packed kernels do not have, such as groups.

  Example:
    >>> model = nn.Dense(8)
    >>> params = model.init(jax.random.key(0), jnp.ones((1, 4)))['params']
    >>> kernel = packed_lib.pack(params['kernel'], block=(2, 4), sparsity=0.5)
    >>> with nn.intercept_methods(packed_interceptor):
    ...   y = model.apply({'params': {**params, 'kernel': kernel}},
    ...                   jnp.ones((3, 4)))
    >>> y.shape
    (3, 8)
  """
  module = context.module
  known = isinstance(module, (nn.Dense, nn.DenseGeneral, nn.Conv))
  if not known or context.method_name != '__call__' or module.is_initializing(
      ) or not packed_lib.is_packed(module.get_variable('params', 'kernel')):
    return next_fn(*args, **kwargs)
  kernel, (x, *_) = module.get_variable('params', 'kernel'), args
  bias = module.get_variable('params', 'bias') if module.use_bias else None
  if isinstance(module, nn.Conv):
    _check_conv(module)
    return _conv(x, kernel, bias, module.strides or 1, module.padding,
                 module.kernel_dilation or 1, module.dtype)
  if getattr(module, 'batch_dims', ()):
    raise ValueError(f'`batch_dims` (={module.batch_dims}) must be empty with '
                     'a packed kernel.')
  count = _last_axes(getattr(module, 'axis', -1), x.ndim)
  return _dense(x, kernel, bias, _tuple(module.features), count, module.dtype)


def _check_conv(module):
  for name in ('input_dilation', 'feature_group_count'):
    value = getattr(module, name)
    if value is not None and set(_tuple(value)) != {1}:
      raise ValueError(f'`{name}` (={value}) must be 1 with a packed kernel.')


def _dense(x, kernel, bias, features, count, dtype):
  """The product over the last `count` axes of x."""
  x, kernel, bias = _promoted(x, kernel, bias, dtype)
  lead = x.shape[:x.ndim - count]
  if packed_lib.is_packed(kernel):
    flat = x.reshape(*lead, -1)
    y = packed_products.packed_matmul(flat, kernel).reshape(*lead, *features)
  else:
    over = tuple(range(x.ndim - count, x.ndim))
    y = lax.dot_general(x, kernel, ((over, tuple(range(count))), ((), ())))
  return _biased(y, bias)


def _conv(x, kernel, bias, strides, padding, dilation, dtype):
  x, kernel, bias = _promoted(x, kernel, bias, dtype)
  count = len(kernel.shape) - 2
  lead = x.shape[:-count - 1]
  x = x.reshape(-1, *x.shape[-count - 1:])
  strides, dilation = (
      (value,) * count if isinstance(value, int) else tuple(value)
      for value in (strides, dilation))
  padding = _padding(padding, count)
  if packed_lib.is_packed(kernel):
    y = packed_products.packed_conv(x, kernel, strides=strides,
                                    padding=padding, dilation=dilation)
  else:
    letters = 'DHW'[3 - count:]
    y = lax.conv_general_dilated(
        x, kernel, strides, padding, rhs_dilation=dilation,
        dimension_numbers=(f'N{letters}C', f'{letters}IO', f'N{letters}C'))
  return _biased(y.reshape(*lead, *y.shape[1:]), bias)


def _padding(padding, count):
  """As a string, or a pair for each axis."""
  if isinstance(padding, str):
    return padding
  if isinstance(padding, int):
    return ((padding, padding),) * count
  return tuple((side, side) if isinstance(side, int) else tuple(side)
               for side in padding)


def _biased(y, bias):
  if bias is None:
    return y
  return y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)


def _promoted(x, kernel, bias, dtype):
  """All in one dtype: the one given, or that which holds them all."""
  if dtype is None:
    dtype = jnp.result_type(*(leaf.dtype for leaf in (x, kernel, bias)
                              if leaf is not None))
  if packed_lib.is_packed(kernel):
    kernel = kernel.replace(blocks=kernel.blocks.astype(dtype))
  else:
    kernel = kernel.astype(dtype)
  return x.astype(dtype), kernel, None if bias is None else bias.astype(dtype)


def _linen_kernel(module, shape, count):
  """The dense or packed kernel of a linen layer, made if it is not there."""
  if not module.has_variable('params', 'kernel'):
    kernel = _new_kernel(module.make_rng('params'), module.kernel_init, shape,
                         count, module.param_dtype, module.block,
                         module.sparsity, module.pad)
    weights, indices = packed_lib.partition_packed(kernel)
    module.param('kernel', lambda _: weights)
    if indices is not None:
      module.variable('packed', 'kernel', lambda: indices)
    return kernel
  kernel = module.get_variable('params', 'kernel')
  if packed_lib.is_packed(kernel) and kernel.rows is None:
    indices = module.get_variable('packed', 'kernel')
    kernel = packed_lib.combine_packed(kernel, indices)
  return kernel


def _new_kernel(key, init, shape, count, dtype, block, sparsity, pad):
  """A dense kernel, or random blocks of it.

  `count` axes of a dense layer's kernel are summed over; None for a
  convolution.
  """
  if (block is None) != (sparsity is None):
    raise ValueError(f'`block` (={block!r}) and `sparsity` (={sparsity!r}) '
                     'must be given together, or neither.')
  if count is None:
    kernel = view = init(key, shape, dtype)
  else:  # Fans are those of the matrix.
    matrix = (math.prod(shape[:count]), math.prod(shape[count:]))
    view = init(key, matrix, dtype)
    kernel = view.reshape(shape)
  if block is None:
    return kernel
  packed_lib.check_block(block, view.shape, pad)
  tiles = packed_lib.tile(view, block)
  size, draws = tiles.shape[0], jax.random.fold_in(key, 1)
  kept = topk.keep_count(size, sparsity)
  chosen = packed_lib.best(jax.random.uniform(draws, (size,)), kept)
  return packed_lib.of_tiles(tiles, chosen, chosen, kept, kept,
                             shape=view.shape, block=block)


def _hold(layer, kernel) -> None:
  """Keeps blocks and indices of a kernel in Variables of their own."""
  indices = None
  if packed_lib.is_packed(kernel):  # Optimizers of NNX want arrays as Params.
    kernel, indices = kernel.blocks, kernel.replace(blocks=None)
  layer.kernel, layer.indices = nnx.Param(kernel), PackedIndices(indices)


def _held(layer) -> jax.Array | PackedBlocks:
  kernel, indices = layer.kernel.get_value(), layer.indices.get_value()
  return kernel if indices is None else indices.replace(blocks=kernel)


def _value(variable):
  return None if variable is None else variable.get_value()


def _child(owner, key):
  return owner[key] if isinstance(key, int) else getattr(owner, key)


def _tuple(size: Size) -> tuple[int, ...]:
  return (size,) if isinstance(size, int) else tuple(size)


def _last_axes(axis: Size, ndim: int) -> int:
  """How many axes are summed over, which must be the last ones in order."""
  axes = tuple(a % ndim for a in _tuple(axis))
  if axes != tuple(range(ndim - len(axes), ndim)):
    raise ValueError(f'`axis` (={axis!r}) must be the last axes of the input, '
                     'in order.')
  return len(axes)
