"""Loops in the manner of others, with the library's two lines added."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import flax.linen as nn
from flax import nnx
from flax.training import train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax

BLOCK = sparse_jax.Block((4, 4))
METHODS = {
    'dense': sparse_jax.dense(),
    'top_kast': sparse_jax.top_kast(.5, backward_sparsity=.25, update_every=2),
    'rigl': sparse_jax.rigl(.5, update_every=2),
    'str_': sparse_jax.str_(initial=-4.),
    'swat': sparse_jax.swat(.5),
    'packed_rigl': sparse_jax.packed(
        sparse_jax.rigl(.5, update_every=2, structure=BLOCK)),
}
INPUTS = jax.random.normal(jax.random.key(0), (16, 8))
TARGETS = jnp.tanh(INPUTS @ jax.random.normal(jax.random.key(1), (8, 4)))


class NnxNet(nnx.Module):
  """Batch norm, dropout and a list, as NNX models have them."""

  def __init__(self, rngs):
    self.layers = nnx.List([nnx.Linear(8, 16, rngs=rngs),
                            nnx.Linear(16, 16, rngs=rngs)])
    self.norm = nnx.BatchNorm(16, rngs=rngs)
    self.dropout = nnx.Dropout(.1, rngs=rngs)
    self.head = nnx.Linear(16, 4, rngs=rngs)

  def __call__(self, x):
    for layer in self.layers:
      x = nnx.relu(layer(x))
    return self.head(self.dropout(self.norm(x)))

  def features(self, x):
    return self.layers[0](x)


def train_nnx(method, compute, steps=6, rate=.02):
  """The model, its optimizer and the losses; `compute(model, optimizer)`."""
  model = NnxNet(nnx.Rngs(0))
  if method is None:
    optimizer = nnx.Optimizer(model, optax.adam(rate), wrt=nnx.Param)
  else:
    tx = sparse_jax.sparsify(optax.adam(rate), method)
    model, optimizer = sparse_jax.nnx_start(model, tx, method)

  @nnx.jit
  def step(model, optimizer):
    def loss_fn(model):
      return jnp.mean(jnp.square(compute(model, optimizer)(INPUTS) - TARGETS))

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss

  return model, optimizer, [float(step(model, optimizer))
                            for _ in range(steps)]


class NnxTest(parameterized.TestCase):

  @parameterized.parameters(*METHODS)
  def test_learns_and_everything_else_is_the_models_own(self, name):
    method = METHODS[name]
    model, optimizer, losses = train_nnx(
        method, lambda model, optimizer: sparse_jax.nnx_getter(
            method, optimizer)(model))
    self.assertLess(losses[-1], losses[0])
    self.assertEqual(int(model.dropout.rngs.count[...]), 6)
    self.assertGreater(float(jnp.abs(model.norm.mean[...]).max()), 0.)
    model.eval()
    computed = sparse_jax.nnx_getter(method, optimizer)(model)
    self.assertEqual(computed(INPUTS).shape, TARGETS.shape)
    self.assertEqual(computed.features(INPUTS).shape, (16, 16))
    self.assertEqual(int(model.dropout.rngs.count[...]), 6)

  def test_dropout_draws_anew_where_nothing_is_learnt(self):
    method = METHODS['rigl']
    *_, losses = train_nnx(method, lambda model, optimizer:
                           sparse_jax.nnx_getter(method, optimizer)(model),
                           steps=4, rate=0.)
    self.assertLen(set(losses), 4)

  def test_dense_is_the_loop_without_the_library(self):
    method = sparse_jax.dense()
    _, _, with_library = train_nnx(
        method, lambda model, optimizer: sparse_jax.nnx_getter(
            method, optimizer)(model))
    _, _, without = train_nnx(None, lambda model, optimizer: model)
    self.assertEqual(with_library, without)

  def test_packed_is_masked(self):
    method = sparse_jax.rigl(.5, update_every=2, structure=BLOCK)
    losses = [train_nnx(own, lambda model, optimizer, own=own:
                        sparse_jax.nnx_getter(own, optimizer)(model))[2]
              for own in (method, sparse_jax.packed(method))]
    np.testing.assert_allclose(*losses, rtol=1e-4)


class LinenNet(nn.Module):

  @nn.compact
  def __call__(self, x, train: bool):
    x = nn.relu(nn.Dense(16)(x))
    x = nn.BatchNorm(use_running_average=not train)(x)
    x = nn.Dropout(.1, deterministic=not train)(x)
    return nn.Dense(4)(x)


class TrainState(train_state.TrainState):
  batch_stats: dict


def train_linen(method, steps=8):
  """A TrainState with accumulated gradients; the method of None is no line."""
  model = LinenNet()
  variables = model.init(jax.random.key(0), INPUTS, False)
  inner = optax.chain(optax.clip_by_global_norm(1.), optax.adam(.02))
  params, tx = variables['params'], optax.MultiSteps(
      inner if method is None else sparse_jax.sparsify(inner, method), 2)
  opt_state = tx.init(params) if method is None else None
  if method is not None:
    params, opt_state = sparse_jax.start(tx, method, params)
  state = TrainState(0, model.apply, params, tx, opt_state,
                     variables['batch_stats'])

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, key):
    def loss_fn(params):
      apply = state.apply_fn if method is None else sparse_jax.with_method(
          state.apply_fn, method, state.opt_state)
      outputs, changes = apply(
          {'params': params, 'batch_stats': state.batch_stats}, INPUTS, True,
          mutable=['batch_stats'], rngs={'dropout': key})
      return jnp.mean(jnp.square(outputs - TARGETS)), changes

    (loss, changes), grads = jax.value_and_grad(loss_fn, has_aux=True)(
        state.params)
    return state.apply_gradients(
        grads=grads, batch_stats=changes['batch_stats']), loss

  losses = []
  for index in range(steps):
    state, loss = step(state, jax.random.key(index))
    losses.append(float(loss))
  return state, losses, step._cache_size()


class LinenTest(parameterized.TestCase):

  @parameterized.parameters(*METHODS)
  def test_train_state_learns_and_compiles_once(self, name):
    method = METHODS[name]
    state, losses, compiled = train_linen(method)
    self.assertLess(losses[-1], losses[0])
    self.assertLessEqual(compiled, 2)  # The first state is not committed.
    self.assertEqual(int(sparse_jax.get_state(state.opt_state).step), 4)
    apply = sparse_jax.with_method(state.apply_fn, method, state.opt_state)
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    outputs = apply(variables, INPUTS, False)
    weights = sparse_jax.dense_weights(method, state.params, state.opt_state)
    exported = state.apply_fn({**variables, 'params': weights}, INPUTS, False)
    np.testing.assert_allclose(outputs, exported, atol=1e-5)

  def test_dense_is_the_loop_without_the_library(self):
    """To the rounding of fusions: the tests' compiler optimises little."""
    first, second = (train_linen(method)[1]
                     for method in (sparse_jax.dense(), None))
    np.testing.assert_allclose(first, second, rtol=1e-6)


class GroupTest(parameterized.TestCase):

  def params(self):
    keys = jax.random.split(jax.random.key(2), 3)
    return {name: {'kernel': jax.random.normal(key, (8, 8))}
            for name, key in zip('abc', keys)}

  def test_each_leaf_follows_the_first_method_that_names_it(self):
    methods = {'a/': sparse_jax.top_kast(.75, backward_sparsity=.5,
                                         update_every=2),
               'b/': sparse_jax.packed(sparse_jax.rigl(
                   .5, structure=BLOCK, update_every=3))}
    method = sparse_jax.group(methods)
    tx = sparse_jax.sparsify(optax.adam(.01), method)
    params, state = sparse_jax.start(tx, method, self.params())
    self.assertEqual(params['b']['kernel'].blocks.shape, (2, 4, 4))

    def model(params, x):
      for name in 'abc':
        x = jnp.tanh(x @ params[name]['kernel'])
      return x

    @jax.jit
    def step(params, state):
      def loss_fn(params):
        return jnp.mean(sparse_jax.with_method(model, method, state)(
            params, INPUTS)**2)

      updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
      return optax.apply_updates(params, updates), state

    for count in range(1, 5):
      params, state = step(params, state)
      seen = sparse_jax.get_state(state)
      self.assertEqual({path: bool(due) for path, due in
                        seen.refreshed.items()},
                       {'a/kernel': count % 2 == 0, 'b/kernel': count % 3 == 0})
      self.assertEqual(int(seen.forward_masks['a']['kernel'].sum()), 16)
      self.assertEqual(int(seen.backward_masks['a']['kernel'].sum()), 32)
      self.assertEqual(int(seen.forward_masks['b']['kernel'].sum()), 32)
      self.assertIsNone(seen.forward_masks['c']['kernel'])
    self.assertEqual(step._cache_size(), 1)

  def test_one_method_for_all_is_the_method(self):
    kept = []
    for method in (sparse_jax.top_kast(.75, backward_sparsity=.5),
                   sparse_jax.group({'.*': sparse_jax.top_kast(
                       .75, backward_sparsity=.5)})):
      tx = sparse_jax.sparsify(optax.adam(.01), method)
      params, state = self.params(), tx.init(self.params())
      updates, state = jax.jit(tx.update)(params, state, params)
      kept.append(updates)
    jax.tree.map(np.testing.assert_array_equal, *kept)

  def test_leaves_of_two_methods_are_drawn_apart(self):
    method = sparse_jax.group({'a/': sparse_jax.static(.5),
                               'b/': sparse_jax.static(.5)})
    masks = method.init(self.params()).forward_masks
    self.assertFalse(np.array_equal(masks['a']['kernel'], masks['b']['kernel']))

  @parameterized.parameters(
      ({}, 'not empty'), ({'(': sparse_jax.dense()}, 'regular'),
      ({'.*': sparse_jax.str_()}, 'str_'), ({'.*': None}, 'None'),
      ({'.*': sparse_jax.rigl(.5, skip_step=True)}, 'rigl'))
  def test_what_cannot_be_grouped_is_named(self, methods, text):
    with self.assertRaisesRegex(ValueError, text):
      sparse_jax.group(methods)

  def test_a_pattern_without_leaves_is_an_error(self):
    method = sparse_jax.group({'.*': sparse_jax.static(.5),
                               'b': sparse_jax.static(.5)})
    with self.assertRaisesRegex(ValueError, '\'b\''):
      method.init(self.params())


class ChoiceTest(parameterized.TestCase):

  def test_what_is_no_kernel_is_dense_by_default(self):
    params = {'embed': {'embedding': jnp.ones((8, 4))},
              'pos_embedding': jnp.ones((1, 5, 4)), 'cls': jnp.ones((1, 1, 4)),
              'pool': {'probe': jnp.ones((1, 1, 4))},
              'mlp': {'kernel': jnp.ones((4, 4))}}
    plan = sparse_jax.static(.5).init(params).plan
    self.assertEqual(list(plan.by_path), ['mlp/kernel'])
    plan = sparse_jax.static(.5, is_sparse={'embedding$': True}
                             ).init(params).plan
    self.assertIn('embed/embedding', plan.by_path)

  def test_patterns_name_axes_and_sparsities(self):
    params = {'scan': {'kernel': jnp.ones((3, 8, 4))},
              'head': {'kernel': jnp.ones((8, 6))}}
    state = sparse_jax.static(
        .5, batch_axes={'scan': (0,)}, allocation={'head': .75, '.*': .5},
        contracting={'head': (1,)}).init(params)
    masks = state.forward_masks
    np.testing.assert_array_equal(masks['scan']['kernel'].sum((1, 2)), 16)
    self.assertEqual(int(masks['head']['kernel'].sum()), 12)
    self.assertEqual(state.plan.by_path['head/kernel'].layout.rows, (1,))

  def test_description_says_what_is_kept_before_anything_is_made(self):
    method = sparse_jax.packed(sparse_jax.rigl(.75, structure=BLOCK))
    shapes = {'a': {'kernel': jax.ShapeDtypeStruct((16, 16), jnp.float32)}}
    row, = sparse_jax.describe(method, shapes).rows
    self.assertEqual((row.groups, row.kept), (16, .25))
    self.assertEqual(row.bytes, 4 * 4 * 16)

  def test_description_warns_of_wrong_axes_and_of_what_is_no_kernel(self):
    method = sparse_jax.rigl(.5, structure=BLOCK,
                             is_sparse=lambda path, leaf: True)
    params = {'w': jnp.ones((8, 8)), 'embedding': jnp.ones((8, 8))}
    text = str(sparse_jax.describe(
        method, params, fn=lambda params, x: x @ params['w'].T,
        inputs=(INPUTS,)))
    self.assertIn('\'embedding\' looks like no kernel', text)
    self.assertIn('\'w\' is summed over its axes', text)


if __name__ == '__main__':
  absltest.main()
