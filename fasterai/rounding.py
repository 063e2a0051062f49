"Round how many filters stay in each layer: kernels run best on multiples of 8 and the like."
from math import ceil

import numpy as np


def rounded(
    layers: list,  # of `LayerGroups`
    keeps: list,  # keep masks (groups,) that a context has decided on, one a layer
    multiple: int,  # of so many groups
) -> list:  # keep masks (groups,), one a layer
    """Round the number of groups that stay in each layer to the nearest multiple; ties keep more.

    Groups come back only where the context has pruned them, the best first; else the lowest that would stay
    are pruned. A layer of which no group is pruned stays whole, and so does one with fewer groups."""
    if not layers: return keeps
    peers = layers[0].peers
    alive, kept = peers.fetched([layer.alive for layer in layers]), peers.fetched(keeps)
    found = []
    for layer, living, stay in zip(layers, alive, kept):
        if not stay.all(): stay = _rounded(layer, living, stay, multiple)
        found.append(stay)
    for layer, before, after in zip(layers, kept, found):
        if after.sum() != before.sum(): layer.outcome.left = None  # another number of weights than the context said
    return peers.sent(found, [keep.device for keep in keeps])


def _rounded(layer, alive, keep, multiple):
    "Return the keep mask of one layer, bool (groups,)."
    order = np.lexsort((layer.all_scores(), keep))  # what stays is above the rest; ties by position
    order = order[alive[order]][::-1]  # from the best on
    found = np.zeros_like(keep)
    found[order[:_how_many(layer, order, int(keep.sum()), multiple)]] = True
    return found


def _how_many(layer, order, n_kept, multiple):
    "Return how many of the best groups stay; all, where it is more than there are."
    needed = _for_floor(layer, order)
    count = multiple * max(1, ceil(needed / multiple), _nearest(n_kept, multiple))
    pruned_before = len(order) < len(layer.alive)
    if count <= len(order) or not pruned_before: return count
    below = len(order) // multiple * multiple
    return below if below >= max(1, needed) else len(order)


def _nearest(count, multiple):
    "Return how many multiples are nearest to a count."
    return (2 * count + multiple) // (2 * multiple)


def _for_floor(layer, order):
    "Return how many of the best groups have as many weights as must stay in the layer."
    if not layer.floor: return 0
    costs = np.full(len(order), layer.group_size)
    if layer.costs is not None: costs = layer.peers.fetched([layer.costs])[0][order]
    return 1 + int(costs.cumsum().searchsorted(layer.floor))
