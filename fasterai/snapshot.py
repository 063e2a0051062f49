"How was it before? Modes that are changed for a while and put back."
from contextlib import contextmanager

from torch import nn


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
