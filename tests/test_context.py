from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasterai.allocation import erk_densities
from fasterai.context import CONTEXTS, read_context
from fasterai.pattern import pattern
from fasterai.selection import LayerGroups

INF = torch.inf


def layer(name, scores, size=1, cost=None, **more):
    scores = torch.tensor(scores, dtype=torch.float32)
    return LayerGroups(name, len(scores) * size, size, scores > -INF, lambda where: scores[where].nan_to_num(neginf=0.),
                None if cost is None else torch.tensor(cost), **more)


def kept(context, layers, share): return [k.int().tolist() for k in CONTEXTS[context](layers, Fraction(share))]


@pytest.mark.parametrize('context, share, keeps', [
    ('local', '1/2', [[0, 0, 1, 1], [0, 1]]),
    ('global', '1/2', [[0, 0, 0, 1], [1, 1]]),
    ('local', '0', [[1, 1, 1, 1], [1, 1]]),
    ('global', '0', [[1, 1, 1, 1], [1, 1]]),
    ('local', '1', [[0, 0, 0, 0], [0, 0]]),
    ('global', '1', [[0, 0, 0, 0], [0, 0]]),
])
def test_tables(context, share, keeps):
    assert kept(context, [layer('a', [1, 2, 3, 4]), layer('b', [8, 9])], share) == keeps


def test_counts_are_rounded_not_cut():
    assert kept('local', [layer('a', [1, 2, 3, 4, 5])], '3/10') == [[0, 0, 1, 1, 1]]  # 1.5 to the even number
    assert kept('local', [layer('a', [1, 2, 3])], '1/3') == [[0, 1, 1]] and kept('local', [layer('a', [1, 2, 3])], '3/5') == [[0, 0, 1]]


def test_ties_fall_by_position_over_layers():
    assert kept('global', [layer('a', [5, 5, 9]), layer('b', [5, 5])], '1/2') == [[0, 0, 1], [1, 1]]
    with pytest.warns(UserWarning, match="'a' would have been left without weights"):
        assert kept('global', [layer('a', [5, 5]), layer('b', [5, 5])], '1/2') == [[0, 1], [0, 1]]


def test_no_layer_is_emptied_and_the_others_give_what_it_was_spared():
    with pytest.warns(UserWarning, match="'a' would have been left without weights"):
        keeps = kept('global', [layer('a', [1, 2]), layer('b', [5, 6, 7, 8])], '1/2')
    assert keeps == [[0, 1], [0, 0, 1, 1]]


def test_the_one_group_of_a_layer_stays():
    with pytest.warns(UserWarning, match="'b'"): assert kept('local', [layer('b', [3], size=9)], '9/10') == [[1]]


def test_a_budget_beyond_what_may_go_leaves_one_group_a_layer():
    with pytest.warns(UserWarning): assert kept('global', [layer('a', [1, 2, 2]), layer('b', [5])], '99/100') == [[0, 0, 1], [1]]


def test_groups_of_different_size_pay_what_they_cost():
    small, large = layer('small', [1, 2, 3, 9], size=2), layer('large', [1.5, 8], size=20)
    assert kept('global', [small, large], '1/2') == [[0, 0, 1, 1], [0, 1]]  # 24 of 48: 2 + 20 + 2
    assert kept('global', [small, large], '1/5') == [[0, 1, 1, 1], [1, 1]]  # 10 of 48: 2 is nearer than 22


def test_weights_that_are_zero_in_living_groups_count():
    layers = [layer('a', [1, 2, 3], size=4, cost=[2, 2, 4])]
    assert kept('global', layers, '1/2') == [[0, 1, 1]]  # 6 of 12: 4 are there, the first group adds 2


def test_what_is_gone_stays_gone_and_is_counted():
    assert kept('global', [layer('a', [-INF, 4, -INF, 3])], '3/4') == [[0, 1, 0, 0]]


def test_a_criterion_that_changes_its_mind_is_counted_exactly():
    parts = [LayerGroups('a', 40_000, 1, torch.ones(40_000, dtype=torch.bool), lambda where: torch.rand(40_000)[where]) for _ in range(2)]
    keeps = CONTEXTS['global'](parts, Fraction(1, 2))
    assert sum(int(k.sum()) for k in keeps) == 40_000


def test_a_floor_holds_and_the_others_give_for_it():
    layers = lambda: [layer('a', [1, 2, 3, 4], floor=3), layer('b', [5, 6, 7, 8])]  # noqa: E731
    assert kept('global', layers(), '1/2') == [[0, 1, 1, 1], [0, 0, 0, 1]]
    assert kept('local', layers(), '3/4') == [[0, 1, 1, 1], [0, 0, 0, 1]]
    assert kept('global', [layer('a', [1, 2, 3], size=2, floor=3), layer('b', [5, 6, 7], size=2)], '1/2') == [[0, 1, 1], [0, 0, 1]]
    assert kept('global', [layer('a', [1, 2], floor=2), layer('b', [5, 6])], '1') == [[1, 1], [0, 0]]
    assert kept('global', [layer('a', [1, 2, 3], cost=[5, 1, 1], size=5, floor=2), layer('b', [9], cost=[5], size=5)], '9/10')[0] == [0, 1, 1]


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


def lamp_by_definition(layers):
    return [[v * v / sum(u * u for u in scores if u >= v) for v in scores] for scores in layers]


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 10 ** 6), min_size=2, max_size=20, unique=True), min_size=2, max_size=4), st.integers(1, 9))
def test_lamp_is_the_definition(layers, tenths):
    parts = [layer(str(i), [float(v) for v in scores]) for i, scores in enumerate(layers)]
    keeps, wanted = kept('lamp', parts, f'{tenths}/10'), lamp_by_definition(layers)
    total = sum(map(len, layers))
    assert sum(k.count(0) for k in keeps) == min(round(Fraction(tenths, 10) * total), total - len(layers))
    gone = [w for k, s in zip(keeps, wanted) for keep, w in zip(k, s) if not keep]
    stay = [w for k, s in zip(keeps, wanted) for keep, w in zip(k, s) if keep and w < 1]  # the highest of a layer is 1, and stays
    assert not gone or not stay or max(gone) <= min(stay) * (1 + 1e-6)


def test_normalized():
    assert kept('global', [layer('a', [3, 4]), layer('b', [30, 40])], '1/4') == [[0, 1], [1, 1]]
    assert kept('normalized', [layer('a', [3, 4]), layer('b', [20, 40])], '1/4') == [[1, 1], [0, 1]]
    assert kept('normalized', [layer('a', [0, 0]), layer('b', [3, 4])], '1/4') == [[0, 1], [1, 1]]


def lines(scores, sizes=None, **more):
    part = layer('a', scores, **more)
    part.axes = sizes or {'O': 1, 'I': len(scores)}
    return part


@pytest.mark.parametrize('context, scores, keep', [
    ('2:4', [1, 4, 3, 2, 9, 8, 7, 6], [0, 1, 1, 0, 1, 1, 0, 0]),
    ('1:4', [1, 4, 3, 2], [0, 1, 0, 0]),
    ('3:4', [1, 4, 3, 2], [0, 1, 1, 1]),
    ('2:4', [5, 5, 5, 5], [0, 0, 1, 1]),  # ties fall by position
    ('2:4', [1, 2, 3, 4, 5], [0, 0, 1, 1, 1]),  # of one left over, half a weight rounded up stays
    ('2:4', [1, 2, 3, 4, 7, 6, 5], [0, 0, 1, 1, 1, 1, 0]),
    ('2:4', [-INF, 4, 3, 2], [0, 1, 1, 0]),
    ('2:4', [-INF, -INF, -INF, 2], [0, 0, 0, 1]),
    ('1:2', [2, 1, 1, 2], [1, 0, 0, 1])])
def test_patterns(context, scores, keep):
    assert [k.int().tolist() for k in read_context(context)([lines(scores)], read_context(context).sparsity)] == [keep]


def test_patterns_run_along_the_input_axis():
    scores = [1, 9, 2, 9, 3, 9, 4, 9]  # I = 4, two kernel places
    assert read_context('2:4')([lines(scores, {'O': 1, 'I': 4, 'k': 2})], Fraction(1, 2))[0].int().tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


@settings(deadline=None)
@given(st.integers(1, 7), st.integers(1, 4), st.integers(1, 21), st.integers(1, 2), st.integers(0, 99))
def test_patterns_as_a_sort_would(n, more, inputs, kernel, seed):
    scores = torch.randint(0, 5, (3, inputs, kernel), generator=torch.Generator().manual_seed(seed)).float()
    context = pattern(n, n + more)
    keep, = context([lines(scores.flatten().tolist(), {'O': 3, 'I': inputs, 'k': kernel})], context.sparsity)
    expected = torch.ones_like(scores, dtype=torch.bool)
    for o in range(3):
        for k in range(kernel):
            for start in range(0, inputs, n + more):
                some = scores[o, start:start + n + more, k]
                expected[o, start + some.sort(stable=True).indices[:len(some) - -(-len(some) * n // (n + more))], k] = False
    assert torch.equal(keep, expected.flatten())


def test_half_a_pattern_is_half_of_its_zeros():
    context, scores = read_context('2:4'), [1, 4, 3, 2, 9, 8, 7, 6]
    quarter, = context([lines(scores)], Fraction(1, 4))
    assert quarter.int().tolist() == [0, 1, 1, 0, 1, 1, 1, 1]
    later = lines([-INF, 4, 3, -INF, 9, 8, 7, 6])
    assert context([later], Fraction(3, 8))[0].int().tolist() == [0, 1, 1, 0, 1, 1, 1, 0]
    assert context([later], Fraction(1, 8))[0].int().tolist() == [0, 1, 1, 0, 1, 1, 1, 1]


@pytest.mark.parametrize('name, says', [('4:2', "got '4:2', expected 'n:m' with n from 1 and smaller"), ('0:4', "got '0:4'"), ('2:2', "got '2:2'"),
                                        ('2-4', "got '2-4', expected one of local, global, erk, .* a pattern as '2:4', or a function"), ('erc', "did you mean 'erk'")])
def test_what_is_no_context_is_refused(name, says):
    with pytest.raises(ValueError, match=says): read_context(name)
