"One file of results with a part for each benchmark."
import os
import platform
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / 'RESULTS.md'


def machine() -> str:
    "What it was measured on."
    return (f'{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, '
            f'{torch.get_num_threads()} threads')


def table(
    rows: list,  # of (what, goal, measured, reached)
) -> str:
    "As Markdown."
    return '\n'.join(f'| {" | ".join(row)} |' for row in [('what', 'goal', 'measured', 'reached'), ('---',) * 4, *rows])


def write(
    title: str,  # of the part, which is replaced if it is there
    text: str,
    path: Path = RESULTS,
    heading: str = 'Results',  # of the file
):
    "Print a part, and put it into the file."
    print(f'## {title}\n\n{text}')
    parts = {}
    for part in path.read_text().split('\n## ')[1:] if path.exists() else []:
        name, _, body = part.partition('\n')
        parts[name] = body.strip()
    parts[title] = text
    path.write_text('\n\n'.join([f'# {heading}', *(f'## {name}\n\n{body}' for name, body in parts.items())]) + '\n')
