"""From dense to sparse: masks that tighten while training goes on."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sparse_jax import checks
from sparse_jax.masks import schedules
from sparse_jax.masks import scores
from sparse_jax.masks import selection
from sparse_jax.masks import structures
from sparse_jax.masks import topk
from sparse_jax.masks.allocations import uniform
from sparse_jax.masks.structures import Unstructured
from sparse_jax.rules import budgets
from sparse_jax.rules import leaves as leaves_lib
from sparse_jax.rules import rule
from sparse_jax.rules import updates
from sparse_jax.rules.make_method import make_method
from sparse_jax.rules.state import SparseMethod


def gmp(sparsity: float, *, schedule: schedules.Schedule | None = None,
        score: Callable[..., jax.Array] = scores.magnitude,
        scope: str = 'layer', hidden: str = 'frozen', allocation=uniform,
        structure=Unstructured(), is_sparse: selection.IsSparse = None,
        batch_axes: selection.Axes = (),
        contracting: selection.Axes | None = None, update_every: int = 100,
        update_begin: int = 0, update_end: int | None = None) -> SparseMethod:
  """Gradual magnitude pruning: the mask tightens along a schedule.

  At a refresh at step t each leaf keeps its best entries at the sparsity s(t) *
  (leaf's target / sparsity). Pruned weights keep their value, hidden, and may
  come back while others shrink below them. Training costs the mean over t of 3
  f at sparsity s(t).

  Args:
    sparsity, allocation, structure, is_sparse, batch_axes, contracting: as in
      `static`; the sparsity is the final one.
    schedule: sparsity as a function of the step. None is the cubic one from
      `update_begin` to `update_end`, and without an `update_end` no rise at
      all: the final sparsity from the start.
    score: `score(weight, grad, key)`, the worth of each entry: a function of
      `scores`, or your own. One that is not by magnitude receives the dense
      gradient.
    scope: 'layer', each leaf keeps its own share; 'global', the entries of
      all leaves compete, and only a uniform allocation goes with it.
    hidden: 'frozen', pruned weights do not move; 'moving', they get no gradient
      but the optimizer steps them like the others, as in TensorFlow's code:
      momentum carries them on and decay shrinks them. With scores by magnitude
      alone.
    update_every: steps between refreshes, at least 1.
    update_begin, update_end: first and last step that may refresh;
      `update_end` itself always does.

  Raises:
    ValueError: naming the argument that is out of range, or a schedule with
      NM, which fixes the sparsity.

  Example:
    >>> method = gmp(0.9, update_begin=100, update_end=900)

  Reference:
    Zhu and Gupta, To prune, or not to prune, 2017,
    https://arxiv.org/abs/1710.01878. In tf.contrib.model_pruning the layer
    multiplies by mask * kernel, so that the gradient is masked and the kernel
    is not: `hidden='moving'`. (The later tensorflow_model_optimization writes
    zeros into the pruned weights at each step.) Dense layers: in
    RigL's pruning baseline the first one; in Gale et al., 2019, the first, and
    the last keeps a fifth (`uniform_plus`).
  """
  where = leaves_lib.Sites(sparsity, allocation, structure, is_sparse,
                           batch_axes, contracting).checked()
  window = updates.refresh_window(update_every, update_begin, update_end,
                                  also_at_end=True)
  schedule = _pruning_schedule(where, schedule, update_begin, update_end)
  checks.check_callable('score', score)
  budgets.check_scope(where, scope)
  by_magnitude = score is scores.magnitude
  if hidden not in ('frozen', 'moving'):
    raise ValueError(f'`hidden` (={hidden!r}) must be \'frozen\' or '
                     '\'moving\'.')
  if hidden == 'moving' and not by_magnitude:
    raise ValueError('`hidden` (=\'moving\') needs `score` by magnitude: any '
                     'other receives the gradient of all weights.')

  def sets(leaf, kept):
    return kept if hidden == 'frozen' else (kept, leaf.full())

  def count(keep_count, step, final):
    """What `keep_count` gives at the sparsity of the step."""
    if schedule is None:
      return keep_count(final)
    kept = keep_count(schedule(step) * (final / sparsity))
    if update_end is None:
      return kept
    return jnp.where(step >= update_end, keep_count(final), kept)

  def choose(leaf, now):
    kept = count(leaf.layout.keep_count, now.step, leaf.sparsity)
    return sets(leaf, leaf.top(now.score(score), kept))

  def choose_together(leaves, nows, seen):
    del seen
    groups = {path: now.score(score) for path, now in nows.items()}
    size = sum(each.size for each in groups.values())
    step = next(iter(nows.values())).step
    total = count(lambda s: topk.keep_count(size, s), step, sparsity)
    best = budgets.best(leaves, groups, budgets.global_counts(
        leaves, groups, total))
    return {path: sets(leaf, best[path]) for path, leaf in leaves.items()}, None

  return make_method(rule.Rule(
      'gmp', where, choose if scope == 'layer' else choose_together,
      refreshes=window, together=scope == 'global',
      gradient='A' if by_magnitude else 'all', only_at_refresh=True,
      progress=_progress(window, schedule, sparsity),
      unpackable='its masks tighten' if schedule is not None else
      f'its hidden weights {"move" if hidden == "moving" else "come back"}'))


def _progress(window, schedule, sparsity):
  """The share of the final sparsity that the masks have at each step."""
  if schedule is None:
    return None
  return updates.at_refreshes(window, lambda step: schedule(step) / sparsity)


def _pruning_schedule(sites, schedule, begin, end):
  """GMP's sparsity by the step, checked against the structure."""
  if schedule is not None:
    checks.check_callable('schedule', schedule)
  elif end is not None and end <= begin:
    raise ValueError(f'`update_end` (={end}) must be above `update_begin` '
                     f'(={begin}), or the sparsity cannot rise.')
  fixed = structures.fixed_sparsity(sites.structure) is not None
  if fixed and (schedule is not None or end is not None):
    raise ValueError('`schedule` and `update_end` must be None with '
                     f'`structure` ={sites.structure}, which fixes the '
                     'sparsity.')
  if schedule is not None or end is None or sites.sparsity == 0:
    return schedule if sites.sparsity else None
  return schedules.cubic_sparsity(sites.sparsity, begin=begin, end=end)
