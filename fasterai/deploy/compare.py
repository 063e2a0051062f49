"A model on inputs: what comes out, whether it is the same, and inputs like those given."
from collections.abc import Iterator

import torch
from torch import nn

TOLERANCE = 1e-5  # by how much outputs may differ, relative to the largest


def example_inputs(example) -> tuple:  # what `model(*inputs)` takes
    "One batch of inputs."
    return tuple(example) if isinstance(example, (tuple, list)) else (example,)


def fresh(
    inputs: tuple,
    lengths: tuple = (),  # of the first axis; none for that of the inputs
) -> Iterator[tuple]:
    "Others like them, from a fixed seed: normal numbers, and of whole numbers those that are there, in another order."
    generator = torch.Generator().manual_seed(0)

    def like(tensor, length):
        if not isinstance(tensor, torch.Tensor) or not tensor.ndim or not len(tensor): return tensor
        order = torch.randint(len(tensor), (length or len(tensor),), generator=generator)
        if not tensor.is_floating_point(): return tensor[order.to(tensor.device)]
        return torch.randn((len(order), *tensor.shape[1:]), generator=generator).to(tensor)
    for length in lengths or (None,): yield tuple(like(i, length) for i in inputs)


def evaluating(model: nn.Module) -> nn.Module:  # the model
    "In eval mode, not by eval(), which some models overload."
    for module in model.modules(): module.training = False
    return model


def outputs(
    model: nn.Module,
    inputs: tuple,
) -> list:  # of tensors
    "What a model makes of inputs, in eval mode and without gradients; modes are put back. `ValueError` where it fails."
    modes = {m: m.training for m in model.modules()}
    try:
        with torch.no_grad(): out = evaluating(model)(*inputs)
    except Exception as error:
        shapes = [tuple(i.shape) if isinstance(i, torch.Tensor) else type(i).__name__ for i in inputs]
        raise ValueError(f'example: got {shapes}, on which the model fails: {type(error).__name__}: {error}') from error
    finally:
        for module, mode in modes.items(): module.training = mode
    return [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]


def agree(
    found: list,  # of tensors
    expected: list,
    tolerance: float = TOLERANCE,  # relative to the largest
) -> bool:
    "Are the outputs the same? What is not finite must be so in both."
    return len(found) == len(expected) and all(_close(a, b, tolerance) for a, b in zip(found, expected))


def _close(a, b, tolerance):
    if a.shape != b.shape or a.is_complex() != b.is_complex(): return False
    a, b = (torch.view_as_real(t) if t.is_complex() else t for t in (a.detach().cpu(), b.detach().cpu()))
    a, b = a.double(), b.double()
    finite = b.isfinite()
    if not ((a == b) | (a.isnan() & b.isnan()))[~finite].all(): return False
    a, b = a[finite], b[finite]
    return not b.numel() or bool(((a - b).abs() <= tolerance * max(float(b.abs().max()), 1e-30)).all())
