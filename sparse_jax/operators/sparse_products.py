"""Products and convolutions whose operands are sparse, in each pass its own.

A product y = x w of an activation and a weight is met three times in training:
as y itself, as dX = dy w^T and as dW = x^T dy. Each time each operand may be
replaced by its largest entries. All are one bilinear function, so that one rule
serves `dot_general`, `conv_general_dilated` and `einsum`.
"""

from collections.abc import Callable
import functools
import math
from typing import Any
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from sparse_jax.operators import operands as operands_lib
from sparse_jax.operators import ordering
from sparse_jax.masks import placing
from sparse_jax.operators import residuals
from sparse_jax.masks import structures
from sparse_jax.masks import topk

Operands = operands_lib.Operands
_UNSTRUCTURED = structures.Unstructured()
# Room for entries above a stored threshold, over the count asked for.
_SLACK = 1.25


class _Rule(NamedTuple):
  """All that is static in one product."""

  product: Callable[[jax.Array, jax.Array], jax.Array]
  sparsities: operands_lib.Operands  # None where traced.
  options: operands_lib.Options
  axes: operands_lib.Axes
  activation: Any  # Types of the two operands.
  weight: Any


class _Traced(NamedTuple):
  """All that is traced in one product, besides its operands."""

  sparsities: operands_lib.Operands  # None where static.
  thresholds: operands_lib.Operands | None
  due: jax.Array | None


class _Saved(NamedTuple):
  """What the backward pass of one product keeps."""

  activation: residuals.Packed
  weight: jax.Array
  weight_bits: jax.Array | None
  traced: _Traced
  thresholds: operands_lib.Operands


def sparse_dot_general(operands: Operands, *, weight: str = 'right',
                       activation_scope: str | int = 'tensor',
                       gradient_scope: str | int = 'tensor',
                       structure: structures.Structure = _UNSTRUCTURED,
                       batch_axes: tuple[int, ...] = (),
                       pack: bool | str = True,
                       thresholds: Operands | None = None,
                       due: bool | jax.Array = True):
  """Makes a `jax.lax.dot_general` whose operands are sparse in each pass.

  Of each operand exactly `keep_count` entries of largest magnitude are kept,
  ties going to the earlier, and the others read as 0:
  y = x[forward_activation] w[forward_weight],
  dX = dy[output_gradient] w[backward_weight]^T,
  dW = x[backward_activation]^T dy[output_gradient].

  Laws: y depends on no backward setting; dX and dW are masked by nothing else,
  so that weights outside the kept ones still move (SWAT) and activations
  outside them still pass a gradient on; with all sparsities 0 it is
  `dot_general`.

  Args:
    operands: the sparsities.
    weight: 'right' or 'left', the operand that is the weight.
    activation_scope: among what the entries of x compete: 'tensor', the whole
      of it; 'example', each slice of axis 0; or a number of equal parts of
      axis 0. With as many parts as devices share a batch, as in the authors'
      data parallel code, nothing is gathered, the packed residual included.
    gradient_scope: the same for dy, or 'unified': whole output features, by
      their sum of magnitudes over all else (meProp's unified variant).
    structure: what is kept together of the weight.
    batch_axes: axes of the weight that stack layers, each with its own top-k.
    pack: whether x is kept for dW as its kept entries alone. It saves memory
      and costs time; without it x is kept whole, with zeros. Of scope
      'tensor' one pack lies on every device; the other scopes are split like
      the batch. 'split' splits that of 'tensor', too: the top-k is the same,
      but a device has room for a quarter more than its share, and beyond it
      the last entries are lost to dW.
    thresholds: None for an exact top-k each time. Otherwise the smallest
      magnitude that each operand keeps, a float32[] each, and the *gradient*
      with respect to it is the threshold to be stored for the next step: the
      one measured now if `due`, else the one given. One set serves one
      product alone. Zeros are never kept. A packed activation has room for a
      quarter more than `keep_count`; beyond it the last entries are lost.
    due: bool[], whether thresholds are measured anew; not used without them.

  Returns:
    A function of (lhs, rhs, dimension_numbers, ...) as `jax.lax.dot_general`,
    for the `dot_general=` of Flax's layers.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> swat = sparse_dot_general(Operands(.5, 0, .5, backward_activation=.5))
    >>> x, w = jnp.array([[1., -4.]]), jnp.array([[3., .1], [.2, 5.]])
    >>> product = lambda x, w: swat(x, w, (((1,), (0,)), ((), ())))
    >>> product(x, w)
    Array([[  3., -20.]], dtype=float32)
    >>> jax.grad(lambda w: product(x, w).sum())(w)
    Array([[ 0.,  0.],
           [-4., -4.]], dtype=float32)

  Reference:
    Raihan and Aamodt, SWAT, 2020, https://arxiv.org/abs/2001.01969,
    algorithm 1. The authors' code keeps every entry that reaches the k-th
    magnitude; here ties do not change the count, unless `thresholds` are used.
  """
  options = operands_lib.checked(operands, activation_scope, gradient_scope,
                                 structure, batch_axes, pack)
  right = operands_lib.is_right(weight)

  def dot_general(lhs, rhs, dimension_numbers, *args, **kwargs):
    def product(x, w):
      pair = (x, w) if right else (w, x)
      return lax.dot_general(*pair, dimension_numbers, *args, **kwargs)

    x, w = (lhs, rhs) if right else (rhs, lhs)
    axes = operands_lib.dot_axes(dimension_numbers, lhs.ndim, rhs.ndim, weight)
    return _apply(product, operands, options, axes, x, w, thresholds, due)

  return dot_general


def sparse_conv_general_dilated(operands: Operands, *,
                                activation_scope: str | int = 'tensor',
                                gradient_scope: str | int = 'tensor',
                                structure: structures.Structure = _UNSTRUCTURED,
                                batch_axes: tuple[int, ...] = (),
                                pack: bool | str = True,
                                thresholds: Operands | None = None,
                                due: bool | jax.Array = True):
  """Makes a `jax.lax.conv_general_dilated` whose operands are sparse.

  The arguments and laws are those of `sparse_dot_general`; the right operand
  is the weight. With `structure=Channel()` it is structured SWAT: whole
  spatial slices of the weight, by their L1 norm. Activations stay
  unstructured, as the authors' do.

  Returns:
    A function with the signature of `jax.lax.conv_general_dilated`, for the
    `conv_general_dilated=` of Flax's layers.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> conv = sparse_conv_general_dilated(Operands(forward_activation=.75))
    >>> x, w = jnp.array([[[1.], [-4.], [2.], [3.]]]), jnp.ones((2, 1, 1))
    >>> conv(x, w, (1,), 'VALID', dimension_numbers=('NWC', 'WIO', 'NWC'))
    Array([[[-4.],
            [-4.],
            [ 0.]]], dtype=float32)
  """
  options = operands_lib.checked(operands, activation_scope, gradient_scope,
                                 structure, batch_axes, pack)

  def conv_general_dilated(lhs, rhs, *args, **kwargs):
    def product(x, w):
      return lax.conv_general_dilated(x, w, *args, **kwargs)

    numbers = kwargs.get('dimension_numbers', args[4] if args[4:] else None)
    axes = operands_lib.conv_axes(
        lax.conv_dimension_numbers(lhs.shape, rhs.shape, numbers))
    return _apply(product, operands, options, axes, lhs, rhs, thresholds, due)

  return conv_general_dilated


def sparse_einsum(operands: Operands, *, weight: str = 'right',
                  activation_scope: str | int = 'tensor',
                  gradient_scope: str | int = 'tensor',
                  structure: structures.Structure = _UNSTRUCTURED,
                  batch_axes: tuple[int, ...] = (), pack: bool | str = True,
                  thresholds: Operands | None = None,
                  due: bool | jax.Array = True):
  """Makes a `jax.numpy.einsum` of two operands that are sparse in each pass.

  The arguments and laws are those of `sparse_dot_general`. `jnp.einsum` may
  hand its operands to `dot_general` in either order, so that only this
  function, and no `_dot_general=`, knows which one is the weight.

  Returns:
    A function of (subscripts, lhs, rhs, ...), for NNX's `einsum_op=`.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> einsum = sparse_einsum(Operands(forward_weight=.5))
    >>> einsum('bi,oi->bo', jnp.ones((1, 2)), jnp.array([[3., 1.], [2., 4.]]))
    Array([[3., 4.]], dtype=float32)
  """
  options = operands_lib.checked(operands, activation_scope, gradient_scope,
                                 structure, batch_axes, pack)
  right = operands_lib.is_right(weight)

  def einsum(subscripts, lhs, rhs, **kwargs):
    def product(x, w):
      pair = (x, w) if right else (w, x)
      return jnp.einsum(subscripts, *pair, **kwargs)

    x, w = (lhs, rhs) if right else (rhs, lhs)
    axes = operands_lib.einsum_axes(subscripts, weight)
    return _apply(product, operands, options, axes, x, w, thresholds, due)

  return einsum


def first_thresholds() -> Operands:
  """Thresholds to start from, float32[] each; the first step must be `due`.

  Example:
    >>> dot = jax.jit(lambda x, w, t, due: sparse_dot_general(
    ...     Operands(backward_activation=.5), thresholds=t, due=due)(
    ...         x, w, (((1,), (0,)), ((), ()))).sum())
    >>> x, w, t = jnp.array([[1., 4., 2., 3.]]), jnp.ones((4, 1)), None
    >>> for step in range(4):
    ...   t = first_thresholds() if t is None else t
    ...   dw, t = jax.grad(dot, (1, 2))(x + step, w, t, step % 3 == 0)
    ...   print(t.backward_activation, dw.ravel())
    3.0 [0. 4. 0. 3.]
    3.0 [0. 5. 3. 4.]
    3.0 [3. 6. 4. 5.]
    6.0 [0. 7. 0. 6.]
  """
  return Operands(*(jnp.zeros((), jnp.float32) for _ in Operands._fields))


def _apply(product, operands, options, axes, x, w, thresholds, due):
  """One product with sparse operands."""
  x, w = jnp.asarray(x), jnp.asarray(w)
  operands_lib.check_product(options, axes, x, thresholds is not None)
  fixed = Operands(*(None if isinstance(s, jax.Array) else float(s)
                     for s in operands))
  moving = Operands(*(s if isinstance(s, jax.Array) else None
                      for s in operands))
  if thresholds is not None:
    thresholds = Operands(*(jnp.asarray(t, jnp.float32) for t in thresholds))
  rule = _Rule(product, fixed, options, axes, jax.typeof(x), jax.typeof(w))
  return _product(rule, x, w, _Traced(moving, thresholds, jnp.asarray(due)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(rule, x, w, traced):
  masks, _ = _forward_masks(rule, x, w, traced)
  return _masked_product(rule, x, w, masks)


def _forward_masks(rule, x, w, traced):
  """The masks of both operands, and the thresholds that made them."""
  w_mask, w_threshold = _keep(rule, 'forward_weight', w, traced)
  x_mask, x_threshold = _keep(rule, 'forward_activation', x, traced)
  used = Operands(w_threshold, x_threshold, None, None, None)
  return Operands(w_mask, x_mask), used


def _masked_product(rule, x, w, masks):
  return rule.product(_where(masks.forward_activation, x),
                      _where(masks.forward_weight, w))


def _product_forward(rule, x, w, traced):
  """Packs beside the product, after both of which the activation is free."""
  masks, used = _forward_masks(rule, x, w, traced)
  w_mask, w_threshold = _keep_again(rule, 'weight', w, traced, masks)
  x_mask, x_threshold = _keep_again(rule, 'activation', x, traced, masks)
  used = used._replace(backward_weight=w_threshold,
                       backward_activation=x_threshold)
  bits = None if w_mask is None else residuals.mask_bits(w_mask)
  packed = _save(rule, x, x_mask, traced)
  y = _masked_product(rule, x, w, masks)
  return _after(y, packed, packed.values), _Saved(packed, w, bits, traced, used)


def _product_backward(rule, saved, dy):
  """Unpacks when dy has come, which is free after both products."""
  mask, threshold = _keep(rule, 'output_gradient', dy, saved.traced)
  dy, packed = _where(mask, dy), saved.activation
  x = residuals.unpack(
      packed._replace(places=_after(packed.places, packed, dy)),
      rule.activation)
  dw, = jax.linear_transpose(lambda w: rule.product(x, w), rule.weight)(dy)
  w = saved.weight
  if saved.weight_bits is not None:
    w = _where(residuals.bits_mask(saved.weight_bits, w.shape), w)
  dx, = jax.linear_transpose(lambda x: rule.product(x, w), rule.activation)(dy)
  dx = _after(dx, packed, dw)
  used = saved.thresholds._replace(output_gradient=threshold)
  return dx, dw, _stored(saved.traced, used)


def _after(x, packed, first):
  """Orders the passes where it frees memory: where something is packed."""
  return x if packed.places is None else ordering.after(x, first)


_product.defvjp(_product_forward, _product_backward)


def _stored(traced: _Traced, used: Operands) -> _Traced | None:
  """The thresholds for the next step, in the place of gradients."""
  if traced.thresholds is None:
    return None
  after = Operands(*(old if new is None else new
                     for old, new in zip(traced.thresholds, used)))
  return _Traced(jax.tree.map(lambda _: None, after), after, None)


def _save(rule, x, mask, traced) -> residuals.Packed:
  """The activation as the gradient of the weight will see it."""
  sparsity = rule.sparsities.backward_activation
  if mask is None or sparsity is None or not rule.options.pack:
    return residuals.Packed(_where(mask, x), None)
  parts = operands_lib.parts_of(rule.options.activation_scope, x)
  room = 1. if traced.thresholds is None else _SLACK
  if rule.options.pack == 'split' and parts == 1 and rule.axes.examples and (
      placing.is_shared(x)):
    sizes = placing.shared_axes(placing.mesh_of(x))
    parts = math.prod(sizes[name] for name in placing.row_axes(x))
    room = _SLACK if parts > 1 else room
  if parts == 1 and placing.is_split(x):
    raise ValueError(
        f'`activation_scope` (={rule.options.activation_scope!r}) packs the '
        f'whole activation as one, but it is sharded by {jax.typeof(x)}. Give '
        'as many parts as devices share it, \'example\', `pack=\'split\'` or '
        '`pack=False`.')
  count = topk.keep_count(x.size // parts, sparsity)
  if room > 1:
    count = min(math.ceil(count * room), x.size // parts)
  return residuals.pack(x, mask, count, parts=parts)


def _keep_again(rule, operand, tensor, traced, masks):
  """What the backward pass keeps; the forward's choice if it is the same."""
  forward, backward = f'forward_{operand}', f'backward_{operand}'
  same = getattr(rule.sparsities, forward)
  if same is not None and same == getattr(rule.sparsities, backward):
    if traced.thresholds is None:
      return getattr(masks, forward), None
  return _keep(rule, backward, tensor, traced)


def _keep(rule, name, tensor, traced: _Traced):
  """bool[...] of the entries kept, None for all; and the threshold used."""
  sparsity = getattr(rule.sparsities, name)
  if sparsity == 0:
    return None, None
  if sparsity is None:
    sparsity = getattr(traced.sparsities, name)
  if traced.thresholds is None:
    choose = functools.partial(_largest, rule, name, sparsity)
    return placing.automatic(choose, tensor, tensor), None
  groups = operands_lib.groups(name, tensor, rule.options, rule.axes)
  scores = groups.scores
  k = topk.keep_count(scores.size, sparsity)
  threshold = lax.cond(traced.due, lambda: _smallest_kept(scores, k),
                       lambda: getattr(traced.thresholds, name))
  return groups.spread((scores > 0) & (scores >= threshold)), threshold


def _largest(rule, name, sparsity, tensor) -> jax.Array:
  groups = operands_lib.groups(name, tensor, rule.options, rule.axes)
  k = topk.keep_count(groups.rivals, sparsity)
  return groups.spread(topk.top_k_mask(groups.scores, k, axes=groups.axes))


def _smallest_kept(scores, k) -> jax.Array:
  """float32[]: the k-th largest."""
  kept = topk.top_k_mask(scores, k)
  return jnp.min(scores, initial=jnp.inf, where=kept).astype(jnp.float32)


def _where(mask, x):
  return x if mask is None else jnp.where(mask, x, jnp.zeros((), x.dtype))
