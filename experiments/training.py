"""The loop that every binary shares, from the first step to the last.

A binary says what is learned, as a `Problem`, and where its data come from;
`Run` puts that together with a sparse-training method and an optimizer. Killed
and started again with the same flags, a run continues bit for bit; stopped by
SIGTERM it saves first and exits with status 75. Bad flags are status 2 and
leave nothing behind.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import functools
import math
import os
import sys
import time
from typing import Any, NamedTuple

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
from experiments.tasks import Problem, Task, TrainState

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
  data: str = ''  # Tells the data from any others, where the flags do not.

  def apply(self, state: TrainState) -> tuple[Callable[..., Any], Any]:
    """(weights, inputs) -> outputs, and the shapes of inputs: for FLOPs."""
    return self.task.problem.inference(state.model_state)

  @property
  def checkpoints(self) -> dict[str, Any]:
    """Where they are, and the flags that they belong to."""
    return {'directory': os.path.join(self.workdir, 'checkpoints'),
            'free': (*run_flags.FREE, 'devices'),
            'config': {**self.values, 'data': self.data,
                       'devices': jax.device_count()}}


class Binary(NamedTuple):
  """What a program brings to the loop."""

  name: str  # Of its module.
  prepare: Callable[[Mapping[str, Any], str], Run]
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
  try:
    state = jax.eval_shape(first)
  except ValueError as error:  # The library knows the flag by its own name.
    layers = ','.join(values['dense_layers'])
    if not layers or '`is_sparse`' not in str(error):
      raise
    raise ValueError(f'`dense_layers` (={layers!r}): {error}') from error
  carry = jax.eval_shape(task.problem.first_carry)
  places = state_places(task, mesh, state)
  carried = _places(task, mesh, carry)
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
  return jax.tree.map_with_path(
      functools.partial(devices.place, mesh), state)._replace(
          model_state=_places(task, mesh, state.model_state))


def _places(task, mesh, carried):
  """Shardings of what belongs to examples: split like them."""
  return jax.tree.map(lambda leaf, axis: devices.split(mesh, axis), carried,
                      task.problem.batch_axes(carried))


def step_fn(task: Task, places: TrainState, rows: jax.sharding.Sharding):
  """(TrainState, batch) -> TrainState, jitted for a mesh."""
  return jax.jit(functools.partial(tasks.train_step, task), donate_argnums=0,
                 in_shardings=(places, rows), out_shardings=places)


def describe(without_data: Callable[..., tuple[Task, int]],
             values: Mapping[str, Any]) -> dict[str, Any]:
  """Size, length and cost of a run, from shapes alone.

  `train_steps`, `batch_size`, `learning_rate` (the highest), and what
  `accounting.forecast` says. `without_data` is that of the run's program.
  """
  task, train_steps = without_data(values)
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

  Returns what result.json holds. A ValueError or FileNotFoundError names a
  flag, before anything is written; locking.Held says that another process is at
  it.
  """
  workdir = values['workdir'] or run_flags.workdir_name(values)
  devices.check_equal(values, free=('data_dir',))
  result = devices.gather(devices.agree(
      lambda: results.finished(workdir, values, run_flags.FREE)))[0]
  if result is None:
    run = devices.agree(lambda: _ready(binary, values, workdir))
    with contextlib.ExitStack() as stack:
      # The lock of the first process is that of all.
      devices.agree(lambda: jax.process_index() or stack.enter_context(
          locking.hold(workdir)))
      stack.enter_context(files.naming(workdir))
      result = run_steps(binary, run)
  if jax.process_index() == 0:
    report.show(binary, result, workdir)
  return result


def _ready(binary: Binary, values: Mapping[str, Any], workdir: str) -> Run:
  """A run of which nothing is left to be refused; nothing is written."""
  check_workdir(workdir)
  run = binary.prepare(values, workdir)
  with _naming_workdir(workdir):
    checkpointing.check(**run.checkpoints)
  return run


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
          reporting.open_writers(run.workdir, start + 1) as write,
          reporting.progress(run.train_steps, start) as progress):
      for step in range(start + 1, run.train_steps + 1):
        state = run.step_fn(state, devices.put_batch(next(batches), run.mesh))
        row = measure(run, state, step, model)
        if every and (step % every == 0 or step == run.train_steps):
          state, change = run.compare_fn(state)
          row |= {name: float(value) for name, value in change.items()}
        if row:
          write(step, row)
          progress.set_postfix({name: row[name] for name in shown
                                if name in row}, refresh=False)
        progress.update()
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


def open_checkpoints(run: Run, guard=None) -> checkpointing.Checkpoints:
  """The checkpoints of a run, by default one with each evaluation."""
  with _naming_workdir(run.workdir):
    return checkpointing.Checkpoints(
        **run.checkpoints, guard=guard,
        save_every=run_flags.steps_between('checkpoint', run.values))


def first_state(run: Run, checkpoints) -> tuple[TrainState, int]:
  """The newest checkpoint's state and step; at first, the initial ones."""
  with _naming_workdir(run.workdir):
    restored = checkpoints.restore_latest(run.init.out_info)
  if restored is not None:
    print(f'continues {run.workdir} after step {restored[1]}', flush=True)
    names = ('devices', 'model_parallel')
    now = {name: run.checkpoints['config'][name] for name in names}
    then = {name: checkpoints.config.get(name, now[name]) for name in names}
    if then != now:  # Sums over other devices are added in another order.
      logging.warning(
          'This run began on %s devices (model_parallel %s) and goes on on %s '
          '(%s): it equals an undisturbed one to rounding, not bit for bit.',
          *then.values(), *now.values())
    return restored
  options = FAST_COMPILE if jax.default_backend() == 'cpu' else None
  return run.init.lower().compile(compiler_options=options)(), 0


def last_state(run: Run) -> TrainState:
  """The newest checkpoint's state; a ValueError if there is none."""
  with open_checkpoints(run) as checkpoints, _naming_workdir(run.workdir):
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
  means = _means(run, 'train', state.sums)
  # The loss is that before the last update.
  if not (math.isfinite(means['train_loss']) and all_finite(state.params)):
    raise FloatingPointError(
        f'the training loss is {means["train_loss"]} by step '
        f'{int(state.step)}, or a parameter is not finite; what is in '
        f'{run.workdir} is from before. A smaller --learning_rate '
        f'(={run.values["learning_rate"]}) may help, in another --workdir.')
  return means


@jax.jit
def all_finite(tree: Any) -> jax.Array:
  """Whether no entry is infinite or NaN."""
  return jnp.array([jnp.isfinite(leaf).all()
                    for leaf in jax.tree.leaves(tree)]).all()


def evaluate(run: Run, state: TrainState) -> dict[str, float]:
  """The problem's results over the whole test split."""
  carry, sums = run.first_carry(), None
  for batch in run.eval_batches():
    carry, found = run.eval_fn(state, carry, devices.put_batch(batch, run.mesh))
    sums = found if sums is None else jax.tree.map(jnp.add, sums, found)
  return _means(run, 'test', sums)


def _means(run, split, sums) -> dict[str, float]:
  """The problem's results of each sum over that of the weights."""
  sums = {name: float(value) for name, value in jax.device_get(sums).items()}
  weight = sums.pop('weight')
  found = run.task.problem.results(
      {name: value / weight for name, value in sums.items()})
  return {f'{split}_{name}': value for name, value in found.items()}


def stop(run: Run, checkpoints, state: TrainState, step: int) -> None:
  """Saves and leaves; whoever started the run may start it again."""
  mean_metrics(run, state)
  checkpoints.save(step, state, force=True)
  checkpoints.wait()
  logging.warning('Stopped by request after step %d; start again with the same '
                  'flags to continue.', step)
  sys.exit(checkpointing.REQUEUE_EXIT_CODE)


def main(binary: Binary, values: Callable[[], Mapping[str, Any]], argv) -> None:
  """What a program does; its statuses are those of `programs`."""
  programs.begin(argv)
  programs.say_it_once()
  with programs.errors_in_a_line():
    try:
      devices.join(flags.FLAGS.flag_values_dict())
      train(binary, values())
    except (jax.errors.JaxRuntimeError, TimeoutError) as error:
      if jax.process_count() == 1:
        raise
      # As JAX ends a process that lost another: by SIGABRT, status 134.
      logging.error('Process %d stops, since another one has probably died '
                    '(%s); start all of them again with the same flags to '
                    'continue.', jax.process_index(), error)
      logging.flush()
      os.abort()
