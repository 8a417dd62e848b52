"""What a run writes down: metrics by step, a bar of progress, results, tables.

A row of metrics belongs to the step that made it, counted from 1, as a
checkpoint named N is the state after step N. A run that resumes from
checkpoint N therefore starts at step N + 1 and drops the rows from there on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import csv
import io
import json
import logging as std_logging
import math
import os
import pathlib
import sys
import time
from typing import Any

from absl import logging
import jax
import numpy as np

from experiments import files

# It speaks at INFO, where others (Orbax) say too much to be heard.
_PROGRESS = std_logging.getLogger(__name__)
_PROGRESS.setLevel(std_logging.INFO)


class JsonlWriter:
  """Appends scalars to a file, one JSON object a line, from `start_step` on.

  A line holds the step, the time in seconds since 1970, and the scalars, null
  if not finite. Lines of `start_step` and later go first, and one cut short.

  Law: a run killed at any moment and resumed at `start_step` leaves the lines
  of an unbroken run, the times aside.
  """

  def __init__(self, path: str | os.PathLike, start_step: int = 0):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
      kept = ''.join(line + '\n' for line, row in _parse_lines(path)
                     if row.get('step', -1) < start_step)
      if kept.encode() != path.read_bytes():
        files.write_text(path, kept)
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


@contextlib.contextmanager
def open_writers(workdir: str | os.PathLike, start_step: int = 0
                 ) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
  """Opens `metrics.jsonl` in a folder and, if installed, TensorBoard files.

  These lie in `tensorboard` in it. Gives a function of a step and scalars, of
  which only that of the first process writes.
  """
  workdir, writers = pathlib.Path(workdir), []
  with contextlib.ExitStack() as stack:
    if jax.process_index() == 0:
      writers.append(JsonlWriter(workdir / 'metrics.jsonl', start_step))
      stack.callback(writers[0].close)
      try:
        writers.append(TensorBoardWriter(workdir / 'tensorboard', start_step))
        stack.callback(writers[1].close)
      except ImportError:
        logging.info('tensorboard is not installed: metrics go to JSON lines')

    def write(step, scalars):
      for writer in writers:
        writer.write_scalars(step, scalars)

    yield write


class _Log:
  """A file for tqdm: what it would draw anew becomes a line of the log."""

  def write(self, text: str):
    if text.strip() and '? left' not in text:  # Before the first step.
      _PROGRESS.info(text.strip())

  def flush(self):
    pass


def progress(total: int | None, done: int = 0):
  """tqdm's bar of steps; where there is no terminal, a line a minute."""
  import tqdm
  how = {'dynamic_ncols': True, 'mininterval': .2} if sys.stderr.isatty() else {
      'file': _Log(), 'mininterval': 60., 'maxinterval': 60., 'miniters': 1,
      'bar_format': 'step {n} of {total} ({percentage:.0f}%), {rate_fmt}, '
                    '{remaining} left{postfix}'}
  return tqdm.tqdm(total=total, initial=done, unit=' steps',
                   disable=jax.process_index() > 0, **how)


def write_json(path: str | os.PathLike, value: Any):
  """Writes a JSON file, whole or not at all.

  Numbers may be NumPy's and JAX's; infinite or undefined ones become null.
  """
  text = json.dumps(value, default=_listed)
  finite = json.loads(text, parse_constant=lambda _: None)
  files.write_text(path, json.dumps(finite, indent=2) + '\n')


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
  return [{name: math.nan if value is None else value
           for name, value in row.items()}
          for _, row in _parse_lines(pathlib.Path(path))]


def markdown_table(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None,
    formats: Mapping[str, str | Callable[[Any], str]] | None = None) -> str:
  """Makes a Markdown table that also reads well in a terminal.

  A value that is absent or None is left blank; `columns` None is all, in order
  of appearance. `formats` has for a column, if it is there, a format
  specification or a function that gives the text.

  Example:
    >>> print(markdown_table([{'method': 'rigl', 'accuracy': 74.63}]), end='')
    | method | accuracy |
    |:-------|---------:|
    | rigl   |    74.63 |
  """
  if columns is None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
  formats = formats or {}
  shown = [_column(name, [row.get(name) for row in rows],
                   formats.get(name, '')) for name in columns]
  return ''.join(f'|{"|".join(cells)}|\n' for cells in zip(*shown))


def _column(name, values, how):
  """The cells of one column, padded: head, rule, body."""
  there = [value for value in values if value is not None]
  right = bool(there) and all(isinstance(value, (int, float, np.number))
                              for value in there)
  write = how if callable(how) else lambda value: format(value, how)
  texts = [text.replace('|', '\\|').replace('\n', ' ') for text in (
      name, *('' if value is None else write(value) for value in values))]
  width = max(3, *map(len, texts))
  head, *body = [f' {text:{">" if right else "<"}{width}} ' for text in texts]
  rule = '-' * (width + 1)
  return [head, f'{rule}:' if right else f':{rule}', *body]


def _as_number(name, value):
  """A Python number of a scalar, None if it is not finite."""
  value = np.asarray(value)
  if value.size != 1 or not isinstance(value.item(), (int, float)):
    raise ValueError(f'scalar {name} (={value!r}) must be a number')
  return value.item() if math.isfinite(value.item()) else None


def _listed(value):
  """An array or a scalar as JSON knows it."""
  if not isinstance(value, (np.generic, np.ndarray, jax.Array)):
    raise TypeError(f'{value!r} must be an array.')
  return np.asarray(value).tolist()


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
