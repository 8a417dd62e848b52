"""What a finished run has left, and whether it is the run that one asks for."""

from collections.abc import Mapping
from collections.abc import Sequence
import os
from typing import Any

from experiments import files

NAME = 'result.json'


def read(workdir: str) -> dict[str, Any] | None:
  """What result.json holds; None if there is none.

  Raises:
    ValueError: if it is damaged, naming it.
  """
  path = os.path.join(workdir, NAME)
  try:
    result = files.read_json(path)
  except (FileNotFoundError, NotADirectoryError):
    return None
  if not isinstance(result.get('flags'), dict):
    raise ValueError(f'{path} is damaged, it has no flags.')
  return result


def finished(workdir: str, values: Mapping[str, Any], free: Sequence[str]
             ) -> dict[str, Any] | None:
  """What a finished run of these flags has left; None if there is none.

  The one place that says whether a run may stand for another: every flag
  must be equal, but for those that a continuation may change.

  Args:
    workdir: of the run.
    values: flags by name.
    free: those that may differ. `workdir` always may.

  Returns:
    What result.json holds. None also where it is damaged: the run is then
    made again from its checkpoints.
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
