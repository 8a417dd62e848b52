"""The sets of one leaf, coded in one byte a group.

The low two bits of a mark are the level (2 in the forward set A, 1 in B but
not in A, 0 in neither), so that A lies inside B by construction; five more
bits remember whether the group was ever in A, whether it was in A and in B
before the last refresh, in B before the one before, and whether it has entered
B since the start. A leaf that is never sparse has None in place of its
marks.
"""

import jax
import jax.numpy as jnp

from sparse_jax import trees

_LEVEL, _EVER, _BEFORE, _HELD, _HELD_EARLIER = 3, 4, 8, 16, 32
_LATER = 64
_FORWARD = 2


def levels(forward: jax.Array, backward: jax.Array) -> jax.Array:
  """uint8: 2 in A, 1 in B outside A, 0 elsewhere; of bools of one shape."""
  inside = forward.astype(jnp.uint8)
  return (forward | backward).astype(jnp.uint8) + inside


def mark(new: jax.Array, marks: jax.Array | None = None) -> jax.Array:
  """Marks of new levels (0, 1, 2) that remember the old marks."""
  new = new.astype(jnp.uint8)
  forward = (new & _FORWARD) > 0
  if marks is None:
    marks = new
  ever = marks & _EVER | _bit(_EVER, forward)
  before = _bit(_BEFORE, forward_mask(marks))
  held = _bit(_HELD, backward_mask(marks)) | (marks & _HELD) << 1
  enters = (new > 0) & ~backward_mask(marks)
  return new | ever | before | held | marks & _LATER | _bit(_LATER, enters)


def previous(marks: jax.Array, refreshed: jax.Array) -> jax.Array:
  """Marks of the sets before the last update, if that `refreshed` them.

  They know no more than the sets, `stays_backward`, and of what is in B
  `came_later`. An update that is made
  of these depends on the new marks, and so comes after the refresh.
  """
  level = (_bit(1, (marks & _HELD) > 0) + _bit(1, (marks & _BEFORE) > 0))
  old = level | (marks & _HELD_EARLIER) >> 1 | marks & _LATER
  return jnp.where(refreshed, old, marks)


def _bit(bit: int, where: jax.Array) -> jax.Array:
  return jnp.where(where, jnp.uint8(bit), jnp.uint8(0))


def is_marked(marks) -> bool:
  """Whether this is the marks of a leaf that may be sparse."""
  return hasattr(marks, 'dtype') and hasattr(marks, 'shape')


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


def newly_inactive(marks: jax.Array) -> jax.Array:
  """bool, same shape: outside A since the last refresh, but not before it."""
  return ((marks & _FORWARD) == 0) & ((marks & _BEFORE) > 0)


def stays_backward(marks: jax.Array) -> jax.Array:
  """bool, same shape: in B now and before the last refresh."""
  return backward_mask(marks) & ((marks & _HELD) > 0)


def came_later(marks: jax.Array) -> jax.Array:
  """bool, same shape: has entered B at a refresh, at any time."""
  return (marks & _LATER) > 0


def map_marked(fn, params: trees.PyTree, marks: trees.PyTree,
               *others: trees.PyTree) -> trees.PyTree:
  """Maps fn(leaf, marks, *others) over sparse leaves; others stay as given."""
  def visit(path, leaf, mark_, *rest):
    del path
    return fn(leaf, mark_, *rest) if is_marked(mark_) else leaf

  return trees.map_leaves(visit, params, marks, *others)
