"""
Prune a trained model and fine-tune it
======================================

Here the network is trained already. ``one_shot`` prunes it layer by layer from
a few examples, and ``fixed`` trains on what is left with the same zeros.
"""

# %%
# A trained model
# ---------------

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn import datasets
from sklearn import model_selection

import sparse_jax

digits = datasets.load_digits()
train_images, test_images, train_labels, test_labels = (
    model_selection.train_test_split(
        (digits.data / 16.).astype(np.float32), digits.target, test_size=360,
        random_state=0))
model = nn.Sequential([nn.Dense(128), nn.relu, nn.Dense(128), nn.relu,
                       nn.Dense(10)])


def apply(params, images):
  return model.apply({'params': params}, images)


def train(params, method, steps, learning_rate):
  tx = sparse_jax.sparsify(optax.adam(learning_rate), method)
  params, opt_state = sparse_jax.start(tx, method, params)

  @jax.jit
  def train_step(params, opt_state, images, labels):
    def loss_fn(params):
      logits = sparse_jax.with_method(apply, method, opt_state)(params, images)
      return optax.softmax_cross_entropy_with_integer_labels(
          logits, labels).mean()

    updates, opt_state = tx.update(jax.grad(loss_fn)(params), opt_state,
                                   params)
    return optax.apply_updates(params, updates), opt_state

  rng = np.random.default_rng(0)
  for _ in range(steps):
    rows = rng.choice(len(train_images), 64, replace=False)
    params, opt_state = train_step(params, opt_state, train_images[rows],
                                   train_labels[rows])
  return sparse_jax.dense_weights(method, params, opt_state)


@jax.jit
def accuracy(params):
  return jnp.mean(jnp.argmax(apply(params, test_images), -1) == test_labels)


trained = train(model.init(jax.random.key(0), test_images)['params'],
                sparse_jax.dense(), steps=400, learning_rate=2e-3)
print(f'dense: {float(accuracy(trained)):.1%}')

# %%
# Prune in one shot
# -----------------
# Any function of parameters and arrays will do; no layer is named, and labels
# are not needed. SparseGPT corrects the weights that stay for those that go;
# Wanda weighs them by the size of their inputs, an equal number for each
# output; magnitude looks at the weights alone. On large language models Wanda
# is published ahead of magnitude; in this small network it is behind from 70%.

batches = [(train_images[i:i + 128],) for i in range(0, 512, 128)]
sparsities = (0.5, 0.7, 0.8, 0.9)
pruned = {(by, sparsity): sparse_jax.one_shot(
    apply, trained, batches, sparsity=sparsity, by=by)
    for by in ('magnitude', 'wanda', 'sparsegpt') for sparsity in sparsities}
for (by, sparsity), params in pruned.items():
  print(f'{by:10} {sparsity:.0%}: {float(accuracy(params)):.1%}')

# %%
# Fine-tune with the same zeros
# -----------------------------
# The mask is where a weight is left. Leaves that were not pruned (biases) have
# no mask: None.


def fine_tune(params):
  masks = jax.tree.map(lambda leaf: leaf != 0 if leaf.ndim > 1 else None,
                       params)
  return train(params, sparse_jax.fixed(masks), steps=100, learning_rate=1e-3)


tuned = {key: fine_tune(params) for key, params in pruned.items()
         if key[1] >= 0.8}
for (by, sparsity), params in tuned.items():
  zeros = float(jnp.mean(params['layers_2']['kernel'] == 0))
  print(f'{by:10} {sparsity:.0%}: {float(accuracy(params)):.1%}, '
        f'{zeros:.0%} of the middle kernel is 0')

# %%
# In one picture
# --------------

figure, axes = plt.subplots(figsize=(7, 3.5))
for by, colour in (('magnitude', 'C0'), ('wanda', 'C1'), ('sparsegpt', 'C2')):
  axes.plot(sparsities, [accuracy(pruned[by, s]) for s in sparsities],
            color=colour, marker='o', label=by)
  axes.plot([s for s in sparsities if s >= 0.8],
            [accuracy(tuned[by, s]) for s in sparsities if s >= 0.8],
            color=colour, marker='s', linestyle=':',
            label=f'{by}, fine-tuned')
axes.axhline(accuracy(trained), color='gray', label='dense')
axes.set(xlabel='sparsity', ylabel='test accuracy')
axes.legend()
figure.tight_layout()

# %%
# Whole runs of the experiments are pruned in the same way:
# ``python -m experiments.prune --run=FOLDER --sparsity=0.5,0.7``. More, with
# figures of a language model: :doc:`/pruning`.
