"""Dense and sparse phases in turn."""

from sparse_jax import checks
from sparse_jax.masks import selection
from sparse_jax.masks.allocations import uniform
from sparse_jax.masks.structures import Unstructured
from sparse_jax.rules import budgets
from sparse_jax.rules import leaves as leaves_lib
from sparse_jax.rules import rule
from sparse_jax.rules import updates
from sparse_jax.rules.make_method import make_method
from sparse_jax.rules.state import SparseMethod


def ac_dc(sparsity: float, *, scope: str = 'global', final_dense: int = 0,
          reset_slots: bool = True, allocation=uniform,
          structure=Unstructured(), is_sparse: selection.IsSparse = None,
          batch_axes: selection.Axes = (),
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
    All layers are sparse there, the first and the last too. Deviations: exactly
    the count is kept (the official code drops the entry at the threshold too);
    every leaf keeps its best entry.
  """
  where = leaves_lib.Sites(sparsity, allocation, structure, is_sparse,
                           batch_axes, contracting).checked()
  budgets.check_scope(where, scope)
  checks.check_bool('reset_slots', reset_slots)
  sparse_at = _phases(update_every, update_begin, update_end, final_dense)

  def choose(leaves, nows, seen):
    del seen
    groups = {path: now.magnitudes for path, now in nows.items()}
    counts = budgets.counts_by_scope(leaves, groups, scope, sparsity)
    step = next(iter(nows.values())).step
    kept = budgets.best(leaves, groups, counts)
    return {path: best | ~sparse_at(step) for path, best in kept.items()}, None

  def changes(step):
    return sparse_at(step) != sparse_at(step - 1)

  def resets(state):
    return sparse_at(state.step) & ~sparse_at(state.step + 1)

  return make_method(rule.Rule(
      'ac_dc', where, choose, first=rule.full_first, refreshes=changes,
      zeros=True, together=True, resets=resets if reset_slots else None,
      progress=sparse_at, unpackable='its phases are dense in turn'))


def _phases(every: int, begin: int, end: int | None, final_dense: int):
  """A function of the updates done: whether the network is then sparse."""
  updates.check_window(every, begin, end)
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
