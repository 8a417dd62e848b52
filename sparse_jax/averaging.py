"""An average of the parameters (EMA, Polyak) of a network whose masks move."""

from typing import Any

import jax
import jax.numpy as jnp

from sparse_jax import checks
from sparse_jax import trees
from sparse_jax.masks import marks as marks_lib
from sparse_jax.rules import state as state_lib
from sparse_jax.rules import storage


def average_params(average: trees.PyTree, params: trees.PyTree, opt_state: Any,
                   *, step_size: float | jax.Array) -> trees.PyTree:
  """`optax.incremental_update` of parameters that a refresh may replace.

  To be called after each update, with the state that it gave. An entry that
  has just entered the backward set starts from its parameter: before it was
  another weight (packed: another block's), or one that the network had
  dropped. Evaluate the result in place of the parameters, through
  `with_method`.

  Laws: without masks it is `optax.incremental_update`; the average of a packed
  run is that of the masked run with the same blocks.

  Args:
    average: a tree like `params`; at the start `params` itself.
    params: as the optimizer holds them, after the update.
    opt_state: an Optax state that contains the method's, after the update.
    step_size: the share of the new parameters, in [0, 1]: a number, or float[]
      that may be traced, of an average that warms up.

  Returns:
    The new average, a tree like `params`.

  Raises:
    ValueError: if `step_size` is out of range; a traced one is not looked at.

  Example:
    >>> import optax, sparse_jax
    >>> method = sparse_jax.static(.5)
    >>> tx = sparse_jax.sparsify(optax.sgd(1.), method)
    >>> params = {'kernel': jnp.full((2, 2), 4.)}
    >>> params, opt_state = sparse_jax.start(tx, method, params)
    >>> average = params
    >>> grads = {'kernel': jnp.ones((2, 2))}
    >>> updates, opt_state = tx.update(grads, opt_state, params)
    >>> params = optax.apply_updates(params, updates)
    >>> average = average_params(average, params, opt_state, step_size=.5)
    >>> sorted(average['kernel'].ravel().tolist())
    [2.0, 2.0, 3.5, 3.5]
  """
  if not isinstance(step_size, jax.core.Tracer):
    checks.check_fraction('step_size', step_size)  # type: ignore[arg-type]
  state = state_lib.get_state(opt_state)
  marks = trees.leaves_by_path(storage.entry_marks(state, like=params))

  def visit(path, old, new):
    moved = (1 - step_size) * old + step_size * new
    if not marks_lib.is_marked(marks.get(path)):
      return moved
    stays = marks_lib.stays_backward(marks[path])
    return jnp.where(state.refreshed_at(path) & ~stays, new, moved)

  return trees.map_leaves(visit, average, params)
