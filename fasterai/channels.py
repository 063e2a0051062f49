"Tell which entries of a tensor are zero, and which filters are behind them, from how it was made."
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fasterai.operations import NOTHING, ZERO, Node

# All arrays have the shape `Node.places`: 1 along axes on which entries do not differ. Two numbers stand
# behind the filters for what is no filter: they are those of `Node.index`.


class Behind(NamedTuple):
    "Say which filter is behind each entry of a tensor."
    filters: np.ndarray  # ints of the shape `places`: the number of a filter, `NOTHING`, or `ZERO` where the entry is always zero
    keeps: bool  # the entry is zero where that filter is; else it depends on it in another way


class Meeting(NamedTuple):
    "Say that two filters meet in one entry."
    one: np.ndarray  # ints (n,)
    other: np.ndarray  # ints (n,)
    needed: bool  # True: the entry is zero only where both are, as a sum; False: where one is, as a product


# Which entries are zero

def zero_entries(
    node: Node,
    inputs: list,  # the zero entries of each input: bool, None if unknown
    dead: dict,  # id of a layer's weight: bool (output channels,), True where the filter is zero
    biases: dict,  # id of a bias: bool (channels,), True where it is zero, with the filter
) -> np.ndarray | None:  # bool of the shape `node.places`
    "Find the entries of a node that are zero for every input of the network; None if nothing is known."
    if node.places is None: return None
    if node.op == 'layer': return _zero_layer(node, inputs, dead, biases)
    if node.op == 'bias': return _placed(node, biases.get(id(node.bias)))
    if node.op not in KINDS: return None
    return KINDS[node.op].zero(node, inputs)


def _placed(node, channels): return None if channels is None else channels.reshape(node.places)


def _zero_layer(node, inputs, dead, biases):
    "Find the filters that are zero, and those of a grouped convolution that read nothing else."
    if node.bias is not None and id(node.bias) not in biases: return None
    zero = dead.get(id(node.weight))
    if node.bias is None and node.groups > 1: zero = _also(zero, _reads_zeros(node, inputs[0]))
    return _placed(node, zero)


def _also(zero, more):
    if zero is None or more is None: return more if zero is None else zero
    return zero | more


def _reads_zeros(node, value):
    "Return which filters of a grouped convolution read only zeros, bool (channels,)."
    if value is None or not _is_by_channel(node, value.shape) or value.size % node.groups: return None
    of_groups = value.reshape(node.groups, -1).all(1)
    return of_groups.repeat(node.length // node.groups)


def _is_by_channel(node, places):
    "Tell whether what a convolution reads differs by channel alone."
    return len(places) == node.ndim and places[node.axis] == np.prod(places) > 1


def _zero_kept(node, inputs): return inputs[0]
def _zero_nowhere(node, inputs): return None


def _zero_moved(node, inputs):
    pieces = [_known(value, x) for value, x in zip(inputs, node.inputs)]
    if node.inputs and all(value is None for value in inputs): return None
    return np.concatenate([*pieces, [False, True]])[node.index]


def _known(value, node):
    "Return flat values, False where nothing is known."
    return np.zeros(np.prod(node.places), bool) if value is None else value.reshape(-1)


def _zero_addition(node, inputs):
    a, b = inputs
    return None if a is None or b is None else a & b


def _zero_multiplication(node, inputs):
    known = [value for value in inputs if value is not None]
    if not known: return None
    found = known[0] if len(known) == 1 else known[0] | known[1]
    return np.broadcast_to(found, node.places)


def _zero_reduction(node, inputs):
    if inputs[0] is None: return None
    return inputs[0].all(axis=node.axes).reshape(node.places)


def _zero_product(node, inputs):
    rows, columns = inputs
    rows = None if rows is None else rows.all(axis=-1, keepdims=True)
    columns = None if columns is None else columns.all(axis=-2, keepdims=True)
    return _zero_multiplication(node, [rows, columns])


def _zero_attention(node, inputs):
    values = inputs[2]
    return None if values is None else values.all(axis=-2, keepdims=True).reshape(node.places)


# Which filters are behind the entries

def behind(
    node: Node,
    inputs: list,  # of `Behind`, None if unknown
    first: dict,  # id of a layer's weight: the number of its first filter
    meet: Callable,  # is called with each `Meeting`
) -> Behind | None:
    "Find which filters are behind the entries of a node, and say which of them meet in it; None if unknown."
    if node.places is None: return None
    if node.op == 'layer': return _behind_layer(node, inputs, first, meet)
    if node.op == 'bias': return Behind(np.full(node.places, ZERO), True)
    if node.op not in KINDS: return None
    if node.op in ('matrix_product', 'attention'): meet = _Heads(meet)
    return KINDS[node.op].behind(node, inputs, meet)


def _behind_layer(node, inputs, first, meet):
    filters = first[id(node.weight)] + np.arange(node.length)
    if node.groups > 1: _meet_in_groups(node, filters, inputs[0], meet)
    return Behind(filters.reshape(node.places), True)


def _meet_in_groups(node, filters, read, meet):
    """Let filters meet so that a grouped convolution can be cut.

    Where there are at least as many groups as channels in each, whole groups go, of inputs and outputs;
    else as many in each group."""
    outputs = filters.reshape(node.groups, -1)
    known = read is not None and read.keeps and _is_by_channel(node, read.filters.shape)
    read = read.filters.reshape(-1) if known else None
    known = known and not len(read) % node.groups and bool((read >= 0).all())
    inputs = read.reshape(node.groups, -1) if known else None
    if known and node.groups >= max(outputs.shape[1], inputs.shape[1]):
        _chain(np.concatenate([inputs, outputs], 1).T, meet)
        return
    if outputs.shape[1] > 1: _chain(outputs, meet)
    if known and inputs.shape[1] > 1: _chain(inputs, meet)


def _chain(rows, meet):
    "Let the n-th entries of all rows meet."
    for one, other in zip(rows, rows[1:]): meet(Meeting(one, other, True))


def _behind_kept(node, inputs, meet): return inputs[0]


def _behind_elementwise(node, inputs, meet):
    [x] = inputs
    return x and Behind(np.broadcast_to(x.filters, node.places), False)


def _behind_moved(node, inputs, meet):
    if node.inputs and all(x is None for x in inputs): return None
    pieces = [np.full(np.prod(x.places), NOTHING) if b is None else b.filters.reshape(-1)
              for b, x in zip(inputs, node.inputs)]
    filters = np.concatenate([*pieces, [NOTHING, ZERO]])[node.index]
    return Behind(filters, all(b is None or b.keeps for b in inputs))


def _behind_addition(node, inputs, meet):
    a, b = inputs
    if a is None or b is None:
        known = a or b
        return known and Behind(np.broadcast_to(known.filters, node.places), False)
    for one, other in ((a, b), (b, a)):
        if not (one.filters == ZERO).all(): continue
        return Behind(np.broadcast_to(other.filters, node.places), other.keeps)
    one, other = _alike(a.filters, b.filters, node)
    if one is None: return None
    if not (a.keeps and b.keeps): return Behind(np.broadcast_to(one, node.places), False)
    both = (one >= 0) & (other >= 0)
    meet(Meeting(one[both], other[both], True))
    filters = np.where(both, one, NOTHING)
    filters = np.where(other == ZERO, one, np.where(one == ZERO, other, filters))
    return Behind(np.broadcast_to(filters, node.places), True)


def _behind_multiplication(node, inputs, meet):
    known = sorted([b for b in inputs if b is not None], key=lambda b: not b.keeps)
    if not known: return None
    a = known[0]
    if len(known) == 1 or not a.keeps: return Behind(np.broadcast_to(a.filters, node.places), a.keeps)
    b = known[1]
    one, other = _alike(a.filters, b.filters, node)
    if one is None:
        varied = b if b.keeps and _narrowed(b.filters).size > _narrowed(a.filters).size else a
        return Behind(np.broadcast_to(varied.filters, node.places), True)
    both = (one >= 0) & (other >= 0)
    meet(Meeting(one[both], other[both], False))
    filters = np.where(one == NOTHING, other, one)
    keeps = b.keeps or bool((one != NOTHING).all())
    return Behind(np.broadcast_to(filters, node.places), keeps)


def _behind_reduction(node, inputs, meet):
    [x] = inputs
    if x is None: return None
    filters = _stacked(x.filters, node.axes)
    found = Behind(filters[0].reshape(node.places), x.keeps)
    if (filters == filters[0]).all(): return found
    are_added = node.adds and x.keeps and (filters >= 0).all()
    if not are_added or _narrowed(found.filters).size == 1: return None
    _chain(filters.reshape(len(filters), -1), meet)
    return found


def _stacked(filters, axes):
    "Return an array with some axes flattened into one, the first."
    filters = np.moveaxis(filters, axes, range(len(axes)))
    return filters.reshape(-1, *filters.shape[len(axes):])


def _go_together(filters, meet):
    """Let filters along the first axis meet, if they differ; return whether they can go together.

    They cannot where they are all that there are, or one of them is not known."""
    if (filters == filters[0]).all(): return True
    if _narrowed(filters[0]).size == 1 or (filters < 0).any(): return False
    _chain(filters.reshape(len(filters), -1), meet)
    return True


def _behind_softmax(node, inputs, meet):
    [x] = inputs
    if x is None or not _go_together(_stacked(x.filters, node.axes), meet): return None
    return Behind(np.broadcast_to(x.filters, node.places), False)


class _Heads:
    """Let filters of attention meet: those of a head, and the heads of queries, keys and values.

    Where there is one head, its filters do not: it cannot go."""
    def __init__(self, meet): self.meet = meet
    def __call__(self, meeting): self.meet(meeting)

    def of(self,
        x: Behind | None,
        axes: tuple,  # over which products are summed up
    ) -> Behind | None:
        "Return the filters behind sums over axes; None where they differ along these."
        if x is None: return None
        filters = _stacked(x.filters, axes)
        if not _go_together(filters, self.meet): return None
        return Behind(np.expand_dims(filters[0], axes), x.keeps)


def _behind_product(node, inputs, meet):
    rows, columns = meet.of(inputs[0], (-1,)), meet.of(inputs[1], (-2,))
    if None in (rows, columns) or _narrowed(rows.filters).shape[-2] > 1:
        return _behind_multiplication(node, [rows, columns], meet)
    _behind_multiplication(node, [rows, meet.of(columns, (-1,))], meet)
    return Behind(np.broadcast_to(columns.filters, node.places), columns.keeps)


def _behind_attention(node, inputs, meet):
    queries, keys, values = inputs
    if values is None: return None
    by_head = [meet.of(x, (-2, -1)) for x in inputs]
    if by_head[2] is not None:
        for x in by_head[:2]:
            if x is not None: _behind_multiplication(node, [by_head[2], x], meet)
    filters = values.filters
    if not (filters == filters[..., :1, :]).all(): return None
    return Behind(np.broadcast_to(filters[..., :1, :], node.places), values.keeps)


def _alike(a, b, node):
    "Return arrays of one shape where two differ along the same axes; else None for both."
    a, b = (_narrowed(x.reshape((1,) * (len(node.places) - x.ndim) + x.shape)) for x in (a, b))
    return (a, b) if a.shape == b.shape else (None, None)


def _narrowed(filters):
    "Return an array with 1 along the axes on which entries do not differ."
    for axis in range(filters.ndim):
        first = filters.take([0], axis)
        if filters.shape[axis] > 1 and (filters == first).all(): filters = first
    return filters


@dataclass(frozen=True)
class NodeKind:
    "Describe a kind of node, as a row of `KINDS`: what follows for its entries from those of its inputs."
    zero: Callable  # (node, zero entries of the inputs) -> which entries are zero
    behind: Callable  # (node, `Behind` of the inputs, meet) -> `Behind`


KINDS = {
    'keeps_zeros': NodeKind(_zero_kept, _behind_kept),
    'elementwise': NodeKind(_zero_nowhere, _behind_elementwise),
    'softmax': NodeKind(_zero_nowhere, _behind_softmax),
    'norm': NodeKind(_zero_kept, _behind_kept),
    'moved': NodeKind(_zero_moved, _behind_moved),
    'zeros': NodeKind(_zero_moved, _behind_moved),
    'addition': NodeKind(_zero_addition, _behind_addition),
    'multiplication': NodeKind(_zero_multiplication, _behind_multiplication),
    'reduction': NodeKind(_zero_reduction, _behind_reduction),
    'matrix_product': NodeKind(_zero_product, _behind_product),
    'attention': NodeKind(_zero_attention, _behind_attention),
}
