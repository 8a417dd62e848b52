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

from collections.abc import Mapping, Sequence
import functools
import os
import shlex
import subprocess
import sys
from typing import Any, NamedTuple

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
AT_LEAST = {'workers': 1, 'tasks': 1, 'num_slices': 1, 'devices': 1,
            'retries': 0, 'gpus_per_worker': 0}


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
  figures: Mapping[str, Any] | None = None
  compiled: Mapping[str, Any] | None = None

  @property
  def name(self) -> str:
    """Without the seed."""
    return self.run.name.rpartition('_seed')[0]

  def is_finished(self, sweep_dir: str) -> bool:
    """Whether a run of these flags has left its result."""
    return results.finished(backends.workdir(sweep_dir, self.run.name),
                            self.values, self.free) is not None


def cells(values: Mapping[str, Any], table: table_lib.Table) -> list[Cell]:
  """The runs of the flags, as their binary reads them.

  A ValueError if it does not take one.
  """
  chosen = table_lib.chosen(table.points, values['rows'])
  names = {name for point, name in table_lib.named(table.points)
           if point in chosen}
  runs = [run._replace(extra=tuple(values['cell_flag']))
          for run in table_lib.runs(table, seeds_of(values))
          if run.name.rpartition('_seed')[0] in names]
  answers = describe.ask(
      table.binary, [run.arguments(backends.workdir(
          values['sweep_dir'], run.name)) for run in runs],
      values['dry_run'], values['compile']) if runs else []
  return [Cell(run, **answer)
          for run, answer in zip(runs, answers, strict=True)]


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


def check(values: Mapping[str, Any]) -> None:
  """Raises ValueError for flags that do not go with each other."""
  for flag in values['cell_flag']:
    if flag.lstrip('-').partition('=')[0] in OWN_CELL_FLAGS:
      raise ValueError(f'`cell_flag` (={flag!r}) must not be one of '
                       f'{", ".join(OWN_CELL_FLAGS)}: --seeds and --sweep_dir '
                       'set them.')
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
  for name, least in AT_LEAST.items():
    if values[name] < least:
      raise ValueError(f'`{name}` (={values[name]}) must be at least {least}.')
  if values['compile'] is not None:
    if not values['dry_run']:
      raise ValueError(f'`compile` (={values["compile"]!r}) needs --dry_run.')
    compiling.check(values['compile'])


def start(values: Mapping[str, Any], found: Sequence[Cell]) -> int:
  """Runs or submits the cells that are not finished; returns the status."""
  sweep_dir = values['sweep_dir']
  left = [cell for cell in found if not cell.is_finished(sweep_dir)]
  print(f'{len(found) - len(left)} of {len(found)} cells are finished, in '
        f'{sweep_dir}', flush=True)
  if not left:
    return 0
  path = functools.partial(os.path.join, sweep_dir)
  if values['backend'] in ('local', 'tpu_vm'):
    return pool.run(
        [pool.Job(cell.run.name,
                  functools.partial(backends.command, cell.run, values),
                  functools.partial(cell.is_finished, sweep_dir),
                  path('locks', f'{cell.run.name}.lock'),
                  path('logs', f'{cell.run.name}.log')) for cell in left],
        workers=len(values['tpu_names']) or values['workers'],
        retries=values['retries'],
        environment=functools.partial(gpus, values['gpus_per_worker']))
  for folder in ('locks', 'logs'):
    os.makedirs(path(folder), exist_ok=True)
  if values['backend'] == 'slurm':
    files.write_text(path('array.sh'), backends.slurm(
        [cell.run for cell in left], values))
    commands = [['sbatch', path('array.sh')]]
  else:
    commands = [backends.command(cell.run, values) for cell in left]
  codes = [subprocess.run(words, check=False).returncode for words in commands]
  return int(any(codes))


def gpus(count: int, worker: int) -> dict[str, str]:
  """The variables that give a worker so many of its own; none for 0."""
  mine = range(worker * count, (worker + 1) * count)
  return {'CUDA_VISIBLE_DEVICES': ','.join(map(str, mine))} if count else {}


def plan(values: Mapping[str, Any], table: table_lib.Table,
         found: Sequence[Cell]) -> str:
  """What --dry_run prints."""
  left = [cell.run for cell in found
          if not cell.is_finished(values['sweep_dir'])]
  text = (f'# {table.title}, scale {values["scale"]}: {len(found)} cells of '
          f'{table.binary}, {len(found) - len(left)} finished\n')
  if values['backend'] == 'slurm' and left:
    text += backends.slurm(left, values)
  else:
    slices = len(values['tpu_names']) or 1
    text += ''.join(
        f'{shlex.join(backends.command(run, values, number % slices))}\n'
        for number, run in enumerate(left))
  text += '\n' + costs(found, values['devices'])
  compiled = _compiled(found)
  return text + '\n' + compiling.table(compiled) if compiled else text


def _compiled(found: Sequence[Cell]) -> dict[str, Mapping[str, Any]]:
  """What the compiler said of the cells, seeds left out."""
  return {cell.name: cell.compiled for cell in found if cell.compiled}


def costs(found: Sequence[Cell], devices: int) -> str:
  """A Markdown table of the cells' figures, seeds left out; their sum."""
  from experiments import reporting
  columns = {
      'parameters': ('parameters', 1, ','), 'steps': ('train_steps', 1, ','),
      'batch': ('batch_size', 1, ','), 'rate': ('learning_rate', 1, '.4g'),
      'multiply-adds': ('training_flops', 1, '.3g'),
      'weights (MB)': ('weight_bytes', 1e6, ',.1f'),
      'optimizer (MB)': ('optimizer_bytes', 1e6, ',.1f'),
      'activations (MB)': ('activation_bytes', devices * 1e6, ',.1f')}
  first = {}
  for cell in found:
    first.setdefault(cell.name, cell.figures)
  rows = [{'cell': name, **{
      column: figures[figure] / unit if unit > 1 else figures[figure]
      for column, (figure, unit, _) in columns.items()}}
          for name, figures in first.items()]
  total = sum(cell.figures['training_flops'] for cell in found)
  return reporting.markdown_table(rows, formats={
      column: shown for column, (_, _, shown) in columns.items()}) + (
          f'\n{total:.3g} multiply-adds in all {len(found)} cells. Memory is '
          f'that of one device of {devices}.\n')


def run(values: Mapping[str, Any], table: table_lib.Table) -> int:
  """What the program does with its flags; returns the status."""
  check(values)
  values = {**values, 'sweep_dir': sweep_dir_of(values)}
  found = cells(values, table)
  if values['dry_run']:
    print(plan(values, table, found), end='', flush=True)
    return 0 if compiling.fits(_compiled(found)) else 1
  return start(values, found)


def main(argv):
  programs.begin(argv)
  values = flags.FLAGS.flag_values_dict()
  with programs.errors_in_a_line():
    check_table(values)
    sys.exit(run(values, tables.get(values['table'], values['scale'])))


if __name__ == '__main__':
  define_flags()
  programs.run(main)
