import numpy as np
import pytest
import torch
from torch import nn

from fasterai.granularity import AXES, GRANULARITIES, GranularityInfo, Grouping, block, head, weights_of
from fasterai.sparsifier import Sparsifier

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
    assert means == {'weight': [1, 2, 3, 4, 5, 6, 7, 8], 'vector': [1.5, 3.5, 5.5, 7.5],
                     'kernel': [2.5, 6.5], 'filter': [2.5, 6.5]}
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


# groups at: vector, column, kernel, horizontal_slice, vertical_slice, filter, channel, layer
@pytest.mark.parametrize('layer, attr, groups', [
    (nn.Conv2d(4, 6, (2, 3)), 'weight', (48, 72, 24, 12, 18, 6, 4, 1)),
    (nn.Conv2d(4, 6, 3, groups=2), 'weight', (36, 36, 12, 18, 18, 6, 4, 1)),
    (nn.ConvTranspose2d(4, 6, 3, groups=2), 'weight', (36, 36, 12, 18, 18, 6, 4, 1)),
    (nn.Conv1d(4, 6, 3), 'weight', (24, 72, 24, 6, 18, 6, 4, 1)),
    (nn.Linear(5, 3), 'weight', (15, 15, 15, 3, 3, 3, 5, 1)),
    (nn.Bilinear(2, 3, 4), 'weight', (24, 24, 24, 12, 12, 4, 2, 1)),
    (nn.Embedding(5, 3), 'weight', (15, 15, 15, 3, 3, 3, 5, 1)),
    (nn.MultiheadAttention(4, 2), 'in_proj_weight', (48, 48, 48, 12, 12, 12, 4, 1)),
    (nn.LSTM(5, 3), 'weight_ih_l0', (60, 60, 60, 12, 12, 12, 5, 1)),
    (nn.GRU(5, 3), 'weight_hh_l0', (27, 27, 27, 9, 9, 9, 3, 1)),
    (nn.LSTM(5, 3, proj_size=2), 'weight_hr_l0', (6, 6, 6, 2, 2, 2, 3, 1)),
])
def test_how_many_groups_of_other_shapes(layer, attr, groups):
    names = 'vector column kernel horizontal_slice vertical_slice filter channel layer'.split()
    found = [Grouping(layer, g, '', attr) for g in names]
    assert tuple(g.groups for g in found) == groups
    for g in found: assert g.groups * g.size == getattr(layer, attr).numel()
    assert found[-1].one_layer and not any(g.one_layer for g in found[:-1])


@pytest.mark.parametrize('granularity', [
    *GRANULARITIES, ('O',), ('I',), block(4, 4), block(1, 16), block(3, 2), block(64, 64), head(1), head(2)], ids=str)
@pytest.mark.parametrize('layer', [
    nn.Linear(6, 4), nn.Conv2d(6, 4, (2, 3)), nn.Conv2d(6, 4, 3, groups=2), nn.ConvTranspose1d(6, 4, 3, groups=2),
    nn.Embedding(6, 4), nn.LSTM(6, 4), nn.MultiheadAttention(4, 2), nn.Bilinear(3, 2, 4),
], ids=lambda m: type(m).__name__)
def test_every_pair_works(layer, granularity):
    "Check that each weight is in one group, and that weights are kept exactly where their groups are."
    for attr in weights_of(layer):
        grouping = Grouping(layer, granularity, '', attr)
        shape = getattr(layer, attr).shape
        keep = torch.rand(grouping.groups) > .5
        mask, everything = grouping.expand(keep), torch.ones(shape, dtype=torch.bool)
        assert mask.shape == shape
        counts = grouping.count(mask)
        assert torch.equal(counts > 0, keep) and (counts[keep] == grouping.count(everything)[keep]).all()
        assert int(grouping.count(everything).sum()) == everything.numel()
        assert torch.equal(keep[grouping.numbers(torch.arange(everything.numel()))], mask.flatten())
        scores = torch.rand(shape)
        rows, means = grouping.rows(scores).view(grouping.groups, -1), torch.as_tensor(mean(grouping, scores))
        assert torch.allclose(means, rows.sum(1) / grouping.count(everything))


def test_blocks_by_eye():
    grouping = Grouping(nn.Linear(5, 3), block(2, 2))  # 3 × 5: the last row and the last column are smaller blocks
    assert grouping.groups == 6 and grouping.sizes.tolist() == [4, 4, 2, 2, 2, 1]
    assert grouping.expand(T([True, False, True, False, True, False])).int().tolist() == [
        [1, 1, 0, 0, 1], [1, 1, 0, 0, 1], [0, 0, 1, 1, 0]]
    assert mean(grouping, torch.arange(15.).view(3, 5)).tolist() == [3, 5, 6.5, 10.5, 12.5, 14]
    conv = Grouping(nn.Conv2d(4, 4, 3), block(2, 4))  # one for each place of the kernel
    assert conv.groups == 2 * 9 and conv.size == 8 and not conv.whole_filters


def test_heads_by_eye():
    attention = nn.MultiheadAttention(4, 2)
    grouping = Grouping(attention, head(2), '', 'in_proj_weight')  # q, k and v of a head together
    assert grouping.groups == 2 and grouping.whole_filters
    assert grouping.expand(T([False, True]))[:, 0].int().tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1]
    out = Grouping(attention.out_proj, head(2, 'I'))
    assert out.expand(T([False, True]))[0].int().tolist() == [0, 0, 1, 1] and not out.whole_filters


def test_a_pruned_head_changes_nothing_of_the_others():
    attention, x = nn.MultiheadAttention(8, 4, batch_first=True), torch.randn(2, 3, 8)
    keep = T([True, False, True, True])
    with torch.no_grad():
        attention.in_proj_weight *= Grouping(attention, head(4), '', 'in_proj_weight').expand(keep)
        out = attention(x, x, x)[0]
        attention.out_proj.weight *= Grouping(attention.out_proj, head(4, 'I')).expand(keep)
        assert torch.allclose(out, attention(x, x, x)[0], atol=1e-6)  # the output of the head is zero already


def test_a_unit_of_an_lstm_is_all_its_gates():
    lstm = nn.LSTM(3, 2)
    grouping = Grouping(lstm, ('S', 'I'), '', 'weight_ih_l0')
    assert grouping.expand(T([True, False]))[:, 0].int().tolist() == [1, 0] * 4


@pytest.mark.parametrize('make, says', [
    (lambda: block(0, 4), 'rows of a block: got 0'),
    (lambda: block(4, 2.), 'columns of a block: got 2.0, expected an integer of 1 or more'),
    (lambda: head(True), 'heads: got True'),
    (lambda: head(2, 'kh'), "head: got 'kh' as axis, expected 'O' or 'I'"),
    (lambda: Grouping(nn.Linear(4, 6), head(4), 'q'),
     r"granularity: got head\(4\), and 4 heads cannot share O = 6; expected for Linear 'q' one of weight"),
    (lambda: Grouping(nn.Embedding(4, 6), ('kh',), 'e'), "got axis 'kh', expected for Embedding 'e' .* axes I, O"),
    (lambda: Grouping(nn.LayerNorm(4), 'filter', 'n'),
     "got 'filter', expected for LayerNorm 'n' one of weight, layer, or a tuple of its axes d0"),
    (lambda: Grouping(nn.LayerNorm(4), block(2, 2), 'n'),
     r"got block\(2, 2\), expected for LayerNorm 'n' one of weight, layer")])
def test_impossible_groups_are_refused(make, says):
    with pytest.raises(ValueError, match=says): make()


@pytest.mark.parametrize('layer, granularity, error, says', [
    (nn.Conv2d(1, 1, 1), 'filtr', ValueError,
     r"granularity: got 'filtr', .*one of weight, vector, .* vertical_slice, a tuple of axes, "
     r"block\(…\), or head\(…\); did you mean 'filter'"),
    (nn.Linear(1, 1), ('I', 'kh'), ValueError, r"granularity: got axis 'kh', expected for Linear 'c' .* axes O, I"),
    (nn.Linear(1, 1), 4, TypeError, 'granularity: got 4, .*one of weight')])
def test_groups_that_a_layer_cannot_have_are_refused(layer, granularity, error, says):
    with pytest.raises(error, match=says): Grouping(layer, granularity, 'c')


def test_subclasses_are_found_by_their_base():
    class Special(nn.Conv2d): pass
    assert Grouping(Special(1, 2, 3), 'filter').groups == 2
    assert weights_of(Special(1, 2, 3)) == {'weight': '(G O) I kh kw'} == AXES[nn.Conv2d]


def test_channels_last_gives_the_same_groups():
    layer = nn.Conv2d(4, 6, 3)
    grouping, scores = Grouping(layer, 'vector'), torch.randn(6, 4, 3, 3)
    assert torch.equal(mean(grouping, scores), mean(grouping, scores.to(memory_format=torch.channels_last)))


@pytest.mark.parametrize('granularity', [
    lambda axes: None, lambda axes: 7, lambda: ('I',), lambda a, b: ('I',), lambda axes: (('I', 0),), lambda axes: (('I', -1),),
    lambda axes: (('I', 1.5),), lambda axes: (('I', True),), lambda axes: (('I', 1, 2),), lambda axes: (None,), lambda axes: (['I'],),
    (('I', 0),), (('I', -1),), (('I', 2.),), ('I', 0), (('I',),), (None,), [['I', 2]]])
def test_granularities_that_are_none_are_refused(granularity):
    with pytest.raises((ValueError, TypeError), match='granularity: got .*expected'): Grouping(nn.Conv2d(4, 6, 3), granularity)
    model = nn.Sequential(nn.Linear(4, 4))
    before = model[0].weight.detach().clone()
    with pytest.raises((ValueError, TypeError), match='granularity: got'): Sparsifier(model, granularity)
    assert torch.equal(before, model[0].weight)


def test_sizes_may_be_numbers_of_numpy():
    assert Grouping(nn.Linear(8, 8), block(np.int64(4), np.int64(2))).groups == 8
    assert Grouping(nn.Linear(8, 8), lambda axes: (('I', np.int64(2)),)).groups == 32
    assert Grouping(nn.Linear(8, 8), lambda axes: (axis for axis in ('I',))).groups == 8


def test_a_row_that_is_not_called_with_axes_is_refused(monkeypatch):
    monkeypatch.setitem(GRANULARITIES, 'mine', GranularityInfo(lambda: ()))
    with pytest.raises(TypeError, match="granularity: got <lambda>, expected a function of axes"): Grouping(nn.Linear(2, 2), 'mine')
