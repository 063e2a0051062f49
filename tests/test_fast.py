"Files that start fast."
import json
from copy import deepcopy

import pytest
import torch
from test_speed_up import needs_kernels, pretend, resnet_like, zeroed
from torch import nn

from fasterai.arguments import Inputs
from fasterai.deploy import kernels, load_fast, load_sparse, save_fast, save_sparse, speed_up
from fasterai.deploy.compare import agree, outputs
from fasterai.deploy.container import read_header, write_tensors
from fasterai.deploy.kernels import SparseConv, SparseLinearKernel
from fasterai.deploy.speed_up import SparseLinear


def kinds(model): return [type(m).__name__ for m in model.modules()]


@needs_kernels
def test_a_file_starts_as_fast_as_what_was_saved(monkeypatch, tmp_path):
    pretend(monkeypatch)
    model, x = resnet_like(), torch.randn(2, 3, 8, 8)
    fast = speed_up(model, x, verbose=False)
    save_fast(fast, tmp_path / 'fast')
    other = resnet_like()
    before = deepcopy(other.state_dict())
    def never(*args): raise AssertionError('timed')
    monkeypatch.setattr('fasterai.deploy.timing.side_by_side', never)
    new = load_fast(other.train(), tmp_path / 'fast')
    assert kinds(new) == kinds(fast) and not any(m.training for m in new.modules())
    assert [getattr(m, 'options', None) for m in new.modules()] == [getattr(m, 'options', None) for m in fast.modules()]
    with torch.inference_mode(): assert torch.equal(new(x), fast(x))
    assert other.training and all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), before.values()))
    assert 'SparseConv' in kinds(fast) and fast[0].activation == 'relu'
    save_sparse(model, tmp_path / 'dense')
    assert (tmp_path / 'fast').stat().st_size < 1.3 * (tmp_path / 'dense').stat().st_size  # two tables


@needs_kernels
@pytest.mark.parametrize('layer, x', [
    (nn.Conv2d(4, 6, 3, 2, 1, 2), (2, 4, 9, 8)), (nn.Conv2d(4, 6, (2, 4), padding='same', bias=False), (2, 4, 9, 8)),
    (nn.Conv1d(4, 6, 3, 2, 1, groups=2), (2, 4, 9)), (nn.Conv1d(4, 6, 4, padding='same'), (2, 4, 9)), (nn.Linear(5, 3), (2, 5)),
    (nn.Linear(5, 3, bias=False), (2, 5))], ids=str)
def test_a_sparse_layer_gives_back_the_dense_one(layer, x):
    zeroed(layer, .6)
    kind = SparseLinearKernel if isinstance(layer, nn.Linear) else SparseConv
    dense = kind(layer, activation='relu').dense()
    assert type(dense) is type(layer) and dense.state_dict().keys() == layer.state_dict().keys()
    for a, b in zip(dense.parameters(), layer.parameters()): assert torch.equal(a, b)
    assert torch.equal(dense(torch.ones(x)), layer(torch.ones(x)))


@pytest.mark.parametrize('layer, block', [(nn.Linear(8, 4), 4), (nn.Conv2d(8, 4, 1, 2), 1)], ids=str)
def test_a_product_of_torch_gives_back_the_dense_one(layer, block):
    zeroed(layer, .6)
    dense = SparseLinear(layer, block).dense()
    assert type(dense) is type(layer) and torch.equal(dense.weight, layer.weight) and torch.equal(dense.bias, layer.bias)
    assert getattr(dense, 'stride', None) == getattr(layer, 'stride', None)


def test_products_of_torch_and_a_single_layer_and_one_that_is_shared(tmp_path):
    shared = zeroed(nn.Linear(8, 8), .8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    fast = nn.Sequential(SparseLinear(shared, 4), nn.ReLU())
    fast.append(fast[0])
    for old, new in ((model, fast), (shared, fast[0])):
        save_fast(new, tmp_path / 'fast')
        copy = deepcopy(old)
        with torch.no_grad(): shared_before = [p.zero_() for p in copy.parameters()]
        loaded = load_fast(copy, tmp_path / 'fast')
        assert kinds(loaded) == kinds(new) and torch.equal(loaded(torch.ones(2, 8)), new(torch.ones(2, 8)))
        assert not any(p.any() for p in shared_before)
    assert load_fast(model, save(fast, tmp_path))[0].block == 4


def save(model, folder):
    save_fast(model, folder / 'fast')
    return folder / 'fast'


def test_what_stayed_dense_is_saved_too(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    loaded = load_fast(deepcopy(model).train(), save(model, tmp_path))
    assert kinds(loaded) == kinds(model) and not loaded.training
    last = load_fast(model, save(deepcopy(model).to(memory_format=torch.channels_last), tmp_path))
    assert last[0].weight.is_contiguous(memory_format=torch.channels_last) and torch.equal(last[0].weight, model[0].weight)


@needs_kernels
def test_without_kernels_it_computes_the_same(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        pretend(patch)
        x = torch.randn(2, 3, 8, 8)
        fast = speed_up(resnet_like(), x, verbose=False)
        expected = outputs(fast, Inputs((x,)))
    monkeypatch.setenv('FASTERAI_KERNELS', 'off')
    kernels.loading.warn_once.cache_clear()
    loaded = load_fast(resnet_like(), save(fast, tmp_path))
    with pytest.warns(UserWarning, match='no sparse kernels, so layers are computed dense'): found = outputs(loaded, Inputs((x,)))
    assert agree(found, expected, 1e-5)


# Files that do not fit

@needs_kernels
def test_files_that_do_not_fit_are_refused(monkeypatch, tmp_path):
    pretend(monkeypatch)
    x = torch.randn(2, 3, 8, 8)
    path = save(speed_up(resnet_like(), x, verbose=False), tmp_path)
    with pytest.raises(ValueError, match="does not fit the model: it lacks '1', '2'"): load_fast(nn.Sequential(nn.Conv2d(3, 8, 3)), path)
    other = resnet_like()
    other[1] = nn.Tanh()
    with pytest.raises(ValueError, match="it has nothing at '1', which is a Tanh"): load_fast(other, path)
    other = resnet_like()
    other[4] = nn.Conv2d(8, 8, 3, groups=4)
    with pytest.raises(ValueError, match="'4.weight' has shape"): load_fast(other, path)
    other = resnet_like()
    other[3] = nn.AvgPool2d(2)
    with pytest.raises(ValueError, match='does not fit the model: layer: got AvgPool2d'): load_fast(other, path)
    save_sparse(resnet_like(), tmp_path / 'sparse')
    with pytest.raises(ValueError, match='save_fast has not written; load_sparse reads it'): load_fast(resnet_like(), tmp_path / 'sparse')
    with pytest.raises(ValueError, match='does not fit the model'): load_sparse(resnet_like(), path)
    with pytest.raises(OSError, match='nowhere'): load_fast(resnet_like(), tmp_path / 'nowhere')
    with pytest.raises(TypeError, match='model'): load_fast(3, path)


@pytest.mark.parametrize('change, match', [
    (lambda told: told['layers']['0'].update(kind='Tanh'), "its forms are wrong at '0'"),
    (lambda told: told['layers']['0'].update(block=4), 'digest'),
    (lambda told: told.update(more=1), 'its forms are none'), (lambda told: told.update(blocks=[3]), 'its blocks are none'),
    (lambda told: told.pop('channels_last'), 'its forms are none'),
    (lambda told: told['layers'].update({'0': 3}), "its forms are wrong at '0'")])
def test_altered_forms_are_refused(tmp_path, change, match):
    model = nn.Sequential(SparseLinear(zeroed(nn.Linear(8, 8), .8), 1))
    path = save(model, tmp_path)
    alter(path, change)
    with pytest.raises(ValueError, match=match): load_fast(nn.Sequential(nn.Linear(8, 8)), path)


def alter(path, change):
    from fasterai.deploy.container import read_tensor
    with open(path, 'rb') as file:
        metadata, entries = read_header(file, path)
        tensors = {name: read_tensor(file, entry, path) for name, entry in entries.items()}
    told = json.loads(metadata['forms'])
    change(told)
    with open(path, 'wb') as file: write_tensors(file, tensors, metadata | {'forms': json.dumps(told)})


def test_options_that_are_none_are_refused(tmp_path, monkeypatch):
    "A file whose digest is right, and which was not written here."
    monkeypatch.setattr(SparseLinear, 'options', {'block': 3})
    path = save(nn.Sequential(SparseLinear(zeroed(nn.Linear(8, 8), .8), 1)), tmp_path)
    with pytest.raises(ValueError, match='does not fit the model'): load_fast(nn.Sequential(nn.Linear(8, 8)), path)
    monkeypatch.setattr(SparseLinear, 'options', {'side': 1})
    path = save(nn.Sequential(SparseLinear(zeroed(nn.Linear(8, 8), .8), 1)), tmp_path)
    with pytest.raises(ValueError, match='does not fit the model'): load_fast(nn.Sequential(nn.Linear(8, 8)), path)
