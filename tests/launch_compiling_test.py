"""Compiling a table's steps for chips that are not there."""

import importlib.util
import os
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized

from launch import compiling
from launch import describe
from launch import run
from launch import tables

_FITS = {'gib': 1.5, 'state_gib': .25, 'ordinary_ms': 2., 'refresh_ms': 3.,
         'unknown': {'sort': 2}, 'collectives': {'all-reduce': 10.},
         'seconds': 4.}
_FOUND = {'chip': 'TPU v5 lite', 'chips': 8, 'hbm_gib': 16,
          'step': _FITS, 'dense': {**_FITS, 'ordinary_ms': 1.6}}


class TableTest(parameterized.TestCase):

  def test_a_step_stands_below_the_dense_one(self):
    _, _, dense, own, _, text, *_ = compiling.table({'a': _FOUND}).split('\n')
    cells = lambda line: [cell.strip() for cell in line.split('|')[1:-1]]
    self.assertEqual(cells(dense)[:5], ['a', 'dense', '1.5 of 16', '0.25',
                                        '1.6'])
    self.assertEqual(cells(own), [
        'a', 'its own', '1.5 of 16', '0.25', '2', '3', '1.250',
        'all-reduce 10.0', '2 sorts', '4'])
    self.assertIn('not run', text)
    self.assertTrue(compiling.fits({'a': _FOUND}))

  def test_what_does_not_fit_is_a_status_with_the_numbers(self):
    values = {**_values(), 'compile': 'v5e:2x4'}
    found = {**_FOUND, 'step': {'needed': '107G of 15.75G'}}
    table = tables.get('compare_fashion_mnist', 'small')
    cell = run.cells({**values, 'sweep_dir': 'sweep', 'compile': None},
                     table)[0]
    with mock.patch.object(run, 'cells', lambda *_: [
        cell._replace(compiled=found)]), mock.patch.object(
            compiling, 'check'), mock.patch('builtins.print') as said:
      self.assertEqual(run.run(values, table), 1)
    self.assertIn('does not fit: 107G of 15.75G', said.call_args.args[0])

  @parameterized.parameters(
      (dict(compile='v5e:2x4', dry_run=False), '`compile`.*--dry_run'),
      (dict(compile='v5e:2x4', libtpu=None), '`compile`.*\\[aot\\]'),
      (dict(compile='pod', libtpu='there'), '`compile` .=\'pod\''))
  def test_bad_flags(self, changes, message):
    changes = dict(changes)
    spec = changes.pop('libtpu', None)
    with mock.patch.object(importlib.util, 'find_spec', lambda name: spec):
      with self.assertRaisesRegex(ValueError, message):
        run.check({**_values(), **changes})


def _values():
  from absl import flags
  given = flags.FlagValues()
  run.define_flags(given)
  given(['run', '--table=compare_fashion_mnist', '--rows=^static',
         '--seeds=0', '--dry_run'])
  return given.flag_values_dict()


@absltest.skipIf(importlib.util.find_spec('libtpu') is None,
                 'the TPU compiler (libtpu) is not installed')
class CompileTest(absltest.TestCase):

  def ask(self, *flags):
    with mock.patch.dict(os.environ):
      answer, = describe.ask('experiments.image.train', [[
          '--dataset=digits', '--sparsity=.9', '--batch_size=16', *flags]],
                             False, 'v5e:2x4')
    return answer['compiled']

  def test_a_refresh_costs_more_and_gradients_are_summed(self):
    found = self.ask('--method=rigl', '--update_every=10', '--width=2')
    self.assertEqual((found['chip'], found['chips']), ('TPU v5 lite', 8))
    step, dense = found['step'], found['dense']
    self.assertGreater(step['refresh_ms'], step['ordinary_ms'])
    self.assertGreater(step['ordinary_ms'], dense['ordinary_ms'])
    self.assertEqual(step['collectives'].keys(), {'all-reduce'})
    self.assertAlmostEqual(step['collectives']['all-reduce'],
                           dense['collectives']['all-reduce'], delta=.01)

  def test_too_large_says_by_how_much(self):
    found = self.ask('--method=static', '--width=220')
    self.assertRegex(found['step']['needed'], r'^[\d.]+G of 15.75G$')
    self.assertFalse(compiling.fits({'a': found}))


if __name__ == '__main__':
  absltest.main()
