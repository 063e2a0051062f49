import pickle
from copy import deepcopy
from fractions import Fraction
from math import cos, exp, log, pi

import numpy as np
import pytest
import torch
from conftest import zeros
from fastai.callback.schedule import SchedCos, SchedLin
from torch import nn

from fasterai.schedule import (
    SCHEDULES,
    Due,
    Ramp,
    acdc,
    as_due,
    cosine,
    dense_sparse_dense,
    epochs,
    exponential,
    gradual,
    initial_at,
    iterative,
    linear,
    multi_step,
    one_cycle,
    one_shot,
    over_fit,
    plot_schedule,
    read_schedule,
    rigl,
    steps,
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
    (gradual(0, 1, power=1), [0, .25, .5, .75, 1]),
    (gradual(0, 1, power=2), [0, 1 - .75 ** 2, .75, 1 - .25 ** 2, 1]),
    (exponential(0, 1), [0, (1 - exp(-.75)) / (1 - exp(-3)), (1 - exp(-1.5)) / (1 - exp(-3)), (1 - exp(-2.25)) / (1 - exp(-3)), 1]),
    (multi_step((.25, .5), (1, .5)), [0, 0, 1, .5, .5]),
    (multi_step((0, .5, 1), (.2, .4, .6)), [0, .2, .2, .4, .6]),
    (acdc(0, 1, every=.25), [0, 1, 0, 1, 1]),
    (acdc(.25, .5, every=.25), [0, 0, 1, 1, 1]),
])
def test_tables(schedule, values):
    assert [schedule(p) for p in (0, .25, .5, .75, 1)] == pytest.approx(values, abs=1e-6)


@pytest.mark.parametrize('name', SCHEDULES)
def test_contracts(name):
    schedule = SCHEDULES[name]()
    assert read_schedule(name) == schedule == read_schedule(SCHEDULES[name])
    assert eval(repr(schedule)) == schedule  # the repr is the code that makes it
    assert pickle.loads(pickle.dumps(schedule)) == schedule and hash(schedule) == hash(SCHEDULES[name]())
    values = [as_due(schedule(i / 1000)).share for i in range(1001)]
    assert all(0 <= v <= 1 for v in values) and values[0] == 0
    assert values[-1] == (0 if name == 'dense_sparse_dense' else 1)
    if name not in ('dense_sparse_dense', 'acdc'): assert values == sorted(values)
    with pytest.raises(AttributeError): schedule.end = 1


def test_an_exponential_keeps_the_same_share_at_each_step():
    schedule = exponential(0, 1, rate=-log(.05))
    left = [1 - .95 * schedule(i / 4) for i in range(5)]
    assert [b / a for a, b in zip(left, left[1:])] == pytest.approx([.05 ** .25] * 4)


def test_sparse_and_dense_in_turn():
    phases = [acdc(.1, .8)(step / 100) for step in range(1, 101)]
    assert phases == [0] * 10 + ([1] * 5 + [0] * 5) * 7 + [1] * 20


@pytest.mark.parametrize('n_epochs, steps_per_epoch, every', [(3, 7, 1), (7, 49, 3), (10, 10, 5), (41, 3, 7)])
def test_no_phase_is_a_step_off(n_epochs, steps_per_epoch, every):
    total = n_epochs * steps_per_epoch
    schedule = acdc(steps(2), steps(total), every=steps(every)).over(n_epochs, steps_per_epoch)
    found = [schedule(step / total) for step in range(1, total)]
    assert found == [0, 0, *[float((step - 3) // every % 2 == 0) for step in range(3, total)]]


# Exchange

def test_the_share_that_is_exchanged_falls_by_a_cosine():
    schedule = rigl(every=.25, swap=.4, end=1)
    assert schedule(.2) == 1 and schedule(1) == 1 and schedule(0) == 0
    for nth, p in ((1, .25), (1, .4), (2, .5), (3, .8)):
        assert schedule(p) == Due(1., pytest.approx(.2 * (1 + cos(pi * nth / 4))), nth)


def test_a_ramp_exchanges_when_it_prunes():
    schedule, plain = gradual(.1, .9, every=.2, swap=.3), gradual(.1, .9, every=.2)
    assert [as_due(schedule(i / 20)).share for i in range(21)] == [plain(i / 20) for i in range(21)]
    assert [as_due(schedule(i / 10)).nth for i in range(11)] == [0, 0, 0, 1, 1, 2, 2, 3, 3, 0, 0]
    assert as_due(schedule(.5)).swap == pytest.approx(.15) and as_due(schedule(.95)) == Due(1.)


@pytest.mark.parametrize('n_epochs, steps_per_epoch', [(1, 10), (3, 7), (7, 49)])
def test_no_exchange_is_a_step_off(n_epochs, steps_per_epoch):
    total = n_epochs * steps_per_epoch
    schedule = rigl(every=steps(3), end=steps(total)).over(n_epochs, steps_per_epoch)
    nths = [as_due(schedule(step / total)).nth for step in range(1, total)]
    assert nths == [step // 3 for step in range(1, total)]


@pytest.mark.parametrize('given', [Due(2), Due(1, 2), Due(1, -.1), Due(.5, None), Due('a')])
def test_what_is_due_is_checked(given):
    with pytest.raises(ValueError, match='schedule: got <lambda>, which gives .* expected 0 to 1'): read_schedule(lambda p: given)


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
    (lambda: gradual(power=0), 'got power=0, expected a number above 0'), (lambda: gradual(power='a'), "got power='a'"),
    (lambda: exponential(rate=-1), 'got rate=-1, expected a number above 0'), (lambda: exponential(rate=float('inf')), 'got rate=inf'),
    (lambda: gradual(swap=.3), 'got swap=0.3 without every=, the time between two exchanges'), (lambda: rigl(every=None), 'without every='),
    (lambda: rigl(swap=2), 'got swap=2, expected a share of the weights, 0 to 1'), (lambda: rigl(every=0), 'got every=0, expected more than 0'),
    (lambda: acdc(every=0), 'got every=0, expected more than 0'), (lambda: acdc(.8, .2), 'start < end'),
    (lambda: multi_step((.1, .2), (1,)), r'got shares=\(1,\) and at=\(0.1, 0.2\), expected a share of 0 to 1 for each time'),
    (lambda: multi_step((.1, .2), (1, 90)), 'expected a share of 0 to 1 for each time'), (lambda: multi_step((), ()), r'got at=\(\), expected a tuple'),
    (lambda: multi_step(.5, 1), 'got at=0.5, expected a tuple'), (lambda: multi_step((.5, .2), (0, 1)), r'expected at\[0\] < at\[1\]'),
    (lambda: multi_step((.5, 2), (0, 1)), r'got at\[1\]=2, expected a share of training'),
    (lambda: read_schedule('set'), "did you mean 'rigl'"),
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


# Steps and epochs

def table(schedule, n_epochs, steps_per_epoch):
    "What a schedule returns before each step of a fit, in whole percent."
    schedule, total = schedule.over(n_epochs, steps_per_epoch), n_epochs * steps_per_epoch
    return [round(100 * as_due(schedule(step / total)).share) for step in range(1, total + 1)]


@pytest.mark.parametrize('schedule, percents', [  # in 2 epochs of 4 steps
    (one_shot(at=steps(3)), [0, 0, 0, 100, 100, 100, 100, 100]),
    (one_shot(at=epochs(1)), [0, 0, 0, 0, 100, 100, 100, 100]),
    (one_shot(at=epochs(1.5)), [0, 0, 0, 0, 0, 0, 100, 100]),
    (one_shot(at=steps(0)), [100] * 8),
    (one_shot(at=steps(8)), [0] * 7 + [100]),
    (dense_sparse_dense(start=epochs(1), end=steps(6)), [0, 0, 0, 0, 100, 100, 0, 0]),
    (dense_sparse_dense(start=.25, end=epochs(1)), [0, 0, 100, 100, 0, 0, 0, 0]),
    (linear(start=steps(0), end=epochs(2)), [12, 25, 38, 50, 62, 75, 88, 100]),
    (linear(start=steps(2), end=epochs(1.5)), [0, 0, 25, 50, 75, 100, 100, 100]),
    (linear(start=epochs(.5), end=.75), [0, 0, 25, 50, 75, 100, 100, 100]),
    (iterative(start=steps(2), end=epochs(2), n_steps=2), [0, 0, 50, 50, 50, 100, 100, 100]),
    (linear(0, 1, every=steps(2)), [0, 25, 25, 50, 50, 75, 75, 100]),
    (linear(0, 1, every=steps(1)), [12, 25, 38, 50, 62, 75, 88, 100]),
    (linear(0, 1, every=epochs(.5)), [0, 25, 25, 50, 50, 75, 75, 100]),
    (linear(0, 1, every=.25), [0, 25, 25, 50, 50, 75, 75, 100]),
    (linear(0, 1, every=steps(3)), [0, 0, 38, 38, 38, 75, 75, 100]),  # 8 is no multiple of 3
    (linear(steps(1), steps(7), every=steps(2)), [0, 0, 33, 33, 67, 67, 100, 100]),
    (linear(steps(1), steps(6), every=steps(5)), [0, 0, 0, 0, 0, 100, 100, 100]),
    (linear(steps(1), steps(6), every=steps(8)), [0, 0, 0, 0, 0, 100, 100, 100]),
    (gradual(0, 1, every=steps(4)), [0, 0, 0, 88, 88, 88, 88, 100]),
    (iterative(0, 1, n_steps=2, every=steps(2)), [0, 50, 50, 50, 50, 100, 100, 100]),
    (multi_step((steps(2), epochs(1), .75), (.5, 1, .2)), [0, 0, 50, 50, 100, 100, 20, 20]),
    (acdc(steps(1), steps(7), every=steps(2)), [0, 100, 100, 0, 0, 100, 100, 100]),
    (rigl(steps(2), epochs(2), every=steps(2)), [0, 0, 100, 100, 100, 100, 100, 100]),
], ids=repr)
def test_a_table_in_steps(schedule, percents): assert table(schedule, 2, 4) == percents


@pytest.mark.parametrize('n_epochs, steps_per_epoch', [(1, 10), (3, 7), (7, 49), (10, 100), (41, 3)])
def test_no_time_is_a_step_off(n_epochs, steps_per_epoch):
    "Times are fractions of training, such as 1/3, and the progress is a float: each step is tried."
    total = n_epochs * steps_per_epoch
    for n in range(total):
        after = one_shot(at=steps(n)).over(n_epochs, steps_per_epoch)
        assert (after(n / total), after((n + 1) / total)) == (0, 1)
        ramp = linear(steps(n), steps(total), every=steps(3)).over(n_epochs, steps_per_epoch)
        changes = [i for i in range(n + 1, total + 1) if ramp(i / total) != ramp((i - 1) / total)]
        assert changes == [*range(n + 3, total, 3), total]


def test_where_the_sparsity_changes_it_is_that_of_every_step():
    smooth, held = gradual(steps(10), steps(70)).over(2, 50), gradual(steps(10), steps(70), every=steps(20)).over(2, 50)
    assert [held(i / 100) for i in (30, 50, 70)] == pytest.approx([smooth(i / 100) for i in (30, 50, 70)])
    assert [held(i / 100) for i in (11, 29, 31, 49)] == pytest.approx([0, 0, smooth(.3), smooth(.3)])


@pytest.mark.parametrize('name', SCHEDULES)
def test_shares_of_training_stay_as_they_are(name):
    schedule = SCHEDULES[name]()
    resolved = schedule.over(3, 7)
    assert resolved == schedule
    assert all(type(value) is Fraction for value in resolved._times().values())
    assert [resolved(i / 21) for i in range(22)] == [schedule(i / 21) for i in range(22)]


def test_times_are_exact_fractions_of_training():
    schedule = gradual(start=epochs(1.1), end=steps(20), every=steps(2))
    resolved = schedule.over(n_epochs=3, steps_per_epoch=10)
    assert (resolved.start, resolved.end, resolved.every) == (Fraction(11, 30), Fraction(2, 3), Fraction(1, 15))
    assert resolved.over(5, 5) == resolved and schedule.end == steps(20)


IN_TIMES = [
    "gradual(start=epochs(2), end=epochs(8), every=steps(100), initial=50)",
    "one_shot(at=epochs(1.5))",
    "iterative(start=0.1, end=steps(9), every=0.1, n_steps=3)",
    "dense_sparse_dense(start=epochs(1), end=steps(500))",
    "linear(start=0.1, end=0.75, initial=33.3)",
    "gradual(start=0.1, end=0.75, every=steps(100), swap=0.3, power=2)",
    "exponential(start=0.1, end=0.75, rate=2)",
    "multi_step(at=(epochs(1), steps(500)), shares=(1, 0.5))",
    "acdc(start=epochs(10), end=epochs(85), every=epochs(5))",
    "rigl(start=0.0, end=0.75, every=steps(100), swap=0.3)",
]


@pytest.mark.parametrize('typed', IN_TIMES)
def test_a_schedule_in_times_is_a_value(typed):
    schedule = eval(typed)
    assert repr(schedule) == typed
    for copied in (pickle.loads(pickle.dumps(schedule)), deepcopy(schedule), eval(typed)):
        assert copied == schedule and hash(copied) == hash(schedule) and repr(copied) == typed
    with pytest.raises(AttributeError): schedule.initial = 1


def test_times_are_values():
    assert repr([steps(100), epochs(2), epochs(1.5)]) == '[steps(100), epochs(2), epochs(1.5)]'
    assert repr([steps(np.int64(3)), epochs(np.float32(1.5))]) == '[steps(3), epochs(1.5)]'
    assert steps(1) == steps(1) != steps(2) and steps(1) != epochs(1) and len({epochs(2), epochs(2.)}) == 1
    with pytest.raises(AttributeError): steps(1).n = 2


@pytest.mark.parametrize('make, says', [
    (lambda: steps(-1), r'schedule: got steps\(-1\), expected a whole number of steps, 0 or more'),
    (lambda: steps(1.5), r'got steps\(1.5\)'), (lambda: steps(True), r'got steps\(True\)'), (lambda: steps('a'), r"got steps\('a'\)"),
    (lambda: epochs(-.5), r'schedule: got epochs\(-0.5\), expected a number of epochs, 0 or more'),
    (lambda: epochs(float('nan')), r'got epochs\(nan\)'), (lambda: epochs(float('inf')), r'got epochs\(inf\)'),
    (lambda: epochs(None), r'got epochs\(None\)'), (lambda: epochs(False), r'got epochs\(False\)'),
    (lambda: gradual(start=epochs(3), end=epochs(2)), r'got start=epochs\(3\) and end=epochs\(2\), expected start < end'),
    (lambda: dense_sparse_dense(start=steps(3), end=steps(3)), 'expected start < end'),
    (lambda: gradual(end='8 epochs'), r"got end='8 epochs', expected a share of training, 0 to 1, steps\(n\) or epochs\(n\)"),
    (lambda: gradual(start=None), 'got start=None'),
    (lambda: gradual(every=0), 'got every=0, expected more than 0'), (lambda: gradual(every=steps(0)), r'got every=steps\(0\), expected more'),
    (lambda: gradual(every=100), 'got every=100, expected a share of training'), (lambda: iterative(every=-1), 'got every=-1'),
    (lambda: gradual(initial=.5), 'initial: got 0.5, expected 0, or 1 to 100 percent: write 50 for 50 %'),
    (lambda: iterative(initial=101), 'initial: got 101, expected a number from 0 to 100'),
    (lambda: gradual(initial=float('nan')), 'initial: got nan'),
])
def test_bad_times_are_refused(make, says):
    with pytest.raises(ValueError, match=says): make()


def test_an_initial_sparsity_that_is_no_number_is_refused():
    with pytest.raises(TypeError, match="initial: got '50%', .* did you mean 50?"): linear(initial='50%')
    with pytest.raises(TypeError): gradual(.1, .9, steps(3))  # by name only


@pytest.mark.parametrize('schedule, says', [
    (gradual(end=epochs(8)), r'schedule: got end=epochs\(8\), expected at most the 5 epochs of this fit'),
    (gradual(end=steps(21)), r'schedule: got end=steps\(21\), expected at most the 20 steps of this fit'),
    (one_shot(at=epochs(5.01)), r'got at=epochs\(5.01\)'),
    (dense_sparse_dense(start=epochs(6), end=1), r'got start=epochs\(6\)'),
    (gradual(every=epochs(6)), r'got every=epochs\(6\)'),
    (gradual(start=epochs(2), end=steps(8)), r'got start=epochs\(2\) and end=steps\(8\), expected start < end; an epoch has 4 steps here'),
    (multi_step((.5, epochs(6)), (0, 1)), r'got at\[1\]=epochs\(6\), expected at most the 5 epochs of this fit'),
    (multi_step((.9, epochs(1)), (0, 1)), r'got at\[0\]=0.9 and at\[1\]=epochs\(1\), expected at\[0\] < at\[1\]'),
    (rigl(every=steps(100)), r'got every=steps\(100\), expected at most the 20 steps of this fit'),
    (gradual(start=.5, end=steps(10)), r'got start=0.5 and end=steps\(10\)'),
])
def test_times_that_do_not_fit_the_training_are_refused(schedule, says):
    with pytest.raises(ValueError, match=says): schedule.over(5, 4)


def test_the_length_of_training_is_checked():
    for n_epochs, steps_per_epoch, says in ((0, 4, 'n_epochs: got 0'), (2, 1.5, 'steps_per_epoch: got 1.5'), ('2', 4, "n_epochs: got '2'")):
        with pytest.raises(ValueError, match=says): gradual().over(n_epochs, steps_per_epoch)
    with pytest.raises(ValueError, match='at most the 1 epoch of this fit'): gradual(end=epochs(2)).over(1, 4)


@pytest.mark.parametrize('schedule', [one_shot(at=steps(3)), dense_sparse_dense(end=steps(9)), gradual(.1, epochs(2)), iterative(every=steps(2)),
                                      rigl(every=steps(2)), acdc(every=steps(2))])
def test_what_needs_the_length_of_training_says_so(schedule):
    assert read_schedule(schedule) is schedule
    for call in (lambda: schedule(.5), schedule.plot):
        with pytest.raises(ValueError, match=r'schedule: got \w+=\w+\(\d\), expected \.over\(n_epochs=\.\.\., steps_per_epoch=\.\.\.\) first'): call()
    assert schedule.over(n_epochs=3, steps_per_epoch=10).plot()


def test_a_schedule_of_ones_own_is_checked_when_the_length_of_training_is_known():
    class steep(Ramp):
        def climb(self, passed): return 2 * passed
    with pytest.raises(ValueError, match='expected 0 to 1'): read_schedule(steep())
    schedule = read_schedule(steep(end=steps(20)))
    with pytest.raises(ValueError, match='schedule: got steep.* expected 0 to 1'): over_fit(schedule, 2, 10)
    def plain(progress): return progress
    assert over_fit(plain, 2, 10) is plain


# A sparsity to begin with

def test_what_a_schedule_begins_with():
    schedule = gradual(start=steps(2), end=steps(8), initial=50).over(1, 10)
    assert [schedule.begins_with(step / 10) for step in range(1, 11)] == [0, 0, *[50] * 8]
    assert [initial_at(schedule, p) for p in (.2, .3)] == [0, 50]
    assert one_shot().begins_with(.9) == dense_sparse_dense().begins_with(.5) == initial_at(lambda p: p, .5) == 0
    assert gradual().begins_with(.5) == 0


def test_the_share_does_not_depend_on_what_it_begins_with():
    assert [linear(0, 1, initial=50)(p) for p in (0, .25, 1)] == [0, .25, 1]


@pytest.mark.parametrize('share, found', [(0, [50, 50]), (.5, [115, 60]), (1, [180, 70])])  # of 200 weights each
def test_each_entry_goes_from_the_initial_sparsity_to_its_own(share, found):
    net = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 10))
    Sparsifier(net, layers=['0', '1']).sparsify_model({'0': 90, '1': 35}, share, initial=25)
    assert list(zeros(net).values()) == found


@pytest.mark.parametrize('initial, share, found', [(25, 0, 6), (25, .5, 9), (25, 1, 12), (50, 0, 12), (0, .5, 6)])  # of 24 weights
def test_a_pattern_begins_with_a_part_of_its_zeros(initial, share, found):
    net = nn.Sequential(nn.Linear(8, 3))
    Sparsifier(net, context='2:4', layers='0').sparsify_model(50, share, initial=initial)
    assert zeros(net) == {'0.weight': found}


def test_initial_sparsities_that_cannot_be_are_refused(net):
    before = [p.detach().clone() for p in net.parameters()]
    for sparsity, initial, says in ((40, 50, 'initial: got 50, expected at most the sparsity 40'), (40, .5, 'write 50 for 50 %'),
                                    ({'0': 90, '3': 33.3}, 50, 'at most the sparsity 33.3'), (40, -1, 'initial: got -1')):
        with pytest.raises(ValueError, match=says): Sparsifier(net).sparsify_model(sparsity, initial=initial)
    with pytest.raises(TypeError, match='initial: got None'): Sparsifier(net).sparsify_model(40, initial=None)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
