"Draw the pictures of docs/gallery.md, each by the code above it: `python docs/gallery.py`."
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import torch

PAGE = Path(__file__).with_name('gallery.md')
PICTURES = PAGE.parent.parent / 'images' / 'gallery'
BLOCK = re.compile(r'^```python\n(.*?)^```\n(?:\n!\[.*?\]\(../images/gallery/(.*?)\))?', re.MULTILINE | re.DOTALL)


def draw(
    folder: Path,  # for the pictures
):
    "Run the code of the page, and save what was drawn below each block that has a picture."
    torch.set_num_threads(1)  # sums are then the same on any number of cores
    folder.mkdir(parents=True, exist_ok=True)
    names = {}
    for code, picture in BLOCK.findall(PAGE.read_text(encoding='utf-8')):
        with redirect_stdout(StringIO()): exec(code, names)
        if picture: plt.gcf().savefig(folder / picture, dpi=120)
        plt.close('all')


if __name__ == '__main__': draw(PICTURES)
