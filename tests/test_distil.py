import pickle
from copy import deepcopy

import pytest
import torch
from conftest import convnet, new_learner, zeros
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.rnn import ModelResetter, RNNCallback
from fastai.callback.schedule import SchedCos  # noqa: F401 (gives a Learner fine_tune)
from fastai.callback.training import GradientAccumulation
from fastai.losses import CrossEntropyLossFlat, MSELossFlat
from torch import nn
from torch.amp import GradScaler, autocast
from torch.nn import functional as F

from fasterai.callback import SparsifyCallback
from fasterai.distil import class_axis, distillation
from fasterai.schedule import one_shot

HALF = one_shot(at=.5)
SHARE = distillation(share=.5)


class Watch(Callback):
    "Keep what each training batch has before its backward: losses, output, inputs, labels and the teacher."
    order = 9

    def __init__(self, owner): self.owner, self.seen, self.steps = owner, [], []

    def before_backward(self):
        teacher = self.owner.distilling.teacher.network
        self.seen.append(dict(loss=self.loss.item(), used=self.learn.loss_grad.item(), output=getattr(self.pred, 'data', None), x=self.xb[0], y=self.yb[0],
                              teacher=None if teacher is None else {n: w.clone() for n, w in teacher.state_dict().items()}))

    def before_batch(self):
        if self.training: self.steps.append({n: w.clone() for n, w in self.model.state_dict().items()})


class Boom(Callback):
    "Break a fit off in its n-th step, with what may be anything."
    def __init__(self, n, error): self.n, self.error = n, error
    def after_step(self):
        if self.train_iter == self.n: raise self.error


class HalfOnCPU(MixedPrecision):
    def before_fit(self): self.autocast, self.learn.scaler, self.scales = autocast('cpu', torch.bfloat16), GradScaler('cpu', init_scale=1024.), []


def fit(learn, n=2, cbs=(), how='fit', distil=SHARE, **given):
    callback = SparsifyCallback(80, distil=distil, **{'schedule': HALF} | given)
    watch = Watch(callback)
    getattr(learn, how)(n, cbs=[callback, watch, *cbs])
    return callback, watch


@torch.no_grad()
def taught(batch):
    "What the teacher makes of a batch."
    teacher = convnet()
    teacher.load_state_dict(batch['teacher'])
    return teacher.eval()(batch['x'])


def by_hand(batch, share=.5, temperature=2.):
    "The loss that is used, in a formula of its own."
    z, p, y = taught(batch), batch['output'], batch['y']
    plain = F.cross_entropy(p, y)
    if F.cross_entropy(z, y) >= plain: return plain.item()
    soft, softer = F.softmax(z / temperature, 1), F.softmax(p / temperature, 1)
    return ((1 - share) * plain + share * temperature ** 2 * (soft * (soft / softer).log()).sum(1).mean()).item()


# The loss

@pytest.mark.parametrize('distil', [distillation(share=.5), distillation(share=1., temperature=1.), .9], ids=repr)
def test_the_loss_has_a_share_of_the_distance_where_the_teacher_is_better(make_learner, distil):
    callback, watch = fit(make_learner(batches=6), distil=distil)
    share, temperature = (.9, 2.) if distil == .9 else (distil.share, distil.temperature)
    assert [batch['teacher'] is None for batch in watch.seen] == [True] * 7 + [False] * 5  # the event comes with a step
    used = [batch['used'] for batch in watch.seen]
    assert used[7:] == pytest.approx([by_hand(batch, share, temperature) for batch in watch.seen[7:]], rel=1e-4)
    assert [batch['loss'] for batch in watch.seen] == pytest.approx([F.cross_entropy(batch['output'], batch['y']).item() for batch in watch.seen])
    n_other = sum(batch['loss'] != batch['used'] for batch in watch.seen)
    assert 0 < n_other == callback.distilling.teacher.n_lower < callback.distilling.teacher.n_batches == 5


def test_the_teacher_is_the_network_before_the_first_event_and_stays(make_learner):
    learn = make_learner()
    _, watch = fit(learn, 4, schedule='gradual')  # one event after the other
    teachers = [batch['teacher'] for batch in watch.seen if batch['teacher']]
    first = next(i for i, batch in enumerate(watch.seen) if batch['teacher'])
    assert len(teachers) > 10 and (teachers[0]['0.weight'] != 0).all()
    for name, value in watch.steps[first - 1].items():
        if 'running' not in name and 'num' not in name: assert torch.equal(teachers[0][name], value)  # before the step of the event
        assert all(torch.equal(one[name], teachers[0][name]) for one in teachers)


def test_accumulated_and_scaled(make_learner):
    _, watch = fit(make_learner(batches=6), cbs=[GradientAccumulation(16)])
    heard = [batch for batch in watch.seen if batch['teacher']]
    assert [batch['used'] for batch in heard] == pytest.approx([by_hand(batch) / 2 for batch in heard], rel=1e-4)
    _, watch = fit(make_learner(batches=6), cbs=[half := HalfOnCPU()])
    heard = [batch for batch in watch.seen if batch['teacher']]
    assert len(heard) == 5 and half.order > watch.order
    lead = [1 - F.cross_entropy(taught(batch), batch['y']).item() / batch['loss'] for batch in heard]
    clear = [batch for batch, by in zip(heard, lead) if abs(by) > .01]  # bfloat16 may turn what is nearly equal
    assert min(lead) < -.01 and max(lead) > .01
    assert [batch['used'] for batch in clear] == pytest.approx([by_hand(batch) for batch in clear], rel=.05)


@pytest.mark.parametrize('opt', [{}, {'rewind_to': 0}])
def test_a_fit_goes_on_with_it(make_learner, opt):
    callback, watch = fit(make_learner(batches=6), **opt)
    assert [bool(batch['teacher']) for batch in watch.seen][-5:] == [True] * 5
    assert callback.sparsifier.report().zeros == round(.8 * 566)


def test_mixup(make_learner):
    learn = make_learner(batches=6)
    callback, _ = fit(learn, cbs=[MixUp()])
    assert callback.distilling.teacher.n_batches == 5


def test_random_numbers_and_the_pruned_network_are_not_touched(make_learner):
    "A teacher that is never better leaves the fit as it is without one, to the bit."
    found, model = [], nn.Sequential(*convnet()[:6], nn.Dropout(.5), *convnet()[6:])
    for distil in (None, distillation()):
        learn = make_learner(deepcopy(model), batches=6)
        if distil: learn.add_cb(Worst())
        fit(learn, distil=distil)
        found.append(learn.model.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


class Worst(Callback):
    "Spoil a teacher."
    def before_batch(self):
        teacher = self.learn.distilling.teacher.network if hasattr(self.learn, 'distilling') else None
        if teacher is not None: teacher[-1].bias.data[:] = torch.nan


# How long it is kept

@pytest.mark.parametrize('error', [None, CancelFitException()])
def test_the_teacher_is_let_go_at_the_end(make_learner, error):
    learn = make_learner()
    callback, _ = fit(learn, cbs=[Boom(5, error)] if error else [])
    assert callback.distilling.teacher.network is None and callback.distilling not in learn.cbs


def test_ctrl_c_keeps_the_teacher_for_a_fit_that_goes_on(make_learner):
    learn, callback = make_learner(), SparsifyCallback(80, schedule=HALF, distil=distillation(share=.5))
    with pytest.raises(KeyboardInterrupt): learn.fit(3, cbs=[callback, Boom(9, KeyboardInterrupt())])
    teacher = callback.distilling.teacher.network
    learn.fit(3, start_epoch=2, cbs=[callback, watch := Watch(callback)])
    assert len(watch.seen) == 4 and all(torch.equal(batch['teacher']['0.weight'], teacher[0].weight) for batch in watch.seen)
    assert callback.distilling.teacher.network is None
    with pytest.raises(KeyboardInterrupt): learn.fit(3, cbs=[callback, Boom(9, KeyboardInterrupt())])
    learn.fit(1, cbs=watch)  # nothing is distilled here, and the teacher goes
    assert watch.seen[-1]['loss'] == watch.seen[-1]['used'] and callback.distilling.teacher.network is None
    assert callback.distilling not in learn.cbs


def test_a_fit_that_resumes_elsewhere_says_that_there_is_none(make_learner, capsys):
    learn = make_learner()
    learn.logger = print
    for _ in range(2): fit(learn, 3)
    assert 'not distilled' not in capsys.readouterr().out
    fresh = make_learner(learn.model)
    fresh.logger = print
    callback = SparsifyCallback(80, schedule=HALF, distil=.5)
    fresh.fit(3, start_epoch=2, cbs=[callback, watch := Watch(callback)])
    assert 'sparsity: not distilled: the fit resumes after its first event' in capsys.readouterr().out
    assert len(watch.seen) == 4 and not any(batch['teacher'] for batch in watch.seen)


def test_fine_tune_has_its_teacher_in_the_second_part(make_learner):
    learn = make_learner(splitter=lambda m: [list(m[:3].parameters()), list(m[3:].parameters())])
    _, watch = fit(learn, 2, how='fine_tune')
    assert [batch['teacher'] is None for batch in watch.seen] == [True] * (4 + 5) + [False] * 3  # four steps are frozen


def test_copies_and_files_do_not_have_it(make_learner):
    learn, callback = make_learner(), SparsifyCallback(80, schedule=HALF, distil=.5)
    with pytest.raises(KeyboardInterrupt): learn.fit(2, cbs=[callback, Boom(6, KeyboardInterrupt())])
    assert callback.distilling.teacher.network is not None
    assert pickle.loads(pickle.dumps(callback.distilling.teacher.choice)) == distillation(.5)
    for copied in (deepcopy(callback.distilling.teacher), pickle.loads(pickle.dumps(callback.distilling.teacher))): assert copied.network is None


# What the distance is

@pytest.mark.parametrize('output, target, loss, axis', [
    ((8, 10), (8,), F.cross_entropy, 1),
    ((8, 10), (8, 1), CrossEntropyLossFlat(), -1),
    ((2, 5, 4, 4), (2, 4, 4), nn.CrossEntropyLoss(), 1),
    ((2, 5, 5, 5), (2, 5, 5), CrossEntropyLossFlat(axis=1), 1),
    ((2, 7, 5), (2, 7), CrossEntropyLossFlat(), -1),
    ((2, 7, 5), (2, 7), lambda o, y: F.cross_entropy(o.flatten(0, 1), y.flatten()), -1),
    ((8, 10), (8, 10), F.binary_cross_entropy_with_logits, None),  # several labels each
    ((8, 1), (8,), F.binary_cross_entropy_with_logits, None)])
def test_where_the_classes_are(output, target, loss, axis):
    assert class_axis(torch.randn(output), torch.zeros(target).long(), loss) == axis
    assert class_axis(torch.randn(output), torch.zeros(target), loss) is None


def test_positions_that_a_loss_leaves_out_do_not_count():
    p, z, y = torch.randn(2, 5, 3), torch.randn(2, 5, 3), torch.tensor([[0, 1, 2], [1, -100, -100]])
    choice = distillation()
    real = choice.distance(p[:1], z[:1], (y[:1],), F.cross_entropy), choice.distance(p[1:, :, :1], z[1:, :, :1], (y[1:, :1],), F.cross_entropy)
    both = choice.distance(p, z, (y,), nn.CrossEntropyLoss())
    assert both == pytest.approx((3 * real[0] + real[1]).item() / 4, rel=1e-5)
    assert choice.distance(p, p, (y,), F.cross_entropy).abs() < 1e-6


def test_other_losses_have_the_mean_of_the_squares(tmp_path):
    learn = new_learner(tmp_path, nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), metrics=[], batches=6)
    learn.loss_func = lambda output, y: MSELossFlat()(output, y.float())
    callback, watch = fit(learn, 2, distil=distillation(share=1.))
    assert callback.distilling.teacher.n_lower > 0
    for batch in watch.seen[7:]:
        squares = (batch['output'] - F.linear(batch['x'].flatten(1), batch['teacher']['1.weight'], batch['teacher']['1.bias'])).square().mean().item()
        assert batch['used'] in (pytest.approx(batch['loss'], abs=1e-5), pytest.approx(squares, abs=1e-5))


class Two(nn.Module):
    "Return two outputs, or one of another shape each time."
    def __init__(self, changes=False):
        super().__init__()
        self.first, self.second, self.changes = nn.Linear(64, 10), nn.Linear(64, 3), changes

    def forward(self, x):
        x = x.flatten(1)
        if self.changes: return self.first(x) if self.training else self.second(x)
        return self.first(x), self.second(x)


def both(output, y):
    "A loss that is lower for a teacher, which has no gradients."
    return F.cross_entropy(output[0], y) + output[1].square().mean() - 9 * (not output[0].requires_grad)


def test_several_outputs_and_a_function_of_ones_own(tmp_path):
    for distil in (distillation(), distillation(share=1., loss=lambda output, taught: 7 + 0 * (output[0] - taught[0]).sum())):
        learn = new_learner(tmp_path, Two(), metrics=[], batches=6)
        learn.loss_func = both
        callback, watch = fit(learn, distil=distil)
        assert callback.distilling.teacher.n_lower == 5 and all(b['used'] != b['loss'] for b in watch.seen[7:])
        assert distil.loss is None or [b['used'] for b in watch.seen[7:]] == pytest.approx(5 * [7], rel=1e-5)


def test_outputs_that_do_not_match_are_refused(tmp_path):
    learn = new_learner(tmp_path, Two(changes=True), metrics=[])
    learn.loss_func = lambda output, y: output.square().mean() * (output.shape[1] == 10)  # the teacher's is 0
    with pytest.raises(ValueError, match=r"distil: got outputs of shapes \[\(8, 10\)\] and \[\(8, 3\)\], expected .* or distillation\(loss="):
        fit(learn)


class Recurrent(nn.Module):
    "Remember what came before, and return more than the output, as fastai's language models do."
    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.Linear(64, 16), nn.Linear(16, 10)
        self.reset()

    def reset(self): self.hidden = torch.zeros(16)

    def forward(self, x):
        seen = torch.tanh(self.layer(x.flatten(1)) + self.hidden)
        self.hidden = seen[-1]  # keeps its graph, and so cannot be copied
        return self.out(seen), [seen], [seen]


class Detach(Callback):
    def after_step(self): self.model.hidden = self.model.hidden.detach()


class Memory(Callback):
    "Tell at each step of the second epoch whether a teacher remembers nothing."
    def __init__(self, owner): self.owner, self.is_empty = owner, []

    def before_batch(self):
        if self.training and self.epoch == 1: self.is_empty.append(not self.owner.distilling.teacher.network.hidden.any())


def test_recurrent_networks(tmp_path):
    learn = new_learner(tmp_path, Recurrent(), metrics=[], batches=6, cbs=[ModelResetter(), RNNCallback(), Detach()])
    callback = SparsifyCallback(80, schedule=one_shot(.1), distil=SHARE)
    learn.fit(2, cbs=[callback, memory := Memory(callback)])
    assert callback.distilling.teacher.n_batches == 10
    assert memory.is_empty == ([True, *5 * [False]])  # at the steps of the second epoch: fastai's model forgets, too


# What can be given

def test_what_can_be_given():
    assert SparsifyCallback(80, distil=0).distilling.teacher.choice is None is SparsifyCallback(80).distilling.teacher.choice
    assert repr(SparsifyCallback(80, distil=.9)).endswith(', distil=distillation())')
    assert repr(distillation(.5, 4)) == 'distillation(share=0.5, temperature=4)'
    for given, error, says in ((2, ValueError, 'distil: got share=2, expected a share of the loss'), (-.1, ValueError, 'share=-0.1'),
                               ('soft', TypeError, "distil: got 'soft'"), (True, TypeError, 'distil: got True')):
        with pytest.raises(error, match=says): SparsifyCallback(80, distil=given)
    with pytest.raises(ValueError, match='distil: got temperature=0, expected a number above 0'): distillation(temperature=0)
    with pytest.raises(TypeError, match='distil: got 3, expected a function of both outputs'): distillation(loss=3)


def test_lines(make_learner, capsys):
    learn = make_learner(batches=6)
    learn.logger = print
    callback, _ = fit(learn)
    assert f'sparsity: distilled in {callback.distilling.teacher.n_lower} of 5 batches' in capsys.readouterr().out
    assert zeros(learn.model)['0.weight']
    fit(learn, distil=None)
    assert 'distilled' not in capsys.readouterr().out
