"""The scaling law: constants found again, runs read, a picture drawn."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from tests import own_flags

with own_flags.OwnFlags():  # Other programs have the same names.
  from experiments import scaling

ROOT = pathlib.Path(__file__).parents[1]
# Of the size of those for T5 on C4 in the paper, and others.
LAWS = (scaling.Law(a=16.8, b=.722, c=45., d=.245, e=6e8, f=.99, g=.651),
        scaling.Law(a=60., b=.4, c=20., d=.3, e=300., f=.5, g=1.5))


def runs(law, noise=0., seed=0):
  """Columns of a grid of runs."""
  rng = np.random.default_rng(seed)
  grid = np.stack(np.meshgrid(
      [0., .5, .75, .875], 1e6 * 4.**np.arange(4), 1e8 * 3.**np.arange(4)))
  sparsity, nonzeros, data = grid.reshape(3, -1)
  loss = law(sparsity, nonzeros, data)
  return sparsity, nonzeros, data, loss * np.exp(noise * rng.normal(
      size=loss.shape))


class FitTest(parameterized.TestCase):

  @parameterized.parameters(*LAWS)
  def test_known_constants_are_found_again(self, *law):
    law = scaling.Law(*law)
    found, error = scaling.fit(*runs(law), starts=8)
    self.assertLess(error, 1e-10)
    np.testing.assert_allclose(found, law, rtol=.05)

  def test_a_noisy_law_predicts_runs_that_it_has_not_seen(self):
    law = LAWS[1]
    found, _ = scaling.fit(*runs(law, noise=2e-3), starts=4)
    unseen = (np.array([.3, .6, .8]), np.array([2e6, 3e8, 1e7]),
              np.array([2e8, 2e9, 5e9]))
    np.testing.assert_allclose(found(*unseen), law(*unseen), rtol=.01)

  def test_an_outlier_moves_it_little(self):
    *columns, loss = runs(LAWS[1])
    loss[7] *= 1.5
    found, _ = scaling.fit(*columns, loss, starts=6)
    rest = np.arange(loss.size) != 7
    np.testing.assert_allclose(found(*(c[rest] for c in columns)), loss[rest],
                               rtol=.01)

  @parameterized.parameters(
      (0, 1., r'in \[0, 1\)'), (1, 0., 'above 0'), (3, np.nan, 'above 0'))
  def test_impossible_runs_are_named(self, column, value, message):
    columns = [np.array(c) for c in runs(LAWS[0])]
    columns[column][3] = value
    with self.assertRaisesRegex(ValueError, f'`runs`.*{message}'):
      scaling.fit(*columns)
    with self.assertRaisesRegex(ValueError, '`runs`.*constants'):
      scaling.fit(*(c[:6] for c in runs(LAWS[0])))


class ProgramTest(absltest.TestCase):

  def test_reads_finished_runs(self):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    layers = [{'sparse': True, 'entries': 100, 'forward_density': .25},
              {'sparse': False, 'entries': 10, 'forward_density': 1.}, {}]
    for name, length in (('images', None), ('text', 8)):
      os.makedirs(os.path.join(folder, name))
      with open(os.path.join(folder, name, 'result.json'), 'w') as file:
        json.dump({'layers': layers, 'steps': 5, 'sparsity': .75,
                   'test_loss': 2.,
                   'flags': {'batch_size': 3, 'segment_length': length}}, file)
    self.assertEqual(scaling.read(folder), [
        {'sparsity': .75, 'nonzeros': 35., 'data': 15. * (length or 1),
         'loss': 2.} for length in (None, 8)])

  def test_fits_and_draws_a_table(self):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    table = os.path.join(folder, 'in.csv')
    rows = zip(*runs(LAWS[1]))
    with open(table, 'w') as file:
      file.write(','.join(scaling.COLUMNS) + '\n')
      file.writelines(','.join(map(str, row)) + '\n' for row in rows)
    command = [sys.executable, '-m', 'experiments.scaling', f'--runs={table}',
               f'--workdir={folder}', '--starts=2']
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True,
                          text=True)
    self.assertIn('| ', done.stdout)
    for name in ('runs.csv', 'table.md', 'fit.png'):
      self.assertGreater(os.path.getsize(os.path.join(folder, name)), 0)
    with open(table, 'w') as file:
      file.write('sparsity,nonzeros,data\n0,1,1\n')
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    self.assertEqual(done.returncode, 2)
    self.assertRegex(done.stderr, 'in.csv has a run without loss')


if __name__ == '__main__':
  absltest.main()
