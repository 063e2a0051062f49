import importlib
import subprocess
import sys
from pathlib import Path

from fasterai.criteria import CRITERIA

BENCHMARKS = Path(__file__).parent.parent / 'benchmarks'


def test_speed_is_exact_and_writes_its_table(tmp_path):
    "Its figures mean nothing here; that it asserts its counts and measures every row does."
    script = Path(__file__).parent.parent / 'benchmarks' / 'speed.py'
    subprocess.run([sys.executable, script, '--small', '--out', tmp_path / 'R.md'], check=True, capture_output=True)
    rows = [line for line in (tmp_path / 'R.md').read_text().splitlines() if line.startswith('|')]
    assert len(rows) == 14 and rows[0].startswith('| what | goal | measured | reached |')


def test_deploy_measures_every_row_and_leaves_other_parts_alone(tmp_path):
    (tmp_path / 'R.md').write_text('# Results\n\n## Other\n\ntext\n\n## What zeros turn into\n\nold\n')
    script = Path(__file__).parent.parent / 'benchmarks' / 'deploy.py'
    subprocess.run([sys.executable, script, '--small', '--out', tmp_path / 'R.md'], check=True, capture_output=True)
    text = (tmp_path / 'R.md').read_text()
    assert text.startswith('# Results\n\n## Other\n\ntext\n\n## What zeros turn into\n\nBy') and 'old' not in text and text.count('\n|') == 6


def science(*arguments):
    return subprocess.run([sys.executable, BENCHMARKS / 'science.py', *arguments], capture_output=True, text=True)


def test_science_replaces_a_part_and_leaves_others_alone(tmp_path):
    (tmp_path / 'S.md').write_text('# Ours\n\n## Other\n\ntext\n')
    science('paper', '--out', tmp_path / 'S.md').check_returncode()
    text = (tmp_path / 'S.md').read_text()
    assert '## Other\n\ntext\n\n## A model of 7 billion' in text and text.count('\n| down |') == 1


def test_several_parts_run_side_by_side_and_each_has_its_section(tmp_path):
    science('paper', 'paper', '--out', tmp_path / 'S.md').check_returncode()
    text = (tmp_path / 'S.md').read_text()
    assert text.count('\n## A model of 7 billion') == 1 and text.count('\n| down |') == 1


def test_science_says_where_data_go(tmp_path):
    found = science('monks', 'lenet', '--data', tmp_path)
    assert found.returncode and f'{tmp_path} has no monks, mnist' in found.stderr and 'DATA=' in found.stderr
    found = science('--data', tmp_path)
    assert f'{tmp_path} has no monks, cifar10, shakespeare, mnist;' in found.stderr
    found = science('mnist')
    assert found.returncode and "got 'mnist', expected one of xor, monks" in found.stderr


def test_experiments_know_the_criteria(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ('xor', 'monks', 'resnet20', 'minilm'):
        assert set(importlib.import_module(f'experiments.{name}').CRITERIA) <= set(CRITERIA)


def test_obs_deletes_a_weight_of_xor_that_is_not_needed(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    xor = importlib.import_module('experiments.xor')
    monkeypatch.setattr(xor, 'SEEDS', 8)
    goals = [found for found in xor.run(None) if hasattr(found, 'goal')]
    assert goals and all(goal.reached for goal in goals)
def test_kernels_measures_its_rows(tmp_path):
    script = Path(__file__).parent.parent / 'benchmarks' / 'kernels.py'
    subprocess.run([sys.executable, script, '--small', '--out', tmp_path / 'R.md'], check=True, capture_output=True)
    text = (tmp_path / 'R.md').read_text()
    assert text.startswith('# Results\n\n## Zeros that run\n\nBy') and text.count('\n|') == 6


def test_budgets_measures_its_rows(tmp_path):
    script = Path(__file__).parent.parent / 'benchmarks' / 'budgets.py'
    subprocess.run([sys.executable, script, '--small', '--out', tmp_path / 'R.md'], check=True, capture_output=True)
    text = (tmp_path / 'R.md').read_text()
    assert text.startswith('# Results\n\n## Budgets\n\nBy') and text.count('\n|') == 6


def test_distributed_compares_masks_and_counts_bytes(tmp_path):
    script = Path(__file__).parent.parent / 'benchmarks' / 'distributed.py'
    subprocess.run([sys.executable, script, '--small', '--out', tmp_path / 'R.md'], check=True, capture_output=True)
    text = (tmp_path / 'R.md').read_text()
    assert text.startswith('# Results\n\n## Parts of a model\n\nBy') and text.count('\n|') == 4
