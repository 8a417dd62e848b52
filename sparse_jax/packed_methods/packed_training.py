"""Sparse training of packed weights: blocks come and go, shapes stay.

Random choices and counts are those of the simulated methods of the same name,
so that both make the same run.
"""

from collections.abc import Callable
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.masks import allocations as allocation_lib
from sparse_jax.rules import assembly
from sparse_jax import checks
from sparse_jax import trees
from sparse_jax.blocks import packing as packed_lib
from sparse_jax.packed_methods import packed_params
from sparse_jax.packed_methods import packed_rewiring
from sparse_jax.masks import selection
from sparse_jax.rules import sites as sites_lib
from sparse_jax.packed_methods.packed_params import PackedState

_UNIFORM = allocation_lib.uniform


class PackedMethod(NamedTuple):
  """A sparse-training method on packed weights.

  `params` are trees whose sparse leaves are PackedBlocks, `slots` the state
  of an Optax optimizer of `partition_packed(params)[0]`.
  """

  # (dense params, key) -> (params, PackedState). Cuts on the host.
  pack: Callable[..., tuple[trees.PyTree, PackedState]]
  # (params, PackedState) -> float32[], to be added to the loss.
  penalty: Callable[[trees.PyTree, PackedState], jax.Array]
  # PackedState -> whether the coming refresh wants scores of the gradient.
  grows: Callable[[PackedState], bool]
  # (params, slots, PackedState, init, growth) -> (params, slots, PackedState)
  # after an update; `init` is the optimizer's, `growth` {path: scores}.
  refresh: Callable[..., tuple[trees.PyTree, Any, PackedState]]


def packed_static(sparsity: float, *, block: tuple[int, int],
                  reduce: str = 'sum', pad: bool = False, allocation=_UNIFORM,
                  is_sparse: selection.IsSparse = None,
                  contracting: selection.Axes | None = None) -> PackedMethod:
  """A random set of blocks, packed, that never changes.

  Law: it makes the run of `static` with Block(block).

  Args:
    sparsity: fraction of blocks that do not exist, in [0, 1).
    block: (rows, columns) of a block.
    reduce: 'sum' or 'max' of the magnitudes in a block is its score.
    pad: whether blocks may hang over the edges of a weight.
    allocation, is_sparse, contracting: as in `static`.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> method = packed_static(0.5, block=(2, 2))
    >>> params, state = method.pack({'kernel': jnp.ones((4, 4))})
    >>> params['kernel'].blocks.shape
    (2, 2, 2)

  Reference:
    Evci et al., RigL, 2020, https://arxiv.org/abs/1911.11134, the row
    "Static".
  """
  cutting = packed_params.make_cutting(sparsity, allocation, block, reduce,
                                       pad, is_sparse, contracting)
  return PackedMethod(
      functools.partial(packed_params.pack_random, cutting), _no_penalty,
      lambda state: False, _only_count)


def packed_set(sparsity: float, *, block: tuple[int, int],
               drop_fraction: float = 0.3, reduce: str = 'sum',
               pad: bool = False, allocation=_UNIFORM,
               is_sparse: selection.IsSparse = None,
               contracting: selection.Axes | None = None,
               update_every: int = 100, update_begin: int = 0,
               update_end: int | None = None) -> PackedMethod:
  """SET on packed weights: small blocks leave, random ones enter at 0.

  Law: it makes the run of `set_` with Block(block), slots included.

  Args:
    sparsity, block, reduce, pad, allocation, is_sparse, contracting: as in
      `packed_static`.
    drop_fraction, update_every, update_begin, update_end: as in `set_`.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> method = packed_set(0.9, block=(16, 16), update_every=50)

  Reference:
    Mocanu et al., SET, 2018, https://arxiv.org/abs/1707.04780, as in `set_`.
  """
  cutting = packed_params.make_cutting(sparsity, allocation, block, reduce,
                                       pad, is_sparse, contracting)
  window = assembly.refresh_window(update_every, update_begin, update_end)
  return _rewiring(cutting, window, drop_fraction, update_end, False)


def packed_rigl(sparsity: float, *, block: tuple[int, int],
                drop_fraction: float = 0.3, reduce: str = 'sum',
                pad: bool = False, allocation=_UNIFORM,
                is_sparse: selection.IsSparse = None,
                contracting: selection.Axes | None = None,
                update_every: int = 100, update_begin: int = 0,
                update_end: int | None = None) -> PackedMethod:
  """RigL on packed weights: blocks enter where the dense gradient is large.

  At a step that refreshes, and only then, the backward pass also makes the
  score of every block of the dense gradient, a block at a time; the gradient
  itself never exists.

  Law: it makes the run of `rigl` with Block(block), slots included, for a
  weight that the model uses once.

  Args:
    sparsity, block, reduce, pad, allocation, is_sparse, contracting: as in
      `packed_static`.
    drop_fraction, update_every, update_begin, update_end: as in `rigl`.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> method = packed_rigl(0.9, block=(16, 16), update_end=750)

  Reference:
    Evci et al., RigL, 2020, https://arxiv.org/abs/1911.11134, as in `rigl`.
    A weight used several times is scored by the sum over its uses of the
    magnitudes, where the paper takes the magnitude of the sum.
  """
  cutting = packed_params.make_cutting(sparsity, allocation, block, reduce,
                                       pad, is_sparse, contracting)
  window = assembly.refresh_window(update_every, update_begin, update_end)
  return _rewiring(cutting, window, drop_fraction, update_end, True)


def packed_top_kast(sparsity: float, *, block: tuple[int, int],
                    backward_sparsity: float, penalty_weight: float = 1e-4,
                    backward_selection: str = 'magnitude',
                    reduce: str = 'sum', pad: bool = False,
                    allocation=_UNIFORM, is_sparse: selection.IsSparse = None,
                    contracting: selection.Axes | None = None,
                    update_every: int = 100, update_begin: int = 0,
                    update_end: int | None = None) -> PackedMethod:
  """Top-KAST on packed weights: the device holds B, the host the rest.

  The reservoir C lies in the host's memory, where it cannot move; the blocks
  that overtake others are exchanged at refreshes, and nothing is between.

  Law: it makes the run of `top_kast` with Block(block), slots included.

  Args:
    sparsity, block, reduce, pad, allocation, is_sparse, contracting: as in
      `packed_static`; the sparsity is that of A.
    backward_sparsity, penalty_weight, backward_selection, update_every,
      update_begin, update_end: as in `top_kast`.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> method = packed_top_kast(0.9, backward_sparsity=0.8, block=(16, 16))

  Reference:
    Jayakumar et al., Top-KAST, 2020, https://arxiv.org/abs/2106.03517,
    sections 2 and 5: the device need never hold the dense parameters.
  """
  cutting = packed_params.make_cutting(sparsity, allocation, block, reduce,
                                       pad, is_sparse, contracting)
  assembly.check_backward(sparsity, backward_sparsity, backward_selection)
  checks.check_non_negative('penalty_weight', penalty_weight)
  window = assembly.refresh_window(update_every, update_begin, update_end)
  wider = cutting._replace(sites=cutting.sites.at(backward_sparsity))
  random = backward_selection == 'random'

  pack = functools.partial(packed_params.pack_largest, cutting, wider, random)

  def penalty(params, state):
    return _exploration(params, state.sparsities, penalty_weight)

  def refresh(params, slots, state, *, init, growth=None):
    del growth
    state = state._replace(step=state.step + 1)
    if not window(state.step):
      return params, slots, state
    return packed_rewiring.exchange(params, slots, state, init, random)

  return PackedMethod(pack, penalty if penalty_weight else _no_penalty,
                      lambda state: False, refresh)


def packed_step(loss_fn: Callable[..., jax.Array], optimizer: Any, *,
                method: PackedMethod) -> Callable[..., Any]:
  """One training step of packed weights, its refresh included.

  Args:
    loss_fn: (params, *batch) -> float[], where the sparse leaves of `params`
      are PackedBlocks, for `packed_matmul` and `packed_conv`.
    optimizer: an Optax optimizer, unchanged.
    method: a method on packed weights.

  Raises:
    ValueError: if `method` is none; by the step, if slots or state are not
      those of the weights.

  Returns:
    `step(params, slots, state, *batch) -> (params, slots, state, loss)` for
    the host: device work inside it is compiled once. `slots` start as
    `optimizer.init(partition_packed(params)[0])`. Params and slots are given
    up to it.

  Example:
    >>> import optax
    >>> from sparse_jax.blocks import products as packed_products
    >>> method, tx = packed_set(0.5, block=(2, 2)), optax.sgd(0.1)
    >>> params, state = method.pack({'kernel': jnp.ones((4, 4))})
    >>> loss = lambda p, x: packed_products.packed_matmul(x, p['kernel']).sum()
    >>> step = packed_step(loss, tx, method=method)
    >>> slots = tx.init(packed_lib.partition_packed(params)[0])
    >>> params, slots, state, value = step(params, slots, state, jnp.ones(4))
    >>> float(value), state.step
    (8.0, 1)
  """
  if not isinstance(method, PackedMethod):
    raise ValueError(f'`method` (={method!r}) must be a PackedMethod, such as '
                     'sparse_jax.packed_top_kast(...).')

  update = jax.jit(functools.partial(_update, loss_fn, optimizer, method),
                   static_argnums=3, donate_argnums=(0, 2))

  def step(params, slots, state, *batch):
    weights, indices = packed_lib.partition_packed(params)
    if method.grows(state):
      weights = packed_lib.ask_growth(weights)
    weights, slots, growth, loss = update(
        weights, indices, slots, tuple(state.sparsities.items()), *batch)
    params = packed_lib.combine_packed(weights, indices)
    params, slots, state = method.refresh(
        params, slots, state, init=optimizer.init, growth=growth)
    return params, slots, state, loss

  return step


def _rewiring(cutting, window, drop_fraction, end, by_gradient):
  drop = assembly.drop_schedule(drop_fraction, end)

  @functools.lru_cache(maxsize=16)
  def jitted(init, sparsities):
    def run(params, slots, growth, key, step):
      key = jax.random.fold_in(jax.random.wrap_key_data(key), step)
      return packed_rewiring.rewire(
          params, slots, growth, key, fraction=drop(step),
          sparsities=dict(sparsities), init=init)

    return jax.jit(run, donate_argnums=(0, 1))

  def refresh(params, slots, state, *, init, growth=None):
    state = state._replace(step=state.step + 1)
    if not window(state.step):
      return params, slots, state
    if by_gradient and not growth:
      raise ValueError('`growth` (=None) must hold the scores of the dense '
                       'gradient at a step that refreshes.')
    run = jitted(init, tuple(state.sparsities.items()))
    params, slots = run(params, slots, growth if by_gradient else {},
                        state.key, np.int32(state.step))
    return params, slots, state

  def grows(state):
    return by_gradient and bool(window(state.step + 1))

  return PackedMethod(
      functools.partial(packed_params.pack_random, cutting), _no_penalty,
      grows, refresh)


def _update(loss_fn, optimizer, method, weights, indices, slots, sparsities,
            *batch):
  """What the device does in a step: weights, slots, growth scores, loss."""
  _check_run(weights, slots, sparsities, optimizer.init)
  state = PackedState(0, (), dict(sparsities), {}, {})

  def total(weights):
    params = packed_lib.combine_packed(weights, indices)
    return loss_fn(params, *batch) + method.penalty(params, state)

  loss, grads = jax.value_and_grad(total)(weights)
  grads, growth = packed_params.split_growth(grads)
  weights = packed_params.without_growth(weights)
  updates, slots = optimizer.update(grads, slots, weights)
  weights = jax.tree.map(sites_lib.apply_update, weights, updates)
  return weights, slots, growth, loss


def _check_run(weights, slots, sparsities, init):
  """Raises ValueError unless slots and state belong to the weights."""
  weights = packed_params.without_growth(weights)
  packed_rewiring.check_slots(slots, jax.eval_shape(init, weights))
  own = set(packed_params.packed_leaves(weights))
  if own != set(dict(sparsities)):
    raise ValueError(f'`state` (for {sorted(dict(sparsities))}) must be that '
                     f'of the packed leaves of `params`, {sorted(own)}.')


def _exploration(params, sparsities, penalty_weight):
  """Top-KAST's exploration loss on packed leaves."""
  loss = jnp.float32(0)
  for path, leaf in packed_params.packed_leaves(params).items():
    squares = jnp.sum(jnp.square(leaf.blocks.astype(jnp.float32)), (1, 2))
    factor = jnp.float32(1)
    if leaf.forward is not None:
      spare = jnp.float32(1 / (1 - sparsities[path]))
      factor = jnp.full(squares.shape, spare).at[leaf.forward].set(1)
    loss += jnp.sum(squares * factor) / 2
  return penalty_weight * loss


def _no_penalty(params, state):
  del params, state
  return jnp.float32(0)


def _only_count(params, slots, state, *, init, growth=None):
  del init, growth
  return params, slots, state._replace(step=state.step + 1)
