import os
import subprocess
import sys

import pytest
import torch
from conftest import convnet
from safetensors.torch import load_file, save_file
from torch import nn

from fasterai.deploy.files import load_sparse, save_sparse


class Tensors(nn.Module):
    def __init__(self, **tensors):
        super().__init__()
        for name, tensor in tensors.items(): self.register_buffer(name, tensor)


def zeroed(tensor, share=.9): return tensor.masked_fill(torch.rand(tensor.shape) < share, 0)


def bytes_of(tensor): return tensor.detach().contiguous().view(-1).view(torch.uint8).tolist() if tensor.numel() else []
def bits(model): return {name: bytes_of(tensor) for name, tensor in model.state_dict().items()}


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int16,
          torch.int32, torch.int64, torch.bool, torch.complex32, torch.complex64, torch.complex128, torch.uint16,
          torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz]


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_every_type_comes_back_bit_for_bit(dtype, tmp_path):
    def tensors():
        values = zeroed(torch.randint(-100, 100, (7, 9)).float())
        return {'sparse': values.to(dtype), 'dense': torch.ones(5, 3).to(dtype), 'none': torch.zeros(0, 3).to(dtype),
                'one': torch.zeros(()).to(dtype), 'zero': torch.zeros(33).to(dtype), 'turned': values.to(dtype).t(),
                'signed': (values * -(values > 0).float()).to(dtype)}
    model, other = Tensors(**tensors()), Tensors(**tensors())
    save_sparse(model, tmp_path / 'a')
    assert load_sparse(other, tmp_path / 'a') is other
    assert bits(other) == bits(model)


def test_strange_numbers_come_back(tmp_path):
    values = torch.tensor([0., -0., float('nan'), float('inf'), 1e-45, 0, 0, 0, 0, 0, 0, 0] * 9)
    model, other = Tensors(x=values), Tensors(x=torch.ones(108))
    save_sparse(model, tmp_path / 'a')
    load_sparse(other, tmp_path / 'a')
    assert bits(model) == bits(other) and len(load_file(tmp_path / 'a')) == 3


def test_a_network_with_its_buffers_and_ties(tmp_path):
    model = nn.ModuleDict({'net': convnet(), 'a': nn.Linear(8, 8), 'b': nn.Linear(8, 8)})
    model['b'].weight = model['a'].weight
    with torch.no_grad(): model['a'].weight.copy_(zeroed(model['a'].weight))
    model['net'](torch.randn(4, 1, 8, 8))
    other = nn.ModuleDict({'net': convnet(), 'a': nn.Linear(8, 8), 'b': nn.Linear(8, 8)})
    other['b'].weight = other['a'].weight
    save_sparse(model, tmp_path / 'a')
    load_sparse(other, tmp_path / 'a')
    assert bits(model) == bits(other) and other['b'].weight is other['a'].weight
    parts = [n for n in load_file(tmp_path / 'a') if 'a.weight' in n or 'b.weight' in n]
    assert len(parts) == 2  # once: its mask and its values


def test_channels_last_and_what_needs_gradients(tmp_path):
    model, other = (nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last) for _ in range(2))
    with torch.no_grad(): model.weight.copy_(zeroed(model.weight))
    save_sparse(model, tmp_path / 'a')
    load_sparse(other, tmp_path / 'a')
    assert torch.equal(model.weight, other.weight) and other.weight.requires_grad
    assert other.weight.is_contiguous(memory_format=torch.channels_last)


def test_how_small(tmp_path):
    model = nn.Linear(1000, 1000, bias=False)
    with torch.no_grad(): model.weight.view(-1)[torch.randperm(10 ** 6)[:900_000]] = 0
    save_sparse(model, tmp_path / 'sparse')
    assert os.path.getsize(tmp_path / 'sparse') <= .14 * 4e6
    with torch.no_grad():  # half of the zeros are negative
        model.weight.copy_(nn.init.normal_(torch.empty(1000, 1000)) * (model.weight != 0))
    save_sparse(model, tmp_path / 'negative')
    assert os.path.getsize(tmp_path / 'negative') <= .165 * 4e6
    nn.init.normal_(model.weight)
    save_sparse(model, tmp_path / 'dense')
    assert os.path.getsize(tmp_path / 'dense') <= 4e6 + 1000


def test_memory_of_saving(tmp_path):
    "Above the model: no more than the file and the largest tensor."
    code = f'''
import torch
from torch import nn
from pathlib import Path
from fasterai.deploy.files import save_sparse
def peak(field):
    lines = Path('/proc/self/status').read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024
save_sparse(nn.Linear(3, 3), {str(tmp_path / 'a')!r})
model = nn.Sequential(*[nn.Linear(2000, 2000) for _ in range(10)])
with torch.no_grad():
    for m in model: m.weight.mul_(torch.rand(2000, 2000) > .5)
before = peak('VmRSS')
save_sparse(model, {str(tmp_path / 'b')!r})
print(peak('VmHWM') - before)
'''
    if not os.path.exists('/proc/self/status'): pytest.skip('needs /proc')
    above = int(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout)
    largest = 2000 * 2000 * 4
    assert above <= os.path.getsize(tmp_path / 'b') + largest + 20e6  # and what Python needs for itself


def saved(tmp_path):
    model = nn.Linear(30, 20)
    with torch.no_grad(): model.weight.copy_(zeroed(model.weight))
    save_sparse(model, tmp_path / 'a')
    return tmp_path / 'a'


def refused(model, path, says):
    before = bits(model)
    with pytest.raises(ValueError, match=says): load_sparse(model, path)
    assert bits(model) == before


def test_damaged_files_are_refused(tmp_path):
    path = saved(tmp_path)
    whole = path.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / 'b').write_bytes(whole[:length])
        refused(nn.Linear(30, 20), tmp_path / 'b', 'damaged or no safetensors file')
    for place in range(len(whole) - 1, 8, -97):
        spoilt = bytearray(whole)
        spoilt[place] ^= 4
        (tmp_path / 'b').write_bytes(spoilt)
        refused(nn.Linear(30, 20), tmp_path / 'b', 'path: got')


@pytest.mark.parametrize('model, says', [
    (nn.Linear(30, 21), r"got 'weight' of shape \(20, 30\), expected that of the model, \(21, 30\)"),
    (nn.Linear(30, 20).half(), "got 'weight' of type float32, expected that of the model, torch.float16"),
    (nn.Linear(30, 20, bias=False), "does not fit the model: it has the unexpected 'bias'"),
    (nn.Sequential(nn.Linear(30, 20)), "it lacks '0.weight', '0.bias'; it has the unexpected 'weight', 'bias'")])
def test_what_does_not_fit_is_refused(model, says, tmp_path): refused(model, saved(tmp_path), says)


def test_foreign_files_are_refused(tmp_path):
    save_file({'weight': torch.ones(20, 30), 'bias': torch.ones(20)}, tmp_path / 'b')
    refused(nn.Linear(30, 20), tmp_path / 'b', 'of format None, expected that of save_sparse')
    torch.save(nn.Linear(30, 20).state_dict(), tmp_path / 'c')
    refused(nn.Linear(30, 20), tmp_path / 'c', 'no safetensors file .* torch.load reads')
    with pytest.raises(FileNotFoundError): load_sparse(nn.Linear(30, 20), tmp_path / 'no')
    with pytest.raises(TypeError, match='model: got dict'): save_sparse({}, tmp_path / 'd')
    with pytest.raises(TypeError, match='model: got str'): load_sparse('b', nn.Linear(30, 20))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = saved(tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr('fasterai.deploy.files.save_file', lambda *a: (_ for _ in ()).throw(OSError('no space left')))
    with pytest.raises(OSError, match='no space'): save_sparse(nn.Linear(3, 3), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ['a']


def test_what_the_header_says_is_guarded_too(tmp_path):
    model = nn.Linear(4, 2)
    save_sparse(model, tmp_path / 'a')
    raw = (tmp_path / 'a').read_bytes()
    for old, new in ((b'"dtype":"F32"', b'"dtype":"I32"'), (b'"shape":[2,4]', b'"shape":[4,2]')):
        assert old in raw
        (tmp_path / 'b').write_bytes(raw.replace(old, new))
        refused(nn.Linear(4, 2), tmp_path / 'b', 'which was altered')


def test_what_cannot_be_filled_is_refused_before_anything_is(tmp_path):
    def tied(): return nn.ModuleDict({'a': nn.Linear(4, 4, bias=False), 'b': nn.Linear(4, 4, bias=False)})
    save_sparse(tied(), tmp_path / 'a')
    model = tied()
    model['b'].weight = model['a'].weight
    refused(model, tmp_path / 'a', "'b.weight' is not 'a.weight'; in the model they are one")
    expanded, nowhere = Tensors(x=torch.ones(1).expand(5)), nn.Linear(2, 2, device='meta')
    with pytest.raises(TypeError, match="as 'x' in its state_dict"): save_sparse(expanded, tmp_path / 'b')
    with pytest.raises(TypeError, match="as 'weight' in its state_dict"): save_sparse(nowhere, tmp_path / 'b')

    class Extra(nn.Linear):
        def get_extra_state(self): return torch.ones(3)
        def set_extra_state(self, state): pass
    with pytest.raises(TypeError, match="as '_extra_state' in its state_dict"): save_sparse(Extra(2, 2), tmp_path / 'b')
    for path in (tmp_path / 'no' / 'a', tmp_path):
        with pytest.raises(FileNotFoundError, match='path: got .* expected a file in a folder'):
            save_sparse(nn.Linear(2, 2), path)
