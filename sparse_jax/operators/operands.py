"""What a product keeps of its operands: how many entries, and who competes."""

from collections.abc import Callable
from collections.abc import Sequence
import math
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from sparse_jax import checks
from sparse_jax.masks import layouts
from sparse_jax.operators import residuals
from sparse_jax.masks import selection
from sparse_jax.masks import structures


class Operands(NamedTuple):
  """The sparsity of each operand of a product in each pass, in [0, 1).

  SWAT is Operands(s, 0, s, a, 0), meProp Operands(output_gradient=g); the
  sensitivity studies are other combinations. A sparsity is a number, or a
  float32[] array where it moves; what is kept is then not packed.

  Attributes:
    forward_weight: of w in y.
    forward_activation: of x in y.
    backward_weight: of w in dX.
    backward_activation: of x in dW.
    output_gradient: of dy in dX and dW.

  Raises:
    ValueError: naming a sparsity outside [0, 1), by the operators.

  Example:
    >>> import sparse_jax
    >>> einsum = sparse_jax.operators.sparse_einsum(
    ...     Operands(backward_activation=.5))
    >>> x, w = jnp.array([[1., 9.]]), jnp.ones((2, 1))
    >>> einsum('bi,io->bo', x, w)  # All of x; half in the gradient of w.
    Array([[10.]], dtype=float32)
    >>> jax.grad(lambda w: einsum('bi,io->bo', x, w).sum())(w).ravel()
    Array([0., 9.], dtype=float32)

  Reference:
    Raihan and Aamodt, SWAT, 2020, https://arxiv.org/abs/2001.01969,
    equations 1 to 3. Sun et al., meProp, 2017,
    https://arxiv.org/abs/1706.06197.
  """

  forward_weight: float | jax.Array = 0.
  forward_activation: float | jax.Array = 0.
  backward_weight: float | jax.Array = 0.
  backward_activation: float | jax.Array = 0.
  output_gradient: float | jax.Array = 0.


class Options(NamedTuple):
  """The keywords that the operators share, checked."""

  activation_scope: str | int
  gradient_scope: str | int
  structure: structures.Structure
  batch_axes: tuple[int, ...]
  pack: bool | str


class Axes(NamedTuple):
  """What the axes of one product mean."""

  order: tuple[int, ...]  # Of the weight: stacked, leading, rows, columns.
  rows: int  # How many axes of the weight are summed over.
  columns: int  # How many become axes of the output.
  features: tuple[int, ...]  # Those, in the output.
  examples: bool  # Whether axis 0 of activation and output are the examples.


class Groups(NamedTuple):
  """What competes in one operand."""

  scores: jax.Array
  spread: Callable[[jax.Array], jax.Array]  # Decisions of groups to entries.
  axes: tuple[int, ...]  # Along which the scores compete.

  @property
  def rivals(self) -> int:
    return math.prod(self.scores.shape[axis] for axis in self.axes)


def checked(operands: Operands, activation_scope, gradient_scope, structure,
            batch_axes, pack) -> Options:
  """The options, or ValueError naming the bad argument."""
  if not isinstance(operands, Operands):
    raise ValueError(f'`operands` (={operands!r}) must be Operands(...).')
  for name, value in operands._asdict().items():
    if not isinstance(value, jax.Array):
      checks.check_sparsity(name, value)
  _check_scope('activation_scope', activation_scope, ('tensor', 'example'))
  _check_scope('gradient_scope', gradient_scope,
               ('tensor', 'example', 'unified'))
  structures.check_structure(structure)
  for name in ('forward_weight', 'backward_weight'):
    _check_fixed_sparsity(name, structure, getattr(operands, name))
  if callable(batch_axes):
    raise ValueError(f'`batch_axes` (={batch_axes!r}) must be a tuple.')
  selection.check_axes('batch_axes', batch_axes)
  if pack != 'split':
    checks.check_bool('pack', pack)
  return Options(activation_scope, gradient_scope, structure, batch_axes, pack)


def is_right(weight: str) -> bool:
  """Whether the weight is the right operand."""
  if weight not in ('left', 'right'):
    raise ValueError(f'`weight` (={weight!r}) must be \'left\' or \'right\'.')
  return weight == 'right'


def _check_fixed_sparsity(name, structure, value):
  """NM fixes the sparsity of a weight that is sparse at all."""
  if not isinstance(value, jax.Array) and value == 0:
    return
  try:
    layouts.check_fixed_sparsity(structure, value)
  except ValueError as error:
    raise ValueError(str(error).replace('`sparsity`', f'`{name}`')) from None


def _check_scope(name, scope, words):
  if isinstance(scope, str) and scope in words:
    return
  if isinstance(scope, str):
    raise ValueError(f'`{name}` (={scope!r}) must be one of {words} or a '
                     'number of parts.')
  checks.check_count(name, scope, least=1)


def check_product(options: Options, axes: Axes, x: jax.Array,
                  has_thresholds: bool) -> None:
  """Raises ValueError if the options do not suit one product."""
  for name in ('activation_scope', 'gradient_scope'):
    scope = getattr(options, name)
    if scope in ('tensor', 'unified'):
      continue
    if not axes.examples:
      raise ValueError(f'`{name}` (={scope!r}) needs products whose axis 0 are '
                       'the examples, of the activation and of the output.')
    if scope != 'example' and x.shape[0] % scope:
      raise ValueError(f'`{name}` (={scope!r}) must divide axis 0 of the '
                       f'activation, of shape {x.shape}.')
    if has_thresholds and scope == 'example':
      raise ValueError(f'`{name}` (={scope!r}) must not be \'example\' with '
                       '`thresholds`, which hold for the whole tensor.')
  if has_thresholds and isinstance(options.structure, structures.NM):
    raise ValueError(f'`structure` (={options.structure}) has a threshold for '
                     'each group; `thresholds` hold one for all.')


def dot_axes(dimension_numbers, lhs_ndim: int, rhs_ndim: int,
             weight: str) -> Axes:
  """The axes of a dot_general."""
  (lhs_rows, rhs_rows), (lhs_batch, rhs_batch) = dimension_numbers
  lhs = [f'lhs{i}' for i in range(lhs_ndim)]
  shared = dict(zip((*rhs_rows, *rhs_batch), (*lhs_rows, *lhs_batch)))
  rhs = [lhs[shared[i]] if i in shared else f'rhs{i}' for i in range(rhs_ndim)]
  batch = [lhs[i] for i in lhs_batch]
  free = [i for i in (*lhs, *rhs) if (i in lhs) != (i in rhs)]
  return _named_axes(lhs, rhs, batch + free, weight)


def einsum_axes(subscripts: str, weight: str) -> Axes:
  """The axes of an einsum of two operands.

  Raises:
    ValueError: if it is no such einsum, or leaves axes of the weight unnamed.
  """
  try:
    operands, out = subscripts.replace(' ', '').split('->')
    lhs, rhs = operands.split(',')
  except ValueError:
    raise ValueError(f'`subscripts` (={subscripts!r}) must name two operands '
                     'and, after "->", the output.') from None
  if '.' in (rhs if weight == 'right' else lhs):
    raise ValueError(f'`subscripts` (={subscripts!r}) must name every axis of '
                     'the weight.')
  return _named_axes(lhs, rhs, out, weight)


def _named_axes(lhs: Sequence[str], rhs: Sequence[str], out: Sequence[str],
                weight: str) -> Axes:
  x, w = (lhs, rhs) if weight == 'right' else (rhs, lhs)
  rows = [i for i in w if i not in out]
  columns = [i for i in w if i in out and i not in x]
  stacked = [i for i in w if i in out and i in x]
  # From behind, where an ellipsis may stand before but not after.
  features = tuple(out.index(i) - len(out) if '.' in out[:out.index(i)]
                   else out.index(i) for i in columns)
  order = tuple(w.index(i) for i in (*stacked, *rows, *columns))
  return Axes(order, len(rows), len(columns), features, x[:1] == out[:1])


def conv_axes(numbers: lax.ConvDimensionNumbers) -> Axes:
  """The axes of a convolution, of the right operand as its weight."""
  out, into, *spatial = numbers.rhs_spec
  examples = numbers.lhs_spec[0] == 0 and numbers.out_spec[0] == 0
  return Axes((*spatial, into, out), 1, 1, (numbers.out_spec[1],), examples)


def parts_of(scope: str | int, tensor: jax.Array) -> int:
  """How many parts of axis 0 have a top-k of their own."""
  if isinstance(scope, str):
    return tensor.shape[0] if scope == 'example' else 1
  return scope


def groups(name: str, tensor: jax.Array, options: Options, axes: Axes
           ) -> Groups:
  """What competes in the operand of that name."""
  if name.endswith('weight'):
    return weight_groups(tensor, options, axes)
  if name.endswith('activation'):
    return activation_groups(tensor, options.activation_scope)
  if options.gradient_scope == 'unified':
    return feature_groups(tensor, axes.features)
  return activation_groups(tensor, options.gradient_scope)


def activation_groups(x: jax.Array, scope: str | int) -> Groups:
  """Entries of a tensor, in parts of its leading axis."""
  parts, scores = parts_of(scope, x), jnp.abs(x)
  if parts == 1:
    return Groups(scores, lambda mask: mask, tuple(range(x.ndim)))
  return Groups(residuals.split(scores, parts),
                lambda mask: residuals.join(mask, x.shape), (1,))


def feature_groups(x: jax.Array, features: tuple[int, ...]) -> Groups:
  """Whole features of a tensor, by the sum of their magnitudes."""
  kept = {axis % x.ndim for axis in features}
  others = tuple(i for i in range(x.ndim) if i not in kept)
  sums = jnp.sum(jnp.abs(x).astype(jnp.float32), others, keepdims=True)
  return Groups(sums, lambda mask: jnp.broadcast_to(mask, x.shape),
                tuple(range(x.ndim)))


def weight_groups(w: jax.Array, options: Options, axes: Axes) -> Groups:
  """Groups of a weight, whatever the order of its axes."""
  plain = isinstance(options.structure, structures.Unstructured)
  order = tuple(range(w.ndim)) if plain else axes.order
  stacked = selection.axes_of(options.batch_axes, 'weight', w)
  first = w.ndim - axes.rows - axes.columns
  layout = layouts.layout(
      tuple(w.shape[i] for i in order), path='weight',
      structure=options.structure,
      batch_axes=tuple(sorted(order.index(axis) for axis in stacked)),
      contracting=None if plain else tuple(range(first, first + axes.rows)))
  back = tuple(order.index(i) for i in range(w.ndim))
  return Groups(layout.group(jnp.abs(w).transpose(order)),
                lambda mask: layout.spread(mask).transpose(back),
                layout.competing)
