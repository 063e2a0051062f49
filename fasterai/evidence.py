"Collect what is known of a layer: the table of what a criterion may ask for, and how each kind is collected."
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.overrides import TorchFunctionMode

from fasterai.operations import layer_call
from fasterai.peers import ALONE


@dataclass(frozen=True)
class Kind:
    """Describe a kind of evidence, as a row of `EVIDENCE`: how it begins, is updated, and is read.

    A kind that keeps a state has `start`, and an `on_step` or an `on_input`, which return the new state."""
    read: Callable  # (layer, state) -> the tensor that a criterion gets
    start: Callable | None = None  # (layer) -> state; None: nothing is kept, and the state is None
    on_step: Callable | None = None  # (layer, state) -> state, between backward and step, before gradients are masked
    on_event: Callable | None = None  # (layer, state) -> state, once at the beginning of each event
    on_input: Callable | None = None  # (layer, state, x) -> state, for each input x of the layer inside `watching`
    lacking: Callable | None = None  # (layers) -> bool for each, True where there is nothing to read; None: where it has no state yet
    how: str = ''  # how to supply it, for the error where no layer has it
    weight_shaped: bool = True  # the tensor has the weight's shape, so that it can be read in chunks


def _grad(layer, state):
    grad = layer.weight.grad
    if grad is None:
        raise ValueError(f'criteria: layer {layer.name!r} has no gradient: call after loss.backward()')
    return grad.to_dense() if grad.is_sparse else grad


def _no_grad(layers):
    "Tell which layers have no gradient, or one that is all zero: they took no part in the step."
    grads = [layer.weight.grad for layer in layers]
    found = iter(ALONE.fetched([_any(_values(grad))[None] for grad in grads if grad is not None]))
    return [grad is None or not next(found)[0] for grad in grads]


def _any(values):
    "Tell whether there is an entry that is not zero. On the host mostly one row is looked at, not all."
    if ALONE.on_host(values) and values.ndim:
        first = values[:1].any()
        if first: return first
    return values.any()


def _values(grad): return grad.coalesce().values() if grad.is_sparse else grad


def _noise(layer, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(layer.weight.shape, generator=generator).to(layer.weight.device)


def _draw_seed(layer, state): return int(torch.randint(2 ** 62, ()))  # by torch's own seed


# To add a kind of evidence, write a row. A criterion asks for it by naming an argument so.
EVIDENCE = {
    'weight': Kind(read=lambda layer, state: layer.weight),
    'grad': Kind(read=_grad, lacking=_no_grad,
                 how='call after loss.backward() and before optimizer.zero_grad()'),
    'noise': Kind(read=_noise, on_event=_draw_seed),
}


class Evidence:
    """Keep the evidence about the selected layers, of those kinds that a criterion asks for.

    Other kinds cost nothing."""

    def __init__(self,
        names: tuple,  # of the kinds, as in `EVIDENCE`
        selected,  # `Selected`, whose `layers` are {name: layer}
    ):
        self.names, self.selected = names, selected
        self.states = {}  # (kind, layer's name): state

    def of(self,
        layer,  # one of the selected
    ) -> dict:  # kind: tensor
        "Return the evidence about one layer."
        return {name: EVIDENCE[name].read(layer, self._state(name, layer)).detach() for name in self.names}

    def lacking(self,
        layers: list,  # those of an event
    ) -> set:  # of their names
        "Find the layers about which there is no evidence; `ValueError` where there is about none of them."
        lacks = {name: self._lacks(name, layers) for name in self.names if layers}
        for name, lack in lacks.items():
            if not all(lack): continue
            how = EVIDENCE[name].how or _how(EVIDENCE[name])
            raise ValueError(f'criteria: {name} is needed and no layer has any: {how}; nothing was changed')
        return {layer.name for lack in lacks.values() for layer, is_so in zip(layers, lack) if is_so}

    def known(self,
        layer,  # one of the selected
    ) -> bool:
        "Tell whether there is evidence about a layer."
        return not any(self._lacks(name, [layer])[0] for name in self.names)

    def begin(self,
        layers: list,  # those of an event
    ):
        "Update the evidence at the beginning of an event."
        for name in self.names:
            update = EVIDENCE[name].on_event
            if update is None: continue
            for layer in layers: self._update(name, layer, update)

    def _lacks(self, name, layers):
        kind = EVIDENCE[name]
        if kind.lacking is not None: return kind.lacking(layers)
        return [kind.start is not None and (name, layer.name) not in self.states for layer in layers]

    @property
    def weight_shaped(self) -> bool:
        "Tell whether all of it has the weight's shape, and can be read in chunks."
        return all(EVIDENCE[name].weight_shaped for name in self.names)

    def step(self,
        of: set | None = None,  # ids of the weights that are stepped; None: all
    ):
        """Update the evidence by a training step.

        Call it between backward and step, before gradients are masked."""
        for name in self.names:
            update = EVIDENCE[name].on_step
            if update is None: continue
            for layer in self.selected.layers.values():
                if of is not None and id(layer.weight) not in of: continue
                took_part = layer.weight.grad is not None  # a frozen layer has nothing to tell
                if took_part: self._update(name, layer, update)

    def watching(self):
        """Return a context manager in which the inputs of layers update the evidence.

        No hook is left on the model. Seen are linear layers and convolutions, as modules and as functions;
        not embeddings, attention and recurrent layers, nor what is compiled."""
        return _Inputs({id(layer.weight): layer for layer in self.selected.layers.values()}, self._input)

    def _input(self, layer, x):
        for name in self.names:
            update = EVIDENCE[name].on_input
            if update is not None: self._update(name, layer, update, x)

    def _state(self, name, layer):
        start, key = EVIDENCE[name].start, (name, layer.name)
        if start is not None and key not in self.states: self.states[key] = start(layer)
        return self.states.get(key)

    @torch.no_grad()
    def _update(self, name, layer, update, *x):
        self.states[name, layer.name] = update(layer, self._state(name, layer), *x)


def _how(kind):
    if kind.on_step is not None: return 'a training step collects it, with attach or in a fit'
    return 'batches collect it, inside evidence.watching()'


class _Inputs(TorchFunctionMode):
    """Report the input of each call of a selected layer.

    To torch such a call is a function of an input and a weight."""

    def __init__(self,
        layers: dict,  # id of a weight: layer
        report: Callable,  # (layer, input)
    ):
        super().__init__()
        self.layers, self.report = layers, report

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        call = layer_call(function.__name__, args, kwargs)
        if call is not None and id(call.weight) in self.layers:
            self.report(self.layers[id(call.weight)], call.input.detach())
        return function(*args, **kwargs)
