"Hold zeros: in weights, in their gradients, and in what an optimizer keeps for them."
import warnings
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from fasterai.arguments import nearest
from fasterai.event import Change, Mask
from fasterai.names import warn_lost
from fasterai.native.sweep import mask as masked
from fasterai.peers import ALONE, Alone
from fasterai.selected import Selected
from fasterai.shards import here, is_split, part_for, place_of, split_like

PIECE = 1 << 20  # weights that are masked together
BITS = {torch.float64: torch.int64, torch.float32: torch.int32,  # integers of the same size
        torch.float16: torch.int16, torch.bfloat16: torch.int16}


class Masks(Mapping):
    """Hold the masks of the selected layers, and of what is masked along with their filters.

    `masks['name']` is a copy of a layer's mask: bool, True = keep; `masks['name'] = mask` and
    `masks.update({name: mask})` set masks of one's own."""

    def __init__(self,
        selected: Selected,
        keep_zeros: bool = False,  # begin with the zeros that are in the weights; else nothing is masked
        peers: Alone = ALONE,  # the processes, each of which may have a part of the model
    ):
        self.selected, self.peers = selected, peers
        layers = selected.candidates
        self._of = {name: self._full(layer) for name, layer in layers.items()}
        if keep_zeros: self._of |= self._zeros_kept(layers)
        self._groupings = {name: layer.grouping for name, layer in layers.items()}  # the groups that the masks are counted in
        self._dependents = None  # {module: {tensor's name: bool (channels,), True = masked}}; None: not known yet
        self._version = 0  # of the selected layers, for which the dependents were found

    def _full(self, layer):
        "Return the mask that keeps all of a layer."
        place = self.peers.place(layer.weight)
        if place is None: return Mask.full(layer.weight, layer.grouping)
        keep = torch.ones(place.sizes, dtype=torch.bool, device=layer.weight.device)
        return Mask(keep, None, place.n_whole, place)

    def _zeros_kept(self, layers):
        """Return the masks that hold the zeros of weights.

        A weight that is all zero is an initialization, and all of it is kept."""
        keeps = {name: (here(layer.weight) != 0).contiguous() for name, layer in layers.items()}
        found = self._counted(keeps)
        return {name: mask for name, mask in found.items() if mask.left}

    def _counted(self, keeps):
        "Return masks from the bools of what is here: {layer's name: bool}."
        layers = self.selected.candidates
        if not self.peers.splits:
            return {name: Mask.counted(keep, layers[name].grouping) for name, keep in keeps.items()}
        places = {name: self.peers.place(layers[name].weight) for name in keeps}
        left = self.peers.totals([ALONE.count(keep) * places[name].speaks for name, keep in keeps.items()])
        return {name: Mask(keeps[name], None, n, places[name]) for name, n in zip(keeps, left)}

    def __getitem__(self,
        name: str,  # of a selected layer
    ) -> torch.Tensor:  # bool, of the weight's shape, True = keep
        "Return a copy of a layer's mask."
        self.selected.refresh()
        masks = self.of
        if name in masks:
            return masks[name].whole(masks[name].keep.clone(memory_format=torch.contiguous_format))
        raise KeyError(f'masks: got {name!r}, expected one of {", ".join(masks)}{nearest(name, masks)}')

    def __iter__(self):
        self.selected.refresh()
        return iter(dict(self.of))

    def __len__(self): return len(self.of)

    __eq__, __hash__ = object.__eq__, object.__hash__

    def __setitem__(self,
        name: str,  # of a selected layer
        mask: torch.Tensor,  # bool, of the weight's shape, True = keep
    ):
        "Set the mask of a layer, and zero what it masks; `ValueError` or `TypeError` where it does not fit."
        self.update({name: mask})

    def update(self,
        masks: Mapping,  # name of a selected layer: bool, of the weight's shape, True = keep
    ):
        """Set the masks of some layers, and zero what they mask. Weights that come back start from zero.

        `TypeError` or `ValueError`, and nothing changed, where one does not fit."""
        if not isinstance(masks, Mapping):
            raise TypeError(f'masks: got {type(masks).__name__}, expected {{name of a layer: bool tensor}}')
        self.selected.refresh()
        keeps = self.peers.agreed(lambda: {name: self._read(name, mask) for name, mask in masks.items()})
        self._set(self._counted(keeps), {})

    def begin_with(self,
        held: Mapping,  # `Weight`: bool, of its shape, True = keep; of other layers too
    ):
        "Add masks before the first batch, which finds the data flow: they are applied with it."
        for name, layer in self.selected.candidates.items():
            if layer.at not in held: continue
            keep = self._of[name].keep & held[layer.at].to(layer.weight.device)
            self._of[name] = Mask.counted(keep, layer.grouping)

    def found_in(self,
        model: nn.Module,  # the same with other modules, or another one
    ) -> dict:  # `Weight` in that model: bool, of its shape, True = keep
        """Return the masks for a model as it is now. Layers that are lost are named, once.

        Of a layer that was replaced only what is zero is held: it may be a new one."""
        found, masks = self.selected.located(model), {}
        lost = [name for name in self._of if name not in found]
        warn_lost(lost)
        for name in lost:
            del self._of[name]
            self.selected.candidates.pop(name, None)
        for name, (_, weight) in found.items():
            keep = self._of[name].keep.to(weight.tensor.device)
            same = self.selected.candidates[name].is_at(weight)
            masks[weight] = keep if same else where_zero(name, keep, weight.tensor)
        return masks

    def move_to(self,
        model: nn.Module,
        example,  # a batch, or a function that returns one when needed
    ):
        """Go over to another model, and mask it.

        Where layers are missing in it, it is not the same network: then only zeros are held."""
        before = dict(self.selected.candidates)
        self.selected.move_to(model, example)
        layers, self._dependents = self.selected.candidates, None
        if len(layers) == len(before): return
        for name, layer in layers.items():
            if before[name].is_at(layer.at): continue
            keep = where_zero(name, self._of[name].keep.to(layer.weight.device), layer.weight)
            self._of[name] = Mask.counted(keep, layer.grouping)

    def packed(self) -> dict:  # layer's name: {'shape', 'bits'}
        "Return the masks of all layers, those that are frozen too, packed to bits."
        return {name: packed(mask.keep) for name, mask in self._of.items()}

    def _read(self, name, mask):
        names, layer = self.selected.candidates, self.selected.candidates.get(name)
        if layer is None:
            raise ValueError(f'masks: got {name!r}, expected one of {", ".join(names)}{nearest(name, names)}')
        return read_mask(name, mask, layer.weight)

    def left(self,
        name: str,  # of a selected layer
    ) -> int:
        "Return how many weights of a layer stay."
        return self.of[name].left

    @property
    def of(self) -> dict:  # name of a layer: `event.Mask`, where its weight is
        "Return the masks of all layers, those that are frozen too."
        self.selected.follow()
        layers = self.selected.candidates
        self._of = {name: self._of[name].to(layer.weight.device) for name, layer in layers.items()}
        for name, layer in layers.items():
            if layer.grouping is self._groupings[name]: continue  # else it is pruned together with others, as is known now
            self._groupings[name] = layer.grouping
            mask = self._of[name]
            if mask.place is None: self._of[name] = Mask.counted(mask.keep, layer.grouping)
        return self._of

    @property
    def _masked_along(self):
        "Return what is masked along with filters: {module: {tensor's name: bool (channels,)}}."
        if self._version != self.selected.version: self._dependents = None
        if self._dependents is None:
            self._dependents = self.selected.dependents(self.of, self.peers)
            self._version = self.selected.version
        return self._dependents

    # Holding

    def tensors(self,
        of: set | None = None,  # ids of parameters: only these, and buffers of their modules; None: all
    ):
        "Yield each tensor that has masked entries, and its mask: (tensor, bool)."
        self.selected.refresh()
        masks = self.of
        for name, layer in self.selected.candidates.items():
            if of is None or id(layer.weight) in of: yield layer.weight, masks[name].keep
        for module, tensors in self._masked_along.items():
            for name in tensors:
                tensor = getattr(module, name)
                if tensor is None: continue  # it was taken away since
                if of is not None and not of & _owners(module, tensor): continue
                tensors[name] = tensors[name].to(tensor.device)
                yield tensor, part_for(~tensors[name], tensor)

    def mask_weights(self,
        of: set | None = None,  # as in `tensors`
    ):
        "Zero the masked weights, and what is masked along with filters."
        for tensor, keep in self.tensors(of): _zero(tensor, keep)

    def moved(self) -> list:  # of names
        "Return the layers of which a masked weight is not zero."
        masks, layers = self.of, self.selected.candidates.items()
        return [name for name, layer in layers if here(layer.weight)[~masks[name].keep].any()]

    def mask_gradients(self,
        of: set | None = None,  # as in `tensors`
    ):
        "Zero the gradients of masked weights."
        for tensor, keep in self.tensors(of):
            if tensor.grad is None: continue
            if tensor.grad.is_sparse: tensor.grad = _zero_sparse(tensor.grad, keep)
            else: _zero(tensor.grad, keep)

    def mask_state(self,
        state: Mapping,  # parameter: {name: tensor or anything}, as the `state` of an optimizer
    ):
        """Zero the entries of masked weights in each floating-point tensor of the state that has the weight's
        shape.

        Others stay as they are: zero would be a code, or a choice, in integers, masks and tensors of
        another class."""
        for tensor, keep in self.tensors():
            for kept in state[tensor].values() if tensor in state else ():
                if _mirrors(kept, tensor): _zero(kept, keep.to(kept.device))

    # Changing

    def apply(self,
        change: Change,
    ):
        "Take over a change: the masks, what is masked along, and the weights."
        self._set(change.after, change.weights)

    def put_back(self,
        masks: dict,  # name of a layer: `event.Mask`, of before
    ):
        "Take back masks, without a look at the weights."
        self._of, self._dependents = dict(masks), None

    def _set(self, masks, weights):
        self.selected.refresh()
        after = self.of | masks
        has_pruned = any(mask.left < mask.size for mask in self.of.values())
        before = self._masked_along if has_pruned else {}
        dependents = self.selected.dependents(after, self.peers)  # what may fail stands before what changes anything
        self._of, self._dependents, self._version = after, dependents, self.selected.version
        with torch.no_grad():
            self._start_again(before)
            for name, weight in weights.items(): self.selected.candidates[name].weight.copy_(weight)
        self.mask_weights()

    def _start_again(self, before):
        "Make channels that come back able to learn: a ReLU at zero would pass no gradient."
        for module, tensors in before.items():
            for name, was_masked in tensors.items():
                if name == 'running_mean': continue
                tensor = getattr(module, name)
                if tensor is None: continue
                masked = self._masked_along.get(module, {}).get(name, torch.zeros_like(was_masked))
                back = was_masked & ~masked.to(was_masked.device)
                here(tensor).masked_fill_(part_for(back.to(tensor.device), tensor), .01)

    # Saving

    def state_dict(self,
        as_bits: bool = True,  # masks of whole layers; False: as bools
    ) -> dict:  # layer's name: {'shape': of its weight, 'bits': the mask, uint8 (weights / 8 rounded up,), or 'keep': bool, of its shape}
        "Return the masks. Those of which each process has a part are bool DTensors, split like the weights."
        self.selected.refresh()
        masks = self.of.items()
        if as_bits and not self.peers.splits: return {name: packed(mask.keep) for name, mask in masks}
        keeps = {name: mask.keep.clone(memory_format=torch.contiguous_format) for name, mask in masks}
        keeps = {name: mask.whole(keeps[name]) for name, mask in masks}
        return {name: {'shape': tuple(keep.shape), 'keep': keep} for name, keep in keeps.items()}

    def read_state(self,
        state: dict,  # of `state_dict`
    ) -> dict:  # name of a layer: `event.Mask`
        "Return the masks of a state; `TypeError` or `ValueError` where they do not fit."
        self.selected.refresh()
        layers = self.selected.candidates
        if not isinstance(state, Mapping):
            raise TypeError(f'state: got {type(state).__name__}, expected what state_dict() returns')
        if set(state) != set(layers):
            came = ', '.join(map(str, state)) or 'nothing'
            raise ValueError(f'state: got masks for {came}, expected those for {", ".join(layers)}')
        keeps = {name: _mask_in(name, state[name], layer.weight) for name, layer in layers.items()}
        return self._counted(keeps)

    def load(self,
        masks: dict,  # name of a layer: `event.Mask`
    ):
        "Take over masks and apply them."
        self._set(masks, {})


def read_mask(
    name: str,  # of the layer
    mask,  # what a user gave
    weight: torch.Tensor,
) -> torch.Tensor:  # bool, a copy where the weight is
    "Read a mask of a user's own, or the part of it that is here; `ValueError` where it does not fit."
    if _is_mask(mask) and mask.shape == weight.shape:
        return split_like(mask, weight).to(weight.device).contiguous()
    came = type(mask).__name__
    if isinstance(mask, torch.Tensor):
        came = f'a {mask.layout} tensor of {mask.dtype} on {mask.device} of shape {tuple(mask.shape)}'
        came = came.replace('torch.', '')
    raise ValueError(f'masks: got {came} for {name!r}, '
                     f'expected a bool tensor of shape {tuple(weight.shape)}, True = keep')


def where_zero(
    name: str,  # of the layer
    keep: torch.Tensor,  # bool: the mask of a layer
    weight: torch.Tensor,  # of another one in its place
) -> torch.Tensor:  # bool
    "Return the mask for a layer in the place of another: what is not zero in it is let go, and said."
    lost = ~keep & (weight.detach() != 0)
    if lost.any():
        n, of = int(lost.sum()), int((~keep).sum())
        warnings.warn(f'masks: {name!r} was replaced, and {n:,} of {of:,} masked weights are not zero in the '
                      'new layer: they are let go', stacklevel=3)
    return keep | lost


def nonzero(
    weight: torch.Tensor,
) -> torch.Tensor:  # bool, of its shape
    """Return the mask that holds the zeros of a weight.

    One that is all zero is an initialization, and all of it is kept."""
    mask = (weight.detach() != 0).contiguous()
    return mask if mask.any() else torch.ones_like(mask)


def _is_mask(thing):
    if not isinstance(thing, torch.Tensor) or thing.dtype != torch.bool: return False
    return not thing.is_meta and thing.layout == torch.strided


def _split_alike(mask, weight):
    "Tell whether a mask is whole, or split as a weight is."
    return not is_split(mask) or is_split(weight) and place_of(mask) == place_of(weight)


def _owners(module, tensor):
    "Return the ids of the parameters with which a tensor is stepped: of a buffer those of its module."
    if isinstance(tensor, torch.nn.Parameter): return {id(tensor)}
    return {id(p) for p in module.parameters(recurse=False)}


def _mirrors(kept, tensor):
    """Tell whether a value of an optimizer's state belongs to a weight entry by entry, and zero means
    nothing is kept."""
    plain = type(kept) in (torch.Tensor, torch.nn.Parameter) or is_split(kept) and _split_alike(kept, tensor)
    return plain and kept.shape == tensor.shape and kept.dtype in BITS


def _mask_in(name, saved, weight):
    "Return the part that is here of a mask in a state."
    if isinstance(saved, Mapping) and 'keep' in saved: return read_mask(name, saved['keep'], weight)
    return part_for(unpacked(name, saved, weight), weight)


def packed(
    keep: torch.Tensor,  # bool
) -> dict:  # 'shape', and 'bits': uint8 (entries / 8 rounded up,)
    "Pack a mask to bits."
    bits = np.packbits(keep.cpu().numpy())
    return {'shape': tuple(keep.shape), 'bits': torch.from_numpy(bits)}


def unpacked(
    name: str,  # of the layer
    packed: dict,  # of `packed`
    weight: torch.Tensor,
) -> torch.Tensor:  # bool, of the weight's shape, where it is
    "Return a mask from its bits; `ValueError` where it does not fit the weight."
    expected = weight.shape
    try: shape, bits = tuple(packed['shape']), packed['bits']
    except (KeyError, TypeError, IndexError):
        raise ValueError(f'state: got {packed!r} for {name!r}, '
                         "expected a dict with 'shape' and 'bits'") from None
    n, came = expected.numel(), type(bits).__name__
    is_tensor = isinstance(bits, torch.Tensor)
    if is_tensor: came = f'a {bits.layout} tensor of {bits.dtype} on {bits.device}'.replace('torch.', '')
    if not is_tensor or bits.dtype != torch.uint8 or bits.is_meta or bits.layout != torch.strided:
        raise ValueError(f'state: got {came} as bits for {name!r}, expected a tensor of uint8 with values')
    if shape != tuple(expected):
        raise ValueError(f'state: got a mask of shape {shape} for {name!r}, expected {tuple(expected)}')
    if tuple(bits.shape) != (-(-n // 8),):
        raise ValueError(f'state: got bits of shape {tuple(bits.shape)} for {name!r}, '
                         f'expected {(-(-n // 8),)}')
    keep = np.unpackbits(bits.cpu().numpy(), count=n).astype(bool)
    return torch.from_numpy(keep).view(expected).to(weight.device)


def _zero(tensor, keep):
    """Zero all entries but `keep`.

    Their bits are multiplied as integers: that is faster than a fill, and makes zero of a NaN too."""
    tensor = here(tensor)
    if masked(tensor, keep): return
    keep = keep[tuple(slice(None) if step else slice(1) for step in keep.stride())]  # what only repeats is read once
    bits = BITS.get(tensor.dtype)
    if bits is None or not tensor.ndim or not tensor.numel():
        tensor.masked_fill_(~keep, 0)
        return
    tensor, pieces = tensor.view(bits), -(-tensor.numel() // PIECE)
    if pieces <= 1:
        tensor.mul_(keep)
        return
    rows = -(-len(tensor) // pieces)  # for a product torch widens the mask, so it is done in pieces
    for start in range(0, len(tensor), rows):
        at = slice(start, start + rows)
        tensor[at].mul_(keep[at] if len(keep) > 1 else keep)


def _zero_sparse(grad, keep):
    """Return the gradient of an embedding that has only the rows that were looked up, with zeros but for
    `keep`."""
    grad = grad.coalesce()
    grad.values().masked_fill_(~keep[grad.indices().unbind()], 0)
    return grad
