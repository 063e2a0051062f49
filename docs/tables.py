"The tables that are made from the code: `python docs/tables.py` writes them into the README and the pages."
import inspect
import re
from pathlib import Path

from fastcore.docments import docments

from fasterai.callback import SparsifyCallback
from fasterai.context import CONTEXTS
from fasterai.criteria import CRITERIA
from fasterai.granularity import AXES, BY_NAME, GRANULARITIES, read_axes
from fasterai.recipes import RECIPES
from fasterai.regrowth import REGROWTHS
from fasterai.repair import REPAIRS
from fasterai.schedule import SCHEDULES

ROOT = Path(__file__).parent.parent
NAMES = {'granularity': [*GRANULARITIES], 'context': [*CONTEXTS, '2:4'], 'criteria': [*CRITERIA], 'schedule': [*SCHEDULES],
         'regrow': [*REGROWTHS], 'repair': [*REPAIRS], 'recipe': [*RECIPES]}


def options() -> str:
    "The arguments of `SparsifyCallback`, as a Markdown table."
    meanings, lines = docments(SparsifyCallback), [['argument', 'default', 'what', 'names'], ['---'] * 4]
    for name, argument in inspect.signature(SparsifyCallback).parameters.items():
        default = '' if argument.default is argument.empty else f'`{argument.default!r}`'
        lines.append([f'`{name}`', default, meanings[name], ' '.join(f'`{n}`' for n in NAMES.get(name, ()))])
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def layers() -> str:
    "The layer types that are known, and which axes a group of each granularity spans, as a Markdown table."
    head = ['layer type', 'weight', 'axes', *GRANULARITIES]
    lines = [head, ['---'] * len(head)]
    rows = {kind.__name__: weights for kind, weights in AXES.items() if kind.__module__.startswith('torch.')}
    for kind, weights in (rows | BY_NAME).items():
        for name, row in weights.items():
            axes = dict.fromkeys((a for folded in read_axes(row) for a, _ in folded), 2)
            spans = [' '.join(row.spans(axes)) or '·' for row in GRANULARITIES.values()]
            lines.append([kind, f'`{name}`', f'`{row}`', *spans])
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


TABLES = {'README.md': options, 'docs/layers.md': layers}  # each file has a place for one


def with_table(
    text: str,  # of a page
    table: str,
) -> str:
    "The page, with its table made anew."
    return re.sub(r'(?<=<!-- made by docs/tables.py -->\n\n).*?(?=\n\n<!-- end -->)', lambda _: table, text, flags=re.DOTALL)


if __name__ == '__main__':
    for name, make in TABLES.items(): (ROOT / name).write_text(with_table((ROOT / name).read_text(encoding='utf-8'), make()), encoding='utf-8')
