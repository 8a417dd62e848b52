"""Meshes with explicit axes: masks are chosen on automatic ones.

`jax.make_mesh` gives axes whose use is part of an array's type. Selecting
among the entries of a sharded array says nothing of its own about where they
lie, so here it runs as on a mesh with automatic axes, where nothing is
gathered either, and what comes out is laid like what it belongs to.
"""

from collections.abc import Callable
import math
from typing import Any

import jax
from jax.sharding import AxisType

from sparse_jax import trees


def automatic(fn: Callable[..., trees.PyTree], like: trees.PyTree, *args: Any
              ) -> trees.PyTree:
  """fn(*args), each array of the result laid like its namesake in `like`.

  Args:
    fn: a function of trees of arrays.
    like: a tree of arrays (or a prefix), of the structure of the result.
    *args: trees of arrays.

  Returns:
    What fn returns. Without a mesh that has explicit axes, nothing else is
    done.

  Example:
    >>> import jax.numpy as jnp
    >>> automatic(lambda x: x.reshape(2, 2), jnp.ones((2, 2)), jnp.arange(4))
    Array([[0, 1],
           [2, 3]], dtype=int32)
  """
  if not is_explicit(args):
    return fn(*args)
  places = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding, like)
  return jax.jit(jax.sharding.auto_axes(fn, out_sharding=places))(*args)


def explicit(fn: Callable[[trees.PyTree], trees.PyTree], like: trees.PyTree
             ) -> Callable[[trees.PyTree], trees.PyTree]:
  """fn for use inside `automatic`: it sees its argument laid like `like`."""
  if not is_explicit(like):
    return fn
  places = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding, like)
  return jax.sharding.explicit_axes(fn, in_sharding=(places,))


def laid_like(array: jax.Array, like: jax.Array | None) -> jax.Array:
  """The array as the other of its shape lies, where types say so."""
  if like is None or not is_explicit(like):
    return array
  return jax.sharding.reshard(array, jax.typeof(like).sharding)


def shapes_of(fn: Callable[..., trees.PyTree], *args: Any) -> trees.PyTree:
  """What jax.eval_shape gives where nothing is sharded."""
  bare = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
                      args)
  return jax.eval_shape(fn, *bare)


def is_explicit(tree) -> bool:
  """Whether the type of an array says how it is sharded."""
  return any(AxisType.Explicit in jax.typeof(leaf).sharding.mesh.axis_types
             for leaf in jax.tree.leaves(tree)
             if isinstance(leaf, jax.Array))


def mesh_of(*arrays: jax.Array) -> jax.sharding.AbstractMesh:
  """The mesh of the context, or the one on which arrays lie; may be empty.

  Types say the mesh of arrays that were put on one, also where its axes are
  automatic and `jit` was given no mesh.
  """
  context = jax.sharding.get_abstract_mesh()
  meshes = (context, *(jax.typeof(array).sharding.mesh for array in arrays))
  return next((mesh for mesh in meshes if not mesh.empty), context)


def shared_axes(mesh: jax.sharding.AbstractMesh) -> dict[str, int]:
  """The sizes of axes over which XLA may split arrays: not those by hand."""
  return {name: size for name, size, kind in zip(
      mesh.axis_names, mesh.axis_sizes, mesh.axis_types)
          if kind != AxisType.Manual}


def is_shared(*arrays: jax.Array) -> bool:
  """Whether XLA may split such arrays over devices, as far as one can know."""
  return math.prod(shared_axes(mesh_of(*arrays)).values()) > 1


def is_split(array: jax.Array) -> bool:
  """Whether the type of an array says that it lies in pieces."""
  return is_explicit(array) and any(
      axis is not None for axis in jax.typeof(array).sharding.spec)
