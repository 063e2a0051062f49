"Which are the lowest: exact, at any size, without gathering the scores."
from collections.abc import Callable, Iterator
from dataclasses import InitVar, dataclass, field
from functools import cached_property
from math import ceil
from typing import NamedTuple

import numpy as np
import torch

CHUNK = 1 << 19  # weights that are looked at together: few enough for a processor's cache
FEW = 1 << 10  # scores of which a partition finds the k-th without ado
SAMPLE = 1 << 16  # groups that are all ranked; of more, a sample is, and what lies about the cut


@dataclass
class Part:
    "One layer, as those see it who select: groups with a score and a cost each, in the order of their position."
    name: str
    weights: int  # how many in all
    size: int  # weights a group
    alive: torch.Tensor  # (groups,) bool, False = gone already
    scores: Callable[[slice | torch.Tensor], torch.Tensor | np.ndarray]  # gives (n,) float32 of the groups in a slice, or at positions
    costs: torch.Tensor | None = None  # (groups,) ints, the weights that go with each group; None where it is `size`
    floor: int | None = None  # weights that stay at least; None: one, unless all shall go
    whole: bool = False  # is its one group the layer, which goes where there are others?
    shape: tuple = ()  # of the layer's weight
    axes: dict | None = None  # name: size, whose product are the groups, where each is a weight
    known: InitVar[int | None] = None  # groups that are alive, where somebody has counted them; what `replace` makes counts anew
    kept: int | None = field(default=None, init=False)  # weights that stay, where who decided has counted them

    def __post_init__(self, known):
        if known is not None: self.living = known

    @cached_property
    def living(self) -> int:
        "Groups that are alive."
        return count(self.alive)

    @cached_property
    def standing(self) -> int:
        "The weights that are left."
        return self.size * self.living if self.costs is None else int((self.costs * self.alive).sum())

    @property
    def gone(self) -> int:
        "Zeros that are there, in groups that are gone and in others: they count whatever is decided."
        return self.weights - self.standing

    def all_scores(self) -> np.ndarray:  # (groups,) float32, not to be changed
        "The whole layer's scores."
        return fetched([_joined([scores for _, scores, _ in self.chunks()])])[0]

    def living_scores(self) -> Iterator[np.ndarray]:
        "The scores of living groups, in pieces."
        for _, scores, alive in self.chunks(): yield fetched([scores if alive is None else scores[alive]])[0]

    def best(self) -> int:
        "The position of the best living group, the last of several."
        most, at = -np.inf, 0
        for where, scores, alive in self.chunks():
            scores, places = fetched([scores])[0], slice(None) if alive is None else np.flatnonzero(fetched([alive])[0])
            if not len(scores := scores[places]) or (top := scores.max()) < most: continue
            most, last = top, np.flatnonzero(scores == top)[-1]
            at = where.start + int(last if alive is None else places[last])
        return at

    def chunks(self) -> Iterator[tuple]:  # slice, scores (n,), bool (n,) or None where all groups live; as arrays on a CPU
        "The part in pieces of `CHUNK` weights; as a whole where it is not on the host."
        groups, step = len(self.alive), max(1, CHUNK // self.size // 8 * 8 or CHUNK // self.size)
        if not on_host(self.alive): step = groups or 1
        alive = None if self.living == groups else _host(self.alive)
        for start in range(0, groups, step):
            where = slice(start, start + step)
            yield where, _host(self.scores(where)), None if alive is None else alive[where]


class Cut(NamedTuple):
    "Where the order of living groups by (score, position) is cut: the groups below go."
    score: float  # all with a lower score go
    ties: int  # and so many with just this score, the first ones by position
    tied: int  # of so many


EVERYTHING = Cut(np.inf, 0, 0)


class Found(NamedTuple):
    "What a sweep has seen of one part."
    keep: torch.Tensor  # (groups,) bool, True for the living groups above the bracket
    at: torch.Tensor | np.ndarray | slice  # positions of the living groups inside the bracket
    scores: np.ndarray  # and their scores
    costs: np.ndarray | int  # and their weights, one number where they are all the same
    cost: int  # the weights of the living groups below the bracket


class Lowest:
    """Finds the lowest living groups, up to a budget of weights, to the nearest group, halves upward.

    A strided sample brackets the cut (Floyd & Rivest 1975); one sweep decides what lies above the bracket and below it, and
    collects what lies inside. A bracket that misses is given up for everything; one that hits serves again."""

    def __init__(self,
        parts: list,  # of `Part`
    ):
        self.parts, self.found, self.ranks = parts, [], None

    def cut(self,
        budget: int,  # how many weights shall go, at least 1
    ) -> Cut:
        few = sum(len(part.alive) for part in self.parts) <= SAMPLE
        for find in (None, _everything) if few else (None, _bracketed, _everything):
            if find:
                self.found = find(self.parts, budget)
                self._rank()
            below = sum(f.cost for f in self.found)
            if self.ranks and below < budget <= below + self.ranks.total: return self._inside(budget - below)
        return EVERYTHING  # all there is does not fill the budget

    def _inside(self, budget):
        "The cut inside the bracket, where `budget` weights are still to go."
        score = self.ranks.reaching(budget)
        equal = [np.flatnonzero(f.scores == score) for f in self.found]
        costs = np.concatenate([np.full(len(e), f.costs) if isinstance(f.costs, int) else f.costs[e] for f, e in zip(self.found, equal)])
        gone = costs.cumsum()  # of the tied groups, by position
        short = budget - (self.ranks.upto(score) - int(gone[-1]))
        reaching = int(gone.searchsorted(short))
        before = int(gone[reaching - 1]) if reaching else 0
        return Cut(score, reaching + (int(gone[reaching]) - short <= short - before), len(gone))

    def leave(self,
        parts: list,  # of `Part`
    ):
        "These no longer compete."
        stay = [i for i, part in enumerate(self.parts) if not any(part is other for other in parts)]
        self.parts, self.found = [self.parts[i] for i in stay], [self.found[i] for i in stay if self.found]
        self._rank()

    def _rank(self): self.ranks = _Ranks([(f.scores, f.costs) for f in self.found]) if self.found else None

    def remove(self,
        cut: Cut,  # the last one
    ) -> list:  # (keep mask (groups,), how many weights go), one a part
        "Keep masks: what is gone stays gone, what lies below the cut goes."
        if cut == EVERYTHING: return [(torch.zeros_like(part.alive), part.standing) for part in self.parts]
        stay, costs, left = [], [], cut.ties
        for found in self.found:
            stays = found.scores > cut.score
            if cut.ties < cut.tied:
                equal = np.flatnonzero(found.scores == cut.score)
                stays[equal[left:]] = True
                left = max(left - len(equal), 0)
            stay.append(stays)
            costs.append(found.cost + _sum(found.costs, ~stays))
        for found, stays in zip(self.found, sent(stay, [found.keep.device for found in self.found])): _host(found.keep)[found.at] = _host(stays)
        return list(zip(sent([found.keep for found in self.found], [part.alive.device for part in self.parts]), costs))


def count(
    mask,  # bool, tensor or array
) -> int:
    "How many are True."
    if isinstance(mask, torch.Tensor): mask = _host(mask)
    return int(np.count_nonzero(mask) if isinstance(mask, np.ndarray) else torch.count_nonzero(mask))


def _everything(parts, budget):
    "All living groups, to be ranked."
    scores = _ordered([_joined([scores for _, scores, _ in part.chunks()]) for part in parts])
    living = _living(parts, [slice(None)] * len(parts))
    return [Found(torch.zeros(len(part.alive), dtype=torch.bool), at if isinstance(at, slice) else np.flatnonzero(at), scored[at], costs, 0)
            for part, scored, (at, costs) in zip(parts, scores, living)]


def _bracketed(parts, budget):
    "What lies most likely about the cut."
    lo, hi = _bracket(parts, budget)
    apart = iter(_sweep_apart([part for part in parts if not on_host(part.alive)], lo, hi))
    return [_sweep(part, lo, hi) if on_host(part.alive) else next(apart) for part in parts]


def _bracket(parts, budget):
    "Two scores, three standard errors about the estimated place of the cut: it most likely lies between them, or at one of them."
    step = round(sum(len(p.alive) for p in parts) ** (1 / 3)) | 1  # odd, to fall out of step with kernels
    wheres, at = [], 0
    for part in parts:
        wheres.append(slice(-at % step, None, step))
        at += len(part.alive)
    scores = _ordered([part.scores(where) for part, where in zip(parts, wheres)])
    ranks = _Ranks([(scored[living], costs) for scored, (living, costs) in zip(scores, _living(parts, wheres))], step)
    share = min(budget / ranks.total, 1) if ranks.total else 1
    error = 3 * (share * (1 - share) * ranks.squares) ** .5 + step
    return ranks.reaching(budget - error) if budget > error else -np.inf, ranks.reaching(budget + error)


def _ordered(scores):
    "Arrays of scores without NaN, which a context of one's own may make: it is the lowest."
    return [np.where(np.isnan(s), -np.inf, s) if np.isnan(s.max(initial=-np.inf)) else s for s in fetched(scores)]


def _living(parts, wheres):
    "Of each part's groups in a slice, which are alive, as an index, and what these cost: arrays, slices and ints."
    alive = iter(fetched([part.alive[where] for part, where in zip(parts, wheres) if part.living < len(part.alive)]))
    costs = iter(fetched([part.costs[where] for part, where in zip(parts, wheres) if part.costs is not None]))
    for part in parts:
        living = next(alive) if part.living < len(part.alive) else slice(None)
        yield living, part.size if part.costs is None else next(costs)[living]


def _sweep(part, lo, hi):
    "Decides about what lies above and below a bracket, and collects what lies inside."
    keep, at, inside, stay = torch.empty_like(part.alive), [], [], 0
    kept = _host(keep)
    for where, scores, alive in part.chunks():
        above, reached = kept[where], scores >= lo
        np.greater(scores, hi, out=above)
        if alive is not None:
            above &= alive
            reached &= alive
        here = differing(above, reached)
        stay += count(above)
        inside.append(scores[here])
        at.append(here + where.start if where.start else here)
    at, inside = _joined(at), _joined(inside)
    if part.costs is None: return Found(keep, at, inside, part.size, part.size * (part.living - stay - len(at)))
    costs = part.costs.numpy()[at]
    return Found(keep, at, inside, costs, part.standing - int((part.costs * keep).sum()) - int(costs.sum()))


def _sweep_apart(parts, lo, hi):
    "The same where a GPU has the scores: each part at once, and the host waits for all of them together, not for each."
    keeps, reached, counts = [], [], []
    for part in parts:
        scores = part.scores(slice(None))
        keep, reach = torch.as_tensor(scores > hi), torch.as_tensor(scores >= lo)
        if part.living < len(part.alive): keep, reach = keep & part.alive, reach & part.alive
        cost = part.size * keep.sum() if part.costs is None else (part.costs * keep).sum()
        keeps.append(keep)
        reached.append(reach)
        counts.append(torch.stack([reach.sum() - keep.sum(), cost]))
    counts = [c.tolist() for c in fetched(counts)]
    ats = [_places(keep ^ reach, n) for keep, reach, (n, _) in zip(keeps, reached, counts)]
    scores = fetched([part.scores(at) for part, at in zip(parts, ats)])
    costs = iter(fetched([part.costs[at] for part, at in zip(parts, ats) if part.costs is not None]))
    found = []
    for part, keep, at, inside, (n, above) in zip(parts, keeps, ats, scores, counts):
        each = part.size if part.costs is None else next(costs)
        found.append(Found(keep, at, inside, each, part.standing - above - _total(each, n)))
    return found


def _places(mask, n):
    "Where a mask is True, of which it is known that it is so n times: `nonzero` would have the host wait."
    return torch.searchsorted(mask.cumsum(0, dtype=torch.int32), torch.arange(1, n + 1, dtype=torch.int32, device=mask.device))


def _joined(pieces): return pieces[0] if len(pieces) == 1 else np.concatenate(pieces) if isinstance(pieces[0], np.ndarray) else torch.cat(pieces)


class _Ranks:
    "Scores and what they cost, to find the score up to which so much lies."

    def __init__(self,
        pieces: list,  # of (scores (n,), costs: int or (n,))
        times: int = 1,  # how often each counts
    ):
        pieces, self.times = [(s, c) for s, c in pieces if len(s)] or [(np.empty(0, np.float32), 0)], times
        self.scores, sizes = _joined([s for s, _ in pieces]), {c if isinstance(c, int) else None for _, c in pieces}
        self.costs = pieces[0][1] if None not in sizes and len(sizes) == 1 else np.concatenate(
            [np.full(len(s), c) if isinstance(c, int) else c for s, c in pieces])

    def upto(self, score):
        "The weights of what is scored up to `score`."
        return self.times * _sum(self.costs, self.scores <= score)

    @property
    def total(self): return self.times * _total(self.costs, len(self.scores))

    @property
    def squares(self): return self.times ** 2 * _total(self.costs ** 2, len(self.scores))

    def reaching(self, budget):
        "The lowest score up to which so many weights lie; inf if there are not so many."
        return float(_reaching(self.scores, self.costs, budget / self.times)) if budget <= self.total else np.inf


def _total(costs, n): return costs * n if isinstance(costs, int) else int(costs.sum())
def _sum(costs, chosen): return costs * count(chosen) if isinstance(costs, int) else int(costs @ chosen)


def _reaching(scores, costs, budget):
    "The lowest score up to which such costs lie. Only what a sample brackets is sorted, which is several times faster."
    alike, slack = isinstance(costs, int), 1.5
    while len(scores) >= FEW:
        step = round(len(scores) ** (1 / 3))
        sample = scores[::step]
        if alike: sample, at = np.sort(sample), budget / (costs * step)
        else:
            order = sample.argsort()
            sample, at = sample[order], costs[::step][order].cumsum().searchsorted(budget / step)
        error = slack * (at * (1 - at / len(sample))) ** .5 + slack
        least, most = int(at - error), int(at + error) + 1
        lo, hi = sample[least] if least > 0 else -np.inf, sample[most] if most < len(sample) else np.inf
        below, upto = scores < lo, scores <= hi
        inside, less = differing(below, upto), _sum(costs, below)
        if len(inside) == len(scores): break
        among = costs if alike else costs[inside]
        if less < budget <= less + _total(among, len(inside)): scores, costs, budget = scores[inside], among, budget - less
        else: slack *= 4  # missed
    if alike: return np.partition(scores, place := ceil(budget / costs) - 1)[place]
    order = scores.argsort()
    return scores[order[costs[order].cumsum().searchsorted(budget)]]


# On a CPU numpy compares and picks many times faster than torch; elsewhere the tensors stay where they are.

def on_host(tensor): return tensor.is_cpu
def _host(values): return values.numpy() if isinstance(values, torch.Tensor) and on_host(values) else values


def fetched(
    pieces: list,  # tensors, or arrays
) -> list:  # arrays
    "What the host wants to see, brought over in one piece from each device: it waits once, not for each."
    found = [piece if isinstance(piece, np.ndarray) else _host(piece) for piece in pieces]
    for device in {piece.device for piece in found if isinstance(piece, torch.Tensor)}:
        here = [i for i, piece in enumerate(found) if isinstance(piece, torch.Tensor) and piece.device == device]
        whole = torch.cat([found[i] for i in here]).cpu()
        for i, piece in zip(here, whole.split([len(found[i]) for i in here])): found[i] = piece.numpy()
    return found


def sent(
    pieces: list,  # arrays, or tensors that may be there already
    devices: list,  # where each shall be
) -> list:  # tensors
    "The way back, in one piece to each device."
    found = [piece if isinstance(piece, torch.Tensor) else torch.from_numpy(piece) for piece in pieces]
    for device in {device for piece, device in zip(found, devices) if piece.device != device}:
        here = [i for i, piece in enumerate(found) if devices[i] == device != piece.device]
        whole = torch.cat([found[i] for i in here]).to(device)
        for i, piece in zip(here, whole.split([len(found[i]) for i in here])): found[i] = piece
    return found


def differing(
    some: np.ndarray,  # bool (n,)
    others: np.ndarray,
) -> np.ndarray:  # ints
    "Where two masks differ."
    if len(some) % 8: return np.flatnonzero(some ^ others)
    some, others = some.view(np.uint64), others.view(np.uint64)  # few differ, so most words of eight are the same
    words = np.flatnonzero(some != others)
    at = np.flatnonzero((some[words] ^ others[words]).view(bool))
    return words[at >> 3] * 8 + (at & 7)
