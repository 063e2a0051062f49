"""Repair a pruned network by data, without labels or training: what do the weights that stay make up for?

`refit` solves the weights of each layer anew, `recalibrate` adapts the statistics of BatchNorm. Each is kept
only where the outputs come nearer to those of the dense network, on data that it was not fitted to."""
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fasterai.arguments import one_of
from fasterai.data import held_out, read_data, real_positions
from fasterai.inputs import Watching, only_real
from fasterai.names import named_modules
from fasterai.operations import argument
from fasterai.snapshot import Snapshot, evaluation_mode

DAMPING = .01  # of the mean of the diagonal of a Gram matrix
NEARER = .95  # a repair is kept where it leaves at most so much of the error: less may be chance


class Repaired(NamedTuple):
    "Say how far the outputs are from those of the dense network, before and after a repair."
    before: float  # squared error over the variance of the dense outputs, on data that was not fitted to
    after: float
    kept: bool  # False: it would have done harm, and all is as it was


def refit(
    model: nn.Module,  # pruned, by whomever: its zeros are the mask, and stay
    dense: nn.Module,  # the network before, of the same names
    data,  # a DataLoader, fastai's DataLoaders, an iterable of batches, or a tensor; labels are not used
) -> Repaired:
    """Solve the weights that stay anew, layer by layer, so that the outputs are those of the dense network.

    The weights of an output solve min ‖X w − X' w'‖² + λ‖w − w₀‖², with X the layer's inputs in the pruned
    network, X' and w' those of the dense one, and w₀ the weights as they are: layer-wise reconstruction (as
    in Frantar & Alistarh 2022), for a mask that is given. Linear layers and convolutions are solved that have
    zeros or read channels of zeros. A weight that is zero stays zero."""
    return _kept_if_nearer(model, dense, data, _refit)


def recalibrate(
    model: nn.Module,  # pruned, by whomever
    dense: nn.Module,  # the network before, of the same names
    data,  # as in `refit`
) -> Repaired:
    """Move the statistics of BatchNorm by as much as pruning has moved those of the data.

    What reaches a BatchNorm is normalized, on the data, as it was in the dense network: σ² becomes r·σ² and
    μ becomes m − √r·(m' − μ), with m and m' the means in the pruned and in the dense network, and r the
    quotient of the variances. Where nothing was pruned nothing moves, to the bit."""
    return _kept_if_nearer(model, dense, data, _recalibrate)


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

def _kept_if_nearer(model, dense, data, change: Callable):
    "Make a change, and undo it where the outputs do not come nearer to those of the dense network."
    solve, judge = held_out(read_data(data, model))
    snapshot = Snapshot(model)
    with _undisturbed(model, dense):
        before = divergence(model, dense, judge)
        try:
            change(model, dense, solve)
            after = divergence(model, dense, judge)
        except BaseException:
            snapshot.restore()
            raise
    kept = after < NEARER * before
    if not kept: snapshot.restore()
    return Repaired(before, after if kept else before, kept)


@contextmanager
def _undisturbed(*models):
    "Run models without gradients, in eval mode, and put modes and random numbers back."
    devices = [p.device for model in models for p in list(model.parameters())[:1] if p.is_cuda]
    with evaluation_mode(*models), torch.random.fork_rng(devices), torch.no_grad(): yield


@torch.no_grad()
def divergence(
    model: nn.Module,
    dense: nn.Module,
    batches: list,  # of `Inputs`
) -> float:
    "Return the squared error of the outputs over the variance of the dense ones; padded tokens do not count."
    error, spread = 0., 0.
    for batch in batches:
        real = real_positions(batch, model)
        for pair in zip(_outputs(model, batch), _outputs(dense, batch)):
            out, wanted = (only_real(_by_position(output), real) for output in pair)
            error += float((out - wanted).double().square().sum())
            spread += float((wanted - wanted.mean(0, keepdim=True)).double().square().sum())
    return error / spread if spread else error


def _outputs(model, batch):
    leaves = tree_leaves(batch.call(model))
    return [leaf.float() for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def _by_position(output): return output.flatten(2) if output.ndim > 2 else output[..., None]


# Least squares

class _Stop(Exception):
    "All that was to be seen of a forward pass was seen."


def _refit(model, dense, batches):
    names = _names_in_order(model, batches[0])
    twins = dict(dense.named_parameters(remove_duplicate=False))
    for name, (weight, uses) in names.items():
        if name not in twins or not weight.any(): continue
        grams = _Grams(weight, twins[name])
        for batch in batches:
            grams.add(_reads(model, weight, uses, batch), _reads(dense, twins[name], uses, batch))
        if grams.affected: weight.copy_(grams.solved())


def _names_in_order(model, batch):
    "Return the weights in the order in which they are read: {name: (weight, how many times)}."
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}

    def count(read):
        name = names[id(read.weight)]
        found[name] = read.weight, found.get(name, (None, 0))[1] + 1
    with Watching({*names}, count): batch.call(model)
    return found


def _reads(model, weight, uses, batch):
    "Return what a layer reads in one batch; the rest of the network does not run."
    found = []

    def take(read):
        found.append(read)
        if len(found) == uses: raise _Stop
    try:
        with Watching({id(weight)}, take, real_positions(batch, model)): batch.call(model)
    except _Stop: pass
    return found


class _Grams:
    "Gather the Gram matrix of one layer's inputs, XᵀX, and that with its inputs in the dense network, XᵀX'."

    def __init__(self, weight, dense):
        self.weight, self.dense, self.gram, self.cross, self.read = weight, dense, 0., 0., None
        self.alive = False  # (groups, inputs of an output): which inputs are not zero in the dense network

    def add(self, reads, dense_reads):
        for read, twin in zip(reads, dense_reads):
            rows, dense_rows = read.rows(), twin.rows()
            if dense_rows.shape != rows.shape: continue
            self.gram = self.gram + (rows.transpose(1, 2) @ rows).double()
            self.cross = self.cross + (rows.transpose(1, 2) @ dense_rows).double()
            self.alive = self.alive | dense_rows.any(1)
            self.read = read

    @property
    def affected(self) -> bool:
        "Tell whether the layer has zeros, or reads channels that are zero and were not."
        if self.read is None: return False
        dead = self.gram.diagonal(dim1=1, dim2=2) == 0
        return bool((self.weight == 0).any() or (dead & self.alive).any())

    def solved(self):
        "Return the weight, solved anew where it is not zero."
        old, dense = self.read.matrix(self.weight).double(), self.read.matrix(self.dense).double()
        new = old.clone()
        for group, gram in enumerate(self.gram):
            ridge = DAMPING * float(gram.diagonal().mean())
            if not ridge: continue
            wanted = self.cross[group] @ dense[group].T  # (inputs, outputs)
            for outputs, inputs in _alike(old[group] != 0):
                matrix = gram[inputs][:, inputs]
                start = old[group][outputs][:, inputs].T
                found = _solve(matrix, wanted[inputs][:, outputs], start, ridge)
                new[group, outputs[:, None], inputs] = torch.where(found == 0, start, found).T
        return self.read.from_matrix(new).to(self.weight.dtype)


def _alike(masks):
    "Yield (positions of outputs that keep the same inputs, positions of these inputs)."
    kinds, of = masks.unique(dim=0, return_inverse=True)
    for i, kind in enumerate(kinds):
        if kind.any(): yield (of == i).nonzero()[:, 0], kind.nonzero()[:, 0]


def _solve(gram, wanted, start, ridge):
    "Solve (G + λ) w = b + λ w₀, with more damping where the matrix is singular."
    unit = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    while True:
        factor, failed = torch.linalg.cholesky_ex(gram + ridge * unit)
        if not failed: return torch.cholesky_solve(wanted + ridge * start, factor)
        ridge *= 10


# BatchNorm

class _Statistics(TorchFunctionMode):
    "Sum up what reaches the BatchNorms of a model, by channel."

    def __init__(self, norms):
        super().__init__()
        self.norms = {id(norm.running_mean): name for name, norm in norms.items()}
        self.real = None  # which positions of the batch are no padding, as `real_positions` finds them
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

    def of(self, name):
        "Return mean and variance of each channel."
        n, total, squares = self.sums[name]
        return total / n, (squares / n - (total / n).square()).clamp(min=0)


def _recalibrate(model, dense, batches):
    norms, twins = _norms(model), _norms(dense)
    before = _statistics(dense, twins, batches)
    for name in before.sums:
        if name not in norms: continue
        norm, twin = norms[name], twins[name]
        now = _statistics(model, {name: norm}, batches)
        if name in now.sums: _move(norm, twin, now.of(name), before.of(name))


def _norms(model):
    modules = named_modules(model).items()
    return {n: m for n, m in modules if isinstance(m, _BatchNorm) and m.running_mean is not None}


def _statistics(model, norms, batches):
    with _Statistics(norms) as statistics:
        for batch in batches:
            statistics.real = real_positions(batch, model)
            batch.call(model)
    return statistics


def _move(norm, twin, now, before):
    "Move the statistics of one BatchNorm: from the dense network's, by what the data say."
    (mean, variance), (dense_mean, dense_variance) = now, before
    old_mean, old_variance = twin.running_mean.double(), twin.running_var.double()
    ratio = (variance + norm.eps) / (dense_variance + norm.eps)
    moved = old_mean + (mean - dense_mean) + (dense_mean - old_mean) * (1 - ratio.sqrt())
    norm.running_mean.copy_(moved)
    norm.running_var.copy_((old_variance + (old_variance + norm.eps) * (ratio - 1)).clamp(min=0))
