"""What blocks cost in accuracy, and what the order of the units wins back.

  python -m experiments.permuted_blocks --dataset=fashion_mnist --data_dir=DIR

trains a network of two wide hidden layers, prunes it by magnitude, entry by
entry and to blocks of each size, and trains it on with the same zeros; and
trains the same network sparse from scratch, by several methods. Blocks are
plain, balanced (each column of tiles keeps as many), or chosen after
`sparse_jax.permute_units`; from scratch also `shuffled`: balanced, and each
layer reads the one before in an order of its own. A balanced column keeps at
least one tile, so it may have more weights than is asked for. Leaves
table.md, rows.csv and a picture of each part in --workdir.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import functools
import math
import os
import statistics

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax
from experiments import files
from experiments import plots
from experiments import programs
from experiments import reporting
from experiments.image import input_pipeline

_DATASET = flags.DEFINE_enum('dataset', 'digits', ['digits', 'mnist',
                                                   'fashion_mnist'], 'Images.')
_DATA_DIR = flags.DEFINE_string('data_dir', None, 'Folder of prepared sets.')
_WIDTH = flags.DEFINE_integer('width', 1024, 'Of both hidden layers.',
                              lower_bound=1)
_SEEDS = flags.DEFINE_list('seeds', ['0', '1'], 'Runs of each row.')
_STEPS = flags.DEFINE_integer('steps', 1000, 'Of the dense network.',
                              lower_bound=1)
_TUNE_STEPS = flags.DEFINE_integer('tune_steps', 200, 'After pruning.',
                                   lower_bound=1)
_SCRATCH_STEPS = flags.DEFINE_integer('scratch_steps', 400, 'From scratch.',
                                      lower_bound=1)
_METHODS = flags.DEFINE_list('methods', ['magnitude', 'static', 'rigl', 'snip',
                                         'top_kast'], 'magnitude: of the dense '
                             'network; the others from scratch.')
_BLOCKS = flags.DEFINE_list('blocks', ['64', '128'], 'Sides of the tiles.')
_SPARSITIES = flags.DEFINE_list('sparsities', ['80', '90', '95'], 'Of the '
                                'hidden kernels, in percent.')
_WORKDIR = flags.DEFINE_string('workdir', 'runs/permuted_blocks', 'Where '
                               'tables and pictures go.')
NAMES = ('method', 'arrangement', 'block', 'sparsity', 'seed', 'kept',
         'pruned', 'accuracy')
BATCH, RATE = 64, 1e-3
HIDDEN = {'head': False, 'hidden': True}
UNITS = ({'hidden_0': 0}, {'hidden_0': 1, 'hidden_1': 0},
         {'hidden_1': 1, 'head': 0})
ARRANGEMENTS = {
    'magnitude': ('blocks', 'balanced', 'permuted', 'permuted balanced'),
    'static': ('blocks', 'balanced', 'shuffled'),
    'rigl': ('blocks', 'balanced', 'shuffled'),
    'snip': ('blocks', 'permuted'), 'top_kast': ('blocks', 'balanced')}


def network(key: jax.Array, inputs: int, width: int) -> dict[str, jax.Array]:
  """Kernels of variance 2 / inputs."""
  sizes = {'hidden_0': (inputs, width), 'hidden_1': (width, width),
           'head': (width, 10)}
  return {name: math.sqrt(2 / shape[0]) * jax.random.normal(
      jax.random.fold_in(key, i), shape)
          for i, (name, shape) in enumerate(sizes.items())}


def logits(weights: Mapping[str, jax.Array], images: jax.Array,
           orders: Sequence[jax.Array]) -> jax.Array:
  """float[b, 10]; `orders` say in which order each hidden layer is read."""
  x = images
  for name, order in zip(('hidden_0', 'hidden_1'), orders):
    x = jax.nn.relu(x[:, order] @ weights[name])
  return x @ weights['head']


def cost(weights, images, labels, orders):
  """The mean cross entropy."""
  return optax.softmax_cross_entropy_with_integer_labels(
      logits(weights, images, orders), labels).mean()


def train(params, method, data, orders, *, steps: int, key):
  """What the forward pass sees after training by Adam, and the masks."""
  images, labels = data
  tx = sparse_jax.sparsify(optax.adam(RATE), method, key=key)
  params, state = sparse_jax.start(tx, method, params)

  @functools.partial(jax.jit, donate_argnums=0)
  def step(carry, chosen, images, labels, orders):
    params, state = carry
    grads = jax.grad(lambda params: cost(
        method.read(params, state), images[chosen], labels[chosen], orders))(
            params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  random = np.random.default_rng(np.asarray(jax.random.key_data(key)))
  carry = jax.tree.map(jnp.array, (params, state))
  for _ in range(steps):
    chosen = random.integers(0, len(labels), BATCH)
    carry = step(carry, chosen, images, labels, orders)
  return method.read(*carry), sparse_jax.get_state(carry[1]).forward_masks


@jax.jit
def accuracy(weights, images, labels, orders):
  """In percent."""
  return 100 * jnp.mean(logits(weights, images, orders).argmax(1) == labels)


def structure_of(arrangement: str, block: int) -> sparse_jax.masks.Structure:
  """What is kept together; a block of 1 is an entry."""
  if block == 1:
    return sparse_jax.Unstructured()
  return sparse_jax.Block((block, block), balanced=arrangement in (
      'balanced', 'permuted balanced', 'shuffled'))


def permuted(params, orders, arrangement, sparsity, structure, scores=None):
  """The parameters in the order that suits blocks, and that of the inputs."""
  if not arrangement.startswith('permuted'):
    return params, orders
  params, (first, *_) = sparse_jax.permute_units(
      params, UNITS, sparsity=sparsity, structure=structure, scores=scores,
      is_sparse=HIDDEN)
  return params, (jnp.asarray(first), *orders[1:])


def saliency(params, images, labels, orders):
  """|weight x gradient| of 2048 images, SNIP's scores."""
  grads = jax.grad(cost)(params, images[:2048], labels[:2048], orders)
  return jax.tree.map(lambda leaf, grad: jnp.abs(leaf * grad), params, grads)


def measures(params, masks, data, orders) -> dict[str, float]:
  """What is kept of the hidden kernels and the test accuracy, in percent."""
  hidden = [np.asarray(mask) for mask in jax.tree.leaves(masks)]
  return {'kept': 100 * sum(mask.sum() for mask in hidden) / sum(
      mask.size for mask in hidden),
          'accuracy': float(accuracy(params, *data, orders))}


def prune_row(dense, train_data, test_data, orders, *, arrangement, block,
              sparsity, key, steps):
  """A trained network, pruned and trained on."""
  structure = structure_of(arrangement, block)
  params, orders = permuted(dense, orders, arrangement, sparsity, structure)
  params = sparse_jax.one_shot(
      logits, params, [(test_data[0][:1], orders)], sparsity=sparsity,
      by='magnitude', structure=structure, is_sparse=HIDDEN)
  masks = {name: leaf != 0 for name, leaf in params.items() if name != 'head'}
  pruned = float(accuracy(params, *test_data, orders))
  params, masks = train(params, sparse_jax.fixed(masks, structure=structure),
                        train_data, orders, steps=steps, key=key)
  return {'pruned': pruned} | measures(params, masks, test_data, orders)


def scratch_row(first, train_data, test_data, orders, *, method, arrangement,
                block, sparsity, key, steps):
  """The same network, sparse from the first step, its scale kept."""
  structure = structure_of(arrangement, block)
  first = {name: leaf / math.sqrt(1 - sparsity * (name != 'head'))
           for name, leaf in first.items()}
  if arrangement == 'shuffled':
    orders = tuple(jax.random.permutation(jax.random.fold_in(key, i), order)
                   for i, order in enumerate(orders))
  given = dict(structure=structure, is_sparse=HIDDEN)
  if method == 'snip':
    first, orders = permuted(first, orders, arrangement, sparsity, structure,
                             saliency(first, *train_data, orders))
    scores = saliency(first, *train_data, orders)
    rule = sparse_jax.fixed({name: sparse_jax.make_mask(
        scores[name], sparsity, structure=structure) for name in scores
                             if name != 'head'}, structure=structure)
  elif method == 'top_kast':
    rule = sparse_jax.top_kast(sparsity, update_every=steps // 20 or 1,
                               backward_sparsity=sparsity - .1, **given)
  elif method == 'rigl':
    rule = sparse_jax.rigl(sparsity, update_every=steps // 20 or 1,
                           update_end=steps * 3 // 4, **given)
  else:
    rule = sparse_jax.static(sparsity, **given)
  params, masks = train(first, rule, train_data, orders, steps=steps, key=key)
  return measures(params, masks, test_data, orders)


def data_of(dataset: str, split: str, data_dir: str | None):
  """Images float32[n, pixels] and labels int32[n]."""
  found = input_pipeline.load(dataset, split, data_dir)
  images = input_pipeline.normalise(found.images, dataset)
  return images.reshape(len(images), -1), jnp.asarray(found.labels)


def cells(methods: Sequence[str], blocks: Sequence[int]):
  """(method, arrangement, block) of every row, entry by entry first."""
  return [cell for method in methods for cell in [
      (method, 'entries', 1), *((method, arrangement, block)
                                for block in blocks
                                for arrangement in ARRANGEMENTS[method])]]


def study(train_data, test_data, *, methods, blocks, sparsities, seeds, width,
          steps, tune_steps, scratch_steps, done=lambda rows: None
          ) -> list[dict[str, float]]:
  """A row for each cell, sparsity in percent and seed; `done` sees them."""
  rows, inputs = [], train_data[0].shape[1]
  orders = (jnp.arange(inputs), jnp.arange(width))
  todo = cells(methods, blocks)
  with reporting.Progress(len(seeds) * len(sparsities) * len(todo)) as progress:
    for i, seed in enumerate(seeds):
      key = jax.random.key(seed)
      first = network(key, inputs, width)
      dense, _ = train(first, sparse_jax.dense(), train_data, orders,
                       steps=steps, key=key)
      rows.append({'method': 'dense', 'arrangement': 'entries', 'block': 1,
                   'sparsity': 0., 'seed': seed, 'accuracy': float(
                       accuracy(dense, *test_data, orders))})
      for sparsity in sparsities:
        for method, arrangement, block in todo:
          given = dict(arrangement=arrangement, block=block,
                       sparsity=sparsity / 100)
          if method == 'magnitude':
            row = prune_row(dense, train_data, test_data, orders,
                            steps=tune_steps, key=key, **given)
          else:
            row = scratch_row(first, train_data, test_data, orders,
                              method=method, steps=scratch_steps,
                              key=jax.random.fold_in(key, len(first)), **given)
          rows.append({'method': method, 'arrangement': arrangement,
                       'block': block, 'sparsity': sparsity, 'seed': seed}
                      | row)
          done(rows)
          progress.update(len(rows) - i - 1)
  return rows


def summary(rows: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
  """Means over the seeds, and the deviation of the accuracy."""
  found = {}
  for row in rows:
    found.setdefault(tuple(row[name] for name in NAMES[:4]), []).append(row)
  return [dict(zip(NAMES, cell)) | {
      name: statistics.fmean(run[name] for run in runs)
      for name in NAMES[5:] if name in runs[0]} | {
          'deviation': statistics.pstdev(run['accuracy'] for run in runs)}
          for cell, runs in found.items()]


def write(rows: Sequence[Mapping[str, float]], workdir: str) -> str:
  """Tables and pictures; returns the table."""
  os.makedirs(workdir, exist_ok=True)
  means = summary(rows)
  table = reporting.markdown_table(means, formats={
      name: '.1f' for row in means for name in row
      if name in (*NAMES[5:], 'deviation')})
  files.write_text(os.path.join(workdir, 'table.md'), table)
  lines = [NAMES, *([row.get(name, '') for name in NAMES] for row in rows)]
  files.write_text(os.path.join(workdir, 'rows.csv'), ''.join(
      ','.join(map(str, line)) + '\n' for line in lines))
  for method in {row['method'] for row in means} - {'dense'}:
    plots.lines(
        [{'row': 'dense' if row['method'] == 'dense' else
          row['arrangement'] + f' {row["block"]}' * (row['block'] > 1),
          'x': 100 - row.get('kept', 100), 'ours': row['accuracy'],
          'deviation': row['deviation']} for row in means
         if row['method'] in ('dense', method)],
        os.path.join(workdir, f'{method}.png'), f'Blocks, {method}',
        xlabel='sparsity of the hidden kernels (%)', scale='sparsity',
        published=False, ylabel='test accuracy (%)')
  return table


def main(argv):
  del argv
  train_data, test_data = (data_of(_DATASET.value, split, _DATA_DIR.value)
                           for split in ('train', 'test'))
  rows = study(
      train_data, test_data, methods=_METHODS.value,
      blocks=[int(size) for size in _BLOCKS.value],
      sparsities=[float(share) for share in _SPARSITIES.value],
      seeds=[int(seed) for seed in _SEEDS.value], width=_WIDTH.value,
      steps=_STEPS.value, tune_steps=_TUNE_STEPS.value,
      scratch_steps=_SCRATCH_STEPS.value,
      done=lambda rows: write(rows, _WORKDIR.value))
  print(write(rows, _WORKDIR.value), end='')


if __name__ == '__main__':
  programs.run(main)
