"""Masks at constant sparsity: small weights drop, others grow."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from sparse_jax import checks
from sparse_jax.masks import allocations
from sparse_jax.masks import schedules
from sparse_jax.masks import selection
from sparse_jax.masks.allocations import uniform
from sparse_jax.masks.structures import Unstructured
from sparse_jax.rules import leaves
from sparse_jax.rules import rule
from sparse_jax.rules import updates
from sparse_jax.rules.make_method import make_method
from sparse_jax.rules.state import SparseMethod


def set_(sparsity: float, *, drop_fraction: float | schedules.Schedule = 0.3,
         drop_by: str = 'magnitude', grow_init: str = 'zeros',
         skip_step: bool = False, allocation=uniform, structure=Unstructured(),
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
      [0, 1]; annealed to 0 by a cosine if `update_end` is given. Or a schedule,
      taken as it is: `schedules.drop_with` follows a learning rate.
    drop_by: 'magnitude', one ranking (RigL's code, whose ImageNet figures are
      the published ones); 'sign', the smallest positive and the negative
      closest to 0 drop apart, each by the fraction (the original paper).
    grow_init: the value at which an entry enters, as in `rigl`.
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
    the weight at the threshold too; here the count is rounded. The published
    ImageNet figures are those of RigL's paper, with the dense layers of `rigl`.
  """
  where = leaves.Sites(sparsity, allocation, structure, is_sparse, batch_axes,
                       contracting)
  window = updates.refresh_window(update_every, update_begin, update_end)
  drop = updates.drop_schedule(drop_fraction, update_end)
  growing = _growing(grow_init)
  checks.check_bool('skip_step', skip_step)
  if drop_by not in ('magnitude', 'sign'):
    raise ValueError(f'`drop_by` (={drop_by!r}) must be \'magnitude\' or '
                     '\'sign\'.')

  def choose(leaf, now):
    negative = now.sums < 0 if drop_by == 'sign' else None
    return leaves.drop_and_grow(leaf, now.active, now.magnitudes, now.random,
                                drop(now.step), negative)

  return make_method(rule.Rule(
      'set_', where, choose, first=rule.random_first, refreshes=window,
      zeros=True, skip_step=skip_step, **growing))


def rigl(sparsity: float, *, drop_fraction: float | schedules.Schedule = 0.3,
         grow_init: str = 'zeros', skip_step: bool = False,
         allocation=uniform, structure=Unstructured(),
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
    grow_init: the value at which an entry enters: 'zeros'; 'random_normal',
      with the standard deviation of the leaf's active weights;
      'random_uniform', between minus and plus their mean magnitude;
      'initial_value', what the entry was at the start; 'initial_dist', what
      another one drawn at random was (these two keep a copy of the weights).
      Only zeros can be packed.
    skip_step: True is the paper's rule (the refresh replaces the optimizer's
      step); False, the default, lets the optimizer step on every batch.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> import sparse_jax
    >>> method = rigl(0.9, allocation=sparse_jax.erk, update_end=750)

  Reference:
    Evci et al., RigL, 2020, https://arxiv.org/abs/1911.11134, algorithm 1.
    Dense layers there: with a uniform allocation the first layer alone, say
    `is_sparse={'stem': False}` (the classifier is sparse); with ERK none, but
    at 99% the first; of MobileNet the first and the depthwise ones.
    Deviations: the number dropped is rounded, not truncated; no noise breaks
    ties; the spread of `grow_init` is that of active weights alone; step 0
    does not refresh; the slots of entries outside the mask are
    reset at once, not when they grow again (the optimizer never uses them).
  """
  where = leaves.Sites(sparsity, allocation, structure, is_sparse, batch_axes,
                       contracting)
  window = updates.refresh_window(update_every, update_begin, update_end)
  drop = updates.drop_schedule(drop_fraction, update_end)
  growing = _growing(grow_init)
  checks.check_bool('skip_step', skip_step)

  def choose(leaf, now):
    return leaves.drop_and_grow(leaf, now.active, now.magnitudes,
                                now.gradient_magnitudes, drop(now.step))

  return make_method(rule.Rule(
      'rigl', where, choose, first=rule.random_first, refreshes=window,
      gradient='all', only_at_refresh=True, zeros=True, skip_step=skip_step,
      **growing))


def _growing(grow_init: str) -> dict[str, Any]:
  """What the rule must know to grow entries at these values."""
  if grow_init not in _GROW_INITS:
    raise ValueError(f'`grow_init` (={grow_init!r}) must be one of '
                     f'{", ".join(map(repr, _GROW_INITS))}.')
  grown = _GROW_INITS[grow_init]
  if grown is None:
    return {}
  return dict(grown=grown, keeps_first=grow_init.startswith('initial'),
              unpackable=f'its entries grow at {grow_init}')


def _random_normal(leaf, weight, active, key, extra):
  del extra
  spread = jnp.std(weight.astype(jnp.float32), axis=_own_axes(leaf),
                   keepdims=True, where=active)
  return spread * jax.random.normal(key, weight.shape, jnp.float32)


def _random_uniform(leaf, weight, active, key, extra):
  del extra
  mean = jnp.mean(jnp.abs(weight.astype(jnp.float32)), axis=_own_axes(leaf),
                  keepdims=True, where=active)
  return mean * jax.random.uniform(key, weight.shape, jnp.float32, -1.)


def _initial_value(leaf, weight, active, key, first):
  del leaf, weight, active, key
  return first


def _initial_dist(leaf, weight, active, key, first):
  del weight, active
  stacked = leaf.layout.stacked
  flat = jnp.moveaxis(first, stacked, range(len(stacked)))
  shape, size = flat.shape, math.prod(flat.shape[len(stacked):])
  mixed = jax.random.permutation(key, flat.reshape(-1, size), axis=1,
                                 independent=True)
  return jnp.moveaxis(mixed.reshape(shape), range(len(stacked)), stacked)


def _own_axes(leaf) -> tuple[int, ...]:
  """The axes of one layer."""
  return tuple(axis for axis in range(len(leaf.layout.shape))
               if axis not in leaf.layout.stacked)


_GROW_INITS = {'zeros': None, 'random_normal': _random_normal,
               'random_uniform': _random_uniform,
               'initial_value': _initial_value, 'initial_dist': _initial_dist}


def itop(sparsity: float, *, growth: str = 'gradient',
         drop_fraction: float | schedules.Schedule = 0.5,
         skip_step: bool = False, allocation=allocations.erk,
         structure=Unstructured(),
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
    https://arxiv.org/abs/2102.02887. No layer is dense there. Deviations:
    counts are exact (official masks are Bernoulli draws); the drop fraction
    falls to 0, not to 0.005.
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
