"""Iterative hard thresholding: after every step only the largest stay."""

import jax.numpy as jnp
import numpy as np

from sparse_jax import checks
from sparse_jax import trees
from sparse_jax.masks import backward
from sparse_jax.masks import marks as marks_lib
from sparse_jax.masks import selection
from sparse_jax.masks import structures
from sparse_jax.masks.allocations import uniform
from sparse_jax.masks.structures import Unstructured
from sparse_jax.rules import leaves as leaves_lib
from sparse_jax.rules import state as state_lib
from sparse_jax.rules.make_method import assemble
from sparse_jax.rules.state import SparseMethod


def iht(sparsity: float, *, prune_begin: int = 0, prune_end: int | None = None,
        allocation=uniform, structure=Unstructured(),
        is_sparse: selection.IsSparse = None, batch_axes: selection.Axes = (),
        contracting: selection.Axes | None = None) -> SparseMethod:
  """Iterative hard thresholding, as weight-sparse transformers are trained.

  The optimizer steps on all weights, with the gradient of all and slots that
  are never reset; then the largest |w| of each leaf stay and all others become
  exactly 0. A weight comes in with the value that one step from 0 gives it.
  The share that stays falls linearly from 1 at `prune_begin` to 1 - sparsity
  at `prune_end`. Training costs 2 f + f_D at the sparsity of the step.

  Laws: after every step w is what the optimizer alone would make of it on A,
  and 0 elsewhere; at sparsity 0 it is the inner optimizer.

  Args:
    sparsity, allocation, structure, is_sparse, batch_axes, contracting: as in
      `static`; the sparsity is the final one.
    prune_begin, prune_end: the steps between which the sparsity rises; None:
      it is final from the start.

  Raises:
    ValueError: naming the argument that is out of range, or a `prune_end` with
      NM, which fixes the sparsity.

  Example:
    >>> method = iht(0.5)
    >>> params = {'w': jnp.array([[3., 1.], [-2., 0.]])}
    >>> state = method.init(params)
    >>> method.refresh(params, params, state)[0]['w']
    Array([[ 3.,  0.],
           [-2.,  0.]], dtype=float32)

  Reference:
    Gao et al., Weight-sparse transformers have interpretable circuits, 2025,
    https://arxiv.org/abs/2511.13653; the projection is that of Jin et al.,
    Training skinny deep neural networks with iterative hard thresholding,
    2016, https://arxiv.org/abs/1607.05423. The training code of Gao et al. is
    not public; that the density falls linearly over the first half of a run
    was read in an independent implementation,
    https://github.com/jacobcd52/sparse_pretrain. Left out: the least number of
    weights (4) that they leave to each neuron, and their learning rate
    proportional to 1 / sqrt(weights left).
  """
  where = leaves_lib.Sites(sparsity, allocation, structure, is_sparse,
                           batch_axes, contracting).checked()
  checks.check_count('prune_begin', prune_begin)
  if prune_end is not None:
    checks.check_count('prune_end', prune_end, least=prune_begin + 1)
    if structures.fixed_sparsity(structure) is not None:
      raise ValueError(f'`prune_end` (={prune_end}) must be None with '
                       f'`structure` ={structure}, which fixes the sparsity.')

  def share(step):
    """Of the final sparsity, at a step or an array of steps of NumPy."""
    return (step - prune_begin) / (prune_end - prune_begin)

  def kept(leaf, step):
    if prune_end is None:
      return leaf.count
    risen = leaf.sparsity * jnp.clip(share(step.astype(jnp.float32)), 0, 1)
    return jnp.where(step < prune_end, leaf.layout.keep_count(risen),
                     leaf.count)

  def chosen(leaf, weight, step):
    scores = leaf.layout.group(jnp.abs(weight))
    return marks_lib.levels(leaf.top(scores, kept(leaf, step)), leaf.full())

  def start(leaves, params, key):
    del key
    weights = trees.leaves_by_path(params)
    return {path: marks_lib.mark(chosen(leaf, weights[path], jnp.int32(0)))
            for path, leaf in leaves.items()}

  def inside(state, path, marks):
    layout = state.plan.by_path[path].layout
    return marks_lib.forward_mask(layout.spread(marks))

  def read(params, state):
    def visit(path, weight, marks):
      if not marks_lib.is_marked(marks):
        return weight
      return backward.masked_weight(weight, inside(state, path, marks),
                                    jnp.ones((1,) * weight.ndim, bool))

    return trees.map_leaves(visit, params, state.marks)

  def refresh(seen, state):
    step = state.step + 1
    after = trees.leaves_by_path(seen.params)
    marks = trees.map_leaves(lambda path, old: marks_lib.mark(chosen(
        state.plan.by_path[path], after[path], step), old), state.marks)

    def visit(path, move, before, own):
      if not marks_lib.is_marked(own):
        return move
      return jnp.where(inside(state, path, own), move,
                       -before.astype(jnp.result_type(move, before)))

    moves = trees.map_leaves(visit, seen.moves, seen.before, marks)
    return state._replace(marks=marks, refreshed=jnp.ones((), bool)), moves

  def work(params, steps):
    taken = np.arange(max(steps, 1))
    risen = 1. if prune_end is None else np.mean(np.clip(share(taken), 0, 1))
    density = {path: 1 - (1 - leaf.layout.share(leaf.count)) * float(risen)
               for path, leaf in where.leaves(params).items()}
    return {path: state_lib.Work(own, own, 1.) for path, own in density.items()}

  return assemble('iht', where.leaves, start, read=read, refresh=refresh,
                  moves=True, work=work, grows=False)
