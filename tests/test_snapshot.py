import pytest
import torch
from torch import nn

from fasterai.snapshot import Snapshot, attributes_kept, undisturbed
from fasterai.sparsifier import Sparsifier

IMAGE = torch.randn(1, 2, 3, 3)


def tensors(model): return [*model.parameters(), *model.buffers()]


def bits(model):
    "Return the bytes of every tensor, so that 0. and -0. differ and NaN is equal to itself."
    return [tensor.detach().contiguous().view(-1).view(torch.uint8).tolist() for tensor in tensors(model)]


def changed(model):
    "Change every value of a model in place."
    with torch.no_grad():
        for tensor in tensors(model): tensor.add_(1)


@pytest.fixture
def model():
    "A network whose two Linear layers share a weight, with a BatchNorm's buffers, negative zeros, infinity and NaN."
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.Linear(3, 2).half())
    model[2].weight = model[0].weight
    with torch.no_grad():
        model[0].weight[0] = torch.tensor([-0., float('inf'), float('nan')])
        model[1].running_mean.copy_(torch.randn(3))
        model[1].num_batches_tracked.fill_(7)  # an int64 buffer
    return model


def test_values_come_back_bit_for_bit(model):
    before, snapshot = bits(model), Snapshot(model)
    for _ in range(2):
        changed(model)
        assert all(one != other for one, other in zip(bits(model), before))
        snapshot.restore()
        assert bits(model) == before


def test_restored_in_place_and_still_shared(model):
    before, snapshot = tensors(model), Snapshot(model)
    changed(model)
    snapshot.restore()
    assert all(one is other for one, other in zip(tensors(model), before, strict=True))
    assert model[2].weight is model[0].weight and all(p.requires_grad and p.grad_fn is None for p in model.parameters())


def test_only_one_copy_of_a_shared_weight(model):
    assert len(Snapshot(model)._saved) == len({id(tensor) for tensor in tensors(model)})


def test_a_model_without_tensors(): Snapshot(nn.ReLU()).restore()


def test_what_is_expanded_comes_back(model):
    model.register_buffer('wide', torch.randn(3, 1).expand(3, 4))
    before, snapshot = model.wide.clone(), Snapshot(model)
    with torch.no_grad(): model.wide[:, :1].add_(1)
    model[0].weight.data.fill_(0)
    snapshot.restore()
    assert torch.equal(model.wide, before) and model[0].weight.any()


def test_what_was_made_in_inference_mode_comes_back(model):
    with torch.inference_mode(): model.register_buffer('stuck', torch.ones(3))
    snapshot = Snapshot(model)
    with torch.inference_mode(): model.stuck.add_(1)
    snapshot.restore()
    assert torch.equal(model.stuck, torch.ones(3))


class Caching(nn.Module):
    "Keep what the forward pass has computed of its weights in eval mode, in a dict, a list and attributes, as levit does."
    def __init__(self):
        super().__init__()
        self.conv, self.bias = nn.Conv2d(2, 2, 1), nn.Parameter(torch.ones(1))
        self.cache, self.deep, self.calls = {}, [{'a': []}, {1}], 0

    def forward(self, x):
        if self.training: return self.conv(x) + 2 * self.bias
        if 'bias' not in self.cache: self.cache['bias'] = 2 * self.bias
        self.calls += 1
        self.deep[0]['a'].append(self.calls)
        self.deep[1].add(self.calls)
        self.last = self.cache['bias']
        return self.conv(x) + self.last

    def kept(self): return self.cache, self.deep, self.calls, 'last' in vars(self)


@pytest.mark.parametrize('keep', [undisturbed, attributes_kept])
def test_what_a_forward_pass_keeps_for_the_next_is_put_back(keep):
    model = Caching().eval()
    cache, deep = model.cache, model.deep
    with keep(model):
        model(IMAGE)
        assert model.cache and model.calls
    assert model.kept() == ({}, [{'a': []}, {1}], 0, False) and model.cache is cache and model.deep is deep
    model(IMAGE)
    with keep(model): model.cache.clear()
    assert torch.equal(model.cache['bias'], 2 * model.bias) and model.calls == 1


@pytest.mark.parametrize('arguments', [{}, {'coupled': True}, {'example': IMAGE}, {'data': [IMAGE], 'criteria': 'wanda'}])
def test_a_sparsifier_leaves_nothing_in_what_a_model_keeps(arguments):
    model = Caching()
    Sparsifier(nn.Sequential(model, nn.Conv2d(2, 1, 1)), 'filter', **arguments).sparsify_model(50)
    assert model.kept() == ({}, [{'a': []}, {1}], 0, False)
    model.bias.data.fill_(7)
    assert torch.equal(model.eval()(IMAGE), model.conv(IMAGE) + 14)


def test_a_container_that_holds_itself_comes_back(model):
    model.ring = ring = []
    ring.append(ring)
    with attributes_kept(model): ring.append(1)
    assert ring == [ring] and ring[0] is ring
