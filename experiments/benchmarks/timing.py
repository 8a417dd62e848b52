"""Interleaved timing: every contender runs in turn, in one process.

What disturbs the machine then disturbs all alike, and ratios of medians hold
where single times do not.
"""

from collections.abc import Callable, Mapping
import ctypes
import functools
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

  Glibc returns blocks above 32 MiB to the system at once; temporary arrays just
  above that cost fresh pages every step (a third of the step of SET in
  `step_cost`), which is no property of what is measured.
  """
  if not sys.platform.startswith('linux'):
    return
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt is not None:
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):
      mallopt(option, value)  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD.


def interleaved(contenders: Mapping[str, Callable[[], object]], *,
                rounds: int, repeats: int = 1,
                clock: Callable[[], float] = time.perf_counter
                ) -> dict[str, list[float]]:
  """Seconds of one call of each contender, by round, after one to warm up.

  `repeats` calls are averaged over within one timing. `clock` gives seconds:
  `time.process_time` adds up what all cores spend, and does not see what else
  the machine is doing.
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
  return times


def interleaved_medians(contenders, **options) -> dict[str, float]:
  """Median seconds of one call of each; `options` are `interleaved`'s."""
  return {name: statistics.median(times)
          for name, times in interleaved(contenders, **options).items()}


def training_step(loss: Callable[..., jax.Array],
                  method: sparse_jax.SparseMethod,
                  optimizer: optax.GradientTransformation):
  """(params -> state, (state, *inputs) -> state), as a user would write them.

  `loss` is of the weights that the method reads, and the inputs.
  """
  tx = sparse_jax.sparsify(optimizer, method)

  def step(state, *inputs):
    params, opt_state = state
    grads = jax.grad(sparse_jax.with_method(loss, method, opt_state))(
        params, *inputs)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  return functools.partial(sparse_jax.start, tx, method), step


def trainer(loss, method, optimizer, params: Any, *inputs
            ) -> tuple[Callable[[], Any], list[Any], Any]:
  """A function that does one such step, the state in a list, the program."""
  start, step = training_step(loss, method, optimizer)
  state = [start(jax.tree.map(jnp.copy, params))]  # A step takes its own.
  compiled = jax.jit(step, donate_argnums=0).lower(state[0], *inputs).compile()

  def run():
    state[0] = compiled(state[0], *inputs)
    return state[0]

  return run, state, compiled


def temporaries(compiled) -> float:
  """MiB that a program takes beside what it is given and returns."""
  return compiled.memory_analysis().temp_size_in_bytes / 2**20
