"Prune in fastai's training loop: the callbacks say when, a `Sparsifier` does it."
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
from fastai.callback.core import Callback as FastaiCallback
from fastai.callback.training import GradientClip
from fastai.learner import SkipToEpoch, noop
from fastai.text.models.awdlstm import WeightDropout

from fasterai.allocation import fractions
from fasterai.arguments import known_arguments, name_of
from fasterai.epochs import Column, Trackers, saves_at_end, saves_every_epoch
from fasterai.granularity import add_layer_type
from fasterai.layers import check_kinds, choose, matching
from fasterai.names import Named, bare
from fasterai.rules import Rules, as_arguments, takes_rules
from fasterai.schedule import Ramp, check_initial, initial_at, needs_length, over_fit, read_schedule
from fasterai.sparsifier import Sparsifier
from fasterai.zeros import count_zeros

add_layer_type(WeightDropout, **{'weight_*_raw': 'O I'})  # fastai's AWD_LSTM makes the weights that it drops from these


class KeepSparse(FastaiCallback):
    """Keep the zeros of a network zero in a fit.

    `SparsifyCallback` leaves one with the Learner, which keeps its masks in every later fit, by the names of
    the layers. `learn.remove_cb(KeepSparse)` lets the next fit move the zeros."""
    order = GradientClip.order - .4  # by then MixedPrecision has unscaled the gradients, and nothing has clipped them
    _stateattrs = ('_sparsifier',)  # it is not exported with the Learner: the zeros are in the weights
    active, begun, _sparsifier, own_masks = False, False, None, {}  # own_masks: {name of a layer: mask}
    handed = 0  # the number of the fit whose masks it keeps, 1 for the first; 0: none

    @known_arguments
    def __init__(self,
        granularity: str | tuple = 'weight',  # at filter granularity the BatchNorm of a pruned filter is kept zero too
        layers=None,  # None for all but embeddings; else as in `Sparsifier`
        exclude=None,  # layers that take no part, in the same forms
        masks: Mapping | None = None,  # masks of one's own: {name of a layer: bool, of the weight's shape, True = keep}; None: the zeros that are there
    ):
        self.rules = Rules(granularity, layers=layers, exclude=exclude, keep_zeros=masks is None)
        if masks is not None and not isinstance(masks, Mapping):
            raise TypeError(f'masks: got {type(masks).__name__}, expected {{name of a layer: bool tensor}}')
        self.own_masks = masks or {}

    @property
    def sparsifier(self) -> Sparsifier:
        "Return the Sparsifier of the last fit."
        if self._sparsifier is None: raise ValueError('sparsifier: there is none before the first fit')
        return self._sparsifier

    # When

    def before_fit(self):
        if self._only_validates(): return
        layers = self._layers_to_keep()
        self.active = bool(layers) and not hasattr(self.learn, 'lr_finder')
        if not self.active: return
        keep_zeros = self.rules.keep_zeros and not self._has_masks() or self._goes_on_from_a_file()
        self._build(replace(self.rules, layers=layers, exclude=None, keep_zeros=keep_zeros))
        self._end_behind_all()

    def before_batch(self):
        "Mask the weights with the first batch, with which the data flow is found."
        if not self.active or not self.training or self.begun: return
        self.begun = True
        self.sparsifier.apply_masks()

    def before_step(self):
        if not self.active: return
        self.sparsifier.evidence.step()  # from gradients as they are, before any is masked
        self._prune()
        if not self.state_masked: self._mask_optimizer_state()
        self.sparsifier.mask_gradients()

    def after_step(self):
        if self.active: self.sparsifier.apply_masks()

    def after_train(self):
        "Mask again: another callback may have moved weights, and they are validated and saved next."
        if self.active: self.sparsifier.apply_masks()

    def _end(self):
        "Mask once more, when all other callbacks are done: they may have put other weights in place."
        if not self.active: return
        if self._model() is not self.sparsifier.model: self._follow_model()
        self.sparsifier.apply_masks()

    def _end_behind_all(self):
        "Have `_end` called after the fit, behind all other callbacks."
        last = [cb for cb in self.learn.cbs if isinstance(cb, AfterAll)]
        for cb in last:
            if cb.owner not in self.learn.cbs: self.learn.remove_cb(cb)  # it is of a fit that broke off
        if not any(cb.owner is self for cb in last): self.learn.add_cb(AfterAll(self))

    def _prune(self): "Make an event. This callback only keeps zeros, and makes none."

    # What

    def _only_validates(self):
        "Tell whether this is `validate` or `get_preds`, perhaps in the middle of a fit. They hold the lock."
        return self.learn.lock.locked()

    def _model(self): return bare(self.learn.model)

    def _layers_to_keep(self):
        "Return the weights of layers that no `SparsifyCallback` has."
        pruning = [cb for cb in self.learn.cbs if isinstance(cb, SparsifyCallback) and cb.active]
        taken = {layer.at for cb in pruning for layer in cb.sparsifier.selected.candidates.values()}
        return [weight for weight in self._weights() if weight not in taken]

    def _weights(self):
        "Return the weights that are meant."
        if self._has_masks(): return list(self.sparsifier.selected.found_in(self._model()).values())
        if self.handed:  # it was copied or exported with the Learner, without its masks
            every = Named(self._model()).every
            return [every[name] for name in self.rules.layers if name in every]
        return list(choose(self._model(), self.rules.layers, self.rules.exclude).chosen.values())

    def _has_masks(self): return bool(self.handed) and self._sparsifier is not None

    def _goes_on_from_a_file(self):
        "Tell whether the fit is resumed, by `start_epoch`: then the zeros that are there were pruned before."
        return any(isinstance(cb, SkipToEpoch) and cb._skip_to > 0 for cb in self.learn.cbs)

    def _build(self, rules):
        "Make the Sparsifier. It begins with the masks that earlier fits have left, and those of the user."
        held = self._held()
        self._sparsifier = Sparsifier(self._model(), **rules.given, example=self._batch)
        self.state_masked, self.begun = False, False
        self.sparsifier.masks.begin_with(held, self.own_masks)

    def _held(self):
        "Return the masks that callbacks of earlier fits left with the Learner: {weight: mask}."
        held, keepers = {}, [cb for cb in self.learn.cbs if isinstance(cb, KeepSparse) and cb._has_masks()]
        for fit in sorted({cb.handed for cb in keepers}):
            of_one_fit = {}
            for cb in [cb for cb in keepers if cb.handed == fit]:
                for weight, keep in cb.sparsifier.masks.found_in(self._model()).items():
                    of_one_fit[weight] = of_one_fit[weight] & keep if weight in of_one_fit else keep
            held |= of_one_fit  # a later fit may have let weights come back
        return held

    def _follow_model(self):
        "Go over to the model that is in the Learner now, with the masks of the one before."
        held = self.sparsifier.masks.found_in(self._model(), where_zero=False)
        rules = replace(self.sparsifier.rules, layers=list(held), exclude=None)
        self._sparsifier = Sparsifier(self._model(), **rules.given, example=self._batch)
        self.sparsifier.masks.begin_with(held)

    def _batch(self):
        "Return the inputs that are in the loop, None before the first."
        batch = getattr(self.learn, 'xb', (None,))
        return None if batch[0] is None else tuple(batch)  # a DataLoader of torch gives a list

    def _mask_optimizer_state(self):
        "Mask the optimizer's state. fastai's Lookahead and OptimWrapper hold another optimizer inside."
        opt, self.state_masked = self.learn.opt, True
        self.sparsifier.mask_optimizer_state(getattr(opt, 'opt', opt).state)
        for slow, fast in zip(getattr(opt, 'slow_weights', None) or [], opt.param_lists):
            self.sparsifier.mask_optimizer_state({p: {'slow': s} for p, s in zip(fast, slow)})


class AfterAll(FastaiCallback):
    "Call the `_end` of another callback after a fit, when all others are done."
    order = 1 << 30

    def __init__(self, owner): self.owner = owner

    def after_fit(self):
        if self.learn.lock.locked(): return
        if self.owner in self.learn.cbs: self.owner._end()
        self.learn.remove_cb(self)


class SparsifyCallback(KeepSparse):
    """Prune a network while fastai trains it. The zeros stay in later fits.

    A wrong argument raises `TypeError` or `ValueError`, which names it: when the callback is made, or before
    the first batch where the model must be known."""
    order = KeepSparse.order - .1

    @takes_rules
    def __init__(self,
        sparsity,  # percent of the selected weights that shall be zero; or `{layer's name or glob: percent}`: the layers of one entry compete among themselves
        granularity: str | tuple | Callable = 'weight',  # which weights are pruned as one: a name, axes as `('I', 'kh')`, `block(4, 4)`, `head(8)`
        context: str | Callable = 'global',  # who competes with whom (the scope): a name, an N:M pattern as `'2:4'`, or a function
        criteria: str | Callable = 'magnitude',  # the importance of a weight: a name, or a function of `weight` and `grad`
        schedule: str | Callable = 'gradual',  # how much, and when: a name, `gradual(start=.2, end=.8)` and its like, or a function of progress
        layers=None,  # a type, name, glob, module, parameter, or a list of these; None: what a dict `sparsity` names, or all but embeddings
        **kwargs,  # the other rules, as in `Rules`
    ):
        if isinstance(sparsity, Mapping) and sparsity: check_kinds(list(sparsity), 'sparsity')
        if layers is None and isinstance(sparsity, Mapping): layers = list(sparsity) or None
        self.rules = Rules(granularity, context, criteria, layers, **kwargs)
        self.rules.check_sparsity(sparsity)
        self.sparsity, self.schedule = sparsity, read_schedule(schedule)
        self._check_initial()
        self.keeper, self.history, self.trouble = None, [], ''
        self.column, self.trackers = Column(self), Trackers()

    # When

    def before_fit(self):
        if self._only_validates(): return
        self.trackers.resume()
        self.active = not hasattr(self.learn, 'lr_finder')
        if not self.active: return
        self._check_names()
        self._check_initial()
        keep_zeros = self.rules.keep_zeros or self._goes_on_from_a_file()
        self._build(replace(self.rules, keep_zeros=keep_zeros))
        self.sparsifier.selected.learned |= {*self._frozen_by_learner()}
        self._wanted()
        self._begin()
        self._plan_early()
        self._leave_keeper()
        self._end_behind_all()
        self.column.add(self.learn)
        self._say_what_is_left_alone()

    def before_epoch(self):
        if not self.active or self._only_validates(): return
        self.trackers.resume()
        self.column.remove(self.learn)
        self.trained = False

    def before_train(self): self.trained = True

    def before_batch(self):
        "Find the data flow with the first batch, and with it the layers that are left out."
        if not self.active or not self.training: return
        self.had_batch = True
        if self.begun: return
        self.sparsifier.selected.resolve()
        self._wanted()
        super().before_batch()

    def after_train(self):
        "Prune once more after the last batch: GradientAccumulation or an overflow may have skipped its step."
        if not self.active: return
        super().after_train()
        if not self.had_batch: return
        more_to_come = self.epoch < self.n_epoch - 1 or self.iter < self.n_iter - 1
        if more_to_come: return
        try: self._prune()
        except ValueError as error: self.trouble = str(error)

    def after_epoch(self):
        "Let trackers see only epochs at the final sparsity; one that a resumed fit skips is not saved again."
        if not self.active or self._only_validates(): return
        if not self.trained: return self.trackers.pause(self.learn)
        report = self.sparsifier.report()
        self.history.append({'epoch': self.epoch} | {row.layer: row.sparsity for row in report.rows})
        self.column.fill(self.learn, report.sparsity)
        if self._at_final_sparsity(): self.compared = True
        else: self.trackers.pause(self.learn, spare=self._goes_on)

    def after_fit(self):
        if not self.active or self._only_validates(): return
        self.trackers.resume()
        if not self.compared:  # there is no best epoch to load
            self.trackers.pause(self.learn, spare=lambda cb: saves_at_end(cb) or self._goes_on(cb))

    def _end(self):
        "Mask once more, and say what was reached; the last epoch's trackers are on again for the next fit."
        super()._end()
        self._say(self._summary())

    # What

    def _begin(self):
        "Set what is counted during a fit."
        self.training_progress, self.had_batch = 0., False  # 0 to 1; whether there was a batch to train on
        self.share, self.initial = 0., 0.  # as the schedule returned them: 0 to 1, and percent
        self.timetable, self.n_steps = None, None  # the schedule over this fit, with so many steps an epoch
        self.compared = False  # there was an epoch at the final sparsity
        self.history, self.trouble = [], ''  # sparsity of each layer by epoch; the error of the last event
        self.pruned, self.waiting = set(), frozenset()  # names of the layers of the last event, and of those that waited in it
        masks, layers = self.sparsifier.masks, self.sparsifier.selected.candidates
        self.zeros_before = {name: layer.weight.numel() - masks.left(name) for name, layer in layers.items()}

    def _prune(self):
        "Make an event, if one is due."
        self.training_progress = (self.epoch * self.n_iter + self.iter + 1) / (self.n_epoch * self.n_iter)
        if self.n_steps != self.n_iter and not self._plan(self.n_iter): return
        share, initial = self._due(self.training_progress)
        if not self._is_due(share, initial) or self._frozen_by_learner(): return
        falls = share < self.share or initial < self.initial
        change = self.sparsifier.sparsify_model(self.sparsity, share, regrow=falls, initial=initial)
        self.share, self.initial = share, initial
        self.pruned, self.waiting = {*self.sparsifier.layers}, change.waiting
        self._mask_optimizer_state()

    def _is_due(self, share, initial):
        "Tell whether the schedule returned something new, or another layer can be pruned than before."
        if (share, initial) != (self.share, self.initial): return True
        if not share and not initial: return False
        layers = self.sparsifier.layers
        known = any(self.sparsifier.evidence.known(layers[name]) for name in self.waiting if name in layers)
        return known or self.pruned != {*layers}

    def _frozen_by_learner(self):
        "Return the layers that `learn.freeze`, `freeze_to` or `fine_tune` has frozen: their names."
        n = getattr(self.learn.opt, 'frozen_idx', 0)
        frozen = {id(p) for group in self.learn.opt.param_lists[:n] for p in group if not p.requires_grad}
        layers = self.sparsifier.selected.candidates.items()  # before the first batch the data flow is not known
        return [name for name, layer in layers if id(layer.weight) in frozen]

    def _plan_early(self):
        "Place the schedule in this fit before it begins, so that times that do not fit are refused here."
        n_steps = len(self.learn.dls.train)
        if n_steps and self.n_epoch: self._plan(n_steps)

    def _plan(self, n_steps):
        """Place the schedule in this fit; return whether that is done.

        It is not while the Learner has frozen layers and the schedule has steps or epochs: those are of the
        part of fine_tune that trains all layers, and may be too many for the first."""
        if needs_length(self.schedule) and self._frozen_by_learner(): return False
        self.timetable, self.n_steps = over_fit(self.schedule, self.n_epoch, n_steps), n_steps
        return True

    def _due(self, progress):
        "Return which share of the sparsity is due, 0 to 1, and what it begins with, percent."
        return float(self.timetable(progress)), initial_at(self.timetable, progress)

    def _at_final_sparsity(self):
        return self.timetable is not None and self._due(1.) == (self.share, self.initial)

    def _check_initial(self):
        "Refuse a schedule that begins with more zeros than it shall end with."
        if not isinstance(self.schedule, Ramp): return
        sparsity, initial = self.sparsity, self.schedule.initial
        targets = sparsity.values() if isinstance(sparsity, Mapping) else [sparsity]
        wanted = [self.rules.fraction(target) for target in targets]
        check_initial(initial, wanted, f'schedule: got initial={initial!r}')

    def _goes_on(self, tracker):
        "Tell whether a tracker may see an epoch before the final sparsity."
        if saves_every_epoch(tracker): return True
        return bool(self._frozen_by_learner()) and tracker.reset_on_fit  # fine_tune: it begins anew in the second part

    def _wanted(self):
        "Find the sparsity of each layer; refuse what means none of those that are selected."
        self.asked = fractions(self.sparsity, self.sparsifier.rules, self.sparsifier.selected)

    def _check_names(self):
        "Refuse what means no layer of the model."
        if not isinstance(self.sparsity, Mapping): return
        named = Named(self._model())
        for choice in self.sparsity: matching(choice, named, named.weights, 'sparsity')

    def _leave_keeper(self):
        "Leave a `KeepSparse` with the Learner that keeps the zeros of these layers in later fits."
        new = KeepSparse(self.rules.granularity, list(self.sparsifier.selected.candidates))
        in_use = [cb.keeper for cb in self._others(SparsifyCallback) if cb.active]
        earlier = [cb for cb in self._others(KeepSparse) if cb.handed and cb not in in_use]
        self.keeper = next((cb for cb in earlier if cb.rules == new.rules), new)
        if self.keeper is new: self.learn.add_cb(new)
        self.keeper.handed = 1 + max([cb.handed for cb in earlier if cb is not self.keeper], default=0)
        self.keeper._sparsifier = self._sparsifier

    def _others(self, kind): return [cb for cb in self.learn.cbs if isinstance(cb, kind) and cb is not self]

    # What is said

    def _say(self, line):
        if self.learn.logger is not noop: print(f'sparsity: {line}')

    def _say_what_is_left_alone(self):
        "Name, before the first epoch, the layers that are frozen for good, and zeros that are not held."
        frozen = self.sparsifier.selected.frozen
        if frozen:
            self._say(f'{_some(frozen)} {_is(frozen)} frozen, and not by the Learner, so left alone unless '
                      'something lets it learn; the other layers are pruned')
        if self.sparsifier.rules.keep_zeros: return
        masks, layers = self.sparsifier.masks.of, self.sparsifier.selected.learning()
        zeros = {name: count_zeros(layer.weight, masks[name]) for name, layer in layers.items()}
        total, n = sum(layer.weight.numel() for layer in layers.values()), sum(zeros.values())
        if 100 * n <= total: return
        where = sorted([name for name in zeros if zeros[name]], key=zeros.get, reverse=True)
        self._say(f'{n:,} of {total:,} weights come in as zeros, in {_some(where)}, and may learn until '
                  'they are pruned; keep_zeros=True holds them')

    def __repr__(self):
        given = {'sparsity': self.sparsity} | self.rules.given | {'schedule': self.schedule}
        return f'{type(self).__name__}({as_arguments(given)})'

    def plot_sparsity(self,
        ax=None,  # matplotlib axes to draw on; new ones if None
    ):
        "Draw the measured sparsity of each layer by epoch, and return the axes."
        if not self.history:
            raise ValueError('plot_sparsity: there is nothing to draw before the first epoch of a fit')
        import matplotlib
        if ax is None:
            import matplotlib.pyplot as plt
            _, ax = plt.subplots(figsize=(7, 4), layout='constrained')
        epochs, layers = [row['epoch'] for row in self.history], list(self.sparsifier.layers)
        colours = matplotlib.colormaps['viridis'](np.linspace(0, .95, len(layers)))  # from the first layer to the last
        for layer, colour in zip(layers, colours):
            values = [row[layer] for row in self.history]
            ax.plot(epochs, values, marker='.', color=colour, label=layer or '(the model)')
        ax.set(xlabel='epoch', ylabel='sparsity (%)', ylim=(-5, 105))
        ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        ax.legend(fontsize='x-small', loc='center left', bbox_to_anchor=(1, .5), ncols=1 + len(layers) // 24)
        return ax

    def _summary(self):
        "Say what was asked and what was reached."
        report, waiting = self.sparsifier.report(), self._frozen_by_learner()
        asked = 100 * sum(self.asked.get(row.layer, 0) * row.weights for row in report.rows) / report.weights
        text = (f'asked {float(asked):.4g} %, reached {report.sparsity:.2f} % '
                f'({report.zeros:,} of {report.weights:,} weights)')
        if not waiting: return f'{text}{self._why(report, asked)}'
        return (f'waits while {len(waiting)} of {len(report.rows)} selected layers are frozen '
                f'({waiting[0]!r} first); fine_tune unfreezes them for its second part, '
                f'elsewhere learn.unfreeze() does, or choose others by layers=; {text}')

    def _why(self, report, asked):
        "Say why another sparsity was reached than asked, where there is a reason."
        zeros_before = sum(self.zeros_before.get(row.layer, 0) for row in report.rows)
        if self.trouble: return f'; the last event failed: {self.trouble}'
        if not len(self.learn.dls.train): return '; there was no batch to train on'
        done, wanted = self.training_progress, asked * report.weights / 100
        if done < 1: return f', stopped after {100 * done:.0f} % of the training'
        if zeros_before > round(wanted): return '; zeros that are there stay, and count'
        if self.share < 1: return f', since {name_of(self.schedule)} ends at {100 * self.share:.0f} % of it'
        is_rounded = self.rules.round_to and report.sparsity != float(asked)
        if is_rounded: return f'; round_to={self.rules.round_to} rounds the filters that stay'
        return ''


def _some(names):
    "Write up to three names."
    more = f' and {len(names) - 3} more' if len(names) > 3 else ''
    return ', '.join(map(repr, names[:3])) + more


def _is(names): return 'are' if len(names) > 1 else 'is'
