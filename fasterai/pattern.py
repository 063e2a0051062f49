"Prune by an N:M pattern: of every m weights that follow each other along the input axis, n stay."
import re
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from fasterai.selection import Lowest


@dataclass(frozen=True)
class pattern:
    """Keep the n best of every m weights that follow each other along the input axis, in each layer.

    Of the r weights at the end that do not fill up m, r·n/m stay, rounded up. While a schedule asks for
    less than the whole pattern, the lowest of those weights are pruned that the whole pattern will prune."""
    n: int  # weights that stay
    m: int  # of so many

    def __post_init__(self):
        if 1 <= self.n < self.m: return
        raise ValueError(f"context: got '{self.n}:{self.m}', "
                         "expected 'n:m' with n from 1 and smaller than m, as '2:4'")

    @property
    def sparsity(self) -> Fraction:
        "Return the share of zeros that the whole pattern makes."
        return 1 - Fraction(self.n, self.m)

    def __call__(self, layers, fraction):
        return [self._prune(layer, fraction / self.sparsity) for layer in layers]

    def _prune(self, layer, share):
        "Return the keep mask of one layer, where this share of the pattern is wanted."
        scores, (alive,) = layer.all_scores(), layer.peers.fetched([layer.alive])
        keep, = layer.peers.sent([self._whole_pattern(scores, alive, layer)], [layer.alive.device])
        keep = keep & layer.alive
        if share >= 1: return keep
        to_prune = round(share * (layer.n_weights - layer.peers.count(keep))) - layer.zeros
        if to_prune <= 0: return layer.alive
        order = Lowest([replace(layer, alive=layer.alive & ~keep)])
        cut, = layer.peers.in_step([order.cut(to_prune)])
        (rest, _), = order.remove(cut)
        return keep | rest

    def _whole_pattern(self, scores, alive, layer):
        "Return the keep mask of the whole pattern, as an array; of equal weights the first ones are pruned."
        sizes, at = tuple(layer.axes.values()), list(layer.axes).index('I')
        lines, living = (np.moveaxis(v.reshape(sizes), at, 0) for v in (scores, alive))  # (I, …)
        keep = np.empty(lines.shape, bool)
        for start in range(0, len(lines), self.m):
            here = slice(start, start + self.m)
            line = lines[here]
            stay = -(-len(line) * self.n // self.m)
            ranks = _ranks(line, None if layer.all_alive else living[here])
            keep[here] = ranks >= len(line) - stay
        return np.ascontiguousarray(np.moveaxis(keep, 0, at)).reshape(-1)

    def places(self,
        axes: dict,  # name: size, of a weight
    ) -> np.ndarray:  # (weights,)
        "Number the weights by the m that they are among."
        at = list(axes).index('I')
        sizes = [-(-size // self.m) if axis == 'I' else size for axis, size in axes.items()]
        blocks = np.arange(np.prod(sizes)).reshape(sizes)
        return blocks.take(np.arange(axes['I']) // self.m, at).reshape(-1)

    def __repr__(self): return f"'{self.n}:{self.m}'"


def _ranks(line, alive):
    """Rank the entries along the first axis, those that are pruned already before the others; None: none is.

    They are compared two by two, which for so few is faster than a sort."""
    before = np.zeros(line.shape, np.int16)
    for i in range(len(line)):
        for j in range(i):
            first = line[j] <= line[i]
            if alive is not None: first = np.where(alive[j] == alive[i], first, alive[i])
            before[i] += first
            before[j] += ~first
    return before


def read_pattern(
    text: str,  # as '2:4'
) -> pattern | None:  # None where it is no pattern
    "Read an N:M pattern."
    if not re.fullmatch('[0-9]+:[0-9]+', text): return None
    n, m = map(int, text.split(':'))
    return pattern(n, m)
