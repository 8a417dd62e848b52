"""Several methods in one model."""

from collections.abc import Mapping
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp

from sparse_jax import trees
from sparse_jax.blocks import packing
from sparse_jax.rules import state as state_lib
from sparse_jax.rules.make_method import refresh_by
from sparse_jax.rules.state import SparseMethod, SparseState


def group(methods: Mapping[str, SparseMethod]) -> SparseMethod:
  """Several methods in one model, each on leaves of its own.

  A leaf belongs to the first pattern that is found in its path; leaves of no
  pattern are dense. Each method sees its own leaves alone: its allocation,
  its `is_sparse` and its competitions are among them. There is one
  SparseState.

  Args:
    methods: `{regular expression of paths: method}`, in order. A method may
      be packed. Methods that learn thresholds or gates, make all slots anew or
      skip the optimizer's step work on the whole model, and have no place.

  Returns:
    A SparseMethod.

  Raises:
    ValueError: for a bad pattern, or a method that cannot be grouped; from
      `init`, if a pattern finds no leaf of its own.

  Example:
    >>> import sparse_jax
    >>> method = group({'attention': sparse_jax.static(.5),
    ...                 '.*': sparse_jax.rigl(.75)})
    >>> params = {'attention': jnp.ones((4, 4)), 'mlp': jnp.ones((4, 4))}
    >>> masks = method.init(params).forward_masks
    >>> int(masks['attention'].sum()), int(masks['mlp'].sum())
    (8, 4)
  """
  _check(methods)
  parts = tuple((re.compile(pattern), method)
                for pattern, method in methods.items())
  name = 'group({' + ', '.join(
      f'{pattern!r}: {method.name}' for pattern, method in methods.items()
  ) + '})'

  def split(tree):
    """For each method its own leaves, `{path: leaf}`."""
    table = trees.leaves_by_path(tree, packing.is_packed)
    own = [{} for _ in parts]
    for path, leaf in table.items():
      for (pattern, _), leaves in zip(parts, own):
        if pattern.search(path):
          leaves[path] = leaf
          break
    return own

  def states(state):
    """The state of each method."""
    marks = trees.leaves_by_path(state.marks)
    made = []
    for index, (plan, extra) in enumerate(zip(state.plan.parts, state.extra)):
      own = {path: marks.get(path) for path, _ in plan.shapes}
      refreshed = {leaf.path: state.refreshed[leaf.path]
                   for leaf in plan.leaves}
      if not plan.parts:  # Not a group itself.
        refreshed = next(iter(refreshed.values()), jnp.zeros((), bool))
      packed = {path: place for path, place in state.packed.items()
                if path in plan.by_path}
      made.append(SparseState(state.step, _own_key(state.key, index), own,
                              refreshed, plan, extra, packed))
    return made

  def joined(made, params, plan, step, key):
    """One state of several."""
    marks, refreshed, packed = {}, {}, {}
    for own in made:
      marks |= {path: mark for path, mark in own.marks.items()
                if mark is not None}
      refreshed |= {leaf.path: own.refreshed_at(leaf.path)
                    for leaf in own.plan.leaves}
      packed |= own.packed
    tree = trees.map_leaves(lambda path, leaf: marks.get(path), params)
    return SparseState(step, key, tree, refreshed, plan,
                       tuple(own.extra for own in made), packed)

  def parametrize(params):
    found = {}
    for (_, method), own in zip(parts, split(params)):
      found |= trees.leaves_by_path(method.parametrize(own)) if own else {}
    return trees.map_leaves(lambda path, leaf: found.get(path, leaf), params)

  def init(params, key=None):
    made, data = [], state_lib.key_data(key)
    for index, ((pattern, method), own) in enumerate(zip(parts,
                                                         split(params))):
      if not own:
        raise ValueError(f'`methods` has a pattern {pattern.pattern!r} that '
                         'no leaf is left for, of '
                         f'{sorted(trees.leaves_by_path(params))}.')
      made.append(method.init(own, _own_key(data, index)))
    plan = state_lib.make_plan(
        name, params, {leaf.path: leaf for own in made
                       for leaf in own.plan.leaves},
        tuple(own.plan for own in made))
    return joined(made, params, plan, made[0].step, data)

  def check(params, state):
    return state_lib.checked_state(state, name, params)

  def each(fn, params, state):
    """{path: leaf} of fn(method, its leaves, its state)."""
    found = {}
    for (_, method), own, held in zip(parts, split(params), states(state)):
      found |= trees.leaves_by_path(fn(method, own, held), packing.is_packed)
    return found

  def read(params, state, way=lambda method: method.read):
    found = each(lambda method, own, held: way(method)(own, held), params,
                 check(params, state))
    return trees.map_leaves(lambda path, leaf: found.get(path, leaf), params,
                            is_leaf=packing.is_packed)

  def pack(params, state):
    def stored(method, own, held):
      return own if method.pack is None else method.pack(own, held)

    found = each(stored, params, state)
    return trees.map_leaves(lambda path, leaf: found.get(path, leaf), params)

  def penalty(params, state):
    held = states(check(params, state))
    return sum((method.penalty(own, state) for (_, method), own, state in zip(
        parts, split(params), held)), jnp.float32(0))

  def update(updates, grads, state, params, **extra_args):
    check(params, state)
    moved, made = {}, []
    for (_, method), state_, *own in zip(
        parts, states(state), *map(split, (params, updates, grads))):
      mine, moves, slopes = own
      moves, new = method.update(moves, slopes, state_, mine, **extra_args)
      moved |= trees.leaves_by_path(moves, packing.is_packed)
      made.append(new)
    new = joined(made, state.marks, state.plan, state.step + 1, state.key)
    return trees.map_leaves(lambda path, leaf: moved.get(path, leaf), updates,
                            is_leaf=packing.is_packed), new

  def work(params, steps):
    found = {}
    for (_, method), own in zip(parts, split(params)):
      found |= method.work(own, steps)
    return found

  def operators(params, state):
    held, found = states(check(params, state)), {}
    for (_, method), own, state in zip(parts, split(params), held):
      found |= method.operators(own, state) if method.operators else {}
    return found

  every = list(methods.values())
  return SparseMethod(
      name, parametrize, init, read, penalty, refresh_by(update),
      update, work=work if all(method.work for method in every) else None,
      operators=operators if any(m.operators for m in every) else None,
      pack=pack if any(method.pack for method in every) else None,
      grows=any(method.grows for method in every),
      penalises=any(method.penalises for method in every),
      read_stored=functools.partial(
          read, way=lambda method: method.read_stored or method.read))


def _own_key(data: jax.Array, index: int) -> jax.Array:
  """Raw data of the key of one method: leaves of two are not drawn alike."""
  key = jax.random.fold_in(jax.random.wrap_key_data(data), index)
  return jax.random.key_data(key)


def _check(methods: Any) -> None:
  if not isinstance(methods, Mapping) or not methods:
    raise ValueError(f'`methods` (={methods!r}) must be a mapping of regular '
                     'expressions to methods, and not empty.')
  for pattern, method in methods.items():
    try:
      re.compile(pattern)
    except (TypeError, re.error) as error:
      raise ValueError(f'`methods` has {pattern!r}, which is no regular '
                       f'expression: {error}.') from None
    if not isinstance(method, SparseMethod):
      raise ValueError(f'`methods` has {method!r} at {pattern!r}, which must '
                       'be a SparseMethod.')
    probe = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    learns = len(jax.eval_shape(method.parametrize, {'kernel': probe})) > 1
    if learns or method.skips or method.resets:
      raise ValueError(f'`methods` has {method.name!r} at {pattern!r}, which '
                       'works on the whole model: it learns thresholds, skips '
                       'steps or makes all slots anew.')
