"Follow a schedule through one fit: what is due at each step, and what was done last."
from fractions import Fraction
from typing import NamedTuple

from fasterai.schedule import Schedule, Time, as_due, initial_at, needs_length, over_fit, steps_until


class Wanted(NamedTuple):
    "Say what an event shall make."
    share: float = 0.  # of the sparsity, 0 to 1
    initial: float = 0.  # the sparsity that a share of 0 stands for, percent
    swap: float = 0.  # share of the weights that live to be exchanged, 0 to 1
    nth: int = 0  # number of the exchange

    @property
    def sparsity(self) -> tuple:  # share, initial
        "Return what says how many weights shall be zero."
        return self[:2]


class Timetable:
    "Hold a schedule over one fit, and how far it has come."

    def __init__(self,
        schedule: Schedule,  # as the user gave it
        start: float = 0.,  # progress of training with which the fit begins, more than 0 where it resumes
        rewind_to: float | Time | None = None,  # time in the training to which the weights go back after the last event; None: they do not
    ):
        self.schedule, self.start, self.rewind_to = schedule, start, rewind_to
        self.remember, self.last = None, None  # steps that are done at that time, and with the last event; None: not known, or nothing to do
        self.placed, self.length = None, None  # the schedule over a fit of (epochs, steps an epoch)
        self.progress = 0.  # of training, 0 to 1
        self.done = Wanted()  # what the last event has made

    @property
    def share(self) -> float:
        "Return the share of the sparsity that the last event made, 0 to 1."
        return self.done.share

    @property
    def needs_length(self) -> bool:
        "Tell whether the schedule has times in steps or epochs."
        return needs_length(self.schedule)

    def place(self,
        n_epochs: int | Fraction,
        n_steps: int,  # an epoch
    ):
        "Place the schedule in a fit of this length; `ValueError` where its times do not fit."
        if self.length == (n_epochs, n_steps): return
        first = self.placed is None
        self.placed, self.length = over_fit(self.schedule, n_epochs, n_steps), (n_epochs, n_steps)
        if first: self.done = self.done._replace(nth=self.due(self.start).nth)
        if self.rewind_to is not None: self._place_rewinding(n_epochs, n_steps)

    def _place_rewinding(self, n_epochs, n_steps):
        n, got = int(n_epochs * n_steps), f'rewind_to: got {self.rewind_to!r}'
        remember = steps_until(self.rewind_to, n_epochs, n_steps, got)
        last, start = self._last_event(n), self.start * n
        if last == n:
            raise ValueError(f'{got} with a last event at the end of the training, '
                             'expected a schedule that ends earlier: what is rewound must train')
        if remember >= last:
            raise ValueError(f'{got}, expected a time before the last event, step {last} of {n}')
        if start >= last: return  # it was rewound before
        if start > remember:
            raise ValueError(f'{got} in a fit that resumes at step {start:.0f}, expected a later time: '
                             'the weights of then are not known')
        self.remember, self.last = remember, last

    def _last_event(self, n):
        "Return how many of n steps are done with the last event."
        end = self.due(1.)
        return 1 + next((i for i in range(n - 1, 0, -1) if self.due(i / n) != end), 0)

    def remembers(self,
        done: int,  # steps
    ) -> bool:
        "Tell whether it is time to remember the weights, or later."
        return self.remember is not None and done >= self.remember

    @property
    def rewinds(self) -> bool:
        "Tell whether the last event was made, so that the weights go back."
        if self.last is None: return False
        n = self.length[0] * self.length[1]
        return self.progress >= self.last / n and self.done == self.due(1.)

    def due(self,
        progress: float,  # of training, 0 to 1
    ) -> Wanted:
        "Return what shall be made at a progress of training."
        share, swap, nth = as_due(self.placed(progress))
        return Wanted(float(share), initial_at(self.placed, progress), float(swap), nth)

    @property
    def is_due(self) -> bool:
        "Tell whether something else shall be made at this progress than the last event has made."
        return self.due(self.progress) != self.done

    def swap_of(self,
        due: Wanted,
    ) -> float:  # 0 to 1
        "Return the share of the weights that live to be exchanged now: an exchange is made once."
        return due.swap if due.nth != self.done.nth else 0.

    def falls_to(self,
        due: Wanted,
    ) -> bool:
        "Tell whether the sparsity falls, so that weights come back."
        return any(now < before for now, before in zip(due.sparsity, self.done.sparsity))

    @property
    def at_end(self) -> bool:
        "Tell whether the sparsity is the one with which the training ends."
        return self.placed is not None and self.due(1.).sparsity == self.done.sparsity
