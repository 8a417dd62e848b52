"""Tests of SWAT's weights: what is read, what moves, how budgets are shared."""

import functools
from typing import NamedTuple

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax
from sparse_jax.operators.operands import Operands

QUICK = {'xla_backend_optimization_level': 0}


def fake_params():
  rng = np.random.default_rng(0)
  shapes = {'a': (6, 8), 'b': (2, 2, 4, 5), 'c': (4, 2)}
  return {name: {'kernel': jnp.asarray(rng.normal(size=shape), jnp.float32)}
          for name, shape in shapes.items()}


class Moment(NamedTuple):
  weights: dict[str, np.ndarray]
  masks: dict[str, np.ndarray]
  read: dict[str, np.ndarray]
  grads: dict[str, np.ndarray]


def kernels(tree):
  return {name: np.asarray(layer['kernel']) for name, layer in tree.items()}


def run(method, steps=4, slopes=None):
  """Moments before each step; the loss pulls each weight to its own target."""
  params = fake_params()
  targets = jax.tree.map(lambda p: jnp.flip(p) + 1, params)
  slopes = slopes or dict.fromkeys(params, 1.)
  tx = sparse_jax.sparsify(optax.sgd(.3), method)

  def loss(params, state):
    read = method.read(params, state)
    each = {name: slopes[name] * jnp.sum(jnp.square(
        read[name]['kernel'] - targets[name]['kernel'])) / 2 for name in read}
    return sum(each.values()), read

  @functools.partial(jax.jit, compiler_options=QUICK)
  def step(params, state):
    grads, read = jax.grad(loss, has_aux=True)(params, state)
    updates, new = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), new, grads, read

  state, moments = jax.jit(tx.init)(params), []
  for _ in range(steps):
    masks = sparse_jax.get_state(state).forward_masks
    new_params, state, grads, read = step(params, state)
    moments.append(Moment(*map(kernels, (params, masks, read, grads))))
    params = new_params
  return moments


@functools.cache
def plain_run():
  return run(sparse_jax.swat(.75), steps=5)


def counts(moment):
  return {name: int(mask.sum()) for name, mask in moment.masks.items()}


class SwatTest(parameterized.TestCase):

  def test_the_largest_weights_are_read_anew_every_step(self):
    moments = plain_run()
    self.assertNotEqual(moments[0].masks['a'].tolist(),
                        moments[-1].masks['a'].tolist())
    for moment in moments:
      for name, weight in moment.weights.items():
        kept = sparse_jax.make_mask(jnp.abs(weight), .75)
        np.testing.assert_array_equal(moment.masks[name], kept)
        np.testing.assert_array_equal(moment.read[name],
                                      np.where(kept, weight, 0))

  def test_the_gradient_reaches_all_weights(self):
    """SW-b: that of what was read, unmasked."""
    target = kernels(jax.tree.map(lambda p: jnp.flip(p) + 1, fake_params()))
    for moment in plain_run():
      for name, grad in moment.grads.items():
        np.testing.assert_allclose(grad, moment.read[name] - target[name],
                                   rtol=1e-6)

  def test_it_follows_dnw(self):
    for ours, other in zip(plain_run(), run(sparse_jax.dnw(.75), steps=5)):
      jax.tree.map(np.testing.assert_array_equal, ours, other)

  def test_a_masked_update_leaves_hidden_weights_alone(self):
    before, after = run(sparse_jax.swat(.75, masked_update=True), steps=2)
    for name, mask in before.masks.items():
      old, new = before.weights[name], after.weights[name]
      np.testing.assert_array_equal(old[~mask], new[~mask])
      self.assertTrue(np.all(old[mask] != new[mask]))

  def test_the_weights_in_use_are_frozen_but_hidden_ones_still_move(self):
    free = plain_run()
    held = run(sparse_jax.swat(.75, freeze_at=2), steps=5)
    for i, moment in enumerate(held):
      jax.tree.map(np.testing.assert_array_equal, moment.masks,
                   free[min(i, 2)].masks)
    hidden = ~held[3].masks['a']
    self.assertTrue(np.all(held[3].weights['a'][hidden]
                           != held[4].weights['a'][hidden]))

  def test_masks_wait_for_their_period(self):
    moments = run(sparse_jax.swat(.75, update_every=3), steps=5)
    same = [np.array_equal(a.masks['b'], b.masks['b'])
            for a, b in zip(moments, moments[1:])]
    self.assertEqual(same, [True, True, False, True])

  def test_structured_swat_keeps_channels_whole(self):
    moment = run(sparse_jax.swat(.75, structure=sparse_jax.Channel()), 2)[1]
    taps = moment.masks['b'].reshape(4, 4, 5)
    np.testing.assert_array_equal(taps, np.broadcast_to(taps[:1], (4, 4, 5)))
    sums = np.abs(moment.weights['b']).sum((0, 1))
    self.assertGreaterEqual(sums[taps[0]].min(), sums[~taps[0]].max())


class MomentumTest(parameterized.TestCase):

  def test_the_budget_is_uniform_at_first_and_constant(self):
    moments = run(sparse_jax.swat(.75, allocation='momentum'),
                  slopes={'a': 1., 'b': .1, 'c': 1.})
    self.assertEqual(counts(moments[0]), {'a': 12, 'b': 20, 'c': 2})
    for moment in moments:
      self.assertEqual(sum(counts(moment).values()), 34)
    self.assertNotEqual(counts(moments[0]), counts(moments[1]))

  def test_shares_are_those_of_the_mean_momentum_in_use(self):
    """Small momentum, fewer weights, as in the code; one step by hand."""
    first, second = run(sparse_jax.swat(.75, allocation='momentum'), 2,
                        slopes={'a': .2, 'b': .3, 'c': .001})
    mean = {name: np.abs(grad[first.masks[name]]).mean()
            for name, grad in first.grads.items()}
    total = sum(mean.values())
    for name, count in counts(second).items():
      # One each is fixed, and shares are whole.
      self.assertAlmostEqual(count - 1, 31 * mean[name] / total, delta=1)
    self.assertEqual(counts(second)['c'], 1)

  def test_a_full_layer_hands_on_what_it_cannot_take(self):
    moment = run(sparse_jax.swat(.75, allocation='momentum'), 2,
                 slopes={'a': .1, 'b': .1, 'c': 100.})[1]
    self.assertEqual(counts(moment)['c'], 8)
    self.assertEqual(sum(counts(moment).values()), 34)


class OperatorsTest(parameterized.TestCase):

  def operators(self, method):
    params = fake_params()
    return method.operators(params, method.init(params))

  def activations(self, method):
    return {path.partition('/')[0]: operands.backward_activation
            for path, operands in self.operators(method).items()}

  def test_activations_alone_are_left_to_the_operators(self):
    for operands in self.operators(sparse_jax.swat(.75)).values():
      self.assertEqual(operands, Operands(backward_activation=.75))

  def test_a_layer_that_is_dense_has_dense_activations(self):
    method = sparse_jax.swat(.75, is_sparse=[('a', False)])
    self.assertEqual(self.activations(method), {'b': .75, 'c': .75})

  @parameterized.named_parameters(
      ('as_the_weights', sparse_jax.erk, None, .5, sparse_jax.erk),
      ('their_own', sparse_jax.erk, .75, .75, sparse_jax.erk),
      ('uniform', sparse_jax.uniform, 0., 0., sparse_jax.uniform))
  def test_the_allocation_shares_their_sparsity_too(self, allocation, given,
                                                    sparsity, expected):
    method = sparse_jax.swat(.5, activation_sparsity=given,
                             allocation=allocation)
    shapes = {name: weight.shape for name, weight
              in kernels(fake_params()).items()}
    self.assertEqual(self.activations(method), expected(shapes, sparsity))

  def test_a_moving_budget_moves_the_activations_along(self):
    params = fake_params()
    method = sparse_jax.swat(.75, allocation='momentum')
    tx = sparse_jax.sparsify(optax.sgd(.1), method)
    grads = jax.tree.map(jnp.ones_like, params)
    grads['c'] = {'kernel': 100 * grads['c']['kernel']}
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    sparsity = {path: float(operands.backward_activation) for path, operands
                in method.operators(params, state).items()}
    masks = kernels(sparse_jax.get_state(state).forward_masks)
    for name, mask in masks.items():
      self.assertAlmostEqual(sparsity[f'{name}/kernel'], 1 - mask.mean(),
                             places=6)
    self.assertEqual(sparsity['c/kernel'], 0)

  def test_work_is_that_of_its_three_passes(self):
    method = sparse_jax.swat(.75, activation_sparsity=.5)
    for work in method.work(fake_params(), 10).values():
      self.assertEqual(work, (.25, .25, .5))

  @parameterized.parameters(
      (dict(sparsity=1.), r'`sparsity` \(=1.0\)'),
      (dict(activation_sparsity=-.1), r'`activation_sparsity` \(=-0.1\)'),
      (dict(masked_update=1), r'`masked_update` \(=1\)'),
      (dict(freeze_at=-1), r'`freeze_at` \(=-1\)'),
      (dict(update_every=0), r'`update_every` \(=0\)'),
      (dict(allocation='momenta'), "`allocation` .*'momenta'"),
      (dict(allocation='momentum', structure=sparse_jax.NM(1, 2)),
       "`allocation` .*'momentum'"))
  def test_a_bad_argument_is_named_with_its_value(self, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      sparse_jax.swat(**{'sparsity': .5} | arguments)


if __name__ == '__main__':
  absltest.main()
