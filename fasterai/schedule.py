"Say when, during training, which share of the target sparsity should be reached: schedules."
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, fields
from fractions import Fraction
from math import ceil, cos, exp, floor, inf, pi
from numbers import Integral, Rational, Real

from fasterai.arguments import callable_with, is_whole, name_of, one_of, percent, whole

Schedule = Callable[[float], float]
"""A function of the progress of training, 0 to 1, that returns the share of the target sparsity that should
be reached, 0 to 1."""

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
            if _is_share(value) or isinstance(value, Time): continue
            expected = 'a share of training, 0 to 1, steps(n) or epochs(n)'
            raise ValueError(f'schedule: got {name}={value!r}, expected {expected}')
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

    def _ordered(self):
        "Return the times that must be in order: all but the time between two changes."
        return {name: value for name, value in self._times().items() if name != 'every'}

    def _check_order(self, found, note=''):
        given, names = vars(self), list(found)
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
        whole('n_epochs', n_epochs)
        whole('steps_per_epoch', steps_per_epoch)
        times, found = self._times(), copy(self)
        for name, value in times.items():
            share = value.of(n_epochs, steps_per_epoch) if isinstance(value, Time) else _fraction(value)
            if share > 1:
                most = _length(value, n_epochs, steps_per_epoch)
                raise ValueError(f'schedule: got {name}={value!r}, expected at most the {most} of this fit')
            object.__setattr__(found, name, share)
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
        value = getattr(self, name)
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


def _length(time, n_epochs, steps_per_epoch):
    "Write how long a training is, in the unit of a time."
    in_steps = isinstance(time, steps)
    n, unit = (n_epochs * steps_per_epoch, 'step') if in_steps else (n_epochs, 'epoch')
    return f'{n} {unit}' if n == 1 else f'{n} {unit}s'


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
    changes at `start`, at `start` + `every`, and so on, and at `end`. A subclass has a method `climb`: from
    the share of the ramp that has passed, 0 to 1, to the share that is returned, 0 to 1."""
    start: float | Time = .1  # when pruning begins: after this share of training, 0 to 1, or `steps(n)`, `epochs(n)`
    end: float | Time = .75  # when the target is reached, in the same forms; then the network recovers
    every: float | Time | None = field(default=None, kw_only=True, repr=False)  # time between two changes of the sparsity; None: each step
    initial: float = field(default=0., kw_only=True, repr=False)  # sparsity at `start`, percent of zeros, 0 to 100

    def __post_init__(self):
        super().__post_init__()
        percent(self.initial, 'initial')
        if self.every is None or _number(self.every) > 0: return
        raise ValueError(f'schedule: got every={self.every!r}, expected more than 0')

    def __call__(self, progress):
        start, end = self.share_of('start'), self.share_of('end')
        every = None if self.every is None else self.share_of('every')
        if progress <= start: return 0.
        if progress >= end: return 1.
        since = progress - start
        if every: since = every * floor(round(since / every, 6))  # rounded: a progress such as 1/3 is not exact
        passed = since / (end - start)
        return self.climb(min(passed, 1.))

    def begins_with(self,
        progress: float,  # of training, 0 to 1
    ) -> float:  # percent of zeros
        "Return the sparsity that a share of 0 stands for: `initial` after `start`, nothing before."
        return self.initial if progress > self.share_of('start') else 0.


class gradual(Ramp):
    """Prune fast at first and slowly at the end, by a cubic.

    This is gradual pruning, also called automated gradual pruning (AGP; Zhu & Gupta 2017)."""
    def climb(self, passed): return 1 - (1 - passed) ** 3


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


SCHEDULES = {
    'one_shot': one_shot,
    'iterative': iterative,
    'gradual': gradual,
    'linear': linear,
    'cosine': cosine,
    'one_cycle': one_cycle,
    'dense_sparse_dense': dense_sparse_dense,
}


def read_schedule(
    schedule: str | Schedule,  # a name in `SCHEDULES`, or a function from the progress of training to a share, each 0 to 1
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


def over_fit(
    schedule: Schedule,
    n_epochs: int,  # length of the training
    steps_per_epoch: int,  # batches
) -> Schedule:  # that can be called
    "Return a schedule with all times as fractions of a training of this length; a plain function as it is."
    if not needs_length(schedule): return schedule
    found = schedule.over(n_epochs, steps_per_epoch)
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
        share = schedule(progress)
        if not isinstance(share, Real) or not 0 <= share <= 1:
            gives = f'gives {share!r} at progress {progress:g}'
            raise ValueError(f'schedule: got {name_of(schedule)}, which {gives}, expected 0 to 1')


def read_share(
    share: float,  # of the target sparsity, 0 to 1, as a schedule returns it
) -> Fraction:
    "Read how much of the target sparsity is wanted; `ValueError` where it is not between 0 and 1."
    if isinstance(share, bool) or not isinstance(share, Real) or not 0 <= share <= 1:
        raise ValueError(f'share: got {share!r}, expected a number from 0 to 1')
    return Fraction(float(share))


def plot_schedule(
    schedule: str | Schedule,  # a name, or a function from the progress of training to a share, each 0 to 1
    ax=None,  # matplotlib axes to draw on; new ones if None
    **line,  # arguments of matplotlib's `plot`, for the line
):
    "Draw the share of the target sparsity in percent over the progress of training; return the axes."
    schedule = read_schedule(schedule)
    progress = [i / 500 for i in range(501)]
    percents = [100 * schedule(p) for p in progress]
    if ax is None:
        import matplotlib.pyplot as plt
        _, ax = plt.subplots(figsize=(5, 3))
    ax.plot(progress, percents, **{'label': name_of(schedule)} | line)
    ax.set(xlabel='progress of training', ylabel='share of the target sparsity (%)', ylim=(-5, 105))
    return ax
