"""What a run writes down: metrics by step, a progress line, results, tables.

A row of metrics belongs to the step that made it, counted from 1, as a
checkpoint named N is the state after step N. A run that resumes from
checkpoint N therefore starts at step N + 1 and drops the rows from there on:

  writers = reporting.open_writers(workdir, start_step=start + 1)
  progress = reporting.Progress(train_steps, steps_done=start)
  for step in range(start + 1, train_steps + 1):
    ...
    writers.write_scalars(step, {'train_loss': loss})
    progress.update(step, loss=loss)
"""

from collections.abc import Callable, Mapping, Sequence
import csv
import io
import json
import math
import os
import pathlib
import sys
import time
from typing import Any, TextIO

from absl import logging
import jax
import numpy as np

from experiments import files


class JsonlWriter:
  """Appends scalars to a file, one JSON object a line, from `start_step` on.

  A line holds the step, the time in seconds since 1970, and the scalars;
  an infinite or undefined one as null, which is what JSON has for it. Lines of
  `start_step` and later are dropped first, and a last one that was cut short.

  Law: a run killed at any moment and resumed at `start_step` leaves the lines
  of an unbroken run, the times aside.
  """

  def __init__(self, path: str | os.PathLike, start_step: int = 0):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _drop_lines(path, start_step)
    self._file = path.open('a', buffering=1, encoding='utf-8')

  def write_scalars(self, step: int, scalars: Mapping[str, float]):
    row = {'step': int(step), 'time': round(time.time(), 3)}
    for name, value in scalars.items():
      row[name] = _as_number(name, value)
    with files.naming(self._file.name):
      self._file.write(json.dumps(row, allow_nan=False) + '\n')

  def close(self):
    with files.naming(self._file.name):
      self._file.close()


class TensorBoardWriter:
  """Writes TensorBoard event files, without TensorFlow.

  A resumed run adds a file to the folder, and TensorBoard is told to forget
  what earlier files say of `start_step` and later.
  """

  def __init__(self, logdir: str | os.PathLike, start_step: int = 0):
    from tensorboard.compat.proto import event_pb2
    from tensorboard.compat.proto import summary_pb2
    from tensorboard.summary.writer import event_file_writer
    self._event = event_pb2.Event
    self._summary = summary_pb2.Summary
    self._logdir = os.fspath(logdir)
    with files.naming(self._logdir):
      self._writer = event_file_writer.EventFileWriter(self._logdir)
    self._add(start_step, session_log=event_pb2.SessionLog(
        status=event_pb2.SessionLog.START))

  def write_scalars(self, step: int, scalars: Mapping[str, float]):
    self._add(step, summary=self._summary(value=[
        self._summary.Value(tag=name, simple_value=float(value))
        for name, value in scalars.items()]))

  def close(self):
    with files.naming(self._logdir):
      self._writer.close()

  def _add(self, step, **what):
    with files.naming(self._logdir):
      self._writer.add_event(self._event(wall_time=time.time(), step=int(step),
                                         **what))


class Writers:
  """Writes everything to each of several writers; a context manager."""

  def __init__(self, writers: Sequence[JsonlWriter | TensorBoardWriter]):
    self._writers = tuple(writers)

  def __enter__(self) -> 'Writers':
    return self

  def __exit__(self, *exc_info):
    self.close()

  def write_scalars(self, step: int, scalars: Mapping[str, float]):
    for writer in self._writers:
      writer.write_scalars(step, scalars)

  def close(self):
    for writer in self._writers:
      writer.close()


def open_writers(workdir: str | os.PathLike, start_step: int = 0) -> Writers:
  """Opens `metrics.jsonl` in a folder and, if installed, TensorBoard files.

  They lie in `tensorboard` in it. In every process but the first there are no
  writers at all, which is no error to write to.
  """
  if jax.process_index() != 0:
    return Writers(())
  workdir = pathlib.Path(workdir)
  writers = [JsonlWriter(workdir / 'metrics.jsonl', start_step)]
  try:
    writers.append(TensorBoardWriter(workdir / 'tensorboard', start_step))
  except ImportError:
    logging.info('tensorboard is not installed: metrics go to JSON lines only')
  return Writers(writers)


class Progress:
  """Shows how far a run is: a bar on a terminal, else a line now and then.

  Rates count this session's steps only, from the end of its first, which is
  the one that compiles. Nothing is shown by any process but the first.

  Args:
    total_steps: steps of the whole run.
    steps_done: steps done before this session.
    log_every: steps between lines where there is no terminal; at least 1.
    batch_size: units in a step over all processes; None shows no such rate.
    unit: what they are called, in the plural.
    stream: where to show it; standard error if None.
    clock: seconds now.
  """

  def __init__(self, total_steps: int, steps_done: int = 0,
               log_every: int = 100, batch_size: int | None = None,
               unit: str = 'examples',
               stream: TextIO | None = None,
               clock: Callable[[], float] = time.monotonic):
    if log_every < 1:
      raise ValueError(f'log_every (={log_every}) must be at least 1')
    self._total, self._log_every = total_steps, log_every
    self._batch_size, self._unit, self._clock = batch_size, unit, clock
    self._stream = stream or sys.stderr
    self._step, self._time = steps_done, clock()
    self._first = self._step, self._time
    self._begun = False
    self._shown = jax.process_index() == 0
    self._bar = self._open_bar() if self._shown else None

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *exc_info):
    self.close()

  def update(self, step: int, **values: float):
    """Notes that `step` steps are done; `values` are shown beside them."""
    self._step, self._time = step, self._clock()
    line = self.describe(values)
    if not self._begun:
      self._first, self._begun = (self._step, self._time), True
    if self._bar is not None:
      self._bar.set_postfix_str(_values_text(values), refresh=False)
      self._bar.update(step - self._bar.n)
    elif self._shown and (step % self._log_every == 0 or step == self._total):
      print(line, file=self._stream, flush=True)

  def steps_per_second(self) -> float:
    """The rate so far; nan before there is one."""
    seconds = self._time - self._first[1]
    return (self._step - self._first[0]) / seconds if seconds else math.nan

  def describe(self, values: Mapping[str, float] | None = None) -> str:
    """The line: steps, share, rates, time to go, then `values`."""
    rate = self.steps_per_second()
    parts = [f'step {self._step}/{self._total}',
             f'{self._step / max(1, self._total):4.0%}',
             f'{_short(rate)} steps/s']
    if self._batch_size is not None:
      parts.append(f'{_short(rate * self._batch_size)} {self._unit}/s')
    left = (self._total - self._step) / rate if rate else math.nan
    parts += [f'eta {_clock_text(left)}', _values_text(values or {})]
    return '  '.join(part for part in parts if part)

  def close(self):
    """Leaves the last state of the bar on the terminal."""
    if self._bar is not None:
      self._bar.close()
      self._bar = None

  def _open_bar(self):
    if not getattr(self._stream, 'isatty', lambda: False)():
      return None
    try:
      import tqdm
    except ImportError:
      return None
    # Tqdm's own rate counts from `initial`. Its rate is a moving average.
    return tqdm.tqdm(total=self._total, initial=self._step, file=self._stream,
                     dynamic_ncols=True, unit='step')


def write_json(path: str | os.PathLike, value: Any):
  """Writes a JSON file, whole or not at all.

  Numbers may be NumPy's and JAX's; infinite or undefined ones become null.
  """
  text = json.dumps(_as_json(value), indent=2, allow_nan=False) + '\n'
  files.write_text(path, text)


def write_csv(path: str | os.PathLike, rows: Sequence[Mapping[str, Any]]):
  """Writes rows of the same names as a CSV file, whole or not at all."""
  text = io.StringIO()
  writer = csv.DictWriter(text, rows[0], lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)
  files.write_text(path, text.getvalue())


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Reads the rows of a JSON lines file.

  Law: the rows are those that JsonlWriter was given, with step and time, an
  infinite number having become nan. A last line cut short is left out; any
  other that is no JSON object is a ValueError that names it.
  """
  rows = _parse_lines(pathlib.Path(path))
  return [{name: math.nan if value is None else value
           for name, value in row.items()} for _, row in rows]


def markdown_table(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None,
    formats: Mapping[str, str | Callable[[Any], str]] | None = None) -> str:
  """Makes a Markdown table that also reads well in a terminal.

  Args:
    rows: a dict for each row; a value that is absent or None is left blank.
    columns: which to show, in order; None is all, in order of appearance.
    formats: for a column, a format specification such as '.2f', or a function
      that gives the text. Columns of numbers are aligned to the right.

  Raises:
    ValueError: if `formats` has a column that is not shown.

  Example:
    >>> rows = [{'method': 'rigl', 'accuracy': 74.63},
    ...         {'method': 'top_kast', 'accuracy': 75.0}]
    >>> print(markdown_table(rows, formats={'accuracy': '.1f'}), end='')
    | method   | accuracy |
    |:---------|---------:|
    | rigl     |     74.6 |
    | top_kast |     75.0 |
  """
  if columns is None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
  formats = formats or {}
  if unknown := sorted(set(formats) - set(columns)):
    raise ValueError(f'formats (={unknown}) must be among columns (={columns})')
  shown = [_column(name, rows, formats.get(name, '')) for name in columns]
  return ''.join(f'|{"|".join(cells)}|\n' for cells in zip(*shown))


def _column(name, rows, format_spec):
  """The cells of one column, padded: head, rule, body."""
  values = [row.get(name) for row in rows]
  right = _all_numbers(values)
  texts = [_cell(name, '')] + [_cell(value, format_spec) for value in values]
  width = max(3, *map(len, texts))
  pad = str.rjust if right else str.ljust
  head, *body = [f' {pad(text, width)} ' for text in texts]
  rule = '-' * (width + 1)
  return [head, f'{rule}:' if right else f':{rule}', *body]


def _all_numbers(values):
  kinds = {isinstance(value, (int, float, np.number)) for value in values
           if value is not None}
  return kinds == {True}


def _cell(value, format_spec):
  if value is None:
    return ''
  text = (format_spec(value) if callable(format_spec)
          else format(value, format_spec))
  return text.replace('|', '\\|').replace('\n', ' ')


def _as_number(name, value):
  """A Python number of a scalar, None if it is not finite."""
  if isinstance(value, (np.generic, np.ndarray, jax.Array)) and value.size == 1:
    value = value.item()
  if not isinstance(value, (int, float)):
    raise ValueError(f'scalar {name} (={value!r}) must be a number')
  return value if math.isfinite(value) else None


def _as_json(value):
  if isinstance(value, Mapping):
    return {str(name): _as_json(item) for name, item in value.items()}
  if isinstance(value, (np.generic, np.ndarray, jax.Array)):
    return _as_json(np.asarray(value).tolist())
  if isinstance(value, (list, tuple)):
    return [_as_json(item) for item in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _parse_lines(path) -> list[tuple[str, dict[str, Any]]]:
  """The lines that hold a row, each with its row."""
  lines = path.read_text(encoding='utf-8', errors='replace').splitlines()
  rows = []
  for number, line in enumerate(lines, start=1):
    try:
      row = json.loads(line)
      if not isinstance(row, dict):
        raise ValueError('not an object')
    except ValueError as error:
      if number == len(lines):
        break
      raise ValueError(f'{path} line {number} (={line[:60]!r}) is not a row: '
                       f'{error}') from error
    rows.append((line, row))
  return rows


def _drop_lines(path, start_step):
  """Rewrites a JSON lines file without rows from `start_step` on, if any."""
  if not path.exists():
    return
  kept = [line for line, row in _parse_lines(path)
          if row.get('step', -1) < start_step]
  text = ''.join(line + '\n' for line in kept)
  if text.encode() != path.read_bytes():
    files.write_text(path, text)


def _values_text(values: Mapping[str, float]) -> str:
  return '  '.join(f'{name} {_short(value)}' for name, value in values.items())


def _short(value) -> str:
  """Three or four digits, never in scientific notation where it is large."""
  value = float(value)
  return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.4g}'


def _clock_text(seconds: float) -> str:
  if not math.isfinite(seconds):
    return '?'
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours}:{minutes:02}:{seconds:02}'
  return f'{minutes}:{seconds:02}'
