"""Which way a product of tiles goes: loop, batch, kernel; over a mesh.

Chosen by the platform a program is compiled for, never by the one that
compiles it.
"""

from collections.abc import Callable
import functools
import importlib
from typing import NamedTuple

import jax
from jax import lax

from sparse_jax.blocks import splitting
from sparse_jax.blocks import tiles
from sparse_jax.blocks import unsplit
from sparse_jax.blocks.packing import PackedBlocks
from sparse_jax.blocks.tiles import Columns
from sparse_jax.blocks.tiles import Plan

# The platform of each module of kernels. They import Pallas, which takes half
# as long as all else here, and so wait until a product asks for them.
_KERNELS = {'tpu': 'tpu', 'gpu': 'cuda', 'hopper': 'cuda'}
_CHOSEN = ('tpu', 'gpu')  # Without being named.
IMPLEMENTATIONS = (None, 'loop', 'batched', *_KERNELS)


class _Product(NamedTuple):
  """A product in all its ways, and its derivative.

  Attributes:
    loop, batched: functions of the plan and the operands.
    kernel: of a module of kernels, the plan and the operands, whose shapes it
      looks at: a function of the operands and `interpret`, or None if there
      is no kernel for them.
    derivative: of the plan, the operands and a cotangent: the cotangents to
      the operands.
    layout: how operands and results lie on a mesh.
    split: as `batched`, after the axes of a mesh over which rows are split;
      None if results need no more than a sum over them.
  """

  loop: Callable
  batched: Callable
  kernel: Callable
  derivative: Callable
  layout: splitting.Layout
  split: Callable | None = None


def multiply(plan: Plan, x: jax.Array, blocks: jax.Array, rows: jax.Array,
             columns: jax.Array) -> jax.Array:
  """[height, width]: the input times the tiles, each at its row and column.

  Like all of these, of the dtype of its operands and summed in float32 or
  wider.
  """
  return _run(_MULTIPLY, plan, x, blocks, rows, columns)


def both_gradients(plan: Plan, x: jax.Array, cotangent: jax.Array,
                   blocks: jax.Array, rows: jax.Array, columns: jax.Array
                   ) -> tuple[jax.Array, jax.Array]:
  """The gradients to the input and to the tiles, where they are the same."""
  return _run(_BOTH, plan, x, cotangent, blocks, rows, columns)


def input_gradient(plan: Plan, x: jax.Array, cotangent: jax.Array,
                   blocks: jax.Array, rows: jax.Array, columns: jax.Array
                   ) -> jax.Array:
  """The shape of x: the gradient to it, by the tiles."""
  return _run(_INPUT, plan, x, cotangent, blocks, rows, columns)


def weight_gradient(plan: Plan, x: jax.Array, cotangent: jax.Array,
                    rows: jax.Array, columns: jax.Array) -> jax.Array:
  """[tiles, tall, wide]: the gradient to the tiles."""
  return _run(_WEIGHT, plan, x, cotangent, rows, columns)


def after(plan: Plan, x: jax.Array, cotangent: jax.Array, made: jax.Array
          ) -> tuple[jax.Array, jax.Array]:
  """The cotangent and what was made of it, first if the plan says so.

  Nothing waits for gradients and scores of weights, so that XLA would make
  them last, and keep a cotangent that is wider than the gradient to `x`. Where
  `x` is the wider one it stays: what it is made from is mostly read again by
  the pass that reads the gradient to it, and one pass can do both. An array in
  heads would be copied.
  """
  wide = x.ndim == 2 and x.shape[1] < cotangent.shape[1]
  if not plan.weights_first or not wide or plan.heads:
    return cotangent, made
  return lax.optimization_barrier((cotangent, made))


def growth_scores(plan: Plan, x: jax.Array, packed: PackedBlocks,
                  cotangent: jax.Array) -> jax.Array:
  """float32[grid]: each tile of the dense gradient, reduced to a number.

  The gradient is made and dropped a row of tiles at a time, which is what
  several devices sum. By a kernel, or over several devices, the scores have no
  derivative.
  """
  static = packed.grid[0], packed.block, packed.reduce, packed.dtype
  loop = functools.partial(tiles.scores_loop, static)

  def split(rows, *args):
    return loop(*args, total=lambda grad: lax.psum(grad, rows))

  product = _Product(
      loop, loop, functools.partial(_scores_kernel, static),
      lambda *_: (None, None), splitting.Layout('xy', 's'), split)
  return _run(product, plan, x.astype(cotangent.dtype), cotangent)


def _run(product, plan, *args):
  """By the plan's implementation, or else by mesh and platform."""
  if plan.implementation in ('loop', 'batched'):
    return getattr(product, plan.implementation)(plan, *args)
  if splitting.split_of(plan, args) or _kernels(product, plan, args):
    return _run_fast(product, plan, *args)
  if plan.implementation is not None:
    raise ValueError(f'`implementation` (={plan.implementation!r}) has no '
                     f'kernel for blocks of {plan.inputs.size} x '
                     f'{plan.outputs.size} and x of {args[0].dtype} and shape '
                     f'{args[0].shape}.')
  return lax.platform_dependent(
      *args, cpu=functools.partial(product.loop, plan),
      default=functools.partial(product.batched, plan))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run_fast(product, plan, *args):
  """As `_run`, by what has no derivative: over a mesh, or by a kernel."""
  split = splitting.split_of(plan, args)
  if split:
    part = functools.partial(_run, product)
    if split.rows and product.split:
      part = functools.partial(product.split, split.rows)
    return splitting.run(split, product.layout, plan, args, part)
  kernels = _kernels(product, plan, args)
  loop, batched = (functools.partial(way, plan)
                   for way in (product.loop, product.batched))
  if plan.implementation is not None:
    kernel, = kernels.values()
    simulated = functools.partial(kernel, interpret=True)
    return lax.platform_dependent(
        *args, cpu=simulated if plan.implementation in _CHOSEN else loop,
        default=kernel)
  kernels = {platform: unsplit.unless_split(kernel, batched)
             for platform, kernel in kernels.items()}
  return lax.platform_dependent(*args, **kernels, cpu=loop, default=batched)


_run_fast.defvjp(
    lambda product, plan, *args: (_run_fast(product, plan, *args), args),
    lambda product, plan, args, out: product.derivative(plan, args, out))


def _kernels(product, plan, args):
  """By platform, those that take these shapes and that the plan allows."""
  if not isinstance(plan.inputs, Columns):
    return {}
  found = {platform: product.kernel(
      importlib.import_module(f'sparse_jax.blocks.{name}'), plan, *args)
           for name, platform in _KERNELS.items()
           if plan.implementation == name
           or plan.implementation is None and name in _CHOSEN}
  return {name: kernel for name, kernel in found.items() if kernel is not None}


def _multiply_kernel(module, plan, x, blocks, *_):
  if not module.product_fits(x, blocks.shape[1:], len(blocks), plan.width):
    return None
  return functools.partial(module.block_product, width=plan.width,
                           **_heads(module, plan.heads))


def _input_kernel(module, plan, x, cotangent, blocks, *_):
  shape = dict(width=x.shape[1], transpose=True)
  if not module.product_fits(cotangent, blocks.shape[1:], len(blocks),
                             **shape):
    return None
  shape |= _heads(module, plan.heads and plan.heads.turned())
  return lambda x, cotangent, blocks, rows, columns, **options: (
      module.block_product(cotangent, blocks, columns, rows, **shape,
                           **options))


def _weight_kernel(module, plan, x, cotangent, rows, columns):
  block = plan.inputs.size, plan.outputs.size
  if not module.gradient_fits(x, cotangent, block, rows.size):
    return None
  return functools.partial(module.block_gradient, block=block,
                           **_heads(module, plan.heads))


def _both_kernel(module, plan, x, cotangent, blocks, rows, columns):
  to_input = _input_kernel(module, plan, x, cotangent, blocks)
  to_weight = _weight_kernel(module, plan, x, cotangent, rows, columns)
  if to_input is None or to_weight is None:
    return None

  def both(x, cotangent, blocks, *at, **options):
    grad = to_weight(x, cotangent, *at, **options)
    cotangent, grad = after(plan, x, cotangent, grad)
    return to_input(x, cotangent, blocks, *at, **options), grad

  return both


def _scores_kernel(static, module, plan, x, cotangent):
  _, block, reduce, dtype = static
  if not module.scores_fit(x, block):
    return None
  return functools.partial(module.growth_scores, block=block, reduce=reduce,
                           dtype=dtype, **_heads(module, plan.heads))


def _heads(module, heads):
  return {'heads': heads} if module.TAKES_HEADS else {}


def _multiply_derivative(plan, args, out):
  x, blocks, rows, columns = args
  return (*both_gradients(plan, x, out, blocks, rows, columns), None, None)


def _input_derivative(plan, args, out):
  _, cotangent, blocks, rows, columns = args
  return (None, multiply(plan, out, blocks, rows, columns),
          weight_gradient(plan, out, cotangent, rows, columns), None, None)


def _weight_derivative(plan, args, out):
  x, cotangent, rows, columns = args
  return (input_gradient(plan, x, cotangent, out, rows, columns),
          multiply(plan, x, out, rows, columns), None, None)


def _both_derivative(plan, args, outs):
  x, cotangent, blocks, *at = args
  to_x, to_grad = outs
  _, by_x, to_blocks, *_ = _input_derivative(
      plan, (x, cotangent, blocks, *at), to_x)
  own_x, by_grad, *_ = _weight_derivative(plan, (x, cotangent, *at), to_grad)
  return own_x, by_x + by_grad, to_blocks, None, None


_MULTIPLY = _Product(tiles.multiply_loop, tiles.multiply_batched,
                     _multiply_kernel, _multiply_derivative,
                     splitting.Layout('xbbb', 'y'))
_BOTH = _Product(tiles.both_loop, tiles.both_batched, _both_kernel,
                 _both_derivative, splitting.Layout('xybbb', 'xb'))
_INPUT = _Product(tiles.input_loop, tiles.input_batched, _input_kernel,
                  _input_derivative, splitting.Layout('xybbb', 'x'))
_WEIGHT = _Product(tiles.weight_loop, tiles.weight_batched, _weight_kernel,
                   _weight_derivative, splitting.Layout('xybb', 'b'))
