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
"A function of parts, one a layer, and the share of zeros, to a keep mask for each part: bool (groups,)."


@dataclass(frozen=True)
class ContextInfo:
    "A context, and what others must know of it."
    prune: Context
    within_layers: bool = False  # does it compare groups within a layer, so that there must be several?
    by_shape: bool = False  # does it go by the shape of single layers, so that several cannot be pruned as one?
    single_weights: bool = False  # is a group always one weight, with an input axis?
    sparsity: Fraction | None = None  # the only one that it reaches, if there is only one
    counted: bool = False  # does it say in `part.kept` how many weights stay?
    check: Callable | None = None  # (shapes, axes, fraction): `ValueError` where the fraction cannot be reached

    def __call__(self, parts, fraction): return self.prune(parts, fraction)


def compete(
    parts: list,  # of `selection.Part`, one a layer
    fraction: Fraction,  # of the weights of all layers together
) -> list:  # keep masks (groups,), one a layer
    "Remove the lowest groups of all layers together."
    return contest(parts, round(fraction * sum(p.weights for p in parts)), fraction == 1)


def local(parts, fraction):
    "Each layer for itself reaches the sparsity."
    return [compete([part], fraction)[0] for part in parts]


def allotted(
    allocate: Callable,  # parts, fraction -> zeros of each layer, which may be fractions
) -> Context:
    "Each layer for itself, with as many zeros as an allocation gives it; together they make up what was asked."
    def prune(parts, fraction):
        total = round(fraction * sum(p.weights for p in parts))
        zeros = allocation.whole_numbers(allocate(parts, fraction), total)
        return [contest([part], n, fraction == 1)[0] for part, n in zip(parts, zeros)]
    return prune


def lamp(parts, fraction):
    "All together, by the square of a score over the sum of the squares not below it in the layer (Lee et al. 2021)."
    at_hand = {}

    def scores(part, where):
        if part.name not in at_hand:
            at_hand.clear()  # one layer at a time
            at_hand[part.name] = torch.from_numpy(_lamp(part)).to(part.alive.device)
        return at_hand[part.name][where]
    return compete([replace(p, scores=partial(scores, p)) for p in parts], fraction)


def _lamp(part):
    scores = part.all_scores()
    squares = np.where(part.alive.cpu().numpy() & (scores > 0), scores, 0).astype(float) ** 2
    order = scores.argsort(kind='stable')
    above = squares[order][::-1].cumsum()[::-1]
    found = np.empty_like(scores)
    found[order] = np.divide(squares[order], above, out=np.zeros(len(order)), where=above > 0)
    return np.where(scores < 0, scores, found)


def normalized(parts, fraction):
    "All together, each layer's scores over their L2 norm."
    def over(part):
        squares = sum(float(np.square(s[s > 0], dtype=float).sum()) for s in part.living_scores())
        norm = np.float32(squares ** .5 or 1)
        return replace(part, scores=lambda where: part.scores(where) / norm)
    return compete([over(p) for p in parts], fraction)


CONTEXTS = {
    'local': ContextInfo(local, counted=True),
    'global': ContextInfo(compete, counted=True),
    'erk': ContextInfo(allotted(allocation.erk), by_shape=True, counted=True),
    'uniform_plus': ContextInfo(allotted(allocation.uniform_plus), by_shape=True, counted=True,
                                check=allocation.check_uniform_plus),
    'lamp': ContextInfo(lamp, within_layers=True),
    'normalized': ContextInfo(normalized, within_layers=True),
}


def read_context(
    context: str | Callable,  # a name in `CONTEXTS`, a pattern as '2:4', or a function of parts and fraction
) -> ContextInfo:
    "The context that is meant."
    found = read_pattern(context) if isinstance(context, str) else context
    if isinstance(found, pattern): return ContextInfo(found, single_weights=True, sparsity=found.sparsity)
    found = one_of('context', context, CONTEXTS, "a pattern as '2:4', or a function")
    for row in CONTEXTS.values():
        if found in (row, row.prune): return row
    try: inspect.signature(found).bind([], 0)
    except ValueError: pass  # one whose arguments cannot be read
    except TypeError: raise TypeError(f'context: got {name_of(found)}, allowed is a function of parts and fraction') from None
    return ContextInfo(partial(_checked, found))


def _checked(context, parts, fraction):
    "Ask a context of the user's: it gets masks of its own, and what it gives is looked at."
    keeps = context([replace(p, alive=p.alive.clone()) for p in parts], fraction)
    shapes = [p.alive.shape for p in parts]
    if [getattr(k, 'shape', None) for k in keeps] != shapes or any(k.dtype != torch.bool for k in keeps):
        raise ValueError(f'context: {name_of(context)} gave {[tuple(getattr(k, "shape", ())) for k in keeps]}, '
                         f'allowed is a bool keep mask for each layer: {[tuple(s) for s in shapes]}')
    return [keep & part.alive for keep, part in zip(keeps, parts)]


def contest(
    parts: list,  # of `selection.Part`
    zeros: int,  # weights of all of them that shall be zero in the end
    everything: bool = False,  # was it asked that all go?
) -> list:  # keep masks (groups,)
    "Remove the lowest groups. A part that would fall below its floor keeps the best that make it up, and the others give for it."
    order, settled, spared = Lowest(parts), {}, []
    least = {p: _least(p, everything, len(parts) > 1) for p in parts}
    while True:
        gone = sum(p.gone for p in parts) + sum(cost for _, cost in settled.values())
        removed = _removed(order, zeros - gone)
        low = [p for p, (_, cost) in zip(order.parts, removed) if cost and p.standing - cost < least[p]]
        if not low and not settled and not everything:
            low = _best_of_all(order.parts, removed)
            least |= {p: 1 for p in low}
        if not low: break
        settled |= {p: _settle(p, least[p]) for p in low}
        spared += [p.name for p in low if p.floor is None]
        order.leave(low)
    if spared:
        warnings.warn(f'sparsity: {", ".join(map(repr, spared))} would have been left without weights and kept the best group; '
                      'ask for less, or leave it out by layers=', stacklevel=2)
    decided = dict(zip(order.parts, removed)) | settled
    for p in parts: p.kept = p.standing - decided[p][1]
    return [decided[p][0] for p in parts]


def _least(part, everything, several):
    "The weights that stay in a layer at least."
    if part.floor is not None: return part.floor
    goes_whole = part.whole and several
    return 0 if everything or goes_whole else 1


def _removed(order, budget):
    "Keep mask and cost for each part that still competes."
    if budget > 0 and order.parts: return order.remove(order.cut(budget))
    return [(p.alive, 0) for p in order.parts]


def _best_of_all(parts, removed):
    "The layer that stays where layers go whole and none would be left."
    if any(p.standing > cost or p.floor is not None for p, (_, cost) in zip(parts, removed)): return []

    def best(part): return max(float(s.max()) for s in part.living_scores() if len(s))
    return sorted((p for p in parts if p.standing), key=best)[-1:]


def _settle(part, least):
    "Keep only the best groups that make up so many weights: the keep mask, and how many weights go."
    if part.standing <= least: return part.alive, 0
    one_will_do = least <= (1 if part.costs is not None else part.size)
    if one_will_do:
        best = part.best()
        keep = torch.zeros_like(part.alive)
        keep[best] = True
        return keep, part.standing - (part.size if part.costs is None else int(part.costs[best]))
    order = Lowest([part])
    cut = order.cut(part.standing - least)
    (keep, cost), = order.remove(cut)
    if part.standing - cost < least:  # the nearest was one too many
        (keep, cost), = order.remove(cut._replace(ties=cut.ties - 1))
    return keep, cost
