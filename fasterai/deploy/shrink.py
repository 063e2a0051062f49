"A smaller network: filters that put out exactly zero are removed, with all that depended on them."
from copy import deepcopy

import torch
import torch_pruning as tp
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch_pruning import ops

from fasterai.deploy.compare import agree, evaluating, example_inputs, fresh, outputs



def shrink(
    model: nn.Module,  # any dense network with zeros in it; it is not changed
    example,  # a batch as the model takes it, a tuple for several inputs
    verbose: bool = True,  # print what was removed, and what could not be and why
) -> nn.Module:  # a copy, an ordinary model
    """Remove the filters whose outputs are zero whatever comes in, by Torch-Pruning's dependency graph (Fang et al. 2023).

    The result computes the same, or what would change it is left."""
    if not isinstance(model, nn.Module): raise TypeError(f'model: got {type(model).__name__}, allowed is a torch.nn.Module')
    inputs, base = example_inputs(example), deepcopy(model)
    known = _known(base, inputs)
    small, removed, left = _without(base, inputs)
    if not _same(small, known):  # some operation makes something of a zero: one layer at a time then
        keep = []
        for name in removed:
            if _same(_without(base, inputs, [*keep, name])[0], known): keep.append(name)
        wrong = {name: ['without them the outputs would not be the same'] * n for name, n in removed.items() if name not in keep}
        small, removed, left = _without(base, inputs, keep)
        left |= wrong
    if verbose: print(_account(model, small, removed, left))
    return small


def _known(model, inputs):
    "What the model makes of the example, and of inputs made afresh if it takes them."
    known = [(inputs, outputs(model, inputs))]
    for batch in fresh(inputs):
        try: known.append((batch, outputs(model, batch)))
        except ValueError: pass
    return known


def _same(small, known):
    try: return all(agree(outputs(small, batch), expected) for batch, expected in known)
    except ValueError: return False


class _Broken(Exception):
    "Torch-Pruning failed at this layer."


def _without(model, inputs, names=None):
    "A copy without the dead filters of the named layers, None for all; how many went of each, and why others stayed."
    skip = {}
    while True:
        small, removed, left = deepcopy(model), {}, {n: [why] for n, why in skip.items()}
        learns = {n: p.requires_grad for n, p in small.named_parameters()}
        modes = {m: m.training for m in small.modules()}
        for p in small.parameters(): p.requires_grad_(p.is_floating_point())
        try: graph = tp.DependencyGraph().build_dependency(evaluating(small), example_inputs=inputs if len(inputs) > 1 else inputs[0], verbose=False)
        except Exception as error:
            raise ValueError(f'model: {type(model).__name__} cannot be followed by torch-pruning: {type(error).__name__}: {error}') from error
        try:
            for name, module in small.named_modules():
                if name in skip or module not in graph.module2node or (names is not None and name not in names): continue
                dead = _dead(module)
                if dead is None or not dead.any(): continue
                gone, why = _remove(graph, name, module, dead.nonzero().flatten().tolist(), _shared(small))
                if gone: removed[name] = gone
                if why: left[name] = why
        except _Broken as broken:
            skip[str(broken)] = 'torch-pruning cannot follow them'
            continue
        for m, mode in modes.items(): m.training = mode
        for n, p in small.named_parameters():
            p.requires_grad_(learns.get(n, True))
            p.grad = None
        return small, removed, left


def _shared(model):
    "Ids of parameters that several modules hold."
    held = [id(p) for m in model.modules() for p in m._parameters.values() if p is not None]
    return {i for i in held if held.count(i) > 1}


def _dead(module):
    "Which output channels of a layer are zero whatever comes in: bool (channels,), None where that is no question."
    if not isinstance(module, (ops.TORCH_CONV, ops.TORCH_LINEAR)): return None
    transposed = getattr(module, 'transposed', False)
    weight = module.weight.detach()
    if transposed and module.groups > 1: return None
    dead = ~(weight.transpose(0, 1) if transposed else weight).flatten(1).any(1)
    return dead if module.bias is None else dead & (module.bias.detach() == 0)


def _remove(graph, name, module, channels, shared):
    "Remove those that can be; how many, and why others stay."
    why = {}
    try:
        group = graph.get_pruning_group(module, _handler(module), channels)
        for i, (dep, indices) in enumerate(group):
            for root, stays in zip(group[i].root_idxs, _obstacle(graph, dep, torch.tensor(indices), shared)):
                if stays: why.setdefault(root, stays)
        free = [c for c in channels if c not in why]
        total = graph.get_out_channels(module)
        if len(free) == total:
            why[free[0]] = 'one channel must be left'
            free = free[1:]
        if free: graph.get_pruning_group(module, _handler(module), free).prune()
    except Exception as error: raise _Broken(name) from error
    return len(free), list(why.values())


def _handler(module):
    kind = tp.pruner.function
    if isinstance(module, ops.TORCH_LINEAR): return kind.prune_linear_out_channels
    if _depthwise(module): return kind.prune_depthwise_conv_out_channels
    return kind.prune_conv_out_channels


def _obstacle(graph, dep, indices, shared):
    "For each channel of one dependent layer, why it cannot go, or nothing."
    module, node, makes = dep.target.module, dep.target, graph.is_out_channel_pruning_fn(dep.handler)
    def where(stays, reason): return [reason if s else '' for s in stays.tolist()]
    every = torch.ones(len(indices), dtype=torch.bool)
    if not node.outputs and makes: return where(every, "they are the network's output")
    if isinstance(module, nn.Parameter): return where(every, 'they meet a parameter of no layer')
    if any(id(p) in shared for p in module._parameters.values()): return where(every, 'they meet a weight that several layers share')
    if isinstance(module, _BatchNorm):
        if int(indices.max()) >= module.num_features: return where(every, 'they are broadcast')
        return where(_shift(module)[indices] != 0, 'a bias or a BatchNorm makes them other than zero')
    if isinstance(module, (ops.TORCH_CONV, ops.TORCH_LINEAR)):
        if getattr(module, 'groups', 1) > 1 and not _depthwise(module): return where(every, 'they meet a grouped convolution')
        if not makes: return where(~every, '')
        if int(indices.max()) >= graph.get_out_channels(module): return where(every, 'they are broadcast')
        if _depthwise(module):  # a zero that comes in leaves but for the bias
            return where(~every if module.bias is None else module.bias.detach()[indices] != 0, 'a bias or a BatchNorm makes them other than zero')
        dead = _dead(module)
        return where(every if dead is None else ~dead[indices],
                     'they are added to, or read by, channels that are not zero: coupled=True zeroes such together')
    if isinstance(module, nn.PReLU) or type(module).__module__ == ops.__name__: return where(~every, '')
    return where(every, f'they pass a {type(module).__name__}, which mixes channels')


def _depthwise(module): return getattr(module, 'groups', 1) == getattr(module, 'out_channels', 0) == getattr(module, 'in_channels', 0) > 1


def _shift(norm):
    "What a BatchNorm makes of a zero."
    zero = torch.zeros(norm.num_features)
    scale = zero + 1 if norm.weight is None else norm.weight.detach().cpu()
    bias = zero if norm.bias is None else norm.bias.detach().cpu()
    if norm.running_mean is None: return bias
    return bias - norm.running_mean.cpu() * scale / (norm.running_var.cpu() + norm.eps).sqrt()


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
