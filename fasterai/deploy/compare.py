"Run models on inputs, compare their outputs, and make inputs like those given."
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_leaves, tree_map

from fasterai.arguments import Inputs, read_example
from fasterai.snapshot import evaluation_mode

TOLERANCE = 1e-5  # by how much outputs may differ, relative to the largest


def check_module(
    model,  # what the user gave
    argument: str = 'model',  # its name, for the error
):
    "Raise a `TypeError` for what is not a torch.nn.Module."
    if isinstance(model, nn.Module): return
    raise TypeError(f'{argument}: got {type(model).__name__}, expected a torch.nn.Module')


class Computed(NamedTuple):
    "Describe a way to compute a tensor of a module before each call, from a hook."
    hook: type
    name: str  # the hook's attribute that has the tensor's name
    by: str  # what made the hook
    remove: str  # the function that makes the tensor a parameter again


COMPUTED = [
    Computed(prune.BasePruningMethod, '_tensor_name', 'torch.nn.utils.prune', 'torch.nn.utils.prune.remove'),
    Computed(WeightNorm, 'name', 'torch.nn.utils.weight_norm', 'torch.nn.utils.remove_weight_norm'),
    Computed(SpectralNorm, 'name', 'torch.nn.utils.spectral_norm', 'torch.nn.utils.remove_spectral_norm'),
]


def check_copyable(
    model,  # what the user gave
    argument: str = 'model',  # its name, for the error
):
    """Raise an error that says what to do for a model that cannot be copied, or has masks of its own.

    `TypeError` if it is no torch.nn.Module, else `ValueError`."""
    check_module(model, argument)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta: raise ValueError(f'{argument}: got {name!r} on the meta device, expected values')
    for name, module in model.named_modules():
        tensors = {attr: value for attr, value in vars(module).items() if isinstance(value, torch.Tensor)}
        unfit = [attr for attr, tensor in tensors.items() if not tensor.is_leaf]
        for hook in module._forward_pre_hooks.values():
            way = next((way for way in COMPUTED if isinstance(hook, way.hook)), None)
            if way is None: continue
            attr = getattr(hook, way.name)
            if attr not in unfit and way.hook is not prune.BasePruningMethod: continue
            raise ValueError(f'{argument}: got one in which {way.by} computes the {attr} of {name!r} '
                             'before each call, expected a parameter: '
                             f'call {way.remove}(module, {attr!r}) first')
        if not unfit: continue
        raise ValueError(f'{argument}: got one in which {unfit[0]} of {name!r} is a result with gradients, '
                         'which cannot be copied; expected it to be deleted, or to come from detach()')


def file_path(
    path,  # what the user gave
    argument: str = 'path',  # its name, for the error
) -> Path:
    "Return the path of a file to write; `TypeError` or `FileNotFoundError` where there cannot be one."
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f'{argument}: got {path!r}, expected a file name')
    found = Path(path)
    if found.parent.is_dir() and found.name and not found.is_dir(): return found
    raise FileNotFoundError(f'{argument}: got {str(path)!r}, expected a file in a folder that exists')


def example_inputs(
    example,  # a batch as the model takes it: a tuple for several inputs, a dict for keywords
    model: nn.Module,
) -> Inputs:
    "Return an example as the inputs of one call; `ValueError` if there is no item in it."
    inputs = read_example(example, model)
    for value in tree_leaves(inputs):
        if not isinstance(value, torch.Tensor) or not value.ndim or len(value): continue
        raise ValueError(f'example: got an empty batch of shape {tuple(value.shape)}, '
                         'expected at least one item')
    return inputs


def plain_tensors(
    inputs: Inputs,
    reason: str,  # why others will not do, as the end of the error message
):
    "Raise a `TypeError` where tensors are inside lists or dicts, whose first axis may be no batch."
    for value in (*inputs.args, *inputs.kwargs.values()):
        if isinstance(value, torch.Tensor): continue
        if not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value)): continue
        raise TypeError(f'example: got {inputs}, expected tensors: {reason}')


def fresh(
    inputs: Inputs,
    lengths: tuple = (),  # of the first axis, one batch for each; empty for one batch of the inputs' own length
) -> Iterator[Inputs]:
    """Make other inputs of the same types and shapes, from a fixed seed.

    Floats become normal random numbers; tensors of other types keep their items, drawn at random."""
    generator = torch.Generator().manual_seed(0)

    def like(tensor, length):
        if not isinstance(tensor, torch.Tensor) or not tensor.ndim or not len(tensor): return tensor
        order = torch.randint(len(tensor), (length or len(tensor),), generator=generator)
        if not tensor.is_floating_point(): return tensor[order.to(tensor.device)]
        return torch.randn((len(order), *tensor.shape[1:]), generator=generator).to(tensor)

    for length in lengths or (None,): yield tree_map(partial(like, length=length), inputs)


def outputs(
    model: nn.Module,
    inputs: Inputs,
    argument: str = 'example',  # which argument of the user's has the inputs, for the error
) -> list:  # of tensors
    "Run a model in eval mode and without gradients, and return its output tensors; `ValueError` if it fails."
    try:
        with evaluation_mode(model), torch.no_grad(): out = inputs.call(model)
    except Exception as error:
        raise ValueError(f'{argument}: got {inputs}, on which the model fails: '
                         f'{type(error).__name__}: {error}') from error
    return [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]


def agree(
    found: list,  # tensors
    expected: list,  # tensors they are compared with
    tolerance: float = TOLERANCE,  # the largest difference, relative to the largest expected number
) -> bool:
    "Tell whether two lists of outputs agree; infinite numbers and NaN must be in the same places."
    return len(found) == len(expected) and all(_close(a, b, tolerance) for a, b in zip(found, expected))


def _close(found, expected, tolerance):
    if found.shape != expected.shape or found.is_complex() != expected.is_complex(): return False
    found, expected = _numbers(found), _numbers(expected)
    finite = expected.isfinite()
    equal = (found == expected) | (found.isnan() & expected.isnan())
    if not equal[~finite].all(): return False
    if not finite.any(): return True
    error = (found - expected).abs()[finite].max()
    largest = max(float(expected[finite].abs().max()), 1e-30)  # not zero, where all outputs are
    return bool(error <= tolerance * largest)


def _numbers(tensor):
    "Return a tensor's numbers on the CPU in float64, a complex one's as pairs."
    tensor = tensor.detach().cpu()
    if tensor.is_complex(): tensor = torch.view_as_real(tensor)
    return tensor.double()
