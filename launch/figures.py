"""The papers' figures: a line for each row, theirs pale, ours on top."""

from collections.abc import Mapping
from collections.abc import Sequence
import os
from typing import Any

from experiments import files
from launch.table import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9',
            '#222222', '#882255', '#999933', '#5b3fa0', '#7f7f7f', '#8c5a2b')
_MARKERS = 'osD^vPX<>hp*'


def draw(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike,
         title: str, figure: Figure, published: bool = True) -> None:
  """Draws one PNG, whole or not at all.

  Published points are hollow, on dashed lines; ours are filled, on full ones,
  with the deviation over the seeds as a bar. A row of one point is a point.

  Args:
    rows: dicts with `row`, `published`, `published_x`, `ours`, `deviation` and
      `x`; what is None is left out.
    path: the PNG file.
    title: stands above it.
    figure: its axes.
    published: whether the published points are drawn too; those of another
      network would leave no room for ours.
  """
  from matplotlib.backends import backend_agg
  from matplotlib.figure import Figure as Canvas
  canvas = Canvas(figsize=(7.2, 4.4), layout='constrained')
  backend_agg.FigureCanvasAgg(canvas)
  axes = canvas.subplots()
  if figure.logarithmic:
    _scale_logarithmic(axes)
  names = list(dict.fromkeys(row['row'] for row in rows))
  for index, name in enumerate(names):
    look = {'color': _COLOURS[index % len(_COLOURS)],
            'marker': _MARKERS[index % len(_MARKERS)], 'markersize': 5}
    _draw_line(axes, [row for row in rows if row['row'] == name], name, look,
               published)
  axes.set_title(title, loc='left', fontsize=10, fontweight='bold')
  axes.set_xlabel(figure.xlabel)
  axes.set_ylabel(figure.ylabel)
  axes.grid(True, axis='y', color='#e6e6e6')
  axes.set_axisbelow(True)
  axes.spines[['top', 'right']].set_visible(False)
  _add_legend(axes, published)
  with files.replacing(path) as file:
    canvas.savefig(file, format='png', dpi=150, facecolor='white')


def series(rows: Sequence[Mapping[str, Any]], x: str, y: str
           ) -> list[tuple[float, float, float]]:
  """(place, value, deviation) of the rows that have them, from left to right.

  Example:
    >>> rows = [{'x': 2., 'ours': 7.}, {'x': 1., 'ours': 5.}, {'x': 3.}]
    >>> series(rows, 'x', 'ours')
    [(1.0, 5.0, 0.0), (2.0, 7.0, 0.0)]
  """
  return sorted((row[x], row[y], row.get('deviation') or 0.) for row in rows
                if row.get(x) is not None and row.get(y) is not None)


def _scale_logarithmic(axes) -> None:
  from matplotlib import ticker
  axes.set_xscale('log')
  axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
  axes.xaxis.set_minor_locator(ticker.NullLocator())
  axes.xaxis.set_major_formatter(lambda value, _: f'{value:g}')


def _draw_line(axes, rows, name, look, published) -> None:
  theirs = series(rows, 'published_x', 'published') if published else []
  ours = series(rows, 'x', 'ours')
  if theirs:
    x, y, _ = zip(*theirs)
    axes.plot(x, y, linestyle=(0, (4, 3)), linewidth=.9, alpha=.55,
              markerfacecolor='white', **look)
  if ours:
    x, y, deviations = zip(*ours)
    axes.errorbar(x, y, deviations if any(deviations) else None, capsize=2.5,
                  linewidth=1.5, zorder=3, **look)
  axes.plot([], [], linestyle='-', label=name, **look)


def _add_legend(axes, published) -> None:
  if published:
    axes.plot([], [], linestyle=(0, (4, 3)), color='#666666', marker='o',
              markersize=5, markerfacecolor='white', label='as published')
  axes.legend(loc='center left', bbox_to_anchor=(1.01, .5), frameon=False,
              fontsize=8, handlelength=3)
