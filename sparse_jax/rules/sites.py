"""Where a method works: which leaves, how grouped, how sparse each."""

from collections.abc import Callable
from collections.abc import Mapping
import math
from typing import Any
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from sparse_jax.masks import allocations as allocation_lib
from sparse_jax import checks
from sparse_jax import trees
from sparse_jax.masks import masking
from sparse_jax.masks import selection
from sparse_jax.rules import state as state_lib
from sparse_jax.masks import structures
from sparse_jax.masks import topk


class Leaf(NamedTuple):
  """One sparse leaf: its place, its groups, its sparsity."""

  path: trees.Path
  index: int  # Among the sparse leaves; makes its random numbers its own.
  layout: masking.Layout
  sparsity: float

  @property
  def count(self) -> int:
    """Groups kept in each competition."""
    return self.layout.keep_count(self.sparsity)

  def random_scores(self, key: jax.Array) -> jax.Array:
    """float32 of the groups' shape, uniform in [0, 1); NaN in padding."""
    scores = jax.random.uniform(jax.random.fold_in(key, self.index),
                                self.layout.group_shape)
    if self.layout.plain:
      return scores
    return scores + self.layout.group(jnp.zeros(self.layout.shape))

  def magnitudes(self, weight: jax.Array) -> jax.Array:
    """Scores of the groups by the absolute values of their entries."""
    return self.layout.group(jnp.abs(weight))


class Kept(NamedTuple):
  """How many groups of a leaf every step of a run reads and trains."""

  leaf: Leaf
  forward: int  # In A.
  backward: int  # That get a gradient.


class Sites(NamedTuple):
  """The common keywords of every method, checked."""

  sparsity: float
  allocation: allocation_lib.Allocation | Mapping[trees.Path, float] = (
      allocation_lib.uniform)
  structure: structures.Structure = structures.Unstructured()
  is_sparse: selection.IsSparse = None
  batch_axes: selection.Axes = ()
  contracting: selection.Axes | None = None

  def checked(self) -> 'Sites':
    """Returns itself, or raises ValueError naming the bad argument."""
    checks.check_sparsity('sparsity', self.sparsity)
    structures.check_structure(self.structure)
    masking.check_fixed_sparsity(self.structure, self.sparsity)
    if isinstance(self.structure, structures.NM) and (
        self.allocation is not allocation_lib.uniform):
      raise ValueError(f'`allocation` (={self.allocation!r}) must be uniform '
                       f'with `structure` ={self.structure}, which fixes the '
                       'sparsity of every leaf.')
    if not callable(self.allocation) and not isinstance(self.allocation,
                                                        Mapping):
      raise ValueError(f'`allocation` (={self.allocation!r}) must be a '
                       'function or a mapping of paths to sparsities.')
    selection.check_is_sparse(self.is_sparse)
    selection.check_axes('batch_axes', self.batch_axes)
    if self.contracting is not None:
      selection.check_axes('contracting', self.contracting)
    return self

  def leaves(self, params: trees.PyTree) -> dict[trees.Path, Leaf]:
    """The sparse leaves of a parameter tree, by path."""
    chosen = selection.select(params, self.is_sparse, self.batch_axes)
    layouts = {path: self._layout(path, leaf) for path, leaf in chosen.items()}
    sparsities = _slice_sparsities(self.allocation, layouts, self.sparsity)
    return {path: Leaf(path, index, layouts[path], sparsities[path])
            for index, path in enumerate(layouts)}

  def at(self, sparsity: float) -> 'Sites':
    """The same sites at another sparsity; a mapping is scaled along."""
    if callable(self.allocation):
      return self._replace(sparsity=sparsity)
    ratio = sparsity / self.sparsity if self.sparsity else 0.
    scaled = {path: min(value * ratio, value)
              for path, value in self.allocation.items()}
    return self._replace(sparsity=sparsity, allocation=scaled)

  def _layout(self, path, leaf):
    stacked = selection.batch_axes_of(self.batch_axes, path, leaf)
    contracting = self.contracting
    if contracting is not None:
      contracting = selection.axes_of(contracting, path, leaf,
                                      'contracting')
    return masking.layout(leaf.shape, path=path, structure=self.structure,
                          batch_axes=stacked, contracting=contracting)


def _slice_sparsities(allocation, layouts, sparsity):
  """Allocates over single layers: each slice of a stacked leaf is one.

  An allocation function sees a stacked leaf as `path[0]`, `path[1]`, ...
  """
  if not callable(allocation):
    shapes = {path: leaf.shape for path, leaf in layouts.items()}
    return allocation_lib.allocate(allocation, shapes, sparsity)
  shapes, first = {}, {}
  for path, leaf in layouts.items():
    own = [n for i, n in enumerate(leaf.shape) if i not in leaf.stacked]
    layers = math.prod(leaf.shape[axis] for axis in leaf.stacked)
    names = [f'{path}[{i}]' for i in range(layers)] if leaf.stacked else [path]
    shapes.update({name: tuple(own) for name in names})
    first[path] = names[0]
  shares = allocation_lib.allocate(allocation, shapes, sparsity)
  return {path: shares[name] for path, name in first.items()}


def levels(leaf: Leaf, forward: jax.Array, backward: jax.Array) -> jax.Array:
  """uint8 of the leaf's shape: 2 in A, 1 in B \\ A, 0 elsewhere.

  `forward` and `backward` are bool of the groups' shape.
  """
  groups = (forward | backward).astype(jnp.uint8) + forward.astype(jnp.uint8)
  return leaf.layout.spread(groups)


def drop_and_grow(leaf: Leaf, active: jax.Array, worth: jax.Array,
                  growth: jax.Array, fraction,
                  negative: jax.Array | None = None) -> jax.Array:
  """Drops the least worthy of the active groups, grows the most promising.

  Of n active groups the keep_count(n, fraction) of largest `worth` stay; the
  n - kept groups of largest `growth` among all others, the just dropped
  included, become active. The count never changes, whatever the scores.

  Args:
    leaf: the leaf whose groups these are.
    active: bool of the groups' shape, `leaf.count` in each competition.
    worth, growth: float of the groups' shape.
    fraction: share of the active groups that is dropped, in [0, 1]: a Python
      number or a traced float32[].
    negative: bool of the groups' shape: these and the others are dropped
      apart, each by the fraction. None: there is one ranking.

  Returns:
    bool of the groups' shape.

  Reference:
    Evci et al., RigL, 2020, https://arxiv.org/abs/1911.11134, section 3. The
    official code truncates the number dropped and ranks inactive entries as
    zero when dropping; here the count is rounded and only active ones drop.
    Apart by sign: Mocanu et al., SET, 2018, algorithm 1.
  """
  if negative is None:
    stay = _kept(leaf.count, fraction)
    kept = leaf.layout.top(only(active, worth), stay)
  else:
    kept = (_keep_share(leaf, active & negative, worth, fraction)
            | _keep_share(leaf, active & ~negative, worth, fraction))
    stay = count(leaf, kept)
  grown = leaf.layout.top(only(~kept, growth), leaf.count - stay)
  return kept | grown


def _keep_share(leaf, side, worth, fraction):
  stay = topk.keep_count(count(leaf, side), fraction)
  return leaf.layout.top(only(side, worth), stay)


def _kept(count: int, fraction):
  """keep_count, at a fraction of 1 too, where one group still survives."""
  if isinstance(fraction, jax.Array) or fraction < 1:
    return topk.keep_count(count, fraction)
  return 1


def count(leaf: Leaf, groups: jax.Array) -> jax.Array:
  """int32: True groups of each competition, its axes kept as 1."""
  return jnp.sum(groups, axis=leaf.layout.competing, keepdims=True,
                 dtype=jnp.int32)


def only(choosable: jax.Array, scores: jax.Array) -> jax.Array:
  """Scores with NaN, the lowest of all, where a group may not be chosen."""
  scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
  return jnp.where(choosable, scores, jnp.nan)


def active_groups(leaf: Leaf, marks: jax.Array) -> jax.Array:
  """bool of the groups' shape: those whose entries are in A."""
  forward = masking.forward_mask(marks).astype(jnp.float32)
  return leaf.layout.group(forward) > 0


def first_marks(params: trees.PyTree, leaves: dict[trees.Path, Leaf],
                choose: Callable[[Leaf, jax.Array], jax.Array]) -> trees.PyTree:
  """Marks of a new state: `choose(leaf, weight)` gives each leaf's levels."""
  def visit(path, weight):
    if path not in leaves:
      return None
    levels_ = choose(leaves[path], weight)
    marks = masking.mark(levels_.astype(jnp.uint8))
    if isinstance(weight, jax.Array) and not isinstance(
        weight, jax.core.Tracer) and len(weight.sharding.device_set) > 1:
      marks = jax.device_put(marks, weight.sharding)
    return marks

  return trees.map_leaves(visit, params)


def next_state(due: bool | jax.Array, choose: Callable[..., jax.Array],
               leaves: dict[trees.Path, Leaf], step: 'Step',
               state: state_lib.SparseState) -> state_lib.SparseState:
  """The state with marks chosen anew where `due`, else as they were.

  `choose(leaf, weight, grad, marks)` gives new levels. There is one `cond` a
  leaf, which carries marks alone, so that an ordinary step pays only for
  passing them on.
  """
  def visit(path, param, update, grad, old):
    if not masking.is_marked(old):
      return old

    def renew(param, update, grad, old):
      weight = param if update is None else apply_update(param, update)
      return masking.mark(choose(leaves[path], weight, grad, old), old)

    operands = (param, update, grad, old)
    if isinstance(due, bool):
      return renew(*operands) if due else old
    return lax.cond(due, renew, lambda p, u, g, old: old, *operands)

  marks = trees.map_leaves(visit, step.params, step.updates, step.grads,
                           state.marks)
  return state._replace(marks=marks, refreshed=jnp.asarray(due))


def next_together(due: bool | jax.Array,
                  choose: Callable[[dict[trees.Path, jax.Array]], Any],
                  step: 'Step', state: state_lib.SparseState
                  ) -> state_lib.SparseState:
  """The state with marks of leaves that must be chosen together.

  `choose({path: weight})` gives `({path: levels}, extra)`. One `cond` for the
  tree, which carries marks and extra arrays alone.
  """
  def renew():
    weights = trees.leaves_by_path(step.weights())
    levels_, extra = choose(weights)

    def visit(path, old):
      return masking.mark(levels_[path], old)

    return trees.map_leaves(visit, state.marks), extra

  def keep():
    return state.marks, state.extra

  if isinstance(due, bool):
    marks, extra = renew() if due else keep()
  else:
    marks, extra = lax.cond(due, renew, keep)
  return state._replace(marks=marks, refreshed=jnp.asarray(due), extra=extra)


class Step(NamedTuple):
  """What a refresh may look at.

  The weights to judge are params + updates; updates may be None for none.
  Whoever also needs the updates afterwards passes both, whoever does not
  passes their sum: XLA then writes only one of them to memory.
  """

  params: trees.PyTree
  updates: trees.PyTree | None
  grads: trees.PyTree
  extra_args: Mapping[str, Any] = {}  # Those of `tx.update`.

  def weights(self) -> trees.PyTree:
    """The weights to judge."""
    if self.updates is None:
      return self.params
    return jax.tree.map(apply_update, self.params, self.updates)


def apply_update(param: jax.Array, update: jax.Array) -> jax.Array:
  """p + u as `optax.apply_updates` stores it, 16-bit rounding included.

  XLA may keep 16-bit sums in float32 inside a fusion; the scores must be
  those of the parameters that the user gets.
  """
  total = param + update
  if jnp.finfo(param.dtype).bits > 16:
    return total.astype(param.dtype)
  if param.dtype == jnp.float16:  # Whose subnormals reduce_precision flushes.
    return lax.optimization_barrier(total.astype(param.dtype))
  kind = jnp.finfo(param.dtype)
  exact = lax.reduce_precision(total.astype(jnp.float32), kind.nexp, kind.nmant)
  return exact.astype(param.dtype)
