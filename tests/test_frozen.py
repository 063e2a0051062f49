"Layers that something has frozen: the schedule waits for what the Learner froze, and leaves others alone."
import warnings
from copy import deepcopy

import pytest
import torch
from conftest import convnet
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.optimizer import SGD, Adam
from fastai.vision.gan import FixedGANSwitcher, GANLearner
from torch import nn
from torch.utils.data import TensorDataset

from fasterai.callback import SparsifyCallback
from fasterai.keep import KeepSparse
from fasterai.schedule import gradual, one_shot
from fasterai.sparsifier import Sparsifier


def zeros(model): return sum(int((p == 0).sum()) for n, p in model.named_parameters() if p.ndim > 1)


def frozen(module): return module.requires_grad_(False)


class Distill(nn.Module):
    "A student and the teacher that it learns from."
    def __init__(self):
        super().__init__()
        self.student, self.teacher = convnet(), frozen(convnet())

    def forward(self, x):
        self.taught = self.teacher(x)
        return self.student(x)


class Momentum(nn.Module):
    "An online network, and a target that is its moving average, as in BYOL and MoCo."
    def __init__(self):
        super().__init__()
        self.online = convnet()
        self.target = frozen(deepcopy(self.online))

    def forward(self, x):
        with torch.no_grad():
            for slow, fast in zip(self.target.parameters(), self.online.parameters()): slow.lerp_(fast, .1)
        return self.online(x)


class Adapted(nn.Module):
    "A frozen base with an adapter beside it."
    def __init__(self):
        super().__init__()
        self.base, self.adapter = frozen(nn.Linear(64, 10)), nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 10))

    def forward(self, x): return self.base(x.flatten(1)) + self.adapter(x.flatten(1))


def fixed_stem():
    model = convnet()
    frozen(model[0])
    return model


MODELS = {  # model, where it learns, what is named
    'teacher': (Distill, 'student', "'teacher.0', 'teacher.3', 'teacher.8' are frozen"),
    'momentum': (Momentum, 'online', "'target.0', 'target.3', 'target.8' are frozen"),
    'adapter': (Adapted, 'adapter', "'base' is frozen"),
    'fixed convolution': (fixed_stem, None, "'0' is frozen"),
}


def learning(model): return [p for p in model.parameters() if p.ndim > 1 and p.requires_grad]
def share(parameters): return round(100 * sum(int((p == 0).sum()) for p in parameters) / sum(p.numel() for p in parameters))


def all_parameters(model): return list(model.parameters())


@pytest.mark.parametrize('splitter', [None, all_parameters])
@pytest.mark.parametrize('criteria', ['magnitude', 'gradient'])
@pytest.mark.parametrize('name', MODELS)
def test_what_learns_reaches_the_target_and_the_rest_is_named_first(make_learner, capsys, name, criteria, splitter):
    make, _, named = MODELS[name]
    learn = make_learner(make(), **({} if splitter is None else {'splitter': splitter}))
    learn.logger = print
    still = [p for p in learn.model.parameters() if p.ndim > 1 and not p.requires_grad]
    learn.fit(3, cbs=SparsifyCallback(80, criteria=criteria))
    lines = capsys.readouterr().out.splitlines()
    assert share(learning(learn.model)) == 80 and (name == 'momentum' or share(still) == 0)
    assert named in lines[0] and not any('unfreeze' in line for line in lines)
    assert 'asked 80 %, reached' in lines[-1] and 'waits' not in lines[-1]


@pytest.mark.parametrize('name', MODELS)
def test_a_plain_sparsifier_leaves_them_alone_too(name):
    model = MODELS[name][0]()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    sparsifier = Sparsifier(model)
    sparsifier.sparsify_model(80)
    assert share(learning(model)) == 80
    still = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert still and all(torch.equal(model.state_dict()[n], before[n]) for n in still)
    reasons = [why for layer, why in sparsifier.skipped.items() if f'{layer}.weight' in still]
    assert set(reasons) == {'is frozen, so it is left alone: name it in layers= to include it'}
    assert 'is frozen' in str(sparsifier.report())


def test_one_that_is_named_is_pruned():
    model = fixed_stem()
    Sparsifier(model, layers=['0', '3']).sparsify_model(50)
    assert 0 < int((model[0].weight == 0).sum())
    Sparsifier(model, layers=model[0]).sparsify_model(90)
    assert int((model[0].weight == 0).sum()) == 49


def test_where_nothing_learns_it_is_an_error_at_the_start(make_learner):
    learn = make_learner(opt_func=SGD)
    learn.create_opt()
    frozen(learn.model)
    with pytest.raises(ValueError, match="layers: got only layers that are frozen, '0', '3', '8'; expected at least one that learns"):
        learn.fit(1, cbs=SparsifyCallback(80))
    with pytest.raises(ValueError, match='layers: got only layers that are frozen'): Sparsifier(frozen(convnet())).sparsify_model(80)
    with pytest.raises(ValueError, match='layers: got only layers that are frozen'): Sparsifier(frozen(convnet())).report()


def test_a_layer_that_learns_later_takes_part_from_then_on():
    model = fixed_stem()
    sparsifier = Sparsifier(model)
    sparsifier.sparsify_model(80)
    assert zeros(model[0]) == 0
    model[0].requires_grad_()
    sparsifier.sparsify_model(80)
    assert sparsifier.report().zeros == round(.8 * 566)
    model[0].requires_grad_(False)
    sparsifier.sparsify_model(90)
    assert sparsifier.report().zeros == round(.9 * 566)


def parts(model): return [list(model[:3].parameters()), list(model[3:].parameters())]


def test_a_layer_frozen_in_a_learner_that_freezes_others(make_learner, capsys):
    learn = make_learner(splitter=lambda model: [list(model.student[:3].parameters()), list(model.student[3:].parameters())], model=Distill())
    learn.logger = print
    learn.fine_tune(3, cbs=SparsifyCallback(80))
    out = capsys.readouterr().out
    assert zeros(learn.model.student) == round(.8 * 566)
    assert zeros(learn.model.teacher) == 0 and out.count("'teacher.0'") == 2


def test_coupled_with_a_frozen_one_is_left_alone():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(12, 2)
            frozen(self.b)

        def forward(self, x): return self.head(torch.cat([self.a(x) + self.b(x), self.c(x)], 1))
    model = Sum()
    sparsifier = Sparsifier(model, 'filter', coupled=True, example=torch.randn(2, 4))
    sparsifier.sparsify_model(50)
    assert [zeros(model.a), zeros(model.b), zeros(model.c)] == [0, 0, 12]


# Halves that learn in turn

class Turns(Callback):
    "Freezes one half of the model at a time."
    def __init__(self, *halves, every=1): self.halves, self.every = halves, every

    def before_batch(self):
        if not self.training: return
        turn = self.train_iter // self.every % 2
        for i, half in enumerate(self.halves): half.requires_grad_(i == turn)


@pytest.mark.parametrize('schedule', [gradual(0, .5), one_shot(at=0), one_shot(at=1)], ids=repr)
@pytest.mark.parametrize('criteria', ['magnitude', 'gradient'])
@pytest.mark.parametrize('context', ['local', 'global'])
@pytest.mark.parametrize('every', [1, 3])
def test_halves_that_learn_in_turn(make_learner, schedule, criteria, context, every):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))
    learn = make_learner(model)
    learn.create_opt()
    frozen(model[1])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(4, cbs=[SparsifyCallback(80, context=context, criteria=criteria, schedule=schedule), Turns(model[1], model[3], every=every)])
    assert share([model[1].weight, model[3].weight]) == 80
    if context == 'local': assert share([model[1].weight]) == share([model[3].weight]) == 80


@pytest.mark.parametrize('gen_first', [False, True])
@pytest.mark.parametrize('schedule', [gradual(), one_shot(at=0)], ids=repr)
def test_a_gan_reaches_its_target_in_both_halves(capsys, tmp_path, schedule, gen_first):
    data = TensorDataset(torch.randn(64, 4), torch.randn(64, 8))
    dls = DataLoaders.from_dsets(data, data, bs=8, num_workers=0, device='cpu')
    generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))
    critic = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    learn = GANLearner.wgan(dls, generator, critic, opt_func=Adam, switcher=FixedGANSwitcher(n_crit=2, n_gen=1), path=tmp_path, gen_first=gen_first)
    learn.remove_cb(learn.progress)
    for _ in range(2):
        learn.fit(3, 1e-3, wd=0., cbs=SparsifyCallback(50, context='local', schedule=schedule))
        assert [share([net[i].weight]) for net in (generator, critic) for i in (0, 2)] == [50] * 4
        assert 'unfreeze' not in capsys.readouterr().out
    learn.fit(2, 1e-3, wd=0.)
    assert [share([net[i].weight]) for net in (generator, critic) for i in (0, 2)] == [50] * 4


def test_keep_sparse_keeps_frozen_layers(make_learner):
    model = convnet()
    with torch.no_grad(): model[3].weight[:4] = 0
    frozen(model)
    frozen(model[8]).requires_grad_()
    learn = make_learner(model)
    learn.fit(1, cbs=KeepSparse())
    assert zeros(model[3]) == 4 * 54


def gan(tmp_path, **more):
    data = TensorDataset(torch.randn(64, 4), torch.randn(64, 8))
    dls = DataLoaders.from_dsets(data, data, bs=8, num_workers=0, device='cpu')
    generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))
    critic = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    learn = GANLearner.wgan(dls, generator, critic, opt_func=Adam, switcher=FixedGANSwitcher(n_crit=2, n_gen=1), path=tmp_path, **more)
    learn.logger = print
    return learn, generator, critic


def test_one_half_of_a_gan_alone_and_the_lines_of_a_gan(tmp_path, capsys):
    for layers in ('generator', 'generator.*', None):
        learn, generator, critic = gan(tmp_path)
        learn.remove_cb(learn.progress)
        learn.fit(3, 1e-3, wd=0., cbs=SparsifyCallback(50, layers=generator if layers is None else layers))
        assert share([generator[0].weight, generator[2].weight]) == 50 and zeros(critic) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('sparsity')]
        assert len(lines) == 1 and 'asked 50 %, reached 50.00 %' in lines[0]
    learn, generator, critic = gan(tmp_path)
    learn.remove_cb(learn.progress)
    learn.fit(3, 1e-3, wd=0., cbs=SparsifyCallback({'generator.*': 50, 'critic.*': 25}))
    assert 'asked 39.29 %, reached 39.29 %' in capsys.readouterr().out


def test_a_layer_that_thaws_in_the_fit_is_counted_in_what_is_asked(make_learner, capsys):
    class Thaw(Callback):
        def before_epoch(self):
            if self.epoch == 1: self.learn.model[0].requires_grad_(True)
    learn, callback = make_learner(fixed_stem(), splitter=all_parameters), SparsifyCallback(75)
    learn.logger = print
    learn.fit(3, cbs=[callback, Thaw()])
    assert 'asked 75 %, reached 74.91 %' in capsys.readouterr().out.splitlines()[-1]
    assert [line.get_label() for line in callback.plot_sparsity().lines] == ['3', '8', '0']


def test_a_frozen_layer_that_is_named_is_pruned_and_can_be_masked():
    model = fixed_stem()
    sparsifier = Sparsifier(model)
    sparsifier.masks['0'] = torch.zeros(6, 1, 3, 3, dtype=torch.bool)
    assert zeros(model[0]) == 54 and not sparsifier.masks['0'].any()
    for prune in (lambda s: s.sparsify_layer('0', 50), lambda s: s.sparsify_model({'0': 50, '3': 10})):
        model = fixed_stem()
        prune(Sparsifier(model))
        assert zeros(model[0]) == 27


def test_looking_does_not_change_what_is_pruned():
    for look in (False, True):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        sparsifier = Sparsifier(model)
        if look: sparsifier.report()
        frozen(model[0])
        sparsifier.sparsify_model(50)
        assert sparsifier.report().zeros == 16 and '0' not in sparsifier.skipped
