"""Files that appear whole or not at all, and files that somebody damaged.

What is written goes first to a file of a fresh name beside its place, which
follows no link and which nobody else writes, and is then moved there.
"""

from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
import secrets
from typing import Any, BinaryIO


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
  """A file to write bytes to, which takes the place of `path` in the end.

  A link at `path` is replaced, not followed; its folder is made if absent. If
  the block raises, an old file stays and nothing else is left.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   path = pathlib.Path(folder, 'new', 'file')
    ...   with replacing(path) as file:
    ...     _ = file.write(b'whole')
    ...   os.listdir(path.parent), path.read_bytes()
    (['file'], b'whole')
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  # Another name at each call.
  temporary = path.with_name(f'.{path.name}.{secrets.token_hex(8)}')
  try:
    with open(temporary, 'xb') as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes a file in UTF-8, as `replacing` does; an OSError names it."""
  with naming(path), replacing(path) as file:
    file.write(text.encode())


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
  """Puts a name into an error of the system that has none, as a full disk's."""
  try:
    yield
  except OSError as error:
    if error.errno is None or error.filename is not None:
      raise
    raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def read_json(path: str | os.PathLike) -> dict[str, Any]:
  """Reads a JSON object; a ValueError names a file that holds anything else."""
  try:
    value = json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
  except ValueError as error:  # A UnicodeDecodeError is one as well.
    raise ValueError(f'{path} is damaged, it is no JSON: {error}') from error
  if not isinstance(value, dict):
    raise ValueError(f'{path} is damaged, it holds no JSON object.')
  return value
