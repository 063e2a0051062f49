"Who competes with whom: how a sparsity becomes a keep mask for each layer."
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial

import numpy as np
import torch

from fasterai import allocation
from fasterai.arguments import name_of, one_of
from fasterai.pattern import pattern, read_pattern
from fasterai.selection import Lowest

Context = Callable[[list, Fraction], list]
"A function of layers, one a layer, and the share of zeros, to a keep mask for each layer: bool (groups,)."


@dataclass(frozen=True)
class ContextInfo:
    "A context, and what others must know of it."
    prune: Context
    within_layers: bool = False  # does it compare groups within a layer, so that there must be several?
    by_shape: bool = False  # does it go by the shape of single layers, so that several cannot be pruned as one?
    single_weights: bool = False  # is a group always one weight, with an input axis?
    sparsity: Fraction | None = None  # the only one that it reaches, if there is only one
    counted: bool = False  # does it say in `layer.remaining_after` how many weights stay?
    check: Callable | None = None  # (shapes, axes, fraction): `ValueError` where the fraction cannot be reached

    def __call__(self, layers, fraction): return self.prune(layers, fraction)


def global_(
    layers: list,  # of `selection.LayerGroups`, one a layer
    fraction: Fraction,  # of the weights of all layers together
) -> list:  # keep masks (groups,), one a layer
    "Remove the lowest groups of all layers together."
    return prune_together(layers, round(fraction * sum(p.n_weights for p in layers)), fraction == 1)


def local(layers, fraction):
    "Each layer for itself reaches the sparsity."
    return [global_([layer], fraction)[0] for layer in layers]


def allotted(
    allocate: Callable,  # layers, fraction -> zeros of each layer, which may be fractions
) -> Context:
    "Each layer for itself, with as many zeros as an allocation gives it; together they make up what was asked."
    def prune(layers, fraction):
        total = round(fraction * sum(p.n_weights for p in layers))
        zeros = allocation.rounded(allocate(layers, fraction), total)
        return [prune_together([layer], n, fraction == 1)[0] for layer, n in zip(layers, zeros)]
    return prune


def lamp(layers, fraction):
    "All together, by the square of a score over the sum of the squares not below it in the layer (Lee et al. 2021)."
    at_hand = {}

    def scores(layer, where):
        if layer.name not in at_hand:
            at_hand.clear()  # one layer at a time
            at_hand[layer.name] = torch.from_numpy(_lamp(layer)).to(layer.alive.device)
        return at_hand[layer.name][where]
    return global_([replace(p, scores=partial(scores, p)) for p in layers], fraction)


def _lamp(layer):
    scores = layer.all_scores()
    squares = np.where(layer.alive.cpu().numpy() & (scores > 0), scores, 0).astype(float) ** 2
    order = scores.argsort(kind='stable')
    above = squares[order][::-1].cumsum()[::-1]
    found = np.empty_like(scores)
    found[order] = np.divide(squares[order], above, out=np.zeros(len(order)), where=above > 0)
    return np.where(scores < 0, scores, found)


def normalized(layers, fraction):
    "All together, each layer's scores over their L2 norm."
    def over(layer):
        squares = sum(float(np.square(s[s > 0], dtype=float).sum()) for s in layer.living_scores())
        norm = np.float32(squares ** .5 or 1)
        return replace(layer, scores=lambda where: layer.scores(where) / norm)
    return global_([over(p) for p in layers], fraction)


CONTEXTS = {
    'local': ContextInfo(local, counted=True),
    'global': ContextInfo(global_, counted=True),
    'erk': ContextInfo(allotted(allocation.erk), by_shape=True, counted=True),
    'uniform_plus': ContextInfo(allotted(allocation.uniform_plus), by_shape=True, counted=True,
                                check=allocation.check_uniform_plus),
    'lamp': ContextInfo(lamp, within_layers=True),
    'normalized': ContextInfo(normalized, within_layers=True),
}


def read_context(
    context: str | Callable,  # a name in `CONTEXTS`, a pattern as '2:4', or a function of layers and fraction
) -> ContextInfo:
    "The context that is meant."
    found = read_pattern(context) if isinstance(context, str) else context
    if isinstance(found, pattern): return ContextInfo(found, single_weights=True, sparsity=found.sparsity)
    found = one_of('context', context, CONTEXTS, "a pattern as '2:4', or a function")
    for row in CONTEXTS.values():
        if found in (row, row.prune): return row
    try: inspect.signature(found).bind([], 0)
    except ValueError: pass  # one whose arguments cannot be read
    except TypeError: raise TypeError(f'context: got {name_of(found)}, allowed is a function of layers and fraction') from None
    return ContextInfo(partial(_checked, found))


def _checked(context, layers, fraction):
    "Ask a context of the user's: it gets masks of its own, and what it gives is looked at."
    keeps = context([replace(p, alive=p.alive.clone()) for p in layers], fraction)
    shapes = [p.alive.shape for p in layers]
    if [getattr(k, 'shape', None) for k in keeps] != shapes or any(k.dtype != torch.bool for k in keeps):
        raise ValueError(f'context: {name_of(context)} gave {[tuple(getattr(k, "shape", ())) for k in keeps]}, '
                         f'allowed is a bool keep mask for each layer: {[tuple(s) for s in shapes]}')
    return [keep & layer.alive for keep, layer in zip(keeps, layers)]


def prune_together(
    layers: list,  # of `selection.LayerGroups`
    zeros: int,  # weights of all of them that shall be zero in the end
    everything: bool = False,  # was it asked that all go?
) -> list:  # keep masks (groups,)
    "Remove the lowest groups. A layer that would fall below its floor keeps the best that make it up, and the others give for it."
    order, at_floor, warned = Lowest(layers), {}, []
    floors = {p: _least(p, everything, len(layers) > 1) for p in layers}
    while True:
        gone = sum(p.zeros for p in layers) + sum(cost for _, cost in at_floor.values())
        removed = _removed(order, zeros - gone)
        below = [p for p, (_, cost) in zip(order.layers, removed) if cost and p.remaining - cost < floors[p]]
        if not below and not at_floor and not everything:
            below = _best_of_all(order.layers, removed)
            floors |= {p: 1 for p in below}
        if not below: break
        at_floor |= {p: _keep_floor(p, floors[p]) for p in below}
        warned += [p.name for p in below if p.floor is None]
        order.leave(below)
    if warned:
        warnings.warn(f'sparsity: {", ".join(map(repr, warned))} would have been left without weights and kept the best group; '
                      'ask for less, or leave it out by layers=', stacklevel=2)
    decided = dict(zip(order.layers, removed)) | at_floor
    for p in layers: p.remaining_after = p.remaining - decided[p][1]
    return [decided[p][0] for p in layers]


def _least(layer, everything, several):
    "The weights that stay in a layer at floors."
    if layer.floor is not None: return layer.floor
    goes_whole = layer.one_layer and several
    return 0 if everything or goes_whole else 1


def _removed(order, budget):
    "Keep mask and cost for each layer that still competes."
    if budget > 0 and order.layers: return order.remove(order.cut(budget))
    return [(p.alive, 0) for p in order.layers]


def _best_of_all(layers, removed):
    "The layer that stays where layers go whole and none would be left."
    if any(p.remaining > cost or p.floor is not None for p, (_, cost) in zip(layers, removed)): return []

    def best(layer): return max(float(s.max()) for s in layer.living_scores() if len(s))
    return sorted((p for p in layers if p.remaining), key=best)[-1:]


def _keep_floor(layer, floors):
    "Keep only the best groups that make up so many weights: the keep mask, and how many weights go."
    if layer.remaining <= floors: return layer.alive, 0
    one_will_do = floors <= (1 if layer.costs is not None else layer.group_size)
    if one_will_do:
        best = layer.best()
        keep = torch.zeros_like(layer.alive)
        keep[best] = True
        return keep, layer.remaining - (layer.group_size if layer.costs is None else int(layer.costs[best]))
    order = Lowest([layer])
    cut = order.cut(layer.remaining - floors)
    (keep, cost), = order.remove(cut)
    if layer.remaining - cost < floors:  # the nearest was one too many
        (keep, cost), = order.remove(cut._replace(ties=cut.ties - 1))
    return keep, cost
