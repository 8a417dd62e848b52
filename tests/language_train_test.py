"""Whole runs of the language experiment, and what is made of them."""

import math
import os
import pathlib
import re
import shutil
import tempfile
from unittest import mock

from absl import flags
from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

import sparse_jax
from experiments import devices
from experiments import export
from experiments import report
from experiments import reporting
from experiments import training
from experiments.language import models
from tests import fast_compiler
from tests import own_flags

with own_flags.OwnFlags() as _FLAGS:  # The image binary has the same names.
  from experiments.language import train

_WORDS = 'to be or not to be that is the question whether it is nobler '


def setUpModule():
  fast_compiler.use()
  _FLAGS.__enter__()


def tearDownModule():
  _FLAGS.__exit__()
  fast_compiler.leave()


def _saved(values):
  """Bytes of each leaf of the final checkpoint, by its path."""
  state = training.last_state(train.prepare(values, values['workdir']))
  leaves = jax.tree_util.tree_leaves_with_path(
      state._replace(key=jax.random.key_data(state.key)))
  return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
          for path, leaf in leaves}


def _rows(values):
  """The rows of metrics without the times."""
  path = os.path.join(values['workdir'], 'metrics.jsonl')
  return [{name: value for name, value in row.items() if name != 'time'}
          for row in reporting.read_jsonl(path)]


class RunTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = cls.enterClassContext(tempfile.TemporaryDirectory())
    cls.text = os.path.join(cls.folder, 'text.txt')
    pathlib.Path(cls.text).write_text(_WORDS * 150)
    cls.unbroken = cls.values('unbroken')
    cls.result = train.train(cls.unbroken)
    cls.enterClassContext(mock.patch.object(report, 'draw'))

  @classmethod
  def values(cls, name, **changes):
    values = train.run_config()
    assert changes.keys() <= values.keys(), changes
    return values | {
        'workdir': os.path.join(cls.folder, name), 'dataset': 'text',
        'text_file': cls.text, 'width': .1, 'batch_size': 8,
        'segment_length': 8, 'memory_length': 8, 'eval_memory_length': 16,
        'optimizer': 'momentum', 'learning_rate': .1, 'sparsity': .5,
        'structure': 'block', 'block_shape': ['4', '4'], 'train_steps': 16,
        # Each sparse leaf takes its time to compile.
        'dense_layers': ['query', 'key', 'value', 'position'],
        'log_every': 4, 'eval_every': 8, 'checkpoint_every': 6,
        'update_every': 3, 'dropout': .1} | changes

  def test_bytes_are_reported_in_bits(self):
    rows = _rows(self.unbroken)
    self.assertLess(rows[-1]['train_loss'], rows[0]['train_loss'])
    bits = self.result['test_bits_per_character']
    self.assertEqual(bits, rows[-1]['test_bits_per_character'])
    self.assertAlmostEqual(bits, self.result['test_loss'] / math.log(2))
    self.assertNotIn('test_perplexity', self.result)
    self.assertGreater(self.result['tokens_per_second'], 0)
    for picture in ('training.png', 'layers.png'):
      path = pathlib.Path(self.unbroken['workdir'], picture)
      self.assertEqual(path.read_bytes()[:4], b'\x89PNG')

  def test_packed_storage_makes_the_same_run(self):
    """Masks and losses, to the rounding of sums."""
    values = self.values('packed', storage='packed')
    result = train.train(values)
    for row, other in zip(_rows(values), _rows(self.unbroken), strict=True):
      for key in row:
        np.testing.assert_allclose(row[key], other[key], rtol=1e-3)
    self.assertEqual(result['layers'], self.result['layers'])

  def test_words_are_reported_in_perplexity(self):
    """And SWAT trains a Transformer-XL with its sparse operands."""
    result = train.train(self.values('words', level='word', method='swat',
                                     structure=None, train_steps=4,
                                     effective_sparsity=False,
                                     block_shape=['16', '16']))
    self.assertAlmostEqual(math.log(result['test_perplexity']),
                           result['test_loss'])
    self.assertNotIn('test_bits_per_character', result)

  def test_a_stopped_run_goes_on_bit_for_bit(self):
    """The memory of its streams included."""
    stopped = self.values('stopped')
    measure = training.measure

    def stop_at_nine(run, state, step, model):
      if step == 9:
        raise KeyboardInterrupt
      return measure(run, state, step, model)

    with mock.patch.object(training, 'measure', stop_at_nine):
      with self.assertRaises(KeyboardInterrupt):
        train.train(stopped)
    train.train(stopped)
    self.assertEqual(_rows(stopped), _rows(self.unbroken))
    leaves = _saved(stopped)
    self.assertEqual(leaves, _saved(self.unbroken))
    memory = [path for path in leaves if '.model_state' in path]
    self.assertLen(memory, 2)
    self.assertTrue(any(leaves[memory[0]]))

  @parameterized.parameters(1, 2)
  def test_any_devices_give_the_losses_of_eight(self, model_parallel):
    """One alone, and eight of which every two hold the parameters together."""
    values = self.values(f'parallel{model_parallel}',
                         model_parallel=model_parallel)
    if model_parallel == 1:
      mesh = jax.make_mesh(
          (1, 1), ('data', 'model'), devices=jax.devices()[:1],
          axis_types=(jax.sharding.AxisType.Auto,) * 2)
      self.enterContext(mock.patch.object(devices, 'mesh', lambda *_: mesh))
    train.train(values)
    for row, other in zip(_rows(values), _rows(self.unbroken), strict=True):
      for key in row:
        np.testing.assert_allclose(row[key], other[key], rtol=1e-4, atol=1e-6,
                                   err_msg=key)

  def test_other_text_under_the_same_flags_is_refused(self):
    other = os.path.join(self.folder, 'other.txt')
    pathlib.Path(other).write_text(_WORDS[::-1] * 150)
    workdir = os.path.join(self.folder, 'other')
    shutil.copytree(self.unbroken['workdir'], workdir)
    os.remove(os.path.join(workdir, 'result.json'))
    load = train.load
    with mock.patch.object(train, 'load', lambda values, split: load(
        values | {'text_file': other}, split)):
      with self.assertRaisesRegex(ValueError, "(?s)checkpoints.*data: '.* now"):
        train.train(self.unbroken | {'workdir': workdir})

  @parameterized.parameters(
      ({'segment_length': 0}, r'`segment_length` \(=0\)'),
      ({'eval_memory_length': -1}, r'`eval_memory_length` \(=-1\)'),
      ({'eval_batch_size': 3}, r'`eval_batch_size` \(=3\)'),
      ({'batch_size': 9}, r'`batch_size` \(=9\)'),
      ({'train_steps': 0}, r'`train_steps` \(=0\)'),
      ({'dropout': 2.}, r'`dropout` \(=2.0\)'),
      ({'sparsity': 1.}, r'`sparsity` \(=1.0\)'),
      ({'text_file': None}, 'text_file'),
      ({'segment_length': 5000}, r'`batch_size` \(=8\) .*`segment_length`'))
  def test_a_bad_flag_is_named_and_leaves_nothing(self, changes, message):
    values = self.values('bad', **changes)
    with self.assertRaisesRegex(ValueError, message):
      train.train(values)
    self.assertFalse(os.path.exists(values['workdir']))

  def test_recipe_of_the_docstring_builds(self):
    recipe = re.search(r'recipe(.*)\(its batch', train.__doc__, re.S).group(1)
    found = {name: flags.FLAGS[name].parser.parse(value) for name, value in
             re.findall(r'--(\w+)=(\S+)', recipe)}
    values = train.run_config() | found
    self.assertEqual((values['model'], values['train_steps']),
                     ('enwik8_large', 400000))
    problem = train.make_task(values, 256).problem
    self.assertEqual((problem.segment_length, problem.memory_length,
                      problem.eval_memory_length), (768, 2304, 5000))

  def test_forecast_is_of_the_run(self):
    found = train.describe(self.unbroken)
    self.assertEqual(found['parameters'], self.result['parameters'])
    dense = train.describe(self.unbroken | {
        'method': 'dense', 'sparsity': 0., 'structure': None,
        'dense_layers': [],
        'block_shape': ['16', '16'], 'update_every': None})
    multiplier = found['training_flops'] / dense['training_flops']
    self.assertAlmostEqual(
        multiplier, self.result['cost']['training_multiplier'], delta=.02)
    self.assertEqual(found['train_steps'], 16)
    self.assertAlmostEqual(found['learning_rate'], .1)

  def test_export_restores_what_the_forward_pass_reads(self):
    values = self.unbroken
    run = train.prepare(values, values['workdir'])
    state = training.last_state(run)
    expected = run.task.method.read(state.params, state.opt_state)
    expected = {sparse_jax.trees.path_name(path): np.asarray(leaf)
                for path, leaf
                in jax.tree_util.tree_leaves_with_path(expected)}
    packed = export.from_run(values['workdir'], 'packed')
    name = 'layer_0/dense_1/kernel'
    np.testing.assert_array_equal(expected[name], sparse_jax.blocks.unpack(
        sparse_jax.blocks.PackedBlocks(
            packed[f'{name}:blocks'], packed[f'{name}:rows'],
            packed[f'{name}:columns'], block=(4, 4),
            shape=tuple(packed[f'{name}:shape']))))
    path = os.path.join(self.folder, 'net.npz')
    np.savez(path, **export.from_run(values['workdir'], 'sparse'))
    reader = re.search(r'( +import numpy.*)', export.__doc__, re.S).group(1)
    found = {}
    exec(re.sub('(?m)^  ', '', reader).replace('net.npz', path), found)
    self.assertEqual(found['weights'].keys(), expected.keys())
    for name, weight in expected.items():
      np.testing.assert_array_equal(found['weights'][name], weight)
    dense = export.from_run(values['workdir'], 'dense')
    self.assertEqual(dense.keys(), expected.keys())
    sparse = export.from_run(values['workdir'], 'sparse')
    self.assertEqual(2 * sparse[f'{name}:values'].size, dense[name].size)

  def test_export_names_what_is_wrong(self):
    with self.assertRaisesRegex(FileNotFoundError, 'result.json'):
      export.from_run(self.folder, 'dense')
    with self.assertRaisesRegex(ValueError, '`form` .*packed.*block'):
      export.arrays({}, {}, 'packed')

  def test_sample_of_a_run_begins_with_the_prompt(self):
    text = train.sample(self.unbroken, 12, 'to be', 1.)
    self.assertTrue(text.startswith('to be'))
    self.assertEqual(text, train.sample(self.unbroken, 12, 'to be', 1.))


class SamplingTest(parameterized.TestCase):

  def test_likeliest_tokens_are_those_of_the_whole_text(self):
    """A token at a time with memory is as good as all at once."""
    model = models.create('tiny', vocab_size=11, width=.1)
    memory = models.init_memory(model, 1, 32)
    prompt = jnp.array([3, 1, 4])
    weights = model.init(jax.random.key(0), prompt[None], prompt[None], memory,
                         train=False)['params']
    tokens = models.generate(
        model, weights, prompt, count=6, memory_length=32, temperature=0,
        key=jax.random.key(1))
    whole = jnp.concatenate([prompt, tokens])
    log_probs, _ = model.apply({'params': weights}, whole[None], memory,
                               method=model.logits)
    np.testing.assert_array_equal(log_probs[0, 2:-1].argmax(-1), tokens)


if __name__ == '__main__':
  absltest.main()
