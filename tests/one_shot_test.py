"""Tests of pruning in one shot."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import flax.linen as nn
from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

import sparse_jax
from sparse_jax import trees
from sparse_jax.jaxprs import matrices
from sparse_jax.methods import one_shot as one_shot_lib
from sparse_jax.rules import reconstruction

one_shot = one_shot_lib.one_shot
ALL = ('sparsegpt', 'wanda', 'magnitude')


def arrays(seed, *shapes):
  random = np.random.default_rng(seed)
  return [jnp.asarray(.5 * random.standard_normal(shape), jnp.float32)
          for shape in shapes]


def correlated(seed, count, k):
  """float32[count, k]: inputs that share three quarters of what they are."""
  own, shared, mix, scale = arrays(seed, (count, k), (count, 3), (3, k), (1, k))
  return (own + 3 * shared @ mix) * jnp.exp(scale)


def slow_sparsegpt(weight, hessian, sparsity=0., group=None, mask=None,
                   block=128, damping=.01):
  """Algorithm 1 with each inverse of what remains computed anew."""
  w, h = np.array(weight, np.float64), np.array(hessian, np.float64)
  k, n = w.shape
  for i in range(k):
    if h[i, i] == 0:
      h[i, i], w[i] = 1, 0
  h += damping * np.mean(np.diag(h)) * np.eye(k)
  inverses = [np.linalg.inv(h[i:, i:]) for i in range(k)]
  costs = np.array([inverse[0, 0] for inverse in inverses])
  kept = np.zeros((k, n), bool)
  for i in range(k):
    stop = min(i + block, k)
    if mask is not None:
      kept[i] = mask[i]
    elif group is None and i % block == 0:
      score = (w[i:stop] ** 2 / costs[i:stop, None]).ravel()
      count = sparse_jax.keep_count(score.size, sparsity)
      best = np.argsort(-score, kind='stable')[:count]
      chosen = np.zeros(score.size, bool)
      chosen[best] = True
      kept[i:stop] = chosen.reshape(-1, n)
    elif group is not None and i % group[1] == 0:
      for column in range(n):
        score = w[i:i + group[1], column] ** 2 / costs[i:i + group[1]]
        best = np.argsort(-score, kind='stable')[:group[0]]
        kept[i + best, column] = True
    error = np.where(kept[i], 0, w[i])
    w[i:] -= np.outer(inverses[i][:, 0] / costs[i], error)
    w[i] = np.where(kept[i], w[i], 0)
  return w


class SparseGptTest(parameterized.TestCase):

  @parameterized.parameters(
      dict(sparsity=.5, block=8), dict(sparsity=.7, block=128),
      dict(group=(2, 4), block=8), dict(group=(1, 4), block=20),
      dict(mask=True, block=16), dict(sparsity=.5, block=7, damping=.1))
  def test_against_a_slow_reference(self, **given):
    x, (weight,) = correlated(0, 60, 20), arrays(1, (20, 6))
    x = x.at[:, 5].set(0)  # A dead input.
    hessian = x.T @ x / 60
    if 'mask' in given:
      given['mask'] = arrays(2, (20, 6))[0] > 0
    got = reconstruction.sparsegpt(weight, hessian, **given)
    want = slow_sparsegpt(weight, hessian, **given)
    np.testing.assert_array_equal(got != 0, want != 0)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)

  @parameterized.parameters(8, 128)
  def test_counts(self, block):
    weight, = arrays(1, (20, 6))
    got = reconstruction.sparsegpt(weight, jnp.eye(20), sparsity=.9,
                                   block=block)
    sizes = [min(block, 20 - i) * 6 for i in range(0, 20, block)]
    self.assertEqual(int((got != 0).sum()), sum(
        sparse_jax.keep_count(size, .9) for size in sizes))

  def test_without_correlation_it_is_magnitude(self):
    weight, = arrays(1, (20, 6))
    got = reconstruction.sparsegpt(weight, 3 * jnp.eye(20), sparsity=.5)
    mask = sparse_jax.make_mask(jnp.abs(weight), .5)
    np.testing.assert_allclose(got, jnp.where(mask, weight, 0), rtol=1e-6)

  def test_errors(self):
    with self.assertRaisesRegex(ValueError, '`block`.*=6'):
      reconstruction.sparsegpt(jnp.ones((8, 2)), jnp.eye(8), group=(2, 4),
                               block=6)

  @parameterized.parameters(*range(3))
  def test_the_published_order_of_errors(self, seed):
    x, (weight,) = correlated(seed, 200, 32), arrays(seed + 9, (32, 16))
    fn = lambda params, x: x @ params['w']
    errors = []
    for by in ALL:
      pruned = one_shot(fn, {'w': weight}, [(x,)], sparsity=.5, by=by)
      errors.append(float(jnp.sum((x @ (pruned['w'] - weight)) ** 2)))
    self.assertLess(errors[0], errors[1])
    self.assertLess(errors[1], errors[2])


def conv(x, w, *, stride=1, groups=1, padding='SAME', dilation=1):
  return lax.conv_general_dilated(
      x, w, (stride, 1), padding, rhs_dilation=(1, dilation),
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'), feature_group_count=groups)


def heads(name):
  return lambda p, x: jnp.einsum(name, x, p['w'])


PRODUCTS = {
    'dense': (lambda p, x: x @ p['w'], (5, 4), (6, 5), (1, 1, 5, 4)),
    'transposed': (lambda p, x: x @ p['w'].T, (4, 5), (2, 3, 5),
                   (1, 1, 5, 4)),
    'on the left': (lambda p, x: p['w'].T @ x, (5, 4), (5, 6), (1, 1, 5, 4)),
    'query': (heads('btd,dhe->bthe'), (5, 2, 3), (2, 3, 5), (1, 1, 5, 6)),
    'out': (heads('bthe,hed->btd'), (2, 3, 5), (2, 3, 2, 3), (1, 1, 6, 5)),
    'out, mixed': (heads('behx,dhe->bxd'), (5, 2, 3), (2, 3, 2, 4),
                   (1, 1, 6, 5)),
    'experts': (heads('etd,edf->etf'), (3, 5, 4), (3, 6, 5), (3, 1, 5, 4)),
    'reshaped': (lambda p, x: x @ p['w'].reshape(6, 4).astype(jnp.bfloat16),
                 (2, 3, 2, 2), (5, 6), (1, 1, 6, 4)),
    'conv': (lambda p, x: conv(x, p['w'], stride=2), (3, 2, 3, 4),
             (2, 5, 6, 3), (1, 6, 3, 4)),
    'dilated': (lambda p, x: conv(x, p['w'], dilation=2, padding='VALID'),
                (2, 2, 3, 4), (2, 5, 6, 3), (1, 4, 3, 4)),
    'grouped': (lambda p, x: conv(x, p['w'], groups=2), (3, 3, 2, 6),
                (2, 4, 4, 4), (2, 9, 2, 3)),
    'depthwise': (lambda p, x: conv(x, p['w'], groups=4), (3, 3, 1, 4),
                  (2, 4, 4, 4), (4, 9, 1, 1)),
}


class LayersTest(parameterized.TestCase):

  @parameterized.parameters(*PRODUCTS)
  def test_views_and_moments(self, name):
    """|x w|^2 = tr(w^T (x x^T) w), whatever the product looks like."""
    fn, shape, x_shape, view = PRODUCTS[name]
    w, x = arrays(0, shape, x_shape)
    params = {'w': w, 'other': jnp.ones((2, 2))}
    (layer,), = matrices.find_layers(fn, params, x, paths=['w', 'other'])
    self.assertEqual((layer.path, layer.view, layer.slices),
                     ('w', view, 1))
    moments = matrices.input_moments(fn, layer, crossed=True)(0, params, x)
    seen = layer.read(w, 0).reshape(view[0], -1, view[3])
    got = jnp.einsum('gkn,gkl,gln->', seen, moments.squares, seen)
    out = fn(params, x).astype(jnp.float32)
    np.testing.assert_allclose(got, jnp.sum(out ** 2), rtol=2e-2)
    outputs = out.size / view[0] / view[3]
    self.assertEqual(float(moments.count), outputs)
    squares = matrices.input_moments(fn, layer, crossed=False)(0, params, x)
    np.testing.assert_allclose(
        squares.squares, jnp.diagonal(moments.squares, axis1=1, axis2=2),
        rtol=1e-5)
    doubled = layer.write(w, 0, 2 * layer.read(w, 0))
    np.testing.assert_array_equal(doubled, 2 * w)

  def test_through_everything(self):
    """Compiled, rematerialised, branched, with a rule; in order."""
    @jax.custom_vjp
    def rule(x, w):
      return x @ w
    rule.defvjp(lambda x, w: (x @ w, (x, w)),
                lambda res, g: (g @ res[1].T, res[0].T @ g))

    def fn(p, x):
      x = jax.jit(jax.checkpoint(lambda x: jnp.tanh(x @ p['b'])))(x)
      x = lax.cond(x.sum() > -1e9, lambda x: x @ p['a'], lambda x: x, x)
      return jax.vmap(lambda x: p['c'].T @ x)(jax.nn.relu(rule(x, p['d'])))

    params = dict(zip('abcd', arrays(0, (4, 4), (3, 4), (4, 2), (4, 4))))
    x, = arrays(1, (5, 3))
    found = matrices.find_layers(fn, params, x, paths='abcd')
    self.assertEqual([layer.path for layer, in found], list('badc'))
    inner = jnp.tanh(x @ params['b'])
    inputs = [x, inner, inner @ params['a'],
              jax.nn.relu(inner @ params['a'] @ params['d'])]
    for (layer,), x_ in zip(found, inputs):
      got = matrices.input_moments(fn, layer, crossed=True)(0, params, x)
      np.testing.assert_allclose(got.squares[0], x_.T @ x_, rtol=1e-4,
                                 atol=1e-5)

  def test_a_scan_of_layers_and_a_recurrent_one(self):
    def fn(p, x):
      def layer(x, w):
        step = lambda h, _: (jnp.tanh(h @ w['h'] + x @ w['x']), None)
        return lax.scan(step, x, None, length=2)[0], None
      x, _ = lax.scan(layer, x, {'h': p['h'], 'x': p['x']})
      return lax.scan(lambda h, _: (jnp.sin(h @ p['r']), h @ p['r']), x, None,
                      length=3)

    params = dict(zip('hxr', arrays(0, (5, 4, 4), (5, 4, 4), (4, 4))))
    x, = arrays(1, (6, 4))
    first, second = matrices.find_layers(fn, params, x, paths='hxr')
    self.assertEqual([(la.path, la.slices, la.repeats) for la in first],
                     [('h', 5, 2), ('x', 5, 2)])
    self.assertEqual([(la.path, la.slices, la.repeats) for la in second],
                     [('r', 1, 3)])
    np.testing.assert_array_equal(first[1].read(params['x'], 2)[0, 0],
                                  params['x'][2])
    h = x
    for index in range(5):
      wanted = 0
      for step in range(2):
        wanted += (y := h if step else h).T @ y
        if not step:
          outer = h
        h = jnp.tanh(h @ params['h'][index] + outer @ params['x'][index])
      got = matrices.input_moments(fn, first[0], crossed=True)(
          index, params, x)
      np.testing.assert_allclose(got.squares[0], wanted, rtol=1e-4, atol=1e-5)
    got = matrices.input_moments(fn, second[0], crossed=True)(0, params, x)
    wanted = 0
    for _ in range(3):
      wanted, h = wanted + 2 * h.T @ h, jnp.sin(h @ params['r'])
    np.testing.assert_allclose(got.squares[0], wanted, rtol=1e-4, atol=1e-5)

  def test_refused(self):
    w, x = arrays(0, (4, 4), (2, 4))
    for fn in (lambda p, x: x @ (p['w'] / jnp.sum(p['w'], 0)[None]),
               lambda p, x: x @ p['w'] + x[:1] @ p['w'].reshape(2, 8)[:, :4]
               .repeat(2, 0),
               lambda p, x: jnp.round(x @ p['w'])):
      with self.assertRaisesRegex(ValueError, '\'w\'.*`is_sparse`'):
        matrices.find_layers(fn, {'w': w}, x, paths=['w'])


class Block(nn.Module):
  """One layer of a transformer."""

  dtype: object = None

  @nn.compact
  def __call__(self, x, _=None):
    x = x + nn.MultiHeadDotProductAttention(2, dtype=self.dtype)(
        nn.LayerNorm(dtype=self.dtype)(x))
    y = nn.gelu(nn.Dense(12, dtype=self.dtype)(x))
    return x + nn.Dense(8, dtype=self.dtype)(y), None


class Stack(nn.Module):
  """Layers by a scan or one by one."""

  scanned: bool

  @nn.compact
  def __call__(self, x):
    if self.scanned:
      return nn.scan(nn.remat(Block), variable_axes={'params': 0}, length=2,
                     split_rngs={'params': True})(name='block')(x, None)[0]
    for i in range(2):
      x, _ = Block(name=f'block_{i}')(x)
    return x


def as_stacked(params):
  return {'block': jax.tree.map(lambda *leaves: jnp.stack(leaves), *(
      params[f'block_{i}'] for i in range(2)))}


class OneShotTest(parameterized.TestCase):

  def _mlp(self):
    params = dict(zip('ab', arrays(0, (16, 24), (24, 6)))) | {
        'bias': jnp.ones((24,))}

    def fn(params, x):
      return jax.nn.relu(x @ params['a'] + params['bias'][None]) @ params['b']

    return fn, params, [(correlated(i, 32, 16),) for i in range(3)]

  @parameterized.parameters(*ALL)
  def test_each_layer_sees_the_pruned_ones_before_it(self, by):
    fn, params, batches = self._mlp()
    prune = functools.partial(one_shot, sparsity=.5, by=by)
    pruned = prune(fn, params, batches)
    first = prune(lambda p, x: x @ p['a'], {'a': params['a']}, batches)
    np.testing.assert_allclose(pruned['a'], first['a'], rtol=1e-5, atol=1e-6)
    hidden = [(jax.nn.relu(x @ first['a'] + 1),) for x, in batches]
    second = prune(lambda p, x: x @ p['b'], {'b': params['b']}, hidden)
    np.testing.assert_allclose(pruned['b'], second['b'], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(pruned['bias'], params['bias'])

  def test_sparsegpt_is_its_rule_on_all_examples(self):
    fn, params, batches = self._mlp()
    x = jnp.concatenate([x for x, in batches])
    want = reconstruction.sparsegpt(params['a'], 2 * x.T @ x / len(x),
                                    sparsity=.5)
    got = one_shot(fn, params, iter(batches), sparsity=.5)['a']
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)

  def test_wanda_compares_per_output(self):
    fn, params, batches = self._mlp()
    got = one_shot(fn, params, batches, sparsity=.7, by='wanda')['a']
    norm = jnp.sqrt(sum(jnp.sum(x ** 2, 0) for x, in batches))
    scores = np.asarray(jnp.abs(params['a']) * norm[:, None])
    for column in range(24):
      best = np.argsort(-scores[:, column])[:sparse_jax.keep_count(16, .7)]
      want = np.zeros(16)
      want[best] = params['a'][best, column]
      np.testing.assert_allclose(got[:, column], want)

  def test_magnitude_per_layer(self):
    fn, params, batches = self._mlp()
    got = one_shot(fn, params, batches, sparsity=.7, by='magnitude')
    for name in 'ab':
      mask = sparse_jax.make_mask(jnp.abs(params[name]), .7)
      np.testing.assert_array_equal(got[name],
                                    jnp.where(mask, params[name], 0))

  @parameterized.parameters(*ALL)
  def test_n_of_m_along_the_inputs(self, by):
    """Also where the inputs of a tap are no multiple of m."""
    w, v, x = arrays(0, (3, 3, 6, 5), (4, 8), (2, 5, 5, 6))
    v = jnp.concatenate([v, 2 * v], 1)

    def fn(p, x):
      return jnp.einsum('nhwc,oc->nhwo', jnp.tile(jax.nn.relu(
          conv(x, p['conv'])), 4)[..., :16], p['out'])

    pruned = one_shot(fn, {'conv': w, 'out': v}, [(x,)], sparsity=.5, by=by,
                      structure=sparse_jax.NM(2, 4))
    counts = (pruned['out'].reshape(4, 4, 4) != 0).sum(-1)
    np.testing.assert_array_equal(counts, np.full((4, 4), 2))
    kept = pruned['conv'] != 0
    np.testing.assert_array_equal(kept[:, :, :4].sum(2), np.full((3, 3, 5), 2))
    self.assertTrue(kept[:, :, 4:].all())

  @parameterized.product(by=ALL, structure=(
      sparse_jax.Block((4, 3)), sparse_jax.Filter(), sparse_jax.NM(1, 2, -1),
      sparse_jax.Channel(), sparse_jax.FanIn()))
  def test_structures(self, by, structure):
    fn, params, batches = self._mlp()
    pruned = one_shot(fn, params, batches, sparsity=.5, by=by,
                      structure=structure)
    for name in 'ab':
      mask = pruned[name] != 0
      want = sparse_jax.make_mask(mask.astype(float), .5, structure=structure)
      np.testing.assert_array_equal(mask, want)

  @parameterized.parameters('sparsegpt', 'magnitude')
  def test_scanned_layers_are_the_same_layers(self, by):
    x, = arrays(0, (3, 4, 8))
    model, scan = Stack(False), Stack(True)
    params = model.init(jax.random.key(0), x)['params']
    prune = functools.partial(one_shot, batches=[(x,)], sparsity=.5, by=by)
    got = prune(lambda p, x: scan.apply({'params': p}, x), as_stacked(params),
                batch_axes=(0,))
    want = as_stacked(prune(lambda p, x: model.apply({'params': p}, x), params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(
        a, b, rtol=2e-3, atol=2e-4), got, want)
    for path, leaf in trees.leaves_by_path(got).items():
      if path.endswith('kernel'):
        np.testing.assert_array_equal(
            (leaf != 0).reshape(2, -1).sum(1), np.full(2, leaf[0].size // 2))

  def test_mixed_precision(self):
    x, = arrays(0, (3, 4, 8))
    model = Block(dtype=jnp.bfloat16)
    params = model.init(jax.random.key(0), x)['params']
    fn = lambda p, x: model.apply({'params': p}, x)[0]
    pruned = one_shot(fn, params, [(x,)], sparsity=.75)
    for path, leaf in trees.leaves_by_path(pruned).items():
      if path.endswith('kernel'):
        self.assertEqual(int((leaf != 0).sum()), leaf.size // 4)

  def test_an_nnx_model(self):
    model = nnx.Sequential(nnx.Linear(6, 8, rngs=nnx.Rngs(0)), nnx.relu,
                           nnx.Linear(8, 4, rngs=nnx.Rngs(1)))
    graph, params = nnx.split(model)
    x = correlated(0, 20, 6)
    pruned = one_shot(lambda p, x: nnx.merge(graph, p)(x), params, [(x,)],
                      sparsity=.5)
    self.assertEqual(jax.tree.structure(pruned), jax.tree.structure(params))
    kernel = nnx.merge(graph, pruned).layers[0].kernel
    self.assertEqual(int((kernel[...] != 0).sum()), 24)

  def test_chosen_leaves_and_the_report(self):
    fn, params, batches = self._mlp()
    seen = []
    pruned = one_shot(fn, params, batches, sparsity=.5,
                      is_sparse=[('a', False)],
                      report=lambda *args: seen.append(args))
    self.assertEqual(seen, [('b', 0, 1)])
    np.testing.assert_array_equal(pruned['a'], params['a'])

  def test_a_dead_layer_of_experts_keeps_its_largest(self):
    w, x = arrays(0, (2, 6, 4), (2, 9, 6))
    x = x.at[1].set(0)
    fn = lambda p, x: jnp.einsum('etd,edf->etf', x, p['w'])
    pruned = one_shot(fn, {'w': w}, [(x,)], sparsity=.5)['w'][1]
    np.testing.assert_allclose(pruned, jnp.where(
        sparse_jax.make_mask(jnp.abs(w[1]), .5), w[1], 0), rtol=1e-6)

  @parameterized.parameters(
      (dict(sparsity=1.), '`sparsity`'), (dict(by='obs'), '`by`.*obs'),
      (dict(structure=sparse_jax.NM(1, 4)), '`sparsity`'),
      (dict(batches=[]), '`batches`'), (dict(batches=[jnp.ones(3)]),
                                        '`batches`.*tuples'),
      (dict(batches=[(jnp.zeros((4, 16)),)]), '`batches`.*\'a\''),
      (dict(is_sparse=lambda path, leaf: True), '`is_sparse`.*bias'))
  def test_errors(self, change, message):
    fn, params, batches = self._mlp()
    given = dict(batches=batches, sparsity=.5) | change
    with self.assertRaisesRegex(ValueError, message):
      one_shot(fn, params, **given)


if __name__ == '__main__':
  absltest.main()
