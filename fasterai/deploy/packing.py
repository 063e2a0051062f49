"Pack the bits of a tensor: a mask, the values that are not zero, and the signs of zeros."
from math import prod

import numpy as np
import torch

from fasterai.deploy.container import Entry

MASK, VALUES, SIGNS = '\0mask', '\0values', '\0signs'  # suffixes of a packed tensor's name
PARTS = {torch.complex32: torch.float16, torch.complex128: torch.float64}  # safetensors lacks them: as pairs
ONE_ZERO = frozenset((torch.float8_e4m3fnuz, torch.float8_e5m2fnuz))  # floats without a negative zero
CHUNK = 1 << 18  # words that are packed at a time, a multiple of 8
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack(
    name: str,
    tensor: torch.Tensor,  # any that is dense
    tensors: dict,  # {name: tensor}; what is saved of the tensor is added
) -> dict:  # how to unpack it
    "Add a tensor to those that are saved: a copy of it, packed if that is smaller."
    description = {'shape': list(tensor.shape), 'dtype': dtype_name(tensor.dtype)}
    tensor = tensor.detach().resolve_neg().cpu().contiguous()
    if tensor.dtype in PARTS: tensor = torch.view_as_real(tensor)
    if tensor.dtype == torch.bool: tensor = tensor.view(torch.uint8) != 0  # its bytes may be others than 0 and 1
    packed = _packed(tensor)
    if packed is None:
        tensors[name] = tensor.clone()  # another thread may go on training: all is hashed and written as it is now
        return description
    tensors.update({name + part: values for part, values in packed.items()})
    return description | {'packed': True}


def packed_size(
    tensor: torch.Tensor,
    n_nonzero: int,  # how many of its entries are not zero
    n_negative: int = 0,  # how many are a zero with a sign
) -> int:  # bytes; for a complex tensor the size without packing
    "Return the size of a tensor as `pack` saves it, by counts alone."
    total, itemsize = tensor.numel(), tensor.element_size()
    if tensor.dtype in PARTS or not _can_pack(tensor.dtype, tensor.shape): return total * itemsize
    packed = _whole_bytes(total) + n_nonzero * itemsize
    if n_negative: packed += _whole_bytes(total - n_nonzero)
    return min(total * itemsize, packed)


def dtype_name(dtype) -> str:
    "Return a type's name as it stands in a file."
    return str(dtype).removeprefix('torch.')


def _can_pack(dtype, shape): return dtype.itemsize in WORDS and dtype != torch.bool and len(shape) > 0


def _packed(tensor):
    "Return the parts in which a tensor is saved, None if it is smaller as it is."
    if not _can_pack(tensor.dtype, tensor.shape) or not tensor.numel(): return None
    words = tensor.view(WORDS[tensor.element_size()]).flatten().numpy()
    magnitude = _magnitude(tensor.dtype, words.dtype)
    masks, values, signs, size = [], [], [], 0
    for begin in range(0, len(words), CHUNK):
        chunk = words[begin:begin + CHUNK].copy()  # of one moment; a copy of all would double a large tensor
        nonzero = chunk & magnitude != 0
        masks.append(np.packbits(nonzero))
        values.append(chunk[nonzero])
        signs.append(chunk[~nonzero] != 0)  # what multiplies by a mask leaves negative zeros
        size += masks[-1].nbytes + values[-1].nbytes
        if size >= words.nbytes: return None
    signs = np.packbits(np.concatenate(signs))
    if not signs.any(): signs = signs[:0]
    if size + len(signs) >= words.nbytes: return None
    values = torch.from_numpy(np.concatenate(values)).view(tensor.dtype)
    parts = {MASK: torch.from_numpy(np.concatenate(masks)), VALUES: values}
    if len(signs): parts[SIGNS] = torch.from_numpy(signs)
    return parts


def check_parts(
    name: str,
    description: dict,  # its shape and type, and whether it is packed
    dtype: torch.dtype,  # the type of that name
    entries: dict,  # {name: Entry} of the file
) -> list:  # the names of the tensor's parts in the file
    "Check that a file has a tensor's parts in the types and shapes that `pack` writes; `ValueError` if not."
    dtype, shape = _real(dtype, tuple(description['shape']))
    expected = {name: (dtype, shape)}
    if 'packed' in description:
        nothing = Entry(dtype, (-1,), 0)
        total, kept = prod(shape), entries.get(name + VALUES, nothing).shape[:1]
        kept = kept[0] if kept else -1
        if not _can_pack(dtype, shape) or not 0 <= kept <= total:
            raise ValueError(f'{name!r} has not the values that belong to its shape and type')
        expected = {name + MASK: (torch.uint8, (_whole_bytes(total),)), name + VALUES: (dtype, (kept,))}
        if name + SIGNS in entries: expected[name + SIGNS] = torch.uint8, (_whole_bytes(total - kept),)
    for part, kind in expected.items():
        if part not in entries: raise ValueError(f'{part!r} is not there')
        if entries[part][:2] == kind: continue
        raise ValueError(f'{part!r} has not the shape and type that belong to {name!r}')
    return list(expected)


def _real(dtype, shape):
    "Return the type and shape in which a tensor is in a file."
    return (PARTS[dtype], (*shape, 2)) if dtype in PARTS else (dtype, shape)


def _whole_bytes(bits): return -(-bits // 8)


def unpack(
    name: str,
    description: dict,  # as `check_parts` has checked it
    dtype: torch.dtype,  # the type of that name
    stored: dict,  # {name: tensor} of the file
) -> torch.Tensor:
    "Return a tensor as it was before `pack`; `ValueError` where its parts contradict each other."
    if dtype in PARTS:
        parts = description | {'shape': [*description['shape'], 2]}
        return torch.view_as_complex(unpack(name, parts, PARTS[dtype], stored))
    if 'packed' not in description: return _plain(name, stored[name])
    tensor = torch.zeros(description['shape'], dtype=dtype, device='cpu')
    word = WORDS[tensor.element_size()]
    words = tensor.view(-1).view(word).numpy()  # the tensor's own memory, which is filled
    nonzero = _bits(name + MASK, stored, len(words))
    values = stored[name + VALUES].view(word).numpy()
    if np.count_nonzero(nonzero) != len(values):
        raise ValueError(f'{name!r} has not one value for each bit of its mask')
    words[nonzero] = values
    if name + SIGNS in stored:
        sign = ~_magnitude(dtype, words.dtype)
        if not sign: raise ValueError(f'{name!r} has signs, and its type has no negative zero')
        signs = _bits(name + SIGNS, stored, len(words) - len(values))
        words[~nonzero] = signs.astype(words.dtype) * sign
    return tensor


def _plain(name, tensor):
    "Return a tensor that is not packed; check that a bool is 0 or 1, as torch takes for granted."
    if tensor.dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
        raise ValueError(f'{name!r} is bool and has other bytes than 0 and 1')
    return tensor


def _bits(part, stored, count):
    "Return the first bits of a part as bools; the rest, which fill up the last byte, must be 0."
    found = np.unpackbits(stored[part].numpy()).view(bool)
    if found[count:].any(): raise ValueError(f'{part!r} has more bits than numbers')
    return found[:count]


def _magnitude(dtype, words):
    "Return the bits that tell a number from zero: all of them, without the sign of a float."
    bits = 8 * words.itemsize
    every = np.iinfo(words).max if words.kind == 'u' else -1
    has_sign = dtype.is_floating_point and dtype not in ONE_ZERO
    return words.type(2 ** (bits - 1) - 1 if has_sign else every)  # the sign is the highest bit
