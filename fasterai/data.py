"Read batches of data: what a model takes of them, and the labels where a loss is needed."
from collections.abc import Iterable, Mapping

import torch
from torch.utils._pytree import tree_map_only

from fasterai.arguments import Inputs, read_example

HELD_OUT = 4  # every fourth batch is held out


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
    is_fastai, n_inputs = hasattr(data, 'train') and hasattr(data, 'valid'), None
    if is_fastai:
        n_inputs = getattr(data, 'n_inp', None)
        data = data.train.new(shuffle=False, drop_last=False)
    if isinstance(data, (str, Mapping)) or not isinstance(data, Iterable):
        raise TypeError(f'data: got {type(data).__name__}, expected batches: a DataLoader, DataLoaders of '
                        'fastai, an iterable of batches, or a tensor')
    found = [_labelled(batch, model, n_inputs) for batch in data]
    if not found: raise ValueError('data: got no batch, expected at least one')
    return _placed(found, model)


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
