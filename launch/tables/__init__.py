"""Every table and figure that can be run, by name."""

from launch.table import SCALES, Table
from launch.tables import comparisons
from launch.tables import language
from launch.tables import resnet50
from launch.tables import swat
from launch.tables import top_kast

TABLES = (top_kast.TABLES | swat.TABLES | language.TABLES
          | comparisons.TABLES | resnet50.TABLES)


def get(name: str, scale: str) -> Table:
  """The table of a name at a scale.

  Raises:
    ValueError: if there is none.
  """
  if name not in TABLES:
    raise ValueError(f'`table` (={name!r}) must be one of '
                     f'{", ".join(TABLES)}.')
  if scale not in SCALES:
    raise ValueError(f'`scale` (={scale!r}) must be one of '
                     f'{", ".join(SCALES)}.')
  return TABLES[name](scale)
