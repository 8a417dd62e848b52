"""Interleaved timing: every contender runs in turn, in one process.

What disturbs the machine then disturbs all alike, and ratios of medians hold
where single times do not.
"""

from collections.abc import Callable
from collections.abc import Mapping
import statistics
import time

import jax


def interleaved_medians(contenders: Mapping[str, Callable[[], object]], *,
                        rounds: int, repeats: int = 1) -> dict[str, float]:
  """Median seconds of one call of each contender.

  Args:
    contenders: `{name: function}`; each is called once to warm up.
    rounds: how many times each is timed.
    repeats: calls within one timing, to average over.
  """
  for run in contenders.values():
    jax.block_until_ready(run())
  times = {name: [] for name in contenders}
  for _ in range(rounds):
    for name, run in contenders.items():
      begin = time.perf_counter()
      for _ in range(repeats):
        result = run()
      jax.block_until_ready(result)
      times[name].append((time.perf_counter() - begin) / repeats)
  return {name: statistics.median(ts) for name, ts in times.items()}
