"Follow views, parts and concatenations."
from dataclasses import replace

import numpy as np
import torch

from fasterai.deploy.axes import Axes, fixed, narrow_down, reshaped
from fasterai.deploy.calls import other
from fasterai.deploy.why import IS_NUMBERED


def view(call):
    "Follow a view in another shape."
    found = reshaped(call.first, call.shape, call.labels)
    for n, rows in zip(call.shape, found.rows): call.resize(n, rows)
    return found


def permute(call):
    "Follow a permutation of the axes."
    x = call.first
    return permuted(x, [d % len(x.shape) for d in call['dims']])


def transpose(call):
    "Follow the exchange of two axes."
    x = call.first
    order = list(range(len(x.shape)))
    if call.name == 't': order.reverse()
    else:
        a, b = call['dim0'], call['dim1']
        order[a], order[b] = order[b], order[a]
    return permuted(x, order)


def permuted(x, order):
    shape, rows = tuple(x.shape[a] for a in order), tuple(x.rows[a] for a in order)
    return replace(x, shape=shape, rows=rows, zero=x.zero.transpose(order))


def expand(call):
    "Follow the repetition of axes of length one."
    x, n = call.first, len(call.shape)
    rows = []
    for axis, length in enumerate(call.shape):
        at = axis - n + len(x.shape)
        same = at >= 0 and x.shape[at] == length
        rows.append(x.rows[at] if same else call.labels.new(length))
        call.resize(length, rows[-1])
    zero = x.zero.reshape((1,) * (n - len(x.shape)) + x.zero.shape)
    return Axes(call.shape, tuple(rows), zero, x.constant, x.initial)


def repeat(call):
    "Follow the repetition of a tensor along its axes."
    x, times = call.first, call['repeats']
    shape = (1,) * (len(times) - len(x.shape)) + x.shape
    known, rows = reshaped(x, shape, call.labels), []
    for n, t, some in zip(shape, times, known.rows):
        if n > 1 or t == 1: rows.append(np.tile(some, (t, 1)))
        else: rows.append(call.labels.new(t))
        call.resize(n * t, rows[-1])
    zero = np.tile(known.zero, [t if n > 1 else 1 for n, t in zip(known.zero.shape, times)])
    return Axes(call.shape, tuple(rows), narrow_down(zero), x.constant)


def chosen(call):
    "Follow the choice of several positions of an axis, which stays."
    x, dim = call.first, call['dim']
    call.labels.block(x.rows[dim], IS_NUMBERED)
    _stay(call, call.axes('index'))
    rows = x.with_rows(dim, fixed(call.shape[dim])).rows
    return Axes(call.shape, rows, x.zero.all(dim, keepdims=True), False)


def select(call):
    "Follow the choice of one position of an axis, which stays."
    return _selected(call, call['dim'], call['index'])


def unbind(call):
    "Follow the choice of each position of an axis, one by one."
    dim = call['dim']
    return [_selected(call, dim, i) for i in range(call.first.shape[dim])]


def _selected(call, dim, index):
    x = call.first
    dim %= len(x.shape)
    call.labels.block(x.rows[dim], IS_NUMBERED)
    taken = index if x.zero.shape[dim] > 1 else 0
    shape, rows = [*x.shape], [*x.rows]
    del shape[dim], rows[dim]
    return Axes(tuple(shape), tuple(rows), x.zero.take(taken, dim), x.constant, x.initial)


def part(x, dim, index):
    "Return the positions of an axis in a slice."
    dim %= len(x.shape)
    rows = x.rows[dim][index]
    cut = [slice(None)] * len(x.shape)
    if x.zero.shape[dim] > 1: cut[dim] = index
    shape = [*x.shape]
    shape[dim] = len(rows)
    return replace(x, shape=tuple(shape), zero=x.zero[tuple(cut)]).with_rows(dim, rows)


def sliced(call):
    "Follow a slice of an axis; where it begins and ends is a number of positions before it."
    x, dim = call.first, call['dim'] or 0
    length = x.shape[dim]
    start, end, _ = slice(call.get('start'), call.get('end'), 1).indices(length)
    step = call.get('step') or 1
    if step != 1 and x.rows[dim].any(): call.labels.block(x.rows[dim], IS_NUMBERED)
    if x.constant:  # a table of which as much is taken as there are tokens: another batch may take more
        x = replace(x, zero=x.zero.all(dim, keepdims=True), constant=False)
    for n in (start, end):
        if 0 < n < length: call.resize(n, x.rows[dim][:n])
    return part(x, dim, slice(start, end, step))


def parts(call):
    "Follow a split: equal parts lose as much each, and parts of given lengths are counted anew."
    x, dim = call.first, call.get('dim') or 0
    sizes = call.get('split_sizes') or call.get('split_size')
    length = x.shape[dim]
    call.resize(length, x.rows[dim])
    if isinstance(sizes, int):
        if sizes and length % sizes == 0: call.labels.level(x.rows[dim], length // sizes)
        else: call.labels.block(x.rows[dim], IS_NUMBERED)
        sizes = [min(sizes, length - at) for at in range(0, length, sizes or 1)]
    found, at = [], 0
    for size in sizes:
        call.resize(size, x.rows[dim][at:at + size])
        found.append(part(x, dim, slice(at, at + size)))
        at += size
    return found


def cat(call):
    "Follow a concatenation."
    found = [x for x in call.inputs if x.shape != (0,)]
    dim = (call.get('dim') or 0) % len(call.shape)
    rows = list(found[0].rows)
    for axis in [a for a in range(len(rows)) if a != dim]:
        for x in found[1:]: rows[axis] = call.labels.bind(rows[axis], x.rows[axis])
    joined = [x.rows[dim] for x in found]
    width = max(some.shape[1] for some in joined)
    rows[dim] = np.concatenate([np.pad(some, ((0, 0), (0, width - some.shape[1]))) for some in joined])
    shape = [max(z) for z in zip(*(x.zero.shape for x in found))]
    zeros = []
    for x in found:
        here = [*shape]
        here[dim] = x.shape[dim]
        zeros.append(np.broadcast_to(x.zero, here))
    zero = narrow_down(np.concatenate(zeros, dim))
    return Axes(call.shape, tuple(rows), zero, all(x.constant for x in found))


def stack(call):
    "Follow tensors that become the positions of a new axis, which stays."
    found, n = call.inputs, len(call.shape)
    dim = (call.get('dim') or 0) % n
    rows = list(found[0].rows)
    for x in found[1:]: rows = [call.labels.bind(a, b) for a, b in zip(rows, x.rows)]
    rows.insert(dim, fixed(len(found)))
    shape = [max(z) for z in zip(*(x.zero.shape for x in found))]
    zero = narrow_down(np.stack([np.broadcast_to(x.zero, shape) for x in found], dim))
    return Axes(call.shape, tuple(rows), zero, all(x.constant for x in found))


def glu(call):
    "Follow a gated linear unit: the first half of an axis times the sigmoid of the second."
    x, dim = call.first, call['dim'] % len(call.first.shape)
    half = x.shape[dim] // 2
    call.labels.level(x.rows[dim], 2)
    first, second = part(x, dim, slice(0, half)), part(x, dim, slice(half, None))
    rows = list(first.rows)
    rows[dim] = call.labels.bind(first.rows[dim], second.rows[dim])
    return Axes(call.shape, tuple(rows), first.zero, x.constant)


def index(call):
    "Follow a lookup by tensors of positions: the axes that are looked up stay."
    x, places = call.axes('self'), call['indices']
    used = [a for a, p in enumerate(places) if p is not None]
    for a in used: call.labels.block(x.rows[a], IS_NUMBERED)
    for p in places:
        if p is not None: _stay(call, call.axes_of(p))
    zero = x.zero
    for a in used: zero = zero.all(a, keepdims=True)
    if used != list(range(used[0], used[-1] + 1)) or places[used[0]].dtype == torch.bool: return other(call)
    added = len(call.shape) - len(x.shape) + len(used)
    at, end = used[0], used[-1] + 1
    rows = (*x.rows[:at], *map(fixed, call.shape[at:at + added]), *x.rows[end:])
    zero = zero.reshape((*zero.shape[:at], *[1] * added, *zero.shape[end:]))
    return Axes(call.shape, rows, zero, False)


def _stay(call, x):
    for rows in x.rows: call.labels.block(rows, IS_NUMBERED)


def pixel_shuffle(call):
    "Follow a pixel shuffle: a channel goes with all that become it."
    x, r = call.first, call['upscale_factor']
    *outer, c, h, w = x.shape
    split = reshaped(x, (*outer, c // r ** 2, r, r, h, w), call.labels)
    n = len(outer)
    moved = permuted(split, [*range(n), n, n + 3, n + 1, n + 4, n + 2])
    return reshaped(moved, call.shape, call.labels)


