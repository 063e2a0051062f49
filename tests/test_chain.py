"Layers that follow each other by one call of the kernels."
import pickle
import random
import threading
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_speed_up import needs_kernels, zeroed
from torch import nn
from torch.nn import functional as F

from fasterai.deploy import kernels
from fasterai.deploy.fusing import fuse_blocks, fused_names
from fasterai.deploy.kernels import MaxPool, SparseConv, SparseLinearKernel
from fasterai.deploy.kernels import chain as module
from fasterai.deploy.kernels.chain import SHAPES, Chain, Link


def conv(**options): return SparseConv(zeroed(nn.Conv2d(4, 4, 3, padding=1), .6), **options)


class Net(nn.Module):
    "Rows of layers with a dense one between, a sum with a value of before, and two values that are read later."
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(conv(), nn.ReLU(), MaxPool(nn.MaxPool2d(3, 2, 1)), nn.Sequential(conv(), nn.Dropout()))
        self.a, self.b, self.c, self.dense = conv(), conv(), conv(), nn.Conv2d(4, 4, 1)
        self.head = nn.Sequential(*(SparseLinearKernel(zeroed(nn.Linear(4, 4), .4)) for _ in range(2)))

    def forward(self, x):
        x = self.body(x)
        y = F.relu(self.a(x))
        z = F.relu(self.b(y) + x)
        w = self.c(self.dense(z)) + y
        return self.head(w.mean((2, 3))) + z.mean((2, 3))


def counted(monkeypatch):
    "Count the calls of forward of the sparse layers."
    calls = []
    for kind in (SparseConv, SparseLinearKernel, MaxPool):
        def forward(self, *args, real=kind.forward, **kwargs):
            calls.append(self)
            return real(self, *args, **kwargs)
        monkeypatch.setattr(kind, 'forward', forward)
    return calls


@needs_kernels
@torch.no_grad()
def test_a_network_calls_its_layers_only_for_new_shapes(monkeypatch):
    net = Net().eval()
    plain, calls = deepcopy(net), counted(monkeypatch)
    assert fuse_blocks(net) == ['']
    for shape in ((2, 4, 9, 7), (1, 4, 6, 6)):
        x = torch.randn(shape)
        expected = plain(x)
        for first in (True, False, False):
            calls.clear()
            assert torch.allclose(net(x), expected, atol=1e-5)
            # `c` follows no layer directly, but for the dense one
            assert len(calls) == (8 if first else 1)
            x = x.transpose(0, 1).contiguous().transpose(0, 1)  # not contiguous


@torch.no_grad()
def test_the_first_calls_may_be_those_of_several_threads():
    net, x = Net().eval(), torch.randn(2, 4, 9, 7)
    expected = net(x)
    fuse_blocks(net)
    start, found = threading.Barrier(4), []

    @torch.no_grad()
    def work():
        start.wait()
        found.append(net(x))
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert len(found) == 4 and all(torch.allclose(y, expected, atol=1e-5) for y in found)


@needs_kernels
@torch.no_grad()
def test_memory_between_is_kept_for_the_next_call_and_results_are_not_written_over():
    chain = Chain([Link(LAYERS[0], i) for i in range(4)], 1, [2, 4])
    xs = [torch.randn(1, 4, 5, 3) for _ in range(3)]
    expected = [chain._first([x], 1) for x in xs]
    found, run = [chain.call(x) for x in xs], next(iter(chain._runs.values()))
    assert run._offsets == [0] and run._between == 256  # of 240 bytes
    for got, of in zip(found, expected): assert all(torch.equal(a, b) for a, b in zip(got, of))


@needs_kernels
@torch.no_grad()
def test_copies_files_and_threads_compute_the_same():
    net, x = Net().eval(), torch.randn(2, 4, 9, 7)
    expected = net(x)
    fuse_blocks(net)
    net(x)
    wrong, done = [], []

    @torch.no_grad()
    def work():
        for _ in range(20):
            for one, of in ((x, expected), (x[:1], expected[:1])):
                if not torch.allclose(net(one), of, atol=1e-5): wrong.append(one.shape)
        done.append(True)
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert not wrong and len(done) == 3
    for other in (deepcopy(net), pickle.loads(pickle.dumps(net))):
        for _ in range(2): assert torch.allclose(other(x), expected, atol=1e-5)
    with torch.inference_mode(): assert torch.allclose(net(x), expected, atol=1e-5)


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize('change', [lambda n: n.a.values.mul_(2), lambda n: n.a.load_state_dict(conv().state_dict()),
                                    lambda n: n.double().float(), lambda n: n.b.bias.add_(1)])
def test_layers_that_change_are_seen(change):
    net, x = Net().eval(), torch.randn(2, 4, 9, 7)
    fuse_blocks(net)
    for _ in range(2): net(x)
    change(net)
    expected = type(net).forward(net, x)
    for _ in range(2): assert torch.allclose(net(x), expected, atol=1e-5)


@needs_kernels
def test_what_the_kernels_do_not_compute_is_refused_as_by_the_layers():
    net, x = Net().eval(), torch.randn(2, 4, 9, 7)
    fuse_blocks(net)
    with torch.no_grad():
        for _ in range(2): net(x)
        with pytest.raises(TypeError, match='SparseConv: got torch.float64 on cpu'): net(x.double())
        with pytest.raises(ValueError, match='expected 4 channels'): net(x[:, :3])
        with pytest.raises(RuntimeError, match='SparseConv cannot be traced or exported'): torch.jit.trace(net, x)
        net.a.train()
        with pytest.raises(RuntimeError, match='SparseConv: got training mode'): net(x)
        net.a.eval()
    with pytest.raises(RuntimeError, match='got an input with gradients'): net(x.requires_grad_())


@needs_kernels
@torch.no_grad()
def test_hooks_inside_are_called():
    net, x, seen = Net().eval(), torch.randn(2, 4, 9, 7), []
    fuse_blocks(net)
    expected = net(x)
    with_hook = net.body.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    assert torch.allclose(net(x), expected, atol=1e-5) and seen == [(2, 4, 5, 4)]
    with_hook.remove()
    assert torch.allclose(net(x), expected, atol=1e-5) and len(seen) == 1


@torch.no_grad()
def test_without_kernels_the_layers_compute(monkeypatch):
    monkeypatch.setenv('FASTERAI_KERNELS', 'off')
    net, x = Net().eval(), torch.randn(2, 4, 9, 7)
    expected = net(x)
    assert fuse_blocks(net) == ['']
    for _ in range(2): assert torch.allclose(net(x), expected, atol=1e-5)


def test_a_tensor_that_code_makes_is_not_baked_in():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(conv(), conv())
        def forward(self, x): return self.inner(x) + torch.rand(1)
    net = Noisy().eval()
    assert fuse_blocks(net) == ['inner'] and fused_names(net) == ['inner'] and not [n for n in vars(net) if 'constant' in n]


LAYERS = [conv(), conv(activation='relu'), SparseConv(zeroed(nn.Conv2d(4, 4, 1), .5)), MaxPool(nn.MaxPool2d(3, 1, 1))]


@needs_kernels
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10 ** 6), st.integers(1, 3), st.integers(2, 9), st.integers(1, 3))
@torch.no_grad()
def test_any_order_of_reads_computes_what_the_layers_do(seed, inputs, length, threads):
    chance = random.Random(seed)
    links = []
    for i in range(length):
        layer = chance.choice(LAYERS)
        add = chance.choice([None, chance.randrange(inputs + i)]) if isinstance(layer, SparseConv) else None
        activation = chance.choice([None, 'relu', 'relu6']) if isinstance(layer, SparseConv) else None
        links.append(Link(layer, chance.randrange(inputs + i), add, activation))
    outputs = sorted(chance.sample(range(inputs, inputs + length), chance.randint(1, length)))
    chain = Chain(links, inputs, outputs)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(2):
            values = [torch.randn(2, 4, 6, 5) for _ in range(inputs)]
            kept = [x.clone() for x in values]
            found = [chain.call(*values) for _ in range(2)]
            for x, y in zip(values, kept): assert torch.equal(x, y)
            for link in links: values.append(link.call(values))
            for tried in found:
                tried = tried if len(outputs) > 1 else [tried]
                for i, one in zip(outputs, tried): assert torch.equal(one, values[i])
    finally: torch.set_num_threads(before)
    assert len(chain._runs) == 1


@needs_kernels
@pytest.mark.parametrize('threads', [1, 2, 3])
@torch.no_grad()
def test_a_batch_passes_in_slabs_where_a_cache_is_small(monkeypatch, threads):
    monkeypatch.setattr(module, 'l2_bytes', lambda: 4000)  # 240 floats and as many results, of two images
    links = [Link(LAYERS[0], 0), Link(LAYERS[3], 2), Link(LAYERS[1], 3, add=1), Link(LAYERS[2], 4, add=2)]
    values = [torch.randn(12, 4, 6, 5) for _ in range(2)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        chain = Chain(links, 2, [3, 5])
        found = [chain.call(*values) for _ in range(3)]
    finally: torch.set_num_threads(before)
    for link in links: values.append(link.call(values))
    for got in found:
        for i, y in zip((3, 5), got): assert torch.allclose(y, values[i], atol=1e-5)
    assert next(iter(chain._runs.values()))._chain[2] == 6


@needs_kernels
@torch.no_grad()
def test_memory_between_is_taken_again_and_few_shapes_are_kept():
    chain = Chain([Link(LAYERS[0], i) for i in range(12)], 1, [12])
    for size in range(3, 3 + SHAPES + 2): chain.call(torch.randn(1, 4, size, size))
    assert len(chain._runs) == SHAPES
    run = next(iter(chain._runs.values()))
    assert len(run._sizes) == 2 and chain.call(torch.randn(0, 4, 5, 5)).shape == (0, 4, 5, 5)


@needs_kernels
@torch.no_grad()
def test_memory_grows_for_what_is_larger():
    layers = [SparseConv(nn.Conv2d(before, after, 1)) for before, after in ((4, 1), (1, 1), (1, 4), (4, 1))]
    chain, x = Chain([Link(layer, i) for i, layer in enumerate(layers)], 1, [4]), torch.randn(1, 4, 3, 3)
    expected = chain.call(x)
    assert torch.equal(chain.call(x), expected)
    assert next(iter(chain._runs.values()))._sizes == [36, 9]  # the first one had 9, too


@needs_kernels
def test_the_kernels_refuse_steps_that_are_none():
    code = kernels.library()
    layer, x = LAYERS[0], torch.randn(1, 4, 6, 6)
    layer(x)
    plan = layer._plans[x.shape, None].plan
    scratch = torch.empty(plan.scratch, dtype=torch.uint8)
    y = torch.full((x.numel() + 64,), 7.)
    memory = (module.c_void_p * 2)(x.data_ptr(), y.data_ptr())
    cuts, pieces = plan.pieces(1)
    floats = (module.c_int64 * 2)()

    def run(step, scratch, slabs=1, between=0):
        step = module._Step(**step)
        chain = module._Chain(module.ctypes.addressof(step), 1, slabs, 2, between, module.ctypes.addressof(floats),
                              module.ctypes.addressof(memory))
        return code.run_chain(module.ctypes.addressof(chain), scratch.data_ptr(), len(scratch), 1, None)

    right = dict(kind=0, plan=plan.pointer, x=0, x_length=144, y=1, y_length=144, add=-1, vectors=1, cuts=cuts, pieces=pieces)
    for wrong in ({'kind': 3}, {'kind': -1}, {'x_length': 143}, {'y_length': 145}):
        assert run(right | wrong, scratch) != 0
        assert (y == 7).all()
    assert run(right, scratch[:-1]) != 0
    for wrong in ({'slabs': 0}, {'between': -1}, {'between': 64}, {'between': 64, 'slabs': 2}): assert run(right, scratch, **wrong) != 0
    assert run(right | {'kind': 3}, scratch, slabs=2) != 0 and (y == 7).all()
    assert run(right, scratch) == 0
    assert torch.equal(y[:144].view(layer(x).shape), layer(x)) and (y[144:] == 7).all()
