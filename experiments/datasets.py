"""Data sets as TFDS builders of local files: where they lie, how they are made.

A set is a folder `<data_dir>/<name>/<version>` of array_record files. It is
written without network and without TensorFlow, and what TFDS itself prepared in
that format is read the same way.
"""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import os
import pathlib
import tempfile
from typing import Any

import tensorflow_datasets as tfds

from experiments import files

FILE_FORMAT = 'array_record'


class LocalBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """What the builders share: a subclass says how its files are read.

  One whose files the user must provide says in MANUAL_DOWNLOAD_INSTRUCTIONS
  what they are.
  """

  VERSION = tfds.core.Version('1.0.0')

  def read(self, source: pathlib.Path | None) -> dict[str, Any]:
    """Returns the examples of every split, read from the folder `source`."""
    raise NotImplementedError

  def check(self, split: str, examples: Any) -> None:
    """Raises a ValueError if what `read` returned cannot be the split."""
    raise NotImplementedError

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
  """Returns the folder TFDS uses when it is told none."""
  home = pathlib.Path.home() / 'tensorflow_datasets'
  return pathlib.Path(os.environ.get('TFDS_DATA_DIR') or home)


def find(name: str, data_dir: str | os.PathLike) -> pathlib.Path | None:
  """The folder `<data_dir>/<name>/<version>` of the highest version of a set,
  ours or one that TFDS made, that is stored as array_record; or None.
  """
  found = [path for path, formats in stored_formats(name, data_dir).items()
           if FILE_FORMAT in formats]
  return max(found, key=lambda path: tfds.core.Version(path.name), default=None)


def stored_formats(
    name: str, data_dir: str | os.PathLike) -> dict[pathlib.Path, list[str]]:
  """Returns the file formats of each version of a set that is in a folder."""
  formats = {}
  folder = pathlib.Path(data_dir, name).expanduser()
  for path in folder.glob('*/dataset_info.json'):
    if tfds.core.Version.is_valid(path.parent.name):
      info = files.read_json(path)
      formats[path.parent] = [info.get('fileFormat', 'tfrecord'),
                              *info.get('alternativeFileFormats', ())]
  return formats


def cache_dir() -> pathlib.Path:
  """Returns the folder in which embedded sets are made at first use."""
  cache = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(cache, 'sparse_jax', 'tfds')


def cached(prepare_in: Callable[[pathlib.Path], pathlib.Path]) -> pathlib.Path:
  """Makes an embedded set in the cache folder, unless it is there.

  Raises:
    ValueError: if the cache folder cannot be used, naming it.
  """
  place = 'the cache folder'
  try:
    folder = cache_dir()
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


def require(
    name: str, data_dir: str | os.PathLike | None,
    advice: str) -> pathlib.Path:
  """Finds a prepared data set, or says how to prepare it.

  Args:
    name: the name of the set.
    data_dir: the folder of all sets; None is TFDS's default folder.
    advice: ends an error's message: the command that prepares the set, to
      which `--data_dir` is added.

  Raises:
    ValueError: if `data_dir` is ''.
    FileNotFoundError: if the set is not prepared in `data_dir`.
  """
  if data_dir is not None and not os.fspath(data_dir):
    raise ValueError(
        f'data_dir must name a folder, or be None; got {data_dir!r}')
  data_dir = pathlib.Path(data_dir or default_data_dir()).expanduser()
  found = find(name, data_dir)
  if found is None:
    raise FileNotFoundError(
        f'{name} is not prepared in data_dir={str(data_dir)!r}'
        f'{_other_formats(name, data_dir)}. {advice} --data_dir={data_dir}')
  return found


def prepare(
    builder_class: type[LocalBuilder], source: str | os.PathLike | None,
    data_dir: str | os.PathLike) -> pathlib.Path:
  """Writes a data set to where TFDS looks for it, unless it is there.

  The set is written in a scratch folder inside `data_dir` and moved in one
  step, so that whatever is found at its place is whole. Two processes may
  prepare one set at once: the later one throws its own away. A process killed
  meanwhile leaves at most a scratch folder, `.<name>.*`, to delete.

  Args:
    builder_class: the builder, whose `name` is the name of the set.
    source: the folder with the files as published, of a builder that has
      MANUAL_DOWNLOAD_INSTRUCTIONS.
    data_dir: the folder of all sets; made if absent.

  Returns:
    The folder of the set, `<data_dir>/<name>/<version>`.

  Raises:
    ValueError, FileNotFoundError: if a file is corrupt, or not there.
  """
  name = builder_class.name
  data_dir = pathlib.Path(data_dir).expanduser()
  found = find(name, data_dir)
  if found:
    return found
  if builder_class.MANUAL_DOWNLOAD_INSTRUCTIONS:
    source = _check_source(builder_class, source)
  data_dir.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix=f'.{name}.', dir=data_dir) as scratch:
    made = _build(builder_class, source, scratch)
    return _move(made, data_dir / name / made.name)


def require_files(
    source: pathlib.Path, names: list[str], otherwise: str = '') -> None:
  """Raises a FileNotFoundError that lists the files a folder lacks."""
  missing = [name for name in names if not (source / name).is_file()]
  if missing:
    raise FileNotFoundError(
        f'source={str(source)!r} has no {", ".join(missing)}{otherwise}')


def _other_formats(name, data_dir):
  stored = stored_formats(name, data_dir).values()
  formats = sorted({one for formats in stored for one in formats})
  return f' as {FILE_FORMAT}, only as {", ".join(formats)}' if formats else ''


def _check_source(builder_class, source):
  needed = (f'{builder_class.name}: '
            f'{builder_class.MANUAL_DOWNLOAD_INSTRUCTIONS}')
  if not source:
    raise ValueError(f'source must be given for {needed}; got {source!r}')
  source = pathlib.Path(source).expanduser()
  if not source.is_dir():
    raise FileNotFoundError(f'source={str(source)!r} is not a folder')
  if not any(source.iterdir()):
    raise FileNotFoundError(
        f'source={str(source)!r} is empty; needed for {needed}')
  return source


def _build(builder_class, source, data_dir):
  builder = builder_class(data_dir=data_dir, file_format=FILE_FORMAT)
  config = tfds.download.DownloadConfig(
      manual_dir=source and os.path.abspath(source))
  tfds.disable_progress_bar()  # It names the scratch folder.
  builder.download_and_prepare(download_config=config)
  return pathlib.Path(builder.data_path)


def _move(made, place):
  place.parent.mkdir(exist_ok=True)
  try:
    os.rename(made, place)
  except OSError:
    if not (place / 'dataset_info.json').is_file():  # Not another's whole set.
      raise
  return place
