"""What a weight is worth: by magnitude, by gradient, by chance."""

import jax
import jax.numpy as jnp


def magnitude(weight: jax.Array, grad=None, key=None) -> jax.Array:
  """|w|, same shape and dtype. The score of GMP, RigL's drop, Top-KAST.

  Example:
    >>> magnitude(jnp.array([-2., 1.]))
    Array([2., 1.], dtype=float32)
  """
  del grad, key
  return jnp.abs(weight)


def gradient_magnitude(weight, grad: jax.Array, key=None) -> jax.Array:
  """|dL/dw|, same shape and dtype. The score by which RigL grows.

  Example:
    >>> gradient_magnitude(jnp.zeros(2), jnp.array([-2., 1.]))
    Array([2., 1.], dtype=float32)
  """
  del weight, key
  return jnp.abs(grad)


def saliency(weight: jax.Array, grad: jax.Array, key=None) -> jax.Array:
  """|w dL/dw|, same shape, float32: the first-order effect of removing w.

  Example:
    >>> saliency(jnp.array([-2., 1.]), jnp.array([3., 3.]))
    Array([6., 3.], dtype=float32)

  Reference:
    Lee et al., SNIP, 2019, https://arxiv.org/abs/1810.02340, equation 4.
  """
  del key
  return jnp.abs(weight.astype(jnp.float32) * grad.astype(jnp.float32))


def random(weight: jax.Array, grad, key: jax.Array) -> jax.Array:
  """Uniform in [0, 1), float32 of the weight's shape.

  Example:
    >>> random(jnp.zeros((2, 3)), None, jax.random.key(0)).shape
    (2, 3)
  """
  del grad
  return jax.random.uniform(key, weight.shape, jnp.float32)
