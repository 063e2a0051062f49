"BatchNorms are folded where a convolution alone feeds them, and nowhere else."
import torch
from torch import nn

from fasterai.arguments import Inputs
from fasterai.deploy.compare import agree, outputs
from fasterai.deploy.folding import fold_norms


class Block(nn.Module):
    "A convolution and a BatchNorm, joined as `way` says."

    def __init__(self, way):
        super().__init__()
        self.way, self.conv, self.norm = way, nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        with torch.no_grad(): self.norm.running_mean.normal_(), self.norm.running_var.uniform_(.5, 2), self.norm.weight.normal_()

    def forward(self, x):
        y = self.conv(x)
        if self.way == 'plain': return self.norm(y)
        if self.way == 'relu between': return self.norm(y.relu())
        if self.way == 'read twice': return self.norm(y) + y
        if self.way == 'norm called twice': return self.norm(y) + self.norm(x)
        if self.way == 'conv called twice': return self.norm(y) + self.conv(x)
        return self.norm(y) + self.norm.running_mean.sum()


def folded(model, x=None):
    x = Inputs((torch.randn(2, 3, 5, 5) if x is None else x,))
    expected = outputs(model, x)
    new = fold_norms(model, x, expected)
    assert agree(outputs(new, x), expected, 1e-5)
    return new


def test_a_norm_behind_a_convolution_is_folded():
    model = Block('plain').train()
    with torch.no_grad(): model.conv.weight[:, 0] = 0
    new = folded(model)
    assert type(new.norm) is nn.Identity and type(model.norm) is nn.BatchNorm2d and new is not model
    assert not new.conv.weight[:, 0].any() and model.conv.training


def test_it_is_not_folded_where_outputs_would_change():
    for way in ('relu between', 'read twice', 'norm called twice', 'conv called twice', 'statistics'):
        model = Block(way)
        assert folded(model) is model, way


def test_other_norms_stay():
    for norm in (nn.BatchNorm2d(3, track_running_stats=False), nn.GroupNorm(1, 3)):
        model = nn.Sequential(nn.Conv2d(3, 3, 1), norm)
        assert folded(model) is model
    one = nn.Sequential(nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3, affine=False))
    assert type(folded(one, torch.randn(2, 3, 5))[1]) is nn.Identity
