"""Small parts of an update: the sum that is judged, zeros, windows."""

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np

from sparse_jax import checks
from sparse_jax import trees
from sparse_jax.masks import marks as marks_lib
from sparse_jax.masks import schedules


# Names what a refresh makes again rather than is handed (`jaxprs.sinking`).
AGAIN = 'sparse_jax: made again at a refresh'


class Seen(NamedTuple):
  """What a refresh may look at.

  The weights to judge are params + updates; updates may be None for none.
  Whoever also needs the updates afterwards passes both, whoever does not
  passes their sum: XLA then writes only one of them to memory.

  Example:
    >>> def remember(seen, extra):  # As `Rule.remember`: averaged gradients.
    ...   return jax.tree.map(lambda mean, grad: .9 * mean + .1 * grad,
    ...                       extra, seen.grads)
    >>> seen = Seen({'w': jnp.ones(2)}, {'w': jnp.array([-.5, .5])},
    ...             grads={'w': jnp.array([5., -5.])})
    >>> seen.weights()['w'].tolist()
    [0.5, 1.5]
    >>> remember(seen, {'w': jnp.zeros(2)})['w'].tolist()
    [0.5, -0.5]
  """

  params: trees.PyTree  # As the optimizer holds them.
  updates: trees.PyTree | None  # To be added to them before they are judged.
  grads: trees.PyTree  # dL/dw, of what `Rule.gradient` asks for.
  extra_args: Mapping[str, Any] = {}  # Those of `tx.update`.
  before: trees.PyTree = None  # The parameters before the update.
  moves: trees.PyTree = None  # The optimizer's updates.

  def weights(self) -> trees.PyTree:
    """The weights to judge."""
    if self.updates is None:
      return self.params
    return jax.tree.map(apply_update, self.params, self.updates)


def check_grads(grads: trees.PyTree, params: trees.PyTree) -> None:
  """Raises ValueError where the gradients are not those of the parameters.

  Floating gradients may have another precision than their parameters.
  """
  given = trees.leaves_by_path(grads)
  for path, param in trees.leaves_by_path(params).items():
    if path not in given:
      raise ValueError(f'`grads` (a {type(grads).__name__}) has no leaf '
                       f'{path!r}, which is one of the parameters.')
    grad, shape = given.pop(path), tuple(np.shape(param))
    if np.shape(grad) != shape:
      raise ValueError(f'`grads` has an array of shape {np.shape(grad)} at '
                       f'{path!r}, where the parameter is of shape {shape}; '
                       'gradients of single examples are averaged before '
                       'sparsify, optax.chain(average, sparsify(...)).')
    kind, own = (jax.dtypes.result_type(leaf) for leaf in (grad, param))
    inexact = jnp.issubdtype(own, jnp.inexact)
    allowed = jnp.floating if jnp.issubdtype(own, jnp.floating) else jnp.inexact
    if inexact and not jnp.issubdtype(kind, allowed):
      raise ValueError(f'`grads` has an array of {kind} at {path!r}, where the '
                       f'parameter is of {own}.')
  if given:
    raise ValueError(f'`grads` has {sorted(given)}, where there are no '
                     'parameters.')
  structure: Any = jax.tree.structure(params)
  if structure != jax.tree.structure(grads):
    raise ValueError(f'`grads` (a {type(grads).__name__}) must be of the '
                     f'structure of `params` (a {type(params).__name__}), with '
                     'the same containers, as jax.grad gives them.')


def apply_update(param: jax.Array, update: jax.Array) -> jax.Array:
  """p + u as `optax.apply_updates` stores it, 16-bit rounding included.

  XLA may keep 16-bit sums in float32 inside a fusion; the scores must be
  those of the parameters that the user gets.
  """
  total = param + update
  if jnp.finfo(param.dtype).bits > 16:
    return total.astype(param.dtype)
  if param.dtype == jnp.float16:  # Whose subnormals reduce_precision flushes.
    return lax.optimization_barrier(total.astype(param.dtype))
  kind = jnp.finfo(param.dtype)
  exact = lax.reduce_precision(total.astype(jnp.float32), kind.nexp, kind.nmant)
  return exact.astype(param.dtype)


def made_again(updates: trees.PyTree) -> trees.PyTree:
  """The updates, named so that an ordinary step need not write them."""
  return jax.tree.map(lambda u: checkpoint_name(u, AGAIN), updates)


def zero_outside(updates: trees.PyTree, params: trees.PyTree,
                 old: trees.PyTree, new: trees.PyTree) -> trees.PyTree:
  """Updates that lead to 0 outside A, and where a weight has just entered.

  `old` and `new` are marks of entries, as of `storage.entry_marks`.
  """
  def zero(update, weight, was, now):
    stays = marks_lib.forward_mask(was) & marks_lib.forward_mask(now)
    exact = jnp.result_type(update, weight)  # A 16-bit -p would not reach 0.
    return jnp.where(stays, update.astype(exact), -weight.astype(exact))

  def visit(path, update, weight, was, now):
    del path
    marked = marks_lib.is_marked(was)
    return zero(update, weight, was, now) if marked else update

  return trees.map_leaves(visit, updates, params, old, new)


def refresh_window(every: int, begin: int, end: int | None, *,
                   also_at_end: bool = False, also_at: int | None = None):
  """A function of the step: whether the masks refresh after that update.

  Args:
    every: steps between refreshes, at least 1.
    begin, end: first and last step that may refresh; None is no end.
    also_at_end: whether `end` refreshes even where `every` does not divide it.
    also_at: one more step that refreshes.

  Returns:
    A function from the updates done (int or int32[]) to a bool, for
    `Rule.refreshes`.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> window = refresh_window(10, 5, 20)
    >>> [step for step in range(40) if window(step)]
    [10, 20]
  """
  check_window(every, begin, end)

  def window(step):
    if (every, begin, end) == (1, 0, None):
      return True
    due = (step % every == 0) & (step >= begin)
    if end is not None:
      due &= step <= end
    if also_at_end and end is not None:
      due |= step == end
    if also_at is not None:
      due |= step == also_at
    return due

  window.every = every  # type: ignore[attr-defined]
  return window


def at_refreshes(window: Callable[[int], Any], value: Callable[..., Any]
                 ) -> Callable[[np.ndarray], np.ndarray]:
  """What masks follow of a function of the step: its value at the last refresh.

  Args:
    window: updates done -> whether masks refresh then.
    value: int[...] -> float[...] of NumPy or JAX; the first masks are of 0.

  Returns:
    A function of rising steps from 0 on, as `Rule.progress`.

  Example:
    >>> held = at_refreshes(refresh_window(3, 0, None), lambda step: step / 10)
    >>> held(np.arange(5)).tolist()
    [0.0, 0.0, 0.0, 0.3, 0.3]
  """
  def held(steps):
    refreshes = [0] + [int(t) for t in steps if t and window(int(t))]
    values = np.asarray(value(np.array(refreshes)))
    return values[np.searchsorted(refreshes, steps, side='right') - 1]

  return held


def check_window(every: int, begin: int, end: int | None) -> None:
  """Raises ValueError naming the argument that is out of range."""
  checks.check_count('update_every', every, least=1)
  checks.check_count('update_begin', begin)
  if end is not None:
    checks.check_count('update_end', end)
    if end < begin:
      raise ValueError(f'`update_end` (={end}) must not be below '
                       f'`update_begin` (={begin}).')


def drop_schedule(fraction: float | schedules.Schedule, end: int | None
                  ) -> Callable[[jax.Array], Any]:
  """The drop fraction: constant, annealed to `end` by a cosine, or as given.

  Args:
    fraction: in [0, 1], or a function of the step, which is clipped to that.
    end: the step at which it has fallen to 0; None: it is constant.

  Returns:
    A function from the updates done to the share of active groups to drop.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> drop = drop_schedule(.3, 100)
    >>> [round(float(drop(step)), 4) for step in (0, 50, 100)]
    [0.3, 0.15, 0.0]
  """
  if callable(fraction):
    return lambda step: jnp.clip(jnp.float32(fraction(step)), 0, 1)
  checks.check_fraction('drop_fraction', fraction)
  if end is None:
    return lambda step: fraction
  checks.check_count('update_end', end, least=1)
  return schedules.cosine_drop(fraction, end=end)
