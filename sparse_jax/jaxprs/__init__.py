"""Any JAX function, read: its products, and the parameters they use."""

from sparse_jax.jaxprs.products import find_products
from sparse_jax.jaxprs.products import Product
from sparse_jax.jaxprs.replacing import replace_products
from sparse_jax.jaxprs.views import contracting_axes
from sparse_jax.jaxprs.views import find_uses
from sparse_jax.jaxprs.views import layer_order
