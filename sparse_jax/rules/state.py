"""The state of a sparse method, and how to find it inside Optax's."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparse_jax import trees
from sparse_jax.masks import masking


class SparseState(NamedTuple):
  """What a method remembers between steps."""

  step: jax.Array  # int32[], updates done.
  key: jax.Array  # uint32[...], raw data of a PRNG key.
  marks: trees.PyTree  # uint8 for each weight; None for a leaf never sparse.
  refreshed: jax.Array  # bool[], whether the last update chose masks anew.
  extra: Any = ()  # A method's own arrays.

  @property
  def forward_masks(self) -> trees.PyTree:
    """Tree of bool, A of each leaf; None for a leaf that is never sparse."""
    return _decode(masking.forward_mask, self.marks)

  @property
  def backward_masks(self) -> trees.PyTree:
    """Tree of bool, B of each leaf; None for a leaf that is never sparse."""
    return _decode(masking.backward_mask, self.marks)


def _decode(read, marks):
  return jax.tree.map(read, marks)


class Work(NamedTuple):
  """The share of a dense leaf's products that training does, on average.

  Each is a fraction in [0, 1] of the multiply-adds of that pass with a dense
  weight.
  """

  forward: float
  input_gradient: float
  weight_gradient: float


class SparseMethod(NamedTuple):
  """A sparse-training method: pure functions of trees.

  In all of them `params` is the tree that the optimizer holds, and `state`
  either the method's SparseState or any Optax state that contains one.
  """

  # params -> params, with thresholds or gates added if the method learns any.
  parametrize: Callable[[trees.PyTree], trees.PyTree]
  # (params, key) -> SparseState. Makes the first masks.
  init: Callable[..., SparseState]
  # (params, state) -> the weights that the forward pass sees.
  read: Callable[[trees.PyTree, Any], trees.PyTree]
  # (params, state) -> float32[], to be added to the loss.
  penalty: Callable[[trees.PyTree, Any], jax.Array]
  # (params after the update, gradients, state) -> (params, state).
  refresh: Callable[..., tuple[trees.PyTree, SparseState]]
  # (params, updates, gradients, SparseState) -> (updates, state). What
  # `refresh` does, as updates that lead there: the masks belong to params +
  # updates, and the result goes on to `optax.apply_updates`.
  settle: Callable[..., tuple[trees.PyTree, SparseState]]
  # state -> bool[]: whether the coming update skips the optimizer, or None.
  skips: Callable[[SparseState], jax.Array] | None = None
  # state -> bool[]: whether the coming update makes all slots anew, or None.
  resets: Callable[[SparseState], jax.Array] | None = None
  # (params, steps) -> {path: Work} of the sparse leaves, averaged over a run
  # of so many steps; a leaf that is not named works dense. Or None.
  work: Callable[[trees.PyTree, int], dict[trees.Path, Work]] | None = None
  # (params, state) -> {path: Operands} of the products of the sparse leaves,
  # besides what `read` does to their weights. Or None.
  operators: Callable[[trees.PyTree, Any], dict[trees.Path, Any]] | None = None
  # params -> {path: Kept} of the sparse leaves: how many groups every step
  # reads, and how many get a gradient. None if that changes during a run.
  kept: Callable[[trees.PyTree], dict[trees.Path, Any]] | None = None


def get_state(opt_state: Any) -> SparseState:
  """The one SparseState inside an Optax state.

  Looks through `chain`, `MultiSteps`, `inject_hyperparams`, `masked` and any
  other nesting, a Flax TrainState, and the variables in which `nnx.Optimizer`
  wraps every array. The search does not look inside a SparseState, so that a
  method that wraps another counts once.

  Args:
    opt_state: any tree.

  Returns:
    The SparseState, with plain arrays as leaves.

  Raises:
    ValueError: if there is none, or more than one.

  Example:
    >>> import optax, sparse_jax
    >>> tx = sparse_jax.sparsify(optax.adam(1e-3), sparse_jax.static(0.5))
    >>> state = optax.MultiSteps(tx, 2).init({'kernel': jnp.ones((2, 4))})
    >>> int(sparse_jax.get_state(state).forward_masks['kernel'].sum())
    4
  """
  def is_state(node):
    return isinstance(node, SparseState)

  nodes = jax.tree.leaves(_tree_of(opt_state), is_leaf=is_state)
  found = [node for node in nodes if is_state(node)]
  if len(found) != 1:
    problem = 'no SparseState' if not found else (
        f'{len(found)} SparseStates')
    raise ValueError(f'`opt_state` (a {type(opt_state).__name__}) contains '
                     f'{problem}; it must contain one, made by '
                     'sparse_jax.sparsify(...).init(params).')
  return jax.tree.map(_bare, found[0], is_leaf=_is_variable)


def _tree_of(opt_state):
  """The Optax state of a train state or an optimizer object, or itself."""
  return getattr(opt_state, 'opt_state', opt_state)


def _is_variable(node) -> bool:
  return hasattr(node, 'get_value') and hasattr(node, 'set_value')


def _bare(node):
  return node.get_value() if _is_variable(node) else node


def key_data(key: int | jax.Array | None) -> jax.Array:
  """uint32[...]: raw data of a PRNG key given as None, an int or a key.

  Raises:
    ValueError: for anything else.
  """
  if key is None or (isinstance(key, int) and not isinstance(key, bool)):
    return jax.random.key_data(jax.random.key(key or 0))
  if isinstance(key, jax.Array):
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
      key = jax.random.key_data(key)
    if key.dtype == jnp.uint32 and key.shape == (2,):
      return jnp.array(key)
  raise ValueError(f'`key` (={key!r}) must be None, an int, or one key of '
                   'jax.random.key, of the default implementation.')


def step_key(state: SparseState, step: jax.Array) -> jax.Array:
  """The typed key of one step; the same on every replica."""
  return jax.random.fold_in(jax.random.wrap_key_data(state.key), step)
