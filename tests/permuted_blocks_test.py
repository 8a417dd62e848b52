"""The study of blocks: what it measures, and what it leaves."""

import os
import tempfile
from unittest import mock

from absl.testing import absltest
import jax
import jax.numpy as jnp

from tests import own_flags

with own_flags.OwnFlags():  # Other programs have the same names.
  from experiments import permuted_blocks


class PermutedBlocksStudyTest(absltest.TestCase):

  def test_rows_tables_and_pictures(self):
    keys = jax.random.split(jax.random.key(0))
    data = (jax.random.normal(keys[0], (400, 12)), jnp.arange(400) % 10)
    fewer = {'magnitude': ('blocks', 'permuted'), 'snip': ('permuted',)}
    with mock.patch.dict(permuted_blocks.ARRANGEMENTS, fewer):
      rows = list(permuted_blocks.study(
          data, data, methods=list(fewer), blocks=[4], sparsities=[75.],
          seeds=[0], width=16, steps=8, tune_steps=1, scratch_steps=1))
    found = {(row['method'], row['arrangement']): row for row in rows}
    self.assertLen(found, len(rows))
    self.assertEqual(found['magnitude', 'entries']['kept'], 25.)
    self.assertNotEqual(found['magnitude', 'blocks']['pruned'],
                        found['magnitude', 'permuted']['pruned'])
    for row in rows[1:]:
      self.assertBetween(row['kept'], 20., 30.)
    with tempfile.TemporaryDirectory() as folder:
      self.assertIn('permuted', permuted_blocks.write(rows, folder))
      self.assertEqual(sorted(os.listdir(folder)), [
          'magnitude.png', 'rows.csv', 'snip.png', 'table.md'])


if __name__ == '__main__':
  absltest.main()
