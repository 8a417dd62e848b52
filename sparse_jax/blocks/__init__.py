"""Block-sparse weights of which only the kept blocks exist."""

from sparse_jax.blocks.formats import from_dense
from sparse_jax.blocks.formats import to_bcoo
from sparse_jax.blocks.formats import to_bcsr
from sparse_jax.blocks.formats import to_dense
from sparse_jax.blocks.growth import without_growth
from sparse_jax.blocks.packing import is_packed
from sparse_jax.blocks.packing import pack
from sparse_jax.blocks.packing import PackedBlocks
from sparse_jax.blocks.packing import unpack
from sparse_jax.blocks.products import assemble
from sparse_jax.blocks.products import conv
from sparse_jax.blocks.products import matmul
from sparse_jax.blocks.products import transposed
