"Which are the lowest: exact, at any size, without gathering the scores."
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import NamedTuple

import numpy as np
import torch

CHUNK = 1 << 19  # weights that are looked at together: few enough for a processor's cache
SORTED = 1 << 14  # groups that are sorted without much ado; of more, a sample is


@dataclass
class Part:
    "One layer, as those see it who select: groups with a score and a cost each, in the order of their position."
    name: str
    weights: int  # how many in all
    size: int  # weights a group
    alive: torch.Tensor  # (groups,) bool, False = gone already
    scores: Callable[[slice], torch.Tensor]  # gives (n,) float32 of the groups in a slice, the same each time
    costs: torch.Tensor | None = None  # (groups,) ints, the weights that go with each group; None where it is `size`
    stranded: int = 0  # zeros in groups that live; they count as gone whatever is decided

    @cached_property
    def living(self) -> int:
        "Groups that are alive."
        return count(self.alive)

    @property
    def gone(self) -> int:
        "Zeros that are there, in weights."
        return self.stranded + self.size * (len(self.alive) - self.living)

    def chunks(self) -> Iterator[tuple]:  # slice, scores (n,), bool (n,) or None where all groups live; as arrays on a CPU
        "The part in pieces of `CHUNK` weights."
        step = max(1, CHUNK // self.size)
        for start in range(0, len(self.alive), step):
            where = slice(start, start + step)
            yield where, _host(self.scores(where)), None if self.living == len(self.alive) else _host(self.alive[where])


class Cut(NamedTuple):
    "Where the order of living groups by (score, position) is cut: the groups below go."
    score: float  # all with a lower score go
    ties: int  # and so many with just this score, the first ones by position
    tied: int  # of so many


EVERYTHING = Cut(np.inf, 0, 0)


class Found(NamedTuple):
    "What a sweep has seen of one part."
    below: int  # living groups scored up to the lower end of the bracket
    cost: int  # the weights of these
    scores: np.ndarray  # of the living groups inside the bracket, by position
    costs: np.ndarray | int  # and their weights, one number where they are all the same


class Lowest:
    """Finds the cut that removes the lowest living groups until a budget of weights is gone, to the nearest group, halves upward.

    A strided sample brackets the cut (Floyd & Rivest 1975); one sweep sums what lies below the bracket and collects
    what lies inside; only that is sorted. A bracket that misses is given up for everything; one that hits serves again."""

    def __init__(self,
        parts: list,  # of `Part`
    ):
        self.parts, self.found, self.ranks = parts, [], None

    def cut(self,
        budget: int,  # how many weights shall go, at least 1
    ) -> Cut:
        for bracket in (None, _bracket, _everything):
            if bracket:
                lo, hi = bracket(self.parts, budget)
                self.found = [_sweep(part, lo, hi) for part in self.parts]
                self.ranks = _Ranks([(f.scores, f.costs) for f in self.found])
            below = sum(f.cost for f in self.found)
            if self.ranks and below < budget <= below + self.ranks.total: return self._inside(budget - below)
        return EVERYTHING  # all there is does not fill the budget

    def _inside(self, budget):
        "The cut inside the bracket, where `budget` weights are still to go."
        score = self.ranks.reaching(budget)
        equal = [(f.scores == score).nonzero()[0] for f in self.found]
        costs = np.concatenate([np.full(len(e), f.costs) if isinstance(f.costs, int) else f.costs[e] for f, e in zip(self.found, equal)])
        short = budget - self.ranks.weight(score, 'left')
        gone = costs.cumsum()  # of the tied groups, by position
        reaching = int(gone.searchsorted(short))
        before = int(gone[reaching - 1]) if reaching else 0
        return Cut(score, reaching + (int(gone[reaching]) - short <= short - before), len(costs))

    def taken(self,
        cut: Cut,  # the last one
    ) -> list:  # ints
        "How many groups of each part go."
        if cut == EVERYTHING: return [part.living for part in self.parts]
        taken, left = [], cut.ties
        for found in self.found:
            ties = min(left, int((found.scores == cut.score).sum())) if left else 0
            left -= ties
            taken.append(found.below + int((found.scores < cut.score).sum()) + ties)
        return taken


def remove(
    parts: list,  # of `Part`
    cut: Cut,
) -> Iterator[torch.Tensor]:  # keep masks (groups,), one a part
    "Keep masks: what is gone stays gone, what lies below the cut goes."
    seen = 0  # tied groups so far
    for part in parts:
        keep = torch.empty_like(part.alive)
        for where, scores, alive in part.chunks():
            above = _host(keep)[where]
            compare = np if isinstance(scores, np.ndarray) else torch
            (compare.greater if cut.ties == cut.tied else compare.greater_equal)(scores, cut.score, out=above)
            if alive is not None: above &= alive
            if 0 < cut.ties < cut.tied and seen < cut.ties:
                equal = places((scores == cut.score) & above)
                above[equal[:cut.ties - seen]] = False
                seen += len(equal)
        yield keep


def count(
    mask,  # bool, tensor or array
) -> int:
    "How many are True."
    if isinstance(mask, torch.Tensor): mask = _host(mask)
    return int(np.count_nonzero(mask) if isinstance(mask, np.ndarray) else torch.count_nonzero(mask))


def _everything(parts, budget): return -np.inf, np.inf


def _bracket(parts, budget):
    "Two scores, three standard errors about the estimated place of the cut: it most likely lies above the one and not above the other."
    groups = sum(len(p.alive) for p in parts)
    step = 1 if groups <= SORTED else round(groups ** (1 / 3)) | 1  # odd, to fall out of step with kernels
    sample, at = [], 0
    for part in parts:
        where = slice(-at % step, None, step)
        at += len(part.alive)
        scores, cost = _host(part.scores(where)), part.size if part.costs is None else _host(part.costs[where])
        if part.living < len(part.alive):
            alive = places(_host(part.alive[where]))
            scores, cost = scores[alive], cost if isinstance(cost, int) else cost[alive]
        sample.append((_array(scores), cost if isinstance(cost, int) else _array(cost)))
    ranks = _Ranks(sample, step)
    share = min(budget / ranks.total, 1) if ranks.total else 1
    error = 0 if step == 1 else 3 * (share * (1 - share) * ranks.squares) ** .5 + step
    return ranks.before(ranks.reaching(budget - error)), ranks.reaching(budget + error)


def _sweep(part, lo, hi):
    below, cost, scores, costs = 0, 0, [], []
    for where, s, alive in part.chunks():
        upto, inside = s <= hi, s > lo
        if alive is not None: upto &= alive
        inside &= upto
        at = places(inside)
        number = count(upto) - len(at)
        below += number
        scores.append(_array(s[at]))
        if part.costs is None: cost += part.size * number
        else:
            c = _host(part.costs[where])
            costs.append(_array(c[at]))
            cost += int(c[upto].sum()) - int(costs[-1].sum())
    return Found(below, cost, np.concatenate(scores), part.size if part.costs is None else np.concatenate(costs))


class _Ranks:
    "Scores in order, for each cost apart, to sum the costs up to a score without sorting them all together."

    def __init__(self,
        pieces: list,  # of (scores (n,), costs: int or (n,))
        times: int = 1,  # how often each counts
    ):
        classes = {}
        for scores, costs in pieces:
            for cost in [costs] if isinstance(costs, int) else np.unique(costs).tolist():
                classes.setdefault(cost * times, []).append(scores if isinstance(costs, int) else scores[costs == cost])
        self.classes = {cost: np.sort(np.concatenate(scores)) for cost, scores in classes.items()}
        self.total = sum(cost * len(scores) for cost, scores in self.classes.items())
        self.squares = float(sum(cost * cost * len(scores) for cost, scores in self.classes.items()))

    def weight(self, score, side='right'):
        "The weights of what is scored up to `score`, or below it (`side='left'`)."
        return sum(cost * int(scores.searchsorted(np.float32(score), side)) for cost, scores in self.classes.items())

    def reaching(self, budget):
        "The lowest score up to which `budget` weights lie; inf if there are not so many."
        reached = []
        for cost, scores in self.classes.items():
            if len(self.classes) == 1: first = max(ceil(budget / cost) - 1, 0)
            else: first = bisect_left(range(len(scores)), budget, key=lambda i: self.weight(scores[i]))
            if first < len(scores): reached.append(float(scores[first]))
        return min(reached, default=np.inf)

    def before(self, score):
        "The highest score strictly below; -inf if there is none."
        below = [float(scores[i - 1]) for scores in self.classes.values() if (i := int(scores.searchsorted(np.float32(score))))]
        return max(below, default=-np.inf)


# On a CPU numpy compares and picks many times faster than torch; elsewhere the tensors stay where they are.

def _host(tensor): return tensor.numpy() if tensor.device.type == 'cpu' else tensor
def _array(values): return values if isinstance(values, np.ndarray) else values.cpu().numpy()


def places(
    mask,  # bool (n,), tensor or array
):  # ints, of the same kind
    "Where a mask is True."
    if not isinstance(mask, np.ndarray): return mask.nonzero().flatten()
    if len(mask) % 8 or not mask.flags.c_contiguous: return np.flatnonzero(mask)
    words = mask.view(np.uint64)  # few are True, so most words of eight are zero
    some = np.flatnonzero(words)
    at = np.flatnonzero(words[some].view(bool))
    return some[at >> 3] * 8 + (at & 7)
