import ast
import builtins
import configparser
import re
import subprocess
import sys
from pathlib import Path

import yaml

import fasterai
import fasterai.all
from fasterai.schedule import SCHEDULES

ROOT = Path(__file__).parent.parent


def test_the_star_import_shadows_nothing():
    assert not set(fasterai.all.__all__) & set(dir(builtins))
    assert all(hasattr(fasterai.all, n) for n in fasterai.all.__all__)
    assert set(SCHEDULES) <= set(fasterai.all.__all__)


# Who may import whom: a file imports from its own row and from those above it.
ROWS = [
    'synonyms arguments connected data batches tables snapshot shards peers operations channels optimizers plot progress least_squares knapsack',  # leaves
    'ranking selection dataflow ties inputs tradeoff calibration curvature synflow',
    'granularity kinds evidence criteria names layers pattern allocation context schedule recipes regrowth rules distil',  # choices
    'zeros scoring rounding rounds exchange event parts',
    'norms selected masks held',  # state
    'repair repairing teacher report driver attached sparsifier sensitivity timetable summary costs damage fit_to',
    'epochs keep distilling callback tickets demo all',  # with fastai
]


def imported(file):
    "The files of the package that one file imports, by their names without folder and suffix."
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom) and node.module == 'fasterai': found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or '').startswith('fasterai.'): found.add(node.module.split('.')[1])
        elif isinstance(node, ast.Import): found |= {alias.name.split('.')[1] for alias in node.names if alias.name.startswith('fasterai.')}
    return found


def test_imports_point_one_way():
    rows = [row.split() for row in ROWS]
    files = {file.stem: file for file in (ROOT / 'fasterai').glob('*.py') if file.stem != '__init__'}
    assert sorted(name for row in rows for name in row) == sorted(files)
    for i, row in enumerate(rows):
        allowed = {name for above in rows[:i + 1] for name in above}
        for name in row: assert imported(files[name]) - {'deploy', 'native'} <= allowed, name


MORE = {'shrink.py': {'repair'}}  # what is cut out is made up for, by data, while there is the place of it


def test_deploy_knows_nothing_of_training():
    allowed = {'deploy', 'native', 'arguments', 'tables', 'snapshot', 'connected'}
    for file in (ROOT / 'fasterai/deploy').rglob('*.py'): assert imported(file) - allowed <= MORE.get(file.name, set()), file.name


def test_native_knows_nothing_else():
    for file in (ROOT / 'fasterai/native').glob('*.py'): assert imported(file) <= {'native'}, file.name


def test_only_the_last_row_needs_fastai():
    needs = {file.stem for file in (ROOT / 'fasterai').rglob('*.py') if re.search(r'^(from|import) fastai\b', file.read_text(), re.MULTILINE)}
    assert needs == {'keep', 'callback', 'distilling', 'epochs', 'tickets', 'demo'}


def test_settings_are_what_setup_reads():
    config = configparser.ConfigParser()
    config.read(ROOT / 'settings.ini')
    assert {r.split('>')[0] for r in config['DEFAULT']['requirements'].split()} == {'fastai', 'torch', 'numpy', 'fastcore'}
    assert 'pkg_resources' not in (ROOT / 'setup.py').read_text()
    assert config['DEFAULT']['license'] == 'Apache-2.0' and 'Apache License' in (ROOT / 'LICENSE').read_text()[:100]


def test_it_can_be_cited():
    config = configparser.ConfigParser()
    config.read(ROOT / 'settings.ini')
    about = config['DEFAULT']
    cited = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert cited['cff-version'] == '1.2.0' and cited['message'] and cited['type'] == 'software'
    assert cited['authors'] == [{'name': about['author']}]
    assert (cited['title'], cited['license'], cited['version']) == (about['lib_name'], about['license'], fasterai.__version__)


def test_badges_and_forms_say_what_is_true():
    config = configparser.ConfigParser()
    config.read(ROOT / 'settings.ini')
    about = config['DEFAULT']
    for badge, says in (('python', about['min_python']), ('licence', about['license'].replace('-', ' '))):
        assert says in (ROOT / f'images/{badge}.svg').read_text()
        assert f'images/{badge}.svg' in (ROOT / 'README.md').read_text()
    for form in (ROOT / '.github/ISSUE_TEMPLATE').glob('*.yml'):
        assert {'name', 'description', 'body'} <= set(yaml.safe_load(form.read_text())), form.name


def test_pruning_and_the_lines_of_the_readme_need_no_extra():
    extras = 'safetensors', 'onnx', 'onnxruntime', 'onnxscript'
    script = f'import sys; sys.modules.update(dict.fromkeys({extras})); from fasterai.all import *; import fasterai.demo, fasterai.deploy'
    subprocess.run([sys.executable, '-c', script], check=True)
