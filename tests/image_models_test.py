"""Tests of experiments/image/models.py."""

import collections
import functools
import math

from absl.testing import absltest
from absl.testing import parameterized
import flax
import jax
import jax.numpy as jnp
import numpy as np

from experiments.image import models
from tests import kernel_count

# Compiling is most of the cost of these tests; so it takes a third of the time.
_jit = functools.partial(
    jax.jit, compiler_options={'xla_backend_optimization_level': 0})

_IMAGENET = ('resnet18_imagenet', 'resnet50', 'densenet121_imagenet',
             'mobilenet_v1')
_IMAGE_SHAPES = {'mlp': (28, 28, 1)} | dict.fromkeys(_IMAGENET, (224, 224, 3))
_NUM_CLASSES = dict.fromkeys(_IMAGENET, 1000)
# The others differ from one of these in their depth or their stem alone.
_KINDS = [name for name in models.MODELS if name not in (
    'resnet56', 'wrn_28_10', 'wrn_16_8', 'resnet18_imagenet',
    'densenet121_imagenet')]


def _image_shape(name):
  return _IMAGE_SHAPES.get(name, (32, 32, 3))


def _create(name, **kwargs):
  return models.create(
      name, num_classes=_NUM_CLASSES.get(name, 10), **kwargs)


@functools.cache
def _variable_shapes(model, image_shape):
  images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
  init = lambda key, images: model.init(key, images, train=False)
  return jax.eval_shape(init, jax.random.key(0), images)


def _size(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _kernels(params):
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {
      jax.tree_util.keystr(path): leaf for path, leaf in leaves
      if leaf.ndim > 1}


def _random_variables(model, image_shape, seed):
  """He-scaled kernels from NumPy, since compiling an init takes seconds."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    name = path[-1].key
    if name == 'kernel':
      fan_in = math.prod(leaf.shape[:-1])
      array = rng.normal(size=leaf.shape) * math.sqrt(2 / fan_in)
    else:
      array = np.full(leaf.shape, float(name in ('scale', 'var')))
    return jnp.asarray(array, leaf.dtype)

  return jax.tree_util.tree_map_with_path(
      draw, _variable_shapes(model, image_shape))


def _random_batch(seed, image_shape, batch=8, num_classes=10):
  rng = np.random.default_rng(seed)
  images = rng.normal(size=(batch, *image_shape)).astype(np.float32)
  return jnp.asarray(images), jnp.asarray(rng.integers(num_classes, size=batch))


def _loss(model, params, batch_stats, images, labels):
  logits, _ = model.apply(
      {'params': params, 'batch_stats': batch_stats}, images, train=True,
      mutable=['batch_stats'])
  log_probs = jax.nn.log_softmax(logits)
  return -jnp.take_along_axis(log_probs, labels[:, None], axis=1).mean()


class ModelsTest(parameterized.TestCase):
  """What every network promises, checked on shapes alone."""

  @parameterized.parameters(_KINDS)
  def test_bfloat16_is_only_what_layers_compute_in(self, name):
    model = _create(name, dtype=jnp.bfloat16)

    def forward(variables, key, images):
      return model.apply(
          variables, images, train=True, mutable=['batch_stats'],
          rngs={'dropout': key}, capture_intermediates=True)

    images = jax.ShapeDtypeStruct((2, *_image_shape(name)), jnp.float32)
    variables = _variable_shapes(model, _image_shape(name))
    logits, state = jax.eval_shape(
        forward, variables, jax.random.key(0), images)
    self.assertEqual(logits.shape, (2, model.num_classes))
    self.assertEqual(logits.dtype, jnp.float32)
    for leaf in jax.tree.leaves(variables):
      self.assertEqual(leaf.dtype, jnp.float32)
    self.assertEqual(
        state.get('batch_stats'), variables.get('batch_stats'))
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        state['intermediates']):
      if len(path) > 2:  # Outputs of layers, not the logits.
        self.assertEqual(leaf.dtype, jnp.bfloat16, path)

  # The totals are those of the networks' widely used public codes, but for
  # four that are reckoned by hand. small_cnn: 9*3*32 + 32 + 9*32*64 + 64 +
  # 4096*128 + 128 + 128*10 + 10. strided_cnn: kernels 864, 18,432, 73,728 and
  # 16*128*10, batch norm 2*224, bias 10. wrn_22_2: kernels 432, 51,200,
  # 204,800, 819,200 and 1,280, batch norm 2,720, bias 10. vgg16: convolutions
  # 14,710,464, batch norm 2*4224, classifier 513*4096 + 4097*4096 + 4097*10.
  @parameterized.named_parameters(
      ('mlp', 'mlp', 266_610),
      ('small_cnn', 'small_cnn', 545_098),
      ('strided_cnn', 'strided_cnn', 113_962),
      ('resnet20', 'resnet20', 269_722 + 2_752),
      ('resnet56', 'resnet56', 853_018 + 2_752),
      ('resnet18', 'resnet18', 11_173_962),
      ('wrn_28_10', 'wrn_28_10', 36_479_194),
      ('wrn_22_2', 'wrn_22_2', 1_079_642),
      ('wrn_16_8', 'wrn_16_8', 10_961_370),
      ('resnet50', 'resnet50', 25_557_032),
      ('vgg16', 'vgg16', 33_642_442),
      ('densenet121', 'densenet121', 6_956_298),
      ('resnet18_imagenet', 'resnet18_imagenet', 11_689_512),
      ('densenet121_imagenet', 'densenet121_imagenet', 7_978_856),
      ('mobilenet_v1', 'mobilenet_v1', 4_231_976),
  )
  def test_parameter_count_is_the_known_one(self, name, count):
    shapes = _variable_shapes(_create(name), _image_shape(name))
    self.assertEqual(_size(shapes['params']), count)

  @parameterized.parameters(list(models.MODELS))
  def test_first_layer_is_stem_and_last_is_head(self, name):
    model = _create(name)
    params = _variable_shapes(model, _image_shape(name))['params']
    height, width, channels = _image_shape(name)
    inputs = height * width * channels if name == 'mlp' else channels
    self.assertEqual(params['stem']['kernel'].shape[-2], inputs)
    self.assertEqual(params['head']['kernel'].shape[-1], model.num_classes)
    self.assertEqual(params['head']['bias'].shape, (model.num_classes,))

  @parameterized.parameters(_KINDS)
  def test_width_halves_every_hidden_channel_count(self, name):
    full = _kernels(
        _variable_shapes(_create(name), _image_shape(name))['params'])
    half = _kernels(_variable_shapes(
        _create(name, width=0.5), _image_shape(name))['params'])
    self.assertEqual(full.keys(), half.keys())
    for path, kernel in full.items():
      inputs, outputs = kernel.shape[-2:]
      expected = (
          inputs if 'stem' in path or 'depthwise' in path else inputs // 2,
          outputs if 'head' in path else outputs // 2)
      self.assertEqual(half[path].shape[-2:], expected, path)

  @parameterized.parameters(_KINDS)
  def test_narrowest_network_keeps_every_layer(self, name):
    full = _kernels(
        _variable_shapes(_create(name), _image_shape(name))['params'])
    narrow = _kernels(_variable_shapes(
        _create(name, width=1e-9), _image_shape(name))['params'])
    self.assertEqual(full.keys(), narrow.keys())


class ResNet50Test(parameterized.TestCase):

  def test_kernels_are_those_of_the_published_table(self):
    params = _variable_shapes(_create('resnet50'), (224, 224, 3))['params']
    kernels = _kernels(params)
    self.assertLen(kernels, 54)
    self.assertEqual(_size(kernels), 25_502_912)
    self.assertEqual(sum(sum(k.shape) for k in kernels.values()), 52_321)
    self.assertEqual(collections.Counter(k.shape for k in kernels.values()), {
        (7, 7, 3, 64): 1,
        (1, 1, 64, 64): 1,
        (3, 3, 64, 64): 3,
        (1, 1, 64, 256): 4,
        (1, 1, 256, 64): 2,
        (1, 1, 256, 128): 1,
        (3, 3, 128, 128): 4,
        (1, 1, 128, 512): 4,
        (1, 1, 512, 128): 3,
        (1, 1, 256, 512): 1,
        (1, 1, 512, 256): 1,
        (3, 3, 256, 256): 6,
        (1, 1, 256, 1024): 6,
        (1, 1, 1024, 256): 5,
        (1, 1, 512, 1024): 1,
        (1, 1, 1024, 512): 1,
        (3, 3, 512, 512): 3,
        (1, 1, 512, 2048): 3,
        (1, 1, 2048, 512): 2,
        (1, 1, 1024, 2048): 1,
        (2048, 1000): 1,
    })

  # With the stride on the 1x1 ResNet-50 would have 3.86e9. MobileNet's 569 are
  # its paper's, table 8; the others are of the widely used public codes.
  @parameterized.parameters(
      ('resnet50', 4.089), ('resnet18_imagenet', 1.814),
      ('densenet121_imagenet', 2.834), ('mobilenet_v1', .569))
  def test_multiply_adds_of_an_image_are_the_known_ones(self, name, billions):
    model = _create(name)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)

    def forward(key, images):
      variables = model.init(key, images, train=False)
      _, state = model.apply(
          variables, images, train=False, mutable=['intermediates'],
          capture_intermediates=True)
      return variables['params'], state['intermediates']

    params, outputs = jax.eval_shape(forward, jax.random.key(0), images)

    def count(params, outputs):
      if 'kernel' in params:
        output = outputs['__call__'][0]
        positions = math.prod(output.shape[1:-1])
        return params['kernel'].size * positions
      return sum(
          count(params[name], outputs[name]) for name in params
          if isinstance(params[name], dict))

    self.assertAlmostEqual(count(params, outputs) / 1e9, billions, delta=6e-4)

  def test_last_scale_of_each_block_starts_at_zero(self):
    model = models.create('resnet50', num_classes=2, width=1 / 64)

    @_jit
    def scales(key):
      params = model.init(key, jnp.zeros((1, 32, 32, 3)), train=False)['params']
      return [
          [params[name][norm]['scale'] for norm in ('norm_2', 'norm_3')]
          for name in params if 'block' in name]

    blocks = scales(jax.random.key(1))
    self.assertLen(blocks, 16)
    for inner, last in blocks:
      np.testing.assert_array_equal(inner, 1.0)
      np.testing.assert_array_equal(last, 0.0)

  def test_strided_convolution_is_padded_alike_on_both_sides(self):
    """A kernel of one centre tap reads every other pixel, from the first.

    Padding an even side at its end only, as 'SAME' does, would read from the
    second.
    """
    conv = models._conv(1, 3, stride=2, dtype=jnp.float32, name=None)
    images, _ = _random_batch(2, (8, 8, 1), batch=1)
    kernel = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
    np.testing.assert_array_equal(
        conv.apply({'params': {'kernel': kernel}}, images),
        images[:, ::2, ::2])

  @parameterized.parameters((0.465, 30), (0.26, 17), (1e-9, 1))
  def test_channels_are_rounded_and_at_least_one(self, width, channels):
    network = models.MLP(num_classes=10, width=width)
    self.assertEqual(network.channels(64), channels)


class InitialisationTest(absltest.TestCase):

  def test_kernels_have_the_documented_deviation(self):
    residual = models.ResNet(
        num_classes=100, blocks=(1, 1, 1), features=(16, 32, 64))
    vgg = models.VGG16(num_classes=100, width=1 / 16)
    dense = models.DenseLayer(128, growth=32, dtype=jnp.float32)
    mlp = models.MLP(num_classes=10)
    images = jnp.zeros((1, 8, 8, 1))
    features = jnp.zeros((1, 8, 8, 64))

    # The initialisers not asked for are dropped before they are compiled.
    @_jit
    def kernels(key):
      params = [
          model.init(key, x, train=False)['params']
          for model, x in (
              (residual, images), (vgg, images), (dense, features),
              (mlp, images))]
      return {
          'fan_out': params[0]['stage_3_block_1']['conv_1']['kernel'],
          'vgg_head': params[1]['head']['kernel'],
          'dense': params[2]['conv_1']['kernel'],
          'mlp': params[3]['dense_2']['kernel'],
          'head': params[0]['head']['kernel'],
      }

    expected = {
        'fan_out': math.sqrt(2 / (9 * 64)), 'vgg_head': 0.01,
        'dense': math.sqrt(2 / 64), 'mlp': math.sqrt(2 / 300),
        'head': math.sqrt(1 / 64)}
    key = jax.random.key(20, impl='rbg')  # Ten times faster to compile.
    for name, kernel in kernels(key).items():
      # Of n draws the deviation errs by 1 / sqrt(2 n), here 4% at most for
      # three such errors.
      np.testing.assert_allclose(
          np.std(kernel), expected[name], rtol=0.04, err_msg=name)


class VGG16Test(absltest.TestCase):

  def test_imagenet_size_has_the_published_kernels(self):
    # 138,357,544 parameters less 4,224 and 9,192 biases.
    model = models.VGG16(num_classes=1000)
    self.assertEqual(kernel_count.of_images(model, (224, 224, 3)), 138_344_128)


class ForwardTest(parameterized.TestCase):
  """Networks small enough to run, on images of 8x8 too."""

  @parameterized.named_parameters(
      ('mlp', 'mlp', (8, 8, 1)),
      ('small_cnn', 'small_cnn', (8, 8, 1)),
      ('small_cnn_color', 'small_cnn', (32, 32, 3)),
      ('strided_cnn', 'strided_cnn', (32, 32, 3)),
      ('resnet20', 'resnet20', (8, 8, 1)),
  )
  def test_jitted_equals_eager(self, name, image_shape):
    model = _create(name, width=0.5)
    images, _ = _random_batch(4, image_shape, batch=2)
    apply = lambda v, x: model.apply(v, x, train=False)
    variables = _random_variables(model, image_shape, 5)
    eager = apply(variables, images)
    self.assertEqual(eager.shape, (2, 10))
    self.assertTrue(np.isfinite(eager).all())
    # Fusion reorders float32 sums.
    np.testing.assert_allclose(
        _jit(apply)(variables, images), eager, rtol=1e-4, atol=1e-5)

  @parameterized.parameters('wrn_22_2', 'vgg16', 'densenet121')
  def test_smallest_image_has_a_shape(self, name):
    model = _create(name)
    images = jnp.zeros((2, 8, 8, 1))
    logits, _ = jax.eval_shape(
        lambda key: model.init_with_output(key, images, train=False),
        jax.random.key(0))
    self.assertEqual(logits.shape, (2, model.num_classes))

  @parameterized.parameters('mlp', 'small_cnn', 'strided_cnn', 'resnet20')
  def test_gradient_step_lowers_the_loss(self, name):
    model = _create(name, width=0.25)
    images, labels = _random_batch(6, (8, 8, 1))
    variables = _random_variables(model, (8, 8, 1), 7)
    stats = variables.get('batch_stats', {})
    params = variables['params']
    loss_and_grad = _jit(jax.value_and_grad(
        lambda params: _loss(model, params, stats, images, labels)))
    before, grads = loss_and_grad(params)
    params = jax.tree.map(lambda p, g: p - 0.01 * g, params, grads)
    after, _ = loss_and_grad(params)
    self.assertLess(after, before)
    for path, grad in _kernels(grads).items():
      self.assertGreater(np.abs(grad).max(), 0, path)


class BatchNormTest(absltest.TestCase):

  def _model_and_variables(self, seed):
    model = models.ResNet(num_classes=10, blocks=(1, 1, 1),
                          features=(16, 32, 64), width=0.25)
    return model, _random_variables(model, (8, 8, 1), seed)

  def test_statistics_change_only_in_training(self):
    images, _ = _random_batch(8, (8, 8, 1))
    model, variables = self._model_and_variables(9)
    _, kept = model.apply(
        variables, images, train=False, mutable=['batch_stats'])
    _, moved = model.apply(
        variables, images, train=True, mutable=['batch_stats'])
    jax.tree.map(
        np.testing.assert_array_equal, kept['batch_stats'],
        variables['batch_stats'])
    # Means start at 0 and variances at 1, neither of which is exact.
    for leaf, start in zip(
        jax.tree.leaves(moved['batch_stats']),
        jax.tree.leaves(variables['batch_stats']), strict=True):
      self.assertTrue((leaf != start).all())

  def test_momentum_keeps_nine_tenths(self):
    images, _ = _random_batch(10, (8, 8, 1))
    model, variables = self._model_and_variables(11)
    _, state = model.apply(
        variables, images, train=True, mutable=['batch_stats'],
        capture_intermediates=True)
    stem = np.asarray(state['intermediates']['stem']['__call__'][0])
    stats = state['batch_stats']['stem_norm']
    # Tolerances for the order of float32 sums.
    np.testing.assert_allclose(
        stats['mean'], 0.1 * stem.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        stats['var'], 0.9 + 0.1 * stem.var((0, 1, 2)), rtol=1e-4)

  def test_sharded_batch_is_normalised_as_a_whole(self):
    """Eight devices with two images each give what one device gives.

    The images of each device have a mean of their own, so that statistics of
    a device's share would give other logits.
    """
    images, _ = _random_batch(12, (8, 8, 1), batch=16)
    shift = jnp.arange(16.0).reshape((16, 1, 1, 1))
    images = images + jnp.broadcast_to(shift, images.shape)
    model, variables = self._model_and_variables(13)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ('data',))
    sharding = jax.sharding.NamedSharding(
        mesh, jax.sharding.PartitionSpec('data'))

    @_jit
    def forward(variables, images):
      return model.apply(
          variables, images, train=True, mutable=['batch_stats'])

    sharded = forward(variables, jax.device_put(images, sharding))
    # Partial sums over eight devices are added in another order.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        sharded, forward(variables, images))


class DropoutTest(parameterized.TestCase):

  @parameterized.named_parameters(
      ('wide_block', models.WideBlock(
          4, stride=1, projection=False, dropout=0.3, dtype=jnp.float32)),
      ('vgg16', models.VGG16(num_classes=10, width=1 / 32)),
  )
  def test_dropout_differs_between_keys_only(self, model):
    images, _ = _random_batch(14, (8, 8, 4), batch=2)
    variables = _random_variables(model, (8, 8, 4), 15)

    @_jit
    def train_outputs(key):
      return model.apply(
          variables, images, train=True, mutable=['batch_stats'],
          rngs={'dropout': key})[0]

    key, other_key = jax.random.split(jax.random.key(16, impl='rbg'))
    first = train_outputs(key)
    np.testing.assert_array_equal(first, train_outputs(key))
    self.assertTrue((first != train_outputs(other_key)).any())

  @parameterized.named_parameters(
      ('wide_resnet', models.WideResNet(
          num_classes=10, blocks=1, widening=1, dropout=0.3)),
      ('vgg16', models.VGG16(num_classes=10)),
  )
  def test_key_is_needed_in_training_only(self, model):
    variables = _variable_shapes(model, (8, 8, 1))
    images = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)

    def forward(train):
      return jax.eval_shape(
          lambda variables, images: model.apply(
              variables, images, train=train, mutable=['batch_stats'])[0],
          variables, images)

    self.assertEqual(forward(False).shape, (2, 10))
    with self.assertRaisesRegex(flax.errors.InvalidRngError, 'dropout'):
      forward(True)

  def test_no_dropout_by_default_needs_no_key(self):
    model = models.WideResNet(num_classes=10, blocks=1, widening=1)
    images = jnp.zeros((2, 8, 8, 1))

    def forward(key):
      variables = model.init(key, images, train=False)
      return model.apply(
          variables, images, train=True, mutable=['batch_stats'])[0]

    self.assertEqual(
        jax.eval_shape(forward, jax.random.key(0)).shape, (2, 10))


class CreateTest(parameterized.TestCase):

  def test_names_are_the_documented_ones(self):
    self.assertEqual(list(models.MODELS), [
        'mlp', 'small_cnn', 'strided_cnn', 'resnet20', 'resnet56', 'resnet18',
        'wrn_28_10', 'wrn_22_2', 'wrn_16_8', 'vgg16', 'densenet121',
        'resnet18_imagenet', 'resnet50', 'densenet121_imagenet',
        'mobilenet_v1'])

  @parameterized.parameters(list(models.MODELS))
  def test_fields_are_those_given(self, name):
    model = models.create(
        name, num_classes=7, width=0.3, dtype=jnp.bfloat16)
    self.assertEqual(
        (model.num_classes, model.width, model.dtype), (7, 0.3, jnp.bfloat16))

  def test_dropout_reaches_wide_resnets_and_leaves_vgg_as_published(self):
    wide = models.create('wrn_16_8', num_classes=10, dropout=0.3)
    self.assertEqual((wide.blocks, wide.widening, wide.dropout), (2, 8, 0.3))
    vgg = models.create('vgg16', num_classes=10)
    self.assertEqual(vgg.classifier_dropout, 0.5)

  @parameterized.parameters(
      ('mlp', dict(width=-1.0), 'width .* -1.0'),
      ('mlp', dict(width=float('nan')), 'width .* nan'),
      ('wrn_16_8', dict(dropout=1.0), 'dropout .* 1.0'),
      ('vgg16', dict(dropout=0.3), "dropout must be 0 for 'vgg16', got 0.3"),
  )
  def test_bad_argument_is_an_error(self, name, kwargs, message):
    with self.assertRaisesRegex(ValueError, message):
      models.create(name, **{'num_classes': 10, **kwargs})


class KernelCountTest(parameterized.TestCase):

  @parameterized.parameters(
      ('mlp', (28, 28, 1), 784 * 300 + 300 * 100 + 100 * 10),
      ('mlp', (8, 8, 1), 64 * 300 + 300 * 100 + 100 * 10),
      ('small_cnn', (8, 8, 1), 9 * 32 + 9 * 32 * 64 + 256 * 128 + 128 * 10),
  )
  def test_count_is_the_hand_count(self, name, image_shape, count):
    self.assertEqual(kernel_count.of_images(_create(name), image_shape), count)

  # Densities of the Erdos-Renyi-kernel network and the widths published for
  # it. Its size has one bit of mask per entry; 3% for the batch norm and
  # biases left out here and for how the widths were rounded.
  @parameterized.parameters(
      (0.2, 0.465), (0.1, 0.34), (0.035, 0.231))
  def test_published_small_dense_is_as_large_as_sparse(self, density, width):
    count = kernel_count.of_images(
        _create('resnet50', width=width), (224, 224, 3))
    sparse = 25_502_912 * (density + 1 / 32)
    np.testing.assert_allclose(count, sparse, rtol=0.03)


if __name__ == '__main__':
  absltest.main()
