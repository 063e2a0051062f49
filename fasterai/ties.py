"Find the filters that are pruned together: those that meet in a sum, a product, or a group of channels."
from typing import NamedTuple

import numpy as np

from fasterai.connected import lowest_connected
from fasterai.dataflow import Flow


class Tie(NamedTuple):
    "Say which filters of several layers are one group. A group may have none, or several, of a layer."
    groups: int
    of_filters: dict  # id of a weight: ints (filters,), the group of each

    def parts(self,
        weights: list,  # ids of those of interest
    ) -> list:  # of ints (n,), rising: the groups of each part
        """Part the groups by how many filters they have of which layer.

        Each part is pruned to the sparsity, so that each layer is."""
        counts = [np.bincount(self.of_filters[weight], minlength=self.groups) for weight in weights]
        _, part = np.unique(np.stack(counts), axis=1, return_inverse=True)
        return [np.flatnonzero(part.reshape(-1) == i) for i in range(part.max() + 1)]


def ties(
    flow: Flow,
    groups: dict,  # id of the weight of a selected layer: ints (filters,), which of them the granularity prunes as one
) -> tuple:  # list of `Tie`; set of ids of weights that meet what is not selected; and of those whose filters all meet
    "Find which filters of the selected layers are pruned together."
    filters, meetings = flow.meetings()
    total = sum(count for _, count in filters.values())
    owner = np.zeros(total, int)  # the number of the layer of each filter
    weights = list(filters)
    for i, (first, count) in enumerate(filters.values()): owner[first:first + count] = i
    selected = np.array([i in groups and len(groups[i]) == filters[i][1] for i in weights], bool)
    own = [_of_one_group(first, groups[i]) for i, (first, count) in filters.items() if i in groups]
    needed = [(m.one, m.other) for m in meetings if m.needed] + own
    allowed = _apart_from_others(_components(total, needed), owner, selected)
    enough = [_only((m.one, m.other), allowed[owner]) for m in meetings if not m.needed]
    found, collapsed = [], set()
    for tie in _described(_components(total, needed + enough), owner, allowed, filters):
        if tie.groups == 1 and max(map(len, tie.of_filters.values())) > 1: collapsed |= set(tie.of_filters)
        elif len(tie.of_filters) > 1 or _is_new(tie, groups): found.append(tie)
    return found, {weights[i] for i in np.flatnonzero(selected & ~allowed)}, collapsed


def _is_new(tie, groups):
    "Tell whether a tie of one layer has other groups than the granularity."
    return any(tie.groups < len(np.unique(groups[weight])) for weight in tie.of_filters)


def _of_one_group(first, groups):
    "Return pairs of filters of one layer that are pruned as one."
    order = np.argsort(groups, kind='stable')
    same = groups[order][1:] == groups[order][:-1]
    return first + order[:-1][same], first + order[1:][same]


def _only(pair, allowed):
    "Leave out the pairs of which one is not allowed."
    one, other = pair
    both = allowed[one] & allowed[other]
    return one[both], other[both]


def _components(n, pairs):
    "Number what is connected by pairs: ints (n,), the lowest number of each connected set."
    if not pairs: return np.arange(n)
    one, other = (np.concatenate([np.asarray(pair[i], int).reshape(-1) for pair in pairs]) for i in (0, 1))
    return lowest_connected(n, one, other)


def _apart_from_others(components, owner, selected):
    "Find the selected layers of which no filter meets one of another layer: bool (layers,)."
    while True:
        with_others = np.zeros(len(components), bool)
        with_others[components[~selected[owner]]] = True
        apart = selected.copy()
        apart[owner[with_others[components]]] = False
        if np.array_equal(apart, selected): return apart
        selected = apart


def _described(components, owner, allowed, filters):
    "Yield a `Tie` for each set of allowed layers that are connected."
    weights = list(filters)
    together = _components(len(weights), [(owner, owner[components])])
    for first in np.unique(together[allowed]):
        members = [weights[i] for i in np.flatnonzero(together == first) if allowed[i]]
        pieces = [components[at:at + count] for at, count in (filters[weight] for weight in members)]
        of_all, numbers = np.unique(np.concatenate(pieces), return_inverse=True)
        ends = np.cumsum([len(piece) for piece in pieces])
        yield Tie(len(of_all), dict(zip(members, np.split(numbers, ends[:-1]))))
