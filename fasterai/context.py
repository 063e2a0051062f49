"Decide who competes with whom (the scope of pruning): turn a sparsity into a keep mask for each layer."
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial

import numpy as np
import torch

from fasterai import allocation
from fasterai.arguments import callable_with, name_of, one_of
from fasterai.pattern import pattern, read_pattern
from fasterai.peers import ALONE, abreast
from fasterai.regrowth import LIVING
from fasterai.selection import LayerGroups, Lowest

Context = Callable[[list[LayerGroups], Fraction], list[torch.Tensor]]
"""A function of layers and the fraction of zeros that returns a keep mask for each layer: bool (groups,),
False = pruned."""


@dataclass(frozen=True)
class ContextInfo:
    "Describe a context, as a row of `CONTEXTS`: its function, and what others must know of it."
    prune: Context
    within_layers: bool = False  # it compares groups within a layer, so a layer must have several
    by_shape: bool = False  # it goes by the shape of single layers, so several layers cannot be pruned as one
    single_weights: bool = False  # it prunes single weights only
    axis: str | None = None  # the axis that each weight must have
    has_floor: bool = True  # `min_keep` may be given
    sparsity: Fraction | None = None  # the one sparsity that it can reach; None: any
    counted: bool = False  # it says in `layer.outcome` how many weights stay
    rescales: bool = False  # it computes other scores from those of the criterion, or may do so
    places: Callable | None = None  # (axes) -> array (weights,) of ints: weights compete with those of the same number only; None: all of a layer do
    of_parts: bool = False  # each process may have a part of the layers only
    by_work: bool = False  # a weight counts as many as its multiply-adds, which an example shows
    check: Callable | None = None  # (shapes, axes, fraction): raises `ValueError` where the fraction cannot be reached

    def __call__(self, layers, fraction): return self.prune(layers, fraction)


# Contexts

def global_(
    layers: list,  # of `selection.LayerGroups`
    fraction: Fraction,  # of zeros, of all layers together
) -> list:  # keep masks (groups,), one a layer
    "Prune the lowest groups of all layers together."
    return _each([layers], fraction)[0]


def local(layers, fraction):
    "Prune each layer to the sparsity (layer-wise, or uniform)."
    return [keep for keep, in _each([[layer] for layer in layers], fraction)]


def _each(sets, fraction):
    "Prune the lowest groups of each set of layers. What they ask other processes is asked together."
    return _in_step(sets, [_zeros_of(layers, fraction) for layers in sets], fraction == 1)


def _zeros_of(layers, fraction):
    zeros = fraction * sum(layer.n_weights for layer in layers)
    return round(zeros) if _single_weights(layers) else zeros  # groups are rounded to the nearest one, from the exact number


def _in_step(sets, zeros, everything):
    peers = next((layer.peers for layers in sets for layer in layers), ALONE)
    return peers.in_step([prune_together(layers, n, everything) for layers, n in zip(sets, zeros)])


def _single_weights(layers): return all(layer.group_size == 1 for layer in layers)


def allotted(
    allocate: Callable,  # (layers, fraction) -> number of zeros of each layer, which may be fractions
) -> Context:
    "Return the context in which each layer has as many zeros as `allocate` gives it."
    def prune(layers, fraction):
        total = _zeros_of(layers, fraction)
        held, there = [layer.zeros for layer in layers], _zeros_there(layers)
        zeros = allocation.shared_out(allocate(layers, fraction), total, held, there)
        if _single_weights(layers): zeros = allocation.rounded(zeros, total)
        return [keep for keep, in _in_step([[layer] for layer in layers], zeros, fraction == 1)]
    return prune


def _zeros_there(layers):
    "Return the number of all zeros of each layer, those among them that no mask holds."
    if not layers: return []

    def free():
        told = yield [layer.count_free() if layer.speaks and layer.count_free else 0 for layer in layers]
        return [sum(of_layer) for of_layer in zip(*told)]
    found, = layers[0].peers.in_step([free()])
    return [layer.zeros + n for layer, n in zip(layers, found)]


def work(layers, fraction):
    """Prune all layers together so that the fraction of their multiply-adds is saved.

    What `layers` says of numbers of weights are numbers of multiply-adds here, and a score is divided by
    those of a weight, so that what goes first costs the least for each that it saves."""
    return global_(layers, fraction)


def lamp(layers, fraction):
    """Prune all layers together by LAMP (Lee et al. 2021).

    The score is the square of a group's score over the sum of those squares in the layer that are not
    lower."""
    latest = {}  # scores of one layer at a time, by its name

    def scores(layer, where):
        if layer.name not in latest:
            latest.clear()
            latest[layer.name], = layer.peers.sent([_lamp(layer)], [layer.alive.device])
        return latest[layer.name][where]
    return global_([replace(layer, scores=partial(scores, layer)) for layer in layers], fraction)


def _lamp(layer):
    scores, (alive,) = layer.all_scores(), layer.peers.fetched([layer.alive])
    most = scores[alive].max(initial=0)  # the squares of scores that are too large or small are out of reach
    squares = (np.where(alive & (scores > 0), scores, 0) / np.float64(most or 1)) ** 2
    order = scores.argsort(kind='stable')
    not_lower = squares[order][::-1].cumsum()[::-1]
    found = np.empty(len(scores))
    found[order] = np.divide(squares[order], not_lower, out=np.zeros(len(order)), where=not_lower > 0)
    return np.where(scores < 0, scores, found)


def normalized(layers, fraction):
    "Prune all layers together, by scores divided by their L2 norm in the layer."
    return global_([_normalized(layer) for layer in layers], fraction)


def _normalized(layer):
    most = max((float(s.max(initial=0)) for s in layer.living_scores()), default=0) or 1.
    squares = sum(float(np.square(s[s > 0] / np.float64(most)).sum()) for s in layer.living_scores())
    norm = most * (squares ** .5 or 1)
    return replace(layer, scores=lambda where: divided(layer.scores(where), norm))


def divided(
    scores: torch.Tensor | np.ndarray,
    norm: float,
) -> torch.Tensor | np.ndarray:  # in float64, so that scores keep their order
    "Divide scores by a number. Those of groups that are gone stay as they are."
    if isinstance(scores, np.ndarray):
        scores = scores.astype(np.float64, copy=False)
        return np.where(scores < LIVING, scores, scores / norm)
    scores = scores.double()
    return torch.where(scores < LIVING, scores, scores / norm)


@dataclass(frozen=True)
class within:
    """Prune each layer to the sparsity along one axis: the weights at each place of it compete among
    themselves.

    `within('O')` compares the weights of one output, as Wanda does (Sun et al. 2023), `within('I')` those
    of one input."""
    axis: str  # 'O', 'I', or another axis of the selected weights

    def __post_init__(self):
        if isinstance(self.axis, str): return
        raise TypeError(f"context: got within({self.axis!r}), expected an axis, as 'O'")

    def __call__(self, layers, fraction): return [self._prune(layer, fraction) for layer in layers]

    def _prune(self, layer, fraction):
        scores, (alive,) = layer.all_scores(), layer.peers.fetched([layer.alive])
        sizes, at = tuple(layer.axes.values()), list(layer.axes).index(self.axis)
        lines, living = (np.moveaxis(v.reshape(sizes), at, 0) for v in (scores, alive))
        by = lines.reshape(len(lines), -1), living.reshape(len(lines), -1)
        order = np.lexsort(by, axis=1)  # what is pruned already goes first, then by score; ties by position
        keep = np.ones(order.shape, bool)
        np.put_along_axis(keep, order[:, :round(fraction * order.shape[1])], False, 1)
        keep = np.ascontiguousarray(np.moveaxis(keep.reshape(lines.shape), 0, at)).reshape(-1)
        keep, = layer.peers.sent([keep], [layer.alive.device])
        return keep & layer.alive

    def places(self, axes):
        "Number the weights by their place along the axis."
        shape = [size if axis == self.axis else 1 for axis, size in axes.items()]
        return np.broadcast_to(np.arange(axes[self.axis]).reshape(shape), tuple(axes.values())).reshape(-1)

    def __repr__(self): return f'within({self.axis!r})'


# To add a context, write a function of layers and fraction, and a row.
CONTEXTS = {
    'local': ContextInfo(local, counted=True, of_parts=True),
    'global': ContextInfo(global_, counted=True, of_parts=True),
    'erk': ContextInfo(allotted(allocation.erk), by_shape=True, counted=True, of_parts=True),
    'er': ContextInfo(allotted(allocation.er), by_shape=True, counted=True, of_parts=True),
    'uniform_plus': ContextInfo(allotted(allocation.uniform_plus), by_shape=True, counted=True, of_parts=True,
                                check=allocation.check_uniform_plus),
    'work': ContextInfo(work, by_work=True, counted=True),
    'lamp': ContextInfo(lamp, within_layers=True, counted=True, rescales=True),
    'normalized': ContextInfo(normalized, within_layers=True, counted=True, rescales=True),
}


def read_context(
    context: str | Context,  # a name in `CONTEXTS`, an N:M pattern as '2:4', or a function of layers and fraction
) -> ContextInfo:
    """Return the context of this name, or a row for a function; `ValueError` or `TypeError` where it is
    neither."""
    found = read_pattern(context) if isinstance(context, str) else context
    if isinstance(found, pattern):
        return ContextInfo(found, single_weights=True, axis='I', has_floor=False,
                           sparsity=found.sparsity, places=found.places)
    if isinstance(found, within):
        return ContextInfo(found, single_weights=True, axis=found.axis, has_floor=False,
                           places=found.places)
    found = one_of('context', context, CONTEXTS, "a pattern as '2:4', or a function")
    if isinstance(found, ContextInfo): return found
    for row in CONTEXTS.values():
        if found is getattr(row, 'prune', None): return row
    callable_with('context', found, 2, 'a function of layers and fraction')
    return ContextInfo(partial(_checked, found), rescales=True)


def _checked(context, layers, fraction):
    "Call a user's context on copies of the masks, and check what it returns."
    keeps = context([replace(layer, alive=layer.alive.clone()) for layer in layers], fraction)
    shapes = [tuple(layer.alive.shape) for layer in layers]
    if isinstance(keeps, Iterable): keeps = list(keeps)
    came = keeps
    if isinstance(keeps, list): came = [tuple(getattr(keep, 'shape', ())) for keep in keeps]
    if came != shapes or not all(map(_is_dense_mask, keeps)):
        raise ValueError(f'context: {name_of(context)} returned {came}, '
                         f'expected a bool keep mask for each layer: {shapes}')
    keeps = [keep & layer.alive for keep, layer in zip(keeps, layers)]
    if all(torch.equal(keep, layer.alive) for keep, layer in zip(keeps, layers)):
        wanted = fraction * sum(layer.n_weights for layer in layers)
        _let_go(layers, sum(layer.zeros for layer in layers) - wanted)
    return keeps


def _is_dense_mask(keep):
    if not isinstance(keep, torch.Tensor) or keep.dtype != torch.bool: return False
    return keep.layout == torch.strided and not keep.is_meta


# The common part

def prune_together(
    layers: list,  # of `selection.LayerGroups`
    zeros: int | Fraction,  # number of weights of all layers that shall be zero in the end
    everything: bool = False,  # all of them are asked for, so that a layer may be emptied
):  # a coroutine, for `peers.in_step`, which returns keep masks (groups,), one a layer
    """Prune the lowest groups of layers that compete.

    A layer that would fall below its floor keeps its best groups, and the other layers are pruned more."""
    order, at_floor, warned = Lowest(layers), {}, []
    _let_go(layers, sum(layer.zeros for layer in layers) - zeros)
    floors = {layer: _floor(layer, everything, len(layers) > 1) for layer in layers}
    while True:
        there = sum(layer.zeros for layer in layers) + sum(cost for _, cost in at_floor.values())
        cut = (yield from order.cut(zeros - there)) if zeros > there and order.layers else None
        costs = [0] * len(order.layers) if cut is None else order.costs(cut)
        below = [layer for layer, cost in zip(order.layers, costs)
                 if cost and layer.remaining - cost < floors[layer]]
        if not below and not at_floor and not everything:
            below = yield from _best_of_all(order.layers, costs)
            floors |= dict.fromkeys(below, 1)
        if not below: break
        kept = yield from abreast([_keep_floor(layer, floors[layer]) for layer in below])
        at_floor |= dict(zip(below, kept))
        warned += [layer.name for layer in below if layer.floor is None]
        order.leave(below)
    if warned: _warn_best_kept(warned)
    keeps = [layer.alive for layer in order.layers] if cut is None else order.keeps(cut)
    decided = dict(zip(order.layers, zip(keeps, costs))) | at_floor
    for layer in layers:
        layer.outcome.left = layer.remaining - decided[layer][1]
        if layer.floor: _let_go([layer], max(layer.outcome.freed, layer.floor - layer.outcome.left))
    return [decided[layer][0] for layer in layers]


def _let_go(layers, surplus):
    "Let the last of the scattered zeros go that are more than was asked for."
    for layer in reversed(layers):
        layer.outcome.freed = min(layer.scattered, max(round(surplus), 0))
        surplus -= layer.outcome.freed


def _floor(layer, everything, several):
    "Return the number of weights that stay in a layer at least."
    if layer.floor is not None: return layer.floor
    may_be_emptied = everything or layer.one_layer and several
    return 0 if may_be_emptied else 1


def _best_of_all(layers, costs):
    "Return the layer that stays, in a list, where all layers would be emptied."
    if any(layer.floor is not None for layer in layers): return []
    if any(layer.remaining > cost for layer, cost in zip(layers, costs)): return []
    living = [layer for layer in layers if layer.remaining]
    told = yield [layer.best()[0] for layer in living]
    best = [max(of_layer) for of_layer in zip(*told)]
    order = sorted(range(len(living)), key=best.__getitem__)
    return [living[i] for i in order[-1:]]


def _keep_floor(layer, floor):
    """Keep only the best groups that have so many weights: return the keep mask, and how many weights are
    pruned."""
    if layer.remaining <= floor: return layer.alive, 0
    one_group = 1 if layer.costs is not None else layer.group_size
    if floor <= one_group: return (yield from _keep_best(layer))
    order = Lowest([layer])
    cut = yield from order.cut(layer.remaining - floor)
    (keep, cost), = order.remove(cut)
    if layer.remaining - cost < floor:  # the nearest group was one too many
        (keep, cost), = order.remove(cut._replace(ties=cut.ties - 1))
    return keep, cost


def _keep_best(layer):
    score, best = layer.best()
    mine = score, layer.whole_position(best)
    told = yield mine
    keep = torch.zeros_like(layer.alive)
    if mine == max(told): keep[best] = True
    kept = layer.group_size if layer.costs is None else int(layer.costs[best])
    return keep, layer.remaining - kept


def _warn_best_kept(names):
    names = ', '.join(map(repr, names))
    warnings.warn(f'sparsity: {names} would have been left without weights and kept the best group; '
                  'ask for less, or leave it out by layers=', stacklevel=3)
