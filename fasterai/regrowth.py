"Decide what comes back where the sparsity falls: score the pruned groups."
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from fasterai.arguments import callable_with, name_of, one_of

Regrowth = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A function of scores (n,) and pruned, bool (n,), that returns the scores with those of pruned groups
below all others."""

LOWEST = torch.finfo(torch.float32).min
ABOVE = LOWEST * (1 - 1e-6)  # the scores of groups that are not pruned are brought up to it


def by_position(
    scores,  # (n,), tensor or array
    pruned,  # bool (n,)
) -> torch.Tensor:  # (n,)
    "Score all pruned groups alike. Ties are pruned by position, so the last groups come back first."
    return torch.as_tensor(scores).masked_fill(pruned, LOWEST)


# To add a way to regrow, write a function of scores and pruned, and a row.
REGROWTHS = {'position': by_position}


def read_regrowth(
    regrow: str | Regrowth,  # a name in `REGROWTHS`, or a function of scores and pruned
) -> Regrowth:
    "Return the regrowth of this name, or a function; `ValueError` or `TypeError` where it is neither."
    found = one_of('regrow', regrow, REGROWTHS, 'or a function of scores and pruned')
    callable_with('regrow', found, 2, 'a function of scores and pruned')
    return found if found in REGROWTHS.values() else partial(_checked, found)


def _checked(regrow, scores, pruned):
    "Call a user's regrowth, and check what it returns."
    found = regrow(scores, pruned)
    is_right = isinstance(found, (torch.Tensor, np.ndarray)) and found.shape == scores.shape
    if is_right: return found
    came = tuple(found.shape) if hasattr(found, 'shape') else repr(found)
    raise ValueError(f'regrow: {name_of(regrow)} returned {came}, '
                     f'expected scores of shape {tuple(scores.shape)}')
