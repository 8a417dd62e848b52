"""Our command for GKE, given to the real xpk, which prints its JobSet.

Skipped where xpk is not installed: `pip install xpk==1.16.0`, in an environment
of its own, whose `bin` is in PATH or in XPK_BIN. Nothing is sent anywhere.
"""

import os
import re
import shlex
import shutil
import subprocess
import tempfile

from absl.testing import absltest
from absl.testing import parameterized

from launch import backends
from launch import table as table_lib

_VALUES = {'backend': 'xpk', 'cluster': 'cluster', 'tpu_type': 'v5p-32',
           'docker_image': 'image', 'num_slices': 2, 'sweep_dir': 'sweep',
           'table': 'table1', 'scale': 'small'}
# What is asked where a cluster would be: no project, no kubectl, no login.
_DRY = ('--dry-run', '--skip-validation', '--project=p', '--zone=us-east5-a')


def _path():
  return f'{os.environ.get("XPK_BIN", "")}:{os.environ["PATH"]}'


def setUpModule():
  if shutil.which('xpk', path=_path()) is None:
    raise absltest.SkipTest('xpk is not installed.')


class XpkTest(parameterized.TestCase):

  def job_set(self, **flags):
    """The JobSet of a cell of those flags, and our command."""
    run = table_lib.Run('A value_seed0', 'some.binary', flags, ('--bfloat16',))
    words = backends.command(run, _VALUES)
    home = self.enterContext(tempfile.TemporaryDirectory())
    done = subprocess.run(
        [*words, *_DRY], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=120,
        check=False, env={**os.environ, 'HOME': home, 'PATH': _path()})
    self.assertEqual(done.returncode, 0, done.stdout)
    return done.stdout, words

  def test_every_flag_we_pass_is_in_the_job_set(self):
    text, words = self.job_set(method='rigl', skip_step=True)
    name, = (word.partition('=')[2] for word in words
             if word.startswith('--workload='))
    for pattern in (
        f'name: {name}$', 'replicas: 2$', 'image: image$',
        f'maxRestarts: {backends.MAX_REQUEUES}$',
        'terminationGracePeriodSeconds: 120$',
        # Those are the codes that do not end it: the second is ours.
        r'operator: NotIn\n\s+values: \[42,75,127,',
        'gke-tpu-accelerator: tpu-v5p-slice$'):
      self.assertRegex(text, re.compile(pattern, re.MULTILINE))

  @parameterized.parameters('two  words', "it's", '"quoted"', '$(touch owned)',
                            '`touch owned`', '; touch owned;', '$HOME', '*',
                            'a\\b', '#no', '{x}', '')
  def test_a_value_arrives_as_it_is(self, value):
    text, _ = self.job_set(given=value)
    line, = re.findall(r'^\s*\((python3 .*)\) & PID', text, re.MULTILINE)
    self.assertEqual(shlex.split(line), [
        'python3', '-m', 'some.binary', f'--given={value}', '--bfloat16',
        '--workdir=sweep/cells/A value_seed0', '--distributed'])


if __name__ == '__main__':
  absltest.main()
