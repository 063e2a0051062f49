"Draw images/speed.png: milliseconds of networks with unstructured zeros, as benchmarks/RESULTS.md has them."
import re
from pathlib import Path

import matplotlib
from results import RESULTS

matplotlib.use('Agg')
import matplotlib.pyplot as plt

PICTURE = Path(__file__).parent.parent / 'images' / 'speed.png'
NETWORKS = {  # what a row of the table begins with: what the picture calls it
    'ResNet-18, {} %, 224 px, batch 1, one thread': 'ResNet-18, 1 image of 224 px',
    'ResNet-50, {} %, 224 px, batch 1, one thread': 'ResNet-50, 1 image of 224 px',
    'MobileNetV2 trained to {} %, 224 px, batch 1, one thread': 'MobileNetV2, 1 image of 224 px',
    "MiniLM's encoder, Linears {} %, batch 32, sequence 64, one thread": 'sentence encoder, 32 × 64 tokens',
    'MLP 784-4096-4096-10, {} %, batch 64, one thread': 'MLP 784-4096-4096-10, 64 rows',
}
COLOURS = {90: '#6aaed6', 95: '#1f5f9f'}
DENSE = '#c8c8c8'


def measured(
    path: Path,  # of RESULTS.md
) -> dict:  # {name of a network: {sparsity: (times as fast, milliseconds dense, sparse)}}
    "Read the rows that the picture shows."
    row = re.compile(r'^\| (.*?) \| [^|]* \| ([\d.]+) × \(([\d.]+) → ([\d.]+) ms\)', re.MULTILINE)
    rows = {what: tuple(map(float, numbers)) for what, *numbers in row.findall(path.read_text())}
    found = {}
    for row, name in NETWORKS.items():
        times = {sparsity: rows.get(row.format(sparsity)) for sparsity in COLOURS}
        found[name] = {sparsity: one for sparsity, one in times.items() if one}
    return {name: times for name, times in found.items() if times}


def draw(found, path):
    "Draw a group of bars for each network, below its name: dense, and each sparsity, as a share of the dense time."
    rows = sum(2.4 + len(times) for times in found.values())
    figure, ax = plt.subplots(figsize=(5, .25 * rows + .8), layout='constrained')
    y = 0.
    for name, times in found.items():
        ax.text(0, y, name, va='center', weight='bold')
        y += 1
        dense = next(iter(times.values()))[1]
        ax.barh(y, 100, .9, color=DENSE)
        ax.text(99, y, f'dense {dense:.3g} ms', ha='right', va='center', color='#404040')
        for sparsity, (ratio, before, after) in times.items():
            y += 1
            share = 100 * after / before
            ax.barh(y, share, .9, color=COLOURS[sparsity])
            ax.text(share + 1, y, f'{sparsity} % zeros: {after:.3g} ms, {ratio:.1f} ×', va='center')
        y += 1.4
    ax.set(xlim=(0, 100), ylim=(y - .6, -.8), yticks=[], xlabel='% of the dense time; ×: times as fast')
    ax.spines[['top', 'right', 'left']].set_visible(False)
    ax.set_title('Unstructured zeros on one CPU core', loc='left')
    figure.savefig(path, dpi=130)


if __name__ == '__main__': draw(measured(RESULTS), PICTURE)
