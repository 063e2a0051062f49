"Show an event the layers of which each process has a part: this part, or the whole, gathered one at a time."
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch

from fasterai.event import Change, Mask
from fasterai.evidence import Evidence
from fasterai.granularity import Grouping
from fasterai.kinds import Gathered
from fasterai.peers import ALONE, Alone
from fasterai.rules import Rules
from fasterai.shards import Place, here, split_like

OF_PARTS = {'weight', 'grad', 'grad_mean', 'saliency', 'batch_squares', 'movement', 'initial'}  # the evidence of single weights, of which each process has its own
OF_WHOLE = OF_PARTS | {'noise'}  # what a whole layer tells


@dataclass(eq=False)
class Part:
    "Describe the part of a layer that this process has, as `selected.Layer` does a whole one."
    layer: object  # `selected.Layer`
    peers: Alone
    place: Place

    @property
    def name(self) -> str: return self.layer.name

    @property
    def uses(self) -> int: return self.layer.uses

    @property
    def here(self): return self

    @cached_property
    def grouping(self) -> Grouping: return self.layer.grouping.of_part(self.place.sizes)

    @cached_property
    def weight(self) -> torch.Tensor:
        "Return the part of the weight, with that of its gradient."
        return _with_grad(self.layer.weight, here)


@dataclass(eq=False)
class Whole:
    "Describe a whole layer, of which this process has a part. The weight is gathered when it is asked for."
    layer: object  # `selected.Layer`
    shards: Alone  # the processes that have parts of it
    held: dict  # the layer that was gathered last: its weight
    peers: ClassVar = ALONE  # each process decides about all of it

    @property
    def name(self) -> str: return self.layer.name

    @property
    def uses(self) -> int: return self.layer.uses

    @property
    def grouping(self) -> Grouping: return self.layer.grouping

    @property
    def here(self) -> Part: return Part(self.layer, self.shards, self.shards.place(self.layer.weight))

    @property
    def weight(self) -> torch.Tensor:
        "Return all of the weight, with its gradient. That of one layer at a time is held."
        if self.name not in self.held:
            self.held.clear()
            self.held[self.name] = _with_grad(self.layer.weight, self.shards.whole)
        return self.held[self.name]

    def gathered(self,
        state,  # of evidence about what is here
    ):
        "Return the state of evidence about all of the layer."
        if isinstance(state, Gathered): return Gathered(state.steps, self.gathered(state.total))
        if not isinstance(state, torch.Tensor): return state
        return self.shards.whole(self.shards.place(self.layer.weight).split(state))


def _with_grad(weight, read):
    found = read(weight)
    if weight.grad is not None: found.grad = read(weight.grad)
    return found


def seen(
    peers: Alone,
    rules: Rules,
    budgets: list,  # of `event.Budget`
    masks: dict,  # layer's name: `event.Mask`, of what is here
    moves: bool,  # weights may come back
) -> tuple:  # budgets, masks
    """Show an event what it decides about, where each process has a part.

    Where single weights compete by what each tells of itself these are the parts. Else they are whole
    layers, and all processes decide the same."""
    layers = [layer for budget in budgets for layer in budget.layers]
    if _in_parts(rules, layers, moves):
        by_name = {layer.name: Part(layer, peers, peers.place(layer.weight)) for layer in layers}
    else:
        held = {}
        by_name = {layer.name: Whole(layer, peers, held) for layer in layers}
        masks = masks | {layer.name: _whole(peers, masks[layer.name], layer) for layer in layers}
    shown = [budget._replace(tied=[[by_name[layer.name] for layer in tied] for tied in budget.tied])
             for budget in budgets]
    return shown, masks


def _in_parts(rules, layers, moves):
    criterion, context = rules.criterion, rules.context_info
    if moves or rules.round_to or not context.of_parts or any(layer.grouping.size > 1 for layer in layers):
        return False
    return criterion.elementwise and not criterion.relative and {*criterion.evidence} <= OF_PARTS


def _whole(peers, mask, layer):
    keep = peers.whole(mask.place.split(mask.keep.view(torch.uint8))).view(torch.bool)
    return Mask.counted(keep.contiguous(), layer.grouping)


def cut(
    peers: Alone,
    change: Change,
    layers: dict,  # name: `selected.Layer`
) -> Change:
    "Return a change with the parts of masks that are here, where all of them are."
    places = {name: peers.place(layers[name].weight) for name in change.after}

    def parts(masks): return {name: _part(mask, places[name]) for name, mask in masks.items()}
    return replace(change, before=parts(change.before), after=parts(change.after))


def _part(mask, place):
    return mask if mask.place is not None else Mask(place.part(mask.keep), None, mask.left, place)


class EvidenceOfParts(Evidence):
    """Keep the evidence about the parts of layers that this process has.

    A step counts where any process has a gradient that is not zero: they tell each other at an event, not at
    each step."""

    def __init__(self,
        names: tuple,  # of the kinds, as in `EVIDENCE`
        selected,  # `Selected`, whose `layers` are {name: layer}
        peers: Alone,
    ):
        self.peers = peers
        self.told = {}  # (kind, layer's name): number of steps that all have told each other
        self.untold = {}  # (kind, layer's name): of each step since, a tensor (), 1 where it counts here
        super().__init__(names, selected)

    @contextmanager
    def gathered(self, layers, names=None, peers=ALONE):
        "Tell each other, for a `with` block, which steps count."
        self.tell()
        yield

    def tell(self):
        "Tell each other which steps count; `RuntimeError` where the ranks saw other steps."
        mine = {key: np.array([bool(one) for one in steps]) for key, steps in self.untold.items()}
        of_ranks = self.peers.gathered('steps', mine)
        lengths = [{key: len(steps) for key, steps in of_rank.items()} for of_rank in of_ranks]
        if any(lengths[0] != other for other in lengths):
            raise RuntimeError(f'ranks: they saw {lengths} steps, expected the same: attach on all ranks')
        for key in mine:
            counts = np.any([steps[key] for steps in of_ranks], 0)
            self.told[key] = self.told.get(key, 0) + int(counts.sum())
            self.states[key] = self.states[key]._replace(steps=torch.tensor(self.told[key]))
        self.untold = {}

    def end(self, names):
        super().end(names)
        for steps in (self.told, self.untold):
            for key in [key for key in steps if key not in self.states]: del steps[key]

    def add_to(self, state, complete=True):
        self.tell()
        super().add_to(state, complete=True)
        for layer, saved in state.items():
            place = self._part(self.selected.candidates[layer]).place
            of_layer = saved.get('evidence', {})
            for kind, of in of_layer.items(): of_layer[kind] = _mapped(place.split, of)

    def load(self, states):
        super().load(states)
        self.told = {key: int(of.steps) for key, of in states.items() if isinstance(of, Gathered)}
        self.untold = {}

    def _read(self, kind, layer, saved):
        weight = self.selected.candidates[layer].weight
        return _mapped(lambda tensor: split_like(tensor, weight), super()._read(kind, layer, saved))

    def _part(self, layer):
        if isinstance(layer, (Part, Whole)): return layer.here
        return Part(layer, self.peers, self.peers.place(layer.weight))

    def _lacks(self, name, layers):
        return self.peers.everywhere(super()._lacks(name, [self._part(layer) for layer in layers]))

    def _state(self, name, layer):
        state = super()._state(name, self._part(layer))
        return layer.gathered(state) if isinstance(layer, Whole) else state

    def _update(self, name, layer, update, *x):
        key = name, layer.name
        before = self.states.get(key)
        super()._update(name, self._part(layer), update, *x)
        after = self.states[key]
        if not isinstance(after, Gathered): return
        self.untold.setdefault(key, []).append(after.steps - (0 if before is None else before.steps))


def _mapped(function, state):
    "Return a state of evidence with a function of its values."
    if isinstance(state, Gathered): return Gathered(state.steps, function(state.total))
    if isinstance(state, dict): return state | {'total': function(state['total'])}
    return function(state) if isinstance(state, torch.Tensor) else state


def check(
    rules: Rules,
    given: dict,  # argument: value, of the Sparsifier
):
    "Raise `ValueError` for what cannot be done where each process has a part of the model."
    split = 'with a model that is split over processes (fully_shard, tensor parallel)'
    for argument, value in given.items():
        if value is None: continue
        raise ValueError(f'{argument}: got one {split}, expected None: batches go through whole models only')
    if rules.context_info.by_work:
        raise ValueError(f'context: got {rules.context!r} {split}, expected one that counts weights')
    for argument, criterion in (('criteria', rules.criterion), ('regrow', rules.regrowth)):
        kinds = [] if criterion is None else [name for name in criterion.evidence if name not in OF_WHOLE]
        if not kinds and not getattr(criterion, 'asks_support', False): continue
        came = getattr(rules, argument)
        raise ValueError(f'{argument}: got {came!r} {split}, expected one of weights and gradients, '
                         "as 'magnitude', 'gradient', 'taylor', 'random', or a function of them")
