"What a layer reads, as a matrix: rows times the weight are the output, for every kind of layer."
import pytest
import torch
from torch import nn

from fasterai import inputs
from fasterai.arguments import Inputs
from fasterai.data import real_positions
from fasterai.inputs import Watching, as_matrix, from_matrix


class InputsFirst(nn.Module):
    def __init__(self, into, out):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(into, out)), nn.Parameter(torch.randn(out))

    def forward(self, x): return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


LAYERS = {
    'inputs first': (lambda: InputsFirst(5, 7), (3, 4, 5)),
    'linear': (lambda: nn.Linear(5, 7), (3, 4, 5)), 'strided grouped': (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9, 8)),
    'dilated same': (lambda: nn.Conv2d(4, 6, (3, 2), dilation=(2, 1), padding='same'), (2, 4, 9, 8)), 'valid': (lambda: nn.Conv2d(2, 3, 3, padding='valid'), (2, 2, 5, 5)),
    'circular': (lambda: nn.Conv1d(3, 4, 3, padding=2, padding_mode='circular'), (2, 3, 9)), 'depthwise': (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 6, 6)),
    '3d': (lambda: nn.Conv3d(2, 4, 2, groups=2), (2, 2, 4, 5, 6)), 'one picture': (lambda: nn.Conv2d(3, 2, 3), (3, 5, 5)),
    'transposed': (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2), (2, 4, 5, 6)),
    'transposed 1d': (lambda: nn.ConvTranspose1d(4, 6, 4, stride=3), (2, 4, 5))}


@pytest.mark.parametrize('name', LAYERS)
def test_rows_times_the_weight_are_the_output(name):
    make, shape = LAYERS[name]
    layer, x, seen = make(), torch.randn(shape), []
    with torch.no_grad(), Watching({id(layer.weight)}, seen.append): out = layer(x)
    read, = seen
    product = torch.einsum('gnk,gok->ngo', read.rows(), read.matrix(layer.weight)).flatten(1) + layer.bias
    if read.settings:
        batched = out if out.ndim == layer.weight.ndim else out[None]
        out = batched.movedim(1, -1)
    torch.testing.assert_close(product, out.reshape(-1, product.shape[1]))
    assert torch.equal(read.from_matrix(read.matrix(layer.weight)), layer.weight)
    layout = read.groups, read.transposed
    assert torch.equal(from_matrix(as_matrix(layer.weight, *layout), layer.weight.shape, *layout), layer.weight)


@pytest.mark.parametrize('name', LAYERS)
def test_pieces_have_the_same_rows(name, monkeypatch):
    make, shape = LAYERS[name]
    layer, seen = make(), []
    with torch.no_grad(), Watching({id(layer.weight)}, seen.append): layer(torch.randn(shape))
    monkeypatch.setattr(inputs, 'PIECE', 1)
    pieces = list(seen[0].pieces())
    is_split = bool(seen[0].settings) and len(shape) == layer.weight.ndim
    assert len(pieces) == (shape[0] if is_split else 1)
    assert torch.equal(torch.cat([piece.rows() for piece in pieces], 1), seen[0].rows())


def test_only_the_layers_that_are_asked_for_are_seen_and_nothing_is_left_on_the_model():
    model, seen = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), []
    with Watching({id(model[2].weight)}, seen.append): model(torch.randn(3, 4))
    assert len(seen) == 1 and seen[0].weight is model[2].weight
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Tokens(nn.Module):
    "A layer of tokens; its `forward` has a mask of one name or another."
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, attention_mask=None, scale=1., key_padding_mask=None): return scale * self.layer(x)


PADDED = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 1, 1, 1]]).bool()


def masked(x=None, *args, **kwargs): return Inputs((torch.randn(2, 5, 4) if x is None else x, *args), kwargs)


@pytest.mark.parametrize('batch, real', [
    (masked(attention_mask=~PADDED), ~PADDED), (masked(None, (~PADDED).long()), ~PADDED), (masked(None, (~PADDED).float(), 2.), ~PADDED),
    (masked(key_padding_mask=PADDED), ~PADDED), (masked(None, None, 1., PADDED), ~PADDED), (masked(key_padding_mask=torch.zeros(2, 5).masked_fill(PADDED, -torch.inf)), ~PADDED),
    (masked(torch.randn(5, 2, 4), key_padding_mask=PADDED), ~PADDED.T), (masked(), None), (masked(None, None), None), (masked(torch.randn(3, 4), ~PADDED), None),
    (masked(None, (~PADDED)[:, None]), None), (masked(None, torch.zeros(2, 5).masked_fill(PADDED, -torch.inf)), None)])
@pytest.mark.parametrize('wrap', [lambda model: model, nn.DataParallel, torch.compile])
def test_padding_is_found_by_the_name_of_its_mask(batch, real, wrap):
    found = real_positions(batch, wrap(Tokens()))
    assert found is None if real is None else torch.equal(found, real)


def test_rows_are_those_of_real_tokens():
    model, x, seen = Tokens(), torch.randn(2, 5, 4), []
    with Watching({id(model.layer.weight)}, seen.append, ~PADDED):
        model(x)
        model(x[:, :4])  # another length: not the mask's tokens
    assert torch.equal(seen[0].rows(), x[~PADDED][None]) and seen[1].rows().shape == (1, 8, 4)
    convolution = nn.Conv1d(4, 3, 1)
    with Watching({id(convolution.weight)}, seen.append, ~PADDED): convolution(torch.randn(2, 4, 5))
    assert seen[2].rows().shape == (1, 10, 4)


def attention(kind):
    "A layer of attention, what it is called with, and for each input of its projections: which of three it is, which weight and which rows."
    query, memory, other, padded = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.rand(2, 5) < .3
    packed, separate = 'in_proj_weight', [(i, f'{name}_proj_weight', None) for i, name in enumerate('qkv')]
    return {
        'self': lambda: (nn.MultiheadAttention(8, 2, batch_first=True), (query,) * 3, {'key_padding_mask': PADDED}, [(0, packed, None)]),
        'cross': lambda: (nn.MultiheadAttention(8, 2, batch_first=True), (query, memory, memory), {'need_weights': False}, [(0, packed, (0, 8)), (1, packed, (8, 24))]),
        'three': lambda: (nn.MultiheadAttention(8, 2, bias=False, batch_first=True), (query, memory, other), {'key_padding_mask': padded},
                          [(i, packed, (8 * i, 8 * i + 8)) for i in range(3)]),
        'batch second': lambda: (nn.MultiheadAttention(8, 2), (query.transpose(0, 1),) * 3, {'key_padding_mask': PADDED}, [(0, packed, None)]),
        'no batch': lambda: (nn.MultiheadAttention(8, 2, add_bias_kv=True, add_zero_attn=True), (query[0],) * 3, {'key_padding_mask': PADDED[0]}, [(0, packed, None)]),
        'other sizes': lambda: (nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True), (query, memory[..., :6], memory[..., :4]), {'key_padding_mask': padded}, separate),
    }[kind]()


@pytest.mark.parametrize('kind', ['self', 'cross', 'three', 'batch second', 'no batch', 'other sizes'])
def test_rows_of_attention_are_the_inputs_of_its_projections(kind):
    layer, inputs, more, expected = attention(kind)
    if layer.out_proj.bias is not None: nn.init.normal_(layer.out_proj.bias)
    layer.eval()
    seen, batch_second = [], kind == 'batch second'
    with torch.no_grad(), Watching({id(p) for p in layer.parameters()}, seen.append): out = layer(*inputs, **more)[0]
    *first, last = seen
    for read, (i, name, part) in zip(first, expected, strict=True):
        is_padded = more.get('key_padding_mask') if i or inputs[0] is inputs[1] else None
        x = inputs[i].transpose(0, 1) if batch_second else inputs[i]
        rows = x.reshape(-1, x.shape[-1]) if is_padded is None else x[~is_padded]
        assert read.weight is getattr(layer, name) and read.part == part and torch.equal(read.rows()[0], rows)
        assert torch.equal(read.from_matrix(read.matrix(read.weight)), read.part_of(read.weight))
    product = last.rows()[0] @ last.matrix(layer.out_proj.weight)[0].T
    if layer.out_proj.bias is not None: product = product + layer.out_proj.bias
    out = out.transpose(0, 1) if batch_second else out
    if inputs[0] is inputs[1]: out = out[~more['key_padding_mask']]
    torch.testing.assert_close(product, out.reshape(-1, 8))


def test_a_transformer_is_seen_in_eval_mode_though_torch_has_a_faster_path():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    names, seen = {id(p): name for name, p in model.named_parameters()}, []
    with torch.no_grad(), Watching({*names}, seen.append, ~PADDED): model(torch.randn(2, 5, 8), src_key_padding_mask=PADDED)
    layers = ['self_attn.in_proj_weight', 'self_attn.out_proj.weight', 'linear1.weight', 'linear2.weight']
    assert [names[id(read.weight)] for read in seen] == [f'layers.{i}.{name}' for i in range(2) for name in layers]
    assert {read.rows().shape[1] for read in seen} == {int((~PADDED).sum())}
