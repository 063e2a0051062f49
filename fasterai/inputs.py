"Show what a layer reads as a matrix, and its weight as one, so that their product is the output."
from collections.abc import Callable, Iterator
from fractions import Fraction
from inspect import signature
from math import prod
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fasterai.arguments import Inputs
from fasterai.operations import argument, layer_call, plain
from fasterai.snapshot import undisturbed

PIECE = 2 ** 26  # bytes of the rows of a convolution that are made at once


def form_of(
    axes: dict,  # {axis: length} of a weight, as in `granularity.AXES`
) -> tuple:  # (groups, transposed), as `as_matrix` takes them
    "Return how a weight is a matrix."
    order = [axis for axis in axes if axis in ('I', 'O')]
    return axes.get('G', 1), order[:1] == ['I']


def as_matrix(
    weight: torch.Tensor,  # of a linear layer or a convolution: the weight, its mask, or its scores
    groups: int = 1,  # of a convolution
    transposed: bool = False,  # True for a transposed convolution
) -> torch.Tensor:  # (groups, outputs of a group, inputs of an output)
    "Return a weight as a matrix for each group: a row has what one output reads."
    if not transposed: return weight.reshape(groups, len(weight) // groups, -1)
    kernel = tuple(range(2, weight.ndim))
    split = weight.flip(kernel).reshape(groups, -1, *weight.shape[1:])  # (groups, I, O, kernel …)
    return split.transpose(1, 2).flatten(2)


def from_matrix(
    matrix: torch.Tensor,  # of `as_matrix`
    shape: tuple,  # of the weight
    groups: int = 1,  # of a convolution
    transposed: bool = False,  # True for a transposed convolution
) -> torch.Tensor:  # of that shape
    "Return a weight from its matrices."
    if not transposed: return matrix.reshape(shape)
    inputs, outputs, *kernel = shape
    split = matrix.reshape(groups, outputs, inputs // groups, *kernel).transpose(1, 2)
    return split.reshape(shape).flip(tuple(range(2, len(shape))))


class Read(NamedTuple):
    "Describe one call of a layer: what it reads, and how its weight is a matrix."
    weight: nn.Parameter
    input: torch.Tensor
    settings: dict  # of a convolution: stride, padding, dilation, groups, output_padding
    transposed: bool = False  # of a transposed convolution, and where inputs come first
    real: torch.Tensor | None = None  # bool (batch, length): False where a token is padding; None where all are real
    part: tuple | None = None  # (start, stop): the rows of the weight that meet this input; None for all

    @property
    def groups(self) -> int:
        "Return the number of groups of a convolution; 1 for a linear layer."
        return self.settings.get('groups', 1)

    def rows(self) -> torch.Tensor:  # (groups, n, inputs of an output)
        "Return a row of inputs for each output position; of a linear layer none for a padded token."
        if not self.settings: return only_real(self.input, self.real).reshape(1, -1, self.input.shape[-1])
        kernel = self.weight.shape[2:]
        x = self.input if self.input.ndim == len(kernel) + 2 else self.input[None]  # a picture without a batch
        spread = _transposed if self.transposed else _padded
        x, stride, dilation = spread(x, kernel, self.settings)
        for axis, (k, step, apart) in enumerate(zip(kernel, stride, dilation)):
            x = x.unfold(2 + axis, apart * (k - 1) + 1, step)[..., ::apart]
        n = len(kernel)  # (pictures, channels, positions …, kernel …)
        x = x.permute(0, *range(2, 2 + n), 1, *range(2 + n, 2 + 2 * n))
        rows = x.reshape(prod(x.shape[:1 + n]), self.groups, -1)
        return rows.transpose(0, 1)

    @property
    def uses(self) -> int:
        "Return the number of multiply-adds that each weight takes part in, padding included."
        if self.transposed: return self.input.numel() // len(self.weight)  # one for each place of the input
        return self._replace(input=self.input.to('meta'), real=None).rows().shape[1]

    def pieces(self) -> Iterator:  # of `Read`
        "Return a call in parts of the batch, so that the rows of each part take little memory."
        kernel = self.weight.shape[2:]
        is_batch = self.input.ndim == len(kernel) + 2
        if not self.settings or not is_batch: return iter([self])  # the rows are the input
        size = self.input.numel() * prod(kernel) * self.input.element_size()
        n = max(1, len(self.input) * PIECE // max(1, size))
        return (self._replace(input=part) for part in self.input.split(n))

    def matrix(self,
        weight: torch.Tensor,  # of this layer's weight's shape: the weight, or its mask
    ) -> torch.Tensor:  # (groups, outputs of a group, inputs of an output)
        "Return a weight, or the part that meets this input, as a matrix for each group."
        return as_matrix(self.part_of(weight), self.groups, self.transposed)

    def from_matrix(self,
        matrix: torch.Tensor,  # of `matrix`
    ) -> torch.Tensor:  # of the shape of the weight, or of the part that meets this input
        "Return a weight from its matrices."
        return from_matrix(matrix, self.part_of(self.weight).shape, self.groups, self.transposed)

    def part_of(self,
        weight: torch.Tensor,  # of this layer's weight's shape
    ) -> torch.Tensor:  # a view
        "Return the rows of a weight that meet this input, where a weight packs those of several."
        return weight if self.part is None else weight[slice(*self.part)]


def only_real(
    x: torch.Tensor,  # (batch, length, features), or any other
    real: torch.Tensor | None,  # bool (batch, length): False where a token is padding
) -> torch.Tensor:  # (tokens, features), or `x` where it has not these axes
    "Return the features of the tokens that are no padding."
    if real is None or x.shape[:-1] != real.shape: return x
    return x[real.to(x.device)]


def _padded(x, kernel, settings):
    "Return the input with the padding of a convolution, its stride and its dilation."
    n = len(kernel)
    stride, dilation = _each(settings['stride'], n), _each(settings['dilation'], n)
    padding = settings['padding']
    if padding == 'valid': padding = 0
    if padding == 'same':
        missing = [apart * (k - 1) for k, apart in zip(kernel, dilation)]
        both = [(m // 2, m - m // 2) for m in missing]
    else: both = [(p, p) for p in _each(padding, n)]
    return F.pad(x, [p for pair in reversed(both) for p in pair]), stride, dilation


def _transposed(x, kernel, settings):
    "Return the input of a transposed convolution for a convolution that makes the same of it."
    n = len(kernel)
    stride, padding, dilation = (_each(settings[name], n) for name in ('stride', 'padding', 'dilation'))
    spread = [(length - 1) * step + 1 for length, step in zip(x.shape[2:], stride)]
    apart = x.new_zeros(*x.shape[:2], *spread)
    apart[(..., *(slice(None, None, step) for step in stride))] = x
    more = _each(settings['output_padding'], n)
    pads = [(d * (k - 1) - p, d * (k - 1) - p + m) for k, d, p, m in zip(kernel, dilation, padding, more)]
    return F.pad(apart, [p for pair in reversed(pads) for p in pair]), (1,) * n, dilation


def _each(value, n): return (value,) * n if isinstance(value, int) else tuple(value) * (n // len(value))


# Watching

CONVOLUTION = 'stride padding dilation groups'.split()
TRANSPOSED = 'stride padding output_padding groups dilation'.split()
DEFAULTS = {'stride': 1, 'padding': 0, 'dilation': 1, 'groups': 1, 'output_padding': 0}


class Stop(Exception):
    "End a forward pass, of which all was seen that was to be seen."


class Watching(TorchFunctionMode):
    """Report what layers read, inside a `with` block. No hook is left on the model.

    Seen are linear layers, convolutions and the attention of torch, as modules and as functions; not
    embeddings and recurrent layers, nor what is compiled. A weight of attention that packs those of query,
    key and value is seen once where all read one tensor, else in parts."""

    def __init__(self,
        weights: set,  # ids of the weights to watch
        report: Callable,  # gets a `Read`
        real: torch.Tensor | None = None,  # bool (batch, length): False where a token is padding, as `real_positions` finds it
    ):
        super().__init__()
        self.weights, self.report, self.real = weights, report, real

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for read in reads(function, args, kwargs, self.weights):
            real = self.real if read.real is None else read.real
            self.report(read._replace(real=real))
        return function(*args, **kwargs)


def uses(
    model: nn.Module,
    inputs: Inputs,  # of one call
    weights: set,  # ids of the weights that are meant
) -> dict:  # id of a weight: number of multiply-adds of each of its numbers, 1 or more
    """Count in how many multiply-adds of one call each number of a weight takes part, by running the model.

    It is the number of places of a layer's output, of all items together, over all calls of the layer. Of a
    weight that packs the projections of several inputs it is the mean. Missing are weights that `Watching`
    does not see, and those that did not run."""
    found = {}

    def note(read):
        start, stop = read.part or (0, len(read.weight))
        share = Fraction(stop - start, len(read.weight))
        found[id(read.weight)] = found.get(id(read.weight), 0) + share * read.uses

    with undisturbed(model), torch.no_grad(), Watching(weights, note): inputs.call(model)
    return {i: max(1, round(n)) for i, n in found.items() if n}


def reads(
    function: Callable,  # of torch
    args: tuple,  # of its call
    kwargs: dict,
    weights: set,  # ids of the weights that are meant
) -> Iterator:  # of `Read`
    "Yield what the layers read that a function of torch is."
    name = plain(function.__name__)
    found = _attention(args, kwargs, weights) if name == ATTENTION else _layer(name, args, kwargs)
    yield from (read for read in found if id(read.weight) in weights)


def _layer(name, args, kwargs):
    "Return what a linear layer or a convolution reads."
    call = layer_call(name, args, kwargs)
    if call is None or not isinstance(call.input, torch.Tensor): return []
    if name in ('linear', 'addmm'):  # the weight of the second has its inputs first
        return [Read(call.weight, call.input.detach(), {}, name == 'addmm')]
    transposed = 'transpose' in name
    names = TRANSPOSED if transposed else CONVOLUTION
    settings = {key: argument(args, kwargs, 3 + i, key, DEFAULTS[key]) for i, key in enumerate(names)}
    return [Read(call.weight, call.input.detach(), settings, transposed)]


# Attention

ATTENTION = 'multiheadattentionforward'
ARGUMENTS = signature(F.multi_head_attention_forward)


def _attention(args, kwargs, weights):
    "Yield what the projections of attention read, with the batch first."
    call = ARGUMENTS.bind(*args, **kwargs).arguments
    query, key, value = (call[name] for name in ('query', 'key', 'value'))
    mask = call.get('key_padding_mask')
    keys = None if mask is None else mask == 0  # True or −inf is padding
    queries = keys if query is key else None
    read = [(query, queries), (key, keys), (value, keys)]
    for weight, i, part in _projections(call, query is key, key is value):
        x, real = read[i]
        if isinstance(weight, nn.Parameter): yield Read(weight, _batch_first(x), {}, real=real, part=part)
    weight = call['out_proj_weight']
    if isinstance(weight, nn.Parameter) and id(weight) in weights:
        yield Read(weight, _batch_first(_attended(call, weight)), {}, real=queries)


def _projections(call, same_query, same_value):
    "Return the weights of query, key and value: (weight, which of the three it reads, its part)."
    if call.get('use_separate_proj_weight'):
        return [(call[f'{name}_proj_weight'], i, None) for i, name in enumerate('qkv')]
    weight = call['in_proj_weight']
    n = len(weight) // 3
    if same_query and same_value: return [(weight, 0, None)]
    if same_value: return [(weight, 0, (0, n)), (weight, 1, (n, 3 * n))]
    return [(weight, i, (i * n, i * n + n)) for i in range(3)]


def _attended(call, weight):
    "Return what attention gives to its last projection: its result with the identity for that."
    identity = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    changed = {'out_proj_weight': identity, 'out_proj_bias': None, 'training': False}
    with torch.no_grad(): return F.multi_head_attention_forward(**(call | changed))[0]


def _batch_first(x):
    "Return an input of attention, (length, batch, features), with the batch first, if it has one."
    return x.detach().transpose(0, 1) if x.ndim == 3 else x.detach()
