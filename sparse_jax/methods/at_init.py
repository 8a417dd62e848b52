"""Masks found once, at initialisation, from the first gradients."""

import jax
import jax.numpy as jnp

from sparse_jax import checks
from sparse_jax import trees
from sparse_jax.masks import scores
from sparse_jax.masks import selection
from sparse_jax.masks.allocations import uniform
from sparse_jax.masks.structures import Unstructured
from sparse_jax.rules import budgets
from sparse_jax.rules import leaves as leaves_lib
from sparse_jax.rules import rule
from sparse_jax.rules.make_method import make_method
from sparse_jax.rules.state import SparseMethod


def snip(sparsity: float, *, scope: str = 'layer', skip_step: bool = False,
         allocation=uniform, structure=Unstructured(),
         is_sparse: selection.IsSparse = None, batch_axes: selection.Axes = (),
         contracting: selection.Axes | None = None) -> SparseMethod:
  """Single-shot pruning: keeps the largest |w dL/dw| of the first batch.

  Masks are full until the first update, which chooses them from that
  update's own gradient at the initial weights; they never move again, and
  entries outside are exactly 0. Training costs 3 f_S.

  Args:
    sparsity, allocation, structure, is_sparse, batch_axes, contracting: as in
      `static`.
    scope: 'layer', each leaf keeps its own share (RigL's code, whose ImageNet
      figures are the published ones); 'global', all entries compete (the
      paper), and only a uniform allocation goes with it.
    skip_step: False, the first batch also trains what is kept; True, it only
      chooses the masks (RigL's code).

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> method = snip(0.9, scope='global')

  Reference:
    Lee et al., SNIP, 2019, https://arxiv.org/abs/1810.02340, equation 4. No
    layer is dense there; in RigL's runs those of `rigl`.
    Deviations: biases never compete; training goes on from the weights that
    were scored, where the official code draws new ones; under 'global' every
    leaf keeps its best entry, so that no layer is cut off.
  """
  where = leaves_lib.Sites(sparsity, allocation, structure, is_sparse,
                           batch_axes, contracting).checked()

  def groups(leaves, nows, seen):
    del leaves, seen
    return {path: now.score(scores.saliency) for path, now in nows.items()}

  return _at_first_update('snip', where, scope, skip_step, groups)


def grasp(sparsity: float, *, scope: str = 'global', skip_step: bool = False,
          allocation=uniform, structure=Unstructured(),
          is_sparse: selection.IsSparse = None, batch_axes: selection.Axes = (),
          contracting: selection.Axes | None = None) -> SparseMethod:
  """Gradient signal preservation: removes what hinders the gradient's flow.

  As `snip`, but an entry's worth is w * (H g), with H g the product of the
  loss's Hessian with its gradient: entries of large -w * (H g) go, since the
  gradient's norm grows without them. `tx.update` needs the extra argument
  `grad_fn`, a function from the parameters to their gradients on the batch.
  Training costs 3 f_S.

  Args:
    sparsity, skip_step, allocation, structure, is_sparse, batch_axes,
      contracting: as in `snip`.
    scope: 'global' (the paper) or 'layer'.

  Raises:
    ValueError: naming the argument that is out of range; at an update without
      `grad_fn`.

  Example:
    >>> import optax, sparse_jax
    >>> params = {'kernel': jnp.array([[1., 1., 1.], [-1.5, 2., .5]])}
    >>> curvature = jnp.array([[1., 2., 3.], [1., 1., 1.]])
    >>> def grad_fn(params):
    ...   return {'kernel': curvature * params['kernel']}
    >>> tx = sparse_jax.sparsify(optax.sgd(0.1), grasp(0.5))
    >>> state = tx.init(params)
    >>> _, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
    >>> sparse_jax.get_state(state).forward_masks['kernel'].astype(int)
    Array([[0, 1, 1],
           [0, 1, 0]], dtype=int32)

  Reference:
    Wang et al., GraSP, 2020, https://arxiv.org/abs/2002.07376, algorithm 1;
    all convolutions and linear layers are sparse there.
    Deviations: exactly the count is kept (the official code keeps one more);
    the loss is the caller's own (the official code divides the logits by 200
    and balances the classes of the batch); under 'global' every leaf keeps
    its best entry.
  """
  where = leaves_lib.Sites(sparsity, allocation, structure, is_sparse,
                           batch_axes, contracting).checked()

  def groups(leaves, nows, seen):
    del nows
    if 'grad_fn' not in seen.extra_args:
      raise ValueError('`grad_fn` must be given to tx.update(..., '
                       'grad_fn=...) with grasp.')
    weights = trees.leaves_by_path(seen.params)
    curved = trees.leaves_by_path(_hessian_gradient(seen, set(leaves)))
    return {path: leaf.layout.group(weights[path].astype(jnp.float32)
                                    * curved[path].astype(jnp.float32))
            for path, leaf in leaves.items()}

  return _at_first_update('grasp', where, scope, skip_step, groups)


def _hessian_gradient(seen, paths):
  """H g over the leaves of these paths; the others are held constant."""
  def tangent(path, param, grad):
    own = grad.astype(param.dtype)
    return own if path in paths else jnp.zeros_like(own)

  tangents = trees.map_leaves(tangent, seen.params, seen.grads)
  grad_fn = seen.extra_args['grad_fn']
  _, curved = jax.jvp(grad_fn, (seen.params,), (tangents,))
  return curved


def _at_first_update(name, where, scope, skip_step, groups) -> SparseMethod:
  """Full masks, then those of the best groups by `groups(leaves, ...)`."""
  budgets.check_scope(where, scope)
  checks.check_bool('skip_step', skip_step)

  def choose(leaves, nows, seen):
    found = groups(leaves, nows, seen)
    counts = budgets.counts_by_scope(leaves, found, scope, where.sparsity)
    return budgets.best(leaves, found, counts), None

  return make_method(rule.Rule(
      name, where, choose, first=rule.full_first,
      refreshes=lambda step: step == 1, zeros=True, skip_step=skip_step,
      together=True, before_update=True,
      unpackable='its masks are full before the first update: find them on a '
      'first batch, state = tx.update(grads, tx.init(params), params)[1], and '
      'pack those, packed(fixed(get_state(state).forward_masks, '
      'structure=...))'))
