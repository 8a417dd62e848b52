"""Pictures of a run: by step, of its layers, its masks, and single units.

Every function takes plain rows or arrays and writes one PNG at `path` under a
`title`, as those of `plots` do. Accuracies, churn and densities are fractions
in the rows and percent in the pictures.
"""

from collections.abc import Mapping, Sequence
import os
from typing import Any

import numpy as np

from experiments import plots


def training_curves(rows: Sequence[Mapping[str, Any]],
                    path: str | os.PathLike, title: str,
                    metric: str = 'accuracy'):
  """Draws a metric, how much the masks change, and what is left, by step.

  There is no panel of what all rows lack; missing values and nan are gaps.
  """
  plots.check(rows)
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
    found[-1].xaxis.set_major_formatter('{x:,.0f}')
    found[-1].set_xlim(0, 1.02 * max(row['step'] for row in rows))
  plots.save(path, (6.4, 1.6 + 1.75 * len(panels)), draw)


def layer_density(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike,
                  title: str = 'Density of each layer'):
  """Draws how much of each layer is kept, the first row on top.

  The bar of the forward set lies inside that of the backward set; a line marks
  how much of it is on a path from an input to an output.
  """
  plots.check(rows)
  fontsize, height = (9, .26) if len(rows) <= 30 else (7, .17)
  forward, backward, effective = (
      100 * np.array([row.get(f'{name}_density') for row in rows], float)
      for name in ('forward', 'backward', 'effective'))

  def draw(figure):
    axes = figure.subplots()
    places = np.arange(len(rows))
    if (backward > forward).any():
      axes.barh(places, backward, height=0.82, color=plots.PALE_BLUE,
                label='backward: gets a gradient')
    axes.barh(places, forward, height=0.44, color=plots.BLUE,
              label='forward: is read')
    if np.isfinite(effective).any():
      axes.plot(effective, places, '|', color=plots.ORANGE, linestyle='',
                markersize=60 * height, markeredgewidth=2, label='on a path')
    widest = np.nanmax([forward, backward])
    for place, row in enumerate(rows):
      shares = list(dict.fromkeys(f'{value[place]:.3g}' for value in (
          forward, backward) if np.isfinite(value[place])))
      text = ' / '.join(shares) + (
          f', {effective[place]:.3g} on a path' if effective[place] < .995 * (
              forward[place]) else '') + (
                  ', collapsed' if row.get('collapsed') else '')
      axes.text(np.nanmax([forward[place], backward[place]]) + .02 * widest,
                place, text, va='center', fontsize=fontsize - 1.5,
                color=plots.GREY)
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
  plots.save(path, (6.8, 1.3 + height * len(rows)), draw)


def masks(layers: Mapping[str, tuple[np.ndarray, np.ndarray]],
          path: str | os.PathLike, title: str = 'Masks') -> None:
  """Draws the mask of each layer as an image, inputs down, outputs across.

  What is kept and on a path from an input to an output is blue, what is kept
  for nothing orange. `layers` has by name the densities float[inputs, outputs],
  of squares where a layer is large, of what is kept and of what is on a path.
  """
  plots.check(layers)
  columns = min(3, len(layers))

  def draw(figure):
    from matplotlib import colors
    blue, orange = map(np.array, map(colors.to_rgb, (plots.BLUE, plots.ORANGE)))
    grid = figure.subplots(-(-len(layers) // columns), columns, squeeze=False)
    for axes in grid.flat[len(layers):]:
      axes.axis('off')
    for axes, (name, (kept, on_path)) in zip(grid.flat, layers.items()):
      most = max(kept.max(), 1e-9)
      pixels = (1 - (1 - blue) * on_path[..., None] / most
                - (1 - orange) * (kept - on_path)[..., None] / most)
      axes.imshow(np.clip(pixels, 0, 1), aspect='auto', interpolation='nearest')
      axes.set_title(name, fontsize=8.5, fontweight='normal', pad=4)
      _bare(axes)
    figure.suptitle(title, x=0.01, ha='left')
    figure.supxlabel('inputs down, outputs across; orange: kept, but on no '
                     'path', fontsize=8, color=plots.GREY)
  plots.save(path, (6.8, .8 + 1.9 * -(-len(layers) // columns)), draw)


def receptive_fields(fields: np.ndarray, read: np.ndarray | None,
                     path: str | os.PathLike,
                     title: str = 'What the first layer reads') -> None:
  """Draws the weights of units, float[units, height, width], as images.

  `read` float[height, width] says how many units read each pixel; None leaves
  that panel out.
  """
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
                    'white zero', fontsize=8, color=plots.GREY)
    figure.suptitle(title, x=0.01, ha='left')
  plots.save(path, (8.2, 3.3 if rows > 1 else 2.2), draw)


def neuron(unit, path: str | os.PathLike) -> None:
  """Draws a Neuron of experiments.language.neurons: three lists of bars."""
  lists = (('channels read', unit.channels[:16]), ('tokens read', unit.reads),
           ('tokens written', unit.writes))

  def draw(figure):
    figure.suptitle(f'layer {unit.layer}, unit {unit.number}: '
                    f'{len(unit.channels)} weights in')
    for axes, (title, pairs) in zip(figure.subplots(1, 3), lists):
      places = range(len(pairs))
      axes.barh(places, [value for _, value in pairs], color=plots.BLUE)
      axes.set_yticks(places, [name.replace('$', r'\$') for name, _ in pairs])
      axes.invert_yaxis()
      axes.set_title(title)
  plots.save(path, (7.5, 3.2), draw)


def _draw_metric(axes, rows, metric):
  scale, unit = plots.METRICS[metric].scale, plots.METRICS[metric].unit
  step, value = _series(rows, f'train_{metric}')
  if step.size:
    axes.plot(step, scale * value, color=plots.BLUE, alpha=0.22, linewidth=0.8)
    # A line of one point is none, and needs a marker.
    axes.plot(step, scale * _running_mean(value), color=plots.BLUE,
              linewidth=1.8, marker='o' if step.size == 1 else '', markersize=4,
              label='train, running mean')
  step, value = _series(rows, f'test_{metric}')
  if step.size:
    label = f'test, {scale * value[-1]:.4g}{unit} at the end'
    axes.plot(step, scale * value, color=plots.ORANGE, linewidth=1.2,
              marker='o', markersize=4.5, markeredgecolor='white',
              markeredgewidth=0.6, label=label, zorder=3)
  axes.set_ylabel(plots.METRICS[metric].label + (f' ({unit})' if unit else ''))


def _draw_churn(axes, rows, _):
  step, mean = _series(rows, 'churn_mean')
  low, high = _series(rows, 'churn_min'), _series(rows, 'churn_max')
  if low[0].size and np.array_equal(low[0], high[0]):
    axes.fill_between(low[0], 100 * low[1], 100 * high[1], color=plots.GREEN,
                      alpha=0.18, linewidth=0, label='least to most, of layers')
  axes.plot(step, 100 * mean, color=plots.GREEN, linewidth=1.6, marker='o',
            markersize=2.6 if step.size < 80 else 0, label='mean of layers')
  axes.set_ylim(0, max(axes.get_ylim()[1], 1.))
  axes.set_ylabel('mask churn (%)')


def _draw_density(axes, rows, _):
  """Nominal density, and what of it is on a path; logarithmic if both fall."""
  step, sparsity = _series(rows, 'sparsity')
  axes.plot(step, 100 * (1 - sparsity), color=plots.BLUE, linewidth=1.6,
            marker='o' if step.size == 1 else '', markersize=4, label='kept')
  lowest = 1 - sparsity.max()
  step, effective = _series(rows, 'effective_sparsity')
  if step.size:
    axes.plot(step, 100 * (1 - effective), color=plots.ORANGE, linewidth=1.2,
              marker='o', markersize=4, markeredgecolor='white',
              markeredgewidth=.6, label='on a path', zorder=3)
    lowest = min(lowest, 1 - effective.max())
  if lowest > 0 and (1 - sparsity).max() > 5 * lowest:
    axes.set_yscale('log')
    axes.yaxis.set_major_formatter('{x:g}')
  else:
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
  axes.set_ylabel('density (%)')


def _series(rows, name):
  """Steps and values where there is a value, in order of step."""
  pairs = np.array([(row['step'], row.get(name)) for row in rows], float)
  pairs = pairs[~np.isnan(pairs[:, 1])]
  return pairs[pairs[:, 0].argsort()].T


def _running_mean(values):
  """The mean over a window of a fiftieth of the run, narrower at its ends."""
  window = np.ones(2 * (values.size // 100) + 1)
  return (np.convolve(values, window, 'same')
          / np.convolve(np.ones(values.size), window, 'same'))


def _bare(axes):
  """An image without ticks in a thin frame."""
  axes.set(xticks=[], yticks=[])
  axes.grid(False)
  for side in axes.spines.values():
    side.set(visible=True, linewidth=.5)
