"What a layer reads, as a matrix: rows times the weight are the output, for every kind of layer."
import pytest
import torch
from torch import nn

from fasterai.inputs import Watching

LAYERS = {
    'linear': (lambda: nn.Linear(5, 7), (3, 4, 5)), 'strided grouped': (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9, 8)),
    'dilated same': (lambda: nn.Conv2d(4, 6, (3, 2), dilation=(2, 1), padding='same'), (2, 4, 9, 8)), 'valid': (lambda: nn.Conv2d(2, 3, 3, padding='valid'), (2, 2, 5, 5)),
    'circular': (lambda: nn.Conv1d(3, 4, 3, padding=2, padding_mode='circular'), (2, 3, 9)), 'depthwise': (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 6, 6)),
    '3d': (lambda: nn.Conv3d(2, 4, 2, groups=2), (2, 2, 4, 5, 6)), 'one picture': (lambda: nn.Conv2d(3, 2, 3), (3, 5, 5)),
    'transposed': (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2), (2, 4, 5, 6)),
    'transposed 1d': (lambda: nn.ConvTranspose1d(4, 6, 4, stride=3), (2, 4, 5))}


@pytest.mark.parametrize('name', LAYERS)
def test_rows_times_the_weight_are_the_output(name):
    make, shape = LAYERS[name]
    layer, x, seen = make(), torch.randn(shape), []
    with torch.no_grad(), Watching({id(layer.weight)}, seen.append): out = layer(x)
    read, = seen
    product = torch.einsum('gnk,gok->ngo', read.rows(), read.matrix(layer.weight)).flatten(1) + layer.bias
    if read.settings:
        batched = out if out.ndim == layer.weight.ndim else out[None]
        out = batched.movedim(1, -1)
    torch.testing.assert_close(product, out.reshape(-1, product.shape[1]))
    assert torch.equal(read.from_matrix(read.matrix(layer.weight)), layer.weight)


def test_only_the_layers_that_are_asked_for_are_seen_and_nothing_is_left_on_the_model():
    model, seen = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), []
    with Watching({id(model[2].weight)}, seen.append): model(torch.randn(3, 4))
    assert len(seen) == 1 and seen[0].weight is model[2].weight
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
