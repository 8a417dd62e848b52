"""Sparse training of packed weights: blocks come and go, shapes stay.

A refresh overwrites the blocks that leave by those that enter, in place, so
that every other block keeps its position, and with it its optimizer slots.
Random choices and counts are those of the simulated methods of the same name,
so that both make the same run.
"""

from collections.abc import Callable
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax import allocation as allocation_lib
from sparse_jax import assembly
from sparse_jax import base
from sparse_jax import masking
from sparse_jax import packed as packed_lib
from sparse_jax import selection
from sparse_jax import sites as sites_lib
from sparse_jax import state as state_lib
from sparse_jax import structures
from sparse_jax.packed import PackedBlocks

_UNIFORM = allocation_lib.uniform


class PackedState(NamedTuple):
  """What a method on packed weights remembers, all of it on the host."""

  step: int  # Updates done.
  key: np.ndarray  # uint32[...], raw data of a PRNG key.
  sparsities: dict[base.Path, float]  # Of A, leaf by leaf, as asked for.
  # Top-KAST: every tile of the weight, [tiles, rows, columns]; those of B are
  # out of date. And what each is worth.
  reservoir: dict[base.Path, np.ndarray]
  worth: dict[base.Path, np.ndarray]


class PackedMethod(NamedTuple):
  """A sparse-training method on packed weights.

  `params` are trees whose sparse leaves are PackedBlocks, `slots` the state
  of an Optax optimizer of `partition_packed(params)[0]`.
  """

  # (dense params, key) -> (params, PackedState). Cuts on the host.
  pack: Callable[..., tuple[base.PyTree, PackedState]]
  # (params, PackedState) -> float32[], to be added to the loss.
  penalty: Callable[[base.PyTree, PackedState], jax.Array]
  # PackedState -> whether the coming refresh wants scores of the gradient.
  grows: Callable[[PackedState], bool]
  # (params, slots, PackedState, init, growth) -> (params, slots, PackedState)
  # after an update; `init` is the optimizer's, `growth` {path: scores}.
  refresh: Callable[..., tuple[base.PyTree, Any, PackedState]]


class _Cutting(NamedTuple):
  """Where a method works, and into what tiles it cuts."""

  sites: sites_lib.Sites
  pad: bool

  def view(self, leaf: sites_lib.Leaf, weight) -> np.ndarray:
    """The matrices of one leaf, on the host."""
    layout = leaf.layout
    matrix = np.transpose(np.asarray(weight), layout.order).reshape(
        layout.view_shape)
    try:
      packed_lib.check_block(self.sites.structure.shape, matrix.shape,
                             self.pad)
    except ValueError as error:
      raise ValueError(f'{leaf.path!r}: {error}') from error
    return matrix


def packed_static(sparsity: float, *, block: tuple[int, int],
                  reduce: str = 'sum', pad: bool = False, allocation=_UNIFORM,
                  is_sparse: selection.IsSparse = None,
                  contracting: selection.Axes | None = None) -> PackedMethod:
  """A random set of blocks, packed, that never changes.

  Law: it makes the run of `static` with Block(block).

  Args:
    sparsity: fraction of blocks that do not exist, in [0, 1).
    block: (rows, columns) of a block.
    reduce: 'sum' or 'max' of the magnitudes in a block is its score.
    pad: whether blocks may hang over the edges of a weight.
    allocation, is_sparse, contracting: as in `static`.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> method = packed_static(0.5, block=(2, 2))
    >>> params, state = method.pack({'kernel': jnp.ones((4, 4))})
    >>> params['kernel'].blocks.shape
    (2, 2, 2)

  Reference:
    Evci et al., RigL, 2020, https://arxiv.org/abs/1911.11134, the row
    "Static".
  """
  cutting = _cutting(sparsity, allocation, block, reduce, pad, is_sparse,
                     contracting)
  return PackedMethod(_random_pack(cutting), _no_penalty, lambda state: False,
                      _only_count)


def packed_set(sparsity: float, *, block: tuple[int, int],
               drop_fraction: float = 0.3, reduce: str = 'sum',
               pad: bool = False, allocation=_UNIFORM,
               is_sparse: selection.IsSparse = None,
               contracting: selection.Axes | None = None,
               update_every: int = 100, update_begin: int = 0,
               update_end: int | None = None) -> PackedMethod:
  """SET on packed weights: small blocks leave, random ones enter at 0.

  Law: it makes the run of `set_` with Block(block), slots included.

  Args:
    sparsity, block, reduce, pad, allocation, is_sparse, contracting: as in
      `packed_static`.
    drop_fraction, update_every, update_begin, update_end: as in `set_`.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> method = packed_set(0.9, block=(16, 16), update_every=50)

  Reference:
    Mocanu et al., SET, 2018, https://arxiv.org/abs/1707.04780, as in `set_`.
  """
  cutting = _cutting(sparsity, allocation, block, reduce, pad, is_sparse,
                     contracting)
  window = assembly.refresh_window(update_every, update_begin, update_end)
  return _rewiring(cutting, window, drop_fraction, update_end, False)


def packed_rigl(sparsity: float, *, block: tuple[int, int],
                drop_fraction: float = 0.3, reduce: str = 'sum',
                pad: bool = False, allocation=_UNIFORM,
                is_sparse: selection.IsSparse = None,
                contracting: selection.Axes | None = None,
                update_every: int = 100, update_begin: int = 0,
                update_end: int | None = None) -> PackedMethod:
  """RigL on packed weights: blocks enter where the dense gradient is large.

  At a step that refreshes, and only then, the backward pass also makes the
  score of every block of the dense gradient, a block at a time; the gradient
  itself never exists.

  Law: it makes the run of `rigl` with Block(block), slots included, for a
  weight that the model uses once.

  Args:
    sparsity, block, reduce, pad, allocation, is_sparse, contracting: as in
      `packed_static`.
    drop_fraction, update_every, update_begin, update_end: as in `rigl`.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> method = packed_rigl(0.9, block=(16, 16), update_end=750)

  Reference:
    Evci et al., RigL, 2020, https://arxiv.org/abs/1911.11134, as in `rigl`.
    A weight used several times is scored by the sum over its uses of the
    magnitudes, where the paper takes the magnitude of the sum.
  """
  cutting = _cutting(sparsity, allocation, block, reduce, pad, is_sparse,
                     contracting)
  window = assembly.refresh_window(update_every, update_begin, update_end)
  return _rewiring(cutting, window, drop_fraction, update_end, True)


def packed_top_kast(sparsity: float, *, block: tuple[int, int],
                    backward_sparsity: float, penalty_weight: float = 1e-4,
                    backward_selection: str = 'magnitude',
                    reduce: str = 'sum', pad: bool = False,
                    allocation=_UNIFORM, is_sparse: selection.IsSparse = None,
                    contracting: selection.Axes | None = None,
                    update_every: int = 100, update_begin: int = 0,
                    update_end: int | None = None) -> PackedMethod:
  """Top-KAST on packed weights: the device holds B, the host the rest.

  The reservoir C lies in the host's memory, where it cannot move; the blocks
  that overtake others are exchanged at refreshes, and nothing is between.

  Law: it makes the run of `top_kast` with Block(block), slots included.

  Args:
    sparsity, block, reduce, pad, allocation, is_sparse, contracting: as in
      `packed_static`; the sparsity is that of A.
    backward_sparsity, penalty_weight, backward_selection, update_every,
      update_begin, update_end: as in `top_kast`.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> method = packed_top_kast(0.9, backward_sparsity=0.8, block=(16, 16))

  Reference:
    Jayakumar et al., Top-KAST, 2020, https://arxiv.org/abs/2106.03517,
    sections 2 and 5: the device need never hold the dense parameters.
  """
  cutting = _cutting(sparsity, allocation, block, reduce, pad, is_sparse,
                     contracting)
  assembly.check_backward(sparsity, backward_sparsity, backward_selection)
  base.check_non_negative('penalty_weight', penalty_weight)
  window = assembly.refresh_window(update_every, update_begin, update_end)
  wider = cutting._replace(sites=cutting.sites.at(backward_sparsity))
  random = backward_selection == 'random'

  def pack(params, key=None):
    return _magnitude_pack(cutting, wider, random, params, key)

  def penalty(params, state):
    return _exploration(params, state.sparsities, penalty_weight)

  def refresh(params, slots, state, *, init, growth=None):
    del growth
    state = state._replace(step=state.step + 1)
    if not window(state.step):
      return params, slots, state
    return _exchange(params, slots, state, init, random)

  return PackedMethod(pack, penalty if penalty_weight else _no_penalty,
                      lambda state: False, refresh)


def packed_step(loss_fn: Callable[..., jax.Array], optimizer: Any, *,
                method: PackedMethod) -> Callable[..., Any]:
  """One training step of packed weights, its refresh included.

  Args:
    loss_fn: (params, *batch) -> float[], where the sparse leaves of `params`
      are PackedBlocks, for `packed_matmul` and `packed_conv`.
    optimizer: an Optax optimizer, unchanged.
    method: a method on packed weights.

  Raises:
    ValueError: if `method` is none.

  Returns:
    `step(params, slots, state, *batch) -> (params, slots, state, loss)` for
    the host: device work inside it is compiled once. `slots` start as
    `optimizer.init(partition_packed(params)[0])`. Params and slots are given
    up to it.

  Example:
    >>> import optax
    >>> from sparse_jax import packed_products
    >>> method, tx = packed_set(0.5, block=(2, 2)), optax.sgd(0.1)
    >>> params, state = method.pack({'kernel': jnp.ones((4, 4))})
    >>> loss = lambda p, x: packed_products.packed_matmul(x, p['kernel']).sum()
    >>> step = packed_step(loss, tx, method=method)
    >>> slots = tx.init(packed_lib.partition_packed(params)[0])
    >>> params, slots, state, value = step(params, slots, state, jnp.ones(4))
    >>> float(value), state.step
    (8.0, 1)
  """
  if not isinstance(method, PackedMethod):
    raise ValueError(f'`method` (={method!r}) must be a PackedMethod, such as '
                     'sparse_jax.packed_top_kast(...).')

  update = jax.jit(functools.partial(_update, loss_fn, optimizer, method),
                   static_argnums=3, donate_argnums=(0, 2))

  def step(params, slots, state, *batch):
    weights, indices = packed_lib.partition_packed(params)
    if method.grows(state):
      weights = packed_lib.ask_growth(weights)
    weights, slots, growth, loss = update(
        weights, indices, slots, tuple(state.sparsities.items()), *batch)
    params = packed_lib.combine_packed(weights, indices)
    params, slots, state = method.refresh(
        params, slots, state, init=optimizer.init, growth=growth)
    return params, slots, state, loss

  return step


def _update(loss_fn, optimizer, method, weights, indices, slots, sparsities,
            *batch):
  """What the device does in a step: weights, slots, growth scores, loss."""
  state = PackedState(0, (), dict(sparsities), {}, {})

  def total(weights):
    params = packed_lib.combine_packed(weights, indices)
    return loss_fn(params, *batch) + method.penalty(params, state)

  loss, grads = jax.value_and_grad(total)(weights)
  grads, growth = _split_growth(grads)
  weights = _without_growth(weights)
  updates, slots = optimizer.update(grads, slots, weights)
  weights = jax.tree.map(sites_lib.apply_update, weights, updates)
  return weights, slots, growth, loss


def rewire(params: base.PyTree, slots: Any, growth: dict[base.Path, jax.Array],
           key: jax.Array, *, fraction: Any,
           sparsities: dict[base.Path, float],
           init: Callable[[base.PyTree], Any]) -> tuple[base.PyTree, Any]:
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
  packed = _packed_leaves(params)
  moved, entered = {}, {}
  for index, (path, leaf) in enumerate(packed.items()):
    site = _site(path, index, leaf, sparsities[path])
    scores = growth[path] if growth else site.random_scores(key)
    moved[path], entered[path] = _rewire_leaf(site, leaf, scores, fraction)
  params = _with_packed(params, moved)
  weights = packed_lib.partition_packed(params)[0]
  return params, reset_slots(slots, init(weights), entered)


def reset_slots(slots: Any, fresh: Any, entered: dict[base.Path, jax.Array]
                ) -> Any:
  """Slots of blocks that entered as `optimizer.init` makes them.

  A slot is a leaf whose path ends with that of a packed leaf's blocks and
  that has their shape.
  """
  owners = {f'{path}/blocks'.lstrip('/'): mask
            for path, mask in entered.items()}

  if jax.tree.structure(slots) != jax.tree.structure(fresh):
    raise ValueError('`slots` must be a state of the optimizer whose `init` '
                     'is given, for the weights of `params`.')

  def visit(path, slot, new):
    mask = owners.get(base.owner_of(base.path_name(path), owners))
    if mask is None or getattr(slot, 'ndim', 0) != 3 or (
        slot.shape[0] != mask.size):
      return slot
    return jnp.where(mask[:, None, None], new, slot)

  return jax.tree.map_with_path(visit, slots, fresh)


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


def _exchange(params, slots, state, init, random):
  """Top-KAST's refresh: blocks change places between device and host."""
  packed = _packed_leaves(params)
  scores = {path: _tile_worth(leaf.blocks, leaf.reduce)
            for path, leaf in packed.items()}
  key = state_lib.step_key(state, state.step)
  moves, entered, going = {}, {}, {}
  for index, (path, leaf) in enumerate(packed.items()):
    state.worth[path][np.asarray(leaf.ids)] = np.asarray(scores[path])
    site = _site(path, index, leaf, state.sparsities[path])
    moves[path] = _moves(site, leaf, state.worth[path],
                         site.random_scores(key) if random else None)
    entered[path] = jnp.asarray(moves[path].entered)
    packed[path], going[path] = _swap_all(leaf, moves[path],
                                          state.reservoir[path])
  for path, parts in going.items():  # When all are under way.
    _store(state.reservoir[path], moves[path].leaving, parts)
  params = _with_packed(params, packed)
  if any(move.leaving.size for move in moves.values()):
    weights = packed_lib.partition_packed(params)[0]
    slots = _jitted_reset(init)(slots, weights, entered)
  return params, slots, state


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
  inner, outer = _sets(worth, site.count, ids.size, random_scores)
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


def _sets(worth, count, outer_count, random_scores=None):
  """bool[tiles], A and B, of the worth of every tile."""
  inner = packed_lib.best(worth, count)
  scores = worth if random_scores is None else np.asarray(
      random_scores).ravel()
  return inner, packed_lib.best(packed_lib.widened(inner, scores),
                                outer_count)


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


def _rewiring(cutting, window, drop_fraction, end, by_gradient):
  drop = assembly.drop_schedule(drop_fraction, end)

  @functools.lru_cache(maxsize=16)
  def jitted(init, sparsities):
    def run(params, slots, growth, key, step):
      key = jax.random.fold_in(jax.random.wrap_key_data(key), step)
      return rewire(params, slots, growth, key, fraction=drop(step),
                    sparsities=dict(sparsities), init=init)

    return jax.jit(run, donate_argnums=(0, 1))

  def refresh(params, slots, state, *, init, growth=None):
    state = state._replace(step=state.step + 1)
    if not window(state.step):
      return params, slots, state
    if by_gradient and not growth:
      raise ValueError('`growth` (=None) must hold the scores of the dense '
                       'gradient at a step that refreshes.')
    run = jitted(init, tuple(state.sparsities.items()))
    params, slots = run(params, slots, growth if by_gradient else {},
                        state.key, np.int32(state.step))
    return params, slots, state

  def grows(state):
    return by_gradient and bool(window(state.step + 1))

  return PackedMethod(_random_pack(cutting), _no_penalty, grows, refresh)


def _random_pack(cutting):
  """Packs blocks drawn at random."""
  def choose(leaf, tiles, key):
    grid = leaf.layout.group_shape
    scores = jax.random.uniform(jax.random.fold_in(key, leaf.index), grid)
    chosen = packed_lib.best(np.asarray(scores).ravel(), leaf.count)
    return chosen, chosen

  def pack(params, key=None):
    leaves = cutting.sites.leaves(params)
    return _pack_tree(cutting, params, leaves, key, choose)[:2]

  return pack


def _magnitude_pack(cutting, wider, random, params, key):
  """Packs B, and lays all tiles on the host."""
  leaves, outer = (c.sites.leaves(params) for c in (cutting, wider))
  worth = {}

  def choose(leaf, tiles, key):
    own = packed_lib.tile_worth(tiles, cutting.sites.structure.reduce)
    worth[leaf.path] = own
    scores = None
    if random:
      scores = jax.random.uniform(jax.random.fold_in(key, leaf.index),
                                  leaf.layout.group_shape)
    return _sets(own, leaf.count, max(outer[leaf.path].count, leaf.count),
                 scores)

  params, state, tiles = _pack_tree(cutting, params, leaves, key, choose)
  return params, state._replace(reservoir=tiles, worth=worth)


def _pack_tree(cutting, params, leaves, key, choose):
  """The tree with packed leaves, its state, and all tiles of those leaves.

  `choose(leaf, tiles, key)` gives the sets A and B.
  """
  data = np.asarray(state_lib.key_data(key))
  structure, tiles = cutting.sites.structure, {}

  def visit(path, weight):
    if path not in leaves:
      return jnp.asarray(weight)
    view = cutting.view(leaves[path], weight)
    tiles[path] = packed_lib.tile(view, structure.shape).copy()
    inner, outer = choose(leaves[path], tiles[path],
                          jax.random.wrap_key_data(data))
    return packed_lib.of_tiles(
        tiles[path], inner, outer, int(inner.sum()), int(outer.sum()),
        shape=view.shape, block=structure.shape, reduce=structure.reduce)

  packed = base.map_leaves(visit, params)
  sparsities = {path: leaf.sparsity for path, leaf in leaves.items()}
  return packed, PackedState(0, data, sparsities, {}, {}), tiles


def _exploration(params, sparsities, penalty_weight):
  """Top-KAST's exploration loss on packed leaves."""
  loss = jnp.float32(0)
  for path, leaf in _packed_leaves(params).items():
    squares = jnp.sum(jnp.square(leaf.blocks.astype(jnp.float32)), (1, 2))
    factor = jnp.float32(1)
    if leaf.forward is not None:
      spare = jnp.float32(1 / (1 - sparsities[path]))
      factor = jnp.full(squares.shape, spare).at[leaf.forward].set(1)
    loss += jnp.sum(squares * factor) / 2
  return penalty_weight * loss


def _no_penalty(params, state):
  del params, state
  return jnp.float32(0)


def _only_count(params, slots, state, *, init, growth=None):
  del init, growth
  return params, slots, state._replace(step=state.step + 1)


def _site(path, index, leaf, sparsity) -> sites_lib.Leaf:
  """The tiles of a packed leaf as entries that compete."""
  layout = masking.Layout(leaf.grid, (), (0,), structures.Unstructured())
  return sites_lib.Leaf(path, index, layout, sparsity)


def _packed_leaves(params) -> dict[base.Path, PackedBlocks]:
  return {base.path_name(path): leaf for path, leaf in
          jax.tree.leaves_with_path(params, is_leaf=packed_lib.is_packed)
          if packed_lib.is_packed(leaf)}


def _with_packed(params, packed):
  return jax.tree.map_with_path(
      lambda path, leaf: packed.get(base.path_name(path), leaf), params,
      is_leaf=packed_lib.is_packed)


def _split_growth(grads):
  """Gradients without scores, and the scores by path."""
  growth = {path: leaf.growth for path, leaf in _packed_leaves(grads).items()
            if leaf.growth is not None}
  return _without_growth(grads), growth


def _without_growth(weights):
  return packed_lib.map_packed(lambda leaf: leaf.replace(growth=None), weights)


def _cutting(sparsity, allocation, block, reduce, pad, is_sparse,
             contracting) -> _Cutting:
  base.check_bool('pad', pad)
  sites = sites_lib.Sites(sparsity, allocation,
                          structures.Block(block, reduce), is_sparse, (),
                          contracting)
  return _Cutting(sites.checked(), pad)
