"""A table of every leaf: its size, densities, churn and coverage."""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparse_jax import trees
from sparse_jax.blocks import packing
from sparse_jax.masks import marks as marks_lib
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


class Summary(NamedTuple):
  """The rows of a model's leaves, and their total over the sparse leaves."""

  rows: tuple[Row, ...]
  total: Row

  @property
  def sparsity(self) -> float:
    """Share of zeros among the leaves that may be sparse."""
    return 1 - self.total.forward_density

  def as_dicts(self) -> list[dict[str, Any]]:
    """The rows, the total last, as dictionaries."""
    return [row._asdict() for row in (*self.rows, self.total)]

  def __str__(self) -> str:
    head = ('leaf', 'shape', 'entries', 'forward', 'backward', 'churn',
            'ever active')
    lines = [head] + [_cells(row) for row in (*self.rows, self.total)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return '\n'.join('  '.join(
        cell.ljust(width) if i < 2 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(line, widths))).rstrip()
                     for line in lines)


def summarize(params: trees.PyTree, opt_state: Any,
              method: state_lib.SparseMethod) -> Summary:
  """Tells how sparse each leaf is and how its mask has moved.

  Args:
    params: the parameters that the optimizer holds.
    opt_state: an Optax state that contains the method's.
    method: the method.

  Returns:
    A Summary: printable as a table, and as rows. A leaf that is never sparse
    has a forward density by its non-zero entries, and no churn.

  Example:
    >>> import sparse_jax
    >>> method = sparse_jax.static(sparsity=0.75)
    >>> params = {'kernel': jnp.ones((4, 8)), 'bias': jnp.ones(8)}
    >>> print(summarize(params, method.init(params), method))
    leaf    shape   entries  forward  backward   churn  ever active
    bias    8             8  dense
    kernel  4 x 8        32   25.00%    25.00%   0.00%       25.00%
    total                32   25.00%    25.00%   0.00%       25.00%
  """
  state = state_lib.get_state(opt_state)
  weights = trees.leaves_by_path(method.read(params, opt_state),
                                 packing.is_packed)
  counts = _counts(weights, state)
  sparse = state.plan.by_path
  rows = tuple(_row(path, sparse[path].layout.shape if path in sparse
                    else tuple(leaf.shape), path in sparse, counts)
               for path, leaf in weights.items())
  return Summary(rows, _total(rows, counts))


@jax.jit
def _counts(weights, state):
  """int32[4] of each leaf: entries in A, in B, new in A, ever in A."""
  marks = trees.leaves_by_path(state.marks)
  sets = (marks_lib.forward_mask, marks_lib.backward_mask,
          marks_lib.newly_active, marks_lib.ever_active)

  def count(path, weight):
    if path not in marks:
      used = jnp.count_nonzero(weight)
      return jnp.array([used, weight.size, 0, used])
    spread = state.plan.by_path[path].layout.spread
    return jnp.stack([jnp.sum(spread(of(marks[path])), dtype=jnp.int32)
                      for of in sets])

  return {path: count(path, weight) for path, weight in weights.items()}


def _row(path, shape, sparse, counts) -> Row:
  forward, backward, new, ever = (int(n) for n in counts[path])
  entries = 1
  for size in shape:
    entries *= size
  return Row(path, shape, entries, sparse, forward / max(entries, 1),
             backward / max(entries, 1), new / max(forward, 1),
             ever / max(entries, 1))


def _total(rows, counts) -> Row:
  sparse = [row for row in rows if row.sparse]
  entries = sum(row.entries for row in sparse)
  forward, backward, new, ever = (
      sum(int(counts[row.path][i]) for row in sparse) for i in range(4))
  share = max(entries, 1)
  if not sparse:
    return Row('total', (), 0, False, 1., 1., 0., 1.)
  return Row('total', (), entries, True, forward / share, backward / share,
             new / max(forward, 1), ever / share)


def _cells(row: Row) -> tuple[str, ...]:
  shape = ' x '.join(str(size) for size in row.shape)
  if not row.sparse:
    return (row.path, shape, f'{row.entries:,}', 'dense', '', '', '')
  return (row.path, shape, f'{row.entries:,}', f'{row.forward_density:.2%}',
          f'{row.backward_density:.2%}', f'{row.churn:.2%}',
          f'{row.ever_active:.2%}')
