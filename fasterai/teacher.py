"Hold the dense network that teaches a pruned one, and say what it adds to the loss."
from collections.abc import Callable

import torch
from torch import nn

from fasterai.arguments import Inputs
from fasterai.distil import as_seen, as_teacher, distillation
from fasterai.repairing import copied


class Teacher:
    """Hold the network as it was before the first event, and say what it adds to a loss.

    A copy of this object, or one from a file, has no network."""

    def __init__(self,
        choice: distillation | None,  # None: nothing is distilled
    ):
        self.choice, self.network = choice, None
        self.n_batches = self.n_lower = 0  # batches since there is a network, and those in which its loss was the lower one

    def __getstate__(self): return self.__dict__ | {'network': None}

    def remember(self,
        model: nn.Module,
        inputs: Inputs,  # of a batch; the model is run on them only where it cannot be copied as it is
    ):
        "Copy the network before an event, unless there is a copy."
        if self.choice is None or self.network is not None: return
        self.network = as_teacher(copied(model, [inputs.kwargs or (inputs.args,)]))

    def let_go(self):
        "Forget the network."
        self.network = None

    def adds(self,
        loss: torch.Tensor,  # of the labels
        output,  # of the network that is pruned
        inputs: Inputs,  # of the batch
        targets: tuple,  # of the batch
        loss_func: Callable,  # of output and targets
    ) -> torch.Tensor | None:  # None where there is no teacher, or its own loss is not the lower one
        "Return what is added to the loss of a batch, so that a share of it is the distance from the teacher."
        if self.network is None: return None
        with torch.no_grad():
            taught = as_seen(output, inputs.call(self.network))
            loss_of_teacher = loss_func(taught, *targets)
        self.n_batches += 1
        if not loss_of_teacher < loss: return None
        self.n_lower += 1
        return self.choice.share * (self.choice.distance(output, taught, targets, loss_func) - loss)

    def state_dict(self) -> dict | None:  # None where there is no network
        "Return the values of the network."
        return None if self.network is None else self.network.state_dict()

    def read_state(self,
        values: dict | None,  # of `state_dict`
        model: nn.Module,  # the one that was copied, as it is now
        begun: bool,  # whether weights have been pruned by then
    ) -> nn.Module | None:
        "Return the network of a state; `ValueError` where there must be one and is none, or it does not fit."
        if self.choice is None: return None
        if values is None:
            if not begun: return None
            raise ValueError(f'distil: got {self.choice}, but the state is of a training without it, '
                             'expected distil=None')
        network = as_teacher(copied(model, None))
        try: network.load_state_dict(values)
        except RuntimeError as error:
            raise ValueError('state: got the dense network of another model') from error
        return network
