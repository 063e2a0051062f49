"Decide what comes back where the sparsity falls: score the pruned groups."
from collections.abc import Callable

import torch

from fasterai.arguments import one_of

Regrowth = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A function of scores (n,) and pruned, bool (n,), that returns the scores with those of pruned groups
below all others."""

LOWEST = torch.finfo(torch.float32).min


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
    return one_of('regrow', regrow, REGROWTHS, 'or a function of scores and pruned')
