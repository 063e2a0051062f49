"Drives a `Sparsifier` through fastai's training loop."
from collections.abc import Callable, Mapping

from fastai.callback.core import Callback as FastaiCallback
from fastai.callback.training import GradientClip
from fastai.learner import ValueMetric, noop

from fasterai.arguments import name_of, one_of, percent
from fasterai.context import CONTEXTS
from fasterai.criteria import CRITERIA
from fasterai.granularity import GRANULARITIES
from fasterai.schedule import read_schedule
from fasterai.sparsifier import Sparsifier


class SparsifyCallback(FastaiCallback):
    "Makes the network sparse while it trains, and keeps it so to the end of the fit."
    order = GradientClip.order - .5  # MixedPrecision has unscaled the gradients by then, and nothing has clipped them

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
        self.active, self.sparsifier, self.column = False, None, None

    def before_fit(self):
        self._clear()
        self.active = not (hasattr(self.learn, 'lr_finder') or self.learn.lock.locked())  # the lock: validate and get_preds
        if not self.active: return
        self.sparsifier = Sparsifier(self.learn.model, **self.choices, example=self._batch)
        self.sparsifier.fractions(self.sparsity)  # refuses what means no layer
        self.done = self.share = 0.  # of the training, of the sparsity
        self.column = ValueMetric(self._measured, 'sparsity')
        self.learn.metrics = self.learn.metrics + [self.column]

    def before_step(self):
        if not self.active: return
        self.done = (self.epoch * self.n_iter + self.iter + 1) / (self.n_epoch * self.n_iter)
        share = float(self.schedule(self.done))
        if share == self.share or self._frozen(): return
        self.sparsifier.sparsify_model(self.sparsity, share, regrow=share < self.share)
        self.share = share

    def after_step(self):
        if self.active: self.sparsifier.apply_masks()

    def after_fit(self):
        if not self.active: return
        self._clear()
        if self.learn.logger is not noop: print(self._summary())

    def _batch(self):
        "The inputs that are in the loop, None before the first."
        batch = getattr(self.learn, 'xb', (None,))
        return None if batch[0] is None else batch

    def _measured(self): return self.sparsifier.sparsity

    def _frozen(self): return [n for n, layer in self.sparsifier.layers.items() if not layer.weight.requires_grad]

    def __setattr__(self, name, value):
        "The Learner takes a callback off by `learn = None`, after an exception too, when no event comes."
        if name == 'learn' and value is None and self.learn is not None: self._clear()
        super().__setattr__(name, value)

    def _clear(self):
        "Take the column out of the progress table; a fit that was broken off may have left it there."
        if self.column is not None: self.learn.metrics = [m for m in self.learn.metrics if m is not self.column]
        self.column = None

    def _summary(self):
        "What was asked and what was reached."
        report = self.sparsifier.report()
        fractions = self.sparsifier.fractions(self.sparsity)
        asked = 100 * sum(fractions.get(r.layer, 0) * r.weights for r in report.rows) / report.weights
        text = f'sparsity: asked {float(asked):.4g} %, reached {report.sparsity:.2f} % ({report.zeros:,} of {report.weights:,} weights)'
        frozen = self._frozen()
        if frozen:
            text += (f'; nothing was zeroed while {len(frozen)} of {len(report.rows)} selected layers are frozen '
                     f'({frozen[0]!r} first): unfreeze them, or choose others by layers=')
        elif self.done < 1: text += f', stopped after {100 * self.done:.0f} % of the training'
        elif self.share < 1: text += f', since {name_of(self.schedule)} ends at {100 * self.share:.0f} % of it'
        return text
