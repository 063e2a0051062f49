"What reads a layer's output: found by watching one batch go through, or by tracing the model."
from contextlib import contextmanager

import numpy as np
import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from fasterai.operations import LAYERS, SETTINGS, Call, Node, follow, in_place, zero_channels


class Flow:
    "The way of the channels through one network."

    def __init__(self,
        tape: list,  # of `Node`, in the order of their making
        outputs: list,  # of `Node` or None, where nothing is known of an output
        sure: bool = True,  # False where tensors were changed in ways that could not be followed
    ):
        self.tape, self.sure = tape, sure
        self.ran = frozenset().union(*(n.reads for n in tape))  # ids of the weights that took part
        if None in outputs or not outputs: outputs = [*outputs, *_unread(tape)]  # each may be an output
        known = [n for n in outputs if n is not None]
        self.output_weights = frozenset().union(*(n.sources for n in known))  # ids of the weights that make the network's output

    def zero_channels(self,
        dead: dict,  # id of a layer's weight: bool (output channels,), True where the filter is zero
        biases: set,  # ids of the biases that are zero with it
    ) -> dict:  # BatchNorm: bool (channels,), for those with any
        "The channels of each BatchNorm that receive only zeros, wherever it is used."
        if not self.sure: return {}
        dead = {i: d.numpy() for i, d in dead.items()}  # of few entries, with which numpy is ten times faster
        scales = {n: _scale(n.norm) for n in self.tape if n.op == 'norm'}
        zero = {scale: np.ones(n.length, bool) for n, scale in scales.items()}
        while True:  # a norm is silent only where all its uses are, on which in turn what follows it depends
            before = zero
            zero = self._narrowed(before, scales, dead, biases)
            if all(np.array_equal(before[k], zero[k]) for k in zero): break
        return {n.norm: torch.from_numpy(zero[scale]) for n, scale in scales.items() if zero[scale].any()}

    def _narrowed(self, zero, scales, dead, biases):
        "What is silent at all uses of each norm, if no more than `zero` is zero behind them."
        values = {}
        for node in self.tape:
            value = zero_channels(node, [values.get(i) for i in node.inputs], dead, biases)
            if value is not None and node in scales: value = value & zero[scales[node]]
            values[node] = value
        zero = dict(zero)
        for node, scale in scales.items():
            value = values[node]
            zero[scale] = zero[scale] & (False if value is None else value)
        return zero

    def tied(self) -> list:  # of sets of ids of weights
        "Layers whose n-th output channels meet: in a sum, or in a depthwise convolution, which reads each by itself."
        behind, sets = {}, []
        for node in self.tape:
            before = [behind.get(i) for i in node.inputs]
            behind[node] = _layers_behind(node, before)
            if node.op == 'addition' and behind[node]: sets = _tie(sets, behind[node])
            if _depthwise(node) and before[0]: sets = _tie(sets, behind[node] | before[0])
        return [s for s in sets if len(s) > 1]


def _unread(tape):
    read = {i for n in tape for i in n.inputs}
    return [n for n in tape if n not in read]


def _scale(norm):
    "What tells a norm's scale from others: two that share it count as one."
    return norm if norm.weight is None else id(norm.weight)


def _layers_behind(node, before):
    "The layers whose n-th channel is in the n-th channel of a node, from those of its inputs; None if there are none."
    if node.op == 'layer': return frozenset([id(node.weight)])
    if node.op in ('keeps_zeros', 'norm') and node.repeat == 1: return before[0]
    if node.op == 'multiplication': return before[0]
    if node.op == 'addition' and all(before) and _same_length(node): return before[0] | before[1]
    return None


def _same_length(node): return {i.length for i in node.inputs} == {node.length}


def _depthwise(node):
    if node.op != 'layer' or node.weight.ndim <= 2: return False
    if not node.weight.shape[1] == 1 < node.length: return False
    return bool(node.inputs) and node.inputs[0].length == node.length


def _tie(sets, ids):
    "One set of `ids` and of all sets that share any with it."
    met = [s for s in sets if s & ids]
    apart = [s for s in sets if not s & ids]
    return [*apart, ids.union(*met)]


# Watching a batch

def watch(
    model: nn.Module,
    example: tuple,  # inputs of one batch, as `model(*example)` takes them
) -> Flow:
    """Run the model once, in eval mode and without gradients, and note what happens.

    Modes, buffers and random numbers are put back."""
    watcher = _Watcher(_norms(model))
    with _evaluating(model), torch.no_grad(), watcher: out = model(*example)
    return Flow(watcher.tape, [watcher.node_of(t) for t in _tensors(out)])


@contextmanager
def _evaluating(model):
    "The model in eval mode; modes, buffers and random numbers are put back."
    modes = {m: m.training for m in model.modules()}
    buffers = {b: b.clone() for b in model.buffers()}
    devices = [p.device for p in list(model.parameters())[:1] if p.is_cuda]
    try:
        for module in modes: module.training = False  # not by eval(), which some models overload
        with torch.random.fork_rng(devices): yield
    finally:
        for module, mode in modes.items(): module.training = mode
        for buffer, value in buffers.items():
            if not torch.equal(buffer, value): buffer.copy_(value)


class _Watcher(TorchFunctionMode):
    "Notes each operation that makes or changes a tensor."

    def __init__(self, norms):
        super().__init__()
        self.norms, self.tape, self.nodes = norms, [], WeakTensorKeyDictionary()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        shapes = {id(t): t.shape for t in _tensors((args, kwargs))}  # now, as the call may change them
        out = func(*args, **kwargs)
        results = _results(func.__name__, args, out)
        if results:
            after = results[0].shape if len(results) == 1 else None
            self._record(Call(func.__name__, args, kwargs, self.node_of, self.norms, shapes, after), results)
        return out

    def node_of(self, x): return self.nodes.get(x) if isinstance(x, torch.Tensor) else None

    def _record(self, call, results):
        node = follow(call)
        self.tape.append(node)
        if in_place(call.name): self._change(results[0], node)
        for t in results: self.nodes[t] = node

    def _change(self, tensor, node):
        "What shares the memory has changed too."
        memory = _memory(tensor)
        for t in [t for t in self.nodes.keys() if _memory(t) == memory]:
            before = self.nodes[t]
            self.nodes[t] = Node(inputs=(node, before), sources=node.sources | before.sources, ndim=t.ndim)


def _results(name, args, out):
    "The tensors that a call made or changed."
    if name == '__setitem__': return [args[0]]
    return [t for t in _tensors(out) if not isinstance(t, nn.Parameter)]


def _tensors(tree): return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def _memory(tensor): return tensor.untyped_storage().data_ptr()


# Tracing the code

def trace(model: nn.Module) -> Flow:
    "The same from the model's code, by torch.fx; raises whatever fx raises for code that it cannot follow."
    graph, norms = fx.Tracer().trace(model), _norms(model)
    nodes, tape, outputs, sure = {}, [], [], True
    def node_of(x): return nodes.get(x) if isinstance(x, fx.Node) else None
    for step in graph.nodes:
        if step.op == 'output': outputs = [node_of(x) for x in step.all_input_nodes]
        if step.op not in STEPS: continue
        name, args, kwargs = STEPS[step.op](model, step)
        node = follow(Call(name, args, kwargs, node_of, norms))
        tape.append(node)
        nodes[step] = node
        if in_place(name):
            nodes[step.args[0]] = node
            sure = sure and node.op == 'keeps_zeros'
    return Flow(tape, outputs, sure)


def _function_call(model, step):
    return getattr(step.target, '__name__', ''), *_arguments(model, step)


def _method_call(model, step):
    return step.target, *_arguments(model, step)


def _module_call(model, step):
    "The call of a module as one of its function: the input, then what the rule asks for, or all its tensors."
    args, kwargs = _arguments(model, step)
    args = args[:1] or tuple(kwargs.values())[:1]
    module = model.get_submodule(step.target)
    name = type(module).__name__
    layer = next((c.__name__ for c in type(module).__mro__ if c.__name__.lower() in LAYERS), None)
    if layer: return layer, (*args, module.weight, module.bias), {}
    if name not in SETTINGS: return name, (*args, *module.parameters(), *module.buffers()), {}
    settings = [getattr(module, s) for s in SETTINGS[name]]
    return name, (*args, *settings), {}


STEPS = {'call_function': _function_call, 'call_method': _method_call, 'call_module': _module_call}


def _arguments(model, step):
    "The arguments of a step, with the model's tensors in place of the nodes that stand for them."
    def real(x): return _attribute(model, x.target) if x.op == 'get_attr' else x
    return fx.node.map_arg((step.args, step.kwargs), real)


def _attribute(model, path):
    for part in path.split('.'): model = getattr(model, part)
    return model


def _norms(model):
    "The BatchNorm that each of its tensors belongs to, by the tensor's id."
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    return {id(t): m for m in norms for t in (*m.parameters(False), *m.buffers(False))}
