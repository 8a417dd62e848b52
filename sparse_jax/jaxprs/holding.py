"""Packed weights in a function that nobody edited: views that hold blocks.

Where the function has a dense weight, the interpreter carries the blocks and
how their axes were moved; a product multiplies by the blocks, any other use
is given the assembled weight.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import jax

from sparse_jax.blocks import packing
from sparse_jax.blocks import products as block_products
from sparse_jax.jaxprs import products
from sparse_jax.jaxprs import views
from sparse_jax.masks import layouts


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=['packed'],
    meta_fields=['path', 'layout', 'stacked', 'axes', 'dtype', 'options'])
@dataclasses.dataclass(frozen=True)
class Held:
  """A packed weight as the function sees it at one point."""

  packed: packing.PackedBlocks
  path: str
  layout: layouts.Layout  # Of the whole leaf.
  stacked: tuple[int, ...]  # Its stacked axes that are still there.
  axes: views.Axes
  dtype: Any
  options: tuple[tuple[str, Any], ...] = ()  # Keywords of the products.

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(math.prod(self.layout.shape[i] for i in group)
                 for group in self.axes)

  def replace(self, **changes) -> 'Held':
    return dataclasses.replace(self, **changes)


def hold(path: str, packed: packing.PackedBlocks, layout: layouts.Layout,
         **options: Any) -> Held:
  """A packed leaf before anything has happened to it."""
  axes = tuple((i,) for i in range(len(layout.shape)))
  return Held(packed, path, layout, layout.stacked, axes, packed.dtype,
              tuple(options.items()))


def is_held(value: Any) -> bool:
  """Whether this is a Held; for `is_leaf=` of the tree functions."""
  return isinstance(value, Held)


def assembled(value: Any) -> Any:
  """The dense array of a Held; anything else as it is."""
  if not is_held(value):
    return value
  layout = value.layout
  order = [i for i in layout.order
           if i not in layout.stacked or i in value.stacked]
  dense = _mapped(block_products.assemble, value)(value.packed)
  dense = dense.reshape([layout.shape[i] for i in order])
  wanted = [axis for group in value.axes for axis in group]
  dense = dense.transpose([order.index(axis) for axis in wanted])
  return dense.reshape(value.shape).astype(value.dtype)


def moved(eqn: Any, value: Held) -> Held | None:
  """The Held after an equation that only moves or casts entries, or None."""
  axes = views.moved(eqn, value.axes, value.layout.shape)
  return None if axes is None else value.replace(
      axes=axes, dtype=eqn.outvars[0].aval.dtype)


def sliced(value: Held) -> Held | None:
  """The Held in the body of a scan over its first axis, its arrays not yet.

  None if that axis is not the first stacked one.
  """
  if not value.stacked or value.axes[0] != value.stacked[:1]:
    return None
  return value.replace(axes=value.axes[1:], stacked=value.stacked[1:])


def multiply(eqn: Any, operands: list[Any]) -> jax.Array | None:
  """The product of an equation by blocks; None if they do not fit it."""
  sides = [i for i, operand in enumerate(operands) if is_held(operand)]
  if len(sides) != 1:
    return None
  side, = sides
  if eqn.primitive.name == products.CONV:
    return _conv(eqn, *operands) if side == 1 else None
  return _dot(eqn, side, operands[side], operands[1 - side])


def _cast(value: Held) -> packing.PackedBlocks:
  packed = value.packed
  return packed.replace(blocks=packed.blocks.astype(value.dtype))


def _mapped(fn: Callable[..., Any], value: Held):
  for _ in value.stacked:
    fn = jax.vmap(fn)
  return fn


def _dot(eqn, side, value, other):
  contracted, batched = eqn.params['dimension_numbers']
  layout = value.layout
  batch = [value.axes[i] for i in batched[side]]
  if batch != [(axis,) for axis in value.stacked] or len(
      value.packed.shape) != 2:
    return None
  free = [i for i in range(len(value.axes))
          if i not in (*contracted[side], *batched[side])]
  pairs = sorted(zip([value.axes[i] for i in contracted[side]],
                     contracted[1 - side]))
  summed = _joined(axes for axes, _ in pairs)
  outer = _joined(value.axes[i] for i in free)
  if summed == layout.rows and sorted(outer) == sorted(layout.columns):
    forward, outputs = True, layout.columns
  elif summed == layout.columns and sorted(outer) == sorted(layout.rows):
    forward, outputs = False, layout.rows
  else:
    return None
  others = [i for i in range(other.ndim)
            if i not in (*contracted[1 - side], *batched[1 - side])]
  x = other.transpose(*batched[1 - side], *others, *(i for _, i in pairs))
  stack = x.shape[:len(batch)]
  kept = [other.shape[i] for i in others]
  x = x.reshape(*stack, *kept, -1)
  out = eqn.outvars[0].aval
  heads = (_head([other.shape[i] for _, i in pairs]),
           _head([value.shape[i] for i in free]))

  def product(x, packed):
    packed = packed if forward else block_products.transposed(packed)
    return block_products.matmul(x, packed, heads=heads, **dict(value.options))

  y = _mapped(product, value)(x, _cast(value)).astype(out.dtype)
  # From the outputs in the layout's order to those of the value's axes.
  y = y.reshape(*stack, *kept, *(layout.shape[i] for i in outputs))
  before = len(stack) + len(kept)
  places = [before + outputs.index(axis) for axis in outer]
  y = y.transpose(*range(before), *places)
  y = y.reshape(*stack, *kept, *(value.shape[i] for i in free))
  if side == 0:  # The outputs of the left operand come first.
    rest = range(before, y.ndim)
    y = y.transpose(*range(len(stack)), *rest, *range(len(stack), before))
  return y.reshape(out.shape)


def _head(sizes: list[int]) -> int | None:
  """The last of several axes that are one in a matrix."""
  return sizes[-1] if len(sizes) > 1 else None


def _joined(groups) -> tuple[int, ...]:
  return tuple(axis for group in groups for axis in group)


def _conv(eqn, x, value):
  params, layout = eqn.params, value.layout
  numbers = params['dimension_numbers']
  leading = tuple(i for i in layout.order if i not in (
      *layout.stacked, *layout.rows, *layout.columns))
  wanted = (layout.columns, layout.rows, *((axis,) for axis in leading))
  plain = (params['feature_group_count'] == params['batch_group_count'] == 1
           and set(params['lhs_dilation']) <= {1} and not value.stacked)
  if not plain or tuple(value.axes[i] for i in numbers.rhs_spec) != wanted:
    return None
  batch, feature, *spatial = numbers.lhs_spec
  y = block_products.conv(
      x.transpose(batch, *spatial, feature), _cast(value),
      strides=tuple(params['window_strides']),
      padding=tuple(params['padding']), dilation=tuple(params['rhs_dilation']),
      **dict(value.options))
  batch, feature, *spatial = numbers.out_spec
  order = (batch, *spatial, feature)
  out = eqn.outvars[0].aval
  return y.transpose([order.index(i) for i in range(y.ndim)]).astype(out.dtype)
