"""What flags mean to the binary they are for, and what a run of them costs.

Each binary defines flags of one name in its own way, so a process of its own
imports it, lets its parser read the command lines, and answers:

  python -m launch.describe < request.json > answers.jsonl

The request holds `binary`, `commands` (lists of arguments) and `figures`,
whether to build each model, method and optimizer from shapes. An answer a
command, in order: `values`, the flags by name, `free`, those that a
continuation may change, and `figures`; or `error`. No data is read, and no
array is made.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import functools
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

# Images to train on, so that a run's length is known without its data.
TRAIN_IMAGES = {'digits': 1_437, 'mnist': 60_000, 'fashion_mnist': 60_000,
                'cifar10': 50_000, 'cifar100': 50_000,
                'imagenet2012': 1_281_167}


def ask(binary: str, commands: Sequence[Sequence[str]], figures: bool
        ) -> list[dict[str, Any]]:
  """The answers of a process as above.

  Raises:
    ValueError: if there is no such binary, it cannot be asked, or it does not
      take a command line; naming that.
  """
  if _absent(binary):
    raise ValueError(f'`binary` (={binary!r}) must be a module; there is none.')
  request = {'binary': binary, 'figures': figures,
             'commands': [list(command) for command in commands]}
  done = subprocess.run(
      [sys.executable, '-m', 'launch.describe'], input=json.dumps(request),
      capture_output=True, text=True, env={**os.environ,
                                           'JAX_PLATFORMS': 'cpu'})
  if done.returncode:
    raise ValueError(f'`binary` (={binary!r}) cannot be asked for its flags:\n'
                     f'{done.stderr.strip()}')
  answers = [json.loads(line) for line in done.stdout.splitlines()
             if line.startswith('{')]
  for command, answer in zip(commands, answers, strict=True):
    if 'error' in answer:
      raise ValueError(f'python -m {binary} {" ".join(command)}\n'
                       f'is no run of it: {answer["error"]}')
  return answers


def _absent(binary: str) -> bool:
  try:
    return importlib.util.find_spec(binary) is None
  except ModuleNotFoundError:
    return True


def answers(binary: str, commands: Sequence[Sequence[str]], figures: bool
            ) -> Iterator[dict[str, Any]]:
  """What the process says of each command, while it is alive."""
  from absl import flags
  module = importlib.import_module(binary)
  if not hasattr(module, 'run_config'):
    raise SystemExit(f'{binary} has no run_config().')
  free, known = free_flags(module), {}
  for command in commands:
    flags.FLAGS.unparse_flags()
    try:
      rest = flags.FLAGS([binary, *command])[1:]
      if rest:
        raise ValueError(f'unknown arguments: {rest}')
      values = module.run_config()
      answer = {'values': values, 'free': free}
      same = json.dumps({name: value for name, value in values.items()
                         if name not in (*free, 'seed')}, sort_keys=True)
      if same not in known:  # Seeds differ in nothing that matters here.
        known[same] = figures_of(module, values) if figures else check(
            module, values)
      answer['figures'] = known[same]
    except (ValueError, flags.Error) as error:
      answer = {'error': str(error)}
    yield answer


def free_flags(module: Any) -> list[str]:
  """Flags that may differ between a run and its continuation."""
  if hasattr(module, 'FREE'):
    return list(module.FREE)
  return list(importlib.import_module('experiments.training').FREE)


def check(module: Any, values: Mapping[str, Any]) -> None:
  """Raises ValueError for flags that parse and make no run."""
  if hasattr(module, 'check_values'):
    module.check_values(values)
  if hasattr(module, 'run_length'):
    module.make_task(values, module.run_length(
        values, TRAIN_IMAGES[values['dataset']]))
  elif hasattr(module, 'make_task'):
    module.make_task(values, 256)  # As well as any other vocabulary.


def figures_of(module: Any, values: Mapping[str, Any]) -> dict[str, Any]:
  """Size, length and cost of a run, as its binary says, or from its parts.

  `parameters`, `train_steps`, `batch_size`, `learning_rate` (the highest),
  `training_flops` (multiply-adds of the run, as a sparse device would do
  them), `weight_bytes`, `optimizer_bytes` (masks included) and
  `activation_bytes` (of a whole batch).
  """
  if hasattr(module, 'describe'):
    return module.describe(values)
  return _image_figures(module, values)


def _image_figures(train, values):
  """Of experiments.image.train, through its functions."""
  import jax
  import jax.numpy as jnp
  from experiments import optimization
  from experiments.image import input_pipeline
  import sparse_jax
  check(train, values)
  steps = train.run_length(values, TRAIN_IMAGES[values['dataset']])
  task = train.make_task(values, steps)
  state = jax.eval_shape(functools.partial(train.init_state, task, 0))
  weights = jax.eval_shape(task.method.read, state.params, state.opt_state)
  shape = input_pipeline.DATASETS[values['dataset']].image_shape

  def apply(weights, batch_stats, images):
    return task.model.apply(
        {'params': weights, 'batch_stats': batch_stats}, images, train=True,
        mutable=['batch_stats'], rngs={'dropout': jax.random.key(0)})[0]

  def arguments(batch):
    return weights, state.batch_stats, jax.ShapeDtypeStruct(
        (batch, *shape), jnp.float32)

  flops = sparse_jax.count_flops(apply, *arguments(1))
  cost = sparse_jax.training_cost(flops, task.method if task.method.work else
                                  {}, steps=steps)
  one, two = (sparse_jax.memory_cost(apply, *arguments(batch))
              for batch in (1, 2))
  batch = values['batch_size']
  each = two.saved_activations - one.saved_activations
  rates = optimization.schedule(values, steps)
  return {
      'parameters': sum(leaf.size for leaf in jax.tree.leaves(weights)),
      'train_steps': steps, 'batch_size': batch,
      'learning_rate': float(max(rates(step) for step in _some(steps))),
      'training_flops': cost.sparse.total * batch * steps,
      'weight_bytes': one.weights,
      'optimizer_bytes': sum(leaf.size * leaf.dtype.itemsize for leaf in
                             jax.tree.leaves(state.opt_state)),
      'activation_bytes': one.saved_activations + (batch - 1) * each}


def _some(steps: int) -> list[int]:
  """Steps among which the highest learning rate is found."""
  return [steps * share // 100 for share in range(100)]


def main() -> None:
  request = json.load(sys.stdin)
  for answer in answers(request['binary'], request['commands'],
                        request['figures']):
    print(json.dumps(answer), flush=True)


if __name__ == '__main__':
  main()
