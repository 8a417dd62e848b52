"""Cycles of a TPU kernel, from the schedule that its compiler wrote down.

The compiler packs instructions into bundles, one a cycle where nothing waits.
Loops and branches are told by their labels; how often each is taken is said by
who knows the kernel.
"""

import collections
from collections.abc import Mapping, Sequence
import re
from typing import NamedTuple

# Bundles after a branch that run whether or not it is taken.
_DELAY = 4
_LARGE = 48  # A branch of fewer bundles is not worth a number.
_BUNDLE = re.compile(r' *(?:0x)?[0-9a-f]+ +(?:[A-Z]{2})? *: *>* *\{')
_BRANCH = re.compile(r'sbr\.rel .*?target = \$region(\d+)')
_START = re.compile(r'Start(?:/End empty)? region (\d+)')


class Span(NamedTuple):
  """Bundles that run as often as a loop turns, or as a branch lets them."""

  start: int
  stop: int
  loop: bool

  @property
  def size(self) -> int:
    return self.stop - self.start


def spans(text: str) -> tuple[int, list[Span]]:
  """How many bundles there are, and the loops and branches among them.

  Example:
    >>> text = '''
    ...    0   : { nop } /* Start region 1 */
    ...  0x1 LB: > { sbr.rel (%p) target = $region1 }'''
    >>> spans(text)
    (2, [Span(start=0, stop=2, loop=True)])
  """
  bundles = []
  for line in text.splitlines():
    if _BUNDLE.match(line):
      bundles.append(line)
    elif bundles:
      bundles[-1] += line
  starts = {name: i for i, bundle in enumerate(bundles)
            for name in _START.findall(bundle)}
  found = []
  for i, bundle in enumerate(bundles):
    for name in _BRANCH.findall(bundle):
      at = starts[name]
      after = min(i + 1 + _DELAY, len(bundles))
      found.append(Span(at, after, True) if at <= i else
                   Span(after, max(at, after), False))
  return len(bundles), sorted(found, key=lambda s: (s.start, -s.stop))


def cycles(text: str, turns: Sequence[float],
           taken: Mapping[int, Sequence[float]],
           least: Mapping[int, float]) -> float:
  """Bundles of a file of final bundles, each as often as it runs.

  Args:
    turns: of each loop in order, for one entry into it.
    taken: for some loops, by their place in `turns`: of each large branch in
      its body, how often it is taken. Others count as if always.
    least: cycles of a turn of some loops, below which the units behind the
      bundles do not go.

  A ValueError if the program has another number of loops or branches.

  Example:
    >>> text = '''
    ...    0   : { nop } /* Start region 1 */
    ...  0x1 LB: > { sbr.rel (%p) target = $region1 }'''
    >>> cycles(text, [10.], {}, {0: 3.})
    30.0
  """
  count, found = spans(text)
  loops = [span for span in found if span.loop]
  inside = collections.defaultdict(list)
  for span in found:
    around = [i for i, loop in enumerate(loops)
              if loop.start <= span.start and span.stop <= loop.stop]
    if not span.loop and span.size >= _LARGE and not any(
        _guards(span, loop) for loop in loops):
      inside[around[-1] if around else None].append(span)
  if len(loops) != len(turns) or any(
      len(inside[i]) != len(parts) for i, parts in taken.items()):
    raise ValueError(f'the schedule has loops {loops} and branches {inside}, '
                     f'but `turns` (={turns}) and `taken` (={taken}) are of '
                     'other numbers.')
  often, owner = [1.] * count, [None] * count
  weighted = [(span, times, i) for i, (span, times) in enumerate(
      zip(loops, turns))]
  weighted += [(span, times, None) for i, parts in taken.items()
               for span, times in zip(inside[i], parts)]
  for span, times, place in weighted:
    for i in range(span.start, min(span.stop, count)):
      often[i], owner[i] = often[i] * times, place
  total = sum(often)
  for loop, low in least.items():
    own = [often[i] for i in range(count) if owner[i] == loop]
    total += max(0., low - len(own)) * max(own)
  return total


def _guards(branch: Span, loop: Span) -> bool:
  """Whether it only asks if the loop turns at all, or is what it turns."""
  both = min(branch.stop, loop.stop) - max(branch.start, loop.start)
  every = max(branch.stop, loop.stop) - min(branch.start, loop.start)
  return both > 0 and (both > .85 * every
                       or abs(branch.start - loop.start) < 8)
