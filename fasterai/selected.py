"Hold which weights take part, which are pruned together, and which tensors are masked along with a filter."
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from fasterai.arguments import callable_with, is_function, read_example
from fasterai.dataflow import trace, watch
from fasterai.granularity import Grouping, TiedGrouping, weights_of
from fasterai.inputs import uses
from fasterai.layers import check_masked_along, choose
from fasterai.names import Named, Places, Weight, bare, find_again, warn_lost
from fasterai.norms import Known
from fasterai.peers import ALONE, Alone
from fasterai.rules import Rules
from fasterai.shards import is_split, reshard
from fasterai.ties import ties


@dataclass(frozen=True, eq=False)
class Layer:
    """Describe a selected weight: where it is, and how it falls into groups.

    `Sparsifier.layers` has them by name."""
    name: str  # of the module, or of the parameter where a module has several weights
    path: str  # its name in the model as it is now; another one where modules were inserted or wrapped
    at: Weight  # the module, and the name of the parameter in it
    grouping: Grouping  # `.groups`: how many groups; `.size`: number of weights in each; `.axes`: {name: size}
    filters: Grouping | None  # the same by filters, where a group is one or several filters; else None
    own: Grouping  # by the granularity alone; `grouping` may join filters that are pruned together
    uses: int = 1  # number of multiply-adds of each weight, where the context goes by work; else 1
    peers: ClassVar = ALONE  # an event reads what is in this process

    @property
    def module(self) -> nn.Module:
        "Return the module that has the weight."
        return self.at.module

    @property
    def weight(self) -> nn.Parameter:
        "Return the weight."
        return self.at.tensor

    @property
    def group_of_filters(self) -> np.ndarray:  # ints (filters,)
        "Return which of its own groups each filter is in."
        at = self.filters.rows(torch.arange(self.weight.numel()).reshape(self.filters.shape))
        return self.own.numbers(at.reshape(self.filters.groups, -1)[:, 0]).numpy()

    def has_axes_of(self,
        weight: Weight,  # one that was found in the place of this
    ) -> bool:
        "Tell whether a weight has the same axes, as far as they are known."
        axes = [weights_of(at.module).get(at.attr) for at in (self.at, weight)]
        return None in axes or axes[0] == axes[1]

    def is_at(self,
        weight: Weight,  # one that was found in the place of this
    ) -> bool:
        "Tell whether a weight is this one, as the same module or the same parameter; else it was replaced."
        return weight.module is self.module or weight.stored is self.at.stored

    def filters_alive(self,
        mask,  # `event.Mask` of this layer
    ) -> torch.Tensor:  # bool (output channels,)
        "Return which filters have any weight left, as far as the mask is here."
        if mask.place is not None: return self.filters.count(_spread(mask)) > 0
        is_own = self.grouping is self.own
        if is_own and self.filters.groups == self.own.groups: return mask.alive(self.own)
        return self.filters.count(mask.keep) > 0


class Selected:
    """Hold the structure: the selected layers, those that are pruned together, and those left out and why.

    Where whole filters are pruned, the data flow must be known. `resolve` finds it, at the latest when
    `layers` is asked for."""

    def __init__(self,
        model: nn.Module,
        rules: Rules,
        example=None,  # a batch as the model takes it: a tuple for several inputs, a dict for keywords; or a function that returns one when needed
    ):
        if is_function(example):
            callable_with('example', example, 0, 'a batch, or a function without arguments')
        self.model, self.rules, self.example = model, rules, example
        self.choice = choose(model, rules.layers, rules.exclude)
        self.candidates = {n: _layer(n, at, rules.granularity) for n, at in self.choice.chosen.items()}  # name: `Layer`
        rules.check_groupings({n: layer.own for n, layer in self.candidates.items()})
        check_masked_along(model, [c.at for c in self.candidates.values() if c.grouping.whole_filters])
        self.flow = None  # `Known`, where the data flow is needed and could be found
        self.ties = []  # lists of names of layers whose n-th filters are pruned together
        self.learned = set(self.choice.by_name)  # names of layers that were seen to learn, or that were named
        self.shared = _shared(model, self.candidates)  # name of a layer: names of others with the same parameter
        self.version = 0  # it rises when modules were replaced
        self.split = any(is_split(layer.weight) for layer in self.candidates.values())
        self._note_places()
        self.notice()
        self.whole_filters = any(layer.grouping.whole_filters for layer in self.candidates.values())
        self.resolved = not self.whole_filters and not rules.context_info.by_work
        if not is_function(example): self.resolve()

    @property
    def layers(self) -> dict:  # name: `Layer`
        "Return the selected layers that learn; `ValueError` where none does."
        self.refresh()
        return self.learning()

    @property
    def skipped(self) -> dict:  # name: reason
        "Return the layers that were left out, and why."
        self.refresh()
        reason = 'is frozen, so it is left alone: name it in layers= to include it'
        return self.choice.skipped | dict.fromkeys(self.frozen, reason)

    def refresh(self):
        "Find layers again whose modules were replaced, and the data flow, where it is not known yet."
        self.follow()
        self.resolve()
        self.notice()

    # Frozen layers

    def notice(self):
        "Note which layers learn. One that has learned takes part, also while it is frozen later."
        for name, layer in self.candidates.items():
            if name not in self.learned and layer.weight.requires_grad: self.learned.add(name)

    def include(self,
        names: Iterable,  # of layers
    ):
        "Let layers take part although they are frozen."
        self.learned |= {*names}

    @property
    def frozen(self) -> list:  # of names
        "Return the layers that never learned, and those that are pruned as one with them."
        never = {name for name in self.candidates if name not in self.learned}
        if not never: return []
        return [name for name in self.candidates if never.intersection(self.tied_to(name))]

    def learning(self) -> dict:  # name: `Layer`
        "Return the layers that learn or did before; `ValueError` where none does."
        frozen = self.frozen
        if len(frozen) < len(self.candidates):
            return {name: layer for name, layer in self.candidates.items() if name not in frozen}
        if not self.candidates:
            raise ValueError('layers: none of those that were selected is in the model any more')
        names = ', '.join(map(repr, self.candidates))
        raise ValueError(f'layers: got only layers that are frozen, {names}; expected at least one that '
                         'learns: let it require gradients, or name it in layers=')

    # Modules that are replaced

    def follow(self):
        "Find the layers again where modules were replaced; name those that are lost, and leave them out."
        if self.split: reshard(self.model)
        if self.places.changed: self._take_over(self.located(self.model))

    def move_to(self,
        model: nn.Module,
        example,  # a batch, or a function that returns one when needed
    ):
        "Go over to another model, with the layers that are found in it. The data flow is found anew."
        found, self.model = self.located(model), model
        self._take_over(found)
        if self.flow is None: return
        self.flow, self.ties, self.example, self.resolved = None, [], example, False
        for name, layer in self.candidates.items(): self.candidates[name] = replace(layer, grouping=layer.own)

    def located(self,
        model: nn.Module,  # the one that is known, or another one
    ) -> dict:  # name: `names.Found`, of the layers that are found
        "Find the layers in a model as it is now."
        layers = {layer.path: layer for layer in self.candidates.values()}
        shapes = {path: layer.grouping.shape for path, layer in layers.items()}
        places = {path: layer.at for path, layer in layers.items()}
        found = find_again(places, shapes, model, wrapped=model is not self.model)
        return {layers[path].name: at for path, at in found.items() if layers[path].has_axes_of(at.weight)}

    def _take_over(self, found):
        "Take the layers as they were found; leave out the others, and name them."
        lost = [name for name in self.candidates if name not in found]
        warn_lost(lost)
        for name in lost:
            del self.candidates[name]
            self.choice.skipped[name] = 'is no longer in the model as it was pruned'
        self.ties = [[name for name in tied if name not in lost] for tied in self.ties]
        for name, (path, weight) in found.items():
            self.candidates[name] = replace(self.candidates[name], path=path, at=weight)
        self._note_places()
        self.version += 1

    def _note_places(self):
        "Note where all is now. Of weights that shared a parameter those are named that do not any more."
        together, apart = [], []
        every = Named(self.model).every if self.shared else {}
        for name in [name for name in self.shared if name in self.candidates]:
            first = self.candidates[name].at
            others = {other: every[other] for other in self.shared[name] if other in every}
            same = {other: at for other, at in others.items() if at.stored is first.stored}
            apart += [other for other in others if other not in same]
            if same: together.append([first, *same.values()])
            self.shared[name] = list(same)
        warn_lost(apart)
        self.places = Places(self.model, [layer.at for layer in self.candidates.values()], together)

    def tied(self,
        names: list,  # of layers
    ) -> list:  # of lists of `Layer`
        "Put the layers together that are pruned as one."
        sets, layers = {}, self.layers
        for name in names:
            first = self.tied_to(name)[0]
            sets.setdefault(first, []).append(layers[name])
        return list(sets.values())

    def tied_to(self,
        name: str,  # of a layer
    ) -> list:  # of names, with this one
        "Return the layers that are pruned as one with this layer."
        return next((names for names in self.ties if name in names), [name])

    def resolve(self):
        """Find, once, the data flow where whole filters are pruned, and multiply-adds where these count.

        What cannot be pruned so is left out."""
        if self.resolved: return
        example = self.example() if is_function(self.example) else self.example
        if self.rules.context_info.by_work: self._count_uses(example)
        if self.whole_filters: self._find_flow(example)
        self.example, self.resolved = None, True

    def _count_uses(self, example):
        "Count the multiply-adds of each weight in one call, and leave out the layers that show none."
        if example is None:
            raise ValueError('example: got None, expected one batch of inputs with '
                             f'context={self.rules.context!r}, which counts multiply-adds')
        weights = {id(layer.weight) for layer in self.candidates.values()}
        found = _run(bare(self.model), example, partial(uses, weights=weights))
        unseen = [name for name, layer in self.candidates.items() if id(layer.weight) not in found]
        self._leave_out(dict.fromkeys(unseen, 'was not seen to multiply, so what its zeros save is unknown'))
        for name, layer in self.candidates.items():
            self.candidates[name] = replace(layer, uses=found[id(layer.weight)])

    def _find_flow(self, example):
        flow = _flow(bare(self.model), example)
        if flow is not None: self._leave_out(self._without_filters(flow))
        self.flow = None if flow is None else Known(flow, self.candidates, self.model)
        if self.rules.coupled: self._couple()

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
        if reasons and len(reasons) == len(self.candidates):
            said = '; '.join(f'{name!r} {why}' for name, why in reasons.items())
            raise ValueError(f'layers: no layer selected: {said}')
        self.choice.skipped.update(reasons)
        for name in reasons: del self.candidates[name]

    def _couple(self):
        "Find the filters that are pruned together. Layers whose filters meet others are left out."
        if self.flow is None:
            raise ValueError(f'coupled: how {type(self.model).__name__} runs cannot be told from its code: '
                             'pass example=one batch of inputs')
        names = {id(layer.weight): name for name, layer in self.candidates.items()}
        own = {id(layer.weight): layer.group_of_filters for layer in self.candidates.values()}
        found, with_others, collapsed = ties(self.flow.flow, own)
        added = 'is added to what is not selected, so with coupled=True it stays'
        all_one = 'has filters that all meet each other, so with coupled=True it stays'
        self._leave_out({name: added for i, name in names.items() if i in with_others} |
                        {name: all_one for i, name in names.items() if i in collapsed})
        for tie in found: self._tie(tie, [i for i in names if i in tie.of_filters], names, own)
        self.ties += _within_modules(self.candidates)

    def _tie(self, tie, weights, names, own):
        "Let layers be pruned as one, with the groups of a tie."
        if len(weights) > 1: self.ties.append([names[i] for i in weights])
        layers = [self.candidates[names[i]] for i in weights]
        alike = all(layer.own.groups == tie.groups for layer in layers)
        if alike and all(np.array_equal(tie.of_filters[i], own[i]) for i in weights): return
        parts = tie.parts(weights)
        for i, layer in zip(weights, layers):
            grouping = TiedGrouping(layer.filters, tie.of_filters[i], tie.groups, parts)
            self.candidates[layer.name] = replace(layer, grouping=grouping)

    def dependents(self,
        masks: dict,  # layer's name: `event.Mask`
        peers: Alone = ALONE,  # the processes, each of which may have a part of the masks
    ) -> dict:  # module: {tensor's name: bool (channels,)}, True where it is masked
        """Find what is masked along with pruned filters: their biases, and the BatchNorm and learned shift of
        channels that are zero."""
        layers = [layer for layer in self.candidates.values() if layer.grouping.whole_filters]
        if not layers: return {}
        alive = ALONE.fetched([layer.filters_alive(masks[layer.name]) for layer in layers])
        dead = {layer.name: ~torch.from_numpy(filters) for layer, filters in zip(layers, peers.any_of(alive))}
        found = self._biases({id(layer.weight): dead[layer.name] for layer in layers})
        if self.flow is None: return found
        for module, tensors in self.flow.zero_channels(dead, found, self.model).items():
            found.setdefault(module, {}).update(tensors)
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
            joint = _joint_bias(module, dead)
            if joint is not None: found.setdefault(module, {})['in_proj_bias'] = joint
        return found


def _shared(model, layers):
    "Find the weights that share the parameter of a layer: {name of the layer: their names}."
    owners = {id(layer.weight): name for name, layer in layers.items()}
    found = {}
    for name, weight in Named(model).every.items():
        owner = owners.get(id(weight.stored))
        if owner is not None and owner != name: found.setdefault(owner, []).append(name)
    return found


def _spread(mask):
    "Return the part of a mask as one of the whole weight, False elsewhere."
    keep = torch.zeros(mask.place.shape, dtype=torch.bool, device=mask.keep.device)
    keep[mask.place.box] = mask.keep
    return keep


def _layer(name, at, granularity):
    grouping = Grouping(at.module, granularity, name, at.attr)
    filters = Grouping(at.module, 'filter', name, at.attr) if grouping.whole_filters else None
    return Layer(name, name, at, grouping, filters, grouping)


def _joint_bias(module, dead):
    "Return the mask of the one bias that queries, keys and values of an attention have; None elsewhere."
    if not isinstance(module, nn.MultiheadAttention) or module.in_proj_bias is None: return None
    weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    if not any(id(weight) in dead for weight in weights): return None
    none = torch.zeros(module.embed_dim, dtype=torch.bool)
    return torch.cat([dead.get(id(weight), none) for weight in weights])


def _within_modules(layers):
    """Find the weights of one module that are pruned as one, as lists of names.

    They are those of a recurrent layer, where a group is a hidden unit, and the heads of an attention."""
    found = {}
    for name, layer in layers.items():
        module, attr = layer.at
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and layer.own.groups == layer.own.axes.get('O'):
            found.setdefault((module, attr.replace('_hh', '_ih')), []).append(name)
        if isinstance(module, nn.MultiheadAttention) and layer.own.groups == module.num_heads:
            found.setdefault((module, 'heads'), []).append(name)
    return [names for names in found.values() if len(names) > 1]


def _flow(model, example):
    "Find the data flow; None, with a warning, where it cannot be found."
    if example is not None: return _run(model, example, lambda model, inputs: watch(model, *inputs))
    try: return trace(model)
    except Exception as error:
        warnings.warn(f'example: how {type(model).__name__} runs cannot be told from its code '
                      f'({type(error).__name__}: {error}), so its output layer is not left alone '
                      'and the BatchNorm of a dead filter stays: '
                      'pass Sparsifier(…, example=one batch of inputs)', stacklevel=2)
        return None


def _run(model, example, function):
    "Call a function of model and inputs that runs the model; `ValueError` where the model fails."
    inputs = read_example(example, model)
    try: return function(model, inputs)
    except Exception as error:
        hint = '; a tuple has several inputs, a list is one' if isinstance(example, list) else ''
        said = f'{type(error).__name__}: {error}{hint}'
        raise ValueError(f'example: got {inputs}, on which the model fails: {said}') from error
