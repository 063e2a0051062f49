"""Say what an operation makes of a channel that is all zero.

`OPERATIONS` has a row for each operation: its name, and the rule that turns a call of it into a `Node`.
After an operation that is not in the table nothing is known of the channels. A rule may say less than
is true, never more."""
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, wraps
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True, eq=False)
class Node:
    "Describe the result of one operation: where its channels are, and which layers they come from."
    op: str = 'other'  # 'layer'; 'weight', 'bias' or 'zeros' of one; a key of `KINDS`; or 'other'
    inputs: tuple = ()  # the nodes it is computed from
    sources: frozenset = frozenset()  # ids of the weights of the layers that it comes from, with no other layer between
    axis: int | None = None  # of the channels; None if unknown, and then nothing is said of them
    ndim: int | None = None  # number of axes, None if unknown
    length: int | None = None  # number of channels, None if unknown
    repeat: int = 1  # number of entries that a channel of the input becomes when it is flattened
    weight: nn.Parameter | None = None  # of a 'layer', and what a 'weight' was made from
    bias: object = None  # of a 'layer': None, a parameter, or a tensor that was computed; of a 'bias': the parameter
    norm: nn.Module | None = None  # the BatchNorm of a 'norm'
    reads: frozenset = frozenset()  # ids of the weights among the arguments


@dataclass(frozen=True, eq=False)
class Call:
    "Describe one call of an operation: all that a rule may look at."
    name: str  # of the function, method or type of module, as the code spells it: 'add_', 'Conv2d'
    args: tuple
    kwargs: dict
    node_of: Callable  # gives the `Node` of an argument, None if it has none
    norms: dict  # id of a tensor: the BatchNorm that owns it
    shapes: dict = field(default_factory=dict)  # id of a tensor: its shape before the call; empty if unknown
    after: tuple | None = None  # shape of the result; None if unknown, or if there are several results

    def argument(self,
        i: int,  # its position
        key: str,  # its name
        default=None,  # its value where it is not given
    ):
        "Return an argument that is given by position or by name."
        return argument(self.args, self.kwargs, i, key, default)

    def node(self, i, key):
        "Return the node of an argument, None if it has none."
        return self.node_of(self.argument(i, key))

    @cached_property
    def leaves(self) -> list:
        "Return all arguments, with those inside lists, tuples and dicts."
        return tree_leaves((self.args, self.kwargs))

    @cached_property
    def inputs(self) -> tuple:  # of `Node`
        "Return the nodes of all arguments that have one."
        nodes = [self.node_of(leaf) for leaf in self.leaves]
        return tuple(n for n in nodes if n is not None)

    @property
    def sources(self) -> frozenset:
        "Return the sources of all inputs."
        return frozenset().union(*(n.sources for n in self.inputs))

    @property
    def reads(self) -> frozenset:
        "Return the ids of the weights among the arguments: parameters of more than one axis."
        return frozenset(id(p) for p in self.leaves if isinstance(p, nn.Parameter) and p.ndim > 1)

    @property
    def layer(self):
        "Return the `LayerCall`, None if no layer is called, or its weight is not known."
        found = layer_call(self.name, self.args, self.kwargs, self.weight_in)
        if found is None: return None
        bias = None if _is_zeros(self.node_of(found.bias)) else found.bias
        return found._replace(weight=self.weight_in(found.weight), bias=bias)

    def weight_in(self,
        x,  # an argument
    ) -> nn.Parameter | None:
        "Return the parameter that an argument is, or was made from entry by entry; None if there is none."
        if isinstance(x, nn.Parameter): return x
        node = self.node_of(x)
        is_made = node is not None and node.op == 'weight'
        return node.weight if is_made else None

    @property
    def norm(self) -> nn.Module | None:
        "Return the BatchNorm that owns one of the arguments, None if there is none."
        return next((self.norms[id(leaf)] for leaf in self.leaves if id(leaf) in self.norms), None)

    @property
    def before(self) -> tuple | None:
        "Return the shape of the first argument before the call, None if unknown."
        return self.shapes.get(id(self.argument(0, 'input')))


def _is_zeros(node): return node is not None and node.op == 'zeros'


class LayerCall(NamedTuple):
    "Hold the arguments of a call of a layer."
    input: object  # a tensor; a node of fx where the code is traced
    weight: nn.Parameter
    bias: object  # None, a parameter, or a tensor that was computed


def layer_call(
    name: str,  # of the function or type of module: 'conv2d', 'Conv2d'
    args: tuple,  # of the function: input, weight, bias
    kwargs: dict,
    weight_in: Callable = lambda x: x if isinstance(x, nn.Parameter) else None,  # returns the parameter in an argument, or None
) -> LayerCall | None:
    """Return the input, weight and bias of a call of a layer.

    Return None for other calls, and where there is no parameter in the weight."""
    if plain(name) not in LAYERS: return None
    weight = argument(args, kwargs, 1, 'weight')
    if weight_in(weight) is None: return None
    return LayerCall(argument(args, kwargs, 0, 'input'), weight, argument(args, kwargs, 2, 'bias'))


def argument(args, kwargs, i, key, default=None):
    "Return an argument that is given by position or by name."
    return args[i] if len(args) > i else kwargs.get(key, default)


def plain(name):
    "Return a name in lower case without underscores, as the tables have it."
    return name.lower().replace('_', '')


def in_place(
    name: str,  # as the code spells it
) -> bool:
    "Tell whether an operation changes its first argument."
    method = name.endswith('_') and not name.endswith('__')
    return method or name in IN_PLACE


def follow(call: Call) -> Node:
    "Return the node of a call's result, by the rule for the operation."
    rule = OPERATIONS.get(plain(call.name), other)
    return rule(call) or other(call)


# Rules: each returns the node of a call, or None where nothing is known of the channels

def follows_channels(rule):
    "Return a rule that calls `rule(call, x)` with the first argument's node x, if its channels are known."
    @wraps(rule)
    def with_first(call):
        x = call.node(0, 'input')
        if x is None or x.axis is None: return None
        return rule(call, x)
    return with_first


def other(call):
    "Lose the channels, and keep which layers they come from."
    return _unknown(call, call.sources | call.reads)


def own_weights(call):
    "Lose the channels, and name the layer's own weights as the source, as for an embedding or an LSTM."
    return _unknown(call, call.reads)


def matrix_product(call):
    "Lose the channels, and name a factor that is a weight as the source: then the product is a layer."
    return _unknown(call, call.reads or call.sources)


def linear(call):
    "Follow a linear layer, which has its channels on the last axis."
    layer = call.layer
    if layer is None: return _computed_layer(call)
    if call.after: return _layer(call, layer, len(call.after) - 1, len(call.after), call.after[-1])
    x = call.node_of(layer.input)
    if x is None or x.ndim is None: return _layer(call, layer, None, None, len(layer.weight))
    return _layer(call, layer, x.ndim - 1, x.ndim, len(layer.weight))


def convolution(call):
    "Follow a convolution, which has its channels before the axes of space."
    layer = call.layer
    if layer is None: return _computed_layer(call)
    return _convolution(call, layer, len(layer.weight))


def transposed_convolution(call):
    "Follow a transposed convolution."
    layer = call.layer
    if layer is None: return _computed_layer(call)
    return _convolution(call, layer, None)  # its weight has the channels of one group, not of all


def cat(call):
    "Follow a concatenation along the channels."
    parts = tuple(map(call.node_of, call.argument(0, 'tensors')))
    if None in parts or None in {p.ndim for p in parts}: return None
    first, dim = parts[0], call.argument(1, 'dim', 0)
    if {p.axis for p in parts} != {dim % first.ndim}: return None
    lengths = [p.length for p in parts]
    length = None if None in lengths else sum(lengths)
    return Node('cat', parts, call.sources, first.axis, first.ndim, length)


@follows_channels
def batch_norm(call, x):
    "Follow a BatchNorm: a zero channel stays zero once the running mean and the bias are zeroed with it."
    norm = call.norm
    if norm is None or x.axis != 1: return None
    return Node('norm', (x,), call.sources, 1, x.ndim, norm.num_features, norm=norm)


@follows_channels
def keeps_zeros(call, x):
    "Follow a function of single entries that maps zero to zero."
    return _kept(call, x)


def fake_quantization(call):
    "Follow fake quantization: zero stays zero, for the zero point is a whole number between the bounds."
    zero_point = call.argument(2, 'zero_point')  # of the fused one it is at another place, and always an integer
    if isinstance(zero_point, torch.Tensor) and zero_point.is_floating_point(): return None
    return _made_weight(call) or keeps_zeros(call)


@follows_channels
def hardtanh(call, x):
    "Follow a clamp, where zero lies between its bounds."
    low, high = call.argument(1, 'min_val', -1.), call.argument(2, 'max_val', 1.)
    if not low <= 0 <= high: return None
    return _kept(call, x)


def over_space(
    most: int,  # number of the last axes that it works over; fewer where the input has fewer behind batch and channels
) -> Callable:  # the rule
    "Return the rule for pooling and resizing over the axes of space."
    @follows_channels
    def rule(call, x):
        if x.axis != 1: return None
        axes = min(most, x.ndim - 2)
        if x.axis >= x.ndim - axes: return None
        return _kept(call, x)
    return rule


def reshape(call):
    "Follow a view that keeps the axis of the channels, or flattens it with all axes behind; or of a bias."
    return _reshaped_bias(call) or _reshaped(call)


@follows_channels
def _reshaped(call, x):
    before, after, axis = call.before, call.after, x.axis
    if not after or after[:axis] != before[:axis]: return None  # the axis has moved, or may have
    node = _kept(call, x, ndim=len(after))
    if after[axis:axis + 1] == before[axis:axis + 1]: return node
    repeat = prod(before[axis + 1:])
    length = before[axis] * repeat
    if after[axis:] != (length,): return None
    return replace(node, length=length, repeat=repeat)


@follows_channels
def flatten(call, x):
    "Follow a flattening; without shapes, only one from axis 1, if that has the channels."
    if call.after: return reshape(call)
    if x.axis != 1 or call.argument(1, 'start_dim', 0) != 1: return None
    return _kept(call, x, ndim=2)  # as if a channel became one entry; a norm that follows compares the length


@follows_channels
def reduction(call, x):
    "Follow a sum, mean or maximum over axes that come after the channels."
    dims = call.argument(1, 'dim')
    if not isinstance(dims, (tuple, list)): dims = (dims,)
    if not all(isinstance(d, int) and d % x.ndim > x.axis for d in dims): return None
    if call.argument(2, 'keepdim', False): return _kept(call, x)
    return _kept(call, x, ndim=x.ndim - len(dims))


@follows_channels
def addition(call, x):
    "Follow a sum or difference of two tensors, which is zero where both are."
    second = call.node(1, 'other')
    if not _aligned(x, second): return None
    return Node('addition', (x, second), call.sources, x.axis, x.ndim, x.length)


def multiplication(call):
    "Follow a product, which is zero where a factor is; the first must not be broadcast."
    same_shape = bool(call.after) and call.after == call.before
    weight = _made_weight(call) if same_shape else None
    return weight or _product(call)


@follows_channels
def _product(call, x):
    second = call.node(1, 'other')
    if not _keeps_shape(call, x): return None
    factors = (x, second) if _aligned(x, second) else (x,)
    return Node('multiplication', factors, call.sources, x.axis, x.ndim, x.length)


@follows_channels
def division(call, x):
    "Follow a quotient: zero, or NaN, where the first number is zero; that must not be broadcast."
    if not _keeps_shape(call, x): return None
    return Node('multiplication', (x,), call.sources, x.axis, x.ndim, x.length)


def zeros(call):
    "Note that a tensor is all zero, as the bias of a layer may be."
    return Node('zeros', call.inputs, call.sources)


# Parts of rules

def _unknown(call, sources):
    "Return a node without channels."
    ndim = len(call.after) if call.after else None
    return Node(inputs=call.inputs, sources=sources, reads=call.reads, ndim=ndim)


def _layer(call, layer, axis, ndim, length):
    "Return the node of a layer."
    sources = frozenset([id(layer.weight)])
    return Node('layer', call.inputs, sources, axis, ndim, length,
                weight=layer.weight, bias=layer.bias, reads=call.reads)


def _computed_layer(call):
    "Return the node of a layer whose weight is computed and hides its filters; None where it has none."
    weight = call.node(1, 'weight')
    if weight is None or not weight.sources: return None
    return _unknown(call, weight.sources)


def _made_weight(call):
    """Return the node of a weight that is made entry by entry from a parameter, its zeros from zeros.

    None where the first argument is no weight, or others take part."""
    weight, ids = call.weight_in(call.argument(0, 'input')), call.sources | call.reads
    if weight is None or ids != {id(weight)}: return None
    return Node('weight', call.inputs, ids, ndim=weight.ndim, weight=weight, reads=call.reads)


def _reshaped_bias(call):
    "Return the node of a bias that gets axes of length one, so that it can be added; None for all else."
    bias = call.argument(0, 'input')
    if not isinstance(bias, nn.Parameter) or bias.ndim != 1 or call.inputs or not call.after: return None
    axes = [axis for axis, length in enumerate(call.after) if length != 1]
    if len(axes) != 1: return None
    return Node('bias', axis=axes[0], ndim=len(call.after), length=len(bias), bias=bias)


def _convolution(call, layer, length):
    "Return the node of a convolution; `length` is its number of channels if shapes are unknown."
    ndim = layer.weight.ndim
    if not call.after: return _layer(call, layer, 1, ndim, length)
    axis = len(call.after) - ndim + 1  # 0 where there is no axis for the batch
    return _layer(call, layer, axis, len(call.after), call.after[axis])


def _kept(call, x, ndim=None):
    "Return a node with the channels of `x`, and with `ndim` axes if that is given."
    if ndim is None: ndim = x.ndim
    return Node('keeps_zeros', (x,), call.sources, x.axis, ndim, x.length)


def _aligned(x, second):
    "Tell whether the n-th channel of one node meets the n-th of the other."
    return second is not None and (second.axis, second.ndim) == (x.axis, x.ndim)


def _keeps_shape(call, x):
    "Tell whether the first argument has the shape of the result."
    if call.after: return call.after == call.before
    # Without shapes: images are broadcast so rarely that it is taken not to happen.
    return x.ndim >= 4 or isinstance(call.argument(1, 'other'), (int, float))


# The table: names in lower case without underscores, of functions, methods and modules alike

def _rows(names, rule): return dict.fromkeys(names.split(), rule)


LAYERS = {
    **_rows('linear', linear),
    **_rows('conv1d conv2d conv3d', convolution),
    **_rows('convtranspose1d convtranspose2d convtranspose3d', transposed_convolution),
}

OPERATIONS = LAYERS | {
    **_rows('embedding embeddingbag bilinear multiheadattention multiheadattentionforward', own_weights),
    **_rows('lstm gru rnn rnntanh rnnrelu lstmcell grucell rnncell rnntanhcell rnnrelucell', own_weights),
    **_rows('matmul rmatmul mm bmm addmm baddbmm einsum', matrix_product),
    **_rows('cat', cat),
    **_rows('batchnorm batchnorm1d batchnorm2d batchnorm3d syncbatchnorm', batch_norm),
    **_rows('relu relu6 leakyrelu prelu rrelu elu selu celu gelu silu mish hardswish', keeps_zeros),
    **_rows('tanh softsign hardshrink softshrink tanhshrink abs neg', keeps_zeros),
    **_rows('dropout dropout1d dropout2d dropout3d featuredropout', keeps_zeros),
    **_rows('identity contiguous clone to float half', keeps_zeros),
    **_rows('fakequantizepertensoraffine fakequantizeperchannelaffine', fake_quantization),
    **_rows('fusedmovingavgobsfakequant', fake_quantization),
    **_rows('hardtanh', hardtanh),
    **_rows('maxpool1d avgpool1d adaptivemaxpool1d adaptiveavgpool1d', over_space(1)),
    **_rows('maxpool2d avgpool2d adaptivemaxpool2d adaptiveavgpool2d', over_space(2)),
    **_rows('maxpool3d avgpool3d adaptivemaxpool3d adaptiveavgpool3d', over_space(3)),
    **_rows('interpolate upsample', over_space(3)),
    **_rows('view reshape', reshape),
    **_rows('flatten', flatten),
    **_rows('mean sum amax', reduction),
    **_rows('add iadd sub isub', addition),
    **_rows('mul imul multiply', multiplication),
    **_rows('div divide truedivide', division),
    **_rows('zeros zeroslike', zeros),
}

# Names as they are spelled in the code, of what changes its first argument without an underscore at the end

IN_PLACE = frozenset({'setitem', 'iadd', 'isub', 'imul', '__setitem__', '__iadd__', '__isub__', '__imul__'})

# By type of module, the attributes that its rule asks for as arguments

SETTINGS = {'Flatten': ('start_dim',), 'Hardtanh': ('min_val', 'max_val')}


# Which channels of a node are zero: `KINDS` has a function for each kind of node. It takes the node
# and the zero channels of its inputs, and returns bool (channels,), or None where nothing is known.

def zero_channels(
    node: Node,
    inputs: list,  # the zero channels of each input: bool (channels,), None if unknown
    dead: dict,  # id of a layer's weight: bool (output channels,), True where the filter is zero
    biases: dict,  # id of a bias: bool (channels,), True where it is zero, with the filter
) -> np.ndarray | None:  # bool (channels,)
    "Find the channels of a node that are zero for every input of the network; None if nothing is known."
    if node.op == 'layer': return _zero_layer(node, dead, biases)
    if node.op == 'bias': return biases.get(id(node.bias))
    if node.op not in KINDS: return None
    return KINDS[node.op].zero(node, inputs)


def layers_behind(
    node: Node,
    inputs: list,  # the layers behind each input: frozenset of ids of weights, None if unknown
) -> frozenset | None:
    "Find the layers whose n-th output channel is part of the n-th channel of a node; None if unknown."
    if node.op == 'layer': return frozenset([id(node.weight)])
    if node.op == 'bias': return frozenset()
    if node.op not in KINDS: return None
    return KINDS[node.op].behind(node, inputs)


def _zero_layer(node, dead, biases):
    if node.bias is not None and id(node.bias) not in biases: return None
    return dead.get(id(node.weight))


def _zero_kept(node, inputs):
    [value] = inputs
    if value is None or node.repeat == 1: return value
    return value.repeat(node.repeat)


def _zero_norm(node, inputs):
    [value] = inputs
    if value is None or len(value) != node.length: return None
    return value


def _zero_cat(node, inputs):
    parts = []
    for part, value in zip(node.inputs, inputs):
        if value is None and part.length is None: return None
        parts.append(np.zeros(part.length, bool) if value is None else value)
    return np.concatenate(parts)


def _zero_addition(node, inputs):
    a, b = inputs
    if a is None or b is None or len(a) != len(b): return None
    return a & b


def _zero_multiplication(node, inputs):
    known = [v for v in inputs if v is not None]
    if len({len(v) for v in known}) != 1: return None
    return np.any(known, axis=0)


# Which layers are behind the channels of a node: a function for each kind too

def _unknown_behind(node, inputs): return None
def _behind_first(node, inputs): return inputs[0]
def _behind_kept(node, inputs): return inputs[0] if node.repeat == 1 else None


def _behind_addition(node, inputs):
    same_length = {i.length for i in node.inputs} == {node.length}
    return inputs[0] | inputs[1] if None not in inputs and same_length else None


@dataclass(frozen=True)
class NodeKind:
    "Describe a kind of node, as a row of `KINDS`: what follows for its channels from those of its inputs."
    zero: Callable  # (node, zero channels of the inputs) -> which channels are zero
    behind: Callable  # (node, layers behind the inputs) -> the layers behind its channels
    joins: bool = False  # the layers behind it meet channel by channel, so that they must be pruned together


KINDS = {
    'keeps_zeros': NodeKind(_zero_kept, _behind_kept),
    'norm': NodeKind(_zero_norm, _behind_kept),
    'cat': NodeKind(_zero_cat, _unknown_behind),
    'addition': NodeKind(_zero_addition, _behind_addition, joins=True),
    'multiplication': NodeKind(_zero_multiplication, _behind_first),
}
