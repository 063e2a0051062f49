"Sparsity of the multiply-adds: `context='work'`."
from fractions import Fraction

import pytest
import torch
from conftest import convnet
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fasterai.arguments import Inputs
from fasterai.callback import SparsifyCallback
from fasterai.criteria import CRITERIA
from fasterai.inputs import uses
from fasterai.sparsifier import Sparsifier


def small():
    "A convolution of two weights, each used at four places, and a Linear of four, each used once."
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    model[0].weight.data = torch.tensor([4., 8.]).view(2, 1, 1, 1)
    model[3].weight.data = torch.tensor([[.5, 1.5], [3, .9]])
    return model


EXAMPLE = torch.randn(1, 1, 2, 2)


@pytest.mark.parametrize('percent, conv, linear', [
    (0, [1, 1], [1, 1, 1, 1]),
    (17, [1, 1], [0, 1, 1, 0]),  # 2.04 of 12 multiply-adds
    (50, [0, 1], [0, 1, 1, 0]),  # 6 of them: .5, .9, and 4 / 4 for four
    (55, [0, 1], [0, 0, 1, 0]),  # 6.6 are nearest to 7: 1.5 goes before 8 / 4
    (90, [0, 0], [0, 0, 1, 0]),
    (100, [0, 0], [0, 0, 0, 0]),
])
@pytest.mark.filterwarnings('ignore:sparsity')
def test_what_costs_least_for_each_multiply_add_goes_first(percent, conv, linear):
    model = small()
    sparsifier = Sparsifier(model, context='work', layers=['0', '3'], example=EXAMPLE, min_keep=0)
    sparsifier.sparsify_model(percent)
    assert (model[0].weight != 0).flatten().int().tolist() == conv
    assert (model[3].weight != 0).flatten().int().tolist() == linear
    report = sparsifier.report()
    assert report.unit == 'multiply-adds' and report.multiply_adds == 12 and report.saved == 4 * conv.count(0) + linear.count(0)
    assert 'their multiply-adds' in str(report)


LAYERS = {
    'Linear': (lambda: nn.Linear(5, 6), (3, 5)), 'Linear on tokens': (lambda: nn.Linear(5, 6), (3, 7, 5)),
    'Conv2d': (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 8)), 'grouped': (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 9, 8)),
    'dilated': (lambda: nn.Conv2d(4, 6, 3, padding='same', dilation=2), (2, 4, 9, 8)), 'Conv1d': (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    'transposed': (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 6)), 'without a batch': (lambda: nn.Conv2d(4, 6, 3), (4, 9, 8)),
}


@pytest.mark.parametrize('kind', LAYERS)
def test_multiply_adds_are_those_that_torch_counts(kind):
    make, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape)
    with FlopCounterMode(display=False) as counter: layer(x)
    found, = uses(layer, Inputs((x,)), {id(layer.weight)}).values()
    assert 2 * found * layer.weight.numel() == counter.get_total_flops()


def test_all_calls_of_a_shared_layer_count_and_attention_does():
    layer = nn.Linear(4, 4)
    assert uses(nn.Sequential(layer, layer), Inputs((torch.randn(3, 4),)), {id(layer.weight)}) == {id(layer.weight): 6}
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    x, y = torch.randn(2, 5, 4), torch.randn(2, 8, 4)
    found = uses(attention, Inputs((x, y, y)), {id(attention.in_proj_weight), id(attention.out_proj.weight)})
    assert found == {id(attention.in_proj_weight): (10 + 16 + 16) // 3, id(attention.out_proj.weight): 10}


def saved(model, x, layers):
    counted = uses(model, Inputs((x,)), {id(layer.weight) for layer in layers})
    pairs = [(counted[id(layer.weight)], layer.weight) for layer in layers]
    return sum(n * int((w == 0).sum()) for n, w in pairs), sum(n * w.numel() for n, w in pairs), max(n for n, _ in pairs)


@pytest.mark.filterwarnings('ignore:sparsity')
@pytest.mark.parametrize('criteria', [name for name, row in CRITERIA.items() if not row.needs_data])
@pytest.mark.parametrize('granularity', ['weight', 'kernel', 'filter'])
def test_counts_are_exact_to_the_nearest_group(criteria, granularity):
    x = torch.randn(2, 1, 8, 8)
    for percent in (1, 33.3, 50, 90, 97):
        torch.manual_seed(0)
        model = convnet()
        for p in model.parameters(): p.grad = torch.randn_like(p)
        sparsifier = Sparsifier(model, granularity, 'work', criteria, example=x)
        if not all(map(sparsifier.evidence.known, sparsifier.layers.values())): sparsifier.evidence.step()
        sparsifier.sparsify_model(percent)
        layers = sparsifier.layers.values()
        zeros, total, _ = saved(model, x, layers)
        largest = max(layer.uses * layer.grouping.size for layer in layers)
        most = total - sum(layer.uses * layer.grouping.size for layer in layers)
        wanted = min(Fraction(str(percent)) / 100 * total, most)
        assert abs(zeros - wanted) <= Fraction(largest, 2)
        for layer in layers: assert torch.equal(layer.weight != 0, sparsifier.masks[layer.name])
        for layer in layers: assert sparsifier.masks.left(layer.name) == int((layer.weight != 0).sum())


@pytest.mark.parametrize('schedule', ['one_shot', 'gradual', 'iterative'])
def test_it_works_while_training(schedule, make_learner, capsys):
    from fastai.callback.progress import ProgressCallback
    learn = make_learner(convnet())
    learn.add_cb(ProgressCallback())
    callback = SparsifyCallback(75, context='work', schedule=schedule)
    with learn.no_bar(): learn.fit(2, lr=.01, cbs=callback)
    zeros, total, largest = saved(learn.model, torch.randn(1, 1, 8, 8), [learn.model[0], learn.model[3], learn.model[8]])
    assert abs(zeros - .75 * total) <= largest / 2
    assert callback.sparsifier.report().unit == 'multiply-adds'


def test_a_fall_and_rounds_and_zeros_that_are_there():
    x = torch.randn(1, 1, 8, 8)
    model = convnet()
    model[3].weight.data[:4] = 0  # 4 · 54 weights, used at 16 places
    sparsifier = Sparsifier(model, context='work', example=x)
    for percent, more in ((60, {}), (40, {'regrow': True}), (90, {'rounds': 3})):
        sparsifier.sparsify_model(percent, **more)
        layers = sparsifier.layers.values()
        held = sum(layer.uses * int((~sparsifier.masks[layer.name]).sum()) for layer in layers)  # what comes back starts from zero
        total, largest = sum(layer.uses * layer.weight.numel() for layer in layers), max(layer.uses for layer in layers)
        assert abs(held - percent / 100 * total) <= largest / 2


def test_scattered_zeros_count_in_groups():
    x = torch.randn(1, 1, 8, 8)
    model = convnet()
    model[3].weight.data[:, :, 0, 0] = 0  # a ninth of each filter
    sparsifier = Sparsifier(model, 'filter', 'work', example=x, layers=['0', '3'])
    sparsifier.sparsify_model(50)
    zeros, total, _ = saved(model, x, sparsifier.layers.values())
    assert abs(zeros - total / 2) <= 16 * 54 / 2
    assert torch.equal(model[3].weight != 0, sparsifier.masks['3'])


class Separable(nn.Module):
    "A depthwise convolution, whose filters go with those of the one before it; the places differ."

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, stride=2, groups=6), nn.Conv2d(6, 4, 1)

    def forward(self, x): return self.c(F.relu(self.b(F.relu(self.a(x)))))


def test_coupled_filters_save_what_all_of_them_save():
    model, x = Separable(), torch.randn(1, 1, 9, 9)  # 81 places and 16
    sparsifier = Sparsifier(model, 'filter', 'work', example=x, coupled=True, layers=['a', 'b'])
    sparsifier.sparsify_model(50)
    gone = [(layer.weight == 0).flatten(1).all(1) for layer in (model.a, model.b)]
    assert torch.equal(*gone) and int(gone[0].sum()) == 3


def test_a_floor_is_one_of_weights():
    model = small()
    sparsifier = Sparsifier(model, context='work', layers=['0', '3'], example=EXAMPLE, min_keep=1)
    with pytest.warns(UserWarning, match=r'min_keep=1 lets at most 58.3 % be zero'): sparsifier.sparsify_model(90)
    assert [int((model[i].weight != 0).sum()) for i in (0, 3)] == [1, 1]


def test_an_example_is_needed_and_what_does_not_multiply_is_left_out():
    with pytest.raises(ValueError, match="example: got None, expected one batch of inputs with context='work'"): Sparsifier(small(), context='work')
    with pytest.raises(ValueError, match='example: got .* on which the model fails'): Sparsifier(small(), context='work', example=torch.randn(3))

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x): return self.head(self.rnn(x)[0])
    sparsifier = Sparsifier(Tagger(), context='work', example=torch.randn(2, 5, 3))
    assert [*sparsifier.layers] == ['head'] and 'not seen to multiply' in sparsifier.skipped['rnn.weight_ih_l0']


def test_the_model_is_as_it_was():
    model = convnet().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    Sparsifier(model, context='work', example=torch.randn(2, 1, 8, 8))
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize('granularity', ['weight', 'filter'])
def test_what_falls_comes_back_and_is_exchanged_by_work_too(granularity):
    model, x = convnet(), torch.randn(2, 1, 8, 8)
    F.cross_entropy(model(x), torch.tensor([1, 2])).backward()
    sparsifier = Sparsifier(model, granularity, 'work', example=x, regrow='random')
    sparsifier.sparsify_model(80)
    sparsifier.sparsify_model(40, regrow=True)
    uses = {name: layer.uses for name, layer in sparsifier.layers.items()}
    saved = sum(int((~mask).sum()) * uses[name] for name, mask in sparsifier.masks.items())
    largest = max(layer.grouping.size * layer.uses for layer in sparsifier.layers.values())
    assert abs(saved - Fraction(40, 100) * sparsifier.report().multiply_adds) <= largest / 2
    before = {name: int(mask.sum()) for name, mask in sparsifier.masks.items()}
    change = sparsifier.sparsify_model(40, swap=.5)
    assert {name: int(mask.sum()) for name, mask in sparsifier.masks.items()} == before
    assert any(born.any() for born in change.born.values())
