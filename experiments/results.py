"""What a finished run has left, and whether it is the run that one asks for."""

from collections.abc import Mapping, Sequence
import importlib
import os
from typing import Any

from experiments import files

NAME = 'result.json'
# Whose runs can be opened again; result.json names one, no other is imported.
PROGRAMS = ('experiments.image.train', 'experiments.language.train')


def read(workdir: str) -> dict[str, Any] | None:
  """What result.json holds; None without one. A damaged one is named."""
  path = os.path.join(workdir, NAME)
  try:
    result = files.read_json(path)
  except (FileNotFoundError, NotADirectoryError):
    return None
  if not isinstance(result.get('flags'), dict):
    raise ValueError(f'{path} is damaged, it has no flags.')
  return result


def reopen(workdir: str) -> tuple[Any, Any]:
  """The `training.Binary` of a finished run, and its `training.Run`.

  A ValueError or FileNotFoundError names what is missing or does not fit.
  """
  path, result = os.path.join(workdir, NAME), read(workdir)
  if result is None:
    raise FileNotFoundError(f'{path}: there is no finished run.')
  if result.get('program') not in PROGRAMS:
    raise ValueError(f'{path}: `program` (={result.get("program")!r}) must be '
                     f'one of {", ".join(PROGRAMS)}.')
  binary = importlib.import_module(result['program']).BINARY
  try:
    return binary, binary.prepare(result['flags'], workdir)
  except KeyError as error:
    raise ValueError(f'{path} is damaged, it has no flag {error}.') from error


def finished(workdir: str, values: Mapping[str, Any], free: Sequence[str]
             ) -> dict[str, Any] | None:
  """What a finished run of these flags has left; None if there is none.

  The one place that says whether a run may stand for another: every flag but
  `workdir` and `free` must be equal. None also where result.json is damaged:
  the run is then made again from its checkpoints.
  """
  try:
    result = read(workdir)
  except ValueError:
    return None
  if result is None or differing(result['flags'], values, free):
    return None
  return result


def differing(theirs: Mapping[str, Any], ours: Mapping[str, Any],
              free: Sequence[str] = ()) -> list[str]:
  """The flags in which two runs differ.

  Example:
    >>> differing({'seed': 1, 'a': 2}, {'seed': 1, 'a': 3, 'workdir': 'x'})
    ['a']
  """
  return sorted(name for name in theirs.keys() | ours.keys()
                if name not in (*free, 'workdir')
                and theirs.get(name) != ours.get(name))
