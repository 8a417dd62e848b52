"""What a loop calls: `start` once, `with_method` wherever it computes."""

from collections.abc import Callable
from collections.abc import Mapping
import functools
import inspect
from typing import Any

import jax
from jax import sharding
import numpy as np

from sparse_jax import checks
from sparse_jax import trees
from sparse_jax.blocks import packing
from sparse_jax.jaxprs import holding
from sparse_jax.jaxprs import replacing
from sparse_jax.jaxprs import views
from sparse_jax.operators import injection
from sparse_jax.rules import state as state_lib


def start(tx: Any, method: state_lib.SparseMethod, params: trees.PyTree
          ) -> tuple[trees.PyTree, Any]:
  """The parameters as the method holds them, and the optimizer's first state.

  Stands where `tx.init(params)` stood, for every method and storage: adds
  thresholds or gates, packs blocks, makes the first masks and the slots. It
  works under `jax.jit` and `jax.eval_shape`.

  Args:
    tx: an Optax transformation that contains `sparsify(optimizer, method)`,
      in any wrapper.
    method: the method.
    params: the model's parameters, dense. For packed methods they may be NumPy
      arrays: only the blocks that are kept then go to the device.

  Returns:
    `(params, opt_state)`.

  Raises:
    ValueError: if a leaf does not fit the method, or a packed method is not in
      `tx`. (Of a masked one that `tx` lacks, `with_method` says so.)

  Example:
    >>> import jax.numpy as jnp, optax, sparse_jax
    >>> method = sparse_jax.top_kast(.75, backward_sparsity=.5)
    >>> tx = sparse_jax.sparsify(optax.adam(1e-3), method)
    >>> params, opt_state = start(tx, method, {'kernel': jnp.ones((4, 4))})
    >>> int(sparse_jax.get_state(opt_state).forward_masks['kernel'].sum())
    4
  """
  if not isinstance(method, state_lib.SparseMethod):
    raise ValueError(f'`method` (={method!r}) must be a SparseMethod, such as '
                     'sparse_jax.top_kast(...).')
  params, state = first_params(tx, method, params)
  if state is None:
    opt_state = tx.init(params)
    if not method.stateless:
      _check_held(opt_state, method)
    return params, opt_state
  with state_lib.making_states_by(lambda own, key: state):
    return _together(params, tx.init(params), state)


def _check_held(opt_state, method) -> None:
  """Raises ValueError if the state is none, or that of another method."""
  held = state_lib.get_state(opt_state).plan.method
  if held != method.name:
    raise ValueError(f'`tx` contains sparsify(optimizer, method) with {held!r},'
                     f' and `method` is {method.name!r}.')


def first_params(tx: Any, method: state_lib.SparseMethod,
                 params: trees.PyTree
                 ) -> tuple[trees.PyTree, state_lib.SparseState | None]:
  """The parameters as the method holds them, and of a packed one its state.

  The state of any other method is what `tx.init(params)` makes.
  """
  params = method.parametrize(params)
  if method.pack is None:
    return params, None
  seen = []

  def note(own, key):
    seen.append((set(trees.leaves_by_path(own)), key))
    return method.init(own, key)

  with state_lib.making_states_by(note):
    # A function of its own: of one that was traced before JAX keeps the result.
    jax.eval_shape(lambda params: tx.init(params), params)
  if len(seen) != 1:
    raise ValueError(f'`tx` (={tx!r}) must contain sparsify(optimizer, method) '
                     f'once, and does {len(seen)} times.')
  (paths, key), = seen
  own = trees.map_leaves(lambda path, leaf: leaf if path in paths else None,
                         params)
  state = method.init(own, key)
  return method.pack(params, state), state


def _together(params, opt_state, state):
  """All where the reservoir is committed: its device, or its whole mesh."""
  held = [place.reservoir for place in state.packed.values()
          if place.reservoir is not None]
  if not held or isinstance(held[0], jax.core.Tracer):
    return params, opt_state
  where = held[0].sharding
  whole = (sharding.NamedSharding(where.mesh, sharding.PartitionSpec())
           if isinstance(where, sharding.NamedSharding)
           else where.with_memory_kind('device'))

  def commit(leaf):
    free = isinstance(leaf, jax.Array) and not leaf.committed
    return jax.device_put(leaf, whole) if free else leaf

  return jax.tree.map(commit, (params, opt_state))


def with_method(fn: Callable[..., Any], method: state_lib.SparseMethod,
                opt_state: Any, *, implementation: str | None = None,
                column_axes: tuple[str, ...] = (),
                weights_first: bool = False,
                trust_zeros: bool = False,
                **operators: Any) -> Callable[..., Any]:
  """The function as the method computes it, for training and evaluation.

  It reads the weights, puts the method's operators (SWAT) into its products,
  and multiplies by packed blocks; which product uses which weight is found in
  the function's jaxpr, so that the model needs no edit. A packed
  weight that something else than a product uses (an embedding's look-up), or a
  product that blocks do not fit, is assembled for that use. For `dense()` the
  result is `fn` itself.

  Args:
    fn: a function whose first argument is the parameter tree, or a mapping
      that holds it under 'params': `model.apply`, say. It may have any other
      arguments.
    method: the method.
    opt_state: an Optax state that contains the method's.
    implementation: of the products by blocks, as of `blocks.matmul`. On
      several devices each does its own rows, in a `shard_map` made for it.
    column_axes: axes of an automatic mesh over which balanced blocks are split
      by columns, as of `blocks.matmul`.
    weights_first: whether gradients to packed weights come before the one to
      their input, as of `blocks.matmul`: less memory under FSDP. This and the
      two before it are for methods that pack some leaf; `dense()` takes them
      too, for one loop.
    trust_zeros: whether the parameters are known to be 0 wherever the method
      stores zeros, so that the forward pass need not read the masks of
      `static`, `set_`, `rigl` and the like. It is a promise that nothing
      checks: `sparsify` leaves them so with its first update (of
      `optax.MultiSteps` the first whole one), if nothing after it scales
      updates; first parameters and averages are not so. Where a method keeps
      weights behind its masks (`top_kast`, `gmp`), or packs them, it changes
      nothing.
    **operators: `thresholds`, `due`, `activation_scope`, `gradient_scope` and
      `pack`, as of `operators.with_operators`.

  Returns:
    A function of the same arguments, by position or by name.

  Raises:
    ValueError: if `trust_zeros` is no bool, or if an option of packed blocks is
      given for a method that packs none; from the result: for parameters
      that the state was not made for; for a product that sums over other axes
      of a leaf than its structure follows.

  Example:
    >>> import flax.linen as nn, jax.numpy as jnp, optax, sparse_jax
    >>> model, x = nn.Dense(4), jnp.ones((1, 8))
    >>> params = model.init(jax.random.key(0), x)['params']
    >>> method = sparse_jax.static(.75)
    >>> tx = sparse_jax.sparsify(optax.sgd(.1), method)
    >>> params, opt_state = sparse_jax.start(tx, method, params)
    >>> def loss_fn(params, opt_state):
    ...   apply = sparse_jax.with_method(model.apply, method, opt_state)
    ...   return apply({'params': params}, x).sum()
    >>> grads = jax.grad(loss_fn)(params, opt_state)
    >>> int((grads['kernel'] != 0).sum())
    8
  """
  if not isinstance(method, state_lib.SparseMethod):
    raise ValueError(f'`method` (={method!r}) must be a SparseMethod, such as '
                     'sparse_jax.top_kast(...).')
  checks.check_bool('trust_zeros', trust_zeros)
  injection.check_options(method, operators)
  _check_packs(method, implementation=implementation, column_axes=column_axes,
               weights_first=weights_first)
  read = trust_zeros and method.read_stored or method.read
  if method.stateless and method.operators is None:
    return fn

  @functools.wraps(fn, updated=())
  def sparse(*args, **kwargs):
    (variables, *args), kwargs = _first_of(fn, args, kwargs)
    params, rebuild = _params_of(variables, method, opt_state)
    weights = read(params, opt_state)
    plan = state_lib.get_state(opt_state).plan
    looked_into = (method.operators is not None or any(
        leaf.guessed for leaf in plan.leaves) or any(
            map(packing.is_packed, jax.tree.leaves(
                weights, is_leaf=packing.is_packed))))
    if not looked_into:
      return fn(rebuild(weights), *args, **kwargs)
    arrays, fill = _arrays_of(args)
    weights, whole = _arrays_in(weights)

    def computed(weights, *arrays):
      return fn(rebuild(whole(weights)), *fill(arrays), **kwargs)

    held = _held(weights, plan, implementation=implementation,
                 column_axes=column_axes, weights_first=weights_first)
    _check_axes(computed, held, arrays, plan)
    rule, paths = injection.rule_of(method, params, opt_state, computed, held,
                                    *arrays, **operators)
    return replacing.interpret(computed, (held, *arrays), 0, rule, paths)

  return sparse


def _check_packs(method, **options) -> None:
  """Raises ValueError for an option of packed blocks where there are none.

  One loop may give them to dense(), which is nobody's packed run.
  """
  if method.pack is not None or method.stateless:
    return
  for name, value in options.items():
    if value not in (None, False, (), []):
      raise ValueError(f'`{name}` (={value!r}) is of packed blocks, and '
                       f'`method` (={method.name}) packs none: use '
                       'packed(method), or leave it out.')


def _first_of(fn, args, kwargs):
  """The arguments of fn with the first by position, where it came by name."""
  if args:
    return args, kwargs
  first = next(iter(inspect.signature(fn).parameters), None)
  if first not in kwargs:
    raise TypeError('A function of with_method() must be called with the '
                    f'parameters, its first argument ({first!r}).')
  return (kwargs[first],), {name: value for name, value in kwargs.items()
                            if name != first}


def _params_of(variables, method, opt_state):
  """The parameters in `variables`, and what puts others in their place."""
  plan = state_lib.get_state(opt_state).plan
  own = trees.leaves_by_path(variables, packing.is_packed)
  if isinstance(variables, Mapping) and 'params' in variables and not all(
      path in own for path, _ in plan.shapes):
    return variables['params'], lambda weights: {**variables,
                                                 'params': weights}
  return variables, lambda weights: weights


def _is_array(leaf) -> bool:
  return isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct))


def _arrays_in(weights):
  """The weights without leaves that are no arrays, and what puts them back.

  A model that is a tree itself (Equinox) has functions and flags in it.
  """
  def is_array(leaf):
    return packing.is_packed(leaf) or _is_array(leaf)

  def whole(arrays):
    return jax.tree.map(lambda own, array: array if is_array(own) else own,
                        weights, arrays, is_leaf=packing.is_packed)

  return jax.tree.map(lambda leaf: leaf if is_array(leaf) else None, weights,
                      is_leaf=packing.is_packed), whole


def _arrays_of(args):
  """The arrays among arguments, and what fills them in again."""
  leaves, tree = jax.tree.flatten(args)
  is_array = [_is_array(leaf) for leaf in leaves]

  def fill(arrays):
    rest = iter(arrays)
    return jax.tree.unflatten(tree, [next(rest) if array else leaf for
                                     leaf, array in zip(leaves, is_array)])

  return [leaf for leaf, array in zip(leaves, is_array) if array], fill


def _held(weights, plan, **options):
  """The weights, packed ones as what the interpreter carries."""
  def visit(path, weight):
    if not packing.is_packed(weight):
      return weight
    return holding.hold(path, weight, plan.by_path[path].layout, **options)

  return trees.map_leaves(visit, weights, is_leaf=packing.is_packed)


def _check_axes(fn, weights, arrays, plan) -> None:
  """Raises ValueError where a product sums over other axes than guessed."""
  if not any(leaf.guessed for leaf in plan.leaves):
    return
  shown = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype) if holding.is_held(leaf) else leaf, weights,
                       is_leaf=holding.is_held)
  for use in views.find_uses(fn, shown, *arrays):
    leaf = plan.by_path.get(use.path)
    if leaf is None or not leaf.guessed:
      continue
    if use.contracting != tuple(sorted(leaf.layout.rows)):
      raise ValueError(
          f'{use.path!r} of shape {leaf.layout.shape} is summed over its axes '
          f'{use.contracting}, but its structure or allocation follows '
          f'{leaf.layout.rows}, a guess by its name: pass contracting='
          f'{{{use.path!r}: {use.contracting}}} to the method, as '
          'contracting_axes(fn, params, *inputs) finds them.')
