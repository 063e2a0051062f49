"The lines of the README on small pictures: fastai's vision_learner, with random weights."
import numpy as np
import pytest
from fastai.callback.schedule import *  # noqa: F403, the fit_… methods of Learner
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import IndexSplitter
from fastai.metrics import accuracy
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock
from fastai.vision.learner import vision_learner
from torch import nn
from torchvision.models import resnet18

from fasterai.callback import SparsifyCallback


def picture(i): return PILImage.create(np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8))


def kind(i): return 'dog' if i % 2 else 'cat'


@pytest.fixture
def learn(tmp_path):
    block = DataBlock((ImageBlock, CategoryBlock), get_items=lambda n: range(n), get_x=picture, get_y=kind, splitter=IndexSplitter(range(12, 16)))
    learn = vision_learner(block.dataloaders(16, bs=4, num_workers=0, device='cpu'), resnet18, metrics=accuracy, pretrained=False, path=tmp_path)
    learn.remove_cb(learn.progress)
    return learn


@pytest.mark.filterwarnings('ignore:sparsity. .* would have been left')
@pytest.mark.parametrize('granularity', ['weight', 'filter'])
def test_fine_tune(learn, granularity, capsys):
    callback = SparsifyCallback(90, granularity)
    learn.fine_tune(1, cbs=callback)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('sparsity')]
    assert 'waits while' in lines[0] and lines[1].startswith('sparsity: asked 90 %, reached 9')
    report = callback.sparsifier.report()
    if granularity == 'weight': assert report.zeros == round(.9 * report.weights)
    else:
        assert '1.8' in report.skipped  # the output layer
        zero_shift = sum(int((m.bias == 0).sum()) for m in learn.model.modules() if isinstance(m, nn.BatchNorm2d))
        assert zero_shift == sum(r.dead for r in report.rows if r.kind == 'Conv2d')
    before = report.zeros
    learn.show_results(max_n=2)
    learn.validate()
    assert callback.sparsifier.report().zeros == before
    assert not [line for line in capsys.readouterr().out.splitlines() if 'sparsity' in line]
