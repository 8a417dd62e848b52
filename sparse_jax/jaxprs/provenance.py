"""Where a value comes from: the program, data, parameters, or a mix.

The rules by which a walk over a jaxpr follows a value back to the leaves of
the parameter tree of which it is a view.
"""

from collections.abc import Sequence
import enum
import math
from typing import Any
from typing import NamedTuple

import jax.numpy as jnp

from sparse_jax import trees


class Kind(enum.IntEnum):
  """What a value is; of two that meet, the higher decides."""

  CONSTANT = 0  # Written in the program.
  MASK = 1  # Bools, whatever they are made of, or made of bools.
  DATA = 2  # An argument, or made of arguments.
  WEIGHT = 3  # A view of parameters.
  ACTIVATION = 4  # Depends on parameters, but is no view of them.


class Origin(NamedTuple):
  """Where one value comes from."""

  kind: Kind
  leaves: frozenset[tuple[trees.Path, int]] = frozenset()  # With their sizes.
  enlarged: bool = False  # Repeated by a broadcast.
  mixed: bool = False  # A weight that has met data.

  @property
  def depends(self) -> bool:
    """Whether it depends on parameters at all."""
    return self.kind >= Kind.WEIGHT

  @property
  def plain(self) -> bool:
    """Whether a weight is a view of parameters alone, once each."""
    return not (self.enlarged or self.mixed)


CONSTANT, DATA = Origin(Kind.CONSTANT), Origin(Kind.DATA)
ACTIVATION = Origin(Kind.ACTIVATION)


def of_argument(aval: Any) -> Origin:
  """The origin of an argument that is no parameter."""
  return _noted(DATA, aval)


def of_parameter(path: trees.Path, aval: Any) -> Origin:
  """The origin of a leaf of the parameters; integers and keys are data."""
  if not jnp.issubdtype(aval.dtype, jnp.inexact):
    return of_argument(aval)
  return Origin(Kind.WEIGHT, frozenset([(path, _size(aval))]))


def of_product(lhs: Origin, rhs: Origin) -> Origin:
  """The origin of a matrix product: a view of weights if of nothing else."""
  kinds = {lhs.kind, rhs.kind}
  if max(kinds) != Kind.WEIGHT:
    return Origin(max(kinds))
  weights = [o for o in (lhs, rhs) if o.kind == Kind.WEIGHT]
  if kinds <= {Kind.WEIGHT, Kind.CONSTANT} and all(o.plain for o in weights):
    return Origin(Kind.WEIGHT, _leaves(weights))
  return ACTIVATION


def of_either(origins: Sequence[Origin]) -> Origin:
  """The origin of what holds entries of several values, or is one of them.

  It grows with each origin, so that loops come to rest.
  """
  kind = max((o.kind for o in origins), default=Kind.CONSTANT)
  if kind == Kind.ACTIVATION:
    return ACTIVATION
  return Origin(kind, _leaves(origins), any(o.enlarged for o in origins),
                any(o.mixed for o in origins))


def of_output(eqn: Any, origins: Sequence[Origin], out: Any) -> Origin:
  """The origin of one output of an ordinary primitive."""
  return _noted(_of_primitive(eqn, origins, out), out.aval)


def _of_primitive(eqn, origins, out):
  name = eqn.primitive.name
  if name == 'gather':
    return _picked(*origins)
  if name == 'dynamic_slice':
    return origins[0]
  if name == 'optimization_barrier':
    return origins[list(eqn.outvars).index(out)]
  if name in _PUT_TOGETHER:
    return of_either([o for o, var in zip(origins, eqn.invars)
                      if var.aval.dtype == out.aval.dtype])
  size = _size(out.aval)
  return _met([o._replace(enlarged=o.enlarged or _size(var.aval) < size)
               for o, var in zip(origins, eqn.invars)])


# Primitives whose result holds entries of several operands side by side.
_PUT_TOGETHER = ('concatenate', 'pad', 'dynamic_update_slice', 'scatter',
                 'scatter-add')


def _met(origins):
  """The origin of what is computed entry by entry.

  What is repeated by a broadcast (a threshold, a norm) does not decide what a
  whole operand is a view of; a scale of data is no view.
  """
  whole = [o for o in origins if o.kind >= Kind.DATA and not o.enlarged]
  deciding = whole or origins
  kind = max((o.kind for o in deciding), default=Kind.CONSTANT)
  if kind != Kind.WEIGHT:
    depends = any(o.depends for o in origins)
    return ACTIVATION if depends else Origin(kind, enlarged=not whole)
  views = [o for o in deciding if o.kind == Kind.WEIGHT]
  foreign = any(o.kind in (Kind.DATA, Kind.ACTIVATION) for o in origins)
  return Origin(kind, _leaves(views), not whole,
                foreign or any(o.mixed for o in views))


def _picked(table, indices):
  """The origin of entries picked by an index: picked by data, it is data."""
  fixed = indices.kind in (Kind.CONSTANT, Kind.WEIGHT)
  return table if fixed or table.kind != Kind.WEIGHT else ACTIVATION


def _noted(origin, aval):
  """The origin, or that of a mask: bools pass no gradient on."""
  is_bool = getattr(aval, 'dtype', None) == bool
  fixed = origin.kind == Kind.CONSTANT
  return Origin(Kind.MASK) if is_bool and not fixed else origin


def _leaves(origins):
  return frozenset().union(*(o.leaves for o in origins))


def _size(aval) -> int:
  return math.prod(getattr(aval, 'shape', ()))
