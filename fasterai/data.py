"Read batches of data: what a model takes of them, and the labels where a loss is needed."
from collections.abc import Iterable, Mapping
from inspect import signature

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from fasterai.arguments import Inputs, read_example

HELD_OUT = 4  # every fourth batch is held out
JOINED = 2 ** 22  # numbers in batches that are joined


def read_data(
    data,  # a tensor, a DataLoader, fastai's DataLoaders, or an iterable of batches
    model,  # that takes them; its `forward` says which keywords there are
) -> list:  # of `Inputs`
    """Return the inputs of each batch.

    A batch is a tensor, a dict of keywords, or a tuple or list: of several entries the last is the label,
    which is not used. `TypeError` or `ValueError` where there is no batch in it."""
    return [inputs for inputs, _ in read_labelled(data, model)]


def read_labelled(
    data,  # as in `read_data`
    model,  # that takes them
) -> list:  # of (`Inputs`, label), on the model's device; None where a batch has no label
    """Return inputs and label of each batch.

    A batch is a tensor, a dict of keywords, or a tuple or list: of several entries the last is the label, of
    fastai's DataLoaders all behind the inputs. `TypeError` or `ValueError` where there is no batch in it."""
    if isinstance(data, torch.Tensor): data = [data]
    n_inputs = None
    if _is_fastai(data):
        n_inputs, data = getattr(data, 'n_inp', None), data.train
        if hasattr(data, 'new'): data = data.new(shuffle=False, drop_last=False)  # else it is torch's
    check_batches(data)
    found = [_labelled(batch, model, n_inputs) for batch in data]
    if not found: raise ValueError('data: got no batch, expected at least one')
    return _placed(found, model)


def check_batches(
    data,  # as in `read_data`
):
    "Refuse what are no batches, with `TypeError`, without reading any."
    is_iterable = isinstance(data, Iterable) and not isinstance(data, (str, Mapping))
    if _is_fastai(data) or is_iterable: return
    raise TypeError(f'data: got {type(data).__name__}, expected batches: a DataLoader, DataLoaders of '
                    'fastai, an iterable of batches, or a tensor')


def _is_fastai(data): return hasattr(data, 'train') and hasattr(data, 'valid')


def _labelled(batch, model, n_inputs):
    if not isinstance(batch, (tuple, list)): return read_example(batch, model), None
    if n_inputs is None: n_inputs = max(1, len(batch) - 1)
    inputs, labels = batch[:n_inputs], batch[n_inputs:]
    read = read_example(inputs[0] if len(inputs) == 1 else tuple(inputs), model)
    if len(labels) > 1: return read, tuple(labels)
    return read, labels[0] if labels else None


def _placed(batches, model):
    "Send batches to the device of the model, where that is not the CPU."
    device = next((p.device for p in model.parameters()), torch.device('cpu'))
    if device.type in ('cpu', 'meta'): return batches
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), batches)


# Padding

# Arguments of a `forward` that say which tokens are padding: whether they mark these (True) or the others
PADDING = {'attention_mask': False, 'src_key_padding_mask': True, 'key_padding_mask': True,
           'padding_mask': True}


def real_positions(
    batch: Inputs,
    model: nn.Module,  # that takes it; its `forward` says what the inputs are called
) -> torch.Tensor | None:  # bool, of the first two axes of another input: True where a token is no padding
    """Find which positions of a batch are tokens and not padding.

    `attention_mask` has 1 for a token; `src_key_padding_mask`, `key_padding_mask` and `padding_mask` have
    True for padding, or what is added to the scores of attention. A mask counts if it has two axes and
    another input has them too, in this order or, with the batch second, in the other. None without one."""
    named = _by_name(batch, model)
    tensors = {name: x for name, x in named.items() if isinstance(x, torch.Tensor)}
    for name, marks_padding in PADDING.items():
        mask = tensors.get(name)
        if mask is None or mask.ndim != 2 or mask.is_complex(): continue
        is_added = (mask < 0).any()  # to the scores of attention: 0 where a token counts
        if is_added and not marks_padding: continue
        real = mask == 0 if marks_padding else mask != 0
        shapes = {x.shape[:2] for x in tensors.values() if x is not mask}
        if real.shape in shapes: return real
        if real.T.shape in shapes: return real.T
    return None


def _by_name(batch, model):
    "Return the inputs of a batch by the names that the `forward` of a model gives them."
    try:
        takes = signature(model.forward)
        bound = takes.bind(*batch.args, **batch.kwargs)
    except (TypeError, ValueError): return batch.kwargs  # it cannot be read, or takes something else
    inside = list(model.children())
    passes_on = all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in takes.parameters.values())
    if passes_on and len(inside) == 1: return _by_name(batch, inside[0])  # DataParallel, DDP, torch.compile
    return bound.arguments | batch.kwargs


def held_out(
    batches: list,  # of `Inputs`
) -> tuple:  # two lists of `Inputs`: to solve with, and to judge by
    """Split batches, so that what was fitted is judged by other data.

    One batch is split in two, where it has several items."""
    if len(batches) > 1:
        judge = batches[HELD_OUT - 1::HELD_OUT] or batches[-1:]
        return [batch for batch in batches if not any(batch is other for other in judge)], judge
    batch, = batches
    tensors = [value for value in (*batch.args, *batch.kwargs.values()) if isinstance(value, torch.Tensor)]
    n = min((len(tensor) for tensor in tensors if tensor.ndim), default=0)
    if n < 2 or any(len(tensor) != n for tensor in tensors if tensor.ndim): return batches, batches
    at = n - max(1, n // HELD_OUT)
    return [_items(batch, slice(at))], [_items(batch, slice(at, None))]


def joined(
    batches: list,  # of `Inputs`
) -> list:  # of `Inputs`: a single one, or the batches as they are
    """Join batches into one, where they are small and each is one tensor with the batch as its first axis.

    These are pictures and rows of numbers: of three axes the first may be a position."""
    if not all(len(batch.args) == 1 and not batch.kwargs for batch in batches): return batches
    inputs = [batch.args[0] for batch in batches]
    if not all(isinstance(x, torch.Tensor) and x.is_floating_point() for x in inputs): return batches
    forms = {(x.dtype, x.device, x.shape[1:]) for x in inputs}
    if len(forms) > 1 or inputs[0].ndim in (0, 1, 3): return batches
    if sum(x.numel() for x in inputs) > JOINED: return batches
    return [Inputs((torch.cat(inputs),))]


def _items(batch, where):
    def some(value): return value[where] if isinstance(value, torch.Tensor) and value.ndim else value
    return Inputs(tuple(map(some, batch.args)), {name: some(value) for name, value in batch.kwargs.items()})
