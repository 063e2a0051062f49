from copy import deepcopy

import pytest
import torch
from conftest import convnet
from fastai.callback.core import Callback
from fastai.callback.schedule import SchedCos  # noqa: F401 (gives a Learner fine_tune)
from fastai.optimizer import OptimWrapper, ranger
from torch import nn

from fasterai.callback import SparsifyCallback
from fasterai.schedule import (
    epochs,
    gradual,
    iterative,
    linear,
    multi_step,
    one_shot,
    read_schedule,
    rigl,
    steps,
)
from fasterai.snapshot import Snapshot
from fasterai.sparsifier import Sparsifier
from fasterai.timetable import Timetable


def values(model): return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def trained(model, optimizer, n=3):
    for _ in range(n):
        optimizer.zero_grad()
        model(torch.randn(8, 1, 8, 8)).square().mean().backward()
        optimizer.step()


def is_rewound(model, sparsifier, then):
    "Tell whether all values are those of then, but for what is masked."
    then = {name: value.clone() for name, value in then.items()}
    for name in sparsifier.layers: then[f'{name}.weight'] *= sparsifier.masks[name]
    return all(torch.equal(now, then[name]) for name, now in model.state_dict().items())


@pytest.fixture
def pruned(net):
    "A network, its Sparsifier, optimizer, a snapshot, and the values of then: a zero among them is not pruned later."
    optimizer = torch.optim.Adam(net.parameters(), .01)
    trained(net, optimizer)
    with torch.no_grad(): net[8].weight[0, 0] = 0
    snapshot, then = Snapshot(net, optimizer), values(net)
    trained(net, optimizer)
    with torch.no_grad(): net[8].weight[0, 0] = 9
    sparsifier = Sparsifier(net)
    sparsifier.sparsify_model(60)
    return net, sparsifier, optimizer, snapshot, then


def test_all_values_go_back_but_what_is_pruned(pruned):
    net, sparsifier, _, snapshot, then = pruned
    masks = {name: sparsifier.masks[name] for name in sparsifier.layers}
    sparsifier.rewind(snapshot)
    assert is_rewound(net, sparsifier, then)
    assert all(torch.equal(sparsifier.masks[name], mask) for name, mask in masks.items())
    assert net[8].weight[0, 0] == 0 and sparsifier.masks['8'][0, 0]  # an old value may be zero
    assert not torch.equal(then['1.running_mean'], torch.zeros(6)) and int(net[1].num_batches_tracked) == 3


def test_the_optimizer_goes_back_too(pruned):
    net, sparsifier, optimizer, snapshot, _ = pruned
    optimizer.param_groups[0]['lr'] = .5
    sparsifier.rewind(snapshot)
    state, masks = optimizer.state[net[0].weight], sparsifier.masks['0']
    assert state['step'] == 3 and state['exp_avg'].any() and not state['exp_avg'][~masks].any()
    assert optimizer.param_groups[0]['lr'] == .5  # a schedule has the learning rate
    trained(net, optimizer, 1)
    sparsifier.rewind(snapshot)  # the snapshot was copied, not handed out
    assert optimizer.state[net[0].weight]['step'] == 3


def test_a_copy_goes_back_by_names(pruned):
    net, sparsifier, optimizer, snapshot, then = pruned
    other, steps = deepcopy(net), optimizer.state[net[0].weight]['step'].clone()
    sparsifier.move_to(other)
    sparsifier.rewind(snapshot)
    assert is_rewound(other, sparsifier, then)
    assert optimizer.state[net[0].weight]['step'] == steps and other[0].weight not in optimizer.state
    fresh = torch.optim.Adam(other.parameters())
    sparsifier.rewind(snapshot, fresh)
    assert fresh.state[other[0].weight]['step'] == 3


def test_bias_and_batchnorm_of_a_pruned_filter_stay_zero(net):
    snapshot = Snapshot(net)
    sparsifier = Sparsifier(net, 'filter', 'local', example=torch.randn(2, 1, 8, 8))
    sparsifier.sparsify_model(50)
    sparsifier.rewind(snapshot)
    dead = ~sparsifier.masks['0'].flatten(1).any(1)
    assert dead.sum() == 3 and not net[0].bias[dead].any() and not net[1].bias[dead].any()
    assert net[0].bias[~dead].all()


def test_what_training_gathered_begins_anew(net):
    snapshot, sparsifier = Snapshot(net), Sparsifier(net, criteria='movement')
    optimizer = torch.optim.SGD(net.parameters(), .1)
    sparsifier.attach(optimizer)
    trained(net, optimizer)
    sparsifier.rewind(snapshot)
    with pytest.raises(ValueError, match='movement'): sparsifier.sparsify_model(50)


def test_what_does_not_fit_changes_nothing(pruned):
    net, sparsifier, *_ = pruned
    before = values(net)
    for other, error in ((net, TypeError), (Snapshot(nn.Linear(2, 3)), ValueError), (Snapshot(convnet()[:3]), None)):
        if error is None:
            sparsifier.rewind(other)  # of a part, by its names
            continue
        with pytest.raises(error, match='snapshot: got'): sparsifier.rewind(other)
        assert all(torch.equal(now, before[name]) for name, now in values(net).items())
    with pytest.raises(ValueError, match='optimizer: got Adam'): sparsifier.rewind(Snapshot(net), torch.optim.Adam(net.parameters()))
    with pytest.raises(TypeError, match='optimizer: got Linear'): Snapshot(net, nn.Linear(1, 1))


# In a fit

class Watch(Callback):
    "Keeps all values before each batch, and whether those after a batch are values of then."
    order = -1
    def before_fit(self): self.before, self.states = [], []

    def before_batch(self):
        if not self.training: return
        self.before.append(values(self.model))
        state = getattr(self.opt, 'opt', self.opt).state
        self.states.append(deepcopy({name: dict(state[p]) for name, p in self.model.named_parameters()}))


def torch_adam(params, lr=.01, **_): return OptimWrapper(params, torch.optim.Adam, lr=lr)


UP_AND_DOWN = multi_step(at=(.25, .5, .625), shares=(1, .5, 1))


@pytest.mark.parametrize('rewind_to, k', [(0, 0), (.25, 2), (.3, 3), (steps(3), 3), (epochs(.5), 2)])
@pytest.mark.parametrize('schedule, last', [(one_shot(at=.5), 5), (gradual(.25, .75), 6), (UP_AND_DOWN, 6)])
def test_a_fit_rewinds_after_the_last_event(make_learner, rewind_to, k, schedule, last):
    watch, callback = Watch(), SparsifyCallback(80, schedule=schedule, rewind_to=rewind_to)
    make_learner().fit(2, cbs=[watch, callback])
    sparsifier, then = callback.sparsifier, watch.before[k]
    rewound = [i for i, now in enumerate(watch.before) if i > k and all(
        torch.equal(now[f'{name}.weight'], then[f'{name}.weight'] * sparsifier.masks[name]) for name in sparsifier.layers)]
    assert rewound == [last]
    other = [name for name in then if name.removesuffix('.weight') not in sparsifier.layers]
    assert all(torch.equal(watch.before[last][name], then[name]) for name in other)  # BatchNorm and biases
    assert sparsifier.report().zeros == round(.8 * 566)


@pytest.mark.parametrize('opt_func', [None, torch_adam])
def test_a_fit_rewinds_the_optimizer(make_learner, opt_func):
    watch, callback = Watch(), SparsifyCallback(80, schedule='one_shot', rewind_to=steps(2))
    make_learner(**({'opt_func': opt_func} if opt_func else {})).fit(2, cbs=[watch, callback])
    (was,), (now,) = [[v for k, v in watch.states[i]['1.bias'].items() if k in ('grad_avg', 'exp_avg')] for i in (2, 5)]
    assert torch.equal(now, was) and was.any()


def test_lookahead_begins_anew(make_learner):
    watch, callback = Watch(), SparsifyCallback(80, schedule=one_shot(at=.125), rewind_to=0)
    learn = make_learner(opt_func=ranger)
    learn.fit(1, cbs=[watch, callback])
    assert learn.opt.count == 3  # of four steps the first was taken back


def test_zeros_of_other_callbacks_stay(make_learner):
    both = [SparsifyCallback(80, layers='0', schedule=one_shot(at=.25)), SparsifyCallback(50, layers='8', schedule=one_shot(at=.5), rewind_to=0)]
    watch = Watch()
    make_learner().fit(2, cbs=[watch, *both])
    assert (watch.before[5]['0.weight'] == 0).sum() == round(.8 * 54)


@pytest.mark.parametrize('schedule, last', [('gradual', 750), ('one_shot', 501), (iterative(.1, .7, n_steps=3), 501), (rigl(every=.1), 750)])
def test_the_last_event(schedule, last):
    table = Timetable(read_schedule(schedule), rewind_to=.07)
    if schedule == 'gradual' or isinstance(schedule, rigl): table.rewind_to = 0
    table.place(10, 100)
    assert (table.remember, table.last) == (70 if table.rewind_to else 0, last)


def test_rewinding_where_it_cannot_be(make_learner):
    for value in (1.5, -.1, True, 'start'):
        with pytest.raises(ValueError, match='rewind_to: got .*, expected a share of training'): SparsifyCallback(80, rewind_to=value)
    with pytest.raises(ValueError, match="repair: got 'refit' with rewind_to=0.1"): SparsifyCallback(80, repair='refit', rewind_to=.1)
    for schedule, rewind_to, says in (('one_shot', .75, 'before the last event, step 5 of 8'), (linear(0, 1), 0, 'what is rewound must train'),
                                      ('gradual', steps(9), 'at most the 8 steps of this fit')):
        with pytest.raises(ValueError, match=f'rewind_to: got .*{says}'):
            make_learner().fit(2, cbs=SparsifyCallback(80, schedule=schedule, rewind_to=rewind_to))


def test_a_resumed_fit(make_learner):
    learn = make_learner()
    with pytest.raises(ValueError, match='resumes at step 4'):
        learn.fit(3, start_epoch=1, cbs=SparsifyCallback(80, schedule=one_shot(at=.6), rewind_to=0))
    callback = SparsifyCallback(80, schedule=one_shot(at=.25), rewind_to=0)
    learn.fit(2, start_epoch=1, cbs=callback)
    assert not callback.driver.rewound


def test_fine_tune_rewinds_in_its_second_part(make_learner, capsys):
    learn = make_learner(splitter=lambda m: [list(m[:3].parameters()), list(m[3:].parameters())])
    learn.logger = print
    callback = SparsifyCallback(90, schedule=one_shot(at=.7), rewind_to=steps(5))  # the first part has four
    learn.fine_tune(2, cbs=callback)
    assert callback.driver.rewound and 'rewound to step 5 after the last event, at step 6' in capsys.readouterr().out
    assert 'rewind_to=steps(5)' in repr(callback) and callback.driver.snapshot is None
