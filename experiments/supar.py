"""The best learning rate against sparsity, with SuPar's scales and without.

  python -m experiments.supar

trains a 64-256-256-256-256-10 network on scikit-learn's digits with Adam and
static masks in its hidden layers, at each sparsity and learning rate, and
leaves table.md, table.csv, best_rate.png and loss_standard.png, loss_supar.png
in --workdir: several minutes on two CPU cores. Recorded results: README.md
beside this file.
"""

from collections.abc import Mapping, Sequence
import math
import os

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets

import sparse_jax
from experiments import files
from experiments import plots
from experiments import programs
from experiments import reporting
from sparse_jax import scaling
from sparse_jax import transforms

_WORKDIR = flags.DEFINE_string('workdir', 'runs/supar', 'Where the tables and '
                               'pictures go.')
BATCH, SEEDS = 128, 2
SIZE = {'width': 256, 'depth': 3, 'steps': 100}  # Of the hidden layers, a run.
SPARSITIES = (0., 50., 75., 90., 95.)
RATES = [2.**power for power in range(-12, -3)]
KINDS = ('standard', 'supar')


def network(key: jax.Array, width: int, depth: int) -> dict[str, jax.Array]:
  """Kernels of a network on digits, of variance 2 / inputs."""
  sizes = {'stem': (64, width), **{f'hidden_{i}': (width, width)
                                   for i in range(depth)}, 'head': (width, 10)}
  return {name: math.sqrt(2 / shape[0]) * jax.random.normal(
      jax.random.fold_in(key, i), shape)
          for i, (name, shape) in enumerate(sizes.items())}


def logits(weights: Mapping[str, jax.Array], images: jax.Array) -> jax.Array:
  """float[b, 10]: ReLU after every layer but the last."""
  x = jax.nn.relu(images @ weights['stem'])
  for i in range(len(weights) - 2):
    x = jax.nn.relu(x @ weights[f'hidden_{i}'])
  return x @ weights['head']


def final_losses(sparsity: float, rates: Sequence[float], kind: str, seed: int,
                 *, width: int, depth: int, steps: int) -> list[float]:
  """The loss on all images after a run at each learning rate."""
  images, labels = datasets.load_digits(return_X_y=True)
  images = jnp.asarray((images - images.mean()) / images.std(), jnp.float32)
  labels, key = jnp.asarray(labels, jnp.int32), jax.random.key(seed)
  method = sparse_jax.static(sparsity, is_sparse={'hidden': True,
                                                  '.*': False})
  first = network(key, width, depth)
  rules = scaling.supar(first, method if kind == 'supar' else {})
  first = jax.tree.map(jnp.multiply, first, rules.init)

  def cost(params, state, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(
        logits(method.read(params, state), x), y).mean()

  def run(rate):
    tx = sparse_jax.sparsify(optax.chain(
        optax.adam(rate), transforms.scale_by_leaf(rules.learning_rate)),
                             method, key=seed)
    params, state = sparse_jax.start(tx, method, first)

    def step(carry, t):
      params, state = carry
      chosen = jax.random.randint(jax.random.fold_in(key, t), (BATCH,), 0,
                                  len(labels))
      grads = jax.grad(cost)(params, state, images[chosen], labels[chosen])
      updates, state = tx.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(step, (params, state),
                                      jnp.arange(steps))
    return cost(params, state, images, labels)

  found = np.asarray(jax.jit(jax.vmap(run))(jnp.asarray(rates)))
  return [float(loss) if np.isfinite(loss) else math.inf for loss in found]


def best_rate(rates: Sequence[float], losses: Sequence[float]) -> float:
  """The rate of least loss, by a parabola through the three around it.

  In the logarithms of both; at an end it is the end.

  Example:
    >>> best_rate([1., 2., 4., 8.], [4., 1., 1., 4.])
    2.8284271247461903
  """
  low = int(np.argmin(losses))
  if not 0 < low < len(losses) - 1 or not math.isfinite(losses[low + 1]):
    return float(rates[low])
  left, middle, right = np.log(losses[low - 1:low + 2])
  shift = .5 * (left - right) / (left - 2 * middle + right)
  return float(rates[low] * (rates[low + 1] / rates[low])**shift)


def study(sparsities: Sequence[float], rates: Sequence[float], seeds: int,
          **size) -> list[dict[str, float]]:
  """Rows of `kind`, `sparsity` in percent, `rate`, mean `loss` of the seeds."""
  cells = [(kind, sparsity) for kind in KINDS for sparsity in sparsities]
  rows = []
  with reporting.progress(len(cells)) as progress:
    for kind, sparsity in cells:
      losses = np.mean([final_losses(sparsity / 100, rates, kind, seed, **size)
                        for seed in range(seeds)], axis=0)
      rows += [{'kind': kind, 'sparsity': sparsity, 'rate': rate, 'loss': loss}
               for rate, loss in zip(rates, losses.tolist())]
      progress.update()
  return rows


def summary(rows: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
  """The best rate of each kind and sparsity, and the loss there and at the
  best rate of the first sparsity, the dense network's."""
  cells = {}
  for row in rows:
    cells.setdefault((row['kind'], row['sparsity']), {})[
        row['rate']] = row['loss']
  found, first = [], {}
  for (kind, sparsity), losses in cells.items():
    best = best_rate(list(losses), list(losses.values()))
    # Of the first sparsity: the best rate, and that of the runs nearest to it.
    dense, nearest = first.setdefault(kind, (best, min(losses, key=losses.get)))
    found.append({
        'kind': kind, 'sparsity': sparsity, 'best rate': best,
        'over the first': best / dense, 'loss': min(losses.values()),
        'loss at the first best': losses[nearest]})
  return found


def write(rows: Sequence[Mapping[str, float]], workdir: str) -> str:
  """Tables and pictures; returns the table of best rates."""
  best = summary(rows)
  table = reporting.markdown_table(best, formats={
      'sparsity': 'g', 'best rate': '.2e', 'over the first': '.2f',
      'loss': '.4f', 'loss at the first best': '.4f'})
  files.write_text(os.path.join(workdir, 'table.md'), table)
  reporting.write_csv(os.path.join(workdir, 'table.csv'), rows)
  plots.lines(
      [{'row': row['kind'], 'x': row['sparsity'],
        'ours': math.log2(row['over the first'])} for row in best],
      os.path.join(workdir, 'best_rate.png'), 'The best learning rate',
      xlabel='sparsity of the hidden layers (%)', published=False,
      ylabel='over that of the dense network (powers of two)')
  for kind in KINDS:
    plots.lines(
        [{'row': f'{row["sparsity"]:g}%', 'x': math.log2(row['rate']),
          'ours': math.log10(row['loss'])} for row in rows
         if row['kind'] == kind and math.isfinite(row['loss'])],
        os.path.join(workdir, f'loss_{kind}.png'), f'Loss, {kind}',
        xlabel='learning rate (powers of two)', published=False,
        ylabel='final loss (powers of ten)')
  return table


def main(argv):
  programs.begin(argv)
  print(write(study(SPARSITIES, RATES, SEEDS, **SIZE), _WORKDIR.value), end='')


if __name__ == '__main__':
  programs.run(main)
