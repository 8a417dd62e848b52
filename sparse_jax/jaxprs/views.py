"""Which axes of a parameter a value holds, and which of them a product sums.

A value is a view of a leaf while it is made of it by moving its axes; each
axis of the value holds some axes of the leaf, merged in order.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any
from typing import NamedTuple

import jax

from sparse_jax import trees
from sparse_jax.jaxprs import products

# The axes of a leaf that each axis of a value holds.
Axes = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class View:
  """A value whose entries are those of one leaf, axes moved."""

  path: trees.Path
  shape: tuple[int, ...]  # Of the leaf.
  axes: Axes

  def replace(self, axes: Axes) -> 'View':
    return dataclasses.replace(self, axes=axes)


def view_of(path: trees.Path, shape: tuple[int, ...]) -> View:
  """A leaf as a view of itself."""
  return View(path, tuple(shape), tuple((i,) for i in range(len(shape))))


def moved(eqn: Any, axes: Axes, sizes: tuple[int, ...]) -> Axes | None:
  """The axes after an equation that only moves entries, or None.

  Args:
    eqn: an equation whose first operand is the view.
    axes: of that operand.
    sizes: of the leaf's axes.
  """
  name = eqn.primitive.name
  shape = eqn.outvars[0].aval.shape
  if name in ('convert_element_type', 'copy', 'copy_p', 'reduce_precision'):
    return axes
  if name == 'transpose':
    return tuple(axes[i] for i in eqn.params['permutation'])
  if name == 'broadcast_in_dim':
    if math.prod(shape) != math.prod(eqn.invars[0].aval.shape):
      return None
    return _regrouped(axes, shape, sizes)
  if name in ('reshape', 'squeeze', 'expand_dims'):
    return _regrouped(axes, shape, sizes)
  return None


def _regrouped(axes, shape, sizes) -> Axes | None:
  """The axes of a reshape, if each new axis holds whole axes of the leaf."""
  left = [axis for group in axes for axis in group if sizes[axis] != 1]
  ones = [axis for group in axes for axis in group if sizes[axis] == 1]
  made = []
  for size in shape:
    group, product = [], 1
    while product < size and left:
      group.append(left.pop(0))
      product *= sizes[group[-1]]
    if product != size:
      return None
    made.append(tuple(group))
  for axis in ones:  # An axis of one entry goes where there is room.
    empty = [i for i, group in enumerate(made) if not group]
    if not empty:
      return None
    made[empty[0]] = (axis,)
  return None if left else tuple(made)


class Use(NamedTuple):
  """A product that multiplies by a leaf."""

  path: trees.Path
  primitive: str
  contracting: tuple[int, ...]  # Axes of the leaf, sorted; of a conv its input.
  batch: tuple[int, ...]  # Axes of the leaf along which matrices are stacked.


def find_uses(fn: Callable[..., Any], *args: Any, params_argnum: int = 0
              ) -> list[Use]:
  """The products of a function by the leaf, with the axes that they sum.

  Args:
    fn: a function of arrays.
    *args: its arguments: trees of arrays, or of jax.ShapeDtypeStruct.
    params_argnum: which argument is the tree of parameters.

  Returns:
    A `Use` for each product of a leaf, in the order of execution: its path, the
    primitive, and the leaf's axes that it sums over and stacks.

  Example:
    >>> import jax.numpy as jnp
    >>> find_uses(lambda params, x: x @ params['a'].T, {'a': jnp.ones((2, 3))},
    ...           jnp.ones((1, 3)))[0].contracting
    (1,)
  """
  closed, _, _ = products.trace(fn, args, params_argnum)
  given = [view_of(trees.path_name(path), leaf.shape)
           if i == params_argnum else None for i, arg in enumerate(args)
           for path, leaf in jax.tree.leaves_with_path(arg)]
  uses: list[Use] = []
  _walk(closed, given, uses)
  return uses


def contracting_axes(fn: Callable[..., Any], params: trees.PyTree,
                     *inputs: Any) -> dict[trees.Path, tuple[int, ...]]:
  """Which axes of each parameter the products of a function sum over.

  They are read from the function's jaxpr, whatever its layers are called:
  what `contracting=` of the methods takes.

  Args:
    fn: `fn(params, *inputs)`, a function of arrays.
    params: a tree of arrays, or of jax.ShapeDtypeStruct.
    *inputs: likewise.

  Returns:
    `{path: axes}` of the leaves that a product multiplies by; of a
    convolution the axis of the input channels.

  Raises:
    ValueError: if two products sum over different axes of one leaf.

  Example:
    >>> import jax.numpy as jnp
    >>> def model(params, x):
    ...   return jnp.einsum('bd,hkd->bhk', x, params['heads'])
    >>> contracting_axes(model, {'heads': jnp.ones((2, 3, 8))},
    ...                  jnp.ones((1, 8)))
    {'heads': (2,)}
  """
  found: dict[trees.Path, tuple[int, ...]] = {}
  for use in find_uses(fn, params, *inputs):
    known = found.setdefault(use.path, use.contracting)
    if known != use.contracting:
      raise ValueError(f'`fn` sums over the axes {known} and '
                       f'{use.contracting} of {use.path!r}; name those that '
                       'the structure is to follow in `contracting`.')
  return found


def layer_order(fn: Callable[..., Any], params: trees.PyTree, *inputs: Any
                ) -> tuple[trees.Path, ...]:
  """The leaves in the order in which a function first multiplies by them.

  A tree of parameters is in alphabetical order; this is the network's.

  Args:
    fn: `fn(params, *inputs)`, a function of arrays.
    params: a tree of arrays, or of jax.ShapeDtypeStruct.
    *inputs: likewise.

  Returns:
    The paths of the leaves that a product multiplies by.

  Example:
    >>> import jax.numpy as jnp
    >>> def model(params, x):
    ...   return x @ params['stem'] @ params['head']
    >>> layer_order(model, {'head': jnp.ones((3, 4)), 'stem': jnp.ones((2, 3))},
    ...             jnp.ones((1, 2)))
    ('stem', 'head')
  """
  return tuple(dict.fromkeys(use.path for use in find_uses(fn, params,
                                                           *inputs)))


def _walk(jaxpr, views, uses):
  """The views among the outputs of a jaxpr; its products are noted."""
  inner, _ = products.open_jaxpr(jaxpr)
  seen = {var: view for var, view in zip(inner.invars, views) if view}

  def view_at(atom):
    return None if products.is_literal(atom) else seen.get(atom)

  for eqn in inner.eqns:
    given = [view_at(atom) for atom in eqn.invars]
    if any(given):
      outs = _visit(eqn, given, uses)
      seen.update({var: view for var, view in zip(eqn.outvars, outs) if view})
  return [view_at(atom) for atom in inner.outvars]


def _visit(eqn, given, uses):
  name, nothing = eqn.primitive.name, [None] * len(eqn.outvars)
  if name in (products.DOT, products.CONV):
    uses.extend(use for side, view in enumerate(given[:2]) if view
                for use in _use(eqn, side, view))
    return nothing
  if name == 'scan':
    consts, carry = products.scan_parts(eqn)
    xs = [_sliced(view) for view in given[consts + carry:]]
    _walk(eqn.params['jaxpr'], [*given[:consts], *[None] * carry, *xs], uses)
    return nothing
  if name == 'cond':
    for branch in eqn.params['branches']:
      _walk(branch, given[1:], uses)
    return nothing
  if name == 'while':
    tests = eqn.params['cond_nconsts']
    consts = eqn.params['body_nconsts']
    carried = [None] * (len(given) - tests - consts)
    _walk(eqn.params['body_jaxpr'], [*given[tests:tests + consts], *carried],
          uses)
    return nothing
  bodies = products.bodies_of(eqn)
  if len(bodies) == 1 and name != 'shard_map' and len(
      products.open_jaxpr(bodies[0])[0].invars) == len(given):
    return _walk(bodies[0], given, uses)
  first = next((view for view in given if view), None)
  if given[0]:
    axes = moved(eqn, first.axes, first.shape)
    if axes is not None:
      return [first.replace(axes), *nothing[1:]]
  same = [var.aval.shape for var in eqn.outvars]
  shapes = [atom.aval.shape for atom, view in zip(eqn.invars, given) if view]
  if name in _ELEMENTWISE and same == shapes[:1]:
    return [first]
  return nothing


# What keeps entries at their places: masks, scales, casts.
_ELEMENTWISE = ('mul', 'div', 'add', 'sub', 'neg', 'abs', 'sign', 'max', 'min',
                'select_n', 'tanh', 'logistic', 'exp', 'integer_pow', 'pow',
                'sqrt', 'stop_gradient', 'optimization_barrier', 'custom_jvp')


def _sliced(view):
  """A view in the body of a scan over its first axis."""
  if view is None or len(view.axes[0]) != 1:
    return None
  return view.replace(view.axes[1:])


def _use(eqn, side, view):
  """The use of a view as one operand of a product."""
  if eqn.primitive.name == products.CONV:
    numbers = eqn.params['dimension_numbers']
    if side == 1:
      yield Use(view.path, products.CONV, view.axes[numbers.rhs_spec[1]], ())
    return
  contracted, batched = eqn.params['dimension_numbers']
  summed, batch = (tuple(sorted(axis for i in axes[side]
                                for axis in view.axes[i]))
                   for axes in (contracted, batched))
  yield Use(view.path, products.DOT, summed, batch)
