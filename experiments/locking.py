"""One process at a time in a folder: a lock that dies with its process.

The lock is the kernel's (flock) on a file `lock` in the folder. A killed
process leaves the file and no lock, so nothing stale ever blocks a start. Over
NFS it holds between hosts where the mount has locks (not `nolock`), over
Lustre with `-o flock`. Where a file system has none, as a storage bucket
mounted as a folder, a warning says so and nothing is held: there, start a run
from one machine alone.
"""

from collections.abc import Iterator
import contextlib
import errno
import fcntl
import os
import socket

from absl import logging

NAME = 'lock'
# The status of a process that finds its run under way elsewhere.
EXIT_CODE = 76
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


class Held(Exception):
  """Another process holds the lock."""


@contextlib.contextmanager
def hold(folder: str) -> Iterator[None]:
  """Holds a folder, made if absent, for the length of the block.

  Raises:
    Held: if another process holds it, naming the folder and the process.
    OSError: if the lock cannot be opened: it is a link, or not ours to write.
  """
  try:
    handle = acquire(os.path.join(folder, NAME))
  except Held as error:
    raise Held(f'`workdir` (={folder!r}): {error} is at this run, which goes '
               'on there.') from None
  try:
    yield
  finally:
    os.close(handle)


def acquire(path: str) -> int:
  """The open file of a lock, which holds until every copy is closed."""
  os.makedirs(os.path.dirname(path), exist_ok=True)
  handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    owner = os.pread(handle, 200, 0).decode(errors='replace')
    os.close(handle)
    raise Held(owner or 'another process') from None
  except OSError as error:
    if error.errno not in _NO_LOCKS:
      os.close(handle)
      raise
    logging.warning('%s has no locks (%s): start what lies there only once.',
                    os.path.dirname(path), error.strerror)
  os.ftruncate(handle, 0)
  os.pwrite(handle, f'process {os.getpid()} of {socket.gethostname()}'.encode(),
            0)
  return handle
