"""Sparsity that is learnt: thresholds and gates among the parameters.

`method.parametrize` adds them to the parameter tree under a key of their own,
shaped to broadcast against their kernels, so that the optimizer trains (and
decays) them like anything else; `read` gives back the model's own tree. The
gradient may reach every weight, so the backward set is full.
"""

from collections.abc import Callable
from collections.abc import Mapping
import math
import numbers

import jax
import jax.numpy as jnp

from sparse_jax.rules import assembly
from sparse_jax import checks
from sparse_jax import trees
from sparse_jax.masks import masking
from sparse_jax.masks import selection
from sparse_jax.rules import sites as sites_lib
from sparse_jax.rules.assembly import SparseMethod

THRESHOLDS, GATES = 'thresholds', 'gates'


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
  """
  sites = _sites(is_sparse, batch_axes)
  _check_finite('initial', initial)

  def read_leaf(weight, s, state):
    del state
    wide = weight.astype(jnp.float32)
    soft = jnp.sign(wide) * jax.nn.relu(jnp.abs(wide) - jax.nn.sigmoid(s))
    return soft.astype(weight.dtype)

  def is_kept(weight, s, step):
    del step
    return jnp.abs(weight.astype(jnp.float32)) > jax.nn.sigmoid(s)

  return _method(sites, THRESHOLDS, lambda leaf: jnp.full(
      _stack_shape(leaf), initial, jnp.float32), read_leaf, is_kept)


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
    https://arxiv.org/abs/2005.06870, sections 3.2 to 3.4.
  """
  sites = _sites(is_sparse, batch_axes)
  checks.check_non_negative('penalty_weight', penalty_weight)
  checks.check_fraction('least_kept', least_kept)

  def read_leaf(weight, t, state):
    del state
    wide = weight.astype(jnp.float32)
    return (wide * _estimated_step(jnp.abs(wide) - t)).astype(weight.dtype)

  def is_kept(weight, t, step):
    del step
    return jnp.abs(weight.astype(jnp.float32)) > t

  def penalty(params, state):
    del state
    _, thresholds = split(params, THRESHOLDS)
    total = sum(jnp.sum(jnp.exp(-t)) for t in jax.tree.leaves(thresholds))
    return penalty_weight * total

  def adjust(params, updates, old, new):
    """Back to 0 where the new parameters keep too little of a layer."""
    del old
    model, thresholds = split(params, THRESHOLDS)
    leaves = sites.leaves(model)

    def visit(path, update, t, marks):
      layer = tuple(axis for axis in range(marks.ndim)
                    if axis not in leaves[path].layout.stacked)
      kept = jnp.mean(masking.forward_mask(marks).astype(jnp.float32),
                      axis=layer, keepdims=True)
      return jnp.where(kept <= least_kept, -t, update)

    moved, own = split(updates, THRESHOLDS)
    own = trees.map_leaves(visit, own, thresholds, new.marks)
    return join(moved, own, THRESHOLDS)

  return _method(sites, THRESHOLDS, lambda leaf: jnp.zeros(
      _output_shape(leaf), jnp.float32), read_leaf, is_kept, penalty=penalty,
                 adjust=adjust)


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
       rewind_to: int = 0, is_sparse: selection.IsSparse = None,
       batch_axes: selection.Axes = ()) -> SparseMethod:
  """Continuous sparsification: one gate a weight, made hard by temperature.

  The forward pass sees w * sigmoid(b s) / sigmoid(initial), where the
  temperature b rises from 1 to `temperature` exponentially in each round. At
  the end of a round that is not the last s becomes min(b s, initial), and
  the weights go back to where they were at step `rewind_to`, with all
  optimizer slots made anew. After the last round the gates are hard: 1 where
  s > 0, else 0. Training is dense, 3 f_D, until then.

  The gates are `params['gates']`; the paper trains them without weight decay.
  `forward_masks` tell what is read: all of it while gates are soft.

  Args:
    initial: s at the start; below 0 for a sparser ticket.
    temperature: the last b of a round, above 0.
    penalty_weight: coefficient of the sum of the soft gates, at least 0.
    rounds, round_steps: how many rounds, of how many steps, at least 1.
    rewind_to: the step of the first round to whose weights rounds return.
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
    Savarese et al., Continuous sparsification, 2020,
    https://arxiv.org/abs/1912.04427, algorithm 2.
  """
  sites = _sites(is_sparse, batch_axes)
  _check_cs(initial, temperature, penalty_weight, rounds, round_steps,
            rewind_to)
  whole = 1 / (1 + math.exp(-initial))

  def heat(step):
    share = (step % round_steps).astype(jnp.float32) / round_steps
    return jnp.float32(temperature)**share

  def gate(s, step):
    hard = step >= rounds * round_steps
    soft = jax.nn.sigmoid(heat(step) * s)
    return jnp.where(hard, (s > 0).astype(jnp.float32), soft)

  def read_leaf(weight, s, state):
    factor = gate(s, state.step) / whole
    return (weight.astype(jnp.float32) * factor).astype(weight.dtype)

  def is_kept(weight, s, step):
    del weight
    return (s > 0) | (step < rounds * round_steps)

  def penalty(params, state):
    _, gates = split(params, GATES)
    total = sum(jnp.sum(gate(s, state.step)) for s in jax.tree.leaves(gates))
    return penalty_weight * total

  def begins_again(step):
    return (step % round_steps == 0) & (step < rounds * round_steps)

  def remember(params):
    return jax.tree.map(jnp.array, split(params, GATES)[0])

  def renew(seen, state):
    """Keeps the weights of step `rewind_to`."""
    model, _ = split(seen.params, GATES)
    here = state.step + 1 == rewind_to
    return state._replace(extra=jax.tree.map(
        lambda new, old: jnp.where(here, new, old), model, state.extra))

  def adjust(params, updates, old, new):
    again = begins_again(old.step + 1)
    model, gates = split(params, GATES)
    moved, own = split(updates, GATES)
    moved = jax.tree.map(lambda p, u, first: jnp.where(again, first - p, u),
                         model, moved, new.extra)
    own = jax.tree.map(lambda s, u: jnp.where(again, jnp.minimum(
        temperature * (s + u), initial) - s, u), gates, own)
    return join(moved, own, GATES)

  several = rounds > 1
  return _method(
      sites, GATES, lambda leaf: jnp.full(leaf.layout.shape, initial,
                                          jnp.float32),
      read_leaf, is_kept, penalty=penalty,
      extra=remember if several else None, renew=renew if several else None,
      adjust=adjust if several else None,
      resets=(lambda state: begins_again(state.step + 1)) if several else None)


def _check_cs(initial, temperature, penalty_weight, rounds, round_steps,
              rewind_to):
  _check_finite('initial', initial)
  if checks.check_non_negative('temperature', temperature) == 0:
    raise ValueError(f'`temperature` (={temperature!r}) must be above 0.')
  checks.check_non_negative('penalty_weight', penalty_weight)
  checks.check_count('rounds', rounds, least=1)
  checks.check_count('round_steps', round_steps, least=1)
  checks.check_count('rewind_to', rewind_to)
  if rewind_to and (rounds == 1 or rewind_to >= round_steps):
    raise ValueError(f'`rewind_to` (={rewind_to}) must be a step of the first '
                     f'of several rounds; `rounds` is {rounds}, `round_steps` '
                     f'{round_steps}.')


def _method(sites, name: str, first: Callable[[sites_lib.Leaf], jax.Array],
            read_leaf: Callable[..., jax.Array], is_kept, *, renew=None,
            penalty=None, adjust=None, extra=None, resets=None) -> SparseMethod:
  """A method whose `read_leaf(weight, learnt, state)` has learnt arrays.

  `first(leaf)` makes them; `is_kept(weight, learnt, step)` is the mask.
  """
  def parametrize(params):
    if not isinstance(params, Mapping) or name in params:
      raise ValueError(f'`params` (a {type(params).__name__}) must be a '
                       f'mapping without the key {name!r}.')
    leaves = sites.leaves(params)
    learnt = _only(params, {path: first(leaf)
                            for path, leaf in leaves.items()})
    return join(params, learnt, name)

  def levels(leaf, weight, learnt, step):
    kept = jnp.broadcast_to(is_kept(weight, learnt, step), leaf.layout.shape)
    return kept.astype(jnp.uint8) + jnp.uint8(1)

  def start(params, key):
    del key
    model, learnt = split(params, name)
    own = trees.leaves_by_path(learnt)
    return sites_lib.first_marks(model, sites.leaves(model), lambda leaf, w:
                                 levels(leaf, w, own[leaf.path], 0))

  def read(params, state):
    model, learnt = split(params, name)

    def visit(path, weight, own):
      del path
      return weight if own is None else read_leaf(weight, own, state)

    return trees.map_leaves(visit, model, learnt)

  def renew_marks(seen, state):
    model, learnt = split(seen.params, name)
    leaves = sites.leaves(model)

    def visit(path, weight, own, old):
      if own is None:
        return old
      step = state.step + 1
      return masking.mark(levels(leaves[path], weight, own, step), old)

    marks = trees.map_leaves(visit, model, learnt, state.marks)
    state = state._replace(marks=marks)
    return state if renew is None else renew(seen, state)

  return assembly.make_method(
      start, read=read, renew=renew_marks, extra=extra, adjust=adjust,
      penalty=penalty, resets=resets, parametrize=parametrize)


def split(params: trees.PyTree, name: str) -> tuple[trees.PyTree, trees.PyTree]:
  """The model's own tree, and what `parametrize` has added to it.

  Raises:
    ValueError: if nothing was added.
  """
  if not isinstance(params, Mapping) or name not in params:
    raise ValueError(f'`params` (a {type(params).__name__}) must have the key '
                     f'{name!r}: use params = method.parametrize(params).')
  own = _entries(params)
  learnt = own.pop(name)
  return type(params)(own), learnt


def join(model: trees.PyTree, learnt: trees.PyTree, name: str) -> trees.PyTree:
  """The tree that `split` takes apart."""
  return type(model)({**_entries(model), name: learnt})


def _entries(tree: Mapping) -> dict:
  """The keys and values of a mapping; NNX would wrap its values anew."""
  return dict(getattr(tree, 'raw_mapping', tree))


def _only(tree, replacements, path=()):
  """The leaves with a replacement, in the same nesting of mappings."""
  if not isinstance(tree, Mapping):
    return replacements.get('/'.join(map(str, path)))
  parts = {key: _only(value, replacements, (*path, key))
           for key, value in tree.items()}
  return {key: part for key, part in parts.items() if part is not None and (
      not isinstance(part, dict) or part)}


def _sites(is_sparse, batch_axes) -> sites_lib.Sites:
  return sites_lib.Sites(0., is_sparse=is_sparse,
                         batch_axes=batch_axes).checked()


def _stack_shape(leaf: sites_lib.Leaf) -> tuple[int, ...]:
  """One number for each layer, shaped to broadcast against its weights."""
  return tuple(n if axis in leaf.layout.stacked else 1
               for axis, n in enumerate(leaf.layout.shape))


def _output_shape(leaf: sites_lib.Leaf) -> tuple[int, ...]:
  """One number for each output of each layer, likewise."""
  layout = leaf.layout
  last = max(layout.rows, default=-1)
  return tuple(n if axis in layout.stacked or axis > last else 1
               for axis, n in enumerate(layout.shape))


def _check_finite(name: str, value: float) -> None:
  numeric = isinstance(value, numbers.Real) and not isinstance(value, bool)
  if not numeric or not math.isfinite(value):
    raise ValueError(f'`{name}` (={value!r}) must be a finite number.')
