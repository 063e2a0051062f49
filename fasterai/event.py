"Decide what an event changes. `decide` is pure: it returns the new masks as a value, and touches no weight."
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property, partial
from typing import NamedTuple

import torch

from fasterai.context import divided
from fasterai.evidence import Evidence
from fasterai.exchange import exchanged
from fasterai.peers import ALONE
from fasterai.regrowth import LIVING, REGROWTHS
from fasterai.rounding import rounded
from fasterai.rules import Rules
from fasterai.scoring import Gone, LayerScores, Scores, together
from fasterai.selection import LayerGroups, Outcome
from fasterai.shards import Place
from fasterai.zeros import LowestWhere, count_zeros, find_zeros, zero_groups


@dataclass(frozen=True, eq=False)
class Mask:
    "Say which weights of one layer stay."
    keep: torch.Tensor  # bool, of the weight's shape, True = keep
    costs: torch.Tensor | None  # (groups,), weights left in each group; None where each group is full or empty
    left: int  # number of weights that stay, in all processes
    place: Place | None = None  # which part of the layer `keep` is about; None: all of it

    @classmethod
    def counted(cls, keep, grouping):
        "Make a mask from its bools."
        if grouping.size == 1: return cls(keep, None, ALONE.count(keep))
        return cls(keep, _costs(grouping, grouping.count(keep)), ALONE.count(keep))

    @classmethod
    def full(cls, weight, grouping):
        "Make a mask that keeps all of a weight."
        keep = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
        return cls(keep, _as_costs(grouping.sizes, weight.device), weight.numel())

    @property
    def size(self) -> int: return self.keep.numel() if self.place is None else self.place.n_whole

    @property
    def nearly_empty(self) -> bool:
        "Tell whether less than 1 % of the weights are left."
        return 100 * self.left < self.size

    def alive(self, grouping) -> torch.Tensor:  # (groups,), bool
        "Return which groups have any weight left."
        if self.costs is not None: return self.costs > 0
        rows = grouping.rows(self.keep)
        return rows if grouping.size == 1 else rows[:, 0]

    def counts(self, grouping) -> torch.Tensor:  # (groups,), ints
        "Return how many weights are left in each group."
        return grouping.size * self.alive(grouping) if self.costs is None else self.costs

    def to(self, device):
        "Return the mask on a device."
        if self.keep.device == device: return self
        costs = None if self.costs is None else self.costs.to(device)
        return Mask(self.keep.to(device), costs, self.left, self.place)

    def whole(self,
        values: torch.Tensor,  # of the shape of `keep`
    ) -> torch.Tensor:  # of the weight's shape
        "Return values of what is here as a tensor of the layer: a DTensor where it is split."
        return values if self.place is None else self.place.split(values)


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
        return {name: mask.whole(mask.keep.clone()) for name, mask in self.after.items()}

    @cached_property
    def died(self) -> dict:  # layer's name: bool, of the weight's shape
        "Return which weights the event prunes."
        return {name: mask.whole(self.before[name].keep & ~mask.keep) for name, mask in self.after.items()}

    @cached_property
    def born(self) -> dict:  # layer's name: bool, of the weight's shape
        "Return which weights the event brings back. They start from zero."
        return {name: mask.whole(mask.keep & ~self.before[name].keep) for name, mask in self.after.items()}

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
    swap: Fraction = Fraction(0),  # share of the groups that live in each layer to be exchanged for as many that are gone
) -> Change:
    "Decide which weights stay. Nothing is changed, so an error leaves all as it was."
    everyone = [layer for budget in budgets for layer in budget.layers]
    lacking = evidence.lacking(everyone, rules.criterion.evidence)
    budgets = [budget.without(lacking) for budget in budgets]
    layers = [layer for budget in budgets for layer in budget.layers]
    waiting = frozenset(layer.name for layer in everyone) - {layer.name for layer in layers}
    asked = [layer for budget in budgets if budget.fraction for layer in budget.layers]
    regrowth = _regrowth(rules, evidence, asked) if asked and (regrow or swap) else None
    evidence.begin(layers, _needed(rules.criterion, regrowth))
    scores = Scores(rules.criterion, evidence, asked)
    scores.support = partial(_support, rules, budgets, masks)
    gone = None if regrowth is None else Gone(regrowth, evidence, asked, scores)
    after = {}
    for budget in budgets:
        if budget.tied: after |= _prune(rules, budget, masks, scores, gone if regrow else None, regrow)
        for tied in budget.tied if swap and budget.fraction else ():
            after |= _exchange(rules, tied, masks, after, scores, gone, swap)
    return Change({layer.name: masks[layer.name] for layer in layers}, after, waiting)


def _regrowth(rules, evidence, layers):
    "Return the criterion of what is gone: that of the rules, else the gradient where there is one."
    if rules.regrowth is not None: return rules.regrowth
    gradient = REGROWTHS['gradient'](rules.criterion)
    return rules.criterion if evidence.lacks_all(layers, 'grad') else gradient


def _needed(criterion, regrowth):
    "Return the names of the evidence of one event; ties among what is gone fall at random."
    if regrowth is None: return criterion.evidence
    return tuple(dict.fromkeys((*criterion.evidence, *regrowth.evidence, 'noise')))


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


def _prune(rules, budget, masks, scores, gone, regrow):
    "Return the new masks of the layers of one budget."
    if regrow and not budget.fraction:
        return {layer.name: Mask.full(layer.weight, layer.grouping) for layer in budget.layers}
    zeros = find_zeros(budget.tied, masks)
    competing = []
    for tied in budget.tied:
        groups = _as_one(tied, masks, rules, scores, zeros)
        if regrow: competing.append(_all_competing(groups, tied, masks, zeros, gone))
        else: competing.append(_zeros_first(groups, tied, masks, rules, zeros))
    keeps, after = _in_parts(rules, budget, competing, zeros), {}
    for tied, groups, keep in zip(budget.tied, competing, keeps):
        alone, freed = len(tied) == 1, groups.outcome.freed
        left = None
        if alone and groups.outcome.left is not None and rules.context_info.counted:
            left = groups.outcome.left // tied[0].uses
        for layer in reversed(tied):
            mask, found = masks[layer.name], None if regrow else zeros.get(layer.name)
            if found is None:
                after[layer.name] = _new_mask(layer.grouping, mask, keep, left, alone, regrow)
                continue
            let_go = min(freed // layer.uses, len(found.scattered))
            after[layer.name] = _with_zeros(layer.grouping, mask, keep, found, let_go)
            freed -= let_go * layer.uses
    return {layer.name: after[layer.name] for layer in budget.layers}


def _in_parts(rules, budget, competing, zeros):
    "Return the keep masks that the context decides on, where the parts of layers compete like layers."
    parts = [_parts(groups, tied, zeros) for groups, tied in zip(competing, budget.tied)]
    flat = [part for several in parts for part in several]
    keeps = rules.context_info(flat, budget.fraction)
    if rules.round_to and budget.fraction: keeps = rounded(flat, keeps, rules.round_to)
    found, left = [], iter(keeps)
    for groups, tied, several in zip(competing, budget.tied, parts):
        if several == [groups]:
            found.append(next(left))
            continue
        keep = torch.zeros_like(groups.alive)
        for at in tied[0].grouping.parts: keep[at.to(keep.device)] = next(left)
        found.append(keep)
        groups.outcome.freed = sum(part.outcome.freed for part in several)
    return found


def _parts(groups, tied, zeros):
    "Return the groups of each part that competes by itself; of most layers there is one."
    parts = tied[0].grouping.parts
    if not parts: return [groups]
    sizes, costs = _full_sizes(tied) + torch.zeros(len(groups.alive), dtype=torch.long), _costs_of(groups)
    scattered = sum(_scattered(layer, zeros) for layer in tied)
    found = []
    for number, at in enumerate(parts, 1):
        n_weights, here = int(sizes[at].sum()), at.to(groups.alive.device)
        floor = groups.floor and -(-groups.floor * n_weights // groups.n_weights)  # rounded up
        numbers = dict(n_weights=n_weights, floor=floor, scattered=int(scattered[at].sum()))
        scores = partial(_at, groups.scores, ALONE.array(here))
        found.append(replace(groups, **numbers, name=f'{groups.name} (part {number})', scores=scores,
                             alive=groups.alive[here], costs=costs[here], known_alive=None, count_free=None,
                             outcome=Outcome()))
    return found


def _scattered(layer, zeros):
    "Count the scattered zeros in each group of a layer, (groups,), as many as their multiply-adds."
    none = torch.zeros(0, dtype=torch.long)
    at = zeros[layer.name].scattered if layer.name in zeros else none
    return layer.uses * torch.bincount(layer.grouping.numbers(at).cpu(), minlength=layer.grouping.groups)


def _at(scores, places, where): return scores(places[where])


def _exchange(rules, tied, before, after, scores, gone, swap):
    """Return the new masks of layers that are pruned as one, with their lowest groups exchanged.

    Groups go that lived before the event, and come that did not. A group is exchanged for one of as many
    weights, and where the context compares parts of a layer, for one of the same part."""
    groups = _zeros_first(_as_one(tied, after, rules, scores, {}), tied, after, rules, {})
    alive = groups.alive
    lived = torch.stack([before[layer.name].alive(layer.grouping) for layer in tied]).any(0)
    may_go, may_come, n = alive & lived, ~alive & ~lived, round(swap * groups.n_alive)
    if not n or not may_go.any() or not may_come.any(): return {}
    keep = exchanged(groups, may_go, may_come, partial(gone, tied), n,
                     _places(rules.context_info, groups, tied))
    found, born = {}, keep & ~alive
    for layer in tied:
        kept, mask = layer.grouping.expand(keep), after[layer.name]
        has_zeros_in_groups = mask.costs is not None or len(tied) > 1
        if has_zeros_in_groups: kept = kept & (mask.keep | layer.grouping.expand(born))
        found[layer.name] = Mask.counted(kept, layer.grouping)
    return found


def _places(context, groups, tied):
    "Number the groups so that only those of the same number may be exchanged; None: all may."
    places, device = None, groups.alive.device
    full = _as_costs(_full_sizes(tied), device)
    parts = tied[0].grouping.parts
    if parts: places = _numbered(parts, len(groups.alive)).to(device)
    if context.places is not None: places = torch.tensor(context.places(groups.axes), device=device)
    if groups.costs is None and full is None: return places
    costs = torch.where(groups.alive, _costs_of(groups), groups.group_size if full is None else full)
    return costs if places is None else places * (groups.group_size + 1) + costs


def _numbered(parts, n):
    "Return the number of the part of each group, ints (n,)."
    found = torch.zeros(n, dtype=torch.long)
    for number, at in enumerate(parts): found[at] = number
    return found


def _groups(layer, mask, rules, scores, zeros):
    "Return the groups of a layer as the context sees them."
    grouping, found = layer.grouping, zeros.get(layer.name)
    known = mask.left // grouping.size if mask.costs is None else None
    costs = mask.costs if found is None else found.costs
    scattered = 0 if found is None else len(found.scattered)
    shape = grouping.shape if mask.place is None else mask.place.shape
    groups = LayerGroups(layer.name, mask.size, grouping.size, mask.alive(grouping),
                         LayerScores(scores, layer), costs, rules.floor_of(mask.size),
                         grouping.one_layer, shape, grouping.axes, known, layer.peers, mask.place,
                         scattered=scattered, count_free=_count_free(layer, mask, found))
    return _by_work(groups, layer.uses) if layer.uses > 1 else groups


NUMBERS = 'n_weights', 'group_size', 'costs', 'floor', 'scattered'  # of weights


def _by_work(groups, uses):
    "Return groups whose numbers of weights are those of multiply-adds, with scores for each of these."
    numbers = {name: getattr(groups, name) for name in NUMBERS}
    numbers = {name: None if number is None else number * uses for name, number in numbers.items()}
    scores = partial(_divided_by, uses, groups.scores)
    return replace(groups, **numbers, scores=scores, known_alive=groups.n_alive, count_free=None, unit=uses)


def _divided_by(unit, scores, where): return scores(where) if unit == 1 else divided(scores(where), unit)


def _count_free(layer, mask, zeros):
    "Return a function that counts zeros that no mask holds and that do not lie scattered in other groups."
    if layer.grouping.size == 1: return partial(count_zeros, layer.weight, mask)
    if zeros is None: return None
    return lambda: int((zeros.costs * zeros.empty).sum())


def _zeros_first(groups, tied, masks, rules, zeros):
    "Return the groups with those below all others that are zero although no mask holds them."
    first, criterion = tied[0], rules.criterion
    by_themselves = criterion.zeros_lowest and not rules.context_info.rescales
    if first.grouping.size == len(tied) == 1 and by_themselves: return groups
    is_zero = zero_groups(first, masks[first.name], zeros.get(first.name))
    if is_zero is None: return groups
    weight = first.weight.detach() if first.grouping.size == len(tied) == 1 else None
    scores = LowestWhere(groups.scores, is_zero, criterion.pure, weight)
    return replace(groups, scores=scores, known_alive=groups.n_alive)


def _all_competing(groups, tied, masks, zeros, gone):
    """Return the groups of layers that are pruned as one with the pruned groups among them.

    These, and others that are zero, have the scores of what is gone. Zeros that lie scattered in other groups
    are let go with them."""
    first, pruned = tied[0], ~groups.alive
    is_zero = zero_groups(first, masks[first.name], zeros.get(first.name))

    def scores(where):
        are_gone = pruned[where] if is_zero is None else pruned[where] | torch.as_tensor(is_zero(where))
        living = torch.as_tensor(groups.scores(where)).double().clamp(min=LIVING)
        return torch.where(are_gone, gone(tied, where), living)
    costs = _as_costs(_full_sizes(tied), pruned.device)
    return replace(groups, alive=torch.ones_like(pruned), scores=scores, known_alive=len(pruned), costs=costs,
                   scattered=0, count_free=None)


def _as_one(tied, masks, rules, scores, zeros):
    "Return the groups of layers whose n-th groups are pruned together."
    several = [_groups(layer, masks[layer.name], rules, scores, zeros) for layer in tied]
    first = several[0]
    if len(several) == 1: return first
    alike = all(groups.costs is None and torch.equal(groups.alive, first.alive) for groups in several)
    costs = None if alike else sum(_costs_of(groups) for groups in several)
    floor = None if first.floor is None else sum(groups.floor for groups in several)
    alive = torch.stack([groups.alive for groups in several]).any(0)
    name = ' + '.join(groups.name for groups in several)
    n_weights = sum(groups.n_weights for groups in several)
    size = sum(groups.group_size for groups in several)
    scattered = sum(groups.scattered for groups in several)
    counts = [groups.count_free for groups in several if groups.count_free]
    unit = size // sum(layer.grouping.size for layer in tied)
    of_work = partial(_divided_by, unit, partial(together, scores, tied))
    return LayerGroups(name, n_weights, size, alive, of_work, costs, floor, scattered=scattered,
                       count_free=lambda: sum(count() for count in counts), unit=unit)


def _costs_of(groups):
    return groups.group_size * groups.alive if groups.costs is None else groups.costs


def _new_mask(grouping, mask, keep, left, alone, regrow):
    "Return the mask of one layer after a decision about its groups; `left` is None where it must be counted."
    kept = grouping.expand(keep)
    costs = _as_costs(grouping.sizes, keep.device) if regrow else mask.costs
    has_zeros_in_groups = costs is not None or not alone
    if has_zeros_in_groups and not regrow: kept = _both(kept, mask.keep)
    if costs is not None: costs = costs * keep
    if left is None: left = _counted(kept, mask)
    return Mask(kept, costs, left, mask.place)


def _counted(kept, mask):
    if mask.place is None: return ALONE.count(kept)
    raise RuntimeError('masks: got no count of the weights that stay, for a part of a layer')  # a context of parts says it


def _with_zeros(grouping, mask, keep, zeros, freed):
    "Return the mask of one layer that also holds its scattered zeros, but for the last `freed` of them."
    kept = _both(grouping.expand(keep), mask.keep).contiguous()
    held, let_go = zeros.scattered.tensor_split([len(zeros.scattered) - min(freed, len(zeros.scattered))])
    kept.view(-1)[held] = False
    left = zeros.costs
    if len(let_go): left = left + torch.bincount(grouping.numbers(let_go), minlength=grouping.groups)
    left = left * keep
    return Mask(kept, _costs(grouping, left), int(left.sum()))


def _costs(grouping, left):
    "Return how many weights are left in each group; None where each group is full or empty."
    full_or_empty = (left == 0) | (left == grouping.size)
    return None if bool(full_or_empty.all()) else left


def _full_sizes(tied):
    "Return the weights, or multiply-adds, of each group of layers that are pruned as one, where it is full."
    return sum(layer.grouping.sizes * layer.uses for layer in tied)


def _as_costs(sizes, device):
    "Return the sizes of groups as costs: None where all have the same."
    return sizes.to(device) if isinstance(sizes, torch.Tensor) else None


def _both(mask, other):
    "Return `mask & other`. Bytes are multiplied: where one of the masks repeats, that is far faster."
    return (mask.view(torch.uint8) * other.view(torch.uint8)).view(torch.bool)
