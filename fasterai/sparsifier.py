"Zeroes the least important weights of any PyTorch model, and holds the masks."
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from math import ceil, prod
from numbers import Integral, Real

import numpy as np
import torch
from torch import nn

from fasterai.arguments import name_of, nearest
from fasterai.context import CONTEXTS, compete, read_context, read_sparsity, uniform_plus_shares
from fasterai.criteria import read_criterion
from fasterai.dataflow import trace, watch
from fasterai.evidence import Evidence
from fasterai.granularity import Grouping
from fasterai.layers import Named, Weight, choose, matching, means_outright
from fasterai.report import Report, measure
from fasterai.scoring import Scores
from fasterai.peers import ALONE
from fasterai.selection import Part

LOWEST = torch.finfo(torch.float32).min  # the score of what is gone, where it competes again
PIECE = 1 << 20  # weights that are zeroed together
BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


@dataclass
class Layer:
    "A selected weight."
    name: str
    at: Weight  # where it is
    grouping: Grouping
    mask: torch.Tensor  # bool, of the weight's shape, True = keep
    costs: torch.Tensor | None  # (groups,), the weights left in each; None where a living one has all of `grouping.size`
    left: int  # how many are kept
    filters: Grouping | None  # its filters, where groups make up whole ones

    @property
    def module(self): return self.at.module

    @property
    def weight(self): return self.at.tensor

    @property
    def alive(self) -> torch.Tensor:  # (groups,), bool
        "The groups that have any weight left."
        if self.costs is not None: return self.costs > 0
        rows = self.grouping.rows(self.mask)
        return rows if self.grouping.size == 1 else rows[:, 0]

    def follow(self):
        "Be where the weight is."
        device = self.weight.device
        if self.mask.device == device: return
        self.mask, self.costs = self.mask.to(device), None if self.costs is None else self.costs.to(device)

    def empty(self):
        "All of it is gone."
        self.mask, self.costs, self.left = torch.zeros_like(self.mask), None, 0

    @property
    def filters_alive(self) -> torch.Tensor:  # (output channels,), bool
        return self.alive if self.filters.groups == self.grouping.groups else self.filters.count(self.mask) > 0


class Sparsifier:
    """Makes a model sparse: scores its weights, zeroes the lowest, keeps them zero.

    The model stays what it is: the same classes, parameters, `state_dict` keys and hooks. Zeros that it comes in with are kept."""

    def __init__(self,
        model: nn.Module,  # any model; it is changed in place, and only in its zeros
        granularity: str | tuple | Callable = 'weight',  # what lives and dies together: a name, axes as `('I', 'kh')`, `block(4, 4)`, `head(8)`
        context: str | Callable = 'global',  # who competes with whom: a name, a pattern as `'2:4'`, or a function
        criteria: str | Callable = 'magnitude',  # how much a weight matters: a name, or a function of `weight` and `grad`
        layers=None,  # a type, name, glob, module, parameter, or a list of these; None: all but embeddings
        example=None,  # a batch as the model takes it (a tuple for several inputs), or a function that gives one when needed
        min_keep: int | float | None = None,  # of each layer at least so many weights stay, or such a share, as `.05`; None: one group
        coupled: bool = False,  # at filter granularity: filters whose outputs are added (residual networks) go together, so that they can be removed
    ):
        if not isinstance(model, nn.Module): raise TypeError(f'model: got {type(model).__name__}, allowed is a torch.nn.Module')
        self.model, self.example = model, example
        self.context, self.min_keep = read_context(context), read_min_keep(min_keep, context)
        self.criterion = read_criterion(criteria)
        self.evidence = Evidence(self.criterion.evidence, self)
        self._choice = choose(model, layers)
        self.candidates = {n: _layer(n, w, granularity) for n, w in self._choice.chosen.items()}
        self._check_context(granularity)
        self.coupled, self._ties = coupled, []  # lists of names that live and die together
        if coupled: check_coupled(granularity, self.context)
        self._hooks, self._thin, self._flow = [], set(), None
        self._silenced = {}  # module: {tensor's name: bool (channels,), zero with the dead filters}
        self._followed = not any(layer.grouping.whole_filters for layer in self.candidates.values())
        if not callable(example) or isinstance(example, torch.Tensor): self._follow()

    def _check_context(self, granularity):
        if granularity == 'layer' and self.context in (CONTEXTS['lamp'], CONTEXTS['normalized']):
            raise ValueError("granularity: got 'layer', allowed with this context are those with several groups a layer: it compares within layers")
        if not hasattr(self.context, 'sparsity'): return
        if any(layer.grouping.size > 1 for layer in self.candidates.values()):
            raise ValueError(f"granularity: got {granularity!r}, allowed with context={self.context!r} is 'weight': "
                             'a pattern is one of single weights')
        for name, layer in self.candidates.items():
            if 'I' not in layer.grouping.axes:
                raise ValueError(f'context: got {self.context!r}, and {name!r} has no input axis I along which it could run; leave it out by layers=')

    # Which layers take part, and what hangs on them

    @property
    def layers(self) -> dict:  # name: `Layer`
        "The selected layers."
        self._follow()
        return self.candidates

    @property
    def skipped(self) -> dict:  # name: reason
        "The layers that were left out."
        self._follow()
        return self._choice.skipped

    def _follow(self):
        "Find the data flow, and leave alone what makes the network's output, where whole filters go."
        if self._followed: return
        example = self.example() if callable(self.example) and not isinstance(self.example, torch.Tensor) else self.example
        flow = _flow(self.model, example)
        left = {}
        for name, layer in self.candidates.items() if flow else ():
            if not layer.grouping.whole_filters or name in self._choice.outright: continue
            if id(layer.weight) in flow.makers: left[name] = "makes the network's output, and whole filters go: name it in layers= to include it"
            elif id(layer.weight) not in flow.ran: left[name] = 'did not run, so what reads its filters is unknown: name it in layers= to include it'
        if len(left) == len(self.candidates):
            raise ValueError(f'layers: no layer selected: {"; ".join(f"{n!r} {why}" for n, why in left.items())}')
        self._choice.skipped.update(left)
        for name in left: del self.candidates[name]
        self._flow, self._followed, self.example = flow, True, None
        if self.coupled: self._couple()
        self._silenced = self._silence()

    def _couple(self):
        "Find what a sum ties together; where a part of it is not selected the others are left alone."
        if self._flow is None:
            raise ValueError(f'coupled: how {type(self.model).__name__} runs cannot be told from its code: pass example=one batch of inputs')
        names = {id(layer.weight): n for n, layer in self.candidates.items()}
        for ids in self._flow.tied():
            known = [n for i, n in names.items() if i in ids]
            if len(known) == len(ids): self._ties.append(known)
            for name in known if len(known) < len(ids) else ():
                self._choice.skipped[name] = 'is added to what is not selected, so with coupled=True it stays'
                del self.candidates[name]
        if not self.candidates: raise ValueError('layers: no layer selected: all are added to what is not')

    # Sparsifying

    def sparsify_model(self,
        sparsity,  # percent of the selected weights that shall be zero; or {name, glob, type or module: percent}, then layer by layer
        share: float = 1.,  # how much of it is due, 0 to 1, as a schedule says
        regrow: bool = False,  # may the sparsity fall? What comes back starts from zero
    ):
        "Zero the least important weights until the sparsity is reached. Zeros that are there count and, without `regrow`, stay."
        if isinstance(share, bool) or not 0 <= share <= 1: raise ValueError(f'share: got {share!r}, allowed is 0 to 1')
        layers, due, fractions = self.layers, Fraction(float(share)), self.fractions(sparsity)
        if isinstance(sparsity, Mapping): jobs = self._apart(fractions, due)
        else: jobs = [(list(layers.values()), next(iter(fractions.values())) * due)]
        self._event(jobs, regrow)

    def sparsify_layer(self,
        layer,  # a selected layer: its name, module or parameter; all weights within it, each for itself
        sparsity: float,  # percent of its weights that shall be zero
    ):
        "The same for one layer alone."
        if isinstance(layer, str) and layer not in Named(self.model).modules and layer not in self.layers:
            raise ValueError(f'layer: got {layer!r}, allowed is one of {", ".join(self.layers)}{nearest(layer, self.layers)}')
        self._event(self._apart(self.fractions({layer: sparsity}, 'layer'), 1), regrow=False)

    def _apart(self, fractions, due):
        "Each layer for itself, or what is tied to it too."
        done, jobs = set(), []
        for name, fraction in fractions.items():
            tied = next((names for names in self._ties if name in names), [name])
            if any(fractions.get(n) != fraction for n in tied):
                raise ValueError(f'sparsity: got one for {name!r} alone, allowed with coupled=True is the same for all of '
                                 f'{", ".join(map(repr, tied))}')
            if name not in done: jobs.append(([self.layers[n] for n in tied], fraction * due))
            done.update(tied)
        return jobs

    def fractions(self,
        sparsity,  # percent, or {name, glob, type, module or parameter: percent}
        argument: str = 'sparsity',  # how errors call the keys
    ) -> dict:  # name of a selected layer: share of zeros, 0 to 1
        "What a sparsity means for each layer. What means a layer outright goes before what means several; of those the first counts."
        if not isinstance(sparsity, Mapping):
            fraction = read_sparsity(sparsity, self.context)
            if self.context is CONTEXTS['uniform_plus']:
                groupings = [layer.grouping for layer in self.candidates.values()]
                uniform_plus_shares([prod(g.shape) for g in groupings], [g.axes for g in groupings], fraction)
            return dict.fromkeys(self.candidates, fraction)
        if not sparsity: raise ValueError('sparsity: got an empty dict, allowed is at least one entry')
        named, outright, several = Named(self.model), {}, {}
        for choice, value in sparsity.items():
            fraction = read_sparsity(value, self.context, f'sparsity[{choice!r}]' if isinstance(choice, str) else 'sparsity')
            names = matching(choice, named, named.weights, argument)
            if not any(n in self.candidates for n in names):
                raise ValueError(f'{argument}: got {choice!r}, which means only {names[0]!r}, and that '
                                 f'{self._choice.skipped.get(names[0], "not chosen").replace("not chosen", "is not chosen by layers=")}')
            for name in names:
                kind = outright if means_outright(choice, name, named.every[name]) else several
                kind.setdefault(name, fraction)
        found = several | outright
        return {n: found[n] for n in self.candidates if n in found}

    def _event(self, jobs, regrow):
        layers = [layer for job, _ in jobs for layer in job]
        self.evidence.check(layers)
        for layer in layers: layer.follow()
        ask, changes = Scores(self.criterion, self.evidence, [layer for job, fraction in jobs if fraction for layer in job]), {}
        for job, fraction in jobs:
            units = self._units(job)
            parts = [_together([self._part(layer, ask, regrow) for layer in unit]) for unit in units]
            for unit, part, keep in zip(units, parts, self._keeps(parts, fraction)):
                for layer in unit:
                    mask, costs = layer.grouping.expand(keep), _whole(layer) if regrow else layer.costs
                    if not regrow and (len(unit) > 1 or costs is not None): mask = _both(mask, layer.mask)
                    left = part.kept if len(unit) == 1 else None
                    changes[layer.name] = mask, costs if costs is None else costs * keep, ALONE.count(mask) if left is None else left
        self._set(changes)
        thin = [layer.name for job, fraction in jobs for layer in job if 100 * layer.left < layer.mask.numel() and fraction < Fraction(99, 100)]
        if thin := [n for n in thin if n not in self._thin]:
            self._thin.update(thin)
            warnings.warn(f'sparsity: {", ".join(map(repr, thin))} {"have" if len(thin) > 1 else "has"} less than 1 % of the weights left, so '
                          "little passes: see report(); min_keep= sets a floor, context='local' or 'erk' shares the zeros out", stacklevel=3)

    def _units(self, job):
        "What lives and dies together: layers, or several that are tied."
        units = {}
        for layer in job:
            tie = next((i for i, names in enumerate(self._ties) if layer.name in names), layer.name)
            units.setdefault(tie, []).append(layer)
        return list(units.values())

    def _keeps(self, parts, fraction):
        "What the context decides; one of the user's own is not trusted."
        own = getattr(self.context, '__module__', None) == compete.__module__
        if own: return self.context(parts, fraction)
        keeps = self.context([replace(p, alive=p.alive.clone()) for p in parts], fraction)
        if [getattr(k, 'shape', None) for k in keeps] != [p.alive.shape for p in parts] or any(k.dtype != torch.bool for k in keeps):
            raise ValueError(f'context: {name_of(self.context)} gave {[tuple(getattr(k, "shape", ())) for k in keeps]}, '
                             f'allowed is a bool keep mask for each layer: {[tuple(p.alive.shape) for p in parts]}')
        return [keep & part.alive for keep, part in zip(keeps, parts)]

    def _part(self, layer, ask, regrow):
        "What the context sees of a layer."
        grouping, scores, weights = layer.grouping, partial(ask, layer), layer.mask.numel()
        alive, costs = layer.alive, layer.costs
        if regrow:  # what is gone competes again, and is the first to go
            gone, alive, costs = ~alive, torch.ones_like(alive), _whole(layer)
            def scores(where): return torch.as_tensor(ask(layer, where)).masked_fill(gone[where], LOWEST)
        floor = ceil(self.min_keep * weights) if isinstance(self.min_keep, Fraction) else self.min_keep
        known = grouping.groups if regrow else layer.left // grouping.size if costs is None else None
        return Part(layer.name, weights, grouping.size, alive, scores, costs, floor and min(floor, weights), grouping.whole_layer,
                    grouping.shape, grouping.axes, known)

    # Keeping

    def apply_masks(self):
        "Zero again what an optimiser has moved."
        for tensor, keep in self._held(): _zero(tensor, keep)

    def quiet_gradients(self):
        "Zero the gradients of dead weights, so that neither a clipping norm nor an optimiser's memory knows of them."
        for tensor, keep in self._held():
            if tensor.grad is None: continue
            if tensor.grad.is_sparse: tensor.grad = _zero_sparse(tensor.grad, keep)
            else: _zero(tensor.grad, keep)

    def quiet_state(self,
        state: Mapping,  # parameter: {name: tensor or anything}, as the `state` of an optimiser
    ):
        "Zero what an optimiser remembers of dead weights: momentum, second moments, all that has the weight's shape."
        for tensor, keep in self._held():
            for memory in state[tensor].values() if tensor in state else ():
                if isinstance(memory, torch.Tensor) and memory.shape == tensor.shape: _zero(memory, keep.to(memory.device))

    def attach(self,
        optimizer: torch.optim.Optimizer,  # what steps the model in your own loop
    ):
        "Keep the zeros after every step of an optimiser, until `detach`."
        if isinstance(optimizer, type) or not hasattr(optimizer, 'register_step_post_hook'):
            came = optimizer if isinstance(optimizer, type) else type(optimizer)
            raise TypeError(f'optimizer: got {came}, allowed is a torch.optim.Optimizer; with another kind call apply_masks() after each step')
        if not {id(layer.weight) for layer in self.layers.values()} & {id(p) for group in optimizer.param_groups for p in group['params']}:
            raise ValueError('optimizer: got one that steps none of the selected weights, allowed is one that was made with parameters of this model')
        def before(*_): self.quiet_gradients()
        def after(*_):
            self.apply_masks()
            self.quiet_state(optimizer.state)
        self._hooks += [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]

    def detach(self):
        "Let go of all optimisers; the next step may move the zeros."
        for hook in self._hooks: hook.remove()
        self._hooks = []

    def _held(self):
        "Every tensor that has entries held at zero, and which stay: (tensor, bool)."
        for layer in self.layers.values():
            layer.follow()
            yield layer.weight, layer.mask
        for module, tensors in self._silenced.items():
            for name, quiet in tensors.items():
                tensor = getattr(module, name)
                if quiet.device != tensor.device: quiet = tensors[name] = quiet.to(tensor.device)
                yield tensor, ~quiet

    def _set(self, changes):
        for name, (mask, costs, left) in changes.items():
            layer = self.layers[name]
            layer.mask, layer.costs, layer.left = mask, costs, left
        before, self._silenced = self._silenced, self._silence()
        with torch.no_grad():  # what comes back must be able to learn: a scale of zero, or a ReLU at zero, would pass no gradient
            for module, tensors in before.items():
                for name, was in tensors.items():
                    if name == 'running_mean': continue
                    quiet, tensor = self._silenced.get(module, {}).get(name, torch.zeros_like(was)), getattr(module, name)
                    tensor.masked_fill_((was & ~quiet.to(was.device)).to(tensor.device), 1. if name == 'weight' else .01)
        self.apply_masks()

    def _silence(self):
        "What is zero with the dead filters: {module: {tensor's name: bool (channels,)}}."
        whole = [layer for layer in self.candidates.values() if layer.grouping.whole_filters]
        if not whole: return {}
        alive = ALONE.fetched([layer.filters_alive for layer in whole])
        dead = {id(layer.weight): ~torch.from_numpy(filters) for layer, filters in zip(whole, alive)}
        found, biases = {}, set()
        for module in self.model.modules():
            for attr, weight in module._parameters.items():
                name = attr.replace('weight', 'bias') if 'weight' in attr else 'bias'
                bias = module._parameters.get(name) if id(weight) in dead else None
                if bias is None or bias.shape != dead[id(weight)].shape: continue
                found.setdefault(module, {})[name] = dead[id(weight)]
                biases.add(id(bias))
        norms = self._flow.silenced(dead, biases) if self._flow else {}
        for norm, quiet in norms.items():
            found[norm] = {n: quiet for n in ('running_mean', 'weight', 'bias') if getattr(norm, n) is not None}
        return found

    def __getstate__(self): return self.__dict__ | {'_hooks': []}  # an optimiser that is attached does not go along

    # Looking, saving

    @property
    def sparsity(self) -> float:
        "Percent of the selected weights that are zero, counted now."
        zeros = sum(int((layer.weight.detach() == 0).sum()) for layer in self.layers.values())
        return 100 * zeros / sum(layer.weight.numel() for layer in self.layers.values())

    def report(self) -> Report:
        "What is zero, layer by layer, counted now."
        return measure(self.model, [(n, layer.at, layer.grouping) for n, layer in self.layers.items()], self.skipped)

    def state_dict(self) -> dict:  # layer's name: {'shape': its weight's, 'bits': the keep mask, uint8 (weights / 8 rounded up,)}
        "The masks, packed to bits."
        return {n: {'shape': tuple(layer.mask.shape), 'bits': torch.from_numpy(np.packbits(layer.mask.cpu().numpy()))}
                for n, layer in self.layers.items()}

    def load_state_dict(self,
        state: dict,  # of `state_dict`
    ):
        "Take the masks over and apply them; `ValueError`, and nothing changed, where they do not fit."
        if not isinstance(state, Mapping): raise TypeError(f'state: got {type(state).__name__}, allowed is what state_dict() gives')
        if set(state) != set(self.layers):
            raise ValueError(f'state: got masks for {", ".join(map(str, state)) or "nothing"}, allowed are those for {", ".join(self.layers)}')
        changes = {}
        for name, layer in self.layers.items():
            try: shape, bits = tuple(state[name]['shape']), state[name]['bits']
            except (KeyError, TypeError):
                raise ValueError(f"state: got {state[name]!r} for {name!r}, allowed is a dict with 'shape' and 'bits'") from None
            if not isinstance(bits, torch.Tensor) or bits.dtype != torch.uint8:
                raise ValueError(f'state: got {type(bits).__name__} as bits for {name!r}, allowed is a tensor of uint8')
            if shape != tuple(layer.mask.shape) or len(bits) != -(-layer.mask.numel() // 8):
                raise ValueError(f'state: got a mask of shape {shape} for {name!r}, allowed is {tuple(layer.mask.shape)}')
            mask = np.unpackbits(bits.cpu().numpy(), count=layer.mask.numel()).astype(bool)
            mask = torch.from_numpy(mask).view(layer.mask.shape).to(layer.weight.device)
            changes[name] = mask, _costs(layer.grouping, mask), ALONE.count(mask)
        self._set(changes)


def check_coupled(granularity, context):
    "`ValueError` where filters cannot be coupled."
    if granularity != 'filter': raise ValueError(f"coupled: got True with granularity={granularity!r}, allowed is 'filter'")
    if context in (CONTEXTS['erk'], CONTEXTS['uniform_plus']):
        name = next(n for n, c in CONTEXTS.items() if c is context)
        raise ValueError(f'coupled: got True with context={name!r}, which goes by the shape of single layers; '
                         'allowed is local, global, lamp, normalized, or a function')


def _together(parts):
    "Several layers whose n-th groups live and die together, as one."
    if len(parts) == 1: return parts[0]
    size = sum(p.size for p in parts)
    def scores(where): return sum(torch.as_tensor(p.scores(where)) * (p.size / size) for p in parts)
    alike = all(p.costs is None and torch.equal(p.alive, parts[0].alive) for p in parts)
    costs = None if alike else sum(p.size * p.alive if p.costs is None else p.costs for p in parts)
    floor = None if parts[0].floor is None else sum(p.floor for p in parts)
    return Part(' + '.join(p.name for p in parts), sum(p.weights for p in parts), size, torch.stack([p.alive for p in parts]).any(0),
                scores, costs, floor)


def read_min_keep(
    min_keep,  # a whole number of weights, a share between 0 and 1, or None
    context,  # as the user gave it
) -> int | Fraction | None:  # weights, or a share
    "The floor that is meant."
    if min_keep is None: return None
    number = isinstance(min_keep, Real) and not isinstance(min_keep, bool)
    if not number or not (isinstance(min_keep, Integral) and min_keep >= 0 or 0 < min_keep < 1):
        raise ValueError(f'min_keep: got {min_keep!r}, allowed is a whole number of weights, or a share between 0 and 1, as .05')
    if hasattr(read_context(context), 'sparsity'):
        raise ValueError(f'min_keep: got {min_keep!r}, allowed with context={context!r} is None: the pattern says what stays')
    return int(min_keep) if isinstance(min_keep, Integral) else Fraction(str(float(min_keep)))


def _layer(name, at, granularity):
    grouping, mask = Grouping(at.module, granularity, name, at.attr), _living(at.tensor)
    filters = Grouping(at.module, 'filter', name, at.attr) if grouping.whole_filters else None
    return Layer(name, at, grouping, mask, _costs(grouping, mask), ALONE.count(mask), filters)


def _costs(grouping, mask):
    "What is left of each group, where they are not all whole or gone."
    if grouping.size == 1: return None
    left = grouping.count(mask)
    return None if bool(((left == 0) | (left == grouping.size)).all()) else left


def _whole(layer):
    "The costs of a layer's groups with all their weights."
    sizes = layer.grouping.sizes
    return sizes.to(layer.mask.device) if isinstance(sizes, torch.Tensor) else None


def _living(weight):
    "The zeros are the mask; but a tensor that is all zero is an initialisation."
    mask = (weight.detach() != 0).contiguous()
    return mask if mask.any() else torch.ones_like(mask)


def _flow(model, example):
    "The data flow as far as it can be found."
    if example is not None:
        example = tuple(example) if isinstance(example, (tuple, list)) else (example,)
        try: return watch(model, example)
        except Exception as error:
            shapes = [tuple(e.shape) if isinstance(e, torch.Tensor) else type(e).__name__ for e in example]
            raise ValueError(f'example: got {shapes}, on which the model fails: {type(error).__name__}: {error}') from error
    try: return trace(model)
    except Exception as error:
        warnings.warn(f'example: how {type(model).__name__} runs cannot be told from its code ({type(error).__name__}: {error}), so its '
                      'output layer is not left alone and the BatchNorm of a dead filter stays: pass Sparsifier(…, example=one batch of inputs)')


def _both(mask, other):
    "What both keep. Bytes are multiplied: where one of the masks repeats, that is far faster than `&`."
    return (mask.view(torch.uint8) * other.view(torch.uint8)).view(torch.bool)


def _zero(tensor, keep):
    "Zero all but `keep`. Integers of the same bits are multiplied: faster than a fill, and a NaN becomes zero too."
    tensor = tensor.detach()
    keep = keep[tuple(slice(None) if step else slice(1) for step in keep.stride())]  # what only repeats is written once
    bits = BITS.get(tensor.dtype)
    if not bits or not tensor.ndim: return tensor.masked_fill_(~keep, 0)
    tensor, pieces = tensor.view(bits), -(-tensor.numel() // PIECE)  # torch widens the mask of a piece for the product
    if pieces <= 1: tensor.mul_(keep)
    else:
        rows = -(-len(tensor) // pieces)
        for start in range(0, len(tensor), rows): tensor[start:start + rows].mul_(keep[start:start + rows] if len(keep) > 1 else keep)


def _zero_sparse(grad, keep):
    "The same of a gradient of an embedding that has only the rows that were looked up."
    grad = grad.coalesce()
    grad.values().masked_fill_(~keep[grad.indices().unbind()], 0)
    return grad
