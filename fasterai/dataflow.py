"What reads a layer's output: found by watching one batch go through, or by tracing the model."
from dataclasses import dataclass
from math import prod

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from fasterai.granularity import axes_of

# Functions and modules by name, lower case without underscores, and what they make of a channel that is all zero.
LAYERS = set('linear conv1d conv2d conv3d convtranspose1d convtranspose2d convtranspose3d'.split())
NORMS = set('batchnorm batchnorm1d batchnorm2d batchnorm3d syncbatchnorm'.split())
SAME = set('''relu relu6 leakyrelu prelu rrelu elu selu celu gelu silu mish hardswish hardtanh tanh softsign hardshrink softshrink
    tanhshrink abs neg dropout dropout1d dropout2d dropout3d featuredropout identity contiguous clone to float half
    maxpool1d maxpool2d maxpool3d avgpool1d avgpool2d avgpool3d adaptiveavgpool1d adaptiveavgpool2d adaptiveavgpool3d
    adaptivemaxpool1d adaptivemaxpool2d adaptivemaxpool3d interpolate upsample'''.split())
RESHAPE = {'flatten', 'view', 'reshape'}
REDUCE = {'mean', 'sum', 'amax'}  # over space: zero stays zero
BOTH = {'add', 'iadd', 'sub', 'isub'}  # zero where both are
EITHER = {'mul', 'imul', 'multiply'}  # zero where either is
MAKERS = set('embedding embeddingbag bilinear lstm gru rnn rnntanh rnnrelu multiheadattention multiheadattentionforward'.split())


@dataclass(eq=False)
class Node:
    "A tensor on its way through the network."
    op: str = 'other'
    inputs: tuple = ()  # of `Node`
    makers: frozenset = frozenset()  # ids of the weights whose output reaches it without passing another layer
    axis: int | None = None  # where the channels are
    length: int | None = None  # how many channels, None if unknown
    repeat: int = 1  # entries a channel becomes when it is flattened
    weight: nn.Parameter | None = None  # of the layer
    norm: nn.Module | None = None  # the BatchNorm


class Flow:
    "The way of the channels through one network."

    def __init__(self, tape: list, outputs: list):
        self.tape = tape
        self.makers = frozenset().union(*(n.makers for n in outputs))  # ids of the weights that make the network's output

    def silenced(self,
        dead: dict,  # id of a layer's weight: bool (output channels,), True where the filter and its bias are zero
    ) -> dict:  # BatchNorm: bool (channels,), for those with any
        "The channels of each BatchNorm that receive only zeros, wherever it is used."
        values, found = {}, {}
        for node in self.tape:
            value = values[node] = _value(node, [values.get(i) for i in node.inputs], dead)
            if node.op == 'norm':
                quiet = torch.zeros(node.length, dtype=torch.bool) if value is None else value
                found[node.norm] = found.get(node.norm, quiet) & quiet
        return {norm: quiet for norm, quiet in found.items() if quiet.any()}


def _value(node, values, dead):
    "Which channels of `node` are zero whatever comes in; None if nothing is known."
    if node.op == 'layer': return dead.get(id(node.weight))
    if node.op == 'cat':
        if any(v is None and i.length is None for v, i in zip(values, node.inputs)): return None
        return torch.cat([torch.zeros(i.length, dtype=torch.bool) if v is None else v for v, i in zip(values, node.inputs)])
    if node.op in ('same', 'norm'):
        value = None if values[0] is None else values[0].repeat_interleave(node.repeat)
        return value if node.op == 'same' or value is None or len(value) == node.length else None
    if node.op == 'both':
        a, b = values
        return a & b if a is not None and b is not None and len(a) == len(b) else None
    if node.op == 'either':
        known = [v for v in values if v is not None]
        return known[0] if len(known) == 1 else known[0] | known[1] if len(known) == 2 and len(known[0]) == len(known[1]) else None
    return None

def _note(name, args, kwargs, of, norms, shapes, after):
    """One step of the network as a `Node`; `of` gives the node of an argument, `norms` the BatchNorm that owns a tensor (by id),
    `shapes` and `after` the shapes of the arguments (by id) and of the result, where they are known."""
    name = name.lower().replace('_', '')
    leaves = tree_leaves((args, kwargs))
    inputs = tuple(n for n in map(of, leaves) if n is not None)
    reads = frozenset(id(p) for p in leaves if isinstance(p, nn.Parameter) and p.ndim > 1)
    makers = frozenset().union(*(n.makers for n in inputs))
    other = Node(inputs=inputs, makers=reads if name in MAKERS else makers | reads)

    def argument(i, key, default=None): return args[i] if len(args) > i else kwargs.get(key, default)
    first = argument(0, 'input')
    x = of(first)

    if name in LAYERS:
        weight = argument(1, 'weight')
        if not isinstance(weight, nn.Parameter): return other
        axis = -1 if name == 'linear' else 1
        if after: axis = len(after) - (1 if name == 'linear' else weight.ndim - 1)
        length = after[axis] if after else None if 'transpose' in name else len(weight)
        return Node('layer', inputs, frozenset([id(weight)]), axis, length, weight=weight)
    if name == 'cat':
        parts, dim = tuple(map(of, argument(0, 'tensors'))), argument(1, 'dim', 0)
        if None in parts or {p.axis for p in parts} != {dim % len(after) if after else dim}: return other
        length = None if any(p.length is None for p in parts) else sum(p.length for p in parts)
        return Node('cat', parts, makers, parts[0].axis, length)
    if x is None or x.axis is None: return other
    if name in NORMS:
        norm = next((norms[id(t)] for t in leaves if id(t) in norms), None)
        if norm is None or x.axis not in (1, -1): return other
        return Node('norm', (x,), makers, x.axis, norm.num_features, norm=norm)

    before = shapes.get(id(first))
    same = Node('same', (x,), makers, x.axis, x.length)
    if name in SAME and (not after or after[x.axis] == before[x.axis]): return same
    if name in RESHAPE and not after and name == 'flatten' and argument(1, 'start_dim', 0) == 1: return same
    if name in RESHAPE and after and after[:x.axis] == before[:x.axis]:
        if after[x.axis:x.axis + 1] == before[x.axis:x.axis + 1]: return same
        same.repeat = prod(before[x.axis + 1:])
        same.length = before[x.axis] * same.repeat
        if after[x.axis:] == (same.length,): return same
    if name in REDUCE and x.axis == 1:
        dims = argument(1, 'dim')
        dims = dims if isinstance(dims, (tuple, list)) else (dims,)
        if all(isinstance(d, int) and (d > 1 or d in (-1, -2)) for d in dims) and (not before or len(before) - len(dims) > 1): return same
    second = of(argument(1, 'other'))
    if name in BOTH and second is not None and second.axis == x.axis: return Node('both', (x, second), makers, x.axis, x.length)
    if name in EITHER and (not after or (after[x.axis:x.axis + 1] == before[x.axis:x.axis + 1] and len(after) == len(before))):
        return Node('either', (x,) if second is None or second.axis != x.axis else (x, second), makers, x.axis, x.length)
    return other


def watch(
    model: nn.Module,
    example: tuple,  # inputs of one batch, as `model(*example)` takes them
) -> Flow:
    "Run the model once, in eval mode and without gradients, and note what happens; modes are put back."
    modes = {m: m.training for m in model.modules()}
    watcher = _Watcher(_norms(model))
    try:
        model.eval()
        with torch.no_grad(), watcher: out = model(*example)
    finally:
        for module, mode in modes.items(): module.training = mode
    return Flow(watcher.tape, [watcher.nodes[t] for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t in watcher.nodes])


class _Watcher(TorchFunctionMode):
    def __init__(self, norms):
        super().__init__()
        self.norms, self.tape, self.nodes = norms, [], WeakTensorKeyDictionary()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        before = {id(t): t.shape for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        results = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and not isinstance(t, nn.Parameter)]
        name = func.__name__
        if name == '__setitem__': results = [args[0]]
        if results:
            node = _note(name, args, kwargs or {}, lambda t: self.nodes.get(t) if isinstance(t, torch.Tensor) else None,
                         self.norms, before, results[0].shape if len(results) == 1 else None)
            self.tape.append(node)
            for t in results: self.nodes[t] = node
        return out


def trace(model: nn.Module) -> Flow:
    "The same from the model's code, by torch.fx; raises whatever fx raises for code that it cannot follow."
    modules, norms, nodes, tape, outputs = dict(model.named_modules()), _norms(model), {}, [], []
    def of(n): return nodes.get(n) if isinstance(n, fx.Node) else None
    def real(n): return _attribute(model, n.target) if isinstance(n, fx.Node) and n.op == 'get_attr' else n
    for n in fx.Tracer().trace(model).nodes:
        args, kwargs = fx.node.map_arg((n.args, n.kwargs), real) if n.op != 'output' else (n.args, {})
        if n.op == 'output': outputs = [of(a) for a in tree_leaves(args) if of(a) is not None]
        if n.op not in ('call_function', 'call_method', 'call_module'): continue
        name = n.target if n.op == 'call_method' else getattr(n.target, '__name__', '')
        if n.op == 'call_module':
            module = modules[n.target]
            name = type(module).__name__
            if axes_of(module) is not None: name = next(c.__name__ for c in type(module).__mro__ if c.__name__.lower() in LAYERS)
            if name == 'Flatten': args += (module.start_dim,)
            args += (*module.parameters(), *module.buffers())
        nodes[n] = _note(name, args, kwargs, of, norms, {}, None)
        tape.append(nodes[n])
    return Flow(tape, outputs)


def _norms(model):
    "The BatchNorm that each of its tensors belongs to, by the tensor's id."
    return {id(t): m for m in model.modules() if isinstance(m, _BatchNorm) for t in (*m.parameters(False), *m.buffers(False))}


def _attribute(model, path):
    for part in path.split('.'): model = getattr(model, part)
    return model
