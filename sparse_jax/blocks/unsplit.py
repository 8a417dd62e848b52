"""A kernel where a program is for one device, something else where XLA splits.

Which of the two is known when a program is lowered, not when it is traced:
`jit(in_shardings=...)` of arrays that lie on no mesh says nothing before.
"""

from collections.abc import Callable
import warnings

import jax
import jax.extend
from jax.interpreters import batching
from jax.interpreters import mlir

_choice = jax.extend.core.Primitive('unless_split')
_choice.multiple_results = True


def unless_split(kernel: Callable, other: Callable) -> Callable:
  """Computes what `kernel` does, by `other` where XLA splits the program.

  Law: under `jax.jit` on one device, and in `jax.shard_map`, it is `kernel`.

  Args:
    kernel: a function of arrays that XLA cannot split.
    other: one of the same arrays and results that it can.

  Returns:
    A function of the same arrays. It has no derivative.

  Example:
    >>> import jax.numpy as jnp
    >>> unless_split(jnp.sin, jnp.cos)(jnp.zeros(2))
    Array([0., 0.], dtype=float32)
  """
  def chosen(*args):
    types, out = jax.make_jaxpr(kernel, return_shape=True)(*args)
    flat = lambda fn: lambda *args: jax.tree.leaves(fn(*args))
    return jax.tree.unflatten(jax.tree.structure(out), _choice.bind(
        *args, kernel=flat(kernel), other=flat(other),
        types=tuple(types.out_avals)))

  return chosen


@_choice.def_abstract_eval
def _types(*_, types, **fns):
  del fns
  return types


@_choice.def_impl
def _run(*args, kernel, other, types):
  del other, types
  return kernel(*args)


def _lower(context, *args, kernel, other, types):
  del types
  axes = context.module_context.axis_context
  split = isinstance(axes, mlir.ShardingContext) and axes.num_devices > 1
  if split:
    warnings.warn(
        'A product with packed blocks is compiled for several devices and '
        'knows no mesh: XLA splits it, which takes much memory. Call '
        'jax.set_mesh(mesh), or give jit arrays that lie on the mesh.')
  return mlir.lower_fun(other if split else kernel, multiple_results=True)(
      context, *args)


def _map(args, axes, *, kernel, other, types):
  del types
  out = unless_split(jax.vmap(kernel, axes), jax.vmap(other, axes))(*args)
  return out, [0] * len(out)


mlir.register_lowering(_choice, _lower)
batching.primitive_batchers[_choice] = _map
