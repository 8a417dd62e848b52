"""Tests of the Flax getters, and of finding the state anywhere in Optax's."""

import pickle

from absl.testing import absltest
from absl.testing import parameterized
from flax import linen as nn
from flax import nnx
from flax import serialization
from flax.training import train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax

LAYERS = ('first', 'second')
BLOCK = sparse_jax.Block((4, 2))


class LinenModel(nn.Module):

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(8, name='first')(x)
    return nn.Dense(3, name='second')(jnp.tanh(x))


class NnxModel(nnx.Module):

  def __init__(self):
    self.first = nnx.Linear(5, 8, rngs=nnx.Rngs(0))
    self.second = nnx.Linear(8, 3, rngs=nnx.Rngs(1))

  def __call__(self, x):
    return self.second(jnp.tanh(self.first(x)))


def batch(t):
  rng = np.random.default_rng(t)
  return (jnp.array(rng.normal(size=(4, 5)), jnp.float32),
          jnp.array(rng.normal(size=(4, 3)), jnp.float32))


def model_params(model):
  """The parameters of an NNX model as plain arrays."""
  return {layer: {name: np.asarray(getattr(getattr(model, layer), name)[...])
                  for name in ('kernel', 'bias')} for layer in LAYERS}


def masks_by_path(state):
  return {jax.tree_util.keystr(path[:2], simple=True, separator='/'):
          np.asarray(mask)
          for path, mask in jax.tree.leaves_with_path(
              sparse_jax.get_state(state).forward_masks)}


def linen_run(method, params, steps):
  """(params, forward masks) before the first update and after each."""
  model = LinenModel()
  tx = sparse_jax.sparsify(optax.adam(.1), method)
  state = tx.init(params)

  @jax.jit
  def update(params, state, x, y):
    def loss(params):
      variables = sparse_jax.linen_getter(method, state)({'params': params})
      return jnp.mean((model.apply(variables, x) - y)**2)

    updates, new_state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), new_state

  for t in range(steps + 1):
    if t:
      params, state = update(params, state, *batch(t))
    yield jax.tree.map(np.asarray, params), masks_by_path(state)


def nnx_run(method, model, steps):
  tx = sparse_jax.sparsify(optax.adam(.1), method)
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

  @nnx.jit
  def update(model, optimizer, x, y):
    def loss(model):
      sparse = sparse_jax.nnx_getter(method, optimizer)(model)
      return jnp.mean((sparse(x) - y)**2)

    optimizer.update(model, nnx.grad(loss)(model))

  for t in range(steps + 1):
    if t:
      update(model, optimizer, *batch(t))
    yield model_params(model), masks_by_path(optimizer)


class RunTest(parameterized.TestCase):

  @parameterized.named_parameters(
      ('top_kast', sparse_jax.top_kast(.75, backward_sparsity=.5,
                                       update_every=2)),
      ('rigl', sparse_jax.rigl(.75, update_every=2, drop_fraction=.5)))
  def test_linen_and_nnx_train_alike(self, method):
    model = NnxModel()
    params = model_params(model)
    runs = zip(linen_run(method, params, 6), nnx_run(method, model, 6))
    first = None
    for (linen_params, linen_masks), (nnx_params, nnx_masks) in runs:
      self.assertEqual(set(linen_masks), {'first/kernel', 'second/kernel'})
      self.assertEqual(set(nnx_masks), set(linen_masks))
      for path, mask in linen_masks.items():
        np.testing.assert_array_equal(mask, nnx_masks[path])
      first = first or linen_masks
      # Two compilations: sums may differ in the last bit, which Adam's first
      # steps, of the sign of the gradient, leave as it is.
      jax.tree.map(lambda a, b: np.testing.assert_allclose(
          a, b, rtol=1e-4, atol=1e-5), linen_params, nnx_params)
    self.assertTrue(np.any(first['first/kernel']
                           != linen_masks['first/kernel']))


class LinenGetterTest(parameterized.TestCase):

  def test_only_params_are_read_through_the_method(self):
    method = sparse_jax.static(.5)
    norm = nn.BatchNorm(use_running_average=False)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)

    class Model(nn.Module):

      @nn.compact
      def __call__(self, x):
        return norm.copy(name='norm')(nn.Dense(6, name='dense')(x))

    variables = jax.jit(Model().init)(jax.random.key(1), x)
    state = method.init(variables['params'])
    sparse = sparse_jax.linen_getter(method, state)(variables)
    self.assertIs(sparse['batch_stats'], variables['batch_stats'])
    kernel = sparse['params']['dense']['kernel']
    self.assertEqual(int((kernel != 0).sum()), 18)
    self.assertIs(sparse['params']['norm']['scale'],
                  variables['params']['norm']['scale'])
    y, updated = jax.jit(lambda variables: Model().apply(
        variables, x, mutable='batch_stats'))(sparse)
    np.testing.assert_allclose(y.mean(0), np.zeros(6), atol=1e-5)  # float32.
    np.testing.assert_allclose(
        updated['batch_stats']['norm']['mean'],
        .01 * (x @ kernel).mean(0), atol=1e-6)  # Momentum .99.

  def test_variables_without_params_are_named(self):
    method = sparse_jax.static(.5)
    state = method.init({'w': jnp.ones((2, 4))})
    with self.assertRaisesRegex(ValueError, '`variables`.*batch_stats'):
      sparse_jax.linen_getter(method, state)({'batch_stats': {}})


class NnxGetterTest(parameterized.TestCase):

  def test_weights_of_the_caller_stay_and_statistics_move(self):
    class Model(nnx.Module):

      def __init__(self):
        self.dense = nnx.Linear(5, 6, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(6, rngs=nnx.Rngs(1))

      def __call__(self, x):
        return self.norm(self.dense(x))

    model, method = Model(), sparse_jax.static(.5)
    x = batch(0)[0]
    optimizer = nnx.Optimizer(model, sparse_jax.sparsify(
        optax.sgd(.1), method), wrt=nnx.Param)
    sparse_jax.nnx_getter(method, optimizer)(model)(x)
    self.assertEqual(int((model.dense.kernel[...] != 0).sum()), 30)
    weights = sparse_jax.dense_weights(method, nnx.state(model, nnx.Param),
                                       optimizer)
    kernel = weights['dense']['kernel'][...]
    self.assertEqual(int((kernel != 0).sum()), 15)
    np.testing.assert_allclose(model.norm.mean[...], .01 * (x @ kernel).mean(0),
                               atol=1e-6)

  def test_accepts_the_state_of_the_method_itself(self):
    model, method = NnxModel(), sparse_jax.static(.5)
    state = method.init(nnx.state(model, nnx.Param))
    weights = method.read(nnx.state(model, nnx.Param), state)
    x = batch(0)[0]
    outputs = sparse_jax.nnx_getter(method, state)(model)(x)
    nnx.update(model, weights)
    np.testing.assert_array_equal(outputs, model(x))

  def test_options_are_those_of_with_method(self):
    method = sparse_jax.packed(sparse_jax.static(
        .5, structure=sparse_jax.Block((2, 2))))
    model, optimizer = sparse_jax.nnx_start(
        nnx.Linear(4, 8, rngs=nnx.Rngs(0)),
        sparse_jax.sparsify(optax.sgd(.1), method), method)
    for options in ({'implementation': 'fast'}, {'weights_first': 1}):
      with self.assertRaisesRegex(ValueError, *options):
        sparse_jax.nnx_getter(method, optimizer, **options)(model)(
            jnp.ones((2, 4)))

  def test_gradients_reach_the_model_of_the_caller(self):
    model, method = NnxModel(), sparse_jax.static(.5)
    state = method.init(nnx.state(model, nnx.Param))
    grads = nnx.grad(lambda model: sparse_jax.nnx_getter(method, state)(
        model)(batch(0)[0]).sum())(model)
    mask = masks_by_path(state)['first/kernel']
    got = np.asarray(jax.tree.leaves(grads['first']['kernel'])[0])
    self.assertTrue(np.any(got[mask] != 0))
    np.testing.assert_array_equal(got[~mask], 0)

  def test_parts_of_the_model_compute_by_the_method_too(self):
    layers = [nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(2)]
    model, method = nnx.Sequential(*layers), sparse_jax.top_kast(
        .75, backward_sparsity=.5)
    state = method.init(nnx.state(model, nnx.Param))
    x, sparse = jnp.ones((2, 4)), sparse_jax.nnx_getter(method, state)(model)
    parts = sparse.layers[1](sparse.layers[0](x))
    np.testing.assert_array_equal(parts, sparse(x))
    self.assertTrue(np.any(parts != model(x)))
    self.assertEqual(sparse.layers[0].in_features, 4)

  @parameterized.product(method=[sparse_jax.top_kast(.5, backward_sparsity=.5),
                                 sparse_jax.swat(.5)], by_name=[False, True])
  def test_random_streams_in_arguments_move(self, method, by_name):
    class Model(nnx.Module):

      def __init__(self):
        self.dense = nnx.Linear(32, 64, rngs=nnx.Rngs(0))
        self.drop = nnx.Dropout(.5)

      def __call__(self, x, train, rngs=None):
        return self.drop(self.dense(x), rngs=rngs, deterministic=not train)

    model = Model()
    state = method.init(nnx.state(model, nnx.Param))
    sparse = sparse_jax.nnx_getter(method, state)(model)
    x, rngs, same = jnp.ones((1, 32)), nnx.Rngs(1), nnx.Rngs(1)
    given = ((), dict(rngs=rngs)) if by_name else ((rngs,), {})
    first, second = (sparse(x, True, *given[0], **given[1]) for _ in range(2))
    self.assertTrue(np.any((first == 0) != (second == 0)))
    for outputs in (first, second):  # As of the model itself.
      np.testing.assert_array_equal(outputs == 0, model(x, True, same) == 0)
    self.assertEqual(rngs.default.count[...], 2)

  @parameterized.product(method=[
      sparse_jax.static(.75), sparse_jax.swat(.75),
      sparse_jax.packed(sparse_jax.static(.75, structure=BLOCK))])
  def test_streams_of_an_outer_trace_may_lie_unused(self, method):
    """As of a loss that jax.grad takes by the parameters alone."""
    class Model(nnx.Module):

      def __init__(self):
        self.dense = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
        self.drop = nnx.Dropout(.5, rngs=nnx.Rngs(1))

      def __call__(self, x):
        return self.drop(self.dense(x), deterministic=True)

    tx = sparse_jax.sparsify(optax.sgd(.1), method)
    model, optimizer = sparse_jax.nnx_start(Model(), tx, method)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss_fn(params):
      model = nnx.merge(graph, params, rest)
      return jnp.sum(sparse_jax.nnx_getter(method, optimizer)(model)(
          jnp.ones((2, 8))))

    grads = jax.jit(jax.grad(loss_fn))(params)
    self.assertTrue(np.any(grads['dense']['kernel'][...]))
    self.assertEqual(rest['drop']['rngs']['count'][...], 0)


PARAMS = {'a': jnp.ones((2, 4)), 'b': jnp.ones(3)}
METHOD = sparse_jax.static(.5)


def sparse_sgd(rate=.1):
  return sparse_jax.sparsify(optax.sgd(rate), METHOD)


NESTINGS = {
    'bare': sparse_sgd,
    'chain': lambda: optax.chain(optax.clip(1.), sparse_sgd()),
    'named_chain': lambda: optax.named_chain(('clip', optax.clip(1.)),
                                             ('sparse', sparse_sgd())),
    'multi_steps': lambda: optax.MultiSteps(
        sparse_sgd(), 2).gradient_transformation(),
    'inject_hyperparams': lambda: optax.inject_hyperparams(sparse_sgd)(
        rate=.1),
    'masked': lambda: optax.masked(sparse_sgd(), {'a': True, 'b': False}),
    'apply_if_finite': lambda: optax.apply_if_finite(sparse_sgd(), 3),
    'multi_transform': lambda: optax.multi_transform(
        {'sparse': sparse_sgd(), 'dense': optax.adam(.1)},
        {'a': 'sparse', 'b': 'dense'}),
}


class GetStateTest(parameterized.TestCase):

  @parameterized.parameters(*NESTINGS)
  def test_is_found_wherever_it_is(self, nesting):
    state = NESTINGS[nesting]().init(PARAMS)
    found = sparse_jax.get_state(state)
    self.assertIsInstance(found, sparse_jax.SparseState)
    weights = METHOD.read(PARAMS, state)
    self.assertEqual(jax.tree.map(lambda w: float(w.sum()), weights),
                     {'a': 4., 'b': 3.})
    self.assertEqual(METHOD.penalty(PARAMS, state), 0.)

  @parameterized.parameters('chain', 'masked', 'multi_transform',
                            'inject_hyperparams', 'apply_if_finite')
  def test_it_trains_there(self, nesting):
    tx = NESTINGS[nesting]()
    state = tx.init(PARAMS)
    updates, state = jax.jit(tx.update)(PARAMS, state, PARAMS)
    params = optax.apply_updates(PARAMS, updates)
    self.assertEqual(int(sparse_jax.get_state(state).step), 1)
    np.testing.assert_array_equal(
        params['a'] != 0, sparse_jax.get_state(state).forward_masks['a'])

  def test_is_found_in_a_train_state(self):
    state = train_state.TrainState.create(
        apply_fn=None, params=PARAMS, tx=NESTINGS['chain']())
    for found in (state, state.opt_state):
      self.assertEqual(sparse_jax.get_state(found).marks['a'].shape, (2, 4))

  def test_is_found_in_an_nnx_optimizer_as_plain_arrays(self):
    optimizer = nnx.Optimizer(NnxModel(), NESTINGS['chain'](), wrt=nnx.Param)
    for holder in (optimizer, optimizer.opt_state):
      found = sparse_jax.get_state(holder)
      self.assertIsInstance(found.step, jax.Array)
      for leaf in jax.tree.leaves(found):
        self.assertIsInstance(leaf, jax.Array)

  def test_is_found_under_jit_and_in_shapes(self):
    tx = NESTINGS['chain']()
    shapes = jax.eval_shape(tx.init, PARAMS)
    self.assertEqual(sparse_jax.get_state(shapes).marks['a'].shape, (2, 4))
    step = jax.jit(lambda state: sparse_jax.get_state(state).step)
    self.assertEqual(step(tx.init(PARAMS)), 0)

  @parameterized.parameters((optax.adam(.1),), (optax.identity(),))
  def test_none_is_an_error_that_says_so(self, tx):
    with self.assertRaisesRegex(
        ValueError, '`opt_state`.*no SparseState.*sparsify'):
      sparse_jax.get_state(tx.init(PARAMS))

  def test_two_are_an_error_that_says_so(self):
    state = optax.chain(sparse_sgd(), sparse_sgd()).init(PARAMS)
    with self.assertRaisesRegex(ValueError, '`opt_state`.*2 SparseStates'):
      METHOD.read(PARAMS, state)

  def test_a_method_that_wraps_another_is_found_once(self):
    inner = METHOD.init(PARAMS)
    outer = inner._replace(step=jnp.int32(7), extra=(inner, jnp.ones(2)))
    for state in (outer, (optax.EmptyState(), {'x': outer})):
      found = sparse_jax.get_state(state)
      self.assertEqual(found.step, 7)
      self.assertIsInstance(found.extra[0], sparse_jax.SparseState)


class SerializationTest(parameterized.TestCase):

  @parameterized.parameters(False, True)
  def test_flax_writes_and_reads_params_and_state(self, is_packed):
    method = sparse_jax.rigl(.5, structure=sparse_jax.Block((2, 2)))
    method = sparse_jax.packed(method) if is_packed else method
    tx = sparse_jax.sparsify(optax.adam(.1), method)
    saved = sparse_jax.start(tx, method, {'kernel': jnp.arange(
        32.).reshape(4, 8)})
    blank = jax.tree.map(jnp.zeros_like, saved)
    restored = serialization.from_bytes(blank, serialization.to_bytes(saved))
    self.assertEqual(jax.tree.structure(restored), jax.tree.structure(saved))
    jax.tree.map(np.testing.assert_array_equal, restored, saved)

  @parameterized.parameters(False, True)
  def test_flax_reads_a_reservoir_into_host_memory(self, abstract):
    method = sparse_jax.packed(sparse_jax.top_kast(
        .75, backward_sparsity=.5, update_every=2,
        structure=sparse_jax.Block((2, 2))))
    tx = sparse_jax.sparsify(optax.sgd(.1), method)
    begin = lambda: sparse_jax.start(tx, method, {'kernel': jnp.arange(
        32.).reshape(4, 8)})
    params, state = begin()
    like = jax.eval_shape(begin)[1] if abstract else begin()[1]
    restored = serialization.from_bytes(like, serialization.to_bytes(state))
    place = sparse_jax.get_state(restored).packed['kernel']
    self.assertEqual(place.reservoir.sharding.memory_kind, 'pinned_host')
    updates, after = jax.eval_shape(tx.update, params, restored, params)
    self.assertEqual(updates['kernel'].blocks.shape, (4, 2, 2))
    self.assertEqual(jax.tree.structure(after), jax.tree.structure(state))

  def test_a_state_of_plain_arrays_goes_on_where_it_was(self):
    method = sparse_jax.packed(sparse_jax.top_kast(
        .75, backward_sparsity=.5, structure=sparse_jax.Block((2, 2))))
    tx = sparse_jax.sparsify(optax.sgd(.1), method)
    params, state = sparse_jax.start(tx, method, {'kernel': jnp.cos(
        jnp.arange(32.)).reshape(4, 8)})
    step, grads = jax.jit(tx.update), jax.tree.map(jnp.sin, params)
    plain = pickle.loads(pickle.dumps(jax.tree.map(np.asarray, state)))
    want, got = (step(grads, own, params) for own in (state, plain))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    place = sparse_jax.get_state(got[1]).packed['kernel']
    self.assertEqual(place.reservoir.sharding.memory_kind, 'pinned_host')


if __name__ == '__main__':
  absltest.main()
