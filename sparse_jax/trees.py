"""Trees of parameters: leaves known by their paths."""

from collections.abc import Callable
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
Path = str

# Attribute keys below the name of a parameter: NNX's, and that of the array in
# a PackedBlocks.
_WRAPPERS = ('value', 'raw_value', 'blocks')
_GROWTH = jax.tree_util.GetAttrKey('growth')


def path_name(path: tuple[Any, ...]) -> Path:
  """Joins the keys of a JAX key path by '/', without NNX's '.value'.

  Example:
    >>> tree = {'Dense_0': {'kernel': 1.}}
    >>> [path_name(p) for p, _ in jax.tree.leaves_with_path(tree)]
    ['Dense_0/kernel']
  """
  if path and path[-1] == _GROWTH:  # Beside the blocks, in a box too.
    return f'{path_name(path[:-1])}/growth'
  names = [_key_name(key) for key in path]
  while names and names[-1] in _WRAPPERS and isinstance(
      path[len(names) - 1], jax.tree_util.GetAttrKey):
    names.pop()
  return '/'.join(names)


def _key_name(key: Any) -> str:
  for field in ('key', 'name', 'idx'):
    if hasattr(key, field):
      return str(getattr(key, field))
  return str(key)


def owner_of(name: Path, paths: Collection[Path]) -> Path | None:
  """The longest of the paths with which the name of a slot ends, or None.

  So an optimizer's slot is known by the parameter that it belongs to.

  Example:
    >>> owner_of('0/mu/Dense_0/kernel', {'kernel', 'Dense_0/kernel'})
    'Dense_0/kernel'
  """
  keys = name.split('/')
  ends = ('/'.join(keys[start:]) for start in range(len(keys) + 1))
  return next((end for end in ends if end in paths), None)


def leaves_by_path(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
                   ) -> dict[Path, Any]:
  """The leaves of a tree as `{path: leaf}`, in the tree's own order.

  Raises:
    ValueError: if two leaves have one path, as those of
      `{'a': {'b': w}, 'a/b': v}`.
  """
  pairs = jax.tree.leaves_with_path(tree, is_leaf=is_leaf)
  table = {path_name(path): leaf for path, leaf in pairs}
  if len(table) < len(pairs):
    names = [path_name(path) for path, _ in pairs]
    double = sorted({name for name in names if names.count(name) > 1})
    raise ValueError(f'`params` has two leaves of one path: {double}.')
  return table


def map_leaves(fn: Callable[..., Any], params: PyTree, *others: PyTree,
               is_leaf: Callable[[Any], bool] | None = None):
  """Maps `fn(path, leaf, *other leaves)` over the leaves of `params`.

  The other trees are matched by path, not by structure, and a leaf that one
  of them lacks is passed as None. So trees from a different container (a
  `nnx.State` and its pure dict), or with leaves left out by `optax.masked`,
  still fit together.
  """
  tables = [leaves_by_path(tree, is_leaf) for tree in others]

  def visit(path, leaf):
    name = path_name(path)
    return fn(name, leaf, *(table.get(name) for table in tables))

  return jax.tree.map_with_path(visit, params, is_leaf=is_leaf)


def widened(leaf: jax.Array) -> jax.Array:
  """The leaf in float32, or as it is where that is float64.

  Example:
    >>> widened(jnp.ones(2, jnp.bfloat16)).dtype
    dtype('float32')
  """
  wide = jnp.float64 if leaf.dtype == jnp.float64 else jnp.float32
  return leaf.astype(wide)
