"Drives a `Sparsifier` through fastai's training loop."
from collections.abc import Callable, Mapping

import numpy as np
from fastai.callback.core import Callback as FastaiCallback
from fastai.callback.tracker import TrackerCallback
from fastai.callback.training import GradientClip
from fastai.learner import ValueMetric, noop
from fastai.text.models.awdlstm import WeightDropout

from fasterai.arguments import name_of, one_of
from fasterai.context import read_context, read_sparsity
from fasterai.criteria import read_criterion
from fasterai.granularity import GRANULARITIES, add_layer_type
from fasterai.layers import Named, Weight, choose, matching
from fasterai.schedule import read_schedule
from fasterai.sparsifier import Sparsifier, check_coupled, read_min_keep

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
        self.choices = dict(granularity=granularity, layers=layers)

    @property
    def sparsifier(self) -> Sparsifier:
        "Of the last fit."
        if self._sparsifier is None: raise ValueError('sparsifier: there is none before the first fit')
        return self._sparsifier

    def before_fit(self):
        if self._looking(): return
        layers = self.choices['layers']
        if isinstance(layers, list):  # what has been replaced or changed its kind since is not missed
            layers = [w for w in layers if not isinstance(w, Weight) or w.module in set(self._model().modules()) and w.attr in w.module._parameters]
        chosen = [] if layers == [] else choose(self._model(), layers).chosen
        taken = {n for cb in self.learn.cbs if isinstance(cb, SparsifyCallback) and cb.active for n in cb.sparsifier.candidates}
        layers = [n for n in chosen if n not in taken]
        self.active = bool(layers) and not hasattr(self.learn, 'lr_finder')
        if self.active: self._build(granularity=self.choices['granularity'], layers=layers)

    def before_step(self):
        if not self.active: return
        if not self.cleared: self._forget()
        self.sparsifier.quiet_gradients()

    def after_step(self):
        if self.active: self.sparsifier.apply_masks()

    def after_train(self):
        "Whoever else has moved weights, they are validated and saved sparse."
        if self.active: self.sparsifier.apply_masks()

    def _looking(self):
        "Is this `validate` or `get_preds`, perhaps in the middle of a fit? They hold the lock."
        return self.learn.lock.locked()

    def _model(self): return getattr(self.learn.model, '_orig_mod', self.learn.model)  # inside torch.compile

    def _build(self, **choices):
        "The zeros that are there are the masks; a tensor that is all zero is one only where it was emptied on purpose."
        self._sparsifier, self.cleared = Sparsifier(self._model(), **choices, example=self._batch), False
        emptied = {w for cb in self.learn.cbs if isinstance(cb, KeepSparse) for w in cb.emptied}
        for layer in self.sparsifier.candidates.values():
            if layer.at in emptied and not layer.weight.any(): layer.empty()

    def _batch(self):
        "The inputs that are in the loop, None before the first."
        batch = getattr(self.learn, 'xb', (None,))
        return None if batch[0] is None else batch

    def _forget(self):
        "Clear the optimiser's memory of dead weights; fastai's Lookahead and OptimWrapper hold another optimiser inside."
        opt, self.cleared = self.learn.opt, True
        self.sparsifier.quiet_state(getattr(opt, 'opt', opt).state)
        for slow, fast in zip(getattr(opt, 'slow_weights', None) or [], opt.param_lists):
            self.sparsifier.quiet_state({p: {'slow': s} for p, s in zip(fast, slow)})


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
        if sparsity == {}: raise ValueError('sparsity: got an empty dict, allowed is at least one entry')
        if not isinstance(granularity, (tuple, list)): one_of('granularity', granularity, GRANULARITIES, 'a tuple of axes, block(…), head(…)')
        chosen = read_context(context)
        for value in sparsity.values() if isinstance(sparsity, Mapping) else [sparsity]: read_sparsity(value, chosen)
        read_criterion(criteria)
        read_min_keep(min_keep, context)
        if coupled: check_coupled(granularity, chosen)
        if layers is None and isinstance(sparsity, Mapping): layers = list(sparsity)
        self.sparsity, self.schedule = sparsity, read_schedule(schedule)
        self.choices = dict(granularity=granularity, context=context, criteria=criteria, layers=layers, min_keep=min_keep, coupled=coupled)
        self.keeper, self.waiting, self.history, self.trouble = None, [], [], ''

    def before_fit(self):
        if self._looking(): return
        self._let_compare()
        self.active = not hasattr(self.learn, 'lr_finder')
        if not self.active: return
        if isinstance(self.sparsity, Mapping):
            named = Named(self._model())
            for choice in self.sparsity: matching(choice, named, named.weights, 'sparsity')  # refuses what means no layer
        self._build(**self.choices)
        self.sparsifier.fractions(self.sparsity)  # refuses what means none of the selected layers
        self.done, self.share, self.compared, self.history, self.trouble = 0., 0., False, [], ''  # done of the training, share of the sparsity
        self.zeros_before = {n: layer.mask.numel() - layer.left for n, layer in self.sparsifier.candidates.items()}
        self._leave_keeper()
        self._add_column()

    def before_epoch(self):
        if not self.active or self._looking(): return
        self._let_compare()
        self._remove_column()
        self.trained = False

    def before_train(self): self.trained = True

    def before_batch(self):
        "With the first batch the data flow can be found, and with it what is left alone; nothing has been zeroed yet."
        if self.active and self.training and not self.cleared and self.sparsifier.layers: self.sparsifier.fractions(self.sparsity)

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
        if not self.active or self._looking(): return
        if not self.trained: return self._make_wait(lambda cb: True)
        report, frozen = self.sparsifier.report(), bool(self._frozen())
        self.history.append({'epoch': self.epoch} | {r.layer: r.sparsity for r in report.rows})
        self._fill_column(report.sparsity)
        if self.share == float(self.schedule(1.)): self.compared = True
        else: self._make_wait(lambda cb: not (_option(cb, 'every_epoch') or frozen and cb.reset_on_fit))

    def after_fit(self):
        if not self.active or self._looking(): return
        self._let_compare()
        if not self.compared:  # there is no best epoch to load
            frozen = bool(self._frozen())
            self._make_wait(lambda cb: not (_option(cb, 'every_epoch') or _option(cb, 'at_end') or frozen and cb.reset_on_fit))
        if self.learn.logger is not noop: print(self._summary())

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
        given = {k: v for k, v in self.choices.items() if v is not None and v is not False}
        given = {'sparsity': self.sparsity} | given | {'schedule': self.schedule}
        return f'{type(self).__name__}({", ".join(f"{k}={v!r}" for k, v in given.items())})'

    def _sparsify(self):
        "An event, if the schedule says something new."
        self.done = (self.epoch * self.n_iter + self.iter + 1) / (self.n_epoch * self.n_iter)
        share = float(self.schedule(self.done))
        if share == self.share or self._frozen(): return
        self.sparsifier.sparsify_model(self.sparsity, share, regrow=share < self.share)
        self.share = share
        self.keeper.emptied = [layer.at for layer in self.sparsifier.layers.values() if not layer.left]
        self._forget()

    def _frozen(self): return [n for n, layer in self.sparsifier.layers.items() if not layer.weight.requires_grad]

    # The column: the Recorder takes its names from the metrics in before_fit; later a metric would be in the way of other validations.

    def _add_column(self):
        others = [m for m in self.learn.metrics if getattr(m, 'owner', None) in (None, *self.learn.cbs) and getattr(m, 'owner', None) is not self]
        names = [m.name for m in others]
        column = ValueMetric(noop, next(n for n in ('sparsity', *(f'sparsity_{i}' for i in range(2, len(names) + 3))) if n not in names))
        self.column, column.owner = column.name, self
        self.learn.metrics = others + [column]

    def _remove_column(self): self.learn.metrics = [m for m in self.learn.metrics if getattr(m, 'owner', None) is not self]

    def _fill_column(self, value):
        recorder = getattr(self.learn, 'recorder', None)
        for i, name in enumerate(recorder.metric_names if recorder else ()):
            if name not in (self.column, f'train_{self.column}', f'valid_{self.column}'): continue
            recorder.log += [None] * (i - len(recorder.log))  # where an epoch was broken off
            recorder.log.insert(i, value)

    def _leave_keeper(self):
        keeper = KeepSparse(self.choices['granularity'], [layer.at for layer in self.sparsifier.candidates.values()])
        self.keeper = next((cb for cb in self.learn.cbs if type(cb) is KeepSparse and cb.choices == keeper.choices), keeper)
        if self.keeper is keeper: self.learn.add_cb(keeper)

    def _make_wait(self, which):
        "Silence callbacks that compare or save epochs, until the next event."
        self.waiting = [cb for cb in self.learn.cbs if isinstance(cb, TrackerCallback) and cb.run and which(cb)]
        for cb in self.waiting: cb.run = False

    def _let_compare(self):
        for cb in self.waiting: cb.run = True
        self.waiting = []

    def _summary(self):
        "What was asked and what was reached."
        report, frozen = self.sparsifier.report(), self._frozen()
        fractions = self.sparsifier.fractions(self.sparsity)
        asked = 100 * sum(fractions.get(r.layer, 0) * r.weights for r in report.rows) / report.weights
        text = f'asked {float(asked):.4g} %, reached {report.sparsity:.2f} % ({report.zeros:,} of {report.weights:,} weights)'
        if frozen:
            return (f'sparsity: waits while {len(frozen)} of {len(report.rows)} selected layers are frozen ({frozen[0]!r} first); fine_tune '
                    f'unfreezes them for its second part, elsewhere learn.unfreeze() does, or choose others by layers=; {text}')
        if self.trouble: text += f'; the last event failed: {self.trouble}'
        elif self.done < 1: text += f', stopped after {100 * self.done:.0f} % of the training'
        elif sum(self.zeros_before[r.layer] for r in report.rows) > asked * report.weights / 100: text += '; zeros that are there stay, and count'
        elif self.share < 1: text += f', since {name_of(self.schedule)} ends at {100 * self.share:.0f} % of it'
        return f'sparsity: {text}'


def _option(tracker, name): return getattr(tracker, name, False)
