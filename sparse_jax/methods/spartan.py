"""Spartan: a soft top-k of the weights behind a hard one."""

from collections.abc import Mapping
import math

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from sparse_jax import checks
from sparse_jax import trees
from sparse_jax.masks import backward
from sparse_jax.masks import marks as marks_lib
from sparse_jax.masks import placing
from sparse_jax.masks import selection
from sparse_jax.masks import soft_topk
from sparse_jax.masks import topk
from sparse_jax.masks.allocations import uniform
from sparse_jax.masks.structures import Unstructured
from sparse_jax.rules import budgets
from sparse_jax.rules import leaves as leaves_lib
from sparse_jax.rules import state as state_lib
from sparse_jax.rules.make_method import assemble
from sparse_jax.rules.state import SparseMethod


def spartan(sparsity: float, *, update_end: int, prune_end: int | None = None,
            beta: tuple[float, float] = (1., 20.), scope: str = 'global',
            costs: Mapping[str, float] | None = None, allocation=uniform,
            structure=Unstructured(), is_sparse: selection.IsSparse = None,
            batch_axes: selection.Axes = (),
            contracting: selection.Axes | None = None) -> SparseMethod:
  """Differentiable sparsity by regularised transport.

  The forward pass reads w m on A and 0 elsewhere: A are the groups of largest
  |w| at each step, m is `soft_top_k` of |w| with the mass of A. The gradient
  passes A straight through, and goes on to w through the product and through
  m: hidden weights learn, and weights at the edge compete with each other.

  The sparsity rises linearly from 0 to `sparsity` at `prune_end`, beta, the
  hardness of m, linearly until `update_end`. There m is multiplied into the
  weights, others become exactly 0, and A stands still: from then on only A
  trains. Training costs 2 f + f_D at the sparsity of the step, and 3 f_S from
  `update_end` on.

  Laws: at every step the sum of costs times m is that of A; at sparsity 0 it
  is the inner optimizer.

  Args:
    sparsity, allocation, structure, is_sparse, batch_axes, contracting: as in
      `static`; the sparsity is the final one. Scores of groups are sums, and
      compete by their mean for each entry.
    update_end: the step from which on the masks stand still, at least 1. The
      authors leave the last fifth of a run.
    prune_end: the step from which on the sparsity is final, in [1,
      update_end]; None is a quarter of `update_end` (a fifth of their run).
    beta: the first and the last one, above 0. For blocks the authors multiply
      the last by the root of a block's entries, whose mean varies less.
    scope: 'global', all weights compete (the authors' default), and only a
      uniform allocation goes with it; 'layer', each leaf keeps its own share.
    costs: {pattern of paths: cost of an entry}, above 0, for the scope
      'global': the first pattern found counts, others cost 1. Weights then
      compete by |w| / cost, and `sparsity` is of the cost: FLOPs, say. None is
      1 for all.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> method = spartan(0.5, update_end=80)
    >>> params = {'kernel': jnp.array([[.1, -.2], [.4, .3]])}
    >>> state = method.init(params)._replace(step=jnp.int32(20))
    >>> _, state = method.refresh(params, params, state)
    >>> method.read(params, state)['kernel'].round(3)
    Array([[0.   , 0.   ],
           [0.284, 0.172]], dtype=float32)

  Reference:
    Tai et al., Spartan, 2022, https://arxiv.org/abs/2205.14107, algorithm 2,
    after the authors' code, https://github.com/facebookresearch/spartan.
    Deviations: the mass is exact, and that of A; each leaf keeps its best
    group; at `update_end` m enters the weights, so that the result is an
    ordinary sparse net (there m stays beside them, and slows their steps by
    its square); dense leaves are not made up for.
  """
  where = leaves_lib.Sites(sparsity, allocation, structure, is_sparse,
                           batch_axes, contracting).checked()
  budgets.check_movable(where, 'structure', structure)
  budgets.check_scope(where, scope)
  checks.check_count('update_end', update_end, least=1)
  prune_end = _prune_end(prune_end, update_end)
  betas = _betas(beta)
  prices = _prices(costs, scope)

  def sparsity_at(final, step):
    return final * jnp.clip(jnp.float32(step) / prune_end, 0, 1)

  def kept(count, final, step):
    """What `count` gives at the sparsity of the step, exactly at the end."""
    return jnp.where(step < prune_end, count(sparsity_at(final, step)),
                     count(final))

  def values(leaves, weights):
    """{path: |w| of each group}; -inf in padding."""
    wide = {path: leaf.layout.group(jnp.abs(weights[path].astype(
        jnp.float32))) for path, leaf in leaves.items()}
    return {path: jnp.where(jnp.isnan(each), -jnp.inf, each)
            for path, each in wide.items()}

  def cost(leaf):
    return _group_size(leaf) * selection.first_match(prices, leaf.path, 1.)

  def choose(leaves, weights, step):
    """{path: bool}: A."""
    own = values(leaves, weights)
    if scope == 'layer':
      return {path: leaf.top(own[path], kept(
          leaf.layout.keep_count, leaf.sparsity, step))
              for path, leaf in leaves.items()}
    worth = {path: own[path] / cost(leaf) for path, leaf in leaves.items()}
    if costs is None:
      size = sum(each.size for each in own.values())
      counts = budgets.global_counts(leaves, worth, kept(
          lambda s: topk.keep_count(size, s), sparsity, step))
    else:
      share = 1 - kept(jnp.float32, sparsity, step)
      counts = _counts_by_cost(worth, {path: cost(leaf) for path, leaf in
                                       leaves.items()}, share)
    return budgets.best(leaves, worth, counts)

  def soft(leaves, weights, inside, step):
    """{path: m}, of the mass of A."""
    own, share = values(leaves, weights), jnp.float32(step) / update_end
    hardness = betas[0] + (betas[1] - betas[0]) * jnp.minimum(share, 1)
    if scope == 'layer':
      return {path: soft_topk.soft_top_k(
          [own[path]], leaf.sum(inside[path]).astype(jnp.float32)
          * _group_size(leaf), beta=hardness, costs=[_group_size(leaf)],
          axes=leaf.layout.competing)[0] for path, leaf in leaves.items()}
    each = [cost(leaf) for leaf in leaves.values()]
    mass = sum(c * jnp.sum(inside[path], dtype=jnp.float32)
               for path, c in zip(leaves, each))
    return dict(zip(leaves, soft_topk.soft_top_k(
        [own[path] for path in leaves], mass, beta=hardness, costs=each)))

  def start(leaves, params, key):
    del params, key
    return {path: marks_lib.mark(marks_lib.levels(leaf.full(), leaf.full()))
            for path, leaf in leaves.items()}

  def read(params, state):
    leaves = state.plan.by_path
    if not sparsity:
      return params
    weights = trees.leaves_by_path(params)
    marks = {path: mark for path, mark in trees.leaves_by_path(
        state.marks).items() if path in leaves}
    inside = {path: marks_lib.forward_mask(own) for path, own in marks.items()}
    trained = {path: marks_lib.backward_mask(own)
               for path, own in marks.items()}
    own = {path: weights[path] for path in leaves}

    def entries(own, inside, step):
      """{path: m at each entry}, 1 once the masks stand still."""
      factors = lax.cond(
          step < update_end, lambda own: soft(leaves, own, inside, step),
          lambda own: {path: jnp.ones(leaf.layout.group_shape)
                       for path, leaf in leaves.items()}, own)
      return {path: leaf.layout.spread(factors[path])
              for path, leaf in leaves.items()}

    factors = placing.automatic(entries, own, own, inside, state.step)

    def visit(path, weight):
      if path not in leaves:
        return weight
      spread = leaves[path].layout.spread
      return backward.masked_weight(
          _times(weight, factors[path]), spread(inside[path]),
          spread(trained[path]))

    return trees.map_leaves(visit, params)

  def refresh(seen, state):
    step, leaves = state.step + 1, state.plan.by_path
    if not sparsity:
      return state, seen.moves
    after = trees.leaves_by_path(seen.params)
    weights = {path: after[path] for path in leaves}

    def chosen():
      return choose(leaves, weights, step)

    old = {path: marks_lib.forward_mask(trees.leaves_by_path(state.marks)[path])
           for path in leaves}
    inside = lax.cond(step <= update_end, chosen, lambda: old)
    trains = {path: mask | (step < update_end) for path, mask in inside.items()}
    marks = trees.map_leaves(lambda path, before: marks_lib.mark(
        marks_lib.levels(inside[path], trains[path]), before), state.marks)

    def enter(moves):
      factors = soft(leaves, weights, inside, step)

      def visit(path, move, before, weight):
        if path not in leaves:
          return move
        spread = leaves[path].layout.spread
        scaled = _times(weight, spread(factors[path]))
        exact = jnp.where(spread(inside[path]), scaled, 0) - before
        return exact.astype(move.dtype)

      return trees.map_leaves(visit, moves, seen.before, seen.params)

    moves = lax.cond(step == update_end, enter, lambda moves: moves,
                     seen.moves)
    return state._replace(marks=marks, refreshed=step <= update_end), moves

  def work(params, steps):
    leaves = where.leaves(params)
    taken = np.arange(max(steps, 1))
    risen = float(np.mean(np.clip(taken / prune_end, 0, 1)))
    frozen = float(np.mean(taken >= update_end))
    sparse = {path: 1 - leaf.layout.share(leaf.count)
              for path, leaf in leaves.items()}
    return {path: state_lib.Work(*[1 - own * risen] * 2, 1 - own * frozen)
            for path, own in sparse.items()}

  return assemble('spartan', where.leaves, start, read=read, refresh=refresh,
                  moves=True, work=work, grows=False)


def _times(weight: jax.Array, factor: jax.Array) -> jax.Array:
  return (weight.astype(jnp.float32) * factor).astype(weight.dtype)


def _group_size(leaf) -> float:
  """The entries of a group, of the largest if they differ."""
  layout = leaf.layout
  mean = math.prod(layout.shape) / math.prod(layout.group_shape)
  size = getattr(layout.structure, 'group_size', lambda view: mean)
  return float(size(layout.view_shape))


def _counts_by_cost(worth, costs, share: jax.Array) -> budgets.Counts:
  """Groups of each leaf among the most worthy that cost the share of all.

  The threshold is found on the bits of the floats, whose order is theirs: the
  last group taken reaches the budget.
  """
  keys = {path: lax.bitcast_convert_type(jnp.maximum(each, 0), jnp.int32)
          for path, each in worth.items()}
  budget = share * sum(costs[path] * float(key.size)
                       for path, key in keys.items())

  def price(bar):
    return sum(costs[path] * jnp.sum(key >= bar, dtype=jnp.float32)
               for path, key in keys.items())

  def narrow(_, ends):
    low, high = ends
    middle = low + (high - low) // 2
    enough = price(middle) >= budget * (1 - 1e-6)
    return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

  bar, _ = lax.fori_loop(0, 32, narrow, (jnp.int32(0), jnp.int32(2**31 - 1)))
  return {path: jnp.maximum(1, jnp.sum(key >= bar, dtype=jnp.int32).reshape(
      (1,) * key.ndim)) for path, key in keys.items()}


def _prune_end(prune_end, update_end) -> int:
  if prune_end is None:
    return max(update_end // 4, 1)
  checks.check_count('prune_end', prune_end, least=1)
  if prune_end > update_end:
    raise ValueError(f'`prune_end` (={prune_end}) must not be above '
                     f'`update_end` (={update_end}).')
  return prune_end


def _betas(beta) -> tuple[float, float]:
  try:
    first, last = (checks.check_non_negative('beta', value) for value in beta)
  except (TypeError, ValueError):
    first = 0.
  if not first or not last:
    raise ValueError(f'`beta` (={beta!r}) must be two numbers above 0, the '
                     'first and the last one.')
  return float(first), float(last)


def _prices(costs, scope) -> Mapping[str, float]:
  if costs is None:
    return {}
  if scope != 'global':
    raise ValueError(f'`costs` (={costs!r}) are for `scope` =\'global\': in a '
                     'layer all weights cost the same.')
  if not isinstance(costs, Mapping) or not all(
      isinstance(price, (int, float)) and 0 < price < float('inf')
      for price in costs.values()):
    raise ValueError(f'`costs` (={costs!r}) must be a mapping of patterns to '
                     'numbers above 0.')
  return dict(costs)
