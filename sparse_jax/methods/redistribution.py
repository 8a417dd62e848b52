"""Masks at a constant total, whose budget moves from leaf to leaf."""

import jax
import jax.numpy as jnp

from sparse_jax.rules import assembly
from sparse_jax import checks
from sparse_jax import trees
from sparse_jax.rules import budgets as budget
from sparse_jax.masks import selection
from sparse_jax.rules import sites as sites_lib
from sparse_jax.rules import state as state_lib
from sparse_jax.masks import topk
from sparse_jax.rules.assembly import SparseMethod
from sparse_jax.rules.assembly import UNIFORM
from sparse_jax.rules.assembly import UNSTRUCTURED


def snfs(sparsity: float, *, drop_fraction: float = 0.5, momentum: float = 0.9,
         skip_step: bool = False, allocation=UNIFORM, structure=UNSTRUCTURED,
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

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> method = snfs(0.9, update_every=50)

  Reference:
    Dettmers and Zettlemoyer, Sparse networks from scratch, 2019,
    https://arxiv.org/abs/1907.04840. Deviations: the average is the method's
    own, so that any optimizer will do; the total is exact (the official
    rounding lets it drift); the drop fraction falls to 0 if `update_end` is
    given, there to 0.005; nearly dense leaves have no rule of their own.
  """
  sites = sites_lib.Sites(sparsity, allocation, structure, is_sparse,
                          batch_axes, contracting).checked()
  budget.check_movable(sites, 'structure', structure)
  checks.check_sparsity('momentum', momentum)
  drop = assembly.drop_schedule(drop_fraction, update_end)

  def averages(params):
    leaves = sites.leaves(params)
    return {path: jnp.zeros(leaf.layout.shape, jnp.float32)
            for path, leaf in leaves.items()}

  def remember(seen, state):
    grads = trees.leaves_by_path(seen.grads)
    return {path: momentum * old + (1 - momentum) * grads[path].astype(
        jnp.float32) for path, old in state.extra.items()}

  def choose(leaves, weights, active, state):
    step, kept, growth = state.step + 1, {}, {}
    for path, leaf in leaves.items():
      left = topk.keep_count(sites_lib.count(leaf, active[path]),
                             jnp.float32(drop(step)))
      kept[path] = leaf.layout.top(sites_lib.only(
          active[path], leaf.magnitudes(weights[path])), left)
      growth[path] = leaf.magnitudes(state.extra[path])
    claims = {path: _mean(leaf, growth[path], active[path])
              for path, leaf in leaves.items()}
    dropped = _total(_counts(leaves, active)) - _total(_counts(leaves, kept))
    return _grow(leaves, kept, kept, growth, dropped, claims), state.extra

  return _moving(sites, choose, (update_every, update_begin, update_end),
                 skip_step, extra=averages, remember=remember,
                 read=assembly.read_dense_gradient,
                 share=lambda d: (d, d, 1.))


def dsr(sparsity: float, *, drop_fraction: float = 0.1,
        threshold: float = 1e-3, skip_step: bool = False, allocation=UNIFORM,
        structure=UNSTRUCTURED, is_sparse: selection.IsSparse = None,
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
    https://arxiv.org/abs/1902.05967, algorithm 1. Deviations: shares are
    rounded to the nearest whole with an exact sum (there the remainder goes
    to a leaf at random); a leaf without enough empty places regrows some of
    what it just dropped; optimizer slots start fresh; the aim falls to 0
    along a cosine if `update_end` is given.
  """
  sites = sites_lib.Sites(sparsity, allocation, structure, is_sparse,
                          batch_axes, contracting).checked()
  budget.check_movable(sites, 'structure', structure)
  if checks.check_non_negative('threshold', threshold) == 0:
    raise ValueError(f'`threshold` (={threshold!r}) must be above 0.')
  aim = assembly.drop_schedule(drop_fraction, update_end)

  def choose(leaves, weights, active, state):
    key = state_lib.step_key(state, state.step + 1)
    kept, growth, claims = {}, {}, {}
    for path, leaf in leaves.items():
      worth = sites_lib.only(active[path], leaf.magnitudes(weights[path]))
      kept[path] = (worth >= state.extra) | leaf.layout.top(worth, 1)
      # What was just dropped comes last, where nothing else is left.
      growth[path] = leaf.random_scores(key) - active[path]
      claims[path] = sites_lib.count(leaf, kept[path]).astype(jnp.float32)
    total = _total(_counts(leaves, active))
    dropped = total - _total(_counts(leaves, kept))
    wanted = aim(state.step + 1) * total
    turned = jnp.where(dropped > 1.1 * wanted, state.extra / 2, jnp.where(
        dropped < .9 * wanted, state.extra * 2, state.extra))
    return _grow(leaves, kept, active, growth, dropped, claims), turned

  return _moving(sites, choose, (update_every, update_begin, update_end),
                 skip_step, extra=lambda params: jnp.full((), threshold,
                                                          jnp.float32),
                 read=assembly.read_forward, share=lambda d: (d, d, d))


def _grow(leaves, kept, taken, growth, total, claims):
  """{path: levels} after `total` groups are shared out and grown.

  `taken` are the groups that count as occupied as long as others are free.
  """
  empty = _counts(leaves, {path: ~taken[path] for path in leaves})
  free = _counts(leaves, {path: ~kept[path] for path in leaves})
  shares = budget.share_out(total, claims, empty)
  more = budget.share_out(total - _total(shares), claims, {
      path: free[path] - shares[path] for path in leaves})
  levels = {}
  for path, leaf in leaves.items():
    grown = leaf.layout.top(sites_lib.only(~kept[path], growth[path]),
                            shares[path] + more[path])
    levels[path] = sites_lib.levels(leaf, kept[path] | grown,
                                    kept[path] | grown)
  return levels


def _moving(sites, choose, window, skip_step, *, extra, read, share,
            remember=None) -> SparseMethod:
  """A method whose leaves refresh together, by `choose`."""
  checks.check_bool('skip_step', skip_step)
  due = assembly.refresh_window(*window)

  def renew(seen, state):
    if remember is not None:
      state = state._replace(extra=remember(seen, state))
    leaves = sites.leaves(seen.params)
    marks = trees.leaves_by_path(state.marks)

    def together(weights):
      active = {path: sites_lib.active_groups(leaf, marks[path])
                for path, leaf in leaves.items()}
      return choose(leaves, weights, active, state)

    return sites_lib.next_together(due(state.step + 1), together, seen, state)

  def skips(state):
    return jnp.asarray(due(state.step + 1))

  return assembly.make_method(
      assembly.random_start(sites), read=read, renew=renew, extra=extra,
      zeros=True, skips=skips if skip_step else None,
      work=assembly.shared_work(sites, share))


def _counts(leaves, groups):
  return {path: sites_lib.count(leaf, groups[path])
          for path, leaf in leaves.items()}


def _total(counts) -> jax.Array:
  return sum(jnp.sum(count, dtype=jnp.int32) for count in counts.values())


def _mean(leaf, groups: jax.Array, active: jax.Array) -> jax.Array:
  """float32: mean of the active groups of each competition."""
  total = jnp.sum(jnp.where(active, groups, 0), axis=leaf.layout.competing,
                  keepdims=True)
  return total / jnp.maximum(sites_lib.count(leaf, active), 1)
