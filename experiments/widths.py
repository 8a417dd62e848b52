"""How wide a dense network is that has as many weights as a sparse one."""

from collections.abc import Callable

# Bisection stops when the bracket is this share of its upper end.
_TOLERANCE = 2.0 ** -10


def matching(count: Callable[[float], int], parameters: int, name: str
             ) -> float:
  """The width at which a network comes closest to a number of parameters.

  Args:
    count: width -> parameters, which never falls.
    parameters: number wanted.
    name: of the network, for the error.

  Returns:
    The width, positive.

  Raises:
    ValueError: if even the narrowest network has more.

  Example:
    >>> round(matching(lambda width: round(width**2 * 1000), 250, 'x'), 2)
    0.5
  """
  low, high = 2.0 ** -20, 1.0
  low_count, high_count = count(low), count(high)
  if parameters < low_count:
    raise ValueError(f'`parameters` (={parameters!r}) must be at least '
                     f'{low_count} for {name!r}.')
  while high_count < parameters:
    low, low_count = high, high_count
    high, high_count = 2 * high, count(2 * high)
  while high - low > _TOLERANCE * high:
    middle = (low + high) / 2
    middle_count = count(middle)
    if middle_count < parameters:
      low, low_count = middle, middle_count
    else:
      high, high_count = middle, middle_count
  return low if parameters - low_count <= high_count - parameters else high
