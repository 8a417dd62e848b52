"""The study of an array that skips zeros, as the runner of tables uses it."""

import json
import os
import tempfile

from absl import flags
from absl.testing import absltest
from absl.testing import parameterized

from tests import fast_compiler
from tests import own_flags

with own_flags.OwnFlags() as _FLAGS:  # Other binaries have the same names.
  from experiments.benchmarks import accelerator


def setUpModule():
  fast_compiler.use()


def tearDownModule():
  fast_compiler.leave()


def _values(**given):
  """Flags of a small network, by name."""
  with _FLAGS:
    flags.FLAGS.unparse_flags()
    flags.FLAGS(['accelerator', '--model=mlp', '--steps=2', '--batch_size=8',
                 '--images=2'])
    return accelerator.run_config() | given


class AcceleratorStudyTest(parameterized.TestCase):

  def test_a_run_leaves_what_it_was_asked_for_and_found(self):
    speedups = {}
    for sparsity in (0., .9):
      with tempfile.TemporaryDirectory() as folder:
        values = _values(sparsity=sparsity, rows=1, lookahead=9, lookaside=10,
                         workdir=os.path.join(folder, 'new'))
        shown = []
        accelerator.run(values, shown.append)
        with open(os.path.join(values['workdir'], 'result.json')) as file:
          result = json.load(file)
      self.assertEqual(result['flags'], values)
      self.assertIn('1 row, 9 ahead, 10 aside', shown[-1])
      for part in ('forward', 'backward'):
        self.assertIn(f'{result[f"{part}_speedup"]:.2f}', shown[-1])
      speedups[sparsity] = result['forward_speedup']
    # Two of three layers have a tenth of their weights.
    self.assertGreater(speedups[.9], 1.5 * speedups[0.])
    self.assertLess(speedups[.9], 10.)

  def test_without_a_sparsity_and_an_array_all_are_shown(self):
    shown = []
    with tempfile.TemporaryDirectory() as folder:
      here = os.getcwd()
      os.chdir(folder)
      self.addCleanup(os.chdir, here)
      rows = accelerator.study_all(_values(steps=0), shown.append)
      self.assertEmpty(os.listdir(folder))
    self.assertLen(rows, 3 * 4)
    self.assertEqual([row['published'] for row in rows[::4]], [1., 3.3, 5.6])
    self.assertLen(shown, 2 * 3 + 1)

  def test_the_seed_draws_weights_and_batches(self):
    values = _values(sparsity=.5, rows=1)
    first, second, again = (
        accelerator.study_all(values | {'seed': seed}, lambda text: None)
        for seed in (0, 1, 0))
    self.assertEqual(first, again)
    self.assertNotEqual(first, second)

  def test_arrays_have_one_size(self):
    found = accelerator.machines(_values()) | accelerator.machines(
        _values(rows=4)) | accelerator.machines(_values(lookaside=1))
    self.assertLen(found, 6)
    for name, machine in found.items():
      self.assertEqual(machine.lanes * machine.columns * machine.rows
                       * machine.tiles, 65_536, name)
    self.assertEqual(found['4 rows, 2 ahead, 5 aside'].rows, 4)

  def test_describe_counts_by_hand(self):
    """LeNet-300-100 on digits; the weights' gradient is dense."""
    figures = accelerator.describe(_values(sparsity=.9, rows=1))
    first, rest, biases = 64 * 300, 300 * 100 + 100 * 10, 410
    self.assertEqual(figures['parameters'], first + rest + biases)
    self.assertAlmostEqual(figures['training_flops'],
                           2 * 8 * (2 * first + 1.2 * rest))
    self.assertEqual((figures['train_steps'], figures['batch_size'],
                      figures['learning_rate']), (2, 8, .05))
    self.assertGreater(figures['optimizer_bytes'], figures['weight_bytes'])

  @parameterized.parameters(
      ({'steps': -1}, r'`steps` \(=-1\) must be at least 0'),
      ({'batch_size': 0}, r'`batch_size` \(=0\) must be at least 1'),
      ({'batch_size': 1438}, r'`batch_size` \(=1438\) must be at most 1437'),
      ({'images': 9}, r'`images` \(=9\) must be at most 8'),
      ({'seed': -1}, r'`seed` \(=-1\) must be'),
      ({'sparsity': 1.}, r'`sparsity` \(=1.0\) must be in \[0, 1\)'),
      ({'rows': 3}, r'`rows` \(=3\) must divide 256'),
      ({'lookaside': 16}, r'`lookaside` \(=16\) must be below'),
      ({'workdir': 'x', 'rows': 1}, "`sparsity` .=None.*`workdir` .='x'"),
      ({'workdir': 'x', 'sparsity': .5}, "one of rows, look.* for a `workdir`"))
  def test_bad_flags_are_named(self, given, message):
    with self.assertRaisesRegex(ValueError, message):
      accelerator.study_all(_values(**given), lambda text: None)

  def test_what_is_no_single_run_cannot_be_described(self):
    with self.assertRaisesRegex(ValueError, r'`sparsity` \(=None\)'):
      accelerator.without_data(_values(rows=1))


if __name__ == '__main__':
  absltest.main()
