"Make the events of one training. Fastai's callback, or an attached optimizer, says when a step comes."
from collections.abc import Mapping

from fasterai.allocation import fractions
from fasterai.names import bare
from fasterai.progress import hidden
from fasterai.repairing import repairs_of
from fasterai.rules import Rules
from fasterai.schedule import Ramp, Schedule, Time, check_initial, check_time
from fasterai.snapshot import Snapshot
from fasterai.summary import names_of_repairs, reached_line
from fasterai.timetable import Timetable, Wanted


class Driver:
    """Drive a Sparsifier through one training: make the events that a schedule asks for, repair the last one,
    and rewind after it."""

    def __init__(self,
        sparsifier,  # that prunes
        sparsity,  # as its `sparsify_model` takes it
        schedule: Schedule,
        repair=None,  # what the last event repairs, as in `Sparsifier`
        data=None,  # batches for it
        rewind_to: float | Time | None = None,  # time to which the weights go back after the last event; None: they do not
        start: float = 0.,  # progress with which the training begins, more than 0 where it resumes
    ):
        check_begin(sparsifier.rules, sparsity, schedule)
        self.sparsifier, self.sparsity, self.repair, self.data = sparsifier, sparsity, repair, data
        self.timetable = Timetable(schedule, start, rewind_to)
        self.snapshot, self.rewound = None, False  # the weights to go back to, between that time and the last event
        self.repaired, self.repaired_by = (), []  # what the repairs of the last event returned, and their names
        self.pruned, self.waiting = set(), frozenset()  # names of the layers of the last event, and of those that waited in it
        self.masked_before = self._masked()  # name of a layer: number of weights
        self.trouble = ''  # why the last event failed, or there was none
        self.find_asked()

    def find_asked(self):
        "Find the sparsity of each layer; refuse what means none of those that are selected."
        self.asked = fractions(self.sparsity, self.sparsifier.rules, self.sparsifier.selected)

    def _masked(self):
        return {name: mask.size - mask.left for name, mask in self.sparsifier.masks.of.items()}

    # Events

    def prune(self) -> bool:
        "Make an event, if one is due at this progress of the timetable; tell whether one was made."
        timetable, sparsifier = self.timetable, self.sparsifier
        if not timetable.is_due and not self._more_to_prune(): return False
        due = timetable.due(timetable.progress)
        regrow, swap = timetable.falls_to(due), timetable.swap_of(due)
        repairs = self._repairs_at(due)
        with hidden(), sparsifier.repairs.instead(repairs, self.data, bare(sparsifier.model)):
            change = sparsifier.sparsify_model(self.sparsity, due.share, regrow, due.initial, swap=swap)
        if change.repaired: self.repaired, self.repaired_by = change.repaired, names_of_repairs(repairs)
        timetable.done, self.pruned, self.waiting = due, {*sparsifier.layers}, change.waiting
        self.find_asked()
        return True

    def _repairs_at(self, due):
        "Return the repairs of an event: the criterion's own, and at the end of the schedule the user's."
        at_end = due == self.timetable.due(1.) and not self.timetable.falls_to(due)
        return repairs_of(self.sparsifier.rules, self.repair if at_end else None)

    def _more_to_prune(self):
        "Tell whether a layer learns now that did not at the last event, or is known of and was not."
        if not any(self.timetable.done.sparsity): return False
        layers, needed = self.sparsifier.layers, self.sparsifier.rules.criterion.evidence
        waiting = [layers[name] for name in self.waiting if name in layers]
        known = any(self.sparsifier.evidence.known(layer, needed) for layer in waiting)
        return known or self.pruned != {*layers}

    # Rewinding

    def remember(self,
        done: int,  # steps
        optimizer,  # the one that steps the model
    ):
        "Copy the weights, and what the optimizer keeps, at the time to go back to."
        if self.rewound or self.snapshot is not None or not self.timetable.remembers(done): return
        self.snapshot = Snapshot(bare(self.sparsifier.model), optimizer)

    def rewind(self,
        optimizer,  # the one that steps the model
    ) -> bool:
        """Rewind when the step of the last event is done: its gradient was that of other weights.

        It tells whether it did."""
        if self.snapshot is None or not self.timetable.rewinds: return False
        self.sparsifier.rewind(self.snapshot, optimizer)
        self.snapshot, self.rewound = None, True
        return True

    # Saving

    def state_dict(self) -> dict:
        "Return what was done, in numbers, names and tensors."
        snapshot = None if self.snapshot is None else self.snapshot.state_dict()
        return {'done': tuple(self.timetable.done), 'pruned': sorted(self.pruned),
                'waiting': sorted(self.waiting), 'rewound': self.rewound, 'snapshot': snapshot}

    def load_state_dict(self,
        state: dict,  # of `state_dict`
        optimizer,  # the one that steps the model
    ):
        "Go on from what was done; `ValueError`, and nothing changed, where a snapshot does not fit."
        snapshot = None
        if state['snapshot'] is not None:
            snapshot = Snapshot(bare(self.sparsifier.model), optimizer)
            snapshot.load_state_dict(state['snapshot'])
        self.snapshot, self.rewound = snapshot, state['rewound']
        self.timetable.done = Wanted(*state['done'])
        self.pruned, self.waiting = {*state['pruned']}, frozenset(state['waiting'])

    # What is said

    def reached(self,
        frozen: list | None = None,  # names of layers for which the schedule waits
    ) -> str:
        "Say what was asked and what was reached, and why it is another sparsity."
        sparsifier = self.sparsifier
        return reached_line(sparsifier.report(), self.asked, self._masked(), self.masked_before, frozen or [],
                            self.waiting, self.timetable, self.trouble, sparsifier.rules.round_to)


def check_choices(
    rules: Rules,
    sparsity,  # as the user gave it
    schedule: Schedule,
    repair,  # what the last event repairs
    rewind_to,  # a time, or None
):
    "Raise `TypeError` or `ValueError` where choices are wrong for any model, or do not go together."
    rules.check_sparsity(sparsity)
    check_begin(rules, sparsity, schedule)
    check_end(rules, repair, rewind_to)


def check_begin(
    rules: Rules,
    sparsity,  # as the user gave it
    schedule: Schedule,
):
    "Raise `ValueError` where a schedule begins with more zeros than it shall end with."
    if not isinstance(schedule, Ramp): return
    targets = sparsity.values() if isinstance(sparsity, Mapping) else [sparsity]
    wanted = [rules.fraction(target) for target in targets]
    check_initial(schedule.initial, wanted, f'schedule: got initial={schedule.initial!r}')


def check_end(
    rules: Rules,
    repair,  # what the last event repairs
    rewind_to,  # a time, or None
):
    "Raise `TypeError` or `ValueError` where what follows the last event cannot be."
    repairs_of(rules, repair)
    if rewind_to is None: return
    check_time(rewind_to, f'rewind_to: got {rewind_to!r}')
    if repair:
        raise ValueError(f'repair: got {repair!r} with rewind_to={rewind_to!r}, expected None: '
                         'what is repaired would be rewound')
