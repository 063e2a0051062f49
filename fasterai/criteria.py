"Score weights by their importance (saliency): pure functions from the evidence about one layer to scores."
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import wraps
from inspect import Parameter, signature
from math import inf

import numpy as np
import torch

from fasterai.arguments import name_of, nearest, one_of
from fasterai.curvature import adjusted
from fasterai.inputs import as_matrix, from_matrix
from fasterai.kinds import EVIDENCE, widened
from fasterai.least_squares import DAMPING
from fasterai.native.sweep import compiled

Criterion = Callable[..., torch.Tensor | np.ndarray]
"""A function of evidence about one layer, named by its arguments, that returns scores of the weight's
shape; larger = keep. An argument `name` gets the layer's name, `support` a function from scores to the mask
that the layer would have by them, if it were alone."""
BESIDE = 'name', 'support'  # what a criterion may ask for beside evidence
ADMM_STEPS = 300  # of `alps`, at most
PENALTY_GROWTH = (.1, 1.3), (.005, 1.2), (-1, 1.1)  # of `alps`, where more than this share of the support has changed


def elementwise(criterion: Callable) -> Callable:
    """Mark a criterion that scores each weight by that weight's own evidence, with operators that torch and
    numpy share.

    It is called on chunks of a layer, and on a CPU with numpy arrays: that is fast and needs little
    memory."""
    criterion.elementwise = True
    return criterion


def matrixwise(criterion: Callable) -> Callable:
    """Mark a criterion that takes the weight as matrices, of which a row has what one output reads.

    It gets `(groups, outputs, inputs)` for the weight and what has its shape, and `(groups, inputs, inputs)`
    for the Gram matrix, of linear layers and of convolutions, with one group where they are not grouped."""
    criterion.matrixwise = True
    return criterion


# Criteria

@compiled('absolute')
@elementwise
def magnitude(
    weight: torch.Tensor,  # any shape
) -> torch.Tensor:  # of the same shape
    "Score each weight by its absolute value, |w| (Han et al. 2015)."
    return abs(weight)


@compiled('plain')
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


@compiled('square')
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


@compiled('plain')
@elementwise
def random(
    noise: torch.Tensor,  # any shape, uniform between 0 and 1, drawn once an event by torch's seed
) -> torch.Tensor:  # of the same shape
    "Score each weight at random: the baseline that every criterion must beat."
    return noise


@elementwise
def obd(
    weight: torch.Tensor,  # any shape
    grad_squares: torch.Tensor,  # of the same shape, the diagonal of the Fisher information, by single samples
) -> torch.Tensor:  # of the same shape
    "Score each weight by ½ h w², the second-order change of the loss (Optimal Brain Damage, LeCun 1990)."
    return weight * weight * grad_squares / 2


@elementwise
def obs(
    weight: torch.Tensor,  # any shape
    inverse_diagonal: torch.Tensor,  # of the same shape, that of the inverse of the Fisher information
) -> torch.Tensor:  # of the same shape
    """Score each weight by w² / (2 [H⁻¹]qq), the change of the loss when the others make up for it.

    They are adjusted in the same event: Optimal Brain Surgeon (Hassibi & Stork 1993)."""
    return weight * weight / (2 * inverse_diagonal)


@elementwise
def synflow(
    weight: torch.Tensor,  # any shape
    flow: torch.Tensor,  # of the same shape, ∂R/∂|w|, with R the sum of the outputs of the network of |w|
) -> torch.Tensor:  # of the same shape
    """Score each weight by |w| · ∂R/∂|w|, without data (Tanaka et al. 2020).

    It is computed anew in many rounds, so that no layer is emptied before the others."""
    return abs(weight) * flow


@elementwise
def wanda(
    weight: torch.Tensor,  # any shape
    input_norm: torch.Tensor,  # of the same shape, ‖x‖ of the input that each weight is multiplied by
) -> torch.Tensor:  # of the same shape
    """Score each weight by |w| · ‖x‖ (Sun et al. 2023).

    In the paper weights compete within an output, `context=within('O')`. Where layers compete, each score
    is taken as a share of its layer's."""
    return abs(weight) * input_norm


@matrixwise
def ria(
    weight: torch.Tensor,  # (groups, outputs, inputs)
    input_norm: torch.Tensor,  # of the same shape, ‖x‖ of the input that each weight is multiplied by
) -> torch.Tensor:  # of the same shape
    """Score each weight by (|w| / Σ of its row + |w| / Σ of its column) · √‖x‖ (Zhang et al. 2024).

    As with `wanda`, weights compete within an output in the paper, and layers by shares."""
    size = weight.abs()
    rows, columns = size.sum(2, keepdim=True), size.sum(1, keepdim=True)
    tiny = torch.finfo(size.dtype).tiny  # a row of zeros has scores of 0
    return (size / rows.clamp(min=tiny) + size / columns.clamp(min=tiny)) * input_norm.sqrt()


@matrixwise
def sparsegpt(
    weight: torch.Tensor,  # (groups, outputs, inputs)
    gram: torch.Tensor,  # (groups, inputs, inputs), XᵀX
) -> torch.Tensor:  # of the weight's shape
    """Score each weight by w² / [(XᵀX)⁻¹]qq, the error of the layer's output when the others make up for it.

    It is Optimal Brain Surgeon by layers (Frantar & Alistarh 2023). All inputs are compared at once, not in
    blocks one after the other, so that any context may choose. A score is a share of what the layer passes
    on, so that layers compare. Those that stay are then solved by least squares in the same event,
    `repair='refit'`."""
    inverse = torch.linalg.inv(_damped(gram.double())).diagonal(dim1=1, dim2=2)
    alive = gram.diagonal(dim1=1, dim2=2) > 0  # the weights of a dead input matter nothing
    return weight.double().square() / inverse[:, None] * alive[:, None] / _passed_on(weight, gram)


@matrixwise
def alps(
    weight: torch.Tensor,  # (groups, outputs, inputs)
    gram: torch.Tensor,  # (groups, inputs, inputs), XᵀX
    support: Callable,  # from scores to a mask
) -> torch.Tensor:  # of the weight's shape
    """Score each weight by its size in the layer's sparse reconstruction, found by ADMM (Meng et al. 2024).

    Splits min ‖X W' − X W‖² with W' in the support into a ridge regression and a projection, which come to
    agree. A score is a share of what the layer passes on, so that layers compare. Those that stay are then
    solved by least squares in the same event, `repair='refit'`."""
    norms = gram.diagonal(dim1=1, dim2=2).sqrt()
    scale = torch.where(norms > 0, norms, 1)
    scaled = _damped(gram / scale[:, :, None] / scale[:, None, :])
    values, vectors = torch.linalg.eigh(scaled)
    start = (weight * norms[:, None]).transpose(1, 2)  # (groups, inputs, outputs)
    wanted, split, dual, penalty = scaled @ start, start, torch.zeros_like(start), .1
    kept = torch.zeros_like(weight, dtype=torch.bool)
    for i in range(ADMM_STEPS):
        pulled = vectors.transpose(1, 2) @ (wanted - dual + penalty * split)
        solved = vectors @ (pulled / (values + penalty)[:, :, None])
        scores = (solved + dual / penalty).transpose(1, 2)
        keep = support(scores.abs())
        split = (scores * keep).transpose(1, 2)
        dual = dual + penalty * (solved - split)
        if i % 3: continue
        changed = float((keep != kept).sum() / keep.sum().clamp(min=1))
        kept = keep
        if not changed and penalty >= 1: break  # by then a weight outside is compared with one inside at its own worth
        penalty *= next(growth for least, growth in PENALTY_GROWTH if changed > least)
    return scores.abs() / _passed_on(weight, gram).sqrt()


def _passed_on(weight, gram):
    "Return the sum of (w ‖x‖)² over a layer; 1 where that is 0."
    passed = (weight.square() * gram.diagonal(dim1=1, dim2=2)[:, None]).sum()
    return torch.where(passed > 0, passed, 1)


def _damped(gram):
    "Return a Gram matrix with 1 for dead inputs, and what keeps it from being singular, on the diagonal."
    diagonal = gram.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    more = torch.where(diagonal > 0, DAMPING * mean, 1)
    return gram + torch.diag_embed(more)


@matrixwise
def fpgm(
    weight: torch.Tensor,  # (groups, outputs, inputs)
) -> torch.Tensor:  # of the same shape
    """Score the filters of a layer by the sum of their distances to the others, Σ ‖Fᵢ − Fⱼ‖ (He et al. 2019).

    A filter near the geometric median is like the others, and goes first."""
    filters = weight.double().flatten(0, 1)
    distances = torch.cdist(filters, filters).sum(1)
    return distances.reshape(*weight.shape[:2], 1).expand(weight.shape)


@dataclass(frozen=True)
class CriterionInfo:
    "Describe a criterion, as a row of `CRITERIA`: its function, and what others must know of it."
    score: Criterion
    evidence: tuple = ()  # names in `EVIDENCE`: what it asks for
    elementwise: bool = False  # it can be called on a chunk of a layer
    asks_name: bool = False  # it gets the layer's name, too
    pure: bool = False  # it does not write into its evidence, and takes tensors as well as arrays
    zeros_lowest: bool = False  # it gives weights that are zero a score below those of all others
    relative: bool = False  # its scores have the scale of a layer's inputs: an event takes them as shares of the layer's, so that layers compare
    matrixwise: bool = False  # it takes the weight and evidence as matrices
    asks_support: bool = False  # it gets a function from scores to the mask of the layer alone
    repairs: tuple = ()  # names in `repair.REPAIRS`: its own part of an event, after the masks
    adjust: Callable | None = None  # (layers, {layer's name: mask}, calibration) -> {layer's name: new weight}, before the masks
    round_keeps: Fraction | None = None  # an event is made in rounds, of which each keeps so much of what is left; None: in one

    @property
    def needs_data(self) -> bool:
        "Tell whether it needs more than the weights and the steps of a training."
        return bool(self.repairs) or any(EVIDENCE[name].of_data for name in self.evidence)

    @property
    def weight_shaped(self) -> bool:
        "Tell whether all of its evidence has the weight's shape, and can be read in chunks."
        return all(EVIDENCE[name].weight_shaped for name in self.evidence)

    @property
    def large(self) -> bool:
        "Tell whether it reads large matrices, which are gathered anew each time."
        return any(EVIDENCE[name].large for name in self.evidence)


def evidence_of(
    criterion: Criterion,
) -> tuple:  # names in `EVIDENCE`
    "Return the evidence that a criterion asks for: the names of its arguments without a default."
    return tuple(name for name in _asked(criterion) if name not in BESIDE)


def _asked(criterion):
    several = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    arguments = signature(criterion).parameters.items()
    return tuple(n for n, p in arguments if p.default is p.empty and p.kind not in several)


def _is_elementwise(criterion): return getattr(criterion, 'elementwise', False)


def _row(criterion, pure=True, **more):
    "Make the row of a criterion, which says by its arguments and marks what it needs."
    asked, evidence = _asked(criterion), evidence_of(criterion)
    row = CriterionInfo(criterion, evidence, _is_elementwise(criterion), 'name' in asked, pure, **more,
                        matrixwise=getattr(criterion, 'matrixwise', False), asks_support='support' in asked)
    if evidence: return row
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
    'obd': _row(obd),
    'obs': _row(obs, adjust=adjusted),
    'synflow': _row(synflow, round_keeps=Fraction(19, 20)),
    'wanda': _row(wanda, relative=True),
    'ria': _row(ria, relative=True),
    'sparsegpt': _row(sparsegpt, repairs=('refit',)),
    'alps': _row(alps, repairs=('refit',)),
    'fpgm': _row(fpgm),
}


def read_criterion(
    criterion: str | Criterion,  # a name in the table, or a function of evidence
    argument: str = 'criteria',  # its name, for errors
    table: dict = CRITERIA,  # of names
) -> CriterionInfo:  # what the table holds, for a name
    """Return the criterion of this name, or a row for a function.

    `ValueError` or `TypeError` where it is neither, or asks for no evidence."""
    known = ' and '.join([*EVIDENCE, *BESIDE])
    found = one_of(argument, criterion, table, f'or a function of {known}')
    if isinstance(criterion, str) or isinstance(found, CriterionInfo): return found
    for row in CRITERIA.values():
        if criterion is getattr(row, 'score', None): return row
    try: asked = _asked(criterion)
    except (ValueError, TypeError):
        raise TypeError(f'{argument}: got {criterion!r}, whose arguments cannot be read; '
                        f'expected a function of {known}, as lambda weight: weight.abs()') from None
    _check_evidence(criterion, asked, argument)
    return _row(criterion, pure=False)


def _check_evidence(criterion, asked, argument):
    known = [*EVIDENCE, *BESIDE]
    for name in asked or ['nothing']:
        if name in known: continue
        raise ValueError(f'{argument}: {name_of(criterion)} asks for {name!r}, '
                         f'expected arguments named {", ".join(known)}{nearest(name, known)}')


# Scores

def score(
    criterion: CriterionInfo,
    evidence: dict,  # name: a tensor of one layer, or the same chunk of each; all tensors, or all arrays
    name: str,  # the layer's name
    shape: tuple,  # of the weight, or of the chunk
    form: tuple = (1, False),  # (groups, transposed), how the weight is a matrix
    support: Callable | None = None,  # from scores to the mask of the layer, both of the weight's shape
) -> torch.Tensor | np.ndarray:  # float32, or float64 where some evidence is, of that shape; larger = keep
    """Score a layer or a chunk of it.

    Half-precision evidence is widened first, so that products do not underflow."""
    kind = type(next(iter(evidence.values())))
    is_double = any(e.dtype in (torch.float64, np.float64) for e in evidence.values())
    given = {n: widened(e) for n, e in evidence.items()}
    if criterion.asks_name: given['name'] = name
    if not criterion.pure: given = {n: _copied(e) for n, e in given.items()}  # a user's criterion may work in place
    if criterion.asks_support: given['support'] = support
    with np.errstate(all='ignore'):  # `check_finite` looks at the result
        if criterion.matrixwise: scores = _of_matrices(criterion, given, shape, form)
        else: scores = criterion.score(**given)
        if not isinstance(scores, kind) or scores.shape != shape or not _can_be_ordered(scores):
            raise _wrong_scores(criterion, scores, name, shape)
        if kind is torch.Tensor: return scores.double() if is_double else scores.float()
        return scores.astype(np.float64 if is_double else np.float32, copy=False)


def _copied(evidence):
    "Copy evidence, so that each entry has a place of its own: what is expanded cannot be written into."
    if isinstance(evidence, np.ndarray): return evidence.copy()
    if not isinstance(evidence, torch.Tensor): return evidence
    return evidence.clone(memory_format=torch.contiguous_format)


def _of_matrices(criterion, given, shape, form):
    "Score a weight by a criterion that takes matrices."
    gram = given.get('gram')
    if gram is not None and gram.ndim == 2: given['gram'] = gram[None]
    form = (len(given['gram']), form[1]) if gram is not None else form
    of_weight = [n for n, value in given.items() if getattr(value, 'shape', None) == shape and n != 'gram']
    given |= {n: as_matrix(given[n], *form) for n in of_weight}
    support = given.get('support')
    if support is not None:
        given['support'] = lambda scores: as_matrix(support(from_matrix(scores, shape, *form)), *form)
    scores = criterion.score(**given)
    expected = given['weight'].shape if 'weight' in given else None
    is_as_expected = isinstance(scores, torch.Tensor) and scores.shape == expected
    return from_matrix(scores, shape, *form) if is_as_expected else scores


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
    check_evidence(evidence, name)
    raise _not_finite(f'scores by {name_of(criterion.score)} for layer {name!r}')


def check_evidence(
    evidence: dict,  # name: tensor or array
    name: str,  # the layer's name
):
    "Raise `ValueError` if there is a NaN or an infinity in evidence about a layer."
    for kind, values in evidence.items():
        if not finite(abs(values)): raise _not_finite(f'{kind} of layer {name!r}')


def _not_finite(what):
    return ValueError(f'criteria: the {what} has NaN or infinite entries; nothing was changed')


def finite(
    values: torch.Tensor | np.ndarray,
) -> bool:
    "Tell whether there is no NaN and no positive infinity. -inf may stay: it is the lowest score."
    return 0 in values.shape or float(values.max()) < inf
