"""What bad treatment ends in: one clear line, the right status, no damage."""

import contextlib
import errno
import io
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from unittest import mock

from absl import app
from absl import flags
from absl import logging
from absl.testing import absltest
from absl.testing import flagsaver
from absl.testing import parameterized
import jax

from experiments import datasets
from experiments import devices
from experiments import export
from experiments import files
from experiments import locking
from experiments import programs
from experiments import results
from experiments import sparsity
from experiments import report
from experiments import training
from experiments.image import input_pipeline
from experiments.image import train
from tests import fast_compiler

_ROOT = pathlib.Path(__file__).parents[1]
_HOLD = """
from experiments import locking
import sys, time
with locking.hold(sys.argv[1]):
  print('held', flush=True)
  time.sleep(60)
"""
_HOST = """
import sys
from experiments import devices
port, index, method = sys.argv[1:]
devices.join({'coordinator': f'localhost:{port}', 'num_processes': 2,
              'process_id': int(index), 'distributed': True,
              'heartbeat_timeout': 10})
try:
  devices.check_equal({'method': method, 'data_dir': index}, ['data_dir'])
except ValueError as error:
  print(error, flush=True)
try:
  devices.agree(lambda: open('/no/' + index) if index == '1' else None)
except (ValueError, OSError) as error:
  print(error, flush=True)
"""


def setUpModule():
  fast_compiler.use()
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(['faults_test'])


def tearDownModule():
  fast_compiler.leave()


def _python(*arguments, **environment):
  return subprocess.Popen(
      [sys.executable, *arguments], cwd=_ROOT, stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT, text=True, env={
          **os.environ, 'PYTHONPATH': str(_ROOT), 'JAX_PLATFORMS': 'cpu',
          **environment})


def _values(workdir, **changes):
  return train.run_config() | {
      'workdir': str(workdir), 'width': .1, 'train_steps': 4, 'log_every': 2,
      'eval_every': 4, 'checkpoint_every': 4} | changes


class FaultTestCase(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def leaves(self, values):
    """The status of the image program and its one line."""
    with (mock.patch.object(train, 'run_config', return_value=values),
          mock.patch.object(programs, 'say_it_once'),
          mock.patch.object(logging, 'error') as logged):
      with self.assertRaises(SystemExit) as stopped:
        train.main(['train'])
    (text, *arguments), _ = logged.call_args
    logged.assert_called_once()
    return stopped.exception.code, text % tuple(arguments)


class LockTest(FaultTestCase):

  def test_a_second_start_leaves_and_a_killed_process_holds_nothing(self):
    process = _python('-c', _HOLD, str(self.folder / 'run'))
    self.addCleanup(process.stdout.close)
    self.addCleanup(process.kill)
    self.assertEqual(process.stdout.readline(), 'held\n')
    values = _values(self.folder / 'run')
    code, line = self.leaves(values)
    self.assertEqual(code, 76)
    self.assertRegex(line, rf'`workdir` .*run.*process {process.pid} of .* is '
                     'at this run')
    self.assertEqual(os.listdir(self.folder / 'run'), ['lock'])
    process.send_signal(signal.SIGKILL)
    process.wait()
    with mock.patch.object(report, 'draw'):
      self.assertEqual(train.train(values)['steps'], 4)

  def test_a_link_in_place_of_the_lock_is_not_followed(self):
    victim = self.folder / 'victim'
    victim.write_text('mine')
    (self.folder / 'lock').symlink_to(victim)
    with self.assertRaisesRegex(OSError, 'lock'):
      with locking.hold(str(self.folder)):
        pass
    self.assertEqual(victim.read_text(), 'mine')

  def test_without_locks_there_is_a_warning(self):
    refusal = OSError(errno.ENOLCK, 'No locks available')
    with (mock.patch.object(locking.fcntl, 'flock', side_effect=refusal),
          mock.patch.object(logging, 'warning') as warned):
      with locking.hold(str(self.folder)):
        pass
    warned.assert_called_once()


class HostsTest(parameterized.TestCase):

  def test_flags_that_differ_are_named_by_all(self):
    with socket.socket() as free:
      free.bind(('localhost', 0))
      port = str(free.getsockname()[1])
    hosts = [_python('-c', _HOST, port, str(i), method)
             for i, method in enumerate(('set', 'rigl'))]
    texts = [host.communicate(timeout=120)[0] for host in hosts]
    self.assertEqual([host.returncode for host in hosts], [0, 0], texts)
    for text in texts:
      self.assertIn("`method` must be the same in all processes; it is 'set' "
                    "in process 0 and 'rigl' in process 1.", text)
    self.assertIn("process 1 cannot start: [Errno 2] No such file or "
                  "directory: '/no/1'", texts[0])
    self.assertIn("No such file or directory: '/no/1'", texts[1])

  @parameterized.parameters('--nosuch=3', 'typo', '--train_steps=few')
  def test_what_absl_refuses_on_one_host_ends_all(self, argument):
    """Else the others would wait for it, five minutes."""
    with socket.socket() as free:
      free.bind(('localhost', 0))
      address = f'localhost:{free.getsockname()[1]}'
    hosts = [_python(
        '-m', 'experiments.image.train', '--distributed', '--num_processes=2',
        '--coordinator', address, f'--process_id={i}', *[argument] * i)
             for i in range(2)]
    texts = [host.communicate(timeout=120)[0] for host in hosts]
    self.assertEqual([host.returncode for host in hosts], [2, 2], texts)
    named = argument.strip('-').partition('=')[0]
    self.assertRegex(texts[0], f'process 1 cannot start: .*{named}')
    self.assertRegex(texts[1], f'train.py: .*{named}')

  def test_a_run_compares_its_flags_before_all_else(self):
    values = _values('/nowhere/run')
    with mock.patch.object(devices, 'gather', side_effect=lambda value: [
        value, value | {'sparsity': .5, 'data_dir': 'other'}]):
      with self.assertRaisesRegex(ValueError, '`sparsity` must be the same in '
                                  'all processes; it is 0.9 .* 0.5 '):
        train.train(values)

  def test_a_lost_process_is_status_134(self):
    """That of SIGABRT, by which JAX ends a process whose step hangs."""
    for error in (TimeoutError('barrier'), jax.errors.JaxRuntimeError('gloo')):
      with (mock.patch.object(training, 'train', side_effect=error),
            mock.patch.object(jax, 'process_count', return_value=2),
            mock.patch.object(programs, 'say_it_once'),
            mock.patch.object(logging, 'error') as logged,
            mock.patch.object(os, 'abort', side_effect=SystemExit(134))):
        with self.assertRaises(SystemExit) as stopped:
          train.main(['train'])
      self.assertEqual(stopped.exception.code, 134)
      self.assertIn('another one has probably died', logged.call_args.args[0])

  @parameterized.parameters('localhost', ':1', 'localhost:port', 'a b:99999')
  def test_a_bad_address_is_named(self, address):
    with self.assertRaisesRegex(ValueError, f'`coordinator` .*{address}.*must'):
      devices.join({'coordinator': address, 'num_processes': 2, 'process_id': 0,
                    'distributed': True, 'heartbeat_timeout': 10})


class FilesTest(FaultTestCase):

  def test_a_failure_leaves_nothing(self):
    path = self.folder / 'file'
    path.write_text('old')
    with self.assertRaises(ZeroDivisionError):
      with files.replacing(path) as file:
        file.write(b'new')
        file.write(bytes(1 // 0))
    self.assertEqual(path.read_text(), 'old')
    self.assertEqual(os.listdir(self.folder), ['file'])

  def test_a_full_disk_is_named(self):
    with mock.patch.object(os, 'fsync', side_effect=OSError(
        errno.ENOSPC, 'No space left on device')):
      with self.assertRaisesRegex(OSError, 'No space left on device: .*file'):
        files.write_text(self.folder / 'file', 'text')

  def test_a_disk_that_is_full_while_saving_is_one_line(self):
    """Files that cannot grow stand in for it."""
    input_pipeline.load('digits', 'test')  # Makes the set if need be.
    code = ('import resource, runpy, sys; '
            'resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000)); '
            'runpy.run_module("experiments.image.train", run_name="__main__")')
    process = _python('-c', code, '--train_steps=20', '--checkpoint_every=5',
                      f'--workdir={self.folder / "run"}',
                      JAX_ENABLE_COMPILATION_CACHE='false')
    text = process.communicate(timeout=120)[0]
    self.assertEqual(process.returncode, 2, text)
    lines = [line for line in text.splitlines()
             if line and ' steps/s, ' not in line]  # What shows progress.
    self.assertLen(lines, 1, text)
    self.assertRegex(lines[0], 'checkpoint of step 5 failed.*too large')

  def test_what_libraries_print_of_a_failed_write_is_left_out(self):
    self.enterContext(mock.patch.object(sys, 'unraisablehook'))
    self.enterContext(mock.patch.object(threading, 'excepthook'))
    callback, thread = sys.unraisablehook, threading.excepthook
    handler = logging.get_absl_handler()
    before = list(handler.filters)
    self.addCleanup(setattr, handler, 'filters', before)
    programs.say_it_once()
    for text, shown in (('Event loop is closed', 0), ('other', 1)):
      sys.unraisablehook(mock.Mock(exc_value=RuntimeError(text)))
      self.assertEqual(callback.call_count, shown)
    for error, shown in ((OSError('full'), 0), (ValueError('other'), 1)):
      threading.excepthook(mock.Mock(exc_value=error))
      self.assertEqual(thread.call_count, shown)
    own, = set(handler.filters) - set(before)
    for path, exc_info, shown in (('/x/orbax/a.py', True, False),
                                  ('/x/orbax/a.py', None, True),
                                  ('/x/other/a.py', True, True)):
      record = mock.Mock(pathname=path, exc_info=exc_info)
      self.assertEqual(bool(own(record)), shown)

  @parameterized.parameters('{', '[]', '{}', '{"flags": 3}', '\xff')
  def test_a_damaged_result_is_named(self, text):
    (self.folder / 'result.json').write_text(text, encoding='latin1')
    for read in (lambda: results.read(str(self.folder)),
                 lambda: export.from_run(str(self.folder), 'dense')):
      with self.assertRaisesRegex(ValueError, 'result.json is damaged'):
        read()
    self.assertIsNone(results.finished(str(self.folder), {}, ()))

  @parameterized.parameters('evil', 'os', None, 'experiments.export')
  def test_export_imports_only_programs_of_this_project(self, program):
    (self.folder / 'evil.py').write_text('raise SystemExit("it ran")')
    (self.folder / 'result.json').write_text(json.dumps(
        {'flags': {}, 'program': program}))
    sys.path.insert(0, str(self.folder))
    self.addCleanup(sys.path.remove, str(self.folder))
    with self.assertRaisesRegex(ValueError, 'result.json: `program` .*must be '
                                'one of experiments.image.train, '):
      export.from_run(str(self.folder), 'dense')

  def test_export_names_a_result_that_lacks_flags(self):
    (self.folder / 'result.json').write_text(json.dumps(
        {'flags': {}, 'program': 'experiments.image.train'}))
    with self.assertRaisesRegex(ValueError, 'result.json .*no flag'):
      export.from_run(str(self.folder), 'dense')


class DataTest(FaultTestCase):

  def setUp(self):
    super().setUp()
    self.enterContext(mock.patch.dict(os.environ, {
        'XDG_CACHE_HOME': str(self.folder)}))

  @parameterized.parameters('dataset_info.json', 'features.json',
                            'digits-test.array_record-00000-of-00001')
  def test_a_damaged_data_set_is_named(self, name):
    place = self.folder / 'sparse_jax/tfds/digits/1.0.0'
    for damage in (lambda data: data[:len(data) // 2],
                   lambda data: b'?' * len(data)):
      input_pipeline.load('digits', 'test')
      content = (place / name).read_bytes()
      (place / name).write_bytes(damage(content))
      with self.assertRaisesRegex(ValueError, str(place)) as raised:
        input_pipeline.load('digits', 'test')
      self.assertNotIn('\n', str(raised.exception))
      (place / name).write_bytes(content)

  def test_a_cache_folder_that_cannot_be_written_is_named(self):
    (self.folder / 'file').touch()
    os.environ['XDG_CACHE_HOME'] = str(self.folder / 'file')
    with self.assertRaisesRegex(ValueError, 'the cache folder .*file/sparse_jax'
                                '/tfds cannot be used: .*Set XDG_CACHE_HOME'):
      input_pipeline.load('digits', 'test')

  def test_whatever_reading_published_files_raises_names_them(self):
    with self.assertRaisesRegex(ValueError, 'here cannot be read .KeyError: '
                                '.*linkname'):
      with datasets.reading('here', ValueError, OSError):
        raise KeyError("linkname 'x' not found")


class FlagsTest(parameterized.TestCase):

  @parameterized.parameters(('str', 'sparsity', .9), ('dense', 'sparsity', .9),
                            ('rigl', 'nm', ['2', '4']))
  def test_a_default_that_is_typed_and_not_used_is_an_error(self, method, flag,
                                                            value):
    values = train.run_config() | {'method': method}
    sparsity.from_flags(values, 100)
    with flagsaver.flagsaver():
      flags.FLAGS[flag].present = 1
      with self.assertRaisesRegex(ValueError, f'`{flag}` .*is .*setting of'):
        sparsity.from_flags(values, 100)

  def test_dense_layers_that_are_not_there_are_named_by_their_flag(self):
    with self.assertRaisesRegex(ValueError, "`dense_layers` .='nothere'"):
      train.prepare(_values('run', dense_layers=['nothere']), 'run')


class CommandLineTest(parameterized.TestCase):

  def run_program(self, *arguments):
    process = _python('-m', 'experiments.image.train', *arguments)
    text = process.communicate(timeout=120)[0]
    return process.returncode, text

  def test_help_shows_every_flag_of_the_program_with_its_default(self):
    code, text = self.run_program('--help')
    self.assertEqual(code, 0)
    for name in train.run_config():
      self.assertRegex(text, rf'\n  --(\[no\])?{name}\b')
    for group in ('This program', 'The run', 'The method and its masks',
                  'The optimizer', 'Several processes'):
      self.assertIn(f'\n{group}:\n', text)
    self.assertRegex(text, r"--batch_size: Images per step.*\n.*'128'")
    self.assertRegex(text, r'--drop_fraction: [^-]*0\.3: set, rigl')
    self.assertNotIn('--pdb', text)

  @parameterized.parameters(
      (('--nosuch=3',), 'nosuch'), (('--method=foo',), '--method=foo'),
      (('typo',), 'typo'), (('--train_steps=few',), 'train_steps'))
  def test_what_absl_refuses_is_status_two_and_one_line(self, arguments, named):
    with (mock.patch.object(sys, 'argv', ['train', *arguments]),
          mock.patch.object(app, 'run', side_effect=lambda main, flags_parser:
                            main(flags_parser(sys.argv))),
          contextlib.redirect_stderr(io.StringIO()) as printed):
      with self.assertRaises(SystemExit) as stopped, flagsaver.flagsaver():
        programs.run(train.main)
    self.assertEqual(stopped.exception.code, 2)
    self.assertRegex(printed.getvalue(), f'^train: .*{named}.*\n$')

  def test_a_missing_package_names_the_extra(self):
    process = _python('-c', (
        'import sys, runpy; sys.modules["tensorflow_datasets"] = None; '
        'runpy.run_module("experiments.image.prepare", run_name="__main__")'))
    text = process.communicate(timeout=120)[0]
    self.assertEqual(process.returncode, 2)
    self.assertRegex(text, 'tensorflow_datasets is not installed: pip install '
                     r'"sparse_jax\[experiments\]"\n$')
    self.assertNotIn('Traceback', text)


if __name__ == '__main__':
  absltest.main()
