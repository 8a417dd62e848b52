"""Laws of experiments/checkpointing.py: what is restored is what was saved."""

import errno
import gc
import json
import os
import pathlib
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from typing import Any, NamedTuple
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
from experiments import checkpointing
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_CONFIG = {'method': 'top_kast', 'sparsity': 0.9, 'seed': 0}


class Masks(NamedTuple):
  forward: Any
  backward: Any


class State(NamedTuple):
  step: Any
  params: Any
  masks: Any
  key: Any
  extra: Any = None


def _normal(seed, shape):
  """float32; what JAX draws itself takes long to compile."""
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape),
                     jnp.float32)


def _make_state(seed=0):
  key = jax.random.key(seed)
  rng = np.random.default_rng(seed)
  weight = rng.normal(size=(16, 24)).astype(np.float32)
  weight[0, :3] = -0., np.nan, 1e-45
  weight = jnp.asarray(weight)
  bits = jnp.asarray(rng.integers(2**32, size=(16, 24), dtype=np.uint32))
  return State(
      step=jnp.asarray(seed),  # Weakly typed.
      params={'dense': {'kernel': weight,
                        'bias': jnp.arange(7).astype(jnp.bfloat16)},
              'empty': jnp.zeros((0, 3))},
      masks=Masks(forward={'dense': {'kernel': weight > 0, 'bias': None}},
                  backward=(bits.astype(jnp.uint8), bits)),
      key=key,
      extra=[jax.random.split(jax.random.key(1, impl='rbg'), 3), (), {}])


def _small_state(step):
  return {'weight': jnp.full((4, 4), step, jnp.float32)}


def _bytes(x):
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  return np.asarray(x).tobytes()


def _type(x):
  return x.shape, x.dtype, getattr(x, 'weak_type', False)


def _mesh(*shape):
  return jax.make_mesh(
      shape, ('x', 'y')[:len(shape)],
      axis_types=(jax.sharding.AxisType.Auto,) * len(shape))


def _largest_file(directory):
  files = [p for p in pathlib.Path(directory).rglob('*') if p.is_file()]
  return max(files, key=lambda p: p.stat().st_size)


class CheckpointingTestCase(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    # Not create_tempdir: it wants parsed flags, which pytest has none of.
    scratch = tempfile.TemporaryDirectory()
    self.addCleanup(scratch.cleanup)
    self.directory = pathlib.Path(scratch.name) / 'run'

  def open(self, save_every=1, config=_CONFIG, **kwargs):
    return checkpointing.Checkpoints(
        self.directory, save_every=save_every, config=config, **kwargs)

  def save_steps(self, *steps, make=_small_state):
    with self.open() as checkpoints:
      for step in steps:
        checkpoints.save(step, make(step))

  def assert_same(self, got, want):
    self.assertEqual(jax.tree.structure(got), jax.tree.structure(want))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
      self.assertEqual(_type(x), _type(y))
      self.assertEqual(_bytes(x), _bytes(y))

  def steps(self):
    return sorted(int(p.name) for p in self.directory.iterdir()
                  if p.name.isdigit())


class RestoreTest(CheckpointingTestCase):

  def test_state_comes_back_bit_for_bit(self):
    state = _make_state()
    self.save_steps(3, make=lambda _: state)
    with self.open() as checkpoints:
      restored, step = checkpoints.restore_latest(checkpointing.abstract(state))
    self.assertEqual(step, 3)
    self.assert_same(restored, state)

  def test_new_directory_has_nothing_to_restore(self):
    with self.open() as checkpoints:
      self.assertIsNone(checkpoints.restore_latest(_make_state()))

  def test_donating_the_state_after_a_save_does_not_change_it(self):
    state = {'weight': jnp.arange(1 << 20, dtype=jnp.float32)}
    want = np.asarray(state['weight']).copy()
    double = jax.jit(lambda s: jax.tree.map(lambda x: x * 2, s),
                     donate_argnums=0)
    with self.open() as checkpoints:
      checkpoints.save(1, state)
      for _ in range(5):
        state = double(state)
      restored, _ = checkpoints.restore_latest(state)
    np.testing.assert_array_equal(restored['weight'], want)

  @parameterized.named_parameters(
      ('same_mesh', (4, 2), ('x', 'y')), ('transposed', (4, 2), ('y', 'x')),
      ('fewer_devices', (2,), ('x',)), ('replicated', (8,), ()))
  def test_restores_onto_another_mesh(self, shape, spec):
    state = {'weight': _normal(5, (8, 16)),
             'keys': jax.random.split(jax.random.key(6), 8)}
    saved = jax.device_put(state, NamedSharding(
        _mesh(4, 2), PartitionSpec('x')))
    self.save_steps(1, make=lambda _: saved)
    wanted = {'weight': NamedSharding(_mesh(*shape), PartitionSpec(*spec)),
              'keys': NamedSharding(_mesh(*shape), PartitionSpec(*spec[:1]))}
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state, wanted)
    with self.open() as checkpoints:
      restored, _ = checkpoints.restore_latest(target)
    for name, sharding in wanted.items():
      self.assertTrue(sharding.is_equivalent_to(
          restored[name].sharding, state[name].ndim))
    self.assert_same(restored, state)

  def test_abstract_of_eval_shape_needs_no_values(self):
    self.save_steps(1)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(lambda: _small_state(0)))
    with self.open() as checkpoints:
      restored, _ = checkpoints.restore_latest(target)
    self.assertEqual(restored['weight'].sharding, sharding)

  @parameterized.named_parameters(
      ('dtype', lambda x: x.astype(jnp.bfloat16), r'bfloat16\[4,4\] wanted'),
      ('shape', lambda x: x[:2], r'float32\[2,4\] wanted'))
  def test_difference_is_named_with_both_values(self, change, message):
    self.save_steps(1)
    target = jax.tree.map(change, _small_state(1))
    with self.open() as checkpoints, self.assertRaisesRegex(
        ValueError, r"\['weight'\]: float32\[4,4\] saved, " + message):
      checkpoints.restore_latest(target)

  def test_keys_of_another_kind_are_a_difference(self):
    self.save_steps(1, make=lambda _: {'key': jax.random.key(0, impl='rbg')})
    target = {'key': jax.random.key(0, impl='unsafe_rbg')}
    with self.open() as checkpoints, self.assertRaisesRegex(
        ValueError, r"\['key'\]: key<rbg>\[\] saved, key<urbg>\[\] wanted"):
      checkpoints.restore_latest(target)

  def test_foreign_tree_is_named_leaf_by_leaf(self):
    self.save_steps(1)
    target = {'bias': jnp.zeros(4), 'kernel': jnp.zeros((4, 4))}
    with self.open() as checkpoints, self.assertRaisesRegex(
        ValueError, r"target has \['bias'\], \['kernel'\] that it lacks, it "
        r"has \['weight'\] that the target lacks"):
      checkpoints.restore_latest(target)

  def test_checkpoint_of_another_program_is_not_read(self):
    import orbax.checkpoint as ocp
    self.save_steps()
    with ocp.CheckpointManager(self.directory) as manager:
      manager.save(1, args=ocp.args.StandardSave(_small_state(1)))
    with self.open() as checkpoints, self.assertRaisesRegex(
        RuntimeError, 'no checkpoint that can be read'):
      checkpoints.restore_latest(_small_state(1))

  @parameterized.named_parameters(
      ('number', 3, "leaf .'x'. .=3. must be a jax.Array"),
      ('unplaced', jax.ShapeDtypeStruct((2,), jnp.float32), 'have a sharding'))
  def test_abstract_refuses(self, leaf, message):
    with self.assertRaisesRegex(ValueError, message):
      checkpointing.abstract({'x': leaf})


# Orbax leaves coroutines of a closed event loop behind after a failed read.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
class DamageTest(CheckpointingTestCase):

  def setUp(self):
    super().setUp()
    self.addCleanup(gc.collect)

  def restore(self):
    with self.open() as checkpoints:
      return checkpoints.restore_latest(_small_state(0))

  def test_truncated_newest_falls_back_and_makes_room(self):
    self.save_steps(1, 2, 3)
    path = _largest_file(self.directory / '3' / 'state')
    os.truncate(path, path.stat().st_size // 2)
    with self.open() as checkpoints:
      with self.assertLogs('absl', 'WARNING') as logs:
        state, step = checkpoints.restore_latest(_small_state(0))
      self.assertIn(f'{self.directory}/3 cannot be read', logs.output[0])
      self.assertEqual(step, 2)
      self.assert_same(state, _small_state(2))
      self.assertTrue((self.directory / '3').exists())
      checkpoints.save(3, _small_state(30))
      checkpoints.wait()
    self.assertTrue((self.directory / '3.unreadable').exists())
    self.assert_same(self.restore()[0], _small_state(30))

  def test_room_is_made_twice(self):
    self.save_steps(1, 2)
    for _ in range(2):
      os.truncate(_largest_file(self.directory / '2' / 'state'), 0)
      with self.open() as checkpoints:
        self.assertEqual(checkpoints.restore_latest(_small_state(0))[1], 1)
        checkpoints.save(2, _small_state(2))
    self.assertEqual(self.steps(), [1, 2])
    self.assertLen(list(self.directory.glob('2.unreadable*')), 2)

  def test_damage_to_any_file_is_never_restored_as_something_else(self):
    """Each file of a checkpoint in turn is cut, altered, deleted."""
    make = lambda step: {'key': jax.random.key(step),
                         'weight': _normal(step, (64, 64))}
    self.save_steps(1, 2, make=make)
    backup = self.directory.with_name('backup')
    shutil.copytree(self.directory / '2', backup)
    files = [p.relative_to(backup) for p in backup.rglob('*') if p.is_file()]
    fell_back = 0
    for damage in (_cut, _flip_bit, pathlib.Path.unlink):
      for file in files:
        shutil.rmtree(self.directory / '2')
        shutil.copytree(backup, self.directory / '2')
        damage(self.directory / '2' / file)
        with self.open() as checkpoints:
          state, step = checkpoints.restore_latest(make(0))
        self.assert_same(state, make(step))
        fell_back += step == 1
    self.assertGreater(fell_back, 10)

  def test_none_readable_is_an_error_and_deletes_nothing(self):
    self.save_steps(1, 2)
    for step in ('1', '2'):
      os.truncate(_largest_file(self.directory / step / 'state'), 0)
    before = sorted(self.directory.rglob('*'))
    with self.assertRaisesRegex(RuntimeError, r'no checkpoint that can be rea'):
      self.restore()
    self.assertEqual(sorted(self.directory.rglob('*')), before)

  def test_write_error_is_raised_and_the_previous_checkpoint_stays(self):
    """A limit on file size stands in for a full disk."""
    make = lambda step: {'weight': _normal(step, (1 << 20,))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for raising in ('wait', 'close', 'save'):
      with self.subTest(raising):
        checkpoints = self.open()
        checkpoints.save(1, make(1))
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
        try:
          checkpoints.save(2, make(2))
          with self.assertRaisesRegex(
              OSError, f'{self.directory}.*step 2 failed.*too large'):
            _finish(checkpoints, raising, make)
        finally:
          resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        checkpoints.close()
        with self.open() as checkpoints:
          state, step = checkpoints.restore_latest(make(0))
          self.assertEqual(step, 1)
          self.assert_same(state, make(1))

  def test_error_while_a_save_begins_is_raised_and_can_be_repaired(self):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with self.open() as checkpoints:
      checkpoints.save(1, _small_state(1))
      checkpoints.wait()
      with mock.patch.object(os, 'mkdir', side_effect=full):
        with self.assertRaisesRegex(OSError, f'{self.directory}.*No space'):
          checkpoints.save(2, _small_state(2))
          checkpoints.wait()
      checkpoints.save(2, _small_state(2))
    self.assertEqual(self.restore()[1], 2)

  def test_kill_while_saving_leaves_a_complete_checkpoint(self):
    """A child saves without pause and is killed at some moment, three times."""
    newest = 0
    for attempt in range(3):
      with _child(_SAVE_FOREVER, str(self.directory)) as child:
        self.assertEqual(child.stdout.readline(), f'from {newest}\n')
        child.stdout.readline()
        time.sleep(0.05 + 0.1 * attempt)
        child.kill()
      with self.open() as checkpoints:
        state, step = checkpoints.restore_latest(_big_state(0))
        self.assertGreater(step, newest)
        self.assert_same(state, _big_state(step))
        newest = step
    with self.open() as checkpoints:
      checkpoints.save(newest + 5, _big_state(newest + 5))
      checkpoints.wait()
    self.assertLen(self.steps(), 2)
    self.assertEmpty(list(self.directory.glob('*tmp*')))


class SaveTest(CheckpointingTestCase):

  def test_saves_when_due_or_forced_and_keeps_the_newest(self):
    with self.open(save_every=2) as checkpoints:
      begun = [checkpoints.save(step, _small_state(step), force=step == 7)
               for step in range(1, 8)]
    self.assertEqual(begun, [False, True, False, True, False, True, True])
    self.assertEqual(self.steps(), [6, 7])

  def test_the_newest_step_is_not_saved_again(self):
    with self.open() as checkpoints:
      self.assertTrue(checkpoints.save(1, _small_state(1)))
      self.assertFalse(checkpoints.save(1, _small_state(2), force=True))
      state, _ = checkpoints.restore_latest(_small_state(0))
    self.assert_same(state, _small_state(1))

  def test_refuses_a_step_before_the_newest(self):
    self.save_steps(5)
    with self.open() as checkpoints, self.assertRaisesRegex(
        ValueError, r'step \(=1\) is before the newest checkpoint \(=5\)'):
      checkpoints.save(1, _small_state(1))

  def test_refuses_a_leaf_that_is_no_array(self):
    with self.open() as checkpoints, self.assertRaisesRegex(
        ValueError, r"leaf \['epoch'\] \(=3\) must be a jax.Array"):
      checkpoints.save(1, {'epoch': 3})


class OpenTest(CheckpointingTestCase):

  def test_same_config_opens_again(self):
    config = {**_CONFIG, 'widths': (64, 128)}
    for _ in range(2):
      self.open(config=config).close()
    stored = json.loads((self.directory / 'config.json').read_text())
    self.assertEqual(stored, {**_CONFIG, 'widths': [64, 128]})

  def test_other_config_names_each_flag_and_both_values(self):
    self.save_steps(1)
    before = (self.directory / 'config.json').read_bytes()
    with self.assertRaisesRegex(
        ValueError, r"epochs: '\(absent\)' stored, 3 now\n  seed: 0 stored, "
        r"'\(absent\)' now\n  sparsity: 0.9 stored, 0.8 now$"):
      self.open(config={'method': 'top_kast', 'sparsity': 0.8, 'epochs': 3})
    self.assertEqual((self.directory / 'config.json').read_bytes(), before)

  def test_free_flags_may_differ(self):
    self.save_steps(1)
    with self.open(config={**_CONFIG, 'seed': 1, 'log_every': 5},
                   free=('seed', 'log_every')):
      pass
    stored = json.loads((self.directory / 'config.json').read_text())
    self.assertEqual(stored, _CONFIG)

  def test_foreign_directory_is_refused_untouched(self):
    self.directory.mkdir()
    (self.directory / 'thesis.tex').touch()
    with self.assertRaisesRegex(RuntimeError, f'{self.directory}.*thesis.tex'):
      self.open()
    self.assertLen(list(self.directory.iterdir()), 1)

  def test_checkpoints_without_config_are_refused(self):
    self.save_steps(1)
    (self.directory / 'config.json').unlink()
    with self.assertRaisesRegex(RuntimeError, 'holds no config.json'):
      self.open()

  def test_killed_while_writing_the_config_is_a_new_directory(self):
    self.directory.mkdir()
    (self.directory / '.config.json.0f').write_text('{"meth')
    self.save_steps(1)
    self.assertEqual(self.steps(), [1])

  def test_damaged_config_is_refused(self):
    self.save_steps(1)
    os.truncate(self.directory / 'config.json', 9)
    with self.assertRaisesRegex(RuntimeError, 'config.json is not JSON'):
      self.open()


class PreemptionTest(CheckpointingTestCase):

  def test_sigterm_is_noted_and_the_old_handler_comes_back(self):
    before = signal.getsignal(signal.SIGTERM)
    with checkpointing.PreemptionGuard() as guard:
      with self.open(guard=guard) as checkpoints:
        self.assertFalse(checkpoints.reached_preemption(1))
        os.kill(os.getpid(), signal.SIGTERM)
        self.assertTrue(guard.requested)
        self.assertTrue(checkpoints.reached_preemption(2))
    self.assertEqual(signal.getsignal(signal.SIGTERM), before)

  def test_two_processes_agree(self):
    """Which checkpoint to read, if one of them cannot, and where to stop."""
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      port = free.getsockname()[1]
    children = [_child(_TWO_PROCESSES, str(self.directory), str(port), str(i))
                for i in range(2)]
    outputs = [child.communicate(timeout=100)[0] for child in children]
    self.assertEqual([child.returncode for child in children],
                     [checkpointing.REQUEUE_EXIT_CODE] * 2, outputs)
    ends = [output.splitlines()[-2:] for output in outputs]  # Gloo chats first.
    self.assertEqual(ends[0], ends[1])
    self.assertEqual(ends[0][0], 'restored 2')
    step = int(ends[0][1].removeprefix('left at '))
    with self.open() as checkpoints:
      state, newest = checkpoints.restore_latest(_spread_state(0, _mesh(8)))
      self.assertEqual(newest, step)
      self.assert_same(state, _spread_state(step, _mesh(8)))


# What the child processes run; they import this file as a module.


def _big_state(step):
  noise = np.random.default_rng(step).random(1 << 20, np.float32)
  return {'weight': jnp.asarray(noise), 'key': jax.random.key(step)}


def _save_forever(directory):
  with checkpointing.Checkpoints(
      directory, save_every=1, config=_CONFIG) as saved:
    _, start = saved.restore_latest(_big_state(0)) or (None, 0)
    print('from', start, flush=True)
    for step in range(start + 1, start + 1000):
      saved.save(step, _big_state(step))
      if step == start + 2:
        print('one is complete', flush=True)


def _spread_state(step, mesh):
  spread = NamedSharding(mesh, PartitionSpec('x'))
  whole = NamedSharding(mesh, PartitionSpec())
  make = lambda: {
      'spread': step + jnp.arange(1 << 16, dtype=jnp.float32),
      'whole': jnp.arange(5) * step, 'weak': jnp.asarray(0.5),
      'key': jax.random.key(step)}
  shardings = {'spread': spread, 'whole': whole, 'weak': whole, 'key': whole}
  return jax.jit(make, out_shardings=shardings)()


def _two_processes(directory, port, index):
  jax.distributed.initialize(f'127.0.0.1:{port}', 2, int(index))
  mesh = _mesh(jax.device_count())
  make = lambda step: _spread_state(step, mesh)
  with checkpointing.PreemptionGuard() as guard, checkpointing.Checkpoints(
      directory, save_every=2, config=_CONFIG, guard=guard) as saved:
    for step in range(1, 5):
      saved.save(step, make(step))
    saved.wait()
    if index == '1':
      # Holds the half of `spread` that only this process reads.
      part = pathlib.Path(directory) / '4' / 'state' / 'ocdbt.process_1' / 'd'
      os.truncate(_largest_file(part), 100)
    multihost_utils.sync_global_devices('damaged')
    _, step = saved.restore_latest(make(0))
    print('restored', step, flush=True)
    _leave_when_told(saved, make, step, index)


def _leave_when_told(saved, make, step, index):
  while True:
    step += 1
    if step == 6 and index == '1':
      os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)
    if saved.reached_preemption(step):
      saved.save(step, make(step), force=True)
      saved.wait()
      print('left at', step, flush=True)
      sys.exit(checkpointing.REQUEUE_EXIT_CODE)


_PREAMBLE = textwrap.dedent('''
    import importlib.util, sys
    import jax
    jax.config.update('jax_num_cpu_devices', 2)
    spec = importlib.util.spec_from_file_location('test', sys.argv[1])
    test = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(test)
    ''')
_SAVE_FOREVER = _PREAMBLE + 'test._save_forever(*sys.argv[2:])'
_TWO_PROCESSES = _PREAMBLE + 'test._two_processes(*sys.argv[2:])'


def _child(code, *args):
  return subprocess.Popen(
      [sys.executable, '-c', code, __file__, *args], cwd=_ROOT, text=True,
      env={**os.environ, 'PYTHONPATH': str(_ROOT)}, stdout=subprocess.PIPE)


def _finish(checkpoints, how, make):
  if how == 'save':
    checkpoints.save(3, make(3))
  else:
    getattr(checkpoints, how)()


def _cut(path):
  os.truncate(path, path.stat().st_size // 2)


def _flip_bit(path):
  content = bytearray(path.read_bytes())
  if content:
    content[len(content) * 2 // 3] ^= 16
  path.write_bytes(content)


if __name__ == '__main__':
  absltest.main()
