"""The image classifiers that sparse training is measured on, in Flax linen.

Every network is called in the same way and keeps the same promises:

    logits = model.apply(variables, images, train=False)
    logits, updates = model.apply(
        variables, images, train=True, mutable=['batch_stats'],
        rngs={'dropout': key})

Images are float[B, H, W, C] and logits are float32[B, num_classes]. Parameters
and batch statistics are float32 whatever `dtype`, which only sets the type the
layers compute in. The first convolution (or first Dense) is named 'stem' and
the last Dense 'head' in every network, so that a flag can keep either dense.
`width` multiplies every hidden channel count c, giving max(1, round(width * c))
with Python's round; it makes the small-dense baselines.

Batch normalisation has momentum 0.9 and epsilon 1e-5 and names no mesh axis.
Under one jit over a batch sharded across devices, its mean and variance are
therefore those of the global batch, not of each device's share.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp

from experiments import widths

_HE_FAN_IN = nn.initializers.variance_scaling(2.0, 'fan_in', 'normal')
_HE_FAN_OUT = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
_SMALL_NORMAL = nn.initializers.normal(0.01)


def _channels(width: float, channels: int) -> int:
  """Scales a channel count, keeping at least one channel."""
  if not width > 0:
    raise ValueError(f'width must be positive, got {width}')
  return max(1, round(width * channels))


def _conv(
    features: int,
    size: int,
    *,
    stride: int = 1,
    kernel_init: Callable = _HE_FAN_OUT,
    dtype: jax.typing.DTypeLike,
    name: str,
) -> nn.Conv:
  """A square convolution without bias, padded alike on both sides."""
  # 'SAME' would pad a strided convolution on one side only, unlike the
  # published networks.
  return nn.Conv(
      features, (size, size), strides=stride, padding=size // 2,
      use_bias=False, kernel_init=kernel_init, dtype=dtype, name=name)


def _norm(
    train: bool,
    *,
    scale_init: Callable = nn.initializers.ones,
    dtype: jax.typing.DTypeLike,
    name: str,
) -> nn.BatchNorm:
  """Batch normalisation over the whole batch that the jit sees."""
  return nn.BatchNorm(
      use_running_average=not train, momentum=0.9, epsilon=1e-5,
      scale_init=scale_init, dtype=dtype, name=name)


def _flatten(x: jax.Array) -> jax.Array:
  return x.reshape((x.shape[0], -1))


def _pool_by_two(pool: Callable, x: jax.Array) -> jax.Array:
  """Halves height and width; a side of odd length is rounded up."""
  # Averaging over a padded edge returns float32.
  return pool(x, (2, 2), strides=(2, 2), padding='SAME').astype(x.dtype)


def _head(
    x: jax.Array,
    num_classes: int,
    *,
    kernel_init: Callable = nn.initializers.lecun_normal(),
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
  """The classifier 'head' on float[B, features], its logits in float32."""
  head = nn.Dense(
      num_classes, kernel_init=kernel_init, dtype=dtype, name='head')
  return head(x).astype(jnp.float32)


class MLP(nn.Module):
  """A fully connected ReLU network on the flattened image.

  The default is LeNet-300-100. Hidden kernels are He normal over fan-in, the
  head LeCun normal, biases zero. There is no batch normalisation.

  Attributes:
    num_classes: number of logits.
    features: sizes of the hidden layers before `width`, at least one.
    width: multiplier of the hidden sizes, positive.
    dtype: type the layers compute in.

  Raises:
    ValueError: on a call, if `features` is empty or `width` is not positive.

  Reference:
    LeCun et al., Gradient-based learning applied to document recognition,
    1998, the fully connected network. ReLU takes the place of its sigmoids.
  """

  num_classes: int
  features: Sequence[int] = (300, 100)
  width: float = 1.0
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    del train
    if not self.features:
      raise ValueError(f'features must not be empty, got {self.features}')
    x = _flatten(images.astype(self.dtype))
    for i, features in enumerate(self.features):
      dense = nn.Dense(
          _channels(self.width, features), kernel_init=_HE_FAN_IN,
          dtype=self.dtype, name=f'dense_{i + 1}' if i else 'stem')
      x = nn.relu(dense(x))
    return _head(x, self.num_classes, dtype=self.dtype)


class SmallCNN(nn.Module):
  """Two 3x3 convolutions with max pooling and one hidden Dense.

  Convolutions of 32 and 64 channels, each with a bias, ReLU and 2x2 pooling;
  then a Dense of 128. Meant for tests and runs on a CPU. Hidden kernels are He
  normal over fan-in, the head LeCun normal. No batch normalisation.

  Attributes:
    num_classes: number of logits.
    width: multiplier of the 32, 64 and 128, positive.
    dtype: type the layers compute in.

  Raises:
    ValueError: on a call, if `width` is not positive.
  """

  num_classes: int
  width: float = 1.0
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    del train
    x = images.astype(self.dtype)
    for name, features in (('stem', 32), ('conv_2', 64)):
      conv = nn.Conv(
          _channels(self.width, features), (3, 3), kernel_init=_HE_FAN_IN,
          dtype=self.dtype, name=name)
      x = _pool_by_two(nn.max_pool, nn.relu(conv(x)))
    dense = nn.Dense(
        _channels(self.width, 128), kernel_init=_HE_FAN_IN, dtype=self.dtype,
        name='dense')
    x = nn.relu(dense(_flatten(x)))
    return _head(x, self.num_classes, dtype=self.dtype)


class StridedCNN(nn.Module):
  """Three 3x3 convolutions of stride two and a head on all positions.

  Convolutions of 32, 64 and 128 channels, each with batch norm and ReLU. Meant
  for comparisons on a CPU, where the gradient of max pooling costs as much as
  that of the convolutions. Kernels of convolutions are He normal over fan-out,
  the head LeCun normal.

  Attributes:
    num_classes: number of logits.
    width: multiplier of the channel counts, positive.
    dtype: type the layers compute in.

  Raises:
    ValueError: on a call, if `width` is not positive.

  Reference:
    Springenberg et al., Striving for simplicity, 2014,
    https://arxiv.org/abs/1412.6806, for strides in the place of pooling; the
    network is smaller than theirs.
  """

  num_classes: int
  width: float = 1.0
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    x = images.astype(self.dtype)
    for layer, features in enumerate((32, 64, 128), 1):
      conv = _conv(
          _channels(self.width, features), 3, stride=2, dtype=self.dtype,
          name='stem' if layer == 1 else f'conv_{layer}')
      norm = _norm(
          train, dtype=self.dtype,
          name='stem_norm' if layer == 1 else f'norm_{layer}')
      x = nn.relu(norm(conv(x)))
    return _head(_flatten(x), self.num_classes, dtype=self.dtype)


class BasicBlock(nn.Module):
  """Two 3x3 convolutions and a shortcut, the ReLU after the sum.

  Attributes:
    features: channels of both convolutions.
    stride: stride of the first convolution and of the projection.
    projection: whether the shortcut is a 1x1 convolution with batch norm
      (option B of He et al.) and not the identity.
    dtype: type the layers compute in.
  """

  features: int
  stride: int
  projection: bool
  dtype: jax.typing.DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    conv = functools.partial(_conv, self.features, dtype=self.dtype)
    norm = functools.partial(_norm, train, dtype=self.dtype)
    y = conv(3, stride=self.stride, name='conv_1')(x)
    y = nn.relu(norm(name='norm_1')(y))
    y = norm(name='norm_2')(conv(3, name='conv_2')(y))
    if self.projection:
      x = conv(1, stride=self.stride, name='projection')(x)
      x = norm(name='projection_norm')(x)
    return nn.relu(x + y)


class BottleneckBlock(nn.Module):
  """A 1x1, a 3x3 and a 1x1 convolution with a shortcut, as in ResNet v1.5.

  The stride is on the 3x3 convolution.

  Attributes:
    features: channels of the first two convolutions.
    out_features: channels of the last convolution and of the projection.
    stride: stride of the 3x3 convolution and of the projection.
    projection: whether the shortcut is a 1x1 convolution with batch norm and
      not the identity.
    zero_init_last: whether the last batch norm's scale starts at zero, which
      makes a block without projection the identity on its (nonnegative) input.
    dtype: type the layers compute in.
  """

  features: int
  out_features: int
  stride: int
  projection: bool
  zero_init_last: bool
  dtype: jax.typing.DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    conv = functools.partial(_conv, dtype=self.dtype)
    norm = functools.partial(_norm, train, dtype=self.dtype)
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    y = conv(self.features, 1, name='conv_1')(x)
    y = nn.relu(norm(name='norm_1')(y))
    y = conv(self.features, 3, stride=self.stride, name='conv_2')(y)
    y = nn.relu(norm(name='norm_2')(y))
    y = conv(self.out_features, 1, name='conv_3')(y)
    y = norm(
        scale_init=zeros if self.zero_init_last else ones, name='norm_3')(y)
    if self.projection:
      x = conv(
          self.out_features, 1, stride=self.stride, name='projection')(x)
      x = norm(name='projection_norm')(x)
    return nn.relu(x + y)


class WideBlock(nn.Module):
  """Two 3x3 convolutions, each after batch norm and ReLU, and a shortcut.

  Attributes:
    features: channels of both convolutions.
    stride: stride of the first convolution and of the projection.
    projection: whether the shortcut is a 1x1 convolution, without batch norm,
      of the activated input; otherwise it is the input itself.
    dropout: rate of the dropout before the second convolution, in [0, 1).
    dtype: type the layers compute in.
  """

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
  """A 1x1 and a 3x3 convolution whose output is appended to the input.

  Attributes:
    bottleneck: channels of the 1x1 convolution.
    growth: channels of the 3x3 convolution, those appended.
    dtype: type the layers compute in.
  """

  bottleneck: int
  growth: int
  dtype: jax.typing.DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    conv = functools.partial(
        _conv, kernel_init=_HE_FAN_IN, dtype=self.dtype)
    norm = functools.partial(_norm, train, dtype=self.dtype)
    y = nn.relu(norm(name='norm_1')(x))
    y = conv(self.bottleneck, 1, name='conv_1')(y)
    y = nn.relu(norm(name='norm_2')(y))
    y = conv(self.growth, 3, name='conv_2')(y)
    return jnp.concatenate([x, y], axis=-1)


def _basic_stages(
    x: jax.Array,
    *,
    stages: Sequence[int],
    blocks: int,
    width: float,
    train: bool,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
  """A 3x3 stem, stages of basic blocks, and the mean over the image."""
  x = _conv(_channels(width, stages[0]), 3, dtype=dtype, name='stem')(x)
  x = nn.relu(_norm(train, dtype=dtype, name='stem_norm')(x))
  for i, features in enumerate(stages):
    for j in range(blocks):
      changes = i > 0 and j == 0
      block = BasicBlock(
          _channels(width, features), stride=2 if changes else 1,
          projection=changes, dtype=dtype, name=f'stage_{i + 1}_block_{j + 1}')
      x = block(x, train=train)
  return x.mean(axis=(1, 2))


class ResNetCifar(nn.Module):
  """The CIFAR ResNet of depth 6n + 2, with 16, 32 and 64 channels.

  A 3x3 stem, three stages of n basic blocks, global average pooling. Kernels
  of convolutions are He normal over fan-out, the head LeCun normal.

  Attributes:
    num_classes: number of logits.
    depth: number of layers on the longest path, 6n + 2 for a positive n.
    width: multiplier of the channel counts, positive.
    dtype: type the layers compute in.

  Raises:
    ValueError: on a call, if `depth` has another form or `width` is not
      positive.

  Reference:
    He et al., Deep residual learning for image recognition, 2015,
    https://arxiv.org/abs/1512.03385, section 4.2. The paper's CIFAR networks
    widen by padding with zeros (option A); here the two blocks that change
    the shape have a 1x1 projection with batch norm (option B), as is common
    in the sparse-training literature. It adds 2,752 parameters.
  """

  num_classes: int
  depth: int = 20
  width: float = 1.0
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    if self.depth < 8 or self.depth % 6 != 2:
      raise ValueError(f'depth must be 6n + 2 with n > 0, got {self.depth}')
    blocks = (self.depth - 2) // 6
    x = _basic_stages(
        images.astype(self.dtype), stages=(16, 32, 64), blocks=blocks,
        width=self.width, train=train, dtype=self.dtype)
    return _head(x, self.num_classes, dtype=self.dtype)


class ResNet18(nn.Module):
  """ResNet-18 for CIFAR: a 3x3 stem of stride one and no max pooling.

  Four stages of two basic blocks with 64, 128, 256 and 512 channels, then
  global average pooling. Kernels of convolutions are He normal over fan-out,
  the head LeCun normal.

  Attributes:
    num_classes: number of logits.
    width: multiplier of the channel counts, positive.
    dtype: type the layers compute in.

  Raises:
    ValueError: on a call, if `width` is not positive.

  Reference:
    He et al., Deep residual learning for image recognition, 2015,
    https://arxiv.org/abs/1512.03385, table 1, with the stem of section 4.2.
    Convolutions have no bias, where SWAT's code gives them one.
  """

  num_classes: int
  width: float = 1.0
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    x = _basic_stages(
        images.astype(self.dtype), stages=(64, 128, 256, 512), blocks=2,
        width=self.width, train=train, dtype=self.dtype)
    return _head(x, self.num_classes, dtype=self.dtype)


class WideResNet(nn.Module):
  """The wide residual network WRN-depth-widening, pre-activation.

  A 3x3 stem of 16 channels, three stages of n = (depth - 4) / 6 blocks with
  16, 32 and 64 times `widening` channels, batch norm, ReLU and global average
  pooling. Kernels of convolutions are He normal over fan-out, the head LeCun
  normal.

  Attributes:
    num_classes: number of logits.
    depth: number of layers, 6n + 4 for a positive n.
    widening: the paper's k. `width` multiplies on top of it, stem included.
    dropout: rate of the dropout between the convolutions of a block, in
      [0, 1).
    width: multiplier of the channel counts, positive.
    dtype: type the layers compute in.

  Raises:
    ValueError: on a call, if `depth` has another form or `width` is not
      positive.

  Reference:
    Zagoruyko and Komodakis, Wide residual networks, 2016,
    https://arxiv.org/abs/1605.07146, table 1; dropout as in section 2.4.
  """

  num_classes: int
  depth: int = 28
  widening: int = 10
  dropout: float = 0.0
  width: float = 1.0
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    if self.depth < 10 or self.depth % 6 != 4:
      raise ValueError(f'depth must be 6n + 4 with n > 0, got {self.depth}')
    x = images.astype(self.dtype)
    x = _conv(
        _channels(self.width, 16), 3, dtype=self.dtype, name='stem')(x)
    for i, features in enumerate((16, 32, 64)):
      for j in range((self.depth - 4) // 6):
        block = WideBlock(
            _channels(self.width, features * self.widening),
            stride=2 if i > 0 and j == 0 else 1,
            projection=j == 0 and (i > 0 or self.widening != 1),
            dropout=self.dropout, dtype=self.dtype,
            name=f'stage_{i + 1}_block_{j + 1}')
        x = block(x, train=train)
    x = nn.relu(_norm(train, dtype=self.dtype, name='last_norm')(x))
    return _head(x.mean(axis=(1, 2)), self.num_classes, dtype=self.dtype)


class ResNet50(nn.Module):
  """ResNet-50 v1.5 for ImageNet.

  A 7x7 stem of stride two, batch norm, ReLU and 3x3 max pooling of stride two;
  stages of 3, 4, 6 and 3 bottleneck blocks, the stride on the 3x3 convolution;
  global average pooling. Convolutions and pooling are padded alike on both
  sides. Kernels of convolutions are He normal over fan-out, the head normal
  with standard deviation 0.01.

  Law: at width 1 and 1000 classes there are 54 kernels (53 of convolutions and
  the head's) with 25,502,912 entries.

  Attributes:
    num_classes: number of logits.
    zero_init_last: whether the last batch norm's scale in each block starts
      at zero.
    width: multiplier of the channel counts, positive. It is applied to the
      outer counts 256 ... 2048 too, not only to the inner ones.
    dtype: type the layers compute in.

  Raises:
    ValueError: on a call, if `width` is not positive.

  Reference:
    He et al., Deep residual learning for image recognition, 2015,
    https://arxiv.org/abs/1512.03385, table 1. The place of the stride is that
    of the later "v1.5" codes; zero_init_last and the head's deviation are from
    Goyal et al., Accurate, large minibatch SGD, 2017,
    https://arxiv.org/abs/1706.02677, section 5.1.
  """

  num_classes: int
  zero_init_last: bool = True
  width: float = 1.0
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    x = images.astype(self.dtype)
    x = _conv(
        _channels(self.width, 64), 7, stride=2, dtype=self.dtype,
        name='stem')(x)
    x = nn.relu(_norm(train, dtype=self.dtype, name='stem_norm')(x))
    x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    for i, blocks in enumerate((3, 4, 6, 3)):
      features = 64 * 2 ** i
      for j in range(blocks):
        block = BottleneckBlock(
            _channels(self.width, features),
            _channels(self.width, 4 * features),
            stride=2 if i > 0 and j == 0 else 1, projection=j == 0,
            zero_init_last=self.zero_init_last, dtype=self.dtype,
            name=f'stage_{i + 1}_block_{j + 1}')
        x = block(x, train=train)
    return _head(
        x.mean(axis=(1, 2)), self.num_classes, kernel_init=_SMALL_NORMAL,
        dtype=self.dtype)


class VGG16(nn.Module):
  """VGG-16 with batch norm and the 4096-4096 classifier.

  Thirteen 3x3 convolutions, each with batch norm and ReLU, a 2x2 max pooling
  after each of five stages, then two Dense of 4096 with ReLU and dropout. A
  32x32 image leaves 512 features to the classifier, a 224x224 image 25,088.
  Kernels of convolutions are He normal over fan-out, those of Dense normal
  with standard deviation 0.01.

  Attributes:
    num_classes: number of logits.
    classifier_dropout: rate of the dropout after each hidden Dense, in [0, 1).
    width: multiplier of the channel counts and of the 4096, positive.
    dtype: type the layers compute in.

  Raises:
    ValueError: on a call, if `width` is not positive.

  Reference:
    Simonyan and Zisserman, Very deep convolutional networks, 2014,
    https://arxiv.org/abs/1409.1556, configuration D. Batch norm and the
    512-4096-4096 classifier at 32x32 are from the code of Raihan and Aamodt,
    Sparse weight activation training, 2020, https://arxiv.org/abs/2001.01969;
    convolutions have no bias, since the batch norm after them has one.
  """

  num_classes: int
  classifier_dropout: float = 0.5
  width: float = 1.0
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    x = images.astype(self.dtype)
    layer = 0
    for features, convs in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
      for _ in range(convs):
        layer += 1
        conv = _conv(
            _channels(self.width, features), 3, dtype=self.dtype,
            name='stem' if layer == 1 else f'conv_{layer}')
        norm = _norm(
            train, dtype=self.dtype,
            name='stem_norm' if layer == 1 else f'norm_{layer}')
        x = nn.relu(norm(conv(x)))
      x = _pool_by_two(nn.max_pool, x)
    x = _flatten(x)
    for name in ('dense_1', 'dense_2'):
      dense = nn.Dense(
          _channels(self.width, 4096), kernel_init=_SMALL_NORMAL,
          dtype=self.dtype, name=name)
      dropout = nn.Dropout(self.classifier_dropout, deterministic=not train)
      x = dropout(nn.relu(dense(x)))
    return _head(
        x, self.num_classes, kernel_init=_SMALL_NORMAL, dtype=self.dtype)


class DenseNet121(nn.Module):
  """DenseNet-121 for CIFAR: growth 32, compression 0.5, a 3x3 stem.

  A stem of 64 channels and four stages of 6, 12, 24 and 16 layers, each layer
  appending 32 channels through a bottleneck of 128. Between stages a 1x1
  convolution halves the channels, rounding down, and average pooling halves
  the sides. Kernels of convolutions are He normal over fan-in, the head LeCun
  normal.

  Attributes:
    num_classes: number of logits.
    width: multiplier of the 64, the 32 and the 128, positive; other counts
      follow from these.
    dtype: type the layers compute in.

  Raises:
    ValueError: on a call, if `width` is not positive.

  Reference:
    Huang et al., Densely connected convolutional networks, 2016,
    https://arxiv.org/abs/1608.06993, table 1, with a 3x3 stem of stride one
    and no first pooling for the smaller image.
  """

  num_classes: int
  width: float = 1.0
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    conv = functools.partial(
        _conv, kernel_init=_HE_FAN_IN, dtype=self.dtype)
    norm = functools.partial(_norm, train, dtype=self.dtype)
    x = images.astype(self.dtype)
    x = conv(_channels(self.width, 64), 3, name='stem')(x)
    for i, layers in enumerate((6, 12, 24, 16)):
      if i > 0:
        x = nn.relu(norm(name=f'transition_{i}_norm')(x))
        x = conv(max(1, x.shape[-1] // 2), 1, name=f'transition_{i}')(x)
        x = _pool_by_two(
            functools.partial(nn.avg_pool, count_include_pad=False), x)
      for j in range(layers):
        layer = DenseLayer(
            _channels(self.width, 128), _channels(self.width, 32),
            dtype=self.dtype, name=f'stage_{i + 1}_layer_{j + 1}')
        x = layer(x, train=train)
    x = nn.relu(norm(name='last_norm')(x))
    return _head(x.mean(axis=(1, 2)), self.num_classes, dtype=self.dtype)


MODELS: dict[str, Callable[..., nn.Module]] = {
    'mlp': MLP,
    'small_cnn': SmallCNN,
    'strided_cnn': StridedCNN,
    'resnet20': functools.partial(ResNetCifar, depth=20),
    'resnet56': functools.partial(ResNetCifar, depth=56),
    'resnet18': ResNet18,
    'wrn_28_10': functools.partial(WideResNet, depth=28, widening=10),
    'wrn_22_2': functools.partial(WideResNet, depth=22, widening=2),
    'wrn_16_8': functools.partial(WideResNet, depth=16, widening=8),
    'resnet50': ResNet50,
    'vgg16': VGG16,
    'densenet121': DenseNet121,
}

_WITH_DROPOUT = ('wrn_28_10', 'wrn_22_2', 'wrn_16_8')


def create(
    name: str,
    *,
    num_classes: int,
    width: float = 1.0,
    dtype: jax.typing.DTypeLike = jnp.float32,
    dropout: float = 0.0,
) -> nn.Module:
  """Builds the network of a name.

  Args:
    name: a key of MODELS.
    num_classes: number of logits, at least 1.
    width: multiplier of the hidden channel counts, positive.
    dtype: type the layers compute in; parameters are float32 in any case.
    dropout: rate inside the blocks of a wide ResNet, in [0, 1); for any other
      network it must be 0. The dropout of VGG-16's classifier is part of that
      network and stays at 0.5.

  Returns:
    A module without variables.

  Raises:
    ValueError: if `name` is unknown, `num_classes` or `width` is not positive,
      or `dropout` is outside [0, 1) or nonzero for a network without it.

  Example:
    >>> create('wrn_22_2', num_classes=10, dropout=0.3).depth
    22
  """
  if name not in MODELS:
    raise ValueError(f'name must be one of {", ".join(MODELS)}, got {name!r}')
  if num_classes < 1:
    raise ValueError(f'num_classes must be positive, got {num_classes}')
  if not width > 0:
    raise ValueError(f'width must be positive, got {width}')
  if not 0 <= dropout < 1:
    raise ValueError(f'dropout must be in [0, 1), got {dropout}')
  kwargs = dict(num_classes=num_classes, width=width, dtype=dtype)
  if name in _WITH_DROPOUT:
    kwargs['dropout'] = dropout
  elif dropout:
    raise ValueError(f'dropout must be 0 for {name!r}, got {dropout}')
  return MODELS[name](**kwargs)


def kernel_count(model: nn.Module, image_shape: Sequence[int]) -> int:
  """Counts the entries of a network's kernels, without making any array.

  Kernels are those of convolutions and Dense layers, the stem and the head
  among them; biases and batch-norm parameters are left out.

  Args:
    model: a network of this file.
    image_shape: (H, W, C) of one image.

  Returns:
    The number of entries.

  Example:
    >>> kernel_count(create('mlp', num_classes=10), (28, 28, 1))
    266200
  """
  images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  init = functools.partial(model.init, train=False)
  params = jax.eval_shape(init, jax.random.key(0), images)['params']
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return sum(leaf.size for path, leaf in leaves if path[-1].key == 'kernel')


def matching_width(
    name: str,
    *,
    num_classes: int,
    image_shape: Sequence[int],
    parameters: int,
) -> float:
  """Finds the width at which a dense network is as large as a sparse one.

  The number of kernel entries grows with the width in small jumps. Bisection
  brackets the jump across `parameters` to one part in 1024 and returns the end
  whose count is nearer, the narrower if both are as near. No array is made.

  The published widths match sizes in bytes, in which a sparse network also
  pays one bit of mask for every entry, zero or not. To come near them, pass
  nonzero + total / 32.

  Law: given the count of the network of width 1, the width returned has that
  very count.

  Args:
    name: a key of MODELS.
    num_classes: number of logits, at least 1.
    image_shape: (H, W, C) of one image.
    parameters: number of kernel entries wanted.

  Returns:
    The width, positive, for `create`.

  Raises:
    ValueError: if `name` is unknown, `num_classes` is not positive, or even
      one channel per layer makes more than `parameters` entries.

  Reference:
    Evci et al., Rigging the lottery, 2020, https://arxiv.org/abs/1911.11134,
    the small-dense baseline. ResNet-50 against the Erdos-Renyi-kernel network
    at densities 0.2, 0.1, 0.05 and 0.035 is published with widths 0.465, 0.34,
    0.26 and 0.231; with the bits of the mask this finds 0.459, 0.337, 0.257
    and 0.228, without them 0.425, 0.289, 0.193 and 0.156.
  """
  def count(width):
    return kernel_count(
        create(name, num_classes=num_classes, width=width), image_shape)

  return widths.matching(count, parameters, name)
