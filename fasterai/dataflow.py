"What reads a layer's output: found by watching one batch go through, or by tracing the model."
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

# Functions and modules by name, lower case without underscores, and what they make of a channel that is all zero.
LAYERS = set('linear conv1d conv2d conv3d convtranspose1d convtranspose2d convtranspose3d'.split())
NORMS = set('batchnorm batchnorm1d batchnorm2d batchnorm3d syncbatchnorm'.split())
SAME = set('''relu relu6 leakyrelu prelu rrelu elu selu celu gelu silu mish hardswish tanh softsign hardshrink softshrink
    tanhshrink abs neg dropout dropout1d dropout2d dropout3d featuredropout identity contiguous clone to float half'''.split())
SPACE = {'interpolate': 3, 'upsample': 3} | {f'{adaptive}{kind}pool{n}d': n for adaptive in ('', 'adaptive') for kind in ('max', 'avg')
                                             for n in (1, 2, 3)}  # over so many of the last axes at most
RESHAPE = {'flatten', 'view', 'reshape'}
REDUCE = {'mean', 'sum', 'amax'}  # over space: zero stays zero
BOTH = {'add', 'iadd', 'sub', 'isub'}  # zero where both are
EITHER = {'mul', 'imul', 'multiply'}  # zero where either is
MAKERS = set('''embedding embeddingbag bilinear lstm gru rnn rnntanh rnnrelu lstmcell grucell rnncell rnntanhcell rnnrelucell
    multiheadattention multiheadattentionforward'''.split())
PRODUCTS = set('matmul rmatmul mm bmm addmm baddbmm einsum'.split())  # a layer in disguise, where one of the factors is a weight


@dataclass(eq=False)
class Node:
    "A tensor on its way through the network."
    op: str = 'other'
    inputs: tuple = ()  # of `Node`
    makers: frozenset = frozenset()  # ids of the weights whose output reaches it without passing another layer
    axis: int | None = None  # where the channels are; None where that is not known, and then nothing is said of them
    ndim: int | None = None  # how many axes
    length: int | None = None  # how many channels, None if unknown
    repeat: int = 1  # entries a channel becomes when it is flattened
    weight: nn.Parameter | None = None  # of the layer
    bias: object = None  # what the layer adds: None, a parameter, or some tensor
    norm: nn.Module | None = None  # the BatchNorm
    reads: frozenset = frozenset()  # ids of the weights that are read here


class Flow:
    "The way of the channels through one network."

    def __init__(self,
        tape: list,  # of `Node`, in the order of their making
        outputs: list,  # of `Node` or None, where nothing is known of an output
        sure: bool = True,  # False where tensors were changed in ways that could not be followed
    ):
        self.tape, self.sure = tape, sure
        self.ran = frozenset().union(*(n.reads for n in tape))  # ids of the weights that took part
        if None in outputs or not outputs:  # then all that nobody reads may be an output
            read = {i for n in tape for i in n.inputs}
            outputs = [n for n in (*outputs, *(n for n in tape if n not in read)) if n is not None]
        self.makers = frozenset().union(*(n.makers for n in outputs))  # ids of the weights that make the network's output

    def silenced(self,
        dead: dict,  # id of a layer's weight: bool (output channels,), True where the filter is zero
        biases: set,  # ids of the biases that are zero with it
    ) -> dict:  # BatchNorm: bool (channels,), for those with any
        "The channels of each BatchNorm that receive only zeros, wherever it is used."
        if not self.sure: return {}
        dead = {i: d.numpy() for i, d in dead.items()}  # of few entries, with which numpy is ten times faster
        norms = {n: _shared(n.norm) for n in self.tape if n.op == 'norm'}
        quiet = {shared: np.ones(n.length, bool) for n, shared in norms.items()}
        while True:  # a norm is silent only where all its uses are, on which in turn what follows it depends
            values = {}
            for node in self.tape:
                value = _value(node, [values.get(i) for i in node.inputs], dead, biases)
                values[node] = value & quiet[norms[node]] if node in norms and value is not None else value
            before = quiet
            quiet = dict(quiet)
            for node, shared in norms.items(): quiet[shared] = quiet[shared] & (False if values[node] is None else values[node])
            if all(np.array_equal(before[k], quiet[k]) for k in quiet): break
        return {n.norm: torch.from_numpy(quiet[shared]) for n, shared in norms.items() if quiet[shared].any()}

    def tied(self) -> list:  # of sets of ids of weights
        "Layers whose n-th output channels meet: in a sum, or in a depthwise convolution, which reads each by itself."
        sources, sets = {}, []

        def tie(ids):
            met = [s for s in sets if s & ids]
            sets[:] = [s for s in sets if not s & ids] + [frozenset().union(ids, *met)]
        for node in self.tape:
            before = [sources.get(i) for i in node.inputs]
            if node.op == 'layer':
                sources[node] = frozenset([id(node.weight)])
                alone = node.weight.ndim > 2 and node.weight.shape[1] == 1 < node.length and node.inputs and node.inputs[0].length == node.length
                if alone and before[0]: tie(sources[node] | before[0])
            elif node.op in ('same', 'norm') and node.repeat == 1: sources[node] = before[0]
            elif node.op == 'either': sources[node] = before[0]
            elif node.op == 'both' and all(before) and node.inputs[0].length == node.inputs[1].length == node.length:
                sources[node] = before[0] | before[1]
                tie(sources[node])
        return [s for s in sets if len(s) > 1]


def _shared(norm): return norm if norm.weight is None else id(norm.weight)  # two that share their scale count as one


def _value(node, values, dead, biases):
    "Which channels of `node` are zero whatever comes in; None if nothing is known."
    if node.op == 'layer': return dead.get(id(node.weight)) if node.bias is None or id(node.bias) in biases else None
    if node.op == 'cat':
        if any(v is None and i.length is None for v, i in zip(values, node.inputs)): return None
        return np.concatenate([np.zeros(i.length, bool) if v is None else v for v, i in zip(values, node.inputs)])
    if node.op in ('same', 'norm'):
        value = values[0] if values[0] is None or node.repeat == 1 else values[0].repeat(node.repeat)
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
    made = reads if name in MAKERS or name in PRODUCTS and reads else makers | reads
    other = Node(inputs=inputs, makers=made, reads=reads, ndim=after and len(after))

    def argument(i, key, default=None): return args[i] if len(args) > i else kwargs.get(key, default)
    first = argument(0, 'input')
    x = of(first)

    if name in LAYERS:
        weight, bias = argument(1, 'weight'), argument(2, 'bias')
        if not isinstance(weight, nn.Parameter): return other
        ndim = len(after) if after else weight.ndim if name != 'linear' else x and x.ndim
        axis = ndim and (ndim - 1 if name == 'linear' else ndim - (weight.ndim - 1))
        length = after[axis] if after else None if 'transpose' in name else len(weight)
        return Node('layer', inputs, frozenset([id(weight)]), axis, ndim, length, weight=weight, bias=bias, reads=reads)
    if name == 'cat':
        parts, dim = tuple(map(of, argument(0, 'tensors'))), argument(1, 'dim', 0)
        if None in parts or None in {p.ndim for p in parts} or {p.axis for p in parts} != {dim % parts[0].ndim}: return other
        length = None if any(p.length is None for p in parts) else sum(p.length for p in parts)
        return Node('cat', parts, makers, parts[0].axis, parts[0].ndim, length)
    if x is None or x.axis is None: return other
    if name in NORMS:
        norm = next((norms[id(t)] for t in leaves if id(t) in norms), None)
        return other if norm is None or x.axis != 1 else Node('norm', (x,), makers, 1, x.ndim, norm.num_features, norm=norm)

    same, before = Node('same', (x,), makers, x.axis, x.ndim, x.length), shapes.get(id(first))
    if name in SAME: return same
    if name == 'hardtanh': return same if argument(1, 'min_val', -1.) <= 0 <= argument(2, 'max_val', 1.) else other
    if name in SPACE: return same if x.axis == 1 and x.axis < x.ndim - min(SPACE[name], x.ndim - 2) else other
    if name in RESHAPE and after and after[:x.axis] == before[:x.axis]:
        same.ndim = len(after)
        if after[x.axis:x.axis + 1] == before[x.axis:x.axis + 1]: return same
        same.repeat = prod(before[x.axis + 1:])
        same.length = before[x.axis] * same.repeat
        return same if after[x.axis:] == (same.length,) else other
    if name == 'flatten' and not after and argument(1, 'start_dim', 0) == 1 == x.axis:  # a norm behind checks the length
        same.ndim = 2
        return same
    if name in REDUCE:
        dims, keep = argument(1, 'dim'), argument(2, 'keepdim', False)
        dims = dims if isinstance(dims, (tuple, list)) else (dims,)
        if not all(isinstance(d, int) and d % x.ndim > x.axis for d in dims): return other
        if not keep: same.ndim -= len(dims)
        return same
    second = of(argument(1, 'other'))
    alike = second is not None and (second.axis, second.ndim) == (x.axis, x.ndim)
    if name in BOTH: return Node('both', (x, second), makers, x.axis, x.ndim, x.length) if alike else other
    if name in EITHER:  # whatever x is multiplied by, as long as it is not broadcast
        whole = after == before if after else x.ndim >= 4 or isinstance(argument(1, 'other'), (int, float))
        if whole: return Node('either', (x, second) if alike else (x,), makers, x.axis, x.ndim, x.length)
    return other


def _in_place(name): return name.endswith('_') and not name.endswith('__') or name in ('__setitem__', 'setitem', 'iadd', 'isub', 'imul', '__iadd__',
                                                                                      '__isub__', '__imul__')


def watch(
    model: nn.Module,
    example: tuple,  # inputs of one batch, as `model(*example)` takes them
) -> Flow:
    "Run the model once, in eval mode and without gradients, and note what happens; modes, buffers and random numbers are put back."
    modes, buffers = {m: m.training for m in model.modules()}, {b: b.clone() for b in model.buffers()}
    watcher = _Watcher(_norms(model))
    try:
        for module in modes: module.training = False  # not by eval(), which some models overload
        with torch.random.fork_rng([b.device for b in list(model.parameters())[:1] if b.is_cuda]), torch.no_grad(), watcher: out = model(*example)
    finally:
        for module, mode in modes.items(): module.training = mode
        for buffer, value in buffers.items():
            if not torch.equal(buffer, value): buffer.copy_(value)
    return Flow(watcher.tape, [watcher.nodes.get(t) for t in tree_leaves(out) if isinstance(t, torch.Tensor)])


class _Watcher(TorchFunctionMode):
    def __init__(self, norms):
        super().__init__()
        self.norms, self.tape, self.nodes = norms, [], WeakTensorKeyDictionary()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        shapes = {id(t): t.shape for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **kwargs)
        name, results = func.__name__, [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and not isinstance(t, nn.Parameter)]
        if name == '__setitem__': results = [args[0]]
        if results:
            node = _note(name, args, kwargs, lambda t: self.nodes.get(t) if isinstance(t, torch.Tensor) else None,
                         self.norms, shapes, results[0].shape if len(results) == 1 else None)
            self.tape.append(node)
            if _in_place(name):  # what shares the memory has changed too
                memory = results[0].untyped_storage().data_ptr()
                for t in [t for t in self.nodes.keys() if t.untyped_storage().data_ptr() == memory]:
                    self.nodes[t] = Node(inputs=(node, self.nodes[t]), makers=node.makers | self.nodes[t].makers, ndim=t.ndim)
            for t in results: self.nodes[t] = node
        return out


def trace(model: nn.Module) -> Flow:
    "The same from the model's code, by torch.fx; raises whatever fx raises for code that it cannot follow."
    modules, norms, nodes, tape, outputs, sure = dict(model.named_modules()), _norms(model), {}, [], [], True
    def of(n): return nodes.get(n) if isinstance(n, fx.Node) else None
    def real(n): return _attribute(model, n.target) if isinstance(n, fx.Node) and n.op == 'get_attr' else n
    for n in fx.Tracer().trace(model).nodes:
        args, kwargs = fx.node.map_arg((n.args, n.kwargs), real) if n.op != 'output' else (n.args, {})
        if n.op == 'output': outputs = [of(a) for a in tree_leaves(args) if isinstance(a, fx.Node)]
        if n.op not in ('call_function', 'call_method', 'call_module'): continue
        name = n.target if n.op == 'call_method' else getattr(n.target, '__name__', '')
        if n.op == 'call_module':
            module, args = modules[n.target], args[:1] or tuple(kwargs.values())[:1]
            kwargs, name = {}, type(module).__name__
            layer = next((c.__name__ for c in type(module).__mro__ if c.__name__.lower() in LAYERS), None)
            if layer: name, args = layer, (*args, module.weight, module.bias)
            elif name == 'Flatten': args += (module.start_dim,)
            elif name == 'Hardtanh': args += (module.min_val, module.max_val)
            else: args += (*module.parameters(), *module.buffers())
        node = nodes[n] = _note(name, args, kwargs, of, norms, {}, None)
        tape.append(node)
        if _in_place(name):
            nodes[n.args[0]], sure = node, sure and node.op == 'same'
    return Flow(tape, outputs, sure)


def _norms(model):
    "The BatchNorm that each of its tensors belongs to, by the tensor's id."
    return {id(t): m for m in model.modules() if isinstance(m, _BatchNorm) for t in (*m.parameters(False), *m.buffers(False))}


def _attribute(model, path):
    for part in path.split('.'): model = getattr(model, part)
    return model
