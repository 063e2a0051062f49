from fractions import Fraction

import pytest
import torch
from conftest import convnet, kept, layer, zeros
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fasterai.allocation import er_densities, erk_densities, fractions, rounded, shared_out
from fasterai.sparsifier import Sparsifier


def published(shapes, density):
    "The loop of the paper's code, word for word in mathematics: sum over product, what exceeds one is dense, once more."
    dense = set()
    while True:
        divisor, right, raw = 0., 0., {}
        for i, shape in enumerate(shapes):
            n = float(torch.tensor(shape).prod())
            if i in dense: right -= n * (1 - density)
            else:
                right += n * density
                raw[i] = sum(shape) / n
                divisor += raw[i] * n
        epsilon = right / divisor
        if max(raw.values()) * epsilon <= 1: return [1. if i in dense else raw[i] * epsilon for i in range(len(shapes))]
        dense |= {i for i in raw if raw[i] == max(raw.values())}


@given(st.lists(st.one_of(st.tuples(*[st.integers(1, 300)] * 2), st.tuples(st.integers(1, 64), st.integers(1, 64), st.integers(1, 7), st.integers(1, 7))),
                min_size=1, max_size=8), st.floats(.01, .99))
def test_erk_is_the_published_formula(shapes, density):
    found = erk_densities(shapes, density)
    sizes = [float(torch.tensor(s).prod()) for s in shapes]
    assert sum(d * n for d, n in zip(found, sizes)) == pytest.approx(density * sum(sizes), rel=1e-6)
    assert found == pytest.approx(published(shapes, density), abs=1e-6)


def test_er_leaves_the_kernel_out():
    shapes = [(10, 10, 3, 3), (100, 100)]
    found = er_densities(shapes, .1)
    assert found[0] / found[1] == pytest.approx((20 / 100) / (200 / 10_000))
    assert er_densities([(10, 10), (100, 100)], .5) == erk_densities([(10, 10), (100, 100)], .5)
    layers = [layer('a', range(900), shape=(10, 10, 3, 3)), layer('b', range(10_000), shape=(100, 100))]
    assert sum(map(sum, kept('er', layers, '9/10'))) == 1090


def test_erk_by_eye():
    assert erk_densities([(10, 10), (100, 100)], .5) == [1., pytest.approx((5050 - 100) / 10_000)]  # .2 × scale is more than 1, then the rest
    parts = [layer('a', range(100), shape=(10, 10)), layer('b', range(10_000), shape=(100, 100))]
    assert [sum(k) for k in kept('erk', parts, '1/2')] == [100, 4950]
    parts = [layer('a', range(10), shape=(2, 5)), layer('b', range(10), shape=(2, 5)), layer('c', range(10), shape=(2, 5))]
    assert sum(map(sum, kept('erk', parts, '1/4'))) == 22  # 7.5 each is 22 or 23 of 30: rounded together


def test_uniform_plus():
    def parts(): return [layer('a', range(10), axes={'O': 1, 'I': 1, 'k': 10}), layer('b', range(60), axes={'O': 6, 'I': 10}), layer('c', range(30), axes={'O': 3, 'I': 10})]
    assert [sum(k) for k in kept('uniform_plus', parts(), '9/20')] == [10, 30, 15]
    assert [sum(k) for k in kept('uniform_plus', parts(), '3/4')] == [10, 9, 6]  # 24 of the last, 51 of the middle
    with pytest.raises(ValueError, match=r'sparsity: got 90 %, expected 84 % at most with uniform_plus here'): kept('uniform_plus', parts(), '9/10')
    assert [sum(k) for k in kept('uniform_plus', parts()[1:], '1/2')] == [30, 15]  # no convolution


def test_the_entries_of_a_dict(net):
    Sparsifier(net, context='local').sparsify_model({'*': 10, '3': 50, nn.Linear: 90})
    assert zeros(net) == {'0.weight': 5, '3.weight': 216, '8.weight': 8}  # a name goes first, then what stands first
    net = convnet()
    Sparsifier(net).sparsify_model({'3': 50})
    assert zeros(net) == {'0.weight': 0, '3.weight': 216, '8.weight': 0}


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


def test_what_means_a_layer_outright_goes_first(net):
    for sparsity in ({'*': 50, '8': 90}, {'*': 50, net[8]: 90}, {nn.Linear: 50, net[8].weight: 90}):
        sparsifier = Sparsifier(net, layers=[nn.Linear, nn.Conv2d])
        assert fractions(sparsity, sparsifier.rules, sparsifier.selected)['8'] == Fraction(9, 10)
    for choice, says in (('1.bias', "means only '1.bias', and that is not chosen"), ('6', 'means none of the layers')):
        with pytest.raises(ValueError, match=says): Sparsifier(net).sparsify_model({choice: 50})


def test_uniform_plus_says_at_once_what_cannot_be():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 400))
    sparsifier = Sparsifier(model, context='uniform_plus')
    with pytest.raises(ValueError, match='got 90 %, expected .* % at most with uniform_plus here'): sparsifier.sparsify_model(90, .1)
    assert sparsifier.sparsity == 0
    sparsifier.sparsify_layer('1', 50)
    assert sparsifier.report().rows[1].sparsity == 50


@pytest.mark.parametrize('zeros, total, there, found', [
    ([1.5, 2.5, 3], 7, [0, 0, 0], [2, 2, 3]),
    ([1.2, 2.7, 3.1], 7, [0, 0, 0], [1, 3, 3]),
    ([3.6, 6.4], 10, [4, 0], [4, 6]),
    ([3.6, 6.4], 10, [5, 0], [5, 5]),  # what is there stays, and the other gets less
    ([2, 4, 4], 10, [6, 0, 0], [6, 2, 2]),
    ([2, 4, 4], 10, [6, 3, 0], [6, 3, 1]),
    ([2, 2], 4, [5, 1], [5, 1])])  # more is there than was asked for
def test_whole_numbers_of_zeros(zeros, total, there, found): assert rounded(shared_out(zeros, total, there, there), total) == found


@pytest.mark.parametrize('zeros, total, held, there, found', [
    ([2, 2], 4, [0, 0], [5, 1], [3, 1]),  # only zeros are taken, and no more than asked for
    ([2, 2], 0, [0, 0], [5, 1], [0, 0]),
    ([3, 1], 4, [0, 2], [3, 3], [2, 2]),  # what is held stays
    ([2, 2], 8, [0, 0], [5, 1], [5, 3])])
def test_zeros_that_nothing_holds_are_shared_out_first(zeros, total, held, there, found):
    assert shared_out(zeros, total, held, there) == found


@pytest.mark.parametrize('context', ['erk', 'er'])
def test_allocations_are_exact_after_every_event_of_a_schedule(context):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Conv2d(6, 8, 3), nn.Linear(8, 10))
    sparsifier = Sparsifier(model, context=context)
    for share in range(1, 101):
        sparsifier.sparsify_model(75, share / 100)
        assert sparsifier.report().zeros == round(Fraction(75, 100) * Fraction(share / 100) * 566)


def test_allocations_count_zeros_that_are_there():
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 20))
    with torch.no_grad(): model[0].weight[:15] = 0
    sparsifier = Sparsifier(model, context='erk')
    sparsifier.sparsify_model(50)
    assert [row.zeros for row in sparsifier.report().rows] == [300, 150, 150]


def test_the_layers_of_one_entry_compete_among_themselves():
    def model():
        torch.manual_seed(0)
        return nn.Sequential(*[nn.Linear(10, 10, bias=False) for _ in range(4)])
    net, other = model(), model()
    with torch.no_grad():
        for m in (net, other): m[1].weight /= 100
    Sparsifier(net, context='global').sparsify_model({'3': 50, '*': 40})
    assert zeros(net)['3.weight'] == 50
    assert sum(zeros(net).values()) == 50 + 120
    assert zeros(net)['1.weight'] == 99  # small weights go first within '*', and one stays
    Sparsifier(other, context='global', exclude='3').sparsify_model(40)
    assert all(torch.equal(net[i].weight, other[i].weight) for i in range(3))


def test_layers_that_are_named_each_reach_their_own_sparsity():
    net = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    Sparsifier(net).sparsify_model({'0': 30, '1': 60})
    assert zeros(net) == {'0.weight': 30, '1.weight': 60}


def test_what_uniform_plus_cannot_reach_in_an_entry_is_refused():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 4))
    with pytest.raises(ValueError, match='expected .* % at most with uniform_plus'): Sparsifier(net, context='uniform_plus').sparsify_model({'*': 95})

