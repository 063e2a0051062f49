"Decide what an event changes. `decide` is pure: it returns the new masks as a value, and touches no weight."
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property, partial
from typing import NamedTuple

import torch

from fasterai.evidence import Evidence
from fasterai.peers import ALONE
from fasterai.regrowth import ABOVE
from fasterai.rounding import rounded
from fasterai.rules import Rules
from fasterai.scoring import Scores
from fasterai.selection import LayerGroups
from fasterai.zeros import count_zeros, find_zeros, lowest_where, zero_groups


@dataclass(frozen=True, eq=False)
class Mask:
    "Say which weights of one layer stay."
    keep: torch.Tensor  # bool, of the weight's shape, True = keep
    costs: torch.Tensor | None  # (groups,), weights left in each group; None where each group is full or empty
    left: int  # number of weights that stay

    @classmethod
    def counted(cls, keep, grouping):
        "Make a mask from its bools."
        return cls(keep, _costs(grouping, keep), ALONE.count(keep))

    @classmethod
    def full(cls, weight, grouping):
        "Make a mask that keeps all of a weight."
        keep = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
        return cls(keep, _full_costs(grouping, weight.device), weight.numel())

    @property
    def size(self) -> int: return self.keep.numel()

    @property
    def nearly_empty(self) -> bool:
        "Tell whether less than 1 % of the weights are left."
        return 100 * self.left < self.size

    def alive(self, grouping) -> torch.Tensor:  # (groups,), bool
        "Return which groups have any weight left."
        if self.costs is not None: return self.costs > 0
        rows = grouping.rows(self.keep)
        return rows if grouping.size == 1 else rows[:, 0]

    def to(self, device):
        "Return the mask on a device."
        if self.keep.device == device: return self
        costs = None if self.costs is None else self.costs.to(device)
        return Mask(self.keep.to(device), costs, self.left)


class Budget(NamedTuple):
    "Say which layers compete with each other, and which fraction of their weights shall be zero."
    tied: list  # of lists of layers; the n-th groups of the layers in one list are pruned together
    target: Fraction  # of zeros, in the end
    share: Fraction  # how much of the way from the initial sparsity to the target is wanted now
    initial: Fraction = Fraction(0)  # of zeros, to begin with

    @property
    def fraction(self): return self.initial + (self.target - self.initial) * self.share

    def without(self, names):
        "Leave out the layers of these names, and those that are pruned as one with them."
        stay = [tied for tied in self.tied if not any(layer.name in names for layer in tied)]
        return self._replace(tied=stay)

    @property
    def layers(self): return [layer for layers in self.tied for layer in layers]


@dataclass(frozen=True, eq=False)
class Change:
    "Hold a change of the masks, as an event decided it."
    before: dict  # layer's name: `Mask`
    after: dict  # layer's name: `Mask`
    waiting: frozenset = frozenset()  # names of layers about which there was no evidence: they stay as they are
    weights: dict = field(default_factory=dict)  # layer's name: tensor; new values of weights that stay, for most events none
    repaired: tuple = ()  # what each repair returned, `repair.Repaired` of those by name

    @cached_property
    def masks(self) -> dict:  # layer's name: bool, of the weight's shape, True = keep
        "Return the masks after the event."
        return {name: mask.keep.clone() for name, mask in self.after.items()}

    @cached_property
    def died(self) -> dict:  # layer's name: bool, of the weight's shape
        "Return which weights the event prunes."
        return {name: self.before[name].keep & ~mask.keep for name, mask in self.after.items()}

    @cached_property
    def born(self) -> dict:  # layer's name: bool, of the weight's shape
        "Return which weights the event brings back. They start from zero."
        return {name: mask.keep & ~self.before[name].keep for name, mask in self.after.items()}

    def __repr__(self):
        size = sum(mask.size for mask in self.after.values())
        zeros = size - sum(mask.left for mask in self.after.values())
        return f'Change({len(self.after)} layers: {zeros:,} of {size:,} weights are masked)'


def decide(
    rules: Rules,
    budgets: list,  # of `Budget`
    masks: dict,  # layer's name: `Mask`, before the event
    evidence: Evidence,
    regrow: bool = False,  # pruned groups compete again, with the scores of the rules' regrowth; False: nothing comes back
) -> Change:
    "Decide which weights stay. Nothing is changed, so an error leaves all as it was."
    everyone = [layer for budget in budgets for layer in budget.layers]
    lacking = evidence.lacking(everyone)
    budgets = [budget.without(lacking) for budget in budgets]
    layers = [layer for budget in budgets for layer in budget.layers]
    waiting = frozenset(layer.name for layer in everyone) - {layer.name for layer in layers}
    evidence.begin(layers)
    asked = [layer for budget in budgets if budget.fraction for layer in budget.layers]
    scores = Scores(rules.criterion, evidence, asked)
    scores.support = partial(_support, rules, budgets, masks)
    after = {}
    for budget in budgets:
        if budget.tied: after |= _prune(rules, budget, masks, scores, regrow)
    return Change({layer.name: masks[layer.name] for layer in layers}, after, waiting)


def _support(rules, budgets, masks, layer, scores):
    "Return which weights of a layer would stay by some scores, if it were alone."
    fraction = next(budget.fraction for budget in budgets if layer in budget.layers)
    grouping, mask = layer.grouping, masks[layer.name]
    of_groups = grouping.mean(grouping.rows(scores))
    groups = LayerGroups(layer.name, mask.size, grouping.size, mask.alive(grouping), of_groups.__getitem__,
                         mask.costs, rules.floor_of(mask.size), grouping.one_layer, grouping.shape,
                         grouping.axes)
    keep, = rules.context_info([groups], fraction)
    return _both(grouping.expand(keep), mask.keep)


def _prune(rules, budget, masks, scores, regrow):
    "Return the new masks of the layers of one budget."
    zeros = find_zeros(budget.tied, masks)
    competing = []
    for tied in budget.tied:
        groups = [_groups(layer, masks[layer.name], rules, scores, zeros, regrow) for layer in tied]
        together = _as_one(groups)
        competing.append(together if regrow else _zeros_first(together, tied, masks, rules, zeros))
    keeps, after = rules.context_info(competing, budget.fraction), {}
    if rules.round_to and budget.fraction: keeps = rounded(competing, keeps, rules.round_to)
    for tied, groups, keep in zip(budget.tied, competing, keeps):
        alone, freed = len(tied) == 1, groups.outcome.freed
        left = groups.outcome.left if alone and rules.context_info.counted else None
        for layer in reversed(tied):
            mask, found = masks[layer.name], None if regrow else zeros.get(layer.name)
            if found is None:
                after[layer.name] = _new_mask(layer.grouping, mask, keep, left, alone, regrow)
                continue
            after[layer.name] = _with_zeros(layer.grouping, mask, keep, found, freed)
            freed -= min(freed, found.n_scattered)
    return {layer.name: after[layer.name] for layer in budget.layers}


def _groups(layer, mask, rules, scores, zeros, regrow):
    "Return the groups of a layer as the context sees them."
    grouping, found = layer.grouping, zeros.get(layer.name)
    known = mask.left // grouping.size if mask.costs is None else None
    costs = mask.costs if found is None else found.costs
    scattered = 0 if found is None else found.n_scattered
    groups = LayerGroups(layer.name, mask.size, grouping.size, mask.alive(grouping), partial(scores, layer),
                         costs, rules.floor_of(mask.size), grouping.one_layer, grouping.shape,
                         grouping.axes, known, scattered=scattered,
                         count_free=_count_free(layer, mask, found))
    return _all_competing(groups, layer, mask, found, rules.regrowth) if regrow else groups


def _count_free(layer, mask, zeros):
    "Return a function that counts zeros that no mask holds and that do not lie scattered in other groups."
    if layer.grouping.size == 1: return partial(count_zeros, layer.weight, mask)
    if zeros is None: return None
    return lambda: int((zeros.costs * zeros.empty).sum())


def _zeros_first(groups, tied, masks, rules, zeros):
    "Return the groups with those below all others that are zero although no mask holds them."
    first, criterion = tied[0], rules.criterion
    by_themselves = criterion.zeros_lowest and not rules.context_info.rescales
    if groups.group_size == 1 and by_themselves: return groups
    is_zero = zero_groups(first, masks[first.name], zeros.get(first.name))
    if is_zero is None: return groups
    scores = lowest_where(groups.scores, is_zero, bounded=criterion.pure)
    return replace(groups, scores=scores, known_alive=groups.n_alive)


def _all_competing(groups, layer, mask, zeros, regrowth):
    """Return the groups of a layer with the pruned ones among them.

    These, and others that are zero, have the scores of the regrowth. Zeros that lie scattered in other groups
    are let go with them."""
    pruned, is_zero = ~groups.alive, zero_groups(layer, mask, zeros)

    def scores(where):
        gone = pruned[where] if is_zero is None else pruned[where] | torch.as_tensor(is_zero(where))
        return regrowth(torch.as_tensor(groups.scores(where)).clamp(min=ABOVE), gone)
    return replace(groups, alive=torch.ones_like(pruned), scores=scores, known_alive=layer.grouping.groups,
                   costs=_full_costs(layer.grouping, pruned.device), scattered=0, count_free=None)


def _as_one(tied):
    "Join the groups of several layers whose n-th groups are pruned together."
    first = tied[0]
    if len(tied) == 1: return first
    size = sum(groups.group_size for groups in tied)

    def scores(where):
        weighted = [torch.as_tensor(groups.scores(where)) * (groups.group_size / size) for groups in tied]
        return sum(weighted)

    alike = all(groups.costs is None and torch.equal(groups.alive, first.alive) for groups in tied)
    costs = None if alike else sum(_costs_of(groups) for groups in tied)
    floor = None if first.floor is None else sum(groups.floor for groups in tied)
    alive = torch.stack([groups.alive for groups in tied]).any(0)
    name = ' + '.join(groups.name for groups in tied)
    n_weights = sum(groups.n_weights for groups in tied)
    scattered = sum(groups.scattered for groups in tied)
    counts = [groups.count_free for groups in tied if groups.count_free]
    return LayerGroups(name, n_weights, size, alive, scores, costs, floor, scattered=scattered,
                       count_free=lambda: sum(count() for count in counts))


def _costs_of(groups):
    return groups.group_size * groups.alive if groups.costs is None else groups.costs


def _new_mask(grouping, mask, keep, left, alone, regrow):
    "Return the mask of one layer after a decision about its groups; `left` is None where it must be counted."
    kept = grouping.expand(keep)
    costs = _full_costs(grouping, keep.device) if regrow else mask.costs
    has_zeros_in_groups = costs is not None or not alone
    if has_zeros_in_groups and not regrow: kept = _both(kept, mask.keep)
    if costs is not None: costs = costs * keep
    if left is None: left = ALONE.count(kept)
    return Mask(kept, costs, left)


def _with_zeros(grouping, mask, keep, zeros, freed):
    "Return the mask of one layer that also holds its scattered zeros, but for the last `freed` of them."
    kept = grouping.expand(keep) & mask.keep
    held = zeros.scattered.flatten().nonzero().flatten()
    held = held[:len(held) - min(freed, len(held))]
    kept = kept.contiguous()
    kept.view(-1)[held] = False
    return Mask.counted(kept, grouping)


def _costs(grouping, keep):
    "Count the weights left in each group; None where each group is full or empty."
    if grouping.size == 1: return None
    left = grouping.count(keep)
    full_or_empty = (left == 0) | (left == grouping.size)
    return None if bool(full_or_empty.all()) else left


def _full_costs(grouping, device):
    "Return the number of weights in each full group; None where all groups have the same."
    return grouping.sizes.to(device) if isinstance(grouping.sizes, torch.Tensor) else None


def _both(mask, other):
    "Return `mask & other`. Bytes are multiplied: where one of the masks repeats, that is far faster."
    return (mask.view(torch.uint8) * other.view(torch.uint8)).view(torch.bool)
