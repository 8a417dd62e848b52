"""The study of learning rates: what it measures, and what it leaves."""

import os
import tempfile

from absl.testing import absltest
import numpy as np

from tests import own_flags

with own_flags.OwnFlags():  # Other programs have the same names.
  from experiments import supar

SIZE = dict(width=8, depth=1, steps=3)


class SuparStudyTest(absltest.TestCase):

  def test_rates_matter_and_a_dense_network_is_the_same_in_both(self):
    rates = [2.**-9, 2.**-6]
    one, two = (supar.final_losses(0., rates, kind, 0, **SIZE)
                for kind in supar.KINDS)
    np.testing.assert_array_equal(one, two)
    self.assertNotEqual(one[0], one[1])
    sparse = [supar.final_losses(.75, rates, kind, 0, **SIZE)
              for kind in supar.KINDS]
    self.assertTrue(np.all(np.array(sparse[0]) != np.array(sparse[1])))

  def test_tables_and_pictures(self):
    rows = [{'kind': kind, 'sparsity': sparsity, 'rate': 2.**-power,
             'loss': 1 + (power - 8 + (kind == 'standard') * sparsity / 50)**2}
            for kind in supar.KINDS for sparsity in (0., 50.)
            for power in range(4, 12)]
    best = {(row['kind'], row['sparsity']): row for row in supar.summary(rows)}
    self.assertAlmostEqual(best['standard', 50.]['over the first'], 2.,
                           places=6)
    self.assertAlmostEqual(best['supar', 50.]['over the first'], 1., places=6)
    self.assertEqual(best['standard', 50.]['loss at the first best'], 2.)
    with tempfile.TemporaryDirectory() as folder:
      self.assertIn('standard', supar.write(rows, folder))
      self.assertEqual(sorted(os.listdir(folder)), [
          'best_rate.png', 'loss_standard.png', 'loss_supar.png', 'table.csv',
          'table.md'])


if __name__ == '__main__':
  absltest.main()
