import pytest
import torch
from matplotlib.collections import LineCollection
from torch import nn

from fasterai.plot import plot_kernels, plot_tradeoff, plot_weights


def crosses(ax): return sum(len(c.get_segments()) for c in ax.collections if isinstance(c, LineCollection)) / 2


def test_dead_weights_are_crossed_out():
    weight = torch.ones(2, 3, 2, 2)
    weight[1, 2] = 0
    ax = plot_kernels(weight)
    assert crosses(ax) == 4 and crosses(plot_kernels(weight, weight >= 0)) == 0
    assert crosses(plot_kernels(weight, weight < 0)) == 24
    assert crosses(plot_kernels(weight, filters=1)) == 0
    assert plot_kernels(weight, ax=ax) is ax


@pytest.mark.parametrize('layer', [nn.Linear(4, 3), nn.Conv1d(2, 3, 5), nn.Conv2d(9, 9, 3).half()])
def test_layers_of_other_kinds(layer): assert plot_kernels(layer.weight).get_xlabel()


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises((ValueError, TypeError)): plot_kernels(torch.ones(2, 2, 2, 2, 2))
    with pytest.raises((ValueError, TypeError)): plot_kernels(torch.ones(2, 2), torch.ones(3, 3, dtype=torch.bool))


def test_weights_before_and_after():
    before = torch.randn(40, 30)
    ax = plot_weights(before, before * (before.abs() > 1))
    zeros = int((before.abs() <= 1).sum())
    assert ax.get_legend_handles_labels()[1][1].endswith(f'{zeros:,} are zero')
    assert plot_weights(before, before, ax) is ax


def test_a_curve_for_each():
    ax = plot_tradeoff({'magnitude': [(90, .8), (50, .9)], 'gradient': [(50, .95)]}, metric='F1')
    assert [list(line.get_xdata()) for line in ax.lines] == [[50, 90], [50]]
    assert ax.get_ylabel() == 'F1' and len({line.get_color() for line in ax.lines}) == 2
