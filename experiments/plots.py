"""Pictures of a run, of a comparison, and of where the weights are.

Every function takes rows (dicts), writes one PNG, whole or not at all, and
leaves matplotlib's global state alone. Accuracies, churn and densities are
fractions in the rows and percent in the pictures; what else is measured stands
in `METRICS`. The colours are those of
Okabe and Ito, chosen to be told apart by colour-blind readers; methods differ
in marker as well.
"""

import collections
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


class Metric(NamedTuple):
  """What is measured, and how it is drawn."""

  label: str
  scale: float = 1.  # From rows to pictures.
  unit: str = ''
  higher_is_better: bool = False


METRICS = {'accuracy': Metric('accuracy', 100., '%', True),
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


def against_sparsity(rows: Sequence[Mapping[str, Any]],
                     path: str | os.PathLike, title: str,
                     what: str = 'weights', metric: str = 'accuracy'):
  """Draws a line for each method, and a dashed one where nothing is sparse.

  The axis is logarithmic in density, so that 80, 90, 95 and 98 percent stand
  apart.

  Args:
    rows: dicts with `method`, `sparsity` in [0, 1), the metric, and perhaps
      `<metric>_std`, drawn as an error bar. Methods take colour and marker in
      order of appearance. A row of sparsity 0 is a reference, not a point.
    path: the PNG file.
    title: stands above it.
    what: whose sparsity it is, for the axis.
    metric: a name in `METRICS`.

  Raises:
    ValueError: if there are no rows, or a fraction is outside [0, 1].
  """
  _check(rows, ('sparsity', *_fractions(metric, f'{metric}_std')))
  lines, references = _by_method(rows)

  def draw(figure):
    axes = figure.subplots()
    ends = [_draw_method(axes, index, points, metric)
            for index, points in enumerate(lines.values())]
    _leave_out_failures(axes, rows, metric)
    _draw_references(axes, references, metric)
    axes.set_title(title)
    axes.set_xlabel(f'sparsity (percent of the {what} that are zero)')
    axes.set_ylabel(f'test {_label(metric)}')
    _scale_sparsity(axes, lines)
    _label_ends(axes, list(lines), ends, references, metric)
  _save(path, (6.8, _height(rows)), draw)


def against_flops(rows: Sequence[Mapping[str, Any]],
                  path: str | os.PathLike, title: str,
                  metric: str = 'accuracy'):
  """Draws a metric against the FLOPs of training: what each method buys.

  As Top-KAST's figure 2: of accuracies, what lies above and to the left is
  better.

  Args:
    rows, path, title, metric: as of `against_sparsity`; rows also have
      `training_multiplier`, the FLOPs as a fraction of dense training.

  Raises:
    ValueError: if there are no rows, or a fraction is outside [0, 1].
  """
  _check(rows, ('sparsity', *_fractions(metric, f'{metric}_std')))
  lines, references = {}, []
  for row in rows:
    if row['training_multiplier'] == 1:
      references.append(row)
    else:
      lines.setdefault(row['method'], []).append(row)

  def draw(figure):
    from matplotlib import ticker
    axes = figure.subplots()
    shares = [row['training_multiplier'] for row in rows if row not in
              references] or [1.]
    axes.set_xlim(min(shares) / 1.2, max(shares) * 1.2)
    axes.set_xscale('log')
    for index, (name, points) in enumerate(lines.items()):
      _draw_method(axes, index, points, metric, 'training_multiplier', name)
    _leave_out_failures(axes, rows, metric)
    _draw_references(axes, references, metric)
    axes.set_title(title)
    axes.set_xlabel('theoretical FLOPs of training, as a fraction of dense')
    axes.set_ylabel(f'test {_label(metric)}')
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.xaxis.set_major_formatter(_format_percent)
    if lines:
      axes.legend(loc='center left', bbox_to_anchor=(1.01, .5))
  _save(path, (6.8, _height(rows)), draw)


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


def _draw_references(axes, references, metric):
  for row in references:
    axes.axhline(METRICS[metric].scale * row[metric], color=_GREY,
                 linestyle=(0, (4, 3)), linewidth=1, zorder=1)


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


def _height(rows):
  """Inches of a picture beside whose axes every method is named."""
  return max(4.2, .7 + .22 * len({row['method'] for row in rows}))


def _leave_out_failures(axes, rows, metric):
  """Ends the axis before runs that are far worse than others, and says so."""
  up = 1 if METRICS[metric].higher_is_better else -1
  values = up * METRICS[metric].scale * np.array([row[metric] for row in rows])
  low, high = np.quantile(values, (.25, .75))
  floor = low - 4 * max(high - low, .005 * abs(values.max()))
  failed = values < floor
  if failed.any():
    best = values.max()
    axes.set_ylim(sorted([up * floor, up * (best + .08 * (best - floor))]))
    axes.text(1., 1.02, f'{failed.sum()} of {failed.size} points lie '
              f'{"below" if up > 0 else "above"}', transform=axes.transAxes,
              color=_GREY, ha='right', va='bottom')


def _draw_method(axes, index, points, metric, across=None, label=None):
  """Draws one line over a value or the density; returns its right end."""
  colour, marker = _look(index)
  points = sorted(points, key=lambda row: row[across or 'sparsity'])
  x = [row[across] if across else 1 - row['sparsity'] for row in points]
  scale = METRICS[metric].scale
  y = [scale * row[metric] for row in points]
  error = [scale * (row.get(f'{metric}_std') or 0.) for row in points]
  axes.errorbar(x, y, error if any(error) else None, color=colour,
                marker=marker, markeredgecolor='white', markeredgewidth=0.6,
                linewidth=1.5, elinewidth=1, capsize=2.5,
                zorder=3, label=label)
  return x[-1], y[-1]


def _scale_sparsity(axes, lines):
  from matplotlib import ticker
  found = [1 - row['sparsity'] for points in lines.values() for row in points]
  if not found:
    return
  # Before the scale: one density alone has no range to scale.
  axes.set_xlim(max(found) * 1.12, min(found) / 1.12)
  axes.set_xscale('log')
  axes.xaxis.set_major_locator(ticker.FixedLocator(_apart(found)))
  axes.xaxis.set_minor_locator(ticker.NullLocator())
  axes.xaxis.set_major_formatter(lambda d, _: f'{100 * (1 - d):.3g}%')


def _apart(densities, gap=0.07):
  """Those that leave room for their labels, the most frequent first."""
  room = gap * math.log(1.12**2 * max(densities) / min(densities))
  kept = []
  for density, _ in collections.Counter(densities).most_common():
    if all(abs(math.log(density / other)) >= room for other in kept):
      kept.append(density)
  return kept


def _label_ends(axes, names, ends, references, metric):
  """Writes each name at the height where its line ends, or close to it."""
  axes.set_ylim(axes.get_ylim())  # Settled: it would move while drawing.
  to_axes = axes.transData + axes.transAxes.inverted()
  starts = [to_axes.transform(end) for end in ends]
  scale = METRICS[metric].scale
  starts += [(1., to_axes.transform((1., scale * row[metric]))[1])
             for row in references]
  looks = [_look(i) for i in range(len(names))]
  looks += [(_GREY, '')] * len(references)
  names = names + [row['method'] for row in references]
  place = {'transform': axes.transAxes, 'clip_on': False, 'zorder': 1}
  starts = [(x, max(y, 0.)) for x, y in starts]
  inside = [i for i, (x, _) in enumerate(starts) if x < .9]
  gap = .22 / axes.figure.get_figheight()
  for i, height in _beside(inside, starts, .85 * gap):
    # A line that ends early is named where it ends.
    axes.text(starts[i][0], min(height, 1 - gap), f' {names[i]}',
              color=looks[i][0], va='bottom', transform=axes.transAxes)
  kept = [i for i in range(len(names)) if i not in inside]
  heights = _spread([starts[i][1] for i in kept], gap)
  for i, height in zip(kept, heights):
    name, (colour, marker), (x, y) = names[i], looks[i], starts[i]
    axes.plot([x, 1.025], [y, height], color=colour, linewidth=0.8, **place)
    axes.plot([1.04], [height], color=colour, marker=marker, **place)
    axes.text(1.062 if marker else 1.033, height, name, color=colour,
              va='center', transform=axes.transAxes)


def _beside(indices, starts, gap, near=0.1):
  """(index, height of its name): names that are near stand above each other."""
  order = sorted(indices, key=lambda i: starts[i][0])
  groups = []
  for i in order:
    if groups and starts[i][0] - starts[groups[-1][-1]][0] < near:
      groups[-1].append(i)
    else:
      groups.append([i])
  for group in groups:
    yield from zip(group, _spread([starts[i][1] for i in group], gap))


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


def _by_method(rows):
  """Sparse rows by method, and the dense rows."""
  lines, references = {}, []
  for row in rows:
    if row['sparsity'] == 0:
      references.append(row)
    else:
      lines.setdefault(row['method'], []).append(row)
  return lines, references


def _spread(heights, gap):
  """Moves heights apart to at least `gap`, keeping order, as little as may be.

  Neighbours that are too close form a group, which is centred on its members.
  """
  order = sorted(range(len(heights)), key=heights.__getitem__)
  groups = []
  for index in order:
    groups.append([index])
    while len(groups) > 1 and (
        _centre(groups[-1], heights) - _centre(groups[-2], heights)
        < gap * (len(groups[-1]) + len(groups[-2])) / 2):
      last = groups.pop()
      groups[-1] += last
  moved = [0.] * len(heights)
  for group in groups:
    for place, index in enumerate(group):
      moved[index] = (_centre(group, heights)
                      + gap * (place - (len(group) - 1) / 2))
  return moved


def _centre(group, heights):
  return sum(heights[index] for index in group) / len(group)


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
