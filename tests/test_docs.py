"The site is built without a warning, every link in it leads somewhere, and what is made from the code is up to date."
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import matplotlib.pyplot as plt
import pytest
from matplotlib.image import imread

import fasterai.all
import fasterai.deploy
from fasterai.granularity import AXES
from fasterai.kinds import EVIDENCE

ROOT = Path(__file__).parent.parent
TABLES = runpy.run_path(str(ROOT / 'docs/tables.py'))
GALLERY = runpy.run_path(str(ROOT / 'docs/gallery.py'))
SITE = runpy.run_path(str(ROOT / 'docs/conf.py'))
EXAMPLES = SITE['EXAMPLES']


class Page(HTMLParser):
    "What a page leads to, and where in it one can be led."

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors = [], {''}
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[a] for a in ('id', 'name') if attrs.get(a)}
        self.links += [attrs[a] for a in ('href', 'src') if a in attrs]


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp('docs')
    done = subprocess.run([sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '-c', 'docs', '-d', out / 'doctrees', '.', out / 'site'],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / 'site'


def test_every_link_leads_somewhere(site):
    pages = {path: Page(path) for path in site.rglob('*.html')}
    assert {'README.html', 'guide.html', 'layers.html', 'reference.html', 'RESULTS.html', '00_quickstart.html'} <= {p.name for p in pages}
    broken, followed = [], 0
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc: continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            followed += 1
            if not target.is_file() or target in pages and unquote(parts.fragment) not in pages[target].anchors: broken.append((path.name, link))
    assert not broken and followed > 500


def test_nothing_is_fetched_to_show_a_page(site):
    for path in site.rglob('*.html'):
        assert not [s for s in Page(path).links if urlsplit(s).netloc and s.endswith(('.js', '.css', '.png', '.svg', '.woff2'))], path.name


def test_it_can_be_searched(site):
    assert 'SparsifyCallback' in (site / 'searchindex.js').read_text(encoding='utf-8')


def test_the_reference_has_every_public_name_and_its_arguments(site):
    page = (site / 'docs/reference.html').read_text(encoding='utf-8')
    anchors = Page(site / 'docs/reference.html').anchors
    missing = [n for module in (fasterai.all, fasterai.deploy) for n in module.__all__ if f'{module.__name__}.{n}' not in anchors]
    assert not missing
    assert 'how much of that sparsity is wanted now, 0 to 1, as a schedule returns it' in page  # a docment


def test_a_page_that_its_section_names_shows_each_name_of_the_reference():
    _, *sections = re.split('^## ', (ROOT / 'docs/reference.md').read_text(encoding='utf-8'), flags=re.MULTILINE)
    unseen = []
    for section in sections:
        pages = re.search(r'^See also: (.*)\.$', section, re.MULTILINE)
        shown = ''.join((ROOT / 'docs' / page).read_text(encoding='utf-8') for page in re.findall(r'\((.*?)\)', pages[1]))
        names = re.findall(r'^\.\. auto(?:class|function):: (\w+)$', section, re.MULTILINE)
        unseen += [name for name in names if not re.search(rf'\b{name}\b', shown)]
    assert not unseen, 'name a page that shows it, below the heading'


def test_each_name_of_the_reference_has_an_example_and_no_other():
    page = (ROOT / 'docs/reference.md').read_text(encoding='utf-8')
    names = re.findall(r'^\.\. auto(?:class|function|data|method):: (?:\w+\.)*(\w+)', page, re.MULTILINE)
    assert sorted(names) == sorted(filter(None, EXAMPLES))


def test_an_entry_of_the_reference_has_types_an_example_and_pages(site):
    page = (site / 'docs/reference.html').read_text(encoding='utf-8')
    entry = page.split('id="fasterai.all.plot_kernels"')[1].split('id="fasterai.all.')[0]
    text = re.sub('<.*?>', '', entry)
    assert 'weight (torch.Tensor)' in text and 'filters (int)' in text
    assert 'plot_kernels(model.block2.conv.weight)' in text
    assert re.search('See also:.*Granularity', text)


def test_pages_are_found_by_code_not_by_words():
    assert [page for _, page in SITE['pages_with']('fit_to')][0] == '../nbs/12_budgets.ipynb'
    assert SITE['pages_with']('zeros') == []


@pytest.fixture
def tables_as_they_were():
    "Examples add a layer type and kinds of evidence; the other tests do without."
    before = dict(AXES), dict(EVIDENCE)
    yield
    for table, rows in zip((AXES, EVIDENCE), before):
        table.clear()
        table.update(rows)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', filter(None, EXAMPLES))
def test_an_example_runs_as_it_stands(name, tmp_path, monkeypatch, tables_as_they_were):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(EXAMPLES[''], names)
    exec(EXAMPLES[name], names)
    plt.close('all')


@pytest.mark.parametrize('name', TABLES['TABLES'])
def test_the_tables_are_what_the_code_says(name):
    text = (ROOT / name).read_text(encoding='utf-8')
    assert TABLES['TABLES'][name]() in text, f'python docs/tables.py writes {name} anew'
    assert TABLES['with_table'](text, 'another') != text


@pytest.mark.filterwarnings('ignore')
def test_the_gallery_is_drawn_by_its_own_lines(tmp_path):
    GALLERY['draw'](tmp_path)
    drawn, committed = ({file.name: file for file in folder.iterdir()} for folder in (tmp_path, GALLERY['PICTURES']))
    assert drawn.keys() == committed.keys() and len(drawn) >= 10
    assert all(file.stat().st_size < 60_000 for file in committed.values())
    for name, file in drawn.items(): assert imread(file).shape == imread(committed[name]).shape and imread(file).std() > .05


def measured(): return ''.join((ROOT / f'benchmarks/{name}.md').read_text(encoding='utf-8') for name in ('RESULTS', 'SCIENCE'))


def test_what_the_readme_says_of_speed_size_and_accuracy_was_measured():
    promises = (ROOT / 'README.md').read_text(encoding='utf-8').split('## What to expect')[1].split('The loss of accuracy')[0]
    figures, results = re.findall(r'\d+\.\d+|\d+(?= × as fast)', promises), measured()
    assert len(figures) > 10 and not [f for f in figures if not re.search(rf'(?<![\d.]){re.escape(f)}(?![\d.])', results)]
