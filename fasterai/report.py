"What is zero, measured from the weights alone."
from dataclasses import asdict, dataclass
from html import escape

from fasterai.tables import as_html, as_text


@dataclass(frozen=True)
class Row:
    "One layer."
    layer: str
    kind: str  # its type
    shape: tuple  # of its weight
    weights: int
    zeros: int  # weights that are exactly zero
    groups: int  # what the granularity makes live and die together
    dead: int  # groups of which every weight is zero

    @property
    def sparsity(self): return _percent(self.zeros, self.weights)


@dataclass(frozen=True)
class Report:
    "Rows and totals; prints as a table, shows as HTML in a notebook."
    rows: tuple  # of `Row`, one a selected layer
    parameters: int  # numbers in all parameters of the model, selected or not
    parameter_zeros: int  # how many of them are exactly zero
    skipped: dict  # name: reason, for layers that were left out

    @property
    def weights(self): return sum(r.weights for r in self.rows)

    @property
    def zeros(self): return sum(r.zeros for r in self.rows)

    @property
    def sparsity(self):
        "Percent of the selected weights that are zero."
        return _percent(self.zeros, self.weights)

    def _totals(self):
        return (('selected weights', self.weights, self.zeros), ('all parameters', self.parameters, self.parameter_zeros))

    def _notes(self):
        "What was left alone, once for each reason, and no more than a few names."
        for reason in dict.fromkeys(self.skipped.values()):
            names = [n or '(the model)' for n, r in self.skipped.items() if r == reason]
            yield ', '.join(names[:4]) + (f' and {len(names) - 4} more' if len(names) > 4 else ''), reason

    def _cells(self):
        "The table as text, header first."
        yield 'layer', 'kind', 'shape', 'weights', 'zeros', 'sparsity', 'groups dead'
        for r in self.rows:
            yield (r.layer or '(the model)', r.kind, '×'.join(map(str, r.shape)), f'{r.weights:,}', f'{r.zeros:,}',
                   f'{r.sparsity:.2f} %', f'{r.dead:,} of {r.groups:,}')
        for name, weights, zeros in self._totals():
            yield name, '', '', f'{weights:,}', f'{zeros:,}', f'{_percent(zeros, weights):.2f} %', ''

    def __str__(self):
        return '\n'.join([as_text(self._cells(), left=3, foot=2), *(f'left alone: {names}: {reason}' for names, reason in self._notes())])

    def _repr_html_(self):
        notes = ''.join(f'<div>left alone: <code>{escape(names)}</code>: {escape(reason)}</div>' for names, reason in self._notes())
        return as_html(self._cells(), left=3) + notes

    def to_frame(self):
        "A pandas DataFrame, one row a selected layer."
        import pandas as pd
        return pd.DataFrame([asdict(r) | {'sparsity': r.sparsity} for r in self.rows],
                            columns=['layer', 'kind', 'shape', 'weights', 'zeros', 'sparsity', 'groups', 'dead'])

    def plot(self, ax=None):
        "Draw the sparsity of each layer and of all; returns the matplotlib axes."
        if ax is None:
            import matplotlib.pyplot as plt
            _, ax = plt.subplots(figsize=(6, 1.2 + .28 * len(self.rows)))
        bars = ax.barh([r.layer or '(the model)' for r in self.rows], [r.sparsity for r in self.rows], color='#0072B2')
        ax.bar_label(bars, [f'{r.sparsity:.1f} % of {r.weights:,}' for r in self.rows], padding=3, fontsize='small',
                     bbox={'facecolor': 'white', 'edgecolor': 'none', 'pad': 1})  # the dashed line may pass behind it
        ax.axvline(self.sparsity, color='#D55E00', ls='--', label=f'all selected weights: {self.sparsity:.2f} %')
        ax.invert_yaxis()
        ax.set(xlim=(0, 135), xticks=range(0, 101, 20), xlabel='sparsity (%)')
        ax.legend(fontsize='small', loc='lower right')
        return ax


def _percent(part, whole): return 100 * part / whole if whole else 0.


def measure(
    model,  # the network
    layers: list,  # (name, `layers.Weight`, grouping) of the selected ones
    skipped: dict,  # name: reason
) -> Report:
    "Count the zeros."
    rows = []
    for name, weight, grouping in layers:
        zero = weight.tensor.detach().cpu() == 0
        dead = int((grouping.count(zero) == grouping.sizes).sum())
        rows.append(Row(name, type(weight.module).__name__, grouping.shape, zero.numel(), int(zero.sum()), grouping.groups, dead))
    parameters = list(model.parameters())
    return Report(tuple(rows), sum(p.numel() for p in parameters), sum(int((p.detach() == 0).sum()) for p in parameters), dict(skipped))
