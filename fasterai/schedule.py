"Say when, during training, which share of the target sparsity should be reached: schedules."
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, cos, exp, pi
from numbers import Real

from fasterai.arguments import callable_with, is_whole, name_of, one_of

Schedule = Callable[[float], float]
"""A function of the progress of training, 0 to 1, that returns the share of the target sparsity that should
be reached, 0 to 1."""


@dataclass(frozen=True)
class Curve:
    """Hold the parameters of a schedule, check them, and draw it; each schedule of this file is a subclass.

    `ValueError` if a time is not a share of training, 0 to 1, or two times are not in order."""

    def __post_init__(self):
        times = [(name, value) for name, value in vars(self).items() if name in ('at', 'start', 'end')]
        for name, value in times:
            if not _is_share(value):
                raise ValueError(f'schedule: got {name}={value!r}, expected a share of training, 0 to 1')
        for (first, a), (second, b) in zip(times, times[1:]):
            if a < b: continue
            raise ValueError(f'schedule: got {first}={a!r} and {second}={b!r}, expected {first} < {second}')

    def plot(self,
        ax=None,  # matplotlib axes to draw on; new ones if None
    ):
        "Draw the share of the target sparsity in percent over the progress of training; return the axes."
        return plot_schedule(self, ax=ax)


def _is_share(value):
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= value <= 1


@dataclass(frozen=True)
class one_shot(Curve):
    "Prune to the target sparsity in one step (one-shot pruning)."
    at: float = .5  # the share of training, 0 to 1, after which the network is pruned

    def __call__(self, progress): return float(progress > self.at or progress == 1)


@dataclass(frozen=True)
class dense_sparse_dense(Curve):
    """Prune to the target sparsity in one step, and later let all weights train again.

    This is dense-sparse-dense training (DSD; Han et al. 2017). Pruned weights start again from zero."""
    start: float = .25  # the share of training, 0 to 1, after which the network is sparse
    end: float = .75  # the share of training, 0 to 1, after which it is dense again

    def __call__(self, progress): return float(self.start < progress <= self.end and progress < 1)


@dataclass(frozen=True)
class Ramp(Curve):
    """Prune more and more from `start` on, up to the target sparsity at `end`.

    A subclass has a method `climb`: from the share of the ramp that has passed, 0 to 1, to the share of the
    target sparsity, 0 to 1."""
    start: float = .1  # the share of training, 0 to 1, after which pruning begins
    end: float = .75  # the share of training, 0 to 1, after which the target is reached; then the network recovers

    def __call__(self, progress):
        if progress <= self.start: return 0.
        if progress >= self.end: return 1.
        passed = (progress - self.start) / (self.end - self.start)
        return self.climb(passed)


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


@dataclass(frozen=True, kw_only=True)
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
    `TypeError` if it is neither a name nor a function."""
    schedule = one_of('schedule', schedule, SCHEDULES, 'or a function of progress')
    if isinstance(schedule, type): schedule = schedule()
    callable_with('schedule', schedule, 1, 'a function of progress')
    for progress in (i / 20 for i in range(21)):
        share = schedule(progress)
        if not isinstance(share, Real) or not 0 <= share <= 1:
            gives = f'gives {share!r} at progress {progress:g}'
            raise ValueError(f'schedule: got {name_of(schedule)}, which {gives}, expected 0 to 1')
    return schedule


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
    if ax is None:
        import matplotlib.pyplot as plt
        _, ax = plt.subplots(figsize=(5, 3))
    schedule = read_schedule(schedule)
    progress = [i / 500 for i in range(501)]
    percents = [100 * schedule(p) for p in progress]
    ax.plot(progress, percents, **{'label': name_of(schedule)} | line)
    ax.set(xlabel='progress of training', ylabel='share of the target sparsity (%)', ylim=(-5, 105))
    return ax
