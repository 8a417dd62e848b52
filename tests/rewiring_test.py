"""Tests of static masks, SET and RigL: drop, grow, zeros, slots."""

import functools
import math

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax
from sparse_jax.masks import layouts
from sparse_jax.masks import marks as marks_lib
from sparse_jax.rules import leaves
from sparse_jax.masks.structures import Block
from sparse_jax.masks.structures import NM

# spec/methods.md: six weights of which four are active, gradient, momentum.
W0 = np.array([.5, -.1, .3, -.8, 0, 0], np.float32)
M0 = np.array([1, 1, 1, 1, 0, 0], bool)
G0 = np.array([.1, -.9, .2, .05, -.6, .4], np.float32)
V0 = np.array([1, 2, 3, 4, 0, 0], np.float32)


def vector_leaf(size, sparsity):
  return sites.Leaf('w', 0, masking.layout((size,)), sparsity)


@functools.partial(jax.jit, static_argnums=0)
def traced_drop_and_grow(leaf, active, worth, growth, fraction):
  return sites.drop_and_grow(leaf, active, worth, growth, fraction)


def ranked(scores, allowed, count):
  """The `count` best allowed entries; NaN last; the earlier of equals."""
  def order(i):
    return (math.isnan(scores[i]), -scores[i], i) if not math.isnan(
        scores[i]) else (True, 0., i)

  return sorted(np.flatnonzero(allowed), key=order)[:count]


def slow_drop_and_grow(active, worth, growth, fraction):
  """The definition: keep the best active, grow the best of all others."""
  active, worth, growth = (np.ravel(x) for x in (active, worth, growth))
  count = int(active.sum())
  kept = np.zeros(active.size, bool)
  kept[ranked(worth, active, max(1, round((1 - fraction) * count)))] = True
  mask = kept.copy()
  mask[ranked(growth, ~kept, count - int(kept.sum()))] = True
  return mask


class DropAndGrowTest(parameterized.TestCase):

  @parameterized.named_parameters(
      ('rigl_half', .5, np.abs(G0), [1, 1, 0, 1, 1, 0]),
      ('rigl_regrows_what_it_drops', .3, np.abs(G0), [1, 1, 1, 1, 0, 0]),
      ('set', .5, [.9, .1, .8, .2, .7, .3], [1, 0, 1, 1, 1, 0]))
  def test_specified_examples(self, fraction, growth, want):
    mask = sites.drop_and_grow(vector_leaf(6, 1 / 3), jnp.array(M0),
                               jnp.abs(W0), jnp.array(growth), fraction)
    np.testing.assert_array_equal(mask, want)

  @parameterized.parameters(
      (0., [0, 1, 0, 1, 0, 1, 1, 0]), (.25, [1, 1, 0, 1, 0, 1, 0, 0]),
      (.5, [1, 1, 0, 0, 1, 1, 0, 0]), (.75, [1, 0, 1, 0, 1, 1, 0, 0]),
      (1., [1, 0, 1, 0, 1, 1, 0, 0]))
  def test_examples_of_jaxpruner(self, fraction, want):
    """Its test drops by the signed weight: -2 leaves before -1 and 1."""
    active = jnp.array([0, 1, 0, 1, 0, 1, 1, 0], bool)
    worth = jnp.array([-9., 1, 4, -1, 5, 8, -2, 3])
    for given in (fraction, jnp.float32(fraction)):
      mask = sites.drop_and_grow(vector_leaf(8, .5), active, worth,
                                 jnp.abs(worth), given)
      np.testing.assert_array_equal(mask, want)

  @parameterized.product(kind=('normal', 'ties', 'nan', 'all_zero', 'all_nan',
                               'infinite'),
                         fraction=(0., .25, .5, .75, 1.))
  def test_equals_the_slow_rule_and_keeps_the_count(self, kind, fraction):
    rng = np.random.default_rng(len(kind))
    leaf = vector_leaf(30, .6)
    for _ in range(5):
      worth, growth = {
          'normal': lambda: rng.random((2, 30)),
          'ties': lambda: rng.integers(0, 3, (2, 30)) * 1.,
          'nan': lambda: np.where(rng.random((2, 30)) < .5, np.nan, 1.),
          'all_zero': lambda: np.zeros((2, 30)),
          'all_nan': lambda: np.full((2, 30), np.nan),
          'infinite': lambda: rng.choice([np.inf, 0., 1.], (2, 30)),
      }[kind]().astype(np.float32)
      active = rng.permutation(30) < 12
      mask = traced_drop_and_grow(leaf, active, worth, growth,
                                  jnp.float32(fraction))
      self.assertEqual(int(mask.sum()), 12)
      np.testing.assert_array_equal(
          mask, slow_drop_and_grow(active, worth, growth, fraction))


# Whole runs.

SHAPES = {'a': (6, 8), 'b': (8, 5)}
STEPS, EVERY, END = 25, 4, 22
RATE, DECAY = .25, .5


def start_params(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  return {'a': jnp.array(rng.normal(size=(6, 8)), dtype),
          'b': jnp.array(rng.normal(size=(8, 5)), dtype),
          'bias': jnp.array(rng.normal(size=5), dtype)}


def gradient(t, dtype=jnp.float32):
  rng = np.random.default_rng(100 + t)
  return jax.tree.map(lambda p: jnp.array(rng.normal(size=p.shape), dtype),
                      start_params())


@functools.cache
def updater(method):
  tx = sparse_jax.sparsify(optax.sgd(RATE, momentum=DECAY), method)

  @jax.jit
  def update(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return tx, update


def train(method, steps=STEPS, grads=gradient, dtype=jnp.float32):
  """(params, masks, momentum) before the first update and after each."""
  tx, update = updater(method)
  params = start_params(dtype)
  state = tx.init(params)
  history = []
  for t in range(steps + 1):
    if t:
      params, state = update(params, state, grads(t))
    found = sparse_jax.get_state(state)
    history.append(jax.tree.map(np.asarray, (
        params, found.forward_masks, state.inner[0].trace)))
  return history


RIGL = dict(drop_fraction=.5, update_every=EVERY, update_end=END)
METHODS = {
    'rigl': sparse_jax.rigl(.7, **RIGL),
    'rigl_skip': sparse_jax.rigl(.7, skip_step=True, **RIGL),
    'set': sparse_jax.set_(.7, drop_fraction=.5, update_every=EVERY),
    'set_skip': sparse_jax.set_(.7, drop_fraction=.5, update_every=EVERY,
                                skip_step=True),
}


@functools.cache
def run(name):
  return train(METHODS[name])


def refreshes(name, t):
  return t > 0 and t % EVERY == 0 and (t <= END or 'rigl' not in name)


def drop_fraction(name, t):
  if 'rigl' in name:
    return .25 * (1 + math.cos(math.pi * t / END))
  return .5


class RiglSimulationTest(parameterized.TestCase):

  @parameterized.parameters(('rigl', False), ('rigl_skip', True))
  def test_equals_numpy_over_25_steps_of_momentum(self, name, skip_step):
    history = run(name)
    for leaf in SHAPES:
      weight = history[0][0][leaf].astype(np.float64)
      mask = history[0][1][leaf].copy()
      slot = np.zeros_like(weight)
      changes = 0
      for t in range(1, STEPS + 1):
        grad = np.asarray(gradient(t)[leaf], np.float64)
        weight = np.where(mask, weight, 0)
        if not (skip_step and refreshes(name, t)):
          slot = np.where(mask, DECAY * slot + grad, 0)
          weight -= RATE * slot
        if refreshes(name, t):
          new = slow_drop_and_grow(mask, np.abs(weight), np.abs(grad),
                                   drop_fraction(name, t)).reshape(mask.shape)
          changes += np.any(new != mask)
          weight = np.where(mask & new, weight, 0)
          slot = np.where(mask & new, slot, 0)
          mask = new
        np.testing.assert_array_equal(history[t][1][leaf], mask,
                                      f'{leaf} after update {t}')
        # float32 against float64.
        np.testing.assert_allclose(history[t][0][leaf], weight, rtol=1e-5,
                                   atol=1e-6)
        np.testing.assert_allclose(np.where(mask, history[t][2][leaf], 0),
                                   slot, rtol=1e-5, atol=1e-6)
      self.assertGreaterEqual(changes, 4)


class RefreshTest(parameterized.TestCase):

  @parameterized.parameters(*METHODS)
  def test_counts_are_exact_and_masks_move_at_refreshes_only(self, name):
    history = run(name)
    for t, (_, masks, _) in enumerate(history):
      self.assertIsNone(masks['bias'])
      for leaf, count in (('a', 14), ('b', 12)):
        self.assertEqual(masks[leaf].sum(), count)
        if t and not refreshes(name, t):
          np.testing.assert_array_equal(masks[leaf], history[t - 1][1][leaf])

  @parameterized.parameters(*METHODS)
  def test_entries_outside_are_zero_and_the_grown_start_at_zero(self, name):
    history = run(name)
    grown = 0
    for (_, old, _), (params, new, slots) in zip(history, history[1:]):
      for leaf in SHAPES:
        np.testing.assert_array_equal(params[leaf][~new[leaf]], 0)
        entered = new[leaf] & ~old[leaf]
        grown += entered.sum()
        np.testing.assert_array_equal(params[leaf][entered], 0)
        np.testing.assert_array_equal(slots[leaf][entered], 0)
    self.assertGreater(grown, 10)

  @parameterized.parameters(*METHODS)
  def test_the_smallest_active_weights_leave(self, name):
    """Whatever grows, the best (1 - f) n of those active stay."""
    history = run(name)
    for t in range(1, STEPS + 1):
      if not refreshes(name, t) or 'skip' not in name:
        continue  # Only a skipped step shows the weights that were judged.
      for leaf in SHAPES:
        before, old, _ = (tree[leaf] for tree in history[t - 1])
        after, new, _ = (tree[leaf] for tree in history[t])
        n = int(old.sum())
        best = ranked(np.abs(before).ravel(), old.ravel(), max(1, round(
            (1 - drop_fraction(name, t)) * n)))
        self.assertTrue(np.all(new.ravel()[best]))
        np.testing.assert_array_equal(after.ravel()[best],
                                      before.ravel()[best])

  @parameterized.parameters('rigl_skip', 'set_skip')
  def test_a_refresh_that_skips_leaves_values_and_slots(self, name):
    history = run(name)
    for t in range(EVERY, END, EVERY):
      for leaf in SHAPES:
        stays = history[t][1][leaf] & history[t - 1][1][leaf]
        for part in (0, 2):
          np.testing.assert_array_equal(history[t][part][leaf][stays],
                                        history[t - 1][part][leaf][stays])
      np.testing.assert_array_equal(history[t][0]['bias'],
                                    history[t - 1][0]['bias'])

  @parameterized.parameters('rigl', 'set')
  def test_a_refresh_that_does_not_skip_moves_the_survivors(self, name):
    history = run(name)
    for leaf in SHAPES:
      stays = history[EVERY][1][leaf] & history[EVERY - 1][1][leaf]
      self.assertTrue(np.all((history[EVERY][0][leaf] != history[EVERY - 1][0][
          leaf])[stays]))

  def test_the_cosine_ends_with_nothing_dropped(self):
    history = run('rigl')
    np.testing.assert_array_equal(history[END][1]['a'], history[STEPS][1]['a'])

  def test_specified_example_through_a_whole_update(self):
    """spec 3.1: dropped and regrown keeps value and momentum."""
    method = sparse_jax.rigl(1 / 3, drop_fraction=.5, update_every=1,
                             skip_step=True,
                             is_sparse=lambda path, leaf: True)
    tx = sparse_jax.sparsify(optax.sgd(1., momentum=.9), method)
    state = tx.init(W0)
    marks = masking.mark(jnp.array(M0 * 2, jnp.uint8))
    inner = (state.inner[0]._replace(trace=jnp.array(V0)), *state.inner[1:])
    state = state._replace(sparse=state.sparse._replace(marks=marks),
                           inner=inner)
    updates, state = jax.jit(tx.update)(G0, state, W0)
    params = optax.apply_updates(jnp.array(W0), updates)
    mask = np.asarray(state.sparse.forward_masks)
    np.testing.assert_array_equal(mask, [1, 1, 0, 1, 1, 0])
    np.testing.assert_array_equal(
        params, np.array([.5, -.1, 0, -.8, 0, 0], np.float32))
    np.testing.assert_array_equal(np.where(mask, state.inner[0].trace, 0),
                                  [1, 2, 0, 4, 0, 0])


class GradientTest(parameterized.TestCase):

  @parameterized.parameters((0.,), (np.nan,), (np.inf,))
  def test_counts_survive_useless_gradients(self, value):
    useless = lambda t: jax.tree.map(
        lambda p: jnp.full_like(p, value), start_params())
    for _, masks, _ in train(METHODS['rigl'], 2 * EVERY, useless):
      self.assertEqual((masks['a'].sum(), masks['b'].sum()), (14, 12))

  def test_nan_gradients_outside_the_mask_do_no_harm(self):
    masks = run('rigl')[0][1]

    def poisoned(t):
      return {leaf: jnp.where(masks[leaf], g, jnp.nan) if leaf in SHAPES else g
              for leaf, g in gradient(t).items()}

    history = train(METHODS['rigl'], EVERY - 1, poisoned)
    self.assertTrue(np.all(np.isfinite(history[-1][0]['a'])))

  def test_read_lets_the_dense_gradient_through_for_rigl_alone(self):
    params = start_params()
    for name in ('rigl', 'set'):
      method = METHODS[name]
      state = method.init(params)
      weights, pull = jax.vjp(lambda p: method.read(p, state), params)
      grads = pull(jax.tree.map(jnp.ones_like, params))[0]
      for leaf in SHAPES:
        mask = np.asarray(state.forward_masks[leaf])
        np.testing.assert_array_equal(weights[leaf],
                                      np.where(mask, params[leaf], 0))
        np.testing.assert_array_equal(grads[leaf],
                                      mask if name == 'set' else 1.)

  def test_clipping_inside_does_not_see_the_dense_norm(self):
    tx = sparse_jax.sparsify(optax.chain(
        optax.clip_by_global_norm(1.), optax.sgd(1.)), METHODS['rigl'])
    params = start_params()
    state = tx.init(params)
    masks = sparse_jax.get_state(state).forward_masks
    grads = {leaf: jnp.where(masks[leaf], 0., 1e6) for leaf in SHAPES}
    grads['bias'] = jnp.full(5, .1)
    updates, _ = jax.jit(tx.update)(grads, state, params)
    np.testing.assert_array_equal(updates['bias'], jnp.float32(-.1))


class EdgeTest(parameterized.TestCase):

  def test_drop_fraction_zero_never_moves_the_mask(self):
    method = sparse_jax.rigl(.7, drop_fraction=0., update_every=1)
    history = train(method, 4)
    for _, masks, _ in history:
      jax.tree.map(np.testing.assert_array_equal, masks, history[0][1])

  def test_drop_fraction_one_keeps_one(self):
    method = sparse_jax.rigl(.7, drop_fraction=1., update_every=1,
                             skip_step=True)
    history = train(method, 3)
    for t in range(1, 4):
      _, old, _ = history[t - 1]
      _, new, _ = history[t]
      # The first step judges weights that are not yet 0 outside the mask.
      want = slow_drop_and_grow(old['a'], np.abs(history[t - 1][0]['a']),
                                np.abs(gradient(t)['a']), 1.)
      np.testing.assert_array_equal(new['a'].ravel(), want)

  def test_another_key_gives_other_masks_and_growth(self):
    params = start_params()
    method = METHODS['set']
    one, same, other = (method.init(params, key) for key in (
        3, jax.random.key(3), jax.random.key(4)))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    self.assertTrue(np.any(one.forward_masks['a'] != other.forward_masks['a']))
    late = jnp.int32(EVERY - 1)
    refresh = jax.jit(method.refresh)
    start = one._replace(step=late)
    grown = [refresh(params, params, start._replace(key=state.key))[1]
             for state in (one, same, other)]
    jax.tree.map(np.testing.assert_array_equal, grown[0], grown[1])
    self.assertTrue(np.any(grown[0].forward_masks['a']
                           != grown[2].forward_masks['a']))

  def test_growth_at_another_step_is_another(self):
    method = METHODS['set']
    params = start_params()
    state = method.init(params)
    refresh = jax.jit(method.refresh)
    masks = [refresh(params, params, state._replace(step=jnp.int32(t - 1)))[1]
             .forward_masks['a'] for t in (EVERY, 2 * EVERY)]
    self.assertTrue(np.any(masks[0] != masks[1]))

  def test_equal_leaves_get_masks_of_their_own(self):
    same = jnp.ones((6, 8))
    masks = METHODS['set'].init({'x': same, 'y': same}).forward_masks
    self.assertTrue(np.any(masks['x'] != masks['y']))

  def test_jit_equals_eager(self):
    method = METHODS['rigl']
    tx, update = updater(method)
    params = start_params()
    state = tx.init(params)
    state = state._replace(sparse=state.sparse._replace(
        step=jnp.int32(EVERY - 1)))
    want_updates, want = tx.update(gradient(1), state, params)
    got_params, got = update(params, state, gradient(1))
    jax.tree.map(np.testing.assert_array_equal, got.sparse, want.sparse)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
                 got_params, optax.apply_updates(params, want_updates))

  def test_bfloat16_weights_are_judged_as_they_are_stored(self):
    """Powers of two make the update exact; only p + u is rounded."""
    method = sparse_jax.rigl(.7, drop_fraction=.5, update_every=1)
    tx = sparse_jax.sparsify(optax.sgd(.5), method)
    update = jax.jit(tx.update)
    apply = jax.jit(optax.apply_updates)
    params = start_params(jnp.bfloat16)
    state = tx.init(params)
    for t in range(1, 6):
      grads = gradient(t, jnp.bfloat16)
      old = np.asarray(state.sparse.forward_masks['a'])
      weight = np.where(old, params['a'] - grads['a'] * jnp.bfloat16(.5), 0)
      updates, state = update(grads, state, params)
      params = apply(params, updates)
      self.assertEqual(params['a'].dtype, jnp.bfloat16)
      mask = np.asarray(state.sparse.forward_masks['a'])
      want = slow_drop_and_grow(
          old, np.abs(weight).astype(np.float32),
          np.abs(np.asarray(grads['a'], np.float32)), .5).reshape(6, 8)
      np.testing.assert_array_equal(mask, want)
      np.testing.assert_array_equal(params['a'],
                                    np.where(mask & old, weight, 0))

  def test_each_stacked_layer_rewires_alone(self):
    method = sparse_jax.rigl(.75, update_every=1, drop_fraction=.5,
                             batch_axes=(0, 2),
                             is_sparse=lambda path, leaf: True)
    rng = np.random.default_rng(1)
    params, grads = ({'w': rng.normal(size=(2, 16, 3)).astype(np.float32)}
                     for _ in range(2))
    state = method.init(params)
    old = np.asarray(state.forward_masks['w'])
    _, state = jax.jit(method.refresh)(params, grads, state)
    new = np.asarray(state.forward_masks['w'])
    for i, j in np.ndindex(2, 3):
      self.assertEqual(old[i, :, j].sum(), 4)
      np.testing.assert_array_equal(
          new[i, :, j], slow_drop_and_grow(
              old[i, :, j], np.abs(params['w'][i, :, j]),
              np.abs(grads['w'][i, :, j]), .5))


class StaticTest(parameterized.TestCase):

  def test_equals_momentum_on_the_masked_weights(self):
    history = train(sparse_jax.static(.7), 5)
    mask = history[0][1]
    self.assertEqual((mask['a'].sum(), mask['b'].sum()), (14, 12))
    for leaf in (*SHAPES, 'bias'):
      inside = 1. if mask[leaf] is None else mask[leaf]
      weight = history[0][0][leaf] * inside
      slot = np.zeros_like(weight)
      for t in range(1, 6):
        slot = DECAY * slot + np.asarray(gradient(t)[leaf]) * inside
        weight = weight - RATE * slot
        np.testing.assert_allclose(history[t][0][leaf], weight, rtol=1e-5,
                                   atol=1e-6)  # Fused products and sums.
        if mask[leaf] is not None:
          np.testing.assert_array_equal(history[t][1][leaf], mask[leaf])
          np.testing.assert_array_equal(history[t][0][leaf][~mask[leaf]], 0)

  def test_random_masks_are_spread_over_the_leaf(self):
    mask = sparse_jax.static(.5).init({'w': jnp.ones((10, 12))})
    mask = np.asarray(mask.forward_masks['w'])
    self.assertEqual(mask.sum(), 60)
    # 30 +- 2.7 on each half: six standard deviations.
    self.assertBetween(mask[:5].sum(), 14, 46)
    self.assertBetween(mask[:, ::2].sum(), 14, 46)


class StructureTest(parameterized.TestCase):

  @parameterized.named_parameters(
      ('static', lambda **kw: sparse_jax.static(.5, **kw)),
      ('set', lambda **kw: sparse_jax.set_(.5, update_every=1, **kw)),
      ('rigl', lambda **kw: sparse_jax.rigl(.5, update_every=1, **kw)))
  def test_a_last_group_of_n_of_m_cut_short_keeps_n(self, make):
    """Six rows in fours: two of four and two of two in each column."""
    method = make(structure=NM(2, 4))
    rng = np.random.default_rng(2)
    params, grads = ({'w': rng.normal(size=(6, 20)).astype(np.float32)}
                     for _ in range(2))
    state = method.init(params)
    refresh = jax.jit(method.refresh)
    for _ in range(3):
      mask = np.asarray(state.forward_masks['w'])
      np.testing.assert_array_equal(mask[:4].sum(0), 2)
      np.testing.assert_array_equal(mask[4:].sum(0), 2)
      params, state = refresh(params, grads, state)

  def test_whole_blocks_leave_and_enter(self):
    """The worst block leaves, the one of the largest gradient enters."""
    method = sparse_jax.rigl(.5, drop_fraction=.5, update_every=1,
                             structure=Block((2, 3)))
    params = {'w': jnp.repeat(jnp.arange(1., 5.), 12).reshape(8, 6)}
    state = method.init(params)
    self.assertEqual(int(state.forward_masks['w'].sum()), 24)
    before = np.asarray(state.forward_masks['w'])[::2, ::3]
    grad = np.arange(8.).reshape(4, 2)
    worth = np.abs(np.asarray(params['w'])[::2, ::3])
    want = slow_drop_and_grow(before, worth, grad, .5).reshape(4, 2)
    grads = {'w': jnp.array(np.kron(grad, np.ones((2, 3))), jnp.float32)}
    _, state = jax.jit(method.refresh)(params, grads, state)
    np.testing.assert_array_equal(state.forward_masks['w'],
                                  np.kron(want, np.ones((2, 3))))


if __name__ == '__main__':
  absltest.main()
