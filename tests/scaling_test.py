"""SuPar's factors, and widths at equal FLOPs."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax
from sparse_jax import scaling
from sparse_jax import transforms


def network(width, inputs=16, outputs=4):
  """Weights of variance 1 / inputs of the width 64."""
  rng = np.random.default_rng(0)
  shapes = {'stem': (inputs, width), 'hidden': (width, width),
            'head': (width, outputs)}
  return {name: jnp.asarray(rng.normal(size=shape) / min(shape[0], 64)**.5,
                            jnp.float32) for name, shape in shapes.items()
          } | {'bias': jnp.zeros(width)}


def activations(params, x, output):
  hidden = x @ params['stem'] + params['bias'][None]
  second = hidden @ params['hidden']
  return second, second @ params['head'] * output


class SuparTest(parameterized.TestCase):

  @parameterized.product(width=(64, 512), sparsity=(0., .75, .95))
  def test_activations_and_their_steps_depend_on_neither(self, width, sparsity):
    """A coordinate check: first activations, and their change by one step."""
    params, method = network(width), sparse_jax.static(
        sparsity, is_sparse={'stem|head': False})
    scales = scaling.supar(params, method, base=network(64), output='head')
    params = jax.tree.map(jnp.multiply, params, scales.init)
    tx = sparse_jax.sparsify(optax.chain(
        optax.adam(1e-3), transforms.scale_by_leaf(scales.learning_rate)),
                             method)
    params, state = sparse_jax.start(tx, method, params)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(64, 16)),
                    jnp.float32)

    def loss(params):
      weights = method.read(params, state)
      return jnp.mean(activations(weights, x, scales.output)[1][:, 0])

    updates, after = tx.update(jax.grad(loss)(params), state, params)
    stepped = optax.apply_updates(params, updates)
    first = activations(method.read(params, state), x, 1.)[0]
    second = activations(method.read(params | {'hidden': stepped['hidden']},
                                     after), x, 1.)[0]
    self.assertAlmostEqual(float(first.std()), 1., delta=.2)
    change = float(jnp.abs(second - first).mean())
    # .014 at width 64, dense. Unscaled: .0014 at 95%, .094 at width 512.
    self.assertBetween(change, .01, .03)

  def test_factors_of_the_paper(self):
    params, base = network(256), network(64)
    scales = scaling.supar(params, {'hidden': .25}, base=base, output='head',
                           output_scale=3.)
    self.assertEqual(scales.init, {'stem': 1., 'hidden': 1., 'head': 1.,
                                   'bias': 1.})
    self.assertEqual(scales.learning_rate['hidden'], 1.)
    self.assertEqual(scales.output, 3 / 4)
    dense = scaling.supar(params, sparse_jax.dense(), base=base)
    self.assertEqual((dense.init['hidden'], dense.learning_rate['hidden'],
                      dense.init['head'], dense.output), (.5, .25, .5, 1.))

  def test_a_method_gives_what_it_keeps(self):
    """Of 3 x 3 blocks of 16 x 16 in 40 x 40 one third is three."""
    params = {'a': jnp.ones((40, 40)), 'b': jnp.ones((40, 40))}
    method = sparse_jax.static(2 / 3, structure=sparse_jax.Block((16, 16)),
                               is_sparse={'a': True, 'b': False})
    scales = scaling.supar(params, method)
    share = method.work(params, 1)['a'].forward
    self.assertAlmostEqual(scales.learning_rate['a'], 1 / share)
    self.assertEqual(scales.learning_rate['b'], 1.)

  def test_masks_count_by_their_mean(self):
    params = {'a': jnp.ones((4, 4))}
    scales = scaling.supar(params, {'a': jnp.eye(4) > 0})
    self.assertEqual(scales.init['a'], 2.)

  def test_attention_contracts_by_its_name(self):
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    big, base = ({'attention': {
        'query': {'kernel': shape(d, 4, d // 4)},
        'out': {'kernel': shape(4, d // 4, d)}}} for d in (64, 16))
    scales = scaling.supar(big, {}, base=base).learning_rate['attention']
    self.assertEqual(scales, {'query': {'kernel': .25}, 'out': {'kernel': .25}})

  def test_biases_of_heads_and_stacked_layers_are_no_kernels(self):
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    big, base = ({
        'query': {'kernel': shape(8 * h, h, 8), 'bias': shape(h, 8)},
        'layers': {'query': {'kernel': shape(3, 4 * d, 2, d),
                             'bias': shape(3, 2, d)}},
        'embedding': shape(50, d)} for h, d in ((8, 32), (2, 16)))
    stacked = {'layers': (0,)}
    scales = scaling.supar(big, {}, base=base, batch_axes=stacked)
    self.assertEqual(scales.learning_rate, {
        'query': {'kernel': .25, 'bias': 1.},
        'layers': {'query': {'kernel': .5, 'bias': 1.}}, 'embedding': 1.})
    tied = scaling.supar(big, {}, base=base, batch_axes=stacked,
                         output='embedding', contracting={'embedding': (1,)})
    self.assertEqual((tied.output, tied.learning_rate['embedding']), (.5, 1.))

  def test_packed_blocks_have_the_rate_of_their_leaf(self):
    method = sparse_jax.packed(sparse_jax.static(
        .75, structure=sparse_jax.Block((4, 4))))
    params = {'a': jnp.ones((16, 16))}
    scales = scaling.supar(params, method)
    tx = sparse_jax.sparsify(optax.chain(
        optax.sgd(1.), transforms.scale_by_leaf(scales.learning_rate)), method)
    params, state = sparse_jax.start(tx, method, params)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    np.testing.assert_array_equal(updates['a'].blocks, -4.)

  @parameterized.parameters(
      ({'densities': {'x': .5}}, '`densities`.*x'),
      ({'densities': {'a': 0.}}, '`densities`.*0.0'),
      ({'base': {}}, "`base`.*'a'"),
      ({'output': 'nowhere'}, '`output`.*nowhere'),
      ({'output_scale': 0.}, '`output_scale`'))
  def test_what_does_not_fit_is_named(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      scaling.supar({'a': jnp.ones((4, 4))}, **{'densities': {}} | changes)


class IsoFlopTest(parameterized.TestCase):

  @parameterized.product(sparsity=(0., .5, .75, .9), width=(64, 300))
  def test_products_are_those_of_the_dense_network(self, sparsity, width):
    wide = scaling.iso_flop_width(width, sparsity)
    self.assertAlmostEqual((1 - sparsity) * wide**2 / width**2, 1., delta=.02)
    self.assertEqual(scaling.iso_flop_width(width, sparsity, multiple_of=32)
                     % 32, 0)

  def test_bad_values_are_named(self):
    with self.assertRaisesRegex(ValueError, '`sparsity`'):
      scaling.iso_flop_width(64, 1.)
    with self.assertRaisesRegex(ValueError, '`multiple_of`'):
      scaling.iso_flop_width(64, .5, multiple_of=0)


if __name__ == '__main__':
  absltest.main()
