"""SNFS and DSR: a budget that moves between leaves, and its division."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax
from sparse_jax.rules import budgets as budget
from sparse_jax.masks import layouts
from sparse_jax.masks import marks as marks_lib
from sparse_jax.rules import leaves
from sparse_jax.masks import topk

L1 = dict(weight=[.5, -.1, .3, -.8, 0, 0], mask=[1, 1, 1, 1, 0, 0])
L2 = dict(weight=[.05, .6, 0, 0, 0, 0], mask=[1, 1, 0, 0, 0, 0])


def row(values):
  return jnp.asarray(values, jnp.float32)[None]


def start(method):
  """The two leaves of the specification, with its masks."""
  params = {'a': row(L1['weight']), 'b': row(L2['weight'])}
  tx = sparse_jax.sparsify(optax.sgd(0.), method)
  state = tx.init(params)
  marks = {name: marks_lib.mark(2 * row(leaf['mask']).astype(jnp.uint8))
           for name, leaf in (('a', L1), ('b', L2))}
  return tx, params, state._replace(sparse=state.sparse._replace(marks=marks))


def counts(state):
  return {name: int(mask.sum()) for name, mask in
          sparse_jax.get_state(state).forward_masks.items()}


class SnfsTest(parameterized.TestCase):

  def test_specified_example(self):
    method = sparse_jax.snfs(.5, drop_fraction=.5, momentum=0., update_every=1)
    tx, params, state = start(method)
    grads = {'a': row([.1, -.3, .2, .2, -.6, .4]),
             'b': row([.1, .1, .05, -.2, 0, .3])}
    _, state = jax.jit(tx.update)(grads, state, params)
    masks = sparse_jax.get_state(state).forward_masks
    np.testing.assert_array_equal(masks['a'], [[1, 0, 0, 1, 1, 1]])
    np.testing.assert_array_equal(masks['b'], [[0, 1, 0, 0, 0, 1]])

  def test_remembers_the_average_of_the_dense_gradient(self):
    method = sparse_jax.snfs(.5, momentum=.75, update_every=100)
    params = {'w': jnp.ones((2, 3))}
    tx = sparse_jax.sparsify(optax.sgd(.1), method)
    state, want = tx.init(params), np.zeros((2, 3))
    update = jax.jit(tx.update)
    rng = np.random.default_rng(0)
    for _ in range(3):
      grad = rng.normal(size=(2, 3)).astype(np.float32)
      updates, state = update({'w': jnp.asarray(grad)}, state, params)
      params = optax.apply_updates(params, updates)
      want = .75 * want + .25 * grad
    np.testing.assert_allclose(state.sparse.extra['w'], want, rtol=1e-6)

  def test_a_layer_of_large_momentum_gains(self):
    method = sparse_jax.snfs(.5, drop_fraction=.5, momentum=0., update_every=1)
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=(8, 8)), jnp.float32)
              for name in ('a', 'b')}
    tx = sparse_jax.sparsify(optax.sgd(0.), method)
    state = tx.init(params)
    grads = {'a': params['a'], 'b': 3 * np.flip(params['b'], 0)}
    _, state = jax.jit(tx.update)(grads, state, params)
    seen = counts(state)
    self.assertEqual(sum(seen.values()), 64)
    self.assertGreater(seen['b'], 36)


class DsrTest(parameterized.TestCase):

  def test_specified_example(self):
    """One of each drops, both grow in the first; the threshold halves."""
    method = sparse_jax.dsr(.5, drop_fraction=1 / 6, threshold=.2,
                            update_every=1)
    tx, params, state = start(method)
    _, state = jax.jit(tx.update)(params, state, params)
    masks = sparse_jax.get_state(state).forward_masks
    np.testing.assert_array_equal(masks['a'], [[1, 0, 1, 1, 1, 1]])
    np.testing.assert_array_equal(masks['b'], [[0, 1, 0, 0, 0, 0]])
    self.assertAlmostEqual(float(state.sparse.extra), .1)

  @parameterized.parameters((.9, .4), (2 / 6, .2), (1 / 6, .1))
  def test_threshold_follows_what_dropped(self, drop_fraction, after):
    method = sparse_jax.dsr(.5, drop_fraction=drop_fraction, threshold=.2,
                            update_every=1)
    tx, params, state = start(method)
    _, state = jax.jit(tx.update)(params, state, params)
    self.assertAlmostEqual(float(state.sparse.extra), after)

  def test_every_leaf_keeps_one(self):
    method = sparse_jax.dsr(.5, threshold=10., update_every=1)
    tx, params, state = start(method)
    _, state = jax.jit(tx.update)(params, state, params)
    self.assertEqual(sum(counts(state).values()), 6)
    self.assertGreaterEqual(min(counts(state).values()), 1)

  def test_regrows_what_it_dropped_only_where_nothing_else_is_empty(self):
    """All but one of b drops; a is full but for what it dropped itself."""
    params = {'a': jnp.array([[.9, .8, .01, .02]]),
              'b': jnp.array([[.7, .03]])}
    tx = sparse_jax.sparsify(optax.sgd(0.), sparse_jax.dsr(
        0., threshold=.5, update_every=1))
    state = tx.init(params)
    _, state = jax.jit(tx.update)(params, state, params)
    self.assertEqual(counts(state), {'a': 4, 'b': 2})


def slow_joint(arrays, k):
  """Counts of the k largest of all arrays; ties to the earlier."""
  flat = [(-value, i, j) for i, array in enumerate(arrays)
          for j, value in enumerate(np.ravel(array))]
  chosen = sorted(flat)[:k]
  return [sum(i == own for _, own, _ in chosen) for i in range(len(arrays))]


class BudgetTest(parameterized.TestCase):

  @parameterized.parameters('normal', 'ties', 'equal')
  def test_joint_counts_are_those_of_the_slow_sort(self, kind):
    rng = np.random.default_rng(1)
    joint = jax.jit(lambda arrays, k: topk.joint_counts(
        arrays, k, [(0, 1), (0,), (0, 1)]))
    for k in (0, 1, 7, 20, 41):
      arrays = [rng.normal(size=s) if kind == 'normal' else
                rng.integers(0, 3, s) if kind == 'ties' else np.ones(s)
                for s in ((3, 4), (9,), (4, 5))]
      arrays = [array.astype(np.float32) for array in arrays]
      got = [int(n.ravel()[0]) for n in joint(arrays, k)]
      self.assertEqual(got, slow_joint(arrays, k))

  def test_joint_counts_of_stacked_layers(self):
    rng = np.random.default_rng(1)
    stacked = rng.normal(size=(3, 4, 2)).astype(np.float32)
    plain = rng.normal(size=(5, 2)).astype(np.float32)
    one, two = jax.jit(lambda *arrays: topk.joint_counts(
        arrays, 11, [(1, 2), (0, 1)]))(stacked, plain)
    want = slow_joint([*stacked, plain], 11)
    self.assertEqual([*np.ravel(one).tolist(), int(two[0, 0])], want)

  def test_joint_counts_mix_dtypes_exactly(self):
    arrays = [jnp.array([1., 1.0001], jnp.float32),
              jnp.array([1., 1.0078125], jnp.bfloat16)]
    counts_ = jax.jit(lambda arrays: topk.joint_counts(
        arrays, 2, [(0,), (0,)]))(arrays)
    self.assertEqual([int(n[0]) for n in counts_], [1, 1])

  def test_global_counts_keep_one_of_each(self):
    own = {name: leaves.Leaf(name, 0, layouts.layout((2, 4)), .5, .5)
           for name in ('a', 'b')}
    scores = {'a': jnp.arange(8.).reshape(2, 4) + 10,
              'b': jnp.arange(8.).reshape(2, 4)}
    seen = budget.global_counts(own, scores, 4)
    self.assertEqual({k: int(v[0, 0]) for k, v in seen.items()},
                     {'a': 3, 'b': 1})
    seen = budget.global_counts(own, scores, 1)  # Less than one for each.
    self.assertEqual({k: int(v[0, 0]) for k, v in seen.items()},
                     {'a': 1, 'b': 1})

  @parameterized.parameters(*range(8))
  def test_shares_are_whole_exact_and_near_their_proportion(self, seed):
    rng = np.random.default_rng(seed)
    claims = {str(i): jnp.asarray(rng.random(2) ** 2, jnp.float32)
              for i in range(4)}
    room = {name: jnp.asarray(rng.integers(0, 2000, 2), jnp.int32)
            for name in claims}
    total = int(rng.integers(0, sum(int(r.sum()) for r in room.values())))
    if seed < 4:  # No room binds.
      room = {name: jnp.full(2, 2**30, jnp.int32) for name in room}
    shares = jax.jit(budget.share_out)(jnp.int32(total), claims, room)
    flat = np.concatenate([shares[name] for name in claims])
    most = np.concatenate([room[name] for name in claims])
    self.assertEqual(flat.sum(), total)
    self.assertTrue(np.all((flat >= 0) & (flat <= most)))
    if seed < 4:
      weight = np.concatenate([claims[name] for name in claims])
      exact = total * weight.astype(np.float64) / weight.sum(dtype=np.float64)
      self.assertLess(np.abs(flat - exact).max(), 1)

  def test_no_claims_are_equal_claims(self):
    shares = jax.jit(budget.share_out)(jnp.int32(5), {'a': jnp.zeros(2)},
                                       {'a': jnp.array([4, 4])})
    self.assertEqual(sorted(shares['a'].tolist()), [2, 3])

  def test_counts_above_float_precision_are_exact(self):
    total = 2**30 + 1
    shares = jax.jit(budget.share_out)(
        jnp.int32(total), {'a': jnp.array([1., 1., 1.])},
        {'a': jnp.full(3, 2**30, jnp.int32)})
    self.assertEqual(int(np.asarray(shares['a'], np.int64).sum()), total)


if __name__ == '__main__':
  absltest.main()
