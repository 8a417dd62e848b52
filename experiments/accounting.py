"""What a run costs on paper: FLOPs and bytes, beside those of dense training.

Every binary reports these; they are arithmetic, not measurements.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax

import sparse_jax
from sparse_jax.rules import state


def figures(apply: Callable[..., Any], params: Any, inputs: Any,
            method: sparse_jax.SparseMethod, summary: sparse_jax.Summary,
            steps: int, opt_state: Any) -> dict[str, Any]:
  """FLOPs and bytes of a method, in training and inference.

  `apply` is `(weights, inputs) -> outputs` of one example, `summary` has the
  masks at the end, `opt_state` budgets that moved between leaves. A method
  whose sparsity is an outcome states no work; its densities at the end count
  instead.

  Returns:
    `flops`: multiply-adds of one dense forward pass; `inference_multiplier` and
    `training_multiplier`: fractions of the dense ones (SWAT's convention);
    `training_multiplier_rigl`: in RigL's; `theoretical_speedup`: of training,
    if time followed multiply-adds; `weight_bytes`, `dense_weight_bytes`: of
    what inference reads, with a bit for each entry of a mask.
  """
  shapes = jax.eval_shape(lambda tree: tree, params)
  at_end = {row.path: state.Work(row.forward_density, row.forward_density,
                                 row.backward_density)
            for row in summary.rows if row.sparse}
  counts = [sparse_jax.cost.count_flops(apply, shapes, inputs,
                                        convention=convention)
            for convention in ('multiply_adds', 'rigl')]
  ours, rigl = (sparse_jax.cost.training_cost(
      count, method if method.work else at_end, steps=steps, state=opt_state)
                for count in counts)
  inference = sparse_jax.cost.training_cost(counts[0], at_end)
  stored = {path: work.forward for path, work in at_end.items()}
  return {
      'flops': ours.dense.forward,
      'inference_multiplier': inference.forward_multiplier,
      'training_multiplier': ours.multiplier,
      'training_multiplier_rigl': rigl.multiplier,
      'theoretical_speedup': ours.theoretical_speedup,
      'weight_bytes': _bytes(shapes, stored),
      'dense_weight_bytes': _bytes(shapes, {})}


def forecast(loss: Callable[..., Any], state: Any, one: Any, two: Any,
             method: sparse_jax.SparseMethod, *, batch_size: int, steps: int
             ) -> dict[str, float]:
  """What a run will need, from shapes alone: before anyone pays for it.

  `loss` is `(weights, *inputs) -> loss`, `one` and `two` are the inputs of a
  batch of so many examples.

  Returns:
    `parameters`; `training_flops`, multiply-adds of the whole run if nothing
    that is zero is computed; as dense arrays `weight_bytes`, `optimizer_bytes`
    (with masks) and `activation_bytes` (saved for the backward pass).
  """
  weights = jax.eval_shape(functools.partial(sparse_jax.dense_weights, method),
                           state.params, state.opt_state)
  flops = sparse_jax.cost.count_flops(loss, weights, *one)
  cost = sparse_jax.cost.training_cost(flops, method if method.work else {},
                                       steps=steps)
  first, second = (sparse_jax.cost.memory_cost(loss, weights, *inputs)
                   for inputs in (one, two))
  each = second.saved_activations - first.saved_activations
  return {
      'parameters': sum(leaf.size for leaf in jax.tree.leaves(weights)),
      'training_flops': cost.sparse.total * batch_size * steps,
      'weight_bytes': first.weights,
      'optimizer_bytes': _size(state.opt_state),
      'activation_bytes': first.saved_activations + (batch_size - 1) * each}


def held(weights: Any, params: Any, opt_state: Any, optimizer: Any
         ) -> dict[str, int]:
  """Bytes that training holds from step to step, beside those of dense.

  `weights` are shapes of the dense weights, `optimizer` is that inside
  `sparsify`. A packed method's reservoir is in host memory.
  """
  packed = sparse_jax.get_state(opt_state).packed.values()
  host = _size([place.reservoir for place in packed])
  return {'params_bytes': _size(params),
          'slots_bytes': _size(opt_state) - host, 'host_bytes': host,
          'dense_params_bytes': _size(weights),
          'dense_slots_bytes': _size(jax.eval_shape(optimizer.init, weights))}


def _size(tree) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _bytes(shapes, stored) -> int:
  """Bytes of weights, those of `stored` as kept values and a bit an entry."""
  return sparse_jax.cost.memory_cost(lambda params: params, shapes,
                                     stored=stored).weights
