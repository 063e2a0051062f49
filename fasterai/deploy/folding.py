"Fold BatchNorms into the convolutions before them."
import weakref
from copy import deepcopy

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fasterai.arguments import Inputs
from fasterai.deploy.compare import agree, outputs
from fasterai.snapshot import evaluation_mode

TOLERANCE = 1e-4  # relative to the largest output
NORMS = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d}


def fold_norms(
    model: nn.Module,  # it is not changed
    inputs: Inputs,
    expected: list,  # its outputs, tensors
) -> nn.Module:  # a copy for inference, or the model itself if there is nothing to fold
    """Fold each BatchNorm into the convolution whose output it reads, where the outputs stay the same.

    A weight that is zero stays zero, for its output channel is only scaled."""
    new = deepcopy(model)
    found = followers(new, inputs, tuple(NORMS), tuple(NORMS.values())).items()
    pairs = {conv: norm for conv, norm in found if _fits(conv, norm)}
    with evaluation_mode(new):
        for conv, norm in pairs.items():
            fused = fuse_conv_bn_eval(conv, norm)
            replace(new, conv, fused)
            replace(new, norm, nn.Identity())
    if not pairs: return model
    # something else may have read what a convolution returned, or a BatchNorm's statistics
    try: return new if agree(outputs(new, inputs), expected, TOLERANCE) else model
    except ValueError: return model


def _fits(conv, norm): return type(norm) is NORMS[type(conv)] and norm.running_var is not None


def followers(
    model: nn.Module,
    inputs: Inputs,
    first: tuple,  # types of modules
    second: tuple,  # types of modules
) -> dict:  # {module of a first type: that of a second type which read its output}, each called once
    "Run a model, and find the modules that come directly behind others."
    calls, made, pairs = {}, {}, {}

    def note_output(module, args, output):
        calls[module] = calls.get(module, 0) + 1
        made[id(output)] = module, weakref.ref(output)  # an id may be that of another tensor later

    def note_input(module, args):
        calls[module] = calls.get(module, 0) + 1
        found = made.get(id(args[0])) if args else None
        if found and found[1]() is args[0]: pairs[found[0]] = module

    hooks = []
    for module in model.modules():
        if type(module) in first: hooks.append(module.register_forward_hook(note_output))
        if type(module) in second: hooks.append(module.register_forward_pre_hook(note_input))
    try: outputs(model, inputs)
    finally:
        for hook in hooks: hook.remove()
    return {before: module for before, module in pairs.items() if calls[before] == calls[module] == 1}


def replace(
    model: nn.Module,
    layer: nn.Module,  # one of its modules, or the model itself
    replacement: nn.Module,
) -> nn.Module:  # the model, or the replacement if the model was the layer
    "Replace a layer wherever the model has it."
    replacement.train(layer.training)
    if model is layer: return replacement
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child is layer: module._modules[name] = replacement
    return model
