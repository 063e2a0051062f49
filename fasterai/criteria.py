"How much each weight matters: pure functions from the evidence about one layer to scores."
import copy
import inspect
from collections.abc import Callable
from math import inf

import numpy as np
import torch

from fasterai.arguments import name_of, nearest, one_of


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


CRITERIA = {'magnitude': magnitude, 'gradient': gradient}


def _grad(parameter, name):
    if parameter.grad is None:
        raise ValueError(f'criteria: layer {name!r} has no gradient: call after loss.backward() and before optimizer.zero_grad(), '
                         'and choose no layer that is frozen')
    return parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad


# What a criterion may ask for, by the name of its argument.
EVIDENCE = {'weight': lambda parameter, name: parameter, 'grad': _grad}


def read_criterion(
    criterion: str | Callable,  # a name in `CRITERIA`, or a function of evidence
) -> Callable:
    "The criterion that is meant; refused if it asks for what there is not, or for nothing."
    criterion = one_of('criteria', criterion, CRITERIA, f'a function of {" and ".join(EVIDENCE)}')
    try: asked = evidence_of(criterion)
    except (ValueError, TypeError):
        raise TypeError(f'criteria: got {criterion!r}, whose arguments cannot be read; allowed is a function of {" and ".join(EVIDENCE)}, '
                        'as lambda weight: weight.abs()') from None
    for name in asked or ['nothing']:
        if name not in EVIDENCE:
            raise ValueError(f'criteria: {name_of(criterion)} asks for {name!r}, allowed are arguments named {", ".join(EVIDENCE)}'
                             f'{nearest(name, EVIDENCE)}')
    return criterion


def evidence_of(
    criterion: Callable,
) -> tuple:  # names in `EVIDENCE`
    "What a criterion asks for: its arguments without a default."
    return tuple(n for n, p in inspect.signature(criterion).parameters.items()
                 if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


def gather(
    asked: tuple,  # names in `EVIDENCE`
    parameter: torch.nn.Parameter,  # the layer's weight, any float type
    name: str,  # the layer's name, for errors
) -> dict:  # argument's name: tensor of the weight's shape
    "The evidence about one layer."
    return {n: EVIDENCE[n](parameter, name).detach() for n in asked}


def score(
    criterion: Callable,
    evidence: dict,  # of `gather`, or the same part of each of its tensors; all tensors, or all arrays
    name: str,  # the layer's name, for errors
) -> torch.Tensor | np.ndarray:  # as the evidence came: float32, of its shape, larger = keep
    "The scores of one layer or a part of it; half-precision evidence is widened first, so that products do not underflow."
    kind, shape = type(first := next(iter(evidence.values()))), first.shape
    given = evidence
    if kind is torch.Tensor: given = {n: e.float() if e.dtype in (torch.float16, torch.bfloat16) else e for n, e in given.items()}
    if criterion not in CRITERIA.values(): given = {n: copy.deepcopy(e) for n, e in given.items()}  # one of the user's may work in place
    with np.errstate(all='ignore'):  # `check_finite` looks at what came of it
        scores = criterion(**given)
        if not isinstance(scores, kind) or scores.shape != shape:
            came = f'a tensor of shape {tuple(scores.shape)}' if isinstance(scores, (torch.Tensor, np.ndarray)) else repr(scores)
            raise ValueError(f"criteria: {name_of(criterion)} gave {came} for layer {name!r}, "
                             f"allowed is a tensor of the weight's shape {tuple(shape)}")
        scores = scores.float() if kind is torch.Tensor else scores.astype(np.float32, copy=False)
    return scores


def check_finite(
    scores: torch.Tensor | np.ndarray,  # of `score`
    criterion: Callable,
    evidence: dict,  # that they come from
    name: str,  # the layer's name
):
    "`ValueError` if there is a NaN or an infinity, which says where it comes from."
    if finite(scores): return
    blame = next((f'{n} of' for n, e in evidence.items() if not finite(abs(e))), f'scores by {name_of(criterion)} for')
    raise ValueError(f'criteria: the {blame} layer {name!r} has NaN or infinite entries; nothing was changed')


def finite(
    values: torch.Tensor | np.ndarray,
) -> bool:
    "Is there no NaN and no infinity? -inf passes: it is lower than all, and does no harm."
    return 0 in values.shape or float(values.max()) < inf
