"""Trains every method at every sparsity, and draws the table and the pictures.

  python -m experiments.image.compare --dataset=fashion_mnist --data_dir=DIR \
      --noaugment --train_epochs=15 --weight_decay=1e-4 \
      --sparsities=0.8,0.9,0.95,0.98 --seeds=0,1

Each cell is a run of experiments.image.train in a folder of its own under
--outdir, with that program's flags; finished cells are skipped, so a stopped
comparison goes on where it was. Leaves table.md, table.csv,
accuracy_vs_sparsity.png and accuracy_vs_flops.png, renewed after each cell. A
method may stand in several rows:

  --methods=swat,swat_erk \
  --settings=swat_erk.method=swat,swat_erk.allocation=erk

The row `small_dense` is the dense network, so narrow that it has as many
weights as a sparse one of that sparsity.
"""

import itertools
import re
from typing import Any

from absl import app
from absl import flags

from experiments import sparsity as sparsity_flags
from experiments.image import grid
from experiments.image import input_pipeline
from experiments.image import models

SPARSITIES = (.8, .9, .95, .98)
SMALL_DENSE = 'small_dense'
_METHODS = flags.DEFINE_list(
    'methods', ['dense', 'static', 'set', 'rigl', 'gmp', 'top_kast'],
    'Methods to compare, or names to which --settings gives a method.')
_SETTINGS = flags.DEFINE_list(
    'settings', [], 'Flags of single rows, as row.flag=value: '
    'top_kast.update_every=5.')


def cells() -> list[grid.Cell]:
  """Every row at every sparsity, or once where the method has no target."""
  found = {}
  for seed, sparsity, row in itertools.product(
      grid.seeds(), sorted(grid.sparsities(SPARSITIES), reverse=True),
      _METHODS.value):
    settings = {'method': row} | settings_of(row)
    if row == SMALL_DENSE:
      cell = grid.Cell(row, sparsity, seed, settings | small_dense(sparsity))
      found[cell.name] = cell
      continue
    if settings['method'] not in sparsity_flags.METHODS:
      raise ValueError(f'`methods` (={",".join(_METHODS.value)!r}) has '
                       f'{settings["method"]!r}, none of '
                       f'{", ".join(sorted(sparsity_flags.METHODS))}.')
    aims = sparsity_flags.has_target(settings['method'])
    cell = grid.Cell(row, sparsity if aims else None, seed,
                     settings | {'sparsity': sparsity if aims else 0.})
    found[cell.name] = cell
  return sorted(found.values(), key=lambda cell: cell.seed)


def small_dense(sparsity: float) -> dict[str, Any]:
  """Flags of a dense network with as many weights as a sparse one has."""
  name, spec = flags.FLAGS.model, input_pipeline.DATASETS[flags.FLAGS.dataset]
  whole = models.kernel_count(
      models.create(name, num_classes=spec.num_classes,
                    width=flags.FLAGS.width), spec.image_shape)
  width = models.matching_width(
      name, num_classes=spec.num_classes, image_shape=spec.image_shape,
      parameters=round(whole * (1 - sparsity)))
  return {'method': 'dense', 'sparsity': 0., 'width': width}


def settings_of(row: str) -> dict[str, Any]:
  """What --settings says of one row."""
  found = {}
  for setting in _SETTINGS.value:
    match = re.fullmatch(r'(\w+)\.(\w+)=(\S+)', setting)
    if not match or match[1] not in _METHODS.value or (
        match[2] not in flags.FLAGS):
      raise ValueError(f'`settings` (={setting!r}) must be row.flag=value '
                       f'for a row of {_METHODS.value}.')
    if match[1] == row:
      found[match[2]] = _parsed(setting, match[2], match[3])
  return found


def _parsed(setting: str, flag: str, text: str) -> Any:
  """The value of a flag, as its own parser reads it."""
  try:
    return flags.FLAGS[flag].parser.parse(text)
  except ValueError as error:
    raise ValueError(f'`settings` (={setting!r}): {error}') from error


def main(_):
  grid.main(cells, 'compare')


if __name__ == '__main__':
  app.run(main)
