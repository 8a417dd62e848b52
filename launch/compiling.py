"""The step of a run, compiled for TPUs that are not there.

The compiler is the chip's own (the extra `[aot]`): it says whether the step
fits, what memory it takes, which collectives it has, and how many cycles it
expects. Nothing is run.
"""

from collections.abc import Mapping
import functools
import importlib.util
import re
import time
from typing import Any

from launch import cycles

# Of the process that compiles; the first two let libtpu load without a TPU.
ENVIRONMENT = {'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
               'JAX_PLATFORMS': 'cpu', 'TF_CPP_MIN_LOG_LEVEL': '3'}
ASSUMPTIONS = (
    'Compiled and estimated, not run: cycles of the compiler\'s cost model at '
    'the chip\'s clock, loops by their length, kernels by their own estimate '
    'at the chip\'s peak. An ordinary step takes the cheaper branch of each '
    'condition, a refresh the dearer. Collectives and waits are not in the '
    'time.')


def check(topology: str) -> None:
  """Raises ValueError if there is no compiler, or no such topology's name."""
  if importlib.util.find_spec('libtpu') is None:
    raise ValueError(f'`compile` (={topology!r}) needs the compiler of TPUs, '
                     'the extra [aot]: pip install "jax[tpu]".')
  if not re.fullmatch(r'\w+:\d+x\d+(x\d+)?', topology):
    raise ValueError(f'`compile` (={topology!r}) must be a topology such as '
                     'v5e:2x4 or v5p:4x4x4.')


def figures(module: Any, values: Mapping[str, Any], topology: str
            ) -> dict[str, Any]:
  """What the compiler says of the step of a run, and of the dense step.

  Returns:
    `chip`, `chips`, `hbm_gib` (that of one), and for 'step' and 'dense' a
    mapping: `needed`, if it does not fit, else `gib` (all that one chip holds
    at once), `state_gib`, `ordinary_ms`, `refresh_ms`, `unknown` (what has no
    estimate), `collectives` (MiB of each kind in an ordinary step), `seconds`
    of compiling.
  """
  mesh = mesh_of(topology, values['model_parallel'])
  task, steps = module.without_data(values)
  kind = mesh.devices.flat[0].device_kind
  chip = cycles.CHIPS.get(kind)
  if chip is None:
    raise ValueError(f'`compile` (={topology!r}) is made of {kind!r}, of which '
                     f'nothing is known here; known are {list(cycles.CHIPS)}.')
  parts = mesh.shape['data']
  if values['batch_size'] % parts:
    raise ValueError(f'`batch_size` (={values["batch_size"]}) must be a '
                     f'multiple of the {parts} parts that {topology} makes of '
                     'it.')
  of = functools.partial(_compiled, module, values, mesh, chip)
  return {'chip': kind, 'chips': mesh.size, 'hbm_gib': chip.hbm,
          'step': of(task), 'dense': of(_dense(task, values, steps))}


def mesh_of(topology: str, model_parallel: int = 1, chips: int | None = None):
  """Some of a topology's chips, or all, as `experiments.devices.mesh` lays
  them."""
  import jax
  from jax.experimental import topologies
  try:
    found = topologies.get_topology_desc(
        platform='tpu', topology_name=topology).devices[:chips]
  except (RuntimeError, ValueError) as error:
    raise ValueError(f'`compile` (={topology!r}) is no topology of libtpu: '
                     f'{str(error).splitlines()[0]}') from None
  if len(found) % model_parallel:
    raise ValueError(f'`model_parallel` (={model_parallel}) must divide the '
                     f'{len(found)} chips of {topology}.')
  return jax.make_mesh(
      (len(found) // model_parallel, model_parallel), ('data', 'model'),
      devices=found, axis_types=(jax.sharding.AxisType.Auto,) * 2)


def placed(tree: Any, places: Any) -> Any:
  """The shapes of a tree's arrays, where they lie: at one place, or a tree."""
  import jax
  if isinstance(places, jax.sharding.Sharding):
    places = jax.tree.map(lambda _: places, tree)
  return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=place), tree, places)


def _dense(task, values, steps):
  """The same network without a method."""
  from experiments import optimization
  import sparse_jax
  method = sparse_jax.dense()
  return task._replace(
      method=method, operator_options={}, operand_period=1,
      compare_masks_every=0, tx=sparse_jax.sparsify(
          optimization.make(values, steps), method))


def _compiled(module, values, mesh, chip, task) -> dict[str, Any]:
  from experiments import devices
  from experiments import tasks
  from experiments import training
  import jax

  state = jax.eval_shape(functools.partial(tasks.init_state, task, 0))
  places, rows = training.state_places(task, mesh, state), devices.split(mesh)
  _, batch = task.problem.examples(values['batch_size'])
  state, batch = placed(state, places), placed(batch, rows)
  begin = time.monotonic()
  try:
    program = training.step_fn(task, places, rows).lower(state, batch).compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    needed = re.search(r'\(([\d.]+\w)\) exceeds available \w+ \(([\d.]+\w)\)',
                       str(error))
    return {'needed': '{} of {}'.format(*needed.groups()) if needed
            else str(error).splitlines()[0]}
  memory, text = program.memory_analysis(), program.as_text()
  held = memory.argument_size_in_bytes
  total = (held + memory.temp_size_in_bytes + memory.output_size_in_bytes
           - memory.alias_size_in_bytes)
  ordinary, refresh = (cycles.count(text, chip, dearest=dear)
                       for dear in (False, True))
  return {
      'gib': total / 2**30, 'state_gib': held / 2**30,
      'ordinary_ms': 1e3 * ordinary.cycles / chip.clock,
      'refresh_ms': 1e3 * refresh.cycles / chip.clock,
      'unknown': dict(ordinary.unknown),
      'collectives': {name: size / 2**20
                      for name, size in ordinary.collectives.items()},
      'seconds': time.monotonic() - begin}


def table(compiled: Mapping[str, Mapping[str, Any]]) -> str:
  """A Markdown table of cells' figures by their names."""
  from experiments import reporting
  rows = []
  for name, found in compiled.items():
    dense, own = (_row(found[what], found['hbm_gib'])
                  for what in ('dense', 'step'))
    if not any('needed' in found[what] for what in ('dense', 'step')):
      ratio = found['step']['ordinary_ms'] / found['dense']['ordinary_ms']
      own['of dense'] = f'{ratio:.3f}'
    rows += [{'cell': name, 'step': 'dense', **dense},
             {'cell': name, 'step': 'its own', **own}]
  one = next(iter(compiled.values()))
  return (reporting.markdown_table(rows)
          + f'\nOf one {one["chip"]} of {one["chips"]}. {ASSUMPTIONS}\n')


def _row(found, hbm) -> dict[str, str]:
  if 'needed' in found:
    return {'HBM (GiB)': f'does not fit: {found["needed"]}'}
  moved = ', '.join(f'{name} {size:.1f}'
                    for name, size in sorted(found['collectives'].items()))
  unknown = ', '.join(f'{n} {name}s' for name, n in found['unknown'].items())
  return {'HBM (GiB)': f'{found["gib"]:.3g} of {hbm:g}',
          'state (GiB)': f'{found["state_gib"]:.3g}',
          'ordinary (ms)': f'{found["ordinary_ms"]:.3g}',
          'refresh (ms)': f'{found["refresh_ms"]:.3g}', 'of dense': '',
          'collectives (MiB)': moved, 'not counted': unknown,
          'compiled in (s)': f'{found["seconds"]:.0f}'}


def fits(compiled: Mapping[str, Mapping[str, Any]]) -> bool:
  """Whether every cell's own step fits the memory of its chips."""
  return not any('needed' in found['step'] for found in compiled.values())
