"""Options of the official codes: first values, drop schedules, shares, GMP."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax
from sparse_jax.masks import marks as marks_lib


def normal(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def refresh_once(method, params, grads, optimizer=optax.sgd(0.)):
  """(masks before, params and masks after) of one update that refreshes."""
  tx = sparse_jax.sparsify(optimizer, method)
  state = tx.init(params)
  before = state.sparse.forward_masks
  # Outside the first mask weights are 0 from the first update on.
  params = jax.tree.map(lambda p, mask: jnp.where(mask, p, 0.), params, before)
  updates, state = jax.jit(tx.update)(grads, state, params)
  return (before, optax.apply_updates(params, updates),
          state.sparse.forward_masks)


class GrowInitTest(parameterized.TestCase):

  @parameterized.product(make=(sparse_jax.rigl, sparse_jax.set_),
                         grow_init=('random_normal', 'random_uniform'))
  def test_random_values_have_the_spread_of_active_weights(self, make,
                                                           grow_init):
    params, grads = {'w': 3 + normal(200, 100)}, {'w': normal(200, 100, seed=1)}
    method = make(.5, grow_init=grow_init, update_every=1, drop_fraction=.5)
    before, after, masks = refresh_once(method, params, grads)
    grown = np.asarray(masks['w'] & ~before['w'])
    self.assertGreater(grown.sum(), 1000)
    values = np.asarray(after['w'])[grown]
    active = np.asarray(params['w'])[np.asarray(before['w'])]
    if grow_init == 'random_normal':
      self.assertAlmostEqual(values.std(), active.std(), delta=.05)
    else:
      bound = np.abs(active).mean()
      self.assertLessEqual(np.abs(values).max(), bound)
      self.assertAlmostEqual(values.std(), bound / 3**.5, delta=.05)
    self.assertAlmostEqual(values.mean(), 0, delta=.1)
    stayed = np.asarray(masks['w'] & before['w'])
    np.testing.assert_array_equal(after['w'][stayed], params['w'][stayed])
    self.assertFalse(np.any(after['w'][~masks['w']]))

  def test_the_initial_value_is_the_entrys_own(self):
    params, grads = {'w': normal(20, 10)}, {'w': normal(20, 10, seed=1)}
    method = sparse_jax.rigl(.5, grow_init='initial_value', update_every=1)
    before, after, masks = refresh_once(method, params, grads)
    self.assertTrue(np.any(masks['w'] & ~before['w']))
    np.testing.assert_array_equal(after['w'][masks['w']],
                                  params['w'][masks['w']])

  def test_the_initial_distribution_is_another_entrys_of_the_same_layer(self):
    params = {'w': normal(2, 20, 10) + jnp.array([0., 100.])[:, None, None]}
    method = sparse_jax.rigl(.5, grow_init='initial_dist', update_every=1,
                             batch_axes=(0,))
    before, after, masks = refresh_once(method, params, params)
    for layer in range(2):
      grown = np.asarray(masks['w'] & ~before['w'])[layer]
      values = set(np.asarray(after['w'])[layer][grown].tolist())
      self.assertLessEqual(values, set(np.ravel(params['w'][layer]).tolist()))
      own = np.asarray(params['w'])[layer][grown]
      self.assertFalse(np.array_equal(np.asarray(after['w'])[layer][grown],
                                      own))

  def test_zeros_are_the_default_bit_for_bit(self):
    params, grads = {'w': normal(20, 10)}, {'w': normal(20, 10, seed=1)}
    one, two = (refresh_once(sparse_jax.rigl(.5, update_every=1, **own),
                             params, grads, optax.adam(.1))
                for own in ({}, {'grow_init': 'zeros'}))
    jax.tree.map(np.testing.assert_array_equal, one, two)

  def test_nothing_grows_between_refreshes(self):
    method = sparse_jax.rigl(.5, grow_init='random_normal', update_every=5)
    before, after, masks = refresh_once(method, {'w': normal(8, 8)},
                                        {'w': normal(8, 8, seed=1)})
    np.testing.assert_array_equal(before['w'], masks['w'])
    self.assertFalse(np.any(after['w'][~masks['w']]))

  def test_other_values_are_named_and_cannot_be_packed(self):
    with self.assertRaisesRegex(ValueError, "`grow_init` .='ones'"):
      sparse_jax.rigl(.5, grow_init='ones')
    with self.assertRaisesRegex(ValueError, 'grow at random_normal'):
      sparse_jax.packed(sparse_jax.rigl(
          .5, grow_init='random_normal', structure=sparse_jax.Block((2, 2))))


class DropScheduleTest(parameterized.TestCase):

  @parameterized.parameters('set_', 'rigl', 'snfs', 'dsr', 'itop')
  def test_a_schedule_is_a_drop_fraction(self, name):
    """At learning rate 0 nothing moves."""
    drop = sparse_jax.schedules.drop_with(.5, lambda step: 1. - (step > 1))
    method = getattr(sparse_jax, name)(.5, drop_fraction=drop, update_every=1)
    tx = sparse_jax.sparsify(optax.sgd(0.), method)
    params = {'w': normal(16, 16)}
    state, masks = tx.init(params), []
    update = jax.jit(tx.update)
    for step in range(3):
      updates, state = update({'w': normal(16, 16, seed=step)}, state, params)
      params = optax.apply_updates(params, updates)
      masks.append(np.asarray(state.sparse.forward_masks['w']))
    if name != 'dsr':  # Its threshold drops what is below it at any aim.
      np.testing.assert_array_equal(masks[0], masks[1])
      np.testing.assert_array_equal(masks[1], masks[2])
    self.assertEqual({int(mask.sum()) for mask in masks}, {128})
    first = np.asarray(tx.init({'w': normal(16, 16)}).sparse.forward_masks['w'])
    if name != 'dsr':
      self.assertTrue(np.any(first != masks[0]))

  def test_it_is_the_fraction_of_the_rate_at_the_peak(self):
    rate = optax.warmup_cosine_decay_schedule(0., .2, 10, 100)
    drop = sparse_jax.schedules.drop_with(.3, rate, peak=.2)
    for step in (0, 5, 10, 40, 100):
      self.assertAlmostEqual(float(drop(step)), .3 * float(rate(step)) / .2,
                             places=6)
    with self.assertRaisesRegex(ValueError, '`peak`'):
      sparse_jax.schedules.drop_with(.3, rate)


class RedistributionTest(parameterized.TestCase):

  @parameterized.parameters('magnitude', 'nonzeros', 'none', 'momentum')
  def test_shares_follow_the_statistic(self, mode):
    """Leaf b has larger weights and fewer of them, a larger gradients."""
    params = {'a': normal(16, 16), 'b': 3 * normal(8, 8, seed=1)}
    grads = {'a': 5 * normal(16, 16, seed=2), 'b': normal(8, 8, seed=3)}
    method = sparse_jax.snfs(.75, drop_fraction=.5, momentum=0.,
                             redistribution=mode, update_every=1)
    before, _, masks = refresh_once(method, params, grads)
    old, new = ({path: int(mask.sum()) for path, mask in tree.items()}
                for tree in (before, masks))
    self.assertEqual(sum(new.values()), sum(old.values()))
    active = {path: np.asarray(mask) for path, mask in before.items()}
    claims = {
        'momentum': lambda p: np.abs(grads[p])[active[p]].mean(),
        'magnitude': lambda p: np.abs(params[p])[active[p]].mean(),
        'nonzeros': lambda p: active[p].sum(),
        'none': lambda p: old[p] // 2}[mode]
    share = claims('a') / (claims('a') + claims('b'))
    dropped = {path: count // 2 for path, count in old.items()}
    grown = min(max(share * sum(dropped.values()), 0), 256)
    room = 64 - (old['b'] - dropped['b'])
    want = max(grown, sum(dropped.values()) - room)
    self.assertAlmostEqual(new['a'] - (old['a'] - dropped['a']), want,
                           delta=1)

  def test_none_keeps_every_count(self):
    params = {'a': normal(16, 16), 'b': normal(8, 8)}
    method = sparse_jax.snfs(.75, redistribution='none', update_every=1,
                             allocation=sparse_jax.erk)
    before, _, masks = refresh_once(method, params, params)
    for path in params:
      self.assertEqual(int(before[path].sum()), int(masks[path].sum()))
      self.assertTrue(np.any(before[path] != masks[path]))

  def test_another_mode_is_named(self):
    with self.assertRaisesRegex(ValueError, "`redistribution` .='all'"):
      sparse_jax.snfs(.5, redistribution='all')


class HiddenTest(parameterized.TestCase):

  def test_equals_a_kernel_multiplied_by_its_mask(self):
    """TensorFlow's loop: momentum and decay reach what is pruned."""
    rate, decay, begin, end = .1, .02, 0, 6
    weights = np.asarray(normal(6, 5), np.float64)
    slot, mask = np.zeros_like(weights), np.ones(weights.shape, bool)
    method = sparse_jax.gmp(.8, update_every=2, update_end=end, hidden='moving')
    tx = sparse_jax.sparsify(optax.chain(optax.add_decayed_weights(decay),
                                         optax.sgd(rate, momentum=.9)), method)
    params = {'w': jnp.asarray(weights, jnp.float32)}
    state = tx.init(params)

    @jax.jit
    def step(params, state, target):
      def loss(params):
        return jnp.sum((method.read(params, state)['w'] - target)**2) / 2

      updates, state_ = tx.update(jax.grad(loss)(params), state, params)
      return optax.apply_updates(params, updates), state_

    for t in range(1, 10):
      target = normal(6, 5, seed=t)
      params, state = step(params, state, target)
      grad = np.where(mask, weights * mask - np.asarray(target), 0)
      slot = .9 * slot + grad + decay * weights
      weights = weights - rate * slot
      if t % 2 == 0 and t <= end:
        sparsity = .8 - .8 * (1 - (t - begin) / (end - begin))**3
        kept = max(1, round(30 * (1 - sparsity)))
        order = np.argsort(-np.abs(weights).ravel(), kind='stable')
        mask = np.zeros(30, bool)
        mask[order[:kept]] = True
        mask = mask.reshape(6, 5)
      np.testing.assert_allclose(params['w'], weights, atol=1e-5)
      np.testing.assert_array_equal(state.sparse.forward_masks['w'], mask)
    self.assertEqual(int(mask.sum()), 6)

  def test_costs_no_more_than_frozen_ones(self):
    params = {'w': jnp.ones((8, 8))}
    one, two = (sparse_jax.gmp(.75, hidden=hidden, update_end=50)
                for hidden in ('frozen', 'moving'))
    self.assertEqual(one.work(params, 100), two.work(params, 100))
    marks = two.init(params).marks['w']
    self.assertTrue(np.all(marks_lib.backward_mask(marks)))

  def test_bad_values_are_named(self):
    with self.assertRaisesRegex(ValueError, "`hidden` .='free'"):
      sparse_jax.gmp(.5, hidden='free')
    with self.assertRaisesRegex(ValueError, '`hidden`.*`score`'):
      sparse_jax.gmp(.5, hidden='moving', score=sparse_jax.scores.random)


if __name__ == '__main__':
  absltest.main()
