"How much, and when: functions of progress (0 to 1) that give the share of the sparsity that is due."
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, cos, exp, pi
from numbers import Real

from fasterai.arguments import name_of, one_of


@dataclass(frozen=True)
class Schedule:
    "Called with the progress of training, 0 to 1, it returns the share that is due, 0 to 1."

    def __post_init__(self):
        times = [(n, v) for n, v in vars(self).items() if n in ('at', 'start', 'end')]
        for name, value in times:
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 1:
                raise ValueError(f'schedule: got {name}={value!r}, allowed is a share of training, 0 to 1')
        for (first, a), (second, b) in zip(times, times[1:]):
            if a >= b: raise ValueError(f'schedule: got {first}={a!r} and {second}={b!r}, allowed is {first} < {second}')

    def plot(self, ax=None):
        "Draw the curve; returns the matplotlib axes."
        return plot_schedule(self, ax=ax)


@dataclass(frozen=True)
class one_shot(Schedule):
    "All at once."
    at: float = .5  # the share of training after which it happens

    def __call__(self, progress): return float(progress >= self.at)


@dataclass(frozen=True)
class dense_sparse_dense(Schedule):
    "All at once, and later all back, from zero on (DSD, Han et al. 2017)."
    start: float = .25  # the share of training after which the network is sparse
    end: float = .75  # the share of training after which it is dense again

    def __call__(self, progress): return float(self.start <= progress < self.end)


@dataclass(frozen=True)
class Ramp(Schedule):
    "From 0 at `start` to 1 at `end`; a kind of ramp says how."
    start: float = .1  # the share of training after which it begins
    end: float = .75  # the share of training after which all is due; what follows is recovery

    def __call__(self, progress):
        if progress <= self.start: return 0.
        if progress >= self.end: return 1.
        return self.climb((progress - self.start) / (self.end - self.start))


class gradual(Ramp):
    "Fast first, slow at the end: the cubic of Zhu & Gupta 2017."
    def climb(self, u): return 1 - (1 - u) ** 3


class linear(Ramp):
    "The same amount at every step."
    def climb(self, u): return u


class cosine(Ramp):
    "Slow, fast, slow: half a wave."
    def climb(self, u): return (1 - cos(pi * u)) / 2


class one_cycle(Ramp):
    "Slow, steep, slow: the logistic of One-Cycle Pruning (Hubens et al. 2021), α = 14, β = 5."
    def climb(self, u): return (1 + exp(-14 + 5)) / (1 + exp(-14 * u + 5))


@dataclass(frozen=True, kw_only=True)
class iterative(Ramp):
    "Equal steps, with training between them (Han et al. 2015)."
    n_steps: int = 3  # how many

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.n_steps, bool) or not isinstance(self.n_steps, int) or self.n_steps < 1:
            raise ValueError(f'schedule: got n_steps={self.n_steps!r}, allowed is a whole number from 1 on')

    def climb(self, u): return ceil(u * self.n_steps) / self.n_steps


SCHEDULES = {s.__name__: s for s in (one_shot, iterative, gradual, linear, cosine, one_cycle, dense_sparse_dense)}


def read_schedule(
    schedule: str | Callable,  # a name in `SCHEDULES`, or any function of progress
) -> Callable:
    "The schedule that is meant; `ValueError` if it leaves 0 to 1 anywhere on the way."
    schedule = one_of('schedule', schedule, SCHEDULES, 'or a function of progress')
    if isinstance(schedule, type): schedule = schedule()
    for progress in (i / 20 for i in range(21)):
        due = schedule(progress)
        if not isinstance(due, Real) or not 0 <= due <= 1:
            raise ValueError(f'schedule: got {name_of(schedule)}, which gives {due!r} at progress {progress:g}, allowed is 0 to 1')
    return schedule


def plot_schedule(
    schedule: str | Callable,  # a name, or a function of progress
    ax=None,  # matplotlib axes to draw on; new ones if None
    **line,  # how the line is drawn, as in matplotlib's `plot`
):
    "Draw the share that is due over training; returns the axes."
    if ax is None:
        import matplotlib.pyplot as plt
        _, ax = plt.subplots(figsize=(5, 3))
    schedule = read_schedule(schedule)
    progress = [i / 500 for i in range(501)]
    ax.plot(progress, [100 * schedule(p) for p in progress], **{'label': name_of(schedule)} | line)
    ax.set(xlabel='progress of training', ylabel='share of the sparsity due (%)', ylim=(-5, 105))
    return ax
