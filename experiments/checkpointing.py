"""Saving a run so that a killed and resumed run equals an unbroken one.

A checkpoint named N holds the state after N steps. It is written in the
background, appears on disk all at once or not at all, and lies beside
`config.json`, the flags of the run it belongs to. Leaves are jax.Arrays, typed
keys included. With several processes they must be global arrays (make the whole
state under one jit with out_shardings), all processes call every method, and
the directory is one they all see.
"""

from collections.abc import Callable, Mapping, Sequence
import concurrent.futures
import contextlib
import json
import os
import pathlib
import signal
from typing import Any
import zlib

from absl import logging
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from experiments import files

# EX_TEMPFAIL of sysexits.h: "try again later". A launcher requeues on it.
REQUEUE_EXIT_CODE = 75

_KEPT = 2  # Checkpoints on disk, the newest.
_CONFIG = 'config.json'
_NAMED = 5  # A mismatch names this many leaves of each kind.


class PreemptionGuard(contextlib.AbstractContextManager):
  """Notes a SIGTERM instead of dying of it, so that a loop can save and leave.

  Once jax.distributed is initialized JAX watches for SIGTERM itself, to agree
  among processes on the step to stop at; the guard then stays out of the way,
  and `Checkpoints.reached_preemption` gives JAX's answer.
  """

  requested = False  # Whether a SIGTERM came while the guard was in force.
  _previous = None

  def __enter__(self) -> 'PreemptionGuard':
    if not jax.distributed.is_initialized():
      self._previous = signal.signal(
          signal.SIGTERM, lambda *_: setattr(self, 'requested', True))
    return self

  def __exit__(self, *exc_info):
    if self._previous is not None:
      signal.signal(signal.SIGTERM, self._previous)


def abstract(state: Any) -> Any:
  """A tree of arrays with shardings, or of their shapes, as the latter."""
  def shape(path, leaf):
    name = jax.tree_util.keystr(path)
    if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
      raise ValueError(f'leaf {name} (={leaf!r}) must be a jax.Array')
    if leaf.sharding is None:
      raise ValueError(f'leaf {name} (={leaf!r}) must have a sharding')
    # A key array has no weak_type.
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding,
                                weak_type=getattr(leaf, 'weak_type', False))
  return jax.tree.map_with_path(shape, state)


def check(directory: str | os.PathLike, *, config: Mapping[str, Any],
          free: Sequence[str] = ()) -> None:
  """Raises what `Checkpoints` would for another run; writes nothing."""
  _read_config(pathlib.Path(os.path.abspath(directory)), config, free)


class Checkpoints(contextlib.AbstractContextManager):
  """The checkpoints of one run, in a directory that is new or the same run's.

  `config` are the run's flags, of which those in `free` may differ from the
  stored ones; the stored file stays as the run's first process wrote it.

  Raises:
    ValueError: if the stored config differs, naming each flag and both values.
    RuntimeError: if the directory holds files but no config that can be read.
      Nothing in it has then been touched.
  """

  def __init__(self, directory: str | os.PathLike, *, save_every: int,
               config: Mapping[str, Any], free: Sequence[str] = (),
               guard: PreemptionGuard | None = None):
    import orbax.checkpoint as ocp
    self._ocp = ocp
    self.directory = pathlib.Path(os.path.abspath(directory))
    self.config = _enter(self.directory, config, free)  # As it is stored.
    self._save_every, self._guard = save_every, guard
    self._pending = None  # The step now being written.
    self._unreadable = []  # Steps in the way of what will be saved.
    self._manager = ocp.CheckpointManager(
        self.directory, options=ocp.CheckpointManagerOptions(
            max_to_keep=_KEPT, cleanup_tmp_directories=True,
            # Else a disk too full for a directory leaves threads behind that
            # hold up the exit of the process for five minutes.
            async_options=ocp.AsyncOptions(
                create_directories_asynchronously=False)))

  def __exit__(self, *exc_info):
    self.close()

  def restore_latest(self, target: Any) -> tuple[Any, int] | None:
    """Reads the newest checkpoint that can be read, and its step; None of none.

    One that cannot be is passed over with a warning and stays on disk. Every
    leaf is compared with its checksum. The state is bit for bit the one saved,
    on the shardings of the target (a state, or `abstract` of one).

    A ValueError if a checkpoint has other leaves, shapes or dtypes; a
    RuntimeError if there are some and none can be read.
    """
    self.wait()
    target = abstract(target)
    reasons = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      state, reason = self._restore(step, target)
      if reason is None:
        self._unreadable = list(reasons)
        return state, step
      logging.warning('Checkpoint %s cannot be read, trying an older one: %s',
                      self.directory / str(step), reason)
      reasons[step] = reason
    if reasons:
      raise RuntimeError(f'directory (={self.directory}) has no checkpoint '
                         f'that can be read: {reasons}')
    return None

  def save(self, step: int, state: Any, force: bool = False) -> bool:
    """Saves the state in the background, if it is time; whether a save began.

    It is time at a multiple of `save_every`, or by `force`, unless it is the
    newest checkpoint already. The arrays may be donated once this returns.

    An OSError names the directory if this write or the one before failed; a
    ValueError says that the caller did not start from the newest checkpoint.
    """
    if self._pending is not None and not self._manager.is_saving_in_progress():
      self.wait()
    if not (force or step % self._save_every == 0):
      return False
    self.wait()
    self._make_room()
    newest = self._manager.latest_step()
    if newest is not None and step < newest:
      raise ValueError(f'step (={step}) is before the newest checkpoint '
                       f'(={newest}) in directory (={self.directory})')
    if step == newest:
      return False
    abstract(state)
    leaves = {jax.tree_util.keystr(path): {
        'shape': leaf.shape, 'dtype': str(leaf.dtype), 'crc32': checksum}
              for (path, leaf), checksum in zip(
                  jax.tree.leaves_with_path(state), _checksums(state))}
    with self._named_failure(step):
      self._manager.save(step, force=True, args=self._ocp.args.Composite(
          state=self._ocp.args.StandardSave(_without_empty(state)),
          leaves=self._ocp.args.JsonSave(leaves)))
    self._pending = step
    return True

  def wait(self):
    """Waits until it is on disk, or raises OSError naming the directory."""
    step, self._pending = self._pending, None
    if step is not None:
      with self._named_failure(step):
        self._manager.wait_until_finished()

  def close(self):
    """Waits, then releases the directory; raises what `wait` raises."""
    try:
      self.wait()
    finally:
      self._manager.close()

  def reached_preemption(self, step: int) -> bool:
    """Whether to save and leave now; the same step in all processes, which
    must ask at every step.
    """
    requested = self._guard is not None and self._guard.requested
    return requested or self._manager.reached_preemption(step)

  def _restore(self, step, target):
    """The state or the reason why not, the same in every process."""
    ocp, path = self._ocp, self.directory / str(step)
    saved, reason = _attempt(lambda: {
        name: (_describe(leaf['shape'], leaf['dtype']), leaf['crc32'])
        for name, leaf in ocp.JsonCheckpointHandler().restore(
            path / 'leaves').items()})
    if reason is not None:
      return None, reason
    _check_leaves(saved, target, path)

    def read():
      # The bare handler has no barrier, where one process could wait for
      # another that failed.
      state = ocp.StandardCheckpointHandler().restore(
          path / 'state', args=ocp.args.StandardRestore(_without_empty(target)))
      state = _with_empty(state, target)
      _check_values(saved, state)
      return jax.tree.map(_restore_weak_type, state, target)
    return _attempt(read)

  def _make_room(self):
    """Renames what could not be read, and is newer than what could, aside."""
    if self._unreadable:
      if jax.process_index() == 0:
        for step in self._unreadable:
          name, count = f'{step}.unreadable', 1
          while (self.directory / name).exists():
            name, count = f'{step}.unreadable-{count}', count + 1
          logging.warning('Renaming checkpoint %s, which could not be read, to '
                          '%s', step, name)
          (self.directory / str(step)).rename(self.directory / name)
      _sync('checkpoints renamed aside')
      self._unreadable = []
      self._manager.reload()

  @contextlib.contextmanager
  def _named_failure(self, step):
    try:
      yield
    # Of a device, or of another process.
    except (jax.errors.JaxRuntimeError, TimeoutError):
      raise
    except Exception as error:
      raise OSError(
          f'directory (={self.directory}): writing the checkpoint of step '
          f'{step} failed: {error}') from error


def _enter(path, config, free):
  """Makes the directory this run's, or checks that it is; its config."""
  stored = _read_config(path, config, free)
  # Nobody writes before everybody has looked.
  _sync('checkpoint directory looked at')
  if stored is None and jax.process_index() == 0:
    files.write_text(path / _CONFIG, json.dumps(
        dict(config), indent=2, sort_keys=True) + '\n')
  _sync('checkpoint directory entered')
  if not (path / _CONFIG).exists():
    raise RuntimeError(f'directory (={path}) must be seen by all processes: '
                       f'process {jax.process_index()} finds no {_CONFIG}')
  return stored or config


def _read_config(path, config, free):
  """The stored config, which must be this one; None if there is none yet."""
  if not path.exists():
    return None
  if not (path / _CONFIG).exists():
    # A process killed before the rename leaves only the temporary file.
    others = sorted(p.name for p in path.iterdir()
                    if not p.name.startswith(f'.{_CONFIG}.'))
    if others:
      raise RuntimeError(f'directory (={path}) holds no {_CONFIG} but other '
                         f'files: {_few(others)}')
    return None
  try:
    stored = json.loads((path / _CONFIG).read_text())
  except ValueError as error:
    raise RuntimeError(f'{path / _CONFIG} is not JSON: {error}') from error
  config = json.loads(json.dumps(dict(config)))  # Tuples become lists.
  both = {name: (stored.get(name, '(absent)'), config.get(name, '(absent)'))
          for name in sorted((stored.keys() | config.keys()) - set(free))}
  lines = [f'{name}: {old!r} stored, {new!r} now'
           for name, (old, new) in both.items() if old != new]
  if lines:
    raise ValueError(f'directory (={path}) belongs to a run with another '
                     'config:\n  ' + '\n  '.join(lines))
  return stored


def _described(tree):
  """{path: dtype and shape} of a tree, in its order."""
  return {jax.tree_util.keystr(path): _describe(leaf.shape, leaf.dtype)
          for path, leaf in jax.tree.leaves_with_path(tree)}


def _describe(shape, dtype):
  return f'{dtype}[{",".join(map(str, shape))}]'


def _check_leaves(saved, target, path):
  """Raises unless both have the same leaves; Orbax would cast silently."""
  wanted = _described(target)
  missing = [name for name in wanted if name not in saved]
  unexpected = [name for name in saved if name not in wanted]
  if missing or unexpected:
    raise ValueError(f'checkpoint {path} is of another tree than the target: '
                     f'the target has {_few(missing)} that it lacks, it has '
                     f'{_few(unexpected)} that the target lacks')
  lines = [f'{name}: {saved[name][0]} saved, {wanted[name]} wanted'
           for name in wanted if saved[name][0] != wanted[name]]
  if lines:
    raise ValueError(f'checkpoint {path} differs from the target in '
                     f'{len(lines)} leaves:\n  ' + '\n  '.join(lines[:_NAMED]))


def _check_values(saved, state):
  """Raises unless each leaf has the bytes that were saved.

  TensorStore notices a file cut short, but not a flipped bit, and Orbax reads
  a typed key as plain integers if one of its small files is gone.
  """
  for (name, described), checksum in zip(_described(state).items(),
                                         _checksums(state)):
    if described != saved[name][0]:
      raise RuntimeError(f'leaf {name} was read as {described}')
    if None not in (checksum, saved[name][1]) and checksum != saved[name][1]:
      raise RuntimeError(f'leaf {name} fails its checksum')


def _checksums(state):
  """CRC-32 of each leaf, None of one that no process holds as a whole."""
  def checksum(leaf):
    if leaf is not None:
      flat = np.ascontiguousarray(np.asarray(leaf)).reshape(-1)
      return zlib.crc32(flat.view(np.uint8))  # Half a second for 1 GB.
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    return list(pool.map(checksum, map(_whole, jax.tree.leaves(state))))


def _whole(x):
  """The array as one this process can read, or None."""
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if x.is_fully_addressable:
    return x
  return x.addressable_data(0) if x.is_fully_replicated else None


def _restore_weak_type(x, target):
  """Makes a scalar weakly typed again, lest dtype promotion change.

  Only scalars: JAX has no way to make a weakly typed array of given values.
  """
  if not target.weak_type or x.ndim:
    return x
  value = np.asarray(_whole(x)).item()
  weak = jax.jit(lambda y: y, out_shardings=target.sharding)(value)
  return weak if weak.dtype == x.dtype else x


def _without_empty(state):
  """Orbax refuses arrays without entries: they are left out and made anew."""
  return jax.tree.map(lambda x: x if x.size else None, state)


def _with_empty(state, target):
  leaves = iter(jax.tree.leaves(state))
  return jax.tree.map(lambda x: next(leaves) if x.size else jnp.zeros(
      x.shape, x.dtype, device=x.sharding), target)


def _few(names):
  more = f' and {len(names) - _NAMED} more' if len(names) > _NAMED else ''
  return (', '.join(names[:_NAMED]) or 'nothing') + more


def _sync(name):
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def _attempt(read: Callable[[], Any]) -> tuple[Any, str | None]:
  """Its result, or None and the reason; failed for one is failed for all."""
  try:
    result, reason = read(), None
  except MemoryError:
    raise
  except Exception as error:  # Orbax raises a bare Exception, among others.
    text = ' '.join(str(error).split())
    result, reason = None, f'{type(error).__name__}: {text[:300]}'
  if jax.process_count() > 1:
    failed = multihost_utils.process_allgather(np.array(reason is not None))
    if failed.any() and reason is None:
      result, reason = None, f'process {int(failed.argmax())} cannot read it'
  return result, reason
