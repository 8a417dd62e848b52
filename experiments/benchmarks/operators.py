"""What sparse activations cost in time, and save in memory, on a ResNet.

  python -m experiments.benchmarks.operators --width=0.5

Steps of experiments.image.train on made-up CIFAR-10 images, interleaved in one
process: dense; SWAT's weights alone; SWAT with activations chosen exactly every
step, or by a threshold that is kept for 20; activations packed or kept with
their zeros. Memory is what XLA allots for temporary arrays, beside what the
program asks to keep for its backward pass (`cost.memory_cost`). A first table
has the memory of twelve ReLU layers. Recorded results: README.md beside
this file.
"""

import functools
from typing import Any

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from experiments import reporting
from experiments import tasks
from experiments import training
from experiments.benchmarks import timing
from experiments.image import train
import sparse_jax
from sparse_jax.operators import residuals

_ROUNDS = flags.DEFINE_integer('timings', 5, 'Of each contender.')

SWAT = {'method': 'swat', 'sparsity': .9, 'dense_layers': ['stem']}
CONTENDERS = {
    'dense': {'method': 'dense', 'sparsity': 0.},
    'weights alone': SWAT | {'activation_sparsity': 0., 'update_every': 20},
    'every step, with zeros': SWAT | {'pack_activations': False},
    'every 20 steps, with zeros': SWAT | {
        'pack_activations': False, 'operand_period': 20, 'update_every': 20},
    'every step, packed': SWAT,
    'every 20 steps, packed': SWAT | {'operand_period': 20, 'update_every': 20},
}


def runner(settings: dict[str, Any], common: dict[str, Any]):
  """A function that does 20 steps; bytes asked to keep, and bytes allotted."""
  values = common | settings
  task = train.make_task(values, 1000)
  state = jax.jit(functools.partial(tasks.init_state, task, 0)).lower(
      ).compile(compiler_options=training.FAST_COMPILE)()
  random = np.random.RandomState(0)
  batch = {'image': random.randint(0, 256, (values['batch_size'], 32, 32, 3),
                                   np.uint8),
           'label': random.randint(0, 10, values['batch_size'], np.int32)}
  asked = sparse_jax.cost.memory_cost(
      lambda params, state, batch: tasks.loss_fn(
          params, state.thresholds, task, state, batch)[0],
      state.params, state, batch).saved_activations
  step = functools.partial(tasks.train_step, task)
  compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
  kept = [state]

  def run():
    for _ in range(20):
      kept[0] = compiled(kept[0], batch)
    return kept[0]

  return run, asked, timing.temporaries(compiled)


def chain_size(dot, relu, scanned: bool) -> float:
  """XLA's MiB of temporary arrays for a gradient of 12 layers of 256."""
  def layer(x, weight):
    return relu(dot(x, weight, (((1,), (0,)), ((), ())))), None

  def loss(weights, x):
    if scanned:
      x, _ = jax.lax.scan(layer, x, weights)
    else:
      for weight in weights:
        x, _ = layer(x, weight)
    return jnp.sum(jnp.square(x))

  weights = (jax.ShapeDtypeStruct((12, 256, 256), jnp.float32) if scanned
             else [jax.ShapeDtypeStruct((256, 256), jnp.float32)] * 12)
  x = jax.ShapeDtypeStruct((1024, 256), jnp.float32)
  compiled = jax.jit(jax.grad(loss)).lower(weights, x).compile()
  return timing.temporaries(compiled)


def chains() -> list[dict[str, Any]]:
  """Rows of the first table."""
  sparse = sparse_jax.operators.sparse_dot_general(
      sparse_jax.operators.Operands(backward_activation=.9))
  return [{'twelve layers': 'scanned' if scanned else 'unrolled',
           'temporary bytes of dense': (
               chain_size(sparse, residuals.relu, scanned)
               / chain_size(jax.lax.dot_general, jax.nn.relu, scanned))}
          for scanned in (False, True)]


def main(_):
  print(reporting.markdown_table(
      chains(), formats={'temporary bytes of dense': '.2f'}))
  timing.keep_freed_memory()
  common = train.run_config() | {'dataset': 'cifar10', 'model': 'resnet20',
                                 'backward_sparsity': None}
  made = {name: runner(settings, common)
          for name, settings in CONTENDERS.items()}
  times = timing.interleaved_medians(
      {name: made[name][0] for name in made}, rounds=_ROUNDS.value)
  _, dense_asked, dense_allotted = made['dense']
  rows = [{'activations': name, 'milliseconds a step': 1e3 * times[name] / 20,
           'time of dense': times[name] / times['dense'],
           'kept of dense': asked / dense_asked,
           'temporary bytes of dense': allotted / dense_allotted}
          for name, (_, asked, allotted) in made.items()]
  print(reporting.markdown_table(rows, formats={
      'milliseconds a step': '.1f', 'time of dense': '.2f',
      'kept of dense': '.2f', 'temporary bytes of dense': '.2f'}))


if __name__ == '__main__':
  app.run(main)
