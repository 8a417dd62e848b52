"""What masks leave of a function: the weights that are on a path at all.

A weight that is kept, but that no input reaches or that reaches no output,
does nothing. At high sparsity they are many, and a layer of which none is
left explains a net that does not train.
"""

from collections.abc import Callable
import functools
import math
from typing import Any
from typing import NamedTuple

import jax
import numpy as np

from sparse_jax import trees
from sparse_jax.jaxprs import paths
from sparse_jax.masks import layouts
from sparse_jax.masks import selection


class LeafPaths(NamedTuple):
  """What is on a path of one leaf."""

  path: trees.Path
  size: int  # Its entries.
  kept: int  # Those in the mask.
  on_path: int  # Those of them on a path from an input to an output.
  units: int  # Its outputs; 0 of a vector.
  dead_units: int  # Those that no path leads to through this leaf.

  @property
  def sparsity(self) -> float:
    return 1 - self.kept / self.size

  @property
  def effective_sparsity(self) -> float:
    return 1 - self.on_path / self.size

  @property
  def collapsed(self) -> bool:
    """Whether none of its entries is on a path."""
    return not self.on_path


class Connectivity(NamedTuple):
  """What is on a path of all leaves that have a mask; printable."""

  leaves: tuple[LeafPaths, ...]

  @property
  def sparsity(self) -> float:
    """The fraction of entries outside the masks."""
    return 1 - self._total('kept') / self._total('size')

  @property
  def effective_sparsity(self) -> float:
    """The fraction of entries that are on no path."""
    return 1 - self._total('on_path') / self._total('size')

  @property
  def dead_units(self) -> int:
    return self._total('dead_units')

  @property
  def collapsed(self) -> tuple[trees.Path, ...]:
    """The leaves none of whose entries is on a path."""
    return tuple(leaf.path for leaf in self.leaves if leaf.collapsed)

  def _total(self, field: str) -> int:
    return sum(getattr(leaf, field) for leaf in self.leaves)

  def __str__(self) -> str:
    rows: list[tuple[str, ...]] = [
        ('leaf', 'entries', 'sparsity', 'effective', 'dead units')]
    rows += [_row(leaf) for leaf in self.leaves]
    rows.append(_row(LeafPaths('total', *(
        self._total(field) for field in LeafPaths._fields[1:]))))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join('  '.join(
        cell.rjust(width) if i else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(row, widths))) for row in rows)


def effective_sparsity(fn: Callable[..., Any], masks: trees.PyTree,
                       *inputs: Any, params: trees.PyTree | None = None
                       ) -> float:
  """The fraction of weights that is zero or on no path through a function.

  Laws: it is at least the sparsity of the masks, and equal to it where every
  unit has a kept weight on each side.

  Args:
    fn: `fn(weights, *inputs)`, any function of arrays; `effective_masks` of
      `sparse_jax.jaxprs.paths` says what counts as a path.
    masks: a tree of bool[...] like the parameters; None for a leaf that is
      never sparse, which is not counted.
    *inputs: trees of arrays or of jax.ShapeDtypeStruct; one example is enough.
    params: the parameters, or their shapes. Needed where None in `masks`
      stands for what is more than a bias or a scale.

  Returns:
    A number in [0, 1].

  Raises:
    ValueError: if `masks` holds no mask, or `fn` cannot take its leaves.

  Example:
    >>> import jax.numpy as jnp
    >>> masks = {'a': jnp.array([[1, 1, 0]], bool),
    ...          'b': jnp.array([[1], [0], [1]], bool)}
    >>> fn = lambda weights, x: jnp.tanh(x @ weights['a']) @ weights['b']
    >>> round(effective_sparsity(fn, masks, jnp.ones((1, 1))), 3)
    0.667

  Reference:
    Vysogorets and Kempe, Connectivity matters, 2021,
    https://arxiv.org/abs/2107.02306, section 3.
  """
  return connectivity(fn, masks, *inputs, params=params).effective_sparsity


def connectivity(fn: Callable[..., Any], masks: trees.PyTree, *inputs: Any,
                 params: trees.PyTree | None = None,
                 batch_axes: selection.Axes = (),
                 contracting: selection.Axes | None = None) -> Connectivity:
  """Sparsity, effective sparsity, dead units and collapse, leaf by leaf.

  A unit is an output of a leaf: a column of a matrix, a filter, a head's
  dimension. It is dead if no weight of the leaf into it is on a path: nothing
  is heard through it, or it is heard by nothing. A leaf without a weight on a
  path has collapsed.

  Args:
    fn: `fn(weights, *inputs)`.
    masks: a tree of bool[...] like the parameters; None for a leaf that is
      never sparse.
    *inputs: everything else that `fn` takes.
    params: the parameters, or their shapes; see `effective_sparsity`.
    batch_axes: axes that stack layers, whose units are counted apart: a
      tuple, or a function of path and leaf.
    contracting: the axes that a product sums over, alike; by default they are
      known by the leaf's name and number of axes.

  Returns:
    A Connectivity, printable.

  Raises:
    ValueError: as `effective_sparsity`, or naming the axes that do not fit.

  Example:
    >>> import jax.numpy as jnp
    >>> masks = {'a': jnp.array([[1, 1, 0]], bool),
    ...          'b': jnp.array([[0], [0], [1]], bool)}
    >>> fn = lambda weights, x: jnp.tanh(x @ weights['a']) @ weights['b']
    >>> found = connectivity(fn, masks, jnp.ones((1, 1)))
    >>> print(found)
    leaf   entries  sparsity  effective  dead units
    a            3    33.33%    100.00%      3 of 3
    b            3    66.67%    100.00%      1 of 1
    total        6    50.00%    100.00%      4 of 4
    >>> found.collapsed
    ('a', 'b')
  """
  on_path = trees.leaves_by_path(
      paths.effective_masks(fn, masks, *inputs, params=params))
  return Connectivity(tuple(
      _of_leaf(path, np.asarray(mask), np.asarray(on_path[path]), batch_axes,
               contracting)
      for path, mask in trees.leaves_by_path(masks).items()
      if paths.is_mask(mask)))


def on_path(fn: Callable[..., Any], masks: trees.PyTree, params: trees.PyTree,
            inputs: tuple[Any, ...]) -> trees.PyTree:
  """`paths.effective_masks`, compiled once for a function and its shapes.

  Args:
    fn: `fn(weights, *inputs)`. It is kept, and what it closes over, until
      others have come after it.
    masks: a tree of bool[...] like the parameters; None for a leaf that is
      never sparse.
    params: the parameters, or their shapes.
    inputs: arrays or shapes.

  Returns:
    A tree like `masks`.
  """
  leaves, tree = jax.tree.flatten((params, inputs))
  kinds = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
  return _finder(fn, tree, kinds)(masks)


@functools.lru_cache(4)
def _finder(fn, tree, kinds):
  params, inputs = jax.tree.unflatten(tree, [
      jax.ShapeDtypeStruct(*kind) for kind in kinds])
  # LLVM takes most of the time, of a program that runs a few times.
  options = ({'xla_backend_optimization_level': 0}
             if jax.default_backend() == 'cpu' else None)
  return jax.jit(lambda masks: paths.effective_masks(
      fn, masks, *inputs, params=params), compiler_options=options)


def _of_leaf(path, mask, on_path, batch_axes, contracting) -> LeafPaths:
  units = _units(path, on_path, batch_axes, contracting)
  return LeafPaths(path, mask.size, int(mask.sum()), int(on_path.sum()),
                   units.size, int(np.sum(~units)))


def _units(path, on_path, batch_axes, contracting):
  """bool[units]: which outputs of a leaf have a weight on a path."""
  stacked = selection.batch_axes_of(batch_axes, path, on_path)
  if on_path.ndim - len(stacked) < 2:
    return np.zeros((0,), bool)
  layout = layouts.layout(on_path.shape, path=path, batch_axes=stacked,
                          contracting=contracting)
  layers = math.prod(on_path.shape[axis] for axis in stacked)
  view = on_path.transpose(layout.order).reshape(
      layers, -1, layout.view_shape[-1])
  return view.any(1).ravel()


def _row(leaf: LeafPaths) -> tuple[str, ...]:
  return (leaf.path, f'{leaf.size:,}', f'{leaf.sparsity:.2%}',
          f'{leaf.effective_sparsity:.2%}',
          f'{leaf.dead_units:,} of {leaf.units:,}')
