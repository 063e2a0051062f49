"Runs notebooks and cleans what they put out, so that they can be committed: `python nbs/execute.py 02 04`; all of them without an argument."
import os
import re
import sys
from pathlib import Path
from time import perf_counter

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
KERNEL = {'kernelspec': {'display_name': 'Python 3', 'language': 'python', 'name': 'python3'}, 'language_info': {'name': 'python'}}


def cleaned(
    outputs: list,  # of a cell
) -> list:  # those that are worth a reader's while
    "Without progress bars, paths of this machine, and warnings that are not this package's."
    kept = []
    for output in outputs:
        html = output.get('data', {}).get('text/html')
        if output.get('name') == 'stderr' and 'sparsity:' not in output.text or html is not None and '<t' not in html.replace('<title', ''): continue
        if html is not None: output.data.update({'text/html': re.sub('<style.*?</style>', '', html, flags=re.DOTALL).strip(), 'text/plain': ''})
        if 'metadata' in output: output.metadata.clear()
        if output.output_type == 'stream': output.text = re.sub(r'/\S*/ipykernel_\S*?: |/\S*/(?=(fasterai|site-packages)/)', '', output.text)
        kept.append(output)
    return kept


def execute(path: Path):
    notebook, start = nbformat.read(path, 4), perf_counter()
    NotebookClient(notebook, timeout=300, kernel_name='python3', resources={'metadata': {'path': HERE}}).execute()
    for i, cell in enumerate(notebook.cells):
        cell.metadata.clear()
        cell.id = f'cell-{i}'
        if cell.cell_type == 'code': cell.outputs = cleaned(cell.outputs)
    notebook.metadata = nbformat.from_dict(KERNEL)
    nbformat.write(notebook, path)
    print(f'{path.name}: {perf_counter() - start:.0f} s', flush=True)


if __name__ == '__main__':
    os.environ['PYTHONWARNINGS'] = 'ignore::FutureWarning'
    for path in sorted(HERE.glob('*.ipynb')):
        if not sys.argv[1:] or path.name.startswith(tuple(sys.argv[1:])): execute(path)
