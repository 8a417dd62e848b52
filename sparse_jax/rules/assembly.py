"""What a method is made of: a start, a reading, a way to renew its masks."""

from collections.abc import Callable
import math
from typing import Any

import jax
import jax.numpy as jnp

from sparse_jax.masks import allocations as allocation
from sparse_jax.masks import backward
from sparse_jax import checks
from sparse_jax import trees
from sparse_jax.rules import budgets as budget
from sparse_jax.masks import masking
from sparse_jax.masks import placing
from sparse_jax.masks import schedules
from sparse_jax.rules import sites as sites_lib
from sparse_jax.rules import state as state_lib
from sparse_jax.masks import structures
from sparse_jax.masks import topk

SparseMethod = state_lib.SparseMethod
# Defaults that all methods share.
UNIFORM = allocation.uniform
UNSTRUCTURED = structures.Unstructured()


def make_method(start, *, read, renew=None, extra=None, zeros=False,
                adjust=None, penalty=None, skips=None, resets=None,
                parametrize=None, work=None, kept=None) -> SparseMethod:
  """Makes a method of its parts.

  Args:
    start: (params, typed key) -> marks.
    read: (params, SparseState) -> weights.
    renew: (sites.Step, SparseState) -> SparseState with new marks (and
      extra), or None for masks that stay.
    extra: params -> the method's own arrays at the start, or None.
    zeros: whether stored weights are 0 outside A, and where they enter it.
    adjust: (params, updates, old SparseState, new one) -> updates, or None.
    penalty: (params, SparseState) -> float32[], or None for 0.
    skips, resets: SparseState -> bool[], or None.
    parametrize: params -> params, or None for the identity.
    work, kept: as in SparseMethod.
  """
  def init(params, key=None):
    data = state_lib.key_data(key)
    marks = _first_marks(start, params, data)
    own = () if extra is None else extra(params)
    return state_lib.SparseState(jnp.zeros((), jnp.int32), data, marks,
                                 jnp.zeros((), bool), own)

  def read_weights(params, state):
    return read(params, state_lib.get_state(state))

  def total_penalty(params, state):
    if penalty is None:
      return jnp.float32(0)
    return penalty(params, state_lib.get_state(state))

  def settle(params, updates, grads, state, **extra_args):
    seen = sites_lib.Step(params, updates, grads, extra_args)
    if not zeros:
      stepped = jax.tree.map(sites_lib.apply_update, params, updates)
      seen = sites_lib.Step(stepped, None, grads, extra_args)
    new = state if renew is None else _renewed(renew, seen, state)
    if zeros:
      updates = _zero_outside(updates, params, state.marks, new.marks)
    if adjust is not None:
      updates = adjust(params, updates, state, new)
    return updates, new._replace(step=state.step + 1)

  return SparseMethod(parametrize or (lambda params: params), init,
                      read_weights, total_penalty, refresh_by(settle), settle,
                      skips, resets, work, None, kept)


def _first_marks(start, params, data):
  """The marks of `start`, each laid like its weight."""
  def first(params, data):
    return start(params, jax.random.wrap_key_data(data))

  if not placing.is_explicit(params):
    return first(params, data)
  like = trees.map_leaves(lambda path, marks, weight: weight,
                          placing.shapes_of(first, params, data), params)
  return placing.automatic(first, like, params, data)


def _renewed(renew, seen, state):
  """What `renew` makes of a state, laid like that state."""
  given = {name: placing.explicit(value, seen.params) if callable(value)
           else value for name, value in seen.extra_args.items()}

  def renewed(params, updates, grads, state):
    return renew(sites_lib.Step(params, updates, grads, given), state)

  return placing.automatic(renewed, state, seen.params, seen.updates,
                           seen.grads, state)


def refresh_by(settle):
  """A method's `refresh`, from its `settle`."""
  def refresh(params, grads, state, **extra_args):
    still = jax.tree.map(lambda p: jnp.full_like(p, -0.), params)
    updates, state = settle(params, still, grads, state_lib.get_state(state),
                            **extra_args)
    return jax.tree.map(sites_lib.apply_update, params, updates), state

  return refresh


def shared_work(sites, share):
  """A method's `work`: `share(density)` of each leaf, three numbers."""
  def work(params, steps):
    del steps
    return {path: state_lib.Work(*share(1 - leaf.sparsity))
            for path, leaf in sites.leaves(params).items()}

  return work


def constant_counts(sites, wider=None):
  """A method's `kept`: A of `sites`, a gradient on A, `wider` sites, or 'all'.
  """
  def kept(params):
    leaves = sites.leaves(params)
    if wider == 'all':
      outer = {path: math.prod(leaf.layout.group_shape)
               for path, leaf in leaves.items()}
    else:
      outer = {path: leaf.count
               for path, leaf in (wider or sites).leaves(params).items()}
    return {path: sites_lib.Kept(leaf, leaf.count,
                                 max(outer[path], leaf.count))
            for path, leaf in leaves.items()}

  return kept


def read_forward(params, state):
  """A, the gradient on A."""
  def read(weight, marks):
    mask = masking.forward_mask(marks)
    return backward.masked_weight(weight, mask, mask)

  return masking.map_marked(read, params, state.marks)


def read_both(params, state):
  """A, the gradient on B."""
  def read(weight, marks):
    return backward.masked_weight(weight, masking.forward_mask(marks),
                                  masking.backward_mask(marks))

  return masking.map_marked(read, params, state.marks)


def read_dense_gradient(params, state):
  """A, the gradient everywhere."""
  def read(weight, marks):
    return backward.masked_weight(weight, masking.forward_mask(marks),
                                  jnp.ones((1,) * weight.ndim, bool))

  return masking.map_marked(read, params, state.marks)


def random_start(sites):
  def start(params, key):
    def choose(leaf, weight):
      del weight
      chosen = leaf.layout.top(leaf.random_scores(key), leaf.count)
      return sites_lib.levels(leaf, chosen, chosen)

    return sites_lib.first_marks(params, sites.leaves(params), choose)

  return start


def refresh_window(every: int, begin: int, end: int | None, *,
                   also_at_end: bool = False, also_at: int | None = None):
  """A function of the step: whether the masks refresh after that update."""
  check_window(every, begin, end)
  if (every, begin, end) == (1, 0, None):
    return lambda step: True

  def window(step):
    due = (step % every == 0) & (step >= begin)
    due &= step <= (math.inf if end is None else end)
    if also_at_end and end is not None:
      due |= step == end
    if also_at is not None:
      due |= step == also_at
    return due

  return window


def check_window(every: int, begin: int, end: int | None) -> None:
  """Raises ValueError naming the argument that is out of range."""
  checks.check_count('update_every', every, least=1)
  checks.check_count('update_begin', begin)
  if end is not None:
    checks.check_count('update_end', end)
    if end < begin:
      raise ValueError(f'`update_end` (={end}) must not be below '
                       f'`update_begin` (={begin}).')


def check_backward(sparsity: float, backward_sparsity: float,
                   backward_selection: str) -> None:
  """Raises ValueError naming the argument of a backward set out of range."""
  checks.check_sparsity('backward_sparsity', backward_sparsity)
  if backward_sparsity > sparsity:
    raise ValueError(f'`backward_sparsity` (={backward_sparsity!r}) must not '
                     f'be above `sparsity` (={sparsity!r}): the backward set '
                     'contains the forward set.')
  if backward_selection not in ('magnitude', 'random'):
    raise ValueError(f'`backward_selection` (={backward_selection!r}) must be '
                     '\'magnitude\' or \'random\'.')


def drop_schedule(fraction: float, end: int | None
                  ) -> Callable[[jax.Array], Any]:
  """The drop fraction: constant, or annealed to `end` by a cosine."""
  checks.check_fraction('drop_fraction', fraction)
  if end is None:
    return lambda step: fraction
  checks.check_count('update_end', end, least=1)
  return schedules.cosine_drop(fraction, end=end)


def full_start(sites):
  """Every entry in A."""
  def choose(leaf, weight):
    del weight
    full = jnp.ones(leaf.layout.group_shape, bool)
    return sites_lib.levels(leaf, full, full)

  def start(params, key):
    del key
    return sites_lib.first_marks(params, sites.leaves(params), choose)

  return start


def best_levels(leaves, groups, counts):
  """{path: levels} of the best groups; scores and counts are by path."""
  chosen = {path: leaf.layout.top(groups[path], counts[path])
            for path, leaf in leaves.items()}
  return {path: sites_lib.levels(leaf, chosen[path], chosen[path])
          for path, leaf in leaves.items()}


def counts_by_scope(leaves, groups, scope, sparsity):
  """{path: groups kept}: each leaf's own count, or one budget for all."""
  if scope == 'layer':
    return {path: leaf.count for path, leaf in leaves.items()}
  size = sum(groups[path].size for path in leaves)
  return budget.global_counts(leaves, groups, topk.keep_count(size, sparsity))


def _zero_outside(updates, params, old, new):
  """Leads to 0 outside the new mask, and where a weight has just entered."""
  def zero(update, weight, was, now):
    stays = masking.forward_mask(was) & masking.forward_mask(now)
    exact = jnp.result_type(update, weight)  # A 16-bit -p would not reach 0.
    return jnp.where(stays, update.astype(exact), -weight.astype(exact))

  def visit(path, update, weight, was, now):
    del path
    return zero(update, weight, was, now) if masking.is_marked(was) else update

  return trees.map_leaves(visit, updates, params, old, new)
