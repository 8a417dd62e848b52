"""Interleaved timing: every contender runs in turn, in one process.

What disturbs the machine then disturbs all alike, and ratios of medians hold
where single times do not.
"""

from collections.abc import Callable, Mapping
import ctypes
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

import sparse_jax


def keep_freed_memory() -> None:
  """Tells the C library's allocator to keep what XLA frees. Call it first.

  Glibc returns blocks above 32 MiB to the system at once. A program whose
  temporary arrays are just above that pays for fresh pages every step (4,700
  page faults, a third of the step, of SET in `step_cost`), one just below
  does not: that is no property of what is measured. Elsewhere this does
  nothing.
  """
  if not sys.platform.startswith('linux'):
    return
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt is not None:
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):
      mallopt(option, value)  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD.


def interleaved_medians(contenders: Mapping[str, Callable[[], object]], *,
                        rounds: int, repeats: int = 1,
                        clock: Callable[[], float] = time.perf_counter
                        ) -> dict[str, float]:
  """Median seconds of one call of each contender.

  Args:
    contenders: `{name: function}`; each is called once to warm up.
    rounds: how many times each is timed.
    repeats: calls within one timing, to average over.
    clock: in seconds. `time.process_time` adds up what all cores spend, and
      does not see what else the machine is doing.
  """
  for run in contenders.values():
    jax.block_until_ready(run())
  times = {name: [] for name in contenders}
  for _ in range(rounds):
    for name, run in contenders.items():
      begin = clock()
      for _ in range(repeats):
        result = run()
      jax.block_until_ready(result)
      times[name].append((clock() - begin) / repeats)
  return {name: statistics.median(ts) for name, ts in times.items()}


def trainer(loss: Callable[[Any], jax.Array], method: sparse_jax.SparseMethod,
            optimizer: optax.GradientTransformation, params: Any
            ) -> tuple[Callable[[], Any], list[Any]]:
  """A function that does one step of training, and the state it keeps.

  Args:
    loss: of the weights that the method reads.
    method: what is trained with.
    optimizer: likewise.
    params: the model's, which are copied, since a step takes its own.
  """
  tx = sparse_jax.sparsify(optimizer, method)
  state = list(sparse_jax.start(tx, method, jax.tree.map(jnp.copy, params)))

  def step(params, opt_state):
    grads = jax.grad(sparse_jax.with_method(loss, method, opt_state))(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*state).compile()

  def run():
    state[:] = compiled(*state)
    return state

  return run, state
