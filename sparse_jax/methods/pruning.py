"""From dense to sparse: masks that tighten while training goes on."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.rules import assembly
from sparse_jax import checks
from sparse_jax import trees
from sparse_jax.rules import budgets as budget
from sparse_jax.masks import schedules
from sparse_jax.masks import scores as scoring
from sparse_jax.masks import selection
from sparse_jax.rules import sites as sites_lib
from sparse_jax.rules import state as state_lib
from sparse_jax.masks import structures
from sparse_jax.masks import topk
from sparse_jax.rules.assembly import SparseMethod
from sparse_jax.rules.assembly import UNIFORM
from sparse_jax.rules.assembly import UNSTRUCTURED


def gmp(sparsity: float, *, schedule: schedules.Schedule | None = None,
        score: Callable[..., jax.Array] = scoring.magnitude,
        scope: str = 'layer', allocation=UNIFORM, structure=UNSTRUCTURED,
        is_sparse: selection.IsSparse = None, batch_axes: selection.Axes = (),
        contracting: selection.Axes | None = None, update_every: int = 100,
        update_begin: int = 0, update_end: int | None = None) -> SparseMethod:
  """Gradual magnitude pruning: the mask tightens along a schedule.

  At a refresh at step t each leaf keeps its best entries at the sparsity
  s(t) * (leaf's target / sparsity). Pruned weights keep their value, hidden
  and unmoved, and may come back while others shrink below them. Training
  costs the mean over t of 3 f at sparsity s(t).

  Args:
    sparsity, allocation, structure, is_sparse, batch_axes, contracting: as in
      `static`; the sparsity is the final one.
    schedule: sparsity as a function of the step. None is the cubic one from
      `update_begin` to `update_end`, and without an `update_end` no rise at
      all: the final sparsity from the start.
    score: `score(weight, grad, key)`, the worth of each entry: a function of
      `scoring`, or your own. One that is not by magnitude receives the dense
      gradient.
    scope: 'layer', each leaf keeps its own share; 'global', the entries of
      all leaves compete, and only a uniform allocation goes with it.
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
    https://arxiv.org/abs/1710.01878. Hidden weights do not decay or coast on
    momentum here, as they do in TensorFlow's pruning code.
  """
  sites = sites_lib.Sites(sparsity, allocation, structure, is_sparse,
                          batch_axes, contracting).checked()
  window = assembly.refresh_window(update_every, update_begin, update_end,
                                   also_at_end=True)
  schedule = _pruning_schedule(sites, schedule, update_begin, update_end)
  checks.check_callable('score', score)
  budget.check_scope(sites, scope)

  def count(keep_count, step, final):
    """What `keep_count` gives at the sparsity of the step."""
    if schedule is None:
      return keep_count(final)
    kept = keep_count(schedule(step) * (final / sparsity))
    if update_end is None:
      return kept
    return jnp.where(step >= update_end, keep_count(final), kept)

  def scores(leaf, weight, grad, key):
    own = jax.random.fold_in(key, leaf.index)
    return leaf.layout.group(score(weight, grad, own))

  def select(leaf, weight, grad, step, key):
    kept = count(leaf.layout.keep_count, step, leaf.sparsity)
    chosen = leaf.layout.top(scores(leaf, weight, grad, key), kept)
    return sites_lib.levels(leaf, chosen, chosen)

  def select_together(leaves, weights, grads, step, key):
    groups = {path: scores(leaf, weights[path], grads[path], key)
              for path, leaf in leaves.items()}
    size = sum(each.size for each in groups.values())
    total = count(lambda s: topk.keep_count(size, s), step, sparsity)
    return assembly.best_levels(leaves, groups,
                                budget.global_counts(leaves, groups, total))

  def start(params, key):
    leaves, first = sites.leaves(params), jnp.int32(0)
    if scope == 'layer':
      return sites_lib.first_marks(params, leaves, lambda leaf, w: select(
          leaf, w, w, first, key))
    weights = trees.leaves_by_path(params)
    levels = select_together(leaves, weights, weights, first, key)
    return sites_lib.first_marks(params, leaves,
                                 lambda leaf, w: levels[leaf.path])

  def renew(seen, state):
    step = state.step + 1
    key, leaves = state_lib.step_key(state, step), sites.leaves(seen.params)
    if scope == 'layer':
      return sites_lib.next_state(
          window(step), lambda leaf, w, g, m: select(leaf, w, g, step, key),
          leaves, seen, state)
    grads = trees.leaves_by_path(seen.grads)
    return sites_lib.next_together(
        window(step), lambda weights: (select_together(
            leaves, weights, grads, step, key), state.extra), seen, state)

  def work(params, steps):
    return _mean_work(sites.leaves(params), steps, window, schedule, sparsity)

  by_magnitude = score is scoring.magnitude
  read = assembly.read_forward if by_magnitude else assembly.read_dense_gradient
  return assembly.make_method(start, renew=renew, read=read, work=work)


def _mean_work(leaves, steps, window, schedule, sparsity):
  """Each leaf's density, averaged over the steps of a run."""
  times = [0] + [t for t in range(1, steps) if window(t)]
  held = np.diff([*times, steps])
  risen = (np.ones(len(times)) if schedule is None else
           np.asarray(schedule(np.array(times))) / sparsity)
  mean = float(np.sum(risen * held) / max(steps, 1))
  dense = {path: 1 - leaf.sparsity * mean for path, leaf in leaves.items()}
  return {path: state_lib.Work(d, d, d) for path, d in dense.items()}


def _pruning_schedule(sites, schedule, begin, end):
  """GMP's sparsity by the step, checked against the structure."""
  if schedule is not None:
    checks.check_callable('schedule', schedule)
  elif end is not None and end <= begin:
    raise ValueError(f'`update_end` (={end}) must be above `update_begin` '
                     f'(={begin}), or the sparsity cannot rise.')
  fixed = isinstance(sites.structure, structures.NM)
  if fixed and (schedule is not None or end is not None):
    raise ValueError('`schedule` and `update_end` must be None with '
                     f'`structure` ={sites.structure}, which fixes the '
                     'sparsity.')
  if schedule is not None or end is None or sites.sparsity == 0:
    return schedule if sites.sparsity else None
  return schedules.cubic_sparsity(sites.sparsity, begin=begin, end=end)
