"Hold which weights take part, which are pruned together, and which tensors are masked along with a filter."
import warnings
from dataclasses import dataclass

import torch
from torch import nn

from fasterai.arguments import callable_with
from fasterai.dataflow import trace, watch
from fasterai.granularity import Grouping
from fasterai.layers import Weight, bare, check_masked_along, choose
from fasterai.peers import ALONE
from fasterai.rules import Rules


@dataclass(frozen=True, eq=False)
class Layer:
    """Describe a selected weight: where it is, and how it falls into groups.

    `Sparsifier.layers` has them by name."""
    name: str  # of the module, or of the parameter where a module has several weights
    at: Weight  # the module, and the name of the parameter in it
    grouping: Grouping  # `.groups`: how many groups; `.size`: number of weights in each; `.axes`: {name: size}
    filters: Grouping | None  # the same by filters, where a group is one or several filters; else None

    @property
    def module(self) -> nn.Module:
        "Return the module that has the weight."
        return self.at.module

    @property
    def weight(self) -> nn.Parameter:
        "Return the weight."
        return self.at.tensor

    def filters_alive(self,
        mask,  # `event.Mask` of this layer
    ) -> torch.Tensor:  # bool (output channels,)
        "Return which filters have any weight left."
        if self.filters.groups == self.grouping.groups: return mask.alive(self.grouping)
        return self.filters.count(mask.keep) > 0


class Selected:
    """Hold the structure: the selected layers, those that are pruned together, and those left out and why.

    Where whole filters are pruned, the data flow must be known. `resolve` finds it, at the latest when
    `layers` is asked for."""

    def __init__(self,
        model: nn.Module,
        rules: Rules,
        example=None,  # a batch as the model takes it (a tuple for several inputs), or a function that returns one when needed
    ):
        if _is_function(example):
            callable_with('example', example, 0, 'a batch, or a function without arguments')
        self.model, self.rules, self.example = model, rules, example
        self.choice = choose(model, rules.layers, rules.exclude)
        self.candidates = {n: _layer(n, at, rules.granularity) for n, at in self.choice.chosen.items()}  # name: `Layer`
        rules.check_groupings({n: layer.grouping for n, layer in self.candidates.items()})
        check_masked_along(model, [c.at for c in self.candidates.values() if c.grouping.whole_filters])
        self.flow = None  # `Flow`, where it is needed and could be found
        self.ties = []  # lists of names of layers whose n-th filters are pruned together
        self.resolved = not any(layer.grouping.whole_filters for layer in self.candidates.values())
        if not _is_function(example): self.resolve()

    @property
    def layers(self) -> dict:  # name: `Layer`
        "Return the selected layers."
        self.resolve()
        return self.candidates

    @property
    def skipped(self) -> dict:  # name: reason
        "Return the layers that were left out, and why."
        self.resolve()
        return self.choice.skipped

    def tied(self,
        names: list,  # of layers
    ) -> list:  # of lists of `Layer`
        "Put the layers together that are pruned as one."
        sets = {}
        for name in names:
            first = self.tied_to(name)[0]
            sets.setdefault(first, []).append(self.layers[name])
        return list(sets.values())

    def tied_to(self,
        name: str,  # of a layer
    ) -> list:  # of names, with this one
        "Return the layers that are pruned as one with this layer."
        return next((names for names in self.ties if name in names), [name])

    def resolve(self):
        "Find the data flow, once, where whole filters are pruned, and leave out what cannot be pruned so."
        if self.resolved: return
        example = self.example() if _is_function(self.example) else self.example
        flow = _flow(bare(self.model), example)
        if flow is not None: self._leave_out(self._without_filters(flow))
        self.flow, self.example = flow, None
        if self.rules.coupled: self._couple()
        self.resolved = True

    def _without_filters(self, flow):
        "Find the layers whose filters cannot be pruned, unless they were named: {name: reason}."
        found = {}
        for name, layer in self.candidates.items():
            if not layer.grouping.whole_filters or name in self.choice.by_name: continue
            if id(layer.weight) in flow.output_weights:
                found[name] = ("makes the network's output, and whole filters go: "
                               'name it in layers= to include it')
            elif id(layer.weight) not in flow.ran:
                found[name] = ('did not run, so what reads its filters is unknown: '
                               'name it in layers= to include it')
        return found

    def _leave_out(self, reasons):
        "Leave layers out; `ValueError` where none would be left."
        if len(reasons) == len(self.candidates):
            said = '; '.join(f'{name!r} {why}' for name, why in reasons.items())
            raise ValueError(f'layers: no layer selected: {said}')
        self.choice.skipped.update(reasons)
        for name in reasons: del self.candidates[name]

    def _couple(self):
        "Find the layers whose outputs are added. Where one of them is not selected, the others are left out."
        if self.flow is None:
            raise ValueError(f'coupled: how {type(self.model).__name__} runs cannot be told from its code: '
                             'pass example=one batch of inputs')
        names = {id(layer.weight): name for name, layer in self.candidates.items()}
        for ids in self.flow.tied():
            known = [name for i, name in names.items() if i in ids]
            if len(known) == len(ids):
                self.ties.append(known)
                continue
            reason = 'is added to what is not selected, so with coupled=True it stays'
            self._leave_out(dict.fromkeys(known, reason))

    def dependents(self,
        masks: dict,  # layer's name: `event.Mask`
    ) -> dict:  # module: {tensor's name: bool (channels,)}, True where it is masked
        """Find what is masked along with pruned filters: their biases, and the BatchNorm of channels that
        are zero."""
        layers = [layer for layer in self.candidates.values() if layer.grouping.whole_filters]
        if not layers: return {}
        alive = ALONE.fetched([layer.filters_alive(masks[layer.name]) for layer in layers])
        dead = {id(layer.weight): ~torch.from_numpy(filters) for layer, filters in zip(layers, alive)}
        found = self._biases(dead)
        if self.flow is None: return found
        biases = {id(getattr(module, name)) for module, tensors in found.items() for name in tensors}
        for norm, channels in self.flow.zero_channels(dead, biases).items():
            names = [name for name in ('running_mean', 'bias') if getattr(norm, name) is not None]
            found[norm] = dict.fromkeys(names, channels)
        return found

    def _biases(self, dead):
        """Find the biases of filters: {module: {name: bool (channels,)}}.

        `dead` is {id of a weight: bool (filters,)}."""
        found = {}
        for module in self.model.modules():
            for attr, weight in module._parameters.items():
                if id(weight) not in dead: continue
                name = attr.replace('weight', 'bias') if 'weight' in attr else 'bias'
                bias = module._parameters.get(name)
                if bias is None or bias.shape != dead[id(weight)].shape: continue
                found.setdefault(module, {})[name] = dead[id(weight)]
        return found


def _is_function(example): return callable(example) and not isinstance(example, torch.Tensor)


def _layer(name, at, granularity):
    grouping = Grouping(at.module, granularity, name, at.attr)
    filters = Grouping(at.module, 'filter', name, at.attr) if grouping.whole_filters else None
    return Layer(name, at, grouping, filters)


def _flow(model, example):
    "Find the data flow; None, with a warning, where it cannot be found."
    if example is not None: return _watched(model, example)
    try: return trace(model)
    except Exception as error:
        warnings.warn(f'example: how {type(model).__name__} runs cannot be told from its code '
                      f'({type(error).__name__}: {error}), so its output layer is not left alone '
                      'and the BatchNorm of a dead filter stays: '
                      'pass Sparsifier(…, example=one batch of inputs)', stacklevel=2)
        return None


def _watched(model, example):
    inputs = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    try: return watch(model, inputs)
    except Exception as error:
        shapes = [tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__ for x in inputs]
        said = f'{type(error).__name__}: {error}'
        raise ValueError(f'example: got {shapes}, on which the model fails: {said}') from error
