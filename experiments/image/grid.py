"""Many runs of experiments.image.train, as one table and two pictures.

Each cell is a run in a folder of its own; finished cells are skipped, so that
a stopped grid goes on where it was.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import csv
import json
import os
import statistics
import sys
from typing import Any
from typing import NamedTuple

from absl import flags
from absl import logging
import jax

from experiments import plots
from experiments import reporting
from experiments.image import train

_SPARSITIES = flags.DEFINE_list(
    'sparsities', [], 'The columns of the table. Default: the program\'s own.')
_SEEDS = flags.DEFINE_list('seeds', ['0', '1'], 'Seeds of each cell.')
_OUTDIR = flags.DEFINE_string('outdir', None, 'Where it all goes. Default: '
                              'runs/ and the name of the program.')


class Cell(NamedTuple):
  """One run."""

  label: str  # The row of the table.
  sparsity: float | None  # The column; None for what the run reaches.
  seed: int
  settings: dict[str, Any]  # Flag values besides the common ones.

  @property
  def name(self) -> str:
    label = self.label.replace(' ', '_')
    return f'{label}_{self.sparsity or 0:g}_seed{self.seed}'

  def values(self, common: Mapping[str, Any], outdir: str) -> dict[str, Any]:
    """Flag values of the run."""
    return {**common, **self.settings, 'seed': self.seed,
            'workdir': os.path.join(outdir, self.name)}


def run(cells: Sequence[Cell], common: Mapping[str, Any], outdir: str,
        title: str, what: str = 'weights') -> None:
  """Trains what is not yet finished, and renews the results after each cell.

  Raises:
    ValueError, FileNotFoundError: naming a flag of any cell, before the first
      one trains.
  """
  for cell in cells:
    train.check(cell.values(common, outdir))
  for number, cell in enumerate(cells, 1):
    if result(cell, outdir) is None:
      print(f'cell {number} of {len(cells)}: {cell.name}', flush=True)
      train.train(cell.values(common, outdir))
      jax.clear_caches()
      write(cells, outdir, title, what)
  print(write(cells, outdir, title, what), flush=True)


def main(make_cells, name: str, what: str = 'weights', **common) -> None:
  """What a program of this kind does; bad flags are status 2.

  Args:
    make_cells: () -> the cells of the flags.
    name: of the program.
    what: whose sparsity it is, for the picture.
    **common: flag values of all its runs.
  """
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)
  try:
    run(make_cells(), train.run_config() | common,
        _OUTDIR.value or os.path.join('runs', name),
        f'{flags.FLAGS.dataset}, {flags.FLAGS.model}', what)
  except (ValueError, OSError, FloatingPointError) as error:
    logging.error('%s', error)
    sys.exit(2)


def sparsities(default: Sequence[float]) -> list[float]:
  """Of --sparsities, or the default."""
  return _numbers(_SPARSITIES, float) or list(default)


def seeds() -> list[int]:
  """Of --seeds."""
  return _numbers(_SEEDS, int)


def _numbers(flag, kind) -> list[Any]:
  try:
    return [kind(text) for text in flag.value]
  except ValueError:
    raise ValueError(f'`{flag.name}` (={",".join(flag.value)!r}) must be '
                     'numbers separated by commas.') from None


def result(cell: Cell, outdir: str) -> dict[str, Any] | None:
  """What a finished cell has left."""
  path = os.path.join(outdir, cell.name, 'result.json')
  if not os.path.exists(path):
    return None
  with open(path) as file:
    return json.load(file)


def collect(cells: Sequence[Cell], outdir: str) -> list[dict[str, Any]]:
  """One row of each label and sparsity: means over the seeds.

  The sparsity is the one asked for; where nothing was asked for, the one
  reached, so that such runs lie where they belong in the picture. FLOPs are a
  fraction of those of the largest network, for a row may have a narrower one.
  """
  groups = {}
  for cell in cells:
    if (found := result(cell, outdir)) is not None:
      groups.setdefault((cell.label, cell.sparsity), []).append(found)
  largest = max((each['cost']['flops'] for found in groups.values()
                 for each in found), default=0)
  return [_row(label, sparsity, found, largest)
          for (label, sparsity), found in groups.items()]


def _row(label, sparsity, found, largest) -> dict[str, Any]:
  accuracies = [each['test_accuracy'] for each in found]
  if sparsity is None:
    sparsity = statistics.mean(each['sparsity'] for each in found)
  row = {'method': label, 'sparsity': sparsity, 'seeds': len(found),
         'accuracy': statistics.mean(accuracies),
         'accuracy_std': statistics.stdev(accuracies) if found[1:] else 0.}
  for figure in ('training_multiplier', 'inference_multiplier'):
    row[figure] = statistics.mean(
        each['cost'][figure] * each['cost']['flops'] / largest
        for each in found)
  return row


def write(cells: Sequence[Cell], outdir: str, title: str,
          what: str = 'weights') -> str:
  """Writes the CSV, the table and the pictures; returns the table."""
  rows = collect(cells, outdir)
  with open(os.path.join(outdir, 'table.csv'), 'w', newline='') as file:
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
  text = table(rows)
  with open(os.path.join(outdir, 'table.md'), 'w') as file:
    file.write(text)
  plots.against_sparsity(
      rows, os.path.join(outdir, 'accuracy_vs_sparsity.png'), title, what)
  plots.against_flops(
      rows, os.path.join(outdir, 'accuracy_vs_flops.png'), title)
  return text


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """A Markdown table: a line a label, a column a sparsity."""
  columns = sorted({row['sparsity'] for row in rows})
  lines = {}
  for row in rows:
    line = lines.setdefault(row['method'], {'method': row['method']})
    text = f'{100 * row["accuracy"]:.2f}'
    if row['seeds'] > 1:
      text += f' ± {100 * row["accuracy_std"]:.2f}'
    line[_percent(row['sparsity'])] = text
  return reporting.markdown_table(
      list(lines.values()),
      list(dict.fromkeys(['method', *map(_percent, columns)])))


def _percent(sparsity: float) -> str:
  return f'{100 * sparsity:.3g}%'
