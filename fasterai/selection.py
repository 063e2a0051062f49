"Find the lowest groups of several layers: exact, at any size, without gathering all scores."
from collections.abc import Callable, Iterator
from dataclasses import InitVar, dataclass, field
from fractions import Fraction
from functools import cached_property
from math import ceil, floor
from typing import NamedTuple

import numpy as np
import torch

from fasterai.native.sweep import Row, Terms, cut, sweep
from fasterai.peers import ALONE, Alone
from fasterai.ranking import Ranks, cost_of, cost_of_all, differing, joined, spread
from fasterai.shards import Place

CHUNK = 1 << 19  # weights that are scored together: few enough for a processor's cache
SAMPLE = 1 << 16  # groups: so many are all ranked; of more, a sample and those near the cut


@dataclass
class Outcome:
    "Hold what a context says of a layer beside its mask. Copies of the layer share it."
    left: int | None = None  # how many weights stay; None: it does not say
    freed: int = 0  # how many of the scattered zeros are more than was asked for, and are not held


@dataclass(eq=False)
class LayerGroups:
    """Hold the groups of one layer for a selection: each has a score and a cost, in the order of their
    position."""
    name: str
    n_weights: int  # number of weights in the layer
    group_size: int  # number of weights in a group
    alive: torch.Tensor  # (groups,) bool, False = pruned already
    scores: Callable[[slice | torch.Tensor], torch.Tensor | np.ndarray]  # returns (n,) float32, or float64, for a slice of groups, or for positions
    costs: torch.Tensor | None = None  # (groups,) ints, the weights that are left in each group; None where it is `group_size`
    floor: int | None = None  # number of weights that stay at least; None: one group, unless 100 % is asked
    one_layer: bool = False  # its one group is the layer, and may be pruned where there are other layers
    shape: tuple = ()  # of the layer's weight
    axes: dict | None = None  # name: size, of the weight; for contexts of single weights
    known_alive: InitVar[int | None] = None  # number of living groups, if it is known; else it is counted
    peers: Alone = ALONE  # reads the numbers, and asks other processes
    place: Place | None = None  # which part of the layer is here, where single weights are split; `alive` and `scores` are those of the part, numbers of weights those of the whole; None: all is here
    scattered: int = 0  # number of zeros in groups with other weights that no mask holds: they count, and are held from now on
    count_free: Callable[[], int] | None = None  # counts zeros that no mask holds and that are not among `zeros`
    outcome: Outcome = field(default_factory=Outcome)  # what the context says beside the mask
    unit: int = 1  # what a weight counts: 1, or by work as many as its multiply-adds; all numbers of weights are in this unit

    def __post_init__(self, known_alive):
        if known_alive is not None: self.n_alive = known_alive
        if self.place is None: return
        if known_alive is None or self.costs is not None:
            raise ValueError(f'{self.name!r}: got a part, expected single weights, and how many live in all')

    @property
    def n_groups(self) -> int:
        "Return the number of groups, pruned or not."
        return len(self.alive) if self.place is None else self.place.n_whole

    @property
    def is_of_single_weights(self) -> bool:
        "Tell whether each group is one weight, which counts one, and all of them are here."
        return self.group_size == self.unit == 1 and self.costs is None and self.place is None

    @cached_property
    def n_alive(self) -> int:
        "Return the number of groups that are not pruned."
        return self.peers.count(self.alive)

    @property
    def all_alive(self) -> bool:
        "Tell whether no group is pruned."
        return self.n_alive == self.n_groups

    @cached_property
    def remaining(self) -> int:
        "Return the number of weights that are not pruned."
        if self.costs is None: return self.group_size * self.n_alive
        return int((self.costs * self.alive).sum())

    @cached_property
    def alive_here(self) -> int:
        "Return the number of groups that are here and not pruned."
        return self.n_alive if self.place is None else self.peers.count(self.alive)

    @property
    def remaining_here(self) -> int:
        "Return the number of weights that are here and not pruned."
        return self.remaining if self.place is None else self.group_size * self.alive_here

    def whole_position(self,
        at: int,  # of a group that is here; -1: of none
    ) -> int:
        "Return the position of a group in the whole layer; -1 stays."
        if self.place is None or at < 0: return at
        return int(self.place.positions(np.array([at]))[0])

    @property
    def speaks(self) -> bool:
        "Tell whether this process tells the others of the groups here: of several with them one does."
        return self.place is None or self.place.speaks

    @property
    def zeros(self) -> int:
        """Return the number of zeros in pruned groups, and of those that lie scattered in others: they count
        towards the sparsity.

        Living groups that are zero are not among them: they are the first to be pruned."""
        return self.n_weights - self.remaining

    def all_scores(self) -> np.ndarray:  # (groups,), not to be changed
        "Return the scores of all groups."
        return _nan_lowest(self.peers.fetched([self.joined_scores()])[0])

    def joined_scores(self):  # (groups,), where the layer is
        "Join the scores of all chunks."
        return joined([scores for _, scores, _ in self.chunks()])

    def living_scores(self) -> Iterator[np.ndarray]:
        "Yield the scores of the groups that are not pruned, in pieces."
        for _, scores, alive in self.chunks():
            if alive is not None: scores = scores[alive]
            yield _nan_lowest(self.peers.fetched([scores])[0])

    def best(self) -> tuple:  # (score, position), (-inf, -1) where none is here
        "Return the living group with the highest score, the last of several."
        most, best = -np.inf, -1
        for where, scores, alive in self.chunks():
            scores, = self.peers.fetched([scores])
            if alive is not None:
                at = np.flatnonzero(self.peers.fetched([alive])[0])
                scores = scores[at]
            scores = _nan_lowest(scores)
            if not len(scores) or scores.max() < most: continue
            most = scores.max()
            last = int(np.flatnonzero(scores == most)[-1])
            best = where.start + (last if alive is None else int(at[last]))
        return float(most), best

    def chunks(self) -> Iterator[tuple]:  # slice, scores (n,), alive (n,) or None where all groups are; as arrays on a CPU
        "Yield the layer in pieces of `CHUNK` weights, or in one piece where it is not on the host."
        groups = len(self.alive)
        step = self._groups_a_chunk() if self.peers.on_host(self.alive) else groups or 1
        alive = None if self.all_alive else self.peers.array(self.alive)
        for start in range(0, groups or 1, step):  # of an empty part one empty piece
            where = slice(start, start + step)
            here = None if alive is None else alive[where]
            yield where, self.peers.array(self.scores(where)), here

    def _groups_a_chunk(self):
        "Return a multiple of 8 if there are so many, for `differing` compares eight at a time."
        groups = CHUNK * self.unit // self.group_size
        return max(1, groups // 8 * 8 or groups)


class Cut(NamedTuple):
    "Say where the order of living groups by (score, position) is cut: the groups below it are pruned."
    score: float  # groups with a lower score are pruned
    ties: int  # and so many with this score, the first ones by (layer, position)
    tied: int  # of so many that have it


EVERYTHING = Cut(np.inf, 0, 0)
AT_ONCE = Cut(np.nan, 0, 0)  # it is in `Lowest.decided`


class Decided(NamedTuple):
    "Hold what C code has decided about layers of single weights, in one call."
    keeps: list  # bool (weights,), one a layer
    costs: list  # how many are pruned, one a layer
    found: list  # of `Found`, for the next cut


class Found(NamedTuple):
    """Hold what was found about one layer: decided groups, and those between the bounds of a bracket, to
    be ranked."""
    keep: torch.Tensor  # (groups,) bool, True for living groups above the bracket
    at: torch.Tensor | np.ndarray | slice  # positions of the living groups inside the bracket
    scores: np.ndarray  # their scores
    costs: np.ndarray | int  # their numbers of weights, one int where they are all the same
    cost: int  # number of weights in living groups below the bracket


class Ties(NamedTuple):
    "Hold the groups of one layer that have the score of a cut, by position, those of all processes."
    costs: np.ndarray  # (n,) of each
    at: np.ndarray | None = None  # (n,) positions in the whole layer; None: all of them are in this process, or there is one
    here: np.ndarray | None = None  # positions of those that are here

    def first(self,
        n: int,  # of them
    ) -> int | None:  # None: all
        "Return how many of those that are here are among the first ones."
        if self.at is None: return n
        return int(self.here.searchsorted(self.at[n])) if n < len(self.at) else None


class Lowest:
    """Find the lowest living groups whose weights make up a budget, rounded to the nearest group.

    A strided sample brackets the cut (Floyd & Rivest 1975). One sweep over all scores then keeps the
    groups above the bracket, prunes those below, and collects those inside, which alone are ranked. Where
    a bracket misses the cut, all groups are ranked; where it hits, it is used again for the next cut.

    Where each process has a part of the layers, all rank what all have collected. So `cut` is a coroutine,
    which `peers.in_step` runs: it yields what is found here, and is sent what each process has found."""

    def __init__(self,
        layers: list,  # of `LayerGroups`
    ):
        self.layers, self.found, self.ranks = layers, [], None
        self.told = []  # by layer: of each process (scores, costs) inside the bracket and the cost below it
        self.ties = []  # by layer: `Ties` at the last cut
        self.decided = None  # `Decided`, where the last cut was made at once
        self.peers = layers[0].peers if layers else ALONE
        self.split = any(layer.place is not None for layer in layers)

    def cut(self,
        budget: int | Fraction,  # number of weights to prune, above 0; it may lie between whole numbers where groups are large
    ) -> Cut:
        "Find where to cut the order of groups."
        exact, budget = budget, ceil(budget)  # groups reach the one where they reach the other
        self.decided = None if self.found else _decided(self.layers, floor(exact + Fraction(1, 2)))
        if self.decided is not None: return AT_ONCE
        if self._brackets(budget): return (yield from self._inside(budget, exact))
        few = sum(layer.n_groups for layer in self.layers) <= SAMPLE
        for find in (_everything,) if few else (_bracketed, _everything):
            self.found = yield from find(self.layers, budget)
            told = yield [_told(layer, found) for layer, found in zip(self.layers, self.found)]
            self.told = list(zip(*told))
            self._rank()
            if self._brackets(budget): return (yield from self._inside(budget, exact))
        return EVERYTHING  # there are fewer weights than the budget

    def _below(self):
        "Return the number of weights in groups below the bracket."
        return sum(cost for told in self.told for _, _, cost in told)

    def _brackets(self, budget):
        "Tell whether the cut is among the groups that were collected."
        if not self.ranks: return False
        return self._below() < budget <= self._below() + self.ranks.total

    def _inside(self, budget, exact):
        "Find the cut among the groups inside the bracket."
        below = self._below()
        score = np.float64(self.ranks.reaching(budget - below))  # numpy would round a float to the type of the scores
        self.ties = yield from self._find_ties(score)
        pruned = np.concatenate([ties.costs for ties in self.ties]).cumsum()  # weights in the first n + 1 groups with this score, by position
        lower = below + self.ranks.upto(score) - int(pruned[-1])  # weights in groups with a lower score
        wanted = exact - lower  # of the weights with this score
        last = int(pruned.searchsorted(budget - lower))  # the group that reaches what is wanted: is it nearer with or without it?
        without = int(pruned[last - 1]) if last else 0
        with_it = int(pruned[last])
        ties = last + 1 if with_it - wanted <= wanted - without else last
        return Cut(score, ties, len(pruned))

    def _find_ties(self, score):
        "Return the groups of each layer that have a score."
        equal = [np.flatnonzero(found.scores == score) for found in self.found]
        costs = [_costs_at(found, at) for found, at in zip(self.found, equal)]
        if not self.split: return [Ties(each) for each in costs]
        alone = [_tied_alone(told, score) for told in self.told]
        if sum(map(len, alone)) == 1: return [Ties(each) for each in alone]
        here = [layer.place.positions(_places_of(found, at))
                for layer, found, at in zip(self.layers, self.found, equal)]
        mine = [slice(None) if layer.speaks else slice(0) for layer in self.layers]
        told = yield [(at[which], each[which]) for at, each, which in zip(here, costs, mine)]
        return [_in_order(of_layer, at) for of_layer, at in zip(zip(*told), here)]

    def leave(self,
        layers: list,  # of `LayerGroups`
    ):
        "Take layers out of the competition."
        stay = [i for i, layer in enumerate(self.layers) if not any(layer is other for other in layers)]
        if self.decided is not None:
            self.found = self.decided.found
            self.told = [[_told(layer, found)] for layer, found in zip(self.layers, self.found)]
            self.decided = None
        self.layers = [self.layers[i] for i in stay]
        self.found = [self.found[i] for i in stay if self.found]
        self.told = [self.told[i] for i in stay if self.told]
        self._rank()

    def _rank(self):
        pieces = [(scores, costs) for told in self.told for scores, costs, _ in told]
        self.ranks = Ranks(pieces) if self.found else None

    def remove(self,
        cut: Cut,  # the last one
    ) -> list:  # (keep mask (groups,), number of weights that are pruned), one a layer
        "Return keep masks, and how many weights a cut prunes."
        return list(zip(self.keeps(cut), self.costs(cut)))

    def costs(self,
        cut: Cut,  # the last one
    ) -> list:  # of ints, one a layer
        "Return how many weights a cut prunes, in all processes."
        if cut == EVERYTHING: return [layer.remaining for layer in self.layers]
        if self.decided is not None: return self.decided.costs
        lower = [sum(cost + cost_of(costs, scores < cut.score) for scores, costs, cost in told)
                 for told in self.told]
        going = self._going(cut)
        return [cost + int(ties.costs[:n].sum()) for cost, ties, n in zip(lower, self.ties, going)]

    def _going(self, cut):
        "Return how many ties of each layer are pruned: they are in the order of (layer, position)."
        found, left = [], cut.ties
        for ties in self.ties:
            found.append(min(left, len(ties.costs)))
            left -= found[-1]
        return found

    def keeps(self,
        cut: Cut,  # the last one
    ) -> list:  # keep masks (groups,), one a layer
        "Return keep masks: False for groups that were pruned before and for those below the cut."
        if cut == EVERYTHING: return [torch.zeros_like(layer.alive) for layer in self.layers]
        if self.decided is not None: return self.decided.keeps
        placed = self.peers.sent(self._above(cut), [found.keep.device for found in self.found])
        for found, stays in zip(self.found, placed):
            self.peers.array(found.keep)[found.at] = self.peers.array(stays)
        devices = [layer.alive.device for layer in self.layers]
        return self.peers.sent([found.keep for found in self.found], devices)

    def _above(self, cut):
        "Tell which groups inside the bracket stay: a bool array a layer."
        stay = []
        for found, ties, going in zip(self.found, self.ties, self._going(cut)):
            stays = found.scores > cut.score
            if cut.ties < cut.tied:
                equal = np.flatnonzero(found.scores == cut.score)
                first = ties.first(going)
                if first is not None: stays[equal[first:]] = True
            stay.append(stays)
        return stay


def _decided(layers, budget):
    "Cut layers of single weights in one call of C code; None where it cannot."
    rows, keeps = [], []
    for layer in layers:
        if not layer.is_of_single_weights or not layer.peers.on_host(layer.alive): return None
        terms = terms_of(layer.scores)
        if terms is None or terms.form == 'plain' and len(layers) > 1: return None  # scores of one layer at a time are held
        alive = None if layer.all_alive else layer.peers.array(layer.alive)
        keeps.append(torch.empty_like(layer.alive))
        rows.append(Row(terms, alive, layer.n_alive, layer.peers.array(keeps[-1])))
    pruned = cut(rows, budget) if rows else None
    if pruned is None: return None
    found = [Found(keep, of.at, of.scores, 1, of.below) for keep, of in zip(keeps, pruned)]
    return Decided(keeps, [of.n for of in pruned], found)


def _told(layer, found):
    "Return what this process tells the others of a layer."
    if layer.speaks: return found.scores, found.costs, found.cost
    return found.scores[:0], found.costs if isinstance(found.costs, int) else found.costs[:0], 0


def _tied_alone(told, score):
    "Return the costs of what has a score in one layer, from what each process has told."
    each = [spread(costs, len(scores))[scores == score] for scores, costs, _ in told]
    return np.concatenate(each)


def _in_order(told, here):
    "Return the ties of a layer in the order of their positions, from those of each process."
    at = np.concatenate([places for places, _ in told])
    costs = np.concatenate([each for _, each in told])
    order = at.argsort()
    return Ties(costs[order], at[order], here)


def _places_of(found, at):
    "Return the positions, in what is here of the layer, of some of the groups inside the bracket."
    if not isinstance(found.at, slice): return ALONE.fetched([found.at])[0][at]
    return at + (found.at.start or 0)


def _costs_at(found, at):
    "Return the costs of some of the groups inside the bracket, one number for each."
    if isinstance(found.costs, int): return spread(found.costs, len(at))
    return found.costs[at]


def _everything(layers, budget):
    "Collect all living groups; a coroutine that asks nothing."
    scores = _ordered(layers, [layer.joined_scores() for layer in layers])
    found = []
    for layer, scored, (at, costs) in zip(layers, scores, _living(layers, [slice(None)] * len(layers))):
        where = at if isinstance(at, slice) else np.flatnonzero(at)
        found.append(Found(torch.zeros(len(layer.alive), dtype=torch.bool), where, scored[at], costs, 0))
    yield from ()
    return found


def _bracketed(layers, budget):
    "Collect the groups near the cut, by a bracket from a sample."
    lo, hi = yield from _bracket(layers, budget)
    apart = iter(_sweep_apart([layer for layer in layers if not layer.peers.on_host(layer.alive)], lo, hi))
    return [_sweep(layer, lo, hi) if layer.peers.on_host(layer.alive) else next(apart) for layer in layers]


def _bracket(layers, budget):
    """Return two scores three standard errors about the estimated cut, which most likely lies between them
    or at one of them."""
    step = round(sum(layer.n_groups for layer in layers) ** (1 / 3)) | 1  # odd, to fall out of step with kernels
    wheres, at = [], 0
    for layer in layers:
        wheres.append(slice(-at % step, None, step))
        at += len(layer.alive)
    scores = _ordered(layers, [layer.scores(where) for layer, where in zip(layers, wheres)])
    sample = [(scored[living], costs) for scored, (living, costs) in zip(scores, _living(layers, wheres))]
    told = yield [piece for layer, piece in zip(layers, sample) if layer.speaks]
    ranks = Ranks([piece for of_one in told for piece in of_one], step)
    share = min(budget / ranks.total, 1) if ranks.total else 1
    error = 3 * (share * (1 - share) * ranks.squares) ** .5 + step
    lo = ranks.reaching(budget - error) if budget > error else -np.inf
    return lo, ranks.reaching(budget + error)


def _ordered(layers, scores):
    "Return scores as arrays, with -inf for NaN, which a user's context may compute."
    return [_nan_lowest(scored) for scored in _peers(layers).fetched(scores)]


def _nan_lowest(scores):
    if not np.isnan(scores.max(initial=-np.inf)): return scores
    return np.where(np.isnan(scores), -np.inf, scores)


def _peers(layers): return layers[0].peers if layers else ALONE


def _living(layers, wheres):
    "Yield for each layer's slice an index of its living groups, and their costs: arrays, slices and ints."
    peers = _peers(layers)
    both = list(zip(layers, wheres))
    alive = iter(peers.fetched([layer.alive[where] for layer, where in both if not layer.all_alive]))
    costs = iter(peers.fetched([layer.costs[where] for layer, where in both if layer.costs is not None]))
    for layer in layers:
        living = slice(None) if layer.all_alive else next(alive)
        yield living, layer.group_size if layer.costs is None else next(costs)[living]


def terms_of(
    scores: Callable,  # of a `LayerGroups`
) -> Terms | None:
    "Return what C code can compute all the scores of a layer from, None where it cannot."
    terms = getattr(scores, 'terms', None)
    return None if terms is None else terms()


def _sweep(layer, lo, hi):
    "Decide about the groups above and below a bracket, and collect those inside."
    keep = torch.empty_like(layer.alive)
    at, inside, stay = _compiled_sweep(layer, lo, hi, keep) or _numpy_sweep(layer, lo, hi, keep)
    if layer.costs is None:
        below = layer.alive_here - stay - len(at)
        return Found(keep, at, inside, layer.group_size, layer.group_size * below)
    costs = layer.peers.array(layer.costs)[at]
    kept = int((layer.costs * keep).sum())
    return Found(keep, at, inside, costs, layer.remaining_here - kept - int(costs.sum()))


def _compiled_sweep(layer, lo, hi, keep):
    terms = terms_of(layer.scores)
    if terms is None: return None
    alive = None if layer.all_alive else layer.peers.array(layer.alive)
    return sweep(terms, alive, lo, hi, layer.peers.array(keep))


def _numpy_sweep(layer, lo, hi, keep):
    "Do so chunk by chunk: return positions and scores inside the bracket, and how many are above it."
    at, inside, stay = [], [], 0
    kept_array = layer.peers.array(keep)
    for where, scores, alive in layer.chunks():
        above, reached = kept_array[where], scores >= lo
        np.greater(scores, hi, out=above)
        if alive is not None:
            above &= alive
            reached &= alive
        here = differing(above, reached)
        stay += layer.peers.count(above)
        inside.append(scores[here])
        at.append(here + where.start if where.start else here)
    return joined(at), joined(inside), stay


def _sweep_apart(layers, lo, hi):
    """Decide about the groups above and below a bracket, and collect those inside, where a GPU has the
    scores.

    Each layer is compared as a whole, and the host waits for all of them together, not for each."""
    keeps, reached, counts = [], [], []
    for layer in layers:
        scores = layer.scores(slice(None))
        keep, reach = torch.as_tensor(scores > hi), torch.as_tensor(scores >= lo)
        if not layer.all_alive: keep, reach = keep & layer.alive, reach & layer.alive
        cost = layer.group_size * keep.sum() if layer.costs is None else (layer.costs * keep).sum()
        keeps.append(keep)
        reached.append(reach)
        counts.append(torch.stack([reach.sum() - keep.sum(), cost]))
    peers = _peers(layers)
    counts = [count.tolist() for count in peers.fetched(counts)]
    ats = [_places(keep ^ reach, n) for keep, reach, (n, _) in zip(keeps, reached, counts)]
    scores = peers.fetched([layer.scores(at) for layer, at in zip(layers, ats)])
    some = [(layer, at) for layer, at in zip(layers, ats) if layer.costs is not None]
    costs = iter(peers.fetched([layer.costs[at] for layer, at in some]))
    found = []
    for layer, keep, at, inside, (n, above) in zip(layers, keeps, ats, scores, counts):
        each = layer.group_size if layer.costs is None else next(costs)
        below = layer.remaining_here - above - cost_of_all(each, n)
        found.append(Found(keep, at, inside, each, below))
    return found


def _places(mask, n):
    "Find the n positions at which a mask is True. `nonzero` would do it too, but the host would wait for it."
    wanted = torch.arange(1, n + 1, dtype=torch.int32, device=mask.device)
    return torch.searchsorted(mask.cumsum(0, dtype=torch.int32), wanted)
