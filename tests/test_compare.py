"What all of deploy refuses at the door."
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from fasterai.deploy.export import export_onnx
from fasterai.deploy.payoff import payoff
from fasterai.deploy.shrink import shrink
from fasterai.deploy.speed_up import speed_up

DOORS = {
    'shrink': lambda model, x, path: shrink(model, x),
    'speed_up': lambda model, x, path: speed_up(model, x),
    'payoff dense': lambda model, x, path: payoff(model, nn.Linear(4, 3), x),
    'payoff sparse': lambda model, x, path: payoff(nn.Linear(4, 3), model, x),
    'export_onnx': lambda model, x, path: export_onnx(model, path / 'a.onnx', x),
}
every_door = pytest.mark.parametrize('door', DOORS)


def pruned():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    prune.l1_unstructured(model[1], 'weight', .5)
    return model


def globally_pruned():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    for _ in range(2): prune.global_unstructured([(model[0], 'bias'), (model[1], 'weight')], prune.L1Unstructured, amount=.3)
    return model


def pruned_and_run():
    model = pruned()
    with torch.no_grad(): model(torch.randn(2, 4))
    return model


def weight_normed(): return nn.Sequential(nn.Linear(4, 4), nn.utils.weight_norm(nn.Linear(4, 3)))


def spectral_normed():
    model = nn.Sequential(nn.Linear(4, 4), nn.utils.spectral_norm(nn.Linear(4, 3)))
    model(torch.randn(2, 4))
    return model


def with_an_activation():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    model[0].last = model(torch.randn(2, 4))
    return model


@every_door
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('make, says', [
    (pruned, r"torch.nn.utils.prune computes the weight of '1' .*call torch.nn.utils.prune.remove\(module, 'weight'\) first"),
    (pruned_and_run, r"torch.nn.utils.prune computes the weight of '1' .*call torch.nn.utils.prune.remove\(module, 'weight'\) first"),
    (globally_pruned, r"bias of '0' .*torch.nn.utils.prune.remove\(module, 'bias'\) first"),
    (weight_normed, r"weight of '1' .*torch.nn.utils.remove_weight_norm\(module, 'weight'\) first"),
    (spectral_normed, r"weight of '1' .*torch.nn.utils.remove_spectral_norm\(module, 'weight'\) first"),
    (with_an_activation, r"last of '0' .*detach"),
    (lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3).to('meta')), "'1.weight' on the meta device, expected values"),
    (lambda: nn.Linear, 'got type, expected a torch.nn.Module'),
    (lambda: None, 'got NoneType, expected a torch.nn.Module')])
def test_models_that_cannot_be_copied_are_refused(door, make, says, tmp_path):
    model = make()
    hooks = deepcopy([type(h) for m in model.modules() for h in m._forward_pre_hooks.values()]) if isinstance(model, nn.Module) else []
    argument = door.split()[-1] if 'payoff' in door else 'model'
    with pytest.raises((ValueError, TypeError), match=f'{argument}: .*{says}'): DOORS[door](model, torch.randn(2, 4), tmp_path)
    if hooks: assert hooks == [type(h) for m in model.modules() for h in m._forward_pre_hooks.values()]
    assert not list(tmp_path.iterdir())


@every_door
def test_an_empty_example_is_refused(door, tmp_path):
    with pytest.raises(ValueError, match=r'example: got an empty batch of shape \(0, 4\), expected at least one item'):
        DOORS[door](nn.Linear(4, 3), torch.randn(0, 4), tmp_path)


class Named(nn.Module):
    "Two inputs by name, and a list of tensors."
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, *, x, more=()): return self.head(self.body(x) + sum(self.body(m) for m in more))


def test_keywords_and_lists():
    x, model = torch.randn(2, 4), Named()
    with torch.no_grad(): model.body.weight[0] = 0
    with torch.no_grad(): model.body.bias[0] = 0
    assert shrink(model, {'x': x}, verbose=False).body.out_features == 3
    assert shrink(model, {'x': x, 'more': [x, x]}, verbose=False).body.out_features == 3
    assert speed_up(model, {'x': x}, verbose=False, seconds=0) is not model
    found = payoff(model, model, {'x': x}, batches=(1,), seconds=0)
    assert ('multiply-adds', '', 28, 28) in found.rows
    with pytest.raises(TypeError, match=r'example: got \[x=\(2, 4\), more=list\], expected tensors: their items are repeated'):
        payoff(model, model, {'x': x, 'more': [x]}, seconds=0)


def test_a_list_with_an_empty_tensor_is_refused():
    with pytest.raises(ValueError, match='example: got an empty batch'): shrink(Named(), {'x': torch.ones(2, 4), 'more': [torch.ones(0, 4)]})


def test_the_way_out_is_one():
    model = pruned()
    prune.remove(model[1], 'weight')
    assert type(shrink(model, torch.randn(2, 4), verbose=False)) is nn.Sequential
