"""Blocks in the host's memory, which a step reaches one at a time."""

import dataclasses
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from sparse_jax.rules import updates as updates_lib

HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


@jax.custom_batching.custom_vmap
def swap(reservoir, enters, old, new, blocks, param, update):
  """Blocks that leave go to the host, those that enter come from it.

  One at a time, in place: nothing of the reservoir's size is on the device.
  """
  tiles = reservoir.shape[0] // math.prod(old.shape[:-1])
  first = (jnp.arange(math.prod(old.shape[:-1])) * tiles).reshape(
      *old.shape[:-1], 1)
  leaving, entering = (ids.ravel() + jnp.broadcast_to(first, ids.shape).ravel()
                       for ids in (old, new))
  positions = jnp.flatnonzero(enters.ravel(), size=enters.size)
  flat = lambda x: x.reshape(-1, *x.shape[-2:])
  blocks, start = flat(blocks), flat(param)

  def body(k, carried):
    reservoir, moves = carried
    at = positions[k]
    out = lax.dynamic_index_in_dim(blocks, at, keepdims=True)
    into = lax.dynamic_index_in_dim(reservoir, entering[at], keepdims=True)
    reservoir = lax.dynamic_update_index_in_dim(
        reservoir, jax.device_put(out, HOST), leaving[at], 0)
    step = jax.device_put(into, _DEVICE) - lax.dynamic_index_in_dim(
        start, at, keepdims=True)
    return reservoir, lax.dynamic_update_index_in_dim(
        moves, step.astype(moves.dtype), at, 0)

  count = jnp.sum(enters, dtype=jnp.int32)
  reservoir, moves = lax.fori_loop(0, count, body, (reservoir, flat(update)))
  return reservoir, moves.reshape(update.shape)


@swap.def_vmap
def _swap_mapped(size, batched, *arrays):
  """A mapped axis is one more axis of stacked layers.

  As vmap does it, a look-up at many places at once, no host's memory can.
  """
  reservoir, *others = (
      array if is_batched else jnp.broadcast_to(array, (size, *array.shape))
      for array, is_batched in zip(arrays, batched))
  flat, update = swap(reservoir.reshape(-1, *reservoir.shape[2:]), *others)
  return (flat.reshape(reservoir.shape), update), (True, True)


def conditional(run, due, operands, others):
  """run(due, operands, others), which under vmap swaps after its condition.

  A mapped condition is both branches and a choice entry by entry, which is none
  for the host's memory.
  """
  place = operands[-1]
  if place is None or place.reservoir is None:
    return run(due, operands, others)
  always = isinstance(due, bool) and due  # No condition, and no array.

  @jax.custom_batching.custom_vmap
  def whole(due, operands, others):
    return run(always or due, operands, others)

  def apart(due, operands, others):
    param, *_, place = operands
    thin = dataclasses.replace(place, reservoir=None)
    marks, after, update = run(always or due, (*operands[:-1], thin), others)
    reservoir, update = swap(
        place.reservoir, after.ids != place.ids, place.ids, after.ids,
        updates_lib.apply_update(param, update), param, update)
    return marks, dataclasses.replace(after, reservoir=reservoir), update

  @whole.def_vmap
  def _(size, batched, *args):
    del size
    axes = jax.tree.map(lambda is_batched: 0 if is_batched else None,
                        tuple(batched))
    out = jax.vmap(apart, axes)(*args)
    return out, jax.tree.map(lambda _: True, out)

  return whole(jnp.asarray(due), operands, others)


def settled(place: Any) -> Any:
  """The place with its reservoir in host memory: NumPy and pickle forget it."""
  if place is None or place.reservoir is None or (
      jax.typeof(place.reservoir).memory_space == HOST):
    return place
  return dataclasses.replace(place, reservoir=jax.device_put(
      place.reservoir, HOST))
