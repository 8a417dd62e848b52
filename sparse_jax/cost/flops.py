"""What training costs: FLOPs of each pass and layer.

FLOPs are read from the products of the function itself. There are two
conventions, and a count stays in the one it was made in:

* 'multiply_adds', SWAT's: multiply-adds of the products, and a backward
  product only where there is something to differentiate. So the first layer
  has no gradient to its input.
* 'rigl', RigL's: multiplications plus additions, with one more for a bias and
  one for a ReLU at every output of every layer, and a backward pass of twice
  the forward pass whatever the layer.

Batch norm, losses, optimizers and the selection of masks are in neither.
"""

from collections.abc import Callable
from collections.abc import Mapping
import math
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparse_jax import checks
from sparse_jax import trees
from sparse_jax.jaxprs import products as products_lib
from sparse_jax.masks import marks as marks_lib
from sparse_jax.rules import state as state_lib

Product = products_lib.Product
Work = state_lib.Work

_CONVENTIONS = ('multiply_adds', 'rigl')
_DENSE = Work(1., 1., 1.)
_OTHER = 'other products'


class FlopCount(NamedTuple):
  """FLOPs of a function's products, by the parameter that each uses.

  Example:
    >>> count = count_flops(lambda p, x: jnp.tanh(x @ p['a']) @ p['b'],
    ...                     {'a': jnp.ones((3, 4)), 'b': jnp.ones((4, 2))},
    ...                     jnp.ones((1, 3)), convention='multiply_adds')
    >>> count.forward, count.unattributed, count.total
    ({'a': 12, 'b': 8}, 0, 20)
  """

  convention: str  # 'multiply_adds' or 'rigl'.
  products: tuple[Product, ...]  # As `find_products` lists them.
  params: trees.PyTree  # The shapes of the parameters.

  @property
  def forward(self) -> dict[trees.Path, float]:
    """FLOPs of each parameter's products; those that use none are left out.

    A product by several parameters (put side by side, or added) is shared
    among them by their sizes.
    """
    return _by_path([(p, self.flops(p)) for p in self.products if p.leaves])

  @property
  def unattributed(self) -> int:
    """FLOPs of products that use no parameter, such as attention's scores."""
    return sum(self.flops(p) for p in self.products if not p.leaves)

  @property
  def total(self) -> int:
    return sum(self.flops(p) for p in self.products)

  def flops(self, product: Product, density: float = 1.):
    """FLOPs of all runs of one product at a density of its operand."""
    return product.times * _flops(product, density, self.convention)

  def __str__(self) -> str:
    rows = [('leaf', self.convention, 'share')]
    for path, flops in (self.forward | {_OTHER: self.unattributed,
                                        'total': self.total}).items():
      rows.append((path, f'{flops:,.0f}', f'{flops / (self.total or 1):.2%}'))
    return _table(rows) + _while_note(self.products)


class Passes(NamedTuple):
  """FLOPs of the three passes of training."""

  forward: float
  input_gradient: float
  weight_gradient: float

  @property
  def total(self) -> float:
    return sum(self)


class LayerCost(NamedTuple):
  """Training FLOPs of one parameter's products; None: of all the others."""

  path: trees.Path | None
  dense: Passes
  sparse: Passes


class TrainingCost(NamedTuple):
  """FLOPs of a training step, layer by layer, and against dense training.

  `training_cost` makes it and has an example; `print(cost)` shows a table.
  """

  convention: str  # That of the FlopCount.
  layers: tuple[LayerCost, ...]  # FLOPs of the three passes, leaf by leaf.

  @property
  def dense(self) -> Passes:
    return _sum([layer.dense for layer in self.layers])

  @property
  def sparse(self) -> Passes:
    return _sum([layer.sparse for layer in self.layers])

  @property
  def multiplier(self) -> float:
    """FLOPs of training as a fraction of those of dense training."""
    return self.sparse.total / self.dense.total

  @property
  def forward_multiplier(self) -> float:
    """The same for the forward pass alone; inference, if it stays as it is."""
    return self.sparse.forward / self.dense.forward

  @property
  def reduction(self) -> float:
    """1 - multiplier."""
    return 1 - self.multiplier

  @property
  def theoretical_speedup(self) -> float:
    """1 / (1 - reduction): if time followed FLOPs."""
    return theoretical_speedup(self.reduction)

  def __str__(self) -> str:
    rows: list[tuple[str, ...]] = [
        ('leaf', 'forward', 'input gradient', 'weight gradient', 'of dense')]
    whole = LayerCost('total', self.dense, self.sparse)
    for path, dense, sparse in (*self.layers, whole):
      share = sparse.total / dense.total if dense.total else 1.
      rows.append((path or _OTHER, *(f'{flops:,.0f}' for flops in sparse),
                   f'{share:.2%}'))
    return _table(rows)


def count_flops(fn: Callable[..., Any], *args: Any,
                convention: str = 'multiply_adds',
                params_argnum: int = 0) -> FlopCount:
  """Counts the FLOPs of a function's matrix products and convolutions.

  They are read from the function's jaxpr: nothing is computed, no layer need
  be annotated, and what loops and branches do is counted (`find_products`
  says how). Products that use a parameter are attributed to its leaf.

  Args:
    fn: a function of arrays, say of parameters and inputs.
    *args: its arguments: trees of arrays, or of jax.ShapeDtypeStruct. FLOPs
      are those of the batch given.
    convention: 'multiply_adds' or 'rigl'; the module's head explains them.
    params_argnum: which argument is the tree of parameters.

  Returns:
    A FlopCount: printable, and the argument of `training_cost`.

  Raises:
    ValueError: naming the argument that is out of range.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> params = {'hidden': jnp.ones((3, 8)), 'head': jnp.ones((8, 2))}
    >>> def model(params, x):
    ...   return jax.nn.relu(x @ params['hidden']) @ params['head']
    >>> print(count_flops(model, params, jnp.ones((5, 3))))
    leaf            multiply_adds   share
    hidden                    120  60.00%
    head                       80  40.00%
    other products              0   0.00%
    total                     200 100.00%

  Reference:
    RigL's convention: Evci et al., 2020, https://arxiv.org/abs/1911.11134,
    appendix H and the notebook of its code. A bias and a ReLU are counted for
    each layer, as there, whether or not it has them.
  """
  if convention not in _CONVENTIONS:
    raise ValueError(f'`convention` (={convention!r}) must be one of '
                     f'{_CONVENTIONS}.')
  found = products_lib.find_products(fn, *args, params_argnum=params_argnum)
  return FlopCount(convention, tuple(found),
                   products_lib.shapes(args[params_argnum]))


def training_cost(flops: FlopCount,
                  method: state_lib.SparseMethod | Mapping[trees.Path, Work],
                  *, steps: int | None = None, state: Any = None
                  ) -> TrainingCost:
  """FLOPs of training by a sparse method, beside those of dense training.

  Each product costs one of its size forward, one for the gradient to its
  input and one for that to its weight, each at the density that the method
  states for its leaf. Products of no parameter are dense.

  Laws: with all densities 1 the multiplier is 1; in 'multiply_adds' the dense
  cost is what `count_flops` finds in the gradient of the model.

  Args:
    flops: the model's, from `count_flops`; its convention is kept.
    method: a method, or the `Work` of each sparse leaf by path. Leaves that
      are not named are dense.
    steps: length of the run over which a method's work is averaged.
    state: the method's or the optimizer's state after the run. Where budgets
      have moved between leaves (DSR, SNFS, SWAT-M, global scopes), the work
      that the method states for a leaf is scaled to what its masks keep in the
      end; None counts the budgets of the start.

  Returns:
    A TrainingCost, printable.

  Raises:
    ValueError: if the method states no work, `steps` is missing, a path is no
      parameter, or there are no products.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> params = {'hidden': jnp.ones((3, 8)), 'head': jnp.ones((8, 2))}
    >>> def model(params, x):
    ...   return jax.nn.relu(x @ params['hidden']) @ params['head']
    >>> flops = count_flops(model, params, jnp.ones((5, 3)))
    >>> cost = training_cost(flops, {'head': Work(.25, .25, .5)})
    >>> print(cost)
    leaf            forward  input gradient  weight gradient  of dense
    hidden              120               0              120  100.00%
    head                 20              20               40   33.33%
    other products        0               0                0  100.00%
    total               140              20              160   66.67%

  Reference:
    Evci et al., RigL, 2020, https://arxiv.org/abs/1911.11134, appendix H;
    Raihan and Aamodt, SWAT, 2020, https://arxiv.org/abs/2001.01969.
  """
  work = _work_of(method, flops.params, steps, state)
  unknown = sorted(set(work) - set(trees.leaves_by_path(flops.params)))
  if unknown:
    raise ValueError(f'`method` works on {unknown}, which are none of the '
                     'parameters '
                     f'{sorted(trees.leaves_by_path(flops.params))}.')
  if not flops.total:
    raise ValueError('`flops` (=0) has no products to train.')
  paths = dict.fromkeys(path for p in flops.products for path in p.leaves)
  tables = _training(flops, {}), _training(flops, work)
  return TrainingCost(flops.convention, tuple(
      LayerCost(path, *(table.get(path, Passes(0, 0, 0)) for table in tables))
      for path in (*paths, None)))


def theoretical_speedup(reduction: float) -> float:
  """1 / (1 - reduction): how much faster, if time followed FLOPs.

  Raises ValueError unless the reduction is in [0, 1).

  Example:
    >>> round(theoretical_speedup(0.67), 2)
    3.03

  Reference:
    The authors' answer to the reviewers of Raihan and Aamodt, SWAT, 2020:
    3.03 for RigL, at a reduction of 0.67, and 4.16 for SWAT, at 0.76.
  """
  return 1 / (1 - checks.check_sparsity('reduction', reduction))


def _flops(product, density, convention):
  work = product.multiply_adds if density == 1 else (
      product.multiply_adds * density)
  return work if convention == 'multiply_adds' else 2 * work + product.outputs


def _by_path(pairs):
  """Sums the FLOPs of products by leaf, shared by size among several."""
  sums = {}
  for product, flops in pairs:
    whole = sum(product.leaves.values())
    for path, size in product.leaves.items():
      share = flops if len(product.leaves) == 1 else flops * size / whole
      sums[path] = sums.get(path, 0) + share
  return sums


def _work_of(method, params, steps, state):
  if isinstance(method, Mapping):
    return {path: _checked(path, work) for path, work in method.items()}
  if not isinstance(method, state_lib.SparseMethod):
    raise ValueError(f'`method` (={method!r}) must be a SparseMethod or the '
                     'Work of each leaf by path.')
  if method.work is None:
    raise ValueError(f'`method` (={method!r}) does not state its work.')
  if steps is None:
    raise ValueError('`steps` (=None) must be the length of the run, over '
                     'which the work of the method is averaged.')
  work = method.work(params, checks.check_count('steps', steps, least=1))
  return work if state is None else _moved(work, state_lib.get_state(state))


def _moved(work, state) -> dict[trees.Path, Work]:
  """The work where masks keep another share of a leaf than was planned.

  What all such leaves leave out together stays that of `work`: it may still
  grow at the end of a run.
  """
  zeros = {}
  for path, kept in jax.device_get(_kept(state)).items():
    leaf = state.plan.by_path[path]
    layout = leaf.layout
    rivalries = math.prod(layout.group_shape) // max(layout.rivals, 1)
    if path in work and kept != leaf.count * rivalries:
      zeros[path] = [math.prod(layout.shape) * (1 - layout.share(count))
                     for count in (leaf.count, kept / rivalries)]
  planned, now = (sum(both) for both in zip((0, 0), *zeros.values()))
  moved = dict(work)
  for path, (ours, left) in zeros.items():
    ratio = left / now * planned / ours if now and ours else 1.
    moved[path] = Work(*(max(0., 1 - (1 - share) * ratio)
                         for share in work[path]))
  return moved


@jax.jit
def _kept(state) -> dict[trees.Path, jax.Array]:
  """How many groups of each leaf are in the forward set."""
  marks = trees.leaves_by_path(state.marks)
  return {path: jnp.sum(marks_lib.forward_mask(marks[path]), dtype=jnp.int32)
          for path in state.plan.by_path}


def _checked(path, work) -> Work:
  return Work(*(checks.check_fraction(f'method[{path!r}].{name}', share)
                for name, share in zip(Work._fields, work, strict=True)))


def _training(flops: FlopCount, work) -> dict[trees.Path | None, Passes]:
  sums: dict[trees.Path | None, Passes] = {}
  for product in flops.products:
    for path, share in _shares(product).items():
      passes = _passes(flops, product, work.get(path, _DENSE))
      sums[path] = _sum([sums.get(path, Passes(0, 0, 0)),
                         Passes(*(flops * share for flops in passes))])
  return sums


def _shares(product):
  if not product.leaves:
    return {None: 1}
  whole = sum(product.leaves.values())
  return {path: size / whole if len(product.leaves) > 1 else 1
          for path, size in product.leaves.items()}


def _passes(flops: FlopCount, product: Product, work: Work) -> Passes:
  forward, *backward = (flops.flops(product, density) for density in work)
  if flops.convention == 'multiply_adds':
    sides = [getattr(product, side).depends for side in _sides(product)]
    backward = [cost * needed for cost, needed in zip(backward, sides)]
  return Passes(forward, *backward)


def _sides(product):
  """The operands: the input, then the weight."""
  return ('rhs', 'lhs') if product.weight == 'lhs' else ('lhs', 'rhs')


def _sum(passes) -> Passes:
  return Passes(*map(sum, zip(*passes)))


def _table(rows) -> str:
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  return '\n'.join('  '.join(
      cell.ljust(width) if i == 0 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths))).rstrip()
                   for row in rows)


def _while_note(products) -> str:
  count = sum(product.in_while for product in products)
  return f'\n{count} of them in a `while`, counted once' if count else ''
