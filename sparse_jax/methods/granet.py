"""GraNet: gradual pruning of all leaves together, with regrowth in each."""

import jax.numpy as jnp
import numpy as np

from sparse_jax import checks
from sparse_jax.masks import allocations
from sparse_jax.masks import schedules
from sparse_jax.masks import selection
from sparse_jax.masks import topk
from sparse_jax.masks.structures import Unstructured
from sparse_jax.rules import budgets
from sparse_jax.rules import leaves as leaves_lib
from sparse_jax.rules import rule
from sparse_jax.rules import updates
from sparse_jax.rules.make_method import make_method
from sparse_jax.rules.state import SparseMethod


def granet(sparsity: float, *, prune_end: int, initial_sparsity: float = 0.5,
           drop_fraction: float = 0.5, skip_step: bool = False,
           allocation=allocations.erk, structure=Unstructured(),
           is_sparse: selection.IsSparse = None,
           batch_axes: selection.Axes = (),
           contracting: selection.Axes | None = None, update_every: int = 100,
           update_begin: int = 0, update_end: int | None = None
           ) -> SparseMethod:
  """Gradual pruning with neuroregeneration.

  Masks are random at first, at `initial_sparsity`. At a refresh at step t,

  1. the active weights of all leaves compete by |w|, and a share s(t) of all
     entries is zero: s(t) = s - (s - s_0) (1 - (t - t_0) / (T - t_0))^3, from
     s_0 at t_0 = `update_begin` to s at T = `prune_end`;
  2. each leaf drops the `drop_fraction` of what it has left that is smallest
     in magnitude, and grows as many where |dL/dw| is largest among all that it
     did not keep, at 0 with fresh optimizer slots (what both loses and enters
     at one refresh keeps its value and slots).

  Training costs as `rigl` does, at the sparsity of the step.

  Laws: the active entries of all leaves together are keep_count(all, s(t)),
  never more than before, and no leaf is left without one; with
  `initial_sparsity` = `sparsity` the budget of no leaf moves at all.

  Args:
    sparsity, structure, is_sparse, batch_axes, contracting: as in `static`;
      the sparsity is the final one.
    prune_end: the step from which on the sparsity is final, above
      `update_begin`; it always refreshes.
    initial_sparsity: in [0, sparsity]; 0 is dense-to-sparse training.
    drop_fraction: share of the active entries replaced at a refresh, in
      [0, 1]; annealed to 0 by a cosine if `update_end` is given.
    skip_step: as in `rigl`.
    allocation: as in `static`, of the first masks.
    update_every: steps between refreshes, at least 1.
    update_begin, update_end: first and last step that may refresh; the end of
      the run is the paper's `update_end`.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> method = granet(0.75, prune_end=2, update_every=1)
    >>> params = {'w': jnp.arange(16.).reshape(4, 4)}
    >>> state = method.init(params)
    >>> for _ in range(2):
    ...   print(int(state.forward_masks['w'].sum()))
    ...   params, state = method.refresh(params, params, state)
    8
    4
    >>> int(state.forward_masks['w'].sum())
    4

  Reference:
    Liu et al., GraNet, 2021, https://arxiv.org/abs/2106.10404, after the
    authors' code, https://github.com/VITA-Group/GraNet: ERK at the start,
    pruning for 30 of 100 epochs of ImageNet, and regeneration to the end.
    Deviations: counts are exact and rounded (there truncated, or what exceeds
    a threshold); `prune_end` itself prunes (there the last time is one refresh
    before it); each leaf keeps its best entry; the drop fraction falls to 0,
    not to 0.005; what is pruned and grown at one refresh is not set to 0.
  """
  where = leaves_lib.Sites(sparsity, allocation, structure, is_sparse,
                           batch_axes, contracting, initial_sparsity).checked()
  budgets.check_movable(where, 'structure', structure)
  checks.check_sparsity('initial_sparsity', initial_sparsity)
  if initial_sparsity > sparsity:
    raise ValueError(f'`initial_sparsity` (={initial_sparsity!r}) must not be '
                     f'above `sparsity` (={sparsity!r}).')
  checks.check_bool('skip_step', skip_step)
  plain = updates.refresh_window(update_every, update_begin, update_end,
                                 also_at=prune_end)
  checks.check_count('prune_end', prune_end, least=update_begin + 1)
  schedule = schedules.cubic_sparsity(sparsity, begin=update_begin,
                                      end=prune_end, initial=initial_sparsity)
  drop = updates.drop_schedule(drop_fraction, update_end)

  def first(leaf, now):
    return leaf.top(now.random, leaf.backward_count)

  def choose(leaves, nows, seen):
    del seen
    step = next(iter(nows.values())).step
    size = sum(now.active.size for now in nows.values())
    number = sum(jnp.sum(leaf.sum(nows[path].active), dtype=jnp.int32)
                 for path, leaf in leaves.items())
    total = jnp.minimum(topk.keep_count(size, schedule(step)), number)
    total = jnp.where(step < prune_end, total, jnp.minimum(
        topk.keep_count(size, sparsity), number))
    counts = budgets.global_counts(leaves, {
        path: jnp.where(now.active, now.magnitudes, -1.)
        for path, now in nows.items()}, total)
    return {path: _regrown(leaf, nows[path], counts[path], drop(step))
            for path, leaf in leaves.items()}, None

  def progress(step):
    """Of the final sparsity."""
    risen = np.asarray(schedule(step))
    return risen / sparsity if sparsity else np.ones_like(risen)

  return make_method(rule.Rule(
      'granet', where, choose, first=first, refreshes=plain, gradient='all',
      only_at_refresh=True, zeros=True, skip_step=skip_step, together=True,
      progress=updates.at_refreshes(plain, progress),
      unpackable='its masks tighten'))


def _regrown(leaf, now, count, fraction):
  """bool: `count` of the active groups, of which a fraction is grown anew."""
  stay = topk.keep_count(count, jnp.float32(fraction))
  kept = leaf.top(now.magnitudes, stay, among=now.active)
  return kept | leaf.top(now.gradient_magnitudes, count - stay, among=~kept)
