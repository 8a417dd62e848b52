"""Saving a run so that a killed and resumed run equals an unbroken one.

A checkpoint named N holds the state after N steps. It is written in the
background, appears on disk all at once or not at all, and lies beside
`config.json`, the flags of the run it belongs to. A loop looks like this:

  with checkpointing.PreemptionGuard() as guard, checkpointing.open(
      directory, save_every=1000, config=config, guard=guard) as checkpoints:
    restored = checkpoints.restore_latest(checkpointing.abstract(state))
    state, start = restored or (state, 0)
    for step in range(start + 1, train_steps + 1):
      state = train_step(state)
      checkpoints.save(step, state)
      if checkpoints.reached_preemption(step):
        checkpoints.save(step, state, force=True)
        checkpoints.wait()
        sys.exit(checkpointing.REQUEUE_EXIT_CODE)
    checkpoints.save(train_steps, state, force=True)

Leaves are jax.Arrays, typed keys included. With several processes they must
be global arrays (make the whole state under one jit with out_shardings), all
processes call every method, and `directory` is one they all see.
"""

from collections.abc import Callable, Mapping, Sequence
import concurrent.futures
import contextlib
import json
import os
import pathlib
import signal
from typing import Any, NamedTuple
import zlib

from absl import logging
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from experiments import files

# EX_TEMPFAIL of sysexits.h: "try again later". A launcher requeues on it.
REQUEUE_EXIT_CODE = 75

_CONFIG = 'config.json'
_ABSENT = '(absent)'
# A mismatch names this many leaves of each kind.
_NAMED = 5


class Leaf(NamedTuple):
  """What is recorded of one leaf beside its values."""
  shape: tuple[int, ...]
  dtype: str  # As JAX prints it; a typed key is 'key<fry>'.
  crc32: int | None  # Of the bytes; None if no process holds the whole leaf.


class PreemptionGuard:
  """Notes a SIGTERM instead of dying of it, so that a loop can save and leave.

  Once jax.distributed is initialized JAX watches for SIGTERM itself, to agree
  among processes on the step to stop at; the guard then stays out of the way,
  and `Checkpoints.reached_preemption` gives JAX's answer. `requested` says
  whether a SIGTERM came while the guard was in force.
  """

  def __init__(self):
    self.requested = False
    self._restore_handler = lambda: None

  def __enter__(self) -> 'PreemptionGuard':
    if not jax.distributed.is_initialized():
      previous = signal.signal(signal.SIGTERM, self._note)
      self._restore_handler = lambda: signal.signal(signal.SIGTERM, previous)
    return self

  def __exit__(self, *exc_info):
    self._restore_handler()

  def _note(self, unused_signum, unused_frame):
    self.requested = True


def abstract(state: Any) -> Any:
  """A tree of arrays with shardings, or of their shapes, as the latter."""
  return jax.tree_util.tree_map_with_path(_abstract_leaf, state)


def open(directory: str | os.PathLike, *, save_every: int,
         config: Mapping[str, Any], keep: int = 2, free: Sequence[str] = (),
         guard: PreemptionGuard | None = None) -> 'Checkpoints':
  """Opens a directory of checkpoints, new or of the same run.

  Args:
    directory: absent, empty, or what an earlier `open` made.
    save_every: steps between checkpoints, at least 1.
    config: the run's flags by name; values that JSON can hold.
    keep: how many checkpoints to keep, the newest, at least 1.
    free: names in `config` that may differ from the stored ones. The stored
      file always stays as the run's first process wrote it.
    guard: asked by `reached_preemption`.

  Raises:
    ValueError: if the stored config differs, naming each flag and both values;
      if `config` is not JSON; if `save_every` or `keep` is below 1.
    RuntimeError: if the directory holds files but no config that can be read.
      Nothing in it has then been touched.
  """
  for name, value in (('save_every', save_every), ('keep', keep)):
    if value < 1:
      raise ValueError(f'{name} (={value}) must be at least 1')
  path = _as_path(directory)
  stored = _enter(path, config, free)
  return Checkpoints(path, stored, save_every, keep, guard)


def check(directory: str | os.PathLike, *, config: Mapping[str, Any],
          free: Sequence[str] = ()) -> None:
  """Raises what `open` would for a directory of another run; writes nothing."""
  path = _as_path(directory)
  stored = _read_config(path)
  if stored is not None:
    _check_config(stored, _as_json(config), free, path)


class Checkpoints:
  """The checkpoints of one run, as a context manager; made by `open`."""

  def __init__(self, directory, config: Mapping[str, Any], save_every: int,
               keep: int, guard: PreemptionGuard | None):
    import orbax.checkpoint as ocp
    self.directory = directory
    self.config = config
    self._save_every = save_every
    self._guard = guard
    self._pending = None  # The step now being written.
    self._unreadable = []  # Steps in the way of what will be saved.
    self._manager = ocp.CheckpointManager(
        directory, options=ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True,
            # Else a disk too full for a directory leaves threads behind that
            # hold up the exit of the process for five minutes.
            async_options=ocp.AsyncOptions(
                create_directories_asynchronously=False)))

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *exc_info):
    self.close()

  def restore_latest(self, target: Any) -> tuple[Any, int] | None:
    """Reads the newest checkpoint that can be read, and its step; None of none.

    One that cannot be is passed over with a logged warning and stays on disk.
    Every leaf is compared with the checksum taken when it was saved. The state
    is bit for bit the one saved, on the shardings of the target (a state, or
    `abstract` of one).

    Raises:
      ValueError: if a checkpoint that can be read has other leaves, shapes or
        dtypes than `target`, naming them.
      RuntimeError: if there are checkpoints and none can be read.
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

    It is time if `step` is a multiple of `save_every`, or by `force`, unless it
    is the newest checkpoint already. The values are copied out before this
    returns: the arrays may be donated.

    Raises:
      OSError: if this write or the one before failed, naming the directory.
      ValueError: if a checkpoint newer than `step` exists, which means that
        the caller did not start from it; if a leaf cannot be saved.
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
    self._begin(step, state)
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
    """Whether to save and leave now.

    With several processes it is true for all of them at one and the same
    step, provided each asks at every step.
    """
    requested = self._guard is not None and self._guard.requested
    return requested or self._manager.reached_preemption(step)

  def _restore(self, step, target):
    """The state or the reason why not, the same in every process."""
    import orbax.checkpoint as ocp
    path = self.directory / str(step)
    leaves, reason = _attempt(lambda: _read_leaves(path / 'leaves'))
    if reason is not None:
      return None, reason
    _check_leaves(leaves, _leaves(target), path)

    def read():
      # The bare handler has no barrier, where one process could wait for
      # another that failed.
      state = ocp.StandardCheckpointHandler().restore(
          path / 'state', args=ocp.args.StandardRestore(_without_empty(target)))
      state = _with_empty(state, target)
      _check_values(leaves, state)
      return jax.tree.map(_restore_weak_type, state, target)
    return _attempt(read)

  def _begin(self, step, state):
    import orbax.checkpoint as ocp
    abstract(state)
    leaves = {path: leaf._asdict()
              for path, leaf in _leaves(state, _checksums(state)).items()}
    with self._named_failure(step):
      self._manager.save(step, force=True, args=ocp.args.Composite(
          state=ocp.args.StandardSave(_without_empty(state)),
          leaves=ocp.args.JsonSave(leaves)))
    self._pending = step

  def _make_room(self):
    """Renames what could not be read, and is newer than what could, aside."""
    if self._unreadable:
      if jax.process_index() == 0:
        for step in self._unreadable:
          _rename_aside(self.directory / str(step))
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


# ---------------------------------------------------------------- directory


def _as_path(directory):
  return pathlib.Path(os.path.abspath(directory))


def _enter(path, config, free):
  """Makes the directory this run's, or checks that it is; its config."""
  config = _as_json(config)
  stored = _read_config(path)
  # Nobody writes before everybody has looked.
  _sync('checkpoint directory looked at')
  if stored is not None:
    _check_config(stored, config, free, path)
    return stored
  if jax.process_index() == 0:
    files.write_text(path / _CONFIG,
                     json.dumps(config, indent=2, sort_keys=True) + '\n')
  _sync('checkpoint directory entered')
  if not (path / _CONFIG).exists():
    raise RuntimeError(f'directory (={path}) must be seen by all processes: '
                       f'process {jax.process_index()} finds no {_CONFIG}')
  return config


def _as_json(config):
  for name, value in config.items():
    try:
      json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
      raise ValueError(f'config[{name!r}] (={value!r}) is not a value that '
                       f'JSON can hold') from error
  return json.loads(json.dumps(dict(config)))


def _read_config(path):
  """The stored config; None if the directory is new."""
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
    return json.loads((path / _CONFIG).read_text())
  except ValueError as error:
    raise RuntimeError(f'{path / _CONFIG} is not JSON: {error}') from error


def _check_config(stored, config, free, path):
  names = sorted((stored.keys() | config.keys()) - set(free))
  both = {n: (stored.get(n, _ABSENT), config.get(n, _ABSENT)) for n in names}
  lines = [f'{name}: {old!r} stored, {new!r} now'
           for name, (old, new) in both.items() if old != new]
  if lines:
    raise ValueError(f'directory (={path}) belongs to a run with another '
                     'config:\n  ' + '\n  '.join(lines))


def _rename_aside(path):
  name, count = f'{path.name}.unreadable', 1
  while (path.parent / name).exists():
    name, count = f'{path.name}.unreadable-{count}', count + 1
  logging.warning('Renaming %s, which could not be read, to %s', path, name)
  path.rename(path.parent / name)


# ------------------------------------------------------------------- leaves


def _abstract_leaf(path, leaf):
  name = jax.tree_util.keystr(path)
  if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
    raise ValueError(f'leaf {name} (={leaf!r}) must be a jax.Array')
  if leaf.sharding is None:
    raise ValueError(f'leaf {name} (={leaf!r}) must have a sharding')
  # A key array has no weak_type.
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding,
                              weak_type=getattr(leaf, 'weak_type', False))


def _leaves(state, checksums=None):
  """The record of a tree: path -> Leaf, in tree order."""
  pairs = jax.tree_util.tree_leaves_with_path(state)
  checksums = checksums or [None] * len(pairs)
  return {jax.tree_util.keystr(path): Leaf(tuple(x.shape), str(x.dtype), crc)
          for (path, x), crc in zip(pairs, checksums)}


def _read_leaves(path):
  import orbax.checkpoint as ocp
  record = ocp.JsonCheckpointHandler().restore(path)
  return {name: Leaf(tuple(leaf['shape']), leaf['dtype'], leaf['crc32'])
          for name, leaf in record.items()}


def _check_leaves(saved, wanted, path):
  """Raises unless both have the same leaves; Orbax would cast silently."""
  missing = [name for name in wanted if name not in saved]
  unexpected = [name for name in saved if name not in wanted]
  if missing or unexpected:
    raise ValueError(f'checkpoint {path} is of another tree than the target: '
                     f'the target has {_few(missing)} that it lacks, it has '
                     f'{_few(unexpected)} that the target lacks')
  lines = [f'{name}: {_describe(saved[name])} saved, '
           f'{_describe(wanted[name])} wanted' for name in wanted
           if saved[name][:2] != wanted[name][:2]]
  if lines:
    raise ValueError(f'checkpoint {path} differs from the target in '
                     f'{len(lines)} leaves:\n  ' + '\n  '.join(lines[:_NAMED]))


def _check_values(saved, state):
  """Raises unless each leaf has the bytes that were saved.

  TensorStore notices a file cut short, but not a flipped bit, and Orbax reads
  a typed key as plain integers if one of its small files is gone.
  """
  for name, leaf in _leaves(state, _checksums(state)).items():
    if leaf[:2] != saved[name][:2]:
      raise RuntimeError(f'leaf {name} was read as {_describe(leaf)}')
    if None not in (leaf.crc32, saved[name].crc32) and (
        leaf.crc32 != saved[name].crc32):
      raise RuntimeError(f'leaf {name} fails its checksum')


def _checksums(state):
  """CRC-32 of each leaf; 1 GB takes about half a second of one core."""
  arrays = [_whole(x) for x in jax.tree.leaves(state)]
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    return list(pool.map(_checksum, arrays))


def _whole(x):
  """The array as one this process can read, or None."""
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if x.is_fully_addressable:
    return x
  return x.addressable_data(0) if x.is_fully_replicated else None


def _checksum(x):
  if x is None:
    return None
  flat = np.ascontiguousarray(np.asarray(x)).reshape(-1)
  return zlib.crc32(flat.view(np.uint8))


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


def _describe(leaf):
  return f'{leaf.dtype}[{",".join(map(str, leaf.shape))}]'


def _few(names):
  more = f' and {len(names) - _NAMED} more' if len(names) > _NAMED else ''
  return (', '.join(names[:_NAMED]) or 'nothing') + more


# ---------------------------------------------------------------- processes


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
