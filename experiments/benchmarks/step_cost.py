"""What a method adds to a training step, as a ratio to dense.

A 784-1024-1024-1024-10 network, batch 128, Adam, refreshes every 100 steps,
all methods at 90% in one process, steps interleaved.

  python -m experiments.benchmarks.step_cost
  python -m experiments.benchmarks.step_cost --network=transformer_xl

The second is the `small` Transformer-XL on bytes: 16 streams of 128 with as
long a memory. Prints two ratios of each method: an ordinary step (median), and
the mean over a whole period with its refresh. Rows with 'packed' multiply by
blocks of --block (`sparse_jax.packed`). Recorded results: README.md beside
this file.
"""

import statistics

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import optax

import sparse_jax
from experiments import reporting
from experiments.benchmarks import timing
from experiments.image import models as image_models
from experiments.language import models

PERIOD = 100

_ROUNDS = flags.DEFINE_integer('rounds', 120, 'Steps timed of each method; at '
                               'least 100, of which one refreshes.',
                               lower_bound=PERIOD)
_NETWORK = flags.DEFINE_enum('network', 'mlp', ['mlp', 'transformer_xl'],
                             'What is trained.')
_METHODS = flags.DEFINE_list('methods', [], 'Only these; all if empty.')
_BLOCK = flags.DEFINE_integer('block', 64, 'Rows and columns of a block, in '
                              'the rows that multiply by blocks.')


def methods() -> dict[str, sparse_jax.SparseMethod]:
  every = {'update_every': PERIOD}
  blocks = {'structure': sparse_jax.Block((_BLOCK.value,) * 2)}
  return timing.methods(every) | {
      'rigl_skip_step': sparse_jax.rigl(0.9, skip_step=True, **every),
  } | {f'{name}_packed': sparse_jax.packed(method)
       for name, method in timing.methods(every, **blocks).items()
       if name in ('static', 'set', 'rigl', 'top_kast')}


def mlp():
  """Parameters, the loss of weights, and the examples of a step."""
  network = image_models.MLP(num_classes=10, features=(1024,) * 3)
  images = jax.random.normal(jax.random.key(0), (128, 784))
  labels = jnp.arange(128) % 10

  def loss(weights):
    logits = network.apply({'params': weights}, images, train=True)
    return optax.softmax_cross_entropy_with_integer_labels(
        logits, labels).mean()

  params = network.init(jax.random.key(1), images, train=True)['params']
  return params, loss, 128


def transformer_xl():
  """Likewise, of tokens; the memory is full and stays as it is."""
  network = models.create('small', vocab_size=256)
  tokens = jax.random.randint(jax.random.key(0), (16, 129), 0, 256)
  inputs, targets = tokens[:, :-1], tokens[:, 1:]
  memory = models.init_memory(network, 16, 128)
  params = network.init(jax.random.key(1), inputs, targets, memory,
                        train=False)['params']
  _, memory = network.apply({'params': params}, inputs, targets, memory,
                            train=False)

  def loss(weights):
    return network.apply({'params': weights}, inputs, targets, memory,
                         train=True)[0].mean()

  return params, loss, inputs.size


def main(_):
  timing.keep_freed_memory()
  chosen = timing.chosen(methods(), _METHODS.value)
  params, loss, examples = {'mlp': mlp, 'transformer_xl': transformer_xl}[
      _NETWORK.value]()
  runs = {name: timing.trainer(loss, method, optax.adam(1e-3), params)[0]
          for name, method in chosen.items()}
  times = timing.interleaved(runs, rounds=_ROUNDS.value)
  rows = []
  dense = statistics.median(times['dense'])
  for name, ts in times.items():
    # Step 1 is not timed.
    refresh = statistics.mean(ts[PERIOD - 2::PERIOD])
    del ts[PERIOD - 2::PERIOD]
    ordinary = statistics.median(ts)
    whole = ordinary + (refresh - ordinary) / PERIOD
    rows.append({'method': name, 'ordinary step': ordinary / dense,
                 'with refreshes': whole / dense, 'refresh': refresh / dense,
                 'milliseconds': ordinary * 1e3,
                 'examples or tokens a second': examples / ordinary})
  print(reporting.markdown_table(rows, formats={
      'milliseconds': '.1f', 'examples or tokens a second': ',.0f',
      **dict.fromkeys(
          ('ordinary step', 'with refreshes', 'refresh'), '.2f')}))


if __name__ == '__main__':
  app.run(main)
