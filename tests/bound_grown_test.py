"""Steps after a refresh, beside those of an optimizer that is really new."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

import sparse_jax
from sparse_jax.rules import slots

RATE, EVERY, STEPS = .01, 25, 160
METHODS = {
    'rigl': sparse_jax.rigl(.5, update_every=EVERY),
    'set_': sparse_jax.set_(.5, update_every=EVERY),
    'top_kast': sparse_jax.top_kast(.75, backward_sparsity=.5,
                                    backward_selection='random',
                                    penalty_weight=0., update_every=EVERY)}
# Short memories show in a hundred steps what 0.999 shows in a thousand.
OPTIMIZERS = {
    'adam': functools.partial(optax.adam, b1=.8, b2=.99),
    'adamw': functools.partial(optax.adamw, b1=.8, b2=.99, weight_decay=.1),
    'lamb': functools.partial(optax.lamb, b1=.8, b2=.99),
    'adafactor': optax.adafactor,
    'adabelief': functools.partial(optax.adabelief, b1=.8, b2=.99),
    'amsgrad': functools.partial(optax.amsgrad, b1=.8, b2=.99)}
CAPPED = ('adam', 'adamw', 'lamb', 'adafactor', 'amsgrad')


def fake_params():
  rng = np.random.default_rng(0)
  return {'dense': {'kernel': jnp.asarray(rng.normal(size=(8, 12)),
                                          jnp.float32),
                    'bias': jnp.zeros(12)}}


def fake_grads(step):
  rng = np.random.default_rng([1, step])
  return {'dense': {
      'kernel': jnp.asarray(1 + .3 * rng.normal(size=(8, 12)), jnp.float32),
      'bias': jnp.asarray(rng.normal(size=12), jnp.float32)}}


def run(tx, steps=STEPS, seen=lambda *_: None):
  """Calls seen(step, params, state, grads, updates) after each update."""
  update = jax.jit(tx.update)
  params = fake_params()
  state = tx.init(params)
  for i in range(steps):
    grads = fake_grads(i)
    updates, new = update(grads, state, params)
    seen(i, params, state, grads, updates)
    params, state = optax.apply_updates(params, updates), new
  return params, state


def largest_excess(optimizer, method, **options):
  """How many times a new optimizer's first step grown entries' steps are."""
  first_step = jax.jit(optimizer.update)
  first_sets, found = [], []

  def seen(i, params, state, grads, updates):
    inside = np.asarray(state.sparse.backward_masks['dense']['kernel'])
    first_sets.append(inside)
    refreshes = (i + 1) % EVERY == 0
    came = inside & ~first_sets[0]
    if refreshes or not came.any():
      return
    masked = jax.tree.map(jnp.asarray, grads)
    masked['dense']['kernel'] = jnp.where(inside, grads['dense']['kernel'], 0)
    first, _ = first_step(masked, optimizer.init(params), params)
    ratio = np.abs(updates['dense']['kernel'] / first['dense']['kernel'])
    found.append(ratio[came].max())

  run(sparse_jax.sparsify(optimizer, method, **options), seen=seen)
  return max(found)


class BoundGrownTest(parameterized.TestCase):

  @parameterized.product(optimizer=tuple(OPTIMIZERS), method=tuple(METHODS))
  def test_no_grown_entry_outsteps_a_new_optimizer(self, optimizer, method):
    made = OPTIMIZERS[optimizer](RATE)
    self.assertLess(largest_excess(made, METHODS[method]), 1 + 1e-4)

  @parameterized.parameters(*CAPPED)
  def test_without_the_bound_it_does(self, optimizer):
    made = OPTIMIZERS[optimizer](RATE)
    self.assertGreater(largest_excess(made, METHODS['rigl'],
                                      bound_grown=False), 1.5)

  @parameterized.parameters(
      optax.sgd, functools.partial(optax.sgd, momentum=.9), optax.rmsprop,
      functools.partial(sparse_jax.aged_adam, b2=.99))
  def test_others_are_left_alone(self, optimizer):
    chex.assert_trees_all_equal(*(
        run(sparse_jax.sparsify(optimizer(RATE), METHODS['rigl'],
                                bound_grown=bound), 60)[0]
        for bound in (True, False)))

  def test_nothing_changes_before_something_enters(self):
    for method, steps in ((METHODS['rigl'], EVERY), (sparse_jax.static(.5), 9),
                          (sparse_jax.gmp(.5, update_every=2), 9)):
      chex.assert_trees_all_equal(*(
          run(sparse_jax.sparsify(optax.adam(RATE), method,
                                  bound_grown=bound), steps)[0]
          for bound in (True, False)))

  def test_schedules_stand_where_they_are(self):
    """A warm-up from 0 that has ended does not hold back what grows."""
    rate = optax.linear_schedule(0., RATE, 10)
    steps = []
    run(sparse_jax.sparsify(optax.adam(rate), METHODS['rigl']), 40,
        lambda i, params, state, grads, updates: steps.append(
            np.asarray(updates['dense']['kernel'])[np.asarray(
                state.sparse.backward_masks['dense']['kernel'])]))
    self.assertGreater(np.abs(steps[EVERY + 2]).min(), RATE / 3)

  def test_all_made_anew_is_a_new_optimizer(self):
    """Its count too; that of the schedule goes on."""
    rate = optax.linear_schedule(RATE, 2 * RATE, 40)
    method = sparse_jax.ac_dc(.5, update_every=EVERY)
    tx, fresh = sparse_jax.sparsify(optax.adam(rate), method), []

    def seen(i, params, state, grads, updates):
      if i >= 2 * EVERY:
        fresh.append((params, state, grads, updates))

    run(tx, 2 * EVERY + 8, seen)
    scale = optax.scale_by_adam()
    own = scale.init(fresh[0][0])
    for i, (params, state, grads, updates) in enumerate(fresh):
      inside = state.sparse.backward_masks['dense']['kernel']
      grads['dense']['kernel'] = jnp.where(inside, grads['dense']['kernel'], 0)
      want, own = scale.update(grads, own, params)
      at = np.asarray(inside)
      np.testing.assert_allclose(
          updates['dense']['kernel'][at],
          -rate(2 * EVERY + i) * want['dense']['kernel'][at], rtol=1e-4)

  def test_an_optimizer_whose_first_step_is_none_moves_what_has_grown(self):
    method = METHODS['rigl']
    tx = sparse_jax.sparsify(optax.contrib.adopt(RATE), method)
    start = np.asarray(tx.init(fake_params()).sparse.forward_masks['dense'][
        'kernel'])
    params, state = run(tx, EVERY + 10)
    grown = np.asarray(state.sparse.forward_masks['dense']['kernel']) & ~start
    self.assertTrue(grown.any())
    self.assertTrue(np.all(np.asarray(params['dense']['kernel'])[grown] != 0))

  def test_complex_weights_are_bounded_in_magnitude(self):
    method = sparse_jax.rigl(.5, update_every=5, is_sparse={'w': True})
    tx = sparse_jax.sparsify(optax.adam(RATE), method)
    draw = np.random.default_rng(3).normal(size=(2, 4, 6))
    params = {'w': jnp.asarray(draw[0] + 1j * draw[1], jnp.complex64)}
    grads, state = {'w': params['w'] ** 2}, tx.init(params)
    update, first = jax.jit(tx.update), state.sparse.forward_masks['w']
    for step in range(1, 14):
      updates, state = update(grads, state, params)
      params = optax.apply_updates(params, updates)
      mask = state.sparse.forward_masks['w']
      self.assertEqual(mask.sum(), 12)
      if step % 5 and step > 1:
        np.testing.assert_array_equal(params['w'] == 0, ~mask)
        self.assertLess(np.abs(updates['w']).max(), 1.001 * RATE)
    self.assertTrue(np.any(mask & ~first))

  def test_counts_are_known_by_what_stands_beside_them(self):
    params = fake_params()
    tx = optax.inject_hyperparams(optax.adamw)(
        optax.linear_schedule(0., 1., 5))
    state = tx.init(params)
    for _ in range(3):
      _, state = tx.update(params, state, params)
    new = slots.renewed(params, state, tx.init(params))
    self.assertEqual((int(new.count), int(new.inner_state[0].count)), (3, 0))
    self.assertEqual(slots.corrected(params, state),
                     {'dense/kernel', 'dense/bias'})
    kernel = params['dense']['kernel']  # A tree that is one leaf.
    self.assertEqual(slots.corrected(kernel, optax.adam(.1).init(kernel)),
                     {''})


if __name__ == '__main__':
  absltest.main()
