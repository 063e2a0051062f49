"Run models on inputs, compare their outputs, and make inputs like those given."
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fasterai.snapshot import evaluation_mode

TOLERANCE = 1e-5  # by how much outputs may differ, relative to the largest


def check_module(
    model,  # what the user gave
    argument: str = 'model',  # its name, for the error
):
    "Raise a `TypeError` for what is not a torch.nn.Module."
    if isinstance(model, nn.Module): return
    raise TypeError(f'{argument}: got {type(model).__name__}, expected a torch.nn.Module')


def example_inputs(
    example,  # a batch as the model takes it; a tuple or list for several inputs
) -> tuple:  # the inputs of `model(*inputs)`
    "Return an example as the inputs of one call."
    return tuple(example) if isinstance(example, (tuple, list)) else (example,)


def fresh(
    inputs: tuple,
    lengths: tuple = (),  # of the first axis, one batch for each; empty for one batch of the inputs' own length
) -> Iterator[tuple]:
    """Make other inputs of the same types and shapes, from a fixed seed.

    Floats become normal random numbers; tensors of other types keep their items, drawn at random."""
    generator = torch.Generator().manual_seed(0)

    def like(tensor, length):
        if not isinstance(tensor, torch.Tensor) or not tensor.ndim or not len(tensor): return tensor
        order = torch.randint(len(tensor), (length or len(tensor),), generator=generator)
        if not tensor.is_floating_point(): return tensor[order.to(tensor.device)]
        return torch.randn((len(order), *tensor.shape[1:]), generator=generator).to(tensor)

    for length in lengths or (None,): yield tuple(like(i, length) for i in inputs)


def outputs(
    model: nn.Module,
    inputs: tuple,
) -> list:  # of tensors
    "Run a model in eval mode and without gradients, and return its output tensors; `ValueError` if it fails."
    try:
        with evaluation_mode(model), torch.no_grad(): out = model(*inputs)
    except Exception as error:
        shapes = [_shape_of(i) for i in inputs]
        raise ValueError(f'example: got {shapes}, on which the model fails: '
                         f'{type(error).__name__}: {error}') from error
    return [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]


def _shape_of(value): return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__


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
