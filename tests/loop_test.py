"""Tests of `start` and `with_method` around functions nobody edited."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax

BLOCK = sparse_jax.Block((4, 4))
STATIC = sparse_jax.static(.5, structure=BLOCK)


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape),
                     jnp.float32)


def scanned(params, x):
  def body(h, x):
    h = jnp.tanh(x @ params['input'] + h @ params['hidden'])
    return h, h

  return lax.scan(body, jnp.zeros((3, 8)), x)[1]


USES = {
    'tied': (lambda p, x: (x @ p['w']) @ p['w'].T, {'w': (8, 12)}, (3, 8)),
    'einsum': (lambda p, x: jnp.einsum('bi,io->bo', x, p['w']),
               {'w': (8, 12)}, (3, 8)),
    'scan': (scanned, {'input': (4, 8), 'hidden': (8, 8)}, (5, 3, 4)),
    'remat': (jax.checkpoint(lambda p, x: jnp.sin(x @ p['w']) @ p['v']),
              {'w': (8, 12), 'v': (12, 4)}, (3, 8)),
    'look_up': (lambda p, x: p['w'][jnp.array([0, 5, 2])] * x @ p['w'].T,
                {'w': (8, 12)}, (3, 12)),
    'side_by_side': (lambda p, x: jnp.einsum('bi,eio->beo', x, p['layers']),
                     {'layers': (2, 8, 4)}, (3, 8)),
    'of_two': (lambda p, x: x @ (p['w'] @ p['v']),
               {'w': (8, 12), 'v': (12, 4)}, (3, 8)),
}


def begun(method, params):
  tx = sparse_jax.sparsify(optax.sgd(.1), method)
  return sparse_jax.start(tx, method, params)


class WithMethodTest(parameterized.TestCase):

  @parameterized.parameters(*USES)
  def test_packed_weights_in_any_use(self, use):
    """Outputs and gradients are those of the masked method."""
    fn, shapes, inputs = USES[use]
    params = {name: normal(*shape, seed=i + 1)
              for i, (name, shape) in enumerate(shapes.items())}
    results = []
    # Said, not guessed: tied weights are summed over either axis.
    masked = sparse_jax.static(
        .5, structure=BLOCK, contracting={'layers': (1,), '.*': (0,)},
        batch_axes=lambda path, leaf: tuple(range(leaf.ndim - 2)))
    for method in (masked, sparse_jax.packed(masked)):
      own, state = begun(method, params)

      @jax.jit
      def both(own, state, x):
        apply = sparse_jax.with_method(fn, method, state)
        loss = lambda own, x: jnp.sum(jnp.sin(apply(own, x)))
        updates = jax.grad(loss)(own, x)
        moved = jax.tree.map(lambda p, g: p - g, own, updates)
        return apply(own, x), sparse_jax.dense_weights(method, moved, state)

      results.append(both(own, state, normal(*inputs)))
    jax.tree.map(lambda one, two: np.testing.assert_allclose(
        one, two, rtol=1e-4, atol=1e-5), *results)

  def test_dense_is_the_function_itself(self):
    fn, method = lambda params: params, sparse_jax.dense()
    state = method.init({'w': jnp.ones((8, 8))})
    self.assertIs(sparse_jax.with_method(fn, method, state), fn)

  @parameterized.parameters((STATIC,), (sparse_jax.packed(STATIC),))
  def test_other_arguments_pass_through(self, method):
    class Net(nn.Module):

      @nn.compact
      def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        return nn.Dropout(.5, deterministic=not train)(x)

    model, x = Net(), normal(16, 4)
    variables = model.init(jax.random.key(0), x, False)
    params, state = begun(method, variables['params'])
    apply = sparse_jax.with_method(model.apply, method, state)
    given = {**variables, 'params': params}
    _, moved = apply(given, x, True, rngs={'dropout': jax.random.key(1)},
                     mutable=['batch_stats'])
    weights = sparse_jax.dense_weights(method, params, state)
    _, want = model.apply({**variables, 'params': weights}, x, True,
                          rngs={'dropout': jax.random.key(1)},
                          mutable=['batch_stats'])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
                 moved, want)

  @parameterized.parameters(
      (sparse_jax.rigl(.5, update_every=2),),
      (sparse_jax.group({'w': sparse_jax.set_(.5, update_every=2),
                         'v': sparse_jax.top_kast(.5, backward_sparsity=.2,
                                                  update_every=2)}),))
  def test_trusted_zeros_train_alike_without_their_masks(self, method):
    fn = USES['remat'][0]
    tx = sparse_jax.sparsify(optax.adamw(.1), method)
    params = {'w': normal(8, 12), 'v': normal(12, 4, seed=1)}
    params, first = sparse_jax.start(tx, method, params)
    x = normal(3, 8, seed=2)

    def trained(trusts):
      @functools.partial(jax.jit, static_argnums=2)
      def step(params, opt_state, trust):
        apply = sparse_jax.with_method(fn, method, opt_state, trust_zeros=trust)
        grads = jax.grad(lambda own: jnp.sum(jnp.sin(apply(own, x))))(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

      state = params, first
      for i in range(5):
        state = step(*state, trusts and i > 0)
      return state

    jax.tree.map(np.testing.assert_array_equal, trained(False), trained(True))
    # The masks of `w` are not read, those of Top-KAST are.
    apply = sparse_jax.with_method(lambda p: p, method, first, trust_zeros=True)
    np.testing.assert_array_equal(apply(params)['w'], params['w'])
    read = method.read(params, first)['v']
    hidden = method.rule is None
    np.testing.assert_array_equal(apply(params)['v'],
                                  read if hidden else params['v'])

  def test_trust_must_be_a_bool(self):
    state = STATIC.init({'w': jnp.ones((8, 8))})
    with self.assertRaisesRegex(ValueError, 'trust_zeros.*1'):
      sparse_jax.with_method(lambda p: p, STATIC, state, trust_zeros=1)

  @parameterized.parameters(('implementation', 'batched', None),
                            ('column_axes', ('model',), ()),
                            ('weights_first', True, False))
  def test_options_of_blocks_are_for_methods_that_pack(self, name, value,
                                                       default):
    """A masked run must not pass for one of the blocks' kernels."""
    masked = sparse_jax.group({'v': STATIC, 'w': sparse_jax.static(.5)})
    for method in (STATIC, masked, sparse_jax.powerprop(STATIC)):
      state = method.init({'v': jnp.ones((8, 8)), 'w': jnp.ones((8, 8))})
      sparse_jax.with_method(lambda p: p, method, state, **{name: default})
      with self.assertRaisesRegex(ValueError, f'`{name}` .={value!r}'.replace(
          '(', '.').replace(')', '.')):
        sparse_jax.with_method(lambda p: p, method, state, **{name: value})
    packed = sparse_jax.packed(STATIC)
    for method in (packed, sparse_jax.powerprop(packed), sparse_jax.dense(),
                   sparse_jax.group({'v': packed, 'w': STATIC})):
      sparse_jax.with_method(lambda p: p, method, state, **{name: value})

  def test_all_arguments_may_be_given_by_name(self):
    params, state = begun(STATIC, {'w': normal(8, 8)})
    apply = sparse_jax.with_method(lambda params, *, variables: (
        variables @ params['w']), STATIC, state)
    x = normal(3, 8)
    np.testing.assert_array_equal(apply(params=params, variables=x),
                                  apply(params, variables=x))
    with self.assertRaisesRegex(TypeError, "'params'"):
      apply(variables=x)

  @parameterized.parameters((STATIC,), (sparse_jax.swat(.5),))
  def test_a_model_may_be_a_tree_with_functions_in_it(self, method):
    arrays = {'w': normal(8, 8), 'act': None, 'flag': None}
    model, x = dict(arrays, act=jnp.tanh, flag=True), normal(3, 8)
    _, state = begun(method, arrays)

    def apply(model, x):
      return model['act'](x @ model['w']) if model['flag'] else x

    outputs = sparse_jax.with_method(apply, method, state)(model, x)
    want = sparse_jax.with_method(
        lambda arrays, x: jnp.tanh(x @ arrays['w']), method, state)(arrays, x)
    np.testing.assert_array_equal(outputs, want)

  def test_a_wrong_guess_of_the_axes_names_leaf_and_axes(self):
    fn = lambda params, x: x @ params['w'].T
    params, x = {'w': normal(8, 12)}, normal(3, 12)
    state = STATIC.init(params)
    with self.assertRaisesRegex(ValueError, r"'w'.*\(1,\).*contracting"):
      sparse_jax.with_method(fn, STATIC, state)(params, x)
    axes = sparse_jax.contracting_axes(fn, params, x)
    self.assertEqual(axes, {'w': (1,)})
    method = sparse_jax.static(.5, structure=BLOCK,
                               contracting=lambda path, leaf: axes[path])
    got = sparse_jax.with_method(fn, method, method.init(params))(params, x)
    self.assertEqual(got.shape, (3, 8))

  def test_start_is_traced_and_works_twice(self):
    method = sparse_jax.packed(STATIC)
    tx = sparse_jax.sparsify(optax.adam(.1), method)
    params = {'w': normal(8, 12)}
    start = lambda params: sparse_jax.start(tx, method, params)
    want = start(params)
    for got in (start(params), jax.jit(start)(params)):
      jax.tree.map(np.testing.assert_array_equal, got, want)
    shapes = jax.eval_shape(start, params)
    self.assertEqual(jax.tree.map(lambda leaf: leaf.shape, shapes),
                     jax.tree.map(lambda leaf: leaf.shape, want))

  @parameterized.parameters((STATIC,), (sparse_jax.packed(sparse_jax.rigl(
      .5, structure=BLOCK)),))
  def test_a_model_may_call_a_part_growth(self, method):
    params = {'growth': {'w': normal(8, 8)}, 'w': normal(8, 8)}
    tx = sparse_jax.sparsify(optax.sgd(.1), method)
    params, state = sparse_jax.start(tx, method, params)
    grads = jax.grad(lambda params: jnp.sum(sparse_jax.with_method(
        lambda p, x: x @ p['growth']['w'] @ p['w'], method, state)(
            params, normal(3, 8))))(params)
    updates, _ = jax.eval_shape(tx.update, grads, state, params)
    self.assertEqual(jax.tree.structure(updates), jax.tree.structure(params))

  def test_start_needs_the_method_in_the_optimizer(self):
    with self.assertRaisesRegex(ValueError, '`tx`.*0 times'):
      sparse_jax.start(optax.sgd(.1), sparse_jax.packed(STATIC),
                       {'w': normal(8, 12)})
    for tx, error in ((optax.sgd(.1), 'no SparseState.*sparsify'), (
        sparse_jax.sparsify(optax.sgd(.1), sparse_jax.dnw(.5)),
        '`tx`.*dnw.*`method`.*static')):
      with self.assertRaisesRegex(ValueError, error):
        sparse_jax.start(tx, STATIC, {'w': normal(8, 12)})


if __name__ == '__main__':
  absltest.main()
