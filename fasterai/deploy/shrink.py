"Make a network smaller: remove the filters that put out exactly zero, with all that depends on them."
from collections import Counter
from copy import deepcopy

import torch
import torch_pruning as tp
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch_pruning import ops

from fasterai.deploy.compare import agree, check_copyable, example_inputs, fresh, outputs
from fasterai.snapshot import evaluation_mode

# the reasons why filters that are zero stay
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
    example,  # a batch as the model takes it: a tuple for several inputs, a dict for keywords
    verbose: bool = True,  # print how many filters were removed, and why others could not be
) -> nn.Module:  # a smaller copy, an ordinary model
    """Remove the filters whose outputs are zero for any input, with the weights that read them.

    What depends on a filter is found by Torch-Pruning (Fang et al. 2023). The copy computes the same outputs:
    a filter whose removal would change them stays."""
    check_copyable(model)
    inputs, base = example_inputs(example, model), deepcopy(model)
    reference = _reference_outputs(base, inputs)
    small, removed, remaining = _remove_zero_filters(base, inputs)
    if not _same_outputs(small, reference):  # an operation makes a zero something else: try layer by layer
        safe = _safe_layers(base, inputs, removed, reference)
        unsafe = {name: [OTHER_OUTPUTS] * count for name, count in removed.items() if name not in safe}
        small, removed, remaining = _remove_zero_filters(base, inputs, safe)
        remaining |= unsafe
    if verbose: print(_summary(model, small, removed, remaining))
    return small


def _reference_outputs(model, inputs):
    "Run the model on the example, and on random inputs if it takes them: [(inputs, outputs)]."
    reference = [(inputs, outputs(model, inputs))]
    for batch in fresh(inputs):
        try: reference.append((batch, outputs(model, batch)))
        except ValueError: pass
    return reference


def _same_outputs(small, reference):
    try: return all(agree(outputs(small, batch), expected) for batch, expected in reference)
    except ValueError: return False


def _safe_layers(model, inputs, names, reference):
    "Find the layers whose zero filters can go, tried one after the other, with the outputs the same."
    safe = []
    for name in names:
        small, *_ = _remove_zero_filters(model, inputs, [*safe, name])
        if _same_outputs(small, reference): safe.append(name)
    return safe


class _PruningFailed(Exception):
    "Say that Torch-Pruning failed at the layer of this name."


def _remove_zero_filters(model, inputs, names=None):
    "Return a copy without the zero filters of some layers (None: all), how many went, and why others stay."
    skip = []
    while True:  # a layer at which Torch-Pruning fails has spoilt the copy: another one, without that layer
        try: return _try_to_remove(model, inputs, names, skip)
        except _PruningFailed as failure: skip.append(str(failure))


def _try_to_remove(model, inputs, names, skip):
    small, removed, remaining = deepcopy(model), {}, {name: [NOT_FOLLOWED] for name in skip}
    requires_grad = {name: p.requires_grad for name, p in small.named_parameters()}
    with evaluation_mode(small):
        graph = _dependencies(small, inputs)
        for name, module in small.named_modules():
            if name in skip or module not in graph.module2node: continue
            if names is not None and name not in names: continue
            zero = _zero_filters(module)
            if zero is None or not zero.any(): continue
            channels = zero.nonzero().flatten().tolist()
            count, reasons = _remove_channels(graph, name, module, channels, _shared_parameters(small))
            if count: removed[name] = count
            if reasons: remaining[name] = reasons
    for name, p in small.named_parameters():
        p.requires_grad_(requires_grad.get(name, True))
        p.grad = None
    return small, removed, remaining


def _dependencies(model, inputs):
    "Build Torch-Pruning's graph of which layers share channels; sets all parameters to require gradients."
    for p in model.parameters(): p.requires_grad_(p.is_floating_point())  # autograd is followed
    graph = tp.DependencyGraph()
    try: return graph.build_dependency(model, inputs, lambda model, inputs: inputs.call(model), verbose=False)
    except Exception as error:
        raise ValueError(f'model: {type(model).__name__} cannot be followed by torch-pruning: '
                         f'{type(error).__name__}: {error}') from error


def _shared_parameters(model):
    "Return the ids of the parameters that several modules hold."
    held = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    return {i for i, times in held.items() if times > 1}


def _zero_filters(module):
    "Find the output channels that are zero for any input: bool (channels,), None for other modules."
    if not isinstance(module, (ops.TORCH_CONV, ops.TORCH_LINEAR)): return None
    weight, transposed = module.weight.detach(), getattr(module, 'transposed', False)
    if transposed and module.groups > 1: return None
    if transposed: weight = weight.transpose(0, 1)  # output channels first
    zero = ~weight.flatten(1).any(1)
    return zero if module.bias is None else zero & (module.bias.detach() == 0)


def _remove_channels(graph, name, module, channels, shared):
    "Remove the channels that can be, and return how many, and why the others stay."
    pruner = graph.get_pruner_of_module(module)
    try:
        group = graph.get_pruning_group(module, pruner.prune_out_channels, channels)
        reasons = _obstacles(graph, group, shared)
        removable = [c for c in channels if c not in reasons]
        if len(removable) == graph.get_out_channels(module):
            first, *removable = removable
            reasons[first] = LAST_ONE
        if removable: graph.get_pruning_group(module, pruner.prune_out_channels, removable).prune()
    except Exception as error: raise _PruningFailed(name) from error
    return len(removable), list(reasons.values())


def _obstacles(graph, group, shared):
    "Find the channels that cannot go with all that depends on them: {channel: the first reason}."
    reasons = {}
    for item in group:  # a layer or operation, its channels, and those of the first layer that they come from
        blocked, reason = _blocked(graph, item.dep, torch.tensor(item.idxs), shared)
        for channel, is_blocked in zip(item.root_idxs, blocked.tolist()):
            if is_blocked: reasons.setdefault(channel, reason)
    return reasons


def _blocked(graph, dep, indices, shared):
    "Find the channels of one dependent layer or operation that cannot go, bool (channels,), and the reason."
    module, cuts_outputs = dep.target.module, graph.is_out_channel_pruning_fn(dep.handler)
    every = torch.ones(len(indices), dtype=torch.bool)
    if cuts_outputs and not dep.target.outputs: return every, IS_OUTPUT
    if isinstance(module, nn.Parameter): return every, MEETS_PARAMETER
    if any(id(p) in shared for p in module._parameters.values()): return every, MEETS_SHARED
    if isinstance(module, _BatchNorm): return _blocked_by_norm(module, indices, every)
    if isinstance(module, (ops.TORCH_CONV, ops.TORCH_LINEAR)):
        return _blocked_by_layer(module, indices, every, cuts_outputs, graph.get_out_channels(module))
    if _passes_zeros(graph, module): return ~every, ''
    return every, f'they pass a {type(module).__name__}, which mixes channels'


def _blocked_by_norm(module, indices, every):
    if int(indices.max()) >= module.num_features: return every, IS_BROADCAST
    return _outputs_for_zeros(module)[indices] != 0, IS_SHIFTED


def _blocked_by_layer(module, indices, every, cuts_outputs, channels):
    if getattr(module, 'groups', 1) > 1 and not _is_depthwise(module): return every, MEETS_GROUPS
    if not cuts_outputs: return ~every, ''  # it reads zeros: what they are multiplied by can go
    if int(indices.max()) >= channels: return every, IS_BROADCAST
    if not _is_depthwise(module):
        zero = _zero_filters(module)
        return (every if zero is None else ~zero[indices]), MEETS_NONZERO
    if module.bias is None: return ~every, ''
    return module.bias.detach()[indices] != 0, IS_SHIFTED  # a zero that comes in leaves but for the bias


def _passes_zeros(graph, module):
    "Tell whether zero channels pass a module as they are: a PReLU, or an operation without weights."
    # Torch-Pruning has a pruner that does nothing where there are no weights to cut
    return isinstance(module, nn.PReLU) or isinstance(graph.get_pruner_of_module(module), ops.DummyPruner)


def _is_depthwise(module):
    groups = getattr(module, 'groups', 1)
    return groups > 1 and groups == getattr(module, 'in_channels', 0) == getattr(module, 'out_channels', 0)


def _outputs_for_zeros(norm):
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


def _summary(model, small, removed, remaining):
    before, after = parameters(model), parameters(small)
    lines = [f'shrink: {sum(removed.values()):,} filters of {len(removed)} layers removed; '
             f'{before:,} parameters became {after:,} ({100 * after / before:.1f} %)']
    for reason in dict.fromkeys(r for reasons in remaining.values() for r in reasons):
        counts = {name: reasons.count(reason) for name, reasons in remaining.items() if reason in reasons}
        lines.append(f'  {sum(counts.values()):,} zero filters stay in {_listed(list(counts))}: {reason}')
    if not removed and not remaining:
        lines.append("  no filter is zero: prune with granularity='filter' first")
    return '\n'.join(lines)


def _listed(names, most=3):
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(names[:most]) + more
