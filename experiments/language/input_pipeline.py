"""Streams of text as a pure function of the step.

A text is one long sequence of tokens. It is cut into as many equal rows as a
batch has, and a batch continues each row where the batch before it stopped, so
that a model's memory of one segment belongs to the next. The state of a
training stream is one int, the step; and what several processes see, put side
by side, is what one process would see.
"""

from collections.abc import Callable, Iterator
import hashlib
import os
import pathlib
from typing import NamedTuple

import numpy as np

from experiments import batching
from experiments.language import vocabulary

SPLITS = ('train', 'valid', 'test')


class Corpus(NamedTuple):
  """What is known of a corpus before it is read."""
  level: str  # What a token is, 'byte' or 'word', unless one asks otherwise.
  vocabulary_size: int | None  # At that level; None if the text decides.


DATASETS = {
    'stdlib': Corpus('byte', 256),
    'enwik8': Corpus('byte', 256),
    'text8': Corpus('byte', 256),
    'wikitext2': Corpus('word', 33278),
    'wikitext103': Corpus('word', 267735),
    'text': Corpus('byte', 256),
}


class Text(NamedTuple):
  """One split of a corpus."""
  tokens: np.ndarray  # uint8[n] of bytes, int32[n] of words.
  vocabulary: vocabulary.Vocabulary  # That of the training split.

  @property
  def fingerprint(self) -> str:
    """16 hexadecimal digits that tell these tokens from any others."""
    return hashlib.sha256(np.ascontiguousarray(self.tokens)).hexdigest()[:16]


def load(
    dataset: str, split: str, *, level: str | None = None,
    data_dir: str | os.PathLike | None = None,
    text_file: str | os.PathLike | None = None) -> Text:
  """Reads one split of a corpus into memory; never downloads.

  The words are those of the training split, whichever split is asked for.
  `level` None is the corpus's own. `text_file` is for 'text' alone: a file, of
  which the first 90 % of the bytes are for training and 5 % each for the
  others; or a folder with train.txt, valid.txt and test.txt. `data_dir` as for
  images. A ValueError or FileNotFoundError names what does not fit or is not
  there.
  """
  level = level or DATASETS[dataset].level
  read = _reader(dataset, data_dir, text_file)
  known = (vocabulary.Bytes() if level == 'byte'
           else vocabulary.words_of(read('train')))
  return Text(known.encode(read(split)), known)


def train_batches(
    tokens: np.ndarray, *, batch_size: int, length: int, step: int = 0,
    process_index: int = 0,
    process_count: int = 1) -> Iterator[dict[str, np.ndarray]]:
  """Iterates without end over contiguous segments, a row per stream.

  The text of n tokens is cut into rows of R = (n - 1) // batch_size tokens, and
  a pass over it has R // length steps; what is left of a row is not trained on.

  Laws: the stream from `step` k is the stream from step 0 without its first k
  batches; the batches of all processes, concatenated, are those of one process.

  Yields {'inputs': int32[b, length], 'targets': int32[b, length], 'begins':
  bool[b]}. Where `begins` is true the segment does not continue the one before:
  memory must be forgotten.
  """
  rows = batching.process_rows(batch_size, process_index, process_count)
  row_length = (len(tokens) - 1) // batch_size
  starts = np.arange(batch_size)[rows, None] * row_length
  while True:
    column = step % (row_length // length) * length
    segments = tokens[starts + column + np.arange(length + 1)].astype(np.int32)
    yield {'inputs': segments[:, :-1], 'targets': segments[:, 1:],
           'begins': np.full(len(starts), column == 0)}
    step += 1


def eval_batches(
    tokens: np.ndarray, *, batch_size: int, length: int, process_index: int = 0,
    process_count: int = 1) -> Iterator[dict[str, np.ndarray]]:
  """Iterates once over a text, in `batch_size` contiguous streams.

  The first token of a row is the last target of the row above it. Rows that end
  early are filled up with token 0 and weight 0. A row begins without context,
  so fewer rows are closer to reading the text as a whole.

  Law: over all batches and processes the targets of weight 1 are tokens[1:],
  each once.

  Yields what `train_batches` does, and 'weight': float32[b, length].
  """
  rows = batching.process_rows(batch_size, process_index, process_count)
  last = len(tokens) - 1
  row_length = -(-last // batch_size)
  starts = np.arange(batch_size)[rows, None] * row_length
  for column in range(0, row_length, length):
    columns = column + np.arange(length)
    places = starts + columns
    is_real = (columns < row_length) & (places < last)
    inputs, targets = (
        np.where(is_real, tokens[np.minimum(places + shift, last)], 0)
        for shift in (0, 1))
    yield {'inputs': inputs.astype(np.int32),
           'targets': targets.astype(np.int32),
           'begins': np.full(len(starts), column == 0),
           'weight': is_real.astype(np.float32)}


def _reader(dataset, data_dir, text_file) -> Callable[[str], bytes]:
  """Finds a corpus: a function that reads a split."""
  if dataset == 'text':
    if not text_file:
      raise ValueError(f'`text_file` (={text_file!r}) must name a file where '
                       "dataset='text'")
    path = pathlib.Path(text_file).expanduser()
    return lambda split: _read_text(path, split)
  if text_file is not None:
    raise ValueError(
        f'`text_file` (={str(text_file)!r}) must be left out: '
        f'dataset={dataset!r} does not use it, only text does')
  from experiments import datasets
  from experiments.language import corpora
  folder = datasets.locate(corpora.BUILDERS, dataset, data_dir,
                           'experiments.language.prepare')
  return lambda split: _read_records(folder, split)


def _read_records(folder, split):
  import tensorflow_datasets as tfds
  from experiments import datasets
  with datasets.reading(folder):
    source = tfds.builder_from_directory(
        folder, file_format='array_record').as_data_source(split)
    chunks = source.__getitems__(range(len(source)))
    return b''.join(chunk['bytes'].tobytes() for chunk in chunks)


def _read_text(path, split):
  if path.is_dir():
    if not (path / f'{split}.txt').is_file():
      raise FileNotFoundError(f'text_file={str(path)!r} has no {split}.txt')
    text = (path / f'{split}.txt').read_bytes()
  elif path.is_file():
    whole = path.read_bytes()
    ends = [int(len(whole) * share) for share in (0, .9, .95, 1)]
    i = SPLITS.index(split)
    text = whole[ends[i]:ends[i + 1]]
  else:
    raise FileNotFoundError(f'text_file={str(path)!r} does not exist')
  if not text:
    raise ValueError(f'text_file={str(path)!r}: nothing is left for {split}')
  return text
