"Masks follow names: whatever a user does with the model between, its zeros stay or what is lost is named."
import io
from copy import deepcopy

import pytest
import torch
from conftest import convnet, same, tensors_of
from fastai.callback.core import Callback
from fastai.callback.tracker import SaveModelCallback
from torch import nn
from torch.ao.quantization import fuse_modules, fuse_modules_qat, get_default_qat_qconfig, prepare_qat
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fasterai.callback import SparsifyCallback
from fasterai.keep import KeepSparse
from fasterai.schedule import one_shot
from fasterai.sparsifier import Sparsifier

pytestmark = pytest.mark.filterwarnings('ignore:.*torch.ao.quantization is deprecated', 'ignore:Please use quant_min')


def zeros(model): return sum(int((m.weight == 0).sum()) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))


def dead_norms(model): return [int((m.bias == 0).sum()) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


# What users do with the model of a Learner between two fits

def copied(model): return deepcopy(model)


def fresh(model):
    new = convnet()
    new.load_state_dict(model.state_dict())
    return new


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def assigned(model):
    new = convnet()
    new.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    for p in new.parameters(): p.requires_grad_()
    return new


def one_layer(model):
    model[3] = deepcopy(model[3])
    return model


def every_parameter(model):
    for m in model.modules():
        for name, p in m._parameters.items():
            if p is not None: setattr(m, name, nn.Parameter(p.detach().clone()))
    return model


def wrapped(model): return nn.Sequential(model, nn.Identity())
def wrapped_copy(model): return nn.Sequential(nn.Identity(), deepcopy(model))
def compiled(model): return torch.compile(model, backend='eager')
def parallel(model): return nn.DataParallel(deepcopy(model))
def traced(model): return torch.fx.symbolic_trace(model)
def double(model): return deepcopy(model).double().float()


def quantized(model):
    model.train()
    model.qconfig = get_default_qat_qconfig('qnnpack')
    return prepare_qat(model)


def fused(model):
    model.train()
    return fuse_modules_qat(model, [['0', '1', '2'], ['3', '4', '5']])


def fused_and_quantized(model): return quantized(fused(model))


CHANGES = [copied, fresh, saved, assigned, one_layer, every_parameter, wrapped, wrapped_copy, compiled, parallel, traced, double, quantized,
           fused, fused_and_quantized]


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('granularity', ['weight', 'filter'])
def test_later_fits_keep_the_zeros(make_learner, granularity, change):
    learn = make_learner()
    learn.fit(2, cbs=SparsifyCallback(75, granularity, 'local', layers=['0', '3', '8']))
    before = zeros(learn.model)
    learn.model = change(learn.model)
    learn.create_opt()
    assert zeros(learn.model) == before
    learn.fit(1, 1e-2)
    assert zeros(learn.model) == before
    learn.fit(1, 1e-2)
    assert zeros(learn.model) == before


@pytest.mark.parametrize('change', [copied, fresh, saved, one_layer, every_parameter, wrapped_copy, double])
def test_what_is_masked_along_follows_too(make_learner, change):
    learn = make_learner()
    learn.fit(2, cbs=SparsifyCallback(50, 'filter', 'local'))
    before = dead_norms(learn.model)
    learn.model = change(learn.model)
    learn.create_opt()
    learn.fit(2, 1e-2)
    assert dead_norms(learn.model) == before == [3, 4]


def test_a_model_of_other_weights_is_not_forced_into_old_masks(make_learner):
    learn = make_learner()
    learn.fit(2, cbs=SparsifyCallback(75))
    learn.model = convnet()
    learn.create_opt()
    with pytest.warns(UserWarning, match='masks: .* was replaced, and .* masked weights are not zero'): learn.fit(1)
    assert zeros(learn.model) == 0


def test_weights_that_are_rewound_get_the_masks(make_learner):
    learn = make_learner()
    first = deepcopy(learn.model.state_dict())
    learn.fit(2, cbs=SparsifyCallback(75))
    before = zeros(learn.model)
    learn.model.load_state_dict(first)
    learn.fit(1)
    assert zeros(learn.model) == before


def test_lost_layers_are_named_once(make_learner, recwarn):
    learn = make_learner()
    learn.fit(2, cbs=SparsifyCallback(75))
    learn.model = nn.Sequential(learn.model[:6], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10, bias=False), nn.Linear(10, 10))
    learn.model[3].weight.data = torch.randn(12, 8)
    learn.model[4] = nn.Linear(12, 10)
    learn.create_opt()
    recwarn.clear()
    for _ in range(2): learn.fit(1)
    said = [str(w.message) for w in recwarn if str(w.message).startswith('masks: ')]
    assert said == ["masks: '8' cannot be found in the model any more, under this name and with this shape: its zeros are not kept from now on"]
    assert zeros(learn.model[0]) > 300


# A Sparsifier outside fastai

def sparse(granularity='filter'):
    model = convnet()
    for i in (1, 4): nn.init.ones_(model[i].bias)
    sparsifier = Sparsifier(model, granularity, 'local', layers=['0', '3', '8'], example=torch.randn(2, 1, 8, 8))
    sparsifier.sparsify_model(50)
    return model, sparsifier


def in_place(model, new):
    for name, module in new.named_children(): setattr(model, name, module)


@pytest.mark.parametrize('change', [
    one_layer, every_parameter, lambda m: in_place(m, deepcopy(m)), lambda m: in_place(m, fresh(m)), lambda m: prepare_qat(m.train(), inplace=True),
    lambda m: fuse_modules_qat(m.train(), [['0', '1', '2'], ['3', '4', '5']], inplace=True),
    lambda m: prepare_qat(fuse_modules_qat(m.train(), [['0', '1', '2'], ['3', '4', '5']], inplace=True), inplace=True),
    lambda m: fuse_modules(m.eval(), [['0', '1', '2'], ['3', '4', '5']], inplace=True),
    lambda m: m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True)],
    ids='layer parameters copies fresh qat fused_for_qat fused_qat fused assign'.split())
@pytest.mark.parametrize('granularity', ['weight', 'filter'])
def test_a_sparsifier_follows_its_model(granularity, change):
    model, sparsifier = sparse(granularity)
    model.qconfig = get_default_qat_qconfig('qnnpack')
    before, norms = zeros(model), dead_norms(model)
    change(model)
    assert zeros(model) == before
    with torch.no_grad():
        for p in model.parameters(): p += 1
    sparsifier.apply_masks()
    assert zeros(model) == before == sparsifier.report().zeros
    if dead_norms(model): assert dead_norms(model) == norms
    sparsifier.sparsify_model(75)
    assert zeros(model) > before and sparsifier.report().zeros == zeros(model)


def test_equal_events_move_nothing_after_parameters_were_replaced():
    model, sparsifier = sparse()
    every_parameter(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    sparsifier.sparsify_model(50)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_layer_of_another_shape_is_lost_and_named():
    model, sparsifier = sparse('weight')
    model[8] = nn.Linear(8, 12)
    with pytest.warns(UserWarning, match="masks: '8' cannot be found"): sparsifier.apply_masks()
    assert list(sparsifier.layers) == ['0', '3'] and sparsifier.skipped['8'] == 'is no longer in the model as it was pruned'
    sparsifier.sparsify_model(75)
    assert (model[8].weight != 0).all()


def test_a_new_layer_in_the_place_of_a_pruned_one_gets_its_mask():
    model, sparsifier = sparse('weight')
    model[8] = nn.Linear(8, 10)
    assert sparsifier.report().zeros == zeros(model) == 243
    sparsifier.apply_masks()
    assert sparsifier.report().zeros == zeros(model) == 283


def test_an_event_that_fails_after_a_replacement_changes_nothing():
    model, sparsifier = sparse('weight')
    one_layer(model)
    model[0].weight.data[0] = float('nan')
    before = tensors_of(sparsifier)[1:]
    with pytest.raises(ValueError, match='NaN'): sparsifier.sparsify_model(75)
    assert same(before, tensors_of(sparsifier)[1:])


# Weights or a model that another callback puts in place at the end of a fit

class Average(Callback):
    "Averages the weights as known EMA and SWA callbacks do, and puts the average in place."
    def __init__(self, order, module=False, at='after_fit'): self.order, self.module, self.at = order, module, at

    def before_fit(self): self.average = AveragedModel(self.learn.model, multi_avg_fn=get_ema_multi_avg_fn(.9))

    def after_batch(self):
        if self.training: self.average.update_parameters(self.learn.model)

    def __call__(self, event):
        super().__call__(event)
        if event != self.at: return
        if self.module: self.learn.model = self.average.module
        else: self.learn.model.load_state_dict(self.average.module.state_dict())


@pytest.mark.parametrize('order', [-50, 11, 70, 10 ** 6])
@pytest.mark.parametrize('module', [False, True])
@pytest.mark.parametrize('granularity', ['weight', 'filter'])
def test_zeros_are_put_back_behind_all_callbacks(make_learner, capsys, order, module, granularity):
    learn = make_learner()
    learn.logger = print
    callback = SparsifyCallback(75, granularity, 'local', layers=['0', '3', '8'])
    learn.fit(3, cbs=[callback, Average(order, module)])
    line = [line for line in capsys.readouterr().out.splitlines() if line.startswith('sparsity: asked')]
    assert len(line) == 1 and f'({zeros(learn.model):,} of 566 weights)' in line[0]
    assert zeros(learn.model) == sum((~m).sum() for m in callback.sparsifier.masks.values()) >= 415
    before = zeros(learn.model)
    learn.create_opt()
    learn.fit(1)
    assert zeros(learn.model) == before
    learn.fit(1, cbs=Average(order, module))  # as the KeepSparse that stays does
    assert zeros(learn.model) == before


def test_the_best_epoch_is_counted_after_it_was_loaded(make_learner, capsys):
    learn = make_learner()
    learn.logger = print
    learn.fit(4, cbs=[SparsifyCallback(75, schedule=one_shot(at=.5)), SaveModelCallback()])
    assert 'reached 74.91 % (424 of 566 weights)' in capsys.readouterr().out.splitlines()[-1] and zeros(learn.model) == 424


def test_a_fit_leaves_only_the_keeper(make_learner):
    class Break(Callback):
        def after_step(self): raise KeyboardInterrupt
    learn = make_learner()
    before = list(learn.cbs)
    learn.fit(1, cbs=SparsifyCallback(75))
    assert [type(cb) for cb in learn.cbs if cb not in before] == [KeepSparse]
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=[SparsifyCallback(75), Break()])
    learn.fit(1)
    assert [type(cb) for cb in learn.cbs if cb not in before] == [KeepSparse]


# A model that is put in place in the middle of a fit

class Swap(Callback):
    "Replaces the model, or a layer of it, before one epoch."
    def __init__(self, change, epoch=1, order=0): self.change, self.at, self.order = change, epoch, order

    def before_epoch(self):
        if self.epoch != self.at: return
        self.learn.model = self.change(self.learn.model)
        self.learn.create_opt()


class Zeros(Callback):
    "Counts the zeros of the model that is there after each epoch."
    order = 80

    def __init__(self): self.seen = []

    def after_epoch(self): self.seen.append(zeros(self.learn.model))


@pytest.mark.parametrize('change', [copied, wrapped_copy, one_layer, double, AveragedModel], ids=lambda change: change.__name__)
@pytest.mark.parametrize('criteria', ['magnitude', 'gradient'])
def test_a_fit_goes_on_with_a_model_that_is_put_in_place(make_learner, capsys, change, criteria):
    learn, look, callback = make_learner(), Zeros(), SparsifyCallback(80, criteria=criteria)
    learn.logger = print
    learn.fit(4, .05, cbs=[callback, Swap(change), look])
    shown = [round(5.66 * sum(row[name] * size for name, size in (('0', 54), ('3', 432), ('8', 80))) / 566) for row in callback.history]
    assert look.seen == shown and look.seen[-1] == 453
    assert 'asked 80 %, reached 80.04 % (453 of 566 weights)' in capsys.readouterr().out.splitlines()[-1]
    assert len(callback.plot_sparsity().lines) == 3
    learn.fit(2, .05, cbs=[Swap(change), look := Zeros()])
    assert look.seen == [453, 453]


def test_a_layer_that_is_lost_in_the_middle_of_a_fit_is_named_and_the_others_go_on(make_learner):
    def widened(model):
        model[8] = nn.Linear(8, 12)
        return model
    learn = make_learner()
    with pytest.warns(UserWarning, match="masks: '8' cannot be found"): learn.fit(5, cbs=[SparsifyCallback(80), Swap(widened, 2)])
    assert zeros(learn.model) == round(.8 * 486) and (learn.model[8].weight != 0).all()
    model, sparsifier = sparse('weight')
    model[8] = nn.Identity()
    with pytest.warns(UserWarning, match="masks: '8' cannot be found"): sparsifier.sparsify_model(75)
    assert zeros(model) == round(.75 * 486)


def test_another_network_at_the_end_of_a_fit_is_left_alone(make_learner):
    class Other(Callback):
        def after_fit(self): self.learn.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    learn = make_learner()
    with pytest.warns(UserWarning, match='masks: .* cannot be found'): learn.fit(2, cbs=[SparsifyCallback(80), Other()])
    assert zeros(learn.model) == 0
    learn.create_opt()
    learn.fit(1)


def test_when_all_is_lost_training_goes_on():
    model = nn.Sequential(nn.Linear(8, 8))
    optimizer, sparsifier = torch.optim.SGD(model.parameters(), .1), Sparsifier(model)
    sparsifier.sparsify_model(50)
    sparsifier.attach(optimizer)
    model[0] = nn.Linear(8, 9)
    model(torch.randn(2, 8)).sum().backward()
    with pytest.warns(UserWarning, match="masks: '0' cannot be found"): optimizer.step()
    with pytest.raises(ValueError, match='layers: none of those that were selected is in the model any more'): sparsifier.sparsify_model(50)


# Names

def block(i, o): return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU())


def nested(): return nn.Sequential(block(1, 6), nn.Sequential(block(6, 6), block(6, 8)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


@pytest.mark.parametrize('wrap', [lambda m: nn.Sequential(nn.Identity(), deepcopy(m)), AveragedModel, lambda m: nn.ModuleList([deepcopy(m)])[0],
                                  lambda m: nn.Sequential(nn.Sequential(deepcopy(m)))], ids='second averaged same twice'.split())
def test_names_that_repeat_are_told_apart_by_what_they_begin_with(make_learner, wrap, recwarn):
    learn = make_learner(nested())
    learn.fit(2, cbs=SparsifyCallback(80))
    learn.model = wrap(learn.model)
    learn.create_opt()
    recwarn.clear()
    learn.fit(1, .05)
    assert zeros(learn.model) == 712 and not [w for w in recwarn if 'masks:' in str(w.message)]


@pytest.mark.parametrize('replaced', [nn.Identity, lambda: nn.Linear(8, 9)])
def test_the_mask_of_a_layer_that_is_gone_goes_to_no_other(replaced):
    model = nn.ModuleDict({'fc': nn.Linear(8, 8), 'aux': nn.ModuleDict({'fc': nn.Linear(8, 8)})})
    sparsifier = Sparsifier(model, layers=['fc'])
    sparsifier.sparsify_model(50)
    model['fc'] = replaced()
    with pytest.warns(UserWarning, match="masks: 'fc' cannot be found"): sparsifier.apply_masks()
    assert (model['aux']['fc'].weight != 0).all()


def test_a_layer_that_was_moved_is_found_at_its_new_place():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    sparsifier = Sparsifier(model)
    sparsifier.sparsify_model({'0': 80, '1': 20})
    model.insert(0, nn.Linear(6, 6))
    sparsifier.apply_masks()
    for name, child in list(deepcopy(model).named_children()): setattr(model, name, child)
    with torch.no_grad():
        for p in model.parameters(): p += 1
    sparsifier.apply_masks()
    assert [int((m.weight == 0).sum()) for m in model] == [0, 29, 7]


def test_a_layer_of_another_kind_is_not_taken_for_the_old_one():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    sparsifier = Sparsifier(model, 'filter', layers=list(model))
    sparsifier.sparsify_model(50)
    model[0] = nn.ConvTranspose2d(4, 4, 3)
    with pytest.warns(UserWarning, match="masks: '0' cannot be found"): sparsifier.apply_masks()


def test_shared_weights_that_come_apart_are_named():
    for i in (0, 1):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        model[1].weight = model[0].weight
        sparsifier = Sparsifier(model)
        sparsifier.sparsify_model(50)
        model[i] = deepcopy(model[i])
        with pytest.warns(UserWarning, match="masks: '1' cannot be found"): sparsifier.apply_masks()
        with torch.no_grad():
            for p in model.parameters(): p += 1
        sparsifier.apply_masks()
        assert (model[0].weight == 0).sum() == 32 and sparsifier.report().zeros == 32


def test_one_of_two_tied_layers_that_is_lost_leaves_the_other():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 3, 1)

        def forward(self, x): return self.head(self.a(x) + self.b(x))
    model = Sum()
    sparsifier = Sparsifier(model, 'filter', coupled=True, example=torch.randn(2, 2, 5, 5))
    sparsifier.sparsify_model(25)
    model.a = nn.Conv2d(2, 8, 5, padding=2)
    with pytest.warns(UserWarning, match="masks: 'a' cannot be found"): sparsifier.sparsify_model(50)
    assert list(sparsifier.layers) == ['b'] and sparsifier.report().zeros == 72


def test_the_data_flow_is_that_of_the_modules_that_are_there():
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1))
    sparsifier = Sparsifier(model, 'filter', example=lambda: torch.randn(2, 2, 5, 5))
    for i in (0, 2, 3): model[i] = deepcopy(model[i])
    sparsifier.sparsify_model(50)
    assert list(sparsifier.layers) == ['0', '2']


def test_a_bias_that_is_taken_away_is_no_matter():
    model, sparsifier = sparse()
    model[3].bias = None
    model[4].bias = None
    sparsifier.apply_masks()
    sparsifier.sparsify_model(75)


# Copies of a Learner

def test_a_copied_learner_holds_the_same_masks(make_learner):
    learn = make_learner()
    learn.model[3].weight.data[:, 3:] = 0  # free zeros, which are no masks
    learn.fit(2, .1, cbs=SparsifyCallback(40, schedule=one_shot(.5)))
    held = {name: mask.clone() for name, mask in learn.cbs[-1].held.masks.items()}
    for change in (copied, wrapped_copy, one_layer):
        twin = deepcopy(learn)
        twin.model = change(twin.model)
        twin.create_opt()
        twin.fit(2, .1)
        twin.fit(1, .1)
        assert zeros(twin.model) == sum(int((~mask).sum()) for mask in held.values()) == 226
    twin = deepcopy(learn)
    twin.fit(2, .1, cbs=SparsifyCallback(60, criteria='random', schedule=one_shot(.9)))
    assert zeros(twin.model) == round(.6 * 566) and all((twin.model[int(name)].weight[~mask] == 0).all() for name, mask in held.items())


def test_an_emptied_layer_is_empty_in_a_copy(make_learner):
    learn = make_learner()
    learn.fit(2, cbs=SparsifyCallback(100, layers='3'))
    twin = deepcopy(learn)
    twin.fit(1, .1)
    assert zeros(twin.model) == 432


# KeepSparse beside a callback that prunes

def test_what_a_keeper_of_the_user_holds_is_held_while_another_callback_prunes(make_learner):
    model = convnet()
    for i in (0, 3, 8): model[i].weight.data[torch.rand_like(model[i].weight) < .5] = 0
    there, before = {i: model[i].weight == 0 for i in (0, 3, 8)}, zeros(model)
    learn, seen = make_learner(model), []

    class Look(Callback):
        order = 99

        def after_step(self): seen.append(zeros(self.model))
    learn.fit(3, .1, cbs=[KeepSparse(), SparsifyCallback(60, criteria='random', schedule=one_shot(.8)), Look()])
    assert set(seen) == {before, round(.6 * 566)} and all((model[i].weight[at] == 0).all() for i, at in there.items())
    mask = torch.rand(8, 6, 3, 3) < .7
    learn = make_learner()
    learn.fit(2, .1, cbs=[KeepSparse(masks={'3': mask}), SparsifyCallback(60, criteria='random')])
    assert (learn.model[3].weight[~mask] == 0).all() and zeros(learn.model) == round(.6 * 566)


def test_letting_the_keeper_go_leaves_a_callback_that_prunes(make_learner):
    learn = make_learner(cbs=SparsifyCallback(60))
    learn.fit(1)
    learn.remove_cb(KeepSparse)
    assert [type(cb) for cb in learn.cbs][-1] is SparsifyCallback


def test_a_fit_that_does_not_begin_leaves_no_column(make_learner):
    learn = make_learner()
    with pytest.raises((AssertionError, IndexError)): learn.fit(1, cbs=[SparsifyCallback(80), SaveModelCallback(monitor='acuracy')])
    assert len(learn.validate()) == 2
    learn.fit(1)
    assert len(learn.recorder.values[-1]) == 3 and [m.name for m in learn.metrics] == ['accuracy']
