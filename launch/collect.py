"""Makes a table or figure of what its cells have left, finished or not.

  python -m launch.collect --table=top_kast_table6 --scale=small

prints the published numbers beside ours, with differences, and leaves
table.md, table.csv and, for a figure, figure.png in the sweep's folder. Several
seeds make a mean and a deviation. Cells that are not finished are blank.
At --scale=small the published numbers are another network's, on other data:
what can be compared is the order of the rows, and the figure shows ours alone.
Tables of which nothing is published have a line a row and a column a column.
"""

from collections.abc import Mapping, Sequence
import os
import statistics
from typing import Any

from absl import flags

from experiments import files
from experiments import plots
from experiments import programs
from experiments import reporting
from experiments import results
from launch import backends
from launch import run as run_lib
from launch import table as table_lib
from launch import tables


# Of a table with a line a row; each takes three.
_MOST_COLUMNS = 4
# Metrics that are shares of the dense FLOPs of a run's own network.
_OF_DENSE = ('training_flops', 'training_cost')


def measure(table: table_lib.Table, sweep_dir: str,
            seeds: Sequence[int] | None = None) -> list[dict[str, Any]]:
  """A row a point: the published number, and what its finished cells say.

  `point` is the point itself, `cells` what result.json of each seed holds, with
  `path`, its own, and `metrics`, the rows of metrics.jsonl by step. A
  ValueError names the file of a result that lacks what the table needs.
  """
  cells, measured = {}, []
  for point, name in table_lib.named(table.points):
    if name not in cells:
      folders = [backends.workdir(sweep_dir, f'{name}_seed{seed}')
                 for seed in (table.seeds if seeds is None else seeds)]
      cells[name] = list(filter(None, map(_read, folders)))
    found = cells[name] if point.flags is not None else []
    values = [value for value in (_checked(_value, point, cell)
                                  for cell in found) if value is not None]
    ours = statistics.mean(values) if values else None
    measured.append({
        'point': point, 'cells': found, 'row': point.row,
        'column': point.column, 'metric': point.metric,
        'published': point.published, 'published_deviation': point.deviation,
        'ours': ours,
        'deviation': statistics.stdev(values) if values[1:] else None,
        'difference': (None if None in (ours, point.published)
                       else ours - point.published),
        'seeds': len(values), 'published_x': point.x})
  return measured


def _read(workdir: str) -> dict[str, Any] | None:
  result = results.read(workdir)
  steps, metrics = os.path.join(workdir, 'metrics.jsonl'), {}
  for row in reporting.read_jsonl(steps) if os.path.exists(steps) else ():
    metrics.setdefault(row['step'], {}).update(row)
  return result and {**result, 'metrics': metrics,
                     'path': os.path.join(workdir, results.NAME)}


def _checked(read, point, cell):
  """What `read` finds in a cell."""
  try:
    return read(point, cell)
  except (KeyError, TypeError) as error:
    raise ValueError(f'{cell["path"]} has no {point.metric} for {point.row}, '
                     f'{point.column}: {error!r}') from error


def _value(point, cell) -> float | None:
  """The number, or None if the run did not measure it at that step."""
  if point.step is None:
    return table_lib.METRICS[point.metric].read(cell)
  if not any(point.metric in row for row in cell['metrics'].values()):
    raise KeyError(point.metric)
  share = cell['metrics'].get(point.step, {}).get(point.metric)
  return None if share is None else 100 * share


def places(figure: table_lib.Figure | None, measured: Sequence[Mapping]
           ) -> list[float | None]:
  """Where each point stands on the axis: as measured, else where theirs does.

  FLOPs are those beside the largest network and the shortest run.
  """
  if not (figure and figure.x):
    return [each['published_x'] for each in measured]
  largest = max((cell['cost']['flops'] for each in measured
                 for cell in each['cells'] if 'cost' in cell), default=None)

  def place(point, cell):
    del point  # Of an error alone.
    found = table_lib.METRICS[figure.x].read(cell)
    if figure.x in _OF_DENSE:
      found *= cell['cost']['flops'] / largest
    if figure.dense_steps:
      found *= cell['steps'] / figure.dense_steps
    return found

  return [statistics.mean(_checked(place, each['point'], cell)
                          for cell in each['cells'])
          if each['seeds'] else each['published_x'] for each in measured]


def other_flags(measured: Sequence[Mapping]) -> list[str]:
  """Flags in which a result differs from the table."""
  def text(name, value):
    return None if value is None else table_lib.argument(name, value)

  return sorted({
      name for each in measured for cell in each['cells']
      for name, value in each['point'].flags.items()
      if text(name, value) != text(name, cell['flags'].get(name))})


def rows(figure: table_lib.Figure | None, measured: Sequence[Mapping]
         ) -> list[dict[str, Any]]:
  """A row a point, for the CSV and the figures."""
  # Without the digits that float32 makes up.
  return [{name: float(f'{value:.6g}') if isinstance(value, float) else value
           for name, value in {**each, 'x': x}.items()
           if name not in ('point', 'cells')}
          for each, x in zip(measured, places(figure, measured), strict=True)]


def markdown(table: table_lib.Table, measured: Sequence[Mapping],
             differ: Sequence[str] = ()) -> str:
  """The table: published, ours, difference.

  A line a row if there are few columns, as the papers lay it out, or nothing
  is published; else a line a point. `differ` names flags that were not the
  table's.
  """
  columns = {each['column'] for each in measured}
  ours_alone = all(each['published'] is None for each in measured)
  lines = {}
  for each in measured:
    row, column, texts = each['row'], each['column'], _texts(each)
    if ours_alone:
      line = {column: texts['ours']}
    elif len(columns) <= _MOST_COLUMNS:
      line = {f'{column}, {name}': text for name, text in texts.items()}
    else:
      line = {'column': column, **texts}
    key = row if 'column' not in line else (row, column)
    lines.setdefault(key, {'row': row}).update(line)
  names = dict.fromkeys(name for line in lines.values() for name in line)
  done = sum(bool(each['seeds']) for each in measured)
  wanted = sum(each['point'].flags is not None for each in measured)
  notes = [f'**{table.title}.** {done} of {wanted} numbers are there.']
  if differ:
    notes.append(f'Run with other flags than the table\'s: '
                 f'{", ".join(differ)}.')
  notes.append(table.note)
  return (' '.join(filter(None, notes)) + '\n\n'
          + reporting.markdown_table(list(lines.values()), list(names)))


def _texts(each: Mapping[str, Any]) -> dict[str, str]:
  """The texts of a point, by what comes after the name of its column."""
  metric = table_lib.METRICS.get(each['metric'])
  digits = metric.digits if metric else 1
  off = each['difference']
  return {'published': _number(each['published'], each['published_deviation'],
                               digits),
          'ours': _number(each['ours'], each['deviation'], digits),
          'difference': '' if off is None else f'{off:+.{digits}f}'}


def _number(value, deviation, digits) -> str:
  if value is None:
    return ''
  text = f'{value:.{digits}f}'
  return text if deviation is None else f'{text} ± {deviation:.{digits}f}'


def collect(values: Mapping[str, Any], table: table_lib.Table) -> str:
  """Writes table.md, table.csv and the figures; returns the Markdown."""
  sweep_dir = run_lib.sweep_dir_of(values)
  if not os.path.isdir(sweep_dir):
    raise ValueError(f'`sweep_dir` (={sweep_dir!r}) must be a folder in which '
                     'launch.run has run this table.')
  measured = measure(table, sweep_dir, run_lib.seeds_of(values))
  kept = table_lib.chosen(table.points, values['rows'])
  shown = [each['point'] in kept for each in measured]
  text = markdown(table, [each for each, show in zip(measured, shown) if show],
                  other_flags(measured))
  path = lambda name: os.path.join(values['outdir'] or sweep_dir, name)
  files.write_text(path('table.md'), text)
  for figure in dict.fromkeys((table.figure, *table.also)):
    found = [row for row, show in zip(rows(figure, measured), shown) if show]
    if figure == table.figure:
      reporting.write_csv(path('table.csv'), found)
    if figure is None:
      continue
    plots.lines(
        [row for row in found if figure.metric in ('', row['metric'])],
        path(f'{figure.name}.png'), table.title, xlabel=figure.xlabel,
        ylabel=figure.ylabel, scale=figure.scale,
        # Of another network, they would leave no room for ours.
        published=values['scale'] == 'paper')
  return text


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
