"""A packed step on a pod that is not there: bytes, cycles, collectives.

  python -m experiments.benchmarks.pod --topology=v5e:4x4
  python -m experiments.benchmarks.pod --topology=v5e:4x4 --split=fsdp

An 8-layer transformer (nn.scan, remat, bfloat16, AdamW, donated), its
projections packed in blocks of 256 at 90%, by RigL and by Top-KAST with the
reservoir in host memory, beside the dense step. The chips' own compiler (pip
install 'jax[tpu]') says everything; nothing is run. What is counted and what is
not: launch/cycles.py. Recorded: README.md beside this file.
"""

import functools
import os

from absl import app
from absl import flags
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import sparse_jax
from experiments import reporting
from experiments.benchmarks import timing
from launch import compiling
from launch import cycles

_TOPOLOGY = flags.DEFINE_string('topology', 'v5e:4x4', 'The chips.')
_SPLIT = flags.DEFINE_enum('split', 'data', ['data', 'fsdp'], 'Whether the '
                           'state lies whole on each chip, or in pieces.')
_BATCH = flags.DEFINE_integer('batch', 256, 'Sequences of a step.')
_WIDTH = flags.DEFINE_integer('width', 1024, 'Of the model; 4 times in the '
                              'middle.')
_HEADS = flags.DEFINE_integer('heads', 8, 'Of attention.')
_LAYERS = flags.DEFINE_integer('layers', 8, 'Of the transformer.')
_WEIGHTS_FIRST = flags.DEFINE_bool('weights_first', False, 'As of '
                                   'sparse_jax.with_method.')
_METHODS = flags.DEFINE_multi_string('method', ['dense', 'static', 'rigl',
                                                'top_kast'], 'Which rows.')
_LENGTH = 512  # Tokens of a sequence.
_BLOCK, _SPARSITY = 256, .9  # Sides of a block, and how many blocks go.


class Transformer(nn.Module):

  @nn.compact
  def __call__(self, x):
    layers = nn.scan(nn.remat(timing.TransformerLayer, prevent_cse=False),
                     variable_axes={'params': 0}, split_rngs={'params': True},
                     length=_LAYERS.value)
    return layers(jnp.bfloat16, _HEADS.value, name='layers')(x, None)[0]


def methods() -> dict[str, sparse_jax.SparseMethod]:
  options = dict(structure=sparse_jax.Block((_BLOCK,) * 2),
                 batch_axes={'layers': (0,)})
  pack, sparsity = sparse_jax.packed, _SPARSITY
  return {'dense': sparse_jax.dense(),
          'static': pack(sparse_jax.static(sparsity, **options)),
          'rigl': pack(sparse_jax.rigl(sparsity, **options)),
          'top_kast': pack(sparse_jax.top_kast(
              sparsity, backward_sparsity=sparsity - .1, **options))}


def place(mesh, path, leaf):
  """Whole on each chip; with --split=fsdp the longest axis in pieces."""
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  if getattr(path[-1], 'name', '') == 'reservoir':
    return whole.with_memory_kind('pinned_host')
  axes = [axis for axis, size in enumerate(leaf.shape)
          if size % mesh.size == 0]
  if _SPLIT.value == 'data' or not axes or leaf.size < 2**16:
    return whole
  longest = max(axes, key=lambda axis: leaf.shape[axis])
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(
      *[None] * longest, 'data'))


def row(mesh, name, method) -> dict:
  """What the compiler says of one step."""
  model, shape = Transformer(), (_BATCH.value, _LENGTH, _WIDTH.value)
  x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)

  def loss(params, x):
    y = model.apply({'params': params}, x)
    return jnp.mean(jnp.square(y.astype(jnp.float32)))

  start, step = timing.training_step(loss, method, optax.adamw(1e-3),
                                     weights_first=_WEIGHTS_FIRST.value)
  state = jax.eval_shape(lambda: start(model.init(
      jax.random.key(0), jnp.zeros((1, *shape[1:]), x.dtype))['params']))
  places = jax.tree.map_with_path(functools.partial(place, mesh), state)
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  program = jax.jit(step, donate_argnums=0, out_shardings=places).lower(
      compiling.placed(state, places), compiling.placed(x, rows)).compile()
  chip = cycles.CHIPS[mesh.devices.flat[0].device_kind]
  memory, text = program.memory_analysis(), program.as_text()
  ordinary, refresh = (cycles.count(text, chip, dearest=dear)
                       for dear in (False, True))
  held = memory.argument_size_in_bytes - x.size * x.dtype.itemsize // mesh.size
  moved = lambda cost: ', '.join(f'{name} {size / 2**20:.1f}' for name, size
                                 in sorted(cost.collectives.items()))
  return {'step': name, 'state MiB': held / 2**20,
          'temporaries MiB': timing.temporaries(program),
          'host MiB': memory.host_argument_size_in_bytes / 2**20,
          'ordinary ms': 1e3 * ordinary.cycles / chip.clock,
          'refresh ms': 1e3 * refresh.cycles / chip.clock,
          'collectives MiB': moved(ordinary),
          'in a refresh': moved(refresh),
          'not counted': f'{dict(refresh.unknown) or ""}'}


def main(_):
  os.environ.update(compiling.ENVIRONMENT)
  mesh = jax.sharding.Mesh(
      compiling.mesh_of(_TOPOLOGY.value).devices.flatten(), ('data',),
      axis_types=(jax.sharding.AxisType.Auto,))
  print(f'{_TOPOLOGY.value}, jax {jax.__version__}: compiled and estimated, '
        'not run\n')
  rows = [row(mesh, name, methods()[name]) for name in _METHODS.value]
  for each in rows:
    for name in ('state', 'temporaries'):
      each[f'{name}, of dense'] = (each[f'{name} MiB']
                                   / rows[0][f'{name} MiB'])
    each['ordinary, of dense'] = each['ordinary ms'] / rows[0]['ordinary ms']
  print(reporting.markdown_table(rows, formats={
      **dict.fromkeys(('state MiB', 'temporaries MiB', 'host MiB',
                       'ordinary ms', 'refresh ms'), '.1f'),
      **dict.fromkeys(('state, of dense', 'temporaries, of dense',
                       'ordinary, of dense'), '.3f')}))


if __name__ == '__main__':
  app.run(main)
