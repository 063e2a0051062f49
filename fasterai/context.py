"Who competes with whom: how a sparsity becomes a keep mask for each layer."
import warnings
from dataclasses import replace
from fractions import Fraction

import torch

from fasterai.selection import EVERYTHING, count, lowest, remove


def compete(
    parts: list,  # of `selection.Part`, one a layer
    fraction: Fraction,  # of the weights of all layers together
) -> list:  # keep masks (groups,), one a layer
    "Remove the lowest groups of all layers together; a layer that would be left with none keeps its best, and a warning names it."
    budget = round(fraction * sum(p.weights for p in parts)) - sum(p.gone for p in parts)
    if budget <= 0: return [p.alive for p in parts]
    keeps = _removed(parts, budget)
    empty = [p.name for p, keep in zip(parts, keeps) if not count(keep) and count(p.alive)]
    if fraction == 1 or not empty: return keeps
    warnings.warn(f'sparsity: {", ".join(map(repr, empty))} would have been left without weights and kept the best group; '
                  'ask for less, or leave it out by layers=', stacklevel=2)
    return _removed([replace(p, spared=_best(p)) for p in parts], budget)


def _removed(parts, budget):
    cut = lowest(parts, budget)
    keeps = list(remove(parts, cut))
    largest = max(int(p.costs.max()) if p.costs is not None else p.size for p in parts)
    gone = sum(_cost(p, keep) for p, keep in zip(parts, keeps))
    if abs(gone - budget) >= largest and cut != EVERYTHING:
        raise RuntimeError('criteria: the scores of a layer were not the same when they were asked for again; a criterion is a pure function')
    return keeps


def _cost(part, keep):
    "The weights that go with a keep mask."
    if part.costs is None: return part.size * (count(part.alive) - count(keep))
    return int(part.costs[part.alive & ~keep].sum())


def _best(part):
    "The living group that goes last, None if there is none."
    scores = part.scores(slice(None)).masked_fill(~part.alive, -torch.inf)
    return len(scores) - 1 - int(scores.flip(0).argmax()) if count(part.alive) else None


def local(parts, fraction):
    "Each layer for itself reaches the sparsity."
    return [compete([part], fraction)[0] for part in parts]


CONTEXTS = {'local': local, 'global': compete}
