import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from fasterai.granularity import AXES, add_layer_type
from fasterai.layers import choose
from fasterai.sparsifier import Sparsifier


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.body = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU()))
        self.head = nn.Linear(2, 3)
        self.tied = nn.Linear(2, 3)
        self.tied.weight = self.head.weight


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3))


def chosen(layers): return list(choose(Net(), layers).chosen)


@pytest.mark.parametrize('layers, names', [
    (None, ['body.0', 'body.2.0', 'head']),
    (nn.Conv2d, ['body.0', 'body.2.0']),
    ('head', ['head']),
    ('body', ['body.0', 'body.2.0']),
    ('body.*', ['body.0', 'body.2.0']),
    ('body.2*', ['body.2.0']),
    (['head', nn.Conv2d], ['body.0', 'body.2.0', 'head']),
    (['head', 'head'], ['head']),
    ('tied', ['tied']),
    ('embed', ['embed']),
    (nn.Embedding, ['embed']),
    ('head.weight', ['head']),
    ('head.bias', ['head.bias']),
    ('*.bias', ['body.0.bias', 'body.1.bias', 'body.2.0.bias', 'head.bias', 'tied.bias'])])
def test_by_type_name_and_glob(layers, names): assert chosen(layers) == names


def test_by_module():
    net = Net()
    assert list(choose(net, net.head).chosen) == ['head']
    assert list(choose(net, net.body).chosen) == ['body.0', 'body.2.0']
    assert list(choose(net, [net.body[2], net.head]).chosen) == ['body.2.0', 'head']
    assert list(choose(nn.Linear(2, 2)).chosen) == ['weight']


def test_what_was_left_out_has_a_reason():
    assert choose(Net(), ['body.0', 'head', 'tied']).skipped == {
        'embed': 'not chosen', 'body.2.0': 'not chosen', 'tied': "shares the weight of 'head'"}
    assert choose(Net()).skipped['embed'] == 'a lookup table: name it in layers= to include it'
    assert choose(nn.Sequential(nn.Linear(2, 2), Own())).skipped == {
        '1': "Own is no known layer type: add_layer_type(Own, weight=…) makes it one, with 'O I' for "
             "outputs × inputs, 'I O' for inputs × outputs; or name it in layers="}


def test_by_name_is_by_the_name_or_module_of_the_layer_itself():
    net = Net()
    for layers in ('head', net.head, ['body', 'head']): assert choose(net, layers).by_name == {'head'}
    for layers in (None, nn.Linear, 'he*', net): assert choose(net, layers).by_name == set()


@pytest.mark.parametrize('layers, error, says', [
    ('haed', ValueError, "layers: got 'haed', which means none of the layers here, 'embed', .*; did you mean 'head'"),
    ('Conv2d', ValueError,
     "none of the layers here, 'embed', 'body.0', 'body.2.0', 'head', 'tied'; .*; for a type write nn.Conv2d"),
    ('body.1', ValueError, "layers: got 'body.1', which means none of the layers"),
    (nn.LSTM, ValueError, 'means none of the layers'),
    ([], ValueError, 'layers: got an empty list, expected None for all'),
    (nn.Linear(1, 1), ValueError, 'layers: got a Linear that is not a part of the model'),
    (3, TypeError, 'layers: got 3, expected a type, a name or glob'),
    ([None], TypeError, 'layers: got None')])
def test_bad_choices_are_refused(layers, error, says):
    with pytest.raises(error, match=says): chosen(layers)


def test_models_without_fitting_layers_are_refused():
    with pytest.raises(ValueError, match='layers: no layer selected: BatchNorm1d has none of Linear'):
        choose(nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match="'weight' is lazy and has no weight yet"): choose(nn.LazyLinear(3))
    with pytest.raises(ValueError, match='is not a parameter of its own but computed'):
        choose(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match='torch.int64, expected floating-point'):
        integers = nn.Linear(2, 2)
        integers.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int64), requires_grad=False)
        choose(integers)


def test_weights_that_are_computed_are_left_out_unless_they_are_named():
    norm = nn.utils.parametrizations.weight_norm
    with pytest.warns(FutureWarning): old = nn.utils.weight_norm(nn.Linear(2, 2))
    net = nn.Sequential(nn.Linear(2, 2), norm(nn.Linear(2, 2)), old)
    found = choose(net)
    assert list(found.chosen) == ['0'] and list(found.skipped) == ['1', '2']
    assert all('has a weight that is computed from others' in reason for reason in found.skipped.values())
    assert choose(net, exclude='[12]').skipped == {'1': 'excluded', '2': 'excluded'}
    with pytest.raises(ValueError, match="the weight of '1' is not a parameter of its own"): choose(net, nn.Linear)
    masked = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    nn.utils.prune.l1_unstructured(masked[1], 'weight', .5)
    with pytest.raises(ValueError, match='prune.remove'): choose(masked)  # one line mends it


def test_the_conv1d_of_transformers_is_known_by_its_name():
    kind = type('Conv1D', (Conv1D,), {'__module__': 'transformers.pytorch_utils'})
    net = nn.Sequential(kind(4, 6), nn.ReLU(), kind(6, 2))
    sparsifier = Sparsifier(net, 'filter', layers=['0'])
    sparsifier.sparsify_model(50)
    assert [int((net[0].weight == 0).all(axis).sum()) for axis in (0, 1)] == [3, 0]
    assert sparsifier.layers['0'].grouping.axes == {'I': 4, 'O': 6}


def test_layers_with_several_weights():
    net = nn.ModuleDict({'lstm': nn.LSTM(2, 3, bidirectional=True),
                         'attn': nn.MultiheadAttention(4, 2), 'apart': nn.MultiheadAttention(4, 2, kdim=3)})
    lstm = ['lstm.weight_ih_l0', 'lstm.weight_hh_l0', 'lstm.weight_ih_l0_reverse', 'lstm.weight_hh_l0_reverse']
    attn = ['attn.in_proj_weight', 'attn.out_proj']
    apart = ['apart.q_proj_weight', 'apart.k_proj_weight', 'apart.v_proj_weight', 'apart.out_proj']
    assert list(choose(net).chosen) == [*lstm, *attn, *apart]
    assert list(choose(net, 'attn').chosen) == attn
    assert list(choose(net, ['lstm.*_hh_*', net['attn'].out_proj]).chosen) == [
        'lstm.weight_hh_l0', 'lstm.weight_hh_l0_reverse', 'attn.out_proj']
    assert list(choose(net, net['lstm'].weight_ih_l0).chosen) == ['lstm.weight_ih_l0']
    assert choose(net, ['lstm', 'apart.q_proj_weight']).by_name == {*lstm, 'apart.q_proj_weight'}
    with pytest.raises(ValueError, match='got a parameter that is not a part of the model'):
        choose(net, torch.ones(2))
    with pytest.raises(ValueError, match="weight of 'lstm.weight_hh_l0' is not a parameter of its own"):
        choose(nn.ModuleDict({'lstm': nn.utils.parametrizations.weight_norm(nn.LSTM(2, 3), 'weight_hh_l0')}), 'lstm')


def test_parameters_that_no_layer_type_knows():
    net = nn.Sequential(nn.Linear(2, 2), Own())
    assert list(choose(net, ['1.weight', net[1].scale]).chosen) == ['1.weight', '1.scale']
    add_layer_type(Own, weight='O I')
    try: assert list(choose(net).chosen) == ['0', '1']
    finally: del AXES[Own]


@pytest.mark.parametrize('kind, weights, error, says', [
    (nn.Linear(1, 1), {'weight': 'O I'}, TypeError, 'kind: got Linear'),
    (Own, {}, ValueError, 'weights: got none for Own'),
    (Own, {'weight': 'O O'}, ValueError, "weight: got 'O O', expected different names of axes"),
    (Own, {'weight': 'O, I'}, ValueError, "weight: got 'O, I'"),
    (Own, {'weight': 3}, ValueError, 'weight: got 3')])
def test_bad_layer_types_are_refused(kind, weights, error, says):
    with pytest.raises(error, match=says): add_layer_type(kind, **weights)
    assert Own not in AXES


# Names are those of the bare model

class Wrapped(nn.Module):
    "Wrapped inside, as by `model.body = torch.compile(model.body)`."
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.DataParallel(nn.Sequential(nn.Linear(4, 4), nn.ReLU())), nn.Linear(4, 2)

    def forward(self, x): return self.head(self.body(x))


def compiled(model): return torch.compile(model, backend='eager')


@pytest.mark.parametrize('wrap', [nn.DataParallel, compiled, lambda m: compiled(nn.DataParallel(m)), lambda m: nn.DataParallel(compiled(m))],
                         ids=['parallel', 'compiled', 'compiled parallel', 'parallel compiled'])
@pytest.mark.parametrize('make', [lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), Wrapped], ids=['plain', 'wrapped inside'])
def test_names_inside_wrappers_are_those_of_the_bare_model(wrap, make):
    model = make()
    bare = Sparsifier(model)
    names = list(bare.layers)
    assert not any('module' in name or 'orig_mod' in name for name in names)
    wrapped = Sparsifier(wrap(model), layers=[names[0], '*' + names[1][-1]])
    assert list(wrapped.layers) == names
    wrapped.sparsify_model({names[0]: 50, names[1]: 25})
    assert wrapped.report().zeros == 8 + 2
    wrapped.sparsify_layer(names[1], 50)
    bare.load_state_dict(wrapped.state_dict())
    assert bare.report().zeros == 8 + 4


def test_filters_inside_wrappers():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    for example in (torch.ones(1, 4), None):
        assert list(Sparsifier(nn.DataParallel(model), 'filter', example=example).layers) == ['0']
        assert list(Sparsifier(compiled(model), 'filter', example=example).layers) == ['0']


def test_a_layer_that_is_called_module_keeps_its_name():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(4, 4)
    assert list(Sparsifier(Odd()).layers) == ['module']


def test_the_own_weight_of_a_root_module_has_a_name():
    for layers in (None, 'weight', 'w*', ''): assert list(Sparsifier(nn.Linear(4, 2), layers=layers).layers) == ['weight']
    sparsifier = Sparsifier(nn.Linear(4, 2))
    sparsifier.sparsify_layer('weight', 50)
    assert sparsifier.report().zeros == 4
    sparsifier.sparsify_model({'weight': 75})
    assert sparsifier.report().zeros == 6
    assert list(Sparsifier(nn.LSTM(3, 4)).layers) == ['weight_ih_l0', 'weight_hh_l0']


# What is tied, and what is of no known type

class Conv1D(nn.Module):
    "As in transformers: y = x W + b, so W is inputs × outputs."
    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x): return x @ self.weight + self.bias


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(20, 8), Conv1D(8, 8), nn.Linear(8, 20, bias=False)
        self.hidden = nn.Linear(8, 8)
        self.head.weight = self.table.weight

    def forward(self, x): return self.head(self.hidden(self.body(self.table(x))))


def test_a_tied_embedding_is_not_pruned_through_its_decoder():
    sparsifier = Sparsifier(Tiny())
    assert list(sparsifier.layers) == ['hidden']
    assert sparsifier.skipped['table'] == 'a lookup table: name it in layers= to include it'
    assert sparsifier.skipped['head'] == "shares the weight of the lookup table 'table': name one of them in layers= to include it"
    for layers in ('head', 'table', nn.Linear):
        named = Sparsifier(Tiny(), layers=layers)
        assert named.report().rows[0].weights == 160
        assert not any('lookup' in reason for reason in named.skipped.values())


def test_the_hint_for_an_unknown_layer_type_guesses_no_axes():
    assert "add_layer_type(Conv1D, weight=…)" in Sparsifier(Tiny()).skipped['body']
    assert "'O I' for outputs × inputs, 'I O' for inputs × outputs" in Sparsifier(Tiny()).skipped['body']


def test_other_weights_of_many_axes_are_listed():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj, self.router = nn.Parameter(torch.randn(4, 8, 6)), nn.Linear(8, 4)
    skipped = Sparsifier(Experts()).skipped
    assert 'no known layer type' in skipped['gate_up_proj']


def test_weights_of_one_memory_are_one_weight():
    "Two parameters that are views of one piece of memory, or of overlapping ones."
    table, head = nn.Embedding(8, 8), nn.Linear(8, 8, bias=False)
    head.weight.data = table.weight.data
    sparsifier = Sparsifier(nn.Sequential(table, head), 'channel', 'local', layers=['0', '1'])
    sparsifier.sparsify_model(50)
    assert (head.weight == 0).sum() == 32
    assert sparsifier.skipped['1'] == "shares the weight of '0'"
    first, second = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
    second.weight = nn.Parameter(first.weight.data.t())
    assert list(Sparsifier(nn.Sequential(first, second)).layers) == ['0']


def test_pieces_of_one_storage_that_do_not_overlap_are_several_weights():
    flat = torch.randn(32)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    for i, layer in enumerate(model): layer.weight = nn.Parameter(flat[16 * i:16 * (i + 1)].view(4, 4))
    assert list(Sparsifier(model).layers) == ['0', '1']


# What takes no part

def test_what_is_excluded_takes_no_part_and_the_others_compete_as_before():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8))
    for exclude in ('1', ['1'], model[1], model[1].weight, '1.weight', (name for name in ['1'])):
        sparsifier = Sparsifier(model, exclude=exclude)
        assert list(sparsifier.layers) == ['0', '2']
        assert sparsifier.skipped == {'1': 'excluded'}
    assert list(Sparsifier(model, exclude='[01]').layers) == ['2']
    assert list(Sparsifier(model, layers=nn.Linear, exclude=['0', model[2]]).layers) == ['1']
    sparsifier = Sparsifier(model, 'weight', 'global', exclude='1')
    sparsifier.sparsify_model(50)
    assert sparsifier.report().zeros == 64
    assert not (model[1].weight == 0).any()


def test_what_shares_an_excluded_weight_is_left_out_too():
    assert choose(Net(), exclude='tied').skipped['head'] == "shares the weight of 'tied', which is excluded"


@pytest.mark.parametrize('exclude, says', [('conv9', "exclude: got 'conv9', which means none of the layers"), ([], 'exclude: got an empty list'),
                                           (7, 'exclude: got 7'), (nn.Linear, 'layers: no layer selected')])
def test_what_cannot_be_excluded_is_refused(exclude, says):
    with pytest.raises((ValueError, TypeError), match=says): Sparsifier(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), exclude=exclude)


@pytest.mark.parametrize('spoil', [lambda m: m.to(torch.complex64), lambda m: nn.LazyLinear(4)],
                         ids=['complex', 'lazy'])
def test_a_layer_that_cannot_take_part_can_be_left_out(spoil):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2] = spoil(model[2])
    with pytest.raises(ValueError, match='layers: '): Sparsifier(model)
    assert list(Sparsifier(model, exclude='2').layers) == ['0']


# Weights that cannot be zeroed, or not by themselves

def with_weight(tensor):
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(tensor, requires_grad=False)
    return nn.Sequential(nn.Linear(4, 4), layer)


def in_inference_mode():
    with torch.inference_mode(): return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))


def pruned_by_torch():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    prune.l1_unstructured(model[1], 'weight', .5)
    return model


def half_scripted(): return nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 3)))


ODD = {
    'float8': (lambda: with_weight(torch.randn(3, 4).to(torch.float8_e4m3fn)), "weight of '1' is torch.float8_e4m3fn, expected floating-point"),
    'complex': (lambda: with_weight(torch.randn(3, 4, dtype=torch.cfloat)), "weight of '1' is torch.complex64, expected floating-point"),
    'integer': (lambda: with_weight(torch.ones(3, 4, dtype=torch.int8)), "weight of '1' is torch.int8"),
    'expanded': (lambda: with_weight(torch.randn(3, 1).expand(3, 4)), "weight of '1' is expanded"),
    'overlapping': (lambda: with_weight(torch.randn(9).as_strided((3, 4), (2, 1))), "weight of '1' is expanded"),
    'negative': (lambda: with_weight(torch.randn(3, 4, dtype=torch.cfloat).conj().imag), "weight of '1' is a negative view"),
    'COO': (lambda: with_weight(torch.randn(3, 4).to_sparse()), "weight of '1' has the layout torch.sparse_coo"),
    'CSR': (lambda: with_weight(torch.randn(3, 4).to_sparse_csr()), "weight of '1' has the layout torch.sparse_csr"),
    'mkldnn': (lambda: with_weight(torch.randn(3, 4).to_mkldnn()), "weight of '1' has the layout torch._mkldnn"),
    'meta': (lambda: with_weight(torch.empty(3, 4, device='meta')), "weight of '1' is on the meta device"),
    'all on meta': (lambda: nn.Sequential(nn.Linear(4, 3)).to('meta'), "weight of '0' is on the meta device"),
    'inference': (in_inference_mode, "weight of '0' was made in inference mode"),
    'torch.nn.utils.prune': (pruned_by_torch, r"weight of '1' .*torch.nn.utils.prune.remove\(module, 'weight'\)"),
    'scripted': (lambda: torch.jit.script(nn.Sequential(nn.Linear(4, 3))), 'model: got a ScriptModule'),
    'traced': (lambda: torch.jit.trace(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)), 'model: got a ScriptModule'),
}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('granularity', ['weight', 'filter'])
@pytest.mark.parametrize('kind', ODD)
def test_weights_that_cannot_be_zeroed_are_refused(kind, granularity):
    make, says = ODD[kind]
    model = make()
    with pytest.raises(ValueError, match=says): Sparsifier(model, granularity)
    if kind not in ('scripted', 'traced', 'all on meta', 'inference'): assert list(Sparsifier(model, layers='0').layers) == ['0']


@pytest.mark.filterwarnings('ignore')
def test_a_script_module_within_a_model_is_left_alone():
    model = half_scripted()
    assert list(choose(model).chosen) == ['0']
    with pytest.raises(ValueError, match="layers: got '1.weight', which means none of the layers here, '0'"): choose(model, '1.weight')


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', ['float8', 'expanded', 'inference'])
def test_biases_and_batchnorms_that_cannot_be_zeroed_are_refused(name):
    def odd(tensor):
        if name == 'float8': return tensor.to(torch.float8_e4m3fn)
        if name == 'expanded': return tensor[:1].expand(len(tensor))
        with torch.inference_mode(): return tensor.clone()
    for at, attr in ((0, 'bias'), (1, 'bias'), (1, 'running_mean')):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))
        tensor = odd(torch.randn(4))
        setattr(model[at], attr, tensor if attr == 'running_mean' else nn.Parameter(tensor, requires_grad=False))
        with pytest.raises(ValueError, match=f"layers: '{at}.{attr}'"): Sparsifier(model, 'filter')
        Sparsifier(model).sparsify_model(50)


def spectral(layer): return nn.utils.parametrizations.spectral_norm(layer)


@pytest.mark.parametrize('chosen', [None, '1', nn.Linear, 'module', 'parameter'])
@pytest.mark.parametrize('granularity', ['weight', 'filter'])
def test_a_look_does_not_move_a_spectral_norm(chosen, granularity):
    model = nn.Sequential(spectral(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).train()
    before = [b.clone() for b in model.buffers()]
    named = {'1': '2', 'module': model[2], 'parameter': model[2].weight}.get(chosen, chosen)
    if chosen is nn.Linear:
        with pytest.raises(ValueError, match="weight of '0' is not a parameter of its own"): Sparsifier(model, granularity, layers=named)
    else: Sparsifier(model, granularity, layers=named).sparsify_model(50)
    assert before and all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


def test_a_dict_of_layers_is_refused():
    for make in (choose, lambda model, layers: Sparsifier(model, layers=layers)):
        with pytest.raises(TypeError, match="layers: got {'head': 50}, .*sparsity="): make(Net(), {'head': 50})


def test_lazy_norms_are_no_trouble():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Conv2d(4, 4, 3))
    assert 'lazy' not in str(Sparsifier(model, 'filter', layers='0').skipped)
