"""Do in C what an event does to every weight of a layer.

Each function says whether it was done: where it was not, numpy and torch do the same, to the bit."""
import ctypes
from collections.abc import Callable
from ctypes import c_float, c_int64, c_void_p
from functools import cache
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fasterai.native.loading import chosen, loaded, threads

SOURCE = Path(__file__).parent / 'sweep.c'
FORMS = 'plain', 'absolute', 'square', 'product', 'quotient'  # of scores, in the order of `enum Form`
LARGE = 1 << 20  # weights: for a layer of so many the code is compiled; smaller ones use it once it is there
SLAB = 1 << 22  # weights that are swept together: what is collected of more would take much memory
SMALL = 1 << 12  # weights: below that a call costs more than it saves


def compiled(
    form: str,  # one of `FORMS`
) -> Callable:
    "Mark a function of arrays that the C code computes too."
    def mark(function):
        function.form = form
        return function
    return mark


class Terms(NamedTuple):
    "Say what scores are computed from, and how."
    form: str  # one of `FORMS`: a, |a|, a², |a·b| or a / divisor
    a: np.ndarray  # (n,)
    b: np.ndarray | None = None  # (n,)
    divisor: float = 1.
    weight: np.ndarray | None = None  # (n,), where it is zero the score is -inf; None: scores are as computed

    @property
    def arrays(self): return [values for values in (self.a, self.b, self.weight) if values is not None]


class Inside(NamedTuple):
    "Hold what a sweep has found between the bounds of a bracket."
    at: np.ndarray  # positions, int64
    scores: np.ndarray  # float32
    above: int  # number of scores above the bracket


class Row(NamedTuple):
    "Hold a layer of single weights, for `cut`."
    terms: Terms
    alive: np.ndarray | None  # bool (n,); None: all are
    n_alive: int
    keep: np.ndarray  # bool (n,), written: False for what was pruned before, and what is now


class Pruned(NamedTuple):
    "Say how many weights of a layer were pruned, and what was near the cut."
    n: int
    at: np.ndarray  # positions, int64
    scores: np.ndarray  # float32
    below: int  # number of living weights with lower scores than these


class _Sweep(ctypes.Structure):
    "Hold the arguments of a sweep as the C code has them."
    _fields_ = [('form', c_int64), ('length', c_int64),
                *[(name, c_void_p) for name in ('a', 'b', 'weight', 'alive')],
                *[(name, c_float) for name in ('divisor', 'low', 'high')],
                *[(name, c_void_p) for name in ('keep', 'at', 'inside', 'counts')],
                ('room', c_int64), ('count_room', c_int64), ('found', c_int64), ('below', c_int64)]


_threads = [c_int64, c_void_p]
FUNCTIONS = {'sweep_room': [c_int64], 'sweep': [c_void_p, *_threads],
             'cut': [c_void_p, c_int64, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_void_p,
                     *_threads],
             'count_zeros': [c_void_p, c_int64, c_void_p, c_int64, *_threads],
             'mask': [c_void_p, c_int64, c_void_p, c_int64, *_threads]}
_asked_for = set()  # variants that were


@cache
def _library(variant): return loaded(SOURCE, FUNCTIONS, variant)[0]


def _code(size):
    "Return the compiled code for a layer of this size; None where there is none, or it does not pay."
    if size < SMALL: return None
    variant = chosen()
    if size < LARGE and variant not in _asked_for: return None
    _asked_for.add(variant)
    return _library(variant)


def _empty(length, dtype):
    "Return an array of which only what is written takes memory; numpy asks for pages that are huge."
    return torch.empty(length, dtype=dtype, device='cpu').numpy()


def _address(array): return None if array is None else array.ctypes.data


def _is_row(array, length, dtype):
    return array.dtype == dtype and array.shape == (length,) and array.flags.c_contiguous


def sweep(
    terms: Terms,
    alive: np.ndarray | None,  # bool (n,); None: all are
    low: float,  # the bracket: scores from `low` to `high` are inside
    high: float,
    keep: np.ndarray,  # bool (n,), written: True where a living score is above the bracket
) -> Inside | None:  # None: it was not done, and `keep` may have anything in it
    """Compare all scores of a layer with a bracket, and collect those of living groups inside.

    It is not done where a score is NaN or infinite, or many are inside."""
    length = len(keep)
    code = _code(length)
    if code is None or not _fit(terms, alive, keep): return None
    if any(c_float(bound).value != bound for bound in (low, high)): return None
    room = code.sweep_room(min(length, SLAB))
    buffers = _empty(room, torch.int64), _empty(room, torch.float32), _empty(room, torch.int64)
    at, scores, above = [], [], 0
    for start in range(0, max(length, 1), SLAB):
        part = slice(start, start + SLAB)
        rows = [None if row is None else row[part] for row in (terms.a, terms.b, terms.weight, alive)]
        found = _swept(code, terms, rows, (low, high), keep[part], buffers)
        if found < 0: return None
        at.append(buffers[0][:found] + start)
        scores.append(buffers[1][:found].copy())
        above += int(buffers[2][0])
    return Inside(np.concatenate(at), np.concatenate(scores), above)


def _swept(code, terms, rows, bracket, keep, buffers):
    "Sweep over a part of a layer, `SLAB` at most; return how many scores are inside, or a number below 0."
    room = len(buffers[0])
    task = _task(terms, rows, bracket, map(_address, (keep, *buffers)), len(keep), room)
    return code.sweep(ctypes.addressof(task), *threads())


def _task(terms, rows, bracket, addresses, length, room):
    return _Sweep(FORMS.index(terms.form), length, *map(_address, rows), terms.divisor, *bracket, *addresses,
                  room, room, 0, 0)


def cut(
    layers: list,  # of `Row`
    budget: int,  # number of weights to prune, of those that are alive
) -> list | None:  # of `Pruned`, one a layer; None: it was not done, and `keep` may have anything in it
    """Prune the lowest weights of all layers together, ties by position.

    It is not done where a score is NaN or infinite, or where many scores are near the cut."""
    lengths = [len(row.keep) for row in layers]
    code = _code(sum(lengths))
    if code is None or not all(_fit(row.terms, row.alive, row.keep) for row in layers): return None
    rooms = [code.sweep_room(length) for length in lengths]
    buffers = [_empty(sum(rooms), dtype) for dtype in (torch.int64, torch.float32, torch.int64)]
    tasks, start = (_Sweep * len(layers))(), 0
    for n, (row, length, room) in enumerate(zip(layers, lengths, rooms)):
        arrays = row.terms.a, row.terms.b, row.terms.weight, row.alive
        parts = [buffer.ctypes.data + start * buffer.itemsize for buffer in buffers]
        addresses = row.keep.ctypes.data, *parts
        tasks[n] = _task(row.terms, arrays, (0, 0), addresses, length, room)
        start += room
    step = round(sum(row.n_alive for row in layers) ** (1 / 3)) | 1  # odd, to fall out of step with kernels
    sample = _empty(sum(lengths) // step + 1, torch.float32)
    n_alive = np.array([row.n_alive for row in layers], np.int64)
    first, pruned = np.empty(len(layers) + 1, np.int64), np.empty(len(layers), np.int64)
    done = code.cut(ctypes.addressof(tasks), len(layers), _address(n_alive), budget, step, _address(sample),
                    len(sample), _address(first), _address(pruned), *threads())
    return None if done < 0 else _pruned(tasks, rooms, buffers, pruned.tolist())


def _pruned(tasks, rooms, buffers, numbers):
    "Return what a cut has found: scores lie one after the other, positions where each layer's room is."
    found, room_at, at = [], 0, 0
    for task, room, n in zip(tasks, rooms, numbers):
        places, scores = buffers[0][room_at:][:task.found], buffers[1][at:][:task.found]
        found.append(Pruned(n, places, scores, task.below))
        room_at += room
        at += task.found
    return found


def _fit(terms, alive, keep):
    "Tell whether all arrays are as the C code takes them."
    masks = [keep] if alive is None else [keep, alive]
    if not all(_is_row(mask, len(keep), np.bool_) for mask in masks): return False
    return all(isinstance(row, np.ndarray) and _is_row(row, len(keep), np.float32) for row in terms.arrays)


def _plain(tensor, dtype):
    "Tell whether the C code can read a tensor as a row of values."
    if type(tensor) is not torch.Tensor or tensor.dtype is not dtype or not tensor.is_cpu: return False
    return tensor.layout is torch.strided and tensor.is_contiguous()


def _groups(weight, keep):
    "Return where the entries of a mask lie and how many there are; None where the C code cannot read them."
    if not _plain(weight, torch.float32): return None
    keep = keep[tuple(slice(None) if step else slice(1) for step in keep.stride())]  # what only repeats is read once
    lead = next((n for n in range(weight.ndim + 1) if prod(weight.shape[:n]) == keep.numel()), None)
    if lead is None or keep.shape[:lead] != weight.shape[:lead] or not _plain(keep, torch.bool): return None
    return keep.data_ptr(), keep.numel()


def count_zeros(
    weight: torch.Tensor,  # without a gradient
    keep: torch.Tensor | None,  # bool, of its shape; None: all is kept
) -> int | None:  # None: it was not done
    "Count the weights that are zero although the mask keeps them."
    code = _code(weight.numel())
    if code is None or not _plain(weight, torch.float32): return None
    groups = (None, 1) if keep is None else _groups(weight, keep)
    if groups is None: return None
    return code.count_zeros(weight.data_ptr(), weight.numel(), *groups, *threads())


def mask(
    weight: torch.Tensor,  # without a gradient; written
    keep: torch.Tensor,  # bool, of its shape, or of length 1 along its last axes
) -> bool:  # False: it was not done
    "Zero all entries but those that are kept, what is no number too."
    code = _code(weight.numel())
    groups = None if code is None else _groups(weight, keep)
    if groups is None: return False
    weight.view(-1)[:0].zero_()  # torch is told of the change
    return not code.mask(weight.data_ptr(), weight.numel(), *groups, *threads())
