"""Cycles of a training step on an array that skips zeros, as SWAT reports.

A small ResNet is trained for a while with SWAT's weights (the largest in
magnitude at every step, a dense gradient to them); then the weights and the
activations of one step are given to the cycle model, the activations of the
backward pass without all but their largest. The first layer stays dense.

  python -m experiments.benchmarks.accelerator --dataset=cifar10 --data_dir=DIR

Prints the speed-up of the arithmetic over the same array without skipping, at
each sparsity and for several arrays, beside the published ones, and a table of
the layers for the first array. Recorded results: README.md one folder up.
"""

import functools

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax
from experiments import reporting
from experiments.image import input_pipeline
from experiments.image import models

PUBLISHED = {0.: (1., 1.), .8: (3.3, 3.4), .9: (5.6, 6.3)}
DENSE = ('stem/kernel',)

_DATASET = flags.DEFINE_enum('dataset', 'digits',
                             sorted(input_pipeline.DATASETS),
                             'What to train on.')
_DATA_DIR = flags.DEFINE_string('data_dir', None, 'Where it is prepared.')
_MODEL = flags.DEFINE_enum('model', 'resnet20', sorted(models.MODELS),
                           'The network.')
_STEPS = flags.DEFINE_integer('steps', 100, 'Training steps before the one '
                              'that is looked at.')
_BATCH = flags.DEFINE_integer('batch_size', 32, 'Images in a training step.')
_IMAGES = flags.DEFINE_integer('images', 4, 'Images of the step that is '
                               'looked at.')


def machines() -> dict[str, sparse_jax.Machine]:
  """Arrays of 16 lanes: DNNsim's, then ones that reach further."""
  wide = sparse_jax.Machine()
  single = wide._replace(rows=1, tiles=256)
  return {
      '16 rows, 2 steps ahead, 5 lanes aside': wide,
      '16 rows, 9 ahead, 10 aside': wide._replace(lookahead=9, lookaside=10),
      '1 row, 2 ahead, 5 aside': single,
      '1 row, 9 ahead, 10 aside': single._replace(lookahead=9, lookaside=10),
  }


def train(model, batches, sparsity: float):
  """Parameters as the forward pass reads them, and batch statistics."""
  method = (sparse_jax.dnw(sparsity, is_sparse=[(path, False) for path in
                                                DENSE])
            if sparsity else sparse_jax.dense())
  tx = sparse_jax.sparsify(optax.sgd(.05, momentum=.9), method)
  images, _ = next(batches)
  variables = model.init(jax.random.key(0), images, train=False)
  params, stats = variables['params'], variables['batch_stats']

  def loss_fn(params, opt_state, stats, images, labels):
    weights = method.read(params, opt_state)
    logits, new = model.apply({'params': weights, 'batch_stats': stats},
                              images, train=True, mutable=['batch_stats'])
    return optax.softmax_cross_entropy_with_integer_labels(
        logits, labels).mean(), new['batch_stats']

  @jax.jit
  def step(params, opt_state, stats, images, labels):
    grads, stats = jax.grad(loss_fn, has_aux=True)(
        params, opt_state, stats, images, labels)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, stats

  opt_state = tx.init(params)
  for _ in range(_STEPS.value):
    params, opt_state, stats = step(params, opt_state, stats, *next(batches))
  return method.read(params, opt_state), stats


def operands(model, params, stats, images):
  """(path, product, lhs, rhs) of each layer in a training step."""
  seen = []

  def note(path, product, lhs, rhs):
    seen.append((path, product, np.asarray(lhs), np.asarray(rhs)))
    return product.apply(lhs, rhs)

  def apply(params, images):
    return model.apply({'params': params, 'batch_stats': stats}, images,
                       train=True, mutable=['batch_stats'])

  sparse_jax.replace_products(apply, note)(params, images)
  return seen


def saved(path, activations, sparsity: float):
  """The activations as SWAT saves them: the largest of the whole tensor."""
  if path in DENSE or not sparsity:
    return activations
  mask = sparse_jax.make_mask(jnp.abs(activations).ravel(), sparsity)
  return activations * np.asarray(mask).reshape(activations.shape)


def batches(split):
  """Pairs of normalised images and labels, without end."""
  for batch in input_pipeline.train_batches(
      split, batch_size=_BATCH.value, seed=0, augment=False):
    yield (input_pipeline.normalise(batch['image'], _DATASET.value),
           batch['label'])


def total(layers, name):
  return functools.reduce(lambda a, b: a + b, (
      getattr(cycles, name) for _, cycles in layers))


def layer_rows(layers):
  return [{'layer': path, **{
      name: getattr(cycles, name).speedup for name in (
          'forward', 'input_gradient', 'weight_gradient')},
           'with memory': (cycles.forward + cycles.backward
                           ).speedup_with_stalls} for path, cycles in layers]


def main(_):
  split = input_pipeline.load(_DATASET.value, 'train', _DATA_DIR.value)
  model = models.create(_MODEL.value, num_classes=input_pipeline.DATASETS[
      _DATASET.value].num_classes)
  rows = []
  for sparsity, (forward, backward) in PUBLISHED.items():
    stream = batches(split)
    params, stats = train(model, stream, sparsity)
    images = next(stream)[0][:_IMAGES.value]
    seen = operands(model, params, stats, images)
    for name, machine in machines().items():
      layers = [(path, sparse_jax.layer_cycles(
          product, lhs, rhs, machine=machine,
          saved=saved(path, lhs, sparsity)))
                for path, product, lhs, rhs in seen]
      sums = [total(layers, part) for part in ('forward', 'backward')]
      rows.append({
          'sparsity': sparsity, 'array': name, 'forward': sums[0].speedup,
          'published': forward, 'backward': sums[1].speedup,
          'published ': backward,
          'step, with memory': (sums[0] + sums[1]).speedup_with_stalls})
      if name == next(iter(machines())):
        print(reporting.markdown_table(layer_rows(layers), formats={
            key: '.2f' for key in ('forward', 'input_gradient',
                                   'weight_gradient', 'with memory')}))
    print(f'done: sparsity {sparsity}', flush=True)
  print(reporting.markdown_table(rows, formats={
      key: '.2f' for key in ('forward', 'backward', 'step, with memory')}))


if __name__ == '__main__':
  app.run(main)
