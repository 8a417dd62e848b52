"""What a method is made of: a start, a reading, a way to renew its masks."""

import math

import jax
import jax.numpy as jnp

from sparse_jax import allocation
from sparse_jax import backward
from sparse_jax import base
from sparse_jax import masking
from sparse_jax import sites as sites_lib
from sparse_jax import state as state_lib
from sparse_jax import structures

SparseMethod = state_lib.SparseMethod
# Defaults that all methods share.
UNIFORM = allocation.uniform
UNSTRUCTURED = structures.Unstructured()


def make_method(start, *, read, renew=None, zeros=False, penalty=None,
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
    if also_at_end and end is not None:
      due |= step == end
    if also_at is not None:
      due |= step == also_at
    return due

  return window


def _zero_outside(updates, params, old, new):
  """Leads to 0 outside the new mask, and where a weight has just entered."""
  def zero(update, weight, was, now):
    stays = masking.forward_mask(was) & masking.forward_mask(now)
    exact = jnp.result_type(update, weight)  # A 16-bit -p would not reach 0.
    return jnp.where(stays, update.astype(exact), -weight.astype(exact))

  def visit(path, update, weight, was, now):
    del path
    return zero(update, weight, was, now) if masking.is_marked(was) else update

  return base.map_leaves(visit, updates, params, old, new)
