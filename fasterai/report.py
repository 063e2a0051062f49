"Report which weights are zero, layer by layer, counted in the weights themselves."
from dataclasses import asdict, dataclass

import torch

from fasterai.names import Named
from fasterai.peers import ALONE, Alone
from fasterai.shards import here, kind_of
from fasterai.tables import Shown


@dataclass(frozen=True)
class Row:
    "Hold the counts of one layer."
    layer: str  # its name
    kind: str  # the name of its type
    shape: tuple  # of its weight
    weights: int  # how many
    zeros: int  # how many of the weights are exactly zero
    groups: int  # how many groups of weights are pruned together, by the granularity
    dead: int  # how many of the groups have only zeros
    uses: int = 1  # number of multiply-adds of each weight, where the context goes by work; else 1

    @property
    def sparsity(self) -> float:
        "Return the percentage of the layer's weights that are zero."
        return _percent(self.zeros, self.weights)


@dataclass(frozen=True, repr=False)
class Report(Shown):
    "Hold the counts of every selected layer and the totals; prints as a table, shows as HTML in a notebook."
    rows: tuple  # of `Row`, one for each selected layer
    parameters: int  # how many numbers all parameters of the model have, selected or not
    parameter_zeros: int  # how many of them are exactly zero
    skipped: dict  # {name: reason}, for layers that were left out
    matrices: int = 0  # how many numbers the parameters of two and more axes have
    unknown: int = 0  # how many of those are in layers of unknown types, and not selected
    dense_bytes: int = 0  # size of all parameters
    sparse_bytes: int = 0  # size of all parameters as `save_sparse` packs them

    left = 3

    @property
    def title(self) -> str:
        "Say how many weights are zero, and what that brings."
        share = _percent(self.sparse_bytes, self.dense_bytes)
        said = [f'{self.sparsity:.2f} % of {self.weights:,} weights are zero.',
                f'All parameters take {self.dense_bytes:,} bytes, packed by save_sparse '
                f'{self.sparse_bytes:,} ({share:.1f} %).']
        if self.unit != 'weights':
            left = self.multiply_adds - self.saved
            said.append(f'{left:,} of {self.multiply_adds:,} multiply-adds are left.')
        return '\n'.join(said)

    @property
    def weights(self) -> int:
        "Count the selected weights."
        return sum(r.weights for r in self.rows)

    @property
    def zeros(self) -> int:
        "Count the selected weights that are exactly zero."
        return sum(r.zeros for r in self.rows)

    @property
    def sparsity(self) -> float:
        "Return the percentage of the selected weights that are zero."
        return _percent(self.zeros, self.weights)

    @property
    def multiply_adds(self) -> int:
        "Count the multiply-adds of the selected weights; the weights, unless the context goes by work."
        return sum(r.weights * r.uses for r in self.rows)

    @property
    def saved(self) -> int:
        "Count the multiply-adds of weights that are exactly zero; these, unless the context goes by work."
        return sum(r.zeros * r.uses for r in self.rows)

    @property
    def unit(self) -> str:
        "Return the word for what counts: 'weights', or 'multiply-adds' where the context goes by work."
        return 'weights' if all(r.uses == 1 for r in self.rows) else 'multiply-adds'

    def _totals(self):
        "Return (name, numbers, zeros) of each total."
        by_work = [('their multiply-adds', self.multiply_adds, self.saved)] if self.unit != 'weights' else []
        return [('selected weights', self.weights, self.zeros), *by_work,
                ('all parameters', self.parameters, self.parameter_zeros)]

    def _notes(self):
        "Yield (names of layers that were left alone, reason), once for each reason, with a few names each."
        for reason in dict.fromkeys(self.skipped.values()):
            names = [name or '(the model)' for name, why in self.skipped.items() if why == reason]
            some, others = names[:4], len(names) - 4
            more = f' and {others} more' if others > 0 else ''
            yield ', '.join(some) + more, reason

    def _warnings(self):
        "Return a sentence, in a list, where most weights could not be selected."
        if 2 * self.unknown <= self.matrices: return []
        return [f'most weights are left alone: {self.unknown:,} of {self.matrices:,} are in layers '
                'of unknown types: add_layer_type() or layers= includes them']

    def _cells(self):
        "Yield the rows of the table as strings, the head first."
        yield 'layer', 'kind', 'shape', 'weights', 'zeros', 'sparsity', 'groups dead'
        for r in self.rows:
            shape = '×'.join(map(str, r.shape))
            counts = f'{r.weights:,}', f'{r.zeros:,}', f'{r.sparsity:.2f} %', f'{r.dead:,} of {r.groups:,}'
            yield r.layer or '(the model)', r.kind, shape, *counts
        for name, weights, zeros in self._totals():
            yield name, '', '', f'{weights:,}', f'{zeros:,}', f'{_percent(zeros, weights):.2f} %', ''

    def _foot(self): return len(self._totals())

    def _lines(self):
        return [*(f'left alone: {names}: {reason}' for names, reason in self._notes()), *self._warnings()]

    def to_frame(self):
        "Return a pandas DataFrame with one row for each selected layer."
        import pandas as pd
        columns = ['layer', 'kind', 'shape', 'weights', 'zeros', 'sparsity', 'groups', 'dead']
        return pd.DataFrame([asdict(r) | {'sparsity': r.sparsity} for r in self.rows], columns=columns)

    def plot(self,
        ax=None,  # matplotlib axes to draw on; new ones if None
    ):
        "Draw the sparsity of each layer in percent, that of all as a dashed line; return the axes."
        from fasterai.plot import new_axes  # only where a picture is drawn: it is slow to import
        if ax is None: ax = new_axes(1 + .28 * len(self.rows))
        names = [r.layer or '(the model)' for r in self.rows]
        ax.barh(names, [r.sparsity for r in self.rows], color='#0072B2')
        beside = {'transform': ax.get_yaxis_transform(), 'va': 'center'}
        for i, r in enumerate(self.rows):
            ax.text(1.02, i, f'{r.sparsity:.1f} % of {r.weights:,}', **beside)
        ax.axvline(self.sparsity, color='#D55E00', ls='--')
        ax.invert_yaxis()
        ax.set(xlim=(0, 100), xlabel=f'sparsity (%); dashed: all selected weights, {self.sparsity:.2f} %')
        ax.spines[['top', 'right']].set_visible(False)
        return ax


def _percent(part, whole): return 100 * part / whole if whole else 0.


def measure(
    model,  # the network
    layers: list,  # of (name, `names.Weight`, `granularity.Grouping`), the selected ones
    skipped: dict,  # {name: reason}, for layers that were left out
    uses: dict | None = None,  # name: number of multiply-adds of each weight; None: they are not known
    peers: Alone = ALONE,  # the processes, each of which may have a part of the model; all have to ask
) -> Report:
    "Count the zeros of the selected layers and of the whole model."
    single = [layer for layer in layers if peers.splits and layer[2].size == 1]
    counts = peers.totals([zeros_in(weight.tensor, peers) for _, weight, _ in single])
    known = {name: n for (name, *_), n in zip(single, counts)}
    rows = tuple(_row(*layer, (uses or {}).get(layer[0], 1), peers, known.get(layer[0])) for layer in layers)
    from fasterai.deploy.packing import packed_size  # here: whoever only prunes need not load `deploy`
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters)
    counts = [zeros_in(p, peers) for p in parameters] + [negative_zeros_in(p, peers) for p in parameters]
    counts = peers.totals(counts)
    zeros, negative = counts[:len(parameters)], counts[len(parameters):]
    dense = sum(p.numel() * p.element_size() for p in parameters)
    packed = sum(packed_size(p, p.numel() - n, signs) for p, n, signs in zip(parameters, zeros, negative))
    return Report(rows, total, sum(zeros), dict(skipped), *_unknown(model, layers), dense, packed)


def _unknown(model, layers):
    "Count the numbers in parameters of two and more axes, and those in layers of unknown types."
    weights = [p for p in model.parameters() if p.ndim > 1]
    reached = {id(known.stored) for known in Named(model).weights.values()}
    reached |= {id(weight.stored) for _, weight, _ in layers}
    unknown = [p for p in weights if id(p) not in reached]
    return sum(p.numel() for p in weights), sum(p.numel() for p in unknown)


def zeros_in(
    tensor: torch.Tensor,
    peers: Alone,
) -> int:
    "Count the zeros of a tensor for which this process speaks."
    place = peers.place(tensor)
    return int((here(tensor) == 0).sum()) if place is None or place.speaks else 0


def negative_zeros_in(
    tensor: torch.Tensor,
    peers: Alone,
) -> int:
    "Count the zeros with a sign, of a tensor for which this process speaks: a packed file has their signs."
    place = peers.place(tensor)
    if place is not None and not place.speaks or not tensor.is_floating_point(): return 0
    part = here(tensor)
    return int(torch.signbit(part[part == 0].float()).sum())  # 8-bit floats have no signbit


def _row(name, weight, grouping, uses, peers, zeros):
    "Count the zeros of one layer, unless they are known of single weights."
    kind = kind_of(weight.module).__name__
    if zeros is not None:
        return Row(name, kind, grouping.shape, grouping.groups, zeros, grouping.groups, zeros, uses)
    zero = peers.whole(weight.tensor).cpu() == 0
    dead = int((grouping.count(zero) == grouping.sizes).sum())
    return Row(name, kind, grouping.shape, zero.numel(), int(zero.sum()), grouping.groups, dead, uses)
