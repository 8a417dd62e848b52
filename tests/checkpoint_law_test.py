"""Saved and restored in mid-run, every method continues bit for bit."""

import shutil
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np
import optax

from experiments import checkpointing
import sparse_jax
from tests import methods_test

METHODS = {name: row() for name, row in methods_test.METHODS.items()}
HALF = 3  # Between two refreshes, so that the masks are old ones.


def bytes_of(leaf):
  leaf = np.asarray(leaf)
  return leaf.shape, str(leaf.dtype), leaf.tobytes()


class CheckpointTest(parameterized.TestCase):
  """One run of all methods, killed after three of its nine steps."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    params = methods_test.fake_params(conv=(2, 2, 2, 4), dense=(4, 6))
    txs = {name: sparse_jax.sparsify(optax.adam(.05), method, key=3)
           for name, method in METHODS.items()}

    def step(states, batch):
      return {name: methods_test.make_step(METHODS[name], txs[name])(
          *states[name], batch)[:2] for name in METHODS}

    compiled = jax.jit(step, compiler_options=methods_test.QUICK)

    def train(states, first, last):
      for t in range(first, last + 1):
        states = compiled(states, methods_test.fake_batch(params, t))
      return states

    # Committed to a device, as restored arrays are.
    starts = {name: method.parametrize(params)
              for name, method in METHODS.items()}
    start = jax.device_put({name: (starts[name], tx.init(starts[name]))
                            for name, tx in txs.items()}, jax.devices()[0])
    cls.saved = train(start, 1, HALF)
    cls.unbroken = train(cls.saved, HALF + 1, HALF + 6)
    directory = tempfile.mkdtemp()
    cls.addClassCleanup(shutil.rmtree, directory)
    with checkpointing.Checkpoints(
        directory, save_every=HALF, config={}) as target:
      target.save(HALF, cls.saved)
    # As a new process would: nothing but shapes, from a fresh `init`.
    with checkpointing.Checkpoints(
        directory, save_every=HALF, config={}) as source:
      cls.restored, step = source.restore_latest(
          checkpointing.abstract(start))
    cls.resumed = train(cls.restored, step + 1, HALF + 6)
    cls.compilations = compiled._cache_size()

  def check_equal(self, one, two):
    """Trees of the same structure, equal bit for bit."""
    self.assertEqual(jax.tree.structure(one), jax.tree.structure(two))
    different = [jax.tree_util.keystr(path) for (path, x), y in zip(
        jax.tree.leaves_with_path(one), jax.tree.leaves(two))
                 if bytes_of(x) != bytes_of(y)]
    self.assertEqual(different, [])

  @parameterized.parameters(*METHODS)
  def test_restored_state_is_the_one_saved(self, name):
    self.check_equal(self.restored[name], self.saved[name])

  @parameterized.parameters(*METHODS)
  def test_resumed_run_is_the_unbroken_one(self, name):
    """Parameters, optimizer slots, masks, step and key after six steps."""
    self.check_equal(self.resumed[name], self.unbroken[name])

  @parameterized.parameters(*methods_test.RANDOM_REFRESH)
  def test_masks_moved_after_the_restore(self, name):
    """Else the law above would say nothing about refreshes."""
    # Top-KAST draws its backward set only.
    saved, resumed = (sparse_jax.get_state(run[name][1]).backward_masks
                      for run in (self.saved, self.resumed))
    moved = [np.any(np.asarray(x) != np.asarray(y)) for x, y in zip(
        jax.tree.leaves(saved), jax.tree.leaves(resumed))]
    self.assertTrue(all(moved))

  def test_restored_state_compiles_nothing(self):
    self.assertEqual(self.compilations, 1)


if __name__ == '__main__':
  absltest.main()
