"Hold masks from one fit to the next, by the names of layers."
from collections.abc import Mapping

from torch import nn

from fasterai.arguments import nearest
from fasterai.masks import Masks, read_mask, unpacked, where_zero
from fasterai.names import find_again, warn_lost


class Held:
    """Hold the masks of a Sparsifier for later fits. A copy of it, or a pickle, has them packed to bits.

    While the Sparsifier prunes, its masks may change; so do these."""

    def __init__(self,
        masks: Masks,
    ):
        self.masks, self.packed = masks, {}

    def __getstate__(self):
        bits = self.packed if self.masks is None else self.masks.packed()
        return {'masks': None, 'packed': bits}

    @property
    def names(self) -> list:
        "Return the names of the layers."
        return list(self.packed if self.masks is None else self.masks.selected.candidates)

    def found_in(self,
        model: nn.Module,  # perhaps another one, or with other modules
    ) -> dict:  # `Weight` in that model: bool, of its shape, True = keep
        "Return the masks for a model as it is now. Layers that are lost are named, once."
        if self.masks is not None: return self.masks.found_in(model)
        shapes = {name: bits['shape'] for name, bits in self.packed.items()}
        found = find_again(dict.fromkeys(shapes), shapes, model, wrapped=True)
        lost = [name for name in shapes if name not in found]
        warn_lost(lost)
        self.packed = {name: bits for name, bits in self.packed.items() if name in found}
        masks = {}
        for name, (_, weight) in found.items():
            keep = unpacked(name, self.packed[name], weight.tensor)
            masks[weight] = where_zero(name, keep, weight.tensor)
        return masks


def own_masks(
    masks: Mapping,  # name of a layer: bool, of the weight's shape, True = keep
    weights: dict,  # name: `Weight`, of the layers that may be meant
) -> dict:  # `Weight`: bool
    "Read masks of a user's own; `ValueError` where one does not fit."
    found = {}
    for name, mask in masks.items():
        if name not in weights:
            raise ValueError(f'masks: got {name!r}, '
                             f'expected one of {", ".join(weights)}{nearest(name, weights)}')
        found[weights[name]] = read_mask(name, mask, weights[name].tensor)
    return found


def both(
    some: dict,  # `Weight`: bool mask
    others: dict,  # the same
) -> dict:  # `Weight`: bool mask
    "Return masks that hold what either of two holds."
    shared = {weight: keep & some[weight] for weight, keep in others.items() if weight in some}
    return some | others | shared
