"""Tests of the front door: what it names, and what it does not pull in."""

import inspect
import pathlib
import re
import subprocess
import sys
import types

from absl.testing import absltest
from absl.testing import parameterized

import sparse_jax

ROOT = pathlib.Path(sparse_jax.__file__).parents[1]
NAMES = sorted(name for name, value in vars(sparse_jax).items()
               if not name.startswith('_')
               and not isinstance(value, types.ModuleType))
# Named in the contract, design.md Part II, for this library's core.
PROMISED = (
    'sparsify', 'get_state', 'summarize', 'SparseMethod', 'SparseState',
    'masked_weight', 'exploration_loss', 'top_k_mask', 'make_mask',
    'keep_count', 'add_exploration_decay', 'mask_updates',
    'keep_params_sparse', 'linen_getter', 'nnx_getter', 'Unstructured',
    'Block', 'NM', 'Channel', 'Filter', 'uniform', 'erdos_renyi', 'erk',
    'uniform_plus', 'cubic_sparsity', 'cosine_drop', 'dense', 'static', 'gmp',
    'set_', 'rigl', 'dnw', 'top_kast', 'magnitude', 'gradient_magnitude',
    'saliency', 'random', 'snip', 'grasp', 'snfs', 'dsr', 'ac_dc', 'str_',
    'cs', 'dst', 'sr_ste', 'powerprop', 'swat', 'Operands',
    'sparse_dot_general', 'sparse_conv_general_dilated', 'count_flops',
    'training_cost', 'plan', 'pack', 'unpack', 'PackedBlocks',
    'matmul')
HEAVY = ('tensorflow', 'tensorflow_datasets', 'orbax', 'grain', 'chex',
         'matplotlib', 'sklearn', 'PIL', 'experiments')


class PublicApiTest(parameterized.TestCase):

  @parameterized.parameters(*PROMISED)
  def test_what_the_contract_names_is_there(self, name):
    self.assertIn(name, NAMES)

  @parameterized.parameters(*NAMES)
  def test_every_name_explains_itself(self, name):
    """A function shows an example, which the doctests run."""
    value = getattr(sparse_jax, name)
    doc = inspect.getdoc(value) or ''
    self.assertRegex(doc, r'^\S.*\.')
    if not inspect.isclass(value):
      self.assertIn('Example:', doc)
      self.assertIn('>>> ', doc)

  def test_the_front_door_only_imports_one_name_a_line(self):
    text = pathlib.Path(sparse_jax.__file__).read_text()
    body = text.partition('"""\n\n')[2].splitlines()
    for line in body:
      self.assertRegex(line, r'^from sparse_jax\.\w+ import \w+$')
    keys = [re.fullmatch(r'from (\S+) import (\w+)', line).groups()
            for line in body]
    self.assertEqual(keys, sorted(keys, key=lambda k: (k[0], k[1].lower())))

  def test_arguments_after_the_first_ones_are_by_keyword(self):
    """design.md: 'arguments after the first one or two are keyword-only'."""
    exceptions = {
        'masked_weight': 3, 'exploration_loss': 3, 'summarize': 3,
        'magnitude': 3, 'gradient_magnitude': 3, 'saliency': 3, 'random': 3,
        'is_kernel': 3, 'prune_filters': 3, 'layer_cycles': 3,
        'packed_from_dense': 3, 'packed_interceptor': 4,
        'with_operators': 3, 'first_operator_thresholds': 3,
        'read_packed': 3}
    for name in NAMES:
      value = getattr(sparse_jax, name)
      if inspect.isclass(value):
        continue
      positional = [p for p in inspect.signature(value).parameters.values()
                    if p.kind is not p.KEYWORD_ONLY]
      self.assertLessEqual(len(positional), exceptions.get(name, 2), name)

  def test_importing_pulls_in_nothing_heavy(self):
    """In a fresh process; only top-level packages count."""
    code = ('import sys, sparse_jax; '
            'print(*{name.partition(".")[0] for name in sys.modules})')
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True,
                          capture_output=True, text=True)
    self.assertEmpty(set(HEAVY) & set(done.stdout.split()))
    self.assertIn('sparse_jax', done.stdout.split())


if __name__ == '__main__':
  absltest.main()
