"""The training loss just after masks move, with Adam and what mends it.

A 64-64-64-10 network on the digits of scikit-learn, at 90%, trained by
minibatches; every 100 steps half of the weights that are kept are dropped
and others grown at 0. Adam's count is then old, and the slots of what has
grown are new.

  python -m experiments.benchmarks.refresh_spikes

Prints the training loss (of all images) before a refresh, and its ratio to
that so many steps after it, over the refreshes of the second half, of all
seeds. Recorded results: README.md beside this file.
"""

from absl import app
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets

import sparse_jax
from experiments import reporting

_STEPS, _EVERY, _SEEDS, _RATE = 2000, 100, 3, 3e-3
_AFTER = (1, 2, 3, 5, 10, 20)
_BATCH = 64
# By row: the optimizer, and whether `sparsify` bounds its steps.
_OPTIMIZERS = {
    'adam': (optax.adam(_RATE), False),
    'adam, bound_grown': (optax.adam(_RATE), True),
    'aged_adam': (sparse_jax.aged_adam(_RATE), True),
    'aged_adam, warmup_steps=20': (
        sparse_jax.aged_adam(_RATE, warmup_steps=20), True)}


class Network(nn.Module):

  @nn.compact
  def __call__(self, x):
    for _ in range(2):
      x = nn.relu(nn.Dense(64)(x))
    return nn.Dense(10)(x)


def losses(optimizer, bound_grown: bool) -> np.ndarray:
  """float[seeds, steps]: the training loss before each step."""
  images, labels = datasets.load_digits(return_X_y=True)
  images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
  network = Network()
  method = sparse_jax.rigl(.9, update_every=_EVERY, drop_fraction=.5)

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
                        jax.random.split(key, _STEPS))[1]

  return np.stack([run(jax.random.key(seed)) for seed in range(_SEEDS)])


def main(_):
  # Before update t stands loss t - 1; masks move in update t.
  moved = np.arange(_EVERY, _STEPS - max(_AFTER), _EVERY)
  moved, rows = moved[moved > _STEPS // 2], []
  for name, (optimizer, bound) in _OPTIMIZERS.items():
    runs = losses(optimizer, bound)
    before = np.mean(runs[:, moved - 1])
    rows.append({'optimizer': name, 'loss before': before, **{
        f'+{n}': np.mean(runs[:, moved - 1 + n]) / before for n in _AFTER}})
  print(reporting.markdown_table(rows, formats={
      'loss before': '.4f', **{f'+{n}': '.2f' for n in _AFTER}}))


if __name__ == '__main__':
  app.run(main)
