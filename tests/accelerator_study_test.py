"""The study of an array that skips zeros, as the runner of tables uses it."""

import json
import os
import tempfile
from unittest import mock

from absl import flags
from absl.testing import absltest
from absl.testing import parameterized

from experiments.image import train  # noqa: F401 (flags of other tests, too)
from tests import fast_compiler
from tests import own_flags

with own_flags.OwnFlags(known=True) as _FLAGS:  # It changes their defaults.
  from experiments.benchmarks import accelerator


def setUpModule():
  fast_compiler.use()


def tearDownModule():
  fast_compiler.leave()


def _values(**given):
  """Flags of a small network, by name."""
  flags.FLAGS.unparse_flags()
  flags.FLAGS(['accelerator', '--model=mlp', '--steps=2', '--batch_size=8',
               '--images=2'])
  return accelerator.run_config() | given


class AcceleratorStudyTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.enter_context(_FLAGS)

  def test_a_run_leaves_what_it_was_asked_for_and_found(self):
    speedups = {}
    for sparsity in (0., .9):
      with tempfile.TemporaryDirectory() as folder:
        values = _values(sparsity=sparsity, rows=1, lookahead=9, lookaside=10,
                         workdir=os.path.join(folder, 'new'))
        with mock.patch('builtins.print') as shown:
          accelerator.run(values)
        with open(os.path.join(values['workdir'], 'result.json')) as file:
          result = json.load(file)
      self.assertEqual(result['flags'], values)
      table, last = (call.args[0] for call in shown.call_args_list)
      self.assertEqual(table.count('kernel'), 3)
      for part in ('forward', 'backward'):
        self.assertIn(f'{part} {result[f"{part}_speedup"]:.2f}', last)
      speedups[sparsity] = result['forward_speedup']
    # Two of three layers have a tenth of their weights.
    self.assertGreater(speedups[.9], 1.5 * speedups[0.])
    self.assertLess(speedups[.9], 10.)

  def test_the_seed_draws_weights_and_batches(self):
    values = _values(sparsity=.5, rows=1)
    first, second, again = ({name: value for name, value in accelerator.run(
        values | {'seed': seed}).items() if name != 'flags'}
                            for seed in (0, 1, 0))
    self.assertEqual(first, again)
    self.assertNotEqual(first, second)

  def test_arrays_have_one_size(self):
    for given in ({}, {'rows': 1}, {'rows': 4, 'lookaside': 1}):
      machine = accelerator.machine_of(_values(**given))
      self.assertEqual(machine.lanes * machine.columns * machine.rows
                       * machine.tiles, 65_536)
      self.assertEqual((machine.rows, machine.lookahead, machine.lookaside),
                       (given.get('rows', 16), 2, given.get('lookaside', 5)))

  def test_defaults_hold_for_every_command_line(self):
    for _ in range(2):  # An alias could take them away.
      flags.FLAGS.unparse_flags()
      flags.FLAGS(['accelerator'])
      values = accelerator.run_config()
      self.assertEqual((values['train_steps'], values['method']), (100, 'dnw'))

  def test_a_flag_that_does_nothing_here_is_an_error(self):
    for name, value in (('eval_every', 5), ('distributed', True)):
      flags.FLAGS.unparse_flags()
      flags.FLAGS(['accelerator', f'--{name}={value}'])
      with self.assertRaisesRegex(ValueError, rf'`{name}` \(={value}\)'):
        accelerator.check_given()
    flags.FLAGS.unparse_flags()
    flags.FLAGS(['accelerator', '--rows=1'])
    accelerator.check_given()

  def test_describe_counts_by_hand(self):
    """LeNet-300-100 on digits; the weights' gradient is dense."""
    figures = accelerator.describe(_values(sparsity=.9, rows=1))
    first, rest, biases = 64 * 300, 300 * 100 + 100 * 10, 410
    self.assertEqual(figures['parameters'], first + rest + biases)
    self.assertAlmostEqual(figures['training_flops'],
                           2 * 8 * (2 * first + 1.2 * rest))
    self.assertEqual((figures['train_steps'], figures['batch_size']), (2, 8))
    self.assertAlmostEqual(figures['learning_rate'], .05)
    self.assertGreater(figures['optimizer_bytes'], figures['weight_bytes'])

  @parameterized.parameters(
      ({'train_steps': -1}, r'`train_steps` \(=-1\) must be a positive'),
      ({'batch_size': 0, 'images': 0}, r'`images` \(=0\) must be'),
      ({'batch_size': 1438, 'images': 1438}, r'`batch_size` \(=1438\) must'),
      ({'images': 0}, r'`images` \(=0\) must be in \[1, 8\]'),
      ({'images': 9}, r'`images` \(=9\) must be in \[1, 8\]'),
      ({'seed': -1}, r'`seed` \(=-1\) must be'),
      ({'sparsity': 1.}, r'`sparsity` \(=1.0\) must be in \[0, 1\)'),
      ({'rows': 3}, r'`rows` \(=3\) must divide 256'),
      ({'lookaside': 16}, r'`lookaside` \(=16\) must be below'))
  def test_bad_flags_are_named(self, given, message):
    with self.assertRaisesRegex(ValueError, message):
      accelerator.run(_values(**given))


if __name__ == '__main__':
  absltest.main()
