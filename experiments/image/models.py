"""The image classifiers that sparse training is measured on, in Flax linen.

    logits = model.apply(variables, images, train=False)
    logits, updates = model.apply(variables, images, train=True, rngs=...,
                                  mutable=['batch_stats'])

Images are float[B, H, W, C] and logits are float32[B, num_classes]. Parameters
and batch statistics are float32 whatever `dtype`, which only sets the type the
layers compute in. The first convolution (or first Dense) is named 'stem' and
the last Dense 'head' in every network, so that a flag can keep either dense.
`width` multiplies every hidden channel count c, giving max(1, round(width * c))
with Python's round; it makes the small-dense baselines.

Kernels are He normal over fan-out where nothing else is said, the head LeCun
normal. Under one jit over a sharded batch the statistics of batch norm are
those of the global batch.
"""

from collections.abc import Callable, Sequence
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp

_HE_FAN_IN = nn.initializers.variance_scaling(2.0, 'fan_in', 'normal')
_HE_FAN_OUT = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
_LECUN = nn.initializers.lecun_normal()
_SMALL_NORMAL = nn.initializers.normal(0.01)


def _conv(features: int, size: int, *, stride: int = 1,
          kernel_init: Callable = _HE_FAN_OUT, **options) -> nn.Conv:
  """A square convolution without bias, padded alike on both sides."""
  # 'SAME' would pad a strided convolution on one side only, unlike the
  # published networks.
  return nn.Conv(features, (size, size), strides=stride, padding=size // 2,
                 use_bias=False, kernel_init=kernel_init, **options)


def _norm(train: bool, **options) -> nn.BatchNorm:
  return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5,
                      **options)


def _pool_by_two(pool: Callable, x: jax.Array) -> jax.Array:
  # Averaging over a padded edge returns float32.
  return pool(x, (2, 2), strides=(2, 2), padding='SAME').astype(x.dtype)


class Network(nn.Module):
  """What all networks have: the number of logits, a width, a type."""

  num_classes: int
  width: float = 1.0
  dtype: jax.typing.DTypeLike = jnp.float32

  def channels(self, count: int) -> int:
    return max(1, round(self.width * count))

  def dense(self, x, features, name, kernel_init=_HE_FAN_IN):
    """A hidden Dense with ReLU, its size multiplied by `width`."""
    return nn.relu(nn.Dense(self.channels(features), kernel_init=kernel_init,
                            dtype=self.dtype, name=name)(x))

  def conv_norm(self, x, features, size, name, norm, train, **options):
    """A convolution, batch norm and ReLU; `features` are final."""
    x = _conv(features, size, dtype=self.dtype, name=name, **options)(x)
    return nn.relu(_norm(train, dtype=self.dtype, name=norm)(x))

  def numbered(self, x, features, layer, train, **options):
    """Such a 3x3 convolution, the stem if it is layer 1."""
    names = (('stem', 'stem_norm') if layer == 1
             else (f'conv_{layer}', f'norm_{layer}'))
    return self.conv_norm(x, self.channels(features), 3, *names, train,
                          **options)

  def stem(self, images, features, train, *, imagenet, **options):
    """A 3x3 convolution; for ImageNet 7x7 of stride two, then max pooling."""
    x = self.conv_norm(images.astype(self.dtype), self.channels(features),
                       7 if imagenet else 3, 'stem', 'stem_norm', train,
                       stride=2 if imagenet else 1, **options)
    if not imagenet:
      return x
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))

  def head(self, x, kernel_init=_LECUN):
    """The classifier of float[B, features], its logits in float32."""
    head = nn.Dense(self.num_classes, kernel_init=kernel_init, dtype=self.dtype,
                    name='head')
    return head(x).astype(jnp.float32)


class MLP(Network):
  """LeNet-300-100 (LeCun et al., 1998) with ReLUs, kernels He over fan-in."""

  features: Sequence[int] = (300, 100)

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    del train
    x = images.astype(self.dtype).reshape(len(images), -1)
    for i, features in enumerate(self.features):
      x = self.dense(x, features, f'dense_{i + 1}' if i else 'stem')
    return self.head(x)


class SmallCNN(Network):
  """Two 3x3 convolutions with max pooling, and a Dense, for runs on a CPU.

  Kernels are He normal over fan-in; convolutions have a bias and no batch norm.
  """

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    del train
    x = images.astype(self.dtype)
    for name, features in (('stem', 32), ('conv_2', 64)):
      conv = nn.Conv(self.channels(features), (3, 3), kernel_init=_HE_FAN_IN,
                     dtype=self.dtype, name=name)
      x = _pool_by_two(nn.max_pool, nn.relu(conv(x)))
    return self.head(self.dense(x.reshape(len(x), -1), 128, 'dense'))


class StridedCNN(Network):
  """Three 3x3 convolutions of stride two; the head reads all positions.

  On a CPU the gradient of max pooling would cost as much as theirs (strides in
  its place: Springenberg et al., 2014, https://arxiv.org/abs/1412.6806).
  """

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    x = images.astype(self.dtype)
    for layer, features in enumerate((32, 64, 128), 1):
      x = self.numbered(x, features, layer, train, stride=2)
    return self.head(x.reshape(len(x), -1))


class ResidualBlock(nn.Module):
  """Convolutions with batch norm and a shortcut, the ReLU after the sum.

  Two of 3x3, or a bottleneck: 1x1, 3x3 and 1x1. The first of 3x3 has the
  stride. A bottleneck's last batch norm starts with a scale of zero, so that a
  block without projection is the identity at first.
  """

  features: Sequence[int]  # Channels of each convolution.
  stride: int
  projection: bool  # Of the shortcut; otherwise it is the input itself.
  dtype: jax.typing.DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    conv = functools.partial(_conv, dtype=self.dtype)
    norm = functools.partial(_norm, train, dtype=self.dtype)
    bottleneck, y = len(self.features) == 3, x
    for i, features in enumerate(self.features, 1):
      size = 1 if bottleneck and i != 2 else 3
      stride = self.stride if i == 1 + bottleneck else 1
      scale = nn.initializers.zeros if i == 3 else nn.initializers.ones
      y = conv(features, size, stride=stride, name=f'conv_{i}')(y)
      y = norm(scale_init=scale, name=f'norm_{i}')(y)
      y = nn.relu(y) if i < len(self.features) else y
    if self.projection:
      x = conv(self.features[-1], 1, stride=self.stride, name='projection')(x)
      x = norm(name='projection_norm')(x)
    return nn.relu(x + y)


class WideBlock(nn.Module):
  """Two 3x3 convolutions after norm and ReLU; a projection has no norm."""

  features: int
  stride: int
  projection: bool
  dropout: float
  dtype: jax.typing.DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    conv = functools.partial(_conv, self.features, dtype=self.dtype)
    norm = functools.partial(_norm, train, dtype=self.dtype)
    y = nn.relu(norm(name='norm_1')(x))
    if self.projection:
      x = conv(1, stride=self.stride, name='projection')(y)
    y = conv(3, stride=self.stride, name='conv_1')(y)
    y = nn.relu(norm(name='norm_2')(y))
    y = nn.Dropout(self.dropout, deterministic=not train)(y)
    return x + conv(3, name='conv_2')(y)


class DenseLayer(nn.Module):
  """A 1x1 and a 3x3 convolution whose output is appended to the input."""

  bottleneck: int  # Channels of the 1x1 convolution.
  growth: int  # Channels of the 3x3 convolution, those appended.
  dtype: jax.typing.DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    conv = functools.partial(_conv, kernel_init=_HE_FAN_IN, dtype=self.dtype)
    norm = functools.partial(_norm, train, dtype=self.dtype)
    y = nn.relu(norm(name='norm_1')(x))
    y = conv(self.bottleneck, 1, name='conv_1')(y)
    y = nn.relu(norm(name='norm_2')(y))
    y = conv(self.growth, 3, name='conv_2')(y)
    return jnp.concatenate([x, y], axis=-1)


class ResNet(Network):
  """A residual network: a stem, stages of blocks, global average pooling.

  The paper's CIFAR networks widen by padding with zeros (option A); here blocks
  that change the shape have a 1x1 projection with batch norm (option B), as is
  common in the literature: 2,752 parameters more in ResNet-20.

  Reference:
    He et al., 2015, https://arxiv.org/abs/1512.03385, table 1 and section 4.2.
    Bottleneck blocks have their stride as in "v1.5" codes; the zeros of their
    last norm and the head's deviation of 0.01 are from Goyal et al., 2017,
    https://arxiv.org/abs/1706.02677, section 5.1. Convolutions have no bias,
    where SWAT's code gives them one.
  """

  blocks: Sequence[int] = (2, 2, 2, 2)  # How many each stage has.
  features: Sequence[int] = (64, 128, 256, 512)  # Of the 3x3 convolutions.
  bottleneck: bool = False  # Three convolutions, four times wider at the end.
  imagenet: bool = False  # Whether the stem is that of ImageNet.

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    x = self.stem(images, self.features[0], train, imagenet=self.imagenet)
    for i, (blocks, features) in enumerate(zip(self.blocks, self.features)):
      for j in range(blocks):
        shrinks = i > 0 and j == 0
        widths = (1, 1, 4) if self.bottleneck else (1, 1)
        block = ResidualBlock(
            [self.channels(wide * features) for wide in widths],
            stride=2 if shrinks else 1,
            projection=j == 0 if self.bottleneck else shrinks,
            dtype=self.dtype, name=f'stage_{i + 1}_block_{j + 1}')
        x = block(x, train=train)
    return self.head(x.mean(axis=(1, 2)),
                     _SMALL_NORMAL if self.bottleneck else _LECUN)


class WideResNet(Network):
  """A wide residual network, pre-activation: three stages after a 3x3 stem.

  Reference: Zagoruyko and Komodakis, 2016, https://arxiv.org/abs/1605.07146,
  table 1; dropout as in section 2.4.
  """

  blocks: int = 4  # Of each stage; the depth is six times as many and 4.
  widening: int = 10  # `width` multiplies on top of it, stem included.
  dropout: float = 0.0

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    x = images.astype(self.dtype)
    x = _conv(self.channels(16), 3, dtype=self.dtype, name='stem')(x)
    for i, features in enumerate((16, 32, 64)):
      for j in range(self.blocks):
        block = WideBlock(
            self.channels(features * self.widening),
            stride=2 if i > 0 and j == 0 else 1,
            projection=j == 0 and (i > 0 or self.widening != 1),
            dropout=self.dropout, dtype=self.dtype,
            name=f'stage_{i + 1}_block_{j + 1}')
        x = block(x, train=train)
    x = nn.relu(_norm(train, dtype=self.dtype, name='last_norm')(x))
    return self.head(x.mean(axis=(1, 2)))


class VGG16(Network):
  """VGG-16 with batch norm and the 4096-4096 classifier.

  Reference:
    Simonyan and Zisserman, 2014, https://arxiv.org/abs/1409.1556, configuration
    D. Batch norm and the 512-4096-4096 classifier at 32x32 are from SWAT's
    code; convolutions have no bias, since the batch norm after them has one.
  """

  classifier_dropout: float = 0.5

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    x, layer = images.astype(self.dtype), 0
    for features, convs in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
      for _ in range(convs):
        layer += 1
        x = self.numbered(x, features, layer, train)
      x = _pool_by_two(nn.max_pool, x)
    x = x.reshape(len(x), -1)
    for name in ('dense_1', 'dense_2'):
      dropout = nn.Dropout(self.classifier_dropout, deterministic=not train)
      x = dropout(self.dense(x, 4096, name, _SMALL_NORMAL))
    return self.head(x, _SMALL_NORMAL)


class DenseNet121(Network):
  """DenseNet-121: growth 32, compression 0.5.

  `width` multiplies the 64 channels of the stem, the 32 that a layer appends
  and the 128 of its bottleneck; other counts follow. Kernels: He over fan-in.

  Reference: Huang et al., 2016, https://arxiv.org/abs/1608.06993, table 1.
  """

  imagenet: bool = False

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    conv = functools.partial(_conv, kernel_init=_HE_FAN_IN, dtype=self.dtype)
    norm = functools.partial(_norm, train, dtype=self.dtype)
    if self.imagenet:
      x = self.stem(images, 64, train, imagenet=True, kernel_init=_HE_FAN_IN)
    else:
      x = conv(self.channels(64), 3, name='stem')(images.astype(self.dtype))
    for i, layers in enumerate((6, 12, 24, 16)):
      if i > 0:
        x = nn.relu(norm(name=f'transition_{i}_norm')(x))
        x = conv(max(1, x.shape[-1] // 2), 1, name=f'transition_{i}')(x)
        x = _pool_by_two(
            functools.partial(nn.avg_pool, count_include_pad=False), x)
      for j in range(layers):
        layer = DenseLayer(
            self.channels(128), self.channels(32), dtype=self.dtype,
            name=f'stage_{i + 1}_layer_{j + 1}')
        x = layer(x, train=train)
    x = nn.relu(norm(name='last_norm')(x))
    return self.head(x.mean(axis=(1, 2)))


class MobileNetV1(Network):
  """MobileNet-v1: 13 pairs of a 3x3 depthwise and a 1x1 convolution.

  Depthwise kernels are a hundredth of all weights; sparse training leaves them
  and the stem dense, with --dense_layers=stem,depthwise (RigL, section 4.1).

  Reference: Howard et al., 2017, https://arxiv.org/abs/1704.04861, table 1.
  """

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    x = self.conv_norm(images.astype(self.dtype), self.channels(32), 3, 'stem',
                       'stem_norm', train, stride=2)
    pairs = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2),
             *5 * ((512, 1),), (1024, 2), (1024, 1))
    for i, (features, stride) in enumerate(pairs, 1):
      inputs = x.shape[-1]
      x = self.conv_norm(x, inputs, 3, f'depthwise_{i}', f'depthwise_norm_{i}',
                         train, stride=stride, feature_group_count=inputs)
      x = self.conv_norm(x, self.channels(features), 1, f'pointwise_{i}',
                         f'pointwise_norm_{i}', train)
    return self.head(x.mean(axis=(1, 2)))


_SMALL_RESNET = functools.partial(ResNet, features=(16, 32, 64))
MODELS: dict[str, Callable[..., nn.Module]] = {
    'mlp': MLP,
    'small_cnn': SmallCNN,
    'strided_cnn': StridedCNN,
    'resnet20': functools.partial(_SMALL_RESNET, blocks=(3, 3, 3)),
    'resnet56': functools.partial(_SMALL_RESNET, blocks=(9, 9, 9)),
    'resnet18': ResNet,
    'wrn_28_10': WideResNet,
    'wrn_22_2': functools.partial(WideResNet, blocks=3, widening=2),
    'wrn_16_8': functools.partial(WideResNet, blocks=2, widening=8),
    'vgg16': VGG16,
    'densenet121': DenseNet121,
    # For images of 224 x 224.
    'resnet18_imagenet': functools.partial(ResNet, imagenet=True),
    'resnet50': functools.partial(ResNet, blocks=(3, 4, 6, 3), bottleneck=True,
                                  imagenet=True),
    'densenet121_imagenet': functools.partial(DenseNet121, imagenet=True),
    'mobilenet_v1': MobileNetV1,
}


def create(name: str, *, num_classes: int, width: float = 1.0,
           dtype: jax.typing.DTypeLike = jnp.float32, dropout: float = 0.0
           ) -> nn.Module:
  """Builds the network of a name in MODELS; a ValueError names a bad argument.

  `dropout` is the rate inside the blocks of a wide ResNet; for any other
  network it must be 0: that of VGG-16's classifier is part of the network.
  """
  if not width > 0:
    raise ValueError(f'width must be positive, got {width}')
  if not 0 <= dropout < 1:
    raise ValueError(f'dropout must be in [0, 1), got {dropout}')
  kwargs = dict(num_classes=num_classes, width=width, dtype=dtype)
  if name.startswith('wrn_'):
    kwargs['dropout'] = dropout
  elif dropout:
    raise ValueError(f'dropout must be 0 for {name!r}, got {dropout}')
  return MODELS[name](**kwargs)
