from dataclasses import replace
from fractions import Fraction
from functools import partial

import pytest
import torch
from conftest import INF, kept, layer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fasterai.context import CONTEXTS, read_context, within
from fasterai.selection import LayerGroups
from fasterai.sparsifier import Sparsifier


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


@pytest.mark.parametrize('name, says', [('4:2', "got '4:2', expected 'n:m' with n from 1 and smaller"), ('0:4', "got '0:4'"), ('2:2', "got '2:2'"),
                                        ('2-4', "got '2-4', expected one of local, global, erk, .* a pattern as '2:4', or a function"), ('erkk', "did you mean 'erk'")])
def test_what_is_no_context_is_refused(name, says):
    with pytest.raises(ValueError, match=says): read_context(name)


def test_within_an_axis_each_place_of_it_is_pruned_for_itself():
    scores, axes = [1, 2, 3, 4, 8, 7, 6, 5], {'O': 2, 'I': 4}
    half = read_context(within('O')), read_context(within('I'))
    by_output, by_input = (c([layer('a', scores, axes=axes)], Fraction(1, 2))[0].int().tolist() for c in half)
    assert by_output == [0, 0, 1, 1, 1, 1, 0, 0]
    assert by_input == [0, 0, 0, 0, 1, 1, 1, 1]
    pruned = layer('a', [-INF, 2, 3, 4, 8, 7, 6, 5], axes=axes)
    assert half[0]([pruned], Fraction(1, 4))[0].int().tolist() == [0, 1, 1, 1, 1, 1, 1, 0]
    assert half[0]([layer('a', [5] * 8, axes=axes)], Fraction(1, 2))[0].int().tolist() == [0, 0, 1, 1] * 2  # ties by position
    assert half[0]([layer('a', range(10), axes={'O': 2, 'I': 5})], Fraction(3, 10))[0].int().tolist() == [0, 0, 1, 1, 1] * 2  # 1.5 to the even number


@pytest.mark.parametrize('make, axis', [(lambda: nn.Linear(8, 6), 'O'), (lambda: nn.Conv2d(4, 6, 3), 'O'), (lambda: nn.Conv2d(4, 6, 3), 'I'),
                                        (lambda: nn.ConvTranspose2d(4, 6, 3), 'O'), (lambda: nn.Conv2d(4, 6, 3), 'kh')])
def test_within_on_layers(make, axis):
    sparsifier = Sparsifier(nn.Sequential(make()), context=within(axis), layers='0')
    sparsifier.sparsify_model(50)
    grouping = sparsifier.layers['0'].grouping
    mask = sparsifier.masks['0'].reshape([*grouping.axes.values()]).movedim(list(grouping.axes).index(axis), 0).flatten(1)
    assert (mask.sum(1) * 2 == mask.shape[1]).all()


def test_what_cannot_be_within_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"context: got within\('kh'\), but '0' has no axis kh, only O, I"): Sparsifier(model, context=within('kh'))
    with pytest.raises(ValueError, match="granularity: got 'kernel', expected 'weight'"): Sparsifier(nn.Sequential(nn.Conv2d(2, 2, 3)), 'kernel', within('O'))
    with pytest.raises(ValueError, match=r"min_keep: got 3, expected None with context=within\('O'\)"): Sparsifier(model, context=within('O'), min_keep=3)
    with pytest.raises(TypeError, match=r'context: got within\(3\)'): within(3)
    assert repr(Sparsifier(model, context=within('O'))) == "Sparsifier(model, context=within('O'))"


@pytest.mark.parametrize('groups, size, percent, gone', [
    (48, 2, 1, 0), (48, 9, 1, 0), (50, 2, 1, 1), (49, 2, 1, 0), (48, 2, 2, 1), (3, 10, 50, 2), (5, 3, 50, 3), (7, 4, 33, 2)])  # a half goes up
@pytest.mark.parametrize('context', ['global', 'local', 'erk'])
def test_groups_are_rounded_once_from_the_exact_number(groups, size, percent, gone, context):
    "1 % of 48 groups is 0.48 groups, so none, whatever their size."
    found, = kept(context, [layer('a', range(groups), size=size, shape=(groups, size))], Fraction(percent, 100))
    assert found.count(0) == gone


def test_groups_of_two_sizes_are_rounded_once():
    layers = [layer('a', [1, 2, 3, 4], size=2), layer('b', [1.5, 9], size=5)]  # 18 weights; 33 % are 5.94
    assert kept('global', layers, Fraction(33, 100)) == [[0, 1, 1, 1], [0, 1]]  # 2 + 5 is nearer than 2
    assert kept('global', layers, Fraction(25, 100)) == [[0, 1, 1, 1], [0, 1]]  # 4.5 lies in the middle of 2 and 7
    assert kept('global', layers, Fraction(24, 100)) == [[0, 1, 1, 1], [1, 1]]


@pytest.mark.parametrize('digits', ['２:４', '2:４', '٢:٤'])
def test_patterns_are_written_in_plain_digits(digits):
    with pytest.raises(ValueError, match='context: got .*expected one of local'): read_context(digits)


@pytest.mark.parametrize('context', [lambda layers, fraction: None, lambda layers, fraction: 7, lambda layers, fraction: [None]])
def test_contexts_that_return_something_else_are_refused(context):
    with pytest.raises(ValueError, match='context: <lambda> returned .*expected a bool keep mask'): read_context(context)([layer('a', [1, 2])], Fraction(1, 2))


def test_masks_of_another_layout_are_refused():
    with pytest.raises(ValueError, match='context: <lambda> returned'):
        read_context(lambda layers, fraction: [x.alive.to_sparse() for x in layers])([layer('a', [1, 2])], Fraction(1, 2))


def with_nan(context):
    "A context of one's own, in which the score of every other group is 0 / 0."
    def prune(layers, fraction):
        def scores(where, layer): return torch.as_tensor(layer.scores(where)) / (torch.arange(len(layer.alive))[where] % 2)
        return context([replace(layer, scores=partial(scores, layer=layer)) for layer in layers], fraction)
    return prune


@pytest.mark.parametrize('context', ['local', 'global', 'erk', 'lamp', 'normalized', '2:4', within('O')], ids=str)
@pytest.mark.parametrize('granularity, min_keep', [('weight', None), ('weight', 1), ('filter', None), ('filter', 9)])
def test_nan_of_a_context_of_ones_own_is_pruned_first(context, granularity, min_keep):
    info = read_context(context)
    if info.single_weights and granularity == 'filter': return
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    sparsifier = Sparsifier(model, granularity, with_nan(info.prune), lambda weight: 0 * weight, layers=['0', '1'], min_keep=min_keep)
    sparsifier.sparsify_model(50)
    odd = torch.arange(8) % 2 == 1
    expected = odd.expand(8, 8) if granularity == 'weight' else odd[:, None].expand(8, 8)
    assert all(torch.equal(sparsifier.masks[name], expected) for name in sparsifier.layers)


@pytest.mark.filterwarnings('ignore:sparsity')
@pytest.mark.parametrize('context', ['local', 'global', 'lamp', 'normalized'])
def test_where_all_is_nan_the_floor_is_kept(context):
    def all_nan(layers, fraction):
        return read_context(context).prune([replace(layer, scores=lambda where: torch.zeros(6)[where] / 0) for layer in layers], fraction)
    sparsifier = Sparsifier(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6)), 'filter', all_nan, layers=['0', '1'])
    sparsifier.sparsify_model(99)
    for name in sparsifier.layers: assert 0 < sparsifier.masks.left(name) < 12
