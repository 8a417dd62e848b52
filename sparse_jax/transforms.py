"""Methods and masks as Optax gradient transformations."""

import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparse_jax import checks

from sparse_jax import trees
from sparse_jax.rules import losses
from sparse_jax.rules import slots as slots_lib
from sparse_jax.blocks import growth as growth_lib
from sparse_jax.blocks import packing
from sparse_jax.jaxprs import sinking
from sparse_jax.masks import marks as marks_lib
from sparse_jax.rules import state as state_lib
from sparse_jax.rules import storage
from sparse_jax.rules import updates as updates_lib


class SparsifyState(NamedTuple):
  """State of `sparsify`; `get_state` finds its first part in any nesting."""

  sparse: state_lib.SparseState  # The method's: masks, step, key.
  inner: Any  # The state of the optimizer inside.

  # What `optax.contrib.schedule_free_eval_params` asks a state for.
  @property
  def b1(self) -> jax.Array:
    """b1 of the optimizer, if that is `optax.contrib.schedule_free`."""
    return self.inner.b1

  @property
  def z(self) -> Any:
    """z of the optimizer, if that is `optax.contrib.schedule_free`."""
    return self.inner.z


def sparsify(optimizer: optax.GradientTransformation,
             method: state_lib.SparseMethod, *,
             key: int | jax.Array | None = None,
             penalty: bool = True, bound_grown: bool = True
             ) -> optax.GradientTransformationExtraArgs:
  """Makes an optimizer train by a sparse method.

  Each update: the penalty's gradient is added, the gradient is masked to the
  backward set, slots of entries that are or have just been outside it are
  made anew, the optimizer steps, its update is masked likewise, and the
  method refreshes its masks on the parameters that result. After
  `optax.apply_updates` the parameters are what the method says: exactly 0
  where it zeroes them, bit-identical to before outside the backward set.

  Whatever scales or changes updates outside of it breaks exact zeros, so
  `sparsify` goes outermost; `MultiSteps` and `apply_if_finite` are fine.

  Adam, and whatever else has one count beside its means of squares, divides
  an entry that has just entered by a root that is far too small: the count is
  old, the means are new, and its steps are up to 6 learning rates. So an entry
  that has entered the backward set since the start takes no larger a step
  than a new optimizer would take first, on the same gradient and at the same
  point of every schedule. `aged_adam` needs no bound: it corrects each entry
  by its own age. Other optimizers (SGD with momentum, those of the papers) are
  left as they are. Methods that make all slots anew renew the count too.

  Laws: at sparsity 0 it is the optimizer; penalty=True gives the updates that
  penalty=False gives with `method.penalty` added to the loss; as long as no
  entry has entered the backward set, `bound_grown` changes nothing.

  Args:
    optimizer: any Optax optimizer. Its extra arguments are passed on (those
      of `optax.lbfgs` too: `value`, `grad`, `value_fn` and what that takes).
    method: a method of this library.
    key: seed of the method's random choices: None (a fixed one), an int, or a
      key. Every replica must be given the same.
    penalty: whether to add the gradient of the method's penalty.
    bound_grown: whether to bound the steps of entries that have entered, as
      said above. False for an optimizer whose first steps are small by design
      (`optax.radam`): it would hold them back for ever. Where the gradient of
      such an entry is exactly 0 (inputs that are 0, a row not looked up) a new
      optimizer would take no step: its momentum then does not move it, but is
      kept, and moves it when there is a gradient again.

  Returns:
    An Optax transformation. `update` needs `params`.

  Raises:
    ValueError: if `optimizer` or `method` is none, or `update` is called
      without `params` or with gradients of other shapes.

  Example:
    >>> import sparse_jax
    >>> method = sparse_jax.static(sparsity=0.5)
    >>> tx = sparse_jax.sparsify(optax.sgd(0.1), method)
    >>> params = {'kernel': jnp.ones((2, 4))}
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> sorted(optax.apply_updates(params, updates)['kernel'].ravel().tolist())
    [0.0, 0.0, 0.0, 0.0, 0.8999999761581421, 0.8999999761581421,
    0.8999999761581421, 0.8999999761581421]
  """
  if not isinstance(method, state_lib.SparseMethod):
    raise ValueError(f'`method` (={method!r}) must be a SparseMethod, such as '
                     'sparse_jax.top_kast(...).')
  if not hasattr(optimizer, 'update'):
    raise ValueError(f'`optimizer` (={optimizer!r}) must be an Optax '
                     'transformation.')
  checks.check_bool('penalty', penalty)
  checks.check_bool('bound_grown', bound_grown)
  optimizer = optax.with_extra_args_support(optimizer)

  def init_fn(params):
    sparse = state_lib.first_state(method, params, key)
    own = growth_lib.without_growth(params)
    return SparsifyState(sparse, optimizer.init(own))

  def update_fn(grads, state, params=None, **extra_args):
    if params is None:
      raise ValueError('`params` (=None) must be given to update().')
    if state.sparse.plan.leaves:
      trees.map_leaves(_check_shape, grads, params)
    update = functools.partial(one_update, **extra_args)
    if method.grows:
      update = sinking.conditions_first(
          update, updates_lib.AGAIN, lambda outs: outs[1].sparse,
          _before_refresh)
    return update(grads, state, params)

  def one_update(grads, state, params, **extra_args):
    sparse, slots = state
    if penalty and method.penalises:
      grads = _add_penalty(method, grads, params, sparse)
    given, all_grads = params, grads
    params, grads = map(growth_lib.without_growth, (params, grads))
    if 'grad' in extra_args:  # That of a line search.
      extra_args['grad'] = growth_lib.without_growth(extra_args['grad'])
    marks = storage.entry_marks(sparse, like=params)
    grads, fresh = _mask(grads, marks), optimizer.init(params)
    updates, new_slots = optimizer.update(
        grads, _fresh_outside(slots, fresh, params, sparse, marks), params,
        **extra_args)
    known = slots_lib.corrected(params, slots)
    if bound_grown and known and method.grows and method.resets is None:
      first, _ = optimizer.update(
          grads, slots_lib.renewed(params, slots, fresh), params, **extra_args)
      updates = _bounded(updates, first, grads, marks, known)
    updates = _mask(updates, marks, still=-0.)
    if method.skips is not None:
      updates, new_slots = _skip(method.skips(sparse), updates,
                                 (slots, new_slots))
    renewed = method.resets and method.resets(sparse)
    updates, sparse = method.update(updates, all_grads, sparse, params,
                                    **extra_args)
    if renewed is not None:
      fresh = optimizer.init(optax.apply_updates(params, updates))
      new_slots = slots_lib.renewed(params, new_slots, fresh, renewed)
    return _like(given, updates), SparsifyState(sparse, new_slots)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def mask_updates() -> optax.GradientTransformationExtraArgs:
  """Stops updates outside the masks given at each update.

  `update(..., backward_masks=masks)` takes a tree of bool like the
  parameters; a leaf without a mask (None) passes unchanged. Outside a mask the
  update is -0, so that p + u is p bit for bit.

  Returns:
    An Optax transformation without state.

  Example:
    >>> tx = optax.chain(optax.sgd(1.), mask_updates())
    >>> params = jnp.ones(2)
    >>> updates, _ = tx.update(params, tx.init(params), params,
    ...                        backward_masks=jnp.array([True, False]))
    >>> updates
    Array([-1., -0.], dtype=float32)
  """
  def update_fn(updates, state, params=None, *, backward_masks, **extra_args):
    del params, extra_args
    return _where_masked(backward_masks, updates, -0.), state

  return optax.GradientTransformationExtraArgs(_no_state, update_fn)


def keep_params_sparse() -> optax.GradientTransformationExtraArgs:
  """Replaces updates so that parameters become 0 outside the masks given.

  `update(..., forward_masks=masks)`: outside a mask the update is -p.

  Returns:
    An Optax transformation without state. `update` needs `params`.

  Raises:
    ValueError: from `update`, without `params`.

  Example:
    >>> tx = optax.chain(optax.sgd(1.), keep_params_sparse())
    >>> params = jnp.array([3., 3.])
    >>> updates, _ = tx.update(jnp.ones(2), tx.init(params), params,
    ...                        forward_masks=jnp.array([True, False]))
    >>> optax.apply_updates(params, updates)
    Array([2., 0.], dtype=float32)
  """
  def update_fn(updates, state, params=None, *, forward_masks, **extra_args):
    del extra_args
    if params is None:
      raise ValueError('`params` (=None) must be given to update().')

    def keep(path, update, weight, mask):
      del path
      return update if mask is None else jnp.where(mask, update, -weight)

    return trees.map_leaves(keep, updates, params, forward_masks), state

  return optax.GradientTransformationExtraArgs(_no_state, update_fn)


def add_exploration_decay(
    penalty_weight: float = 1e-4, *,
    forward_density: float | dict[trees.Path, float] | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Adds the gradient of Top-KAST's exploration loss.

  `update(..., forward_masks=a, backward_masks=b)` takes the masks.

  Args:
    penalty_weight, forward_density: as of `exploration_loss`, whose gradient it
      adds.

  Returns:
    An Optax transformation without state. `update` needs `params`.

  Raises:
    ValueError: naming the argument that is out of range; from `update`, without
      `params`.

  Example:
    >>> tx = optax.chain(add_exploration_decay(1.), optax.sgd(1.))
    >>> params, mask = jnp.array([3., 4.]), jnp.array([True, False])
    >>> updates, _ = tx.update(jnp.zeros(2), tx.init(params), params,
    ...                        forward_masks=mask, backward_masks=mask)
    >>> updates
    Array([-3., -0.], dtype=float32)
  """
  checks.check_non_negative('penalty_weight', penalty_weight)
  losses.check_density(forward_density)

  def update_fn(updates, state, params=None, *, forward_masks, backward_masks,
                **extra_args):
    del extra_args
    if params is None:
      raise ValueError('`params` (=None) must be given to update().')
    decay = jax.grad(losses.exploration_loss)(
        params, forward_masks, backward_masks, penalty_weight=penalty_weight,
        forward_density=forward_density)
    return jax.tree.map(jnp.add, updates, decay), state

  return optax.GradientTransformationExtraArgs(_no_state, update_fn)


def scale_by_leaf(factors: trees.PyTree) -> optax.GradientTransformation:
  """Multiplies the updates of each parameter by a number of its own.

  With the factors of `scaling.supar`, after Adam, it is a learning rate a leaf.

  Args:
    factors: tree of numbers, matched by path; a leaf that it lacks is left.

  Returns:
    An Optax transformation without state.

  Example:
    >>> tx = optax.chain(optax.sgd(1.), scale_by_leaf({'a': 2.}))
    >>> params = {'a': jnp.ones(1), 'b': jnp.ones(1)}
    >>> tx.update(params, tx.init(params))[0]
    {'a': Array([-2.], dtype=float32), 'b': Array([-1.], dtype=float32)}
  """
  def scale(path, update, factor):
    del path
    return update if factor is None else update * jnp.asarray(
        factor, update.dtype)

  return optax.stateless(
      lambda updates, _: trees.map_leaves(scale, updates, factors))


def _like(params, updates):
  """Updates of the parameters' own structure: growth scores stay 0."""
  if growth_lib.has_bare_growth(params):
    raw = lambda tree: dict(getattr(tree, 'raw_mapping', tree))
    still = jax.tree.map(jnp.zeros_like, raw(params)[growth_lib.GROWTH])
    return type(updates)({**raw(updates), growth_lib.GROWTH: still})
  return jax.tree.map(
      lambda leaf, update: update.replace(growth=leaf.growth)
      if packing.is_packed(leaf) else update, params, updates,
      is_leaf=packing.is_packed)


def _check_shape(path, grad, weight):
  if weight is not None and jnp.shape(grad) != jnp.shape(weight):
    raise ValueError(
        f'`grads` has shape {jnp.shape(grad)} at {path!r}, and must have '
        f'{jnp.shape(weight)}: what averages gradients of single examples goes '
        'before, optax.chain(it, sparsify(...)).')


def _no_state(params):
  del params
  return optax.EmptyState()


def _add_penalty(method, grads, params, sparse):
  decay = jax.grad(method.penalty)(params, sparse)
  return jax.tree.map(lambda g, d: g + d.astype(g.dtype), grads, decay)


def _before_refresh(args, sparse):
  """The arguments of an update, their marks read off those that it gave."""
  grads, (old, slots), params = args
  marks = trees.map_leaves(
      lambda path, marks: marks_lib.previous(marks, sparse.refreshed_at(path)),
      sparse.marks)
  return grads, SparsifyState(old._replace(marks=marks), slots), params


def _mask(tree, marks, still=0.):
  """Zeros (or -0) outside B."""
  def mask(leaf, marks):
    return jnp.where(marks_lib.backward_mask(marks), leaf,
                     jnp.asarray(still, leaf.dtype))

  return marks_lib.map_marked(mask, tree, marks)


def _where_masked(masks, tree, other):
  def mask(path, leaf, mask):
    del path
    other_ = jnp.asarray(other, leaf.dtype)
    return leaf if mask is None else jnp.where(mask, leaf, other_)

  return trees.map_leaves(mask, tree, masks)


def _fresh_outside(slots, fresh, params, sparse, marks):
  """Slots of entries that are or were outside B as `optimizer.init` makes them.

  So an entry that enters B starts anew, whatever the optimizer keeps or adds
  outside B (weight decay reaches momentum there). Before the step, not after
  it: XLA then reads and writes each slot once.
  """
  levels = trees.leaves_by_path(marks)

  def visit(path, slot, new):
    own = levels.get(path)
    if not marks_lib.is_marked(own):
      return slot
    inside = jnp.where(sparse.refreshed_at(path),
                       marks_lib.stays_backward(own),
                       marks_lib.backward_mask(own))
    return jnp.where(inside, slot, new)

  return slots_lib.map_slots(visit, params, slots, fresh)


def _bounded(updates, first, grads, marks, known):
  """Updates of entries that came later, no larger than the `first` ones.

  A first step of 0 along a gradient is none (ADOPT), and bounds nothing.
  """
  def bound(path, update, most, grad, marks):
    if path not in known or not marks_lib.is_marked(marks):
      return update
    most = jnp.abs(most)
    bounded = marks_lib.came_later(marks) & ((most > 0) | (grad == 0))
    return jnp.where(bounded, _no_larger(update, most), update)

  return trees.map_leaves(bound, updates, first, grads, marks)


def _no_larger(update, most):
  """The update with a magnitude of no more than `most`."""
  if not jnp.iscomplexobj(update):
    return jnp.clip(update, -most, most)
  size = jnp.abs(update)
  return jnp.where(size > most, update * (most / jnp.where(size > 0, size, 1)),
                   update)


def _skip(skip, updates, slots):
  """No update and the old slots where the refresh replaces the step."""
  old, new = slots
  kept = jax.tree.map(lambda o, n: jnp.where(skip, o, n), old, new)
  still = jax.tree.map(
      lambda u: jnp.where(skip, jnp.asarray(-0., u.dtype), u), updates)
  return still, kept
