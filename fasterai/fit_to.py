"Find the least harmful sparsity of each layer within a budget: milliseconds, bytes, or loss."
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from fasterai.arguments import finite_number
from fasterai.costs import Clock, file_size, layer_bytes, layer_milliseconds
from fasterai.damage import Trials
from fasterai.deploy.compare import check_copyable
from fasterai.progress import progress
from fasterai.tables import Shown
from fasterai.tradeoff import LEVELS, Table

TRIES = 6  # networks that are built and measured
LOSS_TRIES = 8
NEAR = .02  # of what was asked: no nearer is tried
REFUSED = 1.05  # of the milliseconds asked for: what is slower than that is refused
FIRST_DIVERGENCE = .1  # sum over the layers, that the search for a loss begins with


@dataclass(frozen=True, repr=False)
class Fitted(Shown):
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

    def to_frame(self):
        "Return a pandas DataFrame with one row for each layer."
        import pandas as pd
        return pd.DataFrame(self.rows, columns=['layer', 'weights', 'sparsity', 'dense', 'now', 'damage'])

    def plot(self,
        ax=None,  # matplotlib axes to draw on; new ones if None
    ):
        """Draw the predicted damage against what the network costs, and return the axes.

        A curve each: the least harmful choice, the same sparsity in all layers, one global threshold."""
        from fasterai.plot import COLOURS, MARKERS, label_ends, new_axes
        if ax is None: ax = new_axes()
        for (name, points), colour, marker in zip(self.curves.items(), COLOURS, MARKERS):
            ax.plot(*zip(*points), color=colour, marker=marker, ms=4, label=name)
        ax.plot(*self.chosen, '*', color='black', ms=13, label='_chosen')
        ax.annotate('chosen', self.chosen, (8, 4), textcoords='offset points')
        unit = 'latency (ms)' if self.unit == 'ms' else 'file (bytes)'
        ax.set(xlabel=f'{unit}, predicted', ylabel='damage, predicted', yscale='log')
        ax.grid(alpha=.3)
        label_ends(ax)
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
    trials = Trials(model, data, repair, criteria, layers, loss_func, unit == 'loss')
    masks, damage = trials.damages()
    clock = Clock(trials.dense, example, seconds) if unit == 'ms' else None
    if clock: cost, dense = layer_milliseconds(trials, example, masks, seconds), clock.ms
    else: cost, dense = layer_bytes(trials, masks), file_size(trials.dense)
    table = Table(damage, cost, dense)
    if clock: found = _to_ms(trials, clock, table, asked)
    elif unit == 'bytes': found = _to_bytes(trials, table, asked)
    else: found = _to_loss(trials, table, asked)
    if unit == 'loss': dense = trials.loss_of(trials.dense)
    rows = tuple((name, trials.sizes[name], *row) for name, row in table.rows(found.sparsities))
    curves = table.curves(trials.global_sparsities())
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


def _to_ms(trials, clock, table, asked):
    "Find the choice whose latency is nearest to what is asked."
    def measure(sparsities):
        model = trials.pruned(sparsities, repaired=False)  # a repair changes no zero, and so no latency
        return _Try(clock(model), sparsities, model)

    tried = _tries(table, asked, measure, lambda reached: abs(reached - asked) <= NEAR * asked)
    fitting = [one for one in tried if one.reached <= REFUSED * asked]
    if not fitting: raise _out_of_reach('ms', asked, tried)
    best = min(fitting, key=lambda one: abs(one.reached - asked))
    return best._replace(model=trials.pruned(best.sparsities)) if trials.repair else best


def _to_bytes(trials, table, asked):
    "Find the choice with the largest file that is not larger than asked."
    def measure(sparsities):
        model = trials.pruned(sparsities)
        return _Try(file_size(model), sparsities, model)

    lowest = (1 - NEAR) * asked
    tried = _tries(table, (lowest + asked) / 2, measure, lambda reached: lowest <= reached <= asked)
    fitting = [one for one in tried if one.reached <= asked]
    if not fitting: raise _out_of_reach('bytes', asked, tried)
    return max(fitting, key=lambda one: one.reached)


def _to_loss(trials, table, asked):
    "Find the smallest file whose loss rises by no more than asked."
    dense = trials.loss_of(trials.dense)
    fits = _Try(0., dict.fromkeys(table.cost, 0.), deepcopy(trials.dense))
    low, high, damage = None, None, FIRST_DIVERGENCE
    for _ in progress(range(LOSS_TRIES)):
        sparsities = table.smallest(damage)
        model = trials.pruned(sparsities)
        rise = trials.loss_of(model) - dense
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
