"""MEST: mutations whose size falls in steps, without a dense gradient."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax import checks
from sparse_jax.masks import selection
from sparse_jax.masks.allocations import uniform
from sparse_jax.masks.structures import Unstructured
from sparse_jax.rules import leaves
from sparse_jax.rules import rule
from sparse_jax.rules import updates
from sparse_jax.rules.make_method import make_method
from sparse_jax.rules.state import SparseMethod


def mest(sparsity: float, *, variant: str = 'em',
         mutation: Sequence[float] = (.02, .01, 0.),
         mutation_ends: Sequence[int] | None = None,
         gradient_weight: float = 0., skip_step: bool = False,
         allocation=uniform, structure=Unstructured(),
         is_sparse: selection.IsSparse = None, batch_axes: selection.Axes = (),
         contracting: selection.Axes | None = None, update_every: int = 100,
         update_begin: int = 0, update_end: int | None = None) -> SparseMethod:
  """Memory-economic sparse training: random growth, in ever smaller steps.

  At a refresh each leaf prunes, and then grows at random among all that it
  did not keep, at 0 with fresh optimizer slots. With n entries, k =
  keep_count(n, sparsity) of them active at the end, and the mutation d = round(
  delta n): 'em' prunes to k - d and grows to k; 'ems' (EM&S, the soft memory
  bound) prunes to k and grows to k + d, so that what is new has time to prove
  itself. Kept are the largest |w| + gradient_weight |dL/dw| of the active
  entries, so no gradient of others is ever needed. Training costs 3 f_S.

  Law: after a refresh exactly k entries are active by 'em', min(k + d, n) by
  'ems'; from the last of `mutation_ends` on, with a last mutation of 0, the
  masks stand still at exactly k.

  Args:
    sparsity, allocation, structure, is_sparse, batch_axes, contracting: as in
      `static`.
    variant: 'em' or 'ems'.
    mutation: values of delta, in turn, each in [0, 1]: shares of all entries.
      By 'em', less than 1 - sparsity, or all of the active ones would go: at
      98% and above the default is an error.
    mutation_ends: from which steps on the next value holds, one less than
      there are values. None: even parts of `update_end`, or without one the
      first value for ever.
    gradient_weight: lambda of the score, at least 0.
    skip_step: as in `set_`.
    update_every: steps between refreshes, at least 1; the paper's code has 5
      epochs.
    update_begin, update_end: first and last step that may refresh;
      `update_end` itself always does.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> method = mest(0.75, variant='ems', mutation=(.25, 0.), update_every=1,
    ...               update_end=2)
    >>> params = {'w': jnp.ones((4, 4))}
    >>> state = method.init(params)
    >>> for _ in range(2):
    ...   print(int(state.forward_masks['w'].sum()))
    ...   params, state = method.refresh(params, params, state)
    8
    8
    >>> int(state.forward_masks['w'].sum())
    4

  Reference:
    Yuan et al., MEST, 2021, https://arxiv.org/abs/2110.14032, after the
    authors' code, https://github.com/boone891214/MEST: its mutations 2, 1, 0%
    at 90% sparsity (1, 0.5, 0% at 95%) change at 9/16 and 12/16 of a run. For
    'ems' its text has the same, but its scripts 5, 2.5, 0% at both. Its lambda
    (`--sp-lmd`) is 0 by default and none of its scripts sets it, so they score
    by magnitude alone, as here; that of the paper's own experiments is not
    said. Deviations: counts are exact, only active entries are kept, and all
    leaves may have an allocation.
  """
  where = leaves.Sites(sparsity, allocation, structure, is_sparse, batch_axes,
                       contracting)
  window = updates.refresh_window(update_every, update_begin, update_end,
                                  also_at_end=True)
  checks.check_bool('skip_step', skip_step)
  checks.check_non_negative('gradient_weight', gradient_weight)
  if variant not in ('em', 'ems'):
    raise ValueError(f'`variant` (={variant!r}) must be \'em\' or \'ems\'.')
  values, ends = _mutations(mutation, mutation_ends, update_end)
  soft = variant == 'ems'
  checks.check_sparsity('sparsity', sparsity)
  if not soft and max(values) >= (1 - sparsity) * (1 - 1e-9):
    raise ValueError(f'`mutation` (={values!r}) by \'em\' must be below the '
                     f'share that is kept, 1 - sparsity = {1 - sparsity:.4g}.')

  def number(leaf, step):
    """int32[]: the groups of a competition that a mutation concerns."""
    counts = jnp.asarray([round(value * leaf.layout.rivals)
                          for value in values], jnp.int32)
    return counts[_turn(step, ends)]

  def active(leaf, step):
    if not soft:
      return leaf.count
    return jnp.minimum(leaf.count + number(leaf, step), leaf.layout.rivals)

  def choose(leaf, now):
    stay = leaf.count
    if not soft:
      stay = jnp.maximum(stay - number(leaf, now.step), 1)
    score = now.magnitudes
    if gradient_weight:
      score = score + gradient_weight * now.gradient_magnitudes
    kept = leaf.top(score, stay, among=now.active)
    return kept | leaf.top(now.random, active(leaf, now.step) - stay,
                           among=~kept)

  def first(leaf, now):
    return leaf.top(now.random, active(leaf, now.step))

  def progress(steps):
    """Shares of the final sparsity: what is new is more than that."""
    delta = np.asarray(values)[_turn(np.asarray(steps), ends)]
    return 1 - np.minimum(delta, sparsity) / max(sparsity, 1e-9)

  return make_method(rule.Rule(
      'mest', where, choose, first=first, refreshes=window, zeros=True,
      skip_step=skip_step,
      progress=updates.at_refreshes(window, progress) if soft else None,
      unpackable='its counts change' if soft else ''))


def _turn(step, ends):
  """Which of the values holds at a step, or at an array of steps."""
  if isinstance(step, jax.Array):
    return jnp.searchsorted(jnp.asarray(ends, jnp.int32), step, side='right')
  return np.searchsorted(np.asarray(ends, int), step, side='right')


def _mutations(values, ends, update_end):
  """The values and the steps at which the next one holds, checked."""
  if isinstance(values, str) or not isinstance(values, Sequence) or not values:
    raise ValueError(f'`mutation` (={values!r}) must be numbers in [0, 1].')
  for value in values:
    checks.check_fraction('mutation', value)
  if ends is None:
    parts = len(values) - 1
    if update_end is None:
      return tuple(values[:1]), ()
    return tuple(values), tuple(
        round(update_end * (i + 1) / parts) for i in range(parts))
  fits = isinstance(ends, Sequence) and len(ends) == len(values) - 1
  if not fits or list(ends) != sorted(ends):
    raise ValueError(f'`mutation_ends` (={ends!r}) must be {len(values) - 1} '
                     'rising steps, one less than there are values of '
                     f'`mutation` (={values!r}).')
  for end in ends:
    checks.check_count('mutation_ends', end)
  return tuple(values), tuple(ends)
