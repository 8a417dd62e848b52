"""Products with sparse operands, and sparse activations."""

from sparse_jax.operators.abs_topk import abs_top_k
from sparse_jax.operators.activations import activation_penalty
from sparse_jax.operators.activations import calibrate_thresholds
from sparse_jax.operators.activations import dsg_mask
from sparse_jax.operators.activations import fat_relu
from sparse_jax.operators.activations import hoyer
from sparse_jax.operators.activations import l1
from sparse_jax.operators.activations import meprop
from sparse_jax.operators.activations import random_projection
from sparse_jax.operators.injection import add_operands
from sparse_jax.operators.injection import first_operator_thresholds
from sparse_jax.operators.injection import with_operators
from sparse_jax.operators.operands import Operands
from sparse_jax.operators.residuals import gate
from sparse_jax.operators.residuals import relu
from sparse_jax.operators.sparse_products import first_thresholds
from sparse_jax.operators.sparse_products import sparse_conv_general_dilated
from sparse_jax.operators.sparse_products import sparse_dot_general
from sparse_jax.operators.sparse_products import sparse_einsum
