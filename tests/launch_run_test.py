"""Running a table: what is skipped, tried again, waited for; dry runs."""

import os
import pathlib
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from unittest import mock

from absl import flags
from absl.testing import absltest
from absl.testing import parameterized

from experiments import locking
from launch import backends
from launch import pool
from launch import run
from launch import table as table_lib

_ROOT = pathlib.Path(__file__).parents[1]
# What a binary of this project shows to the runner, and how it may end.
_BINARY = """
    import json, os, signal, sys, time
    from absl import app, flags
    flags.DEFINE_string('mode', 'good', '')
    flags.DEFINE_list('dense', [], '')
    flags.DEFINE_float('rate', .5, '')
    flags.DEFINE_integer('seed', 0, '')
    flags.DEFINE_string('workdir', None, '')
    flags.DEFINE_string('data_dir', None, '')
    FREE = ('workdir', 'data_dir')
    def run_config():
      return {name: flags.FLAGS[name].value for name in (
          'mode', 'dense', 'rate', 'seed', 'workdir', 'data_dir')}
    def without_data(values):
      pass
    def describe(values):
      return dict(parameters=1000, train_steps=7, batch_size=4,
                  learning_rate=values['rate'], training_flops=5e6,
                  weight_bytes=4000, optimizer_bytes=8000,
                  activation_bytes=6000000)
    def note(what):
      with open('notes', 'a') as file:
        file.write(f'{what} {time.time()}\\n')
    def main(_):
      values = run_config()
      os.makedirs(values['workdir'], exist_ok=True)
      os.chdir(values['workdir'])
      def save(*_):
        note('term')
        if values['mode'] != 'deaf':
          sys.exit(75)
      signal.signal(signal.SIGTERM, save)
      note('begin')
      begun = open('notes').read().count('begin')
      time.sleep(.05)
      if values['mode'] in ('held', 'deaf'):
        give_up = time.time() + 60
        while not os.path.exists('release') and time.time() < give_up:
          time.sleep(.02)
      note('end')
      print('it ran')
      if values['mode'] == 'fail' or (values['mode'] == 'once' and begun < 2):
        sys.exit(3)
      if values['mode'] in ('requeue', 'elsewhere') and begun < 4:
        sys.exit(75 if values['mode'] == 'requeue' else 76)
      if values['mode'] != 'empty':
        with open('result.json', 'w') as file:
          json.dump({'flags': values}, file)
    if __name__ == '__main__':
      app.run(main)
"""
# The runner in a process of its own: a mode each argument.
_RUNNER = """
    import sys
    from absl import flags
    from launch import run, table
    values = flags.FlagValues()
    run.define_flags(values)
    points = tuple(table.Point(mode, 'value', 1., {'mode': mode})
                   for mode in sys.argv[2:])
    values(['run', f'--sweep_dir={sys.argv[1]}', '--workers=2'])
    sys.exit(run.run(values.flag_values_dict(),
                     table.Table('name', 'title', points, 'launched')))
"""


def _values(**given):
  found = flags.FlagValues()
  run.define_flags(found)
  found(['run'])
  return found.flag_values_dict() | {'python': 'python3'} | given


def _table(*modes, **flag_values):
  return table_lib.Table('name', 'Title', tuple(
      table_lib.Point(mode, 'value', 1., {'mode': mode, **flag_values})
      for mode in modes), 'launched')


class RunTestCase(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.modules = cls.enterClassContext(tempfile.TemporaryDirectory())
    for name, text in (('launched', _BINARY), ('runner', _RUNNER)):
      pathlib.Path(cls.modules, f'{name}.py').write_text(textwrap.dedent(text))
    sys.path.append(cls.modules)
    cls.addClassCleanup(sys.path.remove, cls.modules)
    before = os.environ.get('PYTHONPATH')
    os.environ['PYTHONPATH'] = f'{_ROOT}{os.pathsep}{cls.modules}'
    cls.addClassCleanup(lambda: os.environ.pop('PYTHONPATH') if before is None
                        else os.environ.update(PYTHONPATH=before))

  def setUp(self):
    super().setUp()
    self.sweep = self.enterContext(tempfile.TemporaryDirectory())

  def start(self, table, /, **values):
    return run.run(_values(sweep_dir=self.sweep, python=sys.executable,
                           **values), table)

  def runner(self, *modes):
    return subprocess.Popen(
        [sys.executable, '-m', 'runner', self.sweep, *modes],
        stdout=subprocess.PIPE, text=True)

  def notes(self, mode):
    """What a cell has noted, without the times."""
    path = pathlib.Path(self.sweep, 'cells', f'{mode}_value_seed0', 'notes')
    if not path.exists():
      return []
    return [line.split()[0] for line in path.read_text().splitlines()]

  def release(self, mode):
    pathlib.Path(self.sweep, 'cells', f'{mode}_value_seed0',
                 'release').touch()

  def wait_for(self, mode, what):
    for _ in range(1200):
      if what in self.notes(mode):
        return
      time.sleep(.05)
    self.fail(f'no {what} of {mode}')


class RunTest(RunTestCase):

  def test_every_cell_runs_once_and_is_then_skipped(self):
    table = _table('good', 'other')
    self.assertEqual(self.start(table, workers=2), 0)
    self.assertEqual(self.start(table, workers=2), 0)
    self.assertEqual(self.notes('good'), ['begin', 'end'])
    log = pathlib.Path(self.sweep, 'logs', 'other_value_seed0.log')
    self.assertEqual(log.read_text(), 'it ran\n')

  def test_a_result_of_other_flags_does_not_count(self):
    self.start(_table('good'))
    self.start(_table('good'), cell_flag=['--data_dir=elsewhere'])
    self.assertEqual(self.notes('good'), ['begin', 'end'])
    self.start(_table('good', rate=.25))
    self.assertEqual(self.notes('good'), ['begin', 'end'] * 2)

  @parameterized.parameters(
      ('once', 1, 0, 2), ('once', 0, 1, 1), ('fail', 2, 1, 3),
      ('empty', 1, 1, 2), ('requeue', 0, 0, 4), ('elsewhere', 0, 0, 4))
  def test_what_fails_is_tried_again_and_what_stopped_goes_on(
      self, mode, retries, status, starts):
    """Status 75 does not count as a failure, nor does 76."""
    self.enterContext(mock.patch.object(pool, 'PAUSE', .05))
    self.assertEqual(self.start(_table(mode), retries=retries), status)
    self.assertEqual(self.notes(mode), ['begin', 'end'] * starts)

  def test_a_failure_stops_no_other_cell(self):
    self.assertEqual(self.start(_table('fail', 'good'), retries=0), 1)
    self.assertEqual(self.notes('good'), ['begin', 'end'])

  def test_a_cell_that_is_always_stopped_fails_in_the_end(self):
    self.enterContext(mock.patch.object(backends, 'MAX_REQUEUES', 1))
    self.assertEqual(self.start(_table('requeue'), retries=0), 1)
    self.assertEqual(self.notes('requeue'), ['begin', 'end'] * 2)

  def test_two_runners_share_the_cells(self):
    modes = ('good', 'other', 'third', 'fourth')
    for runner in [self.runner(*modes), self.runner(*modes)]:
      runner.communicate()
      self.assertEqual(runner.returncode, 0)
    for mode in modes:
      self.assertEqual(self.notes(mode), ['begin', 'end'], mode)

  def test_a_killed_runner_leaves_its_cell_to_end_and_goes_on(self):
    """The cell holds its own lock, so that the next runner waits for it."""
    first = self.runner('held', 'good')
    self.wait_for('held', 'begin')
    first.kill()
    first.communicate()
    second = self.runner('held', 'good')
    self.assertTrue(any('waits for held_value_seed0: process' in line
                        for line in second.stdout))
    self.release('held')
    second.communicate()
    self.assertEqual(second.returncode, 0)
    self.assertEqual(self.notes('held'), ['begin', 'end'])
    self.assertEqual(self.notes('good').count('end'), 1)

  @parameterized.parameters(signal.SIGTERM, signal.SIGINT)
  def test_a_stopped_runner_stops_its_cells_and_says_so(self, number):
    runner = self.runner('held', 'other', 'good')
    self.wait_for('held', 'begin')
    runner.send_signal(number)
    runner.communicate()
    self.assertEqual(runner.returncode, pool.REQUEUE_EXIT_CODE)
    self.assertEqual(self.notes('held'), ['begin', 'term'])
    self.release('held')
    self.assertEqual(self.start(_table('held', 'other', 'good')), 0)
    self.assertEqual(self.notes('held'), ['begin', 'term', 'begin', 'end'])

  def test_a_second_request_kills(self):
    """The cell of this table saves for ever."""
    runner = self.runner('deaf')
    self.wait_for('deaf', 'begin')
    runner.terminate()
    self.wait_for('deaf', 'term')
    runner.terminate()
    runner.communicate()
    self.assertEqual(runner.returncode, pool.REQUEUE_EXIT_CODE)
    self.assertEqual(self.notes('deaf'), ['begin', 'term'])

  def test_progress_counts(self):
    runner = self.runner('good', 'fail')
    text, _ = runner.communicate()
    self.assertEqual(runner.returncode, 1)
    self.assertIn('1 of 2 finished, ', text)
    self.assertRegex(text, '1 failed: fail_value_seed0 failed .status 3; see ')

  def test_workers_have_gpus_of_their_own(self):
    self.assertEqual(run.gpus(2, 3), {'CUDA_VISIBLE_DEVICES': '6,7'})
    self.assertEqual(run.gpus(0, 3), {})


class ErrorTest(RunTestCase):

  @parameterized.parameters(
      ({'retries': -1}, r'`retries` \(=-1\) must be at least 0'),
      ({'workers': 0}, r'`workers` \(=0\) must be at least 1'),
      ({'backend': 'slurm', 'zone': 'here'}, '`zone` .*backend=tpu_vm, not of'),
      ({'tasks': 2}, '`tasks` .=2. is a setting of --backend=slurm, not of l'),
      ({'backend': 'tpu_vm', 'tpu_names': ['a'], 'workers': 2}, '`workers`'),
      ({'backend': 'tpu_vm', 'zone': 'here'}, r'`tpu_names` \(=\[\]\) must be'),
      ({'backend': 'xpk', 'cluster': 'c', 'tpu_type': 't'}, '`docker_image`'),
      ({'seeds': ['0', 'x']}, "`seeds` .='0,x'"),
      ({'seeds': []}, "`seeds` .=''. must be different integers"),
      ({'seeds': ['0', '0']}, "`seeds` .='0,0'. must be different integers"),
      ({'rows': ['(']}, r"`rows` \(='\('\) must be a regular expression"),
      ({'rows': ['^x']}, r"`rows` \(='\^x'\) must match a row"),
      ({'cell_flag': ['--seed=3']}, "`cell_flag` .='--seed=3'.*--seeds and"),
      ({'cell_flag': ['-workdir', 'x']}, "`cell_flag` .='-workdir'"),
      ({'cell_flag': ['--colour=red']}, "(?s)mode=good.*'colour'"),
      ({'cell_flag': ['--rate=fast']}, '(?s)--rate=fast.*rate'),
      ({'cell_flag': ['word']}, r"(?s)unknown arguments: \['word'\]"))
  def test_bad_flags_start_nothing(self, values, message):
    with self.assertRaisesRegex(ValueError, message):
      self.start(_table('good'), **values)
    self.assertEmpty(os.listdir(self.sweep))

  def test_a_binary_that_is_not_there_is_named(self):
    for binary, message in (('no.such.binary', 'no such module'),
                            ('launch.pool', 'cannot be asked')):
      with self.assertRaisesRegex(ValueError, f'(?s){binary}.*{message}'):
        self.start(_table('good')._replace(binary=binary))

  def test_a_folder_that_is_a_file_is_named(self):
    values = _values(table='swat_fig1', sweep_dir=__file__)
    with self.assertRaisesRegex(ValueError, '`sweep_dir` .*it is a file'):
      run.check_table(values)

  def test_no_table_is_status_2(self):
    done = subprocess.run([sys.executable, '-m', 'launch.run'], cwd=_ROOT,
                          capture_output=True, text=True, check=False)
    self.assertEqual(done.returncode, 2)
    self.assertIn('`table` (=None) must be one of top_kast_fig2a', done.stderr)


_SLURM = """\
# Title, scale small: 2 cells of launched, 0 finished
#!/usr/bin/env bash
#SBATCH --job-name=name
#SBATCH --array=0-1%3
#SBATCH --ntasks=2
#SBATCH --output=sweep/logs/slurm_%A_%a.log
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --gpus-per-task=8
names=(
  a_value_seed0
  b_value_seed0
)
commands=(
  'python3 -m launched --mode=a --dense=stem,head --seed=0 \
--workdir=sweep/cells/a_value_seed0 --distributed'
  'python3 -m launched --mode=b --dense=stem,head --seed=0 \
--workdir=sweep/cells/b_value_seed0 --distributed'
)
name=${names[SLURM_ARRAY_TASK_ID]}
command=${commands[SLURM_ARRAY_TASK_ID]}
for ((attempt = 0; attempt <= 1; attempt++)); do
  flock --nonblock --conflict-exit-code=76 sweep/locks/"$name".lock \\
    srun --kill-on-bad-exit=1 bash -c "exec $command"
  code=$?
  case $code in
    0) exit 0 ;;
    75) exec scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" ;;
    76) echo "$name runs elsewhere"; exit 0 ;;
  esac
done
exit $code
"""
_LOCAL = """\
# Title, scale small: 2 cells of launched, 0 finished
python3 -m launched --mode=a --dense=stem,head --seed=0 \
--workdir=sweep/cells/a_value_seed0
python3 -m launched --mode=b --dense=stem,head --seed=0 \
--workdir=sweep/cells/b_value_seed0
"""
_XPK = """\
# Title, scale small: 1 cells of launched, 0 finished
xpk workload create --cluster=c --workload=table1-small-a-value-seed0-f5453f07 \
--tpu-type=v5p-32 --num-slices=2 --docker-image=image --max-restarts=100 \
--restart-on-exit-codes=75 --termination-grace-period-seconds=120 \
'--command=python3 -m launched --mode=a --seed=0 \
--workdir=sweep/cells/a_value_seed0 --distributed'
"""
_COSTS = """
| cell    | parameters | steps | batch | rate | multiply-adds | \
weights (MB) | optimizer (MB) | activations (MB) |
|:--------|-----------:|------:|------:|-----:|--------------:|\
-------------:|---------------:|-----------------:|
| a_value |      1,000 |     7 |     4 |  0.5 |         5e+06 | \
         0.0 |            0.0 |              1.5 |
"""


class DryRunTest(RunTestCase):

  def plan(self, table, /, **values):
    values = _values(dry_run=True, sweep_dir='sweep', **values)
    return run.plan(values, table, run.cells(values, table))

  def test_local(self):
    text = self.plan(_table('a', 'b', dense=['stem', 'head']))
    self.assertEqual(text.partition('\n\n')[0] + '\n', _LOCAL)

  def test_slurm(self):
    text = self.plan(
        _table('a', 'b', dense=['stem', 'head']), backend='slurm', tasks=2,
        table='name', workers=3, sbatch=['--gpus-per-task=8'])
    self.assertEqual(text.partition('\n\n')[0] + '\n', _SLURM)

  def test_tpu_vm(self):
    text = self.plan(_table('a', 'b'), backend='tpu_vm', zone='us-z',
                     tpu_names=['one', 'two'])
    _, a, b = text.partition('\n\n')[0].splitlines()
    self.assertIn('ssh two --zone=us-z --worker=all', b)
    self.assertIn('scp --zone=us-z --worker=0 two:sparse_jax/sweep/cells/'
                  'b_value_seed0/result.json sweep/cells/b_value_seed0', b)
    # Quoted for this shell, then for the one over there.
    words = subprocess.run(
        ['bash', '-c', f'gcloud() {{ printf "%s\\n" "$@"; }}\n'
         f'export -f gcloud\n{a}'], capture_output=True, text=True, check=True,
        cwd=self.sweep).stdout.splitlines()
    self.assertEqual(words[:6], ['compute', 'tpus', 'tpu-vm', 'ssh', 'one',
                                 '--zone=us-z'])
    self.assertEqual(words[7], '--command=cd sparse_jax && flock --nonblock '
                     '--conflict-exit-code=76 '
                     '"$HOME"/sweep_a_value_seed0.lock env ACCELERATOR=tpu '
                     'launch/run.sh python -m launched '
                     '--mode=a --seed=0 --workdir=sweep/cells/a_value_seed0 '
                     '--distributed')

  def test_xpk(self):
    text = self.plan(_table('a'), backend='xpk', cluster='c', num_slices=2,
                     tpu_type='v5p-32', docker_image='image', table='table1')
    self.assertEqual(text.partition('\n\n')[0] + '\n', _XPK)

  def test_workload_names_are_short_and_tell_flags_apart(self):
    values = _values(backend='xpk', sweep_dir='s', table='table')
    names = set()
    for rate in (.1, .2):
      cell = table_lib.Run('A very long name, of 95%' * 3, 'b', {'rate': rate})
      name, = (word for word in backends.command(cell, values)
               if word.startswith('--workload='))
      self.assertRegex(name, '^--workload=[a-z]([-a-z0-9]{0,37}[a-z0-9])$')
      names.add(name)
    self.assertLen(names, 2)

  def test_costs_are_those_of_the_binary_and_seeds_count_in_the_sum(self):
    text = self.plan(_table('a'), seeds=['0', '1', '2'], devices=4)
    self.assertIn(_COSTS, text)
    self.assertEndsWith(text, '1.5e+07 multiply-adds in all 3 cells. Memory is '
                        'that of one device of 4.\n')

  def test_rows_are_those_asked_for(self):
    text = self.plan(_table('alpha', 'beta'), rows=['^be'])
    self.assertIn('1 cells of launched', text)
    self.assertIn('--mode=beta', text)
    self.assertNotIn('--mode=alpha', text)

  def test_what_is_finished_is_not_printed(self):
    self.start(_table('good'))
    values = _values(sweep_dir=self.sweep, dry_run=True)
    table = _table('good', 'other')
    text = run.plan(values, table, run.cells(values, table))
    self.assertIn('2 cells of launched, 1 finished\npython3', text)
    self.assertNotIn('--mode=good', text)


class SlurmScriptTest(RunTestCase):
  """The script in a shell whose srun and scontrol are ours."""

  def setUp(self):
    super().setUp()
    self.bin = self.enterContext(tempfile.TemporaryDirectory())
    self.command('srun', 'shift; exec "$@"')
    self.command('scontrol', 'echo "$@" > requeued')

  def command(self, name, text):
    path = pathlib.Path(self.bin, name)
    path.write_text(f'#!/bin/bash\n{text}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)

  def submit(self, table, /, task=0, **values):
    """Runs one task of the array; returns its status."""
    values = _values(backend='slurm', table='name', sweep_dir=self.sweep,
                     python=sys.executable, **values)
    os.makedirs(os.path.join(self.sweep, 'locks'), exist_ok=True)
    text = backends.slurm(table_lib.runs(table), values)
    return subprocess.run(['bash'], input=text, text=True, check=False, env={
        **os.environ, 'PATH': f'{self.bin}:{os.environ["PATH"]}',
        'SLURM_ARRAY_TASK_ID': str(task), 'SLURM_ARRAY_JOB_ID': '7'},
                          cwd=self.sweep, capture_output=True).returncode

  def test_a_task_runs_its_cell(self):
    self.assertEqual(self.submit(_table('good', 'other'), 1), 0)
    self.assertEqual(self.notes('good'), [])
    self.assertEqual(self.notes('other'), ['begin', 'end'])

  def test_a_stopped_cell_is_requeued(self):
    self.assertEqual(self.submit(_table('requeue')), 0)
    self.assertEqual(self.notes('requeue'), ['begin', 'end'])
    self.assertEqual(pathlib.Path(self.sweep, 'requeued').read_text(),
                     'requeue 7_0\n')

  def test_a_failed_cell_is_tried_again(self):
    self.assertEqual(self.submit(_table('fail'), retries=2), 3)
    self.assertEqual(self.notes('fail'), ['begin', 'end'] * 3)

  def test_a_cell_that_runs_is_left_alone(self):
    lock = locking.acquire(os.path.join(self.sweep, 'locks',
                                        'good_value_seed0.lock'))
    self.addCleanup(os.close, lock)
    self.assertEqual(self.submit(_table('good')), 0)
    self.assertEqual(self.notes('good'), [])

  def test_sbatch_gets_the_cells_that_are_left(self):
    self.command('sbatch', 'cp "$1" submitted')
    self.start(_table('good'))
    path = os.environ['PATH']
    os.environ['PATH'] = f'{self.bin}:{path}'
    here = os.getcwd()
    os.chdir(self.sweep)
    try:
      self.assertEqual(self.start(_table('good', 'other'), backend='slurm',
                                  table='name'), 0)
    finally:
      os.chdir(here)
      os.environ['PATH'] = path
    text = pathlib.Path(self.sweep, 'submitted').read_text()
    self.assertIn('other_value_seed0', text)
    self.assertNotIn('good_value_seed0', text)


if __name__ == '__main__':
  absltest.main()
