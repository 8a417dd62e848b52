"""What every input pipeline needs to serve its batches.

A process takes its rows of each batch, and a thread makes batches ahead of
whoever consumes them.
"""

import collections
from collections.abc import Iterator
from concurrent import futures
import sys
from typing import Any


def process_rows(
    batch_size: int, process_index: int, process_count: int) -> slice:
  """The slice of each batch that belongs to one process."""
  size = batch_size // process_count
  return slice(process_index * size, (process_index + 1) * size)


def prefetch(iterator: Iterator[Any], size: int = 2) -> Iterator[Any]:
  """Runs an iterator in a thread of its own, ahead of whoever consumes it.

  Up to `size` items wait ready, while one more is in the making. An error of
  the iterator is raised where its item would have come. The thread ends, and
  the iterator is closed, when the result is exhausted, closed with `close()`,
  or no longer referred to, and at exit.
  """
  end, at_exit = object(), sys.is_finalizing  # Globals are gone by then.
  pool, waiting = futures.ThreadPoolExecutor(1), collections.deque()
  try:
    waiting.extend(pool.submit(next, iterator, end) for _ in range(size + 1))
    while (item := waiting.popleft().result()) is not end:
      waiting.append(pool.submit(next, iterator, end))
      yield item
  finally:
    if not at_exit():
      for item in waiting:
        item.cancel()
      pool.shutdown()
      if hasattr(iterator, 'close'):
        iterator.close()
