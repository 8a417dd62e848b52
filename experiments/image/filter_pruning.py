"""Removes whole filters from a trained network and trains on what is left.

  python -m experiments.image.filter_pruning --dataset=cifar10 --data_dir=DIR \
      --model=strided_cnn --noaugment --train_epochs=5 --workdir=RUN \
      --filter_sparsities=0.25,0.5,0.75 --fine_tune_epochs=1

Trains a dense network by experiments.image.train in --workdir with that
program's flags, or takes the finished run that lies there, made with the same
flags. Then for each share it removes the filters of smallest L1 norm, tests
what is left, and trains it on with a fresh optimizer at a constant rate. The
arrays are really smaller. Beside it stands the same smaller network trained
from a random start for as long as the dense one, with which the paper
compares; --nofrom_scratch leaves that out.

Every layer but the last loses its filters; in ResNets, as in the paper, only
the convolutions inside a block, for the sums need equal channels.

Leaves in --workdir, beside what the dense run leaves: pruning.json,
pruning.md and pruning.png.

Reference:
  Li et al., Pruning filters for efficient convnets, 2017,
  https://arxiv.org/abs/1608.08710, sections 3 and 4.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import math
import os
import re
from typing import Any, NamedTuple

from absl import flags
from flax import linen as nn
import jax
import jax.numpy as jnp

import sparse_jax
from sparse_jax import trees
from sparse_jax.methods import filters
from experiments import devices
from experiments import files
from experiments import plots
from experiments import programs
from experiments import pruning
from experiments import reporting
from experiments import run_flags
from experiments import sparsity
from experiments import tasks
from experiments import training
from experiments.image import train

_SHARES = flags.DEFINE_list(
    'filter_sparsities', ['0.25', '0.5', '0.75'], 'Shares of each layer\'s '
    'filters that go, in (0, 1); a row of the table each.')
_EPOCHS = flags.DEFINE_float('fine_tune_epochs', 1., 'Length of the training '
                             'after the filters have gone, above 0.')
_RATE = flags.DEFINE_float('fine_tune_learning_rate', .01, 'Its learning '
                           'rate, constant.')
_FROM_SCRATCH = flags.DEFINE_bool('from_scratch', True, 'Also train each '
                                  'smaller network from a random start.')

# Layers of which each reads the one before.
CHAINS = {
    'mlp': ('stem', 'dense_2', 'head'),
    'small_cnn': ('stem', 'conv_2', 'dense', 'head'),
    'strided_cnn': ('stem', 'conv_2', 'conv_3', 'head'),
    'vgg16': ('stem', *(f'conv_{i}' for i in range(2, 14)), 'dense_1',
              'dense_2', 'head'),
}
BLOCKS = {name: ('conv_1', 'conv_2')
          for name in ('resnet20', 'resnet56', 'resnet18')}
BLOCKS['resnet50'] = ('conv_1', 'conv_2', 'conv_3')


class Settings(NamedTuple):
  """What happens after the dense run."""

  shares: Sequence[float]
  epochs: float = 1.
  learning_rate: float = .01
  from_scratch: bool = True


class Fitted(NamedTuple):
  """A model whose layers have as many features as their kernels."""

  model: nn.Module

  def apply(self, variables, *args, **kwargs):
    with nn.intercept_methods(fit_features):
      return self.model.apply(variables, *args, **kwargs)


def fit_features(next_fun, args, kwargs, context):
  """A Flax interceptor: a Conv or Dense gets its kernel's number of features.

  So a network of smaller arrays is applied by the model of the larger ones.
  """
  layer = context.module
  if not isinstance(layer, (nn.Conv, nn.Dense)) or (
      context.method_name != '__call__'):
    return next_fun(*args, **kwargs)
  features = layer.get_variable('params', 'kernel').shape[-1]
  if layer.features == features:
    return next_fun(*args, **kwargs)
  return layer.clone(features=features, parent=layer.scope)(*args, **kwargs)


def followers(name: str, variables: Mapping[str, Any]
              ) -> dict[str, dict[str, int]]:
  """For each kernel that may lose filters, what shrinks with it.

  They are the `followers` of `sparse_jax.methods.filters.prune_filters`, of a
  network in CHAINS or BLOCKS.
  """
  paths = trees.leaves_by_path(variables)
  found = {}
  for layer, reader in _pairs(name, variables['params']):
    norm = re.sub('conv_(?=[0-9]+$)', 'norm_', layer)
    norm = 'stem_norm' if layer == 'stem' else norm
    own = [f'params/{layer}/bias',
           *(f'params/{norm}/{kind}' for kind in ('scale', 'bias')),
           *(f'batch_stats/{norm}/{kind}' for kind in ('mean', 'var'))]
    found[f'params/{layer}/kernel'] = {
        path: 0 for path in own if path in paths} | {
            f'params/{reader}/kernel': -2}
  return found


def prune(name: str, variables: Mapping[str, Any], share: float) -> Any:
  """The variables without that share of the filters of each layer."""
  found = followers(name, variables)
  return filters.prune_filters(variables, dict.fromkeys(found, share),
                               found)[0]


def study(values: Mapping[str, Any], settings: Settings
          ) -> list[dict[str, Any]]:
  """Trains the dense network if need be, then prunes it by each share.

  `values` are flags of experiments.image.train, `workdir` among them.

  Returns:
    The rows of pruning.json, the dense network first: `filter_sparsity`,
    `parameters`, `flops` (multiply-adds of one image) and accuracies. A bad
    flag is named before anything trains.
  """
  check(values, settings)
  train.train(values)
  run = train.prepare(values, values['workdir'])
  state = training.last_state(run)
  rows = [size(run, variables_of(state)) | {
      'filter_sparsity': 0., 'trained': training.evaluate(run, state)[
          'test_accuracy']}]
  for share in settings.shares:
    rows.append(one_share(run, state, share, settings))
    print(f'{share:.0%} of the filters removed: {rows[-1]}', flush=True)
  at = os.path.join(values['workdir'], 'pruning')
  reporting.write_json(f'{at}.json', {
      'rows': rows, 'settings': settings._asdict(), 'flags': dict(values)})
  files.write_text(f'{at}.md', table(rows))
  points = [{'row': 'dense' if kind == 'trained' else kind.replace('_', ' '),
             'ours': 100 * row[kind], 'x': 100 * row['filter_sparsity']}
            for kind in ('trained', 'fine_tuned', 'from_scratch', 'pruned')
            for row in rows if kind in row]
  plots.lines(points, f'{at}.png', f'{values["dataset"]}, {values["model"]}',
              xlabel='filters that are removed (%)', scale='sparsity',
              ylabel='test accuracy (%)', published=False)
  print(table(rows))
  return rows


def check(values: Mapping[str, Any], settings: Settings) -> None:
  """Raises ValueError for a flag that cannot work; see `study`."""
  if values['method'] != 'dense':
    raise ValueError(f'`method` (={values["method"]!r}) must be dense.')
  if values['model'] not in CHAINS | BLOCKS:
    raise ValueError(f'`model` (={values["model"]!r}) must be one of '
                     f'{", ".join(CHAINS | BLOCKS)}.')
  for share in settings.shares:
    if not 0 < share < 1:
      raise ValueError(f'`filter_sparsities` (={share!r}) must be in (0, 1).')
  for flag, value in (('fine_tune_epochs', settings.epochs),
                      ('fine_tune_learning_rate', settings.learning_rate)):
    if not 0 < value < math.inf:
      raise ValueError(f'`{flag}` (={value!r}) must be finite and above 0.')
  train.prepare(values, values['workdir'])


def one_share(run: training.Run, state: tasks.TrainState, share: float,
              settings: Settings) -> dict[str, Any]:
  """A row: the network pruned, fine-tuned and perhaps trained anew."""
  steps = train.run_length(
      run.values | {'train_steps': None, 'train_epochs': settings.epochs},
      train.load(run.values, 'train').num_examples)
  smaller = functools.partial(prune, run.values['model'], share=share)
  variables = smaller(variables_of(state))
  constant = {flag: flags.FLAGS[flag].default for flag in (
      'lr_drops', 'lr_factor')} | {
          'learning_rate': settings.learning_rate, 'lr_schedule': 'constant',
          'warmup_share': 0.}
  tuned = smaller_run(run, steps, constant)
  started = start(tuned, variables, run.train_steps)
  row = size(tuned, variables) | {
      'filter_sparsity': share,
      'pruned': training.evaluate(tuned, started)['test_accuracy'],
      'fine_tuned': accuracy_after(tuned, started)}
  if settings.from_scratch:
    anew = smaller_run(run, run.train_steps, {})
    first = tasks.init_state(run.task, run.values['seed'])
    row['from_scratch'] = accuracy_after(
        anew, start(anew, smaller(variables_of(first)), 0))
  return row


def smaller_run(run: training.Run, steps: int, changes: Mapping[str, Any]
                ) -> training.Run:
  """The run for a smaller network of the same model."""
  values = {**run.values, **changes}
  problem = run.task.problem
  task = training.make_task(
      dataclasses.replace(problem, model=Fitted(problem.model)), values, steps)
  whole, rows = devices.replicated(run.mesh), devices.split(run.mesh)
  return run._replace(
      values=values, train_steps=steps, task=task,
      step_fn=training.step_fn(task, whole, rows),
      eval_fn=jax.jit(functools.partial(tasks.eval_step, task),
                      in_shardings=(whole, whole, rows), out_shardings=whole))


def start(run: training.Run, variables: Mapping[str, Any], step: int
          ) -> tasks.TrainState:
  """The state of a smaller network with a fresh optimizer, at a step."""
  params = variables['params']
  key = jax.random.fold_in(jax.random.key(run.values['seed']), step)
  state = tasks.TrainState(
      jnp.int32(step), params, variables.get('batch_stats', {}),
      run.task.tx.init(params), {}, key, {}, dict.fromkeys(
          ('loss', 'accuracy', 'weight'), jnp.zeros(())))
  # Copies: what a step is given is gone.
  return jax.device_put(jax.tree.map(jnp.copy, state),
                        devices.replicated(run.mesh))


def accuracy_after(run: training.Run, state: tasks.TrainState) -> float:
  """Trains to the end of the run; the accuracy on the test split."""
  begin = int(state.step)
  state = pruning.train_on(run, run.step_fn, state, begin,
                           begin + run.train_steps)
  return training.evaluate(run, state)['test_accuracy']


def variables_of(state: tasks.TrainState) -> dict[str, Any]:
  """Parameters and batch statistics, as a model takes them."""
  return {'params': state.params, 'batch_stats': state.model_state}


def size(run: training.Run, variables: Mapping[str, Any]) -> dict[str, int]:
  """Parameters, and multiply-adds of a forward pass of one image."""
  apply, images = run.task.problem.inference(variables.get('batch_stats', {}))
  count = sparse_jax.cost.count_flops(apply, variables['params'], images,
                                      convention='multiply_adds')
  return {'parameters': sum(leaf.size for leaf in
                            jax.tree.leaves(variables['params'])),
          'flops': int(count.total)}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """A Markdown table: a line a share, accuracies in percent."""
  kinds = ('trained', 'pruned', 'fine_tuned', 'from_scratch')
  lines = [{
      'filters removed': row['filter_sparsity'],
      'parameters': row['parameters'], 'multiply-adds': row['flops'],
      'of dense': row['flops'] / rows[0]['flops'],
      **{kind.replace('_', ' '): 100 * row[kind]
         for kind in kinds if kind in row}} for row in rows]
  return reporting.markdown_table(lines, formats={
      'filters removed': '.0%', 'parameters': ',', 'multiply-adds': ',',
      'of dense': '.1%', **{kind.replace('_', ' '): '.2f' for kind in kinds}})


def _pairs(name: str, params: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  """(layer, the layer that reads it) of a network."""
  chains = [CHAINS[name]] if name in CHAINS else [
      [f'{block}/{layer}' for layer in BLOCKS[name]]
      for block in params if '_block_' in block]
  for chain in chains:
    yield from zip(chain, chain[1:])


def settings() -> Settings:
  """Those of the flags; a ValueError names the flag and its value."""
  shares = sparsity.numbers('filter_sparsities', _SHARES.value)
  if not shares:
    raise ValueError('`filter_sparsities` (=\'\') must not be empty.')
  return Settings(shares, _EPOCHS.value, _RATE.value, _FROM_SCRATCH.value)


def main(argv):
  programs.begin(argv)
  values = train.run_config()
  for flag, value in (('method', 'dense'), ('sparsity', 0.)):
    if not flags.FLAGS[flag].present:
      values[flag] = value
  with programs.errors_in_a_line():
    values['workdir'] = values['workdir'] or run_flags.workdir_name(values)
    study(values, settings())


if __name__ == '__main__':
  programs.run(main)
