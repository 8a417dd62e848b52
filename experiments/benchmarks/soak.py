"""Kills a run at random moments, again and again, and compares how it ends.

  python -m experiments.benchmarks.soak --cycles=200

trains once without a break and once killed (kill -9; now and then SIGTERM) and
started again `--cycles` times, then to its end. The last checkpoints must have
the same bits, and metrics.jsonl the same rows, the times aside; else the status
is 1. Flags of experiments.image.train choose the run; both lie in --workdir.
Recorded results: README.md beside this file.

Each life of the run is a process of its own, forked from one that has imported
everything and has not touched a device.
"""

import collections
from collections.abc import Callable, Iterator, Mapping
import contextlib
import multiprocessing
import os
import pathlib
import random
import sys
import time
from typing import Any, NamedTuple

from absl import app
from absl import flags
from absl import logging
import jax
import numpy as np

from experiments import checkpointing
from experiments import reporting
from experiments import training
from experiments.image import train

_CYCLES = flags.DEFINE_integer('cycles', 200, 'How often to kill the run.')

# What a run imports late, and what takes long.
_PRELOAD = ('experiments.image.train', 'matplotlib.pyplot', 'orbax.checkpoint',
            'sklearn.datasets', 'tensorboard.summary.writer.event_file_writer')
# No wait is longer than this many seconds.
_PATIENCE = 600
_TERM_SHARE = .2
# How a life may end, by what it was sent.
_ENDS = {'kill': (-9,), 'terminate': (checkpointing.REQUEUE_EXIT_CODE, -15)}


class Outcome(NamedTuple):
  """What became of the killed run."""

  kills: list[tuple[str, str]]  # 'kill' or 'terminate', what it was doing.
  differences: list[str]  # Paths of leaves, 'metrics.jsonl'.


def soak(values: Mapping[str, Any], cycles: int,
         settings: Mapping[str, Any] | None = None) -> Outcome:
  """Kills a run `cycles` times and compares it with one that is not killed.

  `values` are the run's flags, `workdir` where both lie, `settings` JAX's own
  in their processes. A RuntimeError or TimeoutError names the log of a run that
  ends in another way, or does nothing for too long.
  """
  folder, chance = values['workdir'], random.Random(values['seed'])
  unbroken, killed = ({**values, 'workdir': os.path.join(folder, name)}
                      for name in ('unbroken', 'killed'))
  settings = {  # Every life but the first finds its programs compiled.
      'jax_compilation_cache_dir': os.path.join(folder, 'compiled'),
      'jax_persistent_cache_min_compile_time_secs': 0.,
      'jax_persistent_cache_min_entry_size_bytes': -1, **(settings or {})}
  finish(start(unbroken, settings))
  kills, startup = [], 5.
  for _ in range(cycles):
    how = 'terminate' if chance.random() < _TERM_SHARE else 'kill'
    aim = chance.choice(('starting', 'saving', 'training'))
    delay, begin = chance.random(), time.monotonic()
    life = start(killed, settings)
    if aim == 'starting':
      delay *= startup  # The seconds that a life took to its first save.
    elif wait(life, life.is_saving if aim == 'saving' else life.has_saved):
      startup = time.monotonic() - begin
      delay *= .03 if aim == 'saving' else .5
    life.process.join(delay)
    getattr(life.process, how)()
    life.process.join(_PATIENCE)
    if life.process.exitcode == 0:  # It came to its own end before.
      break
    life.check(_ENDS[how])
    kills.append((how, life.doing()))
  finish(start(killed, settings))
  return Outcome(kills, list(differences(unbroken, killed)))


class Life(NamedTuple):
  """A process that runs, and what the run had left before."""

  process: multiprocessing.Process
  values: Mapping[str, Any]
  newest: int  # The last whole checkpoint, 0 if none.
  unfinished: set  # Checkpoints that earlier lives began to write.
  log: str

  def is_saving(self) -> bool:
    return bool(unfinished(self.values['workdir']) - self.unfinished)

  def has_saved(self) -> bool:
    return newest(self.values['workdir']) > self.newest

  def doing(self) -> str:
    """What a process that is now dead was about."""
    if self.is_saving():
      return 'saving'
    step = newest(self.values['workdir'])
    if not step:
      return 'before the first checkpoint'
    if step == self.values['train_steps']:
      return 'reporting'
    return 'training on' if self.has_saved() else 'starting again'

  def check(self, codes: tuple[int, ...]) -> None:
    code = self.process.exitcode
    if code not in codes:
      raise RuntimeError(f'the run left with status {code}; see {self.log}')


def start(values: Mapping[str, Any], settings: Mapping[str, Any]) -> Life:
  """Starts the run, or goes on with it."""
  context = multiprocessing.get_context('forkserver')
  context.set_forkserver_preload(list(_PRELOAD))
  workdir = values['workdir']
  log = f'{workdir}.log'
  process = context.Process(target=_run, args=(dict(values), settings, log))
  before = newest(workdir), unfinished(workdir)
  os.makedirs(os.path.dirname(log), exist_ok=True)
  process.start()
  return Life(process, values, *before, log)


def _run(values, settings, log):
  with open(log, 'ab') as file:
    os.dup2(file.fileno(), sys.stdout.fileno())
    os.dup2(file.fileno(), sys.stderr.fileno())
  for name, value in settings.items():
    jax.config.update(name, value)
  flags.FLAGS(['train'])
  for name, value in values.items():
    setattr(flags.FLAGS, name, value)
  train.main(['train'])


def finish(life: Life) -> None:
  """Waits until the run has come to its end."""
  wait(life, lambda: False)
  life.check((0,))


def wait(life: Life, condition: Callable[[], Any]) -> bool:
  """Whether it became true while the process was alive."""
  end = time.monotonic() + _PATIENCE
  while not condition():
    if life.process.exitcode is not None:
      return False
    if time.monotonic() > end:
      life.process.kill()
      raise TimeoutError(f'nothing happened for {_PATIENCE} s; see {life.log}')
    time.sleep(.003)
  return True


def newest(workdir: str) -> int:
  """The step of the last whole checkpoint."""
  return max((int(path.name) for path in _checkpoints(workdir)
              if path.name.isdigit()), default=0)


def unfinished(workdir: str) -> set:
  """Which checkpoints are begun and not whole, told apart by their inode."""
  found = set()
  for path in _checkpoints(workdir):
    if 'tmp' in path.name:
      with contextlib.suppress(FileNotFoundError):  # It has become whole.
        found.add((path.name, path.stat().st_ino))
  return found


def _checkpoints(workdir) -> Iterator[pathlib.Path]:
  return pathlib.Path(workdir, 'checkpoints').glob('[0-9]*')


def differences(unbroken, killed) -> Iterator[str]:
  """What two finished runs of the same flags do not have in common."""
  expected, actual = (saved(values) for values in (unbroken, killed))
  for path in sorted(expected.keys() | actual.keys()):
    if expected.get(path) != actual.get(path):
      yield path
  if rows(unbroken) != rows(killed):
    yield 'metrics.jsonl'


def saved(values: Mapping[str, Any]) -> dict[str, bytes]:
  """The bytes of each leaf of the last checkpoint."""
  state = training.last_state(train.prepare(values, values['workdir']))
  leaves = jax.tree_util.tree_leaves_with_path(
      state._replace(key=jax.random.key_data(state.key)))
  return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
          for path, leaf in leaves}


def rows(values: Mapping[str, Any]) -> list[dict[str, Any]]:
  """What metrics.jsonl holds, without the times."""
  found = reporting.read_jsonl(os.path.join(values['workdir'],
                                            'metrics.jsonl'))
  return [{name: value for name, value in row.items() if name != 'time'}
          for row in found]


def main(_):
  # A checkpoint at every tenth step, where flags do not say otherwise.
  small = {'workdir': os.path.join('runs', 'soak'), 'width': .1,
           'train_steps': 20 * _CYCLES.value, 'log_every': 10, 'eval_every': 50,
           'checkpoint_every': 10}
  values = train.run_config() | {name: value for name, value in small.items()
                                 if not flags.FLAGS[name].present}
  logging.set_verbosity(logging.WARNING)  # Orbax logs every file at INFO.
  begin = time.monotonic()
  kills, different = soak(values, _CYCLES.value)
  counts = collections.Counter(kills)
  print(reporting.markdown_table(
      [{'the run was': where, 'kill -9': counts['kill', where],
        'SIGTERM': counts['terminate', where]}
       for where in sorted({where for _, where in kills})]))
  print(f'{len(kills)} kills in {time.monotonic() - begin:.0f} s; different '
        f'from the unbroken run: {", ".join(different) or "nothing"}')
  sys.exit(bool(different))


if __name__ == '__main__':
  app.run(main)
