"""A weight read through one mask, its gradient sent through another."""

import functools

import jax
import jax.numpy as jnp


@jax.custom_jvp
def masked_weight(weight: jax.Array, forward_mask: jax.Array,
                  backward_mask: jax.Array) -> jax.Array:
  """The weight with zeros outside A, whose gradient is zero outside B.

  Forward: weight on A, 0 elsewhere. Backward: the cotangent on B, 0
  elsewhere, so that entries of B outside A get the gradient that their zero
  would get. The product that follows sees only A, so the gradient to its
  other operand depends on A alone. Derivatives forward (`jax.jvp`,
  `jax.linearize`) follow the same rule: the tangent on B, 0 elsewhere.

  Law: with both masks full it is the identity, and so is its gradient.

  Args:
    weight: float[...].
    forward_mask: bool that broadcasts to the weight, the set A.
    backward_mask: bool that broadcasts to the weight, the set B.

  Returns:
    The weight's shape and dtype.

  Example:
    >>> w = jnp.array([3., -2., 1.])
    >>> a, b = jnp.array([True, False, False]), jnp.array([True, True, False])
    >>> masked_weight(w, a, b)
    Array([3., 0., 0.], dtype=float32)
    >>> jax.grad(lambda w: masked_weight(w, a, b).sum())(w)
    Array([1., 1., 0.], dtype=float32)

  Reference:
    Jayakumar et al., Top-KAST, 2020, https://arxiv.org/abs/2106.03517,
    section 2: dL/d(alpha) restricted to B.
  """
  del backward_mask
  return jnp.where(forward_mask, weight, jnp.zeros((), weight.dtype))


# As the backward pass keeps the mask as it is given, not spread to the weight.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _on(mask, tangent):
  return jnp.where(mask, tangent, jnp.zeros((), tangent.dtype))


@masked_weight.defjvp
def _masked_weight_jvp(primals, tangents):
  return masked_weight(*primals), _on(primals[2], tangents[0])
