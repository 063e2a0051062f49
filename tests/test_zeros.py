"Zeros that no mask holds: they may learn until an event, count there, and go first, whatever the criterion says."
from copy import deepcopy

import pytest
import torch
from conftest import convnet
from torch import nn

from fasterai.callback import SparsifyCallback
from fasterai.context import within
from fasterai.granularity import block
from fasterai.keep import KeepSparse
from fasterai.schedule import gradual, one_shot
from fasterai.sparsifier import Sparsifier


def linear(*rows):
    "A Linear of these weights, as a model with one layer."
    weight = torch.tensor(rows, dtype=torch.float32)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data.copy_(weight)
    return nn.Sequential(layer)


def held(sparsifier, name='0'): return (~sparsifier.masks[name]).int().tolist()


def shuffled(weight): return torch.rand_like(weight)


CRITERIA = {'magnitude': 'magnitude', 'largest first': lambda weight: -weight.abs(), 'random': shuffled, 'gradient': 'gradient',
            'lowest of all': lambda weight: torch.full_like(weight, -torch.inf)}


def test_zeros_that_come_in_learn_until_an_event_takes_them():
    model = linear([0, 0, 3, 4], [5, 0, 7, 8])
    sparsifier = Sparsifier(model)
    assert held(sparsifier) == [[0, 0, 0, 0], [0, 0, 0, 0]]
    sparsifier.sparsify_model(25)
    assert held(sparsifier) == [[1, 1, 0, 0], [0, 0, 0, 0]]  # two of the three are asked for
    sparsifier.sparsify_model(50)
    assert held(sparsifier) == [[1, 1, 1, 0], [0, 1, 0, 0]]


@pytest.mark.parametrize('name', CRITERIA)
@pytest.mark.parametrize('context', ['local', 'global', 'erk', 'lamp', 'normalized'])
def test_zeros_go_first_whatever_the_criterion_says(name, context, net):
    sparsifier = Sparsifier(net, 'weight', context, CRITERIA[name])
    for p in net.parameters(): p.grad = torch.randn_like(p)
    net[3].weight.grad[4:] = 0  # scores of zero that are no weights of zero
    net[3].weight.data[::2, 1] = 0
    made = net[3].weight == 0
    sparsifier.sparsify_model(30)
    assert sparsifier.report().zeros == 170 and not sparsifier.masks['3'][made].any()


@pytest.mark.parametrize('context, masked', [
    ('2:4', [1, 0, 1, 0, 1, 1, 0, 0]), (within('O'), [1, 1, 1, 1, 0, 0, 0, 0]), ('local', [1, 1, 1, 1, 0, 0, 0, 0])], ids=str)
def test_after_zeros_made_by_hand_a_pattern_is_what_was_asked(context, masked):
    sparsifier = Sparsifier(linear([0, 2, 0, 0, 5, 6, 7, 8]), context=context)
    sparsifier.sparsify_model(50)
    assert held(sparsifier) == [masked]


def test_a_pattern_after_a_mask_counts_what_is_masked_first():
    model = linear([9, 2, 3, 9])
    sparsifier = Sparsifier(model, context='2:4')
    sparsifier.masks['0'] = torch.tensor([[True, True, True, False]])
    model[0].weight.data[0, :2] = 0
    sparsifier.sparsify_model(50)
    assert held(sparsifier) == [[1, 0, 0, 1]]  # the masked one, and the first of the zeros


FILTERS = [[0, 0, 0, 0], [1, 1, 1, 1], [0, 2, 2, 2], [3, 3, 3, 3]]


@pytest.mark.parametrize('sparsity, masks', [
    (0, [[0] * 4] * 4),
    (25, [[1] * 4, [0] * 4, [1, 0, 0, 0], [0] * 4]),
    (6.25, [[0] * 4, [0] * 4, [1, 0, 0, 0], [0] * 4]),  # the nearest whole filter is none
    (50, [[1] * 4, [1] * 4, [1, 0, 0, 0], [0] * 4])])
def test_empty_filters_go_first_and_scattered_zeros_count(sparsity, masks):
    sparsifier = Sparsifier(linear(*FILTERS), 'filter', layers='0', criteria=lambda weight: weight)
    sparsifier.sparsify_model(sparsity)
    assert held(sparsifier) == masks


def test_of_more_zeros_than_are_asked_for_the_first_are_held():
    model = linear([1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1])  # an identity
    sparsifier = Sparsifier(model, 'filter', layers='0')
    sparsifier.sparsify_model(25)
    assert held(sparsifier) == [[0, 1, 1, 1], [1, 0, 0, 0], [0] * 4, [0] * 4]


@pytest.mark.parametrize('granularity', ['weight', 'kernel', 'filter', 'vector', block(3, 3)], ids=str)
@pytest.mark.parametrize('context', ['local', 'global', 'lamp'])
def test_measured_is_asked_after_zeros_by_hand_and_with_two_sparsifiers(granularity, context):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 1))
    layers = ['0', '2', '4']
    first, second = Sparsifier(model, layers=layers), Sparsifier(model, granularity, context, shuffled, layers=layers)
    first.sparsify_model(20)
    with torch.no_grad(): model[2].weight[torch.rand_like(model[2].weight) < .1] = 0
    second.sparsify_model(60)
    largest = max(layer.grouping.size for layer in second.layers.values())
    kept = dict(second.masks)
    total = sum(layer.weight.numel() for layer in second.layers.values())
    assert abs(second.report().zeros - .6 * total) <= largest * (3 if context == 'local' else 1)
    with torch.no_grad():
        for layer in second.layers.values(): layer.weight.fill_(1)
    second.apply_masks()
    assert abs(second.report().zeros - .6 * total) <= largest * (3 if context == 'local' else 1)
    assert all(torch.equal(layer.weight != 0, kept[n]) for n, layer in second.layers.items())


def test_new_classes_learn():
    torch.manual_seed(0)
    head = nn.Linear(8, 4)
    with torch.no_grad(): head.weight[2:] = 0
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), head)
    optimizer, sparsifier = torch.optim.Adam(model.parameters(), 1e-2), Sparsifier(model)
    sparsifier.sparsify_model(10)
    sparsifier.attach(optimizer)
    x, y = torch.randn(64, 8), torch.randint(0, 4, (64,))
    for _ in range(50):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sparsifier.report().zeros == 10 and (head.weight[3] != 0).any()


def test_a_filter_that_two_layers_share_is_empty_where_both_are():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(2, 4), nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x): return self.head(self.a(x[:, :2]) + self.b(x))
    model = Sum()
    with torch.no_grad():
        for i, layer in enumerate((model.a, model.b)): layer.weight.fill_(1. + i)
        model.a.weight[:2] = 0
        model.b.weight[1] = 0
    sparsifier = Sparsifier(model, 'filter', layers=['a', 'b'], coupled=True, example=torch.randn(2, 6))
    sparsifier.sparsify_model(31.25)  # 10 of 32: the second filter, and the zeros of the first
    assert held(sparsifier, 'a') == [[1, 1], [1, 1], [0, 0], [0, 0]]
    assert held(sparsifier, 'b') == [[0] * 6, [1] * 6, [0] * 6, [0] * 6]
    sparsifier.sparsify_model(50)
    assert held(sparsifier, 'b') == [[1] * 6, [1] * 6, [0] * 6, [0] * 6] and sparsifier.report().zeros == 16


def test_weights_that_come_back_compete_with_those_that_are_pruned():
    sparsifier = Sparsifier(linear([1, 2, 3, 4]), regrow=lambda weight: torch.arange(4.)[None])
    sparsifier.sparsify_model(75)
    assert sparsifier.sparsify_model(50, regrow=True).born['0'].int().tolist() == [[0, 0, 1, 0]]
    assert sparsifier.sparsify_model(25, regrow=True).born['0'].int().tolist() == [[0, 1, 0, 0]]
    assert held(sparsifier) == [[1, 0, 0, 0]]


@pytest.mark.parametrize('context', ['erk', 'er', 'uniform_plus'])
@pytest.mark.parametrize('sparsity, masked', [(0, 0), (10, 13), (50, 64)])
def test_an_allocation_holds_no_more_than_asked_of_an_identity(context, sparsity, masked):
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    nn.init.eye_(model[1].weight)
    sparsifier = Sparsifier(model, context=context)
    sparsifier.sparsify_model(sparsity)
    assert sum(int((~mask).sum()) for mask in sparsifier.masks.values()) == masked
    assert sparsifier.report().zeros == max(56, masked)


@pytest.mark.parametrize('granularity, size', [('kernel', 9), ('filter', 144)])
@pytest.mark.parametrize('context', ['erk', 'er', 'global'])
def test_groups_by_an_allocation_count_zeros_that_one_layer_has(granularity, size, context):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Conv2d(16, 16, 3, bias=False) for _ in range(3)])
    model[1].weight.data[torch.rand(16, 16, 3, 3) < .8] = 0
    sparsifier = Sparsifier(model, granularity, context, layers=list(model))
    sparsifier.sparsify_model(40)
    assert abs(sparsifier.report().zeros - .4 * 6912) <= 1.5 * size


def test_filters_of_one_weight_that_are_added_to_larger_ones():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(1, 4), nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x): return self.head(self.a(x[:, :1]) + self.b(x))
    for criteria in ('magnitude', lambda weight: weight.abs()):
        model = Sum()
        with torch.no_grad():
            model.a.weight.fill_(1)
            model.b.weight.copy_(torch.arange(1., 5)[:, None].expand(4, 3))
            model.a.weight[3] = 0
        sparsifier = Sparsifier(model, 'filter', layers=['a', 'b'], coupled=True, criteria=criteria, example=torch.randn(2, 3))
        sparsifier.sparsify_model(31.25)
        assert (model.b.weight[:, 0] == 0).int().tolist() == [1, 0, 0, 0] and sparsifier.report().zeros == 5
        assert held(sparsifier, 'a') == [[1], [0], [0], [1]]


@pytest.mark.parametrize('context, weights, dtype, criteria', [
    ('lamp', (1e-23, 0, 1, 1), torch.float32, 'magnitude'), ('lamp', (1e-200, 0, 1, 1), torch.float64, 'magnitude'),
    ('normalized', (1e-30, 0, 1e20, 1e20), torch.float32, 'magnitude'), ('global', (1e-300, 0, 1, 1), torch.float64, 'magnitude'),
    ('normalized', (1, 0, 2, 3), torch.float32, lambda weight: torch.where(weight == 1, -torch.inf, .001)),
    (within('O'), (3, 5, 0, 2), torch.float64, lambda weight: torch.where(weight == 5, -torch.inf, weight)),
    ('2:4', (3, 5, 0, 2), torch.float64, lambda weight: torch.where(weight == 5, -torch.inf, weight)),
    (lambda layers, fraction: [torch.as_tensor(layer.scores(slice(None))) > -1e30 for layer in layers], (3, 0, 2, 1), torch.float32, 'magnitude')],
    ids='lamp lamp64 normalized global64 normalized_inf within_inf pattern_inf own'.split())
def test_zeros_go_first_where_scores_are_rescaled_or_extreme(context, weights, dtype, criteria):
    layer = nn.Linear(4, 1, bias=False).to(dtype)
    layer.weight.data[0] = torch.tensor(weights, dtype=dtype)
    Sparsifier(nn.Sequential(layer), context=context, criteria=criteria).sparsify_model(50 if context == '2:4' else 25)
    assert (layer.weight == 0).sum() == (2 if context == '2:4' else 1)


@pytest.mark.parametrize('scale, dtype', [(1e200, torch.float64), (1e-60, torch.float64), (1e38 / 2, torch.float32), (1e-38, torch.float32)])
@pytest.mark.parametrize('context', ['lamp', 'normalized', 'global'])
def test_the_order_of_extreme_weights(context, scale, dtype):
    layer = nn.Linear(4, 1, bias=False).to(dtype)
    layer.weight.data[0] = torch.tensor([4., 3, 2, 1], dtype=dtype) * scale
    Sparsifier(nn.Sequential(layer), context=context).sparsify_model(50)
    assert (layer.weight[0] == 0).int().tolist() == [0, 0, 1, 1]


def test_one_that_is_masked_goes_before_the_lowest_score():
    layer = nn.Linear(4, 1, bias=False).double()
    layer.weight.data[0] = torch.tensor([3., 5, 0, 2])
    sparsifier = Sparsifier(nn.Sequential(layer), context=within('O'), criteria=lambda weight: torch.where(weight == 5, -torch.inf, weight))
    sparsifier.masks['0'] = torch.tensor([[True, True, True, False]])
    sparsifier.sparsify_model(50)
    assert held(sparsifier) == [[0, 0, 1, 1]]


def test_what_stays_competes_with_what_comes_back_though_its_score_is_the_lowest():
    model = linear([1, 2, 3, 4])
    sparsifier = Sparsifier(model, criteria=lambda weight: torch.where(weight == 4, -torch.inf, weight),
                            regrow=lambda weight: torch.arange(4.)[None])
    sparsifier.masks['0'] = torch.tensor([[False, False, False, True]])
    sparsifier.sparsify_model(50, regrow=True)
    assert held(sparsifier) == [[1, 1, 0, 0]] and model[0].weight[0, 3] == 4


def test_a_floor_holds_for_scattered_zeros_too():
    model = nn.Sequential(nn.Linear(20, 40))
    model[0].weight.data[torch.rand(40, 20) < .4] = 0
    sparsifier = Sparsifier(model, 'filter', layers='0', min_keep=.8)
    sparsifier.sparsify_model(50)
    assert sparsifier.masks.left('0') == 640


@pytest.mark.parametrize('sparsity, masked', [(0, 0), (25, 9), (100, 30)])
def test_a_context_of_ones_own_holds_no_more_than_asked(sparsity, masked):
    model = nn.Sequential(nn.Linear(6, 6, bias=False))
    nn.init.eye_(model[0].weight)
    sparsifier = Sparsifier(model, 'filter', lambda layers, fraction: [layer.alive for layer in layers], layers='0')
    sparsifier.sparsify_model(sparsity)
    assert int((~sparsifier.masks['0']).sum()) == masked


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('context', ['global', 'erk'])
def test_half_precision_after_an_event(dtype, context):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).to(dtype)
    for granularity in ('weight', 'vector'):
        sparsifier = Sparsifier(model, granularity, context)
        for sparsity in (20, 40, 60): sparsifier.sparsify_model(sparsity)
        assert abs(sparsifier.report().zeros - 307) <= 16


def test_a_parameter_without_axes():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.scale = nn.Linear(4, 4), nn.Parameter(torch.tensor(2.))

        def forward(self, x): return self.scale * self.layer(x)
    for context in ('erk', 'global'):
        sparsifier = Sparsifier(Scaled(), context=context, layers=['layer', 'scale'])
        sparsifier.sparsify_model(50)
        assert sparsifier.report().zeros == (7 if context == 'erk' else 8)  # erk gives it to the scale, which stays


# Held from the beginning

def test_keep_zeros_holds_what_is_there():
    model = linear([0, 0, 3, 4], [5, 0, 7, 8])
    sparsifier = Sparsifier(model, keep_zeros=True)
    assert held(sparsifier) == [[1, 1, 0, 0], [0, 1, 0, 0]]
    sparsifier.sparsify_model(50)
    assert held(sparsifier) == [[1, 1, 1, 0], [0, 1, 0, 0]]


def test_keep_zeros_takes_a_tensor_of_zeros_for_new(net):
    nn.init.zeros_(net[8].weight)
    assert Sparsifier(net, keep_zeros=True).masks['8'].all()


def test_keep_zeros_is_true_or_false():
    with pytest.raises(TypeError, match="keep_zeros: got 'yes', expected True or False"): Sparsifier(convnet(), keep_zeros='yes')


# In a fit

def count(model): return sum(int((m.weight == 0).sum()) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))


def extra_channels():
    "A stem with input channels that are zero, as fastai makes for n_in=4."
    model = convnet()
    model[0] = nn.Conv2d(1, 6, 3, padding=1)
    model[3].weight.data[:, 3:] = 0
    return model, lambda: (model[3].weight[:, 3:] == 0)


def new_classes():
    model = convnet()
    model[8].weight.data[5:] = 0
    return model, lambda: model[8].weight[5:] == 0


def dirac():
    model = convnet()
    nn.init.dirac_(model[3].weight)
    return model, lambda: model[3].weight == 0


def rounded():
    model = convnet()
    for p in model.parameters(): p.data = (p.data / .05).round() * .05
    at = model[3].weight == 0
    return model, lambda: model[3].weight[at] == 0


@pytest.mark.parametrize('make', [extra_channels, new_classes, dirac, rounded])
@pytest.mark.parametrize('criteria', ['magnitude', 'gradient', shuffled])
def test_what_an_initialisation_made_zero_learns(make_learner, capsys, make, criteria):
    model, made = make()
    learn = make_learner(model)
    learn.logger = print
    before, there = int(made().sum()), count(model)
    learn.fit(3, .1, cbs=SparsifyCallback(30, criteria=criteria, schedule=gradual(.2, .8)))
    lines = capsys.readouterr().out.splitlines()
    assert count(model) == 170 and int(made().sum()) < .7 * before
    assert lines[0].startswith(f'sparsity: {there:,} of 566 weights come in as zeros, in ') and 'keep_zeros=True holds them' in lines[0]
    assert '(170 of 566 weights)' in lines[-1]
    learn.fit(1, .1)
    assert count(model) == 170 and 'come in as zeros' not in capsys.readouterr().out


@pytest.mark.parametrize('context', ['global', 'local'])
def test_an_event_at_the_start_takes_only_what_is_asked(make_learner, context):
    model, made = extra_channels()
    make_learner(model).fit(3, .1, cbs=SparsifyCallback(20, context=context, schedule=one_shot(0)))
    assert count(model) == (113 if context == 'global' else 11 + 86 + 16)
    assert int(made().sum()) == (113 if context == 'global' else 86)  # of 216: the others have learnt


def test_asking_for_nothing_changes_nothing(make_learner):
    models = [dirac()[0]]
    models.append(deepcopy(models[0]))
    for model, cbs in zip(models, ([], SparsifyCallback(0))): make_learner(model).fit(2, .1, cbs=cbs)
    assert all(torch.equal(a, b) for a, b in zip(*(model.state_dict().values() for model in models)))


@pytest.mark.parametrize('sparse, says', [(.005, False), (.02, True)])
@pytest.mark.parametrize('keep', [False, True])
def test_zeros_are_said_where_they_are_more_than_a_hundredth(make_learner, capsys, sparse, says, keep):
    model = convnet()
    model[3].weight.data.view(-1)[:round(sparse * 566)] = 0
    learn = make_learner(model)
    learn.logger = print
    learn.fit(1, cbs=SparsifyCallback(30, keep_zeros=keep))
    assert ("weights come in as zeros, in '3'," in capsys.readouterr().out) == (says and not keep)


@pytest.mark.parametrize('first', [SparsifyCallback(50, schedule=one_shot(.2)), SparsifyCallback(50, 'filter', 'local', schedule=one_shot(.2), layers=['0', '3', '8'])],
                         ids=['weight', 'filter'])
@pytest.mark.parametrize('criteria', ['magnitude', shuffled])
def test_two_callbacks_on_the_same_layers(make_learner, first, criteria):
    learn = make_learner()
    learn.fit(3, .1, cbs=[deepcopy(first), SparsifyCallback(60, criteria=criteria, schedule=one_shot(.6))])
    assert count(learn.model) == round(.6 * 566)
    learn.fit(1, .1)
    assert count(learn.model) == round(.6 * 566)


def test_two_callbacks_where_the_later_one_asks_for_less(make_learner):
    learn = make_learner()
    learn.fit(3, .1, cbs=[SparsifyCallback(60, schedule=one_shot(.6)), SparsifyCallback(50, criteria=shuffled, schedule=one_shot(.2))])
    assert count(learn.model) == round(.6 * 566)
    learn.fit(1, .1)
    assert count(learn.model) == round(.6 * 566)


def test_a_later_callback_lets_come_back_what_an_earlier_one_pruned(make_learner):
    learn = make_learner()
    learn.fit(1, .1, cbs=SparsifyCallback(60, 'kernel'))
    callback = SparsifyCallback(60, schedule='dense_sparse_dense')
    learn.fit(2, .1, cbs=callback)
    assert all(mask.all() for mask in callback.sparsifier.masks.values())
    learn.fit(1, .1)
    with torch.no_grad(): learn.model[3].weight.fill_(1)
    learn.fit(1, .1)
    assert (learn.model[3].weight != 0).all()


def test_masks_of_ones_own_in_a_fit(make_learner):
    learn = make_learner()
    mask = torch.rand(8, 6, 3, 3) < .5
    learn.fit(2, .1, cbs=KeepSparse(masks={'3': mask}))
    assert torch.equal(learn.model[3].weight != 0, mask)
    with pytest.raises(ValueError, match="masks: got '4', expected one of 0, 3, 8"): learn.fit(1, cbs=KeepSparse(masks={'4': mask}))
    with pytest.raises(TypeError, match='masks: got Tensor, expected {name of a layer: bool tensor}'): KeepSparse(masks=mask)


@pytest.mark.parametrize('granularity', ['vector', 'kernel', 'filter', block(4, 3)], ids=str)
@pytest.mark.parametrize('sparsity', [5, 40, 80])
def test_masks_that_hold_scattered_zeros_are_counted(granularity, sparsity, net):
    sparsifier = Sparsifier(net, granularity, layers=[net[0], net[3]])
    for name in ('0', '3'):
        weight = sparsifier.layers[name].weight.data
        weight[torch.rand(weight.shape) < .1] = 0
    for more in (0, 10):
        sparsifier.sparsify_model(sparsity + more)
        for name, mask in sparsifier.masks.of.items():
            grouping, left = sparsifier.layers[name].grouping, sparsifier.layers[name].grouping.count(mask.keep)
            assert mask.left == int(mask.keep.sum())
            assert torch.equal(mask.counts(grouping), left)
