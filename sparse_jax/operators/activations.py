"""Sparse activations: by a threshold, by a penalty, by a cheap forecast."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import math

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from sparse_jax import checks

from sparse_jax import trees
from sparse_jax.operators import operands
from sparse_jax.operators import sparse_products as operators
from sparse_jax.operators import residuals
from sparse_jax.masks import topk


def fat_relu(x: jax.Array, threshold: float | jax.Array) -> jax.Array:
  """Forced activation threshold: x where it reaches the threshold, else 0.

  The gradient is 1 where x passes and 0 elsewhere; none goes through the jump
  to the threshold. The backward pass keeps one bit an entry.

  Law: wherever x is not 0, fat_relu(x, 0) is relu(x), gradient included.

  Args:
    x: float[...].
    threshold: float[], or float of the last axis: one for each channel.

  Returns:
    The shape and dtype of `x`.

  Example:
    >>> fat_relu(jnp.array([-1., .05, .2, .5, .1, 0.]), .1)
    Array([0. , 0. , 0.2, 0.5, 0.1, 0. ], dtype=float32)

  Reference:
    Kurtz et al., Inducing and exploiting activation sparsity, 2020,
    http://proceedings.mlr.press/v119/kurtz20a.html. Equality passes.
  """
  threshold = jnp.asarray(threshold, x.dtype)
  channels = (1,) * (x.ndim - threshold.ndim) + threshold.shape
  return residuals.gate(x, ~(x < threshold.reshape(channels)))


def calibrate_thresholds(metric: Callable[[dict[str, float]], float],
                         layers: Sequence[str], *, drop: float,
                         high: float = 1., precision: float = 1e-3
                         ) -> dict[str, float]:
  """Thresholds of `fat_relu`, layer by layer, as high as a metric allows.

  Layers are taken in the order given. Each gets, by bisection of [0, high],
  the highest threshold at which the metric, with the layers before at theirs
  and those after at 0, is no less than its value at all 0 minus the layer's
  part of the drop: of n layers, after i of them i / n of it may be used.

  Args:
    metric: the thresholds of all layers, by name, to a number; larger is
      better. It should fall as thresholds rise.
    layers: the names.
    drop: how much of the metric may be lost in all, at least 0.
    high: the highest threshold tried, above 0.
    precision: the width at which bisection ends, above 0.

  Returns:
    `{layer: threshold}`; the metric at it is no less than that at all 0 minus
    `drop`.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> found = calibrate_thresholds(lambda t: 1 - t['a'] - 4 * t['b'],
    ...                              ['a', 'b'], drop=.4)
    >>> {name: round(value, 2) for name, value in found.items()}
    {'a': 0.2, 'b': 0.05}

  Reference:
    Kurtz et al., 2020, as above; SparseML's search is alike, with the same
    limit for every layer.
  """
  checks.check_callable('metric', metric)
  checks.check_non_negative('drop', drop)
  for name, value in (('high', high), ('precision', precision)):
    if checks.check_non_negative(name, value) == 0:
      raise ValueError(f'`{name}` (={value!r}) must be above 0.')
  found = dict.fromkeys(layers, 0.)
  best = metric(dict(found))
  for i, layer in enumerate(layers):
    limit = best - drop * (i + 1) / len(layers)
    found[layer] = _bisect(
        lambda value: metric({**found, layer: value}) >= limit, high,
        precision)
  return found


def _bisect(accepts, high: float, precision: float) -> float:
  """The highest accepted value of [0, high]; 0 is taken to be accepted."""
  if accepts(high):
    return high
  low = 0.
  while high - low > precision:
    middle = (low + high) / 2
    low, high = (middle, high) if accepts(middle) else (low, middle)
  return low


def hoyer(x: jax.Array) -> jax.Array:
  """The squared Hoyer measure, (sum |x|)^2 / sum x^2; 0 of an array of zeros.

  It is 1 for one entry that is not 0, the number of entries if all are equal,
  and does not change with scale. Its gradient raises what is large and lowers
  what is small.

  Args:
    x: float[...], say the output of a ReLU.

  Returns:
    float32[].

  Example:
    >>> float(hoyer(jnp.array([1., 1., 0.]))), float(hoyer(jnp.array([5., 0.])))
    (2.0, 1.0)
    >>> jax.grad(hoyer)(jnp.array([3., 1.])).round(2)
    Array([-0.16,  0.48], dtype=float32)

  Reference:
    Kurtz et al., 2020, as in `fat_relu`; Hoyer, 2004.
  """
  x = x.astype(jnp.float32)
  squares = jnp.sum(jnp.square(x))
  some = squares > 0
  return jnp.where(some, jnp.square(l1(x)) / jnp.where(some, squares, 1), 0.)


def l1(x: jax.Array) -> jax.Array:
  """The sum of magnitudes of float[...], a float32[], with gradient 0 at 0.

  Example:
    >>> l1(jnp.array([.2, 0., .5, .1])).round(3)
    Array(0.8, dtype=float32)
  """
  x = x.astype(jnp.float32)
  return jnp.sum(x * jnp.sign(x))  # JAX gives |x| the slope 1 at 0.


def activation_penalty(activations: trees.PyTree, *,
                       weight: float | Mapping[trees.Path, float],
                       measure: Callable[[jax.Array], jax.Array] = hoyer
                       ) -> jax.Array:
  """Sum over layers of weight * measure(activation) / number of examples.

  Added to the loss it makes activations sparse: with `l1` it is the penalty
  of Georgiadis, with `hoyer` that of Kurtz et al. The activations are those
  after the ReLU; Flax's `sow` and `capture_intermediates` give them.

  Args:
    activations: tree of float[examples, ...].
    weight: the coefficient, at least 0, of all layers or by path; layers
      without one are not penalised.
    measure: float[...] -> float[].

  Returns:
    float32[].

  Raises:
    ValueError: if a weight is out of range, or of no layer.

  Example:
    >>> maps = {'relu': jnp.array([[.2, 0.], [.5, .1]])}
    >>> activation_penalty(maps, weight=.1, measure=l1).round(4)
    Array(0.04, dtype=float32)

  Reference:
    Georgiadis, Accelerating CNNs via activation map compression, 2019,
    https://arxiv.org/abs/1812.04056; Kurtz et al., 2020.
  """
  checks.check_callable('measure', measure)
  leaves = trees.leaves_by_path(activations)
  if isinstance(weight, Mapping):
    weights = weight
  else:
    weights = dict.fromkeys(leaves, checks.check_non_negative('weight', weight))
  total = jnp.float32(0)
  for path, value in weights.items():
    if path not in leaves:
      raise ValueError(f'`weight` names {path!r}, which is none of the '
                       f'activations {sorted(leaves)}.')
    checks.check_non_negative(f'weight[{path!r}]', value)
    x = leaves[path]
    total += value * measure(x) / x.shape[0]
  return total


def meprop(sparsity: float, *, unified: bool = False):
  """A `jax.lax.dot_general` with a sparse output gradient: meProp.

  Only the largest entries of each example's output gradient reach weight and
  input. Unified, the examples share one choice of output features. The bias
  is outside of it and gets the whole gradient. The authors leave the output
  layer dense.

  Args:
    sparsity: fraction of the output gradient that becomes 0, in [0, 1).
    unified: whether whole features are chosen, by the sum of magnitudes.

  Returns:
    As `sparse_dot_general`, of which it is one value.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> dot = meprop(2 / 3)
    >>> product = lambda w: dot(jnp.ones((1, 1)), w, (((1,), (0,)), ((), ())))
    >>> _, pull = jax.vjp(product, jnp.ones((1, 6)))
    >>> pull(jnp.array([[.1, -.9, .2, .05, -.6, .4]]))[0]
    Array([[ 0. , -0.9,  0. ,  0. , -0.6,  0. ]], dtype=float32)

  Reference:
    Sun et al., meProp, 2017, https://arxiv.org/abs/1706.06197; the unified
    variant: Training simplification and model simplification, 2017.
  """
  checks.check_bool('unified', unified)
  return operators.sparse_dot_general(
      operands.Operands(output_gradient=sparsity),
      gradient_scope='unified' if unified else 'example')


def random_projection(key: jax.Array, size: int, *, dims: int) -> jax.Array:
  """A sparse random projection: inner products survive, in expectation.

  Entries are sqrt(3) with probability 1/6, -sqrt(3) with 1/6 and 0 with 2/3,
  all over sqrt(dims).

  Law: the mean over keys of (R x) . (R y) is x . y.

  Args:
    key: a key of `jax.random`.
    size: the length of what is projected.
    dims: the length that it becomes. The paper wants the order of
      log(number of points) / error^2, with an error of about 0.5.

  Returns:
    float32[dims, size].

  Raises:
    ValueError: if `size` or `dims` is below 1.

  Example:
    >>> random_projection(jax.random.key(0), 10, dims=4).shape
    (4, 10)

  Reference:
    Achlioptas, Database-friendly random projections, 2003; Liu et al., DSG,
    2019, https://arxiv.org/abs/1810.00859, section 3.
  """
  checks.check_count('size', size, least=1)
  checks.check_count('dims', dims, least=1)
  draw = jax.random.randint(key, (dims, size), 0, 6, jnp.int32)
  sign = (draw == 0).astype(jnp.float32) - (draw == 1).astype(jnp.float32)
  return sign * np.float32(math.sqrt(3 / dims))


def dsg_mask(x: jax.Array, weight: jax.Array, *, projection: jax.Array,
             sparsity: float,
             product: Callable[[jax.Array, jax.Array], jax.Array] = jnp.matmul
             ) -> jax.Array:
  """Forecasts which outputs of a layer will be large, in few dimensions.

  Input and weight are projected, multiplied there, and the largest of these
  virtual outputs are kept. The first example sets the threshold for the whole
  batch, so that the number kept in the others varies. Use it twice, before
  and after batch normalisation, which would fill the zeros (the paper's
  double mask):
  `y = gate(relu(product(x, w)), mask)`, `y = gate(batch_norm(y), mask)`.
  Forward and backward are then both sparse.

  Law: with an orthogonal projection (say the identity) the virtual outputs
  are the outputs, and of the first example the keep_count largest are kept.

  Args:
    x: float[examples, ...].
    weight: float[..., outputs]; all axes but the last are summed over.
    projection: float[dims, entries of `weight` for one output], as of
      `random_projection`: drawn once and kept.
    sparsity: fraction of the outputs of the first example that is dropped, in
      [0, 1).
    product: the layer's own bilinear function of (x, weight): a matrix
      product, or a convolution with its strides and padding.

  Returns:
    bool of the shape of `product(x, weight)`.

  Raises:
    ValueError: if `sparsity` is out of range, or `projection` does not fit.

  Example:
    >>> x, w = jnp.array([[1., 2.], [3., 1.]]), jnp.array([[1., 0., 2.],
    ...                                                    [0., 3., 1.]])
    >>> dsg_mask(x, w, projection=jnp.eye(2), sparsity=2 / 3).astype(int)
    Array([[0, 1, 0],
           [0, 0, 1]], dtype=int32)

  Reference:
    Liu et al., Dynamic sparse graph for efficient deep learning, 2019,
    https://arxiv.org/abs/1810.00859, section 3.
  """
  checks.check_sparsity('sparsity', sparsity)
  rows = math.prod(weight.shape[:-1])
  if projection.ndim != 2 or projection.shape[1] != rows:
    raise ValueError(f'`projection` (of shape {projection.shape}) must be '
                     f'(dims, {rows}) for a weight of shape {weight.shape}.')
  projection = lax.stop_gradient(projection.astype(weight.dtype))
  dims = projection.shape[0]
  kernel = projection.T.reshape(*weight.shape[:-1], dims)
  small = projection @ weight.reshape(rows, -1)
  virtual = lax.stop_gradient(product(x, kernel) @ small)
  first = virtual[0]
  kept = topk.top_k_mask(first, topk.keep_count(first.size, sparsity))
  threshold = jnp.min(first, initial=jnp.inf, where=kept)
  return virtual >= threshold
