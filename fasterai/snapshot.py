"Remember how a model was, and put it back: its values, its modes, and the random numbers."
import random
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


class Snapshot:
    "Copy all parameters and buffers of a model, so that `restore` can bring their values back."

    def __init__(self,
        model: nn.Module,
    ):
        # `parameters` and `buffers` give a tensor that several modules share only once
        tensors = [*model.parameters(), *model.buffers()]
        self._saved = [(tensor, tensor.detach().clone()) for tensor in tensors]
        self._buffers = _buffers_of(model)

    def restore(self):
        "Write the values back bit for bit, in place: the model keeps its tensors. Can be called again."
        _give_back(self._buffers)
        for tensor, value in self._saved:
            # what was made in inference mode can be changed only there
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                _once(tensor).copy_(_once(value, tensor))


def _once(tensor, like=None):
    "Return the entries of a tensor without those that only repeat others, where it, or `like`, is expanded."
    like = tensor if like is None else like
    if like.layout != torch.strided or all(like.stride()): return tensor
    return tensor[tuple(slice(None) if step else slice(1) for step in like.stride())]


@contextmanager
def evaluation_mode(
    *models: nn.Module,
):
    "Set every module of the models to eval mode for a `with` block, and put its own mode back afterwards."
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        # the attribute, not eval(): some models overload that, to keep one part of them in training mode
        for module in modes: module.training = False
        yield
    finally:
        for module, training in modes.items(): module.training = training


@contextmanager
def undisturbed(
    *models: nn.Module,
    but: frozenset = frozenset(),  # ids of buffers whose values may change
):
    """Run models in eval mode for a `with` block; put modes, buffers and random numbers back afterwards.

    Modules get back the very buffers that they had, too: a forward pass may put others in their place."""
    inside = [buffer for model in models for buffer in model.buffers() if id(buffer) not in but]
    buffers = {buffer: buffer.clone() for buffer in inside}
    places = [place for model in models for place in _buffers_of(model)]
    devices = {p.device for model in models for p in model.parameters() if p.is_cuda}
    with evaluation_mode(*models), random_numbers_kept(*devices):
        try: yield
        finally:
            _give_back(places)
            _put_back(buffers)


def _buffers_of(model): return [(module, dict(module._buffers)) for module in model.modules()]


def _give_back(places):
    "Let modules have the buffers that they had, as `_buffers_of` returned them."
    for module, buffers in places:
        module._buffers.clear()
        module._buffers.update(buffers)


def _put_back(buffers):
    "Write values back into the buffers that have changed."
    for buffer, value in buffers.items():
        if buffer.shape != value.shape: buffer.resize_(value.shape)  # observers of quantization do so
        if not torch.equal(buffer, value): buffer.copy_(value)


@contextmanager
def random_numbers_kept(
    *devices: torch.device,  # GPUs that may draw, too
):
    "Put the random numbers of Python, numpy and torch back after a `with` block."
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        try: yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)
