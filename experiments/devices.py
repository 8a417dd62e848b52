"""All devices as one mesh: data split over them, the state on each or split.

With --model_parallel=N every N devices hold one copy of the state together:
each array of two axes or more is split along its longest axis that N divides.
The rule looks at the shape alone, so a weight, its masks and its optimizer
slots lie alike, and no weight is gathered.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import functools
import json
import socket
from typing import Any

from absl import flags
import jax
from jax.experimental import multihost_utils
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from experiments import locking

# What a process may find wrong before it starts.
_ERRORS = (ValueError, OSError, locking.Held)


def define_flags(into: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flags that join several processes into one run."""
  integer = functools.partial(flags.DEFINE_integer, flag_values=into)
  flags.DEFINE_bool('distributed', False, 'Join the other processes of the '
                    'run, started alike on every host. A TPU slice, Slurm or '
                    'Open MPI says who they are, else the flags below do.',
                    flag_values=into)
  flags.DEFINE_string('coordinator', None, 'HOST:PORT of the first process.',
                      flag_values=into)
  integer('num_processes', None, 'How many processes there are.')
  integer('process_id', None, 'Which of them this one is, from 0.')
  integer('heartbeat_timeout', 100, 'Seconds without a sign of life after '
          'which a process counts as dead and the others end.')


def join(values: Mapping[str, Any], refused: str | None = None) -> None:
  """Joins the other processes, if the flags ask for it; before all else.

  `refused` says, to the others, why this process cannot start. A ValueError
  names the flag and its value, or the process that cannot start.
  """
  names = ('coordinator', 'num_processes', 'process_id')
  given = [name for name in names if values[name] is not None]
  if given and (len(given) < len(names) or not values['distributed']):
    raise ValueError(f'`{given[0]}` (={values[given[0]]!r}) needs '
                     '--distributed and all of --' + ', --'.join(names) + '.')
  seconds = values['heartbeat_timeout']
  if seconds < 1:
    raise ValueError(f'`heartbeat_timeout` (={seconds}) must be at least 1.')
  if values['coordinator'] is not None:
    _check_address(values['coordinator'])
  if values['distributed']:
    jax.distributed.initialize(*(values[name] for name in names),
                               heartbeat_timeout_seconds=seconds)

    def refuse():
      if refused is not None:
        raise ValueError(refused)
    agree(refuse)


def leave_together(arguments: Sequence[str], reason: str) -> None:
  """Tells the other processes that this one is refused its command line.

  Without it they would wait for it, five minutes. Of the arguments only the
  flags above are read.
  """
  own = flags.FlagValues()
  define_flags(own)
  own.set_gnu_getopt()  # Others may lie between them.
  with contextlib.suppress(flags.Error, ValueError):
    own(['', *arguments], known_only=True)
    if own.distributed and not jax.distributed.is_initialized():
      join(own.flag_values_dict(), reason)


def _check_address(address: str) -> None:
  """Raises ValueError for what JAX would fail at after minutes."""
  host, _, port = address.rpartition(':')
  if not host or not port.isdecimal() or int(port) >= 2**16:
    raise ValueError(f'`coordinator` (={address!r}) must be HOST:PORT.')
  try:
    socket.getaddrinfo(host.strip('[]'), int(port))
  except OSError as error:
    raise ValueError(f'`coordinator` (={address!r}): there is no such host '
                     f'({error.strerror}).') from None


def gather(value: Any) -> list[Any]:
  """What each process gives, in their order; of values that JSON can hold."""
  if jax.process_count() == 1:
    return [value]
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(text.size)).reshape(-1)
  padded = np.pad(text, (0, sizes.max() - text.size))
  rows = multihost_utils.process_allgather(padded)
  return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]


def agree(call: Callable[[], Any]) -> Any:
  """What the call returns, unless it fails in any process: then in all.

  Raises:
    ValueError, OSError, Held: as the call does here; in the other processes
      with the number of the one that failed.
  """
  result = error = None
  try:
    result = call()
  except _ERRORS as found:
    error = found
  held = isinstance(error, locking.Held)
  outcomes = gather(None if error is None else [held, str(error)])
  if error is not None:
    raise error
  for index, outcome in enumerate(outcomes):
    if outcome is not None:
      kind = locking.Held if outcome[0] else ValueError
      raise kind(f'process {index} cannot start: {outcome[1]}')
  return result


def check_equal(values: Mapping[str, Any], free: Sequence[str] = ()) -> None:
  """Raises ValueError in every process if flags differ between any two."""
  first, *others = gather(dict(values))
  for index, other in enumerate(others, 1):
    for name in sorted(first.keys() | other.keys()):
      if name not in free and first.get(name) != other.get(name):
        raise ValueError(
            f'`{name}` must be the same in all processes; it is '
            f'{first.get(name)!r} in process 0 and {other.get(name)!r} in '
            f'process {index}.')


def mesh(model_parallel: int = 1) -> Mesh:
  """Axes 'data' and 'model' over every device of every process."""
  return jax.make_mesh(
      (jax.device_count() // model_parallel, model_parallel),
      ('data', 'model'), axis_types=(AxisType.Auto,) * 2)


def replicated(mesh_: Mesh) -> NamedSharding:
  """The whole array on each device."""
  return NamedSharding(mesh_, PartitionSpec())


def split(mesh_: Mesh, axis: int = 0) -> NamedSharding:
  """One axis of examples over the devices; -1 for the whole on each."""
  if axis < 0:
    return replicated(mesh_)
  return NamedSharding(mesh_, PartitionSpec(*[None] * axis, 'data'))


def place(mesh_: Mesh, path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct
          ) -> NamedSharding:
  """Where a parameter, or what has its shape, lies."""
  if getattr(path[-1], 'name', '') == 'reservoir':  # Of packed blocks.
    return replicated(mesh_).with_memory_kind('pinned_host')
  parts = mesh_.shape['model']
  axes = [axis for axis, size in enumerate(leaf.shape) if size % parts == 0]
  if parts == 1 or len(leaf.shape) < 2 or not axes:
    return replicated(mesh_)
  longest = max(axes, key=lambda axis: leaf.shape[axis])
  return NamedSharding(mesh_, PartitionSpec(*[None] * longest, 'model'))


def part(model_parallel: int = 1) -> tuple[int, int]:
  """Which part of each batch this process brings, and of how many.

  Processes that hold one copy of the state together bring the same part.
  """
  rows = {}
  for row, group in enumerate(mesh(model_parallel).devices):
    for device in group:
      rows.setdefault(device.process_index, set()).add(row)
  parts = sorted({tuple(sorted(own)) for own in rows.values()})
  return parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts)


def put_batch(batch: Any, mesh_: Mesh) -> Any:
  """Makes one global array of the rows that each process brings: its `part`."""
  return jax.tree.map(
      lambda rows: jax.make_array_from_process_local_data(split(mesh_), rows),
      batch)


def check_batch_size(batch_size: int, model_parallel: int = 1,
                     flag: str = 'batch_size') -> None:
  """Raises ValueError if the size does not split evenly."""
  devices = jax.device_count()
  if model_parallel < 1 or devices % model_parallel:
    raise ValueError(f'`model_parallel` (={model_parallel}) must divide the '
                     f'{devices} devices.')
  parts = devices // model_parallel
  if batch_size < 1 or batch_size % parts:
    raise ValueError(f'`{flag}` (={batch_size}) must be a positive '
                     f'multiple of the {parts} parts it is split into.')
