"""All devices as one mesh: data split over them, the state on each."""

from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec


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
