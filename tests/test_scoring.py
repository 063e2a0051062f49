
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fasterai import selection
from fasterai.criteria import elementwise
from fasterai.granularity import Grouping, block
from fasterai.peers import ALONE
from fasterai.sparsifier import Sparsifier


def test_a_criterion_that_works_in_place_does_not_reach_the_model(net):
    before = [p.clone() for p in net.parameters()]
    Sparsifier(net, criteria=lambda weight: weight.abs_()).sparsify_model(50)
    assert all(torch.equal(p[p != 0], q[p != 0]) for p, q in zip(net.parameters(), before))


def test_an_elementwise_criterion_of_ones_own_gets_arrays():
    @elementwise
    def signed(weight): return np.where(weight > 0, weight, -2 * weight)
    for width in (4, 12, 40): Sparsifier(nn.Sequential(nn.Linear(width, 6)), 'filter', 'local', signed, layers='0').sparsify_model(50)


class Waits(TorchDispatchMode):
    "Counts what would have the host wait for a GPU: a number, an index of unknown length, a copy to the host."

    def __init__(self, monkeypatch):
        super().__init__()
        self.n, cpu = 0, torch.Tensor.cpu
        def copied(tensor):
            self.n += 1
            return cpu(tensor)
        monkeypatch.setattr(torch.Tensor, 'cpu', copied)

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        by_mask = 'index' in f.__name__ and any(i is not None and i.dtype == torch.bool for i in (args[1] if isinstance(args[1], (list, tuple)) else []))
        self.n += by_mask or any(n in f.__name__ for n in ('_local_scalar_dense', 'nonzero', 'masked_select', 'unique', 'equal.default'))
        return f(*args, **(kwargs or {}))


@pytest.fixture
def apart(monkeypatch):
    "The tensors of the CPU are treated as a GPU's are: not looked at, but where there is no other way."
    monkeypatch.setattr(ALONE, 'on_host', lambda tensor: False)
    monkeypatch.setattr(selection, 'SAMPLE', 3000)


@pytest.mark.parametrize('granularity', ['weight', 'vector', 'filter'])
@pytest.mark.parametrize('criteria, steps', [('magnitude', 0), ('gradient', 0), ('gradient', 2), ('movement', 2)])
def test_a_gpu_is_waited_for_as_often_for_many_layers_as_for_few(granularity, criteria, steps, apart, monkeypatch):
    def waits(depth, sparsity):
        net = nn.Sequential(*[layer for _ in range(depth) for layer in (nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32), nn.ReLU())], nn.Conv2d(32, 4, 3))
        for p in net.parameters(): p.grad = torch.randn_like(p)
        sparsifier = Sparsifier(net, granularity, 'global', criteria)
        with Waits(monkeypatch) as seen:
            for _ in range(steps): sparsifier.evidence.step()
        assert not seen.n
        with Waits(monkeypatch) as seen: sparsifier.sparsify_model(sparsity)
        assert abs(sparsifier.sparsity - sparsity) < 1
        return seen.n
    assert waits(3, 60) == waits(12, 60) <= 6


@pytest.mark.parametrize('granularity', ['weight', 'kernel', 'filter', block(4, 4)])
@pytest.mark.parametrize('context', ['global', 'local', 'lamp'])
@pytest.mark.parametrize('regrow', [False, True])
def test_away_from_the_host_the_same_goes(granularity, context, regrow, monkeypatch):
    def masks():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 30, 3), nn.ReLU(), nn.Conv2d(30, 5, 1))
        with torch.no_grad(): net[2].weight[torch.rand_like(net[2].weight) < .02] = 0
        sparsifier = Sparsifier(net, granularity, context)
        for sparsity in (30, 70, 50): sparsifier.sparsify_model(sparsity, regrow=regrow)
        return [sparsifier.masks[n] for n in sparsifier.layers]
    here = masks()
    monkeypatch.setattr(ALONE, 'on_host', lambda tensor: False)
    monkeypatch.setattr(selection, 'SAMPLE', 50)
    assert all(torch.equal(a, b) for a, b in zip(here, masks(), strict=True))


def test_away_from_the_host_nan_is_seen_before_anything_changes(apart):
    net = nn.Sequential(nn.Linear(100, 90), nn.Linear(90, 80))
    with torch.no_grad(): net[1].weight[3, 4] = torch.nan
    sparsifier = Sparsifier(net)
    before = net[0].weight.clone()
    with pytest.raises(ValueError, match="weight of layer '1' has NaN"): sparsifier.sparsify_model(50)
    assert torch.equal(net[0].weight, before)
    sparsifier.sparsify_model(0)  # asks for no score


def test_short_groups_at_positions_on_another_device():
    "A GPU's positions must not meet a tensor of the CPU: the sizes go where the scores are, then they are picked."
    grouping = Grouping(nn.Linear(5, 7), block(2, 2))
    sizes, grouping.sizes = grouping.sizes, SimpleNamespace(to=lambda device: sizes.to(device))
    assert grouping.mean(torch.ones(3, 4), torch.tensor([0, 2, 11])).tolist() == [1, 2, 4]
