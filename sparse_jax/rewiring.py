"""Masks at constant sparsity: small weights drop, others grow."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparse_jax import assembly
from sparse_jax import base
from sparse_jax import schedules
from sparse_jax import selection
from sparse_jax import sites as sites_lib
from sparse_jax import state as state_lib
from sparse_jax.assembly import SparseMethod
from sparse_jax.assembly import UNIFORM
from sparse_jax.assembly import UNSTRUCTURED


def set_(sparsity: float, *, drop_fraction: float = 0.3,
         skip_step: bool = False, allocation=UNIFORM, structure=UNSTRUCTURED,
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
  window = assembly.refresh_window(update_every, update_begin, update_end)
  return _rewiring(sites, window, _drop(drop_fraction, update_end), skip_step,
                   _random_growth, assembly.read_forward)


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
  return _rewiring(sites, window, _drop(drop_fraction, update_end), skip_step,
                   _gradient_growth, assembly.read_dense_gradient)


def _rewiring(sites, window, drop, skip_step, growth, read) -> SparseMethod:
  """Drop by magnitude, grow by `growth(leaf, grad, key)`, zeros outside."""
  base.check_bool('skip_step', skip_step)

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

  def skips(state):
    return jnp.asarray(window(state.step + 1))

  return assembly.make_method(
      assembly.random_start(sites), renew=renew, read=read, zeros=True,
      skips=skips if skip_step else None)


def _random_growth(leaf, grad, key):
  del grad
  return leaf.random_scores(key)


def _gradient_growth(leaf, grad, key):
  del key
  return leaf.magnitudes(grad)


def _drop(fraction: float, end: int | None) -> Callable[[jax.Array], Any]:
  """The drop fraction: constant, or annealed to `end` by a cosine."""
  base.check_fraction('drop_fraction', fraction)
  if end is None:
    return lambda step: fraction
  base.check_count('update_end', end, least=1)
  return schedules.cosine_drop(fraction, end=end)
