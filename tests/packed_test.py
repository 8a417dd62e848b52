"""Tests of packed weights and of the products with them."""

import functools
import re

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax
from sparse_jax.blocks import packing

WAYS = ('loop', 'batched')
# Twelve tiles, two of them in each of three columns.
IDS = np.array([1, 2, 3, 5, 6, 10])


def problem(dtype=jnp.float32, forward=None, pad=0):
  """A weight [12 + pad, 12 + pad] in tiles of 3 x 4, an input, a cotangent."""
  side = 12 + pad
  weight, x, dy = draw((side, side), (2, 5, side), (2, 5, side), dtype=dtype)
  mask = tile_mask(IDS, weight.shape)
  packed = sparse_jax.blocks.pack(weight, block=(3, 4), mask=mask,
                                  pad=bool(pad))
  if forward is not None:
    packed = packed.replace(forward=jnp.array(forward, jnp.int32))
  return packed, x, dy


def draw(*shapes, seed=0, dtype=jnp.float32):
  """Normal arrays; jax.random.normal is slow to compile."""
  random = np.random.RandomState(seed)
  return [jnp.asarray(random.randn(*shape), dtype) for shape in shapes]


def tile_mask(ids, shape, block=(3, 4)):
  """bool[shape], True on tiles counted row by row."""
  columns = -(-shape[1] // block[1])
  mask = np.zeros(shape, bool)
  for i in ids:
    row, column = i // columns * block[0], i % columns * block[1]
    mask[row:row + block[0], column:column + block[1]] = True
  return mask


def dense_sets(packed):
  """The weight on B, the masks of A and B, by a loop over the tiles."""
  (tall, wide), shape = packed.block, packed.shape
  padded = [-(-shape[0] // tall) * tall, -(-shape[1] // wide) * wide]
  weight, inner, outer = np.zeros(padded), np.zeros(padded), np.zeros(padded)
  active = range(len(packed.rows)) if packed.forward is None else set(
      np.asarray(packed.forward).tolist())
  for k, (i, j) in enumerate(zip(packed.rows.tolist(),
                                 packed.columns.tolist())):
    place = np.s_[i * tall:(i + 1) * tall, j * wide:(j + 1) * wide]
    weight[place], outer[place] = packed.blocks[k], 1
    inner[place] = k in active
  cut = np.s_[:shape[0], :shape[1]]
  return weight[cut], inner[cut] > 0, outer[cut] > 0


def tiles_of(packed, dense):
  """[n, rows, columns] of a dense array, at the places of the blocks."""
  tall, wide = packed.block
  full = np.pad(dense, [(0, -dense.shape[0] % tall),
                        (0, -dense.shape[1] % wide)])
  return np.stack([
      full[i * tall:(i + 1) * tall, j * wide:(j + 1) * wide]
      for i, j in zip(packed.rows.tolist(), packed.columns.tolist())])


@functools.partial(jax.jit, static_argnames='implementation')
def product_and_gradients(packed, x, dy, implementation=None):
  """The product, and the gradients to x, the blocks, and the growth scores."""
  fn = lambda x, packed: sparse_jax.blocks.matmul(
      x, packed, implementation=implementation)
  y, vjp = jax.vjp(fn, x, packed)
  grad_x, grad = vjp(dy)
  return y, grad_x, grad.blocks, grad.growth


def stored(packed):
  """The blocks alone, as parameters hold them."""
  return packed.replace(rows=None, columns=None, forward=None)


def placed_like(weights, packed):
  """The blocks with the places of others."""
  return weights.replace(rows=packed.rows, columns=packed.columns,
                         forward=packed.forward)


class PackTest(parameterized.TestCase):

  def test_tiles_of_largest_magnitude_are_kept(self):
    weight, = draw((6, 8), seed=1)
    packed = sparse_jax.blocks.pack(weight, block=(3, 4), sparsity=.5)
    sums = np.abs(weight).reshape(2, 3, 2, 4).sum((1, 3)).ravel()
    best = np.sort(np.argsort(-sums)[:2])
    np.testing.assert_array_equal(packed.ids, best)
    np.testing.assert_array_equal(
        packed.blocks, tiles_of(packed, np.asarray(weight)))

  def test_maximum_ranks_by_the_largest_entry(self):
    weight = jnp.array([[.5, .5, .9, 0.]])
    keep = lambda reduce: sparse_jax.blocks.pack(
        weight, block=(1, 2), sparsity=.5, reduce=reduce).columns.tolist()
    self.assertEqual((keep('sum'), keep('max')), ([0], [1]))

  @parameterized.parameters(.1, .4, .5, .9, .99)
  def test_as_many_tiles_as_the_common_rule_says(self, sparsity):
    packed = sparse_jax.blocks.pack(jnp.ones((6, 8)), block=(2, 2),
                                    sparsity=sparsity)
    self.assertLen(packed.blocks, sparse_jax.keep_count(12, sparsity))

  def test_agrees_with_the_mask_of_a_simulated_run(self):
    weight, = draw((3, 3, 10, 7), seed=2)
    packed = sparse_jax.blocks.pack(weight, block=(4, 2), sparsity=.7, pad=True)
    mask = sparse_jax.make_mask(abs(weight), .7,
                                structure=sparse_jax.Block((4, 2)))
    np.testing.assert_array_equal(sparse_jax.blocks.unpack(packed),
                                  jnp.where(mask, weight, 0))

  def test_backward_set_is_wider_and_contains_the_forward_set(self):
    weight, = draw((8, 8), seed=3)
    packed = sparse_jax.blocks.pack(weight, block=(2, 2), sparsity=.75,
                                    backward_sparsity=.5)
    _, inner, outer = sparse_jax.blocks.to_dense(packed)
    for mask, sparsity in (inner, .75), (outer, .5):
      np.testing.assert_array_equal(mask, sparse_jax.make_mask(
          abs(weight), sparsity, structure=sparse_jax.Block((2, 2))))

  @parameterized.parameters(0, 1)
  def test_dense_with_masks_goes_there_and_back(self, pad):
    packed, _, _ = problem(forward=[0, 2, 5], pad=pad)
    dense = sparse_jax.blocks.to_dense(packed)
    for got, want in zip(dense, dense_sets(packed)):
      np.testing.assert_array_equal(got, want)
    again = sparse_jax.blocks.from_dense(*dense, block=(3, 4), pad=bool(pad))
    jax.tree.map(np.testing.assert_array_equal, again, packed)

  def test_unpack_gives_the_forward_set(self):
    packed, _, _ = problem(forward=[1, 4])
    weight, inner, _ = dense_sets(packed)
    np.testing.assert_array_equal(sparse_jax.blocks.unpack(packed),
                                  weight * inner)

  def test_numpy_weights_stay_on_the_host(self):
    weight = np.random.RandomState(0).randn(8, 8).astype(np.float32)
    args = dict(block=(2, 4), sparsity=.5, backward_sparsity=.25)
    jax.tree.map(np.testing.assert_array_equal,
                 sparse_jax.blocks.pack(weight, **args),
                 sparse_jax.blocks.pack(jnp.asarray(weight), **args))
    large = np.ones((64, 64), np.float32)
    before = {id(array) for array in jax.live_arrays()}
    packed = sparse_jax.blocks.pack(large, block=(8, 8), sparsity=.75)
    made = [array for array in jax.live_arrays() if id(array) not in before]
    self.assertLess(max(array.size for array in made), large.size)
    self.assertEqual(packed.blocks.size, large.size // 4)

  def test_bcoo_and_bcsr_are_the_same_matrix(self):
    packed, x, _ = problem(forward=[0, 3, 5])
    weight, inner, _ = dense_sets(packed)

    @jax.jit
    def converted(packed, x):
      bcoo = sparse_jax.blocks.to_bcoo(packed)
      bcsr = sparse_jax.blocks.to_bcsr(packed)
      turned = sparse_jax.blocks.to_bcsr(packed, transpose=True)
      return ((bcoo.todense(), bcsr.todense(), turned.todense().T),
              (x @ bcoo, (turned @ x.T).T))

    matrices, products = converted(packed, x[0])
    for matrix in matrices:
      np.testing.assert_array_equal(matrix, weight * inner)
    for product in products:
      np.testing.assert_allclose(product, x[0] @ (weight * inner), atol=1e-5)

  def test_pack_and_unpack_trace(self):
    weight, = draw((8, 8), seed=4)
    keep = lambda w: sparse_jax.blocks.pack(w, block=(2, 2), sparsity=.5)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(keep)(weight),
                 keep(weight))  # The one on the device, the other on the host.
    shapes = jax.eval_shape(keep, weight)
    self.assertEqual(shapes.blocks.shape, (8, 2, 2))

  @parameterized.named_parameters(
      ('neither', {}, 'sparsity'),
      ('both', dict(sparsity=.5, mask=np.ones((4, 6), bool)), 'sparsity'),
      ('range', dict(sparsity=1.), 'sparsity'),
      ('block', dict(sparsity=.5, block=(3, 2)), r'block.*\(3, 2\).*pad'),
      ('no_block', dict(sparsity=.5, block=2), 'block'),
      ('zero_block', dict(sparsity=.5, block=(0, 2)), 'block'),
      ('pad', dict(sparsity=.5, pad=1), 'pad'),
      ('mixed', dict(mask=np.eye(4, 6) > 0), 'mask.*mixed'),
      ('mask_shape', dict(mask=np.ones((4, 4), bool)), 'mask'),
      ('mask_dtype', dict(mask=np.ones((4, 6))), 'mask'),
      ('empty', dict(mask=np.zeros((4, 6), bool)), 'mask'),
      ('reduce', dict(sparsity=.5, reduce='mean'), 'reduce'),
      ('backward', dict(sparsity=.5, backward_sparsity=.9),
       'backward_sparsity'),
      ('backward_range', dict(sparsity=.5, backward_sparsity=-.1),
       'backward_sparsity'))
  def test_bad_arguments(self, given, message):
    with self.assertRaisesRegex(ValueError, message):
      sparse_jax.blocks.pack(jnp.ones((4, 6)), **{'block': (2, 2), **given})

  def test_bad_weights_and_masks(self):
    with self.assertRaisesRegex(ValueError, 'weight'):
      sparse_jax.blocks.pack(jnp.ones(4), block=(2, 2), sparsity=.5)
    full, none = np.ones((2, 2), bool), np.zeros((2, 2), bool)
    for inner, outer, message in ((full, np.eye(2) > 0, 'backward_mask'),
                                  (none, full, 'forward_mask')):
      with self.assertRaisesRegex(ValueError, message):
        sparse_jax.blocks.from_dense(np.ones((2, 2)), inner, outer,
                                     block=(2, 2))
    stack = sparse_jax.blocks.pack(jnp.ones((2, 2, 2)), block=(2, 2),
                                   sparsity=.5)
    with self.assertRaisesRegex(ValueError, 'packed'):
      sparse_jax.blocks.to_bcoo(stack)


class MatmulTest(parameterized.TestCase):

  @parameterized.parameters(
      ('loop', None, 1), ('loop', [0, 2, 3], 0), ('batched', None, 0),
      ('batched', [0, 2, 3], 1))
  def test_is_the_dense_product_and_its_gradients_on_a_and_b(
      self, way, forward, pad):
    packed, x, dy = problem(forward=forward, pad=pad)
    y, grad_x, grad, _ = product_and_gradients(packed, x, dy,
                                               implementation=way)
    weight, inner, _ = dense_sets(packed)
    read = weight * inner
    flat = lambda a: np.asarray(a).reshape(-1, a.shape[-1])
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
    close(flat(y), flat(x) @ read)
    close(flat(grad_x), flat(dy) @ read.T)
    close(grad, tiles_of(packed, flat(x).T @ flat(dy)))

  def test_blocks_outside_a_are_not_seen(self):
    packed, x, dy = problem(forward=[0, 2, 3])
    hidden = packed.replace(blocks=packed.blocks.at[jnp.array([1, 4])].set(
        jnp.nan))
    for a, b in zip(product_and_gradients(packed, x, dy)[:3],
                    product_and_gradients(hidden, x, dy)[:3]):
      np.testing.assert_array_equal(a, b)

  def test_order_of_the_blocks_does_not_matter(self):
    packed, x, dy = problem()
    order = jnp.array([4, 0, 5, 2, 1, 3])
    mixed = jax.tree.map(lambda leaf: leaf[order], packed)
    y, grad_x, grad, _ = product_and_gradients(packed, x, dy)
    got_y, got_x, got, _ = product_and_gradients(mixed, x, dy)
    # Another order of summation.
    np.testing.assert_allclose(got_y, y, atol=1e-5)
    np.testing.assert_allclose(got_x, grad_x, atol=1e-5)
    np.testing.assert_array_equal(got, grad[order])

  @parameterized.parameters(*WAYS)
  def test_half_precision_sums_in_float32(self, way):
    packed, x, dy = problem(jnp.bfloat16, forward=[0, 1, 5])
    got = product_and_gradients(packed, x, dy, implementation=way)[:3]
    self.assertTrue(all(leaf.dtype == jnp.bfloat16 for leaf in got))
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32)
                        if leaf.dtype == jnp.bfloat16 else leaf, packed)
    want = product_and_gradients(wide, *(a.astype(jnp.float32)
                                         for a in (x, dy)))
    for a, b in zip(got, want):  # One rounding, to 8 bits.
      np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=2**-8,
                                 atol=1e-5)

  @parameterized.parameters(('loop', 'sum'), ('batched', 'max'))
  def test_growth_is_the_score_of_the_dense_gradient(self, way, reduce):
    packed, x, dy = problem(forward=[0, 1], pad=1)
    asked = packed.replace(reduce=reduce).asking_growth()
    got = product_and_gradients(asked, x, dy, implementation=way)[3]
    flat = lambda a: np.asarray(a).reshape(-1, a.shape[-1])
    dense = jnp.asarray(flat(x).T @ flat(dy))
    want = sparse_jax.Block((3, 4), reduce).group(abs(dense), 0)
    np.testing.assert_allclose(got, want, rtol=1e-5)

  def test_vmap_over_stacked_layers(self):
    packed, x, dy = problem()
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]), packed)
    got = jax.jit(jax.vmap(product_and_gradients, (0, None, None)))(
        stacked, x, dy)
    for i in range(2):
      one = jax.tree.map(lambda leaf: leaf[i], stacked)
      for a, b in zip(got[:3], product_and_gradients(one, x, dy)[:3]):
        np.testing.assert_allclose(a[i], b, atol=1e-5)

  def test_gradient_of_the_whole_object(self):
    packed, x, _ = problem()
    loss = lambda packed: jnp.sum(sparse_jax.blocks.matmul(x, packed)**2)
    grad = jax.grad(loss, allow_int=True)(packed)
    self.assertEqual(grad.rows.dtype, jax.dtypes.float0)
    self.assertEqual(grad.blocks.shape, packed.blocks.shape)

  def test_second_derivatives_by_two_reverse_passes(self):
    packed, x, _ = problem()
    weights = stored(packed)
    loss = lambda w: jnp.sum(jnp.sin(sparse_jax.blocks.matmul(
        x, placed_like(w, packed))))
    plain = lambda w: jnp.sum(jnp.sin(x @ sparse_jax.blocks.unpack(
        placed_like(w, packed))))
    hvp = lambda f: jax.jit(jax.grad(lambda w: jnp.vdot(
        jax.grad(f)(w).blocks, packed.blocks)))(weights)
    np.testing.assert_allclose(hvp(loss).blocks, hvp(plain).blocks, rtol=1e-4,
                               atol=1e-4)

  def test_large_blocks_of_float32_as_a_cpu_multiplies_them(self):
    """By convolutions: derivatives twice, and stacked, as of the dense one."""
    weight, x, dy = (array / 8 for array in draw(
        (100, 192), (2, 3, 100), (2, 3, 192)))
    packed = sparse_jax.blocks.pack(weight, block=(64, 96), sparsity=.5,
                                    pad=True)

    def slopes(multiply, weights):
      y, vjp = jax.vjp(multiply, x, weights)
      return y, vjp(dy + y)[0]

    def of_packed(blocks):
      return slopes(sparse_jax.blocks.matmul, packed.replace(blocks=blocks))

    def of_dense(blocks):
      return slopes(jnp.matmul, sparse_jax.blocks.unpack(
          packed.replace(blocks=blocks)))

    def all_of(fn, blocks):
      twice = jax.grad(lambda blocks: jnp.sum(jnp.sin(fn(blocks)[1])))
      both = jnp.stack([blocks, -2 * blocks])
      return fn(blocks), twice(blocks), jax.vmap(fn)(both), jax.vmap(twice)(
          both)

    got, want = (jax.jit(functools.partial(all_of, fn))(packed.blocks)
                 for fn in (of_packed, of_dense))
    for a, b in zip(*map(jax.tree.leaves, (got, want))):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)

  def test_the_library_of_one_core_gets_small_blocks_alone(self):
    """XLA writes `ynn` where it leaves a product to that library."""
    for side, left in (64, False), (32, True):
      weight, x, dy = draw((256, 256), (128, 256), (128, 256))
      packed = sparse_jax.blocks.pack(weight, block=(side, side), sparsity=.9)
      text = product_and_gradients.lower(packed, x, dy).compile().as_text()
      self.assertEqual('ynn' in text, left and 'ynn' in jax.jit(
          jnp.matmul).lower(x, weight).compile().as_text())

  def test_no_array_of_the_dense_weights_size(self):
    """Forward, both gradients and growth scores, in the compiled program."""
    weight = jnp.ones((60, 84))
    packed = sparse_jax.blocks.pack(weight, block=(12, 12), sparsity=.8,
                                    backward_sparsity=.6)
    x = jnp.ones((3, 60))
    for way in WAYS:
      loss = lambda x, packed: jnp.sum(
          sparse_jax.blocks.matmul(x, packed, implementation=way))
      step = jax.grad(loss, (0, 1), allow_int=True)
      sizes = array_sizes(step, x, packed.asking_growth())
      self.assertIn(packed.blocks.size, sizes)
      self.assertLess(max(sizes), weight.size)

  @parameterized.named_parameters(
      ('rows', dict(rows=jnp.array([0, 9])), r'rows.*9'),
      ('columns', dict(columns=jnp.array([-1, 0])), r'columns.*-1'),
      ('forward', dict(forward=jnp.array([2])), 'forward.*2'),
      ('count', dict(rows=jnp.array([0])), 'rows'),
      ('blocks', dict(blocks=jnp.ones((2, 3, 2))), 'blocks'))
  def test_bad_indices(self, changes, message):
    packed = sparse_jax.blocks.pack(jnp.ones((4, 4)), block=(2, 2), sparsity=.5)
    with self.assertRaisesRegex(ValueError, message):
      sparse_jax.blocks.matmul(jnp.ones((1, 4)), packed.replace(**changes))

  def test_bad_products(self):
    packed = sparse_jax.blocks.pack(jnp.ones((4, 6)), block=(2, 2), sparsity=.5)
    for x, options, message in (
        (jnp.ones((1, 6)), {}, r'x.*\(1, 6\)'),
        (jnp.ones((1, 4)), dict(weights_first=1), 'weights_first'),
        (jnp.ones((1, 4)), dict(implementation='fast'), 'implementation')):
      with self.assertRaisesRegex(ValueError, message):
        sparse_jax.blocks.matmul(x, packed, **options)


class ConvTest(parameterized.TestCase):

  @parameterized.named_parameters(
      ('same', 'loop', (3, 3), {}, (7, 6)),
      ('valid', 'batched', (3, 2), dict(padding='VALID'), (7, 6)),
      ('strides', 'loop', (3, 3), dict(strides=(2, 3)), (8, 7)),
      ('dilation', 'batched', (2, 3), dict(dilation=2, strides=2), (9, 8)),
      ('pads', 'loop', (3,), dict(padding=((2, 0),)), (6,)),
      ('uneven', 'loop', (3, 2), dict(strides=2), (5, 4)),
      ('one_by_one', 'loop', (1, 1), {}, (4, 5)),
      ('one_by_one_strided', 'loop', (1, 1), dict(strides=2), (4, 5)))
  def test_is_the_convolution_and_its_gradients_on_a_and_b(
      self, way, kernel, options, size):
    options = dict(options)
    weight, x = draw((*kernel, 5, 6), (2, *size, 5), seed=5)
    packed = sparse_jax.blocks.pack(weight, block=(2, 3), sparsity=.6, pad=True,
                                    backward_sparsity=.4)
    count = len(kernel)
    every = lambda v: (v,) * count if isinstance(v, int) else v

    def dense(x, weight):
      return jax.lax.conv_general_dilated(
          x, weight, every(options.get('strides', 1)),
          options.get('padding', 'SAME'),
          rhs_dilation=every(options.get('dilation', 1)),
          dimension_numbers=('NWC', 'WIO', 'NWC') if count == 1 else (
              'NHWC', 'HWIO', 'NHWC'))

    @jax.jit
    def both(x, weight, packed, dy):
      want, dense_vjp = jax.vjp(dense, x, weight)
      got, vjp = jax.vjp(lambda x, p: sparse_jax.blocks.conv(
          x, p, implementation=way, **options), x, packed)
      return want, got, dense_vjp(dy), vjp(dy)

    shape = jax.eval_shape(dense, x, weight)
    dy, = draw(shape.shape, seed=6)
    want, got, (dense_x, dense_w), (grad_x, grad) = both(
        x, sparse_jax.blocks.unpack(packed), packed, dy)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4)
    close(got, want)
    close(grad_x, dense_x)
    close(grad.blocks, packing.tile(np.asarray(dense_w), (2, 3))[
        np.asarray(packed.ids)])

  @parameterized.named_parameters(
      ('channels', (1, 4, 4, 3), {}, 'x'), ('axes', (4, 4, 2), {}, 'x'),
      ('strides', (1, 4, 4, 2), dict(strides=0), 'strides'),
      ('dilation', (1, 4, 4, 2), dict(dilation=(1,)), 'dilation'),
      ('padding', (1, 4, 4, 2), dict(padding='FULL'), 'padding'),
      ('pairs', (1, 4, 4, 2), dict(padding=((0, 0),)), 'padding'),
      ('small', (1, 2, 2, 2), dict(padding='VALID'), 'x'),
      ('way', (1, 4, 4, 2), dict(implementation=''), 'implementation'))
  def test_bad_arguments(self, shape, options, message):
    packed = sparse_jax.blocks.pack(np.ones((3, 3, 2, 2)), block=(2, 2),
                                    sparsity=.5)
    with self.assertRaisesRegex(ValueError, f'`{message}`'):
      sparse_jax.blocks.conv(jnp.ones(shape), packed, **options)


class TreeTest(parameterized.TestCase):

  def test_any_optimizer_takes_the_blocks_without_their_places(self):
    packed, x, _ = problem(forward=[0, 1, 3])
    weights = stored(packed)
    self.assertEqual({leaf.dtype.kind for leaf in jax.tree.leaves(weights)},
                     {'f'})
    tx = optax.adamw(.01)
    state = tx.init(weights)

    @jax.jit
    def step(weights, state):
      loss = lambda w: jnp.sum(sparse_jax.blocks.matmul(
          x, placed_like(w, packed))**2)
      value, grads = jax.value_and_grad(loss)(weights)
      updates, state = tx.update(grads, state, weights)
      return optax.apply_updates(weights, updates), state, value

    losses = []
    for _ in range(3):
      weights, state, value = step(weights, state)
      losses.append(float(value))
    self.assertEqual(step._cache_size(), 1)
    self.assertLess(losses[2], losses[0])

  def test_sharded_blocks_give_the_same_product(self):
    packed, x, dy = problem()
    mesh = jax.make_mesh((2,), ('model',), devices=jax.devices()[:2],
                         axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh,
                                       jax.sharding.PartitionSpec('model'))
    sharded = jax.tree.map(lambda leaf: jax.device_put(leaf, place), packed)
    for way in WAYS:
      got, want = (product_and_gradients(p, x, dy, implementation=way)
                   for p in (sharded, packed))
      for a, b in zip(got[:3], want[:3]):
        np.testing.assert_allclose(a, b, atol=1e-5)


def array_sizes(fn, *args):
  """The number of entries of each array in a compiled program."""
  text = jax.jit(fn).lower(*args).compile().as_text()
  return text_sizes(text)


def text_sizes(text):

  shapes = re.findall(r'\b(?:f|bf|s|u|pred)\d*\[([\d,]*)\]', text)
  return {int(np.prod([int(n) for n in shape.split(',') if n]))
          for shape in shapes}


if __name__ == '__main__':
  absltest.main()
