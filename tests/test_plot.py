import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection
from torch import nn

from fasterai.plot import label_ends, new_axes, plot_history, plot_kernels, plot_tradeoff, plot_weights


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


def labels(ax): return {text.get_text(): text for text in ax.texts}


def test_seeds_are_a_mean_in_a_band():
    ax = plot_tradeoff({'three seeds': [(90, .7), (90.04, .8), (90.08, .9), (50, .95)]})
    (line,), (band,) = ax.lines, ax.collections
    assert [round(y, 3) for y in line.get_ydata()] == [.95, .8]
    assert sorted({round(y, 3) for y in band.get_paths()[0].vertices[:, 1]}) == [.7, .9, .95]


def test_labels_stand_at_the_ends_of_their_lines_and_not_on_each_other():
    ax = plot_tradeoff({'low': [(0, 50), (9, 50)], 'high': [(0, 60), (9, 60)], 'as high': [(0, 59), (9, 59.9)]})
    height = {name: text.get_position()[1] for name, text in labels(ax).items()}
    assert ax.get_legend() is None and height['low'] < .1 and height['high'] > .9
    assert height['high'] - height['as high'] > .05
    for line in ax.lines: assert labels(ax)[line.get_label()].get_color() == line.get_color()


def test_the_label_of_a_line_drawn_from_right_to_left_stands_at_its_right_end():
    ax = new_axes()
    for name, values in {'falls': (0, 1), 'rises': (1, 0)}.items(): ax.plot((9, 1), values, label=name)
    label_ends(ax)
    assert labels(ax)['falls'].get_position()[1] < labels(ax)['rises'].get_position()[1]


def test_many_layers_make_a_picture_higher():
    ax = plot_history([{'epoch': 0} | {f'layer {i}': 50. for i in range(60)}])
    heights = sorted(text.get_position()[1] for text in ax.texts)
    assert len(heights) == 60 and heights[0] > -.1 and heights[-1] <= 1
    assert min(b - a for a, b in zip(heights, heights[1:])) > .01
    assert max(map(max, ([*line.get_color()[:2]] for line in ax.lines))) < .9  # no yellow, which is not seen on white


def test_a_curve_for_each():
    ax = plot_tradeoff({'magnitude': [(90, .8), (50, .9)], 'gradient': [(50, .95)]}, metric='F1')
    assert [list(line.get_xdata()) for line in ax.lines] == [[50, 90], [50]]
    assert ax.get_ylabel() == 'F1' and len({line.get_color() for line in ax.lines}) == 2


BAD = [None, 7, 'x', [[1., 2.]], torch.empty(0, 3), torch.empty(3, 0), np.empty((0, 3)), np.array([['a', 'b']]), torch.ones(2, 2) * 1j,
       torch.ones(2, 2, device='meta'), nn.LazyLinear(3).weight]
every_bad = pytest.mark.parametrize('bad', BAD, ids=[f'{type(b).__name__}{i}' for i, b in enumerate(BAD)])


@every_bad
def test_what_is_no_weight_is_refused(bad):
    good, open_figures = torch.ones(2, 2), plt.get_fignums()
    for says, draw in (('weight', lambda: plot_kernels(bad)), ('before', lambda: plot_weights(bad, good)), ('after', lambda: plot_weights(good, bad))):
        with pytest.raises((ValueError, TypeError), match=f'{says}: got .*expected'): draw()
    if bad is not None:
        with pytest.raises((ValueError, TypeError), match='keep: got .*expected'): plot_kernels(good, bad)
    assert plt.get_fignums() == open_figures


def test_arrays_and_sparse_tensors_are_drawn():
    weight = np.array([[1., 0.], [0., 2.]], np.float32)
    assert crosses(plot_kernels(weight)) == 2 == crosses(plot_kernels(torch.tensor(weight), weight != 0)) == crosses(plot_kernels(torch.tensor(weight).to_sparse()))
    assert plot_weights(weight[::-1], weight).get_xlabel()


@pytest.mark.parametrize('wrong', [dict(filters=0), dict(filters='all'), dict(channels=-1), dict(channels=1.5), dict(filters=None)])
def test_numbers_of_kernels(wrong):
    with pytest.raises(ValueError, match=f'{next(iter(wrong))}: got .*expected an integer of 1 or more'): plot_kernels(torch.ones(2, 2), **wrong)


def test_histograms_of_no_numbers():
    one = torch.ones(2, 2)
    with pytest.raises(ValueError, match='bins: got 0'): plot_weights(one, one, bins=0)
    with pytest.raises(ValueError, match=r'after: got shape \(3,\), expected that of before, \(2, 2\)'): plot_weights(one, torch.ones(3))
    with pytest.raises(ValueError, match='before: got NaN or infinite numbers, expected'): plot_weights(one / 0, one)


@pytest.mark.parametrize('curves', [None, 7, [], {}, {'a': []}, {'a': None}, {'a': 7}, {'a': [1, 2]}, {'a': [(1, 2, 3)]}, {'a': [(1, None)]}, {'a': 'xy'},
                                    [(50, .9)], torch.ones(2, 2), np.ones((2, 2))])
def test_curves_that_are_none_are_refused(curves):
    open_figures = plt.get_fignums()
    with pytest.raises((ValueError, TypeError), match='curves.*: got .*expected'): plot_tradeoff(curves)
    assert plt.get_fignums() == open_figures


def test_curves_of_arrays():
    assert list(plot_tradeoff({'a': np.array([[90, .8], [50, .9]])}).lines[0].get_xdata()) == [50, 90]
