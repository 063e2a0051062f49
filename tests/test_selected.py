
import pytest
import torch
from torch import nn

from fasterai.sparsifier import Sparsifier


def test_a_tied_weight_is_one_weight():
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 2))
    net[2].weight = net[0].weight
    sparsifier = Sparsifier(net)
    sparsifier.sparsify_model(50)
    report = sparsifier.report()
    assert (report.weights, report.zeros) == (48, 24) and report.skipped == {'2': "shares the weight of '0'"}
    assert report.parameters == 36 + 6 + 6 + 12 + 2


@pytest.mark.parametrize('example', [None, torch.randn(2, 1, 8, 8), (torch.randn(2, 1, 8, 8),)], ids=['traced', 'tensor', 'tuple'])
def test_a_dead_filter_puts_out_zero_behind_its_norm(net, example):
    with torch.no_grad():  # a network that has seen something
        for norm in (net[1], net[4]):
            for t in (norm.weight, norm.bias, norm.running_mean): t.uniform_(.5, 1)
    sparsifier = Sparsifier(net, 'filter', 'local', example=example)
    sparsifier.sparsify_model(50)
    assert list(sparsifier.layers) == ['0', '3'] and "makes the network's output" in sparsifier.skipped['8']
    opt = torch.optim.SGD(net.parameters(), lr=.1, momentum=.9, weight_decay=.1)
    for training in (False, True, True, True, False):
        net.train(training)
        net(torch.randn(8, 1, 8, 8)).square().sum().backward()
        if training:
            opt.step()
            opt.zero_grad()
            sparsifier.apply_masks()
        x = torch.randn(8, 1, 8, 8)
        for conv, norm in ((0, 1), (3, 4)):
            dead = ~sparsifier.masks[str(conv)].flatten(1).any(1)
            x = net[norm](net[conv](x))
            assert int(dead.sum()) == len(dead) // 2
            assert (x[:, dead] == 0).all() and (x[:, ~dead] != 0).any()
            x = net[norm + 1](x)


def test_other_granularities_leave_bias_and_norm_alone(net):
    before = {n: p.clone() for n, p in net.named_parameters() if p.ndim == 1}
    Sparsifier(net, 'kernel').sparsify_model(90)
    assert all(torch.equal(p, dict(net.named_parameters())[n]) for n, p in before.items())


def test_the_output_layer_is_taken_where_it_is_named(net):
    assert '8' in Sparsifier(net, 'filter', layers=['0', '8']).layers
    assert '8' not in Sparsifier(net, 'filter', layers=['0', nn.Linear]).layers
    assert '8' in Sparsifier(net, 'kernel').layers
    with pytest.raises(ValueError, match="layers: no layer selected: 'weight' makes the network's output, .*: name it in layers="):
        Sparsifier(nn.Linear(3, 3), 'filter')


class Branch(nn.Module):
    "fx cannot trace it."
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3), nn.Linear(4, 2)

    def forward(self, x): return self.b(self.a(x).mean((2, 3)) if x.sum() > 0 else x)


def test_unknown_flow_is_said():
    with pytest.warns(UserWarning, match='example: how Branch runs cannot be told from its code .* pass Sparsifier'):
        assert list(Sparsifier(Branch(), 'filter').layers) == ['a', 'b']
    assert list(Sparsifier(Branch(), 'filter', example=torch.ones(1, 1, 4, 4)).layers) == ['a']
    with pytest.raises(ValueError, match=r'example: got \[\(1, 9, 4, 4\)\], on which the model fails: RuntimeError'):
        Sparsifier(Branch(), 'filter', example=torch.ones(1, 9, 4, 4))


def test_an_example_can_come_later():
    asked = []
    sparsifier = Sparsifier(Branch(), 'filter', example=lambda: asked.append(1) or torch.ones(1, 1, 4, 4))
    assert asked == []
    sparsifier.sparsify_model(50)
    sparsifier.sparsify_model(75)
    assert asked == [1] and list(sparsifier.layers) == ['a']


class Detector(nn.Module):
    "It takes a list of pictures."
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, pictures): return [self.head(self.body(picture[None])) for picture in pictures]


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, *, inputs): return self.head(self.body(inputs))


class OneDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, batch): return {'found': self.head(self.body(batch['inputs']))}


PICTURE, VALUES = torch.randn(3, 8, 8), torch.randn(2, 8)


@pytest.mark.parametrize('model, example', [
    (Detector, [PICTURE, PICTURE]), (Detector, ([PICTURE, PICTURE],)), (Detector, {'pictures': [PICTURE]}),
    (Keywords, {'inputs': VALUES}), (Keywords, lambda: {'inputs': VALUES}),
    (OneDict, {'inputs': VALUES}), (OneDict, ({'inputs': VALUES},)), (OneDict, {'batch': {'inputs': VALUES}})])
def test_inputs_of_other_kinds(model, example):
    sparsifier = Sparsifier(model(), 'filter', example=example)
    assert list(sparsifier.layers) == ['body'] and "makes the network's output" in sparsifier.skipped['head']


def test_inputs_that_do_not_suit_are_shown():
    with pytest.raises(ValueError, match=r'example: got \[list\], on which the model fails.*; a tuple has several inputs, a list is one'):
        Sparsifier(Branch(), 'filter', example=[torch.ones(1, 1, 4, 4)])
    with pytest.raises(ValueError, match=r'example: got \[inputs=\(2, 9\)\], on which the model fails'):
        Sparsifier(Keywords(), 'filter', example={'inputs': torch.randn(2, 9)})


def test_the_biases_of_a_tied_weight_die_together():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.n, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)
            self.b.weight = self.a.weight

        def forward(self, x): return self.out(self.a(x) + self.n(self.b(x)))
    model = Tied()
    nn.init.ones_(model.n.bias)
    Sparsifier(model, 'filter', 'local', example=torch.randn(5, 4)).sparsify_model(50)
    x = model.b(torch.randn(9, 4))
    assert torch.equal((x == 0).all(0), model.n.bias == 0)
    assert (model.n.bias == 0).sum() == 2


def test_a_layer_that_did_not_run_is_left_alone():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.aux, self.out = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x): return (self.out(self.a(x)), self.aux(self.a(x))) if self.training else self.out(self.a(x))
    sparsifier = Sparsifier(Auxiliary(), 'filter', example=torch.randn(2, 4))
    assert list(sparsifier.layers) == ['a'] and sparsifier.skipped['aux'].startswith('did not run')


def test_layers_without_weights_are_left_out():
    assert Sparsifier(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 0))).skipped == {'1': 'has no weights'}


def test_the_biases_of_dead_rows_go_too():
    net = nn.ModuleDict({'lstm': nn.LSTM(4, 3), 'attn': nn.MultiheadAttention(6, 2)})
    with torch.no_grad(): net['attn'].in_proj_bias.fill_(1)
    sparsifier = Sparsifier(net, 'filter', 'local', layers=['lstm', 'attn'], example=None)
    sparsifier.sparsify_model(50)
    assert torch.equal(net['lstm'].bias_ih_l0 == 0, (net['lstm'].weight_ih_l0 == 0).all(1)) and int((net['lstm'].bias_ih_l0 == 0).sum()) == 6
    assert torch.equal(net['attn'].in_proj_bias == 0, (net['attn'].in_proj_weight == 0).all(1)) and int((net['attn'].in_proj_bias == 0).sum()) == 9


def test_a_dead_layer_is_dead_altogether():
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))
    with torch.no_grad(): net[0].weight /= 100
    nn.init.ones_(net[1].bias)
    sparsifier = Sparsifier(net, 'layer', example=torch.randn(2, 4))
    assert list(sparsifier.layers) == ['0', '3']
    with pytest.warns(UserWarning, match="'0' has less than 1 %"): sparsifier.sparsify_model(20)
    for dead in (net[0].weight, net[0].bias, net[1].bias, net[1].running_mean): assert not dead.any()
    assert net[3].weight.all()


def test_the_scale_of_a_dead_channel_stays_as_it_is(net):
    with torch.no_grad():
        for norm in (net[1], net[4]): norm.weight.uniform_(.5, 2), norm.bias.uniform_(-1, 1), norm.running_mean.normal_()
    before = net[1].weight.clone(), net[4].weight.clone()
    x = torch.randn(4, 1, 8, 8)
    sparsifier = Sparsifier(net, 'filter', 'local', example=x)
    sparsifier.sparsify_model(50)
    assert torch.equal(net[1].weight, before[0])
    assert torch.equal(net[4].weight, before[1])
    dead = ~sparsifier.masks['3'].flatten(1).any(1)
    for mode in (net.eval, net.train):
        mode()
        assert (net[:5](x)[:, dead] == 0).all()
    sparsifier.sparsify_model(0, regrow=True)
    assert torch.equal(net[4].weight, before[1])
    assert (net[4].bias[dead] == .01).all()  # a ReLU at zero would pass no gradient


def prepared(engine, fused, example):
    "A network of two blocks and an output layer, prepared for quantization-aware training."
    from torch.ao.quantization import fuse_modules_qat, get_default_qat_qconfig, prepare_qat
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).train()
    with torch.no_grad():  # one that has seen something
        for norm in (model[1], model[4]):
            for tensor in (norm.weight, norm.bias, norm.running_mean): tensor.uniform_(.5, 1)
    model.qconfig = get_default_qat_qconfig(engine)
    if fused: fuse_modules_qat(model, [['0', '1', '2'], ['3', '4', '5']], inplace=True)
    return prepare_qat(model, inplace=True)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize('with_example', [True, False], ids=['watched', 'traced'])
@pytest.mark.parametrize('fused', [True, False], ids=['fused', 'not fused'])
@pytest.mark.parametrize('engine', ['fbgemm', 'qnnpack'])
def test_filters_of_a_network_that_is_prepared_for_quantization(engine, fused, with_example):
    x = torch.randn(4, 1, 8, 8)
    model = prepared(engine, fused, x)
    sparsifier = Sparsifier(model, 'filter', 'local', example=x if with_example else None)
    assert list(sparsifier.layers) == ['0', '3'] and "makes the network's output" in sparsifier.skipped['8']
    sparsifier.sparsify_model(50)
    optimizer = torch.optim.SGD(model.parameters(), lr=.1, momentum=.9, weight_decay=.1)
    sparsifier.attach(optimizer)
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
    after = {name: model[int(name) + (0 if fused else 1)] for name in sparsifier.layers}  # the norm is inside, or behind
    for name, module in after.items():
        seen = []
        hook = module.register_forward_hook(lambda module, args, out: seen.append(out))
        model(x)
        hook.remove()
        dead = ~sparsifier.masks[name].flatten(1).any(1)
        assert int(dead.sum()) == len(dead) // 2 and not model[int(name)].weight[dead].any()
        if with_example or not fused: assert not seen[0][:, dead].any()  # the code of a fused layer is not traced
        assert seen[0][:, ~dead].any()
    assert sparsifier.sparsity == pytest.approx(50)


def test_a_weight_that_is_computed_hides_its_filters_and_not_its_layer():
    class Standardized(nn.Conv2d):
        def forward(self, x): return nn.functional.conv2d(x, (self.weight - self.weight.mean()) / self.weight.std(), self.bias)
    model = nn.Sequential(Standardized(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    assert list(Sparsifier(model, 'filter', example=torch.randn(2, 1, 8, 8)).layers) == ['0']


def test_quantization_aware_training_of_a_network_with_dead_filters():
    from torch.ao.quantization import fuse_modules_qat, get_default_qat_qconfig, prepare_qat
    x = torch.randn(4, 1, 8, 8)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    Sparsifier(model, 'filter', example=x).sparsify_model(50)
    model.train()
    model.qconfig = get_default_qat_qconfig('qnnpack')
    fuse_modules_qat(model, ['0', '1', '2'], inplace=True)
    prepare_qat(model, inplace=True)  # its modules divide by the scale
    assert not model(x).isnan().any()
