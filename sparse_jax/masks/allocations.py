"""Sharing one sparsity among layers: uniform, Erdos-Renyi, ERK, uniform+."""

from collections.abc import Callable
from collections.abc import Mapping
import math
import re

from sparse_jax import checks

from sparse_jax import trees
from sparse_jax.masks import topk

Shapes = Mapping[trees.Path, tuple[int, ...]]
Allocation = Callable[[Shapes, float], Mapping[trees.Path, float]]


def uniform(shapes: Shapes, sparsity: float) -> dict[trees.Path, float]:
  """Every layer gets the same sparsity.

  Args:
    shapes: `{path: shape}` of the leaves that are sparse.
    sparsity: fraction that becomes zero, in [0, 1).

  Returns:
    `{path: sparsity}` with the keys of `shapes`.

  Example:
    >>> uniform({'a': (2, 4), 'b': (3, 6)}, 0.5)
    {'a': 0.5, 'b': 0.5}
  """
  checks.check_sparsity('sparsity', sparsity)
  return {path: float(sparsity) for path in shapes}


def erdos_renyi(shapes: Shapes, sparsity: float) -> dict[trees.Path, float]:
  """Density in proportion to (in + out) / (in * out), kernel sizes ignored.

  Layers that would be denser than 1 are made dense and the others pay for it,
  so that the entries kept sum to those of `uniform`, up to rounding.

  Example:
    >>> shapes = {'a': (2, 4), 'b': (3, 6), 'c': (2, 4, 6)}
    >>> {k: round(v, 2) for k, v in erdos_renyi(shapes, 0.5).items()}
    {'a': 0.21, 'b': 0.47, 'c': 0.56}

  Reference:
    Mocanu et al., SET, 2018, https://arxiv.org/abs/1707.04780, equation 3.
  """
  raw = {p: sum(s[-2:]) / math.prod(s[-2:]) for p, s in shapes.items()}
  return _solve(shapes, sparsity, raw)


def erk(shapes: Shapes, sparsity: float) -> dict[trees.Path, float]:
  """Density in proportion to the sum of all dimensions over their product.

  The Erdos-Renyi-Kernel rule: as `erdos_renyi`, with the kernel's own
  height and width counted. Small layers come out dense, large ones sparser.

  Example:
    >>> shapes = {'a': (2, 4), 'b': (3, 6), 'c': (2, 4, 6)}
    >>> {k: round(v, 4) for k, v in erk(shapes, 0.5).items()}
    {'a': 0.0, 'b': 0.3095, 'c': 0.6548}

  Reference:
    Evci et al., RigL, 2020, https://arxiv.org/abs/1911.11134, section 3.
  """
  raw = {p: sum(s) / math.prod(s) for p, s in shapes.items()}
  return _solve(shapes, sparsity, raw)


def uniform_plus(shapes: Shapes, sparsity: float) -> dict[trees.Path, float]:
  """Uniform, but the first layer stays dense and the last keeps a fifth.

  The other layers become sparser, so that the total stays the same. First and
  last are those of `shapes`' own order, which is the tree's: alphabetical for
  dicts. Where that is not the order of the network, pass a mapping instead.

  Raises:
    ValueError: with fewer than three layers, or if the two exceptions alone
      are more than the budget.

  Example:
    >>> shapes = {'1': (10, 10), '2': (10, 100), '3': (100, 10), '4': (10, 10)}
    >>> {k: round(v, 4) for k, v in uniform_plus(shapes, 0.9).items()}
    {'1': 0.0, '2': 0.95, '3': 0.95, '4': 0.8}

  Reference:
    Gale et al., The state of sparsity, 2019, https://arxiv.org/abs/1902.09574,
    as solved in Lee et al., LAMP, 2021.
  """
  checks.check_sparsity('sparsity', sparsity)
  if len(shapes) < 3:
    raise ValueError(f'`shapes` (={dict(shapes)}) must have three layers or '
                     'more for uniform_plus.')
  sizes = {path: math.prod(shape) for path, shape in shapes.items()}
  first, *_, last = sizes
  zeros = sparsity * sum(sizes.values())
  others = sum(sizes.values()) - sizes[first]
  if zeros <= .8 * others:
    shared = zeros / others
    return {p: 0. if p == first else shared for p in sizes}
  middle = (zeros - .8 * sizes[last]) / (others - sizes[last])
  if middle >= 1:
    raise ValueError(f'`sparsity` (={sparsity}) leaves nothing to the middle '
                     'layers under uniform_plus.')
  return {p: {first: 0., last: .8}.get(p, middle) for p in sizes}


def _solve(shapes: Shapes, sparsity: float, raw) -> dict[trees.Path, float]:
  """Scales raw densities to the budget; those above 1 become dense in turn."""
  checks.check_sparsity('sparsity', sparsity)
  sizes = {path: math.prod(shape) for path, shape in shapes.items()}
  budget = sum(topk.keep_count(n, sparsity) for n in sizes.values())
  dense = set()
  while len(dense) < len(sizes):
    rest = [path for path in sizes if path not in dense]
    room = budget - sum(sizes[path] for path in dense)
    scale = room / sum(raw[path] * sizes[path] for path in rest)
    most = max(raw[path] for path in rest)
    if scale * most <= 1:
      break
    dense |= {path for path in rest if raw[path] == most}
  return {p: 0. if p in dense else 1 - scale * raw[p] for p in sizes}


def _by_patterns(allocation, shapes) -> dict[trees.Path, float]:
  """A mapping's value of each leaf: by its path, else by the first pattern."""
  for pattern in allocation:
    if pattern not in shapes and not any(
        re.search(pattern, path) for path in shapes):
      raise ValueError(f'`allocation` names {[pattern]}, which are none of the '
                       f'sparse leaves {sorted(shapes)}.')
  return {path: allocation.get(path, next((
      value for pattern, value in allocation.items()
      if pattern not in shapes and re.search(pattern, path)), 0.))
          for path in shapes}


def allocate(allocation: Allocation | Mapping[trees.Path, float],
             shapes: Shapes, sparsity: float) -> dict[trees.Path, float]:
  """Evaluates an allocation and checks what it gives.

  Args:
    allocation: a function `(shapes, sparsity) -> {path: sparsity}`, or such a
      mapping itself, of paths or of regular expressions, the first that is
      found; a path that the mapping lacks stays dense.
    shapes: `{path: shape}`.
    sparsity: the sparsity asked for, in [0, 1).

  Returns:
    `{path: sparsity}`, each in [0, 1).

  Raises:
    ValueError: if a path is unknown or missing, or a value out of range.
  """
  if callable(allocation):
    given = dict(allocation(shapes, sparsity))
    missing = sorted(set(shapes) - set(given))
    if missing:
      raise ValueError(f'`allocation` gives no sparsity to {missing}.')
  else:
    given = _by_patterns(allocation, shapes)
  unknown = sorted(set(given) - set(shapes))
  if unknown:
    raise ValueError(f'`allocation` names {unknown}, which are none of the '
                     f'sparse leaves {sorted(shapes)}.')
  return {path: checks.check_sparsity(f'allocation[{path!r}]', given[path])
          for path in shapes}
