"Name the weights of a model, and find them again where modules were copied, replaced, wrapped or fused."
import warnings
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from fasterai.granularity import held, weights_of
from fasterai.shards import is_split


class Weight(NamedTuple):
    "Name one weight of a model: a parameter of a module."
    module: nn.Module
    attr: str = 'weight'  # the parameter's name in the module

    @property
    def tensor(self) -> nn.Parameter:
        "Return the parameter, or the tensor that is computed in its place."
        own = self.module._parameters.get(self.attr)  # several times as fast as getattr, which computed ones need
        return getattr(self.module, self.attr) if own is None else own

    @property
    def stored(self) -> nn.Parameter | None:
        "Return the parameter, None where the weight is computed from others."
        return self.module._parameters.get(self.attr)

    def holds(self,
        thing,  # anything
    ) -> bool:
        "Return True if a thing is this weight. A weight that is computed is not computed for it."
        return held(self.module, self.attr) is thing


class Named:
    "Find all weights of a model by name: `weights` of known layer types, `others`, and `every` one of both."

    def __init__(self, model: nn.Module):
        self.modules = named_modules(model)
        plain = {name: m for name, m in self.modules.items() if not is_script(m)}
        self.weights = {}  # {name: `Weight`} of the layer types in `AXES`
        self.others = {}  # {name: `Weight`} of other parameters, such as biases: they must be chosen by name
        for name, module in plain.items():
            for attr in weights_of(module): self.weights[_weight_name(name, attr)] = Weight(module, attr)
        known = {(w.module, w.attr) for w in self.weights.values()}
        for name, module in plain.items():
            for attr, parameter in module._parameters.items():
                if parameter is None or (module, attr) in known: continue
                self.others[joined(name, attr)] = Weight(module, attr)
        self.every = self.weights | self.others


def is_script(module): return isinstance(module, torch.jit.ScriptModule)  # or traced
def _weight_name(module, attr): return module if module and attr == 'weight' else joined(module, attr)
def joined(module, attr): return f'{module}.{attr}'.lstrip('.')  # the name of the model itself is empty


# ---- Names of the bare model

def named_modules(
    model: nn.Module,
) -> dict:  # {name: module}
    """Return the modules of a model by their names in the bare model, without DataParallel, DDP and
    torch.compile."""
    names, found, modules = {}, {}, dict(model.named_modules())
    for path, module in modules.items():
        parent, _, last = path.rpartition('.')
        is_wrapped = bool(path) and wrapped(modules[parent]) is module
        names[path] = names[parent] if is_wrapped else joined(names.get(parent, ''), last)
        found[names[path]] = module  # what is wrapped replaces its wrapper
    return found


def bare(
    model: nn.Module,
) -> nn.Module:
    "Return the model inside DataParallel, DDP and torch.compile."
    while (inner := wrapped(model)) is not None: model = inner
    return model


def wrapped(
    module: nn.Module,
) -> nn.Module | None:
    "Return the module inside a wrapper, None where it is no wrapper."
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)): return module.module
    return module._modules.get('_orig_mod')  # of torch.compile


# ---- Finding again

class Found(NamedTuple):
    "Say where a weight is now."
    path: str  # its name in the model
    weight: Weight


def find_again(
    wanted: dict,  # name: `Weight` as it was, or None where only the name is known
    shapes: dict,  # name: shape
    model: nn.Module,
    wrapped: bool = False,  # the model may be another one, in which all names have a beginning in common
) -> dict:  # name: `Found`, of that shape, for those that are there
    """Find weights in a model whose modules may have been copied, replaced, wrapped or fused.

    A weight is found in the module that it was in, by its name, or as the parameter that it was; in another
    model the parameter goes before the name. None is found twice."""
    named = Named(model)
    ways = [_by_parameter, partial(_by_name, wrapped=True)] if wrapped else [_by_name, _by_parameter]
    found, taken = {}, set()
    for find in [_by_module, *ways]:
        rest = {name: (weight, shapes[name]) for name, weight in wanted.items() if name not in found}
        for name, weight in find(rest, named).items():
            if weight in taken or not _fits(weight, shapes[name]): continue
            found[name] = weight
            taken.add(weight)
    paths = {weight: path for path, weight in named.every.items()}
    return {name: Found(paths[found[name]], found[name]) for name in wanted if name in found}


def _by_module(wanted, named):
    "Find weights whose module is still in the model. `wanted` is {name: (`Weight` or None, shape)}."
    there = {*named.every.values()}
    return {name: weight for name, (weight, _) in wanted.items() if weight in there}


def _by_parameter(wanted, named):
    "Find weights whose parameter is still in the model, in another module."
    places = {id(weight.stored): weight for weight in reversed(named.every.values())}
    was = {name: weight.stored for name, (weight, _) in wanted.items() if weight is not None}
    was = {name: tensor for name, tensor in was.items() if tensor is not None}
    return {name: places[id(tensor)] for name, tensor in was.items() if id(tensor) in places}


def _by_name(wanted, named, wrapped=False):
    "Find weights under the prefix under which most of them are, the shortest of several."
    best = {}
    for prefix in _prefixes(wanted, named) if wrapped else ['']:
        found = {name: _at(prefix + name, shape, named) for name, (_, shape) in wanted.items()}
        found = {name: weight for name, weight in found.items() if weight is not None}
        if len(found) > len(best): best = found
    return best


def _prefixes(names, named):
    "Return what the names of a model may begin with after it was wrapped, the shortest first."
    paths = dict.fromkeys([*named.every, *named.modules])
    found = {path.removesuffix(name) for name in names for path in paths if f'.{path}'.endswith(f'.{name}')}
    return sorted(found | {''}, key=len)


def _at(path, shape, named):
    "Return the weight of a name, or the one of its shape inside the module of that name, or None."
    for name in (path, f'{path}.weight', path.removesuffix('.weight')):
        if name in named.every and _fits(named.every[name], shape): return named.every[name]
    inside = [weight for name, weight in named.every.items() if name.startswith(f'{path}.')]
    inside = [weight for weight in inside if _fits(weight, shape)]
    return inside[0] if len(inside) == 1 else None


def _fits(weight, shape): return weight.stored is not None and tuple(weight.stored.shape) == tuple(shape)


class Places:
    "Remember where the modules and some weights of a model are, to see cheaply whether one was replaced."

    def __init__(self,
        model: nn.Module,
        weights: list,  # of `Weight`
        shared: list,  # of lists of `Weight`s that share a parameter
    ):
        self.children = [(module._modules, key, child) for module in model.modules()
                         for key, child in module._modules.items()]
        self.shapes = [(w.module._parameters, w.attr, w.tensor.shape, is_split(w.tensor)) for w in weights]
        self.shared = shared

    @property
    def changed(self) -> bool:
        """Tell whether a module was replaced or taken away, or a weight is not a parameter of its shape.

        `ValueError` where it was split over processes meanwhile."""
        for modules, key, child in self.children:
            if modules.get(key) is not child: return True
        for parameters, attr, shape, was_split in self.shapes:
            parameter = parameters.get(attr)
            if is_split(parameter) and not was_split:
                raise ValueError(f'model: got {attr!r} of a selected layer as a DTensor, which is split over '
                                 'processes since, expected a weight that is whole in each')
            if parameter is None or parameter.shape != shape: return True
        return any(weight.stored is not first.stored for first, *others in self.shared for weight in others)


def warn_lost(
    names: list,  # of layers
):
    "Name layers whose masks are lost, because the model has them no longer."
    if not names: return
    warnings.warn(f'masks: {", ".join(map(repr, names))} cannot be found in the model any more, '
                  'under this name and with this shape: its zeros are not kept from now on', stacklevel=3)
