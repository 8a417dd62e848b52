"""Where the growth scores of packed weights stand among the parameters."""

from collections.abc import Mapping
from typing import Any

from sparse_jax import trees
from sparse_jax.blocks import packing

# The key of growth scores in a tree of bare arrays, beside the model's own.
GROWTH = 'growth'


def without_growth(params: trees.PyTree) -> trees.PyTree:
  """The tree without the places for growth scores: what an optimizer trains.

  They are in the PackedBlocks, or, where those are bare arrays (NNX), under
  the key 'growth' beside the model's own.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> params = {'kernel': packing.PackedBlocks(
    ...     jnp.ones((1, 2, 2)), growth=jnp.zeros((2, 2)), shape=(4, 4),
    ...     block=(2, 2))}
    >>> len(jax.tree.leaves(without_growth(params)))
    1
  """
  if has_bare_growth(params):
    mapping: Any = getattr(params, 'raw_mapping', params)
    own = {key: value for key, value in mapping.items() if key != GROWTH}
    return type(params)(own)
  return packing.map_packed(lambda leaf: leaf.replace(growth=None), params)


def has_bare_growth(params: trees.PyTree) -> bool:
  """Whether growth scores stand beside bare arrays.

  A model may have a part of that name: scores are known by the paths of the
  arrays that they belong to, and have an axis less.
  """
  if not isinstance(params, Mapping) or GROWTH not in params:
    return False
  arrays = dict(getattr(params, 'raw_mapping', params))
  scores = trees.leaves_by_path(arrays.pop(GROWTH))
  own = trees.leaves_by_path(arrays)
  return bool(scores) and all(
      path in own and own[path].ndim == score.ndim + 1
      for path, score in scores.items())
