"How much each weight matters: pure functions from the evidence about one layer to scores."
import copy
from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter, signature
from math import inf

import numpy as np
import torch

from fasterai.arguments import name_of, nearest, one_of
from fasterai.evidence import EVIDENCE

Criterion = Callable[..., torch.Tensor | np.ndarray]
"A function of evidence about one layer, which it names by its arguments, to scores of the weight's shape; larger means keep."


def elementwise(criterion: Callable) -> Callable:
    """Mark a criterion that scores each weight by that weight's own evidence alone, in operators that torch and numpy share.

    It is asked in chunks, and on a CPU its evidence comes as arrays: that is fast and small."""
    criterion.elementwise = True
    return criterion


@elementwise
def magnitude(weight: torch.Tensor) -> torch.Tensor:
    "|w|: what is small is not missed (Han et al. 2015)."
    return abs(weight)


@elementwise
def gradient(weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    "|w · ∂L/∂w|: the first-order change of the loss when the weight goes (Mozer & Smolensky 1989, Molchanov et al. 2017)."
    return abs(weight * grad)


@dataclass(frozen=True)
class CriterionInfo:
    "A criterion, and what others must know of it."
    score: Criterion
    evidence: tuple = ()  # names in `EVIDENCE`: what it asks for
    elementwise: bool = False  # can it be asked for a part of a layer?
    pure: bool = False  # does it leave its evidence as it is, and take tensors as well as arrays?


def _row(criterion):
    "One of the table: it leaves its evidence as it is."
    return CriterionInfo(criterion, evidence_of(criterion), getattr(criterion, 'elementwise', False), pure=True)


def evidence_of(
    criterion: Callable,
) -> tuple:  # names in `EVIDENCE`
    "What a criterion asks for: its arguments without a default."
    several = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    arguments = signature(criterion).parameters.items()
    return tuple(n for n, p in arguments if p.default is p.empty and p.kind not in several)


CRITERIA = {'magnitude': _row(magnitude), 'gradient': _row(gradient)}


def read_criterion(
    criterion: str | Callable,  # a name in `CRITERIA`, or a function of evidence
) -> CriterionInfo:
    "The criterion that is meant; refused if it asks for what there is not, or for nothing."
    criterion = one_of('criteria', criterion, CRITERIA, f'or a function of {" and ".join(EVIDENCE)}')
    for row in CRITERIA.values():
        if criterion in (row, row.score): return row
    try: asked = evidence_of(criterion)
    except (ValueError, TypeError):
        raise TypeError(f'criteria: got {criterion!r}, whose arguments cannot be read; allowed is a function of {" and ".join(EVIDENCE)}, '
                        'as lambda weight: weight.abs()') from None
    for name in asked or ['nothing']:
        if name in EVIDENCE: continue
        raise ValueError(f'criteria: {name_of(criterion)} asks for {name!r}, allowed are arguments named {", ".join(EVIDENCE)}'
                         f'{nearest(name, EVIDENCE)}')
    return CriterionInfo(criterion, asked, getattr(criterion, 'elementwise', False))


def score(
    criterion: CriterionInfo,
    evidence: dict,  # of one layer, or the same part of each of its tensors; all tensors, or all arrays
    name: str,  # the layer's name, for errors
    shape: tuple,  # of the weight, or of the part
) -> torch.Tensor | np.ndarray:  # as the evidence came: float32, of that shape, larger = keep
    "The scores of one layer or a part of it; half-precision evidence is widened first, so that products do not underflow."
    kind = type(next(iter(evidence.values())))
    given = {n: _widened(e) for n, e in evidence.items()}
    if not criterion.pure: given = {n: copy.deepcopy(e) for n, e in given.items()}  # one of the user's may work in place
    with np.errstate(all='ignore'):  # `check_finite` looks at what came of it
        scores = criterion.score(**given)
        if not isinstance(scores, kind) or scores.shape != shape:
            came = repr(scores)
            if isinstance(scores, (torch.Tensor, np.ndarray)): came = f'a tensor of shape {tuple(scores.shape)}'
            raise ValueError(f"criteria: {name_of(criterion.score)} gave {came} for layer {name!r}, "
                             f"allowed is a tensor of the weight's shape {tuple(shape)}")
        if kind is torch.Tensor: return scores.float()
        return scores.astype(np.float32, copy=False)


def _widened(values):
    half = isinstance(values, torch.Tensor) and values.dtype in (torch.float16, torch.bfloat16)
    return values.float() if half else values


def check_finite(
    scores: torch.Tensor | np.ndarray,  # of `score`
    criterion: CriterionInfo,
    evidence: dict,  # that they come from
    name: str,  # the layer's name
):
    "`ValueError` if there is a NaN or an infinity, which says where it comes from."
    if finite(scores): return
    blame = next((f'{n} of' for n, e in evidence.items() if not finite(abs(e))), f'scores by {name_of(criterion.score)} for')
    raise ValueError(f'criteria: the {blame} layer {name!r} has NaN or infinite entries; nothing was changed')


def finite(
    values: torch.Tensor | np.ndarray,
) -> bool:
    "Is there no NaN and no infinity? -inf passes: it is lower than all, and does no harm."
    return 0 in values.shape or float(values.max()) < inf
