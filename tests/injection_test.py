"""Tests of the operators of a method inside models that nobody edited."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import chex
from flax import linen as nn
from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax
from sparse_jax import Operands


def top(x, sparsity):
  """The largest entries, the others 0; by sorting, ties to the earlier."""
  order = jnp.argsort(-jnp.abs(x).ravel(), stable=True)
  kept = order[:sparse_jax.masks.topk.keep_count(x.size, sparsity)]
  return jnp.zeros(x.size).at[kept].set(x.ravel()[kept]).reshape(x.shape)


class Conv(nn.Module):
  """Somebody's network: convolutions, normalisation, a head."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(6, (3, 3), strides=2, name='stem')(x))
    x = nn.LayerNorm(name='norm')(x)
    x = nn.relu(nn.Conv(6, (1, 1), name='mix')(x))
    return nn.Dense(3, name='head')(x.reshape(x.shape[0], -1))


def normal(*shapes):
  """float32 arrays of these shapes, the same at every call."""
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@functools.cache
def setup():
  model, (images,) = Conv(), normal((4, 6, 6, 2))
  params = jax.jit(model.init)(jax.random.key(0), images)['params']
  return model, params, images


def plain():
  """A function of two products, weights and inputs."""
  def apply(params, x):
    return nn.relu(x @ params['mix']['kernel']) @ params['head']['kernel']

  mix, head, x = normal((6, 8), (8, 3), (5, 6))
  return apply, {'mix': {'kernel': mix}, 'head': {'kernel': head}}, x


def conv(x, w, stride):
  return lax.conv_general_dilated(x, w, (stride, stride), 'SAME',
                                  dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def along_last(bias, ndim):
  return bias.reshape((1,) * (ndim - 1) + bias.shape)


def grads_of(method, apply, params, *args, **options):
  """Gradients of sum(outputs**2) with the method's operators."""
  def loss_fn(params, state, *args):
    run = sparse_jax.operators.with_operators(apply, method, state, **options)
    return jnp.sum(run(method.read(params, state), *args)**2)

  return jax.jit(lambda params, *args: jax.grad(loss_fn)(
      params, method.init(params), *args))(params, *args)


class WithOperatorsTest(parameterized.TestCase):

  @parameterized.parameters(
      (sparse_jax.swat(.5, activation_sparsity=.75), .5, .5, .75, 0.),
      (sparse_jax.operators.add_operands(sparse_jax.dense(), Operands(
          backward_weight=.5, backward_activation=.5)), 0., .5, .5, 0.),
      (sparse_jax.operators.add_operands(sparse_jax.dense(), Operands(
          output_gradient=.75)), 0., 0., 0., .75))
  def test_gradients_are_those_written_by_hand(self, method, forward, back,
                                               saved, error):
    model, params, images = setup()
    found = grads_of(method, lambda p, x: model.apply({'params': p}, x), params,
                     images)

    @jax.jit
    def by_hand(params, images):
      w = {name: top(params[name]['kernel'], forward)
           for name in ('stem', 'mix', 'head')}
      stem = conv(images, w['stem'], 2) + along_last(params['stem']['bias'], 4)
      normed, norm_pull = jax.vjp(
          lambda x: nn.LayerNorm().apply({'params': params['norm']}, x),
          nn.relu(stem))
      mix = conv(normed, w['mix'], 1) + along_last(params['mix']['bias'], 4)
      flat = nn.relu(mix).reshape(4, -1)
      out = flat @ w['head'] + along_last(params['head']['bias'], 2)
      dflat, dhead = pull(jnp.matmul, flat, w['head'], 2 * out)
      dmix = dflat.reshape(mix.shape) * (mix > 0)
      dnormed, dmix_kernel = pull(lambda x, w: conv(x, w, 1), normed, w['mix'],
                                  dmix)
      dstem = norm_pull(dnormed)[0] * (stem > 0)
      _, dstem_kernel = pull(lambda x, w: conv(x, w, 2), images, w['stem'],
                             dstem)
      return {'head': dhead, 'mix': dmix_kernel, 'stem': dstem_kernel}, (
          dmix.sum((0, 1, 2)))

    def pull(product, x, w, dy):
      """dX at the backward weight, dW at the backward activation."""
      dy = top(dy, error)
      return jax.vjp(lambda x: product(x, top(w, back)), x)[1](dy)[0], (
          jax.vjp(lambda w: product(top(x, saved), w), w)[1](dy)[0])

    expected, mix_bias = by_hand(params, images)
    for name, kernel in expected.items():
      np.testing.assert_allclose(found[name]['kernel'], kernel, rtol=2e-4,
                                 atol=1e-5, err_msg=name)
    np.testing.assert_allclose(found['mix']['bias'], mix_bias, rtol=1e-4,
                               atol=1e-5)

  def test_values_do_not_depend_on_backward_operands(self):
    model, params, images = setup()
    method = sparse_jax.swat(.5)
    apply = lambda p, x: model.apply({'params': p}, x)

    @jax.jit
    def both(params, images):
      state = method.init(params)
      weights = method.read(params, state)
      run = sparse_jax.operators.with_operators(apply, method, state)
      return run(weights, images), apply(weights, images)

    np.testing.assert_array_equal(*both(params, images))

  def test_a_method_without_operators_leaves_the_function_alone(self):
    fn = lambda params, x: x @ params
    method = sparse_jax.rigl(.5)
    state = method.init(jnp.ones((4, 4)))
    self.assertIs(sparse_jax.operators.with_operators(fn, method, state), fn)
    self.assertEqual(sparse_jax.operators.first_operator_thresholds(
        method, jnp.ones((4, 4)), state), {})

  def test_dense_operands_change_nothing(self):
    apply, params, images = plain()
    method = sparse_jax.operators.add_operands(sparse_jax.dense(), Operands())
    chex.assert_trees_all_equal(
        grads_of(method, apply, params, images),
        grads_of(sparse_jax.dense(), apply, params, images))

  def test_nnx_model_has_the_gradients_of_the_linen_one(self):
    linen = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)])
    x, = normal((5, 6))
    params = jax.jit(linen.init)(jax.random.key(0), x)['params']
    model = nnx.Sequential(nnx.Linear(6, 8, rngs=nnx.Rngs(0)), nnx.relu,
                           nnx.Linear(8, 3, rngs=nnx.Rngs(0)))
    for layer, name in ((0, 'layers_0'), (2, 'layers_2')):
      model.layers[layer].kernel[...] = params[name]['kernel']
    graph, state = nnx.split(model)
    method = sparse_jax.swat(.5)
    found = grads_of(method, lambda s, x: nnx.merge(graph, s)(x), state, x)
    expected = grads_of(method, lambda p, x: linen.apply({'params': p}, x),
                        params, x)
    for layer, name in ((0, 'layers_0'), (2, 'layers_2')):
      np.testing.assert_allclose(found['layers'][layer]['kernel'][...],
                                 expected[name]['kernel'], rtol=1e-6)

  def test_goes_through_scan_remat_and_vmap(self):
    def apply(params, x):
      layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
      return jax.vmap(lambda x: lax.scan(layer, x[None], params)[0])(x)

    params, x = normal((3, 4, 4), (5, 4))
    dense = grads_of(sparse_jax.dense(), apply, params, x)
    method = sparse_jax.operators.add_operands(
        sparse_jax.dense(), Operands(backward_activation=.5),
        is_sparse=lambda path, leaf: True)
    sparse = grads_of(method, apply, params, x)
    self.assertEqual(sparse.shape, dense.shape)
    self.assertTrue(np.any(sparse != dense))
    # The last layer's dX is dense, so that of the first only its dW differs.
    self.assertTrue(np.isfinite(sparse).all())

  def test_masked_update_stops_the_gradient_at_the_weights_in_use(self):
    apply, params, images = plain()
    free = grads_of(sparse_jax.swat(.5), apply, params, images)
    method = sparse_jax.swat(.5, masked_update=True)
    bound = grads_of(method, apply, params, images)
    masks = jax.jit(method.init)(params).forward_masks
    for name in ('mix', 'head'):
      np.testing.assert_array_equal(
          bound[name]['kernel'],
          np.where(masks[name]['kernel'], free[name]['kernel'], 0))

  def test_a_sharded_batch_has_the_same_gradients(self):
    apply, params, _ = plain()
    x, = normal((16, 6))
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ('batch',))
    spread = jax.device_put(x, jax.NamedSharding(
        mesh, jax.sharding.PartitionSpec('batch')))
    method = sparse_jax.swat(.5, activation_sparsity=.75)
    chex.assert_trees_all_close(
        grads_of(method, apply, params, spread),
        grads_of(method, apply, params, x), rtol=1e-5)

  def test_powerprop_keeps_the_operators(self):
    apply, params, images = plain()
    method = sparse_jax.swat(.5, activation_sparsity=.9)
    chex.assert_trees_all_close(
        grads_of(sparse_jax.powerprop(method, 1.), apply, params, images),
        grads_of(method, apply, params, images), rtol=1e-6)


class ThresholdsTest(parameterized.TestCase):

  def run_steps(self, method, period, steps=5):
    """Losses and stored thresholds of a small run, step by step."""
    model, params, images = plain()
    tx = sparse_jax.sparsify(optax.sgd(.01), method)
    state = jax.jit(tx.init)(params)
    thresholds = sparse_jax.operators.first_operator_thresholds(method, params, state)

    def loss_fn(params, thresholds, state, due):
      apply = sparse_jax.operators.with_operators(
          model, method, state,
          thresholds=thresholds if period else None, due=due)
      return jnp.mean((apply(method.read(params, state), images) - 1)**2)

    @jax.jit
    def step(params, state, thresholds, due):
      loss, (grads, thresholds) = jax.value_and_grad(loss_fn, (0, 1))(
          params, thresholds, state, due)
      updates, state = tx.update(grads, state, params)
      return optax.apply_updates(params, updates), state, thresholds, loss

    losses, seen = [], []
    for i in range(steps):
      params, state, thresholds, loss = step(params, state, thresholds,
                                             i % max(period, 1) == 0)
      losses.append(loss)
      seen.append(thresholds)
    return np.array(losses), seen

  def test_measured_every_step_they_are_the_exact_top_k(self):
    method = sparse_jax.swat(.5, activation_sparsity=.8)
    np.testing.assert_allclose(self.run_steps(method, 1)[0],
                               self.run_steps(method, 0)[0], rtol=1e-5)

  def test_between_measurements_they_stay(self):
    method = sparse_jax.swat(.5, activation_sparsity=.8)
    after = self.run_steps(method, 3, steps=4)[1]
    chex.assert_trees_all_equal(after[0], after[1])
    chex.assert_trees_all_equal(after[0], after[2])
    self.assertNotEqual(after[0]['head/kernel'].backward_activation,
                        after[3]['head/kernel'].backward_activation)

  def test_each_serves_one_product(self):
    params = {'kernel': jnp.ones((4, 4))}
    method = sparse_jax.swat(.5)
    state = method.init(params)
    thresholds = sparse_jax.operators.first_operator_thresholds(method, params, state)
    twice = sparse_jax.operators.with_operators(
        lambda p, x: x @ p['kernel'] @ p['kernel'], method, state,
        thresholds=thresholds)
    with self.assertRaisesRegex(ValueError, r"'kernel'.*\[1, 1\] times"):
      twice(params, jnp.ones((2, 4)))
    lacking = sparse_jax.operators.with_operators(
        lambda p, x: x @ p['kernel'], method, state, thresholds={})
    with self.assertRaisesRegex(ValueError, "`thresholds`.*'kernel'"):
      lacking(params, jnp.ones((2, 4)))

  @parameterized.parameters(False, True)
  def test_each_layer_of_a_scan_has_its_own(self, reverse):
    """Gradients and thresholds are those of the layers one by one."""
    layer = jax.checkpoint(lambda x, w: (jax.nn.relu(x @ w), None))
    stacked, x = normal((3, 6, 6), (8, 6))
    scanned = lambda p, x: lax.scan(layer, x, p['kernel'], reverse=reverse)[0]
    order = range(3)[::-1] if reverse else range(3)
    method = sparse_jax.operators.add_operands(
        sparse_jax.dense(), Operands(backward_activation=.5),
        is_sparse=lambda path, leaf: True)

    def one_by_one(params, x):
      for i in order:
        x, _ = layer(x, params[str(i)])
      return x

    def run(fn, params):
      state, times = method.init(params), {
          p.path: p.times for p in sparse_jax.jaxprs.find_products(fn, params, x)}
      thresholds = sparse_jax.operators.first_operator_thresholds(
          method, params, state, times=times)

      @jax.jit
      def grads(params, thresholds, x, due):
        apply = lambda p, t: jnp.sum(jnp.sin(sparse_jax.operators.with_operators(
            fn, method, state, thresholds=t, due=due)(p, x)))
        return jax.grad(apply, (0, 1))(params, thresholds)

      _, thresholds = grads(params, thresholds, x, True)
      return grads(params, thresholds, x + .1, False)

    got, thresholds = run(scanned, {'kernel': stacked})
    want, others = run(one_by_one, {str(i): stacked[i] for i in range(3)})
    for i in range(3):
      np.testing.assert_allclose(got['kernel'][i], want[str(i)], atol=1e-5)
      chex.assert_trees_all_close(
          jax.tree.map(lambda t, i=i: t[i], thresholds['kernel']),
          others[str(i)], atol=1e-6)
    self.assertLen(set(map(float, thresholds['kernel'].backward_activation)), 3)

  def test_a_scan_needs_one_for_each_layer(self):
    stacked, x = normal((3, 4, 4), (5, 4))
    method, params = sparse_jax.swat(.5), {'kernel': stacked}
    state = method.init(params)
    apply = sparse_jax.operators.with_operators(
        lambda p, x: lax.scan(lambda x, w: (x @ w, None), x, p['kernel'])[0],
        method, state, thresholds=sparse_jax.operators.first_operator_thresholds(
            method, params, state))
    with self.assertRaisesRegex(ValueError, r"'kernel'.*shape \(\).*\[3\]"):
      apply(params, x)


class AddOperandsTest(parameterized.TestCase):

  def test_is_sparse_says_whose_products(self):
    _, params, _ = setup()
    method = sparse_jax.operators.add_operands(
        sparse_jax.dense(), Operands(output_gradient=.5),
        is_sparse=[('stem', False)])
    self.assertEqual(set(method.operators(params, method.init(params))),
                     {'mix/kernel', 'head/kernel'})

  def test_it_goes_with_a_sparse_method(self):
    _, params, _ = setup()
    method = sparse_jax.operators.add_operands(sparse_jax.static(.5),
                                     Operands(backward_activation=.75))
    self.assertEqual(set(method.work(params, 10).values()),
                     {sparse_jax.rules.Work(.5, .5, .125)})

  @parameterized.parameters(
      (lambda: sparse_jax.operators.add_operands(sparse_jax.swat(.5), Operands()),
       '`method`'),
      (lambda: sparse_jax.operators.add_operands('dense', Operands()),
       "`method` .*dense"),
      (lambda: sparse_jax.operators.add_operands(sparse_jax.dense(), .5),
       r'`operands` \(=0.5\)'),
      (lambda: sparse_jax.operators.add_operands(
          sparse_jax.dense(), Operands(output_gradient=1.)),
       r'`output_gradient` \(=1.0\)'))
  def test_a_bad_argument_is_named_with_its_value(self, call, message):
    with self.assertRaisesRegex(ValueError, message):
      call()


if __name__ == '__main__':
  absltest.main()
