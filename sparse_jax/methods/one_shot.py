"""Pruning in one shot: of a trained function, layer by layer, from examples."""

from collections.abc import Callable
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from sparse_jax import checks
from sparse_jax import trees
from sparse_jax.jaxprs import matrices
from sparse_jax.masks import layouts
from sparse_jax.masks import selection
from sparse_jax.masks import structures
from sparse_jax.masks import topk
from sparse_jax.rules import reconstruction

RULES = ('sparsegpt', 'wanda', 'magnitude')
_BLOCK = 128
_MOST_DAMPING = 10.


def one_shot(fn: Callable[..., Any], params: trees.PyTree,
             batches: Iterable[tuple[Any, ...]], *, sparsity: float,
             by: str = 'sparsegpt',
             structure: structures.Structure = structures.Unstructured(),
             is_sparse: selection.IsSparse = None,
             batch_axes: selection.Axes = (),
             report: Callable[[trees.Path, int, int], None] | None = None
             ) -> trees.PyTree:
  """Prunes a trained function of parameters, without training it.

  The leaves are pruned in the order in which the function multiplies by them,
  each from the inputs that it has when those before it are pruned. Which axes
  are inputs and outputs is read off the products: of dense layers,
  convolutions (from their patches), attention, and of layers that a scan
  stacks, each slice by itself.

  * 'sparsegpt' drops the weights whose loss changes a layer's outputs least
    after those that follow have been corrected for it; in blocks of 128
    inputs, in which the weights of all outputs compete.
  * 'wanda' drops by magnitude times the norm of the input, an equal number for
    each output, and changes nothing else.
  * 'magnitude' drops by magnitude alone, over the whole of a layer's slice.

  With NM all of them drop within each group; with the other structures, by
  the same scores. Counts are `keep_count`'s in each of these competitions.
  Groups of a convolution and batch axes of a product are matrices of their
  own, whose inputs are not mixed.

  To go on training with the same zeros, keep the mask `leaf != 0`.

  Laws: all other leaves are as they were; of one layer the squared error of
  its outputs on the batches is least with 'sparsegpt' and, if its inputs are
  correlated, largest with 'magnitude', as is published.

  Args:
    fn: `fn(params, *batch)`, a function of arrays that can be differentiated,
      as it is evaluated (without dropout, say).
    params: its parameters.
    batches: tuples of inputs, which are kept and gone through once for each
      layer. A few hundred examples are usual.
    sparsity: fraction of each leaf that is dropped, in [0, 1); with NM it is
      1 - n/m.
    by: 'sparsegpt', 'wanda' or 'magnitude'.
    structure: what is kept or dropped together.
    is_sparse: which leaves: as `is_sparse` of a method. By default every
      kernel that a product multiplies by.
    batch_axes: axes that stack layers, for the choice of leaves only.
    report: called as `report(path, done, total)` before each layer, of which
      there are `total`.

  Returns:
    A tree like `params`, with zeros.

  Raises:
    ValueError: naming the argument that does not fit, or the leaf: one that is
      chosen by `is_sparse` and multiplied by no product, that a product does
      not take as it is, or whose inputs are all 0.

  Example:
    >>> params = {'a': jnp.array([[1.], [2.], [-3.]])}
    >>> fn = lambda params, x: x @ params['a']
    >>> x = jnp.array([[9., 1., 1.], [-9., 1., 1.], [0., 1., 2.]])
    >>> for by in ('magnitude', 'wanda', 'sparsegpt'):
    ...   pruned = one_shot(fn, params, [(x,)], sparsity=.5, by=by)
    ...   print(pruned['a'].ravel().round(2))
    [ 0.  2. -3.]
    [ 1.  0. -3.]
    [ 1.    0.   -1.78]

  Reference:
    Frantar and Alistarh, SparseGPT, 2023, https://arxiv.org/abs/2301.00774;
    Sun et al., Wanda, 2023, https://arxiv.org/abs/2306.11695.
  """
  checks.check_callable('fn', fn)
  checks.check_sparsity('sparsity', sparsity)
  structures.check_structure(structure)
  layouts.check_fixed_sparsity(structure, sparsity)
  if by not in RULES:
    raise ValueError(f'`by` (={by!r}) must be one of {RULES}.')
  batches = _checked(batches)
  groups = _layers(fn, params, batches[0], is_sparse, batch_axes)
  turns = [(layer, index) for group in groups
           for index in range(max(layer.slices for layer in group))
           for layer in group if index < layer.slices]
  leaves, moments = trees.leaves_by_path(params), {}
  for done, (layer, index) in enumerate(turns):
    if report is not None:
      report(layer.path, done, len(turns))
    full = _with(params, leaves)
    if by != 'magnitude' and layer.path not in moments:
      moments[layer.path] = matrices.input_moments(
          fn, layer, crossed=by == 'sparsegpt')
    measured = None if by == 'magnitude' else _sum(
        layer, [moments[layer.path](index, full, *batch) for batch in batches])
    leaf = jnp.asarray(leaves[layer.path])
    view = _pruned(layer.read(leaf, index), measured, sparsity, by, structure)
    leaves[layer.path] = layer.write(leaf, index, view)
  return _with(params, leaves)


def _checked(batches) -> list[tuple[Any, ...]]:
  batches = list(batches)
  for batch in batches:
    if not isinstance(batch, (tuple, list)):
      raise ValueError(f'`batches` has a {type(batch).__name__}, but must be '
                       'tuples of what `fn` takes after the parameters.')
  if not batches:
    raise ValueError(f'`batches` (={batches!r}) must not be empty.')
  return batches


def _layers(fn, params, batch, is_sparse, batch_axes):
  chosen = selection.select(params, is_sparse, batch_axes)
  groups = matrices.find_layers(fn, params, *batch, paths=list(chosen))
  found = {layer.path for group in groups for layer in group}
  missing = sorted(set(chosen) - found)
  if not found or is_sparse is not None and missing:
    raise ValueError(f'`is_sparse` (={is_sparse!r}) selects {missing}, which '
                     'no product of `fn` multiplies by.')
  return groups


def _with(params, leaves):
  return trees.map_leaves(lambda path, leaf: leaves[path], params)


def _sum(layer, parts):
  total = parts[0]
  for part in parts[1:]:
    total = jax.tree.map(jnp.add, total, part)
  if not jnp.any(total.squares):
    raise ValueError(f'`batches` give {layer.path!r} no input but 0, or its '
                     'products lead to no output of `fn`.')
  return total


def _pruned(view, moments, sparsity, by, structure):
  """A view [groups, positions, inputs, outputs] with zeros."""
  columns = view.reshape(view.shape[0], -1, view.shape[-1])
  rows = structure.m if _by_rows(structure) else None
  if by == 'sparsegpt':
    if rows or isinstance(structure, structures.Unstructured):
      return _corrected(view, moments, sparsity, structure)
    mask = _mask(view, _saliency(columns, moments), sparsity, structure)
    return _repaired(columns, moments, mask=mask.reshape(columns.shape)
                     ).reshape(view.shape)
  if by == 'wanda':
    scores = jax.vmap(reconstruction.wanda_scores)(columns, moments.squares)
    if isinstance(structure, structures.Unstructured):
      kept = topk.top_k_mask(
          scores, topk.keep_count(columns.shape[1], sparsity), axes=(1,))
      return jnp.where(kept, columns, 0).reshape(view.shape)
  else:
    scores = jnp.abs(columns)
  return jnp.where(_mask(view, scores, sparsity, structure), view, 0)


def _by_rows(structure) -> bool:
  return isinstance(structure, structures.NM) and structure.axis == -2


def _mask(view, scores, sparsity, structure):
  """The mask of a view: structures see a leaf's matrix, as in training."""
  groups, positions, inputs, outputs = view.shape
  scores = scores.reshape(view.shape).transpose(1, 0, 2, 3)
  if positions > 1:  # Filters of all feature groups, side by side.
    flat = scores.transpose(0, 2, 1, 3).reshape(positions, inputs, -1)
  else:
    flat = scores.reshape(groups, inputs, outputs)
  mask = layouts.make_mask(flat, sparsity, structure=structure)
  if positions > 1:
    mask = mask.reshape(positions, inputs, groups, outputs).transpose(
        0, 2, 1, 3)
  return mask.reshape(positions, groups, inputs, outputs).transpose(1, 0, 2, 3)


def _corrected(view, moments, sparsity, structure):
  """SparseGPT with entries, or n of m inputs, chosen on the way.

  The inputs at each position of a convolution are made up to a multiple of m,
  so that groups are those of the structure.
  """
  groups, positions, inputs, outputs = view.shape
  if isinstance(structure, structures.Unstructured):
    return _repaired(view.reshape(groups, -1, outputs), moments,
                     sparsity=sparsity).reshape(view.shape)
  m = structure.m
  more = -inputs % m
  padded = jnp.pad(view, ((0, 0), (0, 0), (0, more), (0, 0)))
  squares = moments.squares.reshape(groups, positions, inputs, positions,
                                    inputs)
  squares = jnp.pad(squares, ((0, 0), (0, 0), (0, more), (0, 0), (0, more)))
  size = positions * (inputs + more)
  pruned = _repaired(
      padded.reshape(groups, size, outputs),
      moments._replace(squares=squares.reshape(groups, size, size)),
      group=(structure.n, m), block=max(_BLOCK // m, 1) * m)
  return pruned.reshape(padded.shape)[:, :, :inputs]


def _saliency(columns, moments):
  """w^2 / [H^-1]_ii, what the loss of each weight alone would cost."""
  hessian = _hessian(moments)
  mean = jnp.trace(hessian, axis1=1, axis2=2) / hessian.shape[-1]
  eye = jnp.eye(hessian.shape[-1])[None]
  inverse = jnp.linalg.inv(hessian + .01 * mean[:, None, None] * eye)
  return jnp.square(columns) / jnp.diagonal(
      inverse, axis1=1, axis2=2)[:, :, None]


def _hessian(moments):
  """2 / n of the sum of x x^T; of groups that saw nothing, the identity."""
  hessian = 2 * moments.squares / moments.count
  nothing = jnp.trace(hessian, axis1=1, axis2=2) == 0
  return jnp.where(nothing[:, None, None], jnp.eye(hessian.shape[-1])[None],
                   hessian)


def _repaired(columns, moments, *, mask=None, **given):
  """SparseGPT of each group, with more damping where H asks for it."""
  damping, hessian = .01, _hessian(moments)
  prune = lambda columns, hessian, mask: reconstruction.sparsegpt(
      columns, hessian, mask=mask, damping=damping, **given)
  while True:
    pruned = jax.vmap(prune)(columns, hessian, mask)
    if damping >= _MOST_DAMPING or jnp.isfinite(pruned).all():
      return pruned
    damping *= 10
