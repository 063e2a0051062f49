"Zeroes the least important weights of any PyTorch model, and holds the masks."
import warnings
from collections.abc import Callable, Mapping
from fractions import Fraction

import torch
from torch import nn

from fasterai.allocation import fractions
from fasterai.arguments import nearest
from fasterai.event import Budget, Change, decide
from fasterai.evidence import Evidence
from fasterai.layers import Named
from fasterai.masks import Masks
from fasterai.regrowth import REGROWTHS
from fasterai.report import Report, measure
from fasterai.rules import Rules, as_arguments
from fasterai.selected import Selected


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
        self.model = model
        self.rules = Rules(granularity, context, criteria, layers, min_keep, coupled)
        self.selected = Selected(model, self.rules, example)
        self.masks = Masks(self.selected)
        self.evidence = Evidence(self.rules.criterion.evidence, self.selected)
        self._hooks = []  # in optimizers

    def __repr__(self): return f'Sparsifier({type(self.model).__name__}, {as_arguments(self.rules.given)})'.replace(', )', ')')

    def __getstate__(self): return self.__dict__ | {'_hooks': []}  # an optimizer that is attached does not go along

    @property
    def layers(self) -> dict:  # name: `selected.Layer`
        "The selected layers."
        return self.selected.layers

    @property
    def skipped(self) -> dict:  # name: reason
        "The layers that were left out."
        return self.selected.skipped

    # Sparsifying

    def sparsify_model(self,
        sparsity,  # percent of the selected weights that shall be zero; or {name, glob, type or module: percent}, then layer by layer
        share: float = 1.,  # how much of it is due, 0 to 1, as a schedule says
        regrow: bool = False,  # may the sparsity fall? What comes back starts from zero
    ) -> Change:
        "Zero the least important weights until the sparsity is reached. Zeros that are there count and, without `regrow`, stay."
        if isinstance(share, bool) or not 0 <= share <= 1: raise ValueError(f'share: got {share!r}, allowed is 0 to 1')
        names, due = list(self.layers), Fraction(float(share))
        asked = fractions(sparsity, self.rules, self.selected)
        if isinstance(sparsity, Mapping): return self._event(self._apart(asked, due), regrow)
        return self._event([Budget(self.selected.tied(names), asked[names[0]] * due)], regrow)

    def sparsify_layer(self,
        layer,  # a selected layer: its name, module or parameter; all weights within it, each for itself
        sparsity: float,  # percent of its weights that shall be zero
    ) -> Change:
        "The same for one layer alone."
        if isinstance(layer, str) and layer not in Named(self.model).modules and layer not in self.layers:
            raise ValueError(f'layer: got {layer!r}, allowed is one of {", ".join(self.layers)}{nearest(layer, self.layers)}')
        return self._event(self._apart(fractions({layer: sparsity}, self.rules, self.selected, 'layer'), 1), regrow=False)

    def _apart(self, asked, due):
        "A budget for each layer, or for what is tied to it too."
        budgets, done = [], set()
        for name, fraction in asked.items():
            tied = self.selected.tied_to(name)
            if any(asked.get(other) != fraction for other in tied):
                raise ValueError(f'sparsity: got one for {name!r} alone, allowed with coupled=True is the same for all of '
                                 f'{", ".join(map(repr, tied))}')
            if name not in done: budgets.append(Budget(self.selected.tied(tied), fraction * due))
            done.update(tied)
        return budgets

    def _event(self, budgets, regrow):
        self.masks.to_weights()
        change = decide(self.rules, budgets, self.masks.of, self.evidence, REGROWTHS['position'] if regrow else None)
        self.masks.apply(change)
        _warn_nearly_empty(budgets, change)
        return change

    # Keeping

    def apply_masks(self):
        "Zero again what an optimiser has moved."
        self.masks.apply_to_weights()

    def mask_gradients(self):
        "Zero the gradients of dead weights, so that neither a clipping norm nor an optimiser's memory knows of them."
        self.masks.apply_to_gradients()

    def mask_optimizer_state(self,
        state: Mapping,  # parameter: {name: tensor or anything}, as the `state` of an optimiser
    ):
        "Zero what an optimiser remembers of dead weights: momentum, second moments, all that has the weight's shape."
        self.masks.apply_to_state(state)

    def attach(self,
        optimizer: torch.optim.Optimizer,  # what steps the model in your own loop
    ):
        "Keep the zeros after every step of an optimiser, until `detach`."
        if isinstance(optimizer, type) or not hasattr(optimizer, 'register_step_post_hook'):
            came = optimizer if isinstance(optimizer, type) else type(optimizer)
            raise TypeError(f'optimizer: got {came}, allowed is a torch.optim.Optimizer; with another kind call apply_masks() after each step')
        stepped = {id(p) for group in optimizer.param_groups for p in group['params']}
        if not any(id(layer.weight) in stepped for layer in self.layers.values()):
            raise ValueError('optimizer: got one that steps none of the selected weights, allowed is one that was made with parameters of this model')

        def before(*_):
            self.evidence.step()
            self.mask_gradients()

        def after(*_):
            self.apply_masks()
            self.mask_optimizer_state(optimizer.state)
        self._hooks += [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]

    def detach(self):
        "Let go of all optimisers; the next step may move the zeros."
        for hook in self._hooks: hook.remove()
        self._hooks = []

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
        return self.masks.state_dict()

    def load_state_dict(self,
        state: dict,  # of `state_dict`
    ):
        "Take the masks over and apply them; `ValueError`, and nothing changed, where they do not fit."
        self.masks.load_state_dict(state)


def _warn_nearly_empty(budgets, change):
    "Name the layers that an event took below 1 % of their weights, where less than 99 % was asked."
    names = [layer.name for budget in budgets if budget.fraction < Fraction(99, 100) for layer in budget.layers]
    names = [n for n in names if change.after[n].nearly_empty and not change.before[n].nearly_empty]
    if not names: return
    have = 'have' if len(names) > 1 else 'has'
    warnings.warn(f'sparsity: {", ".join(map(repr, names))} {have} less than 1 % of the weights left, so '
                  "little passes: see report(); min_keep= sets a floor, context='local' or 'erk' shares the zeros out", stacklevel=4)
