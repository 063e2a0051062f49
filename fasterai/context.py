"Who competes with whom: how a sparsity becomes a keep mask for each layer."
import warnings
from fractions import Fraction

import numpy as np

from fasterai.selection import Lowest, places


def compete(
    parts: list,  # of `selection.Part`, one a layer
    fraction: Fraction,  # of the weights of all layers together
) -> list:  # keep masks (groups,), one a layer
    "Remove the lowest groups of all layers together; a layer that would be left with none keeps its best, and a warning names it."
    budget = round(fraction * sum(p.weights for p in parts)) - sum(p.gone for p in parts)
    if budget <= 0: return [p.alive for p in parts]
    order, spared = Lowest(parts), {}
    while True:  # what is spared stands in the order where it did, so as much more is asked for
        removed = order.remove(order.cut(budget + sum(cost for _, cost in spared.values())))
        empty = [i for i, (part, (_, n)) in enumerate(zip(parts, removed)) if part.living == n > 0] if fraction < 1 else []
        if empty == list(spared): break
        spared = {i: spared.get(i) or _best(parts[i]) for i in empty}
    keeps = [keep for keep, _ in removed]
    for i, (group, _) in spared.items(): keeps[i][group] = True
    if spared:
        warnings.warn(f'sparsity: {", ".join(repr(parts[i].name) for i in spared)} would have been left without weights and kept the best group; '
                      'ask for less, or leave it out by layers=', stacklevel=2)
    return keeps


def _best(part):
    "The living group that goes last, and its weights."
    best, group = -np.inf, None
    for where, scores, alive in part.chunks():
        living = scores if alive is None else scores[alive]
        if not len(living) or living.max() < best: continue
        best = living.max()
        group = where.start + int(places(scores == best if alive is None else (scores == best) & alive)[-1])
    return group, part.size if part.costs is None else int(part.costs[group])


def local(parts, fraction):
    "Each layer for itself reaches the sparsity."
    return [compete([part], fraction)[0] for part in parts]


CONTEXTS = {'local': local, 'global': compete}
