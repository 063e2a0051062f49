"Score weights by their importance (saliency): pure functions from the evidence about one layer to scores."
import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter, signature
from math import inf

import numpy as np
import torch

from fasterai.arguments import name_of, nearest, one_of
from fasterai.evidence import EVIDENCE, widened

Criterion = Callable[..., torch.Tensor | np.ndarray]
"""A function of evidence about one layer, named by its arguments, that returns scores of the weight's
shape; larger = keep. An argument `name` gets the layer's name."""
NAME = 'name'  # what a criterion may ask for beside evidence


def elementwise(criterion: Callable) -> Callable:
    """Mark a criterion that scores each weight by that weight's own evidence, with operators that torch and
    numpy share.

    It is called on chunks of a layer, and on a CPU with numpy arrays: that is fast and needs little
    memory."""
    criterion.elementwise = True
    return criterion


# Criteria

@elementwise
def magnitude(
    weight: torch.Tensor,  # any shape
) -> torch.Tensor:  # of the same shape
    "Score each weight by its absolute value, |w| (Han et al. 2015)."
    return abs(weight)


@elementwise
def gradient(
    saliency: torch.Tensor,  # any shape, |w · g| of each batch, averaged over the steps since the last event
) -> torch.Tensor:  # of the same shape
    """Score each weight by |w · ∂L/∂w|, the first-order change of the loss where it is pruned.

    Known as saliency or SNIP criterion (Mozer & Smolensky 1989, Molchanov et al. 2017, Lee et al. 2019). It
    is the mean over the training steps since the last event, or that of the gradient that is there."""
    return saliency


@elementwise
def taylor(
    weight: torch.Tensor,  # any shape
    batch_squares: torch.Tensor,  # of the same shape, g² of each batch, averaged over the steps since the last event
) -> torch.Tensor:  # of the same shape
    "Score each weight by the mean of (w · g)² over batches, as w² · mean(g²) (Molchanov et al. 2019)."
    return weight * weight * batch_squares


@elementwise
def movement(
    movement: torch.Tensor,  # any shape, the sum of -w · g over all training steps
) -> torch.Tensor:  # of the same shape
    """Score each weight by -Σ w · g: how far training has moved it away from zero (Sanh et al. 2020).

    A pruned weight stays pruned here; in the paper it learns on and may come back."""
    return movement


@elementwise
def squared(
    weight: torch.Tensor,  # any shape
) -> torch.Tensor:  # of the same shape
    "Score each weight by w². Of groups of one size this is the order of their L2 norms (He et al. 2018)."
    return weight * weight


@elementwise
def magnitude_increase(
    weight: torch.Tensor,  # any shape
    initial: torch.Tensor,  # of the same shape, the weight when the Sparsifier was made
) -> torch.Tensor:  # of the same shape
    "Score each weight by |w| - |w₀|, its growth since the Sparsifier was made (Zhou et al. 2019)."
    return abs(weight) - abs(initial)


@elementwise
def random(
    noise: torch.Tensor,  # any shape, uniform between 0 and 1, drawn once an event by torch's seed
) -> torch.Tensor:  # of the same shape
    "Score each weight at random: the baseline that every criterion must beat."
    return noise


@dataclass(frozen=True)
class CriterionInfo:
    "Describe a criterion, as a row of `CRITERIA`: its function, and what others must know of it."
    score: Criterion
    evidence: tuple = ()  # names in `EVIDENCE`: what it asks for
    elementwise: bool = False  # it can be called on a chunk of a layer
    asks_name: bool = False  # it gets the layer's name, too
    pure: bool = False  # it does not write into its evidence, and takes tensors as well as arrays
    zeros_lowest: bool = False  # it gives weights that are zero a score below those of all others


def evidence_of(
    criterion: Criterion,
) -> tuple:  # names in `EVIDENCE`
    "Return what a criterion asks for: the names of its arguments without a default, but for `name`."
    return tuple(name for name in _asked(criterion) if name != NAME)


def _asked(criterion):
    several = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    arguments = signature(criterion).parameters.items()
    return tuple(n for n, p in arguments if p.default is p.empty and p.kind not in several)


def _is_elementwise(criterion): return getattr(criterion, 'elementwise', False)


def _row(criterion, pure=True, zeros_lowest=False):
    asked, asks_name = evidence_of(criterion), NAME in _asked(criterion)
    if asked:
        return CriterionInfo(criterion, asked, _is_elementwise(criterion), asks_name, pure, zeros_lowest)
    return CriterionInfo(_with_weight(criterion), ('weight',), asks_name=True)


def _with_weight(criterion):
    "Make a criterion of the name alone one of the weight too, which says where its scores are needed."
    @wraps(criterion)
    def of_weight(weight, name):
        scores = criterion(name=name)
        return scores.detach().to(weight.device) if isinstance(scores, torch.Tensor) else scores
    return of_weight


# To add a criterion, write a function whose arguments name its evidence, and a row.
CRITERIA = {
    'magnitude': _row(magnitude, zeros_lowest=True),
    'gradient': _row(gradient),
    'taylor': _row(taylor),
    'movement': _row(movement),
    'squared': _row(squared),
    'magnitude_increase': _row(magnitude_increase),
    'random': _row(random),
}


def read_criterion(
    criterion: str | Criterion,  # a name in `CRITERIA`, or a function of evidence
) -> CriterionInfo:
    """Return the criterion of this name, or a row for a function.

    `ValueError` or `TypeError` where it is neither, or asks for no evidence."""
    known = ' and '.join([*EVIDENCE, NAME])
    criterion = one_of('criteria', criterion, CRITERIA, f'or a function of {known}')
    if isinstance(criterion, CriterionInfo): return criterion
    for row in CRITERIA.values():
        if criterion is getattr(row, 'score', None): return row
    try: asked = _asked(criterion)
    except (ValueError, TypeError):
        raise TypeError(f'criteria: got {criterion!r}, whose arguments cannot be read; '
                        f'expected a function of {known}, as lambda weight: weight.abs()') from None
    _check_evidence(criterion, asked)
    return _row(criterion, pure=False)


def _check_evidence(criterion, asked):
    known = [*EVIDENCE, NAME]
    for name in asked or ['nothing']:
        if name in known: continue
        raise ValueError(f'criteria: {name_of(criterion)} asks for {name!r}, '
                         f'expected arguments named {", ".join(known)}{nearest(name, known)}')


# Scores

def score(
    criterion: CriterionInfo,
    evidence: dict,  # name: a tensor of one layer, or the same chunk of each; all tensors, or all arrays
    name: str,  # the layer's name
    shape: tuple,  # of the weight, or of the chunk
) -> torch.Tensor | np.ndarray:  # float32, or float64 where some evidence is, of that shape; larger = keep
    """Score a layer or a chunk of it.

    Half-precision evidence is widened first, so that products do not underflow."""
    kind = type(next(iter(evidence.values())))
    is_double = any(e.dtype in (torch.float64, np.float64) for e in evidence.values())
    given = {n: widened(e) for n, e in evidence.items()}
    if criterion.asks_name: given[NAME] = name
    if not criterion.pure: given = copy.deepcopy(given)  # a user's criterion may work in place
    with np.errstate(all='ignore'):  # `check_finite` looks at the result
        scores = criterion.score(**given)
        if not isinstance(scores, kind) or scores.shape != shape or not _can_be_ordered(scores):
            raise _wrong_scores(criterion, scores, name, shape)
        if kind is torch.Tensor: return scores.double() if is_double else scores.float()
        return scores.astype(np.float64 if is_double else np.float32, copy=False)


def _can_be_ordered(scores):
    "Tell whether scores are a dense tensor, or an array, of real numbers."
    if isinstance(scores, np.ndarray): return scores.dtype.kind in 'fiub'
    return scores.layout == torch.strided and not scores.is_complex() and not scores.is_meta


def _wrong_scores(criterion, scores, name, shape):
    came = repr(scores)
    if isinstance(scores, (torch.Tensor, np.ndarray)):
        came = f'a tensor of shape {tuple(scores.shape)}'
        of_tensor = [getattr(scores, name, '') for name in ('dtype', 'layout', 'device')]
        if not _can_be_ordered(scores): came += f' ({", ".join(map(str, of_tensor))})'
    return ValueError(f"criteria: {name_of(criterion.score)} gave {came} for layer {name!r}, "
                      f"expected a tensor of real numbers of the weight's shape {tuple(shape)}")


def check_finite(
    scores: torch.Tensor | np.ndarray,  # of `score`
    criterion: CriterionInfo,
    evidence: dict,  # name: tensor or array that they were computed from
    name: str,  # the layer's name
):
    "Raise `ValueError` if there is a NaN or an infinity, and say where it comes from."
    if finite(scores): return
    bad = [f'{n} of' for n, e in evidence.items() if not finite(abs(e))]
    blame = bad[0] if bad else f'scores by {name_of(criterion.score)} for'
    raise ValueError(f'criteria: the {blame} layer {name!r} has NaN or infinite entries; nothing was changed')


def finite(
    values: torch.Tensor | np.ndarray,
) -> bool:
    "Tell whether there is no NaN and no positive infinity. -inf may stay: it is the lowest score."
    return 0 in values.shape or float(values.max()) < inf
