"""What a table or figure of a paper is: points, each a run and a number.

A point is one published number, the flags of the run that should give it, and
where it stands. Points of equal flags share one run: the accuracy and the FLOPs
of a row are two points of one run.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import math
import re
from typing import Any, NamedTuple

SCALES = ('paper', 'small')


class Metric(NamedTuple):
  """A number of a finished run, in the unit that the papers print."""

  read: Callable[[Mapping[str, Any]], float]  # Of what result.json holds.
  digits: int = 2  # After the decimal point.


def _percent(name: str, digits: int = 1) -> Metric:
  return Metric(lambda result: 100 * result[name], digits)


def _saved(name: str) -> Metric:
  return Metric(lambda result: 100 * (1 - result['cost'][name]), 1)


# Fractions in result.json are percent here, but for the first of the FLOPs.
METRICS = {
    'accuracy': _percent('test_accuracy', 2),
    'bits_per_character': Metric(
        lambda result: result['test_bits_per_character'], 3),
    # Of a token: of a byte where the small scale reads bytes.
    'perplexity': Metric(lambda result: math.exp(result['test_loss']), 1),
    'training_flops': Metric(
        lambda result: result['cost']['training_multiplier_rigl'], 3),
    'training_cost': Metric(
        lambda result: 100 * result['cost']['training_multiplier'], 1),
    'sparsity': _percent('sparsity'),
    'effective_sparsity': _percent('effective_sparsity'),
    'training_reduction': _saved('training_multiplier'),
    'inference_reduction': _saved('inference_multiplier'),
    'forward_speedup': Metric(lambda result: result['forward_speedup']),
    'backward_speedup': Metric(lambda result: result['backward_speedup']),
}


class Point(NamedTuple):
  """One published number, and the run that should give it."""

  row: str  # The line of the table, or of the figure.
  column: str  # The column of the table.
  published: float | None  # In the unit of the metric; None: not printed.
  # Of the run; None for a number that is only quoted, as the papers do too.
  flags: Mapping[str, Any] | None
  metric: str = 'accuracy'  # A key of METRICS, or a column of metrics.jsonl.
  deviation: float | None = None  # Published standard deviation.
  x: float | None = None  # Published place on the axis of a figure.
  step: int | None = None  # The row of metrics.jsonl; None: result.json.


class Figure(NamedTuple):
  """How the paper draws it, or we do."""

  xlabel: str
  ylabel: str
  x: str = ''  # A key of METRICS that places our points; '': where theirs are.
  logarithmic: bool = False
  dense_steps: int | None = None  # FLOPs are relative to a run of so many.
  metric: str = ''  # Of the points that are drawn; '': all are.
  name: str = 'figure'  # Of its file.

  @property
  def scale(self) -> str:
    """Of the axis, as `plots.lines` calls it."""
    if self.x == 'sparsity':
      return 'sparsity'
    return 'log' if self.logarithmic else 'linear'


class Table(NamedTuple):
  """A table or figure at one scale."""

  name: str
  title: str
  points: tuple[Point, ...]
  binary: str = 'experiments.image.train'
  seeds: tuple[int, ...] = (0,)
  figure: Figure | None = None
  also: tuple[Figure, ...] = ()  # Further figures of the same points.
  note: str = ''  # What a reader of the numbers must know.


class Run(NamedTuple):
  """One run of a binary; its folder has its name."""

  name: str
  binary: str
  flags: Mapping[str, Any]  # Its seed included, its folder not.
  extra: tuple[str, ...] = ()  # Arguments that a sweep adds: '--bfloat16'.

  def arguments(self, workdir: str) -> list[str]:
    """The command line after the binary's name."""
    return [*map(argument, self.flags, self.flags.values()), *self.extra,
            f'--workdir={workdir}']


def argument(name: str, value: Any) -> str:
  """A flag as it is typed; a ValueError for a kind that no flag has.

  Example:
    >>> argument('skip_step', False), argument('lr_drops', [.3, .9])
    ('--noskip_step', '--lr_drops=0.3,0.9')
  """
  if isinstance(value, bool):
    return f'--{name}' if value else f'--no{name}'
  if isinstance(value, (list, tuple)):
    return f'--{name}={",".join(map(str, value))}'
  if isinstance(value, (str, int, float)):
    return f'--{name}={value}'
  raise ValueError(f'`{name}` (={value!r}) must be a bool, a number, a string '
                   'or a list.')


def chosen(points: Iterable[Point], rows: Sequence[str]) -> list[Point]:
  """The points whose row matches one of the expressions; all without any.

  A ValueError if one is no regular expression, or no row matches.
  """
  given = f'`rows` (={",".join(rows)!r})'
  try:
    found = [point for point in points if not rows or any(
        re.search(rule, point.row) for rule in rows)]
  except re.error as error:
    raise ValueError(f'{given} must be a regular expression: {error}.'
                     ) from None
  if not found:
    raise ValueError(f'{given} must match a row.')
  return found


def runs(table: Table, seeds: Iterable[int] | None = None) -> list[Run]:
  """The runs of a table, each once, all of a seed before those of the next."""
  flags = {}
  for point, name in named(table.points):
    if name is not None:
      flags.setdefault(name, point.flags)
  return [Run(f'{name}_seed{seed}', table.binary, {**of, 'seed': seed})
          for seed in (table.seeds if seeds is None else seeds)
          for name, of in flags.items()]


def named(points: Sequence[Point]) -> list[tuple[Point, str | None]]:
  """Each point with the name of its run, that of the run's first point.

  Seeds are no part of it, and a point that is only quoted has None. A
  ValueError if two runs have one name.
  """
  names, found = {}, []
  for point in points:
    if point.flags is None:
      found.append((point, None))
      continue
    key = repr(sorted(map(argument, point.flags, point.flags.values())))
    if key not in names:
      # In the letters that any file system and shell takes.
      name = re.sub(r'[^a-z0-9.]+', '_',
                    f'{point.row}_{point.column}'.lower()).strip('_')
      if name in names.values():
        raise ValueError(f'`points` must not have two runs named {name!r}.')
      names[key] = name
    found.append((point, names[key]))
  return found
