"Compute the scores of groups within one event, as they are asked for."
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from fasterai.criteria import CRITERIA, CriterionInfo, check_evidence, check_finite, finite, score
from fasterai.evidence import Evidence, made
from fasterai.inputs import form_of
from fasterai.native.sweep import Terms
from fasterai.peers import ALONE, as_array
from fasterai.regrowth import below_living
from fasterai.selection import CHUNK

FEW = 8  # weights a group: from so many on torch scores all groups at once, for their scores need little memory


class Scores:
    """Return the scores of a layer's groups, in slices or at positions, within one event.

    The evidence about one layer at a time is held, or its scores where the criterion needs a whole layer.
    Scores are kept for the whole event where groups are large, so that they are few, or where large matrices
    are needed for them."""

    def __init__(self,
        criterion: CriterionInfo,
        evidence: Evidence,
        layers: list,  # those of the event; each has a name, a weight and a grouping
    ):
        self.criterion, self.evidence = criterion, evidence
        self.support = None  # (layer, scores of the weight's shape) -> the mask that it would have by them, if it were alone
        self.unchecked = [layer for layer in layers if not ALONE.on_host(layer.weight)]
        self.latest, self.rows, self.on_host = None, {}, True  # the layer that is held; {part of its evidence: rows of its groups}
        self.makes = {}  # how its evidence is made of these
        self.kept = {}  # layer's name: scores of all its groups

    def __call__(self,
        layer,  # one of `layers`
        where: slice | torch.Tensor,  # which groups: a slice, or positions
    ) -> torch.Tensor | np.ndarray:  # (n,), float32 or float64; an array where possible
        "Return the scores of some groups of a layer."
        if self.unchecked: self._check_all()
        if layer.grouping.size < FEW and not self.criterion.large: return self._ask(layer, where)
        if layer.name not in self.kept: self.kept[layer.name] = self._ask_all(layer)
        return self.kept[layer.name][where]

    def terms(self, layer) -> Terms | None:
        "Return what C code can compute the scores of all groups of a layer from, None where it cannot."
        if not ALONE.on_host(layer.weight): return None
        if layer.grouping.size >= FEW or self.criterion.large:
            return Terms('plain', as_array(self(layer, slice(None))))
        if layer.grouping.size > 1: return None
        in_chunks = self._in_chunks(layer)
        if self.latest is not layer: self._hold(layer, in_chunks)
        if not in_chunks: return Terms('plain', self.rows['scores'])
        return _terms(self.criterion, self.makes, self.rows)

    def _check_all(self):
        """Raise `ValueError` if a score on a GPU is NaN or infinite.

        The host waits once for all layers. On the host scores are checked chunk by chunk, as they are
        computed."""
        layers, self.unchecked = self.unchecked, []
        highest = ALONE.fetched([self(layer, slice(None)).max()[None] for layer in layers])
        for layer, most in zip(layers, highest):
            if finite(most): continue
            parts, makes = self.evidence.parts(layer, self.criterion.evidence)
            self._check(self._score(layer, made(makes, parts), layer.weight.shape), parts, layer)

    def _ask_all(self, layer):
        "Return the scores of all groups, computed by torch, whose threads need larger chunks than numpy."
        step = max(1, 4 * CHUNK // layer.grouping.size)
        wheres = [slice(i, i + step) for i in range(0, layer.grouping.groups, step)]
        return torch.cat([torch.as_tensor(self._ask(layer, where)) for where in wheres])

    def _ask(self, layer, where):
        in_chunks = self._in_chunks(layer)
        if self.latest is not layer: self._hold(layer, in_chunks)
        rows = {name: row[where] for name, row in self.rows.items()}
        if not in_chunks: return layer.grouping.mean(rows['scores'], where)
        scores = self._score(layer, made(self.makes, rows), next(iter(rows.values())).shape)
        means = layer.grouping.mean(scores, where)
        if self.on_host and not finite(means): self._check(scores, rows, layer)  # where only a mean overflows, this passes
        return means

    def _in_chunks(self, layer):
        "Tell whether the criterion can be called on chunks of a layer; what pads a short group has no score."
        if layer.grouping.pad: return False
        of_chunk = self.criterion.elementwise and not self.criterion.relative
        return of_chunk and self.criterion.weight_shaped

    def _hold(self, layer, in_chunks):
        "Hold the evidence about a layer, or its scores, in rows of groups; the layer before is let go first."
        self.latest, self.rows = layer, {}
        held, self.makes = self.evidence.parts(layer, self.criterion.evidence)
        self.on_host = ALONE.on_host(next(iter(held.values())))
        if self.criterion.large: check_evidence(held, layer.name)  # a matrix with a NaN has no inverse
        if not in_chunks:
            scores = self._score(layer, made(self.makes, held), layer.weight.shape)
            if self.on_host: self._check(scores, held, layer)
            held = {'scores': _shares(scores) if self.criterion.relative else scores}
        self.rows = {name: layer.grouping.rows(tensor) for name, tensor in held.items()}
        if layer.grouping.size < FEW or not self.criterion.pure: self.rows = _as_arrays(self.rows)

    def _score(self, layer, evidence, shape):
        support = partial(self.support, layer) if self.support else None
        return score(self.criterion, evidence, layer.name, shape, form_of(layer.grouping.axes), support)

    def _check(self, scores, parts, layer): check_finite(scores, self.criterion, parts, layer.name)


class Gone:
    """Return the scores of groups that are gone, within one event: below those of all groups that live, by
    a regrowth, and ties at random."""

    def __init__(self,
        regrowth: CriterionInfo,
        evidence: Evidence,
        layers: list,  # those of which something may come back
        living: Scores,  # of the criterion that prunes
    ):
        self.unknown = evidence.lacking(layers, regrowth.evidence, 'regrow')
        known = [layer for layer in layers if layer.name not in self.unknown]
        self.scores = living if regrowth is living.criterion else Scores(regrowth, evidence, known)
        self.noise = Scores(CRITERIA['random'], evidence, [])

    def __call__(self,
        tied: list,  # layers that are pruned as one
        where: slice | torch.Tensor,  # which groups: a slice, or positions
    ) -> torch.Tensor:  # (n,), float64
        "Return the scores of some groups."
        noise = torch.as_tensor(together(self.noise, tied, where))
        known = not any(layer.name in self.unknown for layer in tied)
        scores = torch.as_tensor(together(self.scores, tied, where)) if known else torch.zeros_like(noise)
        return below_living(scores, noise)


def together(
    scores: Scores,
    tied: list,  # layers that are pruned as one
    where: slice | torch.Tensor,  # which groups: a slice, or positions
) -> torch.Tensor | np.ndarray:  # (n,)
    "Return the scores of their n-th groups: the mean over all weights of these."
    if len(tied) == 1: return scores(tied[0], where)
    sizes = [_sizes(layer, where) for layer in tied]
    size = sum(sizes)
    return sum(torch.as_tensor(scores(layer, where)) * (own / size) for layer, own in zip(tied, sizes))


def _sizes(layer, where):
    "Return the number of weights in groups of a layer: one, or (n,) where they differ."
    sizes = layer.grouping.sizes
    return sizes.to(layer.weight.device)[where] if isinstance(sizes, torch.Tensor) else sizes


def _terms(criterion, makes, rows):
    "Return what the C code can compute the scores of a criterion from, None where it cannot."
    if len(makes) != 1: return None
    (make, parts), = makes.values()
    given = make.args if isinstance(make, partial) else ()
    of_score, of_evidence = (getattr(f, 'form', None) for f in (criterion.score, getattr(make, 'func', make)))
    values = [rows[part] for part in parts]
    if of_score and of_evidence == 'plain': return Terms(of_score, *values)
    if of_score != 'plain' or of_evidence is None: return None
    return Terms(of_evidence, *values, divisor=float(given[0]) if given else 1.)


def _shares(scores):
    "Return scores as shares of the layer's, whose squares sum up to 1."
    norm = torch.linalg.vector_norm(scores, dtype=torch.float64)
    return (scores / torch.where(norm > 0, norm, 1)).to(scores.dtype)


def _as_arrays(rows):
    "Return all as arrays, or, where one has no array, as in half precision, all as they are."
    arrays = {name: as_array(values) for name, values in rows.items()}
    return arrays if all(isinstance(values, np.ndarray) for values in arrays.values()) else rows


@dataclass(frozen=True)
class LayerScores:
    "Return the scores of one layer's groups within one event."
    scores: Scores
    layer: object  # one of its layers

    def __call__(self, where): return self.scores(self.layer, where)
    def terms(self) -> Terms | None: return self.scores.terms(self.layer)
