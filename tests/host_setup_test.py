"""What launch/run.sh does by its settings; a script stands in for Python."""

import configparser
import os
import pathlib
import re
import shutil
import stat
import subprocess
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
from packaging import requirements

_ROOT = pathlib.Path(__file__).parents[1]
_FILES = ('launch/run.sh', 'launch/constraints.txt', 'setup.cfg',
          'pyproject.toml')
# Makes environments of copies of itself, and notes what it is asked for.
_PYTHON = """#!/usr/bin/env bash
case "$1 $2" in
  '-m venv')
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python"
    echo venv >> "$NOTES" ;;
  '-m pip')
    [[ $3 == --version ]] && exit 0
    sleep .2
    echo "${@:3}" >> "$NOTES"
    [[ ! -e $NOTES.broken ]] ;;
esac
"""


class RunScriptTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(
        tempfile.TemporaryDirectory())).resolve()
    self.project, self.notes = self.folder / 'project', self.folder / 'notes'
    for name in _FILES:
      path = self.project / name
      path.parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(_ROOT / name, path)
    self.python = self.folder / 'python'
    self.python.write_text(_PYTHON)
    self.python.chmod(self.python.stat().st_mode | stat.S_IXUSR)

  def start(self, *arguments, **settings):
    own = {name: value for name, value in os.environ.items()
           if name not in ('VENV', 'ACCELERATOR', 'PINNED')}
    return subprocess.Popen(
        ['bash', self.project / 'launch/run.sh', *arguments], text=True,
        cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**own, 'PYTHON': str(self.python), 'NOTES': str(self.notes),
             **settings})

  def run_script(self, *arguments, **settings):
    process = self.start(*arguments, **settings)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err

  def noted(self):
    return self.notes.read_text().splitlines()

  def installs(self):
    return [line for line in self.noted() if line.startswith('install')]

  @parameterized.parameters('cpu', 'cuda12', 'cuda13', 'tpu')
  def test_accelerator_chooses_extras_that_there_are(self, accelerator):
    self.assertEqual(self.run_script(ACCELERATOR=accelerator)[0], 0)
    (line,) = self.installs()
    extras = re.search(r'--editable .*\[([\w,]+)\]$', line)[1].split(',')
    self.assertEqual(accelerator in extras, accelerator != 'cpu')
    config = configparser.ConfigParser()
    config.read(_ROOT / 'setup.cfg')
    self.assertContainsSubset(extras, config['options.extras_require'])

  def test_second_time_installs_nothing(self):
    for _ in range(2):
      self.assertEqual(self.run_script()[0], 0)
    self.assertLen(self.noted(), 2)
    self.assertNotIn('--constraint', self.noted()[1])

  def test_pins_are_used_if_asked_for_and_changed_ones_installed(self):
    pins = self.project / 'launch/constraints.txt'
    for change in ('', '', '# more\n'):
      pins.write_text(pins.read_text() + change)
      self.assertEqual(self.run_script(PINNED='1')[0], 0)
    self.assertLen(self.installs(), 2)
    self.assertIn(f'--constraint {pins} ', self.installs()[-1])
    self.run_script()
    self.assertLen(self.installs(), 3)

  def test_installation_that_failed_is_redone(self):
    broken = pathlib.Path(f'{self.notes}.broken')
    broken.touch()
    code, out, _ = self.run_script('echo', 'ran')
    self.assertNotEqual(code, 0)
    self.assertEqual(out, '')
    broken.unlink()
    self.assertEqual(self.run_script('echo', 'ran')[1], 'ran\n')
    self.assertLen(self.installs(), 2)

  def test_environment_without_pip_is_made_again(self):
    python = self.project / '.venv/bin/python'
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nexit 1\n')
    python.chmod(0o755)
    self.assertEqual(self.run_script()[0], 0)
    self.assertEqual(self.noted()[0], 'venv')

  def test_two_at_once_install_once(self):
    if shutil.which('flock') is None:
      self.skipTest('flock is not installed.')
    processes = [self.start('echo', 'ran') for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    self.assertEqual(outputs, ['ran\n'] * 2)
    self.assertLen(self.installs(), 1)

  def test_command_runs_in_the_environment_and_gives_its_status(self):
    venv = str(self.folder / 'elsewhere')
    code, out, _ = self.run_script(
        'bash', '-c', 'pwd; echo $VIRTUAL_ENV; command -v python; exit 75',
        VENV=venv)
    self.assertEqual(code, 75)
    self.assertEqual(out.splitlines(),
                     [str(self.project), venv, f'{venv}/bin/python'])

  @parameterized.parameters(('ACCELERATOR', 'gpu'), ('PINNED', 'yes'))
  def test_bad_setting_is_named(self, name, value):
    code, _, err = self.run_script('echo', 'ran', **{name: value})
    self.assertEqual(code, 2)
    self.assertRegex(err, rf'{name} \(={value}\) must be ')
    self.assertFalse(self.notes.exists())


class ConstraintsTest(parameterized.TestCase):

  @parameterized.parameters('3.11', '3.12', '3.14')
  def test_what_is_asked_for_is_pinned_within_its_range(self, python):
    pins = {}
    for line in (_ROOT / 'launch/constraints.txt').read_text().splitlines():
      if line and not line.startswith('#'):
        pin = requirements.Requirement(line)
        if not pin.marker or pin.marker.evaluate({'python_version': python}):
          self.assertNotIn(pin.name, pins)
          (only,) = pin.specifier
          pins[pin.name] = only.version
    config = configparser.ConfigParser()
    config.read(_ROOT / 'setup.cfg')
    wanted = [config['options']['install_requires'],
              *config['options.extras_require'].values()]
    for line in '\n'.join(wanted).split():
      if not line.startswith('#'):
        wish = requirements.Requirement(line)
        self.assertTrue(wish.specifier.contains(pins[wish.name]), line)


if __name__ == '__main__':
  absltest.main()
