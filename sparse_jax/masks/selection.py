"""Which leaves of a parameter tree may be sparse, and along which axes."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import re
from typing import Any

import jax.numpy as jnp

from sparse_jax import trees

IsSparse = (Callable[[trees.Path, Any], bool] | Mapping[str, bool]
            | Sequence[tuple[str, bool]] | None)
Axes = (tuple[int, ...] | Mapping[str, tuple[int, ...]]
        | Callable[[trees.Path, Any], tuple[int, ...]])

# Last names of leaves that no product multiplies by: biases, scales, tables of
# tokens and positions, class tokens, probes of attention pooling.
_NEVER_SPARSE = re.compile(
    r'(?:^|_)(?:bias|scale|gamma|beta|emb|embed\w*|pos|pos_?e[mn]\w*|'
    r'position\w*|pe|rpb|table|wpe|wte|cls|tok|tokens?|registers?|prompts?|'
    r'probe|latents?|latent_query)$')
# Names that Flax gives to the projections of attention, and the axes of their
# kernels that the product sums over: (d, heads, head_dim) and its mirror.
_ATTENTION = {'query': (0,), 'key': (0,), 'value': (0,), 'out': (0, 1)}


def is_kernel(path: trees.Path, leaf: Any, batch_axes: tuple[int, ...] = ()):
  """The default choice: a floating leaf of two axes or more, not a bias.

  Args:
    path: the leaf's keys, joined by '/'.
    leaf: anything with `dtype` and `ndim`.
    batch_axes: axes that stack layers, and do not count.

  Returns:
    True unless the leaf is integer, has fewer than two axes besides
    `batch_axes`, or its last name says that no product multiplies by it: a
    bias, a scale, an embedding of tokens or positions, a class token, a probe.
    The papers leave these dense; `is_sparse={'embedding$': True}` does not.

  Example:
    >>> is_kernel('Dense_0/kernel', jnp.zeros((3, 4)))
    True
    >>> is_kernel('Dense_0/bias', jnp.zeros((4,)))
    False
  """
  floating = jnp.issubdtype(leaf.dtype, jnp.floating)
  named = not _NEVER_SPARSE.search(path.rpartition('/')[2])
  return bool(floating and named and leaf.ndim - len(batch_axes) >= 2)


def check_axes(name: str, axes: Axes) -> Axes:
  """Returns `axes` if a function or a tuple of integers, else ValueError."""
  if isinstance(axes, Mapping):
    for pattern, own in axes.items():
      _compiled(name, pattern)
      check_axes(name, own)
    return axes
  whole = isinstance(axes, tuple) and all(
      isinstance(axis, int) and not isinstance(axis, bool) for axis in axes)
  if not whole and not callable(axes):
    raise ValueError(f'`{name}` (={axes!r}) must be a tuple of integers, a '
                     'mapping of regular expressions to such, or a function '
                     'of path and leaf.')
  return axes


def _compiled(name: str, pattern: str) -> re.Pattern:
  try:
    return re.compile(pattern)
  except (TypeError, re.error) as error:
    raise ValueError(f'`{name}` has {pattern!r}, which is no regular '
                     f'expression: {error}.') from None


def first_match(patterns: Mapping[str, Any], path: trees.Path,
                default: Any = None) -> Any:
  """The value of the first pattern that is found in a path.

  Example:
    >>> first_match({'head': 1, '.*': 2}, 'stem/kernel')
    2
  """
  return next((value for pattern, value in patterns.items()
               if re.search(pattern, path)), default)


def check_is_sparse(is_sparse: IsSparse) -> IsSparse:
  """Returns the choice if it is well formed, else raises ValueError."""
  if is_sparse is None or callable(is_sparse):
    return is_sparse
  try:
    rules = [(re.compile(pattern), value) for pattern, value in _rules(
        is_sparse)]
    if isinstance(is_sparse, str) or not all(
        isinstance(value, bool) for _, value in rules):
      raise ValueError('no rules')
  except (TypeError, ValueError, re.error) as error:
    raise ValueError(f'`is_sparse` (={is_sparse!r}) must be a function of path '
                     'and leaf, or a list of (regular expression, bool): '
                     f'{error}.') from error
  return is_sparse


def _rules(is_sparse):
  return is_sparse.items() if isinstance(is_sparse, Mapping) else is_sparse


def axes_of(axes: Axes, path: trees.Path, leaf: Any,
            name: str = 'batch_axes') -> tuple[int, ...]:
  """Axes given as a tuple, by patterns or as a function, made positive.

  None, of a pattern's or function's, stays None: nothing is said of the leaf.
  """
  chosen = axes(path, leaf) if callable(axes) else axes
  if isinstance(axes, Mapping):
    chosen = first_match(axes, path)
  if chosen is None:
    return None
  for axis in chosen:
    if not -leaf.ndim <= axis < leaf.ndim:
      raise ValueError(f'`{name}` (={chosen!r}) has {axis}, which is not an '
                       f'axis of {path!r}, of shape {leaf.shape}.')
  own = tuple(sorted({axis % leaf.ndim for axis in chosen}))
  if len(own) < len(chosen):
    raise ValueError(f'`{name}` (={chosen!r}) names an axis of {path!r}, of '
                     f'shape {leaf.shape}, twice.')
  return own


def batch_axes_of(axes: Axes, path: trees.Path, leaf: Any) -> tuple[int, ...]:
  """Like `axes_of`, but a tuple skips leaves it does not fit (a bias)."""
  if isinstance(axes, tuple) and any(
      not -leaf.ndim <= axis < leaf.ndim for axis in axes):
    return ()
  return axes_of(axes, path, leaf) or ()


def contracting_axes(path: trees.Path, ndim: int) -> tuple[int, ...]:
  """The axes of a kernel that its product sums over, spatial ones apart.

  Kernels of Dense (in, out) and Conv (..., in, out) contract their second
  last axis; those of attention are known by Flax's names for them.

  Args:
    path: the leaf's keys, joined by '/'.
    ndim: its number of axes, stacked ones not counted.

  Example:
    >>> contracting_axes('Dense_0/kernel', 2)
    (0,)
    >>> contracting_axes('Conv_0/kernel', 4)
    (2,)
    >>> contracting_axes('attention/out/kernel', 3)
    (0, 1)
  """
  parts = path.split('/')
  owner = parts[-2] if len(parts) > 1 else ''
  if ndim == 3 and owner in _ATTENTION:
    return _ATTENTION[owner]
  return (max(ndim - 2, 0),)


def select(params: trees.PyTree, is_sparse: IsSparse = None,
           batch_axes: Axes = ()) -> dict[trees.Path, Any]:
  """The leaves that may be sparse, as `{path: leaf}`.

  A leaf without entries never is, whatever chooses it.

  Args:
    params: a tree of arrays or of shapes.
    is_sparse: a predicate on (path, leaf), or rules {regex: bool} (or pairs)
      of which the first that is found in the path decides; leaves without a
      rule follow `is_kernel`. None means `is_kernel` for all.
    batch_axes: axes that stack layers: a tuple, a mapping of patterns, or a
      function of (path, leaf).

  Returns:
    `{path: leaf}`, in the order of the tree.

  Raises:
    ValueError: if a rule is found in no path, or nothing is selected.

  Example:
    >>> params = {'stem': jnp.zeros((3, 4)), 'head': jnp.zeros((4, 2))}
    >>> list(select(params, [('stem', False)]))
    ['head']
  """
  leaves = trees.leaves_by_path(params)
  chooses = _predicate(is_sparse, batch_axes, leaves)
  chosen = {path: leaf for path, leaf in leaves.items()
            if hasattr(leaf, 'ndim') and 0 not in leaf.shape
            and chooses(path, leaf)}
  if isinstance(batch_axes, tuple) and batch_axes and not any(
      batch_axes_of(batch_axes, path, leaf) for path, leaf in chosen.items()):
    raise ValueError(f'`batch_axes` (={batch_axes!r}) are axes of none of the '
                     f'leaves {sorted(chosen)}.')
  integers = [path for path, leaf in chosen.items()
              if not jnp.issubdtype(leaf.dtype, jnp.inexact)]
  if integers:
    raise ValueError(f'`is_sparse` (={is_sparse!r}) selects {integers}, which '
                     'are not floating.')
  if not chosen:
    raise ValueError(f'`is_sparse` (={is_sparse!r}) selects no leaf of '
                     f'{sorted(leaves)}.')
  return chosen


def check_found(name: str, patterns: Iterable[str],
                paths: Iterable[trees.Path]) -> None:
  """Raises ValueError for a pattern that is found in no path."""
  for pattern in patterns:
    if not any(re.search(pattern, path) for path in paths):
      raise ValueError(f'`{name}` has a rule {pattern!r} that is found in none '
                       f'of {sorted(paths)}.')


def _predicate(is_sparse, batch_axes, leaves):
  def default(path, leaf):
    return is_kernel(path, leaf, batch_axes_of(batch_axes, path, leaf))

  if isinstance(batch_axes, Mapping):
    check_found('batch_axes', batch_axes, leaves)
  if is_sparse is None:
    return default
  if callable(is_sparse):
    return is_sparse
  rules = [(re.compile(pattern), bool(value))
           for pattern, value in _rules(is_sparse)]
  check_found('is_sparse', [pattern.pattern for pattern, _ in rules], leaves)

  def first_rule(path, leaf):
    for pattern, value in rules:
      if pattern.search(path):
        return value
    return default(path, leaf)

  return first_rule
