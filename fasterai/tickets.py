"Find a ticket: the sparse network that trains from its first weights as well as the dense one."
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil, log

import torch
from fastai.callback.core import Callback, CancelBatchException
from torch import nn

from fasterai.arguments import callable_with, flag, name_of, percent, whole
from fasterai.batches import TrainingBatches, loss_of
from fasterai.keep import Keeper, KeepSparse
from fasterai.kinds import EVIDENCE
from fasterai.masks import unpacked
from fasterai.names import bare
from fasterai.plot import new_axes, plot_tradeoff
from fasterai.progress import progress
from fasterai.rules import Rules, takes_rules
from fasterai.schedule import Time, check_time, steps_until
from fasterai.sensitivity import metric_of, without_output
from fasterai.shards import refuse_shards
from fasterai.snapshot import Snapshot
from fasterai.sparsifier import Sparsifier
from fasterai.tables import Shown

KEEPS = .8  # of the weights that are left, in each round of Frankle & Carbin 2019
TICKET, ANEW, SHUFFLED = 'ticket', 'new initial weights', 'random mask'  # what is trained
OF_WEIGHTS = {'weight', 'noise', 'initial'}  # evidence for which no data are needed


@dataclass(repr=False)
class Ticket(Shown):
    """Hold a ticket: the masks, and the weights from which it trains. It prints as a table.

    `find_ticket` returns it, complete or as far as it came."""
    rules: Rules
    levels: tuple  # percent of zeros of each round, from 0 on, as asked for
    metric: str  # the metric's name
    compares: bool  # whether other networks are trained beside it
    start: Snapshot | None = None  # the weights from which it trains
    bits: list = field(default_factory=list)  # for each round that is done, and the next: its masks, packed
    sparsities: list = field(default_factory=list)  # of these rounds: percent of zeros, measured
    values: dict = field(default_factory=dict)  # {(what was trained, number of the round): the metric}

    @property
    def masks(self) -> dict:  # {layer's name: bool, of the weight's shape, True = keep}
        "Return the masks of the last round that is done, as `KeepSparse(masks=…)` takes them."
        if not self.done: raise ValueError('masks: there are none before the first round is done')
        return self.masks_of(self.done - 1)

    def masks_of(self,
        nth: int,  # number of a round, 0 is the dense network
    ) -> dict:  # as `masks`
        "Return the masks of one round that is done."
        packed = self.bits[nth].items()
        return {name: unpacked(name, bits, torch.empty(bits['shape'])) for name, bits in packed}

    @property
    def done(self) -> int:
        "Return how many rounds are done, with the dense one."
        return sum(what == TICKET for what, _ in self.values)

    def put_into(self,
        model: nn.Module,  # of the same names and shapes
    ) -> Sparsifier:  # of the model, with the masks
        "Make a model the ticket, ready to be trained: its first weights, with zeros where it is pruned."
        refuse_shards(model, 'a ticket')
        sparsifier = Sparsifier(model, **self.rules.given)
        sparsifier.masks.update(self.masks)
        sparsifier.rewind(self.start)
        return sparsifier

    @property
    def jobs(self) -> list:  # of (what is trained, number of the round)
        "Return what is not trained yet, in order: first all rounds of the ticket."
        rounds = range(1, len(self.levels))
        jobs = [(TICKET, i) for i in (0, *rounds)]
        if self.compares: jobs += [(what, i) for i in rounds for what in (ANEW, SHUFFLED)]
        return [job for job in jobs if job not in self.values]

    def _names(self): return (TICKET, ANEW, SHUFFLED) if self.compares else (TICKET,)

    def _cells(self):
        yield 'round', 'zeros', *self._names()
        for i, sparsity in enumerate(self.sparsities[:self.done]):
            found = [self.values.get((what, i)) for what in self._names()]
            yield str(i), f'{sparsity:.2f} %', *('' if one is None else f'{one:.4g}' for one in found)

    @property
    def title(self) -> str:
        "Say in one line what was measured, and how far it came."
        text = f'{self.metric} after training, round 0 is dense'
        if not self.jobs: return text
        n = len(self.jobs)
        return f'{text}; {n} trainings are left, find_ticket(…, so_far=…) goes on with them'

    def to_frame(self):
        "Return a pandas DataFrame with one row for each round."
        import pandas as pd
        rows = {sparsity: {what: self.values.get((what, i)) for what in self._names()}
                for i, sparsity in enumerate(self.sparsities[:self.done])}
        return pd.DataFrame.from_dict(rows, orient='index').rename_axis(index='zeros (%)')

    def plot(self,
        ax=None,  # matplotlib axes to draw on; new ones if None
    ):
        "Draw the metric against the sparsity, a curve for each network that was trained; return the axes."
        curves = {}
        for (what, i), value in self.values.items():
            if i: curves.setdefault(what, []).append((self.sparsities[i], value))
        if not curves:
            raise ValueError('plot: there is nothing to draw before the first pruned round is done')
        if ax is None: ax = new_axes()
        ax.axhline(self.values[TICKET, 0], color='#606060', ls='--', lw=1, label='dense')
        return plot_tradeoff(curves, ax, self.metric)


@takes_rules
def find_ticket(
    learn,  # a fastai Learner with the network as it begins; it is left as it came
    fit: Callable,  # trains once: a function of the Learner, as `lambda learn: learn.fit_one_cycle(5, 1e-2)`
    sparsity: float = 90,  # percent of the selected weights that are zero in the end
    rounds: int | None = None,  # in how many rounds, each of which keeps the same share of what is left; None: about 80 % in each
    rewind_to: float | Time = 0,  # the time in the training to which each round goes back: a share, 0 to 1, or `steps(n)`, `epochs(n)`; 0: the initial weights
    compare: bool = True,  # train two others at each sparsity: the same masks with new initial weights, and random masks of as many weights in each layer
    initialize: Callable | None = None,  # gives a network new initial weights in place, for `compare`; None: by `reset_parameters` of its modules
    so_far: Ticket | None = None,  # an incomplete one, to go on with
    granularity='weight',  # as in `Sparsifier`
    context='global',  # as in `Sparsifier`
    criteria='magnitude',  # as in `Sparsifier`
    layers=None,  # as in `Sparsifier`
    **kwargs,  # the other rules, as in `Rules`
) -> Ticket:
    """Find a lottery ticket: train, prune, rewind, and so on (Frankle & Carbin 2019; Frankle 2020).

    A round begins at `rewind_to`, and skips the batches before it. The metric is the Learner's first, or its
    loss, at the end. Ctrl-C returns what is done, to go on with by `so_far`. A wrong argument raises
    `TypeError` or `ValueError`, which names it."""
    rules = Rules(granularity, context, criteria, layers, **kwargs)
    _check(learn, fit, rules, rewind_to, compare, initialize)
    metric, _ = metric_of(learn)
    ticket = Ticket(rules, _levels(sparsity, rounds), metric.__name__, compare)
    if so_far is not None: ticket = _going_on(so_far, ticket)
    search = _Search(learn, fit, ticket, rewind_to, initialize or _reset, metric)
    try:
        with without_output(learn), search.putting_back():
            for job in progress(ticket.jobs): search.do(*job)
    except KeyboardInterrupt: pass  # what is done is returned
    return ticket


def _check(learn, fit, rules, rewind_to, compare, initialize):
    if not hasattr(learn, 'validate') or not isinstance(getattr(learn, 'model', None), nn.Module):
        raise TypeError(f'learn: got {type(learn).__name__}, expected a fastai Learner')
    keepers = [cb for cb in learn.cbs if isinstance(cb, Keeper)]
    if keepers:
        raise ValueError(f'learn: got one with {keepers[0].name}, expected none that holds or prunes weights')
    callable_with('fit', fit, 1, 'a function of the Learner')
    check_time(rewind_to, f'rewind_to: got {rewind_to!r}')
    of_steps = [name for name in rules.evidence if EVIDENCE[name].on_step and not EVIDENCE[name].on_batch]
    if of_steps:
        raise ValueError(f'criteria: got {rules.criteria!r}, which needs {of_steps[0]} of all steps, '
                         'expected one of the weights or of data')
    if not flag('compare', compare): return
    if initialize is not None:
        callable_with('initialize', initialize, 1, 'a function of the network')
        return
    modules = bare(learn.model).named_modules()
    fixed = [name or '(the model)' for name, m in modules if _has_own(m) and not _reset_of(m)]
    if fixed:
        raise ValueError(f'initialize: got None, expected a function of the network with compare=True: '
                         f'{fixed[0]!r} has no reset_parameters()')


def _levels(sparsity, rounds):
    "Return the sparsity of each round in percent, from 0 on."
    left = 1 - percent(sparsity)
    if not 0 < left < 1:
        raise ValueError(f'sparsity: got {sparsity!r}, expected more than 0 and less than 100')
    if rounds is None: rounds = max(1, ceil(round(log(left) / log(KEEPS), 6)))
    whole('rounds', rounds)
    between = [100 * (1 - float(left) ** (i / rounds)) for i in range(rounds)]
    return *between, float(100 * (1 - left))


def _going_on(so_far, asked):
    "Return a ticket to go on with; `TypeError` or `ValueError` where it is of another search."
    if not isinstance(so_far, Ticket):
        raise TypeError(f'so_far: got {type(so_far).__name__}, expected what find_ticket has returned')
    if so_far.levels != asked.levels:
        raise ValueError(f'so_far: got one with {_words(so_far)}, expected {_words(asked)} as in this call')
    so_far.rules, so_far.metric, so_far.compares = asked.rules, asked.metric, asked.compares
    return so_far


def _words(ticket): return f'{len(ticket.levels) - 1} rounds up to {ticket.levels[-1]:g} %'


class Begin(Callback):
    "Remember the weights at a time in a training, or skip what comes before and go back to them."
    order = 5  # MixedPrecision opens a context with each batch, which one that is skipped later would not close

    def __init__(self,
        time: float | Time,  # in the training
        start: Snapshot | None = None,  # to go back to; None: it is taken
    ):
        self.time, self.start, self.skips, self.begun = time, start, start is not None, False

    def before_batch(self):
        if self.begun or not self.training or hasattr(self.learn, 'lr_finder'): return
        got, n = f'rewind_to: got {self.time!r}', self.n_epoch * self.n_iter
        until = steps_until(self.time, self.n_epoch, self.n_iter, got)
        if until >= n:
            raise ValueError(f'{got}, expected a time before the end of the training, step {n}')
        early = self.epoch * self.n_iter + self.iter < until
        if early and self.skips: raise CancelBatchException
        if early: return
        self.begun, model = True, bare(self.learn.model)
        if self.skips: self.start.write_into(model, self.learn.opt)
        else: self.start = Snapshot(model, self.learn.opt)


def _reset(model):
    "Give the modules of a network new initial weights."
    for module in model.modules():
        reset = _reset_of(module)
        if reset is not None: reset()


def _reset_of(module): return getattr(module, 'reset_parameters', getattr(module, '_reset_parameters', None))
def _has_own(module): return any(p is not None for p in module._parameters.values())


class _Search:
    "Do the trainings of a ticket with a Learner, and note in the ticket what each has found."

    def __init__(self, learn, fit, ticket, rewind_to, initialize, metric):
        self.learn, self.fit, self.ticket, self.metric = learn, fit, ticket, metric
        self.rewind_to, self.initialize = rewind_to, initialize
        self.model = bare(learn.model)
        refuse_shards(self.model, 'tickets')
        self.came = Snapshot(self.model)
        # it is made before the first training: some criteria ask for the initial weights
        self.sparsifier = Sparsifier(self.model, **ticket.rules.given, **self._more())

    def _more(self):
        batches = TrainingBatches(self.learn)
        more = {'example': lambda: next(iter(batches))[0]}
        if {*self.ticket.rules.evidence} <= OF_WEIGHTS: return more
        return more | {'data': batches, 'loss_func': loss_of(self.learn)}

    @contextmanager
    def putting_back(self):
        "Leave the Learner's network, and its optimizer, as they were before the first training."
        try: yield
        finally:
            self.came.restore()
            self._clear_optimizer()

    def do(self,
        what: str,  # is trained
        nth: int,  # round
    ):
        "Train one network of a round, and note what it has found: all of it, or nothing."
        ticket = self.ticket
        masks = ticket.masks_of(nth) if nth else {}
        if what == SHUFFLED: masks = {name: self._shuffled(name, keep) for name, keep in masks.items()}
        if what == ANEW:
            self.initialize(self.model)
            ticket.values[what, nth] = self._trained([], masks)
            return
        if ticket.start is not None: ticket.start.write_into(self.model)
        begin = Begin(self.rewind_to, ticket.start)
        value = self._trained([begin], masks)
        if not begin.begun:
            raise ValueError(f'fit: got {name_of(self.fit)}, which has trained no batch')
        if what == TICKET: self._prune(nth)
        ticket.start, ticket.values[what, nth] = begin.start, value

    def _trained(self, callbacks, masks):
        "Train once, and return the metric."
        rules = self.ticket.rules
        if masks: callbacks += [KeepSparse(rules.granularity, rules.layers, rules.exclude, masks)]
        self._clear_optimizer()
        with self.learn.added_cbs(callbacks): self.fit(self.learn)
        return self.metric(self.model)

    def _prune(self, nth):
        "Find the masks of the next round. Zeros that the trained network has go first."
        levels, found = self.ticket.levels, self.sparsifier.masks
        if not nth: self.ticket.bits, self.ticket.sparsities = [found.state_dict()], [0.]
        if nth + 1 == len(levels): return
        self.sparsifier.sparsify_model(levels[-1], levels[nth + 1] / levels[-1])
        self.ticket.bits[nth + 1:] = [found.state_dict()]
        self.ticket.sparsities[nth + 1:] = [self.sparsifier.sparsity]

    def _shuffled(self, name, keep):
        "Return a random mask that keeps as many groups of a layer."
        if name not in self.sparsifier.layers: return keep  # it is left whole
        grouping = self.sparsifier.layers[name].own
        alive = grouping.count(keep) > 0
        return grouping.expand(alive[torch.randperm(len(alive))]).contiguous()

    def _clear_optimizer(self):
        if self.learn.opt is not None: self.learn.opt.clear_state()
