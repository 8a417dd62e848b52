"""Constant fan-in, exported: gathered weights, and nets without dead outputs.
"""

from collections.abc import Callable
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax import trees
from sparse_jax.masks import layouts
from sparse_jax.masks.structures import FanIn


class Condensed(NamedTuple):
  """A weight of constant fan-in, as its values and where they belong."""

  values: jax.Array  # [active outputs, inputs each]
  indices: jax.Array  # int32, likewise: the inputs.
  outputs: jax.Array  # int32[active outputs], rising: which they are.
  size: int  # All outputs.


def condense(weight: jax.Array, mask: jax.Array | None = None, *,
             contracting: tuple[int, ...] | None = None) -> Condensed:
  """Gathers the weights of a leaf of constant fan-in, output by output.

  Args:
    weight: float[...], a kernel of `srigl`, or of any method with `FanIn()`.
    mask: bool of its shape, the forward mask; None: where it is not 0.
    contracting: the axes that the product sums over, as in `static`; by
      default the second last. An index counts the inputs in the order of
      positions, then channels: those of a convolution after unfolding.

  Returns:
    A Condensed. Its inputs of an output rise, outputs without any are left
    out.

  Raises:
    ValueError: if active outputs differ in their numbers of inputs, none is
      active, or the mask has another shape.

  Example:
    >>> weight = jnp.array([[1., 0., 4.], [0., 0., 5.], [2., 0., 0.]])
    >>> condense(weight).values
    Array([[1., 2.], [4., 5.]], dtype=float32)
    >>> condense(weight).indices.tolist(), condense(weight).outputs.tolist()
    ([[0, 2], [0, 1]], [0, 2])

  Reference:
    Lasby et al., SRigL, 2024, https://arxiv.org/abs/2305.02299, the condensed
    representation.
  """
  inside = np.asarray(weight) != 0 if mask is None else np.asarray(mask)
  if inside.shape != weight.shape:
    raise ValueError(f'`mask` (of shape {inside.shape}) must have the shape of '
                     f'`weight`, {weight.shape}.')
  layout = layouts.layout(weight.shape, structure=FanIn(),
                          contracting=contracting)
  size = layout.view_shape[-1]
  table = np.asarray(layout.view(jnp.asarray(inside))).reshape(-1, size).T
  counts = table.sum(1)
  outputs = np.flatnonzero(counts)
  fan_in = set(counts[outputs].tolist())
  if len(fan_in) != 1:
    raise ValueError(f'`{"weight" if mask is None else "mask"}` must have one '
                     'number of inputs for all active outputs, but has '
                     f'{sorted(fan_in)}.')
  indices = np.nonzero(table[outputs])[1].reshape(len(outputs), -1)
  values = layout.view(weight).reshape(-1, size).T[outputs[:, None], indices]
  return Condensed(values, jnp.asarray(indices, jnp.int32),
                   jnp.asarray(outputs, jnp.int32), size)


def condensed_matmul(x: jax.Array, weight: Condensed) -> jax.Array:
  """x times the weight: one gather and one sum for each active output.

  Law: it is x @ w of the masked weight, of two axes, that was condensed.

  Args:
    x: float[..., inputs].
    weight: of `condense`.

  Returns:
    float[..., outputs], 0 where an output has no input.

  Example:
    >>> weight = jnp.array([[1., 0., 4.], [0., 0., 5.], [2., 0., 0.]])
    >>> condensed_matmul(jnp.array([1., 10., 100.]), condense(weight))
    Array([201.,   0.,  54.], dtype=float32)
  """
  active = jnp.einsum('...ok,ok->...o', x[..., weight.indices], weight.values)
  shape = (*x.shape[:-1], weight.size)
  return jnp.zeros(shape, active.dtype).at[..., weight.outputs].set(active)


def drop_outputs(params: trees.PyTree, masks: trees.PyTree, *,
                 chain: Mapping[trees.Path, trees.Path],
                 activation: Callable[[jax.Array], jax.Array]
                 ) -> tuple[trees.PyTree, dict[trees.Path, np.ndarray]]:
  """A smaller dense net: outputs without inputs leave the arrays.

  Such an output is activation(its bias) for every input. That constant, times
  the rows that read it, is added to the bias of the layer that reads it; then
  the column, its bias, and those rows are gone.

  Law: the smaller net computes what the masked one does, but for the order of
  sums.

  What it can drop is stated by the caller, since a tree of parameters does not
  tell who reads what: a dense kernel [inputs, outputs] read by exactly one
  other dense kernel, through an elementwise activation alone. No
  normalisation, no shortcut, no flattening of a convolution may lie between;
  of those only the shapes can be checked here.

  Args:
    params: the model's parameters, as the forward pass sees them:
      `method.read(params, opt_state)`.
    masks: tree of bool: `get_state(opt_state).forward_masks`. None for a leaf
      that is never sparse, which keeps all outputs.
    chain: {path of a kernel: path of the kernel that reads it}. A bias is the
      leaf `bias` beside the kernel.
    activation: what lies between, as a function of arrays: jax.nn.relu.

  Returns:
    The smaller tree, and for each kernel of the chain the outputs kept.

  Raises:
    ValueError: if a path is unknown, a kernel is not a matrix, sizes do not
      fit, no output is left, or constants remain and there is no bias to add
      them to.

  Example:
    >>> params = {'a': {'kernel': jnp.array([[1., 0., 3.], [0., 0., 2.]]),
    ...                 'bias': jnp.array([0., 5., 0.])},
    ...           'b': {'kernel': jnp.ones((3, 2)), 'bias': jnp.zeros(2)}}
    >>> masks = {'a': {'kernel': params['a']['kernel'] != 0, 'bias': None},
    ...          'b': {'kernel': None, 'bias': None}}
    >>> small, kept = drop_outputs(
    ...     params, masks, chain={'a/kernel': 'b/kernel'},
    ...     activation=jax.nn.relu)
    >>> small['a']['kernel'].shape, kept['a/kernel'].tolist()
    ((2, 2), [0, 2])
    >>> small['b']['bias'].tolist()
    [5.0, 5.0]

  Reference:
    Lasby et al., SRigL, 2024, https://arxiv.org/abs/2305.02299, the structured
    layer of their benchmark. The authors' code cuts weights and bias and
    leaves the constants out.
  """
  arrays = dict(trees.leaves_by_path(params))
  inside, kept = trees.leaves_by_path(masks), {}
  for path, reader in chain.items():
    _check_link(arrays, path, reader)
    mask = inside.get(path)
    alive = np.ones(arrays[path].shape[-1], bool) if mask is None else (
        np.asarray(mask).reshape(-1, np.shape(mask)[-1]).any(0))
    if not alive.any():
      raise ValueError(f'`masks` leave no output of {path!r}.')
    kept[path] = np.flatnonzero(alive)
    bias = _beside(path)
    constant = activation(arrays[bias] if bias in arrays else jnp.zeros(
        alive.shape, arrays[path].dtype))
    gone = constant[~alive] @ arrays[reader][~alive]
    if _beside(reader) in arrays:
      arrays[_beside(reader)] += gone.astype(arrays[_beside(reader)].dtype)
    elif np.any(np.asarray(gone)):
      raise ValueError(f'`chain` names {reader!r}, which has no bias to take '
                       f'the constants of the dropped outputs of {path!r}.')
    arrays[path] = arrays[path][:, kept[path]]
    arrays[reader] = arrays[reader][kept[path]]
    if bias in arrays:
      arrays[bias] = arrays[bias][kept[path]]
  return trees.map_leaves(lambda path, _: arrays[path], params), kept


def _beside(path: trees.Path) -> trees.Path:
  """The path of the bias that belongs to a kernel."""
  return f'{path.rpartition("/")[0]}/bias'.lstrip('/')


def _check_link(arrays, path, reader) -> None:
  for name in (path, reader):
    if name not in arrays:
      raise ValueError(f'`chain` names {name!r}, which is none of '
                       f'{sorted(arrays)}.')
    if getattr(arrays[name], 'ndim', None) != 2:
      raise ValueError(f'`chain` names {name!r}, of shape '
                       f'{np.shape(arrays[name])}; it must be a dense kernel '
                       'of two axes.')
  outputs, inputs = arrays[path].shape[-1], arrays[reader].shape[0]
  if outputs != inputs:
    raise ValueError(f'`chain` says that {reader!r} reads {path!r}, but it has '
                     f'{inputs} inputs, not {outputs}.')
