"""Masks of one leaf and of trees: made, coded in one byte a weight, compared.

A leaf that may be sparse has a uint8 mark for each weight: its low two bits
are the level (2 in the forward set A, 1 in B but not in A, 0 in neither), so
that A lies inside B by construction; two more bits remember whether the
weight was ever in A, and whether it was before the last refresh. A leaf that
is never sparse has None in place of the array, and only this file knows it.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparse_jax import trees
from sparse_jax.masks import selection
from sparse_jax.masks import structures
from sparse_jax.masks import topk

_LEVEL, _EVER, _BEFORE, _HELD = 3, 4, 8, 16
_FORWARD, _BACKWARD = 2, 1


class Layout(NamedTuple):
  """How the entries of one leaf form groups that compete."""

  shape: tuple[int, ...]
  stacked: tuple[int, ...]  # Axes that stack layers; each slice on its own.
  rows: tuple[int, ...]  # Axes that the product sums over.
  structure: structures.Structure

  @property
  def order(self) -> tuple[int, ...]:
    """The axes as stacked, leading, rows, columns."""
    after = [i for i in range(len(self.shape)) if i not in self.stacked]
    rows = [i for i in after if i in self.rows]
    columns = [i for i in after if rows and i > rows[-1]]
    leading = [i for i in after if i not in rows + columns]
    return (*self.stacked, *leading, *rows, *columns)

  @property
  def view_shape(self) -> tuple[int, ...]:
    """The shape of the matrix view: several rows or columns axes merged."""
    sizes = [self.shape[i] for i in self.order]
    after = self.order.index(self.rows[-1]) + 1
    before = after - len(self.rows)
    return (*sizes[:before], math.prod(sizes[before:after]),
            math.prod(sizes[after:]))

  @property
  def plain(self) -> bool:
    return isinstance(self.structure, structures.Unstructured)

  def group(self, scores: jax.Array) -> jax.Array:
    """Scores of entries (the leaf's shape) as scores of groups."""
    if self.plain:
      return scores
    view = jnp.transpose(scores, self.order).reshape(self.view_shape)
    return self.structure.group(view, len(self.stacked))

  def spread(self, groups: jax.Array) -> jax.Array:
    """Decisions of groups as decisions of entries (the leaf's shape)."""
    if self.plain:
      return groups
    view = self.structure.spread(groups, self.view_shape)
    ordered = view.reshape([self.shape[i] for i in self.order])
    inverse = [self.order.index(i) for i in range(len(self.shape))]
    return jnp.transpose(ordered, inverse)

  @property
  def group_shape(self) -> tuple[int, ...]:
    entries = jax.ShapeDtypeStruct(self.shape, jnp.float32)
    return jax.eval_shape(self.group, entries).shape

  @property
  def competing(self) -> tuple[int, ...]:
    """The axes of the groups' array along which groups compete."""
    ndim = len(self.group_shape)
    if self.plain:
      return tuple(i for i in range(ndim) if i not in self.stacked)
    return self.structure.competing(ndim, len(self.stacked))

  def top(self, groups: jax.Array, k) -> jax.Array:
    """bool of the groups' shape: the k best of each competition."""
    return topk.top_k_mask(groups, k, axes=self.competing)

  def keep_count(self, sparsity):
    """How many groups of each competition stay at a sparsity."""
    shape = self.group_shape
    rivals = math.prod(shape[axis] for axis in self.competing)
    return topk.keep_count(rivals, sparsity)


def layout(shape: tuple[int, ...], *, path: trees.Path = '',
           structure: structures.Structure = structures.Unstructured(),
           batch_axes: tuple[int, ...] = (),
           contracting: tuple[int, ...] | None = None) -> Layout:
  """Makes the layout of a leaf and checks that its parts fit together.

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
  columns = [i for i in own if i > max(rows, default=len(shape))]
  if set(rows) - set(own) or not columns:
    raise ValueError(f'`contracting` (={contracting!r}) must name axes of '
                     f'{path!r}, of shape {shape}, that are not stacked '
                     f'(={batch_axes}) and leave an output axis behind them.')
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
  """NM fixes the sparsity: anything else with it is a ValueError."""
  if not isinstance(structure, structures.NM):
    return
  if isinstance(sparsity, jax.Array) or abs(
      sparsity - structure.sparsity) > 1e-6:
    raise ValueError(f'`sparsity` (={sparsity!r}) must be 1 - n/m = '
                     f'{structure.sparsity:g} with `structure` ={structure}.')


def mark(levels: jax.Array, marks: jax.Array | None = None) -> jax.Array:
  """Codes new levels (0, 1, 2) in uint8 marks, remembering the old ones."""
  forward = (levels & _FORWARD) > 0
  if marks is None:
    marks = levels
  ever = marks & _EVER | _bit(_EVER, forward)
  before = _bit(_BEFORE, forward_mask(marks))
  return levels | ever | before | _bit(_HELD, backward_mask(marks))


def _bit(bit: int, where: jax.Array) -> jax.Array:
  return jnp.where(where, jnp.uint8(bit), jnp.uint8(0))


def is_marked(marks) -> bool:
  """Whether this is the marks of a leaf that may be sparse."""
  return hasattr(marks, 'dtype') and hasattr(marks, 'shape')


def paths(marks: trees.PyTree) -> set[trees.Path]:
  """The paths of all leaves that were looked at, sparse or never sparse."""
  leaves = jax.tree.leaves_with_path(marks, is_leaf=lambda leaf: leaf is None)
  return {trees.path_name(path) for path, _ in leaves}


def forward_mask(marks: jax.Array) -> jax.Array:
  """bool, same shape: the forward set A."""
  return (marks & _FORWARD) > 0


def backward_mask(marks: jax.Array) -> jax.Array:
  """bool, same shape: the backward set B, which contains A."""
  return (marks & _LEVEL) > 0


def ever_active(marks: jax.Array) -> jax.Array:
  """bool, same shape: in A now or at any time before."""
  return (marks & _EVER) > 0


def newly_active(marks: jax.Array) -> jax.Array:
  """bool, same shape: in A since the last refresh, but not before it."""
  return ((marks & _FORWARD) > 0) & ((marks & _BEFORE) == 0)


def stays_backward(marks: jax.Array) -> jax.Array:
  """bool, same shape: in B now and before the last refresh."""
  return backward_mask(marks) & ((marks & _HELD) > 0)


def map_marked(fn, params: trees.PyTree, marks: trees.PyTree,
               *others: trees.PyTree) -> trees.PyTree:
  """Maps fn(leaf, marks, *others) over sparse leaves; others stay as given."""
  def visit(path, leaf, mark_, *rest):
    del path
    return fn(leaf, mark_, *rest) if is_marked(mark_) else leaf

  return trees.map_leaves(visit, params, marks, *others)
