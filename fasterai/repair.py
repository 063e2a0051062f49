"""Repair a pruned network by data, without labels or training: what do the weights that stay make up for?

`refit` solves the weights of each layer anew, `recalibrate` adapts the statistics of BatchNorm. Each is kept
only where the outputs come nearer to those of the dense network, on data that it was not fitted to."""
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fasterai.arguments import one_of
from fasterai.data import held_out, joined, read_data, real_positions
from fasterai.inputs import Read, Stop, Watching, only_real
from fasterai.kinds import widened
from fasterai.layers import LOOKUPS
from fasterai.least_squares import solve_kept
from fasterai.names import bare, named_modules
from fasterai.operations import argument
from fasterai.progress import progress
from fasterai.snapshot import Snapshot, undisturbed

HELD = 2 ** 27  # bytes of inputs of the dense network that are held at once: fewer take more passes
NEARER = .95  # a repair is kept where it leaves at most so much of the error: less may be chance


class Repaired(NamedTuple):
    "Say how far the outputs are from those of the dense network, before and after a repair."
    before: float  # squared error over the variance of the dense outputs, on data that was not fitted to
    after: float
    kept: bool  # False: it would have done harm, and all is as it was
    form: str | None = None  # of its forms the one that was kept: 'refit'; of `recalibrate` 'difference' or 'full'


def refit(
    model: nn.Module,  # pruned, by whomever: its zeros are the mask, and stay
    dense: nn.Module,  # the network before, of the same names
    data,  # a DataLoader, fastai's DataLoaders, an iterable of batches, or a tensor; labels are not used
) -> Repaired:
    """Solve the weights that stay anew, layer by layer, so that the outputs are those of the dense network.

    The weights of an output solve min ‖X w − X' w'‖² + λ‖w − w₀‖², with X the layer's inputs in the pruned
    network, X' and w' those of the dense one, and w₀ the weights as they are: layer-wise reconstruction (as
    in Frantar & Alistarh 2022), for a mask that is given. Linear layers, convolutions and the projections of
    attention are solved that have zeros or read channels of zeros. A weight that is zero stays zero. Padded
    tokens do not count. A warning names the layers for which there are fewer rows of data than inputs."""
    return _kept_if_nearer(model, dense, data, {'refit': _refit})


def recalibrate(
    model: nn.Module,  # pruned, by whomever
    dense: nn.Module,  # the network before, of the same names
    data,  # as in `refit`
) -> Repaired:
    """Adapt the statistics of BatchNorm to the pruned network, in the one of two forms that is nearer.

    `difference` moves them by as much as pruning has moved those of the data: what reaches a BatchNorm is
    normalized, on the data, as it was in the dense network. σ² becomes r·σ² and μ becomes m − √r·(m' − μ),
    with m and m' the means in the pruned and in the dense network, and r the quotient of the variances.
    `full` takes those of the data, as for a network that is new. Either goes layer by layer, so that a later
    layer sees earlier ones adapted, and where pruning has changed nothing nothing moves, to the bit."""
    return _kept_if_nearer(model, dense, data, {'difference': _recalibrate, 'full': _reestimate})


# To add a repair, write a function of model, dense and data, and a row.
REPAIRS = {'refit': refit, 'batchnorm': recalibrate}


def read_repairs(
    repair,  # None, a name in `REPAIRS`, a function of model, dense and data, or a list of these
) -> list:  # of functions
    "Read the repairs that a user has named, in their order."
    if repair is None: return []
    several = repair if isinstance(repair, (tuple, list)) else [repair]
    return [one_of('repair', one, REPAIRS, 'or a function of model, dense and data') for one in several]


# The common part

def _kept_if_nearer(
    model, dense, data,
    forms: dict,  # by name, functions of model, dense and batches: the first is kept unless another is clearly nearer
):
    "Change a model, and undo it where the outputs do not come nearer to those of the dense network."
    model, dense = bare(model), bare(dense)
    snapshot = Snapshot(model)
    statistics = [s for norm in _norms(model).values() for s in (norm.running_mean, norm.running_var)]
    with undisturbed(model, dense, but=frozenset(map(id, statistics))), torch.no_grad():
        solve, judge = held_out(read_data(data, model))
        before = divergence(model, dense, judge)
        try:
            least, form = _nearest(model, dense, solve, judge, forms, before, snapshot)
        except BaseException:
            snapshot.restore()
            raise
    return Repaired(before, least, form is not None, form)


def _nearest(model, dense, solve, judge, forms, before, snapshot):
    "Leave a model in its nearest form; return how far that is, and its name, or None where none is kept."
    least, form, best = before, None, snapshot
    for name, change in forms.items():
        if not before: break  # nothing can come nearer
        snapshot.restore()
        change(model, dense, solve)
        after = divergence(model, dense, judge)
        if not after < NEARER * least: continue
        is_last = name == list(forms)[-1]
        least, form = after, name
        best = None if is_last else Snapshot(model)  # None: it is in place
    if best is not None: best.restore()
    return least, form


def divergence(
    model: nn.Module,
    dense: nn.Module,
    batches: list,  # of `Inputs`
) -> float:
    "Return the squared error of the outputs over the variance of the dense ones; padded tokens do not count."
    return divergence_from(((batch, real_outputs(dense, batch)) for batch in batches), model)


@torch.no_grad()
def divergence_from(
    wanted,  # an iterable of (`Inputs`, what `real_outputs` returns of them)
    model: nn.Module,
) -> float:
    "Return the squared error of a model's outputs over the variance of those that are wanted."
    error, spread = 0., 0.
    for batch, outputs in wanted:
        for out, right in zip(real_outputs(model, batch), outputs):
            error += float((out - right).double().square().sum())
            spread += float((right - right.mean(0, keepdim=True)).double().square().sum())
    return error / spread if spread else error


@torch.no_grad()
def real_outputs(
    model: nn.Module,
    batch,  # `Inputs`
) -> list:  # of float tensors
    "Return what a model makes of a batch, by position, without padded tokens."
    real, leaves = real_positions(batch, model), tree_leaves(batch.call(model))
    found = [leaf.float() for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    return [only_real(_by_position(output), real) for output in found]


def _by_position(output): return output.flatten(2) if output.ndim > 2 else output[..., None]


# Least squares

class _Layer(NamedTuple):
    "Name a layer that can be solved: a weight, or the rows of it that meet one input."
    name: str
    weight: nn.Parameter
    part: tuple | None  # as in `Read`
    uses: int  # number of calls in a forward pass


def _refit(model, dense, batches):
    twins = dict(dense.named_parameters(remove_duplicate=False))
    found = _in_order(model, batches[0])
    solvable = [[layer for layer in group if _can_be_solved(layer, twins)] for group in found]
    groups = [group for group in solvable if group]
    firsts = [group[0]._replace(weight=twins[group[0].name]) for group in groups]  # in the dense network
    few = {}  # name of a layer: number of rows, number of inputs
    for group, dense_reads in zip(progress(groups), _dense_reads(dense, firsts, batches)):
        grams = _Grams()
        for batch, wanted in zip(batches, dense_reads):
            reads, = _reads(model, group[:1], batch)
            grams.add(reads, wanted)
        for layer in group: _solve(layer, twins[layer.name], grams, few)
    if few: _warn_of_few(few)


def layer_refit(
    model: nn.Module,  # the dense network
    name: str,  # of a weight of it, as a parameter
    batches: list,  # of `Inputs`
) -> Callable:  # of the dense weight: solves the zeros that are in the weight by then
    "Gather what one layer reads, so that it can be solved anew for several masks, the rest being dense."
    parts = [layer for group in _in_order(model, batches[0]) for layer in group if layer.name == name]
    read = [(layer, _Grams()) for layer in parts]
    for layer, grams in read:
        for batch in batches:
            reads, = _reads(model, [layer], batch)
            grams.add(reads, reads)

    def solve(dense):
        for layer, grams in read: _solve(layer, dense, grams, {})
    return solve


def _dense_reads(dense, layers, batches):
    """Yield what each layer reads in the dense network, for each batch.

    One pass over the batches serves as many layers as `HELD` allows: the network does not change."""
    while layers:
        held = [_reads(dense, layers, batches[0], HELD // len(batches))]
        now, layers = layers[:len(held[0])], layers[len(held[0]):]
        held += [_reads(dense, now, batch) for batch in batches[1:]]
        for _ in now: yield [reads.pop(0) for reads in held]  # not held any longer than they are needed


def _can_be_solved(layer, twins):
    "Tell whether a layer has weights that stay, and the dense network has it too."
    twin = twins.get(layer.name)
    return twin is not None and twin.shape == layer.weight.shape and bool(layer.weight.any())


def _solve(layer, dense, grams, few):
    "Solve a layer anew, if it is affected; note it in `few` where the rows are fewer than its inputs."
    if grams.read is None: return
    read = grams.read._replace(weight=layer.weight, part=layer.part)
    old = read.matrix(layer.weight).double()
    if not grams.lost and not (old == 0).any(): return
    outputs, new = read.matrix(dense).double(), old.clone()
    for group, gram in enumerate(grams.gram):
        wanted = grams.cross[group] @ outputs[group].T
        new[group] = solve_kept(old[group], gram, wanted)
        living = int((gram.diagonal() * (old[group] != 0).any(0)).count_nonzero())
        if grams.n < living: few[layer.name] = grams.n, living
    found, weight = read.from_matrix(new).to(layer.weight.dtype), read.part_of(layer.weight)
    stays = (found == 0) | ~found.isfinite()  # too small or too large for the type of the weight
    weight.copy_(torch.where(stays, weight, found))


def _warn_of_few(few):
    "Say where a layer was solved with fewer rows than it has inputs."
    found = [f'{n} rows for {name!r} with {inputs} inputs' for name, (n, inputs) in few.items()]
    more = f' and {len(found) - 3} other layers' if len(found) > 3 else ''
    warnings.warn(f'data: got {", ".join(found[:3])}{more}, expected at least as many rows as inputs: '
                  'the weights may fit these data alone', stacklevel=5)


class _Order:
    "Note in which order layers are read, and which of them read the very same tensors."

    def __init__(self, names):
        self.names, self.last, self.version, self.n = names, None, None, 0
        self.found = {}  # (name, part): the weight, and the number of the input of each call

    def note(self, read):
        known = not read.input.is_inference()  # whether torch counts the changes in place
        version = read.input._version if known else None
        again = known and version == self.version and _alike(read, self.last)
        self.n += not again
        self.last, self.version = read, version  # held, so that its memory is not another tensor's
        key = self.names[id(read.weight)], read.part
        self.found.setdefault(key, (read.weight, []))[1].append(self.n)

    def layers(self):
        "Return lists of `_Layer`: those of a list read the same."
        together = {}
        for (name, part), (weight, inputs) in self.found.items():
            together.setdefault(tuple(inputs), []).append(_Layer(name, weight, part, len(inputs)))
        return list(together.values())


def _alike(a: Read, b: Read):
    "Tell whether two calls read the same rows, the inputs not having been changed in between."
    layout = [(r.settings, r.transposed, r.weight.shape[1:], r.input.shape, r.input.stride()) for r in (a, b)]
    same_input = layout[0] == layout[1] and a.input.dtype == b.input.dtype
    return same_input and a.input.data_ptr() == b.input.data_ptr() and a.real is b.real


def _in_order(model, batch):
    """Return the layers in the order in which they are read, in one list those that read the same tensors.

    The weights of lookup tables are not among them: a layer that shares one is one of several readers."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, LOOKUPS)}
    names = {id(p): name for name, p in model.named_parameters() if id(p) not in tables}
    order = _Order(names)
    with Watching({*names}, order.note, real_positions(batch, model)): batch.call(model)
    return order.layers()


def _reads(
    model,
    layers,  # in the order in which they are read
    batch,
    most=torch.inf,  # bytes of inputs, after which the layers that follow are left out
) -> list:  # for each layer, the first one at least, a list of `Read`: one for each call
    "Return what layers read in one batch; the rest of the network does not run."
    keys = [(id(layer.weight), layer.part) for layer in layers]
    missing = {key: layer.uses for key, layer in zip(keys, layers)}
    found = {key: [] for key in keys}
    several = sum(missing.values()) > 1  # the network runs on, and may change an input in place
    left = most

    def take(read):
        nonlocal left
        key = id(read.weight), read.part
        if not missing.get(key): return
        found[key].append(read._replace(input=read.input.clone()) if several else read)
        missing[key] -= 1
        left -= read.input.numel() * read.input.element_size()
        is_full = left <= 0 and not missing[keys[0]]
        if is_full or not any(missing.values()): raise Stop
    try:
        with Watching({key[0] for key in keys}, take, real_positions(batch, model)): batch.call(model)
    except Stop: pass
    if most == torch.inf: return list(found.values())
    n_complete = next((i for i, key in enumerate(keys) if missing[key]), len(keys))
    return [found[key] for key in keys[:max(1, n_complete)]]


class _Grams:
    "Gather the Gram matrix of inputs, XᵀX, and that with the inputs in the dense network, XᵀX'."

    def __init__(self):
        self.gram, self.cross, self.n, self.read = 0., 0., 0, None  # `n` counts rows
        self.alive = False  # (groups, inputs of an output): which inputs are not zero in the dense network

    def add(self, reads, dense_reads):
        for read, twin in zip(reads, dense_reads):
            for piece, dense_piece in zip(read.pieces(), twin.pieces()): self._add(piece, dense_piece)

    def _add(self, read, twin):
        rows, dense_rows = widened(read.rows()), widened(twin.rows())
        if dense_rows.shape != rows.shape: return
        self.gram = self.gram + (rows.transpose(1, 2) @ rows).double()
        self.cross = self.cross + (rows.transpose(1, 2) @ dense_rows).double()
        self.alive = self.alive | dense_rows.any(1)
        self.n += rows.shape[1]
        self.read = read

    @property
    def lost(self) -> bool:
        "Tell whether inputs are zero that were not in the dense network."
        dead = self.gram.diagonal(dim1=1, dim2=2) == 0
        return bool((dead & self.alive).any())


# BatchNorm

class _Statistics(TorchFunctionMode):
    "Sum up what reaches the BatchNorms of a model, by channel."

    def __init__(self,
        norms: dict,  # by name
        uses: int = 0,  # number of calls of these in a forward pass, after which that ends; 0 if unknown
        at_once: Callable | None = None,  # called with the name of a BatchNorm when its input was summed up, before it runs
    ):
        super().__init__()
        self.norms, self.uses = {id(norm.running_mean): name for name, norm in norms.items()}, uses
        self.at_once = at_once
        self.real = None  # which positions of the batch are no padding, as `real_positions` finds them
        self.calls = {}  # name: how often it was called in this forward pass
        self.sums = {}  # name: number of entries, their sum, the sum of their squares, by channel

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.__name__ == 'batch_norm':
            name = self.norms.get(id(argument(args, kwargs, 1, 'running_mean')))
            if name is not None: self._add(name, argument(args, kwargs, 0, 'input'))
        return function(*args, **kwargs)

    def _add(self, name, x):
        rows = only_real(x.detach().movedim(1, -1), self.real).flatten(0, -2).double()
        n, total, squares = self.sums.get(name, (0, 0., 0.))
        self.sums[name] = n + len(rows), total + rows.sum(0), squares + rows.square().sum(0)
        self.calls[name] = self.calls.get(name, 0) + 1
        if self.at_once is not None: self.at_once(name)
        if self.calls[name] == self.uses: raise Stop

    def read(self, model, batches):
        "Run a model on batches."
        for batch in batches:
            self.real, self.calls = real_positions(batch, model), {}
            try:
                with self: batch.call(model)
            except Stop: pass
        return self

    def of(self, name):
        "Return mean and variance of each channel, and the number of entries."
        n, total, squares = self.sums[name]
        return total / n, (squares / n - (total / n).square()).clamp(min=0), n


def _recalibrate(model, dense, batches): _adapt(model, dense, batches, _move)
def _reestimate(model, dense, batches): _adapt(model, dense, batches, _replace)


def _adapt(model, dense, batches, change):
    """Change the statistics of each BatchNorm whose input has changed, in the order of the data flow.

    A pass over a single batch adapts them one after the other. Of several batches each BatchNorm needs all
    before the next one runs, and so does one that is used several times: a pass for each."""
    norms, twins, batches = _norms(model), _norms(dense), joined(batches)
    before = _Statistics(twins).read(dense, batches)
    once = all(calls == 1 for calls in before.calls.values())

    def adapt(name, now):
        if name not in before.sums or _equal(now.of(name), before.of(name)): return False
        change(norms[name], twins[name], now.of(name), before.of(name))
        return True
    if len(batches) == 1 and once:
        now = _Statistics(norms, at_once=lambda name: adapt(name, now))
        now.read(model, batches)
        return
    now = start = _Statistics(norms).read(model, batches)
    changed = False
    for name in start.sums:  # in the order of the first calls
        if changed: now = _Statistics({name: norms[name]}, start.calls.get(name, 0)).read(model, batches)
        changed |= adapt(name, now)


def _norms(model):
    modules = named_modules(model).items()
    return {n: m for n, m in modules if isinstance(m, _BatchNorm) and m.running_mean is not None}


def _equal(now, before):
    "Tell whether two statistics are the same to the bit."
    return now[2] == before[2] and torch.equal(now[0], before[0]) and torch.equal(now[1], before[1])


def _move(norm, twin, now, before):
    "Move the statistics of one BatchNorm: from the dense network's, by what the data say."
    (mean, variance, _), (dense_mean, dense_variance, _) = now, before
    old_mean, old_variance = twin.running_mean.double(), twin.running_var.double()
    ratio = (variance + norm.eps) / (dense_variance + norm.eps)
    moved = old_mean + (mean - dense_mean) + (dense_mean - old_mean) * (1 - ratio.sqrt())
    norm.running_mean.copy_(moved)
    norm.running_var.copy_((old_variance + (old_variance + norm.eps) * (ratio - 1)).clamp(min=0))


def _replace(norm, twin, now, before):
    "Give one BatchNorm the statistics of the data."
    mean, variance, n = now
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance * n / max(n - 1, 1))
