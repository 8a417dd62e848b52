"""The data of the image experiment: builders, batches, prefetching."""

import gc
import gzip
import io
import os
import pathlib
import pickle
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax.numpy as jnp
import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

from experiments import batching
from experiments import datasets
from experiments.image import builders
from experiments.image import input_pipeline

_ROOT = pathlib.Path(__file__).parent.parent
_IDX_FILES = (
    'train-images-idx3-ubyte.gz', 'train-labels-idx1-ubyte.gz',
    't10k-images-idx3-ubyte.gz', 't10k-labels-idx1-ubyte.gz')


def _temporary_folder(test):
  return pathlib.Path(test.enterContext(tempfile.TemporaryDirectory()))


def _python(*arguments, **environment):
  return subprocess.Popen(
      [sys.executable, *arguments], cwd=_ROOT, text=True,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu', **environment},
      stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _numbered(num_examples, shape):
  """Images that differ from one another, and a label for each."""
  rng = np.random.default_rng(num_examples)
  images = rng.integers(0, 256, (num_examples, *shape), np.uint8)
  return images, np.arange(num_examples) % 10


def _write_idx(path, array):
  header = bytes([0, 0, 8, array.ndim])
  header += b''.join(size.to_bytes(4, 'big') for size in array.shape)
  path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def _write_mnist(folder):
  train, test = _numbered(30, (28, 28)), _numbered(20, (28, 28))
  for name, array in zip(_IDX_FILES, (*train, *test)):
    _write_idx(folder / name, array)
  return train, test


def _pickled(images, labels, key=b'labels'):
  data = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
  return pickle.dumps({b'data': data, key: labels.tolist()}, protocol=2)


def _write_cifar10(folder):
  """Writes the six files and returns (images, labels) of train and test."""
  folder.mkdir(parents=True)
  images, labels = _numbered(35, (32, 32, 3))
  test = _numbered(15, (32, 32, 3))
  for i in range(5):
    part = slice(7 * i, 7 * i + 7)
    (folder / f'data_batch_{i + 1}').write_bytes(
        _pickled(images[part], labels[part]))
  (folder / 'test_batch').write_bytes(_pickled(*test))
  return (images, labels), test


def _as_set(images, labels):
  return {(image.tobytes(), int(label))
          for image, label in zip(images, labels)}


def _array_split(name, num_examples):
  shape = input_pipeline.DATASETS[name].image_shape
  images, labels = _numbered(num_examples, shape)
  return input_pipeline.Split(name, images, labels.astype(np.int32))


def _take(iterator, count):
  return [next(iterator) for _ in range(count)]


def _concatenated(batches):
  return {key: np.concatenate([batch[key] for batch in batches])
          for key in batches[0]}


def _assert_same_batches(actual, expected):
  np.testing.assert_equal(len(actual), len(expected))
  for one, other in zip(actual, expected):
    np.testing.assert_equal(one, other)


class DigitsTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.cache = cls.enterClassContext(tempfile.TemporaryDirectory())
    with mock.patch.dict(os.environ, {'XDG_CACHE_HOME': cls.cache}):
      cls.train = input_pipeline.load('digits', 'train')
      cls.test = input_pipeline.load('digits', 'test')

  def setUp(self):
    super().setUp()
    self.enterContext(
        mock.patch.dict(os.environ, {'XDG_CACHE_HOME': self.cache}))

  def test_shapes_and_types_are_as_stated(self):
    self.assertEqual(self.train.images.shape, (1437, 8, 8, 1))
    self.assertEqual(self.test.images.shape, (360, 8, 8, 1))
    self.assertEqual(self.train.images.dtype, np.uint8)
    self.assertEqual(self.train.labels.dtype, np.int32)
    self.assertEqual(self.train.images.max(), 255)

  def test_splits_are_all_of_the_digits_of_scikit_learn(self):
    from sklearn import datasets
    digits = datasets.load_digits()
    images = np.concatenate([self.train.images, self.test.images])
    labels = np.concatenate([self.train.labels, self.test.labels])
    levels = np.round(images[..., 0] * (16 / 255))
    ours = sorted((x.tobytes(), y) for x, y in zip(levels, labels))
    theirs = sorted((x.tobytes(), y)
                    for x, y in zip(digits.images, digits.target))
    self.assertEqual(ours, theirs)

  def test_every_class_is_in_both_splits_in_proportion(self):
    train, test = np.bincount(self.train.labels), np.bincount(self.test.labels)
    np.testing.assert_allclose(test, (train + test) / 5, atol=1)

  def test_order_is_the_same_when_prepared_anew(self):
    folder = _temporary_folder(self)
    builders.prepare('digits', None, folder)
    again = input_pipeline.load('digits', 'train', folder)
    np.testing.assert_equal(again.images, self.train.images)
    np.testing.assert_equal(again.labels, self.train.labels)

  def test_second_load_does_not_prepare(self):
    with mock.patch.object(
        builders.Digits, 'download_and_prepare', side_effect=AssertionError):
      input_pipeline.load('digits', 'test')

  def test_stored_where_tfds_looks(self):
    folder = pathlib.Path(self.cache, 'sparse_jax', 'tfds')
    found = datasets.find('digits', folder)
    self.assertEqual(found, folder / 'digits' / '1.0.0')
    self.assertEqual(
        tfds.builder_from_directory(found).info.features['label'].num_classes,
        10)

  def test_part_of_a_split_can_be_loaded(self):
    part = input_pipeline.load('digits', 'train[:100]')
    np.testing.assert_equal(part.images, self.train.images[:100])

  def test_mean_and_std_are_those_of_the_training_set(self):
    pixels = self.train.images / 255
    digits = input_pipeline.DATASETS['digits']
    # Half of the last digit given.
    np.testing.assert_allclose(pixels.mean(), digits.mean[0], atol=5e-5)
    np.testing.assert_allclose(pixels.std(), digits.std[0], atol=5e-5)

  def test_normalised_images_have_zero_mean_and_unit_std(self):
    images = input_pipeline.normalise(jnp.asarray(self.train.images), 'digits')
    self.assertEqual(images.dtype, jnp.float32)
    # The figures are given to four digits.
    np.testing.assert_allclose(images.mean(), 0, atol=1e-3)
    np.testing.assert_allclose(images.std(), 1, atol=1e-3)

  def test_unknown_split_is_named(self):
    with self.assertRaisesRegex(ValueError, 'validation.*train.*test'):
      input_pipeline.load('digits', 'validation')

  def test_two_processes_may_prepare_at_once(self):
    folder = _temporary_folder(self)
    code = ('from experiments.image import input_pipeline as data;'
            'print(data.load("digits", "train").labels.sum())')
    started = [_python('-c', code, XDG_CACHE_HOME=str(folder))
               for _ in range(2)]
    for process in started:
      output, errors = process.communicate(timeout=120)
      self.assertEqual(output.strip(), str(self.train.labels.sum()), errors)
    self.assertEqual(os.listdir(folder / 'sparse_jax' / 'tfds'), ['digits'])

  def test_threads_that_prepare_at_once_get_one_set(self):
    folder = _temporary_folder(self)
    barrier = threading.Barrier(2)
    move = datasets._move

    def move_together(made, place):
      barrier.wait(60)  # Both have written their own by now.
      return move(made, place)

    found = []
    prepare = lambda: found.append(builders.prepare('digits', None, folder))
    with mock.patch.object(datasets, '_move', move_together):
      threads = [threading.Thread(target=prepare) for _ in range(2)]
      for thread in threads:
        thread.start()
      for thread in threads:
        thread.join()
    self.assertEqual(found, [folder / 'digits' / '1.0.0'] * 2)
    self.assertEqual(os.listdir(folder), ['digits'])

  def test_remains_of_a_killed_preparation_are_not_taken_for_the_set(self):
    folder = _temporary_folder(self)
    (folder / '.digits.abc' / 'digits' / 'incomplete.X_1.0.0').mkdir(
        parents=True)
    (folder / 'digits' / '1.0.0').mkdir(parents=True)
    builders.prepare('digits', None, folder)
    split = input_pipeline.load('digits', 'test', folder)
    self.assertEqual(split.num_examples, 360)

  def test_place_taken_by_something_else_is_an_error(self):
    folder = _temporary_folder(self)
    (folder / 'digits' / '1.0.0').mkdir(parents=True)
    (folder / 'digits' / '1.0.0' / 'notes.txt').write_text('Not a data set.')
    with self.assertRaisesRegex(OSError, 'digits/1.0.0'):
      builders.prepare('digits', None, folder)
    self.assertEqual(os.listdir(folder), ['digits'])


class BuildersTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.source = _temporary_folder(self)
    self.data_dir = _temporary_folder(self)

  def _assert_fails(self, error, message, name):
    """It fails so, and leaves nothing."""
    with self.assertRaisesRegex(error, message):
      builders.prepare(name, self.source, self.data_dir)
    self.assertEmpty(os.listdir(self.data_dir))

  def _assert_holds(self, name, train, test):
    for split, expected in (('train', train), ('test', test)):
      loaded = input_pipeline.load(name, split, self.data_dir)
      self.assertLen(loaded.labels, len(expected[1]))
      self.assertEqual(
          _as_set(loaded.images, loaded.labels), _as_set(*expected))

  @parameterized.parameters('mnist', 'fashion_mnist')
  def test_idx_files_are_kept_exactly(self, name):
    train, test = _write_mnist(self.source)
    path = builders.prepare(name, self.source, self.data_dir)
    self.assertEqual(path, self.data_dir / name / '1.0.0')
    self._assert_holds(name, train, test)

  def test_cifar10_files_are_kept_exactly(self):
    train, test = _write_cifar10(self.source / 'cifar-10-batches-py')
    builders.prepare('cifar10', self.source, self.data_dir)
    self._assert_holds('cifar10', train, test)

  def test_cifar10_source_may_be_the_innermost_folder(self):
    folder = self.source / 'cifar-10-batches-py'
    train, test = _write_cifar10(folder)
    builders.prepare('cifar10', folder, self.data_dir)
    self._assert_holds('cifar10', train, test)

  def test_cifar10_source_may_hold_the_archive(self):
    folder = _temporary_folder(self)
    train, test = _write_cifar10(folder / 'cifar-10-batches-py')
    with tarfile.open(self.source / 'cifar-10-python.tar.gz', 'w:gz') as tar:
      tar.add(folder / 'cifar-10-batches-py', 'cifar-10-batches-py')
    builders.prepare('cifar10', self.source, self.data_dir)
    self._assert_holds('cifar10', train, test)

  def test_cifar100_has_the_fine_labels(self):
    images, _ = _numbered(20, (32, 32, 3))
    labels = np.arange(80, 100)
    folder = self.source / 'cifar-100-python'
    folder.mkdir()
    for name in ('train', 'test'):
      (folder / name).write_bytes(_pickled(images, labels, b'fine_labels'))
    builders.prepare('cifar100', self.source, self.data_dir)
    self._assert_holds('cifar100', (images, labels), (images, labels))

  def test_pickles_of_python_2_are_read(self):
    """The opcodes of the official files: old module name, integer flags."""
    data = bytes(range(256)) * 12
    blob = (
        b'\x80\x02}(U\x04data'
        b'cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85'
        b'U\x01b\x87R(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01'
        b'\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T'
        + len(data).to_bytes(4, 'little') + data
        + b'tbU\x06labels]K\x07au.')
    builder = builders.Cifar10(data_dir=self.data_dir)
    images, labels = builder._unpack('data_batch_1', blob)
    expected = np.frombuffer(data, np.uint8).reshape(3, 32, 32)
    np.testing.assert_equal(images[0], expected.transpose(1, 2, 0))
    np.testing.assert_equal(labels, [7])

  def test_pickle_that_would_run_code_is_refused(self):
    folder = self.source / 'cifar-10-batches-py'
    _write_cifar10(folder)
    marker = self.source / 'ran'
    (folder / 'data_batch_2').write_bytes(
        b"cos\nsystem\n(S'touch %s'\ntR." % str(marker).encode())
    self._assert_fails(ValueError, 'data_batch_2.*os.system', 'cifar10')
    self.assertFalse(marker.exists())

  @parameterized.named_parameters(
      ('truncated', lambda blob: blob[:1000]),
      ('empty', lambda blob: b''),
      ('another_thing', lambda blob: pickle.dumps([1, 2])),
      ('without_labels', lambda blob: blob.replace(b'labels', b'nothin')),
      ('fewer_labels',
       lambda blob: _pickled(_numbered(3, (32, 32, 3))[0], np.arange(2))))
  def test_corrupt_pickle_is_named(self, corrupt):
    folder = self.source / 'cifar-10-batches-py'
    _write_cifar10(folder)
    path = folder / 'data_batch_4'
    path.write_bytes(corrupt(path.read_bytes()))
    self._assert_fails(ValueError, 'data_batch_4', 'cifar10')

  def test_truncated_archive_is_named(self):
    folder = _temporary_folder(self)
    _write_cifar10(folder / 'cifar-10-batches-py')
    archive = self.source / 'cifar-10-python.tar.gz'
    with tarfile.open(archive, 'w:gz') as tar:
      tar.add(folder / 'cifar-10-batches-py', 'cifar-10-batches-py')
    archive.write_bytes(archive.read_bytes()[:50000])
    self._assert_fails(ValueError, 'cifar-10-python.tar.gz', 'cifar10')

  @parameterized.named_parameters(
      ('truncated', lambda blob: blob[:-100]),
      ('not_gzip', lambda blob: b'<html>not found</html>'),
      ('flipped_bit', lambda blob: blob[:99] + bytes([blob[99] ^ 1])
       + blob[100:]),
      ('not_idx', lambda blob: gzip.compress(b'hello')),
      ('too_short', lambda blob: gzip.compress(gzip.decompress(blob)[:-1])),
      ('without_header', lambda blob: gzip.compress(b'\0\0\x08\x03\0')))
  def test_corrupt_idx_file_is_named(self, corrupt):
    _write_mnist(self.source)
    path = self.source / _IDX_FILES[2]
    path.write_bytes(corrupt(path.read_bytes()))
    self._assert_fails(ValueError, _IDX_FILES[2], 'mnist')

  @parameterized.named_parameters(
      ('fewer_labels', _IDX_FILES[3], np.arange(10), 'expected 10 images'),
      ('label_out_of_range', _IDX_FILES[3], np.full(20, 10), r'\[0, 10\)'),
      ('other_size', _IDX_FILES[2], np.zeros((20, 8, 8)), '8, 8, 1'))
  def test_files_that_do_not_fit_are_refused(self, name, content, message):
    _write_mnist(self.source)
    _write_idx(self.source / name, content)
    self._assert_fails(ValueError, message, 'mnist')

  def test_missing_files_are_listed(self):
    _write_mnist(self.source)
    os.remove(self.source / _IDX_FILES[0])
    os.remove(self.source / _IDX_FILES[3])
    self._assert_fails(
        FileNotFoundError, f'{_IDX_FILES[0]}, {_IDX_FILES[3]}', 'mnist')

  def test_empty_source_says_what_cifar10_needs(self):
    self._assert_fails(
        FileNotFoundError, 'empty.*cifar-10-batches-py or', 'cifar10')

  def test_source_of_another_set_says_what_cifar10_needs(self):
    _write_mnist(self.source)
    self._assert_fails(
        FileNotFoundError, 'data_batch_1.*cifar-10-python.tar.gz', 'cifar10')

  @parameterized.parameters(None, '')
  def test_source_must_be_given(self, source):
    with self.assertRaisesRegex(ValueError, 'source must be given for cifar10'):
      builders.prepare('cifar10', source, self.data_dir)

  def test_source_that_does_not_exist_is_named(self):
    with self.assertRaisesRegex(FileNotFoundError, 'nowhere'):
      builders.prepare('mnist', self.source / 'nowhere', self.data_dir)

  def test_unknown_name_lists_the_known(self):
    self._assert_fails(ValueError, "'cifar11'.*cifar100.*digits", 'cifar11')

  def test_imagenet_is_left_to_tfds(self):
    self._assert_fails(ValueError, 'TensorFlow', 'imagenet2012')

  def test_failure_while_writing_leaves_nothing(self):
    _write_mnist(self.source)

    def fail_late(builder, examples):
      yield 0, {'image': examples.images[0], 'label': 0}
      raise KeyboardInterrupt

    with mock.patch.object(builders.Mnist, '_generate_examples', fail_late):
      with self.assertRaises(KeyboardInterrupt):
        builders.prepare('mnist', self.source, self.data_dir)
    self.assertEmpty(os.listdir(self.data_dir))

  def test_prepared_set_is_left_as_it_is(self):
    train, test = _write_mnist(self.source)
    path = builders.prepare('mnist', self.source, self.data_dir)
    again = builders.prepare('mnist', None, self.data_dir)
    self.assertEqual(again, path)
    self._assert_holds('mnist', train, test)

  def test_highest_version_is_found(self):
    _write_mnist(self.source)
    path = builders.prepare('mnist', self.source, self.data_dir)
    for version in ('3.0.1', '10.0.0', 'incomplete.X_11.0.0'):
      (path.parent / version).mkdir()
      (path.parent / version / 'dataset_info.json').write_text(
          '{"fileFormat": "array_record"}')
    self.assertEqual(
        datasets.find('mnist', self.data_dir), path.parent / '10.0.0')


class PrepareTest(parameterized.TestCase):

  def test_binary_prepares_once_then_says_so(self):
    source, data_dir = _temporary_folder(self), _temporary_folder(self)
    _write_mnist(source)
    command = ('-m', 'experiments.image.prepare', '--dataset=fashion_mnist',
               f'--source={source}', f'--data_dir={data_dir}')
    for message in ('Prepared fashion_mnist', 'already prepared'):
      process = _python(*command)
      output, errors = process.communicate(timeout=120)
      self.assertEqual(process.returncode, 0, errors)
      self.assertIn(message, output)

  def test_binary_fails_with_one_line(self):
    process = _python(
        '-m', 'experiments.image.prepare', '--dataset=cifar10',
        f'--data_dir={_temporary_folder(self)}')
    _, errors = process.communicate(timeout=120)
    self.assertEqual(process.returncode, 2)
    self.assertIn('source must be given for cifar10', errors)
    self.assertNotIn('Traceback', errors)


class LoadTest(parameterized.TestCase):

  @parameterized.parameters('digits', 'mnist', 'cifar10', 'cifar100')
  def test_set_that_is_not_prepared_says_what_to_run(self, name):
    folder = _temporary_folder(self)
    with mock.patch.object(
        tfds.core.DatasetBuilder, 'download_and_prepare',
        side_effect=AssertionError('It must not try to download.')):
      with self.assertRaisesRegex(
          FileNotFoundError,
          f'{folder}.*experiments.image.prepare --dataset={name} '):
        input_pipeline.load(name, 'train', folder)

  def test_imagenet_that_is_not_prepared_says_what_to_run(self):
    folder = _temporary_folder(self)
    with self.assertRaisesRegex(
        FileNotFoundError, f'tfds build imagenet2012 .*{folder}'):
      input_pipeline.load('imagenet2012', 'train', folder)

  def test_default_folder_is_that_of_tfds(self):
    folder = _temporary_folder(self)
    with mock.patch.dict(os.environ, {'TFDS_DATA_DIR': str(folder)}):
      with self.assertRaisesRegex(FileNotFoundError, str(folder)):
        input_pipeline.load('cifar10', 'train')

  def test_set_in_another_format_is_told_apart(self):
    folder = _temporary_folder(self)
    (folder / 'mnist' / '3.0.1').mkdir(parents=True)
    (folder / 'mnist' / '3.0.1' / 'dataset_info.json').write_text(
        '{"fileFormat": "tfrecord"}')
    with self.assertRaisesRegex(FileNotFoundError, 'only as tfrecord'):
      input_pipeline.load('mnist', 'train', folder)

  def test_data_dir_may_not_be_empty(self):
    with self.assertRaisesRegex(ValueError, "data_dir .*got ''"):
      input_pipeline.load('digits', 'train', '')

  def test_importing_does_not_import_tfds(self):
    code = ('import sys; from experiments.image import input_pipeline;'
            'print({"tensorflow_datasets", "sklearn", "PIL"} & {*sys.modules})')
    output, errors = _python('-c', code).communicate(timeout=120)
    self.assertEqual(output.strip(), 'set()', errors)

  @parameterized.parameters(*input_pipeline.DATASETS)
  def test_normalise_is_its_formula(self, name):
    dataset = input_pipeline.DATASETS[name]
    channels = dataset.image_shape[-1]
    images = np.arange(4 * channels, dtype=np.uint8).reshape(2, 2, 1, channels)
    expected = (images / 255. - dataset.mean) / dataset.std
    actual = input_pipeline.normalise(jnp.asarray(images), name)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)  # float32.


class TrainBatchesTest(parameterized.TestCase):

  def test_shapes_and_types_are_as_stated(self):
    batch = next(input_pipeline.train_batches(
        _array_split('cifar10', 50), batch_size=16, seed=0))
    self.assertEqual(batch['image'].shape, (16, 32, 32, 3))
    self.assertEqual(batch['image'].dtype, np.uint8)
    self.assertEqual(batch['label'].shape, (16,))
    self.assertEqual(batch['label'].dtype, np.int32)

  def test_same_seed_gives_the_same_stream(self):
    split = _array_split('cifar10', 50)
    one, other = (
        _take(input_pipeline.train_batches(split, batch_size=16, seed=3), 8)
        for _ in range(2))
    _assert_same_batches(one, other)

  def test_other_seed_gives_another_order(self):
    split = _array_split('mnist', 50)
    one, other = (
        next(input_pipeline.train_batches(split, batch_size=50, seed=seed))
        for seed in (0, 1))
    self.assertFalse((one['image'] == other['image']).all())

  @parameterized.parameters(1, 3, 7, 100)
  def test_resumed_stream_equals_the_uninterrupted(self, step):
    split = _array_split('cifar10', 50)
    whole = input_pipeline.train_batches(split, batch_size=16, seed=1)
    resumed = input_pipeline.train_batches(
        split, batch_size=16, seed=1, step=step)
    _take(whole, step)
    _assert_same_batches(_take(resumed, 5), _take(whole, 5))

  @parameterized.parameters(1, 2, 4)
  def test_processes_see_together_what_one_sees(self, process_count):
    split = _array_split('cifar10', 50)
    whole = input_pipeline.train_batches(split, batch_size=16, seed=2)
    parts = [
        input_pipeline.train_batches(
            split, batch_size=16, seed=2, process_index=i,
            process_count=process_count) for i in range(process_count)]
    for _ in range(5):
      _assert_same_batches(
          [_concatenated([next(part) for part in parts])], [next(whole)])

  def test_epoch_has_every_example_once(self):
    split = _array_split('cifar10', 48)
    batches = input_pipeline.train_batches(
        split, batch_size=16, seed=0, augment=False)
    for _ in range(2):
      epoch = _concatenated(_take(batches, 3))
      self.assertEqual(_as_set(epoch['image'], epoch['label']),
                       _as_set(split.images, split.labels))

  def test_epochs_differ_in_order(self):
    batches = input_pipeline.train_batches(
        _array_split('mnist', 48), batch_size=48, seed=0)
    one, other = _take(batches, 2)
    self.assertFalse((one['image'] == other['image']).all())

  def test_incomplete_batch_is_dropped(self):
    split = _array_split('mnist', 50)
    epoch = _concatenated(_take(
        input_pipeline.train_batches(split, batch_size=16, seed=0), 3))
    self.assertLen(_as_set(epoch['image'], epoch['label']), 48)

  def test_split_is_not_changed_by_augmentation(self):
    split = _array_split('cifar10', 32)
    before = split.images.copy()
    _take(input_pipeline.train_batches(split, batch_size=32, seed=0), 3)
    np.testing.assert_equal(split.images, before)

  @parameterized.named_parameters(
      ('cifar10', 'cifar10', 4), ('cifar100', 'cifar100', 4),
      ('fashion_mnist', 'fashion_mnist', 2))
  def test_augmented_image_is_a_window_of_the_padded_one(self, name, pad):
    """Each is found among all windows, mirrored or not, of its original."""
    split = _array_split(name, 400)
    _, height, width, _ = split.images.shape
    # Labels number the examples, so that the original is known.
    split = split._replace(labels=np.arange(400, dtype=np.int32))
    batch = next(input_pipeline.train_batches(split, batch_size=400, seed=0))
    padded = np.pad(
        split.images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    places = [(top, left) for top in range(2 * pad + 1)
              for left in range(2 * pad + 1)]
    seen = []
    for image, label in zip(batch['image'], batch['label']):
      found = [
          (top, left, mirrored) for top, left in places
          for mirrored, candidate in enumerate((image, image[:, ::-1]))
          if (candidate == padded[label][top:top + height, left:left + width]
              ).all()]
      self.assertLen(found, 1)
      seen += found
    tops, lefts, mirrored = zip(*seen)
    self.assertEqual(set(tops), set(range(2 * pad + 1)))
    self.assertEqual(set(lefts), set(range(2 * pad + 1)))
    self.assertBetween(np.mean(mirrored), 0.4, 0.6)  # Four deviations.
    self.assertLess(abs(np.corrcoef(tops, lefts)[0, 1]), 0.2)  # Likewise.

  @parameterized.parameters('digits', 'mnist')
  def test_digits_are_not_augmented(self, name):
    split = _array_split(name, 32)
    plain, augmented = (
        next(input_pipeline.train_batches(
            split, batch_size=32, seed=0, augment=augment))
        for augment in (False, True))
    _assert_same_batches([augmented], [plain])

  def test_augmentation_differs_between_steps(self):
    images = np.broadcast_to(_numbered(1, (32, 32, 3))[0], (64, 32, 32, 3))
    split = input_pipeline.Split('cifar10', images, np.zeros(64, np.int32))
    one, other = _take(
        input_pipeline.train_batches(split, batch_size=64, seed=0), 2)
    self.assertFalse((one['image'] == other['image']).all())


class EvalBatchesTest(parameterized.TestCase):

  @parameterized.product(
      batch_size=(8, 10, 50, 64), process_count=(1, 2))
  def test_every_example_has_weight_one_once(self, batch_size, process_count):
    split = _array_split('cifar10', 50)
    parts = [
        list(input_pipeline.eval_batches(
            split, batch_size=batch_size, process_index=i,
            process_count=process_count)) for i in range(process_count)]
    self.assertLen({len(part) for part in parts}, 1)
    whole = _concatenated(sum(parts, []))
    real = whole['weight'] == 1
    self.assertEqual(real.sum(), 50)
    self.assertEqual(_as_set(whole['image'][real], whole['label'][real]),
                     _as_set(split.images, split.labels))
    np.testing.assert_equal(whole['weight'][~real], 0)
    np.testing.assert_equal(whole['image'][~real], 0)

  def test_all_batches_have_one_shape(self):
    batches = input_pipeline.eval_batches(
        _array_split('cifar10', 50), batch_size=16, process_count=2)
    shapes = {tuple((key, value.shape, str(value.dtype))
                    for key, value in batch.items()) for batch in batches}
    self.assertEqual(shapes, {(
        ('image', (8, 32, 32, 3), 'uint8'), ('label', (8,), 'int32'),
        ('weight', (8,), 'float32'))})


class Imagenet2012(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """The features of TFDS's builder, with a dozen small images."""

  VERSION = tfds.core.Version('5.1.0')

  def _info(self):
    return tfds.core.DatasetInfo(
        builder=self, description='-', features=tfds.features.FeaturesDict({
            'image': tfds.features.Image(encoding_format='jpeg'),
            'label': tfds.features.ClassLabel(num_classes=1000),
            'file_name': tfds.features.Text()}))

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples()
            for split in ('train', 'validation')}

  def _generate_examples(self):
    for i in range(12):
      yield i, {'image': io.BytesIO(_jpeg(300 + 40 * i, 280, i)), 'label': i,
                'file_name': f'{i}.jpg'}


def _picture(width, height, seed):
  """A smooth coloured picture, so that scaling it alters little."""
  rng = np.random.default_rng(seed)
  coarse = rng.integers(0, 256, (4, 5, 3), np.uint8)
  return Image.fromarray(coarse).resize((width, height), Image.BICUBIC)


def _encoded(picture, format, **options):
  buffer = io.BytesIO()
  picture.save(buffer, format, **options)
  return buffer.getvalue()


def _jpeg(width, height, seed):
  return _encoded(_picture(width, height, seed), 'JPEG', quality=95)


class ImagenetTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = cls.enterClassContext(tempfile.TemporaryDirectory())
    tfds.disable_progress_bar()
    Imagenet2012(
        data_dir=folder, file_format='array_record').download_and_prepare()
    cls.train = input_pipeline.load('imagenet2012', 'train', folder)
    cls.validation = input_pipeline.load('imagenet2012', 'validation', folder)

  def test_images_are_not_decoded_in_advance(self):
    self.assertIsNone(self.train.images)
    self.assertEqual(self.train.num_examples, 12)
    self.assertStartsWith(self.train.source[0]['image'], b'\xff\xd8')

  def test_epoch_has_every_label_once(self):
    batches = _take(input_pipeline.train_batches(
        self.train, batch_size=4, seed=0), 3)
    whole = _concatenated(batches)
    self.assertEqual(whole['image'].shape, (12, 224, 224, 3))
    self.assertEqual(whole['image'].dtype, np.uint8)
    self.assertEqual(whole['label'].dtype, np.int32)
    self.assertCountEqual(whole['label'], range(12))

  def test_processes_and_resumption_change_nothing(self):
    whole = _take(input_pipeline.train_batches(
        self.train, batch_size=4, seed=1), 3)
    parts = [
        _take(input_pipeline.train_batches(
            self.train, batch_size=4, seed=1, step=1, process_index=i,
            process_count=2), 2) for i in range(2)]
    _assert_same_batches(
        [_concatenated(pair) for pair in zip(*parts)], whole[1:])

  def test_evaluation_has_every_label_once(self):
    parts = [
        list(input_pipeline.eval_batches(
            self.validation, batch_size=10, process_index=i, process_count=2))
        for i in range(2)]
    whole = _concatenated(sum(parts, []))
    self.assertEqual(whole['image'].shape, (20, 224, 224, 3))
    self.assertCountEqual(whole['label'][whole['weight'] == 1], range(12))
    np.testing.assert_equal(whole['image'][whole['weight'] == 0], 0)

  @parameterized.parameters((500, 375), (300, 900), (100, 120), (1400, 1300))
  def test_evaluation_is_the_centre_of_the_scaled_image(self, width, height):
    encoded = _jpeg(width, height, 5)
    scale = 256 / min(width, height)
    size = round(width * scale), round(height * scale)
    left, top = (size[0] - 224) // 2, (size[1] - 224) // 2
    expected = np.asarray(
        Image.open(io.BytesIO(encoded)).resize(size, Image.BILINEAR))
    expected = expected[top:top + 224, left:left + 224].astype(float)
    actual = input_pipeline._decode(encoded, 224, None)
    # A decoder that scales, and halves of a pixel, cost a level or two.
    self.assertLess(np.abs(actual - expected).mean(), 2)

  @parameterized.product(
      size=((500, 375), (1400, 1300)), flip=(0.2, 0.8), corner=(0., 0.5, 0.99))
  def test_training_is_the_random_box_scaled(self, size, flip, corner):
    encoded = _jpeg(*size, 6)
    draws = input_pipeline._Draws(
        np.array([corner, 1 - corner]), np.array(flip), np.full(10, 0.4),
        np.full(10, 0.7))
    box = input_pipeline._random_box(*size, draws)
    expected = np.asarray(Image.open(io.BytesIO(encoded)).crop(box).resize(
        (224, 224), Image.BILINEAR)).astype(float)
    if flip < 0.5:
      expected = expected[:, ::-1]
    actual = input_pipeline._decode(encoded, 224, draws)
    # As above.
    self.assertLess(np.abs(actual - expected).mean(), 2)

  def test_random_box_keeps_area_and_ratio(self):
    rng = np.random.default_rng(0)
    areas, ratios = [], []
    for _ in range(500):
      draws = input_pipeline._Draws(*(
          rng.random(shape) for shape in (2, (), 10, 10)))
      left, top, right, bottom = input_pipeline._random_box(500, 375, draws)
      self.assertTrue(0 <= left < right <= 500 and 0 <= top < bottom <= 375)
      areas.append((right - left) * (bottom - top) / (500 * 375))
      ratios.append((right - left) / (bottom - top))
    # Sides are whole pixels, which moves a figure by a hundredth or so.
    self.assertBetween(min(areas), 0.075, 0.1)
    self.assertBetween(max(areas), 0.9, 1)
    self.assertBetween(min(ratios), 0.74, 0.8)
    self.assertBetween(max(ratios), 1.27, 1.35)

  def test_box_that_never_fits_is_the_centre(self):
    draws = input_pipeline._Draws(
        np.zeros(2), np.array(0.9), np.full(10, 0.9), np.full(10, 0.5))
    box = input_pipeline._random_box(1000, 20, draws)
    self.assertEqual(box, input_pipeline._centre_box(1000, 20))

  @parameterized.named_parameters(
      ('grey_jpeg', 'L', 'JPEG'), ('cmyk_jpeg', 'CMYK', 'JPEG'),
      ('png', 'RGB', 'PNG'), ('palette_png', 'P', 'PNG'))
  def test_other_encodings_are_decoded_too(self, mode, format):
    picture = _picture(700, 600, 7).convert(mode)
    pixels = input_pipeline._decode(_encoded(picture, format), 224, None)
    self.assertEqual(pixels.shape, (224, 224, 3))
    self.assertGreater(pixels.std(), 5)

  def test_error_of_a_decoder_reaches_the_caller(self):
    source = mock.Mock(__len__=lambda _: 4)
    source.__getitems__ = lambda keys: [{'image': b'no', 'label': 0}] * 4
    split = input_pipeline.Split('imagenet2012', None, None, source)
    with self.assertRaisesRegex(OSError, 'cannot identify image'):
      next(input_pipeline.train_batches(split, batch_size=4, seed=0))


class PrefetchTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.threads = set(threading.enumerate())

  def _assert_no_thread_left(self):
    self.assertEmpty(set(threading.enumerate()) - self.threads)

  @parameterized.parameters(1, 2, 100)
  def test_items_and_their_order_are_kept(self, size):
    items = batching.prefetch(iter(range(50)), size)
    self.assertEqual(list(items), list(range(50)))
    self.assertEqual(list(items), [])
    self._assert_no_thread_left()

  def test_error_comes_after_the_items_before_it(self):
    def failing():
      yield 1
      yield 2
      raise ValueError('of the worker')

    items = batching.prefetch(failing())
    self.assertEqual(_take(items, 2), [1, 2])
    with self.assertRaisesRegex(ValueError, 'of the worker'):
      next(items)
    with self.assertRaises(StopIteration):
      next(items)
    self._assert_no_thread_left()

  def test_works_ahead_but_not_beyond_its_size(self):
    made = []
    enough = threading.Event()

    def counting():
      for i in range(100):
        made.append(i)
        if len(made) == 6:
          enough.set()
        yield i

    items = batching.prefetch(counting(), 3)
    _take(items, 2)
    self.assertTrue(enough.wait(10))  # Two taken, three ready, one in hand.
    time.sleep(0.1)
    self.assertLen(made, 6)
    items.close()

  def test_close_ends_the_thread_and_the_iterator(self):
    closed = []

    def endless():
      try:
        while True:
          yield 0
      finally:
        closed.append(True)

    items = batching.prefetch(endless())
    next(items)
    items.close()
    items.close()
    self.assertEqual(closed, [True])
    self._assert_no_thread_left()
    with self.assertRaises(StopIteration):
      next(items)

  def test_thread_ends_when_the_consumer_is_forgotten(self):
    items = batching.prefetch(iter(int, 1))
    next(items)
    del items
    gc.collect()
    self._assert_no_thread_left()

  def test_prefetched_batches_are_the_batches(self):
    split = _array_split('cifar10', 50)
    plain, prefetched = (
        input_pipeline.train_batches(split, batch_size=16, seed=0)
        for _ in range(2))
    prefetched = batching.prefetch(prefetched)
    _assert_same_batches(_take(prefetched, 7), _take(plain, 7))
    prefetched.close()

  @parameterized.named_parameters(
      ('numbers', 'iter(int, 1)'), ('decoded_batches', 'batches'))
  def test_python_exits_in_silence_while_it_runs(self, iterator):
    path = _temporary_folder(self) / 'image.jpg'
    path.write_bytes(_jpeg(300, 300, 0))
    process = _python('-c', f"""
from experiments import batching
from experiments.image import input_pipeline as data
class Source(list):
  def __getitems__(self, keys):
    return [{{'image': open({str(path)!r}, 'rb').read(), 'label': 0}}] * 4
split = data.Split('imagenet2012', None, None, Source(range(4)))
batches, unused = (
    data.train_batches(split, batch_size=4, seed=0) for _ in range(2))
next(unused)
items = batching.prefetch({iterator})
next(items)""")
    output = process.communicate(timeout=60)
    self.assertEqual((*output, process.returncode), ('', '', 0))


if __name__ == '__main__':
  absltest.main()
