"""Packed against dense products on one GPU or TPU, in ten minutes.

  python -m experiments.benchmarks.accelerator_kernels
  python -m experiments.benchmarks.accelerator_kernels --aot=v5e:2x2

Prints a Markdown table of blocks and densities: times as fast as the dense
product of the same process (interleaved medians), forward and with both
gradients, the fraction of what the chip could reach, temporary memory, and by
how much of its largest entry a result differs from that of 'batched'. On a
Hopper GPU its own kernels, which never ran, are tried too.

With --aot nothing runs: the real compiler of a TPU that is not there (pip
install libtpu) compiles the same programs and states their memory, and the
time is estimated:

  * a kernel's bundles, one a cycle, each as often as its loops turn, but a
    product no faster than the matrix units' peak;
  * and what passes before the first panel of rows is there and after the last
    one is done, at the bandwidth of the memory;
  * or all bytes that the kernel moves at that bandwidth, if that is more;
  * the dense product, and what else XLA makes, by XLA's own estimate.

Waits that only a run shows are in none of these. Recorded: README.md beside
this file.
"""

import collections
import functools
import glob
import os
import re
import tempfile

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

import sparse_jax
from experiments import reporting
from experiments.benchmarks import schedules
from experiments.benchmarks import timing
from launch import compiling
from launch.cycles import CHIPS
from launch.cycles import Chip
from sparse_jax.blocks import packing
from sparse_jax.blocks import tpu_sizes

_AOT = flags.DEFINE_string('aot', None, 'A TPU topology to compile for '
                           'instead, such as v5e:2x2 or v6e:2x2.')
_BATCH = flags.DEFINE_integer('batch', 8192, 'Rows of the input.')
_SIZE = flags.DEFINE_integer('size', 4096, 'Inputs and outputs.')
_BLOCKS = flags.DEFINE_multi_integer('block', None, 'Sides of a block. '
                                     'Default: all that have kernels.')
_DENSITIES = flags.DEFINE_multi_float('density', [.1, .2, .4],
                                      'Fraction of blocks that are kept.')
_DTYPE = flags.DEFINE_enum('dtype', 'bfloat16', ['bfloat16', 'float32'],
                           'Of all operands.')
_ROUNDS = flags.DEFINE_integer('rounds', 15, 'Timings of each contender.')


# Operations in bfloat16 and bytes a second of a chip, as its maker states them.
PEAKS = {
    **{name: (chip.flops, chip.bandwidth) for name, chip in CHIPS.items()},
    'A100': (312e12, 2.04e12), 'H100': (989e12, 3.35e12),
    'H200': (989e12, 4.8e12), 'L4': (121e12, 3e11), 'B200': (2250e12, 8e12)}


def peak(kind: str) -> tuple[float, float] | None:
  """The peak of the longest name that the kind of a device has in it."""
  return PEAKS.get(max((name for name in PEAKS if name in kind), key=len,
                       default=''))


def problem(side: int, density: float):
  """x, a cotangent, a packed weight: NumPy arrays, half a percent off."""
  random, size = np.random.RandomState(0), _SIZE.value
  dtype = jnp.dtype(_DTYPE.value)
  draw = lambda *shape: (random.rand(*shape) - .5).astype(dtype)
  grid = size // side
  count = sparse_jax.keep_count(grid**2, 1 - density)
  ids = random.permutation(grid**2)[:count].astype(np.int32)
  packed = packing.PackedBlocks(
      draw(count, side, side), ids // grid, ids % grid, shape=(size, size),
      block=(side, side))
  return draw(_BATCH.value, size), draw(_BATCH.value, size), packed


def programs(multiply):
  """The product, and the product with both gradients."""
  return dict(zip(('forward', 'both'), timing.forward_and_both(multiply)))


def work(name: str, x, weight) -> tuple[float, float]:
  """Products and bytes that a program cannot do without."""
  blocks = getattr(weight, 'blocks', weight)
  times = {'forward': 1, 'both': 3}[name]
  return 2. * times * x.shape[0] * blocks.size, float(
      times * (2 * x.nbytes + blocks.nbytes))


def ways(implementations):
  """Functions of x and a weight, by name."""
  return {name: functools.partial(sparse_jax.blocks.matmul,
                                  implementation=name)
          for name in implementations}


def implementations(side: int) -> tuple[str, ...]:
  """Ways of a product of such blocks on the device that is there."""
  device = jax.devices()[0]
  kernels = {'tpu': ('tpu',), 'gpu': ('gpu',)}.get(device.platform, ('loop',))
  if (any(name in device.device_kind for name in ('H100', 'H200'))
      and side in (64, 128) and _DTYPE.value == 'bfloat16'):
    kernels += ('hopper',)
  return ('batched', *kernels)


def difference(found, wanted) -> float:
  """The largest between two trees, each of the largest entry of its leaf."""
  wide = lambda leaf: jnp.asarray(leaf, jnp.float32)
  return max(
      float(jnp.max(abs(wide(a) - wide(b))) / jnp.max(abs(wide(b))))
      for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)))


def measured(side: int, density: float) -> list[dict]:
  """Rows of the table of one block and density, by the clock."""
  x, dy, packed = jax.tree.map(jnp.asarray, problem(side, density))
  dense = jnp.zeros(packed.shape, packed.dtype) + x[0, 0]
  contenders = {'dense': (jnp.matmul, dense), **{
      name: (way, packed)
      for name, way in ways(implementations(side)).items()}}
  best, rows = peak(jax.devices()[0].device_kind), collections.defaultdict(dict)
  for what in ('forward', 'both'):
    ready = {name: (jax.jit(programs(way)[what]).lower(x, w, dy).compile(), w)
             for name, (way, w) in contenders.items()}
    times = timing.interleaved_medians(
        {name: functools.partial(run, x, w, dy)
         for name, (run, w) in ready.items()},
        rounds=_ROUNDS.value, repeats=10)
    wanted = ready['batched'][0](x, packed, dy)
    for name, (run, weight) in ready.items():
      row = rows[name]
      row.update({'block': side, 'density': density, 'way': name,
                  f'{what} us': 1e6 * times[name],
                  f'{what}, times dense': times['dense'] / times[name]})
      if best:
        row[f'{what}, of roofline'] = max(needed / rate for needed, rate in zip(
            work(what, x, weight), best)) / times[name]
      row['temporaries MiB'] = timing.temporaries(run)
      row['differs by'] = None if name == 'dense' else (
          f'{difference(run(x, weight, dy), wanted):.0e}')
  return list(rows.values())


def estimated(mesh, folder: str, side: int, density: float) -> list[dict]:
  """Rows of the table of one block and density, by the compiler.

  It writes the schedules of its kernels to `folder`.
  """
  x, dy, packed = problem(side, density)
  chip = CHIPS[mesh.devices.flat[0].device_kind]
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  rows = {name: {'block': side, 'density': density, 'way': name}
          for name in ('dense', 'batched', 'tpu')}
  for what in ('forward', 'both'):
    for name, row in rows.items():
      multiply, weight = (jnp.matmul, jax.ShapeDtypeStruct(
          packed.shape, packed.dtype)) if name == 'dense' else (
              ways([name])[name], packed)
      args = compiling.placed((x, weight, dy), whole)
      for path in glob.glob(os.path.join(folder, '*')):
        os.remove(path)
      with jax.set_mesh(mesh):
        compiled = jax.jit(programs(multiply)[what]).lower(*args).compile()
        # There are no loops but those of kernels.
        spent = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"',
                                        compiled.as_text()))) / chip.clock
        for path in glob.glob(os.path.join(
            folder, '*-packed_*-final_bundles.txt')):
          if 'schedule-analysis' not in path:
            with open(path) as file:
              spent += kernel_seconds(os.path.basename(path), file.read(), x,
                                      packed, chip)
      row['temporaries MiB'] = timing.temporaries(compiled)
      row[f'{what} us'] = 1e6 * spent
      row[f'{what}, times dense'] = rows['dense'][f'{what} us'] / (1e6 * spent)
  return list(rows.values())


def kernel_seconds(name: str, text: str, x, packed, chip: Chip) -> float:
  """Of a product or a gradient of the blocks, from its schedule."""
  side, size = packed.block[0], x.dtype.itemsize
  count, columns = packed.blocks.shape[0], packed.grid[1]
  cores = tpu_sizes.chip().cores
  per_core = chip.flops / chip.clock / 2 / cores
  used = len(np.unique(packed.rows)) / columns
  if 'packed_product' in name:
    rows, group = tpu_sizes.panel(x, packed.block, side, x.shape[1])
    panels = x.shape[0] // rows
    steps = panels * (columns // group)
    cycles = schedules.cycles(
        text, [steps, group, count / columns], {1: [used, 1 - used]},
        {2: rows * side**2 / per_core})
    moved = 2 * x.nbytes + panels * packed.blocks.nbytes
    ends = rows * (x.shape[1] + group * side) * size
  else:
    rows, chunk = tpu_sizes.chunk(x, x, packed.block, count)
    panels, chunks = x.shape[0] // rows, -(-count // chunk)
    strips = used * columns / count
    cycles = schedules.cycles(
        text, [panels * chunks, count / chunks, count / chunks / panels,
               2 / panels], {1: [strips]}, {1: rows * side**2 / per_core})
    moved = chunks * 2 * x.nbytes + packed.blocks.nbytes
    ends = 2 * rows * x.shape[1] * size
  return max(cycles / cores / chip.clock + ends / chip.bandwidth,
             moved / chip.bandwidth)


def main(_):
  row_of, kernels = measured, (128, 256, 512)
  if _AOT.value is not None:
    compiling.check(_AOT.value)
    dumped = tempfile.TemporaryDirectory()  # Goes when this returns.
    os.environ.update(compiling.ENVIRONMENT, LIBTPU_INIT_ARGS=(
        '--xla_jf_emit_annotations=true --xla_jf_dump_llo_text=true '
        f'--xla_jf_dump_to={dumped.name}'))
    mesh = compiling.mesh_of(_AOT.value, chips=1)
    row_of = functools.partial(estimated, mesh, dumped.name)
    print(f'{mesh.devices.flat[0].device_kind}, jax {jax.__version__}: '
          'compiled and estimated, not run\n')
  else:
    device = jax.devices()[0]
    if device.platform != 'tpu':
      kernels = (32, 64, 128)
    print(f'{device.device_kind}, jax {jax.__version__}\n')
  rows = [row for side in _BLOCKS.value or kernels
          for density in _DENSITIES.value for row in row_of(side, density)]
  print(reporting.markdown_table(rows, formats={'temporaries MiB': '.1f'} | {
      f'{what}{kind}': form for what in ('forward', 'both') for kind, form in (
          (' us', '.0f'), (', times dense', '.2f'), (', of roofline', '.2f'))}))


if __name__ == '__main__':
  app.run(main)
