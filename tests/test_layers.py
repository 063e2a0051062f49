import pytest
import torch
from torch import nn

from fasterai.granularity import AXES, add_layer_type
from fasterai.layers import choose


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.body = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU()))
        self.head = nn.Linear(2, 3)
        self.tied = nn.Linear(2, 3)
        self.tied.weight = self.head.weight


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3))


def chosen(layers): return list(choose(Net(), layers).chosen)


@pytest.mark.parametrize('layers, names', [
    (None, ['body.0', 'body.2.0', 'head']),
    (nn.Conv2d, ['body.0', 'body.2.0']),
    ('head', ['head']),
    ('body', ['body.0', 'body.2.0']),
    ('body.*', ['body.0', 'body.2.0']),
    ('body.2*', ['body.2.0']),
    (['head', nn.Conv2d], ['body.0', 'body.2.0', 'head']),
    (['head', 'head'], ['head']),
    ('tied', ['tied']),
    ('embed', ['embed']),
    (nn.Embedding, ['embed']),
    ('head.weight', ['head']),
    ('head.bias', ['head.bias']),
    ('*.bias', ['body.0.bias', 'body.1.bias', 'body.2.0.bias', 'head.bias', 'tied.bias'])])
def test_by_type_name_and_glob(layers, names): assert chosen(layers) == names


def test_by_module():
    net = Net()
    assert list(choose(net, net.head).chosen) == ['head']
    assert list(choose(net, net.body).chosen) == ['body.0', 'body.2.0']
    assert list(choose(net, [net.body[2], net.head]).chosen) == ['body.2.0', 'head']
    assert list(choose(nn.Linear(2, 2)).chosen) == ['']


def test_what_was_left_out_has_a_reason():
    assert choose(Net(), ['body.0', 'head', 'tied']).skipped == {
        'embed': 'not chosen', 'body.2.0': 'not chosen', 'tied': "shares the weight of 'head'"}
    assert choose(Net()).skipped['embed'] == 'a lookup table: name it in layers= to include it'
    assert choose(nn.Sequential(nn.Linear(2, 2), Own())).skipped == {
        '1': "Own is no known layer type: add_layer_type(Own, weight='O I') makes it one"}


def test_by_name_is_by_the_name_or_module_of_the_layer_itself():
    net = Net()
    for layers in ('head', net.head, ['body', 'head']): assert choose(net, layers).by_name == {'head'}
    for layers in (None, nn.Linear, 'he*', net): assert choose(net, layers).by_name == set()


@pytest.mark.parametrize('layers, error, says', [
    ('haed', ValueError, "layers: got 'haed', which means none of the layers here, 'embed', .*; did you mean 'head'"),
    ('Conv2d', ValueError,
     "none of the layers here, 'embed', 'body.0', 'body.2.0', 'head', 'tied'; .*; for a type write nn.Conv2d"),
    ('body.1', ValueError, "layers: got 'body.1', which means none of the layers"),
    (nn.LSTM, ValueError, 'means none of the layers'),
    ([], ValueError, 'layers: got an empty list, so no layer is selected'),
    (nn.Linear(1, 1), ValueError, 'layers: got a Linear that is not a part of the model'),
    (3, TypeError, 'layers: got 3, expected a type, a name or glob'),
    ([None], TypeError, 'layers: got None')])
def test_bad_choices_are_refused(layers, error, says):
    with pytest.raises(error, match=says): chosen(layers)


def test_models_without_fitting_layers_are_refused():
    with pytest.raises(ValueError, match='layers: no layer selected: BatchNorm1d has none of Linear'):
        choose(nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match="'' is lazy and has no weight yet"): choose(nn.LazyLinear(3))
    with pytest.raises(ValueError, match='is not a parameter of its own but computed'):
        choose(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match='torch.int64, expected floating-point'):
        integers = nn.Linear(2, 2)
        integers.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int64), requires_grad=False)
        choose(integers)


def test_layers_with_several_weights():
    net = nn.ModuleDict({'lstm': nn.LSTM(2, 3, bidirectional=True),
                         'attn': nn.MultiheadAttention(4, 2), 'apart': nn.MultiheadAttention(4, 2, kdim=3)})
    lstm = ['lstm.weight_ih_l0', 'lstm.weight_hh_l0', 'lstm.weight_ih_l0_reverse', 'lstm.weight_hh_l0_reverse']
    attn = ['attn.in_proj_weight', 'attn.out_proj']
    apart = ['apart.q_proj_weight', 'apart.k_proj_weight', 'apart.v_proj_weight', 'apart.out_proj']
    assert list(choose(net).chosen) == [*lstm, *attn, *apart]
    assert list(choose(net, 'attn').chosen) == attn
    assert list(choose(net, ['lstm.*_hh_*', net['attn'].out_proj]).chosen) == [
        'lstm.weight_hh_l0', 'lstm.weight_hh_l0_reverse', 'attn.out_proj']
    assert list(choose(net, net['lstm'].weight_ih_l0).chosen) == ['lstm.weight_ih_l0']
    assert choose(net, ['lstm', 'apart.q_proj_weight']).by_name == {*lstm, 'apart.q_proj_weight'}
    with pytest.raises(ValueError, match='got a parameter that is not a part of the model'):
        choose(net, torch.ones(2))
    with pytest.raises(ValueError, match="weight of 'lstm.weight_hh_l0' is not a parameter of its own"):
        choose(nn.ModuleDict({'lstm': nn.utils.parametrizations.weight_norm(nn.LSTM(2, 3), 'weight_hh_l0')}))


def test_parameters_that_no_layer_type_knows():
    net = nn.Sequential(nn.Linear(2, 2), Own())
    assert list(choose(net, ['1.weight', net[1].scale]).chosen) == ['1.weight', '1.scale']
    add_layer_type(Own, weight='O I')
    try: assert list(choose(net).chosen) == ['0', '1']
    finally: del AXES[Own]


@pytest.mark.parametrize('kind, weights, error, says', [
    (nn.Linear(1, 1), {'weight': 'O I'}, TypeError, 'kind: got Linear'),
    (Own, {}, ValueError, 'weights: got none for Own'),
    (Own, {'weight': 'O O'}, ValueError, "weight: got 'O O', expected different names of axes"),
    (Own, {'weight': 'O, I'}, ValueError, "weight: got 'O, I'"),
    (Own, {'weight': 3}, ValueError, 'weight: got 3')])
def test_bad_layer_types_are_refused(kind, weights, error, says):
    with pytest.raises(error, match=says): add_layer_type(kind, **weights)
    assert Own not in AXES
