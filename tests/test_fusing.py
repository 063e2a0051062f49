"Sums and ReLUs that sparse layers take over."
import pickle
from copy import deepcopy

import pytest
import torch
from test_speed_up import needs_kernels, pretend, zeroed
from torch import nn
from torch.nn import functional as F

from fasterai.arguments import Inputs
from fasterai.deploy import load_fast, save_fast, speed_up
from fasterai.deploy.compare import agree, outputs
from fasterai.deploy.fusing import fuse_blocks, fused_names, unfuse
from fasterai.deploy.kernels import SparseConv, SparseLinearKernel


class Block(nn.Module):
    "A block with two convolutions; `code` is its forward."
    def __init__(self, code):
        super().__init__()
        self.a, self.b = (SparseConv(zeroed(nn.Conv2d(4, 4, 3, padding=1), .6)) for _ in range(2))
        self.relu, self.norm, self.code = nn.ReLU(inplace=True), nn.Identity(), code

    def forward(self, x): return self.code(self, x)


def residual(self, x):
    y = self.relu(self.norm(self.a(x)))
    y = self.norm(self.b(y))
    y += x
    return self.relu(y)


def later(self, x):
    y = self.b(x)
    return F.relu6(torch.add(self.a(x), y))


def methods(self, x): return self.a(x).add(x).relu()
def of_the_other(self, x): return x + self.a(x)
def in_place_of_the_other(self, x):
    y = 2 * x
    z = y
    y.add_(self.a(x))
    return y + z


def in_place_of_its_input(self, x):
    x += self.a(x)  # as torch.fx reads it, it changes nothing but the name
    return x


def read_twice(self, x):
    y = self.a(x)
    return torch.relu(y + x) + y


def twice_itself(self, x):
    y = self.a(x)
    return y + y


def of_a_number(self, x): return self.a(x) + 1
def scaled(self, x): return torch.add(self.a(x), x, alpha=2)
def of_another_shape(self, x): return self.a(x) + x.mean((2, 3), keepdim=True)
def untraceable(self, x): return torch.relu(self.a(x)) if x.sum() > 0 else self.a(x)


@pytest.mark.parametrize('code, fused', [
    (residual, True), (later, True), (methods, True), (of_the_other, True), (in_place_of_the_other, False), (read_twice, False),
    (twice_itself, False), (of_a_number, False), (scaled, False), (untraceable, False)], ids=lambda x: getattr(x, '__name__', ''))
def test_a_block_computes_the_same(code, fused):
    block, x = Block(code).eval(), torch.randn(2, 4, 7, 5)
    with torch.no_grad():
        before, expected = x.clone(), block(x.clone())
        assert fuse_blocks(nn.ModuleList([block])) == (['0'] if fused else [])
        assert ('forward' in vars(block)) == fused and type(block) is Block
        for other in (block, deepcopy(block), pickle.loads(pickle.dumps(block))):
            assert torch.allclose(other(x), expected, atol=1e-6) and torch.equal(x, before)
            assert torch.allclose(other(x[:1, :, :6]), code(other, x[:1, :, :6].clone()), atol=1e-6)


def calls_of(model, x):
    "The sums and activations that a model computes by torch."
    from torch.overrides import TorchFunctionMode
    class Names(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function.__name__ in ('relu', 'relu_', 'add', 'add_', '__iadd__'): names.append(function.__name__)
            return function(*args, **(kwargs or {}))
    names = []
    with torch.no_grad(), Names(): model(x)
    return names


def test_a_block_with_an_argument_that_may_be_none_is_left_alone():
    class Optional(Block):
        def forward(self, x, scale=None): return torch.relu(self.a(x)) if scale is None else torch.relu(self.a(x)) * scale
    class Any(Block):
        def forward(self, *x): return torch.relu(self.a(x[0]))
    for kind in (Optional, Any):
        block = kind(None).eval()
        assert fuse_blocks(block) == [] and 'forward' not in vars(block)


class Keeping(Block):
    def forward(self, x):
        if 'scale' not in self.kept: self.kept['scale'] = x.abs().mean()
        return torch.relu(self.a(x)) * self.kept['scale']


@needs_kernels
def test_what_a_block_keeps_for_the_next_call_is_real():
    block, x = Keeping(None).eval(), torch.randn(2, 4, 7, 5)
    block.kept = {}
    expected = deepcopy(block)(x)
    assert fuse_blocks(block) == [''] and block.kept == {}
    for one in (block, pickle.loads(pickle.dumps(block))): assert torch.allclose(one(x), expected, atol=1e-5)


@needs_kernels
def test_nothing_is_left_of_sums_and_activations():
    block, x = Block(residual).eval(), torch.randn(2, 4, 7, 5)
    before = calls_of(block, x)
    fuse_blocks(block)
    assert len(before) > 2 and not calls_of(block, x)
    assert block.a.activation is None  # what a call does is no state of the layer
    unfuse(block)
    assert not fused_names(block) and calls_of(block, x) == before


def test_a_linear_activates_and_a_layer_that_does_already_adds_nothing():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = SparseLinearKernel(zeroed(nn.Linear(6, 6), .6))
            self.conv = SparseConv(zeroed(nn.Conv2d(4, 4, 3, padding=1), .6), activation='relu')
        def forward(self, x): return self.conv(x) + x + F.relu(self.linear(x))
    net, x = Net().eval(), torch.randn(3, 4, 6, 6)
    with torch.no_grad():
        expected = net(x)
        assert fuse_blocks(net) == ['']
        assert torch.allclose(net(x), expected, atol=1e-6)


@pytest.mark.parametrize('layer, x', [(SparseConv(nn.Conv2d(4, 4, 3)), (9, 4, 5, 5)), (SparseLinearKernel(nn.Linear(4, 4)), (9, 4))], ids=str)
def test_activations_of_a_call(layer, x):
    x = torch.randn(x)
    with torch.no_grad():
        plain, active = layer(x), layer(x, activation='relu')
        assert (plain < 0).any() and torch.equal(active, plain.relu()) and torch.equal(layer(x), plain)
        with pytest.raises(ValueError, match="activation: got 'tanh', expected None, 'relu' or 'relu6'"): layer(x, activation='tanh')


class Around(nn.Module):
    "Reads what its block has read."
    def __init__(self, block):
        super().__init__()
        self.block = block
    def forward(self, x): return self.block(x) + x


def dense_block(code):
    block = Block(code)
    block.a, block.b = (zeroed(nn.Conv2d(4, 4, 3, padding=1), .7) for _ in range(2))
    return block.eval()


@needs_kernels
def test_speed_up_fuses_and_a_file_keeps_it(monkeypatch, tmp_path):
    pretend(monkeypatch)
    x = torch.randn(2, 4, 7, 5)
    for wrong in (of_another_shape, in_place_of_its_input):
        model = nn.Sequential(dense_block(residual), Around(dense_block(wrong)))
        fast = speed_up(model, x.clone(), verbose=False)
        assert not fused_names(fast) and type(fast[0].a) is SparseConv
        assert agree(outputs(fast, Inputs((x.clone(),))), outputs(model, Inputs((x.clone(),))), 1e-5)
    model = nn.Sequential(dense_block(residual), dense_block(methods))
    fast = speed_up(model, x, verbose=False)
    assert fused_names(fast) == [''] and agree(outputs(fast, Inputs((x,))), outputs(model, Inputs((x,))), 1e-5)
    save_fast(fast, tmp_path / 'fast')
    new = load_fast(model, tmp_path / 'fast')
    assert fused_names(new) == [''] and not fused_names(model)
    with torch.inference_mode(): assert torch.equal(new(x), fast(x))
    with pytest.raises(ValueError, match="does not fit the model: the code of '' is another"):
        load_fast(nn.Sequential(dense_block(residual), dense_block(untraceable)), tmp_path / 'fast')
