import subprocess
import sys
from pathlib import Path


def test_speed_is_exact_and_writes_its_table(tmp_path):
    "Its figures mean nothing here; that it asserts its counts and measures every row does."
    script = Path(__file__).parent.parent / 'benchmarks' / 'speed.py'
    subprocess.run([sys.executable, script, '--small', '--out', tmp_path / 'R.md'], check=True, capture_output=True)
    rows = [line for line in (tmp_path / 'R.md').read_text().splitlines() if line.startswith('|')]
    assert len(rows) == 14 and rows[0].startswith('| what | at most | measured | reached |')
