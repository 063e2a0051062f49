import subprocess
import sys
import warnings
from copy import deepcopy

import pytest
import torch
from conftest import same, tensors_of, zeros
from torch import nn

from fasterai.granularity import AXES, add_layer_type
from fasterai.sparsifier import Sparsifier


def test_the_core_loads_no_fastai():
    code = "import sys, fasterai.sparsifier; print([m for m in sys.modules if m.split('.')[0] in ('fastai', 'matplotlib', 'pandas')])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'


def test_an_error_inside_a_property_is_its_own(net):
    def example(): return net.not_there
    with pytest.raises(AttributeError, match="'Sequential' object has no attribute 'not_there'"): Sparsifier(net, 'filter', example=example).layers


def test_one_layer_of_those_that_an_example_finds_later():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x): return self.out(self.a(x) + self.b(x))
    model = Branch()
    sparsifier = Sparsifier(model, 'filter', example=lambda: torch.ones(1, 4), coupled=True)
    with pytest.raises(ValueError, match="got one for 'a' alone"): sparsifier.sparsify_layer(model.a, 50)
    assert not (model.a.weight == 0).any()


def test_without_training(net):
    sparsifier = Sparsifier(net)
    sparsifier.sparsify_model(50)
    assert sparsifier.report().zeros == round(.5 * (54 + 432 + 80)) and sparsifier.sparsity == sparsifier.report().sparsity


def test_one_layer_alone(net):
    sparsifier = Sparsifier(net)
    sparsifier.sparsify_layer('3', 50)
    assert zeros(net) == {'0.weight': 0, '3.weight': 216, '8.weight': 0}
    sparsifier.sparsify_layer(net[8], 10)
    assert zeros(net) == {'0.weight': 0, '3.weight': 216, '8.weight': 8}
    with pytest.raises(ValueError, match="layer: got '33', expected one of 0, 3, 8"): sparsifier.sparsify_layer('33', 50)
    with pytest.raises(ValueError, match="layer: got '8', which means only '8', and that makes the network's output"): Sparsifier(net, 'filter').sparsify_layer('8', 50)


@pytest.mark.parametrize('granularity', ['weight', 'filter'])
def test_what_is_not_selected_is_not_touched(net, granularity):
    nn.init.ones_(net[4].bias)
    before = {n: p.clone() for n, p in net.state_dict().items()}
    Sparsifier(net, granularity, layers='3').sparsify_model(50)
    touched = {n for n, p in net.state_dict().items() if not torch.equal(p, before[n])}
    assert touched == ({'3.weight'} if granularity == 'weight' else {'3.weight', '3.bias', '4.bias'})  # 4 is the norm; its running mean was zero


def test_zeros_that_come_in_are_kept_where_one_asks_and_count(net):
    net[3].weight.data[:4] = 0
    sparsifier = Sparsifier(net, keep_zeros=True)
    sparsifier.sparsify_model(0)
    net[3].weight.data += 1
    sparsifier.apply_masks()
    assert zeros(net)['3.weight'] == 216 and (net[3].weight[:4] == 0).all()
    sparsifier.sparsify_model(50)
    assert sparsifier.report().zeros == 283 and (net[3].weight[:4] == 0).all()


def test_a_criterion_that_likes_zeros_does_not_bring_them_back(net):
    sparsifier = Sparsifier(net, criteria=lambda weight: -weight.abs())
    for sparsity in (30, 60):
        sparsifier.sparsify_model(sparsity)
        assert sparsifier.report().zeros == round(5.66 * sparsity)


def test_the_sparsity_falls_only_where_regrowth_is_asked_for(net):
    sparsifier = Sparsifier(net)
    sparsifier.sparsify_model(80)
    before = tensors_of(sparsifier)
    sparsifier.sparsify_model(20)
    assert same(before, tensors_of(sparsifier))
    sparsifier.sparsify_model(20, regrow=True)
    assert sum(int((~sparsifier.masks[n]).sum()) for n in sparsifier.layers) == round(.2 * 566)


def test_gradients_must_be_there(net):
    sparsifier = Sparsifier(net, criteria='gradient')
    before = tensors_of(sparsifier)
    with pytest.raises(ValueError, match='saliency is needed and no layer has any: call after loss.backward'): sparsifier.sparsify_model(50)
    for p in net.parameters(): p.grad = torch.zeros_like(p)
    with pytest.raises(ValueError, match='call after loss.backward'): sparsifier.sparsify_model(50)
    assert same(before, tensors_of(sparsifier))


def test_a_copy_goes_its_own_way(net):
    nn.init.ones_(net[1].bias)
    sparsifier = Sparsifier(net, 'filter', 'local')
    twin = deepcopy(sparsifier)
    twin.sparsify_model(50)
    assert sparsifier.report().zeros == 0 and twin.report().zeros > 0 and twin.model is not net
    assert (twin.model[1].bias == 0).any() and (net[1].bias != 0).all()


def test_a_model_is_a_module():
    with pytest.raises(TypeError, match='model: got dict, expected a torch.nn.Module'): Sparsifier({})


def test_a_pattern_that_means_only_the_output_layer_is_refused(net):
    with pytest.raises(ValueError, match=r"sparsity: got '8\*', which means only '8', and that makes the network's output"):
        Sparsifier(net, 'filter').sparsify_model({'0': 50, '8*': 30})


def test_a_layer_that_is_nearly_empty_is_named_once(net):
    with torch.no_grad(): net[3].weight /= 1e4
    sparsifier = Sparsifier(net, layers=['0', '3', '8'])
    with pytest.warns(UserWarning, match="'3' has less than 1 % of the weights left, .* min_keep= sets a floor"): sparsifier.sparsify_model(80)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        warnings.filterwarnings('ignore', '.*would have been left')
        sparsifier.sparsify_model(85)
        Sparsifier(net, context='local', layers=['3']).sparsify_model(99.5)  # as it was asked



def test_a_type_of_ones_own_by_one_row():
    "As Hugging Face's Conv1D, a Linear with its weight the other way round."
    class Conv1D(nn.Module):
        def __init__(self, out, into):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(into, out)), nn.Parameter(torch.ones(out))
        def forward(self, x): return torch.addmm(self.bias, x, self.weight)
    add_layer_type(Conv1D, weight='I O')
    try:
        net, x = nn.Sequential(Conv1D(6, 4), nn.ReLU(), Conv1D(3, 6)), torch.randn(5, 4)
        sparsifier = Sparsifier(net, 'filter', example=x)
        assert list(sparsifier.layers) == ['0'] and "makes the network's output" in sparsifier.skipped['2']
        sparsifier.sparsify_model(50)
        assert ((net[0](x) == 0).all(0)).sum() == 3
    finally: del AXES[Conv1D]


def test_a_number_takes_part():
    class Scaled(nn.Linear):
        def __init__(self):
            super().__init__(8, 8)
            self.scale = nn.Parameter(torch.tensor(2.))
    model = nn.Sequential(Scaled())
    Sparsifier(model, layers=['0', '0.scale'], context='local').sparsify_model(100)
    assert model[0].scale == 0 and not model[0].weight.any()


def test_one_layer_with_several_weights_by_name_or_module():
    for choose in (lambda m: 'attn', lambda m: m['attn']):
        model = nn.ModuleDict({'attn': nn.MultiheadAttention(8, 2), 'fc': nn.Linear(8, 8)})
        sparsifier = Sparsifier(model)
        sparsifier.sparsify_layer(choose(model), 50)
        assert [r.sparsity for r in sparsifier.report().rows] == [50, 50, 0]
    sparsifier.sparsify_layer(model['fc'].weight, 25)
    assert sparsifier.report().rows[2].sparsity == 25


def test_old_weight_norm_of_a_recurrent_layer_is_left_out():
    with pytest.warns(FutureWarning): lstm = nn.utils.weight_norm(nn.LSTM(3, 4), 'weight_hh_l0')
    assert list(Sparsifier(lstm).layers) == ['weight_ih_l0']
    with pytest.raises(ValueError, match="weight of 'weight_hh_l0' is not a parameter of its own"): Sparsifier(lstm, layers='weight_hh_l0')


@pytest.mark.parametrize('state', [None, 7, 'x', [], torch.ones(2), torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=.1)])
def test_states_of_no_optimizer_are_refused(net, state):
    sparsifier = Sparsifier(net)
    sparsifier.sparsify_model(50)
    with pytest.raises(TypeError, match='state: got .*expected the state of an optimizer, as optimizer.state'): sparsifier.mask_optimizer_state(state)


@pytest.mark.parametrize('layer', [['0'], {'0': 50}, None, 7])
def test_no_layer_is_refused(net, layer):
    with pytest.raises(TypeError, match='layer: got .*expected'): Sparsifier(net).sparsify_layer(layer, 50)


@pytest.mark.parametrize('example', [lambda x: x, lambda a, b: a])
def test_an_example_is_made_without_arguments(net, example):
    with pytest.raises(TypeError, match='example: got <lambda>, expected a batch, or a function without arguments'): Sparsifier(net, 'filter', example=example)


def test_a_floor_above_the_sparsity_is_said(net):
    sparsifier = Sparsifier(net, min_keep=.9)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        sparsifier.sparsify_model(50, share=.5)  # more is to come
        sparsifier.sparsify_model(9)
    with pytest.warns(UserWarning, match='sparsity: asked for 50 %, but min_keep=0.9 lets at most 9.89 % be zero'): sparsifier.sparsify_model(50)
    with pytest.warns(UserWarning, match='sparsity: asked for 60 %, but min_keep=0.9 lets at most 9.95 % be zero'): sparsifier.sparsify_layer('3', 60)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        sparsifier.sparsify_model(100)  # all but the floor
