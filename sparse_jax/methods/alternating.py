"""Dense and sparse phases in turn."""

import jax.numpy as jnp
import numpy as np

from sparse_jax.rules import assembly
from sparse_jax import checks
from sparse_jax.rules import budgets as budget
from sparse_jax.masks import selection
from sparse_jax.rules import sites as sites_lib
from sparse_jax.rules import state as state_lib
from sparse_jax.rules.assembly import SparseMethod
from sparse_jax.rules.assembly import UNIFORM
from sparse_jax.rules.assembly import UNSTRUCTURED


def ac_dc(sparsity: float, *, scope: str = 'global', final_dense: int = 0,
          reset_slots: bool = True, allocation=UNIFORM, structure=UNSTRUCTURED,
          is_sparse: selection.IsSparse = None, batch_axes: selection.Axes = (),
          contracting: selection.Axes | None = None, update_every: int = 100,
          update_begin: int = 0, update_end: int | None = None) -> SparseMethod:
  """Alternating compressed and decompressed training.

  Dense at first; at the first multiple of `update_every` from `update_begin`
  on (never at step 0) the largest weights are kept and all others become
  exactly 0; at the next multiple all train again, those from 0; and so on.
  From `update_end` on the network is sparse for good. Training costs
  3 f_D in dense phases and 3 f_S in sparse ones.

  Args:
    sparsity, allocation, structure, is_sparse, batch_axes, contracting: as in
      `static`; that of the sparse phases.
    scope: 'global', all weights compete (the paper), and only a uniform
      allocation goes with it; 'layer', each leaf keeps its own share.
    final_dense: length in steps of the last dense phase, before
      `update_end`: no sparse phase begins in it.
    reset_slots: whether all of the optimizer's slots start anew with each
      dense phase (the official code), not only those of pruned weights.
    update_every: length of a phase in steps.
    update_begin: no phase ends before this step.
    update_end: the step at which the last sparse phase begins, or None: the
      phases alternate for ever.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> epoch = 1000  # The paper's ImageNet run, of 100 epochs.
    >>> method = ac_dc(0.9, update_every=5 * epoch, update_begin=10 * epoch,
    ...                update_end=85 * epoch, final_dense=10 * epoch)

  Reference:
    Peste et al., AC/DC, 2021, https://arxiv.org/abs/2106.12379, algorithm 1.
    Deviations: exactly the count is kept (the official code drops the entry
    at the threshold too); every leaf keeps its best entry.
  """
  sites = sites_lib.Sites(sparsity, allocation, structure, is_sparse,
                          batch_axes, contracting).checked()
  budget.check_scope(sites, scope)
  checks.check_bool('reset_slots', reset_slots)
  sparse_at = _phases(update_every, update_begin, update_end, final_dense)

  def renew(seen, state):
    leaves, step = sites.leaves(seen.params), state.step + 1

    def choose(weights):
      groups = {path: leaf.magnitudes(weights[path])
                for path, leaf in leaves.items()}
      counts = assembly.counts_by_scope(leaves, groups, scope, sparsity)
      best = assembly.best_levels(leaves, groups, counts)
      return {path: jnp.where(sparse_at(step), levels, jnp.uint8(2))
              for path, levels in best.items()}, state.extra

    changes = sparse_at(step) != sparse_at(state.step)
    return sites_lib.next_together(changes, choose, seen, state)

  def resets(state):
    return sparse_at(state.step) & ~sparse_at(state.step + 1)

  def work(params, steps):
    share = float(np.mean(sparse_at(np.arange(steps))))
    mixed = {path: 1 - share * leaf.sparsity
             for path, leaf in sites.leaves(params).items()}
    return {path: state_lib.Work(d, d, d) for path, d in mixed.items()}

  return assembly.make_method(
      assembly.full_start(sites), read=assembly.read_forward, renew=renew,
      zeros=True, resets=resets if reset_slots else None, work=work)


def _phases(every: int, begin: int, end: int | None, final_dense: int):
  """A function of the updates done: whether the network is then sparse."""
  assembly.check_window(every, begin, end)
  checks.check_count('final_dense', final_dense)
  if final_dense and (end is None or final_dense > end):
    raise ValueError(f'`final_dense` (={final_dense}) must not be above '
                     f'`update_end` (={end}).')
  first = max(-(-begin // every), 1)

  def sparse_at(step):
    phase = step // every
    turn = (phase >= first) & ((phase - first) % 2 == 0)
    if end is None:
      return turn
    return (turn & (step < end - final_dense)) | (step >= end)

  return sparse_at
