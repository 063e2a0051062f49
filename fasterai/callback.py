"Drives a `Sparsifier` through fastai's training loop."
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
from fastai.callback.core import Callback as FastaiCallback
from fastai.callback.training import GradientClip
from fastai.learner import noop
from fastai.text.models.awdlstm import WeightDropout

from fasterai.allocation import fractions
from fasterai.arguments import name_of
from fasterai.epochs import Column, Trackers, saves_at_end, saves_every_epoch
from fasterai.granularity import add_layer_type
from fasterai.layers import Named, Weight, choose, matching
from fasterai.rules import Rules, as_arguments
from fasterai.schedule import read_schedule
from fasterai.sparsifier import Sparsifier

add_layer_type(WeightDropout, **{'weight_*_raw': 'O I'})  # fastai's AWD_LSTM keeps the weights that it drops from there


class KeepSparse(FastaiCallback):
    "Keeps the zeros of a network in every fit. `SparsifyCallback` leaves one behind; `learn.remove_cb(KeepSparse)` lets the zeros go."
    order = GradientClip.order - .4  # MixedPrecision has unscaled the gradients by then, and nothing has clipped them
    _stateattrs = ('_sparsifier',)  # not exported: the zeros in the weights are the mask
    active, _sparsifier, emptied = False, None, ()

    def __init__(self,
        granularity: str | tuple = 'weight',  # at filter the BatchNorm of a dead filter is held at zero too
        layers=None,  # None for all but embeddings; else as in `Sparsifier`
    ):
        self.rules = Rules(granularity, layers=layers)

    @property
    def sparsifier(self) -> Sparsifier:
        "Of the last fit."
        if self._sparsifier is None: raise ValueError('sparsifier: there is none before the first fit')
        return self._sparsifier

    def before_fit(self):
        if self._validating(): return
        layers = self._layers_to_keep()
        self.active = bool(layers) and not hasattr(self.learn, 'lr_finder')
        if self.active: self._build(replace(self.rules, layers=layers))

    def before_step(self):
        if not self.active: return
        self.sparsifier.evidence.step()
        if not self.optimizer_masked: self._mask_optimizer()
        self.sparsifier.mask_gradients()

    def after_step(self):
        if self.active: self.sparsifier.apply_masks()

    def after_train(self):
        "Whoever else has moved weights, they are validated and saved sparse."
        if self.active: self.sparsifier.apply_masks()

    def _validating(self):
        "Is this `validate` or `get_preds`, perhaps in the middle of a fit? They hold the lock."
        return self.learn.lock.locked()

    def _model(self): return getattr(self.learn.model, '_orig_mod', self.learn.model)  # inside torch.compile

    def _layers_to_keep(self):
        "The names of the layers that no `SparsifyCallback` has."
        layers = self.rules.layers
        if isinstance(layers, list): layers = [w for w in layers if not isinstance(w, Weight) or self._is_there(w)]
        if layers == []: return []
        taken = {n for cb in self.learn.cbs if isinstance(cb, SparsifyCallback) and cb.active for n in cb.sparsifier.selected.candidates}
        return [name for name in choose(self._model(), layers).chosen if name not in taken]

    def _is_there(self, weight):
        "Whether a weight has not been replaced, or changed its kind, since it was pruned."
        return any(weight.module is m for m in self._model().modules()) and weight.attr in weight.module._parameters

    def _build(self, rules):
        "The zeros that are there are the masks; a tensor that is all zero is one only where it was emptied on purpose."
        self._sparsifier, self.optimizer_masked = Sparsifier(self._model(), **rules.given, example=self._batch), False
        emptied = {w for cb in self.learn.cbs if isinstance(cb, KeepSparse) for w in cb.emptied}
        for name, layer in self.sparsifier.selected.candidates.items():
            if layer.at in emptied and not layer.weight.any(): self.sparsifier.masks.empty(name)

    def _batch(self):
        "The inputs that are in the loop, None before the first."
        batch = getattr(self.learn, 'xb', (None,))
        return None if batch[0] is None else batch

    def _mask_optimizer(self):
        "Clear the optimizer's memory of dead weights; fastai's Lookahead and OptimWrapper hold another optimizer inside."
        opt, self.optimizer_masked = self.learn.opt, True
        self.sparsifier.mask_optimizer_state(getattr(opt, 'opt', opt).state)
        for slow, fast in zip(getattr(opt, 'slow_weights', None) or [], opt.param_lists):
            self.sparsifier.mask_optimizer_state({p: {'slow': s} for p, s in zip(fast, slow)})


class SparsifyCallback(KeepSparse):
    "Makes the network sparse while it trains; the zeros stay in later fits."
    order = KeepSparse.order - .1

    def __init__(self,
        sparsity,  # percent of the selected weights that shall be zero; or `{layer's name or glob: percent}`, then layer by layer
        granularity: str | tuple | Callable = 'weight',  # what lives and dies together: a name, axes as `('I', 'kh')`, `block(4, 4)`, `head(8)`
        context: str | Callable = 'global',  # who competes with whom: a name, a pattern as `'2:4'`, or a function
        criteria: str | Callable = 'magnitude',  # how much a weight matters: a name, or a function of `weight` and `grad`
        schedule: str | Callable = 'gradual',  # how much, and when: a name, `gradual(start=.2, end=.8)` and its like, or a function of progress
        layers=None,  # a type, name, glob, module, parameter, or a list of these; None: what a dict `sparsity` names, or all but embeddings
        min_keep: int | float | None = None,  # of each layer at least so many weights stay, or such a share, as `.05`; None: one group
        coupled: bool = False,  # at filter granularity: filters whose outputs are added (residual networks) go together, so that they can be removed
    ):
        if layers is None and isinstance(sparsity, Mapping): layers = list(sparsity) or None
        self.rules = Rules(granularity, context, criteria, layers, min_keep, coupled)
        self.rules.check_sparsity(sparsity)
        self.sparsity, self.schedule = sparsity, read_schedule(schedule)
        self.keeper, self.history, self.trouble = None, [], ''
        self.column, self.trackers = Column(self), Trackers()

    # When

    def before_fit(self):
        if self._validating(): return
        self.trackers.resume()
        self.active = not hasattr(self.learn, 'lr_finder')
        if not self.active: return
        self._check_names()
        self._build(self.rules)
        self._check_chosen()
        self.training_progress, self.share, self.compared = 0., 0., False  # of the training; of the sparsity; was an epoch at the final one?
        self.history, self.trouble = [], ''
        masks = self.sparsifier.masks
        self.zeros_before = {name: masks[name].numel() - masks.left(name) for name in self.sparsifier.selected.candidates}
        self._leave_keeper()
        self.column.add(self.learn)

    def before_epoch(self):
        if not self.active or self._validating(): return
        self.trackers.resume()
        self.column.remove(self.learn)
        self.trained = False

    def before_train(self): self.trained = True

    def before_batch(self):
        "With the first batch the data flow can be found, and with it what is left alone; nothing has been zeroed yet."
        if not self.active or not self.training or self.optimizer_masked: return
        self.sparsifier.selected.resolve()
        self._check_chosen()

    def before_step(self):
        if not self.active: return
        self._sparsify()
        super().before_step()

    def after_train(self):
        "The last step may have been skipped, by GradientAccumulation or an overflow; the event that was due with it is not."
        if not self.active: return
        super().after_train()
        if self.epoch < self.n_epoch - 1 or self.iter < self.n_iter - 1: return
        try: self._sparsify()
        except ValueError as error: self.trouble = str(error)

    def after_epoch(self):
        "Only epochs at the final sparsity compete for the best one or are a reason to stop; one that was skipped is not saved again."
        if not self.active or self._validating(): return
        if not self.trained: return self.trackers.pause(self.learn)
        report = self.sparsifier.report()
        self.history.append({'epoch': self.epoch} | {r.layer: r.sparsity for r in report.rows})
        self.column.fill(self.learn, report.sparsity)
        if self.share == float(self.schedule(1.)): self.compared = True
        else: self.trackers.pause(self.learn, lambda cb: saves_every_epoch(cb) or self._waits_with_us(cb))

    def after_fit(self):
        if not self.active or self._validating(): return
        self.trackers.resume()
        if not self.compared:  # there is no best epoch to load
            self.trackers.pause(self.learn, lambda cb: saves_every_epoch(cb) or saves_at_end(cb) or self._waits_with_us(cb))
        if self.learn.logger is not noop: print(self._summary())

    # What

    def _sparsify(self):
        "An event, if the schedule says something new."
        self.training_progress = (self.epoch * self.n_iter + self.iter + 1) / (self.n_epoch * self.n_iter)
        share = float(self.schedule(self.training_progress))
        if share == self.share or self._frozen(): return
        self.sparsifier.sparsify_model(self.sparsity, share, regrow=share < self.share)
        self.share = share
        self.keeper.emptied = [layer.at for name, layer in self.sparsifier.layers.items() if not self.sparsifier.masks.left(name)]
        self._mask_optimizer()

    def _frozen(self): return [name for name, layer in self.sparsifier.layers.items() if not layer.weight.requires_grad]

    def _waits_with_us(self, tracker):
        "Whether a tracker begins anew in the fit that follows, when the body is no longer frozen."
        return bool(self._frozen()) and tracker.reset_on_fit

    def _check_names(self):
        "Refuse what means no layer of the model."
        if not isinstance(self.sparsity, Mapping): return
        named = Named(self._model())
        for choice in self.sparsity: matching(choice, named, named.weights, 'sparsity')

    def _fractions(self): return fractions(self.sparsity, self.sparsifier.rules, self.sparsifier.selected)

    def _check_chosen(self):
        "Refuse what means none of the selected layers."
        self._fractions()

    def _leave_keeper(self):
        "Leave a `KeepSparse` with the Learner that keeps the zeros of these layers in later fits."
        rules = Rules(self.rules.granularity, layers=[layer.at for layer in self.sparsifier.selected.candidates.values()])
        self.keeper = next((cb for cb in self.learn.cbs if type(cb) is KeepSparse and cb.rules == rules), None)
        if self.keeper is not None: return
        self.keeper = KeepSparse(rules.granularity, rules.layers)
        self.learn.add_cb(self.keeper)

    # What is said

    def plot_sparsity(self,
        ax=None,  # matplotlib axes to draw on; new ones if None
    ):
        "Draw the measured sparsity of each layer by epoch; returns the axes."
        if not self.history: raise ValueError('plot_sparsity: there is nothing to draw before the first epoch of a fit')
        import matplotlib
        if ax is None:
            import matplotlib.pyplot as plt
            _, ax = plt.subplots(figsize=(7, 4), layout='constrained')
        epochs, layers = [h['epoch'] for h in self.history], list(self.sparsifier.layers)
        colours = matplotlib.colormaps['viridis'](np.linspace(0, .95, len(layers)))  # from the first layer to the last
        for layer, colour in zip(layers, colours):
            ax.plot(epochs, [h[layer] for h in self.history], marker='.', color=colour, label=layer or '(the model)')
        ax.set(xlabel='epoch', ylabel='sparsity (%)', ylim=(-5, 105))
        ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        ax.legend(fontsize='x-small', loc='center left', bbox_to_anchor=(1, .5), ncols=1 + len(layers) // 24)
        return ax

    def __repr__(self):
        given = {'sparsity': self.sparsity} | self.rules.given | {'schedule': self.schedule}
        return f'{type(self).__name__}({as_arguments(given)})'

    def _summary(self):
        "What was asked and what was reached."
        report, frozen, asked = self.sparsifier.report(), self._frozen(), self._fractions()
        percent = 100 * sum(asked.get(r.layer, 0) * r.weights for r in report.rows) / report.weights
        text = f'asked {float(percent):.4g} %, reached {report.sparsity:.2f} % ({report.zeros:,} of {report.weights:,} weights)'
        if frozen:
            return (f'sparsity: waits while {len(frozen)} of {len(report.rows)} selected layers are frozen ({frozen[0]!r} first); fine_tune '
                    f'unfreezes them for its second part, elsewhere learn.unfreeze() does, or choose others by layers=; {text}')
        return f'sparsity: {text}{self._why(report, percent)}'

    def _why(self, report, asked):
        "Why another sparsity was reached than asked, where there is a reason."
        zeros_before = sum(self.zeros_before[r.layer] for r in report.rows)
        if self.trouble: return f'; the last event failed: {self.trouble}'
        if self.training_progress < 1: return f', stopped after {100 * self.training_progress:.0f} % of the training'
        if zeros_before > asked * report.weights / 100: return '; zeros that are there stay, and count'
        if self.share < 1: return f', since {name_of(self.schedule)} ends at {100 * self.share:.0f} % of it'
        return ''
