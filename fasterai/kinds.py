"List the kinds of evidence: what a criterion may ask for, and how each is collected."
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from fasterai.curvature import BLOCK, inverse_diagonals
from fasterai.inputs import as_matrix, form_of, from_matrix
from fasterai.native.sweep import compiled
from fasterai.peers import ALONE, Alone
from fasterai.synflow import synaptic_flow

PIECE = 1 << 16  # weights of which a step is added up together, on a CPU


@dataclass(frozen=True)
class Kind:
    """Describe a kind of evidence, as a row of `EVIDENCE`: how it begins, is updated, and is read.

    A kind that keeps a state has an update, which returns the new one, and perhaps a `start`. `on_step` is
    called by training; the other updates by data that the Sparsifier was given, anew for each event. Their
    state is `Gathered` or `InputSum`, whose sums processes add up."""
    read: Callable  # (layer, state) -> the tensor that a criterion gets, or `Computed`, from which it is made chunk by chunk
    start: Callable | None = None  # (layer) -> state; None: the state is None to begin with
    on_step: Callable | None = None  # (layer, state) -> state, between backward and step, before gradients are masked
    on_event: Callable | None = None  # (layer, state) -> state, once at the beginning of each event
    on_input: Callable | None = None  # (layer, state, read) -> state, for each `inputs.Read` of the layer
    on_batch: Callable | None = None  # (layer, state, grad) -> state, for the gradient of each batch
    on_sample: Callable | None = None  # (layer, state, grad) -> state, for the gradient of each single sample
    of_model: Callable | None = None  # (layers, calibration) -> {layer's name: state}, for what is known of all layers at once
    needs_loss: bool = False  # `of_model` computes gradients of the loss
    large: Callable | None = None  # (layer) -> bytes of a state that is large: it is gathered where it is read, of few layers at a time, and not kept
    anew: bool = False  # it is begun anew after each event that succeeded: the state of the event's layers is let go
    lacking: Callable | None = None  # (layers, states) -> bool for each, True where there is nothing to read; None: where it has no state yet
    how: str = ''  # how to supply it, for the error where no layer has it
    weight_shaped: bool = True  # the tensor has the weight's shape, so that it can be read in chunks
    at_once: bool = False  # it starts when the Sparsifier is made; else where it is first updated or read

    @property
    def of_data(self) -> bool:
        "Tell whether only data can supply it, not the steps of a training."
        return any((self.on_input, self.on_sample, self.of_model))

    @property
    def of_loss(self) -> bool:
        "Tell whether it takes a loss to gather it from data."
        return any((self.on_batch, self.on_sample, self.needs_loss))


class Computed(NamedTuple):
    "Hold what a kind of evidence is computed from, entry by entry, so that it can be made of chunks."
    make: Callable  # (*parts) -> values; parts are all tensors or all arrays, and are not written into
    parts: dict  # name, for errors: tensor of the weight's shape


# The gradient of one batch

def _grad(layer, state=None):
    if state is not None: return state.total / state.steps  # of data
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


def _add_step(value, layer, state): return _add(value, layer, state, _grad(layer))


def _add(value, layer, state, grad):
    "Return a sum with the value of a gradient added, and one step more where that is not all zero."
    steps, total = none_yet(layer.weight) if state is None else _here(layer, state)
    weight = layer.weight.detach()
    for piece in _pieces(weight): total[piece].add_(value(weight[piece], grad[piece]))
    return Gathered(steps + _any(grad), total)


def none_yet(
    weight: torch.Tensor,
) -> Gathered:
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
    """Make a row of the mean of a value over the steps since the last event, or over batches of data.

    Where there was neither, it is the value of the gradient that is there."""
    def read(layer, state):
        if state is None: return Computed(value, {'weight': layer.weight, 'grad': _grad(layer)})
        steps, total = _here(layer, state)
        return Computed(partial(_divided, _number(steps)), {name: total})
    return Kind(read, on_step=partial(_add_step, value), on_batch=partial(_add, value), anew=True,
                lacking=_took_no_part, how='call after loss.backward() and before optimizer.zero_grad(), '
                    'or attach the optimizer, whose steps collect it')


def _number(steps): return steps.item() if ALONE.on_host(steps) else steps


@compiled('quotient')
def _divided(number, total): return total / number


def _gradient(weight, grad): return grad


def _weight_times_grad(weight, grad): return widened(weight) * widened(grad)


@compiled('product')
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


# What layers read

class InputSum(NamedTuple):
    "Hold a sum over what a layer reads, for the matrices of its weight."
    form: tuple  # (groups, transposed), as `inputs.as_matrix` takes them
    total: torch.Tensor  # float64


def _add_squares(layer, state, read):
    "Return the sum of the squares of each input: the diagonal of the Gram matrix."
    def squares(rows): return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()
    return _added(state, read, squares)  # (groups, inputs)


def _add_products(layer, state, read):
    "Return the sum of the products of all pairs of inputs: the Gram matrix."
    def products(rows): return (rows.transpose(1, 2) @ rows).double()
    return _added(state, read, products)  # (groups, inputs, inputs)


def _added(state, read, value):
    "Return a sum with what one call reads; several groups where a weight packs those of several inputs."
    for piece in read.pieces():
        new = _by_part(read, value(widened(piece.rows())))
        total = new if state is None else state.total.to(new.device) + new
        state = InputSum((len(total), read.transposed), total)
    return state


def _by_part(read, new):
    "Return what one call reads as that of the query, key or value, where attention packs their weights."
    if read.part is None: return new
    third = len(read.weight) // 3
    first, last = (row // third for row in read.part)
    found = new.new_zeros(3, *new.shape[1:])
    found[first:last] = new
    return found


def summed(
    peers: Alone,  # the processes, each of which has data of its own
    states: dict,  # layer's name: `Gathered` or `InputSum`
) -> dict:  # layer's name: state
    "Return the states of evidence over the data of all processes."
    tensors = {}
    for name, state in states.items():
        form = state.form if isinstance(state, InputSum) else None
        tensors[name, form] = state.total
        if form is None: tensors[name, 'steps'] = torch.as_tensor(state.steps, device=state.total.device)
    found = peers.summed(tensors)
    return {name: _state_of(found, name, form) for name, form in found if form != 'steps'}


def _state_of(found, name, form):
    total = found[name, form]
    return Gathered(found[name, 'steps'], total) if form is None else InputSum(form, total)


def _input_norm(layer, state):
    "Return ‖x‖ of the input that each weight is multiplied by."
    weight, (groups, transposed) = layer.weight, state.form
    norms = state.total.sqrt().to(torch.promote_types(weight.dtype, torch.float32))
    outputs = weight.numel() // norms.numel()
    matrix = norms[:, None, :].expand(groups, outputs, -1)
    return from_matrix(matrix.to(weight.device), weight.shape, groups, transposed)


def _gram(layer, state):
    "Return the Gram matrix, with an axis for the groups where there are several."
    gram = state.total.to(layer.weight.device, torch.promote_types(layer.weight.dtype, torch.float32))
    return gram[0] if len(gram) == 1 else gram


def _bytes_of_gram(layer):
    groups, _, inputs = as_matrix(layer.weight, *form_of(layer.grouping.axes)).shape
    return 8 * groups * inputs ** 2


# The Fisher information

def _add_sample(layer, state, grad):
    "Return the sum of the squares of the gradients of single samples, of those too whose gradient is zero."
    n, total = (0, torch.zeros_like(widened(grad))) if state is None else state
    return Gathered(n + 1, total.add_(_square(None, grad)))


def _add_rows(layer, state, grad):
    "Return the sum of the products of the gradients of all pairs of weights of an output."
    return _add_pairs(as_matrix(widened(grad), *form_of(layer.grouping.axes)).flatten(0, 1), state)


def _add_blocks(layer, state, grad):
    "Return the sum of the products of the gradients of all pairs of weights of a block of neighbours."
    flat = widened(grad).flatten()
    size = min(BLOCK, len(flat))
    return _add_pairs(torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size), state)


def _bytes_of_rows(layer):
    inputs = as_matrix(layer.weight, *form_of(layer.grouping.axes)).shape[2]
    return _item(layer.weight) * layer.weight.numel() * inputs


def _bytes_of_blocks(layer): return _item(layer.weight) * layer.weight.numel() * BLOCK


def _item(weight):
    "Return the bytes of a sum over a weight: half precision is widened."
    return torch.promote_types(weight.dtype, torch.float32).itemsize


def _add_pairs(rows, state):
    products = rows[:, :, None] * rows[:, None, :]
    steps, total = (0, torch.zeros_like(products)) if state is None else state
    return Gathered(steps + 1, total.add_(products))


def _sample_mean(layer, state):
    return Computed(partial(_divided, _number(state.steps)), {'grad_squares': state.total})


def _mean_of_pairs(layer, state): return state.total / _number(state.steps)


# Others

def _initial(layer, state): return state.to(layer.weight.device)


def _of_model(layer, state): return state.to(layer.weight.device)


def _copy(layer): return layer.weight.detach().clone()


def _noise(layer, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(layer.weight.shape, generator=generator).to(layer.weight.device)


def _draw_seed(layer, state): return int(torch.randint(2 ** 62, ()))  # by torch's own seed


# To add a kind of evidence, write a row. A criterion asks for it by naming an argument so.
EVIDENCE = {
    'weight': Kind(read=lambda layer, state: layer.weight),
    'grad': Kind(read=_grad, on_batch=partial(_add, _gradient), lacking=_took_no_part,
                 how='call after loss.backward() and before optimizer.zero_grad()'),
    'noise': Kind(read=_noise, on_event=_draw_seed),
    'initial': Kind(read=_initial, start=_copy, at_once=True),
    'grad_mean': _mean('grad_mean', _gradient),
    'saliency': _mean('saliency', _saliency),
    'batch_squares': _mean('batch_squares', _square),
    'movement': Kind(read=_movement, on_step=partial(_add_step, _weight_times_grad), lacking=_no_steps),
    'input_norm': Kind(read=_input_norm, on_input=_add_squares),
    'gram': Kind(read=_gram, on_input=_add_products, large=_bytes_of_gram, weight_shaped=False),
    'grad_squares': Kind(read=_sample_mean, on_sample=_add_sample),
    'fisher_rows': Kind(read=_mean_of_pairs, on_sample=_add_rows, large=_bytes_of_rows, weight_shaped=False),
    'fisher_blocks': Kind(read=_mean_of_pairs, on_sample=_add_blocks, large=_bytes_of_blocks,
                          weight_shaped=False),
    'inverse_diagonal': Kind(read=_of_model, of_model=inverse_diagonals, needs_loss=True),
    'flow': Kind(read=_of_model, of_model=synaptic_flow),
}
