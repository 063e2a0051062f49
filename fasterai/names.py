"Name the weights of a model, and find them again where modules were copied, replaced, wrapped or fused."
from typing import NamedTuple

import torch
from torch import nn

from fasterai.granularity import held, weights_of


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

def find_again(
    wanted: dict,  # name: `Weight`, as it was
    model: nn.Module,
) -> dict:  # name: `Weight` as it is, for those that are there; shapes are not compared
    """Find weights in a model whose modules may have been copied, replaced, wrapped or fused.

    A weight is found as the object that it was; else by its name; else as the one weight inside the module of
    its name; else by the end of its name, in what wraps the model."""
    named = Named(model)
    places = {}  # id of a module or parameter: `Weight`, or {attr: `Weight`} of a module
    for weight in named.every.values():
        places.setdefault((id(weight.module), weight.attr), weight)
        places.setdefault(id(weight.stored), weight)
    found = {name: _again(name, weight, named, places) for name, weight in wanted.items()}
    return {name: weight for name, weight in found.items() if weight is not None}


def _again(name, weight, named, places):
    "Return where a weight is now, None where it is not found."
    by_object = places.get((id(weight.module), weight.attr))
    if by_object is None and weight.stored is not None: by_object = places.get(id(weight.stored))
    if by_object is not None: return by_object
    for path in (name, joined(name, weight.attr)):
        if path in named.every: return named.every[path]
    inside = [other for path, other in named.weights.items() if path.startswith(f'{name}.')]
    if len(inside) == 1: return inside[0]
    ending = [other for path, other in named.every.items() if name and path.endswith(f'.{name}')]
    return ending[0] if len(ending) == 1 else None


class Places:
    "Remember where the modules and some weights of a model are, to see cheaply whether one was replaced."

    def __init__(self,
        model: nn.Module,
        weights,  # of `Weight`
    ):
        self.children = [(module._modules, key, child) for module in model.modules()
                         for key, child in module._modules.items()]
        self.shapes = [(w.module._parameters, w.attr, w.tensor.shape) for w in weights]

    @property
    def changed(self) -> bool:
        "Tell whether a module was replaced or taken away, or a weight is no parameter of its shape any more."
        for modules, key, child in self.children:
            if modules.get(key) is not child: return True
        for parameters, attr, shape in self.shapes:
            parameter = parameters.get(attr)
            if parameter is None or parameter.shape != shape: return True
        return False
