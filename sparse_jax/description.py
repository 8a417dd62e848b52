"""What a method will do to a model, before anything is allocated."""

from collections.abc import Callable
import math
from typing import Any
from typing import NamedTuple

import jax
import numpy as np

from sparse_jax import trees
from sparse_jax.jaxprs import products
from sparse_jax.jaxprs import views
from sparse_jax.masks import selection
from sparse_jax.rules import state as state_lib


class LeafDescription(NamedTuple):
  """One leaf of the model. Shares are of its entries, in [0, 1]."""

  path: trees.Path
  shape: tuple[int, ...]
  contracting: tuple[int, ...] | None  # Axes that its product sums over.
  guessed: bool  # Whether they are a guess by names, and matter.
  groups: int  # 0 of a leaf that is never sparse.
  kept: float
  trained: float
  bytes: int  # Of the parameter as it is stored.


class Description(NamedTuple):
  """The leaves of a model under a method, and what looks wrong."""

  rows: tuple[LeafDescription, ...]
  warnings: tuple[str, ...]

  def __str__(self) -> str:
    lines = [('leaf', 'shape', 'contracts', 'groups', 'kept', 'trained',
              'bytes')] + [_cells(row) for row in self.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(7)]
    table = ['  '.join(cell.ljust(width) if i < 3 else cell.rjust(width)
                       for i, (cell, width) in enumerate(zip(line, widths))
                       ).rstrip() for line in lines]
    return '\n'.join([*table, *(f'warning: {text}' for text in self.warnings)])


def describe(method: state_lib.SparseMethod, params: trees.PyTree, *,
             fn: Callable[..., Any] | None = None,
             inputs: tuple[Any, ...] = ()) -> Description:
  """A table of the leaves of a model under a method; nothing is allocated.

  Args:
    method: the method.
    params: the model's parameters, or their shapes.
    fn: `fn(params, *inputs)`, the model; with it the axes that products sum
      over are compared with those that structures follow.
    inputs: arrays or shapes.

  Returns:
    A Description, printable, with a warning where a leaf looks like no kernel
    or a guess is wrong.

  Raises:
    ValueError: as `start`.

  Example:
    >>> import jax.numpy as jnp, sparse_jax
    >>> method = sparse_jax.static(.75, structure=sparse_jax.Block((2, 2)))
    >>> params = {'kernel': jnp.ones((4, 8)), 'bias': jnp.ones(8)}
    >>> print(describe(method, params))
    leaf    shape  contracts  groups    kept  trained  bytes
    bias    8                                             32
    kernel  4 x 8  0 (guess)       8  25.00%   25.00%    128
  """
  if not isinstance(method, state_lib.SparseMethod):
    raise ValueError(f'`method` (={method!r}) must be a SparseMethod, such as '
                     'sparse_jax.top_kast(...).')
  shapes = products.shapes(method.parametrize(params))
  state = jax.eval_shape(method.init, shapes)
  stored = shapes if method.pack is None else jax.eval_shape(
      method.pack, shapes, state)
  sizes = {path: leaf.size * leaf.dtype.itemsize
           for path, leaf in trees.leaves_by_path(stored).items()}
  work = method.work(products.shapes(params), 1) if method.work else {}
  rows = tuple(_row(path, shape, state.plan.by_path.get(path), work.get(path),
                    sizes[path]) for path, shape in state.plan.shapes)
  return Description(rows, tuple(_warnings(state.plan, params, fn, inputs)))


def _row(path, shape, leaf, work, size) -> LeafDescription:
  if leaf is None:
    return LeafDescription(path, shape, None, False, 0, 1., 1., size)
  layout = leaf.layout
  kept, trained = ((work.forward, work.weight_gradient) if work else
                   (layout.share(leaf.count), 1.))
  return LeafDescription(path, shape, layout.rows, leaf.guessed,
                         math.prod(layout.group_shape), kept, trained, size)


def _warnings(plan, params, fn, inputs):
  kernels = trees.leaves_by_path(params)
  for leaf in plan.leaves:
    own = jax.ShapeDtypeStruct(leaf.layout.shape, np.float32)
    if not selection.is_kernel(leaf.path, own, leaf.layout.stacked):
      yield f'{leaf.path!r} looks like no kernel, and is sparse.'
  if fn is None:
    return
  uses = {}
  for use in views.find_uses(fn, products.shapes(params), *inputs):
    uses.setdefault(use.path, set()).add(use.contracting)
  for leaf in plan.leaves:
    if leaf.path in kernels and leaf.path not in uses:
      yield f'{leaf.path!r} is used by no product that could be followed.'
    wrong = uses.get(leaf.path, set()) - {tuple(sorted(leaf.layout.rows))}
    if wrong and leaf.guessed:
      yield (f'{leaf.path!r} is summed over its axes {sorted(wrong)}, and its '
             f'structure follows {leaf.layout.rows}: give `contracting`.')


def _cells(row: LeafDescription) -> tuple[str, ...]:
  shape = ' x '.join(map(str, row.shape))
  if not row.groups:
    return row.path, shape, '', '', '', '', f'{row.bytes:,}'
  axes = ', '.join(map(str, row.contracting or ())) + ' (guess)' * row.guessed
  return (row.path, shape, axes, f'{row.groups:,}', f'{row.kept:.2%}',
          f'{row.trained:.2%}', f'{row.bytes:,}')
