"""Products with packed blocks on several devices: each does its own part.

XLA splits no kernel, and would sum a gradient block by block. Here every
device multiplies its rows of the input by all blocks, or by the blocks of its
columns, and what has to be summed is summed once: the gradient of the blocks
over the rows, that of the input over the columns.
"""

from collections.abc import Callable
from collections.abc import Sequence
import math
from typing import Any
from typing import NamedTuple

import jax
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from sparse_jax.blocks import tiles
from sparse_jax.blocks.packing import PackedBlocks
from sparse_jax.masks import placing

Names = tuple[str, ...]


class Split(NamedTuple):
  """Over which axes of a mesh a product is split."""

  mesh: jax.sharding.AbstractMesh
  names: Names  # All that are not split by hand already.
  rows: Names  # Of the input.
  columns: Names  # Of tiles.


class Layout(NamedTuple):
  """How operands and results of a product lie.

  A letter each: 'x' is like the input, split by rows; 'y' like the output,
  split by rows and columns; 'b' is one for each block, 's' for each tile,
  both split by columns.
  """

  operands: str  # The last of several 'b' are the blocks' columns.
  results: str


def split_of(plan: tiles.Plan, args: Sequence[jax.Array]) -> Split | None:
  """How to split a product of these operands; None on one device.

  The mesh is that of the context, or the one on which the operands lie, which
  is in their types. What XLA splits by itself is in no type, so rows are split
  over as many of the axes as divide them, unless the plan says otherwise.
  """
  mesh = placing.mesh_of(*args)
  sizes = placing.shared_axes(mesh)
  if math.prod(sizes.values()) == 1:
    return None
  columns = tuple(name for name in plan.columns if name in sizes)
  if plan.width // plan.outputs.size % math.prod(sizes[n] for n in columns):
    columns = ()
  rows: tuple[str, ...] = ()
  parts = 1
  for name in sizes if plan.rows is None else plan.rows:
    if name in sizes and name not in columns and (
        args[0].shape[0] % (parts * sizes[name]) == 0):
      rows, parts = (*rows, name), parts * sizes[name]
  return Split(mesh, tuple(sizes), rows, columns)


def run(split: Split, layout: Layout, plan: tiles.Plan, args: tuple,
        product: Callable[..., Any]) -> Any:
  """A product on every device, of what that has.

  Args:
    split: as of `split_of`.
    layout: of operands and results.
    plan: of the whole product.
    args: its operands.
    product: from a plan and operands, one device's, to the results.
  """
  parts = math.prod(split.mesh.shape[name] for name in split.columns)
  own = plan._replace(width=plan.width // parts, rows=(), columns=())

  def part(*args):
    if 'b' in layout.operands and split.columns:
      first = lax.axis_index(split.columns) * (
          own.width // own.outputs.size)
      args = (*args[:-1], args[-1] - first.astype(args[-1].dtype))
    found = product(own, *args)
    several = len(layout.results) > 1
    summed = tuple(_summed(split, kind, result) for kind, result in zip(
        layout.results, found if several else (found,)))
    return summed if several else summed[0]

  specs = {'x': PartitionSpec(split.rows or None),
           'y': PartitionSpec(split.rows or None, split.columns or None),
           'b': PartitionSpec(split.columns or None),
           's': PartitionSpec(None, split.columns or None)}
  outs = tuple(specs[kind] for kind in layout.results)
  bare = jax.sharding.get_abstract_mesh().empty
  mapped = jax.shard_map(
      part, mesh=split.mesh if bare else None,
      in_specs=tuple(specs[kind] for kind in layout.operands),
      out_specs=outs if len(outs) > 1 else outs[0],
      axis_names=set(split.names), check_vma=False)
  return jax.jit(mapped)(*args)


def _summed(split, kind, result):
  """What each device has a part of, summed once."""
  over = {'x': split.columns, 'b': split.rows}.get(kind)
  return lax.psum(result, over) if over else result


def in_types(fn: Callable[..., jax.Array], plan: tiles.Plan, x: jax.Array,
             packed: PackedBlocks) -> jax.Array:
  """fn(plan, x, packed), where types may say how arrays lie.

  On a mesh with explicit axes the rows and columns are split as the types of
  `x` and of the blocks say, and so the type of the output.

  Args:
    fn: from a plan, x and the blocks to an output with the axes of x; run as
      on automatic axes.
    plan: to which the axes are added.
    x: float[..., in].
    packed: the weight.
  """
  if not placing.is_explicit((x, packed.blocks)):
    return fn(plan, x, packed)
  mesh, spec = placing.mesh_of(x, packed.blocks), jax.typeof(x).sharding.spec
  lead = spec[:-1] if len(packed.shape) == 2 else (spec[0],) + (None,) * (
      x.ndim - 2)
  rows, columns = _names(lead), ()  # type: tuple[str, ...], tuple[str, ...]
  if packed.balanced:
    held = _names(jax.typeof(packed.blocks).sharding.spec[:1])
    columns = tuple(name for name in held if name not in rows)
  if columns and packed.grid[1] % math.prod(
      mesh.shape[name] for name in columns):
    columns = ()
  # The output's own width must divide, too, to be split in its type.
  whole = packed.shape[-1] % math.prod(mesh.shape[name] for name in columns)
  out = PartitionSpec(*lead, None if whole else columns or None)
  plan = plan._replace(rows=rows, columns=columns)
  placed = jax.sharding.auto_axes(lambda x, packed: fn(plan, x, packed),
                                  out_sharding=NamedSharding(mesh, out))
  return jax.jit(placed)(x, packed)


def _names(spec) -> Names:
  """The axes of a mesh that entries of a PartitionSpec name."""
  found = [name if isinstance(name, tuple) else (name,)
           for name in spec if name is not None]
  return tuple(name for names in found for name in names)
