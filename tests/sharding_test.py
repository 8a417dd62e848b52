"""Many devices: the same run, masks laid out like weights, nothing gathered."""

import contextlib
import functools
import re

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax
from sparse_jax import trees
from tests import methods_test

METHODS = {name: row() for name, row in methods_test.METHODS.items()}
MAIN = tuple(name for name in METHODS if name not in methods_test.VARIANTS)
# Larger than what topk compares pair by pair, of which XLA may gather all.
SHAPES = {'rows': (16, 12), 'columns': (12, 16)}
SPECS = {'rows': PartitionSpec('x'), 'columns': PartitionSpec(None, 'x'),
         'bias': PartitionSpec()}
COLLECTIVE = r'= (.*?) (all-gather|all-to-all|collective-permute)(?:-start)?\('
AXES = {'auto': AxisType.Auto, 'explicit': AxisType.Explicit}
SHARDED = ('static', 'set_', 'rigl', 'gmp', 'top_kast', 'top_kast_random')
# Leaves that refresh together, and arrays of a method's own.
TOGETHER = ('gmp_global', 'snfs', 'str_')


def make_mesh(axis_type=AxisType.Auto):
  return jax.make_mesh((8,), ('x',), axis_types=(axis_type,))


def large_collectives(text, size):
  """The collectives in an HLO that hand around `size` entries or more.

  Short strings to compare: the HLO itself would flood the failure message.
  """
  found = []
  for shape, name in re.findall(COLLECTIVE, text):
    sizes = [np.prod([int(n) for n in dims.split(',') if n], dtype=int)
             for dims in re.findall(r'\[([\d,]*)\]', shape)]
    if max(sizes, default=1) >= size:
      found.append((name, shape[:60]))
  return found


def fake_params():
  rng = np.random.default_rng(6)
  return {'bias': jnp.zeros(12)} | {
      name: jnp.asarray(.1 * rng.normal(size=shape), jnp.float32)
      for name, shape in SHAPES.items()}


def placed(tree, mesh):
  """Each leaf on the mesh as its name asks."""
  return {name: jax.device_put(leaf, NamedSharding(mesh, SPECS[name]))
          for name, leaf in tree.items()}


def shardings_like(tree, params, mesh):
  """Leaves that mirror a parameter lie like it, the others everywhere."""
  def place(path, leaf):
    name = trees.path_name(path).rpartition('/')[2]
    mirrors = name in params and leaf.shape == params[name].shape
    return NamedSharding(mesh, SPECS[name] if mirrors else PartitionSpec())

  return jax.tree.map_with_path(place, tree)


@functools.cache
def one_device_run(name):
  """The SparseState after four steps on one device."""
  tx = sparse_jax.sparsify(optax.adam(.1), METHODS[name])
  step = jax.jit(methods_test.make_step(METHODS[name], tx),
                 compiler_options=methods_test.QUICK)
  params = METHODS[name].parametrize(fake_params())
  state = tx.init(params)
  for t in range(1, 5):
    params, state, _ = step(params, state,
                            methods_test.fake_batch(fake_params(), t))
  return jax.tree.map(np.asarray, state.sparse)


class TreeMapParamsTest(parameterized.TestCase):
  """Loops that build the shardings of a state from those of the parameters."""

  @parameterized.named_parameters(
      ('alone', lambda tx: tx),
      ('chain', lambda tx: optax.chain(optax.clip(1.), tx)),
      ('masked', lambda tx: optax.masked(tx, {'rows': True, 'columns': True,
                                              'bias': True})),
      ('multi_steps', lambda tx: optax.MultiSteps(
          tx, 2).gradient_transformation()))
  def test_slots_are_visited_and_the_method_is_no_parameter(self, outer):
    tx = outer(sparse_jax.sparsify(optax.adamw(1e-3), METHODS['rigl']))
    params = fake_params()
    state = jax.eval_shape(tx.init, params)
    same = optax.tree_utils.tree_map_params(tx, lambda slot, _: slot, state,
                                            params)
    self.assertEqual(jax.tree.structure(same), jax.tree.structure(state))
    mapped = optax.tree_utils.tree_map_params(
        tx, lambda slot, param: (slot.shape, param.shape), state, params,
        transform_non_params=lambda node: type(node).__name__)
    sparse, inner = next(
        node for node in jax.tree.leaves(mapped, is_leaf=is_sparsified)
        if is_sparsified(node))
    self.assertEqual(sparse, 'SparseState')
    shapes = jax.tree.map(lambda param: (param.shape, param.shape), params)
    self.assertEqual((inner[0].mu, inner[0].nu), (shapes, shapes))
    self.assertEqual(inner[0].count, 'ShapeDtypeStruct')

  def test_state_is_laid_by_the_shardings_of_the_parameters(self):
    tx = sparse_jax.sparsify(optax.adam(1e-3), METHODS['rigl'])
    mesh, params = make_mesh(), fake_params()
    specs = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}

    def of_the_rest(node):
      places = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()),
                            node)
      if not isinstance(node, sparse_jax.SparseState):
        return places
      return places._replace(marks=trees.map_leaves(
          lambda path, _: specs[path], node.marks))

    state = jax.eval_shape(tx.init, params)
    places = optax.tree_utils.tree_map_params(
        tx, lambda _, spec: spec, state, specs,
        transform_non_params=of_the_rest)
    self.assertEqual(jax.tree.structure(places), jax.tree.structure(state))
    state = jax.jit(tx.init, out_shardings=places)(placed(params, mesh))
    step = jax.jit(tx.update, out_shardings=(specs, places))
    _, state = step(placed(params, mesh), state, placed(params, mesh))
    for tree in (state.sparse.marks, state.inner[0].mu):
      self.assertEqual(tree['columns'].sharding.spec, SPECS['columns'])

  @parameterized.named_parameters(
      ('static', lambda block: sparse_jax.static(.5, structure=block)),
      ('rigl', lambda block: sparse_jax.rigl(.5, structure=block)),
      ('top_kast', lambda block: sparse_jax.top_kast(
          .75, backward_sparsity=.5, structure=block)))
  def test_slots_of_blocks_are_visited(self, make):
    method = sparse_jax.packed(make(sparse_jax.Block((4, 4))))
    tx = sparse_jax.sparsify(optax.adam(1e-3), method)
    params, state = sparse_jax.start(tx, method, fake_params())
    own = sparse_jax.blocks.without_growth(params)
    mapped = optax.tree_utils.tree_map_params(
        tx, lambda slot, param: slot + param, state, own)
    jax.tree.map(np.testing.assert_array_equal, mapped.inner[0].mu, own)
    jax.tree.map(np.testing.assert_array_equal, mapped.sparse, state.sparse)


def is_sparsified(node):
  return isinstance(node, sparse_jax.transforms.SparsifyState)


class DataParallelTest(parameterized.TestCase):

  def test_masks_and_loss_are_those_of_one_device(self):
    """Every method: batch split over 8 devices, parameters copied."""
    for part in methods_test.parts({name: METHODS[name] for name in MAIN}):
      self.check_same(part)

  def check_same(self, methods):
    optimizer = optax.sgd(.1, momentum=.9)
    txs = {name: sparse_jax.sparsify(optimizer, method)
           for name, method in methods.items()}
    rng = np.random.default_rng(7)
    params = methods_test.fake_params()['dense']
    batches = [(rng.normal(size=(16, 8)).astype(np.float32),
                rng.normal(size=(16, 12)).astype(np.float32))
               for _ in range(5)]

    def loss_fn(params, state, method, batch):
      weights = method.read(params, state)
      outputs = batch[0] @ weights['kernel'] + weights['bias'][None]
      return jnp.mean(jnp.square(outputs - batch[1]))

    @functools.partial(jax.jit, compiler_options=methods_test.QUICK)
    def step(states, batch):
      new, losses = {}, {}
      for name, tx in txs.items():
        params, state = states[name]
        of_params = functools.partial(loss_fn, state=state, batch=batch,
                                      method=methods[name])
        losses[name], grads = jax.value_and_grad(of_params)(params)
        updates, state = tx.update(grads, state, params,
                                   grad_fn=jax.grad(of_params))
        new[name] = optax.apply_updates(params, updates), state
      return new, losses

    mesh = make_mesh()
    everywhere = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec('x'))
    starts = {name: methods[name].parametrize(params) for name in txs}
    many = {name: (starts[name], tx.init(starts[name]))
            for name, tx in txs.items()}
    one = jax.device_put(many, jax.devices()[0])
    many = jax.device_put(many, everywhere)
    for t, batch in enumerate(batches):
      one, losses = step(one, jax.device_put(batch, jax.devices()[0]))
      many, others = step(many, jax.device_put(batch, split))
      for name in methods:
        # The mean of the batch is added up in another order.
        np.testing.assert_allclose(others[name], losses[name], rtol=1e-6)
        jax.tree.map(np.testing.assert_array_equal,
                     sparse_jax.get_state(many[name][1]).marks,
                     sparse_jax.get_state(one[name][1]).marks)
        self.assertTrue(all(leaf.sharding.is_equivalent_to(
            everywhere, leaf.ndim) for leaf in jax.tree.leaves(many[name])), t)
    self.assertEqual(step._cache_size(), 2)  # One for each placement.


class ShardedWeightsTest(parameterized.TestCase):

  def check_places(self, tree, mesh):
    """Every array of a weight's shape lies like the weight."""
    params = fake_params()
    wanted = shardings_like(tree, params, mesh)
    wrong = [jax.tree_util.keystr(path) for (path, leaf), want in zip(
        jax.tree.leaves_with_path(tree), jax.tree.leaves(wanted))
             if not leaf.sharding.is_equivalent_to(want, leaf.ndim)]
    self.assertEqual(wrong, [])

  @parameterized.product(name=SHARDED, axes=tuple(AXES))
  def test_eager_init_lays_marks_like_their_weights(self, name, axes):
    mesh = make_mesh(AXES[axes])
    with jax.set_mesh(mesh):
      params = placed(fake_params(), mesh)
      state = METHODS[name].init(params)
    marks = [state.marks, state.forward_masks, state.backward_masks]
    for tree in marks:
      self.check_places(tree, mesh)
    plain = METHODS[name].init(fake_params())
    jax.tree.map(np.testing.assert_array_equal, state.marks, plain.marks)

  @parameterized.parameters(*SHARDED)
  def test_compiled_init_gathers_nothing(self, name):
    mesh = make_mesh()
    params = placed(fake_params(), mesh)
    tx = sparse_jax.sparsify(optax.adam(.1), METHODS[name])
    wanted = shardings_like(jax.eval_shape(tx.init, params), params, mesh)
    compiled = jax.jit(tx.init, out_shardings=wanted,
                       compiler_options=methods_test.QUICK).lower(
                           params).compile()
    self.assertEqual(large_collectives(compiled.as_text(), 192 // 8), [])
    state = compiled(params)
    self.check_places(state, mesh)
    jax.tree.map(np.testing.assert_array_equal, state.sparse.marks,
                 METHODS[name].init(fake_params()).marks)

  @parameterized.product(name=SHARDED + TOGETHER, axes=tuple(AXES))
  def test_step_with_refresh_gathers_no_weight(self, name, axes):
    """Nor a shard of one: nothing of the size of a shard moves at all."""
    mesh = make_mesh(AXES[axes])
    tx = sparse_jax.sparsify(optax.adam(.1), METHODS[name])
    step = methods_test.make_step(METHODS[name], tx)
    plain = METHODS[name].parametrize(fake_params())
    plain_state = tx.init(plain)
    with jax.set_mesh(mesh) if axes == 'explicit' else (
        contextlib.nullcontext()):
      params = jax.tree.map(jax.device_put, plain, shardings_like(
          plain, fake_params(), mesh))
      state = jax.tree.map(jax.device_put, plain_state, shardings_like(
          plain_state, fake_params(), mesh))
      batches = [methods_test.fake_batch(fake_params(), t)
                 for t in range(1, 5)]
      # The same layout can be written in two ways; now as a step writes it.
      params, state = jax.jit(lambda *trees: trees)(params, state)
      compiled = jax.jit(step, compiler_options=methods_test.QUICK)
      lowered = compiled.lower(params, state, placed(batches[0], mesh))
      text = lowered.compile().as_text()
      self.assertEqual(large_collectives(text, 192 // 8), [])
      for batch in batches:
        params, state, _ = compiled(params, state, placed(batch, mesh))
      self.check_places((params, state), mesh)
      self.assertEqual(compiled._cache_size(), 1)
    self.assertNotEqual(re.findall('all-reduce', text), [])
    jax.tree.map(np.testing.assert_array_equal, state.sparse.marks,
                 one_device_run(name).marks)

  @parameterized.parameters(*(name for name in MAIN
                              if name not in SHARDED + TOGETHER))
  def test_meshes_with_explicit_axes(self, name):
    """The user compiles `init`; then the run is that of one device."""
    mesh = make_mesh(AxisType.Explicit)
    tx = sparse_jax.sparsify(optax.adam(.1), METHODS[name])
    plain = METHODS[name].parametrize(fake_params())
    with jax.set_mesh(mesh):
      params = jax.tree.map(jax.device_put, plain, shardings_like(
          plain, fake_params(), mesh))
      state = jax.jit(tx.init, compiler_options=methods_test.QUICK)(params)
      self.check_places((params, state), mesh)
      step = jax.jit(methods_test.make_step(METHODS[name], tx),
                     compiler_options=methods_test.QUICK)
      for t in range(1, 5):
        batch = placed(methods_test.fake_batch(fake_params(), t), mesh)
        params, state, _ = step(params, state, batch)
      self.check_places((params, state), mesh)
    jax.tree.map(np.testing.assert_array_equal, state.sparse.marks,
                 one_device_run(name).marks)

  @parameterized.product(
      structure=('block', 'n_of_m', 'channel', 'filter'), axes=tuple(AXES))
  def test_structured_refresh_gathers_no_weight(self, structure, axes):
    mesh = make_mesh(AXES[axes])
    method = sparse_jax.top_kast(
        .5, backward_sparsity=.5, update_every=2,
        structure=methods_test.STRUCTURES[structure])
    tx = sparse_jax.sparsify(optax.sgd(.1), method)
    step = methods_test.make_step(method, tx)
    plain = fake_params()
    plain_state = tx.init(plain)
    params = placed(plain, mesh)
    state = jax.tree.map(jax.device_put, plain_state,
                         shardings_like(plain_state, params, mesh))
    batch = placed(methods_test.fake_batch(plain, 1), mesh)
    text = jax.jit(step, compiler_options=methods_test.QUICK).lower(
        params, state, batch).compile().as_text()
    # Marks of groups have a shape of their own, and lie whole everywhere.
    self.assertEqual([kind for kind in large_collectives(text, 192)
                      if not kind[1].startswith('u8')], [])


if __name__ == '__main__':
  absltest.main()
