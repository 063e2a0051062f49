"Write smaller files: a bitmask and the values that are not zero, in safetensors."
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

from fasterai.deploy.compare import check_module

FORMAT = 'fasterai.sparse 1'
MASK, VALUES, SIGNS = '\0mask', '\0values', '\0signs'  # suffixes of a packed tensor's name
PARTS = {torch.complex32: torch.float16, torch.complex128: torch.float64}  # safetensors lacks them: as pairs
ONE_ZERO = frozenset((torch.float8_e4m3fnuz, torch.float8_e5m2fnuz))  # floats without a negative zero
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def save_sparse(
    model: nn.Module,  # any model; its parameters and buffers are saved, of any type
    path: str | Path,  # the file to write; an old one is replaced at once, or not at all
):
    """Write a model's tensors to one safetensors file, each packed where that is smaller.

    `load_sparse` restores every bit."""
    tensors, descriptions = {}, {}
    first = {}  # {memory: the first name of the tensor there}
    for name, tensor in _state(model).items():
        source = first.setdefault(_memory_key(tensor), name)
        if source != name: descriptions[name] = {'same': source}  # tied
        else: descriptions[name] = _pack(name, tensor.detach(), tensors)
    digest = _digest(tensors, descriptions)
    metadata = {'format': FORMAT, 'tensors': json.dumps(descriptions), 'sha256': digest}
    path = Path(path)
    if not path.parent.is_dir() or path.is_dir() or not path.name:
        raise FileNotFoundError(f'path: got {str(path)!r}, expected a file in a folder that exists')
    _write(tensors, metadata, path)


def load_sparse(
    model: nn.Module,  # a model of the same architecture; its tensors are overwritten
    path: str | Path,  # a file that `save_sparse` has written
) -> nn.Module:  # the model
    """Fill a model's tensors from a file that `save_sparse` has written.

    A file that is damaged, foreign or does not fit raises a `ValueError`, and the model is not changed."""
    state = _state(model)
    stored, descriptions = _read(path)
    _check_fit(state, descriptions, path)
    sources = {name: descriptions[name].get('same', name) for name in state}
    found = {source: _unpack(source, stored, descriptions[source]) for source in set(sources.values())}
    _check_tied(state, sources, found, path)
    with torch.no_grad():
        for name, tensor in state.items(): tensor.copy_(found[sources[name]])
    return model


def _write(tensors, metadata, path):
    "Write a safetensors file under a temporary name, then move it to its place."
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata)
        with open(temporary, 'rb') as file: os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp allows the owner alone
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _read(path):
    "Read a file's tensors and the descriptions of them, as they were written."
    try:
        with safe_open(path, 'pt') as file:
            metadata, stored = file.metadata() or {}, {n: file.get_tensor(n) for n in file.keys()}
    except FileNotFoundError: raise
    except (SafetensorError, OSError) as error:
        raise ValueError(f'path: got {str(path)!r}, which is damaged or no safetensors file ({error}); '
                         'what torch.save wrote, torch.load reads') from error
    if metadata.get('format') != FORMAT:
        raise ValueError(f'path: got {str(path)!r} of format {metadata.get("format")!r}, '
                         f'expected that of save_sparse, {FORMAT!r}')
    try: descriptions = json.loads(metadata.get('tensors', ''))
    except json.JSONDecodeError: descriptions = None
    if descriptions is None or _digest(stored, descriptions) != metadata.get('sha256'):
        raise ValueError(f'path: got {str(path)!r}, which was altered since it was written')
    return stored, descriptions


def _state(model):
    check_module(model)
    state = model.state_dict(keep_vars=True)
    own = {id(t) for t in (*model.parameters(), *model.buffers())}
    for name, value in state.items():
        if id(value) in own and _is_plain(value): continue
        raise TypeError(f'model: got {type(value).__name__} as {name!r} in its state_dict, '
                        'expected dense tensors in memory, its parameters and buffers')
    return state


def _is_plain(value):
    "Tell whether a tensor is dense and fully described by its bits in memory."
    if type(value) not in (torch.Tensor, nn.Parameter, nn.Buffer): return False  # a subclass may hold more
    if value.layout != torch.strided or value.is_quantized or value.is_meta or value.is_conj(): return False
    expanded = any(length > 1 and not step for length, step in zip(value.shape, value.stride()))
    return not expanded  # one number in memory stands for many


def _memory_key(tensor):
    "Return a key that is equal for tensors of the same memory, and unique for an empty tensor."
    if not tensor.numel(): return id(tensor)
    place = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
    return *place, tensor.shape, tensor.stride(), tensor.dtype


def _pack(name, tensor, tensors):
    "Add a tensor to those that are saved, and return how to unpack it."
    description = {'shape': list(tensor.shape), 'dtype': str(tensor.dtype).removeprefix('torch.')}
    tensor = tensor.resolve_neg().cpu().contiguous()
    if tensor.dtype in PARTS: tensor = torch.view_as_real(tensor)
    packed = _packed(tensor)
    if packed is None:
        tensors[name] = tensor
        return description
    tensors.update({name + part: values for part, values in packed.items()})
    return description | {'packed': True}


def _packed(tensor):
    "Return the parts in which a tensor is saved, None if it is smaller as it is."
    size = tensor.element_size()
    if size not in WORDS or tensor.dtype == torch.bool or not tensor.ndim: return None
    words = tensor.view(WORDS[size]).flatten().numpy()
    nonzero = words & _magnitude(tensor.dtype, words.dtype) != 0
    signs = np.packbits(words[~nonzero] != 0)  # what multiplies by a mask leaves negative zeros
    if not signs.any(): signs = signs[:0]
    mask = np.packbits(nonzero)
    if len(mask) + len(signs) + int(np.count_nonzero(nonzero)) * size >= len(nonzero) * size: return None
    parts = {MASK: torch.from_numpy(mask), VALUES: torch.from_numpy(words[nonzero]).view(tensor.dtype)}
    if len(signs): parts[SIGNS] = torch.from_numpy(signs)
    return parts


def _unpack(name, stored, description):
    dtype = getattr(torch, description['dtype'])
    if dtype in PARTS:
        parts = {'shape': [*description['shape'], 2], 'dtype': str(PARTS[dtype]).removeprefix('torch.')}
        return torch.view_as_complex(_unpack(name, stored, description | parts))
    if 'packed' not in description: return stored[name]
    tensor = torch.zeros(description['shape'], dtype=dtype)
    word = WORDS[tensor.element_size()]
    words = tensor.view(-1).view(word).numpy()  # the tensor's own memory, which is filled
    nonzero = np.unpackbits(stored[name + MASK].numpy(), count=len(words)).view(bool)
    words[nonzero] = stored[name + VALUES].view(word).numpy()
    if name + SIGNS in stored:
        signs = np.unpackbits(stored[name + SIGNS].numpy(), count=np.count_nonzero(~nonzero))
        words[~nonzero] = signs.astype(words.dtype) * ~_magnitude(tensor.dtype, words.dtype)
    return tensor


def _magnitude(dtype, words):
    "Return the bits that tell a number from zero: all of them, without the sign of a float."
    bits = 8 * words.itemsize
    every = np.iinfo(words).max if words.kind == 'u' else -1
    has_sign = dtype.is_floating_point and dtype not in ONE_ZERO
    return words.type(2 ** (bits - 1) - 1 if has_sign else every)  # the sign is the highest bit


def _digest(tensors, descriptions):
    digest = hashlib.sha256(json.dumps(descriptions).encode())
    for name in sorted(tensors):
        digest.update(f'{name} {tensors[name].dtype} {tuple(tensors[name].shape)}'.encode())
        if tensors[name].numel(): digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _check_fit(state, descriptions, path):
    missing = [n for n in state if n not in descriptions]
    unexpected = [n for n in descriptions if n not in state]
    if missing or unexpected:
        problems = []
        if missing: problems.append(f'it lacks {_listed(missing)}')
        if unexpected: problems.append(f'it has the unexpected {_listed(unexpected)}')
        raise ValueError(f'path: got {str(path)!r}, which does not fit the model: {"; ".join(problems)}')
    for name, tensor in state.items():
        description = descriptions[descriptions[name].get('same', name)]
        shape, dtype = tuple(description['shape']), description['dtype']
        if shape != tuple(tensor.shape):
            raise ValueError(f'path: got {name!r} of shape {shape}, '
                             f'expected that of the model, {tuple(tensor.shape)}')
        if f'torch.{dtype}' != str(tensor.dtype):
            raise ValueError(f'path: got {name!r} of type {dtype}, '
                             f'expected that of the model, {tensor.dtype}')


def _listed(names, most=5):
    more = ' and more' if len(names) > most else ''
    return ', '.join(map(repr, names[:most])) + more


def _check_tied(state, sources, found, path):
    "Check that tensors which share memory in the model are equal in the file."
    first = {}  # {memory: the first name of the tensor there}
    for name, tensor in state.items():
        tied = first.setdefault(_memory_key(tensor), name)
        if sources[tied] == sources[name] or torch.equal(found[sources[tied]], found[sources[name]]): continue
        raise ValueError(f'path: got {str(path)!r}, where {name!r} is not {tied!r}; '
                         'in the model they are one')


def _umask():
    mask = os.umask(0)  # it can be read only by setting it
    os.umask(mask)
    return mask
