"""All devices as one mesh: data split over them, the state on each or split.

With --model_parallel=N every N devices hold one copy of the state together:
each array of two axes or more is split along its longest axis that N divides.
The rule looks at the shape alone, so a weight, its masks and its optimizer
slots lie alike, and nothing of a weight's size moves between devices.
"""

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


def place(mesh_: Mesh, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
  """Where a parameter, or what has its shape, lies."""
  parts = mesh_.shape['model']
  axes = [axis for axis, size in enumerate(leaf.shape) if size % parts == 0]
  if parts == 1 or len(leaf.shape) < 2 or not axes:
    return replicated(mesh_)
  longest = max(axes, key=lambda axis: leaf.shape[axis])
  return NamedSharding(mesh_, PartitionSpec(*[None] * longest, 'model'))


def put_batch(batch: Any, mesh_: Mesh) -> Any:
  """Makes one global array of the rows that each process brings."""
  return jax.tree.map(
      lambda rows: jax.make_array_from_process_local_data(split(mesh_), rows),
      batch)


def check_batch_size(batch_size: int, model_parallel: int = 1,
                     flag: str = 'batch_size') -> int:
  """Returns the size, or raises ValueError if it does not split evenly."""
  devices = jax.device_count()
  if model_parallel < 1 or devices % model_parallel:
    raise ValueError(f'`model_parallel` (={model_parallel}) must divide the '
                     f'{devices} devices.')
  parts = devices // model_parallel
  if batch_size < 1 or batch_size % parts:
    raise ValueError(f'`{flag}` (={batch_size}) must be a positive '
                     f'multiple of the {parts} parts it is split into.')
  return batch_size
