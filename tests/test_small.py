"What shrink has made is an ordinary network: it is saved, copied, traced, exported and sped up."
import pickle
from copy import deepcopy

import pytest
import torch
from test_removal import Attention, dead, same
from torch import nn

from fasterai.deploy import export_onnx, load_small, save_small, save_sparse, shrink, speed_up
from fasterai.deploy.shrink import parameters


def pictures():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.ReLU(),
                          nn.Flatten(), nn.Linear(128, 4)).eval()
    dead(model[0], rows=[0, 1])
    dead(model[3], rows=[0, 1])
    with torch.no_grad(): model[1].bias[:2], model[1].running_mean[:2] = 0, 0
    return model, torch.randn(2, 3, 6, 6)


def tokens():
    model = Attention().eval()
    dead(model.v, rows=slice(0, 4))
    return model, torch.randn(2, 5, 16)


every = pytest.mark.parametrize('make', [pictures, tokens])


@every
def test_it_is_loaded_into_a_network_of_the_same_code(make, tmp_path):
    model, x = make()
    small = shrink(model, x, verbose=False)
    assert parameters(small) < parameters(model)
    save_small(small, tmp_path / 'a', model)
    other = deepcopy(model)
    for p in other.parameters(): nn.init.ones_(p)
    found = load_small(other, tmp_path / 'a')
    assert same(found, model, x) and parameters(found) == parameters(small) and parameters(other) == parameters(model)
    assert str(found) == str(small)


@every
def test_it_is_copied_traced_exported_and_sped_up(make, tmp_path):
    model, x = make()
    small = shrink(model, x, verbose=False)
    copies = [deepcopy(small), pickle.loads(pickle.dumps(small)), torch.jit.trace(small, x)]
    assert all(torch.allclose(copy(x), small(x), atol=1e-6) for copy in copies)
    export_onnx(small, tmp_path / 'a.onnx', x, dynamic_batch=False)
    assert torch.allclose(speed_up(small, x, verbose=False, seconds=.01)(x), small(x), atol=1e-5)


def test_what_does_not_fit_is_refused(tmp_path):
    model, x = tokens()
    small = shrink(model, x, verbose=False)
    with pytest.raises(ValueError, match="model: got one that has no Attention at ''"): save_small(small, tmp_path / 'a', nn.Linear(2, 2))
    save_sparse(model, tmp_path / 'b')
    with pytest.raises(ValueError, match='which save_small has not written'): load_small(model, tmp_path / 'b')
    save_small(small, tmp_path / 'a', model)
    with pytest.raises(ValueError, match='has shape .* expected at most'): load_small(Attention(heads=4, kv_heads=2), tmp_path / 'a')
    other = deepcopy(model)
    other.num_heads = 2
    with pytest.raises(ValueError, match="'num_heads' of '' is 2, not 3"): load_small(other, tmp_path / 'a')
