"The groups' scores within one event, asked for in slices."
from collections.abc import Callable

import numpy as np
import torch

from fasterai.criteria import CRITERIA, check_finite, evidence_of, finite, gather, score
from fasterai.peers import ALONE
from fasterai.selection import CHUNK

FEW = 8  # weights a group from which on torch scores all groups at once, for their scores are half a byte a weight or less


class Scores:
    """Answers for the groups' scores within one event.

    Evidence, or the scores of a criterion that is not `elementwise`, are at hand for one layer at a time. Only where
    groups are large, and their scores few, are these kept to the end."""

    def __init__(self,
        criterion: Callable,
        layers: list,  # that may be asked for; each has a name, a weight and a grouping
    ):
        self.unchecked = [layer for layer in layers if not ALONE.on_host(layer.weight)]
        self.criterion, self.asked = criterion, evidence_of(criterion)
        self.elementwise = getattr(criterion, 'elementwise', False)
        self.at_hand, self.rows, self.few, self.here = None, {}, {}, True

    def _check(self):
        "`ValueError` if a score on a GPU is NaN or infinite, with one wait for all layers; on the host that is seen chunk by chunk."
        layers, self.unchecked = self.unchecked, []
        for layer, most in zip(layers, ALONE.fetched([self(layer, slice(None)).max()[None] for layer in layers])):
            if finite(most): continue
            evidence = gather(self.asked, layer.weight, layer.name)
            check_finite(score(self.criterion, evidence, layer.name), self.criterion, evidence, layer.name)

    def __call__(self,
        layer,  # one of `layers`
        where: slice | torch.Tensor,  # of the groups, or their positions
    ) -> torch.Tensor | np.ndarray:  # (n,), float32; an array where it can be
        if self.unchecked: self._check()
        name, size = layer.name, layer.grouping.size
        if size < FEW: return self._ask(layer, where)
        if name not in self.few:
            step = max(1, 4 * CHUNK // size)  # torch's threads want more at a time than numpy
            found = [torch.as_tensor(self._ask(layer, slice(i, i + step))) for i in range(0, layer.grouping.groups, step)]
            self.few[name] = torch.cat(found)
        return self.few[name][where]

    def _ask(self, layer, where):
        by_chunk = self.elementwise and not layer.grouping.pad  # what pads a short group has no score
        if self.at_hand is not layer:
            self.at_hand, self.rows = layer, {}  # what was at hand goes first
            evidence = gather(self.asked, layer.weight, layer.name)
            self.here = ALONE.on_host(evidence[self.asked[0]])
            if not by_chunk:
                scores = score(self.criterion, evidence, layer.name)
                if self.here: check_finite(scores, self.criterion, evidence, layer.name)
                evidence = {'scores': scores}
            self.rows = {n: layer.grouping.rows(t) for n, t in evidence.items()}
            if layer.grouping.size < FEW or self.criterion not in CRITERIA.values(): self.rows = {n: _array(t) for n, t in self.rows.items()}
        rows = {n: t[where] for n, t in self.rows.items()}
        if not by_chunk: return layer.grouping.mean(rows['scores'], where)
        scores = score(self.criterion, rows, layer.name)
        means = layer.grouping.mean(scores, where)
        if self.here and not finite(means): check_finite(scores, self.criterion, rows, layer.name)  # a mean may overflow
        return means


def _array(tensor):
    "Its numpy array, where it has one: on a CPU that is compared and counted many times faster."
    return tensor.numpy() if ALONE.on_host(tensor) and tensor.dtype in (torch.float32, torch.float64) else tensor
