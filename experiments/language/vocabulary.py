"""Vocabularies: what the tokens of a text stand for.

A token is a byte, or a word: what lies between blanks, with <eos> for the end
of a line. The words of a vocabulary are sorted with the most frequent first,
as an adaptive softmax needs them.
"""

import collections
from collections.abc import Iterator, Sequence
import re

import numpy as np

EOS, UNKNOWN = '<eos>', '<unk>'
_PIECE = 1 << 20  # Bytes cut into words at once, which bounds the memory.
_GAP = re.compile(rb'[ \n]')


class Bytes:
  """The 256 bytes; a text of any kind, and back without loss."""

  def __len__(self) -> int:
    return 256

  def encode(self, text: str | bytes) -> np.ndarray:
    """Returns the bytes of a text, that of a str in UTF-8: uint8[n]."""
    return np.frombuffer(_as_bytes(text), np.uint8)

  def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
    """The text of integer[n]; bytes that are no UTF-8 become U+FFFD."""
    return _in_range(tokens, 256).astype(np.uint8).tobytes().decode(
        'utf-8', 'replace')


class Words:
  """A list of words; a token is a place in it.

  Law: encode(decode(tokens)) is tokens, for words as a text is cut into them.

  >>> vocabulary = Words(['the', '<eos>', 'cat', '<unk>'])
  >>> vocabulary.encode('the cat sat\\n')
  array([0, 2, 3, 1], dtype=int32)
  >>> vocabulary.decode([0, 2, 3, 1])
  'the cat <unk> \\n'
  """

  def __init__(self, words: Sequence[str]):
    self.words = tuple(words)
    self._tokens = {word: token for token, word in enumerate(self.words)}

  def __len__(self) -> int:
    return len(self.words)

  def encode(self, text: str | bytes) -> np.ndarray:
    """The words of a text, int32[n]; <unk> for those it does not know."""
    unknown, get = self._tokens.get(UNKNOWN), self._tokens.get
    return np.concatenate([np.zeros(0, np.int32), *(
        np.fromiter((get(word, unknown) for word in words), np.int32,
                    len(words)) for words in _cut(_as_bytes(text)))])

  def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
    """The words of integer[n] with blanks between, <eos> as newline."""
    words = [self.words[token] for token in _in_range(tokens, len(self))]
    return ' '.join('\n' if word == EOS else word for word in words)


Vocabulary = Bytes | Words


def words_of(text: str | bytes) -> Words:
  """The words of a training text, the most frequent first.

  Ties are in the order of their spelling. <eos> and <unk> are always there;
  bytes that are no UTF-8 become U+FFFD.

  >>> words_of('b a b\\n').words
  ('b', '<eos>', 'a', '<unk>')
  """
  counts = collections.Counter({EOS: 0, UNKNOWN: 0})
  for words in _cut(_as_bytes(text)):
    counts.update(words)
  return Words(sorted(counts, key=lambda word: (-counts[word], word)))


def _as_bytes(text):
  return text.encode() if isinstance(text, str) else bytes(text)


def _in_range(tokens, size):
  tokens = np.asarray(tokens, np.int64)
  if tokens.size and not 0 <= tokens.min() <= tokens.max() < size:
    raise ValueError(
        f'`tokens` (from {tokens.min()} to {tokens.max()}) must be in '
        f'[0, {size})')
  return tokens


def _cut(text: bytes) -> Iterator[list[str]]:
  """Cuts a text into words, some hundred thousand at a time."""
  start = 0
  while start < len(text):
    gap = _GAP.search(text, start + _PIECE)
    end = gap.end() if gap else len(text)
    piece = text[start:end].decode('utf-8', 'replace')
    yield piece.replace('\n', f' {EOS} ').split()
    start = end
