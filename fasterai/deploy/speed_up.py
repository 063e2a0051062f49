"Faster layers: for each one what is quickest here and agrees."
import warnings
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import nn

from fasterai.deploy.compare import agree, example_inputs, outputs
from fasterai.deploy.timing import faster, side_by_side
from fasterai.tables import as_text

BLOCKS = (32, 16, 8, 4)
TOLERANCE = 1e-4  # sums in another order, relative to the largest output


class SparseLinear(nn.Module):
    "A Linear, or a 1 × 1 convolution, whose weight is stored by rows (CSR) or blocks of rows (BSR). For inference: it does not learn."

    def __init__(self,
        layer: nn.Linear | nn.Conv2d,
        block: int = 1,  # side of the blocks; 1 for single weights
    ):
        super().__init__()
        weight = layer.weight.detach().flatten(1)
        self.size, self.block, self.stride = tuple(weight.shape), block, getattr(layer, 'stride', None)
        with _quiet(): stored = weight.to_sparse_csr() if block == 1 else weight.to_sparse_bsr((block, block))
        self.register_buffer('rows', stored.crow_indices().int())
        self.register_buffer('columns', stored.col_indices().int())
        self.register_buffer('values', stored.values().clone())
        self.register_buffer('bias', None if layer.bias is None else layer.bias.detach().clone())
        self._ready = None

    def _weight(self):
        "The sparse tensor, made once and not saved: the buffers are what is."
        if self._ready is None or self._ready.values().data_ptr() != self.values.data_ptr():
            kind = torch.sparse_csr_tensor if self.block == 1 else torch.sparse_bsr_tensor
            with _quiet(): self._ready = kind(self.rows, self.columns, self.values, self.size, check_invariants=False)
        return self._ready

    def _product(self, x):  # (inputs, n) → (outputs, n)
        found = self._weight() @ x
        return found if self.bias is None else found.add_(self.bias[:, None])

    @torch.no_grad()
    def forward(self, x):
        outer = x.shape[:-1] if self.stride is None else x.shape[:-3]
        if 0 in outer: return x.new_zeros((*outer, self.size[0]) if self.stride is None else (*outer, self.size[0], *self._strided(x).shape[-2:]))
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.values.dtype)
            if self.stride is None: return self._product(x.reshape(-1, x.shape[-1]).t()).t().reshape(*outer, self.size[0])
            x = self._strided(x if outer else x[None]).transpose(0, 1)  # channels first
            found = self._product(x.flatten(1)).view(self.size[0], *x.shape[1:]).transpose(0, 1).contiguous()
            return found if outer else found[0]

    def _strided(self, x): return x[..., ::self.stride[0], ::self.stride[1]]

    def __getstate__(self): return self.__dict__ | {'_ready': None}

    def extra_repr(self):
        return f'in_features={self.size[1]}, out_features={self.size[0]}, values={self.values.numel()}' + (f', block={self.block}' * (self.block > 1))


def realisations(
    layer: nn.Module,
) -> dict:  # name: function that builds it
    "What a layer could be instead, on the device where it is."
    one_by_one = isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1 and layer.padding in ((0, 0), 'valid')
    if type(layer) is not nn.Linear and not (type(layer) is nn.Conv2d and one_by_one): return {}
    weight = layer.weight.detach().flatten(1)
    if weight.is_cuda: return {'2:4': lambda: _semi_structured(layer)} if _is_two_of_four(weight) and type(layer) is nn.Linear else {}
    if weight.dtype != torch.float32 or not weight.numel() or torch.count_nonzero(weight) > .6 * weight.numel(): return {}
    found = {'CSR': lambda: SparseLinear(layer)}
    for side in BLOCKS:
        if any(n % side for n in weight.shape): continue
        blocks = weight.view(weight.shape[0] // side, side, -1, side).abs().amax((1, 3)) != 0
        if torch.count_nonzero(blocks) * side ** 2 > 1.25 * torch.count_nonzero(weight): continue
        found[f'BSR {side} × {side}'] = lambda: SparseLinear(layer, side)
        break
    return found


def _is_two_of_four(weight):
    "Two of four, in a type and shape that a GPU's sparse units take."
    fits = weight.dtype in (torch.float16, torch.bfloat16) and not weight.shape[0] % 32 and not weight.shape[1] % 64
    return fits and bool((torch.count_nonzero(weight.view(-1, 4), 1) <= 2).all())


def _semi_structured(layer):
    "The same layer with its weight in the 2:4 form of torch."
    new = deepcopy(layer)
    new.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(layer.weight.detach()), requires_grad=False)
    return new


def speed_up(
    model: nn.Module,  # any dense network with zeros in it; it is not changed
    example,  # a batch as the model takes it, a tuple for several inputs; it is for batches of about this size that the choice is made
    verbose: bool = True,  # print what was tried
    seconds: float = .3,  # to time each layer, about
) -> nn.Module:  # a copy with faster layers, for inference
    "Replace each layer by what is quickest here and computes the same. What is not faster stays as it is."
    if not isinstance(model, nn.Module): raise TypeError(f'model: got {type(model).__name__}, allowed is a torch.nn.Module')
    inputs, model = example_inputs(example), deepcopy(model)
    expected, new = outputs(model, inputs), deepcopy(model)
    device = next((p.device for p in model.parameters()), torch.device('cpu'))
    rows, chosen = [], {}
    for layer, (names, x) in _seen(new, inputs).items():
        built, tried = {}, []
        with torch.no_grad():
            right = [layer(x)]
            for kind, make in realisations(layer).items():
                try:
                    one = make()
                    if agree([one(x)], right, TOLERANCE): built[kind] = one
                    else: tried.append(f'{kind}: other outputs')
                except RuntimeError as error: tried.append(f'{kind}: {str(error).splitlines()[0][:60]}')
            if not built and not tried: continue
            dense, *times = side_by_side([lambda m=m: m(x) for m in (layer, *built.values())], seconds, device=device)
        tried += [f'{kind} {1e3 * t.seconds:.3f} ms' for kind, t in zip(built, times)]
        best = min(zip(times, built), key=lambda found: found[0].seconds, default=None)
        if best and faster(best[0], dense): chosen[layer] = best[1], built[best[1]]
        rows.append((names[0], f'{1e3 * dense.seconds:.3f} ms', ', '.join(tried), chosen[layer][0] if layer in chosen else 'dense'))
    for layer, (_, replacement) in chosen.items(): new = _replace(new, layer, replacement)
    new, said = _check(model, new, inputs, expected, device, bool(chosen), seconds)
    if verbose: print(_table(rows, said))
    return new


def _seen(model, inputs):
    "The Linears and convolutions that run, by what is called in a run: {layer: (its names, its first input)}."
    names, seen = {}, {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.Linear, nn.Conv2d)): names.setdefault(module, []).append(name)
    def note(module, args):
        if len(args) == 1: seen.setdefault(module, (names[module], args[0].detach().clone()))
    hooks = [m.register_forward_pre_hook(note) for m in names]
    try: outputs(model, inputs)
    finally:
        for hook in hooks: hook.remove()
    return seen


def _replace(model, layer, replacement):
    if model is layer: return replacement.train(layer.training)
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child is layer: module._modules[name] = replacement.train(layer.training)
    return model


def _check(model, new, inputs, expected, device, changed, seconds):
    "The faster model if it is right and faster as a whole, else a copy of the old one; what to say of it."
    if not changed:
        return new, ('nothing here is faster than dense: CSR pays from about 80 % zeros on, in large Linear or 1 × 1 layers on a CPU, '
                     'the pattern 2:4 on a GPU')
    try: right = agree(outputs(new, inputs), expected, 10 * TOLERANCE)
    except ValueError: return model, 'the model reaches into its layers and does not run with others, so all stay dense'
    if not right: return model, 'the whole model would not compute the same with them, so all layers stay dense'
    was = {m: m.training for m in (*model.modules(), *new.modules())}
    for m in was: m.training = False
    with torch.no_grad(): old, now = side_by_side([lambda: model(*inputs), lambda: new(*inputs)], max(1., seconds), device=device)
    for m, mode in was.items(): m.training = mode
    said = f'the whole model: {1e3 * old.seconds:.3f} ms before, {1e3 * now.seconds:.3f} ms after'
    if not faster(now, old): return model, f'{said}, within the noise or slower, so all layers stay dense'
    return new, f'{said}: {old.seconds / now.seconds:.2f} × as fast'


def _table(rows, said):
    table = [as_text([('layer', 'dense', 'tried', 'kept'), *rows], left=4)] if rows else []
    return '\n'.join([*table, f'speed_up: {said}'])


@contextmanager
def _quiet():
    "Without torch's warning that CSR is in beta."
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Sparse (CSR|BSR)')
        yield
