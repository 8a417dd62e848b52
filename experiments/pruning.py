"""Networks to set beside those pruned in one shot: tuned, distilled, pruned in
rounds, or trained sparse.
"""

import contextlib
import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sparse_jax
from sparse_jax import trees
from experiments import devices
from experiments import optimization
from experiments import reporting
from experiments import tasks
from experiments import training

ROUND = .2  # What a round of iterative pruning takes of what is left.


def fine_tune(run: training.Run, state: tasks.TrainState, masks, *,
              begin: int, steps: int, learning_rate: float, teacher=None,
              distill: float = 0.) -> tasks.TrainState:
  """Trains on at a constant rate; what is zero stays zero.

  After `begin` of the run's batches come `steps`. `masks` are those of the
  leaves that have zeros, `teacher` the parameters of the dense network,
  `distill` its share of the loss.
  """
  task = with_masks(run.task, optimization.make(
      {**run.values, 'warmup_share': 0., 'lr_schedule': 'constant',
       'learning_rate': learning_rate}, steps), masks)

  def step(teacher, state, batch):
    problem = task.problem if teacher is None else Distilled(
        task.problem, teacher, distill)
    return tasks.train_step(task._replace(problem=problem), state, batch)

  step = functools.partial(jax.jit(step, donate_argnums=1),
                           teacher if distill else None)
  tuned = train_on(run, step, begun(run, task, state), begin, begin + steps)
  return state._replace(params=tuned.params, model_state=tuned.model_state)


class Distilled(NamedTuple):
  """A problem whose loss is in part the divergence from a teacher's outputs."""

  problem: tasks.Problem
  teacher: Any  # Parameters of the same model.
  share: float

  @property
  def metrics(self):
    return self.problem.metrics

  def loss(self, weights, model_state, batch, key):
    """(1 - share) of the problem's loss, and share of KL(teacher, student)."""
    loss, rest = self.problem.loss(weights, model_state, batch, key)
    outputs, wanted = (self.problem.log_probabilities(
        tree, model_state, batch, key) for tree in (weights, self.teacher))
    divergence = optax.losses.kl_divergence_with_log_targets(
        outputs, wanted).mean()
    return (1 - self.share) * loss + self.share * divergence, rest


def with_masks(task: tasks.Task, tx, masks) -> tasks.Task:
  """The task, keeping to these masks."""
  method = (sparse_jax.fixed(masks) if jax.tree.leaves(masks)
            else sparse_jax.dense())
  return task._replace(method=method, tx=sparse_jax.sparsify(tx, method))


def begun(run: training.Run, task: tasks.Task, state: tasks.TrainState
          ) -> tasks.TrainState:
  """The state with fresh slots, in arrays of its own: steps take theirs."""
  params, opt_state = sparse_jax.start(task.tx, task.method, state.params)
  state = state._replace(params=params, opt_state=opt_state)
  places = jax.tree.map_with_path(functools.partial(devices.place, run.mesh),
                                  state)
  return jax.device_put(jax.tree.map(jnp.copy, state), places)


def train_on(run: training.Run, step_fn, state: tasks.TrainState, begin: int,
             end: int) -> tasks.TrainState:
  """The state after the batches from `begin` to `end` of the run's data."""
  with (contextlib.closing(run.train_batches(begin)) as batches,
        reporting.progress(end, begin) as progress):
    for _ in range(begin, end):
      state = step_fn(state, devices.put_batch(next(batches), run.mesh))
      # On CPU devices that share few cores, steps in flight together can each
      # wait for a part of another.
      jax.block_until_ready(state)
      progress.update()
  return state


def trained(binary: training.Binary, run: training.Run, method: str,
            sparsity: float, leaves, pattern: str | None) -> Any:
  """The weights of a run of the same length that is sparse by a method."""
  paths = trees.leaves_by_path(run.init.out_info.params)
  values = {**run.values, 'method': method, 'sparsity': sparsity,
            'dense_layers': [f'^{re.escape(path)}$' for path in paths
                             if path not in leaves]}
  if pattern is not None:
    values |= {'structure': 'nm', 'nm': pattern.split(':')}
  other = binary.prepare(values, run.workdir)
  state = train_on(other, other.step_fn, first_state(other), 0,
                   other.train_steps)
  return sparse_jax.dense_weights(other.task.method, state.params,
                                  state.opt_state)


def ticket(run: training.Run, params, sparsity: float, leaves, structure,
           rewind_to: int) -> tuple[Any, int]:
  """The weights that iterative magnitude pruning ends with, and all its steps.

  Each round prunes `ROUND` of what is left of each leaf (N of M in one round),
  returns the rest to its values at `rewind_to` and trains to the end by the
  run's own schedule (Frankle et al., 2019, arXiv:1903.01611).
  """
  rounds = 1 if isinstance(structure, sparse_jax.NM) else max(
      math.ceil(math.log(1 - sparsity) / math.log(1 - ROUND) - 1e-9), 1)
  early = train_on(run, run.step_fn, first_state(run), 0, rewind_to)
  for index in range(rounds):
    share = 1 - (1 - sparsity)**((index + 1) / rounds)
    masks = trees.map_leaves(
        lambda path, leaf: sparse_jax.make_mask(
            jnp.abs(leaf), share, structure=structure)
        if path in leaves else None, params)
    task = with_masks(run.task, optimization.make(run.values, run.train_steps),
                      masks)
    first = begun(run, task, early)
    first = first._replace(opt_state=first.opt_state._replace(
        inner=jax.tree.map(jnp.copy, early.opt_state.inner)))
    step = jax.jit(functools.partial(tasks.train_step, task), donate_argnums=0)
    params = train_on(run, step, first, rewind_to, run.train_steps).params
  return params, run.train_steps + rounds * (run.train_steps - rewind_to)


def first_state(run: training.Run) -> tasks.TrainState:
  """What the run began with, bit for bit."""
  return run.init.lower().compile()()
