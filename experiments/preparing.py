"""The program that prepares a data set from its published files.

Each kind of data has one, which differs in its builders alone.
"""

import functools
import types
from typing import NoReturn

from absl import flags

from experiments import datasets
from experiments import programs


def run(module: types.ModuleType, dataset: str, source: str | None,
        data_dir: str | None) -> str:
  """Prepares one set and returns a sentence on what was done.

  `module` has `BUILDERS` and `prepare`.
  """
  data_dir = data_dir or datasets.default_data_dir()
  found = datasets.find(
      datasets.builder_class(module.BUILDERS, dataset).name, data_dir)
  if found:
    return f'{dataset} is already prepared in {found}.'
  return f'Prepared {dataset} in {module.prepare(dataset, source, data_dir)}.'


def start(module: types.ModuleType, embedded: str) -> NoReturn:
  """Defines the flags, and runs; `embedded` is the set that needs no files."""
  flags.DEFINE_string('dataset', None, 'Which one: one of '
                      f'{", ".join(sorted(module.BUILDERS))}.', required=True)
  flags.DEFINE_string('source', None, 'Folder with the published files; '
                      f'{embedded} needs none.')
  flags.DEFINE_string('data_dir', None, 'Folder of all prepared sets. Default: '
                      '$TFDS_DATA_DIR or ~/tensorflow_datasets.')
  programs.run(functools.partial(_main, module))


def _main(module, argv):
  programs.begin(argv)
  given = (flags.FLAGS[name].value for name in ('dataset', 'source',
                                                'data_dir'))
  try:
    print(run(module, *given))
  except (ValueError, OSError) as error:
    programs.stop(f'not prepared: {error}')
