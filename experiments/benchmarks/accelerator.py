"""Cycles of a training step on an array that skips zeros, as SWAT reports.

A small ResNet is trained for a while with SWAT's weights (the largest in
magnitude at every step, a dense gradient to them); then the weights and the
activations of one step are given to the cycle model, the activations of the
backward pass without all but their largest. The first layer stays dense.

  python -m experiments.benchmarks.accelerator --dataset=cifar10 \\
      --data_dir=DIR --sparsity=0.9 --rows=1 --lookahead=9 --lookaside=10

Prints a table of the layers, and the speed-up of the arithmetic over the same
array without skipping; leaves result.json in --workdir, if given. The table
`swat_accelerator` of launch.run has the published ones beside them. Recorded
results: README.md one folder up.
"""

from collections.abc import Mapping
import functools
import os
from typing import Any, NamedTuple

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax
from experiments import accounting
from experiments import programs
from experiments import reporting
from experiments.image import input_pipeline
from experiments.image import models

DENSE = 'stem/kernel'
LEARNING_RATE = .05
# Rows in all tiles: arrays of one size, of 16 lanes and 16 columns.
ALL_ROWS = 256
FREE = ('workdir', 'data_dir')  # Flags that say nothing about the result.
PARTS = ('forward', 'input_gradient', 'weight_gradient')

_FLAGS = (
    flags.DEFINE_enum('dataset', 'digits', sorted(input_pipeline.DATASETS),
                      'What to train on.'),
    flags.DEFINE_string('data_dir', None, 'Where it is prepared.'),
    flags.DEFINE_enum('model', 'resnet20', sorted(models.MODELS),
                      'The network.'),
    flags.DEFINE_integer('steps', 100, 'Training steps before the one that is '
                         'looked at.'),
    flags.DEFINE_integer('batch_size', 32, 'Images in a training step.'),
    flags.DEFINE_integer('images', 4, 'Images of the step that is looked at.'),
    flags.DEFINE_integer('seed', 0, 'Of initial weights and data order.'),
    flags.DEFINE_float('sparsity', .9, 'Of weights and saved activations.'),
    flags.DEFINE_integer('rows', 16, 'Of a tile; there are 256 in all tiles.'),
    flags.DEFINE_integer('lookahead', 2, 'Steps that a lane reaches ahead.'),
    flags.DEFINE_integer('lookaside', 5, 'Entries in reach in other lanes.'),
    flags.DEFINE_string('workdir', None, 'Where result.json goes.'),
)


class Study(NamedTuple):
  """A network in training, at one sparsity."""

  model: Any
  method: sparse_jax.SparseMethod
  tx: optax.GradientTransformation
  data: input_pipeline.Dataset
  dataset: str


class State(NamedTuple):
  """What a step changes."""

  params: Any
  opt_state: Any
  stats: Any  # Of batch norm.


def machine_of(values: Mapping[str, Any]) -> sparse_jax.cost.Machine:
  """The array of the flags."""
  rows = values['rows']
  if rows < 1 or ALL_ROWS % rows:
    raise ValueError(f'`rows` (={rows}) must divide {ALL_ROWS}.')
  return sparse_jax.cost.Machine(
      rows=rows, tiles=ALL_ROWS // rows, lookahead=values['lookahead'],
      lookaside=values['lookaside']).checked()


def without_data(values: Mapping[str, Any]) -> Study:
  """What a run of these flags trains; a ValueError names a flag."""
  least = {'steps': 0, 'batch_size': 1, 'images': 1, 'seed': 0}
  for name, smallest in least.items():
    if values[name] < smallest:
      raise ValueError(f'`{name}` (={values[name]}) must be at least '
                       f'{smallest}.')
  data, sparsity = input_pipeline.DATASETS[values['dataset']], values[
      'sparsity']
  for name, most in (('batch_size', data.num_train),
                     ('images', values['batch_size'])):
    if values[name] > most:
      raise ValueError(f'`{name}` (={values[name]}) must be at most {most}.')
  if not 0 <= sparsity < 1:
    raise ValueError(f'`sparsity` (={sparsity}) must be in [0, 1).')
  machine_of(values)
  method = (sparse_jax.dnw(sparsity, is_sparse=[(DENSE, False)])
            if sparsity else sparse_jax.dense())
  return Study(
      models.create(values['model'], num_classes=data.num_classes), method,
      sparse_jax.sparsify(optax.sgd(LEARNING_RATE, momentum=.9), method), data,
      values['dataset'])


def first_state(study: Study, seed: int) -> State:
  """The state before the first step."""
  images = jnp.zeros((1, *study.data.image_shape))
  variables = study.model.init(jax.random.key(seed), images, train=False)
  params = variables['params']
  return State(params, study.tx.init(params), variables.get('batch_stats', {}))


def apply(study: Study, stats, weights, images):
  """Logits of images as the data set has them, and new batch statistics."""
  return study.model.apply(
      {'params': weights, 'batch_stats': stats},
      input_pipeline.normalise(images, study.dataset), train=True,
      mutable=['batch_stats'])


def loss_fn(study: Study, weights, stats, images, labels):
  """Mean cross-entropy, and the new batch statistics."""
  logits, new = apply(study, stats, weights, images)
  return optax.softmax_cross_entropy_with_integer_labels(
      logits, labels).mean(), new.get('batch_stats', {})


def train_step(study: Study, state: State, batch) -> State:
  """One update."""
  grads, stats = jax.grad(lambda params: loss_fn(
      study, study.method.read(params, state.opt_state), state.stats,
      batch['image'], batch['label']), has_aux=True)(state.params)
  updates, opt_state = study.tx.update(grads, state.opt_state, state.params)
  return State(optax.apply_updates(state.params, updates), opt_state, stats)


def layers_of(study: Study, values: Mapping[str, Any]):
  """(path, LayerCycles) of each layer in the step after the training."""
  data = input_pipeline.load(values['dataset'], 'train', values['data_dir'])
  batches = input_pipeline.train_batches(
      data, batch_size=values['batch_size'], seed=values['seed'], augment=False)
  state = first_state(study, values['seed'])
  step = jax.jit(functools.partial(train_step, study))
  for _ in range(values['steps']):
    state = step(state, next(batches))
  machine, found = machine_of(values), []

  def note(path, product, lhs, rhs):
    given = np.asarray(lhs)
    found.append((path, sparse_jax.cost.layer_cycles(
        product, given, np.asarray(rhs), machine=machine,
        saved=saved(path, given, values['sparsity']))))
    return product.apply(lhs, rhs)

  weights = study.method.read(state.params, state.opt_state)
  sparse_jax.jaxprs.replace_products(
      functools.partial(apply, study, state.stats), note)(
          weights, next(batches)['image'][:values['images']])
  return found


def saved(path: str, activations: np.ndarray, sparsity: float) -> np.ndarray:
  """The activations as SWAT saves them: the largest of the whole tensor."""
  if path == DENSE or not sparsity:
    return activations
  mask = sparse_jax.make_mask(jnp.abs(activations).ravel(), sparsity)
  return activations * np.asarray(mask).reshape(activations.shape)


def describe(values: Mapping[str, Any]) -> dict[str, Any]:
  """Size, length and cost of the training, as `training.describe`."""
  study = without_data(values)
  state = jax.eval_shape(functools.partial(first_state, study, 0))
  shape = jax.ShapeDtypeStruct
  one, two = ((state.stats, shape((size, *study.data.image_shape), jnp.uint8),
               shape((size,), jnp.int32)) for size in (1, 2))
  return {'train_steps': values['steps'], 'batch_size': values['batch_size'],
          'learning_rate': LEARNING_RATE, **accounting.forecast(
              lambda *inputs: loss_fn(study, *inputs)[0], state, one, two,
              study.method, batch_size=values['batch_size'],
              steps=values['steps'])}


def run_config() -> dict[str, Any]:
  """The flags that make a run what it is."""
  return {flag.name: flag.value for flag in _FLAGS}


def run(values: Mapping[str, Any]) -> dict[str, Any]:
  """Shows the layers, and leaves result.json where --workdir says.

  Returns:
    What result.json holds: `flags`, `forward_speedup`, `backward_speedup`,
    and `step_speedup_with_memory`, which counts the cycles that wait for it.
  """
  layers = layers_of(without_data(values), values)
  print(reporting.markdown_table(
      [{'layer': path, **{name: getattr(found, name).speedup for name in PARTS},
        'with memory': (found.forward + found.backward).speedup_with_stalls}
       for path, found in layers],
      formats=dict.fromkeys((*PARTS, 'with memory'), '.2f')))
  forward, backward = (functools.reduce(lambda a, b: a + b, (
      getattr(found, name) for _, found in layers))
                       for name in ('forward', 'backward'))
  result = {'flags': dict(values), 'forward_speedup': forward.speedup,
            'backward_speedup': backward.speedup,
            'step_speedup_with_memory': (
                forward + backward).speedup_with_stalls}
  print('times as fast: forward {:.2f}, backward {:.2f}, the step with memory '
        '{:.2f}'.format(*list(result.values())[1:]), flush=True)
  if values['workdir'] is not None:
    os.makedirs(values['workdir'], exist_ok=True)
    reporting.write_json(os.path.join(values['workdir'], 'result.json'), result)
  return result


def main(argv):
  programs.begin(argv)
  with programs.errors_in_a_line():
    run(run_config())


if __name__ == '__main__':
  programs.run(main)
