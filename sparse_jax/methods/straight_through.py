"""Gradients past the forward mask: hidden weights learn, and come back."""

import jax
import jax.numpy as jnp

from sparse_jax import checks
from sparse_jax import trees
from sparse_jax.masks import selection
from sparse_jax.masks import structures
from sparse_jax.masks.allocations import uniform
from sparse_jax.masks.structures import NM
from sparse_jax.masks.structures import Unstructured
from sparse_jax.rules import leaves
from sparse_jax.rules import rule
from sparse_jax.rules import updates
from sparse_jax.rules.make_method import make_method
from sparse_jax.rules.state import SparseMethod


def dnw(sparsity: float, *, allocation=uniform, structure=Unstructured(),
        is_sparse: selection.IsSparse = None, batch_axes: selection.Axes = (),
        contracting: selection.Axes | None = None) -> SparseMethod:
  """Discovering neural wirings: magnitude mask every step, dense gradient.

  The forward pass reads the largest weights; the gradient with respect to
  what it read goes to all weights, hidden ones included, so that any may
  enter. Training costs 2 f_S + f_D.

  Args:
    sparsity, allocation, structure, is_sparse, batch_axes, contracting: as in
      `static`.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> method = dnw(0.9)

  Reference:
    Wortsman et al., 2019, https://arxiv.org/abs/1906.00586, algorithm 1, which
    is run with all layers sparse, and with the first one dense.
  """
  return make_method(_every_step('dnw', leaves.Sites(
      sparsity, allocation, structure, is_sparse, batch_axes, contracting, 0.)))


def ste(*, structure=NM(2, 4), is_sparse: selection.IsSparse = None,
        batch_axes: selection.Axes = (),
        contracting: selection.Axes | None = None) -> SparseMethod:
  """N:M sparsity by the plain straight-through estimator.

  Every step the N largest of each M weights along the inputs are read, and
  the gradient with respect to what was read goes to all. It is `dnw` with
  N:M competitions. Training costs 2 f_S + f_D.

  Args:
    structure: an NM; it fixes the sparsity at 1 - n/m.
    is_sparse, batch_axes, contracting: as in `static`.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> method = ste(structure=NM(1, 4))

  Reference:
    Zhou et al., Learning N:M fine-grained structured sparse neural networks,
    2021, https://arxiv.org/abs/2102.04010, section 3.1. Deviation: of equal
    weights the earlier is kept.
  """
  return make_method(_n_of_m('ste', structure, is_sparse, batch_axes,
                             contracting))


def sr_ste(*, structure=NM(2, 4), decay: float = 2e-4,
           is_sparse: selection.IsSparse = None,
           batch_axes: selection.Axes = (),
           contracting: selection.Axes | None = None) -> SparseMethod:
  """N:M sparsity by the sparse-refined straight-through estimator.

  As `ste`, and weights that are not read decay: the penalty is decay / 2
  times their sum of squares, so that decay * w is added to their gradient
  and they change places with those that are read less often. Training costs
  2 f_S + f_D.

  Law: decay = 0 is `ste`.

  Args:
    structure: an NM; it fixes the sparsity at 1 - n/m.
    decay: lambda_w of the paper, at least 0. It comes besides any weight
      decay of the optimizer.
    is_sparse, batch_axes, contracting: as in `static`.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> import sparse_jax
    >>> method = sr_ste(decay=2e-4)
    >>> w = {'kernel': jnp.array([[.5], [-.1], [.3], [-.8]])}
    >>> method.read(w, method.init(w))['kernel'].ravel()
    Array([ 0.5,  0. ,  0. , -0.8], dtype=float32)

  Reference:
    Zhou et al., 2021, https://arxiv.org/abs/2102.04010, equation 9.
  """
  checks.check_non_negative('decay', decay)
  plain = _n_of_m('sr_ste', structure, is_sparse, batch_axes, contracting)

  def penalty(params, forward_masks, backward_masks, plan):
    del backward_masks, plan

    def hidden(path, weight, inside):
      del path
      if inside is None:
        return jnp.float32(0)
      unread = jnp.where(inside, jnp.zeros((), weight.dtype), weight)
      return jnp.sum(jnp.square(unread.astype(jnp.float32)))

    squares = trees.map_leaves(hidden, params, forward_masks)
    return decay / 2 * sum(jax.tree.leaves(squares), jnp.float32(0))

  return make_method(plain._replace(penalty=penalty if decay else None))


def _every_step(name: str, where: leaves.Sites) -> rule.Rule:
  """The largest groups every step, the gradient to all."""
  def choose(leaf, now):
    return leaf.top(now.magnitudes), leaf.full()

  return rule.Rule(name, where, choose, gradient='B',
                   refreshes=updates.refresh_window(1, 0, None))


def _n_of_m(name, structure, is_sparse, batch_axes, contracting) -> rule.Rule:
  if not isinstance(structure, NM):
    raise ValueError(f'`structure` (={structure!r}) must be an NM.')
  structures.check_structure(structure)
  return _every_step(name, leaves.Sites(
      structure.sparsity, uniform, structure, is_sparse, batch_axes,
      contracting, 0.))
