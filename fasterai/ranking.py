"Find the score up to which a given number of weights lie, among scores with a cost each."
from math import ceil

import numpy as np
import torch

from fasterai.peers import ALONE

FEW = 1 << 10  # scores: of so few a partition finds the k-th at once


class Ranks:
    "Hold scores and their costs, and find the score up to which a budget reaches."

    def __init__(self,
        pieces: list,  # of (scores (n,), costs: int or (n,))
        times: int = 1,  # how many groups each stands for, where they are a sample
    ):
        pieces = [(s, c) for s, c in pieces if len(s)] or [(np.empty(0, np.float32), 0)]
        self.times = times
        self.scores = joined([scores for scores, _ in pieces])
        self.costs = joined_costs(pieces)

    def upto(self, score):
        "Return the number of weights in groups with this score or a lower one."
        return self.times * cost_of(self.costs, self.scores <= score)

    @property
    def total(self) -> int:
        "Return the number of weights in all groups."
        return self.times * cost_of_all(self.costs, len(self.scores))

    @property
    def squares(self) -> int:
        "Return the sum of the squared costs; the error of a sample grows with its root."
        return self.times ** 2 * cost_of_all(self.costs ** 2, len(self.scores))

    def reaching(self, budget):
        "Return the lowest score up to which so many weights lie; inf if there are fewer."
        if budget > self.total: return np.inf
        return float(reaching(self.scores, self.costs, budget / self.times))


def joined_costs(
    pieces: list,  # of (scores (n,), costs: int or (n,))
):  # one int where all cost the same, else (n,)
    "Join the costs of several pieces."
    first = pieces[0][1]
    if all(isinstance(costs, int) and costs == first for _, costs in pieces): return first
    return np.concatenate([spread(costs, len(scores)) for scores, costs in pieces])


def spread(costs, n):
    "Repeat one cost for n groups; costs of single groups stay as they are."
    return np.full(n, costs) if isinstance(costs, int) else costs


def cost_of_all(costs, n):
    "Return what n groups cost together."
    return costs * n if isinstance(costs, int) else int(costs.sum())


def cost_of(costs, chosen):
    "Return what the chosen groups cost together; `chosen` is bool (n,)."
    return costs * ALONE.count(chosen) if isinstance(costs, int) else int(costs @ chosen)


def joined(pieces: list):  # of arrays, or of tensors
    "Join several pieces to one."
    if len(pieces) == 1: return pieces[0]
    if isinstance(pieces[0], np.ndarray): return np.concatenate(pieces)
    return torch.cat(pieces)


def reaching(scores, costs, budget):
    """Return the lowest score up to which groups of this total cost lie.

    A sample brackets it again and again, until few scores are left to sort: several times faster than a
    sort of all."""
    slack = 1.5
    while len(scores) >= FEW:
        lo, hi = _sampled(scores, costs, budget, slack)
        below, upto = scores < lo, scores <= hi
        inside, less = differing(below, upto), cost_of(costs, below)
        if len(inside) == len(scores): break
        among = costs if isinstance(costs, int) else costs[inside]
        if less < budget <= less + cost_of_all(among, len(inside)):
            scores, costs, budget = scores[inside], among, budget - less
        else:
            slack *= 4  # the bracket missed
    if isinstance(costs, int):
        place = ceil(budget / costs) - 1
        return np.partition(scores, place)[place]
    order = scores.argsort()
    return scores[order[costs[order].cumsum().searchsorted(budget)]]


def _sampled(scores, costs, budget, slack):
    "Return two scores between which the wanted one most likely lies, estimated from a sample."
    step = round(len(scores) ** (1 / 3))
    sample = scores[::step]
    if isinstance(costs, int):
        sample = np.sort(sample)
        at = budget / (costs * step)
    else:
        order = sample.argsort()
        sample = sample[order]
        at = costs[::step][order].cumsum().searchsorted(budget / step)
    error = slack * (at * (1 - at / len(sample))) ** .5 + slack
    least, most = int(at - error), int(at + error) + 1
    lo = sample[least] if least > 0 else -np.inf
    hi = sample[most] if most < len(sample) else np.inf
    return lo, hi


def differing(
    some: np.ndarray,  # bool (n,)
    others: np.ndarray,
) -> np.ndarray:  # ints
    "Find the positions at which two masks differ."
    if len(some) % 8: return np.flatnonzero(some ^ others)
    # Few entries differ, so most words of eight bytes are equal: compare words, then the bytes of those
    # that differ.
    some, others = some.view(np.uint64), others.view(np.uint64)
    words = np.flatnonzero(some != others)
    at = np.flatnonzero((some[words] ^ others[words]).view(bool))
    return words[at >> 3] * 8 + (at & 7)
