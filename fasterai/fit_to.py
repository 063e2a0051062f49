"Find the least harmful sparsity of each layer within a budget: milliseconds, bytes, or loss."
import os
import tempfile
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from html import escape
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from fasterai.arguments import finite_number
from fasterai.data import held_out, read_labelled
from fasterai.deploy.compare import check_copyable, example_inputs
from fasterai.deploy.files import save_sparse
from fasterai.deploy.packing import pack
from fasterai.deploy.speed_up import layer_latencies, speed_up
from fasterai.deploy.timing import side_by_side
from fasterai.knapsack import least_harm
from fasterai.progress import progress
from fasterai.repair import divergence_from, layer_refit, real_outputs, refit
from fasterai.repairing import repairs_of
from fasterai.snapshot import Snapshot, evaluation_mode, undisturbed
from fasterai.sparsifier import Sparsifier
from fasterai.tables import as_html, as_text

LEVELS = (20, 40, 50, 60, 70, 78, 84, 88, 92, 95, 97, 98.5)  # percent of a layer's weights, that are measured
GRID = np.array([0., *(round(100 * (1 - .98 ** i), 2) for i in range(1, 208)), LEVELS[-1]])  # that are chosen from
TRIES = 6  # networks that are built and measured
LOSS_TRIES = 8
NEAR = .02  # of what was asked: no nearer is tried
REFUSED = 1.05  # of the milliseconds asked for: what is slower than that is refused
FIRST_DIVERGENCE = .1  # sum over the layers, that the search for a loss begins with


@dataclass(frozen=True, repr=False)
class Fitted:
    "Hold what `fit_to` has found; it prints as a table, and shows as HTML in a notebook."
    model: nn.Module  # a pruned, repaired copy
    sparsities: dict  # {layer's name: percent}, as `SparsifyCallback` takes it
    unit: str  # 'ms', 'bytes' or 'loss'
    asked: float
    reached: float  # measured on `model`: the milliseconds by `speed_up`, the bytes by `save_sparse`, the rise of the loss
    dense: float  # the same of the dense network; of a loss the loss itself
    rows: tuple  # (layer's name, number of weights, percent, cost of the dense layer, cost now, damage)
    curves: dict  # {way to choose: list of (cost of the network, damage)}, as the tables of the layers predict
    chosen: tuple  # (cost, damage) of the choice, as predicted

    @property
    def sparsity(self) -> float:
        "Return the percentage of the weights of these layers that are zero."
        return sum(row[1] * row[2] for row in self.rows) / sum(row[1] for row in self.rows)

    def _cells(self):
        cost = 'ms' if self.unit == 'ms' else 'bytes'
        digits = '.3f' if self.unit == 'ms' else ',.0f'
        yield 'layer', 'weights', 'sparsity', f'{cost}, dense', cost, 'damage'
        for name, weights, percent, dense, now, damage in self.rows:
            yield (name or '(the model)', f'{weights:,}', f'{percent:.2f} %', f'{dense:{digits}}',
                   f'{now:{digits}}', f'{damage:.2g}')

    @property
    def title(self) -> str:
        "Say in one line what was asked and what was reached."
        asked, reached, dense = (_with_unit(n, self.unit) for n in (self.asked, self.reached, self.dense))
        of = 'the dense loss is' if self.unit == 'loss' else 'dense'
        zeros = f'{self.sparsity:.2f} % of the weights are zero'
        return f'asked {asked}, reached {reached} ({of} {dense}); {zeros}'

    def __repr__(self): return f'{self.title}\n{as_text(self._cells())}'

    def _repr_html_(self): return f'<div>{escape(self.title)}</div>{as_html(self._cells())}'

    def to_frame(self):
        "Return a pandas DataFrame with one row for each layer."
        import pandas as pd
        return pd.DataFrame(self.rows, columns=['layer', 'weights', 'sparsity', 'dense', 'now', 'damage'])

    def plot(self,
        ax=None,  # matplotlib axes to draw on; new ones if None
    ):
        """Draw the predicted damage against what the network costs, and return the axes.

        A curve each: the least harmful choice, the same sparsity in all layers, one global threshold."""
        from fasterai.plot import COLOURS, MARKERS
        if ax is None:
            import matplotlib.pyplot as plt
            _, ax = plt.subplots(figsize=(6, 3.6), layout='constrained')
        for (name, points), colour, marker in zip(self.curves.items(), COLOURS, MARKERS):
            ax.plot(*zip(*points), color=colour, marker=marker, ms=4, label=name)
        ax.plot(*self.chosen, '*', color='black', ms=13, label='chosen')
        unit = 'latency (ms)' if self.unit == 'ms' else 'file (bytes)'
        ax.set(xlabel=f'{unit}, predicted', ylabel='damage, predicted', yscale='log')
        ax.grid(alpha=.3)
        ax.legend(fontsize='small')
        return ax


def _with_unit(number, unit):
    if unit == 'bytes': return f'{number:,.0f} bytes'
    return f'{number:.4g} ms' if unit == 'ms' else f'{number:.4g}'


def fit_to(
    model: nn.Module,  # any network; it is not changed
    example,  # a batch as the model takes it, for which the latency counts: a tuple for several inputs, a dict for keywords
    data=None,  # batches that show the damage, and repair, as in `Sparsifier`; with labels for `loss`
    ms: float | None = None,  # milliseconds that a call with the example may take here, by `speed_up`
    bytes: float | None = None,  # bytes that the file of `save_sparse` may have
    loss: float | None = None,  # by how much the loss may rise, in the unit of `loss_func`
    repair=None,  # what is repaired, as in `Sparsifier`: 'refit', 'batchnorm', or both in a list
    criteria='magnitude',  # as in `Sparsifier`
    layers=None,  # as in `Sparsifier`
    loss_func: Callable | None = None,  # of output and label; for `loss`, and for criteria that need it
    seconds: float = .3,  # time to spend on each layer, about, for `ms`
) -> Fitted:
    """Choose the sparsity of each layer that does the least harm within one budget, and prune a copy to it.

    Each layer alone is pruned to a dozen sparsities, and refitted where `repair` says so. Its damage is the
    squared error of the outputs over the variance of those of the dense network; damages of several layers
    are taken to add up. Dynamic programming finds the least damage within the budget (as SPDY does, Frantar
    & Alistarh 2022). The network is built and measured, and the budget corrected by what was missed, up to
    five times.

    With `ms` the nearest is kept, within 5 % on a machine that does nothing else. With `bytes` the file is
    never larger. With `loss` the smallest file is sought whose loss rises by no more, on every fourth batch
    of the data, by which nothing was chosen. `ValueError` for anything but one budget, and for one that
    cannot be reached, with the best that can."""
    check_copyable(model)
    unit, asked = read_budget(ms=ms, bytes=bytes, loss=loss)
    network = _Network(model, data, repair, criteria, layers, loss_func, unit == 'loss')
    masks, damage = network.damages()
    clock = Clock(network.dense, example, seconds) if unit == 'ms' else None
    if clock: cost, dense = _cost_in_ms(network, example, masks, seconds), clock.ms
    else: cost, dense = _cost_in_bytes(network, masks)
    table = Table(damage, cost, dense)
    if clock: found = _to_ms(network, clock, table, asked)
    elif unit == 'bytes': found = _to_bytes(network, table, asked)
    else: found = _to_loss(network, table, asked)
    if unit == 'loss': dense = network.loss_of(network.dense)
    rows = tuple((name, network.sizes[name], *row) for name, row in table.rows(found.sparsities))
    curves = table.curves(network.global_sparsities())
    return Fitted(found.model, found.sparsities, unit, asked, found.reached, dense, rows, curves,
                  table.of(found.sparsities))


def read_budget(
    **budgets,  # name: number above 0, None for what is not given
) -> tuple:  # (name, number)
    "Return the one budget that is given; `TypeError` or `ValueError` where there is another number of them."
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        came = ', '.join(f'{name}={value!r}' for name, value in given.items()) or 'none of them'
        raise ValueError(f'{", ".join(budgets)}: got {came}, expected exactly one')
    (name, value), = given.items()
    if isinstance(value, bool) or finite_number(name, value) <= 0:
        raise ValueError(f'{name}: got {value!r}, expected a number above 0')
    return name, float(value)


# The network

class _Network:
    "Hold a dense network, the data, and how it is pruned."

    def __init__(self, model, data, repair, criteria, layers, loss_func, hold):
        if data is None:
            raise ValueError('data: got None, expected a few batches, by which the damage of pruning is seen')
        self.dense, self.repair, self.loss_func = deepcopy(model), repair, loss_func
        with undisturbed(self.dense): labelled = read_labelled(data, self.dense)
        self.held = []
        if hold: labelled, self.held = _with_labels_held(labelled, loss_func)
        self.batches = [_as_given(*batch) for batch in labelled]
        self.solve, self.judge = held_out([inputs for inputs, _ in labelled])
        self.given = {'criteria': criteria, 'data': self.batches, 'loss_func': loss_func}
        sparsifier = Sparsifier(model, 'weight', 'local', layers=layers, **self.given)  # nothing is pruned
        self.refits = refit in repairs_of(sparsifier.rules, repair)
        names = {id(p): name for name, p in model.named_parameters()}
        known = {name: layer.weight for name, layer in sparsifier.layers.items() if id(layer.weight) in names}
        self.paths = {name: names[id(weight)] for name, weight in known.items()}  # layer's name: parameter's
        self.sizes = {name: weight.numel() for name, weight in known.items()}

    def _sparsifier(self, model, context='local', repair=None):
        return Sparsifier(model, 'weight', context, layers=list(self.paths), repair=repair, **self.given)

    def pruned(self, sparsities, repaired=True):
        "Return a copy that is pruned to {layer's name: percent}, and repaired."
        model = deepcopy(self.dense)
        sparsifier = self._sparsifier(model, repair=self.repair if repaired else None)
        with _small_layers_hidden(): sparsifier.sparsify_model(sparsities)
        return model

    def damages(self):
        "Return {layer's name: masks at the levels}, and {layer's name: divergences at 0 % and there}."
        trial, pruner = deepcopy(self.dense), deepcopy(self.dense)
        parameters, sparsifier = dict(trial.named_parameters()), self._sparsifier(pruner)
        masks, damage = {}, {}
        with undisturbed(trial), _small_layers_hidden(), sparsifier.repairs.instead([], None, pruner):
            wanted = [(batch, real_outputs(trial, batch)) for batch in self.judge]
            for name in progress(list(self.paths)):
                masks[name] = _masks(sparsifier, pruner, name)
                path = self.paths[name]
                solve = layer_refit(trial, path, self.solve) if self.refits else None
                damage[name] = [0., *_divergences(trial, parameters[path], masks[name], solve, wanted)]
        return masks, damage

    @torch.no_grad()
    def loss_of(self, model):
        "Return the mean loss of the batches that are held out."
        total, n = 0., 0
        with undisturbed(model):
            for inputs, label in self.held:
                size = len(label) if isinstance(label, torch.Tensor) and label.ndim else 1
                found = self.loss_func(inputs.call(model), label)
                total += size * finite_number('loss_func', found)
                n += size
        return total / n

    def global_sparsities(self):
        "Return the sparsities that one global threshold gives to the layers, a dict for each level."
        model = deepcopy(self.dense)
        sparsifier, found = self._sparsifier(model, 'global'), []
        with _small_layers_hidden(), sparsifier.repairs.instead([], None, model):
            for level in LEVELS:
                sparsifier.sparsify_model(level)
                percents = {row.layer: row.sparsity for row in sparsifier.report().rows}
                found.append({name: percents[name] for name in self.paths})
        return found


def _with_labels_held(labelled, loss_func):
    "Split batches into those to choose by, and every fourth, to measure the loss with."
    if loss_func is None:
        raise ValueError('loss_func: got None, expected a function of output and label with loss=')
    if len(labelled) < 2 or any(label is None for _, label in labelled):
        raise ValueError(f'data: got {len(labelled)} batches, expected two or more of (input, label) with '
                         'loss=: every fourth is held out to measure the loss')
    _, held = held_out(list(range(len(labelled))))
    rest = [batch for i, batch in enumerate(labelled) if i not in held]
    return rest, [labelled[i] for i in held]


def _as_given(inputs, label):
    "Return a batch as `data.read_labelled` reads it."
    x = inputs.kwargs or inputs.args
    return (x,) if label is None else (x, label)


@contextmanager
def _small_layers_hidden():
    "Hide the warnings of an event: that a layer of a few weights keeps one of them is no surprise here."
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'sparsity: ')
        yield


def _masks(sparsifier, model, name):
    "Return the masks of one layer at each level, and leave the network as it was."
    before, snapshot, found = sparsifier.state_dict(), Snapshot(model), []
    try:
        for level in LEVELS:
            sparsifier.sparsify_layer(name, level)
            found.append(sparsifier.masks[name])
            snapshot.restore()  # the masks alone count: other evidence than of the dense network is not wanted
    finally:
        sparsifier.load_state_dict(before)
        snapshot.restore()
    return found


@torch.no_grad()
def _divergences(model, weight, masks, solve, wanted):
    "Return how far the outputs are with one layer alone pruned to each mask, at least as far as before."
    dense, found = weight.detach().clone(), []
    for keep in masks:
        weight.copy_(dense.masked_fill(~keep, 0))
        if solve: solve(dense)
        found.append(divergence_from(wanted, model))
    weight.copy_(dense)
    return accumulate(found, max)


# The table

class Table:
    """Hold what each sparsity of each layer costs and which damage it does, alone.

    Between the levels that were measured both are interpolated. More zeros never cost more: where a
    measurement says so, the cost with fewer of them counts."""

    def __init__(self,
        damage: dict,  # layer's name: damage at 0 % and at `LEVELS`
        cost: dict,  # layer's name: cost there, in one unit
        dense: float,  # cost of the whole dense network
    ):
        levels = [0, *LEVELS]
        self.damage = {name: np.interp(GRID, levels, row) for name, row in damage.items()}
        self.cost = {name: np.interp(GRID, levels, np.minimum.accumulate(cost[name])) for name in damage}
        self.rest = dense - sum(row[0] for row in self.cost.values())  # of all that is not pruned

    def choose(self,
        budget: float,  # cost of the whole network
    ) -> dict:  # layer's name: percent
        "Return the least damage within a budget; where none is, the cheapest of all."
        rows = list(self.damage.values()), list(self.cost.values())
        found = least_harm(*rows, budget - self.rest)
        return self.cheapest if found is None else self._named(found)

    @property
    def cheapest(self) -> dict:  # layer's name: percent
        "Return the least damage at the least cost."
        rows = list(self.damage.values()), list(self.cost.values())
        return self._named(least_harm(*rows, sum(float(row.min()) for row in self.cost.values())))

    def smallest(self,
        damage: float,  # sum over the layers
    ) -> dict:  # layer's name: percent
        "Return the least cost at no more than this damage."
        return self._named(least_harm(list(self.cost.values()), list(self.damage.values()), damage))

    def _named(self, places): return {name: float(GRID[place]) for name, place in zip(self.cost, places)}

    def rows(self,
        sparsities: dict,  # layer's name: percent
    ) -> list:  # of (layer's name, (percent, cost of the dense layer, cost, damage))
        "Return what each layer costs and does."
        return [(name, (percent, float(self.cost[name][0]), float(np.interp(percent, GRID, self.cost[name])),
                        float(np.interp(percent, GRID, self.damage[name]))))
                for name, percent in sparsities.items()]

    def of(self,
        sparsities: dict,  # layer's name: percent
    ) -> tuple:  # (cost, damage)
        "Predict what a network costs and does."
        rows = [row for _, row in self.rows(sparsities)]
        return self.rest + sum(row[2] for row in rows), sum(row[3] for row in rows)

    def curves(self,
        global_: list,  # sparsities by one global threshold, a dict for each level
    ) -> dict:  # {way to choose: list of (cost, damage)}
        "Predict cost and damage of three ways to choose."
        uniform = [dict.fromkeys(self.cost, level) for level in LEVELS]
        least = [self.choose(self.of(sparsities)[0]) for sparsities in uniform]  # within what these cost
        ways = {'least harmful': least, 'uniform': uniform, 'global': global_}
        return {name: [self.of(sparsities) for sparsities in several] for name, several in ways.items()}


def _cost_in_ms(network, example, masks, seconds):
    "Return the milliseconds of each layer at 0 % and the levels."
    modules = {name: network.paths[name].rpartition('.')[0] for name in masks}
    of_modules = {path: masks[name] for name, path in modules.items()}
    latencies = layer_latencies(network.dense, example, of_modules, seconds)
    nothing = [0.] * (1 + len(LEVELS))  # no other form: pruning brings no time
    return {name: [1e3 * s for s in latencies.get(path, nothing)] for name, path in modules.items()}


class Clock:
    """Time networks as `speed_up` makes them faster, side by side with the dense one.

    What slows the machine slows both, so the milliseconds of another network are those of the dense one, as
    they were at first, times the median of the quotients."""

    def __init__(self,
        dense: nn.Module,
        example,  # as in `speed_up`
        seconds: float,  # time to spend on each layer, about
    ):
        self.example, self.seconds = example, seconds
        self.inputs = example_inputs(example, dense)
        self.device = next((p.device for p in dense.parameters()), torch.device('cpu'))
        self.dense = self._fast(dense)
        latency, = self._latencies(self.dense)
        self.ms = 1e3 * latency.seconds

    def __call__(self,
        model: nn.Module,
    ) -> float:
        "Return the milliseconds of a call of a network."
        dense, new = self._latencies(self.dense, self._fast(model))
        return self.ms * median(b / a for a, b in zip(dense.rounds, new.rounds))

    def _fast(self, model):
        return speed_up(model, self.example, verbose=False, seconds=self.seconds)

    def _latencies(self, *models):
        calls = [partial(self.inputs.call, model) for model in models]
        with evaluation_mode(*models), torch.no_grad():
            return side_by_side(calls, max(1., self.seconds), device=self.device)


def _cost_in_bytes(network, masks):
    "Return the bytes of each layer at 0 % and the levels, and of the file of the dense network."
    weights = {name: network.dense.get_parameter(path).detach() for name, path in network.paths.items()}
    cost = {name: [_packed(weights[name]), *(_packed(weights[name], keep) for keep in masks[name])]
            for name in masks}
    return cost, _file_size(network.dense)


def _packed(tensor, keep=None):
    "Return the bytes of a tensor in a file, with a mask."
    parts = {}
    pack('', tensor if keep is None else tensor.masked_fill(~keep, 0), parts)
    return sum(part.numel() * part.element_size() for part in parts.values())


def _file_size(model):
    with tempfile.TemporaryDirectory() as folder:
        save_sparse(model, Path(folder) / 'packed')
        return os.path.getsize(Path(folder) / 'packed')


# The search

class _Try(NamedTuple):
    "Hold a choice, and what was measured of it."
    reached: float
    sparsities: dict
    model: nn.Module


def _tries(table, aim, measure, is_near):
    "Build and measure networks, each within a budget that is corrected by what the others have missed."
    dense, _ = table.of(dict.fromkeys(table.cost, 0.))
    budget, tried, known = aim, [], [(dense, dense)]  # known: (predicted, measured)
    for _ in progress(range(TRIES)):
        sparsities = table.choose(budget)
        if any(sparsities == one.sparsities for one in tried): break
        tried.append(measure(sparsities))
        known.append((table.of(sparsities)[0], tried[-1].reached))
        if is_near(tried[-1].reached): break
        budget = _next_budget(aim, known)
    return tried


def _next_budget(aim, known):
    """Return the predicted cost at which the aim lies, on the line through two networks that are known.

    They are the nearest below and above, by what was predicted: what was measured may not rise with it."""
    below = [one for one in known if one[1] <= aim]
    low = max(below) if below else min(known)
    above = [one for one in known if one[0] > low[0] and one[1] > aim]
    high = min(above, default=low)
    rise, run = high[1] - low[1], high[0] - low[0]
    slope = rise / run if rise * run > 0 else 1.
    return low[0] + (aim - low[1]) / slope


def _to_ms(network, clock, table, asked):
    "Find the choice whose latency is nearest to what is asked."
    def measure(sparsities):
        model = network.pruned(sparsities, repaired=False)  # a repair changes no zero, and so no latency
        return _Try(clock(model), sparsities, model)

    tried = _tries(table, asked, measure, lambda reached: abs(reached - asked) <= NEAR * asked)
    fitting = [one for one in tried if one.reached <= REFUSED * asked]
    if not fitting: raise _out_of_reach('ms', asked, tried)
    best = min(fitting, key=lambda one: abs(one.reached - asked))
    return best._replace(model=network.pruned(best.sparsities)) if network.repair else best


def _to_bytes(network, table, asked):
    "Find the choice with the largest file that is not larger than asked."
    def measure(sparsities):
        model = network.pruned(sparsities)
        return _Try(_file_size(model), sparsities, model)

    lowest = (1 - NEAR) * asked
    tried = _tries(table, (lowest + asked) / 2, measure, lambda reached: lowest <= reached <= asked)
    fitting = [one for one in tried if one.reached <= asked]
    if not fitting: raise _out_of_reach('bytes', asked, tried)
    return max(fitting, key=lambda one: one.reached)


def _to_loss(network, table, asked):
    "Find the smallest file whose loss rises by no more than asked."
    dense = network.loss_of(network.dense)
    fits = _Try(0., dict.fromkeys(table.cost, 0.), deepcopy(network.dense))
    low, high, damage = None, None, FIRST_DIVERGENCE
    for _ in progress(range(LOSS_TRIES)):
        sparsities = table.smallest(damage)
        model = network.pruned(sparsities)
        rise = network.loss_of(model) - dense
        if rise <= asked: low, fits = damage, _Try(rise, sparsities, model)
        else: high = damage
        is_done = sparsities == table.cheapest or rise >= (1 - 5 * NEAR) * asked
        if rise <= asked and is_done: break
        damage = _next_damage(damage, low, high, asked / max(rise, asked / 10))
    return fits


def _next_damage(damage, low, high, times):
    "Return the damage to try next: between two that were tried, or as many times the last."
    if low is not None and high is not None: return (low * high) ** .5
    return damage * (max(times, 1.3) if high is None else min(times, .7))


def _out_of_reach(unit, asked, tried):
    best = min(one.reached for one in tried)
    return ValueError(f'{unit}: got {asked:g}, expected at least {best:.4g}, the least that was reached; '
                      f'each layer is pruned to at most {LEVELS[-1]} %')
