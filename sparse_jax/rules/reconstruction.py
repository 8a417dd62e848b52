"""Pruning a matrix so that what it computes changes least.

The inputs of a layer are known by their sums of squares x^2 or of products
x x^T. Rows of a matrix are its inputs, columns its outputs.
"""

import functools

import jax
from jax import lax
import jax.numpy as jnp

from sparse_jax import checks
from sparse_jax.masks import topk

_HIGHEST = lax.Precision.HIGHEST


def wanda_scores(weight: jax.Array, squares: jax.Array) -> jax.Array:
  """The magnitude of each weight times the norm of its input.

  Args:
    weight: float[k, n].
    squares: float[k], sums of x^2 over the inputs.

  Returns:
    float32[k, n]. Of each column, or of each N:M group in it, the largest are
    kept.

  Example:
    >>> wanda_scores(jnp.array([[1.], [-2.]]), jnp.array([9., 1.]))
    Array([[3.],
           [2.]], dtype=float32)

  Reference:
    Sun et al., A simple and effective pruning approach for large language
    models, 2023, https://arxiv.org/abs/2306.11695, equation 1.
  """
  return jnp.abs(weight.astype(jnp.float32)) * jnp.sqrt(squares)[:, None]


@functools.partial(jax.jit, static_argnames=('sparsity', 'group', 'block'))
def sparsegpt(weight: jax.Array, hessian: jax.Array, *, sparsity: float = 0.,
              group: tuple[int, int] | None = None,
              mask: jax.Array | None = None, block: int = 128,
              damping: float | jax.Array = .01) -> jax.Array:
  """Prunes a matrix row by row, correcting the rows that are still to come.

  With U the upper Cholesky factor of H^-1, the entries of a block of rows that
  are least by w^2 / U_ii^2 are dropped, those of all columns together, and the
  error of each row is spread over the rows below it by row i of U.

  Laws: the entries kept are keep_count of each block's, or n of each m; with
  H a multiple of the identity they are the largest, and are not changed.

  Args:
    weight: float[k, n].
    hessian: float32[k, k], a multiple of the sum of x x^T.
    sparsity: fraction of a block's entries that is dropped, in [0, 1).
    group: (n, m) to keep n of each m consecutive rows instead.
    mask: bool[k, n] of what is kept, instead.
    block: rows whose entries compete, and whose errors are spread together; a
      multiple of m.
    damping: what is added to the diagonal, as a share of its mean.

  Returns:
    float32[k, n] with zeros. NaN if `hessian` is not positive definite even
    with what is added to it.

  Raises:
    ValueError: if `block` is no multiple of m.

  Example:
    >>> hessian = jnp.array([[2., 1.], [1., 2.]])
    >>> sparsegpt(jnp.array([[1.], [2.]]), hessian, sparsity=.5, damping=0.)
    Array([[0. ],
           [2.5]], dtype=float32)

  Reference:
    Frantar and Alistarh, SparseGPT, 2023, https://arxiv.org/abs/2301.00774,
    algorithm 1 and its code. The code drops every entry up to a threshold, one
    more than the fraction asked for; here the count is exact. Inputs that are
    always 0 have their weights dropped first, as there.
  """
  k, n = weight.shape
  checks.check_count('block', block, least=1)
  if group is not None and block % group[1]:
    raise ValueError(f'`block` (={block!r}) must be a multiple of m of `group` '
                     f'(={group!r}).')
  rest, factor = _prepared(weight.astype(jnp.float32), hessian, damping)
  pruned = []
  for start in range(0, k, block):
    rows = slice(start, min(start + block, k))
    corner = factor[rows, rows]
    diagonal = jnp.diagonal(corner)
    if mask is not None:
      kept = mask[rows]
    elif group is None:
      scores = jnp.square(rest[rows] / diagonal[:, None])
      kept = topk.top_k_mask(scores, topk.keep_count(scores.size, sparsity))
    else:
      kept = jnp.zeros(rest[rows].shape, bool)
    done, errors = _prune_block(rest[rows], corner, kept, group)
    pruned.append(done)
    rest = rest.at[rows.stop:].add(-jnp.matmul(
        factor[rows, rows.stop:].T, errors, precision=_HIGHEST))
  return jnp.concatenate(pruned)


def _prepared(weight, hessian, damping):
  """The matrix without dead inputs, and the upper factor of H^-1."""
  diagonal = jnp.diagonal(hessian)
  dead = diagonal == 0
  eye = jnp.eye(len(diagonal))
  hessian = hessian + jnp.where(dead, 1., 0.)[:, None] * eye
  hessian = hessian + damping * jnp.mean(jnp.diagonal(hessian)) * eye
  lower = lax.linalg.cholesky(hessian)
  inverse = jax.scipy.linalg.cho_solve((lower, True), eye)
  return jnp.where(dead[:, None], 0., weight), lax.linalg.cholesky(inverse).T


def _prune_block(rows, factor, kept, group):
  """A block's rows pruned, and their errors over the factor's diagonal."""
  diagonal = jnp.diagonal(factor)

  def choose(i, rest, kept):
    """Which of the m rows from i on are kept, as they are by now."""
    n, m = group
    scores = jnp.square(lax.dynamic_slice_in_dim(rest, i, m)
                        / lax.dynamic_slice_in_dim(diagonal, i, m)[:, None])
    best = topk.top_k_mask(scores, min(n, m), axes=(0,))
    return lax.dynamic_update_slice_in_dim(kept, best, i, 0)

  def step(i, carry):
    rest, kept, done, errors = carry
    if group is not None:
      kept = lax.cond(i % group[1] == 0, choose, lambda i, rest, kept: kept, i,
                      rest, kept)
    row = jnp.where(kept[i], rest[i], 0.)
    error = (rest[i] - row) / diagonal[i]
    rest = rest - factor[i][:, None] * error[None]
    return rest, kept, done.at[i].set(row), errors.at[i].set(error)

  zeros = jnp.zeros_like(rows)
  _, _, done, errors = lax.fori_loop(0, len(rows), step,
                                     (rows, kept, zeros, zeros))
  return done, errors
