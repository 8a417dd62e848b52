"""Tests of experiments/prune.py."""

import json
import os
import tempfile

from absl import flags
from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np

from sparse_jax import trees
from experiments import prune
from experiments import training
from experiments.image import train

if not flags.FLAGS.is_parsed():
  flags.FLAGS(['prune_test'])

Settings = prune.Settings


class StudyTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.workdir = cls.enterClassContext(tempfile.TemporaryDirectory())
    train.train(train.run_config() | {
        'method': 'dense', 'sparsity': 0., 'width': .1, 'train_steps': 40,
        'log_every': 20, 'eval_every': 40, 'checkpoint_every': 40,
        'workdir': cls.workdir})

  def test_every_rule_and_what_is_left(self):
    settings = Settings(sparsity=[.5], calibration_batches=2,
                        dense_layers=['head'], fine_tune_steps=4)
    rows = prune.study(self.workdir, settings)
    self.assertEqual([row['by'] for row in rows],
                     ['dense', 'magnitude', 'wanda', 'sparsegpt'])
    for row in rows[1:]:
      self.assertAlmostEqual(row['sparsity'], .5, delta=.02)
      self.assertGreaterEqual(row['effective_sparsity'], row['sparsity'])
    for row in rows:
      self.assertBetween(row['pruned'], 0, 1)
      self.assertBetween(row['fine_tuned'], 0, 1)
    with open(os.path.join(self.workdir, 'one_shot.json')) as file:
      written = json.load(file)
    self.assertEqual((written['rows'], written['metric']), (rows, 'accuracy'))
    with open(os.path.join(self.workdir, 'one_shot.md')) as file:
      self.assertLen(file.read().splitlines(), 6)

  def test_zeros_stay_zeros(self):
    _, run = prune.open_run(self.workdir)
    state = training.last_state(run)
    settings = Settings(pattern='1:4', calibration_batches=1,
                        fine_tune_steps=3, dense_layers=['head'])
    examples = prune.calibration(run, state, 1)
    params = prune.prune(run, state, examples, 'wanda', .75, settings)
    pruned = prune.settled(run, state, params, examples)
    masks = prune.masks_of(params)
    tuned = prune.fine_tune(run, pruned, masks, settings)
    before, after, masks = map(trees.leaves_by_path,
                               (params, tuned.params, masks))
    self.assertNotEmpty(masks)
    for path, mask in masks.items():
      self.assertNotIn('head', path)
      self.assertTrue((np.asarray(after[path])[~np.asarray(mask)] == 0).all())
    for path, leaf in after.items():
      self.assertTrue((leaf != before[path]).any(), path)
    self.assertTrue(all(leaf.is_deleted() is False
                        for leaf in jax.tree.leaves(params)))

  def test_refused(self):
    for settings, message in (
        (Settings(by=['obs']), '`by`.*obs'),
        (Settings(sparsity=[1.]), '`sparsity`'),
        (Settings(pattern='4:2'), '`pattern`.*4:2'),
        (Settings(dense_layers=['(']), '`dense_layers`'),
        (Settings(calibration_batches=0), '`calibration_batches`'),
        (Settings(fine_tune_learning_rate=0.), '`fine_tune_learning_rate`'),
        (Settings(dense_layers=['']), '`dense_layers`.*head')):
      with self.assertRaisesRegex(ValueError, message):
        prune.study(self.workdir, settings)

  def test_folders_that_are_no_dense_run(self):
    with tempfile.TemporaryDirectory() as folder:
      with self.assertRaisesRegex(FileNotFoundError, '`run`'):
        prune.open_run(folder)
      for result, message in (
          ({'program': 'os'}, '`run`.*\'os\''),
          ({'program': prune.PROGRAMS[0], 'flags': {'method': 'rigl'}},
           '`run`.*rigl')):
        with open(os.path.join(folder, 'result.json'), 'w') as file:
          json.dump(result, file)
        with self.assertRaisesRegex(ValueError, message):
          prune.open_run(folder)


if __name__ == '__main__':
  absltest.main()
