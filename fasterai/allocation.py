"How much does each layer get: shares of zeros by shape, or by a dict."
from collections.abc import Mapping
from fractions import Fraction
from math import floor, prod

import numpy as np

from fasterai.layers import Named, matching, means_by_name

CAP = Fraction(4, 5)  # of zeros, in the last layer, by uniform_plus


def erk_densities(
    shapes: list,  # of the weights, as tuples
    density: float,  # of all together, 0 to 1
) -> list:  # of each, 0 to 1
    "Erdős–Rényi-kernel: in proportion to the sum of a weight's sides over their product (Mocanu et al. 2018, Evci et al. 2020)."
    sizes = [np.prod(s, dtype=float) for s in shapes]
    raw = [sum(s) / np.prod(s, dtype=float) for s in shapes]
    dense = set()
    while len(dense) < len(shapes):  # what would be more than dense is dense, and the others share the rest
        rest = [i for i in range(len(shapes)) if i not in dense]
        free = density * sum(sizes) - sum(sizes[i] for i in dense)
        scale = free / sum(raw[i] * sizes[i] for i in rest)
        most = max(raw[i] for i in rest)
        if most * scale <= 1: return [1. if i in dense else raw[i] * scale for i in range(len(shapes))]
        dense |= {i for i in rest if raw[i] == most}
    return [1.] * len(shapes)


def erk(layers, fraction):
    "The zeros of each layer by `erk_densities`, as fractions of a weight."
    densities = erk_densities([p.shape for p in layers], float(1 - fraction))
    return [p.n_weights * (1 - density) for p, density in zip(layers, densities)]


def uniform_plus_shares(
    sizes: list,  # weights of each layer
    axes: list,  # names of its weight's axes
    fraction: Fraction,  # of zeros, of all together
) -> list:  # of zeros, of each
    "The same everywhere, but for the first convolution, which stays dense, and the last layer, at most 80 % (Gale et al. 2019)."
    if len(sizes) == 1: return [fraction]  # it is neither the first nor the last of a network
    first = next((i for i, a in enumerate(axes) if _has_kernel(a)), None)
    last = next((i for i in reversed(range(len(axes))) if 'O' in axes[i] and i != first), None)
    free = sum(n for i, n in enumerate(sizes) if i not in (first, last))
    capped = 0 if last is None else sizes[last]
    share, at_last = _uniform_plus_share(fraction * sum(sizes), free, capped)
    if share > 1:
        most = float(100 * (free + CAP * capped) / sum(sizes))
        raise ValueError(f'sparsity: got {float(100 * fraction):.4g} %, allowed with uniform_plus is {most:.4g} % at most here: '
                         'the first convolution stays dense and the last layer keeps 20 %')
    shares = [share] * len(sizes)
    if last is not None: shares[last] = at_last
    if first is not None: shares[first] = Fraction(0)
    return shares


def _has_kernel(axes): return any(name.startswith('k') for name in axes)


def _uniform_plus_share(budget, free, capped):
    "The share of zeros of a layer and of the last one; more than 1 where so many zeros cannot be."
    impossible = Fraction(2)
    if not free + capped: return (impossible if budget else Fraction(0)), Fraction(0)
    share = budget / (free + capped)
    if share <= CAP: return share, share
    return ((budget - CAP * capped) / free if free else impossible), CAP


def uniform_plus(layers, fraction):
    "The zeros of each layer by `uniform_plus_shares`."
    shares = uniform_plus_shares([p.n_weights for p in layers], [p.axes or () for p in layers], fraction)
    return [p.n_weights * share for p, share in zip(layers, shares)]


def check_uniform_plus(
    shapes: list,  # of the weights
    axes: list,  # names of each weight's axes
    fraction: Fraction,  # of zeros, of all together
):
    "`ValueError` where so many zeros cannot be."
    uniform_plus_shares([prod(shape) for shape in shapes], axes, fraction)


def rounded(
    zeros: list,  # of each layer, fractions of a weight
    total: int,  # of all together
) -> list:  # ints
    "Round down, then up where most was lost, until the total is made up."
    found = [floor(z) for z in zeros]
    by_loss = sorted(range(len(zeros)), key=lambda i: found[i] - zeros[i])
    for i in by_loss[:max(total - sum(found), 0)]: found[i] += 1
    return found


def fractions(
    sparsity,  # percent, or {name, glob, type, module or parameter: percent}
    rules,  # `Rules`, which say what a number means
    selected,  # `Selected`
    argument: str = 'sparsity',  # how errors call the keys
) -> dict:  # name of a selected layer: share of zeros, 0 to 1
    "The share of zeros of each layer. What means a layer by_name goes before what means several; of those the first counts."
    if not isinstance(sparsity, Mapping):
        fraction = rules.fraction(sparsity)
        groupings = [layer.grouping for layer in selected.candidates.values()]
        check = rules.context_info.check
        if check is not None: check([g.shape for g in groupings], [g.axes for g in groupings], fraction)
        return dict.fromkeys(selected.candidates, fraction)
    if not sparsity: raise ValueError('sparsity: got an empty dict, allowed is at floors one entry')
    named, by_name, several = Named(selected.model), {}, {}
    for choice, value in sparsity.items():
        fraction = rules.fraction(value, f'sparsity[{choice!r}]' if isinstance(choice, str) else 'sparsity')
        names = matching(choice, named, named.weights, argument)
        _check_selected(choice, names, selected, argument)
        for name in names:
            kind = by_name if means_by_name(choice, name, named.every[name]) else several
            kind.setdefault(name, fraction)
    found = several | by_name
    return {name: found[name] for name in selected.candidates if name in found}


def _check_selected(choice, names, selected, argument):
    "`ValueError` where none of the layers that are meant takes layer."
    if any(name in selected.candidates for name in names): return
    reason = selected.choice.skipped.get(names[0], 'not chosen').replace('not chosen', 'is not chosen by layers=')
    raise ValueError(f'{argument}: got {choice!r}, which means only {names[0]!r}, and that {reason}')
