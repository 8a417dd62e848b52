"""What a rule may look at: one leaf, in the space of its groups, lazily."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp

from sparse_jax.masks import marks as marks_lib
from sparse_jax.rules import leaves as leaves_lib


class Now:
  """The scores of one leaf at one moment; each is made when it is asked for.

  All arrays have the shape of the groups (`leaf.layout.group_shape`), however
  the weight is stored: a rule knows no more of it.

  Attributes:
    leaf: the leaf.
    step: int32[], updates done, this one included; 0 for the first masks.
    key: a typed key of this step.
    extra: the method's own arrays, as of `Rule.extra`.

  Example:
    >>> def choose(leaf, now):  # Half of A stays, the gradient finds the rest.
    ...   kept = leaf.top(now.magnitudes, leaf.count // 2, among=now.active)
    ...   return kept | leaf.top(now.gradient_magnitudes,
    ...                          leaf.count - leaf.count // 2, among=~kept)
    >>> weight = jnp.array([[3., 1., 0., 0.]])
    >>> leaf = leaves_lib.Sites(.5).leaves({'w': weight})['w']
    >>> now = Now(leaf, jnp.int32(1), jax.random.key(0), weight=weight,
    ...           grad=jnp.array([[9., 0., 0., 5.]]),
    ...           marks=jnp.uint8([[2, 2, 0, 0]]))
    >>> choose(leaf, now).astype(int)  # A test of a rule, without a model.
    Array([[1, 0, 0, 1]], dtype=int32)
  """

  def __init__(self, leaf: leaves_lib.Leaf, step: jax.Array, key: jax.Array, *,
               weight: jax.Array, grad: jax.Array | None = None,
               marks: jax.Array | None = None, extra: Any = ()):
    self.leaf, self.step, self.key, self.extra = leaf, step, key, extra
    self._weight = weight
    self._grad: Any = grad
    self._marks: Any = marks

  @functools.cached_property
  def magnitudes(self) -> jax.Array:
    """float: |w| of each group; the sum, or as its structure reduces."""
    return self.leaf.layout.group(jnp.abs(self._weight))

  @functools.cached_property
  def gradient_magnitudes(self) -> jax.Array:
    """float: |dL/dw| of each group, of the gradient that the rule asks for."""
    return self.leaf.layout.group(jnp.abs(self._grad))

  @functools.cached_property
  def sums(self) -> jax.Array:
    """float: the weights of each group, reduced with their signs."""
    return self.leaf.layout.group(self._weight)

  @functools.cached_property
  def random(self) -> jax.Array:
    """float32: uniform in [0, 1); NaN in padding."""
    return self.leaf.random_scores(self.key)

  @functools.cached_property
  def active(self) -> jax.Array:
    """bool: the forward set A as it is."""
    return marks_lib.forward_mask(self._marks)

  @functools.cached_property
  def trained(self) -> jax.Array:
    """bool: the backward set B as it is."""
    return marks_lib.backward_mask(self._marks)

  def score(self, fn: Callable[..., jax.Array]) -> jax.Array:
    """float: `fn(weight, grad, key)` of each entry, reduced to groups.

    For the first masks there is no gradient: it is given the weight.
    """
    grad = self._weight if self._grad is None else self._grad
    own = jax.random.fold_in(self.key, self.leaf.index)
    return self.leaf.layout.group(fn(self._weight, grad, own))
