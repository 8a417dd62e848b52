"""One array no sooner than another: so that a third can be freed between.

What a backward pass keeps in few bytes saves memory only if it is packed
before the next layer runs and unpacked after the gradient has come. Nothing
in a program's data flow says so, and XLA's schedulers, which know of no such
wish, pack all layers at the end or unpack them all at the start.
"""

import jax
from jax import lax
import jax.numpy as jnp

from sparse_jax.masks import placing


@jax.custom_jvp
def after(x: jax.Array, first: jax.Array) -> jax.Array:
  """`x`, which may be read only when `first` has been computed.

  An optimization barrier says that on GPU and TPU. XLA for CPUs removes
  barriers before it schedules, so there `x` is what is selected by a test of
  an entry of `first` that no value passes, not even NaN. On several devices
  the one entry would have to be sent to all, so that only the barrier stands.

  Law: the values are those of `x`, bit for bit, and so are its derivatives.

  Args:
    x: any shape and dtype.
    first: any shape, a real floating dtype; mapped by `vmap` or not, it does
      not make `x` mapped.

  Returns:
    The shape and dtype of `x`.

  Example:
    >>> after(jnp.array([1, 2]), jnp.array([jnp.nan]))
    Array([1, 2], dtype=int32)
  """
  return _after(x, first)


@after.defjvp
def _tangent(primals, tangents):
  return after(*primals), tangents[0]


@jax.custom_batching.custom_vmap
def _after(x, first):
  if not first.size:
    return x
  x, first = lax.optimization_barrier((x, first))
  if placing.is_shared(x, first):
    return x
  never = lax.platform_dependent(
      first[(0,) * first.ndim], cpu=lambda one: one > jnp.inf,
      default=lambda one: jnp.zeros_like(one, bool))
  return jnp.where(never, jnp.zeros((), x.dtype), x)


@_after.def_vmap
def _mapped(size, mapped, x, first):
  del size
  return _after(x, first[0] if mapped[1] else first), mapped[0]
