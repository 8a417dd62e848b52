"""What an installed package has, and what a type checker sees of it."""

import configparser
import pathlib
import subprocess
import sys
import tempfile
import unittest

from absl.testing import absltest
import setuptools

ROOT = pathlib.Path(__file__).parents[1]
USER = '''
import optax
import sparse_jax

method = sparse_jax.rigl(0.9, update_every=100)
tx = sparse_jax.sparsify(optax.adam(1e-3), method)
sparse_jax.sparsify(optax.adam(1e-3))
sparse_jax.rigl(0.9, udpate_every=100)
'''


def importable(name):
  return subprocess.run([sys.executable, '-c', f'import {name}'],
                        capture_output=True, check=False).returncode == 0


class PackageTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.config = configparser.ConfigParser(inline_comment_prefixes=('#',))
    self.config.read(ROOT / 'setup.cfg')

  def test_the_wheel_has_the_library_alone(self):
    include = self.config['options.packages.find']['include'].split()
    found = setuptools.find_packages(str(ROOT), include=include)
    self.assertEqual({name.partition('.')[0] for name in found},
                     {'sparse_jax'})
    folders = {path.parent.relative_to(ROOT).as_posix().replace('/', '.')
               for path in (ROOT / 'sparse_jax').rglob('*.py')}
    self.assertEqual(set(found), folders)

  def test_the_wheel_says_that_it_is_typed(self):
    self.assertTrue((ROOT / 'sparse_jax' / 'py.typed').exists())
    data = self.config['options.package_data']['sparse_jax'].split()
    self.assertIn('py.typed', data)

  def test_the_source_archive_has_what_tests_need(self):
    lines = (ROOT / 'MANIFEST.in').read_text().split('\n')
    for folder in ('tests', 'experiments', 'launch', 'docs', '.ci'):
      self.assertIn(f'graft {folder}', lines)
      self.assertTrue((ROOT / folder).is_dir())
    for name in ('CHANGELOG.md', 'WORKSPACE.md'):
      self.assertIn(f'include {name}', lines)

  def test_importing_leaves_alone_what_few_need(self):
    """Each costs about what all the rest does, for a few functions."""
    code = ('import sys, sparse_jax; print(*{"jax.experimental.sparse", '
            '"jax.experimental.pallas", "scipy.optimize"} & {*sys.modules})')
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True,
                          capture_output=True, text=True)
    self.assertEqual(done.stdout.strip(), '')

  @unittest.skipUnless(importable('mypy'), 'the extra `test` brings mypy')
  def test_a_misspelt_argument_is_found(self):
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder, 'user.py')
      path.write_text(USER)
      done = subprocess.run(
          [sys.executable, '-m', 'mypy', '--config-file=', '--no-incremental',
           '--ignore-missing-imports', '--follow-imports=silent', str(path)],
          cwd=ROOT, capture_output=True, text=True, check=False)
    self.assertIn('Missing positional argument "method" in call to "sparsify"',
                  done.stdout, done.stderr)
    self.assertIn('Unexpected keyword argument "udpate_every" for "rigl"',
                  done.stdout)
    self.assertIn('Found 2 errors', done.stdout)


if __name__ == '__main__':
  absltest.main()
