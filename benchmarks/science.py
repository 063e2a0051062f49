"""Ours beside the published, on real data; `make science` writes the tables to benchmarks/SCIENCE.md.

Name parts to run these alone: `science.py xor monks`. A part replaces its own section. Those of `LONGER` train
for long, and run only if they are named."""
import argparse
import importlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from experiments.rows import Row, as_text
from results import machine, write

SCIENCE, HEADING = Path(__file__).parent / 'SCIENCE.md', 'Ours beside the published'
LONGEST_FIRST = ('accurate lenet minilm-50 resnet20 minilm-2:4 minilm-70 accurate_cifar tickets monks synflow '
                 'memory resnet20_filters xor paper').split()
PARTS = {  # module in `experiments`, and which of its cases if it has several: (title, what it needs of the data)
    'xor': ('XOR, Optimal Brain Surgeon', None),
    'monks': ("MONK's problems, Optimal Brain Surgeon", 'monks'),
    'resnet20': ('ResNet-20, pruned in one event and repaired', 'cifar10'),
    'resnet20_filters': ('ResNet-20 without half of its filters, repaired', 'cifar10'),
    'minilm-50': ('A sentence encoder, 50 % pruned in one event, and repaired', 'shakespeare'),
    'minilm-70': ('A sentence encoder, 70 % pruned in one event, and repaired', 'shakespeare'),
    'minilm-2:4': ('A sentence encoder, 2:4 pruned in one event, and repaired', 'shakespeare'),
    'lenet': ('LeNet-300-100, SNIP and iterative magnitude', 'mnist'),
    'accurate': ('LeNet-300-100, pruned while it trains', 'mnist'),
    'accurate_cifar': ('ResNet-20, pruned while it is fine-tuned', 'cifar10'),
    'tickets': ('LeNet-300-100, lottery tickets', 'mnist'),
    'synflow': ('SynFlow on VGG-16', None),
    'memory': ('Memory of a repair', None),
    'paper': ('A model of 7 billion parameters, on paper', None),
}
LONGER = 'accurate', 'accurate_cifar', 'tickets'


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('parts', nargs='*', metavar='part', help=f'{", ".join(PARTS)}; none: all but {", ".join(LONGER)}')
    parser.add_argument('--data', type=Path, default=Path('../shared/data'), help='the folder with the data')
    parser.add_argument('--out', type=Path, default=SCIENCE, help='the file with the tables')
    given = parser.parse_args()
    for part in given.parts:
        if part not in PARTS: parser.error(f'part: got {part!r}, expected one of {", ".join(PARTS)}')
    parts = given.parts or [part for part in PARTS if part not in LONGER]
    missing = [needed for _, needed in map(PARTS.get, parts) if needed and not (given.data / needed).is_dir()]
    if missing: parser.error(_how_to_get(given.data, missing))
    if len(parts) == 1: _run(parts[0], given.data, given.out)
    else: _run_each(parts, given)


def _how_to_get(folder, missing):
    return (f'data: {folder.resolve()} has no {", ".join(dict.fromkeys(missing))}; put them there, or name another folder by '
            '--data (make science DATA=…); benchmarks/experiments/__init__.py says what each holds')


def _run_each(parts, given):
    "Run each part in a process of its own with one thread, as many at a time as there are cores, longest first."
    order = sorted(parts, key=LONGEST_FIRST.index)
    with ThreadPoolExecutor(os.cpu_count()) as pool: done = pool.map(partial(_run_apart, given), order)
    for part, text in zip(order, done): write(PARTS[part][0], text, given.out, HEADING)


def _run_apart(given, part):
    "Return the text of a part."
    with TemporaryDirectory() as folder:
        out = Path(folder) / 'part.md'
        command = [sys.executable, __file__, part, '--data', str(given.data), '--out', str(out)]
        subprocess.run(command, check=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
        return out.read_text(encoding='utf-8').split(f'## {PARTS[part][0]}', 1)[1].strip()


def _run(part, data, out):
    (title, _), (module, *case) = PARTS[part], part.split('-')
    start, found = time.perf_counter(), []
    for one in importlib.import_module(f'experiments.{module}').run(data, *case):
        found.append(one)
        if isinstance(one, Row): print(f'{one.experiment}: {one.setting}: {one.ours}', flush=True)
    took = f'By `make science`, in {time.perf_counter() - start:.0f} s, {time.process_time():.0f} s of processors; {machine()}.'
    write(title, f'{took}\n\n{as_text(found)}', out, HEADING)


if __name__ == '__main__': main()
