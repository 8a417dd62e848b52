"""In which order kernels visit blocks."""

import jax
import jax.numpy as jnp


def sort(takes: jax.Array, gives: jax.Array, inputs: int, columns: int
         ) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Blocks side by side that add to the same column of tiles.

  Args:
    takes, gives: int[n], the tiles that blocks read and add to; clipped.
    inputs, columns: how many there are of these.

  Returns:
    (edges, order, takes): int32[columns + 1], where each column begins and the
    last ends; int32[n], the blocks by their columns; what these read.

  Example:
    >>> sort(jnp.array([5, 6, 7]), jnp.array([2, 0, 2]), 8, 3)
    (Array([0, 1, 1, 3], dtype=int32), Array([1, 0, 2], dtype=int32),
      Array([6, 5, 7], dtype=int32))
  """
  gives = jnp.clip(gives, 0, columns - 1)
  takes = jnp.clip(takes, 0, inputs - 1)
  order = jnp.argsort(gives).astype(jnp.int32)
  edges = jnp.searchsorted(gives[order], jnp.arange(columns + 1))
  return edges.astype(jnp.int32), order, takes[order].astype(jnp.int32)
