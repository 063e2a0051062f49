"Which filters are pruned together: by a sum, a product, a grouped convolution, an attention."
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fasterai.dataflow import trace, watch
from fasterai.granularity import head
from fasterai.sparsifier import Sparsifier
from fasterai.ties import ties

IMAGE, ROWS = torch.randn(2, 2, 4, 4), torch.randn(3, 5, 4)


class Net(nn.Module):
    "Layers by name, and a way through them."
    def __init__(self, way, **layers):
        super().__init__()
        for name, layer in layers.items(): setattr(self, name, layer)
        self.way = way

    def forward(self, x): return self.way(self, x)


def conv(into=2, out=4, groups=1): return nn.Conv2d(into, out, 1, groups=groups)


def found(model, x, left_out=(), heads=None):
    "The groups of the filters of each tie, the layers with others, and those that collapse, by name."
    weights = {id(m.weight): (n, m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    own = {i: np.arange(len(m.weight)) // (heads or {}).get(n, 1) for i, (n, m) in weights.items() if n not in left_out}
    tied, others, collapsed = ties(watch(model, (x,)), own)
    def names(ids): return sorted(weights[i][0] for i in ids)
    return [{weights[i][0]: ''.join(map(str, g)) for i, g in tie.of_filters.items()} for tie in tied], names(others), names(collapsed)


def two(way, **layers): return Net(way, **{'a': conv(), 'b': conv()} | layers)


AB = {'a': '0123', 'b': '0123'}
TIES = {
    'a sum': (two(lambda s, x: s.a(x) + s.b(x).relu()), [AB]),
    'sum()': (two(lambda s, x: sum([s.a(x), s.b(x)])), [AB]),
    '0 +': (two(lambda s, x: 0 + s.a(x) - s.b(x)), [AB]),
    'a sum over a stack': (two(lambda s, x: torch.stack([s.a(x), s.b(x)]).sum(0)), [AB]),
    'a difference behind a norm': (two(lambda s, x: s.n(s.a(x)) * 2 - s.b(x).mean((2, 3), True), n=nn.BatchNorm2d(4)), [AB]),
    'depthwise': (two(lambda s, x: s.b(s.a(x)), b=conv(4, 4, 4)), [AB]),
    'flattened': (two(lambda s, x: s.a(x).flatten(1) + s.b(x).flatten(1)), [AB]),
    'what is no longer zero': (two(lambda s, x: s.a(x).sigmoid() + s.b(x)), []),
    'another order': (two(lambda s, x: s.a(x) + s.b(x).flip(1)), [{'a': '0123', 'b': '3210'}]),
    'a concatenation and a sum': (Net(lambda s, x: torch.cat([s.a(x), s.b(x)], 1) + s.c(x), a=conv(2, 2), b=conv(), c=conv(2, 6)),
                                  [{'a': '01', 'b': '2345', 'c': '012345'}]),
    'more channels by zeros': (Net(lambda s, x: s.a(x) + F.pad(s.b(x), (0, 0, 0, 0, 1, 1)), a=conv(), b=conv(2, 2)), [{'a': '0123', 'b': '12'}]),
    'a gate': (two(lambda s, x: s.a(x) * s.b(x).sigmoid()), [AB]),
    'a gate that comes first': (two(lambda s, x: F.silu(s.b(x)) * s.a(x)), [AB]),
    'a squeezed gate': (two(lambda s, x: s.a(x) * F.hardsigmoid(s.b(x.mean((2, 3), keepdim=True)))), [AB]),
    'a gate about one': (two(lambda s, x: s.a(x) * (1 + s.b(x).tanh())), [AB]),
    'paths that are chosen': (Net(lambda s, x: (s.a(x).unflatten(1, (2, 3)) * s.g(x).unflatten(1, (2, 3)).softmax(1)).sum(1), a=conv(2, 6), g=conv(2, 6)),
                              [{'a': '012012', 'g': '012012'}]),
    'a softmax of each path': (two(lambda s, x: s.a(x).view(2, 2, 2, 4, 4).softmax(2) + s.b(x).sum(1)[:, None, None], a=conv(2, 4)), [{'a': '0011'}]),
    'a softmax of all channels': (two(lambda s, x: s.a(x) * s.b(x).softmax(1)), []),
    'two gates': (two(lambda s, x: s.a(x).sigmoid() * s.b(x).sigmoid()), []),
    'a gated linear unit': (Net(lambda s, x: F.glu(s.a(x), 1), a=conv(2, 6)), [{'a': '012012'}]),
    'halves of a layer': (Net(lambda s, x: (lambda p, q: F.gelu(p) * q)(*s.a(x).chunk(2, 1)), a=conv(2, 6)), [{'a': '012012'}]),
    'one mask for all channels': (two(lambda s, x: s.a(x) * s.b(x).sigmoid(), b=conv(2, 1)), []),
    'a sum with one channel': (two(lambda s, x: s.a(x) + s.b(x), b=conv(2, 1)), []),
    'a learned scale': (two(lambda s, x: s.gain * s.a(x) + s.b(x) * s.gain, gain=nn.Parameter(torch.rand(4, 1, 1))), [AB]),
    'many groups': (two(lambda s, x: s.b(s.a(x)), a=conv(2, 8), b=conv(8, 8, 4)), [{'a': '00112233', 'b': '00112233'}]),
    'few groups': (two(lambda s, x: s.b(s.a(x)), a=conv(2, 8), b=conv(8, 12, 2)), [{'a': '01230123'}, {'b': '012345012345'}]),
    'groups of unknown inputs': (Net(lambda s, x: s.a(x), a=conv(2, 4, 2)), [{'a': '0101'}]),
    'shuffled channels': (two(lambda s, x: s.a(x).view(2, 2, 2, 4, 4).transpose(1, 2).reshape(2, 4, 4, 4) + s.b(x)), [{'a': '0123', 'b': '0213'}]),
}


@pytest.mark.parametrize('name', TIES)
def test_filters_that_meet(name):
    model, expected = TIES[name]
    assert found(model, IMAGE) == (expected, [], [])


@pytest.mark.parametrize('name', ['a sum', 'depthwise', 'a gate', 'a gated linear unit', 'many groups', 'few groups', 'another order'])
def test_code_that_is_traced_says_it_too(name):
    model, expected = TIES[name]
    convs = {id(m.weight): m for m in model.modules() if isinstance(m, nn.Conv2d)}
    own = {i: np.arange(len(m.weight)) for i, m in convs.items()}
    tied, *_ = ties(trace(model), own)
    assert [[''.join(map(str, g)) for g in tie.of_filters.values()] for tie in tied] == [list(e.values()) for e in expected]


def test_a_sum_with_what_is_not_selected_holds_a_layer_and_a_gate_does_not():
    chain = Net(lambda s, x: s.c((s.a(x) + s.b(x)).relu()) + s.b(x), a=conv(), b=conv(), c=conv(4))
    assert found(chain, IMAGE, left_out=['a']) == ([], ['b', 'c'], [])
    assert found(TIES['a gate'][0], IMAGE, left_out=['b']) == ([], [], [])


def test_layers_whose_filters_all_meet():
    model = two(lambda s, x: s.a(x) + s.b(x) + s.b(x).roll(1, 1))
    assert found(model, IMAGE) == ([], [], ['a', 'b'])


# Attention: heads of 2 rows

def linear(out=4): return nn.Linear(4, out)


def heads(x, n): return x.unflatten(-1, (n, -1)).transpose(1, 2)


def flash(q, k, v, **more): return F.scaled_dot_product_attention(q, k, v, **more)


def by_hand(q, k, v, enable_gqa=False):
    if enable_gqa: k, v = (x[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for x in (k, v))
    return ((q * .5) @ k.transpose(-2, -1) + torch.zeros(5, 5)).softmax(-1) @ v


def in_one_batch(q, k, v):
    scores = torch.baddbmm(torch.zeros(6, 5, 5), q.flatten(0, 1), k.flatten(0, 1).transpose(-2, -1), alpha=.5)
    return (scores.softmax(-1) @ v.flatten(0, 1)).unflatten(0, (3, 2))


@pytest.mark.parametrize('attend', [flash, by_hand, in_one_batch])
def test_heads_of_queries_keys_and_values(attend):
    def way(s, x): return s.o(attend(heads(s.q(x), 2), heads(s.k(x), 2), heads(s.v(x), 2)).transpose(1, 2).flatten(2))
    model = Net(way, q=linear(), k=linear(), v=linear(), o=linear())
    assert found(model, ROWS, heads=dict(q=2, k=2, v=2)) == ([dict.fromkeys('qkv', '0011')], [], [])
    assert found(model, ROWS) == ([dict.fromkeys('qkv', '0011')], [], [])  # also where single filters are pruned


@pytest.mark.parametrize('attend', [flash, by_hand])
def test_the_filters_of_an_attention_of_one_head_do_not_meet(attend):
    def way(s, x): return s.o(attend(heads(s.q(x), 1), heads(s.k(x), 1), heads(s.v(x), 1)).transpose(1, 2).flatten(2))
    assert found(Net(way, q=linear(), k=linear(), v=linear(), o=linear()), ROWS) == ([], [], [])


@pytest.mark.parametrize('attend', [flash, by_hand])
def test_keys_and_values_that_serve_several_heads(attend):
    def way(s, x): return s.o(attend(heads(s.q(x), 4), heads(s.k(x), 2), heads(s.v(x), 2), enable_gqa=True).transpose(1, 2).flatten(2))
    model = Net(way, q=linear(8), k=linear(), v=linear(), o=nn.Linear(8, 4))
    expected = {'q': '00001111', 'k': '0011', 'v': '0011'}
    assert found(model, ROWS, heads=dict(q=2, k=2, v=2))[0] == found(model, ROWS, heads=dict(q=2))[0] == [expected]


@pytest.mark.parametrize('attend', [flash, by_hand])
def test_heads_of_one_layer(attend):
    def way(s, x):
        q, k, v = s.qkv(x).reshape(3, 5, 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
        return s.o(attend(q, k, v).transpose(1, 2).flatten(2))
    model = Net(way, qkv=linear(12), o=linear())
    assert found(model, ROWS, heads=dict(qkv=2)) == ([{'qkv': '001100110011'}], [], [])
    assert found(model, ROWS, heads=dict(qkv=6))[2] == ['qkv']  # groups that cut across the heads


def test_the_heads_of_a_network_go_as_one_and_the_output_is_zero_there():
    def way(s, x): return flash(heads(s.q(x), 4), heads(s.k(x), 2), heads(s.v(x), 2), enable_gqa=True).transpose(1, 2).flatten(2)
    model = Net(way, q=linear(8), k=linear(), v=linear())
    sparsifier = Sparsifier(model, ('I', ('O', 2)), 'local', layers=['q', 'k', 'v'], example=ROWS, coupled=True)
    sparsifier.sparsify_model(50)
    assert sparsifier.sparsity == 50
    gone = {name: (model.get_submodule(name).weight == 0).all(1) for name in 'qkv'}
    assert torch.equal(gone['k'], gone['v']) and torch.equal(gone['q'], gone['k'].view(2, 2).repeat_interleave(2, 0).flatten())
    assert torch.equal((model(ROWS) == 0).flatten(0, 1).all(0), gone['q'])
    with pytest.raises(ValueError, match="coupled: got True .* of which a group in 'q' is not a whole filter"):
        Sparsifier(model, head(2, 'I'), coupled=True, example=ROWS)


# Weights of one module

@pytest.mark.parametrize('kind', [nn.LSTM, nn.GRU, nn.RNN])
def test_hidden_units_of_recurrent_layers(kind):
    "Where all gates of a unit are zero, with their biases, it is zero at all times."
    model = Net(lambda s, x: s.head(s.units(x)[0]), units=kind(3, 6, bidirectional=True), head=nn.Linear(12, 2))
    granularity = ('I',) if kind is nn.RNN else ('S', 'I')
    sparsifier = Sparsifier(model, granularity, 'local', layers=kind, example=torch.randn(2, 4, 3), coupled=True)
    assert sparsifier.selected.ties == [['units.weight_ih_l0', 'units.weight_hh_l0'], ['units.weight_ih_l0_reverse', 'units.weight_hh_l0_reverse']]
    sparsifier.sparsify_model(50)
    out, _ = model.units(torch.randn(2, 4, 3))
    assert sparsifier.sparsity == 50 and (out == 0).flatten(0, 1).all(0).view(2, 6).sum(1).tolist() == [3, 3]


@pytest.mark.parametrize('apart', [False, True])
def test_heads_of_a_multihead_attention(apart):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 4, kdim=6 if apart else None, vdim=6 if apart else None, batch_first=True)
            self.head = nn.Linear(8, 2)
            nn.init.normal_(self.attention.in_proj_bias)

        def forward(self, x, memory): return self.head(self.attention(x, memory, memory)[0])
    model, example = Attention(), (torch.randn(2, 5, 8), torch.randn(2, 3, 6 if apart else 8))
    sparsifier = Sparsifier(model, head(4), 'local', layers='*_proj_weight', example=example, coupled=True)
    sparsifier.sparsify_model(50)
    weights = [layer.weight.view(-1, 4, 2, layer.weight.shape[1]) for layer in sparsifier.layers.values()]
    gone = torch.cat([(weight == 0).flatten(2).all(2) for weight in weights])
    assert gone.shape == (3, 4) and gone.sum(1).tolist() == [2, 2, 2] and (gone == gone[0]).all()
    assert torch.equal((model.attention.in_proj_bias == 0).view(3, 4, 2).all(2), gone)


# What the Sparsifier makes of it

@pytest.mark.parametrize('context', ['local', 'global', 'lamp', 'normalized', 'work'])
@pytest.mark.parametrize('lazily', [False, True])
def test_counts_where_groups_have_several_filters_or_none(context, lazily):
    "Each layer of a concatenation that is added to something is pruned to the sparsity, and none is emptied."
    model = Net(lambda s, x: torch.cat([s.a(x), s.b(x)], 1) + s.c(x), a=conv(2, 4), b=conv(2, 8), c=conv(2, 12))
    layers = ['a', 'b', 'c']
    sparsifier = Sparsifier(model, 'filter', context, layers=layers, example=(lambda: IMAGE) if lazily else IMAGE, coupled=True)
    for sparsity in (25, 50, 75):
        sparsifier.sparsify_model(sparsity)
        gone = {name: (model.get_submodule(name).weight.flatten(1) == 0).all(1) for name in layers}
        assert torch.equal(torch.cat([gone['a'], gone['b']]), gone['c'])
        if context == 'local': assert {n: g.float().mean().item() * 100 for n, g in gone.items()} == dict.fromkeys(layers, sparsity)
        assert sparsifier.sparsity == sparsity and not any(g.all() for g in gone.values())
        assert [row.groups for row in sparsifier.report().rows] == [4, 8, 12]
    sparsifier.sparsify_model(25, regrow=True)
    assert sum(int((~sparsifier.masks[name]).sum()) for name in layers) * 4 == sum(sparsifier.masks[name].numel() for name in layers)


def test_scores_are_means_over_the_weights_that_a_group_has():
    model = Net(lambda s, x: torch.cat([s.a(x), s.b(x)], 1) + s.c(x), a=conv(2, 1), b=conv(2, 3), c=conv(2, 4))
    values = {'a': [1.], 'b': [5., 2, 6], 'c': [6., 1, 7, 1]}  # the means are 3.5, 3, 4.5 and 3.5
    with torch.no_grad():
        for name, of_filters in values.items(): model.get_submodule(name).weight.copy_(torch.tensor(of_filters)[:, None, None, None].expand(-1, 2, 1, 1))
    Sparsifier(model, 'filter', layers=['a', 'b', 'c'], example=IMAGE, coupled=True).sparsify_model(25)
    assert [(model.get_submodule(n).weight.flatten(1) == 0).all(1).tolist() for n in 'abc'] == [[False], [True, False, False], [False, True, False, False]]


def test_zeros_of_ones_own_count_in_groups_of_several_layers():
    model = Net(lambda s, x: torch.cat([s.a(x), s.b(x)], 1) * s.c(x), a=conv(2, 4), b=conv(2, 4), c=conv(2, 8))
    with torch.no_grad():
        model.a.weight[0], model.c.weight[0], model.c.weight[5, 0] = 0, 0, 0
    sparsifier = Sparsifier(model, 'filter', 'local', layers=['a', 'b', 'c'], example=IMAGE, coupled=True)
    sparsifier.sparsify_model(50)
    assert sparsifier.sparsity == 50 and not model.a.weight[0].any()


def test_a_gated_linear_unit_loses_both_halves_and_state_is_loaded_again():
    model = Net(lambda s, x: s.o(F.glu(s.a(x))), a=nn.Linear(4, 12), o=nn.Linear(6, 4))
    sparsifier = Sparsifier(model, 'filter', example=ROWS, coupled=True)
    sparsifier.sparsify_model(50)
    gone = (model.a.weight == 0).all(1)
    assert gone.sum() == 6 and torch.equal(gone[:6], gone[6:]) and torch.equal(model.a.bias == 0, gone)
    assert [row.dead for row in sparsifier.report().rows] == [6]
    twin = Sparsifier(model, 'filter', example=lambda: ROWS, coupled=True)
    twin.load_state_dict(sparsifier.state_dict())
    twin.sparsify_model(50)
    assert torch.equal((model.a.weight == 0).all(1), gone)
