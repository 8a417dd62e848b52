"""Whole runs of the image experiment: what they leave, how they go on."""

import functools
import gzip
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import time
from unittest import mock

from absl import app
from absl import flags
from absl import logging
from absl.testing import absltest
from absl.testing import parameterized
from flax import linen as nn
import jax
import numpy as np

from experiments import batching
from experiments import checkpointing
from experiments import devices
from experiments import report
from experiments import reporting
from experiments import run_flags
from experiments import sparsity
from experiments import training
from experiments.image import builders
from experiments.image import models
from experiments.image import train
from tests import fast_compiler

_ROOT = pathlib.Path(__file__).parents[1]
_PNG = b'\x89PNG'
# Dropout, batch norm, augmentation, optimizer slots, random growth; rows of
# metrics, evaluations and checkpoints that never fall together.
_EVERYTHING = {
    'dataset': 'fashion_mnist', 'model': 'wrn_16_8',
    'dropout': 0.3, 'method': 'set', 'update_every': 4, 'update_end': -1,
    'sparsity': 0.5, 'optimizer': 'adam', 'learning_rate': 0.01,
    'label_smoothing': 0.1, 'batch_size': 16, 'train_steps': 60,
    'log_every': 21, 'eval_every': 31, 'checkpoint_every': 9}


# Runs the program with the network below, in a process of its own.
_WITH_SMALL_NETWORK = ('-c', f'from tests import {pathlib.Path(__file__).stem}'
                       ' as test; test.run_with_small_network()')


# Likewise, what is trained on two hosts of four devices, one after the other;
# parameters are whole, and split over both. Those split within a host bring
# the batches of whole ones, and lie as those of one host do.
_TRAIN_ON_HOSTS = ('-c', f'from tests import {pathlib.Path(__file__).stem}'
                   ' as test; test.train_on_hosts()')
_PARTS_ON_HOSTS = {'swat': 1, 'top_kast': 8, 'rigl': 8}


class SmallNetwork(nn.Module):
  """Stands in for a wide ResNet, with one block of it."""

  num_classes: int
  width: float
  dropout: float
  dtype: jax.typing.DTypeLike

  @nn.compact
  def __call__(self, images, *, train):
    x = nn.Conv(4, (3, 3), strides=2, name='stem')(images)
    block = models.WideBlock(4, 2, True, self.dropout, self.dtype)
    x = block(x, train=train).mean(axis=(1, 2))
    return nn.Dense(self.num_classes, name='head')(x)


def run_with_small_network():
  models.MODELS['wrn_16_8'] = SmallNetwork
  app.run(train.main)


def train_on_hosts():
  def main(_):
    devices.join(flags.FLAGS.flag_values_dict())
    values = train.run_config()
    with mock.patch.object(report, 'draw'):
      for method, parts in _PARTS_ON_HOSTS.items():
        train.train(values | {
            'method': method, 'model_parallel': parts,
            'workdir': os.path.join(values['workdir'], method)})
  app.run(main)


def setUpModule():
  fast_compiler.use()


def tearDownModule():
  fast_compiler.leave()


def _values(**changes):
  values = train.run_config()
  assert changes.keys() <= values.keys(), changes
  return values | {'width': 0.1, 'train_steps': 20, 'log_every': 5,
                   'eval_every': 10, 'checkpoint_every': 10} | changes


def _start(values, num_devices=8, program=('-m', 'experiments.image.train'),
           **join):
  """A process of its own, as the command line starts it."""
  default = train.run_config()
  changed = {name: value for name, value in values.items()
             if value != default[name]} | join
  arguments = [f'--{name}={value}' for name, value in changed.items()]
  return subprocess.Popen(
      [sys.executable, *program, *arguments],
      cwd=_ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu',
           'JAX_NUM_CPU_DEVICES': str(num_devices),
           **{name.upper(): str(value)
              for name, value in fast_compiler.SETTINGS.items()}})


def _checkpoints(workdir):
  """The steps of the checkpoints that are on disk, whole."""
  folder = pathlib.Path(workdir, 'checkpoints')
  names = os.listdir(folder) if folder.exists() else []
  return sorted(int(name) for name in names if name.isdigit())


def _wait_for_checkpoint(process, workdir, above):
  for _ in range(6000):
    if any(step > above for step in _checkpoints(workdir)):
      return
    if process.poll() is not None:
      raise AssertionError(f'it ended first:\n{process.communicate()[0]}')
    time.sleep(0.02)
  process.kill()
  raise AssertionError(f'no checkpoint above {above} in two minutes')


def _saved(values):
  """Bytes of each leaf of the final checkpoint, by its path."""
  run = train.prepare(values, values['workdir'])
  state = training.last_state(run)
  assert state.step == run.train_steps, state.step
  leaves = jax.tree_util.tree_leaves_with_path(
      state._replace(key=jax.random.key_data(state.key)))
  return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
          for path, leaf in leaves}


def _marks(values):
  return {path: leaf for path, leaf in _saved(values).items()
          if '.marks' in path}


def _rows(values):
  """The rows of metrics without the times."""
  path = os.path.join(values['workdir'], 'metrics.jsonl')
  return [{name: value for name, value in row.items() if name != 'time'}
          for row in reporting.read_jsonl(path)]


def _small_fashion(folder):
  """Prepares a few images in the format of Fashion-MNIST."""
  rng = np.random.default_rng(3)
  source = pathlib.Path(folder, 'source')
  source.mkdir()
  for part, size in (('train', 90), ('t10k', 40)):
    for kind, array in (('images-idx3', rng.integers(0, 256, (size, 28, 28))),
                        ('labels-idx1', np.arange(size) % 10)):
      header = bytes([0, 0, 8, array.ndim])
      header += b''.join(n.to_bytes(4, 'big') for n in array.shape)
      content = header + array.astype(np.uint8).tobytes()
      path = source / f'{part}-{kind}-ubyte.gz'
      path.write_bytes(gzip.compress(content))
  builders.prepare('fashion_mnist', source, folder)
  return str(folder)


class RunTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.folder = self.enterContext(tempfile.TemporaryDirectory())
    self.workdir = os.path.join(self.folder, 'run')
    if 'pictures' not in self.id():
      self.enterContext(mock.patch.object(report, 'draw'))

  def _values(self, **changes):
    return _values(workdir=self.workdir, **changes)

  def _path(self, *names):
    return pathlib.Path(self.workdir, *names)

  @parameterized.parameters('dense', 'top_kast')
  def test_run_leaves_results_metrics_and_pictures(self, method):
    self._assert_leaves_results_and_metrics(method)
    for picture in ('training.png', 'layers.png', 'first_layer.png'):
      self.assertEqual(self._path(picture).read_bytes()[:4], _PNG)
    page = self._path('report.html').read_text()
    self.assertEqual(page.count('src="data:image/png;base64,'),
                     3 if method == 'dense' else 4)  # Masks, too.
    self.assertIn(f'--method={method}', page)

  # One of each kind; other tests here and flags_test train the others.
  @parameterized.parameters('snip', 'gmp', 'ac_dc', 'swat', 'str', 'cs')
  def test_run_leaves_results_and_metrics(self, method):
    self._assert_leaves_results_and_metrics(method)

  def _assert_leaves_results_and_metrics(self, method):
    values = self._values(method=method)
    result = train.train(values)
    stored = json.loads(self._path('result.json').read_text())
    self.assertEqual(stored, json.loads(json.dumps(result)))
    self.assertEqual(stored['flags'], values)
    if sparsity.has(method, 'sparsity') or method == 'dense':
      self.assertAlmostEqual(stored['sparsity'], .9 * (method != 'dense'),
                             delta=.005)
    self.assertGreater(stored['examples_per_second'], 0.)
    rows = _rows(values)
    self.assertEqual([row['step'] for row in rows], [5, 10, 15, 20])
    self.assertLess(rows[-1]['train_loss'], rows[0]['train_loss'])
    self.assertEqual([row['step'] for row in rows if 'test_loss' in row],
                     [10, 20])
    for name in ('test_loss', 'test_accuracy'):
      self.assertEqual(rows[-1][name], stored[name])
    self.assertEqual([row['step'] for row in rows
                      if 'effective_sparsity' in row],
                     [] if method == 'dense' else [10, 20])
    self.assertEqual([layer['path'] for layer in stored['layers']
                      if layer['path'].endswith('kernel')],
                     ['stem/kernel', 'dense_2/kernel', 'head/kernel'])
    self.assertLen(os.listdir(self._path('tensorboard')), 1)
    self.assertEqual(_checkpoints(self.workdir), [10, 20])

  def test_effective_sparsity_explains_a_network_that_learns_nothing(self):
    """One weight a layer: the paths break, and the page and the rows say so."""
    result = train.train(self._values(method='static', sparsity=.9999,
                                      train_steps=5, width=1.))
    self.assertEqual(result['effective_sparsity'], 1.)
    self.assertEqual(result['collapsed'],
                     ['stem/kernel', 'dense_2/kernel', 'head/kernel'])
    row, = _rows(self._values())
    self.assertEqual((row['effective_sparsity'], row['collapsed_layers']),
                     (1., 3))

  def test_effective_sparsity_can_be_left_out(self):
    result = train.train(self._values(method='rigl', train_steps=5,
                                      effective_sparsity=False))
    self.assertIsNone(result['effective_sparsity'])
    row, = _rows(self._values())
    self.assertNotIn('effective_sparsity', row)
    self.assertIn('dead_units', row)

  def test_masks_are_compared_with_those_of_before(self):
    values = self._values(method='set', sparsity=.8, update_every=5,
                          update_end=10, compare_masks_every=10)
    train.train(values)
    rows = {row['step']: row for row in _rows(values)}
    self.assertNotIn('mask_change_mean', rows[5])
    for name in ('mask_change', 'reservoir_used'):
      least, mean, most = (rows[10][f'{name}_{of}']
                           for of in ('min', 'mean', 'max'))
      self.assertTrue(0 < least <= mean <= most < .5)
      self.assertEqual(rows[20][f'{name}_max'], 0)  # Refreshes are over.
    # What enters A was outside before; as much leaves it.
    self.assertAlmostEqual(2 * .8 * rows[10]['reservoir_used_max'],
                           rows[10]['mask_change_max'], delta=.01)

  def test_last_step_is_evaluated_once(self):
    with mock.patch.object(
        training, 'evaluate', wraps=training.evaluate) as spy:
      train.train(self._values(method='static', train_steps=8))
    self.assertEqual(spy.call_count, 1)

  def test_each_evaluation_leaves_a_checkpoint_unless_told_otherwise(self):
    train.train(self._values(method='static', train_steps=20, eval_every=8,
                             checkpoint_every=None))
    saved = _checkpoints(self._path())
    self.assertEqual(saved[-2:], [16, 20])
    every = functools.partial(run_flags.steps_between, 'checkpoint')
    self.assertEqual(every({'checkpoint_every': None, 'eval_every': 5004}),
                     1000)
    self.assertEqual(every({'checkpoint_every': 5004, 'eval_every': 8}), 5004)

  def test_finished_run_only_prints_its_report(self):
    values = self._values(method='static', train_steps=5)
    result = train.train(values)
    files = {path: path.stat().st_mtime_ns for path in self._path().rglob('*')}
    with mock.patch.object(
        training, 'run_steps', side_effect=AssertionError), (
        mock.patch('builtins.print')) as printed:
      again = train.train(values | {'log_every': 1})
    self.assertEqual(again, json.loads(json.dumps(result)))
    self.assertIn('test accuracy', str(printed.mock_calls))
    self.assertEqual(files, {path: path.stat().st_mtime_ns
                             for path in self._path().rglob('*')})

  def test_run_stopped_before_its_report_makes_it(self):
    values = self._values(method='static', train_steps=5)
    with mock.patch.object(report, 'report', side_effect=KeyboardInterrupt):
      with self.assertRaises(KeyboardInterrupt):
        train.train(values)
    result = train.train(values)
    self.assertEqual(result['test_loss'], _rows(values)[-1]['test_loss'])

  def test_error_ends_thread_and_writers(self):
    closed = []
    prefetch, close = batching.prefetch, reporting.JsonlWriter.close

    def watched(batches):
      try:
        yield from prefetch(batches)
      finally:
        closed.append('thread')
    with (mock.patch.object(batching, 'prefetch', watched),
          mock.patch.object(
              reporting.JsonlWriter, 'close', autospec=True,
              side_effect=lambda self: (closed.append('files'), close(self))),
          mock.patch.object(training, 'measure', side_effect=OSError)):
      with self.assertRaises(OSError):
        train.train(self._values(method='static', train_steps=5))
    self.assertEqual(closed, ['files', 'thread'])

  def test_undefined_loss_is_an_error_and_is_not_saved(self):
    values = self._values(method='static', optimizer='sgd', log_every=100,
                          warmup_share=0., learning_rate=1e30,
                          checkpoint_every=3)
    with self.assertRaisesRegex(FloatingPointError, 'learning_rate.*1e[+]30'):
      train.train(values)
    self.assertEmpty(_checkpoints(self.workdir))
    self.assertFalse(self._path('result.json').exists())

  def test_changed_flag_is_named_and_nothing_changes(self):
    values = self._values(method='static', train_steps=5)
    train.train(values)
    files = {path: path.read_bytes() for path in self._path().rglob('*')
             if path.is_file()}
    with self.assertRaisesRegex(ValueError, 'seed: 0 stored, 1 now'):
      train.train(values | {'seed': 1})
    self.assertEqual(files, {path: path.read_bytes()
                             for path in self._path().rglob('*')
                             if path.is_file()})

  @parameterized.named_parameters(
      ('metrics', 'metrics.jsonl', '{"step": 1}\n', 'metrics.jsonl'),
      ('result', 'result.json', '{}', 'result.json'),
      ('checkpoints', 'checkpoints/notes.txt', 'mine', 'notes.txt'),
      ('config', 'checkpoints/config.json', '{"width', 'config.json'))
  def test_foreign_workdir_is_named_and_untouched(self, name, text, message):
    path = self._path(name)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with self.assertRaisesRegex(ValueError,
                                f'workdir.*{self.workdir}.*{message}'):
      train.train(self._values())
    self.assertEqual([p for p in self._path().rglob('*') if p.is_file()],
                     [path])
    self.assertEqual(path.read_text(), text)

  def test_corrupt_checkpoints_are_named_and_kept(self):
    values = self._values(method='static', train_steps=5)
    train.train(values)
    self._path('result.json').unlink()
    victims = [path for path in self._path('checkpoints', '5').rglob('*')
               if path.is_file()]
    for path in victims:
      path.write_bytes(b'corrupt')
    with self.assertRaisesRegex(ValueError, f'workdir.*{self.workdir}'):
      train.train(values)
    self.assertEqual({path.read_bytes() for path in victims}, {b'corrupt'})


class ContinueTest(parameterized.TestCase):
  """Killed and started again, a run is the unbroken run, bit for bit."""

  def setUp(self):
    super().setUp()
    self.folder = self.enterContext(tempfile.TemporaryDirectory())
    self.enterContext(mock.patch.object(report, 'draw'))

  def _pair(self, **changes):
    """The flags of an unbroken run and of one that will be killed."""
    return [_values(workdir=os.path.join(self.folder, name), **changes)
            for name in ('unbroken', 'killed')]

  def _assert_same(self, unbroken, killed):
    expected, actual = _saved(unbroken), _saved(killed)
    self.assertEqual(expected.keys(), actual.keys())
    for path in expected:
      self.assertEqual(expected[path], actual[path], path)
    self.assertEqual(_rows(unbroken), _rows(killed))
    return expected

  def test_killed_and_then_terminated_run_equals_unbroken_one(self):
    unbroken, killed = self._pair(
        train_steps=150, checkpoint_every=10, log_every=40, eval_every=100)
    first = _start(killed)
    _wait_for_checkpoint(first, killed['workdir'], 0)
    first.kill()
    first.communicate()
    second = _start(killed)
    _wait_for_checkpoint(second, killed['workdir'],
                         _checkpoints(killed['workdir'])[-1])
    second.terminate()
    output = second.communicate()[0]
    self.assertEqual(second.returncode, checkpointing.REQUEUE_EXIT_CODE, output)
    self.assertIn('start again with the same flags', output)
    self.assertLess(_checkpoints(killed['workdir'])[-1], 150)
    train.train(killed)
    train.train(unbroken)
    self._assert_same(unbroken, killed)

  def test_every_part_of_the_state_continues(self):
    data_dir = _small_fashion(self.folder)
    unbroken, killed = self._pair(**_EVERYTHING, data_dir=data_dir)
    process = _start(killed, program=_WITH_SMALL_NETWORK)
    _wait_for_checkpoint(process, killed['workdir'], 0)
    process.kill()
    process.communicate()
    self.assertLess(_checkpoints(killed['workdir'])[-1], 60)
    self.enterContext(mock.patch.dict(models.MODELS, wrn_16_8=SmallNetwork))
    train.train(killed)
    train.train(unbroken)
    leaves = self._assert_same(unbroken, killed)
    for part in ('.params', '.model_state', '.marks', '.mu', '.nu', '.key',
                 '.sums'):
      self.assertTrue(any(part in path for path in leaves), part)


class DevicesTest(parameterized.TestCase):
  """Replicas agree: how many devices there are does not matter."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = cls.enterClassContext(tempfile.TemporaryDirectory())
    cls.enterClassContext(mock.patch.object(report, 'draw'))
    cls.eight = cls._values('eight')
    train.train(cls.eight)

  @classmethod
  def _values(cls, name, **changes):
    return _values(workdir=os.path.join(cls.folder, name), optimizer='sgd',
                   update_every=2, **{'train_steps': 10} | changes)

  def _assert_agree(self, values, others):
    marks = _marks(values)
    self.assertLen(marks, 3)
    self.assertEqual(marks, _marks(others))
    for row, other in zip(_rows(values), _rows(others), strict=True):
      self.assertEqual(row.keys(), other.keys())
      for name in row:  # Sums over a batch differ in their order.
        np.testing.assert_allclose(row[name], other[name], rtol=1e-5,
                                   atol=1e-6, err_msg=name)

  def test_eight_devices_make_the_masks_and_losses_of_one(self):
    one = self._values('one')
    process = _start(one, num_devices=1)
    output = process.communicate()[0]
    self.assertEqual(process.returncode, 0, output)
    self._assert_agree(self.eight, one)

  def test_a_resume_on_another_number_of_devices_says_that_it_rounds(self):
    values, measure = self._values('fewer'), training.measure

    def stop(run, state, step, model):
      if step == 7:
        raise KeyboardInterrupt
      return measure(run, state, step, model)
    with mock.patch.object(training, 'measure', stop):
      with self.assertRaises(KeyboardInterrupt):
        train.train(values | {'checkpoint_every': 3})
    mesh = jax.make_mesh(
        (2, 1), ('data', 'model'), devices=jax.devices()[:2],
        axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with (mock.patch.object(devices, 'mesh', lambda *_: mesh),
          mock.patch.object(jax, 'device_count', return_value=2),
          mock.patch.object(logging, 'warning') as warned):
      train.train(values)
    text, *arguments = warned.call_args.args
    self.assertRegex(text % tuple(arguments), 'began on 8 devices .*goes on on '
                     '2 .*to rounding, not bit for bit')
    self._assert_agree(self.eight, values)

  def test_two_hosts_make_the_masks_and_losses_of_one(self):
    two = self._values('two')
    with socket.socket() as free:
      free.bind(('localhost', 0))
      address = f'localhost:{free.getsockname()[1]}'
    processes = [_start(two, 4, _TRAIN_ON_HOSTS, distributed=True,
                        coordinator=address, num_processes=2, process_id=i)
                 for i in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    self.assertEqual([process.returncode for process in processes], [0, 0],
                     '\n'.join(outputs))
    self.assertIn('test accuracy', outputs[0])
    self.assertNotIn('test accuracy', outputs[1])
    for method, parts in _PARTS_ON_HOSTS.items():
      with self.subTest(method):
        one = self._values(f'{method}1', method=method)
        train.train(one)
        self._assert_agree(one, self._values(
            os.path.join('two', method), method=method, model_parallel=parts))

  @parameterized.parameters('rigl', 'top_kast', 'swat')
  def test_split_parameters_make_the_masks_and_losses_of_whole_ones(
      self, method):
    """And no array of a weight's shape is gathered in a step."""
    whole, split = (self._values(f'{method}{parts}', method=method,
                                 model_parallel=parts) for parts in (1, 4))
    train.train(whole)
    train.train(split)
    self._assert_agree(split, whole)
    run = train.prepare(split, split['workdir'])
    state = run.init.out_info
    batch = next(run.train_batches(0))
    text = run.step_fn.lower(state, batch).compile().as_text()
    gathered = {tuple(sorted(map(int, shape.split(',')))) for shape in
                re.findall(r'= \w+\[([\d,]+)\]\S* all-gather', text)}
    self.assertEmpty(gathered & {
        tuple(sorted(leaf.shape)) for leaf in jax.tree.leaves(state.params)
        if leaf.ndim > 1})

  def test_growth_by_gradient_is_that_of_a_mesh_of_one(self):
    many, one = (self._values(name, method='rigl')
                 for name in ('rigl', 'rigl_on_one'))
    train.train(many)
    mesh = jax.make_mesh(
        (1, 1), ('data', 'model'), devices=jax.devices()[:1],
        axis_types=(jax.sharding.AxisType.Auto,) * 2)
    expected = _marks(many)
    with mock.patch.object(devices, 'mesh', lambda *_: mesh):
      train.train(one)
      self.assertEqual(_marks(one), expected)


class CommandLineTest(absltest.TestCase):

  def test_bad_flag_is_status_two_and_one_line(self):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    values = _values(workdir=os.path.join(folder, 'run'), sparsity=1.)
    with mock.patch.object(train, 'run_config', return_value=values), (
        mock.patch.object(logging, 'error')) as logged:
      with self.assertRaises(SystemExit) as stopped:
        train.main(['train'])
    self.assertEqual(stopped.exception.code, 2)
    (text, error), _ = logged.call_args
    self.assertRegex(text % error, r'`sparsity` \(=1\.0\)')
    self.assertEmpty(os.listdir(folder))


if __name__ == '__main__':
  absltest.main()
