"Prune in fastai's training loop: the callback says when, a `Sparsifier` does it."
from collections.abc import Callable, Iterator, Mapping

from fastai.learner import noop

from fasterai.batches import TrainingBatches, loss_of
from fasterai.data import check_batches
from fasterai.distil import read_distil
from fasterai.distilling import Distilling
from fasterai.driver import Driver, check_begin, check_end
from fasterai.epochs import Column, Trackers, saves_at_end, saves_every_epoch
from fasterai.fit_to import fit_to, read_budget
from fasterai.keep import Keeper, KeepSparse
from fasterai.layers import check_kinds, matching
from fasterai.names import Named
from fasterai.plot import plot_history
from fasterai.progress import hidden
from fasterai.recipes import with_recipe
from fasterai.rules import Rules, as_arguments, takes_rules
from fasterai.schedule import Time, needs_length, read_schedule
from fasterai.summary import (
    NOT_DISTILLED,
    anew_line,
    chosen_line,
    distilled_line,
    frozen_line,
    low_rate_line,
    not_run_line,
    repaired_line,
    rewound_line,
    zeros_line,
)


class SparsifyCallback(Keeper):
    """Prune a network while fastai trains it. The zeros stay in later fits.

    A wrong argument raises `TypeError` or `ValueError`, which names it: when the callback is made, or before
    the first batch where the model must be known."""
    order = Keeper.order - .1
    _stateattrs = (*Keeper._stateattrs, 'driver')
    driver = None  # of the last fit

    @takes_rules
    def __init__(self,
        sparsity=None,  # percent of the selected weights that shall be zero; or `{layer's name or glob: percent}`: the layers of one entry compete among themselves
        granularity: str | tuple | Callable = 'weight',  # which weights are pruned as one: a name, axes as `('I', 'kh')`, `block(4, 4)`, `head(8)`
        context: str | Callable = 'global',  # who competes with whom (the scope): a name, an N:M pattern as `'2:4'`, or a function
        criteria: str | Callable = 'magnitude',  # the importance of a weight: a name, or a function of `weight` and `grad`
        schedule: str | Callable = 'gradual',  # how much, and when: a name, `gradual(start=.2, end=.8)` and its like, or a function of progress
        layers=None,  # a type, name, glob, module, parameter, or a list of these; None: what a dict `sparsity` names, or all but embeddings
        data=None,  # batches for evidence and `repair`, as in `Sparsifier`; None: up to 512 of the items that are trained on
        repair=None,  # what the last event repairs, when the schedule is at its end, as in `Sparsifier`: 'refit', 'batchnorm', or both in a list
        ms: float | None = None,  # in place of `sparsity`: milliseconds that a call with `example` may take here, as in `fit_to`, which chooses before the first event
        bytes: float | None = None,  # in place of `sparsity`: bytes that the file may have, as in `fit_to`
        example=None,  # with `ms`, the batch whose latency counts, as in `fit_to`
        rewind_to: float | Time | None = None,  # after the last event all weights that are left, and the optimizer's state, go back to this time: a share of training, 0 to 1, or `steps(n)`, `epochs(n)`
        distil=None,  # share of the loss, 0 to 1, that comes from the outputs of the network as it was before the first event, which stays in memory until the end of the fit; or `distillation(...)`
        recipe: str | None = None,  # other defaults for `schedule` and `distil`: 'accurate' is for a trained network that is pruned far
        **kwargs,  # the other rules, as in `Rules`
    ):
        given = with_recipe(recipe, {'schedule': schedule, 'distil': distil})
        if isinstance(sparsity, Mapping) and sparsity: check_kinds(list(sparsity), 'sparsity')
        if layers is None and isinstance(sparsity, Mapping): layers = list(sparsity) or None
        self.rules = Rules(granularity, context, criteria, layers, **kwargs)
        self.budget, self.example = {} if sparsity is not None else {'ms': ms, 'bytes': bytes}, example
        self._check_budget(sparsity, ms, bytes)
        if not self.budget: self.rules.check_sparsity(sparsity)
        self.sparsity, self.schedule = sparsity, read_schedule(given['schedule'])
        self.repair, self.rewind_to = repair, rewind_to
        if not self.budget: check_begin(self.rules, sparsity, self.schedule)
        check_end(self.rules, repair, rewind_to)
        if data is not None: check_batches(data)
        self.data = list(data) if isinstance(data, Iterator) else data  # there may be several fits
        self.distilling = Distilling(self, read_distil(given['distil']))
        self.keeper, self.history = None, []
        self.column, self.trackers = Column(self), Trackers()

    # When

    def before_fit(self):
        if self._only_validates(): return
        self.trackers.resume()
        self.active = not hasattr(self.learn, 'lr_finder')
        if not self.active: return
        self._check_names()
        self._build(self.rules, **self._calibration())
        self.sparsifier.selected.include(self._frozen_for_a_while())
        if self.sparsity is None: self._choose()
        self._begin()
        self._leave_keeper()
        self.column.add(self.learn)
        self._announce()

    def before_epoch(self):
        if not self.active or self._only_validates(): return
        self.trackers.resume()
        self.column.remove(self.learn)
        self.trained = False

    def before_train(self): self.trained = True

    def before_batch(self):
        "Find the data flow with the first batch, and with it the layers that are left out."
        if not self.active or not self.training: return
        first = not self.begun
        super().before_batch()
        self._remember()
        if not first: return
        self.driver.find_asked()
        self._say(not_run_line(self.sparsifier.skipped))

    def after_batch(self):
        "Rewind when the step of the last event is done: its gradient was that of other weights."
        if not self.active or not self.training or not self.driver.rewind(self.learn.opt): return
        for cb in self._others(Keeper):
            if cb.active: cb.sparsifier.apply_masks()  # of layers that are not pruned here

    def after_train(self):
        "Prune once more after the last batch: GradientAccumulation or an overflow may have skipped its step."
        if not self.active: return
        super().after_train()
        if not self.begun: return
        more_to_come = self.epoch < self.n_epoch - 1 or self.iter < self.n_iter - 1
        if more_to_come: return
        try: self._prune()
        except ValueError as error: self.driver.trouble = f'the last event failed: {error}'

    def after_epoch(self):
        "Let trackers see only epochs at the final sparsity; one that a resumed fit skips is not saved again."
        if not self.active or self._only_validates(): return
        if not self.trained: return self.trackers.pause(self.learn)
        report = self.sparsifier.report()
        self.history.append({'epoch': self.epoch} | {row.layer: row.sparsity for row in report.rows})
        self.column.fill(self.learn, report.sparsity)
        if self.driver.timetable.at_end: self.compared = True
        else: self.trackers.pause(self.learn, spare=self._goes_on)

    def after_fit(self):
        if not self.active or self._only_validates(): return
        self.trackers.resume()
        if not self.compared:  # there is no best epoch to load
            self.trackers.pause(self.learn, spare=lambda cb: saves_at_end(cb) or self._goes_on(cb))

    def end(self):
        "Mask once more, when all other callbacks are done, and say what was reached."
        super().end()
        self.distilling.end(self.learn)
        if not self.active or not self.sparsifier.selected.candidates: return
        driver, frozen = self.driver, self._frozen_by_learner()
        if not self.begun: driver.trouble = 'there was no batch to train on'
        driver.snapshot = None
        if not frozen: self._say(rewound_line(driver.timetable, driver.rewound))
        self._say(repaired_line(driver.repaired_by, driver.repaired))
        self._say(distilled_line(self.distilling.teacher))
        self._say(low_rate_line(self.rate, driver.timetable))
        self._say(driver.reached(frozen))

    # What

    def _begin(self):
        "Set what is counted during a fit."
        start = self._resumes_at() / self.n_epoch if self.n_epoch else 0.
        self.driver = Driver(self.sparsifier, self.sparsity, self.schedule, self.repair, self._batches(),
                             self.rewind_to, start)
        n_steps = len(self.learn.dls.train)
        if n_steps and self.n_epoch and self._can_place(): self.driver.timetable.place(self.n_epoch, n_steps)
        self.distilling.begin(self.learn, self._resumes_at() > 0, any(self.driver.masked_before.values()))
        self.rate = None  # the learning rate when the target was reached, as a share of its peak
        self.compared, self.history = False, []  # whether there was an epoch at the final sparsity; sparsity of each layer by epoch

    def _can_place(self):
        """Tell whether the schedule can be placed in this fit.

        Steps and epochs are those of the part of fine_tune that trains all layers. They may be too many for
        the first part, in which the Learner has frozen some."""
        has_times = needs_length(self.schedule) or self.rewind_to is not None
        return not has_times or not self._frozen_by_learner()

    @property
    def _steps_done(self): return self.epoch * self.n_iter + self.iter

    def _prune(self):
        "Make an event, if one is due."
        timetable = self.driver.timetable
        timetable.progress = (self._steps_done + 1) / (self.n_epoch * self.n_iter)
        if self._frozen_by_learner(): return
        timetable.place(self.n_epoch, self.n_iter)  # there may be another number of batches than was known before
        if timetable.is_due: self.distilling.remember(self._model(), self._batch())
        if self.driver.prune(): self._mask_optimizer_state()
        if self.rate is None and timetable.at_end: self.rate = self._rate()

    def _rate(self):
        "Return the learning rate of this step as a share of the highest so far."
        now = self.opt.hypers[-1]['lr']
        recorder = getattr(self.learn, 'recorder', None)
        highest = max([now, *getattr(recorder, 'lrs', [])])
        return now / highest if highest else 1.

    def _remember(self):
        "Copy the weights at the time to go back to."
        if self.rewind_to is None or self._frozen_by_learner(): return
        self.driver.timetable.place(self.n_epoch, self.n_iter)
        self.driver.remember(self._steps_done, self.learn.opt)

    def _batches(self): return TrainingBatches(self.learn) if self.data is None else self.data

    def _calibration(self):
        "Return the data, and the loss, that a criterion needs beside the steps of a training."
        if not self.rules.needs_data: return {}
        return {'data': self._batches(), 'loss_func': loss_of(self.learn)}

    def _frozen_by_learner(self):
        "Return the layers that `learn.freeze`, `freeze_to` or `fine_tune` has frozen: their names."
        n = getattr(self.learn.opt, 'frozen_idx', 0)
        frozen = {id(p) for group in self.learn.opt.param_lists[:n] for p in group if not p.requires_grad}
        layers = self.sparsifier.selected.candidates.items()  # before the first batch the data flow is not known
        return [name for name, layer in layers if id(layer.weight) in frozen]

    def _frozen_for_a_while(self):
        "Return the frozen layers that will learn: those of the Learner, in a GAN those of both halves."
        is_gan = hasattr(self.learn, 'gan_trainer')
        return self.sparsifier.selected.candidates if is_gan else self._frozen_by_learner()

    def _check_budget(self, sparsity, ms, bytes):
        "Refuse a budget beside a sparsity, two budgets, and one that the rules cannot keep."
        others = {'ms': ms, 'bytes': bytes}
        if sparsity is None or any(value is not None for value in others.values()):
            read_budget(sparsity=sparsity, **others)
        if not self.budget: return
        rules, came = self.rules, as_arguments({k: v for k, v in self.budget.items() if v is not None})
        if ms is not None and self.example is None:
            raise ValueError(f'example: got None, expected one batch of inputs with {came}')
        if rules.granularity != 'weight':
            raise ValueError(f"granularity: got {rules.granularity!r}, expected 'weight' with {came}")
        if rules.context_info.sparsity is not None:
            raise ValueError(f'context: got {rules.context!r} with {came}, expected one for any sparsity')

    def _choose(self):
        "Choose the sparsity of each layer within the budget by magnitude, and say what was chosen."
        layers = list(self.sparsifier.selected.learning())
        model, data = self._model(), self._batches()
        with hidden(): found = fit_to(model, self.example, data, **self.budget, layers=layers)
        self.sparsity = found.sparsities
        self._say(chosen_line(found))

    def _goes_on(self, tracker):
        "Tell whether a tracker may see an epoch before the final sparsity."
        if saves_every_epoch(tracker): return True
        return bool(self._frozen_by_learner()) and tracker.reset_on_fit  # fine_tune: it begins anew in the second part

    def _check_names(self):
        "Refuse what means no layer of the model."
        if not isinstance(self.sparsity, Mapping): return
        named = Named(self._model())
        for choice in self.sparsity: matching(choice, named, named.weights, 'sparsity')

    def _leave_keeper(self):
        "Leave a `KeepSparse` with the Learner that keeps the zeros of these layers in later fits."
        in_use = [cb.keeper for cb in self._others(SparsifyCallback) if cb.active]
        earlier = [cb for cb in self._others(KeepSparse) if cb.left and cb not in in_use]
        names = list(self.sparsifier.selected.candidates)
        self.keeper = KeepSparse(self.rules.granularity, names)
        self.keeper.leave(self.sparsifier.masks, fit=1 + max([cb.left for cb in earlier], default=0))
        for cb in earlier:  # this one has begun with their masks
            alike = cb.rules.granularity == self.rules.granularity and {*cb.held.names} <= {*names}
            if alike: self.learn.remove_cb(cb)
        self.learn.add_cb(self.keeper)

    # What is said

    def _say(self, line):
        if line and self.learn.logger is not noop: print(f'sparsity: {line}')

    def _announce(self):
        "Say before the first epoch which layers are left alone, and which zeros are not held."
        self._say(frozen_line(self.sparsifier.selected.frozen))
        if not self.distilling.known: self._say(NOT_DISTILLED)
        if self._resumes_at(): self._say(anew_line(self.sparsifier.evidence.of_training))
        if self.rules.keep_zeros or self._resumes_at(): return
        self._say(zeros_line(self.sparsifier.selected.learning(), self.sparsifier.masks.of))

    def __repr__(self):
        asked = {name: value for name, value in self.budget.items() if value is not None}
        distil = self.distilling.teacher.choice
        given = (asked or {'sparsity': self.sparsity}) | self.rules.given | {'schedule': self.schedule}
        if self.repair: given['repair'] = self.repair
        if self.rewind_to is not None: given['rewind_to'] = self.rewind_to
        if distil is not None: given['distil'] = distil
        return f'{type(self).__name__}({as_arguments(given)})'

    def plot_sparsity(self,
        ax=None,  # matplotlib axes to draw on; new ones if None
    ):
        "Draw the measured sparsity of each layer by epoch, and return the axes."
        if not self.history:
            raise ValueError('plot_sparsity: there is nothing to draw before the first epoch of a fit')
        return plot_history(self.history, ax)
