"Find what reads a layer's output, by watching one batch go through the model or by tracing its code."

import numpy as np
import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from fasterai.channels import behind, zero_entries
from fasterai.operations import LAYERS, SETTINGS, Call, Node, follow, in_place
from fasterai.shards import kind_of
from fasterai.snapshot import attributes_kept, evaluation_mode, undisturbed


class Flow:
    """Describe how the channels go through one network.

    `ran` has the ids of the weights that were read, `output_weights` of those that make the output."""

    def __init__(self,
        tape: list,  # of `Node`, in the order in which the operations ran
        outputs: list,  # the `Node` of each output of the network, None if unknown
        sure: bool = True,  # False if tensors were changed in place in ways that could not be followed
    ):
        self.tape, self.sure = _with_inputs(tape), sure
        self.ran = frozenset().union(*(n.reads for n in tape))  # ids
        if None in outputs or not outputs: outputs = [*outputs, *_unread(self.tape)]  # any may be an output
        known = [n for n in outputs if n is not None]
        self.output_weights = frozenset().union(*(n.sources for n in known))  # ids
        self.shifts = _shifts(self.tape)  # {id: parameter}
        masked = [n for n in self.tape if n.op == 'norm' or self._shift(n)]
        self.masked = _leading_to(masked)

    def zero_channels(self,
        dead: dict,  # id of a layer's weight: bool (output channels,), True where the filter is zero
        biases: dict,  # id of a bias: bool (output channels,), True where it is zero, with the filter
    ) -> dict:  # BatchNorm, or a parameter that is added to channels: bool (channels,), for each that has any
        "Find the channels of each BatchNorm and learned shift that meet only zeros at all its uses."
        if not self.sure: return {}
        dead, biases = _as_arrays(dead), _as_arrays(biases)
        norms = [n for n in self.tape if n.op == 'norm']
        scales = {n: _scale(n.norm) for n in norms}
        zero = {scale: np.ones(n.length, bool) for n, scale in scales.items()}
        shifts = {i: shift for i, shift in self.shifts.items() if i not in biases}
        zero |= {i: np.ones(shift.numel(), bool) for i, shift in shifts.items()}
        while True:  # what one use rules out changes what follows the others: repeat until nothing changes
            before = zero
            zero = self._narrowed(before, scales, dead, biases)
            if all(np.array_equal(before[k], zero[k]) for k in zero): break
        keys = [(n.norm, scale) for n, scale in scales.items()] + [(shift, i) for i, shift in shifts.items()]
        return {key: torch.from_numpy(zero[i]) for key, i in keys if zero[i].any()}

    def _shift(self, node):
        "Return the bias node and the other one, where a learned shift is added to channels; else None."
        if node.op != 'addition': return None
        a, b = node.inputs
        for shift, x in ((a, b), (b, a)):
            if shift.op == 'bias' and id(shift.bias) in self.shifts: return shift, x
        return None

    def _narrowed(self, zero, scales, dead, biases):
        """Return the channels that are zero at all uses of each norm and shift, if those in `zero` are zero
        behind it."""
        values, found = {}, dict(zero)
        biases = biases | {i: zero[i] for i in self.shifts if i in zero}
        for node in self.tape:
            if node not in self.masked: continue
            value = zero_entries(node, [values.get(i) for i in node.inputs], dead, biases)
            if node in scales:
                scale = scales[node]
                channels = False if value is None else value.reshape(-1)
                found[scale] = found[scale] & channels
                value = (zero[scale] & channels).reshape(node.places)
            values[node] = value
            self._narrow_shift(node, values, found)
        return found

    def _narrow_shift(self, node, values, found):
        "Take from a shift the channels to which something is added that is not zero."
        met = self._shift(node)
        if met is None or id(met[0].bias) not in found: return
        shift, x = met
        value = values[x]
        axis = shift.axis + len(node.places) - shift.ndim
        if value is not None: value = np.broadcast_to(value, node.places)
        others = tuple(at for at in range(len(node.places)) if at != axis)
        found[id(shift.bias)] = found[id(shift.bias)] & (False if value is None else value.all(axis=others))

    def meetings(self) -> tuple:  # {id of a weight: (the number of its first filter, how many)}, and a list of `channels.Meeting`
        "Number the filters of all layers, and find which of them meet in one entry of a tensor."
        filters, first, at = {}, {}, 0
        for node in self.tape:
            if node.op != 'layer' or node.places is None or id(node.weight) in filters: continue
            filters[id(node.weight)], first[id(node.weight)] = (at, node.length), at
            at += node.length
        known, found = {}, []
        for node in self.tape:
            before = [known.get(i) for i in node.inputs]
            known[node] = behind(node, before, first, found.append)
        return filters, found


def _as_arrays(tensors):
    "Return numpy arrays: for few entries they are ten times as fast."
    return {key: tensor.numpy() for key, tensor in tensors.items()}


def _with_inputs(tape):
    "Add the nodes that rules have made on the way, each before those that it is an input of."
    found = {}

    def add(node):
        if node is None or node in found: return
        for before in node.inputs: add(before)
        for part in node.parts: add(part)
        found[node] = None
    for node in tape: add(node)
    return list(found)


def _shifts(tape):
    "Find the parameters that are added to channels, and used in no other way: {id: parameter}."
    found = {id(n.bias): n.bias for n in tape if n.op == 'bias'}
    for node in tape:
        terms = {'addition': node.inputs, 'bias': (node,)}.get(node.op, ())
        added = {id(term.bias) for term in terms if term.op == 'bias'}
        for i in node.vectors - added: found.pop(i, None)
    return found


def _leading_to(nodes):
    "Find the nodes that others come from, with these."
    found, open_ = set(), list(nodes)
    while open_:
        node = open_.pop()
        if node is None or node in found: continue
        found.add(node)
        open_ += node.inputs
    return found


def _unread(tape):
    "Find the nodes that no other node reads."
    read = {i for n in tape for i in n.inputs}
    return [n for n in tape if n not in read]


def _scale(norm):
    "Return what identifies a norm: two that share their scale count as one."
    return norm if norm.weight is None else id(norm.weight)


# Watching a batch

def watch(
    model: nn.Module,
    args: tuple,  # inputs of one batch
    kwargs: dict | None = None,  # inputs that are given by name
) -> Flow:
    """Find the data flow by running the model once, in eval mode and without gradients.

    Modes, buffers and random numbers are put back."""
    watcher = _Watcher(_norms(model))
    with undisturbed(model), torch.no_grad(), watcher:
        out = model(*args, **kwargs or {})
    return Flow(watcher.tape, [watcher.node_of(t) for t in _tensors(out)])


class _Watcher(TorchFunctionMode):
    "Record each operation that makes or changes a tensor."

    def __init__(self, norms):
        super().__init__()
        self.norms, self.tape, self.nodes = norms, [], WeakTensorKeyDictionary()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        shapes = {id(t): t.shape for t in _tensors((args, kwargs))}  # before the call, which may change them
        out = func(*args, **kwargs)
        results = _results(func.__name__, args, out)
        if results:
            is_one = isinstance(out, torch.Tensor) or func.__name__ == '__setitem__'
            after = results[0].shape if is_one else None
            call = Call(_name(func), args, kwargs, self.node_of, self.norms, shapes, after, func)
            self._record(call, results)
        return out

    def node_of(self, x): return self.nodes.get(x) if isinstance(x, torch.Tensor) else None

    def _record(self, call, results):
        node = follow(call)
        self.tape.append(node)
        if in_place(call.name): self._change(results[0], node)
        parts = node.parts if len(node.parts) == len(results) else [node] * len(results)
        for t, part in zip(results, parts): self.nodes[t] = part

    def _change(self, tensor, node):
        "Replace the nodes of all tensors that share memory with one that was changed in place."
        memory = _memory(tensor)
        for t in [t for t in self.nodes.keys() if _memory(t) == memory]:
            before = self.nodes[t]
            self.nodes[t] = Node(inputs=(node, before), sources=node.sources | before.sources, ndim=t.ndim)


def _name(function):
    "Return the name of a function, or of the attribute that it gets."
    name = getattr(function, '__name__', '')
    return getattr(function.__self__, '__name__', name) if name == '__get__' else name


def _results(name, args, out):
    "Return the tensors that a call made or changed."
    if name == '__setitem__': return [args[0]]
    return [t for t in _tensors(out) if not isinstance(t, nn.Parameter)]


def _tensors(tree): return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def _memory(tensor): return tensor.untyped_storage().data_ptr()


# Tracing the code

def trace(model: nn.Module) -> Flow:
    "Find the data flow in the model's code with torch.fx; raise what fx raises where it cannot trace."
    with attributes_kept(model): return _trace(model)  # fx puts tensors there that the code makes


def _trace(model):
    tracer = _Tracer(param_shapes_constant=True)  # code may ask for the shape of a weight
    graph, norms = tracer.trace(model), _norms(model)
    nodes, tape, outputs, sure = {}, [], [], True
    def node_of(x): return nodes.get(x) if isinstance(x, fx.Node) else None
    for step in graph.nodes:
        if step.op == 'output': outputs = [node_of(x) for x in step.all_input_nodes]
        if step.op not in STEPS: continue
        name, args, kwargs, function = STEPS[step.op](model, step)
        node = follow(Call(name, args, kwargs, node_of, norms, function=function))
        tape.append(node)
        nodes[step] = node
        if in_place(name):
            nodes[step.args[0]] = node
            sure = sure and node.op == 'keeps_zeros'
    return Flow(tape, outputs, sure)


class _Tracer(fx.Tracer):
    "Trace models that `fully_shard` has split too, without a call of their hooks."

    def is_leaf_module(self, m, qualified_name):
        kind = kind_of(m)
        if kind is type(m): return super().is_leaf_module(m, qualified_name)
        return kind.__module__.startswith(('torch.nn', 'torch.ao.nn')) and not isinstance(m, nn.Sequential)

    def call_module(self, m, forward, args, kwargs):
        without_hooks = forward if kind_of(m) is type(m) else m.forward
        return super().call_module(m, without_hooks, args, kwargs)


def _function_call(model, step):
    "Return the name, args and kwargs of the call of a function, and the function."
    return getattr(step.target, '__name__', ''), *_arguments(model, step), step.target


def _method_call(model, step):
    "Return the name, args and kwargs of the call of a method, and the method."
    return step.target, *_arguments(model, step), getattr(torch.Tensor, step.target, None)


def _module_call(model, step):
    """Return the name, args and kwargs of the call of a module, and a function that calls it.

    The args are its input, and after it what the rule reads: for a layer its weight and bias, else the
    attributes in `SETTINGS`, else all tensors of the module."""
    args, kwargs = _arguments(model, step)
    args = args[:1] or tuple(kwargs.values())[:1]
    module = model.get_submodule(step.target)
    name = kind_of(module).__name__
    def call(x, *_): return module(x)
    layer = next((c.__name__ for c in type(module).__mro__ if c.__name__.lower() in LAYERS), None)
    if layer:
        # a spectral_norm that computes the weight changes its buffers, but not in eval mode
        groups = {'groups': module.groups} if hasattr(module, 'groups') else {}
        with evaluation_mode(module): return layer, (*args, module.weight, module.bias), groups, call
    if name not in SETTINGS: return name, (*args, *module.parameters(), *module.buffers()), {}, call
    settings = [getattr(module, s) for s in SETTINGS[name]]
    return name, (*args, *settings), {}, call


STEPS = {'call_function': _function_call, 'call_method': _method_call, 'call_module': _module_call}


def _arguments(model, step):
    "Return the args and kwargs of a step, with the model's own tensors where fx has a node for them."
    def real(x): return _attribute(model, x.target) if x.op == 'get_attr' else x
    return fx.node.map_arg((step.args, step.kwargs), real)


def _attribute(model, path):
    "Return the tensor at a dotted path."
    for part in path.split('.'): model = getattr(model, part)
    return model


def _norms(model):
    "Return {id of a tensor: the BatchNorm that owns it}."
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    return {id(t): m for m in norms for t in (*m.parameters(False), *m.buffers(False))}
