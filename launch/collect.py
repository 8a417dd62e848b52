"""Makes a table or figure of what its cells have left, finished or not.

  python -m launch.collect --table=top_kast_table6 --scale=small

prints the published numbers beside ours, with differences, and leaves
table.md, table.csv and, for a figure, figure.png in the sweep's folder. Several
seeds make a mean and a deviation. Cells that are not finished are blank.
At --scale=small the published numbers are another network's, on other data:
what can be compared is the order of the rows, and the figure shows ours alone.
Tables of which nothing is published have a line a row and a column a column.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import os
import statistics
from typing import Any
from typing import NamedTuple

from absl import flags

from experiments import files
from experiments import plots
from experiments import programs
from experiments import reporting
from experiments import results as results_lib
from launch import backends
from launch import run as run_lib
from launch import table as table_lib
from launch import tables


# Of a table with a line a row; each takes three.
_MOST_COLUMNS = 4
# Metrics that are shares of the dense FLOPs of a run's own network.
_OF_DENSE = ('training_flops', 'training_cost')


class Measured(NamedTuple):
  """A published number and ours."""

  point: table_lib.Point
  values: tuple[float, ...]  # One a finished seed, in the metric's unit.
  places: tuple[float, ...]  # On the axis of the figure, one a finished seed.

  @property
  def mean(self) -> float | None:
    return statistics.mean(self.values) if self.values else None

  @property
  def deviation(self) -> float | None:
    return statistics.stdev(self.values) if self.values[1:] else None

  @property
  def x(self) -> float | None:
    """Where ours stands: as measured, else where theirs does."""
    return statistics.mean(self.places) if self.places else self.point.x


class Found(NamedTuple):
  """What one finished cell has left."""

  path: str
  result: Mapping[str, Any]  # result.json.
  metrics: Mapping[int, Mapping[str, Any]]  # metrics.jsonl by step.


def results(table: table_lib.Table, sweep_dir: str,
            seeds: Sequence[int] | None = None) -> dict[str, list[Found]]:
  """The finished cells of the table's runs, by name without the seed."""
  seeds = table.seeds if seeds is None else seeds
  return {name: [found for seed in seeds if (found := _read(os.path.join(
      backends.workdir(sweep_dir, f'{name}_seed{seed}'), 'result.json')))]
          for name in table_lib.run_names(table.points)}


def _read(path: str) -> Found | None:
  result = results_lib.read(os.path.dirname(path))
  if result is None:
    return None
  steps = os.path.join(os.path.dirname(path), 'metrics.jsonl')
  metrics = {}
  for row in reporting.read_jsonl(steps) if os.path.exists(steps) else ():
    metrics.setdefault(row['step'], {}).update(row)
  return Found(path, result, metrics)


def measure(table: table_lib.Table, found: Mapping[str, Sequence[Found]]
            ) -> list[Measured]:
  """What the finished cells say of each point.

  A ValueError names the file of a result that lacks what the table needs.
  """
  names = {table_lib.key_of(of): name for name, of in
           table_lib.run_names(table.points).items()}
  largest = max((each.result['cost']['flops'] for cells in found.values()
                 for each in cells if 'cost' in each.result), default=None)
  return [_measured(table.figure, point, largest, found[names[
      table_lib.key_of(point.flags)]]) if point.flags is not None else
          Measured(point, (), ()) for point in table.points]


def _measured(figure, point, largest, cells) -> Measured:
  values, places = [], []
  for cell in cells:
    try:
      value = _value(point, cell)
      if value is None:
        continue
      values.append(value)
      if figure and figure.x:
        places.append(_place(figure, cell.result, largest))
    except (KeyError, TypeError) as error:
      raise ValueError(f'{cell.path} has no {point.metric} for {point.row}, '
                       f'{point.column}: {error!r}') from error
  return Measured(point, tuple(values), tuple(places))


def _value(point, cell) -> float | None:
  """The number, or None if the run did not measure it at that step."""
  if point.step is not None:  # A column of fractions.
    steps = {step: row[point.metric] for step, row in cell.metrics.items()
             if point.metric in row}
    if not steps:
      raise KeyError(point.metric)
    return 100 * steps[point.step] if point.step in steps else None
  return table_lib.METRICS[point.metric].read(cell.result)


def _place(figure, result, largest) -> float:
  """On the axis; FLOPs beside the largest network and the shortest run."""
  place = table_lib.METRICS[figure.x].read(result)
  if figure.x in _OF_DENSE:
    place *= result['cost']['flops'] / largest
  if figure.dense_steps:
    place *= result['steps'] / figure.dense_steps
  return place


def other_flags(table: table_lib.Table, found: Mapping[str, Sequence[Found]]
                ) -> list[str]:
  """Flags in which a result differs from the table."""
  names = table_lib.run_names(table.points)
  return sorted({
      flag for name, cells in found.items() for cell in cells
      for flag, value in names[name].items()
      if not _agree(flag, value, cell.result['flags'].get(flag))})


def _agree(flag, ours, theirs) -> bool:
  return theirs is not None and (
      table_lib.argument(flag, ours) == table_lib.argument(flag, theirs))


def rows(measured: Sequence[Measured]) -> list[dict[str, Any]]:
  """A row a point, for the CSV."""
  return [{
      'row': each.point.row, 'column': each.point.column,
      'metric': each.point.metric, 'published': each.point.published,
      'published_deviation': each.point.deviation, 'ours': _short(each.mean),
      'deviation': _short(each.deviation),
      'difference': _short(difference(each)), 'seeds': len(each.values),
      'published_x': each.point.x, 'x': _short(each.x),
  } for each in measured]


def _short(value: float | None) -> float | None:
  """Without the digits that float32 makes up."""
  return None if value is None else float(f'{value:.6g}')


def difference(each: Measured) -> float | None:
  """Ours less the published number."""
  if each.mean is None or each.point.published is None:
    return None
  return each.mean - each.point.published


def markdown(table: table_lib.Table, measured: Sequence[Measured],
             differ: Sequence[str] = ()) -> str:
  """The table: published, ours, difference.

  A line a row if there are few columns, as the papers lay it out, or nothing
  is published; else a line a point. `differ` names flags that were not the
  table's.
  """
  columns = {each.point.column for each in measured}
  if all(each.point.published is None for each in measured):
    lines = _ours(measured)
  else:
    lines = (_wide if len(columns) <= _MOST_COLUMNS else _long)(measured)
  names = dict.fromkeys(name for line in lines for name in line)
  done = sum(bool(each.values) for each in measured)
  wanted = sum(each.point.flags is not None for each in measured)
  notes = [f'**{table.title}.** {done} of {wanted} numbers are there.']
  if differ:
    notes.append(f'Run with other flags than the table\'s: '
                 f'{", ".join(differ)}.')
  notes.append(table.note)
  return (' '.join(filter(None, notes)) + '\n\n'
          + reporting.markdown_table(lines, list(names)))


def _ours(measured) -> list[dict[str, str]]:
  lines = {}
  for each in measured:
    line = lines.setdefault(each.point.row, {'row': each.point.row})
    line[each.point.column] = _texts(each)['ours']
  return list(lines.values())


def _wide(measured) -> list[dict[str, str]]:
  lines = {}
  for each in measured:
    line = lines.setdefault(each.point.row, {'row': each.point.row})
    line |= {f'{each.point.column}, {name}': text
             for name, text in _texts(each).items()}
  return list(lines.values())


def _long(measured) -> list[dict[str, str]]:
  return [{'row': each.point.row, 'column': each.point.column, **_texts(each)}
          for each in measured]


def _texts(each: Measured) -> dict[str, str]:
  """The texts of a point, by what comes after the name of its column."""
  metric = table_lib.METRICS.get(each.point.metric)
  digits = metric.digits if metric else 1
  off = difference(each)
  return {'published': _number(each.point.published, each.point.deviation,
                               digits),
          'ours': _number(each.mean, each.deviation, digits),
          'difference': '' if off is None else f'{off:+.{digits}f}'}


def _number(value, deviation, digits) -> str:
  if value is None:
    return ''
  text = f'{value:.{digits}f}'
  return text if deviation is None else f'{text} ± {deviation:.{digits}f}'


def write(table: table_lib.Table, found: Mapping[str, Sequence[Found]],
          folder: str, chosen: Sequence[str] = (), published: bool = True
          ) -> str:
  """Writes table.md, table.csv and the figures; returns the Markdown.

  Args:
    table: what was run.
    found: its finished cells.
    folder: where to.
    chosen: regular expressions of the rows, if not all.
    published: whether the figures show published points.
  """
  kept = set(map(id, table_lib.chosen(table.points, chosen)))
  measured = [each for each in measure(table, found) if id(each.point) in kept]
  text = markdown(table, measured, other_flags(table, found))
  files.write_text(os.path.join(folder, 'table.md'), text)
  reporting.write_csv(os.path.join(folder, 'table.csv'), rows(measured))
  for figure in filter(None, (table.figure, *table.also)):
    placed = measure(table._replace(figure=figure), found)
    plots.lines(
        rows([each for each in placed if id(each.point) in kept
              and figure.metric in ('', each.point.metric)]),
        os.path.join(folder, f'{figure.name}.png'), table.title,
        xlabel=figure.xlabel, ylabel=figure.ylabel, scale=figure.scale,
        published=published)
  return text


def collect(values: Mapping[str, Any], table: table_lib.Table) -> str:
  """What the program does with its flags; returns the Markdown."""
  sweep_dir = run_lib.sweep_dir_of(values)
  if not os.path.isdir(sweep_dir):
    raise ValueError(f'`sweep_dir` (={sweep_dir!r}) must be a folder in which '
                     'launch.run has run this table.')
  found = results(table, sweep_dir, run_lib.seeds_of(values))
  return write(table, found, values['outdir'] or sweep_dir, values['rows'],
               values['scale'] == 'paper')


def main(argv):
  programs.begin(argv)
  values = flags.FLAGS.flag_values_dict()
  with programs.errors_in_a_line():
    run_lib.check_table(values)
    print(collect(values, tables.get(values['table'], values['scale'])))


def define_flags(into: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flags of this program."""
  run_lib.define_table_flags(into)
  flags.DEFINE_string('outdir', None, 'Where the table goes. Default: '
                      '--sweep_dir.', flag_values=into)


if __name__ == '__main__':
  define_flags()
  programs.run(main)
