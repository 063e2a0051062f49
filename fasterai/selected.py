"Which weights take part, and what is masked along with a filter."
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from fasterai.dataflow import trace, watch
from fasterai.granularity import Grouping
from fasterai.layers import Weight, choose
from fasterai.peers import ALONE
from fasterai.rules import Rules


@dataclass(frozen=True, eq=False)
class Layer:
    "A selected weight: where it is, and how it falls into groups."
    name: str  # of the module, or of the parameter where a module has several weights
    at: Weight  # the module, and the name of the parameter in it
    grouping: Grouping  # the groups that the granularity makes of it
    filters: Grouping | None  # its filters, where a group is one or several of them; else None

    @property
    def module(self) -> nn.Module: return self.at.module

    @property
    def weight(self) -> nn.Parameter: return self.at.tensor

    def filters_alive(self,
        mask,  # `event.Mask` of this layer
    ) -> torch.Tensor:  # bool (output channels,)
        "Which filters have any weight left."
        if self.filters.groups == self.grouping.groups: return mask.alive(self.grouping)
        return self.filters.count(mask.keep) > 0


class Selected:
    "The weights that take part, those that are pruned as one, and what was left out and why."

    def __init__(self,
        model: nn.Module,
        rules: Rules,
        example=None,  # a batch as the model takes it (a tuple for several inputs), or a function that gives one when needed
    ):
        self.model, self.rules, self.example = model, rules, example
        self.choice = choose(model, rules.layers)
        self.candidates = {name: _layer(name, at, rules.granularity) for name, at in self.choice.chosen.items()}
        rules.check_groupings({name: layer.grouping for name, layer in self.candidates.items()})
        self.flow, self.ties = None, []  # how data goes through the model; lists of names whose n-th filters are pruned together
        self.resolved = not any(layer.grouping.whole_filters for layer in self.candidates.values())
        if not _gives_later(example): self.resolve()

    @property
    def layers(self) -> dict:  # name: `Layer`
        "The layers that take part. Where whole filters go, the data flow is found first."
        self.resolve()
        return self.candidates

    @property
    def skipped(self) -> dict:  # name: reason
        "The layers that were left out."
        self.resolve()
        return self.choice.skipped

    def tied(self,
        names: list,  # of layers
    ) -> list:  # of lists of `Layer`
        "Put those together that are pruned as one."
        sets = {}
        for name in names: sets.setdefault(self._tie(name)[0], []).append(self.layers[name])
        return list(sets.values())

    def tied_to(self,
        name: str,
    ) -> list:  # of names, this one too
        "The layers that are pruned as one with this."
        self.resolve()
        return self._tie(name)

    def _tie(self, name): return next((names for names in self.ties if name in names), [name])

    def resolve(self):
        "Find the data flow, once, where whole filters go: it says what makes the network's output, and what is tied."
        if self.resolved: return
        example = self.example() if _gives_later(self.example) else self.example
        flow = _flow(self.model, example)
        self._leave(self._unprunable(flow) if flow else {})
        self.flow, self.resolved, self.example = flow, True, None
        if self.rules.coupled: self._couple()

    def _unprunable(self, flow):
        "The layers that whole filters cannot be taken from, unless they were asked for by name: {name: reason}."
        found = {}
        for name, layer in self.candidates.items():
            if not layer.grouping.whole_filters or name in self.choice.by_name: continue
            if id(layer.weight) in flow.output_weights:
                found[name] = "makes the network's output, and whole filters go: name it in layers= to include it"
            elif id(layer.weight) not in flow.ran:
                found[name] = 'did not run, so what reads its filters is unknown: name it in layers= to include it'
        return found

    def _leave(self, reasons):
        "Take layers out; `ValueError` where none would be left."
        if len(reasons) == len(self.candidates):
            raise ValueError(f'layers: no layer selected: {"; ".join(f"{n!r} {why}" for n, why in reasons.items())}')
        self.choice.skipped.update(reasons)
        for name in reasons: del self.candidates[name]

    def _couple(self):
        "Find what a sum ties together; where a part of it is not selected the others are left alone."
        if self.flow is None:
            raise ValueError(f'coupled: how {type(self.model).__name__} runs cannot be told from its code: pass example=one batch of inputs')
        names = {id(layer.weight): name for name, layer in self.candidates.items()}
        for ids in self.flow.tied():
            known = [name for i, name in names.items() if i in ids]
            if len(known) == len(ids): self.ties.append(known)
            else: self._leave(dict.fromkeys(known, 'is added to what is not selected, so with coupled=True it stays'))

    def dependents(self,
        masks: dict,  # layer's name: `event.Mask`
    ) -> dict:  # module: {tensor's name: bool (channels,)}, True where it is masked
        "Find what is zero with the filters that are: biases, and channels of BatchNorm."
        layers = [layer for layer in self.candidates.values() if layer.grouping.whole_filters]
        if not layers: return {}
        alive = ALONE.fetched([layer.filters_alive(masks[layer.name]) for layer in layers])
        dead = {id(layer.weight): ~torch.from_numpy(filters) for layer, filters in zip(layers, alive)}
        found = self._biases(dead)
        biases = {id(module._parameters[name]) for module, tensors in found.items() for name in tensors}
        norms = self.flow.zero_channels(dead, biases) if self.flow else {}
        for norm, channels in norms.items():
            found[norm] = {n: channels for n in ('running_mean', 'weight', 'bias') if getattr(norm, n) is not None}
        return found

    def _biases(self, dead):
        "The biases of dead filters: {module: {name: bool (channels,)}}; `dead` says for a weight's id which filters are."
        found = {}
        for module in self.model.modules():
            for attr, weight in module._parameters.items():
                if id(weight) not in dead: continue
                name = attr.replace('weight', 'bias') if 'weight' in attr else 'bias'
                bias = module._parameters.get(name)
                if bias is None or bias.shape != dead[id(weight)].shape: continue
                found.setdefault(module, {})[name] = dead[id(weight)]
        return found


def _gives_later(example): return isinstance(example, Callable) and not isinstance(example, torch.Tensor)


def _layer(name, at, granularity):
    grouping = Grouping(at.module, granularity, name, at.attr)
    filters = Grouping(at.module, 'filter', name, at.attr) if grouping.whole_filters else None
    return Layer(name, at, grouping, filters)


def _flow(model, example):
    "The data flow as far as it can be found; None where it cannot."
    if example is not None: return _watched(model, example)
    try: return trace(model)
    except Exception as error:
        warnings.warn(f'example: how {type(model).__name__} runs cannot be told from its code ({type(error).__name__}: {error}), so its '
                      'output layer is not left alone and the BatchNorm of a dead filter stays: pass Sparsifier(…, example=one batch of inputs)')


def _watched(model, example):
    example = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    try: return watch(model, example)
    except Exception as error:
        shapes = [tuple(e.shape) if isinstance(e, torch.Tensor) else type(e).__name__ for e in example]
        raise ValueError(f'example: got {shapes}, on which the model fails: {type(error).__name__}: {error}') from error
