"n:m: of every m weights that follow each other along the input axis n stay."
import re
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import torch

from fasterai.peers import ALONE
from fasterai.selection import Lowest


@dataclass(frozen=True)
class pattern:
    """n of every m weights that follow each other along the input axis stay; of the r at the end that do not fill up m, r·n/m rounded up.

    Each layer for itself. While less than the pattern is due, the lowest of those that it will take are gone."""
    n: int
    m: int

    def __post_init__(self):
        if not 1 <= self.n < self.m:
            raise ValueError(f"context: got '{self.n}:{self.m}', allowed is 'n:m' with n from 1 and smaller than m, as '2:4'")

    @property
    def sparsity(self) -> Fraction: return 1 - Fraction(self.n, self.m)

    def __call__(self, layers, fraction): return [self._one(layer, fraction / self.sparsity) for layer in layers]

    def _one(self, layer, share):
        "The keep mask of one layer, where a share of the pattern is due."
        scores = np.where(layer.alive.cpu().numpy(), layer.all_scores(), -np.inf)
        keep = torch.from_numpy(self._lines(scores, layer)).to(layer.alive.device) & layer.alive
        if share >= 1: return keep
        due = round(share * (layer.n_weights - ALONE.count(keep))) - layer.zeros
        if due <= 0: return layer.alive
        order = Lowest([replace(layer, alive=layer.alive & ~keep)])
        (rest, _), = order.remove(order.cut(due))
        return keep | rest

    def _lines(self, scores, layer):
        "The pattern over a whole layer: each is ranked among its m; ties fall by position."
        sizes, at = tuple(layer.axes.values()), list(layer.axes).index('I')
        lines = np.moveaxis(scores.reshape(sizes), at, 0)  # (I, …)
        keep = np.empty(lines.shape, bool)
        for start in range(0, len(lines), self.m):
            group = lines[start:start + self.m]
            stay = -(-len(group) * self.n // self.m)
            keep[start:start + self.m] = _ranks(group) >= len(group) - stay
        return np.ascontiguousarray(np.moveaxis(keep, 0, at)).reshape(-1)

    def __repr__(self): return f"'{self.n}:{self.m}'"


def _ranks(group):
    "How many of a line go before each entry: compared two by two, which is faster than a sort of so few."
    before = np.zeros(group.shape, np.int16)
    for i in range(len(group)):
        for j in range(i):
            first = group[j] <= group[i]
            before[i] += first
            before[j] += ~first
    return before


def read_pattern(
    text: str,  # as '2:4'
) -> pattern | None:  # None where it is none
    "The pattern that is meant."
    if not re.fullmatch(r'\d+:\d+', text): return None
    return pattern(*map(int, text.split(':')))
