"""Gradients past the forward mask: hidden weights learn, and come back."""

import jax
import jax.numpy as jnp

from sparse_jax.rules import assembly
from sparse_jax import checks
from sparse_jax import trees
from sparse_jax.rules import losses
from sparse_jax.masks import masking
from sparse_jax.masks import selection
from sparse_jax.rules import sites as sites_lib
from sparse_jax.rules import state as state_lib
from sparse_jax.masks import structures
from sparse_jax.rules.assembly import SparseMethod
from sparse_jax.rules.assembly import UNIFORM
from sparse_jax.rules.assembly import UNSTRUCTURED


def dnw(sparsity: float, *, allocation=UNIFORM, structure=UNSTRUCTURED,
        is_sparse: selection.IsSparse = None, batch_axes: selection.Axes = (),
        contracting: selection.Axes | None = None) -> SparseMethod:
  """Discovering neural wirings: magnitude mask every step, dense gradient.

  The forward pass reads the largest weights; the gradient with respect to
  what it read goes to all weights, hidden ones included, so that any may
  enter. Training costs 2 f_S + f_D.

  Args:
    sparsity, allocation, structure, is_sparse, batch_axes, contracting: as in
      `static`.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> method = dnw(0.9)

  Reference:
    Wortsman et al., 2019, https://arxiv.org/abs/1906.00586, algorithm 1.
  """
  return top_kast(sparsity, backward_sparsity=0., penalty_weight=0.,
                  update_every=1, allocation=allocation, structure=structure,
                  is_sparse=is_sparse, batch_axes=batch_axes,
                  contracting=contracting)


def ste(*, structure=structures.NM(2, 4), is_sparse: selection.IsSparse = None,
        batch_axes: selection.Axes = (),
        contracting: selection.Axes | None = None) -> SparseMethod:
  """N:M sparsity by the plain straight-through estimator.

  Every step the N largest of each M weights along the inputs are read, and
  the gradient with respect to what was read goes to all. It is `dnw` with
  N:M competitions. Training costs 2 f_S + f_D.

  Args:
    structure: an NM; it fixes the sparsity at 1 - n/m.
    is_sparse, batch_axes, contracting: as in `static`.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> method = ste(structure=structures.NM(1, 4))

  Reference:
    Zhou et al., Learning N:M fine-grained structured sparse neural networks,
    2021, https://arxiv.org/abs/2102.04010, section 3.1. Deviation: of equal
    weights the earlier is kept.
  """
  return sr_ste(structure=structure, decay=0., is_sparse=is_sparse,
                batch_axes=batch_axes, contracting=contracting)


def sr_ste(*, structure=structures.NM(2, 4), decay: float = 2e-4,
           is_sparse: selection.IsSparse = None,
           batch_axes: selection.Axes = (),
           contracting: selection.Axes | None = None) -> SparseMethod:
  """N:M sparsity by the sparse-refined straight-through estimator.

  As `ste`, and weights that are not read decay: the penalty is decay / 2
  times their sum of squares, so that decay * w is added to their gradient
  and they change places with those that are read less often. Training costs
  2 f_S + f_D.

  Law: decay = 0 is `ste`.

  Args:
    structure: an NM; it fixes the sparsity at 1 - n/m.
    decay: lambda_w of the paper, at least 0. It comes besides any weight
      decay of the optimizer.
    is_sparse, batch_axes, contracting: as in `static`.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> import sparse_jax
    >>> method = sr_ste(decay=2e-4)
    >>> w = {'kernel': jnp.array([[.5], [-.1], [.3], [-.8]])}
    >>> method.read(w, method.init(w))['kernel'].ravel()
    Array([ 0.5,  0. ,  0. , -0.8], dtype=float32)

  Reference:
    Zhou et al., 2021, https://arxiv.org/abs/2102.04010, equation 9.
  """
  if not isinstance(structure, structures.NM):
    raise ValueError(f'`structure` (={structure!r}) must be an NM.')
  structures.check_structure(structure)
  checks.check_non_negative('decay', decay)
  every_step = dnw(structure.sparsity, structure=structure,
                   is_sparse=is_sparse, batch_axes=batch_axes,
                   contracting=contracting)

  def penalty(params, state):
    marks = state_lib.get_state(state).marks

    def hidden(path, weight, mark):
      del path
      if not masking.is_marked(mark):
        return jnp.float32(0)
      unread = jnp.where(masking.forward_mask(mark), 0, weight)
      return jnp.sum(jnp.square(unread.astype(jnp.float32)))

    squares = trees.map_leaves(hidden, params, marks)
    return decay / 2 * sum(jax.tree.leaves(squares), jnp.float32(0))

  return every_step._replace(penalty=penalty) if decay else every_step


def top_kast(sparsity: float, *, backward_sparsity: float,
             penalty_weight: float = 1e-4,
             backward_selection: str = 'magnitude',
             stop_exploration_at: int | None = None,
             allocation=UNIFORM, structure=UNSTRUCTURED,
             is_sparse: selection.IsSparse = None,
             batch_axes: selection.Axes = (),
             contracting: selection.Axes | None = None,
             update_every: int = 100, update_begin: int = 0,
             update_end: int | None = None) -> SparseMethod:
  """Top-KAST: forward set A, larger backward set B, exploration loss.

  A are the entries of largest magnitude at the forward sparsity, B those at
  the backward sparsity, leaf by leaf. The forward pass and the gradient to
  activations use A; the gradient to weights goes to B; the rest, C, does not
  move at all. Weights of B outside A keep their value, hidden. Training costs
  2 f(A) + f(B).

  Laws: backward_sparsity = 0 is `dnw` with the exploration loss;
  backward_sparsity = sparsity gives A = B; C is bit-identical through any
  optimizer.

  Args:
    sparsity, allocation, structure, is_sparse, batch_axes, contracting: as in
      `static`; the sparsity is the forward one.
    backward_sparsity: fraction outside B, in [0, sparsity]. The authors'
      advice is as small as the budget allows. The allocation shares it too (a
      mapping is scaled by the ratio of the two).
    penalty_weight: coefficient of the exploration loss, at least 0.
    backward_selection: 'magnitude' or 'random': how B outside A is chosen,
      anew at each refresh.
    stop_exploration_at: the step from which on B is A, or None for never.
    update_every, update_begin, update_end: when A and B are chosen anew; the
      paper uses every step and reports the same accuracy for 100.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> method = top_kast(0.9, backward_sparsity=0.8)

  Reference:
    Jayakumar et al., Top-KAST, 2020, https://arxiv.org/abs/2106.03517,
    algorithm 1. Left open there and settled here: entries that enter B start
    with fresh optimizer slots, so that nothing need be stored for C.
  """
  sites = sites_lib.Sites(sparsity, allocation, structure, is_sparse,
                          batch_axes, contracting).checked()
  assembly.check_backward(sparsity, backward_sparsity, backward_selection)
  if stop_exploration_at is not None:
    checks.check_count('stop_exploration_at', stop_exploration_at)
  checks.check_non_negative('penalty_weight', penalty_weight)
  wider = sites.at(backward_sparsity)
  window = assembly.refresh_window(update_every, update_begin, update_end,
                                   also_at=stop_exploration_at)

  def select(leaf, outer, weight, step, key):
    scores = leaf.magnitudes(weight)
    inside = leaf.layout.top(scores, leaf.count)
    if backward_selection == 'random':
      scores = leaf.random_scores(key)
    spare = jnp.where(inside, jnp.inf, _finite(scores))
    outside = leaf.layout.top(spare, max(outer.count, leaf.count))
    if stop_exploration_at is not None:
      outside &= inside | (step < stop_exploration_at)
    return sites_lib.levels(leaf, inside, outside)

  def start(params, key):
    leaves, outer = sites.leaves(params), wider.leaves(params)
    return sites_lib.first_marks(params, leaves, lambda leaf, w: select(
        leaf, outer[leaf.path], w, jnp.int32(0), key))

  def renew(seen, state):
    step = state.step + 1
    key = state_lib.step_key(state, step)
    leaves, outer = sites.leaves(seen.params), wider.leaves(seen.params)
    return sites_lib.next_state(
        window(step), lambda leaf, w, g, m: select(
            leaf, outer[leaf.path], w, step, key), leaves, seen, state)

  def penalty(params, state):
    # The allocation is that of the leaves that `init` was given.
    given = masking.paths(state.marks)
    own = {path: leaf for path, leaf in trees.leaves_by_path(params).items()
           if path in given}
    densities = {path: 1 - leaf.sparsity
                 for path, leaf in sites.leaves(own).items()}
    return losses.exploration_loss(
        params, state.forward_masks, state.backward_masks,
        penalty_weight=penalty_weight, forward_density=densities)

  def work(params, steps):
    del steps
    leaves, outer = sites.leaves(params), wider.leaves(params)
    return {path: state_lib.Work(*(1 - leaf.sparsity,) * 2,
                                 1 - outer[path].sparsity)
            for path, leaf in leaves.items()}

  kept = None if stop_exploration_at is not None else (
      assembly.constant_counts(sites, wider))
  return assembly.make_method(start, renew=renew, read=assembly.read_both,
                              penalty=penalty if penalty_weight else None,
                              work=work, kept=kept)


def _finite(scores):
  """NaN and infinity below +inf, which is kept for the forward set."""
  return jnp.minimum(scores, jnp.finfo(scores.dtype).max)
