"""What training costs: FLOPs, bytes, cycles."""

from sparse_jax.cost.accelerator import layer_cycles
from sparse_jax.cost.accelerator import Machine
from sparse_jax.cost.budget import plan
from sparse_jax.cost.flops import count_flops
from sparse_jax.cost.flops import FlopCount
from sparse_jax.cost.flops import theoretical_speedup
from sparse_jax.cost.flops import training_cost
from sparse_jax.cost.flops import TrainingCost
from sparse_jax.cost.memory import memory_cost
from sparse_jax.cost.memory import MemoryCost
from sparse_jax.cost.effective import connectivity
from sparse_jax.cost.effective import effective_sparsity
