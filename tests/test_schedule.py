import pickle

import pytest
import torch
from fastai.callback.schedule import SchedCos, SchedLin

from fasterai.schedule import (
    SCHEDULES,
    cosine,
    dense_sparse_dense,
    gradual,
    iterative,
    linear,
    one_cycle,
    one_shot,
    plot_schedule,
    read_schedule,
)
from fasterai.sparsifier import Sparsifier


@pytest.mark.parametrize('schedule, values', [  # at 0, 1/4, 1/2, 3/4, 1
    (one_shot(at=.5), [0, 0, 0, 1, 1]),
    (one_shot(at=1), [0, 0, 0, 0, 1]),
    (one_shot(at=0), [0, 1, 1, 1, 1]),
    (iterative(0, 1, n_steps=2), [0, .5, .5, 1, 1]),
    (iterative(0, 1, n_steps=4), [0, .25, .5, .75, 1]),
    (linear(0, 1), [0, .25, .5, .75, 1]),
    (linear(.25, .75), [0, 0, .5, 1, 1]),
    (gradual(0, 1), [0, 1 - .75 ** 3, 1 - .5 ** 3, 1 - .25 ** 3, 1]),
    (cosine(0, 1), [0, .1464466, .5, .8535534, 1]),
    (one_cycle(0, 1), [0, .1824484, .8809058, .9960528, 1]),
    (dense_sparse_dense(.25, .75), [0, 0, 1, 1, 0]),
])
def test_tables(schedule, values):
    assert [schedule(p) for p in (0, .25, .5, .75, 1)] == pytest.approx(values, abs=1e-6)


@pytest.mark.parametrize('name', SCHEDULES)
def test_contracts(name):
    schedule = SCHEDULES[name]()
    assert read_schedule(name) == schedule == read_schedule(SCHEDULES[name])
    assert eval(repr(schedule)) == schedule  # the repr is the code that makes it
    assert pickle.loads(pickle.dumps(schedule)) == schedule and hash(schedule) == hash(SCHEDULES[name]())
    values = [schedule(i / 1000) for i in range(1001)]
    assert all(0 <= v <= 1 for v in values) and values[0] == 0
    assert values[-1] == (0 if name == 'dense_sparse_dense' else 1)
    if name != 'dense_sparse_dense': assert values == sorted(values)
    with pytest.raises(AttributeError): schedule.end = 1


@pytest.mark.parametrize('name', SCHEDULES)
def test_plot(name):
    ax = SCHEDULES[name]().plot()
    (line,) = ax.lines
    assert line.get_ydata().max() == 100 and line.get_label().startswith(name)
    assert plot_schedule(linear(), ax=ax) is ax and len(ax.lines) == 2


@pytest.mark.parametrize('make, says', [
    (lambda: gradual(start=.8, end=.2), r'got start=0.8 and end=0.2, expected start < end'),
    (lambda: gradual(end=1.5), r'got end=1.5, expected a share of training'),
    (lambda: one_shot(at=-1), 'got at=-1'),
    (lambda: one_shot(at=float('nan')), 'got at=nan'),
    (lambda: linear(start='a'), "got start='a'"),
    (lambda: iterative(n_steps=0), 'got n_steps=0, expected an integer of 1 or more'),
    (lambda: iterative(n_steps=2.5), 'got n_steps=2.5'),
    (lambda: iterative(start=.9, end=.1), 'start < end'),
    (lambda: read_schedule('gradul'), "schedule: got 'gradul', .*one of .* did you mean 'gradual'"),
    (lambda: read_schedule(lambda p: 90 * p), 'gives 4.5 at progress 0.05, expected 0 to 1'),
    (lambda: read_schedule(lambda p: float('nan')), 'gives nan at progress 0'),
    (lambda: read_schedule(lambda p: None), 'gives None at progress 0'),
])
def test_bad_schedules_are_refused(make, says):
    with pytest.raises(ValueError, match=says): make()


def test_any_function_of_progress_serves():
    for f in (SchedCos(0, 1), SchedLin(0, 1), lambda p: p ** 2): assert read_schedule(f) is f
    with pytest.raises(TypeError, match='schedule: got 3'): read_schedule(3)


@pytest.mark.parametrize('schedule', [lambda: 1., lambda a, b: 1., None, 7])
def test_what_is_not_called_with_the_progress_is_refused(schedule):
    with pytest.raises(TypeError, match='schedule: got .*expected .*a function of progress'): read_schedule(schedule)


@pytest.mark.parametrize('share', [1j, 'a', [.5], -.1])
def test_schedules_that_return_something_else_are_refused(share):
    with pytest.raises(ValueError, match='schedule: got <lambda>, which gives .* expected 0 to 1'): read_schedule(lambda p: share)


@pytest.mark.parametrize('share', [None, '1', [], True, float('nan'), 2, 1j])
def test_shares_that_are_none_are_refused(net, share):
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ValueError, match='share: got .*expected a number from 0 to 1'): Sparsifier(net).sparsify_model(50, share)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize('steps', [2, 3, 10, 40, 41])
@pytest.mark.parametrize('at', [0, .25, .5, .6, .9])
def test_what_happens_after_a_share_of_training_leaves_so_many_steps_as_they_are(steps, at):
    "A schedule is asked before each step, with the progress that the step will make."
    dense = [one_shot(at)(step / steps) for step in range(1, steps + 1)].count(0)
    assert dense == min(int(at * steps), steps - 1)
    ramp = [linear(at, 1)(step / steps) for step in range(1, steps + 1)].count(0)
    assert ramp == int(at * steps)


def test_a_phase_has_as_many_steps_as_its_share():
    sparse = [dense_sparse_dense(.25, .75)(step / 40) for step in range(1, 41)]
    assert sparse == [0] * 10 + [1] * 20 + [0] * 10
