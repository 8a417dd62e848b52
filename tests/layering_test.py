"""Each library file may import only files of a lower layer."""

import ast
import pathlib
import sys

from absl.testing import absltest

LIBRARY = pathlib.Path(__file__).parents[1] / 'sparse_jax'

# Lowest first. A new file must be given its place here.
LAYERS = (
    {'base'},
    {'topk', 'structures', 'selection', 'scoring', 'schedules', 'backward',
     'residuals', 'ordering', 'provenance', 'placing', 'packed_kernels'},
    {'allocation', 'masking', 'losses', 'filters', 'products', 'packed'},
    {'state', 'operands', 'packed_tiles', 'packed_formats'},
    {'sites', 'summary', 'transforms', 'getters', 'operators',
     'packed_products', 'replacing', 'accelerator', 'memory', 'cost'},
    {'budget', 'activations', 'injection', 'layers', 'packed_params'},
    {'assembly', 'packed_rewiring'},
    {'fixed', 'at_init', 'rewiring', 'redistribution', 'pruning',
     'alternating', 'straight_through', 'learned', 'powerprop', 'swat',
     'packed_training', 'packed_reading'},
    {'__init__'},
)
# Only these files may know these packages.
OWNERS = {'optax': {'transforms'}, 'flax': {'getters', 'layers'}}
FOREIGN = {'jax', 'numpy', 'optax', 'flax'}


def _imports(path):
  """Dotted names of what one file imports."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      module = '.' * node.level + (node.module or '')
      if module == 'sparse_jax':
        yield from (f'sparse_jax.{alias.name}' for alias in node.names)
      else:
        yield module


def _library_imports(path):
  """Names of the sparse_jax files that one file imports."""
  for name in _imports(path):
    package, _, rest = name.partition('.')
    if package in ('', 'sparse_jax'):  # '' is a relative import.
      yield rest.partition('.')[0] or '__init__'


class LayeringTest(absltest.TestCase):

  def test_every_file_has_a_layer(self):
    files = {path.stem for path in LIBRARY.rglob('*.py')}
    self.assertEqual(files, set().union(*LAYERS))

  def test_no_file_has_two_layers(self):
    self.assertLen(set().union(*LAYERS), sum(map(len, LAYERS)))

  def test_imports_point_down(self):
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    for path in LIBRARY.rglob('*.py'):
      for imported in _library_imports(path):
        self.assertLess(level[imported], level[path.stem],
                        f'{path.name} may not import {imported}')

  def test_optax_and_flax_are_known_to_one_file_each(self):
    for path in LIBRARY.rglob('*.py'):
      packages = {name.partition('.')[0] for name in _imports(path)}
      for package, owners in OWNERS.items():
        self.assertEqual(package in packages, path.stem in owners,
                         f'{path.name} and {package}')

  def test_nothing_else_is_needed(self):
    known = FOREIGN | {'sparse_jax', ''} | set(sys.stdlib_module_names)
    for path in LIBRARY.rglob('*.py'):
      packages = {name.partition('.')[0] for name in _imports(path)}
      self.assertEmpty(packages - known, path.name)


if __name__ == '__main__':
  absltest.main()
