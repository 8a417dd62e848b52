"""An optimizer's arrays beside each parameter, and the counts beside those."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax import trees
from sparse_jax.masks import marks as marks_lib
from sparse_jax.rules import state as state_lib

# Fields of running means of squares, whose bias a count corrects.
_SQUARES = ('nu', 'v')


def map_slots(fn: Callable[..., Any], params: trees.PyTree, slots: Any,
              fresh: Any) -> Any:
  """Maps fn(path, slot, fresh slot) over the slots of parameters.

  A slot is a leaf whose path ends with a parameter's path and has its shape,
  or a part of one vector of all parameters (`optax.flatten`). What entries
  share is none: Adafactor's and SM3's rows and columns, L-BFGS's history,
  GaLore's projections.

  Args:
    fn: what to make of a slot, and of the one that `optimizer.init` makes.
    params: the parameters, sparse or not: a slot of one must not pass for a
      namesake's.
    slots: an Optax state.
    fresh: another of the same structure.
  """
  leaves = trees.leaves_by_path(params)

  def visit(path, slot, new):
    if _is_flat(trees.path_name(path), slot, leaves):
      ends = np.cumsum([leaf.size for leaf in leaves.values()])[:-1]
      parts = zip(leaves.items(), jnp.split(slot, ends), jnp.split(new, ends))
      return jnp.concatenate([
          fn(own, *(part.reshape(leaf.shape) for part in pair)).ravel()
          for (own, leaf), *pair in parts])
    owner = _owner(trees.path_name(path), slot, leaves)
    return slot if owner is None else fn(owner, slot, new)

  return jax.tree.map_with_path(visit, slots, fresh)


def fresh_outside(slots: Any, fresh: Any, params: trees.PyTree,
                  sparse: state_lib.SparseState, marks: trees.PyTree) -> Any:
  """Slots of entries that are or were outside B as `optimizer.init` makes them.

  So an entry that enters B starts anew, whatever the optimizer keeps or adds
  outside B (weight decay reaches momentum there). Before the step, not after
  it: XLA then reads and writes each slot once.
  """
  levels = trees.leaves_by_path(marks)

  def visit(path, slot, new):
    own = levels.get(path)
    if not marks_lib.is_marked(own):
      return slot
    inside = jnp.where(sparse.refreshed_at(path),
                       marks_lib.stays_backward(own),
                       marks_lib.backward_mask(own))
    return jnp.where(inside, slot, new)

  return map_slots(visit, params, slots, fresh)


def renewed(params: trees.PyTree, slots: Any, fresh: Any,
            where: bool | jax.Array = True) -> Any:
  """Slots, and the counts that stand beside them, as they were at first.

  A count beside slots corrects their bias (`ScaleByAdamState.count`); that of
  a schedule stands alone and goes on.

  Args:
    params, slots, fresh: as of `map_slots`.
    where: bool[], whether to do it.
  """
  counts = _counts(params, slots)
  anew = lambda old, new: new if where is True else jnp.where(where, new, old)
  state = map_slots(lambda path, slot, new: anew(slot, new), params, slots,
                    fresh)

  def visit(path, old, new):
    return anew(old, new) if trees.path_name(path) in counts else old

  return jax.tree.map_with_path(visit, state, fresh)


def corrected(params: trees.PyTree, slots: Any) -> set[trees.Path]:
  """The parameters whose mean of squares is corrected by one count for all.

  A state that keeps the age of each entry needs no help (`aged_adam`).
  """
  found = _counts(params, slots)
  names = {trees.path_name(path) for path, _ in
           jax.tree.leaves_with_path(slots)}
  return {owner for count, beside in found.items() for field, owner in beside
          if field in _SQUARES
          and _joined(count.removesuffix('count'), 'age', owner) not in names}


def _counts(params, slots) -> dict[str, list[tuple[str, trees.Path]]]:
  """{name of a count: (field, parameter) of each slot beside it}."""
  leaves = trees.leaves_by_path(params)
  named = [(trees.path_name(path), leaf)
           for path, leaf in jax.tree.leaves_with_path(slots)]
  names = {name for name, _ in named}
  found: dict[str, list[tuple[str, trees.Path]]] = {}
  for name, slot in named:
    owner = _owner(name, slot, leaves)
    owners = [] if owner is None else [owner]
    if _is_flat(name, slot, leaves):
      owners = list(leaves)
    if not owners:
      continue
    *above, field = name.removesuffix(owner or '').rstrip('/').split('/')
    count = _joined(*above, 'count')
    if count in names:
      found.setdefault(count, []).extend((field, own) for own in owners)
  return found


def _joined(*names: str) -> str:
  return '/'.join(name.strip('/') for name in names if name.strip('/'))


def _is_flat(name, slot, leaves) -> bool:
  """Whether it is one vector of the slots of all parameters, in their order."""
  return _owner(name, slot, leaves) is None and getattr(
      slot, 'shape', None) == (sum(leaf.size for leaf in leaves.values()),)


def _owner(name, slot, leaves) -> trees.Path | None:
  owner = trees.owner_of(name, leaves)
  if owner is None or getattr(slot, 'shape', None) != leaves[owner].shape:
    return None
  return owner
