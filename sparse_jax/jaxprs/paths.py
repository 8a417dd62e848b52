"""Which weights lie on a path from an input to an output of a function.

The function's jaxpr is run on flows instead of numbers, and differentiated:
a weight that is kept is on a path if the gradient there is positive.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from sparse_jax import trees
from sparse_jax.jaxprs import flows as flows_lib
from sparse_jax.jaxprs import products

Flow = flows_lib.Flow
_LOOPS_OF_A_WHILE = 8


def effective_masks(fn: Callable[..., Any], masks: trees.PyTree, *inputs: Any,
                    params: trees.PyTree | None = None) -> trees.PyTree:
  """The kept weights that lie on a path from an input to an output.

  A path leads from an entry of the inputs through values that are computed
  from one another and through kept weights. Of a product of two values that
  both hear the inputs (a gate, an attention's score and value) it leads
  through either if the other can be other than 0. The mean or norm that a
  normalisation takes of the very values that it scales leads from none of
  them to another. A bias (anything that is added) has the constant 1 for its
  input: it counts if it leads to an output, but what hears nothing besides is
  not reached. What an index of the inputs looks up in a table hears them.
  What is not known (a kernel, a decomposition, a program for several devices)
  is taken to lead from all it is given to all it gives; a `while` is followed
  for eight rounds.

  Laws: nothing that is not in `masks` is in the result; with the result for
  masks the result is the same; it does not depend on the numbers, only on the
  shapes of inputs and weights.

  Args:
    fn: `fn(weights, *inputs)`, a function of arrays. Every output counts, so
      that what is not a prediction (new batch statistics, say) is better left
      out. Arrays that it closes over are constants.
    masks: a tree of bool[...] like the parameters. A leaf that is never
      sparse is None, or an array of another dtype, or a jax.ShapeDtypeStruct.
    *inputs: trees of arrays or of jax.ShapeDtypeStruct, everything else that
      `fn` takes. One example is enough. A random key is no input.
    params: the parameters, or their shapes. Needed where None in `masks`
      stands for what is more than a bias or a scale.

  Returns:
    A tree like `masks`, bool[...] where it is.

  Raises:
    ValueError: if `masks` holds no mask, or `fn` cannot take its leaves.

  Example:
    >>> masks = {'a': jnp.array([[1, 1, 0]], bool),
    ...          'b': jnp.array([[1], [0], [1]], bool)}
    >>> fn = lambda weights, x: jnp.tanh(x @ weights['a']) @ weights['b']
    >>> found = effective_masks(fn, masks, jnp.ones((1, 1)))
    >>> {name: mask.ravel().astype(int).tolist()
    ...  for name, mask in found.items()}
    {'a': [1, 0, 0], 'b': [1, 0, 0]}

  Reference:
    Vysogorets and Kempe, Connectivity matters, 2021,
    https://arxiv.org/abs/2107.02306. Here paths are followed exactly, with
    zeros and ones that cannot overflow, and through any function.
  """
  leaves, tree = jax.tree.flatten(masks, is_leaf=_is_none)
  if not any(map(is_mask, leaves)):
    raise ValueError(f'`masks` (of {sorted(trees.leaves_by_path(masks))}) must '
                     'hold a mask of bools.')
  jaxpr, places = _trace(fn, masks, inputs, params)

  def heard(kept):
    given = [flows_lib.of_parameter(kept[place] if place in kept else jnp.ones(
        var.aval.shape, jnp.float32)) for place, var in zip(
            places, jaxpr.jaxpr.invars)]
    given += [flows_lib.of_input(var.aval)
              for var in jaxpr.jaxpr.invars[len(places):]]
    outs = _run(jaxpr, given)
    return sum(jnp.sum(f.reach) for f in outs if f.reach is not None)

  kept = {i: jnp.asarray(leaf, jnp.float32) for i, leaf in enumerate(leaves)
          if is_mask(leaf)}
  on_path = jax.jit(jax.grad(lambda kept: 0. + heard(kept)))(kept)
  return jax.tree.unflatten(tree, [
      leaf & (on_path[i] > 0) if i in kept else leaf
      for i, leaf in enumerate(leaves)])


def is_mask(leaf: Any) -> bool:
  """Whether a leaf of a tree of masks is one."""
  return getattr(leaf, 'dtype', None) == bool and not isinstance(
      leaf, jax.ShapeDtypeStruct)


def _is_none(leaf) -> bool:
  return leaf is None


@jax.tree_util.register_static
class _AnyShape:
  """A leaf of which nobody said the shape: it has the shape that is asked."""

  dtype = jnp.dtype('float32')

  def __jax_array__(self):
    return jnp.ones(())

  def reshape(self, *shape):
    shape = shape[0] if len(shape) == 1 else shape
    return jnp.ones((1,) * (len(shape) if hasattr(shape, '__len__') else 1))

  def astype(self, dtype):
    del dtype
    return self


def _trace(fn, masks, inputs, params):
  """The jaxpr, and the place among the masks of each of its parameters."""
  names = {trees.path_name(path): i for i, (path, _) in enumerate(
      jax.tree.leaves_with_path(masks, is_leaf=_is_none))}
  table = {path: leaf for path, leaf in trees.leaves_by_path(masks).items()}
  if params is None:
    leaves, tree = jax.tree.flatten(masks, is_leaf=_is_none)
    shapes = {i: _shape(leaf) for i, leaf in enumerate(leaves)
              if leaf is not None}
    places = list(shapes)
  else:
    named, tree = jax.tree.flatten_with_path(params)
    shapes, places = {}, []
    for i, (path, leaf) in enumerate(named):
      name = trees.path_name(path)
      mask = table.get(name)
      if is_mask(mask) and mask.shape != leaf.shape:
        raise ValueError(f'`masks` has a mask of shape {mask.shape} for '
                         f'{name!r} of `params`, of shape {leaf.shape}.')
      shapes[i] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
      places.append(names.get(name, -1))
    missing = sorted(path for path, mask in table.items() if is_mask(mask)
                     and names[path] not in places)
    if missing:
      raise ValueError(f'`masks` has masks for {missing}, which `params` (of '
                       f'{sorted(trees.leaves_by_path(params))}) lacks.')

  def called(weights, *inputs):
    full = [weights.get(i, _AnyShape()) for i in range(tree.num_leaves)]
    return fn(jax.tree.unflatten(tree, full), *inputs)

  try:
    return jax.make_jaxpr(called)(shapes, *inputs), places
  except Exception as error:
    unknown = sorted(set(names) - set(table))
    if not unknown or params is not None:
      raise
    raise ValueError(
        f'`masks` has None for {unknown}, and `fn` cannot do without their '
        f'shapes: give `params=` ({error}).') from error


def _shape(leaf):
  dtype = jnp.float32 if is_mask(leaf) else leaf.dtype
  return jax.ShapeDtypeStruct(leaf.shape, dtype)


def _run(jaxpr, flows) -> list[Flow]:
  """The flows of a jaxpr's outputs."""
  inner, consts = products.open_jaxpr(jaxpr)
  values = dict(zip(inner.invars, flows, strict=True))
  values.update(zip(inner.constvars, map(_constant, consts), strict=True))
  for eqn in inner.eqns:
    with eqn.ctx.manager:
      values.update(zip(eqn.outvars, _outputs(eqn, _of(eqn.invars, values)),
                        strict=True))
  return _of(inner.outvars, values)


def _constant(value):
  return flows_lib.of_constant(jnp.asarray(value))


def _of(atoms, values):
  return [_constant(jnp.asarray(atom.val, atom.aval.dtype))
          if products.is_literal(atom) else values[atom] for atom in atoms]


def _outputs(eqn, flows):
  name, bodies = eqn.primitive.name, products.bodies_of(eqn)
  if all(f.known is not None for f in flows) and not eqn.effects:
    outs = eqn.primitive.bind(*(f.known for f in flows),
                              **eqn.primitive.get_bind_params(eqn.params))
    several = eqn.primitive.multiple_results
    return [flows_lib.of_constant(v) for v in (outs if several else [outs])]
  if name in _STRUCTURES:
    return _STRUCTURES[name](eqn, flows)
  if len(bodies) == 1 and len(
      products.open_jaxpr(bodies[0])[0].invars) == len(flows) and (
          name not in _OUT_OF_REACH):
    return _run(bodies[0], flows)
  return flows_lib.of_outputs(eqn, flows)


# They hold a program that is not what they do to whole arrays.
_OUT_OF_REACH = ('shard_map', 'pallas_call', 'reduce', 'reduce_window',
                 'custom_root', 'custom_linear_solve', *(
                     f'scatter{kind}' for kind in (
                         '', '-add', '-mul', '-min', '-max')))


def _run_cond(eqn, flows):
  index, *operands = flows
  branches = [_run(body, operands) for body in eqn.params['branches']]
  return [flows_lib.either(outs) for outs in zip(*branches)]


def _run_scan(eqn, flows):
  consts, carry = products.scan_parts(eqn)
  kept, first, xs = flows[:consts], flows[consts:consts + carry], flows[
      consts + carry:]

  def body(carried, slices):
    return _run(eqn.params['jaxpr'], [*kept, *carried, *slices])

  return _loop(body, first, xs, eqn.params['length'], eqn.params['reverse'])


def _run_while(eqn, flows):
  """A loop of unknown length: what is heard after any of its first rounds."""
  tests, consts = eqn.params['cond_nconsts'], eqn.params['body_nconsts']
  kept, first = flows[tests:tests + consts], flows[tests + consts:]

  def body(carried, slices):
    del slices
    after = _run(eqn.params['body_jaxpr'], [*kept, *carried])
    return [flows_lib.either(pair) for pair in zip(carried, after)]

  first = [f._replace(known=None) for f in first]
  return _loop(body, first, [], _LOOPS_OF_A_WHILE, False)


def _loop(body, first, xs, length, reverse):
  """The outputs of a scan of `body(carried, slices)`, all of them flows."""
  first = [f._replace(root=f.root and object()) for f in first]
  forms = [_form(f) for f in first]
  slices = [_form(f) for f in xs]
  after = []

  def step(carried, arrays):
    outs = body(list(map(_unpack, carried, forms)),
                list(map(_unpack, arrays, slices)))
    after[:] = map(_form, outs)
    wanted = [*forms, *after[len(forms):]]
    outs = tuple(map(_pack, outs, wanted))
    return outs[:len(forms)], outs[len(forms):]

  while True:  # Until a round hears no input where the first did not.
    start = tuple(map(_pack, first, forms))
    arrays = tuple(map(_pack, xs, slices))
    jax.eval_shape(step, start, jax.tree.map(lambda a: a[0], arrays))
    met = [_meet(*pair) for pair in zip(forms, after)]
    if met == forms:
      break
    forms = met
  carried, ys = lax.scan(step, start, arrays, length=length, reverse=reverse)
  return [*map(_unpack, carried, forms), *map(_unpack, ys, [
      form._replace(root=form.root and object())
      for form in after[len(forms):]])]


class _Form(NamedTuple):
  """Which arrays a flow has, and what else it is."""

  reach: bool
  known: bool
  root: Any
  statistic: bool


def _form(flow: Flow) -> _Form:
  return _Form(flow.reach is not None, flow.known is not None, flow.root,
               flow.statistic)


def _meet(before: _Form, after: _Form) -> _Form:
  """What a carried value has before a round and after it."""
  root = before.root or (object() if after.root is not None else None)
  return _Form(before.reach or after.reach, before.known and after.known, root,
               False)


def _pack(flow, form):
  """The arrays of a flow that the form has."""
  reach = flow.reach
  if form.reach and reach is None:
    reach = (jnp.zeros_like(flow.nonzero) if flow.root is None
             else flows_lib.source(flow.nonzero))
  return (flow.nonzero, reach if form.reach else None,
          flow.known if form.known else None)


def _unpack(arrays, form: _Form) -> Flow:
  nonzero, reach, known = arrays
  return Flow(nonzero, reach, known, form.root, form.statistic)


_STRUCTURES = {'scan': _run_scan, 'while': _run_while, 'cond': _run_cond}
