"""Tests of experiments/image/filter_pruning.py."""

import functools
import json
import os
import tempfile
from unittest import mock

from absl import flags
from absl.testing import absltest
from absl.testing import flagsaver
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from experiments import training
from experiments.image import filter_pruning
from experiments.image import models
from experiments.image import train

if not flags.FLAGS.is_parsed():
  flags.FLAGS(['filter_pruning_test'])


def _model(name, width=.2):
  if name == 'resnet20':  # One block a stage will do.
    return models.ResNet(num_classes=10, blocks=(1, 1, 1),
                         features=(16, 32, 64), width=width)
  return models.create(name, num_classes=10, width=width)


def _variables(model, image_shape=(8, 8, 1)):
  """Positive statistics and nonzero biases, so that every array counts."""
  images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
  shapes = jax.eval_shape(lambda key, x: model.init(key, x, train=False),
                          jax.random.key(0), images)
  rng = np.random.default_rng(0)

  def draw(leaf):
    values = rng.normal(size=leaf.shape).astype(np.float32)
    return jnp.asarray(np.abs(values) + .1 if leaf.ndim == 1 else values)

  return {'batch_stats': {}, **jax.tree.map(draw, shapes)}


def _values(workdir, **changes):
  return train.run_config() | {
      'method': 'dense', 'sparsity': 0., 'width': .1, 'train_steps': 12,
      'log_every': 4, 'eval_every': 12, 'checkpoint_every': 12,
      'workdir': workdir} | changes


def _path(values, name):
  return os.path.join(values['workdir'], name)


def _json(values, name):
  with open(_path(values, name)) as file:
    return json.load(file)


def _at(tree, path):
  for name in path.split('/'):
    tree = tree[name]
  return tree


class NetworkTest(parameterized.TestCase):

  @parameterized.parameters('mlp', 'small_cnn', 'resnet20')
  def test_smaller_net_computes_what_the_larger_does_without(self, name):
    """A filter that is 0 behind its norm says nothing to the next layer."""
    model = _model(name)
    variables = _variables(model)
    silent = jax.tree.map(np.array, variables)
    for path, own in filter_pruning.followers(name, variables).items():
      kernel = _at(silent, path)
      norms = np.abs(kernel).sum(axis=tuple(range(kernel.ndim - 1)))
      gone = np.argsort(-norms)[max(1, round(norms.size / 2)):]
      kernel[..., gone] = 0
      for follower in own:
        if follower.endswith(('bias', 'mean')):
          _at(silent, follower)[gone] = 0
    small = filter_pruning.prune(name, variables, .5)
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    apply = functools.partial(jax.jit, static_argnums=0)(
        lambda net, variables: net.apply(variables, x, train=False))
    np.testing.assert_allclose(
        apply(filter_pruning.Fitted(model), small), apply(model, silent),
        rtol=1e-3, atol=1e-3)

  @parameterized.parameters('strided_cnn', 'vgg16', 'resnet50')
  def test_smaller_net_of_each_kind_fits(self, name):
    model, image_shape = _model(name, .05), (32, 32, 3)
    variables = _variables(model, image_shape)
    small = filter_pruning.prune(name, variables, .5)
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    logits = jax.eval_shape(
        lambda tree, x: filter_pruning.Fitted(model).apply(
            tree, x, train=False), small, images)
    self.assertEqual(logits.shape, (2, 10))
    norm = small['batch_stats'][
        'stage_1_block_1' if name == 'resnet50' else 'norm_2']
    self.assertEqual({leaf.size for leaf in jax.tree.leaves(norm)},
                     {2, 13} if name == 'resnet50' else {2})


class StudyTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.values = _values(os.path.join(folder, 'run'))

  def test_leaves_a_row_for_each_share_and_takes_a_finished_run(self):
    rows = filter_pruning.study(self.values, filter_pruning.Settings((.5,)))
    stored = _json(self.values, 'pruning.json')
    self.assertEqual(stored['rows'], rows)
    dense, half = rows
    # LeNet-300-100 at a tenth, then half of its hidden units.
    self.assertEqual([row['flops'] for row in rows], [
        64 * a + a * b + b * 10 for a, b in ((30, 10), (15, 5))])
    self.assertEqual([row['parameters'] - row['flops'] for row in rows],
                     [50, 30])
    self.assertEqual(_json(self.values, 'result.json')['test_accuracy'],
                     dense['trained'])
    self.assertGreater(half['fine_tuned'], half['pruned'])
    self.assertNotEqual(half['from_scratch'], half['fine_tuned'])
    for name in ('pruning.png', 'pruning.md'):
      self.assertTrue(os.path.exists(_path(self.values, name)))

    # Again: the dense run is taken as it lies there.
    with mock.patch.object(training, 'run_steps', side_effect=AssertionError):
      again = filter_pruning.study(self.values, filter_pruning.Settings(
          (.9,), epochs=.1, from_scratch=False))
    self.assertEqual(again[0], dense)
    self.assertEqual(again[1]['flops'], 64 * 3 + 3 * 1 + 10)
    self.assertNotIn('from_scratch', again[1])
    self.assertEqual(_json(self.values, 'pruning.json')['rows'], again)

  @parameterized.parameters(
      ({'method': 'static'}, {}, "`method` .='static'"),
      ({'model': 'densenet121'}, {}, "`model` .='densenet121'"),
      ({}, {'shares': (1.,)}, '`filter_sparsities` .=1.0'),
      ({}, {'epochs': 0.}, '`fine_tune_epochs` .=0.0'),
      ({}, {'learning_rate': -1.}, '`fine_tune_learning_rate` .=-1.0'))
  def test_bad_flag_is_named_before_anything_is_written(
      self, values, settings, message):
    settings = filter_pruning.Settings((.5,))._replace(**settings)
    with self.assertRaisesRegex(ValueError, message):
      filter_pruning.study(self.values | values, settings)
    self.assertFalse(os.path.exists(self.values['workdir']))

  def test_flags_become_settings(self):
    with flagsaver.flagsaver(filter_sparsities=['0.3'], from_scratch=False,
                             fine_tune_epochs=2., fine_tune_learning_rate=.1):
      self.assertEqual(filter_pruning.settings(), filter_pruning.Settings(
          (.3,), 2., .1, False))
    with flagsaver.flagsaver(filter_sparsities=['few']):
      with self.assertRaisesRegex(ValueError, "`filter_sparsities` .='few'"):
        filter_pruning.settings()


if __name__ == '__main__':
  absltest.main()
