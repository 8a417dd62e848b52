"""SRigL beside a slow loop in NumPy, and what its weights are exported to."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax

_RATE, _STEPS = np.float32(.1), 30
_SHAPES = {'hidden': (12, 10), 'conv': (2, 2, 4, 6), 'head': (10, 4)}


def _params(seed=0):
  rng = np.random.default_rng(seed)
  return {name: {'kernel': jnp.asarray(rng.normal(size=shape), jnp.float32)}
          for name, shape in _SHAPES.items()}


def _gradients(seed, step):
  """Of another size for each output, in turn: outputs leave and come back."""
  rng = np.random.default_rng([seed, step])
  return {name: {'kernel': jnp.asarray(rng.normal(size=shape) * np.roll(
      np.linspace(.02, 1, shape[-1])**2, step // 6), jnp.float32)}
          for name, shape in _SHAPES.items()}


def _ranked(scores, k, among):
  """Set of the k best of some flat places; ties to the earlier."""
  places = sorted(among, key=lambda i: (-scores[i], i))
  return set(places[:k])


def _slow_refresh(weight, grad, active, k, fraction, gamma):
  """One refresh of a matrix [inputs, outputs], as the docstring has it."""
  inputs, outputs = weight.shape
  size, grad = np.abs(weight).ravel(), np.abs(grad).ravel()
  on = set(np.flatnonzero(active))
  stay = max(1, round((1 - fraction) * len(on)))
  large = _ranked(size, stay, on)
  salient = large | _ranked(grad, len(on) - stay, range(weight.size))
  number = [sum(i % outputs == o for i in salient) for o in range(outputs)]
  alive = list(range(outputs))
  if gamma:
    bar = max(1, int(gamma * k))
    needed = k * outputs // inputs  # One more than these must stay.
    bar = min(bar, sorted(number, reverse=True)[needed])
    alive = [o for o in alive if number[o] >= bar]
  fan_in = k * outputs // len(alive)
  new = np.zeros(weight.size, bool)
  for output in alive:
    own = {i for i in range(weight.size) if i % outputs == output}
    kept = _ranked(size, fan_in, own & large)
    grown = _ranked(grad, fan_in - len(kept), own - kept)
    new[list(kept | grown)] = True
  return new.reshape(weight.shape), alive


class SriglTest(parameterized.TestCase):

  @parameterized.parameters((.3, 0), (.9, 1), (0., 2), (1., 3))
  def test_trajectory_is_that_of_the_slow_loop(self, gamma, seed):
    method = sparse_jax.srigl(.7, gamma=gamma, update_every=3,
                              drop_fraction=.4)
    tx = sparse_jax.sparsify(optax.sgd(float(_RATE)), method)
    params, update = _params(seed), jax.jit(tx.update)
    state, ablated, revived = tx.init(params), 0, 0
    masks = jax.tree.map(np.array, state.sparse.forward_masks)
    mine = jax.tree.map(np.array, params)
    for step in range(1, _STEPS + 1):
      grads = _gradients(seed, step)
      updates, state = update(grads, state, params)
      params = optax.apply_updates(params, updates)
      theirs = state.sparse.forward_masks
      for name in _SHAPES:
        old, grad = masks[name]['kernel'], np.asarray(grads[name]['kernel'])
        stepped = np.where(old, mine[name]['kernel'] - _RATE * grad,
                           mine[name]['kernel'] if step == 1 else 0)
        new = old
        if step % 3 == 0:
          flat = (-1, old.shape[-1])
          k = sparse_jax.keep_count(int(np.prod(old.shape[:-1])), .7)
          new, alive = _slow_refresh(
              stepped.reshape(flat), grad.reshape(flat), old.reshape(flat), k,
              .4, 0. if name == 'head' else gamma)
          new = new.reshape(old.shape)
          was = old.reshape(flat).any(0)
          now = np.isin(np.arange(len(was)), alive)
          ablated += np.sum(was & ~now)
          revived += np.sum(~was & now)
        mine[name]['kernel'] = np.where(old & new, stepped, 0)
        masks[name]['kernel'] = new
        np.testing.assert_array_equal(theirs[name]['kernel'], new)
        np.testing.assert_allclose(params[name]['kernel'],
                                   mine[name]['kernel'], rtol=2e-5, atol=1e-6)
    if gamma >= .9:
      self.assertGreater(ablated, 0)
      self.assertGreater(revived, 0)
    elif not gamma:
      self.assertEqual(ablated, 0)

  def test_counts_are_those_of_the_law(self):
    params = _params(4)
    method = sparse_jax.srigl(.7, gamma=.9, update_every=1)
    state, refresh = method.init(params), jax.jit(method.refresh)
    for step in range(6):
      params, state = refresh(params, _gradients(4, step), state)
      masks = state.forward_masks
      for name, shape in _SHAPES.items():
        inputs = np.asarray(masks[name]['kernel']).reshape(-1, shape[-1])
        counts = inputs.sum(0)
        budget = shape[-1] * sparse_jax.keep_count(len(inputs), .7)
        self.assertLen(set(counts[counts > 0].tolist()), 1)
        self.assertLessEqual(counts.sum(), budget)
        self.assertGreater(counts.sum(), budget - np.sum(counts > 0))
        if name == 'head':
          self.assertTrue(counts.all())

  def test_each_layer_of_a_stack_has_a_fan_in_of_its_own(self):
    rng = np.random.default_rng(6)
    weight = jnp.asarray(rng.normal(size=(2, 12, 10)), jnp.float32)
    grads = _gradients(5, 0)['hidden']['kernel']
    grads = {'w': jnp.stack([jnp.abs(grads), jnp.ones((12, 10))])}
    both = sparse_jax.srigl(.7, gamma=1., update_every=1, batch_axes=(0,))
    one = sparse_jax.srigl(.7, gamma=1., update_every=1)
    params = {'w': weight}
    state = both.init(params)
    first = state.forward_masks['w']
    _, new = both.refresh(params, grads, state)
    fan_ins = []
    for layer in range(2):
      own = {'w': weight[layer]}
      alone = one.init(own)
      alone = alone._replace(marks={'w': state.marks['w'][layer]})
      _, alone = one.refresh(own, {'w': grads['w'][layer]}, alone)
      np.testing.assert_array_equal(new.forward_masks['w'][layer],
                                    alone.forward_masks['w'])
      fan_ins.append(int(alone.forward_masks['w'].sum(0).max()))
    self.assertEqual(int(first[0].sum()), int(first[1].sum()))
    self.assertNotEqual(*fan_ins)

  @parameterized.parameters(('gamma', (-.1, 1.5, 'x', None)),
                            ('never_ablate', ('(', None)))
  def test_bad_argument_is_named(self, argument, values):
    for value in values:
      with self.assertRaisesRegex(ValueError, f'`{argument}`'):
        sparse_jax.srigl(.5, **{argument: value})


def _net(params, x):
  def layer(name, x):
    return x @ params[name]['kernel'] + params[name]['bias'][None]

  return layer('head', jax.nn.gelu(layer('second', jax.nn.gelu(
      layer('first', x)))))


@functools.cache
def _trained():
  """A net of which SRigL has ablated outputs of both hidden layers."""
  rng = np.random.default_rng(3)
  sizes = {'first': (20, 16), 'second': (16, 12), 'head': (12, 5)}
  params = {name: {'kernel': jnp.asarray(rng.normal(size=shape), jnp.float32),
                   'bias': jnp.asarray(rng.normal(size=shape[1]), jnp.float32)}
            for name, shape in sizes.items()}
  method = sparse_jax.srigl(.8, gamma=1., update_every=1)
  state, refresh = method.init(params), jax.jit(method.refresh)
  for step in range(4):
    rng = np.random.default_rng([9, step])
    grads = jax.tree.map(lambda p: jnp.asarray(
        rng.normal(size=p.shape) * np.linspace(0, 2, p.shape[-1])**3,
        jnp.float32), params)
    params, state = refresh(
        jax.tree.map(lambda p, g: p - .3 * g, params, grads), grads, state)
  return method.read(params, state), state.forward_masks


class ExportTest(parameterized.TestCase):

  def test_smaller_net_computes_the_same(self):
    params, masks = _trained()
    small, kept = sparse_jax.drop_outputs(
        params, masks, chain={'first/kernel': 'second/kernel',
                              'second/kernel': 'head/kernel'},
        activation=jax.nn.gelu)
    for name, outputs in (('first', 16), ('second', 12)):
      self.assertLess(len(kept[f'{name}/kernel']), outputs)
      self.assertEqual(small[name]['kernel'].shape[1],
                       len(kept[f'{name}/kernel']))
    self.assertEqual(small['head']['kernel'].shape,
                     (len(kept['second/kernel']), 5))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(7, 20)), jnp.float32)
    np.testing.assert_allclose(_net(small, x), _net(params, x), rtol=1e-4,
                               atol=1e-4)  # Sums in another order.

  def test_condensed_product_is_that_of_the_masked_weight(self):
    params, masks = _trained()
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2, 20)),
                    jnp.float32)
    weight = params['first']['kernel']
    packed = sparse_jax.condense(weight, masks['first']['kernel'])
    self.assertEqual(packed.values.shape, packed.indices.shape)
    self.assertLess(len(packed.outputs), 16)
    np.testing.assert_allclose(sparse_jax.condensed_matmul(x, packed),
                               x @ weight, rtol=1e-5, atol=1e-5)

  def test_convolution_is_condensed_as_it_is_unfolded(self):
    rng = np.random.default_rng(2)
    weight = jnp.asarray(rng.normal(size=(2, 3, 4, 5)), jnp.float32)
    mask = sparse_jax.make_mask(jnp.abs(weight), .75,
                                structure=sparse_jax.FanIn())
    packed = sparse_jax.condense(jnp.where(mask, weight, 0), mask)
    self.assertEqual(packed.values.shape, (5, 6))
    flat = np.where(mask, weight, 0).reshape(24, 5)
    for values, indices, output in zip(*packed[:3]):
      np.testing.assert_array_equal(flat[indices, output], values)

  def test_uneven_fan_in_is_named(self):
    weight = jnp.array([[1., 2.], [0., 3.]])
    with self.assertRaisesRegex(ValueError, r'`weight` .*\[1, 2\]'):
      sparse_jax.condense(weight)
    with self.assertRaisesRegex(ValueError, r'`mask` .*\[\]'):
      sparse_jax.condense(weight, weight > 5)
    with self.assertRaisesRegex(ValueError, '`mask` .*shape'):
      sparse_jax.condense(weight, weight[0] > 0)

  @parameterized.named_parameters(
      ('unknown', {'none/kernel': 'head/kernel'}, 'none/kernel'),
      ('no_matrix', {'first/bias': 'head/kernel'}, 'first/bias.*two axes'),
      ('other_reader', {'first/kernel': 'head/kernel'}, '12 inputs, not 16'))
  def test_a_chain_that_does_not_fit_is_named(self, chain, message):
    params, masks = _trained()
    with self.assertRaisesRegex(ValueError, f'`chain` .*{message}'):
      sparse_jax.drop_outputs(params, masks, chain=chain,
                              activation=jax.nn.relu)

  def test_constants_without_a_bias_to_take_them_are_an_error(self):
    params, masks = _trained()
    params = params | {'second': {'kernel': params['second']['kernel']}}
    masks = masks | {'second': {'kernel': masks['second']['kernel']}}
    chain = {'first/kernel': 'second/kernel'}
    with self.assertRaisesRegex(ValueError, 'no bias'):
      sparse_jax.drop_outputs(params, masks, chain=chain,
                              activation=jax.nn.sigmoid)
    silent = sparse_jax.drop_outputs(
        {**params, 'first': {'kernel': params['first']['kernel']}},
        {**masks, 'first': {'kernel': masks['first']['kernel']}}, chain=chain,
        activation=jax.nn.relu)[0]
    self.assertLess(silent['first']['kernel'].shape[1], 16)


if __name__ == '__main__':
  absltest.main()
