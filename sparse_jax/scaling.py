"""Scales that let one tuning serve every width and every sparsity."""

from collections.abc import Mapping
import math
import re
from typing import Any
from typing import NamedTuple

import jax
import numpy as np

from sparse_jax import checks
from sparse_jax import trees
from sparse_jax.masks import layouts
from sparse_jax.masks import selection
from sparse_jax.rules import state as state_lib


class Scales(NamedTuple):
  """Factors of what was tuned on a dense network of the base's width.

  `supar` makes them and says where each goes.

  Example:
    >>> scales = supar({'kernel': np.ones((8, 8))}, {'kernel': .25})
    >>> scales.init, scales.learning_rate, scales.output
    ({'kernel': 2.0}, {'kernel': 4.0}, 1.0)
  """

  init: trees.PyTree  # float, of the standard deviation of the first weights.
  learning_rate: trees.PyTree  # float, of Adam's.
  output: float  # Of the logits.


def supar(params: trees.PyTree,
          densities: state_lib.SparseMethod | Mapping[trees.Path, Any], *,
          base: trees.PyTree | None = None, output: str | None = None,
          output_scale: float = 1., batch_axes: selection.Axes = (),
          contracting: selection.Axes | None = None) -> Scales:
  """Sparse maximal update parametrisation.

  A sparse layer behaves like one with fewer inputs: with m = (inputs / inputs
  of the base) * density its first weights are scaled by 1 / sqrt(m) and its
  learning rate under Adam by 1 / m; the logits are multiplied by 1 / m of the
  output layer, whose own two factors are 1. Then activations, and how much a
  step changes them, do not depend on width or sparsity, so that a learning rate
  tuned on a small dense network holds for a large sparse one.

  Scale the weights before `start`, `jax.tree.map(jnp.multiply, params,
  scales.init)`, and updates after Adam: `optax.chain(optax.adam(rate),
  transforms.scale_by_leaf(scales.learning_rate))` inside `sparsify`.

  Args:
    params: the model's tree of arrays or shapes.
    densities: a method, whose leaves have the densities that it keeps; or
      `{path: density}`, numbers in (0, 1] or masks, of which the mean counts.
      What it does not name is dense.
    base: the tree of the same model at the width that was tuned; None: this
      width, so that only densities count.
    output: a regular expression of the output layer's path; None: there is
      none among the parameters, or the logits are left as they are.
    output_scale: the paper's alpha, another factor of the logits, above 0.
    batch_axes, contracting: as in `static`; of sparse leaves a method's own.

  Returns:
    Scales; biases and norms, of heads and of stacked layers too, and tables
    that are looked up have factors of 1.

  Raises:
    ValueError: naming the argument that does not fit.

  Example:
    >>> import sparse_jax
    >>> shapes = {name: jax.ShapeDtypeStruct((8, 8), np.float32)
    ...           for name in ('hidden', 'head')}
    >>> method = sparse_jax.static(.75, is_sparse={'head': False})
    >>> supar(shapes, method, output='head').init
    {'head': 1.0, 'hidden': 2.0}

  Reference:
    Dey et al., Sparse maximal update parameterization, 2024,
    https://arxiv.org/abs/2405.15743, table 1; branch `supar` of
    https://github.com/EleutherAI/nanoGPT-mup. Both speak of hidden layers, of
    one density; here each leaf has its own, a sparse first or last layer too.
    Their factor of the logits has the width alone, since that layer is dense.
  """
  if checks.check_non_negative('output_scale', output_scale) == 0:
    raise ValueError(f'`output_scale` (={output_scale!r}) must be above 0.')
  selection.check_axes('batch_axes', batch_axes)
  if contracting is not None:
    selection.check_axes('contracting', contracting)
  leaves = trees.leaves_by_path(params)
  kept, rows = _kept(params, densities, leaves)
  small = leaves if base is None else trees.leaves_by_path(base)
  last = [path for path in leaves if output is not None
          and leaves[path].ndim > 1 and re.search(output, path)]
  for path, leaf in leaves.items():
    if path not in rows:
      rows[path] = _rows(path, leaf, batch_axes, contracting, path in last)
  inputs = {path: _ratio(path, leaf, small, rows[path]) * kept.get(path, 1.)
            for path, leaf in leaves.items()}
  if output is not None and len({inputs[path] for path in last}) != 1:
    raise ValueError(f'`output` (={output!r}) must be found in the path of one '
                     f'kernel, not in {last}.')

  def scales(power):
    return trees.map_leaves(
        lambda path, _: 1. if path in last else inputs[path]**power, params)

  return Scales(scales(-.5), scales(-1.),
                output_scale / (inputs[last[0]] if last else 1.))


def _kept(params, densities, leaves):
  """{path: density} of the sparse leaves, {path: axes that contract}."""
  if isinstance(densities, state_lib.SparseMethod):
    shapes = jax.eval_shape(lambda: jax.tree.map(
        lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), params))
    plan = jax.eval_shape(densities.init, densities.parametrize(shapes)).plan
    own = plan.by_path
    return ({path: leaf.layout.share(leaf.count) for path, leaf in own.items()},
            {path: leaf.layout.rows for path, leaf in own.items()})
  kept = {path: float(np.mean(value)) for path, value in
          trees.leaves_by_path(densities).items()}
  for path, density in kept.items():
    if path not in leaves or not 0 < density <= 1:
      raise ValueError(f'`densities` (={density!r} at {path!r}) must be in '
                       f'(0, 1], of leaves of {sorted(leaves)}.')
  return kept, {}


def _rows(path, leaf, batch_axes, contracting, is_last) -> tuple[int, ...]:
  """The axes of a leaf that its product sums over; of no kernel none."""
  stacked = selection.batch_axes_of(batch_axes, path, leaf)
  given = None if contracting is None else selection.axes_of(
      contracting, path, leaf, 'contracting')
  if given is None and not is_last and not selection.is_kernel(path, leaf,
                                                               stacked):
    return ()
  return layouts.layout(leaf.shape, path=path, batch_axes=stacked,
                        contracting=given).rows


def _ratio(path, leaf, small, axes) -> float:
  """Inputs of a kernel over those of its namesake in the base."""
  if leaf.ndim < 2:
    return 1.
  if path not in small or small[path].ndim != leaf.ndim:
    raise ValueError(f'`base` must have {path!r}, with {leaf.ndim} axes.')
  return math.prod(leaf.shape[axis] / small[path].shape[axis] for axis in axes)


def iso_flop_width(width: int, sparsity: float, *, multiple_of: int = 1) -> int:
  """The width at which a sparse network does the products of a dense one.

  width / sqrt(1 - sparsity): a hidden layer grows in inputs and outputs alike.
  First and last layers grow on one side alone, and cost more than before.

  Args:
    width: of the dense network, at least 1.
    sparsity: in [0, 1).
    multiple_of: what the width must be a multiple of, at least 1.

  Returns:
    The nearest such multiple, at least one.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> iso_flop_width(256, .75), iso_flop_width(256, .9, multiple_of=64)
    (512, 832)

  Reference:
    Thangarasa et al., Sparse iso-FLOP transformations, 2023,
    https://arxiv.org/abs/2303.11525, "Sparse Wide".
  """
  checks.check_count('width', width, least=1)
  checks.check_sparsity('sparsity', sparsity)
  checks.check_count('multiple_of', multiple_of, least=1)
  return max(round(width / math.sqrt(1 - sparsity) / multiple_of),
             1) * multiple_of
