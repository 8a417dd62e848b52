"""How wide a dense network is that has as many weights as a sparse one."""

from collections.abc import Callable

# Bisection stops when the bracket is this share of its upper end.
_TOLERANCE = 2.0 ** -10


def matching(count: Callable[[float], int], parameters: int) -> float:
  """The width at which a network comes closest to a number of parameters.

  The published widths match sizes in bytes, in which a sparse network also
  pays one bit of mask for every entry, zero or not. To come near them, ask for
  nonzero + total / 32.

  Args:
    count: width -> parameters, which never falls: `kernel_count` of a model.
    parameters: number wanted.

  Returns:
    The width, positive.

  Raises:
    ValueError: if even the narrowest network has more.

  Example:
    >>> round(matching(lambda width: round(width**2 * 1000), 250), 2)
    0.5

  Reference:
    Evci et al., Rigging the lottery, 2020, https://arxiv.org/abs/1911.11134,
    the small-dense baseline. ResNet-50 against the Erdos-Renyi-kernel network
    at densities 0.2, 0.1, 0.05 and 0.035 is published with widths 0.465, 0.34,
    0.26 and 0.231; with the bits of the mask this finds 0.459, 0.337, 0.257
    and 0.228, without them 0.425, 0.289, 0.193 and 0.156.
  """
  low, high = 2.0 ** -20, 1.0
  if parameters < count(low):
    raise ValueError(f'`parameters` (={parameters!r}) must be at least '
                     f'{count(low)}.')
  while count(high) < parameters:
    low, high = high, 2 * high
  while high - low > _TOLERANCE * high:
    middle = (low + high) / 2
    low, high = ((middle, high) if count(middle) < parameters
                 else (low, middle))
  return min(low, high, key=lambda width: abs(count(width) - parameters))
