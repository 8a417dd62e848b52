"""Batches of images as a pure function of a seed and a step.

Small sets are whole in memory. ImageNet stays on disk and is decoded when a
batch asks for it. Either way the state of a training stream is one int, the
step, so that a run resumes exactly where it stopped; and what several
processes see, put side by side, is what one process would see.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
import io
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import batching

_LOAD_CHUNK = 1024  # Examples read at once; one by one is six times slower.
_CROP_ATTEMPTS = 10
# Tags that keep the random streams of one seed apart.
_ORDER, _AUGMENTATION = 1, 2


class Augmentation(NamedTuple):
  """What is done to the training images of a data set."""
  pad: int = 0  # Zeros on every side before a random crop to the old size.
  flip: bool = False  # Mirrors left and right half of the time.
  resized_crop: bool = False  # Crops at random size and ratio, then resizes.


class Dataset(NamedTuple):
  """What is known of a data set before it is read."""
  num_classes: int
  image_shape: tuple[int, int, int]  # Height, width, channels, as batched.
  mean: tuple[float, ...]  # Per channel, of pixels in [0, 1].
  std: tuple[float, ...]  # Per channel, of pixels in [0, 1].
  augmentation: Augmentation
  num_train: int  # Examples of the training split.
  eval_split: str = 'test'


DATASETS = {
    'digits': Dataset(
        10, (8, 8, 1), (0.3054,), (0.3758,), Augmentation(), 1_437),
    'mnist': Dataset(
        10, (28, 28, 1), (0.1307,), (0.3081,), Augmentation(), 60_000),
    'fashion_mnist': Dataset(
        10, (28, 28, 1), (0.2860,), (0.3530,), Augmentation(2, flip=True),
        60_000),
    'cifar10': Dataset(
        10, (32, 32, 3), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616),
        Augmentation(4, flip=True), 50_000),
    'cifar100': Dataset(
        100, (32, 32, 3), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762),
        Augmentation(4, flip=True), 50_000),
    'imagenet2012': Dataset(
        1000, (224, 224, 3), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225),
        Augmentation(flip=True, resized_crop=True), 1_281_167, 'validation'),
}


class Split(NamedTuple):
  """The examples of one split: two arrays, or a source to decode from."""
  name: str  # A key of DATASETS.
  images: np.ndarray | None  # uint8[N, H, W, C].
  labels: np.ndarray | None  # int32[N].
  # In place of the arrays: random access to {'image': JPEG bytes, 'label'}.
  source: Sequence[Mapping[str, Any]] | None = None

  @property
  def num_examples(self) -> int:
    return len(self.labels if self.source is None else self.source)


class _Draws(NamedTuple):
  """Uniform numbers in [0, 1), a row per image, that settle an augmentation."""
  corner: np.ndarray  # float64[B, 2], where a crop lies: down, across.
  flip: np.ndarray  # float64[B].
  area: np.ndarray  # float64[B, _CROP_ATTEMPTS].
  ratio: np.ndarray  # float64[B, _CROP_ATTEMPTS].


def load(
    name: str, split: str,
    data_dir: str | os.PathLike | None = None) -> Split:
  """Opens one split of a prepared data set, as TFDS names it; never downloads.

  It is in memory unless it is of imagenet2012, in the order of the files.
  Without `data_dir` it is in TFDS's default folder, digits in a cache folder. A
  ValueError or FileNotFoundError names what does not fit or is not there.
  """
  import tensorflow_datasets as tfds
  from experiments import datasets
  from experiments.image import builders
  folder = datasets.locate(builders.BUILDERS, name, data_dir,
                           'experiments.image.prepare')
  with datasets.reading(folder):
    builder = tfds.builder_from_directory(folder, file_format='array_record')
    if not DATASETS[name].augmentation.resized_crop:
      return _in_memory(name, builder.as_data_source(split))
    as_bytes = {'image': tfds.decode.SkipDecoding()}
    source = builder.as_data_source(split, decoders=as_bytes)
    return Split(name, None, None, source)


def train_batches(
    split: Split, *, batch_size: int, seed: int, step: int = 0,
    augment: bool = True, process_index: int = 0,
    process_count: int = 1) -> Iterator[dict[str, np.ndarray]]:
  """Iterates without end over shuffled, augmented batches, from that of `step`.

  Every epoch is a permutation of the split, from the seed and the epoch,
  without the examples that do not fill a last batch; the augmentation of a
  batch comes from the seed and the step. Each process takes its part of what is
  drawn for all.

  Laws: the stream from `step` k is the stream from step 0 without its first k
  batches; the batches of all processes, concatenated, are those of one process.

  Yields {'image': uint8[b, H, W, C], 'label': int32[b]}.
  """
  rows = batching.process_rows(batch_size, process_index, process_count)
  batches_per_epoch = split.num_examples // batch_size
  pool = _thread_pool()
  epoch_of_order = None
  while True:
    epoch, batch = divmod(step, batches_per_epoch)
    if epoch != epoch_of_order:
      order = np.random.default_rng(
          [seed, epoch, _ORDER]).permutation(split.num_examples)
      epoch_of_order = epoch
    indices = order[batch * batch_size:(batch + 1) * batch_size][rows]
    draws = _draw(seed, step, batch_size, rows) if augment else None
    yield _read(split, indices, draws, pool)
    step += 1


def eval_batches(
    split: Split, *, batch_size: int, process_index: int = 0,
    process_count: int = 1) -> Iterator[dict[str, np.ndarray]]:
  """Iterates once over a split, in order, in batches of one shape.

  The last is filled up with black images of label 0 and weight 0.

  Law: over all batches and processes the examples of weight 1 are the split,
  each once.

  Yields what `train_batches` does, and 'weight': float32[b].
  """
  rows = batching.process_rows(batch_size, process_index, process_count)
  pool = _thread_pool()
  for start in range(0, split.num_examples, batch_size):
    indices = np.arange(start, start + batch_size)[rows]
    is_real = indices < split.num_examples
    batch = _read(split, indices[is_real], None, pool)
    batch['weight'] = np.ones(is_real.sum(), np.float32)
    missing = [0, len(indices) - is_real.sum()]
    yield {key: np.pad(value, [missing] + [(0, 0)] * (value.ndim - 1))
           for key, value in batch.items()}


def normalise(images: jax.Array, name: str) -> jax.Array:
  """Pixels uint8[..., C] about zero mean and unit variance of the data set."""
  channel = (1,) * (images.ndim - 1) + (-1,)
  mean = jnp.asarray(DATASETS[name].mean, jnp.float32).reshape(channel)
  std = jnp.asarray(DATASETS[name].std, jnp.float32).reshape(channel)
  return (images.astype(jnp.float32) / 255 - mean) / std


def _in_memory(name, source):
  num_examples = len(source)
  images = np.empty((num_examples, *DATASETS[name].image_shape), np.uint8)
  labels = np.empty(num_examples, np.int32)
  for start in range(0, num_examples, _LOAD_CHUNK):
    indices = range(start, min(start + _LOAD_CHUNK, num_examples))
    for i, example in zip(indices, source.__getitems__(indices)):
      images[i], labels[i] = example['image'], example['label']
  return Split(name, images, labels)


def _thread_pool():
  # Has no thread before it has work, and ends with the iterator that holds it.
  # Not shut down by hand: an iterator left open at exit is too late for that.
  return futures.ThreadPoolExecutor(os.cpu_count())


def _draw(seed, step, batch_size, rows):
  """Draws for a whole batch and keeps the rows of one process."""
  rng = np.random.default_rng([seed, step, _AUGMENTATION])
  draws = _Draws(
      rng.random((batch_size, 2)), rng.random(batch_size),
      rng.random((batch_size, _CROP_ATTEMPTS)),
      rng.random((batch_size, _CROP_ATTEMPTS)))
  return _Draws(*(draw[rows] for draw in draws))


def _read(split, indices, draws, pool):
  """One batch, augmented unless `draws` is None."""
  if split.source is not None:
    return _decode_batch(split, indices, draws, pool)
  images, labels = split.images[indices], split.labels[indices]
  augmentation = DATASETS[split.name].augmentation
  if draws is not None and augmentation.pad:
    images = _crop(images, augmentation.pad, draws.corner)
  if draws is not None and augmentation.flip:
    images = np.where((draws.flip < 0.5)[:, None, None, None],
                      images[:, :, ::-1], images)
  return {'image': images, 'label': labels}


def _crop(images, pad, uniforms):
  """Pads with zeros and crops back to the old size at a random place."""
  size, height, width, channels = images.shape
  row = width * channels
  padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  padded = padded.reshape(size, height + 2 * pad, -1)
  # Whole rows are copied at once: twice as fast as pixel by pixel.
  windows = np.lib.stride_tricks.sliding_window_view(padded, row, axis=2)
  top, left = (uniforms * (2 * pad + 1)).astype(np.int64).T
  image = np.arange(size)[:, None]
  cropped = windows[
      image, top[:, None] + np.arange(height), left[:, None] * channels]
  return cropped.reshape(images.shape)


def _decode_batch(split, indices, draws, pool):
  shape = DATASETS[split.name].image_shape
  images = np.zeros((len(indices), *shape), np.uint8)
  labels = np.zeros(len(indices), np.int32)
  if not len(indices):
    return {'image': images, 'label': labels}
  examples = split.source.__getitems__(indices.tolist())

  def decode(i):
    one = None if draws is None else _Draws(*(draw[i] for draw in draws))
    images[i] = _decode(examples[i]['image'], shape[0], one)
    labels[i] = examples[i]['label']

  for _ in pool.map(decode, range(len(indices))):
    pass  # Raises here what was raised in a thread.
  return {'image': images, 'label': labels}


def _decode(encoded, size, draws):
  """Decodes a box of a JPEG, scaled to size x size: random, or the centre."""
  from PIL import Image
  image = Image.open(io.BytesIO(encoded))
  box = (_centre_box(*image.size) if draws is None
         else _random_box(*image.size, draws))
  image, box = _shrink_on_decoding(image, box, size)
  pixels = np.asarray(image.convert('RGB').resize(
      (size, size), Image.Resampling.BILINEAR, box=box))
  if draws is not None and draws.flip < 0.5:
    pixels = pixels[:, ::-1]
  return pixels


def _centre_box(width, height):
  """The central 224 of an image whose shorter side is scaled to 256."""
  side = min(width, height) * 224 / 256
  left, top = (width - side) / 2, (height - side) / 2
  return left, top, left + side, top + side


def _random_box(width, height, draws):
  """A box of 8 to 100 % of the area, of ratio 3/4 to 4/3: Inception's crop."""
  area = width * height * (0.08 + 0.92 * draws.area)
  ratio = (3 / 4) * (16 / 9) ** draws.ratio  # Uniform in its logarithm.
  box_width = np.round(np.sqrt(area * ratio)).astype(int)
  box_height = np.round(np.sqrt(area / ratio)).astype(int)
  fits = (box_width <= width) & (box_height <= height)
  if not fits.any():
    return _centre_box(width, height)
  box_width, box_height = (int(x[fits][0]) for x in (box_width, box_height))
  top = int(draws.corner[0] * (height - box_height + 1))
  left = int(draws.corner[1] * (width - box_width + 1))
  return left, top, left + box_width, top + box_height


def _shrink_on_decoding(image, box, size):
  """Has a JPEG decoded at 1/2, 1/4 or 1/8 where the box stays large enough."""
  width, height = image.size
  scale = size / min(box[2] - box[0], box[3] - box[1])
  if scale < 1:
    image.draft('RGB', (int(width * scale) + 1, int(height * scale) + 1))
  x, y = image.size[0] / width, image.size[1] / height
  return image, (box[0] * x, box[1] * y, min(box[2] * x, image.size[0]),
                 min(box[3] * y, image.size[1]))
