"""What training holds in memory: weights, slots, saved activations."""

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import jax
import numpy as np

from sparse_jax import checks

from sparse_jax import trees
from sparse_jax.jaxprs import products


class MemoryCost(NamedTuple):
  """Bytes that training holds on the device between its passes.

  Example:
    >>> cost = MemoryCost(weights=400, slots=800, saved_activations=300)
    >>> cost.total
    1500
  """

  weights: int  # Bytes, as all three.
  slots: int  # The optimizer's state, a sparse method's included.
  saved_activations: int  # What the backward pass needs of the forward pass.

  @property
  def total(self) -> int:
    return sum(self)


def memory_cost(fn: Callable[..., Any], *args: Any, optimizer: Any = None,
                stored: Mapping[trees.Path, float] | None = None) -> MemoryCost:
  """Bytes of the weights, the optimizer's slots and the saved activations.

  Saved activations are the residuals of `jax.vjp` with respect to the first
  argument, arguments themselves left out: what the program asks to keep. XLA
  may keep less, or more: of a compiled step, `memory_analysis()` tells.

  Args:
    fn: a function of arrays, whose first argument is the parameters.
    *args: its arguments: trees of arrays, or of jax.ShapeDtypeStruct.
    optimizer: an Optax transformation, or None for no slots.
    stored: density of the entries that are stored, by path: values and a bit
      for each entry. Slots of the leaf's own shape are as dense, and need no
      bits. None: weights and slots as they are.

  Returns:
    A MemoryCost. Nothing is computed.

  Raises:
    ValueError: if a density is not in [0, 1], or a path is no parameter.

  Example:
    >>> import jax.numpy as jnp
    >>> params = [jnp.ones((8, 8)), jnp.ones((8, 8))]
    >>> def model(params, x):
    ...   return x @ params[0] @ params[1]
    >>> memory_cost(model, params, jnp.ones((4, 8)), stored={'1': .25})
    MemoryCost(weights=328, slots=0, saved_activations=128)

  Reference:
    Bits of a mask: Evci et al., RigL, 2020, https://arxiv.org/abs/1911.11134,
    appendix H.
  """
  params, stored = products.shapes(args[0]), dict(stored or {})
  leaves = trees.leaves_by_path(params)
  for path, density in stored.items():
    checks.check_fraction(f'stored[{path!r}]', density)
    if path not in leaves:
      raise ValueError(f'`stored` has {path!r}, which is none of the '
                       f'parameters {sorted(leaves)}.')
  weights = sum(_bytes(leaf, stored.get(path, 1.)) for path, leaf in
                leaves.items())
  bits = sum(-(-leaves[path].size // 8) for path, density in stored.items()
             if density < 1)
  return MemoryCost(weights + bits, _slot_bytes(optimizer, params, stored),
                    _residual_bytes(fn, args))


def _bytes(leaf, density=1.) -> int:
  return round(leaf.size * density) * np.dtype(leaf.dtype).itemsize


def _slot_bytes(optimizer, params, stored) -> int:
  if optimizer is None:
    return 0
  leaves = trees.leaves_by_path(params)
  total = 0
  for path, slot in trees.leaves_by_path(
      jax.eval_shape(optimizer.init, params)).items():
    owner = trees.owner_of(path, leaves)
    own = owner is not None and leaves[owner].shape == slot.shape
    total += _bytes(slot, stored.get(owner, 1.) if own else 1.)
  return total


def _residual_bytes(fn, args) -> int:
  def residuals(params, *rest):
    return jax.tree.leaves(jax.vjp(lambda p: fn(p, *rest), params)[1])

  jaxpr, _ = products.open_jaxpr(jax.make_jaxpr(residuals)(*args))
  made = {var for eqn in jaxpr.eqns for var in eqn.outvars}
  kept = {var for var in jaxpr.outvars if not products.is_literal(var)}
  return sum(_bytes(var.aval) for var in made & kept)
