"Filters in round numbers: `round_to`."
import numpy as np
import pytest
import torch
from conftest import INF, layer
from torch import nn

from fasterai.callback import SparsifyCallback
from fasterai.context import CONTEXTS
from fasterai.deploy.shrink import shrink
from fasterai.granularity import GRANULARITIES, block
from fasterai.rounding import rounded
from fasterai.rules import Rules
from fasterai.sparsifier import Sparsifier


def of(scores, keep, multiple, **more):
    "Which groups stay of one layer, as a text of 0 and 1."
    keeps = [torch.tensor([k == '1' for k in keep])]
    found, = rounded([layer('a', scores, **more)], keeps, multiple)
    return ''.join(map(str, found.int().tolist()))


@pytest.mark.parametrize('scores, keep, multiple, stays', [
    ([1, 2, 3, 4, 5, 6, 7, 8], '00011111', 4, '00001111'),  # 5 are nearer to 4 than to 8: the lowest goes
    ([8, 2, 3, 4, 5, 6, 7, 1], '10011110', 4, '10001110'),
    ([1, 2, 3, 4, 5, 6, 7, 8], '01111111', 4, '11111111'),  # 7 are nearer to 8
    ([1, 2, 3, 4, 5, 6, 7, 8], '00111111', 4, '11111111'),  # a tie keeps more
    ([1, 2, 3, 4, 5, 6, 7, 8], '00000001', 4, '00001111'),  # at least one multiple; the best come back
    ([4, 4, 4, 4, 4, 4, 4, 4], '10000000', 4, '10000111'),  # of equals the last ones
    ([4, 4, 4, 4, 4, 4, 4, 4], '11111000', 4, '01111000'),  # and the first go
    ([1, 2, 3, 4, 5, 6, 7, 8], '00000000', 4, '00001111'),
    ([1, 2, 3, 4, 5], '11111', 4, '11111'),  # nothing was pruned
    ([1, 2, 3, 4, 5, 6], '011111', 4, '001111'),
    ([1, 2, 3, 4, 5, 6, 7], '0111111', 4, '1111111'),  # 6 round to 8, and there are 7: all
    ([1, 2, 3], '001', 4, '111'),  # fewer than round_to stay whole
    ([1, 2, 3, 4], '0001', 1, '0001'),
    ([-INF, 2, 3, 4, 5, 6, 7, 8], '00000011', 4, '00001111'),  # what was pruned before stays pruned
    ([-INF, 2, 3, 4, 5, 6, 7, 8], '01111111', 4, '00001111'),  # 8 are not there
    ([-INF, -INF, -INF, -INF, -INF, 6, 7, 8], '00000011', 4, '00000111'),  # nor 4
    ([-INF, 2, 3], '011', 4, '011'),
])
def test_by_eye(scores, keep, multiple, stays):
    assert of(scores, keep, multiple) == stays
    assert of(scores, keep, multiple, size=3) == stays


@pytest.mark.parametrize('floor, stays', [(None, '00001111'), (8, '00001111'), (9, '11111111'), (16, '11111111')])
def test_the_floor_is_reached(floor, stays): assert of([1, 2, 3, 4, 5, 6, 7, 8], '00011111', 4, size=2, floor=floor) == stays


def test_a_floor_above_the_multiple_that_is_left_keeps_all():
    assert of([-INF, 2, 3, 4, 5, 6, 7, 8], '00000111', 4, floor=4) == '00001111'
    assert of([-INF, 2, 3, 4, 5, 6, 7, 8], '00000111', 4, floor=5) == '01111111'


def test_a_floor_counts_what_is_left_in_the_filters():
    scores, costs = [1, 2, 3, 4, 5, 6, 7, 8], [9, 9, 9, 9, 1, 1, 1, 1]
    assert of(scores, '00001111', 2, size=9, cost=costs, floor=4) == '00001111'
    assert of(scores, '00001111', 2, size=9, cost=costs, floor=5) == '00111111'
    assert of([*scores, 0], '000011110', 2, size=9, cost=[*costs, 1], floor=40) == '111111110'
    assert of([*scores, 0], '000011110', 2, size=9, cost=[*costs, 1], floor=41) == '111111111'  # 8 do not suffice


def test_the_counts_of_a_context_are_forgotten_where_they_are_no_longer_true():
    one, other = layer('a', [1, 2, 3]), layer('b', [1, 2, 3])
    one.outcome.left, other.outcome.left = 1, 2
    rounded([one, other], [torch.tensor([False, False, True]), torch.tensor([False, True, True])], 2)
    assert (one.outcome.left, other.outcome.left) == (None, 2)


# In a model

def filters(sparsifier): return {name: int(sparsifier.masks[name].flatten(1).any(1).sum()) for name in sparsifier.layers}


def widths(*channels):
    layers = [nn.Conv2d(a, b, 3, padding=1) for a, b in zip(channels, channels[1:])]
    return nn.Sequential(*layers, nn.Conv2d(channels[-1], 2, 1))


IMAGE = torch.randn(2, 1, 4, 4)


@pytest.mark.filterwarnings('ignore:sparsity')
@pytest.mark.parametrize('context', [*CONTEXTS, lambda layers, fraction: [torch.from_numpy(la.all_scores() > np.median(la.all_scores())) for la in layers]])
@pytest.mark.parametrize('sparsity', [5, 40, 73, 99, 100])
def test_every_context(context, sparsity):
    if context == 'uniform_plus' and sparsity > 90: return  # it cannot
    model = widths(1, 30, 24, 5, 17)
    sparsifier = Sparsifier(model, 'filter', context, example=IMAGE, round_to=8)
    sparsifier.sparsify_model(sparsity)
    sizes = {'0': 30, '1': 24, '2': 5, '3': 17}
    found = filters(sparsifier)
    for name, size in sizes.items(): assert found[name] == size or found[name] % 8 == 0 and found[name] >= 8, name
    assert found['2'] == 5
    for name in found: assert sparsifier.masks.left(name) == int(sparsifier.masks[name].sum()) == int((sparsifier.layers[name].weight != 0).sum())


def test_the_best_stay():
    model = widths(1, 24)
    Sparsifier(model, 'filter', 'local', example=IMAGE, round_to=8).sparsify_model(50)
    norms = torch.as_tensor(model[0].weight.detach().abs().sum((1, 2, 3)))
    assert int((norms > 0).sum()) == 16  # 12 are as near to 8 as to 16
    other = widths(1, 24)
    with torch.no_grad(): other[0].weight[:] = torch.arange(24.)[:, None, None, None] + 1
    Sparsifier(other, 'filter', 'local', example=IMAGE, round_to=8).sparsify_model(50)
    assert (other[0].weight != 0).flatten(1).any(1).int().tolist() == [0] * 8 + [1] * 16


def test_nothing_asked_nothing_rounded():
    model = widths(1, 24)
    with torch.no_grad(): model[0].weight[:3] = 0
    sparsifier = Sparsifier(model, 'filter', example=IMAGE, round_to=8, keep_zeros=True)
    sparsifier.sparsify_model(0)
    assert filters(sparsifier) == {'0': 21}
    sparsifier.sparsify_model(1)
    assert filters(sparsifier) == {'0': 16}


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(1, 20, 3, padding=1), nn.Conv2d(20, 28, 3, padding=1), nn.Conv2d(28, 20, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(20), nn.Linear(20, 2)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.norm(self.b(self.a(x).relu()))).relu().mean((2, 3)))


@pytest.mark.parametrize('context', ['local', 'global'])
def test_layers_that_are_pruned_as_one_are_rounded_as_one(context):
    model = Residual()
    sparsifier = Sparsifier(model, 'filter', context, example=IMAGE, coupled=True, round_to=8)
    sparsifier.sparsify_model(45)
    found = filters(sparsifier)
    assert found['stem'] == found['b'] < 20 and found['stem'] % 8 == 0 and found['a'] in (8, 16, 24)
    stays = {name: sparsifier.masks[name].flatten(1).any(1) for name in found}
    assert torch.equal(stays['stem'], stays['b'])
    small = shrink(model, IMAGE, verbose=False)
    assert (small.stem.out_channels, small.a.out_channels) == (found['stem'], found['a'])


@pytest.mark.parametrize('schedule', ['gradual', 'iterative', 'dense_sparse_dense'])
def test_a_fit_with_a_schedule(make_learner, schedule):
    model = nn.Sequential(nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    seen = []

    class Watching(SparsifyCallback):
        def after_step(self):
            super().after_step()
            seen.append(filters(self.sparsifier)['0'])
    make_learner(model).fit(4, cbs=Watching(60, 'filter', 'local', schedule=schedule, round_to=8))
    assert set(seen) <= {8, 16, 24, 32}
    if schedule == 'dense_sparse_dense': assert seen[0] == seen[-1] == 32 and min(seen) == 16
    else: assert seen[-1] == 16 and seen == sorted(seen, reverse=True)  # 12.8 would stay


def test_a_fit_says_why_another_sparsity_was_reached(make_learner, capsys):
    model = nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    learn = make_learner(model)
    learn.logger = print
    learn.fit(1, cbs=SparsifyCallback(60, 'filter', 'local', round_to=8))
    assert 'reached 50.00 % (144 of 288 weights); round_to=8 rounds the filters that stay' in capsys.readouterr().out
    learn.fit(1, cbs=SparsifyCallback(50, 'filter', 'local', round_to=8))
    assert 'reached 50.00 % (144 of 288 weights)\n' in capsys.readouterr().out


def test_min_keep_goes_first():
    for min_keep, left in ((None, 8), (9 * 8, 8), (9 * 8 + 1, 16), (.6, 24)):
        model = widths(1, 32)
        sparsifier = Sparsifier(model, 'filter', 'local', example=IMAGE, min_keep=min_keep, round_to=8)
        sparsifier.sparsify_model(70)
        assert filters(sparsifier) == {'0': left}, min_keep


@pytest.mark.parametrize('round_to', [0, -8, 8., '8', True, [8], float('nan')])
def test_what_is_no_count_is_refused(round_to):
    for make in (Rules, lambda *given, **more: SparsifyCallback(50, *given, **more)):
        with pytest.raises(ValueError, match='round_to: got .*, expected an integer of 1 or more'): make('filter', round_to=round_to)


@pytest.mark.parametrize('granularity', [*(name for name, row in GRANULARITIES.items() if not row.one_filter), ('I', 'kh', 'kw'), block(4, 4)])
def test_other_granularities_have_no_filters_to_count(granularity):
    with pytest.raises(ValueError, match="round_to: got 8 with granularity=.*, expected 'filter', which prunes output channels"):
        Rules(granularity, round_to=8)


def test_it_is_printed():
    assert repr(Rules('filter', round_to=8)) == "Rules(granularity='filter', round_to=8)"
    assert Rules('filter', round_to=np.int64(8)) == Rules('filter', round_to=8)
