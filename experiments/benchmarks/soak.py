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
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import multiprocessing
import os
import pathlib
import random
import sys
import time
from typing import Any
from typing import NamedTuple

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


class Kill(NamedTuple):
  """The end of one life."""

  how: str  # 'kill' or 'terminate'.
  where: str  # What the run was doing.


class Outcome(NamedTuple):
  """What became of the killed run."""

  kills: tuple[Kill, ...]
  differences: tuple[str, ...]  # Paths of leaves, 'metrics.jsonl'.


def soak(values: Mapping[str, Any], cycles: int,
         settings: Mapping[str, Any] | None = None) -> Outcome:
  """Kills a run `cycles` times and compares it with one that is not killed.

  Args:
    values: flag values of the run; `workdir` is where both runs lie.
    cycles: how often to kill; fewer if the run comes to its end before.
    settings: of JAX, in the processes of the runs.

  Raises:
    RuntimeError: if the run ends in any other way, naming its log.
    TimeoutError: if it does nothing for too long, likewise.
  """
  folder, chance = values['workdir'], random.Random(values['seed'])
  unbroken, killed = ({**values, 'workdir': os.path.join(folder, name)}
                      for name in ('unbroken', 'killed'))
  settings = cached(folder) | dict(settings or {})
  finish(start(unbroken, settings))
  kills, startup = [], 5.
  for _ in range(cycles):
    kill, startup = live(killed, settings, chance, startup)
    if kill is None:
      break
    kills.append(kill)
  finish(start(killed, settings))
  return Outcome(tuple(kills), tuple(differences(unbroken, killed)))


def cached(folder: str) -> dict[str, Any]:
  """Lets every life but the first find its programs compiled."""
  return {'jax_compilation_cache_dir': os.path.join(folder, 'compiled'),
          'jax_persistent_cache_min_compile_time_secs': 0.,
          'jax_persistent_cache_min_entry_size_bytes': -1}


class Life(NamedTuple):
  """A process that runs, and what the run had left before."""

  process: multiprocessing.Process
  values: Mapping[str, Any]
  newest: int  # The last whole checkpoint, 0 if none.
  unfinished: frozenset  # Checkpoints that earlier lives began to write.
  log: str


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
  _check(life, (0,))


def live(values: Mapping[str, Any], settings: Mapping[str, Any],
         chance: random.Random, startup: float) -> tuple[Kill | None, float]:
  """One life up to its kill, at a random moment of one of three phases.

  `startup` are the seconds from the start of a life to its first save, about.
  Returns the kill, None if the run came to its own end before; and `startup` as
  this life has shown it.
  """
  how = 'terminate' if chance.random() < _TERM_SHARE else 'kill'
  aim = chance.choice(('starting', 'saving', 'training'))
  delay, begin = chance.random(), time.monotonic()
  life = start(values, settings)
  if aim == 'starting':
    delay *= startup
  elif wait(life, {'saving': lambda: unfinished(values['workdir'])
                   - life.unfinished, 'training': lambda: newest(
                       values['workdir']) > life.newest}[aim]):
    startup = time.monotonic() - begin
    delay *= .03 if aim == 'saving' else .5
  life.process.join(delay)
  getattr(life.process, how)()
  life.process.join(_PATIENCE)
  if life.process.exitcode == 0:
    return None, startup
  _check(life, _ENDS[how])
  return Kill(how, doing(life)), startup


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


def doing(life: Life) -> str:
  """What a process that is now dead was about."""
  workdir = life.values['workdir']
  if unfinished(workdir) - life.unfinished:
    return 'saving'
  step = newest(workdir)
  if not step:
    return 'before the first checkpoint'
  if step == life.values['train_steps']:
    return 'reporting'
  return 'training on' if step > life.newest else 'starting again'


def newest(workdir: str) -> int:
  """The step of the last whole checkpoint."""
  return max((int(path.name) for path in _folders(workdir)
              if path.name.isdigit()), default=0)


def unfinished(workdir: str) -> frozenset:
  """Which checkpoints are begun and not whole, told apart by their inode."""
  found = set()
  for path in _folders(workdir):
    try:
      if 'tmp' in path.name:
        found.add((path.name, path.stat().st_ino))
    except FileNotFoundError:  # It has become whole.
      pass
  return frozenset(found)


def _folders(workdir) -> Iterator[pathlib.Path]:
  """What a directory of checkpoints holds, but for config.json."""
  folder = pathlib.Path(workdir, 'checkpoints')
  return (path for path in (folder.iterdir() if folder.exists() else ())
          if path.name[0].isdigit())


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


def _check(life, codes):
  code = life.process.exitcode
  if code not in codes:
    raise RuntimeError(f'the run left with status {code}; see {life.log}')


def small_run(cycles: int) -> dict[str, Any]:
  """What flags are that are not given: a checkpoint at every tenth step."""
  return {'workdir': os.path.join('runs', 'soak'), 'width': .1,
          'train_steps': 20 * cycles, 'log_every': 10, 'eval_every': 50,
          'checkpoint_every': 10}


def main(_):
  values = train.run_config() | {
      name: value for name, value in small_run(_CYCLES.value).items()
      if not flags.FLAGS[name].present}
  logging.set_verbosity(logging.WARNING)  # Orbax logs every file at INFO.
  begin = time.monotonic()
  outcome = soak(values, _CYCLES.value)
  counts = collections.Counter(outcome.kills)
  places = sorted({kill.where for kill in outcome.kills})
  print(reporting.markdown_table(
      [{'the run was': where, 'kill -9': counts[Kill('kill', where)],
        'SIGTERM': counts[Kill('terminate', where)]} for where in places],
      formats={}))
  print(f'{len(outcome.kills)} kills in {time.monotonic() - begin:.0f} s; '
        'different from the unbroken run: '
        f'{", ".join(outcome.differences) or "nothing"}')
  sys.exit(bool(outcome.differences))


if __name__ == '__main__':
  app.run(main)
