"""Sparsity and drop fraction as functions of the step, in Optax's manner."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sparse_jax import checks

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]


def constant(value: float) -> Schedule:
  """The same value at every step (int or int32[...]), a float32[...].

  Example:
    >>> float(constant(0.5)(100))
    0.5
  """
  return lambda step: jnp.full(jnp.shape(step), value, jnp.float32)


def cubic_sparsity(final: float, *, begin: int = 0, end: int,
                   initial: float = 0.) -> Schedule:
  """Rises from `initial` to `final`, fast at first and ever slower.

  s(t) = final + (initial - final) * (1 - (t - begin) / (end - begin))**3
  between the two steps, `initial` before and exactly `final` from `end` on.

  Args:
    final: sparsity reached at `end`, in [0, 1).
    begin: the step at which the rise starts.
    end: the step at which it is over, above `begin`.
    initial: sparsity before `begin`, in [0, 1).

  Returns:
    A function from a step (int or int32[]) to a sparsity (float32[]).

  Raises:
    ValueError: for a sparsity out of range, or `end` not above `begin`.

  Example:
    >>> schedule = cubic_sparsity(0.8, end=100)
    >>> [round(float(schedule(t)), 4) for t in (0, 25, 50, 75, 100)]
    [0.0, 0.4625, 0.7, 0.7875, 0.8]

  Reference:
    Zhu and Gupta, To prune, or not to prune, 2017,
    https://arxiv.org/abs/1710.01878, equation 1.
  """
  checks.check_sparsity('final', final)
  checks.check_sparsity('initial', initial)
  _check_window(begin, end)

  def schedule(step):
    left = 1 - _progress(step, begin, end)
    value = final + (initial - final) * left**3
    return jnp.where(left > 0, value, jnp.float32(final))

  return schedule


def cosine_drop(fraction: float, *, end: int) -> Schedule:
  """A drop fraction that falls to 0 along half a cosine.

  f(t) = fraction / 2 * (1 + cos(pi t / end)), and 0 from `end` on.

  Args:
    fraction: share of the active weights dropped at step 0, in [0, 1].
    end: the step at which nothing is dropped any more, at least 1.

  Returns:
    A function from a step (int or int32[]) to a fraction (float32[]).

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> drop = cosine_drop(0.3, end=100)
    >>> [round(float(drop(t)), 4) for t in (0, 25, 50, 75, 100)]
    [0.3, 0.2561, 0.15, 0.0439, 0.0]

  Reference:
    Evci et al., RigL, 2020, https://arxiv.org/abs/1911.11134, section 3.
  """
  checks.check_fraction('fraction', fraction)
  _check_window(0, end)

  def schedule(step):
    angle = jnp.pi * _progress(step, 0, end)
    return jnp.float32(fraction / 2) * (1 + jnp.cos(angle))

  return schedule


def drop_with(fraction: float, learning_rate: Schedule | float, *,
              peak: float | None = None) -> Schedule:
  """A drop fraction that follows the learning rate.

  f(t) = fraction * learning_rate(t) / peak: pass it as `drop_fraction`.

  Args:
    fraction: share of the active weights dropped at the peak, in [0, 1].
    learning_rate: an Optax schedule.
    peak: the learning rate at which it is the fraction; None is that of step
      0, as in the official code, and must then be above 0.

  Returns:
    A function from a step (int or int32[]) to a fraction (float32[]).

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> drop = drop_with(0.3, lambda step: 0.1 * (1 - step / 100))
    >>> [round(float(drop(t)), 4) for t in (0, 50, 100)]
    [0.3, 0.15, 0.0]

  Reference:
    `ScaledLRUpdateSchedule` of https://github.com/google-research/rigl,
    rigl_tf2/mask_updaters.py.
  """
  checks.check_fraction('fraction', fraction)
  rate = learning_rate if callable(learning_rate) else constant(learning_rate)
  if peak is None:
    peak = float(rate(0))
  if checks.check_non_negative('peak', peak) == 0:
    raise ValueError('`peak` must be given where `learning_rate` begins at 0.')

  def schedule(step):
    return jnp.clip(jnp.float32(fraction / peak) * rate(step), 0, 1)

  return schedule


def _progress(step, begin: int, end: int) -> jax.Array:
  share = (jnp.asarray(step, jnp.float32) - begin) / (end - begin)
  return jnp.clip(share, 0, 1)


def _check_window(begin: int, end: int) -> None:
  checks.check_count('begin', begin)
  checks.check_count('end', end)
  if end <= begin:
    raise ValueError(f'`end` (={end}) must be above `begin` (={begin}).')
