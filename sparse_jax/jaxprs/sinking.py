"""A function whose conditions come first and are handed less."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
from jax import lax
import jax.extend.core as jax_core
import jax.numpy as jnp

from sparse_jax import trees
from sparse_jax.jaxprs import products

# Made entry by entry: not worth being kept in memory.
_CHEAP = frozenset("""
    abs add add_any and broadcast_in_dim cbrt clamp convert_element_type copy
    copy_p div eq exp expm1 ge gt integer_pow iota is_finite le log log1p
    logistic lt max min mul name ne neg not or pow reduce_precision reshape
    rsqrt select_n sign sqrt square squeeze stop_gradient sub tanh transpose
    xor""".split())
_CALLS = frozenset(('jit', 'custom_jvp_call'))


def conditions_first(fn: Callable[..., Any], mark: str,
                     part: Callable[[Any], trees.PyTree],
                     renewed: Callable[..., tuple[Any, ...]]
                     ) -> Callable[..., Any]:
  """A function like `fn`, which settles its conditions before all else.

  XLA writes to memory whatever is handed to a branch, and keeps what a branch
  reads until it has run: an update that is made in place cannot come before.
  So what bears the mark (`jax.ad_checkpoint.checkpoint_name`) is not handed to
  a branch but made again in it, entry by entry, of the arguments of `fn` and
  of what is smaller. Then all else is computed from arguments that depend on
  what the conditions gave. A step that does not take the branch has nothing
  more to write than if there were none.

  Laws: the values are those of `fn`, but for the rounding that XLA chooses in
  a fusion, if `renewed` gives the arguments that it is given. Where nothing is
  traced, nothing is marked, what is marked is made of more than that, or it
  has effects (a print, a callback), it is `fn`.

  Args:
    fn: a function of trees of arrays.
    mark: the name of what is made again.
    part: from what `fn` returns, what the conditions gave.
    renewed: `(args, part) -> args`, the arguments again, made of that part.

  Returns:
    A function of the same arguments.

  Example:
    >>> from jax.ad_checkpoint import checkpoint_name
    >>> def step(flag, x):
    ...   root = checkpoint_name(jnp.sqrt(x), 'again')
    ...   new = lax.cond(flag > 0, lambda y: -1., lambda y: flag, root)
    ...   return new, root
    >>> lean = conditions_first(step, 'again', lambda outs: outs[0],
    ...                         lambda args, new: (jnp.abs(new), args[1]))
    >>> jax.jit(lean)(1., jnp.ones(2))
    (Array(-1., dtype=float32...), Array([1., 1.], dtype=float32))
  """
  def computed(*args):
    leaves = jax.tree.leaves(args)
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves) or any(
        type(leaf).__name__ == 'BatchTracer' for leaf in leaves):
      return fn(*args)
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
    tree = jax.tree.structure(shape)
    program = _Program(closed)
    if closed.effects or not program.lean(mark):
      return jax.tree.unflatten(tree, jax_core.jaxpr_as_fun(closed)(*leaves))
    wanted = part(jax.tree.unflatten(tree, program.ends))
    first = jax.tree.unflatten(jax.tree.structure(part(shape)), program(
        jax.tree.leaves(wanted), leaves))
    after = jax.tree.leaves(renewed(args, first))
    return jax.tree.unflatten(tree, program(program.ends, after))

  return computed


class _Var:
  """A value in a program."""

  def __init__(self, aval):
    self.size = aval.size


class _Step(NamedTuple):
  """An equation among values, and what its branches make first."""

  eqn: Any
  reads: list[Any]
  makes: list[Any]
  again: tuple['_Step', ...] = ()

  @property
  def is_cheap(self) -> bool:
    return _is_cheap(self.eqn)

  @property
  def needs(self) -> list[_Var]:
    """The values that must be there before it runs."""
    made = {var for own in self.again for var in own.makes}
    read = [var for own in (self, *self.again) for var in own.reads]
    return list(dict.fromkeys(var for var in read if not (
        products.is_literal(var) or var in made)))

  def run(self, values) -> None:
    """Adds to `values` what it makes."""
    with self.eqn.ctx.manager:
      if self.again:
        outs = self._lean(values)
      else:
        outs = self.eqn.primitive.bind(
            *_read(self.reads, values),
            **self.eqn.primitive.get_bind_params(self.eqn.params))
        outs = outs if self.eqn.primitive.multiple_results else [outs]
    values.update(zip(self.makes, outs, strict=True))

  def _lean(self, values):
    given, made = self.needs, {var for own in self.again for var in own.makes}

    def branch(place, closed):
      body = closed.jaxpr
      read = {var for own in body.eqns for var in own.invars
              if not products.is_literal(var)}.union(
                  var for var in body.outvars if not products.is_literal(var))
      if not any(var in made and inside in read for var, inside in zip(
          _hashable(self.reads[1:]), body.invars)):
        def run(*args):
          own = dict(zip(given, args, strict=True))
          own.update((var, jnp.zeros(inside.aval.shape, inside.aval.dtype))
                     for var, inside in zip(self.reads[1:], body.invars)
                     if not products.is_literal(var) and var in made)
          return jax_core.jaxpr_as_fun(closed)(*_read(self.reads[1:], own))
        return run

      def run_again(*args):
        own = dict(zip(given, args, strict=True))
        for step in self.again:
          step.run(own)
        # What is made must be one value: two fusions may round it otherwise.
        # XLA writes to memory what it hands to a condition that it cannot know.
        return lax.cond(
            _read(self.reads[:1], own)[0] == place,
            jax_core.jaxpr_as_fun(closed),
            lambda *_: [jnp.zeros(var.aval.shape, var.aval.dtype)
                        for var in body.outvars],
            *_read(self.reads[1:], own))
      return run_again

    branches = [branch(place, closed) for place, closed in enumerate(
        self.eqn.params['branches'])]
    return lax.switch(*_read(self.reads[:1], values), branches,
                      *_read(given, values))


class _Program:
  """The equations of a jaxpr, cheap calls opened.

  It may run twice. What is large and cheap is made anew then.
  """

  def __init__(self, closed):
    inner = closed.jaxpr
    names = {var: _Var(var.aval) for var in (*inner.constvars, *inner.invars)}
    self.inputs = list(names.values())
    self._consts, self._steps, self._kept = closed.consts, [], {}
    self._open(inner, names)
    self.ends = _named(inner.outvars, names)

  def _open(self, jaxpr, names):
    for eqn in jaxpr.eqns:
      reads = _named(eqn.invars, names)
      if eqn.primitive.name == 'jit' and _is_cheap(eqn) and not (
          eqn.params['jaxpr'].consts):
        body = eqn.params['jaxpr'].jaxpr
        inside = dict(zip(body.invars, reads))
        self._open(body, inside)
        names.update(zip(eqn.outvars, _named(body.outvars, inside)))
        continue
      makes = [_Var(var.aval) for var in eqn.outvars]
      names.update(zip(eqn.outvars, makes))
      self._steps.append(_Step(eqn, reads, makes))

  def lean(self, mark: str) -> bool:
    """Makes conditions make what is marked; whether it can and does."""
    makers: dict[Any, Any] = {}
    found = False
    for place, step in enumerate(self._steps):
      if step.eqn.primitive.name == 'cond':
        roots = [var for var in step.reads
                 if not products.is_literal(var) and var in makers and
                 self._steps[makers[var]].eqn.params.get('name') == mark]
        again, whole = self._cone(roots, makers)
        if not whole:
          return False
        found |= bool(roots)
        self._steps[place] = step._replace(again=again)
      elif step.is_cheap:
        makers.update((var, place) for var in step.makes)
    return found

  def _cone(self, roots, makers):
    """The steps that make some values of arrays as large, in order.

    And whether they start from nothing else as large than inputs.
    """
    found, whole = set(), True
    stack = [(root, root.size) for root in roots]
    while stack:
      var, size = stack.pop()
      if products.is_literal(var) or var.size < size:
        continue
      if var not in makers:
        whole &= var in self.inputs
      elif makers[var] not in found:
        found.add(makers[var])
        stack += [(var, size) for var in self._steps[makers[var]].reads]
    return tuple(self._steps[place] for place in sorted(found)), whole

  def __call__(self, wanted, args):
    values = self._kept | dict(zip(self.inputs, (*self._consts, *args),
                                   strict=True))
    needed = {var for var in wanted if not (
        products.is_literal(var) or var in values)}
    chosen = []
    for step in reversed(self._steps):
      if needed.intersection(step.makes):
        needed.update(var for var in step.needs if var not in values)
        chosen.append(step)
    for step in reversed(chosen):
      step.run(values)
      if not step.is_cheap:
        self._kept.update((var, values[var]) for var in step.makes)
    return _read(wanted, values)


def _hashable(atoms):
  return [None if products.is_literal(atom) else atom for atom in atoms]


def _named(atoms, names):
  return [atom if products.is_literal(atom) else names[atom]
          for atom in atoms]


def _read(atoms, values):
  return [atom.val if products.is_literal(atom) else values[atom]
          for atom in atoms]


def _is_cheap(eqn) -> bool:
  name = eqn.primitive.name
  if name in _CALLS:
    return all(map(_is_cheap, products.open_jaxpr(
        products.bodies_of(eqn)[0])[0].eqns))
  return name in _CHEAP
