"Follow norms, and other operations along an axis."
from dataclasses import replace

import numpy as np
import torch

from fasterai.deploy.axes import Axes, fixed, narrow_down, nothing
from fasterai.deploy.calls import other
from fasterai.deploy.why import IS_SHIFTED, mixes


def batch_norm(call):
    "Follow a BatchNorm: a channel that comes in zero leaves so where nothing shifts it."
    x, labels = call.axes('input'), call.labels
    found = [call.axes(key) for key in ('weight', 'bias', 'running_mean', 'running_var')]
    rows = x.rows[1]
    for norm in found:
        if norm is not None: rows = labels.bind(rows, norm.rows[0])
    for axis, some in enumerate(x.rows):
        if axis != 1 and call.get('training', False): labels.block(some, mixes('BatchNorm'))
    unshifted, dead = _of_norm(call, x.shape[1], found[0])
    at = (1, -1, *[1] * (len(x.shape) - 2))
    zero = (x.zero & unshifted.reshape(at)) | dead.reshape(at)
    known = x.with_rows(1, rows)
    known = replace(known, zero=narrow_down(zero), initial=False)
    labels.lose(rows, x.over(1) & ~known.over(1), IS_SHIFTED)
    return known


def _of_norm(call, n, scale):
    "Return which channels a BatchNorm leaves zero, and which it makes zero: bool (channels,) each."
    weight, bias, mean, variance = (call.get(k) for k in ('weight', 'bias', 'running_mean', 'running_var'))
    shift = torch.zeros(n) if bias is None else bias.detach().cpu().double()
    factor = torch.ones(n) if weight is None else weight.detach().cpu().double()
    flat = np.zeros(n, bool)
    if scale is not None and not scale.initial: flat = ((factor == 0) & (shift == 0)).numpy()
    if scale is not None and scale.initial: factor = torch.ones(n)
    if mean is not None and not call.get('training', False):
        shift = shift - mean.cpu() * factor / (variance.cpu() + call['eps']).sqrt()
    return (shift == 0).numpy(), flat


def layer_norm(call):
    "Follow a norm over the last axes: all of them stay."
    x = call.axes('input')
    first = len(x.shape) - len(call['normalized_shape'])
    for axis in range(first, len(x.shape)): call.labels.block(x.rows[axis], mixes('LayerNorm'))
    for key in ('weight', 'bias'):
        norm = call.axes(key)
        if norm is None: continue
        for some in norm.rows: call.labels.block(some, mixes('LayerNorm'))
    return Axes(x.shape, x.rows, nothing(len(x.shape)))


def group_norm(call):
    "Follow a GroupNorm: all channels stay."
    x = call.axes('input')
    for some in x.rows[1:]: call.labels.block(some, mixes('GroupNorm'))
    for key in ('weight', 'bias'):
        norm = call.axes(key)
        if norm is not None: call.labels.block(norm.rows[0], mixes('GroupNorm'))
    return Axes(x.shape, x.rows, nothing(len(x.shape)))


def softmax(call):
    "Follow a softmax: the axis that it is over stays."
    x = call.first
    call.labels.block(x.rows[call['dim']], mixes('softmax'))
    return Axes(x.shape, x.rows, nothing(len(x.shape)), x.constant)


def keeps_others(call):
    "Follow what moves or adds up entries along an axis: that axis stays, and zeros across it."
    x = call.first
    dims = call.get('dims') or call.get('dim')
    dims = [dims] if isinstance(dims, int) else dims or range(len(x.shape))
    zero = x.zero
    for axis in dims:
        call.labels.block(x.rows[axis], mixes(call.name))
        zero = zero.all(axis, keepdims=True)
    return Axes(x.shape, x.rows, zero, x.constant)


def reduction(call):
    "Follow what makes one number of the entries along axes; only a sum can do without zeros."
    x = call.first
    dims = call.get('dim')
    dims = range(len(x.shape)) if dims is None or dims == [] else dims
    dims = [d % max(1, len(x.shape)) for d in ([dims] if isinstance(dims, int) else dims)]
    zero = x.zero
    for axis in dims:
        if call.name in SUMS: call.labels.read(x.rows[axis], x.over(axis))
        else: call.labels.block(x.rows[axis], mixes(call.name))
        zero = zero.all(axis, keepdims=True)
    kept = [a for a in range(len(x.shape)) if a not in dims]
    if len(call.shape) == len(x.shape):
        rows = tuple(fixed(1) if a in dims else some for a, some in enumerate(x.rows))
        return Axes(call.shape, rows, zero, x.constant)
    zero = zero.reshape([zero.shape[a] for a in kept])
    return Axes(call.shape, tuple(x.rows[a] for a in kept), zero, x.constant)


SUMS = ('sum', 'linalg_vector_norm')


def over_space(most):
    "Return the rule for pooling, resizing and padding over the last axes."
    def rule(call):
        x = call.first
        first = len(x.shape) - min(most, len(x.shape) - 1)
        for some in x.rows[first:]: call.labels.block(some, mixes(call.name))
        rows = (*x.rows[:first], *(fixed(n) for n in call.shape[first:]))
        zero = x.zero
        for axis in range(first, len(x.shape)): zero = zero.all(axis, keepdims=True)
        return Axes(call.shape, rows, zero, x.constant)
    return rule


def pad(call):
    "Follow a padding with one number: what is added stays."
    x, pads = call.first, call['pad']
    added = [(0, 0)] * (len(x.shape) - len(pads) // 2) + list(zip(pads[-2::-2], pads[-1::-2]))
    if any(min(pair) < 0 for pair in added): return other(call)
    rows = [np.pad(some, (pair, (0, 0))) if any(pair) else some for some, pair in zip(x.rows, added)]
    at = [pair if n > 1 else (0, 0) for n, pair in zip(x.zero.shape, added)]
    is_zero = call.get('value') in (0, None)
    zero = np.pad(x.zero, at, constant_values=True) if is_zero else nothing(len(x.shape))
    return Axes(call.shape, tuple(rows), zero, x.constant)
