"""Cycles of a training step on an array that skips zeros, as SWAT reports.

A small ResNet is trained for a while with SWAT's weights (the largest in
magnitude at every step, a dense gradient to them); then the weights and the
activations of one step are given to the cycle model, the activations of the
backward pass without all but their largest. The first layer stays dense.

  python -m experiments.benchmarks.accelerator --dataset=cifar10 \\
      --data_dir=DIR --sparsity=0.9 --rows=1 --lookahead=9 --lookaside=10

Prints a table of the layers, and the speed-up of the arithmetic over the same
array without skipping; leaves result.json in --workdir, if given. The training
is that of experiments.image.train, with its flags. The table
`swat_accelerator` of launch.run has the published ones beside them. Recorded
results: README.md one folder up.
"""

from collections.abc import Mapping
import functools
import os
import re
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

import sparse_jax
from experiments import programs
from experiments import reporting
from experiments import results
from experiments import tasks
from experiments import training
from experiments.image import input_pipeline
from experiments.image import train

_OWN = (
    flags.DEFINE_integer('images', 4, 'Images of the step that is looked at.'),
    flags.DEFINE_integer('rows', 16, 'Of a tile; there are 256 in all tiles.'),
    flags.DEFINE_integer('lookahead', 2, 'Steps that a lane reaches ahead.'),
    flags.DEFINE_integer('lookaside', 5, 'Entries in reach in other lanes.'))
for _name, _value in {
    'model': 'resnet20', 'method': 'dnw', 'dense_layers': 'stem',
    'train_steps': 100, 'batch_size': 32, 'augment': False, 'weight_decay': 0.,
    'optimizer': 'momentum', 'learning_rate': .05, 'lr_schedule': 'constant',
    'warmup_share': 0.}.items():
  flags.FLAGS.set_default(_name, _value)
flags.DEFINE_alias('steps', 'train_steps')  # It takes the default with it.

# It saves nothing, evaluates nothing, and takes one device.
_UNUSED = ('log_every', 'eval_every', 'checkpoint_every', 'compare_masks_every',
           'effective_sparsity', 'model_parallel', 'distributed')

# Rows in all tiles: arrays of one size, of 16 lanes and 16 columns.
ALL_ROWS = 256
FREE = train.FREE
PARTS = ('forward', 'input_gradient', 'weight_gradient')


def run_config() -> dict[str, Any]:
  """The flags that make a run what it is."""
  return train.run_config() | {flag.name: flag.value for flag in _OWN}


def machine_of(values: Mapping[str, Any]) -> sparse_jax.cost.Machine:
  """The array of the flags."""
  rows = values['rows']
  if rows < 1 or ALL_ROWS % rows:
    raise ValueError(f'`rows` (={rows}) must divide {ALL_ROWS}.')
  return sparse_jax.cost.Machine(
      rows=rows, tiles=ALL_ROWS // rows, lookahead=values['lookahead'],
      lookaside=values['lookaside']).checked()


def check_given() -> None:
  """Raises ValueError for a flag of runs that this study has no use for."""
  for name in _UNUSED:
    if flags.FLAGS[name].present:
      raise ValueError(f'`{name}` (={flags.FLAGS[name].value!r}) is a setting '
                       'of runs, not of this study.')


def without_data(values: Mapping[str, Any]) -> tuple[tasks.Task, int]:
  """What is trained, and how long; a ValueError names a flag."""
  if not 1 <= values['images'] <= values['batch_size']:
    raise ValueError(f'`images` (={values["images"]}) must be in '
                     f'[1, {values["batch_size"]}], that of a batch.')
  machine_of(values)
  return train.without_data(values)


describe = functools.partial(training.describe, without_data)


def layers_of(values: Mapping[str, Any]):
  """(path, LayerCycles) of each layer in the step after the training."""
  task, steps = without_data(values)
  batches = input_pipeline.train_batches(
      train.load(values, 'train'), batch_size=values['batch_size'],
      seed=values['seed'], augment=values['augment'])
  state = tasks.init_state(task, values['seed'])
  step = jax.jit(functools.partial(tasks.train_step, task))
  for _ in range(steps):
    state = step(state, next(batches))
  machine, found = machine_of(values), []
  dense = [re.compile(pattern) for pattern in values['dense_layers']]

  def note(path, product, lhs, rhs):
    given = np.asarray(lhs)
    is_dense = any(pattern.search(path) for pattern in dense)
    found.append((path, sparse_jax.cost.layer_cycles(
        product, given, np.asarray(rhs), machine=machine,
        saved=saved(given, 0. if is_dense else values['sparsity']))))
    return product.apply(lhs, rhs)

  apply = functools.partial(task.problem.apply, train=True,
                            mutable=['batch_stats'])
  sparse_jax.jaxprs.replace_products(
      lambda weights, images: apply(weights, state.model_state, images), note)(
          sparse_jax.dense_weights(task.method, state.params, state.opt_state),
          next(batches)['image'][:values['images']])
  return found


def saved(activations: np.ndarray, sparsity: float) -> np.ndarray:
  """The activations as SWAT saves them: the largest of the whole tensor."""
  if not sparsity:
    return activations
  mask = sparse_jax.make_mask(jnp.abs(activations).ravel(), sparsity)
  return activations * np.asarray(mask).reshape(activations.shape)


def run(values: Mapping[str, Any]) -> dict[str, Any]:
  """Shows the layers, and leaves result.json where --workdir says.

  Returns:
    What result.json holds: `flags`, `forward_speedup`, `backward_speedup`,
    and `step_speedup_with_memory`, which counts the cycles that wait for it.
  """
  layers = layers_of(values)
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
    reporting.write_json(os.path.join(values['workdir'], results.NAME), result)
  return result


def main(argv):
  programs.begin(argv)
  with programs.errors_in_a_line():
    check_given()
    run(run_config())


if __name__ == '__main__':
  programs.run(main)
