"""One step of training, as pure functions of a state and a batch.

What is learned is a `Problem`, how is a sparse-training method and an
optimizer: both together are a `Task`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sparse_jax
from experiments import mask_comparison


class Problem:
  """What is learned; a frozen dataclass, so that equal settings are equal.

  `carry` is what an evaluation hands from one batch to the next (the memory of
  a recurrent network), `model_state` what training hands from step to step.
  """

  metrics: ClassVar[tuple[str, ...]] = ()  # What `loss` reports besides itself.

  def init(self, key: jax.Array) -> tuple[Any, Any]:
    """The model's parameters and its state."""

  def loss(self, weights, model_state, batch, key):
    """The loss, and (the new model state, a dict of metrics)."""

  def log_probabilities(self, weights, model_state, batch, key):
    """float[..., classes] of what is predicted: a teacher's word."""

  def first_carry(self) -> Any:
    """What the first batch of an evaluation is given; by default nothing."""
    return {}

  def score(self, weights, model_state, carry, batch):
    """The next carry, and a dict of sums over a batch: as `loss`, `weight`."""

  def batch_axes(self, carried: Any) -> Any:
    """For each leaf of a model state or carry, its axis of examples, or -1."""
    return jax.tree.map(lambda _: -1, carried)

  def examples(self, size: int) -> tuple[Any, Any]:
    """A model state and a batch of so many examples, as shapes."""

  def inference(self, model_state) -> tuple[Any, Any]:
    """(weights, inputs) -> the prediction, and the shapes of one example."""

  def results(self, means: Mapping[str, float]) -> dict[str, float]:
    """What is reported of the means of the loss and the metrics."""
    return dict(means)


class TrainState(NamedTuple):
  """Everything that a continued run needs; the data order is in the step."""

  step: jax.Array  # int32[], updates done.
  params: Any  # As the optimizer holds them.
  model_state: Any  # Batch statistics, or a memory; may be empty.
  opt_state: Any  # Holds the masks as well.
  thresholds: Any  # Of sparse operands with a period; may be empty.
  key: jax.Array  # A typed key, for dropout.
  masks: Any  # As last compared; empty without --compare_masks_every.
  sums: Any  # Dict of float32[] since the last row: loss, metrics, weight.


class Task(NamedTuple):
  """What is learned, and how."""

  problem: Problem
  method: sparse_jax.SparseMethod
  tx: optax.GradientTransformation
  operator_options: Mapping[str, Any]
  operand_period: int
  log_every: int
  compare_masks_every: int


def init_state(task: Task, seed: int) -> TrainState:
  """The state before the first step."""
  init_key, key = jax.random.split(jax.random.key(seed))
  params, model_state = task.problem.init(init_key)
  params, opt_state = sparse_jax.start(task.tx, task.method, params)
  thresholds = {} if task.operand_period == 1 else (
      sparse_jax.operators.first_operator_thresholds(task.method, params,
                                                     opt_state))
  sums = {name: jnp.zeros(()) for name in ('loss', *task.problem.metrics,
                                           'weight')}
  masks = (mask_comparison.first(opt_state) if task.compare_masks_every
           else {})
  return TrainState(jnp.zeros((), jnp.int32), params, model_state, opt_state,
                    thresholds, key, masks, sums)


def apply_method(fn, task: Task, state: TrainState, params, thresholds,
                 due=False):
  """fn(weights), weights and products being those of the task's method."""
  return sparse_jax.with_method(
      fn, task.method, state.opt_state, thresholds=thresholds or None,
      due=due & (state.step % task.operand_period == 0),
      **task.operator_options)(params)


def loss_fn(params, thresholds, task: Task, state: TrainState, batch):
  """The problem's loss as the method lets it be computed."""
  key = jax.random.fold_in(state.key, state.step)
  return apply_method(
      lambda weights: task.problem.loss(weights, state.model_state, batch, key),
      task, state, params, thresholds, due=True)


def train_step(task: Task, state: TrainState, batch) -> TrainState:
  """One update."""
  # The gradient of a threshold is the threshold for the next step.
  (loss, (model_state, metrics)), (grads, thresholds) = jax.value_and_grad(
      loss_fn, (0, 1), has_aux=True)(state.params, state.thresholds, task,
                                     state, batch)
  updates, opt_state = task.tx.update(
      grads, state.opt_state, state.params, grad_fn=lambda params: jax.grad(
          loss_fn, has_aux=True)(params, state.thresholds, task, state,
                                 batch)[0])
  params = optax.apply_updates(state.params, updates)
  # In the state, so that a run stopped between two rows continues its sums.
  begins = state.step % task.log_every == 0
  sums = jax.tree.map(lambda old, new: jnp.where(begins, 0., old) + new,
                      state.sums, {'loss': loss, 'weight': 1.} | metrics)
  return TrainState(state.step + 1, params, model_state, opt_state, thresholds,
                    state.key, state.masks, sums)


def compare_masks(state: TrainState) -> tuple[TrainState, dict[str, jax.Array]]:
  """How the masks differ from those last noted, and a note of these."""
  change = mask_comparison.change(state.masks, state.opt_state)
  masks = mask_comparison.renewed(state.masks, state.opt_state)
  return state._replace(masks=masks), change


def eval_step(task: Task, state: TrainState, carry, batch):
  """The next carry, and the sums of one batch."""
  return apply_method(
      lambda weights: task.problem.score(weights, state.model_state, carry,
                                         batch),
      task, state, state.params, state.thresholds)
