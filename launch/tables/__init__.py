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

  Where the small scale trains another network its title says which.

  Raises:
    ValueError: if there is none.
  """
  if name not in TABLES:
    raise ValueError(f'`table` (={name!r}) must be one of '
                     f'{", ".join(TABLES)}.')
  if scale not in SCALES:
    raise ValueError(f'`scale` (={scale!r}) must be one of '
                     f'{", ".join(SCALES)}.')
  table = TABLES[name](scale)
  ran, published = trained(table), trained(TABLES[name]('paper'))
  return table if ran == published else table._replace(
      title=f'{table.title} (small: {ran})')


def trained(table: Table) -> str:
  """What a table's cells train on what: 'resnet20, small_cnn on digits'."""
  names = [sorted({point.flags[flag] for point in table.points
                   if point.flags and flag in point.flags})
           for flag in ('model', 'dataset')]
  return ' on '.join(', '.join(each) for each in names if each)
