"""The state of a sparse method, and how to find it inside Optax's."""

from collections.abc import Callable
import contextlib
import contextvars
import dataclasses
import functools
from typing import Any
from typing import NamedTuple
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax import trees
from sparse_jax.masks import marks as marks_lib
from sparse_jax.rules import leaves as leaves_lib


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Plan:
  """What a state was made for: the method, the tree, its sparse leaves.

  It is part of the state's type, not of its arrays: nothing of it is saved or
  traced, and a state that belongs to something else is known by it.
  """

  method: str
  shapes: tuple[tuple[trees.Path, tuple[int, ...]], ...]  # Of all leaves.
  leaves: tuple[leaves_lib.Leaf, ...] = ()  # The sparse ones.
  parts: tuple['Plan', ...] = ()  # Of the methods of a group.

  @functools.cached_property
  def by_path(self) -> dict[trees.Path, leaves_lib.Leaf]:
    return {leaf.path: leaf for leaf in self.leaves}

  def own(self, params: trees.PyTree) -> dict[trees.Path, Any]:
    """{path: leaf} of those that the state was made for, of a larger tree."""
    known = dict(self.shapes)
    return {path: leaf for path, leaf in trees.leaves_by_path(params).items()
            if path in known}

  @functools.cached_property
  def _hash(self) -> int:
    return hash((self.method, self.shapes, self.leaves, self.parts))

  def __hash__(self) -> int:
    return self._hash


def make_plan(method: str, params: trees.PyTree,
              leaves: dict[trees.Path, leaves_lib.Leaf],
              parts: tuple[Plan, ...] = ()) -> Plan:
  """The plan of a method on a tree.

  Raises:
    ValueError: if two leaves have one path.
  """
  return Plan(method, tuple((path, tuple(np.shape(leaf))) for path, leaf in
                            trees.leaves_by_path(params).items()),
              tuple(leaves.values()), parts)


class SparseState(NamedTuple):
  """What a method remembers between steps: masks above all.

  Example:
    >>> import sparse_jax
    >>> state = sparse_jax.static(.75).init({'kernel': jnp.ones((4, 4))})
    >>> int(state.step), int(state.forward_masks['kernel'].sum())
    (0, 4)
  """

  step: jax.Array  # int32[], updates done.
  key: jax.Array  # uint32[...], raw data of a PRNG key.
  marks: trees.PyTree  # uint8 for each group; None for a leaf never sparse.
  # bool[], whether the last update chose masks anew; for each path if leaves
  # refresh apart.
  refreshed: jax.Array | dict[trees.Path, jax.Array]
  plan: Plan  # What is no array: the method's name, the tree, its leaves.
  extra: Any = ()  # A method's own arrays.
  # {path: where the stored groups of a packed leaf belong}.
  packed: Any = ()

  @property
  def forward_masks(self) -> trees.PyTree:
    """Tree of bool, A of each leaf; None for a leaf that is never sparse."""
    return self._masks(marks_lib.forward_mask)

  @property
  def backward_masks(self) -> trees.PyTree:
    """Tree of bool, B of each leaf; None for a leaf that is never sparse."""
    return self._masks(marks_lib.backward_mask)

  def _masks(self, read):
    def decode(path, marks):
      spread = lambda marks: self.plan.by_path[path].layout.spread(read(marks))
      abstract = isinstance(marks, jax.ShapeDtypeStruct)
      return jax.eval_shape(spread, marks) if abstract else spread(marks)

    return trees.map_leaves(decode, self.marks)

  def refreshed_at(self, path: trees.Path) -> jax.Array:
    """bool[]: whether the last update chose the masks of this leaf anew."""
    if isinstance(self.refreshed, dict):
      return self.refreshed[path]
    return self.refreshed


class Work(NamedTuple):
  """The share of a dense leaf's products that training does, on average.

  Each is a fraction in [0, 1] of the multiply-adds of that pass with a dense
  weight: (1, 1, 1) is dense training.

  Example:
    >>> import sparse_jax
    >>> shapes = {'kernel': jax.ShapeDtypeStruct((4, 4), jnp.float32)}
    >>> method = sparse_jax.top_kast(.75, backward_sparsity=.5)
    >>> method.work(shapes, 1000)['kernel']
    Work(forward=0.25, input_gradient=0.25, weight_gradient=0.5)
  """

  forward: float
  input_gradient: float
  weight_gradient: float


class SparseMethod(NamedTuple):
  """A sparse-training method: pure functions of trees.

  A loop needs none of them by name: `sparsify`, `start` and `with_method` call
  them. In all of them `params` is the tree that the optimizer holds, and
  `state` either the method's SparseState or any Optax state that contains one.

  Example:
    >>> import sparse_jax
    >>> method, params = sparse_jax.static(.75), {'kernel': jnp.ones((4, 4))}
    >>> float(method.read(params, method.init(params))['kernel'].sum())
    4.0
  """

  name: str  # By which a state knows its method.
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
  # (updates, gradients, SparseState, params) -> (updates, state). What
  # `refresh` does, as updates that lead there: the masks belong to params +
  # updates, and the result goes on to `optax.apply_updates`.
  update: Callable[..., tuple[trees.PyTree, SparseState]]
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
  # (params, state) -> params as they are stored: packed leaves as blocks.
  pack: Callable[[trees.PyTree, SparseState], trees.PyTree] | None = None
  # What the method is made of, if `make_method` made it.
  rule: Any = None
  # Whether an entry may enter the backward set after the start.
  grows: bool = True
  # Whether nothing of its state is ever read: that of `dense` alone.
  stateless: bool = False
  # Whether its penalty is ever more than 0.
  penalises: bool = True
  # As `read`, of params that are 0 outside the forward set already, as the
  # method's updates leave them; None: `read` itself.
  read_stored: Callable[[trees.PyTree, Any], trees.PyTree] | None = None


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
  nodes = jax.tree.leaves(_tree_of(opt_state), is_leaf=is_state)
  found = [node for node in nodes if is_state(node)]
  if len(found) != 1:
    problem = 'no SparseState' if not found else (
        f'{len(found)} SparseStates')
    raise ValueError(f'`opt_state` (a {type(opt_state).__name__}) contains '
                     f'{problem}; it must contain one, made by '
                     'sparse_jax.sparsify(...).init(params). Several methods '
                     'in one model are sparse_jax.group({pattern: method}).')
  return jax.tree.map(_bare, found[0], is_leaf=_is_variable)


def is_state(node: Any) -> bool:
  """Whether this is a SparseState; for `is_leaf=` of the tree functions."""
  return isinstance(node, SparseState)


def _tree_of(opt_state):
  """The Optax state of a train state or an optimizer object, or itself."""
  return getattr(opt_state, 'opt_state', opt_state)


def _is_variable(node) -> bool:
  return hasattr(node, 'get_value') and hasattr(node, 'set_value')


def _bare(node):
  return node.get_value() if _is_variable(node) else node


# What makes the state of a method where `sparsify` is initialised, in `start`.
_MAKE_STATE: contextvars.ContextVar[Callable[..., Any] | None] = (
    contextvars.ContextVar('make_state', default=None))


def first_state(method: SparseMethod, params: trees.PyTree, key: Any
                ) -> SparseState:
  """The state that `sparsify` starts from: `method.init`'s, or the one given.
  """
  make = _MAKE_STATE.get()
  return method.init(params, key) if make is None else make(params, key)


@contextlib.contextmanager
def making_states_by(make: Callable[[trees.PyTree, Any], SparseState]):
  """In this context `sparsify` takes its first state from `make`."""
  token = _MAKE_STATE.set(make)
  try:
    yield
  finally:
    _MAKE_STATE.reset(token)


def checked_state(opt_state: Any, method: str, params: trees.PyTree
                  ) -> SparseState:
  """The state in `opt_state`, if it belongs to this method and this tree.

  Raises:
    ValueError: if there is not one state, or it was made by another method or
      for a tree whose leaves have other paths or shapes.
  """
  state = get_state(opt_state)
  plan = state.plan
  if plan.method != method:
    raise ValueError(f'`opt_state` holds the state of {plan.method!r}, and '
                     f'this method is {method!r}.')
  given = {path: tuple(np.shape(leaf))
           for path, leaf in trees.leaves_by_path(params).items()}
  for path, shape in plan.shapes:
    known = path in given and (given[path] == shape or path in state.packed)
    if not known:
      raise ValueError(
          f'`params` must be the tree that the state was made for: its leaf '
          f'{path!r} of shape {shape} is '
          + (f'of shape {given[path]}.' if path in given else
             f'none of {sorted(given)}.'))
  return state


# Folded into every key: the first weights of a model may be drawn from the same
# one (nnx.Rngs(0), jax.random.split), and must not say what is kept of them.
_OWN = zlib.crc32(b'sparse_jax')


def key_data(key: int | jax.Array | None) -> jax.Array:
  """uint32[...]: raw data of a PRNG key made of None, an int or a key.

  It is no key that the caller has, nor one split from it: a mask drawn by the
  bits of a weight would keep its largest entries.

  An integer may be an array of no axes, so that seeds may be mapped over.

  A key of another implementation than the default one gives a key of the
  default, by folding in its words.

  Raises:
    ValueError: for anything else.
  """
  given = jax.random.wrap_key_data(_given_key(key))
  return jax.random.key_data(jax.random.fold_in(given, _OWN))


def _given_key(key):
  whole = isinstance(key, (int, np.integer)) and not isinstance(key, bool)
  if key is None or whole:
    return jax.random.key_data(jax.random.key(int(key or 0)))
  if isinstance(key, np.ndarray):
    key = jnp.asarray(key)
  if isinstance(key, jax.Array):
    if key.ndim == 0 and jnp.issubdtype(key.dtype, jnp.integer):
      return jax.random.key_data(jax.random.key(key))
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
      key = jax.random.key_data(key)
    usual = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    if key.dtype == jnp.uint32 and key.shape == usual.shape:
      return jnp.array(key)
    if key.dtype == jnp.uint32 and key.ndim == 1:
      folded = jax.random.key(0)
      for word in key:
        folded = jax.random.fold_in(folded, word)
      return jax.random.key_data(folded)
  raise ValueError(f'`key` (={key!r}) must be None, an int, or one key of '
                   'jax.random.key.')


def step_key(state: SparseState, step: jax.Array) -> jax.Array:
  """The typed key of one step; the same on every replica."""
  return jax.random.fold_in(jax.random.wrap_key_data(state.key), step)
