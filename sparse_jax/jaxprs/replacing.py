"""A function run again, with some of its matrix products replaced."""

from collections.abc import Callable
from collections.abc import Collection
import functools
from typing import Any
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from sparse_jax import checks

from sparse_jax import trees
from sparse_jax.jaxprs import holding
from sparse_jax.jaxprs import products
from sparse_jax.jaxprs import provenance

Product = products.Product
Rule = Callable[[trees.Path, Product, jax.Array, jax.Array], jax.Array]


def replace_products(fn: Callable[..., Any], rule: Rule, *,
                     paths: Collection[trees.Path] | None = None,
                     params_argnum: int = 0) -> Callable[..., Any]:
  """A function like `fn`, with the products of some parameters replaced.

  The result can be differentiated, compiled and mapped like any other. Where
  no product is replaced, everything is as before, custom derivatives and
  rematerialisation included. A function with a custom derivative that holds a
  replaced product is differentiated through, by the rule's own derivative.

  Laws: with `rule = lambda path, product, lhs, rhs: product.apply(lhs, rhs)`
  the values and gradients are those of `fn`.

  Args:
    fn: a function of arrays. Keyword arguments are handed to it as they are.
    rule: `(path, product, lhs, rhs) -> array` of the product's shape and
      dtype. `product.apply` takes replacements of `lax.dot_general` and
      `lax.conv_general_dilated`.
    paths: the parameters whose products are replaced; None for all.
    params_argnum: which argument is the tree of parameters.

  Returns:
    A function of the same arguments.

  Raises:
    ValueError: if `rule` is no function. When called, the result raises it if
      one of `paths` is no parameter, if the rule's result does not fit, or if
      a product is out of reach (inside a kernel, say).

  Example:
    >>> def half(path, product, lhs, rhs):
    ...   return product.apply(lhs, rhs) / 2
    >>> model = lambda params, x: x @ params['a'] + x @ params['b']
    >>> params = {'a': jnp.ones((3, 1)), 'b': jnp.ones((3, 1))}
    >>> replace_products(model, half, paths=['a'])(params, jnp.ones((1, 3)))
    Array([[4.5]], dtype=float32)
  """
  checks.check_callable('rule', rule)
  paths = None if paths is None else tuple(paths)

  def replaced(*args, **kwargs):
    known = trees.leaves_by_path(args[params_argnum])
    for path in paths or ():
      if path not in known:
        raise ValueError(f'`paths` (={paths!r}) has {path!r}, which is none '
                         f'of the parameters {sorted(known)}.')
    return interpret(functools.partial(fn, **kwargs), args, params_argnum,
                     rule, frozenset(known if paths is None else paths))

  return replaced


def _same(path: trees.Path, product: Product, lhs, rhs) -> jax.Array:
  del path
  return product.apply(lhs, rhs)


def interpret(fn: Callable[..., Any], args: tuple[Any, ...],
              params_argnum: int, rule: Rule = _same,
              paths: frozenset[trees.Path] = frozenset()) -> Any:
  """fn(*args), where products of `paths` follow the rule.

  Leaves of `args` may be Held: the function is shown a dense array, and
  blocks are multiplied.
  """
  shown = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype) if holding.is_held(leaf) else leaf, args,
                       is_leaf=holding.is_held)
  closed, origins, tree = products.trace(fn, shown, params_argnum)
  flat = jax.tree.leaves(args, is_leaf=holding.is_held)
  outs = _run(closed, flat, origins, _Swap(rule, paths))
  return jax.tree.unflatten(tree, map(holding.assembled, outs))


class _Swap(NamedTuple):
  """What to replace, and by what."""

  rule: Rule
  wanted: frozenset[trees.Path]
  times: int = 1  # Runs of the scans around.
  run: Any = 0  # Which of them this is.

  def inside(self, step: jax.Array, length: int) -> '_Swap':
    """The same in the body of a scan."""
    return self._replace(times=self.times * length,
                         run=self.run * length + step)

  def wants(self, product: Product) -> bool:
    return product.path in self.wanted

  def __call__(self, product: Product, lhs, rhs) -> jax.Array:
    product = product._replace(times=self.times, run=self.run)
    out = self.rule(str(product.path), product, lhs, rhs)
    if jnp.shape(out) != product.shape or out.dtype != product.dtype:
      raise ValueError(f'`rule` gave {jax.typeof(out)} for {product.path!r}, '
                       f'but the product is a {product.dtype} of shape '
                       f'{product.shape}.')
    return out


def _run(jaxpr, args, origins, swap):
  """The outputs of a jaxpr with the wanted products replaced."""
  inner, consts = products.open_jaxpr(jaxpr)
  values = dict(zip((*inner.constvars, *inner.invars), (*consts, *args),
                    strict=True))
  seen = dict(zip(inner.invars, origins))
  seen.update({var: provenance.of_argument(var.aval)
               for var in inner.constvars})
  for eqn in inner.eqns:
    before = products.origins_of(eqn.invars, seen)
    found, after = products.visit(eqn, before, every_branch=True)
    with eqn.ctx.manager:
      outs = _outputs(eqn, _values_of(eqn.invars, values), before, swap,
                      any(map(swap.wants, found)))
    values.update(zip(eqn.outvars, outs, strict=True))
    seen.update(zip(eqn.outvars, after))
  return _values_of(inner.outvars, values)


def _values_of(atoms, values):
  return [atom.val if products.is_literal(atom) else values[atom]
          for atom in atoms]


def _outputs(eqn, args, origins, swap, wanted):
  """The outputs of one equation, replaced if wanted, by blocks if held."""
  name = eqn.primitive.name
  held = [arg for arg in args if holding.is_held(arg)]
  if held and name not in _REBUILT:
    outs = _by_blocks(eqn, args, held)
    if outs is not None:
      return outs
    args, held = list(map(holding.assembled, args)), []
  if not wanted and not held:
    outs = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(
        eqn.params))
    return outs if eqn.primitive.multiple_results else [outs]
  if name in (products.DOT, products.CONV):
    return [swap(products.make_product(eqn, origins), *args)]
  if name not in _REBUILT:
    raise ValueError(f'`paths` name parameters {sorted(swap.wanted)}, of which '
                     f'a product lies inside {name!r}, out of reach.')
  return _REBUILT[name](eqn, args, origins, swap)


def _by_blocks(eqn, args, held):
  """The outputs of an equation on packed weights; None to assemble them."""
  name = eqn.primitive.name
  if name == products.DOT:
    out = holding.multiply(eqn, args)
    if out is None:
      _check_summed(eqn, args, held[0])
    return None if out is None else [out]
  if name == products.CONV:
    out = holding.multiply(eqn, args)
    return None if out is None else [out]
  if holding.is_held(args[0]):
    after = holding.moved(eqn, args[0])
    return None if after is None else [after]
  return None


def _check_summed(eqn, args, held):
  """Raises ValueError if a product sums over other axes than blocks follow."""
  sides = [i for i, arg in enumerate(args) if holding.is_held(arg)]
  contracted = eqn.params['dimension_numbers'][0][sides[0]]
  axes = tuple(sorted(axis for i in contracted for axis in held.axes[i]))
  if axes in map(tuple, map(sorted, (held.layout.rows, held.layout.columns))):
    return  # Layers side by side on one input, or of two packed operands.
  raise ValueError(
      f'the packed leaf {held.path!r} of shape {held.layout.shape} is '
      f'multiplied along its axes {axes}, but its blocks follow '
      f'{held.layout.rows}: pass contracting={{{held.path!r}: {axes}}} to the '
      'method, as contracting_axes(fn, params, *inputs) finds them.')


def _run_call(eqn, args, origins, swap):
  body, = products.bodies_of(eqn)
  return _run(body, args, origins, swap)


def _run_jit(eqn, args, origins, swap):
  def fn(*args):
    return _run_call(eqn, args, origins, swap)

  fn.__name__ = eqn.params['name']
  return jax.jit(fn)(*args)


def _run_remat(eqn, args, origins, swap):
  fn = jax.checkpoint(lambda *args: _run_call(eqn, args, origins, swap),
                      policy=eqn.params['policy'],
                      prevent_cse=eqn.params['prevent_cse'])
  return fn(*args)


def _run_scan(eqn, args, origins, swap):
  consts, carry = products.scan_parts(eqn)
  origins = products.scan_origins(eqn, origins)

  length = eqn.params['length']
  first = [holding.assembled(arg) for arg in args[consts:consts + carry]]
  # Blocks are sliced as arrays; what stays with them is that of a slice.
  inside = [holding.sliced(arg) if holding.is_held(arg) else None
            for arg in args[consts + carry:]]
  xs = [holding.assembled(arg) if like is None else arg.packed
        for arg, like in zip(args[consts + carry:], inside)]

  def body(carried, step_and_xs):
    step, xs = step_and_xs
    xs = [x if like is None else like.replace(packed=x)
          for x, like in zip(xs, inside)]
    outs = _run(eqn.params['jaxpr'], [*args[:consts], *carried, *xs], origins,
                swap.inside(step, length))
    outs = list(map(holding.assembled, outs))
    return outs[:carry], outs[carry:]

  carried, ys = lax.scan(
      body, first, (jnp.arange(length), xs), length=length,
      reverse=eqn.params['reverse'], unroll=eqn.params['unroll'])
  return [*carried, *ys]


def _run_while(eqn, args, origins, swap):
  tests, consts = eqn.params['cond_nconsts'], eqn.params['body_nconsts']
  test, body = products.while_origins(eqn, origins)
  carried = list(map(holding.assembled, args[tests + consts:]))
  return lax.while_loop(
      lambda carry: _run(eqn.params['cond_jaxpr'], [*args[:tests], *carry],
                         test, swap)[0],
      lambda carry: list(map(holding.assembled, _run(
          eqn.params['body_jaxpr'], [*args[tests:tests + consts], *carry],
          body, swap))), carried)


def _run_cond(eqn, args, origins, swap):
  index, *operands = args
  branches = [functools.partial(lambda body, *ops: list(map(
      holding.assembled, _run(body, ops, origins[1:], swap))), body)
              for body in eqn.params['branches']]
  return lax.switch(index, branches, *operands)


def _run_shard_map(eqn, args, origins, swap):
  held = [arg for arg in args if holding.is_held(arg)]
  if held:
    raise ValueError(f'the packed leaf {held[0].path!r} is an argument of a '
                     'shard_map: call with_method inside it.')
  fn = jax.shard_map(
      lambda *args: _run_call(eqn, args, origins, swap),
      mesh=eqn.params['mesh'], in_specs=eqn.params['in_specs'],
      out_specs=list(eqn.params['out_specs']),
      check_vma=eqn.params['check_vma'],
      axis_names=set(eqn.params['newly_manual_axes']))
  return fn(*args)


_REBUILT = {'jit': _run_jit, 'remat2': _run_remat, 'checkpoint': _run_remat,
            'scan': _run_scan, 'while': _run_while, 'cond': _run_cond,
            'shard_map': _run_shard_map, 'custom_jvp_call': _run_call,
            'custom_vjp_call': _run_call, 'closed_call': _run_call,
            'core_call': _run_call}
