"Remember how a model was, and put it back: its values, and its modes."
from contextlib import contextmanager

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

    def restore(self):
        "Write the values back bit for bit, in place: the model keeps its tensors. Can be called again."
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
