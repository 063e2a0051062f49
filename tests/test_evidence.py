"What a step and a layer's input tell, and when: of kinds of evidence that the tests make."
from types import SimpleNamespace

import pytest
import torch
from conftest import convnet
from fastai.callback.core import Callback
from torch import nn
from torch.nn import functional as F

from fasterai.callback import SparsifyCallback
from fasterai.evidence import EVIDENCE, Evidence, Kind
from fasterai.peers import ALONE
from fasterai.schedule import linear
from fasterai.sparsifier import Sparsifier

summed_grads = Kind(read=lambda layer, state: state, start=lambda layer: torch.zeros_like(layer.weight),
                    on_step=lambda layer, state: state + layer.weight.grad)
input_sums = Kind(read=lambda layer, state: state.expand_as(layer.weight), start=lambda layer: torch.zeros(()),
                  on_input=lambda layer, state, x: state + x.sum())


@pytest.fixture
def kinds(monkeypatch):
    monkeypatch.setitem(EVIDENCE, 'summed_grads', summed_grads)
    monkeypatch.setitem(EVIDENCE, 'input_sums', input_sums)


def by_grads(summed_grads): return summed_grads.abs()
def by_inputs(weight, input_sums): return weight.abs() + 0 * input_sums


def test_a_step_is_seen_before_gradients_are_masked(kinds):
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), .1)
    sparsifier = Sparsifier(model, criteria=by_grads, layers='0')
    model[0].weight.grad = torch.arange(16.).view(4, 4)
    sparsifier.evidence.step()
    sparsifier.sparsify_model(50)
    sparsifier.attach(optimizer)
    model[0].weight.grad = torch.ones(4, 4)
    optimizer.step()
    assert (sparsifier.evidence.of(sparsifier.layers['0'])['summed_grads'] == torch.arange(16.).view(4, 4) + 1).all()
    assert (model[0].weight.grad == 0).sum() == 8  # those were masked after it


def test_the_criterion_reads_what_was_collected(kinds):
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    sparsifier = Sparsifier(model, criteria=by_grads, layers='0')
    for grads in ([3., 0, 0, 5, 0, 0, 7, 8], [0., 1, 0, -5, 0, 0, 0, 0]):
        model[0].weight.grad = torch.tensor(grads).view(2, 4)
        sparsifier.evidence.step()
    sparsifier.sparsify_model(50)
    assert sparsifier.masks['0'].int().tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]


def test_the_callback_tells_each_step_once_and_before_its_event(kinds, make_learner):
    seen = []

    class Watch(Callback):
        order = SparsifyCallback.order - .01

        def before_step(self): seen.append(sum(float(p.grad.abs().sum()) for p in weights(self.learn.model)))
    learn = make_learner()
    callback = SparsifyCallback(50, criteria=by_grads, schedule=linear(0, 1))
    steps = []
    kind = Kind(summed_grads.read, summed_grads.start, lambda layer, state: steps.append(layer.name) or state + layer.weight.grad.abs())
    EVIDENCE['summed_grads'] = kind
    learn.fit(1, cbs=[callback, Watch()])
    layers = callback.sparsifier.layers
    total = sum(float(callback.sparsifier.evidence.of(layer)['summed_grads'].sum()) for layer in layers.values())
    assert total == pytest.approx(sum(seen), rel=1e-5)  # the gradients of pruned weights too
    assert steps == [*layers] * 4


def weights(model): return [p for p in model.parameters() if p.ndim > 1]


def test_inputs_are_seen_without_a_hook(kinds):
    model = convnet()
    sparsifier = Sparsifier(model, criteria=by_inputs)
    x = torch.randn(2, 1, 8, 8)
    with sparsifier.evidence.watching():
        model(x)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        F.conv2d(x, model[0].weight)
        F.conv2d(weight=model[0].weight, input=x)
        F.conv2d(x, torch.randn(1, 1, 3, 3))  # of no layer
    model(x)  # nobody looks any more
    sums = {n: float(sparsifier.evidence.states['input_sums', n]) for n in sparsifier.layers}
    assert sums['0'] == pytest.approx(3 * float(x.sum()), rel=1e-4)
    assert sums['8'] == pytest.approx(float(model[:8](x).sum()), rel=1e-4)


def test_what_nobody_asks_for_is_not_collected(kinds):
    model = convnet()
    sparsifier = Sparsifier(model)
    for p in model.parameters(): p.grad = torch.ones_like(p)
    sparsifier.evidence.step()
    with sparsifier.evidence.watching(): model(torch.randn(1, 1, 8, 8))
    assert sparsifier.evidence.states == {}


def test_evidence_of_another_shape_is_read_for_a_whole_layer(monkeypatch):
    monkeypatch.setitem(EVIDENCE, 'column', Kind(read=lambda layer, state: torch.tensor([5., 1, 3]), weight_shaped=False))

    def by_column(weight, column): return weight.abs() * column
    by_column.elementwise = True
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    nn.init.ones_(model[0].weight)
    sparsifier = Sparsifier(model, criteria=by_column, layers='0')
    sparsifier.sparsify_model(50)
    assert sparsifier.masks['0'].int().tolist() == [[1, 0, 0], [1, 0, 1]]  # the first of the two threes


def test_gradients_of_an_embedding_are_read_dense():
    layer = SimpleNamespace(name='a', weight=nn.Parameter(torch.ones(3, 2)))
    layer.weight.grad = torch.sparse_coo_tensor([[1]], [[5., 6]], (3, 2))
    assert Evidence(('grad',), None).of(layer)['grad'].tolist() == [[0, 0], [5, 6], [0, 0]]


def test_a_frozen_layer_has_nothing_to_tell(kinds):
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    sparsifier = Sparsifier(model, criteria=by_grads, layers=['0', '1'])
    model[0].weight.grad = torch.ones(2, 2)
    sparsifier.evidence.step()
    assert list(sparsifier.evidence.states) == [('summed_grads', '0')]


def test_evidence_that_was_never_collected_says_how_to_collect_it(kinds):
    with pytest.raises(ValueError, match="summed_grads is needed and no layer has any: a training step collects it"):
        Sparsifier(convnet(), criteria=by_grads).sparsify_model(50)
    with pytest.raises(ValueError, match="input_sums is needed and no layer has any: batches collect it"):
        Sparsifier(convnet(), criteria=by_inputs).sparsify_model(50)


def test_missing_evidence_says_how_to_supply_it():
    layers = [SimpleNamespace(name=n, weight=nn.Parameter(torch.ones(2))) for n in 'ab']
    evidence = Evidence(('weight', 'grad'), None)
    with pytest.raises(ValueError, match="grad is needed and no layer has any: call after loss.backward"):
        evidence.lacking(layers)
    layers[0].weight.grad = torch.ones(2)
    assert evidence.lacking(layers) == {'b'}
    layers[1].weight.grad = torch.zeros(2)
    assert evidence.lacking(layers) == {'b'}
    layers[1].weight.grad = torch.tensor([0., 1])
    assert evidence.lacking(layers) == set()


@pytest.mark.parametrize('grad, lacks', [(torch.tensor(0.), True), (torch.tensor(2.), False), (torch.zeros(3, 2), True), (torch.eye(3), False),
                                         (torch.cat([torch.zeros(4, 2), torch.ones(1, 2)]), False), (torch.zeros(0, 2), True)])
def test_a_gradient_that_is_all_zero_is_none(grad, lacks, monkeypatch):
    layers = [SimpleNamespace(name=n, weight=nn.Parameter(torch.zeros_like(g))) for n, g in (('a', torch.ones(1)), ('b', grad))]
    layers[0].weight.grad, layers[1].weight.grad = torch.ones(1), grad
    for on_host in (ALONE.on_host, lambda tensor: False):
        monkeypatch.setattr(ALONE, 'on_host', on_host)
        assert Evidence(('grad',), None).lacking(layers) == ({'b'} if lacks else set())
