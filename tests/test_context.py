from fractions import Fraction

import pytest
import torch

from fasterai.context import CONTEXTS
from fasterai.selection import Part

INF = torch.inf


def layer(name, scores, size=1, cost=None, **more):
    scores = torch.tensor(scores, dtype=torch.float32)
    return Part(name, len(scores) * size, size, scores > -INF, lambda where: scores[where].nan_to_num(neginf=0.),
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
    parts = [Part('a', 40_000, 1, torch.ones(40_000, dtype=torch.bool), lambda where: torch.rand(40_000)[where]) for _ in range(2)]
    keeps = CONTEXTS['global'](parts, Fraction(1, 2))
    assert sum(int(k.sum()) for k in keeps) == 40_000
