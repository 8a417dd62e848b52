"""The data of the language experiment: corpora, vocabularies, streams."""

import os
import pathlib
import subprocess
import sys
import sysconfig
import tempfile
from unittest import mock
import zipfile

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import tensorflow_datasets as tfds

from experiments import datasets
from experiments.language import corpora
from experiments.language import input_pipeline
from experiments.language import vocabulary

_ROOT = pathlib.Path(__file__).parent.parent
_SPLITS = ('train', 'valid', 'test')
_SIZES = {'train': 900, 'valid': 60, 'test': 40}


def _temporary_folder(test):
  return pathlib.Path(test.enterContext(tempfile.TemporaryDirectory()))


def _python(*arguments):
  return subprocess.run(
      [sys.executable, *arguments], cwd=_ROOT, text=True, timeout=120,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'}, capture_output=True)


def _random_bytes(size):
  return np.random.default_rng(size).integers(
      0, 256, size, np.uint8).tobytes()


def _write(folder, files):
  """Writes {path: bytes} below a folder."""
  for path, content in files.items():
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_bytes(content)


def _write_zip(path, files):
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    for name, content in files.items():
      archive.writestr(name, content)


def _take(iterator, count):
  return [next(iterator) for _ in range(count)]


def _side_by_side(batches):
  """The rows of several processes as one batch."""
  return {key: np.concatenate([batch[key] for batch in batches])
          for key in batches[0]}


def _assert_same_batches(actual, expected):
  np.testing.assert_equal(len(actual), len(expected))
  for one, other in zip(actual, expected):
    np.testing.assert_equal(one, other)


class StdlibTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.cache = cls.enterClassContext(tempfile.TemporaryDirectory())
    with mock.patch.dict(os.environ, {'XDG_CACHE_HOME': cls.cache}):
      cls.texts = {
          split: input_pipeline.load('stdlib', split) for split in _SPLITS}

  def setUp(self):
    super().setUp()
    self.enterContext(
        mock.patch.dict(os.environ, {'XDG_CACHE_HOME': self.cache}))

  def test_types_are_as_stated(self):
    train = self.texts['train']
    self.assertEqual(train.tokens.dtype, np.uint8)
    self.assertEqual(train.tokens.ndim, 1)
    self.assertLen(train.vocabulary, 256)

  @parameterized.parameters(*_SPLITS)
  def test_split_is_its_files_in_order(self, split):
    folder = pathlib.Path(sysconfig.get_path('stdlib'))
    paths = [path for path in corpora.stdlib_paths(folder)
             if corpora.stdlib_split(path) == split]
    whole = b''.join((folder / path).read_bytes() for path in paths)
    size = corpora.Stdlib.SIZES[split]
    self.assertEqual(self.texts[split].tokens.tobytes(), whole[:size])
    self.assertGreater(len(self.texts[split].tokens), 100_000)

  def test_splits_share_the_paths_as_stated(self):
    drawn = [corpora.stdlib_split(f'{i}.py') for i in range(4000)]
    shares = [drawn.count(split) / len(drawn) for split in _SPLITS]
    # Four standard deviations.
    np.testing.assert_allclose(shares, [.9, .05, .05], atol=.02)

  def test_name_tells_the_version_of_python(self):
    version = '_'.join(map(str, sys.version_info[:3]))
    folder = pathlib.Path(self.cache, 'sparse_jax', 'tfds')
    self.assertStartsWith(os.listdir(folder)[0], f'stdlib_{version}')

  def test_text_of_another_python_is_not_used(self):
    folder = pathlib.Path(self.cache, 'sparse_jax', 'tfds')
    with mock.patch.object(corpora.Stdlib, 'name', 'stdlib_2_7_18'):
      with self.assertRaisesRegex(
          FileNotFoundError,
          f'stdlib_2_7_18.*{folder}.*language.prepare --dataset=stdlib --data'):
        input_pipeline.load('stdlib', 'train', data_dir=folder)

  def test_second_load_does_not_prepare(self):
    with mock.patch.object(
        corpora.Stdlib, 'download_and_prepare', side_effect=AssertionError):
      again = input_pipeline.load('stdlib', 'test')
    self.assertEqual(again.fingerprint, self.texts['test'].fingerprint)

  def test_fingerprints_differ(self):
    prints = {text.fingerprint for text in self.texts.values()}
    self.assertLen(prints, 3)

  def test_tests_and_packages_are_left_out(self):
    folder = _temporary_folder(self)
    kept = ['a.py', 'json/tool.py', 'test_of_nothing.py', 'unittest/case.py']
    others = ['test/a.py', 'idlelib/idle_test/b.py', 'json/tests/c.py',
              'site-packages/numpy/d.py', '_sysconfigdata__linux.py', 'e.txt']
    _write(folder, dict.fromkeys(kept + others, b'pass\n'))
    self.assertEqual(corpora.stdlib_paths(folder), kept)

  def test_python_without_its_source_is_told(self):
    folder = _temporary_folder(self)
    with self.assertRaisesRegex(FileNotFoundError, f'{folder}.*text_file'):
      corpora.stdlib_paths(folder)


class BuildersTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.source = _temporary_folder(self)
    self.data_dir = _temporary_folder(self)
    for builder in (corpora.Enwik8, corpora.Text8):
      self.enterContext(mock.patch.object(builder, 'SIZES', _SIZES))
    self.enterContext(mock.patch.object(corpora, '_CHUNK', 16))

  def _assert_holds(self, name, expected):
    corpora.prepare(name, self.source, self.data_dir)
    for split, text in zip(_SPLITS, expected, strict=True):
      loaded = input_pipeline.load(
          name, split, level='byte', data_dir=self.data_dir)
      self.assertEqual(loaded.tokens.tobytes(), text)

  def _assert_fails(self, error, message, name):
    """It fails so, and leaves nothing."""
    with self.assertRaisesRegex(error, message):
      corpora.prepare(name, self.source, self.data_dir)
    self.assertEmpty(os.listdir(self.data_dir))

  @parameterized.product(name=('enwik8', 'text8'), is_zip=(False, True))
  def test_file_is_kept_exactly_and_cut(self, name, is_zip):
    text = _random_bytes(1000)
    if is_zip:
      _write_zip(self.source / f'{name}.zip', {name: text})
    else:
      _write(self.source, {name: text})
    self._assert_holds(name, (text[:900], text[900:960], text[960:]))

  @parameterized.product(
      name=('wikitext2', 'wikitext103'),
      form=('tokens', 'txt', 'inner', 'zip'))
  def test_wikitext_is_kept_exactly(self, name, form):
    texts = [f' \n = {split} {name} = \n'.encode() * 9 for split in _SPLITS]
    folder = corpora.BUILDERS[name].FOLDER
    inner = f'{folder}/' if form in ('inner', 'zip') else ''
    shape = '{}.txt' if form == 'txt' else 'wiki.{}.tokens'
    files = {inner + shape.format(split): text
             for split, text in zip(_SPLITS, texts)}
    if form == 'zip':
      _write_zip(self.source / f'{folder}-v1.zip', files)
    else:
      _write(self.source, files)
    self._assert_holds(name, texts)

  def test_prepared_corpus_is_left_as_it_is(self):
    text = _random_bytes(1000)
    _write(self.source, {'enwik8': text})
    first = corpora.prepare('enwik8', self.source, self.data_dir)
    self.assertEqual(first, self.data_dir / 'enwik8' / '1.0.0')
    _write(self.source, {'enwik8': _random_bytes(2000)[:1000]})
    again = corpora.prepare('enwik8', None, self.data_dir)
    self.assertEqual(again, first)
    self._assert_holds('enwik8', (text[:900], text[900:960], text[960:]))

  def test_file_of_another_size_is_refused(self):
    _write(self.source, {'enwik8': b'x' * 999})
    self._assert_fails(ValueError, 'enwik8.*1000 bytes; got 999', 'enwik8')

  def test_truncated_zip_is_named(self):
    path = self.source / 'text8.zip'
    _write_zip(path, {'text8': _random_bytes(1000)})
    path.write_bytes(path.read_bytes()[:-50])
    self._assert_fails(ValueError, 'text8.zip cannot be read', 'text8')

  @parameterized.parameters(35, 500)  # In the header of a block, in its data.
  def test_changed_byte_of_a_zip_is_found(self, place):
    path = self.source / 'text8.zip'
    _write_zip(path, {'text8': _random_bytes(1000)})
    blob = bytearray(path.read_bytes())
    blob[place] ^= 0xff
    path.write_bytes(blob)
    self._assert_fails(ValueError, 'text8.zip cannot be read', 'text8')

  def test_zip_of_something_else_is_told(self):
    _write_zip(self.source / 'wikitext-2-v1.zip', {'readme': b'no'})
    self._assert_fails(
        FileNotFoundError, 'wikitext-2-v1.zip: no wikitext-2/wiki.test.tokens',
        'wikitext2')

  @parameterized.parameters('{}.txt', 'wiki.{}.tokens')
  def test_wikitext_without_train_says_so(self, shape):
    _write(self.source, {
        shape.format(split): b'a b\n' for split in ('valid', 'test')})
    self._assert_fails(
        FileNotFoundError,
        f'has no {shape.format("train")}, nor wikitext-2-v1.zip', 'wikitext2')

  def test_source_of_another_corpus_says_what_is_needed(self):
    _write(self.source, {'enwik9': b'x'})
    self._assert_fails(
        FileNotFoundError, 'has no enwik8, nor enwik8.zip', 'enwik8')
    self._assert_fails(
        FileNotFoundError, 'wiki.train.tokens.*wikitext-103-v1.zip',
        'wikitext103')

  def test_split_without_text_is_refused(self):
    _write(self.source, {
        'train.txt': b'a b\n', 'valid.txt': b'', 'test.txt': b'a\n'})
    self._assert_fails(ValueError, "wikitext2, split 'valid'", 'wikitext2')

  def test_source_must_be_given(self):
    with self.assertRaisesRegex(
        ValueError, 'source must be given for text8: A folder with text8 or'):
      corpora.prepare('text8', None, self.data_dir)

  def test_unknown_name_lists_the_known(self):
    self._assert_fails(
        ValueError, "(?s)name.*'enwik9'.*enwik8.*stdlib", 'enwik9')


class PrepareTest(absltest.TestCase):

  def test_binary_prepares_once_then_says_so(self):
    source, data_dir = _temporary_folder(self), _temporary_folder(self)
    _write(source, {f'{split}.txt': b'a b c\n' for split in _SPLITS})
    done = _python(
        '-m', 'experiments.language.prepare', '--dataset=wikitext2',
        f'--source={source}', f'--data_dir={data_dir}')
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertIn('Prepared wikitext2', done.stdout)
    self.assertIn('already prepared', datasets.make(
        corpora, 'wikitext2', None, data_dir))

  def test_binary_fails_with_one_line(self):
    done = _python(
        '-m', 'experiments.language.prepare', '--dataset=enwik8',
        f'--data_dir={_temporary_folder(self)}')
    self.assertEqual(done.returncode, 2)
    self.assertIn('source must be given for enwik8', done.stderr)
    self.assertNotIn('Traceback', done.stderr)


class LoadTest(parameterized.TestCase):

  @parameterized.named_parameters(
      ('data_dir', dict(data_dir=''), "data_dir .*got ''"),
      ('unused_file', dict(text_file='a.txt'), '`text_file` .*a.txt.*enwik8'),
      ('no_file', dict(dataset='text'), '`text_file` .=None'))
  def test_bad_argument_is_named(self, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      input_pipeline.load(
          **{'dataset': 'enwik8', 'split': 'train', **arguments})

  @parameterized.parameters('enwik8', 'text8', 'wikitext2', 'wikitext103')
  def test_corpus_that_is_not_prepared_says_what_to_run(self, name):
    folder = _temporary_folder(self)
    with mock.patch.object(
        tfds.core.DatasetBuilder, 'download_and_prepare',
        side_effect=AssertionError('It must not try to download.')):
      with self.assertRaisesRegex(
          FileNotFoundError, f"data_dir='{folder}'.*experiments.language."
          f'prepare --dataset={name} --source=DIR --data_dir={folder}'):
        input_pipeline.load(name, 'train', data_dir=folder)

  def test_enwik8_and_text8_are_cut_as_everyone_does(self):
    for builder in (corpora.Enwik8, corpora.Text8):
      self.assertEqual(
          builder.SIZES,
          {'train': 90 * 10**6, 'valid': 5 * 10**6, 'test': 5 * 10**6})

  def test_every_corpus_has_a_builder_or_a_file(self):
    self.assertEqual(
        set(input_pipeline.DATASETS), {*corpora.BUILDERS, 'text'})
    for corpus in input_pipeline.DATASETS.values():
      self.assertIn(corpus.level, ('byte', 'word'))
      self.assertEqual(corpus.vocabulary_size == 256, corpus.level == 'byte')

  def test_file_is_split_by_position(self):
    path = _temporary_folder(self) / 'a.txt'
    path.write_bytes(_random_bytes(1010))
    parts = [input_pipeline.load('text', split, text_file=path).tokens
             for split in _SPLITS]
    self.assertEqual([len(part) for part in parts], [909, 50, 51])
    self.assertEqual(np.concatenate(parts).tobytes(), path.read_bytes())

  def test_folder_has_a_file_per_split(self):
    folder = _temporary_folder(self)
    _write(folder, {f'{split}.txt': split.encode() for split in _SPLITS})
    for split in _SPLITS:
      text = input_pipeline.load('text', split, text_file=folder)
      self.assertEqual(text.vocabulary.decode(text.tokens), split)

  def test_text_that_is_not_there_is_named(self):
    folder = _temporary_folder(self)
    (folder / 'short.txt').write_bytes(b'abc')
    with self.assertRaisesRegex(FileNotFoundError, f'{folder}.*no test.txt'):
      input_pipeline.load('text', 'test', text_file=folder)
    with self.assertRaisesRegex(FileNotFoundError, 'text_file=.*nowhere'):
      input_pipeline.load('text', 'test', text_file=folder / 'nowhere')
    with self.assertRaisesRegex(ValueError, 'short.txt.*left for valid'):
      input_pipeline.load('text', 'valid', text_file=folder / 'short.txt')

  def test_words_are_those_of_the_training_split(self):
    folder = _temporary_folder(self)
    _write(folder, {'train.txt': b'b a a\n', 'valid.txt': b'a c\n'})
    valid = input_pipeline.load(
        'text', 'valid', level='word', text_file=folder)
    self.assertEqual(valid.vocabulary.words, ('a', '<eos>', 'b', '<unk>'))
    self.assertEqual(valid.tokens.tolist(), [0, 3, 1])
    self.assertEqual(valid.tokens.dtype, np.int32)

  def test_importing_does_not_import_tfds(self):
    code = ('import sys; from experiments.language import input_pipeline as x;'
            f'x.load("text", "train", text_file={__file__!r});'
            'print("tensorflow_datasets" in sys.modules)')
    done = _python('-c', code)
    self.assertEqual(done.stdout.strip(), 'False', done.stderr)


class BytesTest(parameterized.TestCase):

  def test_text_comes_back(self):
    known = vocabulary.Bytes()
    self.assertLen(known, 256)
    self.assertEqual(known.decode(known.encode('à la\n')), 'à la\n')
    np.testing.assert_equal(known.encode('à'), known.encode(b'\xc3\xa0'))

  def test_half_a_letter_is_marked(self):
    self.assertEqual(vocabulary.Bytes().decode([97, 0xc3, 98]), 'a\ufffdb')

  @parameterized.parameters(-1, 256)
  def test_token_out_of_range_is_named(self, token):
    with self.assertRaisesRegex(ValueError, fr'{token}.*\[0, 256\)'):
      vocabulary.Bytes().decode([0, token])


class WordsTest(parameterized.TestCase):

  def test_tokens_come_back(self):
    text = b'the cat\n\n the dog the\xc3\xa9 \n'
    known = vocabulary.words_of(text)
    tokens = known.encode(text)
    self.assertLen(tokens, 8)
    np.testing.assert_equal(known.encode(known.decode(tokens)), tokens)
    np.testing.assert_equal(known.encode(text.decode()), tokens)
    self.assertEqual(known.decode(tokens).split(), text.decode().split())

  def test_text_in_pieces_is_the_text(self):
    text = ' '.join(map(str, range(300))).replace('0 ', '\n').encode()
    known = vocabulary.words_of(text)
    tokens = known.encode(text)
    with mock.patch.object(vocabulary, '_PIECE', 7):
      self.assertEqual(vocabulary.words_of(text).words, known.words)
      again = known.encode(text)
    np.testing.assert_equal(again, tokens)

  def test_words_are_sorted_by_count_then_spelling(self):
    self.assertEqual(vocabulary.words_of('c b a b c d b\n\n').words,
                     ('b', '<eos>', 'c', 'a', 'd', '<unk>'))

  def test_order_of_the_text_does_not_matter(self):
    words = [str(i % 7) for i in range(50)]
    one, other = (vocabulary.words_of(' '.join(x)).words
                  for x in (words, words[::-1]))
    self.assertEqual(one, other)

  def test_token_out_of_range_is_named(self):
    with self.assertRaisesRegex(ValueError, r'-1 to 1.*\[0, 2\)'):
      vocabulary.Words(['a', 'b']).decode([1, -1])

  def test_bytes_that_are_no_utf8_are_marked(self):
    self.assertEqual(vocabulary.words_of(b'a\xff b \xff').words,
                     ('a\ufffd', 'b', '\ufffd', '<eos>', '<unk>'))

  def test_no_text_has_no_tokens(self):
    tokens = vocabulary.Words(['a']).encode('')
    self.assertEqual((tokens.dtype, tokens.size), (np.int32, 0))


class TrainBatchesTest(parameterized.TestCase):

  def _batches(self, tokens, **arguments):
    return input_pipeline.train_batches(
        tokens, **{'batch_size': 4, 'length': 5, **arguments})

  def test_shapes_and_types_are_as_stated(self):
    batch = next(self._batches(np.arange(100, dtype=np.uint8)))
    self.assertEqual({key: (value.shape, value.dtype)
                      for key, value in batch.items()},
                     {'inputs': ((4, 5), np.int32),
                      'targets': ((4, 5), np.int32), 'begins': ((4,), bool)})

  @parameterized.parameters(101, 100, 98, 85, 21)
  def test_rows_are_the_text_in_order(self, size):
    tokens = np.arange(size, dtype=np.int32)
    steps = (size - 1) // 4 // 5
    batches = _take(self._batches(tokens), steps)
    rows = np.concatenate([batch['inputs'] for batch in batches], axis=1)
    row_length = (size - 1) // 4
    for i, row in enumerate(rows):
      np.testing.assert_equal(
          row, i * row_length + np.arange(5 * steps))
    targets = np.concatenate([batch['targets'] for batch in batches], axis=1)
    np.testing.assert_equal(targets, rows + 1)

  def test_text_that_fits_is_trained_on_whole(self):
    tokens = np.arange(101, dtype=np.int32)
    batches = _take(self._batches(tokens), 5)
    seen = np.concatenate([batch['targets'].ravel() for batch in batches])
    self.assertCountEqual(seen, range(1, 101))

  def test_passes_repeat_and_begin_anew(self):
    batches = _take(self._batches(np.arange(98, dtype=np.int32)), 12)
    _assert_same_batches(batches[4:8], batches[:4])
    self.assertEqual(
        [batch['begins'].tolist() for batch in batches],
        3 * [[True] * 4, [False] * 4, [False] * 4, [False] * 4])

  @parameterized.parameters(1, 3, 4, 7, 10**9)
  def test_resumed_stream_is_the_stream(self, step):
    tokens = np.arange(101, dtype=np.int32)
    whole = _take(self._batches(tokens), 12)
    resumed = _take(self._batches(tokens, step=step), 5)
    start = step % 5
    _assert_same_batches(resumed, whole[start:start + 5])

  @parameterized.parameters(1, 2, 4)
  def test_processes_see_together_what_one_sees(self, process_count):
    tokens = np.arange(99, dtype=np.int32)
    parts = [_take(self._batches(tokens, step=2, process_index=i,
                                 process_count=process_count), 6)
             for i in range(process_count)]
    _assert_same_batches([_side_by_side(batches) for batches in zip(*parts)],
                         _take(self._batches(tokens, step=2), 6))


class EvalBatchesTest(parameterized.TestCase):

  def _batches(self, tokens, **arguments):
    return list(input_pipeline.eval_batches(
        tokens, **{'batch_size': 4, 'length': 5, **arguments}))

  @parameterized.product(size=(2, 3, 5, 21, 22, 41, 98, 103),
                         batch_size=(1, 4))
  def test_every_token_but_the_first_is_a_target_once(self, size, batch_size):
    tokens = np.arange(100, 100 + size, dtype=np.int32)
    batches = self._batches(tokens, batch_size=batch_size)
    targets, inputs, weight = (
        np.concatenate([batch[key] for batch in batches], axis=1)
        for key in ('targets', 'inputs', 'weight'))
    np.testing.assert_equal(targets[weight == 1], tokens[1:])
    np.testing.assert_equal(inputs[weight == 1], tokens[:-1])
    self.assertEqual(weight.sum(), size - 1)
    np.testing.assert_equal(weight * weight, weight)
    np.testing.assert_equal(targets[weight == 0], 0)
    np.testing.assert_equal(inputs[weight == 0], 0)

  def test_rows_are_read_without_gaps(self):
    batches = self._batches(np.arange(98))
    weight = np.concatenate([batch['weight'] for batch in batches], axis=1)
    self.assertTrue((np.diff(weight, axis=1) <= 0).all())

  def test_shapes_and_types_are_as_stated(self):
    batches = self._batches(np.arange(98, dtype=np.uint8))
    self.assertLen(batches, 5)
    for i, batch in enumerate(batches):
      self.assertEqual(
          {key: (value.shape, value.dtype) for key, value in batch.items()},
          {'inputs': ((4, 5), np.int32), 'targets': ((4, 5), np.int32),
           'begins': ((4,), bool), 'weight': ((4, 5), np.float32)})
      np.testing.assert_equal(batch['begins'], i == 0)

  @parameterized.product(size=(2, 98), process_count=(2, 4))
  def test_processes_see_together_what_one_sees(self, size, process_count):
    tokens = np.arange(size)
    parts = [self._batches(tokens, process_index=i,
                           process_count=process_count)
             for i in range(process_count)]
    _assert_same_batches(
        [_side_by_side(batches) for batches in zip(*parts, strict=True)],
        self._batches(tokens))


if __name__ == '__main__':
  absltest.main()
