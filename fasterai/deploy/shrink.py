"Make a network smaller: remove the filters that put out exactly zero, with all that depends on them."
from collections import Counter
from copy import deepcopy

import torch
import torch_pruning as tp
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch_pruning import ops

from fasterai.deploy.compare import agree, check_module, example_inputs, fresh, outputs
from fasterai.snapshot import evaluation_mode

# why filters that are zero stay
OTHER_OUTPUTS = 'without them the outputs would not be the same'
NOT_FOLLOWED = 'torch-pruning cannot follow them'
LAST_ONE = 'one channel must be left'
IS_OUTPUT = "they are the network's output"
IS_BROADCAST = 'they are broadcast'
IS_SHIFTED = 'a bias or a BatchNorm makes them other than zero'
MEETS_PARAMETER = 'they meet a parameter of no layer'
MEETS_SHARED = 'they meet a weight that several layers share'
MEETS_GROUPS = 'they meet a grouped convolution'
MEETS_NONZERO = 'they are added to, or read by, channels that are not zero: coupled=True zeroes such together'


def shrink(
    model: nn.Module,  # any dense network with zeros in it; it is not changed
    example,  # a batch as the model takes it, a tuple for several inputs
    verbose: bool = True,  # print how many filters were removed, and why others could not be
) -> nn.Module:  # a smaller copy, an ordinary model
    """Remove the filters whose outputs are zero for any input, with the weights that read them.

    What depends on a filter is found by Torch-Pruning (Fang et al. 2023). The copy computes the same outputs:
    a filter whose removal would change them stays."""
    check_module(model)
    inputs, base = example_inputs(example), deepcopy(model)
    known = _known(base, inputs)
    small, removed, left = _without(base, inputs)
    if not _same(small, known):  # some operation makes something of a zero: one layer at a time then
        keep = _harmless(base, inputs, removed, known)
        wrong = {name: [OTHER_OUTPUTS] * count for name, count in removed.items() if name not in keep}
        small, removed, left = _without(base, inputs, keep)
        left |= wrong
    if verbose: print(_account(model, small, removed, left))
    return small


def _known(model, inputs):
    "Run the model on the example, and on random inputs if it takes them: [(inputs, outputs)]."
    known = [(inputs, outputs(model, inputs))]
    for batch in fresh(inputs):
        try: known.append((batch, outputs(model, batch)))
        except ValueError: pass
    return known


def _same(small, known):
    try: return all(agree(outputs(small, batch), expected) for batch, expected in known)
    except ValueError: return False


def _harmless(model, inputs, names, known):
    "Find the layers whose zero filters can go, tried one after the other, with the outputs the same."
    keep = []
    for name in names:
        small, *_ = _without(model, inputs, [*keep, name])
        if _same(small, known): keep.append(name)
    return keep


class _Broken(Exception):
    "Say that Torch-Pruning failed at the layer of this name."


def _without(model, inputs, names=None):
    "Return a copy without the zero filters of some layers (None: all), how many went, and why others stay."
    skip = []
    while True:  # a layer at which Torch-Pruning fails has spoilt the copy: another one, without that layer
        try: return _try_without(model, inputs, names, skip)
        except _Broken as broken: skip.append(str(broken))


def _try_without(model, inputs, names, skip):
    small, removed, left = deepcopy(model), {}, {name: [NOT_FOLLOWED] for name in skip}
    learns = {name: p.requires_grad for name, p in small.named_parameters()}
    with evaluation_mode(small):
        graph = _dependencies(small, inputs)
        for name, module in small.named_modules():
            if name in skip or module not in graph.module2node: continue
            if names is not None and name not in names: continue
            dead = _dead(module)
            if dead is None or not dead.any(): continue
            gone, why = _remove(graph, name, module, dead.nonzero().flatten().tolist(), _shared(small))
            if gone: removed[name] = gone
            if why: left[name] = why
    for name, p in small.named_parameters():
        p.requires_grad_(learns.get(name, True))
        p.grad = None
    return small, removed, left


def _dependencies(model, inputs):
    "Build Torch-Pruning's graph of which layers share channels; sets all parameters to require gradients."
    for p in model.parameters(): p.requires_grad_(p.is_floating_point())  # autograd is followed
    example = inputs if len(inputs) > 1 else inputs[0]
    try: return tp.DependencyGraph().build_dependency(model, example_inputs=example, verbose=False)
    except Exception as error:
        raise ValueError(f'model: {type(model).__name__} cannot be followed by torch-pruning: '
                         f'{type(error).__name__}: {error}') from error


def _shared(model):
    "Return the ids of the parameters that several modules hold."
    held = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    return {i for i, times in held.items() if times > 1}


def _dead(module):
    "Find the output channels that are zero for any input: bool (channels,), None for other modules."
    if not isinstance(module, (ops.TORCH_CONV, ops.TORCH_LINEAR)): return None
    weight, transposed = module.weight.detach(), getattr(module, 'transposed', False)
    if transposed and module.groups > 1: return None
    if transposed: weight = weight.transpose(0, 1)  # output channels first
    dead = ~weight.flatten(1).any(1)
    return dead if module.bias is None else dead & (module.bias.detach() == 0)


def _remove(graph, name, module, channels, shared):
    "Remove the channels that can be, and return how many, and why the others stay."
    pruner = graph.get_pruner_of_module(module)
    try:
        why = _obstacles(graph, graph.get_pruning_group(module, pruner.prune_out_channels, channels), shared)
        free = [c for c in channels if c not in why]
        if len(free) == graph.get_out_channels(module):
            first, *free = free
            why[first] = LAST_ONE
        if free: graph.get_pruning_group(module, pruner.prune_out_channels, free).prune()
    except Exception as error: raise _Broken(name) from error
    return len(free), list(why.values())


def _obstacles(graph, group, shared):
    "Find the channels that cannot go with all that depends on them: {channel: the first reason}."
    why = {}
    for item in group:  # a layer or operation, its channels, and those of the first layer that they come from
        stays, reason = _stays(graph, item.dep, torch.tensor(item.idxs), shared)
        for channel, stay in zip(item.root_idxs, stays.tolist()):
            if stay: why.setdefault(channel, reason)
    return why


def _stays(graph, dep, indices, shared):
    "Find the channels of one dependent layer or operation that cannot go, bool (channels,), and the reason."
    module, makes = dep.target.module, graph.is_out_channel_pruning_fn(dep.handler)
    every = torch.ones(len(indices), dtype=torch.bool)
    if makes and not dep.target.outputs: return every, IS_OUTPUT
    if isinstance(module, nn.Parameter): return every, MEETS_PARAMETER
    if any(id(p) in shared for p in module._parameters.values()): return every, MEETS_SHARED
    if isinstance(module, _BatchNorm): return _stays_in_norm(module, indices, every)
    if isinstance(module, (ops.TORCH_CONV, ops.TORCH_LINEAR)):
        return _stays_in_layer(module, indices, every, makes, graph.get_out_channels(module))
    if _leaves_zeros(graph, module): return ~every, ''
    return every, f'they pass a {type(module).__name__}, which mixes channels'


def _stays_in_norm(module, indices, every):
    if int(indices.max()) >= module.num_features: return every, IS_BROADCAST
    return _shift(module)[indices] != 0, IS_SHIFTED


def _stays_in_layer(module, indices, every, makes, channels):
    if getattr(module, 'groups', 1) > 1 and not _depthwise(module): return every, MEETS_GROUPS
    if not makes: return ~every, ''  # it reads zeros: what they are multiplied by can go
    if int(indices.max()) >= channels: return every, IS_BROADCAST
    if not _depthwise(module):
        dead = _dead(module)
        return (every if dead is None else ~dead[indices]), MEETS_NONZERO
    if module.bias is None: return ~every, ''
    return module.bias.detach()[indices] != 0, IS_SHIFTED  # a zero that comes in leaves but for the bias


def _leaves_zeros(graph, module):
    "Tell whether zero channels pass a module as they are: a PReLU, or an operation without weights."
    # Torch-Pruning has a pruner that does nothing where there are no weights to cut
    return isinstance(module, nn.PReLU) or isinstance(graph.get_pruner_of_module(module), ops.DummyPruner)


def _depthwise(module):
    groups = getattr(module, 'groups', 1)
    return groups > 1 and groups == getattr(module, 'in_channels', 0) == getattr(module, 'out_channels', 0)


def _shift(norm):
    "Compute the outputs of a BatchNorm for inputs that are zero."
    zero = torch.zeros(norm.num_features)
    scale = zero + 1 if norm.weight is None else norm.weight.detach().cpu()
    bias = zero if norm.bias is None else norm.bias.detach().cpu()
    if norm.running_mean is None: return bias
    return bias - norm.running_mean.cpu() * scale / (norm.running_var.cpu() + norm.eps).sqrt()


def parameters(
    model: nn.Module,
) -> int:
    "Count the parameters of a model."
    return sum(p.numel() for p in model.parameters())


def _account(model, small, removed, left):
    before, after = parameters(model), parameters(small)
    lines = [f'shrink: {sum(removed.values()):,} filters of {len(removed)} layers removed; '
             f'{before:,} parameters became {after:,} ({100 * after / before:.1f} %)']
    for why in dict.fromkeys(w for reasons in left.values() for w in reasons):
        counts = {name: reasons.count(why) for name, reasons in left.items() if why in reasons}
        lines.append(f'  {sum(counts.values()):,} zero filters stay in {_listed(list(counts))}: {why}')
    if not removed and not left: lines.append('  no filter is zero: prune with granularity=\'filter\' first')
    return '\n'.join(lines)


def _listed(names, most=3):
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(names[:most]) + more
