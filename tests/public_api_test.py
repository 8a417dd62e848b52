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
NAMES = sorted(name for name in sparse_jax.__all__ if not isinstance(
    getattr(sparse_jax, name), types.ModuleType))
SPACES = ('blocks', 'cost', 'jaxprs', 'masks', 'operators', 'rules',
          'scaling', 'schedules', 'scores', 'transforms')
# Named in the contract, design.md Part II, for this library's core.
PROMISED = (
    'sparsify', 'start', 'with_method', 'packed', 'dense_weights', 'get_state',
    'summarize', 'SparseMethod', 'SparseState', 'masked_weight',
    'exploration_loss', 'top_k_mask', 'make_mask', 'keep_count',
    'contracting_axes', 'linen_getter', 'nnx_getter', 'Unstructured', 'Block',
    'NM', 'Channel', 'Filter', 'FanIn', 'uniform', 'erdos_renyi', 'erk',
    'uniform_plus', 'dense', 'static', 'fixed', 'gmp', 'set_', 'rigl', 'itop',
    'dnw', 'top_kast', 'snip', 'grasp', 'snfs', 'dsr', 'ac_dc', 'str_', 'cs',
    'dst', 'ste', 'sr_ste', 'powerprop', 'swat')
# The same of each namespace.
PROMISED_IN = {
    'blocks': ('pack', 'unpack', 'matmul', 'conv', 'PackedBlocks', 'to_bcoo',
               'to_bcsr', 'from_dense', 'to_dense'),
    'cost': ('count_flops', 'training_cost', 'plan', 'memory_cost',
             'theoretical_speedup', 'layer_cycles'),
    'jaxprs': ('find_products', 'replace_products', 'contracting_axes',
               'layer_order'),
    'masks': ('Structure', 'Layout', 'layout', 'is_kernel', 'select'),
    'operators': ('Operands', 'sparse_dot_general', 'with_operators',
                  'sparse_conv_general_dilated', 'add_operands', 'dsg_mask',
                  'fat_relu', 'hoyer', 'l1'),
    'rules': ('Rule', 'make_method', 'Sites', 'Leaf', 'Now', 'drop_and_grow',
              'learned_method', 'refresh_window', 'drop_schedule',
              'random_first', 'full_first', 'Work', 'global_counts'),
    'scaling': ('supar', 'iso_flop_width'),
    'schedules': ('cubic_sparsity', 'cosine_drop', 'drop_with'),
    'scores': ('magnitude', 'gradient_magnitude', 'saliency', 'random'),
    'transforms': ('add_exploration_decay', 'mask_updates',
                   'keep_params_sparse', 'scale_by_leaf'),
}
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

  @parameterized.parameters(*PROMISED_IN)
  def test_what_the_contract_names_is_in_its_namespace(self, space):
    self.assertIn(space, sparse_jax.__all__)
    missing = set(PROMISED_IN[space]) - set(vars(getattr(sparse_jax, space)))
    self.assertEmpty(missing)

  def test_the_root_names_what_it_exports_in_order(self):
    exported = sparse_jax.__all__
    self.assertEqual(exported, sorted(exported, key=str.lower))
    self.assertLen(set(exported), len(exported))
    public = {name for name, value in vars(sparse_jax).items()
              if not name.startswith('_')
              and not isinstance(value, types.ModuleType)}
    self.assertEqual(public, set(NAMES))
    self.assertEqual(set(exported) - set(NAMES), set(SPACES))
    self.assertRegex(sparse_jax.__version__, r'^\d+\.\d+\.\d+$')

  def test_the_front_door_only_imports_one_name_a_line(self):
    text = pathlib.Path(sparse_jax.__file__).read_text()
    body = text.partition('"""\n\n')[2].partition('\n\n')[0].splitlines()
    keys = [re.fullmatch(r'from (sparse_jax\S*) import (\w+)', line).groups()
            for line in body]
    self.assertEqual(keys, sorted(keys, key=lambda k: (k[0], k[1].lower())))

  def test_arguments_after_the_first_ones_are_by_keyword(self):
    """design.md: 'arguments after the first one or two are keyword-only'."""
    exceptions = {
        'masked_weight': 3, 'exploration_loss': 3, 'summarize': 3, 'start': 3,
        'with_method': 3, 'dense_weights': 3, 'contracting_axes': 3,
        'nnx_start': 3, 'average_params': 3, 'one_shot': 3,
        'effective_sparsity': 3,
        # Optax's own arguments, in its order.
        'aged_adam': 6, 'aged_adamw': 8}
    for name in NAMES:
      value = getattr(sparse_jax, name)
      if inspect.isclass(value):
        continue
      positional = [p for p in inspect.signature(value).parameters.values()
                    if p.kind not in (p.KEYWORD_ONLY, p.VAR_KEYWORD)]
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
