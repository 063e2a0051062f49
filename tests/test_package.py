import builtins
import configparser
from pathlib import Path

import fasterai
import fasterai.all
from fasterai.schedule import SCHEDULES

ROOT = Path(__file__).parent.parent


def test_the_star_import_shadows_nothing():
    assert not set(fasterai.all.__all__) & set(dir(builtins))
    assert all(hasattr(fasterai.all, n) for n in fasterai.all.__all__)
    assert set(SCHEDULES) <= set(fasterai.all.__all__)


def test_settings_are_what_setup_reads():
    config = configparser.ConfigParser()
    config.read(ROOT / 'settings.ini')
    assert {r.split('>')[0] for r in config['DEFAULT']['requirements'].split()} == {'fastai', 'torch', 'numpy', 'fastcore'}
    assert 'pkg_resources' not in (ROOT / 'setup.py').read_text()
    assert config['DEFAULT']['license'] == 'Apache-2.0' and 'Apache License' in (ROOT / 'LICENSE').read_text()[:100]
