"Make a network smaller: remove the filters that put out exactly zero, with all that depends on them."
import re
import sys
import time
from copy import deepcopy

import numpy as np
import torch
from torch import nn

from fasterai.connected import lowest_connected
from fasterai.deploy.bisect import bisect
from fasterai.deploy.compare import agree, check_copyable, check_module, example_inputs, fresh, outputs
from fasterai.deploy.cutting import WAYS, apply, cut_of
from fasterai.deploy.labels import solve
from fasterai.deploy.tracing import forget, trace
from fasterai.deploy.why import FAILS, NOT_ALONE, NOT_RUN, NOT_TRIED, TRAINING_UNKNOWN, listed, summary
from fasterai.snapshot import undisturbed

SECONDS = 20  # of the processor, that are spent on finding which removals fail


def shrink(
    model: nn.Module,  # any dense network with zeros in it; it is not changed
    example,  # a batch as the model takes it: a tuple for several inputs, a dict for keywords
    verbose: bool = True,  # print how many filters were removed, and why others could not be
    data=None,  # to repair with, as `refit` takes it: a DataLoader, an iterable of batches or a tensor; labels are not used
    dense: nn.Module | None = None,  # with `data`: the network before it was pruned, which the repair comes near to
) -> nn.Module:  # a smaller copy, an ordinary model
    """Remove the filters whose outputs are zero for any input, with all weights that go with them.

    The model is run once, and each operation says which positions go together and what it makes of zeros:
    a factor that is zero makes a product zero, so a gate goes with what it gates, and queries and keys with
    the values of a head of attention. The copy computes the same outputs, which is tried: what would change
    them stays, with its reason. With `data` and `dense` the copy is repaired by `refit` before it is cut: its
    outputs are then nearer to those of `dense` than those of the model. `ValueError` where the model does not
    run, or cannot be followed, or where `dense` is not the network that was pruned."""
    check_copyable(model)
    inputs, base = example_inputs(example, model), deepcopy(model)
    repaired = _repair(base, dense, data)
    check = _Check(base, inputs)
    try: found = trace(base, inputs)
    except Exception as error:
        raise ValueError(f'model: {type(model).__name__} cannot be followed: '
                         f'{type(error).__name__}: {error}') from error
    check.training = found.training
    small, solved = _remove(base, found, check, _Progress() if verbose else _silent)
    if verbose:
        removed, staying = _account(base, found, solved)
        print(summary(parameters(model), parameters(small), removed, staying))
        if repaired:
            print(f'  error of the outputs: {repaired.before:.3g} before the repair, '
                  f'{repaired.after:.3g} after')
        idle = [n for n in found.owned if n not in found.ran]
        if removed and idle and found.training is None: print(f'  {TRAINING_UNKNOWN}: {listed(idle)}')
    return small


def _repair(base, dense, data):
    "Repair a network where data are given; return how near it came, or None."
    if data is None and dense is None: return None
    if data is None: raise ValueError('data: got None, expected batches to repair with, as dense is given')
    if dense is None:
        raise ValueError('dense: got None, expected the network before it was pruned, as data are given: '
                         'the model has zeros where its filters were')
    check_module(dense, 'dense')
    wanted, found = (_shapes(net) for net in (base, dense))
    if wanted != found:
        other = next(name for name in [*wanted, *found] if wanted.get(name) != found.get(name))
        raise ValueError(f'dense: {other!r} has shape {found.get(other)}, expected {wanted.get(other)} '
                         'as in the model: give the network before it was pruned')
    from fasterai.repair import refit  # here: nothing else in `deploy` needs the training side
    return refit(base, dense, data)


def _shapes(model): return {name: tuple(p.shape) for name, p in model.named_parameters()}


def parameters(
    model: nn.Module,
) -> int:
    "Count the parameters of a model."
    return sum(p.numel() for p in model.parameters())


def _remove(base, found, check, note):
    "Return the network without what can go, and what that is."
    solved = solve(found.labels)
    sets, kinds = _sets(found, solved, base)
    best = {}

    def fails(some):
        keep = [(s, NOT_TRIED) for s in sets if not any(s is t for t in some)]
        tried = solve(found.labels, keep)
        cut = cut_of(base, found, tried)
        reasons = []
        for way in WAYS if cut.numbers else WAYS[:1]:
            small = apply(base, cut, way)
            reasons.append(check.reason(small, cut, way))
            if reasons[-1]: continue
            best['small'] = small
            return ''
        return reasons[0]

    if not sets: return deepcopy(base), solved
    good, bad = bisect(sets, fails, kinds, SECONDS, note)
    solved = solve(found.labels, [(sets[n], reason) for n, reason in bad.items()])
    return best.get('small') or deepcopy(base), solved


def _sets(found, solved, base):
    "Return what is gone in parts that do not depend on each other: (labels of each, what each is like)."
    sizes = {n: t.shape for n, t in [*base.named_parameters(), *base.named_buffers()]}
    a, b, touched = [], [], {}
    for left, right in found.labels.bound:
        for i in range(left.shape[1]):
            for j in range(right.shape[1]):
                a.append(left[:, i])
                b.append(right[:, j])
    for name, firsts in found.owned.items():
        for axis, first in enumerate(firsts):
            here = first + np.flatnonzero(solved.gone[first:first + sizes[name][axis]])
            if not len(here): continue
            touched.setdefault(int(here[0]), []).append(f'{name}:{axis}')
            a.append(here[1:])
            b.append(np.full(len(here) - 1, here[0]))
    if not touched: return [], []
    first, second = np.concatenate(a), np.concatenate(b)
    both = solved.gone[first] & solved.gone[second]
    root = lowest_connected(found.labels.size, first[both], second[both])
    kinds = {}
    for label, names in touched.items(): kinds.setdefault(int(root[label]), []).extend(names)
    sets = [np.flatnonzero((root == r) & solved.gone) for r in kinds]
    return sets, [tuple(sorted({re.sub(r'\d+', '#', name) for name in names})) for names in kinds.values()]


def _silent(settled, of): pass


class _Progress:
    "Show on a terminal how many removals are settled, where it takes longer than two seconds."

    def __init__(self): self.start = time.monotonic()

    def __call__(self, settled, of):
        if time.monotonic() < self.start + 2 or not sys.stdout.isatty(): return
        print(f'shrink: {settled} of {of} parts are settled', end='\r', flush=True)


class _Check:
    "Compare networks with the one that they are made from."

    def __init__(self, base, inputs):
        self.base = base
        self.expected = [(inputs, outputs(base, inputs))]
        for batch in fresh(inputs):
            try: self.expected.append((batch, outputs(base, batch)))
            except ValueError: pass
        self.training = None  # a batch on which it runs in training mode
        named = base.named_parameters()
        self.initial = [name for name, p in named if not p.any() and not name.endswith('bias')]

    def reason(self, small, cut, way):
        "Return why a network is wrong, '' where it is right."
        for batch, expected in self.expected:
            try: found = outputs(small, batch)
            except ValueError as failure: return f'{FAILS}: {_said(failure.__cause__)}'
            if not agree(found, expected): return NOT_ALONE
        if self.training is not None:
            try: _train(small, self.training)
            except Exception as error: return f'{FAILS} in training mode: {_said(error)}'
        return self._perturbed(cut, way)

    def _perturbed(self, cut, way):
        "Compare with what hides differences, as a head that is zero before training, made random in both."
        names = [name for name in self.initial if 0 not in cut.kept.get(name, {})]
        if not names: return ''
        changed, generator = deepcopy(self.base), torch.Generator().manual_seed(0)
        forget(changed, cut.caches)
        for name, p in changed.named_parameters():
            if name in names: p.data = torch.randn(p.shape, generator=generator).to(p)
        small = apply(changed, cut, way)
        same = all(agree(outputs(small, batch), outputs(changed, batch)) for batch, _ in self.expected)
        return '' if same else NOT_ALONE


def _train(model, inputs):
    "Run a model in training mode, and leave it as it was."
    with undisturbed(model), torch.no_grad():
        model.train()
        inputs.call(model)


def _said(error):
    "Return an error as its type and its first line."
    first = next(iter(str(error).splitlines()), '')
    return f'{type(error).__name__}: {first[:120]}'


def _account(base, found, solved):
    "Return how many filters of each layer are gone, and the reasons for those that are zero and stay."
    tensors, removed, staying = dict(base.named_parameters()), {}, {}
    for name, tensor in tensors.items():
        if tensor.ndim < 2: continue
        for axis, first in enumerate(found.owned[name]):
            last = first + tensor.shape[axis]
            is_made = any(first <= label < last for label in found.makers)
            if not is_made and (name in found.ran or axis): continue
            zero = _zero_along(tensor, axis)
            gone = solved.gone[first:last]
            layer = name.removesuffix('.weight')
            if gone.any(): removed[layer] = removed.get(layer, 0) + int(gone.sum())
            left = np.flatnonzero(zero & ~gone)
            for i in left: staying.setdefault(layer, []).append(solved.reasons[solved.why[first + i]])
            if name not in found.ran and len(left): staying[layer] = [NOT_RUN] * len(left)
    return removed, staying


def _zero_along(tensor, axis):
    return ~(tensor.detach() != 0).movedim(axis, 0).flatten(1).any(1).cpu().numpy()
