"""How the site is built: `sphinx-build -W docs build/docs`, with no network."""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import sparse_jax  # noqa: E402

project = 'sparse_jax'
author = 'the authors of sparse_jax'
version = release = sparse_jax.__version__
extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon',
              'sphinx_copybutton', 'sphinx_design',
              'sphinx_gallery.gen_gallery']
exclude_patterns = ['tutorials/*.py', 'tutorials/GALLERY_HEADER.rst']

html_theme = 'furo'
html_title = 'sparse_jax'
html_static_path = ['_static']
html_css_files = ['site.css']
html_theme_options = {'top_of_page_buttons': []}
html_show_copyright = False

myst_enable_extensions = ['colon_fence', 'deflist']
myst_heading_anchors = 3
copybutton_prompt_text = r'>>> |\.\.\. '
copybutton_prompt_is_regexp = True

autodoc_typehints = 'signature'
autodoc_member_order = 'bysource'
napoleon_use_rtype = False
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
    'within_subsection_order': 'FileNameSortKey',
}

LINKED = {name for name in sparse_jax.__all__
          if callable(getattr(sparse_jax, name))}


def as_rst(app, what, name, obj, options, lines):
  """Docstrings are plain text with `code`: only lists and examples are markup.

  A public name in backticks becomes a link.
  """
  del app, what, name, obj, options
  for i, line in enumerate(lines):
    if not line.lstrip().startswith(('>>> ', '... ')):
      bullet, text = re.fullmatch(r'(\s*(?:[*-] )?)(.*)', line).groups()
      lines[i] = bullet + ''.join(
          _code(part) if odd else _escaped(part)
          for odd, part in _spans(text))


def _spans(text):
  return ((i % 2, part) for i, part in enumerate(text.split('`')))


def _code(text):
  if text in LINKED:
    return f':obj:`~sparse_jax.{text}`'
  return f'``{text}``' if text.strip() == text != '' else text


def _escaped(text):
  return re.sub(r'([*|]|_(?!\w))', r'\\\1', text)


def setup(app):
  app.connect('autodoc-process-docstring', as_rst, priority=100)
