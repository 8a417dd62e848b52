"""Tables and figures of results that were made up."""

import csv
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from absl.testing import absltest
from absl.testing import parameterized

from launch import collect
from launch import table as table_lib
from launch.tables import comparisons

_ROOT = pathlib.Path(__file__).parents[1]
_PNG = b'\x89PNG'
_TABLE = table_lib.Table('name', 'Title', (
    table_lib.Point('RigL', '80%', 74.6, {'method': 'rigl'}),
    table_lib.Point('RigL', '80%, FLOPs saved', 67.2, {'method': 'rigl'},
                    'training_reduction'),
    table_lib.Point('Top-KAST', '80%', 75.03, {'method': 'top_kast'},
                    deviation=.1),
    table_lib.Point('quoted', '80%', 75.95, None)), seeds=(0, 1), note='Note.')


def _result(accuracy, **flags):
  return {'test_accuracy': accuracy, 'flags': flags, 'steps': 100,
          'cost': {'training_multiplier': .35, 'training_multiplier_rigl': .4,
                   'flops': 10.}}


class CollectTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.sweep = self.enterContext(tempfile.TemporaryDirectory())

  def leave(self, name, result, metrics=()):
    folder = pathlib.Path(self.sweep, 'cells', name)
    folder.mkdir(parents=True)
    folder.joinpath('result.json').write_text(json.dumps(result))
    folder.joinpath('metrics.jsonl').write_text(''.join(
        json.dumps(row) + '\n' for row in metrics))

  def collect(self, table=_TABLE, **values):
    return collect.collect({'sweep_dir': self.sweep, 'seeds': None,
                            'outdir': None, 'table': 'name', 'scale': 'small',
                            'rows': []}
                           | values, table)

  def rows(self):
    with open(os.path.join(self.sweep, 'table.csv')) as file:
      return list(csv.DictReader(file))

  def test_a_partial_table(self):
    for seed, accuracy in ((0, .74), (1, .75)):
      self.leave(f'rigl_80_seed{seed}', _result(accuracy, method='rigl'))
    self.assertEqual(self.collect(), """\
**Title.** 2 of 3 numbers are there. Note.

| row      | 80%, published | 80%, ours    | 80%, difference | \
80%, FLOPs saved, published | 80%, FLOPs saved, ours | \
80%, FLOPs saved, difference |
|:---------|:---------------|:-------------|:----------------|\
:----------------------------|:-----------------------|\
:-----------------------------|
| RigL     | 74.60          | 74.50 ± 0.71 | -0.10           | \
67.2                        | 65.0 ± 0.0             | \
-2.2                         |
| Top-KAST | 75.03 ± 0.10   |              |                 | \
                            |                        | \
                             |
| quoted   | 75.95          |              |                 | \
                            |                        | \
                             |
""")
    rigl, saved, top_kast, _ = self.rows()
    self.assertAlmostEqual(float(rigl['ours']), 74.5)
    self.assertAlmostEqual(float(rigl['difference']), -.1)
    self.assertAlmostEqual(float(rigl['deviation']), .5**.5, places=5)
    self.assertEqual((rigl['seeds'], saved['metric']),
                     ('2', 'training_reduction'))
    self.assertEqual((top_kast['ours'], top_kast['published_deviation']),
                     ('', '0.1'))
    self.assertFalse(os.path.exists(os.path.join(self.sweep, 'figure.png')))

  def test_seeds_are_those_asked_for(self):
    for seed, accuracy in ((0, .74), (1, .76), (2, .9)):
      self.leave(f'rigl_80_seed{seed}', _result(accuracy, method='rigl'))
    self.collect(seeds=['1', '2'])
    self.assertAlmostEqual(float(self.rows()[0]['ours']), 83.)

  def test_flags_that_are_not_the_tables_are_named(self):
    self.leave('rigl_80_seed0', _result(.74, method='set'))
    self.assertIn("other flags than the table's: method.", self.collect())

  def test_many_columns_give_a_line_a_point(self):
    points = tuple(table_lib.Point('RigL', f'{i}%', 70. + i, {'sparsity': i})
                   for i in range(5))
    self.leave('rigl_3_seed0', _result(.7, sparsity=3))
    text = self.collect(_TABLE._replace(points=points))
    self.assertIn('| RigL | 3%     | 73.00     | 70.00 | -3.00      |', text)

  def test_a_figure_is_placed_by_flops_beside_the_largest_network(self):
    figure = table_lib.Figure('FLOPs', 'accuracy', 'training_flops', True, 50)
    table = _TABLE._replace(figure=figure)
    wide = _result(.75, method='top_kast')
    wide['cost']['flops'] = 20.
    self.leave('rigl_80_seed0', _result(.74, method='rigl'))
    self.leave('top_kast_80_seed0', wide)
    self.collect(table)
    rigl, _, top_kast, _ = self.rows()
    self.assertAlmostEqual(float(rigl['x']), .4 * 100 / 50 * 10 / 20)
    self.assertAlmostEqual(float(top_kast['x']), .4 * 100 / 50)
    png = pathlib.Path(self.sweep, 'figure.png').read_bytes()
    self.assertStartsWith(png, _PNG)
    self.assertGreater(len(png), 5000)

  def test_a_point_of_a_step_is_a_fraction_of_that_row(self):
    point = table_lib.Point('mean', 'step 5', 21.2, {}, 'mask_change_mean',
                            x=5., step=10)
    self.leave('mean_step_5_seed0', _result(.7), [
        {'step': 5, 'mask_change_mean': .5},
        {'step': 10, 'mask_change_mean': .25}])
    later = point._replace(column='step 9', step=14)
    table = _TABLE._replace(points=(point, later),
                            figure=table_lib.Figure('x', 'y'))
    self.collect(table)
    row, blank = self.rows()
    self.assertEqual((row['ours'], row['x'], row['published_x']),
                     ('25.0', '5.0', '5.0'))
    self.assertEqual((blank['ours'], blank['seeds']), ('', '0'))
    with self.assertRaisesRegex(ValueError, 'has no churn for mean, step 5'):
      self.collect(table._replace(points=(point._replace(metric='churn'),)))

  def test_a_table_of_our_own_is_a_line_a_row_and_two_figures(self):
    table = comparisons.compare(
        'name', 'Title', {'model': 'mlp'}, {
            'dense': {'method': 'dense'}, 'RigL': {'method': 'rigl'}},
        (80, 90), seeds=(0,))
    for name, accuracy, sparsity, cost in (
        ('dense_own', .9, 0., 1.), ('rigl_80', .8, .8, .3),
        ('rigl_90', .7, .9, .2)):
      result = _result(accuracy) | {'sparsity': sparsity}
      result['cost']['training_multiplier'] = cost
      self.leave(f'{name}_seed0', result)
    text = self.collect(table).partition('\n\n')[2]
    self.assertEqual(text, """\
| row   | own   | sparsity | 80%   | 90%   |
|:------|:------|:---------|:------|:------|
| dense | 90.00 | 0.0      |       |       |
| RigL  |       |          | 80.00 | 70.00 |
""")
    self.assertEqual([row['x'] for row in self.rows()],
                     ['0.0', '0.0', '80.0', '90.0'])
    for name in ('figure.png', 'figure_flops.png'):
      self.assertGreater(os.path.getsize(os.path.join(self.sweep, name)), 5000)

  def test_effective_sparsity_stands_beside_the_accuracy(self):
    table = comparisons.compare('name', 'Title', {'model': 'mlp'}, {
        'dense': {'method': 'dense'}, 'SET': {'method': 'set'}}, (98,),
                                seeds=(0, 1), effective=True)
    for seed, effective in ((0, .99), (1, .995)):
      result = _result(.8) | {'sparsity': .98, 'effective_sparsity': effective}
      self.leave(f'set_98_seed{seed}', result)
    text = self.collect(table).partition('\n\n')[2]
    self.assertIn('| SET   |     |          | 80.00 ± 0.00 | 99.2 ± 0.4     |',
                  text)
    self.leave('set_98_seed2', result | {'effective_sparsity': None})
    with self.assertRaisesRegex(ValueError, 'has no effective_sparsity for '
                                'SET, 98%, effective'):
      self.collect(table, seeds=['2'])

  def test_rows_are_those_asked_for(self):
    self.leave('rigl_80_seed0', _result(.74, method='rigl'))
    text = self.collect(rows=['^RigL$', 'nothing'])
    self.assertIn('RigL', text)
    self.assertNotIn('Top-KAST', text)
    with self.assertRaisesRegex(ValueError, "`rows` .='nothing'. must match"):
      self.collect(rows=['nothing'])

  def test_what_is_missing_or_broken_is_named(self):
    with self.assertRaisesRegex(ValueError, '`sweep_dir` .*must be a folder'):
      self.collect(sweep_dir=os.path.join(self.sweep, 'absent'))
    self.leave('rigl_80_seed0', {'flags': {}})
    with self.assertRaisesRegex(ValueError, 'result.json has no accuracy for '
                                "RigL, 80%: KeyError.'test_accuracy'"):
      self.collect()
    path = pathlib.Path(self.sweep, 'cells', 'rigl_80_seed0', 'result.json')
    path.write_text('{')
    with self.assertRaisesRegex(ValueError, 'result.json is damaged'):
      self.collect()

  def test_the_program_says_what_it_lacks(self):
    done = subprocess.run(
        [sys.executable, '-m', 'launch.collect', '--table=swat_fig1',
         f'--sweep_dir={self.sweep}/absent'], cwd=_ROOT, capture_output=True,
        text=True, check=False)
    self.assertEqual(done.returncode, 2)
    self.assertIn('must be a folder in which', done.stderr)


if __name__ == '__main__':
  absltest.main()
