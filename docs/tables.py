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


KINDS = {  # columns of the table of granularities, which phones may hyphenate, and the layer type that shows each
    'Linear': ('Linear', 'weight'), 'conv': ('Conv2d', 'weight'), 'trans&shy;posed conv': ('ConvTranspose2d', 'weight'),
    'atten&shy;tion, LSTM, GRU': ('MultiheadAttention', 'in_proj_weight'), 'Embed&shy;ding': ('Embedding', 'weight'),
}


def options() -> str:
    "The arguments of `SparsifyCallback`, as a Markdown table of two columns."
    meanings, lines = docments(SparsifyCallback), [['argument, default', 'what']]
    for name, argument in inspect.signature(SparsifyCallback).parameters.items():
        default = '' if argument.default in (argument.empty, None) else f'` `{argument.default!r}'
        names = f'. **Names:** {" ".join(f"`{n}`" for n in NAMES[name])}' if name in NAMES else ''
        lines.append([f'`{name}{default}`', meanings[name] + names])
    return _markdown(lines)


def layers() -> str:
    "The axes that a group of each granularity spans, in five kinds of layer, and the axes of each layer type."
    return _markdown(_granularities()) + '\n\n' + _markdown(_layer_types())


def _granularities():
    "Yield the rows of the table of granularities, the head first."
    rows = {kind: _axes()[name, weight] for kind, (name, weight) in KINDS.items()}
    yield ['', *rows]
    yield ['axes', *(f'`{row}`' for row in rows.values())]
    for name, granularity in GRANULARITIES.items():
        yield [f'`{name}`', *(_spans(granularity, row) for row in rows.values())]


def _layer_types():
    "Yield the rows of the table of layer types, the head first: those of the same axes in one row."
    yield ['axes', 'layer types']
    types = {}
    for (kind, weight), row in _axes().items():
        types.setdefault(row, []).append(kind if weight == 'weight' else f'{kind} `{weight}`')
    yield from ([f'`{row}`', ', '.join(kinds)] for row, kinds in types.items())


def _axes():
    "Return {(layer type, weight): its axes} of all types that are known."
    torchs = {kind.__name__: weights for kind, weights in AXES.items() if kind.__module__.startswith('torch.')}
    return {(kind, weight): row for kind, weights in (torchs | BY_NAME).items() for weight, row in weights.items()}


def _spans(granularity, row):
    "Return the axes that a group spans, as text."
    axes = dict.fromkeys((a for folded in read_axes(row) for a, _ in folded), 2)
    return ' '.join(granularity.spans(axes)) or '·'


def _markdown(lines):
    head, *rows = lines
    return '\n'.join(f'| {" | ".join(line)} |' for line in (head, ['---'] * len(head), *rows))


TABLES = {'README.md': options, 'docs/layers.md': layers}  # each file has a place for one


def with_table(
    text: str,  # of a page
    table: str,
) -> str:
    "The page, with its table made anew."
    return re.sub(r'(?<=<!-- made by docs/tables.py -->\n\n).*?(?=\n\n<!-- end -->)', lambda _: table, text, flags=re.DOTALL)


if __name__ == '__main__':
    for name, make in TABLES.items(): (ROOT / name).write_text(with_table((ROOT / name).read_text(encoding='utf-8'), make()), encoding='utf-8')
