"""Pictures of a run, of a table of runs, and of where the weights are.

Every function takes plain rows or arrays, writes one PNG, whole or not at all,
and leaves matplotlib's global state alone. Accuracies, churn and densities of a
run are fractions in the rows and percent in the pictures; what else is measured
stands in `METRICS`. The colours are those of Okabe and Ito, chosen to be told
apart by colour-blind readers; lines differ in marker as well. Legends stand
outside the axes, where no point can be taken for one.
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
_GREY, _PALE, _PALE_BLUE = '#666666', '#e6e6e6', '#a9cfe6'
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


def training_curves(rows: Sequence[Mapping[str, Any]],
                    path: str | os.PathLike, title: str,
                    metric: str = 'accuracy'):
  """Draws a metric, how much the masks change, and what is left, by step.

  Args:
    rows: metrics with `step` and any of `train_<metric>`, `test_<metric>`;
      `churn_min`, `churn_mean`, `churn_max`, over the layers, the share of the
      forward set that is new since a refresh; `sparsity` and
      `effective_sparsity`. Where all rows lack the last ones, there is no
      panel for them. Missing values and nan are gaps.
    path: the PNG file.
    title: stands above it.
    metric: a name in `METRICS`.

  Raises:
    ValueError: if there are no rows, or a fraction is outside [0, 1].
  """
  fractions = ['churn_min', 'churn_mean', 'churn_max', 'sparsity',
               'effective_sparsity']
  _check(rows, fractions + [f'{split}_{metric}' for split in ('train', 'test')
                            if METRICS[metric].unit == '%'])
  panels = [_draw_metric]
  panels += [_draw_churn] * bool(_series(rows, 'churn_mean')[0].size)
  panels += [_draw_density] * bool(_series(rows, 'sparsity')[0].size)

  def draw(figure):
    from matplotlib import ticker
    found = figure.subplots(len(panels), 1, sharex=True, squeeze=False,
                            height_ratios=(3, 2, 2)[:len(panels)])[:, 0]
    for axes, panel in zip(found, panels):
      panel(axes, rows, metric)
      axes.legend(loc='lower right', bbox_to_anchor=(1, 1), ncols=2,
                  borderaxespad=0.1, borderpad=0, handlelength=1.6)
    figure.suptitle(title, x=0.01, ha='left')
    found[-1].set_xlabel('step')
    found[-1].xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    found[-1].xaxis.set_major_formatter(_format_step)
    found[-1].set_xlim(0, 1.02 * max(row['step'] for row in rows))
  _save(path, (6.4, 1.6 + 1.75 * len(panels)), draw)


def lines(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike,
          title: str, *, xlabel: str, ylabel: str, scale: str = 'linear',
          published: bool = True) -> None:
  """Draws a line for each row of a table, named beside the axes.

  Published points are hollow, on dashed lines; ours are filled, on full ones,
  with the deviation over the seeds as a bar. A row of one point is a point; but
  the row 'dense' and, on an axis of sparsities, one at 0 are dashed lines
  across, to compare with, which bear their names. Few points that lie far from
  all others are left out, and counted.

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
    across = {}
    for index, name in enumerate(names):
      _draw_row(axes, [row for row in rows if row['row'] == name], name,
                _look(index), scale, published, across)
    _leave_out_failures(axes, rows, published)
    _name_across(axes, across)
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if published:
      axes.plot([], [], linestyle=_DASHES, color=_GREY, marker='o',
                markerfacecolor='white', label='as published')
    if axes.get_legend_handles_labels()[0]:
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


def layer_density(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike,
                  title: str = 'Density of each layer'):
  """Draws how much of each layer is kept, the first row on top.

  The bar of the forward set lies inside that of the backward set, as the sets
  do; a line marks how much of it is on a path from an input to an output.

  Args:
    rows: dicts with `layer`, `forward_density` and perhaps `backward_density`,
      `effective_density`, and `collapsed`.
    path: the PNG file.
    title: stands above it.

  Raises:
    ValueError: if there are no rows, or a fraction is outside [0, 1].
  """
  names = ('forward_density', 'backward_density', 'effective_density')
  _check(rows, names)
  fontsize, height = (9, .26) if len(rows) <= 30 else (7, .17)
  forward, backward, effective = (np.array([
      100 * _number(row.get(name)) for row in rows]) for name in names)

  def draw(figure):
    axes = figure.subplots()
    places = np.arange(len(rows))
    if (backward > forward).any():
      axes.barh(places, backward, height=0.82, color=_PALE_BLUE,
                label='backward: gets a gradient')
    axes.barh(places, forward, height=0.44, color=_BLUE,
              label='forward: is read')
    if np.isfinite(effective).any():
      axes.plot(effective, places, '|', color=_ORANGE, markersize=60 * height,
                markeredgewidth=2, linestyle='', label='on a path')
    widest = np.nanmax([forward, backward])
    for place, row in enumerate(rows):
      shares = list(dict.fromkeys(f'{value[place]:.3g}' for value in (
          forward, backward) if np.isfinite(value[place])))
      text = ' / '.join(shares) + (
          f', {effective[place]:.3g} on a path' if effective[place] < .995 * (
              forward[place]) else '') + (
                  ', collapsed' if row.get('collapsed') else '')
      axes.text(np.nanmax([forward[place], backward[place]]) + .02 * widest,
                place, text, va='center', fontsize=fontsize - 1.5, color=_GREY)
    axes.set_yticks(places, [row['layer'] for row in rows], fontsize=fontsize)
    axes.tick_params(axis='y', length=0)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.3 * widest)
    axes.grid(False, axis='y')
    axes.grid(True, axis='x')
    axes.set_title(title)
    axes.set_xlabel('density (percent of the weights that are kept)')
    # Outside: a layer may reach into any corner.
    figure.legend(loc='outside lower right', ncols=3, handlelength=1.2)
  _save(path, (6.8, 1.3 + height * len(rows)), draw)


def masks(layers: Mapping[str, tuple[np.ndarray, np.ndarray]],
          path: str | os.PathLike, title: str = 'Masks') -> None:
  """Draws the mask of each layer as an image, inputs down, outputs across.

  What is kept and on a path from an input to an output is blue, what is kept
  for nothing orange. Large layers are drawn by the means of squares.

  Args:
    layers: by name, the densities float[inputs, outputs] of what is kept, and
      of what of it is on a path.
    path: the PNG file.
    title: stands above it.

  Raises:
    ValueError: if there are no layers.
  """
  _check(layers, ())
  columns = min(3, len(layers))

  def draw(figure):
    grid = figure.subplots(-(-len(layers) // columns), columns, squeeze=False)
    for axes in grid.flat[len(layers):]:
      axes.axis('off')
    for axes, (name, (kept, on_path)) in zip(grid.flat, layers.items()):
      most = max(kept.max(), 1e-9)
      pixels = (1 - (1 - _rgb(_BLUE)) * on_path[..., None] / most
                - (1 - _rgb(_ORANGE)) * (kept - on_path)[..., None] / most)
      axes.imshow(np.clip(pixels, 0, 1), aspect='auto', interpolation='nearest')
      axes.set_title(name, fontsize=8.5, fontweight='normal', pad=4)
      _bare(axes)
    figure.suptitle(title, x=0.01, ha='left')
    figure.supxlabel('inputs down, outputs across; orange: kept, but on no '
                     'path', fontsize=8, color=_GREY)
  _save(path, (6.8, .8 + 1.9 * -(-len(layers) // columns)), draw)


def receptive_fields(fields: np.ndarray, read: np.ndarray | None,
                     path: str | os.PathLike,
                     title: str = 'What the first layer reads') -> None:
  """Draws the weights of units on the image that they read.

  Args:
    fields: float[units, height, width], the weights; zeros are white.
    read: float[height, width], how many units read each pixel; None to leave
      that panel out.
    path: the PNG file.
    title: stands above it.

  Raises:
    ValueError: if there are no units.
  """
  if not len(fields):
    raise ValueError(f'`fields` (of shape {fields.shape}) must not be empty.')
  rows = 3 if len(fields) > 8 else 1
  columns = -(-len(fields) // rows)

  def draw(figure):
    left, right = (figure.subfigures(1, 2, width_ratios=(1, 2.2))
                   if read is not None else (None, figure.subfigures(1, 1)))
    if read is not None:
      axes = left.subplots()
      image = axes.imshow(read, cmap='Blues', vmin=0)
      axes.set_title('units that read a pixel', fontsize=8.5,
                     fontweight='normal', pad=4)
      _bare(axes)
      left.colorbar(image, ax=axes, shrink=.7).outline.set_visible(False)
    grid = right.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(fields):]:
      axes.axis('off')
    for axes, field in zip(grid.flat, fields):
      most = abs(field).max() or 1.
      axes.imshow(field, cmap='RdBu_r', vmin=-most, vmax=most)
      _bare(axes)
    right.supxlabel('weights of single units: red positive, blue negative, '
                    'white zero', fontsize=8, color=_GREY)
    figure.suptitle(title, x=0.01, ha='left')
  _save(path, (8.2, 3.3 if rows > 1 else 2.2), draw)


# ------------------------------------------------------------------- panels


def _draw_metric(axes, rows, metric):
  scale, unit = METRICS[metric].scale, METRICS[metric].unit
  step, value = _series(rows, f'train_{metric}')
  if step.size:
    axes.plot(step, scale * value, color=_BLUE, alpha=0.22, linewidth=0.8)
    axes.plot(step, scale * _running_mean(value), color=_BLUE, linewidth=1.8,
              label='train, running mean', **_marked_if_single(step))
  step, value = _series(rows, f'test_{metric}')
  if step.size:
    label = f'test, {scale * value[-1]:.4g}{unit} at the end'
    axes.plot(step, scale * value, color=_ORANGE, linewidth=1.2, marker='o',
              markersize=4.5, markeredgecolor='white', markeredgewidth=0.6,
              label=label, zorder=3)
  axes.set_ylabel(METRICS[metric].label + (f' ({unit})' if unit else ''))


def _draw_churn(axes, rows, _):
  step, mean = _series(rows, 'churn_mean')
  low, high = _series(rows, 'churn_min'), _series(rows, 'churn_max')
  if low[0].size and np.array_equal(low[0], high[0]):
    axes.fill_between(low[0], 100 * low[1], 100 * high[1], color=_GREEN,
                      alpha=0.18, linewidth=0, label='least to most, of layers')
  axes.plot(step, 100 * mean, color=_GREEN, linewidth=1.6, marker='o',
            markersize=2.6 if step.size < 80 else 0, label='mean of layers')
  axes.set_ylim(0, max(axes.get_ylim()[1], 1.))
  axes.set_ylabel('mask churn (%)')


def _draw_density(axes, rows, _):
  """Nominal density, and what of it is on a path; logarithmic if both fall."""
  step, sparsity = _series(rows, 'sparsity')
  axes.plot(step, 100 * (1 - sparsity), color=_BLUE, linewidth=1.6,
            label='kept', **_marked_if_single(step))
  lowest = 1 - sparsity.max()
  step, effective = _series(rows, 'effective_sparsity')
  if step.size:
    axes.plot(step, 100 * (1 - effective), color=_ORANGE, linewidth=1.2,
              marker='o', markersize=4, markeredgecolor='white',
              markeredgewidth=.6, label='on a path', zorder=3)
    lowest = min(lowest, 1 - effective.max())
  if lowest > 0 and (1 - sparsity).max() > 5 * lowest:
    axes.set_yscale('log')
    axes.yaxis.set_major_formatter(_format_percent)
  else:
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
  axes.set_ylabel('density (%)')


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


def _draw_row(axes, rows, name, look, scale, published, across):
  """One line of a table; `across` gets the places of lines to compare with."""
  colour, marker = look
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
    axes.text(1., 1.02, f'{values.size - kept.size} of {values.size} points '
              'lie outside', transform=axes.transAxes, color=_GREY, ha='right',
              va='bottom')


# ------------------------------------------------------------------- values


def _points(rows, x, y):
  """(place, value, deviation) of rows that have them, from left to right."""
  return sorted((row[x], row[y], row.get('deviation') or 0.) for row in rows
                if row.get(x) is not None and row.get(y) is not None)


def _check(rows, names):
  if not rows:
    raise ValueError(f'rows (={rows}) must not be empty')
  for row in rows if names else ():
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
  half = values.size // 100
  window = np.ones(2 * half + 1)
  return (np.convolve(values, window, 'same')
          / np.convolve(np.ones(values.size), window, 'same'))


def _marked_if_single(step):
  """A line of one point is none, and needs a marker."""
  return {'marker': 'o', 'markersize': 4} if step.size == 1 else {}


def _look(index):
  return (_COLOURS[index % len(_COLOURS)],
          _MARKERS[(index + index // len(_COLOURS)) % len(_MARKERS)])


def _rgb(colour):
  return np.array([int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)])


def _bare(axes):
  """An image without ticks in a thin frame."""
  axes.set(xticks=[], yticks=[])
  axes.grid(False)
  for side in axes.spines.values():
    side.set(visible=True, linewidth=.5)


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
