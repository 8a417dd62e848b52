"""AC/DC: dense and sparse phases."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax

W6 = np.array([[.5, -.1, .3, -.8, .2, .05]], np.float32)


def phases(steps, **keywords):
  """After each update whether the network is sparse, as a string of d, s."""
  method = sparse_jax.ac_dc(.5, **keywords)
  tx = sparse_jax.sparsify(optax.sgd(0.), method)
  params = {'w': jnp.array(W6)}

  @jax.jit
  def run(state):
    def step(state, _):
      _, state = tx.update(params, state, params)
      return state, state.sparse.forward_masks['w'].sum()

    return jax.lax.scan(step, state, None, length=steps)

  counts = np.asarray(run(tx.init(params))[1])
  return ''.join({6: 'd', 3: 's'}[int(count)] for count in counts)


class PhaseTest(parameterized.TestCase):

  def test_imagenet_recipe(self):
    """Sparse at epochs 10 to 70 in tens, dense at 15 to 75, sparse at 85."""
    seen = phases(100, update_every=5, update_begin=10, update_end=85,
                  final_dense=10)
    want = 'd' * 9 + ('s' * 5 + 'd' * 5) * 6 + 's' * 5 + 'd' * 10 + 's' * 16
    self.assertEqual(seen, want)

  @parameterized.parameters(
      (dict(update_every=2), 'dssddssdds'),
      (dict(update_every=2, update_begin=3), 'dddssddssd'),
      (dict(update_every=2, update_end=5), 'dssdssssss'),
      (dict(update_every=3, update_end=9, final_dense=4), 'ddssddddss'))
  def test_phases(self, keywords, want):
    self.assertEqual(phases(10, **keywords), want)

  def test_cost_is_the_mean_of_the_phases(self):
    method = sparse_jax.ac_dc(.9, update_every=5, update_begin=10,
                              update_end=85, final_dense=10)
    work = method.work({'w': jnp.zeros((10, 10))}, 100)['w']
    self.assertAlmostEqual(work.forward, .5 + .5 * .1)
    self.assertEqual(work.forward, work.weight_gradient)

  def test_final_dense_needs_an_end(self):
    with self.assertRaisesRegex(ValueError, '`final_dense`'):
      sparse_jax.ac_dc(.5, final_dense=5)


class WeightTest(parameterized.TestCase):

  @parameterized.parameters('layer', 'global')
  def test_keeps_the_largest_exactly(self, scope):
    method = sparse_jax.ac_dc(.5, scope=scope, update_every=1)
    params = {'w': jnp.array(W6)}
    tx = sparse_jax.sparsify(optax.sgd(0.), method)
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(optax.apply_updates(params, updates)['w'],
                               [[.5, 0, .3, -.8, 0, 0]])

  @parameterized.parameters(True, False)
  def test_a_dense_phase_starts_at_zero_with_fresh_slots(self, reset_slots):
    method = sparse_jax.ac_dc(.5, update_every=1, reset_slots=reset_slots)
    params = {'w': jnp.array(W6), 'bias': jnp.ones(6)}
    tx = sparse_jax.sparsify(optax.sgd(.1, momentum=.9), method)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(2):
      grads = jax.tree.map(jnp.ones_like, params)
      updates, state = update(grads, state, params)
      params = optax.apply_updates(params, updates)
    trace = state.inner[0].trace
    masks = sparse_jax.get_state(state).forward_masks
    self.assertTrue(masks['w'].all())
    self.assertEqual(int((params['w'] == 0).sum()), 3)
    fresh = np.asarray(params['w'] == 0)
    self.assertFalse(np.any(np.asarray(trace['w'])[fresh]))
    self.assertEqual(bool(np.any(np.asarray(trace['w'])[~fresh])),
                     not reset_slots)
    self.assertEqual(bool(np.any(trace['bias'])), not reset_slots)


if __name__ == '__main__':
  absltest.main()
