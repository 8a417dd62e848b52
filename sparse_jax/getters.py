"""Methods as Flax parameter getters: variables in, sparse variables out."""

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

from flax import nnx

from sparse_jax.rules import state as state_lib


def linen_getter(method: state_lib.SparseMethod, opt_state: Any
                 ) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
  """A function from a linen module's variables to sparse ones.

  Only the collection 'params' is read through the method; the others (batch
  statistics, ...) pass. The module needs no edit and may be anybody's.

  Args:
    method: a sparse method.
    opt_state: an Optax state that contains the method's.

  Returns:
    `getter(variables) -> variables`, to be used inside the loss, so that
    gradients follow the method's backward rule.

  Raises:
    ValueError: if the variables have no 'params'.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, optax, sparse_jax
    >>> model, x = nn.Dense(4), jnp.ones((1, 8))
    >>> variables = model.init(jax.random.key(0), x)
    >>> method = sparse_jax.static(sparsity=0.75)
    >>> tx = sparse_jax.sparsify(optax.sgd(0.1), method)
    >>> opt_state = tx.init(variables['params'])
    >>> getter = sparse_jax.linen_getter(method, opt_state)
    >>> int((getter(variables)['params']['kernel'] != 0).sum())
    8
    >>> y = model.apply(getter(variables), x)
  """
  def getter(variables):
    if 'params' not in variables:
      raise ValueError(f'`variables` (with {sorted(variables)}) must have a '
                       'collection \'params\'.')
    weights = method.read(variables['params'], opt_state)
    return {**variables, 'params': weights}

  return getter


def nnx_getter(method: state_lib.SparseMethod, opt_state: Any
               ) -> Callable[[nnx.Module], nnx.Module]:
  """A function from an NNX module to one that computes with sparse weights.

  The caller's module is untouched: the new one has its own variables, so what
  it updates while running (batch statistics) is to be copied back with
  `nnx.update(model, nnx.state(sparse_model, nnx.BatchStat))`.

  Args:
    method: a sparse method.
    opt_state: an Optax state that contains the method's, or the
      `nnx.Optimizer` that holds it.

  Returns:
    `getter(model) -> model`, to be used inside the loss.

  Example:
    >>> from flax import nnx
    >>> import jax.numpy as jnp, optax, sparse_jax
    >>> model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    >>> method = sparse_jax.static(sparsity=0.75)
    >>> tx = sparse_jax.sparsify(optax.sgd(0.1), method)
    >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    >>> def loss(model):
    ...   sparse = sparse_jax.nnx_getter(method, optimizer)(model)
    ...   return sparse(jnp.ones((1, 8))).sum()
    >>> grads = nnx.grad(loss)(model)
    >>> _ = optimizer.update(model, grads)
    >>> int((model.kernel[...] != 0).sum())
    8
  """
  def getter(model):
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    weights = method.read(params, opt_state)
    # What `nnx_parametrize` has added stays as it is.
    weights = nnx.State({**params, **weights})
    return nnx.merge(graph, weights, rest, copy=True)

  return getter


def nnx_parametrize(method: state_lib.SparseMethod, model: nnx.Module
                    ) -> nnx.Module:
  """`method.parametrize` for an NNX module, in place.

  Thresholds and gates become attributes of the module, `nnx.Param`s like any
  other, so that `nnx.Optimizer(..., wrt=nnx.Param)` trains them. For methods
  that add nothing it does nothing.

  Args:
    method: a sparse method.
    model: the module; call before making its optimizer.

  Returns:
    The same module.

  Example:
    >>> import sparse_jax
    >>> model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    >>> model = nnx_parametrize(sparse_jax.str_(), model)
    >>> model.thresholds['kernel'].shape
    (1, 1)
  """
  params = nnx.state(model, nnx.Param)
  for key, value in method.parametrize(params).items():
    if key in params:
      nnx.update(model, nnx.State({key: value}))
    else:
      setattr(model, key, _as_params(value))
  return model


def _as_params(tree):
  if isinstance(tree, Mapping):
    return nnx.Dict({key: _as_params(value) for key, value in tree.items()})
  return nnx.Param(tree)
