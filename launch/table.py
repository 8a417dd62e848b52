"""What a table or figure of a paper is: points, each a run and a number.

A point is one published number, the flags of the run that should give it, and
where it stands. Points of equal flags share one run: the accuracy and the FLOPs
of a row are two points of one run.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import math
import re
from typing import Any
from typing import NamedTuple

SCALES = ('paper', 'small')


class Metric(NamedTuple):
  """A number of a finished run, in the unit that the papers print."""

  label: str  # For axes and heads of columns.
  read: Callable[[Mapping[str, Any]], float]  # Of what result.json holds.
  digits: int = 2  # After the decimal point.


def _reduction(name: str) -> Callable[[Mapping[str, Any]], float]:
  return lambda result: 100 * (1 - result['cost'][name])


# Fractions in result.json are percent here.
METRICS = {
    'accuracy': Metric('top-1 accuracy (%)',
                       lambda result: 100 * result['test_accuracy']),
    'bits_per_character': Metric(
        'bits per character',
        lambda result: result['test_bits_per_character'], 3),
    # Of a token: of a byte where the small scale reads bytes.
    'perplexity': Metric('perplexity',
                         lambda result: math.exp(result['test_loss']), 1),
    'training_flops': Metric(
        'training FLOPs, as a fraction of dense',
        lambda result: result['cost']['training_multiplier_rigl'], 3),
    'training_cost': Metric(
        'FLOPs of training (% of dense)',
        lambda result: 100 * result['cost']['training_multiplier'], 1),
    'sparsity': Metric('sparsity (%)', lambda result: 100 * result['sparsity'],
                       1),
    'effective_sparsity': Metric(
        'weights that are zero or on no path (%)',
        lambda result: 100 * result['effective_sparsity'], 1),
    'training_reduction': Metric('training FLOPs saved (%)',
                                 _reduction('training_multiplier'), 1),
    'inference_reduction': Metric('inference FLOPs saved (%)',
                                  _reduction('inference_multiplier'), 1),
    'forward_speedup': Metric('speed-up of the forward pass',
                              lambda result: result['forward_speedup']),
    'backward_speedup': Metric('speed-up of the backward pass',
                               lambda result: result['backward_speedup']),
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
  names = run_names(table.points)
  return [Run(f'{name}_seed{seed}', table.binary, dict(flags) | {'seed': seed})
          for seed in (table.seeds if seeds is None else seeds)
          for name, flags in names.items()]


def run_names(points: Sequence[Point]) -> dict[str, Mapping[str, Any]]:
  """The flags of each run by its name, that of its first point."""
  found, keys = {}, set()
  for point in points:
    if point.flags is None or key_of(point.flags) in keys:
      continue
    keys.add(key_of(point.flags))
    name = _name(point)
    if name in found:
      raise ValueError(f'`points` must not have two runs named {name!r}.')
    found[name] = point.flags
  return found


def name_of(table: Table, point: Point) -> str | None:
  """The name of a point's run without its seed; None if it is quoted."""
  if point.flags is None:
    return None
  return {key_of(flags): name for name, flags in
          run_names(table.points).items()}[key_of(point.flags)]


def key_of(flags: Mapping[str, Any]) -> str:
  """Equal for equal flags, whatever their order."""
  return repr(sorted((name, argument(name, value))
                     for name, value in flags.items()))


def _name(point: Point) -> str:
  """Row and column in the letters that any file system and shell takes."""
  text = f'{point.row}_{point.column}'.lower()
  return re.sub(r'[^a-z0-9.]+', '_', text).strip('_')
