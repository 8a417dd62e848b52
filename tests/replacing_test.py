"""Tests of functions with some of their products replaced."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

import sparse_jax
from sparse_jax.jaxprs import products
from sparse_jax.jaxprs import replacing

P = jax.sharding.PartitionSpec


def keep(path, product, lhs, rhs):
  del path
  return product.apply(lhs, rhs)


def double(path, product, lhs, rhs):
  del path
  return 2 * product.apply(lhs, rhs)


def arrays(seed, *shapes):
  random = np.random.default_rng(seed)
  return [jnp.asarray(.5 * random.standard_normal(shape), jnp.float32)
          for shape in shapes]


PARAMS = dict(zip('abcde', arrays(0, (4, 5), (5, 4), (3, 4, 4), (4, 4),
                                  (3, 3, 2, 4))))
X, IMAGE = arrays(1, (3, 4), (2, 5, 6, 2))


@jax.custom_vjp
def reversed_gradient(x):
  return x


reversed_gradient.defvjp(lambda x: (x, None), lambda _, g: (-g,))


@jax.custom_jvp
def leaky(x):
  return jnp.maximum(x, .1 * x)


leaky.defjvp(lambda primals, tangents: (leaky(*primals), 3 * tangents[0]))


def everything(params, x, image, *, activation=jnp.tanh):
  """One of each structure, with products inside and beside them."""
  mask = jnp.arange(20).reshape(4, 5) % 3 > 0
  x = x @ sparse_jax.masked_weight(params['a'], mask, mask)
  x = jnp.einsum('ij,bi->bj', params['b'], x)
  x, ys = lax.scan(jax.checkpoint(lambda x, w: (activation(x @ w), x.sum())),
                   x, params['c'], reverse=True)
  x = leaky(jax.jit(lambda x: reversed_gradient(x) @ params['d'])(x))
  x = lax.cond(ys.sum() > 0, lambda x: x @ params['a'] @ params['b'],
               lambda x: x * 2, x)
  x = jax.vmap(lambda x: params['d'].T @ x)(x)
  image = lax.conv_general_dilated(
      image, params['e'], (2, 1), ((1, 1), (0, 2)), (1, 2), (1, 1),
      ('NHWC', 'HWIO', 'NHWC'))
  return x, {'image': image.mean((1, 2)), 'ys': ys}


def loss(fn, *args):
  x, rest = fn(*args)
  return jnp.sum(jnp.cos(x)) + jnp.sum(jnp.sin(rest['image']))


class IdentityTest(parameterized.TestCase):
  """Replaced by themselves, products change nothing."""

  def test_values_and_gradients(self):
    copied = replacing.replace_products(everything, keep)
    got, want = (jax.jit(jax.value_and_grad(functools.partial(loss, fn)))(
        PARAMS, X, IMAGE) for fn in (copied, everything))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(
        a, b, rtol=1e-5, atol=1e-6), got, want)

  def test_the_tree_of_results_and_keywords(self):
    copied = replacing.replace_products(everything, keep)
    got = jax.eval_shape(functools.partial(copied, activation=jnp.sin),
                         PARAMS, X, IMAGE)
    want = jax.eval_shape(everything, PARAMS, X, IMAGE)
    self.assertEqual(got, want)
    text = str(jax.make_jaxpr(functools.partial(copied, activation=jnp.sin))(
        PARAMS, X, IMAGE))
    self.assertIn('= sin ', text)
    self.assertNotIn('tanh', text)

  def test_the_same_products_are_found_in_it(self):
    copied = replacing.replace_products(everything, keep)
    got, want = ([(p.path, p.times, p.multiply_adds) for p in
                  products.find_products(fn, PARAMS, X, IMAGE)]
                 for fn in (copied, everything))
    self.assertEqual(got, want)

  def test_structure_is_kept(self):
    """What is compiled once, rematerialised or differentiated by rule."""
    def primitives(jaxpr):
      for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for body in products.bodies_of(eqn):
          yield from primitives(products.open_jaxpr(body)[0])

    copied = replacing.replace_products(everything, keep)
    for name in ('jit', 'scan', 'remat2', 'cond', 'custom_vjp_call',
                 'custom_jvp_call', 'dot_general', 'conv_general_dilated'):
      counts = [list(primitives(jax.make_jaxpr(fn)(PARAMS, X, IMAGE))).count(
          name) for fn in (copied, everything)]
      self.assertEqual(*counts, name)

  def test_mapped_over_examples(self):
    fn = lambda params, x: jnp.tanh(x @ params['a']) @ params['b']
    copied = replacing.replace_products(fn, keep)
    got = jax.vmap(copied, in_axes=(None, 0))(PARAMS, X)
    np.testing.assert_allclose(got, fn(PARAMS, X), rtol=1e-6)

  def test_a_while(self):
    """In its condition and in its body."""
    loop = lambda w, x: lax.while_loop(lambda x: (x @ w).sum() < 9,
                                       lambda x: x @ w + 1, x)
    w = jnp.abs(PARAMS['d'])
    doubled = jax.jit(replacing.replace_products(loop, double))(w, X)
    np.testing.assert_allclose(doubled, jax.jit(loop)(2 * w, X), rtol=1e-6)

  def test_on_several_devices(self):
    mesh = jax.make_mesh((4,), ('d',), devices=jax.devices()[:4],
                         axis_types=(jax.sharding.AxisType.Auto,))
    fn = jax.shard_map(
        lambda p, x: (lax.psum(x @ p['a'], 'd'), x @ p['d']), mesh=mesh,
        in_specs=(P(), P('d')), out_specs=(P(), P('d')))
    x, = arrays(2, (8, 4))
    got = jax.jit(replacing.replace_products(fn, double))(PARAMS, x)
    both = {'a': 2 * PARAMS['a'], 'd': 2 * PARAMS['d']}
    for a, b in zip(got, jax.jit(fn)(both, x)):
      np.testing.assert_allclose(a, b, rtol=1e-6)

  def test_shardings_in_types(self):
    mesh = jax.make_mesh((4, 2), ('d', 'm'),
                         axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    fn = lambda p, x: jnp.tanh(x @ p['a']) + x[:, :1]
    x, w = arrays(2, (8, 4), (4, 6))
    with jax.set_mesh(mesh):
      args = {'a': jax.device_put(w, P(None, 'm'))}, jax.device_put(x, P('d'))
      got, want = (jax.eval_shape(jax.grad(lambda *args: f(*args).sum()), *args)
                   for f in (replacing.replace_products(fn, keep), fn))
    self.assertEqual(got['a'].sharding.spec, P(None, 'm'))
    self.assertEqual(got, want)


class ReplacedTest(parameterized.TestCase):

  def test_doubled_products_are_doubled_weights(self):
    """Of the chosen leaves, in every place where they are used."""
    rule = replacing.replace_products(everything, double, paths=iter('ae'))
    both = PARAMS | {name: 2 * PARAMS[name] for name in 'ae'}
    got = jax.jit(functools.partial(loss, rule))(PARAMS, X, IMAGE)
    want = jax.jit(functools.partial(loss, everything))(both, X, IMAGE)
    np.testing.assert_allclose(got, want, rtol=1e-5)

  def test_a_rule_has_its_own_gradient(self):
    """As SWAT's dW, from a part of the activations."""
    @jax.custom_vjp
    def swat(x, w):
      return x @ w

    def backward(kept, dy):
      x, w = kept
      return dy @ w.T, jnp.where(jnp.abs(x) > .5, x, 0).T @ dy

    swat.defvjp(lambda x, w: (x @ w, (x, w)), backward)
    fn = lambda params, x: jnp.sum(jnp.tanh(x @ params['a']) @ params['b'])
    ruled = replacing.replace_products(
        fn, lambda path, product, x, w: swat(x, w), paths=['a'])
    got, want = (jax.grad(f)(PARAMS, X) for f in (ruled, fn))
    np.testing.assert_allclose(got['b'], want['b'], rtol=1e-6)
    dy = (1 - jnp.tanh(X @ PARAMS['a']) ** 2) * PARAMS['b'].sum(1)[None]
    np.testing.assert_allclose(
        got['a'], jnp.where(jnp.abs(X) > .5, X, 0).T @ dy, rtol=1e-5)

  @parameterized.parameters(
      ((6, 5), ((0,), (3,)), ((), ()), 'kj,abik->jabi'),
      ((3, 6, 5), ((1,), (3,)), ((0,), (1,)), 'bkj,abik->bjai'),
      ((3, 5, 4, 6), ((3, 2), (3, 2)), ((0,), (1,)), 'bjik,abik->bja'))
  def test_the_weight_comes_on_the_right(self, shape, contracted, batched,
                                         subscripts):
    """Whichever side the model has it on, and with batch axes."""
    x, w = arrays(3, (2, 3, 4, 6), shape)
    fn = lambda w, x: lax.dot_general(w, x, (contracted, batched))
    seen = []

    def dot_general(lhs, rhs, dimension_numbers, **given):
      seen.append(rhs.shape)
      return lax.dot_general(lhs, rhs, dimension_numbers, **given)

    def rule(path, product, lhs, rhs):
      self.assertEqual(product.weight, 'lhs')
      return product.apply(lhs, rhs, dot_general=dot_general)

    got = jax.jit(replacing.replace_products(fn, rule))(w, x)
    self.assertEqual(seen, [w.shape])
    np.testing.assert_allclose(got, np.einsum(subscripts, w, x), rtol=1e-5,
                               atol=1e-6)

  def test_a_product_outside_a_custom_rule_leaves_it(self):
    """But with one inside, the rule's own derivative holds."""
    @jax.custom_vjp
    def layer(x, w):
      return x @ w

    layer.defvjp(lambda x, w: (x @ w, None), lambda _, g: (None, None))
    fn = lambda p, x: jnp.sum(layer(reversed_gradient(x @ p['a']), p['b']))
    for paths, factors in ((['a'], (0., 0.)), (['b'], (-1., 1.))):
      ruled = replacing.replace_products(fn, keep, paths=paths)
      got = jax.grad(ruled)(PARAMS, X)
      plain = jax.grad(lambda p, x: jnp.sum(x @ p['a'] @ p['b']))(PARAMS, X)
      for name, factor in zip('ab', factors):
        np.testing.assert_allclose(got[name], factor * plain[name], rtol=1e-6,
                                   atol=1e-7)

  def test_one_compiled_function_with_two_weights(self):
    """The jaxpr of an inner jit is one object; its weights are two."""
    layer = jax.jit(lambda x, w: jnp.tanh(x @ w))
    fn = lambda p, x: layer(layer(x, p['d']), p['f'])
    params = {'d': PARAMS['d'], 'f': PARAMS['d'] + .1}
    seen = []

    def rule(path, product, lhs, rhs):
      seen.append(path)
      return 2 * product.apply(lhs, rhs)

    got = replacing.replace_products(fn, rule, paths=['f'])(params, X)
    self.assertEqual(seen, ['f'])
    want = fn(params | {'f': 2 * params['f']}, X)
    np.testing.assert_allclose(got, want, rtol=1e-6)

  def test_a_flax_model_with_state(self):
    class Model(nn.Module):

      @nn.compact
      def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(nn.Conv(4, (3, 3))(x))
        return nn.Dense(2)(nn.relu(x).mean((1, 2)))

    model = Model()
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGE)
    variables = jax.tree.map(lambda leaf: arrays(5, leaf.shape)[0], shapes)

    def apply(params, stats, x):
      return model.apply({'params': params, 'batch_stats': stats}, x,
                         mutable=['batch_stats'])

    args = variables['params'], variables['batch_stats'], IMAGE
    ruled = replacing.replace_products(apply, double,
                                       paths=['Dense_0/kernel'])
    (got, stats), (want, same) = (jax.jit(f)(*args) for f in (ruled, apply))
    bias = args[0]['Dense_0']['bias']
    np.testing.assert_allclose(got, 2 * want - bias[None], rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
                 stats, same)


class ErrorsTest(parameterized.TestCase):

  def test_rule(self):
    with self.assertRaisesRegex(ValueError, '`rule`'):
      replacing.replace_products(everything, None)

  def test_paths(self):
    ruled = replacing.replace_products(everything, keep, paths=['z'])
    with self.assertRaisesRegex(ValueError, '`paths`.*\'z\''):
      ruled(PARAMS, X, IMAGE)

  @parameterized.parameters(lambda x: x[:1], lambda x: x.astype(jnp.bfloat16))
  def test_a_result_that_does_not_fit(self, change):
    ruled = replacing.replace_products(
        lambda p, x: x @ p['a'], lambda *args: change(keep(*args)))
    with self.assertRaisesRegex(ValueError, '`rule`.*\'a\''):
      ruled(PARAMS, X)

  def test_out_of_reach(self):
    @jax.custom_batching.custom_vmap
    def layer(x, w):
      return x @ w

    layer.def_vmap(lambda size, batched, x, w: (x @ w, batched[0]))
    fn = lambda p, x: layer(x, p['a']) @ p['b']
    with self.assertRaisesRegex(ValueError, '`paths`.*custom_vmap'):
      replacing.replace_products(fn, keep)(PARAMS, X)
    got = replacing.replace_products(fn, double, paths=['b'])(PARAMS, X)
    np.testing.assert_allclose(got, 2 * fn(PARAMS, X), rtol=1e-6)


if __name__ == '__main__':
  absltest.main()
