"Which layers take part: chosen by type, by name or glob, by module."
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn
from torch.nn.parameter import UninitializedParameter

from fasterai.arguments import nearest
from fasterai.granularity import AXES, axes_of


class Choice(NamedTuple):
    "Layers by name, in the model's order."
    chosen: dict  # name: module; a weight that several layers share stands once, under the first
    outright: set  # the names of those that were asked for one by one
    skipped: dict  # name: reason, for every other layer that has a weight


def choose(
    model: nn.Module,
    layers=None,  # None for all; a type, a name, a glob, a module, or a list of these; what holds layers stands for them
) -> Choice:
    "The layers that are meant; `ValueError` where something means none or cannot take part."
    named = dict(model.named_modules())
    able = {n: m for n, m in named.items() if axes_of(m) is not None}
    wanted, outright = set(able) if layers is None else set(), set()
    for choice in [] if layers is None else _listed(layers):
        found = matching(choice, named, able)
        wanted.update(found)
        if not isinstance(choice, type) and any(choice in (n, able[n]) for n in found): outright.update(found)

    chosen, skipped, first = {}, {}, {}
    for name, module in named.items():
        if name in wanted:
            _check_fit(name, module)
            if not module.weight.numel():
                skipped[name] = 'has no weights'
                continue
            owner = first.setdefault(module.weight, name)
            if owner == name: chosen[name] = module
            else: skipped[name] = f'shares the weight of {owner!r}'
        elif name in able:
            skipped[name] = 'not chosen'
        elif getattr(getattr(module, 'weight', None), 'ndim', 0) > 1 or isinstance(module, nn.RNNBase | nn.MultiheadAttention):
            skipped[name] = f'{type(module).__name__} is not one of {_kinds()}'
    if not chosen: raise ValueError(f'layers: no layer selected: {type(model).__name__} has none of {_kinds()}')
    return Choice(chosen, outright, skipped)


def _kinds(): return ', '.join(t.__name__ for t in AXES)


def _listed(layers):
    one = isinstance(layers, (str, type, nn.Module)) or not isinstance(layers, Iterable)
    layers = [layers] if one else list(layers)
    if not layers: raise ValueError('layers: got an empty list, so no layer is selected; allowed is None for all, or at least one')
    return layers


def matching(
    choice,  # a type, a name, a glob, or a module
    named: dict,  # name: module, all of the model
    able: dict,  # name: module, those to choose from
    argument: str = 'layers',  # how the error calls it
) -> list:  # names in `able`
    "The layers that one entry of `layers` means."
    allowed = 'allowed is a type, a name or glob, a module of the model, or a list of these'
    if isinstance(choice, type):
        found = [n for n, m in able.items() if isinstance(m, choice)]
    elif isinstance(choice, nn.Module):
        at = next((n for n, m in named.items() if m is choice), None)
        if at is None: raise ValueError(f'{argument}: got a {type(choice).__name__} that is not a part of the model, {allowed}')
        found = _within(at, able)
    elif isinstance(choice, str):
        found = _within(choice, able) if choice in named else [n for n in able if fnmatchcase(n, choice)]
    else: raise TypeError(f'{argument}: got {choice!r}, {allowed}')
    if not found:
        hint = ''
        if isinstance(choice, str):
            hint = f'; for a type write nn.{choice}' if choice in _kinds().split(', ') else nearest(choice, able)
        raise ValueError(f'{argument}: got {choice!r}, which means no layer of type {_kinds()}, {allowed}; '
                         f'the layers here are {", ".join(map(repr, list(able)[:6]))}{", …" if len(able) > 6 else ""}{hint}')
    return found


def _within(name, able):
    return [n for n in able if n == name or not name or n.startswith(name + '.')]


def _check_fit(name, module):
    weight = module._parameters.get('weight')
    if weight is None:
        raise ValueError(f'layers: the weight of {name!r} is not a parameter of its own but computed from others (a parametrization, '
                         'weight_norm, spectral_norm): remove that first, or leave the layer out')
    if isinstance(weight, UninitializedParameter):
        raise ValueError(f'layers: {name!r} is lazy and has no weight yet: run one batch through the model first')
    if not weight.is_floating_point():
        raise ValueError(f'layers: the weight of {name!r} is {weight.dtype}, allowed are floating-point weights')
