"Follow products: linear layers, convolutions, lookups and attention."
from dataclasses import replace

import numpy as np

from fasterai.deploy.axes import MOST, Axes, fixed, narrow_down, nothing
from fasterai.deploy.calls import aligned, all_zero
from fasterai.deploy.labels import Grouped
from fasterai.deploy.why import HAS_BIAS, IS_NUMBERED, SETS_SCALE, mixes


def linear(call):
    "Follow a product of two matrices, or of as many in two stacks."
    return _product(call, call.axes('self'), call.axes('mat2'))


def linear_with_bias(call):
    "Follow a product of two matrices, and what is added to it."
    a, b = ('mat1', 'mat2') if 'mat1' in call.given else ('batch1', 'batch2')
    return _add_bias(call, _product(call, call.axes(a), call.axes(b)), call.axes('self'))


def vector(call):
    "Follow the product of a matrix and a vector."
    x, vec = call.axes('self'), call.axes('vec')
    as_matrix = Axes((*vec.shape, 1), (*vec.rows, fixed(1)), vec.zero[:, None], vec.constant, vec.initial)
    found = _product(call, x, as_matrix)
    return Axes(found.shape[:1], found.rows[:1], found.zero[:, 0], found.constant)


def _product(call, a, b):
    "Follow (…, n, k) × (…, k, m)."
    inner = call.labels.bind(a.rows[-1], b.rows[-2])
    call.labels.read(inner, _zero_terms(a, b))
    batch = [call.labels.bind(x, y) for x, y in zip(a.rows[:-2], b.rows[:-2])]
    rows = (*batch, a.rows[-2], b.rows[-1])
    return Axes((*a.shape[:-1], b.shape[-1]), rows, _zero_product(a, b), a.constant and b.constant)


def _zero_terms(a, b):
    "Return at which inner positions a factor is zero wherever it is used."
    left = a.as_factor.all(-2, keepdims=True).swapaxes(-1, -2)  # (…, k, 1)
    both = left | b.as_factor.all(-1, keepdims=True)
    others = tuple(i for i in range(both.ndim) if i != both.ndim - 2)
    return np.broadcast_to(both.all(others), a.shape[-1])


def _zero_product(a, b):
    "Return where all terms of a product are zero."
    if a.zero.size == a.zero.shape[-1]:  # as the channels that go into a linear layer
        alive = np.broadcast_to(~a.zero.reshape(-1), a.shape[-1])
        some = ~b.zero if b.zero.shape[-2] == 1 else ~b.zero[..., alive, :]
        zero = ~some.any(-2, keepdims=True) if alive.any() else np.ones((1, 1), bool)
        return narrow_down(aligned(zero, len(a.shape)))
    if a.zero.size + b.zero.size > MOST: return nothing(len(a.shape))
    left, right = ~a.zero, ~b.zero
    if left.shape[-1] != right.shape[-2]:
        n = a.shape[-1]
        left = np.broadcast_to(left, (*left.shape[:-1], n))
        right = np.broadcast_to(right, (*right.shape[:-2], n, right.shape[-1]))
    return narrow_down(np.matmul(left.astype(np.float32), right.astype(np.float32)) == 0)


def _add_bias(call, product, bias):
    "Return the sum of a product and a bias, which may be broadcast."
    zero = all_zero([product.zero, bias.zero], product.shape)
    rows = product.rows[-1]
    if bias.shape[-1:] == product.shape[-1:]: rows = call.labels.bind(rows, bias.rows[-1])
    found = replace(product.with_rows(-1, rows), zero=narrow_down(zero))
    call.labels.lose(rows, product.over(-1) & ~found.over(-1), HAS_BIAS)
    return found


def convolution(call):
    "Follow a convolution, also a transposed one."
    x, weight, groups = call.axes('input'), call.axes('weight'), call['groups']
    if groups > 1: return _grouped(call, x, weight, groups)
    if call['transposed']: weight = _outputs_first(weight)
    labels = call.labels
    inner = labels.bind(x.rows[1], weight.rows[1])
    nonzero = _filters(~weight.zero, weight.shape)  # (O, I)
    idle = np.zeros(weight.shape[1], bool) if weight.initial else ~nonzero.any(0)
    labels.read(inner, x.over(1) | idle)
    zero = ~(nonzero & ~x.over(1)).any(1)
    return _convolved(call, x, weight.rows[0], zero)


def _outputs_first(weight):
    rows = (weight.rows[1], weight.rows[0], *weight.rows[2:])
    shape = (weight.shape[1], weight.shape[0], *weight.shape[2:])
    return replace(weight, shape=shape, rows=rows, zero=weight.zero.swapaxes(0, 1))


def _filters(nonzero, shape):
    "Return which pairs of an output and an input have a weight that is not zero, (O, I)."
    return np.broadcast_to(nonzero.any(tuple(range(2, nonzero.ndim))), shape[:2])


def _convolved(call, x, rows, zero):
    "Return the result of a convolution whose products are zero in some channels, when the bias is added."
    bias = call.axes('bias')
    if bias is not None:
        rows = call.labels.bind(rows, bias.rows[0])
        still = zero & np.broadcast_to(bias.zero, zero.shape)
        call.labels.lose(rows, zero & ~still, HAS_BIAS)
        zero = still
    space = [fixed(n) for n in call.shape[2:]]
    at = (1, len(zero), *[1] * len(space))
    for some in x.rows[2:]: call.labels.block(some, mixes('convolution'))
    return Axes(call.shape, (x.rows[0], rows, *space), narrow_down(zero.reshape(at)))


def _grouped(call, x, weight, groups):
    "Follow a grouped convolution: whole groups go, or as many channels in each."
    labels, outputs = call.labels, call.shape[1]
    ins = x.shape[1] // groups
    if call['transposed']:
        if ins > 1 or weight.shape[1] > 1: return _not_cut(call, x, weight)
        labels.bind(x.rows[1], weight.rows[0])
        rows = x.rows[1]
        nonzero = _filters(~weight.zero, weight.shape)
    else:
        rows = weight.rows[0]
        nonzero = _filters(~weight.zero, weight.shape)  # (O, inputs of a group)
    alive = ~x.over(1).reshape(groups, ins)
    zero = ~(nonzero & np.repeat(alive, outputs // groups, 0)).any(1)
    used = nonzero.reshape(groups, -1, ins).any(1).ravel()
    labels.read(x.rows[1], x.over(1) | ~used)
    if ins == 1: labels.bind(np.repeat(x.rows[1], outputs // groups, 0), rows)
    labels.group(Grouped(call['weight'], x.rows[1], rows, groups, not call['transposed']))
    return _convolved(call, x, rows, zero)


def _not_cut(call, x, weight):
    for some in (x.rows[1], *weight.rows[:2]): call.labels.block(some, mixes('grouped convolution'))
    return _convolved(call, x, fixed(call.shape[1]), np.zeros(call.shape[1], bool))


def embedding(call):
    "Follow a lookup: the columns of a table become the last axis, its rows stay."
    table, places = call.axes('weight'), call.axes('indices')
    call.labels.block(table.rows[0], IS_NUMBERED)
    zero = table.zero.all(0).reshape((1,) * len(places.shape) + (-1,))
    return Axes(call.shape, (*places.rows, table.rows[1]), zero, places.constant)


def attention(call):
    "Follow scaled dot-product attention: heads go; a place within a head only where the scale is given."
    q, k, v, labels = call.axes('query'), call.axes('key'), call.axes('value'), call.labels
    mask = call.axes('attn_mask') or call.axes('attn_bias')
    heads = v.rows[1]
    if q.shape[1] != k.shape[1]: heads = np.repeat(heads, q.shape[1] // k.shape[1], 0)
    labels.bind(k.rows[1], v.rows[1])
    heads = labels.bind(q.rows[1], heads)
    depth = labels.bind(q.rows[3], k.rows[3])
    if call.get('scale') is None: labels.block(depth, SETS_SCALE)
    labels.read(depth, q.over(3) | k.over(3))
    for some in (k.rows[2], v.rows[2]): labels.block(some, mixes('softmax'))
    if mask is not None and mask.shape[1:2] == q.shape[1:2]: labels.bind(mask.rows[1], heads)
    zero = v.zero.all(2, keepdims=True)
    if q.shape[1] != k.shape[1] and zero.shape[1] > 1: zero = np.repeat(zero, q.shape[1] // k.shape[1], 1)
    return Axes((*q.shape[:3], v.shape[3]), (q.rows[0], heads, q.rows[2], v.rows[3]), zero)


