"""Trains an image classifier sparse, from the first step to the last.

  python -m experiments.image.train

trains LeNet-300-100 with Top-KAST at 90% on scikit-learn's handwritten digits:
no download, well under a minute on two CPU cores, about 96% test accuracy.

  python -m experiments.image.train --dataset=cifar10 --data_dir=DIR \
      --model=resnet20 --method=rigl --sparsity=0.95 --allocation=erk

trains on a data set prepared by TFDS or by experiments.image.prepare. The
defaults follow the CIFAR recipes (batch 128, Nesterov momentum, cosine decay);
the ImageNet one of RigL and Top-KAST is

  --dataset=imagenet2012 --model=resnet50 --batch_size=4096 --train_steps=32000
  --learning_rate=1.6 --lr_schedule=step --warmup_share=0.049
  --lr_drops=0.293,0.684,0.879 --weight_decay=1e-4 --label_smoothing=0.1
  --dense_layers=stem,head

which nobody has run with this program yet. Data parallel over all devices.
Killed and started again with the same flags, a run continues bit for bit.

Leaves in --workdir: metrics.jsonl, tensorboard/, checkpoints/, training.png,
layers.png, and result.json once the run is complete.
"""

from collections.abc import Mapping
import functools
import math
import os
import sys
import time
from typing import Any
from typing import NamedTuple

from absl import app
from absl import flags
from absl import logging
import jax
import jax.numpy as jnp
import optax

import sparse_jax
from experiments import checkpointing
from experiments import devices
from experiments import optimization
from experiments import reporting
from experiments import sparsity
from experiments.image import input_pipeline
from experiments.image import models

flags.DEFINE_enum('dataset', 'digits', sorted(input_pipeline.DATASETS),
                  'What to train on. All but digits must be prepared before.')
flags.DEFINE_string('data_dir', None, 'Folder of the prepared data sets. '
                    'Default: TFDS\'s own.')
flags.DEFINE_enum('model', 'mlp', sorted(models.MODELS), 'The network.')
flags.DEFINE_float('width', 1., 'Multiplier of the network\'s channels.')
flags.DEFINE_float('dropout', 0., 'Dropout rate, where the network has any.')
flags.DEFINE_bool('bfloat16', False, 'Compute in bfloat16; parameters stay '
                  'float32.')
flags.DEFINE_integer('batch_size', 128, 'Images per step, over all devices.')
flags.DEFINE_integer('train_steps', None, 'Length of the run in steps.')
flags.DEFINE_float('train_epochs', None, 'Length of the run in epochs. '
                   'Default: 100.')
flags.DEFINE_float('label_smoothing', 0., 'Share of the label spread over all '
                   'classes.')
flags.DEFINE_bool('augment', True, 'Crop and flip as the papers do.')
flags.DEFINE_integer('seed', 0, 'Of initial weights, data order and masks.')
flags.DEFINE_string('workdir', None, 'Where the run leaves everything. '
                    'Default: runs/<dataset>_<model>_<method>_<sparsity>.')
flags.DEFINE_integer('log_every', 50, 'Steps between two rows of metrics.')
flags.DEFINE_integer('eval_every', 250, 'Steps between two evaluations.')
flags.DEFINE_integer('checkpoint_every', 1000, 'Steps between checkpoints.')
sparsity.define_flags()
optimization.define_flags()

# Flags that may differ between a run and its continuation.
FREE = ('workdir', 'data_dir', 'log_every', 'eval_every', 'checkpoint_every')


class TrainState(NamedTuple):
  """Everything that a continued run needs; the data order is in the step."""

  step: jax.Array  # int32[], updates done.
  params: Any  # As the optimizer holds them.
  batch_stats: Any  # Running statistics of batch norm; may be empty.
  opt_state: Any  # Holds the masks as well.
  key: jax.Array  # A typed key, for dropout.


class Task(NamedTuple):
  """What stays the same all through a run."""

  model: Any
  method: sparse_jax.SparseMethod
  tx: optax.GradientTransformation
  dataset: str
  label_smoothing: float


def init_state(task: Task, seed: int) -> TrainState:
  """The state before the first step."""
  spec = input_pipeline.DATASETS[task.dataset]
  init_key, key = jax.random.split(jax.random.key(seed))
  images = jnp.zeros((1, *spec.image_shape))
  variables = task.model.init(init_key, images, train=False)
  params = task.method.parametrize(variables['params'])
  return TrainState(jnp.zeros((), jnp.int32), params,
                    variables.get('batch_stats', {}), task.tx.init(params), key)


def loss_fn(params, task: Task, state: TrainState, batch):
  """Mean cross-entropy, with the new batch statistics and the accuracy."""
  weights = task.method.read(params, state.opt_state)
  images = input_pipeline.normalise(batch['image'], task.dataset)
  logits, updates = task.model.apply(
      {'params': weights, 'batch_stats': state.batch_stats}, images,
      train=True, mutable=['batch_stats'],
      rngs={'dropout': jax.random.fold_in(state.key, state.step)})
  labels = optax.smooth_labels(jax.nn.one_hot(batch['label'], logits.shape[-1]),
                               task.label_smoothing)
  loss = optax.softmax_cross_entropy(logits, labels).mean()
  accuracy = jnp.mean(logits.argmax(-1) == batch['label'])
  return loss, (updates.get('batch_stats', {}), accuracy)


def train_step(task: Task, state: TrainState, batch):
  """One update; returns the new state and the step's metrics."""
  (loss, (batch_stats, accuracy)), grads = jax.value_and_grad(
      loss_fn, has_aux=True)(state.params, task, state, batch)
  updates, opt_state = task.tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics = {'train_loss': loss, 'train_accuracy': accuracy}
  return TrainState(state.step + 1, params, batch_stats, opt_state,
                    state.key), metrics


def eval_step(task: Task, state: TrainState, batch):
  """Summed loss, hits and weights of one batch."""
  weights = task.method.read(state.params, state.opt_state)
  images = input_pipeline.normalise(batch['image'], task.dataset)
  logits = task.model.apply(
      {'params': weights, 'batch_stats': state.batch_stats}, images,
      train=False)
  losses = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch['label'])
  hits = logits.argmax(-1) == batch['label']
  weight = batch['weight']
  return jnp.stack([jnp.sum(losses * weight), jnp.sum(hits * weight),
                    jnp.sum(weight)])


def evaluate(step_fn, state, split, batch_size: int, mesh) -> dict[str, float]:
  """Loss and accuracy over a whole split."""
  rows = input_pipeline.eval_batches(
      split, batch_size=batch_size, process_index=jax.process_index(),
      process_count=jax.process_count())
  loss, hits, weight = sum(
      step_fn(state, devices.put_batch(batch, mesh)) for batch in rows)
  return {'test_loss': float(loss / weight),
          'test_accuracy': float(hits / weight)}


def mask_metrics(task: Task, state: TrainState) -> dict[str, float]:
  """Sparsity and how the masks moved at the last refresh, over the layers."""
  summary = sparse_jax.summarize(state.params, state.opt_state, task.method)
  churn = [row.churn for row in summary.rows if row.sparse]
  if not churn:
    return {}
  return {'sparsity': summary.sparsity, 'churn_min': min(churn),
          'churn_mean': sum(churn) / len(churn), 'churn_max': max(churn),
          'ever_active': summary.total.ever_active}


def run_length(values: Mapping[str, Any], num_examples: int) -> int:
  """Steps of the run, from --train_steps or --train_epochs."""
  steps, epochs = values['train_steps'], values['train_epochs']
  if steps is not None and epochs is not None:
    raise ValueError(f'`train_steps` (={steps}) and `train_epochs` (={epochs})'
                     ' exclude each other.')
  if steps is None:
    epochs = 100. if epochs is None else epochs
    steps = math.ceil(epochs * (num_examples // values['batch_size']))
  if steps < 1:
    raise ValueError(f'`train_steps` or `train_epochs` (={steps} steps) must '
                     'be positive.')
  return steps


def make_task(values: Mapping[str, Any], train_steps: int) -> Task:
  """Model, method and optimizer of the flags."""
  spec = input_pipeline.DATASETS[values['dataset']]
  model = models.create(
      values['model'], num_classes=spec.num_classes, width=values['width'],
      dropout=values['dropout'],
      dtype=jnp.bfloat16 if values['bfloat16'] else jnp.float32)
  method = sparsity.from_flags(values, train_steps)
  tx = sparse_jax.sparsify(optimization.make(values, train_steps), method,
                           key=values['seed'])
  return Task(model, method, tx, values['dataset'], values['label_smoothing'])


def default_workdir(values: Mapping[str, Any]) -> str:
  name = f'{values["dataset"]}_{values["model"]}_{values["method"]}'
  if values['method'] != 'dense':
    name += f'_{values["sparsity"]:g}'
  return os.path.join('runs', name)


def run_config() -> dict[str, Any]:
  """The flags of this program alone, those of absl and JAX left out."""
  own = flags.FLAGS.flags_by_module_dict()
  modules = (__name__, sys.argv[0], sparsity.__name__, optimization.__name__)
  return {flag.name: flag.value for module in modules
          for flag in own.get(module, ())}


def train(values: Mapping[str, Any]) -> dict[str, Any]:
  """Runs from the last checkpoint, or the start, to the end.

  Args:
    values: flag values by name.

  Returns:
    What result.json holds.
  """
  batch_size = devices.check_batch_size(values['batch_size'])
  workdir = values['workdir'] or default_workdir(values)
  mesh = devices.mesh()
  spec = input_pipeline.DATASETS[values['dataset']]
  load = functools.partial(input_pipeline.load, values['dataset'],
                           data_dir=values['data_dir'])
  data, test = load('train'), load(spec.eval_split)
  train_steps = run_length(values, data.num_examples)
  task = make_task(values, train_steps)
  whole, rows = devices.replicated(mesh), devices.split(mesh)
  state = jax.jit(functools.partial(init_state, task, values['seed']),
                  out_shardings=whole)()
  step_fn = jax.jit(functools.partial(train_step, task),
                    in_shardings=(whole, rows), out_shardings=whole,
                    donate_argnums=0)
  eval_fn = jax.jit(functools.partial(eval_step, task),
                    in_shardings=(whole, rows), out_shardings=whole)

  with checkpointing.PreemptionGuard() as guard, checkpointing.open(
      os.path.join(workdir, 'checkpoints'), config=dict(values), free=FREE,
      save_every=values['checkpoint_every'], guard=guard) as checkpoints:
    state, start = checkpoints.restore_latest(state) or (state, 0)
    if start:
      print(f'continues {workdir} after step {start}', flush=True)
    batches = input_pipeline.prefetch(input_pipeline.train_batches(
        data, batch_size=batch_size, seed=values['seed'], step=start,
        augment=values['augment'], process_index=jax.process_index(),
        process_count=jax.process_count()))
    begin, pending = time.monotonic(), []
    with reporting.open_writers(workdir, start + 1) as writers, (
        reporting.Progress(train_steps, start, values['log_every'],
                           batch_size)) as progress:
      for step in range(start + 1, train_steps + 1):
        state, metrics = step_fn(state, devices.put_batch(next(batches), mesh))
        pending.append(metrics)
        shown = {}
        if step % values['log_every'] == 0 or step == train_steps:
          shown |= _mean(pending) | mask_metrics(task, state)
          pending = []
          _check_finite(shown['train_loss'], step, workdir)
        if step % values['eval_every'] == 0 or step == train_steps:
          shown |= evaluate(eval_fn, state, test, batch_size, mesh)
        if shown:
          writers.write_scalars(step, shown)
        progress.update(step, **{key: shown[key] for key in shown if key in (
            'train_loss', 'test_accuracy')})
        checkpoints.save(step, state, force=step == train_steps)
        if checkpoints.reached_preemption(step):
          checkpoints.save(step, state, force=True)
          checkpoints.wait()
          logging.warning('Stopped by request after step %d; start again with '
                          'the same flags to continue.', step)
          sys.exit(checkpointing.REQUEUE_EXIT_CODE)
    batches.close()
  final = evaluate(eval_fn, state, test, batch_size, mesh)
  return report(task, state, values, workdir, final,
                time.monotonic() - begin)


def report(task: Task, state: TrainState, values, workdir: str,
           final: Mapping[str, float], seconds: float) -> dict[str, Any]:
  """Prints the table of layers, draws the plots, writes result.json."""
  summary = sparse_jax.summarize(state.params, state.opt_state, task.method)
  result = {
      **final, 'sparsity': summary.sparsity if summary.total.sparse else 0.,
      'backward_density': summary.total.backward_density,
      'ever_active': summary.total.ever_active,
      'parameters': sum(row.entries for row in summary.rows),
      'steps': int(state.step), 'seconds_this_session': seconds,
      'flags': dict(values), 'layers': summary.as_dicts()}
  if jax.process_index() == 0:
    from experiments import plots
    metrics = reporting.read_jsonl(os.path.join(workdir, 'metrics.jsonl'))
    title = (f'{values["dataset"]}, {values["model"]}, {values["method"]} at '
             f'{result["sparsity"]:.0%} sparsity')
    plots.training_curves(metrics, os.path.join(workdir, 'training.png'),
                          title)
    plots.layer_density(
        [{'layer': row.path, 'forward_density': row.forward_density,
          'backward_density': row.backward_density}
         for row in summary.rows if row.sparse] or [
             {'layer': 'all', 'forward_density': 1.}],
        os.path.join(workdir, 'layers.png'))
    print(summary)
    print(f'test accuracy {final["test_accuracy"]:.2%}, sparsity '
          f'{result["sparsity"]:.2%}, {int(state.step)} steps')
    print(f'pictures and metrics: {workdir}')
    reporting.write_json(os.path.join(workdir, 'result.json'), result)
  return result


def _mean(pending) -> dict[str, float]:
  """Means of the steps since the last row, fetched in one go."""
  fetched = jax.device_get(pending)
  return {key: float(sum(step[key] for step in fetched) / len(fetched))
          for key in fetched[0]}


def _check_finite(loss: float, step: int, workdir: str) -> None:
  if not math.isfinite(loss):
    raise FloatingPointError(
        f'the training loss is {loss} at step {step}; the last checkpoint in '
        f'{workdir} is from before. A smaller --learning_rate may help.')


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # Orbax logs every file at INFO.
  try:
    train(run_config())
  except (ValueError, FileNotFoundError) as error:
    logging.error('%s', error)
    sys.exit(2)


if __name__ == '__main__':
  app.run(main)
