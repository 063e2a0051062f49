"Which weights take part: those of layers chosen by type, by name or glob, by module."
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from fasterai.arguments import nearest
from fasterai.granularity import AXES, weights_of

LOOKUPS = (nn.Embedding, nn.EmbeddingBag)  # left alone unless they are chosen


class Weight(NamedTuple):
    "Where a weight is: a parameter of a module."
    module: nn.Module
    attr: str = 'weight'

    @property
    def tensor(self) -> nn.Parameter:
        own = self.module._parameters.get(self.attr)  # several times as fast as getattr, which is for those that are computed
        return getattr(self.module, self.attr) if own is None else own


class Choice(NamedTuple):
    "Weights by name, in the model's order: a layer's that has one are called as the layer."
    chosen: dict  # name: `Weight`; one that several layers share stands once, under the first
    by_name: set  # the names of those that were asked for one by one
    skipped: dict  # name: reason, for every other weight of a layer


class Named:
    "All that may be chosen in a model, by name."

    def __init__(self, model: nn.Module):
        self.modules = dict(model.named_modules())
        self.weights = {_called(n, a): Weight(m, a) for n, m in self.modules.items() for a in weights_of(m)}
        known = {(w.module, w.attr) for w in self.weights.values()}
        self.bare = {f'{n}.{a}'.lstrip('.'): Weight(m, a) for n, m in self.modules.items() for a, p in m._parameters.items()
                     if p is not None and (m, a) not in known}  # other parameters, which must be named
        self.every = self.weights | self.bare


def choose(
    model: nn.Module,
    layers=None,  # None for all; a type, a name, a glob, a module, a parameter, or a list of these; what holds layers stands for them
) -> Choice:
    "The weights that are meant; `ValueError` where something means none or cannot take part."
    named = Named(model)
    usual = {n for n, w in named.weights.items() if not isinstance(w.module, LOOKUPS)}
    wanted, by_name = usual if layers is None else set(), set()
    for choice in [] if layers is None else _listed(layers):
        found = matching(choice, named, named.weights)
        wanted.update(found)
        if not isinstance(choice, type): by_name.update(n for n in found if means_by_name(choice, n, named.every[n]))

    chosen, skipped, first = {}, {}, {}
    for name, weight in named.every.items():
        if name in wanted:
            _check_fit(name, weight)
            if not weight.tensor.numel():
                skipped[name] = 'has no weights'
                continue
            owner = first.setdefault(weight.tensor, name)
            if owner == name: chosen[name] = weight
            else: skipped[name] = f'shares the weight of {owner!r}'
        elif name in named.weights:
            skipped[name] = 'a lookup table: name it in layers= to include it' if layers is None else 'not chosen'
        elif weight.attr == 'weight' and getattr(weight.tensor, 'ndim', 0) > 1:
            kind = type(weight.module).__name__
            skipped[name.removesuffix('.weight')] = f"{kind} is no known layer type: add_layer_type({kind}, weight='O I') makes it one"
    if not chosen:
        hint = f'; name a parameter, as layers={next(iter(named.bare))!r}' if named.bare else ''
        raise ValueError(f'layers: no layer selected: {type(model).__name__} has none of {_kinds()}{hint}')
    return Choice(chosen, by_name, skipped)


def _called(module, attr): return module if attr == 'weight' else f'{module}.{attr}'.lstrip('.')
def means_by_name(
    choice,  # one entry of `layers`
    name: str,
    weight: Weight,
) -> bool:
    "Does the choice mean this weight, or its module, by_name?"
    if isinstance(choice, str): return choice in (name, f'{name}.weight') or name == f'{choice}.{weight.attr}'
    return choice is weight.module or choice is weight.tensor or isinstance(choice, Weight) and choice == weight


def _kinds(): return ', '.join(t.__name__ for t in AXES if not issubclass(t, LOOKUPS))


def _listed(layers):
    one = isinstance(layers, (str, type, nn.Module, torch.Tensor, Weight)) or not isinstance(layers, Iterable)
    layers = [layers] if one else list(layers)
    if not layers: raise ValueError('layers: got an empty list, so no layer is selected; allowed is None for all, or at least one')
    return layers


def matching(
    choice,  # a type, a name, a glob, a module, a parameter, or a `Weight`
    named: Named,  # all of the model
    able: dict,  # name: `Weight`, those to choose from
    argument: str = 'layers',  # how the error calls it
) -> list:  # names in `able`, or of a parameter that must be named
    "The weights that one entry of `layers` means."
    allowed = 'allowed is a type, a name or glob, a module or parameter of the model, or a list of these'
    if isinstance(choice, type):
        found = [n for n, w in able.items() if isinstance(w.module, choice)]
    elif isinstance(choice, nn.Module):
        at = next((n for n, m in named.modules.items() if m is choice), None)
        if at is None: raise ValueError(f'{argument}: got a {type(choice).__name__} that is not a part of the model, {allowed}')
        found = _within(at, able)
    elif isinstance(choice, (torch.Tensor, Weight)):
        weight = (lambda w: w == choice) if isinstance(choice, Weight) else lambda w: w.tensor is choice
        found = [n for n, w in (named.bare | able).items() if weight(w)]
        if not found: raise ValueError(f'{argument}: got a parameter that is not a part of the model, {allowed}')
    elif isinstance(choice, str):
        found = _within(choice.removesuffix('.weight'), able) if choice.removesuffix('.weight') in named.modules else []
        found = found or [n for n in able if fnmatchcase(n, choice)] or [n for n in named.bare if fnmatchcase(n, choice)]
    else: raise TypeError(f'{argument}: got {choice!r}, {allowed}')
    if not found:
        hint = ''
        if isinstance(choice, str):
            hint = f'; for a type write nn.{choice}' if choice in _kinds().split(', ') else nearest(choice, [*able, *named.bare])
        raise ValueError(f'{argument}: got {choice!r}, which means none of the layers here, {", ".join(map(repr, list(able)[:6]))}'
                         f'{", …" if len(able) > 6 else ""}; {allowed}{hint}')
    return found


def _within(name, able):
    return [n for n in able if n == name or not name or n.startswith(name + '.')]


def _check_fit(name, weight):
    tensor = weight.module._parameters.get(weight.attr)
    if tensor is None:
        raise ValueError(f'layers: the weight of {name!r} is not a parameter of its own but computed from others (a parametrization, '
                         'weight_norm, spectral_norm): remove that first, or leave the layer out')
    if isinstance(tensor, UninitializedParameter):
        raise ValueError(f'layers: {name!r} is lazy and has no weight yet: run one batch through the model first')
    if not tensor.is_floating_point():
        raise ValueError(f'layers: the weight of {name!r} is {tensor.dtype}, allowed are floating-point weights')
