"""How the entries of one leaf form groups that compete, and its mask."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparse_jax import trees
from sparse_jax.masks import selection
from sparse_jax.masks import structures
from sparse_jax.masks import topk


class Layout(NamedTuple):
  """How the entries of one leaf form groups that compete.

  Example:
    >>> tiles = layout((4, 6), structure=structures.Block((2, 2)))
    >>> tiles.group_shape, tiles.rivals, tiles.keep_count(.5)
    ((2, 3), 6, 3)
    >>> sums = tiles.group(jnp.arange(24.).reshape(4, 6))
    >>> tiles.spread(tiles.top(sums, 1)).sum(0).tolist()  # Its two columns.
    [0, 0, 0, 0, 2, 2]
  """

  shape: tuple[int, ...]  # Of the leaf.
  stacked: tuple[int, ...]  # Axes that stack layers; each slice on its own.
  rows: tuple[int, ...]  # Axes that the product sums over.
  structure: structures.Structure  # What is a group.

  @property
  def columns(self) -> tuple[int, ...]:
    """The output axes: those behind the rows, else the one before them."""
    own = [i for i in range(len(self.shape))
           if i not in self.stacked and i not in self.rows]
    behind = [i for i in own if self.rows and i > max(self.rows)]
    before = [i for i in own if self.rows and i < min(self.rows)]
    return tuple(behind or before[-1:])

  @property
  def order(self) -> tuple[int, ...]:
    """The axes as stacked, leading, rows, columns."""
    named = (*self.stacked, *self.rows, *self.columns)
    leading = [i for i in range(len(self.shape)) if i not in named]
    return (*self.stacked, *leading, *self.rows, *self.columns)

  @property
  def view_shape(self) -> tuple[int, ...]:
    """The shape of the matrix view: several rows or columns axes merged."""
    sizes = [self.shape[i] for i in self.order]
    after = len(sizes) - len(self.columns)
    before = after - len(self.rows)
    return (*sizes[:before], math.prod(sizes[before:after]),
            math.prod(sizes[after:]))

  @property
  def plain(self) -> bool:
    """Whether every entry is a group, so that no view is needed."""
    return isinstance(self.structure, structures.Unstructured)

  def view(self, entries: jax.Array) -> jax.Array:
    """The leaf as [stacked..., leading..., rows, columns]."""
    return entries.transpose(self.order).reshape(self.view_shape)

  def unview(self, view: jax.Array) -> jax.Array:
    """The inverse of `view`."""
    ordered = view.reshape([self.shape[i] for i in self.order])
    return ordered.transpose([self.order.index(i)
                              for i in range(len(self.shape))])

  def group(self, scores: jax.Array) -> jax.Array:
    """Scores of entries (the leaf's shape) as scores of groups."""
    if self.plain:
      return scores
    return self.structure.group(self.view(scores), len(self.stacked))

  def spread(self, groups: jax.Array) -> jax.Array:
    """Values of groups at each of their entries (the leaf's shape)."""
    if self.plain:
      return groups
    return self.unview(self.structure.spread(groups, self.view_shape))

  @property
  def group_shape(self) -> tuple[int, ...]:
    return _group_shape(self)

  @property
  def competing(self) -> tuple[int, ...]:
    """The axes of the groups' array along which groups compete."""
    ndim = len(self.group_shape)
    if self.plain:
      return tuple(i for i in range(ndim) if i not in self.stacked)
    return tuple(self.structure.competing(ndim, len(self.stacked)))

  def top(self, groups: jax.Array, k, among: jax.Array | None = None
          ) -> jax.Array:
    """bool of the groups' shape: the k best of each competition."""
    return topk.top_k_mask(groups, k, axes=self.competing, among=among)

  @property
  def rivals(self) -> int:
    """How many groups compete for one budget."""
    shape = self.group_shape
    return math.prod(shape[axis] for axis in self.competing)

  def keep_count(self, sparsity):
    """How many groups of each competition stay at a sparsity."""
    return topk.keep_count(self.rivals, sparsity)

  def share(self, count: float) -> float:
    """The share of entries that `count` groups of each competition hold.

    Where groups differ in size (tiles that are cut at an edge), as if all
    were of the largest, which is the work that tiles take.
    """
    if self.plain:
      return count / max(self.rivals, 1)
    groups = math.prod(self.group_shape)
    entries = math.prod(self.shape)
    size = getattr(self.structure, 'group_size', lambda view: entries / groups)
    each = groups / max(self.rivals, 1)
    return min(1., count * each * size(self.view_shape) / entries)


@functools.lru_cache(maxsize=4096)
def _group_shape(layout_: Layout) -> tuple[int, ...]:
  entries = jax.ShapeDtypeStruct(layout_.shape, jnp.float32)
  return jax.eval_shape(layout_.group, entries).shape


def layout(shape: tuple[int, ...], *, path: trees.Path = '',
           structure: structures.Structure = structures.Unstructured(),
           batch_axes: tuple[int, ...] = (),
           contracting: tuple[int, ...] | None = None) -> Layout:
  """Makes the layout of a leaf and checks that its parts fit together.

  Args:
    shape: of the leaf.
    path: of the leaf, for a guess of its inputs by Flax's names, and errors.
    structure: what is kept or dropped together.
    batch_axes: axes that stack layers.
    contracting: axes that the product sums over; None: known by the path, or
      the second last.

  Returns:
    A Layout.

  Example:
    >>> own = layout((4, 6), structure=structures.Block((2, 3)))
    >>> own.group_shape, own.keep_count(.75)
    ((2, 2), 1)

  Raises:
    ValueError: if the structure needs a matrix and the leaf is none, or an
      axis is stacked and contracted at once.
  """
  structures.check_structure(structure)
  own = [i for i in range(len(shape)) if i not in batch_axes]
  if contracting is None:
    known = selection.contracting_axes(path, len(own))
    rows = tuple(own[i] for i in known) if own else ()
  else:
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    rows = selection.axes_of(contracting, path, leaf, 'contracting')
  made = Layout(tuple(shape), tuple(batch_axes), rows, structure)
  if made.plain:
    return made
  if len(own) < 2:
    raise ValueError(f'`structure` (={structure!r}) needs a leaf of two axes '
                     f'or more, but {path!r} has the shape {shape}.')
  if set(rows) - set(own) or not made.columns:
    raise ValueError(f'`contracting` (={contracting!r}) must name axes of '
                     f'{path!r}, of shape {shape}, that are not stacked '
                     f'(={batch_axes}) and leave an output axis.')
  return made


def make_mask(scores: jax.Array, sparsity: float | jax.Array, *,
              structure: structures.Structure = structures.Unstructured(),
              batch_axes: tuple[int, ...] = (),
              contracting: tuple[int, ...] | None = None) -> jax.Array:
  """Makes the mask of one leaf from the worth of its entries.

  Scores are reduced to one number a group, the `keep_count` best groups of
  each stacked slice are kept, and the decision is spread back.

  Law: the groups kept are exactly keep_count(number of groups, sparsity) in
  each slice; ties go to the earlier group.

  Args:
    scores: float[...], the larger the better.
    sparsity: fraction of groups that is dropped, in [0, 1). For NM it must be
      1 - n/m.
    structure: what is kept or dropped together.
    batch_axes: axes that stack layers; each slice has its own top-k.
    contracting: the axes that the product sums over (rows); by default the
      second last.

  Returns:
    bool[...], the shape of `scores`.

  Raises:
    ValueError: for an impossible sparsity or a structure that does not fit.

  Example:
    >>> scores = jnp.array([[.5, .1, .3, .8], [.2, .9, .4, .1]])
    >>> make_mask(scores, 0.5, structure=structures.NM(1, 2)).astype(int)
    Array([[1, 0, 0, 1],
           [0, 1, 1, 0]], dtype=int32)
  """
  scores = jnp.asarray(scores)
  axes = selection.axes_of(batch_axes, '', scores)
  leaf = layout(scores.shape, structure=structure, batch_axes=axes,
                contracting=contracting)
  check_fixed_sparsity(structure, sparsity)
  return leaf.spread(leaf.top(leaf.group(scores), leaf.keep_count(sparsity)))


def check_fixed_sparsity(structure: structures.Structure, sparsity) -> None:
  """A structure that fixes the sparsity (NM) allows no other: ValueError."""
  fixed = structures.fixed_sparsity(structure)
  if fixed is None:
    return
  if isinstance(sparsity, jax.Array) or abs(sparsity - fixed) > 1e-6:
    raise ValueError(f'`sparsity` (={sparsity!r}) must be 1 - n/m = '
                     f'{fixed:g} with `structure` ={structure}.')
