"What changes: `decide` gives the masks that an event would set. It touches no weight."
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property, partial
from typing import NamedTuple

import torch

from fasterai.evidence import Evidence
from fasterai.peers import ALONE
from fasterai.regrowth import Regrowth
from fasterai.rules import Rules
from fasterai.scoring import Scores
from fasterai.selection import LayerGroups


@dataclass
class Mask:
    "What stays of one layer's weight."
    keep: torch.Tensor  # bool, of the weight's shape, True = keep
    costs: torch.Tensor | None  # (groups,), the weights left in each; None where a living one has all of its weights
    left: int  # how many are kept

    @classmethod
    def counted(cls, keep, grouping):
        "A mask of which only the bools are known."
        return cls(keep, _left_in_groups(grouping, keep), ALONE.count(keep))

    @property
    def size(self): return self.keep.numel()

    @property
    def nearly_empty(self): return 100 * self.left < self.size

    def alive(self, grouping) -> torch.Tensor:  # (groups,), bool
        "The groups that have any weight left."
        if self.costs is not None: return self.costs > 0
        rows = grouping.rows(self.keep)
        return rows if grouping.size == 1 else rows[:, 0]

    def to(self, device):
        if self.keep.device == device: return self
        costs = None if self.costs is None else self.costs.to(device)
        return Mask(self.keep.to(device), costs, self.left)


class Budget(NamedTuple):
    "Layers that compete with each other, and the share of their weights that shall be zero."
    tied: list  # of lists of layers; the n-th groups of the layers in one list are pruned together
    fraction: Fraction

    @property
    def layers(self): return [layer for layers in self.tied for layer in layers]


@dataclass(frozen=True)
class Change:
    "A change of the masks, as decided: a value."
    before: dict  # layer's name: `Mask`
    after: dict  # layer's name: `Mask`
    weights: dict = field(default_factory=dict)  # layer's name: tensor, what the weights that stay become; none for most

    @cached_property
    def masks(self) -> dict:  # layer's name: bool, of the weight's shape, True = keep
        "The masks after it."
        return {name: mask.keep for name, mask in self.after.items()}

    @cached_property
    def died(self) -> dict:  # layer's name: bool, of the weight's shape
        "The weights that were kept and no longer are."
        return {name: self.before[name].keep & ~keep for name, keep in self.masks.items()}

    @cached_property
    def born(self) -> dict:  # layer's name: bool, of the weight's shape
        "The weights that are kept and were not; they start from zero."
        return {name: keep & ~self.before[name].keep for name, keep in self.masks.items()}

    def __repr__(self):
        left, weights = sum(m.left for m in self.after.values()), sum(m.size for m in self.after.values())
        return f'Change({len(self.after)} layers, {weights - left:,} of {weights:,} weights are zero)'


def decide(
    rules: Rules,
    budgets: list,  # of `Budget`
    masks: dict,  # layer's name: `Mask`, as they are
    evidence: Evidence,
    regrow: Regrowth | None = None,  # a score for what is gone; None where nothing comes back
) -> Change:
    "Decide which weights stay. Nothing is changed, so that whatever fails here has done nothing."
    evidence.check([layer for budget in budgets for layer in budget.layers])
    scores = Scores(rules.criterion, evidence, [layer for budget in budgets if budget.fraction for layer in budget.layers])
    before = {layer.name: masks[layer.name] for budget in budgets for layer in budget.layers}
    after = {}
    for budget in budgets:
        groups = [_joined([_groups(layer, masks[layer.name], rules, scores, regrow) for layer in tied]) for tied in budget.tied]
        for tied, group, keep in zip(budget.tied, groups, rules.context_info(groups, budget.fraction)):
            counted = rules.context_info.counted and len(tied) == 1
            kept = group.remaining_after if counted else None
            for layer in tied: after[layer.name] = _decided(layer.grouping, masks[layer.name], keep, kept, len(tied) > 1, regrow)
    return Change(before, after)


def _groups(layer, mask, rules, scores, regrow):
    "What the context sees of a layer."
    grouping, weights = layer.grouping, mask.size
    seen = LayerGroups(layer.name, weights, grouping.size, mask.alive(grouping), partial(scores, layer), mask.costs, rules.floor_of(weights),
                grouping.one_layer, grouping.shape, grouping.axes, _known_alive(grouping, mask))
    return _competing_again(seen, grouping, regrow) if regrow else seen


def _known_alive(grouping, mask):
    "How many groups live, where that follows from how many weights do."
    return mask.left // grouping.size if mask.costs is None else None


def _competing_again(group, grouping, regrow):
    "A layer of which all groups compete, those that are gone with the score that the regrowth gives."
    gone = ~group.alive

    def scores(where): return regrow(group.scores(where), gone[where])
    return replace(group, alive=torch.ones_like(gone), scores=scores, costs=_full_groups(grouping, gone.device), known_alive=grouping.groups)


def _joined(groups):
    "Several layers whose n-th groups are pruned together, as one."
    if len(groups) == 1: return groups[0]
    size = sum(p.group_size for p in groups)

    def scores(where): return sum(torch.as_tensor(p.scores(where)) * (p.group_size / size) for p in groups)
    alike = all(p.costs is None and torch.equal(p.alive, groups[0].alive) for p in groups)
    costs = None if alike else sum(p.group_size * p.alive if p.costs is None else p.costs for p in groups)
    floor = None if groups[0].floor is None else sum(p.floor for p in groups)
    alive = torch.stack([p.alive for p in groups]).any(0)
    return LayerGroups(' + '.join(p.name for p in groups), sum(p.n_weights for p in groups), size, alive, scores, costs, floor)


def _decided(grouping, mask, keep, left, tied, regrow):
    "The mask of one layer after a decision about its groups; `left` is None where it must be counted."
    kept = grouping.expand(keep)
    costs = _full_groups(grouping, keep.device) if regrow else mask.costs
    scattered = tied or costs is not None  # zeros in groups that live
    if scattered and not regrow: kept = _both(kept, mask.keep)
    if costs is not None: costs = costs * keep
    if left is None: left = ALONE.count(kept)
    return Mask(kept, costs, left)


def _left_in_groups(grouping, keep):
    "What is left of each group, where they are not all full or gone."
    if grouping.size == 1: return None
    left = grouping.count(keep)
    return None if bool(((left == 0) | (left == grouping.size)).all()) else left


def _full_groups(grouping, device):
    "The weights in each group of a layer with all its weights, where they are not all alike."
    return grouping.sizes.to(device) if isinstance(grouping.sizes, torch.Tensor) else None


def _both(mask, other):
    "What both keep. Bytes are multiplied: where one of the masks repeats, that is far faster than `&`."
    return (mask.view(torch.uint8) * other.view(torch.uint8)).view(torch.bool)
