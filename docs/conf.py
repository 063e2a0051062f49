"How `make docs` builds the site: from the README, these pages, the notebooks as they were committed, and the docments of the code."
import inspect
import json
import re
from pathlib import Path

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


def examples():
    "Return {name: its lines} of examples.py; under '' those that come before each."
    first, *others = re.split('^# (?=[A-Za-z_]+$)', (HERE / 'examples.py').read_text(encoding='utf-8'), flags=re.MULTILINE)
    return {'': first} | {name: lines.strip() for name, lines in (other.split('\n', 1) for other in others)}


def shown_on():
    "Return {path of a page from the reference: its title and its text}, in the order of the sidebar."
    texts = {f'../nbs/{path.name}': '\n'.join(''.join(cell['source']) for cell in json.loads(path.read_text(encoding='utf-8'))['cells'])
             for path in sorted((HERE.parent / 'nbs').glob('*.ipynb'))}
    texts |= {name: (HERE / name).read_text(encoding='utf-8') for name in ('cookbook.md', 'guide.md', 'layers.md', 'gallery.md', 'faq.md')}
    return {path: (re.search('^# ([^:\n]+)', text, re.MULTILINE)[1], text) for path, text in texts.items()}


def pages_with(
    name: str,  # of a class or function
) -> list:  # (title, path) of at most three pages that show it; those that mention it most come first
    "Find the pages that a reader of a name of the reference may see, too."
    shown = re.compile(rf"\b{name}\(|'{name}'|`{name}`")  # as code, not as a word
    counts = {page: len(shown.findall(text)) for page, (_, text) in PAGES_OF_TEXT.items()}
    best = sorted((page for page, n in counts.items() if n), key=lambda page: -counts[page])
    return [(PAGES_OF_TEXT[page][0], page) for page in best[:3]]


HERE = Path(__file__).parent
EXAMPLES, PAGES_OF_TEXT = examples(), shown_on()


def add_docments(app, what, name, thing, options, lines):
    "Describe a parameter by the comment on its line, and show an example. A dataclass has its fields from its bases too."
    lines[:] = [_literal(line) for line in lines]
    parameters = _parameters(_with_docments(thing))
    lines += ['', *parameters, '', *_example(name.split('.')[-1])]


def _parameters(thing):
    "Return lines on the arguments of a class or function and on what it returns, with their types."
    if thing is None: return []
    meanings = {}
    for source in reversed(thing.__mro__) if inspect.isclass(thing) else [thing]:
        if source is not object: meanings |= {n: m for n, m in docments(source).items() if m}
    taken = inspect.signature(thing).parameters
    lines = []
    for name, parameter in taken.items():
        if name in meanings: lines.append(f':param {name}: {_literal(meanings[name])}')
        kind = _type(parameter)
        if name in meanings and kind: lines.append(f':type {name}: {kind}')
    if 'return' in meanings: lines.append(f':returns: {_literal(meanings["return"])}')
    return lines


def _type(parameter):
    "Return the type of an argument as text: its annotation, else that of a default that is a flag, a number or a string."
    annotation = parameter.annotation
    if annotation is not parameter.empty: return inspect.formatannotation(annotation).replace('collections.abc.', '')
    return type(parameter.default).__name__ if isinstance(parameter.default, (bool, int, float, str)) else ''


def _example(name):
    "Return lines with the example of a name, and with pages that show it."
    if name not in EXAMPLES: return []
    code = ['.. code-block:: python', '', *(f'   {line}' for line in EXAMPLES[name].split('\n')), '']
    pages = ', '.join(f':doc:`{title} <{path.rsplit(".", 1)[0]}>`' for title, path in pages_with(name))
    return [*code, *([f'See also: {pages}.', ''] if pages else [])]


def setup(app):
    app.connect('source-read', add_pages)
    app.connect('autodoc-process-docstring', add_docments)
