import pickle
from copy import deepcopy
from importlib import import_module

import pytest
import torch
from torch import nn

from fasterai.arguments import Inputs
from fasterai.deploy import kernels, load_sparse, save_sparse
from fasterai.deploy.compare import agree, outputs
from fasterai.deploy.speed_up import SparseLinear, realisations, speed_up
from fasterai.deploy.timing import Latency, faster, side_by_side

MODULE = import_module('fasterai.deploy.speed_up')  # as an attribute of the package, `speed_up` is the function


@pytest.fixture
def without_kernels(monkeypatch):
    "A machine without a compiler."
    monkeypatch.setenv('FASTERAI_KERNELS', 'off')


def zeroed(layer, share=.95):
    with torch.no_grad(): layer.weight.mul_(torch.rand(layer.weight.shape) > share)
    return layer


def blocks(layer, side):
    "Blocks on the diagonal."
    diagonal = torch.eye(layer.weight.shape[0] // side).repeat_interleave(side, 0).repeat_interleave(side, 1)
    with torch.no_grad(): layer.weight.mul_(diagonal)
    return layer


@pytest.mark.parametrize('layer, x', [
    (nn.Linear(24, 16), (5, 24)), (nn.Linear(24, 16, bias=False), (24,)), (nn.Linear(24, 16), (2, 3, 24)),
    (nn.Conv2d(24, 16, 1), (3, 24, 5, 4)), (nn.Conv2d(24, 16, 1, stride=2), (2, 24, 5, 4)),
    (nn.Conv2d(24, 16, 1, stride=(1, 3), bias=False), (1, 24, 5, 7))], ids=str)
@pytest.mark.parametrize('side', [1, 8])
def test_a_sparse_layer_computes_the_same(layer, x, side):
    layer = zeroed(layer, .7)
    sparse, x = SparseLinear(layer, side), torch.randn(x)
    assert sparse(x).shape == layer(x).shape and agree([sparse(x)], [layer(x)], 1e-5)
    for other in (deepcopy(sparse), sparse.to(torch.float64).to(torch.float32)):
        assert agree([other(x)], [layer(x)], 1e-5)


def test_it_saves_and_loads(tmp_path):
    layer, x = zeroed(nn.Linear(24, 16)), torch.randn(2, 24)
    sparse = SparseLinear(layer)
    torch.save(sparse, tmp_path / 'whole')
    assert torch.equal(torch.load(tmp_path / 'whole', weights_only=False)(x), sparse(x))
    other = deepcopy(sparse)
    nn.init.zeros_(other.values)
    other.load_state_dict(sparse.state_dict())
    assert torch.equal(other(x), sparse(x)) and set(sparse.state_dict()) == {'rows', 'columns', 'values', 'bias'}


@pytest.mark.parametrize('layer, kinds', [
    (zeroed(nn.Linear(32, 32)), ['CSR']), (blocks(nn.Linear(64, 64), 16), ['CSR', 'BSR 16 × 16']),
    (nn.Linear(32, 32), []), (zeroed(nn.Conv2d(32, 32, 1)), ['CSR']), (zeroed(nn.Conv2d(32, 32, 3)), []),
    (zeroed(nn.Conv2d(32, 32, 1, groups=2)), []), (zeroed(nn.Conv2d(32, 32, 1, padding=1)), []),
    (zeroed(nn.Linear(32, 32)).double(), []), (nn.ReLU(), [])], ids=str)
def test_what_a_layer_could_be(layer, kinds, without_kernels): assert list(realisations(layer)) == kinds


def test_what_is_faster_and_right_is_kept(monkeypatch, capsys, without_kernels):
    "The clock is pretended, so that the choice can be checked."
    model = nn.Sequential(zeroed(nn.Linear(16, 32)), nn.ReLU(), zeroed(nn.Linear(32, 16)), nn.Linear(16, 4))
    x = torch.randn(3, 16)

    def clock(calls, *rest, **more): return [Latency(s, s * .9, s * 1.1) for s in (1., .5, .4)[:len(calls)]]
    monkeypatch.setattr(MODULE, 'side_by_side', clock)
    new = speed_up(model, x)
    assert [type(m).__name__ for m in new] == ['SparseLinear', 'ReLU', 'SparseLinear', 'Linear']
    assert agree(outputs(new, Inputs((x,))), outputs(model, Inputs((x,))), 1e-5)
    said = capsys.readouterr().out
    assert 'CSR 500.000 ms  CSR' in said
    assert 'the whole model: 1000.000 ms before, 500.000 ms after: 2.00 × as fast' in said
    assert [type(m).__name__ for m in model] == ['Linear', 'ReLU', 'Linear', 'Linear']

    def clock(calls, *rest, **more): return [Latency(s, s * .9, s * 1.1) for s in (1., .95)[:len(calls)]]
    monkeypatch.setattr(MODULE, 'side_by_side', clock)
    assert 'nothing here is faster than dense' in (speed_up(model, x), capsys.readouterr().out)[1]  # within the noise


def test_what_is_slower_as_a_whole_or_wrong_is_given_up(monkeypatch, capsys, without_kernels):
    model, x = nn.Sequential(zeroed(nn.Linear(16, 32)), nn.ReLU()), torch.randn(3, 16)
    answers = iter([(1., .5), (1., 1.5), (1.,)])
    monkeypatch.setattr(MODULE, 'side_by_side', lambda calls, *rest, **more: [Latency(s, s, s) for s in next(answers)])
    assert type(speed_up(model, x)[0]) is nn.Linear
    assert '1500.000 ms after, within the noise or slower, so all layers stay dense' in capsys.readouterr().out
    monkeypatch.setattr(SparseLinear, '_product', lambda self, x: x.new_ones(self.size[0], x.shape[1]))
    assert type(speed_up(model, x)[0]) is nn.Linear and 'CSR: other outputs' in capsys.readouterr().out


def test_a_model_that_reaches_into_its_layers_is_left_alone(monkeypatch, capsys):
    class Reaches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = zeroed(nn.Linear(16, 16))
        def forward(self, x): return self.a(x) + self.a.weight.sum()
    monkeypatch.setattr(MODULE, 'side_by_side', lambda calls, *rest, **more: [Latency(s, s, s) for s in (1., .5)])
    model, x = Reaches(), torch.randn(2, 16)
    assert type(speed_up(model, x).a) is nn.Linear and 'reaches into its layers' in capsys.readouterr().out


def test_a_layer_that_is_shared_stays_shared(monkeypatch):
    layer = zeroed(nn.Linear(16, 16))
    monkeypatch.setattr(MODULE, 'side_by_side', lambda calls, *rest, **more: [Latency(s, s, s) for s in (1., .5)])
    new = speed_up(nn.Sequential(layer, nn.ReLU(), layer), torch.randn(2, 16), verbose=False)
    assert type(new[0]) is SparseLinear and new[0] is new[2]


def test_two_of_four_is_offered_to_a_gpu_alone():
    layer = nn.Linear(64, 32).half()
    with torch.no_grad(): layer.weight.view(-1, 4)[:, :2] = 0
    assert MODULE._is_two_of_four(layer.weight) and realisations(layer) == {}
    with torch.no_grad(): layer.weight[0, 0] = 1
    assert not MODULE._is_two_of_four(layer.weight)


def test_the_clock():
    calls = []
    found = side_by_side([lambda: calls.append(0), lambda: calls.append(1)], seconds=.01)
    assert calls[:4] == [0, 1, 0, 1] and len(calls) >= 14 and all(f.low <= f.seconds <= f.high for f in found)


def test_bad_arguments():
    with pytest.raises(TypeError, match='model: got int'): speed_up(3, torch.randn(2))
    with pytest.raises(ValueError, match=r'example: got \[\(2, 3\)\], on which the model fails'):
        speed_up(nn.Linear(4, 4), torch.randn(2, 3))


def test_batches_of_nothing_autocast_and_single_items():
    linear, conv = zeroed(nn.Linear(8, 6)), zeroed(nn.Conv2d(8, 6, 1, stride=2))
    for layer, x in ((linear, torch.randn(0, 8)), (linear, torch.randn(2, 0, 8)),
                     (conv, torch.randn(0, 8, 5, 5)), (conv, torch.randn(8, 5, 5))):
        assert SparseLinear(layer)(x).shape == layer(x).shape
    with torch.autocast('cpu', torch.bfloat16):
        assert agree([SparseLinear(linear)(torch.ones(2, 8).bfloat16())], [linear(torch.ones(2, 8))], .05)


def test_a_single_layer(monkeypatch):
    monkeypatch.setattr(MODULE, 'side_by_side', lambda calls, *rest, **more: [Latency(s, s, s) for s in (1., .5)])
    assert type(speed_up(zeroed(nn.Linear(16, 16)), torch.randn(2, 16), verbose=False)) is SparseLinear


@pytest.mark.parametrize('seconds', ['x', None, float('nan'), -1, True])
def test_times_that_are_none_are_refused(seconds):
    with pytest.raises((TypeError, ValueError), match='seconds: got .*expected a number of seconds'):
        speed_up(zeroed(nn.Linear(16, 16)), torch.randn(2, 16), seconds=seconds)


# With kernels

needs_kernels = pytest.mark.skipif(kernels.library() is None, reason=str(kernels.why_not()))
HALVES = [1., .5, .4, .3]  # pretended times: dense, and each other form faster than the one before


def pretend(monkeypatch, times=HALVES):
    monkeypatch.setattr(MODULE, 'side_by_side', lambda calls, *a, **k: [Latency(s, s, s) for s in times[:len(calls)]])


def resnet_like():
    model = nn.Sequential(zeroed(nn.Conv2d(3, 8, 3, padding=1, bias=False), .7), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
                          zeroed(nn.Conv2d(8, 8, 3, groups=2), .7), nn.Flatten(), zeroed(nn.Linear(8 * 4, 5), .7))
    model(torch.randn(20, 3, 8, 8))  # statistics
    return model.eval()


@needs_kernels
@pytest.mark.parametrize('layer, kinds', [
    (zeroed(nn.Linear(32, 32)), ['CSR', 'kernel', 'kernel 2']), (zeroed(nn.Conv2d(32, 32, 3)), ['kernel', 'kernel 2']),
    (zeroed(nn.Conv1d(32, 32, 3)), ['kernel', 'kernel 2']), (zeroed(nn.Conv2d(32, 32, 3, groups=4)), ['kernel', 'kernel 2']),
    (zeroed(nn.Conv2d(32, 32, 3, padding=1, padding_mode='circular')), []), (nn.Conv2d(32, 32, 3), []),
    (zeroed(nn.Conv2d(32, 32, 3)).double(), []), (zeroed(nn.ConvTranspose2d(32, 32, 3)), []),
    (nn.MaxPool2d(2), ['kernel']), (nn.MaxPool2d(2, return_indices=True), [])], ids=str)
def test_what_a_layer_could_be_with_kernels(layer, kinds): assert list(realisations(layer)) == kinds


@needs_kernels
def test_convolutions_poolings_and_linears_are_replaced_and_norms_folded(monkeypatch, capsys):
    pretend(monkeypatch)
    model, x = resnet_like(), torch.randn(2, 3, 8, 8)
    before, expected = deepcopy(model), outputs(model, Inputs((x,)))
    new = speed_up(model, x)
    assert [type(m).__name__ for m in new] == ['SparseConv', 'Identity', 'Identity', 'MaxPool', 'SparseConv', 'Flatten', 'SparseLinearKernel']
    assert agree(outputs(new, Inputs((x,))), expected, 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.state_dict().values()))
    said = capsys.readouterr().out
    head, _, first, *_ = said.splitlines()
    assert head.split() == ['layer', 'zeros', 'dense', 'tried', 'kept', 'of', 'peak'] and 'no sparse' not in said
    assert '1000.000 ms before, 400.000 ms after (500.000 ms in channels_last): 2.50 × as fast' in said
    zeros = 100 * float((model[0].weight == 0).float().mean())
    assert ' '.join(first.split()) == f'0 {zeros:.1f} % 1000.000 ms kernel 500.000 ms, kernel 2 400.000 ms kernel 2 0 %'
    for other in (deepcopy(new), pickle.loads(pickle.dumps(new))): assert agree(outputs(other, Inputs((x,))), expected, 1e-5)


@needs_kernels
def test_its_file_is_packed_and_read_without_pickle(monkeypatch, tmp_path):
    pretend(monkeypatch)
    x = torch.randn(2, 3, 8, 8)
    new = speed_up(resnet_like(), x, verbose=False)
    other = deepcopy(new)
    for tensor in other.state_dict().values(): tensor.zero_()
    save_sparse(new, tmp_path / 'fast')
    load_sparse(other, tmp_path / 'fast')
    with torch.inference_mode(): assert torch.equal(other(x), new(x))


@needs_kernels
def test_the_other_memory_format_is_kept_where_it_is_fastest(monkeypatch, capsys):
    answers = iter([(1., .9, .8, .7)] * 4 + [(1., .5, .6)])
    monkeypatch.setattr(MODULE, 'side_by_side', lambda calls, *a, **k: [Latency(s, s, s) for s in next(answers)[:len(calls)]])
    model, x = resnet_like(), torch.randn(2, 3, 8, 8)
    new = speed_up(model, x)
    assert type(new[0]) is nn.Conv2d and new[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert agree(outputs(new, Inputs((x,))), outputs(model, Inputs((x,))), 1e-5)
    assert 'so all layers stay dense and are in channels_last' in capsys.readouterr().out


@needs_kernels
def test_activations_are_fused_where_nothing_else_reads_before_them(monkeypatch):
    class Block(nn.Module):
        def __init__(self, ways):
            super().__init__()
            self.conv, self.act, self.ways = zeroed(nn.Conv2d(3, 3, 3, padding=1), .7), nn.ReLU6(), ways
        def forward(self, x):
            y = self.conv(x)
            return self.act(y) + y if self.ways == 'read twice' else self.act(y) + (self.act(x) if self.ways == 'called twice' else 0)
    pretend(monkeypatch)
    x = 9 * torch.randn(2, 3, 8, 8)
    for ways, kind in (('once', 'Identity'), ('read twice', 'ReLU6'), ('called twice', 'ReLU6')):
        model = Block(ways)
        new = speed_up(model, x, verbose=False)
        assert (type(new.conv).__name__, type(new.act).__name__) == ('SparseConv', kind), ways
        assert agree(outputs(new, Inputs((x,))), outputs(model, Inputs((x,))), 1e-5)


@needs_kernels
def test_nothing_is_folded_where_nothing_is_faster(monkeypatch):
    pretend(monkeypatch, [1., 2., 2., 2.])
    assert [type(m).__name__ for m in speed_up(resnet_like(), torch.randn(2, 3, 8, 8), verbose=False)][:2] == ['Conv2d', 'BatchNorm2d']


@needs_kernels
def test_training_is_refused_in_words(monkeypatch):
    pretend(monkeypatch)
    new = speed_up(resnet_like(), torch.randn(2, 3, 8, 8), verbose=False)
    with pytest.raises(RuntimeError, match='SparseConv: got training mode, expected eval'): new.train()(torch.randn(2, 3, 8, 8))


def test_without_kernels_a_line_says_why(monkeypatch, capsys, without_kernels):
    speed_up(resnet_like(), torch.randn(2, 3, 8, 8), seconds=0)
    assert '\nno sparse kernels: FASTERAI_KERNELS is off' in capsys.readouterr().out


def test_rounds_decide():
    "Times that vary more than they differ."
    old = [1., 2, 3, 4, 5, 6, 7, 8]
    def latency(rounds): return Latency(4., 2., 6., tuple(rounds))
    assert faster(latency([t * .99 for t in old]), latency(old))
    assert not faster(latency(old), latency(old))
    assert not faster(latency([t * (.9 if i < 6 else 1.1) for i, t in enumerate(old)]), latency(old))  # by chance, as six of eight
    assert faster(Latency(1., .9, 1.1), Latency(2., 1.5, 2.5)) and not faster(Latency(1., .9, 1.6), Latency(2., 1.5, 2.5))


def test_a_trace_is_refused_as_it_would_lack_what_the_kernels_compute():
    from fasterai.deploy.kernels import SparseLinearKernel
    x = torch.randn(4, 64)
    model = nn.Sequential(SparseLinearKernel(nn.Linear(64, 64)))
    with torch.no_grad():
        model(x)  # the plan is there
        for tried in (torch.jit.trace, torch.export.export):
            with pytest.raises(RuntimeError, match='cannot be traced or exported.*given to speed_up'): tried(model, (x,))


@needs_kernels
@torch.no_grad()
def test_a_layer_that_is_timed_in_a_row_computes_the_same():
    from fasterai.deploy.kernels import SparseConv
    from fasterai.deploy.speed_up import MOST_IN_ROW, _in_a_row, _of_one
    layer, x = SparseConv(zeroed(nn.Conv2d(4, 4, 3, padding=1), .6)), torch.randn(1, 4, 6, 6)
    call, n = _in_a_row(layer, x)
    assert 1 <= n <= MOST_IN_ROW and torch.equal(call(x), layer(x))
    dense = nn.Conv2d(4, 4, 1)
    assert _in_a_row(dense, x) == (dense, 1)
    assert _of_one(Latency(8., 4., 16., (8., 6.)), 4) == Latency(2., 1., 4., (2., 1.5))
