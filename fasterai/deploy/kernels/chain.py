"Run sparse layers that follow each other by one call of the kernels."
import ctypes
from ctypes import c_int64, c_void_p
from itertools import accumulate
from typing import NamedTuple

import torch

from fasterai.deploy.kernels import loading as kernels
from fasterai.deploy.kernels.plans import ConvolutionPlan, MatrixPlan, PoolPlan

LINE = 64  # bytes of a cache line
SHAPES = 4  # of inputs that a chain keeps its calls for
KINDS = {ConvolutionPlan: 0, MatrixPlan: 1, PoolPlan: 2}  # as the C code has them


class Link(NamedTuple):
    """Describe the call of one layer.

    Values are counted from 0: the inputs of the chain, then the results of its links."""
    layer: object  # a sparse layer or a max pooling
    x: int  # number of the value that it reads
    add: int | None = None  # number of the value that is added
    activation: str | None = None  # of this call

    @property
    def reads(self): return {self.x} if self.add is None else {self.x, self.add}

    def call(self, values):
        "Call the layer by itself."
        options = {} if self.add is None else {'add': values[self.add]}
        if self.activation: options['activation'] = self.activation
        return self.layer(values[self.x], **options)

    def planned(self, x):
        "Return what the layer has planned for an input."
        return self.layer._plans.get((x.shape, self.activation))


class Chain:
    """Call layers one after the other.

    The first inputs of a shape pass through the layers themselves, which check them and make their plans.
    From then on all plans are run by a single call into C: between two calls of a layer Python takes as long
    as a small convolution."""

    def __init__(self,
        links: list,  # of `Link`, in the order of their calls
        inputs: int,  # number of values that the chain is called with
        outputs: list,  # numbers of the values that it returns
    ):
        self.links, self.inputs, self.outputs = links, inputs, outputs
        self._runs = {}

    def call(self,
        *inputs,  # tensors
    ):  # the output, or a tuple of several
        "Return what the layers make of inputs."
        run = self._runs.get(tuple([x.shape for x in inputs]))
        # the layers refuse to be traced
        if run is None or kernels.is_traced() or not run.is_current(inputs): return self._first(inputs)
        return run(inputs)

    def _first(self, inputs):
        values = list(inputs)
        for link in self.links: values.append(link.call(values))
        key = tuple(x.shape for x in inputs)
        self._runs.pop(key, None)
        if kernels.library() is not None and _is_planned(self.links, values):
            while len(self._runs) >= SHAPES: self._runs.pop(next(iter(self._runs)), None)
            self._runs[key] = _Run(self, values)
        found = [values[i] for i in self.outputs]
        return found[0] if len(found) == 1 else tuple(found)


def _is_planned(links, values):
    "Tell whether each call has a plan of the kernels."
    made = [link.planned(values[link.x]) for link in links]
    return all(plan is not None and type(plan.plan) in KINDS for plan in made)


class _Step(ctypes.Structure):
    "Hold the arguments of one call as the C code has them."
    _fields_ = [('kind', c_int64), ('plan', c_void_p),
                *[(name, c_int64) for name in ('x', 'x_length', 'y', 'y_length', 'add', 'vectors')],
                ('cuts', c_void_p), ('pieces', c_int64)]


class _Run:
    "Run a chain for inputs of one shape."

    def __init__(self, chain, values):
        planned = [link.planned(values[link.x]) for link in chain.links]
        self.code = kernels.library()
        self._made = [(link.layer, link.layer._plans, made.watched, made.version)
                      for link, made in zip(chain.links, planned)]
        self._plans = [made.plan for made in planned]
        self._out_shapes = [values[i].shape for i in chain.outputs]
        place, self._sizes = _places(chain, [value.numel() for value in values])
        lengths = [-(-4 * size // LINE) * LINE for size in self._sizes]
        *self._offsets, self._between = accumulate(lengths, initial=0)  # in bytes
        self._fields = [_fields(link, plan, values, place, chain.inputs + i)
                        for i, (link, plan) in enumerate(zip(chain.links, self._plans))]
        self._scratch = max(plan.scratch for plan in self._plans)
        self._pointers = c_void_p * (chain.inputs + len(chain.outputs) + len(self._sizes))
        self._steps = {}

    def is_current(self, inputs):
        "Tell whether inputs can be computed with, and no layer has changed."
        for x in inputs:
            if not x.is_cpu or x.dtype is not torch.float32 or x.requires_grad: return False
        for layer, plans, watched, version in self._made:
            if layer._plans is not plans or watched._version != version or layer.training: return False
        return True

    def __call__(self, inputs):
        threads, team = kernels.threads()
        steps = self._steps.get(threads) or self._steps_for(threads)
        # what is between is kept for the next call: new memory costs as much time as a layer
        at, size = kernels.scratch(self._between + self._scratch * threads)
        between = [at + offset for offset in self._offsets]
        inputs = [x if x.is_contiguous() else x.contiguous() for x in inputs]
        new = inputs[0].new_empty
        outputs = [new(shape) for shape in self._out_shapes]
        memory = self._pointers(*[tensor.data_ptr() for tensor in (*inputs, *outputs)], *between)
        at, size = at + self._between, size - self._between
        kernels.checked(self.code.run_chain(steps, len(steps), memory, at, size, threads, team))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _steps_for(self, threads):
        steps = []
        for fields, plan in zip(self._fields, self._plans):
            cuts, pieces = plan.pieces(threads)
            steps.append(_Step(**fields, cuts=cuts, pieces=pieces))
        self._steps[threads] = found = (_Step * len(steps))(*steps)
        return found


def _fields(link, plan, values, place, result):
    "Return the fields of a step but for its pieces."
    x, y = values[link.x], values[result]
    return {'kind': KINDS[type(plan)], 'plan': plan.pointer, 'x': place[link.x], 'x_length': x.numel(),
            'y': place[result], 'y_length': y.numel(), 'add': -1 if link.add is None else place[link.add],
            'vectors': getattr(plan, 'vectors', 1)}


def _places(chain, sizes):
    """Return {number of a value: its memory}, and the sizes of those between, in floats.

    Memories are counted from 0: inputs, outputs, and those between, which are taken again when what they hold
    is not read any more; the last that has become free first, for it may be in a cache."""
    place = dict.fromkeys(range(chain.inputs)) | {i: chain.inputs + n for n, i in enumerate(chain.outputs)}
    for i in range(chain.inputs): place[i] = i
    last = {value: number for number, link in enumerate(chain.links) for value in link.reads}
    first, between, free = chain.inputs + len(chain.outputs), [], []
    for number, link in enumerate(chain.links):
        result = chain.inputs + number
        if result not in place: place[result] = first + _taken(between, free, sizes[result])
        for value in link.reads:
            if last[value] == number and place[value] >= first: free.append(place[value] - first)
    return place, between


def _taken(between, free, size):
    "Take a free memory, or a new one; return its number."
    fits = [memory for memory in free if between[memory] >= size]
    if fits: memory = fits[-1]
    elif free: memory = max(free, key=lambda one: between[one])
    else:
        between.append(size)
        return len(between) - 1
    free.remove(memory)
    between[memory] = max(between[memory], size)
    return memory
