"What comes back where the sparsity falls: a score for what is gone."
from collections.abc import Callable

import torch

Regrowth = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"A function of the scores of some groups (n,) and of which are gone, bool (n,), to scores that put what is gone below all that lives."

LOWEST = torch.finfo(torch.float32).min


def by_position(scores, gone):
    "Score all that is gone alike: ties fall by position, so the last of them come back first."
    return torch.as_tensor(scores).masked_fill(gone, LOWEST)


REGROWTHS = {'position': by_position}
