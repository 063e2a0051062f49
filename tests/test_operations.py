"Each row of the table is compared with what torch computes from a channel that is all zero."
import operator
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fasterai.channels import zero_entries
from fasterai.dataflow import Flow, _Watcher, trace
from fasterai.operations import (
    LAYERS,
    OPERATIONS,
    SETTINGS,
    Call,
    Node,
    batch_norm,
    elementwise,
    fake_quantization,
    follow,
    in_place,
    layer_call,
    own_weights,
    plain,
)

WEIGHT = nn.Parameter(torch.ones(4, 3, 1, 1))


def rows(*rules): return sorted(name for name, of in OPERATIONS.items() if of in rules)


def called(name, *args, before=None, after=None, nodes=None, norms=None, **kwargs):
    "Return the node of a call; `nodes` has those of the arguments, by id."
    nodes = nodes or {}
    shapes = {id(args[0]): before} if before else {}
    return follow(Call(name, args, kwargs, lambda x: nodes.get(id(x)), norms or {}, shapes, after))


def image(channels=3): return Node('layer', places=(1, channels, 1, 1), ndim=4, axis=1)


# Each operation is compared with torch: what a network of random weights makes of a layer with two zero filters

class Way(nn.Module):
    "A layer of four filters, the second and fourth of which are zero, and a way on from there."
    def __init__(self, way, features=False):
        super().__init__()
        self.a, self.way = nn.Linear(2, 4, bias=False) if features else nn.Conv2d(2, 4, 1, bias=False), way
        self.b = deepcopy(self.a)
        self.n, self.gain = nn.BatchNorm2d(4), nn.Parameter(torch.rand(4, 1, 1) + 1)
        with torch.no_grad():
            for layer in (self.a, self.b): layer.weight.abs_().add_(.1)
            self.a.weight[1::2] = 0

    def forward(self, x): return self.way(self, self.a(x)) if self.way.__code__.co_argcount == 2 else self.way(self, self.a(x), self.b(x))


def dead(model): return {id(model.a.weight): (model.a.weight.flatten(1) == 0).all(1).numpy()}


def values_of(flow, model):
    "What is said to be zero of each node."
    values = {}
    for node in flow.tape: values[node] = zero_entries(node, [values.get(i) for i in node.inputs], dead(model) | {id(model.b.weight): np.zeros(4, bool)}, {})
    return values


def said(model, x):
    "What is said to be zero of the output: bool of its shape, None where nothing is."
    watcher = _Watcher({})
    with torch.no_grad(), watcher: out = model(x)
    node = watcher.node_of(out)
    value = values_of(Flow(watcher.tape, [node]), model).get(node)
    return None if value is None else torch.from_numpy(value.copy()).expand(out.shape)


def always_zero(model, shape):
    "Which entries of the output are zero for several inputs."
    return torch.stack([model(torch.rand(shape) + .1) == 0 for _ in range(9)]).all(0)


IMAGES, ROWS = (2, 2, 4, 4), (3, 5, 2)
ON_IMAGES = {  # names as in the table: a use of each, after which it is known which channels are zero
    'relu': lambda s, x: F.relu(x), 'relu6': lambda s, x: F.relu6(x), 'leakyrelu': lambda s, x: F.leaky_relu(x),
    'prelu': lambda s, x: F.prelu(x, torch.rand(4)), 'rrelu': lambda s, x: F.rrelu(x), 'elu': lambda s, x: F.elu(x),
    'selu': lambda s, x: F.selu(x), 'celu': lambda s, x: F.celu(x), 'gelu': lambda s, x: F.gelu(x), 'silu': lambda s, x: F.silu(x),
    'mish': lambda s, x: F.mish(x), 'hardswish': lambda s, x: F.hardswish(x), 'tanh': lambda s, x: x.tanh(),
    'softsign': lambda s, x: F.softsign(x), 'hardshrink': lambda s, x: F.hardshrink(x, .01), 'softshrink': lambda s, x: F.softshrink(x, .01),
    'tanhshrink': lambda s, x: F.tanhshrink(x), 'abs': lambda s, x: x.abs(), 'neg': lambda s, x: -x, 'sin': lambda s, x: x.sin(),
    'erf': lambda s, x: x.erf(), 'sqrt': lambda s, x: x.abs().sqrt(), 'square': lambda s, x: x.square(),
    'dropout': lambda s, x: F.dropout(x, 0), 'dropout1d': lambda s, x: F.dropout1d(x.flatten(2), 0), 'dropout2d': lambda s, x: F.dropout2d(x, 0),
    'dropout3d': lambda s, x: F.dropout3d(x.unsqueeze(-1), 0), 'featuredropout': lambda s, x: torch.feature_dropout(x, .0, True),
    'rmsnorm': lambda s, x: F.rms_norm(x, (4,)), 'contiguous': lambda s, x: x.contiguous(), 'clone': lambda s, x: x.clone(),
    'to': lambda s, x: x.to(torch.float64), 'float': lambda s, x: x.float(), 'half': lambda s, x: x.half(),
    'hardtanh': lambda s, x: F.hardtanh(x, -9, 9), 'clamp': lambda s, x: x.clamp(max=9), 'clip': lambda s, x: x.clip(-9, 9),
    'pow': lambda s, x: x ** 2, 'maxpool2d': lambda s, x: F.max_pool2d(x, 2), 'avgpool2d': lambda s, x: F.avg_pool2d(x, 2),
    'adaptivemaxpool2d': lambda s, x: F.adaptive_max_pool2d(x, 1), 'adaptiveavgpool2d': lambda s, x: F.adaptive_avg_pool2d(x, 1),
    'maxpool1d': lambda s, x: F.max_pool1d(x.flatten(2), 2), 'avgpool1d': lambda s, x: F.avg_pool1d(x.flatten(2), 2),
    'adaptivemaxpool1d': lambda s, x: F.adaptive_max_pool1d(x.flatten(2), 2), 'adaptiveavgpool1d': lambda s, x: F.adaptive_avg_pool1d(x.flatten(2), 2),
    'maxpool3d': lambda s, x: F.max_pool3d(x.unsqueeze(2), 1), 'avgpool3d': lambda s, x: F.avg_pool3d(x.unsqueeze(2), 1),
    'adaptivemaxpool3d': lambda s, x: F.adaptive_max_pool3d(x.unsqueeze(2), 1), 'adaptiveavgpool3d': lambda s, x: F.adaptive_avg_pool3d(x.unsqueeze(2), 1),
    'interpolate': lambda s, x: F.interpolate(x, scale_factor=2), 'upsample': lambda s, x: F.upsample(x, scale_factor=2),
    'mean': lambda s, x: x.mean((2, 3)), 'sum': lambda s, x: x.sum(-1), 'amax': lambda s, x: x.amax(dim=(2, 3), keepdim=True),
    'amin': lambda s, x: x.amin((2, 3)), 'norm': lambda s, x: x.norm(2, dim=(2, 3), keepdim=True), 'linalgvectornorm': lambda s, x: torch.linalg.vector_norm(x, dim=-1),
    'add': lambda s, x: x + x.relu(), 'radd': lambda s, x: sum([x, x]), 'sub': lambda s, x: x - x * 3, 'rsub': lambda s, x: 0 - x,
    'iadd': lambda s, x: operator.iadd(x, x.clone()), 'isub': lambda s, x: operator.isub(x, 3 * x),
    'mul': lambda s, x, y: y * x, 'multiply': lambda s, x, y: torch.multiply(x, y), 'imul': lambda s, x, y: operator.imul(x, y), 'rmul': lambda s, x: 2 * x,
    'div': lambda s, x, y: x / (1 + y.abs()), 'divide': lambda s, x: torch.divide(x, 3), 'truedivide': lambda s, x: torch.true_divide(x, 3),
    'addcmul': lambda s, x, y: torch.addcmul(x, x, y), 'glu': lambda s, x, y: F.glu(torch.cat([x, y], 1), 1),
    'viewas': lambda s, x: x.view_as(torch.rand(2, 4, 16)), 'reshapeas': lambda s, x: x.transpose(1, 2).reshape_as(torch.rand(2, 2, 2, 16)),
    'detach': lambda s, x: x.detach(), 'typeas': lambda s, x: x.type_as(x), 'double': lambda s, x: x.double(), 'bfloat16': lambda s, x: x.bfloat16(),
    'view': lambda s, x: x.view(2, 2, 2, 16), 'reshape': lambda s, x: x.reshape(2, -1), 'unflatten': lambda s, x: x.unflatten(1, (2, 2)),
    'flatten': lambda s, x: x.flatten(1), 'transpose': lambda s, x: x.transpose(1, 2), 'permute': lambda s, x: x.permute(0, 2, 3, 1),
    'swapaxes': lambda s, x: x.swapaxes(1, 3), 'swapdims': lambda s, x: x.swapdims(0, 1), 'movedim': lambda s, x: x.movedim(1, -1),
    'moveaxis': lambda s, x: x.moveaxis(1, -1), 'unsqueeze': lambda s, x: x.unsqueeze(1), 'narrow': lambda s, x: x.narrow(1, 1, 2),
    'select': lambda s, x: x.select(2, 0), 't': lambda s, x: x.mean((2, 3)).T, 'mt': lambda s, x: x.mT,
    'expand': lambda s, x: x.mean((2, 3), keepdim=True).expand(-1, -1, 2, 2), 'expandas': lambda s, x: x.mean((2, 3), keepdim=True).expand_as(x),
    'repeat': lambda s, x: x.repeat(1, 2, 1, 1), 'tile': lambda s, x: x.tile(1, 3, 1, 1), 'repeatinterleave': lambda s, x: x.repeat_interleave(2, 1),
    'flip': lambda s, x: x.flip(1), 'roll': lambda s, x: x.roll(1, 1), 'channelshuffle': lambda s, x: F.channel_shuffle(x, 2),
    'pixelshuffle': lambda s, x: F.pixel_shuffle(x, 2), 'pixelunshuffle': lambda s, x: F.pixel_unshuffle(x, 2),
    'squeeze': lambda s, x: x.mean((2, 3), keepdim=True).squeeze(), 'getitem': lambda s, x: x[:, 1:, ::2], 'chunk': lambda s, x: x.chunk(2, 1)[1],
    'split': lambda s, x: x.split([1, 3], 1)[1], 'splitwithsizes': lambda s, x: x.split_with_sizes([3, 1], 1)[0],
    'tensorsplit': lambda s, x: torch.tensor_split(x, 3, 1)[0], 'unbind': lambda s, x: x.unbind(1)[1], 'pad': lambda s, x: F.pad(x, (0, 0, 0, 0, 2, 3)),
    'cat': lambda s, x, y: torch.cat([y, x, x.flip(1)], 1), 'concat': lambda s, x: torch.concat([x, x], -1), 'concatenate': lambda s, x: torch.concatenate([x, x], 1),
    'stack': lambda s, x: torch.stack([x, x.flip(1)], 1), 'zeroslike': lambda s, x: torch.zeros_like(x) + x, 'zeros': lambda s, x: torch.cat([x, torch.zeros(2, 1, 4, 4)], 1),
    'conv2d': lambda s, x: F.conv2d(x, s.n.own, groups=4),
}
ON_ROWS = {
    'matmul': lambda s, x, y: y.transpose(1, 2) @ x, 'addmm': lambda s, x, y: torch.addmm(x[0], y[0] @ y[0].T, x[0]), 'bmm': lambda s, x, y: torch.bmm(y.transpose(1, 2), x),
    'mm': lambda s, x, y: torch.mm(y[0].T, x[0]), 'baddbmm': lambda s, x, y: torch.baddbmm(x, y @ y.transpose(1, 2), x), 'scaleddotproductattention': lambda s, x, y: F.scaled_dot_product_attention(y, y, x),
    'softmax': lambda s, x, y: x * y.softmax(1), 'sigmoid': lambda s, x, y: y.sigmoid() * x, 'flatten': lambda s, x: x.flatten(0, 1),
    'transpose': lambda s, x: x.transpose(1, 2), 'masks': lambda s, x: x[..., :1] * 2 * x, 'heads': lambda s, x: x.view(3, 5, 2, 2).transpose(1, 2),
}


@pytest.mark.parametrize('name', ON_IMAGES)
def test_what_is_zero_of_images(name):
    torch.manual_seed(0)
    model = Way(ON_IMAGES[name]).eval()
    if name == 'conv2d': model.n.own = nn.Parameter(torch.rand(8, 1, 1, 1))
    found = said(model, torch.rand(IMAGES) + .1)
    assert found is not None and torch.equal(found, always_zero(model, IMAGES))


@pytest.mark.parametrize('name', ON_ROWS)
def test_what_is_zero_of_rows(name):
    torch.manual_seed(0)
    model = Way(ON_ROWS[name], features=True).eval()
    assert torch.equal(said(model, torch.rand(ROWS) + .1), always_zero(model, ROWS))


def test_each_operation_is_compared_with_torch():
    "Those that hide the channels, layers, norms and fake quantization have tests of their own."
    apart = {*LAYERS, *rows(own_weights, elementwise, batch_norm, fake_quantization), 'einsum', 'identity'}
    assert set(OPERATIONS) <= {*ON_IMAGES, *ON_ROWS, *apart}


HIDES = {  # zero becomes something else, or other channels take part
    'sigmoid': lambda s, x: x.sigmoid(), 'a number': lambda s, x: x + 1, 'from a number': lambda s, x: 1 - x, 'cos': lambda s, x: x.cos(),
    'pow 0': lambda s, x: x ** 0, 'clamp': lambda s, x: x.clamp(.1, 1), 'hardtanh': lambda s, x: F.hardtanh(x, .1, 1),
    'max over channels': lambda s, x: x.amax(1), 'norm over channels': lambda s, x: x.norm(dim=1), 'pool over channels': lambda s, x: F.avg_pool2d(x.flatten(2), 3, 1, 1),
    'softmax over channels': lambda s, x: x.softmax(1), 'a sum with another': lambda s, x, y: x + y, 'pad with ones': lambda s, x: F.pad(x, (1, 1), value=1),
    'reflected': lambda s, x: F.pad(x, (1, 1, 1, 1), mode='reflect').cos(), 'a quotient of': lambda s, x, y: y / (x + 1), 'mixed': lambda s, x, y: x.flatten(2).transpose(1, 2) @ y.flatten(2),
    'a product that is added': lambda s, x, y: torch.baddbmm(x.mean(3), y.mean(3), y.mean(3)), 'einsum': lambda s, x, y: torch.einsum('bhc,bnc->bhn', x.mean(3).mT, y.mean(3).mT),
}


@pytest.mark.parametrize('name', HIDES)
def test_what_hides_zeros(name):
    torch.manual_seed(0)
    found = said(Way(HIDES[name]).eval(), torch.rand(IMAGES) + .1)
    assert found is None or not found.any()


@pytest.mark.parametrize('name', [*ON_IMAGES, *HIDES])
def test_code_that_is_traced_says_no_more_than_what_is_watched(name):
    torch.manual_seed(0)
    way = (ON_IMAGES | HIDES)[name]
    model = Way(way).eval()
    model.n.own = nn.Parameter(torch.rand(8, 1, 1, 1))
    def straight(s, x): return way(s, s.a(x)) if way.__code__.co_argcount == 2 else way(s, s.a(x), s.b(x))
    class Traced(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.n = model.a, model.b, model.n
        def forward(self, x): return straight(self, x)
    try: flow = trace(Traced().eval())
    except Exception: return  # fx cannot follow it
    out = [node for node in flow.tape if node.places is not None]
    shape = tuple(model(torch.rand(IMAGES)).shape)
    last = out[-1] if out else None
    if last is None or last is not flow.tape[-1]: return
    value = values_of(flow, model).get(last)
    if value is None or name == 'flatten': return  # of a flattened one it is said in channels
    found = torch.from_numpy(value.copy()).expand(shape)
    assert not (found & ~always_zero(model, IMAGES)).any()


def test_flattening_without_shapes_is_followed_from_axis_1():
    for start, op in ((1, 'moved'), (0, 'other'), (2, 'other')):
        node = called('flatten', 'x', start, nodes={id('x'): image()})
        assert node.op == op and node.ndim == (2 if op == 'moved' else None)


def test_products_without_shapes_may_be_broadcast():
    x, y = object(), object()
    rows = {id(x): Node(places=(1, 3), ndim=2)}
    assert called('mul', x, 2, nodes=rows).op == 'multiplication'
    assert called('mul', x, y, nodes=rows).op == called('mul', y, x, nodes=rows).op == 'other'
    assert called('mul', y, x, nodes={id(x): image()}).op == 'multiplication'


def test_a_concatenation_without_shapes_is_one_along_the_channels():
    parts = x, y = object(), object()
    known = {id(x): image(2), id(y): image(3)}
    node = follow(Call('cat', (parts, 1), {}, lambda t: known.get(id(t)), {}, function=torch.cat))
    assert (node.op, node.places) == ('moved', (1, 5, 1, 1))
    for given in ((parts, 2), ((x, object()), 1)):
        assert follow(Call('cat', given, {}, lambda t: known.get(id(t)), {}, function=torch.cat)).op == 'other'


@pytest.mark.parametrize('name', rows(batch_norm))
def test_norms(name):
    norm, x = nn.BatchNorm2d(3), object()
    norms = {id(t): norm for t in norm.parameters()}
    node = called(name, x, norm.weight, nodes={id(x): image()}, norms=norms)
    assert (node.op, node.norm, node.length) == ('norm', norm, 3)
    assert called(name, x, norm.weight, nodes={id(x): Node(places=(1, 1, 3), ndim=3)}, norms=norms).op == 'other'
    assert called(name, x, norm.weight, nodes={id(x): image(4)}, norms=norms).op == 'other'
    assert called(name, x, WEIGHT, nodes={id(x): image()}, norms=norms).op == 'other'


@pytest.mark.parametrize('name, weight, shape, axis', [
    ('linear', (4, 3), (2, 4), 1), ('linear', (4, 3), (2, 5, 4), 2), ('conv1d', (4, 3, 1), (2, 4, 5), 1),
    ('conv2d', (4, 3, 1, 1), (2, 4, 5, 5), 1), ('conv2d', (4, 3, 1, 1), (4, 5, 5), 0),
    ('conv3d', (4, 3, 1, 1, 1), (2, 4, 5, 5, 5), 1), ('conv_transpose1d', (3, 4, 1), (2, 4, 5), 1),
    ('conv_transpose2d', (3, 2, 1, 1), (2, 4, 5, 5), 1), ('conv_transpose3d', (3, 4, 1, 1, 1), (2, 4, 5, 5, 5), 1)])
def test_layers(name, weight, shape, axis):
    weight = nn.Parameter(torch.ones(weight))
    groups = {'groups': 2} if weight.shape[1] == 2 else {}
    node = called(name, object(), weight, None, after=torch.Size(shape), **groups)
    assert (node.op, node.axis, node.ndim, node.length) == ('layer', axis, len(shape), 4)
    assert node.weight is weight and node.sources == node.reads == {id(weight)}
    assert called(name, object(), weight.data, None, after=torch.Size(shape)).op == 'other'


def test_layers_without_shapes():
    x = object()
    node = called('linear', x, nn.Parameter(torch.ones(4, 3)), nodes={id(x): Node(ndim=3)})
    assert (node.axis, node.ndim, node.length) == (2, 3, 4)
    assert called('linear', x, nn.Parameter(torch.ones(4, 3))).axis is None
    node = called('Conv2d', x, WEIGHT)
    assert (node.axis, node.ndim, node.length) == (1, 4, 4)
    assert called('ConvTranspose2d', x, WEIGHT).length == 3 and called('ConvTranspose2d', x, WEIGHT, groups=2).length == 6


def test_a_filter_is_zero_with_its_bias():
    zero, bias = np.array([True, False, True, False]), nn.Parameter(torch.ones(4))
    filters, masked = {id(WEIGHT): zero}, {id(bias): zero}
    for given, zeroed, known in ((None, {}, True), (bias, masked, True), (bias, {}, False), (bias * 2, masked, False)):
        found = zero_entries(called('conv2d', object(), WEIGHT, given), [None], filters, zeroed)
        assert (found is not None) == known and (not known or found.flatten().tolist() == zero.tolist())


def test_a_bias_of_zeros_is_none():
    for name in ('zeros', 'zeros_like'):
        zeros = called(name, object())
        bias = object()
        node = called('conv2d', object(), WEIGHT, bias, nodes={id(bias): zeros})
        assert node.bias is None and zero_entries(node, [None], {id(WEIGHT): np.ones(4, bool)}, {}).all()
    other = object()
    assert called('conv2d', object(), WEIGHT, other, nodes={id(other): called('ones_like', object())}).bias is other


def test_a_bias_that_is_reshaped_is_zero_where_its_filters_are():
    bias, zero = nn.Parameter(torch.ones(3)), np.array([True, False, True])
    node = called('reshape', bias, [1, -1, 1], before=(3,), after=(1, 3, 1))
    assert (node.op, node.axis, node.ndim, node.length) == ('bias', 1, 3, 3)
    assert zero_entries(node, [], {}, {id(bias): zero}).flatten().tolist() == zero.tolist() and zero_entries(node, [], {}, {}) is None
    assert called('reshape', bias, [1, 3, 1]).op == 'other'  # without shapes
    assert called('reshape', nn.Parameter(torch.ones(1)), [1, 1], before=(1,), after=(1, 1)).op == 'other'
    assert called('reshape', nn.Parameter(torch.ones(4)), [2, 2], before=(4,), after=(2, 2)).op == 'other'
    assert called('reshape', bias.data, [1, 3], before=(3,), after=(1, 3)).op == 'other'


# Fake quantization, of what a layer puts out and of its weight

IS_ON, TENSOR, CHANNELS = torch.ones(1).long(), torch.tensor, torch.zeros(3, dtype=torch.int32)
QUANTIZED = {
    'fake_quantize_per_tensor_affine': (.1, 3, 0, 255),
    'fake_quantize_per_channel_affine': (TENSOR([.1, .2, .3]), CHANNELS + 7, 1, 0, 255),
    'fused_moving_avg_obs_fake_quant': (IS_ON, IS_ON, TENSOR(-.7), TENSOR(.3), TENSOR([.1]), CHANNELS[:1], .1, 0, 255, 0),
}


def some():
    "A batch of three channels, the second of which is zero."
    x = torch.rand(2, 3, 4, 4) - .5
    x[:, 1] = 0
    return x


@pytest.mark.parametrize('name', QUANTIZED)
def test_fake_quantization_keeps_zeros(name):
    x, more = some(), QUANTIZED[name]
    result = getattr(torch, name)(x, *more)
    assert not result[:, 1].any() and result.any() and not torch.equal(result, x)
    assert called(name, x, *more, nodes={id(x): image()}).op == 'keeps_zeros'
    assert {plain(n) for n in QUANTIZED} == set(rows(fake_quantization))


def test_a_zero_point_between_the_steps_makes_something_of_zero():
    x, scale, between = some(), TENSOR([.1, .2, .3]), TENSOR([.5, .4, .3])
    assert torch.fake_quantize_per_channel_affine(x, scale, between, 1, 0, 255)[:, 1].any()
    assert called('fake_quantize_per_channel_affine', x, scale, between, 1, 0, 255, nodes={id(x): image()}).op == 'other'


def test_a_weight_stays_its_layers_through_fake_quantization_and_a_product():
    x, changed, quantized, scale = object(), object(), object(), torch.ones(4, 1, 1, 1)
    product = called('mul', WEIGHT, scale, before=WEIGHT.shape, after=WEIGHT.shape)
    nodes = {id(changed): product, id(quantized): called('fused_moving_avg_obs_fake_quant', changed, nodes={id(changed): product})}
    for weight in (changed, quantized):
        node = called('conv2d', x, weight, nodes=nodes)
        assert (node.op, node.weight, node.sources) == ('layer', WEIGHT, {id(WEIGHT)})
    assert product.places is None and product.axis is None and product.reads == {id(WEIGHT)}


def test_a_weight_that_is_made_otherwise_is_known_by_its_parameter_alone():
    x, other = object(), object()
    for made in (called('mul', WEIGHT, nn.Parameter(torch.ones(4, 1, 1, 1)), before=WEIGHT.shape, after=WEIGHT.shape),
                 called('mul', WEIGHT, 2.),  # without shapes it may be broadcast
                 called('mul', WEIGHT, 2., before=WEIGHT.shape, after=(9, *WEIGHT.shape)),
                 called('sub', WEIGHT, 2., before=WEIGHT.shape, after=WEIGHT.shape)):
        assert made.op == 'other'
        node = called('conv2d', x, other, nodes={id(other): made, id(x): Node(sources=frozenset([7]))})
        assert node.op == 'other' and node.sources == made.sources and id(WEIGHT) in node.sources


def test_the_arguments_of_a_layer():
    x, bias = object(), object()
    for args, kwargs in (((x, WEIGHT, bias), {}), ((x, WEIGHT), {'bias': bias}), ((), {'input': x, 'weight': WEIGHT, 'bias': bias})):
        assert layer_call('conv2d', args, kwargs) == (x, WEIGHT, bias)
    assert layer_call('Conv2d', (x, WEIGHT), {}) == (x, WEIGHT, None)
    assert layer_call('relu', (x, WEIGHT), {}) is layer_call('conv2d', (x, WEIGHT.data), {}) is None


@pytest.mark.parametrize('name, sources', [('embedding', {'weight'}), ('lstm', {'weight'}), ('matmul', {'weight'}),
                                           ('softmax', {'weight', 'before'})])
def test_sources_of_what_hides_the_channels(name, sources):
    x, ids = object(), {'weight': id(WEIGHT), 'before': 7}
    known = {id(x): Node(sources=frozenset([7]))}
    assert called(name, x, WEIGHT, nodes=known).sources == {ids[s] for s in sources}
    assert called('matmul', x, object(), nodes=known).sources == {7}  # no weight, so it is no layer


def test_the_names_in_the_table_are_those_of_functions_and_modules():
    known = {*map(plain, dir(torch.Tensor)), *map(plain, dir(torch)), *map(plain, dir(F)), *map(plain, dir(nn))}
    assert set(OPERATIONS) <= known | {'multiheadattentionforward', 'linalgvectornorm'} and set(LAYERS) <= set(OPERATIONS)
    for module, settings in SETTINGS.items(): assert set(settings) <= {*getattr(nn, module).__annotations__}


def test_what_changes_its_first_argument():
    assert all(map(in_place, ('add_', 'relu_', '__setitem__', 'iadd', '__imul__')))
    assert not any(map(in_place, ('add', '__add__', '__get__', 'relu', '')))
