"Replace layers by faster forms that compute the same, each timed on this machine."
import time
import warnings
from contextlib import contextmanager
from copy import deepcopy
from functools import partial

import torch
from torch import nn

from fasterai.arguments import Inputs, seconds_of
from fasterai.deploy import kernels
from fasterai.deploy.compare import agree, check_copyable, example_inputs, outputs
from fasterai.deploy.folding import fold_norms, followers, replace
from fasterai.deploy.fusing import LINKS, fuse_blocks, unfuse
from fasterai.deploy.kernels.chain import Chain, Link
from fasterai.deploy.kernels.layers import FUSED
from fasterai.deploy.timing import Latency, faster, side_by_side
from fasterai.snapshot import evaluation_mode
from fasterai.tables import as_text

BLOCKS = (32, 16, 8, 4)  # sides of the blocks that are tried, the first that fits is taken
MOST_NONZERO = .6  # share of the weights up to which a layer is tried
MOST_STORED = 1.25  # numbers in the blocks that are stored, of the weights that are not zero
SPARSE = nn.Linear, nn.Conv1d, nn.Conv2d
HALF = frozenset((torch.float16, torch.bfloat16))
TOLERANCE = 1e-4  # sums in another order, relative to the largest output
MOST_IN_ROW, ROW_SECONDS = 8, 2e-4  # calls of a small layer that are timed together

# why a model stays dense
NOTHING_FASTER = ('nothing here is faster than dense: on a CPU sparse kernels pay from about 60 % zeros on, '
                  'CSR from about 80 % in large Linear or 1 × 1 layers, on a GPU the pattern 2:4')
READS_WEIGHTS = 'the model reaches into its layers and does not run with others, so all stay dense'
OTHER_OUTPUTS = 'the whole model would not compute the same with them, so all layers stay dense'


class SparseLinear(nn.Module):
    """Compute a Linear or a 1 × 1 convolution with a sparse weight, stored by rows (CSR) or blocks (BSR).

    It is for inference: its weight cannot be trained."""

    def __init__(self,
        layer: nn.Linear | nn.Conv2d,  # the dense layer; a convolution is 1 × 1, without padding and groups
        block: int = 1,  # side of the blocks; 1 for single weights
    ):
        super().__init__()
        weight = layer.weight.detach().flatten(1)
        self.size, self.block = tuple(weight.shape), block
        self.stride = getattr(layer, 'stride', None)  # None for a Linear
        with _beta_warning_hidden():
            stored = weight.to_sparse_csr() if block == 1 else weight.to_sparse_bsr((block, block))
        self.register_buffer('rows', stored.crow_indices().int())
        self.register_buffer('columns', stored.col_indices().int())
        self.register_buffer('values', stored.values().clone())
        self.register_buffer('bias', None if layer.bias is None else layer.bias.detach().clone())
        self._ready = None

    @torch.no_grad()
    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return self._linear(x) if self.stride is None else self._convolution(x)

    def _linear(self, x):  # (..., inputs) → (..., outputs)
        outer = x.shape[:-1]
        if 0 in outer: return x.new_zeros((*outer, self.size[0]))
        columns = x.to(self.values.dtype).reshape(-1, x.shape[-1]).t()
        return self._product(columns).t().reshape(*outer, self.size[0])

    def _convolution(self, x):  # (..., inputs, height, width), strided → (..., outputs, height, width)
        outer, x = x.shape[:-3], x[..., ::self.stride[0], ::self.stride[1]]
        if 0 in outer: return x.new_zeros((*outer, self.size[0], *x.shape[-2:]))
        x = x.to(self.values.dtype)
        if not outer: x = x[None]
        x = x.transpose(0, 1)  # channels first, so that the rest is one axis
        found = self._product(x.flatten(1)).view(self.size[0], *x.shape[1:])
        found = found.transpose(0, 1).contiguous()
        return found if outer else found[0]

    def _product(self, x):  # (inputs, n) → (outputs, n)
        found = self._weight() @ x
        return found if self.bias is None else found.add_(self.bias[:, None])

    def _weight(self):
        "Return the sparse tensor, made once from the buffers and not saved."
        # the buffers are others after to(), load_state_dict(assign=True) and the like
        if self._ready is None or self._ready.values().data_ptr() != self.values.data_ptr():
            kind = torch.sparse_csr_tensor if self.block == 1 else torch.sparse_bsr_tensor
            with _beta_warning_hidden():
                self._ready = kind(self.rows, self.columns, self.values, self.size, check_invariants=False)
        return self._ready

    def __getstate__(self): return self.__dict__ | {'_ready': None}

    @property
    def options(self):
        "Return what the layer was built with, beside the dense one."
        return {'block': self.block}

    def dense(self) -> nn.Module:  # a Linear or a 1 × 1 convolution
        "Return the dense layer, with the weights that are zero."
        outputs, inputs = self.size
        if self.stride is None: layer = nn.Linear(inputs, outputs, self.bias is not None)
        else: layer = nn.Conv2d(inputs, outputs, 1, self.stride, bias=self.bias is not None)
        layer.weight.data = self._weight().to_dense().view(layer.weight.shape)
        if self.bias is not None: layer.bias.data = self.bias.clone()
        return layer.train(self.training)

    @property
    def unstored(self):
        "Return the share of the weight that is not stored, 0 to 1."
        return 1 - self.values.numel() / (self.size[0] * self.size[1])

    def extra_repr(self):
        shown = f'in_features={self.size[1]}, out_features={self.size[0]}, values={self.values.numel()}'
        if self.block > 1: shown += f', block={self.block}'
        return shown


def realisations(
    layer: nn.Module,  # any layer; for most types there is no other form
) -> dict:  # {name: function that builds it}
    "Find the other forms that a layer could take, on the device where it is."
    if type(layer) is nn.MaxPool2d: return _pooling(layer)
    if type(layer) not in SPARSE: return {}  # a subclass may compute something else
    weight = layer.weight.detach().flatten(1)
    if weight.is_cuda: return _on_gpu(layer, weight)
    if weight.device.type != 'cpu' or weight.dtype != torch.float32 or not weight.numel(): return {}
    if torch.count_nonzero(weight) > MOST_NONZERO * weight.numel(): return {}
    return _products(layer, weight) | _kernels(layer)


def _products(layer, weight):
    "Return the forms that call torch's own sparse products."
    if not _is_matrix(layer): return {}
    found = {'CSR': partial(SparseLinear, layer)}
    side = next((side for side in BLOCKS if _is_of_blocks(weight, side)), None)
    if side: found[f'BSR {side} × {side}'] = partial(SparseLinear, layer, side)
    return found


def _kernels(layer):
    "Return the forms that call the kernels, in two tilings, where there are kernels."
    kind = kernels.SparseLinearKernel if type(layer) is nn.Linear else kernels.SparseConv
    if kernels.library() is None or getattr(layer, 'padding_mode', 'zeros') != 'zeros': return {}
    return {'kernel': partial(kind, layer), 'kernel 2': partial(kind, layer, tiling='other')}


def _pooling(layer):
    # whether it is faster does not depend on zeros; what it replaces is slow where inputs are contiguous
    if kernels.library() is None or layer.return_indices: return {}
    return {'kernel': partial(kernels.MaxPool, layer)}


def _is_matrix(layer):
    "Tell whether a layer multiplies by one matrix: a Linear or a 1 × 1 convolution, no padding, no groups."
    if type(layer) is nn.Linear: return True
    if type(layer) is not nn.Conv2d: return False
    return layer.kernel_size == (1, 1) and layer.groups == 1 and layer.padding in ((0, 0), 'valid')


def _on_gpu(layer, weight):
    fits = type(layer) is nn.Linear and _is_two_of_four(weight)
    return {'2:4': partial(_semi_structured, layer)} if fits else {}


def _is_of_blocks(weight, side):
    "Tell whether blocks of this side divide a weight, and would store few zeros."
    rows, columns = weight.shape
    if rows % side or columns % side: return False
    blocks = weight.view(rows // side, side, columns // side, side).abs().amax((1, 3))
    stored = torch.count_nonzero(blocks) * side ** 2
    return bool(stored <= MOST_STORED * torch.count_nonzero(weight))


def _is_two_of_four(weight):
    "Tell whether a weight is 2:4 sparse, of a type and shape that a GPU's sparse units take."
    rows, columns = weight.shape
    if weight.dtype not in HALF or rows % 32 or columns % 64: return False
    return bool((torch.count_nonzero(weight.view(-1, 4), 1) <= 2).all())


def _semi_structured(layer):
    "Return a copy of a layer with its weight in torch's 2:4 form."
    new = deepcopy(layer)
    weight = torch.sparse.to_sparse_semi_structured(layer.weight.detach())
    new.weight = nn.Parameter(weight, requires_grad=False)
    return new


def speed_up(
    model: nn.Module,  # any dense network with zeros in it; it is not changed
    example,  # a batch as the model takes it: a tuple for several inputs, a dict for keywords; the choice is made for its batch size
    verbose: bool = True,  # print the forms that were tried, and their latencies
    seconds: float = .3,  # time to spend on each layer, about
) -> nn.Module:  # a copy with faster layers, for inference
    """Replace each layer by the fastest form that computes the same; keep it if none is faster here.

    On a CPU, BatchNorms are folded into convolutions first, also in the network that it is compared with, and
    max poolings are tried too. The copy computes in eval mode. `of peak` is the work of the weights that are
    not zero, as a share of what the processor could compute in that time."""
    check_copyable(model)
    seconds = seconds_of(seconds)
    inputs, model = example_inputs(example, model), deepcopy(model)
    expected = outputs(model, inputs)
    device = next((p.device for p in model.parameters()), torch.device('cpu'))
    uses_kernels = device.type == 'cpu' and kernels.library() is not None
    folded = fold_norms(model, inputs, expected) if uses_kernels else model
    new = deepcopy(folded)
    rows, chosen = [], {}
    for layer, (names, x) in _layers_that_run(new, inputs).items():
        built, failed = _build(layer, x)
        if not built and not failed: continue
        dense, *times = _latencies([layer, *built.values()], Inputs((x,)), seconds, device)
        best = min(zip(times, built), key=lambda found: found[0].seconds, default=None)
        kept = best[1] if best and faster(best[0], dense) else 'dense'
        if kept in built: chosen[layer] = built[kept]
        tried = [*failed, *(f'{kind} {_ms(t)}' for kind, t in zip(built, times))]
        took = best[0] if kept in built else dense
        near = _of_peak(layer, x, took) if uses_kernels else ''
        rows.append((names[0], _zeros(layer), _ms(dense), ', '.join(tried), kept, near))
    activations = followers(new, inputs, SPARSE, tuple(FUSED)) if chosen else {}
    for layer, replacement in chosen.items(): new = replace(new, layer, replacement)
    if chosen: new = _fused(new, chosen, activations, inputs, expected)
    if chosen: _fuse_blocks(new, inputs, expected)
    if chosen: new, conclusion = _check(model, folded, new, inputs, expected, device, seconds)
    else: new, conclusion = model, NOTHING_FASTER
    if device.type == 'cpu' and not uses_kernels: conclusion += f'\nno sparse kernels: {kernels.why_not()}'
    if verbose: print(_table(rows, conclusion))
    return new


def layer_latencies(
    model: nn.Module,  # a dense network; it is not changed
    example,  # as in `speed_up`
    masks: dict,  # name of a module: bool masks of its weight
    seconds: float = .3,  # time to spend on each layer, about
) -> dict:  # name: seconds of a call with each mask, in the form that `speed_up` would choose; the dense layer comes first
    "Time layers with masks side by side with the dense layer. One without other forms is not in the result."
    inputs = example_inputs(example, model)
    expected = outputs(model, inputs)
    device = next((p.device for p in model.parameters()), torch.device('cpu'))
    uses_kernels = device.type == 'cpu' and kernels.library() is not None
    folded = fold_norms(model, inputs, expected) if uses_kernels else deepcopy(model)
    layers = {name: folded.get_submodule(name) for name in masks}
    layers = {name: layer for name, layer in layers.items() if type(layer) in SPARSE}
    names = {layer: name for name, layer in layers.items()}
    reads = _first_inputs(folded, inputs, names).items()
    return {names[layer]: _with_masks(layer, masks[names[layer]], x, seconds, device) for layer, x in reads}


def _with_masks(layer, masks, x, seconds, device):
    "Return the seconds of a layer, and of its best form with each mask: its own where none is faster."
    forms = []
    for keep in masks:
        pruned = deepcopy(layer)
        with torch.no_grad(): pruned.weight.masked_fill_(~keep, 0)
        built, _ = _build(pruned, x)
        forms.append(list(built.values()))
    rows = [_in_a_row(form, x) for several in forms for form in several]
    dense, *times = _latencies([layer, *(call for call, _ in rows)], Inputs((x,)), seconds, device)
    found, left = [dense.seconds], iter([_of_one(latency, n) for latency, (_, n) in zip(times, rows)])
    for several in forms:
        tried = [next(left) for _ in several]
        best = min(tried, key=lambda latency: latency.seconds, default=dense)
        found.append(best.seconds if faster(best, dense) else dense.seconds)
    return found


@torch.no_grad()
def _in_a_row(form, x):
    "Return a call of a form as a chain makes it, so many times that Python's part is small, and how many."
    if not isinstance(form, LINKS): return form, 1
    form(x)  # makes its plan
    start = time.perf_counter()
    form(x)
    n = max(1, min(MOST_IN_ROW, round(ROW_SECONDS / (time.perf_counter() - start))))
    return Chain([Link(form, 0)] * n, 1, [n]).call, n


def _of_one(latency, n):
    "Return the latency of one of n calls."
    rounds = tuple(seconds / n for seconds in latency.rounds)
    return Latency(latency.seconds / n, latency.low / n, latency.high / n, rounds)


def _first_inputs(model, inputs, modules):
    "Run a model, and return the first input of each module, {module: tensor}, as they are called."
    found = {}

    def note(module, args):
        if len(args) == 1: found.setdefault(module, args[0].detach().clone())

    hooks = [module.register_forward_pre_hook(note) for module in modules]
    try: outputs(model, inputs)
    finally:
        for hook in hooks: hook.remove()
    return found


def _layers_that_run(model, inputs):
    "Run a model, and return the layers with other forms as they are called: {layer: (names, first input)}."
    names = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module in names or realisations(module): names.setdefault(module, []).append(name)
    return {module: (names[module], x) for module, x in _first_inputs(model, inputs, names).items()}


@torch.no_grad()
def _build(layer, x):
    "Build the forms of a layer that compute the same, {name: module}, and say of the others why not."
    built, failed, expected = {}, [], [layer(x)]
    for kind, make in realisations(layer).items():
        try:
            candidate = make()
            if agree([candidate(x)], expected, TOLERANCE): built[kind] = candidate
            else: failed.append(f'{kind}: other outputs')
        except (RuntimeError, TypeError, ValueError) as error:
            failed.append(f'{kind}: {str(error).splitlines()[0][:60]}')
    return built, failed


def _latencies(models, inputs, seconds, device):
    calls = [partial(inputs.call, model) for model in models]
    with torch.no_grad(): return side_by_side(calls, seconds, device=device)


def _ms(latency): return f'{1e3 * latency.seconds:.3f} ms'


def _fused(model, chosen, activations, inputs, expected):
    "Return a copy whose sparse layers take over the activations behind them, or the model if that is wrong."
    pairs = [(chosen[layer], activation) for layer, activation in activations.items() if layer in chosen]
    pairs = [(layer, activation) for layer, activation in pairs if hasattr(layer, 'fuse')]
    memo = {}
    new = deepcopy(model, memo)
    for layer, activation in pairs:
        memo[id(layer)].fuse(activation)
        replace(new, memo[id(activation)], nn.Identity())
    # something else may have read what a layer returned before its activation
    try: return new if pairs and agree(outputs(new, inputs), expected, 10 * TOLERANCE) else model
    except ValueError: return model


def _fuse_blocks(model, inputs, expected):
    "Let sparse layers add and activate within the blocks of a model, unless that is wrong."
    if not fuse_blocks(model): return
    try: correct = agree(outputs(model, inputs), expected, 10 * TOLERANCE)
    except (RuntimeError, TypeError, ValueError): correct = False
    if not correct: unfuse(model)


def _zeros(layer):
    weight = getattr(layer, 'weight', None)
    if weight is None: return ''
    return f'{100 - 100 * int(torch.count_nonzero(weight)) / weight.numel():.1f} %'


@torch.no_grad()
def _of_peak(layer, x, latency):
    "Return how near a layer comes to the peak, when only multiplications by weights that are not zero count."
    weight = getattr(layer, 'weight', None)
    if weight is None: return ''
    places = layer(x).numel() / len(weight)  # that each weight is used for
    operations = 2 * int(torch.count_nonzero(weight)) * places
    return f'{100 * operations / kernels.peak() / latency.seconds:.0f} %'


def _check(model, folded, new, inputs, expected, device, seconds):
    """Return the new model if it is right and faster as a whole, else a dense one; and a sentence on it.

    Convolutions are compared in torch's other memory format too, which may be faster than their own."""
    try: correct = agree(outputs(new, inputs), expected, 10 * TOLERANCE)
    except ValueError: return model, READS_WEIGHTS
    if not correct: return model, OTHER_OUTPUTS
    rivals = [folded]
    if any(isinstance(m, nn.Conv2d) for m in folded.modules()):
        rivals.append(deepcopy(folded).to(memory_format=torch.channels_last))
    with evaluation_mode(*rivals, new):
        *dense, now = _latencies([*rivals, new], inputs, max(1., seconds), device)
    old, last = dense[0], dense[-1]
    conclusion = f'the whole model: {_ms(old)} before, {_ms(now)} after'
    if len(dense) > 1: conclusion += f' ({_ms(last)} in channels_last)'
    if all(faster(now, rival) for rival in dense):
        return new, f'{conclusion}: {old.seconds / now.seconds:.2f} × as fast'
    if len(dense) > 1 and faster(last, old):
        return rivals[-1], f'{conclusion}, so all layers stay dense and are in channels_last'
    return model, f'{conclusion}, within the noise or slower, so all layers stay dense'


def _table(rows, conclusion):
    head = 'layer', 'zeros', 'dense', 'tried', 'kept', 'of peak'
    table = [as_text([head, *rows], left=5)] if rows else []
    return '\n'.join([*table, f'speed_up: {conclusion}'])


@contextmanager
def _beta_warning_hidden():
    "Hide torch's warning that CSR is in beta."
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Sparse (CSR|BSR)')
        yield
