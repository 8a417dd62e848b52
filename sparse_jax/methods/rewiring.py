"""Masks at constant sparsity: small weights drop, others grow."""

import jax.numpy as jnp

from sparse_jax.masks import allocations as allocation_lib
from sparse_jax.rules import assembly
from sparse_jax import checks
from sparse_jax.masks import selection
from sparse_jax.rules import sites as sites_lib
from sparse_jax.rules import state as state_lib
from sparse_jax.rules.assembly import SparseMethod
from sparse_jax.rules.assembly import UNIFORM
from sparse_jax.rules.assembly import UNSTRUCTURED


def set_(sparsity: float, *, drop_fraction: float = 0.3,
         drop_by: str = 'magnitude', skip_step: bool = False,
         allocation=UNIFORM, structure=UNSTRUCTURED,
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
    drop_by: 'magnitude', one ranking (RigL's code, whose ImageNet figures are
      the published ones); 'sign', the smallest positive and the negative
      closest to 0 drop apart, each by the fraction (the original paper).
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
    Mocanu et al., SET, 2018, https://arxiv.org/abs/1707.04780, algorithm 1.
    The original starts from an Erdos-Renyi graph (`allocation=erdos_renyi`),
    refreshes once an epoch and leaves the last layer dense. Its code drops
    the weight at the threshold too; here the count is rounded.
  """
  sites = sites_lib.Sites(sparsity, allocation, structure, is_sparse,
                          batch_axes, contracting).checked()
  window = assembly.refresh_window(update_every, update_begin, update_end)
  if drop_by not in ('magnitude', 'sign'):
    raise ValueError(f'`drop_by` (={drop_by!r}) must be \'magnitude\' or '
                     '\'sign\'.')
  drop = assembly.drop_schedule(drop_fraction, update_end)
  return _rewiring(sites, window, drop, skip_step, _random_growth,
                   assembly.read_forward, lambda d: (d, d, d), sites,
                   by_sign=drop_by == 'sign')


def rigl(sparsity: float, *, drop_fraction: float = 0.3,
         skip_step: bool = False, allocation=UNIFORM, structure=UNSTRUCTURED,
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
    >>> import sparse_jax
    >>> method = rigl(0.9, allocation=sparse_jax.erk, update_end=750)

  Reference:
    Evci et al., RigL, 2020, https://arxiv.org/abs/1911.11134, algorithm 1.
    Deviations: the number dropped is rounded, not truncated; no noise breaks
    ties; step 0 does not refresh; the slots of entries outside the mask are
    reset at once, not when they grow again (the optimizer never uses them).
  """
  sites = sites_lib.Sites(sparsity, allocation, structure, is_sparse,
                          batch_axes, contracting).checked()
  window = assembly.refresh_window(update_every, update_begin, update_end)
  drop = assembly.drop_schedule(drop_fraction, update_end)

  def share(d):
    return d, d, (update_every * d + 1) / (update_every + 1)

  return _rewiring(sites, window, drop, skip_step, _gradient_growth,
                   assembly.read_dense_gradient, share, 'all')


def itop(sparsity: float, *, growth: str = 'gradient',
         drop_fraction: float = 0.5, skip_step: bool = False,
         allocation=allocation_lib.erk, structure=UNSTRUCTURED,
         is_sparse: selection.IsSparse = None, batch_axes: selection.Axes = (),
         contracting: selection.Axes | None = None,
         update_every: int | None = None, update_begin: int = 0,
         update_end: int | None = None) -> SparseMethod:
  """In-time over-parameterisation: RigL or SET, rare and thorough refreshes.

  No rule of its own but a setting of `rigl` or `set_`: refreshes so far apart
  that what has grown can prove itself, half of the weights dropped at each,
  ERK. What counts is the share of entries that were ever active, R_s, which
  `summarize` reports as `ever_active`. Give the last step of the run as
  `update_end`, so that the drop fraction falls along the whole of it.

  Args:
    sparsity, drop_fraction, skip_step, allocation, structure, is_sparse,
      batch_axes, contracting, update_begin, update_end: as in `rigl`.
    growth: 'gradient' (RigL) or 'random' (SET).
    update_every: steps between refreshes. None is the paper's for a batch of
      128: 4000 by gradient, 1500 at random.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> method = itop(0.9, growth='random', update_end=100_000)

  Reference:
    Liu et al., Do we actually need dense over-parameterization?, 2021,
    https://arxiv.org/abs/2102.02887. Deviations: counts are exact (official
    masks are Bernoulli draws); the drop fraction falls to 0, not to 0.005.
  """
  if growth not in ('gradient', 'random'):
    raise ValueError(f'`growth` (={growth!r}) must be \'gradient\' or '
                     '\'random\'.')
  make, every = (rigl, 4000) if growth == 'gradient' else (set_, 1500)
  return make(sparsity, drop_fraction=drop_fraction, skip_step=skip_step,
              allocation=allocation, structure=structure, is_sparse=is_sparse,
              batch_axes=batch_axes, contracting=contracting,
              update_every=every if update_every is None else update_every,
              update_begin=update_begin, update_end=update_end)


def _rewiring(sites, window, drop, skip_step, growth, read, share, wider,
              by_sign=False) -> SparseMethod:
  """Drop by magnitude, grow by `growth(leaf, grad, key)`, zeros outside.

  `wider`: where a gradient goes, as in `assembly.constant_counts`.

  `by_sign`: groups whose weights sum to less than 0 are dropped apart.
  """
  checks.check_bool('skip_step', skip_step)

  def renew(seen, state):
    step = state.step + 1
    key = state_lib.step_key(state, step)

    def choose(leaf, weight, grad, marks):
      negative = leaf.layout.group(weight) < 0 if by_sign else None
      chosen = sites_lib.drop_and_grow(
          leaf, sites_lib.active_groups(leaf, marks), leaf.magnitudes(weight),
          growth(leaf, grad, key), drop(step), negative)
      return sites_lib.levels(leaf, chosen, chosen)

    return sites_lib.next_state(window(step), choose,
                                sites.leaves(seen.params), seen, state)

  def skips(state):
    return jnp.asarray(window(state.step + 1))

  return assembly.make_method(
      assembly.random_start(sites), renew=renew, read=read, zeros=True,
      skips=skips if skip_step else None,
      work=assembly.shared_work(sites, share),
      kept=assembly.constant_counts(sites, wider))


def _random_growth(leaf, grad, key):
  del grad
  return leaf.random_scores(key)


def _gradient_growth(leaf, grad, key):
  del key
  return leaf.magnitudes(grad)
