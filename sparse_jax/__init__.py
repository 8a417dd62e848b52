"""Sparse training of neural networks in JAX and Flax."""

from sparse_jax import blocks
from sparse_jax import cost
from sparse_jax import jaxprs
from sparse_jax import masks
from sparse_jax import operators
from sparse_jax import rules
from sparse_jax import scaling
from sparse_jax import transforms
from sparse_jax.adam import aged_adam
from sparse_jax.adam import aged_adamw
from sparse_jax.averaging import average_params
from sparse_jax.cost.effective import effective_sparsity
from sparse_jax.description import describe
from sparse_jax.getters import linen_getter
from sparse_jax.getters import nnx_getter
from sparse_jax.getters import nnx_start
from sparse_jax.jaxprs.views import contracting_axes
from sparse_jax.loop import start
from sparse_jax.loop import with_method
from sparse_jax.masks import schedules
from sparse_jax.masks import scores
from sparse_jax.masks.allocations import erdos_renyi
from sparse_jax.masks.allocations import erk
from sparse_jax.masks.allocations import uniform
from sparse_jax.masks.allocations import uniform_plus
from sparse_jax.masks.backward import masked_weight
from sparse_jax.masks.layouts import make_mask
from sparse_jax.masks.structures import Block
from sparse_jax.masks.structures import Channel
from sparse_jax.masks.structures import FanIn
from sparse_jax.masks.structures import Filter
from sparse_jax.masks.structures import NM
from sparse_jax.masks.structures import Unstructured
from sparse_jax.masks.topk import keep_count
from sparse_jax.masks.topk import top_k_mask
from sparse_jax.methods.alternating import ac_dc
from sparse_jax.methods.at_init import grasp
from sparse_jax.methods.at_init import snip
from sparse_jax.methods.condensing import condense
from sparse_jax.methods.condensing import condensed_matmul
from sparse_jax.methods.condensing import drop_outputs
from sparse_jax.methods.fan_in import srigl
from sparse_jax.methods.fixed import dense
from sparse_jax.methods.fixed import fixed
from sparse_jax.methods.fixed import static
from sparse_jax.methods.granet import granet
from sparse_jax.methods.learned import cs
from sparse_jax.methods.learned import dst
from sparse_jax.methods.learned import str_
from sparse_jax.methods.mest import mest
from sparse_jax.methods.one_shot import one_shot
from sparse_jax.methods.permuting import permute_units
from sparse_jax.methods.powerprop import powerprop
from sparse_jax.methods.pruning import gmp
from sparse_jax.methods.redistribution import dsr
from sparse_jax.methods.redistribution import snfs
from sparse_jax.methods.rewiring import itop
from sparse_jax.methods.rewiring import rigl
from sparse_jax.methods.rewiring import set_
from sparse_jax.methods.spartan import spartan
from sparse_jax.methods.straight_through import dnw
from sparse_jax.methods.straight_through import sr_ste
from sparse_jax.methods.straight_through import ste
from sparse_jax.methods.swat import swat
from sparse_jax.methods.thresholding import iht
from sparse_jax.methods.top_kast import top_kast
from sparse_jax.rules.group import group
from sparse_jax.rules.losses import exploration_loss
from sparse_jax.rules.packed import dense_weights
from sparse_jax.rules.packed import packed
from sparse_jax.rules.state import get_state
from sparse_jax.rules.state import SparseMethod
from sparse_jax.rules.state import SparseState
from sparse_jax.summary import summarize
from sparse_jax.summary import Summary
from sparse_jax.transforms import sparsify

__version__ = '0.2.0'

__all__ = [
    'ac_dc', 'aged_adam', 'aged_adamw', 'average_params', 'Block', 'blocks',
    'Channel', 'condense', 'condensed_matmul', 'contracting_axes', 'cost',
    'cs', 'dense', 'dense_weights', 'describe', 'dnw', 'drop_outputs', 'dsr',
    'dst', 'effective_sparsity', 'erdos_renyi', 'erk', 'exploration_loss',
    'FanIn', 'Filter', 'fixed', 'get_state', 'gmp', 'granet', 'grasp', 'group',
    'iht', 'itop', 'jaxprs', 'keep_count', 'linen_getter', 'make_mask',
    'masked_weight', 'masks', 'mest', 'NM', 'nnx_getter', 'nnx_start',
    'one_shot', 'operators', 'packed', 'permute_units', 'powerprop', 'rigl',
    'rules', 'scaling', 'schedules', 'scores', 'set_', 'snfs', 'snip',
    'SparseMethod', 'SparseState', 'sparsify', 'spartan', 'sr_ste', 'srigl',
    'start', 'static', 'ste', 'str_', 'summarize', 'Summary', 'swat',
    'top_k_mask', 'top_kast', 'transforms', 'uniform', 'uniform_plus',
    'Unstructured', 'with_method',
]
