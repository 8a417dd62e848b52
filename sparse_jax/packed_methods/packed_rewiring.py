"""Blocks come and go: on the device, or in exchange with the host.

What leaves is overwritten by what enters, in place, so that every other block
keeps its position, and with it its optimizer slots.
"""

from collections.abc import Callable
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax import trees
from sparse_jax.blocks import packing as packed_lib
from sparse_jax.packed_methods import packed_params
from sparse_jax.rules import sites as sites_lib
from sparse_jax.rules import state as state_lib
from sparse_jax.blocks.packing import PackedBlocks
from sparse_jax.packed_methods.packed_params import PackedState


def rewire(params: trees.PyTree, slots: Any,
           growth: dict[trees.Path, jax.Array], key: jax.Array, *,
           fraction: Any,
           sparsities: dict[trees.Path, float],
           init: Callable[[trees.PyTree], Any]) -> tuple[trees.PyTree, Any]:
  """Drops the blocks of least magnitude and grows as many, in place.

  Args:
    params: tree with PackedBlocks.
    slots: an optimizer's state of the packed weights.
    growth: scores of all tiles, by path; empty for random growth.
    key: a typed key, for random growth.
    fraction: share of the blocks that is dropped.
    sparsities: of the packed leaves, as asked for.
    init: the optimizer's.

  Returns:
    params and slots, of the same structure. Blocks that entered are 0.
  """
  packed = packed_params.packed_leaves(params)
  moved, entered = {}, {}
  for index, (path, leaf) in enumerate(packed.items()):
    site = packed_params.tile_site(path, index, leaf, sparsities[path])
    scores = growth[path] if growth else site.random_scores(key)
    moved[path], entered[path] = _rewire_leaf(site, leaf, scores, fraction)
  params = packed_params.with_packed(params, moved)
  weights = packed_lib.partition_packed(params)[0]
  return params, reset_slots(slots, init(weights), entered)


def exchange(params: trees.PyTree, slots: Any, state: PackedState,
             init: Callable[[trees.PyTree], Any], random: bool
             ) -> tuple[trees.PyTree, Any, PackedState]:
  """Top-KAST's refresh: blocks change places between device and host.

  Args:
    params: tree with PackedBlocks.
    slots: an optimizer's state of the packed weights; given up.
    state: of the method; its arrays are written in place.
    init: the optimizer's.
    random: whether B outside A is drawn at random.

  Returns:
    params, slots and state, of the same structure. Blocks that entered are as
    they last were.
  """
  packed = packed_params.packed_leaves(params)
  scores = {path: _tile_worth(leaf.blocks, leaf.reduce)
            for path, leaf in packed.items()}
  key = state_lib.step_key(state, state.step)
  moves, entered, going = {}, {}, {}
  for index, (path, leaf) in enumerate(packed.items()):
    state.worth[path][np.asarray(leaf.ids)] = np.asarray(scores[path])
    site = packed_params.tile_site(path, index, leaf,
                                   state.sparsities[path])
    moves[path] = _moves(site, leaf, state.worth[path],
                         site.random_scores(key) if random else None)
    entered[path] = jnp.asarray(moves[path].entered)
    packed[path], going[path] = _swap_all(leaf, moves[path],
                                          state.reservoir[path])
  for path, parts in going.items():  # When all are under way.
    _store(state.reservoir[path], moves[path].leaving, parts)
  params = packed_params.with_packed(params, packed)
  if any(move.leaving.size for move in moves.values()):
    weights = packed_lib.partition_packed(params)[0]
    slots = _jitted_reset(init)(slots, weights, entered)
  return params, slots, state


def reset_slots(slots: Any, fresh: Any, entered: dict[trees.Path, jax.Array]
                ) -> Any:
  """Slots of blocks that entered as `optimizer.init` makes them.

  A slot is a leaf whose path ends with that of a packed leaf's blocks and
  that has their count.

  Args:
    slots: an optimizer's state of the packed weights.
    fresh: what its `init` makes of them.
    entered: {path of a packed leaf: bool[n], which of its blocks entered}.

  Raises:
    ValueError: if `slots` is no state of these weights.
  """
  check_slots(slots, fresh)
  owners = {f'{path}/blocks'.lstrip('/'): mask
            for path, mask in entered.items()}

  def visit(path, slot, new):
    mask = owners.get(trees.owner_of(trees.path_name(path), owners))
    if mask is None or jnp.ndim(slot) != 3 or slot.shape[0] != mask.size:
      return slot
    return jnp.where(mask[:, None, None], new, slot)

  return jax.tree.map_with_path(visit, slots, fresh)


def check_slots(slots: Any, fresh: Any) -> None:
  """Raises ValueError unless slots have the tree and shapes of `fresh`."""
  if jax.tree.structure(slots) != jax.tree.structure(fresh):
    raise ValueError('`slots` must be a state of the optimizer whose `init` '
                     'is given, for the weights of `params`.')
  table = trees.leaves_by_path(fresh)
  for path, slot in trees.leaves_by_path(slots).items():
    if jnp.shape(slot) != jnp.shape(table[path]):
      raise ValueError(f'`slots` has {path!r} of shape {jnp.shape(slot)}, '
                       f'which must be {jnp.shape(table[path])} for the '
                       'weights of `params`.')


def _rewire_leaf(site, packed, growth, fraction):
  """The leaf with its weakest blocks replaced, and bool[n], which were."""
  worth = packed_lib.tile_worth(packed.blocks, packed.reduce)
  none = jnp.zeros(packed.grid, bool).ravel()
  active = none.at[packed.ids].set(True)
  worth = jnp.zeros(none.shape, worth.dtype).at[packed.ids].set(worth)
  chosen = sites_lib.drop_and_grow(
      site, active.reshape(packed.grid), worth.reshape(packed.grid), growth,
      fraction).ravel()
  entered = ~chosen[packed.ids]
  entering = jnp.flatnonzero(chosen & ~active, size=entered.size)
  # The k-th position that is left goes to the k-th that enters.
  rank = jnp.maximum(jnp.cumsum(entered) - 1, 0)
  ids = jnp.where(entered, entering[rank].astype(jnp.int32), packed.ids)
  zero = jnp.zeros((), packed.dtype)
  blocks = jnp.where(entered[:, None, None], zero, packed.blocks)
  return _placed(packed, ids).replace(blocks=blocks), entered


def _placed(packed: PackedBlocks, ids) -> PackedBlocks:
  columns = packed.grid[1]
  return packed.replace(rows=jnp.asarray(ids // columns, jnp.int32),
                        columns=jnp.asarray(ids % columns, jnp.int32))


class _Moves(NamedTuple):
  """What a refresh changes in one leaf."""

  positions: np.ndarray  # Of the blocks that leave.
  leaving: np.ndarray  # Their tiles.
  entering: np.ndarray  # The tiles that take their positions.
  ids: np.ndarray  # The tiles at all positions, afterwards.
  entered: np.ndarray  # bool[n].
  forward: np.ndarray | None  # Positions of A, afterwards.


def _moves(site, leaf, worth, random_scores) -> _Moves:
  ids = np.asarray(leaf.ids)
  inner, outer = packed_params.largest_sets(worth, site.count, ids.size,
                                            random_scores)
  entered = ~outer[ids]
  positions = np.flatnonzero(entered)
  inside = np.zeros(outer.size, bool)
  inside[ids] = True
  entering = np.flatnonzero(outer & ~inside)
  after = ids.copy()
  after[positions] = entering
  forward = None
  if leaf.forward is not None:
    forward = np.flatnonzero(inner[after]).astype(np.int32)
  return _Moves(positions, ids[positions], entering, after, entered, forward)


def _swap_all(leaf, moves, reservoir):
  """Lets blocks in, in chunks of one size; returns those that went out."""
  size = max(1, -(-leaf.blocks.shape[0] // 8))
  blocks, parts = leaf.blocks, []
  for start in range(0, moves.positions.size, size):
    now = np.s_[start:start + size]
    positions = np.full(size, leaf.blocks.shape[0], np.int32)
    positions[:moves.positions[now].size] = moves.positions[now]
    incoming = np.zeros((size, *leaf.block), reservoir.dtype)
    incoming[:moves.entering[now].size] = reservoir[moves.entering[now]]
    blocks, outgoing = _swap(blocks, positions, incoming)
    outgoing.copy_to_host_async()
    parts.append(outgoing)
  leaf = _placed(leaf, moves.ids).replace(blocks=blocks)
  if moves.forward is not None:
    leaf = leaf.replace(forward=jnp.asarray(moves.forward))
  return leaf, parts


@functools.partial(jax.jit, donate_argnums=0)
def _swap(blocks, positions, incoming):
  """Positions beyond the end are padding."""
  outgoing = jnp.take(blocks, positions, axis=0, mode='clip')
  return blocks.at[positions].set(incoming, mode='drop'), outgoing


def _store(reservoir, leaving, parts):
  for part in parts:
    now, leaving = leaving[:part.shape[0]], leaving[part.shape[0]:]
    reservoir[now] = np.asarray(part)[:now.size]


_tile_worth = jax.jit(packed_lib.tile_worth, static_argnums=1)


@functools.lru_cache(maxsize=16)
def _jitted_reset(init):
  return jax.jit(lambda slots, weights, entered: reset_slots(
      slots, init(weights), entered), donate_argnums=0)
