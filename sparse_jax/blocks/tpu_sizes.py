"""How much of a TPU the kernels take: rows of a panel, blocks of a chunk.

There is no autotuner; the sizes follow from the memory of the chip.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_MIB = 2**20
_DTYPES = (jnp.bfloat16, jnp.float32)
_SIDES = (128, 256, 512)
_ROWS = (1024, 512, 256, 128)  # Of a panel, the best first.
_MOST_BLOCKS = 2**15  # Their ids lie in the scalar memory.
_RING, _RING_BYTES = 8, 2 * _MIB  # Blocks on their way, at most.
_SPARE = 2 * _MIB  # Of VMEM, for what the compiler needs itself.


class Chip(NamedTuple):
  """What a kernel may take of a chip's VMEM, and how many cores share it."""

  vmem: int
  cores: int


# Of a large memory XLA keeps a part for other arrays. What is not named here
# gets what all of them have.
_VMEM = {'TPU v5 lite': 64 * _MIB, 'TPU v5e': 64 * _MIB, 'TPU v5': 48 * _MIB,
         'TPU v5p': 48 * _MIB, 'TPU v6 lite': 64 * _MIB, 'TPU v6e': 64 * _MIB,
         'TPU7x': 48 * _MIB}
_LEAST_VMEM, _MOST_CORES = 16 * _MIB, 2


def chip() -> Chip:
  """That of the mesh in use, else of the first device.

  A program that is compiled for chips which are not there says which by
  `jax.set_mesh`; else it gets sizes that fit every kind.

  Example:
    >>> chip()  # On a CPU.
    Chip(vmem=16777216, cores=2)
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is None:
    device = jax.devices()[0]
  return Chip(_VMEM.get(device.device_kind, _LEAST_VMEM),
              getattr(device, 'num_cores', None) or _MOST_CORES)


def taken(x: jax.Array, block: tuple[int, int], count: int = 1) -> bool:
  """Whether there are kernels for the dtype, the blocks and their number."""
  return (x.dtype in _DTYPES and set(block) <= set(_SIDES) and x.shape[0] > 0
          and 0 < count <= _MOST_BLOCKS)


def panel(x: jax.Array, block: tuple[int, int], wide: int, width: int
          ) -> tuple[int, int] | None:
  """Rows of a panel of x, columns of tiles of y beside it; None: none fits.

  Args:
    x: [batch, in], as ever in blocks/tpu.py.
    block: sides of a block.
    wide: columns of y in a tile.
    width: of y.
  """
  size, area = x.dtype.itemsize, block[0] * block[1]
  left = chip().vmem - _SPARE - depth(block, size) * area * size
  columns = width // wide
  for most in _ROWS:
    rows = rows_of(x.shape[0], most)
    for group in range(columns, 0, -1):
      need = 2 * size * (x.shape[1] + group * wide) + 2 * 4 * wide
      if columns % group == 0 and rows * need <= left:
        return rows, group
  return None


def chunk(x: jax.Array, cotangent: jax.Array, block: tuple[int, int],
          count: int) -> tuple[int, int] | None:
  """Rows of a panel, blocks whose gradients are summed; None: none fits.

  As few chunks as can be, since x and the cotangent are read for each; at
  least one for each core.
  """
  size, area = x.dtype.itemsize, block[0] * block[1]
  found = []
  for most in _ROWS:
    rows = rows_of(x.shape[0], most)
    strips = 2 * (x.shape[1] + cotangent.shape[1]) + 2 * max(block)
    left = (chip().vmem - _SPARE - 2 * area * size - 4 * area
            - rows * size * strips)
    if left >= 4 * area:
      chunks = max(-(-count // (left // (4 * area))),
                   min(chip().cores, count))
      found.append((chunks, -rows))
  if not found:
    return None
  chunks, rows = min(found)
  return -rows, -(-count // chunks)


def rows_of(batch: int, most: int) -> int:
  """Rows of a panel: evenly, at most so many, whole sublanes of 16 bits.

  Example:
    >>> rows_of(8192, 512), rows_of(1000, 512), rows_of(100, 512)
    (512, 512, 100)
  """
  panels = -(-batch // most)
  return batch if panels == 1 else -(-batch // (panels * 16)) * 16


def span(width: int, side: int) -> int:
  """Columns of a tile of the growth scores: whole blocks that divide all."""
  return next(size for size in (512, 256, 128)
              if width % size == 0 and size % side == 0)


def depth(block: tuple[int, int], size: int) -> int:
  """Blocks in the ring of those on their way."""
  return max(2, min(_RING, _RING_BYTES // (block[0] * block[1] * size)))
