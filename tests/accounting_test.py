"""Tests of the figures of cost that every binary reports."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp

import sparse_jax
from experiments import accounting


def figures(method, state=None):
  params = {'hidden': {'kernel': jnp.ones((10, 20))},
            'head': {'kernel': jnp.ones((20, 10))}}
  state = state or method.init(params)
  return accounting.figures(
      lambda params, x: x @ params['hidden']['kernel'] @ params['head'][
          'kernel'], params, jax.ShapeDtypeStruct((1, 10), jnp.float32), method,
      sparse_jax.summarize(params, state, method), 100, state)


class FiguresTest(parameterized.TestCase):

  def test_of_dense_training(self):
    found = figures(sparse_jax.dense())
    self.assertEqual(found, {
        'flops': 400, 'inference_multiplier': 1, 'training_multiplier': 1,
        'training_multiplier_rigl': 1, 'theoretical_speedup': 1,
        'weight_bytes': 1600, 'dense_weight_bytes': 1600})

  def test_of_a_forward_and_a_backward_set(self):
    """No gradient goes to the input: 400 forward, 200 dX, 400 dW."""
    found = figures(sparse_jax.top_kast(.9, backward_sparsity=.5))
    self.assertAlmostEqual(found['inference_multiplier'], .1)
    self.assertAlmostEqual(found['training_multiplier'],
                           (.1 * 400 + .1 * 200 + .5 * 400) / 1000)
    self.assertAlmostEqual(found['theoretical_speedup'], 1 / .26)
    self.assertEqual(found['weight_bytes'], 2 * (20 * 4 + 200 // 8))

  def test_inference_is_by_the_masks_at_the_end(self):
    """GMP is dense for most of a run, and so is its training."""
    method = sparse_jax.gmp(.5, update_begin=90, update_end=91)
    params = {'hidden': {'kernel': jnp.ones((10, 20))},
              'head': {'kernel': jnp.ones((20, 10))}}
    state = sparse_jax.gmp(.5).init(params)
    found = figures(method, state)
    self.assertEqual(found['inference_multiplier'], .5)
    self.assertGreater(found['training_multiplier'], .9)

  @parameterized.parameters(
      lambda: sparse_jax.snfs(.8, update_every=1, update_end=9),
      lambda: sparse_jax.dsr(.8, update_every=1, update_end=9),
      lambda: sparse_jax.swat(.8, allocation='momentum'))
  def test_a_budget_that_moves_counts_where_it_went(self, make):
    method = make()
    key = jax.random.key(0)
    params = {'hidden': {'kernel': .001 * jax.random.normal(key, (10, 20))},
              'head': {'kernel': 9 * jax.random.normal(key, (20, 10))}}
    state, grads = method.init(params), jax.tree.map(jnp.ones_like, params)
    grads['head']['kernel'] *= 9.
    for _ in range(3):
      params, state = method.refresh(params, grads, state)
    apply = lambda params, x: (x @ params['hidden']['kernel'])[:, :2] @ (
        params['head']['kernel'][:2])
    found = accounting.figures(
        apply, params, jax.ShapeDtypeStruct((1, 10), jnp.float32), method,
        sparse_jax.summarize(params, state, method), 100, state)
    flops = sparse_jax.cost.count_flops(
        apply, params, jax.ShapeDtypeStruct((1, 10), jnp.float32))
    cost = sparse_jax.cost.training_cost(flops, method, steps=100, state=state)
    self.assertAlmostEqual(cost.forward_multiplier,
                           found['inference_multiplier'], places=5)
    self.assertGreater(abs(cost.forward_multiplier - .2), .01)

  def test_an_outcome_counts_as_it_ended(self):
    found = figures(sparse_jax.static(.75)._replace(work=None))
    self.assertEqual(found['training_multiplier'], .25)


if __name__ == '__main__':
  absltest.main()
