"Read batches of data: what a model takes of them, without labels."
from collections.abc import Iterable, Mapping

import torch

from fasterai.arguments import Inputs, read_example

HELD_OUT = 4  # every fourth batch is held out


def read_data(
    data,  # a tensor, a DataLoader, fastai's DataLoaders, or an iterable of batches
    model,  # that takes them; its `forward` says which keywords there are
) -> list:  # of `Inputs`
    """Return the inputs of each batch.

    A batch is a tensor, a dict of keywords, or a tuple or list: of several entries the last is the label,
    which is not used. `TypeError` or `ValueError` where there is no batch in it."""
    if isinstance(data, torch.Tensor): data = [data]
    is_fastai = hasattr(data, 'train') and hasattr(data, 'valid')
    if is_fastai: data = data.train.new(shuffle=False, drop_last=False)
    if isinstance(data, (str, Mapping)) or not isinstance(data, Iterable):
        raise TypeError(f'data: got {type(data).__name__}, expected batches: a DataLoader, DataLoaders of '
                        'fastai, an iterable of batches, or a tensor')
    found = [_inputs(batch, model) for batch in data]
    if not found: raise ValueError('data: got no batch, expected at least one')
    return found


def _inputs(batch, model):
    if not isinstance(batch, (tuple, list)): return read_example(batch, model)
    inputs = batch[:-1] if len(batch) > 1 else batch
    return read_example(inputs[0] if len(inputs) == 1 else tuple(inputs), model)


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


def _items(batch, where):
    def some(value): return value[where] if isinstance(value, torch.Tensor) and value.ndim else value
    return Inputs(tuple(map(some, batch.args)), {name: some(value) for name, value in batch.kwargs.items()})
