"Find the optimizers that step: one alone, or those inside of what wraps one."
from collections.abc import MutableMapping

import torch


def real_optimizers(
    optimizer,  # a torch.optim.Optimizer, what wraps one or several, or a list of these
) -> list:  # of torch.optim.Optimizer, with hooks that run when they step
    """Find the optimizers that step the weights: the one itself, and those inside it.

    A wrapper may be an optimizer by name only (accelerate), step another one that is not what is called
    (SAM), or write the weights after the other has stepped (Lookahead): all that have hooks of their own
    are returned."""
    several = isinstance(optimizer, (list, tuple))
    found, looked_at, to_look_at = [], set(), [*optimizer] if several else [optimizer]
    while to_look_at:
        thing = to_look_at.pop()
        if id(thing) in looked_at or isinstance(thing, type): continue
        looked_at.add(id(thing))
        if _has_hooks(thing): found.append(thing)
        to_look_at += _optimizers_in(thing)
    return found


def _has_hooks(thing):
    "Tell whether hooks of an optimizer run; what never called `Optimizer.__init__` has none."
    return isinstance(thing, torch.optim.Optimizer) and '_optimizer_step_post_hooks' in vars(thing)


def _optimizers_in(thing):
    "Return the optimizers among the attributes of a thing, and in the lists and dicts among them."
    found = []
    for value in vars(thing).values() if hasattr(thing, '__dict__') else ():
        if isinstance(value, dict): value = list(value.values())
        several = value if isinstance(value, (list, tuple)) else [value]
        found += [one for one in several if isinstance(one, torch.optim.Optimizer)]
    return found


def states_of(
    optimizer,  # of torch or fastai, or what wraps one or several
) -> list:  # of {parameter: {name: tensor or anything}}, which can be written to
    "Find what an optimizer keeps for each parameter; `TypeError` where it is none."
    inner = getattr(optimizer, 'opt', optimizer)  # of fastai's OptimWrapper and Lookahead
    found = [one.state for one in real_optimizers(optimizer)] or [getattr(inner, 'state', None)]
    if all(isinstance(state, MutableMapping) for state in found): return found
    raise TypeError(f'optimizer: got {type(optimizer).__name__}, expected an optimizer, which has a state')


def parameters_of(
    optimizer: torch.optim.Optimizer,
) -> set:  # of ids
    "Return the ids of the parameters that an optimizer steps now."
    return {id(p) for group in optimizer.param_groups for p in group['params']}
