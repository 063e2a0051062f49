"Lay out the weights that are not zero, for inputs of one size."
import ctypes
from typing import NamedTuple

import numpy as np

from fasterai.deploy.kernels import loading as kernels
from fasterai.deploy.kernels.tiling import Geometry, Tile, panel_rows, plane_floats

ACTIVATIONS = {None: 0, 'relu': 1, 'relu6': 2}  # as the C code has them
ITEMS = 4  # pieces of work for each thread, or the last one is waited for
ROW_COST = 4  # weights that take as long as an output channel does without any


class Weights(NamedTuple):
    "Hold the weights that are not zero, by output channel (CSR), as arrays of their own."
    begin: np.ndarray  # int32, outputs + 1
    position: np.ndarray  # int32, in the flattened weight of an output channel
    value: np.ndarray  # float32
    bias: np.ndarray | None  # float32


def checked_weights(
    weights: Weights,
    columns: int,  # weights of an output channel
) -> Weights:
    "Return weights; a `ValueError` where they are none, as after a file that does not fit was loaded."
    begin, position = weights.begin, weights.position
    fits = begin[0] == 0 and begin[-1] == len(position) == len(weights.value) and (np.diff(begin) >= 0).all()
    if fits and len(position): fits = position.min() >= 0 and position.max() < columns
    if not fits:
        raise ValueError('state_dict: got rows and columns that fit no weight, expected those of this layer')
    return weights


def cuts(
    begin: np.ndarray,  # int, outputs + 1
    pieces: int,
) -> np.ndarray:  # int64, pieces + 1
    "Cut output channels into pieces that take about as long as each other."
    cost = np.arange(len(begin)) * ROW_COST + begin
    found = np.searchsorted(cost, np.linspace(0, cost[-1], pieces + 1))
    found[0], found[-1] = 0, len(begin) - 1
    return found.astype(np.int64)


class _Plan:
    "Hold arguments of the C code, and the arrays that they point to."

    def __init__(self, arguments, begin, arrays):
        self.arguments, self._begin, self._arrays = arguments, begin, arrays
        self._cuts, self._pieces = {}, {}
        for name, array in arrays.items(): setattr(arguments, name, address(array))
        self.pointer = ctypes.addressof(arguments)

    def pieces(self, threads):
        "Return what `_cut` returns for so many threads."
        return self._pieces.get(threads) or self._split(threads)

    def _cut(self, threads, pieces):
        "Return where the pieces of the outputs begin, as the C code has it, and how many there are."
        # the C code has a pointer, so what another thread has put there must not be replaced
        found = self._cuts.setdefault(threads, cuts(self._begin, pieces))
        self._pieces[threads] = found.ctypes.data, pieces
        return self._pieces[threads]


def address(array): return None if array is None else array.ctypes.data


class ConvolutionPlan(_Plan):
    "Hold the weights of a convolution as a tile reads them, and call it."

    def __init__(self,
        code,  # the loaded kernels
        geometry: Geometry,
        shape: tuple,  # of the input: images, height, width
        tile: Tile,
        weights: Weights,
        activation: str | None = None,  # a key of `ACTIVATIONS`
        transposed: bool = False,  # inputs and outputs are those of a Linear: (places, channels)
    ):
        self.tile, self.code = tile, code
        out_height, out_width = geometry.out_size(*shape[1:])
        inputs, first = panel_rows(geometry, tile.rows)
        plane = plane_floats(len(inputs), tile.row_length, int(code.lanes()))
        arrays = _packed(geometry, tile, weights, plane, np.array(first) * tile.row_length)
        arrays |= {'input_rows': np.array(inputs, dtype=np.int64), 'bias': weights.bias}
        chunk = arrays['chunk']
        arguments = kernels.Convolution(
            shape[0], geometry.channels, *shape[1:], geometry.outputs, out_height, out_width,
            geometry.kernel[1], *geometry.stride, geometry.dilation[1], *geometry.padding[:2],
            tile.rows, tile.columns, tile.abreast, tile.row_length, tile.vectors,
            len(inputs), tile.channels, len(chunk), len(arrays['begin']), len(arrays['value']),
            int((chunk[:, 3] - chunk[:, 2]).max()), ACTIVATIONS[activation],
            transposed)
        super().__init__(arguments, weights.begin, arrays)
        kernels.checked(code.check_convolution(self.pointer))
        self.scratch = code.convolution_scratch(self.pointer)
        self.tiles = code.convolution_tiles(self.pointer)

    def run(self, x, y, add=None):  # contiguous tensors
        threads, team = kernels.threads()
        at, size = kernels.scratch(self.scratch * threads)
        add = None if add is None else add.data_ptr()
        kernels.checked(self.code.convolve(self.pointer, x.data_ptr(), x.numel(), y.data_ptr(), y.numel(),
                                           add, *self.pieces(threads), at, size, threads, team))

    def _split(self, threads):
        # every piece packs its inputs anew, so there is one if there are enough tiles
        enough = self.tiles >= ITEMS * threads or self.tiles % threads == 0
        return self._cut(threads, 1 if enough else min(threads, self.arguments.outputs))


def _packed(geometry, tile, weights, plane, row_offset):
    "Return a convolution's arrays: chunks of channels, and in each the weights by output channel."
    of_group, outputs = geometry.channels // geometry.groups, geometry.outputs // geometry.groups
    height, width = geometry.kernel
    chunk = _chunks(geometry, tile)
    begins = np.concatenate([[0], np.cumsum(chunk[:, 3] - chunk[:, 2] + 1)])
    chunk[:, 4] = begins[:-1]
    output = np.repeat(np.arange(geometry.outputs), np.diff(weights.begin))
    channel, place = np.divmod(weights.position.astype(np.int64), height * width)
    channel += output // outputs * of_group
    found = np.searchsorted(chunk[:, 1], channel, 'right')  # the chunk of each weight
    in_panel = (channel - chunk[found, 0]) * width + place % width
    offset = in_panel * plane + row_offset[place // width]
    order = np.argsort(found, kind='stable')
    slot = chunk[found, 4] + output - chunk[found, 2] + 1
    begin = np.cumsum(np.bincount(slot, minlength=begins[-1]))
    used = np.bincount(channel * width + place % width, minlength=geometry.channels * width) > 0
    return {'chunk': chunk, 'used': used.astype(np.uint8), 'begin': begin.astype(np.int32),
            'offset': offset[order].astype(np.uint16), 'value': weights.value[order]}


def _chunks(geometry, tile):
    "Return the fields of C's `Chunk`, a row for each: whole groups of channels, or parts of one."
    of_group, outputs = geometry.channels // geometry.groups, geometry.outputs // geometry.groups
    step = max(tile.channels, of_group)  # channels of the groups that are computed together
    rows = []
    for start in range(0, geometry.channels, step):
        end = min(start + step, geometry.channels)
        firsts = range(start, end, tile.channels)
        for first in firsts:
            last = min(first + tile.channels, end)
            rows.append((first, last, start // of_group * outputs, end // of_group * outputs,
                         0, first == start, last == end))
    return np.array(rows, dtype=np.int64)


class MatrixPlan(_Plan):
    "Hold the weights of a Linear for few inputs at a time, and call it."
    scratch = 0

    def __init__(self, code, inputs, vectors, weights, activation=None):
        self.code, self.vectors = code, vectors
        wide = inputs > 1 << 16
        column = weights.position.astype(np.uint32 if wide else np.uint16)
        outputs = len(weights.begin) - 1
        arguments = kernels.Matrix(inputs, outputs, len(column), wide, ACTIVATIONS[activation])
        arrays = {'begin': weights.begin, 'column': column, 'value': weights.value, 'bias': weights.bias}
        super().__init__(arguments, weights.begin, arrays)
        kernels.checked(code.check_matrix(self.pointer))

    def run(self, x, y, add=None):  # contiguous tensors, (n, inputs) and (n, outputs)
        threads, team = kernels.threads()
        kernels.checked(self.code.multiply(self.pointer, x.data_ptr(), x.numel(), y.data_ptr(), y.numel(),
                                           self.vectors, *self.pieces(threads), threads, team))

    def _split(self, threads):
        return self._cut(threads, 1 if threads == 1 else min(ITEMS * threads, self.arguments.outputs))


class PoolPlan:
    "Hold the sizes of a max pooling, and call it."

    def __init__(self, code, arguments):
        self.code, self.arguments = code, arguments
        self.pointer = ctypes.addressof(arguments)
        self.scratch = code.pool_scratch(self.pointer)

    def pieces(self, threads): return None, 1

    def run(self, x, y, add=None):  # contiguous tensors
        threads, team = kernels.threads()
        at, size = kernels.scratch(self.scratch * threads)
        kernels.checked(self.code.max_pool(self.pointer, x.data_ptr(), x.numel(), y.data_ptr(), y.numel(),
                                           at, size, threads, team))
