"""Masks of blocks read as packed weights: any loop, less time.

The optimizer keeps the dense weight, its masks and slots, as in every simulated
run; the forward and backward passes see only the blocks that are kept. For runs
that must not hold the dense weight either, see `packed_training`.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from sparse_jax import trees
from sparse_jax.masks import masking
from sparse_jax.blocks import packing as packed_lib
from sparse_jax.rules import sites as sites_lib
from sparse_jax.rules import state as state_lib
from sparse_jax.masks import structures
from sparse_jax.blocks.packing import PackedBlocks

SparseMethod = state_lib.SparseMethod


def called_kernel(path: trees.Path) -> bool:
  """Whether a leaf is called 'kernel', as those of Dense and Conv are."""
  return path.rpartition('/')[2] == 'kernel'


def read_packed(method: SparseMethod, params: trees.PyTree, state: Any, *,
                is_packed: Callable[[trees.Path], bool] = called_kernel
                ) -> trees.PyTree:
  """What `method.read` gives, its sparse kernels as PackedBlocks.

  To be used in the loss in place of `method.read(params, state)`, by a model
  whose products are `packed_matmul` and `packed_conv`: under
  `flax.linen.intercept_methods(packed_interceptor)`, say. A step still holds
  the dense weight and its gradient; its products are those of the blocks.

  Law: the loss and its gradient with respect to `params` are those of
  `method.read`, to float rounding.

  Args:
    method: one with `structure=Block(...)` whose masks always have the same
      number of blocks: `static`, `set_`, `rigl`, `itop`, `dnw`, `top_kast`
      (without `stop_exploration_at`). Where the rule asks for a dense gradient
      (`rigl`, `itop` that grows by it, `dnw`), the gradient of the weights is
      made for all blocks.
    params, state: as of `method.read`.
    is_packed: which leaves to pack, by path; by default the kernels, which are
      what `packed_interceptor` knows.

  Returns:
    The tree, each sparse leaf of these a PackedBlocks of its matrix view, the
    others as `method.read` gives them.

  Raises:
    ValueError: if the method's masks are not made of blocks, change their
      count, stack layers in one leaf, or have operators of their own.

  Example:
    >>> import jax, sparse_jax
    >>> method = sparse_jax.static(.5, structure=sparse_jax.Block((2, 2)))
    >>> params = {'kernel': jnp.ones((4, 4))}
    >>> state = method.init(params)
    >>> read_packed(method, params, state)['kernel'].blocks.shape
    (2, 2, 2)

  Reference:
    Jayakumar et al., Top-KAST, 2020, authors' response: blocks, as hardware
    can use them.
  """
  check_packable(method)
  kept = {path: own for path, own in method.kept(params).items()
          if is_packed(path)}
  for path, own in kept.items():
    _check_layout(path, own.leaf.layout)

  def read(path, weight, marks, masked):
    return _packed_leaf(kept[path], weight, marks) if path in kept else masked

  return trees.map_leaves(read, params, state_lib.get_state(state).marks,
                          method.read(params, state))


def check_packable(method: SparseMethod) -> None:
  """Raises ValueError unless `read_packed` can do with the method."""
  if method.kept is None or method.operators is not None:
    raise ValueError(
        f'`method` (={method!r}) must have masks of a constant count and no '
        'operators of its own: static, set_, rigl, itop, dnw or top_kast.')


def _check_layout(path, layout) -> None:
  if not isinstance(layout.structure, structures.Block) or layout.stacked:
    raise ValueError(f'`method` must have structure=Block(...) and no '
                     f'batch_axes to be read packed; {path!r} has '
                     f'{layout.structure} and the batch axes '
                     f'{layout.stacked}.')


def _packed_leaf(kept: sites_lib.Kept, weight, marks) -> PackedBlocks:
  layout = kept.leaf.layout
  block = layout.structure.shape
  tiles, levels = (
      packed_lib.tile(jnp.transpose(x, layout.order).reshape(
          layout.view_shape), block) for x in (weight, marks))
  levels = levels[:, 0, 0]  # All of a tile have one.
  outer = masking.backward_mask(levels) | (kept.backward == levels.size)
  return packed_lib.of_tiles(
      tiles, masking.forward_mask(levels), outer, kept.forward, kept.backward,
      shape=layout.view_shape, block=block, reduce=layout.structure.reduce)
