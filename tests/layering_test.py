"""Imports point one way: from a package of the library to lower ones."""

import ast
import pathlib
import sys

from absl.testing import absltest

LIBRARY = pathlib.Path(__file__).parents[1] / 'sparse_jax'

# Lowest first. A new file or package at the first level has a place here.
LAYERS = (
    {'checks', 'trees'},
    {'masks'},
    {'blocks'},
    {'jaxprs', 'rules'},
    {'operators', 'cost'},
    {'methods', 'loop', 'description', 'averaging', 'scaling'},
    {'transforms', 'adam', 'getters', 'summary'},
    {'__init__'},
)
# Only these files may know these packages.
OWNERS = {'optax': {'transforms', 'adam'}, 'flax': {'getters'}}
FOREIGN = {'jax', 'numpy', 'scipy', 'optax', 'flax'}


def _imports(path):
  """Dotted names of what one file imports."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      module = '.' * node.level + (node.module or '')
      yield from (f'{module}.{alias.name}' for alias in node.names)


def _place(path):
  """What a file belongs to at the first level of the library."""
  return path.relative_to(LIBRARY).with_suffix('').parts[0]


def _library_imports(path):
  """Dotted names within sparse_jax that one file imports."""
  for name in _imports(path):
    package, _, rest = name.partition('.')
    if package in ('', 'sparse_jax'):  # '' is a relative import.
      yield rest or '__init__'


class LayeringTest(absltest.TestCase):

  def test_every_place_has_a_layer(self):
    places = {_place(path) for path in LIBRARY.rglob('*.py')}
    self.assertEqual(places, set().union(*LAYERS))
    self.assertLen(places, sum(map(len, LAYERS)))

  def test_imports_point_down(self):
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    for path in LIBRARY.rglob('*.py'):
      own = _place(path)
      for imported in _library_imports(path):
        there = imported.partition('.')[0]
        if there != own:
          self.assertLess(level[there], level[own],
                          f'{path} may not import {imported}')

  def test_no_file_of_a_package_imports_itself_through_others(self):
    edges = {}
    for path in LIBRARY.rglob('*.py'):
      parts = path.relative_to(LIBRARY).with_suffix('').parts
      if parts[-1] != '__init__':
        edges[parts] = {tuple(name.split('.')[:len(parts)])
                        for name in _library_imports(path)}
    done = set()

    def visit(parts, above):
      self.assertNotIn(parts, above, 'a circle of imports')
      if parts in edges and parts not in done:
        for other in edges[parts]:
          visit(other, (*above, parts))
        done.add(parts)

    for parts in edges:
      visit(parts, ())

  def test_optax_and_flax_are_known_to_one_file_each(self):
    for path in LIBRARY.rglob('*.py'):
      packages = {name.partition('.')[0] for name in _imports(path)}
      for package, owners in OWNERS.items():
        self.assertEqual(package in packages, path.stem in owners,
                         f'{path} and {package}')

  def test_nothing_else_is_needed(self):
    known = FOREIGN | {'sparse_jax', ''} | set(sys.stdlib_module_names)
    for path in LIBRARY.rglob('*.py'):
      packages = {name.partition('.')[0] for name in _imports(path)}
      self.assertEmpty(packages - known, str(path))

  def test_no_file_asks_which_devices_are_here(self):
    """A program may be for others: `lax.platform_dependent` and types say."""
    asked = {'default_backend', 'device_count', 'local_device_count'}
    for path in LIBRARY.rglob('*.py'):
      # One compiles what it runs itself, one chooses between equals on CPUs.
      if path.name in ('effective.py', 'search.py'):
        continue
      names = {node.attr for node in ast.walk(ast.parse(path.read_text()))
               if isinstance(node, ast.Attribute)}
      self.assertEmpty(names & asked, path)


if __name__ == '__main__':
  absltest.main()
