"Each kind of operation, with what can go exactly: the same outputs, and how many parameters are left."
import numpy as np
import pytest
import torch
from conftest import Made
from torch import nn
from torch.nn import functional as F

from fasterai.arguments import Inputs
from fasterai.deploy.compare import agree, fresh, outputs
from fasterai.deploy.cutting import Cut, apply
from fasterai.deploy.shrink import _Check, parameters, shrink
from fasterai.deploy.why import NOT_ALONE
from fasterai.sparsifier import Sparsifier


@torch.no_grad()
def dead(*layers, rows=slice(0, 8)):
    "Zero filters and their biases."
    for layer in layers:
        layer.weight[rows] = 0
        if layer.bias is not None: layer.bias[rows] = 0


def network(run, dies=(), rows=slice(0, 8), **layers):
    model = Made(run, **layers).eval()
    for m in model.modules():
        if not isinstance(m, nn.modules.batchnorm._BatchNorm): continue
        nn.init.uniform_(m.weight, .5, 1.5)
        nn.init.uniform_(m.running_var, .5, 1.5)
    dead(*(getattr(model, name) for name in dies), rows=rows)
    return model


def same(small, model, *x):
    "Tell whether two networks agree on an example and on random batches."
    inputs = Inputs(x)
    batches = [inputs, *fresh(inputs), *fresh(inputs, (1, 5))]
    return all(agree(outputs(small, b), outputs(model, b)) for b in batches)


def linear(inputs=8, outputs=16): return nn.Linear(inputs, outputs)
def conv(inputs, outputs, **kwargs): return nn.Conv2d(inputs, outputs, 3, padding=1, **kwargs)
def vectors(*shape): return torch.randn(*shape or (4, 8))
def pictures(channels=3): return torch.randn(2, channels, 6, 6)
def mean(x): return x.mean((2, 3))


def vector(n, shape): return nn.Parameter(torch.rand(n).add(.5).view(shape))


def squeeze():
    return network(lambda s, x: s.out(mean((y := s.a(x).relu()) * s.up(s.down(y.mean((2, 3), keepdim=True)).relu()).sigmoid())),
                   ['a'], a=conv(3, 16), down=nn.Conv2d(16, 4, 1), up=nn.Conv2d(4, 16, 1), out=linear(16, 2))


def gated(last): return network(lambda s, x: s.d(last(s.u(x))), u=linear(8, 32), d=linear(16, 4))


def glu():
    model = gated(lambda x: F.glu(x, -1))
    dead(model.u)
    return model


def halves():
    def run(s, x):
        a, b = s.u(x).chunk(2, -1)
        return s.d(F.silu(a) * b)
    model = network(run, u=linear(8, 32), d=linear(16, 4))
    dead(model.u, rows=slice(16, 24))
    return model


class Global(nn.Module):
    "A convolution whose weight has mean zero and a gain, as in networks without norms; over the inputs of a filter."
    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(outputs, inputs, 3, 3)), nn.Parameter(torch.randn(outputs))
        self.gain = vector(outputs, (-1, 1, 1, 1))

    def forward(self, x): return F.conv2d(x, (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) * self.gain, self.bias)


def columns():
    model = Made(lambda s, i: s.h(s.e(i)), e=nn.Embedding(20, 8), h=linear(8, 3)).eval()
    with torch.no_grad(): model.e.weight[:, [1, 4]] = 0
    return model


def recurrent(kind, gates, which):
    "A layer with two hidden units that stay zero: those of one gate have no weights."
    model = Made(lambda s, x: s.h(s.r(x)[0]), r=kind(6, 8, batch_first=True), h=linear(8, 3)).eval()
    with torch.no_grad():
        for p in model.r.parameters(): p.view(gates, 8, -1)[which, [1, 5]] = 0
    return model


def shuffled():
    def run(s, x):
        n, c, *space = (y := s.a(x).relu()).shape
        return s.out(mean(s.b(y.view(n, 2, c // 2, *space).transpose(1, 2).reshape(n, c, *space))))
    return network(run, ['a'], rows=[0, 1, 4, 5], a=conv(3, 8), b=conv(8, 6), out=linear(6, 2))


def whole_group():
    model = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8, groups=4), nn.ReLU(), conv(8, 2))
    dead(model[2], rows=[0, 1])
    return model


def as_many_in_each():
    model = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 12, groups=2), nn.ReLU(), conv(12, 2))
    dead(model[0], rows=[0, 6])
    dead(model[2], rows=[0, 3, 7, 11])
    return model


def chopped(width=8, parts=1):
    "Parts of a number of channels that the code knows, as in Res2Net, or computes, as in selective kernels."
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.width = width
            self.a, self.b, self.out = conv(3, 16), conv(8, 8), conv(16, 2)

        def forward(self, x):
            first, second = self.a(x).relu().split(self.width // parts, 1)
            return self.out(torch.cat([first, self.b(second).relu()], 1))
    model = Parts().eval()
    dead(model.a, rows=[0, 1, 8, 9])
    return model


KINDS = {  # a network with zeros, an example, its parameters before and after
    'a gate': (lambda: network(lambda s, x: s.d(F.silu(s.g(x)) * s.u(x)), ['g'], g=linear(), u=linear(), d=linear(16, 4)),
               vectors(), 356, 180),
    'a gated linear unit': (glu, vectors(), 356, 180),
    'the other half of a product': (halves, vectors(), 356, 180),
    'squeeze and excitation': (squeeze, pictures(), 448 + 68 + 80 + 34, 224 + 36 + 40 + 18),
    'a learned gain': (lambda: network(lambda s, x: s.h(s.gain * s.a(x).relu()), ['a'], a=linear(), h=linear(16, 4), gain=vector(16, (-1,))),
                       vectors(), 228, 116),
    'a layer scale before a sum': (lambda: network(lambda s, x: s.out(s.a(x) + s.scale * s.b(x)), ['a', 'b'], a=linear(), b=linear(),
                                                   scale=vector(16, (1, -1)), out=linear(16, 2)), vectors(), 338, 170),
    'a mask of one channel': (lambda: network(lambda s, x: s.out(mean(s.mask(x).sigmoid() * s.c(x).relu())), ['c'], mask=conv(3, 1),
                                              c=conv(3, 16), out=linear(16, 2)), pictures(), 510, 270),
    'sum() of a list': (lambda: network(lambda s, x: s.h(mean(sum([s.n(s.a(x)), s.b(x)]).relu())), ['a', 'b'], a=conv(3, 16), b=conv(3, 16),
                                        n=nn.BatchNorm2d(16), h=linear(16, 3)), pictures(), 979, 491),
    'a sum of a stack': (lambda: network(lambda s, x: s.h(mean(torch.stack([s.a(x), s.b(x)]).sum(0).relu())), ['a', 'b'], a=conv(3, 16),
                                         b=conv(3, 16), h=linear(16, 3)), pictures(), 947, 475),
    'tokens flattened before BatchNorm': (lambda: network(lambda s, x: s.h(s.n(s.a(x).flatten(0, 1)).relu()), ['a'], a=linear(),
                                                          n=nn.BatchNorm1d(16), h=linear(16, 3)), vectors(2, 5, 8), 227, 115),
    'tokens transposed before BatchNorm': (lambda: network(lambda s, x: s.h(s.n(s.a(x).mT).relu().mT), ['a'], a=linear(),
                                                           n=nn.BatchNorm1d(16), h=linear(16, 3)), vectors(2, 5, 8), 227, 115),
    'a channel shuffle': (shuffled, pictures(), 224 + 438 + 14, 112 + 222 + 14),
    'a whole group': (whole_group, pictures(), 224 + 152 + 146, 168 + 114 + 110),
    'as many in each group': (as_many_in_each, pictures(), 224 + 444 + 218, 168 + 224 + 146),
    'parts of a known width': (chopped, pictures(), 448 + 584 + 290, 336 + 440 + 254),
    'parts of a width that is halved': (lambda: chopped(16, 2), pictures(), 448 + 584 + 290, 336 + 440 + 254),
    'columns of an embedding': (columns, torch.randint(0, 20, (3, 4)), 187, 141),
    'hidden units of an LSTM': (lambda: recurrent(nn.LSTM, 4, 2), vectors(2, 5, 6), 539, 357),
    'hidden units of a GRU': (lambda: recurrent(nn.GRU, 3, 2), vectors(2, 5, 6), 411, 273),
    'a transposed depthwise convolution': (lambda: network(lambda s, x: s.out(s.up(s.a(x))), ['a', 'up'], a=conv(3, 16),
                                                           up=nn.ConvTranspose2d(16, 16, 2, 2, groups=16), out=nn.Conv2d(16, 2, 1)),
                                           pictures(), 448 + 80 + 34, 224 + 40 + 18),
    'channels that are padded': (lambda: network(lambda s, x: s.out(mean(F.pad(s.a(x), (0, 0, 0, 0, 2, 2)))), ['a'], a=conv(3, 16),
                                                 out=linear(20, 2)), pictures(), 490, 250),
    'a norm over pictures': (lambda: network(lambda s, x: s.out(mean(s.n(s.a(x)))), ['a'], a=conv(3, 16), n=nn.InstanceNorm2d(16, affine=True),
                                             out=linear(16, 2)), pictures(), 514, 258),
    'a weight that is computed': (lambda: network(lambda s, x: s.out(mean(s.a(x))), ['a'], a=Global(3, 16), out=linear(16, 2)),
                                  pictures(), 498, 250),
}


@pytest.mark.parametrize('name', KINDS)
def test_what_can_go_goes(name):
    torch.manual_seed(0)
    make, x, before, after = KINDS[name]
    model = make()
    assert parameters(model) == before
    small = shrink(model, x)
    assert parameters(small) == after and same(small, model, x)


class Attention(nn.Module):
    "Attention as people write it, with as many heads of keys and values or fewer."
    def __init__(self, dim=16, heads=4, kv_heads=4):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.q, self.k, self.v, self.o = linear(dim, dim), linear(dim, kv_heads * 4), linear(dim, kv_heads * 4), linear(dim, dim)

    def heads(self, x, n): return x.view(*x.shape[:2], n, self.head_dim).transpose(1, 2)

    def repeat(self, x):
        b, n, *rest = x.shape
        return x[:, :, None].expand(b, n, self.num_heads // n, *rest).reshape(b, self.num_heads, *rest)

    def forward(self, x):
        q = self.heads(self.q(x), self.num_heads)
        k, v = (self.repeat(self.heads(layer(x), self.num_kv_heads)) for layer in (self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize('kv_heads, left', [(4, 820), (2, 416)])
def test_heads_go_whose_values_are_zero(kv_heads, left):
    torch.manual_seed(0)
    model, x = Attention(kv_heads=kv_heads).eval(), torch.randn(2, 5, 16)
    dead(model.v, rows=slice(0, 4))
    small = shrink(model, x)
    assert parameters(small) == left and same(small, model, x)
    assert small.num_heads == 4 * (kv_heads - 1) // kv_heads and small.num_kv_heads == kv_heads - 1 and small.head_dim == 4
    assert model.num_heads == 4


@pytest.mark.parametrize('kv_heads', [4, 2])
def test_pruned_filters_of_an_attention_are_heads_that_go(kv_heads):
    torch.manual_seed(0)
    model, x = Attention(kv_heads=kv_heads).eval(), torch.randn(2, 5, 16)
    Sparsifier(model, 'filter', 'local', example=x, coupled=True).sparsify_model(50)
    small = shrink(model, x, verbose=False)
    assert same(small, model, x) and (small.num_heads, small.num_kv_heads) == (2, kv_heads // 2)


def test_a_head_counts_its_queries_keys_and_values_in_one_weight():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads, self.qkv, self.o = 4, linear(16, 48), linear(16, 16)

        def forward(self, x):
            b, n, c = x.shape
            q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(-2, -1) / 2).softmax(-1)
            return self.o((weights @ v).transpose(1, 2).reshape(b, n, -1))
    torch.manual_seed(0)
    model, x = Packed().eval(), torch.randn(2, 5, 16)
    dead(model.qkv, rows=slice(32, 36))
    small = shrink(model, x)
    assert small.qkv.weight.shape == (36, 16) and small.num_heads == 3 and same(small, model, x)


class Widths(Attention):
    "Attention with as many heads as channels of each, whose code knows the width of all."
    def __init__(self):
        super().__init__()
        self.key_dim, self.val_attn_dim = 4, 16

    def forward(self, x):
        q, k, v = (layer(x).view(*x.shape[:2], self.num_heads, self.key_dim).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*x.shape[:2], self.val_attn_dim))


def test_the_number_of_heads_is_told_from_the_channels_of_each():
    torch.manual_seed(0)
    model, x = Widths().eval(), torch.randn(2, 5, 16)
    dead(model.v, rows=slice(0, 4))
    small = shrink(model, x)
    assert (small.num_heads, small.key_dim, small.val_attn_dim) == (3, 4, 12) and same(small, model, x)


class Tabled(Attention):
    "Attention with a bias for each pair of tokens, which is looked up once and kept, as in LeViT."
    def __init__(self, start=nn.init.normal_):
        super().__init__()
        self.table, self.cache = nn.Parameter(start(torch.empty(4, 5))), {}

    def forward(self, x):
        q, k, v = (self.heads(layer(x), self.num_heads) for layer in (self.q, self.k, self.v))
        places = torch.arange(5)
        if 'bias' not in self.cache: self.cache['bias'] = self.table[:, (places[:, None] - places).abs()]
        weights = (q @ k.mT * self.head_dim ** -.5 + self.cache['bias']).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize('start', [nn.init.normal_, nn.init.zeros_])
@torch.no_grad()
def test_a_table_that_the_model_keeps_is_made_anew(start):
    torch.manual_seed(0)
    model, x = Tabled(start).eval(), torch.randn(2, 5, 16)
    model(x)
    dead(model.v, rows=slice(0, 4))
    small = shrink(model, x)
    assert small.table.shape == (3, 5) and small.num_heads == 3 and same(small, model, x)
    assert model.cache['bias'].shape == (4, 5, 5) and small.cache['bias'].shape == (3, 5, 5)


@torch.no_grad()
def test_a_dict_that_the_model_needs_is_kept():
    model, x = network(lambda s, x: s.h(s.a(x) * s.fixed['scale']), ['a'], a=linear(), h=linear(16, 2)), vectors()
    model.fixed = {'scale': torch.rand(16)}
    small = shrink(model, x)
    assert parameters(small) == parameters(model) and same(small, model, x) and len(model.fixed) == 1


def said(model, x, capsys):
    "Shrink a network of which nothing can go; return what is said of that."
    small = shrink(model, x)
    assert parameters(small) == parameters(model) and same(small, model, x)
    return capsys.readouterr().out


def normed(norm, **layers): return network(lambda s, x: s.h(s.n(s.a(x))), ['a'], a=linear(), n=norm, h=linear(16, 2), **layers)


STAYS = {  # a network, an example, and why its zero filters stay
    'a bias': (lambda: network(lambda s, x: s.b(s.a(x).relu()), a=linear(), b=linear(16, 2)), vectors(), '8 zero filters stay in a: their bias is not zero'),
    'a sigmoid': (lambda: network(lambda s, x: s.b(s.a(x).sigmoid()), ['a'], a=linear(), b=linear(16, 2)), vectors(), 'a sigmoid makes them other than zero'),
    'a number': (lambda: network(lambda s, x: s.b(s.a(x) + 1), ['a'], a=linear(), b=linear(16, 2)), vectors(), 'an add makes them other than zero'),
    'LayerNorm': (lambda: normed(nn.LayerNorm(16)), vectors(), 'they pass a LayerNorm, which mixes channels'),
    'a softmax': (lambda: normed(nn.Softmax(-1)), vectors(), 'they pass a softmax, which mixes channels'),
    'a mean': (lambda: network(lambda s, x: s.h(s.a(x) - s.a(x).mean(-1, keepdim=True)), ['a'], a=linear(), h=linear(16, 2)), vectors(),
               'they pass a mean, which mixes channels'),
    'a maximum': (lambda: network(lambda s, x: s.h(s.a(x).amax(-1, keepdim=True)), ['a'], a=linear(), h=linear(1, 2)), vectors(), 'they pass an amax'),
    'sorting': (lambda: network(lambda s, x: s.h(s.a(x).sort(-1)[0]), ['a'], a=linear(), h=linear(16, 2)), vectors(), 'they pass a sort'),
    'GroupNorm': (lambda: network(lambda s, x: s.h(mean(s.n(s.a(x)))), ['a'], a=conv(3, 16), n=nn.GroupNorm(2, 16), h=linear(16, 2)), pictures(),
                  'they pass a GroupNorm'),
    'a standardised weight': (lambda: network(lambda s, x: mean(s.b(s.a(x))), ['a'], a=conv(3, 16), b=Global(16, 2)), pictures(), 'they pass a mean'),
    'one part': (lambda: network(lambda s, x: s.h(s.a(x)[:, :8] * s.a(x)[:, 8:].sigmoid() + s.b(x)), ['a'], rows=slice(8, 12),
                                 a=linear(), b=linear(8, 8), h=linear(8, 2)), vectors(), 'a sigmoid makes them other than zero'),
    'code that knows a size': (lambda: network(lambda s, x: s.h(s.a(x).view(-1, 2, 8).flatten(1)), ['a'], rows=[0, 8], a=linear(), h=linear(16, 2)),
                               vectors(), "without them the model fails: RuntimeError: shape '[-1, 2, 8]' is invalid"),
}


@pytest.mark.parametrize('name', STAYS)
def test_what_stays_is_said_truly(name, capsys):
    torch.manual_seed(0)
    make, x, why = STAYS[name]
    model = make()
    if name == 'a bias':
        with torch.no_grad(): model.a.weight[:8] = 0
    assert why in said(model, x, capsys)


def test_layers_of_training_alone_stay_fit():
    def run(s, x):
        y = s.a(x).relu()
        out = s.h(mean(s.b(y).relu()))
        return (out, s.aux(mean(y))) if s.training else out
    model = network(run, ['a', 'b'], a=conv(3, 16), b=conv(16, 16), h=linear(16, 5), aux=linear(16, 5))
    small = shrink(model, pictures())
    assert small.aux.weight.shape == (5, 8) and small.b.weight.shape == (8, 8, 3, 3)
    for m in (small.train(), model.train()): m.both = m(torch.ones(2, 3, 6, 6))
    assert agree(list(small.both), list(model.both))


def test_layers_of_training_alone_are_told_where_they_cannot_be_run(capsys):
    def run(s, x):
        if s.training: raise RuntimeError('no labels')
        return s.h(s.a(x).relu())
    model = network(run, ['a'], a=linear(), h=linear(16, 2), aux=linear(16, 2))
    assert parameters(shrink(model, vectors())) == 124
    assert 'may not fit what they read: aux.weight, aux.bias' in capsys.readouterr().out


def test_one_picture_is_enough_for_layers_of_training_alone():
    def run(s, x):
        y = s.a(x).relu()
        return s.h(mean(y)) if not s.training else (s.h(mean(y)), s.aux(s.n(mean(y))))
    model = network(run, ['a'], a=conv(3, 16), h=linear(16, 2), n=nn.BatchNorm1d(16), aux=linear(16, 2))
    small = shrink(model, torch.randn(1, 3, 6, 6))
    assert small.aux.weight.shape == (2, 8) and small.n.num_features == 8


def test_a_head_that_is_zero_before_training_hides_nothing(capsys):
    model = network(lambda s, x: s.h(mean(s.b(s.a(x).cos()).relu())), ['a'], a=conv(3, 16), b=conv(16, 8), h=linear(8, 5))
    nn.init.zeros_(model.h.weight)
    assert '8 zero filters stay in a: a cos makes them other than zero' in said(model, pictures(), capsys)
    model = network(lambda s, x: x + s.alpha * s.h(s.a(x)), a=linear(), h=linear(16, 8), alpha=nn.Parameter(torch.zeros(1)))
    said(model, vectors(), capsys)


def test_a_table_is_not_taken_for_zero_because_few_of_it_are_used():
    positions = torch.arange(6.)[:, None] * torch.tensor([0., 1., 2., 3.])
    model = network(lambda s, x: s.h(s.a(x) + s.table[:x.shape[1]]), ['a'], rows=[0, 1], a=linear(8, 4), h=linear(4, 2))
    model.register_buffer('table', positions)  # its first column is zero, and its first row
    small = shrink(model, torch.randn(2, 1, 8))
    assert small.h.weight.shape == (2, 3) and same(small, model, torch.randn(2, 5, 8))


def test_what_is_changed_in_place_is_not_taken_for_zero(capsys):
    def run(s, x):
        y = s.a(x)
        y.view(-1).add_(1)
        return s.h(y)
    assert 'an add makes them other than zero' in said(network(run, ['a'], a=linear(), h=linear(16, 2)), vectors(), capsys)


def test_a_buffer_that_is_written_is_not_taken_for_zero(capsys):
    def run(s, x):
        s.state.copy_(x[0, :1].expand(16))
        return s.h(s.a(x) + s.state)
    model = network(run, ['a'], a=linear(), h=linear(16, 2))
    model.register_buffer('state', torch.zeros(16))
    assert 'they are added to' in said(model, vectors(), capsys)


def test_channels_of_a_batchnorm_without_scale_and_shift_go():
    model = network(lambda s, x: s.h(mean(s.n(s.a(x)))), a=conv(3, 16), n=nn.BatchNorm2d(16), h=linear(16, 2))
    with torch.no_grad(): model.n.weight[:8], model.n.bias[:8] = 0, 0
    assert parameters(shrink(model, pictures())) == 224 + 16 + 18


def test_nothing_to_remove(capsys):
    shrink(nn.Sequential(nn.ReLU()), vectors())
    assert 'nothing to remove: the model has no parameters' in capsys.readouterr().out


@pytest.mark.parametrize('head, reason', [(0., NOT_ALONE), (1., NOT_ALONE), (None, '')])
def test_a_head_that_is_zero_before_training_hides_no_difference(head, reason):
    "A unit that lives is cut, and one that is dead: behind a head of zeros both change no output."
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        net[2].weight.fill_(head or 0.)
        net[2].bias.zero_()
        if head is None: net[0].weight[2], net[0].bias[2] = 0, 0
    two = np.array([0, 1])
    cut = Cut({'0.weight': {0: two}, '0.bias': {0: two}, '2.weight': {1: two}}, [], {})
    x = torch.rand(5, 4)
    assert _Check(net, Inputs((x,))).reason(apply(net, cut), cut, None) == reason
