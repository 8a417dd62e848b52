"""Masks that never move: none at all, given ones, or a random one."""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax import trees
from sparse_jax.masks import selection
from sparse_jax.masks import structures
from sparse_jax.masks.allocations import uniform
from sparse_jax.masks.structures import Unstructured
from sparse_jax.rules import leaves
from sparse_jax.rules import rule
from sparse_jax.rules.make_method import assemble
from sparse_jax.rules.make_method import make_method
from sparse_jax.rules.state import SparseMethod


def dense() -> SparseMethod:
  """The identity, so that a dense baseline shares its loop with the others.

  Law: sparsify(optimizer, dense()) is the optimizer.

  Example:
    >>> method = dense()
    >>> params = {'kernel': jnp.ones((2, 2))}
    >>> method.read(params, method.init(params)) is params
    True
  """
  return assemble('dense', lambda params: {}, lambda *_: {},
                  read=lambda params, state: params,
                  work=lambda params, steps: {})._replace(stateless=True)


def static(sparsity: float, *, allocation=uniform, structure=Unstructured(),
           is_sparse: selection.IsSparse = None,
           batch_axes: selection.Axes = (),
           contracting: selection.Axes | None = None) -> SparseMethod:
  """A random mask, fixed for ever; entries outside it are exactly 0.

  Training costs 3 f_S: forward, input and weight gradient at the sparsity.

  Args:
    sparsity: fraction of the entries (groups) that is zero, in [0, 1).
    allocation: how the sparsity is shared among the leaves: a function
      `(shapes, sparsity) -> {path: sparsity}`, or such a mapping.
    structure: what is kept or dropped together.
    is_sparse: which leaves are sparse; see `selection.select`.
    batch_axes: axes that stack layers: a tuple or a function of (path, leaf).
    contracting: axes that the product sums over, likewise; known for Dense,
      Conv and attention kernels.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> method = static(0.75)
    >>> params = {'kernel': jnp.ones((4, 4))}
    >>> float(method.read(params, method.init(params))['kernel'].sum())
    4.0

  Reference:
    Evci et al., RigL, 2020, https://arxiv.org/abs/1911.11134, the row
    "Static" (`scratch` in the official code); the dense layers are those of
    `rigl`.
  """
  where = leaves.Sites(sparsity, allocation, structure, is_sparse, batch_axes,
                       contracting)
  return make_method(rule.Rule('static', where, rule.random_first, zeros=True))


def fixed(masks: trees.PyTree, *, structure=Unstructured(),
          batch_axes: selection.Axes = (),
          contracting: selection.Axes | None = None) -> SparseMethod:
  """Given masks, fixed for ever; entries outside them are exactly 0.

  The masks may be those of a lottery ticket, or of a trained or pruned
  network: `get_state(opt_state).forward_masks`, or `weights != 0`. Training
  costs 3 f_S.

  Args:
    masks: a tree of bool arrays like the parameters, or `{path: mask}`; leaves
      without a mask (None, or missing) are dense.
    structure: what the masks keep or drop together, so that they may be
      packed; each group must be kept or dropped whole. Packed layers that are
      stacked (columns that are balanced) must keep equal numbers of blocks.
    batch_axes, contracting: as in `static`.

  Raises:
    ValueError: if the masks are not bool or divide a group (but for blocks,
      from `init`); from `init`, if a mask has no leaf of its shape.

  Example:
    >>> method = fixed({'kernel': jnp.array([[True, False], [False, True]])})
    >>> params = {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)}
    >>> method.read(params, method.init(params))['kernel']
    Array([[1., 0.],
           [0., 1.]], dtype=float32)

  Reference:
    Frankle and Carbin, The lottery ticket hypothesis, 2019,
    https://arxiv.org/abs/1803.03635.
  """
  table = {path: np.asarray(mask)
           for path, mask in trees.leaves_by_path(masks).items()}
  for path, mask in table.items():
    if mask.dtype != bool:
      raise ValueError(f'`masks` (of {mask.dtype} at {path!r}) must be bool.')
  where: Any = _Given(table, structure, batch_axes, contracting).checked()

  def choose(leaf, now):
    del now
    mask = jnp.asarray(table[leaf.path])
    return leaf.layout.group(mask.astype(jnp.float32)) > 0

  return make_method(rule.Rule('fixed', where, choose, zeros=True,
                               unpackable=where.unpackable()))


class _Given(NamedTuple):
  """The leaves that have a mask."""

  masks: dict[trees.Path, np.ndarray]
  structure: Any
  batch_axes: Any
  contracting: Any

  def checked(self) -> '_Given':
    self._sites(self.masks, 0.).checked()
    return self

  def leaves(self, params: trees.PyTree) -> dict[trees.Path, leaves.Leaf]:
    known = trees.leaves_by_path(params)
    for path, mask in self.masks.items():
      if path not in known or known[path].shape != mask.shape:
        raise ValueError(f'`masks` has {path!r} of shape {mask.shape}, and '
                         'the parameters have no such leaf.')
    found = self._sites(self.masks, 0.).leaves(params)
    kept = {path: _groups(leaf, self.masks[path])
            for path, leaf in found.items()}
    return {path: leaf._replace(sparsity=share, backward_sparsity=share)
            for path, leaf in found.items()
            for share in [1 - float(np.mean(kept[path]))]}

  def unpackable(self) -> str:
    """Why blocks of these masks cannot be packed; '' if they can."""
    if not isinstance(self.structure, structures.Block):
      return ''
    shapes = {path: jax.ShapeDtypeStruct(mask.shape, np.float32)
              for path, mask in self.masks.items()}
    for path, leaf in self.leaves(shapes).items():
      kept = _groups(leaf, self.masks[path])
      counts = np.unique(kept.sum(leaf.layout.competing))
      if len(counts) > 1 or not counts.all():
        return (f'its mask of {path!r} keeps {counts.tolist()} blocks, where '
                'each layer (column, if balanced) must keep one number above 0')
    return ''

  def _sites(self, paths, sparsity):
    return leaves.Sites(sparsity, uniform, self.structure,
                        lambda path, leaf: path in paths, self.batch_axes,
                        self.contracting)


def _groups(leaf, mask) -> np.ndarray:
  """bool of the groups' shape; a mask that divides a group is an error."""
  with jax.ensure_compile_time_eval():
    kept = leaf.layout.group(jnp.asarray(mask, jnp.float32)) > 0
    whole = leaf.layout.spread(kept)
    if not np.array_equal(whole, mask):
      raise ValueError(f'`masks` must keep or drop each group of {leaf.path!r} '
                       f'whole, with `structure` ={leaf.layout.structure}.')
    return np.asarray(kept)
