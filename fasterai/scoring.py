"The groups' scores within one event, asked for in slices."
from collections.abc import Callable
from contextlib import contextmanager

import torch

from fasterai.criteria import evidence_of, gather, score
from fasterai.selection import CHUNK

FEW = 8  # weights a group from which on the scores of all groups are half a byte a weight or less


class Scores:
    """Answers for the groups' scores within one event; what is asked again gives the same.

    Evidence, or the scores of a criterion that is not `elementwise`, are at hand for one layer at a time. Only where groups are
    large, and their scores few, are these kept to the end."""

    def __init__(self,
        criterion: Callable,
    ):
        self.criterion, self.asked = criterion, evidence_of(criterion)
        self.seeds, self.at_hand, self.few, self.checked = {}, {}, {}, set()

    def __call__(self,
        layer,  # what has a name, a weight and a grouping
        where: slice,  # of the groups
    ) -> torch.Tensor:  # (n,), float32
        name, size = layer.name, layer.grouping.size
        if size < FEW: return self._ask(layer, where)
        if name not in self.few:
            step = max(1, CHUNK // size)
            self.few[name] = torch.cat([self._ask(layer, slice(i, i + step)) for i in range(0, layer.grouping.groups, step)])
        return self.few[name][where]

    def _ask(self, layer, where):
        name, grouping, by_chunk = layer.name, layer.grouping, getattr(self.criterion, 'elementwise', False)
        if name not in self.at_hand:
            self.at_hand.clear()
            evidence = gather(self.asked, layer.weight, name)
            if not by_chunk:
                with _replayed(self.seeds, layer): evidence = {'scores': score(self.criterion, evidence, name)}
            self.at_hand[name] = {n: grouping.rows(t) for n, t in evidence.items()}
        rows, asked = {n: t[where] for n, t in self.at_hand[name].items()}, (name, where.start, where.step)
        found = score(self.criterion, rows, name, check=asked not in self.checked) if by_chunk else rows['scores']
        self.checked.add(asked)
        return grouping.mean(found)


@contextmanager
def _replayed(seeds, layer):
    "The random numbers that a criterion draws for a layer are the same each time within one event."
    devices = [layer.weight.device] if layer.weight.is_cuda else []
    if layer.name in seeds:
        with torch.random.fork_rng(devices):
            torch.set_rng_state(seeds[layer.name][0])
            for device, state in zip(devices, seeds[layer.name][1:]): torch.cuda.set_rng_state(state, device)
            yield
    else:
        seeds[layer.name] = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]
        yield
