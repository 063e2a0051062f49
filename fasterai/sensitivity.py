"Measure how much each layer alone can be pruned, and what that costs: sensitivity analysis."
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fasterai.arguments import callable_with, finite_number, flag, name_of, nearest, percent
from fasterai.batches import TrainingBatches, loss_of
from fasterai.criteria import read_criterion
from fasterai.plot import height_of, label_ends, layer_colours, new_axes
from fasterai.progress import progress
from fasterai.repair import recalibrate
from fasterai.repairing import repairs_of
from fasterai.shards import refuse_shards
from fasterai.snapshot import Snapshot
from fasterai.sparsifier import Sparsifier
from fasterai.summary import names_of_repairs
from fasterai.tables import Shown

LEVELS = (10, 25, 50, 75, 90, 95)  # percent of a layer's weights
SMALLEST = 1  # percent, the least sparsity above zero that can be asked for
HALVINGS = 60  # of the interval in which the common damage lies: more change nothing in float64


@dataclass(frozen=True, repr=False)
class Sensitivity(Shown):
    """Hold what a sensitivity analysis has measured; it prints as a table, and shows as HTML in a notebook.

    Damage is how much worse the metric is than that of the dense network, in the metric's unit."""
    values: dict  # {layer's name: {level in percent: the metric}}
    weights: dict  # {layer's name: how many weights it has}
    dense: float  # the metric of the network before any layer is pruned
    metric: str  # the metric's name
    higher_is_better: bool  # False for a loss
    repaired: tuple = ()  # names of the repairs that came between pruning and the metric

    @property
    def levels(self) -> list:  # of float
        "Return all levels that were measured, in percent, from low to high."
        return sorted({level for row in self.values.values() for level in row})

    def damage(self,
        layer: str,  # its name
    ) -> dict:  # {level in percent: damage, at least that of the level before}
        "Return how much worse the metric becomes with a layer's sparsity."
        if layer not in self.values:
            known = ', '.join(self.values)
            raise ValueError(f'layer: got {layer!r}, expected one of {known}{nearest(layer, self.values)}')
        worst, found = 0., {}
        for level, value in sorted(self.values[layer].items()):
            damage = self.dense - value if self.higher_is_better else value - self.dense
            worst = max(worst, damage)
            found[level] = worst
        return found

    def suggest(self,
        sparsity: float,  # percent of all the weights together
    ) -> dict:  # {layer's name: percent}, as `SparsifyCallback` takes it
        """Suggest a sparsity for each layer, so that all layers are pruned up to the same damage.

        Layers that can be pruned at little damage get a high sparsity. The damage between two levels is
        interpolated. `ValueError` if nothing was measured, or `sparsity` is above what was measured."""
        percent(sparsity)
        curves = {name: [(0., 0.), *self.damage(name).items()] for name in self.values if self.values[name]}
        if not curves: raise ValueError('sparsity: nothing was measured, so nothing can be suggested')
        total = sum(self.weights[name] for name in curves)
        highest = {name: curve[-1][0] for name, curve in curves.items()}  # levels
        most = self._pruned(highest) / total
        if not 0 <= sparsity <= most:
            raise ValueError(f'sparsity: got {sparsity!r}, expected 0 to {most:g}, '
                             'the highest level that was measured')
        levels = self._at_equal_damage(curves, sparsity * total)
        return self._without_small_ones(levels, highest)

    def _pruned(self, levels):
        "Return how many weights are pruned at {layer's name: percent}, times 100."
        return sum(self.weights[name] * level for name, level in levels.items())

    def _at_equal_damage(self, curves, wanted):
        "Return {layer's name: percent} at the one damage that prunes the wanted weights, times 100."
        worst = max(damage for curve in curves.values() for _, damage in curve)
        slope = 1e-3 * worst + 1e-9  # added, so that a level that costs nothing costs more than a lower one
        rising = {name: [(level, damage + slope * level / 100) for level, damage in curve]
                  for name, curve in curves.items()}
        low, high = 0., worst + slope
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            too_few = self._pruned(_levels(rising, middle)) < wanted
            if too_few: low = middle
            else: high = middle
        return _levels(rising, high)

    def _without_small_ones(self, levels, highest):
        """Set levels below `SMALLEST` to 0 and round the others to 0.01 %.

        The other layers are pruned more instead, each by the same share of what it could still lose."""
        small = {name: level for name, level in levels.items() if level < SMALLEST}
        room = {name: highest[name] - level for name, level in levels.items() if name not in small}
        lost, space = self._pruned(small), self._pruned(room)
        found = {}
        for name, level in levels.items():
            if name in small:
                found[name] = 0.
                continue
            more = lost / space * room[name] if space else 0
            found[name] = round(level + more, 2)
        return found

    def to_frame(self):
        "Return a pandas DataFrame of the metric, a row for each layer, a column for each level in percent."
        import pandas as pd
        frame = pd.DataFrame.from_dict(self.values, orient='index', columns=self.levels)
        return frame.rename_axis(index='layer', columns='sparsity (%)')

    def _cells(self):
        "Yield the rows of the table as strings, the head first."
        yield 'layer', 'weights', *(f'{level:g} %' for level in self.levels)
        for name, row in self.values.items():
            measured = [f'{row[level]:.4g}' if level in row else '' for level in self.levels]
            yield name or '(the model)', f'{self.weights[name]:,}', *measured

    @property
    def title(self) -> str:
        "Say in one line what was measured."
        words = [*self._words(), 'with one layer alone at']
        return f'{self.metric}, dense: {self.dense:.4g}; {", ".join(words)}'

    def _axis(self): return ', '.join(['sparsity of one layer alone (%)', *self._words()])

    def _words(self): return [f'repaired with {" and ".join(self.repaired)}'] if self.repaired else []

    def plot(self,
        ax=None,  # matplotlib axes to draw on; new ones if None
    ):
        "Draw the metric against the sparsity of one layer alone, a curve for each layer; return the axes."
        if ax is None: ax = new_axes(height_of(1 + len(self.values)))
        ax.axhline(self.dense, color='#606060', ls='--', lw=1, label='dense')
        for (name, row), colour in zip(self.values.items(), layer_colours(len(self.values))):
            levels = sorted(row)
            metrics = [self.dense, *(row[level] for level in levels)]
            ax.plot([0, *levels], metrics, marker='.', color=colour, label=name or '(the model)')
        ax.set(xlabel=self._axis(), ylabel=self.metric)
        label_ends(ax)
        return ax

    def heatmap(self,
        ax=None,  # matplotlib axes to draw on; new ones if None
    ):
        "Draw the metric of each layer at each level, dark where the damage is greatest; return the axes."
        if ax is None: ax = new_axes(1 + .35 * len(self.values))
        cells = [[row.get(level, float('nan')) for level in self.levels] for row in self.values.values()]
        image = ax.imshow(cells, aspect='auto', cmap='cividis' if self.higher_is_better else 'cividis_r')
        ax.set_xticks(range(len(self.levels)), [f'{level:g}' for level in self.levels])
        ax.set_yticks(range(len(self.values)), [name or '(the model)' for name in self.values])
        ax.set(xlabel=self._axis())
        ax.figure.colorbar(image, ax=ax, label=self.metric)
        return ax


def _levels(curves, damage):
    "Return {layer's name: the level at which its curve reaches a damage}."
    return {name: _level(curve, damage) for name, curve in curves.items()}


def _level(curve, damage):
    "Return the level at which a rising curve of (level, damage) reaches a damage; its end if it does not."
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
    levels: tuple = LEVELS,  # sparsities to measure, percent of a layer's weights
    higher_is_better: bool | None = None,  # of the metric; None is True, but False for the loss of a Learner
    example=None,  # as in `Sparsifier`
    data=None,  # batches for evidence and `repair`, as in `Sparsifier`; None: up to 512 training items of a Learner
    repair='batchnorm',  # what is repaired before each measurement, as in `Sparsifier`; None: nothing but what the criterion repairs
    loss_func: Callable | None = None,  # as in `Sparsifier`; None: that of a Learner
) -> Sensitivity:
    """Measure how much each layer alone can be pruned: prune it to each level, repair, and evaluate.

    Without a repair a layer in front of a BatchNorm looks more sensitive than it is; a network without
    BatchNorm has nothing to recalibrate. Weights and buffers are restored to the bit. Ctrl-C ends the
    analysis and returns the part that was measured. `TypeError` if `model` is neither a network nor a
    Learner, `ValueError` if a network has no `metric` or no data to refit, or a level is no percentage."""
    learner = None if isinstance(model, nn.Module) else model
    if learner is not None: model = _network_of(learner)
    refuse_shards(model, 'sensitivity')
    better = True
    if metric is None: metric, better = metric_of(learner)
    callable_with('metric', metric, 1, 'a function of the model')
    flag('higher_is_better', higher_is_better, or_none=True)
    if higher_is_better is None: higher_is_better = better
    levels = _read_levels(levels)
    evidence = _evidence_from(criteria, data, loss_func, learner)
    sparsifier = Sparsifier(model, granularity, 'local', criteria, layers, example, **evidence)
    sparsifier.selected.include(sparsifier.selected.candidates)  # a frozen layer can be measured, too
    repairs, batches = _read_repairs(sparsifier.rules, repair, evidence.get('data', data), model, learner)
    with without_output(learner), sparsifier.repairs.instead(repairs, batches, model):
        dense, values = _measure(sparsifier, levels, metric)
    weights = {name: layer.weight.numel() for name, layer in sparsifier.layers.items()}
    name, repaired = getattr(metric, '__name__', 'metric'), tuple(names_of_repairs(repairs))
    return Sensitivity(values, weights, dense, name, higher_is_better, repaired)


def _network_of(learner):
    if not hasattr(learner, 'validate') or not isinstance(getattr(learner, 'model', None), nn.Module):
        kind = type(learner).__name__
        raise TypeError(f'model: got {kind}, expected a torch.nn.Module or a fastai Learner')
    return learner.model


def metric_of(
    learner,  # a fastai Learner; None is refused
) -> tuple:  # function of a model that is not looked at, which has a name; bool
    "Return the first metric of a Learner, or its loss, as a function; and True if higher is better."
    if learner is None:
        raise ValueError('metric: got None, expected with a network a function from it to a number')
    has_metrics = bool(learner.metrics)
    place = int(has_metrics)  # `validate` returns the loss, then the metrics
    def metric(_): return float(learner.validate()[place])
    metric.__name__ = learner.metrics[0].name if has_metrics else 'valid_loss'
    return metric, has_metrics


def _evidence_from(criteria, data, loss_func, learner):
    "Return the data and the loss for a criterion that needs data: those that are given, or the Learner's."
    if loss_func is None and not read_criterion(criteria).needs_data: return {}
    if data is None and learner is not None: data = TrainingBatches(learner)
    if loss_func is None and learner is not None: loss_func = loss_of(learner)
    if isinstance(data, Iterator | TrainingBatches): data = list(data)  # it is read several times
    return {'data': data, 'loss_func': loss_func}


def _read_levels(levels):
    if isinstance(levels, torch.Tensor): levels = levels.tolist()
    expected = 'expected percentages from 1 to 100'
    if isinstance(levels, (str, Mapping)) or not isinstance(levels, Iterable):
        raise TypeError(f'levels: got {levels!r}, {expected}, as (50, 90)')
    given = list(levels)
    for level in given: percent(level, 'levels')
    levels = sorted(map(float, set(given)))
    if not levels or not levels[0]: raise ValueError(f'levels: got {levels}, {expected}')
    return levels


def _read_repairs(rules, repair, data, model, learner):
    "Return the repairs that can change this network, and the batches for them."
    repairs = repairs_of(rules, repair)
    if not _has_statistics(model): repairs = [one for one in repairs if one is not recalibrate]
    if not repairs: return [], None
    if data is None and learner is not None: data = list(TrainingBatches(learner)) or None
    if data is not None: return repairs, data
    if any(one is not recalibrate for one in repairs):
        raise ValueError(f'data: got None, expected batches with repair={repair!r}')
    warnings.warn('data: got None, so BatchNorm is not recalibrated, and layers in front of one look more '
                  'sensitive than they are; expected a few batches, or repair=None', stacklevel=3)
    return [], None


def _has_statistics(model):
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return any(norm.running_mean is not None for norm in norms)


def _measure(sparsifier, levels, metric):
    "Return the metric of the dense network, and {layer's name: {level: metric}} with one layer pruned."
    model, names = sparsifier.model, list(sparsifier.layers)
    masks, snapshot = sparsifier.state_dict(), Snapshot(model)
    given = f' from {name_of(metric)}'
    dense, values = finite_number('metric', metric(model), given), {}
    try:
        for name, level in progress([(name, level) for name in names for level in levels]):
            try:
                sparsifier.sparsify_layer(name, level)
                found = finite_number('metric', metric(model), f'{given} with {name!r} at {level:g} %')
                values.setdefault(name, {})[level] = found
            finally:  # also where the metric fails or Ctrl-C comes
                snapshot.restore()  # first of all, whatever happens next
                try: sparsifier.load_state_dict(masks)
                finally: snapshot.restore()  # the BatchNorm of a filter that comes back was set to 1
    except KeyboardInterrupt: pass  # the part that was measured is returned
    return dense, values


@contextmanager
def without_output(
    learner,  # a fastai Learner, or None
):
    "Show neither the bar nor the table of a Learner; do nothing for None."
    with ExitStack() as stack:
        for name in ('no_bar', 'no_logging'):
            if hasattr(learner, name): stack.enter_context(getattr(learner, name)())
        yield
