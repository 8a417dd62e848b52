"""How the weights of a leaf are stored: whole, beside its marks.

A storage is what a method needs to know of its parameters to work in the
space of groups. This one is the exact semantics of every paper; `packed` has
the other, in which only the kept blocks exist.
"""

from collections.abc import Callable
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparse_jax import trees
from sparse_jax.masks import backward
from sparse_jax.masks import marks as marks_lib
from sparse_jax.masks import placing
from sparse_jax.rules import now as now_lib
from sparse_jax.rules import state as state_lib


class Storage(NamedTuple):
  """What differs between ways to store a sparse leaf."""

  name: str
  # (rule, leaf, weight, marks) -> what the state holds of it besides marks.
  place: Callable[..., Any]
  # (leaf, step, key, *, weight, grad, growth, marks, place, extra) -> Now.
  now: Callable[..., now_lib.Now]
  # (rule, leaf, place, old marks, new marks, param, update) -> (place, update)
  # after a refresh; None: neither changes.
  exchange: Callable[..., Any] | None
  # (rule, leaf, stored, marks, place, due) -> what the forward pass reads.
  read: Callable[..., Any]
  # (leaf, weight, place) -> the leaf as it is stored.
  pack: Callable[..., Any] | None
  # (rule, leaf) -> whether a refresh brings in weights other than 0.
  moves_weights: Callable[..., bool] = lambda rule, leaf: False
  # As `read`, of a weight that is 0 outside A as it is stored, or None.
  read_stored: Callable[..., Any] | None = None
  # Whether a node of the parameter tree is one leaf of this storage.
  is_leaf: Callable[[Any], bool] | None = None
  # place -> place, in the memory where it belongs, wherever it was restored.
  settled: Callable[[Any], Any] = lambda place: place
  # (run, due, operands, others) -> run(due, operands, others), where `run`
  # holds a condition, the last operand is the place, and vmap may come.
  conditional: Callable[..., Any] = (
      lambda run, due, operands, others: run(due, operands, others))
  # (plan, params) -> params whose stored leaves are such nodes.
  joined: Callable[..., Any] | None = None


def _masked_now(leaf, step, key, *, growth=None, place=None, **seen):
  del growth, place
  return now_lib.Now(leaf, step, key, **seen)


def _read_masked(rule, leaf, weight, marks, place, due, *, stored=False):
  """A of the weight; the gradient where the rule needs it."""
  del place, due
  entries = leaf.layout.spread(marks)
  inside = marks_lib.forward_mask(entries)
  full = jnp.ones((1,) * weight.ndim, bool)
  reach = {'A': lambda: inside, 'B': lambda: marks_lib.backward_mask(entries),
           'all': lambda: full}[rule.gradient]()
  return backward.masked_weight(weight, full if stored else inside, reach)


MASKED = Storage('masked', place=lambda *_: None,
                 now=_masked_now, exchange=None, read=_read_masked, pack=None,
                 read_stored=functools.partial(_read_masked, stored=True))


def entry_marks(state: state_lib.SparseState, packed: Any = None,
                like: trees.PyTree = None) -> trees.PyTree:
  """Tree of uint8: the marks of groups, at every stored entry.

  They broadcast to the array of the leaf: of its shape where it is stored
  whole, [..., n, 1, 1] where it is packed in n blocks.

  Args:
    state: whose marks.
    packed: where the blocks belong, if not as `state.packed` says.
    like: the parameters, on explicit meshes: marks are laid as they are.
  """
  places = state.packed if packed is None else packed

  def spread(path, marks, weight=None):
    layout = state.plan.by_path[path].layout
    if path not in places:
      return placing.laid_like(layout.spread(marks), weight)
    ids = places[path].ids
    flat = marks.reshape(*ids.shape[:-1], -1)
    return jnp.take_along_axis(flat, ids, -1)[..., None, None]

  if like is None:
    return trees.map_leaves(spread, state.marks)
  return trees.map_leaves(spread, state.marks, like)


def zeros_like_leaves(leaves: dict[trees.Path, Any]) -> dict[trees.Path,
                                                             jax.Array]:
  """float32 zeros of each leaf's own shape: a method's running averages."""
  return {path: jnp.zeros(leaf.layout.shape, jnp.float32)
          for path, leaf in leaves.items()}
