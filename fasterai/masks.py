"What is held at zero: weights, their gradients, what an optimizer remembers of them."
from collections.abc import Mapping

import numpy as np
import torch

from fasterai.event import Change, Mask
from fasterai.selected import Selected

PIECE = 1 << 20  # weights that are zeroed together
BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


class Masks:
    "The masks of the selected weights, and of the biases and BatchNorms of filters that are gone. Zeros that are there are masked."

    def __init__(self,
        selected: Selected,
    ):
        self.selected = selected
        self.of = {name: Mask.counted(_living(layer.weight), layer.grouping) for name, layer in selected.candidates.items()}  # `Mask` by name
        self._dependents = None  # {module: {tensor's name: bool (channels,), True where it is zero}}; None where not known yet

    def __getitem__(self,
        name: str,  # of a selected layer
    ) -> torch.Tensor:  # bool, of the weight's shape, True = keep
        "A layer's mask."
        return self.of[name].keep

    def left(self,
        name: str,  # of a selected layer
    ) -> int:
        "How many weights of a layer are kept."
        return self.of[name].left

    @property
    def dependents(self) -> dict:
        if self._dependents is None: self._dependents = self.selected.dependents(self.of)
        return self._dependents

    def empty(self,
        name: str,  # of a selected layer
    ):
        "Mask all of a layer."
        self.of[name] = Mask(torch.zeros_like(self.of[name].keep), None, 0)

    def to_weights(self):
        "Have the masks on their weights' devices."
        for name, layer in self.selected.layers.items(): self.of[name] = self.of[name].to(layer.weight.device)

    # Holding

    def held(self):
        "Every tensor that has entries held at zero, and which stay: (tensor, bool)."
        self.to_weights()
        for name, layer in self.selected.layers.items(): yield layer.weight, self.of[name].keep
        for module, tensors in self.dependents.items():
            for name in tensors:
                tensor = getattr(module, name)
                tensors[name] = tensors[name].to(tensor.device)
                yield tensor, ~tensors[name]

    def apply_to_weights(self):
        "Zero what an optimizer has moved."
        for tensor, keep in self.held(): _zero(tensor, keep)

    def apply_to_gradients(self):
        "Zero the gradients of what is masked."
        for tensor, keep in self.held():
            if tensor.grad is None: continue
            if tensor.grad.is_sparse: tensor.grad = _zero_sparse(tensor.grad, keep)
            else: _zero(tensor.grad, keep)

    def apply_to_state(self,
        state: Mapping,  # parameter: {name: tensor or anything}, as the `state` of an optimizer
    ):
        "Zero what an optimizer remembers of what is masked: momentum, second moments, all that has the weight's shape."
        for tensor, keep in self.held():
            for memory in state[tensor].values() if tensor in state else ():
                if isinstance(memory, torch.Tensor) and memory.shape == tensor.shape: _zero(memory, keep.to(memory.device))

    # Changing

    def apply(self,
        change: Change,
    ):
        "Take a change over: masks, what depends on them, and the weights."
        self.set(change.after, change.weights)

    def set(self,
        masks: dict,  # layer's name: `Mask`
        weights: dict = {},  # layer's name: tensor, what its weights become
    ):
        "Hold other masks from now on."
        before = self.dependents
        self.of.update(masks)
        self._dependents = self.selected.dependents(self.of)
        with torch.no_grad():
            self._start_again(before)
            for name, weight in weights.items(): self.selected.layers[name].weight.copy_(weight)
        self.apply_to_weights()

    def _start_again(self, before):
        "What comes back must be able to learn: a scale of zero, or a ReLU at zero, would pass no gradient."
        for module, tensors in before.items():
            for name, was in tensors.items():
                if name == 'running_mean': continue
                tensor = getattr(module, name)
                still = self.dependents.get(module, {}).get(name, torch.zeros_like(was))
                back = was & ~still.to(was.device)
                tensor.masked_fill_(back.to(tensor.device), 1. if name == 'weight' else .01)

    # Saving

    def state_dict(self) -> dict:  # layer's name: {'shape': its weight's, 'bits': the keep mask, uint8 (weights / 8 rounded up,)}
        "The masks, packed to bits."
        return {name: _packed(self.of[name].keep) for name in self.selected.layers}

    def load_state_dict(self,
        state: dict,  # of `state_dict`
    ):
        "Take the masks over and apply them; `ValueError`, and nothing changed, where they do not fit."
        layers = self.selected.layers
        if not isinstance(state, Mapping): raise TypeError(f'state: got {type(state).__name__}, allowed is what state_dict() gives')
        if set(state) != set(layers):
            raise ValueError(f'state: got masks for {", ".join(map(str, state)) or "nothing"}, allowed are those for {", ".join(layers)}')
        masks = {}
        for name, layer in layers.items():
            keep = _unpacked(name, state[name], self.of[name].keep.shape).to(layer.weight.device)
            masks[name] = Mask.counted(keep, layer.grouping)
        self.set(masks)


def _living(weight):
    "The zeros are the mask; but a tensor that is all zero is an initialisation."
    mask = (weight.detach() != 0).contiguous()
    return mask if mask.any() else torch.ones_like(mask)


def _packed(keep): return {'shape': tuple(keep.shape), 'bits': torch.from_numpy(np.packbits(keep.cpu().numpy()))}


def _unpacked(name, packed, expected):
    "The mask of one layer; `ValueError` where it is none of that shape."
    try: shape, bits = tuple(packed['shape']), packed['bits']
    except (KeyError, TypeError):
        raise ValueError(f"state: got {packed!r} for {name!r}, allowed is a dict with 'shape' and 'bits'") from None
    if not isinstance(bits, torch.Tensor) or bits.dtype != torch.uint8:
        raise ValueError(f'state: got {type(bits).__name__} as bits for {name!r}, allowed is a tensor of uint8')
    n = expected.numel()
    if shape != tuple(expected) or len(bits) != -(-n // 8):
        raise ValueError(f'state: got a mask of shape {shape} for {name!r}, allowed is {tuple(expected)}')
    keep = np.unpackbits(bits.cpu().numpy(), count=n).astype(bool)
    return torch.from_numpy(keep).view(expected)


def _zero(tensor, keep):
    "Zero all but `keep`. Integers of the same bits are multiplied: faster than a fill, and a NaN becomes zero too."
    tensor = tensor.detach()
    keep = keep[tuple(slice(None) if step else slice(1) for step in keep.stride())]  # what only repeats is written once
    bits = BITS.get(tensor.dtype)
    if not bits or not tensor.ndim:
        tensor.masked_fill_(~keep, 0)
        return
    tensor, pieces = tensor.view(bits), -(-tensor.numel() // PIECE)  # torch widens the mask of a piece for the product
    if pieces <= 1:
        tensor.mul_(keep)
        return
    rows = -(-len(tensor) // pieces)
    for start in range(0, len(tensor), rows):
        here = slice(start, start + rows)
        tensor[here].mul_(keep[here] if len(keep) > 1 else keep)


def _zero_sparse(grad, keep):
    "Zero the gradient of an embedding that has only the rows that were looked up."
    grad = grad.coalesce()
    grad.values().masked_fill_(~keep[grad.indices().unbind()], 0)
    return grad
