"Compute the synaptic flow of a network: how much of a constant input passes through each weight."
import torch
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map_only

from fasterai.snapshot import undisturbed


def synaptic_flow(
    layers: list,  # with a name and a weight
    calibration,  # `Calibration`, with an example or data: only the shapes of the inputs matter
) -> dict:  # layer's name: ∂R/∂|w|, of the weight's shape, float64
    """Return the gradient of R, the sum of outputs for inputs of ones and weights |w| (Tanaka et al. 2020).

    It is computed in float64, for R is a sum over all paths through the network, and in eval mode. A
    BatchNorm has a mean of 0."""
    model, inputs = calibration.model, calibration.an_example()
    named = _named(model)
    positive = {id(tensor): _positive(name, tensor) for name, tensor in named.items()}
    tensors = {name: positive[id(tensor)] for name, tensor in named.items()}
    known = [layer for layer in layers if id(layer.weight) in positive]
    wanted = [positive[id(layer.weight)].requires_grad_() for layer in known]
    with undisturbed(model), torch.enable_grad():
        args, kwargs = tree_map_only(torch.Tensor, _ones, tuple(inputs))
        outputs = tree_leaves(functional_call(model, tensors, args, kwargs, tie_weights=False))
        passed = sum(out.sum() for out in outputs if _is_float(out))
        found = torch.autograd.grad(passed, wanted, allow_unused=True)
    return {layer.name: flow for layer, flow in zip(known, found) if flow is not None}


def _named(model):
    """Return the parameters and buffers of each module, under one name of the module.

    `functional_call` would not put back what it replaces twice, in a module that is used under two names."""
    found = {}
    for name, module in model.named_modules():
        own = [*module.named_parameters(name, False, False), *module.named_buffers(name, False, False)]
        found |= dict(own)
    return found


def _positive(name, tensor):
    "Return a parameter as its absolute value, and the mean of a BatchNorm as 0."
    tensor = tensor.detach()
    if not tensor.is_floating_point(): return tensor
    if name.endswith('running_mean'): return torch.zeros_like(tensor, dtype=torch.float64)
    return tensor.double().abs()


def _ones(tensor):
    "Return inputs of ones; indices stay as they are."
    return torch.ones_like(tensor, dtype=torch.float64) if tensor.is_floating_point() else tensor


def _is_float(thing): return isinstance(thing, torch.Tensor) and thing.is_floating_point()
