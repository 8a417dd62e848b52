"""What a value is when it arrives: each back end's command in a real shell.

Commands of our own stand in for srun, gcloud and Python, and note their words.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

from absl import flags
from absl.testing import absltest
from absl.testing import parameterized

from launch import backends
from launch import run as run_lib
from launch import table as table_lib

# Each makes a file `owned` where a shell reads it as more than a word.
NASTY = ('two  words', "it's", '"quoted"', '$(touch owned)', '`touch owned`',
         '; touch owned;', '| touch owned', '$HOME', '*', 'a\\b', '#no', '!!',
         '> owned', '~', '')
_NOTE = """#!{python}
import json, os, sys
with open(os.environ['NOTES'], 'a') as file:
  file.write(json.dumps(sys.argv[1:]) + '\\n')
"""


def _values(backend, **given):
  found = flags.FlagValues()
  run_lib.define_flags(found)
  found(['run'])
  return found.flag_values_dict() | {
      'backend': backend, 'sweep_dir': 'sweep', 'table': 'table'} | given


def _run(*values):
  return table_lib.Run('cell_seed0', 'some.binary', {
      f'flag{i}': value for i, value in enumerate(values)}, ('--more=$(x)',))


class QuotingTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.notes = self.folder / 'notes'
    self.bin = self.folder / 'bin'
    self.command('python3', _NOTE.format(python=sys.executable))
    self.command('srun', '#!/bin/bash\nshift; exec "$@"\n')

  def command(self, name, text, folder=None):
    path = (folder or self.bin) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return str(path)

  def shell(self, command, **options):
    """Runs a command where ours are found; returns the words they noted."""
    done = subprocess.run(
        command, cwd=self.folder, text=True, capture_output=True, check=False,
        env={'PATH': f'{self.bin}:{os.environ["PATH"]}', 'HOME': str(
            self.folder), 'NOTES': str(self.notes), 'SLURM_ARRAY_TASK_ID': '0',
             'SLURM_ARRAY_JOB_ID': '7'}, **options)
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertEmpty(list(self.folder.rglob('owned')))
    return [json.loads(line) for line in self.notes.read_text().splitlines()]

  def assert_arrived(self, words, run, sweep_dir, *more):
    self.assertEqual(words, ['-m', 'some.binary', *run.arguments(
        backends.workdir(sweep_dir, run.name)), *more])

  def test_slurm(self):
    run = _run(*NASTY)
    sweep_dir = '$(touch owned) `touch owned` "it\'s" %a'
    python = self.command('my $(touch owned) python', _NOTE.format(
        python=sys.executable), self.folder / 'a b')
    text = backends.slurm([run], _values(
        'slurm', sweep_dir=sweep_dir, tasks=2, table='a $(touch owned) name',
        sbatch=['--comment=$(touch owned) "x" #'], python=python))
    (self.folder / sweep_dir / 'locks').mkdir(parents=True)
    words, = self.shell(['bash'], input=text)
    self.assert_arrived(words, run, sweep_dir, '--distributed')
    options = [line for line in text.splitlines() if line.startswith('#SBATCH')]
    self.assertIn('#SBATCH --comment="$(touch owned) \\"x\\" #"', options)
    self.assertIn('#SBATCH --job-name="a $(touch owned) name"', options)
    self.assertIn('#SBATCH --output="$(touch owned) `touch owned` \\"it\'s\\" '
                  '%%a/logs/slurm_%A_%a.log"', options)

  def test_tpu_vm(self):
    run = _run(*NASTY)
    self.command('gcloud', '#!/bin/bash\n'
                 'for word; do case $word in --command=*)\n'
                 'exec bash -c "${word#--command=}" ;; esac; done\n')
    values = _values('tpu_vm', tpu_names=['$(touch owned)'],
                     zone='$(touch owned)')
    with self.assertRaisesRegex(ValueError, '`remote_dir` .*must have no let'):
      backends.command(run, {**values, 'remote_dir': 'my $(touch owned) dir'})
    self.command('run.sh', '#!/bin/bash\nexec "${@/#python/python3}"\n',
                 self.folder / 'project' / 'launch')
    words, = self.shell(backends.command(
        run, {**values, 'remote_dir': 'project'}))
    self.assert_arrived(words, run, 'sweep', '--distributed')

  def test_xpk(self):
    run = _run(*NASTY)
    words = backends.command(run, _values(
        'xpk', sweep_dir='a $(touch owned)', cluster='$(touch owned)'))
    self.assertIn('--cluster=$(touch owned)', words)  # Not through a shell.
    command = words[-1].removeprefix('--command=')
    words, = self.shell(['bash', '-c', command])
    self.assert_arrived(words, run, 'a $(touch owned)', '--distributed')

  @parameterized.parameters('two\nlines', 'a\rb', 'a\0b', 'tab\tbed')
  def test_a_line_break_is_refused_before_anything_is_written(self, value):
    slurm, tpu_vm, xpk = (_values(name, tpu_names=['t'], zone='z')
                          for name in ('slurm', 'tpu_vm', 'xpk'))
    script = lambda run, values: backends.slurm([run], values)
    for make, run, values in (
        (script, _run(value), slurm),
        (script, _run(), {**slurm, 'sweep_dir': value}),
        (script, _run(), {**slurm, 'sbatch': [value]}),
        (backends.command, _run(value), tpu_vm),
        (backends.command, _run(), {**tpu_vm, 'sweep_dir': value}),
        (backends.command, _run(value), xpk)):
      with self.assertRaisesRegex(ValueError, 'line|no letters'):
        make(run, values)

  def test_here_no_shell_stands_between(self):
    run = _run(*NASTY, 'two\nlines')
    words = backends.command(run, _values('local', python='my python'))
    self.assertEqual(words[0], 'my python')
    self.assert_arrived(words[1:], run, 'sweep')


if __name__ == '__main__':
  absltest.main()
