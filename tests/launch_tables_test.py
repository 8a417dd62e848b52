"""The papers' tables as data: complete, as published, and fit to run."""

import pathlib

from absl.testing import absltest
from absl.testing import parameterized

from experiments.image import builders
from experiments.image import input_pipeline
from experiments.image import models
from launch import describe
from launch import table as table_lib
from launch import tables
from launch.tables import comparisons
from tests import kernel_count

_ROOT = pathlib.Path(__file__).parents[1]
_ALL = [(name, scale) for name in tables.TABLES for scale in table_lib.SCALES]


def _commands(name, scale):
  table = tables.get(name, scale)
  return table.binary, [each.arguments('here')
                        for each in table_lib.runs(table, [0])]


def _published(name):
  """{(row, column): number}."""
  return {(point.row, point.column): point.published
          for point in tables.get(name, 'paper').points}


class TablesTest(parameterized.TestCase):

  @parameterized.parameters(*_ALL)
  def test_laws_of_every_table(self, name, scale):
    table = tables.get(name, scale)
    self.assertEqual(table.name, name)
    self.assertNotEmpty(table.title)
    places = [(point.row, point.column) for point in table.points]
    self.assertEqual(len(set(places)), len(places))
    runs = table_lib.runs(table)
    self.assertEqual(len({each.name for each in runs}), len(runs))
    for each in runs:
      self.assertRegex(each.name, r'^[a-z0-9._]+$')
    for point in table.points:
      if point.step is None:
        self.assertIn(point.metric, table_lib.METRICS)
      self.assertTrue(point.published is None or point.published >= 0)
      self.assertTrue(table.figure is None or table.figure.x
                      or point.x is not None)

  def test_both_scales_print_the_same_numbers(self):
    for name in tables.TABLES:
      paper, small = (tables.get(name, scale).points
                      for scale in table_lib.SCALES)
      self.assertEqual([(point.row, point.published) for point in paper],
                       [(point.row, point.published) for point in small])

  @parameterized.parameters(
      ('top_kast_fig2b', 'Top-KAST 90%', 'backward 80%', 73.03),
      ('top_kast_fig2b', 'SET 90%', 'backward 90%', 69.6),
      ('top_kast_fig2a', 'Top-KAST 5x', 'backward 80%', 74.58),
      ('top_kast_fig2c', 'RigL 99%', '10x', 63.9),
      ('top_kast_fig3c', 'forward 90%', 'backward 90%', 1.0835),
      ('top_kast_table1', 'random B outside A', '90/80', 74.76),
      ('top_kast_table2', 'Top-KAST 90/60, 27.7M', 'bits per character', 1.03),
      ('top_kast_table3', '95/90, 14.3M', 'perplexity', 32.2),
      ('top_kast_table5', '90/80', 'Top-KAST', 1.10),
      ('top_kast_table6', '95/90', 'every 100 steps', 70.38),
      ('top_kast_appendix_b', 'S 90%', 'backward 80%', 73.07),
      ('swat_fig1', 'VGG-16, forward activations', '90%', 7.2),
      ('swat_fig2', 'ResNet-18, output gradients', '90%', 46.6),
      ('swat_period', '90%', 'every 1000 steps', 73.63),
      ('swat_cifar10', 'VGG-16', 'SWAT-M', 93.41),
      ('swat_cifar10', 'WRN-16-8', 'SWAT-ERK, FLOPs saved', 91.4),
      ('swat_cifar10_structured', 'ResNet-18', '70%', 94.65),
      ('swat_cifar100_structured', 'DenseNet-121', '50%', 78.7),
      ('swat_imagenet', 'SWAT-ERK', '80%', 76.0),
      ('swat_imagenet', 'SNFS', '90%, inference FLOPs saved', 59.7),
      ('swat_imagenet_structured', 'SWAT-U', '60%', 76.35),
      ('resnet50_published', 'RigL ERK, 5x', '95%', 74.63),
      ('resnet50_published', 'AC/DC', '98%', 68.48),
      ('resnet50_published', 'STR', '98.05%', 61.46),
      ('swat_accelerator', '90%', 'backward', 6.3))
  def test_published_numbers(self, name, row, column, number):
    self.assertEqual(_published(name)[row, column], number)

  def test_a_small_table_says_what_it_trains_instead(self):
    for name, ran in (('top_kast_fig2b', ' (small: mlp on fashion_mnist)'),
                      ('field_next', '')):
      titles = {scale: tables.get(name, scale).title
                for scale in ('small', 'paper')}
      self.assertEqual(titles['small'], titles['paper'] + ran)

  def test_numbers_of_one_run_share_it(self):
    table = tables.get('swat_imagenet', 'paper')
    self.assertLen(table_lib.runs(table, [0]), 14)
    mine = [point for point in table.points if point.row == 'SWAT-U']
    self.assertLen(mine, 6)
    self.assertEqual({name for point, name in table_lib.named(table.points)
                      if point in mine}, {'swat_u_80', 'swat_u_90'})
    self.assertLen(table_lib.runs(table), 3 * 14)

  @parameterized.parameters(*comparisons.NARROW)
  def test_small_dense_has_as_many_weights_as_a_sparse_network(
      self, model, dataset, width):
    spec = input_pipeline.DATASETS[dataset]
    whole, *small = (kernel_count.of_images(models.create(
        model, num_classes=spec.num_classes, width=each), spec.image_shape)
                     for each in (width, *comparisons.NARROW[
                         model, dataset, width].values()))
    for sparsity, count in zip(comparisons.NARROW[model, dataset, width],
                               small, strict=True):
      self.assertAlmostEqual(count / whole, 1 - sparsity / 100, delta=.01)

  def test_one_kind_of_operand_at_a_time(self):
    dense, *sparse = tables.get('sensitivity_cifar10', 'small').points
    self.assertNotIn('operands', dense.flags)
    self.assertEqual([point.flags['operands'] for point in sparse
                      if point.x == 90], [
        ['forward_weight=0.9'], ['forward_activation=0.9'],
        ['backward_weight=0.9', 'backward_activation=0.9'],
        ['output_gradient=0.9']])

  def test_unknown_names_are_named(self):
    with self.assertRaisesRegex(ValueError, "`table` .='table_9'.* must be"):
      tables.get('table_9', 'paper')
    with self.assertRaisesRegex(ValueError, "`scale` .='huge'.* must be"):
      tables.get('top_kast_table1', 'huge')

  def test_points_of_one_name_and_other_flags_are_refused(self):
    points = [table_lib.Point('A b', 'c', 1., {'rate': rate})
              for rate in (1, 2)]
    with self.assertRaisesRegex(ValueError, "`points` .*named 'a_b_c'"):
      table_lib.named(points)

  @parameterized.parameters((None,), ({'x': 1},))
  def test_a_value_that_no_flag_has_is_refused(self, value):
    with self.assertRaisesRegex(ValueError, r'`rate` \(='):
      table_lib.argument('rate', value)

  def test_the_readme_lists_every_table(self):
    text = (_ROOT / 'launch' / 'README.md').read_text()
    for name in tables.TABLES:
      self.assertIn(f'`{name}`', text)


class FlagsTest(parameterized.TestCase):
  """What the binaries make of the tables' flags; each takes seconds to start.
  """

  def test_every_cell_is_a_run_of_its_binary(self):
    commands = {}
    for name, scale in _ALL:
      binary, found = _commands(name, scale)
      commands.setdefault(binary, []).extend(found)
    self.assertGreater(len(commands['experiments.image.train']), 300)
    self.assertGreater(len(commands['experiments.language.train']), 50)
    for binary, found in commands.items():
      self.assertLen(describe.ask(binary, found, False), len(found))

  def test_flags_that_parse_and_make_no_run_are_errors(self):
    with self.assertRaisesRegex(ValueError, '(?s)sparsity=2.*is no run of it'):
      describe.ask('experiments.image.train', [
          ['--sparsity=.9'], ['--sparsity=2']], False)

  def test_sizes_are_those_of_the_data(self):
    digits = builders.Digits.read(None, None)
    self.assertLen(digits['train'].labels,
                   input_pipeline.DATASETS['digits'].num_train)


class DescribeTest(parameterized.TestCase):
  """Figures of small networks, from shapes alone, in one process."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    recipes = {
        'top_kast': _commands('top_kast_table6', 'paper')[1][0],
        'longer': next(command for command in _commands(
            'top_kast_fig2a', 'paper')[1] if '--train_steps=160000' in command),
        'swat': next(command for command in _commands(
            'swat_cifar10', 'paper')[1] if '--model=wrn_16_8' in command)}
    commands = {name: [*command, '--model=mlp', '--dropout=0']
                for name, command in recipes.items()}
    base = ['--dataset=digits', '--model=mlp', '--train_steps=20',
            '--batch_size=32', '--optimizer=momentum']
    commands |= {
        'dense': [*base, '--method=dense'],
        'sparse': [*base, '--method=top_kast', '--sparsity=0.9',
                   '--backward_sparsity=0.8', '--seed=3'],
        'without_data': ['--dataset=cifar10', '--train_epochs=2', '--model=mlp',
                         f'--data_dir={_ROOT / "no" / "data"}']}
    cls.answers = dict(zip(commands, describe.ask(
        'experiments.image.train', list(commands.values()), True), strict=True))

  @parameterized.parameters(
      ('top_kast', 32_000, 4096, 1.6), ('longer', 160_000, 4096, 1.6),
      ('swat', 200 * 390, 128, .1))
  def test_published_schedules(self, name, steps, batch_size, rate):
    """Top-KAST's appendix B, SWAT's code, with a small network."""
    figures = self.answers[name]['figures']
    self.assertEqual(figures['train_steps'], steps)
    self.assertEqual(figures['batch_size'], batch_size)
    self.assertAlmostEqual(figures['learning_rate'], rate, places=6)

  def test_rates_drop_after_the_published_epochs(self):
    epoch = input_pipeline.DATASETS['imagenet2012'].num_train / 4096
    drops = self.answers['top_kast']['values']['lr_drops']
    for share, epochs in zip(drops, (30, 70, 90), strict=True):
      self.assertAlmostEqual(float(share) * 32_000, epochs * epoch, delta=.1)

  def test_costs_of_a_network_that_can_be_counted_by_hand(self):
    """LeNet-300-100 on digits: 64, 300, 100, 10 units."""
    dense, top_kast = (self.answers[name]['figures']
                       for name in ('dense', 'sparse'))
    first, rest, biases = 64 * 300, 300 * 100 + 100 * 10, 410
    self.assertEqual(dense['parameters'], first + rest + biases)
    self.assertEqual(dense['weight_bytes'], 4 * dense['parameters'])
    self.assertEqual(dense['training_flops'],
                     20 * 32 * (2 * first + 3 * rest))
    self.assertAlmostEqual(
        top_kast['training_flops'], 20 * 32 * (.3 * first + .4 * rest))
    # Momentum, a byte of masks a weight, and a few counters.
    slots = dense['weight_bytes'] + first + rest
    self.assertBetween(top_kast['optimizer_bytes'], slots, slots + 100)
    self.assertGreater(dense['activation_bytes'], 32 * 4 * (64 + 300 + 100))

  def test_the_length_of_a_run_is_known_without_its_data(self):
    self.assertEqual(self.answers['without_data']['figures']['train_steps'],
                     2 * 390)


if __name__ == '__main__':
  absltest.main()
