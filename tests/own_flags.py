"""Binaries with flags of the same names, side by side in one process."""

import contextlib
import copy

from absl import flags


class OwnFlags:
  """Flags apart from those that other tests see.

  With `known` they begin as a copy of the flags that have been defined, for a
  binary that changes another one's.

  Example:
    with OwnFlags() as own: import the binary here, then use `own` again
    wherever it reads its flags.
  """

  def __init__(self, known=False):
    self._inside = (copy.deepcopy(vars(flags.FLAGS)) if known
                    else dict(vars(flags.FlagValues())))
    self._stack = contextlib.ExitStack()

  def __enter__(self):
    outside = dict(vars(flags.FLAGS))
    self._swap(self._inside)
    self._stack.callback(self._leave, outside)
    return self

  def __exit__(self, *exc_info):
    self._stack.close()

  def _leave(self, outside):
    self._inside = dict(vars(flags.FLAGS))
    self._swap(outside)

  def _swap(self, values):
    vars(flags.FLAGS).clear()
    vars(flags.FLAGS).update(values)
