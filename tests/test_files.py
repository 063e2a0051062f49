import base64
import contextlib
import errno
import hashlib
import io
import json
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import convnet
from safetensors import safe_open
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
    (nn.Linear(30, 21), r"whose tensor 'weight' has shape \(20, 30\), expected \(21, 30\)"),
    (nn.Linear(30, 20).half(), "whose tensor 'weight' has type float32, expected float16"),
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
    monkeypatch.setattr('os.replace', lambda *a: (_ for _ in ()).throw(OSError('no space left')))
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


# Everything in a file is the writer's word: the digest is no secret.

SHAPES = {'one': (3, 5), 'two': (4,), 'flag': (9,)}


def three(): return Tensors(one=zeroed(torch.randn(3, 5), .7), two=torch.randn(4), flag=torch.ones(9, dtype=torch.bool))


def contents(model, tmp_path):
    "What a saved file holds, to be changed: its tensors, and its table."
    save_sparse(model, tmp_path / 'whole')
    with safe_open(tmp_path / 'whole', 'pt') as file: table = json.loads(file.metadata()['tensors'])
    return load_file(tmp_path / 'whole'), table


def crafted(path, tensors, table, text=None):
    "Write a file as save_sparse does, with a digest that is right."
    digest = hashlib.sha256(json.dumps(table).encode())
    for name in sorted(tensors):
        digest.update(f'{name} {tensors[name].dtype} {tuple(tensors[name].shape)}'.encode())
        digest.update(bytes(bytes_of(tensors[name])))
    save_file(tensors, path, {'format': 'fasterai.sparse 1', 'tensors': json.dumps(table) if text is None else text,
                              'sha256': digest.hexdigest()})
    return path


def test_what_is_crafted_well_is_loaded(tmp_path):
    model, other = three(), three()
    load_sparse(other, crafted(tmp_path / 'b', *contents(model, tmp_path)))
    assert bits(model) == bits(other)


MASK, VALUES, SIGNS = 'one\0mask', 'one\0values', 'one\0signs'
U8 = torch.uint8
WRONG_TENSORS = {
    'plain, another shape': lambda t: t | {'two': torch.ones(3)},
    'plain, one number for many': lambda t: t | {'two': torch.ones(1)},
    'plain, another type': lambda t: t | {'two': torch.ones(4, dtype=torch.int32)},
    'plain, another type of the same size': lambda t: t | {'two': torch.ones(4).half()},
    'plain, missing': lambda t: {n: v for n, v in t.items() if n != 'two'},
    'plain, no bool': lambda t: t | {'flag': torch.ones(9, dtype=U8)},
    'one too many': lambda t: t | {'three': torch.ones(3)},
    'a part of a plain one': lambda t: t | {'two\0mask': torch.ones(1, dtype=U8)},
    'signs of nothing': lambda t: t | {'two\0signs': torch.ones(1, dtype=U8)},
    'both packed and plain': lambda t: t | {'one': torch.ones(3, 5)},
    'one value': lambda t: t | {VALUES: torch.ones(1)},
    'no value': lambda t: t | {VALUES: torch.ones(0)},
    'a value too many': lambda t: t | {VALUES: torch.ones(len(t[VALUES]) + 1)},
    'more values than numbers': lambda t: t | {VALUES: torch.ones(16), MASK: torch.full((2,), 255, dtype=U8)},
    'values, another type': lambda t: t | {VALUES: t[VALUES].double()},
    'values, another type of the same size': lambda t: t | {VALUES: t[VALUES].view(torch.int32)},
    'values, two axes': lambda t: t | {VALUES: t[VALUES][None]},
    'values, no axis': lambda t: t | {VALUES: torch.ones(())},
    'values, missing': lambda t: {n: v for n, v in t.items() if n != VALUES},
    'mask, missing': lambda t: {n: v for n, v in t.items() if n != MASK},
    'mask, too long': lambda t: t | {MASK: torch.cat([t[MASK], torch.zeros(1, dtype=U8)])},
    'mask, too short': lambda t: t | {MASK: t[MASK][:1]},
    'mask, another type': lambda t: t | {MASK: t[MASK].view(torch.int8)},
    'mask, bits beyond the end': lambda t: t | {MASK: t[MASK] | torch.tensor([0, 1], dtype=U8)},
    'signs, too short': lambda t: t | {SIGNS: torch.zeros(0, dtype=U8)},
    'signs, too long': lambda t: t | {SIGNS: torch.full((3,), 255, dtype=U8)},
    'signs, another type': lambda t: t | {SIGNS: torch.ones(2)},
    'signs, bits beyond the end': lambda t: t | {SIGNS: torch.full((2,), 255, dtype=U8)},
}


@pytest.mark.parametrize('change', WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_tensors_that_are_not_as_the_table_says_are_refused(change, tmp_path):
    model = three()
    model.one.zero_()
    model.one[0, 3], model.one[2, 4], model.one[1, 1] = 1., -2., -0.
    tensors, table = contents(model, tmp_path)
    assert 'packed' in table['one'] and {MASK, VALUES, SIGNS} < set(tensors)
    refused(three(), crafted(tmp_path / 'b', change(tensors), table), "path: got '.*/b', which was altered")


def entry(**fields): return lambda t: t | {'two': {'shape': [4], 'dtype': 'float32'} | fields}
def instead(value): return lambda t: t | {'two': value}


WRONG_TABLES = {
    'a list': lambda t: list(t), 'a number': lambda t: 7, 'a text': lambda t: 'one', 'nothing': lambda t: None,
    'empty': lambda t: {}, 'an entry too many': lambda t: t | {'three': {'shape': [1], 'dtype': 'float32'}},
    'an entry missing': lambda t: {'one': t['one']},
    'entry 7': instead(7), 'entry None': instead(None), 'entry list': instead(['shape', 'dtype']), 'entry text': instead('same'),
    'entry empty': instead({}), 'no type': instead({'shape': [4]}), 'no shape': instead({'dtype': 'float32'}),
    'same to nobody': instead({'same': 'three'}), 'same to itself': instead({'same': 'two'}), 'same 7': instead({'same': 7}),
    'same list': instead({'same': ['one']}), 'same None': instead({'same': None}), 'same to another shape': instead({'same': 'one'}),
    'same and more': instead({'same': 'one', 'shape': [4], 'dtype': 'float32'}),
    'in a circle': lambda t: t | {'one': {'same': 'two'}, 'two': {'same': 'one'}},
    'in a chain': lambda t: t | {'one': {'same': 'two'}, 'two': {'same': 'flag'}},
    'shape 7': entry(shape=7), 'shape text': entry(shape='4'), 'shape None': entry(shape=None), 'shape table': entry(shape={'4': 4}),
    'shape negative': entry(shape=[-4]), 'shape float': entry(shape=[4.]), 'shape bool': entry(shape=[4, True]),
    'shape huge': entry(shape=[10 ** 4000]), 'shape nested': entry(shape=[[4]]), 'shape of texts': entry(shape=['4']),
    'shape of axes of 1': entry(shape=[4, 1]), 'shape empty': entry(shape=[]), 'shape long': entry(shape=[1] * 10 ** 5),
    'type of nothing': entry(dtype='float33'), 'type that is no type': entry(dtype='nn'), 'type 7': entry(dtype=7), 'type None': entry(dtype=None),
    'type of the same size': entry(dtype='int32'), 'type with its module': entry(dtype='torch.float32'), 'type list': entry(dtype=['float32']),
    'packed, and is not': entry(packed=True), 'packed False': entry(packed=False), 'packed 1': entry(packed=1), 'more': entry(more=1),
    'plain, and is not': lambda t: t | {'one': {'shape': [3, 5], 'dtype': 'float32'}},
    'bool packed': lambda t: t | {'flag': t['flag'] | {'packed': True}},
}


@pytest.mark.parametrize('change', WRONG_TABLES.values(), ids=WRONG_TABLES)
def test_tables_that_are_not_as_they_must_be_are_refused(change, tmp_path):
    tensors, table = contents(three(), tmp_path)
    refused(three(), crafted(tmp_path / 'b', tensors, change(table)), "path: got '.*/b', ")


@pytest.mark.parametrize('text', [
    '[' * 200_000, '{"one":' * 200_000, '7' * 10_000, '{"one": {"shape": [' + '7' * 10_000 + '], "dtype": "float32"}}', '', '{', 'NaN', '{"one": NaN}',
    '{"one": {"shape": [1e999], "dtype": "float32"}}', '{"\\ud800": 7}', '{"one": {"same": "\\ud800"}}'], ids=lambda text: f'{text[:12]} {len(text)}')
def test_tables_that_cannot_be_read_are_refused(text, tmp_path):
    refused(three(), crafted(tmp_path / 'b', contents(three(), tmp_path)[0], {}, text), "path: got '.*/b', ")


def test_a_table_with_a_name_twice_is_refused(tmp_path):
    tensors, table = contents(three(), tmp_path)
    text = '{"one": 7, ' + json.dumps(table)[1:]
    refused(three(), crafted(tmp_path / 'b', tensors, table, text), 'which was altered')


def test_what_a_type_cannot_hold_is_refused(tmp_path):
    for dtype in (torch.int32, torch.float8_e4m3fnuz):  # no negative zero
        model = Tensors(x=torch.zeros(40).to(dtype))
        tensors, table = contents(model, tmp_path)
        refused(model, crafted(tmp_path / 'b', tensors | {'x\0signs': torch.ones(5, dtype=U8)}, table), 'which was altered')
    path = tmp_path / 'c'
    model = Tensors(x=torch.ones(5, dtype=torch.bool))
    tensors, table = contents(model, tmp_path)
    seven = bytes([7] * 5)
    digest = hashlib.sha256(json.dumps(table).encode() + b'x torch.bool (5,)' + seven).hexdigest()
    metadata = {'format': 'fasterai.sparse 1', 'tensors': json.dumps(table), 'sha256': digest}
    raw(path, {'__metadata__': metadata, 'x': {'dtype': 'BOOL', 'shape': [5], 'data_offsets': [0, 5]}}, seven)
    refused(model, path, 'which was altered')


def raw(path, header, data):
    "Write a safetensors file with a header of one's own."
    text = (header if isinstance(header, str) else json.dumps(header)).encode(errors='surrogateescape')
    path.write_bytes(len(text).to_bytes(8, 'little') + text + data)


HEADERS = {
    'a list': [], 'a number': 7, 'metadata of numbers': {'__metadata__': {'format': 7}}, 'metadata 7': {'__metadata__': 7},
    'entry 7': {'x': 7}, 'no offsets': {'x': {'dtype': 'F32', 'shape': [1]}},
    'one offset': {'x': {'dtype': 'F32', 'shape': [1], 'data_offsets': [4]}},
    'type list': {'x': {'dtype': ['F32'], 'shape': [1], 'data_offsets': [0, 4]}},
    'type of nothing': {'x': {'dtype': 'F33', 'shape': [1], 'data_offsets': [0, 4]}},
    'shape negative': {'x': {'dtype': 'F32', 'shape': [-1], 'data_offsets': [0, -4]}},
    'shape too large': {'x': {'dtype': 'F32', 'shape': [2 ** 62, 2 ** 62], 'data_offsets': [0, 4]}},
    'beyond the end': {'x': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}},
    'a hole': {'x': {'dtype': 'F16', 'shape': [1], 'data_offsets': [2, 4]}},
    'twice the same bytes': {'x': {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 4]}, 'y': {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 4]}},
    'before the begin': {'x': {'dtype': 'F32', 'shape': [3], 'data_offsets': [-8, 4]}},
    'half of a pair': {'x': {'dtype': 'F4', 'shape': [7], 'data_offsets': [0, 4]}},
}


@pytest.mark.parametrize('header', [*HEADERS.values(), '[' * 10 ** 5, '{"x": 1, "x": 2}', '9' * 10 ** 4, '\udcff'],
                         ids=[*HEADERS, 'deep', 'twice', 'huge', 'no text'])
def test_headers_that_are_not_as_they_must_be_are_refused(header, tmp_path):
    raw(tmp_path / 'b', header, b'1234')
    refused(nn.Linear(3, 3), tmp_path / 'b', "path: got '.*/b', which is damaged or no safetensors file")


def test_what_the_model_lacks_is_refused_before_it_is_read(tmp_path, monkeypatch):
    table = {'weight': {'shape': [2, 2], 'dtype': 'float32'}, 'large': {'shape': [2 ** 29], 'dtype': 'float32'}}
    header = {'__metadata__': {'format': 'fasterai.sparse 1', 'tensors': json.dumps(table), 'sha256': ''},
              'weight': {'dtype': 'F32', 'shape': [2, 2], 'data_offsets': [0, 16]},
              'large': {'dtype': 'F32', 'shape': [2 ** 29], 'data_offsets': [16, 16 + 2 ** 31]}}
    text = json.dumps(header).encode()
    with open(tmp_path / 'b', 'wb') as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        file.truncate(8 + len(text) + 16 + 2 ** 31)
    monkeypatch.setattr('fasterai.deploy.files.digest', lambda *a: pytest.fail('2 GB were read'))
    refused(nn.Linear(2, 2, bias=False), tmp_path / 'b', "does not fit the model: it has the unexpected 'large'")
    refused(Tensors(weight=torch.ones(2, 2), large=torch.ones(3)), tmp_path / 'b', r"tensor 'large' has shape \(536870912,\), expected \(3,\)")


def test_misfits_name_the_file_and_the_tensor(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_sparse(Tensors(h=torch.ones(10, 16)), 'x.safetensors')
    with pytest.raises(ValueError) as caught: load_sparse(Tensors(h=torch.ones(11, 16)), 'x.safetensors')
    assert str(caught.value) == "path: got 'x.safetensors', whose tensor 'h' has shape (10, 16), expected (11, 16)"
    with pytest.raises(ValueError) as caught: load_sparse(Tensors(h=torch.ones(10, 16).int()), 'x.safetensors')
    assert str(caught.value) == "path: got 'x.safetensors', whose tensor 'h' has type float32, expected int32"


# A file of an earlier version: packed, plain, tied and complex numbers.

OLD = base64.b64decode('''EAMAAAAAAAB7Il9fbWV0YWRhdGFfXyI6eyJ0ZW5zb3JzIjoie1wicGFja2VkXCI6IHtcInNoYXBlXCI6IFs0MF0sIFwiZHR5cGVcIjogXCJmbG9hdDMyXCIsIFwicGFja2VkXCI6IHRydWV9LCBcIn
BsYWluXCI6IHtcInNoYXBlXCI6IFs1XSwgXCJkdHlwZVwiOiBcImZsb2F0MzJcIiwgXCJwYWNrZWRcIjogdHJ1ZX0sIFwidGllZFwiOiB7XCJzYW1lXCI6IFwicGFja2VkXCJ9LCBcInBhaXJcIjog
e1wic2hhcGVcIjogWzFdLCBcImR0eXBlXCI6IFwiY29tcGxleDEyOFwifX0iLCJmb3JtYXQiOiJmYXN0ZXJhaS5zcGFyc2UgMSIsInNoYTI1NiI6IjE0MmNmNjk5ODRjMmUxZWMzOGM5NjE0MGQxNz
c0NmZjNzM2NWNkODFiMjJkYTUzYzY3ZDM5NWRiYjhjZTUzMTgifSwicGFpciI6eyJkdHlwZSI6IkY2NCIsInNoYXBlIjpbMSwyXSwiZGF0YV9vZmZzZXRzIjpbMCwxNl19LCJwYWNrZWRcdTAwMDB2
YWx1ZXMiOnsiZHR5cGUiOiJGMzIiLCJzaGFwZSI6WzJdLCJkYXRhX29mZnNldHMiOlsxNiwyNF19LCJwbGFpblx1MDAwMHZhbHVlcyI6eyJkdHlwZSI6IkYzMiIsInNoYXBlIjpbNF0sImRhdGFfb2
Zmc2V0cyI6WzI0LDQwXX0sInBhY2tlZFx1MDAwMG1hc2siOnsiZHR5cGUiOiJVOCIsInNoYXBlIjpbNV0sImRhdGFfb2Zmc2V0cyI6WzQwLDQ1XX0sInBhY2tlZFx1MDAwMHNpZ25zIjp7ImR0eXBl
IjoiVTgiLCJzaGFwZSI6WzVdLCJkYXRhX29mZnNldHMiOls0NSw1MF19LCJwbGFpblx1MDAwMG1hc2siOnsiZHR5cGUiOiJVOCIsInNoYXBlIjpbMV0sImRhdGFfb2Zmc2V0cyI6WzUwLDUxXX19IC
AgICAgAAAAAAAA8D8AAAAAAAAAQAAAwD8AAADAAACAPwAAAEAAAEBAAACAQBQAAAAABAAAAAB4''')


def test_files_of_earlier_versions_are_loaded(tmp_path):
    (tmp_path / 'a').write_bytes(OLD)
    values = torch.zeros(40)
    values[3], values[5], values[7] = 1.5, -2, -0.
    expected = {'packed': values, 'plain': torch.arange(5.), 'tied': values, 'pair': torch.tensor([1 + 2j], dtype=torch.complex128)}
    ones = torch.ones(40)
    model = Tensors(packed=ones, plain=torch.ones(5), tied=ones, pair=torch.ones(1, dtype=torch.complex128))
    load_sparse(model, tmp_path / 'a')
    assert bits(model) == bits(Tensors(**expected))


# Paths: what is no plain file, whose file it was, and what the system refuses.

def kinds(tmp_path):
    "One path of each kind that is no plain file."
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'to_pipe').symlink_to('pipe')
    os.mknod(tmp_path / 'socket', 0o666 | stat.S_IFSOCK)
    paths = [tmp_path / 'pipe', tmp_path / 'to_pipe', tmp_path / 'socket']
    with contextlib.suppress(OSError):  # a copy of /dev/null, which only root can make
        os.mknod(tmp_path / 'null', 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        paths.append(tmp_path / 'null')
    return paths


linux = pytest.mark.skipif(sys.platform != 'linux', reason='needs Linux')


@linux
def test_what_is_no_plain_file_is_refused_before_it_is_opened(tmp_path, monkeypatch):
    paths = kinds(tmp_path)
    for path in paths:
        before = os.stat(path)
        with pytest.raises(ValueError, match=f'path: got {str(path)!r}, .* expected a plain file'): save_sparse(nn.Linear(2, 2), path)
        assert os.stat(path)[:3] == before[:3]
    monkeypatch.setattr('builtins.open', lambda path, *a, **k: pytest.fail(f'{path} was opened'))
    monkeypatch.setattr('fasterai.deploy.files.safe_open', lambda path, *a, **k: pytest.fail(f'{path} was opened'), raising=False)
    for path in (*paths, tmp_path, Path('/dev/null'), Path('/dev/zero')): refused(nn.Linear(2, 2), path, f'path: got {str(path)!r}, .* expected a plain file')


@linux
def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'to_a').symlink_to('folder/a')
    (tmp_path / 'to_to_a').symlink_to('to_a')
    for _ in range(2):  # a target that is not there yet, then one that is
        model, other = nn.Linear(2, 2), nn.Linear(2, 2)
        save_sparse(model, tmp_path / 'to_to_a')
        load_sparse(other, tmp_path / 'folder' / 'a')
        assert bits(model) == bits(other)
        assert os.readlink(tmp_path / 'to_to_a') == 'to_a' and os.readlink(tmp_path / 'to_a') == 'folder/a'
    (tmp_path / 'nowhere').symlink_to('missing/a')
    with pytest.raises(FileNotFoundError, match='path: got .*nowhere'): save_sparse(model, tmp_path / 'nowhere')
    (tmp_path / 'circle').symlink_to('circle')
    for verb in (save_sparse, load_sparse):
        with pytest.raises(OSError, match='circle'): verb(model, tmp_path / 'circle')
    assert sorted(os.listdir(tmp_path)) == ['circle', 'folder', 'nowhere', 'to_a', 'to_to_a'] and os.listdir(tmp_path / 'folder') == ['a']


@linux
@pytest.mark.parametrize('mask', [0o022, 0o077, 0o002])
def test_modes_of_old_and_new_files(mask, tmp_path, monkeypatch):
    old = os.umask(mask)
    try:
        monkeypatch.setattr('os.umask', lambda mask: pytest.fail('it belongs to all threads'))
        save_sparse(nn.Linear(2, 2), tmp_path / 'new')
        assert os.stat(tmp_path / 'new').st_mode & 0o7777 == 0o666 & ~mask
        for mode in (0o600, 0o640, 0o666, 0o400, 0o755):
            os.chmod(tmp_path / 'new', mode)
            save_sparse(nn.Linear(2, 2), tmp_path / 'new')
            assert os.stat(tmp_path / 'new').st_mode & 0o7777 == mode
    finally:
        monkeypatch.undo()
        os.umask(old)


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() != 0, reason='only root may')
def test_the_owner_of_a_file_stays(tmp_path):
    save_sparse(nn.Linear(2, 2), tmp_path / 'a')
    os.chown(tmp_path / 'a', 65534, 65533)
    os.chmod(tmp_path / 'a', 0o640)
    save_sparse(nn.Linear(2, 2), tmp_path / 'a')
    found = os.stat(tmp_path / 'a')
    assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (65534, 65533, 0o640)


@linux
def test_a_private_file_is_private_at_every_time(tmp_path, monkeypatch):
    save_sparse(nn.Linear(2, 2), tmp_path / 'a')
    os.chmod(tmp_path / 'a', 0o600)
    seen, replace = [], os.replace
    monkeypatch.setattr('os.fsync', lambda handle: seen.append([os.stat(f).st_mode & 0o777 for f in tmp_path.iterdir()]))
    monkeypatch.setattr('os.replace', lambda *a: (seen.append([os.stat(f).st_mode & 0o777 for f in tmp_path.iterdir()]), replace(*a)))
    save_sparse(nn.Linear(2, 2), tmp_path / 'a')
    assert seen and all(modes == [0o600, 0o600] for modes in seen)


def run(code, *args, **kwargs):
    "Run code in a process of its own, with a model and the two verbs at hand; return what it prints."
    begin = '''
import os, resource, signal, sys
import torch
from torch import nn
from pathlib import Path
from fasterai.deploy.files import load_sparse, save_sparse
model, path = nn.Linear(300, 20), sys.argv[1]
def outcome(verb):
    try: verb(model, path)
    except Exception as error: return type(error).__name__, getattr(error, 'errno', None), str(error)
    return 'done'
'''
    return subprocess.run([sys.executable, '-c', begin + code, *map(str, args)], capture_output=True, text=True, timeout=120, **kwargs)


KILLED = '''
def die(*a, **k): os.kill(os.getpid(), signal.SIGKILL)
{}
save_sparse(model, path)
'''


@linux
@pytest.mark.parametrize('where', ['os.replace = die', 'os.fsync = die', 'import safetensors.torch, fasterai.deploy.files as f; f.save_file = die; f.write_tensors = die'])
def test_what_a_killed_save_leaves_is_removed_by_the_next(where, tmp_path):
    path = saved(tmp_path)
    before = path.read_bytes()
    (tmp_path / '.fasterai-notes').write_text('mine')
    for _ in range(2):
        assert run(KILLED.format(where), path).returncode == -9
        left = [name for name in os.listdir(tmp_path) if name.startswith('.fasterai-') and name != '.fasterai-notes']
        assert len(left) == 1 and path.read_bytes() == before  # one, not two: the second save removed the first's
    save_sparse(nn.Linear(2, 2), tmp_path / 'other')
    assert len(os.listdir(tmp_path)) == 4  # another file's leftovers stay
    save_sparse(nn.Linear(2, 2), path)
    assert sorted(os.listdir(tmp_path)) == ['.fasterai-notes', 'a', 'other']


@linux
def test_a_save_that_runs_is_left_alone(tmp_path, monkeypatch):
    path, replace, inner = tmp_path / 'a', os.replace, []

    def meanwhile(*args):
        if not inner:
            inner.append(len(os.listdir(tmp_path)))
            save_sparse(nn.Linear(3, 3), path)  # a second save to the same path, while the first is about to end
            inner.append(len(os.listdir(tmp_path)))
            load_sparse(nn.Linear(3, 3), path)
        replace(*args)
    monkeypatch.setattr('os.replace', meanwhile)
    save_sparse(nn.Linear(2, 2), path)
    load_sparse(nn.Linear(2, 2), path)
    assert inner == [1, 2] and os.listdir(tmp_path) == ['a']


@linux
def test_what_the_system_refuses_names_the_path(tmp_path):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder) / 'good'
        save_sparse(nn.Linear(300, 20), path)
        os.chmod(path, 0o600)
        other = 'if not os.geteuid(): os.seteuid(65534)\nelse: os.chmod(path, 0); os.chmod(Path(path).parent, 0o555)\n'
        told = run(other + 'print(outcome(load_sparse)); print(outcome(save_sparse))', path).stdout
        assert told == f'{("PermissionError", 13, f"[Errno 13] Permission denied: {str(path)!r}")}\n' * 2
        os.chmod(folder, 0o755)
        os.chmod(path, 0o600)
        few = 'outcome(load_sparse); resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\n'
        told = run(few + 'print(outcome(load_sparse)); print(outcome(save_sparse))', path).stdout
        assert told == f'{("OSError", 24, f"[Errno 24] Too many open files: {str(path)!r}")}\n' * 2
        before = path.read_bytes()
        told = run('resource.setrlimit(resource.RLIMIT_FSIZE, (999, 999)); print(outcome(save_sparse))', path).stdout
        assert told == f'{("OSError", 27, f"[Errno 27] File too large: {str(path)!r}")}\n'
        assert path.read_bytes() == before and os.listdir(folder) == ['good']


@linux
@pytest.mark.parametrize('call', ['os.replace', 'os.fsync'])
def test_a_full_disk_names_the_path(call, tmp_path, monkeypatch):
    path = saved(tmp_path)
    before = path.read_bytes()

    def full(*args): raise OSError(errno.ENOSPC, 'No space left on device', 'elsewhere')
    monkeypatch.setattr(call, full)
    with pytest.raises(OSError) as caught: save_sparse(nn.Linear(3, 3), path)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ['a']


@linux
def test_names_as_long_as_the_system_allows(tmp_path):
    for name in ('n' * 250, 'n' * 255, 'ü' * 127):
        model, other = nn.Linear(2, 2), nn.Linear(2, 2)
        for _ in range(2): save_sparse(model, tmp_path / name)
        assert bits(load_sparse(other, tmp_path / name)) == bits(model)
    for verb in (save_sparse, load_sparse):
        with pytest.raises(OSError) as caught: verb(nn.Linear(2, 2), tmp_path / ('n' * 256))
        assert caught.value.errno == errno.ENAMETOOLONG and caught.value.filename == str(tmp_path / ('n' * 256))
        with pytest.raises(OSError) as caught: verb(nn.Linear(2, 2), '/proc/x')
        assert "'/proc/x'" in str(caught.value)


@pytest.mark.parametrize('verb', [save_sparse, load_sparse])
def test_paths_that_are_none(verb, tmp_path):
    class Bytes:
        def __fspath__(self): return b'a'
    with open(tmp_path / 'open', 'w') as file:
        for path in (None, 7, 0, True, 7.5, b'a', bytearray(b'a'), file, io.BytesIO(), ['a'], Path, Bytes()):
            with pytest.raises(TypeError) as caught: verb(nn.Linear(2, 2), path)
            assert str(caught.value) == f'path: got {path!r}, expected a str or os.PathLike'
    for path in ('a\0b', 'a\ud800'):
        with pytest.raises(ValueError) as caught: verb(nn.Linear(2, 2), path)
        assert str(caught.value).startswith(f'path: got {path!r}, expected ')
    for path in ('', '.', str(tmp_path) + '/', str(tmp_path / 'open') + '/', str(tmp_path / 'open' / 'a'), str(tmp_path / 'new') + '/'):
        with pytest.raises((OSError, ValueError)) as caught: verb(nn.Linear(2, 2), path)
        assert repr(path) in str(caught.value)
    assert os.listdir(tmp_path) == ['open']


# Tensors that cannot be written, or share memory, or change meanwhile.

def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path):
    path = tmp_path / 'a'
    save_sparse(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), path)
    with torch.inference_mode(): fixed = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(4, 4), fixed)
    before = bits(model)
    with pytest.raises(TypeError, match="model: got .* as '1.weight', which was made under torch.inference_mode"): load_sparse(model, path)
    assert bits(model) == before
    save_sparse(model, tmp_path / 'b')  # it can be read
    with torch.inference_mode(): load_sparse(model, path)
    assert bits(model) != before
    assert bits(load_sparse(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), tmp_path / 'b')) == before
    whole = torch.ones(10)
    for strange in (whole.as_strided((4, 4), (1, 1)), whole.unfold(0, 3, 1), whole.as_strided((2, 3), (1, 2)).as_strided((3, 2), (2, 2))):
        with pytest.raises(TypeError, match="model: got Tensor as 'x' in its state_dict"): save_sparse(Tensors(x=strange), tmp_path / 'c')
        save_sparse(Tensors(x=strange.clone()), tmp_path / 'c')
        with pytest.raises(TypeError, match="model: got Tensor as 'x' in its state_dict"): load_sparse(Tensors(x=strange), tmp_path / 'c')
    assert whole.tolist() == [1] * 10
    gone = torch.ones(10)
    gone.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match="model: got Tensor as 'x' in its state_dict"): save_sparse(Tensors(x=gone), tmp_path / 'c')


def test_strides_that_do_not_overlap_are_taken(tmp_path):
    for view in (torch.randn(6, 8)[:, ::2], torch.randn(4, 5, 6).permute(2, 0, 1), torch.randn(6).as_strided((2, 2), (2, 3)), torch.randn(3, 1).expand(3, 1)):
        model = Tensors(x=view)
        save_sparse(Tensors(x=torch.ones(view.shape)), tmp_path / 'a')
        assert bool((load_sparse(model, tmp_path / 'a').x == 1).all())


def test_views_that_overlap_are_filled_right_or_not_at_all(tmp_path):
    def overlapping():
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        model[1].weight = nn.Parameter(model[0].weight.data.t())
        return model
    save_sparse(nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)), tmp_path / 'a')
    refused(overlapping(), tmp_path / 'a', "path: got '.*/a', where '1.weight' and '0.weight' differ|where '0.weight' and '1.weight' differ")
    model, other = overlapping(), overlapping()
    save_sparse(model, tmp_path / 'b')
    assert bits(load_sparse(other, tmp_path / 'b')) == bits(model)

    flat = torch.zeros(20)
    parts = Tensors(a=flat[:8].view(2, 4), b=flat[8:16], c=flat[:16].view(4, 4)[:, 1:3], whole=flat)
    save_sparse(Tensors(a=torch.ones(2, 4), b=torch.ones(8), c=torch.ones(4, 2), whole=torch.ones(20)), tmp_path / 'c')
    assert flat.tolist() == [0] * 20
    load_sparse(parts, tmp_path / 'c')
    assert flat.tolist() == [1] * 20
    save_sparse(Tensors(a=torch.ones(2, 4), b=torch.ones(8), c=torch.ones(4, 2) * 2, whole=torch.ones(20)), tmp_path / 'c')
    refused(parts, tmp_path / 'c', 'differ')
    columns = torch.zeros(4, 6)
    save_sparse(Tensors(a=torch.ones(4, 3), b=torch.ones(4, 3) * 2), tmp_path / 'd')
    load_sparse(Tensors(a=columns[:, :3], b=columns[:, 3:]), tmp_path / 'd')
    assert columns.tolist() == [[1] * 3 + [2] * 3] * 4


def test_tied_tensors_are_compared_bit_for_bit(tmp_path):
    one = torch.zeros(3)
    tied = Tensors(a=one, b=one)
    save_sparse(Tensors(a=torch.zeros(3), b=-torch.zeros(3)), tmp_path / 'a')
    refused(tied, tmp_path / 'a', 'in the model they are one')
    save_sparse(Tensors(a=torch.full((3,), float('nan')), b=torch.full((3,), float('nan'))), tmp_path / 'b')
    assert load_sparse(tied, tmp_path / 'b').b.isnan().all()


def test_a_negated_view_is_not_what_it_negates(tmp_path):
    numbers = torch.tensor([1 + 2j, 3 - 4j])
    negated = numbers.conj().imag
    model, other = Tensors(plain=numbers.imag, negated=negated), Tensors(plain=torch.zeros(2), negated=torch.zeros(2))
    save_sparse(model, tmp_path / 'a')
    load_sparse(other, tmp_path / 'a')
    assert other.plain.tolist() == [2, -4] and other.negated.tolist() == [-2, 4]
    with torch.no_grad(): numbers.zero_()
    load_sparse(model, tmp_path / 'a')
    assert model.plain.tolist() == [2, -4] and model.negated.tolist() == [-2, 4]


def test_weights_that_move_meanwhile(tmp_path, monkeypatch):
    from fasterai.deploy import files
    digest, model = files.digest, Tensors(dense=torch.ones(7), sparse=zeroed(torch.ones(50)), complex=torch.ones(3, dtype=torch.complex128))
    before = bits(model)

    def moved(*args):
        found = digest(*args)
        for tensor in model.buffers(): tensor.add_(1)  # as another thread may
        return found
    monkeypatch.setattr(files, 'digest', moved)
    save_sparse(model, tmp_path / 'a')
    monkeypatch.undo()
    assert bits(load_sparse(model, tmp_path / 'a')) == before


def test_what_torch_takes_by_default_does_not_matter(tmp_path):
    def mixed(): return Tensors(dense=torch.randn(9), sparse=zeroed(torch.randn(90)), pair=torch.randn(3, dtype=torch.complex128))
    model, other = mixed(), mixed()
    with torch.device('meta'):
        save_sparse(model, tmp_path / 'a')
        load_sparse(other, tmp_path / 'a')
    assert bits(model) == bits(other)


def test_views_that_autograd_guards_are_filled_too(tmp_path):
    whole = torch.zeros(6, requires_grad=True)
    model = Tensors(**dict(zip('ab', (whole * 1).split(3))))
    save_sparse(Tensors(a=torch.ones(3), b=torch.ones(3)), tmp_path / 'a')
    load_sparse(model, tmp_path / 'a')
    assert model.a.tolist() == model.b.tolist() == [1] * 3


def test_a_bool_of_another_byte_than_1_is_saved_as_true(tmp_path):
    strange, other = torch.tensor([0, 7, 1] * 999, dtype=U8).view(torch.bool), Tensors(x=torch.zeros(2997, dtype=torch.bool))
    save_sparse(Tensors(x=strange), tmp_path / 'a')
    assert bytes_of(load_sparse(other, tmp_path / 'a').x) == [0, 1, 1] * 999


def test_names_and_types_that_a_file_cannot_have(tmp_path):
    for name in ('a\0mask', '__metadata__', 'a\ud800'):
        for verb in (save_sparse, load_sparse):
            with pytest.raises(TypeError, match='model: got a tensor named'): verb(Tensors(**{name: torch.ones(3)}), tmp_path / 'a')
    if hasattr(torch, 'uint4'):
        with pytest.raises(TypeError, match="as 'x' in its state_dict"): save_sparse(Tensors(x=torch.zeros(3, dtype=U8).view(torch.uint4)), tmp_path / 'a')
    assert not os.listdir(tmp_path)


def test_numbers_of_four_and_eight_bits(tmp_path):
    for name in ('float4_e2m1fn_x2', 'float8_e8m0fnu', 'float8_e5m2fnuz'):
        if not hasattr(torch, name): continue
        dtype = getattr(torch, name)
        model, other = (Tensors(x=torch.randint(256, (4, 9), dtype=U8).view(dtype), y=zeroed(torch.randint(256, (90,))).to(U8).view(dtype)) for _ in range(2))
        save_sparse(model, tmp_path / 'a')
        load_sparse(other, tmp_path / 'a')
        assert bits(other) == bits(model)
