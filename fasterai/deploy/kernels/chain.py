"Run sparse layers that follow each other by one call of the kernels."
import ctypes
from ctypes import c_int64, c_void_p
from itertools import accumulate
from typing import NamedTuple

import torch

from fasterai.deploy.kernels import loading as kernels
from fasterai.deploy.kernels.plans import ConvolutionPlan, MatrixPlan, PoolPlan
from fasterai.deploy.kernels.tiling import l2_bytes

LINE = 64  # bytes of a cache line
STREAMED = .5  # what a byte of weights costs, which are read in order, against one of what is between
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
        threads, team = kernels.threads()
        run = self._runs.get((threads, *[x.shape for x in inputs]))
        is_refused = kernels.is_traced()  # by the layers
        if run is None or is_refused or not run.is_current(inputs): return self._first(inputs, threads)
        return run(inputs, team)

    def _first(self, inputs, threads):
        values = self._called(inputs)
        key = threads, *[x.shape for x in inputs]
        self._runs.pop(key, None)
        if kernels.library() is not None and _is_planned(self.links, values):
            while len(self._runs) >= SHAPES: self._runs.pop(next(iter(self._runs)), None)
            slabs = _slabs(self.links, values, threads)
            if slabs > 1: values = self._called([x[:len(x) // slabs] for x in inputs])
            self._runs[key] = run = _Run(self, values, slabs, threads)
            if slabs > 1: return run(inputs, kernels.threads()[1])
        found = [values[i] for i in self.outputs]
        return found[0] if len(found) == 1 else tuple(found)

    def _called(self, inputs):
        "Return the inputs, and what the layers make of them."
        values = list(inputs)
        for link in self.links: values.append(link.call(values))
        return values


def _is_planned(links, values):
    "Tell whether each call has a plan of the kernels."
    made = [link.planned(values[link.x]) for link in links]
    return all(plan is not None and type(plan.plan) in KINDS for plan in made)


def _slabs(links, values, threads):
    """Return in how many slabs a batch passes through a chain.

    A slab that is small stays in the second cache from layer to layer, but each slab reads all weights. The
    number is that with which the least comes from behind that cache."""
    images = len(values[0]) if values[0].ndim else 0
    if any(values[link.x].ndim <= link.layer.item_axes for link in links): return 1
    if any(len(x) != images for x in values): return 1
    sizes = [4 * value.numel() for value in values]  # bytes
    results = sizes[-len(links):]
    moved = [sum(sizes[i] for i in link.reads) + size for link, size in zip(links, results)]
    weights = sum(6 * link.layer.values.numel() for link in links if hasattr(link.layer, 'values'))

    def cost(slabs):
        together = threads if slabs == 1 else 1
        beyond = sum(size for size in moved if size > slabs * together * l2_bytes())
        return beyond + STREAMED * weights * max(slabs, together)
    numbers = [n for n in range(2, images + 1) if images % n == n % threads == 0]
    return min([1, *numbers], key=cost)


class _Chain(ctypes.Structure):
    "Hold the arguments of a chain as the C code has them."
    _fields_ = [('step', c_void_p), *[(name, c_int64) for name in ('steps', 'slabs', 'shared', 'between')],
                ('floats', c_void_p), ('memory', c_void_p)]


class _Step(ctypes.Structure):
    "Hold the arguments of one call as the C code has them."
    _fields_ = [('kind', c_int64), ('plan', c_void_p),
                *[(name, c_int64) for name in ('x', 'x_length', 'y', 'y_length', 'add', 'vectors')],
                ('cuts', c_void_p), ('pieces', c_int64)]


class _Run:
    "Run a chain for inputs of one shape."

    def __init__(self, chain, values, slabs=1, threads=1):  # values of one slab
        planned = [link.planned(values[link.x]) for link in chain.links]
        self.code, self.threads = kernels.library(), threads
        self._made = [(link.layer, link.layer._plans, made.watched, made.version)
                      for link, made in zip(chain.links, planned)]
        self._plans = [made.plan for made in planned]
        results = [values[i] for i in chain.outputs]
        self._out_shapes = [(slabs * len(y), *y.shape[1:]) if slabs > 1 else y.shape for y in results]
        place, self._sizes = _places(chain, [value.numel() for value in values])
        lengths = [-(-4 * size // LINE) * LINE for size in self._sizes]
        *self._offsets, self._between = accumulate(lengths, initial=0)  # in bytes
        self._steps = (_Step * len(planned))()
        for i, (link, plan) in enumerate(zip(chain.links, self._plans)):
            cuts, pieces = plan.pieces(threads if slabs == 1 else 1)
            fields = _fields(link, plan, values, place, chain.inputs + i)
            self._steps[i] = _Step(**fields, cuts=cuts, pieces=pieces)
        shared = [value.numel() for value in (*values[:chain.inputs], *results)]
        floats = [*shared, *[offset // 4 for offset in self._offsets]]
        self._floats, self._pointers = (c_int64 * len(floats))(*floats), c_void_p * len(shared)
        self._chain = (ctypes.addressof(self._steps), len(planned), slabs, len(shared), self._between,
                       ctypes.addressof(self._floats))
        scratch = threads * max(plan.scratch for plan in self._plans)
        self._scratch = scratch + self._between * (1 if slabs == 1 else threads)

    def is_current(self, inputs):
        "Tell whether inputs can be computed with, and no layer has changed."
        for x in inputs:
            if not x.is_cpu or x.dtype is not torch.float32 or x.requires_grad: return False
        for layer, plans, watched, version in self._made:
            if layer._plans is not plans or watched._version != version or layer.training: return False
        return True

    def __call__(self, inputs, team):
        # what is between is kept for the next call: new memory costs as much time as a layer
        at, size = kernels.scratch(self._scratch)
        inputs = [x if x.is_contiguous() else x.contiguous() for x in inputs]
        new = inputs[0].new_empty
        outputs = [new(shape) for shape in self._out_shapes]
        memory = self._pointers(*[tensor.data_ptr() for tensor in (*inputs, *outputs)])
        chain = _Chain(*self._chain, ctypes.addressof(memory))
        kernels.checked(self.code.run_chain(ctypes.addressof(chain), at, self._scratch, self.threads, team))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


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
