"""Runs every cell of a table: here, on Slurm, on TPU VMs or on GKE.

  python -m launch.run --table=top_kast_table6 --scale=small --workers=2

Cells that are finished are skipped, those that fail are tried again, and no
cell runs twice at once, whoever else runs the table. Killed and started again
with the same flags, it goes on where it was. `python -m launch.collect` makes
the table, at any time.

  python -m launch.run --table=swat_imagenet --scale=paper --dry_run

prints every command, builds each model, method and optimizer from shapes, and
prints what the cells cost in arithmetic and memory; nothing runs. With
--compile=v5p:4x4x4 it also compiles each cell's step for those chips, by their
own compiler: memory, estimated time, collectives, beside the dense step's. A
flag that the cells' binary does not have is an error before anything starts.
--rows=rigl,set takes only the rows of the table that match.

Status: 0 if every cell is finished or submitted, 1 if one failed or does not
fit the chips it is compiled for, 2 for flags that make no run, 75 if stopped by
SIGTERM or Ctrl-C with work left.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import functools
import os
import shlex
import subprocess
import sys
from typing import Any
from typing import NamedTuple

from absl import flags

from experiments import files
from experiments import programs
from experiments import results
from launch import backends
from launch import compiling
from launch import describe
from launch import pool
from launch import table as table_lib
from launch import tables

# Flags of single backends, and which of them must be given.
OPTIONS = {'local': ('workers', 'gpus_per_worker', 'python'),
           'slurm': ('workers', 'python', 'tasks', 'sbatch'),
           'tpu_vm': ('tpu_names', 'zone', 'remote_dir'),
           'xpk': ('cluster', 'tpu_type', 'docker_image', 'num_slices')}
NEEDED = {'local': (), 'slurm': (), 'tpu_vm': ('tpu_names', 'zone'),
          'xpk': ('cluster', 'tpu_type', 'docker_image')}
# Flags of a cell that say which one it is, and where.
OWN_CELL_FLAGS = ('seed', 'workdir')
AT_LEAST_ONE = ('workers', 'tasks', 'num_slices', 'devices')


def define_flags(into: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flags of this program."""
  enum, integer, string, many, listed = (
      functools.partial(define, flag_values=into) for define in (
          flags.DEFINE_enum, flags.DEFINE_integer, flags.DEFINE_string,
          flags.DEFINE_multi_string, flags.DEFINE_list))
  define_table_flags(into)
  many('cell_flag', [], 'A flag for every cell, after the table\'s own: '
       '--cell_flag=--data_dir=DIR.')
  enum('backend', 'local', list(OPTIONS), 'What runs the cells.')
  flags.DEFINE_bool('dry_run', False, 'Print commands and costs; run nothing.',
                    flag_values=into)
  integer('retries', 1, 'How often a cell that failed is started again.')
  integer('workers', 1, 'local, slurm: cells at once.')
  integer('gpus_per_worker', 0, 'local: each worker sees so many GPUs of its '
          'own. 0: all see all.')
  string('python', sys.executable, 'local, slurm: what runs the cells.')
  integer('tasks', 1, 'slurm: processes of a cell; above 1, cells get '
          '--distributed.')
  many('sbatch', [], 'slurm: an option for sbatch: '
       '--sbatch=--gpus-per-task=8.')
  listed('tpu_names', [], 'tpu_vm: slices that are up, a worker each.')
  string('zone', None, 'tpu_vm: where they are.')
  string('remote_dir', 'sparse_jax', 'tpu_vm: this project on their hosts.')
  string('cluster', None, 'xpk: the cluster.')
  string('tpu_type', None, 'xpk: of a slice, such as v5p-32.')
  string('docker_image', None, 'xpk: with this project in its working folder.')
  integer('num_slices', 1, 'xpk: slices of a cell.')
  integer('devices', 1, '--dry_run: over how many a batch is split, for the '
          'memory of one.')
  string('compile', None, '--dry_run: TPUs that need not be there, for which '
         'each step is compiled: v5e:2x4, v5p:4x4x4. Needs libtpu.')


def define_table_flags(into: flags.FlagValues) -> None:
  """Defines what says which table, where and of what seeds."""
  flags.DEFINE_enum('table', None, list(tables.TABLES), 'Which one.',
                    flag_values=into)
  flags.DEFINE_enum('scale', 'small', table_lib.SCALES, 'The published '
                    'schedule, or one of minutes.', flag_values=into)
  flags.DEFINE_string('sweep_dir', None, 'Where the cells leave everything. '
                      'Default: runs/<table>_<scale>.', flag_values=into)
  flags.DEFINE_list('seeds', None, 'Default: the table\'s own.',
                    flag_values=into)
  flags.DEFINE_list('rows', [], 'Regular expressions; only rows of the table '
                    'that match one. Default: all.', flag_values=into)


class Cell(NamedTuple):
  """A run, and what its binary makes of its flags."""

  run: table_lib.Run
  values: Mapping[str, Any]
  free: Sequence[str]  # Flags that a continuation may change.
  figures: Mapping[str, Any] | None
  compiled: Mapping[str, Any] | None = None


def cells(runs: Sequence[table_lib.Run], sweep_dir: str, figures: bool,
          topology: str | None = None) -> list[Cell]:
  """Asks the binary about its runs; a ValueError if it does not take one."""
  if not runs:
    return []
  answers = describe.ask(runs[0].binary, [
      run.arguments(backends.workdir(sweep_dir, run.name)) for run in runs],
                         figures, topology)
  return [Cell(run, answer['values'], answer['free'], answer.get('figures'),
               answer.get('compiled'))
          for run, answer in zip(runs, answers, strict=True)]


def is_finished(cell: Cell, sweep_dir: str) -> bool:
  """Whether a run of these flags has left its result."""
  return results.finished(backends.workdir(sweep_dir, cell.run.name),
                          cell.values, cell.free) is not None


def job(cell: Cell, sweep_dir: str, command) -> pool.Job:
  """A cell for the pool; `command` maps a run and a worker to its command."""
  return pool.Job(
      cell.run.name, functools.partial(command, cell.run),
      functools.partial(is_finished, cell, sweep_dir),
      backends.lock_path(sweep_dir, cell.run.name),
      backends.log_path(sweep_dir, cell.run.name))


def runs_of(values: Mapping[str, Any], table: table_lib.Table
            ) -> list[table_lib.Run]:
  """The table's runs of the rows and seeds of the command, with its flags."""
  names = {table_lib.name_of(table, point)
           for point in table_lib.chosen(table.points, values['rows'])}
  return [run._replace(extra=tuple(values['cell_flag']))
          for run in table_lib.runs(table, seeds_of(values))
          if run.name.rpartition('_seed')[0] in names]


def seeds_of(values: Mapping[str, Any]) -> list[int] | None:
  """Of --seeds; None for the table's own."""
  if values['seeds'] is None:
    return None
  try:
    seeds = [int(seed) for seed in values['seeds']]
  except ValueError:
    seeds = []
  if not seeds or len(set(seeds)) < len(seeds):
    raise ValueError(f'`seeds` (={",".join(values["seeds"])!r}) must be '
                     'different integers separated by commas.')
  return seeds


def sweep_dir_of(values: Mapping[str, Any]) -> str:
  """Of --sweep_dir, or where a table is by default."""
  return values['sweep_dir'] or os.path.join(
      'runs', f'{values["table"]}_{values["scale"]}')


def check_table(values: Mapping[str, Any]) -> None:
  """Raises ValueError if no table is named, or its folder is none."""
  if values['table'] is None:
    raise ValueError('`table` (=None) must be one of '
                     f'{", ".join(tables.TABLES)}.')
  if os.path.isfile(sweep_dir_of(values)):
    raise ValueError(f'`sweep_dir` (={sweep_dir_of(values)!r}) must be a '
                     'folder; it is a file.')


def check_cell_flags(given: Sequence[str]) -> None:
  """Raises ValueError for one that would make a cell another."""
  for flag in given:
    if flag.lstrip('-').partition('=')[0] in OWN_CELL_FLAGS:
      raise ValueError(f'`cell_flag` (={flag!r}) must not be one of '
                       f'{", ".join(OWN_CELL_FLAGS)}: --seeds and --sweep_dir '
                       'set them.')


def check(values: Mapping[str, Any]) -> None:
  """Raises ValueError for flags that do not go with the backend."""
  check_cell_flags(values['cell_flag'])
  backend, defaults = values['backend'], flags.FlagValues()
  define_flags(defaults)
  for other, names in OPTIONS.items():
    for name in names:
      if name not in OPTIONS[backend] and (
          values[name] != defaults[name].default):
        raise ValueError(f'`{name}` (={values[name]!r}) is a setting of '
                         f'--backend={other}, not of {backend}.')
  for name in NEEDED[backend]:
    if not values[name]:
      raise ValueError(f'`{name}` (={values[name]!r}) must be given for '
                       f'--backend={backend}.')
  for name in AT_LEAST_ONE:
    if values[name] < 1:
      raise ValueError(f'`{name}` (={values[name]}) must be at least 1.')
  if values['compile'] is not None:
    if not values['dry_run']:
      raise ValueError(f'`compile` (={values["compile"]!r}) needs --dry_run.')
    compiling.check(values['compile'])
  for name in ('retries', 'gpus_per_worker'):
    if values[name] < 0:
      raise ValueError(f'`{name}` (={values[name]}) must be at least 0.')


def commander(values: Mapping[str, Any], sweep_dir: str):
  """Maps a run and the number of a worker to a command of this machine."""
  if values['backend'] == 'tpu_vm':
    where = backends.TpuVm(values['tpu_names'], values['zone'],
                           values['remote_dir'])
    return lambda run, worker: backends.tpu_vm(run, sweep_dir, where, worker)
  if values['backend'] == 'xpk':
    where = backends.Xpk(*(values[name] for name in OPTIONS['xpk']))
    name = f'{values["table"]}-{values["scale"]}'
    return lambda run, worker: backends.xpk(run, sweep_dir, where, name)
  return lambda run, worker: backends.local(run, sweep_dir, values['python'])


def script(values: Mapping[str, Any], runs: Sequence[table_lib.Run],
           sweep_dir: str) -> str:
  """What sbatch gets."""
  return backends.slurm(
      runs, sweep_dir, backends.Slurm(values['tasks'], values['sbatch']),
      job=values['table'], workers=values['workers'],
      retries=values['retries'], python=values['python'])


def start(values: Mapping[str, Any], found: Sequence[Cell], sweep_dir: str
          ) -> int:
  """Runs or submits the cells that are not finished; returns the status."""
  left = [cell for cell in found if not is_finished(cell, sweep_dir)]
  print(f'{len(found) - len(left)} of {len(found)} cells are finished, in '
        f'{sweep_dir}', flush=True)
  if not left:
    return 0
  if values['backend'] in ('local', 'tpu_vm'):
    return _run_here(values, left, sweep_dir)
  return _submit(values, [cell.run for cell in left], sweep_dir)


def _run_here(values, left, sweep_dir) -> int:
  workers = len(values['tpu_names']) or values['workers']
  command = commander(values, sweep_dir)
  environment = functools.partial(_environment, values['gpus_per_worker'])
  outcome = pool.run([job(cell, sweep_dir, command) for cell in left],
                     workers=workers, retries=values['retries'],
                     environment=environment)
  if outcome.left:
    return pool.REQUEUE_EXIT_CODE
  return 1 if outcome.failed else 0


def _environment(gpus: int, worker: int) -> dict[str, str]:
  if not gpus:
    return {}
  first = worker * gpus
  return {'CUDA_VISIBLE_DEVICES': ','.join(
      map(str, range(first, first + gpus)))}


def _submit(values, runs, sweep_dir) -> int:
  for folder in ('locks', 'logs'):
    os.makedirs(os.path.join(sweep_dir, folder), exist_ok=True)
  if values['backend'] == 'slurm':
    path = os.path.join(sweep_dir, 'array.sh')
    files.write_text(path, script(values, runs, sweep_dir))
    return subprocess.run(['sbatch', path], check=False).returncode and 1
  command = commander(values, sweep_dir)
  codes = [subprocess.run(command(run, 0), check=False).returncode
           for run in runs]
  return 1 if any(codes) else 0


def plan(values: Mapping[str, Any], table: table_lib.Table,
         found: Sequence[Cell], sweep_dir: str) -> str:
  """What --dry_run prints."""
  left = [cell.run for cell in found if not is_finished(cell, sweep_dir)]
  text = (f'# {table.title}, scale {values["scale"]}: {len(found)} cells of '
          f'{table.binary}, {len(found) - len(left)} finished\n')
  if values['backend'] == 'slurm' and left:
    text += script(values, left, sweep_dir)
  elif left:
    command, slices = commander(values, sweep_dir), values['tpu_names'] or [0]
    text += ''.join(f'{shlex.join(command(run, number % len(slices)))}\n'
                    for number, run in enumerate(left))
  text += '\n' + costs(found, values['devices'])
  compiled = _compiled(found)
  return text + '\n' + compiling.table(compiled) if compiled else text


def _compiled(found: Sequence[Cell]) -> dict[str, Mapping[str, Any]]:
  """What the compiler said of the cells, seeds left out."""
  return {cell.run.name.rpartition('_seed')[0]: cell.compiled
          for cell in found if cell.compiled}


def costs(found: Sequence[Cell], devices: int) -> str:
  """A Markdown table of the cells' figures, seeds left out; their sum."""
  from experiments import reporting
  first = {cell.run.name.rpartition('_seed')[0]: cell.figures
           for cell in reversed(found)}
  rows = [{'cell': name, **_cost(figures, devices)}
          for name, figures in reversed(first.items())]
  total = sum(cell.figures['training_flops'] for cell in found)
  return reporting.markdown_table(rows, formats={
      'parameters': ',', 'steps': ',', 'batch': ',', 'rate': '.4g',
      'multiply-adds': '.3g', 'weights (MB)': ',.1f', 'optimizer (MB)': ',.1f',
      'activations (MB)': ',.1f'}) + (
          f'\n{total:.3g} multiply-adds in all {len(found)} cells. Memory is '
          f'that of one device of {devices}.\n')


def _cost(figures, devices) -> dict[str, Any]:
  return {
      'parameters': figures['parameters'], 'steps': figures['train_steps'],
      'batch': figures['batch_size'], 'rate': figures['learning_rate'],
      'multiply-adds': figures['training_flops'],
      'weights (MB)': figures['weight_bytes'] / 1e6,
      'optimizer (MB)': figures['optimizer_bytes'] / 1e6,
      'activations (MB)': figures['activation_bytes'] / devices / 1e6}


def run(values: Mapping[str, Any], table: table_lib.Table) -> int:
  """What the program does with its flags; returns the status."""
  check(values)
  sweep_dir = sweep_dir_of(values)
  found = cells(runs_of(values, table), sweep_dir, values['dry_run'],
                values['compile'])
  if values['dry_run']:
    print(plan(values, table, found, sweep_dir), end='', flush=True)
    return 0 if compiling.fits(_compiled(found)) else 1
  return start(values, found, sweep_dir)


def main(argv):
  programs.begin(argv)
  values = flags.FLAGS.flag_values_dict()
  with programs.errors_in_a_line():
    check_table(values)
    sys.exit(run(values, tables.get(values['table'], values['scale'])))


if __name__ == '__main__':
  define_flags()
  programs.run(main)
