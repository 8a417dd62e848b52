"""Masks that never move: none at all, or a random one."""

import jax

from sparse_jax.rules import assembly
from sparse_jax.masks import selection
from sparse_jax.rules import sites as sites_lib
from sparse_jax.rules.assembly import SparseMethod
from sparse_jax.rules.assembly import UNIFORM
from sparse_jax.rules.assembly import UNSTRUCTURED


def dense() -> SparseMethod:
  """The identity, so that a dense baseline shares its loop with the others.

  Law: sparsify(optimizer, dense()) is the optimizer.

  Example:
    >>> import jax.numpy as jnp
    >>> method = dense()
    >>> params = {'kernel': jnp.ones((2, 2))}
    >>> method.read(params, method.init(params)) is params
    True
  """
  def start(params, key):
    del key
    return jax.tree.map(lambda _: None, params)

  return assembly.make_method(start, read=lambda params, state: params,
                              work=lambda params, steps: {})


def static(sparsity: float, *, allocation=UNIFORM, structure=UNSTRUCTURED,
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
    >>> import jax.numpy as jnp
    >>> method = static(0.75)
    >>> params = {'kernel': jnp.ones((4, 4))}
    >>> float(method.read(params, method.init(params))['kernel'].sum())
    4.0

  Reference:
    Evci et al., RigL, 2020, https://arxiv.org/abs/1911.11134, the row
    "Static" (`scratch` in the official code).
  """
  sites = sites_lib.Sites(sparsity, allocation, structure, is_sparse,
                          batch_axes, contracting).checked()
  return assembly.make_method(assembly.random_start(sites),
                              read=assembly.read_forward, zeros=True,
                              work=assembly.shared_work(sites, lambda d: (
                                  d, d, d)),
                              kept=assembly.constant_counts(sites))
