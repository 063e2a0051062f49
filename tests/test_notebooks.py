"The tutorials run from the first cell to the last, and what is committed is clean."
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / 'nbs').glob('*.ipynb'))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_it_runs(path):
    notebook = nbformat.read(path, 4)
    NotebookClient(notebook, timeout=300, kernel_name='python3', resources={'metadata': {'path': path.parent}}).execute()


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_it_reads_well(path):
    notebook = nbformat.read(path, 4)
    kinds = [c.cell_type for c in notebook.cells]
    assert kinds[0] == 'markdown' and all(kinds[i - 1] == 'markdown' for i, k in enumerate(kinds) if k == 'code')  # each cell is introduced
    code = [c for c in notebook.cells if c.cell_type == 'code']
    assert any(c.outputs for c in code) and not any(c.metadata for c in notebook.cells)
    assert not any(o.output_type == 'error' for c in code for o in c.outputs)
    assert '/root' not in path.read_text() and '/tmp/ipykernel' not in path.read_text()


def test_all_are_there(): assert [p.stem[:2] for p in NOTEBOOKS] == [f'{i:02}' for i in range(13)]


def test_one_notebook_shows_how_the_data_are_loaded_and_the_others_import_it():
    assert [p.stem for p in NOTEBOOKS if 'DataLoaders.from_dsets' in p.read_text()] == ['00_quickstart']
