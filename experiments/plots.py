"""How everything is drawn, and lines of a table of runs.

A picture is one PNG at `path` under a `title`, written whole or not at all, and
matplotlib's global state is left alone; a ValueError says that there is nothing
to draw. The colours are those of Okabe
and Ito, chosen to be told apart by colour-blind readers; lines differ in marker
as well. Legends stand outside the axes, where no point can be taken for one.
"""

from collections.abc import Mapping, Sequence
import math
import os
import textwrap
from typing import Any, NamedTuple

import numpy as np

from experiments import files

BLUE, ORANGE, GREEN = '#0072b2', '#d55e00', '#009e73'
_COLOURS = (BLUE, ORANGE, GREEN, '#cc79a7', '#e69f00', '#56b4e9', '#222222',
            '#882255', '#999933', '#5b3fa0', '#7f7f7f', '#8c5a2b')
_MARKERS = 'osD^vPX<>hp*'
GREY, _PALE, PALE_BLUE = '#666666', '#e6e6e6', '#a9cfe6'
_DASHES = (0, (4, 3))


class Metric(NamedTuple):
  """What is measured, and how it is drawn."""

  label: str
  scale: float = 1.  # From rows to pictures.
  unit: str = ''


METRICS = {'accuracy': Metric('accuracy', 100., '%'),
           'bits_per_character': Metric('bits per character'),
           'perplexity': Metric('perplexity'),
           'loss': Metric('loss (nats)')}

_STYLE = {
    'font.family': 'sans-serif', 'font.size': 9.5, 'axes.titlesize': 11,
    'axes.titleweight': 'bold', 'axes.titlelocation': 'left',
    'axes.titlepad': 10, 'axes.labelcolor': '#333333',
    'axes.edgecolor': '#999999', 'axes.linewidth': 0.8,
    'axes.spines.top': False, 'axes.spines.right': False,
    'axes.axisbelow': True, 'axes.grid': True, 'axes.grid.axis': 'y',
    'grid.color': _PALE, 'grid.linewidth': 0.8, 'xtick.color': '#999999',
    'ytick.color': '#999999', 'xtick.labelcolor': '#333333',
    'ytick.labelcolor': '#333333', 'legend.frameon': False,
    'lines.solid_capstyle': 'round', 'lines.markersize': 5.5,
    'figure.titlesize': 11, 'figure.titleweight': 'bold',
}


def lines(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike,
          title: str, *, xlabel: str, ylabel: str, scale: str = 'linear',
          published: bool = True) -> None:
  """Draws a line for each row of a table, named beside the axes.

  Published points are hollow, on dashed lines; ours are filled, with the
  deviation as a bar. The row 'dense' and, on an axis of sparsities, one at 0
  are dashed lines across. Few points that lie far from all others are left out,
  and counted.

  Args:
    rows: dicts with `row`, `published`, `published_x`, `ours`, `deviation` and
      `x`; what is None or absent is left out.
    scale: 'linear', 'log', or 'sparsity': of percent, logarithmic in what is
      left, so that 80, 90, 95 and 98 stand apart.
    published: whether the published points are drawn too.
  """
  check(rows)
  names = list(dict.fromkeys(row['row'] for row in rows))

  def draw(figure):
    axes = figure.subplots()
    _scale_axis(axes, scale)
    across = {}
    for index, name in enumerate(names):
      _draw_row(axes, [row for row in rows if row['row'] == name], name,
                index, scale, published, across)
    _leave_out_failures(axes, rows, published)
    _name_across(axes, across)
    axes.set_title(textwrap.fill(title, 72))
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if published:
      axes.plot([], [], linestyle=_DASHES, color=GREY, marker='o',
                markerfacecolor='white', label='as published')
    labels = axes.get_legend_handles_labels()[1]
    if max(map(len, labels), default=0) > 28:  # Beside it, no room is left.
      figure.legend(loc='outside lower left', ncols=2, handlelength=3)
    elif labels:
      axes.legend(loc='center left', bbox_to_anchor=(1.01, .5), handlelength=3)
  save(path, (6.8, max(4.2, .7 + .22 * len(names))), draw)


def _scale_axis(axes, scale):
  from matplotlib import ticker
  if scale == 'log':
    axes.set_xscale('log')
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter('{x:g}')
  elif scale == 'sparsity':
    axes.set_xscale('function', functions=(
        lambda x: -np.log(np.maximum(100.5 - x, .1)),
        lambda y: 100.5 - np.exp(-y)))
    axes.xaxis.set_major_locator(ticker.FixedLocator(
        [0, 50, 70, 80, 90, 95, 98, 99]))
  axes.xaxis.set_minor_locator(ticker.NullLocator())


def _draw_row(axes, rows, name, index, scale, published, across):
  """One line of a table; `across` gets the places of lines to compare with."""
  colour = _COLOURS[index % len(_COLOURS)]
  marker = _MARKERS[(index + index // len(_COLOURS)) % len(_MARKERS)]
  theirs = _points(rows, 'published_x', 'published') if published else []
  ours = _points(rows, 'x', 'ours')
  if theirs:
    x, y, _ = zip(*theirs)
    axes.plot(x, y, linestyle=_DASHES, linewidth=.9, alpha=.55, color=colour,
              marker=marker, markerfacecolor='white')
  if len(ours) == 1 and (name == 'dense' or scale == 'sparsity' and
                         ours[0][0] == 0.):
    axes.axhline(ours[0][1], color=colour, linestyle=_DASHES, linewidth=1,
                 zorder=1)
    across[name] = ours[0][1], colour
    if scale == 'sparsity':
      return
  if ours:
    x, y, deviations = zip(*ours)
    axes.errorbar(x, y, deviations if any(deviations) else None, color=colour,
                  marker=marker, markeredgecolor='white', markeredgewidth=.6,
                  linewidth=1.5, elinewidth=1, capsize=2.5, zorder=3)
  axes.plot([], [], color=colour, marker=marker, label=name)


def _name_across(axes, across):
  """Writes names at the left ends of lines across, above them, apart."""
  low, high = axes.get_ylim()
  free = -math.inf
  for name, (y, colour) in sorted(across.items(), key=lambda item: item[1][0]):
    if low <= y <= high:
      place = max(y, free)
      axes.text(.01, place, name, transform=axes.get_yaxis_transform(),
                color=colour, fontsize=8.5, ha='left', va='bottom')
      free = place + .04 * (high - low)


def _leave_out_failures(axes, rows, published):
  """Ends the axis before points that are far from others, and says so."""
  values = np.array([y for _, y, _ in _points(rows, 'x', 'ours')])
  if published:
    values = np.append(values, [y for _, y, _ in _points(
        rows, 'published_x', 'published')])
  if not values.size:
    return
  low, high = np.quantile(values, (.25, .75))
  room = 4 * max(high - low, .005 * abs(values).max())
  kept = values[(values >= low - room) & (values <= high + room)]
  if kept.size < values.size:
    margin = .08 * max(kept.max() - kept.min(), 1e-6)
    axes.set_ylim(kept.min() - margin, kept.max() + margin)
    axes.text(.99, .01, f'{values.size - kept.size} of {values.size} points '
              'lie outside', transform=axes.transAxes, color=GREY, ha='right',
              va='bottom', zorder=9, bbox={
                  'facecolor': 'white', 'edgecolor': 'none', 'pad': 1})


def _points(rows, x, y):
  """(place, value, deviation) of rows that have them, from left to right."""
  return sorted((row[x], row[y], row.get('deviation') or 0.) for row in rows
                if row.get(x) is not None and row.get(y) is not None)


def check(rows):
  if not rows:
    raise ValueError(f'rows (={rows}) must not be empty')


def save(path, size, draw):
  """Draws on a fresh figure and writes it whole or not at all."""
  import matplotlib
  from matplotlib.backends import backend_agg
  from matplotlib.figure import Figure
  with matplotlib.rc_context(_STYLE):
    figure = Figure(figsize=size, layout='constrained')
    backend_agg.FigureCanvasAgg(figure)
    draw(figure)
    with files.replacing(path) as file:
      # A tight box: names beside the axes would otherwise be cut.
      figure.savefig(file, format='png', dpi=150, facecolor='white',
                     bbox_inches='tight', pad_inches=0.12)
