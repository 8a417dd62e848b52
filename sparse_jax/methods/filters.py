"""Filter pruning: whole filters leave the arrays, and the net is smaller."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax import checks

from sparse_jax import trees
from sparse_jax.masks import topk

# {path of a kernel: {path of an array that shrinks with it: its axis}}.
Followers = Mapping[trees.Path, Mapping[trees.Path, int]]


def filter_norms(kernel: jax.Array) -> jax.Array:
  """L1 norm of each output filter, float32[outputs]; outputs are the last axis.

  Example:
    >>> filter_norms(jnp.array([[.5, .3, .2], [-.1, -.8, .05]]))
    Array([0.6 , 1.1 , 0.25], dtype=float32)
  """
  wide = jnp.abs(kernel.astype(jnp.float32))
  return jnp.sum(wide, axis=tuple(range(kernel.ndim - 1)))


def prune_filters(variables: trees.PyTree,
                  sparsities: Mapping[trees.Path, float],
                  followers: Followers, *, greedy: bool = False
                  ) -> tuple[trees.PyTree, dict[trees.Path, np.ndarray]]:
  """Removes the filters of smallest L1 norm from a network's variables.

  Each kernel loses filters along its last axis, and every array that follows
  it loses the same indices: its bias, the scale, bias, mean and variance of
  its normalisation, and the inputs of the layers that read it. The result has
  smaller arrays of the same tree: variables of the same architecture with
  fewer channels, to be fine-tuned with a fresh optimizer.

  Law: the smaller network computes what the larger one does with the removed
  filters' outputs at zero behind their normalisation.

  Args:
    variables: tree of arrays: parameters, with batch statistics if any.
    sparsities: `{path of a kernel: share of its filters that go}`, in [0, 1);
      keep_count(filters, share) stay. Li et al. give no share to layers that
      are sensitive and, in ResNets, only the first kernel of each block.
    followers: for each of these kernels the arrays that shrink with it, and
      along which axis. An axis of several times as many entries as there are
      filters (inputs after flattening) is read as groups of filters.
    greedy: whether a kernel is ranked without the inputs that earlier ones
      have removed from it ("greedy" in the paper), in the order of
      `sparsities`; otherwise with all of them ("independent").

  Returns:
    The smaller tree, and for each kernel the indices kept, ascending.

  Raises:
    ValueError: for an unknown path, a share out of range, or a follower whose
      axis does not fit.

  Example:
    >>> net = {'conv': {'kernel': jnp.array([[.5, .3, .2], [-.1, -.8, .05]]),
    ...                 'bias': jnp.array([1., 2., 3.])},
    ...        'head': {'kernel': jnp.ones((3, 4))}}
    >>> small, kept = prune_filters(net, {'conv/kernel': 1 / 3}, {
    ...     'conv/kernel': {'conv/bias': 0, 'head/kernel': 0}})
    >>> kept['conv/kernel'].tolist(), small['head']['kernel'].shape
    ([0, 1], (2, 4))
    >>> small['conv']['bias'].tolist()
    [1.0, 2.0]

  Reference:
    Li et al., Pruning filters for efficient convnets, 2017,
    https://arxiv.org/abs/1608.08710, section 3. Deviation: the count kept is
    rounded, as everywhere here.
  """
  arrays, kept = trees.leaves_by_path(variables), {}
  original = dict(arrays)
  _check(arrays, sparsities, followers)
  for path, sparsity in sparsities.items():
    ranked = arrays[path] if greedy else original[path]
    norms = filter_norms(ranked)
    keep = topk.top_k_mask(norms, topk.keep_count(norms.size, sparsity))
    kept[path] = np.flatnonzero(keep)
    arrays[path] = jnp.take(arrays[path], kept[path], axis=-1)
    for name, axis in followers.get(path, {}).items():
      arrays[name] = _take(arrays[name], kept[path], norms.size, axis)
  return trees.map_leaves(lambda path, _: arrays[path], variables), kept


def _take(array, kept, filters: int, axis: int):
  """The kept indices of an axis, of each of its groups of `filters`."""
  groups = array.shape[axis] // filters
  index = (np.arange(groups)[:, None] * filters + kept[None]).ravel()
  return jnp.take(array, index, axis=axis)


def _check(arrays, sparsities, followers) -> None:
  unknown = sorted((set(sparsities) | set(followers)) - set(arrays))
  if unknown:
    raise ValueError(f'`sparsities` and `followers` name {unknown}, which are '
                     f'none of {sorted(arrays)}.')
  shrunk = {(path, arrays[path].ndim - 1) for path in sparsities}
  for path, sparsity in sparsities.items():
    checks.check_sparsity(f'sparsities[{path!r}]', sparsity)
  for path, own in followers.items():
    filters = arrays[path].shape[-1]
    for name, axis in own.items():
      shape: Any = getattr(arrays.get(name), 'shape', None)
      fits = shape is not None and -len(shape) <= axis < len(shape)
      if not fits or shape[axis] % filters:
        raise ValueError(f'`followers[{path!r}]` names {name!r} with axis '
                         f'{axis}, of shape {shape}; it must have a multiple '
                         f'of {filters} entries there.')
      place = name, axis % len(shape)
      if path in sparsities and place in shrunk:
        raise ValueError(f'`followers[{path!r}]` names {name!r} with axis '
                         f'{axis}, which shrinks with another kernel: filters '
                         'that are added must be one kernel\'s followers.')
      shrunk.add(place)
