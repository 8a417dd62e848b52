"""Interleaved timing: every contender runs in turn, in one process.

What disturbs the machine then disturbs all alike, and ratios of medians hold
where single times do not.
"""

from collections.abc import Callable, Mapping, Sequence
import ctypes
import functools
import random
import statistics
import sys
import time
from typing import Any

import flax.linen as nn
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

  `repeats` calls are averaged over within one timing. With the clock
  `time.process_time` they are seconds of processors, which other programs that
  run take less from.
  """
  for run in contenders.values():
    jax.block_until_ready(run())
  times = {name: [] for name in contenders}
  order, draw = list(contenders.items()), random.Random(0)
  for _ in range(rounds):
    draw.shuffle(order)  # Each leaves caches to the next.
    for name, run in order:
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


class TransformerLayer(nn.Module):
  """Attention and a network, of Flax's own parts, that know of no packing."""

  dtype: jax.typing.DTypeLike = jnp.float32
  heads: int = 8

  @nn.compact
  def __call__(self, x, _=None):
    width, norm, dense = x.shape[-1], *(functools.partial(
        layer, dtype=self.dtype) for layer in (nn.LayerNorm, nn.Dense))
    y = norm()(x)
    x = x + nn.MultiHeadDotProductAttention(
        num_heads=self.heads, dtype=self.dtype)(y, y)
    y = nn.gelu(dense(4 * width)(norm()(x)))
    return x + dense(width)(y), None


def methods(every: Mapping[str, int], **options
            ) -> dict[str, sparse_jax.SparseMethod]:
  """What is timed at 90%, `every` saying how often masks move."""
  return {
      'dense': sparse_jax.dense(), 'static': sparse_jax.static(.9, **options),
      'gmp': sparse_jax.gmp(.9, update_end=10**6, **every, **options),
      'top_kast': sparse_jax.top_kast(.9, backward_sparsity=.8, **every,
                                      **options),
      'set': sparse_jax.set_(.9, **every, **options),
      'rigl': sparse_jax.rigl(.9, **every, **options)}


def chosen(rows: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
  """The named ones beside the dense one; all if no name is given."""
  return {name: row for name, row in rows.items()
          if name == 'dense' or not names or name in names}


def forward_and_both(multiply):
  """A product, and the product with both gradients: of x, a weight, dy."""
  def both(x, weight, dy):
    y, vjp = jax.vjp(multiply, x, weight)
    grad_x, grad = vjp(dy)
    return y, grad_x, getattr(grad, 'blocks', grad)

  return lambda x, weight, dy: multiply(x, weight), both


def training_step(loss: Callable[..., jax.Array],
                  method: sparse_jax.SparseMethod,
                  optimizer: optax.GradientTransformation, *,
                  bound_grown: bool = True, **options):
  """(params -> state, (state, *inputs) -> state), as a user would write them.

  `loss` is of the weights that the method reads, and the inputs; `bound_grown`
  is that of `sparsify`, the options are those of `with_method`.
  """
  tx = sparse_jax.sparsify(optimizer, method, bound_grown=bound_grown)

  def step(state, *inputs):
    params, opt_state = state
    read = sparse_jax.with_method(loss, method, opt_state, **options)
    grads = jax.grad(read)(params, *inputs)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  return functools.partial(sparse_jax.start, tx, method), step


def trainer(loss, method, optimizer, params: Any, *inputs
            ) -> tuple[Callable[[], Any], list[Any], Any]:
  """A function that does one such step, the state in a list, the program."""
  return runner(*training_step(loss, method, optimizer), params, *inputs)


def runner(start: Callable[[Any], Any], step: Callable[..., Any], params: Any,
           *inputs) -> tuple[Callable[[], Any], list[Any], Any]:
  """As `trainer`, of a step and its first state as `training_step` has them."""
  state = [start(jax.tree.map(jnp.copy, params))]  # A step takes its own.
  compiled = jax.jit(step, donate_argnums=0).lower(state[0], *inputs).compile()

  def run():
    state[0] = compiled(state[0], *inputs)
    return state[0]

  return run, state, compiled


def temporaries(compiled) -> float:
  """MiB that a program takes beside what it is given and returns."""
  return compiled.memory_analysis().temp_size_in_bytes / 2**20
