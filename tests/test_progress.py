"Bars: where somebody looks, one at a time, none in a fit."
import sys

import pytest
import torch
from fastprogress import fastprogress

from fasterai.callback import SparsifyCallback
from fasterai.progress import hidden, progress
from fasterai.sparsifier import Sparsifier


@pytest.fixture
def bars(monkeypatch):
    "A terminal; the bars that are made."
    made = []
    def bar(steps, leave):
        made.append(len(steps))
        return steps
    monkeypatch.setattr(fastprogress, 'progress_bar', bar)
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True, raising=False)
    return made


def test_a_bar_is_shown_in_a_terminal_and_not_in_a_file(bars, monkeypatch):
    assert list(progress([1, 2, 3])) == [1, 2, 3] and bars == [3]
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: False, raising=False)
    monkeypatch.setattr(fastprogress, 'IN_NOTEBOOK', False)
    assert list(progress([1, 2])) == [1, 2] and bars == [3]


def test_one_bar_at_a_time(bars):
    for _ in progress([1, 2]): list(progress([1, 2, 3]))
    list(progress([1]))
    assert bars == [2, 1]


def test_after_an_error_bars_are_shown_again(bars):
    with pytest.raises(ValueError):
        with hidden(): raise ValueError
    list(progress([1]))
    assert bars == [1]


def test_evidence_of_data_shows_one_and_a_fit_none(bars, net, make_learner):
    Sparsifier(net, criteria='wanda', data=[torch.randn(2, 1, 8, 8)] * 5).sparsify_model(50)
    assert bars == [5]
    make_learner().fit(1, cbs=SparsifyCallback(50, criteria='sparsegpt', repair='batchnorm'))
    assert bars == [5]
