"""The weights of a function as matrices, and what they are multiplied by.

A cotangent may be anything that has the right shape. So the place of each entry
of a leaf in its product, and the sums over the inputs of that product, are read
off as gradients: they pass through whatever the function is made of.
"""

from collections.abc import Callable
from collections.abc import Collection
import functools
import math
from typing import Any
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from sparse_jax import trees
from sparse_jax.jaxprs import products
from sparse_jax.jaxprs import provenance
from sparse_jax.jaxprs import replacing

Product = products.Product
# Numbers are read off in digits so small that sums of bfloat16 are exact.
_BITS = 4
_LOOPS = ('scan', 'while', 'shard_map')


class Layer(NamedTuple):
  """A leaf as the matrices that its products use.

  The view of one slice is [groups, positions, inputs, outputs]. Groups are
  products side by side: batch axes of a product, feature groups of a
  convolution. A product sums over positions, the taps of a convolution, and
  over inputs: k = positions * inputs.
  """

  path: trees.Path
  view: tuple[int, int, int, int]
  slices: int  # Layers that the leaf stacks for a loop.
  repeats: int  # Runs of the loop that use each of them.
  places: Any  # int32[slices, *view] in the flat leaf; its size: nowhere.

  def read(self, leaf: jax.Array, index: int) -> jax.Array:
    """The view of one slice, in float32; 0 where the leaf has no entry."""
    flat = jnp.append(leaf.reshape(-1).astype(jnp.float32), 0.)
    return flat[self.places[index]]

  def write(self, leaf: jax.Array, index: int, view: jax.Array) -> jax.Array:
    """The leaf with the view of one slice put in its place."""
    flat = leaf.reshape(-1).at[self.places[index]].set(
        view.astype(leaf.dtype), mode='drop')
    return flat.reshape(leaf.shape)


class Moments(NamedTuple):
  """Sums over the inputs of a layer."""

  squares: jax.Array  # float32[groups, k] of x^2, or [groups, k, k] of x x^T.
  # float32[]: how many inputs they are sums over.
  count: jax.Array  # type: ignore[assignment]


class _Form(NamedTuple):
  """How one product reads its weight, which is on the right."""

  view: tuple[int, int, int, int]
  places: Callable[[], jax.Array]  # int32 of the weight's shape, in the view.
  unfold: Callable[[jax.Array], jax.Array]  # Of the input: [groups, count, k].


def find_layers(fn: Callable[..., Any], params: trees.PyTree, *inputs: Any,
                paths: Collection[trees.Path]) -> list[list[Layer]]:
  """The layers of a function in the order of execution.

  Args:
    fn: `fn(params, *inputs)`, a function of arrays that can be differentiated.
    params: its parameters.
    *inputs: its inputs.
    paths: the leaves to look for. Those that no product multiplies by are
      left out.

  Returns:
    Lists of layers: those of one loop, or a single one. A leaf that several
    products share is where it is first used.

  Raises:
    ValueError: if a product does not take each entry of a leaf once and as it
      is, or a loop takes slices of it in no plain order.

  Example:
    >>> params = {'a': jnp.ones((2, 3)), 'b': jnp.ones((4, 3))}
    >>> fn = lambda params, x: x @ params['a'] @ params['b'].T
    >>> found = find_layers(fn, params, jnp.ones((5, 2)), paths=['b', 'a'])
    >>> [(layer.path, layer.view) for layer, in found]
    [('a', (1, 1, 2, 3)), ('b', (1, 1, 3, 4))]
  """
  closed, origins, _ = products.trace(fn, (params, *inputs), 0)
  groups = [[p for p in group if p.path in paths]
            for group in _groups(closed, origins)]
  uses: dict[trees.Path, list] = {}
  for product in [p for group in groups for p in group]:
    uses.setdefault(product.path, []).append(product)
  leaves = trees.leaves_by_path(params)
  layers = {path: _unplaced(path, leaves[path], found)
            for path, found in uses.items()}
  layers = _placed(fn, params, inputs, layers) if layers else {}
  ordered = [dict.fromkeys(p.path for p in group) for group in groups]
  return [[layers.pop(path) for path in names if path in layers]
          for names in ordered if set(names) & set(layers)]


def input_moments(fn: Callable[..., Any], layer: Layer, *, crossed: bool
                  ) -> Callable[..., Moments]:
  """A function that sums over the inputs that a layer multiplies by.

  Args:
    fn: `fn(params, *inputs)`.
    layer: one of `find_layers`.
    crossed: whether the sum is of x x^T, or of x^2 alone.

  Returns:
    A compiled function of (slice, params, *inputs): the Moments of that slice.
    They are 0 if the products lead to no output of `fn` by a derivative.

  Example:
    >>> params, x = {'a': jnp.ones((2, 3))}, jnp.array([[1., 2.], [1., 3.]])
    >>> fn = lambda params, x: x @ params['a']
    >>> (layer,), = find_layers(fn, params, x, paths=['a'])
    >>> input_moments(fn, layer, crossed=True)(0, params, x).squares
    Array([[[ 2.,  5.],
            [ 5., 13.]]], dtype=float32)
  """
  groups, positions, inputs, _ = layer.view
  k = positions * inputs
  nothing = Moments(jnp.zeros((groups, k, k) if crossed else (groups, k)),
                    jnp.zeros(()))

  def moments(x):
    x = x.astype(jnp.float32)
    squares = (jnp.einsum('gtk,gtl->gkl', x, x, precision=lax.Precision.HIGHEST)
               if crossed else jnp.sum(x * x, 1))
    return Moments(squares, jnp.float32(x.shape[1]))

  def attach(product, form, x, w, out, given):
    del w
    sums, index = given
    here = jnp.asarray(product.run // layer.repeats == index)
    return _attach(lambda x, here: lax.cond(
        here, lambda x: moments(form.unfold(x)), lambda x: nothing, x), out,
                   sums, (x, here))

  def watched(sums, index, params, inputs):
    return _watch(fn, attach, [layer.path], params, inputs, (sums, index))

  return jax.jit(lambda index, params, *inputs: jax.grad(watched)(
      nothing, index, params, inputs))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attach(measure, out, target, given):
  """`out`; but the cotangent of `target` is `measure(*given)`."""
  del measure, target, given
  return out


_attach.defvjp(
    lambda measure, out, target, given: (out, given),
    lambda measure, given, g: (jnp.zeros_like(g), measure(*given), None))


def _watch(fn, attach, paths, params, inputs, given) -> jax.Array:
  """0, with cotangents attached to the products of some leaves."""
  def rule(path, product, lhs, rhs):
    del path

    def take(apply, form, x, w):
      out = apply(x, lax.stop_gradient(w))
      return attach(product, form, x, w, out, given)

    def dot_general(x, w, dimension_numbers, **rest):
      return take(lambda x, w: lax.dot_general(x, w, dimension_numbers, **rest),
                  _dot_form(dimension_numbers, x.ndim, w.shape), x, w)

    def conv_general_dilated(x, w, **rest):
      return take(lambda x, w: lax.conv_general_dilated(x, w, **rest),
                  _conv_form(rest, w.shape), x, w)

    return product.apply(lhs, rhs, dot_general=dot_general,
                         conv_general_dilated=conv_general_dilated)

  watched = replacing.replace_products(fn, rule, paths=paths)
  outputs = [out for out in jax.tree.leaves(watched(params, *inputs))
             if jnp.issubdtype(jnp.result_type(out), jnp.floating)]
  return jnp.float32(0) * sum(
      jnp.sum(out).astype(jnp.float32) for out in outputs)


def _dot_form(numbers, ndim: int, shape) -> _Form:
  """Several axes that are summed over are taken in the weight's order."""
  (x_summed, summed), (x_batch, batch) = (
      tuple(zip(*sorted(zip(*pair), key=lambda axes: axes[1]))) or ((), ())
      for pair in numbers)
  free = [i for i in range(len(shape)) if i not in (*summed, *batch)]
  x_free = [i for i in range(ndim) if i not in (*x_summed, *x_batch)]
  groups, k, outputs = (math.prod(shape[i] for i in axes)
                        for axes in (batch, summed, free))
  order = (*batch, *summed, *free)

  def places():
    ordered = jnp.arange(math.prod(shape)).reshape([shape[i] for i in order])
    return ordered.transpose(np.argsort(order))

  def unfold(x):
    return x.transpose(*x_batch, *x_free, *x_summed).reshape(groups, -1, k)

  return _Form((groups, 1, k, outputs), places, unfold)


def _conv_form(params, shape) -> _Form:
  numbers, groups = params['dimension_numbers'], params['feature_group_count']
  out, into, *spatial = numbers.rhs_spec
  window = [shape[i] for i in spatial]
  view = (groups, math.prod(window), shape[into], shape[out] // groups)
  order = (*spatial, into, out)

  def places():
    ordered = jnp.arange(math.prod(shape)).reshape(view).transpose(1, 2, 0, 3)
    return ordered.reshape([shape[i] for i in order]).transpose(
        np.argsort(order))

  def unfold(x):
    batch, features, *rest = numbers.out_spec
    patches = lax.conv_general_dilated_patches(
        x, window, params['window_strides'], params['padding'],
        params['lhs_dilation'], params['rhs_dilation'], numbers,
        lax.Precision.HIGHEST)
    patches = patches.transpose(batch, *rest, features)
    patches = patches.reshape(-1, groups, view[2], view[1])
    return patches.transpose(1, 0, 3, 2).reshape(groups, -1, view[1] * view[2])

  return _Form(view, places, unfold)


def _groups(jaxpr, origins):
  """Lists of products in the order of execution, those of a loop in one."""
  inner, _ = products.open_jaxpr(jaxpr)
  seen = dict(zip(inner.invars, origins, strict=True))
  seen.update((var, provenance.of_argument(var.aval))
              for var in inner.constvars)
  for eqn in inner.eqns:
    before = products.origins_of(eqn.invars, seen)
    found, after = products.visit(eqn, before, every_branch=True)
    seen.update(zip(eqn.outvars, after))
    bodies = products.bodies_of(eqn)
    if found and len(bodies) == 1 and eqn.primitive.name not in _LOOPS and len(
        products.open_jaxpr(bodies[0])[0].invars) == len(before):
      yield from _groups(bodies[0], before)
    elif found:
      yield found


def _unplaced(path: trees.Path, leaf: Any, uses: list[Product]) -> Layer:
  """A layer without the places of its entries."""
  views, times = {_form(path, p).view for p in uses}, {p.times for p in uses}
  size = math.prod(min(views))
  if len(views) > 1 or len(times) > 1 or leaf.size % size or (
      min(times) % (leaf.size // size)):
    raise ValueError(f'The products of {path!r}, of shape {leaf.shape}, use '
                     f'it as {sorted(views)}, {sorted(times)} times, which are '
                     'no slices of it in order; `is_sparse` may leave it out.')
  slices = leaf.size // size
  return Layer(path, min(views), slices, min(times) // slices, None)


def _form(path, product) -> _Form:
  side = product.weight
  operand, other = ((product.rhs, product.lhs) if side == 'rhs'
                    else (product.lhs, product.rhs))
  if len(operand.leaves) > 1 or product.in_while or not (
      product.primitive == products.DOT or product.primitive == products.CONV
      and side == 'rhs' and product.params['batch_group_count'] == 1):
    raise ValueError(f'A product ({product.primitive}) of {path!r} is in a '
                     '`while`, by several leaves at once or of a kind that is '
                     'not known; `is_sparse` may leave it out.')
  if product.primitive == products.CONV:
    return _conv_form(product.params, operand.shape)
  summed, batch = product.params['dimension_numbers']
  numbers = (summed, batch) if side == 'rhs' else (summed[::-1], batch[::-1])
  return _dot_form(numbers, len(other.shape), operand.shape)


def _placed(fn, params, inputs, layers):
  """Layers with the places of their entries, read off as gradients."""
  def attach(product, form, x, w, out, given):
    del x
    kind, shift = given
    repeats = layers[product.path].repeats

    def digit(kind, shift, run):
      place, index = form.places(), jnp.full(w.shape, run // repeats)
      number = jnp.where(kind == 1, place, index)
      read = jnp.where(kind == 0, 1, (number >> shift) % (1 << _BITS) + 1)
      return jnp.where(run % repeats == 0, read, 0).astype(w.dtype)

    return _attach(digit, out, w, (kind, shift, jnp.asarray(product.run)))

  def watched(leaves, *given):
    full = trees.map_leaves(lambda path, leaf: leaves.get(path, leaf), params)
    return _watch(fn, attach, list(layers), full, inputs, given)

  table = trees.leaves_by_path(params)
  read = jax.jit(jax.grad(watched))
  read = functools.partial(read, {path: table[path] for path in layers})

  def numbers(kind, largest):
    shifts = range(0, max(int(largest).bit_length(), 1), _BITS)
    digits = [jax.device_get(read(kind, shift)) for shift in shifts]
    return {path: sum(
        np.rint(_over(digit[path], scales[path]) - 1).astype(np.int64) << shift
        for digit, shift in zip(digits, shifts)) for path in layers}

  scales = jax.device_get(read(0, 0))
  places = numbers(1, max(math.prod(layer.view) for layer in layers.values()))
  slices = numbers(2, max(layer.slices for layer in layers.values()))
  return {path: layer._replace(places=_places(
      layer, scales[path], places[path], slices[path]))
          for path, layer in layers.items()}


def _over(number, scale):
  number, scale = np.float32(number), np.float32(scale)
  return np.divide(number, scale, out=np.zeros_like(number), where=scale != 0)


def _places(layer: Layer, scale, places, slices) -> np.ndarray:
  """int32[slices, *view]: where each entry of the views is in the leaf."""
  used = np.float32(scale).ravel() != 0
  size = math.prod(layer.view)
  where = (slices.ravel() * size + places.ravel())[used]
  factors = np.abs(np.float32(scale).ravel()[used])
  fits = len(where) and 0 <= where.min() and where.max() < layer.slices * size
  if not fits or len(np.unique(where)) < len(where) or (
      factors.max() > 1.01 * factors.min()):
    raise ValueError(
        f'The products of {layer.path!r} do not take each entry of it once and '
        'as it is, or lead to no output of `fn` by a derivative; `is_sparse` '
        'may leave it out.')
  table = np.full(layer.slices * size, scale.size, np.int32)
  table[where] = np.flatnonzero(used)
  return table.reshape(layer.slices, *layer.view)
