from copy import deepcopy

import pytest
import torch
from conftest import Made
from fastai.vision.learner import create_body, create_head
from fastai.vision.models.unet import DynamicUnet
from torch import nn
from torchvision import models

from fasterai.arguments import Inputs
from fasterai.deploy.compare import agree, outputs
from fasterai.deploy.shrink import parameters, shrink
from fasterai.sparsifier import Sparsifier

pytestmark = pytest.mark.filterwarnings('ignore:sparsity. .* (would have been left|has less than 1 %)')


def same(small, model, x): return agree(outputs(small, Inputs((x,))), outputs(model, Inputs((x,))))


def trained_a_little(model, x):
    "Running statistics and shifts that are not zero, as after training."
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine:
            nn.init.uniform_(m.weight, .5, 1.5)
            nn.init.uniform_(m.bias, -.5, .5)
    model.train()(x)
    return model


def chain():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(),
                         nn.Linear(6 * 16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4))


def test_a_chain_by_eye():
    x = torch.randn(5, 3, 8, 8)
    model = trained_a_little(chain(), x)
    before = deepcopy(model.state_dict())
    Sparsifier(model, 'filter', 'local', example=x).sparsify_model(50)
    small = shrink(model, x)
    shapes = [tuple(small[i].weight.shape) for i in (0, 3, 6, 9)]
    assert shapes == [(4, 3, 3, 3), (3, 4, 3, 3), (6, 48), (4, 6)] and small[1].num_features == 4
    assert same(small, model, x) and same(small, model, torch.randn(2, 3, 8, 8))
    assert model[0].weight.shape == (8, 3, 3, 3) and set(model.state_dict()) == set(before)
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]
    assert all(p.requires_grad for p in small.parameters())


def test_it_trains_on_saves_and_copies(tmp_path):
    x = torch.randn(5, 3, 8, 8)
    model = trained_a_little(chain(), x)
    Sparsifier(model, 'filter', 'local', example=x).sparsify_model(50)
    small = shrink(model, x, verbose=False)
    optimizer = torch.optim.SGD(small.parameters(), lr=.1)
    small(x).square().mean().backward()
    optimizer.step()
    assert not same(small, model, x)
    torch.save(small, tmp_path / 'a')
    assert same(torch.load(tmp_path / 'a', weights_only=False), small, x) and same(deepcopy(small), small, x)


MODELS = {  # how to make it, the side of a picture, at most so many percent of the parameters are left
    'resnet18': (lambda: models.resnet18(num_classes=10), 64, 30),
    'mobilenet_v2': (lambda: models.mobilenet_v2(num_classes=10), 64, 30),
    'vgg16_bn': (lambda: models.vgg16_bn(num_classes=10), 64, 30),
    'densenet121': (lambda: models.densenet121(num_classes=10), 64, 30),
    'vision_learner': (lambda: nn.Sequential(create_body(models.resnet18(), pretrained=False), create_head(512, 10)),
                       64, 30),
    'DynamicUnet': (lambda: DynamicUnet(create_body(models.resnet18(), pretrained=False), 2, (64, 64)), 64, 60)}


@pytest.mark.parametrize('name', MODELS)
def test_real_networks(name, capsys):
    make, side, percent = MODELS[name]
    x = torch.randn(2, 3, side, side)
    model = trained_a_little(make(), x)
    Sparsifier(model, 'filter', 'local', example=x, coupled=True).sparsify_model(50)
    small = shrink(model, x)
    said = capsys.readouterr().out
    assert said.startswith('shrink: ') and f'{parameters(model):,} parameters became {parameters(small):,}' in said
    assert parameters(small) <= percent / 100 * parameters(model), said
    assert same(small, model, x) and same(small, model, torch.randn(1, 3, side, side))


def test_what_must_stay_is_said(capsys):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.out, self.norm = nn.Conv2d(4, 2, 1), nn.BatchNorm2d(4)
        def forward(self, x): return self.out(self.norm(self.a(x) + self.b(x)))
    x, model = torch.randn(2, 3, 5, 5), Sum()
    with torch.no_grad():
        for m in (model.a, model.out): m.weight[:1], m.bias[:1] = 0, 0
    small = shrink(model, x)
    said = capsys.readouterr().out
    assert '1 zero filters stay in a: they are added to, or read by, channels that are not zero: coupled=True' in said
    assert "1 zero filters stay in out: they are the network's output" in said
    assert parameters(small) == parameters(model)
    with torch.no_grad():
        model.b.weight[:1], model.b.bias[:1], model.norm.bias[:1] = 0, 0, 1
    shrink(model, x)
    assert 'a bias or a BatchNorm makes them other than zero' in capsys.readouterr().out
    with torch.no_grad(): model.norm.bias[:1] = 0
    assert same(shrink(model, x), model, x) and parameters(shrink(model, x)) < parameters(model)


def test_what_makes_something_of_zero_is_found_by_the_outputs(capsys):
    class Sigmoid(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
        def forward(self, x): return self.out(self.b(self.a(x).sigmoid()).relu())
    x, model = torch.randn(2, 3, 5, 5), Sigmoid()
    with torch.no_grad():
        for m in (model.a, model.b): m.weight[:2], m.bias[:2] = 0, 0
    small = shrink(model, x)
    assert same(small, model, x) and len(small.a.weight) == 4 and len(small.b.weight) == 2
    assert 'stay in a: a sigmoid makes them other than zero' in capsys.readouterr().out


def test_a_layer_that_is_all_zero_keeps_one_channel(capsys):
    x, model = torch.randn(2, 3, 8, 8), chain()
    with torch.no_grad():
        for p in (model[0].weight, model[0].bias, model[1].bias): p.zero_()
    small = shrink(model, x)
    assert len(small[0].weight) == 1 and same(small, model, x) and 'one channel must be left' in capsys.readouterr().out


def test_nothing_to_do(capsys):
    x, model = torch.randn(2, 3, 8, 8), chain()
    assert parameters(shrink(model, x)) == parameters(model) and 'no filter is zero' in capsys.readouterr().out
    with pytest.raises(TypeError, match='model: got int'): shrink(3, x)
    with pytest.raises(ValueError, match=r'example: got \[\(2, 4, 8, 8\)\], on which the model fails'):
        shrink(model, torch.randn(2, 4, 8, 8))


def test_coupled_filters_die_together():
    x = torch.randn(2, 3, 64, 64)
    model = models.resnet18(num_classes=10)
    sparsifier = Sparsifier(model, 'filter', 'global', example=x, coupled=True)
    sparsifier.sparsify_model(40)
    def dead(m): return (m.weight == 0).flatten(1).all(1)
    for layers in ([model.conv1, model.layer1[0].conv2, model.layer1[1].conv2],
                   [model.layer3[0].downsample[0], *(b.conv2 for b in model.layer3)]):
        assert all(torch.equal(dead(m), dead(layers[0])) for m in layers)
    largest = max(sum(sparsifier.layers[n].grouping.size for n in names) for names in sparsifier.selected.ties)
    report = sparsifier.report()
    assert abs(report.zeros - .4 * report.weights) <= largest / 2
    sparsifier.sparsify_model(60)
    assert same(shrink(model, x, verbose=False), model, x)
    sparsifier.sparsify_model(20, regrow=True)


def test_coupled_depthwise_convolutions():
    block = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
                          nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 2, 1))
    x = torch.randn(2, 3, 5, 5)
    sparsifier = Sparsifier(block, 'filter', example=x, coupled=True)
    assert sparsifier.selected.ties == [['0', '3']]
    sparsifier.sparsify_model(50)
    assert shrink(block, x, verbose=False)[3].groups == 4


@pytest.mark.parametrize('arguments, says', [
    (dict(granularity='weight'), "coupled: got True with granularity='weight', expected 'filter'"),
    (dict(granularity='filter', context='erk'), "coupled: got True with context='erk'")])
def test_what_cannot_be_coupled_is_refused(arguments, says):
    with pytest.raises(ValueError, match=says): Sparsifier(chain(), **arguments, coupled=True)


def test_what_is_added_to_something_that_is_not_selected_stays():
    x, model = torch.randn(2, 3, 64, 64), models.resnet18(num_classes=10)
    sparsifier = Sparsifier(model, 'filter', layers=['layer1', 'layer2'], example=x, coupled=True)
    assert 'is added to what is not selected' in sparsifier.skipped['layer1.0.conv2']
    assert 'layer2.0.conv2' in sparsifier.layers
    with pytest.raises(ValueError, match="got one for 'layer2.0.conv2' alone, expected the same "
                                         "for all of 'layer2.0.conv2', 'lay"):
        sparsifier.sparsify_layer('layer2.0.conv2', 50)


def dead(*layers, n=2):
    with torch.no_grad():
        for m in layers:
            m.weight[:n] = 0
            if m.bias is not None: m.bias[:n] = 0


def conv(i, o, **more): return nn.Conv2d(i, o, 3, padding=1, **more)


def test_an_example_that_hides_the_difference_is_not_trusted():
    def run(s, x):
        x = s.norm(s.a(x)).relu()
        n, c, *space = x.shape
        shuffled = x.view(n, 2, c // 2, *space).transpose(1, 2).reshape(n, c, *space)
        return s.out(s.norm2(s.b(shuffled)).relu().mean((2, 3)))
    model = Made(run, a=conv(3, 8, bias=False), norm=nn.BatchNorm2d(8), b=conv(8, 8, bias=False),
                 norm2=nn.BatchNorm2d(8), out=nn.Linear(8, 2))
    with torch.no_grad(): model.a.weight[[0, 1, 5, 6]] = 0
    assert same(shrink(model, torch.zeros(1, 3, 8, 8)), model, torch.randn(2, 3, 8, 8))


def test_grouped_convolutions_and_gates_do_not_end_it(capsys):
    x = torch.randn(2, 3, 6, 6)
    model = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8, groups=2), nn.ReLU(), conv(8, 4), nn.ReLU(), conv(4, 2))
    dead(model[0], model[4])
    small = shrink(model, x)
    assert same(small, model, x) and len(small[4].weight) == 2
    assert '2 zero filters stay in 0: each group of a convolution' in capsys.readouterr().out
    model = Made(lambda s, x: s.out(s.b((y := s.a(x)) * s.gate(y).sigmoid())),
                 a=conv(3, 8), gate=conv(8, 1), b=conv(8, 6), out=conv(6, 2))
    dead(model.a, model.b)
    small = shrink(model, x)
    assert same(small, model, x) and len(small.b.weight) == 4


def test_a_weight_that_is_shared_stays_shared(capsys):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[4].weight = model[2].weight
    dead(model[0], model[2])
    x = torch.randn(3, 4)
    small = shrink(model, x)
    assert small[4].weight is small[2].weight and same(small, model, x)
    assert "4 zero filters stay in 0, 2: they are the network's output" in capsys.readouterr().out


def test_the_model_is_not_touched_by_what_it_remembers():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.n = nn.Linear(4, 6), 0
            self.register_buffer('seen', torch.zeros(()))
        def forward(self, x):
            self.n += 1
            self.seen += 1
            return self.fc(x), x > 0, x.masked_fill(x > 9, -torch.inf)
    model = Counts()
    shrink(model, torch.randn(2, 4) * 9, verbose=False)
    assert model.n == 0 and model.seen == 0


def test_sums_that_broadcast_are_not_tied():
    x = torch.randn(2, 3, 5, 5)
    model = Made(lambda s, x: s.out(s.a(x) + s.b(x)), a=conv(3, 8), b=conv(3, 1), out=conv(8, 2))
    sparsifier = Sparsifier(model, 'filter', 'local', example=x, coupled=True)
    sparsifier.sparsify_model(50)
    assert sparsifier.selected.ties == [] and same(shrink(model, x, verbose=False), model, x)


class Twins(nn.Module):
    "Have filters of which two are the same, so that one makes up for the other."

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 3)
        with torch.no_grad():
            self.a.weight[2:] = self.a.weight[:2]
            self.a.bias[2:] = self.a.bias[:2]

    def forward(self, x): return self.b(self.a(x).relu())


def without_two():
    dense, x = Twins(), torch.randn(64, 6)
    model = deepcopy(dense)
    with torch.no_grad():
        model.a.weight[2:] = 0
        model.a.bias[2:] = 0
    return dense, model, x


def test_data_make_up_for_what_is_cut_out(capsys):
    dense, model, x = without_two()
    before = deepcopy(model.state_dict())
    small = shrink(model, x[:2], data=x, dense=dense)
    assert small.a.weight.shape == (2, 6)
    torch.testing.assert_close(small.b.weight, dense.b.weight[:, :2] + dense.b.weight[:, 2:], atol=.05, rtol=0)
    torch.testing.assert_close(small(x), dense(x), atol=.05, rtol=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert 'before the repair' in capsys.readouterr().out


def test_a_repair_needs_both_the_data_and_the_network_before():
    dense, model, x = without_two()
    with pytest.raises(ValueError, match='dense: got None, expected the network before it was pruned'):
        shrink(model, x, data=x)
    with pytest.raises(ValueError, match='data: got None, expected batches'): shrink(model, x, dense=dense)
    with pytest.raises(ValueError, match="dense: 'a.weight' has shape None"): shrink(model, x, data=x, dense=nn.Linear(6, 3))
