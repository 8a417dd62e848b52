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

which nobody has run with this program yet. Data parallel over all devices, and
with --distributed over those of several hosts. Killed and started again with
the same flags, a run continues bit for bit; stopped by SIGTERM it saves first
and exits with status 75. Bad flags are status 2 and leave nothing behind.

Leaves in --workdir: metrics.jsonl, tensorboard/, checkpoints/, training.png,
layers.png, and result.json once the run is complete. Started again then, it
only prints its report.
"""

from collections.abc import Mapping
import contextlib
import functools
import itertools
import json
import math
import os
import statistics
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
from experiments import accounting
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
devices.define_flags()

# Flags that may differ between a run and its continuation.
FREE = ('workdir', 'data_dir', 'log_every', 'eval_every', 'checkpoint_every')
# The smallest and largest values of flags that no other file checks.
LIMITS = {
    'batch_size': (1, math.inf), 'log_every': (1, math.inf),
    'eval_every': (1, math.inf), 'checkpoint_every': (1, math.inf),
    'seed': (0, 2**32 - 1), 'label_smoothing': (0, 1), 'width': (0, 1e6),
}
# XLA optimises the random draws and searches of the first state for minutes on
# a CPU; they run once. Half the compile time of ResNet-20, a sixth if dense.
FAST_COMPILE = {'xla_backend_optimization_level': 0}


class TrainState(NamedTuple):
  """Everything that a continued run needs; the data order is in the step."""

  step: jax.Array  # int32[], updates done.
  params: Any  # As the optimizer holds them.
  batch_stats: Any  # Running statistics of batch norm; may be empty.
  opt_state: Any  # Holds the masks as well.
  thresholds: Any  # Of sparse operands with a period; may be empty.
  key: jax.Array  # A typed key, for dropout.
  sums: jax.Array  # float32[3] since the last row: loss, accuracy, steps.


class Task(NamedTuple):
  """What is learned, and how."""

  model: Any
  method: sparse_jax.SparseMethod
  tx: optax.GradientTransformation
  operator_options: Mapping[str, Any]
  operand_period: int
  dataset: str
  label_smoothing: float
  log_every: int


class Run(NamedTuple):
  """What stays the same from the first step to the last."""

  values: Mapping[str, Any]  # Of the flags, by name.
  workdir: str
  train_steps: int
  data: input_pipeline.Split
  test: input_pipeline.Split
  task: Task
  mesh: jax.sharding.Mesh
  init: Any  # () -> TrainState, traced.
  step_fn: Any  # (TrainState, batch) -> TrainState, jitted.
  eval_fn: Any  # (TrainState, batch) -> float32[3], jitted.


def init_state(task: Task, seed: int) -> TrainState:
  """The state before the first step."""
  spec = input_pipeline.DATASETS[task.dataset]
  init_key, key = jax.random.split(jax.random.key(seed))
  images = jnp.zeros((1, *spec.image_shape))
  variables = task.model.init(init_key, images, train=False)
  params = task.method.parametrize(variables['params'])
  opt_state = task.tx.init(params)
  thresholds = {} if task.operand_period == 1 else (
      sparse_jax.first_operator_thresholds(task.method, params, opt_state))
  return TrainState(jnp.zeros((), jnp.int32), params,
                    variables.get('batch_stats', {}), opt_state, thresholds,
                    key, jnp.zeros(3))


def apply_model(params, thresholds, task: Task, state: TrainState, images,
                **options):
  """What the model gives for images as the data set has them."""
  def apply(weights, images):
    return task.model.apply(
        {'params': weights, 'batch_stats': state.batch_stats}, images,
        **options)

  apply = sparse_jax.with_operators(
      apply, task.method, state.opt_state, thresholds=thresholds or None,
      due=options['train'] & (state.step % task.operand_period == 0),
      **task.operator_options)
  return apply(task.method.read(params, state.opt_state),
               input_pipeline.normalise(images, task.dataset))


def loss_fn(params, thresholds, task: Task, state: TrainState, batch):
  """Mean cross-entropy, with the new batch statistics and the accuracy."""
  logits, updates = apply_model(
      params, thresholds, task, state, batch['image'],
      train=True, mutable=['batch_stats'],
      rngs={'dropout': jax.random.fold_in(state.key, state.step)})
  labels = optax.smooth_labels(jax.nn.one_hot(batch['label'], logits.shape[-1]),
                               task.label_smoothing)
  loss = optax.softmax_cross_entropy(logits, labels).mean()
  accuracy = jnp.mean(logits.argmax(-1) == batch['label'])
  return loss, (updates.get('batch_stats', {}), accuracy)


def train_step(task: Task, state: TrainState, batch) -> TrainState:
  """One update."""
  # The gradient of a threshold is the threshold for the next step.
  (loss, (batch_stats, accuracy)), (grads, thresholds) = jax.value_and_grad(
      loss_fn, (0, 1), has_aux=True)(state.params, state.thresholds, task,
                                     state, batch)
  updates, opt_state = task.tx.update(
      grads, state.opt_state, state.params, grad_fn=lambda params: jax.grad(
          loss_fn, has_aux=True)(params, state.thresholds, task, state,
                                 batch)[0])
  params = optax.apply_updates(state.params, updates)
  # In the state, so that a run stopped between two rows continues its sums.
  begins = state.step % task.log_every == 0
  sums = jnp.where(begins, 0., state.sums) + jnp.stack([loss, accuracy, 1.])
  return TrainState(state.step + 1, params, batch_stats, opt_state, thresholds,
                    state.key, sums)


def eval_step(task: Task, state: TrainState, batch):
  """Summed loss, hits and weights of one batch."""
  logits = apply_model(state.params, state.thresholds, task, state,
                       batch['image'], train=False)
  losses = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch['label'])
  hits = logits.argmax(-1) == batch['label']
  weight = batch['weight']
  return jnp.stack([jnp.sum(losses * weight), jnp.sum(hits * weight),
                    jnp.sum(weight)])


def train(values: Mapping[str, Any]) -> dict[str, Any]:
  """Runs from the last checkpoint, or the start, to the end.

  Args:
    values: flag values by name.

  Returns:
    What result.json holds.

  Raises:
    ValueError: naming the flag and its value; FileNotFoundError likewise for
      data that is not there. Nothing has then been written.
  """
  workdir = values['workdir'] or default_workdir(values)
  result = finished(values, workdir)
  if result is None:
    result = run_steps(prepare(values, workdir))
  show(result, workdir)
  return result


def run_steps(run: Run) -> dict[str, Any]:
  """The loop; returns what `report` does."""
  begin, row = time.monotonic(), {}
  with (checkpointing.PreemptionGuard() as guard,
        open_checkpoints(run, guard) as checkpoints):
    state, start = first_state(run, checkpoints)
    with (open_batches(run, start) as batches,
          reporting.open_writers(run.workdir, start + 1) as writers,
          open_progress(run, start) as progress):
      for step in range(start + 1, run.train_steps + 1):
        state = run.step_fn(state, devices.put_batch(next(batches), run.mesh))
        row = measure(run, state, step)
        if row:
          writers.write_scalars(step, row)
        progress.update(step, **{name: row[name] for name in (
            'train_loss', 'test_accuracy') if name in row})
        checkpoints.save(step, state, force=step == run.train_steps)
        if checkpoints.reached_preemption(step):
          stop(run, checkpoints, state, step)
  final = row or evaluate(run, state)
  return report(run, state, {
      'test_loss': final['test_loss'], 'test_accuracy': final['test_accuracy'],
      'seconds_this_session': time.monotonic() - begin})


def prepare(values: Mapping[str, Any], workdir: str) -> Run:
  """Checks the flags, loads the data and traces; writes nothing yet."""
  check_values(values)
  check_workdir(workdir)
  spec = input_pipeline.DATASETS[values['dataset']]
  data, test = (_load(values['dataset'], split, values['data_dir'])
                for split in ('train', spec.eval_split))
  train_steps = run_length(values, data.num_examples)
  task = make_task(values, train_steps)
  mesh = devices.mesh()
  whole, rows = devices.replicated(mesh), devices.split(mesh)
  jit = functools.partial(jax.jit, out_shardings=whole)
  init = jit(functools.partial(init_state, task, values['seed']))
  step_fn = jit(functools.partial(train_step, task),
                in_shardings=(whole, rows), donate_argnums=0)
  eval_fn = jit(functools.partial(eval_step, task), in_shardings=(whole, rows))
  return Run(values, workdir, train_steps, data, test, task, mesh,
             init.trace(), step_fn, eval_fn)


def check(values: Mapping[str, Any]) -> None:
  """Raises what `train` would for bad flags or absent data; makes no arrays."""
  check_values(values)
  data = _load(values['dataset'], 'train', values['data_dir'])
  make_task(values, run_length(values, data.num_examples))


def check_values(values: Mapping[str, Any]) -> None:
  """Raises ValueError for a flag out of range that no other file checks."""
  for flag, (least, most) in LIMITS.items():
    if not least <= values[flag] <= most:
      raise ValueError(f'`{flag}` (={values[flag]!r}) must be in '
                       f'[{least}, {most}].')
  devices.check_batch_size(values['batch_size'])


def check_workdir(workdir: str) -> None:
  """Raises ValueError where results lie that no checkpoints belong to."""
  if os.path.exists(os.path.join(workdir, 'checkpoints', 'config.json')):
    return  # Whose they are is checked when they are opened.
  found = [name for name in ('metrics.jsonl', 'result.json')
           if os.path.exists(os.path.join(workdir, name))]
  if found or os.path.isfile(workdir):
    raise ValueError(f'`workdir` (={workdir!r}) holds {" and ".join(found)} of '
                     'another run, and no checkpoints of this one.' if found
                     else f'`workdir` (={workdir!r}) is a file.')


def run_length(values: Mapping[str, Any], num_examples: int) -> int:
  """Steps of the run, from --train_steps or --train_epochs."""
  steps, epochs = values['train_steps'], values['train_epochs']
  batch_size = values['batch_size']
  if batch_size > num_examples:
    raise ValueError(f'`batch_size` (={batch_size}) must not be above the '
                     f'{num_examples} examples of {values["dataset"]}.')
  if steps is not None and epochs is not None:
    raise ValueError(f'`train_steps` (={steps}) and `train_epochs` (={epochs})'
                     ' exclude each other.')
  if steps is None:
    epochs = 100. if epochs is None else epochs
    if not 0 < epochs < math.inf:
      raise ValueError(f'`train_epochs` (={epochs}) must be finite and above '
                       '0.')
    steps = math.ceil(epochs * (num_examples // batch_size))
  if steps < 1:
    raise ValueError(f'`train_steps` (={steps}) must be at least 1.')
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
  return Task(model, method, tx, sparsity.operator_options(values),
              values['operand_period'], values['dataset'],
              values['label_smoothing'], values['log_every'])


@functools.lru_cache(2)
def _load(dataset: str, split: str, data_dir: str | None):
  """Keeps the splits in memory for a program that trains several times."""
  return input_pipeline.load(dataset, split, data_dir)


def open_checkpoints(run: Run, guard) -> checkpointing.Checkpoints:
  with _naming_workdir(run.workdir):
    return checkpointing.open(
        os.path.join(run.workdir, 'checkpoints'), config=dict(run.values),
        free=FREE, save_every=run.values['checkpoint_every'], guard=guard)


def first_state(run: Run, checkpoints) -> tuple[TrainState, int]:
  """The newest checkpoint's state and step; at first, the initial ones."""
  with _naming_workdir(run.workdir):
    restored = checkpoints.restore_latest(run.init.out_info)
  if restored is not None:
    print(f'continues {run.workdir} after step {restored[1]}', flush=True)
    return restored
  options = FAST_COMPILE if jax.default_backend() == 'cpu' else None
  return run.init.lower().compile(compiler_options=options)(), 0


@contextlib.contextmanager
def _naming_workdir(workdir: str):
  """Says which flag led to checkpoints that cannot be used."""
  try:
    yield
  except RuntimeError as error:
    raise ValueError(f'`workdir` (={workdir!r}): {error}') from error


def open_batches(run: Run, start: int):
  """This process's part of each batch after step `start`; a context."""
  return contextlib.closing(input_pipeline.prefetch(
      input_pipeline.train_batches(
          run.data, batch_size=run.values['batch_size'],
          seed=run.values['seed'], step=start, augment=run.values['augment'],
          process_index=jax.process_index(),
          process_count=jax.process_count())))


def open_progress(run: Run, start: int) -> reporting.Progress:
  return reporting.Progress(run.train_steps, start, run.values['log_every'],
                            run.values['batch_size'])


def measure(run: Run, state: TrainState, step: int) -> dict[str, float]:
  """What is due to be written down after a step; mostly nothing."""
  due = {name for name in ('log', 'eval', 'checkpoint')
         if step % run.values[f'{name}_every'] == 0 or step == run.train_steps}
  row = {}
  if due & {'log', 'checkpoint'}:
    means = mean_metrics(run, state)
  if 'log' in due:
    row |= means | mask_metrics(run.task, state)
  if 'eval' in due:
    row |= evaluate(run, state)
  return row


def mean_metrics(run: Run, state: TrainState) -> dict[str, float]:
  """Means of the steps since the last row.

  Raises:
    FloatingPointError: if the loss is not finite, before that can be saved.
  """
  loss, accuracy, steps = jax.device_get(state.sums).tolist()
  if not math.isfinite(loss):
    raise FloatingPointError(
        f'the training loss is {loss / steps} by step {int(state.step)}; what '
        f'is in {run.workdir} is from before. A smaller --learning_rate (='
        f'{run.values["learning_rate"]}) may help.')
  return {'train_loss': loss / steps, 'train_accuracy': accuracy / steps}


def mask_metrics(task: Task, state: TrainState) -> dict[str, float]:
  """Sparsity and how the masks moved at the last refresh, over the layers."""
  summary = sparse_jax.summarize(state.params, state.opt_state, task.method)
  churn = [row.churn for row in summary.rows if row.sparse]
  if not churn:
    return {}
  return {'sparsity': summary.sparsity, 'churn_min': min(churn),
          'churn_mean': sum(churn) / len(churn), 'churn_max': max(churn),
          'ever_active': summary.total.ever_active}


def evaluate(run: Run, state: TrainState) -> dict[str, float]:
  """Loss and accuracy over the whole test split."""
  batches = input_pipeline.eval_batches(
      run.test, batch_size=run.values['batch_size'],
      process_index=jax.process_index(), process_count=jax.process_count())
  loss, hits, weight = sum(
      run.eval_fn(state, devices.put_batch(batch, run.mesh))
      for batch in batches)
  return {'test_loss': float(loss / weight),
          'test_accuracy': float(hits / weight)}


def stop(run: Run, checkpoints, state: TrainState, step: int) -> None:
  """Saves and leaves; whoever started the run may start it again."""
  mean_metrics(run, state)
  checkpoints.save(step, state, force=True)
  checkpoints.wait()
  logging.warning('Stopped by request after step %d; start again with the same '
                  'flags to continue.', step)
  sys.exit(checkpointing.REQUEUE_EXIT_CODE)


def report(run: Run, state: TrainState, measured: Mapping[str, float]
           ) -> dict[str, Any]:
  """Draws the pictures, then writes result.json, which ends the run."""
  summary = sparse_jax.summarize(state.params, state.opt_state, run.task.method)
  result = {
      **measured, 'sparsity': summary.sparsity if summary.total.sparse else 0.,
      'backward_density': summary.total.backward_density,
      'ever_active': summary.total.ever_active,
      'parameters': sum(row.entries for row in summary.rows),
      'steps': int(state.step), 'flags': dict(run.values),
      'layers': summary.as_dicts(), 'cost': cost(run, state, summary)}
  if jax.process_index() == 0:
    rows = reporting.read_jsonl(os.path.join(run.workdir, 'metrics.jsonl'))
    result['examples_per_second'] = speed(rows, run.values['batch_size'])
    draw(result, rows, run.workdir)
    reporting.write_json(os.path.join(run.workdir, 'result.json'), result)
  return result


def cost(run: Run, state: TrainState, summary) -> dict[str, Any]:
  """FLOPs and bytes, by arithmetic."""
  spec = input_pipeline.DATASETS[run.values['dataset']]
  weights = jax.eval_shape(run.task.method.read, state.params, state.opt_state)
  batch_stats = state.batch_stats

  def apply(weights, images):
    return run.task.model.apply(
        {'params': weights, 'batch_stats': batch_stats}, images, train=False)

  return accounting.figures(
      apply, weights, jax.ShapeDtypeStruct((1, *spec.image_shape), jnp.float32),
      run.task.method, summary, run.train_steps)


def speed(rows, batch_size: int) -> float | None:
  """Examples a second, the median over the times between rows of metrics.

  So neither compiling nor an interruption counts, nor a rare evaluation.
  """
  rates = [batch_size * (row['step'] - before['step'])
           / max(row['time'] - before['time'], 1e-3)  # Times are in ms.
           for before, row in itertools.pairwise(rows)]
  return statistics.median(rates) if rates else None


def draw(result: Mapping[str, Any], rows, workdir: str) -> None:
  """Accuracy and churn by step, and the density of each layer."""
  from experiments import plots
  of = result['flags']
  title = (f'{of["dataset"]}, {of["model"]}, {of["method"]} at '
           f'{result["sparsity"]:.0%} sparsity')
  plots.training_curves(rows, os.path.join(workdir, 'training.png'), title)
  layers = [{'layer': layer['path'], **layer} for layer in result['layers'][:-1]
            if layer['sparse']]
  plots.layer_density(layers or [{'layer': 'all', 'forward_density': 1.}],
                      os.path.join(workdir, 'layers.png'))


def show(result: Mapping[str, Any], workdir: str) -> None:
  """Prints the table of layers and the last line."""
  if jax.process_index() == 0:
    rows = [sparse_jax.summary.Row(**layer) for layer in result['layers']]
    print(sparse_jax.Summary(tuple(rows[:-1]), rows[-1]))
    print(f'test accuracy {result["test_accuracy"]:.2%}, sparsity '
          f'{result["sparsity"]:.2%}, {result["steps"]} steps')
    cost = result['cost']
    print(f'theoretical FLOPs of dense: {cost["training_multiplier"]:.2%} in '
          f'training, {cost["inference_multiplier"]:.2%} in inference')
    print(f'pictures and metrics: {workdir}', flush=True)


def finished(values: Mapping[str, Any], workdir: str) -> dict[str, Any] | None:
  """What result.json holds, if a run of these flags has written one."""
  try:
    with open(os.path.join(workdir, 'result.json')) as file:
      result = json.load(file)
    theirs = dict(result['flags'])
  except (OSError, ValueError, TypeError, KeyError):
    return None  # None, or not ours: the checks to come say so.
  both = theirs.keys() | values.keys()
  differ = {flag for flag in both if theirs.get(flag) != values.get(flag)}
  return None if differ - set(FREE) else result


def default_workdir(values: Mapping[str, Any]) -> str:
  name = f'{values["dataset"]}_{values["model"]}_{values["method"]}'
  if sparsity.has_target(values['method']):
    name += f'_{values["sparsity"]:g}'
  return os.path.join('runs', name)


def run_config() -> dict[str, Any]:
  """The flags that make a run what it is, wherever this program is used."""
  own = flags.FLAGS.flags_by_module_dict()
  main_module = sys.argv[0] if __name__ == '__main__' else __name__
  modules = (main_module, sparsity.__name__, optimization.__name__)
  return {flag.name: flag.value for module in modules for flag in own[module]}


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # Orbax logs every file at INFO.
  try:
    devices.join(flags.FLAGS.flag_values_dict())
    train(run_config())
  except (ValueError, OSError, FloatingPointError) as error:
    logging.error('%s', error)
    logging.debug('It came from here:', exc_info=True)
    sys.exit(2)


if __name__ == '__main__':
  app.run(main)
