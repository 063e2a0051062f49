import subprocess
import sys
from copy import deepcopy
from fractions import Fraction
from types import SimpleNamespace
import warnings

import numpy as np
import pytest
import torch
from conftest import convnet
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fasterai import scoring, selection
from fasterai.allocation import fractions
from fasterai.context import CONTEXTS, ContextInfo, global_
from fasterai.criteria import elementwise
from fasterai.granularity import AXES, Grouping, add_layer_type, block
from fasterai.peers import ALONE
from fasterai.sparsifier import Sparsifier


def zeros(model): return {n: int((p == 0).sum()) for n, p in model.named_parameters() if n.endswith('weight') and p.ndim > 1}


def snapshot(sparsifier):
    return [p.detach().clone() for p in sparsifier.model.parameters()] + [sparsifier.masks[n].clone() for n in sparsifier.layers]


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_core_loads_no_fastai():
    code = "import sys, fasterai.sparsifier; print([m for m in sys.modules if m.split('.')[0] in ('fastai', 'fastcore', 'matplotlib', 'pandas')])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'


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
    before = {n: p.clone() for n, p in net.state_dict().items()}
    Sparsifier(net, granularity, layers='3').sparsify_model(50)
    touched = {n for n, p in net.state_dict().items() if not torch.equal(p, before[n])}
    assert touched == ({'3.weight'} if granularity == 'weight' else {'3.weight', '3.bias', '4.weight'})  # 4 is the norm; its shift was zero


def test_a_dict_goes_layer_by_layer(net):
    Sparsifier(net).sparsify_model({'*': 10, '3': 50, nn.Linear: 90})
    assert zeros(net) == {'0.weight': 5, '3.weight': 216, '8.weight': 8}  # a name goes first, then what stands first
    net = convnet()
    Sparsifier(net).sparsify_model({'3': 50})
    assert zeros(net) == {'0.weight': 0, '3.weight': 216, '8.weight': 0}


def test_zeros_that_come_in_are_kept_and_count(net):
    net[3].weight.data[:4] = 0
    sparsifier = Sparsifier(net)
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


def test_zeros_inside_living_groups_count(net):
    net[3].weight.data[:, 0] = 0  # 72 of 432 weights, in each filter 9 of 54
    sparsifier = Sparsifier(net, 'filter', layers='3')
    sparsifier.sparsify_model(50)  # 216 weights: three filters add 45 each, 207; four would be 252
    (row,) = sparsifier.report().rows
    assert (row.zeros, row.dead) == (207, 3)
    net[3].weight.data += 1
    sparsifier.apply_masks()
    assert sparsifier.report().rows == (row,)  # and those inside living groups stay


def test_a_tensor_that_is_all_zero_is_an_initialisation(net):
    nn.init.zeros_(net[8].weight)
    assert Sparsifier(net).masks['8'].all()


def test_the_sparsity_falls_only_where_regrowth_is_asked_for(net):
    sparsifier = Sparsifier(net)
    sparsifier.sparsify_model(80)
    before = snapshot(sparsifier)
    sparsifier.sparsify_model(20)
    assert same(before, snapshot(sparsifier))
    sparsifier.sparsify_model(20, regrow=True)
    assert sum(int((~sparsifier.masks[n]).sum()) for n in sparsifier.layers) == round(.2 * 566)


def test_all_or_nothing(net):
    sparsifier = Sparsifier(net)
    sparsifier.sparsify_model(30)
    net[8].weight.data[0, 0] = float('nan')
    before = [t.nan_to_num() for t in snapshot(sparsifier)]
    with pytest.raises(ValueError, match="the weight of layer '8' has NaN or infinite entries; nothing was changed"): sparsifier.sparsify_model(60)
    assert same(before, [t.nan_to_num() for t in snapshot(sparsifier)])


def test_gradients_must_be_there(net):
    sparsifier = Sparsifier(net, criteria='gradient')
    before = snapshot(sparsifier)
    with pytest.raises(ValueError, match='gradients are needed and all are zero or missing: call after loss.backward'): sparsifier.sparsify_model(50)
    for p in net.parameters(): p.grad = torch.zeros_like(p)
    with pytest.raises(ValueError, match='call after loss.backward'): sparsifier.sparsify_model(50)
    for p in net.parameters(): p.grad = torch.ones_like(p)
    net[3].weight.grad = None
    with pytest.raises(ValueError, match="layer '3' has no gradient: call after"): sparsifier.sparsify_model(50)
    assert same(before, snapshot(sparsifier))


def test_masks_win_over_nan(net):
    sparsifier = Sparsifier(net)
    sparsifier.sparsify_model(50)
    for p in net.parameters(): p.data.fill_(float('nan'))
    sparsifier.apply_masks()
    assert sparsifier.report().zeros == 283


def test_a_tied_weight_is_one_weight():
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 2))
    net[2].weight = net[0].weight
    sparsifier = Sparsifier(net)
    sparsifier.sparsify_model(50)
    report = sparsifier.report()
    assert (report.weights, report.zeros) == (48, 24) and report.skipped == {'2': "shares the weight of '0'"}
    assert report.parameters == 36 + 6 + 6 + 12 + 2


def test_a_random_criterion_is_exact(net):
    sparsifier = Sparsifier(net, criteria=lambda weight: torch.rand_like(weight))
    sparsifier.sparsify_model(50)
    assert sparsifier.report().zeros == 283
    layers = [sparsifier.masks[n].flatten()[:54] for n in sparsifier.layers]
    assert not torch.equal(layers[0], layers[1])


@pytest.mark.parametrize('example', [None, torch.randn(2, 1, 8, 8), (torch.randn(2, 1, 8, 8),)], ids=['traced', 'tensor', 'tuple'])
def test_a_dead_filter_puts_out_zero_behind_its_norm(net, example):
    with torch.no_grad():  # a network that has seen something
        for norm in (net[1], net[4]):
            for t in (norm.weight, norm.bias, norm.running_mean): t.uniform_(.5, 1)
    sparsifier = Sparsifier(net, 'filter', 'local', example=example)
    sparsifier.sparsify_model(50)
    assert list(sparsifier.layers) == ['0', '3'] and "makes the network's output" in sparsifier.skipped['8']
    opt = torch.optim.SGD(net.parameters(), lr=.1, momentum=.9, weight_decay=.1)
    for training in (False, True, True, True, False):
        net.train(training)
        net(torch.randn(8, 1, 8, 8)).square().sum().backward()
        if training:
            opt.step()
            opt.zero_grad()
            sparsifier.apply_masks()
        x = torch.randn(8, 1, 8, 8)
        for conv, norm in ((0, 1), (3, 4)):
            dead = ~sparsifier.masks[str(conv)].flatten(1).any(1)
            x = net[norm](net[conv](x))
            assert int(dead.sum()) == len(dead) // 2
            assert (x[:, dead] == 0).all() and (x[:, ~dead] != 0).any()
            x = net[norm + 1](x)


def test_other_granularities_leave_bias_and_norm_alone(net):
    before = {n: p.clone() for n, p in net.named_parameters() if p.ndim == 1}
    Sparsifier(net, 'kernel').sparsify_model(90)
    assert all(torch.equal(p, dict(net.named_parameters())[n]) for n, p in before.items())


def test_a_filter_that_comes_back_can_learn(net):
    sparsifier = Sparsifier(net, 'filter', 'local')
    sparsifier.sparsify_model(50)
    sparsifier.sparsify_model(0, regrow=True)
    assert (net[1].weight == 1).all() and (net[4].weight == 1).all() and ((net[4].bias == 0) | (net[4].bias == .01)).all()
    net(torch.randn(8, 1, 8, 8)).square().sum().backward()
    assert (net[3].weight.grad.flatten(1).abs().sum(1) > 0).all()


def test_the_output_layer_is_taken_where_it_is_named(net):
    assert '8' in Sparsifier(net, 'filter', layers=['0', '8']).layers
    assert '8' not in Sparsifier(net, 'filter', layers=['0', nn.Linear]).layers
    assert '8' in Sparsifier(net, 'kernel').layers
    with pytest.raises(ValueError, match="layers: no layer selected: '' makes the network's output, .*: name it in layers="):
        Sparsifier(nn.Linear(3, 3), 'filter')


class Branch(nn.Module):
    "fx cannot trace it."
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3), nn.Linear(4, 2)

    def forward(self, x): return self.b(self.a(x).mean((2, 3)) if x.sum() > 0 else x)


def test_unknown_flow_is_said():
    with pytest.warns(UserWarning, match='example: how Branch runs cannot be told from its code .* pass Sparsifier'):
        assert list(Sparsifier(Branch(), 'filter').layers) == ['a', 'b']
    assert list(Sparsifier(Branch(), 'filter', example=torch.ones(1, 1, 4, 4)).layers) == ['a']
    with pytest.raises(ValueError, match=r'example: got \[\(1, 9, 4, 4\)\], on which the model fails: RuntimeError'):
        Sparsifier(Branch(), 'filter', example=torch.ones(1, 9, 4, 4))


def test_an_example_can_come_later():
    asked = []
    sparsifier = Sparsifier(Branch(), 'filter', example=lambda: asked.append(1) or torch.ones(1, 1, 4, 4))
    assert asked == []
    sparsifier.sparsify_model(50)
    sparsifier.sparsify_model(75)
    assert asked == [1] and list(sparsifier.layers) == ['a']


def test_state_dict_round_trip(net, tmp_path):
    sparsifier = Sparsifier(net)
    sparsifier.sparsify_model(70)
    torch.save(sparsifier.state_dict(), tmp_path / 'masks.pt')
    state = torch.load(tmp_path / 'masks.pt', weights_only=True)
    assert state['0']['bits'].dtype == torch.uint8 and len(state['0']['bits']) == 7  # 54 weights
    other = Sparsifier(convnet())
    other.load_state_dict(state)
    assert all(torch.equal(sparsifier.masks[n], other.masks[n]) for n in sparsifier.layers) and other.report().zeros == 396


@pytest.mark.parametrize('spoil, says', [
    (lambda s: s.pop('3'), 'got masks for 0, 8, expected those for 0, 3, 8'),
    (lambda s: s.update(x=s['3']), 'got masks for 0, 3, 8, x'),
    (lambda s: s['3'].update(shape=(8, 6, 9)), r"got a mask of shape \(8, 6, 9\) for '3', expected \(8, 6, 3, 3\)"),
    (lambda s: s['3'].update(bits=s['3']['bits'][:-1]), "for '3'")])
def test_masks_that_do_not_fit_are_refused(net, spoil, says):
    sparsifier = Sparsifier(net)
    state = sparsifier.state_dict()
    spoil(state)
    before = snapshot(sparsifier)
    with pytest.raises(ValueError, match=says): sparsifier.load_state_dict(state)
    assert same(before, snapshot(sparsifier))


def test_a_copy_goes_its_own_way(net):
    sparsifier = Sparsifier(net, 'filter', 'local')
    twin = deepcopy(sparsifier)
    twin.sparsify_model(50)
    assert sparsifier.report().zeros == 0 and twin.report().zeros > 0 and twin.model is not net
    assert (twin.model[1].weight == 0).any() and (net[1].weight != 0).all()


@pytest.mark.parametrize('arguments, error, says', [
    (dict(granularity='filtr'), ValueError, "granularity: got 'filtr'.*did you mean 'filter'"),
    (dict(context='globl'), ValueError, "context: got 'globl', expected one of local, global.*did you mean 'global'"),
    (dict(criteria='magnitud'), ValueError, "criteria: got 'magnitud', expected one of magnitude, gradient.*did you mean 'magnitude'"),
    (dict(criteria=lambda hessian: hessian), ValueError, "asks for 'hessian'"),
    (dict(layers='conv9'), ValueError, "layers: got 'conv9'"),
    (dict(granularity=('I', 'kh')), ValueError, "granularity: got axis 'kh', allowed for Linear '8'")])
def test_bad_arguments_are_refused_when_built(net, arguments, error, says):
    with pytest.raises(error, match=says): Sparsifier(net, **arguments)


@pytest.mark.parametrize('sparsity, error, says', [
    (-1, ValueError, 'expected a number from 0 to 100'), (101, ValueError, 'expected a number from 0 to 100'), (.9, ValueError, 'write 90 for 90 %'),
    (True, TypeError, 'got True'), ('90', TypeError, "got '90'"), (float('nan'), ValueError, 'got nan'), (None, TypeError, 'got None'),
    ({}, ValueError, 'got an empty dict'), ({'3': .5}, ValueError, r"sparsity\['3'\]: got 0.5"),
    ({'conv9': 50}, ValueError, "sparsity: got 'conv9', which means none of the layers")])
def test_bad_sparsities_are_refused(net, sparsity, error, says):
    sparsifier = Sparsifier(net)
    before = snapshot(sparsifier)
    with pytest.raises(error, match=says): sparsifier.sparsify_model(sparsity)
    with pytest.raises(ValueError, match='share: got 1.5, expected a number from 0 to 1'): sparsifier.sparsify_model(50, share=1.5)
    assert same(before, snapshot(sparsifier))


def test_a_model_is_a_module():
    with pytest.raises(TypeError, match='model: got dict, expected a torch.nn.Module'): Sparsifier({})


def test_the_biases_of_a_tied_weight_die_together():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.n, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)
            self.b.weight = self.a.weight

        def forward(self, x): return self.out(self.a(x) + self.n(self.b(x)))
    model = Tied()
    Sparsifier(model, 'filter', 'local', example=torch.randn(5, 4)).sparsify_model(50)
    x = model.b(torch.randn(9, 4))
    assert torch.equal((x == 0).all(0), model.n.weight == 0) and (model.n.weight == 0).sum() == 2


def test_a_layer_that_did_not_run_is_left_alone():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.aux, self.out = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x): return (self.out(self.a(x)), self.aux(self.a(x))) if self.training else self.out(self.a(x))
    sparsifier = Sparsifier(Auxiliary(), 'filter', example=torch.randn(2, 4))
    assert list(sparsifier.layers) == ['a'] and sparsifier.skipped['aux'].startswith('did not run')


def test_a_pattern_that_means_only_the_output_layer_is_refused(net):
    with pytest.raises(ValueError, match=r"sparsity: got '8\*', which means only '8', and that makes the network's output"):
        Sparsifier(net, 'filter').sparsify_model({'0': 50, '8*': 30})


@pytest.mark.parametrize('context, says', [
    (lambda parts, fraction: [p.alive for p in parts][:-1], 'expected a bool keep mask for each layer'),
    (lambda parts, fraction: [p.alive.float() for p in parts], 'expected a bool keep mask')])
def test_a_context_of_ones_own_is_checked(net, context, says):
    with pytest.raises(ValueError, match=says): Sparsifier(net, context=context).sparsify_model(50)


def test_a_context_of_ones_own_does_not_free_what_is_gone(net):
    net[3].weight.data[0] = 0
    sparsifier = Sparsifier(net, context=lambda parts, fraction: [torch.ones_like(p.alive) for p in parts])
    sparsifier.sparsify_model(50)
    assert not sparsifier.masks['3'][0].any() and sparsifier.masks['3'][1:].all()


def test_a_criterion_that_works_in_place_does_not_reach_the_model(net):
    before = [p.clone() for p in net.parameters()]
    Sparsifier(net, criteria=lambda weight: weight.abs_()).sparsify_model(50)
    assert all(torch.equal(p[p != 0], q[p != 0]) for p, q in zip(net.parameters(), before))


def test_layers_without_weights_are_left_out():
    assert Sparsifier(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 0))).skipped == {'1': 'has no weights'}


@pytest.mark.parametrize('state, error', [(None, TypeError), ({'0': {}, '3': {}, '8': {}}, ValueError)])
def test_states_of_other_kinds_are_refused(net, state, error):
    with pytest.raises(error, match='state: got'): Sparsifier(net).load_state_dict(state)


def test_min_keep_is_a_floor_for_each_layer(net):
    Sparsifier(net, layers=['0', '3', '8'], min_keep=.3).sparsify_model(60)
    for i in (0, 3, 8): assert int((net[i].weight != 0).sum()) >= .3 * net[i].weight.numel()
    assert sum(int((net[i].weight == 0).sum()) for i in (0, 3, 8)) == round(.6 * sum(net[i].weight.numel() for i in (0, 3, 8)))
    Sparsifier(net, layers='8', min_keep=5).sparsify_model(100)
    assert int((net[8].weight != 0).sum()) == 5
    Sparsifier(net, layers='8', min_keep=0).sparsify_model(99)
    assert int((net[8].weight != 0).sum()) == 1


def test_a_layer_that_is_nearly_empty_is_named_once(net):
    with torch.no_grad(): net[3].weight /= 1e4
    sparsifier = Sparsifier(net, layers=['0', '3', '8'])
    with pytest.warns(UserWarning, match="'3' has less than 1 % of the weights left, .* min_keep= sets a floor"): sparsifier.sparsify_model(80)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        warnings.filterwarnings('ignore', '.*would have been left')
        sparsifier.sparsify_model(85)
        Sparsifier(net, context='local', layers=['3']).sparsify_model(99.5)  # as it was asked


@pytest.mark.parametrize('context', ['erk', 'lamp', 'normalized', 'uniform_plus'])
def test_allocations_reach_the_sparsity_of_all(context):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Linear(16, 30), nn.Linear(30, 10))
    sparsifier = Sparsifier(net, context=context, layers=['0', '1', '2', '3'])
    for sparsity in (30, 70):
        sparsifier.sparsify_model(sparsity)
        assert sparsifier.report().zeros == round(sparsity / 100 * sparsifier.report().weights)
    if context == 'uniform_plus': assert [r.zeros for r in sparsifier.report().rows][0] == 0
    sparsifier.sparsify_model(70, share=.2, regrow=True)
    masks = [sparsifier.masks[n] for n in sparsifier.layers]
    assert sum(int((~m).sum()) for m in masks) == round(.14 * sum(m.numel() for m in masks))


PATTERNED = {'Linear': lambda: nn.Linear(10, 6), 'Conv2d': lambda: nn.Conv2d(8, 6, 3), 'Conv2d grouped': lambda: nn.Conv2d(8, 6, 3, groups=2),
             'ConvTranspose2d': lambda: nn.ConvTranspose2d(8, 6, 3), 'LSTM': lambda: nn.LSTM(8, 6)}


@pytest.mark.parametrize('kind', PATTERNED)
@pytest.mark.parametrize('memory', [torch.contiguous_format, torch.channels_last], ids=['contiguous', 'channels_last'])
def test_patterns_hold_in_every_line(kind, memory):
    net = nn.Sequential(PATTERNED[kind]())
    if 'Conv' in kind: net = net.to(memory_format=memory)
    sparsifier = Sparsifier(net, context='2:4', layers='0')
    for share in (.3, .6, 1): sparsifier.sparsify_model(50, share)
    for layer in sparsifier.layers.values():
        lines = (layer.weight != 0).movedim(1 if 'Transpose' not in kind else 0, -1)
        for start in range(0, lines.shape[-1], 4):
            group = lines[..., start:start + 4]
            assert (group.sum(-1) == -(-group.shape[-1] // 2)).all()


@pytest.mark.parametrize('arguments, sparsity, says', [
    (dict(context='2:4'), 75, "sparsity: got 75, expected 50, which context='2:4' implies"),
    (dict(context='1:4'), {'0': 75, '8': 50}, r"sparsity\['8'\]: got 50, expected 75, which context='1:4' implies"),
    (dict(context='2:4', granularity='kernel'), 50, "granularity: got 'kernel', expected 'weight' with context='2:4'"),
    (dict(context='2:4', layers='1.bias'), 50, "got '2:4', but '1.bias' has no input axis I"),
    (dict(context='2:4', min_keep=3), 50, "min_keep: got 3, expected None with context='2:4'"),
    (dict(min_keep=1.5), 50, 'min_keep: got 1.5, expected a whole number of weights, or a share between 0 and 1'),
    (dict(min_keep=True), 50, 'min_keep: got True'), (dict(min_keep=-1), 50, 'min_keep: got -1')])
def test_what_does_not_go_together_is_refused(net, arguments, sparsity, says):
    with pytest.raises(ValueError, match=says): Sparsifier(net, **arguments).sparsify_model(sparsity)
    assert not any((p == 0).all() for n, p in net.named_parameters() if n.endswith('weight'))


def test_the_biases_of_dead_rows_go_too():
    net = nn.ModuleDict({'lstm': nn.LSTM(4, 3), 'attn': nn.MultiheadAttention(6, 2)})
    with torch.no_grad(): net['attn'].in_proj_bias.fill_(1)
    sparsifier = Sparsifier(net, 'filter', 'local', layers=['lstm', 'attn'], example=None)
    sparsifier.sparsify_model(50)
    assert torch.equal(net['lstm'].bias_ih_l0 == 0, (net['lstm'].weight_ih_l0 == 0).all(1)) and int((net['lstm'].bias_ih_l0 == 0).sum()) == 6
    assert torch.equal(net['attn'].in_proj_bias == 0, (net['attn'].in_proj_weight == 0).all(1)) and int((net['attn'].in_proj_bias == 0).sum()) == 9


def test_a_dead_layer_is_dead_altogether():
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))
    with torch.no_grad(): net[0].weight /= 100
    sparsifier = Sparsifier(net, 'layer', example=torch.randn(2, 4))
    assert list(sparsifier.layers) == ['0', '3']
    with pytest.warns(UserWarning, match="'0' has less than 1 %"): sparsifier.sparsify_model(20)
    assert not net[0].weight.any() and not net[0].bias.any() and not net[1].weight.any() and not net[1].bias.any() and net[3].weight.all()


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


def test_recurrent_weights_stay_sparse_and_flat():
    lstm = nn.LSTM(6, 8, num_layers=2, bidirectional=True)
    pointers = [p.data_ptr() for p in lstm.parameters()]
    sparsifier = Sparsifier(lstm)
    sparsifier.sparsify_model(80)
    optimizer = torch.optim.Adam(lstm.parameters())
    sparsifier.attach(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        lstm(torch.randn(5, 2, 6))[0].square().mean().backward()
        optimizer.step()
    lstm.flatten_parameters()
    report = sparsifier.report()
    assert report.zeros == round(.8 * report.weights) and len(report.rows) == 8
    assert [p.data_ptr() for p in lstm.parameters()] == pointers  # what cuDNN has flattened is where it was


def test_a_nearly_full_budget_after_much_is_gone():
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(256, 256))
        sparsifier = Sparsifier(model)
        for sparsity in (50, 99, 99.9):
            sparsifier.sparsify_model(sparsity)
            assert sparsifier.report().zeros == round(sparsity / 100 * 256 ** 2)


def test_a_pattern_takes_its_sparsity_rounded():
    model = nn.Sequential(nn.Linear(48, 4))
    for sparsity in (200 / 3, 66.67, 66.7): Sparsifier(model, context='1:3').sparsify_model(sparsity)
    assert int((model[0].weight != 0).sum()) == 64
    with pytest.raises(ValueError, match="got 66, expected 66.67, which context='1:3' implies"): Sparsifier(model, context='1:3').sparsify_model(66)


def test_a_number_takes_part():
    class Scaled(nn.Linear):
        def __init__(self):
            super().__init__(8, 8)
            self.scale = nn.Parameter(torch.tensor(2.))
    model = nn.Sequential(Scaled())
    Sparsifier(model, layers=['0', '0.scale'], context='local').sparsify_model(100)
    assert model[0].scale == 0 and not model[0].weight.any()


@pytest.mark.parametrize('kind', [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients(kind):
    model = nn.Sequential(kind(20, 6, sparse=True))
    def backward(): model(torch.tensor([[1, 2, 2], [3, 4, 5]])).square().sum().backward()
    backward()
    sparsifier = Sparsifier(model, criteria='gradient', layers=['0'])
    sparsifier.sparsify_model(50)
    optimizer = torch.optim.SparseAdam(model.parameters())
    sparsifier.attach(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        backward()
        optimizer.step()
    assert sparsifier.report().zeros == 60 and not model[0].weight.grad.to_dense()[model[0].weight == 0].any()


def test_what_means_a_layer_outright_goes_first(net):
    for sparsity in ({'*': 50, '8': 90}, {'*': 50, net[8]: 90}, {nn.Linear: 50, net[8].weight: 90}):
        sparsifier = Sparsifier(net, layers=[nn.Linear, nn.Conv2d])
        assert fractions(sparsity, sparsifier.rules, sparsifier.selected)['8'] == Fraction(9, 10)
    for choice, says in (('1.bias', "means only '1.bias', and that is not chosen"), ('6', 'means none of the layers')):
        with pytest.raises(ValueError, match=says): Sparsifier(net).sparsify_model({choice: 50})


def test_one_layer_with_several_weights_by_name_or_module():
    for choose in (lambda m: 'attn', lambda m: m['attn']):
        model = nn.ModuleDict({'attn': nn.MultiheadAttention(8, 2), 'fc': nn.Linear(8, 8)})
        sparsifier = Sparsifier(model)
        sparsifier.sparsify_layer(choose(model), 50)
        assert [r.sparsity for r in sparsifier.report().rows] == [50, 50, 0]
    sparsifier.sparsify_layer(model['fc'].weight, 25)
    assert sparsifier.report().rows[2].sparsity == 25


def test_min_keep_is_counted_as_it_was_written():
    model = nn.Sequential(nn.Linear(10, 10))
    Sparsifier(model, context='local', min_keep=.07).sparsify_model(95)
    assert int((model[0].weight != 0).sum()) == 7


def test_uniform_plus_says_at_once_what_cannot_be():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 400))
    sparsifier = Sparsifier(model, context='uniform_plus')
    with pytest.raises(ValueError, match='got 90 %, expected .* % at most with uniform_plus here'): sparsifier.sparsify_model(90, .1)
    assert sparsifier.sparsity == 0
    sparsifier.sparsify_layer('1', 50)
    assert sparsifier.report().rows[1].sparsity == 50


def test_layers_that_go_whole_leave_the_best():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    with torch.no_grad(): model[0].weight *= 9
    with pytest.warns(UserWarning, match="'1' has less than 1 %"): Sparsifier(model, 'layer', layers=['0', '1']).sparsify_model(90)
    assert model[0].weight.all() and not model[1].weight.any()
    with pytest.raises(ValueError, match="granularity: got 'layer', expected one with several groups a layer"): Sparsifier(model, 'layer', 'lamp')


def test_old_weight_norm_of_a_recurrent_layer_is_refused():
    with pytest.warns(FutureWarning): lstm = nn.utils.weight_norm(nn.LSTM(3, 4), 'weight_hh_l0')
    with pytest.raises(ValueError, match="weight of 'weight_hh_l0' is not a parameter of its own"): Sparsifier(nn.Sequential(lstm)[0])


def test_a_context_of_ones_own_gets_a_copy(net):
    def spoils(parts, fraction):
        parts[0].alive[:] = False
        raise RuntimeError('mine')
    sparsifier = Sparsifier(net, context=spoils)
    with pytest.raises(RuntimeError, match='mine'): sparsifier.sparsify_model(50)
    assert all(sparsifier.masks[n].all() for n in sparsifier.layers)


def test_a_layer_that_is_gone_beside_one_with_scattered_zeros():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad(): net[1].weight[0, 0] = 0
    sparsifier = Sparsifier(net, 'filter', layers=list(net))
    sparsifier.sparsify_layer('0', 100)
    sparsifier.sparsify_model(75)
    assert not net[0].weight.any() and int((net[1].weight == 0).all(1).sum()) == 4
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    sparsifier = Sparsifier(net, block(3, 3), layers=list(net))
    sparsifier.sparsify_layer('0', 100)
    sparsifier.load_state_dict(sparsifier.state_dict())
    sparsifier.sparsify_model(75)
    assert not net[0].weight.any() and sparsifier.masks.left('1') == int(sparsifier.masks['1'].sum()) < 40


def test_what_a_context_of_ones_own_changes_is_counted(monkeypatch):
    def mine(parts, fraction):
        keeps = [keep.clone() for keep in global_(parts, fraction)]
        keeps[0][:] = True
        return keeps
    monkeypatch.setitem(CONTEXTS, 'mine', ContextInfo(mine))
    sparsifier = Sparsifier(nn.Sequential(nn.Linear(8, 8)), context='mine')
    sparsifier.sparsify_model(90)
    assert sparsifier.masks.left('0') == 64


def test_an_elementwise_criterion_of_ones_own_gets_arrays():
    @elementwise
    def signed(weight): return np.where(weight > 0, weight, -2 * weight)
    for width in (4, 12, 40): Sparsifier(nn.Sequential(nn.Linear(width, 6)), 'filter', 'local', signed, layers='0').sparsify_model(50)


class Waits(TorchDispatchMode):
    "Counts what would have the host wait for a GPU: a number, an index of unknown length, a copy to the host."

    def __init__(self, monkeypatch):
        super().__init__()
        self.n, cpu = 0, torch.Tensor.cpu
        def copied(tensor):
            self.n += 1
            return cpu(tensor)
        monkeypatch.setattr(torch.Tensor, 'cpu', copied)

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        by_mask = 'index' in f.__name__ and any(i is not None and i.dtype == torch.bool for i in (args[1] if isinstance(args[1], (list, tuple)) else []))
        self.n += by_mask or any(n in f.__name__ for n in ('_local_scalar_dense', 'nonzero', 'masked_select', 'unique', 'equal.default'))
        return f(*args, **(kwargs or {}))


@pytest.fixture
def apart(monkeypatch):
    "The tensors of the CPU are treated as a GPU's are: not looked at, but where there is no other way."
    monkeypatch.setattr(ALONE, 'on_host', lambda tensor: False)
    monkeypatch.setattr(selection, 'SAMPLE', 3000)


@pytest.mark.parametrize('granularity', ['weight', 'vector', 'filter'])
@pytest.mark.parametrize('criteria', ['magnitude', 'gradient'])
def test_a_gpu_is_waited_for_as_often_for_many_layers_as_for_few(granularity, criteria, apart, monkeypatch):
    def waits(depth, sparsity):
        net = nn.Sequential(*[layer for _ in range(depth) for layer in (nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32), nn.ReLU())], nn.Conv2d(32, 4, 3))
        for p in net.parameters(): p.grad = torch.randn_like(p)
        sparsifier = Sparsifier(net, granularity, 'global', criteria)
        with Waits(monkeypatch) as seen: sparsifier.sparsify_model(sparsity)
        assert abs(sparsifier.sparsity - sparsity) < 1
        return seen.n
    assert waits(3, 60) == waits(12, 60) <= 5


@pytest.mark.parametrize('granularity', ['weight', 'kernel', 'filter', block(4, 4)])
@pytest.mark.parametrize('context', ['global', 'local', 'lamp'])
@pytest.mark.parametrize('regrow', [False, True])
def test_away_from_the_host_the_same_goes(granularity, context, regrow, monkeypatch):
    def masks():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 30, 3), nn.ReLU(), nn.Conv2d(30, 5, 1))
        with torch.no_grad(): net[2].weight[torch.rand_like(net[2].weight) < .02] = 0
        sparsifier = Sparsifier(net, granularity, context)
        for sparsity in (30, 70, 50): sparsifier.sparsify_model(sparsity, regrow=regrow)
        return [sparsifier.masks[n] for n in sparsifier.layers]
    here = masks()
    monkeypatch.setattr(ALONE, 'on_host', lambda tensor: False)
    monkeypatch.setattr(selection, 'SAMPLE', 50)
    assert all(torch.equal(a, b) for a, b in zip(here, masks(), strict=True))


def test_away_from_the_host_nan_is_seen_before_anything_changes(apart):
    net = nn.Sequential(nn.Linear(100, 90), nn.Linear(90, 80))
    with torch.no_grad(): net[1].weight[3, 4] = torch.nan
    sparsifier = Sparsifier(net)
    before = net[0].weight.clone()
    with pytest.raises(ValueError, match="weight of layer '1' has NaN"): sparsifier.sparsify_model(50)
    assert torch.equal(net[0].weight, before)
    sparsifier.sparsify_model(0)  # asks for no score


def test_short_groups_at_positions_on_another_device():
    "A GPU's positions must not meet a tensor of the CPU: the sizes go where the scores are, then they are picked."
    grouping = Grouping(nn.Linear(5, 7), block(2, 2))
    sizes, grouping.sizes = grouping.sizes, SimpleNamespace(to=lambda device: sizes.to(device))
    assert grouping.mean(torch.ones(3, 4), torch.tensor([0, 2, 11])).tolist() == [1, 2, 4]
