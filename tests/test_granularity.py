import pytest
import torch
from torch import nn

from fasterai.granularity import AXES, GRANULARITIES, Grouping

T = torch.tensor


def mean(grouping, scores): return grouping.mean(grouping.rows(scores))


@pytest.mark.parametrize('layer, groups', [  # groups at: weight, vector, kernel, filter
    (nn.Linear(5, 3), (15, 15, 15, 3)),
    (nn.Conv1d(4, 6, 3), (72, 24, 24, 6)),
    (nn.Conv2d(4, 6, (2, 3)), (144, 48, 24, 6)),
    (nn.Conv3d(2, 3, (2, 3, 4)), (144, 36, 6, 3)),
    (nn.Conv2d(4, 6, 3, groups=2), (108, 36, 12, 6)),
    (nn.Conv2d(4, 4, 3, groups=4), (36, 12, 4, 4)),
    (nn.ConvTranspose1d(4, 6, 3), (72, 24, 24, 6)),
    (nn.ConvTranspose2d(4, 6, (2, 3)), (144, 48, 24, 6)),
    (nn.ConvTranspose3d(2, 3, (2, 3, 4)), (144, 36, 6, 3)),
    (nn.ConvTranspose2d(4, 6, 3, groups=2), (108, 36, 12, 6)),
])
def test_how_many_groups(layer, groups):
    found = [Grouping(layer, g) for g in ('weight', 'vector', 'kernel', 'filter')]
    assert tuple(g.groups for g in found) == groups
    for g in found: assert g.groups * g.size == layer.weight.numel()
    assert [g.whole_filters for g in found] == [False, False, False, True]


def test_groups_of_a_convolution_by_eye():
    layer = nn.Conv2d(1, 2, 2)  # two filters, each one 2 × 2 kernel of two vectors
    scores = T([[[[1., 2.], [3., 4.]]], [[[5., 6.], [7., 8.]]]])
    means = {g: mean(Grouping(layer, g), scores).tolist() for g in ('weight', 'vector', 'kernel', 'filter')}
    assert means == {'weight': [1, 2, 3, 4, 5, 6, 7, 8], 'vector': [1.5, 3.5, 5.5, 7.5], 'kernel': [2.5, 6.5], 'filter': [2.5, 6.5]}
    assert Grouping(layer, 'vector').expand(T([True, False, False, True])).tolist() == [
        [[[True, True], [False, False]]], [[[False, False], [True, True]]]]


def test_filters_of_a_transposed_convolution_are_its_outputs():
    layer = nn.ConvTranspose1d(2, 3, 1, bias=False)  # weight (2 in, 3 out, 1)
    grouping = Grouping(layer, 'filter')
    assert mean(grouping, T([[[1.], [2.], [3.]], [[5.], [6.], [7.]]])).tolist() == [3, 4, 5]
    assert grouping.expand(T([True, False, True])).flatten(1).tolist() == [[True, False, True], [True, False, True]]


@pytest.mark.parametrize('layer', [
    nn.Conv1d(4, 6, 3, groups=2), nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose1d(4, 6, 3, groups=2),
    nn.ConvTranspose2d(4, 6, 3, groups=2), nn.ConvTranspose3d(4, 4, 2, groups=4), nn.Linear(4, 6)])
def test_the_nth_filter_makes_the_nth_output_channel(layer):
    grouping, kernels = Grouping(layer, 'filter'), layer.weight.ndim - 2
    for i in range(grouping.groups):
        keep = torch.ones(grouping.groups, dtype=torch.bool)
        keep[i] = False
        with torch.no_grad():
            layer.weight.copy_(torch.rand(layer.weight.shape) + 1).mul_(grouping.expand(keep))
            layer.bias.zero_()
            out = layer(torch.rand(1, 4, *[5] * kernels) + 1)
        assert out.view(grouping.groups, -1).eq(0).all(1).nonzero().flatten().tolist() == [i]


def test_axes_by_name():
    layer = nn.Conv2d(3, 2, (4, 5))
    assert Grouping(layer, ('I', 'kh')).groups == 2 * 5
    assert Grouping(layer, ('I', 'kh', 'kw')).whole_filters
    assert Grouping(layer, ['O']).groups == 3 * 4 * 5


@pytest.mark.parametrize('layer, granularity, error, says', [
    (nn.Conv2d(1, 1, 1), 'filtr', ValueError, r"granularity: got 'filtr', allowed for Conv2d 'c' is one of weight, vector, .* layer, block\(rows, "
                                             r"columns\), head\(n\), or a tuple of its axes G, O, I, kh, kw; did you mean 'filter'"),
    (nn.Linear(1, 1), ('I', 'kh'), ValueError, r"granularity: got axis 'kh', allowed for Linear 'c' is .* axes O, I"),
    (nn.Linear(1, 1), 4, TypeError, 'granularity: got 4, allowed for Linear')])
def test_what_a_layer_cannot_have_is_refused(layer, granularity, error, says):
    with pytest.raises(error, match=says): Grouping(layer, granularity, 'c')


def test_subclasses_are_found_by_their_base():
    class Special(nn.Conv2d): pass
    assert Grouping(Special(1, 2, 3), 'filter').groups == 2
    assert set(AXES) >= {nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d}


def test_channels_last_gives_the_same_groups():
    layer = nn.Conv2d(4, 6, 3)
    grouping, scores = Grouping(layer, 'vector'), torch.randn(6, 4, 3, 3)
    assert torch.equal(mean(grouping, scores), mean(grouping, scores.to(memory_format=torch.channels_last)))
