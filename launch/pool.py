"""Cells as processes of this machine: a few at a time, each never twice.

A cell's lock is a file that flock holds. The process of the cell inherits the
open file, so the lock lives exactly as long as that process: not shorter, if
the runner is killed, and not longer, if the machine goes down. Over NFS flock
reaches other hosts where the mount has locks (not `nolock`), over Lustre with
`-o flock`; storage buckets mounted as folders have none: start the cells of
one sweep there from one machine.
"""

import collections
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import os
import signal
import subprocess
import sys
import time
from typing import Any
from typing import NamedTuple
from typing import TextIO

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


class Outcome(NamedTuple):
  """Names of cells, each in one place."""

  finished: tuple[str, ...]
  failed: tuple[str, ...]
  left: tuple[str, ...]  # Not done, since the runner was asked to stop.


class _Child(NamedTuple):
  job: Job
  process: subprocess.Popen
  begin: float


def run(jobs: Sequence[Job], *, workers: int, retries: int,
        environment: Callable[[int], Mapping[str, str]] = lambda worker: {},
        stream: TextIO | None = None, wait: float = .1) -> Outcome:
  """Runs what is not finished, until all is finished, failed or stopped.

  A cell that fails goes to the end of the queue, `retries` times; one that
  leaves with status 75 too, without counting. One that another process runs
  is waited for, as is one that leaves with status 76 since its host runs it
  already. SIGTERM or SIGINT is handed on as SIGTERM; then no cell
  starts, and this returns when all have left. A second one kills them.

  Args:
    jobs: the cells, in the order to start them.
    workers: how many run at once.
    retries: how often a cell may fail and be started again.
    environment: variables for the processes of a worker.
    stream: for the lines of progress; standard output if None.
    wait: seconds between two looks at the processes.
  """
  pool = _Pool(workers, retries, environment, stream or sys.stdout)
  pool.queue.extend(jobs)
  pool.total = len(jobs)
  with _signals(pool.stop):
    while pool.running or (pool.queue and not pool.stopping):
      pool.settle()
      pool.fill()
      time.sleep(wait)
  return Outcome(tuple(pool.finished), tuple(pool.failed),
                 tuple(job.name for job in pool.queue))


@contextlib.contextmanager
def _signals(handler):
  numbers = (signal.SIGTERM, signal.SIGINT)
  previous = [signal.signal(number, handler) for number in numbers]
  try:
    yield
  finally:
    for number, old in zip(numbers, previous):
      signal.signal(number, old)


class _Pool:
  """The queue, what runs, and what became of the rest."""

  def __init__(self, workers, retries, environment, stream):
    self.queue: collections.deque[Job] = collections.deque()
    self.running: dict[int, _Child] = {}
    self.finished: list[str] = []
    self.failed: list[str] = []
    self.stopping = 0  # Requests so far.
    self.total = 0
    self._workers, self._retries = workers, retries
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
    for child in self.running.values():
      with contextlib.suppress(ProcessLookupError):
        os.killpg(child.process.pid, number)

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
    for worker, child in list(self.running.items()):
      if child.process.poll() is not None:
        del self.running[worker]
        self._ended(child)

  def _start(self, job: Job, worker: int) -> None:
    if job.is_finished():
      self._done(job, 'was finished')
      return
    try:
      lock = locking.acquire(job.lock_path)
    except locking.Held as owner:
      self.queue.append(job)
      if job.name not in self._waited:
        self._waited.add(job.name)
        self._say(f'waits for {job.name}: {owner} runs it')
      return
    try:
      if job.is_finished():  # By who held the lock until now.
        self._done(job, 'was finished')
        return
      self.running[worker] = self._process(job, worker, lock)
    finally:
      os.close(lock)  # The cell's own copy holds it from now on.
    self._say(f'started {job.name}')

  def _process(self, job, worker, lock) -> _Child:
    os.makedirs(os.path.dirname(job.log_path), exist_ok=True)
    with open(job.log_path, 'ab') as log:
      # A session of its own: Ctrl-C reaches the runner alone, which then asks
      # the cells to save.
      process = subprocess.Popen(
          job.command(worker), stdin=subprocess.DEVNULL, stdout=log,
          stderr=subprocess.STDOUT, pass_fds=[lock],
          start_new_session=True,
          env={**os.environ, **self._environment(worker)})
    return _Child(job, process, time.monotonic())

  def _ended(self, child: _Child) -> None:
    job, code = child.job, child.process.returncode
    if code == 0 and job.is_finished():
      self._seconds.append(time.monotonic() - child.begin)
      self._done(job, 'finished')
    elif code == locking.EXIT_CODE:
      self._due[job.name] = time.monotonic() + PAUSE
      self._again(job, 'runs elsewhere already')
    elif code == REQUEUE_EXIT_CODE and (
        self._requeues[job.name] < backends.MAX_REQUEUES):
      self._requeues[job.name] += 1
      self._again(job, 'stopped before its end')
    elif self.stopping:
      self._again(job, f'left with status {code}')
    else:
      self._failed(job, f'status {code}' if code else 'no result of its flags')

  def _failed(self, job: Job, why: str) -> None:
    self._failures[job.name] += 1
    why = f'failed ({why}; see {job.log_path})'
    if self._failures[job.name] <= self._retries:
      self._again(job, why)
    else:
      self.failed.append(job.name)
      self._say(f'{job.name} {why}')

  def _again(self, job: Job, why: str) -> None:
    self.queue.append(job)
    self._say(f'{job.name} {why}')

  def _done(self, job: Job, how: str) -> None:
    self.finished.append(job.name)
    self._say(f'{job.name} {how}')

  def _say(self, what: str) -> None:
    """A line of progress: counts, time to go, what happened."""
    left = len(self.queue) + len(self.running)
    line = (f'{len(self.finished)} of {self.total} finished, '
            f'{len(self.running)} running, {len(self.failed)} failed')
    if self._seconds and left:
      mean = sum(self._seconds) / len(self._seconds)
      line += f', {mean * left / self._workers / 60:.1f} min to go'
    print(f'{line}: {what}', file=self._stream, flush=True)
