"""Image data sets as TFDS builders that need neither network nor TensorFlow.

The builders read the files their authors published and write them as
array_record, with the pixels as plain bytes, under the name TFDS has for the
set. What they write is read with tfds.builder_from_directory, as is what TFDS
itself prepared.
"""

import codecs
import functools
import gzip
import io
import pathlib
import pickle
import tarfile
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from experiments import datasets


class Examples(NamedTuple):
  """The examples of one split."""
  images: np.ndarray  # uint8[N, H, W, C].
  labels: np.ndarray  # integer[N], in [0, number of classes).


class _ImageBuilder(datasets.LocalBuilder, skip_registration=True):
  """What the builders share: a subclass says only how its files are read."""

  IMAGE_SHAPE: tuple[int, int, int]
  NUM_CLASSES = 10

  def _info(self):
    image = tfds.features.Tensor(
        shape=self.IMAGE_SHAPE, dtype=np.uint8, encoding='bytes')
    label = tfds.features.ClassLabel(num_classes=self.NUM_CLASSES)
    return tfds.core.DatasetInfo(
        builder=self,
        description=f'{self.name}, with the pixels as bytes.',
        features=tfds.features.FeaturesDict({'image': image, 'label': label}),
        supervised_keys=('image', 'label'))

  def _generate_examples(self, examples):
    for i, (image, label) in enumerate(zip(*examples)):
      yield i, {'image': image, 'label': int(label)}

  def check(self, split: str, examples: Examples) -> None:
    images, labels = examples
    if images.shape != (len(labels), *self.IMAGE_SHAPE):
      raise ValueError(
          f'{self.name}, split {split!r}: expected {len(labels)} images (one '
          f'per label) of shape {self.IMAGE_SHAPE}; got shape {images.shape}')
    if not len(labels) or not (
        0 <= labels.min() <= labels.max() < self.NUM_CLASSES):
      raise ValueError(
          f'{self.name}, split {split!r}: expected labels in '
          f'[0, {self.NUM_CLASSES}); got {sorted(set(labels.tolist()))[:20]}')


class Digits(_ImageBuilder, skip_registration=True):
  """The 1797 handwritten digits that come with scikit-learn.

  Grey levels 0..16 become 0..255. Every fifth example of the list shuffled
  within its class and sorted by class is for test: 360, every class in
  proportion, the same ones always.
  """

  IMAGE_SHAPE = (8, 8, 1)

  def read(self, source: pathlib.Path | None) -> dict[str, Examples]:
    from sklearn import datasets
    digits = datasets.load_digits()
    images = np.round(digits.images[..., None] * (255 / 16)).astype(np.uint8)
    labels = digits.target
    # RandomState, because NumPy froze its stream.
    order = np.random.RandomState(0).permutation(len(labels))
    order = order[np.argsort(labels[order], kind='stable')]
    is_test = np.arange(len(order)) % 5 == 0
    return {split: Examples(images[chosen], labels[chosen])
            for split, chosen in (('train', order[~is_test]),
                                  ('test', order[is_test]))}


class _Idx(_ImageBuilder, skip_registration=True):
  """Sets of four gzipped files in the idx format of MNIST."""

  IMAGE_SHAPE = (28, 28, 1)
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
      'A folder with {train,t10k}-{images-idx3,labels-idx1}-ubyte.gz.')

  def read(self, source: pathlib.Path | None) -> dict[str, Examples]:
    names = [f'{split}-{part}-ubyte.gz' for split in ('train', 't10k')
             for part in ('images-idx3', 'labels-idx1')]
    datasets.require_files(source, names)
    train_images, train_labels, test_images, test_labels = (
        read_idx(source / name) for name in names)
    return {'train': Examples(train_images[..., None], train_labels),
            'test': Examples(test_images[..., None], test_labels)}


class Mnist(_Idx, skip_registration=True):
  """MNIST: LeCun, Cortes and Burges, handwritten digits."""


class FashionMnist(_Idx, skip_registration=True):
  """Fashion-MNIST: Xiao et al., 2017, articles of clothing."""


class _Cifar(_ImageBuilder, skip_registration=True):
  """The python version of the CIFAR sets: a folder of pickles."""

  IMAGE_SHAPE = (32, 32, 3)
  FOLDER: str
  ARCHIVE: str
  FILES: dict[str, tuple[str, ...]]  # Per split.
  LABEL_KEY: bytes

  def read(self, source: pathlib.Path | None) -> dict[str, Examples]:
    names = [name for files in self.FILES.values() for name in files]
    if not (source / self.FOLDER).is_dir() and (
        source / self.ARCHIVE).is_file():
      blobs = _read_archive(source / self.ARCHIVE, self.FOLDER, names)
    else:
      inner = source / self.FOLDER
      source = inner if inner.is_dir() else source
      datasets.require_files(source, names, f', nor {self.ARCHIVE}')
      blobs = {name: (source / name).read_bytes() for name in names}
    parts = {name: self._unpack(name, blobs.pop(name)) for name in names}
    return {split: Examples(*map(np.concatenate, zip(*map(parts.get, files))))
            for split, files in self.FILES.items()}

  def _unpack(self, name, blob):
    with datasets.reading(name):
      content = _ArrayUnpickler(io.BytesIO(blob), encoding='bytes').load()
      labels = np.asarray(content[self.LABEL_KEY], np.int64)
      pixels = np.asarray(content[b'data'], np.uint8).reshape(-1, 3, 32, 32)
      if len(pixels) != len(labels):
        raise ValueError(f'{len(pixels)} images, {len(labels)} labels')
    return pixels.transpose(0, 2, 3, 1), labels


class Cifar10(_Cifar, skip_registration=True):
  """CIFAR-10: Krizhevsky, 2009."""
  FOLDER = 'cifar-10-batches-py'
  ARCHIVE = 'cifar-10-python.tar.gz'
  FILES = {'train': tuple(f'data_batch_{i}' for i in range(1, 6)),
           'test': ('test_batch',)}
  LABEL_KEY = b'labels'
  MANUAL_DOWNLOAD_INSTRUCTIONS = f'A folder with {FOLDER} or {ARCHIVE}.'


class Cifar100(_Cifar, skip_registration=True):
  """CIFAR-100: Krizhevsky, 2009, with its 100 fine labels."""
  NUM_CLASSES = 100
  FOLDER = 'cifar-100-python'
  ARCHIVE = 'cifar-100-python.tar.gz'
  FILES = {'train': ('train',), 'test': ('test',)}
  LABEL_KEY = b'fine_labels'
  MANUAL_DOWNLOAD_INSTRUCTIONS = f'A folder with {FOLDER} or {ARCHIVE}.'


BUILDERS = {'digits': Digits, 'mnist': Mnist, 'fashion_mnist': FashionMnist,
            'cifar10': Cifar10, 'cifar100': Cifar100}
# (name, source, data_dir) -> the folder of the set.
prepare = functools.partial(datasets.prepare, BUILDERS)


def read_idx(path: pathlib.Path) -> np.ndarray:
  """Reads a gzipped idx file of bytes, in the rank and shape that it states.

  Its first four bytes are 0, 0, 8 and the rank; the dimensions follow, four
  bytes each with the highest first; then the data.
  """
  with datasets.reading(path):
    content = gzip.decompress(path.read_bytes())
    if content[:3] != b'\x00\x00\x08':
      raise ValueError(f'not an idx file of bytes: {content[:4]!r}')
    start = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:start], '>u4')
    return np.frombuffer(content[start:], np.uint8).reshape(shape)


class _ArrayUnpickler(pickle.Unpickler):
  """Reads arrays, lists and strings; no other type, so no code is run."""

  def find_class(self, module, name):
    if name == '_reconstruct' and module in (
        'numpy.core.multiarray', 'numpy._core.multiarray'):
      return np.zeros(0).__reduce__()[0]
    allowed = {('numpy', 'ndarray'): np.ndarray, ('numpy', 'dtype'): np.dtype,
               ('_codecs', 'encode'): codecs.encode}
    if (module, name) not in allowed:
      raise pickle.UnpicklingError(f'it asks for {module}.{name}')
    return allowed[module, name]


def _read_archive(path, folder, names):
  members = {f'{folder}/{name}': name for name in names}
  blobs = {}
  with datasets.reading(path), tarfile.open(path) as archive:
    for member in archive:  # In order: a gzip stream cannot seek backwards.
      if member.name in members:
        blobs[members[member.name]] = archive.extractfile(member).read()
  missing = sorted(set(names) - set(blobs))
  if missing:
    raise FileNotFoundError(f'{path}: no {folder}/ with {", ".join(missing)}')
  return blobs
