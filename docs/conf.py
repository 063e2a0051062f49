"How `make docs` builds the site: from the README, these pages, the notebooks as they were committed, and the docments of the code."
import inspect
import re

from fastcore.docments import docments

from fasterai import __version__

project, author, release = 'fasterai', 'fasterai developers', __version__
copyright = author
root_doc = 'README'
extensions = ['sphinx.ext.autodoc', 'myst_nb', 'sphinx_copybutton']
include_patterns = ['README.md', 'CHANGELOG.md', 'CONTRIBUTING.md', 'docs/*.md', 'nbs/*.ipynb', 'benchmarks/*.md']
exclude_patterns = ['.*', 'site', 'build', 'dist', 'demo', 'tests', 'fasterai']

html_theme = 'furo'
html_title = 'fasterai'
html_extra_path = ['index.html']  # leads to the README's page
html_copy_source = False
html_show_search_summary = False  # it fetches pages, which browsers refuse to pages that are files
html_theme_options = {'light_css_variables': {'color-brand-primary': '#0072B2', 'color-brand-content': '#0072B2'},
                      'dark_css_variables': {'color-brand-primary': '#56B4E9', 'color-brand-content': '#56B4E9'}}
html_static_path = ['site.css']
html_css_files = ['site.css']

myst_enable_extensions = ['colon_fence']
myst_heading_anchors = 3
nb_execution_mode = 'off'  # the tests run them
nb_merge_streams = True
copybutton_exclude = '.linenos, .gp, .go'
autodoc_member_order = 'bysource'
autodoc_typehints = 'none'
default_role = 'py:obj'
smartquotes = False

PAGES = """
```{toctree}
:hidden:
:caption: Tutorials
:glob:

nbs/*
```

```{toctree}
:hidden:
:caption: Guide and reference

docs/cookbook
docs/guide
docs/layers
docs/gallery
docs/faq
docs/coming-from
docs/reference
benchmarks/RESULTS
benchmarks/SCIENCE
benchmarks/ZOO
CHANGELOG
CONTRIBUTING
```
"""


def add_pages(app, page, source):
    "The README has no table of contents of its own; the site's sidebar needs one."
    if page == root_doc: source[0] += PAGES


def _literal(text): return re.sub(r'(?<!\S)`(\.[^`]*)`', r'``\1``', text).replace('|', r'\|')  # |w| is no substitution, .05 no name to look up


def _with_docments(thing):
    "Return the class or function whose lines have comments: of a property its function, of a type alias None."
    thing = getattr(thing, 'fget', None) or getattr(thing, 'func', thing)
    return thing if inspect.isclass(thing) or inspect.isroutine(thing) else None


def add_docments(app, what, name, thing, options, lines):
    "Describe a parameter by the comment on its line. A dataclass has its fields from its bases too."
    lines[:] = [_literal(line) for line in lines]
    thing = _with_docments(thing)
    if thing is None: return
    meanings = {}
    for source in reversed(thing.__mro__) if inspect.isclass(thing) else [thing]:
        if source is not object: meanings |= {n: m for n, m in docments(source).items() if m}
    taken = inspect.signature(thing).parameters
    lines += ['', *(f':param {n}: {_literal(meanings[n])}' for n in taken if n in meanings)]
    if 'return' in meanings: lines.append(f':returns: {_literal(meanings["return"])}')


def setup(app):
    app.connect('source-read', add_pages)
    app.connect('autodoc-process-docstring', add_docments)
