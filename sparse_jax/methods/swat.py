"""SWAT: sparse weights forward, sparse weights and activations backward."""

import jax
import jax.numpy as jnp

from sparse_jax import checks
from sparse_jax import trees
from sparse_jax.masks import marks as marks_lib
from sparse_jax.masks import selection
from sparse_jax.masks.allocations import uniform
from sparse_jax.masks.structures import Unstructured
from sparse_jax.operators import operands
from sparse_jax.rules import budgets
from sparse_jax.rules import leaves as leaves_lib
from sparse_jax.rules import rule
from sparse_jax.rules import state as state_lib
from sparse_jax.rules import updates
from sparse_jax.rules.make_method import make_method
from sparse_jax.rules.state import SparseMethod
from sparse_jax.rules.storage import zeros_like_leaves

# Of SWAT-M's average of the gradient: that of the authors' optimizer.
_MOMENTUM = .9


def swat(sparsity: float, *, activation_sparsity: float | None = None,
         masked_update: bool = False, freeze_at: int | None = None,
         allocation=uniform, structure=Unstructured(),
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
  where = leaves_lib.Sites(sparsity, uniform if by_momentum else allocation,
                           structure, is_sparse, batch_axes,
                           contracting, None if masked_update else 0.).checked()
  if by_momentum:
    budgets.check_movable(where, 'allocation', allocation)
  inputs = _activation_sites(where, activation_sparsity)
  checks.check_bool('masked_update', masked_update)
  if freeze_at is not None:
    checks.check_count('freeze_at', freeze_at)

  def sets(leaf, now, count):
    inside = leaf.top(now.magnitudes, count)
    return inside, inside if masked_update else leaf.full()

  def choose(leaf, now):
    return sets(leaf, now, leaf.count)

  def choose_together(leaves, nows, seen):
    del seen
    counts = _momentum_counts(leaves, nows)
    return {path: sets(leaf, nows[path], counts[path])
            for path, leaf in leaves.items()}, None

  def operators(params, state):
    state = state_lib.get_state(state)
    moving = by_momentum and activation_sparsity is None
    marks = trees.leaves_by_path(state.marks)
    return {path: operands.Operands(backward_activation=_sparsity_now(
        state.plan.by_path[path], marks[path]) if moving else leaf.sparsity)
            for path, leaf in inputs.leaves(state.plan.own(params)).items()}

  def work(params, steps):
    del steps
    activations = inputs.leaves(params)
    return {path: state_lib.Work(*[leaf.layout.share(leaf.count)] * 2,
                                 1 - activations[path].sparsity)
            for path, leaf in where.leaves(params).items()}

  made = make_method(rule.Rule(
      'swat', where, choose_together if by_momentum else choose,
      first=choose, refreshes=updates.refresh_window(update_every, 0,
                                                     freeze_at),
      gradient='B', together=by_momentum,
      extra=zeros_like_leaves if by_momentum else None,
      remember=_remember if by_momentum else None,
      unpackable='it states operators of its own'))
  return made._replace(operators=operators, work=work)


def _activation_sites(sites, sparsity) -> leaves_lib.Sites:
  """Where the activations are sparse: as the weights, at their own sparsity."""
  if sparsity is not None:
    checks.check_sparsity('activation_sparsity', sparsity)
    sites = sites.at(sparsity)
  return sites._replace(structure=Unstructured(), backward_sparsity=None)


def _remember(seen, averages) -> dict[trees.Path, jax.Array]:
  """The running averages of the gradient after one more."""
  new = trees.leaves_by_path(seen.grads)
  return {path: _MOMENTUM * average + (1 - _MOMENTUM) * new[path].astype(
      jnp.float32) for path, average in averages.items()}


def _momentum_counts(leaves, nows) -> budgets.Counts:
  """The groups that each competition of each leaf keeps, at least one."""
  claims, room, total = {}, {}, 0
  for path, leaf in leaves.items():
    inside = nows[path].active
    active = leaf.sum(inside)
    size = leaf.layout.group(jnp.abs(nows[path].extra))
    claims[path] = jnp.sum(jnp.where(inside, size, 0), leaf.layout.competing,
                           keepdims=True) / active.astype(jnp.float32)
    room[path] = jnp.full_like(active, leaf.layout.rivals - 1)
    total += active.size * (leaf.count - 1)
  shares = budgets.share_out(jnp.int32(total), claims, room)
  return {path: share + 1 for path, share in shares.items()}


def _sparsity_now(leaf, marks) -> jax.Array:
  """float32[]: the share of entries outside A."""
  inside = marks_lib.forward_mask(leaf.layout.spread(marks))
  return 1 - jnp.mean(inside.astype(jnp.float32))
