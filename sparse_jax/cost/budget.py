"""What a budget of FLOPs or bytes can afford."""

from collections.abc import Callable
import math

from sparse_jax import checks


def plan(budget: float, cost: Callable[[float], float], *,
         highest: float) -> float:
  """The densest backward pass that a budget allows.

  With the forward sparsity fixed, accuracy rises with the density of the
  backward pass; so the authors of Top-KAST advise the smallest backward
  sparsity that can be afforded.

  Args:
    budget: the most that it may cost, in the unit of `cost`.
    cost: backward sparsity -> cost, which must not rise with the sparsity:
      FLOPs, bytes, or a multiplier.
    highest: the largest backward sparsity to try, in [0, 1): the forward
      sparsity, at which the two sets are the same.

  Returns:
    The smallest multiple of 0.001, or `highest`, whose cost is within budget.

  Raises:
    ValueError: if even `highest` costs more.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from sparse_jax.cost import count_flops, training_cost
    >>> from sparse_jax.rules.state import Work
    >>> params = {'hidden': jnp.ones((3, 8)), 'head': jnp.ones((8, 2))}
    >>> def model(params, x):
    ...   return jax.nn.relu(x @ params['hidden']) @ params['head']
    >>> flops = count_flops(model, params, jnp.ones((5, 3)), convention='rigl')
    >>> def cost(backward_sparsity):
    ...   work = Work(.2, .2, 1 - backward_sparsity)
    ...   return training_cost(flops, {'hidden': work, 'head': work}).multiplier
    >>> plan(.4, cost, highest=.8)
    0.425

  Reference:
    Jayakumar et al., Top-KAST, 2020, https://arxiv.org/abs/2106.03517,
    section 4.
  """
  checks.check_sparsity('highest', highest)
  checks.check_callable('cost', cost)
  grid = [i / 1000 for i in range(math.ceil(1000 * highest))] + [highest]
  if not (least := cost(highest)) <= budget:
    raise ValueError(f'`budget` (={budget!r}) is below the cost {least:g} of '
                     f'the backward sparsity {highest:g}.')
  low, high = 0, len(grid) - 1
  while low < high:
    middle = (low + high) // 2
    low, high = (low, middle) if cost(grid[middle]) <= budget else (
        middle + 1, high)
  return grid[high]
