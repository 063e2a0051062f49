"Find the zeros that no mask holds: at an event they count, and go first, whatever the criterion says."
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from fasterai.native import sweep
from fasterai.native.sweep import Terms
from fasterai.peers import ALONE, as_array
from fasterai.selection import CHUNK, terms_of


class Zeros(NamedTuple):
    """Describe the zeros of one layer that its mask does not hold, where a group has several weights.

    A group is empty where it has nothing else, in all layers that are pruned with this one."""
    scattered: torch.Tensor  # ints (n,), rising: positions in the flattened weight of zeros in groups that are not empty
    empty: torch.Tensor  # bool (groups,)
    costs: torch.Tensor  # (groups,): weights that are left in each group; an empty one costs what its mask keeps


def find_zeros(
    tied: list,  # of lists of layers that are pruned as one; each has a name, a weight and a grouping
    masks: dict,  # layer's name: `event.Mask`
) -> dict:  # layer's name: `Zeros`, where there are any and groups have several weights
    "Find the zeros that no mask holds."
    tied = [together for together in tied if len(together) > 1 or together[0].grouping.size > 1]
    layers = [layer for together in tied for layer in together]
    counts = ALONE.fetched([_count(layer.weight, masks[layer.name])[None] for layer in layers])
    some = {layer.name for layer, (count,) in zip(layers, counts) if count}
    found = {}
    for together in tied:
        if any(layer.name in some for layer in together): found |= _described(together, masks)
    return found


def count_zeros(
    weight: torch.Tensor,
    mask,  # `event.Mask`
) -> int:
    "Count the zeros of one layer that its mask does not hold."
    return int(_count(weight, mask))


def _count(weight, mask):
    "Count in pieces that fit a processor's cache; the number stays where the weight is."
    weight, keep = weight.detach(), None if mask.left == mask.size else mask.keep
    if not ALONE.on_host(weight) or not weight.numel() or not weight.ndim: return _zero(weight, keep).sum()
    done = sweep.count_zeros(weight, keep)
    if done is not None: return torch.tensor(done)
    rows = max(1, CHUNK * len(weight) // weight.numel())
    pieces = [slice(start, start + rows) for start in range(0, len(weight), rows)]
    weight = as_array(weight)
    if keep is not None and isinstance(weight, np.ndarray): keep = ALONE.array(keep)
    counts = [ALONE.count(_zero(weight[piece], None if keep is None else keep[piece])) for piece in pieces]
    return torch.tensor(sum(counts))


def _zero(weight, keep):
    "Tell which weights are zero although the mask keeps them; `keep` is None where it keeps all."
    zero = weight == 0
    return zero if keep is None else zero & keep


def _described(together, masks):
    "Describe the zeros of layers that are pruned as one. They are few, so they are found by their positions."
    at, group, kept, left = {}, {}, {}, {}
    for layer in together:
        name, grouping = layer.name, layer.grouping
        at[name] = _free(layer.weight.detach(), masks[name].keep)
        group[name] = grouping.numbers(at[name])
        kept[name] = masks[name].counts(grouping)
        left[name] = kept[name] - torch.bincount(group[name], minlength=grouping.groups)
    empty = (sum(kept.values()) > 0) & (sum(left.values()) == 0)
    found = {}
    for name in at:
        scattered = at[name][~empty[group[name]]]
        found[name] = Zeros(scattered, empty, torch.where(empty, kept[name], left[name]))
    return found


def _free(weight, keep):
    "Find the positions of the zeros that a mask keeps: ints (n,), where the weight is."
    weight, keep = as_array(weight.reshape(-1)), keep.reshape(-1)
    if isinstance(weight, torch.Tensor): return (_zero(weight, keep)).nonzero().flatten()
    at = np.flatnonzero(weight == 0)
    return torch.from_numpy(at[ALONE.array(keep)[at]])


# Groups that are zero

def zero_groups(
    layer,
    mask,  # `event.Mask`
    zeros: Zeros | None,  # of this layer
) -> Callable | None:  # (where) -> bool (n,), tensor or array; None: there are none
    "Return a function that tells which living groups have only zeros."
    if zeros is not None: return zeros.empty.__getitem__
    if layer.grouping.size > 1: return None
    rows = []

    def is_zero(where):
        if not rows:
            rows.append(as_array(layer.grouping.rows(layer.weight.detach())))
            rows.append(ALONE.array(layer.grouping.rows(mask.keep)))
        weight, keep = rows
        zero = ALONE.array(weight[where] == 0)
        return zero & keep[where] if isinstance(zero, torch.Tensor) or zero.any() else zero
    return is_zero


@dataclass(frozen=True)
class LowestWhere:
    "Return scores that are -inf where something is zero, and nowhere else."
    scores: Callable  # (where) -> (n,), as in `LayerGroups`
    is_zero: Callable  # (where) -> bool (n,), of `zero_groups`
    bounded: bool  # no score is -inf already
    weight: torch.Tensor | None = None  # where it is zero is all that `is_zero` tells; None: that is not known

    def __call__(self, where):
        found, zero = self.scores(where), self.is_zero(where)
        if isinstance(found, np.ndarray): return _lowest_in_array(found, zero, self.bounded)
        if not self.bounded: found = found.clamp(min=torch.finfo(found.dtype).min)
        return found.masked_fill(torch.as_tensor(zero, device=found.device), -torch.inf)

    def terms(self) -> Terms | None:
        "Return what C code can compute the scores from, None where it cannot."
        terms = terms_of(self.scores) if self.bounded and self.weight is not None else None
        return None if terms is None else terms._replace(weight=as_array(self.weight.flatten()))


def _lowest_in_array(found, zero, bounded):
    if not bounded: found = np.maximum(found, np.finfo(found.dtype).min)
    return np.where(zero, found.dtype.type(-np.inf), found) if zero.any() else found
