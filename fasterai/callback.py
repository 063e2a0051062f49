"Drives a `Sparsifier` through fastai's training loop."
from collections.abc import Callable, Mapping

from fastai.callback.core import Callback as FastaiCallback
from fastai.callback.tracker import TrackerCallback
from fastai.callback.training import GradientClip
from fastai.learner import ValueMetric, noop
from torch import nn

from fasterai.arguments import name_of, one_of, percent
from fasterai.context import CONTEXTS
from fasterai.criteria import CRITERIA
from fasterai.granularity import GRANULARITIES
from fasterai.layers import choose
from fasterai.schedule import read_schedule
from fasterai.sparsifier import Sparsifier


class KeepSparse(FastaiCallback):
    "Keeps the zeros of a network in every fit. `SparsifyCallback` leaves one behind; `learn.remove_cb(KeepSparse)` lets the zeros go."
    order = GradientClip.order - .4  # MixedPrecision has unscaled the gradients by then, and nothing has clipped them
    _stateattrs = ('sparsifier',)  # not exported: the zeros in the weights are the mask
    active, sparsifier = False, None

    def __init__(self,
        granularity: str | tuple = 'weight',  # at filter the BatchNorm of a dead filter is held at zero too
        layers=None,  # None for every convolution and Linear; else as in `Sparsifier`
    ):
        self.choices = dict(granularity=granularity, layers=layers)

    def before_fit(self):
        self.active = self._training()
        if not self.active: return
        layers = self.choices['layers']
        if isinstance(layers, list):  # what has been replaced since is not missed
            layers = [m for m in layers if not isinstance(m, nn.Module) or m in set(self._model().modules())]
        chosen = [] if layers == [] else choose(self._model(), layers).chosen
        taken = {n for cb in self.learn.cbs if isinstance(cb, SparsifyCallback) and cb.active for n in cb.sparsifier.candidates}
        layers = [n for n in chosen if n not in taken]
        self.active = bool(layers)
        if self.active: self._build(granularity=self.choices['granularity'], layers=layers)

    def before_step(self):
        if not self.active: return
        if not self.cleared: self._forget()
        self.sparsifier.quiet_gradients()

    def after_step(self):
        if self.active: self.sparsifier.apply_masks()

    def _training(self):
        "Is this a fit? `validate` and `get_preds` hold the lock."
        return not (hasattr(self.learn, 'lr_finder') or self.learn.lock.locked())

    def _model(self): return getattr(self.learn.model, '_orig_mod', self.learn.model)  # inside torch.compile

    def _build(self, **choices):
        "The zeros that are there are the masks."
        self.sparsifier, self.cleared = Sparsifier(self._model(), **choices, example=self._batch), False

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
        sparsity,  # percent of the selected weights that shall be zero; or {layer's name or glob: percent}, then layer by layer
        granularity: str | tuple = 'weight',  # what lives and dies together: weight, vector, kernel, filter, or axes as ('I', 'kh')
        context: str | Callable = 'global',  # who competes with whom: local, global, or a function
        criteria: str | Callable = 'magnitude',  # how much a weight matters: magnitude, gradient, or a function of weight and grad
        schedule: str | Callable = 'gradual',  # when: a name, gradual(start=.2, end=.8) and its like, or any function of progress
        layers=None,  # None for every convolution and Linear, or for those that a dict `sparsity` names; else as in `Sparsifier`
    ):
        for value in sparsity.values() if isinstance(sparsity, Mapping) else [sparsity]: percent(value)
        if isinstance(granularity, str): one_of('granularity', granularity, GRANULARITIES, 'a tuple of axes')
        one_of('context', context, CONTEXTS)
        one_of('criteria', criteria, CRITERIA)
        if layers is None and isinstance(sparsity, Mapping): layers = list(sparsity)
        self.sparsity, self.schedule = sparsity, read_schedule(schedule)
        self.choices = dict(granularity=granularity, context=context, criteria=criteria, layers=layers)
        self.column, self.waiting, self.history, self.trouble = None, [], [], ''

    def before_fit(self):
        self._clear()
        self.active = self._training()
        if not self.active: return
        self._build(**self.choices)
        self.sparsifier.fractions(self.sparsity)  # refuses what means no layer
        self.done, self.share, self.compared, self.history, self.trouble = 0., 0., False, [], ''  # done of the training, share of the sparsity
        self._show_column()
        self._leave_keeper()

    def before_epoch(self):
        self._let_compare()
        self.trained = False

    def before_train(self): self.trained = True

    def before_step(self):
        if not self.active: return
        self._sparsify()
        super().before_step()

    def after_train(self):
        "The last step may have been skipped, by GradientAccumulation or an overflow; the event that was due with it is not."
        if not self.active or self.epoch < self.n_epoch - 1 or self.iter < self.n_iter - 1: return
        try: self._sparsify()
        except ValueError as error: self.trouble = str(error)

    def after_epoch(self):
        "Only epochs at the final sparsity compete for the best one or are a reason to stop; one that was skipped is not saved again."
        if not self.active: return
        if not self.trained: return self._make_wait(lambda cb: True)
        self.history.append({'epoch': self.epoch} | {r.layer: r.sparsity for r in self.sparsifier.report().rows})
        if self.share == float(self.schedule(1.)) or self._frozen(): self.compared = True
        else: self._make_wait(lambda cb: not getattr(cb, 'every_epoch', False))

    def after_fit(self):
        if not self.active: return
        self._clear()
        if not self.compared:  # there is no best epoch to load
            self._make_wait(lambda cb: not (getattr(cb, 'every_epoch', False) or getattr(cb, 'at_end', False)))
        if self.learn.logger is not noop: print(self._summary())

    def plot_sparsity(self,
        ax=None,  # matplotlib axes to draw on; new ones if None
    ):
        "Draw the measured sparsity of each layer by epoch; returns the axes."
        if ax is None:
            import matplotlib.pyplot as plt
            _, ax = plt.subplots(figsize=(6, 4))
        epochs = [h['epoch'] + 1 for h in self.history]
        for layer in self.sparsifier.layers: ax.plot(epochs, [h[layer] for h in self.history], marker='.', label=layer or '(the model)')
        ax.set(xlabel='epoch', ylabel='sparsity (%)', ylim=(-5, 105))
        ax.legend(fontsize='small')
        return ax

    def __setattr__(self, name, value):
        "The Learner takes a callback off by `learn = None`, after an exception too, when no event comes."
        if name == 'learn' and value is None and self.learn is not None: self._clear()
        super().__setattr__(name, value)

    def _sparsify(self):
        "An event, if the schedule says something new."
        self.done = (self.epoch * self.n_iter + self.iter + 1) / (self.n_epoch * self.n_iter)
        share = float(self.schedule(self.done))
        if share == self.share or self._frozen(): return
        self.sparsifier.sparsify_model(self.sparsity, share, regrow=share < self.share)
        self.share = share
        self._forget()

    def _frozen(self): return [n for n, layer in self.sparsifier.layers.items() if not layer.weight.requires_grad]

    def _measured(self): return self.sparsifier.sparsity

    def _show_column(self):
        names = [m.name for m in self.learn.metrics]
        name = next(n for n in ('sparsity', *(f'sparsity_{i}' for i in range(2, len(names) + 3))) if n not in names)
        self.column = ValueMetric(self._measured, name)
        self.learn.metrics = self.learn.metrics + [self.column]

    def _leave_keeper(self):
        choices = dict(granularity=self.choices['granularity'], layers=[layer.module for layer in self.sparsifier.candidates.values()])
        if not any(type(cb) is KeepSparse and cb.choices == choices for cb in self.learn.cbs): self.learn.add_cb(KeepSparse(**choices))

    def _make_wait(self, which):
        "Silence callbacks that compare or save epochs, until the next event."
        self.waiting = [cb for cb in self.learn.cbs if isinstance(cb, TrackerCallback) and which(cb)]
        for cb in self.waiting: cb.run = False

    def _let_compare(self):
        for cb in self.waiting: cb.run = True
        self.waiting = []

    def _clear(self):
        "Put back what a fit changes in the Learner: the column of the progress table, the callbacks that wait."
        self._let_compare()
        if self.column is not None: self.learn.metrics = [m for m in self.learn.metrics if m is not self.column]
        self.column = None

    def _summary(self):
        "What was asked and what was reached."
        report, frozen = self.sparsifier.report(), self._frozen()
        fractions = self.sparsifier.fractions(self.sparsity)
        asked = 100 * sum(fractions.get(r.layer, 0) * r.weights for r in report.rows) / report.weights
        text = f'sparsity: asked {float(asked):.4g} %, reached {report.sparsity:.2f} % ({report.zeros:,} of {report.weights:,} weights)'
        if frozen:
            text += (f'; nothing was zeroed while {len(frozen)} of {len(report.rows)} selected layers are frozen '
                     f'({frozen[0]!r} first): unfreeze them, or choose others by layers=')
        elif self.trouble: text += f'; the last event failed: {self.trouble}'
        elif self.done < 1: text += f', stopped after {100 * self.done:.0f} % of the training'
        elif self.share < 1: text += f', since {name_of(self.schedule)} ends at {100 * self.share:.0f} % of it'
        return text
