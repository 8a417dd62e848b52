"""Tests of experiments/prune.py."""

import json
import os
import tempfile

from absl import flags
from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np

import sparse_jax
from sparse_jax import trees
from experiments import prune
from experiments import pruning
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
    self.assertEqual({row['steps'] for row in rows}, {40})
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
                        dense_layers=['head'])
    examples = prune.calibration(run, state, 1)
    leaves = prune.chosen(run, state, examples, settings)
    params = prune.prune(run, state, examples, 'wanda', .75, leaves,
                         settings.structure)
    pruned = prune.settled(run, state, params, examples)
    masks = prune.masks_of(params)
    tuned = pruning.fine_tune(run, pruned, masks, begin=41, steps=3,
                              learning_rate=1e-3)
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

  def test_rows_that_are_pruned_in_training(self):
    settings = Settings(by=prune.IN_TRAINING, sparsity=[.5], rewind_to=30,
                        calibration_batches=1, dense_layers=['head'])
    rows = prune.study(self.workdir, settings)[1:]
    self.assertEqual([row['by'] for row in rows], list(prune.IN_TRAINING))
    for row in rows:
      self.assertAlmostEqual(row['sparsity'], .5, delta=.02)
      self.assertBetween(row['pruned'], .2, 1)
    # Half in rounds of a fifth: four of them, of ten steps each.
    self.assertEqual([row['steps'] for row in rows], [40 + 4 * 10, 40, 40])

  def test_a_ticket_begins_at_the_early_values(self):
    """Of no round's training, what is kept is as it was at that step."""
    _, run = prune.open_run(self.workdir)
    state = training.last_state(run)
    early = pruning.train_on(run, run.step_fn, pruning.first_state(run), 0, 39)
    path = 'stem/kernel'
    weights, steps = pruning.ticket(run, state.params, .75, {path},
                                    sparse_jax.NM(1, 4), 39)
    self.assertEqual(steps, 41)
    old, last, new = (np.asarray(trees.leaves_by_path(tree)[path]) for tree in (
        early.params, state.params, weights))
    mask = np.asarray(jax.numpy.abs(last)).reshape(-1, 4, last.shape[1])
    kept = (mask == mask.max(1, keepdims=True)).reshape(last.shape)
    np.testing.assert_array_equal(new[~kept], 0)
    # One step of Adam is at most its learning rate or so.
    np.testing.assert_allclose(new[kept], old[kept], atol=.01)
    self.assertTrue((new[kept] != old[kept]).any())

  def test_a_student_learns_from_its_teacher(self):
    """Of the teacher's outputs alone: the teacher itself does not move."""
    _, run = prune.open_run(self.workdir)
    state = training.last_state(run)
    tuned = {}
    for distill in (0., 1.):
      tuned[distill] = pruning.fine_tune(
          run, state, {}, begin=40, steps=2, learning_rate=1e-3,
          teacher=state.params, distill=distill)
    moved = {distill: max(float(abs(a - b).max()) for a, b in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(tuned[distill].params)))
             for distill in tuned}
    self.assertGreater(moved[0.], 1e-5)
    batch = next(run.train_batches(0))
    problem = pruning.Distilled(run.task.problem, state.params, 1.)
    loss, grads = jax.value_and_grad(lambda params: problem.loss(
        params, state.model_state, batch, state.key)[0])(state.params)
    self.assertAlmostEqual(float(loss), 0, delta=1e-5)
    self.assertLess(max(float(abs(leaf).max())
                        for leaf in jax.tree.leaves(grads)), 1e-4)

  def test_refused(self):
    for settings, message in (
        (Settings(by=['obs']), '`by`.*obs'),
        (Settings(sparsity=[1.]), '`sparsity`'),
        (Settings(distill=1.5), '`distill`'),
        (Settings(rewind_to=40), '`rewind_to`.*40'),
        (Settings(pattern='4:2'), '`pattern`.*4:2'),
        (Settings(dense_layers=['(']), '`dense_layers`'),
        (Settings(calibration_batches=0), '`calibration_batches`'),
        (Settings(fine_tune_learning_rate=0.), '`fine_tune_learning_rate`'),
        (Settings(dense_layers=['']), '`dense_layers`.*head')):
      with self.assertRaisesRegex(ValueError, message):
        prune.study(self.workdir, settings)

  def test_folders_that_are_no_dense_run(self):
    with tempfile.TemporaryDirectory() as folder:
      with self.assertRaisesRegex(FileNotFoundError, 'no finished run'):
        prune.open_run(folder)
      for result, message in (
          ({'program': 'os', 'flags': {}}, '`program`.*\'os\''),
          ({'program': 'experiments.image.train', 'flags': train.run_config(
              ) | {'method': 'rigl', 'sparsity': .5}}, '`run`.*rigl')):
        with open(os.path.join(folder, 'result.json'), 'w') as file:
          json.dump(result, file)
        with self.assertRaisesRegex(ValueError, message):
          prune.open_run(folder)


if __name__ == '__main__':
  absltest.main()
