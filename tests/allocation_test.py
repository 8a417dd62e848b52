"""Tests of how one sparsity is shared among layers."""

import functools
import math

from absl.testing import absltest
from absl.testing import parameterized
import jax.numpy as jnp

import sparse_jax
from sparse_jax.masks import allocations as allocation
from sparse_jax.masks import topk

TOY = {'A': (1, 1, 4, 4), 'B': (3, 3, 4, 8), 'C': (8, 10)}
SMALL = {'a': (2, 4), 'b': (3, 6), 'c': (2, 4, 6)}
UNIFORM_PLUS = {'1': (10, 10), '2': (10, 100), '3': (100, 10), '4': (10, 10)}
ALLOCATIONS = (allocation.uniform, allocation.erdos_renyi, allocation.erk)


def resnet50():
  """The 54 weights of ResNet-50 v1.5, as `{name: shape}`."""
  shapes = {'conv1': (7, 7, 3, 64)}
  inputs = 64
  for stage, blocks in enumerate((3, 4, 6, 3)):
    width = 64 * 2**stage
    for block in range(blocks):
      name = f'stage{stage}/block{block}'
      shapes[f'{name}/conv1'] = (1, 1, inputs, width)
      shapes[f'{name}/conv2'] = (3, 3, width, width)
      shapes[f'{name}/conv3'] = (1, 1, width, 4 * width)
      if block == 0:
        shapes[f'{name}/projection'] = (1, 1, inputs, 4 * width)
      inputs = 4 * width
  return shapes | {'fc': (2048, 1000)}


# spec/methods.md 1.2: kernel size, ends (either order), count, and sparsity at
# .8, .9, .95, .965, .99.
RESNET50_ERK = (
    (7, {3, 64}, 1, .1428, .5800, .7902, .8531, .9580),
    (1, {64}, 1, 0, 0, .2265, .4585, .8453),
    (3, {64}, 3, .6381, .8227, .9114, .9380, .9823),
    (1, {64, 256}, 6, 0, .0412, .5210, .6647, .9042),
    (1, {256, 128}, 1, 0, .4253, .7129, .7990, .9426),
    (3, {128}, 4, .8231, .9133, .9567, .9697, .9913),
    (1, {128, 512}, 7, .0247, .5221, .7612, .8329, .9522),
    (1, {256, 512}, 2, .4151, .7134, .8568, .8998, .9714),
    (3, {256}, 6, .9126, .9572, .9786, .9850, .9957),
    (1, {256, 1024}, 11, .5131, .7614, .8808, .9166, .9762),
    (1, {512, 1024}, 2, .7079, .8569, .9285, .9500, .9857),
    (3, {512}, 3, .9565, .9787, .9894, .9926, .9979),
    (1, {512, 2048}, 5, .7567, .8808, .9405, .9583, .9881),
    (1, {1024, 2048}, 1, .8541, .9285, .9643, .9750, .9929),
    (1, {2048, 1000}, 1, .8518, .9274, .9637, .9746, .9927),
)


def kept(shapes, sparsities):
  return sum(topk.keep_count(math.prod(shape), sparsities[path])
             for path, shape in shapes.items())


class ErkTest(parameterized.TestCase):

  def test_toy_network_makes_two_layers_dense_in_turn(self):
    got = allocation.erk(TOY, .5)
    self.assertEqual((got['A'], got['C']), (0., 0.))
    self.assertAlmostEqual(got['B'], 2 / 3)
    self.assertEqual(kept(TOY, got), 192)

  @parameterized.parameters((.5, (0., .3095, .6548), 5e-5),
                            (.8, (.556, .70, .85), 5e-3))
  def test_small_network(self, sparsity, want, printed):
    got = allocation.erk(SMALL, sparsity)
    for path, value in zip('abc', want):
      self.assertAlmostEqual(got[path], value, delta=printed)

  def test_resnet50_has_the_size_of_the_specified_one(self):
    shapes = resnet50()
    self.assertLen(shapes, 54)
    self.assertEqual(sum(map(math.prod, shapes.values())), 25_502_912)
    self.assertEqual(sum(map(sum, shapes.values())), 52_321)

  @parameterized.parameters(*enumerate((.8, .9, .95, .965, .99)))
  def test_resnet50_has_the_published_sparsity_of_every_layer(self, at, total):
    shapes = resnet50()
    got = allocation.erk(shapes, total)
    seen = 0
    for size, ends, count, *sparsities in RESNET50_ERK:
      paths = [p for p, s in shapes.items() if set(s[-2:]) == ends
               and (s[0] if len(s) == 4 else 1) == size]
      self.assertLen(paths, count)
      seen += count
      for path in paths:  # The table has four digits.
        self.assertAlmostEqual(got[path], sparsities[at], delta=6e-5)
    self.assertEqual(seen, 54)

  @parameterized.parameters((.8, 99.5617), (.9, 48.7866), (.95, 24.3721),
                            (.965, 17.0607), (.99, 4.8748))
  def test_resnet50_has_the_published_scale(self, sparsity, scale):
    got = allocation.erk(resnet50(), sparsity)['fc']
    raw = (2048 + 1000) / (2048 * 1000)
    # The spec keeps N - floor(S N) of a layer, keep_count rounds: up to one
    # entry in each of 54 layers, 1e-5 of those kept at .95 and 1e-4 at .99.
    self.assertAlmostEqual((1 - got) / raw, scale, delta=2e-4 * scale)

  @parameterized.parameters(.8, .9)
  def test_resnet50_makes_the_published_layers_dense(self, sparsity):
    got = allocation.erk(resnet50(), sparsity)
    self.assertEqual(sum(s == 0 for s in got.values()),
                     {.8: 8, .9: 1}[sparsity])


class PowerScaleTest(parameterized.TestCase):

  @parameterized.parameters(.5, .8)
  def test_zero_is_uniform(self, sparsity):
    got = allocation.erk(SMALL, sparsity, power_scale=0)
    for path, shape in SMALL.items():
      budget = sum(topk.keep_count(math.prod(own), sparsity)
                   for own in SMALL.values())
      self.assertAlmostEqual(got[path], 1 - budget / sum(
          map(math.prod, SMALL.values())))

  def test_one_is_the_papers_rule(self):
    self.assertEqual(allocation.erk(SMALL, .8, power_scale=1.),
                     allocation.erk(SMALL, .8))

  def test_densities_are_in_proportion_to_the_power(self):
    got = allocation.erk(SMALL, .9, power_scale=.5)
    raw = {path: math.sqrt(sum(shape) / math.prod(shape))
           for path, shape in SMALL.items()}
    for path in 'bc':
      self.assertAlmostEqual((1 - got[path]) / (1 - got['a']),
                             raw[path] / raw['a'])

  def test_a_negative_power_is_named(self):
    with self.assertRaisesRegex(ValueError, r'`power_scale` \(=-1\)'):
      allocation.erk(SMALL, .5, power_scale=-1)


class ErdosRenyiTest(parameterized.TestCase):

  def test_small_network(self):
    got = allocation.erdos_renyi(SMALL, .5)
    for path, value in zip('abc', (.21, .47, .56)):
      self.assertAlmostEqual(got[path], value, delta=6e-3)  # As printed.

  def test_kernel_sizes_are_ignored(self):
    shapes = {'one': (1, 1, 20, 30), 'three': (3, 3, 20, 30)}
    got = allocation.erdos_renyi(shapes, .9)
    self.assertEqual(got['one'], got['three'])


class UniformPlusTest(parameterized.TestCase):

  def test_the_specified_example(self):
    got = allocation.uniform_plus(UNIFORM_PLUS, .9)
    for path, value in zip('1234', (0., .95, .95, .8)):
      self.assertAlmostEqual(got[path], value)
    self.assertEqual(kept(UNIFORM_PLUS, got), 220)

  def test_a_last_layer_below_four_fifths_is_no_exception(self):
    got = allocation.uniform_plus(UNIFORM_PLUS, .5)
    self.assertEqual(got['1'], 0.)
    for path in '234':
      self.assertAlmostEqual(got[path], 1100 / 2100)

  def test_a_tree_in_alphabetical_order_is_no_network(self):
    """The head sorts before the stem."""
    params = {name: jnp.ones((10, 10))
              for name in ('block', 'head', 'stem', 'tail_block')}
    method = sparse_jax.static(.62, allocation=sparse_jax.uniform_plus)
    with self.assertRaisesRegex(ValueError, '`first` and `last`.*block.*tail'):
      method.init(params)
    named = sparse_jax.static(.62, allocation=functools.partial(
        sparse_jax.uniform_plus, first='stem', last='head'))
    masks = named.init(params).forward_masks
    self.assertEqual({name: int(mask.sum()) for name, mask in masks.items()},
                     {'block': 16, 'head': 20, 'stem': 100, 'tail_block': 16})

  def test_numbered_layers_are_counted(self):
    """Dense_10 sorts before Dense_2."""
    params = {f'Dense_{i}': {'kernel': jnp.ones((10, 10))} for i in range(12)}
    method = sparse_jax.static(.8, allocation=sparse_jax.uniform_plus)
    masks = method.init(params).forward_masks
    kept = {name: int(mask['kernel'].sum()) for name, mask in masks.items()}
    self.assertEqual((kept['Dense_0'], kept['Dense_11'], kept['Dense_10']),
                     (100, 20, 12))

  def test_the_order_is_read_off_a_function(self):
    params = {'a_head': jnp.ones((8, 2)), 'z_stem': jnp.ones((4, 8)),
              'middle': jnp.ones((8, 8))}

    def model(params, x):
      return x @ params['z_stem'] @ params['middle'] @ params['a_head']

    order = sparse_jax.jaxprs.layer_order(model, params, jnp.ones((1, 4)))
    self.assertEqual(order, ('z_stem', 'middle', 'a_head'))
    got = allocation.uniform_plus(
        {path: leaf.shape for path, leaf in params.items()}, .6,
        first=order[0], last=order[-1])
    self.assertEqual(got['z_stem'], 0.)
    self.assertGreater(got['middle'], got['a_head'] - 1e-9)

  def test_stacked_layers_cannot_differ(self):
    params = {'stack': jnp.ones((3, 8, 8))}
    method = sparse_jax.static(.5, allocation=sparse_jax.uniform_plus,
                               batch_axes=(0,))
    with self.assertRaisesRegex(ValueError, "stacked in 'stack'"):
      method.init(params)

  @parameterized.parameters(('1|2',), ('x',))
  def test_a_name_of_several_layers_or_none_is_named(self, name):
    with self.assertRaisesRegex(ValueError, '`first`'):
      allocation.uniform_plus(UNIFORM_PLUS, .9, first=name)

  def test_impossible_requests_are_named(self):
    with self.assertRaisesRegex(ValueError, '`shapes`'):
      allocation.uniform_plus({'a': (2, 2), 'b': (2, 2)}, .5)
    with self.assertRaisesRegex(ValueError, r'`sparsity` \(=0.99\)'):
      allocation.uniform_plus(UNIFORM_PLUS, .99)


class EveryAllocationTest(parameterized.TestCase):

  @parameterized.product(
      rule=ALLOCATIONS + (allocation.uniform_plus,),
      sparsity=(0., .1, .3, .5, .8, .9),
      shapes=(TOY, SMALL, UNIFORM_PLUS, resnet50()))
  def test_the_total_is_that_of_uniform(self, rule, sparsity, shapes):
    if rule is allocation.uniform_plus and sparsity * sum(
        map(math.prod, shapes.values())) > .8 * sum(
            map(math.prod, list(shapes.values())[1:])):
      shapes = UNIFORM_PLUS  # The others have too little besides the ends.
    got = rule(shapes, sparsity)
    self.assertEqual(list(got), list(shapes), 'the keys come back in order')
    for value in got.values():
      self.assertBetween(value, 0., 1.)
      self.assertLess(value, 1.)
    uniform = kept(shapes, allocation.uniform(shapes, sparsity))
    # Each layer rounds its count, and so did each layer of uniform.
    self.assertLessEqual(abs(kept(shapes, got) - uniform), len(shapes))

  @parameterized.product(rule=ALLOCATIONS, n=(1, 2, 3, 7))
  def test_equal_layers_get_equal_shares(self, rule, n):
    shapes = {str(i): (6, 7) for i in range(n)}
    for sparsity in (0., .1, .37, .5, .9):
      got = set(rule(shapes, sparsity).values())
      self.assertLen(got, 1)
      # The budget counts whole entries.
      self.assertAlmostEqual(got.pop(), sparsity, delta=.51 / 42)

  @parameterized.product(
      rule=ALLOCATIONS + (allocation.uniform_plus,),
      sparsity=(1., -.1, float('nan'), 'x', None))
  def test_impossible_sparsity_is_named(self, rule, sparsity):
    with self.assertRaisesRegex(ValueError, r'`sparsity` \(='):
      rule(UNIFORM_PLUS, sparsity)


class AllocateTest(parameterized.TestCase):

  def test_a_path_that_a_mapping_lacks_stays_dense(self):
    got = allocation.allocate({'a': .5}, SMALL, .9)
    self.assertEqual(got, {'a': .5, 'b': 0., 'c': 0.})

  def test_a_name_of_no_layer_is_named(self):
    with self.assertRaisesRegex(ValueError, '`allocation`.*typo'):
      allocation.allocate({'typo': .5}, SMALL, .9)

  def test_a_layer_that_a_function_forgets_is_named(self):
    with self.assertRaisesRegex(ValueError, "`allocation`.*'c'"):
      allocation.allocate(lambda shapes, s: {'a': s, 'b': s}, SMALL, .9)

  @parameterized.parameters(1., -.1, float('nan'), 'x', None)
  def test_an_impossible_share_is_named(self, value):
    with self.assertRaisesRegex(ValueError, r"`allocation\['b'\]` \(="):
      allocation.allocate({'b': value}, SMALL, .9)

  def test_a_function_is_called_with_shapes_and_sparsity(self):
    got = allocation.allocate(
        lambda shapes, s: {p: s / len(shape) for p, shape in shapes.items()},
        SMALL, .6)
    self.assertEqual(got, {'a': .3, 'b': .3, 'c': .6 / 3})


if __name__ == '__main__':
  absltest.main()
