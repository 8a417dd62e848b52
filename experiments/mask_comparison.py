"""How far masks move over many steps, as in Top-KAST's figure 3."""

from typing import Any

import jax
import jax.numpy as jnp

import sparse_jax
from sparse_jax import trees

_NOW, _FIRST_OUTSIDE = 1, 2  # Bits: in A when noted; outside B at the start.


def first(opt_state: Any) -> dict[str, jax.Array]:
  """Notes the masks before the first step: uint8 by path, 1 byte a weight."""
  state = sparse_jax.get_state(opt_state)
  outer = trees.leaves_by_path(state.backward_masks)
  return {path: _NOW * mask + _FIRST_OUTSIDE * jnp.uint8(~outer[path])
          for path, mask in _masks(state).items()}


def renewed(noted: dict[str, jax.Array], opt_state: Any
            ) -> dict[str, jax.Array]:
  """Notes the masks of now; what was outside at the start stays noted."""
  masks = _masks(sparse_jax.get_state(opt_state))
  return {path: (old & _FIRST_OUTSIDE) | masks[path]
          for path, old in noted.items()}


def change(noted: dict[str, jax.Array], opt_state: Any) -> dict[str, jax.Array]:
  """Since the last note, over the layers (Top-KAST's figures 3a and 3b).

  `mask_change_min`, `_mean`, `_max`: the share of a layer's entries whose place
  in A differs; `reservoir_used_min`, `_mean`, `_max`: of the entries outside B
  at the start, the share that has come into A.
  """
  masks = _masks(sparse_jax.get_state(opt_state))
  differ, used = [], []
  for path, old in noted.items():
    before, now = old & _NOW, masks[path]
    outside = (old & _FIRST_OUTSIDE) > 0
    differ.append(jnp.mean(before != now))
    used.append(jnp.sum(outside & (now > before))
                / jnp.maximum(jnp.sum(outside), 1))
  return _spread('mask_change', differ) | _spread('reservoir_used', used)


def _masks(state) -> dict[str, jax.Array]:
  return {path: mask.astype(jnp.uint8) for path, mask in
          trees.leaves_by_path(state.forward_masks).items() if mask is not None}


def _spread(name, shares):
  if not shares:
    return {}
  shares = jnp.stack(shares)
  return {f'{name}_min': shares.min(), f'{name}_mean': shares.mean(),
          f'{name}_max': shares.max()}
