"""Spartan: the soft top-k by its conditions, and a run beside a slow one."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax
from sparse_jax.masks import soft_topk


def _sigmoid(x):
  return (1 + np.tanh(x / 2)) / 2


def _slow_soft(values, k, beta, costs):
  """Masks of arrays in float64, by a hundred halvings of the bracket."""
  z = [beta * np.asarray(v, np.float64) / c for v, c in zip(values, costs)]
  low, high = -1e3, 1e3
  for _ in range(200):
    mu = (low + high) / 2
    mass = sum(c * np.sum(_sigmoid(each + mu)) for each, c in zip(z, costs))
    low, high = (mu, high) if mass < k else (low, mu)
  return [_sigmoid(each + mu) for each in z]


def _sinkhorn(values, k, beta, costs, steps):
  """The paper's alternating updates of the dual variables, in float64."""
  v = np.concatenate([np.ravel(each) for each in values]).astype(np.float64)
  c = np.concatenate([np.full(np.size(each), cost, np.float64)
                      for each, cost in zip(values, costs)])
  z, nu = beta * (v / c), np.log(c)
  for _ in range(steps):
    high = np.max(z + nu)
    mu = np.log(k) - high - np.log(np.sum(np.exp(z + nu - high)))
    nu = np.log(c) - np.logaddexp(0, z + mu)
  return np.exp(z + mu + nu - np.log(c))


def _values(seed=0, scale=1.):
  rng = np.random.default_rng(seed)
  return [jnp.asarray(scale * np.abs(rng.normal(size=shape)), jnp.float32)
          for shape in ((4, 6), (3, 5))]


class SoftTopKTest(parameterized.TestCase):

  @parameterized.product(beta=(.5, 20., 300.), k=(.5, 7., 30.),
                         costs=((1., 1.), (1., 4.)))
  def test_masks_are_those_of_the_slow_search(self, beta, k, costs):
    soft = soft_topk.soft_top_k(_values(), k, beta=beta, costs=costs)
    slow = _slow_soft(_values(), k, beta, costs)
    for mine, theirs in zip(soft, slow):
      # z + mu is rounded in float32 where beta v is some hundreds.
      np.testing.assert_allclose(mine, theirs, rtol=1e-4 + 1e-6 * beta,
                                 atol=1e-5)
    mass = sum(c * float(jnp.sum(m)) for m, c in zip(soft, costs))
    self.assertAlmostEqual(mass / k, 1, delta=2e-6)

  @parameterized.parameters(((1., 1.), 7.), ((1., 4.), 30.))
  def test_it_is_where_the_papers_iterations_lead(self, costs, k):
    soft = soft_topk.soft_top_k(_values(), k, beta=8., costs=costs)
    flat = np.concatenate([np.ravel(m) for m in soft])
    np.testing.assert_allclose(
        flat, _sinkhorn(_values(), k, 8., costs, 3000), rtol=1e-3, atol=1e-5)

  @parameterized.parameters((1., (1., 1.), 7.), (10., (1., 4.), 30.))
  def test_gradient_is_that_of_finite_differences(self, beta, costs, k):
    rng = np.random.default_rng(1)
    weights = [rng.normal(size=v.shape) for v in _values()]

    def total(values):
      soft = soft_topk.soft_top_k(values, k, beta=beta, costs=costs)
      return sum(jnp.sum(m * w.astype(np.float32))
                 for m, w in zip(soft, weights))

    grads = jax.grad(total)(_values())
    exact = [np.asarray(v, np.float64) for v in _values()]

    def slow(values):
      return sum(np.sum(m * w) for m, w in zip(
          _slow_soft(values, k, beta, costs), weights))

    for part, grad in enumerate(grads):
      for place in np.ndindex(grad.shape):
        ends = []
        for step in (1e-4, -1e-4):
          moved = [np.array(v) for v in exact]
          moved[part][place] += step
          ends.append(slow(moved))
        self.assertAlmostEqual(float(grad[place]), (ends[0] - ends[1]) / 2e-4,
                               delta=1e-4 * beta)

  def test_gradient_does_not_see_a_shift_by_the_costs(self):
    costs = (1., 4.)
    grads = jax.grad(lambda values: sum(
        jnp.sum(jnp.sin(9 * m)) for m in soft_topk.soft_top_k(
            values, 20., beta=5., costs=costs)))(_values())
    self.assertAlmostEqual(sum(
        c * float(jnp.sum(g)) for g, c in zip(grads, costs)), 0, places=4)

  def test_each_competition_has_a_budget_of_its_own(self):
    values, k = _values()[0], jnp.array([[1.], [2.], [3.], [5.]])
    soft, = soft_topk.soft_top_k([values], k, beta=4., axes=(1,))
    for row, own, budget in zip(values, soft, k):
      alone, = soft_topk.soft_top_k([row], budget[0], beta=4.)
      np.testing.assert_allclose(own, alone, rtol=1e-5)

  def test_all_of_the_budget_is_exactly_one_and_padding_is_nothing(self):
    values = [jnp.array([.5, -jnp.inf, .1])]
    np.testing.assert_array_equal(
        soft_topk.soft_top_k(values, 2., beta=3.)[0], [1, 0, 1])
    soft = soft_topk.soft_top_k(values, 1., beta=3.)[0]
    self.assertEqual(float(soft[1]), 0)
    grad = jax.grad(lambda v: soft_topk.soft_top_k([v], 1., beta=3.)[0][0])(
        values[0])
    self.assertTrue(np.all(np.isfinite(grad)))

  def test_a_hard_limit_is_the_top_k(self):
    soft, = soft_topk.soft_top_k(_values()[:1], 5., beta=1e5)
    np.testing.assert_array_equal(soft > .5, sparse_jax.top_k_mask(
        _values()[0], 5))

  def test_axes_of_several_arrays_are_an_error(self):
    with self.assertRaisesRegex(ValueError, '`axes`'):
      soft_topk.soft_top_k(_values(), 5., beta=1., axes=(0,))


_SHAPES = {'a': (6, 8), 'b': (5, 4)}
_RATE, _PRUNE_END, _END = .05, 8, 20


def _params():
  rng = np.random.default_rng(0)
  return {name: (1 + i) * rng.normal(size=shape).astype(np.float32)
          for i, (name, shape) in enumerate(_SHAPES.items())}


def _target(step):
  rng = np.random.default_rng([1, step])
  return {name: rng.normal(size=shape).astype(np.float32)
          for name, shape in _SHAPES.items()}


def _masks(weights, step, scope):
  """A by its definition: the share that the step leaves, linearly."""
  density = 1 - .75 * min(step / _PRUNE_END, 1)
  if scope == 'layer':
    return {name: _best({name: w}, round(density * w.size))[name]
            for name, w in weights.items()}
  size = sum(w.size for w in weights.values())
  return _best(weights, round(density * size))


def _best(weights, k):
  places = sorted((-abs(w.flat[i]), name, i) for name, w in weights.items()
                  for i in range(w.size))[:k]
  return {name: np.isin(np.arange(w.size), [
      i for _, own, i in places if own == name]).reshape(w.shape)
          for name, w in weights.items()}


def _slow_factors(weights, masks, step, scope):
  beta = 1 + 19 * min(step / _END, 1)
  groups = [[name] for name in weights] if scope == 'layer' else [[*weights]]
  factors = {}
  for names in groups:
    k = sum(int(masks[name].sum()) for name in names)
    soft = [np.ones_like(weights[name]) for name in names] if k == sum(
        masks[name].size for name in names) else _slow_soft(
            [abs(weights[name]) for name in names], k, beta, (1.,) * len(names))
    factors |= dict(zip(names, soft))
  return factors, groups, beta


def _slow_gradient(weights, masks, factors, groups, beta, target):
  """Of half the squared distance of w m on A from the target, by hand."""
  grads = {}
  for names in groups:
    passed = {name: np.where(masks[name], weights[name] * factors[name], 0)
              - target[name] for name in names}  # Straight through A.
    steep = {name: factors[name] * (1 - factors[name]) for name in names}
    hit = {name: passed[name] * weights[name] for name in names}
    scale = sum(np.sum(steep[name]) for name in names)
    mean = sum(np.sum(hit[name] * steep[name]) for name in names) / (scale or 1)
    for name in names:
      of_mask = beta * steep[name] * (hit[name] - mean)
      grads[name] = (passed[name] * factors[name]
                     + of_mask * np.sign(weights[name]))
  return grads


class SpartanTest(parameterized.TestCase):

  @parameterized.parameters('global', 'layer')
  def test_trajectory_is_that_of_the_slow_loop(self, scope):
    method = sparse_jax.spartan(.75, prune_end=_PRUNE_END, update_end=_END,
                                scope=scope)
    tx = sparse_jax.sparsify(optax.sgd(_RATE), method)

    @jax.jit
    def step_(params, state, target):
      def loss(params):
        read = method.read(params, state)
        return sum(jnp.sum((read[name] - target[name])**2) / 2
                   for name in _SHAPES)

      updates, state = tx.update(jax.grad(loss)(params), state, params)
      return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, _params())
    state = tx.init(params)
    weights = {name: w.astype(np.float64) for name, w in _params().items()}
    masks = {name: np.ones(shape, bool) for name, shape in _SHAPES.items()}
    for step in range(1, 31):
      target = _target(step)
      if step <= _END:
        factors = _slow_factors(weights, masks, step - 1, scope)
        grads = _slow_gradient(weights, masks, *factors, target)
      else:
        grads = {name: np.where(masks[name], weights[name] - target[name], 0)
                 for name in _SHAPES}
      weights = {name: weights[name] - _RATE * grads[name] for name in _SHAPES}
      if step <= _END:
        masks = _masks(weights, step, scope)
      if step == _END:
        last = _slow_factors(weights, masks, step, scope)[0]
        weights = {name: np.where(masks[name], weights[name] * last[name], 0)
                   for name in _SHAPES}
      params, state = step_(params, state, jax.tree.map(jnp.asarray, target))
      for name in _SHAPES:
        np.testing.assert_array_equal(
            state.sparse.forward_masks[name], masks[name], f'{step} {name}')
        np.testing.assert_allclose(params[name], weights[name], rtol=1e-4,
                                   atol=2e-5)
    for name in _SHAPES:
      self.assertFalse(np.any(np.asarray(params[name])[~masks[name]]))
      np.testing.assert_array_equal(method.read(params, state)[name],
                                    params[name])

  def test_costs_share_the_budget_by_price(self):
    """At the end the weights kept cost a quarter of all, and one at most."""
    costs = {'a': 1., 'b': 4.}
    method = sparse_jax.spartan(.75, prune_end=1, update_end=4, costs=costs)
    params = jax.tree.map(jnp.asarray, _params())
    _, state = jax.jit(method.refresh)(params, params, method.init(params))
    masks = state.forward_masks
    worth = sorted(((abs(float(w)) / costs[name], costs[name], name, i)
                    for name, leaf in params.items()
                    for i, w in enumerate(leaf.ravel())), reverse=True)
    spent, want = 0., {name: set() for name in _SHAPES}
    for _, cost, name, i in worth:
      if spent >= .25 * (48 + 4 * 20):
        break
      spent += cost
      want[name].add(i)
    for name in _SHAPES:
      self.assertEqual(set(np.flatnonzero(masks[name]).tolist()), want[name])
    read = method.read(params, state)
    self.assertFalse(np.any(np.asarray(read['a'])[~np.asarray(masks['a'])]))

  def test_blocks_are_read_whole_at_one_factor(self):
    block = sparse_jax.Block((2, 2))
    method = sparse_jax.spartan(.5, prune_end=1, update_end=4,
                                structure=block)
    params = jax.tree.map(jnp.asarray, _params())
    _, state = method.refresh(params, params, method.init(params))
    ratio = method.read(params, state)['a'] / params['a']
    tiles = np.asarray(ratio).reshape(3, 2, 4, 2)
    np.testing.assert_allclose(tiles, np.broadcast_to(
        tiles[:, :1, :, :1], tiles.shape), rtol=1e-5)

  @parameterized.named_parameters(
      ('end_zero', dict(update_end=0), 'update_end'),
      ('prune_after_end', dict(prune_end=11), 'prune_end'),
      ('beta_one', dict(beta=3.), 'beta'),
      ('beta_zero', dict(beta=(0., 1.)), 'beta'),
      ('beta_three', dict(beta=(1., 2., 3.)), 'beta'),
      ('scope', dict(scope='all'), 'scope'),
      ('costs_of_layers', dict(scope='layer', costs={'a': 1.}), 'costs'),
      ('costs_zero', dict(costs={'a': 0.}), 'costs'),
      ('allocation', dict(allocation=sparse_jax.erk), 'allocation'),
      ('fixed', dict(structure=sparse_jax.NM(1, 4)), 'structure'))
  def test_bad_argument_is_named(self, changes, argument):
    with self.assertRaisesRegex(ValueError, f'`{argument}`'):
      sparse_jax.spartan(**dict(sparsity=.75, update_end=10) | changes)


if __name__ == '__main__':
  absltest.main()
