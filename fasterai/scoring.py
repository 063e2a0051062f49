"The groups' scores within one event, asked for in slices."
import numpy as np
import torch

from fasterai.criteria import CriterionInfo, check_finite, finite, score
from fasterai.evidence import Evidence
from fasterai.peers import ALONE
from fasterai.selection import CHUNK

FEW = 8  # weights a group from which on torch scores all groups at once, for their scores are half a byte a weight or less


class Scores:
    """Answers for the groups' scores within one event.

    Evidence, or the scores of a criterion that is not `elementwise`, are at hand for one layer at a time. Only where
    groups are large, and their scores few, are these kept to the end."""

    def __init__(self,
        criterion: CriterionInfo,
        evidence: Evidence,
        layers: list,  # that may be asked for; each has a name, a weight and a grouping
    ):
        self.criterion, self.evidence = criterion, evidence
        self.unchecked = [layer for layer in layers if not ALONE.on_host(layer.weight)]
        self.at_hand, self.rows, self.few, self.here = None, {}, {}, True

    def __call__(self,
        layer,  # one of `layers`
        where: slice | torch.Tensor,  # of the groups, or their positions
    ) -> torch.Tensor | np.ndarray:  # (n,), float32; an array where it can be
        if self.unchecked: self._check()
        if layer.grouping.size < FEW: return self._ask(layer, where)
        if layer.name not in self.few: self.few[layer.name] = self._ask_all(layer)
        return self.few[layer.name][where]

    def _check(self):
        "`ValueError` if a score on a GPU is NaN or infinite, with one wait for all layers; on the host that is seen chunk by chunk."
        layers, self.unchecked = self.unchecked, []
        highest = ALONE.fetched([self(layer, slice(None)).max()[None] for layer in layers])
        for layer, most in zip(layers, highest):
            if finite(most): continue
            evidence = self.evidence.of(layer)
            check_finite(self._score(evidence, layer, layer.weight.shape), self.criterion, evidence, layer.name)

    def _ask_all(self, layer):
        "The scores of all groups of a layer, by torch, whose threads want more at a time than numpy."
        step = max(1, 4 * CHUNK // layer.grouping.size)
        wheres = [slice(i, i + step) for i in range(0, layer.grouping.groups, step)]
        return torch.cat([torch.as_tensor(self._ask(layer, where)) for where in wheres])

    def _ask(self, layer, where):
        by_chunk = self.criterion.elementwise and self.evidence.weight_shaped and not layer.grouping.pad  # what pads a short group has no score
        if self.at_hand is not layer: self._take(layer, by_chunk)
        rows = {name: row[where] for name, row in self.rows.items()}
        if not by_chunk: return layer.grouping.mean(rows['scores'], where)
        scores = self._score(rows, layer, next(iter(rows.values())).shape)
        means = layer.grouping.mean(scores, where)
        if self.here and not finite(means): check_finite(scores, self.criterion, rows, layer.name)  # a mean may overflow
        return means

    def _take(self, layer, by_chunk):
        "Have a layer's evidence at hand, or its scores, in rows of groups; what was at hand goes first."
        self.at_hand, self.rows = layer, {}
        evidence = self.evidence.of(layer)
        self.here = ALONE.on_host(next(iter(evidence.values())))
        if not by_chunk:
            scores = self._score(evidence, layer, layer.weight.shape)
            if self.here: check_finite(scores, self.criterion, evidence, layer.name)
            evidence = {'scores': scores}
        self.rows = {name: layer.grouping.rows(tensor) for name, tensor in evidence.items()}
        if layer.grouping.size < FEW or not self.criterion.pure:
            self.rows = {name: _array(rows) for name, rows in self.rows.items()}

    def _score(self, evidence, layer, shape): return score(self.criterion, evidence, layer.name, shape)


def _array(tensor):
    "Its numpy array, where it has one: on a CPU that is compared and counted many times faster."
    has_one = ALONE.on_host(tensor) and tensor.dtype in (torch.float32, torch.float64)
    return tensor.numpy() if has_one else tensor
