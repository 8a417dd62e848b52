"""What a method is made of: for authors of methods."""

from sparse_jax.rules.budgets import global_counts
from sparse_jax.rules.budgets import share_out
from sparse_jax.rules.learned import learned_method
from sparse_jax.rules.leaves import drop_and_grow
from sparse_jax.rules.leaves import Leaf
from sparse_jax.rules.leaves import Sites
from sparse_jax.rules.losses import exploration_loss
from sparse_jax.rules.make_method import make_method
from sparse_jax.rules.now import Now
from sparse_jax.rules.rule import full_first
from sparse_jax.rules.rule import random_first
from sparse_jax.rules.rule import Rule
from sparse_jax.rules.state import Work
from sparse_jax.rules.updates import drop_schedule
from sparse_jax.rules.updates import refresh_window
from sparse_jax.rules.updates import Seen
