"Follow a schedule through one fit: what is due at each step, and what was done last."
from fasterai.schedule import Schedule, initial_at, needs_length, over_fit


class Timetable:
    "Hold a schedule over one fit, and how far it has come."

    def __init__(self,
        schedule: Schedule,  # as the user gave it
    ):
        self.schedule = schedule
        self.placed, self.length = None, None  # the schedule over a fit of (epochs, steps an epoch)
        self.progress = 0.  # of training, 0 to 1
        self.done = 0., 0.  # what the last event made: the share of the sparsity, 0 to 1, and what it begins with, percent

    @property
    def share(self) -> float:
        "Return the share of the sparsity that the last event made, 0 to 1."
        return self.done[0]

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
        self.placed, self.length = over_fit(self.schedule, n_epochs, n_steps), (n_epochs, n_steps)

    def due(self,
        progress: float,  # of training, 0 to 1
    ) -> tuple:  # the share of the sparsity, 0 to 1, and what it begins with, percent
        "Return what shall be pruned at a progress of training."
        return float(self.placed(progress)), initial_at(self.placed, progress)

    def falls_to(self,
        due: tuple,  # of `due`
    ) -> bool:
        "Tell whether the sparsity falls, so that weights come back."
        return any(now < before for now, before in zip(due, self.done))

    @property
    def at_end(self) -> bool:
        "Tell whether the sparsity is the one with which the training ends."
        return self.placed is not None and self.due(1.) == self.done
