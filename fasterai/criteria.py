"How much each weight matters: pure functions from the evidence about one layer to scores."
import inspect
from collections.abc import Callable
from math import isfinite

import torch

from fasterai.arguments import name_of, nearest, one_of


def elementwise(criterion: Callable) -> Callable:
    "Mark a criterion that scores each weight by that weight's own evidence alone: it is asked in chunks, which is fast and small."
    criterion.elementwise = True
    return criterion


@elementwise
def magnitude(weight: torch.Tensor) -> torch.Tensor:
    "|w|: what is small is not missed (Han et al. 2015)."
    return weight.abs()


@elementwise
def gradient(weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    "|w · ∂L/∂w|: the first-order change of the loss when the weight goes (Mozer & Smolensky 1989, Molchanov et al. 2017)."
    return (weight * grad).abs()


CRITERIA = {'magnitude': magnitude, 'gradient': gradient}


def _grad(parameter, name):
    if parameter.grad is None:
        raise ValueError(f'criteria: layer {name!r} has no gradient: call after loss.backward() and before optimizer.zero_grad(), '
                         'and choose no layer that is frozen')
    return parameter.grad


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
    evidence: dict,  # of `gather`, or the same part of each of its tensors
    name: str,  # the layer's name, for errors
    check: bool = True,  # False where the same was found finite before
) -> torch.Tensor:  # float32, of the evidence's shape, finite, larger = keep
    "The scores of one layer or a part of it; half-precision evidence is widened first, so that products do not underflow."
    given = {n: t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for n, t in evidence.items()}
    if criterion not in CRITERIA.values(): given = {n: t.clone() for n, t in given.items()}  # what works in place shall not reach the model
    scores = criterion(**given)
    shape = next(iter(evidence.values())).shape
    if not isinstance(scores, torch.Tensor) or scores.shape != shape:
        came = f'a tensor of shape {tuple(scores.shape)}' if isinstance(scores, torch.Tensor) else repr(scores)
        raise ValueError(f"criteria: {name_of(criterion)} gave {came} for layer {name!r}, allowed is a tensor of the weight's shape {tuple(shape)}")
    scores = scores.float()
    if check and not isfinite(float(scores.sum())) and not scores.isfinite().all():  # the sum is quick; alone it may overflow
        blame = next((f'{n} of' for n, t in evidence.items() if not t.isfinite().all()), f'scores by {name_of(criterion)} for')
        raise ValueError(f'criteria: the {blame} layer {name!r} has NaN or infinite entries; nothing was changed')
    return scores
