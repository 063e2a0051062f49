"A schedule in a loop of one's own: the steps of an optimizer drive the events, as a fit of fastai does."
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import convnet
from fastai.callback.core import Callback
from fastai.optimizer import OptimWrapper
from torch import nn
from torch.nn import functional as F

from fasterai.callback import SparsifyCallback
from fasterai.kinds import EVIDENCE, Kind
from fasterai.schedule import acdc, epochs, gradual, linear, one_shot, rigl, steps
from fasterai.snapshot import Snapshot
from fasterai.sparsifier import Sparsifier

X, Y = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 4
WEIGHTS = 192


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def adam(model, **more): return torch.optim.AdamW(model.parameters(), 1e-2, **more)
def zeros(model): return sum(int((p == 0).sum()) for p in model.parameters() if p.ndim > 1)


def loss_of(model, i=None):
    rows = slice(None) if i is None else slice(i * 5 % 40, i * 5 % 40 + 16)
    return F.cross_entropy(model(X[rows]), Y[rows])


def train(model, optimizer, n, start=0):
    "Train n steps; return the zeros after each."
    seen = []
    for i in range(start, start + n):
        loss_of(model, i).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(zeros(model))
    return seen


def wanted(n, percent=90): return [round(WEIGHTS * percent * i / (100 * n)) for i in range(1, n + 1)]


# ---- The same as a fit

class Batches(Callback):
    "Notes the batches of a fit."
    def before_fit(self): self.seen = []
    def before_batch(self):
        if self.training: self.seen.append((*self.xb, *self.yb))


@pytest.mark.parametrize('prune', [
    dict(criteria='magnitude', schedule='gradual'),
    dict(criteria='taylor', schedule=linear(0, 1)),
    dict(criteria='movement', schedule=gradual(start=steps(2), end=epochs(1.5), every=steps(2), initial=20)),
    dict(criteria='magnitude', schedule=rigl(every=.2), context='erk'),
    dict(criteria='magnitude', schedule=acdc(.1, .7, every=.2)),
    dict(criteria='magnitude', schedule=one_shot(.5), rewind_to=steps(2)),
    dict(criteria='magnitude', schedule=one_shot(.5), rewind_to=0),
    dict(criteria='magnitude', schedule=one_shot(.5), granularity='filter', context='local'),
    dict(criteria='magnitude', schedule=one_shot(.3), distil=.9),
    dict(criteria='magnitude', recipe='accurate')],
    ids=['gradual', 'taylor', 'movement', 'rigl', 'acdc', 'rewinding', 'to the beginning', 'filter', 'distilled', 'recipe'])
def test_a_loop_does_what_a_fit_does(make_learner, prune):
    "To the bit: the masks, the weights, and the optimizer's state."
    learn = make_learner(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW))
    start, batches, callback = learn.model.state_dict(), Batches(), SparsifyCallback(80, **prune)
    start = {name: value.clone() for name, value in start.items()}
    torch.manual_seed(0)
    learn.fit(3, 1e-2, wd=.01, cbs=[callback, batches])

    model = convnet()
    model.load_state_dict(start)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, betas=(.9, .999), weight_decay=.01)
    when = {name: prune.pop(name) for name in ('schedule', 'rewind_to', 'distil', 'recipe') if name in prune}
    sparsifier = Sparsifier(model, example=batches.seen[0][0], **prune)
    attached = sparsifier.attach(optimizer, sparsity=80, steps=12, steps_per_epoch=4, **when)
    torch.manual_seed(0)
    for x, y in batches.seen:
        attached.loss(F.cross_entropy, model(x), y, inputs=x).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sparsifier.sparsity == callback.sparsifier.sparsity > 0
    for name, mask in callback.sparsifier.masks.items(): assert torch.equal(mask, sparsifier.masks[name]), name
    for name, value in learn.model.state_dict().items(): assert torch.equal(value, model.state_dict()[name]), name
    heard = callback.distilling.teacher.n_lower
    assert attached.teacher.n_lower == heard and attached.teacher.network is None and (heard > 0) == bool({'distil', 'recipe'} & {*when})


# ---- What a step is

def test_each_step_has_its_count():
    model = net()
    optimizer, sparsifier = adam(model), Sparsifier(model)
    attached = sparsifier.attach(optimizer, sparsity=90, schedule=linear(0, 1), steps=16)
    assert train(model, optimizer, 16) == wanted(16)
    assert (attached.step, attached.is_over) == (16, True)
    assert train(model, optimizer, 4) == [wanted(16)[-1]] * 4  # kept after the last step, and not counted
    assert attached.step == 16 and 'step 16 of 16: asked 90 %, reached 90.10 % (173 of 192 weights)' in repr(attached)


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('unscaled', [False, True])
def test_a_step_that_gradscaler_skips_is_none(fused, unscaled):
    "A fused optimizer is called also for a step that it will skip, with gradients that are still scaled."
    model, plain = net(), net()
    sparsifiers = [Sparsifier(one, criteria=lambda weight, grad: weight.abs() + grad.abs()) for one in (model, plain)]
    optimizer, other = adam(model, fused=fused), adam(plain, fused=fused)
    for sparsifier, one in zip(sparsifiers, (optimizer, other)): sparsifier.attach(one, sparsity=90, schedule=linear(0, 1), steps=8)
    scaler, seen = torch.amp.GradScaler('cpu', init_scale=1024.), []
    for i in (0, 1, None, 2, 3, None, 4, 5, 6, 7):
        loss = loss_of(model, i) * (float('inf') if i is None else 1)
        scaler.scale(loss).backward()
        if unscaled: scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        seen.append(zeros(model))
    due = wanted(8)
    assert seen == [due[0], due[1], due[1], due[2], due[3], due[3], *due[4:]]
    train(plain, other, 8)
    for name, mask in sparsifiers[0].masks.items(): assert torch.equal(mask, sparsifiers[1].masks[name])
    for p, q in zip(model.parameters(), plain.parameters()): assert torch.equal(p, q)


def test_accumulated_batches_are_one_step(monkeypatch):
    told = Kind(lambda layer, state: state, lambda layer: torch.zeros_like(layer.weight), lambda layer, state: state + 1)
    monkeypatch.setitem(EVIDENCE, 'told', told)
    model = net()
    optimizer, sparsifier = adam(model), Sparsifier(model, criteria=lambda weight, told: weight.abs() + 0 * told)
    sparsifier.attach(optimizer, sparsity=90, schedule=linear(0, 1), steps=4)
    for i in range(8):
        (loss_of(model, i) / 2).backward()
        if i % 2 == 0: continue
        optimizer.step()
        optimizer.zero_grad()
        assert zeros(model) == wanted(4)[i // 2]
    for layer in sparsifier.layers.values(): assert (sparsifier.evidence.of(layer)['told'] == 4).all()


def closure_of(model, optimizer, seen=None):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        if seen is not None: seen.append((zeros(model), float(loss.detach())))
        return loss
    return closure


@pytest.mark.parametrize('criterion', ['magnitude', 'taylor'])
def test_a_closure_gives_the_gradients(criterion):
    "As Lightning steps: what backward has left before is zeroed inside."
    found = []
    for with_closure in (False, True):
        model = net()
        optimizer, sparsifier = adam(model), Sparsifier(model, criteria=criterion)
        sparsifier.attach(optimizer, sparsity=90, schedule=linear(0, 1), steps=6)
        closure = closure_of(model, optimizer)
        for _ in range(6):
            if with_closure: optimizer.step(closure=closure)
            else:
                closure()
                optimizer.step()
        found.append([p.detach().clone() for p in model.parameters()])
        assert zeros(model) == wanted(6)[-1]
    for one, other in zip(*found): assert torch.equal(one, other)


@pytest.mark.parametrize('search', [None, 'strong_wolfe'])
def test_lbfgs(search):
    "Its closure runs several times a step, on masked weights, and once more after an event."
    model, seen = net(), []
    optimizer, sparsifier = torch.optim.LBFGS(model.parameters(), .1, max_iter=4, line_search_fn=search), Sparsifier(model)
    sparsifier.attach(optimizer, sparsity=90, schedule=linear(0, 1), steps=5)
    closure = closure_of(model, optimizer, seen)
    for due in wanted(5):
        seen.clear()
        loss = float(optimizer.step(closure))
        assert zeros(model) == due and len(seen) > 2 and {n for n, _ in seen[1:]} == {due}
        assert loss == seen[1][1] != seen[0][1]  # it compares losses with that of the pruned network
    for layer in sparsifier.layers.values(): assert not layer.weight.grad[~sparsifier.masks[layer.name]].any()


@pytest.mark.parametrize('how', [dict(foreach=True), dict(foreach=False), dict(fused=True), dict(capturable=False, amsgrad=True)])
def test_forms_of_an_optimizer(how):
    model = net()
    optimizer, sparsifier = adam(model, **how), Sparsifier(model)
    sparsifier.attach(optimizer, sparsity=90, schedule=linear(0, 1), steps=8)
    assert train(model, optimizer, 8) == wanted(8)


# ---- Several optimizers

class Both:
    "Hooks no optimizer of its own, and steps two."
    def __init__(self, *optimizers): self.optimizers = [*optimizers]

    def step(self):
        for one in self.optimizers: one.step()

    def zero_grad(self):
        for one in self.optimizers: one.zero_grad()


class Around(torch.optim.Optimizer):
    "Writes the weights after the one inside has stepped, as Lookahead."
    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner = inner

    @torch.no_grad()
    def step(self, closure=None): self.inner.step(closure)


@pytest.mark.parametrize('in_a_list', [False, True])
def test_two_optimizers_with_a_part_each_make_one_step(in_a_list):
    model, other = net(), net()
    both = Both(torch.optim.Adam(model[0].parameters(), 1e-2), torch.optim.Adam(model[2].parameters(), 1e-2))
    one = torch.optim.Adam(other.parameters(), 1e-2)
    rules = dict(criteria='taylor', regrow='gradient')
    sparsifiers = Sparsifier(model, **rules), Sparsifier(other, **rules)
    when = dict(sparsity=90, schedule=rigl(every=.2), steps=10)
    sparsifiers[0].attach(both.optimizers if in_a_list else both, **when)
    sparsifiers[1].attach(one, **when)
    assert train(model, both, 10) == train(other, one, 10)
    for name, mask in sparsifiers[0].masks.items(): assert torch.equal(mask, sparsifiers[1].masks[name])


def test_one_around_another_makes_the_same_steps():
    "Its hook comes first: it must not mask gradients that the event needs."
    found = []
    for wrap in (lambda opt: opt, Around):
        model = net()
        optimizer, sparsifier = wrap(adam(model)), Sparsifier(model, regrow='gradient', criteria='taylor')
        attached = sparsifier.attach(optimizer, sparsity=90, schedule=rigl(every=.2), steps=10)
        train(model, optimizer, 10)
        found.append({name: mask.clone() for name, mask in sparsifier.masks.items()})
        assert attached.step == 10
    for name, mask in found[0].items(): assert torch.equal(mask, found[1][name])


def test_evidence_is_told_before_the_one_around_masks_gradients():
    model = net()
    optimizer, sparsifier = Around(adam(model)), Sparsifier(model, criteria=lambda grad_mean: grad_mean.abs())
    loss_of(model).backward()
    sparsifier.sparsify_model(50)
    sparsifier.attach(optimizer)
    train(model, optimizer, 1)
    for name, layer in sparsifier.layers.items(): assert sparsifier.evidence.of(layer)['grad_mean'][~sparsifier.masks[name]].any()


def test_a_step_that_is_compiled():
    model = net()
    optimizer, sparsifier = adam(model), Sparsifier(model)
    sparsifier.attach(optimizer, sparsity=90, schedule=linear(0, 1), steps=4)
    step = torch.compile(optimizer.step, backend='eager')
    for due in wanted(4):
        loss_of(model).backward()
        step()
        optimizer.zero_grad()
        assert zeros(model) == due


def test_a_gan_has_a_sparsifier_for_each_network():
    torch.manual_seed(0)
    generator, discriminator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    first, second = torch.optim.Adam(generator.parameters()), torch.optim.Adam(discriminator.parameters())
    sparsifiers = Sparsifier(generator), Sparsifier(discriminator)
    sparsifiers[0].attach(first, sparsity=50, schedule=linear(0, 1), steps=4)
    sparsifiers[1].attach(second, sparsity=50, schedule=linear(0, 1), steps=4)
    for _ in range(4):
        fake = generator(torch.randn(16, 4))
        second.zero_grad()
        (discriminator(fake.detach()).mean() - discriminator(torch.randn(16, 8)).mean()).backward()
        second.step()
        first.zero_grad()
        (-discriminator(fake).mean()).backward()
        first.step()
    assert [sparsifier.sparsity for sparsifier in sparsifiers] == [50, 50]


# ---- What is refused

@pytest.mark.parametrize('given, says', [
    (dict(sparsity=.9, steps=8), 'sparsity: got 0.9, .*write 90'),
    (dict(sparsity={}, steps=8), 'sparsity: got an empty dict'),
    (dict(sparsity={'nowhere': 50}, steps=8), "sparsity: got 'nowhere'"),
    (dict(sparsity=90), 'steps: got None, expected how many steps'),
    (dict(sparsity=90, steps=0), 'steps: got 0, expected an integer of 1'),
    (dict(steps=8), r'sparsity: got None with steps=8'),
    (dict(schedule='one_shot'), r"sparsity: got None with schedule='one_shot'"),
    (dict(sparsity=90, steps=8, schedule='agp'), "schedule: got 'agp'.*'gradual'"),
    (dict(sparsity=90, steps=8, schedule=gradual(end=steps(9))), r'end=steps\(9\), expected at most the 8 steps'),
    (dict(sparsity=90, steps=8, schedule=gradual(end=epochs(1))), r'steps_per_epoch: got None with epochs\(1\)'),
    (dict(sparsity=90, steps=8, rewind_to=epochs(0)), r'steps_per_epoch: got None with epochs\(0\)'),
    (dict(sparsity=90, steps=8, steps_per_epoch=0), 'steps_per_epoch: got 0'),
    (dict(sparsity=90, steps=9, steps_per_epoch=4, schedule=gradual(end=epochs(2.5))), r'at most the 2.25 epochs'),
    (dict(sparsity=90, steps=8, schedule=gradual(initial=95)), 'schedule: got initial=95, expected at most'),
    (dict(sparsity=90, steps=8, schedule='one_shot', rewind_to=.9), 'rewind_to: got 0.9, expected a time before the last event'),
    (dict(sparsity=90, steps=8, ms=5), 'ms: got an argument.*fit_to'),
    (dict(sparsity=90, steps=8, bytes=5), 'bytes: got an argument.*fit_to'),
    (dict(sparsity=90, num_steps=8), 'did you mean steps=')])
def test_wrong_arguments_leave_no_hook(given, says):
    model = net()
    optimizer, sparsifier = adam(model), Sparsifier(model)
    with pytest.raises((ValueError, TypeError), match=says): sparsifier.attach(optimizer, **given)
    assert not optimizer._optimizer_step_pre_hooks and '.training' not in sparsifier.state_dict()
    sparsifier.attach(optimizer, sparsity=90, steps=8)  # it is as if nothing had been tried


def test_an_optimizer_without_some_of_the_layers_is_refused_by_name():
    model = net()
    part, rest = (torch.optim.SGD(layer.parameters(), .1) for layer in (model[0], model[2]))
    with pytest.raises(ValueError, match="optimizer: got one that does not step '2', expected.*a list of optimizers"):
        Sparsifier(model).attach(part, sparsity=90, steps=8)
    Sparsifier(model, exclude='2').attach(part, sparsity=90, steps=8).detach()
    sparsifier = Sparsifier(model)
    sparsifier.attach(rest)  # it is attached before
    sparsifier.attach(part, sparsity=90, steps=8)
    model[2].requires_grad_(False)
    Sparsifier(model).attach(part, sparsity=90, steps=8)  # a frozen layer is not pruned


def test_attached_twice():
    model = net()
    optimizer, sparsifier = adam(model), Sparsifier(model)
    attached = sparsifier.attach(optimizer, sparsity=90, steps=8)
    for again in (optimizer, Both(optimizer)):
        with pytest.raises(ValueError, match='optimizer: got one that is attached already'): sparsifier.attach(again)
    with pytest.raises(ValueError, match='sparsity: got 50, but a schedule is at step 0 of 8'): sparsifier.attach(adam(model), sparsity=50, steps=8)
    attached.detach()
    sparsifier.attach(optimizer, sparsity=50, steps=8)


def test_detaching():
    model = net()
    optimizer, sparsifier = adam(model), Sparsifier(model)
    with sparsifier.attach(optimizer, sparsity=90, schedule=linear(0, 1), steps=8) as attached:
        assert train(model, optimizer, 4)[-1] == wanted(8)[3]
        assert sparsifier.state_dict()['.training']['step'] == attached.step == 4
    assert train(model, optimizer, 4)[-1] < 10 and '.training' not in sparsifier.state_dict()
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    sparsifier.attach(optimizer)
    sparsifier.detach()
    assert not optimizer._optimizer_step_pre_hooks


def test_an_event_that_fails_is_no_step():
    model, before = net(), net()
    optimizer, sparsifier = torch.optim.SGD(model.parameters(), .1), Sparsifier(model, criteria=lambda weight, grad: (weight * grad).abs())
    attached = sparsifier.attach(optimizer, sparsity=90, schedule=linear(0, 1), steps=8)
    loss_of(model).backward()
    for p in model.parameters(): p.grad.fill_(float('nan'))
    with pytest.raises(ValueError, match='NaN'): optimizer.step()
    for p, q in zip(model.parameters(), before.parameters()): assert torch.equal(p, q)
    optimizer.zero_grad()
    assert attached.step == 0 and train(model, optimizer, 8) == wanted(8)


# ---- Repair, rewinding, averages

def test_the_last_event_is_repaired_and_only_that():
    model, calls = net(), []
    optimizer, sparsifier = adam(model), Sparsifier(model, data=[X], repair=lambda model, dense, data: calls.append(zeros(model)))
    sparsifier.attach(optimizer, sparsity=90, schedule=linear(0, .5), steps=8)
    train(model, optimizer, 8)
    assert calls == [wanted(4)[-1]] and sparsifier.repairs.dense is None


def test_rewinding_needs_one_optimizer():
    model = net()
    with pytest.raises(ValueError, match='rewind_to: got 0.1 with 2 optimizers'):
        Sparsifier(model).attach(Around(adam(model)), sparsity=90, schedule='one_shot', steps=8, rewind_to=.1)


def test_an_averaged_model_takes_the_masks():
    model = net()
    optimizer, sparsifier = adam(model), Sparsifier(model)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(.9))
    sparsifier.attach(optimizer, sparsity=90, steps=12)
    for i in range(12):
        train(model, optimizer, 1, i)
        average.update_parameters(model)
    assert zeros(average.module) < 173
    Sparsifier(average.module).masks.update(sparsifier.masks)
    assert zeros(average.module) == 173


# ---- Resuming

def training(stop=None, **more):
    model = net()
    optimizer, sparsifier = adam(model), Sparsifier(model, criteria='movement', regrow='gradient')
    when = dict(sparsity=80, schedule=gradual(.1, .7, every=.2, swap=.3), steps=20, rewind_to=None) | more
    return model, optimizer, sparsifier, when


def save(folder, model, optimizer, sparsifier):
    torch.save({'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'sparsifier': sparsifier.state_dict()}, folder / 'at.pt')


def resume(folder, late, **more):
    model, optimizer, sparsifier, when = training(**more)
    state = torch.load(folder / 'at.pt', weights_only=True)
    model.load_state_dict(state['model'])
    optimizer.load_state_dict(state['optimizer'])
    if not late: sparsifier.load_state_dict(state['sparsifier'])
    attached = sparsifier.attach(optimizer, **when)
    if late: sparsifier.load_state_dict(state['sparsifier'])
    return model, optimizer, sparsifier, attached


@pytest.mark.parametrize('late', [False, True], ids=['loaded before', 'loaded after'])
@pytest.mark.parametrize('at', [1, 7, 15, 20])
@pytest.mark.parametrize('more', [{}, dict(schedule=one_shot(.6), rewind_to=.2)], ids=['swaps', 'rewinding'])
def test_resumed_to_the_bit(tmp_path, at, late, more):
    model, optimizer, sparsifier, when = training(**more)
    sparsifier.attach(optimizer, **when)
    train(model, optimizer, at)
    save(tmp_path, model, optimizer, sparsifier)
    torch.manual_seed(1)
    train(model, optimizer, 22 - at, at)
    other, its_optimizer, its_sparsifier, attached = resume(tmp_path, late, **more)
    assert attached.step == at
    torch.manual_seed(1)
    train(other, its_optimizer, 22 - at, at)
    assert zeros(other) == zeros(model) == round(.8 * WEIGHTS)
    for p, q in zip(model.parameters(), other.parameters()): assert torch.equal(p, q)
    for p, q in zip(optimizer.state.values(), its_optimizer.state.values()):
        for name, value in p.items(): assert torch.equal(value, q[name])
    assert attached.driver.rewound == ('rewind_to' in more)


SCRIPT = '''
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_driver import resume, torch, train
model, optimizer, sparsifier, attached = resume(Path({folder!r}), False)
torch.manual_seed(1)
train(model, optimizer, 13, 7)
torch.save(model.state_dict(), {folder!r} + '/end.pt')
'''


def test_resumed_in_a_new_process(tmp_path):
    model, optimizer, sparsifier, when = training()
    sparsifier.attach(optimizer, **when)
    train(model, optimizer, 7)
    save(tmp_path, model, optimizer, sparsifier)
    torch.manual_seed(1)
    train(model, optimizer, 13, 7)
    script = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    subprocess.run([sys.executable, '-c', script], check=True, capture_output=True)
    for name, value in torch.load(tmp_path / 'end.pt').items(): assert torch.equal(value, model.state_dict()[name])


@pytest.mark.parametrize('late', [False, True])
def test_a_training_of_another_length_is_another_one(tmp_path, late):
    model, optimizer, sparsifier, when = training()
    sparsifier.attach(optimizer, **when)
    train(model, optimizer, 7)
    save(tmp_path, model, optimizer, sparsifier)
    with pytest.raises(ValueError, match='steps: got 40, expected 20 as in the state, which is of step 7'): resume(tmp_path, late, steps=40)
    train(model, optimizer, 13, 7)
    save(tmp_path, model, optimizer, sparsifier)
    *_, its_sparsifier, attached = resume(tmp_path, late, steps=40)
    assert attached.step == 0 and its_sparsifier.sparsity == sparsifier.sparsity > 0


def test_a_state_that_is_none_of_a_training_changes_nothing():
    model, optimizer, sparsifier, when = training()
    sparsifier.attach(optimizer, **when)
    train(model, optimizer, 15)
    state, before = sparsifier.state_dict(), zeros(model)
    for wrong, says in (({'step': 3}, 'state: got no done, pruned'), (state['.training'] | {'steps': 16}, 'steps: got 20, expected 16'),
                        (state['.training'] | {'snapshot': Snapshot(nn.Linear(2, 2)).state_dict()}, 'a snapshot of another model')):
        with pytest.raises(ValueError, match=says): sparsifier.load_state_dict(state | {'.training': wrong})
        assert zeros(model) == before and sparsifier.state_dict()['.training'] == state['.training']
