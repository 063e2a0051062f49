"Which are the lowest: exact, at any size, without gathering the scores."
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

CHUNK = 1 << 19  # weights that are looked at together: few enough for a processor's cache
SAMPLE = 1 << 16  # scores that are sorted to guess where the cut will be


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
    spared: int | None = None  # a group that must stay

    @property
    def gone(self) -> int:
        "Zeros that are there, in weights."
        return self.stranded + self.size * (len(self.alive) - count(self.alive))


def count(
    mask,  # bool, tensor or array
) -> int:
    "How many are True."
    if isinstance(mask, torch.Tensor): mask = _host(mask)
    return int(np.count_nonzero(mask) if isinstance(mask, np.ndarray) else torch.count_nonzero(mask))


class Cut(NamedTuple):
    "Where the order of living groups by (score, position) is cut: the groups below go."
    score: float  # all with a lower score go
    ties: int  # and so many with just this score, the first ones by position
    tied: int  # of so many


NOTHING, EVERYTHING = Cut(-np.inf, 0, 0), Cut(np.inf, 0, 0)


def lowest(
    parts: list,  # of `Part`
    budget: int,  # how many weights shall go
) -> Cut:
    """The cut that removes the lowest living groups until `budget` weights are gone, to the nearest group, halves upward.

    A strided sample brackets the cut (Floyd & Rivest 1975); one sweep sums what lies below the bracket and collects
    what lies inside; only that is sorted. A bracket that misses is given up for everything."""
    if budget <= 0: return NOTHING
    for lo, hi in (_bracket(parts, budget), (-np.inf, np.inf)):
        below, scores, costs = _sweep(parts, lo, hi)
        total = below + (costs * len(scores) if isinstance(costs, int) else int(costs.sum()))
        if below < budget <= total: return _cut(below, scores, costs, budget)
        if below < budget and hi == np.inf: return EVERYTHING  # all there is does not fill the budget


def remove(
    parts: list,  # of `Part`
    cut: Cut,
) -> Iterator[torch.Tensor]:  # keep masks (groups,), one a part
    "Keep masks: what is gone stays gone, what lies below the cut goes."
    seen = 0  # tied groups in the parts before
    for part in parts:
        keep = torch.empty_like(part.alive)
        for where, scores, alive in _chunks([part]):
            above = scores > cut.score if cut.ties == cut.tied else scores >= cut.score
            if 0 < cut.ties < cut.tied and seen < cut.ties:
                equal = _places((scores == cut.score) & alive)
                above[equal[:cut.ties - seen]] = False
                seen += len(equal)
            above &= alive
            _host(keep)[where] = above
        if part.spared is not None: keep[part.spared] = True
        yield keep


def _cut(below, scores, costs, budget):
    "The cut among `scores`, given by position, where `below` weights go before them."
    if isinstance(costs, int):
        take = int((budget - below) / costs + .5)
        if take == 0: return Cut(float(scores.min()), 0, 1)
        score = np.partition(scores, take - 1)[take - 1]
        return Cut(float(score), take - int((scores < score).sum()), int((scores == score).sum()))
    order = scores.argsort(kind='stable')
    ranked, gone = scores[order], below + costs[order].cumsum()
    reaching = int(gone.searchsorted(budget))  # the group with which the budget is reached
    short = budget - (int(gone[reaching - 1]) if reaching else below)
    take = reaching + (int(gone[reaching]) - budget <= short)
    score = ranked[max(take - 1, 0)]
    return Cut(float(score), int((ranked[:take] == score).sum()), int((ranked == score).sum()))


def _bracket(parts, budget):
    "Two scores, three standard errors about the estimated place of the cut: it most likely lies above the one and not above the other."
    groups = sum(len(p.alive) for p in parts)
    step = max(1, groups // SAMPLE) | 1  # odd, to fall out of step with kernels
    scores, weights, at = [], [], 0
    for part in parts:
        where = slice(-at % step, None, step)
        alive = _places(_host(part.alive[where]))
        scores.append(_numbers(part.scores(where), alive))
        weights.append(_numbers(part.costs[where], alive) if part.costs is not None else np.full(len(alive), part.size))
        at += len(part.alive)
    scores, weights = np.concatenate(scores), np.concatenate(weights) * step
    if not len(scores): return -np.inf, np.inf
    if weights.min() == weights.max(): scores.sort()
    else:
        order = scores.argsort()
        scores, weights = scores[order], weights[order]
    gone = weights.cumsum()
    share = min(budget / gone[-1], 1)
    error = 0 if step == 1 else 3 * (share * (1 - share) * float(np.square(weights, dtype=float).sum())) ** .5 + step
    lo, hi = gone.searchsorted([budget - error, budget + error])
    lower = scores.searchsorted(scores[min(lo, len(scores) - 1)])  # how many lie strictly below
    return (float(scores[lower - 1]) if lower else -np.inf), (float(scores[hi]) if hi < len(scores) else np.inf)


def _sweep(parts, lo, hi):
    "The weights of the groups scored up to `lo`; scores and weights of those above it up to `hi`, by position."
    below, found, costs, same = 0, [], [], len({p.size for p in parts}) == 1 and all(p.costs is None for p in parts)
    for part in parts:
        for where, scores, alive in _chunks([part]):
            upto = scores <= hi
            upto &= alive
            inside = scores > lo
            inside &= upto
            places = _places(inside)
            found.append(_numbers(scores, places))
            if part.costs is None:
                below += part.size * (count(upto) - len(places))
                if not same: costs.append(np.full(len(places), part.size))
            else:
                cost = part.costs[where]
                costs.append(_numbers(cost, places))
                below += int(_numbers(cost, _places(upto)).sum()) - int(costs[-1].sum())
    return below, np.concatenate(found), parts[0].size if same else np.concatenate(costs)


def _chunks(parts):
    "Slices of each part with the scores and the living groups in them; a group that is spared counts as not living."
    for part in parts:
        step = max(1, CHUNK // part.size)
        for start in range(0, len(part.alive), step):
            where = slice(start, start + step)
            alive = _host(part.alive[where])
            if part.spared is not None and start <= part.spared < start + step:
                alive = alive.copy() if isinstance(alive, np.ndarray) else alive.clone()
                alive[part.spared - start] = False
            yield where, _host(part.scores(where)), alive


# On a CPU numpy compares and picks many times faster than torch; elsewhere the tensors stay where they are.

def _host(tensor): return tensor.numpy() if tensor.device.type == 'cpu' else tensor
def _places(mask): return np.flatnonzero(mask) if isinstance(mask, np.ndarray) else mask.nonzero().flatten()


def _numbers(values, places):
    "The values at some places, as a numpy array."
    values = values[places] if isinstance(values, np.ndarray) == isinstance(places, np.ndarray) else _host(values)[places]
    return values if isinstance(values, np.ndarray) else values.cpu().numpy()
