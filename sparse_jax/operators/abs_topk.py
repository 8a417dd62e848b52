"""AbsTopK: of each vector of activations only the largest stay."""

import jax
import jax.numpy as jnp

from sparse_jax.masks import topk


def abs_top_k(x: jax.Array, sparsity: float) -> jax.Array:
  """Keeps the largest |x| of each last axis, with their signs; the rest is 0.

  keep_count(features, sparsity) stay; the gradient reaches those alone.

  Args:
    x: float[..., features].
    sparsity: fraction that becomes 0, in [0, 1).

  Returns:
    The shape and dtype of x.

  Raises:
    ValueError: for a sparsity out of range.

  Example:
    >>> abs_top_k(jnp.array([[1., -3., 2., 0.]]), 0.5)
    Array([[ 0., -3.,  2.,  0.]], dtype=float32)

  Reference:
    Gao et al., Weight-sparse transformers have interpretable circuits, 2025,
    https://arxiv.org/abs/2511.13653: a quarter stays.
  """
  mask = topk.top_k_mask(jnp.abs(x), topk.keep_count(x.shape[-1], sparsity),
                         axes=(-1,))
  return jnp.where(mask, x, jnp.zeros((), x.dtype))
