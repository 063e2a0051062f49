import pickle
from copy import deepcopy

import pytest
import torch
from conftest import convnet, new_learner
from fastai.callback.core import Callback
from fastai.callback.schedule import SchedCos
from fastai.data.core import DataLoaders
from torch import nn

from fasterai.callback import SparsifyCallback
from fasterai.data import read_data
from fasterai.repair import Repaired, divergence
from fasterai.schedule import Ramp, dense_sparse_dense, epochs, gradual, iterative, linear, one_shot, steps
from fasterai.sparsifier import Sparsifier
from fasterai.summary import repaired_line


class Watch(Callback):
    "Notes the measured sparsity after every step."
    order = 90

    def before_fit(self): self.seen = []

    def after_step(self):
        weights = [m.weight for m in self.model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        self.seen.append(sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights))


def fit(learn, epochs=2, cbs=(), **kwargs):
    watch = Watch()
    learn.fit(epochs, cbs=[*cbs, watch], **kwargs)
    return [round(100 * s) for s in watch.seen]


def test_an_event_happens_where_the_schedule_changes(make_learner):
    assert fit(make_learner(), cbs=[SparsifyCallback(80, schedule=one_shot(at=.5))]) == [0] * 4 + [80] * 4
    assert fit(make_learner(), cbs=[SparsifyCallback(80, schedule=iterative(0, 1, n_steps=2))]) == [40] * 4 + [80] * 4
    assert fit(make_learner(), cbs=[SparsifyCallback(80, schedule=linear(0, 1))]) == [10, 20, 30, 40, 50, 60, 70, 80]
    assert fit(make_learner(), cbs=[SparsifyCallback(80, schedule=one_shot(at=1))]) == [0] * 7 + [80]
    assert fit(make_learner(), cbs=[SparsifyCallback(80, schedule='dense_sparse_dense')]) == [0, 0, 80, 80, 80, 80, 0, 0]


@pytest.mark.parametrize('batches, epochs', [(1, 1), (1, 3), (3, 1), (5, 2)])
@pytest.mark.parametrize('schedule', ['gradual', 'one_shot', one_shot(at=1), SchedCos(0, 1), lambda p: p ** 2])
def test_the_target_is_reached_whatever_the_number_of_batches(make_learner, batches, epochs, schedule):
    assert fit(make_learner(batches=batches), epochs, [SparsifyCallback(90, schedule=schedule)])[-1] == 90


@pytest.mark.parametrize('how', ['fit', 'fit_one_cycle', 'fine_tune'])
def test_given_to_one_fit_or_to_the_learner(make_learner, how):
    for learn, cbs in ((make_learner(), [SparsifyCallback(90)]), (make_learner(cbs=SparsifyCallback(90)), [])):
        getattr(learn, how)(2, cbs=cbs)
        callback = cbs[0] if cbs else learn.sparsify
        assert callback.sparsifier.report().zeros == round(.9 * 566)
        assert [m.name for m in learn.metrics] == ['accuracy']


def test_gradients_are_there_when_they_are_asked_for(make_learner):
    def seen(weight, grad):
        assert grad.abs().sum() > 0
        return (weight * grad).abs()
    assert fit(make_learner(), cbs=[SparsifyCallback(90, criteria=seen)])[-1] == 90


def test_by_layer(make_learner):
    learn = make_learner()
    callback = SparsifyCallback({'3': 50, '8': 90})
    learn.fit(1, cbs=callback)
    assert [(r.layer, r.zeros) for r in callback.sparsifier.report().rows] == [('3', 216), ('8', 72)]


def test_frozen_layers_wait(make_learner, capsys):
    learn = make_learner(splitter=lambda m: [list(m[:3].parameters()), list(m[3:].parameters())])
    learn.logger = print
    learn.freeze()
    assert fit(learn, cbs=[SparsifyCallback(90)])[-1] == 0
    assert "waits while 1 of 3 selected layers are frozen ('0' first); fine_tune unfreezes them" in capsys.readouterr().out
    callback = SparsifyCallback(90)
    learn.fine_tune(2, freeze_epochs=1, cbs=callback)
    assert callback.sparsifier.report().zeros == 509


def test_filter_granularity_takes_its_example_from_the_loop(make_learner):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = convnet()

        def forward(self, x): return self.net(x) if x.shape[0] > 0 and x.sum() < 1e9 else x
    learn, callback = make_learner(Branch()), SparsifyCallback(50, 'filter', 'local')
    learn.fit(1, cbs=callback)
    assert [(r.layer, r.dead, r.groups) for r in callback.sparsifier.report().rows] == [('net.0', 3, 6), ('net.3', 4, 8)]
    assert (learn.model.net[1].bias == 0).sum() == 3 and "makes the network's output" in callback.sparsifier.skipped['net.8']


class TakesList(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = convnet()

    def forward(self, pictures): return self.net(torch.cat([picture[None] for picture in pictures]))


class TakesDict(TakesList):
    def forward(self, batch): return super().forward(list(batch['pictures']))


@pytest.mark.parametrize('model, as_batch', [
    (TakesList, lambda x, y: (list(x), y)),
    (TakesDict, lambda x, y: ({'pictures': x}, y)),
    (TakesDict, lambda x, y: [{'pictures': x}, y])], ids=['list', 'dict', 'batches are lists'])
def test_a_batch_may_hold_a_list_or_a_dict(tmp_path, model, as_batch):
    x, y = torch.randn(16, 1, 8, 8), torch.randint(10, (16,))
    batches = [as_batch(x[i:i + 8], y[i:i + 8]) for i in (0, 8)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)
    learn = new_learner(tmp_path, model())
    learn.dls = DataLoaders(loader, loader)
    callback = SparsifyCallback(50, 'filter', 'local')
    learn.fit(1, cbs=callback)
    assert [(r.layer, r.dead) for r in callback.sparsifier.report().rows] == [('net.0', 3), ('net.3', 4)]


def test_the_table_shows_what_is_measured(make_learner):
    learn, callback = make_learner(), SparsifyCallback(80, schedule=linear(0, 1))
    learn.fit(4, cbs=callback)
    column = list(learn.recorder.metric_names).index('sparsity') - 1
    assert [round(v[column]) for v in learn.recorder.values] == [20, 40, 60, 80]
    assert learn.recorder.values[-1][column] == callback.sparsifier.report().sparsity


def test_the_end_says_what_was_reached(make_learner, capsys):
    learn = make_learner()
    learn.logger = print
    learn.fit(2, cbs=SparsifyCallback(90))
    assert capsys.readouterr().out.splitlines()[-1] == 'sparsity: asked 90 %, reached 89.93 % (509 of 566 weights)'
    learn.fit(1, cbs=SparsifyCallback({'3': 95}))
    assert capsys.readouterr().out.splitlines()[-1].startswith('sparsity: asked 95 %, reached ')
    with learn.no_logging(): learn.fit(1, cbs=SparsifyCallback(95))
    assert capsys.readouterr().out == ''


def test_lr_find_and_validate_are_left_alone(make_learner, capsys):
    learn = make_learner(cbs=SparsifyCallback(90, schedule=one_shot(at=0)))
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    learn.lr_find(num_it=6, show_plot=False)
    assert len(learn.validate()) == 2 and len(learn.get_preds()) == 2
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items()) and capsys.readouterr().out == ''
    assert fit(learn)[-1] == 90


def test_an_exception_leaves_nothing_behind(make_learner):
    class Boom(Callback):
        def after_batch(self):
            if self.iter == 2: raise KeyboardInterrupt
    learn, callback = make_learner(), SparsifyCallback(90)
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=[callback, Boom()])
    assert [m.name for m in learn.metrics] == ['accuracy'] and len(learn.validate()) == 2
    assert fit(learn, cbs=[callback])[-1] == 90


@pytest.mark.parametrize('arguments, error, says', [
    (dict(sparsity=.9), ValueError, 'write 90 for 90 %'), (dict(sparsity='90'), TypeError, "sparsity: got '90'"),
    (dict(sparsity={}), ValueError, 'sparsity: got an empty dict'), (dict(sparsity=90, granularity=5), TypeError, 'granularity: got 5'),
    (dict(sparsity={'3': 200}), ValueError, 'sparsity: got 200'), (dict(sparsity=True), TypeError, 'sparsity: got True'),
    (dict(sparsity=90, granularity='weigth'), ValueError, "did you mean 'weight'"),
    (dict(sparsity=90, context='loca'), ValueError, "did you mean 'local'"),
    (dict(sparsity=90, context=lambda parts: parts), TypeError, 'context: got <lambda>, expected a function of layers and fraction'),
    (dict(sparsity=90, criteria='grad'), ValueError, "criteria: got 'grad'"),
    (dict(sparsity=90, schedule='gradul'), ValueError, "did you mean 'gradual'"),
    (dict(sparsity=90, schedule=lambda p: 2 * p), ValueError, 'expected 0 to 1')])
def test_what_needs_no_model_is_refused_when_built(arguments, error, says):
    with pytest.raises(error, match=says): SparsifyCallback(**arguments)


@pytest.mark.parametrize('arguments, says', [
    (dict(sparsity=90, layers='conv9'), "layers: got 'conv9'"), (dict(sparsity={'conv9': 50}), "sparsity: got 'conv9'"),
    (dict(sparsity={'0': 50}, layers='3'), "sparsity: got '0', which means only '0', and that is not chosen by layers="),
    (dict(sparsity=90, granularity=('I', 'kh')), "granularity: got axis 'kh'"),
    (dict(sparsity=90, layers=nn.LSTM), 'means none of the layers here')])
def test_what_needs_the_model_is_refused_before_the_first_batch(make_learner, arguments, says):
    learn = make_learner()
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    with pytest.raises(ValueError, match=says): learn.fit(1, cbs=SparsifyCallback(**arguments))
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
    assert [m.name for m in learn.metrics] == ['accuracy']


def test_what_needs_the_data_flow_is_refused_at_the_first_batch(make_learner):
    learn = make_learner()
    with pytest.raises(ValueError, match=r"sparsity: got '8\*', which means only '8', and that makes the network's output"):
        learn.fit(1, cbs=SparsifyCallback({'0': 50, '8*': 30}, 'filter', schedule=one_shot(at=1)))
    assert learn.iter == 0 and [m.name for m in learn.metrics] == ['accuracy']


def test_a_name_or_an_object(make_learner):
    for schedule in ('gradual', gradual, gradual(start=.1, end=.75)):
        assert SparsifyCallback(90, schedule=schedule).schedule == gradual(.1, .75)


def test_what_one_sees_of_a_callback():
    assert repr(SparsifyCallback(90)) == 'SparsifyCallback(sparsity=90, schedule=gradual(start=0.1, end=0.75))'
    with pytest.raises(ValueError, match='plot_sparsity: there is nothing to draw before'): SparsifyCallback(90).plot_sparsity()
    with pytest.raises(ValueError, match='sparsifier: there is none before the first fit'): SparsifyCallback(90).sparsifier


def test_rounding_to_groups_is_no_earlier_zero(make_learner, capsys):
    learn = make_learner()
    learn.logger = print
    fit(learn, cbs=[SparsifyCallback(65, "filter", "local", layers="0")])
    assert "zeros that are there" not in capsys.readouterr().out


def test_why_more_is_zero_than_was_asked_for(make_learner, capsys):
    learn = make_learner()
    learn.logger = print
    fit(learn, cbs=[SparsifyCallback(90)])
    assert 'zeros that are there' not in capsys.readouterr().out
    fit(learn, cbs=[SparsifyCallback(50)])
    assert 'asked 50 %, reached 89.93 % (509 of 566 weights); zeros that are there stay, and count' in capsys.readouterr().out


# Schedules in steps and epochs

PERCENTS = [  # zeros after each step, 2 epochs of 4 steps
    (80, one_shot(at=steps(3)), [0, 0, 0, 80, 80, 80, 80, 80]),
    (80, one_shot(at=epochs(1.5)), [0, 0, 0, 0, 0, 0, 80, 80]),
    (80, dense_sparse_dense(start=epochs(1), end=steps(6)), [0, 0, 0, 0, 80, 80, 0, 0]),
    (80, linear(start=steps(2), end=epochs(1.5)), [0, 0, 20, 40, 60, 80, 80, 80]),
    (80, linear(0, 1, every=steps(2)), [0, 20, 20, 40, 40, 60, 60, 80]),
    (80, linear(steps(1), steps(6), every=steps(5)), [0, 0, 0, 0, 0, 80, 80, 80]),
    (90, linear(start=steps(2), end=steps(6), initial=50), [0, 0, 60, 70, 80, 90, 90, 90]),
    (90, linear(start=steps(2), end=steps(8), every=steps(3), initial=50), [0, 0, 50, 50, 70, 70, 70, 90]),
    (90, gradual(start=epochs(1), end=epochs(2), every=steps(4), initial=50), [0, 0, 0, 0, 50, 50, 50, 90]),
    (50, linear(start=steps(2), end=steps(6), initial=50), [0, 0, 50, 50, 50, 50, 50, 50]),
    (90, iterative(start=0, end=1, n_steps=2, initial=50), [70, 70, 70, 70, 90, 90, 90, 90]),
]


@pytest.mark.parametrize('sparsity, schedule, percents', PERCENTS, ids=lambda value: repr(value) if isinstance(value, Ramp) else '')
def test_zeros_after_each_step(make_learner, sparsity, schedule, percents):
    callback = SparsifyCallback(sparsity, schedule=schedule)
    assert fit(make_learner(), cbs=[callback]) == percents
    assert callback.schedule is schedule


class Count(Callback):
    "Notes the steps, from 1 on, that begin with other masks than the one before."
    order = SparsifyCallback.order + .05  # right after it

    def before_fit(self): self.changes, self.step, self.left = [], 0, None

    def before_step(self):
        self.step += 1
        masks = self.learn.sparsify.sparsifier.masks
        left = sum(masks.left(name) for name in ('0', '3', '8'))
        if self.left not in (None, left) or self.left is None and left < 566: self.changes.append(self.step)
        self.left = left


@pytest.mark.parametrize('at', [.5, steps(20), epochs(2)])
def test_one_shot_leaves_so_many_steps_dense(make_learner, at):
    "The event is made before step 21 is taken, so the weights that it leaves are sparse."
    count = Count()
    seen = fit(make_learner(batches=10), 4, [SparsifyCallback(80, schedule=one_shot(at=at)), count])
    assert seen == [0] * 20 + [80] * 20 and count.changes == [21]


def test_events_come_only_each_so_many_steps(make_learner):
    count = Count()
    fit(make_learner(), 10, [SparsifyCallback(80, schedule=gradual(start=epochs(2), end=epochs(8), every=steps(6), initial=50)), count])
    assert count.changes == [9, 14, 20, 26, 32]


def test_a_second_fit_resolves_anew(make_learner):
    learn, callback = make_learner(), SparsifyCallback(80, schedule=one_shot(at=epochs(1)))
    assert fit(learn, 2, [callback]) == [0] * 4 + [80] * 4
    learn = make_learner(batches=2)
    assert fit(learn, 3, [callback]) == [0] * 2 + [80] * 4
    assert repr(callback) == 'SparsifyCallback(sparsity=80, schedule=one_shot(at=epochs(1)))'
    with pytest.raises(ValueError, match=r'schedule: got at=steps\(9\), expected at most the 6 steps of this fit'):
        learn.fit(3, cbs=SparsifyCallback(80, schedule=one_shot(at=steps(9))))


def test_a_resumed_fit_keeps_the_epochs_of_the_whole(make_learner):
    schedule = linear(start=epochs(2), end=epochs(4))
    assert fit(make_learner(), 4, [SparsifyCallback(80, schedule=schedule)], start_epoch=3) == [50, 60, 70, 80]


def test_fine_tune_runs_the_schedule_over_its_second_fit(make_learner):
    learn = make_learner(splitter=lambda m: [list(m[:3].parameters()), list(m[3:].parameters())])
    seen, watch = [], Watch()
    watch.after_fit = lambda: seen.extend(round(100 * s) for s in watch.seen)
    learn.fine_tune(3, freeze_epochs=1, cbs=[SparsifyCallback(80, schedule=one_shot(at=epochs(2))), watch])
    assert seen == [0] * 4 + [0] * 8 + [80] * 4
    with pytest.raises(ValueError, match=r'got at=epochs\(4\), expected at most the 3 epochs of this fit'):
        learn.fine_tune(3, freeze_epochs=1, cbs=SparsifyCallback(80, schedule=one_shot(at=epochs(4))))


def test_steps_are_those_of_the_loop(make_learner):
    "Another callback may change the batches when the fit begins, as distributed training does."
    class Larger(Callback):
        order = 50

        def before_fit(self): self.learn.dls.loaders[0] = self.learn.dls.train.new(bs=16)
    assert fit(make_learner(), cbs=[SparsifyCallback(80, schedule=one_shot(at=steps(3))), Larger()]) == [0, 0, 0, 80]


def test_epochs_are_compared_from_the_final_sparsity_on(make_learner):
    class Note(Callback):
        order = 90

        def before_fit(self): self.seen = []
        def after_epoch(self): self.seen.append(self.learn.sparsify.compared)
    note = Note()
    make_learner().fit(4, cbs=[SparsifyCallback(80, schedule=linear(epochs(1), epochs(3), every=epochs(1), initial=50)), note])
    assert note.seen == [False, False, True, True]


def test_a_fit_of_no_epochs_passes(make_learner):
    assert fit(make_learner(), 0, [SparsifyCallback(80, schedule=one_shot(at=epochs(1)))]) == []


def test_times_that_do_not_fit_are_refused_before_the_first_batch(make_learner):
    learn = make_learner()
    with pytest.raises(ValueError, match=r'schedule: got end=epochs\(8\), expected at most the 5 epochs of this fit'):
        learn.fit(5, cbs=SparsifyCallback(90, schedule=gradual(end=epochs(8))))
    assert not hasattr(learn, 'iter') and [m.name for m in learn.metrics] == ['accuracy']
    assert fit(learn, 1) == [0] * 4


def test_an_initial_sparsity_above_the_target_is_refused(make_learner):
    schedule = gradual(initial=50)
    for sparsity, says in ((40, 'got initial=50, expected at most the sparsity 40'), ({'0': 90, '3': 33.3}, 'at most the sparsity 33.3')):
        with pytest.raises(ValueError, match=f'schedule: .*{says}'): SparsifyCallback(sparsity, schedule=schedule)
    callback = SparsifyCallback(90, schedule=schedule)
    callback.sparsity = 40
    with pytest.raises(ValueError, match='schedule: got initial=50, expected at most the sparsity 40'): make_learner().fit(1, cbs=callback)


def test_each_layer_goes_from_the_initial_sparsity_to_its_own(make_learner):
    class Layers(Watch):
        def after_step(self): self.seen.append([int((self.model[i].weight == 0).sum()) for i in (3, 8)])
    learn, watch = make_learner(), Layers()
    learn.fit(1, cbs=[SparsifyCallback({'3': 50, '8': 90}, schedule=linear(0, 1, every=steps(2), initial=25)), watch])
    assert watch.seen == [[108, 20], [162, 46], [162, 46], [216, 72]]  # of 432 and 80: 25 %, half the way, the target


def test_a_pattern_with_an_initial_sparsity(make_learner):
    learn, watch = make_learner(), Watch()
    watch.after_step = lambda: watch.seen.append(int((learn.model[3].weight == 0).sum()))
    learn.fit(1, cbs=[SparsifyCallback(50, context='2:4', layers='3', schedule=linear(0, 1, every=steps(2), initial=25)), watch])
    assert watch.seen[0] == 108 and watch.seen[-1] == 216 and watch.seen == sorted(watch.seen)


def test_a_schedule_of_ones_own_may_take_the_initial_sparsity_back(make_learner):
    "What comes back regrows, though the share has not fallen."
    class until_half(Ramp):
        def climb(self, passed): return 0.
        def begins_with(self, progress): return 50 * (progress <= .5)
    assert fit(make_learner(), cbs=[SparsifyCallback(80, schedule=until_half(0, 1))])[:6] == [50] * 4 + [0] * 2


def test_a_callback_with_times_can_be_copied(make_learner):
    callback = SparsifyCallback(90, schedule=gradual(start=epochs(1), end=steps(8), every=steps(2), initial=50))
    for copied in (deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert repr(copied) == repr(callback) and fit(make_learner(), cbs=[copied])[3:] == [0, 50, 85, 85, 90]


@pytest.mark.parametrize('schedule', ['gradual', one_shot(at=epochs(1)), gradual(every=steps(2), initial=50)], ids=repr)
@pytest.mark.parametrize('granularity', ['weight', 'filter'])
def test_a_fit_without_a_batch_to_train_on_passes(make_learner, capsys, schedule, granularity):
    learn = make_learner()
    learn.dls.loaders[0] = learn.dls.train.new(bs=64, drop_last=True)  # more than the 32 rows
    learn.logger = print
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    learn.fit(2, cbs=SparsifyCallback(90, granularity, schedule=schedule))
    end = capsys.readouterr().out.splitlines()[-1]
    assert 'reached 0.00 %' in end and end.endswith('there was no batch to train on')
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
    assert [m.name for m in learn.metrics] == ['accuracy'] and len(learn.validate()) == 2


# Repairing

class States(Callback):
    "Notes what the network and the optimizer hold right before and after each event, and the random numbers."
    def __init__(self, order): self.order, self.seen = order, []

    def before_step(self):
        state = [v.detach().clone() for v in self.learn.model.state_dict().values()]
        moments = [v.clone() for p in self.learn.opt.all_params() for v in p[3].values() if isinstance(v, torch.Tensor)]
        self.seen.append((state, moments, torch.get_rng_state(), [m.training for m in self.learn.model.modules()]))


def around(): return States(SparsifyCallback.order - .01), States(SparsifyCallback.order + .01)


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def fitted(learn, epochs=8):
    "A Learner whose BatchNorm has seen something."
    learn.fit(epochs, 1e-2)
    return learn


@pytest.mark.parametrize('repair', ['refit', 'batchnorm', ['refit', 'batchnorm']], ids=str)
@pytest.mark.parametrize('granularity, context', [('weight', 'global'), ('filter', 'local')])
def test_the_last_event_is_repaired_and_only_that(make_learner, repair, granularity, context):
    found = []
    for given in (None, repair):
        learn, (before, after) = fitted(make_learner()), around()
        callback = SparsifyCallback(60, granularity, context, schedule=iterative(0, 1, n_steps=2), repair=given)
        learn.fit(2, 1e-3, cbs=[callback, before, after])
        assert all(torch.equal(b[2], a[2]) and b[3] == a[3] for b, a in zip(before.seen, after.seen))
        found.append((learn, callback, after.seen))
    (_, cut, plain), (learn, callback, seen) = found
    equal = [same(a[0], b[0]) for a, b in zip(plain, seen)]
    assert equal == [True] * 4 + [False] * 4  # the second of two events is made before the fifth step
    assert same(plain[4][1], seen[4][1])  # the optimizer's state of weights that a repair moves is left alone
    for name, keep in callback.sparsifier.masks.items(): assert torch.equal(keep, cut.sparsifier.masks[name])
    assert callback.sparsifier.report().zeros == cut.sparsifier.report().zeros > 0
    assert any(one.kept for one in callback.driver.repaired) and cut.driver.repaired == ()


def test_a_repaired_network_comes_nearer_to_the_one_before_the_event(make_learner, capsys):
    learn = fitted(make_learner())
    learn.logger = print
    before, after = around()
    callback = SparsifyCallback(60, schedule=one_shot(at=1), repair=('refit', 'batchnorm'))
    learn.fit(1, 1e-3, cbs=[callback, before, after])
    dense, model = convnet(), convnet()
    dense.load_state_dict(dict(zip(dense.state_dict(), before.seen[-1][0])))
    model.load_state_dict(dict(zip(model.state_dict(), after.seen[-1][0])))
    cut = deepcopy(dense)
    Sparsifier(cut).sparsify_model(60)
    x = read_data(learn.dls.valid, cut)
    assert divergence(model.eval(), dense.eval(), x) < .7 * divergence(cut.eval(), dense, x)
    first, last = callback.driver.repaired
    repaired, reached = capsys.readouterr().out.splitlines()[-2:]
    assert repaired.startswith('sparsity: repaired with refit') and f', divergence {first.before:.2g} -> {last.after:.2g}' in repaired
    assert reached.startswith('sparsity: asked 60 %, reached')


@pytest.mark.parametrize('names, found, says', [
    (['refit'], (), ''), ([], (), ''),
    (['refit', 'batchnorm'], (Repaired(.41, .1, True), Repaired(.1, .08, True)), 'repaired with refit and batchnorm, divergence 0.41 -> 0.08'),
    (['refit', 'batchnorm'], (Repaired(.41, .08, True), Repaired(.08, .08, False)),
     'repaired with refit, divergence 0.41 -> 0.08; batchnorm brought the outputs no nearer, so not kept'),
    (['refit'], (Repaired(.41, .41, False),), 'not repaired: refit brought the outputs no nearer, so not kept, divergence 0.41'),
    (['refit'], (Repaired(0., 0., False),), ''), (['mine'], (None,), 'repaired with mine')])
def test_what_is_said_of_a_repair(names, found, says): assert repaired_line(names, found) == says


def test_nothing_is_said_where_no_event_was_repaired(make_learner, capsys):
    learn = make_learner()
    learn.logger = print
    learn.fit(1, cbs=SparsifyCallback(50, schedule='dense_sparse_dense', repair='refit'))
    learn.fit(1, cbs=SparsifyCallback(50, schedule=lambda p: .5 * p, repair='refit', layers='3'))
    out = capsys.readouterr().out
    assert out.count('repaired') == 1 and 'reached' in out


def test_an_event_in_which_weights_come_back_is_not_repaired(make_learner):
    calls = []
    for schedule in ('dense_sparse_dense', 'one_shot'):
        make_learner().fit(1, cbs=SparsifyCallback(50, schedule=schedule, repair=lambda *_: calls.append(0)))
        assert len(calls) == (schedule == 'one_shot')


def test_a_repair_that_fails_leaves_all_as_before_the_event(make_learner):
    def broken(model, dense, data):
        for tensor in (*model.parameters(), *model.buffers()): tensor.data.add_(1)
        raise RuntimeError('broken')
    learn, (before, _) = fitted(make_learner()), around()
    callback = SparsifyCallback(60, 'filter', 'local', schedule=one_shot(at=.5), repair=['refit', broken])
    with pytest.raises(RuntimeError, match='broken'): learn.fit(1, cbs=[callback, before])
    assert len(before.seen) == 3 and same(before.seen[-1][0], learn.model.state_dict().values())
    assert not any((~keep).any() for keep in callback.sparsifier.masks.values())
    assert not callback.sparsifier.repairs and callback.sparsifier.repairs.dense is None


@pytest.mark.parametrize('arguments, error, says', [
    (dict(repair='refitt'), ValueError, "repair: got 'refitt'.*did you mean 'refit'"), (dict(repair=7), TypeError, 'repair: got 7'),
    (dict(repair='refit', data=7), TypeError, 'data: got int, expected batches: a DataLoader'),
    (dict(repair='refit', data='train'), TypeError, 'data: got str, expected batches')])
def test_repairs_that_are_none_are_refused_when_built(arguments, error, says):
    with pytest.raises(error, match=says): SparsifyCallback(50, **arguments)


def test_data_of_ones_own(make_learner):
    learn, seen = fitted(make_learner()), []
    def noting(model, dense, data): seen.append([tuple(args[0].shape) for args, in data])
    x = torch.randn(12, 1, 8, 8)
    callback = SparsifyCallback(50, schedule='one_shot', repair=noting, data=(part for part in x.split(4)))
    for _ in range(2): learn.fit(1, cbs=callback)
    learn.fit(1, cbs=SparsifyCallback(60, schedule='one_shot', repair=noting, data=learn.dls))
    learn.fit(1, cbs=SparsifyCallback(70, schedule='one_shot', repair=noting))
    assert seen == [[(4, 1, 8, 8)] * 3] * 2 + [[(8, 1, 8, 8)] * 4] * 2
    assert 'repair=' in repr(callback) and pickle.loads(pickle.dumps(SparsifyCallback(50, repair='refit'))).repair == 'refit'
