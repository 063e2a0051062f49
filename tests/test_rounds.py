"Rounds of rising sparsity: how much each keeps, evidence and repair anew in each, all or nothing."
from fractions import Fraction

import pytest
import torch
from torch import nn

from fasterai.rounds import in_rounds
from fasterai.sparsifier import Sparsifier


def net(): return nn.Sequential(nn.Linear(20, 30, bias=False), nn.ReLU(), nn.Linear(30, 10, bias=False))


def sparsities(sparsity, **kwargs):
    "The sparsity after each round, in weights that are zero."
    model, seen = net(), []
    def noted(model, dense, data): seen.append(sum(int((p == 0).sum()) for p in model.parameters()))
    Sparsifier(model, layers=nn.Linear, data=[torch.randn(4, 20)], repair=noted).sparsify_model(sparsity, **kwargs)
    return seen


def test_each_round_keeps_the_same_share_of_what_is_left():  # of 900: a half each time
    assert sparsities(87.5, rounds=3) == [450, 675, 788]  # 787.5 is rounded to even


def test_the_last_round_is_exact_and_one_is_one_event():
    assert sparsities(90, rounds=12)[-1] == 810 and len(sparsities(90, rounds=12)) == 12
    assert sparsities(90, rounds=1) == sparsities(90) == [810]


def test_rounds_begin_where_the_network_is():
    model, seen = net(), []
    def noted(model, dense, data): seen.append(sum(int((p == 0).sum()) for p in model.parameters()))
    sparsifier = Sparsifier(model, layers=nn.Linear, data=[torch.randn(4, 20)], repair=noted)
    sparsifier.sparsify_model(50)
    sparsifier.sparsify_model(87.5, rounds=2)
    assert seen == [450, 675, 788]


def test_all_weights_and_no_more_than_there_are():
    assert sparsities(100, rounds=4)[-1] == 900
    assert sparsities(0, rounds=4) == [0] * 4


def test_a_dict_rises_entry_by_entry():
    model = net()
    sparsifier = Sparsifier(model, layers=nn.Linear)
    change = sparsifier.sparsify_model({'0': 75, '2': 0}, rounds=2)
    assert int((model[0].weight == 0).sum()) == 450 and not (model[2].weight == 0).any()
    assert sum(int(died.sum()) for died in change.died.values()) == 450


def test_half_a_share_in_rounds_is_half_the_sparsity():
    model = net()
    Sparsifier(model, layers=nn.Linear).sparsify_model(80, share=.5, rounds=5)
    assert sum(int((p == 0).sum()) for p in model.parameters()) == 360


def test_a_criterion_says_how_many_rounds_it_needs():
    sparsifier = Sparsifier(net(), layers=nn.Linear)
    budgets = sparsifier._budgets([(['0', '2'], Fraction(3, 4))], Fraction(1))
    assert len(in_rounds(budgets)) == 1
    assert len(in_rounds(budgets, keeps=Fraction(1, 2))) == 2
    assert len(in_rounds(budgets, 7, Fraction(1, 2))) == 7
    assert in_rounds(budgets, 7)[-1] == budgets


def test_evidence_is_gathered_anew_in_each_round():
    calls = []
    class Data(list):
        def __iter__(self):
            calls.append(1)
            return super().__iter__()
    sparsifier = Sparsifier(net(), criteria='wanda', layers=nn.Linear, data=Data([torch.randn(4, 20)]))
    sparsifier.sparsify_model(90, rounds=5)
    assert len(calls) == 5


def test_a_layer_that_waits_in_the_last_round_is_in_the_change():
    class Data(list):
        "In the last round the first layer reads zeros alone, so its gradient is zero."
        rounds = 0

        def __iter__(self):
            self.rounds += 1
            return iter([torch.zeros(4, 20)]) if self.rounds == 3 else super().__iter__()
    model = net()
    sparsifier = Sparsifier(model, criteria='gradient', layers=nn.Linear, context='local', data=Data([torch.randn(4, 20)]),
                            loss_func=lambda out: (out - 1).square().sum() + model[2].weight.square().sum())
    with pytest.warns(UserWarning, match="'0' took no part"): change = sparsifier.sparsify_model(87.5, rounds=3)
    died = {name: int(died.sum()) for name, died in change.died.items()}
    assert died == {name: int((layer.weight == 0).sum()) for name, layer in sparsifier.layers.items()} and died['0'] == 450


def test_where_a_round_fails_none_has_been():
    model, seen = net(), []
    before = [p.detach().clone() for p in model.parameters()]

    def failing(model, dense, data):
        seen.append(1)
        if len(seen) == 3: raise RuntimeError('the third')
        with torch.no_grad(): model[0].weight.mul_(2)
    sparsifier = Sparsifier(model, layers=nn.Linear, data=[torch.randn(4, 20)], repair=failing)
    with pytest.raises(RuntimeError, match='the third'): sparsifier.sparsify_model(90, rounds=5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before))
    assert sparsifier.sparsity == 0 and all(keep.all() for keep in sparsifier.masks.values())


def test_wrong_rounds_are_refused():
    sparsifier = Sparsifier(net(), layers=nn.Linear)
    for wrong in (0, 2.5, '3', True):
        with pytest.raises(ValueError, match='rounds: got'): sparsifier.sparsify_model(50, rounds=wrong)
    with pytest.raises(ValueError, match='rounds: got 3 with regrow=True'): sparsifier.sparsify_model(50, regrow=True, rounds=3)


def test_a_warning_comes_once():
    model = nn.Sequential(nn.Linear(1000, 10), nn.Linear(10, 10))
    with torch.no_grad(): model[0].weight.mul_(1e-3)
    with pytest.warns(UserWarning) as said: Sparsifier(model, layers=nn.Linear).sparsify_model(98.8, rounds=10)
    assert sum('less than 1 %' in str(one.message) for one in said) == 1


def test_what_several_rounds_warn_of_is_said_once():
    model = nn.Sequential(nn.Linear(20, 4, bias=False), nn.Linear(4, 30, bias=False))
    with torch.no_grad(): model[0].weight.mul_(1e-3)
    with pytest.warns(UserWarning) as said: Sparsifier(model, layers=nn.Linear).sparsify_model(80, rounds=10)
    messages = [str(one.message) for one in said]
    assert messages and len(messages) == len(set(messages))
