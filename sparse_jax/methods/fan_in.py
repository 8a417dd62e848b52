"""SRigL: as many inputs for every output, and outputs that leave."""

import math
import re

import jax
import jax.numpy as jnp

from sparse_jax import checks
from sparse_jax.masks import selection
from sparse_jax.masks import topk
from sparse_jax.masks.allocations import uniform
from sparse_jax.masks.structures import FanIn
from sparse_jax.rules import leaves
from sparse_jax.rules import rule
from sparse_jax.rules import updates
from sparse_jax.rules.make_method import make_method
from sparse_jax.rules.state import SparseMethod


def srigl(sparsity: float, *, gamma: float = 0.3,
          never_ablate: str = '(^|/)(head|logits|classifier|output)(/|$)',
          drop_fraction: float = 0.3, skip_step: bool = False,
          allocation=uniform, is_sparse: selection.IsSparse = None,
          batch_axes: selection.Axes = (),
          contracting: selection.Axes | None = None, update_every: int = 100,
          update_begin: int = 0, update_end: int | None = None
          ) -> SparseMethod:
  """Structured RigL: constant fan-in, and outputs with little use leave.

  A leaf's budget is that of `FanIn()`: k inputs for each of its outputs, m
  outputs. At a refresh, of its n active weights,

  1. salient are the keep_count(n, drop_fraction) active weights of largest
     |w|, and the others' number of entries of largest |dL/dw|, wherever;
  2. an output with fewer than max(1, floor(gamma k)) salient entries is
     ablated: all its inputs leave. So many outputs stay that the budget fits
     into them, the most salient;
  3. with a outputs left, each gets floor(m k / a) inputs: first its salient
     weights, the largest ones, then those of largest |dL/dw|, which enter at 0
     with fresh optimizer slots.

  An ablated output comes back when its gradients make it salient again. It is
  not 0: it is what its bias makes it. `condense` gives the weights as a matrix
  [outputs, inputs each], `drop_outputs` a smaller dense net. Training costs
  what `rigl` does.

  Laws: an output has either no input or exactly as many as the other active
  ones of its leaf; the active weights of a leaf are at most m k, and more than
  m k - a; with gamma = 0 no output leaves.

  Args:
    sparsity, allocation, is_sparse, batch_axes, contracting: as in `static`.
    gamma: in [0, 1], of the fan-in at the start. The paper's is 0.3, and 0.95
      for a vision transformer.
    never_ablate: a regular expression; leaves in whose path it is found keep
      all outputs. The paper exempts the last layer, which a tree of parameters
      does not name: the default has the usual names, '$^' exempts none.
    drop_fraction, skip_step, update_every, update_begin, update_end: as in
      `rigl`.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> method = srigl(0.75, update_every=1)
    >>> params = {'w': jnp.eye(8, 4)}
    >>> method.init(params).forward_masks['w'].sum(0)
    Array([2, 2, 2, 2], dtype=int32)

  Reference:
    Lasby et al., Dynamic sparse training with structured sparsity, 2024,
    https://arxiv.org/abs/2305.02299, after the authors' code,
    https://github.com/calgaryml/condensed-sparsity. Deviations: the number
    dropped is rounded, not truncated, and the fan-in of the start rounds as
    everywhere here. Where an output has more salient weights than inputs to
    give, the largest stay (the code keeps the first in memory). What the
    weights of ablated outputs leave free is grown by gradient (the code counts
    zeros at any place as kept). Ranks are of the active weights: one that is 0
    is active all the same.
  """
  where = leaves.Sites(sparsity, allocation, FanIn(), is_sparse, batch_axes,
                       contracting)
  window = updates.refresh_window(update_every, update_begin, update_end)
  drop = updates.drop_schedule(drop_fraction, update_end)
  checks.check_bool('skip_step', skip_step)
  checks.check_fraction('gamma', gamma)
  exempt = _compiled(never_ablate)

  def choose(leaf, now):
    layer = _layer_axes(leaf)
    total = jnp.sum(now.active, layer, keepdims=True, dtype=jnp.int32)
    stay = topk.keep_count(total, jnp.float32(drop(now.step)))
    weights = jnp.where(now.active, now.magnitudes, jnp.nan)
    large = topk.top_k_mask(weights, stay, axes=layer)
    salient = large | topk.top_k_mask(now.gradient_magnitudes, total - stay,
                                      axes=layer)
    may_leave = gamma > 0 and not exempt.search(leaf.path)
    fan_in = _fan_in(leaf, leaf.sum(salient), gamma if may_leave else 0)
    kept = leaf.top(weights, fan_in, among=large) & large
    return kept | leaf.top(now.gradient_magnitudes, fan_in - leaf.sum(kept),
                           among=~kept)

  return make_method(rule.Rule(
      'srigl', where, choose, first=rule.random_first, refreshes=window,
      gradient='all', only_at_refresh=True, zeros=True, skip_step=skip_step,
      unpackable='its outputs leave'))


def _layer_axes(leaf) -> tuple[int, ...]:
  """The axes of the groups that make up one layer."""
  return tuple(range(len(leaf.layout.stacked), len(leaf.layout.group_shape)))


def _fan_in(leaf, salient: jax.Array, gamma: float) -> jax.Array:
  """int32: inputs of each output, 0 if it leaves, by its salient entries.

  If fewer outputs are salient enough than the budget needs, the bar falls to
  the last one that it needs, so that its equals stay too.
  """
  outputs = salient.shape[-1]
  budget = leaf.count * outputs
  least = min(budget // leaf.layout.rivals + 1, outputs)
  needed = topk.top_k_mask(salient, least, axes=(salient.ndim - 1,))
  lowest = jnp.min(jnp.where(needed, salient, leaf.layout.rivals), -1,
                   keepdims=True)
  bar = max(1, math.floor(gamma * leaf.count)) if gamma else 0
  alive = salient >= jnp.minimum(bar, lowest)
  number = jnp.sum(alive, -1, keepdims=True, dtype=jnp.int32)
  return jnp.where(alive, budget // number, 0)


def _compiled(pattern: str) -> re.Pattern:
  try:
    return re.compile(pattern)
  except (TypeError, re.error) as error:
    raise ValueError(f'`never_ablate` (={pattern!r}) must be a regular '
                     f'expression: {error}.') from None
