"""Sparsity that is learnt: thresholds and gates among the parameters."""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp

from sparse_jax import checks
from sparse_jax import trees
from sparse_jax.masks import selection
from sparse_jax.rules.learned import learned_method
from sparse_jax.rules.leaves import Leaf
from sparse_jax.rules.state import SparseMethod


def str_(*, initial: float = -3200., is_sparse: selection.IsSparse = None,
         batch_axes: selection.Axes = ()) -> SparseMethod:
  """Soft threshold reparametrisation: one learnt threshold a layer.

  The forward pass sees sign(w) * relu(|w| - sigmoid(s)), with s trained by
  the loss. What drives s up is its weight decay, which the optimizer must
  apply to `params['thresholds']` as to the kernels (adding it to the
  gradient, not decoupled); sparsity follows from `initial` and the decay and
  is no target. Training costs 2 f_S + f_D.

  Args:
    initial: s at the start. The paper's -3200 is for 100 epochs of ImageNet
      at weight decay 2.25e-5; a short run needs about -100 to -5.
    is_sparse, batch_axes: as in `static`; each stacked layer has an s of its
      own.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> method = str_(initial=-math.log(3))  # A threshold of 1/4.
    >>> params = method.parametrize({'kernel': jnp.array([[.5, -.1, -.8]])})
    >>> method.read(params, method.init(params))['kernel']
    Array([[ 0.25, -0.  , -0.55]], dtype=float32)

  Reference:
    Kusupati et al., STR, 2020, https://arxiv.org/abs/2002.03231, section 3.
    Every layer has a threshold there, the first and the last too.
  """
  _check_finite('initial', initial)

  def read_leaf(weight, s, step):
    del step
    wide = trees.widened(weight)
    soft = jnp.sign(wide) * jax.nn.relu(jnp.abs(wide) - jax.nn.sigmoid(s))
    return soft.astype(weight.dtype)

  def is_kept(weight, s, step):
    del step
    return jnp.abs(trees.widened(weight)) > jax.nn.sigmoid(s)

  return learned_method('str_', 'thresholds', lambda leaf: jnp.full(
      _stack_shape(leaf), initial, jnp.float32), read_leaf, is_kept,
                        is_sparse=is_sparse, batch_axes=batch_axes)


def dst(*, penalty_weight: float = 5e-6, least_kept: float = 0.01,
        is_sparse: selection.IsSparse = None, batch_axes: selection.Axes = ()
        ) -> SparseMethod:
  """Dynamic sparse training: one learnt threshold for each output.

  The forward pass sees w * step(|w| - t), t trained through an estimator of
  the step's derivative: 2 - 4 |q| up to |q| = 0.4, then 0.4 up to 1, then 0.
  The penalty, `penalty_weight` times the sum of exp(-t), drives thresholds
  up. A layer that keeps no more than `least_kept` of its weights has its
  thresholds set back to 0. Training costs 2 f_S + f_D.

  Args:
    penalty_weight: alpha of the paper, at least 0: 5e-6 for CIFAR, 5e-4 for
      MNIST. The paper's weight decay acts on thresholds too.
    least_kept: a share in [0, 1].
    is_sparse, batch_axes: as in `static`.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> method = dst()
    >>> weights = {'kernel': jnp.array([[.5, -.1], [0., 2.]])}
    >>> params = method.parametrize(weights)
    >>> params['thresholds']['kernel'] += .2
    >>> method.read(params, method.init(params))['kernel']
    Array([[ 0.5, -0. ],
           [ 0. ,  2. ]], dtype=float32)

  Reference:
    Liu et al., Dynamic sparse training, 2020,
    https://arxiv.org/abs/2005.06870, sections 3.2 to 3.4. Every layer has
    thresholds there.
  """
  checks.check_non_negative('penalty_weight', penalty_weight)
  checks.check_fraction('least_kept', least_kept)

  def read_leaf(weight, t, step):
    del step
    wide = trees.widened(weight)
    return (wide * _estimated_step(jnp.abs(wide) - t)).astype(weight.dtype)

  def is_kept(weight, t, step):
    del step
    return jnp.abs(trees.widened(weight)) > t

  def penalty(learnt, step):
    del step
    total = sum(jnp.sum(jnp.exp(-t)) for t in jax.tree.leaves(learnt))
    return penalty_weight * total

  def adjust(now):
    """Back to 0 where the new parameters keep too little of a layer."""
    def visit(path, update, t):
      layer = tuple(axis for axis in range(t.ndim)
                    if axis not in now.leaves[path].layout.stacked)
      kept = jnp.mean(now.kept[path].astype(jnp.float32), axis=layer,
                      keepdims=True)
      return jnp.where(kept <= least_kept, -t, update)

    return now.moves, trees.map_leaves(visit, now.learnt_moves, now.learnt)

  return learned_method('dst', 'thresholds', lambda leaf: jnp.zeros(
      _output_shape(leaf), jnp.float32), read_leaf, is_kept, penalty=penalty,
                        adjust=adjust, is_sparse=is_sparse,
                        batch_axes=batch_axes)


@jax.custom_jvp
def _estimated_step(q: jax.Array) -> jax.Array:
  """1 where q > 0, else 0, with DST's long-tailed derivative."""
  return (q > 0).astype(q.dtype)


@_estimated_step.defjvp
def _estimated_step_jvp(primals, tangents):
  (q,), (dq,) = primals, tangents
  size = jnp.abs(q)
  slope = jnp.where(size <= .4, 2 - 4 * size, jnp.where(size <= 1, .4, 0))
  return (q > 0).astype(q.dtype), slope.astype(q.dtype) * dq


def cs(*, initial: float = 0., temperature: float = 200.,
       penalty_weight: float = 1e-8, rounds: int = 1, round_steps: int = 10_000,
       rewind: bool = True, rewind_to: int | None = None,
       is_sparse: selection.IsSparse = None, batch_axes: selection.Axes = ()
       ) -> SparseMethod:
  """Continuous sparsification: one gate a weight, made hard by temperature.

  The forward pass sees w * sigmoid(b s) / sigmoid(initial), where the
  temperature b rises from 1 to `temperature` exponentially in each round. At
  the end of a round that is not the last s becomes min(s, initial); weights
  and slots go on. After the last round the ticket is trained: gates are hard,
  1 where s > 0, else 0, and move no more; the weights go back to where they
  were at step `rewind_to`, with all optimizer slots made anew, once. Training
  is dense, 3 f_D, until then.

  Train for as many steps more as a round has, and begin the learning rate's
  schedule anew with each round and with the ticket, as the official code does.
  Batch statistics are the caller's: that code takes them back too.

  The gates are `params['gates']`; the paper trains them without weight decay.
  `forward_masks` tell what is read: all of it while gates are soft.

  Args:
    initial: s at the start; below 0 for a sparser ticket.
    temperature: the last b of a round, above 0.
    penalty_weight: coefficient of the sum of sigmoid(b s) / sigmoid(initial),
      at least 0.
    rounds, round_steps: how many rounds, of how many steps, at least 1.
    rewind: False trains the ticket on from the weights and slots that the last
      round ends with; no copy of the weights is kept then.
    rewind_to: the step of the first round to whose weights the ticket returns;
      None is two of 85 parts of a round, the official code's epochs.
    is_sparse, batch_axes: as in `static`.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> method = cs(round_steps=100)
    >>> params = method.parametrize({'kernel': jnp.ones((2, 3))})
    >>> state = method.init(params)._replace(step=jnp.int32(100))
    >>> params['gates']['kernel'] += jnp.array([[.1, -.1, 0.], [0., .2, .3]])
    >>> method.read(params, state)['kernel']
    Array([[2., 0., 0.],
           [0., 2., 2.]], dtype=float32)

  Reference:
    Savarese et al., Winning the lottery with continuous sparsification, 2020,
    https://arxiv.org/abs/1912.04427, and its code,
    https://github.com/lolemacs/continuous-sparsification, main.py, which is
    followed: it penalises the scaled gates, lowers them with the temperature
    already back at 1, and leaves the convolutions of shortcuts and the
    classifier dense. Deviation: the temperature rises with each step, in that
    code with each epoch.
  """
  rewind_to = _check_cs(initial, temperature, penalty_weight, rounds,
                        round_steps, rewind, rewind_to)
  whole, end = 1 / (1 + math.exp(-initial)), rounds * round_steps

  def gate(s, step):
    kind = trees.widened(s).dtype
    share = (step % round_steps).astype(kind) / max(round_steps - 1, 1)
    soft = jax.nn.sigmoid(jnp.asarray(temperature, kind)**share * s)
    return jnp.where(step >= end, (s > 0).astype(kind), soft) / whole

  def read_leaf(weight, s, step):
    return (trees.widened(weight) * gate(s, step)).astype(weight.dtype)

  def is_kept(weight, s, step):
    del weight
    return (s > 0) | (step < end)

  def penalty(learnt, step):
    total = sum(jnp.sum(gate(s, step)) for s in jax.tree.leaves(learnt))
    return penalty_weight * total

  def remember(model, extra, step):
    """Keeps the weights of step `rewind_to`."""
    return jax.tree.map(lambda new, old: jnp.where(step == rewind_to, new,
                                                   old), model, extra)

  def adjust(now):
    """Lower gates after a round; after all of them still ones, old weights."""
    between = (now.step % round_steps == 0) & (now.step < end)
    lower = jax.tree.map(lambda s, u: jnp.where(between, jnp.minimum(
        s + u, initial) - s, jnp.where(now.step > end, -0., u)), now.learnt,
                         now.learnt_moves)
    if not rewind:
      return now.moves, lower
    return jax.tree.map(lambda p, u, first: jnp.where(
        now.step == end, first - p, u), now.model, now.moves, now.extra), lower

  rewinding: dict[str, Any] = dict(
      extra=lambda model: jax.tree.map(jnp.array, model), remember=remember,
      resets=lambda state: state.step + 1 == end)
  return learned_method(
      'cs', 'gates', lambda leaf: jnp.full(leaf.layout.shape, initial,
                                           jnp.float32), read_leaf, is_kept,
      penalty=penalty, adjust=adjust, is_sparse=is_sparse,
      batch_axes=batch_axes, **rewinding if rewind else {})


def _check_cs(initial, temperature, penalty_weight, rounds, round_steps, rewind,
              rewind_to) -> int:
  """The step to rewind to, or a ValueError naming a bad argument."""
  _check_finite('initial', initial)
  if checks.check_non_negative('temperature', temperature) == 0:
    raise ValueError(f'`temperature` (={temperature!r}) must be above 0.')
  checks.check_non_negative('penalty_weight', penalty_weight)
  checks.check_count('rounds', rounds, least=1)
  checks.check_count('round_steps', round_steps, least=1)
  checks.check_bool('rewind', rewind)
  if rewind_to is None:
    return round(round_steps * 2 / 85)
  checks.check_count('rewind_to', rewind_to)
  if not rewind or rewind_to >= round_steps:
    raise ValueError(f'`rewind_to` (={rewind_to}) must be a step of the first '
                     f'round, of `round_steps` ={round_steps}, and None '
                     f'without `rewind` (={rewind}).')
  return rewind_to


def _stack_shape(leaf: Leaf) -> tuple[int, ...]:
  """One number for each layer, shaped to broadcast against its weights."""
  return tuple(n if axis in leaf.layout.stacked else 1
               for axis, n in enumerate(leaf.layout.shape))


def _output_shape(leaf: Leaf) -> tuple[int, ...]:
  """One number for each output of each layer, likewise."""
  layout = leaf.layout
  last = max(layout.rows, default=-1)
  return tuple(n if axis in layout.stacked or axis > last else 1
               for axis, n in enumerate(layout.shape))


def _check_finite(name: str, value: float) -> None:
  numeric = isinstance(value, numbers.Real) and not isinstance(value, bool)
  if not numeric or not math.isfinite(value):
    raise ValueError(f'`{name}` (={value!r}) must be a finite number.')
