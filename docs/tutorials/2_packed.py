"""
The same model, packed
======================

Masks save neither time nor memory: zeros are multiplied like anything else.
Here a method keeps or drops whole blocks of weights, and then ``packed`` stores
the kept blocks alone. The run is the same; the bytes and the time are not.
"""

# %%
# A wider model
# -------------
# Real sparsity pays for large matrices; this one has two of 2048 x 2048.

import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn import datasets

import sparse_jax

digits = datasets.load_digits()
images = (digits.data[:512] / 16.).astype(np.float32)
labels = digits.target[:512]
model = nn.Sequential([nn.Dense(2048), nn.relu, nn.Dense(2048), nn.relu,
                       nn.Dense(2048), nn.relu, nn.Dense(10)])
dense_params = model.init(jax.random.key(0), images)['params']

# %%
# Three runs
# ----------
# RigL with blocks of 128 x 128 in the two large kernels, 90% of them dropped:
# once simulated by masks, once packed. The loop is the same for all.


def rigl():
  return sparse_jax.rigl(
      0.9, structure=sparse_jax.Block((128, 128)), update_every=5,
      is_sparse={'layers_(0|6)': False})


def run(method, steps=12):
  tx = sparse_jax.sparsify(optax.adam(1e-3), method)
  params, opt_state = sparse_jax.start(tx, method, dense_params)

  @jax.jit
  def train_step(params, opt_state):
    def loss_fn(params):
      apply = sparse_jax.with_method(model.apply, method, opt_state)
      logits = apply({'params': params}, images)
      return optax.softmax_cross_entropy_with_integer_labels(
          logits, labels).mean()

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss

  losses, seconds = [], []
  for _ in range(steps):
    begin = time.perf_counter()
    params, opt_state, loss = jax.block_until_ready(
        train_step(params, opt_state))
    seconds.append(time.perf_counter() - begin)
    losses.append(float(loss))
  return params, opt_state, losses, np.median(seconds[1:])


methods = {'dense': sparse_jax.dense(), 'masked': rigl(),
           'packed': sparse_jax.packed(rigl())}
runs = {name: run(method) for name, method in methods.items()}

# %%
# The same run
# ------------
# Masked and packed training give the same losses. Both are far behind the dense
# network: twelve steps are few, and most of its large layers is gone.

for name, (_, _, losses, _) in runs.items():
  print(f'{name:7}', ' '.join(f'{loss:.4f}' for loss in losses[::3]))
np.testing.assert_allclose(runs['masked'][2], runs['packed'][2], rtol=1e-2)

# %%
# Bytes
# -----
# Of parameters and the optimizer's state together: weights, both of Adam's
# slots, masks and positions.


def megabytes(*trees):
  return sum(leaf.nbytes for leaf in jax.tree.leaves(trees)) / 2**20


for name, (params, opt_state, *_) in runs.items():
  print(f'{name:7} {megabytes(params, opt_state):6.1f} MiB')

# %%
# Time
# ----
# The median step, on the machine that built this page, whatever else it did. A
# CPU has nothing to gain from a mask, and much from blocks that are absent;
# measured on a quiet machine, a transformer's step is 2.5 times as fast
# (``python -m experiments.benchmarks.packed --what=transformer``).

for name, (*_, seconds) in runs.items():
  print(f'{name:7} {1e3 * seconds:6.1f} ms a step')

figure, panels = plt.subplots(1, 2, figsize=(7, 2.4))
panels[0].barh(list(runs), [megabytes(*run[:2]) for run in runs.values()])
panels[1].barh(list(runs), [1e3 * run[3] for run in runs.values()])
for axes, label in zip(panels, ('MiB of parameters and state', 'ms a step')):
  axes.invert_yaxis()
  axes.set(xlabel=label)
figure.tight_layout()

# %%
# Back to a dense array
# ---------------------
# ``dense_weights`` gives ordinary arrays, for code that does not know blocks.

params, opt_state, *_ = runs['packed']
weights = sparse_jax.dense_weights(methods['packed'], params, opt_state)
kernel = weights['layers_2']['kernel']
print(kernel.shape, f'{float(jnp.mean(kernel == 0)):.1%} zeros')

# %%
# Next: :doc:`which block, which sparsity, which chip </real_sparsity>`, or
# :doc:`prune a network that is trained already <3_prune_and_fine_tune>`.
