"Real architectures with random weights: one training step of each with the callback, exact counts, then `validate`."
import pandas as pd
import pytest
import torch
from fastai.callback.rnn import ModelResetter, RNNCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner, noop
from fastai.losses import CrossEntropyLossFlat, MSELossFlat
from fastai.tabular.core import Categorify, Normalize
from fastai.tabular.data import TabularDataLoaders
from fastai.tabular.learner import tabular_learner
from fastai.text.models.awdlstm import AWD_LSTM
from fastai.text.models.core import get_language_model
from fastai.vision.learner import create_body
from fastai.vision.models.unet import DynamicUnet
from torch import nn
from torch.utils.data import TensorDataset
from torchvision import models

from fasterai.callback import SparsifyCallback
from fasterai.granularity import block

pytestmark = pytest.mark.filterwarnings('ignore:sparsity. .* (would have been left|has less than 1 %)')
VISION = {  # how to make it, the side of a picture
    'resnet18': (lambda: models.resnet18(num_classes=4), 64),
    'mobilenet_v3_small': (lambda: models.mobilenet_v3_small(num_classes=4), 64),
    'convnext_tiny': (lambda: models.convnext_tiny(num_classes=4), 32),
    'vit_b_16': (lambda: models.vit_b_16(num_classes=4, image_size=32), 32),
    'swin_t': (lambda: models.swin_t(num_classes=4), 64),
    'efficientnet_b0': (lambda: models.efficientnet_b0(num_classes=4), 64),
    'densenet121': (lambda: models.densenet121(num_classes=4), 64),
}


def a_learner(path, model, x, y, loss):
    data = TensorDataset(x, y)
    dls = DataLoaders.from_dsets(data, data, bs=len(x), num_workers=0, pin_memory=False, device='cpu')
    return silent(Learner(dls, model, loss_func=loss, path=path))


def silent(learn):
    learn.remove_cb(learn.progress)
    learn.logger = noop
    return learn


def check(learn, callback, sparsity=90):
    "One step, the count to the weight, and no less after validation."
    keys = list(learn.model.state_dict())
    learn.fit(1, 1e-4, cbs=callback)
    report = callback.sparsifier.report()
    assert report.zeros == round(sparsity / 100 * report.weights) and report.weights > .6 * report.parameters
    assert list(learn.model.state_dict()) == keys
    learn.validate()
    assert callback.sparsifier.report().zeros == report.zeros


@pytest.mark.parametrize('name', VISION)
def test_vision(name, tmp_path):
    make, side = VISION[name]
    learn = a_learner(tmp_path, make(), torch.randn(2, 3, side, side), torch.tensor([0, 3]), CrossEntropyLossFlat())
    check(learn, SparsifyCallback(90, schedule='one_shot'))


@pytest.mark.parametrize('granularity, context, sparsity', [('filter', 'local', 50), (block(4, 4), 'global', 50), ('weight', '2:4', 50), ('weight', 'erk', 90),
                                                            ('weight', 'lamp', 90), ('channel', 'normalized', 50)], ids=str)
@pytest.mark.parametrize('name', ['resnet18', 'mobilenet_v3_small', 'swin_t'])
def test_vision_otherwise(name, granularity, context, sparsity, tmp_path):
    make, side = VISION[name]
    learn = a_learner(tmp_path, make(), torch.randn(2, 3, side, side), torch.tensor([0, 3]), CrossEntropyLossFlat())
    callback = SparsifyCallback(sparsity, granularity, context, schedule='one_shot')
    learn.fit(1, 1e-4, cbs=callback)
    report, rows = callback.sparsifier.report(), callback.sparsifier.layers.values()
    size = max(layer.grouping.size for layer in rows)
    if context == '2:4':
        assert all(layer.weight.numel() * .4 <= int((layer.weight != 0).sum()) for layer in rows) and report.sparsity == pytest.approx(50, abs=3)
    elif context == 'local': assert all(abs(r.zeros - r.weights / 2) <= layer.grouping.size / 2 for r, layer in zip(report.rows, rows) if r.groups > 1)
    else: assert abs(report.zeros - sparsity / 100 * report.weights) <= (size / 2 if size > 1 else .5)
    learn.validate()
    assert callback.sparsifier.report().zeros == report.zeros


def test_unet(tmp_path):
    class Up(nn.Module):
        "A U-Net of its own, up by transposed convolutions."
        def __init__(self):
            super().__init__()
            self.down, self.deep = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)
            self.up, self.out = nn.ConvTranspose2d(16, 8, 2, 2), nn.ConvTranspose2d(16, 2, 2, 2)
        def forward(self, x):
            x = self.down(x).relu()
            return self.out(torch.cat([x, self.up(self.deep(x).relu()).relu()], 1))
    body = create_body(models.resnet18(), pretrained=False)
    for model in (Up(), DynamicUnet(body, 2, (32, 32))):
        learn = a_learner(tmp_path, model, torch.randn(2, 3, 32, 32), torch.randint(0, 2, (2, 32, 32)), CrossEntropyLossFlat(axis=1))
        check(learn, SparsifyCallback(90, schedule='one_shot'))


def test_awd_lstm(tmp_path):
    config = dict(emb_sz=30, n_hid=40, n_layers=2, pad_token=1, bidir=False, output_p=.1, hidden_p=.1, input_p=.1, embed_p=.1, weight_p=.1,
                  tie_weights=True, out_bias=True)
    learn = a_learner(tmp_path, get_language_model(AWD_LSTM, 50, config), torch.randint(0, 50, (4, 12)), torch.randint(0, 50, (4, 12)),
                      CrossEntropyLossFlat())
    learn.add_cbs([ModelResetter(), RNNCallback()])
    callback = SparsifyCallback(90, schedule='one_shot')
    check(learn, callback)
    names = [r.layer for r in callback.sparsifier.report().rows]
    assert [n for n in names if n.endswith('weight_hh_l0_raw')] == [f'0.rnns.{i}.weight_hh_l0_raw' for i in (0, 1)]
    assert [n for n in names if n.endswith('weight_ih_l0')] == [f'0.rnns.{i}.module.weight_ih_l0' for i in (0, 1)]
    raw = learn.model[0].rnns[0].weight_hh_l0_raw
    learn.model.eval()
    learn.model(torch.randint(0, 50, (4, 12)))
    assert torch.equal(learn.model[0].rnns[0].module.weight_hh_l0 == 0, raw == 0)  # what the LSTM runs with is as sparse


def test_tabular(tmp_path):
    frame = pd.DataFrame({'kind': list('abcd') * 8, 'size': range(32), 'y': [0., 1.] * 16})
    dls = TabularDataLoaders.from_df(frame, path=tmp_path, procs=[Categorify, Normalize], cat_names=['kind'], cont_names=['size'], y_names='y',
                                     valid_idx=range(8), bs=24, num_workers=0, device='cpu')
    learn = silent(tabular_learner(dls, layers=[40, 20], loss_func=MSELossFlat()))
    callback = SparsifyCallback(80, schedule='one_shot', layers=[nn.Linear, nn.Embedding])
    check(learn, callback, 80)
    assert [r.kind for r in callback.sparsifier.report().rows] == ['Embedding', 'Linear', 'Linear', 'Linear']
