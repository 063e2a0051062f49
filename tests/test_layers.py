import pytest
import torch
from torch import nn

from fasterai.layers import choose


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.body = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU()))
        self.head = nn.Linear(2, 3)
        self.tied = nn.Linear(2, 3)
        self.tied.weight = self.head.weight


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
    ('tied', ['tied'])])
def test_by_type_name_and_glob(layers, names): assert chosen(layers) == names


def test_by_module():
    net = Net()
    assert list(choose(net, net.head).chosen) == ['head']
    assert list(choose(net, net.body).chosen) == ['body.0', 'body.2.0']
    assert list(choose(net, [net.body[2], net.head]).chosen) == ['body.2.0', 'head']
    assert list(choose(nn.Linear(2, 2)).chosen) == ['']


def test_what_was_left_out_has_a_reason():
    assert choose(Net(), ['body.0', 'head', 'tied']).skipped == {
        'embed': 'Embedding is not one of Linear, Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d',
        'body.2.0': 'not chosen', 'tied': "shares the weight of 'head'"}


def test_outright_is_by_name_or_module_of_the_layer_itself():
    net = Net()
    for layers in ('head', net.head, ['body', 'head']): assert choose(net, layers).outright == {'head'}
    for layers in (None, nn.Linear, 'he*', net): assert choose(net, layers).outright == set()


@pytest.mark.parametrize('layers, error, says', [
    ('haed', ValueError, "layers: got 'haed', which means no layer of type .*; did you mean 'head'"),
    ('Conv2d', ValueError, "the layers here are 'body.0', 'body.2.0', 'head', 'tied'; for a type write nn.Conv2d"),
    ('body.1', ValueError, "layers: got 'body.1', which means no layer"),
    ('embed', ValueError, "layers: got 'embed', which means no layer"),
    (nn.LSTM, ValueError, 'means no layer'),
    ([], ValueError, 'layers: got an empty list, so no layer is selected'),
    (nn.Linear(1, 1), ValueError, 'layers: got a Linear that is not a part of the model'),
    (3, TypeError, 'layers: got 3, allowed is a type, a name or glob'),
    ([None], TypeError, 'layers: got None')])
def test_bad_choices_are_refused(layers, error, says):
    with pytest.raises(error, match=says): chosen(layers)


def test_models_without_fitting_layers_are_refused():
    with pytest.raises(ValueError, match='layers: no layer selected: LSTM has none of Linear'): choose(nn.LSTM(2, 2))
    with pytest.raises(ValueError, match="'' is lazy and has no weight yet"): choose(nn.LazyLinear(3))
    with pytest.raises(ValueError, match='is not a parameter of its own but computed'): choose(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match='torch.int64, allowed are floating-point'):
        whole = nn.Linear(2, 2)
        whole.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int64), requires_grad=False)
        choose(whole)
