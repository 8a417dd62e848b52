"""Random scores that are written to memory once, and nothing else."""

import functools
import math

import jax
from jax import lax
import jax.numpy as jnp

_ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)
_PARITY = 0x1BD11BDA


def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """jax.random.uniform(key, shape), bit for bit, in one pass.

  On a CPU JAX hashes the entries' places in a loop over whole arrays: four of
  them beside the result. Here each entry is hashed by itself, as on a TPU.

  Args:
    key: a typed key.
    shape: of the result.

  Returns:
    float32[shape] in [0, 1) (float64 in 64-bit mode).

  Example:
    >>> key = jax.random.key(0)
    >>> bool(jnp.all(uniform(key, (3, 4)) == jax.random.uniform(key, (3, 4))))
    True

  Reference:
    Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011,
    https://doi.org/10.1145/2063384.2063405, Threefry-2x32 of 20 rounds.
  """
  usual = (jax.random.key_impl(key) == 'threefry2x32'
           and jax.config.jax_threefry_partitionable
           and not jax.config.jax_enable_x64 and math.prod(shape) < 2**32)
  return (_uniform if usual else jax.random.uniform)(key, shape)


@functools.partial(jax.jit, static_argnums=1)
def _uniform(key, shape):
  place, stride = jnp.zeros(shape, jnp.uint32), 1
  for axis in reversed(range(len(shape))):
    own = lax.broadcasted_iota(jnp.uint32, shape, axis)
    place, stride = place + own * jnp.uint32(stride), stride * shape[axis]
  high, low = _hashed(*jax.random.key_data(key), jnp.zeros_like(place), place)
  ones = lax.bitcast_convert_type(jnp.float32(1), jnp.uint32)
  return lax.bitcast_convert_type((high ^ low) >> 9 | ones, jnp.float32) - 1


def _hashed(first, second, high, low):
  keys = first, second, first ^ second ^ jnp.uint32(_PARITY)
  high, low = high + first, low + second
  for i in range(5):
    for shift in _ROTATIONS[i % 2]:
      high = high + low
      low = high ^ (low << shift | low >> (32 - shift))
    high = high + keys[(i + 1) % 3]
    low = low + (keys[(i + 2) % 3] + jnp.uint32(i + 1))
  return high, low
