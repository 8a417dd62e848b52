"""Tests of the kernels for products with packed blocks."""

import contextlib
import functools
import importlib.util
import io
import os
import re
from unittest import mock
import warnings

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax.experimental import topologies
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np

import sparse_jax
from sparse_jax.blocks import gpu
from sparse_jax.blocks import hopper
from sparse_jax.blocks import packing
from sparse_jax.blocks import tpu
from sparse_jax.blocks import tpu_sizes
from sparse_jax.blocks.tiles import Heads

P = jax.sharding.PartitionSpec
CHIPS = {'v4:2x2x1': (512, jnp.bfloat16), 'v5e:2x2': (256, jnp.float32),
         'v5p:2x2x1': (512, jnp.float32), 'v6e:2x2': (256, jnp.bfloat16)}
CALLS = {'cuda': '__gpu$xla.gpu.triton', 'tpu': 'tpu_custom_call',
         'hopper': 'custom_call @mosaic_gpu'}


def problem(block, grid=(3, 4), dtype=jnp.float32, batch=40):
  """x, a cotangent, blocks in random order, and their dense matrix.

  The last row and the second column of tiles are empty.
  """
  random = np.random.RandomState(0)
  (tall, wide), (rows, columns) = block, grid
  ids = [i for i in range((rows - 1) * columns) if i % columns != 1]
  ids = random.permutation(ids)[:-1]
  at = ids // columns, ids % columns
  draw = lambda *shape: jnp.asarray(random.randn(*shape), dtype)
  x, dy = draw(batch, rows * tall), draw(batch, columns * wide)
  blocks = draw(len(ids), tall, wide)
  tiles = np.zeros((rows, columns, tall, wide))
  tiles[at] = blocks
  dense = tiles.swapaxes(1, 2).reshape(rows * tall, columns * wide)
  return x, dy, blocks, *(jnp.asarray(i, jnp.int32) for i in at), dense


def check_kernels(kernels, block, *, reduce='sum', interpret=True, heads=None,
                  **options):
  """Every kernel of a module against the products of dense matrices."""
  told = lambda heads: {'heads': heads} if heads else {}
  x, dy, blocks, rows, columns, dense = problem(block, **options)
  wide = lambda a: np.asarray(a, np.float64)
  grad = wide(x).T @ wide(dy)
  tiles = packing.tile(grad, block)
  at = np.asarray(rows) * (dy.shape[1] // block[1]) + np.asarray(columns)
  worth = packing.tile_scores(tiles.astype(np.float32), reduce)
  multiply = functools.partial(kernels.block_product, interpret=interpret)
  y = multiply(x, blocks, rows, columns, width=dy.shape[1], **told(heads))
  grad_x = multiply(dy, blocks, columns, rows, width=x.shape[1],
                    transpose=True, **told(heads and heads.turned()))
  own = kernels.block_gradient(x, dy, rows, columns, block=block,
                               interpret=interpret, **told(heads))
  scores = kernels.growth_scores(x, dy, block=block, reduce=reduce,
                                 dtype=x.dtype, interpret=interpret,
                                 **told(heads))
  # One rounding of the result: sums are kept in float32.
  precision = 2**-8 if x.dtype == jnp.bfloat16 else 2**-20
  for got, want in ((y, wide(x) @ dense), (grad_x, wide(dy) @ dense.T),
                    (own, tiles[at]), (scores.ravel(), worth)):
    np.testing.assert_allclose(wide(got), want, rtol=precision,
                               atol=2**-16 * np.abs(want).max())
  assert {y.dtype, grad_x.dtype, own.dtype} == {x.dtype}


def product_and_gradients(packed, x, dy, **options):
  fn = lambda x, packed: sparse_jax.blocks.matmul(x, packed, **options)
  y, vjp = jax.vjp(fn, x, packed)
  grad_x, grad = vjp(dy)
  return y, grad_x, grad.blocks, grad.growth


def packed_problem(side=32, dtype=jnp.float32, **options):
  """A packed weight whose growth is asked for, an input, a cotangent."""
  x, dy, blocks, rows, columns, dense = problem((side, side), dtype=dtype,
                                                **options)
  packed = packing.PackedBlocks(
      blocks, rows, columns, shape=dense.shape, block=(side, side))
  return packed.asking_growth(), x, dy


def abstract(tree, **options):
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, **options), tree)


def lowered(platform, fn, *args):
  """The program for a platform that need not be there."""
  context = contextlib.nullcontext()
  if platform == 'cuda':  # Newer JAX asks which GPU it is for.
    card = jax.sharding.AbstractDevice('NVIDIA H100 80GB HBM3', 132, 'gpu')
    context = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(
        (1,), ('one',), (jax.sharding.AxisType.Auto,), abstract_device=card))
  with context, warnings.catch_warnings():
    # Newer JAX says that Triton will leave Pallas.
    warnings.filterwarnings('ignore', 'The Pallas Triton backend')
    return jax.jit(fn).trace(*args).lower(
        lowering_platforms=(platform,)).as_text()


class DenseTest(parameterized.TestCase):
  """Interpreted kernels compute what dense products do."""

  @parameterized.named_parameters(
      ('gpu', gpu, (32, 32), dict(batch=70)),
      ('gpu_uneven', gpu, (128, 32), dict(reduce='max', grid=(2, 3))),
      ('gpu_bfloat16', gpu, (64, 64), dict(dtype=jnp.bfloat16)),
      ('tpu', tpu, (128, 128), {}),
      ('tpu_uneven', tpu, (128, 256), dict(reduce='max', grid=(2, 3))),
      ('tpu_bfloat16', tpu, (128, 128), dict(dtype=jnp.bfloat16)),
      ('tpu_heads', tpu, (128, 256), dict(heads=Heads(16, 128, 128), batch=48,
                                          grid=(2, 3))))
  def test_kernels(self, kernels, block, options):
    check_kernels(kernels, block, **options)

  @parameterized.parameters(
      (jnp.float32, 72, None), (jnp.bfloat16, 128, Heads(64, 128, 128)),
      (jnp.float32, 80, Heads(16, 128, None)))
  def test_simulated_tpu_of_two_cores_finds_no_race(self, dtype, batch, heads):
    """Several panels, groups of columns and chunks; uneven in float32.

    A sequence takes two panels, or a panel two sequences.
    """
    small = tpu_sizes.Chip(2760 * 2**10, 2)
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    said = io.StringIO()
    with mock.patch.object(tpu_sizes, '_ROWS', (32,)), \
        mock.patch.object(tpu_sizes, 'chip', lambda: small), \
        contextlib.redirect_stdout(said):
      x, dy, blocks, *_ = problem((128, 128), dtype=dtype, batch=batch)
      if dtype == jnp.float32:
        self.assertEqual(tpu_sizes.panel(x, (128, 128), 128, 512), (32, 2))
      rows, chunk = tpu_sizes.chunk(x, dy, (128, 128), len(blocks))
      self.assertEqual(rows, 32)
      self.assertLess(chunk, len(blocks))
      check_kernels(tpu, (128, 128), dtype=dtype, batch=batch, heads=heads,
                    interpret=params)
    self.assertNotIn('RACE', said.getvalue())

  @absltest.skipUnless(hasattr(plgpu, 'InterpretGPUParams'),
                       'this JAX simulates no Hopper GPU')
  @parameterized.parameters('sum', 'max')
  def test_simulated_hopper_finds_no_race(self, reduce):
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
      check_kernels(hopper, (64, 64), dtype=jnp.bfloat16, grid=(3, 3),
                    batch=70, reduce=reduce,
                    interpret=plgpu.InterpretGPUParams(detect_races=True))
    self.assertNotIn('RACE', said.getvalue())


class ChoiceTest(parameterized.TestCase):

  @parameterized.parameters(('gpu', 32), ('tpu', 128))
  def test_named_kernels_run_interpreted_on_a_cpu(self, name, side):
    """Under jit, vmap over inputs and over stacked layers, and scan."""
    packed, x, dy = packed_problem(side, grid=(3, 4), batch=6)
    ways = [jax.jit(functools.partial(product_and_gradients,
                                      implementation=way,
                                      weights_first=way == name))
            for way in ('loop', name)]
    close = functools.partial(np.testing.assert_allclose, atol=1e-4)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]), packed)
    pairs = lambda a: a.reshape(2, 3, -1)
    scanned = lambda way: lambda *args: jax.lax.scan(
        lambda _, layer: (None, jax.checkpoint(way)(layer, *args[1:])), None,
        args[0])[1]
    for change, args in (
        (lambda way: way, (packed, x, dy)),
        (lambda way: jax.vmap(way, (None, 0, 0)), (packed, pairs(x),
                                                   pairs(dy))),
        (lambda way: jax.vmap(way, (0, None, None)), (stacked, x, dy)),
        (scanned, (stacked, x, dy))):
      *want, growth = jax.jit(change(ways[0]))(*args)
      *got, scores = jax.jit(change(ways[1]))(*args)
      jax.tree.map(close, got, want)
      # Sums of up to 16,384 magnitudes each, in another order.
      np.testing.assert_allclose(scores, growth, rtol=1e-6)

  @parameterized.parameters(None, 'gpu')
  def test_second_derivatives(self, name):
    packed, x, _ = packed_problem(grid=(3, 3), batch=3)
    packed = packed.replace(growth=None)

    def hvp(product):
      loss = lambda w: jnp.sum(jnp.sin(.1 * product(
          x, packed.replace(blocks=w))))
      return jax.jit(jax.grad(lambda w: jnp.vdot(
          jax.grad(loss)(w), packed.blocks)))(packed.blocks)

    np.testing.assert_allclose(
        hvp(functools.partial(sparse_jax.blocks.matmul, implementation=name)),
        hvp(lambda x, p: x @ sparse_jax.blocks.unpack(p)), atol=1e-4)

  @parameterized.parameters(('cuda', 32), ('cuda', 64), ('cuda', 128),
                            ('tpu', 128), ('tpu', 256), ('tpu', 512))
  def test_programs_for_a_platform_have_its_kernels(self, platform, side):
    """The product, both gradients and the growth scores, no GPU needed."""
    for dtype in (jnp.float32, jnp.bfloat16):
      args = abstract(packed_problem(side, dtype, grid=(3, 3)))
      text = lowered(platform, product_and_gradients, *args)
      self.assertEqual(text.count(CALLS[platform]), 4)
      for name in CALLS.values():
        self.assertNotIn(name, lowered('cpu', product_and_gradients, *args))

  @parameterized.parameters((64, jnp.float16), (128, jnp.bfloat16))
  def test_kernels_for_hopper_lower_and_are_the_loop_on_a_cpu(self, side,
                                                              dtype):
    args = packed_problem(side, dtype, grid=(3, 3))
    named, loop = (functools.partial(product_and_gradients, implementation=way)
                   for way in ('hopper', 'loop'))
    text = lowered('cuda', named, *abstract(args))
    self.assertEqual(text.count(CALLS['hopper']), 4)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(named)(*args),
                 jax.jit(loop)(*args))

  @parameterized.parameters(('cuda', 16, jnp.float32), ('tpu', 64, jnp.float32),
                            ('tpu', 128, jnp.float16))
  def test_other_blocks_go_the_plain_way(self, platform, side, dtype):
    args = abstract(packed_problem(side, dtype, grid=(3, 3)))
    text = lowered(platform, product_and_gradients, *args)
    self.assertNotIn(CALLS[platform], text)

  @parameterized.parameters(((2, 4), True, 2), ((2, 4), False, 0),
                            ((4, 2), True, 0))
  def test_what_reads_a_wide_cotangent_comes_first(self, grid, asked,
                                                   barriers):
    args = abstract(packed_problem(128, grid=grid))
    text = lowered('tpu', functools.partial(
        product_and_gradients, weights_first=asked), *args)
    # One for the growth scores, one for the gradient to the blocks.
    self.assertEqual(text.count('stablehlo.optimization_barrier'), barriers)

  def test_input_that_does_not_fit_the_chip_goes_the_plain_way(self):
    x, wide = (jax.ShapeDtypeStruct((256, 2**n), jnp.float32)
               for n in (10, 16))
    for block in (128, 128), (512, 512):
      for given, fits in ((x, True), (wide, False)):
        self.assertEqual(tpu.product_fits(given, block, 3, 2048), fits)
        self.assertEqual(tpu.gradient_fits(given, x, block, 3), fits)
        self.assertTrue(tpu.scores_fit(given, block))

  def test_without_any_mesh_xla_splits_and_a_warning_says_so(self):
    """Arrays that lie nowhere, and shardings that `jit` alone knows."""
    mesh = jax.make_mesh((2,), ('data',), devices=jax.devices()[:2],
                         axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = (jax.sharding.NamedSharding(mesh, spec)
                   for spec in (P('data'), P()))
    args = abstract(packed_problem(128, grid=(3, 3), batch=16))
    step = jax.jit(product_and_gradients, in_shardings=(whole, rows, rows))
    with self.assertWarnsRegex(UserWarning, 'set_mesh'):
      text = step.trace(*args).lower(lowering_platforms=('tpu',)).as_text()
    self.assertNotIn(CALLS['tpu'], text)

  @parameterized.parameters('bare', 'auto', 'explicit', 'by hand')
  def test_kernels_on_every_device_of_a_mesh(self, kind):
    """Without `set_mesh`, with it, and in a user's own `shard_map`."""
    axis = 'Explicit' if kind == 'explicit' else 'Auto'
    mesh = jax.make_mesh((2,), ('data',), devices=jax.devices()[:2],
                         axis_types=(getattr(jax.sharding.AxisType, axis),))
    spec = jax.sharding.PartitionSpec
    rows = spec('data')
    args = packed_problem(128, grid=(3, 3), batch=16)
    want = product_and_gradients(*args, implementation='loop')
    place = lambda tree, spec: jax.device_put(
        tree, jax.sharding.NamedSharding(mesh, spec))
    args = (place(args[0], spec()), *place(args[1:], rows))

    def by_hand(packed, x, dy):
      y, grad_x, *grads = product_and_gradients(
          packed.replace(growth=None), x, dy)
      return y, grad_x, jax.lax.psum(grads[0], 'data')

    fn = product_and_gradients
    if kind == 'by hand':
      fn = jax.shard_map(by_hand, mesh=mesh, in_specs=(spec(), rows, rows),
                         out_specs=(rows, rows, spec()), check_vma=False)
    with contextlib.nullcontext() if kind == 'bare' else jax.set_mesh(mesh):
      # Growth scores have no kernel where gradients of devices are summed.
      self.assertEqual(lowered('tpu', fn, *args).count(CALLS['tpu']), 3)
      for got, wanted in zip(jax.jit(fn)(*args), want):
        np.testing.assert_allclose(got, wanted, atol=1e-4)

  @parameterized.parameters('tpu', 'gpu', 'hopper')
  def test_a_kernel_asked_for_by_name_must_be_there(self, name):
    packed, x, _ = packed_problem(8, grid=(3, 3))
    with self.assertRaisesRegex(ValueError, f'`implementation` .={name!r}.*8'):
      sparse_jax.blocks.matmul(x, packed, implementation=name)


@absltest.skipIf(importlib.util.find_spec('libtpu') is None,
                 'the TPU compiler (libtpu) is not installed')
class CompileTest(parameterized.TestCase):

  @parameterized.parameters(*(
      (name, *kind) for name, other in CHIPS.items()
      for kind in ((128, jnp.bfloat16), other)))
  def test_compiles_for_tpus_with_little_memory(self, topology, side, dtype):
    mesh = mesh_of(topology, 1, jax.sharding.AxisType.Auto)
    args = shapes(mesh, side, dtype)
    with jax.set_mesh(mesh):
      self.assertEqual(tpu_sizes.chip().vmem == 2**24,
                       topology.startswith('v4'))
      compiled = jax.jit(product_and_gradients).lower(*args).compile()
    kernels = f'custom_call_target="{CALLS["tpu"]}"'
    self.assertEqual(compiled.as_text().count(kernels), 4)
    self.assertLess(compiled.memory_analysis().temp_size_in_bytes, 2**23)

  def test_heads_of_attention_are_not_copied(self):
    mesh = mesh_of('v5e:2x2', 1, jax.sharding.AxisType.Auto)
    packed, x, _ = shapes(mesh, 256, jnp.bfloat16)
    packed = packed.replace(growth=None)

    def attention(size, x, packed):
      q = sparse_jax.blocks.matmul(x.reshape(4, 512, -1), packed,
                                   heads=(None, size))
      q = q.reshape(4, 512, -1, 128)
      scores = jax.nn.softmax(jnp.einsum('bqhd,bkhd->bhqk', q, q))
      y = jnp.einsum('bhqk,bkhd->bqhd', scores, q).reshape(4, 512, -1)
      return sparse_jax.blocks.matmul(y, packed, heads=(size, None))

    copies = {}
    for size in (None, 128):
      with jax.set_mesh(mesh):
        text = jax.jit(functools.partial(attention, size)).lower(
            x, packed).compile().as_text()
      copies[size] = len(re.findall(r' = bf16\S* copy\(', text))
    self.assertGreater(copies[None], 0)
    self.assertEqual(copies[128], 0)

  @parameterized.parameters('bare', 'auto', 'explicit')
  def test_compiles_for_eight_chips(self, kind):
    axis = 'Explicit' if kind == 'explicit' else 'Auto'
    mesh = mesh_of('v5e:2x4', 8, getattr(jax.sharding.AxisType, axis))
    packed, x, dy = shapes(mesh, 256, jnp.bfloat16)
    packed = packed.replace(growth=None)
    with contextlib.nullcontext() if kind == 'bare' else jax.set_mesh(mesh):
      compiled = jax.jit(product_and_gradients).lower(packed, x, dy).compile()
    text = compiled.as_text()
    self.assertEqual(
        text.count(f'custom_call_target="{CALLS["tpu"]}"'), 3)
    self.assertEqual(re.findall(
        r'= (\S+?)\{\S* (all-[a-z]+|reduce-scatter|coll[a-z-]+)\(', text),
                     [('bf16[26,256,256]', 'all-reduce')])
    self.assertLess(compiled.memory_analysis().temp_size_in_bytes, 2**23)


def mesh_of(topology, count, axis):
  """A mesh of chips that are not there."""
  with mock.patch.dict(os.environ, TPU_SKIP_MDS_QUERY='1',
                       ALLOW_MULTIPLE_LIBTPU_LOAD='1'):
    chips = topologies.get_topology_desc(platform='tpu',
                                         topology_name=topology)
  return jax.sharding.Mesh(chips.devices[:count], ('data',),
                           axis_types=(axis,))


def shapes(mesh, side, dtype):
  """A packed weight of 4096 x 4096 at 10%, an input and a cotangent."""
  def leaf(shape, dtype, *spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.
                                NamedSharding(mesh, P(*spec)))

  sides = 4096 // side
  count = round(.1 * sides**2)
  ids = leaf((count,), jnp.int32)
  packed = packing.PackedBlocks(
      leaf((count, side, side), dtype), ids, ids,
      growth=leaf((sides, sides), jnp.float32), shape=(4096, 4096),
      block=(side, side))
  x = leaf((2048, 4096), dtype, 'data')
  return packed, x, x


if __name__ == '__main__':
  absltest.main()
