"Choose how many outputs a convolution computes at once."
from collections.abc import Iterator
from functools import cache
from math import exp
from pathlib import Path
from typing import NamedTuple

MOST_FLOATS = 1 << 16  # of a panel: its offsets have 16 bits
MOST_PANEL_ROWS = 1024
LINE = 16  # floats of a cache line
L1_SHARE = .95  # of the L1 cache, for the panel


class Geometry(NamedTuple):
    "Describe a convolution without its weights and inputs."
    channels: int
    outputs: int
    kernel: tuple  # height, width
    stride: tuple = (1, 1)
    padding: tuple = (0, 0, 0, 0)  # top, left, bottom, right
    dilation: tuple = (1, 1)
    groups: int = 1

    def out_size(self, height, width):  # of the input
        top, left, bottom, right = self.padding
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel)]
        sizes = height + top + bottom - reach[0], width + left + right - reach[1]
        return tuple(size // s + 1 for size, s in zip(sizes, self.stride))


class Tile(NamedTuple):
    "Describe the outputs that are computed at once, and the panel of inputs that they need."
    rows: int
    columns: int
    abreast: int  # images side by side
    row_length: int  # floats of a row of the panel
    vectors: int  # registers that hold the outputs
    channels: int  # of the input that the panel holds at once


def panel_rows(
    geometry: Geometry,
    rows: int,  # of outputs
) -> tuple:  # (input row of each panel row, first panel row of each row of the kernel)
    """Say which rows of the input a panel holds.

    For a row of the kernel, the inputs of all rows of outputs must follow each other. With a stride, every
    n-th row of the input comes first, then those after them."""
    stride, dilation = geometry.stride[0], geometry.dilation[0]
    steps = [divmod(k * dilation, stride) for k in range(geometry.kernel[0])]
    inputs, first = [], {}
    for phase in sorted({phase for _, phase in steps}):
        first[phase] = len(inputs)
        count = rows + max(step for step, p in steps if p == phase)
        inputs += [stride * row + phase for row in range(count)]
    return inputs, [first[phase] + step for step, phase in steps]


def plane_floats(rows, row_length, lanes):
    "Return the floats of a panel that a column of the kernel reads of a channel: whole vectors."
    return _round_up(rows * row_length, lanes)


def l1_bytes() -> int:
    "Return the size of this processor's first cache, or that which most have."
    return _cache_bytes(0, 1 << 15)


def l2_bytes() -> int:
    "Return the size of this processor's second cache, or that which many have."
    return _cache_bytes(2, 1 << 19)


@cache
def _cache_bytes(index, default):
    try: text = Path(f'/sys/devices/system/cpu/cpu0/cache/index{index}/size').read_text().strip()
    except OSError: return default
    return int(text[:-1]) << 10 if text[:-1].isdigit() and text.endswith('K') else default


def tiles(
    geometry: Geometry,
    shape: tuple,  # of the input: images, height, width
    nonzeros: int,  # weights
    lanes: int,  # floats of a vector
    registers: frozenset,  # numbers of vectors that a tile may have
) -> list:  # of `Tile`, the one that should be fastest first
    "Find the tiles that a convolution could be computed in, in the order of their estimated times."
    found = {}
    for tile in _possible(geometry, shape, lanes, registers):
        found[tile] = _cycles(tile, geometry, shape, nonzeros, lanes)
    return sorted(found, key=found.get)


def _possible(geometry, shape, lanes, registers) -> Iterator:
    out_height, out_width = geometry.out_size(*shape[1:])
    most = max(registers) * lanes  # floats
    for abreast in (1, 2, 4, 8, 16):
        if abreast > max(1, shape[0]): break
        widths = {out_width} if abreast > 1 else _widths(out_width, lanes, registers)
        for columns in widths:
            for align in (lanes // 2, lanes):
                row_length = _round_up(abreast * columns, align)
                # one row more than there are may fill the registers, as 8 × 7 outputs do for 7 × 7
                most_rows = 1 if out_height == 1 else out_height + 1
                for rows in range(1, min(most_rows, most // row_length) + 1):
                    tile = _tile(geometry, rows, columns, abreast, row_length, lanes, registers)
                    if tile: yield tile


def _widths(out_width, lanes, registers):
    "Return numbers of columns to try: whole vectors, and even shares of a row."
    vectors = {count * lanes for count in registers}
    shares = {-(-out_width // parts) for parts in range(1, 17)}
    return {columns for columns in vectors | shares if columns <= _round_up(out_width, lanes)}


def _tile(geometry, rows, columns, abreast, row_length, lanes, registers):
    "Return a tile with as many channels as fit, or None if none do."
    vectors = -(-rows * row_length // lanes)
    if vectors not in registers: return None
    count = len(panel_rows(geometry, rows)[0])
    floats = geometry.kernel[1] * plane_floats(count, row_length, lanes)  # of a channel
    if count > MOST_PANEL_ROWS or floats > MOST_FLOATS: return None
    budget = min(int(l1_bytes() * L1_SHARE) // 4, MOST_FLOATS)
    return Tile(rows, columns, abreast, row_length, vectors, _channels(geometry, max(1, budget // floats)))


def _channels(geometry, most):
    "Return a number of channels, at most so many: whole groups, or an even share of one."
    of_group = geometry.channels // geometry.groups
    if most >= of_group: return min(most // of_group, geometry.groups) * of_group
    return -(-of_group // -(-of_group // most))


def _cycles(tile, geometry, shape, nonzeros, lanes):
    """Estimate the time of a convolution, in cycles.

    The numbers were fitted to 900 times of 13 layers, with inputs and outputs that had left the first two
    caches, on an Intel Xeon with AVX-512; the median error was 9 %. There a vector that crosses a cache line
    takes two loads, so rows that are not whole vectors cost more."""
    out_height, out_width = geometry.out_size(*shape[1:])
    count = -(-shape[0] // tile.abreast) * -(-out_width // tile.columns) * -(-out_height // tile.rows)
    load = .6 if tile.row_length % lanes == 0 else .8
    multiply = nonzeros * (.8 + load * tile.vectors)
    passes = -(-geometry.channels // geometry.groups // tile.channels)  # in which the sums are read and written
    sums = geometry.outputs * passes * (7.5 + 1.7 * tile.vectors)
    written = tile.abreast * (10 + 5 * tile.rows + 5 * _lines(tile, out_width))
    finish = geometry.outputs * (written + 7 * tile.vectors)
    blocks = -(-tile.columns // lanes)
    lines = tile.columns * geometry.stride[1] / LINE + 1
    rows = tile.abreast * len(panel_rows(geometry, tile.rows)[0])
    planes = geometry.channels * geometry.kernel[1]
    used = 1 - exp(-nonzeros / planes)  # share of the planes that any weight reads, where weights are anywhere
    pack = used * geometry.channels * rows * (geometry.kernel[1] * blocks + 8 * lines)
    return count * (multiply + sums + finish + pack)


def _lines(tile, out_width):
    "Return how many cache lines the outputs of a tile lie in, about; rows that are whole follow each other."
    if tile.columns == out_width: return tile.rows * tile.columns / LINE + 1
    return tile.rows * (tile.columns / LINE + 1)


def _round_up(count, to): return -(-count // to) * to
