"""Cells as processes of this machine: a few at a time, each never twice.

A cell's lock is a file that flock holds. The process of the cell inherits the
open file, so the lock lives exactly as long as that process: not shorter, if
the runner is killed, and not longer, if the machine goes down. Over NFS flock
reaches other hosts where the mount has locks (not `nolock`), over Lustre with
`-o flock`; storage buckets mounted as folders have none: start the cells of
one sweep there from one machine.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
import contextlib
import os
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple, TextIO

from experiments import locking
from launch import backends

# What a stopped run leaves with, EX_TEMPFAIL: start it again.
REQUEUE_EXIT_CODE = 75
# Seconds until a host that runs a cell already is asked again.
PAUSE = 60.


class Job(NamedTuple):
  """One cell."""

  name: str
  command: Callable[[int], Sequence[str]]  # Of the number of the worker.
  is_finished: Callable[[], bool]
  lock_path: str
  log_path: str


def run(jobs: Sequence[Job], *, workers: int, retries: int,
        environment: Callable[[int], Mapping[str, str]] = lambda worker: {},
        stream: TextIO | None = None, wait: float = .1) -> int:
  """Runs what is not finished, until all is finished, failed or stopped.

  A cell that fails goes to the end of the queue, `retries` times; one that
  leaves with status 75 too, without counting. One that another process runs is
  waited for, as is one that leaves with status 76 since its host runs it
  already. SIGTERM or SIGINT is handed on as SIGTERM; then no cell starts, and
  this returns when all have left. A second one kills them.

  `environment` gives variables for the processes of a worker, `wait` seconds
  between two looks at them. Returns the status of the runner: 0, 1 if a cell
  failed, 75 if it was asked to stop with some left.
  """
  pool = _Pool(jobs, workers, retries, environment, stream or sys.stdout)
  numbers = (signal.SIGTERM, signal.SIGINT)
  before = [signal.signal(number, pool.stop) for number in numbers]
  try:
    while pool.running or (pool.queue and not pool.stopping):
      pool.settle()
      pool.fill()
      time.sleep(wait)
  finally:
    for number, handler in zip(numbers, before):
      signal.signal(number, handler)
  return REQUEUE_EXIT_CODE if pool.queue else int(bool(pool.failed))


class _Pool:
  """The queue, what runs, and what became of the rest."""

  def __init__(self, jobs, workers, retries, environment, stream):
    self.queue = collections.deque(jobs)
    # The cell, its process and when it began, by worker.
    self.running: dict[int, tuple[Job, subprocess.Popen, float]] = {}
    self.finished: list[str] = []
    self.failed: list[str] = []
    self.stopping = 0  # Requests so far.
    self._total, self._workers, self._retries = len(jobs), workers, retries
    self._environment, self._stream = environment, stream
    self._failures = collections.Counter()
    self._requeues = collections.Counter()
    self._due: dict[str, float] = {}  # Not to be started before.
    self._waited: set[str] = set()
    self._seconds: list[float] = []

  def stop(self, unused_number: int, unused_frame: Any) -> None:
    """Asks every cell to save and leave; asked again, kills them."""
    self.stopping += 1
    number = signal.SIGTERM if self.stopping == 1 else signal.SIGKILL
    for _, process, _ in self.running.values():
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)

  def fill(self) -> None:
    """Starts cells on idle workers; one that is locked goes to the end."""
    for _ in range(len(self.queue)):
      idle = set(range(self._workers)) - self.running.keys()
      if self.stopping or not idle:
        return
      job = self.queue.popleft()
      if self._due.get(job.name, 0.) > time.monotonic():
        self.queue.append(job)
      else:
        self._start(job, min(idle))

  def settle(self) -> None:
    """Notes the cells that have ended."""
    for worker, (job, process, begin) in list(self.running.items()):
      if process.poll() is not None:
        del self.running[worker]
        self._ended(job, process.returncode, time.monotonic() - begin)

  def _start(self, job: Job, worker: int) -> None:
    try:
      lock = locking.acquire(job.lock_path)
    except locking.Held as owner:
      self.queue.append(job)
      if job.name not in self._waited:
        self._waited.add(job.name)
        self._say(f'waits for {job.name}: {owner} runs it')
      return
    try:
      if job.is_finished():  # Perhaps by who held the lock until now.
        self.finished.append(job.name)
        self._say(f'{job.name} was finished')
        return
      os.makedirs(os.path.dirname(job.log_path), exist_ok=True)
      with open(job.log_path, 'ab') as log:
        # A session of its own: Ctrl-C reaches the runner alone, which then
        # asks the cells to save.
        process = subprocess.Popen(
            job.command(worker), stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, pass_fds=[lock], start_new_session=True,
            env={**os.environ, **self._environment(worker)})
    finally:
      os.close(lock)  # The cell's own copy holds it from now on.
    self.running[worker] = job, process, time.monotonic()
    self._say(f'started {job.name}')

  def _ended(self, job: Job, code: int, seconds: float) -> None:
    group = self.queue  # Where it goes: to be started again, if not said else.
    if code == 0 and job.is_finished():
      self._seconds.append(seconds)
      group, what = self.finished, 'finished'
    elif code == locking.EXIT_CODE:
      self._due[job.name] = time.monotonic() + PAUSE
      what = 'runs elsewhere already'
    elif code == REQUEUE_EXIT_CODE and (
        self._requeues[job.name] < backends.MAX_REQUEUES):
      self._requeues[job.name] += 1
      what = 'stopped before its end'
    elif self.stopping:
      what = f'left with status {code}'
    else:
      self._failures[job.name] += 1
      why = f'status {code}' if code else 'no result of its flags'
      what = f'failed ({why}; see {job.log_path})'
      if self._failures[job.name] > self._retries:
        group = self.failed
    group.append(job if group is self.queue else job.name)
    self._say(f'{job.name} {what}')

  def _say(self, what: str) -> None:
    """A line of progress: counts, time to go, what happened."""
    left = len(self.queue) + len(self.running)
    line = (f'{len(self.finished)} of {self._total} finished, '
            f'{len(self.running)} running, {len(self.failed)} failed')
    if self._seconds and left:
      mean = sum(self._seconds) / len(self._seconds)
      line += f', {mean * left / self._workers / 60:.1f} min to go'
    print(f'{line}: {what}', file=self._stream, flush=True)
