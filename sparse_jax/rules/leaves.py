"""Where a method works: which leaves, how grouped, how sparse each."""

from collections.abc import Mapping
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparse_jax import checks
from sparse_jax import trees
from sparse_jax.masks import allocations
from sparse_jax.masks import layouts
from sparse_jax.masks import search
from sparse_jax.masks import selection
from sparse_jax.masks import structures
from sparse_jax.masks import topk


class Leaf(NamedTuple):
  """One sparse leaf: its path, its groups, its sparsity.

  Example:
    >>> leaf = Sites(.75).leaves({'kernel': jnp.ones((4, 4))})['kernel']
    >>> leaf.count, leaf.top(jnp.arange(16.).reshape(4, 4)).sum(1).tolist()
    (4, [0, 0, 0, 4])
  """

  path: trees.Path  # The keys of the tree, joined by '/'.
  # Among the sparse leaves; makes its random numbers its own.
  index: int  # type: ignore[assignment]
  layout: layouts.Layout  # How its entries form groups.
  sparsity: float  # Of the forward set A.
  backward_sparsity: float  # Of the backward set B.
  # Whether the axes that products sum over are a guess, and matter.
  guessed: bool = False

  @property
  def count(self) -> int:  # type: ignore[override]
    """Groups of A in each competition; 0 if a given mask keeps none."""
    return self.layout.keep_count(self.sparsity) if self.sparsity < 1 else 0

  @property
  def backward_count(self) -> int:
    """Groups of B in each competition."""
    if self.backward_sparsity == 1:
      return self.count
    return max(self.layout.keep_count(self.backward_sparsity), self.count)

  def top(self, scores: jax.Array, k=None, *, among: jax.Array | None = None
          ) -> jax.Array:
    """bool: the k groups of largest score in each competition.

    Args:
      scores: float of the groups' shape; NaN ranks last.
      k: an int or int32[...]; None for `count`.
      among: bool of the groups' shape, those that may be chosen; None for all.
    """
    return self.layout.top(scores, self.count if k is None else k, among)

  def random_scores(self, key: jax.Array) -> jax.Array:
    """float32 of the groups' shape, uniform in [0, 1); NaN in padding."""
    scores = jax.random.uniform(jax.random.fold_in(key, self.index),
                                self.layout.group_shape, jnp.float32)
    if not getattr(self.layout.structure, 'pads', True):
      return scores
    return scores + self.layout.group(
        jnp.zeros(self.layout.shape, jnp.float32))

  def full(self) -> jax.Array:
    """bool: every group."""
    return jnp.ones(self.layout.group_shape, bool)

  def sum(self, groups: jax.Array) -> jax.Array:
    """int32: True groups of each competition, its axes kept as 1."""
    return search.tally(groups, self.layout.competing)


class Sites(NamedTuple):
  """The common keywords of every method: which leaves, groups and sparsities.

  They are explained at `static`. `leaves(params)` gives the `Leaf` of each.
  `make_method` checks them; `checked()` raises ValueError naming a bad one.

  Example:
    >>> sites = Sites(.75, structure=structures.Block((2, 2)),
    ...               is_sparse={'head': False})
    >>> leaves = sites.leaves({'head': jnp.ones((8, 2)),
    ...                        'hidden': jnp.ones((8, 8))})
    >>> [(path, leaf.layout.group_shape, leaf.count)
    ...  for path, leaf in leaves.items()]
    [('hidden', (4, 4), 4)]
  """

  sparsity: float
  allocation: allocations.Allocation | Mapping[trees.Path, float] = (
      allocations.uniform)
  structure: structures.Structure = structures.Unstructured()
  is_sparse: selection.IsSparse = None
  batch_axes: selection.Axes = ()
  contracting: selection.Axes | None = None
  backward_sparsity: float | None = None  # None: that of A.

  def checked(self) -> 'Sites':
    """Returns itself, or raises ValueError naming the bad argument."""
    checks.check_sparsity('sparsity', self.sparsity)
    structures.check_structure(self.structure)
    layouts.check_fixed_sparsity(self.structure, self.sparsity)
    fixed = structures.fixed_sparsity(self.structure) is not None
    if fixed and self.allocation is not allocations.uniform:
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
    places = {path: self._layout(path, leaf) for path, leaf in chosen.items()}
    if isinstance(self.contracting, Mapping):
      selection.check_found('contracting', ['|'.join(
          f'(?:{pattern})' for pattern in self.contracting)], chosen)
    inner = _slice_sparsities(self.allocation, places, self.sparsity)
    outer = inner
    if self.backward_sparsity is not None:
      wider = self.at(self.backward_sparsity)
      outer = _slice_sparsities(wider.allocation, places, wider.sparsity)
    by_shape = callable(self.allocation) and (
        self.allocation is not allocations.uniform)
    guessed = {path: self._contracting(path, chosen[path]) is None and (
        by_shape or not place.plain) for path, place in places.items()}
    return {path: Leaf(path, index, places[path], inner[path], outer[path],
                       guessed[path]) for index, path in enumerate(places)}

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
    return layouts.layout(leaf.shape, path=path, structure=self.structure,
                          batch_axes=stacked,
                          contracting=self._contracting(path, leaf))

  def _contracting(self, path, leaf) -> tuple[int, ...] | None:
    """The axes that are said to contract; None leaves them to a guess."""
    if self.contracting is None:
      return None
    return selection.axes_of(self.contracting, path, leaf, 'contracting')


def _slice_sparsities(allocation, places, sparsity):
  """Allocates over single layers: each slice of a stacked leaf is one.

  An allocation function sees a stacked leaf as `path[0]`, `path[1]`, ...

  Raises:
    ValueError: if slices of one leaf would differ: they share one count.
  """
  if not callable(allocation):
    shapes = {path: leaf.shape for path, leaf in places.items()}
    return allocations.allocate(allocation, shapes, sparsity)
  shapes, slices = allocations.TreeShapes(), {}
  for path, leaf in places.items():
    own = tuple(n for i, n in enumerate(leaf.shape) if i not in leaf.stacked)
    if len(own) > 1:  # A matrix as the product sees it: heads are merged.
      own = leaf.view_shape[len(leaf.stacked):]
    layers = math.prod(leaf.shape[axis] for axis in leaf.stacked)
    names = [f'{path}[{i}]' for i in range(layers)] if leaf.stacked else [path]
    shapes.update({name: own for name in names})
    slices[path] = names
  shares = allocations.allocate(allocation, shapes, sparsity)
  for path, names in slices.items():
    if len({shares[name] for name in names}) > 1:
      raise ValueError(f'`allocation` (={allocation!r}) gives the layers that '
                       f'are stacked in {path!r} different sparsities.')
  return {path: shares[names[0]] for path, names in slices.items()}


def drop_and_grow(leaf: Leaf, active: jax.Array, scores: jax.Array,
                  growth: jax.Array, fraction,
                  negative: jax.Array | None = None) -> jax.Array:
  """Drops the active groups of least score, grows the most promising.

  Of n active groups the keep_count(n, fraction) of largest score stay; the
  n - kept groups of largest `growth` among all others, the just dropped
  included, become active.

  Law: the count never changes, whatever the scores.

  Args:
    leaf: the leaf whose groups these are.
    active: bool of the groups' shape, `leaf.count` in each competition.
    scores, growth: float of the groups' shape.
    fraction: share of the active groups that is dropped, in [0, 1]: a Python
      number or a traced float32[].
    negative: bool of the groups' shape: these and the others are dropped
      apart, each by the fraction. None: there is one ranking.

  Returns:
    bool of the groups' shape.

  Example:
    >>> leaf = Sites(.5).leaves({'kernel': jnp.ones((1, 4))})['kernel']
    >>> drop_and_grow(leaf, jnp.array([[True, True, False, False]]),
    ...               scores=jnp.array([[3., 1., 0., 0.]]),
    ...               growth=jnp.array([[0., 0., 0., 5.]]), fraction=.5)
    Array([[ True, False, False,  True]], dtype=bool)

  Reference:
    Evci et al., RigL, 2020, https://arxiv.org/abs/1911.11134, section 3. The
    official code truncates the number dropped and ranks inactive entries as
    zero when dropping; here the count is rounded and only active ones drop.
    Apart by sign: Mocanu et al., SET, 2018, algorithm 1.
  """
  if negative is None:
    stay = _stays(leaf.count, fraction)
    kept = leaf.top(scores, stay, among=active)
  else:
    kept = (_keep_share(leaf, active & negative, scores, fraction)
            | _keep_share(leaf, active & ~negative, scores, fraction))
    stay = leaf.sum(kept)
  return kept | leaf.top(growth, leaf.count - stay, among=~kept)


def _keep_share(leaf, side, scores, fraction):
  stay = topk.keep_count(leaf.sum(side), fraction)
  return leaf.top(scores, stay, among=side)


def _stays(count: int, fraction):
  """keep_count, at a fraction of 1 too, where one group still survives."""
  if isinstance(fraction, jax.Array) or fraction < 1:
    return topk.keep_count(count, fraction)
  return 1
