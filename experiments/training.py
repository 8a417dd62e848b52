"""The loop that every binary shares, from the first step to the last.

A binary says what is learned, as a `Problem`, and where its data come from;
`Run` puts that together with a sparse-training method and an optimizer. Killed
and started again with the same flags, a run continues bit for bit; stopped by
SIGTERM it saves first and exits with status 75. Bad flags are status 2 and
leave nothing behind.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import functools
import math
import os
import sys
import time
from typing import Any
from typing import NamedTuple
from typing import NoReturn

from absl import flags
from absl import logging
import jax
import jax.numpy as jnp

import sparse_jax
from experiments import accounting
from experiments import checkpointing
from experiments import devices
from experiments import files
from experiments import locking
from experiments import optimization
from experiments import programs
from experiments import report
from experiments import reporting
from experiments import results
from experiments import run_flags
from experiments import sparsity
from experiments import tasks
from experiments.tasks import Problem
from experiments.tasks import Task
from experiments.tasks import TrainState

# How many devices there are is noted beside the flags.
_FREE = (*run_flags.FREE, 'devices')
# XLA optimises the random draws and searches of the first state for minutes on
# a CPU; they run once. Half the compile time of ResNet-20, a sixth if dense.
FAST_COMPILE = {'xla_backend_optimization_level': 0}


class Run(NamedTuple):
  """What stays the same from the first step to the last."""

  values: Mapping[str, Any]  # Of the flags, by name.
  workdir: str
  train_steps: int
  task: Task
  mesh: jax.sharding.Mesh
  init: Any  # () -> TrainState, traced.
  step_fn: Any  # (TrainState, batch) -> TrainState, jitted.
  # TrainState -> TrainState and how far the masks have moved, jitted.
  compare_fn: Any
  first_carry: Any  # () -> carry, jitted.
  eval_fn: Any  # (TrainState, carry, batch) -> carry and sums, jitted.
  train_batches: Callable[[int], Iterator[Any]]  # Those after a step.
  eval_batches: Callable[[], Iterator[Any]]
  # Of what the speed is counted: its name and how many a step.
  units: tuple[str, int]
  # (weights, inputs) -> outputs, and the shapes of the inputs: for the FLOPs.
  apply: Callable[[TrainState], tuple[Callable[..., Any], Any]]
  data: str = ''  # Tells the data from any others, where the flags do not.


class Binary(NamedTuple):
  """What a program brings to the loop."""

  name: str  # Of its module.
  prepare: Callable[[Mapping[str, Any], str], Run]
  headline: Callable[[Mapping[str, Any]], str]  # (result) -> of the last line.
  # (values) -> the result that pictures show, by its name in `plots`.
  metric: Callable[[Mapping[str, Any]], str]


def make_task(problem: Problem, values: Mapping[str, Any],
              train_steps: int, also_sparse: Mapping[str, tuple[int, ...]] = {}
              ) -> Task:
  """Adds the method and the optimizer of the flags."""
  method = sparsity.from_flags(values, train_steps, also_sparse,
                               functools.partial(layer_order, problem),
                               optimization.schedule(values, train_steps))
  tx = sparse_jax.sparsify(optimization.make(values, train_steps), method,
                           key=values['seed'])
  return Task(problem, method, tx, sparsity.operator_options(values),
              values['operand_period'], values['log_every'],
              values['compare_masks_every'])


def layer_order(problem: Problem) -> tuple[str, ...]:
  """The parameters in the order in which the problem multiplies by them."""
  key = jax.random.key(0)
  loss = lambda weights, model_state, batch: problem.loss(
      weights, model_state, batch, key)[0]
  params, _ = jax.eval_shape(problem.init, key)
  return sparse_jax.jaxprs.layer_order(loss, params, *problem.examples(1))


def make_run(values: Mapping[str, Any], workdir: str, task: Task,
             train_steps: int, **data) -> Run:
  """Traces the functions of a run; `data` are the last fields of `Run`."""
  mesh = devices.mesh(values['model_parallel'])
  first = functools.partial(tasks.init_state, task, values['seed'])
  with _naming_dense_layers(values['dense_layers']):
    state = jax.eval_shape(first)
  carry = jax.eval_shape(task.problem.first_carry)
  axes = task.problem.batch_axes
  places = state_places(task, mesh, state)
  carried = _places(mesh, carry, axes(carry))
  rows, whole = devices.split(mesh), devices.replicated(mesh)
  return Run(
      values, workdir, train_steps, task, mesh,
      jax.jit(first, out_shardings=places).trace(),
      step_fn(task, places, rows),
      jax.jit(tasks.compare_masks, donate_argnums=0, in_shardings=(places,),
              out_shardings=(places, whole)),
      jax.jit(task.problem.first_carry, out_shardings=carried),
      jax.jit(functools.partial(tasks.eval_step, task),
              in_shardings=(places, carried, rows),
              out_shardings=(carried, whole)), **data)


def state_places(task: Task, mesh: jax.sharding.Mesh, state: TrainState
                 ) -> TrainState:
  """Where each array of the state lies."""
  axes = task.problem.batch_axes(state.model_state)
  return jax.tree.map_with_path(
      functools.partial(devices.place, mesh), state)._replace(
          model_state=_places(mesh, state.model_state, axes))


def step_fn(task: Task, places: TrainState, rows: jax.sharding.Sharding):
  """(TrainState, batch) -> TrainState, jitted for a mesh."""
  return jax.jit(functools.partial(tasks.train_step, task), donate_argnums=0,
                 in_shardings=(places, rows), out_shardings=places)


@contextlib.contextmanager
def _naming_dense_layers(rules):
  """Says which flag made the rules that the library calls `is_sparse`."""
  try:
    yield
  except ValueError as error:
    if not rules or '`is_sparse`' not in str(error):
      raise
    raise ValueError(f'`dense_layers` (={",".join(rules)!r}): {error}'
                     ) from error


def _places(mesh, carried, axes):
  """Shardings of what belongs to examples: split like them."""
  return jax.tree.map(lambda leaf, axis: devices.split(mesh, axis), carried,
                      axes)


def describe(task: Task, values: Mapping[str, Any], train_steps: int
             ) -> dict[str, Any]:
  """Size, length and cost of a run, from shapes alone.

  Returns:
    `train_steps`, `batch_size`, `learning_rate` (the highest), and what
    `accounting.forecast` says.
  """
  key = jax.random.key(0)
  loss = lambda weights, model_state, batch: task.problem.loss(
      weights, model_state, batch, key)[0]
  rates = optimization.schedule(values, train_steps)
  return {
      'train_steps': train_steps, 'batch_size': values['batch_size'],
      'learning_rate': max(float(rates(train_steps * share // 100))
                           for share in range(100)),
      **accounting.forecast(
          loss, jax.eval_shape(functools.partial(tasks.init_state, task, 0)),
          *map(task.problem.examples, (1, 2)), task.method,
          batch_size=values['batch_size'], steps=train_steps)}


def train(binary: Binary, values: Mapping[str, Any]) -> dict[str, Any]:
  """Runs from the last checkpoint, or the start, to the end.

  Args:
    binary: what is trained.
    values: flag values by name.

  Returns:
    What result.json holds.

  Raises:
    ValueError: naming the flag and its value; FileNotFoundError likewise for
      data that is not there. Nothing has then been written.
    locking.Held: if another process is at this run.
  """
  workdir = values['workdir'] or run_flags.workdir_name(values)
  devices.check_equal(values, free=('data_dir',))
  result = devices.gather(devices.agree(
      lambda: results.finished(workdir, values, run_flags.FREE)))[0]
  if result is None:
    run = devices.agree(lambda: _ready(binary, values, workdir))
    with _held(workdir), files.naming(workdir):
      result = run_steps(binary, run)
  show(binary, result, workdir)
  return result


def _ready(binary: Binary, values: Mapping[str, Any], workdir: str) -> Run:
  """A run of which nothing is left to be refused; nothing is written."""
  check_workdir(workdir)
  run = binary.prepare(values, workdir)
  with _naming_workdir(workdir):
    checkpointing.check(_checkpoints_of(run), config=_config(run), free=_FREE)
  return run


def _checkpoints_of(run: Run) -> str:
  return os.path.join(run.workdir, 'checkpoints')


def _config(run: Run) -> dict[str, Any]:
  return {**run.values, 'data': run.data, 'devices': jax.device_count()}


@contextlib.contextmanager
def _held(workdir: str):
  """Holds the folder for all processes, by the lock of the first."""
  with contextlib.ExitStack() as stack:
    devices.agree(lambda: jax.process_index() or stack.enter_context(
        locking.hold(workdir)))
    yield


def run_steps(binary: Binary, run: Run) -> dict[str, Any]:
  """The loop; returns what `report` does."""
  begin, row = time.monotonic(), {}
  every = run.task.compare_masks_every
  shown = ('train_loss', f'test_{binary.metric(run.values)}')
  with (checkpointing.PreemptionGuard() as guard,
        open_checkpoints(run, guard) as checkpoints):
    state, start = first_state(run, checkpoints)
    model = report.followed(run) if run.values['effective_sparsity'] else None
    with (contextlib.closing(run.train_batches(start)) as batches,
          reporting.open_writers(run.workdir, start + 1) as writers,
          reporting.Progress(run.train_steps, start, run.values['log_every'],
                             *reversed(run.units)) as progress):
      for step in range(start + 1, run.train_steps + 1):
        state = run.step_fn(state, devices.put_batch(next(batches), run.mesh))
        row = measure(run, state, step, model)
        if every and (step % every == 0 or step == run.train_steps):
          state, change = run.compare_fn(state)
          row |= {name: float(value) for name, value in change.items()}
        if row:
          writers.write_scalars(step, row)
        progress.update(step, **{name: row[name] for name in shown
                                 if name in row})
        checkpoints.save(step, state, force=step == run.train_steps)
        if checkpoints.reached_preemption(step):
          stop(run, checkpoints, state, step)
  final = row or evaluate(run, state)
  return report.report(binary, run, state, model, {
      name: value for name, value in final.items() if name.startswith('test_')
  } | {'seconds_this_session': time.monotonic() - begin})


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


def open_checkpoints(run: Run, guard) -> checkpointing.Checkpoints:
  """The checkpoints of a run, by default one with each evaluation."""
  with _naming_workdir(run.workdir):
    return checkpointing.Checkpoints(
        _checkpoints_of(run), config=_config(run), free=_FREE, guard=guard,
        save_every=run_flags.steps_between('checkpoint', run.values))


def first_state(run: Run, checkpoints) -> tuple[TrainState, int]:
  """The newest checkpoint's state and step; at first, the initial ones."""
  with _naming_workdir(run.workdir):
    restored = checkpoints.restore_latest(run.init.out_info)
  if restored is not None:
    print(f'continues {run.workdir} after step {restored[1]}', flush=True)
    _say_if_rounded(checkpoints.config, _config(run))
    return restored
  options = FAST_COMPILE if jax.default_backend() == 'cpu' else None
  return run.init.lower().compile(compiler_options=options)(), 0


def _say_if_rounded(stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
  """Warns that sums over other devices are added in another order."""
  names = ('devices', 'model_parallel')
  then = {name: stored.get(name, now[name]) for name in names}
  if then != {name: now[name] for name in names}:
    logging.warning(
        'This run began on %s devices (model_parallel %s) and goes on on %s '
        '(%s): it equals an undisturbed one to rounding, not bit for bit.',
        *then.values(), *(now[name] for name in names))


def last_state(run: Run) -> TrainState:
  """The newest checkpoint's state; a ValueError if there is none."""
  with open_checkpoints(run, None) as checkpoints, _naming_workdir(run.workdir):
    restored = checkpoints.restore_latest(run.init.out_info)
  if restored is None:
    raise ValueError(f'`workdir` (={run.workdir!r}) has no checkpoint.')
  return restored[0]


@contextlib.contextmanager
def _naming_workdir(workdir: str):
  """Says which flag led to checkpoints that cannot be used."""
  try:
    yield
  except jax.errors.JaxRuntimeError:  # Of a device, or of another process.
    raise
  except RuntimeError as error:
    raise ValueError(f'`workdir` (={workdir!r}): {error}') from error


def measure(run: Run, state: TrainState, step: int, model=None
            ) -> dict[str, float]:
  """What is due to be written down after a step; mostly nothing."""
  due = {name for name in ('log', 'eval', 'checkpoint')
         if step % run_flags.steps_between(name, run.values) == 0
         or step == run.train_steps}
  row = {}
  if due & {'log', 'checkpoint'}:
    means = mean_metrics(run, state)
  if due & {'log', 'eval'}:
    row |= report.mask_metrics(report.summarize(
        run, state, model if 'eval' in due else None))
  if 'log' in due:
    row |= means
  if 'eval' in due:
    row |= evaluate(run, state)
  return row


def mean_metrics(run: Run, state: TrainState) -> dict[str, float]:
  """Means of the steps since the last row.

  Raises:
    FloatingPointError: if the loss or a parameter is not finite, before that
      can be saved.
  """
  means = _means(state.sums)
  if not (math.isfinite(means['loss']) and all_finite(state.params)):
    raise FloatingPointError(
        f'the training loss is {means["loss"]} by step {int(state.step)}, or '
        f'a parameter is not finite; what is in {run.workdir} is from before. '
        f'A smaller --learning_rate (={run.values["learning_rate"]}) may help, '
        'in another --workdir.')
  return _named('train', run.task.problem.results(means))


@jax.jit
def all_finite(tree: Any) -> jax.Array:
  """Whether no entry is infinite or NaN: the last update's loss is to come."""
  return jnp.array([jnp.isfinite(leaf).all()
                    for leaf in jax.tree.leaves(tree)]).all()


def _means(sums: Mapping[str, jax.Array]) -> dict[str, float]:
  """Each sum over that of the weights."""
  sums = {name: float(value) for name, value in jax.device_get(sums).items()}
  weight = sums.pop('weight')
  return {name: value / weight for name, value in sums.items()}


def _named(split: str, results: Mapping[str, float]) -> dict[str, float]:
  return {f'{split}_{name}': value for name, value in results.items()}


def evaluate(run: Run, state: TrainState) -> dict[str, float]:
  """The problem's results over the whole test split."""
  carry, sums = run.first_carry(), None
  for batch in run.eval_batches():
    carry, found = run.eval_fn(state, carry, devices.put_batch(batch, run.mesh))
    sums = found if sums is None else jax.tree.map(jnp.add, sums, found)
  return _named('test', run.task.problem.results(_means(sums)))


def stop(run: Run, checkpoints, state: TrainState, step: int) -> None:
  """Saves and leaves; whoever started the run may start it again."""
  mean_metrics(run, state)
  checkpoints.save(step, state, force=True)
  checkpoints.wait()
  logging.warning('Stopped by request after step %d; start again with the same '
                  'flags to continue.', step)
  sys.exit(checkpointing.REQUEUE_EXIT_CODE)


def show(binary: Binary, result: Mapping[str, Any], workdir: str) -> None:
  """Prints the table of layers and the last line."""
  if jax.process_index() == 0:
    rows = [sparse_jax.summary.Row(**layer) for layer in result['layers']]
    print(sparse_jax.Summary(tuple(rows[:-1]), rows[-1]))
    print(f'{binary.headline(result)}, sparsity {result["sparsity"]:.2%}, '
          f'{result["steps"]} steps')
    cost = result['cost']
    print(f'theoretical FLOPs of dense: {cost["training_multiplier"]:.2%} in '
          f'training, {cost["inference_multiplier"]:.2%} in inference')
    print(f'pictures and metrics: {workdir}, to show: '
          f'{os.path.join(workdir, "report.html")}', flush=True)


def main(binary: Binary, values: Callable[[], Mapping[str, Any]], argv) -> None:
  """What a program does; its statuses are those of `programs`."""
  programs.begin(argv)
  programs.say_it_once()
  with programs.errors_in_a_line():
    try:
      devices.join(flags.FLAGS.flag_values_dict())
      train(binary, values())
    except (jax.errors.JaxRuntimeError, TimeoutError) as error:
      if jax.process_count() > 1:
        _leave_the_lost(error)
      raise


def _leave_the_lost(error: Exception) -> NoReturn:
  """Ends as JAX ends a process that lost another: by SIGABRT, status 134."""
  logging.error('Process %d stops, since another one has probably died (%s); '
                'start all of them again with the same flags to continue.',
                jax.process_index(), error)
  logging.flush()
  os.abort()
