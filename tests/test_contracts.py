"One suite over every layer type × granularity × criterion × context × schedule: a new row in a table inherits all guarantees."
from copy import deepcopy
from fractions import Fraction
from itertools import product

import pytest
import torch
from conftest import convnet
from fastai.optimizer import SGD, Adam, OptimWrapper
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fasterai.callback import SparsifyCallback
from fasterai.context import CONTEXTS
from fasterai.criteria import CRITERIA
from fasterai.granularity import GRANULARITIES, block
from fasterai.schedule import SCHEDULES
from fasterai.sparsifier import Sparsifier

LEVELS = (0, 1, 33, 50, 90, 99, 100)
LAYERS = {
    'Linear': lambda: nn.Linear(12, 10),
    'Conv1d': lambda: nn.Conv1d(6, 10, 3),
    'Conv2d': lambda: nn.Conv2d(4, 10, (2, 3)),
    'Conv3d': lambda: nn.Conv3d(2, 5, (2, 1, 3)),
    'Conv2d grouped': lambda: nn.Conv2d(4, 10, 3, groups=2),
    'Conv2d depthwise': lambda: nn.Conv2d(6, 6, 3, groups=6),
    'ConvTranspose1d': lambda: nn.ConvTranspose1d(6, 10, 3),
    'ConvTranspose2d': lambda: nn.ConvTranspose2d(4, 10, (2, 3)),
    'ConvTranspose3d': lambda: nn.ConvTranspose3d(2, 5, (2, 1, 3)),
    'ConvTranspose2d grouped': lambda: nn.ConvTranspose2d(4, 10, 3, groups=2),
    'ConvTranspose1d depthwise': lambda: nn.ConvTranspose1d(6, 6, 3, groups=6),
    'Bilinear': lambda: nn.Bilinear(3, 4, 5),
    'Embedding': lambda: nn.Embedding(12, 10),
    'EmbeddingBag': lambda: nn.EmbeddingBag(12, 10),
    'MultiheadAttention': lambda: nn.MultiheadAttention(12, 3),
    'MultiheadAttention apart': lambda: nn.MultiheadAttention(12, 3, kdim=6, vdim=7),
    'RNN': lambda: nn.RNN(3, 4, bidirectional=True), 'RNNCell': lambda: nn.RNNCell(3, 4),
    'LSTM': lambda: nn.LSTM(3, 4, num_layers=2), 'LSTM projected': lambda: nn.LSTM(3, 6, proj_size=4, bidirectional=True),
    'LSTMCell': lambda: nn.LSTMCell(3, 4), 'GRU': lambda: nn.GRU(3, 4), 'GRUCell': lambda: nn.GRUCell(3, 4),
}
def together(layers): return [layers]
def apart(layers): return [[layer] for layer in layers]


COMPETE = {'global': together, 'local': apart, 'lamp': together, 'normalized': together, 'erk': together, 'er': together}  # who reaches the share together
SHAPES = [*GRANULARITIES, block(2, 3)]
WITHOUT_DATA = [name for name, row in CRITERIA.items() if not row.needs_data]  # the others: test_calibration.py
WAYS = [*product(SHAPES, ['magnitude'], ['global', 'local']), *product(['weight', 'filter'], WITHOUT_DATA, COMPETE), ('vector', 'gradient', 'global')]
may_be_nearly_empty = pytest.mark.filterwarnings('ignore:sparsity. .* (would have been left|has less than 1 %)')
ways = pytest.mark.parametrize('granularity, criteria, context', list(dict.fromkeys(WAYS)))


def test_every_context_is_under_contract():
    assert set(CONTEXTS) == {*COMPETE, 'uniform_plus', 'work'}  # what these allow depends on the layers: test_context.py, test_work.py


def pair(make):
    "Two layers of a type, the second of other values, with gradients; nothing need run through them."
    model = nn.Sequential(make(), make())
    for p in model.parameters(): p.grad = torch.randn_like(p)
    return model


def sparsifier_of(model, *choices, **more):
    "A Sparsifier that has what its criterion needs: steps are told where only they collect it."
    sparsifier = Sparsifier(model, *choices, **more)
    if not all(map(sparsifier.evidence.known, sparsifier.layers.values())): sparsifier.evidence.step()
    return sparsifier


def goes_whole(layer, job): return layer.grouping.one_layer and len(job) > 1
def zeros(layer): return int((layer.weight == 0).sum())


def check(sparsifier, sparsity, context):
    "The counts that the contract asks for: to the weight, or to the nearest group; one group a layer is kept below 100 %."
    share = Fraction(sparsity) / 100
    layers = list(sparsifier.layers.values())
    for job in COMPETE[context](layers):
        found, weights = sum(map(zeros, job)), sum(layer.weight.numel() for layer in job)
        size = max(layer.grouping.size for layer in job)
        most = weights if share == 1 else sum(layer.weight.numel() - layer.grouping.size * (not goes_whole(layer, job)) for layer in job)
        if share < 1 and goes_whole(job[0], job): most -= size  # the best of them stays
        wanted = min(round(share * weights), most)
        if size == 1: assert found == wanted
        else:
            slack = size * len(job) if context in ('erk', 'er') else Fraction(size, 2)  # there each layer for itself
            assert min(share * weights, most) - slack <= found <= share * weights + slack
    for layer in layers:
        mask = sparsifier.masks[layer.name]
        assert torch.equal(layer.weight != 0, mask)
        assert sparsifier.masks.left(layer.name) == int(mask.sum())
        whole = layer.grouping.count(mask)
        assert ((whole == 0) | (whole == layer.grouping.sizes)).all()  # groups die whole
        if share < 1: assert mask.any() or goes_whole(layer, layers) and context not in ('local', 'erk', 'er')


def check_masks(sparsifier, sparsity, context):
    "What came back may be zero still, where no gradient has reached it: so not the zeros are counted, but the masks."
    layers = list(sparsifier.layers.values())
    for layer in layers: assert not layer.weight[~sparsifier.masks[layer.name]].any()
    for job in COMPETE[context](layers):
        masked = sum(int((~sparsifier.masks[layer.name]).sum()) for layer in job)
        if max(layer.grouping.size for layer in job) == 1: assert masked == round(Fraction(sparsity) / 100 * sum(layer.weight.numel() for layer in job))


@may_be_nearly_empty
@pytest.mark.parametrize('kind', LAYERS)
@ways
def test_counts_and_what_is_left_alone(kind, granularity, criteria, context):
    fresh = pair(LAYERS[kind])
    for sparsity in LEVELS:
        model = deepcopy(fresh)
        for p, q in zip(model.parameters(), fresh.parameters()): p.grad = q.grad.clone()
        keys, classes, identity = list(model.state_dict()), [type(m) for m in model.modules()], [id(p) for p in model.parameters()]
        sparsifier = sparsifier_of(model, granularity, context, criteria, layers=['0', '1'])
        torch.manual_seed(0)  # for the random criterion
        sparsifier.sparsify_model(sparsity)
        check(sparsifier, sparsity, context)
        assert list(model.state_dict()) == keys and [type(m) for m in model.modules()] == classes
        assert [id(p) for p in model.parameters()] == identity and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        for (name, p), q in zip(model.named_parameters(), fresh.parameters()):
            assert torch.equal(p.grad, q.grad)
            untouched = 'bias' in name and not any(layer.filters for layer in sparsifier.layers.values()) or sparsity == 0
            if untouched: assert torch.equal(p, q)
            else: assert torch.equal(p[p != 0], q[p != 0])  # zero or as it was
        twin = deepcopy(fresh)
        for p, q in zip(twin.parameters(), fresh.parameters()): p.grad = q.grad.clone()
        torch.manual_seed(0)
        sparsifier_of(twin, granularity, context, criteria, layers=['0', '1']).sparsify_model(sparsity)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters()))


@may_be_nearly_empty
@pytest.mark.parametrize('weights', [1, 2, 3, 1000])
@pytest.mark.parametrize('equal', [False, True], ids=['random', 'equal'])
@ways
def test_small_and_equal_tensors(weights, equal, granularity, criteria, context):
    for sparsity in LEVELS:
        model = pair(lambda: nn.Linear(1, weights))
        for p in model.parameters():
            if equal: p.data.fill_(.5), p.grad.fill_(.5)
        sparsifier = sparsifier_of(model, granularity, context, criteria, layers=['0', '1'])
        sparsifier.sparsify_model(sparsity)
        check(sparsifier, sparsity, context)


@may_be_nearly_empty
@ways
@settings(max_examples=20, deadline=None)
@given(shape=st.tuples(*[st.integers(1, 5)] * 4), sparsity=st.one_of(st.just(0), st.floats(1, 100)), seed=st.integers(0, 99))
def test_any_shape_and_sparsity(granularity, criteria, context, shape, sparsity, seed):
    torch.manual_seed(seed)
    out, into, *kernel = shape
    model = pair(lambda: nn.Conv2d(into, out, kernel))
    sparsifier = sparsifier_of(model, granularity, context, criteria, layers=['0', '1'])
    sparsifier.sparsify_model(sparsity)
    check(sparsifier, Fraction(str(sparsity)), context)


@ways
def test_masks_only_shrink(granularity, criteria, context):
    model = pair(LAYERS['Conv2d'])
    sparsifier = sparsifier_of(model, granularity, context, criteria, layers=['0', '1'])
    before = {n: sparsifier.masks[n].clone() for n in sparsifier.layers}
    for sparsity in (10, 40, 30, 40, 70, 5, 90):
        for p in model.parameters():
            p.data += torch.randn_like(p) * .1  # as an optimiser would, dead weights too
            p.grad = torch.randn_like(p)
        if sparsity > 30: sparsifier.evidence.step()  # else the gradient that is there counts
        sparsifier.sparsify_model(sparsity)
        for n, layer in sparsifier.layers.items():
            mask = sparsifier.masks[n]
            assert not (mask & ~before[n]).any()
            assert torch.equal(layer.weight != 0, mask)
            assert sparsifier.masks.left(n) == int(mask.sum())
            before[n] = mask.clone()
    check(sparsifier, 90, context)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('memory', [torch.contiguous_format, torch.channels_last], ids=['contiguous', 'channels_last'])
@ways
def test_types_and_layouts(dtype, memory, granularity, criteria, context):
    fresh = nn.Sequential(nn.Conv2d(4, 16, 3), nn.Conv2d(16, 16, 3)).to(dtype)
    grads = [torch.randn_like(p) for p in fresh.parameters()]

    def run(memory):
        model = deepcopy(fresh).to(memory_format=memory)
        for p, g in zip(model.parameters(), grads): p.grad = g.clone()
        sparsifier = sparsifier_of(model, granularity, context, criteria, layers=['0', '1'])
        torch.manual_seed(0)  # for the random criterion
        sparsifier.sparsify_model(90)
        check(sparsifier, 90, context)
        assert all(p.dtype == dtype for p in model.parameters())
        return model
    model, plain = run(memory), run(torch.contiguous_format)
    assert model[1].weight.is_contiguous(memory_format=memory)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters()))


OPTIMIZERS = {
    'SGD': lambda params, lr: SGD(params, lr=lr, mom=.9, wd=.1),
    'Adam': lambda params, lr: Adam(params, lr=lr, wd=.1),
    'AdamW': lambda params, lr: OptimWrapper(params, torch.optim.AdamW, lr=lr),
}


@pytest.mark.parametrize('schedule', SCHEDULES)
@ways
def test_training(schedule, granularity, criteria, context, make_learner):
    "Reaches the target at the end of the fit; the column in the table is what is measured."
    learn = make_learner(convnet())
    layers = ['0', '3', '8']
    callback = SparsifyCallback(75, granularity, context, criteria, schedule, layers)
    keys = list(learn.model.state_dict())
    learn.fit(2, lr=.01, cbs=callback)
    if schedule == 'dense_sparse_dense': assert all(callback.sparsifier.masks[n].all() for n in callback.sparsifier.layers)  # all may move again
    elif schedule in ('acdc', 'rigl'): check_masks(callback.sparsifier, 75, context)
    else: check(callback.sparsifier, 75, context)
    assert list(learn.model.state_dict()) == keys
    assert learn.recorder.metric_names[-2] == 'sparsity' and learn.recorder.values[-1][-1] == callback.sparsifier.report().sparsity


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@ways
def test_zeros_hold_after_every_step(optimizer, granularity, criteria, context, make_learner):
    class Look(SparsifyCallback):
        order, seen = 90, []
        def after_step(self):
            super().after_step()
            self.seen.append(all(torch.equal(layer.weight == 0, ~self.sparsifier.masks[n]) for n, layer in self.sparsifier.layers.items()))
    learn = make_learner(convnet(), opt_func=OPTIMIZERS[optimizer])
    Look.seen = []
    learn.fit(2, lr=.01, cbs=Look(75, granularity, context, criteria, 'one_shot', ['0', '3', '8']))
    assert Look.seen == [True] * 8
