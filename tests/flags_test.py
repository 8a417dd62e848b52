"""The flags of the image experiment: what they build, and what they refuse."""

import functools
import inspect
import math
import os
import pathlib
import re
import tempfile
from unittest import mock

from absl import flags
from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax
from experiments import devices
from experiments import optimization
from experiments import sparsity
from experiments import tasks
from experiments import training
from experiments.image import models
from experiments.image import train
from launch import tables
from sparse_jax import trees

_STRUCTURES = ('element', 'block', 'nm', 'channel', 'filter', 'fan_in')
# So small that a choice among the entries compiles fast.
_LAYERS = {'stem': (8, 16), 'head': (16, 6)}


def _values(**changes):
  values = train.run_config()
  assert changes.keys() <= values.keys(), changes
  return values | {'width': 0.1, 'train_steps': 60} | changes


def _parsed(text):
  """Values of flags as they stand on a command line."""
  found = dict(re.findall(r'--(\w+)=(\S+)', text))
  return {name: flags.FLAGS[name].parser.parse(value)
          for name, value in found.items()}


def _params():
  rng = np.random.default_rng(5)
  return {name: {'kernel': jnp.asarray(rng.normal(size=shape), jnp.float32),
                 'bias': jnp.ones(shape[1])}
          for name, shape in _LAYERS.items()}


def _leaves(tree):
  return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def _differ(ones, others):
  return any(not np.array_equal(a, b) for a, b in zip(ones, others))


def _first_state(task, seed=0):
  return jax.jit(functools.partial(tasks.init_state, task, seed))()


def _has(method, argument):
  return argument in inspect.signature(sparsity.METHODS[method]).parameters


def _structures(method):
  """Those that it can have, by definition."""
  if method in ('ste', 'sr_ste'):
    return ('nm',)
  if method in ('snfs', 'dsr', 'granet', 'spartan'):  # No budget could move.
    return tuple(name for name in _STRUCTURES if name != 'nm')
  return _STRUCTURES if _has(method, 'structure') else (None,)


def _settings(method, structure):
  """Flags under which a short run refreshes, and reaches a half if it can."""
  found = {'update_every': 1} if _has(method, 'update_every') else {}
  if _has(method, 'sparsity'):
    found['sparsity'] = .5
  if method in ('ac_dc', 'grasp') and structure == 'nm':
    found['scope'] = 'layer'
  if method in ('itop', 'granet'):
    found['allocation'] = 'uniform'
  if method == 'granet' or method == 'iht' and structure != 'nm':
    found['prune_end'] = 2
  if method == 'spartan':
    found |= {'update_end': 3, 'prune_end': 2}
  if method == 'ac_dc':
    found |= {'update_begin': 3, 'update_end': 3, 'final_dense': 0}
  return found


def _training(values, steps):
  """Makes parameters and state after a few steps towards 0; and the method."""
  method = sparsity.from_flags(values, 60)
  tx = sparse_jax.sparsify(optax.sgd(.1), method, key=values['seed'])

  def loss(params, state):
    return optax.tree.norm(method.read(params, state), squared=True)

  def step(carry, unused):
    params, state = carry
    grad_fn = functools.partial(jax.grad(loss), state=state)
    updates, state = tx.update(grad_fn(params), state, params,
                               grad_fn=grad_fn)
    return (optax.apply_updates(params, updates), state), unused

  def run():
    # Both layers would compile for twice as long.
    params = method.parametrize({'stem': _params()['stem']})
    start = params, tx.init(params)
    return jax.lax.scan(step, start, length=steps)[0]

  return run, method


def _batch(size=16):
  rng = np.random.default_rng(7)
  return {'image': rng.integers(0, 256, (size, 8, 8, 1), np.uint8),
          'label': np.arange(size, dtype=np.int32) % 10}


class ScheduleTest(parameterized.TestCase):
  """The learning rate of update t, counted from 0, of a run of 100."""

  @parameterized.named_parameters(
      ('constant', {'lr_schedule': 'constant'},
       {0: .01, 4: .05, 9: .1, 10: .1, 99: .1}),
      ('cosine', {'lr_schedule': 'cosine'},
       {0: .01, 9: .1, 10: .1, 55: .05, 100: 0.}),
      ('cosine_without_warmup', {'warmup_share': 0.},
       {0: .1, 50: .05, 100: 0.}),
      ('steps', {'lr_schedule': 'step'},
       {0: .01, 9: .1, 29: .1, 30: .01, 69: .01, 70: .001, 90: .0001}),
      ('other_steps', {'lr_schedule': 'step', 'lr_drops': ['0.5', '0.8'],
                       'lr_factor': .5, 'warmup_share': 0.},
       {0: .1, 49: .1, 50: .05, 79: .05, 80: .025, 99: .025}),
      ('drops_at_one_step', {'lr_schedule': 'step', 'lr_drops': ['.5', '.501']},
       {49: .1, 50: .001}),
      ('drop_in_the_warmup', {'lr_schedule': 'step', 'lr_drops': ['.05']},
       {9: .1, 10: .01}),
      ('periods', {'lr_periods': 2, 'warmup_share': 0.},
       {0: .1, 25: .05, 50: .1, 75: .05}),
      ('rounds_and_ticket', {'method': 'cs', 'rounds': 3, 'warmup_share': 0.},
       {0: .1, 25: .1, 50: .1, 75: .1, 87: .1 * (1 + math.cos(.48 * math.pi))
        / 2}),
      ('warmup_alone', {'warmup_share': 1.}, {0: .001, 49: .05, 99: .1}),
  )
  def test_rate_is_that_of_the_recipe(self, changes, rates):
    changes = {'warmup_share': .1} | changes
    rate = optimization.schedule(_values(**changes), 100)
    for step, expected in rates.items():
      np.testing.assert_allclose(rate(step), expected, rtol=1e-5, atol=1e-8,
                                 err_msg=f'step {step}')

  def test_imagenet_recipe_drops_at_the_epochs_of_the_paper(self):
    values = _values(**_parsed(train.__doc__.split('ImageNet one')[1]))
    rate = optimization.schedule(values, 32000)
    # Epochs 5, 30, 70 and 90 of 102.4, at 312.5 steps each.
    for step, expected in ((0, 1.6 / 1568), (1568, 1.6), (9375, 1.6),
                           (9376, .16), (21888, .016), (28128, .0016)):
      # The warm-up is a difference of float32.
      np.testing.assert_allclose(rate(step), expected, rtol=1e-4)


class OptimizerTest(parameterized.TestCase):

  @parameterized.parameters(*optimization.OPTIMIZERS)
  def test_decay_spares_biases(self, name):
    params = _params()
    tx = optimization.make(_values(
        optimizer=name, learning_rate=.5, weight_decay=.1, warmup_share=0.,
        lr_schedule='constant'), 10)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    for layer in updates:
      np.testing.assert_array_equal(updates[layer]['bias'], 0.)
      self.assertTrue(np.all(np.asarray(updates[layer]['kernel']) != 0.))
      if name in ('sgd', 'adamw', 'aged_adamw'):
        np.testing.assert_allclose(updates[layer]['kernel'],
                                   -.05 * params[layer]['kernel'], rtol=1e-5)

  @parameterized.parameters('adam', 'adamw')
  def test_aged_ones_differ_where_weights_grow(self, name):
    method = sparse_jax.set_(.5, update_every=2)

    def trained(optimizer):
      tx = sparse_jax.sparsify(optimization.make(_values(
          optimizer=optimizer, lr_schedule='constant'), 10), method)
      params = _params()
      state, update = tx.init(params), jax.jit(tx.update)
      for _ in range(5):
        updates, state = update(jax.tree.map(jnp.ones_like, params), state,
                                params)
        params = optax.apply_updates(params, updates)
      return _leaves(params)

    self.assertTrue(_differ(trained(name), trained(f'aged_{name}')))

  def test_clip_is_before_momentum_and_decay(self):
    params = _params()
    tx = optimization.make(_values(
        optimizer='sgd', learning_rate=1., weight_decay=0., warmup_share=0.,
        lr_schedule='constant', clip_norm=.5), 10)
    grads = jax.tree.map(lambda p: 100 * p, params)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    self.assertAlmostEqual(float(optax.tree.norm(updates)), .5, places=5)


class LossTest(absltest.TestCase):

  def test_smoothing_spreads_a_share_of_the_label(self):
    values = _values(method='dense', label_smoothing=.3)
    task, batch = train.make_task(values, 10), _batch()
    state = _first_state(task)
    loss, _ = jax.jit(functools.partial(tasks.loss_fn, task=task))(
        state.params, {}, state=state, batch=batch)
    images = (batch['image'] / 255 - 0.3054) / 0.3758
    logits = np.asarray(task.problem.model.apply(
        {'params': state.params}, images.astype(np.float32), train=False))
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    labels = .7 * np.eye(10)[batch['label']] + .03
    np.testing.assert_allclose(loss, -(labels * logs).sum(-1).mean(),
                               rtol=1e-5)


class BuildTest(parameterized.TestCase):
  """Every combination makes a run that can start."""

  @parameterized.parameters(*(
      (name, structure) for name in sorted(sparsity.METHODS)
      for structure in _structures(name)))
  def test_method_trains_under_structure(self, name, structure):
    values = _values(method=name, structure=structure) | _settings(
        name, structure)
    if structure == 'block':
      values |= {'block_shape': ['2', '4']}
    run, method = _training(values, steps=3)
    if structure in ('channel', 'filter'):  # See methods_test.
      jax.eval_shape(run)
      return
    params, state = jax.jit(run)()
    self.assertTrue(all(np.isfinite(leaf).all() for leaf in _leaves(params)))
    summary = sparse_jax.summarize(params, state, method)
    late = name == 'gmp' and structure != 'nm'  # It is not there yet.
    if _has(name, 'structure') and not late:
      self.assertAlmostEqual(summary.sparsity, .5, delta=.2)

  @parameterized.parameters(*_STRUCTURES)
  def test_structure_need_not_divide_a_kernel(self, structure):
    method = sparsity.from_flags(_values(
        method='static', structure=structure, sparsity=.5,
        **{'block': {'block_shape': ['5', '7']}, 'nm': {'nm': ['3', '6']}}.get(
            structure, {})), 60)
    params = {'kernel': jnp.ones((13, 11))}
    weights = method.read(params, jax.jit(lambda p: method.init(p))(params))
    density = float(jnp.mean(weights['kernel'] != 0))
    self.assertAlmostEqual(density, .5, delta=.15)

  @parameterized.named_parameters(
      ('cifar', r'(--dataset=cifar10[^\n]*\n[^\n]*)', 10, (32, 32, 3)),
      ('imagenet', r'ImageNet one(.*)which nobody', 1000, (224, 224, 3)))
  def test_recipe_of_the_docstring_builds(self, pattern, classes, image_shape):
    recipe = re.search(pattern, train.__doc__, re.DOTALL).group(1)
    recipe = _parsed(recipe) | {'data_dir': None}
    values = _values(**{'width': 1., 'train_steps': 1000} | recipe)
    self.assertGreaterEqual(len(recipe), 5)
    task = train.make_task(values, values['train_steps'])
    state = jax.eval_shape(functools.partial(tasks.init_state, task, 0))
    self.assertEqual(state.params['head']['kernel'].shape[-1], classes)
    size = values['batch_size']
    batch = {'image': jax.ShapeDtypeStruct((size, *image_shape), jnp.uint8),
             'label': jax.ShapeDtypeStruct((size,), jnp.int32)}
    after = jax.eval_shape(functools.partial(tasks.train_step, task), state,
                           batch)
    self.assertEqual(jax.tree.map(lambda x: (x.shape, x.dtype), after),
                     jax.tree.map(lambda x: (x.shape, x.dtype), state))

  @parameterized.parameters(*sorted(models.MODELS))
  def test_model_is_made_at_its_width(self, model):
    task = train.make_task(_values(model=model, method='static', width=.02), 9)
    state = jax.eval_shape(functools.partial(tasks.init_state, task, 0))
    self.assertIn('head', state.params)


class TrueSparsityTest(parameterized.TestCase):
  """Of all kernels of ResNet-50, those that stay dense counted in."""

  @parameterized.parameters(.8, .9)
  def test_the_docstrings_recipe_has_the_sparsity_of_rigls_paper(self, asked):
    recipe = _parsed(train.__doc__.split('ImageNet one')[1].split('which')[0])
    self.assertAlmostEqual(self._true(recipe | {'sparsity': asked}), asked,
                           delta=5e-4)

  @parameterized.parameters('RigL 80%', 'RigL 90%', 'SET 90%', 'Static 80%',
                            'SNIP 80%', 'Pruning 90%')
  def test_the_tables_baselines_have_it_too(self, row):
    point, = (point for point in tables.get('top_kast_fig2b', 'paper').points
              if point.row == row)
    self.assertAlmostEqual(self._true(point.flags), point.flags['sparsity'],
                           delta=5e-4)

  @parameterized.parameters((.8, .735), (.9, .827))
  def test_top_kast_leaves_both_ends_dense(self, asked, true):
    point = next(point for point in tables.get(
        'top_kast_fig2b', 'paper').points
                 if point.row == f'Top-KAST {asked:.0%}')
    self.assertAlmostEqual(self._true(point.flags), true, delta=1e-3)

  def _true(self, given):
    """1 - the share of all kernels' entries that the last masks keep."""
    task, _ = train.without_data(_values(**{'width': 1.} | given))
    params, _ = jax.eval_shape(task.problem.init, jax.random.key(0))
    leaves = task.method.rule.sites.leaves(params)
    kept = {path: leaf.layout.share(leaf.count)
            for path, leaf in leaves.items()}
    kernels = {path: leaf.size for path, leaf in trees.leaves_by_path(
        params).items() if leaf.ndim > 1}
    self.assertEqual(sum(kernels.values()), 25_502_912)
    return 1 - sum(size * kept.get(path, 1.) for path, size in kernels.items()
                   ) / sum(kernels.values())


class OrderTest(parameterized.TestCase):

  @parameterized.parameters('mlp', 'small_cnn', 'strided_cnn', 'resnet20',
                            'wrn_16_8', 'vgg16', 'densenet121', 'resnet50',
                            'mobilenet_v1')
  def test_uniform_plus_has_the_models_own_order(self, model):
    """The first layer is dense, whatever the alphabet."""
    kept, order = self._kept(model=model, width=.2, sparsity=.2)
    self.assertEqual(order[-1], 'head/kernel')
    self.assertEqual([path for path in kept if kept[path] == 1.], [order[0]])

  def test_uniform_plus_keeps_a_fifth_of_the_head(self):
    kept, order = self._kept(model='resnet20', width=.2, sparsity=.85)
    self.assertEqual(order[0], 'stem/kernel')
    self.assertAlmostEqual(kept.pop('head/kernel'), .2, delta=.01)
    self.assertEqual(kept.pop('stem/kernel'), 1.)
    self.assertTrue(all(share < .18 for share in kept.values()), kept)

  def _kept(self, **values):
    """{path: share kept}, and these paths in the order of the layers."""
    task = train.make_task(_values(
        method='static', allocation='uniform_plus', **values), 9)
    params, _ = jax.eval_shape(task.problem.init, jax.random.key(0))
    kept = {path: work.forward
            for path, work in task.method.work(params, 1).items()}
    return kept, [path for path in training.layer_order(task.problem)
                  if path in kept]


class WindowTest(absltest.TestCase):

  def test_windows_are_judged_by_the_length_of_the_run(self):
    """RigL's default window ends at 75% of the run."""
    late = {'method': 'rigl', 'update_begin': 2000}
    train.without_data(_values(train_steps=3000, **late))
    with self.assertRaisesRegex(ValueError, 'update_begin.*2000'):
      train.without_data(_values(train_steps=2000, **late))


class EffectTest(parameterized.TestCase):
  """No flag is ignored: two of its values give two outcomes."""

  METHOD_FLAGS = (
      ('method', 'static', 'set', {}),
      ('sparsity', .5, .6, {}),
      ('backward_sparsity', .5, .6, {'sparsity': .8}),
      ('penalty_weight', 1e-4, 1e-1, {}),
      ('backward_selection', 'magnitude', 'random', {'sparsity': .5}),
      ('stop_exploration_at', None, 2, {}),
      ('drop_fraction', .2, .5, {'method': 'set', 'sparsity': .5}),
      ('skip_step', False, True, {'method': 'rigl', 'sparsity': .5}),
      ('drop_by', 'magnitude', 'sign', {'method': 'set'}),
      ('grow_init', 'zeros', 'random_normal', {'method': 'rigl'}),
      ('redistribution', 'momentum', 'none', {'method': 'snfs'}),
      ('hidden', 'frozen', 'moving', {'method': 'gmp'}),
      ('erk_power_scale', 1., .5, {'allocation': 'erk'}),
      ('growth', 'gradient', 'random', {'method': 'itop'}),
      ('growth_momentum', .9, .5, {'method': 'snfs'}),
      ('drop_threshold', 1e-3, 1e-2, {'method': 'dsr'}),
      ('gamma', .3, .5, {'method': 'srigl'}),
      ('never_ablate', None, 'stem', {'method': 'srigl'}),
      ('initial_sparsity', None, .25, {'method': 'granet'}),
      ('prune_end', None, 9, {'method': 'granet'}),
      ('prune_begin', 0, 9, {'method': 'iht'}),
      ('variant', 'em', 'ems', {'method': 'mest'}),
      ('mutation', None, ['0.1', '0'], {'method': 'mest'}),
      ('gradient_weight', 0., 1., {'method': 'mest'}),
      ('soft_beta', None, ['1', '9'], {'method': 'spartan'}),
      ('scope', 'layer', 'global', {'method': 'snip'}),
      ('score', 'magnitude', 'saliency', {'method': 'gmp'}),
      ('final_dense', 0, 5, {'method': 'ac_dc'}),
      ('reset_slots', True, False, {'method': 'ac_dc'}),
      ('hidden_decay', 1e-4, 1e-3, {'method': 'sr_ste'}),
      ('initial_gate', -5., -2., {'method': 'str'}),
      ('least_kept', .01, .02, {'method': 'dst'}),
      ('temperature', 200., 100., {'method': 'cs'}),
      ('rounds', 1, 2, {'method': 'cs'}),
      ('round_steps', 20, 30, {'method': 'cs'}),
      ('rewind', True, False, {'method': 'cs'}),
      ('rewind_to', 0, 1, {'method': 'cs', 'rounds': 2}),
      ('activation_sparsity', .5, .6, {'method': 'swat'}),
      ('masked_update', False, True, {'method': 'swat'}),
      ('freeze_at', 5, 6, {'method': 'swat'}),
      ('allocation', 'erk', 'momentum', {'method': 'swat'}),
      ('update_every', 1, 4, {'method': 'set', 'sparsity': .5}),
      ('update_begin', 0, 4, {'method': 'set', 'sparsity': .5}),
      ('update_end', 2, -1, {'method': 'set', 'sparsity': .5}),
      ('allocation', None, 'erk', {'sparsity': .5}),
      ('structure', None, 'block', {'sparsity': .5}),
      ('block_shape', ['2', '2'], ['4', '4'], {'structure': 'block'}),
      ('block_reduce', 'sum', 'max', {'structure': 'block'}),
      ('nm', ['2', '4'], ['1', '2'], {'structure': 'nm', 'sparsity': .5}),
      ('dense_layers', [], ['stem', 'head'], {}),
  )
  OPTIMIZER_FLAGS = (
      ('optimizer', 'momentum', 'nesterov', {}),
      ('optimizer', 'adam', 'adamw', {'weight_decay': .1}),
      ('optimizer', 'sgd', 'momentum', {}),
      ('learning_rate', .1, .2, {}),
      ('lr_schedule', 'constant', 'cosine', {}),
      ('warmup_share', 0., .5, {}),
      ('lr_drops', ['0.2'], ['0.9'], {'lr_schedule': 'step'}),
      ('lr_factor', .1, .5, {'lr_schedule': 'step'}),
      ('lr_periods', None, 2, {}),
      ('weight_decay', 0., .1, {}),
      ('clip_norm', None, .1, {}),
  )
  MODEL_FLAGS = (
      ('model', 'mlp', 'small_cnn', {}),
      ('dataset', 'digits', 'mnist', {}),
      ('width', .1, .2, {}),
      ('dropout', 0., .5, {'model': 'wrn_16_8'}),
      ('bfloat16', False, True, {}),
      ('label_smoothing', 0., .1, {}),
      ('log_every', 50, 60, {}),
      ('activation_scope', 'tensor', 'example', {'method': 'swat'}),
      ('gradient_scope', 'tensor', 'unified', {'method': 'swat'}),
      ('pack_activations', True, False, {'method': 'swat'}),
      ('operand_period', 1, 2, {'method': 'swat'}),
  )
  LENGTH_FLAGS = (
      ('batch_size', 64, 128, {}),
      ('train_epochs', 1., 2., {}),
      ('train_steps', 5, 6, {'train_epochs': None}),
  )
  # Watched in whole runs: see experiments_test.
  ELSEWHERE = {'drop_schedule', 'effective_sparsity', 'seed', 'data_dir',
               'augment', 'workdir',
               'eval_every', 'compare_masks_every',
               'checkpoint_every', 'model_parallel', 'powerprop_alpha',
               'operands', 'storage'}

  @parameterized.parameters(*METHOD_FLAGS)
  def test_method_flag_changes_an_argument(self, flag, one, other, context):
    def arguments(value):
      values = _values(**context | {flag: value})
      constructor = sparsity.METHODS[values['method']]
      recorder = functools.wraps(constructor)(
          lambda **given: sparse_jax.dense()._replace(work=given))
      with mock.patch.dict(sparsity.METHODS, {values['method']: recorder}):
        return values['method'], sparsity.from_flags(values, 60).work

    self.assertNotEqual(arguments(one), arguments(other))

  @parameterized.parameters(*OPTIMIZER_FLAGS)
  def test_optimizer_flag_changes_the_updates(self, flag, one, other, context):
    def outcome(value):
      tx = optimization.make(_values(**context | {flag: value}), 6)
      update, params = jax.jit(tx.update), _params()
      state = tx.init(params)
      for _ in range(5):
        updates, state = update(params, state, params)
        params = optax.apply_updates(params, updates)
      return _leaves(params)

    self.assertTrue(_differ(outcome(one), outcome(other)))

  @parameterized.parameters(*MODEL_FLAGS)
  def test_model_flag_changes_the_task(self, flag, one, other, context):
    tasks = [train.make_task(_values(**context | {flag: value}), 6)
             for value in (one, other)]
    # Methods and optimizers are functions, made anew each time.
    first, second = (task._replace(method=None, tx=None) for task in tasks)
    self.assertNotEqual(first, second)

  def test_drop_schedule_follows_the_learning_rate(self):
    values = _values(method='set', sparsity=.5, update_every=1,
                     drop_fraction=.4, lr_schedule='constant', warmup_share=.5,
                     drop_schedule='learning_rate')
    seen = []
    recorder = functools.wraps(sparse_jax.set_)(
        lambda **given: seen.append(given) or sparse_jax.static(.5))
    with mock.patch.dict(sparsity.METHODS, {'set': recorder}):
      train.make_task(values, 100)
    drop = seen[0]['drop_fraction']
    np.testing.assert_allclose([drop(24), drop(49), drop(99)], [.2, .4, .4],
                               rtol=1e-5)

  def test_flags_of_an_older_run_are_unset(self):
    values = _values(method='rigl', sparsity=.5)
    for flag in ('grow_init', 'drop_schedule', 'erk_power_scale', 'hidden'):
      del values[flag]
    self.assertEqual(sparsity.from_flags(values, 60).name, 'rigl')

  def test_storage_changes_how_parameters_are_held(self):
    masked, packed = (sparsity.from_flags(_values(
        structure='block', storage=storage), 60)
                      for storage in ('masked', 'packed'))
    self.assertIsNone(masked.pack)
    self.assertIsNotNone(packed.pack)

  def test_power_wraps_the_method(self):
    """At alpha 2 training starts from the square roots."""
    values = _values(method='static', sparsity=.5, powerprop_alpha=2.)
    method = sparsity.from_flags(values, 60)
    theta = method.parametrize({'kernel': jnp.full((4, 6), 9.)})
    np.testing.assert_allclose(theta['kernel'], 3., rtol=1e-6)

  def test_operands_are_those_of_the_named_layers(self):
    values = _values(method='dense', sparsity=0., dense_layers=['stem'],
                     operands=['output_gradient=0.9', 'forward_weight=.5'])
    method = sparsity.from_flags(values, 60)
    params = {'stem': {'kernel': jnp.ones((4, 6))},
              'head': {'kernel': jnp.ones((6, 2))}}
    self.assertEqual(
        method.operators(params, method.init(params)),
        {'head/kernel': sparse_jax.operators.Operands(.5, output_gradient=.9)})

  @parameterized.parameters(*LENGTH_FLAGS)
  def test_length_flag_changes_the_length(self, flag, one, other, context):
    lengths = [train.run_length(_values(
        **{'train_steps': None} | context | {flag: value}), 1437)
               for value in (one, other)]
    self.assertNotEqual(*lengths)

  def test_seed_changes_weights_and_masks(self):
    states = [_first_state(train.make_task(_values(
        method='static', seed=seed), 6), seed) for seed in (0, 2**32 - 1)]
    for part in (lambda state: state.params['stem']['kernel'],
                 lambda state: state.opt_state.sparse.marks['stem']['kernel']):
      self.assertTrue(_differ(*(_leaves(part(state)) for state in states)))

  def test_every_flag_is_in_a_table(self):
    tables = (self.METHOD_FLAGS, self.OPTIMIZER_FLAGS, self.MODEL_FLAGS,
              self.LENGTH_FLAGS)
    watched = {row[0] for table in tables for row in table} | self.ELSEWHERE
    self.assertEqual(watched, set(train.run_config()))


class RefusalTest(parameterized.TestCase):
  """A bad flag is named with its value, and nothing is left behind."""

  @parameterized.named_parameters(
      ('sparsity_one', {'sparsity': 1.}, 'sparsity.*1.0'),
      ('sparsity_nan', {'sparsity': float('nan')}, 'sparsity.*nan'),
      ('sparsity_negative', {'sparsity': -.1}, 'sparsity.*-0.1'),
      ('sparsity_for_dense', {'method': 'dense', 'sparsity': .5},
       'sparsity.*0.5.*method=dense'),
      ('backward_above_forward', {'sparsity': .8, 'backward_sparsity': .9},
       'backward_sparsity.*0.9.*0.8'),
      ('backward_nan', {'backward_sparsity': float('nan')},
       'backward_sparsity.*nan'),
      ('penalty_negative', {'penalty_weight': -1.}, 'penalty_weight.*-1'),
      ('stop_negative', {'stop_exploration_at': -1},
       'stop_exploration_at.*-1'),
      ('drop_above_one', {'method': 'rigl', 'drop_fraction': 1.5},
       'drop_fraction.*1.5'),
      ('update_every_zero', {'update_every': 0}, 'update_every.*0'),
      ('update_begin_negative', {'update_begin': -2}, 'update_begin.*-2'),
      ('update_end_before_begin', {'update_begin': 9, 'update_end': 3},
       'update_end.*3.*update_begin.*9'),
      ('update_begin_after_default_end', {'method': 'set', 'update_begin': 50},
       'update_end.*45.*update_begin.*50'),
      ('block_shape_zero', {'structure': 'block', 'block_shape': ['0', '4']},
       'block_shape.*0,4.*shape.*0'),
      ('block_shape_of_three', {
          'structure': 'block', 'block_shape': ['2', '2', '2']},
       'block_shape.*2,2,2'),
      ('block_shape_of_words', {
          'structure': 'block', 'block_shape': ['two', 'four']},
       'block_shape.*two,four'),
      ('block_shape_without_blocks', {'block_shape': ['4', '4']},
       'block_shape.*4.*structure=block'),
      ('block_reduce_without_blocks', {
          'structure': 'filter', 'block_reduce': 'max'},
       'block_reduce.*max.*structure=block.*filter'),
      ('packed_without_blocks', {'storage': 'packed'},
       'storage.*packed.*Block'),
      ('packed_pruning', {
          'storage': 'packed', 'structure': 'block', 'method': 'gmp'},
       'storage.*method=gmp'),
      ('packed_operands', {
          'storage': 'packed', 'structure': 'block', 'method': 'swat'},
       'storage.*method=swat'),
      ('packed_and_split', {
          'storage': 'packed', 'structure': 'block', 'model_parallel': 2},
       'storage.*model_parallel.*2'),
      ('nm_reversed', {'structure': 'nm', 'nm': ['4', '2'], 'sparsity': .5},
       'nm.*4,2'),
      ('nm_without_nm', {'nm': ['1', '4']}, 'nm.*1.*structure=nm'),
      ('nm_at_another_sparsity', {'structure': 'nm', 'sparsity': .9},
       'sparsity.*0.9'),
      ('power_of_another_allocation', {'erk_power_scale': 2.},
       'erk_power_scale.*2.*allocation=erk'),
      ('drop_schedule_of_another_method', {
          'method': 'static', 'drop_schedule': 'learning_rate'},
       'drop_schedule.*static'),
      ('nm_with_allocation', {
          'structure': 'nm', 'sparsity': .5, 'allocation': 'erk'},
       'allocation'),
      ('rule_without_a_match', {'dense_layers': ['nosuchlayer']},
       'nosuchlayer'),
      ('rule_that_leaves_nothing', {'dense_layers': ['kernel']}, 'kernel'),
      ('rule_that_is_no_expression', {'dense_layers': ['(']},
       r'dense_layers.*\('),
      ('too_sparse_for_the_allocation', {
          'allocation': 'uniform_plus', 'sparsity': .999, 'model': 'resnet20'},
       'sparsity'),
      ('lr_drops_of_words', {'lr_schedule': 'step', 'lr_drops': ['soon']},
       'lr_drops.*soon'),
      ('lr_drops_above_one', {'lr_schedule': 'step', 'lr_drops': ['30']},
       'lr_drops.*30'),
      ('lr_drops_without_steps', {'lr_drops': ['0.5']},
       'lr_drops.*0.5.*lr_schedule=step.*cosine'),
      ('lr_periods_none', {'lr_periods': 0}, 'lr_periods.*0'),
      ('lr_factor_without_steps', {'lr_factor': .5}, 'lr_factor.*0.5'),
      ('warmup_above_one', {'warmup_share': 5.}, 'warmup_share.*5'),
      ('warmup_nan', {'warmup_share': float('nan')}, 'warmup_share.*nan'),
      ('operands_without_a_value', {'operands': ['output_gradient']},
       'operands.*output_gradient'),
      ('operands_unknown', {'operands': ['gradient=0.5']}, 'gradient=0.5'),
      ('operands_of_one', {'operands': ['output_gradient=1']},
       'output_gradient.*1'),
      ('operands_besides_swat', {
          'method': 'swat', 'operands': ['output_gradient=.5']}, 'method'),
      ('period_zero', {'method': 'swat', 'operand_period': 0},
       'operand_period.*0'),
      ('period_without_operands', {'operand_period': 20},
       'operand_period.*20.*--operands'),
      ('period_of_examples', {
          'method': 'swat', 'operand_period': 20,
          'activation_scope': 'example'}, 'operand_period.*20.*example'),
      ('momentum_budget_of_static', {
          'method': 'static', 'allocation': 'momentum'},
       'allocation.*momentum'),
      ('learning_rate_zero', {'learning_rate': 0.}, 'learning_rate.*0'),
      ('learning_rate_nan', {'learning_rate': float('nan')},
       'learning_rate.*nan'),
      ('decay_negative', {'weight_decay': -1.}, 'weight_decay.*-1'),
      ('clip_zero', {'clip_norm': 0.}, 'clip_norm.*0'),
      ('batch_not_divisible', {'batch_size': 100}, 'batch_size.*100.*8'),
      ('batch_zero', {'batch_size': 0}, 'batch_size.*0'),
      ('batch_above_the_data', {'batch_size': 4096}, 'batch_size.*4096'),
      ('steps_and_epochs', {'train_steps': 5, 'train_epochs': 2.},
       'train_steps.*5.*train_epochs.*2'),
      ('steps_zero', {'train_steps': 0}, 'train_steps.*0'),
      ('epochs_nan', {'train_steps': None, 'train_epochs': float('nan')},
       'train_epochs.*nan'),
      ('epochs_negative', {'train_steps': None, 'train_epochs': -1.},
       'train_epochs.*-1'),
      ('log_every_zero', {'log_every': 0}, 'log_every.*0'),
      ('eval_every_zero', {'eval_every': 0}, 'eval_every.*0'),
      ('checkpoint_every_zero', {'checkpoint_every': 0}, 'checkpoint_every.*0'),
      ('seed_negative', {'seed': -1}, 'seed.*-1'),
      ('seed_that_wraps', {'seed': 2**32}, 'seed.*4294967296'),
      ('smoothing_above_one', {'label_smoothing': 1.5}, 'label_smoothing.*1.5'),
      ('width_zero', {'width': 0.}, 'width.*0'),
      ('width_infinite', {'width': float('inf')}, 'width.*inf'),
      ('dropout_where_there_is_none', {'dropout': .5}, 'dropout.*0.5'),
      ('dropout_one', {'model': 'wrn_16_8', 'dropout': 1.}, 'dropout.*1'),
      ('data_dir_empty_name', {'data_dir': ''}, 'data_dir.*\'\''),
  )
  def test_flag_is_named_with_its_value(self, changes, message):
    self._assert_refused(ValueError, changes, message)

  @parameterized.parameters(
      ('rigl', 'backward_sparsity', .5), ('set', 'penalty_weight', .1),
      ('gmp', 'drop_fraction', .1), ('static', 'update_every', 5),
      ('dnw', 'update_end', 5), ('top_kast', 'skip_step', True),
      ('rigl', 'backward_selection', 'random'),
      ('dense', 'stop_exploration_at', 5), ('dense', 'allocation', 'erk'),
      ('dense', 'structure', 'block'), ('dense', 'dense_layers', ['head']))
  def test_flag_of_another_method_is_refused(self, method, flag, value):
    self._assert_refused(
        ValueError, {'method': method, flag: value},
        f'`{flag}`.*{re.escape(str(value))}.*--method={method}')

  def test_empty_data_dir_is_named(self):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    self._assert_refused(FileNotFoundError, {'data_dir': folder},
                         f'data_dir.*{folder}')
    self.assertEmpty(os.listdir(folder))

  @parameterized.parameters(
      ('dataset', 'cifar11'), ('model', 'resnet21'), ('method', 'rigged'),
      ('allocation', 'even'), ('structure', 'cube'), ('optimizer', 'adamx'),
      ('lr_schedule', 'line'), ('backward_selection', 'best'),
      ('block_reduce', 'mean'), ('sparsity', 'much'), ('train_steps', '1.5'))
  def test_unknown_value_is_named(self, flag, value):
    with self.assertRaisesRegex(flags.IllegalFlagValueError,
                                f'{flag}={value}'):
      flags.FLAGS[flag].parse(value)

  @parameterized.named_parameters(
      ('no_address', {'num_processes': 2}, 'num_processes.*2'),
      ('incomplete', {'distributed': True, 'coordinator': 'host:1'},
       'coordinator.*host:1'),
      ('not_distributed', {'coordinator': 'host:1', 'num_processes': 2,
                           'process_id': 0}, 'coordinator.*host:1'))
  def test_half_named_processes_are_refused(self, changes, message):
    nothing = {'distributed': False, 'coordinator': None,
               'num_processes': None, 'process_id': None}
    with self.assertRaisesRegex(ValueError, message):
      devices.join(nothing | changes)

  def _assert_refused(self, kind, changes, message):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    workdir = pathlib.Path(folder, 'run')
    with self.assertRaisesRegex(kind, message):
      train.train(_values(workdir=str(workdir), **changes))
    self.assertFalse(workdir.exists())


if __name__ == '__main__':
  absltest.main()
