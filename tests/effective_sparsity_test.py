"""Tests of which weights lie on a path from an input to an output."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from sparse_jax.cost import effective
from sparse_jax.jaxprs import paths


def random_masks(seed, shapes, density=.3):
  random = np.random.default_rng(seed)
  return {name: jnp.asarray(random.random(shape) < density)
          for name, shape in shapes.items()}


def arrays(seed, *shapes):
  random = np.random.default_rng(seed)
  return [jnp.asarray(random.standard_normal(shape), jnp.float32)
          for shape in shapes]


def searched(edges, sources, sinks):
  """The weights of a graph on a path, by following every path.

  Args:
    edges: (node, node, weight) of what is kept.
    sources: nodes where paths begin.
    sinks: nodes where they end.
  """
  found = set()

  def follow(node, taken):
    if node in sinks:
      found.update(taken)
    for start, end, weight in edges:
      if start == node:
        follow(end, taken + (weight,))

  for node in sources:
    follow(node, ())
  return found


def searched_layers(masks):
  """The same for matrices (..., inputs, outputs), one after another."""
  edges, count = [], len(masks)
  for depth, mask in enumerate(masks):
    for place in np.argwhere(np.asarray(mask)):
      edges.append(((depth, place[-2]), (depth + 1, place[-1]),
                    (depth, *place)))
  found = searched(
      edges, [(0, i) for i in range(masks[0].shape[-2])],
      [(count, i) for i in range(masks[-1].shape[-1])])
  out = [np.zeros(mask.shape, bool) for mask in masks]
  for depth, *place in found:
    out[depth][tuple(place)] = True
  return out


def differentiated(fn, masks, params, x):
  """What a mixed derivative says, for numbers at random.

  A weight is on a path from an input if the derivative by the input depends
  on it; off the path the derivative is exactly 0.
  """
  dense = {name: jnp.where(masks[name], leaf, 0) if name in masks else leaf
           for name, leaf in params.items()}
  direction, = arrays(7, x.shape)

  def slope(params):
    out, tangent = jax.jvp(lambda x: fn(params, x), (x,), (direction,))
    return jnp.sum(tangent * arrays(8, out.shape)[0])

  return {name: masks[name] & (leaf != 0)
          for name, leaf in jax.grad(slope)(dense).items() if name in masks}


class ExactTest(parameterized.TestCase):

  @parameterized.product(seed=(0, 1, 2, 3), activation=(
      jnp.tanh, jax.nn.relu, jax.nn.gelu, jnp.cos, lambda x: x * (x > 0)))
  def test_layers_against_a_search(self, seed, activation):
    masks = random_masks(seed, {'a': (4, 6), 'b': (6, 5), 'c': (5, 3)})
    bias, = arrays(0, (6,))

    def fn(weights, x):
      x = activation(x @ weights['a'] + bias[None])
      return activation(x @ weights['b']) @ weights['c'] - 1

    got = paths.effective_masks(fn, masks, jnp.zeros((2, 4)))
    want = searched_layers(list(masks.values()))
    for mask, expected in zip(got.values(), want, strict=True):
      np.testing.assert_array_equal(mask, expected)
    nonzeros = sum(mask.sum() for mask in want)
    self.assertAlmostEqual(
        effective.effective_sparsity(fn, masks, jnp.zeros((2, 4))),
        1 - nonzeros / sum(mask.size for mask in want))

  @parameterized.parameters(*range(4))
  def test_a_convolution_against_a_search(self, seed):
    """Over positions: a tap that only meets padding is on no path."""
    masks = random_masks(seed, {'a': (5, 2, 3), 'b': (3, 3, 2)}, .2)
    length, out = 3, 2

    def fn(weights, x):
      numbers = ('NWC', 'WIO', 'NWC')
      x = lax.conv_general_dilated(x, weights['a'], (2,), [(2, 2)],
                                   dimension_numbers=numbers)
      return lax.conv_general_dilated(jax.nn.relu(x), weights['b'], (1,),
                                      [(1, 1)], dimension_numbers=numbers)

    edges = []
    for name, depth, stride, pad, sizes in (('a', 0, 2, 2, (length, out)),
                                            ('b', 1, 1, 1, (out, out))):
      for tap, i, o in np.argwhere(np.asarray(masks[name])):
        for place in range(sizes[1]):
          if 0 <= place * stride + tap - pad < sizes[0]:
            edges.append(((depth, place * stride + tap - pad, i),
                          (depth + 1, place, o), (name, tap, i, o)))
    found = searched(edges, [(0, p, i) for p in range(3) for i in range(2)],
                     [(2, p, o) for p in range(2) for o in range(2)])
    want = {name: np.zeros(mask.shape, bool) for name, mask in masks.items()}
    for name, *place in found:
      want[name][tuple(place)] = True
    got = paths.effective_masks(fn, masks, jnp.zeros((1, length, 2)))
    jax.tree.map(np.testing.assert_array_equal, got, want)

  def _check_by_derivative(self, fn, shapes, x, seed, others=None,
                           density=.3):
    masks = random_masks(seed, shapes, density)
    params = dict(zip(shapes, arrays(seed, *shapes.values()))) | (others or {})
    got = paths.effective_masks(
        lambda weights, x: fn(weights | (others or {}), x), masks, x)
    want = differentiated(fn, masks, params, x)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    self.assertLess(sum(m.sum() for m in got.values()),
                    sum(m.sum() for m in masks.values()))

  @parameterized.product(seed=(0, 1), bias=(True, False))
  def test_attention_and_residuals(self, seed, bias):
    shapes = {'q': (4, 2, 3), 'k': (4, 2, 3), 'v': (4, 2, 3), 'o': (2, 3, 4),
              'up': (4, 8), 'down': (8, 4), 'head': (4, 2)}
    others = {'b': .5 * jnp.ones((1, 1, 2, 3)) * bias}

    def fn(p, x):
      q, k, v = (jnp.einsum('btd,dhe->bthe', x, p[n]) + p['b'] for n in 'qkv')
      probabilities = jax.nn.softmax(jnp.einsum('bthe,bshe->bhts', q, k))
      x = x + jnp.einsum('bhts,bshe,hed->btd', probabilities, v, p['o'])
      x = x + jnp.tanh(x @ p['up']) @ p['down']
      return x @ p['head']

    if bias:  # Of values alone the weights sum to 1, which paths cannot know.
      shapes.pop('q'), shapes.pop('k')
      others |= dict(zip('qk', arrays(3, (4, 2, 3), (4, 2, 3))))
    self._check_by_derivative(fn, shapes, arrays(1, (1, 3, 4))[0], seed,
                              others, density=.15)

  @parameterized.parameters(*range(3))
  def test_gates(self, seed):
    """A product of two signals needs both, or a bias in the other."""
    shapes = {'a': (4, 6), 'b': (4, 6), 'c': (6, 2)}
    bias = jnp.asarray([[1., 1, 1, 0, 0, 0]])

    def fn(p, x):
      return (jnp.tanh(x @ p['a']) * (x @ p['b'] + p['bias'])) @ p['c']

    self._check_by_derivative(fn, shapes, arrays(1, (2, 4))[0], seed,
                              {'bias': bias}, density=.2)

  @parameterized.product(seed=(0, 1), reverse=(True, False))
  def test_scanned_layers(self, seed, reverse):
    def fn(p, x):
      def block(x, w):
        x = jnp.tanh(x @ w[0]) @ w[1]
        return x, jnp.sum(x)
      x, ys = lax.scan(jax.checkpoint(block), x @ p['in'],
                       (p['a'], p['b']), reverse=reverse)
      return x @ p['out']

    shapes = {'in': (3, 4), 'a': (3, 4, 5), 'b': (3, 5, 4), 'out': (4, 2)}
    self._check_by_derivative(fn, shapes, arrays(1, (2, 3))[0], seed)

  @parameterized.parameters(*range(2))
  def test_a_recurrent_network(self, seed):
    """Its state first hears nothing, and its weights serve every step."""
    def fn(p, x):
      def cell(carry, x):
        step, h = carry
        h = h @ p['h'] + x @ p['x'] + (step > 0)
        return (step + 1, h), h[:, 0]
      carry, ys = lax.scan(cell, (jnp.zeros((), int), jnp.zeros((2, 6))), x)
      return jnp.concatenate([carry[1] @ p['out'], ys.T], 1)

    shapes = {'x': (3, 6), 'h': (6, 6), 'out': (6, 2)}
    self._check_by_derivative(fn, shapes, arrays(1, (4, 2, 3))[0], seed,
                              density=.2)

  def test_structures(self):
    """Compiled, branched, mapped, with a rule of its own."""
    @jax.custom_vjp
    def rule(x, w):
      return x @ w
    rule.defvjp(lambda x, w: (x @ w, (x, w)),
                lambda res, g: (g @ res[1].T, res[0].T @ g))

    def fn(p, x):
      x = jax.jit(lambda x: jnp.tanh(rule(x, p['a'])))(x)
      x = lax.cond(x.sum() > 0, lambda x: x @ p['b'], lambda x: x @ p['c'], x)
      return jax.vmap(lambda x: p['d'].T @ x)(x)

    masks = random_masks(0, {'a': (4, 5), 'b': (5, 4), 'c': (5, 4),
                             'd': (4, 2)})
    got = paths.effective_masks(fn, masks, jnp.ones((2, 4)))
    both = searched_layers([masks['a'], masks['b'] | masks['c'], masks['d']])
    np.testing.assert_array_equal(got['a'], both[0])
    np.testing.assert_array_equal(got['b'], both[1] & masks['b'])
    np.testing.assert_array_equal(got['c'], both[1] & masks['c'])
    np.testing.assert_array_equal(got['d'], both[2])

  def test_a_while(self):
    def fn(p, x):
      x = lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ p['a'] + 1, x)
      return x @ p['b']

    masks = {'a': jnp.eye(4, k=1, dtype=bool), 'b': jnp.eye(4, 1, dtype=bool)}
    got = paths.effective_masks(fn, masks, jnp.ones((1, 4)))
    self.assertEqual((int(got['a'].sum()), int(got['b'].sum())), (0, 1))
    masks['b'] = jnp.eye(4, 1, k=-3, dtype=bool)
    got = paths.effective_masks(fn, masks, jnp.ones((1, 4)))
    self.assertEqual((int(got['a'].sum()), int(got['b'].sum())), (3, 1))


class MeaningTest(parameterized.TestCase):
  """What counts as a path where the word alone does not say it."""

  def test_a_norm_mixes_no_units(self):
    masks = {'a': jnp.ones((3, 4), bool).at[:, 1].set(False),
             'b': jnp.ones((4, 2), bool)}
    for norm in (nn.LayerNorm(), nn.RMSNorm(), nn.GroupNorm(2),
                 nn.BatchNorm(use_running_average=False)):
      x, = arrays(0, (5, 4))
      variables = norm.init(jax.random.key(0), x)

      def fn(weights, x):
        x, _ = norm.apply(variables, jnp.tanh(x @ weights['a']),
                          mutable=['batch_stats'])
        return jax.nn.softmax(x @ weights['b'])

      got = paths.effective_masks(fn, masks, jnp.ones((5, 3)))
      np.testing.assert_array_equal(got['b'], masks['b'].at[1].set(False))

  def test_a_squeezed_excitation_does(self):
    """It has weights between the mean and what it scales."""
    masks = {'a': jnp.ones((2, 3), bool).at[:, 1].set(False),
             'gate': jnp.ones((3, 3), bool)}

    def fn(weights, x):
      x = jax.nn.relu(x @ weights['a'] + 1)
      gate = jax.nn.sigmoid(x.mean(1, keepdims=True) @ weights['gate'])
      return x * gate

    got = paths.effective_masks(fn, masks, jnp.ones((1, 4, 2)))
    np.testing.assert_array_equal(got['gate'], masks['gate'].at[1].set(False))

  def test_a_normalised_weight(self):
    masks = {'a': jnp.asarray([[1, 1], [0, 1]], bool),
             'b': jnp.asarray([[0], [1]], bool)}

    def fn(weights, x):
      w = weights['a'] / jnp.linalg.norm(weights['a'], axis=1, keepdims=True)
      return x @ w @ weights['b']

    got = paths.effective_masks(fn, masks, jnp.ones((1, 2)))
    np.testing.assert_array_equal(got['a'], [[False, True], [False, True]])

  def test_tables(self):
    """A row that is looked up, by an index or a one-hot vector."""
    masks = random_masks(0, {'table': (7, 4), 'head': (4, 3)}, .4)
    want = searched_layers([masks['table'], masks['head']])
    tokens = jnp.asarray([1, 2])
    for look_up in (lambda t, x: t[x], lambda t, x: jax.nn.one_hot(x, 7) @ t):
      fn = lambda weights, x: look_up(weights['table'], x) @ weights['head']
      got = paths.effective_masks(fn, masks, tokens)
      np.testing.assert_array_equal(got['table'], want[0])
      np.testing.assert_array_equal(got['head'], want[1])

  def test_what_is_added_hears_a_constant(self):
    """A bias counts if it leads to an output, but brings no signal."""
    masks = {'bias': jnp.asarray([True, True, True]),
             'a': jnp.zeros((2, 3), bool).at[0, 0].set(True),
             'b': jnp.asarray([[1], [1], [0]], bool)}
    fn = lambda w, x: jnp.tanh(x @ w['a'] + w['bias'][None]) @ w['b']
    got = paths.effective_masks(fn, masks, jnp.ones((1, 2)))
    np.testing.assert_array_equal(got['bias'], [True, True, False])
    np.testing.assert_array_equal(got['b'].ravel(), [True, False, False])

  def test_entries_moved_about(self):
    """Known places are followed exactly, others may be any."""
    masks = {'w': jnp.ones((4,), bool)}

    def fn(weights, x):
      y = (x * weights['w'])[jnp.asarray([0, 0, 2])]
      y = lax.dynamic_update_slice(y, jnp.zeros((1,)), (0,))
      y = jnp.where(jnp.arange(3) < 2, y, 0).at[0].add(0.)
      return jnp.pad(y, 1)[::-1]

    got = paths.effective_masks(fn, masks, jnp.ones((4,)))
    np.testing.assert_array_equal(got['w'], [True, False, False, False])
    fn = lambda weights, x: lax.dynamic_slice(
        x['x'] * weights['w'], (x['i'],), (1,))
    got = paths.effective_masks(fn, masks, {'x': jnp.ones(4), 'i': 2})
    np.testing.assert_array_equal(got['w'], [True] * 4)
    fn = lambda weights, x: lax.top_k(jnp.sort(x * weights['w']), 1)[0]
    got = paths.effective_masks(fn, masks, jnp.ones((4,)))
    np.testing.assert_array_equal(got['w'], [True] * 4)

  def test_pooling_and_dropout(self):
    class Model(nn.Module):

      @nn.compact
      def __call__(self, x, key):
        x = nn.max_pool(nn.relu(nn.Conv(3, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.Dropout(.5, deterministic=False)(x, rng=key)
        return nn.Dense(2)(nn.avg_pool(x, (2, 2)).mean((1, 2)))

    model, x, key = Model(), jnp.ones((1, 8, 8, 2)), jax.random.key(0)
    shapes = jax.eval_shape(model.init, key, x, key)['params']
    masks = {layer: {'kernel': jnp.ones(leaves['kernel'].shape, bool),
                     'bias': None} for layer, leaves in shapes.items()}
    masks['Conv_0']['kernel'] = masks['Conv_0']['kernel'].at[..., 1].set(False)
    fn = lambda weights, *inputs: model.apply({'params': weights}, *inputs)
    for params in (None, shapes):
      got = paths.effective_masks(fn, masks, x, key, params=params)
      np.testing.assert_array_equal(got['Conv_0']['kernel'],
                                    masks['Conv_0']['kernel'])
      self.assertFalse(got['Dense_0']['kernel'][1].any())
      self.assertTrue(got['Dense_0']['kernel'][::2].all())
      self.assertIsNone(got['Conv_0']['bias'])


class LawsTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.masks = random_masks(0, {'a': (4, 6), 'b': (6, 5), 'c': (5, 3)})
    self.fn = lambda w, x: jnp.tanh(jnp.tanh(x @ w['a']) @ w['b']) @ w['c']
    self.x = jnp.ones((2, 4))

  def test_it_is_idempotent_and_within_the_masks(self):
    once = paths.effective_masks(self.fn, self.masks, self.x)
    twice = paths.effective_masks(self.fn, once, self.x)
    jax.tree.map(np.testing.assert_array_equal, once, twice)
    for mask, kept in zip(once.values(), self.masks.values()):
      self.assertFalse((mask & ~kept).any())
    found = effective.connectivity(self.fn, self.masks, self.x)
    self.assertGreater(found.effective_sparsity, found.sparsity)

  def test_dense_is_effective(self):
    dense = jax.tree.map(jnp.ones_like, self.masks)
    self.assertEqual(effective.effective_sparsity(self.fn, dense, self.x), 0)

  def test_shapes_do_for_inputs(self):
    got = effective.effective_sparsity(
        self.fn, self.masks, jax.ShapeDtypeStruct((2, 4), jnp.float32))
    self.assertEqual(got, effective.effective_sparsity(self.fn, self.masks,
                                                       self.x))

  def test_many_layers_neither_overflow_nor_vanish(self):
    masks = {'w': jnp.ones((200, 8, 8), bool).at[:, 0].set(False)}
    fn = lambda p, x: lax.scan(lambda x, w: (x @ w, None), x, p['w'])[0]
    got = effective.effective_sparsity(fn, masks, jnp.ones((1, 8)))
    # Column 0 of all layers but the last leads to nothing.
    self.assertAlmostEqual(got, 1 - (199 * 49 + 56) / (200 * 64))

  def test_the_table(self):
    masks = self.masks | {'b': self.masks['b'].at[:].set(False)}
    found = effective.connectivity(self.fn, masks, self.x)
    self.assertEqual(found.collapsed, ('a', 'b', 'c'))
    self.assertEqual(found.dead_units, 6 + 5 + 3)
    self.assertEqual(found.effective_sparsity, 1)
    self.assertIn('14 of 14', str(found).splitlines()[-1])

  def test_units_of_stacked_and_attention_kernels(self):
    masks = {'query': {'kernel': jnp.zeros((4, 2, 3), bool).at[0, 1, 2].set(
        True)}}
    fn = lambda p, x: jnp.einsum('td,dhe->the', x, p['query']['kernel'])
    leaf, = effective.connectivity(fn, masks, jnp.ones((1, 4))).leaves
    self.assertEqual((leaf.units, leaf.dead_units), (6, 5))
    masks = {'w': jnp.ones((3, 4, 4), bool).at[1, :, 2].set(False)}
    fn = lambda p, x: lax.scan(lambda x, w: (x @ w, None), x, p['w'])[0]
    leaf, = effective.connectivity(fn, masks, jnp.ones((1, 4)),
                                   batch_axes=(0,)).leaves
    # The unit is heard by nothing in the first, and not made in the second.
    self.assertEqual((leaf.units, leaf.dead_units), (12, 1))
    self.assertEqual(leaf.on_path, 16 + 12 + 12)

  def test_leaves_that_are_never_sparse(self):
    """None for a bias or scale; for a kernel its shape is needed."""
    class Model(nn.Module):

      @nn.compact
      def __call__(self, x):
        x = nn.relu(nn.Dense(4)(x))
        return nn.Dense(2)(nn.LayerNorm()(x))

    model = Model()
    params = model.init(jax.random.key(0), jnp.ones((1, 3)))['params']
    masks = jax.tree.map(lambda leaf: None, params)
    masks['Dense_0']['kernel'] = jnp.ones((3, 4), bool).at[:, 0].set(False)
    fn = lambda params, x: model.apply({'params': params}, x)
    given = functools.partial(paths.effective_masks, fn)
    with self.assertRaisesRegex(ValueError, '`masks` has None.*Dense_1/kernel'):
      given(masks, jnp.ones((1, 3)))
    got = given(masks, jnp.ones((1, 3)), params=params)
    np.testing.assert_array_equal(got['Dense_0']['kernel'],
                                  masks['Dense_0']['kernel'])
    masks['Dense_1']['kernel'] = jnp.ones((4, 2), bool)
    got = given(masks, jnp.ones((1, 3)))
    self.assertFalse(got['Dense_1']['kernel'][0].any())

  def test_errors(self):
    with self.assertRaisesRegex(ValueError, '`masks`'):
      effective.effective_sparsity(self.fn, {'a': None}, self.x)
    params = {name: jnp.ones(m.shape) for name, m in self.masks.items()}
    with self.assertRaisesRegex(ValueError, '`masks` has masks for .*\'z\''):
      effective.effective_sparsity(
          self.fn, self.masks | {'z': self.masks['a']}, self.x, params=params)
    with self.assertRaisesRegex(ValueError, '`masks`.*\'a\''):
      effective.effective_sparsity(
          self.fn, self.masks | {'a': self.masks['b']}, self.x, params=params)


if __name__ == '__main__':
  absltest.main()
