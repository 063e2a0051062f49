"""Say what an operation makes of a channel that is all zero.

`OPERATIONS` has a row for each operation: its name, and the rule that turns a call of it into a `Node`.
After an operation that is not in the table nothing is known of the channels. A rule may say less than
is true, never more."""
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, wraps
from numbers import Real
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

NOTHING, ZERO = -2, -1  # in `Node.index`: an entry of which nothing is known, and one that is always zero


@dataclass(frozen=True, eq=False)
class Node:
    """Describe the result of one operation: where its channels are, and which layers they come from.

    What is known of the entries of a tensor is held in arrays of the shape `places`: that of the tensor, but
    1 along axes on which entries do not differ. So the channels of images are (1, channels, 1, 1)."""
    op: str = 'other'  # 'layer'; 'weight', 'bias' or 'zeros' of one; a key of `channels.KINDS`; or 'other'
    inputs: tuple = ()  # the nodes it is computed from
    sources: frozenset = frozenset()  # ids of the weights of the layers that it comes from, with no other layer between
    places: tuple | None = None  # ints, None where nothing is known of the entries
    ndim: int | None = None  # number of axes, None if unknown
    axis: int | None = None  # of the channels, for a layer, a bias and a norm
    index: np.ndarray | None = None  # ints of the shape `places`, where entries move: which of the flattened entries of all inputs, `NOTHING` or `ZERO`
    axes: tuple = ()  # over which a reduction or a softmax is
    adds: bool = False  # a reduction is a sum
    parts: tuple = ()  # of `Node`, one for each result where there are several
    groups: int = 1  # of a convolution
    weight: nn.Parameter | None = None  # of a 'layer', and what a 'weight' was made from
    bias: object = None  # of a 'layer': None, a parameter, or a tensor that was computed; of a 'bias': the parameter
    norm: nn.Module | None = None  # the BatchNorm of a 'norm'
    reads: frozenset = frozenset()  # ids of the weights among the arguments
    vectors: frozenset = frozenset()  # ids of the parameters among them that differ along one axis

    @property
    def length(self) -> int | None:
        "Return the number of channels of a layer, a bias or a norm; None if unknown."
        return None if self.places is None else self.places[self.axis]


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
    function: Callable | None = None  # what is called, with `args` and `kwargs`

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
    def vectors(self) -> frozenset:
        "Return the ids of the parameters among the arguments that differ along one axis."
        own = (p for p in self.leaves if isinstance(p, nn.Parameter))
        ids = {id(p) for p in own if p.numel() == max(p.shape, default=0) > 1}
        return frozenset(ids | {id(n.bias) for n in self.inputs if n.op == 'bias'})

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

    def shape(self,
        x,  # an argument
    ) -> tuple | None:
        "Return the shape of an argument before the call, None if unknown."
        return self.shapes.get(id(x))

    @property
    def before(self) -> tuple | None:
        "Return the shape of the first argument before the call, None if unknown."
        return self.shape(self.argument(0, 'input'))


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
    if plain(name) == 'addmm': names = (1, 'mat1'), (2, 'mat2'), (0, 'input')
    else: names = (0, 'input'), (1, 'weight'), (2, 'bias')
    x, weight, bias = (argument(args, kwargs, *name) for name in names)
    return None if weight_in(weight) is None else LayerCall(x, weight, bias)


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
    node = rule(call)
    if node is None or not _fits(node.places, call.after): node = other(call)
    vectors = call.vectors
    return replace(node, vectors=vectors) if vectors else node


def _fits(places, shape):
    "Tell whether arrays of such a shape describe a tensor of this shape, as far as either is known."
    if places is None or shape is None: return True
    return len(places) == len(shape) and all(n in (1, length) for n, length in zip(places, shape))


# Rules: each returns the node of a call, or None where nothing is known of the channels

def follows_channels(rule):
    "Return a rule that calls `rule(call, x)` with the first argument's node x, if its channels are known."
    @wraps(rule)
    def with_first(call):
        x = call.node(0, 'input')
        if x is None or x.places is None: return None
        return rule(call, x)
    return with_first


def other(call):
    "Lose the channels, and keep which layers they come from."
    return _unknown(call, call.sources | call.reads)


def own_weights(call):
    "Lose the channels, and name the layer's own weights as the source, as for an embedding or an LSTM."
    return _unknown(call, call.reads)


# Layers

def linear(call):
    "Follow a linear layer, which has its channels on the last axis."
    layer = call.layer
    if layer is None: return _computed_layer(call)
    x = call.node_of(layer.input)
    ndim = len(call.after) if call.after else getattr(x, 'ndim', None)
    return _layer(call, layer, len(layer.weight), None if ndim is None else ndim - 1, ndim)


def addmm(call):
    "Follow a sum with a matrix product; by a weight it is a linear layer of inputs × outputs."
    layer = call.layer
    if layer is None: return sum_with_product(call)
    return _layer(call, layer, layer.weight.shape[1], 1, 2)


def convolution(call):
    "Follow a convolution, which has its channels before the axes of space."
    layer = call.layer
    if layer is None: return _computed_layer(call)
    return _convolution(call, layer, len(layer.weight))


def transposed_convolution(call):
    "Follow a transposed convolution."
    layer = call.layer
    if layer is None: return _computed_layer(call)
    return _convolution(call, layer, layer.weight.shape[1] * _groups(call))


@follows_channels
def batch_norm(call, x):
    "Follow a BatchNorm: a zero channel stays zero once the running mean and the bias are zeroed with it."
    norm, places = call.norm, (1, *x.places[1:2], *[1] * (x.ndim - 2))
    if norm is None or x.places != places or places[1] != norm.num_features: return None
    return Node('norm', (x,), call.sources, places, x.ndim, 1, norm=norm)


# Operations on single entries

@follows_channels
def keeps_zeros(call, x):
    "Follow a function of single entries that maps zero to zero."
    return _kept(call, x)


@follows_channels
def elementwise(call, x):
    "Follow a function of single entries that makes something else of zero."
    return _elementwise(call, x)


def fake_quantization(call):
    "Follow fake quantization: zero stays zero, for the zero point is a whole number between the bounds."
    zero_point = call.argument(2, 'zero_point')  # of the fused one it is at another place, and always an integer
    if isinstance(zero_point, torch.Tensor) and zero_point.is_floating_point(): return None
    return _made_weight(call) or keeps_zeros(call)


def clamp(
    low: str, high: str,  # names of the bounds
    default: tuple = (None, None),  # the bounds that are not given
) -> Callable:  # the rule
    "Return the rule for a clamp, where zero may lie between its bounds."
    @follows_channels
    def rule(call, x):
        bounds = call.argument(1, low, default[0]), call.argument(2, high, default[1])
        if not all(bound is None or isinstance(bound, Real) for bound in bounds): return None
        at_least, at_most = bounds
        holds_zero = (at_least is None or at_least <= 0) and (at_most is None or at_most >= 0)
        return _kept(call, x) if holds_zero else _elementwise(call, x)
    return rule


@follows_channels
def power(call, x):
    "Follow a power, which is zero where the base is and the exponent is a positive number."
    exponent = call.argument(1, 'exponent')
    if not isinstance(exponent, Real): return None
    return _kept(call, x) if exponent > 0 else _elementwise(call, x)


@follows_channels
def softmax(call, x):
    "Follow a softmax, after which no entry is zero, and each depends on all others along the axis."
    dim = call.argument(1, 'dim')
    if not isinstance(dim, int): return None
    return Node('softmax', (x,), call.sources, x.places, x.ndim, axes=(dim % x.ndim,))


# Operations on two tensors

def addition(call):
    "Follow a sum or difference, which is zero where both are."
    return _sum(call, call.argument(0, 'input'), call.argument(1, 'other'))


def multiplication(call):
    "Follow a product, which is zero where a factor is."
    same_shape = bool(call.after) and call.after == call.before
    weight = _made_weight(call) if same_shape else None
    return weight or _product(call, call.argument(0, 'input'), call.argument(1, 'other'))


@follows_channels
def division(call, x):
    "Follow a quotient: zero, or NaN, where the first number is zero."
    return _product(call, call.argument(0, 'input'), None)


def addcmul(call):
    "Follow a sum with a product."
    product = _product(call, call.argument(1, 'tensor1'), call.argument(2, 'tensor2'))
    first = _node(call, call.argument(0, 'input'))
    return None if product is None else _sum_of(call, first, product)


def gated(call):
    "Follow a gated linear unit: the first half of the channels times the sigmoid of the second."
    halves = _moved_apart(call, lambda x, dim=-1: x.chunk(2, dim))
    if halves is None or len(halves) != 2: return None
    first, gate = halves
    gate = Node('elementwise', (gate,), call.sources, gate.places, gate.ndim)
    return Node('multiplication', (first, gate), call.sources, first.places, first.ndim)


# Sums over axes, and products of matrices

def over_space(
    most: int,  # number of the last axes that it works over, where the input has so many
    spared: int,  # number of the first axes that it leaves alone
) -> Callable:  # the rule
    "Return the rule for pooling and resizing over the axes of space."
    @follows_channels
    def rule(call, x):
        axes = x.places[max(spared, x.ndim - most):]
        return _kept(call, x) if set(axes) <= {1} else None
    return rule


def reduction(
    dim: int = 1,  # position of the axes among the arguments
    adds: bool = False,  # it is a sum
) -> Callable:  # the rule
    "Return the rule for a sum, mean, maximum or norm over axes."
    @follows_channels
    def rule(call, x):
        dims = call.argument(dim, 'dim')
        if not isinstance(dims, (tuple, list)): dims = (dims,)
        if not dims or not all(isinstance(d, int) for d in dims): return None
        axes = tuple(d % x.ndim for d in dims)
        keepdim = call.argument(dim + 1, 'keepdim', False)
        places = [1 if at in axes else n for at, n in enumerate(x.places) if keepdim or at not in axes]
        return Node('reduction', (x,), call.sources, tuple(places), len(places), axes=axes, adds=adds)
    return rule


def matrix_product(call):
    "Follow a product of matrices; where a factor is a weight, the product is a layer."
    if call.reads: return own_weights(call)
    return _matrix_product(call, [call.node(0, 'input'), call.node(1, 'other')])


def sum_with_product(call):
    "Follow a sum of the first argument and a product of matrices."
    if call.reads: return own_weights(call)
    tensors = call.argument(1, 'mat1'), call.argument(2, 'mat2')
    if plain(call.name) == 'baddbmm': tensors = call.argument(1, 'batch1'), call.argument(2, 'batch2')
    product = _matrix_product(call, [call.node_of(x) for x in tensors])
    return product and _sum_of(call, _node(call, call.argument(0, 'input')), product)


def hidden_product(call):
    "Lose the channels; where a factor is a weight, the product is a layer."
    return own_weights(call) if call.reads else other(call)


def _matrix_product(call, nodes):
    known = [x for x in nodes if x is not None and x.places is not None]
    if not call.after or not known or any(x.ndim < 2 for x in known): return None
    rows, columns = [_padded(x, len(call.after)) for x in nodes]
    if rows is not None: rows = (*rows[:-1], 1)
    if columns is not None: columns = (*columns[:-2], 1, columns[-1])
    places = _broadcast([p for p in (rows, columns) if p is not None])
    inputs = tuple(x if x in known else None for x in nodes)
    return Node('matrix_product', inputs, call.sources, places, len(call.after))


def attention(call):
    "Follow an attention, which is zero where the values are, whatever queries and keys say."
    queries, keys, values = nodes = [call.node(i, name) for i, name in enumerate(('query', 'key', 'value'))]
    if None in nodes or not call.after or any(x.places is None for x in nodes): return None
    heads = call.after[-3] if len(call.after) > 2 else 1
    keys, values = _repeated(keys, heads), _repeated(values, heads)
    places = (*values.places[:-2], 1, values.places[-1])
    return Node('attention', (queries, keys, values), call.sources, places, len(call.after))


# Where entries go to other places

def moved(call):
    "Follow an operation that puts entries in other places, as a transposition or a slice."
    found = _moved_apart(call, call.function)
    return found[0] if found and len(found) == 1 else None


def apart(call):
    "Follow an operation that takes a tensor apart into several."
    found = _moved_apart(call, call.function)
    return found and Node('several', call.inputs, call.sources, parts=tuple(found))


@follows_channels
def squeeze(call, x):
    "Follow the loss of axes of length one. Without shapes it is not known which are."
    return moved(call) if call.after else None


def getitem(call):
    "Follow a slice of a tensor; of several results take one."
    first = call.node(0, 'input')
    if first is None or not first.parts: return moved(call)
    i = call.args[1]
    return first.parts[i] if isinstance(i, int) and i < len(first.parts) else None


def reshape(call):
    "Follow a view, whatever becomes of the axes; or of a bias."
    return _reshaped_bias(call) or _reshaped(call)


@follows_channels
def _reshaped(call, x):
    if not call.after: return None
    found = _moved_apart(call, lambda positions, *_, **__: positions.reshape(call.after))
    return found and found[0]


@follows_channels
def flatten(call, x):
    "Follow a flattening; without shapes, only one from axis 1, if that alone has the channels."
    if call.after: return reshape(call)
    if x.places[2:].count(1) != x.ndim - 2 or call.argument(1, 'start_dim', 0) != 1: return None
    if call.argument(2, 'end_dim', -1) != -1: return None
    positions = np.arange(x.places[0] * x.places[1], dtype=np.int32).reshape(x.places[:2])
    return Node('moved', (x,), call.sources, x.places[:2], 2, index=positions)  # as if a channel became one entry; a norm that follows compares the length


@follows_channels
def padding(call, x):
    "Follow a padding with zeros."
    pads, value = call.argument(1, 'pad'), call.argument(3, 'value')
    if call.argument(2, 'mode', 'constant') != 'constant' or value: return None
    if not isinstance(pads, (tuple, list)) or not all(isinstance(n, int) for n in pads): return None
    sides = list(zip(pads[::2], pads[1::2]))[::-1]  # the last axis comes first
    sides = [(0, 0)] * (x.ndim - len(sides)) + sides
    if any(min(side) < 0 for side in sides): return None
    sides = [(0, 0) if n == 1 else side for side, n in zip(sides, x.places)]
    index = np.arange(np.prod(x.places), dtype=np.int32).reshape(x.places)
    index = np.pad(index, sides, constant_values=ZERO)
    return Node('moved', (x,), call.sources, index.shape, x.ndim, index=index)


def joined(call):
    "Follow a concatenation or a stack."
    tensors = call.argument(0, 'tensors')
    if not isinstance(tensors, (tuple, list)): return None
    nodes, dim = [call.node_of(t) for t in tensors], call.argument(1, 'dim', 0)
    known = [x for x in nodes if x is not None and x.places is not None]
    if not known or len({x.ndim for x in known}) > 1 or not isinstance(dim, int): return None
    is_stack = plain(call.name) == 'stack'
    lengths_known = len(known) == len(nodes) and (is_stack or all(x.places[dim] > 1 for x in known))
    if not call.after and not lengths_known: return None
    positions, first = [], 0
    for tensor, x in zip(tensors, nodes):
        if x in known:
            positions.append(_positions(x, call.shape(tensor), first))
            first += int(np.prod(x.places))
        else:
            nothing = torch.full((1,) * known[0].ndim, NOTHING, dtype=torch.int32)
            positions.append(nothing.expand(call.shape(tensor)))
    try: return _of_positions(call, tuple(known), call.function(positions, dim))
    except (RuntimeError, IndexError): return None  # without shapes they may not fit


def zeros(call):
    "Note that a tensor is all zero, as the bias of a layer may be."
    if not call.after: return Node('zeros', call.inputs, call.sources)
    index = np.full((1,) * len(call.after), ZERO, np.int32)
    return Node('zeros', (), frozenset(), index.shape, index.ndim, index=index)


# Parts of rules

def _unknown(call, sources):
    "Return a node without channels."
    ndim = len(call.after) if call.after else None
    return Node(inputs=call.inputs, sources=sources, reads=call.reads, ndim=ndim)


def _layer(call, layer, length, axis, ndim):
    "Return the node of a layer."
    places = None if ndim is None else _along(axis, ndim, length)
    x, groups = call.node_of(layer.input), _groups(call)
    inputs = (x, *(node for node in call.inputs if node is not x))
    return Node('layer', inputs, frozenset([id(layer.weight)]), places, ndim, axis, groups=groups,
                weight=layer.weight, bias=layer.bias, reads=call.reads)


def _along(axis, ndim, length):
    "Return the shape of an array that differs along one axis."
    return tuple(length if at == axis else 1 for at in range(ndim))


def _convolution(call, layer, length):
    "Return the node of a convolution with a number of channels."
    ndim = layer.weight.ndim
    if not call.after: return _layer(call, layer, length, 1, ndim)
    axis = len(call.after) - ndim + 1  # 0 where there is no axis for the batch
    return _layer(call, layer, length, axis, len(call.after))


def _groups(call):
    "Return the number of groups of a convolution."
    groups = call.argument(6, 'groups', 1)
    return groups if isinstance(groups, int) else 1


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
    if not isinstance(bias, nn.Parameter) or call.inputs or not call.after: return None
    return _bias(bias, call.after)


def _bias(bias, shape):
    "Return the node of a parameter that differs along one axis; None for another one."
    axes = [axis for axis, length in enumerate(shape) if length != 1]
    if len(axes) != 1 or shape[axes[0]] != max(bias.shape): return None
    return Node('bias', places=tuple(shape), ndim=len(shape), axis=axes[0], bias=bias)


def _node(call, x):
    "Return the node of an argument whose channels are known; of a parameter that may be a bias too."
    if isinstance(x, nn.Parameter): return _bias(x, x.shape)
    node = call.node_of(x)
    return None if node is None or node.places is None else node


def _kept(call, x):
    "Return a node with the channels of `x`."
    return Node('keeps_zeros', (x,), call.sources, x.places, x.ndim)


def _elementwise(call, x):
    "Return a node with the channels of `x`, of which none stays zero."
    return Node('elementwise', (x,), call.sources, x.places, x.ndim)


def _sum(call, a, b):
    "Return the node of a sum of two arguments."
    known, numbers = [_node(call, x) for x in (a, b)], [x for x in (a, b) if isinstance(x, Real)]
    alone = [x for x in known if x is not None]
    if not alone: return None
    if numbers: return _elementwise(call, alone[0]) if numbers[0] else _kept(call, alone[0])
    return _sum_of(call, *known)


def _sum_of(call, a, b):
    "Return the node of a sum of two nodes; None for one of which nothing is known."
    alone = [x for x in (a, b) if x is not None]
    places = _met(call, alone)
    if places is None: return None
    op = 'addition' if len(alone) == 2 else 'elementwise'
    return Node(op, tuple(alone), call.sources, places, len(places))


def _product(call, a, b):
    "Return the node of a product of two arguments."
    known = [x for x in (_node(call, a), _node(call, b)) if x is not None and x.op != 'bias']
    places = _met(call, known) if known else None
    if places is None: return None
    return Node('multiplication', tuple(known), call.sources, places, len(places))


def _met(call, nodes):
    "Return the shape of the arrays where nodes meet entry by entry; None where it is not known."
    if call.after: return _broadcast([_padded(x, len(call.after)) for x in nodes])
    if len({x.ndim for x in nodes}) > 1: return None
    several = len(call.args) > 1 and not isinstance(call.args[1], Real)
    # Without shapes: images are broadcast so rarely that it is taken not to happen.
    if several and len(nodes) == 1 and nodes[0].ndim < 4: return None
    return _broadcast([x.places for x in nodes])


def _padded(x, ndim):
    "Return the shape of a node's arrays with so many axes, as broadcasting adds them; None if unknown."
    if x is None or x.places is None: return None
    return (1,) * (ndim - x.ndim) + x.places


def _broadcast(shapes):
    "Return the shape that several have together, None where they do not fit."
    try: return np.broadcast_shapes(*shapes)
    except ValueError: return None


def _repeated(x, heads):
    "Return a node with as many heads as the queries have, where keys or values serve several each."
    there = x.places[-3] if x.ndim > 2 else 1
    if there in (1, heads): return x
    index = np.arange(np.prod(x.places), dtype=np.int32).reshape(x.places).repeat(heads // there, -3)
    return Node('moved', (x,), x.sources, index.shape, x.ndim, index=index)


def _positions(x, shape, first=0):
    "Return the positions of a node's entries, ints of the tensor's shape; of `places` where that is unknown."
    numbers = torch.arange(first, first + int(np.prod(x.places)), dtype=torch.int32).reshape(x.places)
    return numbers if shape is None else numbers.expand(shape)


def _moved_apart(call, function):
    "Return the nodes of what a function makes of the first argument; None where nothing is known of it."
    x = call.node(0, 'input')
    if x is None or x.places is None or not call.args or function is None: return None
    if not call.shapes and plain(call.name) not in SHAPELESS: return None
    positions = _positions(x, call.before)
    try: found = function(positions, *call.args[1:], **call.kwargs)
    except (TypeError, ValueError, RuntimeError, IndexError): return None  # as of code that is only traced
    parts = [found] if isinstance(found, torch.Tensor) else list(found)
    nodes = [_of_positions(call, (x,), part) for part in parts]
    return None if None in nodes else nodes


def _of_positions(call, inputs, positions):
    "Return the node of entries that have come from these positions; None where there are none."
    if not positions.numel(): return None
    for axis, step in enumerate(positions.stride()):
        first = positions.narrow(axis, 0, 1)
        if step == 0 or torch.equal(first.expand(positions.shape), positions): positions = first
    index = positions.numpy()
    return Node('moved', inputs, call.sources, index.shape, index.ndim, index=index)


# The table: names in lower case without underscores, of functions, methods and modules alike

def _rows(names, rule): return dict.fromkeys(names.split(), rule)


LAYERS = {
    **_rows('linear', linear),
    **_rows('addmm', addmm),
    **_rows('conv1d conv2d conv3d', convolution),
    **_rows('convtranspose1d convtranspose2d convtranspose3d', transposed_convolution),
}

OPERATIONS = LAYERS | {
    **_rows('embedding embeddingbag bilinear multiheadattention multiheadattentionforward', own_weights),
    **_rows('lstm gru rnn rnntanh rnnrelu lstmcell grucell rnncell rnntanhcell rnnrelucell', own_weights),
    **_rows('matmul mm bmm', matrix_product),
    **_rows('baddbmm', sum_with_product),
    **_rows('einsum', hidden_product),
    **_rows('scaleddotproductattention', attention),
    **_rows('batchnorm batchnorm1d batchnorm2d batchnorm3d syncbatchnorm', batch_norm),
    **_rows('relu relu6 leakyrelu prelu rrelu elu selu celu gelu silu mish hardswish', keeps_zeros),
    **_rows('tanh softsign hardshrink softshrink tanhshrink abs neg sin erf sqrt square', keeps_zeros),
    **_rows('dropout dropout1d dropout2d dropout3d featuredropout rmsnorm', keeps_zeros),
    **_rows('identity contiguous clone detach to typeas float double half bfloat16', keeps_zeros),
    **_rows('sigmoid hardsigmoid softplus logsigmoid exp cos rsqrt reciprocal', elementwise),
    **_rows('fakequantizepertensoraffine fakequantizeperchannelaffine', fake_quantization),
    **_rows('fusedmovingavgobsfakequant', fake_quantization),
    **_rows('hardtanh', clamp('min_val', 'max_val', (-1., 1.))),
    **_rows('clamp clip', clamp('min', 'max')),
    **_rows('pow', power),
    **_rows('softmax', softmax),
    **_rows('maxpool1d avgpool1d adaptivemaxpool1d adaptiveavgpool1d', over_space(1, 1)),
    **_rows('maxpool2d avgpool2d adaptivemaxpool2d adaptiveavgpool2d', over_space(2, 1)),
    **_rows('maxpool3d avgpool3d adaptivemaxpool3d adaptiveavgpool3d', over_space(3, 1)),
    **_rows('interpolate upsample', over_space(3, 2)),
    **_rows('mean sum', reduction(adds=True)),
    **_rows('amax amin', reduction()),
    **_rows('norm linalgvectornorm', reduction(2)),
    **_rows('add iadd radd sub isub rsub', addition),
    **_rows('mul imul rmul multiply', multiplication),
    **_rows('div divide truedivide', division),
    **_rows('addcmul', addcmul),
    **_rows('glu', gated),
    **_rows('view viewas reshape reshapeas unflatten', reshape),
    **_rows('flatten', flatten),
    **_rows('transpose permute swapaxes swapdims movedim moveaxis unsqueeze narrow select t mt', moved),
    **_rows('expand expandas repeat tile repeatinterleave flip roll', moved),
    **_rows('channelshuffle pixelshuffle pixelunshuffle', moved),
    **_rows('squeeze', squeeze),
    **_rows('chunk split splitwithsizes tensorsplit unbind', apart),
    **_rows('getitem', getitem),
    **_rows('pad', padding),
    **_rows('cat concat concatenate stack', joined),
    **_rows('zeros zeroslike', zeros),
}

# Operations that move entries in a known way along the axis of the channels, whatever the lengths of others

SHAPELESS = frozenset('transpose permute swapaxes swapdims movedim moveaxis unsqueeze select narrow flip '
                      'chunk split splitwithsizes tensorsplit getitem glu channelshuffle'.split())

# Names as they are spelled in the code, of what changes its first argument without an underscore at the end

IN_PLACE = frozenset({'setitem', 'iadd', 'isub', 'imul', '__setitem__', '__iadd__', '__isub__', '__imul__'})

# By type of module, the attributes that its rule asks for as arguments

SETTINGS = {'Flatten': ('start_dim', 'end_dim'), 'Hardtanh': ('min_val', 'max_val'), 'Softmax': ('dim',),
            'GLU': ('dim',), 'ChannelShuffle': ('groups',)}
