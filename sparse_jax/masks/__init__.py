"""Masks of arrays: top-k, structures, allocations, schedules, scores."""

from sparse_jax.masks.backward import masked_weight
from sparse_jax.masks.layouts import layout
from sparse_jax.masks.layouts import Layout
from sparse_jax.masks.layouts import make_mask
from sparse_jax.masks.selection import is_kernel
from sparse_jax.masks.selection import select
from sparse_jax.masks.soft_topk import soft_top_k
from sparse_jax.masks.structures import Structure
from sparse_jax.masks.topk import keep_count
from sparse_jax.masks.topk import top_k_mask
