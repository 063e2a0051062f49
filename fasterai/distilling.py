"Distil in fastai's training loop, with the network before the first event as the teacher."
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation

from fasterai.arguments import Inputs
from fasterai.distil import distillation
from fasterai.names import bare
from fasterai.teacher import Teacher


class Distilling(Callback):
    """Add the distance from the dense network to the loss of which the gradient is taken.

    The loss that is shown stays that of the labels. In a batch in which the dense network's loss is not the
    lower one, nothing is added: early in a training it knows less than the pruned network later on."""
    order = GradientAccumulation.order - 1  # before anything scales the loss, and while MixedPrecision casts
    known = True  # whether the dense network is there, or will be

    def __init__(self,
        owner,  # the callback that prunes
        choice: distillation | None,  # None: nothing is done
    ):
        self.owner, self.teacher = owner, Teacher(choice)

    def begin(self,
        learn,
        resumes: bool,  # whether the fit does
        pruned: bool,  # whether weights are masked already
    ):
        "Join a fit. A teacher is left over where the fit that resumes was broken off here."
        choice, before = self.teacher.choice, self.teacher.network
        if choice is None: return
        if hasattr(learn, 'gan_trainer'):
            raise ValueError(f'distil: got {choice} with a GAN, expected None: it has no single network')
        self.teacher = Teacher(choice)
        if resumes: self.teacher.network = before
        self.known = self.teacher.network is not None or not (resumes and pruned)
        if self not in learn.cbs: learn.add_cb(self)

    def remember(self,
        model,
        inputs: tuple,  # of the batch that is in the loop
    ):
        "Copy the dense network before an event, unless there is a copy."
        if self.known: self.teacher.remember(bare(model), Inputs(inputs))

    def end(self, learn):
        "Leave a fit, and let go of the dense network."
        self.teacher.let_go()
        if self in learn.cbs: learn.remove_cb(self)

    @property
    def _in_use(self):
        "Tell whether the callback that prunes is in this fit: it may have been removed, or a fit broke off."
        return self.owner.learn is not None and self.owner.active

    def before_fit(self):
        if self.owner.learn is None: self.end(self.learn)

    def before_train(self):
        "Let a recurrent network forget, as fastai does with the one that is trained."
        network = self.teacher.network
        if hasattr(network, 'reset'): network.reset()

    def after_loss(self):
        if not self.training or not self._in_use or not len(self.yb): return
        added = self.teacher.adds(self.loss, self.pred, Inputs(self.xb), self.yb, self.learn.loss_func)
        if added is not None: self.learn.loss_grad = self.loss_grad + added
