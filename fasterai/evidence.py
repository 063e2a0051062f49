"Keep the evidence about the layers of a model: gather it in training and from data, and save it."
import warnings
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from itertools import accumulate, islice

import numpy as np
import torch

from fasterai.calibration import Calibration
from fasterai.inputs import Watching
from fasterai.kinds import EVIDENCE, Computed, Gathered, none_yet, summed
from fasterai.native.sweep import compiled
from fasterai.peers import ALONE, Alone
from fasterai.shards import here

HELD = 2 ** 27  # bytes of large matrices, of several layers, that are held at once: fewer take more passes over the data


class Evidence:
    """Keep the evidence about the selected layers, of those kinds that a criterion asks for.

    Other kinds cost nothing."""

    peers = ALONE  # within an event, the processes whose data count too

    def __init__(self,
        names: tuple,  # of the kinds, as in `EVIDENCE`
        selected,  # `Selected`, whose `layers` are {name: layer}
        calibration: Calibration | None = None,  # the model, with data, to gather evidence from
    ):
        self.names, self.selected, self.calibration = names, selected, calibration
        self.states = {}  # (kind, layer's name): state
        self.ahead, self.held = [], {}  # the layers of an event; large states of some of them, as `states`
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
        names: tuple | None = None,  # of the kinds; None: all
    ) -> tuple:  # ({part: tensor}, {kind: (function, names of its parts)}), as `made` takes them
        "Return what the evidence about one layer is made of, so that it can be made of chunks."
        parts, makes = {}, {}
        for name in self.names if names is None else names:
            found = EVIDENCE[name].read(layer, self._state(name, layer))
            if not isinstance(found, Computed): found = Computed(_itself, {name: found})
            parts |= {part: tensor.detach() for part, tensor in found.parts.items()}
            makes[name] = found.make, tuple(found.parts)
        return parts, makes

    def lacking(self,
        layers: list,  # those of an event
        names: tuple | None = None,  # of the kinds; None: all
        argument: str = 'criteria',  # who needs it, for the error
    ) -> set:  # of their names
        "Find the layers about which there is no evidence; `ValueError` where there is about none of them."
        names = self.names if names is None else names
        lacks = {name: self._lacks(name, layers) for name in names if layers}
        for name, lack in lacks.items():
            if not all(lack): continue
            how = EVIDENCE[name].how or _how(EVIDENCE[name])
            raise ValueError(f'{argument}: {name} is needed and no layer has any: {how}; nothing was changed')
        return {layer.name for lack in lacks.values() for layer, is_so in zip(layers, lack) if is_so}

    def lacks_all(self,
        layers: list,  # those of an event
        name: str,  # of a kind
    ) -> bool:
        "Tell whether there is no evidence of a kind about any of the layers."
        return all(self._lacks(name, layers))

    def known(self,
        layer,  # one of the selected
        names: tuple | None = None,  # of the kinds; None: all
    ) -> bool:
        "Tell whether there is evidence about a layer. That of data is known within an event only."
        if names is None: names = self.names
        if any(self._can_gather(EVIDENCE[name]) for name in names): return False
        return not any(self._lacks(name, [layer])[0] for name in names)

    @contextmanager
    def gathered(self,
        layers: list,  # those of an event
        names: tuple | None = None,  # of the kinds; None: all
        peers: Alone = ALONE,  # the processes: what their data tell is added up
    ):
        """Gather evidence from data, for a `with` block.

        An error, or Ctrl-C, leaves the evidence as it was."""
        if self.calibration is None:
            yield
            return
        before, self.peers = dict(self.states), peers
        with self.calibration.reading():
            tells = {name: self._told(name, layers) for name in names or self.names}
            found = {(name, of): state for name, told in tells.items() for of, state in told.items()}
            self.states |= found
            self.ahead = layers
            try: yield
            finally:
                self.ahead, self.held, self.peers = [], {}, ALONE
                self._take_back(found, before)

    def _take_back(self, found, before):
        for key in found:
            self.states.pop(key, None)
            if key in before: self.states[key] = before[key]

    def _told(self, name, layers):
        """Return what is told of layers for an event: {layer's name: state}.

        These are the data, and, without them, the inputs that were seen before, if other processes have seen
        others."""
        kind = EVIDENCE[name]
        if self._can_gather(kind): return {} if kind.large else self._from_data(name, layers)
        if kind.on_input is None: return {}
        seen = {layer.name: self.states.get((name, layer.name)) for layer in layers}
        return summed(self.peers, {of: state for of, state in seen.items() if state is not None})

    def _from_data(self, name, layers):
        "Return what the data of all processes tell of layers: {layer's name: state}."
        kind, calibration = EVIDENCE[name], self.calibration
        if not layers or not self._can_gather(kind): return {}
        if kind.of_model is not None: return kind.of_model(layers, calibration)
        return summed(self.peers, self._from_batches(kind, layers))

    def _from_batches(self, kind, layers):
        "Return what the data tell of layers: {layer's name: state}."
        calibration, found = self.calibration, {}
        weights = [layer.weight for layer in layers]
        owners = {id(weight): layer for layer, weight in zip(layers, weights)}

        def update(function, layer, value):
            if value is not None: found[layer.name] = function(layer, found.get(layer.name), value)

        def of_all(function, grads):
            for layer, grad in zip(layers, grads): update(function, layer, grad)

        def of_one(read): update(kind.on_input, owners[id(read.weight)], read)

        if kind.on_input: calibration.reads(weights, of_one)
        elif kind.on_sample: calibration.sample_gradients(weights, partial(of_all, kind.on_sample))
        elif kind.on_batch: calibration.batch_gradients(weights, partial(of_all, kind.on_batch))
        return found

    def _can_gather(self, kind):
        "Tell whether there are the data, and the loss, that a kind of evidence is gathered from."
        if self.calibration is None: return False
        if kind.of_loss: return self.calibration.has_loss
        return self.calibration.data is not None or kind.of_model is not None

    def begin(self,
        layers: list,  # those of an event
        names: tuple,  # of the kinds
    ):
        "Update the evidence at the beginning of an event."
        for name in names:
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
        if kind.large and self._can_gather(kind): return self._not_seen(kind, layers)
        if kind.lacking is not None: return kind.lacking(layers, states)
        has_state = kind.start is not None or kind.of_data
        return [has_state and state is None for state in states]

    def _not_seen(self, kind, layers):
        "Tell which layers' inputs cannot be seen."
        if kind.on_input is None: return [False] * len(layers)
        seen = self.calibration.are_read([layer.weight for layer in layers])
        return [id(layer.weight) not in seen for layer in layers]

    def _start(self, name):
        for layer in self.selected.candidates.values(): self._state(name, layer)

    def step(self,
        of: set | None = None,  # ids of the weights that are stepped; None: all
    ):
        """Update the evidence by a training step.

        Call it between backward and step, before gradients are masked."""
        for name in self.names:
            kind = EVIDENCE[name]
            update = kind.on_step
            if update is None or kind.on_batch and self._can_gather(kind): continue
            for layer in self.selected.layers.values():
                if of is not None and id(layer.weight) not in of: continue
                took_part = layer.weight.grad is not None  # a frozen layer has nothing to tell
                if took_part: self._update(name, layer, update)

    def watching(self):
        """Return a context manager in which the inputs of layers update the evidence.

        No hook is left on the model. Seen are linear layers, convolutions and attention, as modules and as
        functions; not embeddings and recurrent layers, nor what is compiled."""
        layers = {id(layer.weight): layer for layer in self.selected.layers.values()}
        return Watching({*layers}, lambda read: self._input(layers[id(read.weight)], read))

    def _input(self, layer, read):
        for name in self.names:
            update = EVIDENCE[name].on_input
            if update is not None: self._update(name, layer, update, read)

    # Saving

    @property
    def of_training(self) -> list:  # of names
        "Return the kinds that training gathers, and that a later one needs."
        return [name for name in self.names if EVIDENCE[name].on_step or EVIDENCE[name].at_once]

    def add_to(self,
        state: dict,  # layer's name: dict, as `Masks.state_dict` returns it
        complete: bool = False,  # with zeros where nothing is known yet: `torch.distributed.checkpoint` loads into what is there
    ):
        "Add what training has gathered about each layer: 'evidence', {kind: tensor, or sum and steps}."
        kinds = self.of_training
        for layer, saved in state.items() if kinds else ():
            told = {kind: self.states.get((kind, layer)) for kind in kinds}
            known = {kind: of for kind, of in told.items() if of is not None}
            if complete: known = self._nothing(layer) | known
            saved['evidence'] = {kind: _plain(of) for kind, of in known.items()}

    def _nothing(self, layer):
        "Return states of a layer that say that nothing is known yet: {kind: a sum over -1 steps}."
        steps, total = none_yet(here(self.selected.candidates[layer].weight))
        return {kind: Gathered(steps - 1, total) for kind in self.of_training if EVIDENCE[kind].on_step}

    def read_from(self,
        state: dict,  # layer's name: dict, as `add_to` has left it
    ) -> dict:  # {(kind, layer's name): state}, as `states`
        """Return what training had gathered, and warn where a state has nothing of it.

        `ValueError` where it does not fit a layer."""
        found = {}
        for layer, saved in state.items():
            told = saved.get('evidence', {})
            if not isinstance(told, Mapping):
                raise ValueError(f'state: got {told!r} as evidence about {layer!r}, expected a dict')
            for kind, of in told.items():
                if kind not in self.of_training: continue
                read = self._read(kind, layer, of)
                says_nothing = isinstance(read, Gathered) and read.steps < 0
                if not says_nothing: found[kind, layer] = read
        if self.of_training and not self._has_any(state):
            kinds = ', '.join(map(repr, self.of_training))
            warnings.warn(f'state: got none of what earlier steps have gathered, {kinds}: it begins anew',
                          stacklevel=4)
        return found

    def _has_any(self, state):
        "Tell whether a state has evidence for this criterion. One from right after an event has none yet."
        told = [saved['evidence'] for saved in state.values() if 'evidence' in saved]
        return any(not of or {*of} & {*self.of_training} for of in told)

    def load(self,
        states: dict,  # of `read_from`
    ):
        "Take over what training had gathered. Of other layers it begins anew."
        kept = {key: of for key, of in self.states.items() if EVIDENCE[key[0]].on_step is None}
        self.states = kept | states

    def _read(self, kind, layer, saved):
        state = Gathered(**saved) if isinstance(saved, dict) and {*saved} == {*Gathered._fields} else saved
        if isinstance(state, Gathered) and not all(isinstance(part, torch.Tensor) for part in state):
            raise ValueError(f'state: got {saved!r} as {kind!r} of {layer!r}, expected two tensors')
        tensor = state.total if isinstance(state, Gathered) else state
        expected = tuple(self.selected.candidates[layer].weight.shape)
        if getattr(tensor, 'shape', expected) == expected: return _plain(state, Gathered)
        came = f'{kind!r} of shape {tuple(tensor.shape)} for {layer!r}'
        raise ValueError(f'state: got {came}, expected {expected}')

    def _state(self, name, layer):
        kind, key = EVIDENCE[name], (name, layer.name)
        if kind.start is not None and key not in self.states: self.states[key] = kind.start(layer)
        if kind.large and self._can_gather(kind): return self._large(name, layer)
        return self.states.get(key)

    def _large(self, name, layer):
        "Return a large state, held no longer. One pass over the data gathers as many as `HELD` allows."
        key = name, layer.name
        if key not in self.held:
            self.held = {}
            found = self._from_data(name, self._next_layers(EVIDENCE[name], layer))
            self.held = {(name, of): state for of, state in found.items()}
        return self.held.pop(key)

    def _next_layers(self, kind, layer):
        "Return a layer and those after it in the event whose large states can be held together."
        names = [one.name for one in self.ahead]
        after = self.ahead[names.index(layer.name) + 1:] if layer.name in names else []
        sizes = accumulate(map(kind.large, [layer, *after]))
        return [layer, *(one for one, size in zip(after, islice(sizes, 1, None)) if size <= HELD)]

    @torch.no_grad()
    def _update(self, name, layer, update, *x):
        self.states[name, layer.name] = update(layer, self._state(name, layer), *x)


def _plain(state, kind=dict):
    "Return a copy of a state that shares no memory; a sum as a dict, which torch loads with weights only."
    if isinstance(state, Gathered): return kind(**{name: t.clone() for name, t in state._asdict().items()})
    return state.clone() if isinstance(state, torch.Tensor) else deepcopy(state)


def made(
    makes: dict,  # kind: (function, names of its parts), as `Evidence.parts` returns them
    parts: dict,  # name: a tensor of one layer, or the same chunk of each; all tensors, or all arrays
) -> dict:  # kind: tensor or array
    "Make evidence of its parts."
    with np.errstate(all='ignore'):  # `check_finite` looks at the scores
        return {kind: make(*(parts[part] for part in of)) for kind, (make, of) in makes.items()}


@compiled('plain')
def _itself(values): return values


def _how(kind):
    if kind.on_step is not None: return 'a training step collects it, with attach or in a fit'
    if kind.on_input is not None: return 'give batches with data=, or run them inside evidence.watching()'
    return 'give batches with data= and a loss with loss_func='
