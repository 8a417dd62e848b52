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

from collections.abc import Iterator, Mapping, Sequence
import functools
import itertools
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
_SPARSITIES = flags.DEFINE_list('sparsities', ['80', '90', '95'], 'Of the '
                                'hidden kernels, in percent.')
_WORKDIR = flags.DEFINE_string('workdir', 'runs/permuted_blocks', 'Where '
                               'tables and pictures go.')
NAMES = ('method', 'arrangement', 'block', 'sparsity', 'seed', 'kept',
         'pruned', 'accuracy')
BATCH, RATE = 64, 1e-3
# Of both hidden layers, and sides of the tiles.
SIZE = {'width': 1024, 'blocks': (64, 128)}
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


def saliency(params, images, labels, orders):
  """|weight x gradient| of 2048 images, SNIP's scores."""
  grads = jax.grad(cost)(params, images[:2048], labels[:2048], orders)
  return jax.tree.map(lambda leaf, grad: jnp.abs(leaf * grad), params, grads)


def method_of(name, sparsity, structure, steps, scores):
  """What trains a network that is sparse from the first step."""
  given = dict(structure=structure, is_sparse=HIDDEN)
  every = dict(update_every=steps // 20 or 1)
  if name == 'snip':
    return sparse_jax.fixed({leaf: sparse_jax.make_mask(
        scores[leaf], sparsity, structure=structure)
                             for leaf in scores if leaf != 'head'},
                            structure=structure)
  if name == 'top_kast':
    return sparse_jax.top_kast(sparsity, backward_sparsity=sparsity - .1,
                               **every, **given)
  if name == 'rigl':
    return sparse_jax.rigl(sparsity, update_end=steps * 3 // 4, **every,
                           **given)
  return sparse_jax.static(sparsity, **given)


def cell(params, train_data, test_data, orders, *, method, arrangement, block,
         sparsity, steps, key) -> dict[str, float]:
  """A row: what is kept of the hidden kernels and accuracies, in percent.

  Of 'magnitude' the parameters are of a trained network, which is pruned and
  trained on, else those of the first step, whose scale is kept.
  """
  structure, row = sparse_jax.Unstructured(), {}
  if arrangement != 'entries':
    structure = sparse_jax.Block((block, block), balanced=arrangement in (
        'balanced', 'permuted balanced', 'shuffled'))
  snip = functools.partial(saliency, images=train_data[0], labels=train_data[1])
  if method != 'magnitude':
    params = {name: leaf / math.sqrt(1 - sparsity * (name != 'head'))
              for name, leaf in params.items()}
  if arrangement == 'shuffled':
    orders = tuple(jax.random.permutation(jax.random.fold_in(key, i), order)
                   for i, order in enumerate(orders))
  if arrangement.startswith('permuted'):  # The order that suits blocks.
    params, (first, *_) = sparse_jax.permute_units(
        params, UNITS, sparsity=sparsity, structure=structure, is_sparse=HIDDEN,
        scores=snip(params, orders=orders) if method == 'snip' else None)
    orders = jnp.asarray(first), *orders[1:]
  if method == 'magnitude':
    params = sparse_jax.one_shot(
        logits, params, [(test_data[0][:1], orders)], sparsity=sparsity,
        by='magnitude', structure=structure, is_sparse=HIDDEN)
    row['pruned'] = float(accuracy(params, *test_data, orders))
    rule = sparse_jax.fixed({name: leaf != 0 for name, leaf in params.items()
                             if name != 'head'}, structure=structure)
  else:
    rule = method_of(method, sparsity, structure, steps, snip(
        params, orders=orders) if method == 'snip' else None)
  params, masks = train(params, rule, train_data, orders, steps=steps, key=key)
  hidden = [np.asarray(mask) for mask in jax.tree.leaves(masks)]
  return row | {'kept': 100 * sum(mask.sum() for mask in hidden) / sum(
      mask.size for mask in hidden),
                'accuracy': float(accuracy(params, *test_data, orders))}


def data_of(dataset: str, split: str, data_dir: str | None):
  """Images float32[n, pixels] and labels int32[n]."""
  found = input_pipeline.load(dataset, split, data_dir)
  images = input_pipeline.normalise(found.images, dataset)
  return images.reshape(len(images), -1), jnp.asarray(found.labels)


def study(train_data, test_data, *, methods, blocks, sparsities, seeds, width,
          steps, tune_steps, scratch_steps) -> Iterator[dict[str, float]]:
  """A row for each method, arrangement, block, sparsity in percent and seed.

  The dense network comes first, and entry by entry before blocks.
  """
  inputs = train_data[0].shape[1]
  orders = (jnp.arange(inputs), jnp.arange(width))
  todo = [place for method in methods for place in [
      (method, 'entries', 1), *((method, arrangement, block)
                                for block in blocks
                                for arrangement in ARRANGEMENTS[method])]]
  row = lambda *place: dict(zip(NAMES, place))
  with reporting.progress(len(seeds) * len(sparsities) * len(todo)) as progress:
    for seed in seeds:
      key = jax.random.key(seed)
      first = network(key, inputs, width)
      dense, _ = train(first, sparse_jax.dense(), train_data, orders,
                       steps=steps, key=key)
      yield row('dense', 'entries', 1, 0., seed) | {
          'accuracy': float(accuracy(dense, *test_data, orders))}
      from_first = first, scratch_steps, jax.random.fold_in(key, len(first))
      for sparsity, (method, arrangement, block) in itertools.product(
          sparsities, todo):
        params, length, own_key = (
            (dense, tune_steps, key) if method == 'magnitude' else from_first)
        yield row(method, arrangement, block, sparsity, seed) | cell(
            params, train_data, test_data, orders, method=method,
            arrangement=arrangement, block=block, sparsity=sparsity / 100,
            steps=length, key=own_key)
        progress.update()


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
  means = summary(rows)
  table = reporting.markdown_table(
      means, formats=dict.fromkeys((*NAMES[5:], 'deviation'), '.1f'))
  files.write_text(os.path.join(workdir, 'table.md'), table)
  reporting.write_csv(os.path.join(workdir, 'rows.csv'), [
      dict.fromkeys(NAMES, '') | row for row in rows])
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
  programs.begin(argv)
  with programs.errors_in_a_line():
    train_data, test_data = (data_of(_DATASET.value, split, _DATA_DIR.value)
                             for split in ('train', 'test'))
  rows = []
  for row in study(
      train_data, test_data, methods=_METHODS.value,
      sparsities=[float(share) for share in _SPARSITIES.value],
      seeds=[int(seed) for seed in _SEEDS.value], steps=_STEPS.value,
      tune_steps=_TUNE_STEPS.value, scratch_steps=_SCRATCH_STEPS.value, **SIZE):
    rows.append(row)
    table = write(rows, _WORKDIR.value)
  print(table, end='')


if __name__ == '__main__':
  programs.run(main)
