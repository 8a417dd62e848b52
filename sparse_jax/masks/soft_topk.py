"""A differentiable top-k: weights of entries in (0, 1) that sum to k."""

from collections.abc import Sequence
import functools

import jax
from jax import lax
import jax.numpy as jnp

# Newton steps, of which about eight are needed, and when they may stop.
_MOST_STEPS, _TOLERANCE = 60, 1e-6


def soft_top_k(values: Sequence[jax.Array], k: jax.Array, *, beta: jax.Array,
               costs: Sequence[float] | None = None,
               axes: tuple[int, ...] | None = None) -> list[jax.Array]:
  """Soft masks of arrays whose entries compete for one budget.

  m = sigmoid(beta v / c + mu), with the one mu at which the sum of c m is k:
  the entropic relaxation of choosing the entries of largest v / c until their
  costs are k. The larger beta, the harder the mask. It is found by Newton's
  method in a bracket, and differentiated implicitly: with s = m (1 - m),

    dv = beta s (g / c - sum(g s) / sum(c s)).

  Laws: the sum of c m is k; m rises with v / c; where k is all there is every
  m is exactly 1. The gradient sums to 0 against any shift of v by c.

  Args:
    values: float arrays; -inf where an entry is none.
    k: the budget, above 0; float32[], or of the values' shape with `axes`
      as 1.
    beta: float32[], above 0.
    costs: a number above 0 for each array; None is 1 for all.
    axes: of the one array, the axes along which its entries compete; None:
      all entries of all arrays compete.

  Returns:
    float32 arrays of the values' shapes. Only `values` have a gradient.

  Raises:
    ValueError: if `axes` are given for several arrays.

  Example:
    >>> values = jnp.array([.3, .1, .2, 0.])
    >>> soft, = soft_top_k([values], 2., beta=20.)
    >>> [round(float(m), 2) for m in soft], float(soft.sum().round(4))
    ([0.95, 0.27, 0.73, 0.05], 2.0)

  Reference:
    Tai et al., Spartan, 2022, https://arxiv.org/abs/2205.14107, section 3 and
    algorithm 1. Their Sinkhorn iterations, which the authors' code stops where
    the objective moves by less than 1%, have this equation as their limit.
  """
  if axes is not None and len(values) > 1:
    raise ValueError(f'`axes` (={axes!r}) are for one array, not for '
                     f'{len(values)}.')
  costs = tuple(float(c) for c in costs or (1.,) * len(values))
  wide = [value.astype(jnp.float32) for value in values]
  return _soft(wide, jnp.float32(k), jnp.float32(beta), costs, axes)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _soft(values, k, beta, costs, axes):
  scaled = [beta / c * value for value, c in zip(values, costs)]
  real = [value > -jnp.inf for value in values]
  total = _sum([jnp.where(there, c, 0.) for c, there in zip(costs, real)],
               axes)
  full = k >= total
  mu = _offset(scaled, real, jnp.where(full, total / 2, k), total, costs, axes)
  return [jnp.where(full, there.astype(jnp.float32), jax.nn.sigmoid(z + mu))
          for z, there in zip(scaled, real)]


@_soft.defjvp
def _soft_tangents(costs, axes, primals, tangents):
  """dm = beta s (dv / c - sum(s dv) / sum(c s)): its own transpose."""
  _, _, beta = primals
  soft = _soft(*primals, costs, axes)
  steep = [m * (1 - m) for m in soft]
  all_ = _sum([c * s for c, s in zip(costs, steep)], axes)
  mean = _sum([dv * s for dv, s in zip(tangents[0], steep)], axes)
  mean = mean / jnp.where(all_ > 0, all_, 1)
  return soft, [beta * s * (dv / c - mean) for s, dv, c in zip(
      steep, tangents[0], costs)]


def _offset(scaled, real, k, total, costs, axes):
  """mu at which the sum of c sigmoid(z + mu) is k, within the total."""
  def over(reduce, fill):
    ends = [reduce(jnp.where(there, z, fill), axis=axes,
                   keepdims=axes is not None)
            for z, there in zip(scaled, real)]
    return functools.reduce(jnp.maximum if reduce is jnp.max else jnp.minimum,
                            ends)

  middle = jnp.log(k) - jnp.log(total - k)
  low = middle - over(jnp.max, -jnp.inf)
  high = middle - over(jnp.min, jnp.inf)

  def unfinished(carry):
    step, _, _, _, gap = carry
    return (step < _MOST_STEPS) & jnp.any(jnp.abs(gap) > _TOLERANCE * k)

  def improve(carry):
    step, low, high, mu, _ = carry
    soft = [jax.nn.sigmoid(z + mu) for z in scaled]
    gap = _sum([c * m for c, m in zip(costs, soft)], axes) - k
    rise = _sum([c * m * (1 - m) for c, m in zip(costs, soft)], axes)
    low, high = jnp.where(gap < 0, mu, low), jnp.where(gap < 0, high, mu)
    newton = mu - gap / jnp.where(rise > 0, rise, 1)
    inside = (newton > low) & (newton < high) & (rise > 0)
    new = jnp.where(inside, newton, (low + high) / 2)
    done = jnp.abs(gap) <= _TOLERANCE * k
    return step + 1, low, high, jnp.where(done, mu, new), gap

  start = 0, low, high, (low + high) / 2, jnp.full_like(low, jnp.inf)
  return lax.while_loop(unfinished, improve, start)[3]


def _sum(arrays, axes):
  """The sum of all entries, or along the axes of the one array."""
  if axes is None:
    return sum(jnp.sum(array) for array in arrays)
  return jnp.sum(arrays[0], axis=axes, keepdims=True)
