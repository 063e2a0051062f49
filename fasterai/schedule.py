"Say when, during training, which share of the target sparsity should be reached: schedules."
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, fields
from fractions import Fraction
from math import ceil, cos, exp, expm1, floor, inf, pi
from numbers import Integral, Rational, Real
from typing import NamedTuple

from fasterai.arguments import callable_with, is_whole, name_of, one_of, percent, whole


class Due(NamedTuple):
    "Say what is due at a progress of training, where weights shall be exchanged too; a schedule returns it."
    share: float  # of the target sparsity, 0 to 1
    swap: float = 0.  # of the weights of each layer that live, 0 to 1: so many are exchanged for others, by `regrow`
    nth: int = 0  # number of the exchange: one is made where it has changed


Schedule = Callable[[float], float | Due]
"""A function of the progress of training, 0 to 1, that returns the share of the target sparsity that should
be reached, 0 to 1, or `Due`, where weights shall be exchanged, too."""

TIMES = frozenset({'at', 'start', 'end', 'every'})  # arguments of schedules


class Time:
    "Say when in a training; `steps` and `epochs` are subclasses."
    def __repr__(self): return f'{type(self).__name__}({self.n!r})'


@dataclass(frozen=True, repr=False)
class steps(Time):
    """Give a time of a schedule in training steps: batches that the optimizer is given.

    `ValueError` if it is not a whole number of 0 or more."""
    n: int  # how many steps, 0 or more

    def __post_init__(self):
        if not is_whole(self.n, 0):
            raise ValueError(f'schedule: got {self}, expected a whole number of steps, 0 or more')
        object.__setattr__(self, 'n', int(self.n))

    def of(self, n_epochs, steps_per_epoch) -> Fraction:
        "Return which share of a training it is."
        return Fraction(self.n, n_epochs * steps_per_epoch)


@dataclass(frozen=True, repr=False)
class epochs(Time):
    """Give a time of a schedule in epochs; it may be a part of one, as `epochs(1.5)`.

    `ValueError` if it is not a number of 0 or more."""
    n: float  # how many epochs, 0 or more

    def __post_init__(self):
        n = self.n
        if isinstance(n, bool) or not isinstance(n, Real) or not 0 <= n < inf:
            raise ValueError(f'schedule: got {self}, expected a number of epochs, 0 or more')
        if isinstance(n, Integral): n = int(n)
        elif not isinstance(n, Rational): n = float(n)
        object.__setattr__(self, 'n', n)

    def of(self, n_epochs, steps_per_epoch) -> Fraction:
        "Return which share of a training it is. The number is read as it is written: 1.1 is 11/10."
        return Fraction(str(self.n)) / n_epochs


@dataclass(frozen=True, repr=False)
class Curve:
    """Hold the parameters of a schedule, check them, and draw it; each schedule of this file is a subclass.

    `ValueError` if a time is neither a share of training, 0 to 1, nor `steps` or `epochs`, or two times are
    not in order."""

    def __post_init__(self):
        for name, value in self._times().items():
            check_time(value, f'schedule: got {name}={value!r}')
        ordered = self._ordered()
        kinds = {_kind(value) for value in ordered.values()}
        if len(kinds) == 1: self._check_order({name: _number(value) for name, value in ordered.items()})

    def __repr__(self):
        given = [(one, getattr(self, one.name)) for one in fields(self)]
        shown = [f'{one.name}={value!r}' for one, value in given if one.repr or value != one.default]
        return f'{type(self).__name__}({", ".join(shown)})'

    def _times(self):
        "Return the times that are given, by name."
        given = {name: value for name, value in vars(self).items() if name in TIMES}
        return {name: value for name, value in given.items() if name != 'every' or value is not None}

    def _set_times(self, times):
        "Set all times that are given, by name."
        for name, value in times.items(): object.__setattr__(self, name, value)

    def _ordered(self):
        "Return the times that must be in order: all but the time between two changes."
        return {name: value for name, value in self._times().items() if name != 'every'}

    def _check_order(self, found, note=''):
        given, names = self._times(), list(found)
        for first, second in zip(names, names[1:]):
            if found[first] < found[second]: continue
            got = f'{first}={given[first]!r} and {second}={given[second]!r}'
            raise ValueError(f'schedule: got {got}, expected {first} < {second}{note}')

    @property
    def needs_length(self) -> bool:
        "Tell whether a time is in steps or epochs, so that the length of training must be known."
        return any(isinstance(value, Time) for value in self._times().values())

    def over(self,
        n_epochs: int,  # length of the training
        steps_per_epoch: int,  # batches
    ):  # a schedule of the same class
        """Return the same schedule with all times as exact fractions of a training of this length.

        `ValueError` where a time lies after the end of the training, or two times are not in order."""
        return self._over(whole('n_epochs', n_epochs), whole('steps_per_epoch', steps_per_epoch))

    def _over(self, n_epochs, steps_per_epoch):  # epochs may be a fraction: of a training that ends within one
        times, found, shares = self._times(), copy(self), {}
        for name, value in times.items():
            shares[name] = _share_in_fit(value, n_epochs, steps_per_epoch, f'schedule: got {name}={value!r}')
        found._set_times(shares)
        self._check_order(found._ordered(), f'; an epoch has {steps_per_epoch} steps here')
        return found

    def begins_with(self,
        progress: float,  # of training, 0 to 1
    ) -> float:  # percent of zeros
        "Return the sparsity that a share of 0 stands for at a progress of training."
        return 0.

    def share_of(self,
        name: str,  # of an argument, as 'start'
    ) -> float:  # 0 to 1
        "Return a time as a share of training; `ValueError` where the length of training must be known."
        value = self._times()[name]
        if not isinstance(value, Time): return float(value)
        raise ValueError(f'schedule: got {name}={value!r}, expected .over(n_epochs=..., steps_per_epoch=...) '
                         'first: the length of training must be known')

    def plot(self,
        ax=None,  # matplotlib axes to draw on; new ones if None
    ):
        "Draw the share of the target sparsity in percent over the progress of training; return the axes."
        return plot_schedule(self, ax=ax)


def _is_share(value):
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= value <= 1


def _kind(time): return type(time) if isinstance(time, Time) else Real
def _number(time): return time.n if isinstance(time, Time) else time


def _fraction(share):
    "Return a share as a fraction of the same value."
    return Fraction(share) if isinstance(share, Rational) else Fraction(float(share))


def check_time(
    time,  # what the user gave
    got: str,  # the begin of the error
):
    "Raise `ValueError` where something is no time in a training."
    if _is_share(time) or isinstance(time, Time): return
    raise ValueError(f'{got}, expected a share of training, 0 to 1, steps(n) or epochs(n)')


def steps_until(
    time: float | Time,  # in a training
    n_epochs: int | Fraction,  # length of the training
    steps_per_epoch: int,  # batches
    got: str,  # the begin of the error
) -> int:
    "Return how many steps are done at a time; `ValueError` where it lies after the end of the training."
    n, share = int(n_epochs * steps_per_epoch), float(_share_in_fit(time, n_epochs, steps_per_epoch, got))
    done = floor(share * n)
    return done if done / n >= share else done + 1


def _share_in_fit(time, n_epochs, steps_per_epoch, got):
    share = time.of(n_epochs, steps_per_epoch) if isinstance(time, Time) else _fraction(time)
    if share <= 1: return share
    raise ValueError(f'{got}, expected at most the {_length(time, n_epochs, steps_per_epoch)} of this fit')


def _length(time, n_epochs, steps_per_epoch):
    "Write how long a training is, in the unit of a time."
    in_steps = isinstance(time, steps)
    n, unit = (n_epochs * steps_per_epoch, 'step') if in_steps else (n_epochs, 'epoch')
    return f'{float(n):g} {unit}' if n == 1 else f'{float(n):g} {unit}s'


@dataclass(frozen=True, repr=False)
class one_shot(Curve):
    "Prune to the target sparsity in one step (one-shot pruning)."
    at: float | Time = .5  # when the network is pruned: after this share of training, 0 to 1, or `steps(n)`, `epochs(n)`

    def __call__(self, progress): return float(progress > self.share_of('at') or progress == 1)


@dataclass(frozen=True, repr=False)
class dense_sparse_dense(Curve):
    """Prune to the target sparsity in one step, and later let all weights train again.

    This is dense-sparse-dense training (DSD; Han et al. 2017). Pruned weights start again from zero."""
    start: float | Time = .25  # when the network is made sparse: after this share of training, 0 to 1, or `steps(n)`, `epochs(n)`
    end: float | Time = .75  # when it is dense again, in the same forms

    def __call__(self, progress):
        return float(self.share_of('start') < progress <= self.share_of('end') and progress < 1)


@dataclass(frozen=True, repr=False)
class Ramp(Curve):
    """Prune more and more from `start` on, up to the target sparsity at `end`.

    The sparsity is initial + (target - initial) · share, where the share climbs from 0 to 1. With `every` it
    changes at `start`, at `start` + `every`, and so on, and at `end`. With `swap` weights are exchanged at
    these times, but at the first and the last; the share of them falls to 0 by a cosine. A subclass has a
    method `climb`: from the share of the ramp that has passed, 0 to 1, to the share that is returned, 0 to 1.
    `ValueError` where an argument is out of its range, or `swap` is given without `every`."""
    start: float | Time = .1  # when pruning begins: after this share of training, 0 to 1, or `steps(n)`, `epochs(n)`
    end: float | Time = .75  # when the target is reached, in the same forms; then the network recovers
    every: float | Time | None = field(default=None, kw_only=True, repr=False)  # time between two changes of the sparsity; None: each step
    initial: float = field(default=0., kw_only=True, repr=False)  # sparsity at `start`, percent of zeros, 0 to 100
    swap: float = field(default=0., kw_only=True, repr=False)  # share of the weights of each layer that live to be exchanged for others, 0 to 1, at `start`

    def __post_init__(self):
        super().__post_init__()
        percent(self.initial, 'initial')
        if not _is_share(self.swap):
            raise ValueError(f'schedule: got swap={self.swap!r}, expected a share of the weights, 0 to 1')
        if self.swap and self.every is None:
            raise ValueError(f'schedule: got swap={self.swap!r} without every=, '
                             'the time between two exchanges')
        _check_every(self.every)

    def __call__(self, progress):
        start, end = self.share_of('start'), self.share_of('end')
        if progress <= start: return 0.
        if progress >= end: return 1.
        since, nth = progress - start, 0
        if self.every is not None:
            every = self.share_of('every')
            nth = _times_in(since, every)
            since = every * nth
        passed = min(since / (end - start), 1.)
        share = self.climb(passed)
        if not nth or not self.swap: return share
        return Due(share, self.swap * (1 + cos(pi * passed)) / 2, nth)

    def begins_with(self,
        progress: float,  # of training, 0 to 1
    ) -> float:  # percent of zeros
        "Return the sparsity that a share of 0 stands for: `initial` after `start`, nothing before."
        return self.initial if progress > self.share_of('start') else 0.


def _check_every(every):
    if every is None or _number(every) > 0: return
    raise ValueError(f'schedule: got every={every!r}, expected more than 0')


def _times_in(since, every):
    "Return how often a time has passed. It is rounded: a progress such as 1/3 is not exact."
    return floor(round(since / every, 6))


def _check_positive(name, value):
    if isinstance(value, Real) and not isinstance(value, bool) and 0 < value < inf: return
    raise ValueError(f'schedule: got {name}={value!r}, expected a number above 0')


@dataclass(frozen=True, kw_only=True, repr=False)
class gradual(Ramp):
    """Prune fast at first and slowly at the end, by a polynomial.

    This is gradual pruning, also called automated gradual pruning (AGP; Zhu & Gupta 2017). With `swap` it is
    gradual pruning with regrowth (GraNet; Liu et al. 2021). `ValueError` if `power` is not above 0."""
    power: float = field(default=3., repr=False)  # of the polynomial 1 - (1 - x)^power: 3 is a cubic, 1 a line

    def __post_init__(self):
        super().__post_init__()
        _check_positive('power', self.power)

    def climb(self, passed): return 1 - (1 - passed) ** self.power


@dataclass(frozen=True, kw_only=True, repr=False)
class exponential(Ramp):
    """Prune fast at first and slowly at the end, by an exponential.

    A target of 1 - e^-rate is reached by keeping the same share of what is left at each step: 95 % by a rate
    of 3. `ValueError` if `rate` is not above 0."""
    rate: float = field(default=3., repr=False)  # the share is (1 - e^(-rate x)) / (1 - e^-rate)

    def __post_init__(self):
        super().__post_init__()
        _check_positive('rate', self.rate)

    def climb(self, passed): return expm1(-self.rate * passed) / expm1(-self.rate)


class linear(Ramp):
    "Prune by the same amount at every step."
    def climb(self, passed): return passed


class cosine(Ramp):
    "Prune slowly, then fast, then slowly: half a cosine wave (cosine annealing)."
    def climb(self, passed): return (1 - cos(pi * passed)) / 2


class one_cycle(Ramp):
    """Prune slowly, then fast, then slowly, by a logistic curve.

    This is One-Cycle Pruning (Hubens et al. 2021), with α = 14 and β = 5."""
    def climb(self, passed): return (1 + exp(-14 + 5)) / (1 + exp(-14 * passed + 5))


@dataclass(frozen=True, kw_only=True, repr=False)
class iterative(Ramp):
    """Prune in equal steps, with training between them (iterative pruning; Han et al. 2015).

    `ValueError` if `n_steps` is not an integer of 1 or more."""
    n_steps: int = 3  # how many steps

    def __post_init__(self):
        super().__post_init__()
        if not is_whole(self.n_steps):
            raise ValueError(f'schedule: got n_steps={self.n_steps!r}, expected an integer of 1 or more')

    def climb(self, passed): return ceil(passed * self.n_steps) / self.n_steps


@dataclass(frozen=True, repr=False)
class rigl(Ramp):
    """Hold the sparsity, and exchange weights: the lowest go, and others come back, by `regrow`.

    With `regrow='gradient'`, and by default, this is RigL (Evci et al. 2020), with `'random'` SET (Mocanu et
    al. 2018); in both the sparsity is usually shared out by `context='erk'`. Each layer keeps its count."""
    start: float | Time = 0.  # when the network is made sparse: after this share of training, 0 to 1, or `steps(n)`, `epochs(n)`
    end: float | Time = .75  # when the exchange ends, in the same forms
    every: float | Time = field(default=.02, kw_only=True)  # time between two exchanges; in the paper `steps(100)`
    swap: float = field(default=.3, kw_only=True)  # share of the weights of each layer that live to be exchanged, 0 to 1, which falls by a cosine

    def climb(self, passed): return 1.


@dataclass(frozen=True, repr=False)
class acdc(Curve):
    """Train sparse and dense in turn, and at last sparse (AC/DC; Peste et al. 2021).

    After `start` the network is sparse for a time of `every`, then dense for as long, and so on; from `end`
    on it stays sparse. Pruned weights start again from zero in each dense phase."""
    start: float | Time = .1  # when the network is first made sparse: after this share of training, 0 to 1, or `steps(n)`, `epochs(n)`
    end: float | Time = .8  # when it is made sparse for the rest of training, in the same forms
    every: float | Time = field(default=.05, kw_only=True)  # length of a phase, in the same forms

    def __post_init__(self):
        super().__post_init__()
        _check_every(self.every)

    def __call__(self, progress):
        start, end = self.share_of('start'), self.share_of('end')
        if progress <= start: return 0.
        if progress > end or progress == 1: return 1.
        phase = -_times_in(start - progress, self.share_of('every'))  # from 1 on; the last step of a phase is in it
        return float(phase % 2)


@dataclass(frozen=True, repr=False)
class multi_step(Curve):
    """Change the sparsity at given times, to given shares of the target: up or down.

    Where it falls, weights come back by `regrow`. `ValueError` where there are not as many shares as times,
    or one is not between 0 and 1."""
    at: tuple = (.25, .5, .75)  # when the sparsity changes: after these shares of training, 0 to 1, or `steps(n)`, `epochs(n)`
    shares: tuple = (.5, .75, 1.)  # of the target sparsity, 0 to 1, one for each time

    def __post_init__(self):
        for name in ('at', 'shares'):
            given = getattr(self, name)
            if not isinstance(given, (tuple, list)) or not given:
                raise ValueError(f'schedule: got {name}={given!r}, expected a tuple')
            object.__setattr__(self, name, tuple(given))
        if len(self.at) != len(self.shares) or not all(map(_is_share, self.shares)):
            got = f'shares={self.shares!r} and at={self.at!r}'
            raise ValueError(f'schedule: got {got}, expected a share of 0 to 1 for each time')
        super().__post_init__()

    def _times(self): return {f'at[{i}]': time for i, time in enumerate(self.at)}
    def _set_times(self, times): object.__setattr__(self, 'at', tuple(times.values()))

    def __call__(self, progress):
        past = [share for name, share in zip(self._times(), self.shares) if progress > self.share_of(name)]
        if progress == 1: past = self.shares
        return float(past[-1]) if past else 0.


SCHEDULES = {
    'one_shot': one_shot,
    'iterative': iterative,
    'gradual': gradual,
    'linear': linear,
    'cosine': cosine,
    'one_cycle': one_cycle,
    'dense_sparse_dense': dense_sparse_dense,
    'exponential': exponential,
    'multi_step': multi_step,
    'acdc': acdc,
    'rigl': rigl,
}


def read_schedule(
    schedule: str | Schedule,  # a name in `SCHEDULES`, or a function from the progress of training to a share, each 0 to 1, or to `Due`
) -> Schedule:
    """Return the schedule for what the user gave.

    `ValueError` if a name is unknown or the schedule leaves 0 to 1 at one of 21 points of training;
    `TypeError` if it is neither a name nor a function. A schedule in steps or epochs cannot be called yet:
    `over_fit` checks it."""
    schedule = one_of('schedule', schedule, SCHEDULES, 'or a function of progress')
    if isinstance(schedule, type): schedule = schedule()
    callable_with('schedule', schedule, 1, 'a function of progress')
    if not needs_length(schedule): _check_shares(schedule)
    return schedule


def needs_length(
    schedule: Schedule,
) -> bool:
    "Tell whether a schedule has times in steps or epochs, so that it cannot be called before `over_fit`."
    return isinstance(schedule, Curve) and schedule.needs_length


def in_epochs(
    schedule: Schedule,
    *times: float | Time | None,  # other times of the same training
) -> list:  # of `epochs`
    "Return the times that are in epochs, so that their length must be known."
    of_schedule = schedule._times().values() if isinstance(schedule, Curve) else ()
    return [time for time in (*of_schedule, *times) if isinstance(time, epochs)]


def over_fit(
    schedule: Schedule,
    n_epochs: int | Fraction,  # length of the training
    steps_per_epoch: int,  # batches
) -> Schedule:  # that can be called
    "Return a schedule with all times as fractions of a training of this length; a plain function as it is."
    if not needs_length(schedule): return schedule
    found = schedule._over(n_epochs, steps_per_epoch)
    _check_shares(found)
    return found


def initial_at(
    schedule: Schedule,
    progress: float,  # of training, 0 to 1
) -> float:  # percent of zeros
    "Return the sparsity that a share of 0 stands for at a progress of training; 0 for a plain function."
    return schedule.begins_with(progress) if isinstance(schedule, Curve) else 0.


def check_initial(
    initial: float,  # percent of zeros
    targets: list,  # fractions of zeros
    got: str,  # the begin of the error
):
    "Raise `ValueError` where an initial sparsity is more than one of the sparsities that it leads to."
    least = min(targets, default=1)
    if percent(initial, 'initial') <= least: return
    raise ValueError(f'{got}, expected at most the sparsity {float(100 * least):.4g}')


def _check_shares(schedule):
    "Raise `ValueError` where a schedule leaves 0 to 1."
    for progress in (i / 20 for i in range(21)):
        given = schedule(progress)
        if all(isinstance(share, Real) and 0 <= share <= 1 for share in as_due(given)[:2]): continue
        gives = f'gives {given!r} at progress {progress:g}'
        raise ValueError(f'schedule: got {name_of(schedule)}, which {gives}, expected 0 to 1')


def as_due(
    given: float | Due,  # as a schedule returns it
) -> Due:
    "Return what a schedule returns as `Due`."
    return given if isinstance(given, Due) else Due(given)


def read_share(
    share: float,  # of the target sparsity, or of the weights that live, 0 to 1, as a schedule returns it
    argument: str = 'share',  # its name, for the error
) -> Fraction:
    "Read a share; `ValueError` where it is not between 0 and 1."
    if isinstance(share, bool) or not isinstance(share, Real) or not 0 <= share <= 1:
        raise ValueError(f'{argument}: got {share!r}, expected a number from 0 to 1')
    return Fraction(float(share))


def plot_schedule(
    schedule: str | Schedule,  # a name, or a function from the progress of training to a share, each 0 to 1
    ax=None,  # matplotlib axes to draw on; new ones if None
    **line,  # arguments of matplotlib's `plot`, for the line
):
    "Draw the share of the target sparsity in percent over the progress of training; return the axes."
    schedule = read_schedule(schedule)
    progress = [i / 500 for i in range(501)]
    percents = [100 * as_due(schedule(p)).share for p in progress]
    from fasterai.plot import new_axes  # only where a picture is drawn: it is slow to import
    if ax is None: ax = new_axes()
    ax.plot(progress, percents, **{'label': name_of(schedule)} | line)
    ax.set(xlabel='progress of training', ylabel='share of the target sparsity (%)', ylim=(-5, 105))
    return ax
