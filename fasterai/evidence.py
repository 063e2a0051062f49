"Collect what is known of a layer: the table of what a criterion may ask for, and how each kind is collected."
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from fasterai.inputs import Watching
from fasterai.peers import ALONE

PIECE = 1 << 16  # weights of which a step is added up together, on a CPU


@dataclass(frozen=True)
class Kind:
    """Describe a kind of evidence, as a row of `EVIDENCE`: how it begins, is updated, and is read.

    A kind that keeps a state has an `on_step` or an `on_input`, which return the new state, and mostly a
    `start`."""
    read: Callable  # (layer, state) -> the tensor that a criterion gets, or `Computed`, from which it is made chunk by chunk
    start: Callable | None = None  # (layer) -> state; None: the state is None to begin with
    on_step: Callable | None = None  # (layer, state) -> state, between backward and step, before gradients are masked
    on_event: Callable | None = None  # (layer, state) -> state, once at the beginning of each event
    on_input: Callable | None = None  # (layer, state, x) -> state, for each input x of the layer inside `watching`
    anew: bool = False  # it is begun anew after each event that succeeded: the state of the event's layers is let go
    lacking: Callable | None = None  # (layers, states) -> bool for each, True where there is nothing to read; None: where it has no state yet
    how: str = ''  # how to supply it, for the error where no layer has it
    weight_shaped: bool = True  # the tensor has the weight's shape, so that it can be read in chunks
    at_once: bool = False  # it starts when the Sparsifier is made; else where it is first updated or read


class Computed(NamedTuple):
    "Hold what a kind of evidence is computed from, entry by entry, so that it can be made of chunks."
    make: Callable  # (*parts) -> values; parts are all tensors or all arrays, and are not written into
    parts: dict  # name, for errors: tensor of the weight's shape


# The gradient of one batch

def _grad(layer, state=None):
    grad = layer.weight.grad
    if grad is None:
        raise ValueError(f'criteria: layer {layer.name!r} has no gradient: call after loss.backward()')
    return grad.to_dense() if grad.is_sparse else grad


def _no_grad(layers, states):
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


# What is gathered from several steps

class Gathered(NamedTuple):
    "Hold a sum over training steps. Steps in which a layer took no part are not counted."
    steps: torch.Tensor  # how many, int64 (), on the weight's device, so that a GPU need not be waited for
    total: torch.Tensor  # of the weight's shape, float32, or float64 where the weight is


def _add(value, layer, state):
    "Return a sum with this step's value added, and one step more where the gradient is not all zero."
    steps, total = _none(layer.weight) if state is None else _here(layer, state)
    weight, grad = layer.weight, _grad(layer)
    for piece in _pieces(weight): total[piece].add_(value(weight[piece], grad[piece]))
    return Gathered(steps + _any(_values(layer.weight.grad)), total)


def _none(weight):
    "Return the sum over no steps."
    steps = torch.zeros((), dtype=torch.int64, device=weight.device)
    return Gathered(steps, torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)))


def _pieces(weight):
    "Return slices of a weight that fit a processor's cache; on a GPU all of it is one."
    if not ALONE.on_host(weight) or not weight.ndim or weight.numel() <= PIECE: return [...]
    rows = max(1, PIECE * len(weight) // weight.numel())
    return [slice(start, start + rows) for start in range(0, len(weight), rows)]


def _here(layer, state):
    "Return a sum on the device of the weight: the model may have been moved."
    device = layer.weight.device
    return Gathered(state.steps.to(device), state.total.to(device))


def _no_steps(layers, states):
    "Tell which layers took part in no step that was told."
    told = [state for state in states if state is not None]
    found = iter(ALONE.fetched([state.steps[None] for state in told]))
    return [state is None or not next(found)[0] for state in states]


def _took_no_part(layers, states):
    "Tell which layers took part in no step, or, where none was told, have no gradient."
    untold = [layer for layer, state in zip(layers, states) if state is None]
    no_grad = iter(_no_grad(untold, None))
    no_steps = _no_steps(layers, states)
    return [next(no_grad) if state is None else none for state, none in zip(states, no_steps)]


def _mean(name, value):
    """Make a row of the mean of a value over the steps since the last event.

    Where no step was told, it is the value of the gradient that is there."""
    def read(layer, state):
        if state is None: return Computed(value, {'weight': layer.weight, 'grad': _grad(layer)})
        steps, total = _here(layer, state)
        number = steps.item() if ALONE.on_host(steps) else steps
        return Computed(partial(_divided, number), {name: total})
    return Kind(read, on_step=partial(_add, value), anew=True, lacking=_took_no_part,
                how='call after loss.backward() and before optimizer.zero_grad(), '
                    'or attach the optimizer, whose steps collect it')


def _divided(number, total): return total / number


def _gradient(weight, grad): return grad


def _weight_times_grad(weight, grad): return widened(weight) * widened(grad)


def _saliency(weight, grad): return abs(_weight_times_grad(weight, grad))


def _square(weight, grad):
    """Return the square of a batch gradient.

    The mean of these is not the diagonal of the Fisher information, which needs gradients of single
    samples."""
    return widened(grad) ** 2


def _movement(layer, state):
    "Return the sum of -w·g over all steps (Sanh et al. 2020)."
    return Computed(_negative, {'movement': _here(layer, state).total})


def _negative(total): return -total


def widened(
    values: torch.Tensor | np.ndarray,
) -> torch.Tensor | np.ndarray:
    "Return half-precision values as float32, and others as they are."
    half = isinstance(values, torch.Tensor) and values.dtype in (torch.float16, torch.bfloat16)
    return values.float() if half else values


# Others

def _initial(layer, state): return state.to(layer.weight.device)


def _copy(layer): return layer.weight.detach().clone()


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
    'initial': Kind(read=_initial, start=_copy, at_once=True),
    'grad_mean': _mean('grad_mean', _gradient),
    'saliency': _mean('saliency', _saliency),
    'batch_squares': _mean('batch_squares', _square),
    'movement': Kind(read=_movement, on_step=partial(_add, _weight_times_grad), lacking=_no_steps),
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
        for name in names:
            if EVIDENCE[name].at_once: self._start(name)

    @torch.no_grad()
    def of(self,
        layer,  # one of the selected
    ) -> dict:  # kind: tensor
        "Return the evidence about one layer."
        parts, makes = self.parts(layer)
        return made(makes, parts)

    def parts(self,
        layer,  # one of the selected
    ) -> tuple:  # ({part: tensor}, {kind: (function, names of its parts)}), as `made` takes them
        "Return what the evidence about one layer is made of, so that it can be made of chunks."
        parts, makes = {}, {}
        for name in self.names:
            found = EVIDENCE[name].read(layer, self._state(name, layer))
            if not isinstance(found, Computed): found = Computed(_itself, {name: found})
            parts |= {part: tensor.detach() for part, tensor in found.parts.items()}
            makes[name] = found.make, tuple(found.parts)
        return parts, makes

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

    def end(self,
        names: Iterable,  # of the layers of an event that succeeded
    ):
        "Begin anew what is gathered from one event to the next."
        for kind in [kind for kind in self.names if EVIDENCE[kind].anew]:
            for name in names: self.states.pop((kind, name), None)

    def _lacks(self, name, layers):
        kind, states = EVIDENCE[name], [self.states.get((name, layer.name)) for layer in layers]
        if kind.lacking is not None: return kind.lacking(layers, states)
        return [kind.start is not None and state is None for state in states]

    def _start(self, name):
        for layer in self.selected.candidates.values(): self._state(name, layer)

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
        layers = {id(layer.weight): layer for layer in self.selected.layers.values()}
        return Watching({*layers}, lambda read: self._input(layers[id(read.weight)], read.input))

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


def made(
    makes: dict,  # kind: (function, names of its parts), as `Evidence.parts` returns them
    parts: dict,  # name: a tensor of one layer, or the same chunk of each; all tensors, or all arrays
) -> dict:  # kind: tensor or array
    "Make evidence of its parts."
    with np.errstate(all='ignore'):  # `check_finite` looks at the scores
        return {kind: make(*(parts[part] for part in of)) for kind, (make, of) in makes.items()}


def _itself(values): return values


def _how(kind):
    if kind.on_step is not None: return 'a training step collects it, with attach or in a fit'
    return 'batches collect it, inside evidence.watching()'
