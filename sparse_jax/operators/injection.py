"""A method's sparse operands, put into a function that nobody edited."""

from collections.abc import Callable
from collections.abc import Mapping, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp

from sparse_jax.masks import allocations
from sparse_jax import checks
from sparse_jax import trees
from sparse_jax.operators import operands as operands_lib
from sparse_jax.operators import sparse_products as operators
from sparse_jax.jaxprs import products
from sparse_jax.jaxprs import replacing
from sparse_jax.masks import selection
from sparse_jax.rules import leaves as leaves_lib
from sparse_jax.rules import state as state_lib
from sparse_jax.rules.state import SparseMethod, Work
from sparse_jax.masks import structures

Operands = operands_lib.Operands


def with_operators(fn: Callable[..., Any], method: SparseMethod,
                   opt_state: Any, *,
                   thresholds: Mapping[trees.Path, Operands] | None = None,
                   due: bool | jax.Array = True,
                   activation_scope: str | int = 'tensor',
                   gradient_scope: str | int = 'tensor',
                   pack: bool | str = True,
                   params_argnum: int = 0) -> Callable[..., Any]:
  """A function like `fn`, whose products have the operands of a method.

  Each product of a parameter for which the method states operands becomes a
  `sparse_dot_general` or `sparse_conv_general_dilated` with those operands.
  They are found in the jaxpr, by the parameter that they multiply by, so that
  the model needs no edit: linen, NNX or plain functions, with `jit`,
  `scan`, `remat` and `vmap` in it. Of a method without operators the result
  is `fn` itself; call it always, and any method fits the loop.

  Laws: where the method states forward operands of 0 (SWAT), the values are
  those of `fn`; in the gradient each product counts as its operands say.

  Args:
    fn: a function of arrays; the weights that it is given are those that
      `method.read` returns.
    method: any method.
    opt_state: of `sparsify`, as for `method.read`.
    thresholds: None for an exact top-k each time; else those of
      `first_operator_thresholds`. The gradient with respect to them is what
      to pass at the next step (see `sparse_dot_general`).
    due: bool[], whether thresholds are measured anew, say every 20 steps;
      not used without them. The first step must be.
    activation_scope, gradient_scope, pack: as of `sparse_dot_general`.
    params_argnum: which argument of `fn` is the tree of weights.

  Raises:
    ValueError: if an argument is out of range, or, with thresholds, if a
      parameter has more than one product or thresholds for another number of
      runs of it. From the result.

  Example:
    >>> import jax.numpy as jnp, sparse_jax
    >>> method = sparse_jax.swat(0., activation_sparsity=.5)
    >>> params, x = {'kernel': jnp.ones((4, 1))}, jnp.array([[1., 4., 2., 3.]])
    >>> state = method.init(params)
    >>> def loss_fn(params):
    ...   apply = sparse_jax.operators.with_operators(
    ...       lambda weights, x: x @ weights['kernel'], method, state)
    ...   return apply(method.read(params, state), x).sum()
    >>> loss, grads = jax.value_and_grad(loss_fn)(params)
    >>> float(loss), grads['kernel'].ravel()
    (10.0, Array([0., 4., 0., 3.], dtype=float32))

  Reference:
    Raihan and Aamodt, SWAT, 2020, https://arxiv.org/abs/2001.01969.
  """
  check_options(method, dict(
      thresholds=thresholds, due=due, activation_scope=activation_scope,
      gradient_scope=gradient_scope, pack=pack))
  if method.operators is None:
    return fn

  def sparse(*args, **kwargs):
    own = functools.partial(fn, **kwargs)
    rule, paths = rule_of(
        method, args[params_argnum], opt_state, own, *args,
        thresholds=thresholds, due=due, activation_scope=activation_scope,
        gradient_scope=gradient_scope, pack=pack, params_argnum=params_argnum)
    return replacing.interpret(own, args, params_argnum, rule, paths)

  return sparse


_OPTIONS = ('thresholds', 'due', 'activation_scope', 'gradient_scope', 'pack')


def check_options(method: SparseMethod, options: Mapping[str, Any]) -> None:
  """Raises TypeError for a keyword that `with_operators` does not have."""
  unknown = sorted(set(options) - set(_OPTIONS))
  if unknown:
    raise TypeError(f'with_method() has no keyword {unknown[0]!r}; those of '
                    f'operators are {_OPTIONS}.')


def rule_of(method: SparseMethod, params: trees.PyTree, opt_state: Any,
            fn: Callable[..., Any], *args: Any,
            thresholds: Mapping[trees.Path, Operands] | None = None,
            due: bool | jax.Array = True,
            activation_scope: str | int = 'tensor',
            gradient_scope: str | int = 'tensor', pack: bool | str = True,
            params_argnum: int = 0):
  """What takes the place of a product, and for which paths.

  Args:
    method, opt_state: as of `with_operators`.
    params: whose operands the method states.
    fn, *args: the function and its arguments.
    thresholds, due, activation_scope, gradient_scope, pack, params_argnum: as
      of `with_operators`.

  Returns:
    A rule of `replacing.interpret`, and a frozenset of paths; `(None,
    frozenset())` of a method without operators.
  """
  if method.operators is None:
    return None, frozenset()
  options = dict(activation_scope=activation_scope, pack=pack,
                 gradient_scope=gradient_scope, due=due)
  stated = method.operators(params, opt_state)
  wanted = {path: operands for path, operands in stated.items()
            if not _is_dense(operands)}
  if thresholds is not None:
    _check_thresholds(thresholds, wanted, products.find_products(
        fn, *args, params_argnum=params_argnum))

  def rule(path, product, lhs, rhs):
    own = options | {'thresholds': thresholds and _of_run(
        thresholds[path], product)}
    return product.apply(
        lhs, rhs,
        dot_general=operators.sparse_dot_general(wanted[path], **own),
        conv_general_dilated=operators.sparse_conv_general_dilated(
            wanted[path], **own))

  return rule, frozenset(wanted)


def first_operator_thresholds(method: SparseMethod, params: trees.PyTree,
                              opt_state: Any, *,
                              times: Mapping[trees.Path, int] | None = None
                              ) -> dict[trees.Path, Operands]:
  """Thresholds for `with_operators` to start from; the first step must be due.

  Args:
    method, params, opt_state: as of `with_operators` and `method.read`.
    times: how often the product of a parameter runs, by path, where a scan
      runs it: `{p.path: p.times for p in find_products(fn, params, ...)}`.
      Each layer of the scan then has thresholds of its own. None for once.

  Returns:
    `{path: Operands}` of float32[], for each parameter with operands, or
    float32[times]; empty of a method without operators.

  Example:
    >>> import jax.numpy as jnp, sparse_jax
    >>> method, params = sparse_jax.swat(.5), {'kernel': jnp.ones((4, 1))}
    >>> list(first_operator_thresholds(method, params, method.init(params)))
    ['kernel']
  """
  if method.operators is None:
    return {}
  wanted = [path for path, operands
            in method.operators(params, opt_state).items()
            if not _is_dense(operands)]
  return {path: _for_runs(operators.first_thresholds(),
                          (times or {}).get(path, 1)) for path in wanted}


def add_operands(method: SparseMethod, operands: Operands, *,
                 is_sparse: selection.IsSparse = None) -> SparseMethod:
  """A method whose products have sparse operands besides.

  With `dense()` it is every combination that SWAT's authors study: forward
  weights or activations, backward ones, output gradients (meProp). Operands
  of weights are unstructured and chosen at every product.

  Args:
    method: any method that states no operands of its own.
    operands: the same for all products of the parameters below.
    is_sparse: whose products; as in `static`.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> import jax.numpy as jnp, sparse_jax
    >>> method = add_operands(sparse_jax.dense(), Operands(output_gradient=.9))
    >>> params = {'kernel': jnp.ones((4, 6)), 'bias': jnp.ones(6)}
    >>> list(method.operators(params, method.init(params)))
    ['kernel']

  Reference:
    Raihan and Aamodt, 2020, as above, figures 1 and 2. Sun et al., meProp,
    2017, https://arxiv.org/abs/1706.06197.
  """
  if not isinstance(method, SparseMethod) or method.operators is not None:
    raise ValueError(f'`method` (={method!r}) must be a SparseMethod without '
                     'operators of its own.')
  operands_lib.checked(operands, 'tensor', 'tensor',
                       structures.Unstructured(), (), True)
  sites = leaves_lib.Sites(0., allocations.uniform, structures.Unstructured(),
                           is_sparse, (), None).checked()

  def stated(params, state):
    own = state_lib.get_state(state).plan.own(params)
    return dict.fromkeys(sites.leaves(own), operands)

  def work(params, steps):
    own = method.work(params, steps)
    return own | {path: _scaled(own.get(path, Work(1., 1., 1.)), operands)
                  for path in sites.leaves(params)}

  return method._replace(operators=stated, work=method.work and work)


def _is_dense(operands: Operands) -> bool:
  return all(not isinstance(s, jax.Array) and s == 0 for s in operands)


def _scaled(work: Work, operands: Sequence[Any]) -> Work:
  """The work left, if sparse operands meet by chance."""
  weight, activation, back, saved, gradient = (1 - s for s in operands)
  return Work(work.forward * weight * activation,
              work.input_gradient * back * gradient,
              work.weight_gradient * saved * gradient)


def _for_runs(thresholds: Operands, times: int) -> Operands:
  checks.check_count('times', times, least=1)
  if times == 1:
    return thresholds
  return Operands(*(jnp.full(times, t) for t in thresholds))


def _of_run(thresholds: Operands, product) -> Operands:
  """Those of the run of a scan that is being replaced."""
  if product.times == 1:
    return thresholds
  return Operands(*(jnp.asarray(t)[product.run] for t in thresholds))


def _check_thresholds(thresholds, wanted, found) -> None:
  """Raises ValueError unless each set of thresholds serves one product."""
  missing = sorted(set(wanted) - set(thresholds))
  if missing:
    raise ValueError(f'`thresholds` (of {sorted(thresholds)}) has none for '
                     f'{missing}.')
  for path in wanted:
    runs = [p.times for p in found if p.path == path]
    given = thresholds[path].forward_weight.shape
    if given != (() if runs == [1] else tuple(runs)):
      raise ValueError(
          f'`thresholds` of {path!r} (of shape {given}) must be one for each '
          f'run of a single product; its products run {runs} times.')
