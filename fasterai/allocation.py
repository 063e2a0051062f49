"Allocate a sparsity to layers: by the shape of their weights, or by a dict of the user's."
from collections.abc import Mapping
from fractions import Fraction
from math import floor, prod

import numpy as np

from fasterai.layers import matching, means_by_name
from fasterai.names import Named

CAP = Fraction(4, 5)  # highest share of zeros of the last layer, by uniform_plus


def erk_densities(
    shapes: list,  # of the layers' weights, as tuples
    density: float,  # of all layers together, 0 to 1
) -> list:  # density of each layer, 0 to 1
    """Allocate densities by Erdős–Rényi-kernel (Mocanu et al. 2018, Evci et al. 2020).

    They are in proportion to the sum of a weight's sides over their product. A layer that would be more than
    dense is dense, and the others share the rest."""
    return _densities(shapes, [sum(shape) / _product(shape) for shape in shapes], density)


def er_densities(
    shapes: list,  # of the layers' weights, as tuples
    density: float,  # of all layers together, 0 to 1
) -> list:  # density of each layer, 0 to 1
    """Allocate densities by Erdős–Rényi (Mocanu et al. 2018).

    They are in proportion to the sum of inputs and outputs over their product, whatever the kernel."""
    return _densities(shapes, [sum(shape[:2]) / _product(shape[:2]) for shape in shapes], density)


def _product(shape): return np.prod(shape, dtype=float)


def _densities(shapes, raw, density):
    "Scale raw densities so that all layers together have the wanted one, and none more than 1."
    sizes = [_product(shape) for shape in shapes]
    dense = set()
    while len(dense) < len(shapes):
        rest = [i for i in range(len(shapes)) if i not in dense]
        free = density * sum(sizes) - sum(sizes[i] for i in dense)
        scale = free / sum(raw[i] * sizes[i] for i in rest)
        most = max(raw[i] for i in rest)
        if most * scale <= 1: return [1. if i in dense else raw[i] * scale for i in range(len(shapes))]
        dense |= {i for i in rest if raw[i] == most}
    return [1.] * len(shapes)


def erk(layers, fraction):
    "Return the number of zeros of each layer by `erk_densities`, as fractions of a weight."
    return _zeros(layers, erk_densities([layer.shape for layer in layers], float(1 - fraction)))


def er(layers, fraction):
    "Return the number of zeros of each layer by `er_densities`, as fractions of a weight."
    return _zeros(layers, er_densities([layer.shape for layer in layers], float(1 - fraction)))


def _zeros(layers, densities):
    return [layer.n_weights * (1 - density) for layer, density in zip(layers, densities)]


def uniform_plus_fractions(
    sizes: list,  # number of weights of each layer
    axes: list,  # names of the axes of each layer's weight
    fraction: Fraction,  # of zeros, of all layers together
) -> list:  # fraction of zeros of each layer
    """Allocate the same sparsity to all layers but two (Gale et al. 2019).

    The first convolution stays dense, and the last layer is pruned to 80 % at most. `ValueError` where so
    many zeros cannot be."""
    if len(sizes) == 1: return [fraction]  # it is neither the first nor the last of a network
    first = next((i for i, names in enumerate(axes) if _has_kernel(names)), None)
    last = next((i for i in reversed(range(len(axes))) if 'O' in axes[i] and i != first), None)
    free = sum(n for i, n in enumerate(sizes) if i not in (first, last))
    capped = 0 if last is None else sizes[last]
    share, at_last = _uniform_plus_fraction(fraction * sum(sizes), free, capped)
    if share > 1:
        most = float(100 * (free + CAP * capped) / sum(sizes))
        raise ValueError(f'sparsity: got {float(100 * fraction):.4g} %, '
                         f'expected {most:.4g} % at most with uniform_plus here: '
                         'the first convolution stays dense and the last layer keeps 20 %')
    shares = [share] * len(sizes)
    if last is not None: shares[last] = at_last
    if first is not None: shares[first] = Fraction(0)
    return shares


def _has_kernel(axes): return any(name.startswith('k') for name in axes)


def _uniform_plus_fraction(zeros, free, capped):
    """Return the fraction of zeros of a free layer and of the capped one; more than 1 where so many zeros
    cannot be."""
    impossible = Fraction(2)
    if not free + capped: return (impossible if zeros else Fraction(0)), Fraction(0)
    share = zeros / (free + capped)
    if share <= CAP: return share, share
    if not free: return impossible, CAP
    return (zeros - CAP * capped) / free, CAP


def uniform_plus(layers, fraction):
    "Return the number of zeros of each layer by `uniform_plus_fractions`, as fractions of a weight."
    sizes = [layer.n_weights for layer in layers]
    shares = uniform_plus_fractions(sizes, [layer.axes or () for layer in layers], fraction)
    return [n * share for n, share in zip(sizes, shares)]


def check_uniform_plus(
    shapes: list,  # of the layers' weights
    axes: list,  # names of the axes of each weight
    fraction: Fraction,  # of zeros, of all layers together
):
    "Raise `ValueError` where uniform_plus cannot make so many zeros."
    uniform_plus_fractions([prod(shape) for shape in shapes], axes, fraction)


def shared_out(
    zeros: list,  # wanted of each layer, fractions of a weight
    total: Fraction,  # of all layers together
    held: list,  # zeros that each layer's mask holds, which stay
    there: list,  # zeros that each layer has, those that are held among them
) -> list:  # fractions of a weight
    """Share a number of zeros out, so that zeros that are there count.

    A layer that has more than it is given keeps them, and the others get less. Where there are more in all
    than the total, only zeros are taken."""
    if sum(there) >= total: return _of_those_there(zeros, total, held, there)
    full = set()
    while True:
        wanted = zeros
        if full:
            rest = max(total - sum(there[i] for i in full), 0)
            share = sum(z for i, z in enumerate(zeros) if i not in full)
            scale = rest / share if share else 0
            wanted = [there[i] if i in full else z * scale for i, z in enumerate(zeros)]
        more = {i for i, z in enumerate(wanted) if i not in full and z < there[i]}
        if not more: return wanted
        full |= more


def _of_those_there(zeros, total, held, there):
    "Share out a total that is not more than the zeros that are there: each layer gets some of its own."
    found = [min(max(z, least), most) for z, least, most in zip(zeros, held, there)]
    for i, (least, most) in enumerate(zip(held, there)):
        missing = total - sum(found)
        found[i] = min(max(found[i] + missing, least), most)
    return found


def rounded(
    zeros: list,  # of each layer, fractions of a weight
    total: int,  # of all layers together
) -> list:  # ints
    "Turn numbers of zeros into whole ones that make up the total: rounded down, then up where most was lost."
    found = [floor(z) for z in zeros]
    by_loss = sorted(range(len(zeros)), key=lambda i: found[i] - zeros[i])
    for i in by_loss[:max(total - sum(found), 0)]: found[i] += 1
    return found


def fractions(
    sparsity,  # percent, or {name, glob, type, module or parameter: percent}
    rules,  # `Rules`
    selected,  # `Selected`
    argument: str = 'sparsity',  # how errors call a key of the dict
) -> dict:  # name of a selected layer: fraction of zeros, 0 to 1
    "Return the sparsity of each selected layer as a fraction."
    found = {}
    for names, fraction in entries(sparsity, rules, selected, argument):
        found |= dict.fromkeys(names, fraction)
    return {name: found[name] for name in selected.learning() if name in found}


def entries(
    sparsity,  # percent, or {name, glob, type, module or parameter: percent}
    rules,  # `Rules`
    selected,  # `Selected`
    argument: str = 'sparsity',  # how errors call a key of the dict
) -> list:  # of (names of selected layers, fraction of zeros 0 to 1), one for each entry that has layers
    """Find the layers of each entry of a dict of sparsities; a number is one entry for all layers.

    An entry that names a layer wins over a glob, type or module that means several; among those the first
    wins."""
    if isinstance(sparsity, Mapping): found = _by_entry(sparsity, rules, selected, argument)
    else: found = [(list(selected.learning()), rules.fraction(sparsity))]
    for names, fraction in found: _check_reach(names, fraction, rules, selected)
    return found


def _by_entry(sparsity, rules, selected, argument):
    if not sparsity: raise ValueError('sparsity: got an empty dict, expected at least one entry')
    named, by_name, several = Named(selected.model), {}, {}  # {name of a layer: number of its entry}
    read = []
    for i, (choice, value) in enumerate(sparsity.items()):
        read.append(rules.fraction(value, f'sparsity[{choice!r}]' if isinstance(choice, str) else 'sparsity'))
        names = matching(choice, named, named.weights, argument)
        _check_selected(choice, names, selected, argument)
        for name in names:
            found = by_name if means_by_name(choice, name, named.every[name]) else several
            found.setdefault(name, i)
    selected.include(by_name)
    entry = several | by_name
    learning = selected.learning()
    names = [[name for name in learning if entry.get(name) == i] for i in range(len(read))]
    return [(layers, fraction) for layers, fraction in zip(names, read) if layers]


def _check_reach(names, fraction, rules, selected):
    "Raise `ValueError` where the context cannot make so many zeros in these layers."
    check = rules.context_info.check
    if check is None: return
    groupings = [selected.candidates[name].grouping for name in names]
    check([g.shape for g in groupings], [g.axes for g in groupings], fraction)


def _check_selected(choice, names, selected, argument):
    "Raise `ValueError` where none of the layers that are meant is selected."
    if any(name in selected.candidates for name in names): return
    reason = selected.choice.skipped.get(names[0], 'not chosen')
    if reason == 'not chosen': reason = 'is not chosen by layers='
    raise ValueError(f'{argument}: got {choice!r}, which means only {names[0]!r}, and that {reason}')
