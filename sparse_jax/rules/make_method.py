"""Methods made of their parts, and of one rule on groups."""

import functools

import jax
from jax import lax
import jax.numpy as jnp

from sparse_jax import trees
from sparse_jax.masks import marks as marks_lib
from sparse_jax.masks import placing
from sparse_jax.rules import rule as rule_lib
from sparse_jax.rules import state as state_lib
from sparse_jax.rules import storage as storage_lib
from sparse_jax.rules import updates as updates_lib

SparseMethod = state_lib.SparseMethod
Rule = rule_lib.Rule
Seen = updates_lib.Seen


def make_method(rule: Rule, storage: storage_lib.Storage = storage_lib.MASKED
                ) -> SparseMethod:
  """Makes the method of a rule.

  Args:
    rule: what the method is made of.
    storage: how sparse leaves are stored; `packed(method)` gives the other.

  Returns:
    A SparseMethod. Its work, counts and memory follow from the rule.

  Raises:
    ValueError: naming a bad argument of `rule.sites`.

  Example:
    >>> from sparse_jax import rules
    >>> def choose(leaf, now):  # New random groups at every refresh.
    ...   return leaf.top(now.random)
    >>> method = make_method(rules.Rule(
    ...     'shuffle', rules.Sites(.75), choose, zeros=True,
    ...     refreshes=rules.refresh_window(10, 0, None)))
    >>> method.work({'kernel': jnp.ones((4, 4))}, 1000)['kernel']
    Work(forward=0.25, input_gradient=0.25, weight_gradient=0.25)
  """
  rule.sites.checked()
  window = rule.refreshes or (lambda step: False)

  def start(leaves, params, key):
    weights = trees.leaves_by_path(params)
    nows = {path: storage_lib.MASKED.now(leaf, jnp.int32(0), key,
                                         weight=weights[path])
            for path, leaf in leaves.items()}
    chosen = _choose_first(rule, leaves, nows, params)
    return {path: marks_lib.mark(_levels(sets))
            for path, sets in chosen.items()}

  def place(leaves, params, marks):
    weights = trees.leaves_by_path(params)
    own = {path: storage.place(rule, leaf, weights[path], marks[path])
           for path, leaf in leaves.items()}
    return {path: place for path, place in own.items() if place is not None}

  def read(params, state, read_leaf=storage.read):
    due = window(state.step + 1)

    def visit(path, stored, marks):
      if not marks_lib.is_marked(marks):
        return stored
      return read_leaf(rule, state.plan.by_path[path], stored, marks,
                       state.packed.get(path), due)

    if storage.joined is not None:
      params = storage.joined(state.plan, params)
    return trees.map_leaves(visit, params, state.marks,
                            is_leaf=storage.is_leaf)

  def penalty(params, state):
    own = storage_lib.entry_marks(state)
    masks = (jax.tree.map(of, own) for of in (marks_lib.forward_mask,
                                              marks_lib.backward_mask))
    return rule.penalty(params, *masks, state.plan)

  def refresh(seen, state):
    step = state.step + 1
    if rule.remember is not None:
      state = state._replace(extra=rule.remember(seen, state.extra))
    due = window(step)
    if rule.before_update:
      seen = seen._replace(updates=None)
    key = state_lib.step_key(state, step)
    if rule.together:
      return _refresh_together(rule, due, seen, state, step, key)
    return _refresh_each(rule, storage, due, seen, state, step, key)

  def skips(state):
    return jnp.asarray(window(state.step + 1))

  return assemble(
      rule.name, rule.sites.leaves, start, read=read,
      refresh=None if rule.refreshes is None else refresh,
      extra=rule.extra, zeros=rule.zeros, skips=skips if rule.skip_step else
      None, resets=rule.resets, penalty=rule.penalty and penalty,
      work=rule_lib.work_of(rule), moves=storage.exchange is not None,
      place=place, storage=storage, rule=rule,
      read_stored=functools.partial(read, read_leaf=storage.read_stored)
      if rule.zeros and storage.read_stored else None)


def _choose_first(rule, leaves, nows, params):
  if rule.first is not None:
    return {path: rule.first(leaf, nows[path])
            for path, leaf in leaves.items()}
  if rule.together:
    return rule.choose(leaves, nows, Seen(params, None, params))[0]
  return {path: rule.choose(leaf, nows[path]) for path, leaf in leaves.items()}


def _levels(sets):
  forward, backward = sets if isinstance(sets, tuple) else (sets, sets)
  return marks_lib.levels(forward, backward)


def _refresh_each(rule, storage, due, seen, state, step, key):
  """Marks chosen anew where due, leaf by leaf.

  There is one `cond` a leaf, which carries marks alone (and where packed
  blocks belong), so that an ordinary step pays only for passing them on.
  """
  plan, grads = state.plan, trees.leaves_by_path(seen.grads)
  moved, places = {}, dict(state.packed)

  def visit(path, old, param, update, grad):
    leaf = plan.by_path[path]
    growth = grads.get(f'{path}/growth', grads.get(f'growth/{path}'))

    def refresh(param, update, grad, growth, old, place, step, key, extra):
      weight = (param if update is None
                else updates_lib.apply_update(param, update))
      now = storage.now(leaf, step, key, weight=weight, grad=grad,
                        growth=growth, marks=old, place=place, extra=extra)
      new = marks_lib.mark(_levels(rule.choose(leaf, now)), old)
      if storage.exchange is None:
        return new, place, update
      return new, *storage.exchange(rule, leaf, place, old, new, param, update)

    def keep(param, update, grad, growth, old, place, *others):
      del param, grad, growth, others
      return old, place, update

    carried = update if storage.moves_weights(rule, leaf) else None
    place = places.get(path)
    operands = (param, update, grad, growth, old, storage.settled(place))
    marks, place, update = storage.conditional(
        lambda due, operands, others: _cond(due, refresh, keep, operands,
                                            others, carried is not None),
        due, operands, (step, key, _own(state.extra, path)))
    if place is not None:
      places[path] = place
    if carried is not None:
      moved[path] = update
    return marks

  marks = trees.map_leaves(visit, state.marks, seen.params, seen.updates,
                           seen.grads)
  state = state._replace(marks=marks, refreshed=jnp.asarray(due),
                         packed=places)
  if storage.exchange is None:
    return state, None
  return state, trees.map_leaves(lambda path, old: moved.get(path, old),
                                 seen.moves)


def _cond(due, refresh, keep, operands, others, carried):
  """refresh where due, else keep; of the update only what is `carried`."""
  def only(fn):
    def run(*operands):
      marks, place, update = fn(*operands, *others)
      return marks, place, update if carried else None
    return run

  if isinstance(due, bool):
    return only(refresh if due else keep)(*operands)
  return lax.cond(due, only(refresh), only(keep), *operands)


def _own(extra, path):
  return extra.get(path, ()) if isinstance(extra, dict) else extra


def _refresh_together(rule, due, seen, state, step, key):
  """Marks of leaves that must be chosen together: one `cond` for the tree."""
  leaves = state.plan.by_path
  marks = trees.leaves_by_path(state.marks)
  grads = trees.leaves_by_path(seen.grads)

  def refresh():
    weights = trees.leaves_by_path(seen.weights())
    nows = {path: storage_lib.MASKED.now(
        leaf, step, key, weight=weights[path], grad=grads[path],
        marks=marks[path], extra=_own(state.extra, path))
            for path, leaf in leaves.items()}
    chosen, extra = rule.choose(leaves, nows, seen)
    extra = state.extra if extra is None else extra
    return trees.map_leaves(
        lambda path, old: marks_lib.mark(_levels(chosen[path]), old),
        state.marks), extra

  def keep():
    return state.marks, state.extra

  if isinstance(due, bool):
    marks, extra = refresh() if due else keep()
  else:
    marks, extra = lax.cond(due, refresh, keep)
  return state._replace(marks=marks, refreshed=jnp.asarray(due),
                        extra=extra), None


def assemble(name, leaves_of, start, *, read, refresh=None, extra=None,
             zeros=False, penalty=None, skips=None, resets=None,
             parametrize=None, model_of=lambda params: params, work=None,
             moves=False, place=None, storage=storage_lib.MASKED,
             rule=None, grows=True, read_stored=None) -> SparseMethod:
  """Makes a method of its parts, where one rule on groups is not enough.

  Args:
    name: by which the state knows its method.
    leaves_of: model's params -> {path: Leaf} of the sparse ones.
    start: (leaves, params, typed key) -> {path: marks}.
    read: (params, SparseState) -> weights.
    read_stored: the same, of params that are 0 outside A; None for `read`.
    refresh: (Seen, SparseState) -> (SparseState with new marks and extra,
      updates, or None if it leaves them); None for masks that stay.
    moves: whether `refresh` gives updates.
    grows: whether a refresh may let entries enter the backward set.
    extra: {path: Leaf} or params -> the method's own arrays, or None.
    zeros: whether stored weights are 0 outside A, and where they enter it.
    penalty: (params, SparseState) -> float32[], or None for 0.
    skips, resets: SparseState -> bool[], or None.
    parametrize: params -> params, or None for the identity.
    model_of: params -> the model's own tree.
    work, rule: as in SparseMethod.
    place: (leaves, params, marks) -> what the state holds of packed leaves.
    storage: of the sparse leaves.
  """
  # The state of a packed method is not that of the masked one.
  held = name if storage is storage_lib.MASKED else f'{storage.name}({name})'

  def init(params, key=None):
    model, data = model_of(params), state_lib.key_data(key)
    leaves = leaves_of(model)
    plan = state_lib.make_plan(held, model, leaves)
    marks = _first_marks(start, leaves, params, model, data)
    packed = place(leaves, params, trees.leaves_by_path(marks)) if place else {}
    own = () if extra is None else extra(leaves if rule else params)
    if rule is not None and rule.keeps_first:
      own = {path: jnp.array(weight) for path, weight in trees.leaves_by_path(
          params).items() if path in leaves}
    return state_lib.SparseState(jnp.zeros((), jnp.int32), data, marks,
                                 jnp.zeros((), bool), plan, own, packed)

  def check(params, state):
    return state_lib.checked_state(state, held, model_of(params))

  def read_weights(params, state, read=read):
    return read(params, check(params, state))

  def total_penalty(params, state):
    if penalty is None:
      return jnp.float32(0)
    return penalty(params, check(params, state))

  def update(updates, grads, state, params, **extra_args):
    check(params, state)
    again = updates_lib.made_again(updates) if zeros else updates
    seen = Seen(params, again, grads, extra_args, params, updates)
    if not zeros and storage is storage_lib.MASKED:
      stepped = jax.tree.map(updates_lib.apply_update, params, updates)
      seen = seen._replace(params=stepped, updates=None)
    new = state
    if refresh is not None:
      new, moved = _automatic(refresh, moves, seen, state)
      updates = moved if moves else updates
    if zeros:
      updates = updates_lib.zero_outside(
          updates, params, storage_lib.entry_marks(state, new.packed, params),
          storage_lib.entry_marks(new, like=params))
    if rule is not None and rule.grown is not None:
      updates = placing.automatic(functools.partial(_grow, rule), updates,
                                  updates, params, state, new)
    return updates, new._replace(step=state.step + 1)

  def pack(params, state):
    def visit(path, weight):
      if path not in state.packed:
        return weight
      return storage.pack(rule, state.plan.by_path[path], weight,
                          state.packed[path])

    return trees.map_leaves(visit, params)

  return SparseMethod(
      name, parametrize or (lambda params: params), init, read_weights,
      total_penalty, refresh_by(update), update, skips, resets, work,
      pack=None if storage.pack is None else pack, rule=rule,
      grows=grows and refresh is not None, penalises=penalty is not None,
      read_stored=read_stored and functools.partial(read_weights,
                                                    read=read_stored))


def _grow(rule, updates, params, old, new):
  """Updates that give entries their first values where they enter A."""
  key = state_lib.step_key(old, old.step + 1)

  def visit(path, update, weight, was, now):
    if not marks_lib.is_marked(was):
      return update
    leaf = new.plan.by_path[path]
    own = jax.random.fold_in(jax.random.fold_in(key, leaf.index), 1)

    def fill(update, weight):
      active = marks_lib.forward_mask(was)
      value = rule.grown(leaf, weight, active, own, _own(old.extra, path))
      enters = marks_lib.forward_mask(now) & ~active
      return jnp.where(enters, value.astype(update.dtype) - weight, update)

    return lax.cond(new.refreshed, fill, lambda update, _: update, update,
                    weight)

  return trees.map_leaves(visit, updates, params,
                          *map(storage_lib.entry_marks, (old, new)))


def _first_marks(start, leaves, params, model, data):
  """The tree of first marks, each laid like its weight where it can be."""
  def first(params, data):
    chosen = start(leaves, params, jax.random.wrap_key_data(data))
    return trees.map_leaves(lambda path, weight: chosen.get(path), model)

  if not placing.is_explicit(params):
    marks = first(params, data)
    return trees.map_leaves(_laid_like, marks, model)
  like = placing.shapes_of(first, params, data)
  like = trees.map_leaves(_namesake, like, model)
  return placing.automatic(first, like, params, data)


def _laid_like(path, marks, weight):
  """The marks of an entry lie where the entry does."""
  del path
  concrete = isinstance(weight, jax.Array) and not isinstance(
      weight, jax.core.Tracer)
  if not concrete or weight.shape != marks.shape:
    return marks
  if len(weight.sharding.device_set) > 1:
    return jax.device_put(marks, weight.sharding)
  return marks


def _namesake(path, marks, weight):
  del path
  return weight if weight.shape == marks.shape else marks


def _automatic(refresh, moves, seen, state):
  """What `refresh` makes of a state, laid like that state."""
  given = {name: placing.explicit(value, seen.params) if callable(value)
           else value for name, value in seen.extra_args.items()}

  def refreshed(seen, state):
    return refresh(seen._replace(extra_args=given), state)

  like = (state, seen.before if moves else None)
  return placing.automatic(refreshed, like, seen._replace(extra_args={}),
                           state)


def refresh_by(update):
  """A method's `refresh`, from its `update`."""
  def refresh(params, grads, state, **extra_args):
    still = jax.tree.map(lambda p: jnp.full_like(p, -0.), params)
    updates, state = update(still, grads, state_lib.get_state(state), params,
                            **extra_args)
    return jax.tree.map(updates_lib.apply_update, params, updates), state

  return refresh
