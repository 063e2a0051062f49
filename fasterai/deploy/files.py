"Write smaller files: a bitmask and the values that are not zero, in safetensors."
import json
from pathlib import Path

import torch
from torch import nn

from fasterai.deploy.compare import check_module
from fasterai.deploy.container import METADATA, can_hold, read_header, read_tensor, write_tensors
from fasterai.deploy.packing import PARTS, pack, unpack
from fasterai.deploy.placing import checked_path, destination, named_errors, open_plain, replacing
from fasterai.deploy.sharing import check_overlaps, check_tied, memory_key, overlaps_itself, span
from fasterai.deploy.table import FORMAT, altered, check_entries, check_fit, digest, read_table


def save_sparse(
    model: nn.Module,  # any model; its parameters and buffers are saved, of any type
    path: str | Path,  # the file to write; an old one is replaced at once, or not at all, and keeps its mode
):
    """Write a model's tensors to one safetensors file, each packed where that is smaller.

    `load_sparse` restores every bit. What is no model, has tensors that a file cannot hold, or is no path
    raises a `TypeError`; a device or a pipe at the path raises a `ValueError`, and what the system refuses
    an `OSError` that names the path."""
    save_state(state_of(model), path)


def save_state(
    state: dict,  # {name: tensor}, as `state_of` returns it
    path: str | Path,  # the file to write
    forms: str | None = None,  # which form each layer has, as `save_fast` writes it
):
    "Write tensors to one safetensors file, each packed where that is smaller."
    path = checked_path(path)
    destination(path)  # before the work: it may be no place for a file
    tensors, descriptions = {}, {}
    first = {}  # {memory: the first name of the tensor there}
    for name, tensor in state.items():
        source = first.setdefault(memory_key(tensor), name)
        if source != name: descriptions[name] = {'same': source}  # tied
        else: descriptions[name] = pack(name, tensor, tensors)
    found = digest(tensors, descriptions, forms)
    metadata = {'format': FORMAT, 'tensors': json.dumps(descriptions), 'sha256': found}
    if forms is not None: metadata['forms'] = forms
    with replacing(path) as file: write_tensors(file, tensors, metadata)


def load_sparse(
    model: nn.Module,  # a model of the same architecture; its tensors are overwritten
    path: str | Path,  # a file that `save_sparse` has written
) -> nn.Module:  # the model
    """Fill a model's tensors from a file that `save_sparse` has written.

    A file that is damaged, foreign or does not fit raises a `ValueError`, a model whose tensors cannot be
    written a `TypeError`, and what the system refuses an `OSError`. In each case the model is not changed."""
    state = state_of(model)
    _check_writable(state)
    path = checked_path(path)
    with named_errors(path), open_plain(path) as file:
        metadata, entries = read_header(file, path)
        descriptions = read_table(metadata, path)
        sources = check_fit(state, descriptions, path)
        check_entries(state, descriptions, entries, path)
        stored = {name: read_tensor(file, entry, path) for name, entry in entries.items()}  # sizes are the model's
    if digest(stored, descriptions, metadata.get('forms')) != metadata.get('sha256'):
        raise altered(path, 'its digest is another')
    values = _unpacked(state, descriptions, sources, stored, path)
    check_tied(state, values, path)
    check_overlaps(state, values, path)
    with torch.no_grad():
        for name, tensor in state.items(): tensor.detach().copy_(values[name])
    return model


def _unpacked(state, descriptions, sources, stored, path):
    "Return {name: its values}; those of one source are one tensor."
    found = {}
    try:
        for name in sources.values():
            if name not in found: found[name] = unpack(name, descriptions[name], state[name].dtype, stored)
    except ValueError as error: raise altered(path, error) from None
    return {name: found[source] for name, source in sources.items()}


def state_of(
    model: nn.Module,
) -> dict:  # {name: tensor}
    "Return a model's tensors; a `TypeError` where a file cannot hold them."
    check_module(model)
    state = model.state_dict(keep_vars=True)
    own = {id(t) for t in (*model.parameters(), *model.buffers())}
    for name, value in state.items():
        if not _is_name(name):
            raise TypeError(f'model: got a tensor named {name!r} in its state_dict, '
                            'expected a name that files can hold')
        if id(value) in own and _is_plain(value): continue
        raise TypeError(f'model: got {type(value).__name__} as {name!r} in its state_dict, '
                        'expected dense tensors in memory, its parameters and buffers')
    return state


def _is_name(name):
    "Tell whether a file can hold a name: a null character marks parts of packed tensors."
    try: return name != METADATA and b'\0' not in name.encode()
    except UnicodeEncodeError: return False


def _is_plain(value):
    "Tell whether a tensor is dense and fully described by its bits in memory."
    if type(value) not in (torch.Tensor, nn.Parameter, nn.Buffer): return False  # a subclass may hold more
    if value.layout != torch.strided or value.is_quantized or value.is_meta or value.is_conj(): return False
    if not can_hold(value) and value.dtype not in PARTS: return False
    start, stop = span(value)
    place = value.untyped_storage()
    inside = place.data_ptr() <= start and stop <= place.data_ptr() + place.nbytes()  # memory may have been freed
    return (inside or start == stop) and not overlaps_itself(value)


def _check_writable(state):
    for name, tensor in state.items():
        if not tensor.is_inference() or torch.is_inference_mode_enabled(): continue
        raise TypeError(f'model: got {type(tensor).__name__} as {name!r}, which was made under '
                        'torch.inference_mode() and can be written only there, '
                        'expected tensors that can be written')
