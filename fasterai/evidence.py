"What is known of a layer, and how it is collected: the table of what a criterion may ask for."
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Kind:
    """One kind of evidence: how it begins, what it takes from a step or from a layer's input, and how it is read.

    A kind that keeps a state has `start`, and `on_step` or `on_input` or both, which return the new state."""
    read: Callable  # (layer, state) -> tensor for the criterion
    start: Callable | None = None  # (layer) -> state; None: nothing is kept, and the state is None
    on_step: Callable | None = None  # (layer, state) -> state, between backward and step, before gradients are masked
    on_input: Callable | None = None  # (layer, state, x) -> state, for each input x that the layer gets while it is watched
    check: Callable | None = None  # (layers), before an event; raises where there is nothing to read
    weight_shaped: bool = True  # has it the weight's shape, so that a part of it belongs to a part of the weight?


def _grad(layer, state):
    grad = layer.weight.grad
    if grad is None:
        raise ValueError(f'criteria: layer {layer.name!r} has no gradient: call after loss.backward() and before optimizer.zero_grad(), '
                         'and choose no layer that is frozen')
    return grad.to_dense() if grad.is_sparse else grad


def _any_grad(layers):
    "`ValueError` where there is no gradient at all."
    grads = [layer.weight.grad for layer in layers]
    if not any(grad is not None and grad.any() for grad in grads):
        raise ValueError('criteria: gradients are needed and all are zero or missing: call after loss.backward() '
                         'and before optimizer.zero_grad(); nothing was changed')


EVIDENCE = {
    'weight': Kind(read=lambda layer, state: layer.weight),
    'grad': Kind(read=_grad, check=_any_grad),
}


class Evidence:
    "Collects and keeps what is known of the selected layers, of the kinds that somebody asks for."

    def __init__(self,
        names: tuple,  # of the kinds, as in `EVIDENCE`
        selected,  # its `layers` are {name: layer}; a layer has a name and a weight
    ):
        self.names, self.selected = names, selected
        self.states = {}  # (kind, layer's name): state

    def of(self,
        layer,  # one of the selected
    ) -> dict:  # kind: tensor
        "Return the evidence about one layer."
        return {name: EVIDENCE[name].read(layer, self._state(name, layer)).detach() for name in self.names}

    def check(self,
        layers: list,  # of which an event asks
    ):
        "Raise where an event about these layers has nothing to go by."
        for name in self.names:
            if EVIDENCE[name].check is not None: EVIDENCE[name].check(layers)

    @property
    def weight_shaped(self) -> bool:
        "Whether a part of the evidence belongs to a part of the weight."
        return all(EVIDENCE[name].weight_shaped for name in self.names)

    def step(self):
        "Take what a training step shows; call it between backward and step, before gradients are masked."
        for name in self.names:
            if EVIDENCE[name].on_step is None: continue
            for layer in self.selected.layers.values(): self._update(name, layer, EVIDENCE[name].on_step)

    def watching(self):
        "Return a context manager in which the inputs of layers are seen, without a hook on the model."
        return _Inputs({id(layer.weight): layer for layer in self.selected.layers.values()}, self._input)

    def _input(self, layer, x):
        for name in self.names:
            if EVIDENCE[name].on_input is not None: self._update(name, layer, EVIDENCE[name].on_input, x)

    def _state(self, name, layer):
        kind, key = EVIDENCE[name], (name, layer.name)
        if kind.start is not None and key not in self.states: self.states[key] = kind.start(layer)
        return self.states.get(key)

    def _update(self, name, layer, update, *what):
        state = self._state(name, layer)
        with torch.no_grad(): self.states[name, layer.name] = update(layer, state, *what)


class _Inputs(TorchFunctionMode):
    "Sees each call of a layer as torch does: a function of an input and a weight."

    def __init__(self, layers, tell):
        super().__init__()
        self.layers, self.tell = layers, tell  # id of a weight: layer; a function of layer and input

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [*args[:1], *(kwargs[n] for n in ('input',) if n in kwargs)]
        weights = [*args[1:2], *(kwargs[n] for n in ('weight',) if n in kwargs)]
        if inputs and weights and id(weights[0]) in self.layers and isinstance(inputs[0], torch.Tensor):
            self.tell(self.layers[id(weights[0])], inputs[0].detach())
        return function(*args, **kwargs)
