"Exchange groups within a layer: the lowest that live for the best that are gone, so that its count stays."
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from fasterai.selection import LayerGroups, Lowest


class Side(NamedTuple):
    "Hold groups that may be exchanged, those of a place one after the other, the first to go or come first."
    at: torch.Tensor  # (n,) positions
    place: torch.Tensor  # (n,)
    rank: torch.Tensor  # (n,) how many of the same place are before it

    def first(self, counts):
        "Return the positions of the first few of each place."
        return self.at[self.rank < counts[self.place]]


def exchanged(
    groups: LayerGroups,  # as they are, with the scores by which the lowest go
    may_go: torch.Tensor,  # (groups,) bool, of those that are alive
    may_come: torch.Tensor,  # (groups,) bool, of those that are gone
    gone: Callable,  # (where) -> (n,), the scores by which the highest come
    n: int,  # how many groups are exchanged; fewer where not so many can be
    places: torch.Tensor | None = None,  # (groups,) ints: a group is exchanged for one of the same number; None: all have the same size, and any will do
) -> torch.Tensor:  # (groups,) bool: which are alive then
    "Exchange groups of one layer; ties by position."
    if places is not None: return _by_place(groups, may_go, may_come, gone, n, places)
    there = int(may_come.sum())
    n = min(n, int(may_go.sum()), there)
    stay = _without_lowest(groups, may_go, groups.scores, n)
    come = _without_lowest(groups, may_come, gone, there - n)
    return groups.alive & ~may_go | stay | come


def _without_lowest(groups, some, scores, n):
    "Return some groups without the n lowest: a bool (groups,)."
    if not n: return some
    order = Lowest([replace(groups, alive=some, scores=scores, costs=None)])
    cut, = groups.peers.in_step([order.cut(n * groups.group_size)])
    (keep, _), = order.remove(cut)
    return keep


def _by_place(groups, may_go, may_come, gone, n, places):
    scores, = groups.peers.sent([groups.joined_scores()], [places.device])
    out, into = _in_order(may_go, scores, places), _in_order(may_come, -gone(slice(None)), places)
    out = out.first(_counts(places[may_come], places))
    out = out[scores[out].argsort(stable=True)[:n]]
    into = into.first(_counts(places[out], places))
    keep = groups.alive.clone()
    keep[out], keep[into] = False, True
    return keep


def _in_order(chosen, scores, places):
    at = chosen.nonzero().flatten()
    at = at[scores[at].argsort(stable=True)]
    at = at[places[at].argsort(stable=True)]
    place = places[at]
    rank = torch.arange(len(at), device=at.device) - torch.searchsorted(place, place)
    return Side(at, place, rank)


def _counts(some, places):
    "Count how often each place is among some."
    return torch.bincount(some, minlength=int(places.max()) + 1)
