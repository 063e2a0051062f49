"Each row of the table is compared with what torch computes from a channel that is all zero."
from collections import ChainMap

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fasterai.operations import (
    LAYERS,
    OPERATIONS,
    SETTINGS,
    Call,
    Node,
    addition,
    batch_norm,
    division,
    fake_quantization,
    follow,
    in_place,
    keeps_zeros,
    layer_call,
    multiplication,
    plain,
    reduction,
    zero_channels,
)


def functions(space):
    "Return {name as the table has it: function}."
    names = [n for n in dir(space) if not n.endswith('_') and callable(getattr(space, n))]
    return {plain(n): getattr(space, n) for n in names}


NAMES = ChainMap(*map(functions, (F, torch, torch.Tensor)))
MORE = {'prelu': [torch.ones(3)], 'to': [torch.float64], 'featuredropout': [.5, True]}  # arguments that must be given
WEIGHT = nn.Parameter(torch.ones(4, 3, 1, 1))


def rows(rule): return sorted(name for name, of in OPERATIONS.items() if of is rule)


def image():
    "A batch of three channels, the second of which is zero."
    x = torch.rand(2, 3, 4, 4) - .5
    x[:, 1] = 0
    return x


def called(name, *args, before=None, after=None, nodes=None, norms=None, **kwargs):
    "Return the node of a call; `nodes` has those of the arguments, by id."
    nodes = nodes or {}
    shapes = {id(args[0]): before} if before else {}
    return follow(Call(name, args, kwargs, lambda x: nodes.get(id(x)), norms or {}, shapes, after))


def after_layer(name, x, *args, axis=1, after=None, **kwargs):
    "Return the node of a call whose first argument is `x`, with channels on `axis`."
    node = Node('layer', axis=axis, ndim=x.ndim, length=x.shape[axis])
    return called(name, x, *args, before=x.shape, after=after, nodes={id(x): node}, **kwargs)


def dead(node, *inputs): return zero_channels(node, [i and np.array(i) for i in inputs], {}, {})


@pytest.mark.parametrize('name', rows(keeps_zeros))
def test_what_keeps_zeros(name):
    x, more = image(), MORE.get(name, [])
    if name == 'dropout1d': x = x.flatten(2)
    result = nn.Identity()(x) if name == 'identity' else NAMES[name](x, *more)
    assert not result[:, 1].any() and result.shape == x.shape
    node = after_layer(name, x, *more, after=result.shape)
    assert (node.op, node.axis, node.ndim, node.length) == ('keeps_zeros', 1, x.ndim, 3)


@pytest.mark.parametrize('name', ['sigmoid', 'exp', 'cos', 'softmax', 'softplus', 'logsigmoid', 'transpose', 'unknown'])
def test_what_is_not_in_the_table_hides_the_channels(name):
    node = after_layer(name, image())
    assert (node.op, node.axis, node.ndim) == ('other', None, None) and dead(node) is None


@pytest.mark.parametrize('axes', [1, 2, 3])
@pytest.mark.parametrize('kind', ['max_pool', 'avg_pool', 'adaptive_max_pool', 'adaptive_avg_pool'])
def test_pools(kind, axes):
    name, x = f'{kind}{axes}d', torch.rand(2, 3, *[4] * axes)
    x[:, 1] = 0
    result = getattr(F, name)(x, 2)
    assert not result[:, 1].any() and result.shape == (2, 3, *[2] * axes)
    assert after_layer(name, x, 2).op == 'keeps_zeros'
    assert after_layer(name, x, 2, axis=-1 % x.ndim).op == 'other'  # features on the last axis are pooled


def test_resizing():
    for name in ('interpolate', 'upsample'): assert after_layer(name, image(), scale_factor=2).op == 'keeps_zeros'
    assert not F.interpolate(image(), scale_factor=2)[:, 1].any()


@pytest.mark.parametrize('low, high, op', [(-1, 1, 'keeps_zeros'), (0, 6, 'keeps_zeros'), (-2, 0, 'keeps_zeros'),
                                           (.1, 1, 'other'), (-1, -.1, 'other')])
def test_hardtanh(low, high, op):
    assert (not F.hardtanh(image(), low, high)[:, 1].any()) == (op == 'keeps_zeros')
    assert after_layer('hardtanh', image(), low, high).op == after_layer('Hardtanh', image(), min_val=low, max_val=high).op == op


@pytest.mark.parametrize('name', rows(reduction))
@pytest.mark.parametrize('dim, keep, ndim', [((2, 3), False, 2), ([-1], False, 3), (-2, True, 4), ((2, 3), True, 4),
                                             (1, False, None), ((1, 2), True, None), (0, False, None)])
def test_reductions(name, dim, keep, ndim):
    x = image()
    node = after_layer(name, x, dim, keepdim=keep)
    assert node.ndim == ndim and (node.op == 'other') == (ndim is None)
    if ndim: assert NAMES[name](x, dim, keep).ndim == ndim and not NAMES[name](x, dim, keep)[:, 1].any()


@pytest.mark.parametrize('name', ['view', 'reshape'])
@pytest.mark.parametrize('shape, op, zero', [
    ((2, 3, 16), 'keeps_zeros', [1]), ((2, 3, 2, 2, 2, 2), 'keeps_zeros', [1]),
    ((2, 48), 'keeps_zeros', list(range(16, 32))),  # a channel becomes 16 entries
    ((6, 4, 4), 'other', None), ((2, 12, 4), 'other', None), ((96,), 'other', None)])
def test_views(name, shape, op, zero):
    x = image()
    node = after_layer(name, x, *shape, after=torch.Size(shape))
    assert node.op == op
    if zero is None: return
    found = dead(node, [False, True, False])
    assert found.nonzero()[0].tolist() == zero and len(found) == shape[1] == node.length
    assert not NAMES[name](x, shape)[:, found].any()


def test_flattening_without_shapes_is_followed_from_axis_1():
    for start, op in ((1, 'keeps_zeros'), (0, 'other'), (2, 'other')):
        node = called('flatten', 'x', start, nodes={id('x'): Node('layer', axis=1, ndim=4, length=3)})
        assert node.op == op and node.ndim == (2 if op == 'keeps_zeros' else None)


@pytest.mark.parametrize('name', rows(addition))
def test_a_sum_is_zero_where_both_are(name):
    x, y = object(), object()
    node = called(name, x, y, nodes={id(x): Node(axis=1, ndim=4, length=3), id(y): Node(axis=1, ndim=4, length=3)})
    assert node.op == 'addition' and dead(node, [True, True, False], [False, True, True]).tolist() == [False, True, False]
    assert dead(node, [True, True, False], None) is dead(node, [True, True, False], [True]) is None
    node = called(name, x, y, nodes={id(x): Node(axis=1, ndim=4, length=3), id(y): Node(axis=1, ndim=2, length=3)})
    assert node.op == 'other'
    assert called(name, x, 1, nodes={id(x): Node(axis=1, ndim=4, length=3)}).op == 'other'


@pytest.mark.parametrize('name', rows(multiplication))
def test_a_product_is_zero_where_either_is(name):
    x, y = object(), object()
    node = called(name, x, y, nodes={id(x): Node(axis=1, ndim=4, length=3), id(y): Node(axis=1, ndim=4, length=3)})
    assert dead(node, [True, False, False], [False, False, True]).tolist() == [True, False, True]
    assert dead(node, None, [False, False, True]).tolist() == [False, False, True]
    assert dead(node, None, None) is None
    features = {id(x): Node(axis=1, ndim=2, length=3)}
    assert called(name, x, 2, nodes=features).op == 'multiplication'
    assert called(name, x, y, nodes=features).op == 'other'  # x may be broadcast
    assert called(name, x, y, nodes=features, before=(2, 3), after=(2, 3)).op == 'multiplication'
    assert called(name, x, y, nodes=features, before=(2, 3), after=(4, 2, 3)).op == 'other'


@pytest.mark.parametrize('dim', [1, -3])
def test_a_concatenation_along_the_channels(dim):
    parts = x, y = object(), object()
    known = {id(x): Node(axis=1, ndim=4, length=2), id(y): Node(axis=1, ndim=4, length=3)}
    node = called('cat', parts, dim, nodes=known)
    assert (node.op, node.length) == ('cat', 5)
    assert dead(node, None, [True, False, True]).tolist() == [False, False, True, False, True]
    assert called('cat', parts, 0, nodes=known).op == called('cat', parts, dim, nodes={id(x): known[id(x)]}).op == 'other'
    node = called('cat', parts, dim=dim, nodes=known | {id(y): Node(axis=1, ndim=4)})
    assert node.length is None and dead(node, [True, False], None) is None


@pytest.mark.parametrize('name', rows(batch_norm))
def test_norms(name):
    norm, x = nn.BatchNorm2d(3), object()
    norms = {id(t): norm for t in norm.parameters()}
    node = called(name, x, norm.weight, nodes={id(x): Node(axis=1, ndim=4, length=3)}, norms=norms)
    assert (node.op, node.norm, node.length) == ('norm', norm, 3)
    assert dead(node, [True, False, True]).tolist() == [True, False, True] and dead(node, [True]) is None
    assert called(name, x, norm.weight, nodes={id(x): Node(axis=2, ndim=3, length=3)}, norms=norms).op == 'other'
    assert called(name, x, WEIGHT, nodes={id(x): Node(axis=1, ndim=4, length=3)}, norms=norms).op == 'other'


@pytest.mark.parametrize('name, weight, shape, axis', [
    ('linear', (4, 3), (2, 4), 1), ('linear', (4, 3), (2, 5, 4), 2), ('conv1d', (4, 3, 1), (2, 4, 5), 1),
    ('conv2d', (4, 3, 1, 1), (2, 4, 5, 5), 1), ('conv2d', (4, 3, 1, 1), (4, 5, 5), 0),
    ('conv3d', (4, 3, 1, 1, 1), (2, 4, 5, 5, 5), 1), ('conv_transpose1d', (3, 4, 1), (2, 4, 5), 1),
    ('conv_transpose2d', (3, 2, 1, 1), (2, 4, 5, 5), 1), ('conv_transpose3d', (3, 4, 1, 1, 1), (2, 4, 5, 5, 5), 1)])
def test_layers(name, weight, shape, axis):
    weight = nn.Parameter(torch.ones(weight))
    node = called(name, object(), weight, None, after=torch.Size(shape))
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
    assert called('ConvTranspose2d', x, WEIGHT).length is None


def test_a_filter_is_zero_with_its_bias():
    filters, bias = {id(WEIGHT): np.array([True, False])}, nn.Parameter(torch.ones(2))
    masked = {id(bias): np.array([True, False])}
    for given, zeroed, known in ((None, {}, True), (bias, masked, True), (bias, {}, False), (bias * 2, masked, False)):
        found = zero_channels(called('conv2d', object(), WEIGHT, given), [None], filters, zeroed)
        assert (found is not None) == known and (not known or found.tolist() == [True, False])


def test_a_bias_of_zeros_is_none():
    for name in ('zeros', 'zeros_like'):
        zeros = called(name, object())
        bias = object()
        node = called('conv2d', object(), WEIGHT, bias, nodes={id(bias): zeros})
        assert node.bias is None and zero_channels(node, [None], {id(WEIGHT): np.array([True])}, {}).tolist() == [True]
    other = object()
    assert called('conv2d', object(), WEIGHT, other, nodes={id(other): called('ones_like', object())}).bias is other


def test_a_bias_that_is_reshaped_is_zero_where_its_filters_are():
    bias, zero = nn.Parameter(torch.ones(3)), np.array([True, False, True])
    node = called('reshape', bias, [1, -1, 1], before=(3,), after=(1, 3, 1))
    assert (node.op, node.axis, node.ndim, node.length) == ('bias', 1, 3, 3)
    assert zero_channels(node, [], {}, {id(bias): zero}) is zero and zero_channels(node, [], {}, {}) is None
    assert called('reshape', bias, [1, 3, 1]).op == 'other'  # without shapes
    assert called('reshape', nn.Parameter(torch.ones(1)), [1, 1], before=(1,), after=(1, 1)).op == 'other'
    assert called('reshape', nn.Parameter(torch.ones(4)), [2, 2], before=(4,), after=(2, 2)).op == 'other'
    assert called('reshape', bias.data, [1, 3], before=(3,), after=(1, 3)).op == 'other'


@pytest.mark.parametrize('name', rows(division))
def test_a_quotient_is_zero_where_the_first_is(name):
    x, y = object(), object()
    node = called(name, x, y, nodes={id(x): Node(axis=1, ndim=4, length=3), id(y): Node(axis=1, ndim=4, length=3)})
    assert node.op == 'multiplication' and dead(node, [True, False, False]).tolist() == [True, False, False]
    assert called(name, y, x, nodes={id(x): Node(axis=1, ndim=4, length=3)}).op == 'other'
    assert called(name, x, y, nodes={id(x): Node(axis=1, ndim=2, length=3)}, before=(2, 3), after=(4, 2, 3)).op == 'other'


# Fake quantization, of what a layer puts out and of its weight

IS_ON, TENSOR, CHANNELS = torch.ones(1).long(), torch.tensor, torch.zeros(3, dtype=torch.int32)
QUANTIZED = {
    'fake_quantize_per_tensor_affine': (.1, 3, 0, 255),
    'fake_quantize_per_channel_affine': (TENSOR([.1, .2, .3]), CHANNELS + 7, 1, 0, 255),
    'fused_moving_avg_obs_fake_quant': (IS_ON, IS_ON, TENSOR(-.7), TENSOR(.3), TENSOR([.1]), CHANNELS[:1], .1, 0, 255, 0),
}


@pytest.mark.parametrize('name', QUANTIZED)
def test_fake_quantization_keeps_zeros(name):
    x, more = image(), QUANTIZED[name]
    result = getattr(torch, name)(x, *more)
    assert not result[:, 1].any() and result.any() and not torch.equal(result, x)
    assert after_layer(name, x, *more, after=result.shape).op == 'keeps_zeros'
    assert after_layer(name, x, *more).op == 'keeps_zeros'
    assert {plain(n) for n in QUANTIZED} == set(rows(fake_quantization))


def test_a_zero_point_between_the_steps_makes_something_of_zero():
    x, scale, between = image(), TENSOR([.1, .2, .3]), TENSOR([.5, .4, .3])
    assert torch.fake_quantize_per_channel_affine(x, scale, between, 1, 0, 255)[:, 1].any()
    assert after_layer('fake_quantize_per_channel_affine', x, scale, between, 1, 0, 255).op == 'other'


def test_a_weight_stays_its_layers_through_fake_quantization_and_a_product():
    x, changed, quantized, scale = object(), object(), object(), torch.ones(4, 1, 1, 1)
    product = called('mul', WEIGHT, scale, before=WEIGHT.shape, after=WEIGHT.shape)
    nodes = {id(changed): product, id(quantized): called('fused_moving_avg_obs_fake_quant', changed, nodes={id(changed): product})}
    for weight in (changed, quantized):
        node = called('conv2d', x, weight, nodes=nodes)
        assert (node.op, node.weight, node.sources) == ('layer', WEIGHT, {id(WEIGHT)})
    assert dead(product) is None and product.axis is None and product.reads == {id(WEIGHT)}


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
    assert set(OPERATIONS) <= known | {'multiheadattentionforward'} and set(LAYERS) <= set(OPERATIONS)
    for module, settings in SETTINGS.items(): assert all(hasattr(getattr(nn, module)(), s) for s in settings)


def test_what_changes_its_first_argument():
    assert all(map(in_place, ('add_', 'relu_', '__setitem__', 'iadd', '__imul__')))
    assert not any(map(in_place, ('add', '__add__', '__get__', 'relu', '')))
