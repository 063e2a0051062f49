import numpy as np
import pytest

from fasterai import ranking
from fasterai.ranking import Ranks, differing


@pytest.mark.parametrize('budget, score', [(1, 1.), (2, 1.), (3, 2.), (4, 2.), (5, 3.), (6, 3.), (7, np.inf)])
def test_the_score_up_to_which_a_budget_reaches(budget, score):
    assert Ranks([(np.array([3., 1, 2]), 2)]).reaching(budget) == score


def test_costs_of_several_pieces():
    ranks = Ranks([(np.array([3., 1]), 2), (np.array([2.]), np.array([5])), (np.array([]), 9)])
    assert ranks.total == 9
    assert ranks.upto(2) == 7
    assert [ranks.reaching(n) for n in (2, 3, 7, 8)] == [1, 2, 2, 3]


def test_a_sample_counts_as_often_as_it_stands_for():
    assert Ranks([(np.arange(4.), 3)], times=10).total == 120


@pytest.mark.parametrize('kind', ['random', 'ties', 'equal'])
@pytest.mark.parametrize('costs', ['alike', 'mixed'])
def test_a_search_by_samples_finds_what_a_sort_finds(kind, costs, monkeypatch):
    monkeypatch.setattr(ranking, 'FEW', 16)
    random = np.random.default_rng(0)
    scores = {'random': random.random(5000), 'ties': random.integers(0, 9, 5000) / 4, 'equal': np.ones(5000)}[kind]
    cost = 3 if costs == 'alike' else random.integers(1, 20, 5000)
    order = scores.argsort(kind='stable')
    sums = (np.full(5000, 3) if costs == 'alike' else cost)[order].cumsum()
    for budget in (1, 100, int(sums[-1]) // 2, int(sums[-1])):
        assert ranking.reaching(scores, cost, budget) == scores[order[sums.searchsorted(budget)]]


@pytest.mark.parametrize('n', [1, 8, 64, 67])
def test_where_masks_differ(n):
    random = np.random.default_rng(n)
    a, b = random.random(n) < .5, random.random(n) < .5
    assert differing(a, b).tolist() == np.flatnonzero(a != b).tolist()
