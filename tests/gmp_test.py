"""Tests of gradual magnitude pruning."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax
from sparse_jax.masks import scores as scoring
from sparse_jax.masks.structures import Block
from sparse_jax.masks.structures import NM

SIZES = {'a': 48, 'b': 35}  # 35 at .8 keeps 7 of which float32 must not lose.


def start_params():
  rng = np.random.default_rng(0)
  return {'a': jnp.array(rng.normal(size=(6, 8)), jnp.float32),
          'b': jnp.array(rng.normal(size=(7, 5)), jnp.float32),
          'bias': jnp.ones(5)}


def gradient(t):
  rng = np.random.default_rng(50 + t)
  return jax.tree.map(lambda p: jnp.array(rng.normal(size=p.shape),
                                          jnp.float32), start_params())


def train(method, optimizer, steps):
  """(params, masks) before the first update and after each."""
  tx = sparse_jax.sparsify(optimizer, method)

  @jax.jit
  def update(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  params = start_params()
  state = tx.init(params)
  history = []
  for t in range(steps + 1):
    if t:
      params, state = update(params, state, gradient(t))
    history.append(jax.tree.map(np.asarray, (
        params, sparse_jax.get_state(state).forward_masks)))
  return history


def slow_top(scores, count):
  order = np.argsort(-scores.ravel(), kind='stable')
  mask = np.zeros(scores.size, bool)
  mask[order[:count]] = True
  return mask.reshape(scores.shape)


def cubic(t, final, begin, end):
  left = 1 - min(max((t - begin) / (end - begin), 0), 1)
  return final - final * left**3


@functools.cache
def run():
  """Every fourth step from 2, to 11, which four does not divide."""
  method = sparse_jax.gmp(.8, update_every=4, update_begin=2, update_end=11)
  return train(method, optax.adamw(.2, weight_decay=.1), 14)


class CubicRunTest(parameterized.TestCase):

  def test_counts_follow_the_schedule_and_end_exactly_at_update_end(self):
    for t, (_, masks) in enumerate(run()):
      last = 11 if t >= 11 else t // 4 * 4
      for leaf, size in SIZES.items():
        want = size if t < 4 else sparse_jax.keep_count(
            size, cubic(last, .8, 2, 11))
        self.assertEqual(masks[leaf].sum(), want, f'{leaf} after {t}')
    self.assertEqual(masks['a'].sum(), sparse_jax.keep_count(48, .8))

  def test_masks_are_the_largest_of_the_stored_weights(self):
    history = run()
    for t in (4, 8, 11):
      params, masks = history[t]
      for leaf in SIZES:
        np.testing.assert_array_equal(masks[leaf], slow_top(
            np.abs(params[leaf]), masks[leaf].sum()))

  def test_masks_stay_between_refreshes_and_after_the_end(self):
    history = run()
    for t in set(range(1, 15)) - {4, 8, 11}:
      jax.tree.map(np.testing.assert_array_equal, history[t][1],
                   history[t - 1][1])

  def test_hidden_weights_are_bit_identical_and_the_others_move(self):
    for (before, masks), (after, _) in zip(run(), run()[1:]):
      for leaf in SIZES:
        same = before[leaf].view(np.uint32) == after[leaf].view(np.uint32)
        np.testing.assert_array_equal(same, ~masks[leaf])

  def test_read_hides_the_pruned(self):
    params = start_params()
    method = sparse_jax.gmp(.8)
    state = method.init(params)
    weights = method.read(params, state)
    for leaf in SIZES:
      np.testing.assert_array_equal(weights[leaf], np.where(
          state.forward_masks[leaf], params[leaf], 0))


class ScheduleTest(parameterized.TestCase):

  def test_without_an_end_the_final_sparsity_holds_from_the_start(self):
    state = sparse_jax.gmp(.8).init(start_params())
    for leaf, size in SIZES.items():
      self.assertEqual(int(state.forward_masks[leaf].sum()),
                       sparse_jax.keep_count(size, .8))

  @parameterized.named_parameters(
      ('optax', lambda: sparse_jax.schedules.constant(.5)),
      ('float', lambda: lambda step: .5),
      ('numpy', lambda: lambda step: np.float32(.5)))
  def test_a_schedule_may_be_given(self, make):
    state = sparse_jax.gmp(.8, schedule=make()).init(start_params())
    self.assertEqual(int(state.forward_masks['a'].sum()), 24)

  def test_each_layer_has_its_own_target(self):
    """Targets .9 and .45 of an overall .9: the second at half the rate."""
    method = sparse_jax.gmp(.9, update_every=1, update_end=4,
                            allocation={'a': .9, 'b': .45})
    history = train(method, optax.sgd(.1), 5)
    for t, (_, masks) in enumerate(history):
      for leaf, target in (('a', .9), ('b', .45)):
        want = sparse_jax.keep_count(SIZES[leaf], cubic(t, target, 0, 4))
        self.assertEqual(masks[leaf].sum(), want, f'{leaf} after {t}')

  def test_six_weights_follow_the_specified_values(self):
    """s = 0, .4625, .7, .7875, .8 keeps 6, 3, 2, 1, 1 of six."""
    method = sparse_jax.gmp(.8, update_every=1, update_end=4,
                            is_sparse=lambda path, leaf: True)
    params = jnp.arange(1., 7.)
    state = method.init(params)
    refresh = jax.jit(method.refresh)
    counts = [int(state.forward_masks.sum())]
    for _ in range(4):
      params, state = refresh(params, params, state)
      counts.append(int(state.forward_masks.sum()))
    self.assertEqual(counts, [6, 3, 2, 1, 1])

  def test_no_sparsity_keeps_all(self):
    state = sparse_jax.gmp(0., update_end=10).init(start_params())
    self.assertTrue(np.all(state.forward_masks['a']))


class RevivalTest(parameterized.TestCase):

  def test_a_hidden_weight_comes_back_with_its_value(self):
    method = sparse_jax.gmp(.5, update_every=1,
                            is_sparse=lambda path, leaf: True)
    tx = sparse_jax.sparsify(optax.sgd(1.), method)
    params = jnp.array([4., 3., 2., 1.])
    state = tx.init(params)
    np.testing.assert_array_equal(state.sparse.forward_masks, [1, 1, 0, 0])
    update = jax.jit(tx.update)
    # The second falls below the third; the hidden gradient moves nothing.
    updates, state = update(jnp.array([0., 1.5, 9., 9.]), state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params, [4., 1.5, 2., 1.])
    np.testing.assert_array_equal(method.read(params, state), [4., 0, 2., 0])
    # And back.
    updates, state = update(jnp.array([0., 9., 1., 9.]), state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(method.read(params, state), [4., 1.5, 0, 0])


class ScoreTest(parameterized.TestCase):

  @parameterized.named_parameters(
      ('gradient', scoring.gradient_magnitude, lambda w, g: np.abs(g)),
      ('saliency', scoring.saliency, lambda w, g: np.abs(w * g)))
  def test_a_score_by_gradient_sees_the_dense_one(self, score, slow):
    method = sparse_jax.gmp(.75, score=score, update_every=1)
    params, grads = start_params(), gradient(1)
    state = method.init(params)
    dense = jax.vjp(lambda p: method.read(p, state), params)[1](grads)[0]
    np.testing.assert_array_equal(dense['a'], grads['a'])
    _, state = jax.jit(method.refresh)(params, grads, state)
    for leaf, count in (('a', 12), ('b', 9)):
      np.testing.assert_array_equal(state.forward_masks[leaf], slow_top(
          slow(np.asarray(params[leaf]), np.asarray(grads[leaf])), count))

  def test_a_random_score_is_drawn_anew_for_each_step_leaf_and_key(self):
    method = sparse_jax.gmp(.5, score=scoring.random, update_every=1)
    same = jnp.ones((6, 8))
    params = {'x': same, 'y': same}
    state = method.init(params, 1)
    _, later = jax.jit(method.refresh)(params, params, state)
    other_key = method.init(params, 2)
    masks = [state.forward_masks['x'], state.forward_masks['y'],
             later.forward_masks['x'], other_key.forward_masks['x']]
    for i, one in enumerate(masks):
      self.assertEqual(int(one.sum()), 24)
      for other in masks[:i]:
        self.assertTrue(np.any(one != other))


class StructureTest(parameterized.TestCase):

  def test_blocks_are_counted_as_groups(self):
    method = sparse_jax.gmp(.5, structure=Block((2, 4)))
    state = method.init({'w': jnp.arange(48.).reshape(6, 8)})
    want = np.kron([[0, 0], [0, 1], [1, 1]], np.ones((2, 4)))
    np.testing.assert_array_equal(state.forward_masks['w'], want)

  def test_n_of_m_holds_from_the_start(self):
    method = sparse_jax.gmp(.5, structure=NM(2, 4), update_every=1)
    state = method.init({'w': jnp.asarray(
        np.random.default_rng(0).normal(size=(8, 6)), jnp.float32)})
    mask = np.asarray(state.forward_masks['w']).reshape(2, 4, 6)
    np.testing.assert_array_equal(mask.sum(1), 2)

  @parameterized.parameters({'update_end': 10},
                            {'schedule': lambda step: .5})
  def test_n_of_m_takes_no_schedule(self, **kwargs):
    with self.assertRaisesRegex(ValueError, '`schedule`'):
      sparse_jax.gmp(.5, structure=NM(2, 4), **kwargs)


if __name__ == '__main__':
  absltest.main()
