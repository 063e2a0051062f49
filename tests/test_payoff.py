import subprocess
import sys
from copy import deepcopy
from importlib import import_module

import pytest
import torch
from torch import nn

from fasterai.deploy import kernels
from fasterai.deploy.kernels import SparseLinearKernel
from fasterai.deploy.payoff import payoff
from fasterai.deploy.speed_up import SparseLinear
from fasterai.deploy.timing import Latency

MODULE = import_module('fasterai.deploy.payoff')  # as an attribute of the package, `payoff` is the function


def mlp(): return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.fixture
def clock(monkeypatch):
    "Pretended times: (dense, sparse), the middle half 10 % to both sides."
    def pretend(*times):
        monkeypatch.setattr(MODULE, 'side_by_side', lambda calls, *a, **k: [Latency(t, .9 * t, 1.1 * t) for t in times])
    pretend(1e-3, 1e-3)
    return pretend


def rows(found): return {what: (dense, sparse) for what, _, dense, sparse in found.rows}


def test_what_is_counted(clock):
    dense = mlp()
    sparse = deepcopy(dense)
    with torch.no_grad(): sparse[0].weight[:12] = 0
    found = rows(payoff(dense, sparse, torch.randn(3, 8)))
    assert found['parameters'] == (212, 212) and found['non-zero parameters'] == (212, 212 - 96)
    assert found['multiply-adds'] == (192, 192) and found['multiply-adds with a weight that is not zero'] == (192, 96)
    assert found['file, packed by save_sparse'][1] < found['file, packed by save_sparse'][0] < found['file, dense'][0]
    assert found['file, zipped'][1] < found['file, zipped'][0] and 'accuracy' not in found


def test_convolutions_and_layers_that_are_stored_sparse(clock):
    dense = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.Flatten(), nn.Linear(16, 4, bias=False))
    assert rows(payoff(dense, dense, torch.randn(3, 2, 4, 4)))['multiply-adds'] == (2 * 4 * 9 * 4 + 64,) * 2
    with torch.no_grad(): dense[2].weight[:2] = 0
    sparse = deepcopy(dense)
    sparse[2] = SparseLinear(dense[2])
    assert rows(payoff(dense, sparse, torch.randn(3, 2, 4, 4)))['non-zero parameters'] == (72 + 32, 72 + 32)


def test_accuracy(clock):
    model, x = nn.Linear(2, 2), torch.tensor([[1., 0], [0, 1], [1, 0], [0, 1]])
    with torch.no_grad(): model.weight.copy_(torch.eye(2)), model.bias.zero_()
    other = deepcopy(model)
    with torch.no_grad(): other.bias[0] = 9
    batches = [(x[:3], torch.tensor([0, 1, 1])), (x[3:], torch.tensor([1]))]
    assert rows(payoff(model, other, x, dls=batches))['accuracy'] == (75., 25.)


@pytest.mark.parametrize('times, says, silent', [
    ((1e-3, 1e-3), 'batch 64: the difference in time is within the noise.', 'slower'),
    ((1e-3, 2e-3), 'batch 1: the sparse network is slower here.', 'noise'),
    ((2e-3, 1e-3), '', 'no speed')])
def test_what_is_said(times, says, silent, clock):
    clock(*times)
    dense = mlp()
    sparse = deepcopy(dense)
    with torch.no_grad(): sparse[0].weight.zero_()
    said = str(payoff(dense, sparse, torch.randn(3, 8)))
    assert says in said and silent not in said and ('The zeros bring no speed here' in said) == (times[0] <= times[1])
    assert 'There are no zeros' in str(payoff(dense, dense, torch.randn(3, 8)))


def test_how_it_shows(clock):
    found = payoff(mlp(), mlp(), torch.randn(3, 8), dls=[(torch.randn(3, 8), torch.tensor([0, 1, 2]))])
    assert '1.000 ms (0.900 ms – 1.100 ms)' in str(found)
    assert '<table>' in found._repr_html_() and 'latency, batch 64' in found._repr_html_()
    frame = found.to_frame()
    assert list(frame) == ['what', 'unit', 'dense', 'sparse', 'ratio'] and len(frame) == 10
    ax = found.plot()
    assert len(ax.patches) == 9 and ax.get_xlabel() == 'left of the dense network (%)' and found.plot(ax) is ax


def test_modes_and_inputs(clock):
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)).train()
    before = deepcopy(model.state_dict())
    payoff(model, model, torch.randn(3, 8))
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(TypeError, match='sparse: got int'): payoff(model, 3, torch.randn(3, 8))
    with pytest.raises(ValueError, match='example: got'): payoff(model, model, torch.randn(3, 7))


def test_the_training_side_is_not_needed():
    code = ("import sys, fasterai.deploy; print([m for m in sys.modules if m in ('fastai', 'fasterai.sparsifier', "
            "'fasterai.callback', 'fasterai.granularity', 'fasterai.dataflow')])")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'


@pytest.mark.parametrize('kind', [SparseLinear, SparseLinearKernel])
def test_layers_that_are_stored_sparse_are_counted_as_such(clock, kind):
    if kind is SparseLinearKernel and kernels.library() is None: pytest.skip(kernels.why_not())
    dense = mlp()
    with torch.no_grad(): dense[0].weight[:8] = 0
    sparse = deepcopy(dense)
    sparse[0] = kind(dense[0])
    found = payoff(dense, sparse, torch.randn(3, 8))
    assert rows(found)['multiply-adds'] == (192, 128)
    assert rows(found)['multiply-adds with a weight that is not zero'] == (128, 128)
    assert 'There are no zeros' not in str(found)


def test_batches_may_come_but_once(clock):
    batches = [(torch.randn(3, 8), torch.tensor([0, 1, 2]))]
    assert 'accuracy' in rows(payoff(mlp(), mlp(), torch.randn(3, 8), dls=iter(batches)))
    with pytest.raises(ValueError, match='dls: got no batches'): payoff(mlp(), mlp(), torch.randn(3, 8), dls=[])


X = torch.randn(3, 8)
Y = torch.tensor([0, 1, 2])


@pytest.mark.parametrize('wrong, says', [
    (dict(dls=7), 'dls: got 7, expected'), (dict(dls='abc'), 'dls: got .*expected'), (dict(dls=[7]), r'dls: got .*expected batches of \(x, y\)'),
    (dict(dls=[(X,)]), r'dls: got .*expected batches of \(x, y\)'), (dict(dls=[(X, None)]), 'dls: got labels None, expected a tensor'),
    (dict(dls=[(X, Y[:2])]), r'dls: got labels of shape \(2,\), expected'), (dict(dls=[(X, Y[:, None])]), r'dls: got labels of shape \(3, 1\)'),
    (dict(dls=[(X, Y[0])]), r'dls: got labels of shape \(\)'), (dict(dls=[(X, [0, 1, 2])]), r'dls: got labels \[0, 1, 2\], expected a tensor'),
    (dict(dls=[(X[:, :7], Y)]), 'dls: got .* on which the model fails'),
    (dict(batches=1), r'batches: got 1, expected .*as \(1, 64\)'), (dict(batches=None), 'batches: got None'), (dict(batches=(-1,)), 'batches: got -1'),
    (dict(batches=('a',)), "batches: got 'a'"), (dict(batches=(0,)), 'batches: got 0'), (dict(batches=(True,)), 'batches: got True'),
    (dict(batches=(1.5,)), 'batches: got 1.5'), (dict(batches='64'), "batches: got '64'"),
    (dict(seconds='x'), "seconds: got 'x'"), (dict(seconds=None), 'seconds: got None'), (dict(seconds=float('nan')), 'seconds: got nan'),
    (dict(seconds=-1), 'seconds: got -1'), (dict(seconds=True), 'seconds: got True'), (dict(seconds=1j), 'seconds: got 1j')])
def test_bad_arguments_are_refused_before_the_clock_runs(wrong, says, monkeypatch):
    monkeypatch.setattr(MODULE, 'side_by_side', lambda *a, **k: pytest.fail('it was timed'))
    with pytest.raises((TypeError, ValueError), match=says): payoff(mlp(), mlp(), X, **wrong)


def test_a_model_without_classes_has_no_accuracy(clock):
    with pytest.raises(ValueError, match=r'dls: the model gives .*shape \(3,\), expected'):
        payoff(nn.Sequential(nn.Linear(8, 1), nn.Flatten(0)), nn.Sequential(nn.Linear(8, 1), nn.Flatten(0)), X, dls=[(X, Y)])


def test_no_batches_no_latency(clock):
    assert 'latency' not in str(payoff(mlp(), mlp(), X, batches=()).rows)
    assert 'latency, batch 3' in rows(payoff(mlp(), mlp(), X, batches=(n for n in [3])))
