"""What a run survives: each fault ends in the run that had none, bit for bit.

A fault that it does not survive by itself ends it with a clear message, the
right status and a checkpoint from before. SIGTERM and single kills are in
experiments_test.py, damage to every file of a checkpoint in
checkpointing_test.py.
"""

import os
import pathlib
import resource
import shutil
import socket
import tempfile
import time
from unittest import mock

from absl import logging
from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp

from experiments import devices
from experiments import report
from experiments import tasks
from experiments.benchmarks import soak
from experiments.image import train
from tests import fast_compiler

_SETTINGS = {**fast_compiler.SETTINGS, 'jax_num_cpu_devices': 1}
# The status of a process that lost another: JAX aborts it, or it does itself.
_LOST = -6


def setUpModule():
  fast_compiler.use()


def tearDownModule():
  fast_compiler.leave()


def _values(**changes):
  values = train.run_config()
  return values | {'width': .1, 'method': 'set', 'update_every': 4,
                   'train_steps': 20, 'log_every': 5, 'eval_every': 10,
                   'checkpoint_every': 5} | changes


class FaultTest(parameterized.TestCase):
  """Faults between step 15 and step 20, which is the last."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = pathlib.Path(cls.enterClassContext(
        tempfile.TemporaryDirectory()))
    cls.enterClassContext(mock.patch.object(report, 'draw'))
    cls.unbroken = _values(workdir=str(cls.folder / 'unbroken'))
    train.train(cls.unbroken)
    cls.leaves = soak.saved(cls.unbroken)

  def setUp(self):
    super().setUp()
    name = self.id().rpartition('.')[-1]
    self.values = _values(workdir=str(self.folder / name))
    shutil.copytree(self.unbroken['workdir'], self.values['workdir'])
    self.path('result.json').unlink()

  def path(self, *names):
    return pathlib.Path(self.values['workdir'], *names)

  def forget_the_end(self):
    shutil.rmtree(self.path('checkpoints', '20'))

  def assert_continues(self):
    train.train(self.values)
    self.assertEqual(soak.saved(self.values), self.leaves)
    self.assertEqual(soak.rows(self.values), soak.rows(self.unbroken))

  def assert_stops(self, message):
    """Status 2 and a message; nothing after step 15 has been saved."""
    with mock.patch.object(train, 'run_config', return_value=self.values), (
        mock.patch.object(logging, 'error')) as logged:
      with self.assertRaises(SystemExit) as stopped:
        train.main(['train'])
    self.assertEqual(stopped.exception.code, 2)
    text, error = logged.call_args.args
    self.assertRegex(text % error, message)
    self.assertEqual(soak.newest(self.values['workdir']), 15)
    self.assertFalse(self.path('result.json').exists())

  def wait_for_writers(self):
    """Threads of the failed writing would die with their process."""
    left, before, quiet = self.path('checkpoints'), None, 0
    for _ in range(100):
      found = sorted(str(path) for path in left.rglob('*'))
      quiet = quiet + 1 if found == before else 0
      if quiet == 10:
        return
      before = found
      time.sleep(.1)

  def limit_files(self, size):
    """Files that cannot grow stand in for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

  @parameterized.named_parameters(('cut', lambda data: data[:len(data) // 2]),
                                  ('altered', lambda data: b'?' * len(data)))
  def test_damaged_newest_checkpoint(self, damage):
    files = [path for path in self.path('checkpoints', '20').rglob('*')
             if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(damage(largest.read_bytes()))
    self.assert_continues()
    self.assertTrue(self.path('checkpoints', '20.unreadable').exists())

  def test_disk_is_full_when_saving(self):
    self.forget_the_end()
    lift = self.limit_files(6000)
    try:
      self.assert_stops(f'{self.path("checkpoints")}.*step 20.*too large')
    finally:
      lift()
    self.wait_for_writers()
    self.assert_continues()

  def test_disk_is_full_when_measuring(self):
    self.forget_the_end()
    metrics = self.path('metrics.jsonl')
    rows = metrics.read_bytes()
    lift = self.limit_files(len(rows) - 9)
    try:
      self.assert_stops(f'too large: .*{metrics}')
    finally:
      lift()
    left = metrics.read_bytes()
    self.assertLen(left, len(rows) - 9)
    self.assertFalse(left.endswith(b'\n'))  # A row cut off.
    self.assert_continues()

  def test_nan_out_of_the_last_update(self):
    """It has no loss yet, and must not get into a checkpoint."""
    self.forget_the_end()
    step = tasks.train_step

    def broken(task, state, batch):
      state = step(task, state, batch)
      return state._replace(params=jax.tree.map(
          lambda x: jnp.where(state.step == 20, jnp.nan, x), state.params))
    with mock.patch.object(tasks, 'train_step', broken):
      self.assert_stops('a parameter is not finite.*learning_rate')
    self.assert_continues()


class KillTest(absltest.TestCase):

  def test_short_soak(self):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    values = _values(workdir=folder, train_steps=150, seed=5)
    outcome = soak.soak(values, 3, _SETTINGS)
    self.assertLen(outcome.kills, 3)
    self.assertEmpty(outcome.differences)


class HostsTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.folder = self.enterContext(tempfile.TemporaryDirectory())

  def values(self, name):
    return _values(workdir=os.path.join(self.folder, name), train_steps=60)

  def start(self, values, **changes):
    """Two hosts of one device."""
    with socket.socket() as free:
      free.bind(('localhost', 0))
      address = f'localhost:{free.getsockname()[1]}'
    join = {'distributed': True, 'coordinator': address, 'num_processes': 2}
    hosts = [soak.start({**values, **join, 'process_id': i, **changes},
                        _SETTINGS) for i in range(2)]
    for host in hosts:
      self.addCleanup(host.process.kill)
    return hosts

  def test_one_host_is_lost(self):
    """The first learns of it by its silence, and must end by itself."""
    unbroken, killed = self.values('unbroken'), self.values('killed')
    first, lost = self.start(killed, heartbeat_timeout=10)
    log = pathlib.Path(first.log)
    self.assertTrue(soak.wait(lost, lambda: soak.newest(killed['workdir'])),
                    log.read_text())
    lost.process.kill()
    first.process.join(120)
    self.assertEqual(first.process.exitcode, _LOST, log.read_text())
    self.assertRegex(log.read_text(), 'another (task|one has probably) died')
    self.assertLess(soak.newest(killed['workdir']), 60)
    for host in self.start(killed):
      soak.finish(host)
    self.train_on_two_devices(unbroken)
    self.assertEmpty(list(soak.differences(unbroken, killed)))

  def train_on_two_devices(self, values):
    """In one process; a sum of two numbers has one order."""
    mesh = jax.make_mesh(
        (2, 1), ('data', 'model'), devices=jax.devices()[:2],
        axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with mock.patch.object(devices, 'mesh', lambda *_: mesh), (
        mock.patch.object(report, 'draw')):
      train.train(values)


if __name__ == '__main__':
  absltest.main()
