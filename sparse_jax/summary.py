"""A table of every leaf: its size, densities, churn, coverage, dead units."""

from collections.abc import Callable
import functools
import math
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparse_jax import trees
from sparse_jax.blocks import packing
from sparse_jax.cost import effective
from sparse_jax.masks import marks as marks_lib
from sparse_jax.rules import packed
from sparse_jax.rules import state as state_lib


class Row(NamedTuple):
  """One leaf of the model, or the total. Fractions are in [0, 1]."""

  path: trees.Path
  shape: tuple[int, ...]
  entries: int
  sparse: bool  # Whether the leaf may be sparse at all.
  forward_density: float  # Share of entries in A (non-zero if never sparse).
  backward_density: float  # Share of entries in B.
  churn: float  # Share of A that entered it at the last refresh.
  ever_active: float  # Share of entries that were ever in A (ITOP's R_s).
  flipped: float = 0.  # Share of entries that changed sides at that refresh.
  dead_outputs: int = 0  # Into which no weight of A leads.
  dead_inputs: int = 0  # That no weight of A reads.
  collapsed: bool = False  # Whether A is one row or column of several, or none.
  effective_density: float | None = None  # Of what is on a path, if known.


class Summary(NamedTuple):
  """The rows of a model's leaves, and their total over the sparse leaves.

  `summarize` makes it; `print(summary)` shows it as a table.

  Example:
    >>> row = Row('kernel', (4, 8), entries=32, sparse=True,
    ...           forward_density=.25, backward_density=.5, churn=0.,
    ...           ever_active=.25, collapsed=True)
    >>> table = Summary((row,), row._replace(path='total', shape=()))
    >>> table.sparsity, table.effective_sparsity, table.collapsed
    (0.75, None, ('kernel',))
  """

  rows: tuple[Row, ...]  # A leaf each, in the order of their paths.
  total: Row  # Over the sparse leaves.

  @property
  def sparsity(self) -> float:
    """Share of zeros among the leaves that may be sparse."""
    return 1 - self.total.forward_density

  @property
  def effective_sparsity(self) -> float | None:
    """Share of those that are zero or on no path; None if not asked for."""
    density = self.total.effective_density
    return None if density is None else 1 - density

  @property
  def collapsed(self) -> tuple[trees.Path, ...]:
    """The leaves of which one row or column is left, or none."""
    return tuple(row.path for row in self.rows if row.collapsed)

  def as_dicts(self) -> list[dict[str, Any]]:
    """The rows, the total last, as dictionaries."""
    return [row._asdict() for row in (*self.rows, self.total)]

  def __str__(self) -> str:
    rows = (*self.rows, self.total)
    followed = self.total.effective_density is not None
    head = ('leaf', 'shape', 'entries', 'forward', *['effective'] * followed,
            'backward', 'churn', 'ever active', 'dead')
    lines = [head] + [_cells(row, followed) for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return '\n'.join('  '.join(
        cell.ljust(width) if i < 2 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(line, widths))).rstrip()
                     for line in lines)


def summarize(params: trees.PyTree, opt_state: Any,
              method: state_lib.SparseMethod, *,
              fn: Callable[..., Any] | None = None,
              inputs: tuple[Any, ...] = ()) -> Summary:
  """Tells how sparse each leaf is, how its mask has moved, and what is dead.

  An output of a leaf is dead if no weight of A leads into it, an input if none
  reads it. With `fn` only weights on a path from an input of the function to
  one of its outputs count, which finds what is dead because of other layers.
  A leaf whose A lies in one row or column of several has collapsed.

  Args:
    params: the parameters that the optimizer holds.
    opt_state: an Optax state that contains the method's.
    method: the method.
    fn: `fn(weights, *inputs)`, the model. The same function with inputs of the
      same shapes is compiled once.
    inputs: arrays or shapes, of one example.

  Returns:
    A Summary: printable as a table (dead outputs and inputs as a sum), and as
    rows. A leaf that is never sparse has a forward density by its non-zero
    entries, and no churn. Rows have an effective density if `fn` is given.

  Raises:
    ValueError: as `effective_sparsity`, if `fn` is given.

  Example:
    >>> import sparse_jax
    >>> method = sparse_jax.static(sparsity=0.75)
    >>> params = {'kernel': jnp.ones((4, 8)), 'bias': jnp.ones(8)}
    >>> table = summarize(params, method.init(params), method)
    >>> print(table)
    leaf    shape  entries  forward  backward  churn  ever active   dead
    bias    8            8    dense
    kernel  4 x 8       32   25.00%    25.00%  0.00%       25.00%  2 + 0
    total               32   25.00%    25.00%  0.00%       25.00%  2 + 0
    >>> table.collapsed
    ()
  """
  state = state_lib.get_state(opt_state)
  weights = trees.leaves_by_path(method.read(params, opt_state),
                                 packing.is_packed)
  sparse = state.plan.by_path
  on_path = {}
  if fn is not None and sparse:
    shapes = jax.eval_shape(functools.partial(packed.dense_weights, method),
                            params, opt_state)
    on_path = {path: mask for path, mask in trees.leaves_by_path(
        effective.on_path(fn, state.forward_masks, shapes, inputs)).items()
               if path in sparse}
  counts = jax.device_get(_counts(weights, state, on_path))
  rows = tuple(_row(path, sparse[path].layout.shape if path in sparse
                    else tuple(leaf.shape), path in sparse, counts[path])
               for path, leaf in weights.items())
  return Summary(rows, _total(rows, counts))


class _Count(NamedTuple):
  """Entries of a leaf, and its lines: of outputs, and of inputs."""

  forward: Any
  backward: Any
  new: Any  # In A since the last refresh.
  gone: Any  # Out of it.
  ever: Any
  on_path: Any = None  # None if nobody asked.
  dead_outputs: Any = 0
  dead_inputs: Any = 0
  collapsed: Any = False


@jax.jit
def _counts(weights, state, on_path):
  """A _Count of each leaf."""
  marks = trees.leaves_by_path(state.marks)

  def count(path, weight):
    if path not in marks:
      used = jnp.count_nonzero(weight)
      return _Count(used, weight.size, 0, 0, used)
    layout = state.plan.by_path[path].layout
    spread = [layout.spread(of(marks[path])) for of in (
        marks_lib.forward_mask, marks_lib.backward_mask, marks_lib.newly_active,
        marks_lib.newly_inactive, marks_lib.ever_active)]
    sums = [jnp.sum(mask, dtype=jnp.int32) for mask in spread]
    alive = on_path.get(path, spread[0])
    return _Count(*sums, jnp.sum(alive, dtype=jnp.int32) if path in on_path
                  else None, *_lines(alive, layout))

  return {path: count(path, weight) for path, weight in weights.items()}


def _lines(alive, layout):
  """Dead outputs and inputs of a leaf, and whether one line is all it has."""
  if len(layout.shape) - len(layout.stacked) < 2:
    return 0, 0, ~alive.any()
  view = layout.view(alive)
  stacked = len(layout.stacked)
  layers = math.prod(view.shape[:stacked])
  view = view.reshape(layers, -1, *view.shape[-2:])  # Layer, place, in, out.
  outputs, inputs = view.any((1, 2)), view.any((1, 3))
  collapsed = [live.sum(1) <= min(1, live.shape[1] - 1)
               for live in (outputs, inputs)]
  return (jnp.sum(~outputs, dtype=jnp.int32), jnp.sum(~inputs, dtype=jnp.int32),
          jnp.any(collapsed[0] | collapsed[1]))


def _row(path, shape, sparse, count) -> Row:
  return _of(path, shape, math.prod(shape), sparse, count)


def _total(rows, counts) -> Row:
  sparse = [row for row in rows if row.sparse]
  if not sparse:
    return Row('total', (), 0, False, 1., 1., 0., 1.)
  found = [counts[row.path] for row in sparse]
  total = _Count(*(None if None in values else sum(map(int, values))
                   for values in zip(*found)))
  return _of('total', (), sum(row.entries for row in sparse), True, total)


def _of(path, shape, entries, sparse, count) -> Row:
  share = max(entries, 1)
  on_path = count.on_path
  return Row(path, shape, entries, sparse, int(count.forward) / share,
             int(count.backward) / share,
             int(count.new) / max(int(count.forward), 1),
             int(count.ever) / share,
             (int(count.new) + int(count.gone)) / share,
             int(count.dead_outputs), int(count.dead_inputs),
             bool(count.collapsed),
             None if on_path is None else int(on_path) / share)


def _cells(row: Row, followed: bool) -> tuple[str, ...]:
  shape = ' x '.join(str(size) for size in row.shape)
  if not row.sparse:
    return (row.path, shape, f'{row.entries:,}', 'dense',
            *[''] * (4 + followed))
  effective_density = [f'{row.effective_density:.2%}'] if followed else []
  return (row.path, shape, f'{row.entries:,}', f'{row.forward_density:.2%}',
          *effective_density, f'{row.backward_density:.2%}',
          f'{row.churn:.2%}', f'{row.ever_active:.2%}',
          f'{row.dead_outputs:,} + {row.dead_inputs:,}')
