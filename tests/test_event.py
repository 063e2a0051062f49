
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from conftest import same, tensors_of
from torch import nn

from fasterai.context import CONTEXTS, ContextInfo, global_
from fasterai.event import Budget, decide
from fasterai.granularity import block
from fasterai.regrowth import LOWEST
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


def test_a_context_of_ones_own_does_not_free_what_is_gone(net):
    net[3].weight.data[0] = 0
    sparsifier = Sparsifier(net, context=lambda parts, fraction: [torch.ones_like(p.alive) for p in parts])
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

def decided(sparsifier, sparsity, regrow=None):
    tied = sparsifier.selected.tied(list(sparsifier.layers))
    budget = Budget(tied, Fraction(sparsity, 100))
    return decide(sparsifier.rules, [budget], sparsifier.masks.of, sparsifier.evidence, regrow)


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
    sparsifier = Sparsifier(row(4., 1, 3, 2), layers='0')
    change = sparsifier.sparsify_model(50)
    assert change.masks['0'].int().tolist() == [[1, 0, 1, 0]]
    assert change.died['0'].int().tolist() == [[0, 1, 0, 1]]
    assert change.born['0'].int().tolist() == [[0, 0, 0, 0]]
    change = sparsifier.sparsify_model(25, regrow=True)
    assert change.born['0'].int().tolist() == [[0, 0, 0, 1]]  # by position: the last comes back first
    assert change.died['0'].int().tolist() == [[0, 0, 0, 0]]
    assert repr(change) == 'Change(1 layers: 1 of 4 weights are masked)'
    assert sparsifier.sparsify_layer('0', 75).died['0'].int().tolist() == [[0, 0, 1, 1]]


def test_a_function_decides_what_comes_back():
    sparsifier = Sparsifier(row(4., 1, 3, 2, 5, 6), layers='0')
    sparsifier.sparsify_model(50)
    wanted = torch.tensor([0., 9, 0, 5, 0, 0])  # of those pruned, 1 and 3 and 2, the first shall come back

    def by_table(scores, pruned): return torch.where(pruned, LOWEST * (1 - wanted / 10), torch.as_tensor(scores))
    change = decided(sparsifier, 34, by_table)
    assert change.born['0'].int().tolist() == [[0, 1, 0, 0, 0, 0]]


def test_a_change_can_carry_weights():
    sparsifier = Sparsifier(row(4., 1, 3, 2), layers='0')
    change = replace(decided(sparsifier, 50), weights={'0': torch.tensor([[7., 7, 7, 7]])})
    sparsifier.masks.apply(change)
    assert sparsifier.model[0].weight.tolist() == [[7, 0, 7, 0]]  # the masks win
