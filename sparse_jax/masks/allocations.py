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


class TreeShapes(dict):
  """Shapes in the order of a tree, which for dicts is the alphabet's.

  Methods call their allocation with this, so that a rule that asks which layer
  is the first does not take the alphabet for the network.
  """


def uniform(shapes: Shapes, sparsity: float) -> dict[trees.Path, float]:
  """Every layer gets the same sparsity.

  Args:
    shapes: `{path: shape}` of the leaves that are sparse.
    sparsity: fraction that becomes zero, in [0, 1).

  Returns:
    `{path: sparsity}` with the keys of `shapes`.

  Raises:
    ValueError: if `sparsity` is not in [0, 1).

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

  Args:
    shapes, sparsity: as in `uniform`.

  Returns:
    `{path: sparsity}` with the keys of `shapes`.

  Example:
    >>> shapes = {'a': (2, 4), 'b': (3, 6), 'c': (2, 4, 6)}
    >>> {k: round(v, 2) for k, v in erdos_renyi(shapes, 0.5).items()}
    {'a': 0.21, 'b': 0.47, 'c': 0.56}

  Reference:
    Mocanu et al., SET, 2018, https://arxiv.org/abs/1707.04780, equation 3.
  """
  raw = {p: sum(s[-2:]) / math.prod(s[-2:]) for p, s in shapes.items()}
  return _solve(shapes, sparsity, raw)


def erk(shapes: Shapes, sparsity: float, *, power_scale: float = 1.
        ) -> dict[trees.Path, float]:
  """Density in proportion to the sum of all dimensions over their product.

  The Erdos-Renyi-Kernel rule: as `erdos_renyi`, with the kernel's own
  height and width counted. Small layers come out dense, large ones sparser.

  Args:
    shapes, sparsity: as in `uniform`.
    power_scale: the power of that ratio, at least 0: 1 is the paper's rule, 0
      is `uniform`. To a method pass
      `functools.partial(erk, power_scale=...)`.

  Returns:
    `{path: sparsity}` with the keys of `shapes`.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> shapes = {'a': (2, 4), 'b': (3, 6), 'c': (2, 4, 6)}
    >>> {k: round(v, 4) for k, v in erk(shapes, 0.5).items()}
    {'a': 0.0, 'b': 0.3095, 'c': 0.6548}

  Reference:
    Evci et al., RigL, 2020, https://arxiv.org/abs/1911.11134, section 3;
    `erk_power_scale` of the official code.
  """
  checks.check_non_negative('power_scale', power_scale)
  raw = {p: (sum(s) / math.prod(s))**power_scale for p, s in shapes.items()}
  return _solve(shapes, sparsity, raw)


def uniform_plus(shapes: Shapes, sparsity: float, *, first: str | None = None,
                 last: str | None = None) -> dict[trees.Path, float]:
  """Uniform, but the first layer stays dense and the last keeps a fifth.

  The other layers become sparser, so that the total stays the same. To a
  method pass `functools.partial(uniform_plus, first='stem', last='head')`.

  Args:
    shapes: as in `uniform`. Its own order is the network's if you made it; the
      order of a tree of parameters is not, and a method's leaves are used as
      they are only if their names differ in numbers alone (`Dense_0`,
      `Dense_1`, ...): these are counted.
    sparsity: as in `uniform`.
    first, last: a path, or a regular expression that is found in one path
      alone: the layer that the network computes first, and last. None takes it
      from the order. `jaxprs.layer_order` reads both off a function.

  Returns:
    `{path: sparsity}` with the keys of `shapes`.

  Raises:
    ValueError: with fewer than three layers; if the two exceptions alone are
      more than the budget; where the order of the network is not known.

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
  start, end = _ends(shapes, first, last)
  zeros = sparsity * sum(sizes.values())
  others = sum(sizes.values()) - sizes[start]
  if zeros <= .8 * others:
    shared = zeros / others
    return {p: 0. if p == start else shared for p in sizes}
  middle = (zeros - .8 * sizes[end]) / (others - sizes[end])
  if middle >= 1:
    raise ValueError(f'`sparsity` (={sparsity}) leaves nothing to the middle '
                     'layers under uniform_plus.')
  return {p: {start: 0., end: .8}.get(p, middle) for p in sizes}


def _ends(shapes, first, last) -> tuple[trees.Path, trees.Path]:
  """The first and the last layer: as named, else by the order."""
  named = {name: _only_match(name, pattern, shapes) for name, pattern in (
      ('first', first), ('last', last)) if pattern is not None}
  order = list(shapes)
  if isinstance(shapes, TreeShapes) and len(named) < 2:
    order = _by_number(order)
  start, end = named.get('first', order[0]), named.get('last', order[-1])
  if start == end:
    raise ValueError(f'`first` and `last` (={start!r}) must be two layers.')
  return start, end


def _only_match(name, pattern, shapes) -> trees.Path:
  found = [pattern] if pattern in shapes else [
      path for path in shapes if re.search(pattern, path)]
  if len(found) != 1:
    raise ValueError(f'`{name}` (={pattern!r}) must be found in one of the '
                     f'sparse leaves {sorted(shapes)}, not in {found}.')
  return found[0]


def _by_number(paths: list[trees.Path]) -> list[trees.Path]:
  """Paths that differ in their numbers alone, in the order of these."""
  if len({re.sub(r'\d+', '#', path) for path in paths}) > 1:
    raise ValueError(
        '`first` and `last` must be named with uniform_plus: parameters are in '
        f'alphabetical order, from {paths[0]!r} to {paths[-1]!r}, which need '
        'not be that of the network. Pass allocation=functools.partial('
        'sparse_jax.uniform_plus, first=..., last=...).')
  return sorted(paths, key=lambda path: [int(n) for n in
                                         re.findall(r'\d+', path)])


def _solve(shapes: Shapes, sparsity: float, raw) -> dict[trees.Path, float]:
  """Scales raw densities to the budget; those above 1 become dense in turn."""
  checks.check_sparsity('sparsity', sparsity)
  sizes = {path: math.prod(shape) for path, shape in shapes.items()}
  budget = sum(topk.keep_count(n, sparsity) for n in sizes.values())
  dense: set[str] = set()
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
