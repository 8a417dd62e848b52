"""
Sparse from scratch
===================

We train a small network that has 10% of its weights from the first step to the
last, by four methods, and look at what they did.
"""

# %%
# Data and model
# --------------
# Images of 8 x 8 pixels and a network of three layers; nothing here is about
# sparsity yet.

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
model = nn.Sequential([nn.Dense(300), nn.relu, nn.Dense(100), nn.relu,
                       nn.Dense(10)])
dense_params = model.init(jax.random.key(0), train_images[:1])['params']


def loss_of(logits, labels):
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# %%
# One loop for every method
# -------------------------
# ``sparsify`` wraps the optimizer; ``start`` makes the parameters and the
# state, with the first masks in it; ``with_method`` wraps the model, in
# training and in evaluation. The last layer stays dense: at 90% its ten outputs
# would share 100 weights. ``static`` never changes its random mask; SET drops
# small weights and grows others at random, RigL where the gradient is large;
# Top-KAST reads the largest tenth and updates the largest fifth.


def train(method, steps=300, batch=64):
  tx = sparse_jax.sparsify(optax.adam(2e-3), method)
  params, opt_state = sparse_jax.start(tx, method, dense_params)

  @jax.jit
  def train_step(params, opt_state, images, labels):
    def loss_fn(params):
      apply = sparse_jax.with_method(model.apply, method, opt_state)
      return loss_of(apply({'params': params}, images), labels)

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss

  @jax.jit
  def accuracy(params, opt_state):
    apply = sparse_jax.with_method(model.apply, method, opt_state)
    logits = apply({'params': params}, test_images)
    return jnp.mean(jnp.argmax(logits, -1) == test_labels)

  rng, losses = np.random.default_rng(0), []
  for _ in range(steps):
    rows = rng.choice(len(train_images), batch, replace=False)
    params, opt_state, loss = train_step(
        params, opt_state, train_images[rows], train_labels[rows])
    losses.append(float(loss))
  return params, opt_state, losses, float(accuracy(params, opt_state))


hidden = {'layers_4': False}  # The last layer is not to be sparse.
methods = {
    'dense': sparse_jax.dense(),
    'static': sparse_jax.static(0.9, is_sparse=hidden),
    'SET': sparse_jax.set_(0.9, is_sparse=hidden, update_every=20,
                           update_end=225),
    'RigL': sparse_jax.rigl(0.9, is_sparse=hidden, update_every=20,
                            update_end=225),
    'Top-KAST': sparse_jax.top_kast(0.9, backward_sparsity=0.8,
                                    is_sparse=hidden, update_every=5),
}
runs = {name: train(method) for name, method in methods.items()}
for name, (*_, accuracy) in runs.items():
  print(f'{name:10} {accuracy:.1%} of the test images')

# %%
# The loss
# --------

figure, axes = plt.subplots(figsize=(7, 3.5))
for name, (_, _, losses, _) in runs.items():
  axes.plot(np.convolve(losses, np.ones(10) / 10, 'valid'), label=name)
axes.set(xlabel='step', ylabel='training loss', yscale='log')
axes.legend()
figure.tight_layout()

# %%
# What is sparse
# --------------
# ``summarize`` says of each array (a *leaf*) how much of it the forward pass
# reads, how much is updated (*backward*), how much of the forward set is new
# since the last refresh (*churn*), how much was ever in it, and how many
# outputs and inputs have no weight left (*dead*).

params, opt_state, *_ = runs['RigL']
print(sparse_jax.summarize(params, opt_state, methods['RigL']))

# %%
# Where the first layer looks
# ---------------------------
# How many of the 300 units read each pixel. A random mask spreads its weights
# evenly; methods that move them leave the empty borders of the images.

figure, panels = plt.subplots(1, 3, figsize=(7, 2.6))
for axes, name in zip(panels, ('static', 'RigL', 'Top-KAST')):
  state = sparse_jax.get_state(runs[name][1])
  mask = state.forward_masks['layers_0']['kernel']
  axes.imshow(np.asarray(mask.sum(1)).reshape(8, 8), vmin=0, vmax=90)
  axes.set(title=name, xticks=(), yticks=())
figure.tight_layout()

# %%
# Next: :doc:`blocks whose zeros are not stored at all <2_packed>`, or
# :doc:`which method to choose </choosing>` for a run of your own.
