"Measure which damage each sparsity of a layer does to the outputs of a network."
import warnings
from contextlib import contextmanager
from copy import deepcopy
from itertools import accumulate

import torch
from torch import nn

from fasterai.arguments import finite_number
from fasterai.data import held_out, read_labelled
from fasterai.progress import progress
from fasterai.repair import divergence_from, layer_refit, real_outputs, refit
from fasterai.repairing import repairs_of
from fasterai.snapshot import Snapshot, undisturbed
from fasterai.sparsifier import Sparsifier
from fasterai.tradeoff import LEVELS


class Trials:
    "Hold a dense network, the data, and how copies of it are pruned and judged."

    def __init__(self,
        model: nn.Module,  # dense; it is not changed
        data,  # batches, as in `Sparsifier`
        repair,  # as in `Sparsifier`
        criteria,  # as in `Sparsifier`
        layers,  # as in `Sparsifier`
        loss_func,  # as in `Sparsifier`
        hold: bool,  # every fourth batch is held out, to measure the loss with
    ):
        if data is None:
            raise ValueError('data: got None, expected a few batches, by which the damage of pruning is seen')
        self.dense, self.repair, self.loss_func = deepcopy(model), repair, loss_func
        with undisturbed(self.dense): labelled = read_labelled(data, self.dense)
        self.held = []
        if hold: labelled, self.held = _with_labels_held(labelled, loss_func)
        self.batches = [_as_given(*batch) for batch in labelled]
        self.solve, self.judge = held_out([inputs for inputs, _ in labelled])
        self.given = {'criteria': criteria, 'data': self.batches, 'loss_func': loss_func}
        sparsifier = Sparsifier(model, 'weight', 'local', layers=layers, **self.given)  # nothing is pruned
        self.refits = refit in repairs_of(sparsifier.rules, repair)
        names = {id(p): name for name, p in model.named_parameters()}
        known = {name: layer.weight for name, layer in sparsifier.layers.items() if id(layer.weight) in names}
        self.paths = {name: names[id(weight)] for name, weight in known.items()}  # layer's name: parameter's
        self.sizes = {name: weight.numel() for name, weight in known.items()}

    def _sparsifier(self, model, context='local', repair=None):
        return Sparsifier(model, 'weight', context, layers=list(self.paths), repair=repair, **self.given)

    def pruned(self,
        sparsities: dict,  # layer's name: percent
        repaired: bool = True,  # as `repair` says
    ) -> nn.Module:
        "Return a pruned copy."
        model = deepcopy(self.dense)
        sparsifier = self._sparsifier(model, repair=self.repair if repaired else None)
        with _small_layers_hidden(): sparsifier.sparsify_model(sparsities)
        return model

    def damages(self) -> tuple:  # {layer's name: masks at `LEVELS`}, {layer's name: divergences at 0 % and there}
        "Prune each layer alone to each of `LEVELS`, and return the masks and how far the outputs are then."
        trial, pruner = deepcopy(self.dense), deepcopy(self.dense)
        parameters, sparsifier = dict(trial.named_parameters()), self._sparsifier(pruner)
        masks, damage = {}, {}
        with undisturbed(trial), _small_layers_hidden(), sparsifier.repairs.instead([], None, pruner):
            wanted = [(batch, real_outputs(trial, batch)) for batch in self.judge]
            for name in progress(list(self.paths)):
                masks[name] = _masks(sparsifier, pruner, name)
                path = self.paths[name]
                solve = layer_refit(trial, path, self.solve) if self.refits else None
                damage[name] = [0., *_divergences(trial, parameters[path], masks[name], solve, wanted)]
        return masks, damage

    @torch.no_grad()
    def loss_of(self,
        model: nn.Module,
    ) -> float:
        "Return the mean loss of the batches that are held out."
        total, n = 0., 0
        with undisturbed(model):
            for inputs, label in self.held:
                size = len(label) if isinstance(label, torch.Tensor) and label.ndim else 1
                found = self.loss_func(inputs.call(model), label)
                total += size * finite_number('loss_func', found)
                n += size
        return total / n

    def global_sparsities(self) -> list:  # of {layer's name: percent}, for each of `LEVELS`
        "Return the sparsities that one global threshold gives to the layers."
        model = deepcopy(self.dense)
        sparsifier, found = self._sparsifier(model, 'global'), []
        with _small_layers_hidden(), sparsifier.repairs.instead([], None, model):
            for level in LEVELS:
                sparsifier.sparsify_model(level)
                percents = {row.layer: row.sparsity for row in sparsifier.report().rows}
                found.append({name: percents[name] for name in self.paths})
        return found


def _with_labels_held(labelled, loss_func):
    "Split batches into those to choose by, and every fourth, to measure the loss with."
    if loss_func is None:
        raise ValueError('loss_func: got None, expected a function of output and label with loss=')
    if len(labelled) < 2 or any(label is None for _, label in labelled):
        raise ValueError(f'data: got {len(labelled)} batches, expected two or more of (input, label) with '
                         'loss=: every fourth is held out to measure the loss')
    _, held = held_out(list(range(len(labelled))))
    rest = [batch for i, batch in enumerate(labelled) if i not in held]
    return rest, [labelled[i] for i in held]


def _as_given(inputs, label):
    "Return a batch as `data.read_labelled` reads it."
    x = inputs.kwargs or inputs.args
    return (x,) if label is None else (x, label)


@contextmanager
def _small_layers_hidden():
    "Hide the warnings of an event: that a layer of a few weights keeps one of them is no surprise here."
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'sparsity: ')
        yield


def _masks(sparsifier, model, name):
    "Return the masks of one layer at each level, and leave the network as it was."
    before, snapshot, found = sparsifier.state_dict(), Snapshot(model), []
    try:
        for level in LEVELS:
            sparsifier.sparsify_layer(name, level)
            found.append(sparsifier.masks[name])
            snapshot.restore()  # the masks alone count: other evidence than of the dense network is not wanted
    finally:
        sparsifier.load_state_dict(before)
        snapshot.restore()
    return found


@torch.no_grad()
def _divergences(model, weight, masks, solve, wanted):
    "Return how far the outputs are with one layer alone pruned to each mask, at least as far as before."
    dense, found = weight.detach().clone(), []
    for keep in masks:
        weight.copy_(dense.masked_fill(~keep, 0))
        if solve: solve(dense)
        found.append(divergence_from(wanted, model))
    weight.copy_(dense)
    return accumulate(found, max)
