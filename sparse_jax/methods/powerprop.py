"""Powerpropagation: a reparametrisation that makes the rich richer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from sparse_jax import checks
from sparse_jax import trees
from sparse_jax.masks import marks as marks_lib
from sparse_jax.rules import state as state_lib
from sparse_jax.rules import storage as storage_lib
from sparse_jax.rules import updates as updates_lib
from sparse_jax.rules.make_method import refresh_by
from sparse_jax.rules.state import SparseMethod


def powerprop(method: SparseMethod, alpha: float = 2., *,
              least_slope: float = 0.01) -> SparseMethod:
  """Any method on weights w = theta * |theta|**(alpha - 1).

  Small parameters then get small gradients, so that weights part into large
  and negligible ones, which are cheap to remove. `parametrize` turns weights
  into theta, so that training starts from the same function; only the leaves
  that the method makes sparse are changed. The method sees w and dL/dw
  wherever it ranks or drops; penalties and weight decay act on theta. The
  training cost is the method's own.

  Law: alpha = 1 is the method itself.

  Args:
    method: the method that it wraps. Top-KAST is the published pair.
    alpha: the power, at least 1. The paper tries 1 to 5.
    least_slope: lower bound of dw/dtheta in the backward pass, at least 0: at
      theta = 0 the true slope is 0, and what SET or RigL grow could never
      leave it.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> import sparse_jax
    >>> method = powerprop(sparse_jax.static(0.), 2.)
    >>> weights = {'kernel': jnp.array([[4., -9.]])}
    >>> theta = method.parametrize(weights)
    >>> theta['kernel'].tolist()
    [[2.0, -3.0]]
    >>> method.read(theta, method.init(theta))['kernel'].tolist()
    [[4.0, -9.0]]

  Reference:
    Schwarz et al., Powerpropagation, 2021, https://arxiv.org/abs/2110.00296.
    Deviation: `least_slope`; 0 is the paper's own rule.
  """
  if not isinstance(method, SparseMethod):
    raise ValueError(f'`method` (={method!r}) must be a SparseMethod.')
  if not checks.check_non_negative('alpha', alpha) >= 1:
    raise ValueError(f'`alpha` (={alpha!r}) must be at least 1.')
  checks.check_non_negative('least_slope', least_slope)
  power = functools.partial(_power_leaf, alpha, least_slope)

  # As the states of the method call it: a packed one is a rule too.
  held = method.name
  if method.rule is not None and method.pack is not None:
    held = f'packed({held})'
  name = f'powerprop({held})'

  def renamed(state, name):
    plan = dataclasses.replace(state.plan, method=name)
    return state._replace(plan=plan)

  def own_state(state):
    """The inner method's state."""
    if not state_lib.is_state(state):  # Else its containers stay.
      state = state_lib.get_state(state)
    if state.plan.method != name:
      raise ValueError(f'`opt_state` holds the state of {state.plan.method!r}, '
                       f'and this method is {name!r}.')
    return renamed(state, held)

  def parametrize(params):
    marks = jax.eval_shape(method.init, method.parametrize(params)).marks
    return method.parametrize(marks_lib.map_marked(
        lambda leaf, own: _root(leaf, alpha), params, marks))

  def init(params, key=None):
    marks = jax.eval_shape(method.init, params).marks
    return renamed(method.init(marks_lib.map_marked(
        lambda leaf, own: _power(leaf, alpha), params, marks), key), name)

  def read(params, state):
    state = own_state(state)
    weights = marks_lib.map_marked(
        lambda leaf, own: power(leaf, marks_lib.backward_mask(own)), params,
        storage_lib.entry_marks(state))
    return method.read(weights, state)

  def penalty(params, state):
    return method.penalty(params, own_state(state))

  def update(updates, grads, state, params, **extra_args):
    state = own_state(state)
    marks = storage_lib.entry_marks(state)
    stepped = jax.tree.map(updates_lib.apply_update, params, updates)
    weights = marks_lib.map_marked(lambda leaf, own: _wide_power(leaf, alpha),
                                   stepped, marks)
    still = jax.tree.map(lambda w: jnp.full_like(w, -0.), weights)
    slopes = marks_lib.map_marked(lambda leaf, own: jnp.where(
        marks_lib.backward_mask(own), _slope(leaf, alpha, least_slope), 1),
                                  params, marks)
    own_grads = marks_lib.map_marked(
        lambda g, own, slope: _divide(g, slope), grads, marks, slopes)
    moves, new = method.update(still, own_grads, state, weights, **extra_args)
    return trees.map_leaves(
        functools.partial(_combine, alpha), params, updates, weights, moves,
        marks), renamed(new, name)

  def operators(params, state):
    return method.operators(params, own_state(state))

  return method._replace(
      name=name, parametrize=parametrize, init=init, read=read,
      penalty=penalty, refresh=refresh_by(update), update=update, rule=None,
      read_stored=None, operators=method.operators and operators)


def _combine(alpha, path, theta, update, weight, move, marks):
  """The update of theta, where the method moved w the one that leads there."""
  del path
  if not marks_lib.is_marked(marks):
    return jnp.where(move == 0, update, update + move)
  moved = updates_lib.apply_update(weight, move)
  there = _root(moved, alpha).astype(theta.dtype)
  return jnp.where(moved == weight, update, there - theta)


def _power(theta: jax.Array, alpha: float) -> jax.Array:
  wide = trees.widened(theta)
  return (jnp.sign(wide) * jnp.abs(wide)**alpha).astype(theta.dtype)


def _wide_power(theta: jax.Array, alpha: float) -> jax.Array:
  """w, wide, and not 0 where theta is not: it may have to become 0."""
  wide = trees.widened(theta)
  weight = _power(wide, alpha)
  tiny = jnp.copysign(jnp.finfo(wide.dtype).tiny, wide)
  return jnp.where((weight == 0) & (wide != 0), tiny, weight)


def _root(weight: jax.Array, alpha: float) -> jax.Array:
  wide = trees.widened(weight)
  root = jnp.sign(wide) * jnp.abs(wide)**(1 / alpha)
  return root.astype(weight.dtype)


def _slope(theta: jax.Array, alpha: float, least: float) -> jax.Array:
  size = jnp.abs(trees.widened(theta))
  return jnp.maximum(alpha * size**(alpha - 1), least)


def _divide(grad: jax.Array, slope: jax.Array) -> jax.Array:
  """grad / slope, and 0 where the slope is 0: nothing came through it."""
  safe = jnp.where(slope > 0, slope, 1)
  wide = trees.widened(grad)
  return jnp.where(slope > 0, wide / safe, 0).astype(grad.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _power_leaf(alpha, least, theta, inside):
  """w of theta. The gradient passes unscaled outside B, to rank growth."""
  del least, inside
  return _power(theta, alpha)


@_power_leaf.defjvp
def _power_leaf_jvp(alpha, least, primals, tangents):

  # So that a backward pass keeps theta, not the slope beside it.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def scale(theta, inside, tangent):
    slope = jnp.where(inside, _slope(theta, alpha, least), 1)
    return tangent * slope.astype(tangent.dtype)

  return _power_leaf(alpha, least, *primals), scale(*primals, tangents[0])
