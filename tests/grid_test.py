"""Tests of tables of runs: the comparison and the sensitivity study."""

import csv
import os
import tempfile
from unittest import mock

from absl import flags
from absl.testing import absltest
from absl.testing import flagsaver
from absl.testing import parameterized

from experiments.image import compare
from experiments.image import grid
from experiments.image import models
from experiments.image import sensitivity
from experiments.image import train

if not flags.FLAGS.is_parsed():
  flags.FLAGS(['grid_test'])


def _common():
  return train.run_config() | {
      'width': .1, 'train_steps': 20, 'log_every': 10, 'eval_every': 20,
      'checkpoint_every': 20, 'backward_sparsity': None}


class GridTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.outdir = self.enter_context(tempfile.TemporaryDirectory())

  def cells(self, *labels):
    return [grid.Cell(label, None if label == 'dense' else .5, seed, {
        'method': label, 'sparsity': 0. if label == 'dense' else .5})
            for seed in (0, 1) for label in labels]

  def rows(self):
    with open(os.path.join(self.outdir, 'table.csv')) as file:
      return list(csv.DictReader(file))

  def test_leaves_a_table_and_pictures_and_skips_what_is_finished(self):
    cells = self.cells('dense', 'static')
    grid.run(cells[:2], _common(), self.outdir, 'title')
    with mock.patch.object(train, 'train', wraps=train.train) as trained:
      grid.run(cells, _common(), self.outdir, 'title')
    self.assertEqual(trained.call_count, 2)
    dense, static = self.rows()
    self.assertEqual((dense['method'], dense['training_multiplier']),
                     ('dense', '1.0'))
    self.assertEqual((static['sparsity'], static['seeds']), ('0.5', '2'))
    self.assertAlmostEqual(float(static['training_multiplier']), .5, places=2)
    self.assertNotEqual(static['accuracy_std'], '0.0')
    with open(os.path.join(self.outdir, 'table.md')) as file:
      self.assertRegex(file.read(), r'(?s)method .* 0% .* 50%.*dense.*static')
    for name in ('accuracy_vs_sparsity.png', 'accuracy_vs_flops.png'):
      self.assertGreater(os.path.getsize(os.path.join(self.outdir, name)), 5000)

  def test_a_bad_flag_of_the_last_cell_stops_the_first(self):
    cells = self.cells('static')
    cells.append(cells[0]._replace(settings={'method': 'static',
                                             'sparsity': 1.}))
    with self.assertRaisesRegex(ValueError, r'`sparsity` \(=1.0\)'):
      grid.run(cells, _common(), self.outdir, 'title')
    self.assertEmpty(os.listdir(self.outdir))

  def test_windows_are_judged_by_the_length_of_the_run(self):
    """RigL's default window ends at 75% of the run."""
    late = _common() | {'method': 'rigl', 'update_begin': 2000}
    train.check(late | {'train_steps': 3000})
    with self.assertRaisesRegex(ValueError, 'update_begin.*2000'):
      train.check(late | {'train_steps': 2000})


class CompareTest(parameterized.TestCase):

  @flagsaver.flagsaver(
      methods=['dense', 'str', 'swat', 'swat_erk'], sparsities=['.5', '.8'],
      seeds=['0', '1'], settings=[
          'swat_erk.method=swat', 'swat_erk.allocation=erk',
          'str.initial_gate=-6', 'swat.masked_update=true'])
  def test_every_row_at_every_sparsity(self):
    cells = compare.cells()
    self.assertEqual([cell.name for cell in cells if cell.seed == 0], [
        'dense_0_seed0', 'str_0_seed0', 'swat_0.8_seed0', 'swat_erk_0.8_seed0',
        'swat_0.5_seed0', 'swat_erk_0.5_seed0'])
    self.assertLen(cells, 12)
    self.assertEqual(cells[1].settings, {
        'method': 'str', 'initial_gate': -6., 'sparsity': 0.})
    self.assertIs(cells[2].settings['masked_update'], True)
    self.assertEqual(cells[3].settings, {
        'method': 'swat', 'allocation': 'erk', 'sparsity': .8})

  @flagsaver.flagsaver(methods=['small_dense'], sparsities=['0.9'], seeds=['0'],
                       settings=['small_dense.learning_rate=0.5'])
  def test_small_dense_has_as_many_weights_as_a_sparse_network(self):
    cell, = compare.cells()
    self.assertEqual((cell.settings['method'], cell.sparsity), ('dense', .9))
    self.assertEqual(cell.settings['learning_rate'], .5)
    whole, small = (models.kernel_count(models.create(
        'mlp', num_classes=10, width=width), (8, 8, 1))
                    for width in (1., cell.settings['width']))
    self.assertAlmostEqual(small / whole, .1, delta=.002)

  @parameterized.parameters(
      (dict(methods=['rigle']), "`methods` .*'rigle'"),
      (dict(sparsities=['half']), "`sparsities` .*'half'"),
      (dict(seeds=['1.5']), "`seeds` .*'1.5'"),
      (dict(settings=['rigl.sparsity']), "`settings` .*'rigl.sparsity'"),
      (dict(settings=['rigl.nothing=3']), "`settings` .*'rigl.nothing=3'"),
      (dict(settings=['rigl.update_every=few']), "`settings` .*few"))
  def test_a_bad_flag_is_named_with_its_value(self, values, message):
    with flagsaver.flagsaver(**values):
      with self.assertRaisesRegex(ValueError, message):
        compare.cells()


class SensitivityTest(absltest.TestCase):

  def test_one_kind_of_operand_at_a_time(self):
    with flagsaver.flagsaver(sparsities=['.9'], seeds=['0'],
                             operand_period=20):
      dense, *sparse = sensitivity.cells()
      dense = dense.values(_common(), 'here')
    self.assertEqual((dense['method'], dense['operand_period']), ('dense', 1))
    self.assertEqual([cell.settings['operands'] for cell in sparse], [
        ['forward_weight=0.9'], ['forward_activation=0.9'],
        ['backward_weight=0.9', 'backward_activation=0.9'],
        ['output_gradient=0.9']])

  def test_a_cell_trains(self):
    with (flagsaver.flagsaver(sparsities=['.5'], seeds=['0']),
          tempfile.TemporaryDirectory() as outdir):
      grid.run(sensitivity.cells()[-2:], _common() | {'dense_layers': []},
               outdir, 'title', 'operands')
      self.assertIn('output_gradients_0.5_seed0', os.listdir(outdir))


if __name__ == '__main__':
  absltest.main()
