"""Tests of which products a function computes, and which leaf feeds each."""

import math

from absl.testing import absltest
from absl.testing import parameterized
import flax.linen as nn
from flax import nnx
import jax
from jax import lax
from jax.experimental import pallas
import jax.numpy as jnp
import numpy as np

import sparse_jax
from sparse_jax.jaxprs import products

P = jax.sharding.PartitionSpec

PARAMS = {'w': jnp.ones((6, 4)), 'v': jnp.ones((4, 5)), 's': jnp.ones(6),
          'stack': jnp.ones((3, 6, 6)), 'table': jnp.ones((9, 6)),
          'left': jnp.ones((6, 2)), 'right': jnp.ones((2, 4))}
X, MASK = jnp.ones((7, 6)), jnp.ones((6, 4))


def found(fn, *args):
  """(path, side of the weight, times) of each product."""
  return [(p.path, p.weight, p.times)
          for p in products.find_products(fn, PARAMS, *args)]


@jax.custom_jvp
def bent(x):
  return x * 2


bent.defjvp(lambda primals, tangents: (bent(*primals), tangents[0]))


@jax.custom_vjp
def held(x):
  return x * 2


held.defvjp(lambda x: (held(x), None), lambda _, cotangent: (cotangent,))


def stacked(p, x):
  return lax.scan(lambda x, w: (x @ w, None), x, p['stack'])[0]


def swapping(p, x):
  """A scan that carries a weight, and swaps it with a result as it goes."""
  def body(carry, _):
    a, b = carry
    return (b, a), x @ a

  both = p['stack'][0], x.T @ x @ p['stack'][1]
  return lax.scan(body, both, None, length=4)[1]


def kernel(x_ref, w_ref, out_ref):
  out_ref[...] = x_ref[...] @ w_ref[...]


def by_kernel(p, x):
  return pallas.pallas_call(
      kernel, grid=(7,), out_shape=jax.ShapeDtypeStruct((7, 4), jnp.float32),
      in_specs=[pallas.BlockSpec((1, 6), lambda i: (i, 0)),
                pallas.BlockSpec((6, 4), lambda i: (0, 0))],
      out_specs=pallas.BlockSpec((1, 4), lambda i: (i, 0)))(x, p['w'])


class ProvenanceTest(parameterized.TestCase):
  """What is a view of a parameter, and what is not."""

  @parameterized.named_parameters(
      ('itself', lambda p, x: x @ p['w']),
      ('transposed', lambda p, x: x @ p['w'].T.reshape(4, 3, 2).reshape(
          4, 6).T),
      ('sliced', lambda p, x: x[:, :5] @ p['w'][1:, ::2]),
      ('converted', lambda p, x: x.astype(jnp.bfloat16) @ p['w'].astype(
          jnp.bfloat16)),
      ('masked by a literal', lambda p, x: x @ jnp.where(
          jnp.arange(24).reshape(6, 4) % 2 == 0, p['w'], 0.)),
      ('masked by an argument', lambda p, x: x @ jnp.where(
          MASK > 0, p['w'], 0.)),
      ('multiplied by an argument', lambda p, x: x @ (p['w'] * MASK)),
      ('masked by itself', lambda p, x: x @ jnp.where(
          jnp.abs(p['w']) > .5, p['w'], 0.)),
      ('with a threshold a row', lambda p, x: x @ (jnp.sign(
          p['w']) * jax.nn.relu(jnp.abs(p['w']) - p['s'][:, None]))),
      ('normalised', lambda p, x: x @ (p['s'][:, None] * p['w']
                                       / jnp.linalg.norm(p['w']))),
      ('of a scaled input', lambda p, x: (x * p['s'][None]) @ p['w']),
      ('of a shifted input', lambda p, x: (x + p['table'][:7]) @ p['w']),
      ('of rows looked up', lambda p, x: p['table'][x[:, 0].astype(int)]
       @ p['w']),
      ('of rows that are learnt', lambda p, x: jnp.broadcast_to(
          p['table'], (7, 9, 6)) @ p['w']),
      ('through masks', lambda p, x: x @ sparse_jax.masked_weight(
          p['w'], MASK > 0, MASK > 0)),
      ('by a custom_vjp', lambda p, x: x @ held(p['w'])),
      ('by a custom_jvp', lambda p, x: bent(bent(x) @ bent(p['w']))),
      ('in jit', lambda p, x: jax.jit(jnp.matmul)(x, p['w'])),
      ('in remat', lambda p, x: jax.checkpoint(jnp.matmul)(x, p['w'])),
      ('mapped', lambda p, x: jax.vmap(lambda x: x @ p['w'])(x)),
      ('padded', lambda p, x: jnp.pad(x, ((0, 0), (0, 1))) @ jnp.pad(
          p['w'], ((0, 1), (0, 0)))),
      ('updated', lambda p, x: x @ p['w'].at[0, 0].set(1.)),
      ('held still', lambda p, x: x @ lax.stop_gradient(p['w'])),
      ('in a kernel', lambda p, x: by_kernel(p, x)[:1] + x[:1, :4]))
  def test_a_view(self, fn):
    (path, side, _), = found(fn, X)
    self.assertEqual((path, side), ('w', 'rhs'))

  @parameterized.named_parameters(
      ('a hidden layer', lambda p, x: jax.nn.relu(x @ p['w']) @ p['v'],
       ['w', 'v']),
      ('one matrix twice', lambda p, x: (x @ p['w']) @ p['w'].T, ['w', 'w']),
      ('scores', lambda p, x: (x @ p['w']) @ (x @ p['w']).T,
       ['w', 'w', None]),
      ('data', lambda p, x: x @ x.T, [None]),
      ('a gate', lambda p, x: (x @ p['w'] * p['v'][None, :, 0]) @ p['v'],
       ['w', 'v']),
      ('made by a network', lambda p, x: (x[:, :1] @ x[:1, :6]) @ (
          x[:6, :6] @ p['w']), [None, 'w', None]),
      ('a permutation', lambda p, x: x @ (jnp.eye(6)[::-1] @ p['w']),
       ['w', 'w']),
      ('a repeated identity', lambda p, x: x @ (jnp.where(
          lax.broadcasted_iota(int, (6, 1), 0) == jnp.arange(6)[None], 1., 0.)
                                                @ p['w']), ['w', 'w']),
      ('a norm that a product finds', lambda p, x: x @ (
          p['w'] / jnp.linalg.norm(x[:1] @ p['w'])), ['w', 'w']),
      ('one-hot rows', lambda p, x: jax.nn.one_hot(
          x[:, 0].astype(int), 9) @ p['table'] @ p['w'], ['table', 'w']),
      ('layers side by side', lambda p, x: jnp.concatenate(
          [x @ p['w'], x @ p['left']], 1) @ jnp.concatenate(
              [p['right'].T, p['left'][:2]]), ['w', 'left', 'left']))
  def test_chains(self, fn, paths):
    self.assertEqual([path for path, _, _ in found(fn, X)], paths)

  def test_a_product_of_weights_is_a_view_of_both(self):
    inner, outer = products.find_products(
        lambda p, x: x @ (p['left'] @ p['right']), PARAMS, X)
    self.assertEqual(inner.path, 'left')
    self.assertEqual(outer.leaves, {'left': 12, 'right': 8})

  def test_the_weight_may_be_on_the_left(self):
    def fn(p, x):
      return p['w'].T @ x.T

    self.assertEqual(found(fn, X), [('w', 'lhs', 1)])
    product, = products.find_products(fn, PARAMS, X)
    self.assertFalse(product.input_depends)

  def test_input_depends_on_what_precedes(self):
    first, second = products.find_products(
        lambda p, x: x @ p['w'] @ p['v'], PARAMS, X)
    self.assertFalse(first.input_depends)
    self.assertTrue(second.input_depends)

  def test_integers_and_keys_are_no_weights(self):
    params = {'w': PARAMS['w'], 'key': jax.random.key(0),
              'index': jnp.arange(6)}

    def fn(p, x):
      x = x[:, p['index']] + jax.random.normal(p['key'], x.shape)
      return x @ p['w']

    product, = products.find_products(fn, params, X)
    self.assertEqual(product.lhs.leaves, {})
    self.assertFalse(product.input_depends)

  def test_parameters_may_be_another_argument(self):
    product, = products.find_products(lambda x, p: x @ p['w'], X, PARAMS,
                                      params_argnum=1)
    self.assertEqual(product.path, 'w')


class TimesTest(parameterized.TestCase):
  """How often a product runs."""

  def test_a_scan_multiplies(self):
    self.assertEqual(found(stacked, X), [('stack', 'rhs', 3)])
    nested = lambda p, x: lax.scan(
        lambda x, _: (stacked(p, x), None), x, None, length=5)[0]
    self.assertEqual(found(nested, X), [('stack', 'rhs', 15)])

  def test_what_a_scan_carries_is_followed_around(self):
    """The input of the second round is a result of the first."""
    product, = products.find_products(stacked, PARAMS, X)
    self.assertTrue(product.input_depends)
    self.assertEqual(found(swapping, X)[-1], (None, None, 4))

  def test_a_while_counts_once_and_says_so(self):
    def fn(p, x):
      return lax.while_loop(lambda x: (x @ p['w']).sum() < 0,
                            lambda x: x @ p['stack'][0], x)

    test, body = products.find_products(fn, PARAMS, X)
    self.assertEqual((test.path, body.path), ('w', 'stack'))
    self.assertEqual((test.times, body.times), (1, 1))
    self.assertTrue(test.in_while and body.in_while)

  def test_a_cond_is_its_dearest_branch(self):
    def fn(p, x):
      return lax.switch(x[0, 0].astype(int), [
          lambda x: x @ p['w'], lambda x: x @ p['left'] @ p['right'],
          lambda x: x[:, :4] * 1.], x)

    self.assertEqual(found(fn, X), [('w', 'rhs', 1)])

  def test_devices_multiply(self):
    mesh = jax.make_mesh((8,), ('d',),
                         axis_types=(jax.sharding.AxisType.Auto,))
    fn = jax.shard_map(lambda p, x: x @ p['w'], mesh=mesh,
                       in_specs=(P(), P('d')), out_specs=P('d'))
    product, = products.find_products(fn, PARAMS, jnp.ones((16, 6)))
    self.assertEqual((product.path, product.times), ('w', 8))
    self.assertEqual(product.times * product.multiply_adds, 16 * 6 * 4)

  def test_a_grid_multiplies(self):
    product, = products.find_products(by_kernel, PARAMS, X)
    self.assertEqual((product.times, product.multiply_adds), (7, 24))


class MultiplyAddsTest(parameterized.TestCase):
  """A product of ones sums its multiply-adds, if nothing is padded."""

  @parameterized.parameters(
      ('ij,jk->ik', (3, 4), (4, 5)), ('bij,bjk->bik', (2, 3, 4), (2, 4, 5)),
      ('ijk,jkl->il', (2, 3, 4), (3, 4, 5)), ('i,j->ij', (3,), (4,)),
      ('bqhd,bkhd->bhqk', (2, 3, 2, 4), (2, 5, 2, 4)))
  def test_dot_general(self, subscripts, lhs, rhs):
    fn = lambda w, x: jnp.einsum(subscripts, w, x)
    args = jnp.ones(lhs), jnp.ones(rhs)
    product, = products.find_products(fn, *args)
    self.assertEqual(product.multiply_adds, int(fn(*args).sum()))
    self.assertEqual(product.outputs, math.prod(fn(*args).shape))

  @parameterized.parameters(
      ({'window_strides': (2, 1)}, 4, 6),
      ({'window_strides': (1, 2), 'rhs_dilation': (2, 1)}, 4, 6),
      ({'window_strides': (1, 1), 'lhs_dilation': (2, 3)}, 4, 6),
      ({'window_strides': (2, 1), 'lhs_dilation': (3, 2),
        'rhs_dilation': (1, 2)}, 4, 6),
      ({'window_strides': (1, 1), 'feature_group_count': 2}, 2, 6),
      ({'window_strides': (1, 1), 'feature_group_count': 4}, 1, 8),
      ({'window_strides': (1, 1), 'batch_group_count': 3}, 4, 6))
  def test_convolution(self, given, features, outputs):
    fn = lambda w, x: lax.conv_general_dilated(
        x, w, padding=((0, 0), (0, 0)), **given,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    args = jnp.ones((3, 3, features, outputs)), jnp.ones((3, 8, 7, 4))
    product, = products.find_products(fn, *args)
    self.assertEqual(product.multiply_adds, int(fn(*args).sum()))

  def test_ragged_dot(self):
    """Each row meets the matrix of its group, whatever the groups."""
    w, x = jnp.ones((3, 4, 5)), jnp.ones((7, 4))
    product, = products.find_products(
        lambda w, x: lax.ragged_dot(x, w, jnp.array([2, 0, 5])), w, x)
    self.assertEqual((product.path, product.weight), ('', 'rhs'))
    self.assertEqual(product.multiply_adds, 7 * 4 * 5)

  def test_padding_counts_as_if_it_were_data(self):
    w, x = jnp.ones((3, 3, 2, 5)), jnp.ones((1, 6, 6, 2))
    numbers = ('NHWC', 'HWIO', 'NHWC')
    product, = products.find_products(lambda w, x: lax.conv_general_dilated(
        x, w, (1, 1), 'SAME', dimension_numbers=numbers), w, x)
    self.assertEqual(product.multiply_adds, 6 * 6 * 5 * 9 * 2)


class MethodsTest(parameterized.TestCase):

  @parameterized.parameters(
      (sparse_jax.static, {}), (sparse_jax.rigl, {}), (sparse_jax.dnw, {}),
      (sparse_jax.top_kast, {'backward_sparsity': .25}))
  def test_what_a_method_reads_is_a_view(self, method, arguments):
    method = method(.5, **arguments)
    params = {'w': PARAMS['w'], 'v': PARAMS['v']}
    state = jax.eval_shape(method.init, params)

    def fn(params, state, x):
      weights = method.read(params, state)
      return jnp.tanh(x @ weights['w']) @ weights['v']

    got = products.find_products(fn, params, state, X)
    self.assertEqual([p.path for p in got], ['w', 'v'])

  @parameterized.parameters(
      (sparse_jax.Unstructured(),), (sparse_jax.Block((2, 2)),),
      (sparse_jax.NM(1, 2),), (sparse_jax.Channel(),), (sparse_jax.Filter(),))
  def test_masks_made_on_the_way_leave_a_view(self, structure):
    def fn(params, x):
      mask = sparse_jax.make_mask(jnp.abs(params['w']), .5,
                                  structure=structure)
      return x @ jnp.where(mask, params['w'], 0)

    self.assertEqual(found(fn, X), [('w', 'rhs', 1)])


class ModelsTest(parameterized.TestCase):
  """Models that know nothing of this library."""

  def test_linen_transformer(self):
    class Layer(nn.Module):

      @nn.compact
      def __call__(self, x, _):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name='heads')(y)
        return x + nn.Dense(8, name='down')(nn.relu(
            nn.Dense(16, name='up')(nn.LayerNorm()(x)))), None

    class Model(nn.Module):

      @nn.compact
      def __call__(self, tokens):
        embed = nn.Embed(11, 8, name='embed')
        x = embed(tokens) + self.param('place', nn.initializers.ones, (1, 6, 8))
        layers = nn.scan(nn.remat(Layer), variable_axes={'params': 0},
                         split_rngs={'params': True}, length=3)
        x, _ = layers(name='layers')(x, None)
        return embed.attend(x)

    model, tokens = Model(), jnp.zeros((2, 6), int)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)['params']
    got = products.find_products(lambda p, t: model.apply({'params': p}, t),
                                 params, tokens)
    layers = [f'layers/heads/{name}/kernel' for name in (
        'query', 'key', 'value')] + [None, None] + [
            f'layers/{name}/kernel' for name in ('heads/out', 'up', 'down')]
    self.assertEqual([p.path for p in got], layers + ['embed/embedding'])
    self.assertEqual([p.times for p in got], [3] * 8 + [1])

  def test_nnx(self):
    class Model(nnx.Module):

      def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(.5, rngs=rngs)
        self.einsum = nnx.Einsum('bd,de->be', (4, 3), rngs=rngs)

      def __call__(self, x):
        x = self.norm(self.conv(x)).mean((1, 2))
        return self.einsum(self.dropout(x))

    graph, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)
    got = products.find_products(
        lambda params, rest, x: nnx.merge(graph, params, rest, copy=True)(x),
        params, rest, jnp.ones((2, 5, 5, 3)))
    self.assertEqual([p.path for p in got], ['conv/kernel', 'einsum/kernel'])
    self.assertEqual([p.input_depends for p in got], [False, True])

  def test_lstm(self):
    model, x = nn.RNN(nn.LSTMCell(5)), jnp.ones((2, 7, 3))
    params = jax.eval_shape(model.init, jax.random.key(0), x)['params']
    got = products.find_products(lambda p, x: model.apply({'params': p}, x),
                                 params, x)
    self.assertLen(got, 8)
    self.assertEqual({p.path for p in got}, {
        f'cell/{i}{gate}/kernel' for i in 'ih' for gate in 'ifgo'})
    self.assertEqual({p.times for p in got}, {7})


class ErrorsTest(parameterized.TestCase):

  @parameterized.parameters(2, -1, 1.5, None)
  def test_params_argnum(self, argnum):
    with self.assertRaisesRegex(ValueError, '`params_argnum`'):
      products.find_products(lambda p, x: x @ p['w'], PARAMS, X,
                             params_argnum=argnum)

  def test_shapes_will_do(self):
    shapes = jax.eval_shape(lambda: (PARAMS, X))
    product, = products.find_products(lambda p, x: x @ p['w'], *shapes)
    np.testing.assert_equal(product.shape, (7, 4))


if __name__ == '__main__':
  absltest.main()
