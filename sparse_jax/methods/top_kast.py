"""Top-KAST: a forward set, a larger backward set, an exploration loss."""

from sparse_jax import checks
from sparse_jax.masks import selection
from sparse_jax.masks.allocations import uniform
from sparse_jax.masks.structures import Unstructured
from sparse_jax.rules import leaves
from sparse_jax.rules import losses
from sparse_jax.rules import rule
from sparse_jax.rules import updates
from sparse_jax.rules.make_method import make_method
from sparse_jax.rules.state import SparseMethod


def top_kast(sparsity: float, *, backward_sparsity: float,
             penalty_weight: float = 1e-4,
             backward_selection: str = 'magnitude',
             stop_exploration_at: int | None = None,
             allocation=uniform, structure=Unstructured(),
             is_sparse: selection.IsSparse = None,
             batch_axes: selection.Axes = (),
             contracting: selection.Axes | None = None,
             update_every: int = 100, update_begin: int = 0,
             update_end: int | None = None) -> SparseMethod:
  """Top-KAST: forward set A, larger backward set B, exploration loss.

  A are the entries of largest magnitude at the forward sparsity, B those at
  the backward sparsity, leaf by leaf. The forward pass and the gradient to
  activations use A; the gradient to weights goes to B; the rest, C, does not
  move at all. Weights of B outside A keep their value, hidden. Training costs
  2 f(A) + f(B), and 3 f(A) from `stop_exploration_at` on.

  Laws: backward_sparsity = 0 is `dnw` with the exploration loss;
  backward_sparsity = sparsity gives A = B; C is bit-identical through any
  optimizer.

  Args:
    sparsity, allocation, structure, is_sparse, batch_axes, contracting: as in
      `static`; the sparsity is the forward one.
    backward_sparsity: fraction outside B, in [0, sparsity]. The authors'
      advice is as small as the budget allows. The allocation shares it too (a
      mapping is scaled by the ratio of the two).
    penalty_weight: coefficient of the exploration loss, at least 0.
    backward_selection: 'magnitude' or 'random': how B outside A is chosen,
      anew at each refresh.
    stop_exploration_at: the step from which on B is A, or None for never.
    update_every, update_begin, update_end: when A and B are chosen anew; the
      paper uses every step and reports the same accuracy for 100.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> method = top_kast(0.9, backward_sparsity=0.8)

  Reference:
    Jayakumar et al., Top-KAST, 2020, https://arxiv.org/abs/2106.03517,
    algorithm 1. Dense layers there: on ImageNet the first and the last, say
    `is_sparse={'stem|head': False}` (appendix B has all sparse beside it), so
    that ResNet-50 at 80 and 90% has 73.5 and 82.7% in all; of the language
    models it is not said. Left open there and settled here: entries that enter
    B start with fresh optimizer slots, so that nothing need be stored for C.
  """
  where = leaves.Sites(sparsity, allocation, structure, is_sparse, batch_axes,
                       contracting, backward_sparsity)
  checks.check_backward(sparsity, backward_sparsity, backward_selection)
  if stop_exploration_at is not None:
    checks.check_count('stop_exploration_at', stop_exploration_at)
  checks.check_non_negative('penalty_weight', penalty_weight)

  def choose(leaf, now):
    inside = leaf.top(now.magnitudes)
    others = now.random if backward_selection == 'random' else now.magnitudes
    outside = inside | leaf.top(others, leaf.backward_count - leaf.count,
                                among=~inside)
    if stop_exploration_at is not None:
      outside &= inside | (now.step < stop_exploration_at)
    return inside, outside

  def penalty(params, forward_masks, backward_masks, plan):
    densities = {leaf.path: 1 - leaf.sparsity for leaf in plan.leaves}
    return losses.exploration_loss(
        params, forward_masks, backward_masks, penalty_weight=penalty_weight,
        forward_density=densities)

  made = make_method(rule.Rule(
      'top_kast', where, choose, gradient='B',
      refreshes=updates.refresh_window(update_every, update_begin, update_end,
                                       also_at=stop_exploration_at),
      penalty=penalty if penalty_weight else None))
  if stop_exploration_at is None:
    return made
  explores = stop_exploration_at  # Packed, B is stored to the end.

  def work(params, steps):
    share = min(explores / max(steps, 1), 1.)
    return {path: own._replace(weight_gradient=own.forward + share * (
        own.weight_gradient - own.forward))
            for path, own in made.work(params, steps).items()}

  return made._replace(work=work)
