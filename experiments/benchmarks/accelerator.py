"""Cycles of a training step on an array that skips zeros, as SWAT reports.

A small ResNet is trained for a while with SWAT's weights (the largest in
magnitude at every step, a dense gradient to them); then the weights and the
activations of one step are given to the cycle model, the activations of the
backward pass without all but their largest. The first layer stays dense.

  python -m experiments.benchmarks.accelerator --dataset=cifar10 --data_dir=DIR

Prints the speed-up of the arithmetic over the same array without skipping, at
each published sparsity and for several arrays, beside the published ones, and a
table of the layers for the first array. Recorded results: README.md one folder
up.

  python -m experiments.benchmarks.accelerator --sparsity=0.9 --rows=1 \\
      --lookahead=9 --lookaside=10 --workdir=DIR

does so for one sparsity and one array, and leaves result.json in --workdir.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import functools
import os
from typing import Any
from typing import NamedTuple

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

PUBLISHED = {0.: (1., 1.), .8: (3.3, 3.4), .9: (5.6, 6.3)}
DENSE = ('stem/kernel',)
LEARNING_RATE = .05
# Rows in all tiles: arrays of one size, of 16 lanes and 16 columns.
ALL_ROWS = 256
ARRAY = ('rows', 'lookahead', 'lookaside')  # Flags of one array.
FREE = ('workdir', 'data_dir')  # Flags that say nothing about the result.

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
    flags.DEFINE_float('sparsity', None, 'Of weights and saved activations. '
                       'Default: each of the published ones.'),
    flags.DEFINE_integer('rows', None, 'Of a tile; there are 256 in all tiles. '
                         'Default: several arrays, or 16 in one.'),
    flags.DEFINE_integer('lookahead', None, 'Steps that a lane reaches ahead. '
                         'Default: several arrays, or 2 in one.'),
    flags.DEFINE_integer('lookaside', None, 'Entries in reach in other lanes. '
                         'Default: several arrays, or 5 in one.'),
    flags.DEFINE_string('workdir', None, 'Where result.json goes, of one '
                        'sparsity and one array.'),
)


class Study(NamedTuple):
  """A network in training, at one sparsity."""

  model: Any
  method: sparse_jax.SparseMethod
  tx: optax.GradientTransformation
  dataset: str


class State(NamedTuple):
  """What a step changes."""

  params: Any
  opt_state: Any
  stats: Any  # Of batch norm.


def machines(values: Mapping[str, Any]) -> dict[str, sparse_jax.cost.Machine]:
  """The array of the flags, or DNNsim's and three that reach further."""
  given = {name: values[name] for name in ARRAY if values[name] is not None}
  fields = [given] if given else [
      {'rows': rows, **reach} for rows in (16, 1)
      for reach in ({}, {'lookahead': 9, 'lookaside': 10})]
  return {_name(machine): machine for machine in map(_machine, fields)}


def _machine(fields: Mapping[str, int]) -> sparse_jax.cost.Machine:
  machine = sparse_jax.cost.Machine()._replace(**fields)
  if machine.rows < 1 or ALL_ROWS % machine.rows:
    raise ValueError(f'`rows` (={machine.rows}) must divide {ALL_ROWS}.')
  return machine._replace(tiles=ALL_ROWS // machine.rows).checked()


def _name(machine: sparse_jax.cost.Machine) -> str:
  rows = '1 row' if machine.rows == 1 else f'{machine.rows} rows'
  return f'{rows}, {machine.lookahead} ahead, {machine.lookaside} aside'


def make_study(values: Mapping[str, Any], sparsity: float) -> Study:
  """The network of the flags, with SWAT's weights."""
  model = models.create(values['model'], num_classes=input_pipeline.DATASETS[
      values['dataset']].num_classes)
  method = (sparse_jax.dnw(sparsity, is_sparse=[(path, False) for path in
                                                DENSE])
            if sparsity else sparse_jax.dense())
  tx = sparse_jax.sparsify(optax.sgd(LEARNING_RATE, momentum=.9), method)
  return Study(model, method, tx, values['dataset'])


def first_state(study: Study, seed: int) -> State:
  """The state before the first step."""
  images = jnp.zeros((1, *input_pipeline.DATASETS[study.dataset].image_shape))
  variables = study.model.init(jax.random.key(seed), images, train=False)
  params = variables['params']
  return State(params, study.tx.init(params), variables.get('batch_stats', {}))


def loss_fn(study: Study, weights, stats, images, labels):
  """Mean cross-entropy, and the new batch statistics."""
  logits, new = study.model.apply(
      {'params': weights, 'batch_stats': stats},
      input_pipeline.normalise(images, study.dataset), train=True,
      mutable=['batch_stats'])
  return optax.softmax_cross_entropy_with_integer_labels(
      logits, labels).mean(), new.get('batch_stats', {})


def train_step(study: Study, state: State, batch) -> State:
  """One update."""
  def loss(params):
    return loss_fn(study, study.method.read(params, state.opt_state),
                   state.stats, batch['image'], batch['label'])

  grads, stats = jax.grad(loss, has_aux=True)(state.params)
  updates, opt_state = study.tx.update(grads, state.opt_state, state.params)
  return State(optax.apply_updates(state.params, updates), opt_state, stats)


def train(study: Study, batches: Iterator[Any], steps: int, seed: int) -> State:
  """The state after some steps."""
  state = first_state(study, seed)
  step = jax.jit(functools.partial(train_step, study))
  for _ in range(steps):
    state = step(state, next(batches))
  return state


def operands(study: Study, state: State, images):
  """(path, product, lhs, rhs) of each layer in a training step."""
  seen = []

  def note(path, product, lhs, rhs):
    seen.append((path, product, np.asarray(lhs), np.asarray(rhs)))
    return product.apply(lhs, rhs)

  def apply(params, images):
    return study.model.apply(
        {'params': params, 'batch_stats': state.stats},
        input_pipeline.normalise(images, study.dataset), train=True,
        mutable=['batch_stats'])

  weights = study.method.read(state.params, state.opt_state)
  sparse_jax.jaxprs.replace_products(apply, note)(weights, images)
  return seen


def saved(path: str, activations: np.ndarray, sparsity: float) -> np.ndarray:
  """The activations as SWAT saves them: the largest of the whole tensor."""
  if path in DENSE or not sparsity:
    return activations
  mask = sparse_jax.make_mask(jnp.abs(activations).ravel(), sparsity)
  return activations * np.asarray(mask).reshape(activations.shape)


def seen_operands(values: Mapping[str, Any], data, sparsity: float):
  """Trains, and returns the `operands` of the step after that."""
  batches = input_pipeline.train_batches(
      data, batch_size=values['batch_size'], seed=values['seed'], augment=False)
  study = make_study(values, sparsity)
  state = train(study, batches, values['steps'], values['seed'])
  return operands(study, state, next(batches)['image'][:values['images']])


def cycles(seen, sparsity: float, machine: sparse_jax.cost.Machine):
  """(path, LayerCycles) of each layer."""
  return [(path, sparse_jax.cost.layer_cycles(
      product, lhs, rhs, machine=machine, saved=saved(path, lhs, sparsity)))
          for path, product, lhs, rhs in seen]


def total(layers, name: str) -> sparse_jax.cost.accelerator.Cycles:
  """Cycles of a pass through all layers."""
  return functools.reduce(lambda a, b: a + b, (
      getattr(found, name) for _, found in layers))


def layer_rows(layers) -> list[dict[str, Any]]:
  """The table of the layers."""
  return [{'layer': path, **{
      name: getattr(found, name).speedup for name in (
          'forward', 'input_gradient', 'weight_gradient')},
           'with memory': (found.forward + found.backward
                           ).speedup_with_stalls} for path, found in layers]


def row(sparsity: float, array: str, layers) -> dict[str, Any]:
  """A line of the table of arrays."""
  forward, backward = (total(layers, name) for name in ('forward', 'backward'))
  published = PUBLISHED.get(sparsity, (None, None))
  return {'sparsity': sparsity, 'array': array, 'forward': forward.speedup,
          'published': published[0], 'backward': backward.speedup,
          'published ': published[1],
          'step, with memory': (forward + backward).speedup_with_stalls}


def study_all(values: Mapping[str, Any], show: Callable[[str], None]
              ) -> list[dict[str, Any]]:
  """Every sparsity and array of the flags; shows the tables.

  A bad flag, or data that is not there, is named before anything runs.
  """
  check(values)
  data = input_pipeline.load(values['dataset'], 'train', values['data_dir'])
  rows = []
  for sparsity in sparsities(values):
    seen = seen_operands(values, data, sparsity)
    for array, machine in machines(values).items():
      layers = cycles(seen, sparsity, machine)
      if array == next(iter(machines(values))):
        show(reporting.markdown_table(layer_rows(layers), formats={
            name: '.2f' for name in ('forward', 'input_gradient',
                                     'weight_gradient', 'with memory')}))
      rows.append(row(sparsity, array, layers))
    show(f'done: sparsity {sparsity}')
  show(reporting.markdown_table(rows, formats={
      name: '.2f' for name in ('forward', 'backward', 'step, with memory')}))
  return rows


def sparsities(values: Mapping[str, Any]) -> list[float]:
  """Of the flags."""
  given = values['sparsity']
  return list(PUBLISHED) if given is None else [given]


def check(values: Mapping[str, Any]) -> None:
  """Raises ValueError naming the flag and its value; needs no data."""
  least = {'steps': 0, 'batch_size': 1, 'images': 1, 'seed': 0}
  for name, smallest in least.items():
    if values[name] < smallest:
      raise ValueError(f'`{name}` (={values[name]}) must be at least '
                       f'{smallest}.')
  num_train = input_pipeline.DATASETS[values['dataset']].num_train
  for name, most in (('batch_size', num_train), ('images',
                                                 values['batch_size'])):
    if values[name] > most:
      raise ValueError(f'`{name}` (={values[name]}) must be at most {most}.')
  for sparsity in sparsities(values):
    if not 0 <= sparsity < 1:
      raise ValueError(f'`sparsity` (={sparsity}) must be in [0, 1).')
  machines(values)
  if values['workdir'] is not None:
    _check_one(values)


def _check_one(values) -> None:
  """Raises ValueError unless there is one sparsity and one array."""
  if values['sparsity'] is None or len(machines(values)) > 1:
    raise ValueError(
        f'`sparsity` (={values["sparsity"]}) must be given, and one of '
        f'{", ".join(ARRAY)}, for a `workdir` (={values["workdir"]!r}): a '
        'result is of one sparsity and one array.')


def without_data(values: Mapping[str, Any]) -> Study:
  """What a run of these flags trains; a ValueError names a flag."""
  check(values)
  _check_one(values)
  return make_study(values, values['sparsity'])


def describe(values: Mapping[str, Any]) -> dict[str, Any]:
  """Size, length and cost of the training, as `training.describe`."""
  study = without_data(values)
  state = jax.eval_shape(functools.partial(first_state, study, 0))
  shape = jax.ShapeDtypeStruct
  image_shape = input_pipeline.DATASETS[values['dataset']].image_shape

  def batch(size):
    return (state.stats, shape((size, *image_shape), jnp.uint8),
            shape((size,), jnp.int32))

  return {'train_steps': values['steps'], 'batch_size': values['batch_size'],
          'learning_rate': LEARNING_RATE, **accounting.forecast(
              lambda *inputs: loss_fn(study, *inputs)[0], state, batch(1),
              batch(2), study.method, batch_size=values['batch_size'],
              steps=values['steps'])}


def run_config() -> dict[str, Any]:
  """The flags that make a run what it is."""
  return {flag.name: flag.value for flag in _FLAGS}


def run(values: Mapping[str, Any], show: Callable[[str], None]) -> None:
  """Shows the tables, and leaves result.json where --workdir says."""
  found = study_all(values, show)
  if values['workdir'] is not None:
    os.makedirs(values['workdir'], exist_ok=True)
    reporting.write_json(
        os.path.join(values['workdir'], 'result.json'), {
            'flags': dict(values), 'forward_speedup': found[0]['forward'],
            'backward_speedup': found[0]['backward'],
            'step_speedup_with_memory': found[0]['step, with memory']})


def main(argv):
  programs.begin(argv)
  with programs.errors_in_a_line():
    run(run_config(), functools.partial(print, flush=True))


if __name__ == '__main__':
  programs.run(main)
