from itertools import product

import numpy as np
import pytest

from fasterai.knapsack import STEPS, least_harm


@pytest.mark.parametrize('seed', range(5))
def test_it_is_the_best_of_all_choices(seed):
    draw = np.random.default_rng(seed)
    harms, costs = [draw.random(5) for _ in range(4)], [draw.integers(0, 50, 5).astype(float) for _ in range(4)]
    for budget in (40, 80, 120, 250):
        ways = list(product(range(5), repeat=4))
        def total(of, way): return sum(row[i] for row, i in zip(of, way))
        fitting = [way for way in ways if total(costs, way) <= budget]
        found = least_harm(harms, costs, budget)
        if not fitting:
            assert found is None
            continue
        assert total(costs, found) <= budget
        tight = [way for way in fitting if total(costs, way) <= budget * (1 - 5 / STEPS)]  # costs are rounded up
        assert total(harms, found) <= min(total(harms, way) for way in tight) + 1e-12


def test_the_ends():
    harms, costs = [np.array([0., 1, 2])] * 2, [np.array([9., 4, 4])] * 2
    assert least_harm(harms, costs, 18) == [0, 0] and least_harm(harms, costs, 1e9) == [0, 0]
    assert least_harm(harms, costs, 8) == [1, 1]  # nothing is left above the cheapest
    assert least_harm(harms, costs, 7.99) is None
    assert sorted(least_harm(harms, costs, 13)) == [0, 1]
    assert least_harm([], [], 1) == []
