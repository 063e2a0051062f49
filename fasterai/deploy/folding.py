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
    pairs = _pairs(new, inputs)
    with evaluation_mode(new):
        for conv, norm in pairs.items():
            fused = fuse_conv_bn_eval(conv, norm)
            replace(new, conv, fused)
            replace(new, norm, nn.Identity())
    if not pairs: return model
    # something else may have read what a convolution returned, or a BatchNorm's statistics
    try: return new if agree(outputs(new, inputs), expected, TOLERANCE) else model
    except ValueError: return model


def _pairs(model, inputs):
    "Run a model, and return {convolution: the BatchNorm that read its output}, each called once."
    kinds = (*NORMS, *NORMS.values())
    calls, made, pairs = {}, {}, {}

    def note_output(conv, args, output):
        calls[conv] = calls.get(conv, 0) + 1
        made[id(output)] = conv, weakref.ref(output)  # an id may be that of another tensor later

    def note_input(norm, args):
        calls[norm] = calls.get(norm, 0) + 1
        conv, output = made.get(id(args[0]), (None, None)) if args else (None, None)
        if conv is None or output() is not args[0] or NORMS[type(conv)] is not type(norm): return
        pairs[conv] = norm

    hooks = []
    for module in model.modules():
        if type(module) not in kinds: continue
        if type(module) in NORMS: hooks.append(module.register_forward_hook(note_output))
        elif module.running_var is not None: hooks.append(module.register_forward_pre_hook(note_input))
    try: outputs(model, inputs)
    finally:
        for hook in hooks: hook.remove()
    return {conv: norm for conv, norm in pairs.items() if calls[conv] == calls[norm] == 1}


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
