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
from jax.sharding import PartitionSpec

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


def whole(fn: Callable[..., trees.PyTree], *arrays: jax.Array) -> trees.PyTree:
  """fn(*arrays), as `automatic`, with each result whole on every device."""
  if not is_explicit(arrays):
    return fn(*arrays)
  place = jax.sharding.NamedSharding(mesh_of(*arrays), PartitionSpec())
  return jax.jit(jax.sharding.auto_axes(fn, out_sharding=place))(*arrays)


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


def by_rows(fn: Callable[..., trees.PyTree], rows: tuple[str, ...],
            *arrays: jax.Array) -> trees.PyTree:
  """fn of each device's part of the first axes, as of `row_axes`."""
  mesh, at = mesh_of(*arrays), PartitionSpec(rows)
  bare = jax.sharding.get_abstract_mesh().empty
  return jax.jit(jax.shard_map(
      fn, mesh=mesh if bare else None, in_specs=at, out_specs=at,
      axis_names=set(shared_axes(mesh)), check_vma=False))(*arrays)


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


def row_axes(array: jax.Array, without: tuple[str, ...] = ()
             ) -> tuple[str, ...]:
  """The axes of a mesh over which the first axis of an array is split.

  Explicit ones as the type says. What XLA splits is in no type: as many of the
  automatic ones as divide the array.

  Args:
    array: of any shape with a first axis.
    without: axes that are used otherwise.
  """
  if is_explicit(array):
    entry = jax.typeof(array).sharding.spec[0]
    return entry if isinstance(entry, tuple) else (entry,) if entry else ()
  found: tuple[str, ...] = ()
  parts = 1
  for name, size in shared_axes(mesh_of(array)).items():
    if name not in without and array.shape[0] % (parts * size) == 0:
      found, parts = (*found, name), parts * size
  return found


def is_shared(*arrays: jax.Array) -> bool:
  """Whether XLA may split such arrays over devices, as far as one can know."""
  return math.prod(shared_axes(mesh_of(*arrays)).values()) > 1


def is_split(array: jax.Array) -> bool:
  """Whether the type of an array says that it lies in pieces."""
  return is_explicit(array) and any(
      axis is not None for axis in jax.typeof(array).sharding.spec)
