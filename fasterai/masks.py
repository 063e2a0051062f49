"Hold zeros: in weights, in their gradients, and in what an optimizer keeps for them."
from collections.abc import Mapping

import numpy as np
import torch

from fasterai.event import Change, Mask
from fasterai.selected import Selected

PIECE = 1 << 20  # weights that are masked together
BITS = {torch.float64: torch.int64, torch.float32: torch.int32,  # integers of the same size
        torch.float16: torch.int16, torch.bfloat16: torch.int16}


class Masks:
    """Hold the masks of the selected layers, and of what is masked along with their filters.

    They begin with the zeros that are in the weights. `masks['name']` is a layer's mask: bool, True =
    keep."""

    def __init__(self,
        selected: Selected,
    ):
        self.selected = selected
        self.of = {}  # layer's name: `Mask`
        for name, layer in selected.candidates.items():
            self.of[name] = Mask.counted(_nonzero(layer.weight), layer.grouping)
        self._dependents = None  # {module: {tensor's name: bool (channels,), True = masked}}; None: not known yet

    def __getitem__(self,
        name: str,  # of a selected layer
    ) -> torch.Tensor:  # bool, of the weight's shape, True = keep
        "Return a layer's mask."
        return self.of[name].keep

    def left(self,
        name: str,  # of a selected layer
    ) -> int:
        "Return how many weights of a layer stay."
        return self.of[name].left

    def empty(self,
        name: str,  # of a selected layer
    ):
        "Mask a whole layer."
        self.of[name] = Mask(torch.zeros_like(self.of[name].keep), None, 0)

    def to_devices(self):
        "Move each mask to the device of its weight, and drop those of layers that were left out since."
        layers = self.selected.layers
        self.of = {name: self.of[name].to(layer.weight.device) for name, layer in layers.items()}

    @property
    def _masked_along(self):
        if self._dependents is None: self._dependents = self.selected.dependents(self.of)
        return self._dependents

    # Holding

    def tensors(self,
        of: set | None = None,  # ids of parameters: only these, and buffers of their modules; None: all
    ):
        "Yield each tensor that has masked entries, and its mask: (tensor, bool)."
        self.to_devices()
        for name, layer in self.selected.layers.items():
            if of is None or id(layer.weight) in of: yield layer.weight, self.of[name].keep
        for module, tensors in self._masked_along.items():
            for name in tensors:
                tensor = getattr(module, name)
                if of is not None and not of & _owners(module, tensor): continue
                tensors[name] = tensors[name].to(tensor.device)
                yield tensor, ~tensors[name]

    def mask_weights(self,
        of: set | None = None,  # as in `tensors`
    ):
        "Zero the masked weights, and what is masked along with filters."
        for tensor, keep in self.tensors(of): _zero(tensor, keep)

    def moved(self) -> list:  # of names
        "Return the layers of which a masked weight is not zero."
        layers = self.selected.layers.items()
        return [name for name, layer in layers if layer.weight.detach()[~self.of[name].keep].any()]

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

    def _set(self, masks, weights):
        before, after = self._masked_along, self.of | masks
        dependents = self.selected.dependents(after)  # what may fail stands before what changes anything
        self.of, self._dependents = after, dependents
        with torch.no_grad():
            self._start_again(before)
            for name, weight in weights.items(): self.selected.layers[name].weight.copy_(weight)
        self.mask_weights()

    def _start_again(self, before):
        "Make channels that come back able to learn: a ReLU at zero would pass no gradient."
        for module, tensors in before.items():
            for name, was_masked in tensors.items():
                if name == 'running_mean': continue
                tensor = getattr(module, name)
                masked = self._masked_along.get(module, {}).get(name, torch.zeros_like(was_masked))
                back = was_masked & ~masked.to(was_masked.device)
                tensor.masked_fill_(back.to(tensor.device), .01)

    # Saving

    def state_dict(self) -> dict:  # layer's name: {'shape': of its weight, 'bits': the mask, uint8 (weights / 8 rounded up,)}
        "Return the masks, packed to bits."
        return {name: _packed(self.of[name].keep) for name in self.selected.layers}

    def load_state_dict(self,
        state: dict,  # of `state_dict`
    ):
        """Take over packed masks and apply them.

        `TypeError` or `ValueError`, and nothing changed, where they do not fit."""
        layers = self.selected.layers
        if not isinstance(state, Mapping):
            raise TypeError(f'state: got {type(state).__name__}, expected what state_dict() returns')
        if set(state) != set(layers):
            came = ', '.join(map(str, state)) or 'nothing'
            raise ValueError(f'state: got masks for {came}, expected those for {", ".join(layers)}')
        masks = {}
        for name, layer in layers.items():
            keep = _unpacked(name, state[name], self.of[name].keep.shape).to(layer.weight.device)
            masks[name] = Mask.counted(keep, layer.grouping)
        self._set(masks, {})


def _owners(module, tensor):
    "Return the ids of the parameters with which a tensor is stepped: of a buffer those of its module."
    if isinstance(tensor, torch.nn.Parameter): return {id(tensor)}
    return {id(p) for p in module.parameters(recurse=False)}


def _mirrors(kept, tensor):
    """Tell whether a value of an optimizer's state belongs to a weight entry by entry, and zero means
    nothing is kept."""
    plain = type(kept) in (torch.Tensor, torch.nn.Parameter)
    return plain and kept.shape == tensor.shape and kept.dtype in BITS


def _nonzero(weight):
    """Return the mask that keeps what is not zero; a tensor that is all zero is an initialization, and all
    of it is kept."""
    mask = (weight.detach() != 0).contiguous()
    return mask if mask.any() else torch.ones_like(mask)


def _packed(keep):
    bits = np.packbits(keep.cpu().numpy())
    return {'shape': tuple(keep.shape), 'bits': torch.from_numpy(bits)}


def _unpacked(name, packed, expected):
    "Return the mask of one layer; `ValueError` where it has not the expected shape."
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
    return torch.from_numpy(keep).view(expected)


def _zero(tensor, keep):
    """Zero all entries but `keep`.

    Their bits are multiplied as integers: that is faster than a fill, and makes zero of a NaN too."""
    tensor = tensor.detach()
    keep = keep[tuple(slice(None) if step else slice(1) for step in keep.stride())]  # what only repeats is read once
    bits = BITS.get(tensor.dtype)
    if bits is None or not tensor.ndim:
        tensor.masked_fill_(~keep, 0)
        return
    tensor, pieces = tensor.view(bits), -(-tensor.numel() // PIECE)
    if pieces <= 1:
        tensor.mul_(keep)
        return
    rows = -(-len(tensor) // pieces)  # for a product torch widens the mask, so it is done in pieces
    for start in range(0, len(tensor), rows):
        here = slice(start, start + rows)
        tensor[here].mul_(keep[here] if len(keep) > 1 else keep)


def _zero_sparse(grad, keep):
    """Return the gradient of an embedding that has only the rows that were looked up, with zeros but for
    `keep`."""
    grad = grad.coalesce()
    grad.values().masked_fill_(~keep[grad.indices().unbind()], 0)
    return grad
