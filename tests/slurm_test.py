"""A table on a real Slurm: preempted, lost, started twice, of two processes.

Skipped where Slurm is not installed; `apt-get install slurm-wlm munge` brings
it, and launch/local_slurm.sh starts it.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from unittest import mock

from absl import flags
from absl.testing import absltest

from launch import run
from launch import table as table_lib

_ROOT = pathlib.Path(__file__).parents[1]
_SCRIPT = _ROOT / 'launch' / 'local_slurm.sh'
_PATIENCE = 150  # Seconds.
_FLAGS = {'sparsity': .5, 'width': .05, 'train_steps': 20, 'log_every': 10,
          'eval_every': 20, 'weight_decay': 0.}
# One that goes on until it has been disturbed twice.
_LONG = {'method': 'static', 'train_steps': 16000, 'log_every': 50,
         'eval_every': 16000, 'checkpoint_every': 4000}


def _path():
  return f'{os.environ["PATH"]}:/usr/sbin:/sbin'


def setUpModule():
  for name in ('sbatch', 'slurmctld', 'slurmd', 'munged', 'flock'):
    if shutil.which(name, path=_path()) is None:
      raise absltest.SkipTest(f'{name} is not installed.')


def _table(name, points):
  return table_lib.Table(name, name, tuple(
      table_lib.Point(row, 'accuracy', None, _FLAGS | changes)
      for row, changes in points.items()))


class SlurmTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    folder = self.enterContext(tempfile.TemporaryDirectory())
    self.cluster = os.path.join(folder, 'cluster')
    self.sweep = os.path.join(folder, 'sweep of 2026-11-28 12:00 "$(date)" %j')
    os.makedirs(self.sweep)
    self.enterContext(mock.patch.dict(os.environ, {
        'SLURM_CONF': os.path.join(self.cluster, 'slurm.conf'),
        'PYTHONPATH': str(_ROOT), 'JAX_PLATFORMS': 'cpu'}))
    subprocess.run([_SCRIPT, 'start', self.cluster], check=True)
    self.addCleanup(subprocess.run, [_SCRIPT, 'stop', self.cluster])
    self.addCleanup(self.command, 'scancel', '--user=' + str(os.getuid()))

  def command(self, *words):
    return subprocess.run(words, capture_output=True, text=True,
                          check=True).stdout

  def submit(self, table, **changes):
    values = flags.FlagValues()
    run.define_flags(values)
    values(['run'])
    values = values.flag_values_dict() | {
        'backend': 'slurm', 'sweep_dir': self.sweep, 'table': 'table',
        'python': sys.executable} | changes
    self.assertEqual(run.run(values, table), 0)

  def path(self, cell, *names):
    return pathlib.Path(self.sweep, 'cells', f'{cell}_accuracy_seed0', *names)

  def logs(self):
    return '\n'.join(path.read_text() for path in sorted(
        pathlib.Path(self.sweep, 'logs').glob('slurm_*.log')))

  def wait(self, condition):
    end = time.monotonic() + _PATIENCE
    while not condition():
      self.assertLess(time.monotonic(), end, self.command('squeue') + self.logs(
          ))
      time.sleep(.2)

  def steps(self, cell):
    """Of the rows that a cell has written."""
    try:
      lines = self.path(cell, 'metrics.jsonl').read_text().splitlines()
    except FileNotFoundError:
      return []
    return [json.loads(line)['step'] for line in lines if line.endswith('}')]

  def goes_on(self, cell, after):
    return bool(self.steps(cell)) and self.steps(cell)[-1] > after

  def assert_finished(self, cell, steps):
    result = json.loads(self.path(cell, 'result.json').read_text())
    self.assertEqual(result['steps'], steps)
    self.assertEqual(self.steps(cell), sorted(set(self.steps(cell))))

  def test_a_table(self):
    table = _table('table', {'long': _LONG, 'short': {'method': 'set'}})
    self.submit(table, workers=2, sbatch=['--comment=a "b" $(c)'])
    self.wait(lambda: self.goes_on('long', 0))
    with self.subTest('a preempted cell saves, is requeued and goes on'):
      self.command('scancel', '--signal=TERM', '1_0')
      self.wait(lambda: 'Stopped by request' in self.logs())
      stopped = self.steps('long')[-1]
      self.wait(lambda: self.goes_on('long', stopped))
      self.assertRegex(self.logs(), 'continues .*long_accuracy_seed0 after')
    with self.subTest('so does one whose node is lost'):
      host, lost = os.uname().nodename.partition('.')[0], self.steps('long')[-1]
      self.command('scontrol', 'update', f'nodename={host}', 'state=down',
                   'reason=test')
      # Refused as long as the node's jobs are being requeued.
      self.wait(lambda: not subprocess.run(
          ('scontrol', 'update', f'nodename={host}', 'state=resume'),
          capture_output=True).returncode)
      self.wait(lambda: self.logs().count('continues ') == 2)
      self.wait(lambda: self.goes_on('long', lost))
    with self.subTest('a second runner leaves a cell that runs alone'):
      self.submit(table, workers=2)
      self.wait(lambda: 'long_accuracy_seed0 runs elsewhere' in self.logs())
    self.wait(lambda: not self.command('squeue', '--noheader'))
    self.assert_finished('long', _LONG['train_steps'])
    self.assert_finished('short', 20)

  def test_a_cell_of_two_processes(self):
    self.submit(_table('hosts', {'both': {'method': 'static'}}), tasks=2)
    self.wait(lambda: not self.command('squeue', '--noheader'))
    self.assertTrue(self.path('both', 'result.json').exists(), self.logs())
    self.assert_finished('both', 20)
    self.assertEqual(self.logs().count('test accuracy'), 1)


if __name__ == '__main__':
  absltest.main()
