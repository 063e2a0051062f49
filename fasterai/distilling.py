"Distil in fastai's training loop, with the network before the first event as the teacher."
import torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation

from fasterai.distil import as_seen, as_teacher, distillation
from fasterai.names import bare
from fasterai.repairing import copied


class Distilling(Callback):
    """Add the distance from the dense network to the loss of which the gradient is taken.

    The loss that is shown stays that of the labels. In a batch in which the dense network's loss is not the
    lower one, nothing is added: early in a training it knows less than the pruned network later on."""
    order = GradientAccumulation.order - 1  # before anything scales the loss, and while MixedPrecision casts
    _stateattrs = ('teacher',)  # it is not exported with the Learner
    teacher, known, n_batches, n_lower = None, True, 0, 0  # batches since the first event, and those in which its loss was the lower one

    def __init__(self,
        owner,  # the callback that prunes
        choice: distillation | None,  # None: nothing is done
    ):
        self.owner, self.choice = owner, choice

    def begin(self,
        learn,
        resumes: bool,  # whether the fit does
        pruned: bool,  # whether weights are masked already
    ):
        "Join a fit. A teacher is left over where the fit that resumes was broken off here."
        if self.choice is None: return
        if hasattr(learn, 'gan_trainer'):
            raise ValueError(f'distil: got {self.choice} with a GAN, expected None: it has no single network')
        if not resumes: self.teacher = None
        self.known = self.teacher is not None or not (resumes and pruned)
        self.n_batches = self.n_lower = 0
        if self not in learn.cbs: learn.add_cb(self)

    def remember(self,
        model,
        inputs: tuple,  # of the batch that is in the loop
    ):
        "Copy the dense network before an event, unless there is a copy."
        if self.choice is None or self.teacher is not None or not self.known: return
        self.teacher = as_teacher(copied(bare(model), [(inputs,)]))

    def end(self, learn):
        "Leave a fit, and let go of the dense network."
        self.teacher = None
        if self in learn.cbs: learn.remove_cb(self)

    @property
    def _in_use(self):
        "Tell whether the callback that prunes is in this fit: it may have been removed, or a fit broke off."
        return self.owner.learn is not None and self.owner.active

    def before_fit(self):
        if self.owner.learn is None: self.end(self.learn)

    def before_train(self):
        "Let a recurrent network forget, as fastai does with the one that is trained."
        if hasattr(self.teacher, 'reset'): self.teacher.reset()

    def after_loss(self):
        if not self.training or self.teacher is None or not self._in_use or not len(self.yb): return
        with torch.no_grad():
            taught = as_seen(self.pred, self.teacher(*self.xb))
            loss_of_teacher = self.learn.loss_func(taught, *self.yb)
        self.n_batches += 1
        if not loss_of_teacher < self.loss: return
        self.n_lower += 1
        distance = self.choice.distance(self.pred, taught, self.yb, self.learn.loss_func)
        self.learn.loss_grad = self.loss_grad + self.choice.share * (distance - self.loss)
