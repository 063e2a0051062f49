"Decide what comes back where masks move: score what is gone, by a criterion of its own."
import torch

from fasterai.criteria import CRITERIA, Criterion, CriterionInfo, elementwise, read_criterion

STEP = 2. ** 900  # between two scores of what is gone that follow each other in float32
LIVING = -2. ** 930  # scores of groups that live are brought up to it; those of groups that are gone are below it


@elementwise
def dense_gradient(
    grad: torch.Tensor,  # any shape, the gradient of the step, that of pruned weights too
) -> torch.Tensor:  # of the same shape
    "Score each weight by |∂L/∂w|: those come back that the loss asks for most (RigL; Evci et al. 2020)."
    return abs(grad)


GRADIENT = read_criterion(dense_gradient)

# To add a way to regrow, write a criterion, and a row: a function of the criterion that prunes.
REGROWTHS = {
    'gradient': lambda criterion: GRADIENT,
    'random': lambda criterion: CRITERIA['random'],
    'criterion': lambda criterion: criterion,
}


def read_regrowth(
    regrow: str | Criterion | None,  # a name in `REGROWTHS`, or a function of evidence
    criterion: CriterionInfo,  # the one that prunes
) -> CriterionInfo | None:  # None: by the gradient where there is one, else by the criterion that prunes
    "Return the criterion that scores what is gone; `ValueError` or `TypeError` where it is none."
    if regrow is None: return None
    found = read_criterion(regrow, 'regrow', REGROWTHS)
    return found if isinstance(found, CriterionInfo) else found(criterion)


def below_living(
    scores: torch.Tensor,  # (n,), of a regrowth; the precision of float32 counts
    ties: torch.Tensor,  # (n,), from 0 to below 1: the order of equal scores
) -> torch.Tensor:  # (n,), float64, all below `LIVING`
    "Return scores in the same order, below those of all groups that live."
    bits = (scores.float() + 0.).view(torch.int32)  # the sum makes +0 of -0
    rank = torch.where(bits < 0, bits ^ 0x7fffffff, bits).double()  # floats are in the order of their bits but for the sign
    return (rank + ties - 2. ** 32) * STEP
