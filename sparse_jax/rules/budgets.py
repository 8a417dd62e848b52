"""One budget for many leaves: counts that the run itself decides."""

import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from sparse_jax import trees
from sparse_jax.masks import structures
from sparse_jax.masks import topk
from sparse_jax.rules import leaves as leaves_lib

Counts = dict[trees.Path, Any]  # An int, or int32 of each competition.


def global_counts(leaves: dict[trees.Path, leaves_lib.Leaf],
                  scores: dict[trees.Path, jax.Array], total: int | jax.Array
                  ) -> Counts:
  """Groups that each leaf keeps if the groups of all leaves compete.

  Law: no leaf (no slice of a stacked leaf) is left without a group, and the
  counts sum to the total, if that is enough for one each.

  Args:
    leaves: the leaves that share the budget.
    scores: float of each leaf's groups' shape; only their order matters.
    total: how many are kept of all, a number or a traced one.

  Returns:
    int32 of each leaf's groups' shape with its competing axes as 1.

  Example:
    >>> leaves = leaves_lib.Sites(.5).leaves(
    ...     {name: jnp.ones((2, 2)) for name in 'ab'})
    >>> scores = {'a': jnp.array([[9., 8.], [7., 1.]]),
    ...           'b': jnp.array([[6., 2.], [3., 4.]])}
    >>> {name: int(count.sum())
    ...  for name, count in global_counts(leaves, scores, 4).items()}
    {'a': 3, 'b': 1}
  """
  least = sum(scores[path].size // max(leaf.layout.rivals, 1)
              for path, leaf in leaves.items())
  counts = _joint_counts([scores[path] for path in leaves],
                         jnp.maximum(total, least),
                         tuple(leaf.layout for leaf in leaves.values()))
  return dict(zip(leaves, counts))


@functools.partial(jax.jit, static_argnums=2)
def _joint_counts(scores, total, layouts):
  """`topk.joint_counts` with the best group of each competition first."""
  best = [jnp.where(layout.top(own, 1), jnp.inf,
                    jnp.minimum(own, jnp.finfo(own.dtype).max))
          for own, layout in zip(scores, layouts)]
  return topk.joint_counts(best, total,
                           [layout.competing for layout in layouts])


def best(leaves: dict[trees.Path, leaves_lib.Leaf],
         groups: dict[trees.Path, jax.Array], counts: Counts
         ) -> dict[trees.Path, jax.Array]:
  """{path: bool}: the groups of largest score, so many of each leaf."""
  return {path: leaf.top(groups[path], counts[path])
          for path, leaf in leaves.items()}


def counts_by_scope(leaves: dict[trees.Path, leaves_lib.Leaf],
                    groups: dict[trees.Path, jax.Array], scope: str,
                    sparsity: float) -> Counts:
  """{path: groups kept}: each leaf's own count, or one budget for all."""
  if scope == 'layer':
    return {path: leaf.count for path, leaf in leaves.items()}
  size = sum(groups[path].size for path in leaves)
  return global_counts(leaves, groups, topk.keep_count(size, sparsity))


def share_out(total: jax.Array, claims: Counts, room: Counts) -> Counts:
  """Divides a total among leaves in proportion to their claims.

  Law: the shares are whole, none is above its room, they sum to
  min(total, all room), and where no room binds each differs from its exact
  proportion by less than 1.

  Args:
    total: int32[].
    claims: float32 of any shape for each leaf, at least 0.
    room: int32 of the same shapes: the most that each may get.

  Returns:
    int32 of the same shapes.

  Example:
    >>> claims = {'a': jnp.array([3.]), 'b': jnp.array([1.])}
    >>> room = {'a': jnp.array([4]), 'b': jnp.array([4])}
    >>> shares = share_out(jnp.int32(6), claims, room)
    >>> int(shares['a'][0]), int(shares['b'][0])
    (4, 2)
  """
  most, weight = _flat(room), _flat(claims).astype(jnp.float32)

  def give(given):
    left, open_ = total - _sum(given), given < most
    claim = jnp.where(open_, weight, 0)
    claim = jnp.where(jnp.sum(claim) > 0, claim, open_.astype(jnp.float32))
    pool = (left + _sum(jnp.where(open_, given, 0))).astype(jnp.float32)
    due = claim / jnp.sum(claim) * pool - given.astype(jnp.float32)
    whole = jnp.clip(jnp.floor(due * (1 - 2**-20)).astype(jnp.int32), 0,
                     most - given)
    before = jnp.cumsum(whole, dtype=jnp.int32) - whole
    whole = jnp.clip(left - before, 0, whole)
    single = topk.top_k_mask(jnp.where(open_, due, jnp.nan), left) & open_
    return given + jnp.where(jnp.any(whole > 0), whole,
                             single.astype(jnp.int32))

  def unfinished(given):
    return (_sum(given) < total) & jnp.any(given < most)

  shares = lax.while_loop(unfinished, give, jnp.zeros_like(most))
  return _unflat(shares, room)


def check_movable(sites: leaves_lib.Sites, what: str, value) -> None:
  """Raises ValueError if the sites fix the sparsity of every leaf."""
  if structures.fixed_sparsity(sites.structure) is not None:
    raise ValueError(f'`{what}` (={value!r}) cannot move a budget between '
                     f'leaves with `structure` ={sites.structure}, which fixes '
                     'the sparsity of every leaf.')


def check_scope(sites: leaves_lib.Sites, scope: str) -> str:
  """Returns 'layer' or 'global', or raises ValueError naming the argument."""
  if scope not in ('layer', 'global'):
    raise ValueError(f'`scope` (={scope!r}) must be \'layer\' or \'global\'.')
  if scope == 'global':
    check_movable(sites, 'scope', scope)
    if sites.allocation is not leaves_lib.Sites._field_defaults['allocation']:
      raise ValueError(f'`allocation` (={sites.allocation!r}) must be uniform '
                       'with `scope` =\'global\', which allocates by itself.')
  return scope


def _sum(counts: jax.Array) -> jax.Array:
  return jnp.sum(counts, dtype=jnp.int32)


def _flat(parts: Counts) -> jax.Array:
  return jnp.concatenate([part.ravel() for part in parts.values()])


def _unflat(flat: jax.Array, parts: Counts) -> Counts:
  sizes = [part.size for part in parts.values()]
  ends = [sum(sizes[:i + 1]) for i in range(len(sizes))]
  return {path: flat[end - size:end].reshape(part.shape)
          for (path, part), size, end in zip(parts.items(), sizes, ends)}
