
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from conftest import same, tensors_of
from torch import nn

from fasterai.context import CONTEXTS, ContextInfo, global_
from fasterai.event import Budget, decide
from fasterai.granularity import block
from fasterai.scoring import Scores
from fasterai.sparsifier import Sparsifier


def test_zeros_inside_living_groups_count(net):
    net[3].weight.data[:, 0] = 0  # 72 of 432 weights, in each filter 9 of 54
    sparsifier = Sparsifier(net, 'filter', layers='3')
    sparsifier.sparsify_model(50)  # 216 weights: three filters add 45 each, 207; four would be 252
    (row,) = sparsifier.report().rows
    assert (row.zeros, row.dead) == (207, 3)
    net[3].weight.data += 1
    sparsifier.apply_masks()
    assert sparsifier.report().rows == (row,)  # and those inside living groups stay


def test_all_or_nothing(net):
    sparsifier = Sparsifier(net)
    sparsifier.sparsify_model(30)
    net[8].weight.data[0, 0] = float('nan')
    before = [t.nan_to_num() for t in tensors_of(sparsifier)]
    with pytest.raises(ValueError, match="the weight of layer '8' has NaN or infinite entries; nothing was changed"): sparsifier.sparsify_model(60)
    assert same(before, [t.nan_to_num() for t in tensors_of(sparsifier)])


def test_a_random_criterion_is_exact(net):
    sparsifier = Sparsifier(net, criteria=lambda weight: torch.rand_like(weight))
    sparsifier.sparsify_model(50)
    assert sparsifier.report().zeros == 283
    layers = [sparsifier.masks[n].flatten()[:54] for n in sparsifier.layers]
    assert not torch.equal(layers[0], layers[1])


@pytest.mark.parametrize('context, says', [
    (lambda parts, fraction: [p.alive for p in parts][:-1], 'expected a bool keep mask for each layer'),
    (lambda parts, fraction: [p.alive.float() for p in parts], 'expected a bool keep mask')])
def test_a_context_of_ones_own_is_checked(net, context, says):
    with pytest.raises(ValueError, match=says): Sparsifier(net, context=context).sparsify_model(50)


def test_a_context_may_give_an_iterator(net):
    sparsifier = Sparsifier(net, context=lambda layers, fraction: (layer.alive & False for layer in layers))
    sparsifier.sparsify_model(50)
    assert sparsifier.sparsity == 100


def test_a_context_of_ones_own_does_not_free_what_is_gone(net):
    net[3].weight.data[0] = 0
    context = lambda parts, fraction: [torch.ones_like(p.alive) for p in parts]  # noqa: E731
    sparsifier = Sparsifier(net, context=context, keep_zeros=True)
    sparsifier.sparsify_model(50)
    assert not sparsifier.masks['3'][0].any() and sparsifier.masks['3'][1:].all()


def test_a_nearly_full_budget_after_much_is_gone():
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(256, 256))
        sparsifier = Sparsifier(model)
        for sparsity in (50, 99, 99.9):
            sparsifier.sparsify_model(sparsity)
            assert sparsifier.report().zeros == round(sparsity / 100 * 256 ** 2)


def test_layers_that_go_whole_leave_the_best():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    with torch.no_grad(): model[0].weight *= 9
    with pytest.warns(UserWarning, match="'1' has less than 1 %"): Sparsifier(model, 'layer', layers=['0', '1']).sparsify_model(90)
    assert model[0].weight.all() and not model[1].weight.any()
    with pytest.raises(ValueError, match="granularity: got 'layer', expected one with several groups a layer"): Sparsifier(model, 'layer', 'lamp')


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


# The decision as a value

def decided(sparsifier, sparsity):
    tied = sparsifier.selected.tied(list(sparsifier.layers))
    budget = Budget(tied, Fraction(sparsity, 100), Fraction(1))
    return decide(sparsifier.rules, [budget], sparsifier.masks.of, sparsifier.evidence)


@pytest.mark.parametrize('share, initial, fraction', [(0, 0, '0'), (1, 0, '9/10'), ('1/2', 0, '9/20'), (0, '1/2', '1/2'), ('1/4', '1/2', '3/5'), (1, '1/2', '9/10')])
def test_a_budget_goes_from_its_initial_sparsity_to_its_target(share, initial, fraction):
    assert Budget([], Fraction(9, 10), Fraction(share), Fraction(initial)).fraction == Fraction(fraction)


@pytest.mark.parametrize('share, initial, asked', [(0, 0, []), (0, '1/2', ['0', '3', '8']), ('1/2', 0, ['0', '3', '8'])])
def test_only_layers_of_which_something_shall_be_zero_are_scored_at_once(net, monkeypatch, share, initial, asked):
    "On a GPU their scores are checked together, before any other is asked for."
    class Noted(Scores):
        def __init__(self, criterion, evidence, layers):
            super().__init__(criterion, evidence, layers)
            noted.extend(layer.name for layer in layers)
    noted, sparsifier = [], Sparsifier(net)
    monkeypatch.setattr('fasterai.event.Scores', Noted)
    budget = Budget(sparsifier.selected.tied(list(sparsifier.layers)), Fraction(9, 10), Fraction(share), Fraction(initial))
    decide(sparsifier.rules, [budget], sparsifier.masks.of, sparsifier.evidence)
    assert noted == asked


def row(*weights):
    "A network of one layer with these weights."
    net = nn.Sequential(nn.Linear(len(weights), 1, bias=False))
    with torch.no_grad(): net[0].weight[0] = torch.tensor(weights)
    return net


def test_a_decision_changes_nothing(net):
    sparsifier = Sparsifier(net)
    before = tensors_of(sparsifier)
    change = decided(sparsifier, 50)
    assert same(tensors_of(sparsifier), before)
    assert sum(int((~keep).sum()) for keep in change.masks.values()) == 283
    sparsifier.masks.apply(change)
    assert sparsifier.report().zeros == 283


def test_a_change_says_what_died_and_what_was_born():
    sparsifier = Sparsifier(row(4., 1, 3, 2), layers='0', regrow=lambda weight: torch.tensor([[0., 1, 2, 3]]))
    change = sparsifier.sparsify_model(50)
    assert change.masks['0'].int().tolist() == [[1, 0, 1, 0]]
    assert change.died['0'].int().tolist() == [[0, 1, 0, 1]]
    assert change.born['0'].int().tolist() == [[0, 0, 0, 0]]
    change = sparsifier.sparsify_model(25, regrow=True)
    assert change.born['0'].int().tolist() == [[0, 0, 0, 1]]
    assert change.died['0'].int().tolist() == [[0, 0, 0, 0]]
    assert repr(change) == 'Change(1 layers: 1 of 4 weights are masked)'
    assert sparsifier.sparsify_layer('0', 75).died['0'].int().tolist() == [[0, 0, 1, 1]]


def test_a_function_decides_what_comes_back():
    wanted = torch.tensor([[0., 9, 1, 5, 0, 0]])  # of the pruned 1, 3 and 2 the first shall come back first
    sparsifier = Sparsifier(row(4., 1, 3, 2, 5, 6), layers='0', regrow=lambda weight: wanted)
    sparsifier.sparsify_model(50)
    assert sparsifier.sparsify_model(34, regrow=True).born['0'].int().tolist() == [[0, 1, 0, 0, 0, 0]]
    assert sparsifier.sparsify_model(17, regrow=True).born['0'].int().tolist() == [[0, 0, 0, 1, 0, 0]]


def test_the_groups_of_coupled_layers_count_by_their_size():
    "Two layers whose outputs are added: a filter has 2 weights of the one and 6 of the other."
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.few, self.many, self.out = nn.Linear(2, 2, bias=False), nn.Linear(6, 2, bias=False), nn.Linear(2, 1)
            with torch.no_grad():
                self.few.weight.copy_(torch.tensor([[9., 9], [1, 1]]))
                self.many.weight.copy_(torch.tensor([[1.] * 6, [2] * 6]))  # means over both: 3 and 1.75

        def forward(self, x, y): return self.out(self.few(x) + self.many(y))
    example = torch.ones(1, 2), torch.ones(1, 6)
    sparsifier = Sparsifier(Sum(), 'filter', example=example, coupled=True)
    change = sparsifier.sparsify_model(50)
    assert change.masks['few'].int().tolist() == [[1, 1], [0, 0]]
    assert change.masks['many'].int().tolist() == [[1] * 6, [0] * 6]
    floor = Sparsifier(Sum(), 'filter', example=example, coupled=True, min_keep=.9)
    floor.sparsify_model(50)
    assert floor.report().zeros == 0  # nine tenths of each layer stay, and so of both


def test_a_change_can_carry_weights():
    sparsifier = Sparsifier(row(4., 1, 3, 2), layers='0')
    change = replace(decided(sparsifier, 50), weights={'0': torch.tensor([[7., 7, 7, 7]])})
    sparsifier.masks.apply(change)
    assert sparsifier.model[0].weight.tolist() == [[7, 0, 7, 0]]  # the masks win


class Auxiliary(nn.Module):
    "Its second head takes no part in most steps."
    def __init__(self):
        super().__init__()
        self.body, self.head, self.auxiliary = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x): return self.head(self.body(x))


@pytest.mark.parametrize('absent', [None, 0.], ids=['no gradient', 'zero gradient'])
@pytest.mark.parametrize('sparsity', [50, {'head': 50, 'auxiliary': 50, 'body': 50}], ids=['together', 'each'])
def test_a_layer_that_took_no_part_waits_and_is_named(absent, sparsity):
    model = Auxiliary()
    if absent is not None: model.auxiliary.weight.grad = torch.zeros_like(model.auxiliary.weight)
    model(torch.randn(5, 8)).square().mean().backward()
    sparsifier = Sparsifier(model, criteria='gradient')
    with pytest.warns(UserWarning, match="criteria: 'auxiliary' took no part in the step.* it waits"): change = sparsifier.sparsify_model(sparsity)
    assert change.waiting == {'auxiliary'}
    assert 'auxiliary' not in change.masks
    assert not (model.auxiliary.weight == 0).any()
    assert sum(int((p.weight == 0).sum()) for p in (model.body, model.head)) == 48
    model.auxiliary(torch.randn(5, 8)).square().mean().backward()
    sparsifier.sparsify_model(50)
    assert sparsifier.sparsity == 50


def test_layers_that_are_pruned_as_one_wait_together():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x): return self.out(self.a(x) + self.b(x))
    model = nn.Sequential(Sum(), nn.Linear(2, 5), nn.Linear(5, 2))
    model(torch.ones(1, 4)).sum().backward()
    model[0].b.weight.grad = None
    sparsifier = Sparsifier(model, 'filter', 'local', 'gradient', example=torch.ones(1, 4), coupled=True)
    with pytest.warns(UserWarning, match="'0.a', '0.b' took no part"): change = sparsifier.sparsify_model(50)
    assert change.waiting == {'0.a', '0.b'}


def test_an_event_within_an_event_is_refused_and_nothing_changes(net):
    def criterion(weight):
        sparsifier.sparsify_model(90)
        return weight.abs()
    sparsifier = Sparsifier(net, criteria=criterion)
    before = tensors_of(sparsifier)
    with pytest.raises(ValueError, match='sparsity: asked for within an event of the same Sparsifier'): sparsifier.sparsify_model(50)
    assert same(before, tensors_of(sparsifier))
    with pytest.raises(ValueError, match='within an event'): sparsifier.sparsify_model(50)  # not for ever
