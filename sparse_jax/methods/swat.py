"""SWAT: sparse weights forward, sparse weights and activations backward."""

import math

import jax
import jax.numpy as jnp

from sparse_jax.rules import assembly
from sparse_jax import checks
from sparse_jax import trees
from sparse_jax.rules import budgets as budget
from sparse_jax.masks import masking
from sparse_jax.operators import operands
from sparse_jax.masks import selection
from sparse_jax.rules import sites as sites_lib
from sparse_jax.rules import state as state_lib
from sparse_jax.rules.assembly import SparseMethod
from sparse_jax.rules.assembly import UNIFORM
from sparse_jax.rules.assembly import UNSTRUCTURED

# Of SWAT-M's average of the gradient: that of the authors' optimizer.
_MOMENTUM = .9


def swat(sparsity: float, *, activation_sparsity: float | None = None,
         masked_update: bool = False, freeze_at: int | None = None,
         allocation=UNIFORM, structure=UNSTRUCTURED,
         is_sparse: selection.IsSparse = None, batch_axes: selection.Axes = (),
         contracting: selection.Axes | None = None,
         update_every: int = 1) -> SparseMethod:
  """Sparse weight activation training.

  The forward pass and the gradient to activations read the largest weights,
  chosen anew every step; the gradient to weights is made of the largest
  activations and of a dense output gradient, and reaches all weights, hidden
  ones included. `read` is the part of the weights; the part of the
  activations is `operators`, which `sparse_dot_general` and its kin carry out.
  Training costs 2 f_S + f_a, with a the density of the activations.

  With `allocation=erk` it is SWAT-ERK. With `allocation='momentum'` it is
  SWAT-M: the budget is uniform at first, then at each refresh shared out in
  proportion to the mean magnitude, over the weights in use, of a running
  average of the gradient; activations are as sparse as the weights they meet.

  Laws: the weights follow `dnw`; SWAT-M keeps as many in all as at first.

  Args:
    sparsity, structure, is_sparse, batch_axes, contracting: as in `static`.
      SWAT-U leaves the first layer dense: say so by `is_sparse`. With
      structure=Channel() it is structured SWAT; activations have no structure.
    activation_sparsity: of the activations in the weight's gradient, in
      [0, 1); the allocation shares it too (a mapping is scaled). None: in each
      layer that of its weight.
    masked_update: whether the gradient stops at the weights in use, so that
      hidden ones stand still (the paper's figure 7).
    freeze_at: the update after which the weights in use change no more
      (figure 8), or None for never.
    allocation: as in `static`, or 'momentum'.
    update_every: steps between refreshes of the weights in use.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> method = swat(0.9, activation_sparsity=0.8)
    >>> params = {'kernel': jnp.ones((4, 6))}
    >>> method.operators(params, method.init(params))['kernel']
    Operands(forward_weight=0.0, forward_activation=0.0, backward_weight=0.0,
    backward_activation=0.8, output_gradient=0.0)

  Reference:
    Raihan and Aamodt, 2020, https://arxiv.org/abs/2001.01969, algorithm 1.
    Counts are exact, where the authors' code keeps all that reach the k-th
    magnitude, and masks wait between refreshes, where it compares with a
    stored threshold. SWAT-M follows the code (small momentum, fewer weights),
    not the poster, with its own average of the gradient, so that any
    optimizer will do; what a full layer cannot take goes to the others in
    proportion, and the total is exact.
  """
  by_momentum = isinstance(allocation, str) and allocation == 'momentum'
  sites = sites_lib.Sites(sparsity, UNIFORM if by_momentum else allocation,
                          structure, is_sparse, batch_axes,
                          contracting).checked()
  if by_momentum:
    budget.check_movable(sites, 'allocation', allocation)
  inputs = _activation_sites(sites, activation_sparsity)
  checks.check_bool('masked_update', masked_update)
  if freeze_at is not None:
    checks.check_count('freeze_at', freeze_at)
  window = assembly.refresh_window(update_every, 0, freeze_at)

  def select(leaf, weight, count):
    inside = leaf.layout.top(leaf.magnitudes(weight), count)
    reach = inside if masked_update else jnp.ones_like(inside)
    return sites_lib.levels(leaf, inside, reach)

  def start(params, key):
    del key  # The choice is by magnitude.
    return sites_lib.first_marks(params, sites.leaves(params),
                                 lambda leaf, w: select(leaf, w, leaf.count))

  def renew(seen, state):
    return sites_lib.next_state(
        window(state.step + 1), lambda leaf, w, g, m: select(
            leaf, w, leaf.count), sites.leaves(seen.params), seen, state)

  def renew_by_momentum(seen, state):
    leaves = sites.leaves(seen.params)
    state = state._replace(extra=_averages(state.extra, seen.grads))

    def together(weights):
      counts = _momentum_counts(leaves, state)
      return {path: select(leaf, weights[path], counts[path])
              for path, leaf in leaves.items()}, state.extra

    return sites_lib.next_together(window(state.step + 1), together, seen,
                                   state)

  def operators(params, state):
    leaves = inputs.leaves(params)
    marks = trees.leaves_by_path(state_lib.get_state(state).marks)
    moving = by_momentum and activation_sparsity is None
    return {path: operands.Operands(backward_activation=_sparsity_now(
        marks[path]) if moving else leaf.sparsity)
            for path, leaf in leaves.items()}

  def work(params, steps):
    del steps
    activations = inputs.leaves(params)
    return {path: state_lib.Work(1 - leaf.sparsity, 1 - leaf.sparsity,
                                 1 - activations[path].sparsity)
            for path, leaf in sites.leaves(params).items()}

  made = assembly.make_method(
      start, read=assembly.read_both, work=work,
      renew=renew_by_momentum if by_momentum else renew,
      extra=(lambda params: _zeros(sites, params)) if by_momentum else None)
  return made._replace(operators=operators)


def _activation_sites(sites, sparsity) -> sites_lib.Sites:
  """Where the activations are sparse: as the weights, at their own sparsity."""
  if sparsity is None:
    return sites._replace(structure=UNSTRUCTURED)
  checks.check_sparsity('activation_sparsity', sparsity)
  return sites.at(sparsity)._replace(structure=UNSTRUCTURED)


def _zeros(sites, params) -> dict[trees.Path, jax.Array]:
  return {path: jnp.zeros(leaf.layout.shape, jnp.float32)
          for path, leaf in sites.leaves(params).items()}


def _averages(old, grads) -> dict[trees.Path, jax.Array]:
  """The running averages of the gradient after one more."""
  new = trees.leaves_by_path(grads)
  return {path: _MOMENTUM * average + (1 - _MOMENTUM) * new[path].astype(
      jnp.float32) for path, average in old.items()}


def _momentum_counts(leaves, state) -> budget.Counts:
  """The groups that each competition of each leaf keeps, at least one."""
  marks = trees.leaves_by_path(state.marks)
  claims, room, total = {}, {}, 0
  for path, leaf in leaves.items():
    inside = sites_lib.active_groups(leaf, marks[path])
    active = sites_lib.count(leaf, inside)
    size = jnp.where(inside, leaf.magnitudes(state.extra[path]), 0)
    claims[path] = jnp.sum(size, leaf.layout.competing, keepdims=True) / active
    room[path] = jnp.full_like(active, _rivals(leaf) - 1)
    total += active.size * (leaf.count - 1)
  shares = budget.share_out(jnp.int32(total), claims, room)
  return {path: share + 1 for path, share in shares.items()}


def _rivals(leaf) -> int:
  """How many groups compete for one budget."""
  layout = leaf.layout
  return math.prod(layout.group_shape[axis] for axis in layout.competing)


def _sparsity_now(marks) -> jax.Array:
  """float32[]: the share of entries outside A."""
  inside = masking.forward_mask(marks)
  return 1 - jnp.mean(inside.astype(jnp.float32))
