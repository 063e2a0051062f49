"Save what `speed_up` has made, in a file that starts fast."
import json
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn

from fasterai.deploy.compare import check_copyable
from fasterai.deploy.container import listed, parse, read_header, refusal
from fasterai.deploy.files import load_sparse, save_state, state_of
from fasterai.deploy.folding import NORMS, replace
from fasterai.deploy.fusing import fuse_blocks, fused_names
from fasterai.deploy.kernels.layers import FUSED, MaxPool, SparseConv, SparseLinearKernel
from fasterai.deploy.placing import checked_path, named_errors, open_plain
from fasterai.deploy.speed_up import SparseLinear
from fasterai.deploy.table import altered, read_table

FORMS = {form.__name__: form for form in (SparseConv, SparseLinearKernel, SparseLinear, MaxPool)}
GONE = nn.Identity.__name__  # what `speed_up` leaves of a BatchNorm or an activation
MAY_GO = *NORMS.values(), *FUSED


def save_fast(
    model: nn.Module,  # what `speed_up` has returned
    path: str | Path,  # the file to write, as `save_sparse` does
):
    """Write a network that `speed_up` has made to one safetensors file, with the form of each layer.

    The weights are packed as those of `save_sparse`, so the file is as small. It holds for all processors
    what was fastest on this one. Errors are those of `save_sparse`."""
    check_copyable(model)
    layers = dict(model.named_modules())
    forms = {name: _form(layer) for name, layer in layers.items() if type(layer).__name__ in {*FORMS, GONE}}
    told = {'layers': forms, 'blocks': fused_names(model),
            'channels_last': any(map(_is_channels_last, layers.values()))}
    dense = deepcopy(model)
    for layer in list(dense.modules()):
        if hasattr(layer, 'dense'): dense = replace(dense, layer, layer.dense())
    save_state(state_of(dense), path, json.dumps(told))


def load_fast(
    model: nn.Module,  # a model of the architecture that `speed_up` was given; it is not changed
    path: str | Path,  # a file that `save_fast` has written
) -> nn.Module:  # a copy with the layers and tensors of the file, for inference
    """Return a fast network from a file that `save_fast` has written, without timing anything.

    On a machine without a compiler its layers compute dense. Errors are those of `load_sparse`."""
    check_copyable(model)
    path = checked_path(path)
    with named_errors(path), open_plain(path) as file: metadata, _ = read_header(file, path)
    table, told = read_table(metadata, path), _read_forms(metadata, path)
    new = deepcopy(model).eval()
    layers = dict(new.named_modules())
    missing = [name for name in (*told['layers'], *told['blocks']) if name not in layers]
    if missing: raise refusal(path, f'which does not fit the model: it lacks {listed(missing)}')
    kept = {}
    for name, form in told['layers'].items():
        if form['kind'] == GONE: new = _without(new, layers[name], name, path)
        else: kept[layers[name]] = form
    for name, layer in layers.items(): _give_bias(layer, f'{name}.bias'.removeprefix('.') in table)
    load_sparse(new, path)
    for layer, form in kept.items(): new = replace(new, layer, _built(layer, form, path))
    if told['blocks'] != fuse_blocks(new, told['blocks']):
        raise refusal(path, f'which does not fit the model: the code of {listed(told["blocks"])} is another')
    return new.to(memory_format=torch.channels_last) if told['channels_last'] else new


def _form(layer):
    "Describe how a layer computes: its kind, and the options that it was built with."
    return {'kind': type(layer).__name__, **getattr(layer, 'options', {})}


def _is_channels_last(layer):
    if type(layer) is not nn.Conv2d or layer.weight.is_contiguous(): return False
    return layer.weight.is_contiguous(memory_format=torch.channels_last)


def _read_forms(metadata, path):
    if 'forms' not in metadata: raise refusal(path, 'which save_fast has not written; load_sparse reads it')
    try: told = parse(metadata['forms'])
    except ValueError: raise altered(path, 'its forms cannot be read') from None
    kinds = {'layers': dict, 'blocks': list, 'channels_last': bool}
    if type(told) is not dict or {name: type(value) for name, value in told.items()} != kinds:
        raise altered(path, 'its forms are none')
    if not all(type(name) is str for name in told['blocks']): raise altered(path, 'its blocks are none')
    for name, form in told['layers'].items():
        if type(form) is dict and form.get('kind') in {*FORMS, GONE}: continue
        raise altered(path, f'its forms are wrong at {name!r:.99}')
    return told


def _without(model, layer, name, path):
    "Return the model without a layer whose work others do."
    if type(layer) is nn.Identity: return model
    if type(layer) in MAY_GO: return replace(model, layer, nn.Identity())
    was = type(layer).__name__
    raise refusal(path, f'which does not fit the model: it has nothing at {name!r}, which is a {was}')


def _give_bias(layer, has_bias):
    "Give a convolution the bias that a folded BatchNorm has left."
    if type(layer) in NORMS and has_bias and layer.bias is None:
        layer.bias = nn.Parameter(layer.weight.new_zeros(layer.out_channels))


def _built(layer, form, path):
    kind, options = FORMS[form['kind']], {name: value for name, value in form.items() if name != 'kind'}
    try: return kind(layer, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise refusal(path, f'which does not fit the model: {error}') from None
