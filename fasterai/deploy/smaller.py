"A smaller network: filters that put out exactly zero are removed, with all that depended on them."
from copy import deepcopy

import torch
import torch_pruning as tp
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch_pruning import ops

TOLERANCE = 1e-5  # by how much the outputs may differ, relative to the largest


def shrink(
    model: nn.Module,  # any dense network with zeros in it; it is not changed
    example,  # a batch as the model takes it, a tuple for several inputs
    verbose: bool = True,  # print what was removed, and what could not be and why
) -> nn.Module:  # a copy, an ordinary model
    """Remove the filters whose outputs are zero whatever comes in, by Torch-Pruning's dependency graph (Fang et al. 2023).

    The result computes the same, or what would change it is left."""
    if not isinstance(model, nn.Module): raise TypeError(f'model: got {type(model).__name__}, allowed is a torch.nn.Module')
    inputs = example_inputs(example)
    expected = outputs(model, inputs)
    removed, left = {}, {}
    small = _without(model, inputs, None, removed, left)
    if not _same(small, inputs, expected):  # some operation makes something of a zero: one layer at a time then
        candidates, keep = list(removed), []
        for name in candidates:
            removed, left = {}, {}
            if _same(_without(model, inputs, [*keep, name], removed, left), inputs, expected): keep.append(name)
        removed, left = {}, {}
        small = _without(model, inputs, keep, removed, left)
        left |= {name: ['without them the outputs would not be the same'] for name in candidates if name not in keep}
    if verbose: print(_account(model, small, removed, left))
    return small


def _without(model, inputs, names, removed, left):
    "A copy without the dead filters of the named layers, None for all; None where that fails. Notes what goes and what stays."
    small = deepcopy(model)
    modes, learns = {m: m.training for m in small.modules()}, {n: p.requires_grad for n, p in small.named_parameters()}
    for p in small.parameters(): p.requires_grad_(p.is_floating_point())
    for m in modes: m.training = False
    try:
        graph = tp.DependencyGraph().build_dependency(small, example_inputs=inputs if len(inputs) > 1 else inputs[0], verbose=False)
        for name, module in small.named_modules():
            if module not in graph.module2node or (names is not None and name not in names): continue
            dead = _dead(module)
            if dead is None or not dead.any(): continue
            gone, why = _remove(graph, module, dead.nonzero().flatten().tolist())
            if gone: removed[name] = gone
            if why: left[name] = why
    except Exception as error:
        if names is None and not removed: raise ValueError(f'model: {type(model).__name__} cannot be followed by torch-pruning: {error}') from error
        return None
    for m, mode in modes.items(): m.training = mode
    for n, p in small.named_parameters():
        p.requires_grad_(learns.get(n, True))
        p.grad = None
    return small


def _dead(module):
    "Which output channels of a layer are zero whatever comes in: bool (channels,), None where that is no question."
    if not isinstance(module, (ops.TORCH_CONV, ops.TORCH_LINEAR)): return None
    transposed = getattr(module, 'transposed', False)
    weight = module.weight.detach()
    if transposed and module.groups > 1: return None
    dead = ~(weight.transpose(0, 1) if transposed else weight).flatten(1).any(1)
    return dead if module.bias is None else dead & (module.bias.detach() == 0)


def _remove(graph, module, channels):
    "Remove those that can be; how many, and why others stay."
    why = {}
    group = graph.get_pruning_group(module, _handler(module), channels)
    for i, (dep, indices) in enumerate(group):
        reason = _obstacle(graph, dep, torch.tensor(indices))
        for root, stays in zip(group[i].root_idxs, reason):
            if stays: why.setdefault(root, stays)
    free = [c for c in channels if c not in why]
    total = graph.get_out_channels(module)
    if len(free) == total:
        why[free[0]] = 'one channel must be left'
        free = free[1:]
    if free: graph.get_pruning_group(module, _handler(module), free).prune()
    return len(free), list(why.values())


def _handler(module):
    kind = tp.pruner.function
    if isinstance(module, ops.TORCH_LINEAR): return kind.prune_linear_out_channels
    if module.groups == module.out_channels > 1: return kind.prune_depthwise_conv_out_channels
    return kind.prune_conv_out_channels


def _obstacle(graph, dep, indices):
    "For each channel of one dependent layer, why it cannot go, or nothing."
    module, node = dep.target.module, dep.target
    def where(stays, reason): return [reason if s else '' for s in stays.tolist()]
    every = torch.ones(len(indices), dtype=torch.bool)
    if not node.outputs and graph.is_out_channel_pruning_fn(dep.handler): return where(every, "they are the network's output")
    if isinstance(module, nn.Parameter): return where(every, 'they meet a parameter of no layer')
    if isinstance(module, _BatchNorm): return where(_shift(module)[indices] != 0, 'a bias or a BatchNorm makes them other than zero')
    if isinstance(module, (ops.TORCH_CONV, ops.TORCH_LINEAR)):
        if not graph.is_out_channel_pruning_fn(dep.handler): return where(~every, '')
        if getattr(module, 'groups', 1) == getattr(module, 'out_channels', 0):  # depthwise: a zero that comes in leaves but for the bias
            return where(~every if module.bias is None else module.bias.detach()[indices] != 0, 'a bias or a BatchNorm makes them other than zero')
        if getattr(module, 'groups', 1) > 1: return where(every, 'they meet a grouped convolution')
        dead = _dead(module)
        return where(every if dead is None else ~dead[indices],
                     'they are added to, or read by, channels that are not zero: coupled=True zeroes such together')
    if isinstance(module, nn.PReLU) or type(module).__module__ == ops.__name__: return where(~every, '')
    return where(every, f'they pass a {type(module).__name__}, which mixes channels')


def _shift(norm):
    "What a BatchNorm makes of a zero."
    zero = torch.zeros(norm.num_features)
    scale = zero + 1 if norm.weight is None else norm.weight.detach().cpu()
    bias = zero if norm.bias is None else norm.bias.detach().cpu()
    if norm.running_mean is None: return bias
    return bias - norm.running_mean.cpu() * scale / (norm.running_var.cpu() + norm.eps).sqrt()


def example_inputs(example) -> tuple:  # what `model(*inputs)` takes
    "One batch of inputs."
    return tuple(example) if isinstance(example, (tuple, list)) else (example,)


def outputs(
    model: nn.Module,
    inputs: tuple,
) -> list:  # of tensors
    "What a model makes of inputs, in eval mode and without gradients; modes are put back. `ValueError` where it fails."
    modes = {m: m.training for m in model.modules()}
    try:
        for m in modes: m.training = False
        with torch.no_grad(): out = model(*inputs)
    except Exception as error:
        shapes = [tuple(i.shape) if isinstance(i, torch.Tensor) else type(i).__name__ for i in inputs]
        raise ValueError(f'example: got {shapes}, on which the model fails: {type(error).__name__}: {error}') from error
    finally:
        for m, mode in modes.items(): m.training = mode
    return [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]


def agree(
    found: list,  # of tensors
    expected: list,
    tolerance: float = TOLERANCE,  # relative to the largest
) -> bool:
    "Are the outputs the same?"
    return len(found) == len(expected) and all(
        a.shape == b.shape and (not b.numel() or bool(((a.double() - b.double()).abs() <= tolerance * max(float(b.abs().max()), 1e-30)).all()))
        for a, b in zip(found, expected))


def _same(small, inputs, expected):
    if small is None: return False
    try: return agree(outputs(small, inputs), expected)
    except ValueError: return False


def parameters(model): return sum(p.numel() for p in model.parameters())


def _account(model, small, removed, left):
    before, after = parameters(model), parameters(small)
    lines = [f'shrink: {sum(removed.values()):,} filters of {len(removed)} layers removed; '
             f'{before:,} parameters became {after:,} ({100 * after / before:.1f} %)']
    for why in dict.fromkeys(w for reasons in left.values() for w in reasons):
        names = [n for n, reasons in left.items() if why in reasons]
        number = sum(reasons.count(why) for reasons in left.values())
        lines.append(f'  {number:,} zero filters stay in {", ".join(names[:3])}{f" and {len(names) - 3} more" if len(names) > 3 else ""}: {why}')
    if not removed and not left: lines.append('  no filter is zero: prune with granularity=\'filter\' first')
    return '\n'.join(lines)
