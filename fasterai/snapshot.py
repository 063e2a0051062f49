"Remember how a model was, and put it back: its values, its optimizer, its modes, and the random numbers."
import random
from contextlib import contextmanager
from copy import deepcopy

import numpy as np
import torch
from torch import nn

from fasterai.optimizers import states_of


class Snapshot:
    """Copy the values of a model: all parameters and buffers, such as the statistics of BatchNorm.

    `Sparsifier.rewind` goes back to them, and keeps what is pruned at zero. With an optimizer its momentum,
    second moments and the like are copied too, not its learning rate. `TypeError` where it is none."""

    def __init__(self,
        model: nn.Module,
        optimizer=None,  # the one that steps the model, if it shall go back, too
    ):
        tensors = _named(model)
        self._names = [*tensors]
        self._saved = [(tensor, tensor.detach().clone()) for tensor in tensors.values()]
        self._buffers = _buffers_of(model)
        self._optimizer = optimizer
        states = [] if optimizer is None else states_of(optimizer)
        self._states = [_state_by_name(state, tensors) for state in states]

    @property
    def values(self) -> dict:  # name: tensor
        "Return the values of parameters and buffers by name; what several modules share is there once."
        return {name: value for name, (_, value) in zip(self._names, self._saved)}

    def state_dict(self) -> dict:  # 'values': {name: tensor}, 'optimizer': a list of {name: what is kept for it}
        "Return the values by name, as torch saves them."
        return {'values': self.values, 'optimizer': self._states}

    def load_state_dict(self,
        state: dict,  # of `state_dict`
    ):
        "Take over the values of a snapshot of the same model; `ValueError` where names or shapes are others."
        values = state['values']
        shapes, others = ({name: tuple(v.shape) for name, v in of.items()} for of in (self.values, values))
        if shapes != others: raise ValueError('state: got a snapshot of another model')
        self._saved = [(tensor, values[name].to(tensor.device, copy=True))
                       for name, (tensor, _) in zip(self._names, self._saved)]
        self._states = deepcopy(state['optimizer'])

    def restore(self):
        "Write the model's values back bit for bit, in place: it keeps its tensors. Can be called again."
        _give_back(self._buffers)
        for tensor, value in self._saved: _write(tensor, value)

    def fits(self,
        model: nn.Module,
    ) -> bool:
        "Tell whether a model has all names of the values."
        return {*self._names} <= {*_named(model)}

    def write_into(self,
        model: nn.Module,  # the same or another one, on any device
        optimizer=None,  # gets what was kept for the weights; None: the one of the snapshot, where the tensors are those of then
    ) -> list:  # of the states of the optimizer that were written, {parameter: {name: tensor or anything}}
        """Write the values into the tensors of a model by their names, in place.

        `ValueError`, and nothing changed, where one is missing or has another shape, or there is no state
        for the optimizer; `TypeError` where that is none."""
        here, values = _named(model), self.values
        for name, value in values.items():
            shape = tuple(here[name].shape) if name in here else 'none'
            if shape == tuple(value.shape): continue
            raise ValueError(f'snapshot: got {name!r} of shape {tuple(value.shape)}, '
                             f'expected one of the model, which has {shape}')
        same = all(here[name] is was for name, (was, _) in zip(self._names, self._saved))
        if optimizer is None and same: optimizer = self._optimizer
        states = [] if optimizer is None else states_of(optimizer)
        if states and len(states) != len(self._states):
            raise ValueError(f'optimizer: got {type(optimizer).__name__}, expected None: '
                             'the snapshot holds no state for it')
        for name, value in values.items(): _write(here[name], value)
        for state, saved in zip(states, self._states): _write_state(state, saved, here)
        # fastai's Lookahead copies its slow weights anew at the next step
        if getattr(optimizer, 'slow_weights', None): optimizer.count, optimizer.slow_weights = 0, None
        return states


def _named(model):
    "Return the tensors of a model by name; one that several modules share is there once."
    return dict([*model.named_parameters(), *model.named_buffers()])


def _write(tensor, value):
    "Write a value into a tensor. What was made in inference mode can be changed only there."
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        _once(tensor).copy_(_once(value, tensor))


def _state_by_name(state, tensors):
    kept = {name: state[tensor] for name, tensor in tensors.items() if tensor in state}
    return {name: deepcopy(dict(of)) for name, of in kept.items()}


def _write_state(state, saved, tensors):
    "Put back what an optimizer keeps for the parameters of a model, where these are now."
    for name, tensor in tensors.items():
        state.pop(tensor, None)
        if name not in saved: continue
        state[tensor] = {key: _beside(tensor, kept) for key, kept in deepcopy(saved[name]).items()}


def _beside(tensor, kept):
    is_mirror = isinstance(kept, torch.Tensor) and kept.shape == tensor.shape
    return kept.to(tensor.device) if is_mirror else kept


def _once(tensor, like=None):
    "Return the entries of a tensor without those that only repeat others, where it, or `like`, is expanded."
    like = tensor if like is None else like
    if like.layout != torch.strided or all(like.stride()): return tensor
    return tensor[tuple(slice(None) if step else slice(1) for step in like.stride())]


@contextmanager
def evaluation_mode(
    *models: nn.Module,
):
    "Set every module of the models to eval mode for a `with` block, and put its own mode back afterwards."
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        # the attribute, not eval(): some models overload that, to keep one part of them in training mode
        for module in modes: module.training = False
        yield
    finally:
        for module, training in modes.items(): module.training = training


@contextmanager
def undisturbed(
    *models: nn.Module,
    but: frozenset = frozenset(),  # ids of buffers whose values may change
):
    """Run models in eval mode for a `with` block; put modes, buffers, attributes and random numbers back.

    Modules get back the very buffers that they had, too: a forward pass may put others in their place."""
    inside = [buffer for model in models for buffer in model.buffers() if id(buffer) not in but]
    buffers = {buffer: buffer.clone() for buffer in inside}
    places = [place for model in models for place in _buffers_of(model)]
    devices = {p.device for model in models for p in model.parameters() if p.is_cuda}
    with evaluation_mode(*models), attributes_kept(*models), random_numbers_kept(*devices):
        try: yield
        finally:
            _give_back(places)
            _put_back(buffers)


@contextmanager
def attributes_kept(
    *models: nn.Module,
):
    """Put the attributes of modules back after a `with` block, and what is in their dicts, lists and sets.

    A forward pass may keep results there for the next: those of a trace, or of weights that change later."""
    before = [(vars(module), _own_attributes(module)) for model in models for module in model.modules()]
    contents = {}
    for _, attributes in before: _copy_contents(attributes.values(), contents)
    try: yield
    finally:
        for now, attributes in before:
            for name in now.keys() - attributes.keys() - OF_TORCH: del now[name]
            now.update(attributes)
        for container, content in contents.values(): _refill(container, content)


OF_TORCH = vars(nn.Module()).keys()  # attributes that each module has


def _own_attributes(module):
    return {name: value for name, value in vars(module).items() if name not in OF_TORCH}


def _copy_contents(values, found):
    "Copy the dicts, lists and sets among values, and those inside: {id: (container, copy)}."
    for value in values:
        if type(value) not in (dict, list, set) or id(value) in found: continue
        found[id(value)] = value, value.copy()
        _copy_contents(value.values() if isinstance(value, dict) else value, found)


def _refill(container, content):
    "Let a container have the content that it had."
    container.clear()
    add = container.extend if isinstance(container, list) else container.update
    add(content)


def _buffers_of(model): return [(module, dict(module._buffers)) for module in model.modules()]


def _give_back(places):
    "Let modules have the buffers that they had, as `_buffers_of` returned them."
    for module, buffers in places:
        module._buffers.clear()
        module._buffers.update(buffers)


def _put_back(buffers):
    "Write values back into the buffers that have changed."
    for buffer, value in buffers.items():
        if buffer.shape != value.shape: buffer.resize_(value.shape)  # observers of quantization do so
        if not torch.equal(buffer, value): buffer.copy_(value)


@contextmanager
def random_numbers_kept(
    *devices: torch.device,  # GPUs that may draw, too
):
    "Put the random numbers of Python, numpy and torch back after a `with` block."
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        try: yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)
