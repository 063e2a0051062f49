"Load compiled C code, and find out how many threads it shall run in."
import ctypes
import os
from ctypes import c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

from fasterai.native.build import VARIANTS, Unavailable, built
from fasterai.native.prebuilt import prebuilt

VARIABLE = 'FASTERAI_KERNELS'  # of the environment: a key of `VARIANTS`, or 'off'


def chosen() -> str:
    "Return which variant the environment names."
    return os.environ.get(VARIABLE) or 'native'


def loaded(
    source: Path,  # a file of C
    functions: dict,  # name: types of the arguments; all return an int64
    variant: str,  # as `chosen` returns it
) -> tuple:
    "Return the loaded library and None, or None and why there is none."
    if variant == 'off': return None, f'{VARIABLE} is off'
    if variant not in VARIANTS:
        return None, f'{VARIABLE}: got {variant!r}, expected {", ".join(map(repr, VARIANTS))} or \'off\''
    try: path = built(source, variant)
    except Unavailable as error:
        path = prebuilt(source, variant)
        if path is None: return None, str(error)
    try: return _declared(ctypes.CDLL(str(path)), functions), None
    except OSError as error: return None, f'the kernels cannot be loaded: {error}'


def _declared(library, functions):
    for name, arguments in functions.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, c_int64
    return library


class Team(ctypes.Structure):
    "Hold the functions of an OpenMP that start threads and number them, as the C code has them."
    _fields_ = [('start', c_void_p), ('number', c_void_p)]


@cache
def _team():
    """Return torch's OpenMP as a `Team`, or None.

    A second OpenMP in one process has threads of its own, and then twice as many run as there are cores. So
    none is linked: the one that torch has loaded is asked, under whatever name it came. GCC's and LLVM's have
    these functions, on Linux; elsewhere one thread computes."""
    torch_library = Path(torch.__file__).parent / 'lib' / 'libtorch_cpu.so'
    try:
        openmp = ctypes.CDLL(str(torch_library))
        functions = openmp.GOMP_parallel, openmp.omp_get_thread_num
    except (OSError, AttributeError): return None
    return Team(*(ctypes.cast(function, c_void_p) for function in functions))


@cache
def _team_address(): return None if _team() is None else ctypes.addressof(_team())


_forked = False


def _note_fork():
    global _forked
    _forked = True


# GCC's OpenMP waits for ever in a forked process, for threads that were not copied
if hasattr(os, 'register_at_fork'): os.register_at_fork(after_in_child=_note_fork)


def threads():
    "Return how many threads shall compute, and the address of the `Team` that they are, None for one thread."
    count = torch.get_num_threads()
    return (1, None) if count == 1 or _forked else (count, _team_address())
