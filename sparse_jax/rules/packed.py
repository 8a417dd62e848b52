"""Packed storage: of a sparse leaf only the kept blocks exist.

Parameters, gradients and optimizer slots hold the blocks; the state holds
where each belongs. A block that enters takes the position of one that leaves,
so that slots need no move and shapes never change. Blocks that keep their
values while they are outside B lie in the host's memory, the reservoir.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax import trees
from sparse_jax.blocks import growth as growth_lib
from sparse_jax.blocks import packing
from sparse_jax.masks import marks as marks_lib
from sparse_jax.masks import placing
from sparse_jax.masks import structures
from sparse_jax.rules import now as now_lib
from sparse_jax.rules import reservoir as reservoir_lib
from sparse_jax.rules import state as state_lib
from sparse_jax.rules import storage as storage_lib
from sparse_jax.rules import updates as updates_lib
from sparse_jax.rules.make_method import make_method


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Place:
  """Where the stored blocks of one leaf belong, and what is not stored.

  The axes of stacked layers stand in front of those named here.
  """

  # int32[n], the tile of each stored block, counted row by row.
  ids: jax.Array
  forward: jax.Array | None  # int32[m], the positions of A; None: all.
  # float[layers * tiles, rows, columns] in host memory, every tile of the
  # weight; those that are stored are out of date. None: the others are 0.
  reservoir: jax.Array | None
  magnitudes: jax.Array | None  # float[tiles], the scores of the reservoir.


def packed(method: state_lib.SparseMethod) -> state_lib.SparseMethod:
  """The same method, storing only the blocks that it keeps.

  Same loop, same optimizer, same checkpoint: `start` packs the parameters, and
  `with_method` multiplies by blocks in a model that needs no edit. Weights,
  gradients and slots take the memory of the backward density.

  Law: the packed run is the masked run with the same `Block` structure; the
  choices are equal, and values are to the rounding of the products' sums.

  Args:
    method: one whose counts stay the same, with `structure=Block(...)`:
      `static`, `fixed`, `set_`, `rigl`, `itop`, `mest` (EM), `dnw`, `top_kast`.

  Returns:
    A SparseMethod. Its state is made by `start`.

  Raises:
    ValueError: for any other method, saying why; from `start`, for a leaf
      that is no stack of matrices.

  Example:
    >>> import optax, sparse_jax
    >>> block = sparse_jax.Block((2, 2))
    >>> method = packed(sparse_jax.rigl(.5, structure=block))
    >>> tx = sparse_jax.sparsify(optax.sgd(.1), method)
    >>> params = {'kernel': jnp.ones((4, 4))}
    >>> params, opt_state = sparse_jax.start(tx, method, params)
    >>> params['kernel'].blocks.shape
    (2, 2, 2)

  Reference:
    Jayakumar et al., Top-KAST, 2020, https://arxiv.org/abs/2106.03517,
    sections 2 and 5: the device need never hold the dense parameters.
    Deviations: of a weight that is used several times RigL's growth scores are
    summed over its uses (and under `optax.MultiSteps` over its batches), where
    the masked method takes the magnitude of the summed gradient.
  """
  rule: Any = getattr(method, 'rule', None)
  why = 'it is not made of one rule on groups' if rule is None else (
      rule.unpackable)
  if not why and not isinstance(rule.sites.structure, structures.Block):
    why = f'it needs structure=Block(...), not {rule.sites.structure}'
  if not why and rule.gradient == 'all' and not rule.zeros:
    why = 'it needs the gradient of weights that are hidden'
  if why:
    name = getattr(method, 'name', repr(method))
    raise ValueError(f'`method` (={name}) cannot be packed: {why}.')
  return make_method(rule, PACKED)


def _tiles(leaf, weight):
  """[stacked..., tiles, rows, columns]; on the host if the weight is."""
  layout = leaf.layout
  view, block = layout.view(weight), layout.structure.shape
  stack = view.shape[:len(layout.stacked)]
  flat = view.reshape(-1, *view.shape[len(stack):])
  cut = functools.partial(packing.tile, block=block)
  tiles = (np.stack([cut(slice_) for slice_ in flat])
           if isinstance(weight, np.ndarray) else jax.vmap(cut)(flat))
  return tiles.reshape(*stack, *tiles.shape[1:])


def _of_slices(layout, groups):
  """[stacked..., tiles] of an array of the groups' shape."""
  return groups.reshape(*groups.shape[:len(layout.stacked)], -1)


def _per_slice(leaf, fn):
  """fn mapped over the stacked layers."""
  for _ in leaf.layout.stacked:
    fn = jax.vmap(fn)
  return fn


def _counts(rule, leaf) -> tuple[int, int]:
  """Blocks of A and of B of one slice."""
  layout = leaf.layout
  stack = math.prod(layout.shape[i] for i in layout.stacked)
  total = math.prod(layout.group_shape) // max(stack, 1)
  each = total // max(layout.rivals, 1)
  outer = leaf.backward_count if rule.gradient == 'B' else leaf.count
  return leaf.count * each, outer * each


def _hides(rule, leaf) -> bool:
  """Whether blocks that are not stored keep their values."""
  return not rule.zeros and _counts(rule, leaf)[1] < leaf.layout.rivals * (
      _counts(rule, leaf)[0] // leaf.count)


def _place(rule, leaf, weight, marks) -> Place:
  inner, outer = _counts(rule, leaf)
  levels = _of_slices(leaf.layout, marks)

  def find(levels):
    ids = _find(leaf, marks_lib.backward_mask(levels), outer)
    return ids.astype(jnp.int32), _forward(levels, ids, inner)

  ids, forward = _per_slice(leaf, find)(levels)
  if not _hides(rule, leaf):
    return Place(ids, forward, None, None)
  tiles = placing.whole(functools.partial(_tiles, leaf), weight)
  scores = packing.tile_scores(jnp.asarray(tiles), leaf.layout.structure.reduce)
  flat = tiles.reshape(-1, *tiles.shape[-2:])
  return Place(ids, forward, jax.device_put(flat, reservoir_lib.HOST), scores)


def _find(leaf, wanted, size: int):
  """int[size]: the tiles of a slice that are wanted, row by row.

  Column by column if they are balanced: then each column keeps its positions.
  """
  if not leaf.layout.structure.balanced:
    return jnp.flatnonzero(wanted, size=size)
  columns = leaf.layout.group_shape[-1]
  order = np.arange(wanted.size).reshape(-1, columns).T.ravel()
  return jnp.asarray(order)[jnp.flatnonzero(wanted[order], size=size)]


def _forward(levels, ids, inner: int):
  """int32[m]: the positions of A among the stored blocks; None for all."""
  if inner == ids.shape[0]:
    return None
  inside = marks_lib.forward_mask(levels[ids])
  return jnp.flatnonzero(inside, size=inner).astype(jnp.int32)


def _pack(rule, leaf, weight, place) -> packing.PackedBlocks:
  """The stored blocks of a dense weight, with no more than floating arrays."""
  layout, ids = leaf.layout, place.ids
  pick = lambda xp, weight, ids: xp.take_along_axis(
      _tiles(leaf, weight), ids[..., None, None], -3)
  if isinstance(weight, np.ndarray):
    blocks = pick(np, weight, np.asarray(ids))
  else:
    blocks = placing.whole(functools.partial(pick, jnp), weight, ids)
  stack, growth = ids.shape[:-1], None
  shape = layout.view_shape[len(stack):]
  if rule.gradient == 'all':
    grid = packing.grid_of(shape, layout.structure.shape)
    growth = jnp.zeros((*stack, *grid), jnp.float32)
  return packing.PackedBlocks(
      jnp.asarray(blocks), growth=growth, shape=shape,
      block=layout.structure.shape, reduce=layout.structure.reduce,
      balanced=layout.structure.balanced)


def _joined(plan, params):
  """Bare arrays of blocks (NNX) as PackedBlocks with their growth scores."""
  growth = {}
  if growth_lib.has_bare_growth(params):
    growth = trees.leaves_by_path(params[growth_lib.GROWTH])
    params = growth_lib.without_growth(params)

  def visit(path, stored):
    leaf = plan.by_path.get(path)
    if leaf is None or packing.is_packed(stored) or stored.ndim != 3 + len(
        leaf.layout.stacked):
      return stored
    structure = leaf.layout.structure
    return packing.PackedBlocks(
        stored, growth=growth.get(path), block=structure.shape,
        shape=leaf.layout.view_shape[len(leaf.layout.stacked):],
        reduce=structure.reduce, balanced=structure.balanced)

  return trees.map_leaves(visit, params, is_leaf=packing.is_packed)


def _read(rule, leaf, stored, marks, place, due) -> packing.PackedBlocks:
  """The stored blocks, with where they belong."""
  del marks
  if not packing.is_packed(stored):
    raise ValueError(f'`params` has an array at {leaf.path!r}, where the state '
                     'has blocks: use start(tx, method, params).')
  columns, growth = stored.grid[1], stored.growth
  if growth is not None:  # A loop may have cast all parameters to bfloat16.
    growth = growth.astype(jnp.float32)
  due = None if growth is None else jnp.asarray(due)
  if rule.gradient == 'all' and due is not None and place.ids.ndim > 1:
    due = jnp.broadcast_to(due, place.ids.shape[:-1])
  return stored.replace(rows=place.ids // columns, columns=place.ids % columns,
                        forward=place.forward, growth=growth, due=due)


class _PackedNow(now_lib.Now):
  """The scores of all groups, of which some are stored."""

  def __init__(self, leaf, step, key, *, growth, place, **seen):
    super().__init__(leaf, step, key, **seen)
    self._growth, self._place = growth, place

  @functools.cached_property
  def magnitudes(self):
    scores = packing.tile_scores(self._weight,
                                 self.leaf.layout.structure.reduce)
    return self._everywhere(scores, self._place.magnitudes)

  @functools.cached_property
  def gradient_magnitudes(self):
    if self._growth is None:
      raise ValueError(f'`grads` has no growth scores for {self.leaf.path!r}: '
                       'it must be the gradient of the parameters that `start` '
                       'gave.')
    return self._growth.reshape(self.leaf.layout.group_shape)

  @functools.cached_property
  def sums(self):
    over = (-2, -1)
    by_sum = self.leaf.layout.structure.reduce == 'sum'
    wide = self._weight.astype(jnp.float32) if by_sum else self._weight
    return self._everywhere(jnp.sum(wide, over) if by_sum
                            else jnp.max(wide, over), None)

  def score(self, fn):
    raise ValueError('`score` of entries is not known where weights are '
                     'packed; use magnitudes, gradient_magnitudes or random.')

  def _everywhere(self, scores, others):
    """The groups' array of scores of stored blocks, and of the others."""
    layout, ids = self.leaf.layout, self._place.ids
    if others is None:
      stack = ids.shape[:-1]
      tiles = math.prod(layout.group_shape) // max(math.prod(stack), 1)
      others = jnp.zeros((*stack, tiles), scores.dtype)
    put = lambda others, ids, scores: others.at[ids].set(scores)
    full = _per_slice(self.leaf, put)(others, ids, scores)
    return full.reshape(layout.group_shape)


def _exchange(rule, leaf, place, old, new, param, update):
  """The new places after a refresh, and the update that brings blocks in."""
  del old
  inner, _ = _counts(rule, leaf)
  levels = _of_slices(leaf.layout, new)

  def move(levels, ids):
    """The tiles at all positions, and which positions changed hands."""
    wanted = marks_lib.backward_mask(levels)
    stored = jnp.zeros(wanted.shape, bool).at[ids].set(True)
    entering = _find(leaf, wanted & ~stored, ids.size)
    free = ~wanted[ids]
    rank = jnp.cumsum(free) - 1  # The k-th that is free takes the k-th.
    enters = free & (rank < jnp.sum(wanted & ~stored))
    after = jnp.where(enters, entering[jnp.maximum(rank, 0)], ids)
    after = after.astype(jnp.int32)
    return after, enters, _forward(levels, after, inner)

  ids, enters, forward = _per_slice(leaf, move)(levels, place.ids)
  if place.magnitudes is None:
    return Place(ids, forward, None, None), update
  blocks = updates_lib.apply_update(param, update)
  scores = packing.tile_scores(blocks, leaf.layout.structure.reduce)
  put = lambda known, ids, scores: known.at[ids].set(scores)
  magnitudes = _per_slice(leaf, put)(place.magnitudes, place.ids, scores)
  if place.reservoir is None:  # Under vmap: `reservoir.conditional` does it.
    return Place(ids, forward, None, magnitudes), update
  reservoir, update = reservoir_lib.swap(place.reservoir, enters, place.ids,
                                         ids, blocks, param, update)
  return Place(ids, forward, reservoir, magnitudes), update


PACKED = storage_lib.Storage(
    'packed', place=_place, now=_PackedNow, exchange=_exchange, read=_read,
    pack=_pack, moves_weights=_hides, is_leaf=packing.is_packed,
    settled=reservoir_lib.settled, conditional=reservoir_lib.conditional,
    joined=_joined)


def dense_weights(method: state_lib.SparseMethod, params: trees.PyTree,
                  opt_state: Any) -> trees.PyTree:
  """What the forward pass sees, as plain arrays in the model's own tree.

  For export and analysis: blocks are put where they belong, and everything
  that is not kept is 0.

  Args:
    method: the method.
    params: as the optimizer holds them.
    opt_state: an Optax state that contains the method's.

  Returns:
    The model's tree of arrays.

  Example:
    >>> import sparse_jax
    >>> method = sparse_jax.static(.75)
    >>> params = {'kernel': jnp.ones((4, 4))}
    >>> weights = dense_weights(method, params, method.init(params))
    >>> float(weights['kernel'].sum())
    4.0
  """
  plan = state_lib.get_state(opt_state).plan

  def visit(path, weight):
    if not packing.is_packed(weight):
      return weight
    leaf = plan.by_path[path]
    return leaf.layout.unview(_per_slice(leaf, packing.unpack)(weight))

  return trees.map_leaves(visit, method.read(params, opt_state),
                          is_leaf=packing.is_packed)
