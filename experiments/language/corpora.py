"""Text corpora as TFDS builders that need neither network nor TensorFlow.

The builders read the files as they are published and write their bytes,
unchanged and in order, as array_record. A corpus has the splits train, valid
and test.
"""

import functools
import hashlib
import itertools
import os
import pathlib
import platform
import re
import sysconfig
import zipfile

import numpy as np
import tensorflow_datasets as tfds

from experiments import datasets

_CHUNK = 1 << 16  # Bytes in a record.
_PYTHON = re.sub(r'\W', '_', platform.python_version())
_WIKITEXT = ('A folder with {}, or with wiki.{{train,valid,test}}.tokens or '
             '{{train,valid,test}}.txt.')
# Tests, other people's packages.
_NOT_STDLIB = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages'}


class _TextBuilder(datasets.LocalBuilder, skip_registration=True):
  """What the builders share: `read` returns the bytes of every split."""

  def _info(self):
    chunk = tfds.features.Tensor(
        shape=(None,), dtype=np.uint8, encoding='bytes')
    return tfds.core.DatasetInfo(
        builder=self,
        description=f'{self.name}: the bytes of the text, in order.',
        features=tfds.features.FeaturesDict({'bytes': chunk}),
        disable_shuffling=True)

  def _generate_examples(self, text):
    for start in range(0, len(text), _CHUNK):
      chunk = np.frombuffer(text[start:start + _CHUNK], np.uint8)
      yield start // _CHUNK, {'bytes': chunk}

  def check(self, split: str, text: bytes) -> None:
    if not text:
      raise ValueError(f'{self.name}, split {split!r}: there is no text')


class Stdlib(_TextBuilder, skip_registration=True):
  """The source of the standard library of the Python that runs.

  Every file belongs to one split, which `stdlib_split` draws from its path.
  A split is its files in the order of their paths, cut at SIZES. The text
  differs from Python to Python, so the name of the set has the version in it.
  """

  name = f'stdlib_{_PYTHON}'
  SIZES = {'train': 8_000_000, 'valid': 400_000, 'test': 400_000}  # Bytes.

  def read(self, source: pathlib.Path | None) -> dict[str, bytes]:
    folder = pathlib.Path(sysconfig.get_path('stdlib'))
    texts = {split: bytearray() for split in self.SIZES}
    for path in stdlib_paths(folder):
      split = stdlib_split(path)
      if len(texts[split]) < self.SIZES[split]:
        texts[split] += (folder / path).read_bytes()
    return {split: bytes(text[:self.SIZES[split]])
            for split, text in texts.items()}


class _Hutter(_TextBuilder, skip_registration=True):
  """A file of 10**8 bytes, of which the last tenth is for evaluation."""

  FILE: str
  SIZES = {'train': 90_000_000, 'valid': 5_000_000, 'test': 5_000_000}

  def read(self, source: pathlib.Path) -> dict[str, bytes]:
    archive = f'{self.FILE}.zip'
    if not (source / self.FILE).is_file() and (source / archive).is_file():
      text, = _read_zip(source / archive, [self.FILE])
    else:
      datasets.require_files(source, [self.FILE], f', nor {archive}')
      text = (source / self.FILE).read_bytes()
    if len(text) != sum(self.SIZES.values()):
      raise ValueError(
          f'{self.FILE}: expected {sum(self.SIZES.values())} bytes; got '
          f'{len(text)}')
    ends = [0, *itertools.accumulate(self.SIZES.values())]
    return {split: text[start:end] for split, (start, end) in zip(
        self.SIZES, itertools.pairwise(ends))}


class Enwik8(_Hutter, skip_registration=True):
  """enwik8: Hutter, 2006, the first 10**8 bytes of a dump of Wikipedia."""
  FILE = 'enwik8'
  MANUAL_DOWNLOAD_INSTRUCTIONS = 'A folder with enwik8 or enwik8.zip.'


class Text8(_Hutter, skip_registration=True):
  """text8: Mahoney, 2006, Wikipedia in the letters a to z and the space."""
  FILE = 'text8'
  MANUAL_DOWNLOAD_INSTRUCTIONS = 'A folder with text8 or text8.zip.'


class _WikiText(_TextBuilder, skip_registration=True):
  """Merity et al., 2016, articles of Wikipedia cut into words."""

  FOLDER: str
  ARCHIVE: str

  def read(self, source: pathlib.Path | None) -> dict[str, bytes]:
    splits = ('train', 'valid', 'test')
    names = [f'wiki.{split}.tokens' for split in splits]
    folder = source / self.FOLDER
    folder = folder if folder.is_dir() else source
    if not any((folder / name).is_file() for name in names):
      if (source / self.ARCHIVE).is_file():
        members = [f'{self.FOLDER}/{name}' for name in names]
        return dict(zip(splits, _read_zip(source / self.ARCHIVE, members)))
      plain = [f'{split}.txt' for split in splits]  # Other people's names.
      names = plain if any((folder / x).is_file() for x in plain) else names
    datasets.require_files(folder, names, f', nor {self.ARCHIVE}')
    return {split: (folder / name).read_bytes()
            for split, name in zip(splits, names)}


class Wikitext2(_WikiText, skip_registration=True):
  """WikiText-2: 2 million words, 33,278 different ones."""
  FOLDER = 'wikitext-2'
  ARCHIVE = 'wikitext-2-v1.zip'
  MANUAL_DOWNLOAD_INSTRUCTIONS = _WIKITEXT.format(ARCHIVE)


class Wikitext103(_WikiText, skip_registration=True):
  """WikiText-103: 103 million words, 267,735 different ones."""
  FOLDER = 'wikitext-103'
  ARCHIVE = 'wikitext-103-v1.zip'
  MANUAL_DOWNLOAD_INSTRUCTIONS = _WIKITEXT.format(ARCHIVE)


BUILDERS = {'stdlib': Stdlib, 'enwik8': Enwik8, 'text8': Text8,
            'wikitext2': Wikitext2, 'wikitext103': Wikitext103}
# (name, source, data_dir) -> the folder of the set.
prepare = functools.partial(datasets.prepare, BUILDERS)


def stdlib_paths(folder: pathlib.Path) -> list[str]:
  """The modules of a standard library below its folder, in order, no tests.

  A FileNotFoundError if there is none: not every Python brings its source.
  """
  found = []
  for parent, folders, files in os.walk(folder):
    folders[:] = set(folders) - _NOT_STDLIB  # Is not walked into.
    # What _sysconfigdata*.py says depends on the machine that built Python.
    found += [pathlib.Path(parent, name).relative_to(folder).as_posix()
              for name in files
              if name.endswith('.py') and not name.startswith('_sysconfigdata')]
  if not found:
    raise FileNotFoundError(
        f'{folder}: this Python comes without the source of its standard '
        'library; name another text with --dataset=text --text_file=FILE')
  return sorted(found)


def stdlib_split(path: str) -> str:
  """The split of a file by its path: 'train' for 90 % of all, 5 % the others.

  >>> stdlib_split('ast.py'), stdlib_split('stat.py'), stdlib_split('pdb.py')
  ('train', 'valid', 'test')
  """
  digest = hashlib.sha256(path.encode()).digest()
  draw = int.from_bytes(digest[:4], 'big') / 2**32
  return 'train' if draw < .9 else 'valid' if draw < .95 else 'test'


def _read_zip(path, members):
  with datasets.reading(path), zipfile.ZipFile(path) as archive:
    missing = sorted(set(members) - set(archive.namelist()))
    if missing:
      raise FileNotFoundError(f'{path}: no {", ".join(missing)}')
    return [archive.read(member) for member in members]
