"""Tests of Flax layers with packed kernels."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
from flax import nnx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax
from sparse_jax.blocks import packing as packed_lib

HALF = dict(sparsity=.5, pad=True)
# A layer of ours, Flax's own, and an input.
DENSE = {
    'dense': (dict(features=6), nn.Dense(6), (3, 4)),
    'axes': (dict(features=(2, 3), axis=(-2, -1)),
             nn.DenseGeneral((2, 3), axis=(-2, -1)), (3, 2, 2)),
    'no_bias': (dict(features=6, use_bias=False),
                nn.Dense(6, use_bias=False), (2, 3, 4)),
    'half': (dict(features=6, dtype=jnp.bfloat16),
             nn.Dense(6, dtype=jnp.bfloat16), (3, 4))}
CONV = {
    'conv': (dict(features=4, kernel_size=(3, 3)), nn.Conv(4, (3, 3)),
             (2, 5, 5, 3)),
    'strided': (dict(features=4, kernel_size=(2, 3), strides=2,
                     kernel_dilation=(1, 2), padding=((0, 1), (1, 1))),
                nn.Conv(4, (2, 3), strides=2, kernel_dilation=(1, 2),
                        padding=((0, 1), (1, 1))), (2, 6, 7, 3)),
    'one_axis': (dict(features=4, kernel_size=3, padding='VALID'),
                 nn.Conv(4, (3,), padding='VALID'), (2, 6, 3))}


def draw(shape, seed=0):
  return jnp.asarray(np.random.RandomState(seed).randn(*shape), jnp.float32)


def init(model, x):
  """Shapes by the layer, numbers by NumPy: quick to make."""
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)['params']
  leaves, tree = jax.tree.flatten(shapes)
  return jax.tree.unflatten(tree, [draw(leaf.shape, seed)
                                   for seed, leaf in enumerate(leaves)])


def packed_kernel(kernel, conv, block=(2, 2)):
  if not conv:  # A dense kernel is a matrix, whatever its axes.
    kernel = kernel.reshape(4, -1)
  return sparse_jax.pack(kernel, block=block, **HALF)


class LinenTest(parameterized.TestCase):

  @parameterized.named_parameters(
      *((name, sparse_jax.PackedDense, *case)
        for name, case in DENSE.items()),
      *((name, sparse_jax.PackedConv, *case) for name, case in CONV.items()))
  def test_is_flaxs_layer_with_the_unpacked_kernel(self, layer, args, flax,
                                                   shape):
    """Dense, packed, and Flax's own under the interceptor."""
    x, ours = draw(shape, 9), layer(**args)
    params = init(flax, x)
    self.assertEqual(jax.tree.map(jnp.shape, init(ours, x)),
                     jax.tree.map(jnp.shape, params))
    packed = packed_kernel(params['kernel'], layer is sparse_jax.PackedConv)
    filled = sparse_jax.unpack(packed).reshape(params['kernel'].shape)
    weights, indices = sparse_jax.partition_packed(
        {**params, 'kernel': packed})
    close = functools.partial(
        np.testing.assert_allclose,
        atol=1e-5 if args.get('dtype') is None else .1)

    @jax.jit
    def outputs(x):
      with nn.intercept_methods(sparse_jax.packed_interceptor):
        unedited = flax.apply({'params': {**params, 'kernel': packed}}, x)
      return (flax.apply({'params': params}, x),
              ours.apply({'params': params}, x),
              flax.apply({'params': {**params, 'kernel': filled}}, x),
              ours.apply({'params': weights, 'packed': indices}, x), unedited)

    dense, ours_dense, want, got, unedited = outputs(x)
    self.assertEqual(got.dtype, want.dtype)
    for a, b in (ours_dense, dense), (got, want), (unedited, want):
      close(np.asarray(a, np.float32), np.asarray(b, np.float32))

  @parameterized.parameters(
      (sparse_jax.PackedDense(6, block=(2, 3), sparsity=.5), (1, 4), 2),
      (sparse_jax.PackedConv(4, (3, 3), block=(2, 2), sparsity=.75),
       (1, 4, 4, 4), 9))
  def test_starts_packed_with_indices_apart(self, layer, shape, count):
    variables = jax.jit(layer.init)(jax.random.key(1), jnp.ones(shape))
    self.assertEqual(variables['params']['kernel'].blocks.shape[0], count)
    kinds = {name: {leaf.dtype.kind for leaf in jax.tree.leaves(tree)}
             for name, tree in variables.items()}
    self.assertEqual(kinds, {'params': {'f'}, 'packed': {'i'}})
    kernel = sparse_jax.combine_packed(variables['params']['kernel'],
                                       variables['packed']['kernel'])
    self.assertLen(set(kernel.ids.tolist()), count)

  def test_refreshed_indices_compile_nothing(self):
    layer = sparse_jax.PackedDense(6, block=(2, 2), sparsity=.5)
    variables = layer.init(jax.random.key(2), jnp.ones((1, 4)))
    apply = jax.jit(layer.apply)
    before = apply(variables, jnp.ones((1, 4)))
    kernel = variables['packed']['kernel']
    moved = kernel.replace(rows=1 - kernel.rows)
    after = apply({**variables, 'packed': {'kernel': moved}}, jnp.arange(4.)[
        None])
    self.assertEqual(apply._cache_size(), 1)
    self.assertEqual(before.shape, after.shape)

  def test_attention_that_nobody_edited(self):
    """All four projections packed; the gradient is that of the masked run."""
    model = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)
    x = draw((2, 3, 4), 3)
    params = init(model, x)
    method = sparse_jax.packed_static(.5, block=(2, 2))
    packed, _ = method.pack(params)
    dense = jax.tree.map(
        lambda leaf, old: sparse_jax.unpack(leaf).reshape(old.shape)
        if packed_lib.is_packed(leaf) else leaf, packed, params,
        is_leaf=packed_lib.is_packed)

    def loss(params, x):
      with nn.intercept_methods(sparse_jax.packed_interceptor):
        return jnp.sum(model.apply({'params': params}, x)**2)

    slope = jax.jit(jax.value_and_grad(loss, (0, 1), allow_int=True))
    (got, (grads, got_x)), (want, (dense_grads, want_x)) = (
        slope(packed, x), slope(dense, x))
    np.testing.assert_allclose(got, want, rtol=1e-4)
    np.testing.assert_allclose(got_x, want_x, atol=1e-3)
    for name in 'query', 'key', 'value', 'out':
      leaf = packed[name]['kernel']
      whole = np.asarray(dense_grads[name]['kernel']).reshape(leaf.shape)
      np.testing.assert_allclose(
          grads[name]['kernel'].blocks,
          packed_lib.tile(whole, leaf.block)[np.asarray(leaf.ids)], atol=1e-3)

  def test_trains_with_a_packed_method(self):
    model = nn.Sequential([sparse_jax.PackedDense(8), nn.relu,
                           sparse_jax.PackedDense(2)])
    x = draw((16, 4), 4)
    params, tx = init(model, x), optax.adam(.05)
    method = sparse_jax.packed_top_kast(.5, backward_sparsity=.25,
                                        block=(2, 2), update_every=2)
    params, state = method.pack(params)

    def loss(params, x):
      weights, indices = sparse_jax.partition_packed(params)
      y = model.apply({'params': weights, 'packed': indices}, x)
      return jnp.mean((y - x[:, :2])**2)

    slots = tx.init(sparse_jax.partition_packed(params)[0])
    step, losses = sparse_jax.packed_step(loss, tx, method=method), []
    for _ in range(6):
      params, slots, state, value = step(params, slots, state, x)
      losses.append(float(value))
    self.assertLess(losses[-1], losses[0])

  @parameterized.named_parameters(
      ('alone', sparse_jax.PackedDense(6, sparsity=.5), '`block`'),
      ('alone_too', sparse_jax.PackedDense(6, block=(2, 2)), '`sparsity`'),
      ('divides', sparse_jax.PackedDense(6, block=(3, 3), sparsity=.5),
       '`block`'),
      ('axis', sparse_jax.PackedDense(6, axis=0), '`axis`'))
  def test_bad_layers(self, layer, message):
    with self.assertRaisesRegex(ValueError, message):
      layer.init(jax.random.key(0), jnp.ones((1, 4)))

  @parameterized.named_parameters(
      ('groups', nn.Conv(4, (3,), feature_group_count=2),
       '`feature_group_count`'),
      ('dilation', nn.Conv(4, (3,), input_dilation=2), '`input_dilation`'))
  def test_options_that_packed_kernels_do_not_have(self, module, message):
    packed = sparse_jax.pack(jnp.ones((3, 4, 4)), block=(2, 2), sparsity=.5)
    with nn.intercept_methods(sparse_jax.packed_interceptor):
      with self.assertRaisesRegex(ValueError, message):
        module.apply({'params': {'kernel': packed, 'bias': jnp.ones(4)}},
                     jnp.ones((1, 5, 4)))


class NnxTest(parameterized.TestCase):

  @parameterized.named_parameters(
      ('dense', lambda rngs, **a: sparse_jax.NnxPackedDense(4, 6, rngs=rngs,
                                                            **a),
       nn.Dense(6), (3, 4)),
      ('axes', lambda rngs, **a: sparse_jax.NnxPackedDense(
          (2, 2), (2, 3), use_bias=False, rngs=rngs, **a),
       nn.DenseGeneral((2, 3), axis=(-2, -1), use_bias=False), (3, 2, 2)),
      ('conv', lambda rngs, **a: sparse_jax.NnxPackedConv(
          3, 4, (3, 3), strides=2, rngs=rngs, **a),
       nn.Conv(4, (3, 3), strides=2), (2, 5, 5, 3)))
  def test_is_flaxs_layer_with_the_unpacked_kernel(self, make, flax, shape):
    x, layer = draw(shape, 9), make(nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    np.testing.assert_allclose(layer(x), flax.apply({'params': params}, x),
                               atol=1e-5)
    packed = packed_kernel(params['kernel'], 'bias' in params and
                           params['kernel'].ndim > 2)
    filled = sparse_jax.unpack(packed).reshape(params['kernel'].shape)
    got = sparse_jax.nnx_packed(layer, {**params, 'kernel': packed})(x)
    want = flax.apply({'params': {**params, 'kernel': filled}}, x)
    np.testing.assert_allclose(got, want, atol=1e-5)

  def test_trains_by_an_optimizer_of_nnx(self):
    """Blocks are Params, indices are not."""
    model = sparse_jax.NnxPackedDense(4, 6, block=(2, 2), sparsity=.5,
                                      rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(.1), wrt=nnx.Param)
    x, where = draw((5, 4)), model.indices.get_value()

    @nnx.jit
    def step(model, optimizer):
      loss = lambda model: jnp.mean((model(x) - 1)**2)
      value, grads = nnx.value_and_grad(loss)(model)
      optimizer.update(model, grads)
      return value

    losses = [float(step(model, optimizer)) for _ in range(3)]
    self.assertLess(losses[2], losses[0])
    jax.tree.map(np.testing.assert_array_equal, where,
                 model.indices.get_value())

  def test_trains_with_a_packed_method(self):
    model = nnx.Sequential(sparse_jax.NnxPackedDense(4, 8, rngs=nnx.Rngs(0)),
                           nnx.relu,
                           sparse_jax.NnxPackedDense(8, 2, rngs=nnx.Rngs(1)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    method = sparse_jax.packed_set(.5, block=(2, 2), update_every=2)
    params, state = method.pack(params)
    loss = lambda params, x: jnp.mean(
        (sparse_jax.nnx_packed(model, params)(x) - x[:, :2])**2)
    tx = optax.adam(.05)
    slots = tx.init(sparse_jax.partition_packed(params)[0])
    step, losses = sparse_jax.packed_step(loss, tx, method=method), []
    for _ in range(6):
      params, slots, state, value = step(params, slots, state, draw((16, 4)))
      losses.append(float(value))
    self.assertLess(losses[-1], losses[0])

  def test_a_packed_leaf_needs_a_packed_layer(self):
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    packed = sparse_jax.pack(jnp.ones((4, 4)), block=(2, 2), sparsity=.5)
    with self.assertRaisesRegex(ValueError, '`params`.*kernel'):
      sparse_jax.nnx_packed(model, {'kernel': packed})


if __name__ == '__main__':
  absltest.main()
