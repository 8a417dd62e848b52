"""Penalties that depend on the masks."""

import jax
import jax.numpy as jnp

from sparse_jax import checks

from sparse_jax import trees


def exploration_loss(params: trees.PyTree, forward_masks: trees.PyTree,
                     backward_masks: trees.PyTree, *,
                     penalty_weight: float = 1e-4,
                     forward_density: float | dict[trees.Path, float]
                     | None = None) -> jax.Array:
  """Top-KAST's penalty: L2 on A, L2 divided by the density of A on B \\ A.

  penalty_weight * sum of theta**2 / 2 * factor, with factor 1 on A, 1/D on
  B \\ A and 0 elsewhere. It shrinks the weights in use, so that others may
  overtake them, and those next in line harder, so that the border holds.

  Law: its gradient is penalty_weight * theta * factor, zero outside B.

  Args:
    params: tree of float arrays.
    forward_masks, backward_masks: trees of bool arrays, A and B; leaves that
      are never sparse are missing (None), and are not penalised.
    penalty_weight: the coefficient, at least 0. The paper gives none; 1e-4 is
      the weight decay it names for ImageNet.
    forward_density: D, a number for all leaves or a number for each path;
      None measures it on the masks.

  Returns:
    float32[], the loss.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> w = {'w': jnp.array([2., 1., 5.])}
    >>> a, b = {'w': jnp.array([1, 0, 0]) > 0}, {'w': jnp.array([1, 1, 0]) > 0}
    >>> exploration_loss(w, a, b, penalty_weight=1., forward_density=0.5)
    Array(3., dtype=float32)

  Reference:
    Jayakumar et al., Top-KAST, 2020, https://arxiv.org/abs/2106.03517,
    section 2.3. The formula prints absolute values, the text and appendix say
    L2; the text is followed. D is the forward density (sparseml uses the
    sparsity).
  """
  def density(path, forward):
    if forward_density is None:
      return jnp.mean(forward.astype(jnp.float32))
    if isinstance(forward_density, dict):
      return forward_density[path]
    return forward_density

  def loss(path, weight, forward, backward):
    if not hasattr(forward, 'dtype'):
      return jnp.float32(0)
    spare = jnp.float32(1 / density(path, forward))
    factor = jnp.where(forward, jnp.float32(1),
                       jnp.where(backward, spare, jnp.float32(0)))
    return jnp.sum(jnp.square(weight.astype(jnp.float32)) * factor) / 2

  checks.check_non_negative('penalty_weight', penalty_weight)
  check_density(forward_density)
  losses = trees.map_leaves(loss, params, forward_masks, backward_masks)
  return penalty_weight * sum(jax.tree.leaves(losses), jnp.float32(0))


def check_density(density) -> None:
  """Raises ValueError unless it is None, a mapping, or in (0, 1]."""
  if density is None or isinstance(density, dict):
    return
  if checks.check_fraction('forward_density', density) == 0:
    raise ValueError(f'`forward_density` (={density!r}) must be above 0.')
