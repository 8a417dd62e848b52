"""The training loss just after masks move, with Adam and what mends it.

A 64-64-64-10 network on the digits of scikit-learn, at 90%, trained by
minibatches; every --every steps half of the weights that are kept are dropped
and others grown at 0. Adam's count is then old, and the slots of what has
grown are new.

  python -m experiments.benchmarks.refresh_spikes

Prints the training loss (of all images) before a refresh, and its ratio to
that so many steps after it, over the refreshes of the second half, of all
seeds. Recorded results: README.md beside this file.
"""

from absl import app
from absl import flags
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets

import sparse_jax
from experiments import reporting

_METHOD = flags.DEFINE_enum('grown_by', 'rigl', ['rigl', 'set_'],
                            'The method.')
_STEPS = flags.DEFINE_integer('steps', 2000, 'Steps of each run.',
                              lower_bound=200)
_EVERY = flags.DEFINE_integer('every', 100, 'Steps between refreshes.',
                              lower_bound=40)
_SEEDS = flags.DEFINE_integer('seeds', 3, 'Runs of each optimizer.',
                              lower_bound=1)
_RATE = flags.DEFINE_float('rate', 3e-3, 'Learning rate.', lower_bound=0.)

_AFTER = (1, 2, 3, 5, 10, 20)
_BATCH = 64


class Network(nn.Module):

  @nn.compact
  def __call__(self, x):
    for _ in range(2):
      x = nn.relu(nn.Dense(64)(x))
    return nn.Dense(10)(x)


def optimizers(rate: float):
  """{row: (optimizer, whether `sparsify` bounds its steps)}."""
  return {
      'adam': (optax.adam(rate), False),
      'adam, bound_grown': (optax.adam(rate), True),
      'aged_adam': (sparse_jax.aged_adam(rate), True),
      'aged_adam, warmup_steps=20': (
          sparse_jax.aged_adam(rate, warmup_steps=20), True),
  }


def losses(optimizer, bound_grown: bool) -> np.ndarray:
  """float[seeds, steps]: the training loss before each step."""
  images, labels = datasets.load_digits(return_X_y=True)
  images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
  network = Network()
  method = getattr(sparse_jax, _METHOD.value)(
      .9, update_every=_EVERY.value, drop_fraction=.5)

  def loss_fn(params, state, x, y):
    apply = sparse_jax.with_method(network.apply, method, state)
    return optax.softmax_cross_entropy_with_integer_labels(
        apply({'params': params}, x), y).mean()

  @jax.jit
  def run(key):
    first, key = jax.random.split(key)
    tx = sparse_jax.sparsify(optimizer, method, key=first,
                             bound_grown=bound_grown)
    params = network.init(first, images)['params']

    def step(carry, key):
      params, state = carry
      before = loss_fn(params, state, images, labels)
      rows = jax.random.randint(key, (_BATCH,), 0, len(labels))
      grads = jax.grad(loss_fn)(params, state, images[rows], labels[rows])
      updates, state = tx.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), before

    return jax.lax.scan(step, sparse_jax.start(tx, method, params),
                        jax.random.split(key, _STEPS.value))[1]

  return np.stack([run(jax.random.key(seed)) for seed in range(_SEEDS.value)])


def main(_):
  # Before update t stands loss t - 1; masks move in update t.
  moved = np.arange(_EVERY.value, _STEPS.value - max(_AFTER), _EVERY.value)
  moved, rows = moved[moved > _STEPS.value // 2], []
  for name, (optimizer, bound) in optimizers(_RATE.value).items():
    runs = losses(optimizer, bound)
    before = np.mean(runs[:, moved - 1])
    rows.append({'optimizer': name, 'loss before': before, **{
        f'+{n}': np.mean(runs[:, moved - 1 + n]) / before for n in _AFTER}})
  print(reporting.markdown_table(rows, formats={
      'loss before': '.4f', **{f'+{n}': '.2f' for n in _AFTER}}))


if __name__ == '__main__':
  app.run(main)
