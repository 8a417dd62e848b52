"""All devices as one mesh: data split over them, the state on each."""

from typing import Any

from absl import flags
import jax
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec


def define_flags() -> None:
  """Defines the flags that join several processes into one run."""
  flags.DEFINE_bool('distributed', False, 'Join the other processes of the '
                    'run, started alike on every host. A TPU slice, Slurm or '
                    'Open MPI says who they are, else the flags below do.')
  flags.DEFINE_string('coordinator', None, 'HOST:PORT of the first process.')
  flags.DEFINE_integer('num_processes', None, 'How many processes there are.')
  flags.DEFINE_integer('process_id', None, 'Which of them this one is, from 0.')


def join(values: dict[str, Any]) -> None:
  """Joins the other processes, if the flags ask for it; before all else.

  Raises:
    ValueError: naming the flag and its value.
  """
  names = ('coordinator', 'num_processes', 'process_id')
  given = [name for name in names if values[name] is not None]
  if given and (len(given) < len(names) or not values['distributed']):
    raise ValueError(f'`{given[0]}` (={values[given[0]]!r}) needs '
                     '--distributed and all of --' + ', --'.join(names) + '.')
  if values['distributed']:
    jax.distributed.initialize(*(values[name] for name in names))


def mesh() -> Mesh:
  """One axis, 'data', over every device of every process."""
  return jax.make_mesh((jax.device_count(),), ('data',),
                       axis_types=(AxisType.Auto,))


def replicated(mesh_: Mesh) -> NamedSharding:
  """The whole array on each device."""
  return NamedSharding(mesh_, PartitionSpec())


def split(mesh_: Mesh) -> NamedSharding:
  """The first axis over the devices."""
  return NamedSharding(mesh_, PartitionSpec('data'))


def put_batch(batch: Any, mesh_: Mesh) -> Any:
  """Makes one global array of the rows that each process brings."""
  return jax.tree.map(
      lambda rows: jax.make_array_from_process_local_data(split(mesh_), rows),
      batch)


def check_batch_size(batch_size: int) -> int:
  """Returns the size, or raises ValueError if it does not split evenly."""
  if batch_size < 1 or batch_size % jax.device_count():
    raise ValueError(f'`batch_size` (={batch_size}) must be a positive '
                     f'multiple of the {jax.device_count()} devices.')
  return batch_size
