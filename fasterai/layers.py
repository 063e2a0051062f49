"Find the weights to prune: those of layers that are chosen by type, by name or glob, or by module."
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedParameter, is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from fasterai.arguments import nearest
from fasterai.granularity import AXES, is_part
from fasterai.names import Named, Weight, is_script, joined
from fasterai.shards import here

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # of weights that can be pruned
LOOKUPS = (nn.Embedding, nn.EmbeddingBag)  # left alone unless they are chosen

COMPUTED = ('has a weight that is computed from others (a parametrization, weight_norm, spectral_norm), '
            'so it is left alone: remove that first to include it')

ONE_CHOICE = (str, type, nn.Module, torch.Tensor, Weight)  # what stands for itself, though some can be iterated


class Choice(NamedTuple):
    "Hold the chosen weights by name, in the model's order; a layer's `weight` has the name of the layer."
    chosen: dict  # {name: `Weight`}; one that several layers share stands once, under the first name
    by_name: set  # the names of those that were chosen one by one
    skipped: dict  # {name: reason}, for every other weight of a layer


# ---- Which weights are chosen, and why others are not

def choose(
    model: nn.Module,
    layers=None,  # a type, name, glob, module, parameter, or a list of these; a module stands for all layers in it; None for all
    exclude=None,  # what takes no part, in the same forms; None: nothing
) -> Choice:
    """Find the weights that the user means by `layers` and `exclude`.

    `ValueError` if an entry means none, or means a weight that cannot be pruned; `TypeError` if it is none of
    these kinds."""
    if is_script(model):
        raise ValueError('model: got a ScriptModule, expected the torch.nn.Module that it was made from')
    named = Named(model)
    wanted, by_name = _wanted(named, layers)
    excluded = _excluded(named, exclude)
    wanted, by_name = wanted - excluded, by_name - excluded
    chosen, skipped = {}, {}
    owners, left_out = _Owners(), _Owners()
    for name in excluded: left_out.of(named.every[name].stored, name)
    for name in [name for name in named.every if name in wanted]:
        weight = named.every[name]
        shared = left_out.of(weight.stored)
        if shared is not None:
            skipped[name] = f'shares the weight of {shared!r}, which is excluded'
            continue
        if layers is None and weight.stored is None and not _is_masked(weight):
            skipped[name] = COMPUTED
            continue
        _check_fit(name, weight)
        if not weight.tensor.numel():
            skipped[name] = 'has no weights'
            continue
        owner = owners.of(weight.tensor, name)
        if owner is None: chosen[name] = weight
        else: skipped[name] = f'shares the weight of {owner!r}'
    for name in [name for name in named.every if name not in wanted]:
        weight = named.every[name]
        if name in excluded:
            skipped[name] = 'excluded'
            continue
        owner = owners.of(weight.stored)
        if owner is not None and name in named.weights: skipped[name] = f'shares the weight of {owner!r}'
        else: skipped |= _not_wanted(name, weight, named, layers)
    if not chosen:
        for name, reason in skipped.items():
            if reason == COMPUTED: _check_fit(name, named.every[name])  # raises
        none = f'{type(model).__name__} has none of {_known_types()}'
        hint = f'; name a parameter, as layers={next(iter(named.others))!r}' if named.others else ''
        raise ValueError(f'layers: no layer selected: {none}{hint}')
    return Choice(chosen, by_name, skipped)


def _wanted(named, layers):
    "Return the names of all weights that are meant, and of those that were chosen one by one."
    if layers is None: return set(named.weights) - set(_lookups(named)), set()
    wanted, by_name = set(), set()
    for choice in _as_list(layers):
        found = matching(choice, named, named.weights)
        wanted.update(found)
        if isinstance(choice, type): continue
        by_name.update(name for name in found if means_by_name(choice, name, named.every[name]))
    return wanted, by_name


def _excluded(named, exclude):
    if exclude is None: return set()
    found = [matching(choice, named, named.weights, 'exclude') for choice in _as_list(exclude, 'exclude')]
    return {name for names in found for name in names}


def _lookups(named):
    "Return {name: reason} for lookup tables, and for what shares the weight of one."
    found, owners = {}, _Owners()
    for name, weight in named.weights.items():
        if not isinstance(weight.module, LOOKUPS): continue
        found[name] = 'a lookup table: name it in layers= to include it'
        owners.of(weight.stored, name)
    for name, weight in named.weights.items():
        table = None if name in found else owners.of(weight.stored)
        if table is None: continue
        found[name] = (f'shares the weight of the lookup table {table!r}: '
                       'name one of them in layers= to include it')
    return found


class _Owners:
    """Know the first name of each piece of memory, so that weights that share one, as tied ones do, count
    once."""

    def __init__(self): self.by_id, self.by_storage = {}, {}

    def of(self,
        tensor: torch.Tensor,
        name: str | None = None,  # the name that it gets where it has none yet; None: none
    ) -> str | None:  # the name that it had before
        "Return who has the memory of a tensor, or a part of it."
        if tensor is None: return None  # it is computed from others
        if id(tensor) in self.by_id: return self.by_id[id(tensor)]
        storage, start, end = _memory(tensor)
        for first, last, owner in self.by_storage.get(storage, ()):
            if start < last and first < end: return owner
        if name is not None:
            self.by_id[id(tensor)] = name
            if storage: self.by_storage.setdefault(storage, []).append((start, end, name))
        return None


def _memory(tensor):
    "Return the address of a tensor's storage, 0 where it has none, and its first and last place in it."
    if not isinstance(tensor, torch.Tensor) or isinstance(tensor, UninitializedParameter): return 0, 0, 0
    if tensor.layout != torch.strided or tensor.device.type == 'meta' or not tensor.numel(): return 0, 0, 0
    tensor = here(tensor)
    if not tensor.numel(): return 0, 0, 0
    span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride()))
    start = tensor.storage_offset()
    size = tensor.element_size()
    return tensor.untyped_storage().data_ptr(), start * size, (start + span) * size


def check_kinds(
    layers,  # what the user gave; None is fine
    argument: str = 'layers',  # its name, for the error
):
    "Raise `TypeError` for an entry that is of none of the kinds in `FINDERS`, whatever the model."
    if layers is None: return
    for choice in _as_list(layers, argument):
        if not isinstance(choice, ONE_CHOICE): raise TypeError(f'{argument}: got {choice!r}, {_EXPECTED}')


def _check_no_dict(layers):
    if not isinstance(layers, Mapping): return
    raise TypeError(f'layers: got {layers!r}, {_EXPECTED}; a sparsity for each is given by sparsity=')


def _as_list(layers, argument='layers'):
    _check_no_dict(layers)
    one = isinstance(layers, ONE_CHOICE) or not isinstance(layers, Iterable)
    layers = [layers] if one else list(layers)
    if not layers:
        all_or_nothing = 'all' if argument == 'layers' else 'nothing'
        raise ValueError(f'{argument}: got an empty list, '
                         f'expected None for {all_or_nothing}, or at least one entry')
    return layers


def _not_wanted(name, weight, named, layers):
    "Return {name: reason} for a weight that is not chosen; nothing for biases and their like."
    if name in named.weights: return {name: _lookups(named)[name] if layers is None else 'not chosen'}
    if is_lazy(weight.stored) or getattr(weight.stored, 'ndim', 0) < 2: return {}
    if isinstance(weight.module, ParametrizationList) or is_part(weight.module, weight.attr): return {}
    kind = type(weight.module).__name__
    reason = (f"{kind} is no known layer type: add_layer_type({kind}, {weight.attr}=…) makes it one, "
              "with 'O I' for outputs × inputs, 'I O' for inputs × outputs; or name it in layers=")
    return {name.removesuffix('.weight'): reason}


def _check_fit(name, weight):
    "Raise `ValueError` if a weight cannot be pruned."
    tensor = weight.module._parameters.get(weight.attr)
    if tensor is None:
        first = 'remove that'
        if _is_masked(weight): first = f"torch.nn.utils.prune.remove(module, '{weight.attr}')"
        raise ValueError(f'layers: the weight of {name!r} is not a parameter of its own but computed from '
                         'others (torch.nn.utils.prune, a parametrization, weight_norm, spectral_norm): '
                         f'{first} first, or leave the layer out')
    if isinstance(tensor, UninitializedParameter):
        raise ValueError(f'layers: {name!r} is lazy and has no weight yet: '
                         'run one batch through the model first')
    reason = why_not_zeroed(tensor)
    if reason: raise ValueError(f'layers: the weight of {name!r} {reason}')


def _is_masked(weight):
    "Tell whether torch.nn.utils.prune has masked a weight."
    return f'{weight.attr}_mask' in weight.module._buffers


def why_not_zeroed(
    tensor: torch.Tensor,
) -> str:  # '' where single entries can be zeroed in place
    "Return why single entries of a tensor cannot be zeroed, as the end of an error message."
    if tensor.layout != torch.strided:
        return f'has the layout {tensor.layout}, expected a dense tensor, as to_dense() makes it'
    tensor = here(tensor)
    if tensor.is_meta: return 'is on the meta device, expected values: load them first'
    if tensor.dtype not in DTYPES:
        return f'is {tensor.dtype}, expected floating-point weights: {", ".join(map(str, DTYPES))}'
    if tensor.is_inference():
        return 'was made in inference mode, where it cannot be changed later; expected a copy by clone()'
    if tensor.is_neg(): return 'is a negative view of another tensor, expected a copy by resolve_neg()'
    if _overlaps(tensor): return 'is expanded: entries share their memory; expected a copy by clone()'
    return ''


def _overlaps(tensor):
    "Tell whether several entries of a tensor may be the same place in memory."
    last = 0  # the farthest place of the axes so far
    axes = [(step, n) for step, n in zip(tensor.stride(), tensor.shape) if n > 1]
    for step, n in sorted(axes):
        if step <= last: return True
        last += step * (n - 1)
    return False


def check_masked_along(
    model: nn.Module,
    weights: list,  # `Weight`s whose whole filters are pruned
):
    "Raise `ValueError` where a bias or BatchNorm that is masked along with filters cannot be zeroed."
    if not weights: return
    modules = {weight.module for weight in weights}
    for name, module in model.named_modules():
        if not (module in modules or isinstance(module, _BatchNorm)): continue
        for attr, tensor in (module._parameters | module._buffers).items():
            masked = 'bias' in attr or attr in ('running_mean', 'weight')
            if tensor is None or not masked: continue
            reason = '' if is_lazy(tensor) else why_not_zeroed(tensor)
            if not reason: continue
            raise ValueError(f'layers: {joined(name, attr)!r} is masked along with filters, and {reason}')


# ---- What one entry of `layers` means

def means_by_name(
    choice,  # one entry of `layers`
    name: str,  # a weight that it means
    weight: Weight,
) -> bool:
    "Return True if an entry of `layers` is this weight itself or its own module, by name or as an object."
    if isinstance(choice, str):
        return choice in (name, f'{name}.weight') or name == joined(choice, weight.attr)
    if isinstance(choice, Weight): return choice == weight
    return choice is weight.module or weight.holds(choice)


def matching(
    choice,  # a type, a name, a glob, a module, a parameter, or a `Weight`
    named: Named,  # all weights of the model
    weights: dict,  # {name: `Weight`}, those to choose from
    argument: str = 'layers',  # the argument's name, for the error
) -> list:  # names in `weights`, or in `named.others`
    """Find the weights that one entry of `layers` means.

    `ValueError` if it means none, `TypeError` if it is none of these kinds."""
    find = next((find for kinds, find in FINDERS if isinstance(choice, kinds)), None)
    if find is None: raise TypeError(f'{argument}: got {choice!r}, {_EXPECTED}')
    found = find(choice, named, weights)
    if found is None:
        kind = type(choice).__name__ if isinstance(choice, nn.Module) else 'parameter'
        raise ValueError(f'{argument}: got a {kind} that is not a part of the model, {_EXPECTED}')
    if not found:
        some = ', '.join(repr(name) for name in list(weights)[:6])
        more = ', …' if len(weights) > 6 else ''
        raise ValueError(f'{argument}: got {choice!r}, which means none of the layers here, {some}{more}; '
                         f'{_EXPECTED}{_hint(choice, named, weights)}')
    return found


_EXPECTED = 'expected a type, a name or glob, a module or parameter of the model, or a list of these'


def _of_type(kind, named, weights):
    return [name for name, weight in weights.items() if isinstance(weight.module, kind)]


def _in_module(module, named, weights):
    at = next((name for name, m in named.modules.items() if m is module), None)
    return None if at is None else _within(at, weights)


def _of_parameter(parameter, named, weights):
    return [n for n, weight in (named.others | weights).items() if weight.holds(parameter)] or None


def _of_weight(wanted, named, weights):
    return [n for n, weight in (named.others | weights).items() if weight == wanted] or None


def _of_name(pattern, named, weights):
    "Find by the name of a module, then by a glob among the weights, then by a glob among other parameters."
    module = pattern.removesuffix('.weight')
    found = _within(module, weights) if module in named.modules else []
    found = found or [name for name in weights if fnmatchcase(name, pattern)]
    return found or [name for name in named.others if fnmatchcase(name, pattern)]


# (kinds of a choice, how the names of its weights are found: None if it is not a part of the model)
FINDERS = [
    (type, _of_type),
    (nn.Module, _in_module),
    (torch.Tensor, _of_parameter),
    (Weight, _of_weight),
    (str, _of_name),
]


def _within(module, weights):
    "Return the names of the weights in a module; the model itself has the name ''."
    return [name for name in weights if name == module or not module or name.startswith(module + '.')]


def _hint(choice, named, weights):
    "Return the end of an error message: for the name of a type the type, else the nearest name."
    if not isinstance(choice, str): return ''
    if choice in _known_types().split(', '): return f'; for a type write nn.{choice}'
    return nearest(choice, [*weights, *named.others])


def _known_types(): return ', '.join(kind.__name__ for kind in AXES if not issubclass(kind, LOOKUPS))
