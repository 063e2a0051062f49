"Cut positions out of a model's parameters and buffers, and set the numbers in its modules that count them."
from collections.abc import Callable
from copy import deepcopy
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fasterai.deploy.labels import Solved
from fasterai.deploy.tracing import Trace, forget


class Cut(NamedTuple):
    "Describe what is cut, by names."
    kept: dict  # name of a parameter or buffer: {axis: numbers of the positions that stay}
    grouped: list  # (name of a weight, its groups, which inputs stay, which outputs, whether it has inputs to cut)
    numbers: dict  # name of a module: {number in its code: what it becomes}
    caches: list = ()  # (name of a module, attribute), of tables that it fills when it runs


def cut_of(
    model: nn.Module,  # the one that was traced
    trace: Trace,
    solved: Solved,
) -> Cut:
    "Return what is cut where the labels that are gone are."
    sizes = dict([*model.named_parameters(), *model.named_buffers()])
    kept = {}
    for name, firsts in trace.owned.items():
        for axis, first in enumerate(firsts):
            gone = solved.gone[first:first + sizes[name].shape[axis]]
            if gone.any(): kept.setdefault(name, {})[axis] = np.flatnonzero(~gone)
    names = {id(p): name for name, p in sizes.items()}
    grouped = []
    for g in trace.labels.grouped:
        if id(g.weight) not in names: continue
        ins, outs = (~solved.gone[rows].any(1) for rows in (g.ins, g.outs))
        is_cut = not ins.all() or not outs.all()
        if is_cut: grouped.append((names[id(g.weight)], g.groups, ins, outs, g.by_inputs))
    return Cut(kept, grouped, _numbers(model, trace, solved), trace.caches)


def _numbers(model, trace, solved):
    names, found = {m: name for name, m in model.named_modules()}, {}
    for module, number, rows in trace.resizes:
        gone = int(solved.gone[rows].any(1).sum())
        if gone: found.setdefault(names[module], {}).setdefault(number, number - gone)
    return found


def apply(
    model: nn.Module,  # it is not changed
    cut: Cut,
    way: Callable | None = None,  # tells by its name whether an attribute is set that is a number in a module's code; None: none is
) -> nn.Module:  # a copy without what is cut
    "Cut a copy of a model."
    small = deepcopy(model)
    forget(small, cut.caches)
    tensors = dict([*small.named_parameters(), *small.named_buffers()])
    with torch.no_grad():
        groups = {}  # id of a weight: how many groups it has left
        by_name = {name: rest for name, *rest in cut.grouped}
        for name, axes in (dict.fromkeys(by_name, {}) | cut.kept).items():
            tensor, new = tensors[name], tensors[name].detach()
            if name in by_name:
                n, ins, outs, by_inputs = by_name[name]
                groups[id(tensor)] = int(ins.reshape(n, -1).any(1).sum())
                if by_inputs: new, axes = _cut_groups(new, n, ins, outs), {}
            for axis, positions in axes.items():
                new = new.index_select(axis, torch.from_numpy(positions).to(new.device))
            tensor.data = new.clone(memory_format=torch.preserve_format)
            tensor.grad = None
    for module in small.modules(): _set_counts(module, groups)
    if way is None: return small
    modules = dict(small.named_modules())
    for name, numbers in cut.numbers.items(): _set_numbers(modules[name], numbers, way)
    return small


def _cut_groups(weight, groups, ins, outs):
    "Return the weight of a grouped convolution with the inputs and outputs of each group that stay."
    ins, outs = (torch.from_numpy(x).to(weight.device).view(groups, -1) for x in (ins, outs))
    return torch.cat([part[o][:, i] for part, i, o in zip(weight.chunk(groups), ins, outs) if i.any()])


# By the types of modules, the numbers that follow from the shapes of their weights

def _of_convolution(module):
    outputs, inputs = module.weight.shape[:2]
    return {'out_channels': outputs, 'in_channels': inputs * module.groups}


def _of_transposed(module):
    inputs, outputs = module.weight.shape[:2]
    return {'in_channels': inputs, 'out_channels': outputs * module.groups}


def _of_recurrent(module):
    gates = {'LSTM': 4, 'GRU': 3}.get(module.mode, 1)
    hidden = len(module.weight_hh_l0) // gates
    found = {'input_size': module.weight_ih_l0.shape[1], 'hidden_size': hidden}
    return found | ({'proj_size': module.weight_hh_l0.shape[1]} if module.proj_size else {})


def _of_norm(module):
    tensor = module.running_mean if module.weight is None else module.weight
    return {} if tensor is None else {'num_features': len(tensor)}


COUNTS = [
    (_ConvTransposeNd, _of_transposed),
    (_ConvNd, _of_convolution),
    (nn.Linear, lambda m: {'out_features': m.weight.shape[0], 'in_features': m.weight.shape[1]}),
    (_NormBase, _of_norm),
    ((nn.Embedding, nn.EmbeddingBag), lambda m: {'embedding_dim': m.weight.shape[1]}),
    (nn.RNNBase, _of_recurrent),
    (nn.RNNCellBase, lambda m: {'input_size': m.weight_ih.shape[1], 'hidden_size': m.weight_hh.shape[1]}),
    (nn.PReLU, lambda m: {'num_parameters': m.weight.numel()}),
]


def _set_counts(module, groups):
    "Set the numbers that follow from a module's weights."
    weight = module._parameters.get('weight')
    is_grouped = weight is not None and id(weight) in groups
    if is_grouped and hasattr(module, 'groups'): module.groups = groups[id(weight)]
    count = next((count for kinds, count in COUNTS if isinstance(module, kinds)), None)
    if count is None or (weight is None and hasattr(module, 'weight')): return
    for name, number in count(module).items():
        if getattr(module, name, number) != number: setattr(module, name, number)


def _any_name(name): return True
def _of_heads(name): return 'head' in name and not any(word in name for word in ('dim', 'size', 'width'))


def _of_no_single_head(name): return not name.startswith(('head_d', 'key_d', 'val_d', 'value_d'))


WAYS = (None, _any_name, _of_heads, _of_no_single_head)  # to set the numbers in the code, in the order in which they are tried


def _set_numbers(module, numbers, way):
    "Set the attributes of a module that are one of the numbers in its code, also in lists and tuples."
    for name, value in [(n, v) for n, v in vars(module).items() if way(n)]:
        new = _renumbered(value, numbers)
        if name.startswith('_') or new is value or new == value: continue
        setattr(module, name, new)


def _renumbered(value, numbers):
    if type(value) is int: return numbers.get(value, value)
    if type(value) in (list, tuple) and value and all(type(v) is int for v in value):
        return type(value)(numbers.get(v, v) for v in value)
    return value
