"""The matrix products of a function, and the parameters that feed them.

One walk over a jaxpr follows every value back to the parameters, so that each
product is known by the leaf that it multiplies by, whoever wrote the model.
"""

from collections.abc import Callable
import math
from typing import Any
from typing import NamedTuple

import jax
from jax import lax
import jax.extend.core as jax_core
import jax.numpy as jnp
import numpy as np

from sparse_jax import checks

from sparse_jax import trees
from sparse_jax.jaxprs import provenance

DOT, CONV = 'dot_general', 'conv_general_dilated'
RAGGED = 'ragged_dot_general'


class Operand(NamedTuple):
  """One side of a product."""

  shape: tuple[int, ...]
  dtype: Any
  leaves: dict[trees.Path, int]  # The parameters it is a view of; their sizes.
  depends: bool  # Whether it depends on parameters, and so has a gradient.
  plain: bool  # Whether it is made of parameters alone, each entry once.


class Product(NamedTuple):
  """A matrix product or convolution of a function.

  Example:
    >>> product, = find_products(lambda p, x: x @ p['w'].T,
    ...                          {'w': jnp.ones((4, 3))}, jnp.ones((2, 3)))
    >>> product.path, product.weight, product.shape, product.multiply_adds
    ('w', 'rhs', (2, 4), 24)
  """

  primitive: str  # Its name in the jaxpr, such as 'dot_general'.
  lhs: Operand
  rhs: Operand
  shape: tuple[int, ...]  # Of the result.
  dtype: Any
  params: dict[str, Any]  # The primitive's: dimension numbers, strides, ...
  times: int = 1  # How often it runs, scans multiplied out.
  in_while: bool = False  # Whether a `while` runs it; counted as if once.
  # Which of its `times` runs this is, where it is being replaced: an int, or
  # a traced int32[] in a scan.
  run: Any = 0

  @property
  def weight(self) -> str | None:
    """Which operand is the weight: 'lhs', 'rhs', or None for neither.

    If both are views of parameters: the one made of them alone, then the one
    of the larger leaf, then the right one.
    """
    sides = [side for side in ('rhs', 'lhs') if getattr(self, side).leaves]
    return max(sides, key=self._claim, default=None)

  def _claim(self, side: str):
    operand = getattr(self, side)
    return operand.plain, max(operand.leaves.values())

  @property
  def leaves(self) -> dict[trees.Path, int]:
    """The parameters that the weight is a view of, and their sizes."""
    return getattr(self, self.weight).leaves if self.weight else {}

  @property
  def path(self) -> trees.Path | None:
    """The parameter it multiplies by: of several, the largest; or None."""
    leaves = self.leaves
    return max(leaves, key=lambda path: leaves[path], default=None)

  @property
  def input_depends(self) -> bool:
    """Whether the operand beside the weight has a gradient.

    Without a weight: whether both operands have one.
    """
    if self.weight is None:
      return self.lhs.depends and self.rhs.depends
    return (self.lhs if self.weight == 'rhs' else self.rhs).depends

  @property
  def outputs(self) -> int:
    """Entries of one result."""
    return math.prod(self.shape)

  @property
  def multiply_adds(self) -> int:
    """Multiply-adds of one execution, padding counted.

    The zeros that `lhs_dilation` puts between entries are not.
    """
    if self.primitive == DOT:
      (contracted, _), _ = self.params['dimension_numbers']
      return self.outputs * math.prod(self.lhs.shape[i] for i in contracted)
    if self.primitive == RAGGED:
      return _ragged_multiply_adds(self)
    return _conv_multiply_adds(self)

  def apply(self, lhs: jax.Array, rhs: jax.Array, *,
            dot_general: Callable[..., jax.Array] = lax.dot_general,
            conv_general_dilated: Callable[..., jax.Array] = (
                lax.conv_general_dilated)) -> jax.Array:
    """Computes the product, or what takes its place.

    The replacements are called as the functions of `jax.lax` are, the weight
    always on the right: the operands of a `dot_general` change sides if need
    be, and its result is transposed back.
    """
    given = {name: value for name, value in self.params.items()
             if (name, value) != ('out_sharding', None)}
    if self.primitive == CONV:
      return conv_general_dilated(lhs, rhs, **given)
    if self.weight != 'lhs':
      return dot_general(lhs, rhs, **given)
    contracted, batched = given['dimension_numbers']
    given['dimension_numbers'] = contracted[::-1], batched[::-1]
    batch = len(batched[0])
    right = rhs.ndim - len(contracted[1]) - batch
    out = dot_general(rhs, lhs, **given)
    free = range(batch, out.ndim)
    return jnp.transpose(out, (*range(batch), *free[right:], *free[:right]))


def find_products(fn: Callable[..., Any], *args: Any,
                  params_argnum: int = 0) -> list[Product]:
  """Lists the matrix products and convolutions that a function computes.

  Looks into `jit`, `scan` (times its length), `while` (counted once), `cond`
  (the dearest branch), `remat`, `custom_jvp`, `custom_vjp`, `vmap` and
  `shard_map` (times the devices). Nothing is computed.

  A value is a view of a parameter as long as it is made of it by moving,
  selecting, scaling or adding entries. It stops being one when it meets a
  result of a product with data, or data that it is broadcast to, as a scale
  or a bias is; a row looked up in a table by data is no view either.
  Decompositions, solvers and Fourier transforms are not products.

  Args:
    fn: a function of arrays.
    *args: its arguments: trees of arrays, or of jax.ShapeDtypeStruct.
    params_argnum: which argument is the tree of parameters.

  Returns:
    Products in the order of execution.

  Raises:
    ValueError: if there is no such argument.

  Example:
    >>> def model(params, x):
    ...   return jax.nn.relu(x @ params['in']) @ params['out'].T
    >>> params = {'in': jnp.ones((3, 8)), 'out': jnp.ones((2, 8))}
    >>> for product in find_products(model, params, jnp.ones((5, 3))):
    ...   print(product.path, product.shape, product.multiply_adds)
    in (5, 8) 120
    out (5, 2) 80
  """
  closed, origins, _ = trace(fn, args, params_argnum)
  return walk(closed, origins)[0]


def trace(fn, args, argnum):
  """The jaxpr of a function, the origins of its inputs, its output's tree."""
  if not 0 <= checks.check_count('params_argnum', argnum) < len(args):
    raise ValueError(f'`params_argnum` (={argnum!r}) must be the place of one '
                     f'of the {len(args)} arguments.')
  closed, out = jax.make_jaxpr(fn, return_shape=True)(*args)
  places = [(i, trees.path_name(path)) for i, arg in enumerate(args)
            for path, _ in jax.tree.leaves_with_path(arg)]
  origins = [provenance.of_parameter(path, aval) if i == argnum
             else provenance.of_argument(aval)
             for (i, path), aval in zip(places, closed.in_avals, strict=True)]
  return closed, origins, jax.tree.structure(out)


def shapes(tree: trees.PyTree) -> trees.PyTree:
  """A tree of arrays as one of jax.ShapeDtypeStruct."""
  return jax.eval_shape(lambda tree: tree, tree)


def open_jaxpr(jaxpr):
  """(jaxpr, constants) of a closed jaxpr, or of one without constants."""
  return getattr(jaxpr, 'jaxpr', jaxpr), getattr(jaxpr, 'consts', ())


def is_literal(atom) -> bool:
  """Whether an input or output of an equation is written in the program."""
  return isinstance(atom, jax_core.Literal)


def origins_of(atoms, seen) -> list[provenance.Origin]:
  return [provenance.CONSTANT if is_literal(atom) else seen[atom]
          for atom in atoms]


def walk(jaxpr, origins, every_branch=False):
  """(products, origins of the outputs) of a jaxpr."""
  inner, _ = open_jaxpr(jaxpr)
  seen = dict(zip(inner.invars, origins, strict=True))
  seen.update({var: provenance.of_argument(var.aval)
               for var in inner.constvars})
  products = []
  for eqn in inner.eqns:
    found, after = visit(eqn, origins_of(eqn.invars, seen), every_branch)
    products += found
    seen.update(zip(eqn.outvars, after, strict=True))
  return products, origins_of(inner.outvars, seen)


def visit(eqn, origins, every_branch):
  """(products, origins of the outputs) of one equation."""
  name = eqn.primitive.name
  if name in (DOT, CONV, RAGGED):
    product, origin = make_product(eqn, origins), provenance.of_product(
        *origins[:2])
    return [product], [origin]
  if name in _STRUCTURES:
    return _STRUCTURES[name](eqn, origins, every_branch)
  bodies = bodies_of(eqn)
  if len(bodies) == 1 and len(open_jaxpr(bodies[0])[0].invars) == len(origins):
    return walk(bodies[0], origins, every_branch)
  if bodies:
    return _visit_unknown(eqn, bodies, origins, every_branch)
  return [], [provenance.of_output(eqn, origins, var) for var in eqn.outvars]


def bodies_of(eqn) -> list[Any]:
  """The jaxprs among an equation's parameters."""
  values = jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr)
  return [value for value in values if _is_jaxpr(value)]


def _is_jaxpr(value) -> bool:
  return hasattr(value, 'eqns') and hasattr(value, 'outvars') or (
      hasattr(value, 'jaxpr') and hasattr(value, 'consts'))


def make_product(eqn, origins) -> Product:
  def operand(var, origin):
    return Operand(var.aval.shape, var.aval.dtype, dict(sorted(origin.leaves)),
                   origin.depends, origin.plain)

  lhs, rhs = map(operand, eqn.invars[:2], origins)
  out, = eqn.outvars
  return Product(eqn.primitive.name, lhs, rhs, out.aval.shape, out.aval.dtype,
                 dict(eqn.params))


def _visit_scan(eqn, origins, every_branch):
  origins = scan_origins(eqn, origins)
  found, after = walk(eqn.params['jaxpr'], origins, every_branch)
  length = eqn.params['length']
  return [p._replace(times=p.times * length) for p in found], after


def scan_parts(eqn) -> tuple[int, int]:
  """How many of a scan's operands are constants, and how many carried."""
  if 'ft_in' in eqn.params:  # From jax 0.11 on.
    consts, carry, _ = eqn.params['ft_in'].unpack()
    return len(consts), len(carry)
  return eqn.params['num_consts'], eqn.params['num_carry']


def scan_origins(eqn, origins):
  consts, carry = scan_parts(eqn)
  return _settled(eqn.params['jaxpr'], origins, consts, carry)


def _settled(body, origins, consts, carry):
  """Origins of a loop's operands, such that another round changes nothing."""
  origins = list(origins)
  while True:
    _, after = walk(body, origins)
    carried = slice(consts, consts + carry)
    met = [provenance.of_either(pair)
           for pair in zip(origins[carried], after[:carry])]
    if met == origins[carried]:
      return origins
    origins[carried] = met


def _visit_while(eqn, origins, every_branch):
  test, body = while_origins(eqn, origins)
  found, after = walk(eqn.params['body_jaxpr'], body, every_branch)
  tests, _ = walk(eqn.params['cond_jaxpr'], test, every_branch)
  return [p._replace(in_while=True) for p in tests + found], after


def while_origins(eqn, origins):
  """Origins of the operands of a `while`'s condition and of its body."""
  tests, consts = eqn.params['cond_nconsts'], eqn.params['body_nconsts']
  body = _settled(eqn.params['body_jaxpr'], origins[tests:], consts,
                  len(origins) - tests - consts)
  return [*origins[:tests], *body[consts:]], body


def _visit_cond(eqn, origins, every_branch):
  visits = [walk(branch, origins[1:], every_branch)
            for branch in eqn.params['branches']]
  after = [provenance.of_either(outs)
           for outs in zip(*(outs for _, outs in visits))]
  found = [products for products, _ in visits]
  if every_branch:
    return sum(found, []), after
  return max(found, key=lambda products: sum(
      p.times * p.multiply_adds for p in products)), after


def _visit_shard_map(eqn, origins, every_branch):
  mesh, axes = eqn.params['mesh'], eqn.params['newly_manual_axes']
  devices = math.prod(mesh.shape[axis] for axis in axes)
  found, after = walk(eqn.params['jaxpr'], origins, every_branch)
  return [p._replace(times=p.times * devices) for p in found], after


def _visit_unknown(eqn, bodies, origins, every_branch):
  """A primitive of its own kind, say a Pallas kernel.

  Its products are attributed to all the parameters that it is given.
  """
  met = (provenance.ACTIVATION if any(o.depends for o in origins)
         else provenance.DATA)
  grid = getattr(eqn.params.get('grid_mapping'), 'grid', ())
  times = math.prod(size for size in grid if isinstance(size, int))
  leaves = dict(sorted(frozenset().union(*(o.leaves for o in origins))))
  found = []
  for body in bodies:
    inputs = [met] * len(open_jaxpr(body)[0].invars)
    products, _ = walk(body, inputs, every_branch)
    found += [p._replace(times=p.times * times,
                         rhs=p.rhs._replace(leaves=leaves)) for p in products]
  return found, [met] * len(eqn.outvars)


_STRUCTURES = {'scan': _visit_scan, 'while': _visit_while,
               'cond': _visit_cond, 'shard_map': _visit_shard_map}


def _conv_multiply_adds(product: Product) -> int:
  numbers = product.params['dimension_numbers']
  _, features, *spatial = (product.rhs.shape[i] for i in numbers.rhs_spec)
  sizes = [product.shape[i] for i in numbers.out_spec]
  taps = math.prod(
      _taps(out, kernel, *window) for out, kernel, *window in zip(
          sizes[2:], spatial, product.params['window_strides'],
          product.params['padding'], product.params['lhs_dilation'],
          product.params['rhs_dilation'], strict=True))
  return sizes[0] * sizes[1] * features * taps


def _ragged_multiply_adds(product: Product) -> int:
  """Each entry on the left meets one group's entries on the right."""
  numbers = product.params['ragged_dot_dimension_numbers']
  (_, summed), (_, batch) = numbers.dot_dimension_numbers
  shared = (*summed, *batch, *numbers.rhs_group_dimensions)
  return math.prod(product.lhs.shape) * math.prod(
      n for i, n in enumerate(product.rhs.shape) if i not in shared)


def _taps(out, kernel, stride, padding, lhs_dilation, rhs_dilation) -> int:
  """Pairs of an output and a kernel place that meet no dilation zero."""
  places = np.arange(out)[:, None] * stride + np.arange(kernel) * rhs_dilation
  return int(np.sum((places - padding[0]) % lhs_dilation == 0))
