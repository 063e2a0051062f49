"Modules for inference whose weights that are zero cost no time."
import math
import threading
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from fasterai.deploy.kernels import loading as kernels
from fasterai.deploy.kernels.plans import (
    ACTIVATIONS,
    ConvolutionPlan,
    MatrixPlan,
    PoolPlan,
    Weights,
    checked_weights,
)
from fasterai.deploy.kernels.tiling import Geometry, tiles

PLANS = 4  # sizes of inputs that a layer keeps plans for
MOST_VECTORS = 64  # candidates for the registers of a tile; the kernels say which there are
FEW = 1  # inputs of a Linear up to which they are multiplied one by one
TILINGS = 'default', 'other'
ACTIVATED = {None: nn.Identity(), 'relu': F.relu, 'relu6': F.relu6}
FUSED = {nn.ReLU: 'relu', nn.ReLU6: 'relu6'}


class _Kernel(nn.Module):
    """Keep plans for the sizes of inputs that a layer meets, and refuse what the kernels do not compute.

    Between two calls of a layer the rest of a network runs, and Python's own code and data leave the caches:
    each line of `forward` costs several times what it costs in a loop. So what can be is done in the plan."""

    def __init__(self):
        super().__init__()
        self._forget()

    def _forget(self): self._plans, self._lock = {}, threading.Lock()

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name not in ('_plans', '_lock')}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._forget()

    def forward(self, x): return self._plan(x)(x)

    def _plan(self, x, activation=None):
        if kernels.is_traced(): self._refuse_to_be_traced()
        if self.training or not x.is_cpu or x.dtype is not torch.float32 or x.requires_grad: self._check(x)
        plan = self._plans.get((x.shape, activation))
        if plan is None or plan.watched._version != plan.version: plan = self._planned(x, activation)
        return plan

    def _refuse_to_be_traced(self):
        "Say that a trace would not have what the kernels compute."
        raise RuntimeError(f'{type(self).__name__} cannot be traced or exported, as torch does not see '
                           'what its kernels compute: trace or export the model that was given to speed_up, '
                           'or use save_fast')

    def _check(self, x):
        name = type(self).__name__
        if self.training:
            raise RuntimeError(f'{name}: got training mode, expected eval(): it is for inference')
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f'{name}: got an input with gradients, expected none: it is for inference, '
                               'under torch.no_grad() or torch.inference_mode()')
        if x.dtype != torch.float32 or x.device.type != 'cpu' or x.layout != torch.strided:
            raise TypeError(f'{name}: got {x.dtype} on {x.device}, expected a dense torch.float32 on cpu')

    def _planned(self, x, activation):
        "Make the plan for a size of inputs; the oldest goes where there are too many."
        self._check(x)
        key = x.shape, activation
        with self._lock:  # another thread may have made it
            plan = self._plans.get(key)
            if plan is not None and plan.watched._version == plan.version: return plan
            plan = self._new_plan(x, activation)
            self._plans.pop(key, None)
            while len(self._plans) >= PLANS: del self._plans[next(iter(self._plans))]
            self._plans[key] = plan
        return plan


class _Call:
    "Call a plan, or torch where there are no kernels, for inputs of one shape."

    def __init__(self, run, out_shape, watched):
        self.run, self.out_shape = run, out_shape
        self.plan = getattr(run, '__self__', None)  # of the kernels
        # an inference tensor counts no versions
        self.watched = _UNCHANGED if watched.is_inference() else watched
        self.version = self.watched._version

    def __call__(self, x, add=None):
        y = x.new_empty(self.out_shape)
        self.run(x if x.is_contiguous() else x.contiguous(), y, add)
        return y


_UNCHANGED = torch.zeros(0)


class _Sparse(_Kernel):
    "Hold the weights that are not zero, by output channel."

    def __init__(self, layer, activation, tiling):
        super().__init__()
        _check_activation(activation)
        if tiling not in TILINGS: raise ValueError(f'tiling: got {tiling!r}, expected {TILINGS}')
        if layer.weight.dtype != torch.float32 or layer.weight.device.type != 'cpu':
            raise TypeError(f'layer: got weights of {layer.weight.dtype} on {layer.weight.device}, '
                            'expected torch.float32 on cpu')
        weight = layer.weight.detach().flatten(1)
        output, position = weight.nonzero(as_tuple=True)
        begin = torch.searchsorted(output, torch.arange(len(weight) + 1, device=weight.device))
        self.register_buffer('rows', begin.int())
        self.register_buffer('columns', position.int())
        self.register_buffer('values', weight[output, position])
        self.register_buffer('bias', None if layer.bias is None else layer.bias.detach().clone())
        self.size, self.activation, self.tiling = tuple(weight.shape), activation, tiling
        self.eval()

    def _activation(self, activation):
        "Return what is done with the outputs of a call."
        _check_activation(activation)
        return self.activation if activation is None else activation

    def fuse(self,
        activation: nn.Module,  # a ReLU or ReLU6 that nothing else comes before
    ):
        "Take over what an activation does with the outputs."
        self.activation = FUSED[type(activation)]
        self._forget()

    @property
    def unstored(self):
        "Return the share of the weight that is not stored, 0 to 1."
        return 1 - self.values.numel() / max(1, self.size[0] * self.size[1])

    @property
    def options(self):
        "Return what the layer was built with, beside the dense one."
        return {'activation': self.activation, 'tiling': self.tiling}

    def _weights(self):
        """Return the weights as arrays, checked, and copied: a plan must not change under the kernels.

        The bias is the layer's own, which no index comes from."""
        if self.values.dtype != torch.float32 or self.values.device.type != 'cpu':
            raise TypeError(f'{type(self).__name__}: got weights of {self.values.dtype} on '
                            f'{self.values.device}, expected torch.float32 on cpu')
        begin, position = (t.numpy().astype(np.int32) for t in (self.rows, self.columns))
        bias = None if self.bias is None else self.bias.numpy()
        return checked_weights(Weights(begin, position, self.values.numpy().copy(), bias), self.size[1])

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        # another weight of the same shape may have another number of nonzeros
        for name in ('columns', 'values'):
            new, old = state_dict.get(prefix + name), getattr(self, name)
            if isinstance(new, torch.Tensor) and new.ndim == 1 and new.shape != old.shape:
                setattr(self, name, old.new_zeros(new.shape))
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._forget()

    def _apply(self, *args, **kwargs):
        self._forget()
        return super()._apply(*args, **kwargs)

    def _filled(self, layer, shape):
        "Give a new dense layer the weight and the bias."
        layer.weight.data = self._dense_weight(shape)
        if self.bias is not None: layer.bias.data = self.bias.clone()
        return layer.train(self.training)

    def _dense_weight(self, shape):
        "Return the weight with its zeros."
        weights = self._weights()
        weight = self.values.new_zeros(self.size)
        output = np.repeat(np.arange(self.size[0]), np.diff(weights.begin))
        weight[torch.from_numpy(output), self.columns.long()] = self.values
        return weight.view(shape)


class SparseConv(_Sparse):
    """Compute a Conv1d or Conv2d by the weights that are not zero.

    It is for inference, in float32 on a CPU. A weight that is zero is skipped: where the dense layer makes
    NaN of zero times infinity or NaN, the number is as if the input was not there. Outputs are
    contiguous."""

    def __init__(self,
        layer: nn.Conv1d | nn.Conv2d,  # the dense layer; its padding is with zeros
        activation: str | None = None,  # 'relu' or 'relu6': what is done with the outputs
        tiling: str = 'default',  # 'default' or 'other': a second way to split the outputs, faster for some sizes
    ):
        _check_convolution(layer)
        super().__init__(layer, activation, tiling)
        self.axes = layer.weight.ndim - 2
        kernel, stride, dilation = (_two(getattr(layer, n)) for n in ('kernel_size', 'stride', 'dilation'))
        padding = _four(layer.padding, kernel, dilation)
        self.geometry = Geometry(layer.in_channels, layer.out_channels, kernel, stride, padding,
                                 dilation, layer.groups)

    def forward(self,
        x,  # (images, channels, height, width), or without images, or without height
        add=None,  # a tensor of the output's shape, added before the ReLU
        activation: str | None = None,  # what is done with the outputs of this call; None: what the layer was built with
    ):
        plan = self._plan(x, activation)
        if add is None: return plan(x)
        self._check(add)
        if tuple(add.shape) != plan.out_shape:
            raise ValueError(f'add: got the shape {tuple(add.shape)}, expected {plan.out_shape}')
        return plan(x, add if add.is_contiguous() else add.contiguous())

    @property
    def item_axes(self): return 1 + self.axes  # of an input, behind those of the batch

    def _out_shape(self, x):
        places = x.shape[-self.axes:]
        if x.ndim not in (self.axes + 1, self.axes + 2) or x.shape[-self.axes - 1] != self.geometry.channels:
            raise ValueError(f'x: got the shape {tuple(x.shape)}, expected {self.geometry.channels} channels '
                             f'and {self.axes} axes of places')
        out = self.geometry.out_size(*(1, *places)[-2:])
        if min(out) < 1: raise ValueError(f'x: got {tuple(x.shape)}, expected more than the kernel is large')
        return (*x.shape[:-self.axes - 1], self.geometry.outputs, *out[2 - self.axes:])

    def _new_plan(self, x, activation):
        out_shape, code, activation = self._out_shape(x), kernels.library(), self._activation(activation)
        if 0 in out_shape: run = _nothing
        elif code is None: run = partial(self._dense, activation)
        else: run = self._packed(code, x.shape, activation).run
        return _Call(run, out_shape, self.values)

    def _packed(self, code, shape, activation):
        geometry, weights = self.geometry, self._weights()
        images, (height, width) = math.prod(shape[:-self.axes - 1]), (1, *shape[-self.axes:])[-2:]
        if _reads_each_place_once(geometry): height, width = 1, height * width  # the map is one row
        shape = images, height, width
        return ConvolutionPlan(code, geometry, shape, _tile(code, geometry, shape, weights, self.tiling),
                               weights, activation)

    def dense(self) -> nn.Module:  # a Conv1d or Conv2d
        "Return the dense layer, with the weights that are zero. It has no activation."
        g, axes = self.geometry, self.axes
        padding = self._padding()
        kind = nn.Conv1d if axes == 1 else nn.Conv2d
        layer = kind(g.channels, g.outputs, g.kernel[-axes:], g.stride[-axes:], padding, g.dilation[-axes:],
                     g.groups, bias=self.bias is not None)
        return self._filled(layer, layer.weight.shape)

    def _padding(self):
        top, left, bottom, right = self.geometry.padding
        return (top, left)[-self.axes:] if (top, left) == (bottom, right) else 'same'

    def _dense(self, activation, x, y, add=None):
        _warn_of_dense()
        geometry = self.geometry
        images = x.reshape(-1, geometry.channels, *(1, *x.shape[-self.axes:])[-2:])
        top, left, bottom, right = geometry.padding
        weight = self._dense_weight((geometry.outputs, -1, *geometry.kernel))
        found = F.conv2d(F.pad(images, (left, right, top, bottom)), weight, self.bias, geometry.stride, 0,
                         geometry.dilation, geometry.groups).view(y.shape)
        if add is not None: found += add
        y.copy_(ACTIVATED[activation](found))

    def extra_repr(self):
        g = self.geometry
        return (f'{g.channels}, {g.outputs}, kernel_size={g.kernel}, stride={g.stride}, '
                f'padding={g.padding[:2]}, groups={g.groups}, values={self.values.numel()}, '
                f'activation={self.activation!r}, tiling={self.tiling!r}')


def _check_activation(activation):
    if activation in ACTIVATIONS: return
    raise ValueError(f"activation: got {activation!r}, expected None, 'relu' or 'relu6'")


def _check_convolution(layer):
    if type(layer) not in (nn.Conv1d, nn.Conv2d):
        raise TypeError(f'layer: got {type(layer).__name__}, expected a Conv1d or Conv2d')
    if layer.padding_mode != 'zeros' and layer.padding != 'valid':
        raise ValueError(f"layer: got the padding_mode {layer.padding_mode!r}, expected 'zeros'")


def _two(sizes): return (1, *sizes)[-2:]


def _four(padding, kernel, dilation):
    "Return a padding as top, left, bottom, right."
    if padding == 'valid': return 0, 0, 0, 0
    if padding != 'same': return (*(0, *padding)[-2:],) * 2
    total = [d * (k - 1) for d, k in zip(dilation, kernel)]
    before = [t // 2 for t in total]
    return (*before, *(t - b for t, b in zip(total, before)))


def _warn_of_dense():
    kernels.warn_once(f'no sparse kernels, so layers are computed dense: {kernels.why_not()}')


def _nothing(x, y, add): "Compute no outputs, where there are none."


def _reads_each_place_once(geometry):
    return geometry.kernel == (1, 1) and geometry.stride == (1, 1) and not any(geometry.padding)


def _tile(code, geometry, shape, weights, tiling):
    "Return the tile that should be fastest, or the best that is not like it."
    registers = frozenset(n for n in range(1, MOST_VECTORS) if code.has_tile(n))
    found = tiles(geometry, shape, len(weights.value), int(code.lanes()), registers)
    if not found:
        raise ValueError(f'layer: got a kernel of {geometry.kernel}, expected one that fits 16-bit offsets')
    best = found[0]
    if tiling == 'default': return best
    return next((t for t in found if _is_other(t, best)), best)


def _is_other(tile, best):
    if tile.vectors <= .6 * best.vectors: return True
    return tile.vectors >= 1.6 * best.vectors


class SparseLinearKernel(_Sparse):
    """Compute a Linear by the weights that are not zero.

    It is for inference, in float32 on a CPU. A weight that is zero is skipped: where the dense layer makes
    NaN of zero times infinity or NaN, the number is as if the input was not there."""

    item_axes = 1  # of an input, behind those of the batch

    def __init__(self,
        layer: nn.Linear,  # the dense layer
        activation: str | None = None,  # 'relu' or 'relu6': what is done with the outputs
        tiling: str = 'default',  # 'default' or 'other', as of SparseConv
    ):
        if type(layer) is not nn.Linear:
            raise TypeError(f'layer: got {type(layer).__name__}, expected a Linear')
        super().__init__(layer, activation, tiling)

    def forward(self,
        x,  # (..., inputs)
        activation: str | None = None,  # what is done with the outputs of this call; None: what the layer was built with
    ):
        return self._plan(x, activation)(x)

    def _new_plan(self, x, activation):  # (..., inputs) → (..., outputs)
        (outputs, inputs), activation = self.size, self._activation(activation)
        if not x.ndim or x.shape[-1] != inputs:
            raise ValueError(f'x: got the shape {tuple(x.shape)}, expected (..., {inputs})')
        count, code = math.prod(x.shape[:-1]), kernels.library()
        if not count or not outputs: run = _nothing
        elif code is None: run = partial(self._dense, activation)
        elif count <= FEW: run = MatrixPlan(code, inputs, count, self._weights(), activation).run
        else: run = self._packed(code, count, activation).run
        return _Call(run, (*x.shape[:-1], outputs), self.values)

    def _packed(self, code, count, activation):
        geometry, weights = Geometry(self.size[1], self.size[0], (1, 1)), self._weights()
        shape = 1, 1, count  # the items of a batch are the places of one row
        return ConvolutionPlan(code, geometry, shape, _tile(code, geometry, shape, weights, self.tiling),
                               weights, activation, transposed=True)

    def dense(self) -> nn.Linear:
        "Return the dense layer, with the weights that are zero. It has no activation."
        return self._filled(nn.Linear(self.size[1], self.size[0], self.bias is not None), self.size)

    def _dense(self, activation, x, y, add=None):
        _warn_of_dense()
        found = F.linear(x, self._dense_weight(self.size), self.bias)
        y.copy_(ACTIVATED[activation](found))

    def extra_repr(self):
        return (f'in_features={self.size[1]}, out_features={self.size[0]}, values={self.values.numel()}, '
                f'activation={self.activation!r}, tiling={self.tiling!r}')


class MaxPool(_Kernel):
    "Compute a MaxPool2d of contiguous float32 tensors on a CPU, for inference."

    item_axes = 3  # of an input, behind those of the batch

    def __init__(self,
        layer: nn.MaxPool2d,  # one that returns no indices
    ):
        super().__init__()
        if type(layer) is not nn.MaxPool2d:
            raise TypeError(f'layer: got {type(layer).__name__}, expected a MaxPool2d')
        if layer.return_indices: raise ValueError('layer: got return_indices=True, expected False')
        self.kernel, self.stride = _pair(layer.kernel_size), _pair(layer.stride)
        self.padding, self.dilation = _pair(layer.padding), _pair(layer.dilation)
        self.ceil_mode = layer.ceil_mode
        self.eval()

    def _new_plan(self, x, activation):  # (images, channels, height, width), or without images
        code = kernels.library()
        out_shape = self._pooled(x.to('meta')).shape  # torch knows what ceil_mode means
        if code is None: run = self._dense
        elif 0 in out_shape: run = _nothing
        else: run = PoolPlan(code, self._arguments(x.shape, out_shape)).run
        return _Call(run, out_shape, _UNCHANGED)

    def _arguments(self, shape, out_shape):
        return kernels.Pool(math.prod(shape[:-2]), *shape[-2:], *out_shape[-2:],
                            *self.kernel, *self.stride, *self.dilation, *self.padding)

    def _dense(self, x, y, add): y.copy_(self._pooled(x))

    def _pooled(self, x):
        return F.max_pool2d(x, self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode)

    def extra_repr(self): return f'kernel_size={self.kernel}, stride={self.stride}, padding={self.padding}'


def _pair(value): return tuple(value) if isinstance(value, (tuple, list)) else (value, value)
