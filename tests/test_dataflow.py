"Dead channels are followed to where they end; each case is run by watching a batch and by tracing the code."
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fasterai.channels import zero_entries
from fasterai.dataflow import Flow, _norms, _Watcher, trace, watch
from fasterai.sparsifier import Sparsifier

IMAGE, ROWS = torch.randn(2, 2, 4, 4), torch.randn(3, 4)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm, self.fc = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x): return self.fc(F.relu(self.norm(self.a(x) + self.b(x))).mean((2, 3)))


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm, self.out = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(5), nn.Conv2d(5, 1, 1)

    def forward(self, x): return self.out(self.norm(torch.cat([self.a(x), F.max_pool2d(self.b(x), 1)], 1)))


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.gate, self.norm, self.out = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1)

    def forward(self, x): return self.out(self.norm(self.a(x) * torch.sigmoid(self.gate(x))))


class Reversed(nn.Module):
    "Layers registered in another order than they run."
    def __init__(self):
        super().__init__()
        self.out, self.norm2, self.norm1, self.b, self.a = nn.Linear(4, 2), nn.BatchNorm2d(4), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.Conv2d(2, 3, 1)

    def forward(self, x): return self.out(self.norm2(self.b(torch.tanh(self.norm1(self.a(x))))).flatten(1))


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.left, self.right = nn.Conv2d(2, 3, 1), nn.Linear(3, 2), nn.Linear(3, 4)

    def forward(self, x):
        x = self.a(x).mean((2, 3))
        return {'left': self.left(x), 'right': [self.right(x).softmax(-1)]}


def chain(*after): return nn.Sequential(nn.Conv2d(2, 3, 1), *after)


def none_zero(*biases): return {id(p): torch.zeros(len(p), dtype=torch.bool) for p in biases}


def biases(model): return none_zero(*(p for n, p in model.named_parameters() if n.endswith('bias')))


def names(model, weights): return sorted(n for n, m in model.named_modules() if hasattr(m, 'weight') and id(m.weight) in weights)


def flows(model):
    yield watch(model, (torch.randn(2, 2, 1, 1),))
    yield trace(model)


@pytest.mark.parametrize('model, weights', [
    (Residual(), ['fc']), (Dense(), ['out']), (Gate(), ['out']), (Reversed(), ['out']), (TwoHeads(), ['left', 'right']),
    (chain(), ['0']), (chain(nn.ReLU(), nn.Conv2d(3, 1, 1), nn.Sigmoid()), ['2']), (nn.Conv2d(2, 2, 1), ['']),
    (chain(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2), nn.Softmax(1)), ['3'])], ids=lambda x: type(x).__name__)
def test_whose_weights_make_the_output(model, weights):
    for flow in flows(model): assert names(model, flow.output_weights) == weights


@pytest.mark.parametrize('model, dead, zero', [  # dead filters by layer; the channels of each BatchNorm that are zero
    (chain(nn.BatchNorm2d(3)), {'0': [1]}, {'1': [1]}),
    (chain(nn.ReLU(), nn.Dropout(.5), nn.BatchNorm2d(3)), {'0': [0, 2]}, {'3': [0, 2]}),
    (chain(nn.Sigmoid(), nn.BatchNorm2d(3)), {'0': [0]}, {}),  # half is not nothing
    (chain(nn.BatchNorm2d(3), nn.Hardswish(), nn.MaxPool2d(1), nn.BatchNorm2d(3, affine=False)), {'0': [0]}, {'1': [0], '4': [0]}),
    (chain(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3), nn.Linear(3, 2)), {'0': [2]}, {'3': [2]}),
    (chain(nn.Flatten(), nn.Linear(3, 4), nn.BatchNorm1d(4)), {'0': [1], '2': [3]}, {'3': [3]}),
    (nn.Sequential(nn.ConvTranspose2d(2, 4, 1, groups=2), nn.BatchNorm2d(4)), {'0': [3]}, {'1': [3]}),
    (Residual(), {'a': [0, 1], 'b': [1, 2]}, {'norm': [1]}),
    (Residual(), {'a': [0, 1]}, {}),
    (Dense(), {'a': [2], 'b': [0]}, {'norm': [2, 3]}),
    (Dense(), {'b': [1]}, {'norm': [4]}),
    (Gate(), {'a': [1]}, {'norm': [1]}),
    (Reversed(), {'a': [0], 'b': [2]}, {'norm1': [0], 'norm2': [2]}),
], ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else None)
def test_what_dead_filters_make_zero(model, dead, zero):
    modules = dict(model.named_modules())
    filters = {}
    for name, which in dead.items():
        outputs = modules[name].out_channels if hasattr(modules[name], 'out_channels') else modules[name].out_features
        filters[id(modules[name].weight)] = torch.zeros(outputs, dtype=torch.bool).index_fill_(0, torch.tensor(which), True)
    for flow in flows(model):
        found = flow.zero_channels(filters, biases(model))
        assert {n: found[m].nonzero().flatten().tolist() for n, m in modules.items() if m in found} == zero


def test_flattened_maps_become_as_many_entries():
    model = chain(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 1))
    flow = watch(model, (torch.randn(3, 2, 2, 2),))
    dead = {id(model[0].weight): torch.tensor([False, True, False])}
    assert flow.zero_channels(dead, biases(model))[model[2]].nonzero().flatten().tolist() == [4, 5, 6, 7]


def test_norms_behind_quotients_sums_with_a_bias_and_weights_that_are_scaled():
    "What a convolution does that is fused with its BatchNorm, for quantization-aware training."
    def way(s, x):
        scaled = F.conv2d(x, s.a.weight * torch.full((4, 1, 1, 1), 2.), torch.zeros(4))
        return s.b(s.n(scaled / torch.full((1, 4, 1, 1), 2.) + s.a.bias.reshape(1, -1, 1, 1)))
    model = Net(way, conv(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(4))
    flow, dead = watch(model, (IMAGE,)), torch.tensor([False, True, False, True])
    assert names(model, flow.output_weights) == ['b']
    weights = {id(model.a.weight): dead}
    assert flow.zero_channels(weights, {id(model.a.bias): dead})[model.n].tolist() == dead.tolist()
    assert flow.zero_channels(weights, {id(model.a.bias): ~dead}) == {}
    assert {key: zero.tolist() for key, zero in flow.zero_channels(weights, {}).items()} == dict.fromkeys((model.n, model.a.bias), dead.tolist())  # a shift like others


def test_buffers_that_a_batch_resizes_are_put_back():
    class Observer(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('seen', torch.empty(0))

        def forward(self, x):
            self.seen.resize_(3).fill_(1)
            return x
    model = chain(Observer())
    watch(model, (IMAGE,))
    assert model[1].seen.shape == (0,)


def test_a_norm_used_twice_is_zero_only_where_both_uses_are():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x): return self.norm(self.a(x)), self.norm(self.b(x))
    model = Twice()
    dead = {id(model.a.weight): torch.tensor([True, True, False]), id(model.b.weight): torch.tensor([False, True, False])}
    for flow in flows(model): assert flow.zero_channels(dead, biases(model))[model.norm].tolist() == [False, True, False]


class Net(nn.Module):
    "Layers a, b, BatchNorms n and m, and a way through them."
    def __init__(self, way, a=None, b=None, n=None, m=None):
        super().__init__()
        self.a, self.b, self.n, self.m, self.way = a, b, n, m, way

    def forward(self, x): return self.way(self, x)


def conv(): return nn.Conv2d(2, 4, 1)


def sides(way, **layers): return Net(way, **(dict(a=conv(), b=conv()) | layers))


def test_watching_leaves_no_trace():
    model = chain(nn.BatchNorm2d(3), nn.Dropout(.5), nn.Conv2d(3, 1, 1))
    model.train()
    model[1].eval()
    modes, state, rng = [m.training for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    watch(model, (torch.randn(4, 2, 3, 3, generator=torch.Generator()),))
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    with pytest.raises(RuntimeError): watch(model, (torch.randn(1, 7, 3, 3),))
    assert watch(model, (), {'input': IMAGE}).output_weights == watch(model, (IMAGE,)).output_weights
    assert [m.training for m in model.modules()] == modes


def test_code_that_cannot_be_traced_can_be_watched():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 3), nn.Linear(3, 2)

        def forward(self, x): return self.b(self.a(x)) if x.sum() > 0 else self.a(x)
    model = Branch()
    with pytest.raises(Exception, match='control flow'): trace(model)
    assert names(model, watch(model, (torch.ones(1, 2),)).output_weights) == ['b']


# What must not be taken for zero. `dead` are filters of layer `a`.

def inplace(s, x):
    y = s.a(x)
    y.add_(s.b(x))
    return s.n(y)


def through_a_view(s, x):
    y = s.a(x)
    y[:, :3].add_(1)
    return s.n(y)


def set_item(s, x):
    y = s.a(x)
    y[:, 0] = 1
    return s.n(y)


class Shifted(nn.Linear):
    def forward(self, x): return F.linear(x, self.weight, self.bias + 1)


def shared_scale():
    n, m = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    m.weight, m.bias = n.weight, n.bias
    return dict(n=n, m=m)


NOT_ZERO = {
    'a sum changed in place': (Net(inplace, conv(), conv(), nn.BatchNorm2d(4)), IMAGE),
    'changed through a view': (Net(through_a_view, conv(), n=nn.BatchNorm2d(4)), IMAGE),
    'an entry set': (Net(set_item, conv(), n=nn.BatchNorm2d(4)), IMAGE),
    'a bias changed on the way': (Net(lambda s, x: s.n(s.a(x)), Shifted(4, 4), n=nn.BatchNorm1d(4)), ROWS),
    'another bias': (Net(lambda s, x: s.n(F.linear(x, s.a.weight, s.b.bias * 2)), nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)), ROWS),
    'mean over channels': (Net(lambda s, x: s.n(s.a(x).mean(-2)), nn.Conv1d(4, 4, 1), n=nn.BatchNorm1d(4)), torch.randn(3, 4, 4)),
    'features pooled': (Net(lambda s, x: s.n(F.avg_pool1d(s.a(x), 3, 1, 1)), nn.Linear(4, 4), n=nn.BatchNorm1d(4)), torch.randn(3, 4, 4)),
    'a clamp above zero': (Net(lambda s, x: s.n(F.hardtanh(s.a(x), .1, 1.)), conv(), n=nn.BatchNorm2d(4)), IMAGE),
    'features on the last axis': (Net(lambda s, x: s.n(s.a(x)), nn.Linear(4, 4), n=nn.BatchNorm1d(4)), torch.randn(3, 4, 4)),
    'broadcast': (Net(lambda s, x: s.n(s.a(x) * s.b(x)), nn.Linear(4, 4), conv(), nn.BatchNorm2d(2)), torch.randn(4, 2, 4, 4)),
    'one scale for two': (Net(lambda s, x: s.n(s.a(x)) + s.m(s.b(x)), conv(), conv(), **shared_scale()), IMAGE),
    'one norm twice, and one behind': (Net(lambda s, x: s.m(s.n(s.a(x))) + s.n(s.b(x)), conv(), conv(), nn.BatchNorm2d(4), nn.BatchNorm2d(4)), IMAGE),
}


@pytest.mark.parametrize('name', NOT_ZERO)
def test_what_is_not_zero_is_left_alone(name):
    model, x = NOT_ZERO[name]
    dead = {id(model.a.weight): torch.tensor([True, False, False, True])}
    looked = 0
    for way in (lambda: trace(model), lambda: watch(model, (x,))):
        try: flow = way()
        except (TypeError, RuntimeError): continue  # fx cannot follow an entry that is set
        assert flow.zero_channels(dead, none_zero(model.a.bias)) == {}
        looked += 1
    assert looked


def test_clamps_about_zero_keep_it():
    for model in (Net(lambda s, x: s.n(F.relu6(s.a(x))), conv(), n=nn.BatchNorm2d(4)), nn.Sequential(conv(), nn.ReLU6(), nn.BatchNorm2d(4))):
        layer = model.a if isinstance(model, Net) else model[0]
        for flow in (watch(model, (IMAGE,)), trace(model)):
            assert len(flow.zero_channels({id(layer.weight): torch.tensor([True, False, False, True])}, none_zero(layer.bias))) == 1


@dataclass
class Out:
    logits: torch.Tensor


def test_outputs_that_cannot_be_looked_into():
    model = Net(lambda s, x: Out(s.b(s.a(x).relu())), nn.Linear(4, 6), nn.Linear(6, 3))
    assert names(model, watch(model, (ROWS,)).output_weights) == ['b']
    model = Net(lambda s, x: s.script(s.b(s.a(x).relu())), nn.Linear(4, 6), nn.Linear(6, 3))
    model.script = lambda x: torch.from_numpy(x.numpy() + 1)
    assert names(model, watch(model, (ROWS,)).output_weights) == ['b']


def test_layers_called_by_keyword_and_sums_in_place_make_the_output():
    model = Net(lambda s, x: s.b(input=s.a(x)), nn.Linear(4, 6), nn.Linear(6, 3))
    assert names(model, trace(model).output_weights) == ['b']

    def tail(s, x):
        y = s.a(x)
        y.add_(s.b(x))
        return y
    model = Net(tail, nn.Linear(4, 3), nn.Linear(4, 3))
    for flow in (trace(model), watch(model, (ROWS,))): assert names(model, flow.output_weights) == ['a', 'b']


def test_watching_touches_neither_overloaded_modes_nor_buffers_nor_random_numbers():
    class Odd(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.register_buffer('calls', torch.zeros(()))

        def train(self, mode=True):
            self.weight.data += 1
            return super().train(mode)

        def forward(self, x):
            self.calls += 1
            return F.dropout(super().forward(x) + torch.randn(4))
    model = nn.Sequential(Odd(), nn.Linear(4, 2))
    before, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    watch(model, (ROWS,))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and torch.equal(rng, torch.get_rng_state())


# Learned shifts, and whole networks

class Shifted2d(nn.Module):
    "A scale and a shift of each channel, as layers of several libraries have them."
    def __init__(self, way=lambda s, x: torch.addcmul(s.shift, s.scale, x), shape=(1, 4, 1, 1)):
        super().__init__()
        self.scale, self.shift, self.way = nn.Parameter(torch.rand(shape) + 1), nn.Parameter(torch.rand(shape) + 1), way

    def forward(self, x): return self.way(self, x)


SHIFTS = {
    'addcmul': (Shifted2d(), True), 'a sum': (Shifted2d(lambda s, x: s.scale * x + s.shift), True), 'first': (Shifted2d(lambda s, x: s.shift + x), True),
    'a vector': (Shifted2d(lambda s, x: x + s.shift.view(1, 4, 1, 1), (4,)), True), 'of a response norm': (Shifted2d(lambda s, x: x + s.shift + s.scale * (x * x.norm(dim=(2, 3), keepdim=True))), True),
    'a scale too': (Shifted2d(lambda s, x: x * s.shift + s.shift), False), 'on another way': (Shifted2d(lambda s, x: x + s.shift + s.shift.exp()), False),
    'to what is not zero': (Shifted2d(lambda s, x: x.cos() + s.shift), False), 'twice': (Shifted2d(lambda s, x: (x + s.shift).relu() + (x.cos() + s.shift)), False),
    'over the rows': (Shifted2d(lambda s, x: x + s.shift, (1, 1, 4, 1)), False), 'numbers': (Shifted2d(lambda s, x: x + s.shift, (1, 1, 1, 1)), False),
}


@pytest.mark.parametrize('name', SHIFTS)
def test_a_learned_shift_is_zero_with_its_filters(name):
    shifted, masked = SHIFTS[name]
    model = nn.Sequential(nn.Conv2d(2, 4, 1), shifted, nn.ReLU(), nn.Conv2d(4, 2, 1))
    model[3].weight.data.abs_()
    sparsifier = Sparsifier(model, 'filter', example=IMAGE)
    sparsifier.sparsify_model(50)
    gone = (model[0].weight == 0).flatten(1).all(1)
    assert gone.sum() == 2 and torch.equal((shifted.shift == 0).flatten(), gone if masked else torch.zeros(shifted.shift.numel(), dtype=torch.bool))
    if masked: assert torch.equal((model[:2](IMAGE) == 0).all(0).flatten(1).all(1), gone)
    sparsifier.sparsify_model(0, regrow=True)
    assert shifted.shift.all()
    shifted.shift.data.uniform_(1, 2)


def test_shifts_that_no_mask_can_hold_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), Shifted2d(lambda s, x: x + s.shift, (4,)), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[1].shift = nn.Parameter(torch.rand(1).expand(4), requires_grad=False)
    Sparsifier(model, 'filter', example=ROWS).sparsify_model(50)
    assert model[1].shift.all() and model[2].bias.numel() == 4 and not any(model[2].running_mean)


def networks():
    import torchvision.models as models
    torch.manual_seed(0)
    yield models.mobilenet_v3_small(), (2, 3, 32, 32)
    yield models.shufflenet_v2_x0_5(), (2, 3, 32, 32)
    block = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, activation='gelu'), nn.Linear(8, 4))
    yield block, (2, 5, 8)


@pytest.mark.parametrize('n', range(3))
@pytest.mark.parametrize('coupled', [False, True])
def test_all_that_is_said_to_be_zero_in_a_pruned_network_is_zero(n, coupled):
    model, shape = list(networks())[n]
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): nn.init.normal_(m.running_mean), nn.init.normal_(m.bias), nn.init.uniform_(m.running_var, .5, 2)
    x = torch.randn(shape)
    sparsifier = Sparsifier(model.eval(), 'filter', 'local', example=x, coupled=coupled)
    sparsifier.sparsify_model(50)
    watcher, seen = _Watcher(_norms(model)), []
    record = watcher._record
    watcher._record = lambda call, results: (record(call, results), seen.extend((watcher.nodes[t], t.clone()) for t in results))
    with torch.no_grad(), watcher: model(x)
    along = sparsifier.selected.dependents(sparsifier.masks.of)
    biases = {id(getattr(m, name)): zero.numpy() for m, tensors in along.items() for name, zero in tensors.items() if name != 'running_mean'}
    dead = {id(layer.weight): (~layer.filters_alive(sparsifier.masks.of[name])).numpy() for name, layer in sparsifier.layers.items()}
    values, claims = {}, 0
    for node in Flow(watcher.tape, []).tape:
        values[node] = zero_entries(node, [values.get(i) for i in node.inputs], dead, biases)
        if node.op == 'norm' and values[node] is not None: values[node] = values[node] & along.get(node.norm, {}).get('bias', torch.zeros(node.length, dtype=torch.bool)).numpy().reshape(node.places)
    for node, tensor in seen:
        if values.get(node) is None: continue
        claims += values[node].sum()
        assert not tensor.masked_select(torch.from_numpy(values[node].copy()).expand(tensor.shape)).any(), node.op
    assert claims > 10
