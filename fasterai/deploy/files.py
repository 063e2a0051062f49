"A smaller file: a bitmask and the values that are not zero, in safetensors."
import hashlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

FORMAT = 'fasterai.sparse 1'
MASK, VALUES, SIGNS = '\0mask', '\0values', '\0signs'  # what is added to a tensor's name, where it is packed
PARTS = {torch.complex32: torch.float16, torch.complex128: torch.float64}  # what safetensors lacks goes in two parts
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def save_sparse(
    model: nn.Module,  # any model; parameters and buffers are saved, all types
    path: str | Path,  # the file, which is replaced if it is there, at once or not at all
):
    "Write a model's tensors to one safetensors file, packed where that is smaller. `load_sparse` gives the same bits back."
    tensors, about, first = {}, {}, {}
    for name, tensor in _state(model).items():
        owner = first.setdefault(_memory(tensor), name)
        if owner != name: about[name] = {'same': owner}  # tied
        else: about[name] = _pack(name, tensor.detach(), tensors)
    metadata = {'format': FORMAT, 'tensors': json.dumps(about), 'sha256': _digest(tensors, about)}
    path = Path(path)
    if not path.parent.is_dir() or path.is_dir() or not path.name:
        raise FileNotFoundError(f'path: got {str(path)!r}, allowed is a file in a folder that is there')
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata)
        with open(temporary, 'rb') as file: os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load_sparse(
    model: nn.Module,  # of the same architecture; its tensors are overwritten
    path: str | Path,  # what `save_sparse` has written
) -> nn.Module:  # the model
    "Fill a model from a file; `ValueError`, and the model unchanged, where the file is damaged, foreign, or does not fit."
    state = _state(model)
    stored, about = _read(path)
    _check_fit(state, about, path)
    owners = {name: about[name].get('same', name) for name in state}
    found = {owner: _unpack(owner, stored, about[owner]) for owner in set(owners.values())}
    _check_tied(state, owners, found, path)
    with torch.no_grad():
        for name, tensor in state.items(): tensor.copy_(found[owners[name]])
    return model


def _read(path):
    "What a file holds, and what it says of it; both as they were written."
    try:
        with safe_open(path, 'pt') as file:
            metadata, stored = file.metadata() or {}, {n: file.get_tensor(n) for n in file.keys()}
    except FileNotFoundError: raise
    except (SafetensorError, OSError) as error:
        raise ValueError(f'path: got {str(path)!r}, which is damaged or no safetensors file ({error}); what torch.save wrote, '
                         'torch.load reads') from error
    if metadata.get('format') != FORMAT:
        raise ValueError(f'path: got {str(path)!r} of format {metadata.get("format")!r}, allowed is what save_sparse writes, {FORMAT!r}')
    try: about = json.loads(metadata.get('tensors', ''))
    except json.JSONDecodeError: about = None
    if about is None or _digest(stored, about) != metadata.get('sha256'):
        raise ValueError(f'path: got {str(path)!r}, which was altered since it was written')
    return stored, about


def _state(model):
    if not isinstance(model, nn.Module): raise TypeError(f'model: got {type(model).__name__}, allowed is a torch.nn.Module')
    state = model.state_dict(keep_vars=True)
    own = {id(t) for t in (*model.parameters(), *model.buffers())}
    for name, value in state.items():
        plain = type(value) in (torch.Tensor, nn.Parameter, nn.Buffer) and value.layout == torch.strided and not value.is_quantized
        if not plain or value.is_meta or value.is_conj() or id(value) not in own or any(n > 1 and not s for n, s in zip(value.shape, value.stride())):
            raise TypeError(f'model: got {type(value).__name__} as {name!r} in its state_dict, allowed are dense tensors in memory, '
                            'its parameters and buffers')
    return state


def _memory(tensor):
    "Equal for tensors that are the same in memory; a tensor without any is like no other."
    if not tensor.numel(): return id(tensor)
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _pack(name, tensor, tensors):
    "Add a tensor to those that are saved; what one must know to unpack it."
    kind = {'shape': list(tensor.shape), 'dtype': str(tensor.dtype).removeprefix('torch.')}
    tensor = tensor.resolve_neg().cpu().contiguous()
    if tensor.dtype in PARTS: tensor = torch.view_as_real(tensor)
    size = tensor.element_size()
    if size in WORDS and tensor.dtype != torch.bool and tensor.ndim:
        words = tensor.view(WORDS[size]).flatten().numpy()
        keep = words & _magnitude(tensor.dtype, words.dtype) != 0
        signs = np.packbits(words[~keep] != 0)  # what multiplies by a mask leaves negative zeros
        signs = signs if signs.any() else signs[:0]
        if -(-len(keep) // 8) + len(signs) + int(np.count_nonzero(keep)) * size < len(keep) * size:
            tensors[name + MASK] = torch.from_numpy(np.packbits(keep))
            tensors[name + VALUES] = torch.from_numpy(words[keep]).view(tensor.dtype)
            if len(signs): tensors[name + SIGNS] = torch.from_numpy(signs)
            return kind | {'packed': True}
    tensors[name] = tensor
    return kind


def _unpack(name, stored, kind):
    dtype = getattr(torch, kind['dtype'])
    if dtype in PARTS:
        parts = {'shape': [*kind['shape'], 2], 'dtype': str(PARTS[dtype]).removeprefix('torch.')}
        return torch.view_as_complex(_unpack(name, stored, {**kind, **parts}))
    if 'packed' not in kind: return stored[name]
    tensor = torch.zeros(kind['shape'], dtype=dtype)
    words = tensor.view(-1).view(WORDS[tensor.element_size()]).numpy()
    keep = np.unpackbits(stored[name + MASK].numpy(), count=len(words)).view(bool)
    words[keep] = stored[name + VALUES].view(WORDS[tensor.element_size()]).numpy()
    if name + SIGNS in stored:
        signs = np.unpackbits(stored[name + SIGNS].numpy(), count=np.count_nonzero(~keep)).astype(words.dtype)
        words[~keep] = signs * ~_magnitude(tensor.dtype, words.dtype)
    return tensor


def _magnitude(dtype, words):
    "The bits that tell a number from zero: all, but for the sign of a float."
    every = np.iinfo(words).max if words.kind == 'u' else -1
    signed = dtype.is_floating_point and 'fnuz' not in str(dtype)  # those have no negative zero
    return words.type((every >> 1 if words.kind == 'u' else np.iinfo(words).max) if signed else every)


def _digest(tensors, about):
    digest = hashlib.sha256(json.dumps(about).encode())
    for name in sorted(tensors):
        digest.update(f'{name} {tensors[name].dtype} {tuple(tensors[name].shape)}'.encode())
        if tensors[name].numel(): digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _check_fit(state, about, path):
    missing, unexpected = [n for n in state if n not in about], [n for n in about if n not in state]
    if missing or unexpected:
        said = [f'{what} {", ".join(map(repr, names[:5]))}{" and more" if len(names) > 5 else ""}'
                for what, names in (('lacks', missing), ('has the unexpected', unexpected)) if names]
        raise ValueError(f'path: got {str(path)!r}, which does not fit the model: it {"; it ".join(said)}')
    for name, tensor in state.items():
        kind = about[about[name].get('same', name)]
        shape, dtype = tuple(kind['shape']), kind['dtype']
        if shape != tuple(tensor.shape): raise ValueError(f'path: got {name!r} of shape {shape}, allowed is that of the model, {tuple(tensor.shape)}')
        if f'torch.{dtype}' != str(tensor.dtype):
            raise ValueError(f'path: got {name!r} of type {dtype}, allowed is that of the model, {tensor.dtype}')


def _check_tied(state, owners, found, path):
    "What is one tensor in the model must be one, or equal, in the file."
    first = {}
    for name, tensor in state.items():
        other = owners[first.setdefault(_memory(tensor), name)]
        if other != owners[name] and not torch.equal(found[other], found[owners[name]]):
            raise ValueError(f'path: got {str(path)!r}, where {name!r} is not {first[_memory(tensor)]!r}; in the model they are one')


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
