"Measure the peak of memory of a repair, whose Gram matrices are never all in memory."
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn

from experiments.rows import Goal, Row, timed
from fasterai.repair import refit
from fasterai.sparsifier import Sparsifier

INPUTS, OUTPUTS, LAYERS, ROWS = 3072, 16, 12, 1024


class Wide(nn.Module):
    "Have layers of many inputs and few outputs, each with inputs of its own: Gram matrices are large, the rest is small."

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(INPUTS, OUTPUTS) for _ in range(LAYERS))

    def forward(self, x): return sum(layer(x.roll(i, 0) + i) for i, layer in enumerate(self.layers))

STATUS, CLEAR = Path('/proc/self/status'), Path('/proc/self/clear_refs')


class Peak:
    "Hold the peak of memory of a block, in bytes above what was there before."
    peak = 0


@contextmanager
def above():
    "Measure the peak of memory above what was there before. On Linux; elsewhere it is 0."
    found = Peak()
    if CLEAR.exists(): CLEAR.write_text('5')  # the peak begins anew
    before = _resident('VmRSS')
    yield found
    found.peak = max(0, _resident('VmHWM') - before)


def _resident(field):
    if not STATUS.exists(): return 0
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def held_together(net, kind) -> int:
    "Return the bytes that the Gram matrices of all layers of a type would take together, in float64, two a layer."
    return sum(2 * 8 * m.in_features ** 2 for m in net.modules() if isinstance(m, kind))


def run(data):
    "Yield the peak of a refit, above the networks and batches."
    torch.manual_seed(0)
    dense = Wide()
    model, batches = deepcopy(dense), torch.randn(ROWS, INPUTS).split(ROWS // 4)
    Sparsifier(model, 'channel', 'local').sparsify_model(75)
    with timed() as clock, above() as memory: refit(model, dense, batches)
    together, peak = held_together(dense, nn.Linear), f'{memory.peak / 1e6:.0f} MB'
    yield Row('memory', f'{LAYERS} Linears of {INPUTS} inputs, 75 % pruned, refit', f'{peak} at the peak',
              seconds=clock.seconds)
    yield Goal(f'less than all Gram matrices together, {together / 1e6:.0f} MB (one layer: '
               f'{together / LAYERS / 1e6:.0f} MB)', peak, memory.peak < together)
