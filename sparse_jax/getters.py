"""Methods as Flax parameter getters: variables in, sparse variables out."""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import functools
import operator
import types
from typing import Any

from flax import nnx
from flax import serialization
import jax

from sparse_jax import loop
from sparse_jax import trees
from sparse_jax.blocks import growth as growth_lib
from sparse_jax.blocks import packing
from sparse_jax.rules import packed as packed_lib
from sparse_jax.rules import state as state_lib


def _to_dict(node, names):
  return {name: serialization.to_state_dict(getattr(node, name))
          for name in names if getattr(node, name) is not None}


def _from_dict(node, saved):
  return dataclasses.replace(node, **{name: serialization.from_state_dict(
      getattr(node, name), value) for name, value in saved.items()})


def _place_from_dict(place, saved):
  """A place whose reservoir is in the memory where that of `place` is."""
  made = _from_dict(place, saved)
  if place.reservoir is None:
    return made
  where = getattr(place.reservoir, 'sharding', None) or jax.memory.Space.Host
  return dataclasses.replace(
      made, reservoir=jax.device_put(made.reservoir, where))


# `flax.serialization` asks for what it does not know; a plan is no data.
serialization.register_serialization_state(
    state_lib.Plan, lambda plan: {}, lambda plan, saved: plan, override=True)
serialization.register_serialization_state(
    packing.PackedBlocks,
    lambda packed: _to_dict(packed, ('blocks', 'growth')), _from_dict,
    override=True)
serialization.register_serialization_state(
    packed_lib.Place,
    lambda place: _to_dict(place, [
        field.name for field in dataclasses.fields(place)]),
    _place_from_dict, override=True)


def linen_getter(method: state_lib.SparseMethod, opt_state: Any
                 ) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
  """A function from a linen module's variables to sparse ones.

  Only the collection 'params' is read through the method; the others (batch
  statistics, ...) pass as they are. The module needs no edit.

  Args:
    method: a sparse method.
    opt_state: an Optax state that contains the method's.

  Returns:
    `getter(variables) -> variables`, to be used inside the loss, so that
    gradients follow the method's backward rule.

  Raises:
    ValueError: if the variables have no 'params'.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, optax, sparse_jax
    >>> model, x = nn.Dense(4), jnp.ones((1, 8))
    >>> variables = model.init(jax.random.key(0), x)
    >>> method = sparse_jax.static(sparsity=0.75)
    >>> tx = sparse_jax.sparsify(optax.sgd(0.1), method)
    >>> opt_state = tx.init(variables['params'])
    >>> getter = sparse_jax.linen_getter(method, opt_state)
    >>> int((getter(variables)['params']['kernel'] != 0).sum())
    8
    >>> y = model.apply(getter(variables), x)
  """
  def getter(variables):
    if 'params' not in variables:
      raise ValueError(f'`variables` (with {sorted(variables)}) must have a '
                       'collection \'params\'.')
    weights = method.read(variables['params'], opt_state)
    return {**variables, 'params': weights}

  return getter


def nnx_getter(method: state_lib.SparseMethod, opt_state: Any, **options: Any
               ) -> Callable[[nnx.Module], Callable[..., Any]]:
  """A function from an NNX module to one that computes by the method.

  What it gives is called like the model, and so are its methods, its modules
  (`.encoder(x)`, `.layers[0](x)`) and theirs. It shares everything that is no
  parameter, with the model and with arguments such as `rngs`: batch statistics
  move and dropout draws anew. Sparse operators and packed blocks work through
  it. An attribute that is no module is the model's own, as the optimizer holds
  it.

  Args:
    method: a sparse method.
    opt_state: an Optax state that contains the method's, or the
      `nnx.Optimizer` that holds it.
    **options: those of `with_method`: how packed blocks are multiplied, and
      settings of sparse operators.

  Returns:
    `getter(model) -> callable`, to be used inside the loss and in evaluation.

  Example:
    >>> from flax import nnx
    >>> import jax.numpy as jnp, optax, sparse_jax
    >>> model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    >>> method = sparse_jax.static(sparsity=0.75)
    >>> tx = sparse_jax.sparsify(optax.sgd(0.1), method)
    >>> model, optimizer = sparse_jax.nnx_start(model, tx, method)
    >>> def loss(model):
    ...   sparse = sparse_jax.nnx_getter(method, optimizer)(model)
    ...   return sparse(jnp.ones((1, 8))).sum()
    >>> grads = nnx.grad(loss)(model)
    >>> _ = optimizer.update(model, grads)
    >>> int((model.kernel[...] != 0).sum())
    8
  """
  return lambda model: _Computed(model, method, opt_state, options)


class _Computed:
  """A module's methods, computed with a sparse method's weights."""

  def __init__(self, model, method, opt_state, options, path=()):
    self._parts, self._options = (model, method, opt_state), options
    self._path = path  # From the model to the part of it that this is.

  def __call__(self, *args, **kwargs):
    return self._call('__call__', *args, **kwargs)

  def __getattr__(self, name):
    if name.startswith('_'):
      raise AttributeError(name)
    return self._part(operator.attrgetter(name), name)

  def __getitem__(self, key):
    return self._part(operator.itemgetter(key))

  def _part(self, step, name=''):
    value = step(_follow(self._parts[0], self._path))
    if isinstance(value, nnx.Module):
      return _Computed(*self._parts, self._options, (*self._path, step))
    if isinstance(value, types.MethodType):
      return functools.partial(self._call, name)
    return value

  def _call(self, name, *args, **kwargs):
    model, method, opt_state = self._parts
    given, tree = jax.tree.flatten((args, kwargs), is_leaf=_is_node)
    nodes = [value for value in given if _is_node(value)]
    given = [None if _is_node(value) else value for value in given]
    graph, params, rest = nnx.split((model, nodes), _is_weight, ...)
    params = params.get(0, {})

    def call(weights, rest, given):
      # What `nnx_start` has added beside the model's own stays as it is.
      whole = nnx.State({0: {**params, **weights}})
      module, nodes = nnx.merge(graph, whole, rest)
      others = iter(nodes)
      args, kwargs = jax.tree.unflatten(tree, [
          next(others) if value is None else value for value in given])
      out = getattr(_follow(module, self._path), name)(*args, **kwargs)
      return out, nnx.state((module, nodes), nnx.Not(_is_weight))

    computed = loop.with_method(call, method, opt_state, **self._options)
    before = _arrays_by_path(rest)
    out, rest = computed(params, rest, given)
    nnx.update((model, nodes), _changed(before, rest))
    return out


def _arrays_by_path(state):
  return {path: jax.tree.leaves(variable)
          for path, variable in nnx.to_flat_state(state)}


def _changed(before, state):
  """The variables that hold other arrays than before.

  NNX lets a variable of an outer trace be read, not written, whatever is
  written to it.
  """
  now = _arrays_by_path(state)
  return nnx.from_flat_state([
      (path, variable) for path, variable in nnx.to_flat_state(state)
      if len(now[path]) != len(before.get(path, ())) or any(
          map(operator.is_not, now[path], before[path]))])


def _follow(model, path):
  for step in path:
    model = step(model)
  return model


def _is_node(value) -> bool:
  """Whether NNX keeps state in it: an argument `rngs`, or another module."""
  return isinstance(value, (nnx.Pytree, nnx.Variable))


def _is_weight(path, value) -> bool:
  """Whether it is a parameter of the model, not of what it is called with."""
  return path[0] == 0 and isinstance(value, nnx.Param)


def nnx_start(model: nnx.Module, tx: Any, method: state_lib.SparseMethod
              ) -> tuple[nnx.Module, nnx.Optimizer]:
  """`start` for an NNX module: what its method trains, and its optimizer.

  Thresholds and gates become attributes of the module; of a packed leaf its
  variable holds the blocks. All are `nnx.Param`s like any other.

  Args:
    model: the module, changed in place.
    tx: an Optax transformation that contains `sparsify(optimizer, method)`.
    method: a sparse method.

  Returns:
    The same module, and `nnx.Optimizer(model, tx, wrt=nnx.Param)`.

  Raises:
    ValueError: as `start`.

  Example:
    >>> import optax, sparse_jax
    >>> method = sparse_jax.str_()
    >>> tx = sparse_jax.sparsify(optax.sgd(0.1), method)
    >>> model, optimizer = nnx_start(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), tx,
    ...                              method)
    >>> model.thresholds['kernel'].shape
    (1, 1)
  """
  params = nnx.as_pure(nnx.state(model, nnx.Param))
  held, state = loop.first_params(tx, method, params)
  growth = {}

  def bare(path, leaf):
    if not packing.is_packed(leaf):
      return leaf
    if leaf.growth is not None:
      growth[path] = leaf.growth
    return leaf.blocks

  held = trees.map_leaves(bare, held, is_leaf=packing.is_packed)
  added = {key: value for key, value in held.items() if key not in params}
  if growth:
    added[growth_lib.GROWTH] = growth
  nnx.update(model, nnx.State({key: value for key, value in held.items()
                               if key in params}))
  for key, value in added.items():
    if hasattr(model, key):
      raise ValueError(f'`model` (a {type(model).__name__}) has {key!r}, where '
                       'the method keeps something of its own.')
    setattr(model, key, _as_params(value))
  make = (lambda own, key: state) if state else method.init
  with state_lib.making_states_by(make):
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def _as_params(tree):
  if isinstance(tree, Mapping):
    return nnx.Dict({str(key): _as_params(value)
                     for key, value in tree.items()})
  return nnx.Param(tree)
