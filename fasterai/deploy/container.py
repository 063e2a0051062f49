"Read and write the layout of safetensors files: a header in JSON, then the bytes of the tensors."
import json
import os
from math import prod
from typing import NamedTuple

import numpy as np
import torch

TYPES = {  # {what a header calls a type: torch's name}, those that this torch has
    'F64': 'float64', 'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16', 'C64': 'complex64',
    'I64': 'int64', 'I32': 'int32', 'I16': 'int16', 'I8': 'int8', 'BOOL': 'bool',
    'U64': 'uint64', 'U32': 'uint32', 'U16': 'uint16', 'U8': 'uint8',
    'F8_E4M3': 'float8_e4m3fn', 'F8_E5M2': 'float8_e5m2', 'F8_E4M3FNUZ': 'float8_e4m3fnuz',
    'F8_E5M2FNUZ': 'float8_e5m2fnuz', 'F8_E8M0': 'float8_e8m0fnu', 'F4': 'float4_e2m1fn_x2'}
TYPES = {code: getattr(torch, name) for code, name in TYPES.items() if hasattr(torch, name)}
CODES = {dtype: code for code, dtype in TYPES.items()}
PAIRS = TYPES.get('F4')  # two numbers in a byte: a header counts the numbers, torch counts the bytes
METADATA = '__metadata__'  # the one key of a header that is no tensor
LONGEST = 100_000_000  # bytes of a header, as safetensors allows
MOST_AXES = 1000  # far above those of any tensor


class Entry(NamedTuple):
    "Say where a file has a tensor."
    dtype: torch.dtype
    shape: tuple
    start: int  # in bytes, from the begin of the file

    @property
    def size(self): return prod(self.shape) * self.dtype.itemsize


def refusal(
    path: str,  # as the user gave it
    why: str,  # what is wrong with the file
) -> ValueError:
    "Return the error for a file that is not loaded."
    return ValueError(f'path: got {path!r}, {why}')


def listed(
    names: list,
    most: int = 5,  # how many are written
) -> str:
    "Return names as a text, the long ones cut off."
    more = ' and more' if len(names) > most else ''
    return ', '.join(f'{name!r:.99}' for name in names[:most]) + more


def can_hold(
    tensor: torch.Tensor,
) -> bool:
    "Tell whether safetensors have a tensor's type."
    if tensor.dtype == PAIRS: return tensor.ndim > 0  # whose last axis counts the pairs
    return tensor.dtype in CODES


def parse(
    text: str,
):
    "Read JSON; `ValueError` for what is none, is nested too deep, or has a name twice."
    try: return json.loads(text, object_pairs_hook=_once)
    except RecursionError: raise ValueError('it is nested too deep') from None


def _once(pairs):
    found = dict(pairs)
    if len(found) < len(pairs): raise ValueError('it has a name twice')
    return found


def bytes_of(
    tensor: torch.Tensor,  # contiguous, on the CPU
):
    "Return the memory of a tensor as an array of bytes."
    if not tensor.numel(): return np.empty(0, np.uint8)  # torch cannot view it
    return tensor.view(-1).view(torch.uint8).numpy()


def write_tensors(
    file,  # open for writing bytes
    tensors: dict,  # {name: tensor}, contiguous and on the CPU
    metadata: dict,  # {str: str}
):
    "Write a safetensors file. `OSError` where the system refuses."
    header, place = {METADATA: metadata}, 0
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so that all are aligned
    for name in order:
        tensor = tensors[name]
        shape, stop = list(tensor.shape), place + tensor.numel() * tensor.element_size()
        if tensor.dtype == PAIRS: shape[-1] *= 2
        header[name] = {'dtype': CODES[tensor.dtype], 'shape': shape, 'data_offsets': [place, stop]}
        place = stop
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)
    file.write(len(text).to_bytes(8, 'little') + text)
    for name in order: file.write(bytes_of(tensors[name]))


def read_header(
    file,  # open for reading bytes, at its begin
    path: str,  # as the user gave it
) -> tuple:  # the metadata, {str: str}; and {name: Entry}
    "Read the header of a safetensors file, and check that it describes all bytes; `ValueError` if not."
    try: return _header(file)
    except ValueError as error:
        raise refusal(path, f'which is damaged or no safetensors file ({error}); '
                            'what torch.save wrote, torch.load reads') from None


def _header(file):
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), 'little')
    begin = 8 + length
    if begin > size or length > LONGEST: raise ValueError('its header is not whole')
    header = parse(file.read(length).decode())
    if type(header) is not dict: raise ValueError('its header is no table')
    metadata = header.pop(METADATA, {})
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise ValueError('its metadata is no table of texts')
    entries = {name: _entry(name, fields, begin) for name, fields in header.items()}
    end = begin
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)):
        if entry.start != end: raise ValueError(f'its tensor {name!r:.99} does not follow the one before')
        end += entry.size
    if end != size: raise ValueError(f'it has {size} bytes, and its header tells of {end:.6g}')
    return metadata, entries


def _entry(name, fields, begin):
    "Read what a header says of one tensor."
    wrong = ValueError(f'its tensor {name!r:.99} is not described as it must be')
    if type(fields) is not dict or fields.keys() != {'dtype', 'shape', 'data_offsets'}: raise wrong
    code, shape, offsets = fields['dtype'], fields['shape'], fields['data_offsets']
    if type(code) is not str or code not in TYPES: raise wrong
    if not are_lengths(shape) or not are_lengths(offsets) or len(offsets) != 2: raise wrong
    if TYPES[code] == PAIRS:
        if not shape or shape[-1] % 2: raise wrong
        shape = [*shape[:-1], shape[-1] // 2]
    entry = Entry(TYPES[code], tuple(shape), begin + offsets[0])
    if entry.size != offsets[1] - offsets[0]: raise wrong
    return entry


def are_lengths(
    value,  # what a file has
) -> bool:
    "Tell whether a value is a list of numbers that can be the lengths of a tensor's axes."
    if type(value) is not list or len(value) > MOST_AXES: return False
    return all(type(number) is int and 0 <= number < 2 ** 63 for number in value)


def read_tensor(
    file,  # open for reading bytes
    entry: Entry,  # where the tensor is
    path: str,  # as the user gave it
) -> torch.Tensor:
    "Read one tensor into memory of its own; `ValueError` if the file ends before it does."
    tensor = torch.empty(entry.shape, dtype=entry.dtype, device='cpu')
    file.seek(entry.start)
    if file.readinto(bytes_of(tensor)) == entry.size: return tensor
    raise refusal(path, 'which became shorter as it was read')
