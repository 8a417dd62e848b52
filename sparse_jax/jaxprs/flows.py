"""Where a signal can be, and where it can come from, primitive by primitive.

The values of a function are replaced by two arrays of zeros and ones: which
entries can be other than 0, and to which entries a path leads from an input.
Both are built of sums and products of what is not negative, so that their
gradient says which entries lie on a path to an output.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp


class Flow(NamedTuple):
  """What stands in the place of one value; arrays have its shape."""

  nonzero: jax.Array  # float32: 1 where the value can be other than 0.
  reach: jax.Array | None = None  # float32: 1 where an input is heard.
  known: Any = None  # The value itself, if the program alone decides it.
  # What it was computed from entry by entry; None for a constant.
  root: Any = None
  statistic: bool = False  # Whether it is a sum over entries of its root.


@jax.custom_vjp
def meet(amount: jax.Array) -> jax.Array:
  """1 where an amount is positive, and the same for its gradient."""
  return (amount > 0).astype(jnp.float32)


meet.defvjp(lambda amount: (meet(amount), None),
            lambda _, g: ((g > 0).astype(jnp.float32),))


@jax.custom_vjp
def source(nonzero: jax.Array) -> jax.Array:
  """0: no input is heard in a parameter; but its gradient is passed on."""
  return jnp.zeros_like(nonzero)


source.defvjp(lambda nonzero: (source(nonzero), None), lambda _, g: (g,))


def of_input(aval: Any) -> Flow:
  """An argument of the function; a random key is no input."""
  ones = jnp.ones(aval.shape, jnp.float32)
  if jnp.issubdtype(aval.dtype, jax.dtypes.extended):
    return Flow(ones)
  return Flow(ones, ones, root=object())


def of_parameter(nonzero: jax.Array) -> Flow:
  """A leaf of the parameters, float32: 0 where it is dropped."""
  return Flow(nonzero, root=object())


def of_constant(value: Any) -> Flow:
  """A value that is written in the program, or follows from such values."""
  if jnp.issubdtype(value.dtype, jax.dtypes.extended):
    return Flow(jnp.ones(value.shape, jnp.float32), known=value)
  return Flow((jnp.asarray(value) != 0).astype(jnp.float32), known=value)


def of_outputs(eqn: Any, flows: Sequence[Flow]) -> list[Flow]:
  """The outputs of an equation that holds no other program."""
  rule = _RULES.get(eqn.primitive.name, _anywhere)
  outs = rule(eqn, flows)
  return [_fit(flow, var.aval.shape) for flow, var in zip(
      outs if isinstance(outs, list) else [outs] * len(eqn.outvars),
      eqn.outvars, strict=True)]


def either(flows: Sequence[Flow]) -> Flow:
  """What is one of several values, or a sum of them."""
  kept, root, statistic = _heard(flows)
  return Flow(meet(_sum(f.nonzero for f in kept)), _reach(kept), root=root,
              statistic=statistic)


def _fit(flow: Flow, shape) -> Flow:
  return flow._replace(
      nonzero=jnp.broadcast_to(flow.nonzero, shape), known=None,
      reach=(None if flow.reach is None
             else jnp.broadcast_to(flow.reach, shape)))


def _heard(flows):
  """(operands that carry a signal, their root, whether it is a statistic).

  A mean or norm that meets the values it is made of, as in a normalisation or
  a softmax, scales or shifts them and leads no path from one to another.
  """
  deciding = ([f for f in flows if f.reach is not None]
              or [f for f in flows if f.root is not None])
  whole = {f.root for f in deciding if not f.statistic}
  roots = whole or {f.root for f in deciding}
  root = roots.pop() if len(roots) == 1 else object() if roots else None
  if root is not None:
    whole.add(root)
  statistic = bool(deciding) and all(f.statistic for f in deciding)
  kept = [f for f in flows
          if statistic or not (f.statistic and f.root in whole)]
  return kept, root, statistic


def _reach(flows):
  """Where an input is heard in a sum; None if in no operand."""
  if all(f.reach is None for f in flows):
    return None
  return meet(_sum(_heard_in(f) for f in flows))


def _heard_in(flow):
  return source(flow.nonzero) if flow.reach is None else flow.reach


def _sum(values):
  first, *others = values
  return sum(others, first)


def _fixed(flow):
  """Its nonzeros, as a factor of what is heard in another operand.

  A path leads through one factor of a product. Only a parameter is on it by
  being a factor.
  """
  return (flow.nonzero if flow.reach is None
          else lax.stop_gradient(flow.nonzero))


def _always(flow):
  """Nonzero wherever it is, and of a parameter with a gradient."""
  ones = jnp.ones_like(flow.nonzero)
  fixed = flow.root is None or flow.reach is not None
  return flow._replace(nonzero=ones if fixed else ones + source(flow.nonzero))


def _entrywise(eqn, flows):
  """Sums, maxima and functions that map 0 to 0."""
  del eqn
  return either(flows)


def _entrywise_anything(eqn, flows):
  """Functions that may map 0 to something else."""
  del eqn
  return _always(either(flows))


def _power(eqn, flows):
  out = either(flows)
  return out if eqn.params['y'] > 0 else _always(out)


def _product(product: Callable[..., jax.Array], lhs: Flow, rhs: Flow, kept):
  """What a bilinear function makes of two operands."""
  reach = [None if f.reach is None or not any(f is k for k in kept)
           else f.reach for f in (lhs, rhs)]
  left, right = (_fixed(f._replace(reach=r)) for f, r in zip((lhs, rhs), reach))
  nonzero = meet(product(*(
      _fixed(f) if any(f is k for k in kept) else lax.stop_gradient(f.nonzero)
      for f in (lhs, rhs))))
  if reach == [None, None]:
    return nonzero, None
  terms = [product(reach[0], right)] if reach[0] is not None else []
  terms += [product(left, reach[1])] if reach[1] is not None else []
  return nonzero, meet(_sum(terms))


def _multiply(eqn, flows):
  del eqn
  kept, root, statistic = _heard(flows)
  return Flow(*_product(jnp.multiply, *flows, kept), root=root,
              statistic=statistic)


def _divide(eqn, flows):
  return _multiply(eqn, [flows[0], _always(flows[1])])


def _matrix_product(eqn, flows):
  params = eqn.params | {'preferred_element_type': None, 'precision': None}
  return Flow(*_product(lambda *pair: _bind(eqn, pair, params), *flows, flows),
              root=object())


def _select(eqn, flows):
  which, *cases = flows
  if which.known is not None:
    _, root, statistic = _heard(cases)
    pick = lambda values: lax.select_n(which.known, *values)
    return _each(pick, cases, root, statistic)
  if which.reach is None or any(f.reach is not None for f in cases):
    return either(cases)
  picked = meet(_sum(f.nonzero for f in cases))  # By an input, of constants.
  return Flow(picked, picked * which.reach, root=object())


def _each(move, flows, root, statistic, touch=lambda amount: amount):
  """A linear function of the operands' arrays, side by side."""
  heard = any(f.reach is not None for f in flows)
  return Flow(touch(move([f.nonzero for f in flows])),
              touch(move([_heard_in(f) for f in flows])) if heard else None,
              root=root, statistic=statistic)


def _move(eqn, flows):
  """Entries put elsewhere, or repeated."""
  _, root, statistic = _heard(flows)
  if not eqn.primitive.multiple_results:
    return _each(lambda arrays: _bind(eqn, arrays), flows, root, statistic)
  return [_each(lambda arrays: _bind(eqn, arrays)[i], flows, root, statistic)
          for i in range(len(eqn.outvars))]


def _reduce(eqn, flows):
  axes = eqn.params['axes']
  flow, = flows
  out = _each(lambda arrays: jnp.sum(arrays[0], axes), flows, flow.root,
              flow.root is not None, meet)
  return out._replace(nonzero=_fixed(out))


def _window(eqn, flows):
  """Pooling: the sum, the largest or the smallest entry of a window."""
  given = eqn.params
  move = lambda arrays: lax.reduce_window(
      arrays[0], 0., lax.add, given['window_dimensions'],
      given['window_strides'], given['padding'], given['base_dilation'],
      given['window_dilation'])
  return _each(move, flows, object(), False, meet)


def _along(eqn, flows):
  """Sorting, cumulative sums: anywhere along one axis."""
  axis = eqn.params.get('axis', eqn.params.get('dimension', -1))
  move = lambda arrays: _sum(jnp.sum(a, axis, keepdims=True) for a in arrays)
  return _each(move, flows, object(), False, meet)


def _anywhere(eqn, flows):
  """A primitive that is not known: each entry is heard in each."""
  del eqn
  if all(f.root is None for f in flows):
    return Flow(jnp.ones(()))
  return _always(_each(lambda arrays: _sum(jnp.sum(a) for a in arrays), flows,
                       object(), False, meet))


def _gather(eqn, flows):
  """Entries picked by an index: if that is not known, by any."""
  table, index = flows
  axes = eqn.params['dimension_numbers'].start_index_map
  return _picked(eqn, table, [index], axes)


def _dynamic_slice(eqn, flows):
  table, *starts = flows
  sizes = eqn.params['slice_sizes']
  axes = [i for i, size in enumerate(table.nonzero.shape) if size != sizes[i]]
  return _picked(eqn, table, starts, axes)


def _picked(eqn, table, index, axes):
  if all(f.known is not None for f in index):
    where, touch = [f.known for f in index], lambda array: array
  else:
    where = [jnp.zeros(var.aval.shape, var.aval.dtype)
             for var in eqn.invars[1:]]
    touch = lambda array: jnp.broadcast_to(
        meet(jnp.sum(array, axes, keepdims=True)), array.shape)
  out = _each(lambda arrays: _bind(eqn, [touch(arrays[0]), *where]), [table],
              table.root, table.statistic)
  heard = [f.reach for f in index if f.reach is not None]
  if table.reach is not None or not heard:
    return out
  looked_up = meet(_sum(jnp.sum(reach) for reach in heard))
  return out._replace(reach=out.nonzero * looked_up, root=object(),
                      statistic=False)


def _put(eqn, flows):
  """Entries written at an index: if that is not known, anywhere."""
  if eqn.primitive.name == 'dynamic_update_slice':
    table, update, *index = flows
    arguments = lambda arrays: [*arrays, *known]
    axes = [i for i, size in enumerate(update.nonzero.shape)
            if size != table.nonzero.shape[i]]
  else:
    table, *index, update = flows
    arguments = lambda arrays: [arrays[0], *known, arrays[1]]
    axes = None
  known = [f.known for f in index]
  _, root, _ = _heard([table, update])
  if all(value is not None for value in known):
    move = lambda arrays: _bind(eqn, arguments(arrays))
  else:
    move = lambda arrays: arrays[0] + (
        jnp.sum(arrays[1], axes, keepdims=True) if axes is not None
        else jnp.sum(arrays[1]))
  return _each(move, [table, update], root, False, meet)


def _bind(eqn, operands, params=None):
  return eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(
      eqn.params if params is None else params))


def _first(eqn, flows):
  del eqn
  return flows[0]


def _clamp(eqn, flows):
  del eqn
  return flows[1]


def _barrier(eqn, flows):
  del eqn
  return list(flows)


def _table(rule, names: str):
  return dict.fromkeys(names.split(), rule)


_RULES = {
    **_table(_first, 'convert_element_type copy copy_p stop_gradient '
             'reduce_precision real conj device_put sharding_constraint '
             'layout_constraint bitcast_convert_type pcast pvary '
             'mesh_cast reshard'),
    **_table(_barrier, 'optimization_barrier'),
    **_table(_clamp, 'clamp'),
    **_table(_entrywise, 'add sub add_any max min neg abs sign sin tan asin '
             'atan sinh tanh asinh atanh sqrt cbrt square expm1 log1p erf '
             'floor ceil round imag complex or and xor rem shift_left '
             'shift_right_logical shift_right_arithmetic'),
    **_table(_entrywise_anything, 'exp exp2 log log2 cos acos cosh acosh '
             'logistic rsqrt erfc erf_inv lgamma digamma pow atan2 nextafter '
             'not eq ne lt le gt ge eq_to le_to lt_to is_finite '
             'population_count clz'),
    **_table(_power, 'integer_pow'),
    **_table(_multiply, 'mul mulhi'),
    **_table(_divide, 'div'),
    **_table(_matrix_product, 'dot_general conv_general_dilated'),
    **_table(_select, 'select_n'),
    **_table(_move, 'reshape transpose broadcast_in_dim squeeze slice rev '
             'concatenate pad tile split stack unstack'),
    **_table(_reduce, 'reduce_sum reduce_max reduce_min reduce_prod reduce_or '
             'reduce_and argmax argmin'),
    **_table(_window, 'reduce_window_sum reduce_window_max reduce_window_min'),
    **_table(_along, 'sort top_k cumsum cumprod cummax cummin cumlogsumexp'),
    **_table(_gather, 'gather'),
    **_table(_dynamic_slice, 'dynamic_slice'),
    **_table(_put, 'dynamic_update_slice scatter scatter-add scatter-mul '
             'scatter-min scatter-max'),
}
