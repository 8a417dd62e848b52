"""What every input pipeline needs to serve its batches.

A process takes its rows of each batch, and a thread makes batches ahead of
whoever consumes them.
"""

from collections.abc import Iterator
import queue
import threading
from typing import Any
import weakref


def process_rows(
    batch_size: int, process_index: int, process_count: int) -> slice:
  """Returns the slice of each batch that belongs to one process.

  Args:
    batch_size: examples in a batch, over all processes.
    process_index: which process, in [0, process_count).
    process_count: how many processes there are.

  Raises:
    ValueError: if `batch_size` is no positive multiple of `process_count`, or
      `process_index` is out of its range.
  """
  if not 0 <= process_index < process_count:
    raise ValueError(
        f'process_index must be in [0, process_count={process_count}); got '
        f'{process_index}')
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(
        f'batch_size must be a positive multiple of process_count='
        f'{process_count}; got {batch_size}')
  size = batch_size // process_count
  return slice(process_index * size, (process_index + 1) * size)


def prefetch(iterator: Iterator[Any], size: int = 2) -> Iterator[Any]:
  """Runs an iterator in a thread of its own, ahead of whoever consumes it.

  Up to `size` items wait ready, while one more is in the making. An error of
  the iterator is raised where its item would have come. The thread ends, and
  the iterator is closed, when the result is exhausted, closed with `close()`,
  or no longer referred to, and at exit.

  Args:
    iterator: what to run; not to be used by anyone else from then on.
    size: items to keep ready, at least 1.

  Returns:
    An iterator of the same items in the same order.

  Raises:
    ValueError: if `size` is below 1.
  """
  if size < 1:
    raise ValueError(f'size must be at least 1; got {size}')
  return _Prefetched(iter(iterator), size)


class _Prefetched:
  """The consumer's end of `prefetch`."""

  def __init__(self, iterator, size):
    ready = queue.Queue(size)
    stop = threading.Event()
    # The thread does not know this object, which can so be collected. It is a
    # daemon because Python waits for other threads before it runs finalizers.
    thread = threading.Thread(
        target=_work, args=(iterator, ready, stop), daemon=True)
    self._ready = ready
    self._end = None
    self._finalizer = weakref.finalize(self, _stop, ready, stop, thread)
    thread.start()

  def __iter__(self):
    return self

  def __next__(self):
    if self._end is None:
      is_item, value = self._ready.get()
      if is_item:
        return value
      self.close()
      if value is not None:
        raise value
    raise StopIteration

  def close(self):
    """Stops the thread; what is left of the items is lost."""
    self._end = True
    self._finalizer()


def _work(iterator, ready, stop):
  """Puts (True, item) for each item, then (False, error or None)."""
  error = None
  try:
    for item in iterator:
      ready.put((True, item))
      if stop.is_set():
        break
  except BaseException as raised:  # Whatever it is, it is the consumer's.
    error = raised
  finally:
    if hasattr(iterator, 'close'):
      iterator.close()
  ready.put((False, error))


def _stop(ready, stop, thread):
  """Ends the thread. Once emptied, the queue has room for all it still puts."""
  stop.set()
  while thread.is_alive() and thread is not threading.current_thread():
    try:
      ready.get_nowait()
    except queue.Empty:
      thread.join(0.01)
