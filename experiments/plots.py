"""Pictures of a run, of a table of runs, and of where the weights are.

Every function takes rows (dicts), writes one PNG, whole or not at all, and
leaves matplotlib's global state alone. Accuracies, churn and densities of a run
are fractions in the rows and percent in the pictures; what else is measured
stands in `METRICS`. The colours are those of Okabe and Ito, chosen to be told
apart by colour-blind readers; lines differ in marker as well.
"""

from collections.abc import Mapping, Sequence
import math
import os
from typing import Any
from typing import NamedTuple

import numpy as np

from experiments import files

_BLUE, _ORANGE, _GREEN = '#0072b2', '#d55e00', '#009e73'
_COLOURS = (_BLUE, _ORANGE, _GREEN, '#cc79a7', '#e69f00', '#56b4e9', '#222222',
            '#882255', '#999933', '#5b3fa0', '#7f7f7f', '#8c5a2b')
_MARKERS = 'osD^vPX<>hp*'
_GREY, _PALE = '#666666', '#e6e6e6'
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
}


def training_curves(rows: Sequence[Mapping[str, Any]],
                    path: str | os.PathLike, title: str,
                    metric: str = 'accuracy'):
  """Draws a metric, and below it how much the masks change, by step.

  Args:
    rows: metrics with `step` and any of `train_<metric>`, `test_<metric>`,
      `churn_min`, `churn_mean`, `churn_max`: over the layers, the share of
      the forward set that changed at a refresh. Without churn there is one
      panel and a note. Missing values and nan are gaps.
    path: the PNG file.
    title: stands above it.
    metric: a name in `METRICS`.

  Raises:
    ValueError: if there are no rows, or a fraction is outside [0, 1].
  """
  _check(rows, (*_fractions(f'train_{metric}', f'test_{metric}'), 'churn_min',
                'churn_mean', 'churn_max'))
  has_churn = _series(rows, 'churn_mean')[0].size > 0

  def draw(figure):
    if has_churn:
      top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
      _draw_churn(bottom, rows)
    else:
      top = bottom = figure.subplots()
      figure.supxlabel('no churn panel: this method has no masks that change',
                       fontsize=8, color=_GREY, x=0.99, ha='right')
    _draw_metric(top, rows, metric)
    top.set_title(title)
    bottom.set_xlabel('step')
    bottom.xaxis.set_major_formatter(_format_step)
    bottom.margins(x=0.01)
  _save(path, (6.4, 4.8 if has_churn else 3.4), draw)


def lines(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike,
          title: str, *, xlabel: str, ylabel: str, scale: str = 'linear',
          published: bool = True) -> None:
  """Draws a line for each row of a table, named beside the axes.

  Published points are hollow, on dashed lines; ours are filled, on full ones,
  with the deviation over the seeds as a bar. A row of one point is a point; on
  an axis of sparsities one at 0 is a dashed line across, to compare with. Few
  points that lie far from all others are left out, and counted.

  Args:
    rows: dicts with `row`, `published`, `published_x`, `ours`, `deviation` and
      `x`; what is None or absent is left out. Rows take colour and marker in
      order of appearance.
    path: the PNG file.
    title: stands above it.
    xlabel, ylabel: of the axes.
    scale: 'linear', 'log', or 'sparsity': of percent, logarithmic in what is
      left, so that 80, 90, 95 and 98 stand apart.
    published: whether the published points are drawn too; those of another
      network would leave no room for ours.

  Raises:
    ValueError: if there are no rows.
  """
  _check(rows, ())
  names = list(dict.fromkeys(row['row'] for row in rows))

  def draw(figure):
    axes = figure.subplots()
    _scale_axis(axes, scale)
    for index, name in enumerate(names):
      _draw_row(axes, [row for row in rows if row['row'] == name], name,
                _look(index), scale, published)
    _leave_out_failures(axes, rows, published)
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if published:
      axes.plot([], [], linestyle=_DASHES, color=_GREY, marker='o',
                markerfacecolor='white', label='as published')
    axes.legend(loc='center left', bbox_to_anchor=(1.01, .5), handlelength=3)
  _save(path, (6.8, max(4.2, .7 + .22 * len(names))), draw)


def neuron(unit, path: str | os.PathLike) -> None:
  """Draws what a hidden unit reads and writes: three lists of bars.

  Args:
    unit: a Neuron of experiments.language.neurons.
    path: the PNG file.
  """
  lists = (('channels read', unit.channels[:16]), ('tokens read', unit.reads),
           ('tokens written', unit.writes))

  def draw(figure):
    figure.suptitle(f'layer {unit.layer}, unit {unit.number}: '
                    f'{len(unit.channels)} weights in')
    for axes, (title, pairs) in zip(figure.subplots(1, 3), lists):
      places = range(len(pairs))
      axes.barh(places, [value for _, value in pairs], color=_COLOURS[0])
      axes.set_yticks(places, [name.replace('$', r'\$') for name, _ in pairs])
      axes.invert_yaxis()
      axes.set_title(title)
  _save(path, (7.5, 3.2), draw)


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


def layer_density(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike,
                  title: str = 'Density of each layer'):
  """Draws how much of each layer is kept, the first layer on top.

  The bar of the forward set lies inside that of the backward set, as the sets
  do.

  Args:
    rows: dicts with `layer`, `forward_density` and perhaps `backward_density`.
    path: the PNG file.
    title: stands above it.

  Raises:
    ValueError: if there are no rows, or a fraction is outside [0, 1].
  """
  _check(rows, ('forward_density', 'backward_density'))
  height = 0.24 if len(rows) <= 30 else 0.17

  def draw(figure):
    axes = figure.subplots()
    _draw_bars(axes, rows, fontsize=9 if len(rows) <= 30 else 7)
    axes.set_title(title)
    axes.set_xlabel('density (percent of the weights that are kept)')
    # Outside: a layer may reach into any corner.
    figure.legend(loc='outside lower right', ncols=2, handlelength=1.2)
  _save(path, (6.4, 1.2 + height * len(rows)), draw)


# ------------------------------------------------------------------- panels


def _draw_metric(axes, rows, metric):
  scale, unit = METRICS[metric].scale, METRICS[metric].unit
  step, value = _series(rows, f'train_{metric}')
  if step.size:
    axes.plot(step, scale * value, color=_BLUE, alpha=0.22, linewidth=0.8)
    axes.plot(step, scale * _running_mean(value), color=_BLUE, linewidth=1.8,
              label='train, running mean')
  step, value = _series(rows, f'test_{metric}')
  if step.size:
    label = f'test, {scale * value[-1]:.4g}{unit} at the end'
    axes.plot(step, scale * value, color=_ORANGE, linewidth=1.2, marker='o',
              markersize=4.5, markeredgecolor='white', markeredgewidth=0.6,
              label=label, zorder=3)
  axes.set_ylabel(_label(metric))
  if axes.get_legend_handles_labels()[0]:
    axes.legend(loc='best')


def _draw_churn(axes, rows):
  step, mean = _series(rows, 'churn_mean')
  low, high = _series(rows, 'churn_min'), _series(rows, 'churn_max')
  positive = mean[mean > 0]
  logarithmic = positive.size > 1 and (
      np.quantile(positive, 0.9) > 50 * np.quantile(positive, 0.1))
  if low[0].size and np.array_equal(low[0], high[0]):
    floor = 100 * positive.min() / 3 if logarithmic else 0.
    axes.fill_between(low[0], np.maximum(100 * low[1], floor),
                      100 * high[1], color=_GREEN, alpha=0.18, linewidth=0,
                      label='least to most, over layers')
  axes.plot(step, np.where(mean > 0, 100 * mean, np.nan) if logarithmic
            else 100 * mean, color=_GREEN, linewidth=1.6, marker='o',
            markersize=2.6 if step.size < 80 else 0, label='mean of layers')
  if logarithmic:
    axes.set_yscale('log')
    axes.yaxis.set_major_formatter(_format_percent)
  else:
    axes.set_ylim(bottom=0)
  axes.set_ylabel('mask churn (%)')
  axes.legend(loc='lower right', bbox_to_anchor=(1, 1), ncols=2,
              borderaxespad=0.1, borderpad=0)


def _scale_axis(axes, scale):
  from matplotlib import ticker
  if scale == 'log':
    axes.set_xscale('log')
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(_format_percent)
  elif scale == 'sparsity':
    axes.set_xscale('function', functions=(
        lambda x: -np.log(np.maximum(100.5 - x, .1)),
        lambda y: 100.5 - np.exp(-y)))
    axes.xaxis.set_major_locator(ticker.FixedLocator(
        [0, 50, 70, 80, 90, 95, 98, 99]))
  axes.xaxis.set_minor_locator(ticker.NullLocator())


def _draw_row(axes, rows, name, look, scale, published):
  """One line of a table; a point at sparsity 0 reaches across."""
  colour, marker = look
  theirs = series(rows, 'published_x', 'published') if published else []
  ours = series(rows, 'x', 'ours')
  if theirs:
    x, y, _ = zip(*theirs)
    axes.plot(x, y, linestyle=_DASHES, linewidth=.9, alpha=.55, color=colour,
              marker=marker, markerfacecolor='white')
  if scale == 'sparsity' and [x for x, _, _ in ours] == [0.]:
    axes.axhline(ours[0][1], color=colour, linestyle=_DASHES, linewidth=1,
                 zorder=1, label=name)
    return
  if ours:
    x, y, deviations = zip(*ours)
    axes.errorbar(x, y, deviations if any(deviations) else None, color=colour,
                  marker=marker, markeredgecolor='white', markeredgewidth=.6,
                  linewidth=1.5, elinewidth=1, capsize=2.5, zorder=3)
  axes.plot([], [], color=colour, marker=marker, label=name)


def _leave_out_failures(axes, rows, published):
  """Ends the axis before points that are far from others, and says so."""
  values = np.array([y for _, y, _ in series(rows, 'x', 'ours')])
  if published:
    values = np.append(values, [y for _, y, _ in series(
        rows, 'published_x', 'published')])
  if not values.size:
    return
  low, high = np.quantile(values, (.25, .75))
  room = 4 * max(high - low, .005 * abs(values).max())
  kept = values[(values >= low - room) & (values <= high + room)]
  if kept.size < values.size:
    margin = .08 * max(kept.max() - kept.min(), 1e-6)
    axes.set_ylim(kept.min() - margin, kept.max() + margin)
    axes.text(1., 1.02, f'{values.size - kept.size} of {values.size} points '
              'lie outside', transform=axes.transAxes, color=_GREY, ha='right',
              va='bottom')


def _draw_bars(axes, rows, fontsize):
  places = np.arange(len(rows))
  forward = [100 * row['forward_density'] for row in rows]
  backward = [100 * _number(row.get('backward_density')) for row in rows]
  widest = np.nanmax([*forward, *backward])
  if np.isfinite(backward).any():
    axes.barh(places, backward, height=0.82, color='#a9cfe6',
              label='backward: gets a gradient')
  axes.barh(places, forward, height=0.44, color=_BLUE,
            label='forward: is read')
  for place, *values in zip(places, forward, backward):
    values = [value for value in values if not math.isnan(value)]
    axes.text(max(values) + 0.012 * widest, place,
              ' / '.join(f'{value:.3g}' for value in values), va='center',
              fontsize=fontsize - 1.5, color=_GREY)
  axes.set_yticks(places, [row['layer'] for row in rows], fontsize=fontsize)
  axes.tick_params(axis='y', length=0)
  axes.set_ylim(len(rows) - 0.4, -0.6)
  axes.set_xlim(0, min(112, 1.12 * widest))
  axes.grid(False, axis='y')
  axes.grid(True, axis='x')


# ------------------------------------------------------------------- values


def _label(metric):
  found = METRICS[metric]
  return f'{found.label} ({found.unit})' if found.unit else found.label


def _fractions(*names):
  """Of the names of metrics, those whose values are fractions."""
  return tuple(name for name in names if 'accuracy' in name)


def _check(rows, names):
  if not rows:
    raise ValueError(f'rows (={rows}) must not be empty')
  for row in rows:
    for name in names:
      value = _number(row.get(name))
      if not math.isnan(value) and not 0 <= value <= 1:
        raise ValueError(f'rows: {name} (={value}) must be a fraction, '
                         'in [0, 1]')


def _number(value):
  return math.nan if value is None else float(value)


def _series(rows, name):
  """Steps and values where there is a value, in order of step."""
  pairs = sorted((row['step'], _number(row.get(name))) for row in rows
                 if not math.isnan(_number(row.get(name))))
  return np.array(pairs, float).reshape(-1, 2).T


def _running_mean(values):
  """The mean over a window of a fiftieth of the run, narrower at its ends."""
  total = np.concatenate([[0.], np.cumsum(values)])
  index = np.arange(values.size)
  begin = np.maximum(index - values.size // 100, 0)
  end = np.minimum(index + values.size // 100 + 1, values.size)
  return (total[end] - total[begin]) / (end - begin)


def _look(index):
  return (_COLOURS[index % len(_COLOURS)],
          _MARKERS[(index + index // len(_COLOURS)) % len(_MARKERS)])


def _format_step(step, _):
  for size, unit in ((1e6, 'M'), (1e3, 'k')):
    if abs(step) >= size:
      return f'{step / size:.4g}{unit}'
  return f'{step:.4g}'


def _format_percent(value, _):
  return f'{value:g}'


def _save(path, size, draw):
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
