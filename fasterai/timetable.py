"Follow a schedule through one fit: what is due at each step, and what was done last."
from typing import NamedTuple

from fasterai.schedule import Schedule, as_due, initial_at, needs_length, over_fit


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
    ):
        self.schedule, self.start = schedule, start
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
        n_epochs: int,
        n_steps: int,  # an epoch
    ):
        "Place the schedule in a fit of this length; `ValueError` where its times do not fit."
        if self.length == (n_epochs, n_steps): return
        first = self.placed is None
        self.placed, self.length = over_fit(self.schedule, n_epochs, n_steps), (n_epochs, n_steps)
        if first: self.done = self.done._replace(nth=self.due(self.start).nth)

    def due(self,
        progress: float,  # of training, 0 to 1
    ) -> Wanted:
        "Return what shall be made at a progress of training."
        share, swap, nth = as_due(self.placed(progress))
        return Wanted(float(share), initial_at(self.placed, progress), float(swap), nth)

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
