"""Masks at a constant total, whose budget moves from leaf to leaf."""

import jax
import jax.numpy as jnp

from sparse_jax import checks
from sparse_jax import trees
from sparse_jax.masks import schedules
from sparse_jax.masks import selection
from sparse_jax.masks import topk
from sparse_jax.masks.allocations import uniform
from sparse_jax.masks.structures import Unstructured
from sparse_jax.rules import budgets
from sparse_jax.rules import leaves as leaves_lib
from sparse_jax.rules import rule
from sparse_jax.rules import updates
from sparse_jax.rules.make_method import make_method
from sparse_jax.rules.state import SparseMethod
from sparse_jax.rules.storage import zeros_like_leaves


def snfs(sparsity: float, *, drop_fraction: float | schedules.Schedule = 0.5,
         momentum: float = 0.9, redistribution: str = 'momentum',
         skip_step: bool = False, allocation=uniform, structure=Unstructured(),
         is_sparse: selection.IsSparse = None, batch_axes: selection.Axes = (),
         contracting: selection.Axes | None = None, update_every: int = 100,
         update_begin: int = 0, update_end: int | None = None) -> SparseMethod:
  """Sparse momentum: what is dropped grows where the momentum is large.

  The method averages the dense gradient: m <- momentum * m + (1 - momentum)
  * g. At a refresh each leaf drops the `drop_fraction` of its active weights
  that is smallest in magnitude; all that was dropped is shared out among the
  leaves in proportion to the mean |m| of their active weights; each leaf
  grows its share where |m| is largest among what it has not kept, at 0 with
  fresh optimizer slots. Training costs 2 f_S + f_D.

  Law: the active entries of all leaves together stay as many as at first.

  Args:
    sparsity, allocation, structure, is_sparse, batch_axes, contracting: as in
      `static`; the allocation is that of the start.
    drop_fraction, skip_step, update_every, update_begin, update_end: as in
      `rigl`.
    momentum: coefficient of the average, in [0, 1); 0 is the last gradient.
    redistribution: in proportion to what of its active weights a leaf gets its
      share of all that was dropped: the mean |m| ('momentum'), the mean |w|
      ('magnitude') or their number ('nonzeros'); 'none': each leaf grows what
      it dropped.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> method = snfs(0.9, update_every=50)

  Reference:
    Dettmers and Zettlemoyer, Sparse networks from scratch, 2019,
    https://arxiv.org/abs/1907.04840. No layer is dense there. Deviations: the
    average is the method's own, so that any optimizer will do; the total is
    exact (the official rounding lets it drift); the drop fraction falls to 0 if
    `update_end` is given, there to 0.005; nearly dense leaves have no rule of
    their own.
  """
  where = leaves_lib.Sites(sparsity, allocation, structure, is_sparse,
                           batch_axes, contracting).checked()
  budgets.check_movable(where, 'structure', structure)
  checks.check_sparsity('momentum', momentum)
  drop = updates.drop_schedule(drop_fraction, update_end)
  if redistribution not in ('momentum', 'magnitude', 'nonzeros', 'none'):
    raise ValueError(f'`redistribution` (={redistribution!r}) must be '
                     '\'momentum\', \'magnitude\', \'nonzeros\' or \'none\'.')

  def remember(seen, averages):
    grads = trees.leaves_by_path(seen.grads)
    return {path: momentum * old + (1 - momentum) * grads[path].astype(
        jnp.float32) for path, old in averages.items()}

  def choose(leaves, nows, seen):
    del seen
    kept, growth, claims = {}, {}, {}
    for path, leaf in leaves.items():
      now = nows[path]
      left = topk.keep_count(leaf.sum(now.active),
                             jnp.float32(drop(now.step)))
      kept[path] = leaf.top(now.magnitudes, left, among=now.active)
      growth[path] = leaf.layout.group(jnp.abs(now.extra))
      claims[path] = {
          'momentum': lambda: _mean(leaf, growth[path], now.active),
          'magnitude': lambda: _mean(leaf, now.magnitudes, now.active),
          'nonzeros': lambda: leaf.sum(now.active).astype(jnp.float32),
          'none': lambda: None}[redistribution]()
    if redistribution == 'none':
      return {path: kept[path] | leaf.top(
          growth[path], leaf.sum(nows[path].active) - leaf.sum(kept[path]),
          among=~kept[path]) for path, leaf in leaves.items()}, None
    active = {path: now.active for path, now in nows.items()}
    dropped = _total(leaves, active) - _total(leaves, kept)
    return _grow(leaves, kept, kept, growth, dropped, claims), None

  return _moving('snfs', where, choose, (update_every, update_begin,
                                         update_end), skip_step,
                 extra=zeros_like_leaves, remember=remember, gradient='all')


def dsr(sparsity: float, *, drop_fraction: float | schedules.Schedule = 0.1,
        threshold: float = 1e-3, skip_step: bool = False, allocation=uniform,
        structure=Unstructured(), is_sparse: selection.IsSparse = None,
        batch_axes: selection.Axes = (),
        contracting: selection.Axes | None = None, update_every: int = 100,
        update_begin: int = 0, update_end: int | None = None) -> SparseMethod:
  """Dynamic sparse reparametrisation: one adaptive threshold for all leaves.

  At a refresh every active weight below the threshold drops (each leaf keeps
  at least one); as many grow at random, shared out in proportion to what
  survived in each leaf, at 0 with fresh optimizer slots. If more than 1.1
  times the aim dropped the threshold is halved for the next refresh, if less
  than 0.9 times, doubled. Training costs 3 f_S, at the densities of the run.

  Law: the active entries of all leaves together stay as many as at first.

  Args:
    sparsity, allocation, structure, is_sparse, batch_axes, contracting: as in
      `static`; the allocation is that of the start.
    drop_fraction: the aim, as a share of all active weights, in [0, 1]. The
      paper's own are 0.08 (ResNet-50) and 0.14 (WRN-28-2).
    threshold: the first threshold on |w| (on a group's score), above 0.
    skip_step, update_every, update_begin, update_end: as in `rigl`.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> method = dsr(0.9, update_every=50)

  Reference:
    Mostafa and Wang, Parameter efficient training, 2019,
    https://arxiv.org/abs/1902.05967, algorithm 1. Dense layers there: in
    ResNet-50 the first and the projections of the shortcuts, in WRN-28-2 the
    classifier too. Deviations: shares are
    rounded to the nearest whole with an exact sum (there the remainder goes
    to a leaf at random); a leaf without enough empty places regrows some of
    what it just dropped; optimizer slots start fresh; the aim falls to 0
    along a cosine if `update_end` is given.
  """
  where = leaves_lib.Sites(sparsity, allocation, structure, is_sparse,
                           batch_axes, contracting).checked()
  budgets.check_movable(where, 'structure', structure)
  if checks.check_non_negative('threshold', threshold) == 0:
    raise ValueError(f'`threshold` (={threshold!r}) must be above 0.')
  aim = updates.drop_schedule(drop_fraction, update_end)

  def choose(leaves, nows, seen):
    del seen
    kept, growth, claims = {}, {}, {}
    for path, leaf in leaves.items():
      now = nows[path]
      small = jnp.where(now.active, now.magnitudes, jnp.nan)
      kept[path] = ((small.astype(jnp.float32) >= now.extra)
                    | leaf.top(now.magnitudes, 1, among=now.active))
      # What was just dropped comes last, where nothing else is left.
      growth[path] = now.random - now.active.astype(jnp.float32)
      claims[path] = leaf.sum(kept[path]).astype(jnp.float32)
    old, step = now.extra, now.step
    active = {path: now.active for path, now in nows.items()}
    total = _total(leaves, active)
    dropped = total - _total(leaves, kept)
    wanted = jnp.float32(aim(step)) * total.astype(jnp.float32)
    off = dropped.astype(jnp.float32)
    turned = jnp.where(off > 1.1 * wanted, old / 2, jnp.where(
        off < .9 * wanted, old * 2, old))
    return _grow(leaves, kept, active, growth, dropped, claims), turned

  return _moving('dsr', where, choose, (update_every, update_begin,
                                        update_end), skip_step,
                 extra=lambda leaves: jnp.full((), threshold, jnp.float32))


def _grow(leaves, kept, taken, growth, total, claims):
  """{path: bool} after `total` groups are shared out and grown.

  `taken` are the groups that count as occupied as long as others are free.
  """
  empty = {path: leaf.sum(~taken[path]) for path, leaf in leaves.items()}
  free = {path: leaf.sum(~kept[path]) for path, leaf in leaves.items()}
  shares = budgets.share_out(total, claims, empty)
  more = budgets.share_out(total - _sum(shares), claims, {
      path: free[path] - shares[path] for path in leaves})
  return {path: kept[path] | leaf.top(
      growth[path], shares[path] + more[path], among=~kept[path])
          for path, leaf in leaves.items()}


def _moving(name, where, choose, window, skip_step, *, extra, remember=None,
            gradient='A') -> SparseMethod:
  """A method whose leaves refresh together, by `choose`."""
  checks.check_bool('skip_step', skip_step)
  return make_method(rule.Rule(
      name, where, choose, first=rule.random_first,
      refreshes=updates.refresh_window(*window), gradient=gradient, zeros=True,
      skip_step=skip_step, together=True, extra=extra, remember=remember,
      unpackable='its leaves exchange their shares'))


def _total(leaves, groups) -> jax.Array:
  return _sum({path: leaf.sum(groups[path]) for path, leaf in leaves.items()})


def _sum(counts) -> jax.Array:
  return sum((jnp.sum(count, dtype=jnp.int32) for count in counts.values()),
             jnp.int32(0))


def _mean(leaf, groups: jax.Array, active: jax.Array) -> jax.Array:
  """float32: mean of the active groups of each competition."""
  total = jnp.sum(jnp.where(active, groups, 0), axis=leaf.layout.competing,
                  keepdims=True)
  return total / jnp.maximum(leaf.sum(active), 1).astype(total.dtype)
