"""A model's parameters with packed leaves: cut on the host, found by path.

Which leaves are cut, and how many tiles of each are kept, is said by the same
sites as for masks; random choices are those of the simulated methods.
"""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax import checks

from sparse_jax import trees
from sparse_jax.masks import masking
from sparse_jax.blocks import packing as packed_lib
from sparse_jax.masks import selection
from sparse_jax.rules import sites as sites_lib
from sparse_jax.rules import state as state_lib
from sparse_jax.masks import structures
from sparse_jax.blocks.packing import PackedBlocks


class PackedState(NamedTuple):
  """What a method on packed weights remembers, all of it on the host."""

  step: int  # Updates done.
  key: np.ndarray  # uint32[...], raw data of a PRNG key.
  sparsities: dict[trees.Path, float]  # Of A, leaf by leaf, as asked for.
  # Top-KAST: every tile of the weight, [tiles, rows, columns]; those of B are
  # out of date. And what each is worth.
  reservoir: dict[trees.Path, np.ndarray]
  worth: dict[trees.Path, np.ndarray]


class Cutting(NamedTuple):
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


def make_cutting(sparsity: float, allocation: Any, block: tuple[int, int],
                 reduce: str, pad: bool, is_sparse: selection.IsSparse,
                 contracting: selection.Axes | None) -> Cutting:
  """The cutting that the arguments of a method say.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> from sparse_jax.masks import allocations as allocation
    >>> cutting = make_cutting(.5, allocation.uniform, (2, 2), 'sum', False,
    ...                        None, None)
    >>> params, _ = pack_random(cutting, {'kernel': jnp.ones((4, 4))})
    >>> params['kernel'].blocks.shape
    (2, 2, 2)
  """
  checks.check_bool('pad', pad)
  sites = sites_lib.Sites(sparsity, allocation,
                          structures.Block(block, reduce), is_sparse, (),
                          contracting)
  return Cutting(sites.checked(), pad)


def pack_random(cutting: Cutting, params: trees.PyTree, key: Any = None
                ) -> tuple[trees.PyTree, PackedState]:
  """Packs blocks drawn at random.

  Args:
    cutting: where, and into what tiles.
    params: dense tree.
    key: None, an int or a typed key.

  Raises:
    ValueError: naming a leaf that the tiles do not fit.
  """
  def choose(leaf, tiles, key):
    del tiles
    chosen = packed_lib.best(_drawn(leaf, key), leaf.count)
    return chosen, chosen

  return _pack_tree(cutting, params, cutting.sites.leaves(params), key,
                    choose)[:2]


def pack_largest(cutting: Cutting, wider: Cutting, random: bool,
                 params: trees.PyTree, key: Any = None
                 ) -> tuple[trees.PyTree, PackedState]:
  """Packs the blocks of B, and keeps every tile on the host.

  Args:
    cutting: of A, by magnitude.
    wider: of B.
    random: whether B outside A is drawn at random.
    params, key: as in `pack_random`.

  Raises:
    ValueError: naming a leaf that the tiles do not fit.
  """
  leaves, outer = (c.sites.leaves(params) for c in (cutting, wider))
  worth = {}

  def choose(leaf, tiles, key):
    worth[leaf.path] = own = packed_lib.tile_worth(
        tiles, cutting.sites.structure.reduce)
    count = max(outer[leaf.path].count, leaf.count)
    return largest_sets(own, leaf.count, count,
                        _drawn(leaf, key) if random else None)

  params, state, tiles = _pack_tree(cutting, params, leaves, key, choose)
  return params, state._replace(reservoir=tiles, worth=worth)


def largest_sets(worth: np.ndarray, count: int, outer_count: int,
                 random_scores: np.ndarray | None = None
                 ) -> tuple[np.ndarray, np.ndarray]:
  """bool[tiles], A and B: the tiles worth most, B drawn if there are scores.

  Example:
    >>> largest_sets(np.array([3., 1., 2.]), 1, 2)
    (array([ True, False, False]), array([ True, False,  True]))
  """
  inner = packed_lib.best(worth, count)
  scores = worth if random_scores is None else np.ravel(random_scores)
  return inner, packed_lib.best(packed_lib.widened(inner, scores),
                                outer_count)


def packed_leaves(params: trees.PyTree) -> dict[trees.Path, PackedBlocks]:
  """The packed leaves of a tree by path, in the tree's order."""
  return {trees.path_name(path): leaf for path, leaf in
          jax.tree.leaves_with_path(params, is_leaf=packed_lib.is_packed)
          if packed_lib.is_packed(leaf)}


def with_packed(params: trees.PyTree, packed: dict[trees.Path, PackedBlocks]
                ) -> trees.PyTree:
  """The tree with other packed leaves."""
  return jax.tree.map_with_path(
      lambda path, leaf: packed.get(trees.path_name(path), leaf), params,
      is_leaf=packed_lib.is_packed)


def tile_site(path: trees.Path, index: int, leaf: PackedBlocks,
              sparsity: float) -> sites_lib.Leaf:
  """The tiles of a packed leaf as entries that compete."""
  layout = masking.Layout(leaf.grid, (), (0,), structures.Unstructured())
  return sites_lib.Leaf(path, index, layout, sparsity)


def split_growth(grads: trees.PyTree
                 ) -> tuple[trees.PyTree, dict[trees.Path, jax.Array]]:
  """Gradients without the scores of tiles, and the scores by path."""
  growth = {path: leaf.growth for path, leaf in packed_leaves(grads).items()
            if leaf.growth is not None}
  return without_growth(grads), growth


def without_growth(weights: trees.PyTree) -> trees.PyTree:
  """Undoes `packed.ask_growth`."""
  return packed_lib.map_packed(lambda leaf: leaf.replace(growth=None), weights)


def _drawn(leaf, key) -> np.ndarray:
  """A random score of each tile, as the simulated methods draw it."""
  key = jax.random.fold_in(key, leaf.index)
  return np.asarray(jax.random.uniform(key, leaf.layout.group_shape)).ravel()


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

  packed = trees.map_leaves(visit, params)
  sparsities = {path: leaf.sparsity for path, leaf in leaves.items()}
  return packed, PackedState(0, data, sparsities, {}, {}), tiles
