"Which labels go, by tables that can be checked by eye."
import numpy as np
import pytest

from fasterai.deploy.axes import Axes, nothing, plain, reshaped
from fasterai.deploy.labels import Labels, solve
from fasterai.deploy.why import LAST_ONE, MEETS_NONZERO, UNEVEN, UNREAD


def gone(labels, rows): return solve(labels).gone[rows[:, 0]].tolist()


def read(labels, n, zero):
    rows = labels.new(n, owned=True)
    labels.read(rows, np.array(zero, bool))
    return rows


def test_what_is_read_while_it_is_not_zero_stays():
    labels = Labels()
    rows = read(labels, 4, [1, 0, 1, 0])
    assert gone(labels, rows) == [True, False, True, False]
    solved = solve(labels)
    assert solved.reasons[solved.why[rows[1, 0]]] == MEETS_NONZERO


def test_what_is_bound_goes_together():
    labels = Labels()
    a, b = read(labels, 3, [1, 1, 0]), read(labels, 3, [1, 0, 1])
    labels.bind(a, b)
    assert gone(labels, a) == gone(labels, b) == [True, False, False]


def test_one_is_left_and_what_nobody_reads_stays():
    labels = Labels()
    a, b = read(labels, 2, [1, 1]), labels.new(2, owned=True)
    solved = solve(labels)
    assert gone(labels, a) == [False, True] and gone(labels, b) == [False, False]
    assert solved.reasons[solved.why[a[0, 0]]] == LAST_ONE and solved.reasons[solved.why[b[0, 0]]] == UNREAD


def test_parts_lose_as_many():
    labels = Labels()
    rows = read(labels, 6, [1, 1, 0, 0, 1, 0])
    labels.level(rows, 2)
    assert gone(labels, rows) == [True, False, False, False, True, False]
    solved = solve(labels)
    assert solved.reasons[solved.why[rows[1, 0]]] == UNEVEN


@pytest.mark.parametrize('zero, left', [([1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]), ([1, 1, 0, 1, 1, 0], [0, 0, 1, 0, 0, 1]),
                                        ([1, 0, 0, 0, 1, 0], [1, 1, 1, 1, 1, 1])])
def test_a_split_axis_goes_by_whole_rows_or_columns(zero, left):
    labels = Labels()
    rows = read(labels, 6, zero)
    x = Axes((6,), (rows,), nothing(1))
    back = reshaped(reshaped(x, (2, 3), labels), (6,), labels)
    labels.read(back.rows[0], np.array(zero, bool))
    assert [not g for g in gone(labels, rows)] == [bool(n) for n in left]


@pytest.mark.parametrize('shapes', [[(2, 12), (8, 3), (2, 12)], [(2, 3, 4), (6, 4), (24,), (2, 3, 4)], [(2, 12), (2, 1, 3, 4), (2, 12)]])
def test_an_axis_is_the_same_after_it_was_split_and_merged(shapes):
    labels = Labels()
    x = plain(shapes[0])
    rows = read(labels, x.shape[-1], [1] * 4 + [0] * (x.shape[-1] - 4))
    x, y = x.with_rows(-1, rows), x.with_rows(-1, rows)
    for shape in shapes[1:]: y = reshaped(y, shape, labels)
    labels.read(y.rows[-1], np.arange(x.shape[-1]) < 4)
    assert y.shape == x.shape
    before = solve(labels).gone[x.rows[-1]].any(1)
    assert before.tolist() == solve(labels).gone[y.rows[-1]].any(1).tolist()


def test_zeros_are_split_and_merged():
    zero = np.array([[True, False, False, True, True, True]])
    y = reshaped(Axes((5, 6), plain((5, 6)).rows, zero), (5, 2, 3), Labels())
    assert y.zero.shape == (1, 2, 3) and y.over(1).tolist() == [False, True] and y.over(2).tolist() == [True, False, False]
    assert reshaped(y, (5, 6), Labels()).zero.tolist() == zero.tolist()
