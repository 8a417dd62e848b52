"""Data sets as TFDS builders of local files: where they lie, how they are made.

A set is a folder `<data_dir>/<name>/<version>` of array_record files. It is
written without network and without TensorFlow, and what TFDS itself prepared in
that format is read the same way.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import functools
import os
import pathlib
import tempfile
import types
from typing import NoReturn

from absl import flags
import tensorflow_datasets as tfds

from experiments import files
from experiments import programs

FILE_FORMAT = 'array_record'


class LocalBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """What the builders share.

  A subclass has `read(source)`, the examples of every split from the files of a
  folder, and `check(split, examples)`, which raises a ValueError if they cannot
  be the split. MANUAL_DOWNLOAD_INSTRUCTIONS say which files the user provides.
  """

  VERSION = tfds.core.Version('1.0.0')

  def _split_generators(self, dl_manager):
    source = None
    if self.MANUAL_DOWNLOAD_INSTRUCTIONS:
      source = pathlib.Path(dl_manager.manual_dir)
    with reading(source, ValueError, OSError):
      splits = self.read(source)
    for split, examples in splits.items():
      self.check(split, examples)
    return {split: self._generate_examples(examples)
            for split, examples in splits.items()}

  def _log_download_bytes(self):
    pass  # TFDS prints the scratch folder here, and in the next.

  def _log_download_done(self):
    pass


def default_data_dir() -> pathlib.Path:
  """The folder TFDS uses when it is told none."""
  home = pathlib.Path.home() / 'tensorflow_datasets'
  return pathlib.Path(os.environ.get('TFDS_DATA_DIR') or home)


def find(name: str, data_dir: str | os.PathLike) -> pathlib.Path | None:
  """The folder `<data_dir>/<name>/<version>` of the highest version of a set,
  ours or one that TFDS made, that is stored as array_record; or None.
  """
  found = [path for path, formats in _stored_formats(name, data_dir).items()
           if FILE_FORMAT in formats]
  return max(found, key=lambda path: tfds.core.Version(path.name), default=None)


def _stored_formats(name, data_dir) -> dict[pathlib.Path, list[str]]:
  """The file formats of each version of a set that is in a folder."""
  formats = {}
  folder = pathlib.Path(data_dir, name).expanduser()
  for path in folder.glob('*/dataset_info.json'):
    if tfds.core.Version.is_valid(path.parent.name):
      info = files.read_json(path)
      formats[path.parent] = [info.get('fileFormat', 'tfrecord'),
                              *info.get('alternativeFileFormats', ())]
  return formats


def locate(builders: Mapping[str, type[LocalBuilder]], dataset: str,
           data_dir: str | os.PathLike | None, program: str) -> pathlib.Path:
  """Finds a prepared set, or says how to prepare it, by `program`.

  Without `data_dir` it is looked for in TFDS's default folder; one that needs
  no files is made in the cache folder, unless it is there.
  """
  if data_dir is not None and not os.fspath(data_dir):
    raise ValueError(
        f'data_dir must name a folder, or be None; got {data_dir!r}')
  builder = builders.get(dataset)
  is_embedded = builder and not builder.MANUAL_DOWNLOAD_INSTRUCTIONS
  if data_dir is None and is_embedded:
    return _in_cache(lambda folder: prepare(builders, dataset, None, folder))
  name = builder.name if builder else dataset
  data_dir = pathlib.Path(data_dir or default_data_dir()).expanduser()
  found = find(name, data_dir)
  if found is None:
    formats = sorted({one for formats in _stored_formats(
        name, data_dir).values() for one in formats})
    others = (f' as {FILE_FORMAT}, only as {", ".join(formats)}' if formats
              else '')
    advice = (f'Run: python -m {program} --dataset={dataset}'
              + ('' if is_embedded else ' --source=DIR') if builder else
              f'Where tensorflow is installed, run: tfds build {dataset} '
              f'--file_format={FILE_FORMAT}')
    raise FileNotFoundError(
        f'{name} is not prepared in data_dir={str(data_dir)!r}{others}. '
        f'{advice} --data_dir={data_dir}')
  return found


def _in_cache(prepare_in: Callable[[pathlib.Path], pathlib.Path]
              ) -> pathlib.Path:
  place = 'the cache folder'
  try:
    cache = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
    folder = pathlib.Path(cache, 'sparse_jax', 'tfds')
    place = f'the cache folder {folder}'
    return prepare_in(folder)
  except FileNotFoundError:
    raise
  except (OSError, RuntimeError) as error:  # RuntimeError: there is no home.
    raise ValueError(f'{place} cannot be used: {error}. Set XDG_CACHE_HOME to '
                     'one that can be written.') from error


@contextlib.contextmanager
def reading(what: str | os.PathLike, *clear: type[Exception]
            ) -> Iterator[None]:
  """Says what cannot be read, in one ValueError, whatever its reader may raise.

  Args:
    what: a file or folder.
    *clear: kinds of errors that say so by themselves.
  """
  try:
    yield
  except (FileNotFoundError, PermissionError, MemoryError, ModuleNotFoundError,
          *clear):
    raise
  except Exception as error:  # Readers raise what they like.
    text = ' '.join(str(error).split())[:300]
    raise ValueError(
        f'{what} cannot be read ({type(error).__name__}: {text}); if it is '
        'damaged, delete it and make it again.') from error


def builder_class(builders: Mapping[str, type[LocalBuilder]], name: str
                  ) -> type[LocalBuilder]:
  """The builder of that key; a ValueError if there is none."""
  if name == 'imagenet2012':
    raise ValueError(
        '`name` (=\'imagenet2012\') is prepared by TFDS with TensorFlow: see '
        'experiments/image/prepare.py')
  if name not in builders:
    raise ValueError(f'`name` (={name!r}) must be one of {sorted(builders)}')
  return builders[name]


def prepare(
    builders: Mapping[str, type[LocalBuilder]], name: str,
    source: str | os.PathLike | None, data_dir: str | os.PathLike
    ) -> pathlib.Path:
  """Writes a data set to where TFDS looks for it, unless it is there.

  It is written in a scratch folder inside `data_dir` and moved in one step, so
  that what is found is whole, also if two processes prepare it at once. A
  killed process leaves at most a scratch folder, `.<name>.*`, to delete. A
  ValueError or FileNotFoundError says which file of `source` is corrupt or not
  there.
  """
  chosen = builder_class(builders, name)
  data_dir = pathlib.Path(data_dir).expanduser()
  found = find(chosen.name, data_dir)
  if found:
    return found
  if chosen.MANUAL_DOWNLOAD_INSTRUCTIONS:
    needed = f'{chosen.name}: {chosen.MANUAL_DOWNLOAD_INSTRUCTIONS}'
    if not source:
      raise ValueError(f'source must be given for {needed}; got {source!r}')
    source = pathlib.Path(source).expanduser()
    if not source.is_dir():
      raise FileNotFoundError(f'source={str(source)!r} is not a folder')
    if not any(source.iterdir()):
      raise FileNotFoundError(
          f'source={str(source)!r} is empty; needed for {needed}')
  data_dir.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(
      prefix=f'.{chosen.name}.', dir=data_dir) as scratch:
    builder = chosen(data_dir=scratch, file_format=FILE_FORMAT)
    tfds.disable_progress_bar()  # It names the scratch folder.
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(
            manual_dir=source and os.path.abspath(source)))
    made = pathlib.Path(builder.data_path)
    return _move(made, data_dir / chosen.name / made.name)


def require_files(
    source: pathlib.Path, names: list[str], otherwise: str = '') -> None:
  """Raises a FileNotFoundError that lists the files a folder lacks."""
  missing = [name for name in names if not (source / name).is_file()]
  if missing:
    raise FileNotFoundError(
        f'source={str(source)!r} has no {", ".join(missing)}{otherwise}')


def _move(made, place):
  place.parent.mkdir(exist_ok=True)
  try:
    os.rename(made, place)
  except OSError:
    if not (place / 'dataset_info.json').is_file():  # Not another's whole set.
      raise
  return place


def make(module: types.ModuleType, dataset: str, source: str | None,
         data_dir: str | None) -> str:
  """Prepares one set and returns a sentence on what was done.

  `module` has `BUILDERS` and `prepare`.
  """
  data_dir = data_dir or default_data_dir()
  found = find(builder_class(module.BUILDERS, dataset).name, data_dir)
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
    print(make(module, *given))
  except (ValueError, OSError) as error:
    programs.stop(f'not prepared: {error}')
