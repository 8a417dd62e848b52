"""Ranges of arguments: each check returns the value or raises ValueError."""

from collections.abc import Callable
from typing import Any

import numpy as np


def check_sparsity(name: str, value: float) -> float:
  """Returns `value` if it is a number in [0, 1), else raises ValueError."""
  return _check(name, value, lambda v: 0 <= v < 1, 'in [0, 1)')


def check_fraction(name: str, value: Any) -> float:
  """Returns `value` if it is a number in [0, 1], else raises ValueError."""
  return _check(name, value, lambda v: 0 <= v <= 1, 'in [0, 1]')


def check_non_negative(name: str, value: float) -> float:
  """Returns `value` if it is finite and at least 0, else raises ValueError."""
  return _check(name, value, lambda v: 0 <= v < float('inf'),
                'finite and at least 0')


def check_bool(name: str, value: bool) -> bool:
  """Returns `value` if it is True or False, else raises ValueError."""
  if not isinstance(value, bool):
    raise ValueError(f'`{name}` (={value!r}) must be True or False.')
  return value


def check_callable(name: str, value: Any) -> Any:
  """Returns `value` if it can be called, else raises ValueError."""
  if not callable(value):
    raise ValueError(f'`{name}` (={value!r}) must be a function.')
  return value


def check_count(name: str, value: int, *, least: int = 0) -> int:
  """Returns `value` if it is an integer >= `least`, else raises ValueError."""
  whole = (isinstance(value, (int, np.integer))
           and not isinstance(value, (bool, np.bool_)))
  if not whole or value < least:
    raise ValueError(f'`{name}` (={value!r}) must be an integer of at least '
                     f'{least}.')
  return int(value)


def check_backward(sparsity: float, backward_sparsity: float,
                   backward_selection: str) -> None:
  """Raises ValueError naming the argument of a backward set out of range."""
  check_sparsity('sparsity', sparsity)
  check_sparsity('backward_sparsity', backward_sparsity)
  if backward_sparsity > sparsity:
    raise ValueError(f'`backward_sparsity` (={backward_sparsity!r}) must not '
                     f'be above `sparsity` (={sparsity!r}): the backward set '
                     'contains the forward set.')
  if backward_selection not in ('magnitude', 'random'):
    raise ValueError(f'`backward_selection` (={backward_selection!r}) must be '
                     '\'magnitude\' or \'random\'.')


def _check(name, value, accepts: Callable[[float], bool], wanted: str) -> float:
  try:
    number = float('nan' if isinstance(value, (bool, str)) else value)
  except (TypeError, ValueError):
    number = float('nan')
  if not accepts(number):  # NaN is accepted by no comparison.
    raise ValueError(f'`{name}` (={value!r}) must be {wanted}.')
  return number
