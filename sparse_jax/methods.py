"""Named methods, each a short composition of the parts in the other files."""

from collections.abc import Callable
import math
from typing import Any

import jax
import jax.numpy as jnp

from sparse_jax import allocation as allocation_lib
from sparse_jax import backward
from sparse_jax import base
from sparse_jax import losses
from sparse_jax import masking
from sparse_jax import schedules
from sparse_jax import scoring
from sparse_jax import selection
from sparse_jax import sites as sites_lib
from sparse_jax import state as state_lib
from sparse_jax import structures

SparseMethod = state_lib.SparseMethod
uniform = allocation_lib.uniform
UNSTRUCTURED = structures.Unstructured()


def dense() -> SparseMethod:
  """The identity, so that a dense baseline shares its loop with the others.

  Law: sparsify(optimizer, dense()) is the optimizer.

  Example:
    >>> method = dense()
    >>> params = {'kernel': jnp.ones((2, 2))}
    >>> method.read(params, method.init(params)) is params
    True
  """
  def start(params, key):
    del key
    return jax.tree.map(lambda _: None, params)

  return _method(start, read=lambda params, state: params)


def static(sparsity: float, *, allocation=uniform, structure=UNSTRUCTURED,
           is_sparse: selection.IsSparse = None,
           batch_axes: selection.Axes = (),
           contracting: selection.Axes | None = None) -> SparseMethod:
  """A random mask, fixed for ever; entries outside it are exactly 0.

  Training costs 3 f_S: forward, input and weight gradient at the sparsity.

  Args:
    sparsity: fraction of the entries (groups) that is zero, in [0, 1).
    allocation: how the sparsity is shared among the leaves: a function
      `(shapes, sparsity) -> {path: sparsity}`, or such a mapping.
    structure: what is kept or dropped together.
    is_sparse: which leaves are sparse; see `selection.select`.
    batch_axes: axes that stack layers: a tuple or a function of (path, leaf).
    contracting: axes that the product sums over, likewise; known for Dense,
      Conv and attention kernels.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> method = static(0.75)
    >>> params = {'kernel': jnp.ones((4, 4))}
    >>> float(method.read(params, method.init(params))['kernel'].sum())
    4.0

  Reference:
    Evci et al., RigL, 2020, https://arxiv.org/abs/1911.11134, the row
    "Static" (`scratch` in the official code).
  """
  sites = sites_lib.Sites(sparsity, allocation, structure, is_sparse,
                          batch_axes, contracting).checked()
  return _method(_random_start(sites), read=_read_forward, zeros=True)


def set_(sparsity: float, *, drop_fraction: float = 0.3,
         skip_step: bool = False, allocation=uniform, structure=UNSTRUCTURED,
         is_sparse: selection.IsSparse = None, batch_axes: selection.Axes = (),
         contracting: selection.Axes | None = None, update_every: int = 100,
         update_begin: int = 0, update_end: int | None = None) -> SparseMethod:
  """Sparse evolutionary training: drops small weights, grows random ones.

  At a refresh the `drop_fraction` of the active weights that is smallest in
  magnitude leaves, and as many of all that are not kept, drawn at random,
  enter at 0 with fresh optimizer slots. Entries outside the mask are exactly
  0. Training costs 3 f_S.

  Args:
    sparsity, allocation, structure, is_sparse, batch_axes, contracting: as in
      `static`.
    drop_fraction: share of the active entries dropped at a refresh, in
      [0, 1]; annealed to 0 by a cosine if `update_end` is given.
    skip_step: False, the optimizer steps first and then the mask moves; True,
      the refresh replaces the optimizer's step.
    update_every: steps between refreshes, at least 1.
    update_begin, update_end: first and last step that may refresh; None is
      no end.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> method = set_(0.9, update_every=50)

  Reference:
    Mocanu et al., SET, 2018, https://arxiv.org/abs/1707.04780, in the variant
    of RigL's official code (which the published ImageNet rows use): one
    ranking by magnitude, where the original ranks positive and negative
    weights apart.
  """
  sites = sites_lib.Sites(sparsity, allocation, structure, is_sparse,
                          batch_axes, contracting).checked()
  window = _window(update_every, update_begin, update_end)
  return _rewiring(sites, window, _drop(drop_fraction, update_end), skip_step,
                   _random_growth, _read_forward)


def rigl(sparsity: float, *, drop_fraction: float = 0.3,
         skip_step: bool = False, allocation=uniform, structure=UNSTRUCTURED,
         is_sparse: selection.IsSparse = None, batch_axes: selection.Axes = (),
         contracting: selection.Axes | None = None, update_every: int = 100,
         update_begin: int = 0, update_end: int | None = None) -> SparseMethod:
  """Drops small weights and grows where the dense gradient is largest.

  As `set_`, but what enters is chosen by |dL/dw| of the current batch over
  all entries that are not kept, the just dropped included (such a one keeps
  its value and slots). `read` lets the dense gradient through; it is masked
  before the optimizer sees it, so put a clipping by global norm inside
  `sparsify(...)`: outside it would see the dense norm. Training costs
  (3 f_S dT + 2 f_S + f_D) / (dT + 1) with dT = `update_every`.

  Args:
    sparsity, allocation, structure, is_sparse, batch_axes, contracting: as in
      `static`.
    drop_fraction, update_every, update_begin, update_end: as in `set_`.
    skip_step: True is the paper's rule (the refresh replaces the optimizer's
      step); False, the default, lets the optimizer step on every batch.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> method = rigl(0.9, allocation=allocation_lib.erk, update_end=750)

  Reference:
    Evci et al., RigL, 2020, https://arxiv.org/abs/1911.11134, algorithm 1.
    Deviations: the number dropped is rounded, not truncated; no noise breaks
    ties; step 0 does not refresh; the slots of entries outside the mask are
    reset at once, not when they grow again (the optimizer never uses them).
  """
  sites = sites_lib.Sites(sparsity, allocation, structure, is_sparse,
                          batch_axes, contracting).checked()
  window = _window(update_every, update_begin, update_end)
  return _rewiring(sites, window, _drop(drop_fraction, update_end), skip_step,
                   _gradient_growth, _read_dense_gradient)


def gmp(sparsity: float, *, schedule: schedules.Schedule | None = None,
        score: Callable[..., jax.Array] = scoring.magnitude,
        allocation=uniform, structure=UNSTRUCTURED,
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
  window = _window(update_every, update_begin, update_end, always_at_end=True)
  schedule = _pruning_schedule(sites, schedule, update_begin, update_end)

  def count(leaf, step):
    if schedule is None:
      return leaf.count
    kept = leaf.layout.keep_count(schedule(step) * (leaf.sparsity / sparsity))
    if update_end is None:
      return kept
    return jnp.where(step >= update_end, leaf.count, kept)

  def select(leaf, weight, grad, step, key):
    own = jax.random.fold_in(key, leaf.index)
    groups = leaf.layout.group(score(weight, grad, own))
    chosen = leaf.layout.top(groups, count(leaf, step))
    return sites_lib.levels(leaf, chosen, chosen)

  def start(params, key):
    return sites_lib.first_marks(params, sites.leaves(params), lambda leaf, w:
                                 select(leaf, w, w, jnp.int32(0), key))

  def renew(seen, state):
    step = state.step + 1
    key = state_lib.step_key(state, step)
    return sites_lib.next_marks(
        window(step), lambda leaf, w, g, m: select(leaf, w, g, step, key),
        sites.leaves(seen.params), seen, state.marks)

  by_magnitude = score is scoring.magnitude
  return _method(start, renew=renew,
                 read=_read_forward if by_magnitude else _read_dense_gradient)


def dnw(sparsity: float, *, allocation=uniform, structure=UNSTRUCTURED,
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
    Wortsman et al., 2019, https://arxiv.org/abs/1906.00586, algorithm 1.
  """
  return top_kast(sparsity, backward_sparsity=0., penalty_weight=0.,
                  update_every=1, allocation=allocation, structure=structure,
                  is_sparse=is_sparse, batch_axes=batch_axes,
                  contracting=contracting)


def top_kast(sparsity: float, *, backward_sparsity: float,
             penalty_weight: float = 1e-4,
             backward_selection: str = 'magnitude',
             stop_exploration_at: int | None = None,
             allocation=uniform, structure=UNSTRUCTURED,
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
  2 f(A) + f(B).

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
    algorithm 1. Left open there and settled here: entries that enter B start
    with fresh optimizer slots, so that nothing need be stored for C.
  """
  sites = sites_lib.Sites(sparsity, allocation, structure, is_sparse,
                          batch_axes, contracting).checked()
  _check_top_kast(sparsity, backward_sparsity, backward_selection,
                  stop_exploration_at)
  base.check_non_negative('penalty_weight', penalty_weight)
  wider = sites.at(backward_sparsity)
  window = _window(update_every, update_begin, update_end,
                   also_at=stop_exploration_at)

  def select(leaf, outer, weight, step, key):
    scores = leaf.magnitudes(weight)
    inside = leaf.layout.top(scores, leaf.count)
    if backward_selection == 'random':
      scores = leaf.random_scores(key)
    spare = jnp.where(inside, jnp.inf, _finite(scores))
    outside = leaf.layout.top(spare, max(outer.count, leaf.count))
    if stop_exploration_at is not None:
      outside &= inside | (step < stop_exploration_at)
    return sites_lib.levels(leaf, inside, outside)

  def start(params, key):
    leaves, outer = sites.leaves(params), wider.leaves(params)
    return sites_lib.first_marks(params, leaves, lambda leaf, w: select(
        leaf, outer[leaf.path], w, jnp.int32(0), key))

  def renew(seen, state):
    step = state.step + 1
    key = state_lib.step_key(state, step)
    leaves, outer = sites.leaves(seen.params), wider.leaves(seen.params)
    return sites_lib.next_marks(
        window(step), lambda leaf, w, g, m: select(
            leaf, outer[leaf.path], w, step, key), leaves, seen, state.marks)

  def penalty(params, state):
    densities = {path: 1 - leaf.sparsity
                 for path, leaf in sites.leaves(params).items()}
    return losses.exploration_loss(
        params, state.forward_masks, state.backward_masks,
        penalty_weight=penalty_weight, forward_density=densities)

  return _method(start, renew=renew, read=_read_both,
                 penalty=penalty if penalty_weight else None)


# The shared parts of the methods above.


def _method(start, *, read, renew=None, zeros=False, penalty=None,
            skips=None) -> SparseMethod:
  """Makes a method of its parts.

  Args:
    start: (params, typed key) -> marks.
    read: (params, SparseState) -> weights.
    renew: (sites.Step, SparseState) -> marks, or None for masks that stay.
    zeros: whether stored weights are 0 outside A, and where they enter it.
    penalty: (params, SparseState) -> float32[], or None for 0.
    skips: SparseState -> bool[], or None.
  """
  def init(params, key=None):
    data = state_lib.key_data(key)
    marks = start(params, jax.random.wrap_key_data(data))
    return state_lib.SparseState(jnp.zeros((), jnp.int32), data, marks)

  def read_weights(params, state):
    return read(params, state_lib.get_state(state))

  def total_penalty(params, state):
    if penalty is None:
      return jnp.float32(0)
    return penalty(params, state_lib.get_state(state))

  def settle(params, updates, grads, state):
    seen = sites_lib.Step(params, updates, grads)
    if not zeros:
      stepped = jax.tree.map(sites_lib.apply_update, params, updates)
      seen = sites_lib.Step(stepped, None, grads)
    marks = state.marks if renew is None else renew(seen, state)
    if zeros:
      updates = _zero_outside(updates, params, state.marks, marks)
    return updates, state._replace(step=state.step + 1, marks=marks)

  def refresh(params, grads, state):
    still = jax.tree.map(lambda p: jnp.full_like(p, -0.), params)
    updates, state = settle(params, still, grads, state_lib.get_state(state))
    return jax.tree.map(sites_lib.apply_update, params, updates), state

  return SparseMethod(lambda params: params, init, read_weights,
                      total_penalty, refresh, settle, skips)


def _read_forward(params, state):
  """A, the gradient on A."""
  def read(weight, marks):
    mask = masking.forward_mask(marks)
    return backward.masked_weight(weight, mask, mask)

  return masking.map_marked(read, params, state.marks)


def _read_both(params, state):
  """A, the gradient on B."""
  def read(weight, marks):
    return backward.masked_weight(weight, masking.forward_mask(marks),
                                  masking.backward_mask(marks))

  return masking.map_marked(read, params, state.marks)


def _read_dense_gradient(params, state):
  """A, the gradient everywhere."""
  def read(weight, marks):
    return backward.masked_weight(weight, masking.forward_mask(marks),
                                  jnp.ones((1,) * weight.ndim, bool))

  return masking.map_marked(read, params, state.marks)


def _random_start(sites):
  def start(params, key):
    def choose(leaf, weight):
      del weight
      chosen = leaf.layout.top(leaf.random_scores(key), leaf.count)
      return sites_lib.levels(leaf, chosen, chosen)

    return sites_lib.first_marks(params, sites.leaves(params), choose)

  return start


def _zero_outside(updates, params, old, new):
  """Leads to 0 outside the new mask, and where a weight has just entered."""
  def zero(update, weight, was, now):
    stays = masking.forward_mask(was) & masking.forward_mask(now)
    return jnp.where(stays, update, -weight.astype(update.dtype))

  def visit(path, update, weight, was, now):
    del path
    return zero(update, weight, was, now) if masking.is_marked(was) else update

  return base.map_leaves(visit, updates, params, old, new)


def _rewiring(sites, window, drop, skip_step, growth, read) -> SparseMethod:
  """Drop by magnitude, grow by `growth(leaf, grad, key)`, zeros outside."""
  def renew(seen, state):
    step = state.step + 1
    key = state_lib.step_key(state, step)

    def choose(leaf, weight, grad, marks):
      chosen = sites_lib.drop_and_grow(
          leaf, sites_lib.active_groups(leaf, marks), leaf.magnitudes(weight),
          growth(leaf, grad, key), drop(step))
      return sites_lib.levels(leaf, chosen, chosen)

    return sites_lib.next_marks(window(step), choose,
                                sites.leaves(seen.params), seen, state.marks)

  return _method(_random_start(sites), renew=renew, read=read, zeros=True,
                 skips=(lambda state: jnp.asarray(window(state.step + 1)))
                 if skip_step else None)


def _random_growth(leaf, grad, key):
  del grad
  return leaf.random_scores(key)


def _gradient_growth(leaf, grad, key):
  del key
  return leaf.magnitudes(grad)


def _finite(scores):
  """NaN and infinity below +inf, which is kept for the forward set."""
  return jnp.minimum(scores, jnp.finfo(scores.dtype).max)


def _drop(fraction: float, end: int | None) -> Callable[[jax.Array], Any]:
  """The drop fraction: constant, or annealed to `end` by a cosine."""
  base.check_fraction('drop_fraction', fraction)
  if end is None:
    return lambda step: fraction
  return schedules.cosine_drop(fraction, end=end)


def _window(every: int, begin: int, end: int | None, *,
            always_at_end: bool = False, also_at: int | None = None):
  """A function of the step: whether the masks refresh after that update."""
  base.check_count('update_every', every, least=1)
  base.check_count('update_begin', begin)
  if end is not None:
    base.check_count('update_end', end)
    if end < begin:
      raise ValueError(f'`update_end` (={end}) must not be below '
                       f'`update_begin` (={begin}).')
  if (every, begin, end) == (1, 0, None):
    return lambda step: True

  def window(step):
    due = (step % every == 0) & (step >= begin)
    due &= step <= (math.inf if end is None else end)
    if always_at_end and end is not None:
      due |= step == end
    if also_at is not None:
      due |= step == also_at
    return due

  return window


def _pruning_schedule(sites, schedule, begin, end):
  """GMP's sparsity by the step, checked against the structure."""
  fixed = isinstance(sites.structure, structures.NM)
  if fixed and (schedule is not None or end is not None):
    raise ValueError('`schedule` and `update_end` must be None with '
                     f'`structure` ={sites.structure}, which fixes the '
                     'sparsity.')
  if schedule is not None or end is None or sites.sparsity == 0:
    return schedule if sites.sparsity else None
  return schedules.cubic_sparsity(sites.sparsity, begin=begin, end=end)


def _check_top_kast(sparsity, backward_sparsity, backward_selection, stop):
  base.check_sparsity('backward_sparsity', backward_sparsity)
  if backward_sparsity > sparsity:
    raise ValueError(f'`backward_sparsity` (={backward_sparsity!r}) must not '
                     f'be above `sparsity` (={sparsity!r}): the backward set '
                     'contains the forward set.')
  if backward_selection not in ('magnitude', 'random'):
    raise ValueError(f'`backward_selection` (={backward_selection!r}) must be '
                     '\'magnitude\' or \'random\'.')
  if stop is not None:
    base.check_count('stop_exploration_at', stop)
