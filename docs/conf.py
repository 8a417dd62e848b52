"""How the site is built: `sphinx-build -W docs build/docs`, with no network."""

import ast
import html
import inspect
import pathlib
import re
import sys
import textwrap

from docutils import nodes
from sphinx import addnodes

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import sparse_jax  # noqa: E402

project = 'sparse_jax'
author = 'the authors of sparse_jax'
version = release = sparse_jax.__version__
extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon',
              'sphinx.ext.viewcode', 'sphinx_copybutton', 'sphinx_design',
              'sphinx_gallery.gen_gallery']
exclude_patterns = ['tutorials/*.py', 'tutorials/GALLERY_HEADER.rst']

html_theme = 'furo'
html_title = 'sparse_jax: sparse training in JAX'
html_static_path = ['_static']
html_css_files = ['site.css']
html_favicon = '_static/icon.svg'
html_theme_options = {'top_of_page_buttons': []}
html_show_copyright = False

myst_enable_extensions = ['colon_fence', 'deflist']
myst_heading_anchors = 3
copybutton_prompt_text = r'>>> |\.\.\. '
copybutton_prompt_is_regexp = True

autodoc_typehints = 'none'  # Docstrings say them, with shapes.
autodoc_preserve_defaults = True
autodoc_member_order = 'bysource'
autodoc_default_options = {'members': True}  # Of classes: what has a docstring.
napoleon_use_rtype = False
napoleon_use_ivar = True  # A list of a class's fields, not a heading for each.
napoleon_use_param = False  # Arguments that are explained together stay so.
python_maximum_signature_line_length = 72

# The tutorials run when the site is built; one that fails stops it.
sphinx_gallery_conf = {
    'examples_dirs': 'tutorials',
    'gallery_dirs': 'built_tutorials',
    'filename_pattern': r'\.py$',
    'abort_on_example_error': True,
    'download_all_examples': False,
    'remove_config_comments': True,
    'show_signature': False,
    'min_reported_time': 0,
    'write_computation_times': False,
    'within_subsection_order': 'FileNameSortKey',
}

# What a name in backticks links to: `rigl`, `cost.plan`.
SPACES = {name: getattr(sparse_jax, name) for name in sparse_jax.__all__
          if inspect.ismodule(getattr(sparse_jax, name))}
LINKED = {name for name in sparse_jax.__all__ if name not in SPACES} | {
    f'{space}.{name}' for space, value in SPACES.items() for name in vars(value)
    if not name.startswith('_') and callable(getattr(value, name))}


def as_rst(app, what, name, obj, options, lines):
  """Docstrings are plain text with `code`: only lists and examples are markup.

  A public name in backticks becomes a link.
  """
  del app, name, options
  if what == 'class' and 'Attributes:' not in lines:
    lines += fields(obj)
  text = re.sub(r'(?m)^( +\w[\w, ]*,)\n +(\w[\w, ]*: )', r'\1 \2',
                '\n'.join(lines))
  lines[:] = _PARTS.sub(_part, text).split('\n')


# Examples and bullets stay; then code; then what RST would take for its own.
_PARTS = re.compile(r'(?m)^ *(?:>>>|\.\.\.).*$|^ *[*-] |`([^`]+)`|[*|]|_(?!\w)')


def _part(match):
  code = match[1]
  # A letter right after needs a blank that is not shown: `Param`s.
  end = '\\ ' if match.string[match.end():match.end() + 1].isalnum() else ''
  if code in LINKED:
    return f':obj:`~sparse_jax.{code}`{end}'
  if code:
    return f'``{code}``{end}'
  return '\\' + match[0] if match[0] in ('*', '|', '_') else match[0]


def fields(cls):
  """An 'Attributes' section of what comments in a class say of its fields."""
  source = textwrap.dedent(inspect.getsource(cls)).split('\n')
  found = []
  for node in ast.parse('\n'.join(source)).body[0].body:
    if isinstance(node, ast.AnnAssign):
      first = last = node.lineno - 1
      while source[first - 1].strip().startswith('# '):
        first -= 1
      words = [line.strip()[2:] for line in source[first:last]]
      words += re.findall(r'  # (?!type:)(.*)', source[node.end_lineno - 1])
      if node.value is not None:
        words.append(f'Default: `{ast.unparse(node.value)}`.')
      kind = re.sub(r"'|\b(?!jax)\w+\.(?=[A-Z])", '',
                    ast.unparse(node.annotation))
      found.append(f'  {node.target.id} (`{kind}`): {" ".join(words)}')
  return ['', 'Attributes:', *found, ''] if found else []


def skip_field(app, what, name, obj, skip, options):
  """Fields of named tuples stand in the class's own text."""
  del app, what, name, options
  return skip or type(obj).__name__ == '_tuplegetter'


def link_names(app, doctree):
  """Code that is a public name, or a call of it, links to its API page."""
  del app
  for code in list(doctree.findall(nodes.literal)):
    name = re.fullmatch(r'(?:sparse_jax\.)?([\w.]+)(\(.*\))?', code.astext())
    inside = (nodes.reference, nodes.title, addnodes.pending_xref)
    if name and name[1] in LINKED and not isinstance(code.parent, inside):
      code.replace_self(addnodes.pending_xref(
          '', code.deepcopy(), refdomain='py', reftype='obj', refexplicit=True,
          reftarget=f'sparse_jax.{name[1]}'))


def complete_page(app, pagename, templatename, context, doctree):
  """A page without a description of its own has its first paragraph.

  A page of source keeps links to anchors that there are: viewcode guesses some.
  """
  del templatename
  if pagename.startswith('_modules/') and 'body' in context:
    known = app.env.get_domain('py').objects
    context['body'] = re.sub(
        r'(href="[^"#]*api/\w+\.html)#([^"]*)',
        lambda match: match[0] if match[2] in known else match[1],
        context['body'])
  if doctree and 'name="description"' not in context['metatags']:
    first = [each for each in doctree.findall(nodes.paragraph)
             if isinstance(each.parent, nodes.section)][:1]
    for paragraph in first:
      text = html.escape(textwrap.shorten(paragraph.astext(), 160))
      context['metatags'] += f'<meta name="description" content="{text}" />'


# Pages of the repository that the site shows, by the page that shows them.
SHOWN = {'experiments/README.md': 'records/experiments',
         'experiments/benchmarks/README.md': 'records/benchmarks',
         'launch/README.md': 'records/launch',
         'CHANGELOG.md': 'records/changes'}


def show_record(app, docname, source):
  """Puts a page of the repository in the place of its stub."""
  for path, page in SHOWN.items():
    if page == docname:
      app.env.note_dependency(ROOT / path)
      folder = (ROOT / path).parent

      source[0] = re.sub(r'\[([^]]*)\]\(([^)\s]+)\)',
                         lambda match, folder=folder: _link(*match.groups(),
                                                            folder),
                         (ROOT / path).read_text())


def _link(text, target, folder):
  """A link of a page of the repository, as the site has it."""
  if ':' in target or target.startswith('#'):
    return f'[{text}]({target})'
  path = (folder / target).resolve().relative_to(ROOT).as_posix()
  if path in SHOWN:
    return f'[{text}](/{SHOWN[path]}.md)'
  if path.endswith(('.png', '.csv')):
    return f'[{text}](../../{path})'
  return f'{text} (`{path}`)'


def setup(app):
  app.connect('autodoc-process-docstring', as_rst, priority=100)
  app.connect('autodoc-skip-member', skip_field)
  app.connect('doctree-read', link_names)
  app.connect('html-page-context', complete_page)
  app.connect('source-read', show_record)
