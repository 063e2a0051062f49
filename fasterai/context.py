"Who competes with whom: how a sparsity becomes a keep mask for each layer."
import inspect
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from math import floor

import numpy as np
import torch

from fasterai.arguments import name_of, one_of, percent
from fasterai.peers import ALONE
from fasterai.selection import Lowest


def compete(
    parts: list,  # of `selection.Part`, one a layer
    fraction: Fraction,  # of the weights of all layers together
) -> list:  # keep masks (groups,), one a layer
    "Remove the lowest groups of all layers together."
    return contest(parts, round(fraction * sum(p.weights for p in parts)), fraction == 1)


def contest(
    parts: list,  # of `selection.Part`
    zeros: int,  # weights of all of them that shall be zero in the end
    everything: bool = False,  # was it asked that all go?
) -> list:  # keep masks (groups,)
    "Remove the lowest groups. A part that would fall below its floor keeps the best that make it up, and the others give for it."
    order, settled, spared = Lowest(parts), {}, []
    least = {p.name: p.floor if p.floor is not None else 0 if everything or p.whole and len(parts) > 1 else 1 for p in parts}
    while True:
        budget = zeros - sum(p.gone + (settled[p.name][1] if p.name in settled else 0) for p in parts)
        removed = order.remove(order.cut(budget)) if budget > 0 and order.parts else [(p.alive, 0) for p in order.parts]
        low = [p for p, (_, cost) in zip(order.parts, removed) if cost and p.standing - cost < least[p.name]]
        if not low and not settled and not everything:
            low = _best_of_all(order.parts, removed)
            least |= {p.name: 1 for p in low}
        if not low: break
        settled |= {p.name: _settle(p, least[p.name]) for p in low}
        spared += [p.name for p in low if p.floor is None]
        order.leave(low)
    if spared:
        warnings.warn(f'sparsity: {", ".join(map(repr, spared))} would have been left without weights and kept the best group; '
                      'ask for less, or leave it out by layers=', stacklevel=2)
    free, keeps = iter(removed), []
    for p in parts:
        keep, cost = settled[p.name] if p.name in settled else next(free)
        p.kept = p.standing - cost
        keeps.append(keep)
    return keeps


def _best_of_all(parts, removed):
    "The layer that stays where layers go whole and none would be left."
    if any(p.standing > cost or p.floor is not None for p, (_, cost) in zip(parts, removed)): return []
    return sorted((p for p in parts if p.standing), key=lambda p: max(float(s.max()) for s in p.living_scores() if len(s)))[-1:]


def _settle(part, least):
    "Keep only the best groups that make up so many weights: the keep mask, and how many weights go."
    if part.standing <= least: return part.alive, 0
    if least <= (1 if part.costs is not None else part.size):  # one group will do
        keep, best = torch.zeros_like(part.alive), part.best()
        keep[best] = True
        return keep, part.standing - (part.size if part.costs is None else int(part.costs[best]))
    order = Lowest([part])
    cut = order.cut(part.standing - least)
    (keep, cost), = order.remove(cut)
    if part.standing - cost < least: (keep, cost), = order.remove(cut._replace(ties=cut.ties - 1))  # the nearest was one too many
    return keep, cost


def local(parts, fraction):
    "Each layer for itself reaches the sparsity."
    return [compete([part], fraction)[0] for part in parts]


def _each(parts, zeros, fraction):
    "Each layer for itself, so many zeros, which may be fractions; together the whole numbers make up what was asked."
    whole, total = [floor(z) for z in zeros], round(fraction * sum(p.weights for p in parts))
    for i in sorted(range(len(parts)), key=lambda i: whole[i] - zeros[i])[:max(total - sum(whole), 0)]: whole[i] += 1
    return [contest([part], n, fraction == 1)[0] for part, n in zip(parts, whole)]


def erk_densities(
    shapes: list,  # of the weights, as tuples
    density: float,  # of all together, 0 to 1
) -> list:  # of each, 0 to 1
    "Erdős–Rényi-kernel: in proportion to the sum of a weight's sides over their product (Mocanu et al. 2018, Evci et al. 2020)."
    sizes, raw = [np.prod(s, dtype=float) for s in shapes], [sum(s) / np.prod(s, dtype=float) for s in shapes]
    dense = set()
    while len(dense) < len(shapes):  # what would be more than dense is dense, and the others share the rest
        rest = [i for i in range(len(shapes)) if i not in dense]
        scale = (density * sum(sizes) - sum(sizes[i] for i in dense)) / sum(raw[i] * sizes[i] for i in rest)
        most = max(raw[i] for i in rest)
        if most * scale <= 1: return [1. if i in dense else raw[i] * scale for i in range(len(shapes))]
        dense |= {i for i in rest if raw[i] == most}
    return [1.] * len(shapes)


def erk(parts, fraction):
    "Each layer for itself, the densities by `erk_densities`."
    densities = erk_densities([p.shape for p in parts], float(1 - fraction))
    return _each(parts, [p.weights * (1 - d) for p, d in zip(parts, densities)], fraction)


def uniform_plus_shares(
    sizes: list,  # weights of each layer
    axes: list,  # names of its weight's axes
    fraction: Fraction,  # of zeros, of all together
) -> list:  # of zeros, of each
    "The same everywhere, but for the first convolution, which stays dense, and the last layer, at most 80 % (Gale et al. 2019)."
    if len(sizes) == 1: return [fraction]  # it is neither the first nor the last of a network
    first = next((i for i, a in enumerate(axes) if any(n.startswith('k') for n in a)), None)
    last = next((i for i in reversed(range(len(axes))) if 'O' in axes[i] and i != first), None)
    rest = sum(n for i, n in enumerate(sizes) if i not in (first, last))
    budget, capped, cap = fraction * sum(sizes), 0 if last is None else sizes[last], Fraction(4, 5)
    share = budget / (rest + capped) if rest + capped else Fraction(2 * bool(budget))
    at_last = min(share, cap)
    if share > at_last: share = (budget - cap * capped) / rest if rest else Fraction(2)
    if share > 1:
        most = float(100 * (rest + cap * capped) / sum(sizes))
        raise ValueError(f'sparsity: got {float(100 * fraction):.4g} %, allowed with uniform_plus is {most:.4g} % at most here: '
                         'the first convolution stays dense and the last layer keeps 20 %')
    return [Fraction(0) if i == first else at_last if i == last else share for i in range(len(sizes))]


def uniform_plus(parts, fraction):
    "Each layer for itself, the shares of zeros by `uniform_plus_shares`."
    shares = uniform_plus_shares([p.weights for p in parts], [p.axes or () for p in parts], fraction)
    return _each(parts, [p.weights * s for p, s in zip(parts, shares)], fraction)


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
        norm = np.float32(sum(float(np.square(s[s > 0], dtype=float).sum()) for s in part.living_scores()) ** .5 or 1)
        return replace(part, scores=lambda where: part.scores(where) / norm)
    return compete([over(p) for p in parts], fraction)


@dataclass(frozen=True)
class pattern:
    """n of every m weights that follow each other along the input axis stay; of the r at the end that do not fill up m, r·n/m rounded up.

    Each layer for itself. While less than the pattern is due, the lowest of those that it will take are gone."""
    n: int
    m: int

    def __post_init__(self):
        if not 1 <= self.n < self.m:
            raise ValueError(f"context: got '{self.n}:{self.m}', allowed is 'n:m' with n from 1 and smaller than m, as '2:4'")

    @property
    def sparsity(self) -> Fraction: return 1 - Fraction(self.n, self.m)

    def __call__(self, parts, fraction): return [self._one(part, fraction / self.sparsity) for part in parts]

    def _one(self, part, share):
        scores = np.where(part.alive.cpu().numpy(), part.all_scores(), -np.inf)
        keep = torch.from_numpy(self._lines(scores, part)).to(part.alive.device) & part.alive
        due = round(share * (part.weights - ALONE.count(keep))) - part.gone
        if share >= 1 or due <= 0: return keep if share >= 1 else part.alive
        order = Lowest([replace(part, alive=part.alive & ~keep)])
        (rest, _), = order.remove(order.cut(due))
        return keep | rest

    def _lines(self, scores, part):
        "The pattern over a whole layer: each is ranked among its m; ties fall by position."
        sizes, at = tuple(part.axes.values()), list(part.axes).index('I')
        lines = np.moveaxis(scores.reshape(sizes), at, 0)  # (I, …)
        keep = np.empty(lines.shape, bool)
        for start in range(0, len(lines), self.m):
            group = lines[start:start + self.m]
            worse = np.zeros(group.shape, np.int16)  # how many of its line go before
            for i in range(len(group)):
                for j in range(i):
                    first = group[j] <= group[i]
                    worse[i] += first
                    worse[j] += ~first
            keep[start:start + self.m] = worse >= len(group) - -(-len(group) * self.n // self.m)
        return np.ascontiguousarray(np.moveaxis(keep, 0, at)).reshape(-1)

    def __repr__(self): return f"'{self.n}:{self.m}'"


CONTEXTS = {'local': local, 'global': compete, 'erk': erk, 'uniform_plus': uniform_plus, 'lamp': lamp, 'normalized': normalized}


def read_context(
    context: str | Callable,  # a name in `CONTEXTS`, a pattern as '2:4', or a function of parts and fraction
) -> Callable:
    "The context that is meant."
    if isinstance(context, str) and re.fullmatch(r'\d+:\d+', context): return pattern(*map(int, context.split(':')))
    context = one_of('context', context, CONTEXTS, "a pattern as '2:4', or a function")
    try: inspect.signature(context).bind([], 0)
    except ValueError: pass  # one whose arguments cannot be read
    except TypeError: raise TypeError(f'context: got {name_of(context)}, allowed is a function of parts and fraction') from None
    return context


def read_sparsity(
    value,  # percent
    context: Callable,
    argument: str = 'sparsity',  # how the error calls it
) -> Fraction:  # the share, 0 to 1
    "The sparsity that is meant; `ValueError` where it is not the one that a pattern implies, which may be rounded: 66.7 for 1:3."
    asked = percent(value, argument)
    implied = getattr(context, 'sparsity', asked)
    if abs(asked - implied) > Fraction(1, 2000):
        raise ValueError(f'{argument}: got {value!r}, allowed with context={context!r} is {float(100 * implied):.4g}, which it implies')
    return implied
