"Load the kernels and call them."
import ctypes
import threading
import time
import warnings
from ctypes import c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

from fasterai.native.loading import chosen, loaded, threads

SOURCE = Path(__file__).parent / 'sparse.c'
PEAK_TRIES, PEAK_ROUNDS = 20, 20000  # a try takes .1 ms, about
# what a kernel refuses, by the number that it returns; a plan that was checked is refused nowhere
REFUSED = {1: 'sizes', 2: 'tiles', 3: 'chunks', 4: 'offsets', 5: 'lengths', 6: 'cuts', 7: 'scratch memory'}


def _integers(names): return [(name, c_int64) for name in names.split()]


class Convolution(ctypes.Structure):
    "Hold the arguments of a convolution as the C code has them; it says what they mean."
    _fields_ = [
        *_integers('images channels height width outputs out_height out_width'),
        *_integers('kernel_width stride_y stride_x dilation_x top left'),
        *_integers('rows columns abreast row_length vectors'),
        *_integers('panel_rows panel_channels chunks begins nonzeros most_outputs activation transposed'),
        ('input_rows', c_void_p), ('chunk', c_void_p), ('used', c_void_p), ('begin', c_void_p),
        ('offset', c_void_p), ('value', c_void_p), ('bias', c_void_p)]


class Matrix(ctypes.Structure):
    "Hold the arguments of a matrix-vector product as the C code has them."
    _fields_ = [*_integers('inputs outputs nonzeros wide activation'),
                ('begin', c_void_p), ('column', c_void_p), ('value', c_void_p), ('bias', c_void_p)]


class Pool(ctypes.Structure):
    "Hold the arguments of a max pooling as the C code has them."
    _fields_ = _integers('planes height width out_height out_width kernel_y kernel_x '
                         'stride_y stride_x dilation_y dilation_x top left')


_data = [c_void_p, c_int64, c_void_p, c_int64]  # x and its length in floats, y and its length
_cuts = [c_void_p, c_int64]
_scratch = [c_void_p, c_int64]
_threads = [c_int64, c_void_p]
FUNCTIONS = {
    'lanes': [], 'has_tile': [c_int64],
    'check_convolution': [c_void_p], 'convolution_scratch': [c_void_p], 'convolution_tiles': [c_void_p],
    'convolve': [c_void_p, *_data, c_void_p, *_cuts, *_scratch, *_threads],
    'check_matrix': [c_void_p], 'multiply': [c_void_p, *_data, c_int64, *_cuts, *_threads],
    'compute': [c_int64, c_void_p],
    'run_chain': [c_void_p, *_scratch, *_threads],
    'pool_scratch': [c_void_p], 'max_pool': [c_void_p, *_data, *_scratch, *_threads],
}


@cache
def _find(variant): return loaded(SOURCE, FUNCTIONS, variant)


def library():
    "Return the kernels, loaded and perhaps compiled at the first call, or None if there can be none here."
    return _find(chosen())[0]


def why_not() -> str | None:  # None if they are there
    "Say in one line why there are no kernels here."
    return _find(chosen())[1]


def checked(number):
    "Raise a `RuntimeError` for what a kernel has refused."
    if number: raise RuntimeError(f'kernels: got wrong {REFUSED[number]}, expected those of a plan')


@cache
def _peak(variant):
    code, number = _find(variant)[0], ctypes.c_float(.5)
    best = 0.
    for _ in range(PEAK_TRIES):
        start = time.perf_counter()
        operations = code.compute(PEAK_ROUNDS, ctypes.addressof(number))
        best = max(best, operations / (time.perf_counter() - start))
    return best


def peak() -> float:  # floating-point operations a second
    "Measure how fast numbers in registers are multiplied and added, in all threads that torch uses."
    count, team = threads()
    return _peak(chosen()) * (count if team else 1)


_memory = threading.local()


def scratch(
    count: int,  # bytes
) -> tuple:  # its address, and how long it is
    "Return memory to compute in, kept for the next call of this thread."
    try: found = _memory.scratch
    except AttributeError: found = 0, 0
    if found[1] < count:
        _memory.tensor = torch.empty(count, dtype=torch.uint8, device='cpu')
        _memory.scratch = found = _memory.tensor.data_ptr(), count
    return found


def is_traced() -> bool:
    "Tell whether torch notes what is called, to call it again without this code."
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


@cache
def warn_once(text): warnings.warn(text, stacklevel=3)
