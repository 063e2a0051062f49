"Which layers bear it: each one alone made sparse, level by level, and what that costs."
from bisect import bisect_left
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from html import escape

import torch
from torch import nn

from fasterai.sparsifier import Sparsifier
from fasterai.tables import as_html, as_text

LEVELS = (10, 25, 50, 75, 90, 95)


@dataclass(frozen=True)
class Sensitivity:
    "What was measured, layer by layer; prints as a table, shows as HTML in a notebook."
    values: dict  # layer's name: {level in percent: the metric}
    weights: dict  # layer's name: how many
    dense: float  # the metric before
    metric: str  # its name
    higher_is_better: bool

    @property
    def levels(self) -> list:
        "In percent."
        return sorted({level for row in self.values.values() for level in row})

    def damage(self, layer: str) -> dict:  # level: how much worse than dense, never falling
        "What a layer's sparsity costs."
        worst, found = 0., {}
        for level, value in sorted(self.values[layer].items()):
            worst = max(worst, self.dense - value if self.higher_is_better else value - self.dense)
            found[level] = worst
        return found

    def suggest(self,
        sparsity: float,  # percent of all the weights together
    ) -> dict:  # layer's name: percent, as `SparsifyCallback` takes it
        "The sparsities with which no layer alone costs more than need be: all are taken to the same damage."
        curves = {n: [(0., 0.), *self.damage(n).items()] for n in self.values if self.values[n]}
        if not curves: raise ValueError('sparsity: nothing was measured, so nothing can be suggested')
        total = sum(self.weights[n] for n in curves)
        most = sum(self.weights[n] * curve[-1][0] for n, curve in curves.items()) / total
        if not 0 <= sparsity <= most: raise ValueError(f'sparsity: got {sparsity!r}, allowed is 0 to {most:g}, the highest level that was measured')
        slope = 1e-3 * max((d for curve in curves.values() for _, d in curve), default=0) + 1e-9  # where nothing is lost, less is lost with less

        def reached(damage):
            return {n: _level([(level, d + slope * level / 100) for level, d in curve], damage) for n, curve in curves.items()}
        low, high = 0., max(d for curve in curves.values() for _, d in curve) + slope
        for _ in range(60):
            middle = (low + high) / 2
            if sum(self.weights[n] * s for n, s in reached(middle).items()) < sparsity * total: low = middle
            else: high = middle
        found = reached(high)
        tiny = {n for n, s in found.items() if s < 1}  # no sparsity that can be asked for: the others take it over
        room = {n: curves[n][-1][0] - s for n, s in found.items() if n not in tiny}
        lost, space = sum(self.weights[n] * found[n] for n in tiny), sum(self.weights[n] * r for n, r in room.items())
        return {n: 0. if n in tiny else round(s + (lost / space * room[n] if space else 0), 2) for n, s in found.items()}

    def to_frame(self):
        "A pandas DataFrame, a row for each layer, a column for each level."
        import pandas as pd
        return pd.DataFrame.from_dict(self.values, orient='index', columns=self.levels).rename_axis(index='layer', columns='sparsity (%)')

    def _cells(self):
        yield 'layer', 'weights', *(f'{level:g} %' for level in self.levels)
        for name, row in self.values.items():
            yield name or '(the model)', f'{self.weights[name]:,}', *(f'{row[level]:.4g}' if level in row else '' for level in self.levels)

    def _title(self): return f'{self.metric}, dense: {self.dense:.4g}; with one layer alone at'

    def __str__(self):
        return f'{self._title()}\n{as_text(self._cells())}'

    def _repr_html_(self):
        return f'<div>{escape(self._title())}</div>{as_html(self._cells())}'

    def plot(self, ax=None):
        "Draw a curve for each layer; returns the matplotlib axes."
        import matplotlib
        if ax is None:
            import matplotlib.pyplot as plt
            _, ax = plt.subplots(figsize=(7, 4), layout='constrained')
        ax.axhline(self.dense, color='#606060', ls='--', lw=1, label='dense')
        colours = matplotlib.colormaps['viridis']([.95 * i / max(len(self.values) - 1, 1) for i in range(len(self.values))])
        for (name, row), colour in zip(self.values.items(), colours):
            ax.plot([0, *sorted(row)], [self.dense, *(row[level] for level in sorted(row))], marker='.', color=colour, label=name or '(the model)')
        ax.set(xlabel='sparsity of one layer alone (%)', ylabel=self.metric)
        ax.legend(fontsize='x-small', loc='center left', bbox_to_anchor=(1, .5), ncols=1 + len(self.values) // 24)
        return ax

    def heatmap(self, ax=None):
        "Draw layers against levels; dark is what costs most; returns the matplotlib axes."
        if ax is None:
            import matplotlib.pyplot as plt
            _, ax = plt.subplots(figsize=(2 + .7 * len(self.levels), 1 + .35 * len(self.values)), layout='constrained')
        cells = [[self.values[n].get(level, float('nan')) for level in self.levels] for n in self.values]
        image = ax.imshow(cells, aspect='auto', cmap='cividis' if self.higher_is_better else 'cividis_r')
        ax.set_xticks(range(len(self.levels)), [f'{level:g}' for level in self.levels])
        ax.set_yticks(range(len(self.values)), [n or '(the model)' for n in self.values])
        ax.set(xlabel='sparsity of one layer alone (%)')
        ax.figure.colorbar(image, ax=ax, label=self.metric)
        return ax


def _level(curve, damage):
    "How far along a rising curve of (level, damage)."
    i = bisect_left(curve, damage, key=lambda point: point[1])
    if i == 0: return curve[0][0]
    if i == len(curve): return curve[-1][0]
    (a, before), (b, after) = curve[i - 1], curve[i]
    return a + (b - a) * (damage - before) / (after - before)


def sensitivity(
    model,  # a network, or a fastai Learner, which is validated
    metric: Callable | None = None,  # from the model to a number; of a Learner its first metric, or its loss where it has none
    granularity='weight',  # as in `Sparsifier`
    criteria='magnitude',  # as in `Sparsifier`
    layers=None,  # as in `Sparsifier`
    levels: tuple = LEVELS,  # percent
    higher_is_better: bool | None = None,  # of the metric; None: yes, but of a loss
    example=None,  # as in `Sparsifier`
) -> Sensitivity:
    "Make each layer alone sparse, at each level, and measure. The weights are as before in the end, to the bit; Ctrl-C gives what is done."
    learner = None if isinstance(model, nn.Module) else model
    if learner is not None:
        if not hasattr(learner, 'validate') or not isinstance(getattr(learner, 'model', None), nn.Module):
            raise TypeError(f'model: got {type(model).__name__}, allowed is a torch.nn.Module or a fastai Learner')
        model = learner.model
        if metric is None:
            at = int(bool(learner.metrics))
            name = learner.metrics[0].name if at else 'valid_loss'
            if higher_is_better is None: higher_is_better = bool(at)
            def metric(_): return float(learner.validate()[at])
            metric.__name__ = name
    elif metric is None: raise ValueError('metric: got None, allowed with a network is a function from it to a number')
    levels = sorted({float(level) for level in levels})
    if not levels or not 0 < levels[0] <= levels[-1] <= 100: raise ValueError(f'levels: got {levels}, allowed are percents from 1 to 100')
    sparsifier = Sparsifier(model, granularity, 'local', criteria, layers, example)
    names, untouched = list(sparsifier.layers), sparsifier.state_dict()
    before = [(t, t.detach().clone()) for t in (*model.parameters(), *model.buffers())]

    def restore():
        sparsifier.load_state_dict(untouched)
        with torch.no_grad():
            for tensor, value in before: tensor.copy_(value)
    values = {}
    with ExitStack() as quiet:
        for silence in ('no_bar', 'no_logging'):
            if hasattr(learner, silence): quiet.enter_context(getattr(learner, silence)())
        dense = float(metric(model))
        try:
            for name, level in _progress([(n, level) for n in names for level in levels]):
                try:
                    sparsifier.sparsify_layer(name, level)
                    values.setdefault(name, {})[level] = float(metric(model))
                finally: restore()
        except KeyboardInterrupt: pass
    return Sensitivity(values, {n: sparsifier.layers[n].weight.numel() for n in names}, dense, getattr(metric, '__name__', 'metric'),
                       True if higher_is_better is None else higher_is_better)


def _progress(steps):
    "With fastprogress's bar where there is one."
    try: from fastprogress.fastprogress import progress_bar
    except ImportError: return steps
    return progress_bar(steps, leave=False)
