"Each recipe of docs/cookbook.md runs as it stands, and does what it says."
import re
from pathlib import Path

import pytest
import torch
from fastai.basics import set_seed

from fasterai.granularity import AXES

TEXT = (Path(__file__).parent.parent / 'docs/cookbook.md').read_text(encoding='utf-8')
FIRST, *RECIPES = re.split(r'^## ', TEXT, flags=re.MULTILINE)

# what is true when a recipe has run
HOLDS = {
    'Fine-tune and prune a pretrained ResNet': "round(callback.sparsifier.sparsity, 3) == 80 and (learn.model[1][-1].weight != 0).all()",
    'A vision transformer with 2:4': "sparsifier.sparsity == 50 and ((vit.encoder.layers[0].mlp[0].weight.view(64, 8, 4) != 0).sum(-1) <= 2).all()",
    'Prune, then quantize': "(integers == 0).float().mean() > .7 and (integers[learn.model[1].weight == 0] == 0).all()",
    'Train a sparse model from a file on': "round(Sparsifier(model).sparsity, 2) == 90",
    'One shot with repair, without training': "change.repaired[0].kept and round(sparsifier.sparsity, 2) == 80",
    'Your own criterion, context and layer type': "list(callback.sparsifier.layers) == ['1.matrix', '3.matrix'] and round(callback.sparsifier.sparsity) == 70",
    'Find a lottery ticket': "round(Sparsifier(learn.model).sparsity, 2) == 80",
    'Shrink and export': "small[0].conv.weight.shape == (16, 1, 3, 3) and Path('small.onnx').is_file()",
}


def code(text): return '\n'.join(re.findall(r'^```python\n(.*?)^```', text, re.MULTILINE | re.DOTALL))


@pytest.fixture
def known_types():
    "A recipe adds a layer type; the other tests do without."
    before = dict(AXES)
    yield
    AXES.clear()
    AXES.update(before)


def test_there_are_eight(): assert [recipe.split('\n')[0] for recipe in RECIPES] == [*HOLDS]


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('recipe', RECIPES, ids=lambda recipe: recipe.split('\n')[0])
def test_it_runs(recipe, tmp_path, monkeypatch, known_types):
    monkeypatch.chdir(tmp_path)
    set_seed(0)
    names = {}
    exec(code(FIRST), names)
    exec(code(recipe), names)
    title = recipe.split('\n')[0]
    assert eval(HOLDS[title], names | {'torch': torch}), title
