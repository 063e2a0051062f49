"The zeros stay: every way people train with fastai, a row each."
import pickle
from copy import deepcopy

import pytest
import torch
from conftest import convnet
from fastai.callback.core import Callback, CancelFitException, CancelValidException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import *  # noqa: F403, the fit_… methods of Learner
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders, Datasets
from fastai.learner import load_learner
from fastai.optimizer import SGD, Adam, Lamb, Lookahead, OptimWrapper, QHAdam, RAdam, RMSProp, ranger
from torch import nn
from torch.amp import GradScaler, autocast

from fasterai.callback import SparsifyCallback
from fasterai.keep import KeepSparse
from fasterai.schedule import gradual, linear, one_shot
from fasterai.sparsifier import Sparsifier

WEIGHTS = 566  # of convnet


def zeros(model): return sum(int((m.weight == 0).sum()) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))


def wanted(sparsity): return round(WEIGHTS * sparsity / 100)


class Each(Callback):
    "Calls a function with the Learner after each step, last of all, and keeps what it returns."
    order = 99

    def __init__(self, look): self.look, self.seen = look, []

    def after_step(self): self.seen.append(self.look(self.learn))


def parts(model): return [list(model[:3].parameters()), list(model[3:].parameters())]


# Ways to fit

@pytest.mark.parametrize('batches', [1, 3])
@pytest.mark.parametrize('schedule', ['gradual', 'one_cycle', one_shot(at=1), linear(0, 1)], ids=repr)
@pytest.mark.parametrize('how', [
    lambda learn, cb: learn.fit(1, cbs=cb), lambda learn, cb: learn.fit_one_cycle(2, cbs=cb), lambda learn, cb: learn.fit_flat_cos(2, cbs=cb),
    lambda learn, cb: learn.fine_tune(1, cbs=cb), lambda learn, cb: learn.fit_sgdr(2, 1, cbs=cb)], ids='fit one_cycle flat_cos fine_tune sgdr'.split())
def test_every_fit_reaches_the_target(make_learner, how, schedule, batches):
    learn = make_learner(batches=batches)
    how(learn, SparsifyCallback(90, schedule=schedule))
    assert zeros(learn.model) == wanted(90)


def test_fine_tune_prunes_only_once_thawed(make_learner):
    learn, look = make_learner(splitter=parts), Each(lambda learn: zeros(learn.model))
    learn.add_cb(look)
    learn.fine_tune(5, freeze_epochs=2, cbs=SparsifyCallback(90, schedule=linear(0, 1)))
    assert look.seen == [0] * 8 + [round(WEIGHTS * .9 * i / 20) for i in range(1, 21)]


def test_layers_that_never_thaw_are_said(make_learner, capsys):
    learn = make_learner(splitter=parts)
    learn.logger = print
    learn.freeze()
    learn.fit(1, cbs=SparsifyCallback(90))
    assert zeros(learn.model) == 0 and 'waits while 1 of 3 selected layers are frozen' in capsys.readouterr().out


@pytest.mark.parametrize('again', ['the same', 'a new one'])
def test_a_second_fit_goes_on_from_there(make_learner, again):
    learn, callback = make_learner(), SparsifyCallback(60, schedule=linear(0, 1))
    learn.fit(1, cbs=callback)
    if again == 'the same': callback.sparsity = 90
    else: callback = SparsifyCallback(90, schedule=linear(0, 1))
    look = Each(lambda learn: zeros(learn.model))
    learn.fit(1, cbs=[callback, look])
    assert look.seen == [max(wanted(60), round(WEIGHTS * .9 * i / 4)) for i in range(1, 5)]


@pytest.mark.parametrize('granularity', ['weight', 'filter'])
@pytest.mark.parametrize('attached', [False, True])
def test_a_plain_fit_keeps_the_zeros_until_they_are_let_go(make_learner, granularity, attached):
    learn, callback = make_learner(), SparsifyCallback(60, granularity, 'local')
    if attached: learn.add_cb(callback)
    learn.fit(1, cbs=None if attached else callback)
    if attached: learn.remove_cb(callback)
    before, norms = zeros(learn.model), int((learn.model[4].bias == 0).sum())
    look = Each(lambda learn: (zeros(learn.model), int((learn.model[4].bias == 0).sum())))
    learn.fit_one_cycle(2, .1, cbs=look)
    assert set(look.seen) == {(before, norms)} and before > 0 and (norms > 0) == (granularity == 'filter')
    learn.remove_cb(KeepSparse)
    with torch.no_grad(): learn.model[3].weight += 1  # a dead filter has no gradient and would not move by itself
    learn.fit(1, .1)
    assert zeros(learn.model) < before and (learn.model[3].weight != 0).all()


def test_fits_do_not_pile_up_keepers(make_learner):
    learn = make_learner()
    for _ in range(3): learn.fit(1, cbs=SparsifyCallback(60))
    assert len(learn._grab_cbs(KeepSparse)) == 1


def test_a_keeper_does_not_miss_a_layer_that_was_replaced(make_learner):
    learn = make_learner()
    learn.fit(1, cbs=SparsifyCallback(60))
    learn.model[8] = nn.Linear(8, 10)
    learn.create_opt()
    before = int((learn.model[3].weight == 0).sum())
    with pytest.warns(UserWarning, match="masks: '8' was replaced, and (\\d+) of \\1 masked weights are not zero"): learn.fit(1)
    assert (learn.model[3].weight == 0).sum() == before and (learn.model[8].weight != 0).all()


def test_a_keeper_does_not_hold_back_regrowth(make_learner):
    learn = make_learner()
    learn.fit(1, cbs=SparsifyCallback(60))
    learn.fit(1, .1, cbs=SparsifyCallback(80, schedule='dense_sparse_dense'))
    assert zeros(learn.model) == 0


@pytest.mark.parametrize('target', [10, 30, 80])
def test_a_model_that_comes_in_sparse_keeps_its_zeros(make_learner, target):
    model = convnet()
    with torch.no_grad():
        for m in (model[0], model[3]): m.weight[torch.rand_like(m.weight) < .5] = 0
    there = {i: model[i].weight == 0 for i in (0, 3)}
    before = zeros(model)
    learn = make_learner(model)
    learn.fit(2, .1, cbs=[SparsifyCallback(target, keep_zeros=True), look := Each(lambda learn: all((learn.model[i].weight[z] == 0).all() for i, z in there.items()))])
    assert all(look.seen) and zeros(learn.model) == max(before, wanted(target))


# Files

@pytest.mark.parametrize('with_opt', [False, True])
def test_files_are_those_of_the_dense_model(make_learner, tmp_path, with_opt):
    dense, learn = make_learner(), make_learner()
    dense.fit(2, cbs=SaveModelCallback(every_epoch=True, fname='dense', with_opt=with_opt))
    learn.fit(2, cbs=[SparsifyCallback(90), SaveModelCallback(every_epoch=True, fname='sparse', with_opt=with_opt)])
    files = [tmp_path / 'models' / f'{n}.pth' for n in ('dense_0', 'dense_1', 'sparse_0', 'sparse_1')]
    states = [torch.load(f, weights_only=False) for f in files]
    assert all(list(s.get('model', s)) == list(learn.model.state_dict()) for s in states)
    assert max(f.stat().st_size for f in files) - min(f.stat().st_size for f in files) < 200  # the archive repeats its own name
    fresh = make_learner()
    fresh.load('sparse_1', strict=True)
    assert zeros(fresh.model) == zeros(learn.model) == wanted(90)


@pytest.mark.parametrize('keeper', [lambda: KeepSparse(), lambda: SparsifyCallback(10, keep_zeros=True)])
def test_a_fresh_learner_keeps_what_it_loads(make_learner, keeper):
    learn = make_learner()
    learn.fit(1, cbs=SparsifyCallback(90))
    learn.save('sparse')
    fresh = make_learner()
    fresh.load('sparse')
    fresh.fit(2, .1, cbs=keeper())
    assert zeros(fresh.model) == wanted(90)


# Callbacks that compare epochs

class Fake(Callback):
    "Dictates the validation loss of each epoch."
    order = 55

    def __init__(self, *losses): self.losses = losses

    def after_epoch(self): self.recorder.values[-1][1] = self.losses[self.epoch]


def test_the_best_model_is_a_sparse_one(make_learner, capsys):
    learn = make_learner()
    learn.fit(6, cbs=[SparsifyCallback(90, schedule=one_shot(at=.5)), Fake(.1, .2, .9, .8, .3, .7), SaveModelCallback()])
    assert zeros(learn.model) == wanted(90) and 'epoch 4' in capsys.readouterr().out.splitlines()[-1]


def test_training_does_not_stop_before_the_target(make_learner, capsys):
    learn = make_learner()
    learn.fit(8, cbs=[SparsifyCallback(90, schedule=one_shot(at=.5)), Fake(.1, .2, .3, .4, .5, .6, .7, .8), EarlyStoppingCallback(patience=2)])
    assert len(learn.recorder.values) == 7  # best at epoch 5, the first at the target, then two without gain
    assert zeros(learn.model) == wanted(90)


def test_the_learning_rate_waits_too(make_learner, capsys):
    learn = make_learner()
    learn.fit(5, 1., cbs=[SparsifyCallback(90, schedule=one_shot(at=.6)), Fake(.1, .2, .3, .4, .5), ReduceLROnPlateau(patience=1)])
    assert learn.opt.hypers[-1]['lr'] == pytest.approx(.1)  # the fourth epoch is the first at the target, the fifth no better


@pytest.mark.parametrize('order', [0, 90])
@pytest.mark.parametrize('saver', [dict(), dict(at_end=True), dict(every_epoch=True)], ids=str)
def test_a_fit_that_breaks_off_early_restores_nothing_dense(make_learner, tmp_path, saver, order):
    class Stop(Callback):
        def after_epoch(self):
            if self.epoch == 1: raise CancelFitException
    Stop.order = order
    learn, saving = make_learner(), SaveModelCallback(**saver)
    learn.fit(4, cbs=[SparsifyCallback(90, schedule=linear(0, 1)), saving, Stop()])
    assert zeros(learn.model) == wanted(45)
    assert sorted(f.stem for f in (tmp_path / 'models').glob('*')) == (
        ['model'] if saver.get('at_end') else ['model_0', 'model_1'][:1 + (order > 60)] if saver else [])
    assert saving.run


# Side effects

def test_looking_has_no_side_effect(make_learner, capsys, tmp_path):
    learn = make_learner(cbs=SparsifyCallback(90))
    learn.fit(1)
    with torch.no_grad(): learn.model[3].weight[:] = 1  # somebody's business
    before, n = {k: v.clone() for k, v in learn.model.state_dict().items()}, len(learn.cbs)
    assert len(learn.validate()) == 2 and len(learn.get_preds()) == 2
    capsys.readouterr()
    learn.lr_find(num_it=5, show_plot=False)
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
    assert capsys.readouterr().out == '' and len(learn.cbs) == n and [m.name for m in learn.metrics] == ['accuracy']


@pytest.mark.parametrize('look', ['get_preds', 'validate'])
def test_looking_in_the_middle_of_a_fit_does_not_end_it(make_learner, look):
    class Peek(Callback):
        order = 70

        def after_epoch(self):
            if not self.learn.lock.locked(): getattr(self.learn, look)(dl=self.dls.valid)
    learn = make_learner()
    learn.fit(4, cbs=[SparsifyCallback(90), Peek()])
    assert zeros(learn.model) == wanted(90)
    learn.fit(2, .1, cbs=Peek())
    assert zeros(learn.model) == wanted(90)


def test_a_layer_that_was_emptied_stays_empty(make_learner):
    learn = make_learner()
    learn.fit(1, cbs=SparsifyCallback(100, layers='3'))
    learn.fit(1, .1)
    assert (learn.model[3].weight == 0).all()
    learn.fit(1, .1, cbs=SparsifyCallback(100, layers='3'))
    assert (learn.model[3].weight == 0).all()


def test_who_moves_weights_behind_us_is_overruled_by_the_end_of_the_epoch(make_learner):
    class Mover(Callback):
        order = 95

        def after_step(self):
            with torch.no_grad(): self.model[3].weight += 1
    learn = make_learner()
    learn.fit(1, cbs=[SparsifyCallback(90), Mover()])
    assert zeros(learn.model) == wanted(90)


def test_frozen_epochs_are_not_the_best_of_the_sparse_fit(make_learner, capsys):
    learn = make_learner(splitter=parts)
    learn.fine_tune(4, freeze_epochs=2, cbs=[SparsifyCallback(90, schedule=one_shot(at=.5)), Fake(.1, .1, .9, .9), SaveModelCallback(reset_on_fit=False)])
    assert zeros(learn.model) == wanted(90)


def test_a_keeper_skips_a_layer_that_was_parametrized(make_learner):
    learn = make_learner()
    learn.fit(1, cbs=SparsifyCallback(90))
    nn.utils.parametrizations.weight_norm(learn.model[3])
    learn.create_opt()
    before = int((learn.model[8].weight == 0).sum())
    learn.fit(1)
    assert (learn.model[8].weight == 0).sum() == before


def test_train_metrics_and_broken_epochs_keep_the_columns_in_place(make_learner):
    class Skip(Callback):
        def before_validate(self): raise CancelValidException
    learn = make_learner()
    learn.recorder.train_metrics = True
    learn.fit(1, cbs=SparsifyCallback(80))
    names, values = list(learn.recorder.metric_names)[1:-1], learn.recorder.values[-1]
    assert len(names) == len(values) and [round(v) for n, v in zip(names, values) if 'sparsity' in n] == [80, 80]
    learn.recorder.train_metrics = False
    learn.fit(1, cbs=[SparsifyCallback(80), Skip()])
    assert list(learn.recorder.metric_names)[1:-1] == ['train_loss', 'valid_loss', 'accuracy', 'sparsity']
    assert learn.recorder.values[-1][1:3] == [None, None] and round(learn.recorder.values[-1][3]) == 80


class Boom(Callback):
    "Raises at one event of the third batch."
    def __init__(self, event, error, order): self.event, self.error, self.order = event, error, order

    def __call__(self, event):
        if event == self.event and self.learn.training and self.learn.iter == 2: raise self.error('boom')


@pytest.mark.parametrize('attached', [False, True])
@pytest.mark.parametrize('event, order', [('after_batch', 0), ('after_pred', 0), ('before_step', 90), ('after_step', -90)])
@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError, CancelFitException])
def test_a_fit_that_breaks_leaves_the_zeros_and_nothing_else(make_learner, error, event, order, attached):
    callback = SparsifyCallback(90, schedule=one_shot(at=0))
    learn = make_learner(cbs=callback if attached else None)
    try: learn.fit(1, .1, cbs=[Boom(event, error, order)] + ([] if attached else [callback]))
    except (KeyboardInterrupt, RuntimeError): pass
    assert zeros(learn.model) == wanted(90)
    assert len(learn.validate()) == 2 and [m.name for m in learn.metrics] == ['accuracy']
    assert not any(m._forward_hooks or m._backward_hooks for m in learn.model.modules())
    learn.fit(1, .1)
    assert zeros(learn.model) == wanted(90) and len(learn.recorder.values[-1]) == 3 + attached


# Steps of other kinds

class HalfOnCPU(MixedPrecision):
    "fastai's mixed precision with a scaler that works without a GPU; the gradients of chosen batches overflow."
    def __init__(self, overflows=()):
        super().__init__()
        self.overflows = overflows

    def before_fit(self): self.autocast, self.learn.scaler, self.scales = autocast('cpu', torch.bfloat16), GradScaler('cpu', init_scale=1024.), []

    def after_backward(self):
        if self.train_iter in self.overflows: next(self.model.parameters()).grad.fill_(float('inf'))


@pytest.mark.parametrize('criteria', ['magnitude', 'gradient'])
@pytest.mark.parametrize('overflows, seen', [((), [25, 50, 75, 100]), ((0, 1), [0, 0, 75, 100]), ((1, 2), [25, 25, 25, 100])])
def test_overflowed_steps_postpone_the_event(make_learner, criteria, overflows, seen):
    learn, look = make_learner(batches=4), Each(lambda learn: zeros(learn.model))
    learn.fit(1, cbs=[SparsifyCallback(80, criteria=criteria, schedule=linear(0, 1)), HalfOnCPU(overflows=overflows), look])
    assert look.seen == [round(WEIGHTS * .8 * s / 100) for s in seen]


def test_an_overflow_at_the_very_end_is_made_up_for(make_learner, capsys):
    learn = make_learner(batches=4)
    learn.fit(1, cbs=[SparsifyCallback(80, schedule=one_shot(at=1)), HalfOnCPU(overflows=(3,))])
    assert zeros(learn.model) == wanted(80)
    learn = make_learner(batches=4)
    learn.logger = print
    learn.fit(1, cbs=[SparsifyCallback(80, criteria='gradient', schedule=one_shot(at=1)), HalfOnCPU(overflows=(3,))])
    assert zeros(learn.model) == wanted(80)  # by the gradients of the three steps before
    learn = make_learner(batches=4)
    learn.logger = print
    learn.fit(1, cbs=[SparsifyCallback(80, criteria='gradient', schedule=one_shot(at=1)), HalfOnCPU(overflows=(0, 1, 2, 3))])
    assert zeros(learn.model) == 0 and 'the last event failed: criteria: saliency is needed' in capsys.readouterr().out


def test_gradients_are_unscaled(make_learner):
    def seen(weight, grad):
        norms.append(float(grad.norm()))
        return (weight * grad).abs()
    found = []
    for cbs in ([], [HalfOnCPU()]):
        norms = []
        make_learner(batches=1).fit(1, cbs=[SparsifyCallback(80, criteria=seen, schedule=one_shot(at=1)), *cbs])
        found.append(norms)
    assert found[1] == pytest.approx(found[0], rel=.1)


@pytest.mark.filterwarnings('ignore:.*CUDA is not available', 'ignore:.*CUDA-enabled')
@pytest.mark.parametrize('mode', ['to_fp16', 'to_bf16'])
def test_fastai_precision_modes(make_learner, mode):
    learn = make_learner()
    getattr(learn, mode)()
    learn.fit(1, cbs=SparsifyCallback(80, criteria='gradient'))
    assert zeros(learn.model) == wanted(80)


@pytest.mark.parametrize('criteria', ['magnitude', 'gradient'])
@pytest.mark.parametrize('schedule', [linear(0, 1), one_shot(at=1)], ids=repr)
def test_accumulated_gradients(make_learner, criteria, schedule):
    learn, look = make_learner(batches=5, bs=8), Each(lambda learn: zeros(learn.model))
    learn.fit(2, cbs=[SparsifyCallback(80, criteria=criteria, schedule=schedule), GradientAccumulation(24), look])
    assert len(look.seen) == 3 and zeros(learn.model) == wanted(80)  # 10 batches, a step after each third


def test_mixup(make_learner):
    learn = make_learner()
    learn.fit(1, cbs=[SparsifyCallback(80, criteria='gradient'), MixUp()])
    assert zeros(learn.model) == wanted(80)


def test_dead_weights_do_not_enter_the_clipping_norm(make_learner):
    class Norm(Callback):
        order, seen = GradientClip.order - .1, []

        def before_step(self):
            self.seen.append([bool((m.weight.grad[m.weight == 0] == 0).all()) for m in self.model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))])
    learn = make_learner()
    learn.fit(1, cbs=[SparsifyCallback(80, schedule=one_shot(at=0)), Norm(), GradientClip(.1)])
    assert Norm.seen == [[True] * 3] * 4
    Norm.seen = []
    learn.fit(1, cbs=[Norm(), GradientClip(.1)])  # KeepSparse
    assert Norm.seen == [[True] * 3] * 4


# Optimisers

def wrapped(kind, **kw): return lambda params, lr: OptimWrapper(params, kind, lr=lr, **kw)


OPTIMIZERS = {
    'SGD': lambda p, lr: SGD(p, lr, mom=.9, wd=.1), 'SGD l2': lambda p, lr: SGD(p, lr, mom=.9, wd=.1, decouple_wd=False), 'Adam': Adam,
    'RAdam': RAdam, 'RMSProp': lambda p, lr: RMSProp(p, lr, mom=.9), 'Lamb': Lamb, 'QHAdam': QHAdam, 'ranger': ranger,
    'Lookahead': lambda p, lr: Lookahead(SGD(p, lr, mom=.9), k=3), 'torch SGD': wrapped(torch.optim.SGD, momentum=.9, weight_decay=.1, nesterov=True),
    'torch Adam': wrapped(torch.optim.Adam, amsgrad=True), 'torch AdamW': wrapped(torch.optim.AdamW), 'torch Adagrad': wrapped(torch.optim.Adagrad),
    'torch NAdam': wrapped(torch.optim.NAdam), 'torch Rprop': wrapped(torch.optim.Rprop),
}


def dead_memory(learn):
    "The largest thing that the optimiser remembers of a dead weight."
    opt, largest = learn.opt, 0.
    pairs = [(p, v) for p, s in getattr(opt, 'opt', opt).state.items() for k, v in s.items() if k not in ('step_size', 'prev')]
    pairs += [(p, s) for fast, slow in zip(opt.param_lists, getattr(opt, 'slow_weights', None) or []) for p, s in zip(fast, slow)]
    for p, v in pairs:
        if isinstance(v, torch.Tensor) and v.shape == p.shape and p.ndim > 1 and (p == 0).any(): largest = max(largest, float(v[p == 0].abs().max()))
    return largest


@pytest.mark.parametrize('name', OPTIMIZERS)
@pytest.mark.parametrize('granularity', ['weight', 'filter'])
def test_optimisers(make_learner, name, granularity):
    learn = make_learner(opt_func=OPTIMIZERS[name])
    learn.fit(1, .01)  # it has a memory when the pruning begins
    callback = SparsifyCallback(80, granularity, 'local', schedule=linear(0, 1))
    look = Each(lambda learn: (all(torch.equal(layer.weight == 0, ~callback.sparsifier.masks[n]) for n, layer in callback.sparsifier.layers.items()), dead_memory(learn)))
    learn.fit(3, .01, cbs=[callback, look])
    assert look.seen == [(True, 0.)] * 12 and zeros(learn.model) > 300
    before, look = zeros(learn.model), Each(lambda learn: (zeros(learn.model), dead_memory(learn)))
    learn.fit(2, .01, cbs=look)
    assert look.seen == [(before, 0.)] * 8


# Copies, files, other forms of the model

X, Y = torch.randn(32, 1, 8, 8), torch.randint(0, 10, (32,))


def image(i): return X[i]


def label(i): return Y[i]


def test_export(make_learner, tmp_path):
    dense, learn = make_learner(), make_learner(cbs=SparsifyCallback(90, 'filter', schedule=gradual(0, .5)))
    for one in (dense, learn): one.dls = Datasets(range(32), [[image], [label]]).dataloaders(bs=8, num_workers=0, device='cpu')
    dense.fit(1)
    learn.fit(1)
    dense.export('dense.pkl')
    learn.export('sparse.pkl')
    assert (tmp_path / 'sparse.pkl').stat().st_size < (tmp_path / 'dense.pkl').stat().st_size + 3000  # no masks: names of callbacks
    back = load_learner(tmp_path / 'sparse.pkl')
    assert zeros(back.model) == zeros(learn.model) > 0
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(back.model.eval()(x), learn.model.eval()(x))


def test_copies_and_pickles(make_learner):
    learn, callback = make_learner(), SparsifyCallback(90, 'filter', 'local')
    learn.fit(1, cbs=callback)
    for copied in (deepcopy(learn.model), pickle.loads(pickle.dumps(learn.model))): assert zeros(copied) == zeros(learn.model)
    for twin in (deepcopy(callback.sparsifier), pickle.loads(pickle.dumps(callback.sparsifier))):
        assert twin.report().zeros == callback.sparsifier.report().zeros
        twin.model[3].weight.data.fill_(1)
        twin.apply_masks()
        assert twin.report() == callback.sparsifier.report()
    assert pickle.loads(pickle.dumps(SparsifyCallback(90))).sparsity == 90


def test_compiled(make_learner):
    learn = make_learner(torch.compile(convnet(), backend='eager'))
    callback = SparsifyCallback(80, 'filter', 'local')
    learn.fit(1, cbs=callback)
    learn.fit(1)
    assert list(callback.sparsifier.layers) == ['0', '3']
    assert [(r.layer, r.dead) for r in callback.sparsifier.report().rows] == [('0', 5), ('3', 6)]


@pytest.mark.parametrize('change', [lambda m: m.half(), lambda m: m.double(), lambda m: m.to('cpu'), lambda m: m.to(memory_format=torch.channels_last),
                                    lambda m: m.to(torch.bfloat16)], ids='half double cpu channels_last bf16'.split())
def test_masks_follow_the_model(change):
    model = convnet()
    sparsifier = Sparsifier(model, 'filter', 'local')
    sparsifier.sparsify_model(50)
    before = sparsifier.report().zeros
    change(model)
    for p in model.parameters(): p.data.fill_(1)
    for b in (model[1].running_mean, model[4].running_mean): b.fill_(1)
    sparsifier.apply_masks()
    assert sparsifier.report().zeros == before and (model[4].running_mean == 0).sum() == (model[4].bias == 0).sum() == 4
    sparsifier.sparsify_model(75)
    assert sparsifier.report().zeros > before


def test_averaged_models(make_learner):
    learn, callback = make_learner(), SparsifyCallback(80)
    average = torch.optim.swa_utils.AveragedModel(learn.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(.9))
    learn.fit(2, cbs=[callback, Each(lambda learn: average.update_parameters(learn.model))])
    assert zeros(average.module) < wanted(80)  # the average remembers
    Sparsifier(average.module).load_state_dict(callback.sparsifier.state_dict())
    assert zeros(average.module) == wanted(80)


# Loggers

def test_loggers_get_the_measured_sparsity(make_learner, tmp_path):
    learn, callback = make_learner(), SparsifyCallback(80, schedule=linear(0, 1))
    learn.fit(4, cbs=[callback, CSVLogger()])
    lines = [line.split(',') for line in (tmp_path / 'history.csv').read_text().splitlines()]
    at = lines[0].index('sparsity')
    assert [round(float(line[at])) for line in lines[1:]] == [20, 40, 60, 80]
    assert [round(v[at - 1]) for v in learn.recorder.values] == [20, 40, 60, 80]
    assert [h['epoch'] for h in callback.history] == [0, 1, 2, 3] and set(callback.history[0]) == {'epoch', '0', '3', '8'}
    assert callback.history[-1]['3'] == callback.sparsifier.report().rows[1].sparsity
    ax = callback.plot_sparsity()
    assert [line.get_label() for line in ax.lines] == ['0', '3', '8'] and len(ax.lines[0].get_xdata()) == 4


def test_tensorboard(make_learner, tmp_path):
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = make_learner()
    learn.fit(4, cbs=[SparsifyCallback(80, schedule=linear(0, 1)), TensorBoardCallback(tmp_path / 'runs', trace_model=False, log_preds=False)])
    events = EventAccumulator(str(tmp_path / 'runs')).Reload()
    assert [round(e.value) for e in events.Scalars('sparsity')] == [20, 40, 60, 80]


def test_wandb_and_others_read_what_the_recorder_shows(make_learner):
    "They go through names and log like this, in after_epoch, right behind the Recorder."
    class Reader(Callback):
        order, seen = 51, []

        def after_epoch(self): self.seen.append(dict(zip(self.recorder.metric_names, self.recorder.log)))
    learn = make_learner()
    learn.fit(2, cbs=[SparsifyCallback(80, schedule=linear(0, 1)), Reader()])
    assert [round(s['sparsity']) for s in Reader.seen] == [40, 80] and 'time' in Reader.seen[0]


# More than one, parts, and layers of other kinds

def test_two_callbacks_on_different_layers(make_learner):
    learn = make_learner()
    one, two = SparsifyCallback(50, layers='3'), SparsifyCallback(75, 'filter', layers=learn.model[0])
    learn.fit(2, cbs=[one, two])
    assert list(learn.recorder.metric_names)[-3:-1] == ['sparsity', 'sparsity_2']
    counts = [int((learn.model[i].weight == 0).sum()) for i in (0, 3, 8)]
    assert counts[1:] == [216, 0] and counts[0] in (36, 45)
    learn.fit(1, .1)
    assert [int((learn.model[i].weight == 0).sum()) for i in (0, 3, 8)] == counts and [m.name for m in learn.metrics] == ['accuracy']


def test_a_part_of_the_model(make_learner):
    learn = make_learner(nn.Sequential(convnet()[:6], convnet()[6:]))
    learn.fit(1, cbs=SparsifyCallback(75, layers=learn.model[0]))
    assert zeros(learn.model[0]) == round(.75 * 486) and zeros(learn.model[1]) == 0


class PreActivation(nn.Module):
    "BatchNorm reads a sum: it is silent only where all that is added is."
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.conv = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.norm2, self.fc = nn.BatchNorm2d(4), nn.Linear(4, 10)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.conv(torch.relu(self.norm(x)))
        return self.fc(torch.relu(self.norm2(x)).mean((2, 3)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.fc = nn.Linear(64, 12), nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 10)
        self.b.weight = self.a.weight

    def forward(self, x): return self.fc(self.b(self.a(self.stem(x.flatten(1))).relu()).relu())


def head(*layers): return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


NETWORKS = {  # model; (layer, BatchNorm that reads it)
    'plain': (lambda: head(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)), [('0', '1')]),
    'without affine': (lambda: head(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8, affine=False)), [('0', '1')]),
    'dropout between': (lambda: head(nn.Conv2d(1, 8, 3), nn.Dropout2d(.5), nn.BatchNorm2d(8)), [('0', '2')]),
    'activation between': (lambda: head(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.BatchNorm2d(8)), [('0', '2')]),
    'grouped': (lambda: head(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8)), [('1', '2')]),
    'depthwise': (lambda: head(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)), [('0', '1'), ('2', '3')]),
    'transposed': (lambda: head(nn.ConvTranspose2d(1, 8, 3), nn.BatchNorm2d(8)), [('0', '1')]),
    'linear': (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10)), [('1', '2')]),
    'pre-activation': (PreActivation, [('stem', 'norm')]),
}


@pytest.mark.parametrize('name', NETWORKS)
def test_a_dead_filter_stays_dead_behind_its_norm(make_learner, name):
    make, pairs = NETWORKS[name]
    learn, callback = make_learner(make()), SparsifyCallback(50, 'filter', 'local', schedule=one_shot(at=.3))
    learn.fit(1, .1)  # statistics that are not zero
    learn.fit(2, .1, cbs=callback)
    learn.fit(1, .1)
    modules, out = dict(learn.model.named_modules()), {}
    for _, norm in pairs: modules[norm].register_forward_hook(lambda m, i, o, norm=norm: out.update({norm: o}))
    for training in (False, True):
        learn.model.train(training)(torch.randn(8, 1, 8, 8))
        for layer, norm in pairs:
            grouping = callback.sparsifier.layers[layer].grouping
            dead = grouping.count(modules[layer].weight != 0) == 0
            assert int(dead.sum()) == len(dead) // 2
            assert (out[norm][:, dead] == 0).all() and (out[norm][:, ~dead] != 0).any()


def test_a_norm_behind_a_sum_is_left_alone_where_something_lives(make_learner):
    learn, callback = make_learner(PreActivation()), SparsifyCallback(50, 'filter', 'local')
    learn.fit(2, cbs=callback)
    dead = {n: callback.sparsifier.masks[n].flatten(1).sum(1) == 0 for n in ('stem', 'conv')}
    assert torch.equal(learn.model.norm2.bias == 0, dead['stem'] & dead['conv'])


@pytest.mark.parametrize('granularity', ['weight', 'filter'])
def test_tied_weights(make_learner, granularity):
    learn, callback = make_learner(Tied()), SparsifyCallback(50, granularity, 'local')
    learn.fit(2, .1, cbs=callback)
    assert learn.model.a.weight is learn.model.b.weight and (learn.model.a.weight == 0).sum() == 72
    assert callback.sparsifier.skipped['b'] == "shares the weight of 'a'"


@pytest.mark.parametrize('norm', [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_computed_weights_are_left_out_and_refused_where_they_are_named(make_learner, norm):
    learn = make_learner(nn.Sequential(nn.Flatten(), norm(nn.Linear(64, 8)), nn.Linear(8, 10)))
    with pytest.raises(ValueError, match="the weight of '1' is not a parameter of its own but computed"): learn.fit(1, cbs=SparsifyCallback(50, layers='1'))
    callback = SparsifyCallback(50)
    learn.fit(1, cbs=callback)
    assert (learn.model[2].weight == 0).sum() == 40 and 'computed' in callback.sparsifier.skipped['1']


def test_a_loss_that_is_nan(make_learner):
    class Spoil(Callback):
        def after_loss(self):
            if self.training and self.iter == 2: self.learn.loss_grad = self.loss_grad * float('nan')
    learn = make_learner()
    learn.fit(1, .1, cbs=[SparsifyCallback(80, schedule=one_shot(at=0)), Spoil()])
    assert zeros(learn.model) == wanted(80) and learn.model[3].weight.isnan().any()


# Outside fastai

class Third(torch.optim.Optimizer):
    "An optimiser with a momentum of its own."
    def __init__(self, params, lr=.1): super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group['params']:
                velocity = self.state[p].setdefault('velocity', torch.ones_like(p))
                velocity.mul_(.9).add_(p.grad.sign())
                p.sub_(group['lr'] * velocity)


def test_an_optimiser_that_moves_weights_without_a_gradient(make_learner):
    learn, look = make_learner(opt_func=wrapped(Third)), Each(lambda learn: zeros(learn.model))
    learn.fit(1, .01, cbs=[SparsifyCallback(90, schedule=one_shot(at=0)), look])
    learn.fit(1, .01, cbs=look)
    assert look.seen == [wanted(90)] * 8


@pytest.mark.parametrize('kind', [lambda p: torch.optim.SGD(p, .1, momentum=.9, weight_decay=.1), torch.optim.AdamW, Third])
@pytest.mark.parametrize('granularity', ['weight', 'filter'])
def test_a_plain_loop(kind, granularity):
    model = convnet()
    optimizer, sparsifier = kind(model.parameters()), Sparsifier(model, granularity, 'local')

    def step():
        model(torch.randn(8, 1, 8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    step()
    sparsifier.attach(optimizer)
    for i in range(1, 9):
        sparsifier.sparsify_model(10 * i)
        step()
        before = sparsifier.report().zeros
        for name, layer in sparsifier.layers.items():
            mask = sparsifier.masks[name]
            assert torch.equal(layer.weight == 0, ~mask)
            for memory in optimizer.state[layer.weight].values():
                if getattr(memory, 'shape', None) == layer.weight.shape: assert (memory[~mask] == 0).all()
    sparsifier.detach()
    with torch.no_grad(): model[3].weight += 1
    step()
    assert sparsifier.report().zeros < before


def test_only_optimisers_with_hooks_can_be_attached():
    sparsifier = Sparsifier(convnet())
    for wrong in ({}, torch.optim.Adam):
        with pytest.raises(TypeError, match='optimizer: got .*, expected a torch.optim.Optimizer'): sparsifier.attach(wrong)
    with pytest.raises(ValueError, match='steps none of the selected weights'): sparsifier.attach(torch.optim.SGD(convnet().parameters(), .1))


# Repairing at the end of the schedule

BOTH = ('refit', 'batchnorm')


@pytest.mark.parametrize('how, cbs', [
    (lambda learn, cbs: learn.fit(2, cbs=cbs), list), (lambda learn, cbs: learn.fit_one_cycle(2, cbs=cbs), lambda: [GradientAccumulation(16)]),
    (lambda learn, cbs: learn.fit(1, cbs=cbs), lambda: [HalfOnCPU(overflows=(3,))]), (lambda learn, cbs: learn.fit(2, cbs=cbs), lambda: [HalfOnCPU(), MixUp()]),
    (lambda learn, cbs: learn.fine_tune(2, freeze_epochs=2, cbs=cbs), lambda: [GradientClip(), SaveModelCallback()])],
    ids=['fit', 'accumulation', 'overflow', 'half', 'fine_tune'])
@pytest.mark.parametrize('schedule', ['one_shot', linear(0, 1)], ids=['one_shot', 'linear'])
def test_the_last_event_is_repaired_in_every_fit(make_learner, how, cbs, schedule):
    learn, calls = make_learner(splitter=parts), []

    def note(model, dense, data): calls.append((zeros(model), zeros(dense)))
    learn.fit(4, 1e-2)
    callback = SparsifyCallback(80, schedule=schedule, repair=[*BOTH, note])
    how(learn, [callback, *cbs()])
    (after, before), = calls  # once
    assert before < after == zeros(learn.model) == wanted(80)
    assert any(one.kept for one in callback.driver.repaired[:2])


def test_layers_that_thaw_later_are_repaired_too(make_learner):
    learn = make_learner()
    learn.model[0].requires_grad_(False)
    class Thaw(Callback):
        order = -5

        def before_batch(self):
            if self.iter == 2: self.learn.model[0].requires_grad_(True)
    calls = []
    callback = SparsifyCallback(80, schedule=one_shot(at=0), repair=lambda *_: calls.append(0))
    learn.fit(1, cbs=[callback, Thaw()])
    assert len(calls) == 2 and zeros(learn.model) == wanted(80)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = convnet()

    def forward(self, x, shift): return self.net(x + shift[:, None, None, None])


def test_inputs_and_targets_of_several_tensors(make_learner):
    learn, x = make_learner(TwoInputs(), metrics=[]), torch.randn(32, 1, 8, 8)
    parts = Datasets(range(32), [[lambda i: x[i]], [lambda i: torch.tensor(i / 32)], [lambda i: i % 10], [lambda i: i % 3]], n_inp=2)
    learn.dls = parts.dataloaders(bs=8, num_workers=0, device='cpu')
    learn.loss_func = lambda out, one, other: nn.functional.cross_entropy(out, one) + nn.functional.cross_entropy(out, other)
    learn.fit(4, 1e-2)
    callback = SparsifyCallback(60, schedule='one_shot', repair=BOTH)
    learn.fit(1, cbs=callback)
    assert zeros(learn.model) == wanted(60) and any(one.kept for one in callback.driver.repaired)


def test_a_batch_that_is_a_dict(make_learner):
    class TakesDict(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = convnet()

        def forward(self, batch): return self.net(batch['pictures'])
    x, y = torch.randn(32, 1, 8, 8), torch.arange(32) % 10
    batches = [({'pictures': x[i:i + 8]}, y[i:i + 8]) for i in range(0, 32, 8)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)
    learn = make_learner(TakesDict())
    learn.dls = DataLoaders(loader, loader)
    learn.fit(4, 1e-2)
    callback = SparsifyCallback(60, schedule='one_shot', repair=BOTH)
    learn.fit(1, cbs=callback)
    assert zeros(learn.model) == wanted(60) and any(one.kept for one in callback.driver.repaired)


def test_a_callback_that_repairs_goes_along_with_a_copy(make_learner):
    learn = make_learner()
    callback = SparsifyCallback(60, schedule='one_shot', repair=BOTH)
    learn.fit(1, cbs=callback)
    learn.add_cb(callback)
    fresh = deepcopy(learn)
    fresh.fit(1)
    assert zeros(fresh.model) == wanted(60)


# ---- Criteria that read the training data

@pytest.mark.parametrize('criterion', ['wanda', 'ria', 'sparsegpt', 'alps', 'obd', 'obs', 'synflow', 'fpgm'])
@pytest.mark.parametrize('schedule', ['one_shot', 'gradual'])
def test_criteria_of_data_prune_in_a_fit(make_learner, criterion, schedule):
    learn = make_learner()
    cb = SparsifyCallback(60, criteria=criterion, schedule=schedule)
    learn.fit(2, cbs=cb)
    size = sum(layer.weight.numel() for layer in cb.sparsifier.layers.values())
    assert round(cb.sparsifier.sparsity * size / 100) == round(.6 * size)
    assert bool(cb.driver.repaired) == (criterion in ('sparsegpt', 'alps'))


def test_a_fit_goes_on_undisturbed_beside_its_evidence(make_learner):
    "Where evidence leaves no mark, a criterion of data that scores by size alone trains the same network as magnitude."
    def by_size(weight, input_norm): return weight.abs() + 0 * input_norm
    fits = []
    for criterion in ('magnitude', by_size):
        torch.manual_seed(0)
        learn = make_learner(nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.Dropout(), nn.ReLU(), nn.Linear(20, 10)))
        learn.fit(2, cbs=SparsifyCallback(60, criteria=criterion))
        fits.append([p.detach().clone() for p in learn.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*fits))
