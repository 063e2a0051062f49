"Which are the lowest: exact, at any size, without gathering the scores."
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

SAMPLE = 4096  # scores taken from each chunk to guess where the cut will be


class Cut(NamedTuple):
    "Where the order of groups by (score, position) is cut: the groups below go."
    score: float  # all with a lower score go
    ties: int  # and so many with just this score, the first ones by position

    def keep(self,
        scores: torch.Tensor,  # (n,), the next chunk
        tied: int,  # how many scores equal to the cut's came in the chunks before
    ) -> tuple:  # keep mask (n,); `tied` for the next chunk
        "What stays of one chunk."
        keep = scores > self.score
        equal = (scores == self.score).nonzero().flatten()
        keep[equal[max(self.ties - tied, 0):]] = True
        return keep, tied + len(equal)


def lowest(
    chunks: Callable[[], Iterable],  # gives (scores (n,) float32, weights a group: int or (n,) ints) chunk by chunk, the same each time
    budget: int,  # how many weights shall go
) -> Cut:
    """The cut that removes the lowest groups until `budget` weights are gone, to the nearest group, halves upward.

    A strided sample brackets the cut (Floyd & Rivest 1975); one sweep sums what lies below the bracket and collects
    what lies inside; only that is sorted. A bracket that misses is given up for a wider one. A score of -inf means
    'gone already', +inf 'spared'."""
    if budget <= 0: return Cut(-torch.inf, 0)
    for lo, hi in (_bracket(chunks, budget), (-torch.inf, torch.inf), (None, torch.inf)):
        below, scores, costs = _sweep(chunks, lo, hi)
        total = below + int(costs.sum())
        if below < budget <= total: return _cut(below, scores, costs, budget)
        if below < budget and hi == torch.inf: return Cut(torch.inf, 0)  # all there is does not fill the budget


def _cut(below, scores, costs, budget):
    "The cut among `scores`, given by position, where `below` weights go before them."
    scores, order = scores.sort(stable=True)
    gone = below + costs[order].cumsum(0)
    reaching = int(torch.searchsorted(gone, budget))  # the group with which the budget is reached
    short = budget - (int(gone[reaching - 1]) if reaching else below)
    take = reaching + (int(gone[reaching]) - budget <= short)
    cut = scores[max(take - 1, 0)]
    return Cut(float(cut), int((scores[:take] == cut).sum()))


def _bracket(chunks, budget):
    "Two scores, four standard errors about the estimated place of the cut: it most likely lies above the one and not above the other."
    scores, weights, variance = [], [], 0.
    for s, cost in chunks():
        step = max(1, len(s) // SAMPLE) | 1  # odd, to fall out of step with kernels
        scores.append(s[::step].cpu())
        weights.append(spread(cost, s)[::step].cpu() * step)  # each stands for its neighbours
        if step > 1: variance += float(weights[-1].double().square().sum()) / 4
    scores, order = torch.cat(scores).sort()
    gone, error = torch.cat(weights)[order].cumsum(0).double(), variance ** .5
    lo, hi = torch.searchsorted(gone, torch.tensor([budget - 4 * error, budget + 4 * error], dtype=torch.double)).tolist()
    lower = int(torch.searchsorted(scores, scores[min(lo, len(scores) - 1)]))  # how many lie strictly below
    return float(scores[lower - 1]) if lower else -torch.inf, float(scores[hi]) if hi < len(scores) else torch.inf


def _sweep(chunks, lo, hi):
    "The weights of the groups scored up to `lo`; scores and weights of those above it up to `hi`, by position."
    below, scores, costs = 0, [], []
    for s, cost in chunks():
        cost = spread(cost, s)
        above = s > lo if lo is not None else torch.ones_like(s, dtype=torch.bool)
        inside = above & (s <= hi) & (s < torch.inf)
        below += int(cost[~above].sum())
        scores.append(s[inside].cpu())
        costs.append(cost[inside].cpu())
    return below, torch.cat(scores), torch.cat(costs)


def spread(
    cost: int | torch.Tensor,  # weights a group: one number for all, or (n,) ints
    scores: torch.Tensor,  # (n,)
) -> torch.Tensor:  # (n,) ints
    "One cost for each group."
    return cost if isinstance(cost, torch.Tensor) else torch.full((len(scores),), cost, device=scores.device)
