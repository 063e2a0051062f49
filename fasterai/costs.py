"Measure what each sparsity of a layer costs: milliseconds by `speed_up`, bytes by `save_sparse`."
import os
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import nn

from fasterai.deploy.compare import example_inputs
from fasterai.deploy.files import save_sparse
from fasterai.deploy.packing import pack
from fasterai.deploy.speed_up import layer_latencies, speed_up
from fasterai.deploy.timing import side_by_side
from fasterai.snapshot import evaluation_mode
from fasterai.tradeoff import LEVELS


class Clock:
    """Time networks as `speed_up` makes them faster, side by side with the dense one.

    What slows the machine slows both, so the milliseconds of another network are those of the dense one, as
    they were at first, times the median of the quotients."""

    def __init__(self,
        dense: nn.Module,
        example,  # as in `speed_up`
        seconds: float,  # time to spend on each layer, about
    ):
        self.example, self.seconds = example, seconds
        self.inputs = example_inputs(example, dense)
        self.device = next((p.device for p in dense.parameters()), torch.device('cpu'))
        self.dense = self._fast(dense)
        latency, = self._latencies(self.dense)
        self.ms = 1e3 * latency.seconds

    def __call__(self,
        model: nn.Module,
    ) -> float:
        "Return the milliseconds of a call of a network."
        dense, new = self._latencies(self.dense, self._fast(model))
        return self.ms * median(b / a for a, b in zip(dense.rounds, new.rounds))

    def _fast(self, model):
        return speed_up(model, self.example, verbose=False, seconds=self.seconds)

    def _latencies(self, *models):
        calls = [partial(self.inputs.call, model) for model in models]
        with evaluation_mode(*models), torch.no_grad():
            return side_by_side(calls, max(1., self.seconds), device=self.device)


def layer_milliseconds(
    trials,  # `damage.Trials`
    example,  # as in `speed_up`
    masks: dict,  # layer's name: its masks at `LEVELS`
    seconds: float,  # time to spend on each layer, about
) -> dict:  # layer's name: milliseconds of a call at 0 % and at `LEVELS`
    "Time each layer alone, in the form that `speed_up` would choose."
    modules = {name: trials.paths[name].rpartition('.')[0] for name in masks}
    of_modules = {path: masks[name] for name, path in modules.items()}
    latencies = layer_latencies(trials.dense, example, of_modules, seconds)
    nothing = [0.] * (1 + len(LEVELS))  # no other form: pruning brings no time
    return {name: [1e3 * s for s in latencies.get(path, nothing)] for name, path in modules.items()}


def layer_bytes(
    trials,  # `damage.Trials`
    masks: dict,  # layer's name: its masks at `LEVELS`
) -> dict:  # layer's name: bytes of its weight in a file at 0 % and at `LEVELS`
    "Pack the weight of each layer with each mask."
    weights = {name: trials.dense.get_parameter(path).detach() for name, path in trials.paths.items()}
    return {name: [_packed(weights[name]), *(_packed(weights[name], keep) for keep in masks[name])]
            for name in masks}


def _packed(tensor, keep=None):
    "Return the bytes of a tensor in a file, with a mask."
    parts = {}
    pack('', tensor if keep is None else tensor.masked_fill(~keep, 0), parts)
    return sum(part.numel() * part.element_size() for part in parts.values())


def file_size(
    model: nn.Module,
) -> int:  # bytes
    "Write a network by `save_sparse`, and return the size of the file."
    with tempfile.TemporaryDirectory() as folder:
        save_sparse(model, Path(folder) / 'packed')
        return os.path.getsize(Path(folder) / 'packed')
