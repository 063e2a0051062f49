"Who competes with whom: how a sparsity becomes a keep mask for each layer."
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch

from fasterai.selection import lowest, spread


@dataclass
class Competitor:
    "What a context knows of a layer."
    name: str
    weights: int  # how many in all
    stranded: int  # zeros inside groups that live; they count as gone whatever is decided
    cost: int | torch.Tensor  # weights that go with a group: an int, or (groups,) ints
    scores: Callable[[], torch.Tensor]  # gives (groups,) float32, -inf for what is gone already, the same each time


def compete(
    layers: list,  # of `Competitor`
    fraction: Fraction,  # of the weights of all `layers` together
) -> list:  # keep masks (groups,), one a layer
    "Remove the lowest groups of all layers together; a layer that would be left with none keeps its best, and a warning names it."
    budget = round(fraction * sum(layer.weights for layer in layers)) - sum(layer.stranded for layer in layers)
    keeps = _keeps(layers, budget, {})
    if fraction == 1: return keeps
    empty = [layer.name for layer, keep in zip(layers, keeps) if not keep.any() and _best(layer) is not None]
    if not empty: return keeps
    warnings.warn(f'sparsity: {", ".join(map(repr, empty))} would have been left without weights and kept the best group; '
                  'ask for less, or leave it out by layers=', stacklevel=2)
    return _keeps(layers, budget, {layer.name: _best(layer) for layer in layers})


def _best(layer):
    "The group that goes last, None if all are gone."
    scores = layer.scores()
    return len(scores) - 1 - int(scores.flip(0).argmax()) if scores.max() > -torch.inf else None


def _keeps(layers, budget, spared):
    def chunk(layer):
        scores = layer.scores()
        if spared.get(layer.name) is not None: scores[spared[layer.name]] = torch.inf
        return scores
    cut = lowest(lambda: ((chunk(layer), layer.cost) for layer in layers), budget)
    keeps, tied = [], 0
    for layer in layers:
        keep, tied = cut.keep(chunk(layer), tied)
        keeps.append(keep)
    gone = sum(int(spread(layer.cost, keep)[~keep].sum()) for layer, keep in zip(layers, keeps))
    nearest = max(int(torch.as_tensor(layer.cost).max()) for layer in layers)
    if abs(gone - max(budget, 0)) >= nearest and cut.score < torch.inf:
        raise RuntimeError('criteria: the scores of a layer were not the same when they were asked for again; a criterion is a pure function')
    return keeps


def local(layers, fraction):
    "Each layer for itself reaches the sparsity."
    return [compete([layer], fraction)[0] for layer in layers]


CONTEXTS = {'local': local, 'global': compete}
