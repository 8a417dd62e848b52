"""Tests of FLOPs, training cost and memory against published figures."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax
from experiments.image import models
from sparse_jax import trees
from sparse_jax.cost import budget
from sparse_jax.cost import flops as cost

Work = sparse_jax.rules.Work
STEM, HEAD = ('stem/kernel',), ('stem/kernel', 'head/kernel')
CONVENTIONS = ('multiply_adds', 'rigl')


@functools.cache
def network(name, side, classes):
  """A function of parameters and images, and the shapes of its arguments."""
  model = models.create(name, num_classes=classes)
  images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  init = functools.partial(model.init, train=False)
  variables = jax.eval_shape(init, jax.random.key(0), images)
  params = variables['params']
  rest = {k: v for k, v in variables.items() if k != 'params'}

  def apply(params, images, rest):
    return model.apply({'params': params, **rest}, images, train=False)

  return apply, params, images, rest


@functools.cache
def count(name, side=32, classes=10, convention='multiply_adds'):
  return cost.count_flops(*network(name, side, classes), convention=convention)


def resnet50(convention, stem=112):
  """ResNet-50's count, its first convolution's output of another side."""
  flops = count('resnet50', 224, 1000, convention)
  return flops._replace(products=tuple(
      p._replace(shape=(1, stem, stem, 64)) if p.path == 'stem/kernel' else p
      for p in flops.products))


def densities(flops, sparsity, allocation=sparse_jax.uniform, dense=()):
  """Density of each kernel."""
  shapes = {path: leaf.shape
            for path, leaf in trees.leaves_by_path(flops.params).items()
            if path.endswith('kernel') and path not in dense}
  return {p: 1 - s for p, s in allocation(shapes, sparsity).items()}


def static_work(kept):
  return {path: Work(d, d, d) for path, d in kept.items()}


def mlp(params, x):
  return jnp.tanh(x @ params['a']) @ params['b'] @ params['c']


def mlp_args(width=6):
  leaves = {name: jnp.full((width, width), .1) for name in 'abc'}
  return leaves, jnp.ones((5, width))


class ResNet50Test(parameterized.TestCase):
  """Figures published, or worked out from published settings."""

  def test_dense_totals(self):
    self.assertEqual(resnet50('multiply_adds').total, 4_089_184_256)
    self.assertAlmostEqual(resnet50('rigl').total, 8.1895e9, delta=5e4)
    self.assertAlmostEqual(resnet50('rigl', 115).total, 8.2023e9, delta=5e4)

  def test_every_product_has_its_kernel(self):
    flops = resnet50('multiply_adds')
    self.assertEqual(flops.unattributed, 0)
    self.assertEqual(set(flops.forward), set(densities(flops, .5)))
    self.assertEqual(flops.forward['stem/kernel'], 118_013_952)

  @parameterized.parameters(
      ('multiply_adds', 112, 'erk', (), (.4138, .2418, .1217, .0852)),
      ('multiply_adds', 112, 'uniform', STEM, (.2231, .1260, .0774, .0629)),
      ('rigl', 112, 'erk', (), (.4146, .2429, .1229, .0864)),
      ('rigl', 112, 'uniform', STEM, (.2241, .1272, .0787, .0641)),
      ('rigl', 115, 'erk', (), (.4153, .2431, .1230, .0865)),
      ('rigl', 115, 'uniform', STEM, (.2254, .1285, .0801, .0656)),
      ('rigl', 112, 'uniform', (), (.2011, .1012, .0513, .0363)),
      ('rigl', 112, 'erdos_renyi', (), (.4537, .2581, .1437, .1094)))
  def test_inference(self, convention, stem, name, dense, published):
    flops, allocation = resnet50(convention, stem), getattr(sparse_jax, name)
    for sparsity, want in zip((.8, .9, .95, .965), published):
      kept = densities(flops, sparsity, allocation, dense)
      got = cost.training_cost(flops, static_work(kept))
      self.assertAlmostEqual(got.forward_multiplier, want, delta=6e-5)
      if convention == 'rigl':
        self.assertAlmostEqual(got.multiplier, got.forward_multiplier)

  @parameterized.parameters(
      ('erk', (), (.4172, .2456, .1259, .0895)),
      ('uniform', STEM, (.2279, .1314, .0831, .0687)))
  def test_training_by_rigl(self, name, dense, published):
    """One dense gradient to the weights in every 101 steps."""
    flops, allocation = resnet50('rigl', 115), getattr(sparse_jax, name)
    for sparsity, want in zip((.8, .9, .95, .965), published):
      kept = densities(flops, sparsity, allocation, dense)
      got = cost.training_cost(flops, {
          path: Work(d, d, (100 * d + 1) / 101) for path, d in kept.items()})
      self.assertAlmostEqual(got.multiplier, want, delta=2e-4)

  def test_training_by_a_dense_weight_gradient(self):
    """SNFS with ERK; DNW costs the same."""
    flops = resnet50('rigl', 115)
    for sparsity, want in zip((.8, .9, .95, .965),
                              (.6102, .4954, .4153, .3910)):
      kept = densities(flops, sparsity, sparse_jax.erk)
      got = cost.training_cost(flops, {
          path: Work(d, d, 1.) for path, d in kept.items()})
      self.assertAlmostEqual(got.multiplier, want, delta=1e-4)

  @parameterized.parameters(
      (.8, 0., .484), (.8, .5, .322), (.8, .6, .290), (.8, .7, .258),
      (.8, .75, .242), (.9, .8, .1612), (.95, .9, .0967), (.98, .9, .0774),
      (.98, .95, .0612))
  def test_training_by_top_kast(self, forward, backward, published):
    """Its figure 2, with the first and the last layer dense."""
    flops = resnet50('rigl', 115)
    kept = densities(flops, forward, dense=HEAD)
    got = cost.training_cost(flops, {
        path: Work(d, d, 1 - backward) for path, d in kept.items()})
    self.assertAlmostEqual(got.multiplier, published, delta=1e-3)

  @parameterized.parameters((.8, 77.7), (.9, 87.4), (.5, 48.6), (.6, 58.3),
                            (.7, 68.0))
  def test_inference_by_swat(self, sparsity, published):
    flops = resnet50('multiply_adds')
    work = static_work(densities(flops, sparsity, dense=STEM))
    got = cost.training_cost(flops, work)
    self.assertAlmostEqual(100 * (1 - got.forward_multiplier), published,
                           delta=.05)


class CifarTest(parameterized.TestCase):

  @parameterized.parameters(
      ('vgg16', .9, 89.7), ('wrn_16_8', .9, 90.0), ('densenet121', .9, 89.9),
      ('densenet121', .6, 59.9), ('resnet18', .5, 49.9),
      ('resnet18', .7, 69.9))
  def test_training_by_swat(self, name, sparsity, published):
    """The reductions of its README: the first layer dense, without dX."""
    flops = count(name)
    work = static_work(densities(flops, sparsity, dense=STEM))
    got = cost.training_cost(flops, work)
    self.assertAlmostEqual(100 * got.reduction, published, delta=.1)
    first, total = flops.forward['stem/kernel'], flops.total
    self.assertAlmostEqual(
        got.reduction, sparsity * (1 - 2 * first / (3 * total - first)))


class TrainingCostTest(parameterized.TestCase):

  def test_dense_cost_is_that_of_the_gradient(self):
    """Forward and both gradients, as they stand in the gradient's jaxpr."""
    def attention(params, x):
      q, k, v = (x @ params[name] for name in 'abc')
      return jax.nn.softmax(q @ k.T) @ v @ params['a']

    for model in (mlp, attention):
      params, x = mlp_args()
      flops = cost.count_flops(model, params, x)
      grad = jax.value_and_grad(lambda p, x: jnp.sum(model(p, x) ** 2))
      self.assertEqual(cost.training_cost(flops, {}).dense.total,
                       cost.count_flops(grad, params, x).total)

  @parameterized.parameters(*CONVENTIONS)
  def test_dense_training_is_one_and_passes_add_up(self, convention):
    flops = cost.count_flops(mlp, *mlp_args(), convention=convention)
    dense = cost.training_cost(flops, {})
    self.assertEqual(dense.multiplier, 1)
    self.assertEqual(dense.theoretical_speedup, 1)
    self.assertEqual(dense.sparse.forward, flops.total)
    self.assertEqual(dense.sparse.total,
                     sum(layer.sparse.total for layer in dense.layers))

  def test_conventions_by_hand(self):
    """Width 6, batch 5: three layers of 180 multiply-adds, 30 outputs."""
    work = {'b': Work(.5, .25, 1.)}
    for convention, layers in (
        ('multiply_adds', {'a': (180, 0, 180), 'b': (90, 45, 180),
                           'c': (180, 180, 180), None: (0, 0, 0)}),
        ('rigl', {'a': (390, 390, 390), 'b': (210, 120, 390),
                  'c': (390, 390, 390), None: (0, 0, 0)})):
      flops = cost.count_flops(mlp, *mlp_args(), convention=convention)
      got = cost.training_cost(flops, work)
      self.assertEqual({layer.path: tuple(layer.sparse)
                        for layer in got.layers}, layers)

  def test_weights_side_by_side_share_their_product(self):
    def wide(params, x):
      both = jnp.concatenate([params['a'], params['b'][:, :3]], axis=1)
      return x @ both @ params['c'].repeat(2, axis=0)[:9]

    params, x = mlp_args()
    flops = cost.count_flops(wide, params, x)
    self.assertEqual(flops.total, 5 * 6 * 9 + 5 * 9 * 6)
    self.assertEqual(flops.forward, {'a': 135., 'b': 135., 'c': 270.})
    got = cost.training_cost(flops, {'a': Work(.5, .5, .5)})
    self.assertEqual(got.sparse.forward, 540 - .5 * 135)

  @parameterized.parameters(
      (sparse_jax.granet(.9, initial_sparsity=.5, update_every=500,
                         prune_end=1000), 1000, (.325, .325)),
      (sparse_jax.mest(.8, variant='ems', mutation=(.1, 0.), update_every=8,
                       mutation_ends=(10,)), 20, (.28, .28)),
      (sparse_jax.top_kast(.8, backward_sparsity=.4, stop_exploration_at=25),
       100, (.2, .25 * .6 + .75 * .2)),
      (sparse_jax.top_kast(.8, backward_sparsity=.4, stop_exploration_at=25),
       10, (.2, .6)))
  def test_work_is_that_of_masks_as_they_refresh(self, method, steps, want):
    work = method.work({'w': jnp.ones((20, 50))}, steps)['w']
    dense = (1 + 500 * want[1]) / 501 if method.name == 'granet' else want[1]
    np.testing.assert_allclose(work, (want[0], want[0], dense), rtol=1e-3)

  def test_a_method_states_its_work(self):
    def work(params, steps):
      return {path: Work(1 / steps, .5, 1.) for path in params}

    method = sparse_jax.static(.5)._replace(work=work)
    flops = cost.count_flops(mlp, *mlp_args())
    got = cost.training_cost(flops, method, steps=4)
    self.assertEqual(got.sparse, cost.Passes(135., 180., 540.))

  def test_theoretical_speedup(self):
    for reduction, want in ((.67, 3.03), (.76, 4.1667), (0., 1.)):
      self.assertAlmostEqual(cost.theoretical_speedup(reduction), want,
                             places=3)

  def test_prints(self):
    flops = cost.count_flops(mlp, *mlp_args())
    self.assertIn('total                     540  100.00%', str(flops))
    lines = str(cost.training_cost(flops, {'b': Work(0, 0, 0)})).splitlines()
    self.assertEqual(lines[2].split(), ['b', '0', '0', '0', '0.00%'])
    looped = cost.count_flops(lambda p: jax.lax.while_loop(
        lambda x: x.sum() < 0, lambda x: x @ p, p), jnp.ones((2, 2)))
    self.assertIn('1 of them in a `while`, counted once', str(looped))

  @parameterized.parameters(
      ('convention', lambda f: cost.count_flops(mlp, *mlp_args(),
                                                convention='flops')),
      ('params_argnum', lambda f: cost.count_flops(mlp, *mlp_args(),
                                                   params_argnum=2)),
      ('steps', lambda f: cost.training_cost(f, sparse_jax.static(
          .5)._replace(work=lambda params, steps: {}))),
      ('method', lambda f: cost.training_cost(f, sparse_jax.static(
          .5)._replace(work=None), steps=1)),
      ('method', lambda f: cost.training_cost(f, {'d': Work(1, 1, 1)})),
      ('method', lambda f: cost.training_cost(f, {'a': Work(1, 2, 1)})),
      ('method', lambda f: cost.training_cost(f, None)),
      ('flops', lambda f: cost.training_cost(cost.count_flops(
          jnp.sin, jnp.ones(3)), {})),
      ('budget', lambda f: budget.plan(.1, lambda s: 1 - s, highest=.8)),
      ('highest', lambda f: budget.plan(.1, lambda s: 1 - s, highest=1.)),
      ('cost', lambda f: budget.plan(.1, .5, highest=.5)),
      ('reduction', lambda f: cost.theoretical_speedup(1.)))
  def test_bad_arguments_are_named(self, name, call):
    flops = cost.count_flops(mlp, *mlp_args())
    with self.assertRaisesRegex(ValueError, f'`{name}'):
      call(flops)


class PlanTest(parameterized.TestCase):

  @parameterized.parameters(0., .3, .5, .7, .8)
  def test_is_the_inverse_of_the_cost(self, sparsity):
    flops = cost.count_flops(mlp, *mlp_args(), convention='rigl')

    def multiplier(backward):
      work = {path: Work(.2, .2, 1 - backward) for path in 'abc'}
      return cost.training_cost(flops, work).multiplier

    got = budget.plan(multiplier(sparsity) + 1e-9, multiplier, highest=.8)
    self.assertAlmostEqual(got, sparsity, places=6)

  def test_fits_and_is_the_densest_that_does(self):
    def bytes_of(backward):
      stored = {path: 1 - backward for path in 'abc'}
      return sparse_jax.cost.memory_cost(mlp, *mlp_args(), stored=stored,
                                         optimizer=optax.adam(1e-3)).total

    most = .6 * bytes_of(0.)
    got = budget.plan(most, bytes_of, highest=.9)
    self.assertLessEqual(bytes_of(got), most)
    self.assertGreater(bytes_of(got - .001), most)

  def test_highest_need_not_lie_on_the_grid(self):
    highest = 1 - 1 / 3
    self.assertEqual(budget.plan(1 - highest, lambda s: 1 - s, highest=highest),
                     highest)
    self.assertEqual(budget.plan(np.inf, lambda s: 1 - s, highest=highest), 0.)


if __name__ == '__main__':
  absltest.main()
