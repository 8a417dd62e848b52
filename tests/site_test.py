"""The site: every public name is in it, and every link leads somewhere."""

import inspect
import pathlib
import re
import types

from absl.testing import absltest
from absl.testing import parameterized
import jax.numpy as jnp
import optax

import sparse_jax

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / 'docs'
SPACES = tuple(name for name in sparse_jax.__all__ if isinstance(
    getattr(sparse_jax, name), types.ModuleType))
WEIGHTS = {'kernel': jnp.ones((4, 4))}
STATE = sparse_jax.rigl(.5).init(WEIGHTS)
SGD = sparse_jax.sparsify(optax.sgd(.1), sparse_jax.rigl(.5))
PAGES = sorted(path.relative_to(DOCS).as_posix()
               for path in DOCS.rglob('*.md'))


def documented(text):
  """The objects that one API page documents, by the names it gives."""
  found, place = [], None
  for line in text.splitlines():
    if match := re.fullmatch(r'\.\. currentmodule:: (\S+)', line):
      place = match[1]
    elif match := re.fullmatch(r'\.\. auto(function|class):: (\S+)', line):
      space = sparse_jax
      for part in place.split('.')[1:]:
        space = getattr(space, part)
      found.append((match[1], getattr(space, match[2])))
  return found


def public(space):
  """What a namespace offers of this library's own."""
  return {name: value for name, value in vars(space).items()
          if not name.startswith('_') and callable(value)
          and getattr(value, '__module__', '').startswith('sparse_jax')}


def text_of(path):
  """What a page shows: a record's stub has a page of the repository in it."""
  page = path.relative_to(DOCS).with_suffix('').as_posix()
  shown = re.search(rf"'(\S+)': '{page}'", (DOCS / 'conf.py').read_text())
  return (ROOT / shown[1] if shown else path).read_text()


def anchors(text):
  """The headings of a page, as links name them."""
  named = re.findall(r'^\(([\w-]+)\)=$', text, re.MULTILINE)
  heads = re.findall(r'^#+ (.*)$', text, re.MULTILINE)
  return set(named) | {re.sub(r'[^\w -]', '', head.lower()).replace(' ', '-')
                       for head in heads}


class SiteTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.documented = [item for path in sorted((DOCS / 'api').glob('*.md'))
                       for item in documented(path.read_text())]

  @parameterized.parameters(None, *SPACES)
  def test_every_public_name_is_in_the_api_pages(self, space):
    values = [value for _, value in self.documented]
    space = getattr(sparse_jax, space) if space else sparse_jax
    missing = [name for name, value in public(space).items()
               if not any(value is own for own in values)]
    self.assertEmpty(missing, 'add them to docs/api/')

  def test_the_api_pages_document_each_name_once_and_rightly(self):
    values = [value for _, value in self.documented]
    self.assertLen({id(value) for value in values}, len(values))
    for kind, value in self.documented:
      self.assertEqual(kind == 'class', inspect.isclass(value), value)

  @parameterized.parameters(*PAGES)
  def test_links_lead_somewhere(self, page):
    """What the build makes of the tutorials, and the site itself, it checks."""
    text = (DOCS / page).read_text()
    for target in re.findall(r'\]\(([^)\s]+)\)', text):
      path, _, anchor = target.partition('#')
      if ':' in target or path.startswith('built_tutorials/'):
        continue
      found = ((DOCS / page).parent / path).resolve() if path else DOCS / page
      self.assertTrue(found.exists(), target)
      if anchor:
        self.assertIn(anchor, anchors(text_of(found)), target)

  def test_every_page_is_in_the_contents(self):
    listed = '\n'.join((DOCS / name).read_text() for name in (
        'index.md', 'api/index.md', 'records/index.md'))
    for page in PAGES:
      if page != 'index.md' and 'loop' not in page:
        name = page.removesuffix('.md').removeprefix('api/').removeprefix(
            'records/')
        self.assertRegex(listed, rf'(?m)^({name}|{page.removesuffix(".md")})$')

  def test_guides_begin_by_saying_what_they_are_about(self):
    """It is what search engines show (`complete_page` of `conf.py`)."""
    found = []
    for path in DOCS.glob('*.md'):
      said = re.match(r'# .*\n\n(?!#|\||```)(.{40})', path.read_text())
      self.assertTrue(said, path.name)
      found.append(said[1])
    self.assertLen(set(found), len(found))

  @parameterized.named_parameters(
      ('percent', '`sparsity` (=90) must be in [0, 1)',
       lambda: sparse_jax.rigl(90)),
      ('structure', '`sparsity` (=0.9) must be 1 - n/m = 0.5 with `structure`',
       lambda: sparse_jax.rigl(.9, structure=sparse_jax.NM(2, 4))),
      ('blocks', '`method` (=rigl) cannot be packed: it needs structure=Block(',
       lambda: sparse_jax.packed(sparse_jax.rigl(.9))),
      ('tightens', '`method` (=gmp) cannot be packed: its masks tighten',
       lambda: sparse_jax.packed(sparse_jax.gmp(
           .9, update_end=9, structure=sparse_jax.Block((2, 2))))),
      ('pattern', "`is_sparse` has a rule 'head' that is found in none of [",
       lambda: sparse_jax.rigl(.5, is_sparse={'head': False}).init(WEIGHTS)),
      ('no_state', '`opt_state` (a tuple) contains no SparseState',
       lambda: sparse_jax.get_state(())),
      ('two_states', 'contains 2 SparseStates',
       lambda: sparse_jax.get_state((STATE, STATE))),
      ('another_method',
       "`opt_state` holds the state of 'rigl', and this method is 'set_'",
       lambda: sparse_jax.set_(.5).read(WEIGHTS, STATE)),
      ('another_tree',
       '`params` must be the tree that the state was made for',
       lambda: sparse_jax.rigl(.5).read({'kernel': jnp.ones((2, 2))}, STATE)),
      ('no_thresholds', "`params` (a dict) must have the key 'thresholds'",
       lambda: sparse_jax.str_().init(WEIGHTS)),
      ('single_examples',
       "`grads` has an array of shape (8, 4, 6) at 'kernel', where the "
       'parameter is of shape (4, 6)',
       lambda: SGD.update({'kernel': jnp.ones((8, 4, 6))},
                          SGD.init({'kernel': jnp.ones((4, 6))}),
                          {'kernel': jnp.ones((4, 6))})))
  def test_errors_of_the_faq_are_raised_as_they_stand_there(self, said, call):
    self.assertIn(said, (DOCS / 'faq.md').read_text())
    with self.assertRaisesRegex(ValueError, re.escape(said)):
      call()

  def test_linked_tutorials_are_there(self):
    for page in PAGES:
      for name in re.findall(r'built_tutorials/(\w+)\.rst',
                             (DOCS / page).read_text()):
        self.assertTrue(name == 'index'
                        or (DOCS / 'tutorials' / f'{name}.py').exists(), name)


if __name__ == '__main__':
  absltest.main()
