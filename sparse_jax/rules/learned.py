"""Methods whose thresholds or gates are parameters, trained by the loss.

`method.parametrize` adds them to the parameter tree under a key of their own,
shaped to broadcast against their kernels, so that the optimizer trains (and
decays) them like anything else; `read` gives back the model's own tree. The
gradient may reach every weight, so the backward set is full.
"""

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import jax

from sparse_jax import trees
from sparse_jax.masks import marks as marks_lib
from sparse_jax.masks import selection
from sparse_jax.rules import leaves as leaves_lib
from sparse_jax.rules import updates as updates_lib
from sparse_jax.rules.make_method import assemble
from sparse_jax.rules.state import SparseMethod


class LearnedNow(NamedTuple):
  """What `adjust` may look at, after the optimizer's step."""

  step: jax.Array  # int32[], updates done, this one included.
  leaves: dict[trees.Path, leaves_lib.Leaf]
  model: trees.PyTree  # Before the update, as is what is learnt.
  learnt: trees.PyTree
  moves: trees.PyTree  # The updates of both.
  learnt_moves: trees.PyTree
  kept: dict[trees.Path, jax.Array]  # bool, by the parameters after it.
  extra: Any


def learned_method(name: str, key: str,
                   first: Callable[[leaves_lib.Leaf], jax.Array],
                   read_leaf: Callable[..., jax.Array],
                   is_kept: Callable[..., jax.Array], *,
                   penalty: Callable[..., jax.Array] | None = None,
                   adjust: Callable[[LearnedNow], Any] | None = None,
                   extra: Callable[[trees.PyTree], Any] | None = None,
                   remember: Callable[..., Any] | None = None,
                   resets: Callable[..., jax.Array] | None = None,
                   is_sparse: selection.IsSparse = None,
                   batch_axes: selection.Axes = ()) -> SparseMethod:
  """Makes a method with one learnt array beside each sparse leaf.

  Args:
    name: of the method.
    key: of `params`, under which the learnt arrays stand.
    first: leaf -> the array at the start; it broadcasts against the weight, and
      is float64 where that is.
    read_leaf: (weight, learnt, step) -> what the forward pass sees.
    is_kept: (weight, learnt, step) -> bool that broadcasts, the set A.
    penalty: (tree of learnt arrays, step) -> float32[], for the loss.
    adjust: LearnedNow -> (updates of the model, of what is learnt).
    extra: model's params -> arrays of the method's own.
    remember: (model after the update, extra, step) -> extra.
    resets: SparseState -> bool[]: whether all slots are made anew.
    is_sparse, batch_axes: as in `static`.

  Returns:
    A SparseMethod.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> import jax.numpy as jnp
    >>> method = learned_method(
    ...     'soft', 'thresholds', lambda leaf: jnp.full((1, 1), .5),
    ...     lambda w, t, step: jnp.sign(w) * jax.nn.relu(jnp.abs(w) - t),
    ...     lambda w, t, step: jnp.abs(w) > t)
    >>> params = method.parametrize({'kernel': jnp.array([[2., -.25]])})
    >>> method.read(params, method.init(params))['kernel']
    Array([[ 1.5, -0. ]], dtype=float32)
  """
  where = leaves_lib.Sites(0., is_sparse=is_sparse,
                           batch_axes=batch_axes).checked()

  def parametrize(params):
    if not isinstance(params, Mapping) or key in params:
      raise ValueError(f'`params` (a {type(params).__name__}) must be a '
                       f'mapping without the key {key!r}.')
    weights = trees.leaves_by_path(params)

    def start(path, leaf):
      wide = jax.dtypes.result_type(weights[path]) == jax.numpy.float64
      return first(leaf).astype(jax.numpy.float64) if wide else first(leaf)

    learnt = _only(params, {path: start(path, leaf) for path, leaf in
                            where.leaves(params).items()})
    return join(params, learnt, key)

  def kept(leaves, params, step):
    """{path: bool of the leaf's shape}."""
    model, learnt = split(params, key)
    weights, own = trees.leaves_by_path(model), trees.leaves_by_path(learnt)
    return {path: jax.numpy.broadcast_to(
        is_kept(weights[path], own[path], step), leaf.layout.shape)
            for path, leaf in leaves.items()}

  def levels(mask):
    return marks_lib.levels(mask, jax.numpy.ones_like(mask))

  def start(leaves, params, seed):
    del seed
    return {path: marks_lib.mark(levels(mask))
            for path, mask in kept(leaves, params, 0).items()}

  def read(params, state):
    model, learnt = split(params, key)

    def visit(path, weight, own):
      del path
      return weight if own is None else read_leaf(weight, own, state.step)

    return trees.map_leaves(visit, model, learnt)

  def refresh(seen, state):
    step, leaves = state.step + 1, state.plan.by_path
    after, moves = seen.params, None
    if remember is not None:
      state = state._replace(extra=remember(split(after, key)[0], state.extra,
                                            step))
    masks = kept(leaves, after, step)
    if adjust is not None:
      moves = join(*adjust(LearnedNow(
          step, leaves, *split(seen.before, key), *split(seen.moves, key),
          masks, state.extra)), key)
      masks = kept(leaves, jax.tree.map(updates_lib.apply_update, seen.before,
                                        moves), step)
    marks = trees.map_leaves(
        lambda path, old: marks_lib.mark(levels(masks[path]), old),
        state.marks)
    return state._replace(marks=marks), moves

  def total_penalty(params, state):
    return penalty(split(params, key)[1], state.step)

  def own_extra(params):
    return extra(split(params, key)[0])

  return assemble(
      name, where.leaves, start, read=read, refresh=refresh,
      extra=extra and own_extra, penalty=penalty and total_penalty,
      resets=resets, parametrize=parametrize,
      model_of=lambda params: split(params, key)[0],
      moves=adjust is not None)


def split(params: trees.PyTree, name: str) -> tuple[trees.PyTree, trees.PyTree]:
  """The model's own tree, and what `parametrize` has added to it.

  Raises:
    ValueError: if nothing was added.
  """
  if not isinstance(params, Mapping) or name not in params:
    raise ValueError(f'`params` (a {type(params).__name__}) must have the key '
                     f'{name!r}: use params, opt_state = start(tx, method, '
                     'params).')
  own = _entries(params)
  learnt = own.pop(name)
  return type(params)(own), learnt  # type: ignore[call-arg]


def join(model: trees.PyTree, learnt: trees.PyTree, name: str) -> trees.PyTree:
  """The tree that `split` takes apart."""
  return type(model)({**_entries(model), name: learnt})


def _entries(tree: Mapping) -> dict:
  """The keys and values of a mapping; NNX would wrap its values anew."""
  return dict(getattr(tree, 'raw_mapping', tree))


def _only(tree, replacements, path=()):
  """The leaves with a replacement, in the same nesting."""
  name = '/'.join(map(str, path))
  if name in replacements:
    return replacements[name]
  if not isinstance(tree, Mapping):
    return trees.map_leaves(
        lambda own, leaf: replacements.get(f'{name}/{own}'), tree)
  parts = {key: _only(value, replacements, (*path, key))
           for key, value in tree.items()}
  return {key: part for key, part in parts.items() if part is not None and (
      not isinstance(part, dict) or part)}
