"""Trains every method at every sparsity, and draws the table and the picture.

  python -m experiments.image.compare --dataset=fashion_mnist --data_dir=DIR \
      --noaugment --train_epochs=15 --weight_decay=1e-4 \
      --sparsities=0.8,0.9,0.95,0.98 --seeds=0,1

Each cell is a run of experiments.image.train in a folder of its own under
--outdir, with that program's flags; finished cells are skipped, so a stopped
comparison goes on where it was. Leaves table.md, table.csv and
accuracy_vs_sparsity.png, renewed after each cell.
"""

import csv
import itertools
import json
import os
import re
import statistics
import sys
from typing import Any

from absl import app
from absl import flags
from absl import logging
import jax

from experiments import plots
from experiments import reporting
from experiments import sparsity as sparsity_flags
from experiments.image import train

_METHODS = flags.DEFINE_list(
    'methods', ['dense', 'static', 'set', 'rigl', 'gmp', 'top_kast'],
    'Methods to compare.')
_SPARSITIES = flags.DEFINE_list(
    'sparsities', ['0.8', '0.9', '0.95', '0.98'], 'Sparsities to compare at.')
_SEEDS = flags.DEFINE_list('seeds', ['0', '1'], 'Seeds of each cell.')
_SETTINGS = flags.DEFINE_list(
    'settings', [], 'Flags of single methods, as method.flag=number: '
    'top_kast.update_every=5.')
_OUTDIR = flags.DEFINE_string('outdir', 'runs/compare', 'Where it all goes.')


def cells() -> list[dict[str, Any]]:
  """The settings that tell the runs apart; some methods have no target."""
  grid = itertools.product(_SEEDS.value, _SPARSITIES.value[::-1],
                           _METHODS.value)
  found = {}
  for seed, sparsity, method in grid:
    cell = {'method': method, 'seed': int(seed),
            'sparsity': float(sparsity) if (
                sparsity_flags.has_target(method)) else 0.}
    found[tuple(cell.values())] = cell
  return list(found.values())


def settings(method: str) -> dict[str, float]:
  """What --settings says of one method."""
  found = {}
  for setting in _SETTINGS.value:
    match = re.fullmatch(r'(\w+)\.(\w+)=(-?[\d.e-]+)', setting)
    if not match or match[1] not in _METHODS.value or (
        match[2] not in flags.FLAGS):
      raise ValueError(f'`settings` (={setting!r}) must be method.flag=number '
                       f'for a method of {_METHODS.value}.')
    if match[1] == method:
      number = float(match[3])
      found[match[2]] = int(number) if number == int(number) else number
  return found


def workdir(cell) -> str:
  name = f'{cell["method"]}_{cell["sparsity"]:g}_seed{cell["seed"]}'
  return os.path.join(_OUTDIR.value, name)


def result(cell) -> dict[str, Any] | None:
  """What a finished cell has left."""
  path = os.path.join(workdir(cell), 'result.json')
  if not os.path.exists(path):
    return None
  with open(path) as file:
    return json.load(file)


def collect() -> list[dict[str, Any]]:
  """One row of each method and sparsity: mean and deviation over seeds.

  The sparsity is the one asked for; of a method that has no target the one
  it reached, so that its runs lie where they belong in the picture.
  """
  groups = {}
  for cell in cells():
    if (found := result(cell)) is not None:
      groups.setdefault((cell['method'], cell['sparsity']), []).append(found)
  rows = []
  for (method, sparsity), found in sorted(groups.items()):
    accuracies = [each['test_accuracy'] for each in found]
    if not sparsity_flags.has_target(method):
      sparsity = statistics.mean(each['sparsity'] for each in found)
    rows.append({
        'method': method, 'sparsity': sparsity, 'seeds': len(found),
        'accuracy': statistics.mean(accuracies),
        'accuracy_std': statistics.stdev(accuracies) if found[1:] else 0.})
  return rows


def write(rows) -> str:
  """Writes the CSV, the table and the picture; returns the table."""
  path = _path('table.csv')
  with open(path, 'w', newline='') as file:
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
  table = []
  for method in _METHODS.value:
    own = {row['sparsity']: row for row in rows if row['method'] == method}
    line = {'method': method}
    for sparsity in sorted({row['sparsity'] for row in rows}):
      line[f'{sparsity:.0%}'] = _cell(own.get(sparsity))
    table.append(line)
  text = reporting.markdown_table(table)
  with open(_path('table.md'), 'w') as file:
    file.write(text + '\n')
  plots.accuracy_vs_sparsity(rows, _path('accuracy_vs_sparsity.png'),
                             f'{flags.FLAGS.dataset}, {flags.FLAGS.model}')
  return text


def _path(name: str) -> str:
  return os.path.join(_OUTDIR.value, name)


def _cell(row) -> str:
  if row is None:
    return ''
  return f'{100 * row["accuracy"]:.2f} ± {100 * row["accuracy_std"]:.2f}'


def main(_):
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)
  common = train.run_config()
  todo = cells()
  for number, cell in enumerate(todo, 1):
    if result(cell) is not None:
      continue
    print(f'cell {number} of {len(todo)}: {cell}', flush=True)
    try:
      train.train(common | settings(cell['method']) | cell
                  | {'workdir': workdir(cell)})
    except (ValueError, FileNotFoundError) as error:
      logging.error('%s', error)
      sys.exit(2)
    jax.clear_caches()
    print(write(collect()), flush=True)


if __name__ == '__main__':
  app.run(main)
