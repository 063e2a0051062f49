"Prune in fastai's training loop: the callbacks say when, a `Sparsifier` does it."
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
from fastai.callback.core import Callback as FastaiCallback
from fastai.callback.training import GradientClip
from fastai.learner import noop
from fastai.text.models.awdlstm import WeightDropout

from fasterai.allocation import fractions
from fasterai.arguments import known_arguments, name_of
from fasterai.epochs import Column, Trackers, saves_at_end, saves_every_epoch
from fasterai.granularity import add_layer_type
from fasterai.layers import Named, Weight, bare, check_kinds, choose, matching
from fasterai.rules import Rules, as_arguments, takes_rules
from fasterai.schedule import read_schedule
from fasterai.sparsifier import Sparsifier

add_layer_type(WeightDropout, **{'weight_*_raw': 'O I'})  # fastai's AWD_LSTM makes the weights that it drops from these


class KeepSparse(FastaiCallback):
    """Keep the zeros of a network zero in every fit.

    `SparsifyCallback` leaves one with the Learner. `learn.remove_cb(KeepSparse)` lets the next fit move
    the zeros."""
    order = GradientClip.order - .4  # by then MixedPrecision has unscaled the gradients, and nothing has clipped them
    _stateattrs = ('_sparsifier',)  # it is not exported with the Learner: its masks are the zeros in the weights
    active, _sparsifier, emptied = False, None, ()

    @known_arguments
    def __init__(self,
        granularity: str | tuple = 'weight',  # at filter granularity the BatchNorm of a pruned filter is kept zero too
        layers=None,  # None for all but embeddings; else as in `Sparsifier`
        exclude=None,  # layers that take no part, in the same forms
    ):
        self.rules = Rules(granularity, layers=layers, exclude=exclude)

    @property
    def sparsifier(self) -> Sparsifier:
        "Return the Sparsifier of the last fit."
        if self._sparsifier is None: raise ValueError('sparsifier: there is none before the first fit')
        return self._sparsifier

    def before_fit(self):
        if self._only_validates(): return
        layers = self._layers_to_keep()
        self.active = bool(layers) and not hasattr(self.learn, 'lr_finder')
        if self.active: self._build(replace(self.rules, layers=layers, exclude=None))

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

    def _prune(self): "Make an event. This callback only keeps zeros, and makes none."

    def _only_validates(self):
        "Tell whether this is `validate` or `get_preds`, perhaps in the middle of a fit. They hold the lock."
        return self.learn.lock.locked()

    def _model(self): return bare(self.learn.model)

    def _layers_to_keep(self):
        "Return the names of the layers that no `SparsifyCallback` has."
        layers = self.rules.layers
        if isinstance(layers, list): layers = [weight for weight in layers if self._is_there(weight)]
        if layers == []: return []
        pruning = [cb for cb in self.learn.cbs if isinstance(cb, SparsifyCallback) and cb.active]
        taken = {name for cb in pruning for name in cb.sparsifier.selected.candidates}
        chosen = choose(self._model(), layers, self.rules.exclude).chosen
        return [name for name in chosen if name not in taken]

    def _is_there(self, weight):
        "Tell whether a weight is still in the model: it may have been replaced since it was pruned."
        if not isinstance(weight, Weight): return True
        there = any(weight.module is module for module in self._model().modules())
        return there and weight.attr in weight.module._parameters

    def _build(self, rules):
        """Make the Sparsifier.

        The zeros are its masks; of a tensor that is all zero only if an event has emptied it."""
        self._sparsifier = Sparsifier(self._model(), **rules.given, example=self._batch)
        self.state_masked = False
        emptied = {at for cb in self.learn.cbs if isinstance(cb, KeepSparse) for at in cb.emptied}
        for name, layer in self.sparsifier.selected.candidates.items():
            if layer.at in emptied and not layer.weight.any(): self.sparsifier.masks.empty(name)

    def _batch(self):
        "Return the inputs that are in the loop, None before the first."
        batch = getattr(self.learn, 'xb', (None,))
        return None if batch[0] is None else batch

    def _mask_optimizer_state(self):
        "Mask the optimizer's state. fastai's Lookahead and OptimWrapper hold another optimizer inside."
        opt, self.state_masked = self.learn.opt, True
        self.sparsifier.mask_optimizer_state(getattr(opt, 'opt', opt).state)
        for slow, fast in zip(getattr(opt, 'slow_weights', None) or [], opt.param_lists):
            self.sparsifier.mask_optimizer_state({p: {'slow': s} for p, s in zip(fast, slow)})


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
        self.keeper, self.history, self.trouble = None, [], ''
        self.column, self.trackers = Column(self), Trackers()

    # When

    def before_fit(self):
        if self._only_validates(): return
        self.trackers.resume()
        self.active = not hasattr(self.learn, 'lr_finder')
        if not self.active: return
        self._check_names()
        self._build(self.rules)
        self._wanted()
        self._begin()
        self._leave_keeper()
        self.column.add(self.learn)

    def before_epoch(self):
        if not self.active or self._only_validates(): return
        self.trackers.resume()
        self.column.remove(self.learn)
        self.trained = False

    def before_train(self): self.trained = True

    def before_batch(self):
        """Find the data flow with the first batch, and with it the layers that are left out.

        Nothing is zeroed yet."""
        if not self.active or not self.training or self.state_masked: return
        self.sparsifier.selected.resolve()
        self._wanted()

    def after_train(self):
        "Prune once more after the last batch: GradientAccumulation or an overflow may have skipped its step."
        if not self.active: return
        super().after_train()
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
        if self.share == float(self.schedule(1.)): self.compared = True
        else: self.trackers.pause(self.learn, spare=self._goes_on)

    def after_fit(self):
        if not self.active or self._only_validates(): return
        self.trackers.resume()
        if not self.compared:  # there is no best epoch to load
            self.trackers.pause(self.learn, spare=lambda cb: saves_at_end(cb) or self._goes_on(cb))
        if self.learn.logger is not noop: print(self._summary())

    # What

    def _begin(self):
        "Set what is counted during a fit."
        self.training_progress, self.share = 0., 0.  # both 0 to 1: of the training, of the target sparsity
        self.compared = False  # there was an epoch at the final sparsity
        self.history, self.trouble = [], ''  # sparsity of each layer by epoch; the error of the last event
        masks, layers = self.sparsifier.masks, self.sparsifier.selected.candidates
        self.zeros_before = {name: layer.weight.numel() - masks.left(name) for name, layer in layers.items()}

    def _prune(self):
        "Make an event, if the schedule returns something new."
        self.training_progress = (self.epoch * self.n_iter + self.iter + 1) / (self.n_epoch * self.n_iter)
        share = float(self.schedule(self.training_progress))
        if share == self.share or self._frozen(): return
        self.sparsifier.sparsify_model(self.sparsity, share, regrow=share < self.share)
        self.share = share
        masks, layers = self.sparsifier.masks, self.sparsifier.layers
        self.keeper.emptied = [layer.at for name, layer in layers.items() if not masks.left(name)]
        self._mask_optimizer_state()

    def _frozen(self):
        return [name for name, layer in self.sparsifier.layers.items() if not layer.weight.requires_grad]

    def _goes_on(self, tracker):
        "Tell whether a tracker may see an epoch before the final sparsity."
        if saves_every_epoch(tracker): return True
        return bool(self._frozen()) and tracker.reset_on_fit  # fine_tune: it begins anew in the second part

    def _wanted(self):
        "Return the sparsity of each layer; refuse what means none of those that are selected."
        return fractions(self.sparsity, self.sparsifier.rules, self.sparsifier.selected)

    def _check_names(self):
        "Refuse what means no layer of the model."
        if not isinstance(self.sparsity, Mapping): return
        named = Named(self._model())
        for choice in self.sparsity: matching(choice, named, named.weights, 'sparsity')

    def _leave_keeper(self):
        "Leave a `KeepSparse` with the Learner that keeps the zeros of these layers in later fits."
        layers = [layer.at for layer in self.sparsifier.selected.candidates.values()]
        rules = Rules(self.rules.granularity, layers=layers)
        keepers = [cb for cb in self.learn.cbs if type(cb) is KeepSparse and cb.rules == rules]
        if keepers:
            self.keeper = keepers[0]
            return
        self.keeper = KeepSparse(rules.granularity, layers)
        self.learn.add_cb(self.keeper)

    # What is said

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
        report, frozen, wanted = self.sparsifier.report(), self._frozen(), self._wanted()
        asked = 100 * sum(wanted.get(row.layer, 0) * row.weights for row in report.rows) / report.weights
        text = (f'asked {float(asked):.4g} %, reached {report.sparsity:.2f} % '
                f'({report.zeros:,} of {report.weights:,} weights)')
        if not frozen: return f'sparsity: {text}{self._why(report, asked)}'
        return (f'sparsity: waits while {len(frozen)} of {len(report.rows)} selected layers are frozen '
                f'({frozen[0]!r} first); fine_tune unfreezes them for its second part, '
                f'elsewhere learn.unfreeze() does, or choose others by layers=; {text}')

    def _why(self, report, asked):
        "Say why another sparsity was reached than asked, where there is a reason."
        zeros_before = sum(self.zeros_before[row.layer] for row in report.rows)
        if self.trouble: return f'; the last event failed: {self.trouble}'
        done = self.training_progress
        if done < 1: return f', stopped after {100 * done:.0f} % of the training'
        if zeros_before > asked * report.weights / 100: return '; zeros that are there stay, and count'
        if self.share < 1: return f', since {name_of(self.schedule)} ends at {100 * self.share:.0f} % of it'
        return ''
