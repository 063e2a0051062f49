import subprocess
import sys
from pathlib import Path


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


def test_kernels_measures_its_rows(tmp_path):
    script = Path(__file__).parent.parent / 'benchmarks' / 'kernels.py'
    subprocess.run([sys.executable, script, '--small', '--out', tmp_path / 'R.md'], check=True, capture_output=True)
    text = (tmp_path / 'R.md').read_text()
    assert text.startswith('# Results\n\n## Zeros that run\n\nBy') and text.count('\n|') == 6
