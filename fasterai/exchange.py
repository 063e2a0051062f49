"Exchange groups within a layer: the lowest that live for the best that are gone, so that its count stays."
from typing import NamedTuple

import torch


class Side(NamedTuple):
    "Hold groups that may be exchanged, those of a place one after the other, the first to go or come first."
    at: torch.Tensor  # (n,) positions
    place: torch.Tensor  # (n,)
    rank: torch.Tensor  # (n,) how many of the same place are before it

    def first(self, counts):
        "Return the positions of the first few of each place."
        return self.at[self.rank < counts[self.place]]


def exchanged(
    alive: torch.Tensor,  # (groups,) bool
    going: tuple,  # which may go, bool (groups,), and scores (groups,): the lowest go
    coming: tuple,  # which may come, bool (groups,), and scores (groups,): the highest come
    n: int,  # how many groups are exchanged; fewer where not so many can be
    places: torch.Tensor | None = None,  # (groups,) ints: a group is exchanged for one of the same number; None: for any
) -> torch.Tensor:  # (groups,) bool: which are alive then
    "Exchange groups of one layer; ties by position."
    if places is None: places = alive.new_zeros(len(alive), dtype=torch.int64)
    (may_go, scores), (may_come, new) = going, coming
    out, into = _in_order(may_go, scores, places), _in_order(may_come, -new, places)
    out = out.first(_counts(places[may_come], places))
    out = out[scores[out].argsort(stable=True)[:n]]
    into = into.first(_counts(places[out], places))
    keep = alive.clone()
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
