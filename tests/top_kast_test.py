"""Tests of Top-KAST: the laws TK-a to TK-e, through several optimizers."""

import functools
from typing import Any
from typing import NamedTuple

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax
from sparse_jax.masks import allocations as allocation
from sparse_jax.rules import losses
from sparse_jax.masks.structures import NM

KERNELS = ('a', 'b')
OPTIMIZERS = {
    'momentum': lambda: optax.sgd(.1, momentum=.9),
    'adam': lambda: optax.adam(.1),
    'adamw': lambda: optax.adamw(.1, weight_decay=.1),
    'clipped_adamw': lambda: optax.chain(
        optax.clip_by_global_norm(.1), optax.adamw(.1, weight_decay=.1)),
    'decay_before_momentum': lambda: optax.chain(
        optax.add_decayed_weights(.1), optax.sgd(.1, momentum=.9)),
}
STEPS, EVERY = 10, 3


def start_params(seed=0):
  rng = np.random.default_rng(seed)
  kernel = rng.normal(size=(6, 8)).astype(np.float32)
  kernel[0, :4], kernel[1, :2] = -0., 0.  # Signed zeros, in C.
  return {'a': jnp.array(kernel), 'bias': jnp.linspace(-1., 1., 8),
          'b': jnp.asarray(rng.normal(size=(8, 5)), jnp.float32)}


def model(weights, x):
  return jnp.tanh(x @ weights['a'] + weights['bias'][None]) @ weights['b']


def batch(t):
  rng = np.random.default_rng(t)
  return (rng.normal(size=(4, 6)).astype(np.float32),
          rng.normal(size=(4, 5)).astype(np.float32))


def model_loss(weights, x, y):
  return jnp.sum((model(weights, x) - y)**2)


class Moment(NamedTuple):
  """What a training run looked like before update t + 1."""

  params: Any
  state: Any
  weights: Any  # What was read.
  grads: Any  # Of the loss, by the params.
  forward: Any
  backward: Any


@functools.cache  # So that runs of one method compile it once.
def looker(method):
  """What is to be known of a moment, given params and a SparseState."""
  def look(params, state, x, y):
    grads = jax.grad(lambda p: model_loss(method.read(p, state), x, y))(params)
    return (method.read(params, state), grads, state.forward_masks,
            state.backward_masks)

  return jax.jit(look)


def train(method, optimizer, steps=STEPS):
  """A run as a list of moments, the last one after all updates."""
  tx = sparse_jax.sparsify(optimizer, method)

  @jax.jit
  def update(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  params = start_params()
  state = tx.init(params)
  moments = []
  for t in range(steps + 1):
    weights, grads, forward, backward = looker(method)(
        params, sparse_jax.get_state(state), *batch(t))
    moments.append(jax.tree.map(np.asarray, Moment(
        params, state, weights, grads, forward, backward)))
    params, state = update(params, state, grads)
  return moments


METHOD = sparse_jax.top_kast(.8, backward_sparsity=.5, update_every=EVERY,
                             penalty_weight=.05)


@functools.cache
def run(optimizer):
  return train(METHOD, OPTIMIZERS[optimizer]())


@jax.jit
def dense_gradient(weights, x, y):
  return jax.grad(model_loss)(weights, x, y)


def slow_top(scores, count):
  order = np.argsort(-np.abs(scores).ravel(), kind='stable')
  mask = np.zeros(scores.size, bool)
  mask[order[:count]] = True
  return mask.reshape(scores.shape)


def bits(x):
  return np.asarray(x).view(np.uint32)


class LawTest(parameterized.TestCase):

  @parameterized.parameters(*OPTIMIZERS)
  def test_a_and_b_are_the_largest_weights_at_each_refresh(self, optimizer):
    """TK-d, with the exact counts: 48 and 40 entries at .8 and .5."""
    moments = run(optimizer)
    moved = 0
    for t, moment in enumerate(moments):
      for leaf, (n, m) in zip(KERNELS, ((10, 24), (8, 20))):
        if t % EVERY == 0:
          want = (slow_top(moment.params[leaf], n),
                  slow_top(moment.params[leaf], m))
          moved += t > 0 and np.any(want[0] != moments[t - 1].forward[leaf])
        else:
          want = moments[t - 1].forward[leaf], moments[t - 1].backward[leaf]
        np.testing.assert_array_equal(moment.forward[leaf], want[0])
        np.testing.assert_array_equal(moment.backward[leaf], want[1])
        self.assertFalse(np.any(want[0] & ~want[1]))
    self.assertGreater(moved, 1, 'the run is too tame to show anything')

  @parameterized.parameters(*OPTIMIZERS)
  def test_the_forward_pass_sees_the_weights_of_a_alone(self, optimizer):
    for moment in run(optimizer):
      for leaf in KERNELS:
        np.testing.assert_array_equal(
            moment.weights[leaf],
            np.where(moment.forward[leaf], moment.params[leaf], 0))
      np.testing.assert_array_equal(moment.weights['bias'],
                                    moment.params['bias'])

  @parameterized.parameters(*OPTIMIZERS)
  def test_gradients_are_dense_ones_at_alpha_masked_to_b(self, optimizer):
    """TK-a. dX at alpha shows in the gradient of the bias, and of `a`."""
    for t, moment in enumerate(run(optimizer)):
      want = dense_gradient(moment.weights, *batch(t))
      for leaf in KERNELS:
        outside = ~moment.backward[leaf]
        # Compiled apart, so the last bits of sums may differ.
        np.testing.assert_allclose(
            moment.grads[leaf], np.where(outside, 0, want[leaf]), rtol=1e-4,
            atol=1e-4)
        self.assertTrue(np.all(moment.grads[leaf][outside] == 0))
      np.testing.assert_allclose(moment.grads['bias'], want['bias'],
                                 rtol=1e-4, atol=1e-4)

  @parameterized.parameters(*OPTIMIZERS)
  def test_c_is_bit_identical(self, optimizer):
    """TK-b, over ten updates and three refreshes, with -0.0 stored in C."""
    moments = run(optimizer)
    negative = bits(moments[-1].params['a'])[0, :4]
    np.testing.assert_array_equal(negative, 1 << 31)
    for before, after in zip(moments, moments[1:]):
      for leaf in KERNELS:
        outside = ~before.backward[leaf]
        np.testing.assert_array_equal(bits(before.params[leaf])[outside],
                                      bits(after.params[leaf])[outside])

  @parameterized.parameters(*OPTIMIZERS)
  def test_all_of_b_moves(self, optimizer):
    moments = run(optimizer)
    for before, after in zip(moments, moments[1:]):
      for leaf in KERNELS:
        inside = before.backward[leaf]
        self.assertTrue(np.all((before.params[leaf] != after.params[leaf])
                               [inside]))

  @parameterized.parameters(*OPTIMIZERS)
  def test_entries_that_enter_b_start_with_fresh_slots(self, optimizer):
    """Whatever their slots hold, the next update is that from slots of 0."""
    tx = sparse_jax.sparsify(OPTIMIZERS[optimizer](), METHOD)
    update = jax.jit(lambda *args: tx.update(*args)[0])
    entered = 0
    moments = run(optimizer)
    for before, after in zip(moments, moments[1:]):
      new = {leaf: after.backward[leaf] & ~before.backward[leaf]
             for leaf in KERNELS}
      entered += sum(mask.sum() for mask in new.values())

      def set_slots(path, slot, value):
        leaf = getattr(path[-1], 'key', None)
        return np.where(new[leaf], value, slot).astype(slot.dtype) if (
            leaf in new) else slot

      zeros, others = (update(after.grads, after.state._replace(
          inner=jax.tree.map_with_path(functools.partial(
              set_slots, value=value), after.state.inner)), after.params)
                       for value in (0, 5))
      jax.tree.map(np.testing.assert_array_equal, zeros, others)
    self.assertGreater(entered, 0)

  def test_equals_numpy_with_momentum(self):
    """The rule step by step: penalty, mask, momentum, mask, refresh."""
    moments = run('momentum')
    for leaf in KERNELS:
      density = {'a': .2, 'b': .2}[leaf]
      weight = moments[0].params[leaf].astype(np.float64)
      slot = np.zeros_like(weight)
      for t, (now, after) in enumerate(zip(moments, moments[1:])):
        forward, backward = now.forward[leaf], now.backward[leaf]
        factor = np.where(forward, 1, 1 / density)
        grad = now.grads[leaf] + .05 * factor * weight
        slot = np.where(backward, .9 * slot + grad, 0)
        weight = weight - .1 * slot * backward
        # float32 against float64.
        np.testing.assert_allclose(after.params[leaf], weight, rtol=1e-4,
                                   atol=1e-5, err_msg=f'{leaf} after {t + 1}')
        weight = after.params[leaf].astype(np.float64)

  def test_values_between_a_and_b_are_not_seen_by_the_forward_pass(self):
    """TK-e."""
    moment = run('adam')[4]
    hidden = {leaf: np.where(moment.forward[leaf], moment.params[leaf],
                             moment.params[leaf] * .5 + 1e-3)
              for leaf in KERNELS}
    got = METHOD.read(moment.params | hidden, moment.state)
    for leaf in KERNELS:
      np.testing.assert_array_equal(got[leaf], moment.weights[leaf])

  def test_clipping_inside_sees_neither_c_nor_a_dense_norm(self):
    method = sparse_jax.top_kast(.8, backward_sparsity=.5, penalty_weight=0.)
    tx = sparse_jax.sparsify(
        optax.chain(optax.clip_by_global_norm(1.), optax.sgd(1.)), method)
    params = start_params()
    state = jax.jit(tx.init)(params)
    outside = jax.tree.map(lambda p: jnp.full_like(p, 1e6), params)
    masks = sparse_jax.get_state(state).backward_masks
    grads = {leaf: jnp.where(masks[leaf], .5, outside[leaf])
             for leaf in KERNELS} | {'bias': jnp.zeros(8)}
    updates, _ = jax.jit(tx.update)(grads, state, params)
    norm = np.sqrt(sum(np.sum(np.square(u)) for u in updates.values()))
    # 44 entries of .5 have the norm 3.32; float32 rounding.
    np.testing.assert_allclose(norm, 1., rtol=1e-5)


class SpecifiedExampleTest(parameterized.TestCase):
  """spec/methods.md 3.9 and 3.6, on a vector of six."""

  W6 = np.array([.5, -.1, .3, -.8, .2, .05], np.float32)
  G0 = np.array([.1, -.9, .2, .05, -.6, .4], np.float32)

  def test_sets_weights_gradient_and_penalty(self):
    method = sparse_jax.top_kast(2 / 3, backward_sparsity=1 / 3,
                                 penalty_weight=1.,
                                 is_sparse=lambda path, leaf: True)
    state = method.init(self.W6)
    np.testing.assert_array_equal(state.forward_masks, [1, 0, 0, 1, 0, 0])
    np.testing.assert_array_equal(state.backward_masks, [1, 0, 1, 1, 1, 0])
    weights, pull = jax.vjp(lambda w: method.read(w, state), self.W6)
    np.testing.assert_array_equal(
        weights, np.array([.5, 0, 0, -.8, 0, 0], np.float32))
    np.testing.assert_array_equal(
        pull(jnp.array(self.G0))[0],
        np.array([.1, 0, .2, .05, -.6, 0], np.float32))
    decay = jax.grad(method.penalty)(self.W6, state)
    np.testing.assert_allclose(decay, [.5, 0, .9, -.8, .6, 0], rtol=1e-6)

  def test_dnw(self):
    """One step of SGD at rate 1, after which the mask has moved."""
    method = sparse_jax.dnw(.5, is_sparse=lambda path, leaf: True)
    tx = sparse_jax.sparsify(optax.sgd(1.), method)
    state = tx.init(self.W6)
    eff = method.read(self.W6, state)
    np.testing.assert_array_equal(
        eff, np.array([.5, 0, .3, -.8, 0, 0], np.float32))
    grads = jnp.array([0, 0, .2, 0, -.3, 0])
    updates, state = jax.jit(tx.update)(grads, state, self.W6)
    theta = optax.apply_updates(jnp.array(self.W6), updates)
    np.testing.assert_allclose(theta, [.5, -.1, .1, -.8, .5, .05], rtol=1e-6)
    np.testing.assert_allclose(method.read(theta, state),
                               [.5, 0, 0, -.8, .5, 0], rtol=1e-6)

  def test_dnw_gradient_reaches_all_weights(self):
    method = sparse_jax.dnw(.5, is_sparse=lambda path, leaf: True)
    state = method.init(self.W6)
    grad = jax.vjp(lambda w: method.read(w, state), self.W6)[1](self.G0)[0]
    np.testing.assert_array_equal(grad, self.G0)
    self.assertEqual(method.penalty(self.W6, state), 0.)


class PenaltyTest(parameterized.TestCase):

  def test_in_the_optimizer_or_in_the_loss_is_the_same_bitwise(self):
    method = sparse_jax.top_kast(.8, backward_sparsity=.5, penalty_weight=.1,
                                 update_every=1)
    params, (x, y) = start_params(), batch(0)
    inside = sparse_jax.sparsify(optax.sgd(.1), method)
    outside = sparse_jax.sparsify(optax.sgd(.1), method, penalty=False)
    state = inside.init(params)
    loss = lambda p: model_loss(method.read(p, state), x, y)
    plain = jax.grad(loss)(params)
    total = jax.grad(lambda p: loss(p) + method.penalty(p, state))(params)
    self.assertTrue(np.any(plain['a'] != total['a']))
    # Two compilations may contract products and sums otherwise, so eagerly.
    got, got_state = inside.update(plain, state, params)
    want, want_state = outside.update(total, state, params)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    jax.tree.map(np.testing.assert_array_equal, got_state, want_state)

  def test_density_is_that_asked_for_each_layer(self):
    """TK-c with ERK: each kernel has its own D, which is the density."""
    params = {'a': jnp.ones((4, 4)), 'b': jnp.full((12, 10), 2.)}
    method = sparse_jax.top_kast(.8, backward_sparsity=.5, penalty_weight=.3,
                                 allocation=allocation.erk)
    state = method.init(params)
    shares = allocation.erk({'a': (4, 4), 'b': (12, 10)}, .8)
    self.assertGreater(abs(shares['a'] - shares['b']), .2)
    decay = jax.grad(method.penalty)(params, state)
    for leaf, theta in (('a', 1.), ('b', 2.)):
      forward, backward = (np.asarray(masks[leaf]) for masks in (
          state.forward_masks, state.backward_masks))
      self.assertTrue(np.any(backward & ~forward))
      factor = np.where(forward, 1, backward / (1 - shares[leaf]))
      np.testing.assert_allclose(decay[leaf], .3 * theta * factor, rtol=1e-6)

  def test_equals_the_public_exploration_loss(self):
    moment = run('adam')[4]
    want = losses.exploration_loss(
        moment.params, moment.forward, moment.backward, penalty_weight=.05,
        forward_density=.2)
    np.testing.assert_allclose(METHOD.penalty(moment.params, moment.state),
                               want, rtol=1e-6)  # 1 - .8 is not .2.

  def test_no_weight_is_no_penalty(self):
    method = sparse_jax.top_kast(.8, backward_sparsity=.5, penalty_weight=0.)
    params = start_params()
    self.assertEqual(method.penalty(params, method.init(params)), 0.)


class SelectionTest(parameterized.TestCase):

  def test_random_b_contains_a_is_exact_and_drawn_anew(self):
    method = sparse_jax.top_kast(.8, backward_sparsity=.5, update_every=2,
                                 backward_selection='random')
    moments = train(method, optax.sgd(.1), steps=6)
    draws = []
    for t, moment in enumerate(moments):
      for leaf, (n, m) in zip(KERNELS, ((10, 24), (8, 20))):
        forward, backward = moment.forward[leaf], moment.backward[leaf]
        self.assertEqual((forward.sum(), backward.sum()), (n, m))
        self.assertFalse(np.any(forward & ~backward))
        if t % 2 == 0:
          np.testing.assert_array_equal(forward,
                                        slow_top(moment.params[leaf], n))
      spare = moment.backward['a'] & ~moment.forward['a']
      if t % 2 == 0:
        draws.append(spare)
      else:
        np.testing.assert_array_equal(spare, draws[-1])
    for i, one in enumerate(draws):
      for other in draws[:i]:
        # 14 of 38: all equal has odds of 1e-10.
        self.assertTrue(np.any(one != other))

  def test_random_b_depends_on_the_key_and_a_does_not(self):
    method = sparse_jax.top_kast(.8, backward_sparsity=.5,
                                 backward_selection='random')
    params = start_params()
    one, same, other = (method.init(params, key) for key in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    jax.tree.map(np.testing.assert_array_equal, one.forward_masks,
                 other.forward_masks)
    self.assertTrue(np.any(one.backward_masks['a']
                           != other.backward_masks['a']))

  def test_random_b_of_two_layers_is_drawn_apart(self):
    method = sparse_jax.top_kast(.9, backward_sparsity=.5,
                                 backward_selection='random')
    same = jnp.arange(48.).reshape(6, 8)
    masks = method.init({'x': same, 'y': same}).backward_masks
    self.assertTrue(np.any(masks['x'] != masks['y']))

  @parameterized.parameters('magnitude', 'random')
  def test_b_is_a_from_the_step_that_stops_exploration(self, selection):
    """Step 4 is not divisible by 3; A goes on moving afterwards."""
    method = sparse_jax.top_kast(.8, backward_sparsity=.5, update_every=3,
                                 backward_selection=selection,
                                 stop_exploration_at=4)
    moments = train(method, optax.sgd(.2), steps=7)
    for t, moment in enumerate(moments):
      for leaf, (n, m) in zip(KERNELS, ((10, 24), (8, 20))):
        self.assertEqual(moment.forward[leaf].sum(), n)
        self.assertEqual(moment.backward[leaf].sum(), m if t < 4 else n)
      if t >= 4:
        jax.tree.map(np.testing.assert_array_equal, moment.forward,
                     moment.backward)

  def test_exploration_may_stop_before_it_starts(self):
    method = sparse_jax.top_kast(.8, backward_sparsity=.5,
                                 stop_exploration_at=0)
    state = method.init(start_params())
    jax.tree.map(np.testing.assert_array_equal, state.forward_masks,
                 state.backward_masks)

  def test_no_backward_sparsity_makes_b_all(self):
    method = sparse_jax.top_kast(.8, backward_sparsity=0.)
    state = method.init(start_params())
    for leaf, n in (('a', 10), ('b', 8)):
      self.assertTrue(np.all(state.backward_masks[leaf]))
      self.assertEqual(int(state.forward_masks[leaf].sum()), n)

  @parameterized.parameters('magnitude', 'random')
  def test_equal_sparsities_make_b_a(self, selection):
    method = sparse_jax.top_kast(.8, backward_sparsity=.8,
                                 backward_selection=selection)
    state = method.init(start_params())
    jax.tree.map(np.testing.assert_array_equal, state.forward_masks,
                 state.backward_masks)

  def test_no_sparsity_is_the_dense_optimizer(self):
    method = sparse_jax.top_kast(0., backward_sparsity=0., penalty_weight=0.,
                                 update_every=2)
    moments = train(method, optax.adamw(.1), steps=3)
    optimizer = optax.adamw(.1)
    params = start_params()
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for t, moment in enumerate(moments):
      jax.tree.map(lambda a, b: np.testing.assert_allclose(
          a, b, rtol=1e-5, atol=1e-6), moment.params, params)  # Fusions.
      grads = dense_gradient(params, *batch(t))
      updates, state = update(grads, state, params)
      params = optax.apply_updates(params, updates)

  def test_masks_refresh_inside_the_window_only(self):
    """Every second step from 3 to 7: after updates 4 and 6."""
    method = sparse_jax.top_kast(.8, backward_sparsity=.5, update_every=2,
                                 update_begin=3, update_end=7)
    moments = train(method, optax.sgd(.2), steps=9)
    changed = [t for t in range(1, 10) if np.any(
        moments[t].forward['a'] != moments[t - 1].forward['a'])]
    self.assertEqual(changed, [4, 6])

  def test_sharing_counts_forward_and_backward_by_the_allocation(self):
    params = {'a': jnp.ones((4, 4)), 'b': jnp.ones((12, 10))}
    method = sparse_jax.top_kast(.8, backward_sparsity=.5,
                                 allocation=allocation.erk)
    state = method.init(params)
    shapes = {'a': (4, 4), 'b': (12, 10)}
    for masks, sparsity in ((state.forward_masks, .8),
                            (state.backward_masks, .5)):
      shares = allocation.erk(shapes, sparsity)
      for leaf, shape in shapes.items():
        self.assertEqual(int(masks[leaf].sum()), sparse_jax.keep_count(
            shape[0] * shape[1], shares[leaf]))

  def test_a_mapping_is_scaled_for_the_backward_set(self):
    method = sparse_jax.top_kast(.8, backward_sparsity=.4,
                                 allocation={'a': .5, 'b': .9})
    state = method.init(start_params())
    self.assertEqual(
        jax.tree.map(lambda mask: int(mask.sum()), (state.forward_masks,
                                                    state.backward_masks)),
        ({'a': 24, 'b': 4, 'bias': None}, {'a': 36, 'b': 22, 'bias': None}))

  def test_each_stacked_layer_has_its_own_sets(self):
    scale = np.array([1., 100.], np.float32)[:, None, None]
    params = {'blocks': jnp.asarray(scale * np.random.default_rng(3).normal(
        size=(2, 5, 8)), jnp.float32)}
    state = sparse_jax.top_kast(.8, backward_sparsity=.5,
                                batch_axes=(0,)).init(params)
    np.testing.assert_array_equal(
        state.forward_masks['blocks'].sum((1, 2)), [8, 8])
    np.testing.assert_array_equal(
        state.backward_masks['blocks'].sum((1, 2)), [20, 20])

  @parameterized.parameters('magnitude', 'random')
  def test_a_last_group_of_n_of_m_cut_short_keeps_n(self, selection):
    """Six rows in fours: A has 1 + 1 of each column, B 2 + 2."""
    method = sparse_jax.top_kast(.75, backward_sparsity=.5,
                                 structure=NM(1, 4),
                                 backward_selection=selection)
    params = {'w': jnp.asarray(
        np.random.default_rng(4).normal(size=(6, 20)), jnp.float32)}
    state = method.init(params)
    for masks, n in ((state.forward_masks, 1), (state.backward_masks, 2)):
      mask = np.asarray(masks['w'])
      np.testing.assert_array_equal(mask[:4].sum(0), n)
      np.testing.assert_array_equal(mask[4:].sum(0), n)


if __name__ == '__main__':
  absltest.main()
