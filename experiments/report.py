"""What a finished run leaves: result.json, pictures, and a page to show.

`report.html` holds its pictures itself, so that one file can be sent around.
"""

import base64
from collections.abc import Mapping, Sequence
import functools
import html
import itertools
import math
import os
import statistics
import string
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sparse_jax
from sparse_jax import trees
from sparse_jax.cost import effective
from sparse_jax.jaxprs import products
from experiments import accounting
from experiments import devices
from experiments import files
from experiments import optimization
from experiments import pictures
from experiments import plots
from experiments import reporting
from experiments import results
from experiments import tasks

# A picture has so many masks and units at most, and a mask so many squares.
_MOST_LAYERS, _MOST_UNITS, _MOST_SQUARES = 12, 24, 320


def followed(run) -> tuple[Any, Any]:
  """The model of a run as a function, and its inputs, as shapes.

  `fn(weights, inputs)` is the prediction alone. The function is one value for
  the whole run, so that it is compiled once.
  """
  shapes = run.init.out_info
  apply, inputs = run.apply(shapes._replace(model_state=jax.tree.map(
      lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes.model_state)))
  return (lambda weights, given: jax.tree.leaves(apply(weights, given))[0],
          inputs)


def summarize(run, state: tasks.TrainState, model=None) -> sparse_jax.Summary:
  """The summary of a state; with `model`, of `followed`, what is on a path."""
  fn, inputs = (None, ()) if model is None else (model[0], (model[1],))
  return sparse_jax.summarize(state.params, state.opt_state, run.task.method,
                              fn=fn, inputs=inputs)


def mask_metrics(summary: sparse_jax.Summary) -> dict[str, float]:
  """Sparsity, and how the masks moved at the last refresh, over the layers."""
  churn = [row.churn for row in summary.rows if row.sparse]
  if not churn:
    return {}
  found = {'sparsity': summary.sparsity, 'churn_min': min(churn),
           'churn_mean': sum(churn) / len(churn), 'churn_max': max(churn),
           'ever_active': summary.total.ever_active,
           'flipped': summary.total.flipped,
           'dead_units': summary.total.dead_outputs,
           'collapsed_layers': len(summary.collapsed)}
  if summary.effective_sparsity is not None:
    found['effective_sparsity'] = summary.effective_sparsity
  return found


def report(binary, run, state: tasks.TrainState, model,
           measured: Mapping[str, float]) -> dict[str, Any]:
  """Draws the pictures, then writes result.json, which ends the run.

  `model` is that of `followed`, or None to leave out what is on a path,
  `measured` has the results of the last evaluation. Returns what result.json
  holds.
  """
  shapes = weight_shapes(run, state)
  fn, inputs = model or followed(run)
  paths = list(dict.fromkeys(filter(None, (
      use.path for use in products.find_products(fn, shapes, inputs)))))
  # Rows in the network's order: that in which it uses its layers.
  layers = list(dict.fromkeys(path.rpartition('/')[0] for path in paths))
  place = {layer: index for index, layer in enumerate(layers)}
  summary = summarize(run, state, model)
  summary = summary._replace(rows=tuple(sorted(
      summary.rows, key=lambda row: place.get(row.path.rpartition('/')[0],
                                              len(layers)))))
  apply, one = run.apply(state)
  optimizer = optimization.make(run.values, run.train_steps)
  cost = accounting.figures(
      apply, shapes, one, run.task.method, summary, run.train_steps,
      state.opt_state,
  ) | accounting.held(shapes, state.params, state.opt_state, optimizer)
  result = {
      **measured, 'sparsity': summary.sparsity if summary.total.sparse else 0.,
      'effective_sparsity': summary.effective_sparsity,
      'collapsed': list(summary.collapsed),
      'backward_density': summary.total.backward_density,
      'ever_active': summary.total.ever_active,
      'parameters': sum(row.entries for row in summary.rows),
      'steps': int(state.step), 'program': binary.name,
      'flags': dict(run.values),
      'layers': summary.as_dicts(), 'cost': cost}
  image_shape = getattr(inputs, 'shape', (1,))[1:]
  seen = look(run, state, model, paths, len(image_shape) == 3)
  if jax.process_index() == 0:
    rows = reporting.read_jsonl(os.path.join(run.workdir, 'metrics.jsonl'))
    unit, per_step = run.units
    result[f'{unit}_per_second'] = speed(rows, per_step)
    draw(binary, result, rows, seen, image_shape, run.workdir)
    reporting.write_json(os.path.join(run.workdir, results.NAME), result)
  return result


def weight_shapes(run, state: tasks.TrainState) -> Any:
  """Shapes of the weights as dense arrays."""
  return jax.eval_shape(
      functools.partial(sparse_jax.dense_weights, run.task.method),
      state.params, state.opt_state)


def speed(rows, per_step: int) -> float | None:
  """Units a second, the median over the times between rows of metrics.

  So neither compiling nor an interruption counts, nor a rare evaluation.
  """
  rates = [per_step * (row['step'] - before['step'])
           / max(row['time'] - before['time'], 1e-3)  # Times are in ms.
           for before, row in itertools.pairwise(rows)]
  return statistics.median(rates) if rates else None


def look(run, state: tasks.TrainState, model, paths: Sequence[str],
         is_image: bool) -> dict[str, Any]:
  """What is drawn of masks and weights, small enough for any host.

  `masks`: by layer, in the network's order, densities of squares of what is
  kept and of what is on a path; of an image classifier `first`: its first
  kernel.
  """
  sparse = sparse_jax.get_state(state.opt_state)
  leaves = {path: sparse.plan.by_path[path] for path in paths
            if path in sparse.plan.by_path}
  places = np.linspace(0, len(leaves) - 1, min(_MOST_LAYERS, len(leaves)))
  chosen = [list(leaves)[i] for i in dict.fromkeys(places.round().astype(int))]
  kept = sparse.forward_masks
  on_path = kept if model is None or not leaves else effective.on_path(
      model[0], kept, weight_shapes(run, state), (model[1],))
  kept, on_path = map(trees.leaves_by_path, (kept, on_path))

  @functools.partial(jax.jit, out_shardings=devices.replicated(run.mesh))
  def gather(kept, on_path, params, opt_state):
    found = {'masks': {path: tuple(squares(leaves[path].layout, mask[path])
                                   for mask in (kept, on_path))
                       for path in chosen}}
    if is_image:
      found['first'] = trees.leaves_by_path(sparse_jax.dense_weights(
          run.task.method, params, opt_state))[paths[0]]
    return found

  found = jax.device_get(gather({path: kept[path] for path in chosen},
                                {path: on_path[path] for path in chosen},
                                state.params, state.opt_state))
  return found | {'masks': {path: found['masks'][path] for path in chosen}}


def squares(layout, mask: jax.Array) -> jax.Array:
  """The density of a mask in squares, float32[inputs, outputs]."""
  view = layout.view(mask).astype(jnp.float32)
  view = view[(0,) * len(layout.stacked)].reshape(-1, view.shape[-1])
  side = -(-max(view.shape) // _MOST_SQUARES)
  rows, columns = (-(-size // side) for size in view.shape)
  widths = [(0, count * side - size)
            for count, size in zip((rows, columns), view.shape)]
  parts = [jnp.pad(array, widths).reshape(rows, side, columns, side).sum((1, 3))
           for array in (view, jnp.ones_like(view))]
  return parts[0] / parts[1]


def fields(kernel: np.ndarray, image_shape: Sequence[int]
           ) -> tuple[np.ndarray, np.ndarray | None]:
  """Units of a first layer as images, those of the largest weights first.

  The kernel, float[inputs, units] of a Dense or float[h, w, channels, units],
  becomes float[units, height, width], the mean over channels. Also how many
  units read each pixel, of a Dense.
  """
  if dense := kernel.ndim == 2:
    kernel = kernel.reshape(*image_shape, kernel.shape[-1])
  order = np.argsort(-np.square(kernel).sum((0, 1, 2)))[:_MOST_UNITS]
  read = (kernel != 0).any(2).sum(-1) if dense else None
  return kernel[..., order].mean(2).transpose(2, 0, 1), read


def draw(binary, result: Mapping[str, Any], rows, seen: Mapping[str, Any],
         image_shape: Sequence[int], workdir: str) -> None:
  """The run by step, its layers, their masks, the first one; and the page."""
  at = lambda name: os.path.join(workdir, f'{name}.png')
  pictures.training_curves(rows, at('training'), title(result),
                           binary.metric(result['flags']))
  rows = [{'layer': layer['path'], **layer} for layer in result['layers'][:-1]
          if layer['sparse']]
  pictures.layer_density(rows or [{'layer': 'all', 'forward_density': 1.}],
                         at('layers'))
  if seen['masks']:
    pictures.masks(seen['masks'], at('masks'))
  kernel = seen.get('first')
  if kernel is not None and (kernel.ndim == 4 or kernel.ndim == 2 and
                             len(kernel) == math.prod(image_shape)):
    pictures.receptive_fields(*fields(kernel, image_shape), at('first_layer'))
  files.write_text(os.path.join(workdir, 'report.html'),
                   page(binary, result, workdir))


def show(binary, result: Mapping[str, Any], workdir: str) -> None:
  """Prints the table of layers and the last line."""
  print(layers(result))
  print(' '.join(measured(binary, result)) + f', sparsity '
        f'{result["sparsity"]:.2%}, {result["steps"]} steps')
  cost = result['cost']
  print(f'theoretical FLOPs of dense: {cost["training_multiplier"]:.2%} in '
        f'training, {cost["inference_multiplier"]:.2%} in inference')
  print(f'pictures and metrics: {workdir}, to show: '
        f'{os.path.join(workdir, "report.html")}', flush=True)


def layers(result: Mapping[str, Any]) -> sparse_jax.Summary:
  """The table of layers."""
  *rows, total = (sparse_jax.summary.Row(**layer) for layer in result['layers'])
  return sparse_jax.Summary(tuple(rows), total)


def title(result: Mapping[str, Any]) -> str:
  values = result['flags']
  return (f'{values["dataset"]}, {values["model"]}, {values["method"]} at '
          f'{result["sparsity"]:.0%} sparsity')


# ------------------------------------------------------------------ the page

_PAGE = string.Template("""\
<!doctype html>
<html lang="en"><meta charset="utf-8"><title>$title</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 52rem;
       margin: 2.5rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.1rem;
     margin-top: 2.2rem } .quiet { color: #666 } img { max-width: 100% }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr));
     gap: .8rem; margin: 1.4rem 0 } dl div { border-top: 3px solid #0072b2;
     padding-top: .3rem } dt { color: #666; font-size: .85rem }
dd { margin: 0; font-size: 1.35rem; font-weight: 600 }
.bad { color: #d55e00 } pre { background: #f5f5f5; padding: .7rem;
      overflow-x: auto; font-size: .85rem }
</style>
<h1>$title</h1><p class="quiet">$subtitle</p>
<dl>$figures</dl>
$warning
$pictures
<h2>Layers</h2>
<pre>$layers</pre>
<p class="quiet">In the order in which the network uses them. Effective is what
is on a path from an input to an output, dead are outputs into which no weight
leads and inputs that none reads.</p>
<h2>Made by</h2><pre>$command</pre>
</html>
""")
_PICTURES = {'training': 'Training', 'layers': 'Density of each layer',
             'masks': 'Masks', 'first_layer': 'First layer'}


def page(binary, result: Mapping[str, Any], workdir: str) -> str:
  """One HTML file with its pictures in it."""
  pictures = []
  for name, alt in _PICTURES.items():
    path = os.path.join(workdir, f'{name}.png')
    if os.path.exists(path):
      with open(path, 'rb') as file:
        data = base64.b64encode(file.read()).decode()
      pictures.append(f'<p><img alt="{alt}" '
                      f'src="data:image/png;base64,{data}"></p>')
  warning = ''
  if result['collapsed']:
    warning = ('<p class="bad">Collapsed, with one row or column left or none: '
               f'{html.escape(", ".join(result["collapsed"]))}.</p>')
  return _PAGE.substitute(
      title=html.escape(title(result)),
      subtitle=html.escape(f'{result["steps"]:,} steps, '
                           f'{result["parameters"]:,} parameters'),
      figures=''.join(f'<div><dt>{html.escape(name)}</dt><dd>{value}</dd></div>'
                      for name, value in figures(binary, result).items()),
      warning=warning, pictures='\n'.join(pictures),
      layers=html.escape(str(layers(result))),
      command=html.escape(command(result)))


def measured(binary, result: Mapping[str, Any]) -> tuple[str, str]:
  """What was measured on the test split in the end, and its value."""
  metric = binary.metric(result['flags'])
  kind = plots.METRICS[metric]
  value = kind.scale * result[f'test_{metric}']
  return f'test {kind.label}', f'{value:.4g}{kind.unit}'


def figures(binary, result: Mapping[str, Any]) -> dict[str, str]:
  """The numbers at the top of the page."""
  cost = result['cost']
  found = dict([measured(binary, result)])
  found['sparsity'] = f'{result["sparsity"]:.2%}'
  if result['effective_sparsity'] is not None:
    found['effective sparsity'] = f'{result["effective_sparsity"]:.2%}'
  return found | {
      'ever active': f'{result["ever_active"]:.1%}',
      'training FLOPs of dense': f'{cost["training_multiplier"]:.1%}',
      'inference FLOPs of dense': f'{cost["inference_multiplier"]:.1%}',
      'weights': f'{cost["weight_bytes"] / 1e3:,.4g} kB'}


def command(result: Mapping[str, Any]) -> str:
  """The command line of a run, its folder and its data's left out."""
  arguments = [f'--{name}={",".join(map(str, value))}' if isinstance(
      value, list) else f'--{name}={value}'
               for name, value in sorted(result['flags'].items())
               if value not in (None, [], '') and name not in ('workdir',
                                                               'data_dir')]
  return ' \\\n    '.join([f'python -m {result["program"]}', *arguments])
