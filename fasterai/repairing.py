"Hold what an event repairs, by which data, and the network that it comes near to."
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import nn

from fasterai.data import read_data
from fasterai.repair import read_repairs
from fasterai.rules import Rules
from fasterai.snapshot import random_numbers_kept, undisturbed


class Repairs:
    """Hold the repairs of a Sparsifier's events.

    They come near to the network as it was before the first event since it was last trained."""

    def __init__(self,
        functions: list,  # of model, dense and data, as `repairs_of` returns them
        data,  # batches that can be read several times; None where there are no repairs
    ):
        self.functions, self.data, self.dense = functions, data, None

    def __bool__(self): return bool(self.functions)

    def trained(self):
        "Take notice that the weights were moved: the next event comes near to the network of then."
        self.dense = None

    @contextmanager
    def of(self,
        model: nn.Module,
    ):
        "Hold a copy of the network from before an event; let go of a new one where the `with` block fails."
        before = self.dense
        if before is None and self: self.dense = copied(model, self.data)
        try: yield
        except BaseException:
            self.dense = before
            raise

    def run(self,
        model: nn.Module,
    ) -> tuple:  # what each returned
        "Repair a model."
        return tuple(repair(model, self.dense, self.data) for repair in self.functions)

    @contextmanager
    def instead(self,
        functions: list,  # of model, dense and data; [] for none
        data,  # as in `Sparsifier`; read once, and only if there are functions
        model: nn.Module,  # that takes them
    ):
        "Make other repairs for a `with` block."
        before = self.functions, self.data
        self.functions = functions
        if functions: self.data = _read_once(data, model)
        try: yield
        finally: self.functions, self.data = before


def repairs_of(
    rules: Rules,
    repair,  # what the user has named, as in `Sparsifier`
) -> list:  # functions of model, dense and data
    "Return the repairs that belong to the criterion, and those that the user has named, each once."
    own = read_repairs(rules.criterion.repairs)
    return own + [one for one in read_repairs(repair) if one not in own]


def _read_once(data, model):
    "Return batches of inputs that can be read again, and are the same then."
    with random_numbers_kept(): found = read_data(data, model)
    return [inputs.kwargs or (inputs.args,) for inputs in found]


def copied(
    model: nn.Module,
    data,  # batches, as in `Repairs`; read only if they are needed
) -> nn.Module:
    "Copy a model. What it keeps of a pass with gradients cannot be copied, so a pass without comes first."
    try: return deepcopy(model)
    except RuntimeError: batch = read_data(data, model)[0]
    with undisturbed(model), torch.no_grad():
        batch.call(model)
        twin = deepcopy(model)
    for new, old in zip(twin.modules(), model.modules()): new.training = old.training
    return twin
