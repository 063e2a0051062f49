"Which are the lowest: exact, at any size, without gathering the scores."
from collections.abc import Callable, Iterator
from dataclasses import InitVar, dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from fasterai.peers import ALONE, Alone
from fasterai.ranking import Ranks, cost_of, cost_of_all, differing, joined, spread

CHUNK = 1 << 19  # weights that are looked at together: few enough for a processor's cache
SAMPLE = 1 << 16  # groups that are all ranked; of more, a sample is, and what lies about the cut


@dataclass(eq=False)
class LayerGroups:
    "One layer, as those see it who select: groups with a score and a cost each, in the order of their position."
    name: str
    n_weights: int  # how many in all
    group_size: int  # weights a group
    alive: torch.Tensor  # (groups,) bool, False = gone already
    scores: Callable[[slice | torch.Tensor], torch.Tensor | np.ndarray]  # gives (n,) float32 of the groups in a slice, or at positions
    costs: torch.Tensor | None = None  # (groups,) ints, the weights that go with each group; None where it is `group_size`
    floor: int | None = None  # weights that stay at least; None: one, unless all shall go
    one_layer: bool = False  # is its one group the layer, which goes where there are others?
    shape: tuple = ()  # of the layer's weight
    axes: dict | None = None  # name: size, whose product are the groups, where each is a weight
    known_alive: InitVar[int | None] = None  # groups that are alive, where somebody has counted them; what `replace` makes counts anew
    peers: Alone = ALONE  # who has the numbers
    remaining_after: int | None = field(default=None, init=False)  # weights that stay, where who decided has counted them

    def __post_init__(self, known_alive):
        if known_alive is not None: self.n_alive = known_alive

    @cached_property
    def n_alive(self) -> int:
        "Groups that are alive."
        return self.peers.total(self.peers.count(self.alive))

    @cached_property
    def remaining(self) -> int:
        "The weights that are left."
        if self.costs is None: return self.group_size * self.n_alive
        return self.peers.total(int((self.costs * self.alive).sum()))

    @property
    def zeros(self) -> int:
        "Zeros that are there, in groups that are gone and in others: they count whatever is decided."
        return self.n_weights - self.remaining

    def all_scores(self) -> np.ndarray:  # (groups,) float32, not to be changed
        "The whole layer's scores."
        return self.peers.fetched([self.joined_scores()])[0]

    def joined_scores(self):  # (groups,), where the layer is
        "The scores of all chunks as one."
        return joined([scores for _, scores, _ in self.chunks()])

    def living_scores(self) -> Iterator[np.ndarray]:
        "The scores of living groups, in pieces."
        for _, scores, alive in self.chunks():
            if alive is not None: scores = scores[alive]
            yield self.peers.fetched([scores])[0]

    def best(self) -> int:
        "The position of the best living group, the last of several."
        most, best = -np.inf, 0
        for where, scores, alive in self.chunks():
            scores, = self.peers.fetched([scores])
            at = np.arange(len(scores)) if alive is None else np.flatnonzero(self.peers.fetched([alive])[0])
            if not len(at): continue
            scores = scores[at]
            if scores.max() < most: continue
            most = scores.max()
            best = where.start + int(at[np.flatnonzero(scores == most)[-1]])
        return best

    def chunks(self) -> Iterator[tuple]:  # slice, scores (n,), bool (n,) or None where all groups live; as arrays on a CPU
        "The layer in pieces of `CHUNK` weights; as a whole where it is not on the host."
        groups = len(self.alive)
        step = self._groups_a_chunk() if self.peers.on_host(self.alive) else groups or 1
        alive = None if self.n_alive == groups else self.peers.array(self.alive)
        for start in range(0, groups, step):
            where = slice(start, start + step)
            here = None if alive is None else alive[where]
            yield where, self.peers.array(self.scores(where)), here

    def _groups_a_chunk(self):
        "A multiple of 8 where there are as many, so that masks can be compared by words."
        groups = CHUNK // self.group_size
        return max(1, groups // 8 * 8 or groups)


class Cut(NamedTuple):
    "Where the order of living groups by (score, position) is cut: the groups below go."
    score: float  # all with a lower score go
    ties: int  # and so many with just this score, the first ones by position
    tied: int  # of so many


EVERYTHING = Cut(np.inf, 0, 0)


class Found(NamedTuple):
    "What a sweep has seen of one layer."
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
        layers: list,  # of `LayerGroups`
    ):
        self.layers, self.found, self.ranks = layers, [], None
        self.peers = layers[0].peers if layers else ALONE

    def cut(self,
        budget: int,  # how many weights shall go, at least 1
    ) -> Cut:
        if self._brackets(budget): return self._inside(budget)
        few = self.peers.total(sum(len(layer.alive) for layer in self.layers)) <= SAMPLE
        for find in (_everything,) if few else (_bracketed, _everything):
            self.found = find(self.layers, budget)
            self._rank()
            if self._brackets(budget): return self._inside(budget)
        return EVERYTHING  # all there is does not fill the budget

    def _below(self):
        "The weights that lie below the bracket."
        return self.peers.total(sum(found.cost for found in self.found))

    def _brackets(self, budget):
        "Does the cut lie inside of what was collected?"
        if not self.ranks: return False
        return self._below() < budget <= self._below() + self.ranks.total

    def _inside(self, budget):
        "The cut inside the bracket."
        budget -= self._below()
        score = self.ranks.reaching(budget)
        equal = [np.flatnonzero(found.scores == score) for found in self.found]
        costs = np.concatenate([_costs_at(found, at) for found, at in zip(self.found, equal)])
        gone = costs.cumsum()  # of the tied groups, by position
        short = budget - (self.ranks.upto(score) - int(gone[-1]))
        reaching = int(gone.searchsorted(short))
        before = int(gone[reaching - 1]) if reaching else 0
        over, under = int(gone[reaching]) - short, short - before
        return Cut(score, reaching + (over <= under), len(gone))

    def leave(self,
        layers: list,  # of `LayerGroups`
    ):
        "These no longer compete."
        stay = [i for i, layer in enumerate(self.layers) if not any(layer is other for other in layers)]
        self.layers = [self.layers[i] for i in stay]
        self.found = [self.found[i] for i in stay if self.found]
        self._rank()

    def _rank(self):
        self.ranks = Ranks([(found.scores, found.costs) for found in self.found]) if self.found else None

    def remove(self,
        cut: Cut,  # the last one
    ) -> list:  # (keep mask (groups,), how many weights go), one a layer
        "Keep masks: what is gone stays gone, what lies below the cut goes."
        if cut == EVERYTHING: return [(torch.zeros_like(layer.alive), layer.remaining) for layer in self.layers]
        stay = self._above(cut)
        costs = [found.cost + cost_of(found.costs, ~stays) for found, stays in zip(self.found, stay)]
        placed = self.peers.sent(stay, [found.keep.device for found in self.found])
        for found, stays in zip(self.found, placed):
            self.peers.array(found.keep)[found.at] = self.peers.array(stays)
        keeps = self.peers.sent([found.keep for found in self.found], [layer.alive.device for layer in self.layers])
        return list(zip(keeps, costs))

    def _above(self, cut):
        "Which of the groups inside the bracket stay: bool arrays, one a layer. Ties fall by position, over all layers."
        stay, left = [], cut.ties
        for found in self.found:
            stays = found.scores > cut.score
            if cut.ties < cut.tied:
                equal = np.flatnonzero(found.scores == cut.score)
                stays[equal[left:]] = True
                left = max(left - len(equal), 0)
            stay.append(stays)
        return stay


def _costs_at(found, at):
    "The costs of some of the groups inside the bracket, one number for each."
    if isinstance(found.costs, int): return spread(found.costs, len(at))
    return found.costs[at]


def _everything(layers, budget):
    "All living groups, to be ranked."
    scores = _ordered(layers, [layer.joined_scores() for layer in layers])
    found = []
    for layer, scored, (at, costs) in zip(layers, scores, _living(layers, [slice(None)] * len(layers))):
        where = at if isinstance(at, slice) else np.flatnonzero(at)
        found.append(Found(torch.zeros(len(layer.alive), dtype=torch.bool), where, scored[at], costs, 0))
    return found


def _bracketed(layers, budget):
    "What lies most likely about the cut."
    lo, hi = _bracket(layers, budget)
    apart = iter(_sweep_apart([layer for layer in layers if not layer.peers.on_host(layer.alive)], lo, hi))
    return [_sweep(layer, lo, hi) if layer.peers.on_host(layer.alive) else next(apart) for layer in layers]


def _bracket(layers, budget):
    "Two scores, three standard errors about the estimated place of the cut: it most likely lies between them, or at one of them."
    step = round(sum(len(layer.alive) for layer in layers) ** (1 / 3)) | 1  # odd, to fall out of step with kernels
    wheres, at = [], 0
    for layer in layers:
        wheres.append(slice(-at % step, None, step))
        at += len(layer.alive)
    scores = _ordered(layers, [layer.scores(where) for layer, where in zip(layers, wheres)])
    sample = [(scored[living], costs) for scored, (living, costs) in zip(scores, _living(layers, wheres))]
    ranks = Ranks(sample, step)
    share = min(budget / ranks.total, 1) if ranks.total else 1
    error = 3 * (share * (1 - share) * ranks.squares) ** .5 + step
    lo = ranks.reaching(budget - error) if budget > error else -np.inf
    return lo, ranks.reaching(budget + error)


def _ordered(layers, scores):
    "Arrays of scores without NaN, which a context of one's own may make: it is the lowest."
    return [_nan_lowest(scored) for scored in _peers(layers).fetched(scores)]


def _nan_lowest(scores):
    return np.where(np.isnan(scores), -np.inf, scores) if np.isnan(scores.max(initial=-np.inf)) else scores


def _peers(layers): return layers[0].peers if layers else ALONE


def _living(layers, wheres):
    "Of each layer's groups in a slice, which are alive, as an index, and what these cost: arrays, slices and ints."
    peers = _peers(layers)
    alive = iter(peers.fetched([layer.alive[where] for layer, where in zip(layers, wheres) if layer.n_alive < len(layer.alive)]))
    costs = iter(peers.fetched([layer.costs[where] for layer, where in zip(layers, wheres) if layer.costs is not None]))
    for layer in layers:
        living = next(alive) if layer.n_alive < len(layer.alive) else slice(None)
        yield living, layer.group_size if layer.costs is None else next(costs)[living]


def _sweep(layer, lo, hi):
    "Decides about what lies above and below a bracket, and collects what lies inside."
    keep, at, inside, stay = torch.empty_like(layer.alive), [], [], 0
    kept = layer.peers.array(keep)
    for where, scores, alive in layer.chunks():
        above, reached = kept[where], scores >= lo
        np.greater(scores, hi, out=above)
        if alive is not None:
            above &= alive
            reached &= alive
        here = differing(above, reached)
        stay += layer.peers.count(above)
        inside.append(scores[here])
        at.append(here + where.start if where.start else here)
    at, inside = joined(at), joined(inside)
    if layer.costs is None:
        return Found(keep, at, inside, layer.group_size, layer.group_size * (layer.n_alive - stay - len(at)))
    costs = layer.costs.numpy()[at]
    return Found(keep, at, inside, costs, layer.remaining - int((layer.costs * keep).sum()) - int(costs.sum()))


def _sweep_apart(layers, lo, hi):
    "The same where a GPU has the scores: each layer at once, and the host waits for all of them together, not for each."
    keeps, reached, counts = [], [], []
    for layer in layers:
        scores = layer.scores(slice(None))
        keep, reach = torch.as_tensor(scores > hi), torch.as_tensor(scores >= lo)
        if layer.n_alive < len(layer.alive): keep, reach = keep & layer.alive, reach & layer.alive
        cost = layer.group_size * keep.sum() if layer.costs is None else (layer.costs * keep).sum()
        keeps.append(keep)
        reached.append(reach)
        counts.append(torch.stack([reach.sum() - keep.sum(), cost]))
    peers = _peers(layers)
    counts = [count.tolist() for count in peers.fetched(counts)]
    ats = [_places(keep ^ reach, n) for keep, reach, (n, _) in zip(keeps, reached, counts)]
    scores = peers.fetched([layer.scores(at) for layer, at in zip(layers, ats)])
    costs = iter(peers.fetched([layer.costs[at] for layer, at in zip(layers, ats) if layer.costs is not None]))
    found = []
    for layer, keep, at, inside, (n, above) in zip(layers, keeps, ats, scores, counts):
        each = layer.group_size if layer.costs is None else next(costs)
        found.append(Found(keep, at, inside, each, layer.remaining - above - cost_of_all(each, n)))
    return found


def _places(mask, n):
    "Where a mask is True, of which it is known that it is so n times: `nonzero` would have the host wait."
    wanted = torch.arange(1, n + 1, dtype=torch.int32, device=mask.device)
    return torch.searchsorted(mask.cumsum(0, dtype=torch.int32), wanted)
