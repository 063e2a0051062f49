"Evidence from data: compared with sums written out, gathered anew for each event, and without a trace on the model."
import random
import warnings
import weakref
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import convnet
from torch import nn
from torch.nn import functional as F

from fasterai import curvature, evidence
from fasterai.context import within
from fasterai.criteria import CRITERIA
from fasterai.granularity import block
from fasterai.inputs import as_matrix
from fasterai.kinds import EVIDENCE
from fasterai.sparsifier import Sparsifier

LOSS = F.cross_entropy


def batches(n=3, size=8, shape=(1, 8, 8)): return [(torch.randn(size, *shape), torch.randint(0, 10, (size,))) for _ in range(n)]


def evidence_of(model, kind, layer, data, **kwargs):
    "What an event sees of one layer."
    seen = {}
    scope = {'seen': seen}
    exec(f'def criterion(weight, {kind}, name):\n    seen[name] = {kind}\n    return weight.abs()', scope)
    Sparsifier(model, criteria=scope['criterion'], data=data, **kwargs).sparsify_layer(layer, 50)
    return seen[layer]


# ---- What layers read

LAYERS = {
    'linear': (nn.Linear(6, 4), (6,)),
    'conv': (nn.Conv2d(2, 4, 3, stride=2, padding=1), (2, 7, 7)),
    'dilated': (nn.Conv2d(2, 4, 3, dilation=2), (2, 7, 7)),
    'grouped': (nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5)),
    'conv1d': (nn.Conv1d(3, 2, 3, padding='same'), (3, 9)),
    'transposed': (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (4, 5, 5)),
}


def jacobian(layer, x):
    "What each weight of one output is multiplied by at each place of it: (outputs, places, weights of all)."
    weight = layer.weight.detach().clone().requires_grad_()
    def out(w): return torch.func.functional_call(layer, {'weight': w, 'bias': torch.zeros_like(layer.bias)}, x)
    axis = 1
    j = torch.autograd.functional.jacobian(out, weight)  # (n, O, …, weight)
    return j.movedim(axis, 0).flatten(1, x.ndim - 1 if x.ndim > 2 else 1).flatten(2)


@pytest.mark.parametrize('name', LAYERS)
def test_the_norm_of_inputs_is_that_of_what_each_weight_is_multiplied_by(name):
    layer, shape = deepcopy(LAYERS[name][0]), LAYERS[name][1]
    x = torch.randn(3, *shape)
    norm = evidence_of(nn.Sequential(layer), 'input_norm', '0', [x], layers='0')
    expected = jacobian(layer, x).square().sum((0, 1)).sqrt().view(layer.weight.shape)
    assert norm.shape == layer.weight.shape and torch.allclose(norm, expected, atol=1e-4)


@pytest.mark.parametrize('name', LAYERS)
def test_the_gram_matrix_is_the_error_of_the_output(name):  # ‖X d‖² = d G d, for any change d of the weight
    layer, shape = deepcopy(LAYERS[name][0]), LAYERS[name][1]
    x = torch.randn(3, *shape)
    gram = evidence_of(nn.Sequential(layer), 'gram', '0', [x[:1], x[1:]], layers='0')
    assert gram.ndim == (3 if name in ('grouped', 'transposed') else 2)
    form = getattr(layer, 'groups', 1), name == 'transposed'
    d = torch.randn_like(layer.weight)
    changed = torch.func.functional_call(layer, {'weight': d, 'bias': torch.zeros_like(layer.bias)}, x)
    rows = as_matrix(d, *form)
    quadratic = (rows @ gram.view(form[0], *gram.shape[-2:]) * rows).sum()
    assert torch.allclose(quadratic, changed.square().sum(), rtol=1e-4)


def test_padded_tokens_are_left_out():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc = nn.Embedding(20, 4), nn.Linear(4, 3)

        def forward(self, input_ids, attention_mask): return self.fc(self.embed(input_ids))
    model, ids, mask = Reader(), torch.randint(0, 20, (2, 5)), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    gram = evidence_of(model, 'gram', 'fc', [{'input_ids': ids, 'attention_mask': mask}], layers='fc')
    x = model.embed(ids)[mask.bool()].detach()
    assert len(x) == 8 and torch.allclose(gram, x.T @ x, atol=1e-5)


def test_tied_layers_are_seen_at_each_place():
    layer, x = nn.Linear(4, 4, bias=False), torch.randn(5, 4)
    inner = layer(x).detach()
    gram = evidence_of(nn.Sequential(layer, layer), 'gram', '0', [x], layers='0')
    assert torch.allclose(gram, x.T @ x + inner.T @ inner, atol=1e-4)


# ---- Gradients

def sample_grads(model, data):
    "The gradient of the loss of each sample, of the first layer's weight."
    model = deepcopy(model).eval()
    grads = []
    for x, y in data:
        for i in range(len(x)):
            model.zero_grad()
            LOSS(model(x[i:i + 1]), y[i:i + 1]).backward()
            grads.append(model[0].weight.grad.clone())
    return torch.stack(grads)


def test_the_diagonal_of_the_fisher_information_is_by_samples(net):
    data = batches()
    grads = sample_grads(net, data)
    squares = evidence_of(net, 'grad_squares', '0', data, loss_func=LOSS)
    assert torch.allclose(squares, grads.square().mean(0), rtol=1e-4)
    assert not torch.allclose(squares, grads.mean(0).square(), rtol=.5)


def test_samples_without_a_gradient_count(net):
    data = [(torch.randn(16, 6), torch.zeros(16))]
    def loss(out, y): return F.relu(out[:, 0] - y).sum()  # zero for some samples
    model = nn.Sequential(nn.Linear(6, 2))
    x = data[0][0]
    active = (model(x)[:, 0] > 0).float()[:, None]
    assert 0 < active.sum() < len(x)
    squares = evidence_of(model, 'grad_squares', '0', data, loss_func=loss)
    assert torch.allclose(squares[0], (active * x).square().mean(0), rtol=1e-4)


def test_the_fisher_information_by_rows(net):
    data = batches(1)
    grads = sample_grads(net, data).flatten(2)  # (samples, outputs, inputs)
    rows = evidence_of(net, 'fisher_rows', '0', data, loss_func=LOSS)
    assert torch.allclose(rows, torch.einsum('soi,soj->oij', grads, grads) / 8, atol=1e-6)


def test_the_fisher_information_by_blocks():
    "200 weights are a block of 128, and one of 72 that is filled up with zeros."
    model, data = nn.Sequential(nn.Linear(20, 10)), [(torch.randn(3, 20), torch.randint(10, (3,)))]
    grads = torch.stack([torch.autograd.grad(LOSS(model(x[None]), y[None]), model[0].weight)[0].flatten() for x, y in zip(*data[0])])
    blocks = evidence_of(model, 'fisher_blocks', '0', data, layers='0', loss_func=LOSS)
    fisher = grads.T @ grads / 3
    assert blocks.shape == (2, 128, 128) and torch.allclose(blocks[0], fisher[:128, :128], atol=1e-7)
    assert torch.allclose(blocks[1, :72, :72], fisher[128:, 128:], atol=1e-7) and not blocks[1, 72:].any()
    small = nn.Sequential(nn.Linear(2, 3))
    assert evidence_of(small, 'fisher_blocks', '0', [(torch.randn(3, 2), torch.randint(3, (3,)))], layers='0', loss_func=LOSS).shape == (1, 6, 6)


def test_the_mean_saliency_of_batches_needs_no_step(net):
    data = batches()
    net.eval()
    expected = 0
    for x, y in data:
        grad, = torch.autograd.grad(LOSS(net(x), y), net[0].weight)
        expected = expected + (grad * net[0].weight).abs().detach() / 3
    assert torch.allclose(evidence_of(net, 'saliency', '0', data, loss_func=LOSS), expected, rtol=1e-4)
    assert all(p.grad is None for p in net.parameters())


def test_data_take_the_place_of_the_gradient_that_is_there(net):
    data = batches(1)
    LOSS(net(data[0][0]), data[0][1]).backward()
    for p in net.parameters(): p.grad.fill_(1.)
    net.eval()
    expected, = torch.autograd.grad(LOSS(net(data[0][0]), data[0][1]), net[0].weight)
    assert torch.allclose(evidence_of(net, 'grad', '0', data, loss_func=LOSS), expected, atol=1e-6)
    assert all((p.grad == 1).all() for p in net.parameters())


def test_a_batch_without_label_has_a_loss_of_the_output_alone():
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(5, 3)
    squares = evidence_of(model, 'grad_squares', '0', [x], loss_func=lambda out: out.sum())
    assert torch.allclose(squares, x.square().mean(0).expand(2, 3), rtol=1e-5)


def test_frozen_layers_can_be_measured_and_stay_frozen(net):
    net[0].requires_grad_(False)
    squares = evidence_of(net, 'grad_squares', '0', batches(), loss_func=LOSS)
    assert squares.any() and not net[0].weight.requires_grad


# ---- Without a trace

def state_of(model): return [(m.training, dict(m.__dict__.get('_forward_hooks', {}))) for m in model.modules()]


@pytest.mark.parametrize('criterion', ['wanda', 'sparsegpt', 'obd', 'obs', 'synflow', 'gradient', 'alps'])
def test_the_model_is_left_as_it_was(net, criterion):
    class Noisy(nn.Module):
        def forward(self, x): return x + 0 * torch.rand_like(x) + 0 * random.random() + 0 * np.random.rand()
    model = nn.Sequential(*net, Noisy())
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    modes, buffers = state_of(model), [b.clone() for b in model.buffers()]
    sparsifier = Sparsifier(model, criteria=criterion, layers=['3', '8'], data=batches(), loss_func=LOSS)
    rng = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    sparsifier.sparsify_model(50)
    assert state_of(model) == modes and all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers))
    assert torch.equal(torch.get_rng_state(), rng[0]) and random.getstate() == rng[1]
    assert np.array_equal(np.random.get_state()[1], rng[2])
    assert not model[0].weight.requires_grad and model[3].weight.grad.shape == model[3].weight.shape
    assert model[0].weight.grad is None


def test_a_module_of_two_names_keeps_its_parameters():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    before, shared.bias.requires_grad = dict(model.named_parameters()), False
    Sparsifier(model, criteria='synflow', example=torch.ones(1, 4)).sparsify_model(50)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert not shared.bias.requires_grad and int((shared.weight == 0).sum()) == 8


class Counting(nn.Module):
    "A module whose calls put another tensor in the place of a buffer, and change one."

    def __init__(self):
        super().__init__()
        self.register_buffer('calls', torch.zeros(()))
        self.register_buffer('seen', torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        self.seen += len(x)
        return x


@pytest.mark.parametrize('repair', [None, 'refit', 'batchnorm'])
@pytest.mark.parametrize('criterion', ['wanda', 'obd', 'synflow'])
def test_buffers_that_a_pass_replaces_are_put_back(criterion, repair):
    model = nn.Sequential(convnet(), Counting())
    counting, before = model[1], dict(model.named_buffers())
    sparsifier = Sparsifier(model, criteria=criterion, data=batches(), loss_func=LOSS, repair=repair)
    sparsifier.sparsify_model(50)
    assert all(before[name] is buffer for name, buffer in model.named_buffers())
    assert counting.calls == counting.seen == 0


@pytest.mark.parametrize('granularity', ['weight', 'filter'])
def test_a_function_may_work_in_place_on_what_it_gets(granularity):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    sparsifier = Sparsifier(model, granularity, criteria=lambda input_norm: input_norm.add_(1), layers='0', data=torch.randn(8, 4))
    sparsifier.sparsify_model(50)
    assert sparsifier.sparsity == 50


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
@pytest.mark.parametrize('criterion', ['sparsegpt', 'alps', lambda gram, weight: weight / torch.linalg.inv(gram).sum()])
def test_a_matrix_that_is_not_finite_is_named(criterion, bad):
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(8, 4)
    x[1, 2] = bad
    with pytest.raises(ValueError, match="criteria: the gram of layer '0' has NaN or infinite entries; nothing was changed"):
        Sparsifier(model, criteria=criterion, data=x).sparsify_model(50)


class Failing(list):
    "Batches of which the last one is an interruption."
    def __iter__(self):
        yield from super().__iter__()
        raise KeyboardInterrupt


@pytest.mark.parametrize('criterion', ['wanda', 'sparsegpt', 'obs'])
def test_an_interruption_leaves_all_as_it_was(net, criterion):
    sparsifier = Sparsifier(net, criteria=criterion, data=Failing(batches()), loss_func=LOSS)
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(KeyboardInterrupt): sparsifier.sparsify_model(50)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before))
    assert sparsifier.sparsity == 0 and not sparsifier.evidence.states and net.training
    sparsifier.repairs.data = sparsifier.evidence.calibration.data = batches()
    sparsifier.sparsify_model(50)
    assert sparsifier.sparsity == pytest.approx(50, abs=.2)


def test_a_loss_that_fails_midway_leaves_all_as_it_was(net):
    calls = []
    def loss(out, y):
        calls.append(1)
        if len(calls) == 5: raise RuntimeError('midway')
        return LOSS(out, y)
    net[0].weight.requires_grad_(False)
    sparsifier = Sparsifier(net, criteria='obd', data=batches(), loss_func=loss)
    with pytest.raises(RuntimeError, match='midway'): sparsifier.sparsify_model(50)
    assert sparsifier.sparsity == 0 and net.training and not net[0].weight.requires_grad
    assert not sparsifier.evidence.states


def test_evidence_is_gathered_anew_for_each_event_and_not_kept(net):
    data = batches()
    sparsifier = Sparsifier(net, criteria='wanda', data=data)
    seen = []
    class Data(list):
        def __iter__(self):
            seen.append(1)
            return super().__iter__()
    sparsifier.evidence.calibration.data = Data(data)
    for share in (.3, .6, .9): sparsifier.sparsify_model(90, share)
    assert len(seen) == 3 and not sparsifier.evidence.states


@pytest.mark.parametrize('held, passes, together', [(0, [1, 1, 1], 2), (8 * (9 ** 2 + 54 ** 2), [2, 1], 3), (2 ** 27, [3], 4)])
def test_as_many_large_matrices_are_in_memory_as_may_be_held(net, monkeypatch, held, passes, together):
    "One more is the new one, while the old one is let go."
    monkeypatch.setattr(evidence, 'HELD', held)
    gathered, from_data = [], evidence.Evidence._from_data

    def counted(self, name, layers):
        if name == 'gram': gathered.append(len(layers))
        return from_data(self, name, layers)
    monkeypatch.setattr(evidence.Evidence, '_from_data', counted)
    alive, most, real = set(), [], EVIDENCE['gram'].on_input

    def add(layer, state, read):
        new = real(layer, state, read)
        alive.add(id(new.total))
        weakref.finalize(new.total, alive.discard, id(new.total))
        most.append(len(alive))
        return new
    monkeypatch.setitem(EVIDENCE, 'gram', replace(EVIDENCE['gram'], on_input=add))
    Sparsifier(net, criteria='sparsegpt', data=batches(1)).sparsify_model(50)
    assert len(most) == 3 and max(most) <= together and gathered == passes


def test_large_matrices_that_are_gathered_together_are_the_same(net, monkeypatch):
    found, data = [], batches()
    for held in 0, 2 ** 27:
        monkeypatch.setattr(evidence, 'HELD', held)
        sparsifier = Sparsifier(deepcopy(net), criteria='sparsegpt', data=data)
        sparsifier.sparsify_model(50)
        assert not sparsifier.evidence.held and not sparsifier.evidence.ahead
        found.append([p.detach() for p in sparsifier.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found))


# ---- Bad input

def test_what_is_needed_is_said_at_the_door(net):
    with pytest.raises(ValueError, match="data: got None, expected batches with criteria='obs'"): Sparsifier(net, criteria='obs')
    with pytest.raises(ValueError, match="data: got None, expected batches with criteria='alps'"): Sparsifier(net, criteria='alps')
    with pytest.raises(ValueError, match='loss_func: got None, expected a function of output and label'):
        Sparsifier(net, criteria='obd', data=batches())
    with pytest.raises(TypeError, match="loss_func: got 'mse'"): Sparsifier(net, criteria='obd', data=batches(), loss_func='mse')
    with pytest.raises(ValueError, match='input_norm is needed and no layer has any: give batches with data='):
        Sparsifier(net, criteria='wanda').sparsify_model(50)
    with pytest.raises(ValueError, match='example: got None, expected one batch of inputs'):
        Sparsifier(net, criteria='synflow').sparsify_model(50)
    with pytest.raises(ValueError, match='whose tensors differ in length'):
        Sparsifier(net, criteria='obd', data=[(torch.randn(4, 1, 8, 8), torch.zeros(3).long())], loss_func=LOSS).sparsify_model(50)


@pytest.mark.parametrize('wrong', [5, 'abc', {'x': torch.ones(2)}, nn.Linear(2, 2)])
def test_what_are_no_batches_is_refused_at_the_door(net, wrong):
    with pytest.raises(TypeError, match=f'data: got {type(wrong).__name__}, expected batches: a DataLoader'):
        Sparsifier(net, criteria='wanda', data=wrong)


@pytest.mark.parametrize('loss, came', [
    (lambda out, y: F.cross_entropy(out, y, reduction='none'), r'a tensor of shape \(8,\)'),
    (lambda out, y: 3., '3.0'),
    (lambda out, y: F.cross_entropy(out.detach(), y), r'a tensor of shape \(\) without a gradient'),
])
def test_a_loss_without_a_gradient_is_refused(net, loss, came):
    sparsifier = Sparsifier(net, criteria='gradient', data=batches(), loss_func=loss)
    with pytest.raises(ValueError, match=f'loss_func: got {came} from <lambda>, expected a tensor of one number'):
        sparsifier.sparsify_model(50)
    assert sparsifier.sparsity == 0


def test_after_a_move_the_new_example_counts():
    model = nn.Linear(4, 4)
    sparsifier = Sparsifier(model, criteria='synflow')
    sparsifier.move_to(deepcopy(model), example=torch.ones(1, 4))
    sparsifier.sparsify_model(50)
    assert sparsifier.sparsity == 50


def test_a_layer_whose_inputs_cannot_be_seen_waits():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.fc = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 2)

        def forward(self, x): return self.fc(self.lstm(x)[0])
    for criterion in ('wanda', 'sparsegpt'):
        sparsifier = Sparsifier(Recurrent(), criteria=criterion, layers=['lstm', 'fc'], data=[torch.randn(2, 5, 4)])
        with pytest.warns(UserWarning, match='waits'): change = sparsifier.sparsify_model(50)
        assert 'fc' not in change.waiting and change.waiting


# ---- Optimal Brain Surgeon

def fisher(model, data):
    "The whole Fisher information of all weights, damped."
    grads = []
    for x, y in data:
        for i in range(len(x)):
            found = torch.autograd.grad(LOSS(model(x[i:i + 1]), y[i:i + 1]), [model[0].weight, model[2].weight])
            grads.append(torch.cat([g.flatten() for g in found]).double())
    h = torch.stack(grads).T @ torch.stack(grads)
    return h + curvature.DAMPING * h.diagonal().mean() * torch.eye(len(h))


def small(): return nn.Sequential(nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 10, bias=False))


def test_the_surgeon_removes_the_weight_of_least_saliency_and_adjusts_the_others():
    model, data = small(), batches(2, 8, (5,))
    inverse = torch.linalg.inv(fisher(model, data))
    w = torch.cat([model[0].weight.flatten(), model[2].weight.flatten()]).detach().double()
    q = int((w.square() / (2 * inverse.diagonal())).argmin())
    expected = w - w[q] / inverse[q, q] * inverse[:, q]  # Hassibi & Stork, equation 5
    expected[q] = 0
    sparsifier = Sparsifier(model, criteria='obs', layers=['0', '2'], data=data, loss_func=LOSS)
    sparsifier.sparsify_model(100 / 60)
    found = torch.cat([model[0].weight.flatten(), model[2].weight.flatten()]).detach()
    assert torch.allclose(found.double(), expected, atol=1e-4)
    assert (found == 0).nonzero().flatten().tolist() == [q]


def test_the_surgeon_leaves_pruned_weights_alone_and_a_loss_by_second_order_is_least():
    model, data = small(), batches(2, 8, (5,))
    sparsifier = Sparsifier(model, criteria='obs', layers=['0', '2'], data=data, loss_func=LOSS)
    sparsifier.sparsify_model(20)
    first = sparsifier.masks['0'].clone(), sparsifier.masks['2'].clone()
    h, w = fisher(model, data), torch.cat([model[0].weight.flatten(), model[2].weight.flatten()]).detach().double()
    sparsifier.sparsify_model(50)
    after = torch.cat([model[0].weight.flatten(), model[2].weight.flatten()]).detach().double()
    assert not (model[0].weight[~first[0]].any() or model[2].weight[~first[1]].any())
    stay = after != 0
    gradient = (h @ (after - w))[stay]  # it is a minimum over the weights that stay
    assert gradient.abs().max() < 1e-3 * (h @ w)[stay].abs().max()


def test_blocks_of_neighbours_are_as_the_whole_where_they_do_not_touch(monkeypatch):
    "The loss of a sample is that of one output, so that the Fisher information is a block for each row."
    data = [(torch.randn(40, 5), torch.arange(40) % 4)]
    def loss(out, y): return out[0, y[0]] ** 2
    fresh, found = nn.Sequential(nn.Linear(5, 4, bias=False)), []
    for whole in (20, 19):
        monkeypatch.setattr(curvature, 'WHOLE', whole)
        monkeypatch.setattr(curvature, 'BLOCK', 5)
        model = deepcopy(fresh)
        Sparsifier(model, criteria='obs', layers='0', data=data, loss_func=loss).sparsify_model(50)
        found.append(model[0].weight.detach())
    assert not torch.allclose(found[0][found[0] != 0], fresh[0].weight.detach()[found[0] != 0], rtol=1e-2)  # they were adjusted
    assert torch.equal(found[0] == 0, found[1] == 0) and torch.allclose(found[0], found[1], rtol=1e-3)


def test_nothing_moves_at_0_percent(net):
    before = [p.detach().clone() for p in net.parameters()]
    for criterion in ('obs', 'sparsegpt', 'alps', 'wanda', 'synflow'):
        Sparsifier(net, criteria=criterion, data=batches(), loss_func=LOSS).sparsify_model(0)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before))


WITH_DATA = [name for name, row in CRITERIA.items() if row.needs_data]


@pytest.mark.parametrize('criterion', WITH_DATA)
@pytest.mark.parametrize('context', ['global', 'local', 'erk', 'lamp', 'normalized', '2:4', within('O')], ids=str)
def test_counts_are_exact_by_criteria_of_data(criterion, context):
    model, data = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 16)), batches(2, 6, (4, 4, 4))
    sparsifier = Sparsifier(model, 'weight', context, criterion, layers=['0', '3'], data=data, loss_func=LOSS)
    change = sparsifier.sparsify_model(50)
    assert sum(int((layer.weight == 0).sum()) for layer in sparsifier.layers.values()) == (8 * 36 + 16 * 32) / 2
    assert all(torch.equal(sparsifier.masks[n], layer.weight != 0) for n, layer in sparsifier.layers.items())
    assert not change.waiting


@pytest.mark.filterwarnings('ignore:sparsity. .* (would have been left|has less than 1 %)')
@pytest.mark.parametrize('criterion', WITH_DATA)
@pytest.mark.parametrize('granularity', ['vector', 'kernel', 'filter', 'channel', block(2, 2)], ids=str)
def test_groups_are_pruned_whole_by_criteria_of_data(criterion, granularity):
    model, data = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10)), batches(2, 6, (4, 4, 4))
    sparsifier = Sparsifier(model, granularity, 'local', criterion, layers=['0', '3'], data=data, loss_func=LOSS, example=data[0][0])
    sparsifier.sparsify_model(50)
    for layer in sparsifier.layers.values():
        left = layer.grouping.count(sparsifier.masks[layer.name])
        assert ((left == 0) | (left == layer.grouping.size)).all()
        assert abs(int((left == 0).sum()) - layer.grouping.groups / 2) <= .5



def test_a_compiled_network_is_calibrated_by_the_one_inside():
    plain, data = convnet(), batches()
    compiled = torch.compile(deepcopy(plain), backend='eager')
    for model in (plain, compiled): Sparsifier(model, criteria='wanda', data=data, repair='refit').sparsify_model(60)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), compiled.parameters()))


def attention(query, memory):
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x): return self.attention(query(x), memory(x), memory(x))[0]
    return Attends()


@pytest.mark.parametrize('memory', [lambda x: x, lambda x: x[:, :3] * 2 + 1], ids=['self', 'cross'])
def test_the_projections_of_attention_are_seen(memory):
    x = torch.randn(4, 5, 8)
    queries, keys = x.flatten(0, 1), memory(x).flatten(0, 1)
    norms = [queries.norm(dim=0), keys.norm(dim=0), keys.norm(dim=0)]
    model = attention(lambda x: x if memory(x) is x else x * 1, memory)
    norm = evidence_of(model, 'input_norm', 'attention.in_proj_weight', [x], layers='attention.in_proj_weight')
    assert torch.allclose(norm, torch.stack(norms).repeat_interleave(8, 0), rtol=1e-4)
    for criterion in ('wanda', 'sparsegpt', 'alps'):
        sparsifier = Sparsifier(attention(lambda x: x if memory(x) is x else x * 1, memory), criteria=criterion,
                                layers='attention', data=[x, x + 1])
        sparsifier.sparsify_model(50)
        assert sparsifier.sparsity == 50


def test_a_batch_runs_no_further_than_the_layer_that_is_looked_at():
    seen = []
    class Noted(nn.Module):
        def forward(self, x):
            seen.append(len(x))
            return x
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), Noted(), nn.Linear(4, 4))
    data = [torch.randn(n, 4) for n in (3, 5, 7)]
    gram = evidence_of(model, 'gram', '0', data, layers='0')
    assert torch.allclose(gram, torch.cat(data).T @ torch.cat(data), atol=1e-4)
    assert 3 in seen and 5 not in seen and 7 not in seen  # the first batch shows how often it is called


def test_the_fisher_information_of_a_transposed_convolution_is_by_outputs():
    model, data = nn.Sequential(nn.ConvTranspose2d(2, 3, 2)), [torch.randn(4, 2, 3, 3)]
    rows = evidence_of(model, 'fisher_rows', '0', data, loss_func=lambda out: (out * torch.tensor([1., 2, 0])[:, None, None]).sum())
    assert rows.shape == (3, 8, 8)
    assert torch.allclose(rows[1], 4 * rows[0], rtol=1e-4) and not rows[2].any()


def test_half_precision_is_scored_as_tensors():
    for dtype in (torch.float16, torch.bfloat16):
        model = nn.Sequential(nn.Linear(8, 4)).to(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            sparsifier = Sparsifier(model, criteria='wanda', layers='0', data=[torch.randn(5, 8).to(dtype)])
            sparsifier.sparsify_model(50)
        assert sparsifier.sparsity == 50


def test_a_batch_without_the_label_that_the_loss_takes(net):
    sparsifier = Sparsifier(net, criteria='obd', data=[torch.randn(4, 1, 8, 8)], loss_func=LOSS)
    with pytest.raises(ValueError, match='data: got a batch without a label, which cross_entropy takes'): sparsifier.sparsify_model(50)
    sparsifier = Sparsifier(net, criteria='obd', data=[torch.randn(4, 1, 8, 8)], loss_func=nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match='data: got a batch without a label'): sparsifier.sparsify_model(50)


@pytest.mark.parametrize('criterion', ['wanda', 'ria', 'sparsegpt', 'alps'])
def test_layers_compare_whatever_the_scale_of_their_inputs(criterion):
    class Scaled(nn.Module):
        def __init__(self, scale):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.scale = nn.Linear(12, 12), nn.Linear(12, 12), scale

        def forward(self, x): return self.b(self.a(x) * self.scale)
    masks, data = [], [torch.randn(60, 12)]
    for scale in (1, 100):
        sparsifier = Sparsifier(Scaled(scale), criteria=criterion, layers=['a', 'b'], data=data)
        sparsifier.sparsify_model(60)
        masks.append(dict(sparsifier.masks))
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in 'ab')
