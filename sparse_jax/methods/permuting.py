"""Permuted blocks: units in an order in which few tiles hold most weights."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax import checks
from sparse_jax import trees
from sparse_jax.masks import layouts
from sparse_jax.masks import selection
from sparse_jax.masks import structures

_LEAST_GAIN = 1e-3  # Of what is kept; a round that gains less is the last.

# {path of an array: the axis along which it has these units}.
Units = Mapping[trees.Path, int]


class _Member(NamedTuple):
  """An axis of a leaf that is cut into tiles."""

  path: trees.Path
  axis: int  # Of the view: -2 or -1.


def permute_units(params: trees.PyTree, units: Sequence[Units], *,
                  sparsity: float, structure: structures.Block,
                  scores: trees.PyTree | None = None,
                  is_sparse: selection.IsSparse = None,
                  batch_axes: selection.Axes = (),
                  contracting: selection.Axes | None = None
                  ) -> tuple[trees.PyTree, list[np.ndarray]]:
  """Orders a network's units so that the best blocks hold the most.

  Hidden units have no order of their own: permuting the outputs of one layer
  and the inputs of the next together changes nothing. So units whose weights
  are large at the same inputs and outputs are gathered into the same tiles,
  before tiles are chosen: by `one_shot`, `fixed`, or any method with the same
  structure. What runs afterwards has plain blocks, and costs nothing more.

  From the order of the units' sums, two steps take turns until they gain less
  than a thousandth: the best tiles are chosen, and each set of units in turn
  is distributed over the places in the way that puts most into these tiles, an
  assignment problem that is solved exactly. The end is the best for each step
  alone, not for all orders.

  Laws: the permuted network computes what it did, to the order of sums, if the
  units are stated fully; and the scores that the best tiles hold are never
  less than before.

  Args:
    params: tree of arrays.
    units: sets of axes that number the same units, each permuted as one:
      `{path: axis}` of every array that has them. Of a hidden layer those are
      the outputs of its kernel, its bias and normalisation, and the inputs of
      whatever reads it; of a residual stream all that writes or reads it. A
      set of inputs of the network alone is permuted too, and they must then be
      given in the order that is returned.
    sparsity: fraction of the tiles of each leaf that will be dropped.
    structure: Block(...), with the sum as a tile's score.
    scores: tree of float >= 0 like `params`, what each weight is worth; None:
      its magnitude. Each leaf's are taken relative to their sum.
    is_sparse: which leaves will have blocks, as in `static`; the others are
      permuted with their units and have no say.
    batch_axes: axes that stack layers, as in `static`. Their units are
      permuted alike.
    contracting: the axes that products sum over, as in `static`.

  Returns:
    The permuted tree, and for each set int[units]: the old place of each unit.

  Raises:
    ValueError: for an unknown path, an axis that is no input or output of its
      leaf, or sets that do not fit.

  Example:
    >>> net = {'a': jnp.array([[3., 0.], [0., 1.], [2., 0.], [0., 1.]])}
    >>> better, orders = permute_units(net, [{'a': 0}], sparsity=.5,
    ...                                structure=structures.Block((2, 1)))
    >>> better['a'].tolist(), orders[0].tolist()
    ([[3.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 1.0]], [0, 2, 1, 3])

  Reference:
    Pool and Yu, Channel permutations for N:M sparsity, 2021, the symmetry
    and magnitude kept as the aim, for N:M and by exchanges,
    https://openreview.net/forum?id=WAO1STUPWPP. Tyagi et al., PA-DST, 2025,
    https://arxiv.org/abs/2510.14812, learn an order of each layer's inputs
    instead, while training, and gather by it.
  """
  checks.check_sparsity('sparsity', sparsity)
  structures.check_structure(structure)
  if getattr(structure, 'reduce', None) != 'sum':
    raise ValueError(f'`structure` (={structure!r}) must be Block(...) with '
                     'reduce=\'sum\'.')
  arrays = trees.leaves_by_path(params)
  worth = arrays if scores is None else trees.leaves_by_path(scores)
  units = [_checked(group, arrays) for group in units]
  _check_apart(units)
  search = _Search(sparsity)
  for path, leaf in selection.select(params, is_sparse, batch_axes).items():
    if any(path in group for group in units):
      search.add(_layout(path, leaf, structure, batch_axes, contracting),
                 path, _shares(worth, path, leaf.shape))
  members = [search.members(group) for group in units]
  orders = search.run(
      members, [arrays[path].shape[axis] for path, axis in map(_first, units)])
  return _permuted(params, units, orders), orders


def _permuted(params, units, orders):
  def visit(path, leaf):
    for group, order in zip(units, orders):
      if path in group:
        leaf = jnp.take(leaf, order, axis=group[path])
    return leaf

  return trees.map_leaves(visit, params)


def _first(group: Units):
  return next(iter(group.items()))


def _checked(group, arrays) -> dict[trees.Path, int]:
  """The group with its axes made positive."""
  if not isinstance(group, Mapping) or not group:
    raise ValueError(f'`units` has {group!r}, which is no mapping of paths to '
                     'axes.')
  found: dict[trees.Path, int] = {}
  sizes = set()
  for path, axis in group.items():
    shape = getattr(arrays.get(path), 'shape', None)
    if shape is None:
      raise ValueError(f'`units` names {path!r}, which is none of '
                       f'{sorted(arrays)}.')
    if not -len(shape) <= axis < len(shape):
      raise ValueError(f'`units` names axis {axis} of {path!r}, of shape '
                       f'{shape}.')
    found[path] = axis % len(shape)
    sizes.add(shape[axis])
  if len(sizes) > 1:
    raise ValueError(f'`units` has {group!r}, whose axes have different sizes, '
                     f'{sorted(sizes)}.')
  return found


def _check_apart(units) -> None:
  seen: set[tuple[trees.Path, int]] = set()
  for group in units:
    both = seen & set(group.items())
    if both:
      raise ValueError(f'`units` names {sorted(both)} in two sets.')
    seen |= set(group.items())


def _layout(path, leaf, structure, batch_axes, contracting):
  return layouts.layout(
      leaf.shape, path=path, structure=structure, contracting=contracting,
      batch_axes=selection.batch_axes_of(batch_axes, path, leaf))


def _shares(worth, path, shape) -> jax.Array:
  """What each entry is worth, as a share of its leaf."""
  entries = worth.get(path)
  if getattr(entries, 'shape', None) != shape:
    raise ValueError(f'`scores` must have an array of shape {shape} at '
                     f'{path!r}.')
  magnitudes = jnp.abs(entries.astype(jnp.float32))
  total = jnp.sum(magnitudes)
  return magnitudes / jnp.where(total > 0, total, 1)


class _Search:
  """Leaves as matrix views, and the search for an order of their axes."""

  def __init__(self, sparsity: float):
    self._sparsity = sparsity
    self._layouts: dict[trees.Path, layouts.Layout] = {}
    self._views: dict[trees.Path, np.ndarray] = {}

  def add(self, layout: layouts.Layout, path: trees.Path, shares) -> None:
    self._layouts[path] = layout
    self._views[path] = np.asarray(layout.view(shares))

  def members(self, group: Units) -> list[_Member]:
    """The axes of a group along which leaves are cut into tiles."""
    found = []
    for path, axis in group.items():
      layout = self._layouts.get(path)
      if layout is None:
        continue
      if (axis,) not in (layout.rows, layout.columns):
        raise ValueError(
            f'`units` names axis {axis} of {path!r}, but only its inputs '
            f'(={layout.rows}) or outputs (={layout.columns}), if they are '
            'one axis, can be permuted.')
      found.append(_Member(path, -2 if (axis,) == layout.rows else -1))
    return found

  def run(self, members, sizes) -> list[np.ndarray]:
    """The best order found of each set of units."""
    from scipy import optimize  # It takes as long to import as JAX.

    start, first = dict(self._views), self._kept()
    orders = [np.arange(size) for size in sizes]
    for i, group in enumerate(members):  # The largest units first.
      sums = sum((_sums(start[path], axis) for path, axis in group),
                 np.zeros(sizes[i]))
      self._move(orders, i, group, np.argsort(-sums, kind='stable'))
    best = self._kept()
    while True:
      for i, group in enumerate(members):
        if group:
          worth = np.sum([self._worth(*member) for member in group], 0)
          _, units = optimize.linear_sum_assignment(worth.T, maximize=True)
          self._move(orders, i, group, units)
      last, best = best, self._kept()
      if best <= last * (1 + _LEAST_GAIN):
        break
    return orders if best > first else [np.arange(size) for size in sizes]

  def _move(self, orders, i, group, places) -> None:
    orders[i] = orders[i][places]
    for path, axis in group:
      self._views[path] = np.take(self._views[path], places, axis)

  def _tiles(self, path):
    """Scores of the tiles, and which of them are kept."""
    layout = self._layouts[path]
    groups = layout.structure.group(self._views[path], len(layout.stacked))
    kept = layout.top(groups, layout.keep_count(self._sparsity))
    return np.asarray(groups), np.asarray(kept)

  def _kept(self) -> float:
    """The sum of the shares that the best tiles hold."""
    return float(sum(np.sum(groups, where=kept, dtype=np.float64)
                     for groups, kept in map(self._tiles, self._views)))

  def _worth(self, path, axis) -> np.ndarray:
    """float[units, places]: what the tiles keep of each unit at each place."""
    view, (_, kept) = self._views[path], self._tiles(path)
    structure: Any = self._layouts[path].structure
    block, other = structure.shape, -3 - axis
    wide = np.repeat(kept.astype(view.dtype), block[other], other)
    wide = np.take(wide, range(view.shape[other]), other)
    units, places = (np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
                     for array in (view, wide))
    return np.repeat(units @ places.T, block[axis], 1)[:, :len(units)]


def _sums(view, axis) -> np.ndarray:
  return np.moveaxis(view, axis, 0).reshape(view.shape[axis], -1).sum(1)
